#!/usr/bin/env python
"""Are wrong labels found? Flips labels before training, explains out of fold, and ranks; cleanlab ranks beside.

    python docs/labels.py MODEL --data DATA --out runs/labels
    python docs/labels.py MODEL --data DATA --validated mnist_mturk.json

The second form ranks the real test labels, and says where the errors that people validated stand: the file is
mturk/mnist_mturk.json of github.com/cleanlab/label-errors (Northcutt et al. 2021).

MODEL is a trained model of the source: its VAE, into which labels do not enter, is used as it is; latent ensembles are
trained again on the flipped labels, by folds, and each image is explained by the ensemble that did not see it. Both
rankings read the same out-of-fold probabilities. A part that is in --out already is not computed again.
"""

import argparse
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from sklearn.metrics import average_precision_score

from clarity import data, schema
from clarity.audit.queries import connect
from clarity.explainer import Explainer
from clarity.findings.suspicion import neighbour_votes, score_classes, suspicious_labels
from clarity.ids import fold_of
from clarity.model import Model, load_model
from clarity.rows import encode_rows, logits_rows, mean_probs
from clarity.training.loops import Codes, EnsembleTraining, train_latent_ensemble

SWAPS = {"4": "9", "9": "4", "3": "5", "5": "3", "7": "1", "1": "7"}


def flip(labels: np.ndarray, names: tuple[str, ...], kind: str, share: float, seed: int) -> np.ndarray:
    """Labels (N,) of which a share is wrong: random to any other class, natural between classes that look alike."""
    rng = np.random.default_rng(seed)
    count = round(share * len(labels))
    flipped = labels.copy()
    if kind == "random":
        rows = rng.choice(len(labels), count, replace=False)
        flipped[rows] = (labels[rows] + rng.integers(1, len(names), count)) % len(names)
    else:
        swap = np.array([names.index(SWAPS.get(name, name)) for name in names])
        rows = rng.choice(np.flatnonzero(swap[labels] != labels), count, replace=False)
        flipped[rows] = swap[labels[rows]]
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
        ensembles.append(train_latent_ensemble(codes, config, EnsembleTraining(seed=1000 * seed + number)))
    return dataclasses.replace(model, folds=tuple(ensembles), image_ensemble=None)


def explain(model: Model, shard: pa.Table, labels: np.ndarray) -> tuple[pa.Table, pa.Table]:
    """Codes and counterfactuals of images under these labels, each image towards the class of its label alone.

    The ranking reads no other pairs.
    """
    column = shard.column_names.index("label_name")
    names = pa.array([model.class_names[label] for label in labels])
    shard = shard.set_column(column, shard.schema.field(column), names)
    codes, pairs = [], []
    for label in np.unique(labels):
        explainer = Explainer(model, targets=(int(label),), images="none", by_fold=True, device="cpu")
        explained = explainer.explain_shard(shard.filter(pa.array(labels == label)))
        codes.append(explained.codes)
        pairs.append(explained.counterfactuals)
    return pa.concat_tables(codes), pa.concat_tables(pairs)


def held_out_codes(model: Model, ids: list[str], z: torch.Tensor, labels: np.ndarray) -> pa.Table:
    """The columns of ``codes`` that the rankings read, by the model's own ensemble."""
    probs = mean_probs(logits_rows(model.ensemble, z)).astype(np.float32)
    return pa.table(
        {
            "image_id": ids,
            "label": labels.astype(np.int32),
            "source": probs.argmax(1).astype(np.int32),
            "probs": schema.fixed_size_list(probs),
            "z": schema.fixed_size_list(z.numpy()),
            "status": ["ok"] * len(ids),
        }
    )


def rank(codes: pa.Table, pairs: pa.Table) -> tuple[dict[str, list[str]], dict[str, set[str]]]:
    """Image ids in the order of each ranking, and those that each method calls wrong."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    ranked = suspicious_labels(connect(codes, pairs))
    ids = np.array(codes["image_id"].to_pylist())
    label, source = codes["label"].to_numpy(), codes["source"].to_numpy()
    probs, z = (np.array(codes[name].to_pylist()) for name in ("probs", "z"))
    rows = np.arange(len(ids))
    scores, _, _ = score_classes(probs.astype(np.float64), z, label, source)
    all_votes = neighbour_votes(z, label, rows, rows, probs.shape[1])[rows, label]
    scores_of = {
        "ensemble probability x vote, without the mixture": scores[rows, label],
        "vote of the 20 nearest codes alone": all_votes,
    }
    index = {image_id: i for i, image_id in enumerate(ids)}
    distance = np.zeros(len(ids))
    for image_id, far, converged in zip(*(pairs[c].to_pylist() for c in ("image_id", "distance_z_l1", "converged"))):
        distance[index[image_id]] = far if converged else 1e3
    if len(pairs):
        scores_of["latent distance to the label alone"] = -distance
    flagged = {"clarity": set(ranked.filter(pa.compute.greater(ranked["suspicion"], 0.5))["image_id"].to_pylist())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for method in ("self_confidence", "normalized_margin", "confidence_weighted_entropy"):
            for adjust in (False, True):
                if adjust and method == "confidence_weighted_entropy":
                    continue
                score = get_label_quality_scores(label, probs, method=method, adjust_pred_probs=adjust)
                scores_of[f"cleanlab {method}{', adjusted' if adjust else ''}"] = score
        for method in ("prune_by_noise_rate", "confident_learning"):
            issues = find_label_issues(label, probs, filter_by=method, n_jobs=1)
            flagged[f"cleanlab {method}"] = set(ids[issues].tolist())
        # With what Clarity reads too: the codes.
        product = scores / scores.sum(1, keepdims=True)
        issues = find_label_issues(label, product, filter_by="prune_by_noise_rate", n_jobs=1)
        flagged["cleanlab prune_by_noise_rate on probability x vote"] = set(ids[issues].tolist())
        score = get_label_quality_scores(label, product, method="normalized_margin")
        scores_of["cleanlab normalized_margin on probability x vote"] = score
    orders = {"clarity": ranked["image_id"].to_pylist()}
    orders |= {name: ids[np.argsort(score, kind="stable")].tolist() for name, score in scores_of.items()}
    return orders, flagged


def measure(codes: pa.Table, pairs: pa.Table, wrong_ids: set[str]) -> dict[str, dict[str, float]]:
    """Average precision and precision at the number of flips of each ranking; precision and recall of each method."""
    orders, flagged = rank(codes, pairs)
    results = {}
    for name, order in orders.items():
        wrong = np.array([image_id in wrong_ids for image_id in order])
        area = average_precision_score(wrong, -np.arange(len(wrong)))
        results[name] = {"average_precision": float(area), "precision": float(wrong[: wrong.sum()].mean())}
    for name, called in flagged.items():
        right = len(called & wrong_ids)
        results[f"called by {name}"] = {
            "count": len(called),
            "precision": right / max(len(called), 1),
            "recall": right / len(wrong_ids),
        }
    return results


def validated(codes: pa.Table, path: Path) -> str:
    """Where the errors that people validated stand in each ranking of the real test labels, as Markdown."""
    checked = json.loads(path.read_text())
    wrong = {f"test/{entry['id']:05d}" for entry in checked if entry["mturk"]["given"] < 3}
    ids = set(codes["image_id"].to_pylist())
    if missing := wrong - ids:
        raise ValueError(f"no image {min(missing)!r} in the data; its ids look like {min(ids)}")
    empty = schema.counterfactuals_schema(codes["z"].type.list_size).empty_table()
    orders, flagged = rank(codes, empty)
    lines = [f"{len(wrong)} validated errors among {len(ids):,} labels", ""]
    lines += ["| ranking | validated errors among its first 15 | 50 | 100 | 500 |", "|---|---|---|---|---|"]
    for name, order in orders.items():
        found = [len(wrong & set(order[:count])) for count in (15, 50, 100, 500)]
        lines.append(f"| {name} | {' | '.join(map(str, found))} |")
    lines += [
        f"{name} calls {len(called)} labels wrong, {len(called & wrong)} of them validated"
        for name, called in flagged.items()
    ]
    return "\n".join(lines)


def table(results: dict[str, list[dict[str, dict[str, float]]]]) -> str:
    """Means and standard deviations over the seeds, as Markdown."""
    lines = ["| flips | ranking | average precision | precision at the number of flips |", "|---|---|---|---|"]
    for kind, seeds in results.items():
        for name in seeds[0]:
            if name.startswith("called by "):
                continue
            cells = []
            for figure in ("average_precision", "precision"):
                values = [seed[name][figure] for seed in seeds]
                cells.append(f"{np.mean(values):.3f} ± {np.std(values, ddof=min(1, len(values) - 1)):.3f}")
            lines.append(f"| {kind} | {name} | {cells[0]} | {cells[1]} |")
    lines += ["", "| flips | labels called wrong by | how many | precision | recall |", "|---|---|---|---|---|"]
    for kind, seeds in results.items():
        for name in (name for name in seeds[0] if name.startswith("called by ")):
            cells = [np.mean([seed[name][figure] for seed in seeds]) for figure in ("count", "precision", "recall")]
            lines.append(
                f"| {kind} | {name.removeprefix('called by ')} | {cells[0]:.0f} | {cells[1]:.3f} | {cells[2]:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Runs every kind of noise with every seed and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--source", default="mnist")
    parser.add_argument("--data")
    parser.add_argument("--out", type=Path, default=Path("runs/labels"))
    parser.add_argument(
        "--validated", type=Path, help="errors that people validated: rank the real test labels instead"
    )
    parser.add_argument("--limit", type=int, help="images of the training split; all by default")
    parser.add_argument("--members", type=int, default=50)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.02)
    parser.add_argument("--noise", nargs="+", default=["random", "natural"], choices=["random", "natural"])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = load_model(args.model)
    dataset = data.open_dataset(args.source, args.data, "test" if args.validated else "train")
    listing = data.list_images(dataset).slice(0, args.limit)
    shard = data.read_images(dataset, listing, model.preprocessing)
    ids = shard["image_id"].to_pylist()
    labels = data.label_indices(shard["label_name"], model.class_names).to_numpy().astype(np.int64)
    pixels = np.stack(shard["image"].to_numpy(zero_copy_only=False)).reshape(-1, *model.image_shape)
    z = encode_rows(model.vae, torch.from_numpy(pixels).float() / 255)
    if args.validated:
        print(validated(held_out_codes(model, ids, z[0], labels), args.validated))
        return
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
                f"{kind}, seed {seed}: {results[kind][-1]['clarity']}, called {results[kind][-1]['called by clarity']}",
                flush=True,
            )
    print(table(results))


if __name__ == "__main__":
    main()
