#!/usr/bin/env python
"""Are wrong labels found? Flips labels before training, explains out of fold, and ranks; cleanlab ranks beside.

    python docs/labels.py MODEL --data DATA --out runs/labels

MODEL is a trained model of the source: its VAE, into which labels do not enter, is used as it is; latent ensembles are
trained again on the flipped labels, by folds, and each image is explained by the ensemble that did not see it. Both
rankings read the same out-of-fold probabilities. A part that is in --out already is not computed again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from clarity import data
from clarity.audit.queries import connect
from clarity.classifiers import EnsembleConfig, LatentEnsemble
from clarity.explainer import Explainer
from clarity.findings.suspicion import suspicious_labels
from clarity.ids import fold_of
from clarity.model import Model, load_model
from clarity.rows import encode_rows
from clarity.training.loops import Codes, EnsembleTraining, train_latent_members, weights_of

SWAPS = {"4": "9", "9": "4", "3": "5", "5": "3", "7": "1", "1": "7"}


def flip(labels: np.ndarray, names: tuple[str, ...], kind: str, share: float, seed: int) -> np.ndarray:
    """Labels (N,) of which a share is wrong: random to any other class, natural between classes that look alike."""
    rng = np.random.default_rng(seed)
    count = round(share * len(labels))
    flipped = labels.copy()
    if kind == "random":
        rows = rng.choice(len(labels), count, replace=False)
        flipped[rows] = (labels[rows] + rng.integers(1, len(names), count)) % len(names)
    elif kind == "natural":
        swap = np.array([names.index(SWAPS.get(name, name)) for name in names])
        rows = rng.choice(np.flatnonzero(swap[labels] != labels), count, replace=False)
        flipped[rows] = swap[labels[rows]]
    else:
        raise ValueError(f"unknown kind of noise {kind!r}; choose from random, natural")
    return flipped


def train_folds(model: Model, ids: list[str], z: Any, labels: np.ndarray, folds: int, members: int, seed: int) -> Model:
    """The model with latent ensembles by fold, trained on these labels; fold f has not seen its own images."""
    mean, log_var = z
    fold = np.array([fold_of(image_id, folds) for image_id in ids])
    config = dataclasses.replace(model.ensemble.config, num_members=members)
    ensembles = []
    for number in range(folds):
        rows = torch.from_numpy(np.flatnonzero(fold != number))
        codes = Codes(mean, log_var, torch.from_numpy(labels)).take(rows)
        training = EnsembleTraining(seed=1000 * seed + number)
        for epoch in train_latent_members(codes, config, training, range(members)):
            last = epoch
        ensemble = LatentEnsemble(EnsembleConfig(**dataclasses.asdict(config)))
        ensemble.load_state_dict(weights_of(last.state()))
        ensembles.append(ensemble.requires_grad_(False).eval())
    return dataclasses.replace(model, folds=tuple(ensembles), image_ensemble=None)


def explain(model: Model, shard: pa.Table, labels: np.ndarray) -> tuple[pa.Table, pa.Table]:
    """Codes and counterfactuals of images under these labels, each image towards the class of its label alone.

    The ranking reads no other pairs.
    """
    place = shard.column_names.index("label_name")
    names = pa.array([model.class_names[label] for label in labels])
    shard = shard.set_column(place, shard.schema.field(place), names)
    codes, pairs = [], []
    for label in np.unique(labels):
        explainer = Explainer(model, targets=(int(label),), images="none", by_fold=True, device="cpu")
        explained = explainer.explain_shard(shard.filter(pa.array(labels == label)))
        codes.append(explained.codes)
        pairs.append(explained.counterfactuals)
    return pa.concat_tables(codes), pa.concat_tables(pairs)


def average_precision(wrong: np.ndarray) -> float:
    """Mean of the precisions at the places of the wrong labels, of labels in order of suspicion."""
    return float((wrong.cumsum() / np.arange(1, len(wrong) + 1))[wrong].mean())


def measure(codes: pa.Table, pairs: pa.Table, wrong_ids: set[str]) -> dict[str, dict[str, float]]:
    """Average precision, and precision at the number of flips, of each ranking."""
    ranked = suspicious_labels(connect(codes, pairs))
    ids = np.array(codes["image_id"].to_pylist())
    label = codes["label"].to_numpy()
    probs = np.array(codes["probs"].to_pylist())
    orders = {"clarity": ranked["image_id"].to_pylist()}
    place = {image_id: i for i, image_id in enumerate(ids)}
    distance = np.zeros(len(ids))
    for image_id, far, converged in zip(*(pairs[c].to_pylist() for c in ("image_id", "distance_z_l1", "converged"))):
        distance[place[image_id]] = far if converged else 1e3
    orders["latent distance to the label"] = ids[np.argsort(-distance, kind="stable")].tolist()
    from cleanlab.rank import get_label_quality_scores

    for method in ("self_confidence", "normalized_margin", "confidence_weighted_entropy"):
        for adjust in (False, True):
            if adjust and method == "confidence_weighted_entropy":
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                score = get_label_quality_scores(label, probs, method=method, adjust_pred_probs=adjust)
            name = f"cleanlab {method}{', adjusted' if adjust else ''}"
            orders[name] = ids[np.argsort(score, kind="stable")].tolist()
    results = {}
    for name, order in orders.items():
        wrong = np.array([image_id in wrong_ids for image_id in order])
        results[name] = {"average_precision": average_precision(wrong), "precision": float(wrong[: wrong.sum()].mean())}
    flagged = ranked["suspicion"].to_numpy() > 0.5
    named = np.array([image_id in wrong_ids for image_id in orders["clarity"]])
    results["flagged"] = {
        "count": int(flagged.sum()),
        "precision": float(named[flagged].mean()) if flagged.any() else 1.0,
    }
    return results


def table(results: dict[str, list[dict[str, dict[str, float]]]]) -> str:
    """Means and standard deviations over the seeds, as Markdown."""
    lines = ["| flips | ranking | average precision | precision at the number of flips |", "|---|---|---|---|"]
    for kind, seeds in results.items():
        for name in seeds[0]:
            if name == "flagged":
                continue
            cells = []
            for figure in ("average_precision", "precision"):
                values = [seed[name][figure] for seed in seeds]
                cells.append(f"{np.mean(values):.3f} ± {np.std(values):.3f}")
            lines.append(f"| {kind} | {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main() -> None:
    """Runs every kind of noise with every seed and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--source", default="mnist")
    parser.add_argument("--data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="images of the training split; all by default")
    parser.add_argument("--members", type=int, default=50)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.02)
    parser.add_argument("--noise", nargs="+", default=["random", "natural"])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = load_model(args.model)
    dataset = data.open_dataset(args.source, args.data, "train")
    listing = data.list_images(dataset).slice(0, args.limit)
    shard = data.read_images(dataset, listing, model.preprocessing)
    ids = shard["image_id"].to_pylist()
    labels = data.label_indices(shard["label_name"], model.class_names).to_numpy().astype(np.int64)
    pixels = np.stack(shard["image"].to_numpy(zero_copy_only=False)).reshape(-1, *model.image_shape)
    z = encode_rows(model.vae, torch.from_numpy(pixels).float() / 255)
    results: dict[str, list[Any]] = {}
    for kind in args.noise:
        for seed in range(args.seeds):
            done = args.out / f"{kind}-{seed}.json"
            if not done.exists():
                flipped = flip(labels, model.class_names, kind, args.share, seed)
                folded = train_folds(model, ids, z, flipped, args.folds, args.members, seed)
                wrong = {ids[i] for i in np.flatnonzero(flipped != labels)}
                done.write_text(json.dumps(measure(*explain(folded, shard, flipped), wrong), indent=1))
            results.setdefault(kind, []).append(json.loads(done.read_text()))
            print(
                f"{kind}, seed {seed}: {results[kind][-1]['clarity']}, flagged {results[kind][-1]['flagged']}",
                flush=True,
            )
    print(table(results))


if __name__ == "__main__":
    main()
