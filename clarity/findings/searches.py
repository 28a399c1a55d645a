"""Checks of reading, searching and re-encoding: unreadable images, pairs that did not converge, lost targets."""

import numpy as np

from clarity.findings.distances import MIN_DESCRIBED
from clarity.findings.finding import Facts, Finding, NotChecked, Outcome, ranked, share_text
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
                f"{plural(failed, 'image')} could not be read",
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
    beyond = [facts.class_names.index(name) for name in facts.verdict.unreachable if name in facts.class_names]
    share_beyond = float(np.nansum(failed[:, beyond])) / total
    reason = (
        f" {percent(share_beyond)} of them are towards classes out of reach "
        f"({listed([facts.name(k) for k in beyond])}), whose real images do not get that far either"
        if share_beyond
        else ""
    )
    given = facts.thresholds
    by_class = given is not None and given[0] < given[1]
    if share_beyond:  # a model that sees nothing in real images has no threshold to ask for
        asks = ": --min-target-prob auto asks only for what real images of each class get."
        reason += "." if facts.verdict.level == "no-go" or by_class else asks
    if facts.keep:
        reason += f" The search kept {listed(list(facts.keep))}, which puts some pairs out of reach."
    # Only a question that gets no answer is probably wrong: a class pair that mostly fails, unless it is out of reach
    # for real images too, or that is the price of kept attributes.
    most_severe = 0.95 if mostly.any() and share_beyond < 0.5 and not facts.keep else 0.65
    wanted = f"a target probability of {thresholds(given)}" if given else "the wanted target probability"
    within = f" within {facts.max_steps:,} steps" if facts.max_steps is not None else ""
    parts = [f"{facts.arrow(pair)} ({failed[pair]:,.0f} of {facts.pairs['pairs'][pair]:,.0f})" for pair in worst[:3]]
    where = f"most often {listed(parts)}" if (failed > 0).sum() > 3 else listed(parts)
    return Finding(
        "unconverged",
        min(most_severe, 0.35 + 0.6 * min(1.0, share / 0.1) ** 0.5),
        f"{plural(total, 'pair')} did not converge",
        f"{total:,} of {plural(facts.num_pairs, 'pair')} ({percent(share)}) did not reach {wanted}{within}: "
        f"{where}.{reason}",
        f"Counted; expected for similar images: {facts.share_of_pairs(total)}.",
        tuple(worst),
        facts.examples("NOT converged", "target_prob_final"),
        {"pairs": total, "share": share},
    )


def check_reencoding(facts: Facts) -> Outcome:
    """Counterfactuals that are not classified as their target once decoded, rounded to 8 bits and encoded again.

    A search that did not converge has no target to lose.
    """
    rows = facts.rows(
        "SELECT source, target, count(*), count(*) FILTER (reencoded_class IS DISTINCT FROM target), "
        "count(DISTINCT image_id) FROM counterfactuals WHERE converged GROUP BY ROLLUP ((source, target)) ORDER BY ALL"
    )
    *rows, (_, _, total, all_lost, images) = rows
    if not total:
        return NotChecked("no search converged")
    share = all_lost / total
    if share < 0.01:
        return []
    fewest = min(5, max(row[2] for row in rows))  # a small audit has no class pair of five
    shares = np.full((len(facts.class_names),) * 2, np.nan)
    for source, target, count, lost, _ in rows:
        shares[source, target] = lost / count if lost and count >= fewest else np.nan
    worst = ranked(shares)[:6]
    parts = [f"{facts.arrow(pair)} ({percent(shares[pair])})" for pair in worst[:3]]
    return Finding(
        "reencoding",
        min(0.95, 0.35 + 0.6 * min(1.0, share / 0.2)),
        f"{percent(share)} of the counterfactuals do not survive re-encoding",
        f"Decoded, rounded to 8 bits and encoded again, {all_lost:,} of {plural(total, 'counterfactual')} "
        f"({percent(share)}) are no longer classified as their target"
        + (f"; most often {listed(parts)}." if parts else "."),
        f"Counted over the pairs that converged; expected for similar images: {share_text(share * images, images)}.",
        tuple(worst),
        figures={"share": share},
    )
