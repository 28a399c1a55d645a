"""Predictive, aleatoric and epistemic uncertainty of an ensemble.

Knows the decomposition only, not what is classified.

Shapes: M members, B rows, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Uncertainty(NamedTuple):
    """Uncertainties of each row, (B,) float32, in nats: predictive = aleatoric + epistemic."""

    predictive: Tensor
    aleatoric: Tensor
    epistemic: Tensor


def decompose(logits: Tensor) -> Uncertainty:
    """Decompose the entropy of an ensemble's mean prediction into data and model uncertainty (Depeweg et al. 2018).

    ``predictive`` is the entropy of the members' mean, ``aleatoric`` their mean entropy, ``epistemic`` the difference:
    the mutual information between label and member. Computed in float64, since the difference of two nearly equal
    entropies has no significant digit in float32; never negative, never NaN for finite logits.

    Args:
        logits: (M, B, K).
    """
    if logits.ndim != 3:
        raise ValueError(f"expected logits of shape (M, B, K), got {tuple(logits.shape)}")
    log_probs = torch.log_softmax(logits.double(), -1)
    # The log of the mean is computed from logs, so that a probability of 1e-40 keeps its logarithm.
    log_mean = torch.logsumexp(log_probs, 0) - torch.log(torch.tensor(float(len(logits)), dtype=torch.float64))
    aleatoric = entropy(log_probs).mean(0)
    predictive = entropy(log_mean)
    # Rounding may put the entropy of the mean slightly below the mean entropy.
    epistemic = (predictive - aleatoric).clamp_min(0)
    return Uncertainty((aleatoric + epistemic).float(), aleatoric.float(), epistemic.float())


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy over the last axis, with 0 log 0 = 0."""
    terms = log_probs.exp() * log_probs
    return -terms.nan_to_num(nan=0.0).sum(-1).clamp_max(0)
