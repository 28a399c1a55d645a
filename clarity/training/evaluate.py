"""Metrics of a trained model on held-out images."""

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from clarity.judges import judge_rows
from clarity.model import Model
from clarity.rows import decode_rows, encode_rows, logits_rows, mean_probs
from clarity.vae import LOSSES, VAE

#: Training images of the baseline at most, and its principal components.
BASELINE_IMAGES = 20_000
BASELINE_COMPONENTS = 100
#: Images that the principal components are fitted to at most, by an exact decomposition of bounded memory.
COMPONENT_IMAGES = 5_000


@dataclass(frozen=True)
class LabelledImages:
    """A split in memory: uint8 (N, C, H, W), labels (N,), -1 for none; images in ``errors`` are not among the N."""

    pixels: Tensor
    ids: list[str]
    labels: Tensor
    errors: dict[str, str] = field(default_factory=dict)

    def take(self, rows: slice | np.ndarray) -> "LabelledImages":
        """Some of the images."""
        ids = self.ids[rows] if isinstance(rows, slice) else [self.ids[row] for row in rows]
        return LabelledImages(self.pixels[rows], ids, self.labels[rows])


def evenly(count: int, limit: int) -> np.ndarray:
    """Indices of at most ``limit`` of ``count`` rows, spread evenly."""
    return np.unique(np.linspace(0, count - 1, min(limit, count)).astype(int))


def encode_pixels(vae: VAE, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior means and log-variances (N, D) of images uint8 (N, C, H, W), on the CPU."""
    device = vae.mean.weight.device
    parts = [encode_rows(vae, part.to(device).float() / 255) for part in pixels.split(1024)]
    mean, log_var = (torch.cat(each).cpu() for each in zip(*parts))
    return mean, log_var


def evaluate(model: Model, training: Callable[[], LabelledImages] | None, held_out: LabelledImages) -> dict[str, Any]:
    """What model.json says of a model on images that it was not trained on.

    ``training`` reads labelled images of the training split, some or all, for the simple methods; ``held_out`` images
    without a label count for the VAE alone.

    Returns entries of model.json. ``metrics``: parts of the evidence lower bound in nats, the mean absolute error of
    the reconstruction, and ``classification_metrics`` of the ensembles. ``target_probs``: {"median": [K], "p90": [K]}
    of the ensemble's probability of the own class of real images, null for a class without one. ``evaluation``: counts
    and accuracies of the ensemble; "majority", the share of the most frequent class; "reconstruction", mean squared
    errors of pixels in [0, 1] by the VAE, the mean image and as many principal components; "baseline", a logistic
    regression on principal components; "copies", see ``find_copies``; "judge", or null.
    """
    generator = torch.Generator().manual_seed(0)
    sums = torch.zeros(3, dtype=torch.float64)
    errors, codes, image_logits, judged = 0.0, [], [], []
    labelled = held_out.labels >= 0
    labels = held_out.labels[labelled]
    for pixels, known in zip(held_out.pixels.split(1024), labelled.split(1024)):
        x = (pixels.float() / 255).to(model.device)
        terms, mean, reconstruction = vae_terms(model.vae, x, generator)
        sums += terms
        errors += float((reconstruction - x)[known].square().sum(dtype=torch.float64))
        codes.append(mean[known])
        if model.image_ensemble is not None:
            image_logits.append(logits_rows(model.image_ensemble, x[known]).cpu())
        if model.judge is not None:
            written = reconstruction if model.sharp is None else decode_rows(model.sharp, mean)
            judged.append([judge_rows(model.judge, images[known]).argmax(1) for images in (x, written)])
    found, kl_mean, error_mean = (sums / max(len(held_out.ids), 1)).tolist()
    metrics: dict[str, Any] = {
        "images": len(held_out.ids),
        "unreadable": len(held_out.errors),
        "vae": {
            "loss": found + model.vae.config.beta * kl_mean,
            "reconstruction": found,
            "kl": kl_mean,
            "absolute_error": error_mean / math.prod(model.image_shape),
        },
    }
    if not len(labels):
        return {"metrics": metrics if held_out.ids else {}}
    logits = logits_rows(model.ensemble, torch.cat(codes)).cpu()
    metrics["ensemble"] = classification_metrics(logits, labels, model.class_names)
    if image_logits:
        metrics["image_ensemble"] = classification_metrics(torch.cat(image_logits, 1), labels, model.class_names)
    if training is None:
        return {"metrics": metrics}
    probs, truth, count = mean_probs(logits), labels.numpy(), len(labels)
    groups = [probs[truth == k, k] for k in range(model.num_classes)]
    predicted = probs.argmax(1)
    sizes = np.bincount(truth, minlength=model.num_classes)
    correct = np.bincount(truth[predicted == truth], minlength=model.num_classes)
    judge = None
    if judged:
        real, again = (np.concatenate(classes) for classes in zip(*judged))
        judge = counted_accuracies(real, truth) | {"accuracy_on_reconstructions": float((again == truth).mean())}
    known_images = training()
    baseline, linear_errors = linear_baseline(known_images, held_out.pixels[labelled], truth, model.latent_dim)
    evaluation = {
        "images": count,
        **counted_accuracies(predicted, truth),
        "per_class": {
            name: {"images": int(size), "correct": int(right)}
            for name, size, right in zip(model.class_names, sizes, correct)
        },
        "majority": {"class": model.class_names[int(sizes.argmax())], "share": float(sizes.max() / count)},
        "reconstruction": {
            "latent_dim": model.latent_dim,
            "vae": errors / (count * math.prod(model.image_shape)),
            **linear_errors,
        },
        "baseline": baseline,
        "copies": find_copies(known_images, held_out.take(np.flatnonzero(labelled))),
        "judge": judge,
    }
    target_probs = {
        name: [float(np.quantile(group, q)) if len(group) else None for group in groups]
        for name, q in (("median", 0.5), ("p90", 0.9))
    }
    return {"metrics": metrics, "target_probs": target_probs, "evaluation": evaluation}


def find_copies(training: LabelledImages, held_out: LabelledImages) -> dict[str, Any]:
    """Held-out images with the same pixels as a training image, and pictures with several labels, of labelled images.

    ``held_out`` and ``relabelled`` count them, ``copy`` and ``relabelled_copy`` are ids of two images of the first.
    """
    seen: dict[bytes, str] = {}
    labels: dict[bytes, dict[int, str]] = {}
    copies: list[tuple[str, str]] = []
    for measured, images in enumerate((training, held_out)):
        for pixels, image_id, label in zip(images.pixels, images.ids, images.labels.tolist()):
            digest = hashlib.sha256(pixels.numpy().tobytes()).digest()
            labels.setdefault(digest, {}).setdefault(label, image_id)
            if not measured:
                seen.setdefault(digest, image_id)
            elif digest in seen:
                copies.append((image_id, seen[digest]))
    several = [list(ids.values()) for ids in labels.values() if len(ids) > 1]
    return {
        "held_out": len(copies),
        "copy": list(copies[0]) if copies else None,
        "relabelled": len(several),
        "relabelled_copy": several[0][:2] if several else None,
    }


def vae_terms(vae: VAE, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over images (B, C, H, W): reconstruction loss of sampled codes, KL, absolute error of the reconstructions.

    Returns the three of them, float64 on the CPU, the codes (B, D), and the reconstructions.
    """
    mean, log_var = encode_rows(vae, x)
    noise = torch.randn(mean.shape, generator=generator).to(x.device)
    sampled = decode_rows(vae, mean + torch.exp(0.5 * log_var) * noise)
    logits = torch.logit(sampled.double(), eps=1e-7)
    loss = LOSSES[vae.config.loss](logits, x.double()).sum()
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum()
    reconstruction = decode_rows(vae, mean)
    terms = loss, kl, (reconstruction - x).abs().sum()
    return torch.stack([term.double() for term in terms]).cpu(), mean, reconstruction


def classification_metrics(logits: Tensor, labels: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """How good an ensemble is, by its logits (M, B, K) for labels (B,): accuracies, nll in nats, and calibration.

    ``calibration_error`` is the expected one, of 15 equal bins (Guo et al. 2017).
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


def accuracies(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The share of correct predictions, and the mean over the classes present of the share in each."""
    hits = predicted == truth
    by_class = [float(hits[truth == k].mean()) for k in np.unique(truth)]
    return {"accuracy": float(hits.mean()), "balanced_accuracy": float(np.mean(by_class))}


def counted_accuracies(predicted: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """The number of correct predictions before their ``accuracies``."""
    return {"correct": int((predicted == truth).sum()), **accuracies(predicted, truth)}


def linear_baseline(
    training: LabelledImages, pixels: Tensor, truth: np.ndarray, latent_dim: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """Principal components of pixels, and a logistic regression on some of them, for images uint8 (N, C, H, W).

    Returns the entry ``baseline`` of an evaluation, and mean squared errors of a pixel: "mean_image" of the mean image,
    "linear_code" of a code of ``latent_dim`` components.
    """
    chosen = evenly(len(training.pixels), COMPONENT_IMAGES)
    limit = min(len(chosen), training.pixels[0].numel())
    pca = PCA(min(max(BASELINE_COMPONENTS, latent_dim), limit), svd_solver="randomized", random_state=0)
    pca.fit(flat(training.pixels[chosen]))
    known, asked = (
        np.concatenate([pca.transform(flat(part)) for part in images.split(1024)])
        for images in (training.pixels, pixels)
    )
    num_components, labels = min(BASELINE_COMPONENTS, known.shape[1]), training.labels.numpy()
    predicted = np.full(len(truth), labels[0])
    if (labels != labels[0]).any():  # of a predictor's classes perhaps one alone has labelled images
        with warnings.catch_warnings():
            # What the iterations do not finish is far below the accuracy's standard error.
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier = LogisticRegression(max_iter=200).fit(known[:, :num_components], labels)
        predicted = classifier.predict(asked[:, :num_components])
    total = sum(float(np.square(flat(part) - pca.mean_).sum(dtype=np.float64)) for part in pixels.split(1024))
    kept = float(np.square(asked[:, :latent_dim]).sum(dtype=np.float64))
    baseline = {
        "components": num_components,
        "images": len(labels),
        **counted_accuracies(predicted, truth),
    }
    return baseline, {"mean_image": total / pixels.numel(), "linear_code": (total - kept) / pixels.numel()}


def flat(pixels: Tensor) -> np.ndarray:
    """Images as float32 rows in [0, 1]."""
    return pixels.flatten(1).numpy().astype(np.float32) / 255
