"""Check an audit against its plan, shard by shard."""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clarity import images, schema, storage
from clarity.audit.commits import TABLES, files_below, valid_commits
from clarity.audit.plan import Plan, ids_digest, read_plan, shard_name

#: Pairs that are decoded again.
SAMPLE = 512
#: Shards that are checked at once, and held in memory.
MAX_THREADS = 8
#: Codes (B, D) to images (B, C, H, W) uint8.
Decoder = Callable[[np.ndarray], np.ndarray]


@dataclass
class Verification:
    """What was counted, and what is wrong, one line each; ``shards`` are those that something is wrong with."""

    committed: int = 0
    planned: int = 0
    images: int = 0
    errors: int = 0
    pairs: int = 0
    converged: int = 0
    redecoded: int = 0
    problems: list[str] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong and nothing is missing."""
        return not self.problems and self.committed == self.planned


@dataclass(frozen=True)
class Shard:
    """The two tables of a shard, and what they should hold."""

    plan: Plan
    number: int
    codes: pa.Table
    pairs: pa.Table


def verify(uri: str | Path, *, redecode: Decoder | None = None) -> Verification:
    """Check every shard's files and checksums, schemas, images, pairs, order and contents.

    With ``redecode``, SAMPLE pairs in all must decode from ``z_cf`` to within one grey level of ``x_cf``.
    """
    uri = str(uri)
    plan = read_plan(uri)
    commits = valid_commits(uri, plan)
    result = Verification(len(commits), len(plan.shards))
    # Files of a shard without a commit are those of a run that was cut, or is under way: the next one replaces them.
    missing = [shard_name(shard) for shard in range(len(plan.shards)) if shard not in commits]
    named = {path for commit in commits.values() for path in commit["files"]}
    named |= {f"{name}/{shard}.parquet" for name in TABLES for shard in missing}
    if stray := [path for name in TABLES for path in files_below(uri, name) if path not in named]:
        result.problems.append(f"{len(stray)} data files that no commit names, the first {stray[0]}")
    share = -(-SAMPLE // max(len(commits), 1))
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS)) as pool:
        shards = pool.map(
            lambda shard: verify_shard(uri, plan, shard, commits[shard], redecode, share), sorted(commits)
        )
        for found in shards:
            for name in ("images", "errors", "pairs", "converged", "redecoded", "problems", "shards"):
                setattr(result, name, getattr(result, name) + getattr(found, name))
    if result.ok and result.images != plan.num_images:
        result.problems.append(f"{result.images} images, the plan has {plan.num_images}")
    return result


def verify_shard(
    uri: str, plan: Plan, number: int, commit: dict[str, Any], redecode: Decoder | None, sample: int
) -> Verification:
    """Check one committed shard."""
    result, problems, tables = Verification(), list[str](), dict[str, pa.Table]()
    for path, about in commit["files"].items():
        data = storage.read_bytes(storage.join(uri, path))
        if hashlib.sha256(data).hexdigest() != about["sha256"]:
            problems.append(f"{path} has another checksum than its commit")
            continue
        table = tables[path.partition("/")[0]] = pq.read_table(pa.BufferReader(data))
        if table.num_rows != about["rows"]:
            problems.append(f"{path} has another number of rows than its commit")
    if {"codes", "counterfactuals"} <= set(tables):  # a valid commit names both: one may have another checksum
        shard = Shard(plan, number, tables["codes"], tables["counterfactuals"])
        other = list(check_schemas(shard))
        problems += other
        if not other:
            for check in (check_codes, check_pairs, check_search):
                problems += check(shard)
            result.images, result.pairs = shard.codes.num_rows, shard.pairs.num_rows
            result.errors = pc.sum(pc.not_equal(shard.codes["status"], "ok")).as_py() or 0
            result.converged = pc.sum(shard.pairs["converged"]).as_py() or 0
            if redecode is not None and plan.images == "png" and shard.pairs.num_rows:
                result.redecoded, worst = redecode_sample(shard, redecode, sample)
                if worst > 1:
                    problems.append(f"z_cf decodes to pictures that differ by {worst} grey levels from x_cf")
    result.problems = [f"{shard_name(number)}: {problem}" for problem in problems]
    result.shards = [number] if problems else []
    return result


def check_schemas(shard: Shard) -> Iterator[str]:
    """Columns, types and file metadata are those of the plan."""
    for name, table, expected in (
        ("codes", shard.codes, shard.plan.codes_schema()),
        ("counterfactuals", shard.pairs, shard.plan.counterfactuals_schema()),
    ):
        metadata = table.schema.metadata or {}
        if not table.schema.equals(expected):
            yield f"{name} has another schema than the plan"
        elif any(metadata.get(key) != value for key, value in (expected.metadata or {}).items()):
            yield f"{name} has other file metadata than the plan"


def check_codes(shard: Shard) -> Iterator[str]:
    """Each image once and in order; values in every row that was read, a reason in every other; pictures as planned."""
    ids = shard.codes["image_id"].to_pylist()
    if ids_digest(ids) != shard.plan.shards[shard.number]["ids"] or sorted(set(ids)) != ids:
        yield "codes does not hold the shard's images, each once and in order"
    failed = pc.not_equal(shard.codes["status"], "ok")
    bad, read = shard.codes.filter(failed), shard.codes.filter(pc.invert(failed))
    values = [name for name in schema.CODES if name not in ("image_id", "label", "label_name", "status", "error")]
    if any(bad[name].null_count != len(bad) for name in values) or bad["error"].null_count:
        yield "codes has an error row with values, or without its reason"
    if any(read[name].null_count for name in values if name != "x") or read["error"].null_count != len(read):
        yield "codes has a row without its values"
    missing = 0 if shard.plan.images == "png" else 1
    if any(column.null_count != missing * len(column) for column in (read["x"], shard.pairs["x_cf"])):
        yield "pictures are missing, or there against the plan"


def check_pairs(shard: Shard) -> Iterator[str]:
    """Every pair that the plan asks for is there once, by target and then by image, with its source and label."""
    plan, pairs = shard.plan, shard.pairs
    asked = shard.codes.filter(pc.equal(shard.codes["status"], "ok"))
    if plan.only == "misclassified":
        asked = asked.filter(pc.fill_null(pc.not_equal(asked["source"], asked["label"]), False))
    index = pc.index_in(pairs["image_id"], value_set=asked["image_id"].combine_chunks())
    index = index.fill_null(len(asked)).to_numpy().astype(np.int64)
    width = len(asked) + 1
    found = pairs["target"].to_numpy() * width + index
    source, label = (asked[name].fill_null(-1).to_numpy() for name in ("source", "label"))
    targets = sorted(range(len(plan.class_names)) if plan.targets is None else plan.targets)
    wanted = np.concatenate([target * width + np.flatnonzero(source != target) for target in targets])
    if not np.array_equal(found, wanted):
        double = len(found) - len(np.unique(found))
        missing, strange = len(np.setdiff1d(wanted, found)), len(np.setdiff1d(found, wanted))
        yield f"pairs: {missing} missing, {double} double, {strange} not asked for, or out of order"
    elif (source[index] != pairs["source"].to_numpy()).any():
        yield "counterfactuals has another source than codes"
    elif (label[index] != pairs["label"].fill_null(-1).to_numpy()).any():
        yield "counterfactuals has another label than codes"


def check_search(shard: Shard) -> Iterator[str]:
    """Convergence, the final probability, the number of steps and the checks agree."""
    plan, config, pairs = shard.plan, shard.plan.config, shard.pairs
    converged, final, steps = (pairs[name].to_numpy() for name in ("converged", "target_prob_final", "steps"))
    if (converged != (final > plan.min_target_prob(pairs["target"].to_numpy()))).any():
        yield "converged disagrees with target_prob_final"
    if ((steps < 0) | (steps > config["max_steps"])).any():
        yield "steps out of range"
    finite = pc.equal(pairs["status"], "ok").to_numpy()
    if (finite & ~converged & (steps != config["max_steps"])).any():
        yield "a search ended early without converging"
    rungs = pairs["rungs"].to_numpy()
    if not plan.requires_checks:
        if rungs.any() or pairs["confirmed"].null_count < len(pairs):
            yield "pairs are confirmed, or on further rungs, though no check was asked for"
        return
    if pairs["confirmed"].null_count or ((rungs < 0) | (rungs > 3)).any():
        yield "confirmed or rungs are missing or out of range"
    confirmed = pairs["confirmed"].fill_null(False).to_numpy()
    asked = [kind for kind in ("reencoded", "judge") if f"min_{kind}_prob" in plan.checks]
    passed = np.ones(len(pairs), bool)
    for kind in asked:
        passed &= pairs[f"{kind}_target_prob"].to_numpy() >= np.float32(plan.checks[f"min_{kind}_prob"])
    # With a predictor, too, a pair must pass, but passing is not enough.
    if asked and ((confirmed & ~passed).any() or ("predictor" not in plan.checks and (confirmed != passed).any())):
        yield f"confirmed disagrees with {' and '.join(f'{kind}_target_prob' for kind in asked)}"


def redecode_sample(shard: Shard, redecode: Decoder, sample: int) -> tuple[int, int]:
    """Decode pairs spread evenly over the shard again: how many, and by how many grey levels they differ at most."""
    pairs = shard.pairs
    rows = np.unique(np.linspace(0, len(pairs) - 1, min(sample, len(pairs))).astype(int))
    chosen = pairs.take(rows)
    chosen = chosen.filter(pc.equal(chosen["status"], "ok"))
    if not len(chosen):
        return 0, 0
    expected = images.decode_png(chosen["x_cf"], shard.plan.image_shape).astype(int)
    return len(chosen), np.abs(redecode(schema.matrix(chosen["z_cf"])).astype(int) - expected).max()
