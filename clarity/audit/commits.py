"""Claim an audit directory for one run, and commit its shards: files first, the commit record last."""

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
from clarity.audit.lock import AuditBusy, FileLock, Lease, take_lock
from clarity.audit.plan import Plan, read_plan, shard_name

#: Attempts at a stage of a shard in one run, whether they end in an exception or in the death of the process.
MAX_ATTEMPTS = 3
TABLES = ("codes", "counterfactuals", "traces")


class GivenUp(RuntimeError):
    """A stage of a shard was begun MAX_ATTEMPTS times in this run and never ended."""


@dataclass
class Claim:
    """The driver's exclusive claim on an audit directory: its plan, and the commit records by shard."""

    uri: str
    plan: Plan
    commits: dict[int, dict[str, Any]]
    lock: FileLock | Lease
    engine: str | None = None

    @property
    def run(self) -> str:
        """Name of this run."""
        return self.lock.run

    @property
    def scratch(self) -> str:
        """Where this run writes its temporary files."""
        return scratch_directory(self.uri, self.run)

    @property
    def complete(self) -> bool:
        """Whether the audit was finished and none of its shards is missing."""
        last = (storage.join(self.uri, name) for name in ("_SUCCESS", "summary.json"))
        return not self.pending and all(storage.exists(path) for path in last)

    @property
    def pending(self) -> list[int]:
        """Shards without a commit."""
        return [shard for shard in range(len(self.plan.shards)) if shard not in self.commits]

    def refresh(self) -> None:
        """Read the commits again."""
        self.commits = valid_commits(self.uri, self.plan)

    def check(self) -> None:
        """Raise AuditBusy if another run took the directory over, and may have ended, while this one was silent."""
        # A run deletes the scratch directories of those before it; an object store has none.
        if self.lock.lost or not (storage.is_remote(self.uri) or storage.exists(self.scratch)):
            raise AuditBusy(f"out: {storage.display(self.uri)} was taken over by another run; this one stops")

    def keep_one_engine(self) -> str | None:
        """Drop the commits of every engine but the one that searched most shards, which is returned."""
        engines = Counter(commit["engine"] for commit in self.commits.values() if commit.get("engine"))
        self.engine = engines.most_common(1)[0][0] if engines else None
        other = [shard for shard, commit in self.commits.items() if commit.get("engine") not in (None, self.engine)]
        drop_commits(self.uri, other)
        self.commits = {shard: commit for shard, commit in self.commits.items() if shard not in other}
        return self.engine

    def require_same_engine(self, shard: int, engine: str | None) -> None:
        """Drop a shard's commit and raise ValueError if another engine searched the shards before it."""
        self.engine = self.engine or engine
        if engine and engine != self.engine:
            drop_commits(self.uri, [shard])
            raise ValueError(
                f"engine: expected {self.engine}, which searched the shards before, got {engine}: their rows agree "
                f"within a tolerance only; ask for {self.engine}"
            )

    def record_failure(self, shard: int, stage: str, error: str) -> None:
        """Write why a shard is missing to ``_failures``."""
        begun = [path.rpartition("/")[2] for path in files_below(self.uri, f"_tmp/{self.run}")]
        tried = Counter(name.rpartition("-")[0] for name in begun if name.startswith(f"{shard_name(shard)}-"))
        value = {"shard": shard, "stage": stage, "error": error, "attempts": max(tried.values(), default=0)}
        storage.write_json(storage.join(self.uri, "_failures", f"{shard_name(shard)}.json"), value)

    def finish(self, summary: Mapping[str, Any], verified: bool, damaged: Iterable[int] = ()) -> None:
        """Write the summary; take damaged shards back, or mark a verified audit complete and delete failure records."""
        self.check()
        storage.write_json(storage.join(self.uri, "summary.json"), summary, scratch=self.scratch)
        drop_commits(self.uri, damaged)
        if self.pending or not verified:
            return
        storage.delete_tree(storage.join(self.uri, "_failures"))
        done = {"fingerprint": self.plan.fingerprint, "images": self.plan.num_images}
        storage.write_json(storage.join(self.uri, "_SUCCESS"), done, scratch=self.scratch)

    def summary(self) -> dict[str, Any]:
        """The summary that the completing run wrote."""
        return dict(storage.read_json(storage.join(self.uri, "summary.json")))


@contextlib.contextmanager
def claim(uri: str, plan: Plan, model_uri: str) -> Iterator[Claim]:
    """Hold an audit directory for one run: create it or resume it, and clean up what dead runs left.

    Raises AuditBusy where another run is at work, ValueError where it holds something else, naming what differs.
    """
    require_audit_or_empty(uri)
    storage.make_dir(uri)
    lock = take_lock(uri)
    try:
        # Earlier runs must be unable to write before the commits are read, and whether the directory can be written
        # must be known before anything expensive starts.
        remove_scratch(uri, "_tmp")
        scratch = scratch_directory(uri, lock.run)
        storage.make_dir(scratch)
        for name in ("_commits", *(TABLES if plan.trace else TABLES[:2])):
            storage.make_dir(storage.join(uri, name))
        storage.write_bytes(storage.join(scratch, "probe"), lock.run.encode(), scratch=scratch)
        plan = read_or_write_plan(uri, plan, model_uri, scratch)
        held = Claim(uri, plan, valid_commits(uri, plan), lock)
        if held.pending:
            for name in ("_SUCCESS", "report.html"):  # what tells of an audit that was complete
                storage.delete(storage.join(uri, name))
        # Files that no valid commit names: a run died between writing and committing them.
        named = {path for commit in held.commits.values() for path in commit["files"]}
        named |= {commit_path(shard) for shard in held.commits}
        for directory in (*TABLES, "_commits"):
            for path in files_below(uri, directory).keys() - named:
                storage.delete(storage.join(uri, path))
        yield held
    finally:
        with contextlib.suppress(OSError):  # where that fails, the next run removes it
            if storage.exists(storage.join(uri, "plan.json")):
                remove_scratch(uri, f"_tmp/{lock.run}")
        lock.release()


def require_audit_or_empty(uri: str) -> None:
    """Raise ValueError if something other than an audit lies at ``uri``."""
    path = storage.display(uri)
    if storage.exists(storage.join(uri, "plan.json")) or not storage.exists(uri):
        return
    if not storage.is_dir(uri):
        raise ValueError(f"out: expected a directory, found a file at {path}: choose another directory")
    if storage.is_remote(uri):
        present = {file.path.partition("/")[0] for file in storage.list_files(uri)}
    else:
        present = set(os.listdir(uri))
    if present and not present & {"_lock", "_tmp", "_dead"}:
        some = ", ".join(sorted(present)[:3])
        raise ValueError(
            f"out: expected an empty directory or an audit, found {some} in {path}: choose another directory"
        )


def read_or_write_plan(uri: str, plan: Plan, model_uri: str, scratch: str) -> Plan:
    """The plan that the directory has; where it has none, copy the model there and write ``plan``."""
    if storage.exists(storage.join(uri, "plan.json")):
        kept = read_plan(uri)
        if differences := kept.differences(plan):
            raise ValueError(
                f"out: {storage.display(uri)} holds an audit of another plan: {'; '.join(differences)}. "
                "Ask for the same again, or choose another directory"
            )
        return kept
    storage.delete_tree(storage.join(uri, "model"))
    for file in storage.list_files(model_uri):
        if "/" not in file.path:  # an audit may lie below its model
            content = storage.read_bytes(storage.join(model_uri, file.path))
            storage.write_bytes(storage.join(uri, "model", file.path), content)
    storage.write_json(storage.join(uri, "plan.json"), plan.to_json(), scratch=scratch)
    return plan


def scratch_directory(uri: str, run: str) -> str:
    """Where a run keeps its attempts and its temporary files."""
    return storage.join(uri, "_tmp", run)


def remove_scratch(uri: str, name: str) -> None:
    """Rename, then delete, scratch directories, so that surviving workers of an earlier run cannot publish."""
    scratch = storage.join(uri, name)
    if storage.is_remote(uri):
        storage.delete_tree(scratch)
        return
    dead = storage.join(uri, "_dead")
    storage.delete_tree(dead)
    if os.path.exists(scratch):
        storage.attempt("write", uri, lambda: os.rename(scratch, dead))
    storage.delete_tree(dead)
    with contextlib.suppress(OSError):  # another run's scratch directory is in it
        os.rmdir(storage.join(uri, "_tmp"))


def valid_commits(uri: str, plan: Plan) -> dict[int, dict[str, Any]]:
    """Commit records by shard: whole, of this plan, and naming files that are there in their size."""
    sizes = {path: size for name in TABLES for path, size in files_below(uri, name).items()}
    expected = {commit_path(shard): shard for shard in range(len(plan.shards))}
    paths = [path for path in files_below(uri, "_commits") if path in expected]
    found = {}
    with ThreadPoolExecutor(16) as pool:
        for path, commit in zip(paths, pool.map(lambda path: read_commit(uri, path), paths)):
            if (
                commit is not None
                and commit.get("fingerprint") == plan.fingerprint
                and commit.get("shard") == expected[path]
                and {f"{name}/{shard_name(expected[path])}.parquet" for name in TABLES[:2]} <= set(commit["files"])
                and all(sizes.get(name) == about["size"] for name, about in commit["files"].items())
            ):
                found[expected[path]] = commit
    return found


def read_commit(uri: str, path: str) -> dict[str, Any] | None:
    """A commit record; None where it is torn or missing."""
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


def is_committed(uri: str, fingerprint: str, shard: int) -> bool:
    """Whether a shard of this plan has its commit record."""
    commit = read_commit(uri, commit_path(shard))
    return commit is not None and commit["fingerprint"] == fingerprint


def begin_attempt(uri: str, run: str, shard: int, stage: str) -> int:
    """Record the attempt, from 1, before the work, so that the death of the process counts; GivenUp after the last."""
    host = socket.gethostname()
    if unreachable_paths(uri, run):
        raise RuntimeError(
            f"{host} does not see the run {run} in {storage.display(uri)}: it has ended, or this node does not mount it"
        )
    scratch = scratch_directory(uri, run)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        record = storage.join(scratch, f"{shard_name(shard)}-{stage}-{attempt}")
        if not storage.exists(record):
            storage.write_bytes(record, host.encode(), scratch=scratch)
            return attempt
    raise GivenUp(f"its process died, or its work was lost, in each of {MAX_ATTEMPTS} attempts at stage {stage}")


def unreachable_paths(uri: str, run: str, data: str | None = None) -> list[str]:
    """Which of ``out`` and ``data`` cannot be seen from this machine."""
    paths = {"out": storage.join(scratch_directory(uri, run), "probe"), "data": data}
    return [name for name, path in paths.items() if path and not storage.exists(path)]


def commit_shard(
    uri: str,
    plan: Plan,
    shard: int,
    tables: Mapping[str, pa.Table],
    about: Mapping[str, Any],
    scratch: str | None = None,
) -> None:
    """Write a shard's data files, then the commit record that makes them count, unless the run's scratch is gone."""
    files = {}
    for name, table in tables.items():
        data = to_parquet(table)
        path = f"{name}/{shard_name(shard)}.parquet"
        storage.write_bytes(storage.join(uri, path), data, scratch=scratch)
        files[path] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "rows": table.num_rows}
    commit = {"fingerprint": plan.fingerprint, "shard": shard, "files": files, **about}
    storage.write_json(storage.join(uri, commit_path(shard)), commit, scratch=scratch)


def drop_commits(uri: str, shards: Iterable[int]) -> None:
    """Delete the commits of shards, so that the next run does them again; the audit is no longer complete."""
    shards = list(shards)
    if shards:
        storage.delete(storage.join(uri, "_SUCCESS"))
    for shard in shards:
        storage.delete(storage.join(uri, commit_path(shard)))


def to_parquet(table: pa.Table) -> bytes:
    """A table as a Parquet file: zstd, row groups that a query by target can skip, the same bytes for the same rows."""
    sink = pa.BufferOutputStream()
    text = [field.name for field in table.schema if pa.types.is_string(field.type) and field.name != "image_id"]
    pq.write_table(table, sink, compression="zstd", use_dictionary=text, row_group_size=1024, store_schema=True)
    return sink.getvalue().to_pybytes()


def commit_path(shard: int) -> str:
    """Where a shard's commit record lies in the audit."""
    return f"_commits/{shard_name(shard)}.json"


def files_below(uri: str, name: str) -> dict[str, int]:
    """Sizes of the files below a directory of the audit, by path from the audit; none where it is missing."""
    directory = storage.join(uri, name)
    if not storage.exists(directory):
        return {}
    return {f"{name}/{file.path}": file.size for file in storage.list_files(directory)}
