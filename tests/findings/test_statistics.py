"""Intervals and tests against scipy.stats, and their error rates."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from clarity.findings.statistics import fisher_p, holm, rank_sum_p, share_interval, signed_rank_p


@pytest.mark.parametrize(("successes", "count"), [(0, 20), (20, 20), (3, 7), (499, 500)])
def test_share_interval_is_clopper_and_pearsons(successes: int, count: int) -> None:
    expected = stats.binomtest(successes, count).proportion_ci(method="exact")
    assert share_interval(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(("share", "count"), [(0.99, 20), (0.995, 100), (0.999, 100), (0.5, 30)])
def test_share_interval_covers_at_least_what_it_says(share: float, count: int) -> None:
    drawn = np.arange(count + 1)
    covered = [low <= share <= high for low, high in (share_interval(k, count) for k in drawn)]
    assert stats.binom.pmf(drawn, count, share)[covered].sum() >= 0.95


def test_rank_tests_agree_with_scipy() -> None:
    rng = np.random.default_rng(0)
    x, y = np.round(rng.normal(size=17), 1), np.round(rng.normal(0.4, 1, 23), 1)
    expected = stats.mannwhitneyu(x, y, method="asymptotic").pvalue
    assert rank_sum_p(x, y) == pytest.approx(expected, rel=1e-9)
    expected = stats.wilcoxon(x, correction=True, method="asymptotic").pvalue
    assert signed_rank_p(x) == pytest.approx(expected, rel=1e-6)
    assert rank_sum_p(np.ones(5), np.ones(5)) == 1.0 and signed_rank_p(np.zeros(5)) == 1.0
    for n, m in ((8, 8), (3, 11), (20, 20), (1, 2)):  # of few values they are exact
        x, y = rng.normal(size=n), rng.normal(0.7, 1, m)
        assert rank_sum_p(x, y) == pytest.approx(stats.mannwhitneyu(x, y, method="exact").pvalue, rel=1e-9)
        assert signed_rank_p(x) == pytest.approx(stats.wilcoxon(x, method="exact").pvalue, rel=1e-9)
    far = np.arange(25) + 100  # in the far tail of the approximation they are conservative
    assert rank_sum_p(far - 100, far) > stats.mannwhitneyu(far - 100, far, method="exact").pvalue


@pytest.mark.parametrize(("a", "n", "b", "m"), [(3, 15, 12, 15), (0, 9, 9, 9), (50, 50, 41, 50), (0, 8, 0, 8)])
def test_fisher_p_agrees_with_scipy(a: int, n: int, b: int, m: int) -> None:
    assert fisher_p(a, n, b, m) == pytest.approx(stats.fisher_exact([[a, n - a], [b, m - b]]).pvalue, rel=1e-6)


def test_holm_rejects_in_steps() -> None:
    assert holm([0.04, 0.001, 0.03, 0.012]).tolist() == [False, True, False, True]
    assert holm([0.02, 0.013, 0.03]).tolist() == [True, True, True] or not holm([0.02, 0.02, 0.03]).any()
    assert holm([]).tolist() == []
