"""How likely each label of an audit is wrong.

Score = ensemble probability x k-NN label vote, then a mixture over class pairs: where the label is not the class with
the highest score, the question is whether the image is an ordinary member of that class, as a wrong label would leave
it, or an unusual one near the border, as a mistake of the ensemble is. The share of the class's own images with a
higher score for the label is uniform for wrong labels and leans to zero for mistakes; the weight of the two is each
class pair's own, so that labels which are often confused are found too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from clarity.schema import matrix

if TYPE_CHECKING:
    import duckdb

#: Nearest labelled images that vote on a label, and how many of a class stand for what is ordinary in it.
NEIGHBOURS = 20
ORDINARY = 500
#: Images that are scored, and images that vote, at most: a million images cost as much as sixty thousand.
MAX_SCORED = 20_000
MAX_VOTERS = 60_000


def suspicious_labels(con: duckdb.DuckDBPyConnection) -> pa.Table:
    """Ranks the labelled images of an audit, the most suspicious label first.

    The ensemble should not have been trained on these labels: explain held-out images, or by folds. ``neighbours`` is
    the share of the vote for the label, null where it was not taken; ``distance`` and ``steps`` are of the
    counterfactual towards the label, null where none was found.
    """
    table = con.sql(
        """
        SELECT image_id, label, class AS source, probs, z, distance_z_l1 AS distance, steps
        FROM codes JOIN ensemble USING (image_id) LEFT JOIN (
            SELECT image_id, target AS label, distance_z_l1, steps FROM counterfactuals WHERE converged
        ) USING (image_id, label)
        WHERE label IS NOT NULL ORDER BY image_id
        """
    ).to_arrow_table()
    label, source = table["label"].to_numpy(), table["source"].to_numpy()
    rows = np.arange(len(label))
    if len(label):
        probs, z = matrix(table["probs"]).astype(np.float64), matrix(table["z"])
        scores, votes, ordinary = score_classes(probs, z, label, source)
        suspicion = suspicions(scores, label, ordinary)
        label_prob, source_prob = probs[rows, label], probs[rows, source]
    else:
        suspicion, label_prob, source_prob, votes = np.zeros((4, 0))
    ranked = pa.table(
        {
            "image_id": table["image_id"],
            "label": table["label"],
            "source": table["source"],
            "suspicion": suspicion,
            "label_prob": label_prob,
            "source_prob": source_prob,
            "neighbours": pa.array(votes, mask=np.isnan(votes)),
            "distance": table["distance"],
            "steps": table["steps"],
        }
    )
    return ranked.take(pa.array(np.argsort(-suspicion, kind="stable")))


def score_classes(
    probs: np.ndarray, z: np.ndarray, label: np.ndarray, source: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ensemble probability x neighbours' vote, normalised (N, K); the vote for each label (N,); who is ordinary (N,).

    The vote, NaN elsewhere, is taken for labels of low probability and ORDINARY other images of each class.
    """
    rows, num_classes = np.arange(len(label)), probs.shape[1]
    # Not in the order of the ids, which may follow the classes.
    shuffled = np.random.default_rng(0).permutation(len(label))
    doubt = np.where(label == source, probs[rows, label], probs[rows, label] - 1)
    turn = np.empty(len(label), np.int64)
    order = shuffled[np.argsort(label[shuffled], kind="stable")]
    starts = np.searchsorted(label[order], np.arange(num_classes))
    turn[order] = rows - starts[label[order]]
    few = turn < max(NEIGHBOURS, min(ORDINARY, MAX_SCORED // (2 * num_classes)))
    scored = np.flatnonzero(few)
    rest = np.flatnonzero(~few & (doubt < 0.95))
    rest = rest[np.argsort(doubt[rest], kind="stable")][: max(0, MAX_SCORED - len(scored))]
    scored = np.sort(np.concatenate([scored, rest]))
    voters = np.sort(shuffled[:MAX_VOTERS])
    vote = neighbour_votes(z, label, scored, voters, num_classes)
    scores = probs.copy()
    scores[scored] *= vote + 0.5 / NEIGHBOURS
    voted = np.full(len(label), np.nan)
    voted[scored] = vote[np.arange(len(scored)), label[scored]]
    return scores / scores.sum(1, keepdims=True), voted, few


def neighbour_votes(
    z: np.ndarray, label: np.ndarray, scored: np.ndarray, voters: np.ndarray, num_classes: int
) -> np.ndarray:
    """Shares (B, K) of labels among the voters nearest to each scored image, without itself; nearer ones weigh more."""
    from sklearn.neighbors import NearestNeighbors  # half a second to import

    votes = np.zeros((len(scored), num_classes))
    if len(voters) < 2:
        return votes
    finite = np.where(np.isfinite(z), z, 0)  # which scikit-learn asks for
    count = min(NEIGHBOURS, len(voters) - 1)
    search = NearestNeighbors(n_neighbors=count + 1, algorithm="brute").fit(finite[voters])
    distance, nearest = search.kneighbors(finite[scored])
    left_out = voters[nearest] == scored[:, None]
    left_out[~left_out.any(1), -1] = True
    squared, nearest = distance[~left_out].reshape(-1, count) ** 2, nearest[~left_out].reshape(-1, count)
    weight = np.exp(-squared / np.maximum(np.median(squared, 1, keepdims=True), 1e-12))
    np.add.at(votes, (np.arange(len(scored))[:, None], label[voters[nearest]]), weight)
    return votes / votes.sum(1, keepdims=True)


def suspicions(scores: np.ndarray, label: np.ndarray, compared: np.ndarray) -> np.ndarray:
    """How likely each label is wrong (N,), from the scores (N, K); ``compared`` (N,): with which images."""
    rows, num_classes = np.arange(len(label)), scores.shape[1]
    log = np.log(scores + 1e-12)
    seen = log.argmax(1)
    rival = log.copy()
    rival[rows, label] = -np.inf
    against = rival.max(1) - log[rows, label]
    evidence = np.full(len(label), -12.0)
    doubted = np.flatnonzero(seen != label)
    if len(doubted):
        pairs = seen[doubted] * num_classes + label[doubted]
        ordinary = np.full(len(doubted), 0.5)
        for pair in np.unique(pairs):
            other, given = divmod(int(pair), num_classes)
            mine = np.flatnonzero(pairs == pair)
            own = np.sort(-log[compared & (seen == other) & (label == other), given])
            below = np.searchsorted(own, -log[doubted[mine], given])
            ordinary[mine] = (below + 0.5) / (len(own) + 1)
        wrong = wrong_probabilities(ordinary, pairs, num_classes**2)
        evidence[doubted] = np.log(wrong + 1e-5) - np.log(1 - wrong + 1e-5)
        # Of two equally ordinary images, the one whose label has the lower score.
        evidence += 0.25 * (against - np.median(against[doubted]))
    return 1 / (1 + np.exp(-evidence))


def wrong_probabilities(ordinary: np.ndarray, pair: np.ndarray, num_pairs: int) -> np.ndarray:
    """Probabilities (B,) that values in (0, 1) are drawn uniformly rather than from a Beta(a, 4), by EM.

    The uniform share, at least one in twenty, is each class pair's own, drawn to that of all as by five more images.
    """
    low, high = np.log(ordinary), np.log1p(-ordinary)
    counts = np.bincount(pair, minlength=num_pairs)
    share = np.full(num_pairs, 0.3)
    a, wrong = 0.3, np.full(len(ordinary), 0.3)
    for _ in range(100):
        # Beta(a, 4): its density vanishes at one, so that what is most ordinary is never a mistake.
        norm = math.log(a * (a + 1) * (a + 2) * (a + 3) / 6)
        mistake = np.exp(norm + (a - 1) * low + 3 * high)
        wrong = share[pair] / (share[pair] + (1 - share[pair]) * mistake)
        share = (np.bincount(pair, wrong, minlength=num_pairs) + 5 * max(wrong.mean(), 0.05)) / (counts + 5)
        weight = float((1 - wrong).sum())
        if weight < 1e-9:
            break
        # E[log u] = digamma(a) - digamma(a + 4) = -sum of 1 / (a + i), solved for a by halving.
        mean = float(((1 - wrong) * low).sum()) / weight
        smallest, largest = 1e-3, 1.0
        for _ in range(30):
            a = (smallest + largest) / 2
            if -sum(1 / (a + i) for i in range(4)) < mean:
                smallest = a
            else:
                largest = a
    return wrong
