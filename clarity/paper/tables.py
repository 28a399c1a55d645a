"""The comparison's table: each method over all pairs and for each class pair, as Parquet, CSV and Markdown."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from clarity import schema, storage
from clarity.model import Model
from clarity.paper import metrics
from clarity.paper.cache import Cache
from clarity.paper.compare import NAMES, common_images
from clarity.paper.evaluators import Judges
from clarity.paper.metrics import FLIP, METRICS_DOC
from clarity.paper.timings import Speed, describe_step
from clarity.report.text import number, percent
from clarity.search import SearchConfig

log = logging.getLogger(__name__)

#: Columns that name a row of the table.
HEAD = {
    "method": pa.string(),
    "kind": pa.string(),
    "images": pa.string(),
    "source": pa.int32(),
    "target": pa.int32(),
    "source_name": pa.string(),
    "target_name": pa.string(),
    "num_images": pa.int64(),
    "num_pairs": pa.int64(),
}
TITLES = {"common": "The same images for all", "all": "All images of each method"}


def summary(
    tables: Mapping[str, pa.Table],
    kinds: Mapping[str, str],
    speeds: Mapping[str, Any],
    real: metrics.Reality,
    class_names: Sequence[str],
    draws: int,
) -> list[dict[str, Any]]:
    """Rows of the table: each method over all pairs and for each class pair, on the common images and on all own."""
    common = list(common_images({name: table for name, table in tables.items() if kinds[name] == "method"}))
    rows = []
    for name, table in tables.items():
        inside = np.isin(np.array(table["image_id"].to_pylist()), common)
        scopes = {"common": inside} if inside.all() else {"common": inside, "all": np.ones(len(table), dtype=bool)}
        for scope, mask in scopes.items():
            if not mask.any():
                continue
            log.info("summing up %s, %s images", NAMES.get(name, name), scope)
            for row in rows_by_pair(table.filter(pa.array(mask)), real, draws):
                pair = {
                    f"{end}_name": None if row[end] is None else class_names[row[end]] for end in ("source", "target")
                }
                if row["source"] is None and name in speeds:
                    speed = Speed(**speeds[name])
                    row["counterfactuals_per_second"] = speed.counterfactuals_per_second
                    row["milliseconds_per_step"] = speed.milliseconds_per_step
                rows.append({"method": name, "kind": kinds[name], "images": scope, **pair, **row})
    return rows


def rows_by_pair(table: pa.Table, real: metrics.Reality, draws: int) -> list[dict[str, Any]]:
    """One row for all pairs of a scored table, then one for each (source, target): means, with ``_low`` and ``_high``.

    The Frechet distance of all rows is the mean over targets; it has no interval, since resampling biases it.
    """
    names = [name for name in table.column_names if is_metric(name)]
    frame = table.select(["image_id", "source", "target", *names]).to_pandas()
    features = schema.matrix(table["features"])

    def row(index: np.ndarray, distance: float | None) -> dict[str, Any]:
        values, groups = frame[names].to_numpy(float)[index], frame["image_id"].to_numpy()[index]
        intervals = metrics.bootstrap_interval(values, groups, draws=max(draws, 1))
        out: dict[str, Any] = {"num_images": len(np.unique(groups)), "num_pairs": len(index)}
        for q, name in enumerate(names):
            mean, low, high = (bound[q] for bound in intervals)
            if is_share(name):
                mean, low, high = metrics.clustered_share(values[:, q], groups)
            out[name] = none_if_nan(mean)
            out[f"{name}_low"], out[f"{name}_high"] = (none_if_nan(low), none_if_nan(high)) if draws else (None, None)
        return out | {"frechet_distance": distance}

    def frechet(index: np.ndarray, target: int) -> float | None:
        return metrics.frechet_distance(features[index], real.features[target])

    per_target = [frechet(index, int(k)) for k, index in frame.groupby("target").indices.items()]
    known = [distance for distance in per_target if distance is not None]
    overall = float(np.mean(known)) if known and len(known) == len(per_target) else None
    rows = [{"source": None, "target": None} | row(np.arange(len(frame)), overall)]
    for (source, target), index in sorted(frame.groupby(["source", "target"]).indices.items()):
        rows.append({"source": int(source), "target": int(target)} | row(index, frechet(index, int(target))))
    return rows


def write_tables(
    cache: Cache, rows: Sequence[Mapping[str, Any]], head: str, steps: Sequence[Mapping[str, Any]]
) -> None:
    """The summary as comparison.parquet, .csv, and .md for people, with the times of a step behind it."""
    every = dict.fromkeys([*METRICS_DOC, *(name for row in rows for name in row if is_metric(name))])
    known = {name for row in rows for name, value in row.items() if value is not None}
    present = [name for name in every if name in known]
    names = [*HEAD, *(f"{name}{end}" for name in present for end in ("", "_low", "_high") if f"{name}{end}" in known)]
    fields = [pa.field(name, HEAD.get(name, pa.float64()), metadata={"doc": doc_of(name)}) for name in names]
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows], schema=pa.schema(fields))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    storage.write_bytes(cache.path("comparison.parquet"), buffer.getvalue())
    frame = table.to_pandas(integer_object_nulls=True)
    storage.write_bytes(cache.path("comparison.csv"), frame.to_csv(index=False).encode())
    text = [head, *(overall_table(frame[frame["images"] == scope], scope, present) for scope in TITLES)]
    text.append(
        "Intervals: 95 %; of shares exact on the effective number of pairs, of the rest by bootstrap "
        "over images. An empty cell is null: unknown, or of too small a sample."
    )
    text.append("\n".join(f"- **{name.replace('_', ' ')}**: {doc_of(name)}" for name in present))
    if steps:
        text += ["## Time of a step", "\n".join(f"- {describe_step(row)}" for row in steps)]
    storage.write_bytes(cache.path("comparison.md"), ("\n\n".join(filter(None, text)) + "\n").encode())


def overall_table(frame: pd.DataFrame, scope: str, present: Sequence[str]) -> str:
    """The rows over all class pairs in Markdown: a line for each metric, a column for each method."""
    overall = frame[frame["source"].isna()]
    if overall.empty:
        return ""
    counts = sorted(set(zip(overall["num_images"], overall["num_pairs"])))
    sizes = ", ".join(f"{images} images, {pairs} pairs" for images, pairs in counts)
    cells = pd.DataFrame(
        {
            NAMES.get(row["method"], row["method"]): [cell(row, name) for name in present]
            for row in overall.to_dict("records")
        },
        index=[name.replace("_", " ") for name in present],
    )
    return f"## {TITLES[scope]} ({sizes})\n\n{markdown(cells)}"


def markdown(frame: pd.DataFrame) -> str:
    """A frame of texts as a Markdown table, its index on the left."""
    lines = ["| | " + " | ".join(frame.columns) + " |", "|---|" + "---|" * len(frame.columns)]
    return "\n".join(lines + [f"| {name} | " + " | ".join(values) + " |" for name, *values in frame.itertuples()])


def introduction(
    model: Model, config: SearchConfig, jury: Judges, real: metrics.Reality, accuracy: Mapping[str, float]
) -> str:
    """What a reader must know before the table: what was compared, by which networks, and on which images."""
    shares = [f"{name.replace('_', ' ')} {percent(share)}" for name, share in accuracy.items() if name != "images"]
    members = f"{model.ensemble.config.num_members} latent classifiers"
    if model.image_ensemble is not None:
        members += f" and {model.image_ensemble.config.num_members} image classifiers"
    search = ", ".join(f"{name} {value}" for name, value in asdict(config).items())
    oracle, code = jury.oracle.config, jury.autoencoders[0].config.code_dim  # type: ignore[union-attr]
    blocks = "-".join(str(width) for width in oracle.channels)
    training = ", ".join(f"{name} {value}" for name, value in jury.card.get("training", {}).items())
    seen = jury.card.get("num_labelled", "an unknown number of")
    count = sum(len(features) for features in real.features)
    paragraphs = [
        "# Comparison",
        f"Model {model.fingerprint[:12]}: {members}. On {accuracy['images']:.0f} test images: {', '.join(shares)}.",
        f"Search: {search}.",
        f"Judges {jury.fingerprint[:12]}: an oracle of pairs of 3x3 convolutions {blocks} with max pooling and "
        f"{oracle.num_features} features, and an autoencoder with a code of {code} for each class and for all, trained "
        f"on {seen} training images: one half, chosen by image id. Classifiers trained on the whole training split "
        f"have seen that half too; the judges have seen no classifier. Their training: {training}.",
        f"Implausibility and Frechet distances compare with {count} training images; the control row draws from "
        "others. All images are scored after rounding to 8 bits. Metrics can be fooled by adversarial noise: the rows "
        "of FGSM and Schut show which ones are.",
    ]
    return "\n\n".join(paragraphs)


def cell(row: Mapping[str, Any], name: str) -> str:
    """A metric of a row as text, with its interval; empty where it is null."""
    show: Callable[[float], str] = percent if is_share(name) or name == "sparsity" else number
    value, low, high = (row.get(f"{name}{end}", np.nan) for end in ("", "_low", "_high"))
    if np.isnan(value):
        return ""
    return show(value) + ("" if np.isnan(low) else f" [{show(low)}, {show(high)}]")


def is_metric(name: str) -> bool:
    """Whether a column of scored rows is summed up."""
    return name in METRICS_DOC or (name.startswith(FLIP) and not name.endswith(("_low", "_high")))


def is_share(name: str) -> bool:
    """Whether a metric is 0 or 1 for each pair."""
    return name.endswith(("validity", "agreement")) or name.startswith(FLIP)


def doc_of(name: str) -> str:
    """What a column of the table says; empty for the columns that name a row."""
    if name.startswith(FLIP):
        return f"share of pairs on which the attribute network changes its mind on {name.removeprefix(FLIP)}"
    return METRICS_DOC.get(name, "")


def none_if_nan(value: float) -> float | None:
    """None for NaN, which JSON and Parquet tell from a number."""
    return None if np.isnan(value) else float(value)
