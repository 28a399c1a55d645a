"""Checks of reading, searching and written pictures: what was not read, did not converge or lost its target."""

from collections.abc import Mapping

import numpy as np

from clarity.findings.distances import MIN_DESCRIBED
from clarity.findings.finding import MAX_LOOK, Facts, Finding, NotChecked, Outcome, for_others, graded, ranked
from clarity.findings.statistics import share_interval
from clarity.findings.verdict import MIN_REACHED
from clarity.report.text import listed, percent, plural, thresholds

COUNTED = "Counted over every row of the audit."


def check_unread(facts: Facts) -> Outcome:
    """Images that were not read and searches that met NaN or infinity."""
    ((images,),) = facts.rows("SELECT count(*) FROM codes")
    if not images:
        return NotChecked("the audit has no images yet")
    found = []
    rows = facts.rows(
        "SELECT coalesce(error, status), count(*), min(image_id) FROM codes WHERE status <> 'ok' "
        "GROUP BY 1 ORDER BY 2 DESC, 1"
    )
    if failed := sum(row[1] for row in rows):
        reasons = listed([f"“{reason}” ({count:,})" for reason, count, _ in rows[:3]])
        found.append(
            Finding(
                "unread",
                0.5 + 0.5 * min(1.0, 10 * failed / images),
                f"{plural(failed, 'image')} could not be used",
                f"{failed:,} of {plural(images, 'image')} ({percent(failed, images)}) were not explained: {reasons}"
                f"{' and other reasons' if len(rows) > 3 else ''}. The first is {rows[0][2]}.",
                COUNTED,
                figures={"images": images, "failed": failed},
            )
        )
    rows = facts.rows("SELECT status, count(*) FROM counterfactuals WHERE status <> 'ok' GROUP BY 1 ORDER BY 2 DESC, 1")
    if broken := sum(row[1] for row in rows):
        found.append(
            Finding(
                "unread",
                0.75,
                f"{plural(broken, 'search', 'searches')} met NaN or infinity",
                f"{broken:,} of {plural(facts.num_pairs, 'pair')} ({percent(broken, facts.num_pairs)}) ended with "
                f"status {listed([repr(status) for status, _ in rows])}: the model yields NaN or infinity there.",
                COUNTED,
                figures={"pairs": broken},
            )
        )
    return found


def check_unconverged(facts: Facts) -> Outcome:
    """Pairs that did not reach the wanted target probability."""
    if not facts.num_pairs:
        return NotChecked("the audit has no pairs")
    failed = facts.pairs["pairs"] - facts.pairs["converged"]
    total = int(np.nansum(failed))
    if not total:
        return []
    worst = ranked(np.where(failed > 0, failed, np.nan))[:6]
    share = total / facts.num_pairs
    mostly = (facts.pairs["pairs"] >= MIN_DESCRIBED) & (failed > facts.pairs["pairs"] / 2)
    lowest, highest = facts.thresholds
    # Out of reach is measured at MIN_REACHED: a lower threshold for all classes may be within reach.
    unreachable = facts.unreachable if lowest < highest or highest >= MIN_REACHED else []
    share_beyond = float(np.nansum(failed[:, unreachable])) / total
    reason = ""
    if share_beyond:
        reason = (
            f" {'All' if share_beyond == 1 else percent(share_beyond)} of these are towards classes out of reach "
            f"({listed([facts.name(k) for k in unreachable])}): nine tenths of their real images do not get that far "
            "either."
        )
        # A model that sees nothing in real images has no threshold to ask for.
        if facts.verdict.level != "no-go" and lowest == highest:
            reason += " --min-target-prob auto asks only for what real images of each class get."
    if facts.keep:
        reason += f" The search kept {listed(list(facts.keep))}, which can put pairs out of reach."
    # Only a question that gets no answer is probably wrong: a class pair that mostly fails, unless it is out of reach
    # for real images too, or that is the price of kept attributes.
    most_severe = 0.95 if mostly.any() and share_beyond < 0.5 and not facts.keep else MAX_LOOK
    parts = [f"{facts.arrow(pair)} ({failed[pair]:,.0f} of {facts.pairs['pairs'][pair]:,.0f})" for pair in worst[:3]]
    where = f"most often {listed(parts)}" if (failed > 0).sum() > 3 else listed(parts)
    return Finding(
        "unconverged",
        min(most_severe, graded(lambda x: 0.35 + 0.6 * min(1.0, x / 0.1) ** 0.5, *facts.in_images(total))),
        f"{plural(total, 'pair')} did not converge",
        f"{total:,} of {plural(facts.num_pairs, 'pair')} ({percent(share)}) did not reach a target probability of "
        f"{thresholds(facts.thresholds)} within {facts.max_steps:,} steps: {where}.{reason}",
        f"Counted; {facts.interval_of_pairs(total)}.",
        tuple(worst),
        facts.examples("NOT converged", "target_prob_final"),
        {"pairs": total, "share": share},
    )


def check_judged(facts: Facts) -> Outcome:
    """Counterfactuals in whose pictures the held-out judge does not see the target."""
    judged = "converged AND judge_class IS NOT NULL"
    total, images, missed, worst = count_missed(facts, judged, "judge_class <> target")
    if not total:
        return NotChecked("no picture of a converged search was shown to a held-out judge")
    share = missed / total
    if share < 0.05:
        return []
    sees_source = ""
    if len(facts.class_names) > 2:  # of two classes it is the other
        ((count,),) = facts.rows(f"SELECT count(*) FROM counterfactuals WHERE {judged} AND judge_class = source")
        sees_source = f"; in {percent(count, total)} it sees the class that {facts.explained} predicts for the image"
    known = facts.judge_accuracy
    # A judge that misses as many reconstructions of real images says little against counterfactuals.
    severity = graded(lambda x: 0.35 + 0.6 * min(1.0, x / 0.5), share * images, images)
    missed_more = known is not None and share_interval(share * images, images)[0] > 1 - known
    return Finding(
        "judged",
        severity if missed_more else min(severity, MAX_LOOK),
        f"The judge does not see the target in {percent(share)} of the counterfactuals",
        f"The held-out judge does not see the target in {missed:,} of {plural(total, 'counterfactual')} "
        f"({percent(share)}){sees_source}{most_often(facts, worst)}."
        + ("" if known is None else f" Of the reconstructions of real images it recognises {percent(known)}."),
        f"Counted over the pairs that converged; {for_others(share * images, images)}.",
        tuple(worst),
        figures={"share": share},
    )


def check_reencoding(facts: Facts) -> Outcome:
    """Counterfactuals that are not classified as their target once decoded, rounded to 8 bits and encoded again.

    A search that did not converge has no target to lose.
    """
    total, images, lost, worst = count_missed(facts, "converged", "reencoded_class IS DISTINCT FROM target")
    if not total:
        return NotChecked("no search converged")
    share = lost / total
    if share < 0.01:
        return []
    return Finding(
        "reencoding",
        graded(lambda x: 0.35 + 0.6 * min(1.0, x / 0.2), share * images, images),
        f"{percent(share)} of the counterfactuals do not survive re-encoding",
        f"Decoded, rounded to 8 bits and encoded again, {lost:,} of {plural(total, 'counterfactual')} "
        f"({percent(share)}) are no longer classified as their target{most_often(facts, worst)}.",
        f"Counted over the pairs that converged; {for_others(share * images, images)}.",
        tuple(worst),
        figures={"share": share},
    )


def count_missed(facts: Facts, among: str, missed: str) -> tuple[int, int, int, dict[tuple[int, int], float]]:
    """Counts the pairs that fulfil ``among``, their images, and the pairs of these that fulfil ``missed``.

    Last come the six class pairs with the largest shares of such pairs, and these shares.
    """
    rows = facts.rows(
        f"SELECT source, target, count(*), count(DISTINCT image_id), count(*) FILTER ({missed}) "
        f"FROM counterfactuals WHERE {among} GROUP BY ROLLUP ((source, target)) ORDER BY ALL"
    )
    *rows, (_, _, total, images, all_missed) = rows
    fewest = min(5, max((row[2] for row in rows), default=0))  # a small audit has no class pair of five
    shares = {(row[0], row[1]): row[4] / row[2] for row in rows if row[4] and row[2] >= fewest}
    worst = sorted(shares, key=lambda pair: (-shares[pair], pair))[:6]
    return total, images, all_missed, {pair: shares[pair] for pair in worst}


def most_often(facts: Facts, worst: Mapping[tuple[int, int], float]) -> str:
    """The end of a sentence that names the first of the class pairs of ``count_missed``."""
    parts = [f"{facts.arrow(pair)} ({percent(share)})" for pair, share in worst.items()]
    return f"; most often {listed(parts[:3])}" if parts else ""
