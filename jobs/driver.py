"""What the jobs share on the driver: flags, exit codes, paths, signals, the start of Ray, its nodes and the actor plan.

Runs on the driver alone: workers of a submitted job cannot import this directory, so that whatever runs in a worker
belongs in ``clarity``. Imports Ray only where Ray is used: jobs without it start at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from clarity import data, storage
from clarity.audit.commits import unreachable_paths

#: CPUs of one actor without a GPU. Two actors of one thread do more than one of two, which wait for each other between
#: the large operations; but each has its own torch and model in memory, so that only small nodes get one for each CPU.
CPUS_PER_ACTOR = 2
SMALL_NODE_CPUS = 4
#: Memory that one actor takes at the most: torch, the model, the shards in flight.
ACTOR_BYTES = 1_000_000_000
#: Where `ray up` leaves the description of an autoscaling cluster on its head, on which a submitted job's driver runs.
AUTOSCALER_FILE = "~/ray_bootstrap_config.yaml"
#: Of a Ray that a job starts itself: fixed, so that memory does not grow with the data.
OBJECT_STORE_BYTES = 1_000_000_000
#: How long to wait for the first node of an autoscaler.
FIRST_NODE_S = 900
#: Set in the driver of a job that was handed in with `ray job submit`.
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"

Config = TypeVar("Config")
#: Shards as they end, each with its note.
Notes = Iterator[tuple[int, dict[str, Any]]]


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the job's docstring as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_data_flags(parser: argparse.ArgumentParser, split: str, split_help: str) -> argparse._ArgumentGroup:
    """Add ``--dataset``, ``--data``, ``--split`` and ``--columns`` in a group of their own, which is returned."""
    add = (group := parser.add_argument_group("data")).add_argument
    add("--dataset", default="digits", choices=list(data.SOURCES), help="Source of the images (default: digits).")
    add("--data", metavar="URI", help="Path or s3:// URI of the images; required for every source but digits.")
    add("--split", default=split, help=f"{split_help} (default: {split}).")
    about = "Names in the data of image, label, image_id or split, as in image=img label=fine_label."
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


def add_resource_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags of the actor plan in a group of their own, which is returned."""
    add = (group := parser.add_argument_group("resources")).add_argument
    add("--actors", type=int, metavar="N", help="Number of processes that search (default: as many as are useful).")
    about = "GPUs of each actor; a fraction lets several share one (default: 1 where there are GPUs, else 0)."
    add("--gpus-per-actor", type=float, metavar="X", help=about)
    about = "Plan for N nodes where the job cannot see how many an autoscaler may bring, as on Kubernetes."
    add("--max-nodes", type=int, metavar="N", help=about)
    return group


def config_from(args: argparse.Namespace, config: type[Config], prefix: str = "", **fixed: Any) -> Config:
    """The config dataclass from the flags of ``add_config_flags``; ``fixed`` fields have no flag."""
    names = [field.name for field in dataclasses.fields(config) if field.name not in fixed]  # type: ignore[arg-type]
    values = {name: getattr(args, f"{prefix}{name}".replace("-", "_")) for name in names}
    try:
        return config(**values, **fixed)
    except ValueError as error:
        stem = prefix.replace("-", "_")
        raise ValueError(re.sub(rf"^(?:{config.__name__}\.)?(\w+):", rf"{stem}\1:", str(error))) from None


def field_help(config: type) -> dict[str, str]:
    """What the ``Args:`` section of a dataclass says of each field, as a sentence without its full stop."""
    section = inspect.cleandoc(config.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for name, text in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE):
        sentence = " ".join(text.split()).rstrip(".")
        found[name] = sentence[0].upper() + sentence[1:]
    return found


def run(
    parser: argparse.ArgumentParser,
    job: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
    *cut_by: type[Exception],
) -> int:
    """Parse the command line and run a job; what it raises becomes a line on stderr and an exit code.

    Args:
        parser: of the job's flags.
        job: returns 0 (complete) or 1 (incomplete).
        argv: the command line; that of the process by default.
        cut_by: exceptions after which the same command resumes; exit code 1, as after an interrupt. ValueError and
            OSError are bad input, exit code 2.
    """
    args = parser.parse_args(argv)
    try:
        return job(args)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {with_flag(str(error), parser)}", file=sys.stderr)
        return 2
    except cut_by as error:
        print(f"error: {error}\nthe same command resumes", file=sys.stderr)
        return 1


def with_flag(message: str, parser: argparse.ArgumentParser) -> str:
    """The message of a library error, with the parameter that it begins with (``shard_rows: ...``) as its flag."""
    flags = {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}
    name = re.match(r"(?:\w+\.)?(\w+):", message)
    return f"{flags[name[1]]}{message[name.end() - 1 :]}" if name and name[1] in flags else message


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
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel("ERROR")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    interruptible()
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
    interruptible()  # Ray took SIGTERM for itself


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
    return nodes_to_come(alive(), autoscaler_description() if joined else None, max_nodes)


def request_first_node(alive: Callable[[], list[dict[str, float]]], gpus: float | None) -> None:
    """Ask the autoscaler for a node with a CPU and ``gpus`` GPUs, and wait until one is alive."""
    import ray.autoscaler.sdk

    print("no node offers a CPU yet; the autoscaler is asked for one", flush=True)
    ray.autoscaler.sdk.request_resources(bundles=[{"CPU": 1} | ({"GPU": math.ceil(gpus)} if gpus else {})])
    end = time.monotonic() + FIRST_NODE_S
    while not any(node.get("CPU") for node in alive()) and time.monotonic() < end:
        time.sleep(1)
    ray.autoscaler.sdk.request_resources(bundles=[])


def check_visible(uri: str, run: str, data_uri: str | None) -> None:
    """Raise ValueError unless every node sees the audit directory, in which a run has begun, and the data."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    remote = ray.remote(num_cpus=0)(unreachable_paths)
    uris = {"out": uri, "data": data_uri or ""}
    for node in alive if len(alive) > 1 else []:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        for name in ray.get(remote.options(scheduling_strategy=there).remote(uri, run, data_uri)):
            raise ValueError(
                f"--{name} {storage.display(uris[name])}: node {node['NodeManagerAddress']} does not see what this one "
                "sees there; use an s3:// URI, or a directory that every node mounts"
            )


def progress(ended: Iterable[tuple[int, dict[str, Any]]], total: int) -> Notes:
    """Pass on the shards that ended, under a bar on a terminal, with a line now and then elsewhere."""
    console, printed, pairs = Console(stderr=True), time.time(), 0
    columns = ("shards", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "{task.description}")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        for done, (shard, note) in enumerate(ended, 1):
            pairs += note.get("pairs", 0)
            bar.update(task, advance=1, description=f"{pairs} pairs")
            if bar.disable and (time.time() - printed > 10 or done == total):
                printed = time.time()
                print(f"{done} of {total} shards, {pairs} pairs", flush=True)
            yield shard, note


def nodes_to_come(
    alive: Sequence[Mapping[str, float]], description: Mapping[str, Any] | None, max_nodes: int | None = None
) -> list[dict[str, float]]:
    """The nodes that are alive, and those that an autoscaler may still bring.

    Args:
        alive: the nodes that are alive.
        description: of an autoscaling cluster, as in cluster.yaml; None where there is none.
        max_nodes: instead of a description: so many nodes that offer CPUs, like the largest of those alive.
    """
    found = [dict(node) for node in alive]
    working = [node for node in found if node.get("CPU", 0) > 0]
    if max_nodes is not None and max_nodes < 1:
        raise ValueError(f"max_nodes: expected at least 1, got {max_nodes}")
    if max_nodes is not None:
        largest = max(working, key=lambda node: (node.get("GPU", 0), node["CPU"]), default=None)
        return found + [largest] * max(0, max_nodes - len(working)) if largest else found
    if not description:
        return found
    left = int(description.get("max_workers", 2)) - len(found) + 1
    for name, kind in description.get("available_node_types", {}).items():
        offered = {
            key: float(value) for key, value in kind.get("resources", {}).items() if key in ("CPU", "GPU", "memory")
        }
        if name == description.get("head_node_type") or not offered.get("CPU"):
            continue
        there = sum(all(node.get(key, 0) == offered.get(key, 0) for key in ("CPU", "GPU")) for node in working)
        count = max(0, min(left, int(kind.get("max_workers", left)) - there))
        found, left = found + [offered] * count, left - count
    return found


def autoscaler_description(path: str | os.PathLike[str] = AUTOSCALER_FILE) -> dict[str, Any] | None:
    """What `ray up` was asked for, where this machine is the head of such a cluster; else None."""
    try:
        found = yaml.safe_load(Path(path).expanduser().read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class Resources:
    """What a job asks Ray for: CPUs and GPUs as the scheduler counts them, threads as each actor really runs them."""

    num_actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    threads_per_actor: int
    io_cpus: float
    num_nodes: int

    def describe(self) -> str:
        """One line for the console."""
        device = f"{self.gpus_per_actor:g} GPU, " if self.gpus_per_actor else ""
        return (
            f"{self.num_actors} actor{'s' * (self.num_actors > 1)} on {self.num_nodes} "
            f"node{'s' * (self.num_nodes > 1)}, each {device}{self.cpus_per_actor:g} CPU, "
            f"{self.threads_per_actor} thread{'s' * (self.threads_per_actor > 1)}; "
            f"{self.io_cpus:g} CPU for a reader or writer"
        )


def plan_resources(
    nodes: Sequence[Mapping[str, float]],
    num_shards: int,
    actors: int | None = None,
    gpus_per_actor: float | None = None,
) -> Resources:
    """The resources of a run over ``nodes``, each {"CPU": n, "GPU": n, "memory": bytes} (absent is none).

    Wherever Ray puts the actors, also after losing any nodes, they leave each node the CPUs of ``io_reserve`` (0.75 of
    several nodes of 2 CPUs): actors that hold every CPU starve the reads that they wait for. Without GPUs an actor also
    fits on at least two nodes, so that losing one cannot strand the run.

    Args:
        nodes: the machines that Ray offers, or that its autoscaler may bring.
        num_shards: no more actors than shards.
        actors: number of actors asked for; as many as useful by default.
        gpus_per_actor: 1 where there is a GPU, else 0, by default; a fraction shares a GPU.

    Raises:
        ValueError: on what cannot be scheduled, with the remedy.
    """
    if actors is not None and actors < 1:
        raise ValueError(f"actors: expected at least 1, got {actors}")
    if gpus_per_actor is not None and not (gpus_per_actor >= 0 and (gpus_per_actor < 1 or gpus_per_actor % 1 == 0)):
        raise ValueError(f"gpus_per_actor: expected 0, a fraction below 1 or a whole number, got {gpus_per_actor:g}")
    usable = [node for node in nodes if node.get("CPU", 0) > 0]
    if not usable:
        raise ValueError(
            "no node offers a CPU, which reading and writing need; start one with --num-cpus of 2 or more, or give "
            "--max-nodes where an autoscaler brings nodes that this job cannot foresee, as on Kubernetes"
        )
    if gpus_per_actor is None:
        gpus_per_actor = 1.0 if any(node.get("GPU", 0) >= 1 for node in usable) else 0.0
    if gpus_per_actor:
        return plan_gpu_actors(usable, num_shards, actors, gpus_per_actor)
    return plan_cpu_actors(usable, num_shards, actors)


def plan_cpu_actors(nodes: Sequence[Mapping[str, float]], num_shards: int, actors: int | None) -> Resources:
    """``plan_resources`` without GPUs: as many actors as are useful, as large as they may be."""
    # Nodes of one CPU get no actor beside larger ones.
    least = 2 if any(node["CPU"] >= 2 for node in nodes) else 0
    hosts = [node for node in nodes if node["CPU"] >= least]
    count = actors or max(1, min(sum(useful_actors(node) for node in hosts), num_shards))
    cpus = Counter(float(node["CPU"]) for node in nodes)
    # The second largest node bounds the size: an actor must fit somewhere when the largest is lost.
    bound = sorted(node["CPU"] for node in hosts)[-2:][0]
    reserve = {c: io_reserve(c) for c in cpus}
    if len(hosts) > 1 and 2 in reserve:
        reserve[2] = 0.75  # with one of 2 CPUs kept, no size fits beside it once but not twice
    fitting, size = 0, 0.0
    for candidate in {round_down((c - reserve[c]) / n, 100) for c in cpus for n in range(1, 2 * math.ceil(c) + 1)}:
        if not 0.1 <= candidate <= bound - reserve[bound]:
            continue
        # Of each kind of node: how many actors fit beside the reserve. Where Ray could put more, there may be no more.
        beside = {c: int(round_down((c - reserve[c]) / candidate)) for c in cpus}
        total = sum(beside[c] * nodes_alike for c, nodes_alike in cpus.items() if c >= least)
        limits = [beside[c] for c in cpus if round_down(c / candidate) > beside[c]]
        fitting, size = max((fitting, size), (min([count, total, *limits]), candidate))
    if not fitting:
        raise ValueError(
            f"no actor can be scheduled on nodes of {sorted(cpus.elements())} CPUs; start a node with --num-cpus of 2 "
            "or more"
        )
    if actors is not None and fitting < actors:
        raise ValueError(
            f"--actors {actors} cannot be scheduled on {len(nodes)} node(s) with {sum(cpus.elements()):g} CPUs in all, "
            f"at least 0.75 of each kept for reading and writing; ask for --actors {fitting} or fewer, or add nodes"
        )
    fit = [node["CPU"] for node in hosts if node["CPU"] >= size]
    threads = int(max(1, min(sum(fit) // fitting, min(fit))))
    return Resources(fitting, size, 0.0, threads, 0.5 if reserve[min(fit)] >= 1 else 0.25, len(nodes))


def plan_gpu_actors(
    nodes: Sequence[Mapping[str, float]], num_shards: int, actors: int | None, gpus: float
) -> Resources:
    """``plan_resources`` of actors that each hold ``gpus`` GPUs."""
    hosts = [(float(node["CPU"]), int(round_down(node.get("GPU", 0) / gpus))) for node in nodes]
    hosts = [(cpu, fit) for cpu, fit in hosts if fit]
    total = sum(fit for _, fit in hosts)
    if not total:
        raise ValueError(
            f"--gpus-per-actor {gpus:g}: no node offers that many GPUs; the nodes have "
            f"{sorted({node.get('GPU', 0) for node in nodes})}; ask for --gpus-per-actor 0, or add GPU nodes"
        )
    if actors is not None and actors > total:
        raise ValueError(
            f"--actors {actors} of {gpus:g} GPU each do not fit: the nodes hold {total}; ask for --actors {total}"
        )
    count = actors if actors is not None else max(1, min(total, num_shards))
    size = min(1.0, *(round_down((cpu - io_reserve(cpu)) / min(fit, count), 100) for cpu, fit in hosts))
    if size < 0.05:
        raise ValueError(
            f"a node offers {min(cpu for cpu, _ in hosts):g} CPU for {max(fit for _, fit in hosts)} GPU actors: "
            "too few to read, write and feed them; ask for fewer --actors or for nodes with more CPUs"
        )
    threads = max(1, min(8, min(int(cpu // min(fit, count)) for cpu, fit in hosts)))
    return Resources(count, size, gpus, threads, 0.5 if max(cpu for cpu, _ in hosts) >= 2 else 0.25, len(nodes))


def useful_actors(node: Mapping[str, float]) -> int:
    """How many actors without a GPU make a node's CPUs work, and fit into its memory."""
    by_memory = node["memory"] // ACTOR_BYTES if node.get("memory") else math.inf
    cpus = node["CPU"]
    return int(max(1, min(cpus if cpus <= SMALL_NODE_CPUS else cpus // CPUS_PER_ACTOR, by_memory)))


def io_reserve(cpus: float) -> float:
    """CPUs of a node that actors leave to readers and writers: an eighth, at least one; half of nodes below 2 CPUs."""
    # Encoding PNG files and writing tables is about an eighth of the work.
    return max(cpus / 8, 1.0) if cpus >= 2 else cpus / 2


def round_down(value: float, steps: int = 1) -> float:
    """The next multiple of 1 / ``steps`` below, where the arithmetic of floats does not count."""
    return math.floor(value * steps + 1e-6) / steps
