"""An audit directory: planned once, filled shard by shard, committed, resumed, verified, read.

    plan.json                              what is asked, and the table of shards
    codes/shard-00000.parquet              one row for each image
    counterfactuals/shard-00000.parquet    one row for each (image, target)
    traces/shard-00000.parquet             one row for each (image, target, step), where asked for
    model/                                 a copy of the model directory
    summary.json, _SUCCESS                 written last, when every shard is there
    _commits/shard-00000.json              the files of a shard with sums, sizes and rows: a shard exists once this does
    _failures/shard-00000.json             why a shard is missing
    _tmp/RUN/, _lock                       the workplace of the run under way: its attempts, its temporary files

A data file takes its name only when it is whole, and its shard's commit record follows it, so a reader trusts what the
commits name. Files are named by their shard and hold the same bytes whoever writes them: doing a shard twice is doing
it once. Every file of a run comes out of its workplace by a rename, and a run begins by taking away the workplaces of
those before it, so that a worker that outlives its driver can put nothing there any more. (An object store knows no
rename: there a worker looks for its workplace before it writes, and what is under way lands with the same bytes.)
Knows files, plans, claims, counts. Does not know how a row is computed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clarity import storage
from clarity.audit.lock import AuditBusy, take_lock
from clarity.audit.plan import Plan, read_plan, shard_name

#: Attempts at one shard in one run, whether they end in an exception or in the death of the process.
MAX_ATTEMPTS = 3
TABLES = ("codes", "counterfactuals", "traces")


class GivenUp(RuntimeError):
    """A shard was begun MAX_ATTEMPTS times in this run and never ended."""


@dataclass
class Claim:
    """The driver's hold on an audit directory: its plan, and what is committed already."""

    uri: str
    plan: Plan
    run: str
    commits: dict[int, dict[str, Any]]
    lock: Any = None
    engine: str | None = None

    @property
    def complete(self) -> bool:
        """Whether the audit was finished and nothing of it is missing."""
        last = (storage.join(self.uri, name) for name in ("_SUCCESS", "summary.json"))
        return not self.pending and all(storage.exists(path) for path in last)

    @property
    def pending(self) -> list[int]:
        """Shards without a commit."""
        return [shard for shard in range(len(self.plan.shards)) if shard not in self.commits]

    @property
    def scratch(self) -> str:
        """Where this run writes its temporary files."""
        return scratch_directory(self.uri, self.run)

    def refresh(self) -> None:
        """Read the commits again."""
        self.commits = valid_commits(self.uri, self.plan)

    def finish(self, summary: Mapping[str, Any], verified: bool) -> None:
        """Write the summary; of a verified audit, remove the traces of the work and mark it complete."""
        self.check()
        storage.write_json(storage.join(self.uri, "summary.json"), summary, scratch=self.scratch)
        if self.pending or not verified:
            return
        storage.delete_tree(storage.join(self.uri, "_failures"))
        done = {
            "fingerprint": self.plan.fingerprint,
            "images": self.plan.num_images,
            "commits": [self.commits[shard] for shard in sorted(self.commits)],
        }
        storage.write_json(storage.join(self.uri, "_SUCCESS"), done, scratch=self.scratch)

    def record_failure(self, shard: int, stage: str, error: str) -> None:
        """Say why a shard is missing: ``_failures/shard-00000.json``."""
        begun = [path.rpartition("/")[2] for path in files_below(self.uri, f"_tmp/{self.run}")]
        tried = Counter(name.rpartition("-")[0] for name in begun if name.startswith(f"{shard_name(shard)}-"))
        value = {"shard": shard, "stage": stage, "error": error, "attempts": max(tried.values(), default=0)}
        storage.write_json(storage.join(self.uri, "_failures", f"{shard_name(shard)}.json"), value)

    def summary(self) -> dict[str, Any]:
        """What the run that completed the audit had to say."""
        return dict(storage.read_json(storage.join(self.uri, "summary.json")))

    def one_engine(self) -> None:
        """Take back the shards of all engines but the one that searched most of them."""
        engines = Counter(commit["engine"] for commit in self.commits.values() if commit.get("engine"))
        self.engine = engines.most_common(1)[0][0] if engines else None
        other = [shard for shard, commit in self.commits.items() if commit.get("engine") not in (None, self.engine)]
        drop_commits(self.uri, other)
        self.commits = {shard: commit for shard, commit in self.commits.items() if shard not in other}

    def same_engine(self, shard: int, engine: str | None) -> None:
        """Raise ValueError, and take the shard back, if it was searched by another engine than the shards before."""
        self.engine = self.engine or engine
        if engine and engine != self.engine:
            drop_commits(self.uri, [shard])
            raise ValueError(
                f"a shard was searched by the engine {engine}, those before by {self.engine}: their rows agree within "
                f"a tolerance only. Give --engine {self.engine}, or accept it by --mixed-engines"
            )

    def check(self) -> None:
        """Raise AuditBusy if another run took the directory over while this one was silent."""
        if self.lock is not None and self.lock.lost:
            raise AuditBusy(f"{storage.display(self.uri)} was taken over by another run; this one stops")


@contextlib.contextmanager
def claim(uri: str, plan: Plan, model_uri: str) -> Iterator[Claim]:
    """Hold an audit directory for one run: make it, or resume it; clean up what a dead run left.

    Raises:
        ValueError: the directory holds something else, or an audit of another plan: names what differs.
        AuditBusy: another run is at work in it.
        OSError: it cannot be written.
    """
    place = storage.display(uri)
    if not storage.is_remote(uri) and os.path.lexists(uri) and not os.path.isdir(uri):
        raise ValueError(f"--out {place}: expected a directory, found a file; choose another --out")
    present = set() if storage.exists(storage.join(uri, "plan.json")) else set(_top(uri))
    if present and not present & {"_lock", "_tmp", "_dead"}:
        raise ValueError(
            f"--out {place}: expected an empty directory or an audit, found {', '.join(sorted(present)[:3])}; "
            "choose another --out"
        )
    storage.make_dir(uri)
    lock = take_lock(uri)
    try:
        run = lock.owner["run"]
        scratch = scratch_directory(uri, run)
        # What runs before this one wrote is settled before the commits are read.
        _retire(uri, "_tmp")
        # Whether the place can be written is known before anything expensive starts.
        for name in (f"_tmp/{run}", "codes", "counterfactuals", *(["traces"] if plan.trace else []), "_commits"):
            storage.make_dir(storage.join(uri, name))
        storage.write_bytes(storage.join(scratch, "probe"), run.encode(), scratch=scratch)
        if storage.exists(storage.join(uri, "plan.json")):
            kept = read_plan(uri)
            if differences := kept.differences(plan):
                raise ValueError(
                    f"--out {place} holds an audit of another plan: {'; '.join(differences)}. "
                    "Repeat its flags, or choose another --out"
                )
            plan = kept
        else:
            storage.delete_tree(storage.join(uri, "model"))
            for file in storage.list_files(model_uri):
                if "/" not in file.path:  # an audit may lie below its model
                    content = storage.read_bytes(storage.join(model_uri, file.path))
                    storage.write_bytes(storage.join(uri, "model", file.path), content)
            storage.write_json(storage.join(uri, "plan.json"), plan.to_json(), scratch=scratch)
        held = Claim(uri, plan, run, valid_commits(uri, plan), lock)
        if held.pending:
            storage.delete(storage.join(uri, "_SUCCESS"))
        _remove_strays(held)
        yield held
    finally:
        with contextlib.suppress(OSError):  # a place that fails keeps it for the next run to take away
            if storage.exists(storage.join(uri, "plan.json")):
                _retire(uri, f"_tmp/{lock.owner['run']}")
        lock.release()


def scratch_directory(uri: str, run: str) -> str:
    """Where a run keeps its attempts and its temporary files."""
    return storage.join(uri, "_tmp", run)


def _retire(uri: str, name: str) -> None:
    """Take workplaces away, whoever still writes there: their name goes first, in one step, and no worker finds it."""
    place = storage.join(uri, name)
    if storage.is_remote(uri):
        storage.delete_tree(place)
        return
    dead = storage.join(uri, "_dead")
    storage.delete_tree(dead)
    if os.path.exists(place):
        storage.attempt("write", uri, lambda: os.rename(place, dead))
    storage.delete_tree(dead)
    with contextlib.suppress(OSError):  # another run's scratch directory is in it
        os.rmdir(storage.join(uri, "_tmp"))


def _remove_strays(held: Claim) -> None:
    """Delete what no commit names: data files of a run that died before its commit."""
    named = {path for commit in held.commits.values() for path in commit["files"]}
    for name in TABLES:
        for path in files_below(held.uri, name):
            if path not in named:
                storage.delete(storage.join(held.uri, path))
    records = {f"_commits/{shard_name(shard)}.json" for shard in held.commits}
    for path in files_below(held.uri, "_commits"):
        if path not in records:
            storage.delete(storage.join(held.uri, path))


def valid_commits(uri: str, plan: Plan) -> dict[int, dict[str, Any]]:
    """Commit records by shard: of this plan, whole, and naming files that are there in their size."""
    sizes = {}
    for name in TABLES:
        for path, size in files_below(uri, name).items():
            sizes[path] = size
    expected = {f"_commits/{shard_name(shard)}.json": shard for shard in range(len(plan.shards))}
    paths = [path for path in files_below(uri, "_commits") if path in expected]
    found = {}
    with ThreadPoolExecutor(16) as pool:
        for path, commit in zip(paths, pool.map(lambda path: _read_commit(uri, path), paths)):
            if (
                commit is not None
                and commit.get("fingerprint") == plan.fingerprint
                and commit.get("shard") == expected[path]
                and {f"{name}/{shard_name(expected[path])}.parquet" for name in TABLES[:2]} <= set(commit["files"])
                and all(sizes.get(name) == about["size"] for name, about in commit["files"].items())
            ):
                found[expected[path]] = commit
    return found


def _read_commit(uri: str, path: str) -> dict[str, Any] | None:
    """A commit record; None when it is torn or gone."""
    try:
        commit = json.loads(storage.read_bytes(storage.join(uri, path)))
        assert {"fingerprint", "shard", "files"} <= set(commit)
        assert all({"sha256", "size", "rows"} <= set(about) for about in commit["files"].values())
    except (ValueError, AssertionError, TypeError, AttributeError):
        return None
    except storage.StorageError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return dict(commit)


def begin_attempt(uri: str, run: str, shard: int, stage: str) -> int:
    """Record that a stage of a shard begins, before its work, so that the death of the process counts too.

    Returns:
        Which attempt of this run it is, from 1.

    Raises:
        GivenUp: it was begun MAX_ATTEMPTS times already.
    """
    if unreachable_paths(uri, run):
        raise RuntimeError(
            f"{socket.gethostname()} does not see the run {run} in {storage.display(uri)}: it has ended, or this node "
            "does not mount the place"
        )
    scratch = scratch_directory(uri, run)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        record = storage.join(scratch, f"{shard_name(shard)}-{stage}-{attempt}")
        if not storage.exists(record):
            storage.write_bytes(record, socket.gethostname().encode(), scratch=scratch)
            return attempt
    raise GivenUp(f"its process died, or its work was lost, in each of {MAX_ATTEMPTS} attempts at stage {stage}")


def is_committed(uri: str, fingerprint: str, shard: int) -> bool:
    """Whether a shard of this plan has its commit record; asked before work that another attempt may have done."""
    commit = _read_commit(uri, f"_commits/{shard_name(shard)}.json")
    return commit is not None and commit["fingerprint"] == fingerprint


def commit_shard(
    uri: str,
    plan: Plan,
    shard: int,
    tables: Mapping[str, pa.Table],
    about: Mapping[str, Any],
    scratch: str | None = None,
) -> None:
    """Write a shard's data files, each whole or not at all, then the commit record that makes them count.

    Args:
        uri: the audit directory.
        plan: its plan.
        shard: which shard.
        tables: by name, of TABLES.
        about: what the commit adds: engine, device, threads, seconds by stage.
        scratch: the scratch directory of the run; once it is gone, nothing more of the shard is written.
    """
    files = {}
    for name, table in tables.items():
        data = to_parquet(table)
        path = f"{name}/{shard_name(shard)}.parquet"
        storage.write_bytes(storage.join(uri, path), data, scratch=scratch)
        files[path] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "rows": table.num_rows}
    commit = {"fingerprint": plan.fingerprint, "shard": shard, "files": files, **about}
    storage.write_json(storage.join(uri, "_commits", f"{shard_name(shard)}.json"), commit, scratch=scratch)


def to_parquet(table: pa.Table) -> bytes:
    """A table as a Parquet file: zstd, row groups that a query by target can skip, the same bytes for the same rows."""
    sink = pa.BufferOutputStream()
    text = [field.name for field in table.schema if pa.types.is_string(field.type) and field.name != "image_id"]
    pq.write_table(table, sink, compression="zstd", use_dictionary=text, row_group_size=1024, store_schema=True)
    return sink.getvalue().to_pybytes()


def unreachable_paths(uri: str, run: str, data: str | None = None) -> list[str]:
    """Which of ``out`` and ``data`` cannot be seen from this machine; asked on every node before the work starts."""
    paths = {"out": storage.join(scratch_directory(uri, run), "probe"), "data": data}
    return [name for name, path in paths.items() if path and not storage.exists(path)]


def drop_commits(uri: str, shards: Iterable[int]) -> None:
    """Take shards back, so that the next run does them again; the audit is no longer marked complete."""
    shards = list(shards)
    if shards:
        storage.delete(storage.join(uri, "_SUCCESS"))
    for shard in shards:
        storage.delete(storage.join(uri, "_commits", f"{shard_name(shard)}.json"))


def files_below(uri: str, name: str) -> dict[str, int]:
    """Files below a directory of the audit with their sizes, by path from the audit; none where it is missing."""
    place = storage.join(uri, name)
    if not storage.exists(place):
        return {}
    return {f"{name}/{file.path}": file.size for file in storage.list_files(place)}


def _top(uri: str) -> list[str]:
    if not storage.is_remote(uri):
        return os.listdir(uri) if os.path.isdir(uri) else []
    return sorted({file.path.partition("/")[0] for file in storage.list_files(uri)}) if storage.exists(uri) else []
