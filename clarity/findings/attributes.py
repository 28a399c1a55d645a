"""Check of attributes that move although a counterfactual should leave them alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clarity.findings.finding import Facts, Finding, NotChecked
from clarity.findings.statistics import can_be_told, holm, signed_rank_p
from clarity.report.text import listed, percent, plural

#: Pairs of a class pair at least, and mean change of the attribute's probability from which a drift is told.
MIN_PAIRS, MIN_DRIFT = 12, 0.1


def check_attributes(facts: Facts) -> list[Finding] | NotChecked:
    """Attributes whose probability drifts, beyond chance over all attributes and class pairs.

    The table ``attributes`` holds the probabilities of each pair before and after.
    """
    if "attributes" not in facts.tables:
        return NotChecked("the attributes of the pictures were not measured")
    rows = facts.rows(
        """
        SELECT attribute, source, target, list(prob_final - prob_initial ORDER BY image_id),
               count(*) FILTER ((prob_initial > 0.5) <> (prob_final > 0.5))
        FROM attributes JOIN counterfactuals USING (image_id, target)
        WHERE converged GROUP BY ALL HAVING count(*) >= $min_pairs ORDER BY attribute, source, target
        """,
        {"min_pairs": MIN_PAIRS},
    )
    if not rows:
        return NotChecked(f"no class pair has {MIN_PAIRS} pairs with attributes")
    changes = [np.array(row[3]) for row in rows]
    most = max(map(len, changes))
    if not can_be_told(2.0 ** (1 - most), len(rows)):
        return NotChecked(f"{most} pairs of a class pair are too few for {len(rows):,} comparisons")
    drifting = [(float(change.mean()), row) for change, row, drifts in zip(changes, rows, drift(changes)) if drifts]
    if not drifting:
        return []
    drifting.sort(key=lambda entry: (-abs(entry[0]), entry[1][:3]))
    mean, (attribute, source, target, change, flipped) = drifting[0]
    names = list(dict.fromkeys(row[0] for _, row in drifting))
    others = f" Other attributes that drift: {listed(names[1:5])}." if names[1:] else ""
    return [
        Finding(
            "attributes",
            min(0.95, 0.4 + abs(mean)),
            f"“{attribute}” drifts",
            f"{facts.arrow((source, target))} should leave “{attribute}” alone, but moves its probability by "
            f"{mean:+.2f} on average and flips it in {percent(flipped, len(change))} of "
            f"{plural(len(change), 'pair')}.{others}",
            f"Signed-rank tests of {len(rows):,} attributes of class pairs, Holm-corrected: at most 5 % of audits "
            "without any drift would show one. The attributes are one network's view.",
            tuple(dict.fromkeys((row[1], row[2]) for _, row in drifting))[:6],
            figures={"drift": mean, "attributes": len(names), "comparisons": len(rows)},
        )
    ]


def drift(changes: Sequence[np.ndarray]) -> np.ndarray:
    """Which of many samples of changes have a mean of at least MIN_DRIFT, beyond chance over all of them."""
    # What is too small to be told keeps a p-value of 1, which only makes the others' correction stricter.
    return holm([signed_rank_p(change) if abs(change.mean()) >= MIN_DRIFT else 1.0 for change in changes])
