"""The tables of the shards of a plan of five images with odd names, of which the last could not be read."""

import functools

import audits
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clarity.audit.plan import Plan

IDS = ["b", "a", "d e", "ü\n", "c"]


@functools.cache
def whole() -> audits.Tables:
    """All shards in one; every search converged in 7 steps, and the judge sees every target."""
    tables = audits.make_tables(len(IDS), planted=audits.Planted(unreadable=1))
    names = dict(zip(tables.codes["image_id"].to_pylist(), IDS))
    for table in ("codes", "counterfactuals"):
        ids = [names[image_id] for image_id in getattr(tables, table)["image_id"].to_pylist()]
        audits.replaced(tables, table, "image_id", pa.array(ids))
    pairs = tables.counterfactuals
    for column, values in (
        ("steps", np.full(len(pairs), 7)),
        ("judge_class", pairs["target"].to_numpy()),
        ("judge_target_prob", np.full(len(pairs), 0.9)),
    ):
        audits.replaced(tables, "counterfactuals", column, values)
    return tables


def make_tables(plan: Plan, shard: int) -> dict[str, pa.Table]:
    """A shard's tables, in the order of the plan."""
    span = plan.shards[shard]
    ids = pa.array(IDS[span["start"] : span["stop"]])
    tables = (whole().codes, whole().counterfactuals)
    codes, pairs = (table.filter(pc.is_in(table["image_id"], ids)) for table in tables)
    pairs = pairs.sort_by([("target", "ascending"), ("image_id", "ascending")])
    return {
        "codes": codes.sort_by("image_id").cast(plan.codes_schema()),
        "counterfactuals": pairs.cast(plan.counterfactuals_schema()),
    }
