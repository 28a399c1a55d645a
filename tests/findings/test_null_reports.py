"""Error rates of whole reports, simulated: checks are false in at most 5 % of audits with nothing to find.

``python docs/null_reports.py`` prints the rates, and how often a planted effect is found with and without correction.
"""

import itertools

import numpy as np
import pytest
from scipy import stats

from clarity.findings import attributes, distances, epistemic, suspicion
from clarity.findings.labels import MIN_AGREEMENT, pair_agreement

REPORTS = 300


def at_most(level: float, reports: int = REPORTS) -> int:
    """False reports that a rate of ``level`` exceeds in one of a thousand simulations."""
    return int(stats.binom.ppf(0.999, reports, level))


def pairs_of(
    rng: np.random.Generator, classes: int, each: int, spread: float, failure: float, ratio: float = 1.0
) -> tuple[np.ndarray, ...]:
    """Source, target, converged and distance of an audit without asymmetry, but for one planted direction."""
    source, target = np.repeat(np.array(list(itertools.permutations(range(classes), 2))).T, each, 1)
    usual = rng.uniform(8, 20, (classes, classes))
    usual = np.maximum(usual, usual.T)
    usual[0, 1] *= ratio
    distance = usual[source, target] * np.exp(rng.normal(0, spread, len(source)))
    return source, target, rng.random(len(source)) >= failure, distance


def told_asymmetric(reports: int, *setting: float, seed: int = 0) -> int:
    rng = np.random.default_rng(seed)
    classes = int(setting[0])
    told = 0
    for _ in range(reports):
        found, _ = distances.asymmetries(*pairs_of(rng, classes, int(setting[1]), *setting[2:]), classes)
        told += bool(found)
    return told


@pytest.mark.parametrize(
    ("classes", "each", "spread", "failure"),
    [(2, 50, 0.6, 0.2), (2, 8, 0.6, 0.5), (10, 15, 0.6, 0.2), (10, 8, 0.3, 0.5), (20, 9, 0.6, 0.2)],
)
def test_asymmetry_is_false_in_few_reports(classes: int, each: int, spread: float, failure: float) -> None:
    assert told_asymmetric(REPORTS, classes, each, spread, failure) <= at_most(0.05)


def test_asymmetry_is_found_where_it_is_planted() -> None:
    assert told_asymmetric(100, 10, 15, 0.3, 0.0, 2.0) >= 90
    assert told_asymmetric(100, 10, 50, 0.6, 0.0, 2.0) >= 90


def drifts(reports: int, cells: int, each: int, mean: float = 0.0, seed: int = 0) -> int:
    """Reports that tell a drift; the probabilities are those of a network that is mostly sure."""
    rng = np.random.default_rng(seed)
    told = 0
    for _ in range(reports):
        before, after = rng.beta(0.4, 0.4, (2, cells, each))
        change = after - before
        change[0] += mean
        told += bool(attributes.drift(list(change)).any())
    return told


@pytest.mark.parametrize(("cells", "each"), [(2, 50), (90, 12), pytest.param(480, 12, marks=pytest.mark.slow)])
def test_drift_is_false_in_few_reports(cells: int, each: int) -> None:
    assert drifts(REPORTS, cells, each) <= at_most(0.05)


def test_drift_is_found_where_it_is_planted() -> None:
    assert drifts(50, 480, 50, 0.5) >= 45


def escapes(reports: int, classes: int, images: int, each: int, factor: float = 1.0, seed: int = 0) -> int:
    """Reports that tell an escape; uncertainty follows the probability, in images and counterfactuals alike."""
    rng = np.random.default_rng(seed)

    def uncertainty(prob: np.ndarray) -> np.ndarray:
        return (1 - prob) * np.exp(rng.normal(-1, 1, len(prob)))

    told = 0
    for _ in range(reports):
        image_prob = 1 - (1 - rng.uniform(0.3, 1, images)) ** 3
        image_class = rng.integers(0, classes, images)
        epistemic_of = uncertainty(image_prob)
        found = False
        for target in range(classes):
            prob = rng.uniform(0.99, 0.993, each)
            final = uncertainty(prob) * (factor if target == 0 else 1.0)
            most = epistemic.similar_images_quantile(prob, image_prob, epistemic_of, image_class == target)
            if most is not None:
                found |= epistemic.escapes(final > most, classes)
        told += found
    return told


@pytest.mark.parametrize(("classes", "images", "each"), [(2, 300, 150), (10, 500, 50), (30, 600, 20)])
def test_escape_is_false_in_few_reports(classes: int, images: int, each: int) -> None:
    assert escapes(REPORTS, classes, images, each) <= at_most(0.05)


def test_escape_is_found_where_it_is_planted() -> None:
    assert escapes(50, 10, 500, 50, factor=20.0) >= 45


def test_escape_is_not_judged_by_few_images() -> None:
    sure = np.full(50, 0.99), np.full(500, 1.0), np.zeros(500), np.ones(500, bool)
    assert epistemic.similar_images_quantile(*sure) is None


def test_escape_is_beyond_all_images_and_not_only_those_of_a_class_that_are_all_alike() -> None:
    own = np.arange(1045) < 45
    others = np.linspace(0, 0.01, 1000)
    # A class that is more uncertain than the others has its own quantile.
    for its_own, most in ((0.002, 0.0095), (0.2, 0.2)):
        values = np.concatenate([np.full(45, its_own), others])
        found = epistemic.similar_images_quantile(np.full(50, 0.99), np.full(1045, 0.99), values, own)
        assert found == pytest.approx(most, abs=1e-4)


def accused(classes: int, accuracy: float, images: int, seed: int) -> tuple[float, float]:
    """Shares of correct labels that are accused: of all, and where the ensemble predicts nine labels of ten.

    Classes are Gaussian, the ensemble's probabilities those of Bayes: as good as can be, and calibrated.
    """
    dim = max(6, classes)
    centres = np.eye(classes, dim)

    def draw(separation: float, count: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        label = rng.integers(0, classes, count)
        z = separation * centres[label] + rng.normal(size=(count, dim))
        logits = separation * z @ centres.T
        probs = np.exp(logits - logits.max(1, keepdims=True))
        return label, z, probs / probs.sum(1, keepdims=True)

    low, high = 0.1, 20.0
    for _ in range(20):
        separation = (low + high) / 2
        label, _, probs = draw(separation, 10_000, np.random.default_rng(9))
        low, high = (separation, high) if (probs.argmax(1) == label).mean() < accuracy else (low, separation)
    label, z, probs = draw(separation, images, np.random.default_rng(seed))
    source = probs.argmax(1)
    scores, _, ordinary = suspicion.score_classes(probs, z, label, source)
    wrong = suspicion.suspicions(scores, label, ordinary) > 0.5
    agreement = pair_agreement(label, source, classes)[label, source]
    trusted = wrong & (agreement >= MIN_AGREEMENT) & ((label == source).mean() >= MIN_AGREEMENT)
    return float(wrong.mean()), float(trusted.mean())


@pytest.mark.parametrize("classes", [2, 4])
def test_correct_labels_are_accused_only_below_the_agreement_asked_for(classes: int) -> None:
    bad = [accused(classes, 0.7, 2000, seed) for seed in range(3)]
    assert np.mean([share for share, _ in bad]) > 0.005 and max(trusted for _, trusted in bad) == 0
    good = [accused(classes, accuracy, 2000, seed)[1] for accuracy in (0.91, 0.95, 0.98) for seed in range(5)]
    assert np.mean(good) <= 0.001
