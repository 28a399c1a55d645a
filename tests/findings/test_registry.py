"""What an audit says: each planted fact is told with its figures, a clean audit tells none of them, queries run."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from audits import SEARCHED, Planted, Tables, make_tables, model_card, replaced, with_predictor

from clarity.audit.queries import connect
from clarity.findings.differences import mean_differences
from clarity.findings.finding import Finding, gather, graded
from clarity.findings.registry import CHECKS, Results, find, lowered
from clarity.report.text import percent

ALARMS = {
    "unread",
    "shortcut",
    "labels",
    "epistemic",
    "judged",
    "reencoding",
    "unconverged",
    "asymmetry",
    "predictions",
    "confirmed",
    "fooled",
    "attributes",
}


def results_of(tables: Tables, differences: bool = True, **others: Any) -> Results:
    others = {name: value for name, value in others.items() if value is not None}
    facts = {name: others.pop(name) for name in ("trained_on_labels", "card", "thresholds") if name in others}
    con = connect(tables.codes, tables.counterfactuals, **others)
    converged, source, target = (tables.counterfactuals[name].to_numpy() for name in ("converged", "source", "target"))
    pairs = (each[converged] for each in (tables.before, tables.after, source, target))
    changes = mean_differences(*pairs, len(tables.class_names)) if converged.any() else None
    return find(gather(con, tables.class_names, differences=changes if differences else None, **{**SEARCHED, **facts}))


def failing(tables: Tables, *, source: int | None = None, target: int, every: int = 1, first: int = 10_000) -> Tables:
    """The tables in which the search fails for some pairs of a class pair, or of a target."""
    pairs = tables.counterfactuals
    mine = (pairs["target"].to_numpy() == target) & (True if source is None else pairs["source"].to_numpy() == source)
    converged = np.ones(len(pairs), bool)
    converged[np.flatnonzero(mine)[::every][:first]] = False
    return replaced(tables, "counterfactuals", "converged", converged)


def told(tables: Tables, **others: Any) -> dict[str, Finding]:
    results = results_of(tables, **others)
    found = results.findings
    assert [finding.severity for finding in found] == sorted((f.severity for f in found), reverse=True)
    assert all(finding.evidence.endswith(".") and finding.sentence.endswith(".") for finding in found)
    kinds = {"extremes" if finding.kind in ("hardest", "easiest") else finding.kind for finding in found}
    silent = {kind for kind, _ in results.clear + results.not_checked}
    assert not kinds & silent and kinds | silent >= CHECKS.keys() - {"shortcut"}
    return {finding.kind: finding for finding in reversed(found)}


def test_graded_gives_no_alert_for_a_share_of_few_images() -> None:
    # Of 40 images 8 are 20 %, with an interval from 9 to 36 %; of 400, from 16 to 24 %.
    assert graded(lambda share: 5 * share, 80, 400) == 1.0
    assert graded(lambda share: 5 * share, 8, 40) == 0.65
    assert graded(lambda share: 2 * share, 8, 40) == 0.4
    assert graded(lambda share: 5 * share, 0, 40) == 0.0


def test_find_calls_nothing_of_a_single_image_probably_wrong() -> None:
    for num_images, level in ((1, "look"), (90, "alert")):
        tables = with_predictor(make_tables(num_images))
        confirmed = pa.array(tables.counterfactuals["target"].to_numpy() != 3)
        tables = replaced(tables, "counterfactuals", "confirmed", confirmed)
        assert told(tables)["confirmed"].level == level


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_classes", [2, 7])
def test_find_is_quiet_on_a_clean_audit(channels: int, num_classes: int) -> None:
    names = tuple("abcdefg"[:num_classes])
    assert not set(told(make_tables(200, names, (channels, 8, 12)))) & ALARMS


def test_find_names_a_hard_pair_and_its_failures() -> None:
    found = told(make_tables(planted=Planted(hard=(1, 3))))
    assert found["hardest"].pairs[0] == (1, 3)
    assert "bee → dog has the largest median latent distance of 12 class pairs" in found["hardest"].sentence
    assert found["unconverged"].pairs == ((1, 3),)
    # Thirty pairs of bee → dog, every fifth of which fails.
    assert "6 of 360 pairs (1.7 %) did not reach a target probability of 0.99 within 500 steps" in (
        found["unconverged"].sentence
    )
    assert all(target == 3 for _, target in found["unconverged"].examples)
    by_class = told(make_tables(planted=Planted(hard=(1, 3))), thresholds=(0.676, 0.99))["unconverged"].sentence
    assert "did not reach a target probability of 0.68 to 0.99 (by class) within 500 steps" in by_class


def test_find_calls_failures_wrong_only_where_a_class_pair_mostly_fails() -> None:
    tables = make_tables()
    target, number = tables.counterfactuals["target"].to_numpy(), np.arange(len(tables.counterfactuals))
    for every, level in ((4, "look"), (1, "alert")):
        reached = pa.array((target != 3) | (number % every > 0))
        assert told(replaced(tables, "counterfactuals", "converged", reached))["unconverged"].level == level


def test_find_says_which_failures_are_out_of_reach_for_real_images_too() -> None:
    p90 = (0.99, 0.99, 0.99, 0.7)
    card = model_card(p90=p90)
    tables = failing(make_tables(), target=3)
    found = told(tables, card=card)["unconverged"]
    assert "All of these are towards classes out of reach (dog)" in found.sentence and found.level == "look"
    assert "--min-target-prob auto" in found.sentence
    # A long name is shortened on the page.
    short = replace(tables, class_names=("ant", "bee", "cow", "d…g"))
    assert "out of reach (d…g)" in told(short, card=card)["unconverged"].sentence
    useless = model_card((0.24,) * 4, p90=p90)
    assert "--min-target-prob" not in told(tables, card=useless)["unconverged"].sentence  # no-go: none helps
    assert told(tables)["unconverged"].level == "alert"
    by_class = told(tables, card=card, thresholds=(0.7, 0.99))["unconverged"].sentence
    assert "out of reach (dog)" in by_class and "--min-target-prob" not in by_class  # it was asked for
    low = told(tables, card=card, thresholds=(0.6, 0.6))["unconverged"]  # which a tenth of the real images exceeds
    assert "out of reach" not in low.sentence and low.level == "alert"


def test_find_names_the_pair_that_mostly_fails_beside_the_order() -> None:
    found = told(failing(make_tables(), source=2, target=0))
    assert found["unconverged"].pairs == ((2, 0),) and found["unconverged"].level == "alert"
    assert (2, 0) not in found["hardest"].pairs and found["hardest"].level == "fact"
    assert "more failures than successes: 1 class pair (cow → ant)" in found["hardest"].sentence


def test_more_than_three_class_pairs_are_said_to_be_examples() -> None:
    tables = make_tables()
    facts = gather(connect(tables.codes, tables.counterfactuals), tables.class_names, **SEARCHED)
    pairs = [(0, 1), (0, 2), (0, 3), (1, 0)]
    assert facts.arrows(pairs) == "such as ant → bee, ant → cow and ant → dog"
    assert facts.arrows(pairs[:3]) == "ant → bee, ant → cow and ant → dog"


def test_find_tells_which_way_is_harder() -> None:
    finding = told(make_tables(planted=Planted(asymmetry=(0, 2))))["asymmetry"]
    assert finding.pairs[:2] == ((0, 2), (2, 0))
    assert finding.figures["ratio"] == pytest.approx(3, rel=0.15)
    assert "cow → ant is easy" in finding.sentence and "ant → cow is hard" in finding.sentence


def test_find_tells_that_one_way_fails() -> None:
    finding = told(failing(make_tables(), source=0, target=3, every=2))["asymmetry"]
    assert finding.pairs[0] == (0, 3) and "dog → ant converges in 100 % of its pairs" in finding.sentence


def test_find_calls_no_way_harder_that_may_be_so_by_chance() -> None:
    assert "asymmetry" not in told(failing(make_tables(60), source=0, target=3, first=3))  # of fifteen


def test_find_tells_where_epistemic_uncertainty_rises() -> None:
    finding = told(make_tables(600, planted=Planted(rising=2)))["epistemic"]
    assert finding.pairs[0][1] == 2 and "same holds" not in finding.sentence and finding.figures["targets"] == 1


@pytest.mark.parametrize(("num_images", "level"), [(300, "look"), (900, "alert")])
def test_find_is_as_sure_of_rising_uncertainty_as_the_number_of_pairs_allows(num_images: int, level: str) -> None:
    tables = make_tables(num_images, planted=Planted(rising=2))
    final = tables.counterfactuals["epistemic_final"].to_numpy().copy()
    final[np.arange(len(final)) % 5 == 0] = 0.0
    tables = replaced(tables, "counterfactuals", "epistemic_final", pa.array(final))
    finding = told(tables)["epistemic"]
    assert finding.figures["share"] == pytest.approx(0.8, abs=0.01) and finding.level == level


def test_find_tells_what_does_not_survive_encoding() -> None:
    finding = told(make_tables(planted=Planted(lost=1)))["reencoding"]
    assert finding.figures["share"] == pytest.approx(0.25) and {target for _, target in finding.pairs} == {1}
    assert "reencoding" not in told(failing(make_tables(planted=Planted(lost=1)), target=1)), (
        "there is no target to lose"
    )


def test_find_tells_where_the_judge_does_not_see_the_target() -> None:
    tables = make_tables()
    source, target = (tables.counterfactuals[name].to_numpy() for name in ("source", "target"))
    seen = np.where(target == 2, np.where(np.arange(len(target)) % 3 == 0, source, 0), target)
    tables = replaced(tables, "counterfactuals", "judge_class", seen)
    finding = told(tables, card=model_card(judge=(0.95, 0.9)))["judged"]
    missed, same = ((seen != target), (seen != target) & (seen == source))
    assert finding.figures["share"] == pytest.approx(missed.mean()) and {pair[1] for pair in finding.pairs} == {2}
    assert f"{missed.sum()} of 360 counterfactuals" in finding.sentence
    as_before = f"in {percent(same.sum(), 360)} it sees the class that the ensemble predicts for the image; most often"
    assert f"{as_before} ant" in finding.sentence
    assert finding.sentence.endswith("Of the reconstructions of real images it recognises 90 %.")
    assert "judged" not in told(failing(tables, target=2)), "the others are seen as their targets"
    blind = replaced(tables, "counterfactuals", "judge_class", source)
    for accuracy, level in ((0.9, "alert"), (0.01, "look")):  # of a judge that misses as many real images
        assert told(blind, card=model_card(judge=(0.95, accuracy)))["judged"].level == level
    assert told(blind)["judged"].level == "look", "nothing is known of the judge"
    two = make_tables(class_names=("ant", "bee"))
    two = replaced(two, "counterfactuals", "judge_class", two.counterfactuals["source"].to_numpy())
    assert "counterfactuals (100 %); most often" in told(two)["judged"].sentence, "which other class is no question"


def test_find_counts_what_was_not_read_or_not_finite() -> None:
    tables = make_tables(planted=Planted(unreadable=3, nonfinite=2))
    found = results_of(tables, differences=False).findings
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
    assert whole.level == "fact" and "(100 %)" in whole.sentence and "Agreement is lowest" not in whole.sentence


def test_find_speaks_of_the_predictor_where_there_is_one() -> None:
    found = told(with_predictor(make_tables()))
    agree = found["predictions"]
    assert (
        agree.figures["agreement"] == pytest.approx(111 / 120) and "whose gradient leads the search" in agree.sentence
    )
    assert (
        "On 4 of 120 images (3.3 %) your model gives a target at least 0.5 in the reconstruction already:"
        in agree.sentence
    )
    # The example is the counterfactual towards the ensemble's class; towards the source there is none.
    assert {target for image_id, target in agree.examples if image_id == "img-00000"} == {1}
    confirmed = found["confirmed"]
    assert "your model does not see the target in 12 of 360 pictures (3.3 %)" in confirmed.sentence
    tables = with_predictor(make_tables())
    pairs = tables.counterfactuals
    seen = pa.array(np.full(len(pairs), 0.9), pairs.schema.field("prediction_target_prob_final").type)
    index = pairs.column_names.index("prediction_target_prob_final")
    tables = replace(tables, counterfactuals=pairs.set_column(index, "prediction_target_prob_final", seen))
    assert "searches the checks fail on 12 of 360 pictures" in told(tables)["confirmed"].sentence
    assert "cannot be flipped" not in confirmed.sentence and confirmed.figures["confirmed"] == 348
    assert confirmed.sentence.endswith("For 12 of these no step was left to search further.")
    further = replaced(tables, "counterfactuals", "rungs", np.full(len(pairs), 3, np.int32))
    assert "no step was left" not in told(further)["confirmed"].sentence
    assert "In 24 of 348 confirmed pictures (6.9 %)" in found["fooled"].sentence
    assert "your model sees the target and the held-out judge does not" in found["fooled"].sentence
    doubted = replaced(tables, "counterfactuals", "judge_class", pairs["source"].to_numpy())
    for accuracy, level in ((0.9, "alert"), (0.01, "look")):  # of a judge that misses as many real images
        assert told(doubted, card=model_card(judge=(0.95, accuracy)))["fooled"].level == level
    # The labels are those of the predictor's class, which the ensemble contradicts on nine images.
    assert found["labels"].figures["images"] == 9


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
def test_shortcuts_name_a_patch_and_a_tint(channels: int) -> None:
    tables = make_tables(240, image_shape=(channels, 8, 12), planted=Planted(patch=3))
    finding = told(tables)["shortcut"]
    assert (finding.figures["target"], finding.figures["shape"]) == (3, "patch")
    assert finding.figures["box"] == [0, 2, 0, 2] and "at the top-left" in finding.sentence
    finding = told(make_tables(240, image_shape=(channels, 8, 12), planted=Planted(tint=1)))["shortcut"]
    assert (finding.figures["target"], finding.figures["shape"]) == (1, "tint")
    assert finding.figures["tint"][0] == pytest.approx(0.25, abs=0.05)


def test_tint_that_real_images_do_not_have_is_a_fact() -> None:
    tables = make_tables(240)
    towards = tables.counterfactuals["target"].to_numpy() == 1
    tables.after[towards] = np.clip(tables.before[towards] + 0.3, 0, 1)
    found = told(tables)
    assert "shortcut" not in found and found["region"].figures["shape"] == "tint"
    assert found["region"].level == "fact" and "is such a shift" in found["region"].sentence


def tables_with_a_mark_written_in_part(images: int) -> Tables:
    tables = make_tables(images, image_shape=(1, 16, 16), planted=Planted(patch=3))
    towards = tables.counterfactuals["target"].to_numpy() == 3
    tables.after[towards, :, :2, :2] = np.random.default_rng(0).uniform(0, 0.9, (towards.sum(), 1, 1, 1))
    return tables


def test_mark_constant_in_real_images_is_a_shortcut_where_counterfactuals_write_it_in_part() -> None:
    found = told(tables_with_a_mark_written_in_part(240))["shortcut"]
    assert found.level == "alert" and found.figures["constant"] and found.figures["box"] == [0, 2, 0, 2]
    assert "Real images of dog vary little in it, as do the others." in found.sentence
    assert "regardless of the start" not in found.sentence


def test_few_images_tell_nothing_of_a_mark() -> None:
    assert not told(tables_with_a_mark_written_in_part(32)).keys() & {"shortcut", "region"}


def test_mean_differences_are_those_of_a_loop() -> None:
    tables = make_tables(40, image_shape=(3, 8, 12))
    source, target = (tables.counterfactuals[name].to_numpy() for name in ("source", "target"))
    found = mean_differences(tables.before, tables.after, source, target, 4)
    change = tables.after - tables.before
    for s in range(4):
        for t in range(4):
            rows = (source == s) & (target == t)
            assert found.count[s, t] == rows.sum()
            if rows.any():
                np.testing.assert_allclose(found.mean[s, t], change[rows].mean(0), atol=1e-6)
    np.testing.assert_allclose(found.target_std[2], change[target == 2].std(0), atol=1e-6)
    spreads = [tables.before[rows].std(0) for rows in (source == 2, target == 2)]
    np.testing.assert_allclose(found.real_std[2], np.maximum(*spreads), atol=1e-6)


def without(tables: Tables, table: str, column: str) -> Tables:
    """The tables with nothing in one column."""
    kind = getattr(tables, table)[column].type
    return replaced(tables, table, column, pa.nulls(len(getattr(tables, table)), kind))


def one_target(tables: Tables) -> Tables:
    keep = tables.counterfactuals["target"].to_numpy() == 1
    tables.counterfactuals = tables.counterfactuals.filter(pa.array(keep))
    tables.before, tables.after = tables.before[keep], tables.after[keep]
    return tables


def many_classes() -> Tables:
    return make_tables(240, tuple(f"class-{i}" for i in range(30)))


def nothing_converged() -> Tables:
    tables = make_tables()
    return replaced(tables, "counterfactuals", "converged", np.zeros(len(tables.counterfactuals), bool))


NOT_CHECKED: list[tuple[Callable[[], Tables], dict[str, Any], dict[str, str]]] = [
    (lambda: without(make_tables(), "codes", "label"), {}, {"labels": "no image has a label"}),
    (
        lambda: without(make_tables(), "counterfactuals", "epistemic_final"),
        {},
        {"epistemic": "a single classifier has no disagreement"},
    ),
    (
        lambda: one_target(make_tables(200)),
        {},
        {
            "asymmetry": "no two classes have 8 pairs in each direction",
            "fooled": "no predictor was asked",
            "judged": "no picture of a converged search was shown to a held-out judge",
            "confirmed": "no check of the written pictures",
            "predictions": "the audit has no predictions",
            "attributes": "the attributes of the pictures were not measured",
        },
    ),
    (nothing_converged, {}, {"epistemic": "no search converged", "reencoding": "no search converged"}),
    (
        lambda: make_tables(24),
        {"differences": False},
        {
            "labels": "only 24 images have a label; 40 are needed",
            "epistemic": "it takes 20 counterfactuals towards a class and 40 images",
            "shortcut": "the audit has neither pictures",
        },
    ),
    (many_classes, {}, {"asymmetry": "8 pairs in each direction are too few to compare 435 class pairs"}),
    (
        lambda: make_tables(100, planted=Planted(wrong_labels=15)),
        {},
        {"labels": "the ensemble predicts 85.0 % of the labels"},
    ),
    (lambda: make_tables(100, ("ant", "bee")), {}, {"shortcut": "it takes 3 classes, as it compares"}),
    (lambda: failing(make_tables(200), target=2), {}, {"shortcut": "too few pairs towards cow converged; towards the"}),
    (lambda: make_tables(12), {}, {"shortcut": "no class is the target of 20 pairs from 2 other"}),
    (
        lambda: make_tables(200),
        {"trained_on_labels": True},
        {"labels": "the ensemble may have been trained on these labels"},
    ),
    (
        lambda: make_tables(240, planted=Planted(patch=3, wrong_labels=5)),
        {"card": model_card((0.24,) * 4)},
        dict.fromkeys(("labels", "shortcut"), "the model is not good enough for an audit"),
    ),
]


@pytest.mark.parametrize(("make", "options", "reasons"), NOT_CHECKED, ids=[str(list(row[2])) for row in NOT_CHECKED])
def test_find_says_what_it_did_not_check(
    make: Callable[[], Tables], options: dict[str, Any], reasons: dict[str, str]
) -> None:
    results = results_of(make(), **options)
    told = dict(results.not_checked)
    assert all(told[kind].startswith(reason) for kind, reason in reasons.items()), told
    assert not reasons.keys() & {kind for kind, _ in results.clear}


def test_wrong_labels_are_told_of_labels_that_the_ensemble_learned() -> None:
    wrong = told(make_tables(200, planted=Planted(wrong_labels=5)), trained_on_labels=True)["labels"]
    assert "others may be missed" in wrong.sentence


def test_wrong_labels_are_graded_by_the_lower_end_of_their_share() -> None:
    for num_images, count, level in ((800, 5, "look"), (200, 5, "alert")):
        wrong = told(make_tables(num_images, planted=Planted(wrong_labels=count)))["labels"]
        assert wrong.figures["images"] == count and wrong.level == level


def test_findings_that_need_a_good_model_are_lowered_under_reservations() -> None:
    card = model_card((0.9,) * 4, baseline=0.99)
    found = told(make_tables(240, planted=Planted(patch=3, wrong_labels=5)), card=card)
    assert all(found[kind].level == "look" and "lowered" in found[kind].evidence for kind in ("shortcut", "labels"))


def test_lowered_changes_alerts_alone() -> None:
    finding = Finding("labels", 0.69, "One label looks wrong", "One image carries a wrong label.", "Counted.")
    assert lowered(finding) == finding
    assert lowered(replace(finding, severity=0.7)).level == "look"


def test_region_that_varies_is_a_fact_beside_the_real_difference() -> None:
    tables = make_tables(240, image_shape=(1, 16, 16), planted=Planted(patch=3))
    source, target = (tables.counterfactuals[name].to_numpy() for name in ("source", "target"))
    for pictures, marked in ((tables.after, target == 3), (tables.before, source == 3)):
        pictures[marked, :, :2, :2] = np.random.default_rng(0).uniform(0.5, 1, (marked.sum(), 1, 1, 1))
    found = told(tables)
    assert "shortcut" not in found and found["region"].level == "fact"
    assert "the mean difference between real images of dog and the others" in found["region"].sentence
