"""Whether a model is good enough to be audited: a pure function of its model card."""

import re
from collections.abc import Mapping, Sequence
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
#: "With care" if more than this share of the held-out images have the same pixels as a training image.
MAX_COPIES = 0.02
#: "With care" if the VAE was trained for fewer updates, the least that a training makes unless it is asked for fewer.
MIN_UPDATES = 1200
#: Notes on a class.
GUESSED, BEYOND = "maybe no better than guessing", "out of reach"
OPENINGS = {
    "no-go": "No-go: this model is not good enough for an audit",
    "with care": "With care: read this audit with reservations",
    "sound": "Sound: the held-out figures give no reason against an audit of this model",
}
#: This model, where there is the user's own, too.
OURS = "Clarity's model"
REMEDY = (
    "the code loses what separates the classes. A longer code (--latent-dim), a smaller --beta or a smaller "
    "--ensemble-adversarial-eps may help"
)
BLURRED = (
    "pictures lose what it looks at. An --image-size as large as your model's, a longer training (--vae-min-updates) "
    "or a longer code (--latent-dim) may help"
)
RARE = ", of few training images. A larger --ensemble-balance, such as 1, may help"
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


def verdict(card: Mapping[str, Any], foreign_labels: bool = False, predictor: str | None = None) -> Verdict:
    """Judges a model by its held-out figures.

    No-go: the data have labels, none of which is a class of the model (``foreign_labels``); the lower bound of the
    balanced accuracy is not above 1 / K, that of always naming the most frequent class; the same for the recall of half
    of the classes, at least two; a predictor that sees fewer than MIN_RECONSTRUCTED of the reconstructions as the
    images.
    With care: the same for the recall of a class; balanced accuracy more than MAX_BEHIND behind logistic regression on
    principal components; reconstructions with more than MAX_ERROR of the mean image's error, or of which the judge
    recognises MAX_LOST fewer than of the images; a target out of reach; an agreement with the predictor below
    MIN_FIDELITY; held-out images that it was trained on, or copies of more than MAX_COPIES of them; a VAE of fewer than
    MIN_UPDATES. Sound otherwise.

    ``card`` is model.json, with ``evaluation``, ``target_probs``, ``vae_updates`` and, where the ensemble learned from
    a predictor, ``predictor``, whose figures say nothing of another one that is explained, whose digest is
    ``predictor``: then with care.
    """
    evaluation, fidelity = card.get("evaluation"), card.get("predictor", {})
    if evaluation is None and "codes" not in fidelity:
        return Verdict("not checked", "The model was not checked, because its card has no held-out figures.")
    no_go, care, figures = judge_fidelity(fidelity) if "codes" in fidelity else ([], [], [])
    if "codes" in fidelity and predictor not in (None, fidelity.get("digest")):
        no_go, care, figures = [], [describe_other(fidelity["name"])], []
    if foreign_labels:
        no_go.insert(0, "none of the labels of the data is one of its classes: it was trained on another data set")
    classes: list[tuple[str, str, str, str, str]] = []
    if evaluation is not None:
        chance = 1 / len(evaluation["per_class"])
        balanced, low, high = balanced_accuracy(evaluation["per_class"])
        classes = class_rows(card)
        whose = "Ensemble's accuracy" if fidelity or predictor is not None else "Accuracy"
        figures = [*figure_rows(card, balanced, low, high, whose), *figures]
        guessed, unreachable = ([row[0] for row in classes if note in row[4]] for note in (GUESSED, BEYOND))
        if low <= chance:
            no_go.append(
                f"its balanced accuracy, {percent(balanced)} ({interval(low, high)}), may be no more than the "
                f"{percent(chance)} of always naming one class"
            )
        elif guessed:
            trained = (card.get("data") or {}).get("per_class") or {}
            rare = all(3 * trained.get(name, 0) * len(trained) < 2 * sum(trained.values()) for name in guessed)
            # Of two classes one may have all the errors of a model that tells them apart.
            (no_go if 2 * len(guessed) >= max(len(classes), 3) else care).append(
                f"it may recognise {plural(len(guessed), 'class', 'classes')} no better than by guessing: "
                f"{quoted(guessed)}{RARE if rare else ''}"
            )
        reconstruction, judge = evaluation["reconstruction"], evaluation["judge"]
        behind = evaluation["baseline"]["balanced_accuracy"] - balanced
        if behind > MAX_BEHIND:
            remedy = TOO_SHORT if reconstruction["vae"] > reconstruction["linear_code"] else REMEDY
            care.append(f"it is {100 * behind:.0f} points behind logistic regression on principal components: {remedy}")
        if reconstruction["vae"] > MAX_ERROR * reconstruction["mean_image"]:
            error = percent(reconstruction["vae"], reconstruction["mean_image"])
            care.append(f"its reconstructions have {error} of the mean image's error: pictures lose much of the detail")
        if judge and judge["accuracy"] - judge["accuracy_on_reconstructions"] > MAX_LOST:
            care.append(
                f"the judge recognises {percent(judge['accuracy'])} of the images, but only "
                f"{percent(judge['accuracy_on_reconstructions'])} of their reconstructions: pictures lose what "
                "tells the classes apart"
            )
        copies = (evaluation.get("copies") or {}).get("held_out", 0)
        if copies > MAX_COPIES * evaluation["images"]:
            # Of many training images only some were compared.
            share = f"at least {percent(copies, evaluation['images'])}"
            care.append(f"{share} of the held-out images have copies in its training: its figures are too good")
        if unreachable:
            care.append(
                f"{plural(len(unreachable), 'class is', 'classes are')} out of reach ({quoted(unreachable)}): nine "
                f"tenths of the real images get a probability below {MIN_REACHED:g}; searches ask for more by default"
            )
    if card.get("data", {}).get("held_out_trained"):
        care.insert(0, "it was trained on images that it is measured on: its figures are too good")
    updates = card.get("vae_updates")
    if updates is not None and updates < MIN_UPDATES:
        made = f"only {plural(updates, 'update')} (default: at least {MIN_UPDATES:,})"
        care.append(f"its VAE was trained for {made}: a first look")
    level = "no-go" if no_go else "with care" if care else "sound"
    opening, why = OPENINGS[level], no_go + care
    if fidelity or predictor is not None:  # "this model" and "it" would be taken for the user's own
        opening = opening.replace("this model", OURS)
        why = [re.sub("^its ", "Clarity's ", re.sub("^it ", f"{OURS} ", reason)) for reason in why]
    reasons = [reason[0].upper() + reason[1:] + "." for reason in why]
    sentence = f"{opening}{', because ' + why[0] if why else ''}."
    return Verdict(level, sentence, tuple(reasons), tuple(figures), tuple(classes))


def quoted(names: Sequence[str]) -> str:
    """Names of classes, which may be words as "no" is."""
    return listed([f"“{name}”" for name in names])


def describe_other(name: str) -> str:
    """The reason against an audit that explains another model than the ensemble learned from."""
    return f"{OURS} learned from {name}; yours is another file or function, for which it was not measured"


def judge_fidelity(fidelity: Mapping[str, Any]) -> tuple[list[str], list[str], list[tuple[str, str, str]]]:
    """How far the ensemble may speak for the predictor: reasons for no-go, for with care, and figures."""
    codes, same = fidelity["codes"], fidelity["reconstructing"]["agreement"]
    agree = codes["agreement"]
    lost = f"your model keeps its answer on only {percent(same)} of the reconstructions: {BLURRED}"
    unlike = f"the ensemble predicts the same class as your model on only {percent(agree)} of the images"
    perturbed = percent(fidelity["perturbed"]["agreement"])
    note = f"{plural(fidelity['images'], 'image')}, KL {number(codes['kl'])} nats; on perturbed codes {perturbed}"
    no_go = [lost] if same < MIN_RECONSTRUCTED else []
    care = [lost] if MIN_RECONSTRUCTED <= same < MIN_FIDELITY else []
    care += [unlike] if agree < MIN_FIDELITY else []
    figures = [
        ("Agreement with your model", percent(agree), note),
        ("Changed by the reconstruction", percent(1 - same), "of your model's answers"),
    ]
    labelled = fidelity.get("labelled", {})
    if count := labelled.get("images"):
        note = f"{interval(*share_interval(labelled['correct'], count))}; {plural(count, 'image')}"
        figures.insert(0, ("Your model's accuracy", percent(labelled["correct"], count), note))
    return no_go, care, figures


def balanced_accuracy(per_class: Mapping[str, Mapping[str, int]]) -> tuple[float, float, float]:
    """Mean recall of the classes with images, and its interval.

    Clopper-Pearson on the number of images of one class that would be as informative.
    """
    seen = [part for part in per_class.values() if part["images"]]
    balanced = sum(part["correct"] / part["images"] for part in seen) / len(seen)
    variance = 0.0
    for part in seen:
        shrunk = (part["correct"] + 1) / (part["images"] + 2)
        variance += shrunk * (1 - shrunk) / part["images"]
    inside = min(max(balanced, 0.5 / len(seen)), 1 - 1e-3)
    count = max(1.0, inside * (1 - inside) * len(seen) ** 2 / variance)
    count = min(count, sum(part["images"] for part in seen))
    return balanced, *share_interval(balanced * count, count)


def class_rows(card: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Rows of the classes with images, see ``Verdict``."""
    per_class, probs = card["evaluation"]["per_class"], card["target_probs"]
    rows = []
    for (name, part), median, most in zip(per_class.items(), probs["median"], probs["p90"]):
        right, count = part["correct"], part["images"]
        if not count:
            continue
        guessed = share_interval(right, count, 1 - 0.1 / len(per_class))[0] <= 1 / len(per_class)
        notes = [note for note, applies in ((GUESSED, guessed), (BEYOND, most < MIN_REACHED)) if applies]
        recall = f"{percent(right, count)} ({interval(*share_interval(right, count))})"
        rows.append((name, recall, probability(median), probability(most), ", ".join(notes)))
    return rows


def figure_rows(
    card: Mapping[str, Any], balanced: float, low: float, high: float, whose: str
) -> list[tuple[str, str, str]]:
    """The figures behind a verdict; ``whose`` is the name of the first, the ensemble's accuracy."""
    evaluation = card["evaluation"]
    right, count = evaluation["correct"], evaluation["images"]
    bounds, calibration = interval(*share_interval(right, count)), card["metrics"]["ensemble"]["calibration_error"]
    majority, baseline, reconstruction = (evaluation[name] for name in ("majority", "baseline", "reconstruction"))
    always = f"Always answering “{majority['class']}”"
    components, dims = (
        plural(n, "principal component") for n in (baseline["components"], reconstruction["latent_dim"])
    )
    error, linear = (percent(reconstruction[name], reconstruction["mean_image"]) for name in ("vae", "linear_code"))
    rows = [
        (whose, percent(right, count), f"{bounds}; {plural(count, 'image')}"),
        ("Balanced accuracy", percent(balanced), interval(low, high)),
        (always, percent(majority["share"]), "accuracy; the most frequent class"),
        ("Baseline", percent(baseline["balanced_accuracy"]), f"balanced accuracy; logistic regression on {components}"),
        ("Calibration error", percent(calibration), "gap between confidence and accuracy, 15 bins"),
        ("Reconstruction error", error, f"of the mean image's squared error; with {dims} {linear}"),
    ]
    if judge := evaluation["judge"]:
        note = f"accuracy of a held-out network; {percent(judge['accuracy_on_reconstructions'])} on reconstructions"
        rows.append(("Judge", percent(judge["accuracy"]), note))
    return rows
