"""Checks of attributes: those that move though a counterfactual should leave them alone; what keeping some costs."""

from collections.abc import Sequence

import numpy as np

from clarity.audit.queries import statement
from clarity.findings.finding import Facts, Finding, NotChecked, Outcome
from clarity.findings.statistics import can_be_significant, holm, signed_rank_p
from clarity.report.text import listed, percent, plural

#: Pairs of a class pair at least, and mean change of the attribute's probability from which a drift is reported.
MIN_PAIRS, MIN_DRIFT = 12, 0.1
#: Share of flips from which an attribute counts as not kept.
MOST_FLIPPED = 0.1


def check_attributes(facts: Facts) -> Outcome:
    """Attributes whose probability drifts, beyond chance over all attributes and class pairs."""
    if not facts.has_table("attributes"):
        return NotChecked("the attributes of the pictures were not measured")
    rows = facts.rows(statement("attribute_drift"), {"min_pairs": MIN_PAIRS})
    if not rows:
        return NotChecked(f"no class pair has {MIN_PAIRS} pairs with attributes")
    changes = [np.array(row[3]) for row in rows]
    most = max(map(len, changes))
    if not can_be_significant(2.0 ** (1 - most), len(rows)):
        return NotChecked(f"{most} pairs of a class pair are too few for {len(rows):,} comparisons")
    drifting = [(float(change.mean()), row) for change, row, drifts in zip(changes, rows, drift(changes)) if drifts]
    if not drifting:
        return []
    drifting.sort(key=lambda entry: (-abs(entry[0]), entry[1][:3]))
    mean, (attribute, source, target, change, flipped) = drifting[0]
    names = list(dict.fromkeys(row[0] for _, row in drifting))
    others = f" Other attributes that drift: {listed(names[1:5])}." if names[1:] else ""
    return Finding(
        "attributes",
        min(0.95, 0.4 + abs(mean)),
        f"“{attribute}” drifts",
        f"{facts.arrow((source, target))} should leave “{attribute}” alone, but moves its probability by "
        f"{mean:+.2f} on average and flips it in {percent(flipped, len(change))} of "
        f"{plural(len(change), 'pair')}.{others}",
        f"Signed-rank tests of {len(rows):,} combinations of attribute and class pair, Holm-corrected: at most 5 % of "
        "audits without any drift would show one. Attributes are as one network sees them.",
        tuple(dict.fromkeys((row[1], row[2]) for _, row in drifting))[:6],
        figures={"drift": mean, "attributes": len(names), "comparisons": len(rows)},
    )


def drift(changes: Sequence[np.ndarray]) -> np.ndarray:
    """Which of many samples of changes have a mean of at least MIN_DRIFT, beyond chance over all of them."""
    # Smaller ones are not tested: a p-value of 1 only makes the correction of the others stricter.
    return holm([signed_rank_p(change) if abs(change.mean()) >= MIN_DRIFT else 1.0 for change in changes])


def check_kept(facts: Facts) -> Outcome:
    """Failed pairs of images with and without each kept attribute, and pictures in which it flips all the same."""
    if not facts.keep:
        return NotChecked("no attribute was kept")
    if not facts.num_pairs:
        return NotChecked("the audit has no pairs")
    costs, losses, flips, missed = [], [], {}, 0
    for index, name in enumerate(facts.keep, 1):
        sides = {}
        reached = flipped = 0
        for is_set, pairs, converged, changed in facts.rows(statement("kept_flips"), {"index": index}):
            sides["with" if is_set else "without"] = percent(pairs - converged, pairs)
            reached, flipped = reached + converged, flipped + changed
        missed = facts.num_pairs - reached
        flips[name] = flipped / max(reached, 1)
        costs.append(listed([f"{share} {side} “{name}”" for side, share in sides.items()]))
        losses.append(f"“{name}” in {percent(flipped, max(reached, 1))}")
    judged = judged_flips(facts)
    seen = [f"“{name}” in {percent(flipped, pairs)}" for name, (flipped, pairs) in judged.items()]
    shares = [*flips.values(), *(flipped / pairs for flipped, pairs in judged.values())]
    return Finding(
        "kept",
        0.5 if max(shares) > MOST_FLIPPED else 0.3,
        f"With {listed(list(facts.keep))} kept, {plural(missed, 'pair')} did not converge",
        f"With {plural(len(facts.keep), 'attribute')} kept, {percent(missed, facts.num_pairs)} of "
        f"{plural(facts.num_pairs, 'pair')} did not converge; by image, {'; '.join(costs)}. Once decoded "
        f"and encoded again, kept attributes flip: {listed(losses)}."
        + (f" According to the held-out judge of attributes they flip: {listed(seen)}." if seen else ""),
        f"Counted; {facts.interval_of_pairs(missed)}. Flips are measured by the model's linear heads: an attribute is "
        "kept only as far as the code represents it. An audit without --keep tells how many pairs fail anyway.",
        figures={"missed": missed, "flipped": flips, "judged": judged},
    )


def judged_flips(facts: Facts) -> dict[str, tuple[int, int]]:
    """By kept attribute, of the converged pairs that a held-out judge measured: how many it sees flip, and all."""
    if not facts.has_table("attributes"):
        return {}
    rows = facts.rows(statement("judged_flips"), {"keep": list(facts.keep)})
    found = {name: (flipped, pairs) for name, flipped, pairs in rows}
    return {name: found[name] for name in facts.keep if name in found}
