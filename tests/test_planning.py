"""From a question to a plan: the images and targets asked for, and a measurement of speed and size."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from bars import write_bars
from pictures import write_images
from predictors import as_predictor, constant

from clarity import data, schema
from clarity.checks import Requirements
from clarity.classifiers import ImageEnsemble
from clarity.explainer import explainer_of
from clarity.images import Preprocessing, encode_png
from clarity.model import Model, load_model, save_model
from clarity.planning import (
    class_indices,
    class_thresholds,
    describe_answers,
    describe_inputs,
    describe_predictor,
    make_checks,
    make_plan,
    probe,
    select_images,
    shared_engine,
    useful_actors,
)
from clarity.predictor import load_predictor
from clarity.search import SearchConfig
from clarity.storage import LFS_POINTER
from clarity.training.plan import describe_data

CONFIG = SearchConfig(min_target_prob=0.32, max_steps=12, learning_rate=0.3)
DIGITS = data.open_dataset("digits", split="test")
THREE = data.list_images(DIGITS).slice(0, 3)


LISTING = pa.table({"image_id": ["a", "b", "c", "d"], "label_name": ["ant", "bee", None, "ant"]})


def test_select_images_keeps_what_every_condition_asks(tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("\ufeffd\nb\n", "utf-8")
    assert select_images(LISTING)[1] == "all"
    assert select_images(LISTING, ["label=ant"])[0]["image_id"].to_pylist() == ["a", "d"]
    assert select_images(LISTING, ["label=ant,bee", f"ids={tmp_path}/ids"])[0]["image_id"].to_pylist() == ["b", "d"]
    commas = pa.table({"image_id": ["a", "b"], "label_name": ["ant, red", "bee"]})
    assert select_images(commas, ["label=ant, red"])[0]["image_id"].to_pylist() == ["a"]
    found, only = select_images(LISTING, ["misclassified"], limit=3)
    assert (len(found), only) == (3, "misclassified") and set(found["image_id"].to_pylist()) < set("abcd")


def test_class_indices_prefers_names() -> None:
    assert class_indices("all", ("1", "0")) is None
    assert class_indices(["0"], ("1", "0")) == (1,)
    assert class_indices([0, "0", 0], ("1", "0")) == (0, 1)


@pytest.mark.parametrize("every", [None, "all", ["all"], ("all",), np.array(["all"])])
def test_class_indices_of_all_are_none(every: Any) -> None:
    assert class_indices(every, ("ant", "bee", "cow")) is None


@pytest.mark.parametrize("some", [[1, 2], np.array([2, 1]), ("bee", "cow"), np.array(["bee", "cow"])])
def test_class_indices_are_taken_from_any_sequence(some: Any) -> None:
    assert class_indices(some, ("ant", "bee", "cow")) == (1, 2)
    assert class_indices(some[0], ("ant", "bee", "cow")) in ((1,), (2,))


def test_class_indices_refuse_what_is_no_class() -> None:
    with pytest.raises(ValueError, match=r"unknown class '1,0'; choose from 1, 0; spaces separate names"):
        class_indices(["1,0"], ("1", "0"))


def test_make_plan_names_the_weights_that_a_method_uses(model: Model, tmp_path: Path) -> None:
    dataset = data.open_dataset("digits", split="train")
    listing = data.list_images(dataset).slice(0, 3)
    with_folds = replace(model, folds=(model.ensemble, copy.deepcopy(model.ensemble)))
    save_model(with_folds, tmp_path)
    options: dict[str, Any] = {"config": CONFIG, "shard_rows": 2}
    assert set(make_plan(with_folds, dataset, listing, method="clarity", **options).model["sums"]) == {
        "folds.safetensors"
    }
    plan = make_plan(with_folds, replace(dataset, split="test"), listing, method="fgsm", **options)
    assert set(plan.model["sums"]) == {"image_ensemble.safetensors"}
    assert plan.model["num_folds"] == 0


def test_a_plan_knows_what_its_model_was_trained_on(model: Model, tmp_path: Path) -> None:
    names = [f"{name}/{number}.png" for name in ("ant", "bee") for number in range(8)]
    for folder in ("all/set", "copied/set", "split/train", "split/test"):
        write_images(tmp_path / folder, *names)

    def trained(root: str, split: str, taught: str = "train", folds: int = 0) -> Any:
        learned = data.open_dataset("folder", tmp_path / "all", taught)
        card = {"data": describe_data(learned, None, data.list_images(learned), ["set"])}
        dataset = data.open_dataset("folder", tmp_path / root, split)
        knowing = replace(model, card=card, folds=(model.ensemble,) * folds)
        plan = make_plan(knowing, dataset, data.list_images(dataset), method="clarity", config=CONFIG)
        told = [note for note in plan.dataset["notes"] if f"trained on other data ({tmp_path}/all)" in note]
        assert bool(told) == (plan.dataset["trained"] is None)
        return plan.model["num_folds"] if folds else plan.dataset["trained"]

    for root in ("all", "copied"):  # the same ids
        assert [trained(root, split) for split in ("train", "test", "all")] == [True, False, True]
        assert trained(root, "test", taught="all") and trained(root, "train", folds=2) == 2
    for root, split in (("all/set", "test"), ("all/set", "all"), ("split", "test"), ("split", "train")):  # other ids
        assert trained(root, split) is None and trained(root, split, folds=2) == 0


def test_make_plan_depends_on_further_columns(model: Model) -> None:
    tables = [THREE.append_column("guess", pa.array(guess)) for guess in (["a", "b", "c"], ["a", "b", "d"])]
    plans = [make_plan(model, DIGITS, table, method="clarity", config=CONFIG, shard_rows=2) for table in tables]
    assert plans[0].codes_schema().names[-1] == "guess"
    assert plans[0].fingerprint != plans[1].fingerprint


def test_probe_measures(tiny_digits_model: Path, tmp_path: Path) -> None:
    dataset = data.open_dataset("digits", split="test")
    rows = data.list_images(dataset).slice(0, 4)
    model = load_model(tiny_digits_model)
    model = replace(model, image_ensemble=ImageEnsemble(model.ensemble.config, model.vae.config).eval())
    save_model(model, tmp_path / "model", card={})
    for method in ("clarity", "fgsm"):
        plan = make_plan(model, dataset, rows, method=method, config=SearchConfig(max_steps=5))
        found = probe(plan, str(tmp_path / "model"), dataset, rows, threads=1)
        assert found["seconds_per_image"] > 0 and found["pairs_per_second"] > 0
        assert found["bytes_per_image"] > 9 * 150


def test_class_thresholds_are_what_real_images_reach_at_most_the_limit_and_at_least_half(model: Model) -> None:
    known = replace(model, card={"target_probs": {"median": [0.5] * 4, "p90": [0.999, 0.81, 0.3, None]}})
    assert class_thresholds(known, 0.99) == [0.99, 0.81, 0.5, 0.99]
    with pytest.raises(ValueError, match="min_target_prob: auto needs the held-out images' probabilities"):
        class_thresholds(model, 0.99)


def test_plan_knows_its_checks(model: Model) -> None:
    known = replace(model, card={"target_probs": {"p90": [0.9, 0.8, 0.7, 0.6]}})
    requirements = Requirements(min_reencoded_prob=0.95)
    options: dict[str, Any] = {"method": "clarity", "config": CONFIG, "shard_rows": 2}
    plain = make_plan(model, DIGITS, THREE, **options, checks=make_checks(known, CONFIG, Requirements()))
    plan = make_plan(
        model, DIGITS, THREE, **options, checks=make_checks(known, SearchConfig(), requirements, by_class=True)
    )
    assert plain.checks == {} and plan.fingerprint != plain.fingerprint
    assert plan.checks == {"min_target_probs": [0.9, 0.8, 0.7, 0.6], "min_reencoded_prob": 0.95}
    targets = np.array([3, 0])
    assert plan.min_target_prob(targets).tolist() == np.array([0.6, 0.9], np.float32).tolist()
    assert plain.min_target_prob(targets).tolist() == [np.float32(CONFIG.min_target_prob)] * 2
    explainer = explainer_of(plan, model, engine="plain")
    assert explainer.min_target_probs == plan.checks["min_target_probs"] and len(explainer.checks) == 1


def test_explainer_of_a_plan_takes_the_planned_predictor_only(model: Model) -> None:
    mine, other = (load_predictor(constant(model.class_names, favourite)) for favourite in (0, 1))
    checks = make_checks(model, CONFIG, Requirements(), mine)
    plan = make_plan(model, DIGITS, THREE, method="clarity", config=CONFIG, shard_rows=2, checks=checks)
    assert explainer_of(plan, model, mine).predictor is not None
    with pytest.raises(ValueError, match="predictor: expected that of the plan, found another"):
        explainer_of(plan, model, other)
    assert plan.codes_schema().names[-3:] == ["prediction", "prediction_name", "prediction_probs"]


def test_describe_predictor_shows_an_image_with_its_likeliest_classes_and_warns(model: Model) -> None:
    told = describe_predictor(load_predictor(constant(model.class_names, 2)), DIGITS, THREE, model.preprocessing)
    assert told.endswith("is cow 0.700, ant 0.100, bee 0.100") and "(label 7)" in told and "WARNING" not in told
    told = describe_predictor(load_predictor(constant(model.class_names, 2)), DIGITS, THREE, Preprocessing("RGB", 9, 9))
    assert told.endswith("\n           sees 8 x 12 in grey: pictures, of 9 x 9 in colour, are converted for it")

    def relative(pixels: np.ndarray) -> np.ndarray:
        return np.where(pixels.mean() > 20, [[0.4, 0.3, 0.2, 0.1]], [[0.1, 0.2, 0.3, 0.4]]).repeat(len(pixels), 0)

    def silent(dark: float) -> str:
        """What is said where images darker than this get no answer."""

        def answers(pixels: np.ndarray) -> np.ndarray:
            return np.where(pixels.mean((1, 2, 3))[:, None] < dark, np.nan, [[0.4, 0.3, 0.2, 0.1]])

        mine = load_predictor(as_predictor(answers, model.class_names))
        return describe_predictor(mine, DIGITS, THREE, model.preprocessing)

    means = sorted(
        float(pixels.mean()) for pixels in schema.matrix(data.read_images(DIGITS, THREE, model.preprocessing)["image"])
    )
    assert "WARNING" not in silent(means[0])
    assert "answers NaN or an infinity for 1 image, such as" in silent(means[1])
    with pytest.raises(ValueError, match="got NaN or an infinity for each of 3 images, such as"):
        silent(means[2] + 1)

    unstable = load_predictor(as_predictor(relative, model.class_names))
    told = describe_predictor(replace(unstable, block=3), DIGITS, THREE, model.preprocessing)
    assert "WARNING" in told and "alone and among others" in told


def test_describe_predictor_counts_the_labels_that_it_sees_and_finds_another_order_of_classes(tmp_path: Path) -> None:
    dataset = data.open_dataset("folder", write_bars(tmp_path, 40), "all")
    listing, preprocessing = data.list_images(dataset), Preprocessing("L", 8, 12)

    def told(*order: int) -> list[str]:
        """What is said where the bars are taken for these classes."""

        def answers(pixels: np.ndarray) -> np.ndarray:
            bar = pixels[:, 0, 1:7].reshape(len(pixels), 3, -1).mean(2).argmax(1)
            return np.eye(3)[np.array(order)[bar]]

        mine = load_predictor(as_predictor(answers, ["bar0", "bar1", "bar2"]))
        return describe_predictor(mine, dataset, listing, preprocessing).splitlines()[1:]

    assert told(0, 1, 2) == [f"{'':<10} sees the label in 40 of 40 labelled images"]
    count, warning = told(0, 2, 1)
    assert count.endswith("in 14 of 40 labelled images") and "may be right no more often than by chance" in warning
    assert "may be right no more often than by chance" in told(1, 1, 1)[1]
    count, warning = told(0, 1, 1)
    assert count.endswith("in 27 of 40 labelled images")
    listing = listing.filter(pc.equal(listing["label_name"], "bar0"))
    assert told(0, 1, 2) == [f"{'':<10} sees the label in 14 of 14 labelled images"]
    assert warning.endswith(
        "as another class (bar2 as bar1): check the order of its classes and what it expects of pixels"
    )


def test_describe_answers_does_not_take_a_few_hard_images_of_a_class_for_another_order() -> None:
    labels = np.repeat([0, 1, 2], [4, 11, 20])
    hard, swapped = labels.copy(), labels.copy()
    hard[:3], swapped[:3], swapped[4:14] = 1, 1, 0
    assert describe_answers("mine", ["dress", "shirt", "hat"], labels, hard) == [
        f"{'':<10} sees the label in 32 of 35 labelled images"
    ]
    assert "(dress as shirt, shirt as dress)" in describe_answers("mine", ["dress", "shirt", "hat"], labels, swapped)[1]


def test_a_run_tells_thresholds_and_labels_that_the_model_does_not_know(model: Model) -> None:
    names = ["cow", "cat", None]
    others = THREE.set_column(THREE.column_names.index("label_name"), "label_name", pa.array(names))
    plain = make_plan(model, DIGITS, others, method="clarity", config=CONFIG)
    by_class = replace(plain, checks={"min_target_probs": [0.9, 0.5, 0.99, 0.6]})
    assert describe_inputs(model, plain, None, DIGITS, others) == ""
    assert describe_inputs(model, by_class, None, DIGITS, others) == (
        "thresholds 0.500 (bee) to 0.990 (cow); plan.json holds that of each class\n"
    )
    told = describe_inputs(model, plain, None, DIGITS, THREE)
    assert told.startswith("WARNING    None of the 3 labels of the data is a class of the model (ant, bee, cow, ")


def test_a_run_tells_that_the_model_learned_from_another_predictor(model: Model) -> None:
    plain, mine = make_plan(model, DIGITS, THREE, method="clarity", config=CONFIG), constant(model.class_names, 2)
    loaded = load_predictor(mine)
    for digest, warned in ((loaded.digest, False), ("0", True)):
        taught = replace(model, card={"predictor": {"name": "theirs", "digest": digest}})
        said = describe_inputs(taught, plain, loaded, DIGITS, THREE)
        assert ("WARNING    Clarity's model learned from theirs; yours is another file or function" in said) == warned


def test_a_run_of_many_images_of_which_none_can_be_read_is_refused(model: Model, tmp_path: Path) -> None:
    (tmp_path / "ant").mkdir()
    for number in range(66):
        (tmp_path / "ant" / f"{number}.png").write_bytes(LFS_POINTER)
    dataset = data.open_dataset("folder", tmp_path, "all")
    listing = data.list_images(dataset)
    with pytest.raises(ValueError, match=r"data: expected images, found none .* among 64: .*git lfs pull"):
        make_plan(model, dataset, listing, method="clarity", config=CONFIG)
    few = make_plan(model, dataset, listing.slice(0, 64), method="clarity", config=CONFIG)
    assert few.num_images == 64, "of few the run itself says why"
    (tmp_path / "ant" / "0.png").write_bytes(encode_png(np.zeros((1, *model.image_shape), np.uint8))[0])
    assert make_plan(model, dataset, listing, method="clarity", config=CONFIG).num_images == 66


def test_shared_engine_is_the_fastest_that_every_machine_has() -> None:
    new, old = ["native-avx512", "native-avx2", "native-base", "batched", "plain"], ["native-avx2", "batched", "plain"]
    assert shared_engine("auto", "clarity", [new, new], None) == "native-avx512"
    assert shared_engine("auto", "latent", [new, old, new], None) == "native-avx2"
    assert shared_engine("auto", "clarity", [new, new], "batched") == "batched", "an audit goes on with its engine"
    assert shared_engine("auto", "clarity", [new, old], "native-avx512") == "native-avx2", "which the commit refuses"
    assert shared_engine("plain", "clarity", [new, old], None) == "plain"
    assert shared_engine("auto", "revise", [new, old], None) == "auto"
    assert shared_engine("auto", "clarity", [], None) == "auto"


def test_useful_actors_are_fewer_than_shards_or_none_where_searching_takes_less_than_a_start(model: Model) -> None:
    plan = make_plan(model, DIGITS, THREE, method="clarity", config=CONFIG)
    plan = replace(plan, shards=[{"start": start, "stop": start + 100} for start in range(0, 100_000, 100)])
    assert useful_actors(plan, model, range(3)) == 0, "the driver does it before Ray has started"
    assert 1 < useful_actors(plan, model, range(500)) < useful_actors(plan, model, range(1_000)) < 1_000
    assert useful_actors(replace(plan, method="revise"), model, range(3)) == 3
    assert useful_actors(replace(plan, checks={"min_judge_prob": 0.5}), model, range(3)) == 3
