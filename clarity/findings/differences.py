"""What counterfactuals change on average, and regions and tints in it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

#: Mean changes by class pair are kept up to this number of classes.
MAX_MAPPED_CLASSES = 24
#: Images of a class below which nothing is said of what they have in common.
MIN_IMAGES = 10


@dataclass(frozen=True)
class Differences:
    """Means and standard deviations over a sample of pairs; a change is counterfactual minus reconstruction."""

    mean: np.ndarray  # (K, K, C, H, W) change by [source, target]; (0, 0, C, H, W) above MAX_MAPPED_CLASSES classes
    count: np.ndarray  # (K, K) pairs
    target_mean: np.ndarray  # (K, C, H, W) change towards a target
    target_std: np.ndarray
    tint_mean: np.ndarray  # (K, C) change averaged over the pixels of a picture
    tint_std: np.ndarray
    #: (K, C, H, W) of the counterfactuals themselves: near zero where they are the same whatever the start
    after_std: np.ndarray
    real_difference: np.ndarray  # (K, C, H, W) mean reconstruction of a class minus that of the starts towards it
    #: (K, C, H, W) standard deviation of the reconstructions of a class or of those starts, whichever is larger
    real_std: np.ndarray


def mean_differences(
    before: np.ndarray, after: np.ndarray, source: np.ndarray, target: np.ndarray, num_classes: int
) -> Differences:
    """Averages changes from ``before`` to ``after`` (P, C, H, W) in [0, 1] by class pair and by target."""
    change = after - before
    shape = change.shape[1:]
    mapped = num_classes if num_classes <= MAX_MAPPED_CLASSES else 0
    mean = np.zeros((mapped, mapped, *shape), np.float32)
    count = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(count, (source, target), 1)
    target_mean, target_std, after_std, real_difference, real_std = np.zeros((5, num_classes, *shape), np.float32)
    tint_mean, tint_std = np.zeros((2, num_classes, shape[0]), np.float32)
    for wanted in np.unique(target):
        rows = target == wanted
        for start in range(mapped):
            if count[start, wanted]:
                mean[start, wanted] = change[rows & (source == start)].mean(0)
        target_mean[wanted], target_std[wanted] = change[rows].mean(0), change[rows].std(0)
        after_std[wanted] = after[rows].std(0)
        tint = change[rows].mean((2, 3))
        tint_mean[wanted], tint_std[wanted] = tint.mean(0), tint.std(0)
        if (own := source == wanted).any():
            real_difference[wanted] = before[own].mean(0) - before[rows].mean(0)
            real_std[wanted] = np.maximum(before[own].std(0), before[rows].std(0))
    return Differences(mean, count, target_mean, target_std, tint_mean, tint_std, after_std, real_difference, real_std)


def tint_of(differences: Differences, target: int) -> dict[str, Any] | None:
    """The steady shift of the whole picture that makes up at least half of the mean change towards a target, or None.

    ``tint`` (C,); ``concentration`` and ``real``, its share of the mean change's and of the real difference's squared
    sum; ``spread``, its standard deviation over the pairs, relative to it.
    """
    tint, std = differences.tint_mean[target], differences.tint_std[target]
    strongest = int(np.abs(tint).argmax())
    share = share_of_change(differences.target_mean[target], tint[:, None, None])
    real = differences.real_difference[target]
    if abs(tint[strongest]) < max(0.04, 2 * std[strongest]) or share < 0.5:
        return None
    return {
        "tint": tint.tolist(),
        "concentration": share,
        "real": share_of_change(real, real.mean((1, 2), keepdims=True)),
        "spread": float(std[strongest] / abs(tint[strongest])),
    }


def region_of(differences: Differences, target: int) -> dict[str, Any] | None:
    """The mark on at most 12 % of the picture that the counterfactuals towards a target write, or None.

    Either it is constant in real images: its pixels vary little in the class, and little in the others, and differ
    between the two; then it need hold only a tenth of the mean change. Or it holds 40 %, and that change is steady.

    ``box`` (top, bottom, left, right; half open); ``area``, its share of the picture; ``concentration`` and ``real``,
    of the mean change's and of the real difference's squared sum; ``constant``: whether it is constant in real images,
    of which there must be MIN_IMAGES of the class; ``variation``, the median standard deviation of the counterfactuals
    in it; ``border``: whether it lies in the outer fifth of the picture.
    """
    mean, std = differences.target_mean[target], differences.target_std[target]
    size, real = np.abs(mean), differences.real_difference[target]
    constant = (np.abs(real) >= 0.2) & (differences.real_std[target] <= 0.15 * np.abs(real))
    constant &= differences.count[target].max() >= MIN_IMAGES  # an image has one pair with each target
    for steady, least in ((constant & (size >= std), 0.1), (size >= 2 * std, 0.4)):
        mark = ((size >= 0.2) & steady).any(0)
        concentration = share_of_change(mean, mean * mark)
        if mark.sum() >= 2 and mark.mean() <= 0.12 and concentration >= least:
            break
    else:
        return None
    rows, columns = np.flatnonzero(mark.any(1)), np.flatnonzero(mark.any(0))
    height, width = mark.shape
    outer = np.ones(mark.shape, bool)
    outer[round(0.2 * height) : round(0.8 * height), round(0.2 * width) : round(0.8 * width)] = False
    return {
        "box": [int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1],
        "area": float(mark.mean()),
        "concentration": concentration,
        "real": share_of_change(real, real * mark),
        "constant": bool(constant.any(0)[mark].all()),
        "variation": float(np.median(differences.after_std[target][:, mark])),
        "border": bool(outer[mark].mean() > 0.5),
    }


def share_of_change(change: np.ndarray, part: np.ndarray) -> float:
    """Squared sum of a part of a change, relative to the change's."""
    energy = float((change**2).sum())
    return float((np.broadcast_to(part, change.shape) ** 2).sum()) / energy if energy else 0.0
