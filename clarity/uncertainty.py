"""Predictive, aleatoric and epistemic uncertainty of an ensemble."""

from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

Values = TypeVar("Values", Tensor, np.ndarray)


class Uncertainty(NamedTuple, Generic[Values]):
    """Uncertainties of each row, (B,) float32, in nats: predictive = aleatoric + epistemic."""

    predictive: Values
    aleatoric: Values
    epistemic: Values


def decompose(logits: Tensor) -> Uncertainty[Tensor]:
    """Decompose the entropy of an ensemble's mean prediction into data and model uncertainty (Depeweg et al. 2018).

    ``predictive`` is the entropy of the members' mean, ``aleatoric`` their mean entropy, ``epistemic`` the difference:
    the mutual information between label and member. Computed in float64, since the difference of two nearly equal
    entropies has no significant digit in float32; never negative, never NaN for finite ``logits`` (M, B, K).
    """
    # With the rows innermost all operations fill the vector lanes, which a handful of classes does not.
    logits = logits.transpose(1, 2).contiguous().double()
    # A probability of e^-750 is zero; so stays its product with its logarithm.
    logits = logits - logits.amax(1, keepdim=True)
    probs = logits.clamp_min_(-750).exp()
    total = probs.sum(1, keepdim=True)
    probs /= total
    entropies = total.log_().squeeze(1) - logits.mul_(probs).sum(1)
    mean = probs.mean(0)
    aleatoric = entropies.nan_to_num_(nan=0.0).mean(0)
    predictive = -torch.xlogy(mean, mean).sum(0).nan_to_num_(nan=0.0)
    # Rounding may put the entropy of the mean slightly below the mean entropy.
    epistemic = (predictive - aleatoric).clamp_min(0)
    return Uncertainty((aleatoric + epistemic).float(), aleatoric.float(), epistemic.float())
