"""Check of labels that are probably wrong."""

import numpy as np
import pyarrow as pa

from clarity.findings.finding import Facts, Finding, NotChecked, Outcome, graded
from clarity.findings.statistics import share_interval
from clarity.report.text import interval, percent, plural, probability

#: Labelled images at least, and the share of labels that the ensemble predicts at least: of all, and of each two
#: classes'. Below it, correct labels of hard images are called wrong: see tests/findings/test_null_reports.py.
MIN_LABELLED, MIN_AGREEMENT = 40, 0.9


def check_labels(facts: Facts) -> Outcome:
    """Labels with a suspicion above one half, where the ensemble predicts nine labels of ten."""
    suspicion = facts.suspicion["suspicion"].to_numpy()
    images = len(suspicion)
    if not images:
        return NotChecked("no image has a label")
    if images < MIN_LABELLED:
        return NotChecked(f"only {plural(images, 'image has', 'images have')} a label; {MIN_LABELLED} are needed")
    label, source = (facts.suspicion[name].to_numpy() for name in ("label", "source"))
    agreement = float((label == source).mean())
    if agreement < MIN_AGREEMENT:
        return NotChecked(
            f"the ensemble predicts {100 * agreement:.1f} % of the labels; below {percent(MIN_AGREEMENT)}, correct "
            "labels of hard images would be called wrong"
        )
    wrong = (suspicion > 0.5) & (pair_agreement(label, source, len(facts.class_names))[label, source] >= MIN_AGREEMENT)
    count = int(wrong.sum())
    if not count:
        if facts.trained_on_labels:
            return NotChecked(
                "the ensemble may have been trained on these labels: train with folds, or explain held-out images"
            )
        return []
    rows = facts.suspicion.filter(pa.array(wrong)).slice(0, 12).to_pylist()
    first = rows[0]
    share = count / images
    pairs = dict.fromkeys((row["source"], row["label"]) for row in rows if row["source"] != row["label"])
    trained = " The ensemble may know these labels from its training: others may be missed."
    return Finding(
        "labels",
        graded(lambda x: 0.45 + 0.45 * min(1.0, x / 0.01), count, images),
        f"{plural(count, 'label')} {'looks' if count == 1 else 'look'} wrong",
        f"{plural(count, 'image')} of {images:,} labelled ones ({percent(share)}) "
        f"{'carries' if count == 1 else 'carry'} a label that the ensemble and the nearest images contradict. "
        f"The most suspicious: {first['image_id']} is labelled {facts.name(first['label'])}; the ensemble predicts "
        f"{facts.name(first['source'])} and gives the label a probability of {probability(first['label_prob'])}."
        f"{trained if facts.trained_on_labels else ''}",
        f"The ensemble predicts {percent(agreement)} of the labels "
        f"({interval(*share_interval(agreement * images, images))}). In simulations with correct labels, up to one in "
        "a thousand was called wrong; an unusual image may be labelled correctly: look at it.",
        tuple(pairs)[:6],
        tuple((row["image_id"], row["label"]) for row in rows),
        {"images": count, "share": share},
    )


def pair_agreement(label: np.ndarray, source: np.ndarray, num_classes: int) -> np.ndarray:
    """Share (K, K) of the images labelled and predicted as one of two classes whose prediction is the label."""
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (label, source), 1)
    right = np.add.outer(counts.diagonal(), counts.diagonal())
    return right / np.maximum(right + counts + counts.T, 1)
