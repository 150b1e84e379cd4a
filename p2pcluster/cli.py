"""The command line: verbs, their words, what they print, and their exit codes.

It decides nothing about pipelines: every verb is a call to the client or a start of the node, and an error that it does not know is
not caught.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import shlex
import socket
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from p2pcluster import bundle, config
from p2pcluster.client import Cluster
from p2pcluster.config import Options, resolve_options
from p2pcluster.core.controls import processes_text
from p2pcluster.errors import ClusterError, HomeError, Superseded, ValueRefused, WrongUsage
from p2pcluster.home import Home, Keyfile
from p2pcluster.patience import TellingLink
from p2pcluster.shown import status_lines, wants_colour

DEMO_CLUSTER = "demo"
WATCH_S = 1.0


# ---- words


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every error; what is allowed is in the help."""
        self.exit(2, f"p2pcluster: {message}; see python -m {self.prog} --help\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = list(map(str, action.choices))
            raise argparse.ArgumentError(None, f"{value!r} is none of {', '.join(names)}{_meant(str(value), names)}")

    def refuse(self, word: str) -> NoReturn:
        """A word too many, or an option that there is not."""
        if word.startswith("-"):
            options = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            self.error(f"{self.prog.partition(' ')[2]} has no option {word.partition('=')[0]}{_meant(word.partition('=')[0], options)}")
        self.error(f"{self.prog.partition(' ')[2]} does not take another word, {word!r}")


def _meant(word: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="p2pcluster", description="Functions joined by durable queues, run on every machine of a network.",
                                     epilog="python -m p2pcluster alone is python -m p2pcluster run.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    common = _option_parser()

    def verb(name: str, text: str, example: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", parents=[common],
                                epilog=f"example: python -m p2pcluster {example}")

    run = verb("run", "start a node here, and offer this folder's project", "run pipeline.py --until-done")
    run.add_argument("target", nargs="?", metavar="DIR|FILE.py|FILE.py:NAME", help="the project; without it this folder's")
    run.add_argument("--until-done", action="store_true", help="end when the run is done: exit code 0, or 3 with parked items")
    run.add_argument("--again", action="store_true", help="start the next run if the last one is done")
    run.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="a parameter of a new run; repeatable")
    new = verb("new", "write a starter project, with a test that needs no cluster", "new squares")
    new.add_argument("folder", metavar="DIR", help="the folder to write it to: a new one, or an empty one")
    verb("demo", "run the bundled example on this machine alone, to its end", "demo")
    deploy = verb("deploy", "ship this project, or its new version, to the running cluster", "deploy .")
    deploy.add_argument("target", nargs="?", metavar="DIR|FILE.py|FILE.py:NAME", help="the project; without it this folder's")
    undeploy = verb("undeploy", "end a pipeline: its processes, queues, runs and files go", "undeploy squares")
    undeploy.add_argument("name", metavar="PIPELINE", help="its name, as status shows it")
    undeploy.add_argument("--discard", action="store_true", help="its items too; else it stays while there are some")
    status = verb("status", "show nodes, stages, queues and alarms", "status --watch")
    status.add_argument("--json", action="store_true", help="one JSON object")
    status.add_argument("--watch", action="store_true", help="again and again, until Ctrl-C")
    put = _queue_verb(verb("put", "put JSON lines into a queue", "put numbers values.jsonl --close"))
    put.add_argument("file", nargs="?", metavar="FILE", help="JSON lines; without it standard input")
    put.add_argument("--close", action="store_true", help="then close the queue: nothing more comes")
    put.add_argument("--delay-s", type=float, metavar="SECONDS", help="nobody gets them before so much time has passed")
    put.add_argument("--at", metavar="TIME", help="nobody gets them before this time: 2026-12-24T18:00+01:00, or seconds since the epoch")
    take = _queue_verb(verb("take", "take values from a queue, as JSON lines", "take alerts -n 10"))
    take.add_argument("-n", type=int, metavar="N", help="at most so many")
    take.add_argument("--follow", action="store_true", help="wait for more")
    results = verb("results", "print what a last stage returned, as JSON lines, without taking it", "results Train")
    results.add_argument("stage", metavar="STAGE", help="a last stage that returns values, or a queue")
    _pipeline_option(results)
    discard = _queue_verb(verb("discard", "drop everything in a queue", "discard alerts"))
    discard.add_argument("--yes", action="store_true", help="do not ask")
    close = verb("close", "end a source, or a queue that is fed from outside", "close numbers")
    close.add_argument("name", metavar="NAME", help="the source, or the queue")
    _pipeline_option(close)
    _parked_parser(verb)
    logs = verb("logs", "show what stages printed and logged, on every machine", "logs Train -f")
    logs.add_argument("stage", nargs="?", metavar="STAGE", help="without it every stage")
    logs.add_argument("-f", "--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    _pipeline_option(logs)
    pause = verb("pause", "give a stage, or all of them, no more items, until resume", "pause Train")
    pause.add_argument("stage", nargs="?", metavar="STAGE", help="without it every stage of the pipeline")
    _pipeline_option(pause)
    resume = verb("resume", "take a pause back", "resume Train")
    resume.add_argument("stage", nargs="?", metavar="STAGE", help="without it the pause of every stage of the pipeline")
    _pipeline_option(resume)
    scale = verb("scale", "run so many processes of a stage, whatever its code says", "scale Train 8")
    scale.add_argument("stage", metavar="STAGE", help="the stage's name; a source has as many processes as its code says")
    scale.add_argument("processes", metavar="N", type=_processes,
                       help="a number of processes, or auto for a share of the free slots, code for what the code says")
    _pipeline_option(scale)
    verb("stop", "stop the node that leads; what runs may finish", "stop")
    verb("leave", "have this machine's node hand over and go out of the cluster for good", "leave")
    recover_parser = verb("recover", "after the loss of most voters: make this machine's copy the whole cluster", "recover")
    recover_parser.add_argument("--yes", action="store_true", help="do not ask")
    backup = verb("backup", "copy the journal to a file, while the node runs too", "backup yesterday.sqlite3")
    backup.add_argument("file", metavar="FILE", help="where the copy is to be")
    key = verb("key", "show the cluster's key, or set it from standard input", "key --set < key.txt")
    key.add_argument("--set", action="store_true", help="read the key from standard input")
    verb("doctor", "look for what keeps nodes from seeing each other", "doctor --seed 10.0.0.7:47400")
    return parser


def _parked_parser(verb: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    parked = verb("parked", "list, show, retry or discard parked items", "parked show squares/Square:17")
    parked.add_argument("action", nargs="?", default="list", choices=["list", "show", "retry", "discard"],
                        help="list them (the default), show all of some, give them another set of tries, or drop them")
    parked.add_argument("--yes", action="store_true", help="discard all of them without asking")
    parked.add_argument("ids", nargs="*", metavar="ID", help="queue:number, as the list shows it; retry and discard without it mean all")
    _pipeline_option(parked)


def _processes(text: str) -> int | str | None:
    """Which `scale` checks."""
    return None if text == "code" else int(text) if text.lstrip("-").isdecimal() else text


def _queue_verb(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("queue", metavar="QUEUE", help="its name, as status shows it")
    _pipeline_option(parser)
    return parser


def _pipeline_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pipeline", metavar="NAME", help="whose queue or stage it is; needed where there are several pipelines")


def _option_parser() -> _Parser:
    """The options of DESIGN section 3; None stands for what was not typed, so that the environment can have its say."""
    common = _Parser(add_help=False)
    group = common.add_argument_group("where and who")
    for name, metavar, text in (
        ("cluster", "NAME", "the cluster's name"), ("home", "DIR", "the node's folder: journal, bundles, output, logs"),
        ("authkey-file", "FILE", "the cluster's key"), ("bind", "ADDRESS", "listen on this address only; 127.0.0.1 keeps to this machine"),
        ("advertise", "ADDRESS", "the address that others are told"), ("port", "N", "UDP and TCP port"),
        ("slots", "N", "processes for stages; without it the number of cores"), ("expect", "N", "found no cluster before N nodes are there"),
        ("page", "[HOST:]PORT", "serve a read-only page, on this machine alone unless HOST says otherwise"),
    ):
        group.add_argument(f"--{name}", metavar=metavar, help=text)
    group.add_argument("--seed", action="append", metavar="HOST:PORT", help="a node, for networks without broadcast; repeatable")
    group.add_argument("--tag", action="append", metavar="NAME", help="a tag of this machine for rules; repeatable")
    group.add_argument("--verbose", action="store_true", default=None, help="tracebacks too")
    return common


def _options(args: argparse.Namespace, folder: Path | None = None) -> Options:
    flags = {name: getattr(args, name, None) for name in config.OPTION_NAMES}
    return resolve_options(flags, os.environ, _pyproject(folder or Path.cwd()))


def _pyproject(folder: Path) -> dict[str, Any]:
    path = folder / "pyproject.toml"
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise WrongUsage(f"{path} cannot be read ({error}): correct it") from error


# ---- main


def main(argv: list[str]) -> int:
    """Run one command line; returns the exit code."""
    _fill_standard_streams()
    args = parse(_with_verb(argv))
    try:
        return int(_VERBS[args.verb](args))
    except ClusterError as error:
        print("p2pcluster: " + "; ".join([str(error), *_notes(error)]), file=sys.stderr)
        if args.verbose:
            raise
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read has heard enough
        return 0
    except KeyboardInterrupt as error:
        for note in _notes(error):
            print(f"p2pcluster: stopped: {note}", file=sys.stderr)
        return 130


def parse(argv: list[str]) -> argparse.Namespace:
    """The words of a command line. What is wrong with them ends the program with exit code 2 and a line."""
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        (verbs,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        verbs.choices[args.verb].refuse(next((word for word in unknown if word.startswith("-")), unknown[0]))
    return args


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


def _fill_standard_streams() -> None:
    """A service manager may have closed some: then a file that is opened next would be taken for it, and be printed into."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - for as long as the program runs


def console() -> int:
    """What `p2pcluster` and `python -m p2pcluster` run: this program's own arguments."""
    return main(sys.argv[1:])


def _with_verb(argv: list[str]) -> list[str]:
    """`run` is the default verb; a word that is no verb and no path is a mistyped verb."""
    if argv and argv[0] in ("-h", "--help", *_VERBS):
        return argv
    if not argv or argv[0].startswith("-"):
        return ["run", *argv]
    if os.path.exists(argv[0]) or ".py" in argv[0] or os.sep in argv[0]:
        return ["run", *argv]
    print(f"p2pcluster: there is no verb {argv[0]!r}{_meant(argv[0], _VERBS) or '; see python -m p2pcluster --help'}", file=sys.stderr)
    raise SystemExit(2)


# ---- the node


def _run(args: argparse.Namespace) -> int:
    from p2pcluster.offering import Offer

    project = bundle.find_project(args.target, Path.cwd())
    options = _options(args, project.folder if project else None)
    return _serve(options, Offer(project, args.until_done, args.again, _params(args.set)))


def _new(args: argparse.Namespace) -> int:
    from p2pcluster.starter import write_project

    for name in write_project(Path(args.folder)):
        print(Path(args.folder) / name)
    print(f"run it: cd {shlex.quote(args.folder)} && python pipeline.py", file=sys.stderr)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from p2pcluster.offering import Offer

    folder = Path(__file__).parent / "examples" / "census"
    options = resolve_options({name: getattr(args, name, None) for name in config.OPTION_NAMES}, os.environ, {})
    options = replace(options, bind=config.BIND_LOOPBACK, cluster=DEMO_CLUSTER if options.cluster == config.CLUSTER else options.cluster)
    project = bundle.find_project(str(folder), Path.cwd())
    assert project is not None, "the example is a project"
    return _serve(options, Offer(project, until_done=True, again=True))


def _serve(options: Options, offer: Any) -> int:
    from p2pcluster.daemon import Daemon, keyfile_of
    from p2pcluster.journal import set_aside

    _check_file_names()
    path = options.home or config.default_home(Path.home(), options.cluster, socket.gethostname())
    while True:
        with Home.open(path) as home, _page(options):
            try:
                return Daemon(options, home, keyfile_of(options), offer).run()
            except Superseded as news:
                print(f"p2pcluster: {news}", file=sys.stderr)
                set_aside(home.journal, home.mark, f"superseded-{int(time.time())}")


def _check_file_names() -> None:
    """A pipeline's name is a folder, and whoever names one on another machine does not know the locale here."""
    try:
        os.fsencode("ü 日")
    except UnicodeEncodeError as error:
        raise HomeError(f"not every name can be that of a file here, as the locale's encoding is {sys.getfilesystemencoding()}: "
                        "start it with PYTHONUTF8=1") from error


@contextlib.contextmanager
def _page(options: Options) -> Iterator[None]:
    """Serve the page beside the node, where one is asked for."""
    if options.page is None:
        yield
        return
    from p2pcluster.page import serving

    with serving(options) as url:
        alone = options.page.host == "localhost" or options.page.host.startswith("127.") or options.page.host == "::1"
        print(f"page at {url}" + ("" if alone else ", for everybody who can reach this machine"), flush=True)
        yield


def _params(settings: Iterable[str]) -> dict[str, Any]:
    params = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        try:
            params[name] = json.loads(text)
        except ValueError as error:
            raise WrongUsage(f"--set {setting}: what stands behind = is not JSON ({error}); a text needs quotes: --set '{name}=\"...\"'") from error
        if not name or not equals:
            raise WrongUsage(f"--set {setting}: write KEY=JSON")
    return params


def _deploy(args: argparse.Namespace) -> int:
    from p2pcluster.offering import changes, deploy_messages, pack_project, project_record
    from p2pcluster.process import read_manifest, refusal

    project = bundle.find_project(args.target, Path.cwd())
    if project is None:
        raise WrongUsage(f"{args.target or 'this folder'} holds no project: deploy a folder with a pipeline.py")
    packed = pack_project(project)
    record = project_record(project)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / packed.version
        bundle.unpack(packed.zip_bytes, packed.zip_sha256, folder)
        answer = read_manifest(folder, record)
    if "error" in answer:
        if answer["traceback"] and args.verbose:
            print(answer["traceback"], file=sys.stderr)
        raise refusal(answer)
    manifest = answer["manifest"]
    with Cluster(TellingLink(_options(args, project.folder), config.CONNECT_TIMEOUT_S), manifest["pipeline"]) as cluster:
        deployed = cluster.project()
        has_run = deployed is not None and deployed["state"] != "new"
        if deployed is not None and has_run and _is_in_force(deployed, packed.version, record):
            print(f"{cluster.pipeline}: version {packed.version[:8]} is deployed already")
            return 0
        origin = {"node": (cluster.link.first_peer or cluster.link.peer).node_id, "name": socket.gethostname(), "folder": str(project.folder)}
        for message in deploy_messages(packed, manifest, record, origin):
            reply = cluster.check(cluster.link.call(message), manifest["pipeline"])
        if deployed is None or not has_run:
            print(f"{cluster.pipeline}: version {packed.version[:8]} deployed, run {cluster.start()} starts")
            return 0
        if (deployed["version"], deployed["project"]) != (packed.version, record):
            print(f"{cluster.pipeline}: version {packed.version[:8]} replaces {deployed['version'][:8]}: "
                  + ", ".join(changes(deployed, packed, record)), flush=True)
        elif reply.fields["rollout"] is None:
            print(f"{cluster.pipeline}: version {packed.version[:8]} stays")
        if reply.fields["rollout"] is not None:
            nodes = cluster.wait_for_rollout(packed.version)
            print(f"{cluster.pipeline}: version {packed.version[:8]} runs on {nodes} node{'s' if nodes > 1 else ''}")
    return 0


def _is_in_force(deployed: dict[str, Any], version: str, record: dict[str, Any]) -> bool:
    """Whether there is nothing to ship and nothing to wait for; that a version went back is over when what runs is deployed again."""
    went_back = deployed["rolled"] is not None and deployed["rolled"]["failure"] is not None
    return (deployed["version"], deployed["project"]) == (version, record) and deployed["rollout"] is None and not went_back


def _undeploy(args: argparse.Namespace) -> int:
    with _cluster(args, args.name) as cluster:
        dropped = cluster.undeploy(args.discard)
    print(f"{args.name}: undeployed" + (f", {dropped} items dropped" if dropped else "")
          + "; a node whose folder holds it offers it again when it is started next")
    return 0


# ---- verbs that ask a cluster


def _cluster(args: argparse.Namespace, pipeline: str | None = None) -> Cluster:
    return Cluster(TellingLink(_options(args), config.CONNECT_TIMEOUT_S), pipeline or getattr(args, "pipeline", None))


def _status(args: argparse.Namespace) -> int:
    with _cluster(args) as cluster:
        while True:
            status = cluster.status()
            text = json.dumps(status) if args.json else "\n".join(status_lines(status, wants_colour(sys.stdout, os.environ)))
            if args.watch and sys.stdout.isatty() and not args.json:
                text = "\x1b[H\x1b[J" + text
            print(text, flush=True)
            if not args.watch:
                return 0
            time.sleep(WATCH_S)


def _put(args: argparse.Namespace) -> int:
    at = None if args.at is None else _time(args.at)
    name = args.file or "standard input"
    try:
        text = sys.stdin.buffer.read() if args.file is None else Path(args.file).read_bytes()
    except OSError as error:
        raise WrongUsage(f"{args.file} cannot be read ({error.strerror}): name a file with JSON lines") from error
    values = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueRefused(f"line {number} of {name} is not JSON ({error}): nothing was put; correct it and put again") from error
    with _cluster(args) as cluster:
        if args.close and not cluster.queue_record(args.queue)["outside"]:
            raise WrongUsage(f"queue {args.queue!r} ends with the stages before it, so --close has no meaning: leave it out; nothing was put")
        cluster.is_patient = True  # whoever pipes values in is held back by a full queue; Ctrl-C ends it
        cluster.put_many(args.queue, values, delay_s=args.delay_s, at=at)
        if args.close:
            cluster.close(args.queue)
    print(f"{len(values)} put into {args.queue}" + (" and it is closed" if args.close else ""), file=sys.stderr)
    return 0


def _time(text: str) -> datetime | float:
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise WrongUsage(f"--at {text} is not a time: write 2026-12-24T18:00+01:00, or seconds since the epoch") from error


def _take(args: argparse.Namespace) -> int:
    if args.n is not None and args.n < 1:
        raise WrongUsage(f"-n is {args.n} but must be a number of values from 1")
    with _cluster(args) as cluster, cluster.take(args.queue, args.n, None if args.follow else 0.2) as items:
        for value in items:
            print(_json_line(value), flush=True)
    return 0


def _results(args: argparse.Namespace) -> int:
    with _cluster(args) as cluster:
        for value in cluster.results(args.stage):
            print(_json_line(value))
    return 0


def _json_line(value: Any) -> str:
    text = json.dumps(value, default=repr, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return json.dumps(value, default=repr)  # JSON's own escapes, where the terminal lacks a character
    return text


def _is_sure(args: argparse.Namespace, question: str, otherwise: str) -> bool:
    """Ask, where somebody can answer; `--yes` is the answer too. Raises `WrongUsage` where nobody can."""
    if args.yes:
        return True
    if not sys.stdin.isatty():
        raise WrongUsage(f"{otherwise}: say so with --yes")
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _discard(args: argparse.Namespace) -> int:
    if not _is_sure(args, f"drop every item of {args.queue}?", f"discard drops every item of {args.queue}"):
        return 1
    with _cluster(args) as cluster:
        print(f"{cluster.discard(args.queue)} dropped")
    return 0


def _close(args: argparse.Namespace) -> int:
    with _cluster(args) as cluster:
        cluster.close(args.name)
    return 0


def _parked(args: argparse.Namespace) -> int:
    if args.action == "discard" and not args.ids and not _is_sure(args, "drop every parked item?", "parked discard drops every parked item"):
        return 1
    with _cluster(args) as cluster:
        items = cluster.parked()
        chosen = _chosen(items, args.ids)
        if args.action == "list":
            for item in chosen:
                print(f"{item['id']}  {item['deliveries']} deliveries  {item['error'].get('text', '')}"[:200].replace("\n", " "))
            return 0
        if args.action == "show":
            for item in chosen:
                _show_parked(cluster, item)
            return 0
        return _act_on_parked(cluster, args.action, chosen)


def _chosen(items: list[dict[str, Any]], ids: list[str]) -> list[dict[str, Any]]:
    known = {item["id"]: item for item in items}
    missing = [item_id for item_id in ids if item_id not in known]
    if missing:
        raise WrongUsage(f"no item {missing[0]!r} is parked: python -m p2pcluster parked list shows their ids")
    return [known[item_id] for item_id in ids] if ids else items


def _show_parked(cluster: Cluster, item: dict[str, Any]) -> None:
    error = item["error"]
    print(f"{item['id']}: parked after {item['deliveries']} deliveries, in run {item['run']}, on node {error.get('node')}")
    print(f"  why: {error.get('text')}")
    try:
        value = Cluster(cluster.link, item["queue"].partition("/")[0]).parked_value(item["queue"].partition("/")[2], _number(item))
        print(f"  value: {_json_line(value)[:500]}")
    except ValueRefused as refusal:
        print(f"  value: {refusal}")
    if error.get("traceback"):
        print("  traceback:\n    " + error["traceback"].rstrip().replace("\n", "\n    "))
    for line in error.get("stderr") or []:
        print(f"  stderr | {line}")


def _act_on_parked(cluster: Cluster, action: str, items: list[dict[str, Any]]) -> int:
    count = 0
    for queue in sorted({item["queue"] for item in items}):
        ids = [_number(item) for item in items if item["queue"] == queue]
        pipeline, _, name = queue.partition("/")
        of_pipeline = Cluster(cluster.link, pipeline)
        count += of_pipeline.retry(name, ids) if action == "retry" else of_pipeline.discard(name, ids)
    print(f"{count} {'go round again' if action == 'retry' else 'dropped'}")
    return 0


def _number(item: dict[str, Any]) -> int:
    return int(item["id"].rpartition(":")[2])


def _logs(args: argparse.Namespace) -> int:
    after: dict[str, Any] = {}
    away: list[str] = []
    with _cluster(args) as cluster:
        while True:
            lines, away_now, after = cluster.logs(args.stage, after)
            for name in away_now:
                if name not in away:
                    print(f"node {name} is away: its lines are missing", file=sys.stderr)
            away = away_now
            for line in lines:
                print(f"{line.at} {line.node} {line.pipeline}/{line.stage} {line.item} {line.level} | {line.text}")
            sys.stdout.flush()
            if not args.follow:
                return 0
            time.sleep(config.LOG_POLL_S)


def _pause(args: argparse.Namespace) -> int:
    with _cluster(args) as cluster:
        cluster.pause(args.stage)
        print(f"{cluster.pipeline}: {args.stage or 'every stage'} is paused")
    return 0


def _resume(args: argparse.Namespace) -> int:
    with _cluster(args) as cluster:
        left = cluster.resume(args.stage)
        still = f"; still paused: {', '.join(name or 'every stage' for name in left)}" if left else ""
        print(f"{cluster.pipeline}: {args.stage or 'every stage'} is not paused any more{still}")
    return 0


def _scale(args: argparse.Namespace) -> int:
    with _cluster(args) as cluster:
        cluster.scale(args.stage, args.processes)
        told = "as many processes as its code says" if args.processes is None else processes_text(args.processes)
        print(f"{cluster.pipeline}: {args.stage} is to have {told}")
    return 0


def _stop(args: argparse.Namespace) -> int:
    with _cluster(args) as cluster:
        cluster.stop()
    return 0


def _leave(args: argparse.Namespace) -> int:
    with _cluster(args) as cluster:
        cluster.leave()
    print("leaving: the node ends when the cluster does without it", file=sys.stderr)
    return 0


# ---- verbs that need no cluster


def _recover(args: argparse.Namespace) -> int:
    from p2pcluster.journal import recover

    options = _options(args)
    path = Path(options.home) if options.home else config.default_home(Path.home(), options.cluster, socket.gethostname())
    lost = "what only the lost nodes had is lost"
    if not _is_sure(args, f"make this machine's copy the whole cluster? {lost}", f"recover makes this machine's copy the whole cluster, and {lost}"):
        return 1
    with Home.open(path) as home:
        generation, last_index = recover(home.journal, home.mark)
    print(f"generation {generation} begins with this machine's copy, up to entry {last_index}: start the node")
    return 0


def _backup(args: argparse.Namespace) -> int:
    from p2pcluster.journal import back_up

    options = _options(args)
    home = Path(options.home) if options.home else config.default_home(Path.home(), options.cluster, socket.gethostname())
    last_index = back_up(home / "journal.sqlite3", Path(args.file))
    print(f"{args.file}: the journal up to entry {last_index}")
    return 0


def _key(args: argparse.Namespace) -> int:
    options = _options(args)
    keyfile = Keyfile(options.authkey_file) if options.authkey_file else Keyfile.default(options.cluster)
    if args.set:
        keyfile.set_key(sys.stdin.read())
        print(f"the key of cluster {options.cluster!r} is set ({keyfile.path})", file=sys.stderr)
    else:
        print(keyfile.show())
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from p2pcluster import doctor

    return doctor.run(_options(args), print)


_VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run, "new": _new, "demo": _demo, "deploy": _deploy, "undeploy": _undeploy, "status": _status, "put": _put, "take": _take,
    "results": _results, "discard": _discard, "close": _close, "parked": _parked, "logs": _logs, "pause": _pause, "resume": _resume,
    "scale": _scale, "stop": _stop, "leave": _leave, "recover": _recover, "backup": _backup, "key": _key, "doctor": _doctor,
}
