"""Check of agreement between the explained ensemble and the predictions of the user's own model."""

from __future__ import annotations

from clarity.findings.finding import Facts, Finding, NotChecked, share_text
from clarity.report.text import listed, percent, plural


def check_predictions(facts: Facts) -> list[Finding] | NotChecked:
    """How often the ensemble classifies an image as the user's model does, if the audit has predictions."""
    if "agreement" not in facts.tables:
        return NotChecked("the audit has no predictions of another model")
    rows = facts.rows(
        "SELECT prediction, sum(images), coalesce(sum(images) FILTER (prediction = source), 0) AS same "
        "FROM agreement WHERE prediction IS NOT NULL GROUP BY 1 ORDER BY same / sum(images), 1"
    )
    total, same = (int(sum(row[i] for row in rows)) for i in (1, 2))
    if not total:
        return NotChecked("no image has a prediction")
    examples = facts.rows(
        "SELECT image_id, prediction, source FROM codes WHERE status = 'ok' AND prediction <> source "
        "ORDER BY probs[source + 1] DESC, image_id LIMIT 12"
    )
    sentence = (
        f"On {same:,} of {plural(total, 'image')} ({percent(same, total)}) the ensemble predicts the class that your "
        "model predicts; an explanation speaks for your model only there."
    )
    if same < total:
        worst = [f"{facts.name(row[0])} ({percent(row[2], row[1])})" for row in rows[:3] if row[2] < row[1]]
        sentence += f" Least agreement where it predicts {listed(worst)}."
        counts = facts.rows(
            "SELECT sum(images), sum(images) FILTER (prediction = label), sum(images) FILTER (source = label) "
            "FROM agreement WHERE prediction <> source AND label IS NOT NULL"
        )[0]
        labelled, theirs, ours = (int(count or 0) for count in counts)
        if labelled:
            sentence += (
                f" Of {labelled:,} labelled images where the two differ, the label is your model's class in "
                f"{theirs:,}, the ensemble's in {ours:,}, neither in {labelled - theirs - ours:,}."
            )
    return [
        Finding(
            "predictions",
            0.3 + 0.6 * min(1.0, (1 - same / total) / 0.1),
            f"The explained ensemble agrees with your model on {percent(same, total)}",
            sentence,
            f"Counted; expected for similar images: {share_text(same, total)}.",
            tuple(dict.fromkeys((source, prediction) for _, prediction, source in examples)),
            tuple((image_id, prediction) for image_id, prediction, _ in examples),
            {"agreement": same / total, "images": total},
        )
    ]
