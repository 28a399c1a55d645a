"""Exact intervals, rank tests and corrections for many comparisons."""

from collections.abc import Sequence

import numpy as np
import scipy  # whose stats is loaded at its first use, in a second

#: Values up to which rank tests are exact.
MAX_EXACT = 40
#: Family-wise error rate: the chance of any false rejection among many comparisons, at most.
LEVEL = 0.05


def share_interval(successes: float, count: float, level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a share; ``count`` may be an effective number of observations."""
    tail = (1 - level) / 2
    low = scipy.special.betaincinv(successes, count - successes + 1, tail) if successes > 0 else 0.0
    high = scipy.special.betaincinv(successes + 1, count - successes, 1 - tail) if successes < count else 1.0
    return float(low), float(high)


def rank_sum_p(x: np.ndarray, y: np.ndarray) -> float:
    """Two-sided p-value of Mann-Whitney's test; exact for at most MAX_EXACT values without ties."""
    p_value = scipy.stats.mannwhitneyu(x, y, method=method_for(np.concatenate([x, y]))).pvalue
    return float(np.nan_to_num(p_value, nan=1.0))


def signed_rank_p(differences: np.ndarray) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test that differences are symmetric around zero; exact as above."""
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    return float(scipy.stats.wilcoxon(differences, correction=True, method=method_for(np.abs(differences))).pvalue)


def method_for(values: np.ndarray) -> str:
    """How scipy is to take the p-value of a test on the ranks of these values."""
    return "exact" if len(values) <= MAX_EXACT and len(np.unique(values)) == len(values) else "asymptotic"


def fisher_p(a: int, n: int, b: int, m: int) -> float:
    """Two-sided p-value of Fisher's exact test that ``a`` of ``n`` and ``b`` of ``m`` have the same probability."""
    return float(scipy.stats.fisher_exact([[a, n - a], [b, m - b]]).pvalue)


def can_be_significant(smallest_p: float, comparisons: int) -> bool:
    """Whether the smallest p-value that one of many comparisons can have is significant by Holm's procedure."""
    return smallest_p * comparisons <= LEVEL


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Which hypotheses Holm's procedure rejects: the chance of any false rejection is at most LEVEL."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    passed = np.cumprod(p[order] <= LEVEL / (len(p) - np.arange(len(p)))).astype(bool)
    rejected = np.zeros(len(p), bool)
    rejected[order] = passed
    return rejected
