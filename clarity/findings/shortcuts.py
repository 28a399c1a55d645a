"""Check of regions and tints that every counterfactual towards a class writes.

That one region or one tint decides is a fact, and hair colour is one. It is an alarm only where it is hardly natural:
a mark at the border with the same pixel values whatever the start, or constant in real images of the class and, with
other values, in the others; or one shift of all pixels by the same amount.
"""

import numpy as np

from clarity.findings.differences import region_of, tint_of
from clarity.findings.finding import Facts, Finding, NotChecked, Outcome
from clarity.report.text import percent

#: Pairs towards a target, and sources with five pairs, below which its mean change is not described.
MIN_PAIRS, MIN_SOURCES = 20, 2
#: A region is hardly natural at the border if the counterfactuals in it vary by at most this much of full scale.
MAX_VARIATION = 0.08
#: A tint is hardly natural if it makes up this share of the mean change and varies by at most this share of itself, and
#: such a shift makes up this share of the difference of real images: a shortcut is in the data.
MIN_FLATNESS, MAX_SPREAD, MIN_REAL = 0.6, 0.35, 0.3


def check_shortcuts(facts: Facts) -> Outcome:
    """Targets towards which every counterfactual writes the same small region or the same tint."""
    differences = facts.differences
    if differences is None:
        return NotChecked("the audit has neither pictures nor converged pairs to compare")
    if len(facts.class_names) <= MIN_SOURCES:
        return NotChecked(f"it takes {MIN_SOURCES + 1} classes, as it compares what several sources have in common")
    enough = (differences.count.sum(0) >= MIN_PAIRS) & ((differences.count >= 5).sum(0) >= MIN_SOURCES)
    if not enough.any():
        return NotChecked(f"no class is the target of {MIN_PAIRS} pairs from {MIN_SOURCES} other classes")
    findings = []
    for target in np.flatnonzero(enough).tolist():
        name = facts.name(target)
        real = f"Of the mean difference between real images of {name} and the others, "
        if found := tint_of(differences, target):
            alarm = (
                found["concentration"] >= MIN_FLATNESS and found["spread"] <= MAX_SPREAD and found["real"] >= MIN_REAL
            )
            shape, title = "tint", f"{'Shortcut: a' if alarm else 'A'} tint determines {name}"
            shift = ", ".join(f"{value:+.2f}" for value in found["tint"])
            colours = "red, green, blue " if len(found["tint"]) == 3 else "brightness "
            sentence = (
                f"Counterfactuals towards {name} shift the whole picture by the same amount regardless of the start "
                f"({colours}{shift} of full scale), which is {percent(found['concentration'])} of their mean change. "
                f"{real}{percent(found['real'])} is such a shift."
            )
            why = ". So even a shift is hardly natural"
        elif found := region_of(differences, target):
            alarm = found["border"] and (found["constant"] or found["variation"] <= MAX_VARIATION)
            top, bottom, left, right = found["box"]
            height, width = differences.target_mean.shape[2:]
            where = position((top + bottom) / 2 / height, (left + right) / 2 / width)
            shape, verb = "patch", "marks" if found["constant"] else "determines"
            title = f"{'Shortcut: a patch' if alarm else 'One region'} {where} {verb} {name}"
            steady = "" if found["constant"] else " regardless of the start"
            sentence = (
                f"Counterfactuals towards {name} change the same region{steady}: "
                f"{percent(found['concentration'])} of their mean change lies in {percent(found['area'])} of the "
                f"picture, {where} (rows {top}–{bottom - 1}, columns {left}–{right - 1}). "
                f"{real}{percent(found['real'])} lies there."
                f"{f' Real images of {name} vary little in it, as do the others.' if found['constant'] else ''}"
            )
            why = ". The same values at the border, whatever the image, are hardly natural"
        else:
            continue
        pairs = np.nan_to_num(facts.pairs["pairs"][:, target])
        sources = [int(source) for source in np.argsort(-pairs, kind="stable") if pairs[source] > 0][:6]
        findings.append(
            Finding(
                "shortcut" if alarm else "region",
                0.95 if alarm else 0.35,
                title,
                sentence + (f" The model may have learned a {shape} instead of the class." if alarm else ""),
                "A mean over the sampled pairs. That it matters is measured; whether it should is for you to judge"
                f"{why if alarm else ''}.",
                tuple((source, target) for source in sources),
                figures={"target": target, "shape": shape, **found},
            )
        )
    if few := [facts.name(target) for target in np.flatnonzero(~enough).tolist()]:
        more = f" and {len(few) - 3} more" if len(few) > 3 else ""
        return findings or NotChecked(
            f"too few pairs towards {', '.join(few[:3])}{more} converged; towards the others none is shared"
        )
    return findings


def position(vertical: float, horizontal: float) -> str:
    """A position in a picture in words."""
    rows = "top" if vertical < 1 / 3 else "bottom" if vertical > 2 / 3 else ""
    columns = "left" if horizontal < 1 / 3 else "right" if horizontal > 2 / 3 else ""
    words = "-".join(word for word in (rows, columns) if word)
    return f"at the {words}" if words else "in the middle"
