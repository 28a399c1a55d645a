"""The closest counterfactual: shrink one that was found towards its reference, as far as its probability allows.

Adam moves every coordinate by about its rate, whatever the gradient, so that Algorithm 1 ends far from the closest
point that satisfies it. Here each round moves every coordinate towards the reference (soft thresholding, the proximal
step of the L1 distance) and repairs the target probability along its gradient. Outside of ``evaluate`` every operation
rounds exactly, so a row's bits do not depend on the batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

#: Target probability (n,) at points (n, D), and its gradient (n, D), of the rows with these indices (n,).
Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

MAX_ROUNDS = 80
MAX_REPAIRS = 2  # by a new gradient in a round; the first repair uses the gradient of the round before
HALVINGS = 3  # of the stride after failed rounds, before a row ends
LEAST_GAIN = 0.1  # of the distance that shrinking alone gains in a round
LEAST_REST = 1e-7  # of 1 - probability, which may be 0 in float32
MARGIN = 0.02  # share of 1 - min_target_prob by which a repair aims beyond the threshold


def refine(
    evaluate: Evaluate,
    point: Tensor,
    reference: Tensor,
    min_target_prob: Tensor,
    stride: float,
    fixed: Tensor | None = None,
    bounds: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Reduce the L1 distance of points (B, D) to their reference while they satisfy ``min_target_prob``.

    A round shrinks each coordinate's distance by the stride; where that costs too much probability, up to three Newton
    steps on its logarithm follow. The result is kept if it satisfies and retains LEAST_GAIN of the distance that
    shrinking alone gains; otherwise the stride is halved. Smaller gains, bought by a few coordinates with steep
    gradients, cost realism: of 90,000 pairs of MNIST an independent network misses the target in 0.19 % after
    Algorithm 1, in 0.49 % here, in 0.85 % where any gain counts.

    ``evaluate`` gives target probability and its gradient; no point moves along the orthonormal directions ``fixed``
    (D, k). Returns the points and their target probability (B,).
    """
    rows = torch.arange(len(point), device=point.device)
    best, goal = point.clone(), (1 - min_target_prob) * (1 - MARGIN)
    prob, grad = evaluate(best, rows)
    strides = torch.full_like(prob, stride)
    # A probability that another arithmetic puts below the threshold leaves its point as it is.
    searching = prob > min_target_prob
    for _ in range(MAX_ROUNDS):
        active = rows[searching]
        if not len(active):
            break
        here, origin, aim = best[active], reference[active], goal[active]
        away = here - origin
        shrunk = away.sign() * (away.abs() - strides[active, None]).clamp_min(0)
        move = without(shrunk - away, fixed)
        # What the last gradient predicts: log(1 - prob) changes by slope . move / (1 - prob).
        slope, rest = without(-grad[active], fixed), (1 - prob[active]).clamp_min(LEAST_REST)
        excess = (log_ratio(rest, aim) + sum_rows(slope * move) / rest).clamp_min(0)
        candidate = bounded(here + move - newton(excess, rest, slope), bounds)
        found_prob, found_grad = evaluate(candidate, active)
        for _ in range(MAX_REPAIRS):
            short = (found_prob <= min_target_prob[active]).nonzero().squeeze(1)
            if not len(short):
                break
            slope, rest = without(-found_grad[short], fixed), (1 - found_prob[short]).clamp_min(LEAST_REST)
            step = newton(log_ratio(rest, aim[short]), rest, slope)
            candidate[short] = bounded(candidate[short] - step, bounds)
            found_prob[short], found_grad[short] = evaluate(candidate[short], active[short])
        distance = sum_rows(away.abs())
        least = LEAST_GAIN * (distance - sum_rows(shrunk.abs()))
        closer = sum_rows((candidate - origin).abs()) < distance - least
        kept = (found_prob > min_target_prob[active]) & closer
        improved, failed = active[kept], active[~kept]
        best[improved], prob[improved], grad[improved] = candidate[kept], found_prob[kept], found_grad[kept]
        strides[failed] /= 2
        searching[failed] = strides[failed] >= stride / 2**HALVINGS
    return best, prob


def sum_rows(values: Tensor) -> Tensor:
    """Sum (B,) of values (B, D) by halves: the same order of additions for each row, whatever the batch."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        values = torch.cat([values[:, :half] + values[:, half : 2 * half], values[:, 2 * half :]], 1)
    return values[:, 0]


def without(move: Tensor, fixed: Tensor | None) -> Tensor:
    """The moves (B, D) without their parts along the fixed directions (D, k)."""
    for direction in () if fixed is None else fixed.t():
        move = move - sum_rows(move * direction).unsqueeze(1) * direction
    return move


def newton(excess: Tensor, rest: Tensor, slope: Tensor) -> Tensor:
    """The step (B, D) along the gradient ``slope`` of ``rest`` that lowers log(rest) by ``excess``, to first order."""
    return (excess * rest / sum_rows(slope * slope).clamp_min(1e-30)).unsqueeze(1) * slope


def log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """log(a / b) by a series, low for large ratios: the logarithm of a library may round by batch index."""
    r = (a - b) / (a + b)
    square = r * r
    return 2 * r * (1 + square * (1 / 3 + square * (1 / 5 + square / 7)))


def bounded(points: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """The points, clamped to the bounds if there are any."""
    return points if bounds is None else points.clamp(*bounds)
