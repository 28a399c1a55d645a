"""Intervals and tests against scipy.stats, and their error rates."""

import math

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


def test_rank_tests_are_exact_for_few_values_and_survive_ties() -> None:
    few, many = np.arange(4.0), np.arange(30.0)
    assert rank_sum_p(few, few + 4.5) == pytest.approx(2 / 70) and signed_rank_p(few + 1) == pytest.approx(2 / 16)
    assert rank_sum_p(many, many + 100) > 2 / math.comb(60, 30)  # in the far tail it is conservative
    assert rank_sum_p(np.ones(5), np.ones(5)) == 1.0 and signed_rank_p(np.zeros(5)) == 1.0
    assert fisher_p(0, 9, 9, 9) == pytest.approx(2 / math.comb(18, 9)) and fisher_p(0, 8, 0, 8) == 1.0


def test_holm_rejects_in_steps() -> None:
    assert holm([0.04, 0.001, 0.03, 0.012]).tolist() == [False, True, False, True]
    assert holm([0.02, 0.013, 0.03]).tolist() == [True, True, True] or not holm([0.02, 0.02, 0.03]).any()
    assert holm([]).tolist() == []
