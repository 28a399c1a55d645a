"""Faults planted into the real job: each is run, resumed where that is needed, and compared with an undisturbed run.

After each fault every (image, target) must be there exactly once, no stray or torn file, the tables byte by byte those
of a run that nothing disturbed, and the exit codes honest. A few faults are among the normal tests, all of them behind
the marker ``faults``; ``python docs/faults.py`` runs them all and prints what reliability.md sums up.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import planted
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_store import Fault, ObjectStore, copy_tree, leaks

from clarity import data, schema, storage
from clarity.images import Preprocessing, encode_png

ROOT = Path(__file__).parent.parent.parent
LIMIT, SHARD_ROWS = 40, 7
SHARDS = -(-LIMIT // SHARD_ROWS)
FLAGS = ["--limit", str(LIMIT), "--shard-rows", str(SHARD_ROWS), "--max-steps", "25", "--min-target-prob", "0.4"]
FLAGS += ["--no-report"]
PATIENCE_S = 240


# ---- around the job: the bench -------------------------------------------------------------------------------------


def as_from_a_terminal(group: bool) -> None:
    """In a new process: it hears Ctrl-C, though this one may run where nobody types; on request as its own group."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if group:
        os.setpgrp()


@dataclass
class Bench:
    """Where faults are tried: a Ray that is up, a model, and the files of an undisturbed run."""

    address: str
    model: str
    root: Path
    expected: dict[str, bytes] = field(default_factory=dict)
    exits: list[int] = field(default_factory=list)
    damaged: bool = False  # by the test's own hand: a reader may stumble

    @property
    def out(self) -> Path:
        return self.root / "audit"

    def fresh(self) -> "Bench":
        """A bench with an empty place."""
        return Bench(self.address, self.model, Path(tempfile.mkdtemp(dir=self.root.parent)), self.expected)

    def start(
        self,
        *more: str,
        fault: str = "",
        marker: str = "",
        out: str | None = None,
        umask: int = -1,
        group: bool = False,
        **env: str,
    ) -> Any:
        """The job as a process, with a fault planted in it."""
        argv = [sys.executable, "-W", "ignore", planted.__file__, fault, marker or str(self.root / "marker"), "--"]
        argv += ["--model", self.model, "--out", out or str(self.out), *FLAGS, *more]
        environ = os.environ | {"RAY_ADDRESS": self.address, "PYTHONPATH": str(ROOT)} | env
        log = open(self.root / "log", "a")  # noqa: SIM115
        options: dict[str, Any] = {"umask": umask, "preexec_fn": lambda: as_from_a_terminal(group)}
        return subprocess.Popen(argv, env=environ, cwd=ROOT, stdout=log, stderr=log, **options)

    def run(self, *more: str, exit_code: int = 0, **options: Any) -> None:
        """Run the job to its end, which must be ``exit_code``."""
        self.end(self.start(*more, **options), exit_code)

    def end(self, process: Any, exit_code: int | tuple[int, ...] = 0) -> None:
        codes = exit_code if isinstance(exit_code, tuple) else (exit_code,)
        code = process.wait(PATIENCE_S)
        self.exits.append(code)
        assert code in codes, f"exit code {code}, expected {codes}:\n{self.log()[-3000:]}"

    def log(self) -> str:
        return (self.root / "log").read_text()

    def kill_when(
        self, process: Any, ready: Callable[[], bool], how: signal.Signals = signal.SIGKILL, group: bool = False
    ) -> None:
        end = time.monotonic() + PATIENCE_S
        while not ready() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how) if group else process.send_signal(how)
        self.exits.append(process.wait(PATIENCE_S))

    def commits(self) -> int:
        return len(list(self.out.glob("_commits/*.json")))

    def files(self) -> dict[str, bytes]:
        """Every file that a reader by name pattern finds."""
        return {
            str(path.relative_to(self.out)): path.read_bytes()
            for name in ("codes", "counterfactuals")
            for path in sorted(self.out.glob(f"{name}/**/*"))
            if path.is_file()
        }

    def count(self) -> tuple[int, int]:
        """Rows found by a reader of all files, and how many of them are double."""
        keys = [
            (target, name)
            for path in sorted(self.out.glob("counterfactuals/*.parquet"))
            for target, name in zip(*pq.read_table(path, columns=["target", "image_id"]).to_pydict().values())
        ]
        return len(keys), len(keys) - len(set(keys))

    def check(self) -> None:
        """The audit is that of an undisturbed run, to the byte, and clean."""
        assert self.count() == (LIMIT * 9, 0)
        found = self.files()
        assert sorted(found) == sorted(self.expected)
        assert all(found[name] == content for name, content in self.expected.items()), "other bytes"
        assert (self.out / "_SUCCESS").exists()
        kept = {"_SUCCESS", "_commits", "codes", "counterfactuals", "model", "plan.json", "summary.json"}
        left = [str(path.relative_to(self.out)) for path in self.out.rglob("*")]
        left = [path for path in left if path.partition("/")[0] not in kept]
        assert not left, f"left behind: {left[:5]}"


@contextlib.contextmanager
def watched(bench: Bench) -> Iterator[None]:
    """Meanwhile a reader reads all it finds: never a torn file, never a row twice."""
    stop, wrong = threading.Event(), []

    def watch() -> None:
        while not stop.wait(0.05):
            damaged = bench.damaged
            try:
                rows, double = bench.count()
                if double or rows > LIMIT * 9:
                    wrong.append(f"{double} double of {rows}")
            except FileNotFoundError:
                pass
            except Exception as error:
                if not (damaged or bench.damaged):
                    wrong.append(repr(error))

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    stop.set()
    thread.join()
    assert not wrong, wrong[:3]


@contextlib.contextmanager
def ray_directory() -> Iterator[str]:
    directory = tempfile.mkdtemp(prefix="r-", dir="/tmp")
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def own_ray() -> Iterator[dict[str, Any]]:
    """Options of a job that starts a Ray of its own, in a directory that is removed at the end."""
    with ray_directory() as directory:
        yield {"RAY_TMPDIR": directory, "RAY_ADDRESS": "local"}


#: Each breaks the job and lets it end; returns None, or rows expected, found and double where no audit is made.
FAULTS: dict[str, Callable[[Bench], Any]] = {}
FAST = (
    "actor exits in the middle of a search",
    "two drivers at once",
    "driver SIGKILLed between commit and _SUCCESS",
    "search raises always on one shard",
    "a random share of the commits deleted",
)


def fault(name: str) -> Callable[[Callable[[Bench], None]], Callable[[Bench], None]]:
    def register(function: Callable[[Bench], None]) -> Callable[[Bench], None]:
        FAULTS[name] = function
        return function

    return register


def survives(name: str, planted: str) -> None:
    """A fault after which the same run goes on to the end."""
    FAULTS[name] = lambda bench: bench.run(fault=planted)


def costs_a_shard(name: str, planted: str, shard: int) -> None:
    """A fault that costs a shard: the others finish, the run exits 1, the next one without the fault completes it."""

    def run(bench: Bench) -> None:
        bench.run(fault=planted, exit_code=1)
        assert bench.commits() == SHARDS - 1
        failure = json.loads((bench.out / f"_failures/shard-0000{shard}.json").read_text())
        assert failure["attempts"] == 3
        assert not (bench.out / "_SUCCESS").exists()
        assert f"shard {shard} failed" in bench.log()
        bench.run()

    FAULTS[name] = run


survives("actor exits at its start, twice", "actor-dies-at-start")
survives("actor exits in the middle of a search", "actor-dies-mid-search")
survives("actor exits in every third search", "actor-dies-at-every-third")
survives("actor killed by SIGKILL, as when memory runs out", "actor-killed-as-out-of-memory")
survives("actor cannot get memory", "actor-without-memory")
survives("search raises once", "search-raises-once")
survives("every search raises twice", "search-raises-twice-everywhere")
survives("reader exits", "reader-dies")
survives("writer exits between the two tables", "writer-dies-between-tables")
survives("writer exits between data and commit", "writer-dies-before-commit")
survives("writer exits after the commit", "writer-dies-after-commit")
survives("writer's disk fails once", "writer-raises-once")
survives("clock set back a day, and going backwards", "clock-set-back")
costs_a_shard("search raises always on one shard", "search-raises-always", 4)
costs_a_shard("actor exits always on one shard", "actor-dies-on-one-shard-always", 1)
costs_a_shard("reader exits always on one shard", "reader-dies-always", 0)
costs_a_shard("reader raises always on one shard", "reader-raises-always", 5)
costs_a_shard("writer exits always on one shard", "writer-dies-always", 2)


@fault("driver SIGKILLed at ten random moments")
def driver_killed(bench: Bench, how: signal.Signals = signal.SIGKILL) -> None:
    moments = random.Random(int(how))
    for _ in range(10):
        process, moment = bench.start(fault="slow-writers"), time.monotonic() + moments.uniform(1, 14)
        bench.kill_when(process, lambda moment=moment: time.monotonic() > moment, how)  # type: ignore[misc]
    assert any(bench.exits)
    bench.run()


@fault("driver SIGTERMed at ten random moments")
def driver_terminated(bench: Bench) -> None:
    driver_killed(bench, signal.SIGTERM)
    assert "Traceback" not in bench.log(), "a fright"


@fault("driver and all of its Ray SIGTERMed, then SIGINTed, as one group")
def group_terminated(bench: Bench) -> None:
    with own_ray() as options:
        for count, how in enumerate((signal.SIGTERM, signal.SIGINT), 1):
            process, before = bench.start(fault="slow-writers", group=True, **options), bench.commits()
            bench.kill_when(process, lambda before=before: bench.commits() > before, how, group=True)  # type: ignore[misc]
            assert bench.exits[-1] == 1, bench.exits
            assert bench.log().count("interrupted; the same command resumes") == count
        assert "Traceback" not in bench.log(), "a fright"
        bench.run(**options)


@fault("driver SIGKILLed after each commit in turn")
def driver_killed_after_commits(bench: Bench) -> None:
    for count in range(1, SHARDS):
        bench.kill_when(bench.start(fault="slow-writers"), lambda count=count: bench.commits() >= count)  # type: ignore[misc]
    bench.run()


@fault("driver and its own Ray SIGKILLed")
def driver_killed_with_its_ray(bench: Bench) -> None:
    with own_ray() as options:
        bench.kill_when(bench.start(fault="slow-writers", umask=0o027, **options), lambda: bench.commits() > 1)
        bench.run(umask=0o027, **options)
    for path in (bench.out, *bench.out.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), f"umask: {path}"


@fault("driver SIGKILLed between data and commit")
def driver_killed_between_data_and_commit(bench: Bench) -> None:
    def ready() -> bool:
        return len(list(bench.out.glob("counterfactuals/*.parquet"))) > bench.commits()

    bench.kill_when(bench.start(fault="slow-writers"), ready)
    bench.run()


def dies_then_completes(name: str, planted: str) -> None:
    def run(bench: Bench) -> None:
        bench.run(fault=planted, exit_code=-signal.SIGKILL)
        assert not (bench.out / "_SUCCESS").exists()
        bench.run()

    FAULTS[name] = run


dies_then_completes("driver SIGKILLed before the plan is written", "driver-dies-before-the-plan")
dies_then_completes("driver SIGKILLed between commit and _SUCCESS", "driver-dies-between-commit-and-success")
dies_then_completes("driver SIGKILLed between summary and _SUCCESS", "driver-dies-between-summary-and-success")


@fault("two drivers at once")
def two_drivers(bench: Bench) -> None:
    processes = [bench.start(fault="slow-writers") for _ in range(2)]
    codes = sorted(process.wait(PATIENCE_S) for process in processes)
    bench.exits += codes
    assert codes in ([0, 2], [0, 0]), bench.log()[-2000:]
    if codes == [0, 2]:
        assert "is at work there" in bench.log()


@fault("two drivers of different plans at once")
def two_plans(bench: Bench) -> None:
    first = bench.start(fault="slow-writers")
    while not (bench.out / "plan.json").exists():
        time.sleep(0.01)
    bench.run("--max-steps", "24", exit_code=2)
    bench.end(first)


@fault("a lock left by a dead driver")
def left_lock(bench: Bench) -> None:
    bench.out.mkdir(parents=True)
    (bench.out / "_lock").write_text('{"run": "dead", "host": "elsewhere", "pid": 1}')
    bench.run()


@fault("the lock removed by hand under a driver, another started")
def stolen_lock(bench: Bench) -> None:
    first = bench.start(fault="lingering-writers")
    while bench.commits() < 1 and first.poll() is None:
        time.sleep(0.01)
    (bench.out / "_lock").unlink()
    bench.run(fault="slow-writers")
    bench.end(first, 2)
    assert "was taken over by another run" in bench.log()


def broken_afterwards(name: str, damage: Callable[[Bench], set[int]]) -> None:
    """Damage to a finished audit: the next run redoes those shards and no other."""

    def run(bench: Bench) -> None:
        bench.run()
        before = {path.name: path.stat().st_mtime_ns for path in (bench.out / "codes").iterdir()}
        bench.damaged = True
        shards = damage(bench)
        bench.run()
        bench.damaged = False
        after = {path.name: path.stat().st_mtime_ns for path in (bench.out / "codes").iterdir()}
        redone = {name for name in after if after[name] != before[name]}
        assert redone == {f"shard-0000{shard}.parquet" for shard in shards}

    FAULTS[name] = run


def commit(bench: Bench, shard: int) -> Path:
    return bench.out / f"_commits/shard-0000{shard}.json"


def delete_some(bench: Bench) -> set[int]:
    chosen = set(random.Random(1).sample(range(SHARDS), 3))
    for shard in chosen:
        commit(bench, shard).unlink()
    return chosen


def tear(bench: Bench) -> set[int]:
    commit(bench, 1).write_text(commit(bench, 1).read_text()[:60])
    commit(bench, 3).write_text("")
    return {1, 3}


def other_plan(bench: Bench) -> set[int]:
    text = json.loads(commit(bench, 2).read_text()) | {"fingerprint": "another"}
    commit(bench, 2).write_text(json.dumps(text))
    return {2}


def cut_short(bench: Bench) -> set[int]:
    path = bench.out / "counterfactuals/shard-00004.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    (bench.out / "counterfactuals/shard-00000.parquet").unlink()
    return {0, 4}


def changed_byte(bench: Bench) -> set[int]:
    path = bench.out / "counterfactuals/shard-00003.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(bytes(content))
    command = [sys.executable, str(ROOT / "jobs/verify.py"), str(bench.out)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=env, capture_output=True).returncode == 1
    assert subprocess.run([*command, "--repair"], env=env, capture_output=True).returncode == 1
    return {3}


def strays(bench: Bench) -> set[int]:
    for name in ("codes/shard-00077.parquet", "counterfactuals/.x.tmp", "_tmp/y"):
        (bench.out / name).parent.mkdir(exist_ok=True)
        (bench.out / name).write_bytes(b"torn")
    return set()


broken_afterwards("a random share of the commits deleted", delete_some)
broken_afterwards("commit records torn and empty", tear)
broken_afterwards("a commit record of another plan", other_plan)
broken_afterwards("data files cut short and deleted", cut_short)
broken_afterwards("a byte changed in a data file (verify --repair)", changed_byte)
broken_afterwards("stray and torn files", strays)


@fault("a byte changed in a file of an unfinished audit")
def changed_meanwhile(bench: Bench) -> None:
    """The run that meets it takes the shard back and says so; the next one does it again."""
    bench.run()
    commit(bench, 5).unlink()
    (bench.out / "_SUCCESS").unlink()
    bench.damaged = True
    path = bench.out / "codes/shard-00002.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    bench.run(exit_code=1)
    assert "TAKEN BACK 1 damaged shard;" in bench.log()
    bench.run()


@fault("files deleted from a finished audit: its summary, its mark, a table")
def files_deleted(bench: Bench) -> None:
    bench.run()
    for name in ("summary.json", "_SUCCESS", "codes"):
        path = bench.out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        bench.run()
        bench.check()


@fault("resumed with more actors, then with fewer")
def other_resources(bench: Bench) -> None:
    bench.kill_when(bench.start(fault="slow-writers"), lambda: bench.commits() >= 1)
    bench.kill_when(bench.start("--actors", "3", fault="slow-writers"), lambda: bench.commits() >= 3)
    bench.run("--actors", "1")


@fault("resumed with other flags is refused")
def other_flags(bench: Bench) -> None:
    bench.kill_when(bench.start(fault="slow-writers"), lambda: bench.commits() >= 1)
    bench.run("--max-steps", "30", exit_code=2)
    assert "--max-steps: 25 in the audit, 30 in this run" in bench.log()
    bench.run()


@fault("plan.json damaged")
def damaged_plan(bench: Bench) -> None:
    bench.kill_when(bench.start(fault="slow-writers"), lambda: bench.commits() >= 1)
    plan = bench.out / "plan.json"
    whole = plan.read_text()
    plan.write_text(whole.replace('"max_steps": 25', '"max_steps": 26'))
    bench.run(exit_code=2)
    plan.write_text(whole)
    bench.run()


@fault("the audit's model loses a file during the run")
def model_lost(bench: Bench) -> None:
    bench.kill_when(bench.start(fault="slow-writers"), lambda: bench.commits() >= 1)
    lost = bench.out / "model/vae.safetensors"
    content = lost.read_bytes()
    lost.unlink()
    bench.run(exit_code=(1, 2))
    lost.write_bytes(content)
    bench.run()


@contextlib.contextmanager
def mounted(place: Path, *options: str) -> Iterator[None]:
    """A file system of one's own; skips where this user may not mount."""
    place.mkdir(parents=True, exist_ok=True)
    run = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"cannot mount: {run.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@fault("disk full, then given space")
def full_disk(bench: Bench) -> None:
    with mounted(bench.out, "-t", "tmpfs", "-o", "size=400k", "tmpfs"):
        bench.run(exit_code=(1, 2))
        assert "No space left" in bench.log()
        assert bench.count()[1] == 0
        subprocess.run(["mount", "-o", "remount,size=50m", str(bench.out)], check=True)
        bench.run()
        bench.check()
        shutil.copytree(bench.out, bench.root / "copy")
    shutil.rmtree(bench.out)
    shutil.move(bench.root / "copy", bench.out)


@fault("output read-only")
def read_only(bench: Bench) -> None:
    with mounted(bench.out, "-t", "tmpfs", "-o", "ro", "tmpfs"):
        bench.run(exit_code=2)
    assert "read-only" in bench.log().lower()
    bench.run()


@fault("output forbidden to an unprivileged user")
def forbidden(bench: Bench) -> None:
    bench.out.mkdir(parents=True, mode=0o755)
    # What it needs is loaded before it drops its rights: the environment may be closed to it.
    code = "import os, sys; from clarity.audit.lock import take_lock; os.setgid(65534); os.setuid(65534); "
    code += f"print(take_lock({str(bench.out)!r}))"
    if os.geteuid():
        pytest.skip("needs a privileged user to become an unprivileged one")
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert "Permission denied" in run.stderr, run.stderr
    bench.run()


@fault("a node that holds the only actor is killed hard (3 nodes)")
def node_killed(bench: Bench, victim: str = "actor", actors: str = "1") -> None:
    with ray_directory() as directory:
        bench.run("--actors", actors, fault="node-holding-the-actor", marker=victim, RAY_TMPDIR=directory)


@fault("another node is killed hard (3 nodes)")
def other_node_killed(bench: Bench) -> None:
    node_killed(bench, "other", "2")


@fault("a node that does not see the output directory (3 nodes)")
def blind_node(bench: Bench) -> None:
    with ray_directory() as directory:
        bench.run(fault="node-that-sees-nothing", exit_code=2, RAY_TMPDIR=directory)
        assert "does not see what this one sees there; use an s3:// URI" in bench.log()
        bench.run()


@fault("data, model and audit on an object store, driver SIGKILLed and resumed")
def all_on_object_store(bench: Bench) -> None:
    """The tables are those of the same images on a disk, and no key of the store stands in a file or a log."""
    digits = data.open_dataset("digits", split="test")
    listing = data.list_images(digits).slice(0, LIMIT)
    images = data.read_images(digits, listing, Preprocessing("L", 28, 28))
    files = list(encode_png(schema.matrix(images["image"]).reshape(-1, 1, 28, 28)))
    names = [listing["image_id"].to_pylist(), listing["label_name"].to_pylist(), ["test"] * LIMIT]
    table = pa.table([*names, files], names=["image_id", "label", "split", "image"])
    (bench.root / "data").mkdir()
    pq.write_table(table, bench.root / "data/images.parquet")
    bench.run("--dataset", "parquet", "--data", str(bench.root / "data"))
    bench.expected = bench.files()
    shutil.rmtree(bench.out)
    with ObjectStore() as store, own_ray() as options:
        copy_tree(str(bench.root / "data"), store.uri("data"))
        copy_tree(bench.model, store.uri("model"))
        flags = ["--dataset", "parquet", "--data", store.uri("data"), "--model", store.uri("model")]
        options["out"] = store.uri("audit")

        def committed() -> int:
            return sum(method == "PUT" and "/_commits/" in path for method, path in list(store.requests))

        bench.kill_when(bench.start(*flags, fault="slow-writers", **options), lambda: committed() > 1)
        assert bench.exits[-1] == -signal.SIGKILL and not storage.exists(store.uri("audit/_SUCCESS"))
        done = committed()
        bench.run(*flags, **options)
        assert SHARDS <= committed() < done + SHARDS, "what was committed is not done again"
        copy_tree(store.uri("audit"), bench.out)
        assert not leaks(bench.root, Path(options["RAY_TMPDIR"]))


@fault("two drivers at once on an object store")
def two_drivers_on_object_store(bench: Bench) -> None:
    with ObjectStore() as store, own_ray() as options:
        processes = [bench.start(fault="slow-writers", out=store.uri("audit"), **options) for _ in range(2)]
        bench.exits += sorted(process.wait(PATIENCE_S) for process in processes)
        assert bench.exits == [0, 2], bench.log()[-2000:]
        assert "is at work there" in bench.log()
        copy_tree(store.uri("audit"), bench.out)


def on_object_store(name: str, *faults: tuple[Any, ...], exits: tuple[int, ...] = (0,)) -> None:
    """The audit on an object store (moto's server, behind a proxy that breaks requests), then fetched and compared."""

    def run(bench: Bench) -> None:
        with ObjectStore() as store, own_ray() as options:
            uri = store.uri("audit")
            store.faults += [Fault(*fault) for fault in faults]
            bench.end(bench.start(out=uri, **options), exits)
            store.faults.clear()
            if bench.exits[-1]:
                bench.run(out=uri, **options)
            assert store.requests
            copy_tree(uri, bench.out)
            assert not leaks(bench.root, Path(options["RAY_TMPDIR"]))

    FAULTS[name] = run


TRAIN = ["--channels", "4", "5", "6", "--latent-dim", "5", "--hidden", "6", "7", "--num-members", "4"]
TRAIN += ["--vae-epochs", "4", "--ensemble-epochs", "12"]


def training_killed(name: str, words: str, same_vae: bool, how: signal.Signals = signal.SIGKILL) -> None:
    """End a training once its log holds ``words``, resume it with two workers instead of one."""

    def start(bench: Bench, out: Path, workers: int) -> Any:
        argv = [sys.executable, "-W", "ignore", str(ROOT / "jobs/train.py"), "--out", str(out), *TRAIN]
        env = os.environ | {"RAY_ADDRESS": bench.address, "PYTHONPATH": str(ROOT)}
        log = open(bench.root / "log", "a")  # noqa: SIM115
        argv += ["--workers", str(workers)]
        options: dict[str, Any] = {"preexec_fn": lambda: as_from_a_terminal(group=False)}
        return subprocess.Popen(argv, env=env, cwd=ROOT, stdout=log, stderr=log, **options)

    def run(bench: Bench) -> tuple[int, int, int]:
        undisturbed = bench.root.parent / "trained"
        if not (undisturbed / "model.json").exists():
            bench.end(start(bench, undisturbed, 1))
            (bench.root / "log").write_text("")
        killed = start(bench, bench.root / "model", 1)
        bench.kill_when(killed, lambda: words in bench.log(), how)
        if how == signal.SIGKILL:
            assert bench.exits[-1] == -signal.SIGKILL
        else:
            assert bench.exits[-1] == 1
            assert "interrupted; the same command resumes" in bench.log() and "Traceback" not in bench.log()
        assert not (bench.root / "model/model.json").exists()
        bench.end(start(bench, bench.root / "model", 2))
        found, expected = (json.loads((out / "model.json").read_text()) for out in (bench.root / "model", undisturbed))
        # Members are bit-equal whoever trains them, given one VAE; the judge's bits follow the number of threads.
        members = [
            {name: sums for name, sums in card["files"].items() if "judge" not in name} for card in (found, expected)
        ]
        assert not same_vae or members[0] == members[1]
        return 4, found["ensemble"]["num_members"], 0

    FAULTS[name] = run


training_killed("training SIGKILLed in the VAE, resumed by 2 workers", "vae: epoch 2", same_vae=False)
training_killed("training SIGKILLed between the stages, resumed by 2 workers", "encoded", same_vae=True)
training_killed("training SIGKILLed in the ensemble, resumed by 2 workers", "members): epoch 5", same_vae=True)
training_killed("training SIGINTed in the VAE, resumed by 2 workers", "vae: epoch 2", False, signal.SIGINT)
training_killed("training SIGTERMed in the ensemble, resumed by 2 workers", "members): epoch 5", True, signal.SIGTERM)

# Every second request: an operation of several requests would meet more in a row than it has attempts.
busy = [("503", method, "audit", 6, 0.0, 2) for method in ("PUT", "GET", "HEAD")]
on_object_store("object store, no fault")
on_object_store("object store answering 503 now and then", *busy)
on_object_store("object store slow", ("slow", "PUT", "audit", 12, 2.0), ("slow", "GET", "audit", 6, 2.0))
cuts = [("cut", "PUT", "counterfactuals", 2), ("cut", "PUT", "_commits", 2)]
on_object_store("object store cutting uploads in the middle", *cuts)
on_object_store("object store refusing uploads for a while", ("403", "PUT", "codes/", 4), exits=(0, 1))


# ---- as tests ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(ray_local: Any, tiny_digits_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A bench on the session's Ray, with the files of an undisturbed run."""
    root = tmp_path_factory.mktemp("faults") / "undisturbed"
    root.mkdir()
    found = Bench(ray_local.get_runtime_context().gcs_address, str(tiny_digits_model), root)
    found.run()
    found.expected = found.files()
    assert len(found.expected) == 2 * SHARDS
    return found


def try_fault(here: Bench, name: str) -> tuple[int, int, int]:
    """Rows expected, found, double; raises where anything is wrong."""
    with watched(here):
        counts = FAULTS[name](here)
    if counts is None:
        here.check()
        counts = (LIMIT * 9, *here.count())
    return counts


@pytest.mark.parametrize("name", FAST)
def test_job_survives(bench: Bench, name: str) -> None:
    try_fault(bench.fresh(), name)


@pytest.mark.faults
@pytest.mark.parametrize("name", [name for name in FAULTS if name not in FAST])
def test_job_survives_everything(bench: Bench, name: str) -> None:
    try_fault(bench.fresh(), name)
