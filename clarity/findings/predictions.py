"""Checks of the user's own model: whether the ensemble may speak for it, what it confirms, where it is fooled."""

import numpy as np

from clarity.audit.queries import has_predictions
from clarity.findings.finding import MAX_LOOK, Facts, Finding, NotChecked, Outcome, for_others, graded, ranked
from clarity.findings.statistics import share_interval
from clarity.report.text import listed, percent, plural

#: The share of confirmed pairs that nobody else sees as the target from which it is worth a look.
MIN_FOOLED = 0.01


def check_predictions(facts: Facts) -> Outcome:
    """How often the ensemble predicts what the user's model does, and what the reconstruction alone changes."""
    if not has_predictions(facts.con):
        return NotChecked("the audit has no predictions of another model")
    rows = facts.rows(
        "SELECT prediction, sum(images), coalesce(sum(images) FILTER (prediction = source), 0) AS same "
        "FROM prediction_agreement WHERE prediction IS NOT NULL GROUP BY 1 ORDER BY same / sum(images), 1"
    )
    total, same = (int(sum(row[i] for row in rows)) for i in (1, 2))
    if not total:
        return NotChecked("no image has a prediction")
    examples = facts.rows(
        "SELECT image_id, prediction, class FROM codes JOIN ensemble USING (image_id) WHERE prediction <> class "
        "ORDER BY prob DESC, image_id LIMIT 12"
    )
    sentence = f"On {same:,} of {plural(total, 'image')} ({percent(same, total)}) the ensemble"
    if facts.has_predictor:
        ((images, flipped),) = facts.rows(
            "SELECT count(*), count(*) FILTER (flipped) FROM (SELECT max(prediction_target_prob_reconstruction) >= 0.5 "
            "AS flipped FROM counterfactuals GROUP BY image_id) WHERE flipped IS NOT NULL"
        )
        sentence += (
            f", whose gradient leads the search, predicts the same class as your model. On {flipped:,} of "
            f"{plural(images, 'image')} ({percent(flipped, images)}) your model gives a target at least 0.5 in the "
            "reconstruction already: there a flip proves nothing."
        )
    else:
        sentence += " predicts the same class as your model; only there does an explanation speak for your model."
    if same < total:
        worst = [f"{facts.name(row[0])} ({percent(row[2], row[1])})" for row in rows[:3] if row[2] < row[1]]
        sentence += f" Agreement is lowest where your model predicts {listed(worst)}."
        counts = facts.rows(
            "SELECT sum(images), sum(images) FILTER (prediction = label), sum(images) FILTER (source = label) "
            "FROM prediction_agreement WHERE prediction <> source AND label IS NOT NULL"
        )[0]
        labelled, theirs, ours = (int(count or 0) for count in counts)
        if labelled:
            sentence += (
                f" Of {labelled:,} labelled images where the two differ, the label is your model's class in "
                f"{theirs:,}, the ensemble's in {ours:,}, neither's in {labelled - theirs - ours:,}."
            )
    return Finding(
        "predictions",
        graded(lambda x: 0.3 + 0.6 * min(1.0, x / 0.1), total - same, total),
        f"The ensemble agrees with your model on {percent(same, total)} of the images",
        sentence,
        f"Counted; {for_others(same, total)}.",
        tuple(dict.fromkeys((seen, prediction) for _, prediction, seen in examples)),
        tuple((image_id, seen if facts.has_predictor else prediction) for image_id, prediction, seen in examples),
        {"agreement": same / total, "images": total},
    )


def check_confirmed(facts: Facts) -> Outcome:
    """The share of pairs that passed every check, by class pair, and images that cannot be flipped."""
    ((checked, confirmed),) = facts.rows("SELECT count(confirmed), count(*) FILTER (confirmed) FROM counterfactuals")
    if not checked:
        return NotChecked("no check of the written pictures was asked for")
    if confirmed == checked:
        return []
    share = facts.pairs["confirmed_share"]
    worst = ranked(np.where(share < 1, -share, np.nan))[:6]
    parts = [f"{facts.arrow(pair)} ({percent(share[pair])} confirmed)" for pair in worst[:3]]
    stubborn = facts.rows(
        "SELECT image_id FROM counterfactuals WHERE confirmed IS NOT NULL GROUP BY 1 HAVING NOT bool_or(confirmed) "
        "ORDER BY 1"
    )
    ((seen, spent),) = facts.rows(
        "SELECT count(*) FILTER (NOT confirmed AND prediction_target_prob_final >= 0.5), "
        "count(*) FILTER (NOT confirmed AND rungs = 0 AND status = 'ok') FROM counterfactuals"
    )
    more = f" For {spent:,} of these no step was left to search further." if spent else ""
    more += f" {plural(len(stubborn), 'image')} cannot be flipped to any target." if stubborn else ""
    # Other checks, a higher probability, or a step of the search may have been asked for, too.
    who = "your model does not see the target in" if facts.has_predictor and not seen else "the checks fail on"
    failed = checked - confirmed
    return Finding(
        "confirmed",
        graded(lambda x: 0.35 + 0.6 * min(1.0, x / 0.1) ** 0.5, *facts.in_images(failed)),
        f"{percent(confirmed, checked)} of the pairs are confirmed",
        f"After at most three further searches {who} {failed:,} of {plural(checked, 'picture')} "
        f"({percent(failed, checked)}): least often confirmed are {listed(parts)}.{more}",
        f"Counted; {facts.interval_of_pairs(confirmed)}.",
        tuple(worst),
        facts.examples("NOT confirmed", "coalesce(prediction_target_prob_final, reencoded_target_prob)"),
        {"confirmed": confirmed, "pairs": checked, "stubborn": len(stubborn)},
    )


def check_fooled(facts: Facts) -> Outcome:
    """Pairs that the user's model confirms, and in which the ensemble or the judge does not see the target."""
    if not facts.has_predictor:
        return NotChecked("no predictor was asked about the pictures")
    alone = "confirmed AND (reencoded_class <> target OR coalesce(judge_class <> target, false))"
    ((confirmed, fooled, led, judged),) = facts.rows(
        f"SELECT count(*) FILTER (confirmed), count(*) FILTER ({alone}), count(*) FILTER (confirmed AND "
        "reencoded_class <> target), count(*) FILTER (confirmed AND judge_class <> target) FROM counterfactuals"
    )
    if not confirmed:
        return NotChecked("no pair is confirmed")
    if fooled < MIN_FOOLED * confirmed:
        return []
    cells = facts.rows(
        f"SELECT source, target, count(*) FILTER ({alone}) AS fooled, count(*) FILTER (confirmed) FROM counterfactuals "
        "GROUP BY ALL HAVING fooled > 0 ORDER BY fooled DESC, source, target LIMIT 6"
    )
    parts = [f"{facts.arrow((s, t))} ({percent(count, whole)})" for s, t, count, whole in cells[:3]]
    witnesses = " or ".join(who for who, count in (("the ensemble", led), ("the held-out judge", judged)) if count)
    known, seen = facts.judge_accuracy, (fooled / confirmed * facts.num_images, facts.num_images)
    severity = graded(lambda x: 0.4 + 0.5 * min(1.0, x / 0.2), *seen)
    if judged and (known is None or share_interval(*seen)[0] <= 1 - known):  # as many real images are missed
        severity = min(severity, MAX_LOOK)
    return Finding(
        "fooled",
        severity,
        f"{percent(fooled, confirmed)} of the confirmed pictures convince your model, but not {witnesses}",
        f"In {fooled:,} of {plural(confirmed, 'confirmed picture')} ({percent(fooled, confirmed)}) your model sees "
        f"the target and {witnesses} does not; most often {listed(parts)}."
        + (f" Of real images' reconstructions the judge recognises {percent(known)}." if judged and known else ""),
        f"Counted: {percent(fooled, facts.num_pairs)} of all pairs; {facts.interval_of_pairs(fooled)}. Either may be "
        "wrong: look at the pictures.",
        tuple((s, t) for s, t, _, _ in cells),
        facts.examples(alone, "prediction_target_prob_final DESC"),
        {"fooled": fooled, "confirmed": confirmed},
    )
