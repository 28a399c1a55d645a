"""The methods of the paper side by side: each a function whose body is its equation. Ends in ``METHODS``.

``**run`` goes to ``descend`` (engine, threads, on_step).
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clarity.classifiers import LEAST_OUTPUTS, ImageEnsemble, LatentEnsemble
from clarity.model import Model
from clarity.objectives import LatentObjective, Rows, ensemble_terms, l1
from clarity.rows import decode_rows, folded, logits_rows, require_eval
from clarity.search import Counterfactuals, SearchConfig, descend

PIXELS = (0.0, 1.0)

#: Bytes of one member's weights above which a CPU computes image classifiers one after another: about the size of a
#: core's second-level cache, beyond which nothing is gained by computing them together.
APART_BYTES = 2 << 20
#: Pixels of the rows that a GPU decodes and classifies together: about 1 GB for each map of 32 channels, of which a
#: gradient keeps several.
DEVICE_PIXELS = 1 << 23


@dataclass(frozen=True)
class Pairs:
    """The (image, target) pairs of a search, with everything that some method starts from."""

    x: Tensor  # images (B, C, H, W) in [0, 1]
    z: Tensor  # posterior means (B, D)
    log_var: Tensor  # posterior log-variances (B, D)
    noise: Tensor  # standard normal (B, D), drawn from the image id alone
    target: Tensor  # (B,), int64
    min_target_prob: Tensor | None = None  # (B,) float32, a threshold for each pair; None for the config's
    #: codes (B, D) or images (B, C, H, W) from which to continue a search; None for the method's own start
    point: Tensor | None = None

    def __len__(self) -> int:
        return len(self.target)

    def select(self, index: Tensor | np.ndarray) -> "Pairs":
        """The pairs with these indices."""
        rows: dict[str, Any] = {name: None if values is None else values[index] for name, values in vars(self).items()}
        return Pairs(**rows)

    def sample(self) -> Tensor:
        """A sample z' ~ q(z | x) of each posterior, with the noise of the pair's image."""
        return self.z + torch.exp(self.log_var / 2) * self.noise


def search(
    objective: Callable[..., Any], start: Tensor, pairs: Pairs, config: SearchConfig, *args: Any, **run: Any
) -> Counterfactuals:
    """``descend`` from the method's start, or from where the pairs continue; distances are the same for both."""
    rows = {"target": pairs.target, "reference": start}
    if isinstance(objective, ImageObjective):
        rows["x"] = pairs.x
    if pairs.min_target_prob is not None:
        rows["min_target_prob"] = pairs.min_target_prob
    return descend(objective, start if pairs.point is None else pairs.point, rows, config, *args, **run)


def clarity(
    model: Model, pairs: Pairs, config: SearchConfig, fixed: Tensor | None = None, **run: Any
) -> Counterfactuals:
    """Eq. 6: the latent ensemble's mean cross-entropy + distance_weight * L1(z, z'), from the posterior mean."""
    objective = LatentObjective(model.ensemble.layers(), config.distance_weight, fixed)
    return search(objective, pairs.z, pairs, config, **run)


def latent(model: Model, pairs: Pairs, config: SearchConfig, **run: Any) -> Counterfactuals:
    """Eq. 5: one latent classifier's cross-entropy + distance_weight * L1(z, z'), from z, a sample of the posterior.

    The classifier is member 0.
    """
    sampled = replace(pairs, z=pairs.sample())
    return clarity(replace(model, ensemble=model.ensemble.member(0)), sampled, config, **run)


@dataclass(frozen=True)
class ImageObjective:
    """Mean cross-entropy of image classifiers at decode(point) plus ``distance_weight`` times an L1 distance."""

    classify: Callable[[Tensor], Tensor]  # logits (M, B, K) of images
    decode: Callable[[Tensor], Tensor]  # images of points; the identity for searches over pixels
    distance: str  # x for the L1 distance of the image to the row's x, z for that of the point to the row's reference
    distance_weight: float  # lambda
    fixed: Tensor | None = None  # (D, k), orthonormal directions along which no update moves; None for none

    def __call__(self, point: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (B,), target probability (B,) and logits (M, B, K)."""
        x_cf = self.decode(point)
        logits = self.classify(x_cf)
        cross_entropy, target_prob = ensemble_terms(logits, rows["target"])
        if not self.distance_weight:
            return cross_entropy, target_prob, logits
        distance = l1(x_cf, rows["x"]) if self.distance == "x" else l1(point, rows["reference"])
        return cross_entropy + self.distance_weight * distance, target_prob, logits


def search_images(
    model: Model,
    which: str,
    decode: Any,
    distance: str,
    start: Tensor,
    pairs: Pairs,
    config: SearchConfig,
    *update: str,
    fixed: Tensor | None = None,
    **run: Any,
) -> Counterfactuals:
    """``search`` with an ImageObjective of the image ensemble or its member 0; "" for no distance."""
    weight = config.distance_weight if distance else 0.0
    objective = ImageObjective(image_classifier(model, which), decode, distance, weight, fixed)
    return search(objective, start, pairs, config, *update, slots=slots(model, which), **run)


def revise(model: Model, pairs: Pairs, config: SearchConfig, **run: Any) -> Counterfactuals:
    """Eq. 3 (Joshi et al. 2019): member 0's cross-entropy at decode(z') + distance_weight * L1(x, x').

    From a sample of the posterior, by the paper's Adam.
    """
    return search_images(model, "member", decoder(model), "x", pairs.sample(), pairs, config, **run)


def revise_e(model: Model, pairs: Pairs, config: SearchConfig, **run: Any) -> Counterfactuals:
    """Eq. 4: the image ensemble's mean cross-entropy at decode(z') + distance_weight * L1(x, x')."""
    return search_images(model, "ensemble", decoder(model), "x", pairs.sample(), pairs, config, **run)


def revise_e_latent(model: Model, pairs: Pairs, config: SearchConfig, **run: Any) -> Counterfactuals:
    """Eq. 4 with the penalty in the latent space: distance_weight * L1(z, z'), z the sample at the start."""
    return search_images(model, "ensemble", decoder(model), "z", pairs.sample(), pairs, config, **run)


def fgsm(model: Model, pairs: Pairs, config: SearchConfig, **run: Any) -> Counterfactuals:
    """Eq. 1 in pixel space: member 0's cross-entropy + distance_weight * L1(x, x'), by Adam.

    The paper's name for it: not the one-step attack, but Adam over a classifier trained on FGSM examples.
    """
    return search_images(model, "member", nn.Identity(), "x", pairs.x, pairs, config, bounds=PIXELS, **run)


def schut(model: Model, pairs: Pairs, config: SearchConfig, **run: Any) -> Counterfactuals:
    """Eq. 2 (Schut et al. 2021): the image ensemble's mean cross-entropy, one pixel by step_size at a time.

    Follows the equation where the authors' code differs from it (cross-entropy of the mean logits, one stop for a
    batch), and their code where the paper is silent: a pixel changes at most five times.
    """
    return search_images(model, "ensemble", nn.Identity(), "", pairs.x, pairs, config, "jsma", bounds=PIXELS, **run)


@dataclass(frozen=True)
class Method:
    """An entry of ``METHODS``: ``search`` maps (model, pairs, config, **run) to Counterfactuals.

    ``space`` is that of its points, ``classifier`` whose probabilities it reports: ensemble or member (the latent
    ensemble or its member 0), or image_ensemble or image_member. ``doc`` is one line for people.
    """

    search: Callable[..., Counterfactuals]
    space: str
    classifier: str
    doc: str

    @property
    def single(self) -> bool:
        """Whether it asks one classifier rather than an ensemble."""
        return self.classifier.endswith("member")

    @property
    def classifies_images(self) -> bool:
        """Whether its classifiers read images, by far the slower ones, rather than codes."""
        return self.classifier.startswith("image")


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
    """Logits (M, B, K) of a method's own classifier at points of its space, by batch-independent inference."""
    known, ensemble = METHODS[method], ensemble_of(model, method)
    if known.classifies_images and known.space == "latent":
        points = decode_rows(model.vae, points)
    return logits_rows(ensemble.member(0) if known.single else ensemble, points)


def ensemble_of(model: Model, method: str) -> LatentEnsemble | ImageEnsemble:
    """The ensemble that a method asks; raises ValueError where the model has none."""
    return require_image_ensemble(model) if METHODS[method].classifies_images else model.ensemble


def decoder(model: Model) -> Callable[[Tensor], Tensor]:
    """The decoder for a search, with BatchNorm folded and gradients of weights disabled."""
    require_eval(model.vae)
    vae = copy.deepcopy(model.vae)
    vae.decoder_layers = folded(vae.decoder_layers)
    vae.requires_grad_(False)
    missing = max(0, LEAST_OUTPUTS - model.latent_dim)
    # The gradient by the code is a product whose outputs are the code's dimensions.
    vae.decoder_input.weight = nn.Parameter(F.pad(vae.decoder_input.weight, (0, missing)), requires_grad=False)
    return lambda z: vae.decode(F.pad(z, (0, missing)))


def image_classifier(model: Model, which: str) -> Callable[[Tensor], Tensor]:
    """The image ensemble or its member 0 for a search, with BatchNorm folded and gradients of weights disabled."""

    def prepared(ensemble: ImageEnsemble) -> ImageEnsemble:
        ensemble.encoder_layers = folded(ensemble.encoder_layers)
        return ensemble.requires_grad_(False)

    ensemble = require_image_ensemble(model)
    require_eval(ensemble)
    if which == "member":
        return prepared(ensemble.member(0))
    if computed_apart(model):
        members = [prepared(ensemble.member(m)) for m in range(ensemble.config.num_members)]
        return lambda x: torch.cat([member(x) for member in members])
    return prepared(copy.deepcopy(ensemble))


def computed_apart(model: Model) -> bool:
    """Whether the members of the image ensemble are computed one after another; a constant of the model."""
    ensemble = require_image_ensemble(model)
    weights = sum(parameter.nbytes for parameter in ensemble.parameters())
    return model.device.type == "cpu" and weights > APART_BYTES * ensemble.config.num_members


def require_image_ensemble(model: Model) -> ImageEnsemble:
    """The model's image ensemble; raises ValueError where it has none."""
    if model.image_ensemble is None:
        raise ValueError(
            "this method needs image classifiers, which the model lacks; train it with image_members above 0"
        )
    return model.image_ensemble


def slots(model: Model, which: str) -> int:
    """Rows computed together: few, so that the layers of all members stay in the cache; a constant of the model.

    On a CPU, codes and images of a block fill whole runs of 32 numbers: torch computes the remainder at the end of a
    tensor by other instructions, so that a row's last bits would depend on its slot.
    """
    members = 1 if which == "member" else require_image_ensemble(model).config.num_members
    if model.device.type != "cpu":
        return max(8, min(8192 // members, DEVICE_PIXELS // math.prod(model.image_shape[1:])))
    # More would be no faster, and the last long search would pay for all of them. Large weights are read once a block.
    count = 16 if computed_apart(model) else max(4, min(16, 80 // members))
    while any(count * size % 32 for size in (model.latent_dim, math.prod(model.image_shape))):
        count *= 2
    return count
