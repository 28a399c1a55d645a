"""Metrics of a trained model on held-out images.

Shapes: N images, B rows, K classes, M members.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clarity.model import Model
from clarity.rows import decode_rows, encode_rows, logits_rows
from clarity.vae import LOSSES


@dataclass(frozen=True)
class LabelledImages:
    """A split in memory.

    Args:
        pixels: uint8 (N, C, H, W).
        ids: N image ids.
        labels: int64 (N,), -1 where there is none.
        errors: image id -> why it could not be read; not among the N.
    """

    pixels: Tensor
    ids: list[str]
    labels: Tensor
    errors: dict[str, str] = field(default_factory=dict)


def evaluate(model: Model, images: LabelledImages, noise_seed: int = 0) -> dict[str, Any]:
    """What model.json says of a model on images that it was not trained on.

    Returns:
        ``vae``: the parts of the evidence lower bound (nats, one sample from each posterior) and the mean absolute
        error of the reconstruction from the posterior mean; ``ensemble`` and, if there is one, ``image_ensemble``: see
        ``classification_metrics``, on the labelled images.
    """
    generator = torch.Generator().manual_seed(noise_seed)
    sums = torch.zeros(3, dtype=torch.float64)
    means = []
    for pixels in images.pixels.split(1024):
        x = pixels.float() / 255
        mean, log_var = encode_rows(model.vae, x.to(model.device))
        mean, log_var = mean.cpu(), log_var.cpu()
        means.append(mean)
        noise = torch.randn(mean.shape, generator=generator)
        sampled = decode_rows(model.vae, (mean + torch.exp(0.5 * log_var) * noise).to(model.device)).cpu()
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum()
        error = (decode_rows(model.vae, mean.to(model.device)).cpu() - x).abs().sum()
        logits = torch.logit(sampled.double(), eps=1e-7)
        sums += torch.stack([LOSSES[model.vae.config.loss](logits, x.double()).sum(), kl.double(), error.double()])
    reconstruction, kl_mean, error_mean = (sums / len(images.pixels)).tolist()
    metrics: dict[str, Any] = {
        "images": len(images.pixels),
        "unreadable": len(images.errors),
        "vae": {
            "loss": reconstruction + model.vae.config.beta * kl_mean,
            "reconstruction": reconstruction,
            "kl": kl_mean,
            "absolute_error": error_mean / math.prod(model.image_shape),
        },
    }
    labelled = images.labels >= 0
    labels = images.labels[labelled]
    if len(labels):
        points = torch.cat(means)[labelled].to(model.device)
        logits = logits_rows(model.ensemble, points).cpu()
        metrics["ensemble"] = classification_metrics(logits, labels, model.class_names)
        if model.image_ensemble is not None:
            pixels = images.pixels[labelled].split(1024)
            parts = [logits_rows(model.image_ensemble, p.to(model.device).float() / 255).cpu() for p in pixels]
            metrics["image_ensemble"] = classification_metrics(torch.cat(parts, 1), labels, model.class_names)
    return metrics


def classification_metrics(logits: Tensor, labels: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """How good an ensemble is.

    Args:
        logits: (M, B, K).
        labels: int64 (B,).
        class_names: K names.

    Returns:
        ``accuracy`` of the members' mean, ``balanced_accuracy`` (mean over the classes present), ``per_class`` accuracy
        by name, ``member_accuracy`` (M,), ``calibration_error`` (expected, 15 equal bins; Guo et al. 2017), ``nll`` in
        nats.
    """
    probs = logits.double().softmax(-1)
    member_hits = (probs.argmax(-1) == labels).double().mean(1)
    mean = probs.mean(0)
    top, predicted = mean.max(-1)
    hits = (predicted == labels).double()
    per_class = {
        name: float(hits[labels == k].mean()) for k, name in enumerate(class_names) if bool((labels == k).any())
    }
    bins = (top * 15).long().clamp_max(14)
    gaps = [(top[bins == b].mean() - hits[bins == b].mean()).abs() * (bins == b).double().mean() for b in bins.unique()]
    return {
        "accuracy": float(hits.mean()),
        "balanced_accuracy": sum(per_class.values()) / len(per_class),
        "per_class": per_class,
        "member_accuracy": member_hits.tolist(),
        "member_accuracy_mean": float(member_hits.mean()),
        "calibration_error": float(torch.stack(gaps).sum()),
        "nll": float(-mean[torch.arange(len(labels)), labels].clamp_min(1e-30).log().mean()),
    }
