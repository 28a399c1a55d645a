"""The methods of the paper side by side: each a function whose body is its equation.

Knows equations, and which classifier and space each is about. Does not know how a search runs or where results go.

Shapes: B rows, C,H,W image, D latent, K classes, M members.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clarity.search import Counterfactuals, LatentObjective, SearchConfig, descend

if TYPE_CHECKING:
    from clarity.checkpoints import Model


@dataclass(frozen=True)
class Pairs:
    """What is asked: (image, target) pairs with what each method may start from.

    ``x`` (B, C, H, W) in [0, 1], ``z`` (B, D) and ``log_var`` (B, D) the posterior's mean and log variance, ``noise``
    (B, D) standard normal numbers that depend on the image alone, ``target`` (B,) int64.
    """

    x: Tensor
    z: Tensor
    log_var: Tensor
    noise: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)


def clarity(model: Model, pairs: Pairs, config: SearchConfig, **run: Any) -> Counterfactuals:
    """Eq. 6: the latent ensemble's mean cross-entropy plus the L1 distance of the codes, from the posterior mean."""
    objective = LatentObjective(model.ensemble.layers(), config.distance_weight)
    return descend(objective, pairs.z, {"target": pairs.target, "reference": pairs.z}, config, **run)


def latent(model: Model, pairs: Pairs, config: SearchConfig, **run: Any) -> Counterfactuals:
    """Eq. 5: Eq. 6 with one latent classifier, member 0."""
    member = [(weight[:1], bias[:1]) for weight, bias in model.ensemble.layers()]
    objective = LatentObjective(member, config.distance_weight)
    return descend(objective, pairs.z, {"target": pairs.target, "reference": pairs.z}, config, **run)


@dataclass(frozen=True)
class Method:
    """A method and what its results are about.

    ``space`` of its points: latent or image. ``classifier`` whose probabilities it reports: ensemble or member
    (latent), image_ensemble or image_member.
    """

    search: Callable[..., Counterfactuals]
    space: str
    classifier: str
    doc: str


METHODS: dict[str, Method] = {
    "clarity": Method(clarity, "latent", "ensemble", "Eq. 6: latent ensemble"),
    "latent": Method(latent, "latent", "member", "Eq. 5: one latent classifier"),
}
