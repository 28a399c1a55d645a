"""What an audit says: each planted fact is told with its figures, a clean audit tells none of them, queries run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from audits import Planted, Tables, make_tables

from clarity import findings, schema
from clarity.audit.queries import connect

ALARMS = {"unread", "shortcut", "labels", "epistemic", "reencoding", "unconverged", "asymmetry", "edge", "predictions"}


def told(tables: Tables, **others: Any) -> dict[str, findings.Finding]:
    con = connect(tables.codes, tables.counterfactuals, **others)
    source, target = (tables.counterfactuals[name].to_numpy() for name in ("source", "target"))
    differences = findings.mean_differences(tables.before, tables.after, source, target, len(tables.class_names))
    found, quiet = findings.find(findings.gather(con, tables.class_names, tables.config(), differences))
    assert [finding.severity for finding in found] == sorted((f.severity for f in found), reverse=True)
    assert not {finding.kind for finding in found} & {kind for kind, _ in quiet}
    return {finding.kind: finding for finding in reversed(found)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_classes", [2, 7])
def test_find_is_quiet_on_a_clean_audit(channels: int, num_classes: int) -> None:
    names = tuple("abcdefg"[:num_classes])
    assert not set(told(make_tables(200, names, (channels, 8, 12)))) & ALARMS


def test_find_names_a_hard_pair_and_its_failures() -> None:
    found = told(make_tables(planted=Planted(hard=(1, 3))))
    assert found["hardest"].pairs[0] == (1, 3)
    assert "bee → dog asks for the largest change" in found["hardest"].sentence
    assert found["unconverged"].pairs == ((1, 3),)
    # Thirty pairs of bee → dog, every fifth of which fails.
    assert "6 of 360 pairs (1.7 %) did not reach a target probability of 0.99 within 500 steps" in (
        found["unconverged"].sentence
    )
    assert all(target == 3 for _, target in found["unconverged"].examples)


def test_find_calls_the_pair_that_mostly_fails_hardest() -> None:
    tables = make_tables()
    fails = (tables.counterfactuals["source"].to_numpy() == 2) & (tables.counterfactuals["target"].to_numpy() == 0)
    place = tables.counterfactuals.column_names.index("converged")
    tables.counterfactuals = tables.counterfactuals.set_column(place, "converged", pa.array(~fails))
    finding = told(tables)["hardest"]
    assert finding.pairs[0] == (2, 0) and finding.level == "alert"


def test_find_tells_which_way_is_harder() -> None:
    finding = told(make_tables(planted=Planted(asymmetry=(0, 2))))["asymmetry"]
    assert finding.pairs[:2] == ((0, 2), (2, 0))
    assert finding.figures["ratio"] == pytest.approx(3, rel=0.15)
    assert "cow → ant is easy" in finding.sentence and "ant → cow is hard" in finding.sentence


def test_find_tells_that_one_way_fails() -> None:
    tables = make_tables()
    source, target = (tables.counterfactuals[name].to_numpy() for name in ("source", "target"))
    fails = (source == 0) & (target == 3) & (np.arange(len(source)) % 2 == 0)
    place = tables.counterfactuals.column_names.index("converged")
    tables.counterfactuals = tables.counterfactuals.set_column(place, "converged", pa.array(~fails))
    finding = told(tables)["asymmetry"]
    assert finding.pairs[0] == (0, 3) and "dog → ant converges in 100 % of its pairs" in finding.sentence


def test_find_calls_no_way_harder_that_may_be_so_by_chance() -> None:
    tables = make_tables(60)
    source, target = (tables.counterfactuals[name].to_numpy() for name in ("source", "target"))
    pair = np.flatnonzero((source == 0) & (target == 3))
    assert len(pair) == 15
    converged = np.ones(len(source), bool)
    converged[pair[:3]] = False
    place = tables.counterfactuals.column_names.index("converged")
    tables.counterfactuals = tables.counterfactuals.set_column(place, "converged", pa.array(converged))
    assert "asymmetry" not in told(tables)


def test_find_lists_the_images_on_the_edge() -> None:
    tables = make_tables(planted=Planted(edge=5))
    finding = told(tables)["edge"]
    assert finding.figures["images"] == 5
    assert {image_id for image_id, _ in finding.examples} == set(tables.edge)


def test_find_tells_where_epistemic_uncertainty_rises() -> None:
    finding = told(make_tables(planted=Planted(rising=2)))["epistemic"]
    assert finding.pairs[0][1] == 2 and "cow (100 %)" in finding.sentence and finding.figures["targets"] == 1


def test_find_says_nothing_of_epistemic_uncertainty_that_is_not_there() -> None:
    tables = make_tables(planted=Planted(rising=2))
    place = tables.counterfactuals.column_names.index("epistemic_final")
    none = pa.nulls(tables.counterfactuals.num_rows, pa.float32())
    tables.counterfactuals = tables.counterfactuals.set_column(place, "epistemic_final", none)
    assert "epistemic" not in told(tables)


def test_find_tells_what_does_not_survive_encoding() -> None:
    finding = told(make_tables(planted=Planted(lost=1)))["reencoding"]
    assert finding.figures["share"] == pytest.approx(0.25) and {target for _, target in finding.pairs} == {1}


def test_find_counts_what_was_not_read_or_not_finite() -> None:
    tables = make_tables(planted=Planted(unreadable=3, nonfinite=2))
    con = connect(tables.codes, tables.counterfactuals)
    found, _ = findings.find(findings.gather(con, tables.class_names, tables.config()))
    sentences = [finding.sentence for finding in found if finding.kind == "unread"]
    assert any("3 of 120 images (2.5 %) were not explained: “truncated PNG” (3)" in s for s in sentences)
    assert any(s.startswith("2 of ") and "'nonfinite'" in s for s in sentences)


def test_find_compares_with_the_predictions_handed_in() -> None:
    finding = told(make_tables(planted=Planted(prediction_errors=9)))["predictions"]
    assert finding.figures["agreement"] == pytest.approx(111 / 120) and len(finding.examples) == 9
    assert "Of 9 labelled images where the two differ, the label is your model's class in 0, the ensemble's in 9" in (
        finding.sentence
    )
    whole = told(make_tables(planted=Planted(prediction_errors=0)))["predictions"]
    assert whole.level == "fact" and "(100 %)" in whole.sentence and "Least agreement" not in whole.sentence


def test_find_tells_which_attribute_drifts() -> None:
    tables = make_tables()
    pairs = tables.counterfactuals.select(["image_id", "target"])
    moved = (pairs["target"].to_numpy() == 1) * 0.6
    parts = [
        pairs.append_column("attribute", pa.array([name] * len(pairs)))
        .append_column("prob_initial", pa.array(np.full(len(pairs), 0.2)))
        .append_column("prob_final", pa.array(0.2 + moved * drifts))
        for name, drifts in (("smiling", 1), ("glasses", 0))
    ]
    finding = told(tables, attributes=pa.concat_tables(parts))["attributes"]
    assert "“smiling”" in finding.sentence and "+0.60" in finding.sentence and "100 % of 30 pairs" in finding.sentence
    assert {target for _, target in finding.pairs} == {1} and "glasses" not in finding.sentence


@pytest.mark.parametrize("channels", [1, 3])
def test_shortcuts_name_a_patch(channels: int) -> None:
    finding = told(make_tables(240, image_shape=(channels, 8, 12), planted=Planted(patch=3)))["shortcut"]
    assert finding.figures["target"] == 3 and finding.figures["shape"] == "patch"
    assert finding.figures["box"] == [0, 2, 0, 2] and "at the top-left" in finding.sentence


@pytest.mark.parametrize("channels", [1, 3])
def test_shortcuts_name_a_tint(channels: int) -> None:
    finding = told(make_tables(240, image_shape=(channels, 8, 12), planted=Planted(tint=1)))["shortcut"]
    assert finding.figures["target"] == 1 and finding.figures["shape"] == "tint"
    assert finding.figures["tint"][0] == pytest.approx(0.25, abs=0.05)


def test_mean_differences_are_those_of_a_loop() -> None:
    tables = make_tables(40, image_shape=(3, 8, 12))
    source, target = (tables.counterfactuals[name].to_numpy() for name in ("source", "target"))
    found = findings.mean_differences(tables.before, tables.after, source, target, 4)
    change = tables.after - tables.before
    for s in range(4):
        for t in range(4):
            rows = (source == s) & (target == t)
            assert found.count[s, t] == rows.sum()
            if rows.any():
                np.testing.assert_allclose(found.mean[s, t], change[rows].mean(0), atol=1e-6)
    np.testing.assert_allclose(found.target_std[2], change[target == 2].std(0), atol=1e-6)


def test_label_suspicion_ranks_the_wrong_labels_first() -> None:
    tables = make_tables(400, planted=Planted(wrong_labels=7))
    ranked = findings.label_suspicion(tables.codes, tables.counterfactuals)
    assert set(ranked["image_id"].to_pylist()[:7]) == set(tables.wrong_labels)
    suspicion = ranked["suspicion"].to_numpy()
    assert suspicion[:7].min() > 0.5 > suspicion[7:].max() and ranked.num_rows == 400


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
def test_label_suspicion_ranks_better_than_the_labels_probability(swap: bool) -> None:
    codes, wrong = overlapping_classes(0.02, swap)
    ranked = findings.label_suspicion(codes, NO_PAIRS)
    place = np.array([int(image_id) for image_id in ranked["image_id"].to_pylist()])
    by_probability = wrong[place][np.argsort(ranked["label_prob"].to_numpy(), kind="stable")]
    assert average_precision(wrong[place]) > average_precision(by_probability) + 0.02
    flagged = wrong[place][ranked["suspicion"].to_numpy() > 0.5]
    assert flagged.mean() > 0.75 and len(flagged) > 20


def test_label_suspicion_accuses_nobody_where_labels_are_right() -> None:
    ranked = findings.label_suspicion(overlapping_classes(0.0, False)[0], NO_PAIRS)
    assert (ranked["suspicion"].to_numpy() > 0.5).sum() <= 4


def test_label_suspicion_asks_a_bounded_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, wrong = overlapping_classes(0.02, True)
    monkeypatch.setattr(findings, "MAX_ASKED", 1200)
    monkeypatch.setattr(findings, "MAX_VOTERS", 2000)
    ranked = findings.label_suspicion(codes, NO_PAIRS)
    assert ranked["neighbours"].null_count == 4000 - 1200
    place = np.array([int(image_id) for image_id in ranked["image_id"].to_pylist()])
    assert wrong[place][: wrong.sum()].mean() > 0.5


def test_label_suspicion_leaves_out_what_has_no_label() -> None:
    tables = make_tables(40, planted=Planted(unreadable=2))
    place = tables.codes.column_names.index("label")
    labels = [None if i < 5 else value for i, value in enumerate(tables.codes["label"].to_pylist())]
    codes = tables.codes.set_column(place, "label", pa.array(labels, pa.int32()))
    assert findings.label_suspicion(codes, tables.counterfactuals).num_rows == 33
    none = tables.codes.set_column(place, "label", pa.nulls(40, pa.int32()))
    assert findings.label_suspicion(none, tables.counterfactuals).num_rows == 0
