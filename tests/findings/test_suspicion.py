"""Suspicious labels: wrong ones come first, right ones are not accused, and the work is bounded."""

import numpy as np
import pyarrow as pa
import pytest
from audits import Planted, make_tables, replaced

from clarity import schema
from clarity.audit.queries import connect
from clarity.findings import suspicion
from clarity.findings.suspicion import suspicious_labels


def test_suspicious_labels_ranks_the_wrong_labels_first() -> None:
    tables = make_tables(400, planted=Planted(wrong_labels=7))
    ranked = suspicious_labels(connect(tables.codes, tables.counterfactuals))
    assert set(ranked["image_id"].to_pylist()[:7]) == set(tables.wrong_labels)
    scores = ranked["suspicion"].to_numpy()
    assert scores[:7].min() > 0.5 > scores[7:].max() and ranked.num_rows == 400


def overlapping_classes(flips: float, swap: bool, seed: int = 0) -> tuple[pa.Table, np.ndarray]:
    """Codes of four classes that overlap, seen by an ensemble that errs now and then; which labels are wrong."""
    rng = np.random.default_rng(seed)
    centres = np.array([[0.0, 0, 0], [3.6, 0, 0], [0, 5, 0], [0, 5, 4.2]])
    true = rng.integers(0, 4, 4000)
    z = centres[true] + rng.normal(0, 1, (4000, 3))
    # It is sure of too little, and its mistakes are its own: what it sees of a picture is not quite what the code says.
    logits = -0.15 * ((z[:, None] + rng.normal(0, 0.6, (4000, 1, 3)) - centres) ** 2).sum(-1)
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    wrong = rng.permutation(4000)[: int(4000 * flips)]
    label = true.copy()
    label[wrong] = (true[wrong] ^ 1) if swap else (true[wrong] + rng.integers(1, 4, len(wrong))) % 4
    table = pa.table(
        {
            "image_id": [f"{i:05d}" for i in range(4000)],
            "label": label.astype(np.int32),
            "source": probs.argmax(1).astype(np.int32),
            "probs": schema.fixed_size_list(probs.astype(np.float32)),
            "z": schema.fixed_size_list(z.astype(np.float32)),
            "status": ["ok"] * 4000,
        }
    )
    return table, np.isin(np.arange(4000), wrong)


NO_PAIRS = schema.counterfactuals_schema(3).empty_table()


def average_precision(found: np.ndarray) -> float:
    """Mean of the precisions at the places where something wrong is."""
    return float((found.cumsum() / np.arange(1, len(found) + 1))[found].mean())


@pytest.mark.parametrize("swap", [False, True], ids=["random", "swapped"])
def test_suspicious_labels_ranks_better_than_the_labels_probability(swap: bool) -> None:
    codes, wrong = overlapping_classes(0.02, swap)
    ranked = suspicious_labels(connect(codes, NO_PAIRS))
    place = np.array([int(image_id) for image_id in ranked["image_id"].to_pylist()])
    by_probability = wrong[place][np.argsort(ranked["label_prob"].to_numpy(), kind="stable")]
    assert average_precision(wrong[place]) > average_precision(by_probability) + 0.02
    flagged = wrong[place][ranked["suspicion"].to_numpy() > 0.5]
    assert flagged.mean() > 0.75 and len(flagged) > 20


def test_suspicious_labels_accuses_nobody_where_labels_are_right() -> None:
    ranked = suspicious_labels(connect(overlapping_classes(0.0, False)[0], NO_PAIRS))
    assert (ranked["suspicion"].to_numpy() > 0.5).sum() <= 4


def test_suspicious_labels_asks_a_bounded_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, wrong = overlapping_classes(0.02, True)
    monkeypatch.setattr(suspicion, "MAX_SCORED", 1200)
    monkeypatch.setattr(suspicion, "MAX_VOTERS", 2000)
    ranked = suspicious_labels(connect(codes, NO_PAIRS))
    assert ranked["neighbours"].null_count == 4000 - 1200
    place = np.array([int(image_id) for image_id in ranked["image_id"].to_pylist()])
    assert wrong[place][: wrong.sum()].mean() > 0.5


def test_suspicious_labels_leaves_out_what_has_no_label() -> None:
    tables = make_tables(40, planted=Planted(unreadable=2))
    labels = tables.codes["label"].to_pylist()
    for known, count in (([None] * 5 + labels[5:], 33), ([None] * 40, 0)):
        tables = replaced(tables, "codes", "label", pa.array(known, pa.int32()))
        assert suspicious_labels(connect(tables.codes, tables.counterfactuals)).num_rows == count


def test_suspicious_labels_takes_codes_that_are_not_finite() -> None:
    tables = make_tables(40, planted=Planted(wrong_labels=3))
    z = schema.matrix(tables.codes["z"]).copy()
    z[7], z[8] = np.nan, np.inf
    tables = replaced(tables, "codes", "z", schema.fixed_size_list(z))
    ranked = suspicious_labels(connect(tables.codes, tables.counterfactuals))
    assert set(ranked["image_id"].to_pylist()[:3]) == set(tables.wrong_labels)
    assert np.isfinite(ranked["suspicion"].to_numpy()).all()
