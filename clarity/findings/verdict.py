"""Whether a model is good enough to be audited: a pure function of its model card."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clarity.findings.statistics import share_interval
from clarity.report.text import interval, listed, number, percent, plural, probability

#: "With care" if the balanced accuracy is this far behind the baseline's.
MAX_BEHIND = 0.05
#: "With care" if the squared error of reconstructions is more than this share of the mean image's.
MAX_ERROR = 0.5
#: "With care" if the judge's accuracy falls by more than this from images to their reconstructions.
MAX_LOST = 0.1
#: "With care" if the ensemble agrees with the predictor on fewer codes, or the predictor with itself on fewer
#: reconstructions; no-go if the latter fall below MIN_RECONSTRUCTED.
MIN_FIDELITY, MIN_RECONSTRUCTED = 0.9, 0.5
#: A target is out of reach if nine tenths of its real held-out images get less than this probability.
MIN_REACHED = 0.9
#: "With care" if the VAE was trained for fewer updates, the least that a training makes unless it is asked for fewer.
MIN_UPDATES = 1200
#: Notes on a class.
GUESSED, BEYOND = "no-go: no better than guessing", "out of reach"
OPENINGS = {
    "no-go": "No-go: this model is not good enough for an audit",
    "with care": "With care: read this audit with reservations",
    "sound": "Sound: the held-out figures give no reason against an audit of this model",
}
REMEDY = (
    "the code loses what separates the classes. A longer code (--latent-dim), a smaller --beta or a smaller "
    "--ensemble-adversarial-eps may help"
)
TOO_SHORT = "the VAE is worse than a linear code of its size. A longer training (--vae-min-updates) may help"


@dataclass(frozen=True)
class Verdict:
    """A verdict on a model: its level ("sound", "with care", "no-go" or "not checked"), a sentence, and why.

    ``figures`` are (name, value, note); ``classes`` (name, recall, median and 90th percentile of the probability that
    real held-out images get, note).
    """

    level: str
    sentence: str
    reasons: tuple[str, ...] = ()
    figures: tuple[tuple[str, str, str], ...] = ()
    classes: tuple[tuple[str, str, str, str, str], ...] = ()

    @property
    def unreachable(self) -> list[str]:
        """Names of the classes out of reach."""
        return [name for name, *_, note in self.classes if BEYOND in note]


def verdict(card: Mapping[str, Any], foreign_labels: bool = False) -> Verdict:
    """Judges a model by its held-out figures.

    No-go: the data have labels, none of which is a class of the model (``foreign_labels``); the lower bound of the
    balanced accuracy is not above 1 / K, that of always naming the most frequent class; the same for the recall of half
    of the classes; a predictor that sees fewer than MIN_RECONSTRUCTED of the reconstructions as it sees the images.
    With care: the same for the recall of a class; balanced accuracy more than MAX_BEHIND behind logistic regression on
    principal components; reconstructions with more than MAX_ERROR of the mean image's error, or of which the judge
    recognises MAX_LOST fewer than of the images; a target out of reach; an agreement with the predictor below
    MIN_FIDELITY; held-out images that it was trained on; a VAE of fewer than MIN_UPDATES. Sound otherwise.

    ``card`` is model.json, with ``evaluation``, ``target_probs``, ``vae_updates`` and, where the ensemble learned from
    a predictor, ``predictor``.
    """
    evaluation, told = card.get("evaluation") or {}, card.get("predictor") or {}
    per_class = {name: part for name, part in (evaluation.get("per_class") or {}).items() if part["images"]}
    if not per_class and "codes" not in told:
        return Verdict("not checked", "The model was not checked, because its card has no held-out figures.")
    no_go, care, figures = judge_fidelity(told) if "codes" in told else ([], [], [])
    if foreign_labels:
        no_go.insert(0, "none of the labels of the data is one of its classes: it was trained on another data set")
    classes: list[tuple[str, str, str, str, str]] = []
    if per_class:
        chance = 1 / len(evaluation["per_class"])
        balanced = sum(part["correct"] / part["images"] for part in per_class.values()) / len(per_class)
        low, high = balanced_interval(per_class, balanced)
        classes = class_rows(card, per_class, chance)
        figures = [*figure_rows(card, balanced, low, high), *figures]
        guessed, unreachable = ([row[0] for row in classes if note in row[4]] for note in (GUESSED, BEYOND))
        if low <= chance:
            no_go.append(
                f"its balanced accuracy, {percent(balanced)} ({interval(low, high)}), is not above the "
                f"{percent(chance)} of always naming one class"
            )
        elif guessed:
            (no_go if 2 * len(guessed) >= len(classes) else care).append(
                f"{plural(len(guessed), 'class is', 'classes are')} recognised no better than by guessing: "
                f"{listed(guessed)}"
            )
        baseline, reconstruction = evaluation.get("baseline"), evaluation.get("reconstruction")
        remedy = TOO_SHORT if reconstruction and reconstruction["vae"] > reconstruction["linear_code"] else REMEDY
        if baseline and (behind := baseline["balanced_accuracy"] - balanced) > MAX_BEHIND:
            care.append(f"it is {100 * behind:.0f} points behind logistic regression on principal components: {remedy}")
        if reconstruction and reconstruction["vae"] > MAX_ERROR * reconstruction["mean_image"]:
            error = percent(reconstruction["vae"], reconstruction["mean_image"])
            care.append(f"its reconstructions have {error} of the mean image's error: pictures lose much of the detail")
        judge = evaluation.get("judge")
        if judge and judge["accuracy"] - judge["accuracy_on_reconstructions"] > MAX_LOST:
            care.append(
                f"the judge recognises {percent(judge['accuracy'])} of the images, but only "
                f"{percent(judge['accuracy_on_reconstructions'])} of their reconstructions: pictures lose what "
                "tells the classes apart"
            )
        if unreachable:
            care.append(
                f"{plural(len(unreachable), 'class is', 'classes are')} out of reach ({listed(unreachable)}): nine "
                f"tenths of the real images get a probability below {MIN_REACHED:g}; searches ask for more by default"
            )
    if (card.get("data") or {}).get("held_out_trained"):
        care.insert(0, "it was trained on images that it is measured on: its figures are too good")
    updates = card.get("vae_updates")
    if updates is not None and updates < MIN_UPDATES:
        care.append(f"its VAE was trained for {updates} updates, of {MIN_UPDATES:,} or more by default: a first look")
    level = "no-go" if no_go else "with care" if care else "sound"
    reasons = [reason[0].upper() + reason[1:] + "." for reason in no_go + care]
    sentence = f"{OPENINGS[level]}{', because ' + (no_go + care)[0] if reasons else ''}."
    return Verdict(level, sentence, tuple(reasons), tuple(figures), tuple(classes))


def judge_fidelity(told: Mapping[str, Any]) -> tuple[list[str], list[str], list[tuple[str, str, str]]]:
    """How far the ensemble may speak for the predictor: reasons for no-go, for with care, and figures."""
    same, agree = told["reconstructing"]["agreement"], told["codes"]["agreement"]
    lost = f"your model keeps its answer on only {percent(same)} of the reconstructions"
    unlike = f"the ensemble predicts the same class as your model on only {percent(agree)} of the images"
    perturbed = percent(told["perturbed"]["agreement"])
    note = f"{plural(told['images'], 'image')}, KL {number(told['codes']['kl'])} nats; on perturbed codes {perturbed}"
    no_go = [lost] if same < MIN_RECONSTRUCTED else []
    care = [lost] if MIN_RECONSTRUCTED <= same < MIN_FIDELITY else []
    care += [unlike] if agree < MIN_FIDELITY else []
    return (
        no_go,
        care,
        [
            ("Agreement with your model", percent(agree), note),
            ("Changed by the reconstruction", percent(1 - same), "your model's own answer"),
        ],
    )


def balanced_interval(per_class: Mapping[str, Mapping[str, int]], balanced: float) -> tuple[float, float]:
    """Interval of a balanced accuracy: Clopper-Pearson on the number of images that would be as informative."""
    variance = 0.0
    for part in per_class.values():
        shrunk = (part["correct"] + 1) / (part["images"] + 2)
        variance += shrunk * (1 - shrunk) / part["images"]
    inside = min(max(balanced, 0.5 / len(per_class)), 1 - 1e-3)
    count = max(1.0, inside * (1 - inside) * len(per_class) ** 2 / variance) if variance else math.inf
    count = min(count, sum(part["images"] for part in per_class.values()))
    return share_interval(balanced * count, count)


def class_rows(
    card: Mapping[str, Any], per_class: Mapping[str, Mapping[str, int]], chance: float
) -> list[tuple[str, str, str, str, str]]:
    """Rows of the classes with images, see ``Verdict``."""
    names = list(card["evaluation"]["per_class"])
    probs = card.get("target_probs") or {}
    rows = []
    for name, part in per_class.items():
        right, count = part["correct"], part["images"]
        median, most = ((probs.get(key) or [None] * len(names))[names.index(name)] for key in ("median", "p90"))
        notes = [GUESSED] if share_interval(right, count, 1 - 0.1 / len(names))[0] <= chance else []
        notes += [BEYOND] if most is not None and most < MIN_REACHED else []
        recall = f"{percent(right, count)} ({interval(*share_interval(right, count))})"
        rows.append((name, recall, probability(median), probability(most), ", ".join(notes)))
    return rows


def figure_rows(card: Mapping[str, Any], balanced: float, low: float, high: float) -> list[tuple[str, str, str]]:
    """The figures behind a verdict."""
    evaluation = card["evaluation"]
    right, count = evaluation["correct"], evaluation["images"]
    bounds = share_interval(right, count)
    rows = [
        ("Accuracy", percent(right, count), f"{interval(*bounds)}; {plural(count, 'image')}"),
        ("Balanced accuracy", percent(balanced), interval(low, high)),
    ]
    if majority := evaluation.get("majority"):
        name = f"Always answering “{majority['class']}”"
        rows.append((name, percent(majority["share"]), "accuracy; the most frequent class"))
    if baseline := evaluation.get("baseline"):
        note = f"balanced accuracy; logistic regression on {plural(baseline['components'], 'principal component')}"
        rows.append(("Baseline", percent(baseline["balanced_accuracy"]), note))
    error = (((card.get("metrics") or {}).get("ensemble")) or {}).get("calibration_error")
    if error is not None:
        rows.append(("Calibration error", percent(error), "gap between confidence and accuracy, 15 bins"))
    if reconstruction := evaluation.get("reconstruction"):
        note = (
            f"of the mean image's squared error; with {plural(reconstruction['latent_dim'], 'principal component')} "
            f"{percent(reconstruction['linear_code'], reconstruction['mean_image'])}"
        )
        rows.append(("Reconstruction error", percent(reconstruction["vae"], reconstruction["mean_image"]), note))
    if judge := evaluation.get("judge"):
        note = f"accuracy of a held-out network; {percent(judge['accuracy_on_reconstructions'])} on reconstructions"
        rows.append(("Judge", percent(judge["accuracy"]), note))
    return rows
