"""From a question to a plan: the images and targets asked for, and a measurement of speed and size."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from clarity import data
from clarity.classifiers import ImageEnsemble
from clarity.model import Model, load_model, save_model
from clarity.planning import choose, class_indices, make_plan, probe
from clarity.search import SearchConfig

CONFIG = SearchConfig(min_target_prob=0.32, max_steps=12, learning_rate=0.3)


LISTING = pa.table(
    {
        "image_id": ["a", "b", "c", "d"],
        "location": [""] * 4,
        "row": [0, 1, 2, 3],
        "size": [0] * 4,
        "label_name": ["ant", "bee", None, "ant"],
    }
)


def test_choose_keeps_what_every_condition_asks(tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("d\nb\n")
    assert choose(LISTING)[1] == "all"
    assert choose(LISTING, ["label=ant"])[0]["image_id"].to_pylist() == ["a", "d"]
    assert choose(LISTING, ["label=ant,bee", f"ids={tmp_path}/ids"])[0]["image_id"].to_pylist() == ["b", "d"]
    found, only = choose(LISTING, ["misclassified"], limit=3)
    assert (found["image_id"].to_pylist(), only) == (["a", "b", "c"], "misclassified")


@pytest.mark.parametrize(
    ("where", "limit", "message"),
    [
        (["label=cat"], None, "no image has the label 'cat'; there are ant, bee"),
        (["nice"], None, "expected label=NAME"),
        (["label="], None, "expected label=NAME"),
        (["ids=IDS"], None, "1 ids of .* are not in the data, the first 'zz'"),
        (["label=bee", "ids=ONE"], None, "not in the data"),
        ([], 0, "limit: expected at least 1"),
    ],
)
def test_choose_says_what_is_wrong(where: list[str], limit: int | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "IDS").write_text("a\nzz\n")
    (tmp_path / "ONE").write_text("a\n")
    where = [condition.replace("ids=", f"ids={tmp_path}/") for condition in where]
    with pytest.raises(ValueError, match=message):
        choose(LISTING, where, limit)


def test_class_indices_prefers_names() -> None:
    assert class_indices("all", ("1", "0")) is None
    assert class_indices(["0"], ("1", "0")) == (1,)
    assert class_indices([0, "0", 0], ("1", "0")) == (0, 1)


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


def test_make_plan_depends_on_further_columns(model: Model) -> None:
    dataset = data.open_dataset("digits", split="test")
    listing = data.list_images(dataset).slice(0, 3)
    plans = [
        make_plan(
            model,
            dataset,
            listing.append_column("guess", pa.array(guess)),
            method="clarity",
            config=CONFIG,
            shard_rows=2,
        )
        for guess in (["a", "b", "c"], ["a", "b", "d"])
    ]
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
