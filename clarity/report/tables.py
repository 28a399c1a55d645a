"""The page's tables: suspicious labels, agreement with the labels, agreement with the user's own predictions."""

from typing import Any

import numpy as np

from clarity.audit.queries import has_predictions
from clarity.findings.suspicion import NEIGHBOURS
from clarity.report.embed import read_picture
from clarity.report.overview import interval
from clarity.report.sample import LISTED
from clarity.report.text import percent, plural
from clarity.report.tiles import Tiles
from clarity.report.view import View

#: Less suspicious labels are not listed.
MIN_SUSPICION = 0.01


def labels(view: View, images: dict[str, Any], tiles: Tiles) -> dict[str, Any]:
    """Suspicious labels by the ensemble with their pictures, and how the explained model agrees with the labels."""
    unchecked = dict(view.results.not_checked).get("labels")
    ranked = [] if unchecked else view.facts.suspicion.slice(0, LISTED).to_pylist()
    rows = [row for row in ranked if row["suspicion"] >= MIN_SUSPICION]
    for row in rows:
        if row["image_id"] in images:
            row["tile"] = images[row["image_id"]]["x"]
        else:
            ((stored,),) = view.facts.rows("SELECT x FROM codes WHERE image_id = $id", {"id": row["image_id"]})
            row["tile"] = tiles.add(read_picture(stored, view))
    note = f"Labels are not checked: {unchecked}." if unchecked else "No label is suspicious."
    if rows:
        note = (
            "Suspicion is the probability that the label is wrong, by the ensemble and by the labels of the "
            f"{NEIGHBOURS} nearest codes; above 0.5 it is among the findings, if the ensemble tells the two classes "
            "apart."
        )
        note += " None is above 0.5 here: no label is called wrong." if rows[0]["suspicion"] <= 0.5 else ""
    if folds := int(view.audit.plan.model.get("num_folds") or 0):
        note += f" Each image was explained by the one of {folds} ensembles that was not trained on it."
    elif rows and view.facts.trained_on_labels:
        note += " The ensemble may have been trained on these images, and then trusts their labels: train with folds."
    counts = "SELECT label, source, count(*) FROM codes WHERE status = 'ok' AND label IS NOT NULL GROUP BY ALL"
    return {"rows": rows, "agreement": agreement(view, counts), "note": note}


def agreement(view: View, counts: str, from_given: bool = False) -> dict[str, Any] | None:
    """Agreement by a given class, lowest first, and the most frequent differences; None where there is no count.

    ``counts`` is SQL of (given class, seen class, images), the explained model's class first if ``from_given``.
    """
    images = np.zeros((len(view.class_names),) * 2, np.int64)
    for given, seen, count in view.facts.rows(counts):
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
        if count := differing[given, seen]:
            pair = (given, seen) if from_given else (seen, given)
            explained = view.facts.pairs["pairs"][pair] > 0
            worst.append((names[given], names[seen], f"{count:,}", pair if explained else None))
    return {"total": int(totals.sum()), "same": int(same.sum()), "shares": shares, "worst": worst}


def predictions(view: View) -> dict[str, Any] | None:
    """How the ensemble and the user's own model agree, by class and in words."""
    if not has_predictions(view.facts.con):
        return None
    counts = (
        "SELECT prediction, source, sum(images) FROM prediction_agreement WHERE prediction IS NOT NULL GROUP BY ALL"
    )
    found = agreement(view, counts, from_given=view.facts.has_predictor) or {"total": 0, "same": 0}
    total, same = found["total"], found["same"]
    counts = (
        "SELECT sum(images) FILTER (prediction IS NULL), sum(images) FILTER (prediction + label IS NOT NULL), "
        "sum(images) FILTER (prediction = label), sum(images) FILTER (prediction IS NOT NULL AND source = label) "
        "FROM prediction_agreement"
    )
    missing, labelled, theirs, ours = (count or 0 for count in view.facts.rows(counts)[0])
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
    return {"note": note, "agreement": found, "more": total - same - LISTED}
