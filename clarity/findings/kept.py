"""Check of kept attributes: what keeping them costs, and whether the written pictures keep them."""

from __future__ import annotations

from clarity.findings.finding import Facts, Finding, NotChecked, share_text
from clarity.report.text import listed, percent, plural

#: Share of flips from which an attribute counts as not kept.
MOST_FLIPPED = 0.1


def check_kept(facts: Facts) -> list[Finding] | NotChecked:
    """Pairs out of reach with and without each kept attribute, and pictures in which it flips all the same."""
    if not facts.keep:
        return NotChecked("no attribute was kept")
    if not facts.num_pairs:
        return NotChecked("the audit has no pairs")
    costs, losses, flips, missed = [], [], {}, 0
    for index, name in enumerate(facts.keep, 1):
        sides = {}
        reached = flipped = 0
        for is_set, pairs, converged, changed in facts.rows(
            """
            SELECT kept_probs_initial[$index] > 0.5 AS is_set, count(*), count(*) FILTER (converged),
                   count(*) FILTER (converged AND (kept_probs_final[$index] > 0.5) <> is_set)
            FROM counterfactuals GROUP BY 1 ORDER BY 1 DESC
            """,
            {"index": index},
        ):
            sides["with" if is_set else "without"] = percent(pairs - converged, pairs)
            reached, flipped = reached + converged, flipped + changed
        missed = facts.num_pairs - reached
        flips[name] = flipped / max(reached, 1)
        costs.append(listed([f"{share} {side} “{name}”" for side, share in sides.items()]))
        losses.append(f"“{name}” in {percent(flipped, max(reached, 1))}")
    lost = [name for name, share in flips.items() if share > MOST_FLIPPED]
    return [
        Finding(
            "kept",
            0.5 if lost else 0.3,
            f"Keeping {listed(list(facts.keep))} leaves {plural(missed, 'pair')} out of reach",
            f"With {plural(len(facts.keep), 'attribute')} kept, {percent(missed, facts.num_pairs)} of "
            f"{plural(facts.num_pairs, 'pair')} did not converge: {'; '.join(costs)}. Decoded and encoded again, "
            f"the kept attribute flips: {listed(losses)}.",
            f"Counted; expected out of reach for similar images: {share_text(missed, facts.num_pairs)}. Flips "
            "are those of the model's linear heads: an attribute is kept only as far as the code knows it.",
            figures={"missed": missed, "flipped": flips},
        )
    ]
