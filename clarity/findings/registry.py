"""All checks of an audit, and their findings in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from clarity.findings.attributes import check_attributes
from clarity.findings.distances import check_asymmetry, check_extremes
from clarity.findings.epistemic import check_epistemic
from clarity.findings.finding import Facts, Finding, NotChecked
from clarity.findings.kept import check_kept
from clarity.findings.labels import check_labels
from clarity.findings.predictions import check_confirmed, check_fooled, check_predictions
from clarity.findings.searches import check_reencoding, check_unconverged, check_unread
from clarity.findings.shortcuts import check_shortcuts


@dataclass(frozen=True)
class Check:
    """One check: what it looks for, the function, and the sentence that holds when it finds nothing."""

    doc: str
    run: Callable[[Facts], list[Finding] | NotChecked]
    clear: str


#: Every check, in the order in which equally severe findings are told.
CHECKS: dict[str, Check] = {
    "unread": Check(
        "images and searches that failed", check_unread, "Every image was read and every search stayed finite."
    ),
    "shortcut": Check(
        "a region or tint shared by all counterfactuals towards a class",
        check_shortcuts,
        "No region and no tint is shared by all counterfactuals towards a class.",
    ),
    "labels": Check("wrong labels", check_labels, "No label is contradicted by the ensemble and the nearest images."),
    "predictions": Check("agreement of the ensemble with your model's predictions", check_predictions, ""),
    "confirmed": Check("pairs that fail a check of the written picture", check_confirmed, "Every pair is confirmed."),
    "fooled": Check(
        "pictures in which your model alone sees the target",
        check_fooled,
        "Where your model sees the target, so do the ensemble and the held-out judge, in more than 99 % of the pairs.",
    ),
    "epistemic": Check(
        "targets whose explanations leave the training data",
        check_epistemic,
        "The members disagree about counterfactuals no more than about images of the same probability.",
    ),
    "reencoding": Check(
        "counterfactuals that lose their target when decoded and encoded",
        check_reencoding,
        "More than 99 % of the counterfactuals keep their target after decoding, rounding to 8 bits and encoding.",
    ),
    "attributes": Check(
        "attributes that drift", check_attributes, "No attribute drifts by 0.1 or more, beyond chance."
    ),
    "kept": Check("what keeping attributes costs", check_kept, ""),
    "unconverged": Check("pairs that did not converge", check_unconverged, "Every pair converged."),
    "asymmetry": Check(
        "class pairs that are easy in one direction and hard in the other",
        check_asymmetry,
        "No class pair is much harder in one direction than in the other, beyond chance.",
    ),
    "extremes": Check("the class pairs with the largest and the smallest changes", check_extremes, ""),
}


#: Checks that need a good model: not run under the verdict no-go, and no alerts under "with care".
NEED_A_GOOD_MODEL = ("shortcut", "labels")
MAX_WITH_CARE = 0.65


@dataclass(frozen=True)
class Results:
    """What the checks of an audit say: findings, most severe first; what was checked in vain; what was not checked."""

    findings: list[Finding]
    clear: list[tuple[str, str]]
    not_checked: list[tuple[str, str]]


def run_check(kind: str, facts: Facts) -> list[Finding] | NotChecked:
    """Runs one check under the verdict on the model."""
    level = facts.verdict.level if kind in NEED_A_GOOD_MODEL else "sound"
    if level == "no-go":
        return NotChecked("the model is not good enough for an audit")
    outcome = CHECKS[kind].run(facts)
    if level != "with care" or isinstance(outcome, NotChecked):
        return outcome
    lowered = " Severity lowered: the verdict on the model is with care."
    return [
        replace(finding, severity=MAX_WITH_CARE, evidence=finding.evidence + lowered)
        if finding.severity > MAX_WITH_CARE
        else finding
        for finding in outcome
    ]


def find(facts: Facts) -> Results:
    """Runs every check."""
    found: list[Finding] = []
    clear, not_checked = [], []
    for kind, check in CHECKS.items():
        outcome = run_check(kind, facts)
        if isinstance(outcome, NotChecked):
            not_checked.append((kind, f"{check.doc[0].upper()}{check.doc[1:]}: not checked, because {outcome.reason}."))
        elif outcome:
            found += outcome
        elif check.clear:
            clear.append((kind, check.clear))
    return Results(sorted(found, key=lambda finding: -finding.severity), clear, not_checked)
