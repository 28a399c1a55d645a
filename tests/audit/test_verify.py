"""What verification finds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from shards import make_tables

from clarity import schema
from clarity.audit.commits import commit_shard, drop_commits
from clarity.audit.plan import Plan
from clarity.audit.read import read_audit
from clarity.audit.verify import Shard, check_search, verify
from clarity.images import decode_png


def test_verify_counts(filled: str) -> None:
    found = verify(filled)
    assert found.ok, found.problems
    assert (found.images, found.errors, found.pairs) == (5, 1, 12)


def put(table: pa.Table, name: str, row: int, value: Any) -> pa.Table:
    column = table[name].to_pylist()
    column[row] = value
    index = table.column_names.index(name)
    return table.set_column(index, table.schema.field(name), pa.array(column, table.schema.field(name).type))


def swap(table: pa.Table) -> pa.Table:
    return table.take(pa.array([1, 0, *range(2, len(table))]))


DAMAGE: dict[str, tuple[str, Callable[[pa.Table], pa.Table], str]] = {
    "pair missing": ("counterfactuals", lambda t: t.slice(1), "1 missing, 0 double"),
    "pair double": ("counterfactuals", lambda t: pa.concat_tables([t.slice(0, 1), t]), "0 missing, 1 double"),
    "pairs out of order": ("counterfactuals", swap, "out of order"),
    "target is the source": ("counterfactuals", lambda t: put(t, "target", 0, t["source"][0].as_py()), "1 missing"),
    "another image": ("counterfactuals", lambda t: put(t, "image_id", 0, "zz"), "1 not asked for"),
    "another source": ("codes", lambda t: put(t, "source", 0, (t["source"][0].as_py() + 1) % 4), "missing"),
    "another label": ("counterfactuals", lambda t: put(t, "label", 0, 3), "another label"),
    "image missing": ("codes", lambda t: t.slice(1), "does not hold the shard's images"),
    "images out of order": ("codes", swap, "does not hold the shard's images"),
    "converged flipped": (
        "counterfactuals",
        lambda t: put(t, "converged", 0, not t["converged"][0].as_py()),
        "converged disagrees",
    ),
    "steps out of range": ("counterfactuals", lambda t: put(t, "steps", 0, 21), "steps out of range"),
    "picture missing": ("counterfactuals", lambda t: put(t, "x_cf", 0, None), "pictures are missing"),
    "value missing": ("codes", lambda t: put(t, "epistemic", 0, None), "without its values"),
    "error with values": ("codes", lambda t: put(put(t, "status", 0, "error"), "error", 0, "?"), "with values"),
    "column dropped": ("counterfactuals", lambda t: t.drop_columns(["steps"]), "another schema"),
    "metadata of another run": (
        "codes",
        lambda t: t.replace_schema_metadata({b"clarity.fingerprint": b"other"}),
        "other file metadata",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_verify_finds(plan: Plan, filled: str, kind: str) -> None:
    name, damage, problem = DAMAGE[kind]
    tables = make_tables(plan, 0)
    tables[name] = damage(tables[name])
    commit_shard(filled, plan, 0, tables, {})  # sums and sizes agree: only the content is wrong
    found = verify(filled)
    assert not found.ok
    assert any(problem in line and line.startswith("shard-00000") for line in found.problems), found.problems


def test_verify_finds_a_changed_byte(filled: str) -> None:
    path = Path(filled, "codes/shard-00001.parquet")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    found = verify(filled)
    assert "another checksum" in found.problems[0]
    assert found.shards == [1]
    drop_commits(filled, found.shards)
    found = verify(filled)
    assert not found.ok and not found.problems and (found.committed, found.planned) == (2, 3)


def test_verify_decodes_a_sample_again(plan: Plan, filled: str) -> None:
    pictures = read_audit(filled).counterfactuals.to_table(columns=["z_cf", "x_cf"])
    codes, shown = schema.matrix(pictures["z_cf"]), decode_png(pictures["x_cf"], plan.image_shape)

    def redecode(z: np.ndarray, off: int = 0) -> np.ndarray:
        rows = [int(np.flatnonzero((codes == row).all(1))[0]) for row in z]
        return np.clip(shown[rows].astype(int) + off, 0, 255).astype(np.uint8)

    found = verify(filled, redecode=redecode)
    assert found.ok
    assert found.redecoded == 12
    assert verify(filled, redecode=lambda z: redecode(z, 1)).ok
    assert "differ by 2 grey levels" in verify(filled, redecode=lambda z: redecode(z, 2)).problems[0]


@pytest.mark.parametrize(
    ("checks", "confirmed", "rungs", "problem"),
    [
        ({}, None, 0, None),
        ({}, True, 0, "though no check was asked for"),
        ({}, None, 1, "though no check was asked for"),
        ({"min_reencoded_prob": 0.0}, True, 3, None),
        ({"min_reencoded_prob": 0.0}, None, 0, "confirmed or rungs are missing"),
        ({"min_reencoded_prob": 0.0}, True, 4, "out of range"),
        ({"min_reencoded_prob": 0.0}, False, 0, "confirmed disagrees with reencoded_target_prob"),
        ({"min_reencoded_prob": 0.0, "predictor": "digest"}, False, 0, None),
        ({"min_reencoded_prob": 0.9999999}, True, 0, "confirmed disagrees with reencoded_target_prob"),
        ({"min_judge_prob": 0.0}, True, 3, None),
        ({"min_judge_prob": 0.9999999}, True, 0, "confirmed disagrees with judge_target_prob"),
        ({"min_target_probs": [0.999] * 4}, None, 0, "converged disagrees with target_prob_final"),
    ],
)
def test_verify_checks_what_was_confirmed(
    plan: Plan, checks: dict[str, Any], confirmed: bool | None, rungs: int, problem: str | None
) -> None:
    asked = replace(plan, checks=checks)
    pairs = make_tables(plan, 0)["counterfactuals"]
    for name, value in (("confirmed", confirmed), ("rungs", rungs)):
        index, kind = pairs.column_names.index(name), pairs.schema.field(name)
        pairs = pairs.set_column(index, kind, pa.array([value] * len(pairs), kind.type))
    found = list(check_search(Shard(asked, 0, pairs, pairs)))
    assert found == [] if problem is None else problem in " ".join(found)
