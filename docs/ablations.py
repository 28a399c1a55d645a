#!/usr/bin/env python
"""What each part of Clarity contributes: a table of variants on one trained model, all asked the same questions.

    python jobs/explain_all.py && python docs/ablations.py
    python docs/ablations.py MODEL --dataset mnist --data DATA

Varied one at a time: the number of members M, the distance weight lambda, the threshold gamma, the step of the
adversary (ensembles on the same VAE, trained here), and the start: the posterior's mean, or a sample of it, from which
the distance is measured too. The judge kept with the model, one network, has no part in any search.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from clarity import data
from clarity.explainer import quantise
from clarity.ids import noise
from clarity.judges import judge_rows
from clarity.methods import METHODS, Pairs
from clarity.model import Model, load_model
from clarity.paper.metrics import clustered_share
from clarity.report.text import interval, percent
from clarity.rows import decode_rows, encode_rows, logits_rows, mean_probs
from clarity.search import SearchConfig
from clarity.training.loops import Codes, EnsembleTraining, train_latent_ensemble

MEMBERS, WEIGHTS, THRESHOLDS, STEPS = (1, 2, 5, 10, 25), (0.0, 0.01, 0.1), (0.5, 0.9, 0.999), (0.0, 0.1, 0.5)
COLUMNS = (
    "variant",
    "reached gamma",
    "steps",
    "L1 of codes",
    "judge sees the target [95 %]",
    "re-encoded as the target",
)


def read(
    model: Model, source: str, uri: str | None, split: str, limit: int | None
) -> tuple[Any, list[str], np.ndarray]:
    """Images (B, C, H, W) in [0, 1], ids and labels of a split; images without a known label are left out."""
    dataset = data.open_dataset(source, uri, split)
    listing = data.list_images(dataset)
    pixels, ids, names, _ = data.read_all(dataset, listing.slice(0, limit), model.preprocessing)
    index = {name: k for k, name in enumerate(model.class_names)}
    labels = np.array([index.get(str(name), -1) for name in names])
    known = np.flatnonzero(labels >= 0)
    return torch.from_numpy(pixels[known]).float() / 255, [ids[row] for row in known], labels[known]


def questions(model: Model, x: torch.Tensor, ids: list[str]) -> tuple[Pairs, np.ndarray]:
    """Every image towards every class but the one that the model's ensemble sees, and the image of each pair."""
    z, log_var = encode_rows(model.vae, x)
    source = mean_probs(logits_rows(model.ensemble, z)).argmax(1)
    image, target = np.nonzero(source[:, None] != np.arange(model.num_classes))
    draws = torch.from_numpy(noise(ids, model.latent_dim))
    of = torch.from_numpy(image)
    return Pairs(x[of], z[of], log_var[of], draws[of], torch.from_numpy(target)), image


def measure(model: Model, pairs: Pairs, image: np.ndarray, config: SearchConfig) -> list[str]:
    """The cells of one variant behind its name."""
    found = METHODS["clarity"].search(model, pairs, config)
    written = torch.from_numpy(quantise(decode_rows(model.vae, found.point))).float() / 255
    target = pairs.target.numpy()
    assert model.judge is not None
    judged = (judge_rows(model.judge, written).argmax(1) == target).astype(float)
    again = mean_probs(logits_rows(model.ensemble, encode_rows(model.vae, written)[0])).argmax(1) == target
    share, low, high = clustered_share(judged, image)
    return [
        percent(float(found.converged.double().mean())),
        f"{found.steps.double().mean():.0f}",
        f"{(found.point - pairs.z).abs().sum(1).mean():.1f}",
        f"{percent(share)} [{interval(low, high)}]",
        percent(float(again.mean())),
    ]


def variants(
    model: Model, codes: Codes, pairs: Pairs, training: EnsembleTraining
) -> Iterator[tuple[str, Model, Pairs, SearchConfig]]:
    """Name, model, pairs and configuration of each variant; the first is Clarity as it is."""
    config, members = SearchConfig(), model.ensemble.config.num_members
    name = f"M {members}, lambda {config.distance_weight:g}, gamma {config.min_target_prob:g}, "
    yield f"{name}eps {training.adversarial_eps:g}, from the mean", model, pairs, config
    sampled = replace(pairs, z=pairs.sample())
    yield "from a sample", model, sampled, config
    for count in (count for count in MEMBERS if count < members):
        yield f"M {count}", replace(model, ensemble=model.ensemble.select(range(count))), pairs, config
        if count == 1:  # Eq. 5 of the paper starts from a sample
            yield "M 1, from a sample", replace(model, ensemble=model.ensemble.select(range(1))), sampled, config
    for weight in WEIGHTS:
        yield f"lambda {weight:g}", model, pairs, replace(config, distance_weight=weight)
    for threshold in THRESHOLDS:
        yield f"gamma {threshold:g}", model, pairs, replace(config, min_target_prob=threshold)
    for eps in STEPS:
        ensemble = train_latent_ensemble(codes, model.ensemble.config, replace(training, adversarial_eps=eps))
        yield f"eps {eps:g}", replace(model, ensemble=ensemble), pairs, config


def main(argv: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="runs/digits/model", help="Model directory with a judge.")
    parser.add_argument("--dataset", default="digits", help="Source of the images (default: digits).")
    parser.add_argument("--data", help="Its path or URI.")
    parser.add_argument("--limit", type=int, default=200, help="Test images (default: 200).")
    args = parser.parse_args(argv)
    model = load_model(args.model)
    if model.judge is None:
        parser.error(f"expected a model with a judge in {args.model}, got none: train one with jobs/train.py")
    x, ids, _ = read(model, args.dataset, args.data, "test", args.limit)
    pairs, image = questions(model, x, ids)
    pixels, _, labels = read(model, args.dataset, args.data, "train", None)
    codes = Codes(*encode_rows(model.vae, pixels), torch.from_numpy(labels))
    training = EnsembleTraining(**model.card["plan"]["ensemble_training"])
    print(f"{len(x)} test images, {len(pairs)} pairs; one training of the VAE, one seed, one judge\n")
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for name, variant, asked, config in variants(model, codes, pairs, training):
        print("| " + " | ".join([name, *measure(variant, asked, image, config)]) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
