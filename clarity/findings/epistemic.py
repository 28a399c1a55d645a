"""Check for counterfactuals with more epistemic uncertainty than images of similar probability."""

import numpy as np

from clarity.findings.finding import Facts, Finding, NotChecked, Outcome, graded
from clarity.findings.statistics import share_interval
from clarity.report.text import interval, listed, number, percent

#: Images behind a quantile, and counterfactuals towards a target, at least.
MIN_IMAGES, MIN_COUNTERFACTUALS = 40, 20
#: Told if more than half lie beyond the images' 95 % quantile, and the lower bound of their share is above a quarter.
MIN_SHARE, MIN_BOUND = 0.5, 0.25


def check_epistemic(facts: Facts) -> Outcome:
    """Targets whose counterfactuals have more epistemic uncertainty than 95 % of images of the same probability.

    The search stops at a probability that most images of easy data exceed, and epistemic uncertainty falls with it.
    """
    columns = facts.con.execute(
        "SELECT target, source, target_prob_final, epistemic_final FROM counterfactuals "
        "WHERE converged AND epistemic_final IS NOT NULL"
    ).fetchnumpy()
    target, source, prob, final = (np.asarray(columns[name]) for name in columns)
    if not len(final):
        nothing = not np.nansum(facts.pairs["converged"])
        return NotChecked("no search converged" if nothing else "a single classifier has no disagreement")
    columns = facts.con.execute(
        "SELECT class, prob, epistemic FROM codes JOIN ensemble USING (image_id) WHERE epistemic IS NOT NULL"
    ).fetchnumpy()
    image_class, image_prob, epistemic = (np.asarray(columns[name]) for name in columns)
    reached = {t: target == t for t in np.unique(target).tolist()}
    reached = {t: mine for t, mine in reached.items() if mine.sum() >= MIN_COUNTERFACTUALS}
    beyond_data, compared = [], 0
    for t, mine in reached.items():
        limit = similar_images_quantile(prob[mine], image_prob, epistemic, image_class == t)
        if limit is None:
            continue
        compared += 1
        beyond = final[mine] > limit
        if escapes(beyond, len(reached)):
            shares = [(float(beyond[source[mine] == s].mean()), s) for s in np.unique(source[mine]).tolist()]
            sources = [s for _, s in sorted(shares, key=lambda entry: (-entry[0], entry[1]))]
            beyond_data.append((float(beyond.mean()), t, len(beyond), float(np.median(final[mine])), limit, sources))
    if not compared:
        return NotChecked(
            f"it takes {MIN_COUNTERFACTUALS} counterfactuals towards a class and {MIN_IMAGES} images that the "
            "ensemble is as sure of"
        )
    if not beyond_data:
        return []
    beyond_data.sort(key=lambda entry: (-entry[0], entry[1]))
    share, t, count, after, limit, _ = beyond_data[0]
    others = [f"{facts.name(entry[1])} ({percent(entry[0])})" for entry in beyond_data[1:4]]
    return Finding(
        "epistemic",
        graded(lambda x: min(0.9, 0.45 + 0.5 * (x - MIN_SHARE) / (1 - MIN_SHARE)), share * count, count),
        f"Explanations towards {facts.name(t)} may leave the training data",
        f"On {percent(share)} of the counterfactuals towards {facts.name(t)} the members of the ensemble disagree more "
        f"than on 95 % of the images that it is as sure of (median {number(after)} nats; the images' 95 % quantile is "
        f"{number(limit)}).{f' The same holds towards {listed(others)}.' if others else ''}",
        f"The 95 % interval of this share is {interval(*share_interval(share * count, count))}; 5 % is expected by "
        f"chance. Reported if it is above {percent(MIN_SHARE)} and its lower bound, corrected for {len(reached)} "
        f"targets, above {percent(MIN_BOUND)}.",
        tuple((s, entry[1]) for entry in beyond_data[:3] for s in entry[5][:3]),
        figures={"share": share, "targets": len(beyond_data)},
    )


def similar_images_quantile(
    prob: np.ndarray, image_prob: np.ndarray, epistemic: np.ndarray, own: np.ndarray
) -> float | None:
    """The 95 % quantile of the epistemic uncertainty of images whose odds are within a factor of two of 5 % to 95 % of
    the counterfactuals': of all, or of the target's ``own`` where these are more uncertain; None for too few.

    A class whose images are all alike, as ones are, has little uncertainty: beyond it is not yet beyond the data.
    """
    low, high = log_odds(np.quantile(prob, [0.05, 0.95])) + np.log([0.5, 2.0])
    alike = (log_odds(image_prob) >= low) & (log_odds(image_prob) <= high)
    quantiles = [float(np.quantile(epistemic[some], 0.95)) for some in (alike, alike & own) if some.sum() >= MIN_IMAGES]
    return max(quantiles, default=None)


def escapes(beyond: np.ndarray, num_targets: int) -> bool:
    """Whether most counterfactuals of one of several targets lie beyond the images' quantile, and not by chance."""
    bound, _ = share_interval(beyond.sum(), len(beyond), 1 - 0.1 / num_targets)
    return bool(beyond.mean() > MIN_SHARE and bound > MIN_BOUND)


def log_odds(prob: np.ndarray) -> np.ndarray:
    """Logarithm of the odds, finite at 0 and 1."""
    prob = np.clip(np.asarray(prob, np.float64), 1e-9, 1 - 1e-9)
    return np.log(prob) - np.log1p(-prob)
