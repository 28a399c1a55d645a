"""Checks of written images, and the thresholds of rungs."""

from __future__ import annotations

import numpy as np
import pytest

from clarity.checks import next_threshold


def test_next_threshold_divides_the_distance_to_one_by_three() -> None:
    rungs = [np.array([0.99, 0.4], np.float32)]
    for _ in range(3):
        rungs.append(next_threshold(rungs[-1]))
    assert rungs[3].dtype == np.float32
    assert rungs[3] == pytest.approx([1 - 0.01 / 27, 1 - 0.6 / 27], abs=1e-6)


def test_next_threshold_stays_below_one() -> None:
    assert next_threshold(np.array([np.nextafter(np.float32(1), np.float32(0))]))[0] < 1
