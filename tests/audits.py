"""Audits made by a formula: the tables of an audit with facts planted in them, without training or searching anything.

A class is a blob of its own in the picture; its images jitter around it. A counterfactual is the picture with the blob
moved; its distance and steps follow from a K x K table of how hard each class pair is, into which facts are planted.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clarity import schema, storage
from clarity.audit.commits import commit_shard
from clarity.audit.plan import Plan, shard_table
from clarity.images import encode_png
from clarity.model import save_model
from clarity.worker import ExplainShard, Work, read_shard, shard_item, write_shard


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


EVERYTHING = Planted(hard=(1, 3), asymmetry=(0, 2), wrong_labels=4, edge=5, rising=2, lost=1, unreadable=2, nonfinite=1)
CONFIG = {"min_target_prob": 0.99, "max_steps": 500}
#: What the findings are told of it.
SEARCHED: dict[str, Any] = {"thresholds": (0.99, 0.99), "max_steps": 500}


@dataclass
class Tables:
    """``before`` and ``after`` (P, C, H, W) are reconstruction and counterfactual of each pair."""

    codes: pa.Table
    counterfactuals: pa.Table
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    wrong_labels: list[str] = field(default_factory=list)
    edge: list[str] = field(default_factory=list)
    before: np.ndarray = field(default_factory=lambda: np.zeros(0))
    after: np.ndarray = field(default_factory=lambda: np.zeros(0))


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
    image_ids = np.array([f"img-{i:05d}" for i in range(num_images)])
    names, numbers = np.array(class_names), np.arange(num_images)
    source = numbers % num_classes

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

    def stored(pictures: np.ndarray) -> list[Any]:
        return encode_png(np.round(pictures * 255).astype(np.uint8)) if images == "png" else [None] * len(pictures)

    # Small pictures of many classes: the class must not fix the place of every pixel, or each would be a shortcut.
    jitter = rng.normal(0, 1.5, (num_images, 2))
    contrast = rng.uniform(0.4, 1.0, num_images)
    x = np.clip(picture(source, jitter, contrast) + rng.normal(0, 0.02, (num_images, *image_shape)), 0, 1)

    certain = rng.uniform(0.9, 0.999, num_images)
    probs = np.repeat(((1 - certain) / (num_classes - 1))[:, None], num_classes, 1)
    probs[numbers, source] = certain
    wrong, on_edge = numbers[3 : 3 + planted.wrong_labels], numbers[20 : 20 + planted.edge]
    label = source.copy()
    label[wrong] = (label[wrong] + 1) % num_classes
    aleatoric = -(probs * np.log(probs)).sum(1) * 0.8
    epistemic = rng.uniform(0.01, 0.05, num_images)
    unreadable = numbers >= num_images - planted.unreadable
    z = rng.normal(0, 1, (num_images, latent_dim)).astype(np.float32)
    values: dict[str, Any] = {
        "image_id": image_ids,
        "label": label,
        "label_name": names[label],
        "source": source,
        "source_name": names[source],
        "probs": probs,
        "predictive": aleatoric + epistemic,
        "aleatoric": aleatoric,
        "epistemic": epistemic,
        "z": z,
        "reconstruction_l1": rng.uniform(1, 3, num_images),
        "status": np.where(unreadable, "error", "ok"),
        "error": np.where(unreadable, "truncated PNG", None),
        "x": stored(x),
    }
    if planted.prediction_errors is not None:
        prediction = (source + (numbers < planted.prediction_errors)) % num_classes
        values |= {"prediction": prediction, "prediction_name": names[prediction]}
        values["prediction_probs"] = np.eye(num_classes)[prediction]
    fields = list(schema.codes_schema(num_classes, latent_dim))
    fields += schema.predictions_schema(num_classes)
    always = ("image_id", "label_name", "status", "error")
    codes = {}
    for known in (known for known in fields if known.name in values):
        column = list(values[known.name])
        if known.name not in always:
            column = [None if bad else value for value, bad in zip(column, unreadable)]
        codes[known.name] = pa.array(column, known.type)

    # Pairs: a symmetric table of how hard each class pair is, with facts written over it.
    hardness = rng.uniform(8, 12, (num_classes, num_classes))
    hardness = (hardness + hardness.T) / 2
    if planted.asymmetry:
        hardness[planted.asymmetry] *= 3
    if planted.hard:
        hardness[planted.hard] = 40
        hardness[planted.hard[::-1]] = 38
    target, image = np.nonzero((source != np.arange(num_classes)[:, None]) & ~unreadable)
    start, num_pairs = source[image], len(image)
    spread = rng.uniform(0.8, 1.2, num_pairs)
    spread[np.isin(image, on_edge)] *= 0.1
    distance = hardness[start, target] * spread
    status = np.where(np.arange(num_pairs) < planted.nonfinite, "nonfinite", "ok")
    converged = status == "ok"
    if planted.hard:
        converged[np.flatnonzero((start == planted.hard[0]) & (target == planted.hard[1]))[::5]] = False
    final = np.where(converged, rng.uniform(0.991, 0.999, num_pairs), 0.4)
    epistemic_final = rng.uniform(0.005, 0.03, num_pairs) + 0.3 * (target == planted.rising)
    reencoded = np.where(target == planted.lost, start, target)
    before = picture(start, jitter[image], contrast[image])
    after = picture(target, jitter[image] + rng.normal(0, 1.5, (num_pairs, 2)), rng.uniform(0.4, 1.0, num_pairs))
    values = {
        "image_id": image_ids[image],
        "label": label[image],
        "source": start,
        "source_name": names[start],
        "target": target,
        "target_name": names[target],
        "method": ["clarity"] * num_pairs,
        "status": status,
        "converged": converged,
        "steps": np.where(converged, np.maximum(1, distance * 5), 500).astype(int),
        "rungs": np.zeros(num_pairs, int),
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
        "reencoded_class": reencoded,
        "reencoded_target_prob": np.where(reencoded == target, 0.98, 0.02),
        "z_cf": (z[image] + rng.normal(0, 1, (num_pairs, latent_dim))).astype(np.float32),
        "x_cf": stored(after),
    }
    pairs = {
        known.name: pa.array(list(values.get(known.name, [None] * num_pairs)), known.type)
        for known in schema.counterfactuals_schema(latent_dim)
    }
    ids = [image_ids[chosen].tolist() for chosen in (wrong, on_edge)]
    return Tables(pa.table(codes), pa.table(pairs), class_names, image_shape, *ids, before, after)


def replaced(tables: Tables, table: str, column: str, values: Any) -> Tables:
    """The tables with one column replaced."""
    old = getattr(tables, table)
    if isinstance(values, np.ndarray):
        values = pa.array(values).cast(old[column].type)
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
        tables = replaced(tables, "counterfactuals", name, values)
    return tables


def write_audit(
    uri: Any,
    tables: Tables,
    model: Any = None,
    num_shards: int = 3,
    leave_out: tuple[int, ...] = (),
    dataset: dict[str, Any] | None = None,
    **plan_fields: Any,
) -> str:
    """An audit directory of such tables, as explain_all writes it; shards in ``leave_out`` stay uncommitted."""
    uri = str(uri)
    ids = tables.codes["image_id"].to_pylist()
    extra = [(name, str(tables.codes[name].type)) for name in tables.codes.column_names if name not in schema.CODES]
    described = {"source": "synthetic", "data": None, "split": "test", "num_images": len(ids), "extra": extra}
    plan = Plan(
        dataset=described | (dataset or {}),
        model={
            "fingerprint": "none",
            "class_names": list(tables.class_names),
            "image_shape": list(tables.image_shape),
            "latent_dim": tables.codes["z"].type.list_size,
            "num_folds": 0,
        },
        config=CONFIG,
        shards=shard_table(ids, -(-len(ids) // num_shards)),
        **{"method": "clarity", "targets": None, "images": "png", **plan_fields},
    )
    Path(uri).mkdir(parents=True, exist_ok=True)
    storage.write_json(storage.join(uri, "plan.json"), plan.to_json())
    if model is not None:
        save_model(model, storage.join(uri, "model"))
    codes = tables.codes.select(plan.codes_schema().names).cast(plan.codes_schema())
    pairs = tables.counterfactuals.cast(plan.counterfactuals_schema())
    for shard, part in enumerate(plan.shards):
        if shard not in leave_out:
            mine = codes.slice(part["start"], part["stop"] - part["start"])
            parts = {"codes": mine, "counterfactuals": pairs.filter(pc.is_in(pairs["image_id"], mine["image_id"]))}
            commit_shard(uri, plan, shard, parts, {})
    return uri


def model_card(
    recall: tuple[float, ...] = (0.95, 0.93, 0.97, 0.96),
    baseline: float = 0.9,
    error: float = 0.2,
    p90: tuple[float | None, ...] = (0.99, 0.99, 0.99, 0.99),
    images: int = 100,
    judge: tuple[float, float] | None = None,
    copies: int = 0,
) -> dict[str, Any]:
    """The figures of model.json, with so many held-out images of each class."""
    per_class = {
        name: {"images": images, "correct": round(share * images)}
        for name, share in zip(("ant", "bee", "cow", "dog"), recall, strict=True)
    }
    correct = sum(part["correct"] for part in per_class.values())
    return {
        "metrics": {"ensemble": {"calibration_error": 0.031}},
        "target_probs": {"median": [0.9] * 4, "p90": list(p90)},
        "evaluation": {
            "images": 4 * images,
            "correct": correct,
            "per_class": per_class,
            "majority": {"class": "ant", "share": 0.25},
            "baseline": {"components": 50, "balanced_accuracy": baseline},
            "reconstruction": {"latent_dim": 16, "vae": error, "mean_image": 1.0, "linear_code": 0.3},
            "copies": {"held_out": copies},
            "judge": judge and {"accuracy": judge[0], "accuracy_on_reconstructions": judge[1]},
        },
    }


def fill(work: Work, listing: pa.Table) -> list[pa.Table]:
    """The stages of a job on every shard of a claimed audit, one after another in this process; the last stage's."""
    explain = ExplainShard(work, threads=1)
    items = [pa.Table.from_pylist([shard_item(work.plan, shard, listing)]) for shard in range(len(work.plan.shards))]
    return [write_shard(explain(read_shard(item, work)), work) for item in items]
