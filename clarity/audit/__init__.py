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
import fcntl
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from clarity import schema, storage

#: Attempts at one shard in one run, whether they end in an exception or in the death of the process.
MAX_ATTEMPTS = 3
#: Images of a shard at most, and bytes that it writes at most.
MAX_SHARD_ROWS = 256
MAX_SHARD_BYTES = 32 << 20
GPU_SHARD = 16
#: Seconds that the search of a shard should take at most.
SHARD_SECONDS = 20.0
#: A small data set is cut into this many shards, so that it overlaps and resumes too.
MIN_SHARDS = 8
#: A claim kept as an object is renewed this often, and taken from its owner after this long without a renewal.
BEAT_S = 5.0
STALE_S = 30.0
SETTLE_S = 2.0

TABLES = ("codes", "counterfactuals", "traces")
#: What an attribute net sees in each pair; jobs/compare.py writes it beside the tables of an audit that it judges.
ATTRIBUTES_FILE = "attributes.parquet"


class AuditBusy(ValueError):
    """Another run is at work in the audit directory."""


class GivenUp(RuntimeError):
    """A shard was begun MAX_ATTEMPTS times in this run and never ended."""


# ---- the plan ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What an audit holds when it is complete; written once, never changed.

    Args:
        dataset: source, data, split, where, num_images, listing (its sha256), extra (name, type and digest of the
            columns that the listing adds to codes), left_out (reason -> count, informative).
        model: fingerprint, class_names, image_shape, latent_dim, num_folds (classifiers of folds, each for the images
            that it did not see; 0 for the ensemble alone), sums (of what else the method uses).
        method: a key of METHODS.
        config: of the search.
        targets: class indices, or None for all.
        images: png or none.
        shards: {start, stop, ids} of each: rows of the listing, and a digest of their ids.
        only: all, or misclassified: the images that get pairs.
        trace: how many of the listing's first images are traced.
        versions: of what decides the bytes.
        created: date, informative.
        schema_version: of the tables.
    """

    dataset: dict[str, Any]
    model: dict[str, Any]
    method: str
    config: dict[str, Any]
    targets: list[int] | None
    images: str
    shards: list[dict[str, Any]]
    only: str = "all"
    trace: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    schema_version: int = schema.SCHEMA_VERSION

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything that decides what the data files hold; neither the data's place nor the date."""
        return _digest(self._decisive())

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by index."""
        return list(self.model["class_names"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.model["image_shape"]
        return channels, height, width

    @property
    def num_images(self) -> int:
        """Images of the listing."""
        return int(self.dataset["num_images"])

    @property
    def pairs_per_image(self) -> int:
        """Pairs of an image at most; one less where a listed target is its source."""
        return len(self.class_names) - 1 if self.targets is None else len(self.targets)

    def codes_schema(self) -> pa.Schema:
        """Schema of ``codes``, with the file metadata by which a table explains itself."""
        extra = [pa.field(name, schema.type_of(kind)) for name, kind, *_ in self.dataset.get("extra", [])]
        table = schema.codes_schema(len(self.class_names), self.model["latent_dim"], extra)
        return table.with_metadata(self._metadata())

    def counterfactuals_schema(self) -> pa.Schema:
        """Schema of ``counterfactuals``, with the file metadata."""
        return schema.counterfactuals_schema(self.model["latent_dim"]).with_metadata(self._metadata())

    def differences(self, other: Plan) -> list[str]:
        """What another plan decides differently, one line each: empty when both fill the same files."""
        mine, theirs = _flat(self._decisive()), _flat(other._decisive())
        return [
            f"{name}: {_short(mine.get(name))} here, {_short(theirs.get(name))} in the run"
            for name in sorted({*mine, *theirs})
            if mine.get(name) != theirs.get(name)
        ]

    def to_json(self) -> dict[str, Any]:
        """What plan.json holds."""
        return {"fingerprint": self.fingerprint, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any) -> Plan:
        """The inverse of ``to_json``; ValueError when it was altered."""
        names = {f.name for f in fields(cls)}
        if not isinstance(value, dict) or not names <= set(value):
            raise ValueError(f"expected a plan with {', '.join(sorted(names))}")
        plan = cls(**{name: value[name] for name in names})
        if plan.fingerprint != value.get("fingerprint"):
            raise ValueError("its fingerprint does not belong to its content")
        return plan

    def _decisive(self) -> dict[str, Any]:
        content = {k: v for k, v in asdict(self).items() if k not in ("created", "dataset", "shards")}
        content["data"] = {k: self.dataset.get(k) for k in ("listing", "num_images", "extra")}
        content["shards"] = {"count": len(self.shards), "table": _digest(self.shards)}
        return content

    def _metadata(self) -> dict[str, str]:
        return {
            "clarity.schema_version": str(self.schema_version),
            "clarity.fingerprint": self.fingerprint,
            "clarity.class_names": json.dumps(self.class_names),
            "clarity.config": json.dumps(self.config, sort_keys=True),
            "clarity.method": self.method,
            "clarity.image_shape": ",".join(map(str, self.image_shape)),
        }


def rows_per_shard(num_images: int, bytes_per_image: float, seconds_per_image: float = 0.0, gpu: bool = False) -> int:
    """Images of a shard: at most MAX_SHARD_ROWS, MAX_SHARD_BYTES written and SHARD_SECONDS of search; at least 1.

    Small enough to overlap the stages, to resume finely and to show progress. A GPU searches thousands of pairs at once
    and gets GPU_SHARD times as much.
    """
    times = GPU_SHARD if gpu else 1
    limits = [
        times * MAX_SHARD_ROWS,
        times * MAX_SHARD_BYTES / max(bytes_per_image, 1),
        max(-(-num_images // MIN_SHARDS), 32),
    ]
    if seconds_per_image > 0:
        # A power of two: two measurements of the same machine then mostly give the same files.
        limits.append(2 ** np.floor(np.log2(SHARD_SECONDS / seconds_per_image)))
    return int(max(1, min(limits)))


def shard_table(image_ids: Sequence[str], rows: int) -> list[dict[str, Any]]:
    """Consecutive shards of ``rows`` images: {start, stop, ids}."""
    if rows < 1:
        raise ValueError(f"--shard-rows: expected at least 1, got {rows}")
    return [
        {"start": start, "stop": min(start + rows, len(image_ids)), "ids": ids_digest(image_ids[start : start + rows])}
        for start in range(0, len(image_ids), rows)
    ]


def ids_digest(image_ids: Iterable[str]) -> str:
    """Digest of a set of image ids, whatever their order."""
    return _digest(sorted(image_ids))[:16]


def shard_name(shard: int) -> str:
    """Name of a shard's files, without their ending."""
    return f"shard-{shard:05d}"


# ---- the driver's hold on a directory ------------------------------------------------------------------------------


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
        return workplace(self.uri, self.run)

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
        begun = [path.rpartition("/")[2] for path in _list(self.uri, f"_tmp/{self.run}")]
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
    lock = _lock(uri)
    try:
        run = lock.owner["run"]
        scratch = workplace(uri, run)
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


def workplace(uri: str, run: str) -> str:
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
    with contextlib.suppress(OSError):  # another run's workplace is in it
        os.rmdir(storage.join(uri, "_tmp"))


def _remove_strays(held: Claim) -> None:
    """Delete what no commit names: data files of a run that died before its commit."""
    named = {path for commit in held.commits.values() for path in commit["files"]}
    for name in TABLES:
        for path in _list(held.uri, name):
            if path not in named:
                storage.delete(storage.join(held.uri, path))
    records = {f"_commits/{shard_name(shard)}.json" for shard in held.commits}
    for path in _list(held.uri, "_commits"):
        if path not in records:
            storage.delete(storage.join(held.uri, path))


def valid_commits(uri: str, plan: Plan) -> dict[int, dict[str, Any]]:
    """Commit records by shard: of this plan, whole, and naming files that are there in their size."""
    sizes = {}
    for name in TABLES:
        for path, size in _list(uri, name).items():
            sizes[path] = size
    expected = {f"_commits/{shard_name(shard)}.json": shard for shard in range(len(plan.shards))}
    paths = [path for path in _list(uri, "_commits") if path in expected]
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


def read_plan(uri: str) -> Plan:
    """The plan of an audit directory.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    place = storage.display(uri)
    path = storage.join(uri, "plan.json")
    if not storage.exists(path):
        raise ValueError(f"expected an audit directory, found no plan.json in {place}: check the path")
    try:
        return Plan.from_json(storage.read_json(path))
    except ValueError as error:
        raise ValueError(f"{place}/plan.json is damaged ({error}): restore it, or choose another --out") from None


# ---- what a worker does --------------------------------------------------------------------------------------------


def begin_attempt(uri: str, run: str, shard: int, stage: str) -> int:
    """Record that a stage of a shard begins, before its work, so that the death of the process counts too.

    Returns:
        Which attempt of this run it is, from 1.

    Raises:
        GivenUp: it was begun MAX_ATTEMPTS times already.
    """
    if sees(uri, run):
        raise RuntimeError(
            f"{socket.gethostname()} does not see the run {run} in {storage.display(uri)}: it has ended, or this node "
            "does not mount the place"
        )
    scratch = workplace(uri, run)
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


def write_shard(
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
        scratch: the workplace of the run; once that is taken away, nothing of the shard is written any more.
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


def sees(uri: str, run: str, data: str | None = None) -> list[str]:
    """Which of --out and --data this machine does not see; asked on every node before the work."""
    places = {"--out": storage.join(workplace(uri, run), "probe"), "--data": data}
    return [flag for flag, place in places.items() if place and not storage.exists(place)]


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Audit:
    """The committed shards of an audit, lazily: ``codes``, ``counterfactuals`` and ``traces`` are Arrow data sets."""

    uri: str
    plan: Plan
    commits: dict[int, dict[str, Any]]
    codes: pads.Dataset
    counterfactuals: pads.Dataset
    traces: pads.Dataset | None

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return len(self.commits) == len(self.plan.shards)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by index."""
        return self.plan.class_names


def read_audit(uri: str | Path) -> Audit:
    """Open an audit directory, finished or not: only what its commits name is read.

    Raises:
        ValueError: it is no audit directory.
    """
    uri = str(uri)
    plan = read_plan(uri)
    commits = _known_commits(uri, plan)
    files, path = storage.filesystem(uri)

    def table(name: str, schema_: pa.Schema | None) -> pads.Dataset:
        named = [f"{path}/{f}" for _, c in sorted(commits.items()) for f in c["files"] if f.startswith(f"{name}/")]
        if not named and schema_ is not None:
            return pads.dataset(schema_.empty_table())
        return pads.dataset(named, schema=schema_, format="parquet", filesystem=files) if named else None

    return Audit(
        uri,
        plan,
        commits,
        table("codes", plan.codes_schema()),
        table("counterfactuals", plan.counterfactuals_schema()),
        table("traces", None),
    )


def _known_commits(uri: str, plan: Plan) -> dict[int, dict[str, Any]]:
    """The commits; of a finished audit from the one file that gathers them, as far as their records are there."""
    try:
        done = json.loads(storage.read_bytes(storage.join(uri, "_SUCCESS")))
        present = _list(uri, "_commits")
        if done["fingerprint"] == plan.fingerprint:
            gathered = {commit["shard"]: commit for commit in done["commits"]}
            return {s: c for s, c in gathered.items() if f"_commits/{shard_name(s)}.json" in present}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return valid_commits(uri, plan)


# ---- verification --------------------------------------------------------------------------------------------------


@dataclass
class Verification:
    """What was counted and what is wrong, one line each; ``shards`` are those that something is wrong with."""

    images: int = 0
    errors: int = 0
    pairs: int = 0
    converged: int = 0
    redecoded: int = 0
    problems: list[str] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(
    uri: str | Path,
    *,
    redecode: Callable[[np.ndarray], np.ndarray] | None = None,
    sample: int = 512,
    workers: int = 4,
) -> Verification:
    """Check an audit against its plan, shard by shard: files and their sums, schemas, images, pairs, order, contents.

    Args:
        uri: the audit directory.
        redecode: codes (B, D) to pictures (B, C, H, W) uint8; where given, a fixed sample of ``z_cf`` must come out
            within one grey level of ``x_cf``.
        sample: pairs of that sample, in all.
        workers: shards checked at once.
    """
    uri = str(uri)
    plan = read_plan(uri)
    commits = valid_commits(uri, plan)
    result = Verification()
    for shard in range(len(plan.shards)):
        if shard not in commits:
            result.problems.append(f"{shard_name(shard)}: no valid commit record")
    named = {path for commit in commits.values() for path in commit["files"]}
    if stray := [path for name in TABLES for path in _list(uri, name) if path not in named]:
        result.problems.append(f"{len(stray)} data files that no commit names, the first {stray[0]}")
    share = -(-sample // max(len(commits), 1))
    with ThreadPoolExecutor(workers) as pool:
        checks = pool.map(
            lambda item: _verify_shard(uri, plan, item[0], item[1], redecode, share), sorted(commits.items())
        )
        for check in checks:
            for name in ("images", "errors", "pairs", "converged", "redecoded"):
                setattr(result, name, getattr(result, name) + getattr(check, name))
            result.problems += check.problems
            result.shards += check.shards
    if not result.problems and result.images != plan.num_images:
        result.problems.append(f"{result.images} images, the plan has {plan.num_images}")
    return result


def _verify_shard(
    uri: str,
    plan: Plan,
    shard: int,
    commit: dict[str, Any],
    redecode: Callable[[np.ndarray], np.ndarray] | None,
    sample: int,
) -> Verification:
    result = Verification()

    def wrong(what: str) -> None:
        result.shards = [shard]
        result.problems.append(f"{shard_name(shard)}: {what}")

    tables = {}
    for path, about in commit["files"].items():
        data = storage.read_bytes(storage.join(uri, path))
        if hashlib.sha256(data).hexdigest() != about["sha256"]:
            wrong(f"{path} has another checksum than its commit")
            continue
        tables[path.partition("/")[0]] = pq.read_table(pa.BufferReader(data))
        if tables[path.partition("/")[0]].num_rows != about["rows"]:
            wrong(f"{path} has another number of rows than its commit")
    if not {"codes", "counterfactuals"} <= set(tables):
        wrong("codes and counterfactuals are not both there")
        return result
    codes, pairs = tables["codes"], tables["counterfactuals"]
    for name, table, expected in (
        ("codes", codes, plan.codes_schema()),
        ("counterfactuals", pairs, plan.counterfactuals_schema()),
    ):
        if not table.schema.equals(expected):
            wrong(f"{name} has another schema than the plan")
            return result
        metadata = table.schema.metadata or {}
        if any(metadata.get(key) != value for key, value in (expected.metadata or {}).items()):
            wrong(f"{name} has other file metadata than the plan")
    result.images, result.pairs = codes.num_rows, pairs.num_rows

    ids = codes["image_id"].to_pylist()
    if ids_digest(ids) != plan.shards[shard]["ids"] or sorted(set(ids)) != ids:
        wrong("codes does not hold the shard's images, each once and in order")
    failed = pc.not_equal(codes["status"], "ok")
    result.errors = pc.sum(failed).as_py() or 0
    read = codes.filter(pc.invert(failed))
    bad = codes.filter(failed)
    value_columns = [n for n in schema.CODES_DOC if n not in ("image_id", "label", "label_name", "status", "error")]
    if any(bad[name].null_count != len(bad) for name in value_columns) or bad["error"].null_count:
        wrong("codes has an error row with values, or without its reason")
    if any(read[name].null_count for name in value_columns if name != "x") or read["error"].null_count != len(read):
        wrong("codes has a row without its values")
    pictures = 0 if plan.images == "png" else 1
    if read["x"].null_count != pictures * len(read) or pairs["x_cf"].null_count != pictures * len(pairs):
        wrong("pictures are missing, or there against the plan")

    asked = read
    if plan.only == "misclassified":
        asked = read.filter(pc.fill_null(pc.not_equal(read["source"], read["label"]), False))
    # Each pair as one number that grows in the table's order: its target, then its image's place among those asked for.
    place = pc.index_in(pairs["image_id"], value_set=asked["image_id"].combine_chunks())
    place = place.fill_null(len(asked)).to_numpy().astype(np.int64)
    width = len(asked) + 1
    found = pairs["target"].to_numpy() * width + place
    source, label = (asked[name].fill_null(-1).to_numpy() for name in ("source", "label"))
    targets = sorted(range(len(plan.class_names)) if plan.targets is None else plan.targets)
    wanted = np.concatenate([target * width + np.flatnonzero(source != target) for target in targets])
    if not np.array_equal(found, wanted):
        double = len(found) - len(np.unique(found))
        missing, strange = (len(np.setdiff1d(*sets)) for sets in ((wanted, found), (found, wanted)))
        wrong(f"pairs: {missing} missing, {double} double, {strange} not asked for, or out of order")
    elif (source[place] != pairs["source"].to_numpy()).any():
        wrong("counterfactuals has another source than codes")
    elif (label[place] != pairs["label"].fill_null(-1).to_numpy()).any():
        wrong("counterfactuals has another label than codes")

    converged = pairs["converged"].to_numpy()
    result.converged = int(converged.sum())
    finite = pc.equal(pairs["status"], "ok").to_numpy()
    final = pairs["target_prob_final"].to_numpy()
    if (converged != (final > np.float32(plan.config["min_target_prob"]))).any():
        wrong("converged disagrees with target_prob_final")
    steps = pairs["steps"].to_numpy()
    if len(steps) and (steps.min() < 0 or steps.max() > plan.config["max_steps"]):
        wrong("steps out of range")
    if (finite & ~converged & (steps != plan.config["max_steps"])).any():
        wrong("a search ended early without converging")
    if redecode is not None and plan.images == "png" and len(pairs):
        # Evenly over the shard: the same rows each time.
        rows = np.unique(np.linspace(0, len(pairs) - 1, min(sample, len(pairs))).astype(int))
        rows = rows[finite[rows]]
        if len(rows):
            chosen = pairs.take(rows)
            shown = schema.from_png(chosen["x_cf"], plan.image_shape).astype(int)
            worst = np.abs(redecode(schema.matrix(chosen["z_cf"])).astype(int) - shown).max()
            result.redecoded = len(rows)
            if worst > 1:
                wrong(f"z_cf decodes to pictures that differ by {worst} grey levels from x_cf")
    return result


def drop_commits(uri: str, shards: Iterable[int]) -> None:
    """Take shards back, so that the next run does them again; the audit is no longer marked complete."""
    shards = list(shards)
    if shards:
        storage.delete(storage.join(uri, "_SUCCESS"))
    for shard in shards:
        storage.delete(storage.join(uri, "_commits", f"{shard_name(shard)}.json"))


def summarise(audit: Audit) -> dict[str, Any]:
    """Figures of an audit from its tables, read in one pass: counts, errors by reason, steps, slowest class pairs."""
    classes, most = len(audit.class_names), int(audit.plan.config["max_steps"])
    histogram: np.ndarray = np.zeros((classes * classes, most + 1), np.int64)
    counts: Counter[str] = Counter()
    columns = ["source", "target", "steps", "status", "converged", "reencoded_class"]
    for batch in audit.counterfactuals.to_batches(columns=columns):
        source, target, steps = (batch[name].to_numpy(zero_copy_only=False) for name in columns[:3])
        np.add.at(histogram, (source * classes + target, steps), 1)
        counts["pairs"] += len(batch)
        counts["converged"] += pc.sum(batch["converged"]).as_py() or 0
        counts["nonfinite"] += pc.sum(pc.not_equal(batch["status"], "ok")).as_py() or 0
        counts["reencoded"] += pc.sum(pc.equal(batch["reencoded_class"], batch["target"])).as_py() or 0
    reasons: Counter[str] = Counter()
    unknown = 0
    columns = ["status", "error", "label", "label_name", "source", "prediction"]
    predicted = "prediction" in audit.codes.schema.names
    for batch in audit.codes.to_batches(columns=columns if predicted else columns[:4]):
        counts["images"] += len(batch)
        reasons.update(reason for reason in batch["error"].to_pylist() if reason is not None)
        unknown += pc.sum(pc.and_(pc.is_null(batch["label"]), pc.is_valid(batch["label_name"]))).as_py() or 0
        if predicted:
            same = pc.equal(batch["prediction"], batch["source"])  # null where either is
            counts["predicted"] += len(same) - same.null_count
            counts["as_predicted"] += pc.sum(same).as_py() or 0
    seen = np.flatnonzero(histogram.sum(1))
    slowest = sorted(seen, key=lambda pair: -_mean_steps(histogram[pair]))[:5]
    total = histogram.sum(0)
    return {
        "images": counts["images"],
        "errors": dict(reasons.most_common(20)),
        "unread": sum(reasons.values()),
        "unknown_labels": unknown,
        "left_out": audit.plan.dataset.get("left_out", {}),
        "predictions": {"images": counts["predicted"], "agree": counts["as_predicted"]} if predicted else None,
        "pairs": counts["pairs"],
        "converged": counts["converged"],
        "nonfinite": counts["nonfinite"],
        "reencoded_as_target": counts["reencoded"],
        "median_steps": int(np.searchsorted(total.cumsum(), total.sum() / 2)) if counts["pairs"] else None,
        "mean_steps": round(_mean_steps(total), 2) if counts["pairs"] else None,
        "slowest_class_pairs": [
            {
                "source": audit.class_names[pair // classes],
                "target": audit.class_names[pair % classes],
                "pairs": int(histogram[pair].sum()),
                "mean_steps": round(_mean_steps(histogram[pair]), 1),
            }
            for pair in slowest
        ],
        "engines": dict(Counter(commit["engine"] for commit in audit.commits.values() if commit.get("engine"))),
        "seconds_by_stage": _seconds(audit.commits.values()),
    }


def describe(summary: Mapping[str, Any]) -> str:
    """A summary, for people."""

    def share(count: int) -> str:
        total = max(summary["pairs"], 1)
        percent = 100 * count / total
        return f"{count} ({percent if count == total else min(percent, 99.99):.2f} %)"  # all only where it is all

    slow = ", ".join(
        f"{pair['source']}->{pair['target']} {pair['mean_steps']:.0f}" for pair in summary["slowest_class_pairs"]
    )
    engines = ", ".join(f"{engine} ({count} shards)" for engine, count in summary["engines"].items())
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in summary["seconds_by_stage"].items())
    predictions = []
    if given := summary.get("predictions"):
        agree = 100 * given["agree"] / max(given["images"], 1)
        predictions = [f"predicted  {given['images']}; the ensemble sees the same in {given['agree']} ({agree:.2f} %)"]
    lines = [
        f"images     {summary['images']}, {summary['unread']} unreadable, {summary['unknown_labels']} of unknown label",
        *(f"           {count} x {reason}" for reason, count in summary["errors"].items()),
        *(f"left out   {count} {reason}" for reason, count in summary.get("left_out", {}).items()),
        *predictions,
        f"pairs      {summary['pairs']}, {summary['nonfinite']} not finite",
        f"converged  {share(summary['converged'])}",
        f"re-encoded {share(summary['reencoded_as_target'])} as the target",
        f"steps      median {summary['median_steps']}, mean {summary['mean_steps']}; most: {slow}",
        f"speed      {summary['pairs_per_second']} pairs/s over {summary['seconds']} s",
        f"stages     {stages} (seconds, summed over the processes)",
        f"engine     {engines or 'none'}",
        f"verified   sums, keys, order, contents; {summary['redecoded']} pairs decoded again",
        *(f"PROBLEM    {problem}" for problem in summary["problems"]),
    ]
    return "\n".join(lines)


def describe_plan(plan: Plan, uri: str, measured: Mapping[str, Any], num_actors: int) -> str:
    """What a run would do, for people, from what ``explain.probe`` measured."""
    seconds = plan.num_images * measured["seconds_per_image"] / num_actors
    size = plan.num_images * measured["bytes_per_image"]
    lines = [
        f"images     {plan.num_images}",
        f"pairs      {plan.num_images * plan.pairs_per_image} at most",
        f"shards     {len(plan.shards)} of {plan.shards[0]['stop']} images",
        f"files      {len(plan.shards) * (3 + bool(plan.trace))}, {size / 1e6:.1f} MB in all",
        f"time       {seconds:.0f} s, at {measured['pairs_per_second']:.0f} pairs/s an actor ({measured['engine']})",
        f"audit      {storage.display(uri)}",
    ]
    return "\n".join(lines)


def _mean_steps(histogram: np.ndarray) -> float:
    return float((histogram * np.arange(len(histogram))).sum() / histogram.sum())


def _seconds(commits: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    seconds: Counter[str] = Counter()
    for commit in commits:
        seconds.update(commit.get("seconds", {}))
    return {stage: round(value, 3) for stage, value in seconds.items()}


# ---- claims --------------------------------------------------------------------------------------------------------


def _owner() -> dict[str, Any]:
    return {
        "run": secrets.token_hex(6),
        "host": socket.gethostname(),
        "machine": _text("/proc/sys/kernel/random/boot_id"),
        "processes": os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else "",
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "beat": 0,
    }


def _is_dead(owner: Mapping[str, Any]) -> bool:
    """Whether the owner was a process of this very machine that is gone; its number may have another bearer now."""
    mine = _owner()
    here = all(mine[name] and mine[name] == owner.get(name) for name in ("host", "machine", "processes"))
    return bool(here and _started(owner["pid"]) != owner["started"])


def _started(pid: int) -> str:
    """When a process started, as its system counts; empty when it is gone."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _parsed(text: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        owner = json.loads(text)
        if isinstance(owner, dict) and "run" in owner:
            return owner
    return {}


def _busy(uri: str, owner: Mapping[str, Any]) -> AuditBusy:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
    return AuditBusy(
        f"--out {storage.display(uri)}: another run ({who}) is at work there; wait for its end, or stop it, or choose "
        "another --out"
    )


class _FileLock:
    """A lock that the kernel drops when its holder dies, however it dies."""

    def __init__(self, uri: str) -> None:
        self.path = os.path.join(uri, "_lock")
        while True:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                text = os.pread(self.file, 4096, 0)
                os.close(self.file)
                raise _busy(uri, _parsed(text)) from None
            except OSError:
                os.close(self.file)
                raise
            try:
                # Its holder may have removed it between our opening and our locking.
                if os.fstat(self.file).st_ino == os.stat(self.path).st_ino:
                    break
            except FileNotFoundError:
                pass
            os.close(self.file)
        self.owner = _owner()
        os.ftruncate(self.file, 0)
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.pwrite(self.file, json.dumps(self.owner).encode(), 0)

    @property
    def lost(self) -> bool:
        """Whether another run holds the path, because somebody removed the file under this one."""
        try:
            return not os.path.samestat(os.fstat(self.file), os.stat(self.path))
        except OSError:
            return False

    def release(self) -> None:
        if not self.lost:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        os.close(self.file)


class _BeatLock:
    """A claim that its holder renews, where no lock of the kernel reaches: the object stores.

    Time is counted by whoever waits, in renewals not seen, so that clocks may disagree or go back. Two runs that both
    believe to hold it still write the same bytes under the same names.
    """

    def __init__(self, uri: str) -> None:
        self.uri, self.path, self.owner, self.lost = uri, storage.join(uri, "_lock"), _owner(), False
        seen = self._read()
        end = time.monotonic() + STALE_S
        while seen and not _is_dead(seen) and time.monotonic() < end:
            time.sleep(min(BEAT_S / 2, 1.0))
            now = self._read()
            if now and now != seen:
                raise _busy(uri, now)
            seen = now
        self._write()
        time.sleep(SETTLE_S)  # another that began at the same moment has written by then: the last one holds it
        if (now := self._read()) and now["run"] != self.owner["run"]:
            raise _busy(uri, now)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def _beat(self) -> None:
        while not self.stopped.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a store that fails for a while: the next beat tells
                now = self._read()
                if now and now["run"] != self.owner["run"]:
                    self.lost = True
                    return
                self.owner["beat"] += 1
                self._write()

    def _read(self) -> dict[str, Any]:
        try:
            return _parsed(storage.read_bytes(self.path)) if storage.exists(self.path) else {}
        except storage.StorageError as error:
            if error.errno == errno.ENOENT:  # released between the two questions
                return {}
            raise

    def _write(self) -> None:
        storage.write_bytes(self.path, json.dumps(self.owner).encode())

    def release(self) -> None:
        self.stopped.set()
        self.thread.join()
        if not self.lost:
            storage.delete(self.path)


def _lock(uri: str) -> _FileLock | _BeatLock:
    if storage.is_remote(uri):
        return _BeatLock(uri)
    try:
        return _FileLock(uri)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise storage.StorageError(
                f"cannot write {storage.display(uri)}: {os.strerror(error.errno or 0)}: choose another --out",
                code=error.errno,
            ) from None
        return _BeatLock(uri)


# ---- small things --------------------------------------------------------------------------------------------------


def _list(uri: str, name: str) -> dict[str, int]:
    """Files below a directory of the audit with their sizes, by path from the audit; none where it is missing."""
    place = storage.join(uri, name)
    if not storage.exists(place):
        return {}
    return {f"{name}/{file.path}": file.size for file in storage.list_files(place)}


def _top(uri: str) -> list[str]:
    if not storage.is_remote(uri):
        return os.listdir(uri) if os.path.isdir(uri) else []
    return sorted({file.path.partition("/")[0] for file in storage.list_files(uri)}) if storage.exists(uri) else []


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, part in value.items() for k, v in _flat(part, f"{name}.{key}" if name else key).items()}
    return {name: value}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
