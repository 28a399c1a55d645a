"""What is compared: the results of audits, control rows and other tools' images, scored by the same networks."""

import hashlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from clarity import data, judges, schema, storage
from clarity.audit.commits import to_parquet
from clarity.audit.plan import digest
from clarity.audit.read import read_audit
from clarity.ids import noise
from clarity.images import Preprocessing, decode_png, encode_png
from clarity.methods import METHODS, Pairs, classifier_logits, ensemble_of
from clarity.model import Model
from clarity.paper import metrics
from clarity.paper.evaluators import Judges
from clarity.rows import decode_rows, encode_rows, logits_rows, mean_probs
from clarity.tables import quantise
from clarity.training.evaluate import encode_pixels

log = logging.getLogger(__name__)

#: The most images of the control rows and of COUT, the slowest metric.
CHOSEN_IMAGES = 1000
#: Rows of the table beside the methods: the image itself, decode(z) of it, a random training image of the target.
CONTROLS = ("original", "reconstruction", "real image")
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


@dataclass(frozen=True)
class Images:
    """Evaluated images with what the model makes of them."""

    ids: np.ndarray  # (B,), text
    x: np.ndarray  # (B, C, H, W) uint8
    z: np.ndarray  # (B, D)
    log_var: np.ndarray
    reconstruction: np.ndarray  # (B, C, H, W) uint8
    source: np.ndarray  # (B,)
    label: np.ndarray  # (B,), -1 where unknown
    certainty: np.ndarray  # (B,), probability of the source

    @cached_property
    def row(self) -> dict[str, int]:
        """Index of each image by its id."""
        return {name: index for index, name in enumerate(self.ids)}


@dataclass(frozen=True)
class Results:
    """Images to score under one name: P pairs; ``columns`` hold what is known of them already, (P,) each.

    ``of`` (P,) are the indices of the originals.
    """

    name: str
    images: Images
    of: np.ndarray
    target: np.ndarray
    x_cf: np.ndarray  # (P, C, H, W) uint8
    columns: dict[str, np.ndarray]


def sample_images(dataset: data.Dataset, preprocessing: Preprocessing, count: int, uri: str) -> None:
    """Write the Parquet file of the images to compare on, unless it is there; ValueError where it holds another sample.

    ``count`` images (0: all) with as many of each class as there are, the first of each class in the listing's order,
    preprocessed. As a test split, whatever they are: the ensemble explains them, not classifiers by fold.
    """
    listing = data.list_images(dataset)
    key = digest([data.listing_fingerprint(listing), preprocessing.to_json(), count]).encode()
    if storage.exists(uri):
        with storage.open_parquet(uri) as kept:
            if (kept.schema_arrow.metadata or {}).get(b"clarity.key") != key:
                raise ValueError(
                    f"out: expected a sample of {dataset.source} {dataset.split} in {storage.display(uri)}, found "
                    "another: choose another directory"
                )
        return
    labels = listing["label_name"].to_pandas()
    rank = labels.groupby(labels, dropna=False).cumcount()
    chosen = np.argsort(rank.to_numpy(), kind="stable")[: count or None]
    pixels, ids, names, _ = data.read_all(dataset, listing.take(np.sort(chosen)), preprocessing)
    columns = {"image_id": ids, "image": encode_png(pixels), "label": pa.array(names, pa.string())}
    table = pa.table(columns | {"split": ["test"] * len(ids)})
    turn = {name: index for index, name in enumerate(listing["image_id"].take(chosen).to_pylist())}
    table = table.take(np.argsort([turn[name] for name in ids]))
    storage.write_bytes(uri, to_parquet(table.replace_schema_metadata({b"clarity.key": key})))


def encode_images(model: Model, ids: Sequence[str], x: np.ndarray, label: np.ndarray) -> Images:
    """Encode, reconstruct and classify images, row by row as the audit does."""
    z, log_var = encode_pixels(model.vae, torch.from_numpy(x))
    reconstruction = quantise(decode_rows(model.decoder, z))
    probs = mean_probs(logits_rows(model.ensemble, z))
    source, certainty = probs.argmax(1), probs.max(1)
    return Images(np.array(ids), x, z.numpy(), log_var.numpy(), reconstruction, source, label, certainty)


def pairs_of(model: Model, images: Images, of: np.ndarray, target: np.ndarray) -> Pairs:
    """Search pairs: ``of`` names the images, ``target`` what each is to become."""
    draws = noise(images.ids[of], model.latent_dim)
    arrays = (images.x[of].astype(np.float32) / 255, images.z[of], images.log_var[of], draws, target.astype(np.int64))
    return Pairs(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


def first_pairs(images: Images, count: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``count`` pairs, image by image and all its targets."""
    pairs = [(b, k) for b in range(len(images.ids)) for k in range(num_classes) if k != images.source[b]][:count]
    of, target = np.array(pairs).T
    return of, target


def results_of_audit(model: Model, method: str, uri: str) -> Results:
    """What an audit holds, with the class that the method's own classifier sees in each result."""
    audit = read_audit(uri)
    made_by = str(audit.plan.model["fingerprint"])
    if audit.plan.method != method or made_by != model.fingerprint:
        raise ValueError(
            f"expected an audit of {method} with model {model.fingerprint[:12]} in {storage.display(uri)}, found one "
            f"of {audit.plan.method} with {made_by[:12]}: give the model that made it, or leave the audit out"
        )
    codes = audit.codes.to_table()
    codes = codes.filter(pc.equal(codes["status"], "ok"))
    if audit.plan.images != "png" or audit.plan.model.get("num_folds") or not len(codes):
        raise ValueError(
            f"expected an audit with images, by the whole ensemble, in {storage.display(uri)}: explain the test split, "
            "with pictures"
        )
    label = codes["label"].fill_null(-1).to_numpy()
    images = encode_images(model, codes["image_id"].to_pylist(), decode_png(codes["x"], model.image_shape), label)
    images = replace(images, source=codes["source"].to_numpy().astype(np.int64))
    table = audit.counterfactuals.to_table()
    of = np.array([images.row[name] for name in table["image_id"].to_pylist()], dtype=np.int64)
    target = table["target"].to_numpy().astype(np.int64)
    x_cf = decode_png(table["x_cf"], model.image_shape)
    points = schema.matrix(table["z_cf"]) if METHODS[method].space == "latent" else x_cf.astype(np.float32) / 255
    seen = np.zeros(len(points), np.int64)
    for part in parts(len(points)):
        seen[part] = mean_probs(classifier_logits(model, method, torch.from_numpy(points[part].copy()))).argmax(1)
    steps = table["steps"].to_numpy().astype(float)
    columns: dict[str, np.ndarray] = {
        "strict_validity": table["converged"].to_numpy(zero_copy_only=False).astype(float),
        "argmax_validity": (seen == target).astype(float),
        "reencoded_agreement": (table["reencoded_class"].to_numpy() == target).astype(float),
        "l1_z": table["distance_z_l1"].to_numpy(),
        "steps": steps,
        "gradient_evaluations": steps * members_of(model, method),
    }
    for kind in ("predictive", "aleatoric", "epistemic"):
        for end in ("initial", "final"):
            columns[f"{kind}_{end}"] = table[f"{kind}_{end}"].fill_null(float("nan")).to_numpy()
    return Results(method, images, of, target, x_cf, columns)


def members_of(model: Model, method: str) -> int:
    """Members whose gradients one step of a method takes."""
    return 1 if METHODS[method].single else ensemble_of(model, method).config.num_members


def common_images(results: Sequence[Results], most: int | None = None) -> set[str]:
    """Ids of the images that all results answer for; of more than ``most`` of them some, drawn from their ids."""
    ids = set.intersection(*(set(found.images.ids[np.unique(found.of)].tolist()) for found in results))
    return set(sorted(ids, key=lambda name: hashlib.sha256(name.encode()).digest())[:most])


def restrict(results: Results, ids: set[str]) -> Results:
    """The part of some results that is about the images with these ids."""
    kept = np.isin(results.images.ids[results.of], list(ids))
    if kept.all():
        return results
    return replace(
        results,
        of=results.of[kept],
        target=results.target[kept],
        x_cf=results.x_cf[kept],
        columns={name: values[kept] for name, values in results.columns.items()},
    )


def control_results(name: str, like: Results, model: Model, real: metrics.Reality) -> Results:
    """The control row ``name`` for the same pairs as ``like``."""
    images, of, target = like.images, like.of, like.target
    if name == "original":
        x_cf = images.x[of]
    elif name == "reconstruction":
        x_cf = images.reconstruction[of]
    else:
        # The share of normal numbers below a draw is uniform, and depends on the pair alone.
        draws = torch.from_numpy(noise([f"{name} {k}" for name, k in zip(images.ids[of], target)], 1)[:, 0])
        x_cf = np.zeros((len(of), *images.x.shape[1:]), np.uint8)
        for p, (share, k) in enumerate(zip(torch.special.ndtr(draws).tolist(), target)):
            pool = real.images[k]
            if len(pool):
                x_cf[p] = pool[min(int(share * len(pool)), len(pool) - 1)]
    return Results(name, images, of, target, x_cf, reencoded(model, images, of, target, x_cf))


def external_results(name: str, uri: str, like: Results, model: Model) -> Results:
    """Counterfactual images made elsewhere: an npz file with image_id, target (class names) and image.

    Images are (N, C, H, W) or (N, H, W), uint8 or floats in [0, 1]. Rows whose image is not compared here, or is of the
    target already, are left out and counted; ValueError: entries are missing, a target is unknown, or no row is left.
    """
    content = np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False)
    if missing := sorted({"image_id", "target", "image"} - set(content.files)):
        raise ValueError(f"{storage.display(uri)} needs image_id, target and image, missing: {', '.join(missing)}")
    names = list(model.class_names)
    if unknown := sorted({str(wanted) for wanted in content["target"]} - set(names)):
        raise ValueError(f"{storage.display(uri)}: unknown target {unknown[0]!r}; classes are {', '.join(names)}")
    of = np.array([like.images.row.get(str(image_id), -1) for image_id in content["image_id"]])
    target = np.array([names.index(str(wanted)) for wanted in content["target"]], dtype=np.int64)
    kept = np.flatnonzero((of >= 0) & (like.images.source[of] != target))
    log.info("%s: %d images, %d left out: not compared, or of the target already", name, len(kept), len(of) - len(kept))
    if not len(kept):
        raise ValueError(f"{storage.display(uri)} holds no counterfactual of an image that is compared here")
    pictures = content["image"][kept].reshape(-1, *model.image_shape)
    x_cf = np.stack([model.preprocessing.apply(picture) for picture in pictures])
    columns = reencoded(model, like.images, of[kept], target[kept], x_cf)
    return Results(name, like.images, of[kept], target[kept], x_cf, columns)


def reencoded(
    model: Model, images: Images, of: np.ndarray, target: np.ndarray, x_cf: np.ndarray
) -> dict[str, np.ndarray]:
    """What the latent ensemble makes of images that come without codes."""
    agreement, moved = np.zeros(len(of)), np.zeros(len(of))
    for part in parts(len(of)):
        z, _ = encode_rows(model.vae, torch.from_numpy(x_cf[part]).float() / 255)
        seen = mean_probs(logits_rows(model.ensemble, z)).argmax(1)
        agreement[part], moved[part] = seen == target[part], metrics.l1(z.numpy(), images.z[of[part]])
    return {"reencoded_agreement": agreement, "l1_z": moved}


def score(results: Results, jury: Judges, real: metrics.Reality, chosen: set[str]) -> pa.Table:
    """One row for each pair: what is known of it, and every metric (COUT for ``chosen`` ids)."""
    images, names = results.images, results.images.ids[results.of]
    swapped, stay = np.isin(names, list(chosen)), other_attributes(jury)
    pieces = []
    for part in parts(len(names)):
        of, target = results.of[part], results.target[part]
        known: dict[str, np.ndarray] = {
            "image_id": names[part],
            "label": images.label[of],
            "source": images.source[of],
            "target": target,
            **{name: values[part] for name, values in results.columns.items()},
        }
        pictures = images.x[of], images.reconstruction[of], results.x_cf[part]
        scores = metrics.judge_images(jury, real, *pictures, images.source[of], target, stay, swapped[part])
        features = schema.fixed_size_list(scores.pop("features").astype(np.float32))
        pieces.append(pa.table({**known, **scores, "features": features}))
        log.info("scored %s: %d of %d", NAMES.get(results.name, results.name), part.start + len(of), len(names))
    return pa.concat_tables(pieces)


def other_attributes(jury: Judges) -> np.ndarray:
    """Attributes (A,) that should stay: not what a class is made of, as Black_Hair where a class is black."""
    classes = [name.lower() for name in jury.class_names]
    return np.array([not any(name in attribute.lower() for name in classes) for attribute in jury.attributes])


def attribute_table(results: Results, jury: Judges) -> pa.Table:
    """The attributes of each pair that should stay, as the attribute network sees them, one row each.

    ``prob_initial`` is that in the reconstruction, where a search in the latent space starts.
    """
    net = jury.attribute_net
    assert net is not None
    stay = np.flatnonzero(other_attributes(jury))

    def seen(images: np.ndarray) -> np.ndarray:
        return judges.predict_probs(net, images, sigmoid=True)[:, stay]

    before = {"prob_image": seen(results.images.x), "prob_initial": seen(results.images.reconstruction)}
    probs = {name: found[results.of] for name, found in before.items()} | {"prob_final": seen(results.x_cf)}
    return pa.table(
        {
            "image_id": pa.array(np.repeat(results.images.ids[results.of], len(stay))),
            "target": pa.array(np.repeat(results.target.astype(np.int32), len(stay))),
            "attribute": pa.array(np.tile(np.array(jury.attributes)[stay], len(results.of))),
            **{name: pa.array(found.astype(np.float32).ravel()) for name, found in probs.items()},
        }
    )


def parts(count: int, size: int = 4096) -> list[slice]:
    """Slices of ``size`` that cover ``count`` rows."""
    return [slice(start, start + size) for start in range(0, count, size)]
