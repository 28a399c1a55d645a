"""Check of regions and tints that every counterfactual towards a class writes.

That one region or one tint decides is a fact, and hair colour is one. It is an alarm only where it is hardly natural:
a mark at the border with the same pixel values whatever the start, or one shift of all pixels by the same amount.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from clarity.findings.differences import MIN_PAIRS, MIN_SOURCES, Differences, described_targets, region_of, tint_of
from clarity.findings.finding import Facts, Finding, NotChecked
from clarity.report.text import percent

#: A region is hardly natural at the border if the counterfactuals in it vary by at most this much of full scale.
MAX_VARIATION = 0.08
#: A tint is hardly natural if it makes up this share of the mean change and varies by at most this share of itself, and
#: such a shift makes up this share of the difference of real images: a shortcut is in the data.
MIN_FLATNESS, MAX_SPREAD, MIN_REAL = 0.6, 0.35, 0.3
EVIDENCE = "A mean over the sampled pairs. That it decides is measured; whether it should is yours to judge{alarm}."


def check_shortcuts(facts: Facts) -> list[Finding] | NotChecked:
    """Targets towards which every counterfactual writes the same small region or the same tint."""
    if facts.differences is None:
        return NotChecked("the audit has neither pictures nor converged pairs to compare")
    targets = described_targets(facts.differences)
    if not targets:
        return NotChecked(f"no class is the target of {MIN_PAIRS} pairs from {MIN_SOURCES} other classes")
    findings = []
    for target in targets:
        if found := tint_of(facts.differences, target):
            findings.append(tint_finding(facts, target, found))
        elif found := region_of(facts.differences, target):
            findings.append(region_finding(facts, facts.differences, target, found))
    return findings


def tint_finding(facts: Facts, target: int, found: dict[str, Any]) -> Finding:
    """States a tint."""
    alarm = found["concentration"] >= MIN_FLATNESS and found["spread"] <= MAX_SPREAD and found["real"] >= MIN_REAL
    name = facts.name(target)
    shift = ", ".join(f"{value:+.2f}" for value in found["tint"])
    colours = "red, green, blue " if len(found["tint"]) == 3 else "brightness "
    return Finding(
        "shortcut" if alarm else "region",
        0.95 if alarm else 0.35,
        f"{'Shortcut: a' if alarm else 'A'} tint decides for {name}",
        f"Counterfactuals towards {name} shift the whole picture by the same amount regardless of the start ({colours}"
        f"{shift} of full scale), which is {percent(found['concentration'])} of their mean change. Of the mean "
        f"difference between real images of {name} and the others, {percent(found['real'])} is such a shift."
        + (" The model may have learned a tint instead of the class." if alarm else ""),
        EVIDENCE.format(alarm="; so even a shift is hardly natural" if alarm else ""),
        pairs_towards(facts, target),
        figures={"target": target, "shape": "tint", **found},
    )


def region_finding(facts: Facts, differences: Differences, target: int, found: dict[str, Any]) -> Finding:
    """States a region."""
    alarm = found["border"] and found["variation"] <= MAX_VARIATION
    name = facts.name(target)
    top, bottom, left, right = found["box"]
    height, width = differences.target_mean.shape[2:]
    where = position((top + bottom) / 2 / height, (left + right) / 2 / width)
    return Finding(
        "shortcut" if alarm else "region",
        0.95 if alarm else 0.35,
        f"{'Shortcut: a patch' if alarm else 'One region'} {where} decides for {name}",
        f"Counterfactuals towards {name} change the same region regardless of the start: "
        f"{percent(found['concentration'])} of their mean change lies in {percent(found['area'])} of the picture, "
        f"{where} (rows {top}–{bottom - 1}, columns {left}–{right - 1}). Of the mean difference between real images of "
        f"{name} and the others, {percent(found['real'])} lies there."
        + (" The model may have learned a patch instead of the class." if alarm else ""),
        EVIDENCE.format(alarm="; the same values at the border whatever the start are hardly natural" if alarm else ""),
        pairs_towards(facts, target),
        figures={"target": target, "shape": "patch", **found},
    )


def pairs_towards(facts: Facts, target: int) -> tuple[tuple[int, int], ...]:
    """Class pairs with this target, those with most pairs first."""
    pairs = np.nan_to_num(facts.pairs["pairs"][:, target])
    order = np.argsort(-pairs, kind="stable")
    return tuple((int(source), target) for source in order if pairs[source] > 0)[:6]


def position(vertical: float, horizontal: float) -> str:
    """A position in a picture in words."""
    rows = "top" if vertical < 1 / 3 else "bottom" if vertical > 2 / 3 else ""
    columns = "left" if horizontal < 1 / 3 else "right" if horizontal > 2 / 3 else ""
    words = "-".join(word for word in (rows, columns) if word)
    return f"at the {words}" if words else "in the middle"
