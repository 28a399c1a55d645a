"""The page's tables: suspicious labels, agreement with the labels, agreement with the user's own predictions."""

from __future__ import annotations

from typing import Any

import numpy as np

from clarity.findings.suspicion import NEIGHBOURS
from clarity.report.embed import Embedded, read_picture
from clarity.report.overview import interval
from clarity.report.sample import LISTED, Sample
from clarity.report.text import percent, plural, probability
from clarity.report.tiles import Tiles
from clarity.report.view import View

#: Less suspicious labels are not listed.
MIN_SUSPICION = 0.01


def labels(view: View, images: dict[str, Any], tiles: Tiles) -> dict[str, Any]:
    """Suspicious labels by the ensemble, and how the explained model agrees with the labels."""
    rows = suspicious_labels(view, images, tiles)
    note = (
        "Suspicion is the probability that the label is wrong, by the ensemble and by the labels of the "
        f"{NEIGHBOURS} nearest codes; from 0.5 on it is among the findings."
    )
    if rows and rows[0]["suspicion"] <= 0.5:
        note += " None is as high here: these labels are doubtful, not wrong."
    if folds := int(view.audit.plan.model.get("num_folds") or 0):
        note += f" Each image was explained by the one of {folds} ensembles that was not trained on it."
    elif view.facts.trained_on_labels:
        note += " The ensemble may have been trained on these images and then trusts their labels: train with folds."
    counts = "SELECT label, source, count(*) FROM codes WHERE status = 'ok' AND label IS NOT NULL GROUP BY ALL"
    return {"rows": rows, "agreement": agreement(view, view.rows(counts)), "note": note}


def suspicious_labels(view: View, images: dict[str, Any], tiles: Tiles) -> list[dict[str, Any]]:
    """The most suspicious labels with their pictures."""
    names, rows = view.class_names, []
    table = view.facts.suspicion
    for row in table.slice(0, LISTED).to_pylist():
        if row["suspicion"] < MIN_SUSPICION:
            break
        image_id = row["image_id"]
        if image_id in images:
            tile = images[image_id]["x"]
        else:
            stored = view.rows("SELECT x FROM codes WHERE image_id = $id", {"id": image_id})
            tile = tiles.add(read_picture(stored[0][0], view))
        rows.append(
            {
                "image_id": image_id,
                "tile": tile,
                "label": names[row["label"]],
                "source": names[row["source"]],
                "suspicion": row["suspicion"],
                "label_prob": probability(row["label_prob"]),
                "neighbours": "–" if row["neighbours"] is None else percent(row["neighbours"]),
                "distance": "–" if row["distance"] is None else f"{row['distance']:.1f}",
            }
        )
    return rows


def agreement(view: View, counts: list[tuple[int, int, int]], from_given: bool = False) -> dict[str, Any] | None:
    """Agreement by a given class, lowest first, and the most frequent differences; None where there is no count.

    Args:
        view: the audit.
        counts: (given class, seen class, images).
        from_given: the explained model's class is the given one, so that class pairs start there.
    """
    images = np.zeros((len(view.class_names),) * 2, np.int64)
    for given, seen, count in counts:
        images[given, seen] = count
    if not images.any():
        return None
    names, shares, worst = view.class_names, [], []
    totals, same = images.sum(1), images.diagonal()
    for k in sorted(np.flatnonzero(totals).tolist(), key=lambda k: same[k] / totals[k]):
        share = f"{percent(same[k], totals[k])} ({interval(same[k], totals[k])})"
        meter = round(100 * same[k] / totals[k], 1)
        shares.append({"name": names[k], "count": f"{totals[k]:,}", "share": share, "meter": meter})
    differing = images - np.diag(same)
    for cell in np.argsort(-differing, axis=None, kind="stable")[:8].tolist():
        given, seen = divmod(cell, len(images))
        if differing[given, seen]:
            pair = (given, seen) if from_given else (seen, given)
            worst.append(
                {
                    "given": names[given],
                    "seen": names[seen],
                    "count": f"{differing[given, seen]:,}",
                    "pair": f"{pair[0]}-{pair[1]}" if view.facts.pairs["pairs"][pair] > 0 else None,
                    "text": f"{names[pair[0]]} → {names[pair[1]]}",
                }
            )
    return {"total": int(totals.sum()), "same": int(same.sum()), "shares": shares, "worst": worst}


def predictions(view: View, sample: Sample, images: dict[str, Any], embedded: Embedded) -> dict[str, Any] | None:
    """How the ensemble and the user's own model agree, by class, and where they do not."""
    if not view.has_predictions:
        return None
    names = view.class_names
    found = agreement(
        view,
        view.rows(
            "SELECT prediction, source, sum(images) FROM prediction_agreement WHERE prediction IS NOT NULL GROUP BY ALL"
        ),
        from_given=view.facts.has_predictor,
    ) or {"total": 0, "same": 0}
    total, same = found["total"], found["same"]
    counts = view.rows(
        "SELECT sum(images) FILTER (prediction IS NULL), sum(images) FILTER (prediction + label IS NOT NULL), "
        "sum(images) FILTER (prediction = label), sum(images) FILTER (prediction IS NOT NULL AND source = label) "
        "FROM prediction_agreement"
    )[0]
    missing, labelled, theirs, ours = (count or 0 for count in counts)
    note = (
        f"Your model's predictions for {plural(total, 'image')}: the ensemble predicts the same class for {same:,} "
        f"({percent(same, total)}; {interval(same, total)}). "
    )
    note += f"{plural(missing, 'image')} came without a prediction. " if missing else ""
    if labelled:
        note += (
            f"On the {labelled:,} labelled ones, your model is right in {percent(theirs, labelled)} "
            f"({interval(theirs, labelled)}), the ensemble in {percent(ours, labelled)} ({interval(ours, labelled)}). "
        )
    note += (
        "Your model is explained: the ensemble leads the search, and your model is asked about every picture."
        if view.facts.has_predictor
        else "The explained model is the ensemble: where the two differ, an explanation does not speak for your model."
    )
    return {
        "note": note,
        "agreement": found,
        "rows": [
            {
                "image_id": row["image_id"],
                "tile": images[row["image_id"]]["x"],
                "cf": embedded.tiles.get((row["image_id"], row["other"])),
                "other": names[row["other"]],
                "label": row["label_name"],
                "prediction": names[row["prediction"]],
                "their_prob": None if row["their_prob"] is None else probability(row["their_prob"]),
                "seen": names[row["seen"]],
                "seen_prob": probability(row["seen_prob"]),
                "prediction_prob": probability(row["prediction_prob"]),
                "distance": "–" if row["distance"] is None else f"{row['distance']:.1f}",
            }
            for row in sample.disagreements
        ],
        "more": f"{total - same - LISTED:,}" if total - same > LISTED else None,
    }
