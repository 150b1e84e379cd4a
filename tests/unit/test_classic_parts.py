"""The older API's parts that need no server: how functions are named and found, what is refused, what a scheduler hears and says."""

from __future__ import annotations

import os
import pickle
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pcluster import config, sink
from p2pcluster.classic import functions, in_hand, nodes, servers, utils, worker
from p2pcluster.classic.clients import BaseClient, _in_step, job_of
from p2pcluster.classic.functions import Reference, ScriptEnds, find, reference_of
from p2pcluster.classic.nodes import manifest_of
from p2pcluster.classic.queues import IdleQueue
from p2pcluster.classic.schedulers import BaseScheduler, ClientInfo, PipelineReplicate
from p2pcluster.classic.wrappers import Looping, as_looping, i_wrap, io_wrap
from p2pcluster.config import Address
from p2pcluster.core import commands
from p2pcluster.core.codec import Message
from p2pcluster.errors import ClusterNotFound, HomeError, ProjectError, WrongUsage
from p2pcluster.values import check_value


@i_wrap
def Generate() -> int:
    return 7


@io_wrap(retries=5)
def Square(x: int) -> int:
    return x**2


def plain(inside: Any) -> None:
    """A function that loops itself."""


# ---- decorated functions


def test_a_decorated_function_is_still_called_like_the_function_that_it_was() -> None:
    assert (Generate(), Square(3)) == (7, 9)
    assert Square.stage.options.retries == 5
    assert pickle.loads(pickle.dumps(Square)) is Square


def test_a_stage_of_a_pipeline_runs_the_loop_too_and_an_undecorated_function_is_left_alone() -> None:
    assert isinstance(as_looping(sink(lambda x: None, name="x")), Looping)
    assert as_looping(plain) is plain


def test_an_option_that_means_nothing_to_the_older_api_is_refused() -> None:
    for name in ("processes", "timeout_s", "where"):
        with pytest.raises(WrongUsage, match=f"has no option '{name}', only retries and backoff_s"):
            io_wrap(**{name: 1})
    with pytest.raises(WrongUsage, match="has no option 'retries': where"):
        i_wrap(retries=1)


# ---- what a process has in hand


def test_what_a_process_had_in_hand_is_read_by_the_one_that_started_it() -> None:
    page = in_hand.new_page()
    theirs, ours = in_hand.InHand(page), in_hand.InHand(page)
    os.close(page)
    assert theirs.is_watched and ours.read() is None
    take = {"queue": "classic/q\u00fc", "fence": ["n", "b", 7], "retries": 3, "delay_ms": 1000}
    theirs.took(take)
    assert ours.read() is None, "nothing has begun"
    theirs.begins(41)
    assert ours.read() == {**take, "id": 41}
    theirs.took({**take, "fence": ["n", "b", 8]})
    assert ours.read() is None
    theirs.begins(42)
    theirs.ends()
    assert ours.read() is None
    for one in (theirs, ours):
        one.close()
    alone = in_hand.InHand()
    alone.took(take)
    alone.begins(1)
    assert not alone.is_watched


# ---- functions by reference


def test_a_function_of_a_module_is_named_and_found() -> None:
    reference = reference_of(Square)
    assert reference == Reference(__name__, "Square")
    assert find(reference) is Square


@pytest.mark.parametrize(("value", "why"), [
    (7, "is no function"), (lambda x: x, "define it at the top of its file"), (print, None),
])
def test_what_no_other_process_finds_is_refused(value: Any, why: str | None) -> None:
    if why is None:
        assert reference_of(value).module == "builtins"
        return
    with pytest.raises(WrongUsage, match=why):
        reference_of(value)


@pytest.fixture
def main_module() -> Iterator[None]:
    """Looking for a function of a script puts another module in the place of the main one."""
    before = {name: sys.modules.get(name) for name in ("__main__", functions.MAIN)}
    yield
    for name, module in before.items():
        if module is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = module


def look_for(folder: Path, text: str, name: str, calls: int = 1) -> Any:
    """Find a function of a script as a process does that was started by its `calls`-th blocking call."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(text))
    return find(Reference("__main__", name, str(script), None, calls))


SCRIPT = """
    import builtins
    from p2pcluster.classic import BaseClient, BaseServer
    FACTOR = 2
    def first(q): return "first"
    c = BaseClient(("127.0.0.1", 1), authkey=b"x")
    c.configure(["a"])
    FACTOR = 3
    c.queues["a"].put(1)
    c.queues["a"].join()
    c.process(first, ["a"], 1)
    FACTOR = 4
    def second(q): return FACTOR
    c.process([second], [["a"]], [2])
    raise AssertionError("the process for the second call never comes here")
"""


def test_a_script_without_a_guard_is_run_up_to_the_call_that_the_process_is_for(tmp_path: Path, main_module: None) -> None:
    first = look_for(tmp_path, SCRIPT, "first")
    assert first.__globals__["FACTOR"] == 3 and first.__module__ == "__mp_main__"
    assert look_for(tmp_path, SCRIPT, "second", calls=2)(None) == 4
    with pytest.raises(ProjectError, match="there is no function second"):
        look_for(tmp_path, SCRIPT, "second", calls=1)
    assert not functions.is_loading(), "what comes after is in earnest again"


def test_a_script_ends_where_it_needs_what_is_in_a_queue(tmp_path: Path, main_module: None) -> None:
    for use in ("assert c.queues['a'].qsize() == 5", "print(c.queues['a'].get() + 1)", "c.queues['a'].get_nowait().x"):
        text = f"""
            from p2pcluster.classic import BaseClient
            c = BaseClient(("127.0.0.1", 1), authkey=b"x")
            def work(q): return "found"
            c.process(work, ["a"], 1)
            {use}
            c.process(work, ["a"], 1)
        """
        assert look_for(tmp_path, text, "work", calls=2)(None) == "found"


def test_a_decorated_function_that_a_script_calls_itself_does_nothing_in_a_process_of_another(tmp_path: Path, main_module: None) -> None:
    text = """
        from p2pcluster.classic import BaseClient, i_wrap, o_wrap
        c = BaseClient(("127.0.0.1", 1), authkey=b"x")
        @i_wrap
        def Generate(): raise AssertionError("it is not called")
        @o_wrap
        def Print(x): raise AssertionError("it is not called")
        Generate(c.queues["a"])
        def work(q): return "found"
        Print(c.queues["a"])
        raise AssertionError("its loop has no end")
    """
    assert look_for(tmp_path, text, "work")(None) == "found"


def test_servers_in_a_script_that_is_run_for_its_functions_do_nothing(tmp_path: Path, main_module: None) -> None:
    text = """
        from p2pcluster.classic import BroadcastServer, FunctionServer, PipelineReplicate, ProtocolServer
        def work(q): return "found"
        server = BroadcastServer(1, authkey=b"x")
        other = FunctionServer(1, b"x", {"work": [work, ["a"]]})
        server.shutdown()
        server.queues["a"].put(1)
        ProtocolServer(1, server, {"work": [work, ["a"]]}, PipelineReplicate())
        raise AssertionError("it blocks in its constructor")
    """
    assert look_for(tmp_path, text, "work")(None) == "found"


def test_what_a_script_itself_raises_goes_up_and_one_that_is_gone_is_told(tmp_path: Path, main_module: None) -> None:
    with pytest.raises(ZeroDivisionError):
        look_for(tmp_path, "1 / 0", "work")
    with pytest.raises(ProjectError, match="cannot be read"):
        find(Reference("__main__", "work", str(tmp_path / "gone.py")))
    with pytest.raises(ProjectError, match="module 'no_such_module_here' is not on this machine"):
        find(Reference("no_such_module_here", "work"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # as a SystemExit, Python itself passes it over
def test_calls_that_threads_of_a_script_make_end_nothing_but_themselves(tmp_path: Path, main_module: None) -> None:
    """In which order they come is chance; so the script is run to its next call in the main thread, here to its end."""
    text = """
        import threading
        from p2pcluster.classic import BaseClient
        c = BaseClient(("127.0.0.1", 1), authkey=b"x")
        def work(q): return ENDED
        threads = [threading.Thread(target=c.process, args=(work, ["a"], 1)) for _ in range(3)]
        threads.append(threading.Thread(target=lambda: print(c.queues["a"].get())))
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        ENDED = "all"
    """
    assert look_for(tmp_path, text, "work")(None) == "all"
    assert issubclass(ScriptEnds, SystemExit)


def test_a_queue_of_such_a_script_takes_everything_and_gives_nothing() -> None:
    idle = IdleQueue("a")
    idle.put(1)
    idle.put_nowait(1)
    idle.task_done()
    idle.join()
    assert not idle.full()
    with pytest.raises(ScriptEnds):
        idle.get()


def test_a_value_whose_class_stands_in_a_script_is_refused_by_the_script_and_by_its_processes() -> None:
    for main in ("__main__", "__mp_main__"):
        body = b"\x80\x04\x8c" + bytes([len(main)]) + main.encode() + b"\x94\x8c\x01A\x94\x93\x94."
        with pytest.raises(Exception, match="a value's class lives in __main__"):
            check_value(body)
    check_value(pickle.dumps("__mp_main__ is only a text here"))


# ---- keys, ports and names


def test_a_key_is_stretched_by_its_port_and_none_is_refused() -> None:
    key = utils.stretched(b"password", 50000)
    assert key == utils.stretched("password", 50000) != utils.stretched(b"password", 50001)
    assert len(key) == 128 and b"password" not in key
    for none in (b"", "", None, 7):
        with pytest.raises(WrongUsage, match="authkey"):
            utils.stretched(none, 50000)  # type: ignore[arg-type]


def test_only_a_short_key_is_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    utils.warn_of_weak_key(b"0123456789abcdef")
    assert capsys.readouterr().err == ""
    utils.warn_of_weak_key(b"0123456789abcde")
    assert "has 15 characters" in capsys.readouterr().err


def test_of_the_environment_only_what_the_program_does_not_say_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CLUSTER": "other", "HOME": "/elsewhere", "PORT": "1", "AUTHKEY_FILE": "/key", "SEED": "10.0.0.1:1"}.items():
        monkeypatch.setenv(f"P2PCLUSTER_{name}", value)
    monkeypatch.setenv("P2PCLUSTER_BIND", "127.0.0.1")
    options = utils.options_of(50000, seed=Address("localhost", 50000))
    assert options == config.Options(cluster="classic-50000", bind="127.0.0.1", port=50000, seed=(Address("localhost", 50000),))
    for port in (0, 65536, "50000", True):
        with pytest.raises(WrongUsage):
            utils.options_of(port)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "a/b", "a\nb", "x" * 101, utils.ASKED, 7])
def test_what_cannot_name_a_queue_is_refused(name: Any) -> None:
    with pytest.raises(WrongUsage, match="cannot name a queue"):
        utils.names_of(["a", name])


def test_a_port_that_is_taken_is_a_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(HomeError, match="cannot be had .Address already in use.: end"):
        nodes._refuse_taken_port("127.0.0.1", taken.getsockname()[1])


def test_queues_are_named_in_a_list() -> None:
    for names in (7, None, object()):
        with pytest.raises(WrongUsage, match="must be a list of names"):
            utils.names_of(names)


def test_what_has_no_queues_is_refused_by_a_server_of_functions(capsys: pytest.CaptureFixture[str]) -> None:
    for queues in (None, 50000, "server"):
        with pytest.raises(SystemExit):
            servers.ProtocolServer(50000, queues, {"Generate": [Generate, ["a"]]}, PipelineReplicate())  # type: ignore[arg-type]
        assert "is no server of queues" in capsys.readouterr().err


def test_a_name_alone_is_one_name() -> None:
    assert utils.names_of("gen2sq_q") == ["gen2sq_q"]


def test_an_error_is_a_line_and_an_exit_code_with_the_error_as_its_cause(capsys: pytest.CaptureFixture[str]) -> None:
    @utils.in_one_line
    def fails() -> None:
        raise ClusterNotFound("nobody is here: start one")

    with pytest.raises(SystemExit) as caught:
        fails()
    assert caught.value.code == 4 and isinstance(caught.value.__cause__, ClusterNotFound)
    assert capsys.readouterr().err == "p2pcluster: nobody is here: start one\n"


def test_ctrl_c_while_a_server_is_waited_for_ends_in_silence_too() -> None:
    @utils.in_one_line
    def waits() -> None:
        raise KeyboardInterrupt

    with pytest.raises(utils.Stopped) as caught:
        waits()
    assert caught.value.code == 130


def test_ctrl_c_is_a_keyboard_interrupt_to_who_catches_it_and_ends_others_in_silence() -> None:
    with pytest.raises(KeyboardInterrupt):
        raise utils.Stopped(130)
    code = "from p2pcluster.classic.utils import Stopped; raise Stopped(130)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


# ---- what is to run


@pytest.mark.parametrize("address", ["127.0.0.1", 50000, ("127.0.0.1",), (50000, "127.0.0.1"), ("127.0.0.1", "50000"), None])
def test_what_is_no_address_of_a_server_is_a_line(address: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        BaseClient(address, authkey=b"0123456789abcdef")
    assert caught.value.code == 2
    assert re.fullmatch(r"p2pcluster: (the server's address|port) is .*\n", capsys.readouterr().err)


def test_functions_queues_and_counts_go_in_step() -> None:
    assert list(_in_step([1, 2], ["a", "b"], [3, 4])) == [(1, "a", 3), (2, "b", 4)]
    with pytest.raises(WrongUsage, match="2 functions, the queues of 1"):
        _in_step([1, 2], ["a"], [3, 4])


@pytest.mark.parametrize("count", [0, -1, True, 1.0, "1", None])
def test_a_number_of_processes_is_a_whole_number_from_one(count: Any) -> None:
    with pytest.raises(WrongUsage, match="Square: the number of processes"):
        job_of(Square, ["a", "b"], count)


def test_a_decorated_function_has_the_queues_that_it_reads_and_feeds() -> None:
    assert job_of(Square, ["a", "b", "c"], 1).queues == ("a", "b", "c")
    assert job_of(Generate, "a", 1).queues == ("a",)
    assert job_of(plain, [], 1).queues == (), "an undecorated one may have any"
    for function, queues, needs in ((Generate, [], "no queue and needs one that it feeds"),
                                    (Square, ["a"], "has a and needs one that it reads and then one that it feeds")):
        with pytest.raises(WrongUsage, match=needs):
            job_of(function, queues, 1)


def test_a_client_info_describes_the_client_and_is_bytes_to_who_knows_no_better() -> None:
    facts = {"name": "lab-2", "cores": 4, "memory_gb": 7.5, "tags": ["gpu"], "address": "10.0.0.7", "runs": ["Square"]}
    info = ClientInfo.of(facts)
    assert isinstance(info, bytes) and info == b"lab-2" and info.decode() == "lab-2"
    assert (info.name, info.cores, info.memory_gb) == ("lab-2", 4, 7.5)
    assert (info.tags, info.address, info.runs) == (("gpu",), "10.0.0.7", ("Square",))
    assert "lab-2" in repr(info)


def test_what_a_scheduler_returns_may_be_bytes_or_lists_by_name_or_not() -> None:
    whole = {"Generate": [Generate, ["a"], 1], "Twice": [Square, ["a", "b"], 2]}
    pickled = {name: pickle.dumps(one) for name, one in whole.items()}
    info = ClientInfo.of({"name": "n", "cores": 1, "memory_gb": None, "tags": [], "address": "", "runs": []})
    for scheduled in (PipelineReplicate().schedule(info, pickled), whole, {**pickled, "Generate": whole["Generate"]}):
        jobs = list(servers.jobs_of(scheduled))
        assert [(job.name, job.function.qualname, job.queues, job.count) for job in jobs] == [
            ("Generate", "Generate", ("a",), 1), ("Twice", "Square", ("a", "b"), 2)]
    for scheduled in (pickled.values(), list(whole.values())):
        assert [job.name for job in servers.jobs_of(scheduled)] == ["Generate", "Square"]
    assert [job.count for job in servers.jobs_of([[Square, ["a", "b"]]])] == [1], "without a number it is one"
    with pytest.raises(WrongUsage, match="must be"):
        list(servers.jobs_of({"x": [Square]}))
    with pytest.raises(NotImplementedError):
        BaseScheduler().schedule(info, pickled)


class _Told:
    """A server's node, as far as its clerk looks at it."""

    version, zip_sha256 = "v", "z"


def a_clerk(schedule: Any) -> servers.Clerk:
    scheduler = BaseScheduler()
    scheduler.schedule = schedule  # type: ignore[method-assign]
    functions = {"Generate": [Generate, ["a"], 1], "Square": [Square, ["a", "b"], 2]}
    return servers.Clerk(_Told(), functions, scheduler, 50000)  # type: ignore[arg-type]


FACTS = {"name": "lab-2", "cores": 4, "memory_gb": None, "tags": [], "address": "10.0.0.7"}


@pytest.mark.parametrize(("schedule", "why"), [
    (lambda info, functions: 1 / 0, "ZeroDivisionError: division by zero"),
    (lambda info, functions: sys.exit("enough"), "SystemExit: enough"),
    (lambda info, functions: None, "TypeError"),
    (lambda info, functions: 7, "TypeError"),
    (lambda info, functions: {"Square": b"no pickle"}, "UnpicklingError"),
    (lambda info, functions: {7: functions["Square"]}, "a function's name is 7"),
    (lambda info, functions: {"Square": [Square, ["a", "b"], 0]}, "the number of processes is 0"),
    (lambda info, functions: {"Square": [lambda x: x, ["a", "b"]]}, "define it at the top of its file"),
    (lambda info, functions: {"Square": ["Square", ["a", "b"]]}, "must be [function, [queues]]"),
    (lambda info, functions: [functions], "must be [function, [queues]]"),
    (lambda info, functions: "Square", "must be [function, [queues]]"),
])
def test_a_client_hears_what_is_wrong_with_the_scheduler_and_the_server_goes_on(schedule: Any, why: str) -> None:
    clerk = a_clerk(schedule)
    for client in ("one", "two"):
        answer = clerk.hear(client, FACTS, ends=False)
        assert answer is not None and answer["client"] == client
        assert answer["functions"] == [] and why in answer["error"] and "\n" not in answer["error"]


def test_a_scheduler_may_change_what_it_is_given_and_hears_what_runs_on_the_clients_machine() -> None:
    heard = []

    def schedule(info: ClientInfo, functions: dict[str, bytes]) -> Any:
        heard.append(info.runs)
        return {} if "Square" in info.runs else {"Square": functions.pop("Square")}

    clerk = a_clerk(schedule)
    first = clerk.hear("one", FACTS, ends=False)
    assert first == clerk.hear("one", FACTS, ends=False), "asked once more, it says the same"
    assert first is not None and [one["name"] for one in first["functions"]] == ["Square"]
    second = clerk.hear("two", FACTS, ends=False)
    assert second is not None and second["functions"] == []
    clerk.hear("elsewhere", {**FACTS, "name": "lab-3"}, ends=False)
    assert clerk.hear("one", FACTS, ends=True) is None
    clerk.hear("three", FACTS, ends=False)
    assert heard == [(), (), ("Square",), (), ()]


@pytest.mark.parametrize("functions", [
    7, ["Square"], {"Square": Square}, {"Square": [Square]}, {"Square": [lambda x: x, ["a"]]}, {7: [Square, ["a", "b"]]},
    {"Square": [Square, ["a", "b"], 1.5]}, {"Square": [Square, ["a/b"]]},
])
def test_functions_that_no_client_could_run_are_refused_by_the_server_at_once(functions: Any) -> None:
    with pytest.raises(WrongUsage):
        servers._checked(functions)


def test_the_manifest_of_a_server_is_one_that_a_node_takes_in() -> None:
    manifest = manifest_of(["a", "b"], talks=True)
    deployed = {"pipeline": utils.PIPELINE, "version": "0" * 64, "origin": {}, "manifest": manifest}
    commands.check(Message("deploy", {**deployed, "files": {}, "zip_sha256": "", "project": {}}))
    assert [(q["name"], q["codec"]) for q in manifest["queues"]] == [
        ("a", "pickle"), ("b", "pickle"), (utils.ASKED, "json"), (utils.ANSWERS, "json")]
    assert [q["name"] for q in manifest_of(["a"], talks=False)["queues"]] == ["a"]


def test_a_process_says_its_functions_name_to_who_looks_and_no_key() -> None:
    assert worker.command(7, 8, "Square")[-3:] == ["7", "8", "Square"]
