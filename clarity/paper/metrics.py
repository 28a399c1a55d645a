"""The metrics of the comparison: each a pure function of images, features or probabilities, and their intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.special import entr
from sklearn.neighbors import NearestNeighbors

from clarity.findings.statistics import share_interval
from clarity.judges import predict_features, predict_probs, probs_of_features
from clarity.paper.evaluators import Judges, reconstruct

#: Neighbours over which implausibility averages, and pixels that count as moved.
NEIGHBOURS = 5
MOVED = 0.1
#: A Frechet distance of fewer images on either side is noise, and null.
FRECHET_MINIMUM = 500
#: Pieces in which COUT swaps the pixels.
COUT_STEPS = 20

#: What each metric of a summary says; all but the last are means over (image, target) pairs.
METRICS_DOC = {
    "strict_validity": "share of requested pairs whose mean target probability exceeds min_target_prob at the end",
    "argmax_validity": "share of pairs whose own classifier (mean over its members) sees the target in the result",
    "oracle_agreement": "share of pairs on which the independent image oracle sees the target",
    "reencoded_agreement": "share of pairs on which the latent ensemble sees the target after decode, 8 bits, encode",
    "im1": "squared error of the target class's autoencoder over that of the source class's; below 1 is good",
    "im2": "squared difference of the target class's and the common autoencoder, over the L1 norm of the image",
    "implausibility": f"mean distance to the {NEIGHBOURS} nearest real images of the target, in oracle features",
    "cout": "area under p(target) minus area under p(source) while pixels are swapped in, by the oracle; -1 to 1",
    "l1_x": "sum over pixels of |x_cf - x|",
    "l2_x": "root of the sum over pixels of (x_cf - x)^2",
    "l1_reconstruction": "sum over pixels of |x_cf - reconstruction|",
    "l2_reconstruction": "root of the sum over pixels of (x_cf - reconstruction)^2",
    "l1_z": "sum over the code of |z_cf - z|",
    "sparsity": f"share of pixels that moved by more than {MOVED} from the reconstruction",
    "label_variation": "mean Jensen-Shannon divergence of the other attributes between x and x_cf, in nats",
    "predictive_initial": "predictive uncertainty at the start, own classifier, in nats",
    "predictive_final": "predictive uncertainty at the end, in nats",
    "aleatoric_initial": "aleatoric uncertainty at the start, in nats",
    "aleatoric_final": "aleatoric uncertainty at the end, in nats",
    "epistemic_initial": "epistemic uncertainty at the start, in nats; null for a single classifier",
    "epistemic_final": "epistemic uncertainty at the end, in nats; null for a single classifier",
    "steps": "updates applied",
    "gradient_evaluations": "gradients of one classifier: steps times members",
    "frechet_distance": f"between oracle features of results and of other real images; null under {FRECHET_MINIMUM}",
}

#: Columns of attributes that changed sides are named with this before the attribute.
FLIP = "flip_"

Array = np.ndarray


def l1(a: Array, b: Array) -> Array:
    """Sum of |a - b| over everything but the rows, (B,) float64."""
    return np.abs(np.asarray(a, dtype=np.float64) - b).reshape(len(a), -1).sum(axis=1)


def l2(a: Array, b: Array) -> Array:
    """Euclidean norm of a - b over everything but the rows, (B,) float64."""
    return np.sqrt(((np.asarray(a, dtype=np.float64) - b) ** 2).reshape(len(a), -1).sum(axis=1))


def sparsity(x_cf: Array, reconstruction: Array) -> Array:
    """Share of pixels (B,) that moved by more than MOVED from the reconstruction, in the channel that moved most."""
    return (np.abs(x_cf - reconstruction).max(axis=1) > MOVED).mean(axis=(1, 2))


def im1(x_cf: Array, by_target: Array, by_source: Array) -> Array:
    """IM1 (Van Looveren and Klaise 2021): ||x' - AE_target(x')||^2 / (||x' - AE_source(x')||^2 + 1e-7), (B,)."""
    return l2(x_cf, by_target) ** 2 / (l2(x_cf, by_source) ** 2 + 1e-7)


def im2(x_cf: Array, by_target: Array, by_all: Array) -> Array:
    """IM2 (Van Looveren and Klaise 2021): ||AE_target(x') - AE_all(x')||^2 / (||x'||_1 + 1e-7), (B,)."""
    return l2(by_target, by_all) ** 2 / (l1(x_cf, np.zeros_like(x_cf)) + 1e-7)


def implausibility(features: Array, real: Array, neighbours: int = NEIGHBOURS) -> Array:
    """Mean distance (B,) of each row's features (B, F) to its nearest ``neighbours`` of ``real`` (N, F); else NaN."""
    if len(real) < neighbours:
        return np.full(len(features), np.nan)
    nearest = NearestNeighbors(n_neighbors=neighbours, algorithm="brute").fit(real.astype(np.float64))
    return nearest.kneighbors(features.astype(np.float64))[0].mean(axis=1)


def cout(
    x: Array, x_cf: Array, source: Array, target: Array, predict: Callable[[Array], Array], steps: int = COUT_STEPS
) -> Array:
    """COUT (Khorram and Fuxin 2022), (B,) in [-1, 1]: area under p(target) minus area under p(source).

    The pixels of x (all channels of a pixel at once) are swapped for those of x_cf in ``steps`` equal pieces, the
    largest |difference| first, ties by position; areas by the trapezoid rule.
    """
    rows, pixels = np.arange(len(x)), x.shape[2] * x.shape[3]
    order = np.argsort(-np.abs(x_cf - x).sum(axis=1).reshape(len(x), -1), axis=1, kind="stable")
    rank = order.argsort(axis=1).reshape(len(x), 1, *x.shape[2:])
    area = np.zeros(len(x))
    for step in range(steps + 1):
        probs = predict(np.where(rank < round(pixels * step / steps), x_cf, x)).astype(np.float64)
        weight = 0.5 if step in (0, steps) else 1.0
        area += weight * (probs[rows, target] - probs[rows, source]) / steps
    return area


def jensen_shannon(p: Array, q: Array) -> Array:
    """Jensen-Shannon divergence in nats of Bernoulli distributions with probabilities p and q, any shape."""
    p, q = p.astype(np.float64), q.astype(np.float64)

    def entropy(prob: Array) -> Array:
        return entr(prob) + entr(1 - prob)

    return np.maximum(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, 0)


def frechet_distance(a: Array, b: Array) -> float | None:
    """Squared Frechet distance of the Gaussians with the moments of features a (N, F) and b (N', F).

    ||mean_a - mean_b||^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)) (Heusel et al. 2017, Eq. 6). None for a side
    with fewer than FRECHET_MINIMUM rows.
    """
    if min(len(a), len(b)) < FRECHET_MINIMUM:
        return None
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    # The root's trace through a symmetric matrix with the same eigenvalues: nothing complex, and no division.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(max(distance, 0.0))


def clustered_mean(values: Array, groups: Array) -> tuple[float, float, float]:
    """Mean of ``values`` (N,) without NaNs and its 95 % interval, by the variance between groups (images).

    The pairs of one image are not independent, so the variance is that of the groups' sums of deviations.
    """
    mean, variance, _, _ = by_group(values, groups)
    margin = 1.96 * math.sqrt(variance)
    return mean, mean - margin, mean + margin


def clustered_share(values: Array, groups: Array) -> tuple[float, float, float]:
    """A share of 0 and 1 in ``values`` (N,), and its exact interval on the effective number of observations.

    That is N divided by the design effect of the groups (images), whose rows are not independent; the number of groups
    where nothing varies.
    """
    share, variance, count, number = by_group(values, groups)
    effective = min(share * (1 - share) / variance, count) if variance > 0 else number
    return share, *share_interval(share * effective, effective)


def by_group(values: Array, groups: Array) -> tuple[float, float, int, int]:
    """Mean of the values that are no NaN, its variance between groups, and the numbers of values and of groups."""
    known = ~np.isnan(values)
    values, index = values[known], np.unique(np.asarray(groups)[known], return_inverse=True)[1]
    if not len(values):
        return math.nan, math.nan, 0, 0
    number, mean = int(index.max()) + 1, float(values.mean())
    sums = np.bincount(index, weights=values - mean)
    return mean, float((sums**2).sum() / len(values) ** 2 * number / max(number - 1, 1)), len(values), number


@dataclass(frozen=True)
class Reality:
    """Real training images of each class, in two disjoint halves: K entries each, in the order of the classes.

    Implausibility and Frechet distances compare with the ``features`` (n, F) of one half; the control row draws its
    random real images from the other's ``images`` (n, C, H, W) uint8.
    """

    features: Sequence[Array]
    images: Sequence[Array]


def split_reality(judges: Judges, images: Array, labels: Array) -> Reality:
    """Split real images (N, C, H, W) uint8 of each class by turns: even ones to compare with, odd ones to draw."""
    rows = [np.flatnonzero(np.asarray(labels) == k) for k in range(len(judges.class_names))]
    features = [
        predict_features(judges.oracle, images[chosen[::2]]) if len(chosen) else np.zeros((0, 1)) for chosen in rows
    ]
    return Reality(features, [images[chosen[1::2]] for chosen in rows])


def judge_images(
    judges: Judges,
    real: Reality,
    x: Array,
    reconstruction: Array,
    x_cf: Array,
    source: Array,
    target: Array,
    other_attributes: Array,
    swapped: Array,
) -> dict[str, Array]:
    """Everything that depends on images and judges alone, one entry a row; ``features`` (B, F) come along.

    Originals, their reconstructions and the results are (B, C, H, W) uint8; ``source`` (B,) is what the classifier
    under test sees in x. COUT is taken for ``swapped`` (B,) rows only, as it costs twenty times the rest.
    """
    originals, drawn, results = (np.asarray(image, dtype=np.float32) / 255 for image in (x, reconstruction, x_cf))
    source, target = np.asarray(source, dtype=np.int64), np.asarray(target, dtype=np.int64)
    rows = np.arange(len(target))
    features = predict_features(judges.oracle, results)
    probs = probs_of_features(judges.oracle, features)
    by_target = reconstruct(judges.autoencoders, target, results)
    by_source = reconstruct(judges.autoencoders, source, results)
    by_all = reconstruct(judges.autoencoders, np.full(len(rows), len(judges.class_names)), results)
    far, swap = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    where = np.flatnonzero(swapped)
    if len(where):
        predict = partial(predict_probs, judges.oracle)
        swap[where] = cout(originals[where], results[where], source[where], target[where], predict)
    for k in np.unique(target):
        far[target == k] = implausibility(features[target == k], real.features[int(k)])
    out = {
        "oracle_class": probs.argmax(axis=1),
        "oracle_target_prob": probs[rows, target],
        "oracle_agreement": (probs.argmax(axis=1) == target).astype(np.float64),
        "im1": im1(results, by_target, by_source),
        "im2": im2(results, by_target, by_all),
        "implausibility": far,
        "cout": swap,
        "l1_x": l1(results, originals),
        "l2_x": l2(results, originals),
        "l1_reconstruction": l1(results, drawn),
        "l2_reconstruction": l2(results, drawn),
        "sparsity": sparsity(results, drawn),
        "features": features,
    }
    if judges.attribute_net is not None:
        before = predict_probs(judges.attribute_net, originals, sigmoid=True)
        after = predict_probs(judges.attribute_net, results, sigmoid=True)
        out["label_variation"] = jensen_shannon(before, after)[:, other_attributes].mean(axis=1)
        flips = (before > 0.5) != (after > 0.5)
        out |= {f"{FLIP}{name}": flips[:, a].astype(np.float64) for a, name in enumerate(judges.attributes)}
    return out


def monotonicity(curves: Array) -> Array:
    """Net rise over total variation of each curve (..., T): 1 where it only rises, lower the more it turns back."""
    moves = np.diff(np.asarray(curves, dtype=np.float64), axis=-1)
    return moves.sum(axis=-1) / np.maximum(np.abs(moves).sum(axis=-1), 1e-12)


def plateau_width(curves: Array, margin: float = 0.01) -> Array:
    """Share of each probability curve (..., T) that lies within ``margin`` of 0 or 1: the paper's plateau effect."""
    curves = np.asarray(curves)
    return ((curves < margin) | (curves > 1 - margin)).mean(axis=-1)


def steepest(curves: Array) -> Array:
    """Largest slope of each curve (..., T) over t in [0, 1]."""
    curves = np.asarray(curves, dtype=np.float64)
    return np.abs(np.diff(curves, axis=-1)).max(axis=-1) * (curves.shape[-1] - 1)


def gradient_spread(gradients: Array) -> dict[str, float]:
    """How the gradients (M, B, D) of two or more members differ: ``noise_to_signal``, and ``mean_cosine`` of two.

    noise_to_signal is the variance of one member's gradient over members, summed over D, over the squared norm of
    their mean without its own share of noise; its median over rows, since a row at rest has no signal.
    """
    gradients = np.asarray(gradients, dtype=np.float64)
    members = len(gradients)
    mean = gradients.mean(axis=0)
    variance = gradients.var(axis=0, ddof=1).sum(axis=-1)
    signal = np.maximum((mean**2).sum(axis=-1) - variance / members, 1e-300)
    units = gradients / np.maximum(np.linalg.norm(gradients, axis=-1, keepdims=True), 1e-300)
    cosine = ((units.sum(axis=0) ** 2).sum(axis=-1) - members) / (members * (members - 1))
    return {"noise_to_signal": float(np.median(variance / signal)), "mean_cosine": float(cosine.mean())}
