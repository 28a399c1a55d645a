"""The methods of the paper side by side: each a function whose body is its equation. Ends in ``METHODS``.

Knows equations: over which space and with which classifier each is posed, and where it starts. Does not know how a
search runs, nor what becomes of its results: ``**run`` goes to ``descend`` (engine, threads, on_step).

Shapes: B rows, C, H, W image, D latent, K classes, M members.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clarity.classifiers import ImageEnsemble
from clarity.model import Model
from clarity.rows import decode_rows, folded, logits_rows, require_eval
from clarity.search import Counterfactuals, LatentObjective, Rows, SearchConfig, descend, ensemble_terms, l1

PIXELS = (0.0, 1.0)

#: Bytes of one member's weights above which a CPU computes image classifiers one after another: about what its core's
#: second-level cache holds, so that nothing is gained by computing them together.
APART_BYTES = 2 << 20


@dataclass(frozen=True)
class Pairs:
    """The (image, target) pairs of a search, with all that some method starts from.

    Args:
        x: images (B, C, H, W) in [0, 1].
        z: means of their posteriors (B, D).
        log_var: log-variances of their posteriors (B, D).
        noise: standard normal (B, D), drawn from the image id alone.
        target: wanted classes (B,), int64.
    """

    x: Tensor
    z: Tensor
    log_var: Tensor
    noise: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)


def clarity(model: Model, pairs: Pairs, config: SearchConfig, **run: Any) -> Counterfactuals:
    """Eq. 6: the latent ensemble's mean cross-entropy + distance_weight * L1(z, z'), from the posterior mean."""
    objective = LatentObjective(model.ensemble.layers(), config.distance_weight)
    return descend(objective, pairs.z, {"target": pairs.target, "reference": pairs.z}, config, **run)


def latent(model: Model, pairs: Pairs, config: SearchConfig, **run: Any) -> Counterfactuals:
    """Eq. 5: Eq. 6 with one latent classifier, member 0."""
    objective = LatentObjective(model.ensemble.member(0).layers(), config.distance_weight)
    return descend(objective, pairs.z, {"target": pairs.target, "reference": pairs.z}, config, **run)


def revise(model: Model, pairs: Pairs, config: SearchConfig, **run: Any) -> Counterfactuals:
    """Eq. 3 (Joshi et al. 2019): one image classifier's cross-entropy at decode(z') + distance_weight * L1(x, x').

    From a sample of the posterior. The classifier is member 0, the optimiser the paper's Adam.
    """
    decode, classify = _decoder(model), _image_classifier(model, "member")

    def objective(z_cf: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        x_cf = decode(z_cf)
        logits = classify(x_cf)
        cross_entropy, target_prob = ensemble_terms(logits, rows["target"])
        return cross_entropy + config.distance_weight * l1(x_cf, rows["x"]), target_prob, logits

    rows = {"target": pairs.target, "x": pairs.x}
    return descend(objective, _sample(pairs), rows, config, slots=_slots(model, "member"), **run)


def revise_e(model: Model, pairs: Pairs, config: SearchConfig, **run: Any) -> Counterfactuals:
    """Eq. 4: the image ensemble's mean cross-entropy at decode(z') + distance_weight * L1(x, x')."""
    decode, classify = _decoder(model), _image_classifier(model, "ensemble")

    def objective(z_cf: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        x_cf = decode(z_cf)
        logits = classify(x_cf)
        cross_entropy, target_prob = ensemble_terms(logits, rows["target"])
        return cross_entropy + config.distance_weight * l1(x_cf, rows["x"]), target_prob, logits

    rows = {"target": pairs.target, "x": pairs.x}
    return descend(objective, _sample(pairs), rows, config, slots=_slots(model, "ensemble"), **run)


def revise_e_latent(model: Model, pairs: Pairs, config: SearchConfig, **run: Any) -> Counterfactuals:
    """Eq. 4 with the penalty in the latent space: distance_weight * L1(z, z'), z the posterior mean."""
    decode, classify = _decoder(model), _image_classifier(model, "ensemble")

    def objective(z_cf: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        logits = classify(decode(z_cf))
        cross_entropy, target_prob = ensemble_terms(logits, rows["target"])
        return cross_entropy + config.distance_weight * l1(z_cf, rows["z"]), target_prob, logits

    rows = {"target": pairs.target, "z": pairs.z}
    return descend(objective, _sample(pairs), rows, config, slots=_slots(model, "ensemble"), **run)


def fgsm(model: Model, pairs: Pairs, config: SearchConfig, **run: Any) -> Counterfactuals:
    """Eq. 1 in pixel space: one image classifier's cross-entropy + distance_weight * L1(x, x'), by Adam.

    "fgsm" is the paper's word for it: not the one-step attack, but Adam on Eq. 1 over a classifier that was trained
    adversarially, as FGSM examples are. The classifier is member 0.
    """
    classify = _image_classifier(model, "member")

    def objective(x_cf: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        logits = classify(x_cf)
        cross_entropy, target_prob = ensemble_terms(logits, rows["target"])
        return cross_entropy + config.distance_weight * l1(x_cf, rows["x"]), target_prob, logits

    rows = {"target": pairs.target, "x": pairs.x}
    return descend(objective, pairs.x, rows, config, bounds=PIXELS, slots=_slots(model, "member"), **run)


def schut(model: Model, pairs: Pairs, config: SearchConfig, **run: Any) -> Counterfactuals:
    """Eq. 2 (Schut et al. 2021): the image ensemble's mean cross-entropy, one pixel by step_size at a time.

    Follows the equation where the authors' code does not (cross-entropy of the mean logits, one stop for a batch), and
    their code where the paper is silent: a pixel changes at most five times.
    """
    classify = _image_classifier(model, "ensemble")

    def objective(x_cf: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        logits = classify(x_cf)
        cross_entropy, target_prob = ensemble_terms(logits, rows["target"])
        return cross_entropy, target_prob, logits

    slots = _slots(model, "ensemble")
    return descend(objective, pairs.x, {"target": pairs.target}, config, "jsma", bounds=PIXELS, slots=slots, **run)


@dataclass(frozen=True)
class Method:
    """One entry of ``METHODS``.

    Args:
        search: (model, pairs, config, **run) -> Counterfactuals.
        space: of its points: latent or image.
        classifier: whose probabilities it reports: ensemble or member (the latent ensemble or its member 0), or
            image_ensemble or image_member (the same of the image ensemble).
        doc: one line for people.
    """

    search: Callable[..., Counterfactuals]
    space: str
    classifier: str
    doc: str


METHODS: dict[str, Method] = {
    "clarity": Method(clarity, "latent", "ensemble", "Eq. 6: latent ensemble, penalty on the code"),
    "latent": Method(latent, "latent", "member", "Eq. 5: one latent classifier, penalty on the code"),
    "revise": Method(revise, "latent", "image_member", "Eq. 3: one image classifier of the decoded code"),
    "revise_e": Method(revise_e, "latent", "image_ensemble", "Eq. 4: image ensemble of the decoded code"),
    "revise_e_latent": Method(revise_e_latent, "latent", "image_ensemble", "Eq. 4 with the penalty on the code"),
    "fgsm": Method(fgsm, "image", "image_member", "Eq. 1: one image classifier, Adam on the pixels"),
    "schut": Method(schut, "image", "image_ensemble", "Eq. 2: image ensemble, one pixel at a time"),
}


def classifier_logits(model: Model, method: str, points: Tensor) -> Tensor:
    """Logits (M, B, K) that a method's own classifier gives its points, each row as if it were alone.

    Args:
        model: the model searched with.
        method: a key of ``METHODS``.
        points: codes (B, D) or images (B, C, H, W), after the method's space.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    space, classifier = METHODS[method].space, METHODS[method].classifier
    if classifier == "ensemble":
        return logits_rows(model.ensemble, points)
    if classifier == "member":
        return logits_rows(model.ensemble.member(0), points)
    x = decode_rows(model.vae, points) if space == "latent" else points
    ensemble = _require_image_ensemble(model)
    return logits_rows(ensemble if classifier == "image_ensemble" else ensemble.member(0), x)


# ---- what the equations are made of ----------------------------------------------------------------------------------


def _sample(pairs: Pairs) -> Tensor:
    """A sample z' ~ q(z | x) of each posterior, with the noise of the row's image."""
    return pairs.z + torch.exp(pairs.log_var / 2) * pairs.noise


def _decoder(model: Model) -> Callable[[Tensor], Tensor]:
    """decode(z) without anything that only training needs: BatchNorm folded away, no gradients for weights."""
    require_eval(model.vae)
    vae = copy.deepcopy(model.vae)
    vae.decoder_layers = folded(vae.decoder_layers)
    return vae.requires_grad_(False).decode


def _image_classifier(model: Model, which: str) -> Callable[[Tensor], Tensor]:
    """Logits (M, B, K) of images by the whole image ensemble or by its member 0, lightened as the decoder is."""
    ensemble = _require_image_ensemble(model)
    require_eval(ensemble)
    if which == "ensemble" and _apart(model):
        members = [_lightened(ensemble.member(m)) for m in range(ensemble.config.num_members)]
        return lambda x: torch.cat([member(x) for member in members])
    return _lightened(ensemble.member(0) if which == "member" else copy.deepcopy(ensemble))


def _lightened(ensemble: ImageEnsemble) -> ImageEnsemble:
    ensemble.encoder_layers = folded(ensemble.encoder_layers)
    return ensemble.requires_grad_(False)


def _apart(model: Model) -> bool:
    """Whether the members of the image ensemble are computed one after another; a constant of the model."""
    ensemble = _require_image_ensemble(model)
    weights = sum(parameter.nbytes for parameter in ensemble.parameters())
    return model.device.type == "cpu" and weights > APART_BYTES * ensemble.config.num_members


def _require_image_ensemble(model: Model) -> Any:
    if model.image_ensemble is None:
        raise ValueError(
            "this method needs classifiers of images, and the model has none; "
            "train them with jobs/train.py --image-members M"
        )
    return model.image_ensemble


def _slots(model: Model, which: str) -> int:
    """Rows computed together: few, so that the layers of all members stay near the processor; a constant of the model.

    On a CPU, codes and images of a block fill whole runs of 32 numbers: what is left over at the end of a tensor torch
    computes by other instructions than the rest, so that a row's last bits would depend on its slot.
    """
    members = 1 if which == "member" else _require_image_ensemble(model).config.num_members
    if model.device.type != "cpu":
        return max(8, 8192 // members)
    # More would be no faster, and a last long search would pay for more of them. Large weights are read once a block.
    slots = 16 if _apart(model) else max(4, min(16, 80 // members))
    while any(slots * size % 32 for size in (model.latent_dim, math.prod(model.image_shape))):
        slots *= 2
    return slots
