"""Check of counterfactuals about which the members disagree more than about images that they are as sure of."""

from __future__ import annotations

import numpy as np

from clarity.findings.finding import Facts, Finding, NotChecked, share_text
from clarity.findings.statistics import share_interval
from clarity.report.text import listed, number, percent

#: Images behind a quantile, and counterfactuals towards a target, at least.
MIN_IMAGES, MIN_COUNTERFACTUALS = 40, 20
#: Told from this share beyond the images' 95 % quantile, if its lower bound is above twice the 5 % expected.
MIN_SHARE, MIN_BOUND = 0.25, 0.1


def check_epistemic(facts: Facts) -> list[Finding] | NotChecked:
    """Targets whose counterfactuals have more epistemic uncertainty than 95 % of images of the same probability.

    The search stops at a probability that most images exceed, so only images whose own probability has odds within a
    factor of two of the counterfactuals' (5 % to 95 %) are compared: those of the target if there are enough, else all.
    """
    columns = facts.con.execute(
        "SELECT target, source, target_prob_final, epistemic_final FROM counterfactuals "
        "WHERE converged AND epistemic_final IS NOT NULL"
    ).fetchnumpy()
    target, source, prob, final = (np.asarray(columns[name]) for name in columns)
    if not len(final):
        nothing = not np.nansum(facts.pairs["converged"])
        return NotChecked("no search converged" if nothing else "a single classifier has no epistemic uncertainty")
    columns = facts.con.execute(
        "SELECT source, probs[source + 1] AS prob, epistemic FROM codes WHERE status = 'ok' AND epistemic IS NOT NULL"
    ).fetchnumpy()
    image_class, image_prob, epistemic = (np.asarray(columns[name]) for name in columns)
    targets = [t for t in np.unique(target).tolist() if (target == t).sum() >= MIN_COUNTERFACTUALS]
    escaping, compared = [], 0
    for t in targets:
        mine = target == t
        low, high = log_odds(np.quantile(prob[mine], [0.05, 0.95])) + np.log([0.5, 2.0])
        alike = (log_odds(image_prob) >= low) & (log_odds(image_prob) <= high)
        own = alike & (image_class == t)
        reference = epistemic[own if own.sum() >= MIN_IMAGES else alike]
        if len(reference) < MIN_IMAGES:
            continue
        compared += 1
        beyond = final[mine] > np.quantile(reference, 0.95)
        bound, _ = share_interval(beyond.sum(), len(beyond), 1 - 0.1 / len(targets))
        if beyond.mean() > MIN_SHARE and bound > MIN_BOUND:
            shares = [(float(beyond[source[mine] == s].mean()), s) for s in np.unique(source[mine]).tolist()]
            sources = [s for _, s in sorted(shares, key=lambda entry: (-entry[0], entry[1]))]
            escaping.append(
                (float(beyond.mean()), t, len(beyond), np.median(final[mine]), np.median(reference), sources)
            )
    if not compared:
        return NotChecked(
            f"fewer than {MIN_IMAGES} images are as sure as the counterfactuals, or no target has {MIN_COUNTERFACTUALS}"
        )
    if not escaping:
        return []
    escaping.sort(key=lambda entry: (-entry[0], entry[1]))
    share, t, count, after, usual, _ = escaping[0]
    names = listed([f"{facts.name(entry[1])} ({percent(entry[0])})" for entry in escaping[:4]])
    return [
        Finding(
            "epistemic",
            min(0.9, 0.45 + 0.5 * (share - MIN_SHARE) / (1 - MIN_SHARE)),
            f"Explanations towards {facts.name(t)} leave the training data",
            f"{percent(share)} of the counterfactuals towards {facts.name(t)} have more epistemic uncertainty than 95 "
            f"% of the images that the ensemble is as sure of (median {number(after)} nats, the images' "
            f"{number(usual)}). Targets concerned: {names}.",
            f"{share_text(share * count, count)}; 5 % is expected by chance. Told where the lower bound, corrected for "
            f"{len(targets)} targets, is above 10 %.",
            tuple((s, entry[1]) for entry in escaping[:3] for s in entry[5][:3]),
            figures={"share": share, "targets": len(escaping)},
        )
    ]


def log_odds(prob: np.ndarray) -> np.ndarray:
    """Logarithm of the odds, finite at 0 and 1."""
    prob = np.clip(np.asarray(prob, np.float64), 1e-9, 1 - 1e-9)
    return np.log(prob) - np.log1p(-prob)
