"""Checks of how far counterfactuals are: largest and smallest changes, asymmetric class pairs."""

import itertools
import math

import numpy as np
import pandas as pd

from clarity.findings.finding import Facts, Finding, NotChecked, Outcome, ranked
from clarity.findings.statistics import can_be_significant, fisher_p, holm, rank_sum_p
from clarity.report.text import listed, percent, plural

#: Pairs of a class pair below which it is not described as the hardest or easiest.
MIN_DESCRIBED = 5
#: Pairs in each direction below which two directions are not compared.
MIN_COMPARED = 8
#: An asymmetry is reported from this ratio of median distances, or from this difference of shares that converge.
MIN_RATIO, MIN_GAP = 1.4, 0.2


def check_extremes(facts: Facts) -> Outcome:
    """The class pairs with the largest and the smallest median change: a description, without a test."""
    pairs, converged = facts.pairs["pairs"], facts.pairs["strict_validity"] >= 0.5
    distance, steps = facts.pairs["median_distance"], facts.pairs["median_steps"]
    described = np.where((pairs >= MIN_DESCRIBED) & converged, distance, np.nan)
    failing = ranked(np.where((pairs >= MIN_DESCRIBED) & ~converged, -facts.pairs["strict_validity"], np.nan))
    if np.isfinite(described).sum() < 3:
        return NotChecked(
            f"a comparison needs three class pairs of at least {MIN_DESCRIBED} pairs that mostly converge"
        )
    usual = float(np.nanmedian(described))
    found = []
    for kind, severity, adjective, order in (
        ("hardest", 0.2, "largest", ranked(described)),
        ("easiest", 0.15, "smallest", ranked(-described)),
    ):
        first = order[0]
        beside = ""
        if failing and kind == "hardest":
            beside = f" Not ranked, with more failures than successes: {plural(len(failing), 'class pair')} "
            beside += f"({facts.arrows(failing)})."
        found.append(
            Finding(
                kind,
                severity,
                f"{adjective.capitalize()} change: {facts.arrow(first)}",
                f"{facts.arrow(first)} has the {adjective} median latent distance of {len(order)} class pairs: "
                f"{distance[first]:.1f} in {steps[first]:.0f} steps, where the median class pair has {usual:.1f}. "
                f"Next: {listed([facts.arrow(pair) for pair in order[1:4]])}.{beside}",
                "Descriptive: class pairs close to each other in this order may not differ significantly.",
                tuple(order[:6]),
                figures={"distance": float(distance[first]), "usual": usual},
            )
        )
    return found


def check_asymmetry(facts: Facts) -> Outcome:
    """Class pairs of which one direction goes further, or fails more often, beyond chance over all comparisons."""
    columns = facts.con.execute("SELECT source, target, converged, distance_z_l1 FROM counterfactuals").fetchnumpy()
    source, target, converged, distance = (np.ma.filled(values, 0) for values in columns.values())
    found, num_compared = asymmetries(source, target, converged.astype(bool), distance, len(facts.class_names))
    if not num_compared:
        return NotChecked(f"no two classes have {MIN_COMPARED} pairs in each direction")
    pairs = np.nan_to_num(facts.pairs["pairs"])
    most = int(np.minimum(pairs, pairs.T).max())
    if not can_be_significant(2 / math.comb(2 * most, most), 2 * num_compared):
        return NotChecked(f"{most} pairs in each direction are too few to compare {plural(num_compared, 'class pair')}")
    if not found:
        return []
    asymmetric = [pair for *_, pair in found]
    medians, validity = facts.pairs["median_distance"], facts.pairs["strict_validity"]
    fails_more, _, hard = found[0]
    easy = hard[::-1]
    ratio = float(medians[hard] / medians[easy])
    if fails_more:
        severity = 0.5
        words = (
            f"{facts.arrow(easy)} converges in {percent(validity[easy])} of its pairs, "
            f"{facts.arrow(hard)} in {percent(validity[hard])}"
        )
    else:
        severity = 0.3 + 0.35 * min(1.0, (ratio - MIN_RATIO) / 1.2)
        words = (
            f"{facts.arrow(easy)} is easy (median latent distance {medians[easy]:.1f}), {facts.arrow(hard)} is hard "
            f"({medians[hard]:.1f}, {ratio:.1f} times as far)"
        )
    others = ""
    if asymmetric[1:]:
        number = plural(len(asymmetric) - 1, "other class pair is", "other class pairs are")
        others = f" {number} harder than the reverse, too ({facts.arrows(asymmetric[1:])})."
    return Finding(
        "asymmetry",
        severity,
        f"One direction is harder: {facts.arrow(hard)}",
        f"{words}.{others}",
        "Rank-sum test of the distances and Fisher's exact test of the failures, Holm-corrected over "
        f"{plural(num_compared, 'class pair')}: at most 5 % of audits without any asymmetry would show one.",
        tuple(cell for pair in asymmetric[:4] for cell in (pair, pair[::-1])),
        figures={"ratio": ratio, "directions": len(asymmetric), "comparisons": num_compared},
    )


def asymmetries(
    source: np.ndarray, target: np.ndarray, converged: np.ndarray, distance: np.ndarray, num_classes: int
) -> tuple[list[tuple[bool, float, tuple[int, int]]], int]:
    """Compares the two directions of every two classes by their distances and by their shares that converge.

    Source, target, converged and distance are (P,). Returns for each harder direction whether it fails more often, the
    difference of these shares or else the ratio of median distances, and (source, target), in this order; and the
    number of class pairs compared.
    """
    rows = pd.DataFrame({"source": source, "target": target}).groupby(["source", "target"]).indices
    candidates, p_values = [], []
    for pair in itertools.combinations(range(num_classes), 2):
        there, back = (rows.get(direction, np.empty(0, int)) for direction in (pair, pair[::-1]))
        if min(len(there), len(back)) < MIN_COMPARED:
            continue
        far = [distance[some][converged[some]] for some in (there, back)]
        gap = float(converged[back].mean() - converged[there].mean())
        ratio = float(np.median(far[0]) / np.median(far[1])) if min(map(len, far)) >= MIN_COMPARED else 1.0
        candidates.append((pair, gap, ratio))
        # Smaller ones are not tested: a p-value of 1 only makes the correction of the others stricter.
        fails = further = 1.0
        if abs(gap) >= MIN_GAP:
            counts = [(int(converged[some].sum()), len(some)) for some in (there, back)]
            fails = fisher_p(*counts[0], *counts[1])
        if max(ratio, 1 / ratio) >= MIN_RATIO:
            further = rank_sum_p(*far)
        p_values += [fails, further]
    found = []
    for (pair, gap, ratio), (often, far_off) in zip(candidates, holm(p_values).reshape(-1, 2)):
        if often:
            found.append((True, abs(gap), pair if gap > 0 else pair[::-1]))
        elif far_off:
            found.append((False, max(ratio, 1 / ratio), pair if ratio > 1 else pair[::-1]))
    return sorted(found, key=lambda each: (not each[0], -each[1], each[2])), len(candidates)
