"""Audits made by a formula: the tables of an audit with facts planted in them, without training or searching anything.

A class is a blob of its own in the picture; its images jitter around it. A counterfactual is the picture with the blob
moved; its distance and steps follow from a K x K table of how hard each class pair is, into which facts are planted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from clarity import schema
from clarity.images import encode_png


@dataclass
class Planted:
    """What ``make_tables`` is to plant; nothing by default."""

    hard: tuple[int, int] | None = None  # (source, target): four times as far, and every fifth pair fails
    asymmetry: tuple[int, int] | None = None  # (source, target): three times as far as back
    wrong_labels: int = 0
    edge: int = 0
    rising: int | None = None  # a target whose counterfactuals end with much epistemic uncertainty
    lost: int | None = None  # a target whose counterfactuals do not survive re-encoding
    patch: int | None = None  # a class whose images carry a bright corner
    tint: int | None = None  # a class whose images are tinted
    unreadable: int = 0
    nonfinite: int = 0
    prediction_errors: int | None = None  # images on which the predictions handed in disagree; None: no such column


@dataclass
class Tables:
    codes: pa.Table
    counterfactuals: pa.Table
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    wrong_labels: list[str] = field(default_factory=list)
    edge: list[str] = field(default_factory=list)
    before: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (P, C, H, W) reconstruction of each pair
    after: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def config(self) -> dict[str, Any]:
        return {"min_target_prob": 0.99, "max_steps": 500}


def png(pictures: np.ndarray) -> list[bytes]:
    """Pictures (B, C, H, W) in [0, 1] as PNG."""
    return encode_png(np.round(pictures * 255).astype(np.uint8))


def make_tables(
    num_images: int = 120,
    class_names: tuple[str, ...] = ("ant", "bee", "cow", "dog"),
    image_shape: tuple[int, int, int] = (1, 8, 12),
    latent_dim: int = 5,
    planted: Planted | None = None,
    images: str = "png",
    seed: int = 0,
) -> Tables:
    planted = planted or Planted()
    rng = np.random.default_rng(seed)
    num_classes, (channels, height, width) = len(class_names), image_shape
    image_ids = [f"img-{i:05d}" for i in range(num_images)]
    source = np.arange(num_images) % num_classes

    # Pictures: one blob a class, jittered; a patch or a tint on one class.
    centres = np.stack([rng.uniform(2, height - 2, num_classes), rng.uniform(3, width - 3, num_classes)], 1)
    colours = rng.uniform(0.5, 1.0, (num_classes, channels))
    rows, columns = np.mgrid[:height, :width]

    def picture(seen: np.ndarray, jitter: np.ndarray, contrast: np.ndarray) -> np.ndarray:
        centre = centres[seen] + jitter
        bump = np.exp(-((rows - centre[:, 0, None, None]) ** 2 + (columns - centre[:, 1, None, None]) ** 2) / 4)
        x = 0.1 + 0.6 * contrast[:, None, None, None] * bump[:, None] * colours[seen][:, :, None, None]
        if planted.tint is not None:
            x = x + (seen == planted.tint)[:, None, None, None] * np.linspace(0.25, 0.1, channels)[:, None, None]
        if planted.patch is not None:
            x[seen == planted.patch, :, :2, :2] = 0.95
        return np.clip(x, 0, 1).astype(np.float32)

    # Small pictures of many classes: the class must not fix the place of every pixel, or each would be a shortcut.
    jitter = rng.normal(0, 1.5, (num_images, 2))
    contrast = rng.uniform(0.4, 1.0, num_images)
    x = np.clip(picture(source, jitter, contrast) + rng.normal(0, 0.02, (num_images, *image_shape)), 0, 1)
    x_bytes = png(x)

    certain = rng.uniform(0.9, 0.999, num_images)
    probs = np.full((num_images, num_classes), 0.0)
    probs += ((1 - certain) / (num_classes - 1))[:, None]
    probs[np.arange(num_images), source] = certain
    label = source.copy()
    wrong = list(range(3, 3 + planted.wrong_labels))
    label[wrong] = (label[wrong] + 1) % num_classes
    aleatoric = -(probs * np.log(probs)).sum(1) * 0.8
    epistemic = rng.uniform(0.01, 0.05, num_images)
    unreadable = np.zeros(num_images, bool)
    unreadable[num_images - planted.unreadable :] = planted.unreadable > 0
    z = rng.normal(0, 1, (num_images, latent_dim)).astype(np.float32)

    def nulled(values: Any, kind: pa.DataType) -> pa.Array:
        return pa.array([None if bad else value for value, bad in zip(values, unreadable)], kind)

    names = np.array(class_names)
    codes_schema = schema.codes_schema(num_classes, latent_dim)
    columns_of = {
        "image_id": pa.array(image_ids),
        "label": nulled(label.tolist(), pa.int32()),
        "label_name": pa.array(names[label].tolist()),
        "source": nulled(source.tolist(), pa.int32()),
        "source_name": nulled(names[source].tolist(), pa.string()),
        "probs": nulled(probs.astype(np.float32).tolist(), pa.list_(pa.float32(), num_classes)),
        "predictive": nulled((aleatoric + epistemic).tolist(), pa.float32()),
        "aleatoric": nulled(aleatoric.tolist(), pa.float32()),
        "epistemic": nulled(epistemic.tolist(), pa.float32()),
        "z": nulled(z.tolist(), pa.list_(pa.float32(), latent_dim)),
        "reconstruction_l1": nulled(rng.uniform(1, 3, num_images).tolist(), pa.float32()),
        "status": pa.array(["error" if bad else "ok" for bad in unreadable]),
        "error": pa.array(["truncated PNG" if bad else None for bad in unreadable], pa.string()),
        "x": nulled(x_bytes if images == "png" else [None] * num_images, pa.binary()),
    }
    codes = pa.table({name: columns_of[name].cast(codes_schema.field(name).type) for name in columns_of})
    if planted.prediction_errors is not None:
        prediction = source.copy()
        prediction[: planted.prediction_errors] = (prediction[: planted.prediction_errors] + 1) % num_classes
        codes = codes.append_column("prediction", nulled(prediction.tolist(), pa.int32()))
        codes = codes.append_column("prediction_name", nulled(names[prediction].tolist(), pa.string()))
        codes = codes.append_column(
            "prediction_probs", nulled(np.eye(num_classes)[prediction].tolist(), pa.list_(pa.float32(), num_classes))
        )

    # Pairs: a symmetric table of how hard each class pair is, with facts written over it.
    hardness = rng.uniform(8, 12, (num_classes, num_classes))
    hardness = (hardness + hardness.T) / 2
    if planted.asymmetry:
        hardness[planted.asymmetry] *= 3
    if planted.hard:
        hardness[planted.hard] = 40
        hardness[planted.hard[::-1]] = 38
    image, target = np.nonzero((source[:, None] != np.arange(num_classes)) & ~unreadable[:, None])
    order = np.lexsort((image, target))
    image, target = image[order], target[order]
    start = source[image]
    num_pairs = len(image)
    spread = rng.uniform(0.8, 1.2, num_pairs)
    on_edge = list(range(20, 20 + planted.edge))
    spread[np.isin(image, on_edge)] *= 0.1
    distance = hardness[start, target] * spread
    steps = np.maximum(1, (distance * 5).astype(int))
    converged = np.ones(num_pairs, bool)
    if planted.hard:
        converged[((start == planted.hard[0]) & (target == planted.hard[1])).nonzero()[0][::5]] = False
    status = np.full(num_pairs, "ok", dtype=object)
    status[: planted.nonfinite] = "nonfinite"
    converged[: planted.nonfinite] = False
    steps[~converged] = 500
    final = rng.uniform(0.991, 0.999, num_pairs)
    final[~converged] = 0.4
    epistemic_final = rng.uniform(0.005, 0.03, num_pairs)
    if planted.rising is not None:
        epistemic_final[target == planted.rising] += 0.3
    reencoded = target.copy()
    if planted.lost is not None:
        away = target == planted.lost
        reencoded[away] = start[away]
    before = picture(start, jitter[image], contrast[image])
    after = picture(target, jitter[image] + rng.normal(0, 1.5, (num_pairs, 2)), rng.uniform(0.4, 1.0, num_pairs))
    cf_schema = schema.counterfactuals_schema(latent_dim)
    values: dict[str, Any] = {
        "image_id": [image_ids[i] for i in image],
        "label": label[image].tolist(),
        "source": start.tolist(),
        "source_name": names[start].tolist(),
        "target": target.tolist(),
        "target_name": names[target].tolist(),
        "method": ["clarity"] * num_pairs,
        "status": status.tolist(),
        "converged": converged.tolist(),
        "steps": steps.tolist(),
        "confirmed": [None] * num_pairs,
        "rungs": [0] * num_pairs,
        "target_prob_initial": probs[image, target],
        "target_prob_final": final,
        "predictive_initial": (aleatoric + epistemic)[image],
        "aleatoric_initial": aleatoric[image],
        "epistemic_initial": epistemic[image],
        "predictive_final": epistemic_final + 0.02,
        "aleatoric_final": np.full(num_pairs, 0.02),
        "epistemic_final": epistemic_final,
        "distance_z_l1": distance,
        "distance_z_l2": distance / np.sqrt(latent_dim),
        "distance_x_l1": np.abs(after - before).sum((1, 2, 3)),
        "reencoded_class": reencoded.tolist(),
        "reencoded_target_prob": np.where(reencoded == target, 0.98, 0.02),
        "judge_class": [None] * len(target),
        "judge_target_prob": [None] * len(target),
        "prediction_target_prob_initial": [None] * num_pairs,
        "prediction_target_prob_reconstruction": [None] * num_pairs,
        "prediction_target_prob_final": [None] * num_pairs,
        "z_cf": (z[image] + rng.normal(0, 1, (num_pairs, latent_dim))).astype(np.float32).tolist(),
        "x_cf": png(after) if images == "png" else [None] * num_pairs,
    }
    counterfactuals = pa.table(
        {name: pa.array(values[name], cf_schema.field(name).type, from_pandas=True) for name in cf_schema.names}
    )
    return Tables(
        codes,
        counterfactuals,
        class_names,
        image_shape,
        wrong_labels=[image_ids[i] for i in wrong],
        edge=[image_ids[i] for i in on_edge],
        before=before,
        after=after,
    )


def replaced(tables: Tables, table: str, column: str, values: pa.Array) -> Tables:
    """The tables with one column replaced."""
    old = getattr(tables, table)
    setattr(tables, table, old.set_column(old.column_names.index(column), column, values))
    return tables


def with_predictor(tables: Tables, unlike: int = 9) -> Tables:
    """The tables of an audit of a predictor, with which the ensemble disagrees on the first ``unlike`` images.

    Of the pairs, in order: 12 are not confirmed, 24 further ones are not seen as the target by the held-out judge; the
    reconstructions of the first four images are seen as a target.
    """
    codes, pairs = tables.codes, tables.counterfactuals
    source = codes["source"].to_numpy()
    seen = np.where(np.arange(len(source)) < unlike, (source + 1) % 4, source)
    probs = (0.97 * np.eye(4) + 0.01)[seen].astype(np.float32)
    tables = replaced(tables, "codes", "probs", pa.array(probs.tolist(), codes["probs"].type))
    for name in ("source", "source_name"):
        tables.codes = tables.codes.append_column(name.replace("source", "prediction"), codes[name])
    target, number = pairs["target"].to_numpy(), np.arange(len(pairs))
    images = np.array([int(name[4:]) for name in pairs["image_id"].to_pylist()])
    for name, values in {
        "confirmed": number >= 12,
        "judge_class": np.where((number >= 12) & (number < 36), pairs["source"].to_numpy(), target),
        "prediction_target_prob_initial": np.full(len(pairs), 0.01),
        "prediction_target_prob_reconstruction": np.where(images < 4, 0.8, 0.01),
        "prediction_target_prob_final": np.where(number >= 12, 0.9, 0.2),
    }.items():
        tables = replaced(tables, "counterfactuals", name, pa.array(values).cast(pairs[name].type))
    return tables


def write_audit(
    uri: Any,
    tables: Tables,
    model: Any = None,
    num_shards: int = 3,
    leave_out: tuple[int, ...] = (),
    traces: pa.Table | None = None,
    left_out: dict[str, int] | None = None,
    **plan_fields: Any,
) -> str:
    """An audit directory of such tables, as explain_all writes it; shards in ``leave_out`` stay uncommitted."""
    from pathlib import Path

    from clarity import storage
    from clarity.audit.commits import commit_shard
    from clarity.audit.plan import Plan, shard_table

    uri = str(uri)
    ids = tables.codes["image_id"].to_pylist()
    known = schema.codes_schema(2, 2).names
    extra = [(name, str(tables.codes[name].type)) for name in tables.codes.column_names if name not in known]
    latent_dim = tables.codes["z"].type.list_size
    dataset = {"source": "synthetic", "data": None, "split": "test", "num_images": len(ids), "extra": extra}
    plan = Plan(
        dataset=dataset | {"left_out": left_out or {}},
        model={
            "fingerprint": "none",
            "class_names": list(tables.class_names),
            "image_shape": list(tables.image_shape),
            "latent_dim": latent_dim,
            "num_folds": 0,
        },
        config=tables.config(),
        shards=shard_table(ids, -(-len(ids) // num_shards)),
        **{"method": "clarity", "targets": None, "images": "png", **plan_fields},
    )
    Path(uri).mkdir(parents=True, exist_ok=True)
    storage.write_json(storage.join(uri, "plan.json"), plan.to_json())
    if model is not None:
        from clarity.model import save_model

        save_model(model, storage.join(uri, "model"))
    codes = tables.codes.select([field.name for field in plan.codes_schema()]).cast(plan.codes_schema())
    pairs = tables.counterfactuals.cast(plan.counterfactuals_schema())
    for shard, part in enumerate(plan.shards):
        if shard in leave_out:
            continue
        mine = codes.slice(part["start"], part["stop"] - part["start"])
        inside = pa.compute.is_in(pairs["image_id"], mine["image_id"])
        parts = {"codes": mine, "counterfactuals": pairs.filter(inside)}
        if traces is not None:
            parts["traces"] = traces.filter(pa.compute.is_in(traces["image_id"], mine["image_id"]))
        commit_shard(uri, plan, shard, parts, {})
    return uri
