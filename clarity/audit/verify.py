"""Check an audit against its plan, shard by shard."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clarity import schema, storage
from clarity.audit.commits import TABLES, files_below, valid_commits
from clarity.audit.plan import Plan, ids_digest, read_plan, shard_name
from clarity.images import decode_png


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
    if stray := [path for name in TABLES for path in files_below(uri, name) if path not in named]:
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
            shown = decode_png(chosen["x_cf"], plan.image_shape).astype(int)
            worst = np.abs(redecode(schema.matrix(chosen["z_cf"])).astype(int) - shown).max()
            result.redecoded = len(rows)
            if worst > 1:
                wrong(f"z_cf decodes to pictures that differ by {worst} grey levels from x_cf")
    return result
