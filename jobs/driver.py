"""What the jobs share on the driver: flags, exit codes, paths, signals, the start of Ray, its nodes and the actor plan.

Runs on the driver alone: workers of a submitted job cannot import this directory, so that whatever runs in a worker
belongs in ``clarity``. Imports Ray only where Ray is used: jobs without it start at once.
"""

import argparse
import atexit
import contextlib
import dataclasses
import difflib
import gc
import inspect
import io
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import actors
import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from clarity import data, storage
from clarity.audit.commits import unreachable_paths
from clarity.audit.summary import unreached
from clarity.report.text import counted

# Imports make a million objects that stay: looking through them for garbage takes a sixth of the time of importing
# them, and a second when the process ends.
gc.set_threshold(100_000, 50)
atexit.register(gc.freeze)

#: Of a Ray that a job starts itself: fixed, so that memory does not grow with the data.
OBJECT_STORE_BYTES = 1_000_000_000
#: Of all processes of a Ray that a job starts itself, where the user has not set them.
WORKER_ENVIRONMENT = {
    # Threads that spin while they wait take the processor from those that they wait for, where others use it too.
    "OMP_WAIT_POLICY": "passive",
    # Ray's own niceness of 15 leaves workers hardly any of a processor that other programs use, too.
    "RAY_worker_niceness": "0",
    # Feature maps in memory that was used before: glibc would map and clear new pages for each of them.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    # Nobody reads the metrics of a Ray without a dashboard.
    "RAY_enable_metrics_collection": "0",
    # On a busy machine Ray's agents need more than its 30 seconds to start.
    "RAY_agent_register_timeout_ms": "180000",
    "RAY_raylet_start_wait_time_s": "180",
}
#: How long to wait for the Ray that RAY_ADDRESS names.
RAY_CONTACT_S = 15
#: How long to wait for the first node of an autoscaler.
FIRST_NODE_S = 900
#: After so many shards a run says so where many searches do not converge.
FIRST_SHARDS = 3
#: Set in the driver of a job submitted by `ray job submit`.
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"

#: Not empty while this process is connected to a Ray by ``start_ray``; the threads in which ``end_ray`` ends it.
_started: list[bool] = []
_ending: list[threading.Thread] = []

Config = TypeVar("Config")
#: Shards as they end, each with its note.
Notes = Iterator[tuple[int, dict[str, Any]]]


class Parser(argparse.ArgumentParser):
    """A parser whose error is one line, with the flag that was probably meant, instead of the list of all flags."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        unknown = re.findall(r"(?<= )--[\w-]+", message) if message.startswith("unrecognized") else []
        near = [flag for word in unknown for flag in difflib.get_close_matches(word, self._option_string_actions, 1)]
        meant = f"; did you mean {' '.join(near)}?" if near else ""
        self.exit(2, f"error: {message}{meant} (--help lists all flags)\n")


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the job's docstring as it is written."""
    return Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_data_flags(parser: argparse.ArgumentParser, split: str, split_help: str) -> argparse._ArgumentGroup:
    """Add ``--dataset``, ``--data``, ``--split`` and ``--columns`` in a group of their own, which is returned."""
    add = (group := parser.add_argument_group("data")).add_argument
    add("--dataset", default="digits", choices=list(data.SOURCES), help="Source of the images (default: digits).")
    add("--data", metavar="URI", help="Path or s3:// URI of the images; required except for digits.")
    add("--split", default=split, help=f"{split_help} (default: {split}).")
    about = "The data's names of image, label, image_id or split, as in image=img label=fine_label."
    add("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help=about)
    return group


def open_dataset(args: argparse.Namespace, split: str, **options: Any) -> data.Dataset:
    """The data set of ``add_data_flags``; says which split is held out where it is not the test split."""
    columns = dict(pair.partition("=")[::2] for pair in args.columns)
    if not all(columns.values()):
        raise ValueError(f"columns: expected NAME=COLUMN, got {' '.join(args.columns)}: as in image=img label=kind")
    dataset = data.open_dataset(args.dataset, args.data, split, columns=columns, **options)
    if split == "held-out" and dataset.split != "test":
        print(f"held out: the split {dataset.split}, as the data has no test split", flush=True)
    return dataset


def add_config_flags(group: Any, defaults: Any, prefix: str = "", skip: Sequence[str] = ()) -> None:
    """Add a flag for each field of a config dataclass, explained by the field's line in the dataclass's docstring."""
    explained = field_help(type(defaults))
    for name, value in dataclasses.asdict(defaults).items():
        flag, about = f"--{prefix}{name}".replace("_", "-"), explained.get(name, "").replace("%", "%%")
        metavar = "N" if isinstance(value, int) else "X"
        if isinstance(value, bool) and name not in skip:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=value, help=f"{about}.")
        elif name not in skip:
            about = f"{about} (default: {value})."
            group.add_argument(flag, type=type(value), default=value, metavar=metavar, help=about)


def number_or_auto(text: str) -> Any:
    """The value of a flag that is a number or auto."""
    return text if text == "auto" else float(text)


def add_resource_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of the actor plan in a group of their own; returns the parser."""
    add = parser.add_argument_group("resources").add_argument
    add("--actors", type=int, metavar="N", help="Number of searching processes (default: as many as are useful).")
    about = "GPUs of each actor; a fraction shares one (default: 1 if there are GPUs, else 0)."
    add("--gpus-per-actor", type=float, metavar="X", help=about)
    about = "Plan for N nodes if the autoscaler's limit is not visible to the job, as on Kubernetes."
    add("--max-nodes", type=int, metavar="N", help=about)
    return parser


def config_from(args: argparse.Namespace, config: type[Config], **fixed: Any) -> Config:
    """The config dataclass from the flags of ``add_config_flags``; ``fixed`` fields have no flag."""
    names = [field.name for field in dataclasses.fields(config) if field.name not in fixed]  # type: ignore[arg-type]
    return config(**{name: getattr(args, name) for name in names}, **fixed)


def field_help(config: type) -> dict[str, str]:
    """What the ``Args:`` section of a dataclass says of each field, as a sentence without its full stop."""
    section = inspect.cleandoc(config.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for name, text in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE):
        sentence = " ".join(text.split()).rstrip(".")
        found[name] = sentence[0].upper() + sentence[1:]
    return found


def run(parser: argparse.ArgumentParser, job: Callable[[argparse.Namespace], int], argv: Sequence[str] | None) -> int:
    """Parse the command line and run a job, which returns 0 (complete) or 1 (incomplete).

    What it raises becomes a line on stderr and an exit code: 1 after an interrupt or an error of Ray, as the same
    command resumes; 2 for ValueError and OSError, which are bad input.
    """
    tolerate_output_errors()
    args = parser.parse_args(argv)
    try:
        return job(args)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {with_flag(str(error), parser)}", file=sys.stderr)
        return 2
    except ray_errors() as error:
        print(f"error: {error}\nthe same command resumes", file=sys.stderr)
        return 1


def ray_errors() -> tuple[type[Exception], ...]:
    """The errors of Ray and of Ray Train, where they are loaded: what else could raise one?"""
    known = {"ray.exceptions": "RayError", "ray.train": "TrainingFailedError"}
    return tuple(getattr(sys.modules[module], name) for module, name in known.items() if module in sys.modules)


def tolerate_output_errors() -> None:
    """Keep output errors from failing a job: escape what a terminal cannot encode, ignore a closed pipe."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stdout, TolerantStream):
        sys.stdout, sys.stderr = TolerantStream(sys.stdout), TolerantStream(sys.stderr)


class TolerantStream:
    """A stream whose reader may go away, as that of ``| head -1`` does."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, unless the reader is gone."""
        self.tolerate(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush, unless the reader is gone."""
        self.tolerate(self.stream.flush)

    def tolerate(self, action: Callable[..., Any], *args: Any) -> None:
        """Run an action; after the first write into a closed pipe all output goes to /dev/null."""
        try:
            action(*args)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def with_flag(message: str, parser: argparse.ArgumentParser) -> str:
    """The message of a library error, with each parameter that it speaks of (``shard_rows: ...``) as its flag."""
    flags = {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}
    # At its beginning, or as one of a list: elsewhere it may be a word of a sentence.
    return re.sub(r"(?:^|(?<=[:;] ))(?:\w+\.)?(\w+)(?=:)", lambda m: flags.get(m[1], m[0]), message)


def train_if_missing(uri: str, dataset: str, data_uri: str | None, *more: str, may_train: bool) -> None:
    """Train a model of the digits with jobs/train.py, on the Ray of this job, where its directory holds none.

    Raises:
        ValueError: it is missing and of other data or may not be trained, or its training failed.
    """
    if storage.exists(storage.join(uri, "model.json")):
        return
    train = [str(Path(__file__).with_name("train.py")), "--dataset", dataset, "--out", uri, *more]
    train += ["--data", data_uri] if data_uri else []
    if not may_train or dataset != "digits":
        from clarity.model import refuse_other  # which loads torch

        refuse_other(uri)
        raise ValueError(f"no model in {storage.display(uri)}; train one first: python {' '.join(train)}")
    start_ray()
    env = os.environ | {"RAY_ADDRESS": sys.modules["ray"].get_runtime_context().gcs_address}
    if subprocess.run([sys.executable, *train], env=env).returncode:
        raise ValueError(f"the training failed, see above; alone it is: python {' '.join(train)}")


def job_path(given: str | None, default: str, flag: str) -> str:
    """The absolute path, or the URI, that a job reads or writes: ``given``, or else ``default`` below runs/.

    The working directory of a submitted job is a temporary copy on one node. There the default moves to the user's
    home on the head, and a relative path raises ValueError.
    """
    submitted = SUBMITTED in os.environ
    try:
        (given or "").encode()
    except UnicodeEncodeError:
        raise ValueError(f"{flag} {given!r}: expected a path in UTF-8; choose another {flag}") from None
    if given is None:
        return str((Path.home() if submitted else Path.cwd()) / default)
    if "://" in given:
        return given
    path = Path(given).expanduser()
    if submitted and not path.is_absolute():
        raise ValueError(
            f"{flag} {given}: a relative path would lie in the submitted job's temporary working directory and be lost "
            "with it; give an absolute path that every node sees, or an s3:// URI"
        )
    return os.path.abspath(path)


def interruptible() -> None:
    """Let SIGTERM end this process as Ctrl-C does, by KeyboardInterrupt, and a second signal at once.

    Only the main thread receives signals; called in another, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def interrupt(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        # Ray forwards what other processes say of their own end, stack traces included, to stdout: of no use to a user.
        # Errors of this process go to stderr as before.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, interrupt)


def start_ray(object_store_bytes: int = OBJECT_STORE_BYTES) -> None:
    """Join the Ray that runs here (RAY_ADDRESS, or `ray start`), else start one with an object store of fixed size."""
    pa.default_memory_pool().release_unused()  # what planning used: Arrow would keep it
    import ray
    import ray.data

    while _ending:
        _ending.pop().join()
    logging.getLogger("ray.data").setLevel("ERROR")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    if ray.is_initialized():
        return
    given = os.environ.get("RAY_ADDRESS")
    source = "RAY_ADDRESS" if given else ray._common.utils.get_ray_address_file(None)  # of the last `ray start`
    address = given or ray._private.utils.read_ray_address() or "local"
    require_answer(address, source)
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address == "local":  # which is silent while it waits for its processes
        print("starting Ray", flush=True)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    interruptible()
    try:
        with silent_core():
            try:
                ray.init(object_store_memory=object_store_bytes, **quiet)
            except ValueError:  # one that runs already brings its own store
                ray.init(**quiet)
    except OSError as error:
        if "AF_UNIX" not in str(error):
            raise
        raise ValueError(
            f"RAY_TMPDIR: expected a path of at most 40 characters, as the names of Ray's sockets below it have a "
            f"limit, got {os.environ.get('RAY_TMPDIR')!r}: choose a shorter one, such as /tmp"
        ) from None
    except Exception as error:  # a plain Exception when the machine is too busy for Ray's own limit of 30 seconds
        raise ray.exceptions.RaySystemError(f"Ray did not start: {error}") from None
    _started.append(True)
    interruptible()  # Ray took SIGTERM for itself


@contextlib.contextmanager
def silent_core() -> Iterator[None]:
    """Let Ray's core start with a log level at which it writes to the console only what ends it.

    Its warnings about constructor arguments of actors do not help the user of a job; at its start it says its level.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def require_answer(address: str, source: str = "RAY_ADDRESS") -> None:
    """Raise ValueError unless somebody listens at an address; Ray itself would try for a quarter of an hour."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    end = time.monotonic() + RAY_CONTACT_S
    while host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ValueError(
                    f"{source}: expected a Ray at {address}, got no answer in {RAY_CONTACT_S} s ({error}): start that "
                    f"cluster, correct the address, or remove {source} for a Ray of this job's own"
                ) from None
            print(f"no Ray answers at {address} yet ({error}); trying again", file=sys.stderr)
            time.sleep(2)


def plan_actors(args: argparse.Namespace, useful: int, count: int | None = None) -> actors.Resources:
    """Start Ray, and plan the actors of ``add_resource_flags``, or ``count`` of them, on its nodes.

    Where no actor is ``useful``, since the job ends before Ray has started, it runs in this process, unless a flag or
    the environment asks for Ray.
    """
    if not useful and not (args.actors or args.gpus_per_actor or args.max_nodes or joins_ray() or has_gpus(args)):
        return actors.Resources(0, 0.0, 0.0, os.cpu_count() or 1, 0.0, 1)
    start_ray()
    nodes = offered_nodes(args.max_nodes, args.gpus_per_actor)
    return actors.plan_resources(nodes, useful, count or args.actors, args.gpus_per_actor)


def joins_ray() -> bool:
    """Whether this process is connected to a Ray or is to join one."""
    connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    return bool(connected or SUBMITTED in os.environ or os.environ.get("RAY_ADDRESS"))


def has_gpus(args: argparse.Namespace) -> bool:
    """Whether the actors get GPUs; without one here, and no cluster to ask, Ray is not started to find out."""
    import torch

    if args.gpus_per_actor == 0 or not (torch.cuda.is_available() or "RAY_ADDRESS" in os.environ):
        return False
    return plan_actors(args, 1, 1).gpus_per_actor > 0


def end_ray() -> None:
    """Shut down the Ray that this process started, while the process goes on without it."""
    if _started:
        _ending.append(threading.Thread(target=sys.modules["ray"].shutdown))
        _ending[-1].start()
        _started.clear()


def call_as_actor(
    args: argparse.Namespace, useful: int, function: Callable[..., Any], *given: Any, **options: Any
) -> Any:
    """Call a function of ``clarity`` where an actor would run, with the number of its threads as ``threads``."""
    one = plan_actors(args, useful, 1)
    if not one.num_actors:
        return function(*given, threads=one.threads_per_actor, **options)
    import ray

    remote = ray.remote(num_cpus=one.cpus_per_actor, num_gpus=one.gpus_per_actor)(function)
    return ray.get(remote.remote(*given, threads=one.threads_per_actor, **options))


def offered_nodes(max_nodes: int | None = None, gpus: float | None = None) -> list[dict[str, float]]:
    """The resources of each node of the Ray that runs, and of each that its autoscaler may still bring.

    Args:
        max_nodes: plan for so many nodes; where none is there yet, the first is asked for and waited for.
        gpus: what that first node must offer.
    """
    import ray

    def alive() -> list[dict[str, float]]:
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    if max_nodes and not any(node.get("CPU") for node in alive()):
        request_first_node(alive, gpus)
    joined = any(name in os.environ for name in ("RAY_ADDRESS", SUBMITTED))
    return actors.nodes_to_come(alive(), actors.autoscaler_description() if joined else None, max_nodes)


def request_first_node(alive: Callable[[], list[dict[str, float]]], gpus: float | None) -> None:
    """Ask the autoscaler for a node with a CPU and ``gpus`` GPUs, and wait until one is alive."""
    import ray.autoscaler.sdk

    print("no node offers a CPU yet; asking the autoscaler for one", flush=True)
    ray.autoscaler.sdk.request_resources(bundles=[{"CPU": 1} | ({"GPU": math.ceil(gpus)} if gpus else {})])
    end = time.monotonic() + FIRST_NODE_S
    while not any(node.get("CPU") for node in alive()) and time.monotonic() < end:
        time.sleep(1)
    ray.autoscaler.sdk.request_resources(bundles=[])


def on_each_node(function: Callable[..., Any], *args: Any) -> list[tuple[str, Any]]:
    """What a function returns on each node that is alive, with the node's address."""
    if not joins_ray():
        return [("", function(*args))]
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        return [("", function(*args))]
    there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    remote = ray.remote(num_cpus=0)(function)
    found = ray.get([remote.options(scheduling_strategy=node).remote(*args) for node in there])
    return [(node["NodeManagerAddress"], result) for node, result in zip(nodes, found)]


def check_visible(uri: str, run: str, data_uri: str | None) -> None:
    """Raise ValueError unless every node sees the audit directory, in which a run has begun, and the data."""
    uris = {"out": uri, "data": data_uri or ""}
    for address, names in on_each_node(unreachable_paths, uri, run, data_uri):
        for name in names:
            raise ValueError(
                f"--{name} {storage.display(uris[name])}: node {address} does not see what this one sees there; "
                "use an s3:// URI, or a directory that every node mounts"
            )


def progress(ended: Iterable[tuple[int, dict[str, Any]]], total: int, by_class: bool = False) -> Notes:
    """Pass on the shards that ended, under a bar on a terminal, with a line now and then elsewhere.

    After the first shards it says so where many do not converge.
    """
    console, printed, reached, seen = Console(stderr=True), time.time(), list[float](), Counter[str](by_class=by_class)
    columns = ("shards", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "{task.description}")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        for done, (shard, note) in enumerate(ended, 1):
            seen.update({name: note.get(name, 0) for name in ("pairs", "converged")}, failed="error" in note)
            lost = f", {seen['failed']} failed" if seen["failed"] else ""
            if (reach := note.get("reach")) is not None:
                reached.append(reach)
            bar.update(task, advance=1, description=counted(seen["pairs"], "pairs"))
            if bar.disable and (time.time() - printed > 10 or done == total):
                printed = time.time()
                print(f"{done} of {counted(total, 'shards')}, {counted(seen['pairs'], 'pairs')}{lost}", flush=True)
            if done == FIRST_SHARDS and (told := unreached({**seen, "target_prob_p5": min(reached, default=None)})):
                print(told, flush=True)
            yield shard, note
