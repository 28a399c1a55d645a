"""Check of labels that are probably wrong."""

from __future__ import annotations

from clarity.findings.finding import Facts, Finding, NotChecked, share_text
from clarity.report.text import percent, plural, probability

#: Labelled images at least, and the share of them on which the ensemble agrees with the label. Where a correct data set
#: is classified less well, correct labels of hard images are called wrong: see tests/findings/test_null_reports.py.
MIN_LABELLED, MIN_AGREEMENT = 40, 0.9


def check_labels(facts: Facts) -> list[Finding] | NotChecked:
    """Labels with a suspicion above one half, under an ensemble that agrees with nine labels of ten."""
    suspicion = facts.suspicion["suspicion"].to_numpy()
    images = len(suspicion)
    if not images:
        return NotChecked("no image has a label")
    if images < MIN_LABELLED:
        return NotChecked(f"{plural(images, 'image has', 'images have')} a label, {MIN_LABELLED} are needed")
    if facts.verdict.level == "no-go":
        return NotChecked(f"the model does not deserve an audit: {facts.verdict.sentence}")
    agreement = float((facts.suspicion["label"].to_numpy() == facts.suspicion["source"].to_numpy()).mean())
    if agreement < MIN_AGREEMENT:
        return NotChecked(
            f"the ensemble predicts {percent(agreement)} of the labels; below {percent(MIN_AGREEMENT)}, correct labels "
            "of hard images would be called wrong"
        )
    count = int((suspicion > 0.5).sum())
    if not count:
        if facts.trained_on_labels:
            return NotChecked("the ensemble was trained on these labels: train with folds, or explain held-out images")
        return []
    rows = facts.suspicion.slice(0, 12).to_pylist()
    first = rows[0]
    share = count / images
    pairs = dict.fromkeys((row["source"], row["label"]) for row in rows if row["source"] != row["label"])
    trained = " The ensemble was trained on these labels, so others may be missed." if facts.trained_on_labels else ""
    return [
        Finding(
            "labels",
            0.45 + 0.45 * min(1.0, share / 0.01),
            f"{plural(count, 'label')} {'looks' if count == 1 else 'look'} wrong",
            f"{plural(count, 'image')} of {images:,} labelled ones ({percent(share)}) "
            f"{'carries' if count == 1 else 'carry'} a label that the ensemble and the nearest images contradict. "
            f"First: {first['image_id']} is labelled {facts.name(first['label'])}; the ensemble predicts "
            f"{facts.name(first['source'])} and gives the label a probability of {probability(first['label_prob'])}."
            f"{trained}",
            f"A model of labels and mistakes, at a suspicion of one half. The ensemble predicts "
            f"{share_text(agreement * images, images)} of the labels. Labels may be right and the image unusual: look.",
            tuple(pairs)[:6],
            tuple((row["image_id"], row["label"]) for row in rows),
            {"images": count, "share": share},
        )
    ]
