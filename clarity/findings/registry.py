"""All checks of an audit, and their findings in order."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from clarity.findings.attributes import check_attributes, check_kept
from clarity.findings.distances import check_asymmetry, check_extremes
from clarity.findings.epistemic import check_epistemic
from clarity.findings.finding import MAX_LOOK, Facts, Finding, NotChecked, Outcome
from clarity.findings.labels import check_labels
from clarity.findings.predictions import check_confirmed, check_fooled, check_predictions
from clarity.findings.searches import check_judged, check_reencoding, check_unconverged, check_unread
from clarity.findings.shortcuts import check_shortcuts


class Check(NamedTuple):
    """One check: the function, what it looks for, and the sentence that holds when it finds nothing."""

    run: Callable[[Facts], Outcome]
    doc: str
    clear: str = ""


#: Every check, in the order in which equally severe findings are listed.
CHECKS = {
    "unread": Check(
        check_unread, "Images and searches that failed", "Every image was used and every search stayed finite."
    ),
    "shortcut": Check(
        check_shortcuts,
        "A region or tint shared by all counterfactuals towards a class",
        "No region and no tint is shared by all counterfactuals towards a class.",
    ),
    "labels": Check(check_labels, "Wrong labels", "No label is contradicted by the ensemble and the nearest images."),
    "predictions": Check(check_predictions, "Agreement of the ensemble with your model's predictions"),
    "confirmed": Check(check_confirmed, "Pairs that fail a check of the written picture", "Every pair is confirmed."),
    "fooled": Check(
        check_fooled,
        "Pictures in which your model alone sees the target",
        "Where your model sees the target, so do the ensemble and the held-out judge, in more than 99 % of the pairs.",
    ),
    "epistemic": Check(
        check_epistemic,
        "Targets whose explanations leave the training data",
        "The members disagree about counterfactuals no more than about images that they are as sure of.",
    ),
    "judged": Check(
        check_judged,
        "Counterfactuals in which the held-out judge does not see the target",
        "The held-out judge sees the target in more than 95 % of the counterfactuals that converged.",
    ),
    "reencoding": Check(
        check_reencoding,
        "Counterfactuals that lose their target when decoded and encoded",
        "More than 99 % of the counterfactuals that converged keep their target, decoded to 8 bits and encoded again.",
    ),
    "attributes": Check(
        check_attributes, "Attributes that drift", "No attribute drifts by 0.1 or more, beyond chance."
    ),
    "kept": Check(check_kept, "What keeping attributes costs"),
    "unconverged": Check(check_unconverged, "Pairs that did not converge", "Every pair converged."),
    "asymmetry": Check(
        check_asymmetry,
        "Class pairs that are easy in one direction and hard in the other",
        "No class pair is much harder in one direction than in the other, beyond chance.",
    ),
    "extremes": Check(check_extremes, "The class pairs with the largest and the smallest changes"),
}

#: Checks that need a good model: not run under the verdict no-go, and no alerts under "with care".
NEED_A_GOOD_MODEL = ("shortcut", "labels")


@dataclass(frozen=True)
class Results:
    """Results of the checks: findings, most severe first; checks without a finding; checks not run, and why."""

    findings: list[Finding]
    clear: list[tuple[str, str]]
    not_checked: list[tuple[str, str]]


def find(facts: Facts) -> Results:
    """Runs every check that the verdict on the model allows."""
    found: list[Finding] = []
    clear, not_checked = [], []
    for kind, check in CHECKS.items():
        level = facts.verdict.level if kind in NEED_A_GOOD_MODEL else "sound"
        outcome = NotChecked("the model is not good enough for an audit") if level == "no-go" else check.run(facts)
        if isinstance(outcome, NotChecked):
            not_checked.append((kind, outcome.reason))
        elif outcome:
            outcome = [outcome] if isinstance(outcome, Finding) else outcome
            found += map(lowered, outcome) if level == "with care" else outcome
        elif check.clear:
            clear.append((kind, check.clear))
    return Results(sorted(found, key=lambda finding: -finding.severity), clear, not_checked)


def lowered(finding: Finding) -> Finding:
    """A finding that rests on a model to be read with care, which is no alert."""
    if finding.level != "alert":
        return finding
    why = " Severity lowered, because the verdict on the model is “with care”."
    return replace(finding, severity=MAX_LOOK, evidence=finding.evidence + why)
