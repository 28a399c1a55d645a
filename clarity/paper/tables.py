"""The comparison's table: each method over all pairs and for each class pair, as Parquet and Markdown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from clarity import schema, storage
from clarity.audit.commits import to_parquet
from clarity.methods import METHODS
from clarity.model import Model
from clarity.paper import metrics
from clarity.paper.claims import describe_step
from clarity.paper.compare import NAMES, members_of
from clarity.paper.evaluators import Judges
from clarity.paper.metrics import FLIP, METRICS_DOC
from clarity.report.text import number, percent
from clarity.search import SearchConfig

#: Columns that name a row of the table.
HEAD = {
    "method": pa.string(),
    "members": pa.int32(),
    "source": pa.int32(),
    "target": pa.int32(),
    "source_name": pa.string(),
    "target_name": pa.string(),
    "num_images": pa.int64(),
    "num_pairs": pa.int64(),
}


def summary(tables: Mapping[str, pa.Table], real: metrics.Reality, model: Model) -> list[dict[str, Any]]:
    """Rows of the table: each method over all pairs, then for each class pair."""
    rows = []
    for name, table in tables.items():
        members = members_of(model, name) if name in METHODS else None
        for row in rows_by_pair(table, real):
            ends = {
                f"{end}_name": None if row[end] is None else model.class_names[row[end]] for end in ("source", "target")
            }
            rows.append({"method": name, "members": members, **ends, **row})
    return rows


def rows_by_pair(table: pa.Table, real: metrics.Reality) -> list[dict[str, Any]]:
    """One row for all pairs of a scored table, then one for each (source, target): means, and their intervals."""
    names = [name for name in table.column_names if is_metric(name)]
    frame = table.select(["image_id", "source", "target", *names]).to_pandas()
    features = schema.matrix(table["features"])

    def row(index: np.ndarray, distance: float | None) -> dict[str, Any]:
        part = frame.iloc[index]
        groups = part["image_id"].to_numpy()
        out: dict[str, Any] = {"num_images": len(np.unique(groups)), "num_pairs": len(index)}
        for name in names:
            interval = metrics.clustered_share if is_share(name) else metrics.clustered_mean
            bounds = interval(part[name].to_numpy(float), groups)
            for end, value in zip(("", "_low", "_high"), bounds):
                out[name + end] = None if np.isnan(value) else float(value)
        return out | {"frechet_distance": distance}

    def frechet(index: np.ndarray, target: int) -> float | None:
        return metrics.frechet_distance(features[index], real.features[target])

    per_target = [frechet(index, int(k)) for k, index in frame.groupby("target").indices.items()]
    known = [distance for distance in per_target if distance is not None]
    overall = float(np.mean(known)) if len(known) == len(per_target) else None
    rows = [{"source": None, "target": None} | row(np.arange(len(frame)), overall)]
    for (source, target), index in sorted(frame.groupby(["source", "target"]).indices.items()):
        rows.append({"source": int(source), "target": int(target)} | row(index, frechet(index, int(target))))
    return rows


def write_tables(out: str, rows: Sequence[Mapping[str, Any]], head: str, steps: Sequence[Mapping[str, Any]]) -> None:
    """The summary as comparison.parquet, and as comparison.md for people, with the times of a step behind it."""
    every = dict.fromkeys([*METRICS_DOC, *(name for row in rows for name in row if is_metric(name))])
    known = {name for row in rows for name, value in row.items() if value is not None}
    present = [name for name in every if name in known]
    names = [*HEAD, *(f"{name}{end}" for name in present for end in ("", "_low", "_high") if f"{name}{end}" in known)]
    fields = [pa.field(name, HEAD.get(name, pa.float64()), metadata={"doc": doc_of(name)}) for name in names]
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows], schema=pa.schema(fields))
    storage.write_bytes(storage.join(out, "comparison.parquet"), to_parquet(table))
    overall = [row for row in rows if row["source"] is None]
    sizes = ", ".join(sorted({f"{row['num_images']} images, {row['num_pairs']} pairs" for row in overall}))
    titles = [NAMES.get(row["method"], row["method"]) for row in overall]
    titles = [f"{name}, M = {row['members']}" if row["members"] else name for name, row in zip(titles, overall)]
    lines = [["", *titles], ["---"] * (len(overall) + 1)]
    lines += [[name.replace("_", " "), *(cell(row, name) for row in overall)] for name in present]
    text = [
        head,
        f"## The same images for all ({sizes})",
        "\n".join(f"| {' | '.join(cells)} |" for cells in lines),
        "Intervals: 95 %, the pairs of an image taken together; of shares exact on the effective number of pairs. An "
        "empty cell is null: unknown, or of too small a sample.",
        "\n".join(f"- **{name.replace('_', ' ')}**: {doc_of(name)}" for name in present),
    ]
    if steps:
        text += ["## Time of a step", "\n".join(f"- {describe_step(row)}" for row in steps)]
    storage.write_bytes(storage.join(out, "comparison.md"), ("\n\n".join(text) + "\n").encode())


def introduction(
    model: Model, config: SearchConfig, jury: Judges, real: metrics.Reality, accuracy: Mapping[str, float]
) -> str:
    """What a reader must know before the table: what was compared, by which networks, and on which images."""
    shares = [f"{name.replace('_', ' ')} {percent(share)}" for name, share in accuracy.items() if name != "images"]
    members = f"{model.ensemble.config.num_members} latent classifiers"
    if model.image_ensemble is not None:
        members += f" and {model.image_ensemble.config.num_members} image classifiers"
    search = ", ".join(f"{name} {value}" for name, value in asdict(config).items())
    blocks = "-".join(str(width) for width in jury.oracle.config.channels)
    count = sum(len(features) for features in real.features)
    paragraphs = [
        "# Comparison",
        f"Model {model.fingerprint[:12]}: {members}; one training, one seed. On {accuracy['images']:.0f} test images: "
        f"{', '.join(shares)}.",
        f"Search: {search}.",
        f"Judges: one oracle, of pairs of 3x3 convolutions {blocks} with max pooling, and an "
        f"autoencoder with a code of {jury.code_dim} for each class and for all, trained on "
        f"{jury.card.get('num_labelled', 'an unknown number of')} training images: one half, chosen by image id. "
        "Classifiers trained on the whole training split have seen that half too; the judges have seen no classifier.",
        f"Implausibility and Frechet distances compare with {count} training images; the control row draws from "
        "others. All images are scored after rounding to 8 bits. Metrics can be fooled by adversarial noise: the rows "
        "of FGSM and Schut show which ones are. A score better than that of real images means prototypes of the class, "
        "not more realism.",
    ]
    return "\n\n".join(paragraphs)


def cell(row: Mapping[str, Any], name: str) -> str:
    """A metric of a row as text, with its interval; empty where it is null."""
    show: Callable[[float], str] = percent if is_share(name) or name == "sparsity" else number
    value, low, high = (row.get(name + end) for end in ("", "_low", "_high"))
    if value is None:
        return ""
    return show(value) + ("" if low is None or high is None else f" [{show(low)}, {show(high)}]")


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
