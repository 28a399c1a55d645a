"""Checks of written counterfactual images, and what a pair does that fails one.

A check is one function over the images as they are written, in 8 bits. A pair that fails a check continues its search
on the next rung: from where it stands, with fresh moments, against a threshold nearer to 1, without a distance
penalty. Does not know how images are searched or written.

Shapes: P pairs, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from clarity.model import Model
from clarity.tables import Written

MAX_RUNGS = 3


@dataclass(frozen=True)
class Requirements:
    """What a counterfactual must satisfy beside the config of the search.

    Args:
        min_reencoded_prob: probability of the target that the written image must have when encoded again; 0: no check.
        min_judge_prob: probability of the target by the held-out judge, whose share is then no evidence; 0: no check.
        min_predictor_prob: with a predictor, its least probability of the target for the written image.
    """

    min_reencoded_prob: float = 0.0
    min_judge_prob: float = 0.0
    min_predictor_prob: float = 0.5

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < 1:
                raise ValueError(f"{name}: expected at least 0 and less than 1, got {value}")


#: Whether each written image (P,) passes, given the wanted classes (P,).
Check = Callable[[Written, np.ndarray], np.ndarray]


def reencoded(min_prob: float) -> Check:
    """The ensemble, on the written image encoded again, gives the target at least this probability."""
    return lambda written, target: written.probs[np.arange(len(target)), target] >= np.float32(min_prob)


def confirmed_by_judge(min_prob: float) -> Check:
    """The held-out judge, on the written image, gives the target at least this probability."""

    def check(written: Written, target: np.ndarray) -> np.ndarray:
        assert written.judge_probs is not None
        return written.judge_probs[np.arange(len(target)), target] >= np.float32(min_prob)

    return check


def confirmed_by_predictor(min_prob: float) -> Check:
    """The predictor, on the written image, gives the target at least this probability, and none a higher one."""

    def check(written: Written, target: np.ndarray) -> np.ndarray:
        assert written.predictor_probs is not None
        probs = written.predictor_probs[np.arange(len(target)), target]
        return (written.predictor_probs.argmax(1) == target) & (probs >= np.float32(min_prob))

    return check


def require_judge(model: Model, min_judge_prob: float) -> None:
    """Raises ValueError where a judge is asked for that the model does not have."""
    if min_judge_prob and model.judge is None:
        raise ValueError("min_judge_prob: expected a model with a judge, got one without: train one")


def next_threshold(threshold: np.ndarray) -> np.ndarray:
    """The threshold of the next rung: its distance to 1 divided by 3, and less than 1 in float32."""
    below_one = np.nextafter(np.float32(1), np.float32(0))
    return np.minimum(1 - (1 - threshold.astype(np.float64)) / 3, below_one).astype(np.float32)
