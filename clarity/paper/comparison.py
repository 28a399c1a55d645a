"""A comparison: results of any method, of control rows and of other tools, judged by the same nets in one table.

Knows audits, judges and figures, and what the paper claims of them. Does not know how audits come about: that is the
job's. What is slow is kept under the comparison's place and read again while nothing that it depends on changes.

Shapes: B images, P pairs (image, target), C, H, W image, D latent, K classes, M members.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from clarity import data, judges, plots, schema, storage
from clarity.audit.commits import to_parquet
from clarity.audit.read import read_audit
from clarity.classifiers import ImageEnsemble
from clarity.explainer import quantise
from clarity.ids import noise
from clarity.images import Preprocessing, decode_png, encode_png
from clarity.methods import METHODS, Pairs, classifier_logits
from clarity.model import Model
from clarity.paper import evaluators, metrics, panels
from clarity.rows import decode_rows, encode_rows, logits_rows, predict
from clarity.search import SearchConfig
from clarity.uncertainty import decompose

#: Part of what judged rows depend on: raise it when a metric changes.
VERSION = 1

#: Images for which controls answer and COUT, the slowest metric, is taken: at most so many.
CHOSEN_IMAGES = 1000

#: Pairs of a batch in which steps are timed.
STEP_PAIRS = 128

#: Test images of each class in Figure 10.
CLOUD_IMAGES = 300

CONTROLS = {
    "original": "the image itself",
    "reconstruction": "decode(z) of the image",
    "real image": "a random real training image of the target class",
}
#: Methods as the paper writes them.
NAMES = {
    "clarity": "Clarity",
    "latent": "Latent",
    "revise": "REVISE",
    "revise_e": "REVISE-E",
    "revise_e_latent": "REVISE-E (latent)",
    "fgsm": "FGSM",
    "schut": "Schut",
}
#: Source and target of each row of the grids, by class name.
TABLE_1 = (("3", "8"), ("0", "9"), ("4", "7"), ("8", "0"), ("2", "1"), ("9", "5"))
TABLE_2 = (
    ("blond", "black"),
    ("black", "gray"),
    ("black", "blond"),
    ("brown", "gray"),
    ("gray", "black"),
    ("blond", "brown"),
)
EXAMPLES = (("5", "1"), ("6", "3"))
#: Segments of Figures 5 and 7; the first is Figure 8's search, the last Figure 10's.
SEGMENTS = (("3", "8"), ("5", "1"))


@dataclass
class Images:
    """Evaluated images with what the model makes of them; ``row`` finds one by its id."""

    ids: list[str]
    x: np.ndarray  # (B, C, H, W) uint8
    z: np.ndarray  # (B, D)
    log_var: np.ndarray
    reconstruction: np.ndarray  # (B, C, H, W) uint8
    source: np.ndarray  # (B,)
    label: np.ndarray  # (B,), -1 where unknown
    certainty: np.ndarray  # (B,), probability of the source

    def __post_init__(self) -> None:
        self.row = {name: place for place, name in enumerate(self.ids)}


@dataclass
class Bench:
    """What the steps of one comparison share.

    ``real`` are real training images of each class, ``data_key`` names the data that they come from; ``out`` is where
    everything is kept; ``draws`` are the bootstrap's; ``speed_pairs`` make a timed batch; ``say`` hears of progress.
    """

    model: Model
    judges: evaluators.Judges
    real: metrics.Reality
    config: SearchConfig
    out: str
    data_key: str = ""
    draws: int = 1000
    speed_pairs: int = 36
    formats: tuple[str, ...] = ("png", "pdf")
    differences: bool = False
    say: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        digest = hashlib.sha256(json.dumps([VERSION, self.model.fingerprint, self.data_key]).encode())
        digest.update(self.judges.fingerprint.encode())
        # The model's own fingerprint leaves its image classifiers out.
        for tensor in self.model.image_ensemble.state_dict().values() if self.model.image_ensemble else ():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        self.key = digest.hexdigest()

    def place(self, *parts: str) -> str:
        """A path under ``out``."""
        return storage.join(self.out, *parts)


# --- what is compared -------------------------------------------------------------------------------------------------


def sample(dataset: data.Dataset, preprocessing: Preprocessing, count: int, uri: str) -> None:
    """Write the Parquet file of the images to compare on, unless it is there.

    ``count`` images (0: all) with as many of each class as there are, the first of each class in the listing's order,
    preprocessed. As a test split, whatever they are: the ensemble explains them, not classifiers by fold.

    Raises:
        ValueError: the file holds a sample of something else.
    """
    listing = data.list_images(dataset)
    depends = [data.listing_fingerprint(listing), preprocessing.to_json(), count]
    key = hashlib.sha256(json.dumps(depends).encode()).hexdigest().encode()
    if storage.exists(uri):
        with storage.open_parquet(uri) as kept:
            if (kept.schema_arrow.metadata or {}).get(b"clarity.key") != key:
                raise ValueError(
                    f"expected a sample of {dataset.source} {dataset.split} in {storage.display(uri)}, found another: "
                    "choose another --out"
                )
        return
    rank: dict[Any, int] = {}
    order = []
    for place, label in enumerate(listing["label_name"].to_pylist()):
        rank[label] = rank.get(label, -1) + 1
        order.append((rank[label], place))
    chosen = np.array([place for _, place in sorted(order)[: count or None]])
    pixels, ids, labels, _ = data.read_all(dataset, listing.take(np.sort(chosen)), preprocessing)
    columns = {"image_id": ids, "image": encode_png(pixels), "label": pa.array(labels, pa.string())}
    table = pa.table(columns | {"split": ["test"] * len(ids)})
    turn = {name: place for place, name in enumerate(listing["image_id"].take(chosen).to_pylist())}
    table = table.take(np.argsort([turn[name] for name in ids]))
    storage.write_bytes(uri, to_parquet(table.replace_schema_metadata({b"clarity.key": key})))


def see(model: Model, ids: list[str], x: np.ndarray, label: np.ndarray) -> Images:
    """Encode, reconstruct and classify images, row by row as the audit does."""
    z, log_var = encode_rows(model.vae, torch.from_numpy(x).float() / 255)
    reconstruction = quantise(decode_rows(model.vae, z))
    probs = predict(logits_rows(model.ensemble, z)).probs
    return Images(ids, x, z.numpy(), log_var.numpy(), reconstruction, probs.argmax(1), label, probs.max(1))


def pairs_of(model: Model, images: Images, of: np.ndarray, target: np.ndarray) -> Pairs:
    """Search pairs: ``of`` names the images, ``target`` what each is to become."""
    drawn = noise([images.ids[place] for place in of], model.latent_dim)
    arrays = (images.x[of].astype(np.float32) / 255, images.z[of], images.log_var[of], drawn, target.astype(np.int64))
    return Pairs(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


# --- judging ----------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """Images to judge under one name: P pairs; ``columns`` hold what is known of them already, (P,) each."""

    name: str
    kind: str  # method, control or external
    images: Images
    of: np.ndarray  # (P,) place of the original
    target: np.ndarray
    x_cf: np.ndarray  # (P, C, H, W) uint8
    columns: dict[str, np.ndarray]
    key: str  # changes when any of this does


def results_of_audit(bench: Bench, method: str, uri: str) -> Results:
    """What an audit holds, with the verdict of the method's own classifier on each result.

    Raises:
        ValueError: the audit is of another method or model, or holds no images.
    """
    model = bench.model
    found = read_audit(uri)
    made_by = str(found.plan.model["fingerprint"])
    if found.plan.method != method or made_by != model.fingerprint:
        raise ValueError(
            f"expected an audit of {method} with model {model.fingerprint[:12]} in {storage.display(uri)}, found one "
            f"of {found.plan.method} with {made_by[:12]}: give the model that made it, or leave the audit out"
        )
    codes = found.codes.to_table()
    codes = codes.filter(pc.equal(codes["status"], "ok"))
    if found.plan.images != "png" or found.plan.model.get("num_folds") or not len(codes):
        raise ValueError(
            f"expected an audit with images, by the whole ensemble, in {storage.display(uri)}: explain the test split "
            "with --images png"
        )
    label = codes["label"].fill_null(-1).to_numpy()
    images = see(model, codes["image_id"].to_pylist(), decode_png(codes["x"], model.image_shape), label)
    images.source = codes["source"].to_numpy().astype(np.int64)
    table = found.counterfactuals.to_table()
    of = np.array([images.row[name] for name in table["image_id"].to_pylist()], dtype=np.int64)
    target = table["target"].to_numpy().astype(np.int64)
    x_cf = decode_png(table["x_cf"], model.image_shape)
    points = schema.matrix(table["z_cf"]) if METHODS[method].space == "latent" else x_cf.astype(np.float32) / 255
    seen = np.concatenate(
        [np.zeros(0, np.int64)]
        + [
            predict(classifier_logits(model, method, torch.from_numpy(points[part].copy()))).probs.argmax(1)
            for part in parts(len(points))
        ]
    )
    columns: dict[str, np.ndarray] = {
        "strict_validity": table["converged"].to_numpy(zero_copy_only=False).astype(float),
        "argmax_validity": (seen == target).astype(float),
        "reencoded_agreement": (table["reencoded_class"].to_numpy() == target).astype(float),
        "l1_z": table["distance_z_l1"].to_numpy(),
        "steps": table["steps"].to_numpy().astype(float),
    }
    for kind in ("predictive", "aleatoric", "epistemic"):
        for end in ("initial", "final"):
            columns[f"{kind}_{end}"] = table[f"{kind}_{end}"].fill_null(float("nan")).to_numpy()
    columns["gradient_evaluations"] = metrics.gradient_evaluations(columns["steps"], members_of(model, method))
    files = [file["sha256"] for _, commit in sorted(found.commits.items()) for file in commit["files"].values()]
    key = hashlib.sha256("".join([found.plan.fingerprint, *files]).encode()).hexdigest()
    return Results(method, "method", images, of, target, x_cf, columns, key)


def members_of(model: Model, method: str) -> int:
    """Members whose gradients one step of a method takes."""
    kind = METHODS[method].classifier
    if kind.endswith("member"):
        return 1
    ensemble = model.image_ensemble if kind.startswith("image") else model.ensemble
    assert ensemble is not None
    return ensemble.config.num_members


def chosen_images(results: Sequence[Results]) -> set[str]:
    """Ids of CHOSEN_IMAGES images, drawn from their ids: of those that all results answer for, then of others."""
    ids = [{found.images.ids[b] for b in np.unique(found.of)} for found in results]
    common = set.intersection(*ids)
    drawn = sorted(set.union(*ids), key=lambda name: (name not in common, hashlib.sha256(name.encode()).digest()))
    return set(drawn[:CHOSEN_IMAGES])


def only(results: Results, ids: set[str]) -> Results:
    """The part of some results that is about the images with these ids."""
    kept = np.isin(np.array(results.images.ids)[results.of], list(ids))
    if kept.all():
        return results
    columns = {name: values[kept] for name, values in results.columns.items()}
    digest = hashlib.sha256(json.dumps([results.key, np.flatnonzero(kept).tolist()]).encode()).hexdigest()
    return replace(
        results, of=results.of[kept], target=results.target[kept], x_cf=results.x_cf[kept], columns=columns, key=digest
    )


def control(bench: Bench, name: str, like: Results) -> Results:
    """The control row ``name`` for the same questions as ``like``."""
    images, of, target = like.images, like.of, like.target
    if name == "original":
        x_cf = images.x[of]
    elif name == "reconstruction":
        x_cf = images.reconstruction[of]
    else:
        draws = noise([f"{images.ids[place]} {wanted}" for place, wanted in zip(of, target)], 1)[:, 0]
        pools = bench.real.images
        # The share of normal numbers below the draw is uniform, and depends on the question alone.
        uniform = [float(torch.special.ndtr(torch.tensor(draw))) for draw in draws]
        empty = np.zeros(images.x.shape[1:], np.uint8)
        x_cf = np.stack(
            [
                pools[k][min(int(u * len(pools[k])), len(pools[k]) - 1)] if len(pools[k]) else empty
                for u, k in zip(uniform, target)
            ]
        )
    return Results(name, "control", images, of, target, x_cf, reencoded(bench, images, of, target, x_cf), like.key)


def reencoded(
    bench: Bench, images: Images, of: np.ndarray, target: np.ndarray, x_cf: np.ndarray
) -> dict[str, np.ndarray]:
    """What the latent ensemble makes of images that come without codes."""
    agreement, moved = np.zeros(len(of)), np.zeros(len(of))
    for part in parts(len(of)):
        z, _ = encode_rows(bench.model.vae, torch.from_numpy(x_cf[part]).float() / 255)
        seen = predict(logits_rows(bench.model.ensemble, z)).probs.argmax(1)
        agreement[part], moved[part] = seen == target[part], metrics.l1(z.numpy(), images.z[of[part]])
    return {"reencoded_agreement": agreement, "l1_z": moved}


def external(bench: Bench, name: str, uri: str, like: Results) -> Results:
    """Counterfactual images made elsewhere: an npz or a Parquet file with image_id, target and image.

    image: uint8 or floats in [0, 1], (C, H, W) or (H, W); in Parquet a list, or the bytes of an image file. target: a
    class name, or its index. Rows whose image is not compared here, or is of the target already, are left out and
    counted.

    Raises:
        ValueError: columns are missing, a target is unknown, or no row is left.
    """
    raw = storage.read_bytes(uri)
    if storage.name(uri).endswith(".npz"):
        arrays = np.load(io.BytesIO(raw), allow_pickle=False)
        content: dict[str, Any] = {column: arrays[column] for column in arrays.files}
    else:
        content = pq.read_table(pa.BufferReader(raw)).to_pydict()
    if missing := {"image_id", "target", "image"} - set(content):
        raise ValueError(
            f"{storage.display(uri)} needs image_id, target and image, missing: {', '.join(sorted(missing))}"
        )
    names = {name: k for k, name in enumerate(bench.model.class_names)}
    of, target, pictures, unknown = [], [], [], 0
    for image_id, wanted, image in zip(content["image_id"], content["target"], content["image"]):
        place = like.images.row.get(str(image_id))
        k = names.get(str(wanted), -1)
        if k < 0 and isinstance(wanted, int | np.integer) and 0 <= wanted < len(names):
            k = int(wanted)
        if k < 0:
            raise ValueError(f"{storage.display(uri)}: unknown target {wanted!r}; classes are {', '.join(names)}")
        if place is None or k == like.images.source[place]:
            unknown += 1
            continue
        picture = image if isinstance(image, bytes) else np.asarray(image).reshape(bench.model.image_shape)
        of.append(place)
        target.append(k)
        pictures.append(bench.model.preprocessing.apply(picture))
    bench.say(
        f"{name}: {len(of)} images to judge, {unknown} left out as their image is not compared or is of the target"
    )
    if not of:
        raise ValueError(f"{storage.display(uri)} holds no counterfactual of an image that is compared here")
    places, wanted, x_cf = np.array(of), np.array(target, dtype=np.int64), np.stack(pictures)
    columns = reencoded(bench, like.images, places, wanted, x_cf)
    return Results(name, "external", like.images, places, wanted, x_cf, columns, hashlib.sha256(raw).hexdigest())


def judged(bench: Bench, results: Results, chosen: set[str] | None = None) -> pa.Table:
    """One row for each pair with every metric; kept in pieces under ``judged/``, and read again while nothing changes.

    COUT is null for images whose id is not ``chosen``; None chooses all.
    """
    images, names = results.images, np.array(results.images.ids)[results.of]
    source = images.source[results.of]
    swapped = np.ones(len(names), bool) if chosen is None else np.isin(names, list(chosen))
    others = other_attributes(bench)
    pieces = []
    for number, part in enumerate(parts(len(names))):
        depends = [results.name, results.key, bench.key, names[part].tolist(), np.flatnonzero(~swapped[part]).tolist()]
        key = hashlib.sha256(json.dumps(depends).encode()).hexdigest()
        place = bench.place("judged", results.name.replace(" ", "_"), f"{number:05d}.parquet")
        if storage.exists(place):
            kept = pq.read_table(pa.BufferReader(storage.read_bytes(place)))
            if (kept.schema.metadata or {}).get(b"clarity.key") == key.encode():
                pieces.append(kept.replace_schema_metadata(None))
                continue
        of = results.of[part]
        columns: dict[str, Any] = {
            "image_id": names[part],
            "label": images.label[of],
            "source": source[part],
            "target": results.target[part],
            **{name: values[part] for name, values in results.columns.items()},
            **metrics.judge_images(
                bench.judges, bench.real, images.x[of], images.reconstruction[of], results.x_cf[part], source[part],
                results.target[part], others, swapped[part],
            ),
        }  # fmt: skip
        columns["features"] = schema.fixed_size_list(columns["features"].astype(np.float32))
        pieces.append(pa.table(columns))
        storage.write_bytes(place, to_parquet(pieces[-1].replace_schema_metadata({"clarity.key": key})))
        bench.say(f"judging {NAMES.get(results.name, results.name)}: {min(part.stop, len(names))} of {len(names)}")
    return pa.concat_tables(pieces)


def other_attributes(bench: Bench) -> np.ndarray:
    """Attributes (A,) of the judges that should stay: not what a class is made of, as Black_Hair where one is black."""
    classes = [name.lower() for name in bench.model.class_names]
    return np.array([not any(name in attribute.lower() for name in classes) for attribute in bench.judges.attributes])


def attribute_table(bench: Bench, results: Results) -> pa.Table:
    """What the attribute net sees in each pair, for an audit: of the attributes that should stay, one row each.

    ``prob_image`` in the image, ``prob_initial`` in its reconstruction, where a search in the latent space starts, and
    ``prob_final`` in the counterfactual.
    """
    net = bench.judges.attribute_net
    assert net is not None
    stay = np.flatnonzero(other_attributes(bench))

    def seen(images: np.ndarray) -> np.ndarray:
        return judges.predict_probs(net, images, sigmoid=True)[:, stay]

    before = {"prob_image": seen(results.images.x), "prob_initial": seen(results.images.reconstruction)}
    probs = {name: found[results.of] for name, found in before.items()} | {"prob_final": seen(results.x_cf)}
    names = np.array(bench.judges.attributes)[stay]
    return pa.table(
        {
            "image_id": pa.array(np.repeat(np.array(results.images.ids)[results.of], len(stay))),
            "target": pa.array(np.repeat(results.target.astype(np.int32), len(stay))),
            "attribute": pa.array(np.tile(names, len(results.of))),
            **{name: pa.array(found.astype(np.float32).ravel()) for name, found in probs.items()},
        }
    )


def parts(count: int, size: int = 4096) -> list[slice]:
    """Slices of ``size`` that cover ``count`` rows."""
    return [slice(start, start + size) for start in range(0, count, size)]


# --- the table --------------------------------------------------------------------------------------------------------


def summary(
    bench: Bench, tables: Mapping[str, pa.Table], kinds: Mapping[str, str], speeds: Mapping[str, Any]
) -> list[dict]:
    """Rows of the table: each method over all pairs and for each class pair, on the common images and on all own."""
    methods = [set(table["image_id"].to_pylist()) for name, table in tables.items() if kinds[name] == "method"]
    common = set.intersection(*methods)
    rows = []
    for name, table in tables.items():
        ids = np.array(table["image_id"].to_pylist())
        inside = np.isin(ids, list(common))
        scopes = {"common": inside} if inside.all() else {"common": inside, "all": np.ones(len(ids), dtype=bool)}
        for scope, mask in scopes.items():
            if not mask.any():
                continue
            bench.say(f"summing up {NAMES.get(name, name)}, {scope} images")
            columns = {
                column: table[column].to_numpy(zero_copy_only=False)[mask]
                for column in table.column_names
                if column in ("image_id", "source", "target") or is_metric(column)
            }
            features, target = schema.matrix(table["features"])[mask], columns["target"]

            def frechet(chosen: np.ndarray, features: Any = features, target: Any = target) -> float | None:
                return metrics.frechet_distance(features[chosen], bench.real.features[int(target[chosen[0]])])

            for row in metrics.summarise(columns, frechet, draws=bench.draws):
                pair = {
                    f"{end}_name": None if row[end] is None else bench.model.class_names[row[end]]
                    for end in ("source", "target")
                }
                if row["source"] is None and name in speeds:
                    speed = metrics.Speed(**speeds[name])
                    row["counterfactuals_per_second"] = speed.counterfactuals_per_second
                    row["milliseconds_per_step"] = speed.milliseconds_per_step
                rows.append({"method": name, "kind": kinds[name], "images": scope, **pair, **row})
    return rows


def write_tables(bench: Bench, rows: list[dict], measured: Mapping[str, Any]) -> None:
    """The summary as Parquet, CSV, and Markdown for people, what was measured beside it."""
    head = ["method", "kind", "images", "source", "target", "source_name", "target_name", "num_images", "num_pairs"]
    every = dict.fromkeys([*metrics.METRICS_DOC, *(name for row in rows for name in row if is_metric(name))])
    present = [name for name in every if any(row.get(name) is not None for row in rows)]
    names = [*head, *(f"{name}{end}" for name in present for end in ("", "_low", "_high"))]
    names = [name for name in names if name in head or any(row.get(name) is not None for row in rows)]
    types = {
        "method": pa.string(),
        "kind": pa.string(),
        "images": pa.string(),
        "source": pa.int32(),
        "target": pa.int32(),
    }
    types |= {"source_name": pa.string(), "target_name": pa.string(), "num_images": pa.int64(), "num_pairs": pa.int64()}
    fields = [pa.field(name, types.get(name, pa.float64()), metadata={"doc": doc_of(name)}) for name in names]
    table = pa.table([pa.array([row.get(name) for row in rows], field.type) for name, field in zip(names, fields)],
                     schema=pa.schema(fields))  # fmt: skip
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    storage.write_bytes(bench.place("comparison.parquet"), buffer.getvalue())
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow(names)
    writer.writerows([["" if row.get(name) is None else row[name] for name in names] for row in rows])
    storage.write_bytes(bench.place("comparison.csv"), lines.getvalue().encode())
    speed = [f"- {step_line(row)}" for row in measured["steps"]]
    text = introduction(bench, measured) + markdown(rows, present)
    text += "\n".join(["\n## Time of a step\n", *speed, ""]) if speed else ""
    storage.write_bytes(bench.place("comparison.md"), text.encode())


def introduction(bench: Bench, measured: Mapping[str, Any]) -> str:
    """What a reader must know before the table: who was compared, who judged, and on which images."""
    model, jury, accuracy = bench.model, bench.judges, measured["accuracy"]
    shares = [f"{name.replace('_', ' ')} {100 * share:.2f} %" for name, share in accuracy.items() if name != "images"]
    members = f"{model.ensemble.config.num_members} latent classifiers"
    if model.image_ensemble is not None:
        members += f" and {model.image_ensemble.config.num_members} image classifiers"
    search = ", ".join(f"{name} {value}" for name, value in asdict(bench.config).items())
    oracle, code = jury.oracle.config, jury.autoencoders[0].config.code_dim  # type: ignore[union-attr]
    blocks = "-".join(str(width) for width in oracle.channels)
    training = ", ".join(f"{name} {value}" for name, value in jury.card.get("training", {}).items())
    seen = jury.card.get("num_labelled", "an unknown number of")
    real = sum(len(features) for features in bench.real.features)
    paragraphs = [
        "# Comparison",
        f"Model {model.fingerprint[:12]}: {members}. On {accuracy['images']:.0f} test images: {', '.join(shares)}.",
        f"Search: {search}.",
        f"Judges {jury.fingerprint[:12]}: an oracle of pairs of 3x3 convolutions {blocks} with max pooling and "
        f"{oracle.num_features} features, and an autoencoder with a code of {code} for each class and for all, trained "
        f"on {seen} training images: one half, chosen by image id. Classifiers trained on the whole training split "
        f"have seen that half too; the judges have seen no classifier. Their training: {training}.",
        f"Implausibility and Frechet distances compare with {real} training images; the control row draws from others. "
        "All images are judged after rounding to 8 bits. Metrics can be fooled by adversarial noise: the rows of FGSM "
        "and Schut show which ones are.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def is_metric(name: str) -> bool:
    """Whether a column of judged rows is summed up."""
    return name in metrics.METRICS_DOC or (name.startswith(metrics.FLIP) and not name.endswith(("_low", "_high")))


def doc_of(name: str) -> str:
    """What a column of the table says; empty for the columns that name a row."""
    if name.startswith(metrics.FLIP):
        return f"share of pairs on which the attribute net changes its mind on {name.removeprefix(metrics.FLIP)}"
    return metrics.METRICS_DOC.get(name, "")


def markdown(rows: list[dict], present: Sequence[str]) -> str:
    """The overall rows: a line for each metric, a column for each method, intervals in brackets."""
    out = []
    for scope in ("common", "all"):
        overall = [row for row in rows if row["images"] == scope and row["source"] is None]
        if not overall:
            continue
        counts = {(row["num_images"], row["num_pairs"]) for row in overall}
        title = "The same images for all" if scope == "common" else "All images of each method"
        sizes = ", ".join(f"{images} images, {pairs} pairs" for images, pairs in sorted(counts))
        out.append(f"\n## {title} ({sizes})\n")
        out.append("| | " + " | ".join(NAMES.get(row["method"], row["method"]) for row in overall) + " |")
        out.append("|---|" + "---|" * len(overall))
        for name in present:
            cells = [cell(row.get(name), row.get(f"{name}_low"), row.get(f"{name}_high"), name) for row in overall]
            out.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    out.append("\nIntervals: 95 %, bootstrap over images. An empty cell is null: unknown, or of too small a sample.\n")
    out += [f"- **{name.replace('_', ' ')}**: {doc_of(name)}" for name in present]
    return "\n".join(out) + "\n"


def is_share(name: str) -> bool:
    """Whether a metric is a share, to be read in percent."""
    return name.endswith(("validity", "agreement", "sparsity")) or name.startswith(metrics.FLIP)


def cell(value: float | None, low: float | None, high: float | None, name: str) -> str:
    """A number as people read it, with its interval."""
    if value is None:
        return ""

    def show(number: float) -> str:
        if is_share(name):
            return f"{100 * number:.1f}"
        return short(number)

    unit = " %" if is_share(name) else ""
    return f"{show(value)}{unit}" + (f" [{show(low)}, {show(high)}]" if low is not None and high is not None else "")


# --- measurements -----------------------------------------------------------------------------------------------------


def measure(
    bench: Bench, results: Mapping[str, Results], tables: Mapping[str, pa.Table], x: np.ndarray, label: np.ndarray
) -> dict[str, Any]:
    """What the paper claims beside its tables, measured; kept in ``measurements.json`` until something changes.

    Args:
        bench: see there.
        results: of every method, and others.
        tables: the same, judged.
        x: (N, C, H, W) uint8, all test images.
        label: (N,), -1 where unknown.
    """
    methods = [name for name, found in results.items() if found.kind == "method"]
    depends = [bench.key, bench.speed_pairs, bench.draws, asdict(bench.config), [results[name].key for name in methods]]
    key = hashlib.sha256(json.dumps(depends).encode()).hexdigest()
    place = bench.place("measurements.json")
    images = max((results[name] for name in methods), key=lambda found: len(found.of)).images
    timed = timings(bench, images, methods)
    if storage.exists(place) and (kept := storage.read_json(place)).get("key") == key:
        return kept | timed
    out = {
        "key": key,
        "accuracy": accuracies(bench, x, label),
        "parameters of one member": metrics.parameters_of_one_member(bench.model),
        **timed,
        "curves": curve_measures(bench, images),
        "gradients": gradient_measures(bench, images),
        "far from the data": far_measures(bench, images),
        "REVISE-E minus REVISE": paired(tables, "revise_e", "revise", bench.draws),
        "REVISE-E (latent) minus REVISE-E": paired(tables, "revise_e_latent", "revise_e", bench.draws),
        "Clarity minus Latent": paired(tables, "clarity", "latent", bench.draws),
    }
    storage.write_json(place, out)
    return out


def timings(bench: Bench, images: Images, methods: Sequence[str]) -> dict[str, Any]:
    """How fast methods and steps are; kept in ``timings.json``, so that nothing but its removal times them again."""
    depends = [bench.key, bench.speed_pairs, asdict(bench.config), methods]
    key = hashlib.sha256(json.dumps(depends).encode()).hexdigest()
    place = bench.place("timings.json")
    kept = storage.read_json(place) if storage.exists(place) else {}
    if kept.get("key") != key:
        found = {name: asdict(speed) for name, speed in speeds(bench, images, methods).items()}
        kept = {"key": key, "speed": found, "steps": step_times(bench, images)}
        storage.write_json(place, kept)
    return {name: kept[name] for name in ("speed", "steps")}


def accuracies(bench: Bench, x: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Shares of the test images that each classifier sees as labelled; images without a label are left out."""
    known = label >= 0
    images, label = x[known], label[known]
    z = torch.cat(
        [encode_rows(bench.model.vae, torch.from_numpy(images[part]).float() / 255)[0] for part in parts(len(images))]
    )
    latent = torch.softmax(logits_rows(bench.model.ensemble, z), -1)
    seen = [quantise(decode_rows(bench.model.vae, z[part])) for part in parts(len(z))]
    oracle = bench.judges.oracle

    def share(found: Any) -> float:
        return float((np.asarray(found) == label).mean())

    out = {
        "images": float(len(label)),
        "latent_ensemble": share(latent.mean(0).argmax(-1)),
        "latent_member": float(np.mean([share(member.argmax(-1)) for member in latent])),
        "oracle": share(judges.predict_probs(oracle, images).argmax(1)),
        "oracle_on_reconstructions": share(judges.predict_probs(oracle, np.concatenate(seen)).argmax(1)),
    }
    if bench.model.image_ensemble is not None:
        logits = [
            logits_rows(bench.model.image_ensemble, torch.from_numpy(images[part]).float() / 255)
            for part in parts(len(images), 1024)
        ]
        probs = torch.softmax(torch.cat(logits, dim=1), -1)
        out["image_ensemble"] = share(probs.mean(0).argmax(-1))
        out["image_member"] = float(np.mean([share(member.argmax(-1)) for member in probs]))
    return out


def question(images: Images, count: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``count`` pairs, image by image and all its targets."""
    pairs = [(b, k) for b in range(len(images.ids)) for k in range(num_classes) if k != images.source[b]][:count]
    of, target = np.array(pairs).T
    return of, target


def speeds(bench: Bench, images: Images, methods: Sequence[str]) -> dict[str, metrics.Speed]:
    """Whole searches of the same pairs by each method, one after another in this process."""
    of, target = question(images, bench.speed_pairs, bench.model.num_classes)
    pairs = pairs_of(bench.model, images, of, target)
    out = {}
    for method in methods:
        bench.say(f"timing {NAMES.get(method, method)} on {len(pairs)} pairs")
        out[method] = metrics.time_search(bench.model, method, pairs, bench.config)
    return out


def step_times(bench: Bench, images: Images) -> list[dict[str, Any]]:
    """The paper's claim on speed: Eq. 5 beside Eq. 3, and Clarity beside REVISE-E with the same number of members.

    ``gradient`` rows time one gradient of the loss with respect to the codes in plain PyTorch, for one image and for
    STEP_PAIRS pairs; ``search`` rows time an update of one pair in searches of STEP_PAIRS pairs, each by its engine.
    Medians over repeats in which all take turns; ``ratio`` is the median of the repeats' own, ``_low`` and ``_high``
    the least and the largest.
    """
    model, ensemble = bench.model, bench.model.image_ensemble
    if ensemble is None:
        return []
    members = min(ensemble.config.num_members, model.ensemble.config.num_members)
    rows: list[dict[str, Any]] = []

    def compare(kind: str, fast: str, slow: str, count: int, pairs: Pairs, works: dict[str, Callable[[], int]]) -> None:
        """One row for each work but the last against the last."""
        seconds = metrics.seconds_in_turns(works)
        *engines, last = works
        for engine in engines:
            ratios = seconds[last] / seconds[engine]
            row = {"kind": kind, "fast": fast, "slow": slow, "members": count, "pairs": len(pairs), "engine": engine}
            row |= {"fast_ms": 1000 * np.median(seconds[engine]), "slow_ms": 1000 * np.median(seconds[last])}
            row |= {"ratio": np.median(ratios), "ratio_low": ratios.min(), "ratio_high": ratios.max()}
            rows.append(
                {name: float(value) if isinstance(value, np.floating) else value for name, value in row.items()}
            )
            bench.say(step_line(rows[-1]))

    for batch in (1, STEP_PAIRS):
        of, target = question(images, batch, model.num_classes)
        pairs = pairs_of(model, images, of, target)
        for fast, slow, count in (("latent", "revise", 1), ("clarity", "revise_e", members)):
            latent, image = model.ensemble.select(range(count)), ensemble.select(range(count))

            def through_decoder(z: torch.Tensor, image: ImageEnsemble = image) -> torch.Tensor:
                return image(model.vae.decode(z))

            works = {
                name: metrics.gradient_work(logits_of, pairs.z, pairs.target)
                for name, logits_of in (("autograd", latent), (slow, through_decoder))
            }
            compare("gradient", fast, slow, count, pairs, works)
            if batch == 1:
                continue
            same = replace(model, ensemble=latent, image_ensemble=image)
            # So close to certainty that next to no row ends early: what is timed is the step.
            long = replace(bench.config, min_target_prob=1 - 1e-6, max_steps=10)

            def search(method: str, engine: str, same: Model = same, pairs: Pairs = pairs, long: Any = long) -> int:
                return int(METHODS[method].search(same, pairs, long, engine=engine).steps.sum())

            chosen = METHODS[fast].search(same, pairs, replace(long, max_steps=0)).engine
            works = {engine: partial(search, fast, engine) for engine in dict.fromkeys((chosen, "plain"))}
            compare("search", fast, slow, count, pairs, {**works, slow: partial(search, slow, "auto")})
    return rows


def step_line(row: Mapping[str, Any]) -> str:
    """One row of ``step_times`` in words."""
    what = "a gradient" if row["kind"] == "gradient" else "an update of one pair"
    pairs, members = (f"{row[name]} {name[:-1] if row[name] == 1 else name}" for name in ("pairs", "members"))
    fast, slow = (f"{NAMES[row[name]]} {short(row[f'{name}_ms'])} ms" for name in ("fast", "slow"))
    low, ratio, high = (short(row[name]) for name in ("ratio_low", "ratio", "ratio_high"))
    return f"{what}, {pairs}, {members}, engine {row['engine']}: {fast}, {slow}, {ratio} times [{low}, {high}]"


def short(number: float) -> str:
    """Three digits, and no exponent for what is large."""
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def curve_measures(bench: Bench, images: Images, segments: int = 100) -> dict[str, dict[str, float]]:
    """Figures 5 and 7 over many segments between images of different classes, means over segments and members."""
    model = bench.model
    known = np.flatnonzero((images.label >= 0) & (images.label == images.source))
    ends = [(a, b) for a, b in zip(known, np.roll(known, 1)) if images.label[a] != images.label[b]][:segments]
    curves: dict[str, list[np.ndarray]] = {}
    for a, b in ends:
        z = metrics.along_segment(torch.from_numpy(images.z[a]), torch.from_numpy(images.z[b]), 101)
        target = int(images.label[b])
        curves.setdefault("latent classifiers", []).append(metrics.target_curves(model.ensemble, z, target))
        if model.image_ensemble is not None:
            drawn = decode_rows(model.vae, z)
            curves.setdefault("image classifiers", []).append(
                metrics.target_curves(model.image_ensemble, drawn, target)
            )
            walk = metrics.along_segment(drawn[0], drawn[-1], 101)
            curves.setdefault("image classifiers, image space", []).append(
                metrics.target_curves(model.image_ensemble, walk, target)
            )
    out = {}
    for name, members in curves.items():
        each, together = np.stack(members), np.stack([curve.mean(0) for curve in members])
        for label, values in ((name, each), (f"{name}, mean of the ensemble", together)):
            out[label] = {
                "segments": float(len(ends)),
                "monotonicity": float(metrics.monotonicity(values).mean()),
                "plateau_width": float(metrics.plateau_width(values).mean()),
                "steepest_slope": float(np.median(metrics.steepest(values))),
            }
    return out


def gradient_measures(bench: Bench, images: Images, count: int = 90) -> dict[str, dict[str, float]]:
    """How much the members' gradients with respect to the code disagree, on the same codes and targets."""
    model = bench.model
    of, target = question(images, count, model.num_classes)
    z, wanted = torch.from_numpy(images.z[of]), torch.from_numpy(target)
    members = [model.ensemble.config.num_members]
    if model.image_ensemble is not None:
        members.append(model.image_ensemble.config.num_members)
    if min(members) < 2:
        return {}
    latent = model.ensemble.select(range(min(members)))
    out = {"latent classifiers": metrics.gradient_spread(metrics.member_gradients(latent, z, wanted))}
    image = model.image_ensemble
    if image is not None:
        image = image.select(range(min(members)))
        blocks = [
            metrics.member_gradients(lambda code: image(model.vae.decode(code)), z[part], wanted[part])
            for part in parts(len(z), 30)
        ]
        out["image classifiers"] = metrics.gradient_spread(np.concatenate(blocks, axis=1))
    return out


def far_measures(bench: Bench, images: Images, draws: int = 200) -> list[dict[str, float]]:
    """Mean epistemic uncertainty and certainty at random codes of growing norm, in units of the images' codes' norm."""
    model = bench.model
    generator = torch.Generator().manual_seed(0)
    way = torch.nn.functional.normalize(torch.randn(draws, model.latent_dim, generator=generator), dim=1)
    norm = float(np.median(np.linalg.norm(images.z, axis=1)))
    out = []
    for radius in (1.0, 2.0, 4.0):
        z = way * norm * radius
        row = {"radius": radius}
        seen = {"latent": logits_rows(model.ensemble, z)}
        if model.image_ensemble is not None:
            seen["image"] = logits_rows(model.image_ensemble, decode_rows(model.vae, z))
        for name, logits in seen.items():
            row[f"{name}_epistemic"] = float(decompose(logits).epistemic.mean())
            row[f"{name}_certainty"] = float(torch.softmax(logits, -1).mean(0).max(-1).values.mean())
        out.append(row)
    return out


def paired(tables: Mapping[str, pa.Table], better: str, than: str, draws: int) -> dict[str, Any] | None:
    """Difference of two methods on the pairs that both answered, for a few metrics, with intervals."""
    if better not in tables or than not in tables:
        return None
    pairs = [
        list(zip(tables[name]["image_id"].to_pylist(), tables[name]["target"].to_pylist())) for name in (better, than)
    ]
    places = [{key: place for place, key in enumerate(keys)} for keys in pairs]
    keys = [key for key in pairs[0] if key in places[1]]
    if not keys:
        return None
    names = ("oracle_agreement", "reencoded_agreement", "im1", "implausibility", "l1_x", "steps")
    values = [
        np.stack([tables[name][metric].to_numpy()[[place[key] for key in keys]] for metric in names], axis=1)
        for name, place in zip((better, than), places)
    ]
    mean, low, high = metrics.bootstrap_interval(values[0] - values[1], np.array([key[0] for key in keys]), draws=draws)
    return {"pairs": len(keys), **{name: [mean[q], low[q], high[q]] for q, name in enumerate(names)}}


# --- figures ----------------------------------------------------------------------------------------------------------


def draw(
    bench: Bench,
    results: Mapping[str, Results],
    rows: list[dict],
    full: Images,
    flat: Model | None,
    tested: tuple[np.ndarray, np.ndarray, list[str]],
) -> dict:
    """Every figure of the paper that models and methods allow; returns what was measured on the way.

    Args:
        bench: see there.
        results: of every method, and others.
        rows: of the summary.
        full: images of the method that has most of them.
        flat: the model with a 2-D latent space, where there is one.
        tested: pixels, labels and ids of all test images.
    """
    names = bench.model.class_names

    def write(name: str, picture: plots.Picture) -> None:
        picture.write(bench.place("figures", name), bench.formats)
        bench.say(f"figure {name}")

    def grid(file: str, pairs: Iterable[tuple[str, str]], methods: Sequence[str], vae: bool, differences: bool) -> None:
        methods = [method for method in methods if method in results]
        found = [(pair, cells) for pair in pairs if (cells := example(names, results, methods, pair, vae))]
        if found and methods:
            columns = ["original", *(["VAE"] if vae else []), *(NAMES[method] for method in methods)]
            labels = [f"{source} → {target}" for (source, target), _ in found]
            notes = [notes for _, (_, notes) in found]
            pictures = [images for _, (images, _) in found]
            write(file, plots.image_grid(pictures, columns, labels, notes=notes, differences=differences))

    table_1 = ["fgsm", "schut", "revise_e", "clarity"]
    table_2 = ["revise_e", "revise_e_latent", "clarity"]
    known = [pair for pair in (*TABLE_1, *TABLE_2) if set(pair) <= set(names)] or [
        (names[k], names[(k + 1) % len(names)]) for k in range(min(6, len(names)))
    ]
    grid("table1", known, table_1, False, bench.differences)
    grid("table2", known, table_2, True, bench.differences)
    grid("examples", [pair for pair in EXAMPLES if set(pair) <= set(names)] or known[:2],
         ["fgsm", "schut", "revise", "revise_e", "latent", "clarity"], False, True)  # fmt: skip
    for method in ("clarity", *(name for name in results if name != "clarity" and name in METHODS)):
        if method in results:
            values = np.full((len(names), len(names)), np.nan)
            for row in rows:
                if row["method"] == method and row["images"] == "common" and row["source"] is not None:
                    values[row["source"], row["target"]] = row["oracle_agreement"]
            title = f"{NAMES.get(method, method)}: the oracle sees the target"
            write(
                f"pairs_{method}",
                plots.class_pair_map(
                    values, names, title=title, label="share of pairs", percent=True, bounds=(0.0, 1.0)
                ),
            )
    overall = {row["method"]: row for row in rows if row["images"] == "common" and row["source"] is None}
    shares = {
        NAMES.get(name, name): tuple(row[f"oracle_agreement{end}"] for end in ("", "_low", "_high"))
        for name, row in sorted(overall.items(), key=lambda item: -item[1]["oracle_agreement"])
    }
    write("oracle_agreement", panels.score_bars(shares, label="share on which the oracle sees the target"))

    if bench.model.image_ensemble is None:
        bench.say("figures 5, 7, 8 and 10 need image classifiers: left out")
        return {}
    segments = [pair for pair in SEGMENTS if set(pair) <= set(names)] or known[:2]
    segments = [pair for pair in segments if all((full.label == names.index(name)).any() for name in pair)]
    if not segments:
        bench.say("figures 5, 7, 8 and 10 need labelled images: left out")
        return {}
    curves(bench, full, segments, write)
    traces(bench, full, segments[0], write)
    return {} if flat is None else latent_map(bench, flat, tested, segments[-1], write)


def example(
    names: Sequence[str], results: Mapping[str, Results], methods: Sequence[str], pair: tuple[str, str], vae: bool
) -> tuple[list[np.ndarray | None], list[str]] | None:
    """One row of a grid: an image of the source, chosen by ``first_of``, and what each method made of it."""
    source, target = (names.index(name) for name in pair)
    if not methods:
        return None
    least = results[min(methods, key=lambda method: len(results[method].images.ids))].images
    if not (least.label == source).any():
        return None
    chosen = first_of(least, source)
    pictures: list[np.ndarray | None] = [least.x[chosen], *([least.reconstruction[chosen]] if vae else [])]
    notes = ["" for _ in pictures]
    for method in methods:
        found = results[method]
        place = found.images.row.get(least.ids[chosen])
        rows = np.flatnonzero((found.of == (-1 if place is None else place)) & (found.target == target))
        pictures.append(found.x_cf[rows[0]] if len(rows) else None)
        reached = len(rows) and found.columns["strict_validity"][rows[0]]
        notes.append("" if reached or not len(rows) else "not converged")
    return pictures, notes


def first_of(images: Images, label: int, *also: np.ndarray) -> int:
    """The first image of a class that the model is sure of (probability above 0.9), and whatever else sees it, in
    ``also``; where there is none, the first that they see as such, or of the class.
    """
    of_class = images.label == label
    agreed = np.all([of_class, *(seen == label for seen in (images.source, *also))], axis=0)
    for wanted in (agreed & (images.certainty > 0.9), agreed, of_class):
        if wanted.any():
            return int(np.flatnonzero(wanted)[0])
    raise ValueError(f"no image is of class {label}")


def curves(bench: Bench, images: Images, segments: Sequence[tuple[str, str]], write: Callable[..., None]) -> None:
    """Figures 5 and 7."""
    model, names = bench.model, bench.model.class_names
    assert model.image_ensemble is not None
    five, seven = {}, {}
    for letter, (source, target) in zip("abc", segments):
        a, b = (first_of(images, names.index(name)) for name in (source, target))
        z = metrics.along_segment(torch.from_numpy(images.z[a]), torch.from_numpy(images.z[b]))
        drawn = decode_rows(model.vae, z)
        walk = metrics.along_segment(drawn[0], drawn[-1])
        k = names.index(target)
        image = metrics.target_curves(model.image_ensemble, drawn, k)
        title = f"({letter}) {source} → {target}"
        five[title] = (image, metrics.target_curves(model.ensemble, z, k))
        seven[title] = (metrics.target_curves(model.image_ensemble, walk, k).mean(0), image.mean(0))
    write("figure5", panels.probability_curves(five))
    write("figure7", panels.segment_curves(seven))


def traces(bench: Bench, images: Images, pair: tuple[str, str], write: Callable[..., None]) -> None:
    """Figure 8, and the same Clarity search as a strip of images."""
    names, shown = bench.model.class_names, {}
    place, target = first_of(images, names.index(pair[0])), names.index(pair[1])
    for method in ("revise_e", "clarity"):
        pairs = pairs_of(bench.model, images, np.array([place]), np.array([target]))
        steps = metrics.own_steps(bench.model, method, pairs, bench.config)[0]
        ends = decode_rows(bench.model.vae, torch.from_numpy(steps["point"][[0, -1]])).numpy()
        shown[NAMES[method]] = plots.Trace(
            steps["target_prob"], steps["aleatoric"], steps["epistemic"], (ends[0], ends[1])
        )
    write(
        "figure8",
        plots.search_traces(shown, source=pair[0], target=pair[1], min_target_prob=bench.config.min_target_prob),
    )
    moments = np.unique(np.linspace(0, len(steps["point"]) - 1, 9).round().astype(int))
    strip = decode_rows(bench.model.vae, torch.from_numpy(steps["point"][moments])).numpy()
    write(
        "path", plots.path_strip(list(strip), moments.tolist(), steps["target_prob"][moments].tolist(), target=pair[1])
    )


def latent_map(
    bench: Bench,
    flat: Model,
    tested: tuple[np.ndarray, np.ndarray, list[str]],
    pair: tuple[str, str],
    write: Callable[..., None],
    paths: int = 10,
) -> dict[str, Any]:
    """Figure 10: the methods' paths in a 2-D latent space over the epistemic uncertainty of their classifiers.

    Draws the first of ``paths`` starts, test images of the source class, and measures all of them: how many end among
    the target's test images, that is no farther from their 5 nearest than 95 % of those are from each other.
    """
    names = bench.model.class_names
    source, target = (names.index(name) for name in pair)
    shown = np.concatenate([np.flatnonzero(tested[1] == k)[:CLOUD_IMAGES] for k in (source, target)])
    x, label, ids = tested[0][shown], tested[1][shown], [tested[2][place] for place in shown]
    here = see(flat, ids, x, label)
    points = [here.z[label == k] for k in (source, target)]
    wide = 1.6 * np.abs(here.z).max(axis=0)
    extent = (-float(wide[0]), float(wide[0]), -float(wide[1]), float(wide[1]))
    z1, z2 = np.meshgrid(np.linspace(*extent[:2], 61), np.linspace(*extent[2:], 61))
    grid = torch.from_numpy(np.stack([z1.ravel(), z2.ravel()], axis=1).astype(np.float32))
    assert flat.image_ensemble is not None
    logits = {
        "latent ensemble": logits_rows(flat.ensemble, grid),
        "image ensemble": torch.cat(
            [logits_rows(flat.image_ensemble, decode_rows(flat.vae, grid[part])) for part in parts(len(grid), 512)],
            dim=1,
        ),
    }
    maps = {name: decompose(values).epistemic.numpy().reshape(z1.shape) for name, values in logits.items()}
    first = first_of(here, source)
    seen = np.flatnonzero((label == source) & (here.source == source))
    starts = np.array([first, *(place for place in seen if place != first)][:paths])
    cloud = torch.from_numpy(points[1])
    # Each point's nearest is itself.
    among = torch.cdist(cloud, cloud).topk(min(6, len(cloud)), largest=False).values[:, 1:].mean(1).quantile(0.95)
    maps_of: dict[str, panels.LatentMap] = {}
    ends: dict[str, dict[str, float]] = {}
    for method in ("fgsm", "schut", "revise_e", "clarity"):
        pairs = pairs_of(flat, here, starts, np.full(len(starts), target))
        steps = metrics.own_steps(flat, method, pairs, bench.config)
        walks, last = [found["point"] for found in steps], torch.from_numpy(steps[0]["point"][-1:])
        if METHODS[method].space == "image":
            walks = [encode_rows(flat.vae, torch.from_numpy(walk[[0, -1]] if i else walk))[0].numpy()
                     for i, walk in enumerate(walks)]  # fmt: skip
        else:
            last = decode_rows(flat.vae, last)
        group = "latent ensemble" if method == "clarity" else "image ensemble"
        maps_of[NAMES[method]] = panels.LatentMap(maps[group], walks[0], last[0].numpy(), group)
        away = torch.cdist(torch.from_numpy(np.stack([walk[-1] for walk in walks])), cloud)
        away = away.topk(min(5, len(cloud)), largest=False).values.mean(1)
        ends[NAMES[method]] = {
            "paths": float(len(walks)),
            "reached": float(np.mean([found["target_prob"][-1] > bench.config.min_target_prob for found in steps])),
            "end_in_cloud": float((away <= among).float().mean()),
            "moved": float(np.mean([np.linalg.norm(walk[-1] - walk[0]) for walk in walks])),
        }
    write("figure10", panels.latent_paths(maps_of, extent, points[0], points[1], source=pair[0], target=pair[1]))
    nearest = torch.cdist(grid, torch.from_numpy(here.z)).min(dim=1).values.numpy()
    far = nearest > here.z.std()
    out: dict[str, Any] = {"far": "more than one standard deviation of the codes from the nearest of them"}
    for name, values in logits.items():
        epistemic, certainty = maps[name].ravel(), torch.softmax(values, -1).mean(0).max(-1).values.numpy()
        out[name] = {
            "epistemic_near": float(epistemic[~far].mean()), "epistemic_far": float(epistemic[far].mean()),
            "certainty_near": float(certainty[~far].mean()), "certainty_far": float(certainty[far].mean()),
        }  # fmt: skip
    return out | {"paths": ends}
