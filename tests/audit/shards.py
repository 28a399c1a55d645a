"""The tables of a shard as a model might fill them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from clarity import schema
from clarity.audit.plan import Plan
from clarity.images import encode_png

IDS = ["b", "a", "d e", "ü\n", "c"]


def make_tables(plan: Plan, shard: int) -> dict[str, pa.Table]:
    """A shard's tables as a model might fill them; the image "c" could not be read."""
    span, classes, latent = plan.shards[shard], len(plan.class_names), plan.model["latent_dim"]
    ids = sorted(IDS[span["start"] : span["stop"]])
    rng = np.random.default_rng(shard)
    ok = np.array([name != "c" for name in ids])
    pictures = encode_png(rng.integers(0, 256, (len(ids), *plan.image_shape), np.uint8))
    source = np.array([sum(name.encode()) % classes for name in ids], np.int32)

    def nullable(values: Any, kind: pa.DataType) -> pa.Array:
        return pa.array(values, kind, mask=~ok)

    codes = {
        "image_id": pa.array(ids),
        "label": pa.array(source % 2),
        "label_name": pa.array(["x"] * len(ids)),
        "source": nullable(source, pa.int32()),
        "source_name": nullable([plan.class_names[k] for k in source], pa.string()),
        "probs": schema.fixed_size_list(rng.random((len(ids), classes), np.float32), ok),
        **{name: nullable(np.ones(len(ids)), pa.float32()) for name in ("predictive", "aleatoric", "epistemic")},
        "z": schema.fixed_size_list(rng.random((len(ids), latent), np.float32), ok),
        "reconstruction_l1": nullable(np.ones(len(ids)), pa.float32()),
        "status": pa.array(np.where(ok, "ok", "error")),
        "error": pa.array(["broken"] * len(ids), mask=ok),
        "x": nullable(pictures, pa.binary()),
    }
    rows = [(target, i) for target in range(classes) for i in range(len(ids)) if ok[i] and source[i] != target]
    count, of = len(rows), [i for _, i in rows]
    target = np.array([target for target, _ in rows], np.int32)
    converged = rng.random(count) < 0.8
    numbers = {field.name: pa.array(rng.random(count), pa.float32()) for field in schema.counterfactuals_schema(latent)
               if field.type == pa.float32()}  # fmt: skip
    pairs = numbers | {
        "image_id": pa.array([ids[i] for i in of]),
        "label": codes["label"].take(pa.array(of, pa.int64())),
        "source": pa.array(source[of], pa.int32()),
        "source_name": pa.array([plan.class_names[source[i]] for i in of]),
        "target": pa.array(target),
        "target_name": pa.array([plan.class_names[k] for k in target]),
        "method": pa.array([plan.method] * count),
        "status": pa.array(["ok"] * count),
        "converged": pa.array(converged),
        "steps": pa.array(np.where(converged, 7, plan.config["max_steps"]), pa.int32()),
        "confirmed": pa.nulls(count, pa.bool_()),
        "rungs": pa.array(np.zeros(count), pa.int32()),
        "target_prob_final": pa.array(np.where(converged, 0.995, 0.5), pa.float32()),
        "reencoded_class": pa.array(target),
        "judge_class": pa.array(target),
        "z_cf": schema.fixed_size_list(rng.random((count, latent), np.float32)),
        "x_cf": pa.array(encode_png(rng.integers(0, 256, (count, *plan.image_shape), np.uint8))),
    }

    def table(columns: dict[str, Any], expected: pa.Schema) -> pa.Table:
        return pa.table([columns[name] for name in expected.names], schema=expected)

    return {"codes": table(codes, plan.codes_schema()), "counterfactuals": table(pairs, plan.counterfactuals_schema())}
