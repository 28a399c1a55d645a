"""The actor plan: how many actors of what size fit on the nodes of a cluster beside their readers and writers.

Runs on the driver alone, without Ray: the nodes come in as dictionaries.
"""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clarity.report.text import counted

#: Where `ray up` leaves the description of an autoscaling cluster on its head, on which a submitted job's driver runs.
AUTOSCALER_FILE = "~/ray_bootstrap_config.yaml"
#: CPUs of one actor without a GPU. Two actors of one thread do more than one of two, which wait for each other between
#: the large operations; but each has its own torch and model in memory, so that only small nodes get one for each CPU.
CPUS_PER_ACTOR = 2
SMALL_NODE_CPUS = 4
#: Memory that one actor takes at the most: torch, the model, the shards in flight.
ACTOR_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Resources:
    """What a job asks Ray for: CPUs and GPUs as the scheduler counts them, threads as each actor really runs them."""

    num_actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    threads_per_actor: int
    io_cpus: float
    num_nodes: int

    @property
    def device(self) -> str:
        """What actors compute on."""
        return "cuda" if self.gpus_per_actor else "cpu"

    def describe(self) -> str:
        """One line for the console."""
        if not self.num_actors:
            return f"in this process, {counted(self.threads_per_actor, 'threads')}"
        device = f"{self.gpus_per_actor:g} GPU, " if self.gpus_per_actor else ""
        return (
            f"{counted(self.num_actors, 'actors')} on {counted(self.num_nodes, 'nodes')}, each {device}"
            f"{self.cpus_per_actor:g} CPU, {counted(self.threads_per_actor, 'threads')}"
        )

    def actors_write(self, out: str) -> bool:
        """Whether each actor also reads and writes its shards: another process would take the one core that it has.

        Beside a GPU, or several threads, others encode pictures meanwhile; and others wait for an object store.
        """
        return not self.gpus_per_actor and self.threads_per_actor == 1 and "://" not in out


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
    count = actors or max(1, min(sum(actors_of_node(node) for node in hosts), num_shards))
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
    if fitting < (actors or 1):  # of whole CPUs at least one fits
        raise ValueError(
            f"--actors {actors or 1} cannot be scheduled on {len(nodes)} node(s) with {sum(cpus.elements()):g} CPUs in "
            f"all, at least 0.75 of each for reading and writing; ask for --actors {fitting} or fewer, or add nodes"
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


def actors_of_node(node: Mapping[str, float]) -> int:
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
