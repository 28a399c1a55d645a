"""What a job asks of the machines: how many actors, their CPUs, GPUs and threads; where its outputs may lie; its end.

Knows numbers of CPUs and GPUs. Does not know Ray, models or data.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

#: CPUs of one actor without a GPU. Two actors of one thread do more than one of two, which wait for each other between
#: the large operations; but each has its own torch and model in memory, so that only small nodes get one for each CPU.
CPUS_PER_ACTOR = 2
SMALL_NODE_CPUS = 4
#: Where `ray up` leaves the description of an autoscaling cluster on its head, on which a submitted job's driver runs.
AUTOSCALER_FILE = "~/ray_bootstrap_config.yaml"
#: Memory that one actor takes at the most: torch, the model, the shards in flight.
ACTOR_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Resources:
    """What the job asks Ray for: ``cpus_per_actor``, ``gpus_per_actor`` and ``io_cpus`` (one reader or writer) are
    what the scheduler counts, ``threads_per_actor`` what each actor really runs on.
    """

    num_actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    threads_per_actor: int
    io_cpus: float
    num_nodes: int

    def describe(self) -> str:
        """One line for people."""
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

    The rule that everything follows: wherever Ray puts the actors, also after losing any nodes, they leave each node
    at least one CPU (three quarters of one on nodes of 2 CPUs that are too many to share one, half on nodes of 1).
    Actors that hold every CPU starve the reads that they wait for. Without GPUs an actor also fits on at least two
    nodes, so that losing one cannot strand the run. Raises ValueError, with the remedy, on what cannot be scheduled.

    Args:
        nodes: the machines that Ray offers, or that its autoscaler may bring.
        num_shards: no more actors than shards.
        actors: number of actors asked for; as many as useful by default.
        gpus_per_actor: 1 where there is a GPU, else 0, by default; a fraction shares a GPU.
    """
    if actors is not None and actors < 1:
        raise ValueError(f"--actors: expected at least 1, got {actors}")
    if gpus_per_actor is not None and not (gpus_per_actor >= 0 and (gpus_per_actor < 1 or gpus_per_actor % 1 == 0)):
        raise ValueError(f"--gpus-per-actor: expected 0, a fraction below 1 or a whole number, got {gpus_per_actor:g}")
    usable = [node for node in nodes if node.get("CPU", 0) > 0]
    if not usable:
        raise ValueError(
            "no node offers a CPU, which reading and writing need; start one with --num-cpus of 2 or more, or give "
            "--max-nodes where an autoscaler brings nodes that this job cannot foresee, as on Kubernetes"
        )
    if gpus_per_actor is None:
        gpus_per_actor = 1.0 if any(node.get("GPU", 0) >= 1 for node in usable) else 0.0
    if gpus_per_actor:
        return _with_gpus(usable, num_shards, actors, gpus_per_actor)
    return _without_gpus(usable, num_shards, actors)


def nodes_to_come(
    alive: Sequence[Mapping[str, float]], description: Mapping[str, Any] | None, max_nodes: int | None = None
) -> list[dict[str, float]]:
    """The nodes that run, and those that an autoscaler may still bring.

    Args:
        alive: the nodes that run.
        description: of an autoscaling cluster, as in cluster.yaml; None where there is none.
        max_nodes: instead of a description: so many nodes that offer CPUs, like the largest of those that run.
    """
    found = [dict(node) for node in alive]
    working = [node for node in found if node.get("CPU", 0) > 0]
    if max_nodes is not None and max_nodes < 1:
        raise ValueError(f"--max-nodes: expected at least 1, got {max_nodes}")
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


def _without_gpus(nodes: Sequence[Mapping[str, float]], num_shards: int, actors: int | None) -> Resources:
    cpus = sorted((float(node["CPU"]) for node in nodes), reverse=True)
    large = [c for c in cpus if c >= 2] or cpus
    useful = sum(_useful_actors(node) for node in nodes if node["CPU"] >= large[-1])
    count = actors if actors is not None else max(1, min(useful, num_shards))
    fitting, size = _fitting(cpus, large, count)
    if not fitting:
        raise ValueError(
            f"no actor can be scheduled on nodes of {cpus} CPUs; start a node with --num-cpus of 2 or more"
        )
    if actors is not None and fitting < actors:
        raise ValueError(
            f"--actors {actors} cannot be scheduled on {len(cpus)} node(s) with {sum(cpus):g} CPUs in all, one CPU of "
            f"each being kept for reading and writing; ask for --actors {fitting} or fewer, or add nodes"
        )
    hosts = [c for c in large if c >= size]
    threads = int(max(1, min(sum(hosts) // fitting, hosts[-1])))
    return Resources(fitting, size, 0.0, threads, 0.5 if large[0] >= 2 else 0.25, len(nodes))


def _fitting(cpus: Sequence[float], large: Sequence[float], count: int) -> tuple[int, float]:
    """The most actors, up to ``count``, under the rule of plan_resources, and the most CPUs that each may then take."""
    # The second largest node bounds the size: an actor must find a place when the largest is lost.
    bound = large[min(1, len(large) - 1)]
    sizes = {_down(_free(c) / n) for c in set(large) for n in range(1, 2 * math.ceil(c) + 1)} | {1.25, 1.0, 0.5, 0.25}
    alike = Counter(cpus)
    best = (0, False, 0.0)
    for strict in (True, False):
        for size in (s for s in sizes if 0.1 <= s <= bound - _reserve(bound, strict)):
            # Of each kind of node: how many fit beside the reserve, and whether Ray could put more there.
            kept = {c: max(0, _down_int((c - _reserve(c, strict)) / size)) for c in alike}
            places = sum(kept[c] * alike[c] for c in alike if c >= large[-1])
            fits = min([count, places, *(n for c, n in kept.items() if _down_int(c / size) > n)])
            best = max(best, (fits, strict, size))
    return best[0], best[2]


def _with_gpus(nodes: Sequence[Mapping[str, float]], num_shards: int, actors: int | None, gpus: float) -> Resources:
    hosts = [(float(node["CPU"]), int(node.get("GPU", 0) / gpus + 1e-9)) for node in nodes]
    hosts = [(cpu, places) for cpu, places in hosts if places]
    places = sum(places for _, places in hosts)
    if not places:
        raise ValueError(
            f"--gpus-per-actor {gpus:g}: no node offers that many GPUs; the nodes have "
            f"{sorted({node.get('GPU', 0) for node in nodes})}; ask for --gpus-per-actor 0, or add GPU nodes"
        )
    if actors is not None and actors > places:
        raise ValueError(
            f"--actors {actors} of {gpus:g} GPU each do not fit: the nodes hold {places}; ask for --actors {places}"
        )
    count = actors if actors is not None else max(1, min(places, num_shards))
    size = min(1.0, min(_down(_free(cpu) / min(places, count)) for cpu, places in hosts))
    if size < 0.05:
        raise ValueError(
            f"a node offers {min(cpu for cpu, _ in hosts):g} CPU for {max(places for _, places in hosts)} GPU actors: "
            "too few to read, write and feed them; ask for fewer --actors or for nodes with more CPUs"
        )
    threads = max(1, min(8, min(int(cpu // min(places, count)) for cpu, places in hosts)))
    return Resources(count, size, gpus, threads, 0.5 if max(cpu for cpu, _ in hosts) >= 2 else 0.25, len(nodes))


def _useful_actors(node: Mapping[str, float]) -> int:
    by_memory = node["memory"] // ACTOR_BYTES if node.get("memory") else math.inf
    cpus = node["CPU"]
    return int(max(1, min(cpus if cpus <= SMALL_NODE_CPUS else cpus // CPUS_PER_ACTOR, by_memory)))


def _free(cpus: float) -> float:
    return cpus - _reserve(cpus, strict=True)


def _reserve(cpus: float, strict: bool) -> float:
    if cpus < 2:
        return cpus / 2
    # Making pictures and writing tables is about an eighth of the work.
    return max(cpus / 8, 1.0 if strict or cpus > 2 else 0.75)


def _down(value: float) -> float:
    return math.floor(value * 100 + 1e-6) / 100


def _down_int(value: float) -> int:
    return math.floor(value + 1e-9)


def job_path(given: str | None, default: str, flag: str) -> str:
    """Where a job reads or writes: the absolute path, or the URI, of ``given`` or of the default below runs/.

    The working directory of a submitted job is a temporary copy on one node. There the default moves to the user's
    home on the head, and a relative path raises ValueError.
    """
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
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

    Only the main thread can hear a signal; called in another, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def interrupt(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        # What other processes then say of their own end, stack traces among it, comes by stdout: it tells a user
        # nothing. Errors of this process go to stderr as before.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, interrupt)
