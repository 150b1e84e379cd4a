"""Programs of the older API as they are: scripts with another import line, started, interrupted, killed and started again."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import ROOT, NodeProcess, Site, children_of, free_port, is_alive, wait_for

from p2pcluster.classic import utils
from p2pcluster.classic.queues import Door
from p2pcluster.client import Cluster
from p2pcluster.config import Address
from p2pcluster.lan import Lan
from tests.namespaces import Switch, namespaces_can_be_made

SECRET = b"a key of sixteen or more characters"
KEY = repr(SECRET)

FUNCTIONS = """
    from p2pcluster.classic.wrappers import i_wrap, io_wrap, o_wrap

    @i_wrap
    def Generate():
        yield from range(1, {count} + 1)

    @io_wrap
    def Square(x):
        return x ** 2

    @io_wrap
    def Subtract1(x):
        return x - 1

    @o_wrap
    def Print(x):
        print("got", x)
"""
SERVER = """
    from p2pcluster.classic import BaseServer

    c = BaseServer(port={port}, authkey={key})
    c.configure(['gen2sq_q', 'sq2sub_q', 'sub2pr_q'])
    c.runserver()
"""
QUEUES = "[['gen2sq_q'], ['gen2sq_q', 'sq2sub_q'], ['sq2sub_q', 'sub2pr_q'], ['sub2pr_q']]"
CLIENT = """
    c = BaseClient(('127.0.0.1', {port}), authkey={key})
    c.process([Generate, Square, Subtract1, Print], {queues}, [1, 1, 1, 1])
"""


class Programs:
    """Scripts in folders of one site; all of them use its port."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def write(self, name: str, *parts: str, **values: object) -> Path:
        """A script made of parts, which may name `port`, `key`, `queues`, `count` and what else is given."""
        file = self.site.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        known = {"port": self.site.port, "key": KEY, "queues": QUEUES, "count": 40, **values}
        text = "".join(textwrap.dedent(part) for part in parts)
        for word, value in known.items():
            text = text.replace("{" + word + "}", str(value))
        file.write_text(text)
        return file

    def start(self, file: Path, namespace: str | None = None, **environment: str) -> NodeProcess:
        inside = ["ip", "netns", "exec", namespace] if namespace else []
        return self.site.start(cwd=file.parent, command=[*inside, sys.executable, str(file)], **environment)

    def connect(self) -> Cluster:
        """To the server, as a client does."""
        options = utils.options_of(self.site.port, seed=Address("127.0.0.1", self.site.port))
        return Door(options, utils.stretched(SECRET, self.site.port)).connect(10)

    def server(self, text: str = SERVER, **values: object) -> NodeProcess:
        return self.start(self.write("server.py", text, **values))


def got(*nodes: NodeProcess) -> list[int]:
    """What Print has printed, sorted."""
    return sorted(int(line.split()[1]) for node in nodes for line in node.lines if line.startswith("got "))


def said(node: NodeProcess, text: str) -> str:
    """The line for people with this text, once it is there."""
    return wait_for(lambda: next((line for line in node.errors if text in line), ""), f"a line with {text!r}: {node.errors}")


def interrupt(node: NodeProcess, by: signal.Signals = signal.SIGINT) -> None:
    """Ctrl-C: it ends in order, without a traceback and without leaving a process."""
    children = list(children_of(node.pid))
    node.signal(by)
    assert node.wait_for_exit() == 130
    assert "Traceback" not in "\n".join(node.errors), node.errors
    assert not [pid for pid in children if is_alive(pid)]


@pytest.fixture
def programs(site: Site) -> Iterator[Programs]:
    site.key_file.unlink()  # nothing here may depend on a key of the command line's
    yield Programs(site)


EXPECTED = [x * x - 1 for x in range(1, 41)]


def test_the_program_of_the_readme_of_the_older_package_runs_in_any_order_and_ctrl_c_ends_it(programs: Programs) -> None:
    """Without a guard, its functions in the script itself, the client before its server."""
    client = programs.start(programs.write("client.py", "from p2pcluster.classic import BaseClient", FUNCTIONS, CLIENT))
    said(client, "waiting for the server at 127.0.0.1")
    server = programs.server()
    wait_for(lambda: len(got(client)) >= 40, "each number is printed")
    assert got(client) == EXPECTED, "each once"
    interrupt(client)
    assert got(client) == EXPECTED
    assert server.stop() == 0


def test_the_programs_of_the_readme_do_what_it_says(programs: Programs) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    found = [re.findall(rf"^```python\n(# queue_{name}.py\n.*?)^```$", readme, flags=re.M | re.S) for name in ("server", "client")]
    texts = [text.replace("50000", "{port}") for (text,) in found]
    serving, working = (programs.start(programs.write(f"{number}.py", text)) for number, text in enumerate(texts))
    wait_for(lambda: sorted(working.lines, key=int) == ["0", "3", "8", "15", "24"], "what it prints")
    interrupt(working)
    assert "this authkey has 8 characters" in "".join(serving.errors)
    assert serving.stop() == 0


def test_a_server_killed_in_the_middle_goes_on_with_every_item_and_two_clients_share_the_work(programs: Programs) -> None:
    """With a guard, the functions in a module beside the scripts, one client's functions given one by one."""
    gate = programs.site.folder / "gate"
    programs.write("functions.py", FUNCTIONS, """
        import time
        from pathlib import Path

        @i_wrap
        def Generate():
            for x in range(1, 2001):
                while x == 1000 and not Path({gate}).exists():
                    time.sleep(0.02)
                yield x
    """, gate=repr(str(gate)))
    first = "from functions import Generate, Square\nfrom p2pcluster.classic import BaseClient\n"
    second = "from functions import Subtract1, Print\nfrom p2pcluster.classic import BaseClient\n"
    guard = """
    if __name__ == '__main__':
        c = BaseClient(('127.0.0.1', {port}), authkey={key})
        c.process({functions})
    """
    server = programs.server()
    printing = programs.start(programs.write("printing.py", second, guard,
                                             functions="[Subtract1, Print], [['sq2sub_q', 'sub2pr_q'], ['sub2pr_q']], [2, 1]"))
    making = programs.start(programs.write("making.py", first, guard,
                                           functions="[Generate, Square], [['gen2sq_q'], ['gen2sq_q', 'sq2sub_q']], [1, 2]"))
    printing.wait_for_line("got ")
    server.kill()
    said(printing, "the server is away, and is waited for")
    assert len(got(printing)) < 2000, "it was killed in the middle"
    server = programs.server()
    gate.touch()
    wait_for(lambda: len(set(got(printing))) >= 2000, "each number is printed")
    assert set(got(printing)) == {x * x - 1 for x in range(1, 2001)}
    interrupt(printing)
    interrupt(making, signal.SIGTERM)
    server.stop()


def test_undecorated_functions_loop_over_raw_queues_and_process_ends_with_them(programs: Programs) -> None:
    """One function after the other, each for itself, and the queues used in between: with `get` and `put` as of `queue.Queue`. A decorated
    function that the program calls with queues runs the loop."""
    programs.server()
    client = programs.start(programs.write("client.py", """
        import queue
        import threading
        from p2pcluster.classic import BaseClient, i_wrap, io_wrap

        def produce(out):
            for x in range(5):
                out.put(x)

        def work(inside, out):
            while True:
                try:
                    out.put(inside.get(timeout=0.2) * 10)
                    inside.task_done()
                except queue.Empty:
                    return

        c = BaseClient(('127.0.0.1', {port}), authkey={key})
        c.configure(['gen2sq_q', 'sq2sub_q'])
        assert c.queues['gen2sq_q'].empty() and not c.queues['gen2sq_q'].full()
        c.process(produce, ['gen2sq_q'], 1)
        assert c.queues['gen2sq_q'].qsize() == 5
        c.process(work, ['gen2sq_q', 'sq2sub_q'], 2)
        c.queues['gen2sq_q'].join()
        results = c.queues['sq2sub_q']
        print("got", *sorted(results.get() for _ in range(5)))
        try:
            results.get_nowait()
        except queue.Empty:
            print("empty")
        results.put_nowait("for tomorrow")
        assert results is c.queues['sq2sub_q'] and results.maxsize == 0 and 'none such' not in c.queues

        @i_wrap
        def Two():
            yield from (1, 2)

        @io_wrap
        def Tenfold(x):
            return 10 * x

        Two(c.queues['sub2pr_q'])
        threading.Thread(target=Tenfold, args=(c.queues['sub2pr_q'], c.queues['gen2sq_q']), daemon=True).start()
        print("got", c.queues['gen2sq_q'].get(), c.queues['gen2sq_q'].get())
        try:
            c.process(lambda x: x, ['gen2sq_q'], 1)
        except SystemExit as end:
            print("refused", end.code)
        c.queues['no such queue']
    """))
    done = client.finished()
    assert done.out.splitlines() == ["got 0 10 20 30 40", "empty", "got 10 20", "refused 2"]
    assert "client.py" in done.err and "there is no queue 'no such queue'" in done.err  # of a mapping, so it is an error like any other's


def test_what_was_there_before_is_told_or_dropped_and_shutdown_never_raises(programs: Programs) -> None:
    """The server's own queues, before it serves and while it does; `shutdown` before, from another thread, and again."""
    server = """
        import threading
        from p2pcluster.classic import BaseServer

        c = BaseServer(port={port}, authkey={key}{more})
        c.shutdown()
        c.configure(['left', 'other'])
        c.queues['left'].put({"a": 1})
        def later():
            c.queues['left'].put(2)
            c.shutdown()
        threading.Thread(target=later).start()
        c.runserver()
        c.shutdown()
        print("over")
    """
    first = programs.server(server, more="").finished()
    assert (first.code, first.lines[-1]) == (0, "over") and "items from before" not in first.err
    second = programs.server(server, more="").finished()
    assert "items from before: 2 in left" in second.err
    third = programs.server(server, more=", fresh=True").finished()
    assert third.code == 0
    assert "items from before" not in programs.server(server, more=", fresh=True").finished().err


def test_clients_find_their_server_and_are_told_what_to_run_and_sent_the_files(programs: Programs) -> None:
    """Without an address; the scheduler hears of the client; a client's own files stay as they are; and the key is nowhere in clear."""
    programs.write("server/helper.py", "def square(x):\n    return x ** 2\n")
    programs.write("server/data/offset.txt", "1")
    server = programs.start(programs.write("server/server.py", """
        from pathlib import Path
        import helper
        from p2pcluster.classic import BroadcastServer, ProtocolServer
        from p2pcluster.classic.schedulers import PipelineReplicate
        from p2pcluster.classic.wrappers import i_wrap, io_wrap, o_wrap

        @i_wrap
        def Generate():
            yield from range(1, 41)

        @io_wrap
        def Square(x):
            return helper.square(x) - int(Path("data/offset.txt").read_text())

        @o_wrap
        def Print(x):
            print("got", x)

        class Mine(PipelineReplicate):
            def schedule(self, info, functions):
                print("asked by", info.cores > 0, info.address, info == info.name.encode(), sorted(functions), flush=True)
                return {**functions, "Square": [Square, ["gen2sq_q", "sq2pr_q"], 2]}

        cluster_server = BroadcastServer({port}, authkey={key})
        p = ProtocolServer({port}, cluster_server, {"Generate": [Generate, ["gen2sq_q"], 1], "Square": [Square, ["gen2sq_q", "sq2pr_q"], 1],
                                                    "Print": [Print, ["sq2pr_q"]]}, Mine())
    """))
    programs.write("client/helper.py", "this is no Python, and the client's own")
    with Lan("127.0.0.1", programs.site.port) as lan:
        client = programs.start(programs.write("client/client.py", """
            from p2pcluster.classic import ProtocolClient

            ProtocolClient({port}, authkey={key}).run()
        """))
        wait_for(lambda: len(got(client)) >= 40, "each number is printed")
        datagrams = b"".join(data for data, _ in lan.receive())
    assert got(client) == EXPECTED
    server.wait_for_line("asked by True 127.0.0.1 True ['Generate', 'Print', 'Square']")
    assert "Generate x 1, Square x 2, Print x 1" in said(client, "has this client run")
    assert (programs.site.folder / "client" / "helper.py").read_text() == "this is no Python, and the client's own"
    assert datagrams and SECRET not in datagrams
    for pid in (server.pid, client.pid, *children_of(client.pid)):
        assert SECRET not in Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    interrupt(client)
    stranger = programs.start(programs.write("client/stranger.py", """
        from p2pcluster.classic import BaseClient

        BaseClient(("127.0.0.1", {port}), authkey=b'another key, and long enough')
    """))
    assert "has another authkey: give both programs the same" in stranger.finished().the_error()
    assert server.stop() == 0


def test_a_function_server_names_functions_that_both_have(programs: Programs) -> None:
    programs.write("functions.py", FUNCTIONS)
    programs.start(programs.write("server.py", """
        from functions import Generate, Square, Subtract1, Print
        from p2pcluster.classic import FunctionServer

        c = FunctionServer({port}, {key}, {"Generate": [Generate, ["a"]], "Square": [Square, ["a", "b"], 2],
                                           "Subtract1": [Subtract1, ["b", "c"]], "Print": [Print, ["c"], 1]})
        c.runserver()
    """))
    client = programs.start(programs.write("client.py", """
        from p2pcluster.classic import FunctionClient

        FunctionClient({port}, {key})
    """))
    wait_for(lambda: len(got(client)) >= 40, "each number is printed")
    assert got(client) == EXPECTED
    interrupt(client)


def test_an_item_is_not_lost_with_its_process_and_one_whose_function_raises_is_parked(programs: Programs) -> None:
    """And nobody looks at a clock while nothing happens."""
    server = programs.server()
    client = programs.start(programs.write("client.py", """
        import time
        from p2pcluster.classic import BaseClient
        from p2pcluster.classic.wrappers import i_wrap, o_wrap

        @i_wrap
        def Generate():
            yield from [1, 2, 3]

        @o_wrap(retries=1, backoff_s=0.05)
        def Print(x):
            if x == 3:
                raise RuntimeError("not this one")
            wait_s = 0 if (OUT / str(x)).exists() else 3600
            print("begins", x)
            time.sleep(wait_s)
            print("got", x)

        from pathlib import Path
        OUT = Path({out})
        BaseClient(('127.0.0.1', {port}), authkey={key}).process([Generate, Print], [['gen2sq_q'], ['gen2sq_q']], [1, 1])
    """, out=repr(str(programs.site.folder))))
    client.wait_for_line("begins 1")
    (programs.site.folder / "1").touch()
    (programs.site.folder / "2").touch()
    (pid,) = [pid for pid in children_of(client.pid) if Path(f"/proc/{pid}/cmdline").read_bytes().endswith(b"Print\0")]
    os.kill(pid, signal.SIGKILL)
    said(client, "a process of Print died of signal 9 (SIGKILL) and is replaced; the item of gen2sq_q that it had in hand is tried again")
    wait_for(lambda: got(client) == [1, 2], "the others are printed")
    said(client, "Print failed 2 times with an item of gen2sq_q, which is parked")
    (pid,) = children_of(client.pid)
    before = [_spent(one) for one in (pid, client.pid)]
    time.sleep(1)  # the time in which nothing happens
    for one, (wakes, ticks) in zip((pid, client.pid), before, strict=True):
        now_wakes, now_ticks = _spent(one)
        assert now_wakes - wakes < 10, "it looks now and then whether its server is there"
        assert now_ticks - ticks <= 2, "of a hundred: the older one's took fifty"
    words = ["--cluster", f"classic-{programs.site.port}"]
    plain = {"P2PCLUSTER_HOME": "", "P2PCLUSTER_AUTHKEY_FILE": "", "P2PCLUSTER_PORT": ""}
    parked = programs.site.do("parked", "list", *words, **plain)
    assert "RuntimeError: not this one" in parked.out, parked.err
    client.signal(signal.SIGINT)
    assert client.wait_for_exit() == 130
    server.stop()


def test_an_item_that_kills_its_process_is_counted_in_the_journal_and_parked_and_the_others_go_on(programs: Programs) -> None:
    """Whatever kills it; also when the client is another one by then. Each process count is the client's own, and stays."""
    server = programs.server()
    script = programs.write("client.py", """
        import os, signal
        from p2pcluster.classic import BaseClient
        from p2pcluster.classic.wrappers import o_wrap

        @o_wrap(retries=1, backoff_s={backoff_s})
        def Print(x):
            if x == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            if x == 3:
                os._exit(0)
            print("got", x)

        c = BaseClient(('127.0.0.1', {port}), authkey={key})
        if not os.path.exists("fed"):
            open("fed", "w").close()
            for x in range(6):
                c.queues['gen2sq_q'].put(x)
        c.process(Print, ['gen2sq_q'], 2)
    """, backoff_s=4)  # the first client is stopped meanwhile
    first = programs.start(script)
    said(first, "a process of Print died of signal 9 (SIGKILL) and is replaced; the item of gen2sq_q that it had in hand is tried again")
    said(first, "a process of Print ended and is replaced; the item of gen2sq_q that it had in hand is tried again")
    wait_for(lambda: got(first) == [0, 1, 4, 5], "the others are printed")
    wait_for(lambda: len(list(children_of(first.pid))) == 2, "both have been replaced")
    interrupt(first)
    second = programs.start(script)
    said(second, f"died of signal 9 (SIGKILL) and is replaced; the item of gen2sq_q that it had in hand is parked: python -m p2pcluster "
                 f"parked --cluster classic-{programs.site.port}")
    said(second, "ended and is replaced; the item of gen2sq_q that it had in hand is parked")
    with programs.connect() as cluster:
        parked = {item["id"].rpartition(":")[2]: (item["deliveries"], item["error"]["text"]) for item in cluster.parked()}
    assert parked == {"3": (2, "its process died of signal 9 (SIGKILL)"), "4": (2, "its process ended")}
    wait_for(lambda: len(list(children_of(second.pid))) == 2, "both have been replaced")
    wait_for(lambda: set(got(first, second)) == {0, 1, 4, 5}, "the others are printed")  # one may be again that was done and not told yet
    interrupt(second)
    server.stop()


def _spent(pid: int) -> tuple[int, int]:
    """How often a process went to sleep of itself, and the hundredths of a second for which it had a core."""
    text = "".join(file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/status"))
    wakes = sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("voluntary_ctxt_switches"))
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return wakes, int(fields[11]) + int(fields[12])


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (os.environ["BOMB"],)


def test_nothing_is_unpickled_from_whoever_answers_and_who_finds_nobody_gives_up_with_a_line(
        programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = programs.site.folder / "bomb"
    monkeypatch.setenv("BOMB", str(bomb))
    script = programs.write("client.py", """
        from p2pcluster.classic import BaseClient

        BaseClient(('127.0.0.1', {port}), authkey={key}, timeout_s=0.5)
    """)
    nobody = programs.start(script).finished()
    assert nobody.code == 4
    lines = nobody.err.splitlines()
    assert len(lines) == 2 and "waiting for the server" in lines[0] and "there was no server at 127.0.0.1" in lines[1], lines
    patient = programs.start(programs.write("patient.py", """
        from p2pcluster.classic import BroadcastClient

        BroadcastClient({port}, {key})
    """))
    said(patient, "looking for the server of port")
    interrupt(patient)
    body = pickle.dumps(_Bomb())
    with socket.create_server(("127.0.0.1", programs.site.port)) as listener:
        client = programs.start(script)
        listener.settimeout(20)
        answered, _ = listener.accept()
        answered.sendall(len(body).to_bytes(4, "big") + body)
        done = client.finished()
        answered.close()
    assert done.code != 0 and "Traceback" not in done.err
    assert not bomb.exists()
    pickle.loads(body)
    assert bomb.exists(), "it would have gone off"


def test_who_listens_on_the_wire_reads_values_and_no_key_and_a_weak_one_is_warned_about(programs: Programs) -> None:
    with Wire(programs.site.port) as wire:
        server = programs.server("""
            from p2pcluster.classic import BroadcastServer

            c = BroadcastServer(port={port}, authkey=b'weak password')
            c.configure(['a'])
            c.runserver()
        """)
        assert "this authkey has 13 characters" in said(server, "authkey")
        said(server, "serving a on port")
        client = programs.start(programs.write("client.py", """
            from p2pcluster.classic import BroadcastClient

            c = BroadcastClient({port}, b'weak password')
            c.queues['a'].put('a value in clear')
            print(c.queues['a'].get())
        """)).finished()
    assert client.out == "a value in clear" and "this authkey has 13 characters" in client.err
    assert b"a value in clear" in wire.heard and f"classic-{programs.site.port}".encode() in wire.heard, "it was listened to"
    stretched = utils.stretched(b"weak password", programs.site.port)
    for secret in (b"weak password", stretched, bytes.fromhex(stretched.decode())):
        assert secret not in wire.heard
    on_disk = {file: file.read_bytes() for file in (programs.site.folder / ".p2pcluster").rglob("*") if file.is_file()}
    assert not [file for file, data in on_disk.items() if b"weak password" in data]


class Wire:
    """What goes over loopback to or from a port, and every datagram, as somebody there hears it."""

    def __init__(self, port: int) -> None:
        self._ends = port.to_bytes(2, "big")
        self.heard = bytearray()
        try:
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        except (AttributeError, PermissionError):
            pytest.skip("here one cannot listen to what others send")
        self._socket.bind(("lo", 0))
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Wire:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                frame = self._socket.recv(1 << 17)
                if frame[23] == socket.IPPROTO_UDP or self._ends in (frame[34:36], frame[36:38]):
                    self.heard += frame


def test_ctrl_c_gives_back_what_is_in_hand_and_a_killed_program_leaves_no_process(programs: Programs) -> None:
    """With a guard, the functions in the script, one of which uses the script's own client."""
    server = programs.server()
    script = programs.write("client.py", """
        import time
        from p2pcluster.classic import BaseClient
        from p2pcluster.classic.wrappers import o_wrap

        c = BaseClient(('127.0.0.1', {port}), authkey={key})

        @o_wrap
        def Print(x):
            c.queues['sub2pr_q'].put("begun")
            time.sleep(3600)

        if __name__ == '__main__':
            c.queues['gen2sq_q'].put("item")
            c.process([Print], [['gen2sq_q']], [1])
    """)
    look = programs.write("look.py", """
        import time
        from p2pcluster.classic import BaseClient

        c = BaseClient(('127.0.0.1', {port}), authkey={key})
        assert c.queues['sub2pr_q'].get(timeout=20) == "begun"
        print("begun", flush=True)
        sizes = c.queues['gen2sq_q']
        while not sizes.qsize():
            time.sleep(0.05)
        print("it is back:", sizes.get())
    """)
    client, looking = programs.start(script), programs.start(look)
    looking.wait_for_line("begun")
    assert "it is back" not in "".join(looking.lines)
    client.signal(signal.SIGINT)
    said(client, "stopping: what runs may finish")
    client.signal(signal.SIGINT)
    assert client.wait_for_exit() == 130 and "Traceback" not in "\n".join(client.errors)
    assert looking.finished().lines[-1] == "it is back: item"
    again, looking = programs.start(script), programs.start(look)
    looking.wait_for_line("begun")
    again.kill()  # with which its processes end too: see harness
    assert looking.finished().lines[-1] == "it is back: item"
    server.stop()


@pytest.fixture
def hosts(programs: Programs) -> Iterator[list[Host]]:
    """Three machines on a network of their own."""
    if not namespaces_can_be_made():
        pytest.skip("network namespaces cannot be made here")
    switch = Switch()
    try:
        yield [Host(switch.host(name, f"10.77.4.{number}/24"), {"HOME": str(programs.site.folder / name), "P2PCLUSTER_BIND": "0.0.0.0"})
               for number, name in enumerate("abc", 1)]
    finally:
        for node in programs.site.nodes:
            if node.is_running:
                node.kill()
        switch.close()


class Host(NamedTuple):
    """A machine: its namespace, and what its programs find in their environment."""

    namespace: str
    environment: dict[str, str]


def test_two_machines_are_told_what_to_run_and_sent_the_files_and_share_the_work(programs: Programs, hosts: list[Host]) -> None:
    """Queues on one port, functions on another; one of the clients is there before the server."""
    programs.write("server/functions.py", FUNCTIONS, count=400)
    clients = [programs.write(f"{name}/client.py", "from p2pcluster.classic import ProtocolClient\nProtocolClient({port}, {key}).run()\n")
               for name in "bc"]
    first = programs.start(clients[0], hosts[1].namespace, **hosts[1].environment)
    said(first, "looking for the server of port")
    server = programs.start(programs.write("server/server.py", """
        from functions import Generate, Square, Subtract1, Print
        from p2pcluster.classic import BroadcastServer, ProtocolServer
        from p2pcluster.classic.schedulers.base import BaseScheduler

        class OneSource(BaseScheduler):
            def schedule(self, info, functions):
                print("asked by", info.address, info == info.name.encode(), info.cores > 0, flush=True)
                mine = dict(functions)
                if info.address.endswith(".3"):
                    del mine["Generate"]
                return mine

        cluster_server = BroadcastServer({queue_port}, {key})
        ProtocolServer({port}, cluster_server, {"Generate": [Generate, ["a"], 1], "Square": [Square, ["a", "b"], 2],
                                                "Subtract1": [Subtract1, ["b", "c"]], "Print": [Print, ["c"], 1]}, OneSource())
    """, queue_port=free_port()), hosts[0].namespace, **hosts[0].environment)
    second = programs.start(clients[1], hosts[2].namespace, **hosts[2].environment)
    wait_for(lambda: len(got(first, second)) >= 400, "each number is printed", 60)
    assert got(first, second) == [x * x - 1 for x in range(1, 401)], "each once"
    assert {line for line in server.lines if "asked by" in line} == {f"asked by 10.77.4.{n} True True" for n in (2, 3)}
    wait_for(lambda: [len(list(children_of(node.pid))) for node in (first, second)] == [4, 4], "counts are each client's; the source has ended")
    assert sorted(file.name for file in clients[1].parent.iterdir()) == ["client.py"], "nothing beside the client's own files"
    for node in (first, second):
        interrupt(node)


def test_servers_of_one_port_and_key_on_two_machines_stay_apart_and_a_client_elsewhere_finds_its_own(
        programs: Programs, hosts: list[Host]) -> None:
    """Each on a host of its own, found by real broadcast, the server's address given or not."""

    def start(host: Host, name: str, *parts: str) -> NodeProcess:
        return programs.start(programs.write(name, *parts), host.namespace, **host.environment)

    first, second, third = hosts
    server = start(first, "server.py", SERVER.replace("BaseServer", "BroadcastServer"))
    said(server, "serving gen2sq_q")
    finder = start(third, "finder.py", "from p2pcluster.classic import BroadcastClient", FUNCTIONS, """
        c = BroadcastClient({port}, {key})
        c.process([Generate, Square, Subtract1], {queues}[:3], [1, 2, 1])
    """)
    wait_for(lambda: len(list(children_of(finder.pid))) == 3, "it has found its server, and its source has ended")
    other = start(second, "other.py", SERVER)
    said(other, "serving gen2sq_q")
    client = start(second, "printing.py", "from p2pcluster.classic import BaseClient", FUNCTIONS, """
        c = BaseClient(('10.77.4.1', {port}), authkey={key})
        c.process(Print, ['sub2pr_q'], 1)
    """)
    wait_for(lambda: len(got(client)) >= 40, "each number is printed")
    assert got(client) == EXPECTED
    assert not [line for line in [*server.lines, *other.lines] if "follows" in line or "joined" in line]
    assert sum("leads cluster" in line for line in [*server.lines, *other.lines]) == 2
    confused = start(third, "confused.py", "from p2pcluster.classic import BroadcastClient\nBroadcastClient({port}, {key})\n")
    where = ", ".join(f"10.77.4.{number}:{programs.site.port}" for number in (1, 2))
    assert f"at {where}: this is a client of the first" in said(confused, "there are 2 servers of port")
    for node in (client, finder):
        interrupt(node)
