"""The job with a fault planted in it: ``python tests/jobs/planted.py FAULT MARKER -- FLAGS...``.

Each fault is a line of ``FAULTS``: where in the job it strikes (a search, a reader, a writer, the driver), at which
shards, how often, and what it does there. What strikes a limited number of times, in whatever process, counts in files
beside MARKER.
"""

import contextlib
import os
import pkgutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))
from jobfiles import load_job

SHARDS = 6
Step = Callable[[], Any]  # what the job would have done
Act = Callable[[Step], Any]  # what is done in its stead
Plant = Callable[[Any, str], None]  # breaks a job, given a marker


# What is done


def die(step: Step) -> None:
    os._exit(1)


def die_during(step: Step) -> Any:
    threading.Timer(0.005, os._exit, [1]).start()
    result = step()
    time.sleep(1)
    return result


def die_after(step: Step) -> None:
    step()
    os._exit(1)


def be_killed(step: Step) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exhaust_memory(step: Step) -> Any:
    return bytearray(1 << 60)


def fail(step: Step) -> None:
    raise RuntimeError("planted")


def fail_as_a_disk(step: Step) -> None:
    raise OSError(5, "planted")


def dawdle(step: Step) -> Any:
    time.sleep(0.3)
    return step()


def linger(step: Step) -> Any:
    time.sleep(15)
    return step()


# Where it strikes


def strikes(marker: str, times: int | None) -> bool:
    """Whether a fault strikes now: True for the first so many that ask, in whatever process; always without a limit."""
    for number in range(times or 0):
        with contextlib.suppress(FileExistsError):
            os.close(os.open(f"{marker}.{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return True
    return times is None


def during(stage: str, owner: str, name: str) -> Callable[..., Plant]:
    """Faults of a stage of the job, where it calls the function ``name`` of ``owner``, a module or module:class."""

    def fault(act: Act, shards: Collection[int], times: int | None = None, folder: str = "") -> Plant:
        """Strikes in some shards, for each so many times; of the files written, at those in a folder of the audit."""

        def plant(job: Any, marker: str) -> None:
            real = getattr(job, stage)

            def broken(run: Any, batch: Any, *rest: Any) -> Any:
                found = pkgutil.resolve_name(owner)
                call, shard = getattr(found, name), batch["shard"][0].as_py()

                def disturbed(*args: Any, **options: Any) -> Any:
                    struck = shard in shards and (not folder or f"/{folder}/" in str(args[0]))
                    step = partial(call, *args, **options)
                    return act(step) if struck and strikes(f"{marker}-{shard}", times) else step()

                with patch.object(found, name, disturbed):
                    return run(batch, *rest)

            if isinstance(real, type):
                methods = {"__call__": lambda self, batch: broken(partial(real.__call__, self), batch)}
                setattr(job, stage, type(stage, (real,), methods))
            else:
                setattr(job, stage, lambda batch, work: broken(real, batch, work))

        return plant

    return fault


in_search = during("ExplainShard", "clarity.explainer:Explainer", "search_shard")
in_reader = during("read_shard", "clarity.data", "read_images")
in_writer = during("write_shard", "clarity.storage", "write_bytes")


def before_writing(name: str) -> Plant:
    """The driver is killed as it would write a file."""

    def plant(job: Any, marker: str) -> None:
        real = job.storage.write_json

        def write_json(uri: Any, value: Any, **options: Any) -> None:
            if str(uri).endswith(name):
                os.kill(os.getpid(), signal.SIGKILL)
            real(uri, value, **options)

        job.storage.write_json = write_json

    return plant


def at_start(job: Any, marker: str) -> None:
    """The first two actors die while they are made."""

    class Dying(job.ExplainShard):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if strikes(marker, 2):
                os._exit(1)
            super().__init__(*args, **kwargs)

    job.ExplainShard = Dying


def before_success(job: Any, marker: str) -> None:
    """The driver is killed after the last commit."""
    job.verify = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)


def clock_set_back(job: Any, marker: str) -> None:
    """Each look at the clock finds it earlier."""
    real_time = time.time
    start = real_time()
    job.time.time = lambda: start - 86_400 - 10 * (real_time() - start)


def node_is_killed(job: Any, victim: str) -> None:
    """Give the job a cluster of a head and two nodes, and kill a node hard once the first shard is committed.

    ``victim``: "actor", the node of the (only) actor, or "other".
    """
    import ray
    from ray.cluster_utils import Cluster

    out = Path(sys.argv[sys.argv.index("--out") + 1])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100_000_000})
    workers = [cluster.add_node(num_cpus=2, object_store_memory=100_000_000) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    in_search(dawdle, range(SHARDS))(job, victim)
    codes: list[int] = []
    argv = sys.argv[sys.argv.index("--") + 1 :]
    thread = threading.Thread(target=lambda: codes.append(job.main(argv)))
    thread.start()
    while not list(out.glob("_commits/*.json")) and thread.is_alive():
        time.sleep(0.05)
    actors = ray.util.state.list_actors(address=cluster.address, limit=100)
    homes = {a.node_id for a in actors if "ExplainShard" in a.class_name}
    assert homes, "no actor is found"
    chosen = [node for node in workers if (node.node_id in homes) == (victim == "actor")]
    cluster.remove_node((chosen or workers)[0], allow_graceful=False)
    thread.join()
    ray.shutdown()
    cluster.shutdown()
    sys.exit(codes[0] if codes else 1)


def node_sees_nothing(job: Any, marker: str) -> None:
    """Give the job a cluster whose last node has another disk."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100_000_000})
    blind = cluster.add_node(num_cpus=2, object_store_memory=100_000_000).node_id
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    real = job.driver.unreachable_paths

    def unreachable_paths(*args: Any) -> list[str]:
        return ["out"] if ray.get_runtime_context().get_node_id() == blind else real(*args)

    job.driver.unreachable_paths = unreachable_paths


#: Each fault by its name.
FAULTS: dict[str, Plant] = {
    "": lambda job, marker: None,
    "actor-dies-at-start": at_start,
    "actor-dies-mid-search": in_search(die_during, [2], 1),
    "actor-dies-at-every-third": in_search(die_during, range(0, SHARDS, 3), 1),
    "actor-dies-on-one-shard-always": in_search(die, [1]),
    "actor-killed-as-out-of-memory": in_search(be_killed, [3], 1),
    "actor-without-memory": in_search(exhaust_memory, [3], 1),
    "search-raises-once": in_search(fail, [4], 1),
    "search-raises-always": in_search(fail, [4]),
    "search-raises-twice-everywhere": in_search(fail, range(SHARDS), 2),
    "reader-dies": in_reader(die, [0], 1),
    "reader-dies-always": in_reader(die, [0]),
    "reader-raises-always": in_reader(fail_as_a_disk, [5]),
    "writer-dies-between-tables": in_writer(die, [2], 1, "counterfactuals"),
    "writer-dies-before-commit": in_writer(die, [2], 1, "_commits"),
    "writer-dies-after-commit": in_writer(die_after, [2], 1, "_commits"),
    "writer-dies-always": in_writer(die, [2], None, "_commits"),
    "writer-raises-once": in_writer(fail_as_a_disk, [2], 1, "codes"),
    "slow-writers": in_writer(dawdle, range(SHARDS)),  # time to be killed between data and commit
    "lingering-writers": in_writer(linger, range(1, SHARDS)),  # time for another driver to start
    "driver-dies-between-commit-and-success": before_success,
    "driver-dies-between-summary-and-success": before_writing("_SUCCESS"),
    "driver-dies-before-the-plan": before_writing("plan.json"),
    "clock-set-back": clock_set_back,
    "node-holding-the-actor": node_is_killed,
    "node-that-sees-nothing": node_sees_nothing,
}


def main(fault: str, marker: str, argv: list[str]) -> int:
    job = load_job("explain_all")
    FAULTS[fault](job, marker)
    return int(job.main(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[sys.argv.index("--") + 1 :]))
