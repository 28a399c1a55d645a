"""Checks of written counterfactual images, and the further search of pairs that fail one.

A check is one function over the images as they are written, in 8 bits. A pair that fails a check continues its search
on the next rung: from where it stands, with fresh moments, a threshold nearer to 1, and no distance penalty.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from clarity.attributes import AttributeHeads
from clarity.methods import METHODS, Pairs
from clarity.model import Model
from clarity.search import Counterfactuals, SearchConfig
from clarity.tables import Asked, Results, Written, select, to_numpy

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


def at_least(probs: str, least: float, likeliest: bool = False) -> Check:
    """The model behind this field of ``Written`` gives the target this much, and, if ``likeliest``, no class more."""

    def check(written: Written, target: np.ndarray) -> np.ndarray:
        found = getattr(written, probs)
        passed = found[np.arange(len(target)), target] >= np.float32(least)
        return passed & (found.argmax(1) == target) if likeliest else passed

    return check


def passes(checks: Sequence[Check], written: Written, target: np.ndarray) -> np.ndarray:
    """Whether each written image (P,) passes every check."""
    return np.logical_and.reduce([check(written, target) for check in checks])


def search_again(
    results: Results,
    asked: Asked,
    config: SearchConfig,
    checks: Sequence[Check],
    search: Callable[[Pairs, SearchConfig], Counterfactuals],
    write: Callable[[Asked, Tensor], Written],
    doubtful: np.ndarray,
) -> Results:
    """Search pairs that failed a check, or are ``doubtful``, again: on up to ``MAX_RUNGS`` rungs, ``max_steps`` in all.

    Where no rung passes all checks, the first result stays, confirmed or not.
    """
    assert results.confirmed is not None
    point, steps, finite = results.found.point.clone(), results.found.steps.clone(), results.found.finite
    thresholds = np.full(len(steps), config.min_target_prob, np.float32)
    if asked.pairs.min_target_prob is not None:
        thresholds = to_numpy(asked.pairs.min_target_prob)
    rows = np.flatnonzero((~results.confirmed | doubtful) & to_numpy(finite & (steps < config.max_steps)))
    for rung in range(1, MAX_RUNGS + 1):
        if not len(rows):
            break
        thresholds, results.rungs[rows] = next_threshold(thresholds), rung
        limit = torch.from_numpy(thresholds[rows]).to(point.device)
        pairs = replace(asked.pairs.select(rows), point=point[rows], min_target_prob=limit)
        # The largest budget left serves all: a row that needs more than its own is dropped below.
        left = config.max_steps - int(steps[rows].min())
        again = search(pairs, replace(config, max_steps=left, distance_weight=0.0))
        point[rows], steps[rows] = again.point, steps[rows] + again.steps
        reached = to_numpy(again.converged & (steps[rows] <= config.max_steps))
        again, rows = select(replace(again, steps=steps[rows]), reached), rows[reached]
        if not len(rows):
            break
        part = asked.select(rows)
        written = write(part, again.point)
        passed = passes(checks, written, part.target)
        results = results.updated(rows[passed], select(again, passed), select(written, passed))
        rows = rows[~passed]
    return results


def require_judge(model: Model, min_judge_prob: float) -> None:
    """Raises ValueError where a judge is asked for that the model does not have."""
    if min_judge_prob and model.judge is None:
        raise ValueError("min_judge_prob: expected a model with a judge, got one without: train one")


def next_threshold(threshold: np.ndarray) -> np.ndarray:
    """The threshold of the next rung: its distance to 1 divided by 3, and less than 1 in float32."""
    below_one = np.nextafter(np.float32(1), np.float32(0))
    return np.minimum(1 - (1 - threshold.astype(np.float64)) / 3, below_one).astype(np.float32)


def kept_heads(model: Model, method: str, keep: Sequence[str]) -> AttributeHeads | None:
    """The heads of the attributes to keep, None where there are none; ValueError where the model or method cannot."""
    if not keep:
        return None
    if isinstance(keep, str):
        raise ValueError(f"keep: expected a list of attributes, got {keep!r}")
    if METHODS[method].space != "latent":
        raise ValueError(f"keep: method {method!r} changes pixels; choose one that searches codes")
    if model.heads is None:
        raise ValueError("keep: this model has no heads for attributes; train them with attributes")
    heads = model.heads.select(keep)
    heads.directions()
    return heads
