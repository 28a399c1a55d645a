#!/usr/bin/env python
"""Prints how often checks are false in reports with nothing to find, and how often they find a planted effect."""

import itertools
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "findings")]

from test_null_reports import REPORTS, accused, drifts, escapes, told_asymmetric  # noqa: E402

from clarity.findings.statistics import rank_sum_p  # noqa: E402
from clarity.report.text import percent  # noqa: E402

PLANTED = 60


def show(*values: object) -> None:
    """A row of a table; shares as percentages."""
    shown = [percent(float(value)) if isinstance(value, np.floating) else str(value) for value in values]
    print("| " + " | ".join(shown) + " |", flush=True)


def shares(false: int, found: int) -> np.ndarray:
    """Shares of reports that tell an effect without one, and with one."""
    return np.array([false / REPORTS, found / PLANTED])


def power_of_one_test(each: int, spread: float, ratio: float = 2.0) -> np.floating:
    """How often the planted ratio would be found if it were the only comparison."""
    samples = np.exp(np.random.default_rng(2).normal(0, spread, (PLANTED, 2, each)))
    return np.mean([rank_sum_p(easy, ratio * hard) < 0.05 for easy, hard in samples])


def main() -> None:
    """Prints a table for each check."""
    show("asymmetry: classes", "pairs each way", "log-spread", "failure", "false", "found", "by one test")
    for classes, each, failure in itertools.product((2, 10, 30), (9, 15, 50), (0.0, 0.2, 0.5)):
        for spread in (0.3, 0.6) if classes < 30 else (0.6,):
            false = told_asymmetric(REPORTS, classes, each, spread, failure)
            found = told_asymmetric(PLANTED, classes, each, spread, failure, 2.0, seed=1)
            alone = power_of_one_test(round(each * (1 - failure)), spread)
            show(classes, each, spread, failure, *shares(false, found), alone)
    show("drift: attributes x class pairs", "pairs", "false", "found")
    for cells, each in itertools.product((2, 90, 480, 3600), (12, 20, 50)):
        show(cells, each, *shares(drifts(REPORTS, cells, each), drifts(PLANTED, cells, each, 0.5, seed=1)))
    show("escape: classes", "images", "counterfactuals", "false", "found")
    for classes, images, each in itertools.product((2, 10, 30), (300, 1000), (20, 50)):
        found = escapes(PLANTED, classes, images, each, 20.0, seed=1)
        show(classes, images, each, *shares(escapes(REPORTS, classes, images, each), found))
    show("labels: classes", "accuracy", "accused by suspicion", "by the check")
    for classes, accuracy in itertools.product((2, 4, 10), (0.66, 0.8, 0.88, 0.92, 0.96, 0.98)):
        show(classes, accuracy, *np.mean([accused(classes, accuracy, 3000, seed) for seed in range(5)], 0))


if __name__ == "__main__":
    main()
