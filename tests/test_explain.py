"""The explainer: rows that do not know each other, what their columns say, and what a worker does on a bad day."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from object_store import ObjectStore

import clarity
from clarity import data, schema, storage
from clarity.audit.commits import MAX_ATTEMPTS, begin_attempt, claim
from clarity.audit.plan import Plan
from clarity.audit.read import read_audit
from clarity.audit.verify import verify
from clarity.classifiers import EnsembleConfig, ImageEnsemble, LatentEnsemble
from clarity.explainer import Explainer, quantise
from clarity.ids import fold_of, noise
from clarity.images import decode_png
from clarity.methods import METHODS
from clarity.model import Model, save_model
from clarity.notebook import redecoder
from clarity.planning import choose, class_indices, make_plan, probe
from clarity.predictions import add_predictions, read_predictions
from clarity.rows import decode_rows, encode_rows, logits_rows
from clarity.search import SearchConfig
from clarity.uncertainty import decompose
from clarity.worker import ExplainShard, Work, read_shard, shard_item, write_shard

CONFIG = SearchConfig(min_target_prob=0.32, max_steps=12, learning_rate=0.3)
ROWS = 9


@pytest.fixture
def model(tiny_model: Model) -> Model:
    """The tiny model with a classifier of images, so that every method runs."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = EnsembleConfig(num_classes=4, latent_dim=5, hidden=(6, 7), num_members=2)
        image_ensemble = ImageEnsemble(config, tiny_model.vae.config).eval()
        for weight in (*tiny_model.ensemble.weights, *image_ensemble.weights):  # so that images differ
            weight.data *= 3
    return replace(tiny_model, image_ensemble=image_ensemble)


def shard_of(model: Model, ids: list[str], broken: tuple[str, ...] = ()) -> pa.Table:
    """Images drawn from their names alone."""
    pixels = np.stack(
        [np.random.default_rng(list(name.encode())).integers(0, 256, model.image_shape, np.uint8) for name in ids]
    )
    good = np.array([name not in broken for name in ids])
    return pa.table(
        [
            pa.array(ids),
            pa.array([model.class_names[len(name) % 3] if name != "nn" else "unknown" for name in ids]),
            schema.fixed_size_list(pixels.reshape(len(ids), -1), good),
            pa.array(["cut short"] * len(ids), mask=good),
        ],
        schema=schema.shard_schema(model.image_shape),
    )


IDS = ["i0", "i1", "i10", "i2", "nn", "o", "pp", "q", "r33"]


def rows_of(table: pa.Table, keys: tuple[str, ...]) -> dict[Any, Any]:
    return {tuple(row[key] for key in keys): row for row in table.to_pylist()}


def keys_of(name: str) -> tuple[str, ...]:
    return ("image_id",) if name == "codes" else ("target", "image_id")


# ---- the property on which everything hangs ------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_rows_do_not_know_their_shard(model: Model, method: str) -> None:
    explainer = Explainer(model, method, CONFIG, threads=1)
    whole = explainer.explain_shard(shard_of(model, IDS))
    order = np.random.default_rng(0).permutation(IDS).tolist()
    cuts = {
        "alone": [[name] for name in IDS],
        "in threes": [IDS[i : i + 3] for i in range(0, len(IDS), 3)],
        "shuffled": [order],
        "among strangers": [IDS[:4] + [f"stranger{i}" for i in range(40)] + IDS[4:]],
    }
    for how, shards in cuts.items():
        parts = [explainer.explain_shard(shard_of(model, shard)) for shard in shards]
        for name in ("codes", "counterfactuals"):
            found = rows_of(pa.concat_tables([getattr(part, name) for part in parts]), keys_of(name))
            expected = rows_of(getattr(whole, name), keys_of(name))
            assert {key: found[key] for key in expected} == expected, f"{name}, {how}"


def test_rows_do_not_know_the_number_of_threads(model: Model) -> None:
    before = torch.get_num_threads()
    try:
        one, three = (
            Explainer(model, "clarity", CONFIG, threads=threads).explain_shard(shard_of(model, IDS))
            for threads in (1, 3)
        )
    finally:
        torch.set_num_threads(before)
    assert one.counterfactuals.equals(three.counterfactuals)
    assert one.codes.equals(three.codes)


# ---- what stands in the columns ------------------------------------------------------------------------------------


@pytest.fixture
def explained(model: Model) -> Any:
    return Explainer(model, "clarity", CONFIG, threads=1).explain_shard(shard_of(model, IDS, broken=("q",)))


def test_codes_say_what_the_ensemble_sees(model: Model, explained: Any) -> None:
    codes = explained.codes
    assert codes.schema.equals(schema.codes_schema(4, 5), check_metadata=True)
    assert codes["image_id"].to_pylist() == sorted(IDS)
    good = codes.filter(pc.equal(codes["status"], "ok"))
    x = torch.tensor(decode_png(good["x"], model.image_shape)) / 255
    z, _ = encode_rows(model.vae, x)
    assert (schema.matrix(good["z"]) == z.numpy()).all()
    logits = logits_rows(model.ensemble, z)
    assert np.allclose(schema.matrix(good["probs"]), logits.softmax(-1).mean(0).numpy(), atol=1e-6)
    assert (good["source"].to_numpy() == schema.matrix(good["probs"]).argmax(1)).all()
    assert good["source_name"].to_pylist() == [model.class_names[k] for k in good["source"].to_pylist()]
    for name, values in decompose(logits)._asdict().items():
        assert np.allclose(good[name].to_numpy(), values.numpy(), atol=1e-6)
    off = (decode_rows(model.vae, z) - x).abs().flatten(1).sum(1).numpy()
    assert np.allclose(good["reconstruction_l1"].to_numpy(), off, rtol=1e-5)


def test_codes_keep_an_unreadable_image_as_a_row(explained: Any) -> None:
    row = rows_of(explained.codes, ("image_id",))[("q",)]
    assert (row["status"], row["error"], row["label_name"]) == ("error", "cut short", "bee")
    given = {"image_id", "label", "label_name", "status", "error"}
    assert all(value is None for name, value in row.items() if name not in given)
    assert "q" not in explained.counterfactuals["image_id"].to_pylist()


def test_codes_keep_an_unknown_label_as_null(explained: Any) -> None:
    row = rows_of(explained.codes, ("image_id",))[("nn",)]
    assert (row["label"], row["label_name"], row["status"]) == (None, "unknown", "ok")


def test_counterfactuals_hold_every_other_class_in_order(model: Model, explained: Any) -> None:
    pairs, codes = explained.counterfactuals, rows_of(explained.codes, ("image_id",))
    assert pairs.schema.equals(schema.counterfactuals_schema(5), check_metadata=True)
    keys = list(zip(pairs["target"].to_pylist(), pairs["image_id"].to_pylist()))
    good = sorted(name for name in IDS if name != "q")
    assert keys == [(k, name) for k in range(4) for name in good if codes[(name,)]["source"] != k]
    for row in pairs.to_pylist():
        code = codes[(row["image_id"],)]
        assert (row["source"], row["label"], row["source_name"]) == (code["source"], code["label"], code["source_name"])
        assert row["target_name"] == model.class_names[row["target"]]


def test_counterfactuals_measure_their_own_points(model: Model, explained: Any) -> None:
    pairs, codes = explained.counterfactuals, rows_of(explained.codes, ("image_id",))
    z_cf = torch.tensor(schema.matrix(pairs["z_cf"]))
    z = torch.tensor([codes[(name,)]["z"] for name in pairs["image_id"].to_pylist()])
    target = torch.tensor(pairs["target"].to_pylist())
    logits = logits_rows(model.ensemble, z_cf)
    prob = logits.softmax(-1).mean(0)[torch.arange(len(target)), target].numpy()
    assert np.allclose(pairs["target_prob_final"].to_numpy(), prob, atol=1e-5)
    assert np.allclose(pairs["epistemic_final"].to_numpy(), decompose(logits).epistemic.numpy(), atol=1e-6)
    assert np.allclose(pairs["distance_z_l1"].to_numpy(), (z_cf - z).abs().sum(1).numpy(), rtol=1e-5)
    assert np.allclose(pairs["distance_z_l2"].to_numpy(), (z_cf - z).norm(dim=1).numpy(), rtol=1e-5)
    x_cf, reconstruction = decode_rows(model.vae, z_cf), decode_rows(model.vae, z)
    off = (x_cf - reconstruction).abs().flatten(1).sum(1).numpy()
    assert np.allclose(pairs["distance_x_l1"].to_numpy(), off, rtol=1e-4, atol=1e-5)
    shown = decode_png(pairs["x_cf"], model.image_shape)
    assert (shown == quantise(x_cf)).all()
    again = logits_rows(model.ensemble, encode_rows(model.vae, torch.tensor(shown) / 255)[0]).softmax(-1).mean(0)
    assert (pairs["reencoded_class"].to_numpy() == again.argmax(1).numpy()).all()
    assert np.allclose(pairs["reencoded_target_prob"].to_numpy(), again[torch.arange(len(target)), target].numpy())
    start = logits_rows(model.ensemble, z).softmax(-1).mean(0)[torch.arange(len(target)), target].numpy()
    assert np.allclose(pairs["target_prob_initial"].to_numpy(), start, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_converged_is_what_the_probability_says(model: Model, method: str) -> None:
    pairs = Explainer(model, method, CONFIG, threads=1).explain_shard(shard_of(model, IDS)).counterfactuals
    final, converged = pairs["target_prob_final"].to_numpy(), pairs["converged"].to_numpy()
    assert (converged == (final > np.float32(CONFIG.min_target_prob))).all()
    assert 0 < converged.sum() < len(pairs) or METHODS[method].classifier.startswith("image")
    assert set(pairs["method"].to_pylist()) == {method}
    single = METHODS[method].classifier.endswith("member")
    for name in ("epistemic_initial", "epistemic_final"):
        assert pairs[name].null_count == (len(pairs) if single else 0)


def test_initial_values_of_a_sampled_start_are_those_of_the_sample(model: Model) -> None:
    explained = Explainer(model, "revise_e", CONFIG, threads=1).explain_shard(shard_of(model, IDS))
    codes = explained.codes
    x = torch.tensor(decode_png(codes["x"], model.image_shape)) / 255
    z, log_var = encode_rows(model.vae, x)
    start = z + torch.exp(log_var / 2) * torch.tensor(noise(codes["image_id"].to_pylist(), 5))
    assert model.image_ensemble is not None
    logits = logits_rows(model.image_ensemble, decode_rows(model.vae, start))
    expected = dict(zip(codes["image_id"].to_pylist(), decompose(logits).predictive.tolist()))
    found = rows_of(explained.counterfactuals, ("target", "image_id"))
    assert all(row["predictive_initial"] == pytest.approx(expected[name], abs=1e-6) for (_, name), row in found.items())


def test_pixel_methods_keep_the_code_of_their_picture(model: Model) -> None:
    pairs = Explainer(model, "fgsm", CONFIG, threads=1).explain_shard(shard_of(model, IDS)).counterfactuals
    shown = torch.tensor(decode_png(pairs["x_cf"], model.image_shape)) / 255
    assert (schema.matrix(pairs["z_cf"]) == encode_rows(model.vae, shown)[0].numpy()).all()


def test_explainer_asks_only_for_what_is_wanted(model: Model) -> None:
    shard = shard_of(model, IDS)
    some = Explainer(model, "clarity", CONFIG, targets=[2, 0], images="none", threads=1).explain_shard(shard)
    assert set(some.counterfactuals["target"].to_pylist()) <= {0, 2}
    assert some.counterfactuals["x_cf"].null_count == len(some.counterfactuals)
    assert some.codes["x"].null_count == len(IDS)
    whole = rows_of(Explainer(model, "clarity", CONFIG, threads=1).explain_shard(shard).counterfactuals, keys_of(""))
    for key, row in rows_of(some.counterfactuals, keys_of("")).items():
        assert row == whole[key] | {"x_cf": None}


def test_explainer_asks_only_for_the_misclassified(model: Model) -> None:
    explained = Explainer(model, "clarity", CONFIG, only="misclassified", threads=1).explain_shard(shard_of(model, IDS))
    wrong = {
        row["image_id"]
        for row in explained.codes.to_pylist()
        if row["label"] is not None and row["label"] != row["source"]
    }
    assert set(explained.counterfactuals["image_id"].to_pylist()) == wrong
    assert 0 < len(wrong) < ROWS
    assert len(explained.codes) == ROWS


def test_explainer_survives_a_shard_of_unreadable_images_and_an_empty_one(model: Model) -> None:
    explainer = Explainer(model, "clarity", CONFIG, threads=1)
    explained = explainer.explain_shard(shard_of(model, IDS, broken=tuple(IDS)))
    assert explained.codes["status"].to_pylist() == ["error"] * ROWS
    assert len(explained.counterfactuals) == 0
    assert len(explainer.explain_shard(shard_of(model, IDS).slice(0, 0)).codes) == 0


def test_explainer_marks_a_row_that_is_not_finite(model: Model) -> None:
    model.ensemble.biases[-1].data[0, 2] = torch.nan
    explained = Explainer(model, "clarity", CONFIG, targets=[1], threads=1).explain_shard(shard_of(model, ["a", "b"]))
    row = explained.counterfactuals.to_pylist()[0]
    assert (row["status"], row["converged"]) == ("nonfinite", False)
    assert row["target_prob_final"] is None  # NaN would pass for a number in some readers


def test_explainer_uses_the_fold_that_did_not_see_an_image(model: Model) -> None:
    folds = []
    for seed in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            folds.append(LatentEnsemble(model.ensemble.config).eval())
    shard = shard_of(model, IDS)
    explained = Explainer(replace(model, folds=tuple(folds)), "clarity", CONFIG, by_fold=True, threads=1).explain_shard(
        shard
    )
    used = set()
    for number, fold in enumerate(folds):
        alone = Explainer(replace(model, ensemble=fold), "clarity", CONFIG, threads=1).explain_shard(shard)
        for name in ("codes", "counterfactuals"):
            expected = rows_of(getattr(alone, name), keys_of(name))
            for key, row in rows_of(getattr(explained, name), keys_of(name)).items():
                if fold_of(row["image_id"], 3) == number:
                    used.add(number)
                    assert row == expected[key]
    assert len(used) > 1


def test_codes_carry_further_columns(model: Model) -> None:
    extra = pa.table({"smiling": pa.array([i % 2 for i in range(ROWS)], pa.int8()), "guess": [f"g{i}" for i in IDS]})
    codes = Explainer(model, "clarity", CONFIG, threads=1).explain_shard(shard_of(model, IDS, ("q",)), extra).codes
    assert codes.column_names[-2:] == ["smiling", "guess"]
    assert [row["guess"] for row in codes.to_pylist()] == [f"g{name}" for name in sorted(IDS)]


def test_traces_end_where_the_searches_end(model: Model) -> None:
    explained = Explainer(model, "clarity", CONFIG, engine="plain", threads=1).explain_shard(
        shard_of(model, IDS), trace=2
    )
    traces = explained.traces
    assert traces is not None
    assert traces.schema.equals(schema.traces_schema(5), check_metadata=True)
    assert set(traces["image_id"].to_pylist()) == {"i0", "i1"}
    last = {key[:2]: row for key, row in sorted(rows_of(traces, ("target", "image_id", "step")).items())}
    pairs = rows_of(explained.counterfactuals, ("target", "image_id"))
    assert len(last) == 6
    for key, row in last.items():
        assert row["step"] == pairs[key]["steps"]
        assert row["target_prob"] == pytest.approx(pairs[key]["target_prob_final"], abs=1e-6)
        assert np.allclose(row["z"], pairs[key]["z_cf"], atol=1e-6)
    keys = [tuple(row[name] for name in ("target", "image_id", "step")) for row in traces.to_pylist()]
    assert keys == sorted(keys)


def test_explainer_refuses_what_it_does_not_know(model: Model, tiny_model: Model) -> None:
    for options, message in [
        ({"method": "magic"}, "unknown method 'magic'; choose from clarity"),
        ({"images": "jpeg"}, "unknown images"),
        ({"only": "nice"}, "unknown only"),
        ({"targets": [4]}, r"targets \[4\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            Explainer(model, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--image-members"):
        Explainer(tiny_model, "fgsm")


# ---- in a notebook -------------------------------------------------------------------------------------------------


def test_explain_takes_arrays_pictures_and_paths(model: Model, tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 12), np.uint8)
    pictures = [Image.fromarray(image[0]) for image in pixels]
    paths = []
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
        paths.append(tmp_path / f"{i}.png")
    first = clarity.explain(model, pixels, config=CONFIG)
    assert len(first) == 9
    assert first["image_id"].to_pylist()[0] in {"0", "1", "2"}
    for images in (pixels[:, 0], pixels / np.float32(255), torch.tensor(pixels), pictures, list(pixels)):
        assert clarity.explain(model, images, config=CONFIG).equals(first)
    by_path = clarity.explain(model, paths, config=CONFIG)
    assert by_path.drop_columns("image_id").equals(first.drop_columns("image_id"))
    assert set(by_path["image_id"].to_pylist()) == {str(path) for path in paths}


def test_explain_takes_targets_by_name_or_index(model: Model) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 12), np.uint8)
    by_name = clarity.explain(model, pixels, targets=["dog", "ant"], config=CONFIG)
    assert by_name.equals(clarity.explain(model, pixels, targets=[0, 3], config=CONFIG))
    assert set(by_name["target"].to_pylist()) <= {0, 3}
    assert clarity.explain(model, pixels, targets="dog", config=CONFIG)["target_name"].unique().to_pylist() == ["dog"]


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (np.full((2, 8, 12), np.nan, np.float32), {}, "image 0: "),
        (np.zeros((2, 9, 12), np.uint8), {}, "image 0: .*8"),
        (["/nowhere.png"], {}, "cannot read /nowhere.png"),
        ("photo.png", {}, "put it in a list"),
        (np.zeros((2, 8, 12), np.uint8), {"targets": ["cat"]}, "unknown class 'cat'; choose from ant, bee"),
        (np.zeros((2, 8, 12), np.uint8), {"targets": [7]}, "unknown class 7"),
        (np.zeros((2, 8, 12), np.uint8), {"targets": []}, "at least one target"),
        (np.zeros((2, 8, 12), np.uint8), {"image_ids": ["a", "a"]}, "2 distinct names, got 1"),
    ],
)
def test_explain_says_what_is_wrong(model: Model, images: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        clarity.explain(model, images, **options)


def test_explain_is_a_function_after_its_module_is_imported(model: Model) -> None:
    import clarity.explainer

    assert len(clarity.explain(model, np.zeros((1, 8, 12), np.uint8), targets="bee", config=CONFIG)) <= 1


# ---- what a job asks for -------------------------------------------------------------------------------------------

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
        (["ids=IDS"], None, "1 ids are not in the data, the first 'zz'"),
        (["label=bee", "ids=ONE"], None, "not in the data"),
        ([], 0, "--limit: expected at least 1"),
    ],
)
def test_choose_says_what_is_wrong(where: list[str], limit: int | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "IDS").write_text("a\nzz\n")
    (tmp_path / "ONE").write_text("a\n")
    where = [condition.replace("ids=", f"ids={tmp_path}/") for condition in where]
    with pytest.raises(ValueError, match=message):
        choose(LISTING, where, limit)


NAMES = ("ant", "bee", "cow")


def predicted(path: Path, **columns: Any) -> pa.Table:
    """LISTING with what a file of these columns says."""
    pq.write_table(pa.table(columns), path / "predictions.parquet")
    return add_predictions(LISTING, read_predictions(str(path / "predictions.parquet"), LISTING), NAMES)


@pytest.mark.parametrize(
    "classes",
    [
        ["cow", None, "ant"],
        [2, None, 0],
        pa.array([2.0, None, 0.0], pa.float64()),
        pa.array(["cow", None, "ant"]).dictionary_encode(),
        pa.array(["cow", None, "ant"], pa.large_string()),
    ],
)
def test_predictions_come_by_name_or_index(classes: Any, tmp_path: Path) -> None:
    found = predicted(tmp_path, image_id=["c", "b", "a"], **{"class": classes})
    assert found["prediction"].to_pylist() == [0, None, 2, None]
    assert found["prediction_name"].to_pylist() == ["ant", None, "cow", None]
    assert found.column_names == [*LISTING.column_names, "prediction", "prediction_name"]
    assert data.left_out(found) == {}


def test_predictions_come_as_probabilities(tmp_path: Path) -> None:
    rows = {"image_id": ["d", "stranger", "b"], "probabilities": [[0.1, 0.2, 0.7], [1.0, 0.0, 0.0], None]}
    found = predicted(tmp_path, **rows)
    assert found["prediction_name"].to_pylist() == [None, None, None, "cow"]
    assert found["prediction_probs"].type == pa.list_(pa.float32(), 3)
    assert found["prediction_probs"][0].as_py() is None
    assert found["prediction_probs"][3].as_py() == pytest.approx([0.1, 0.2, 0.7])
    assert data.left_out(found) == {"predictions for images that are not in the data": 1}
    # A class of its own counts more than the largest probability: a model may have a threshold.
    both = predicted(tmp_path, **rows, **{"class": ["ant", None, "bee"]})
    assert both["prediction_name"].to_pylist() == [None, "bee", None, "ant"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a"], "class": ["ant"]}, "expected columns image_id and class or probabilities, found id, class"),
        ({"image_id": ["a"]}, "found image_id: rename"),
        ({"image_id": [0.5], "class": ["ant"]}, "image_id as text or integers"),
        ({"image_id": ["a", None], "class": ["ant", "ant"]}, "found null in 1"),
        ({"image_id": ["a", "b", "a"], "class": ["ant"] * 3}, "1 double, the first a"),
        ({"image_id": ["x"], "class": ["ant"]}, "none of its 1 ids is an image of the data, such as x; .* like a"),
        ({"image_id": ["a"], "class": pa.nulls(1, pa.string())}, "none of the 4 images asked for has one"),
        ({"image_id": ["a", "b"], "class": ["ant", "cat"]}, "found cat for image b and 0 others; choose from ant, bee"),
        ({"image_id": ["a"], "class": [3]}, "found 3 for image a"),
        ({"image_id": ["a"], "class": [-1]}, "found -1 for image a"),
        ({"image_id": ["a"], "class": [0.5]}, "found 0.5"),
        ({"image_id": ["a"], "class": [float("nan")]}, "found nan"),
        ({"image_id": ["a"], "class": [True]}, "names or indices, found bool"),
        ({"image_id": ["a"], "probabilities": [0.5]}, "lists of numbers, found double"),
        ({"image_id": ["a"], "probabilities": [[0.5, 0.5]]}, "expected 3 probabilities an image, found 2 for image a"),
        ({"image_id": ["a"], "probabilities": [[0.5, 0.5, float("nan")]]}, "that are numbers, found .*nan"),
        ({"image_id": ["a"], "probabilities": [[0.5, 0.5, None]]}, "that are numbers"),
        ({"image_id": ["a"], "probabilities": [[3.0, -1.0, -1.0]]}, "not negative and sum to 1, found a sum of 1"),
        ({"image_id": ["a"], "probabilities": [[3.0, 2.0, 1.0]]}, "found a sum of 6 for image a"),
    ],
)
def test_predictions_that_are_none_are_refused(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        predicted(tmp_path, **columns)


def test_predictions_may_lie_on_an_object_store(tmp_path: Path) -> None:
    file = tmp_path / "predictions.parquet"
    pq.write_table(pa.table({"image_id": ["a", "b"], "class": ["cow", "ant"]}), file)
    with ObjectStore() as store:
        storage.write_bytes(store.uri("told/p.parquet"), file.read_bytes())
        assert read_predictions(store.uri("told/p.parquet"), LISTING).equals(read_predictions(str(file), LISTING))


def test_predictions_reach_codes_and_decide_the_plan(tiny_digits_model: Path, tmp_path: Path) -> None:
    from clarity.model import load_model

    model, dataset = load_model(tiny_digits_model), data.open_dataset("digits", split="test")
    everything = data.list_images(dataset)
    ids = everything["image_id"].to_pylist()
    probs = np.eye(10, dtype=np.float32)[[3, 5, 8]]
    plans, file = [], str(tmp_path / "predictions.parquet")
    for shift in (0, 1):
        told = pa.table({"image_id": [ids[2], ids[0], "stranger"], "probabilities": np.roll(probs, shift, 1).tolist()})
        pq.write_table(told, file)
        listing = add_predictions(everything.slice(0, 4), read_predictions(file, everything), model.class_names)
        config = SearchConfig(max_steps=3)
        plans.append(make_plan(model, dataset, listing, method="clarity", config=config, shard_rows=2))
    assert plans[0].fingerprint != plans[1].fingerprint
    assert Plan.from_json(json.loads(json.dumps(plans[1].to_json()))).codes_schema() == plans[1].codes_schema()
    uri = str(tmp_path / "audit")
    with claim(uri, plans[1], str(tiny_digits_model)) as held:
        work = Work(uri, held.run, plans[1], dataset, model.preprocessing)
        for shard in range(2):
            write_shard(ExplainShard(work, threads=1)(read_shard(item(listing, work, shard), work)), work)
        found = verify(uri, redecode=redecoder(uri))
        assert found.ok, found.problems
        codes = read_audit(uri).codes.to_table()
        assert codes["prediction"].to_pylist() == [6, None, 4, None]
        assert codes["prediction_probs"].to_pylist()[2] == np.eye(10)[4].tolist()
        summary = read_audit(uri).summary()
        agree = sum(a == b for a, b in zip(codes["prediction"].to_pylist(), codes["source"].to_pylist()))
        assert summary["predictions"] == {"images": 2, "agree": agree}
        assert summary["left_out"] == {"predictions for images that are not in the data": 1}


def test_class_indices_prefers_names() -> None:
    assert class_indices("all", ("1", "0")) is None
    assert class_indices(["0"], ("1", "0")) == (1,)
    assert class_indices([0, "0", 0], ("1", "0")) == (0, 1)


# ---- the workers of a job ------------------------------------------------------------------------------------------


@pytest.fixture
def work(tiny_digits_model: Path, tmp_path: Path) -> Any:
    """The work on 12 digits, claimed, in shards of 5."""
    from clarity.model import load_model

    model = load_model(tiny_digits_model)
    dataset = data.open_dataset("digits", split="test")
    listing = data.list_images(dataset).slice(0, 12)
    plan = make_plan(model, dataset, listing, method="clarity", config=SearchConfig(max_steps=8), shard_rows=5, trace=6)
    uri = str(tmp_path / "audit")
    with claim(uri, plan, str(tiny_digits_model)) as held:
        yield Work(uri, held.run, plan, dataset, model.preprocessing), listing


def item(listing: pa.Table, work: Work, shard: int) -> pa.Table:
    span = work.plan.shards[shard]
    return pa.Table.from_pylist([shard_item(shard, listing[span["start"] : span["stop"]])])


def note_of(batch: pa.Table) -> dict[str, Any]:
    assert len(batch) == 1
    return json.loads(batch["note"][0].as_py())


def test_workers_fill_an_audit(work: Any) -> None:
    work, listing = work
    explainer = ExplainShard(work, threads=1)
    for shard in range(3):
        images = read_shard(item(listing, work, shard), work)
        ended = write_shard(explainer(images), work)
        assert ended.column_names == ["shard", "note"]
        note = note_of(ended)
        assert "error" not in note
        assert {"read", "encode", "search", "decode", "reencode", "pictures", "write"} <= set(note["seconds"])
    found = verify(work.uri, redecode=redecoder(work.uri))
    assert found.ok, found.problems
    assert (found.images, found.pairs) == (12, 12 * 9)
    assert found.redecoded > 100
    traces = read_audit(work.uri).traces
    assert traces is not None
    assert len(set(traces.to_table()["image_id"].to_pylist())) == 6


def test_readers_and_writers_do_not_load_torch() -> None:
    code = "import sys, clarity.worker; print([name for name in ('torch', 'ray') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert run.stdout.strip() == "[]", run.stderr


def test_work_travels_without_torch(work: Any) -> None:
    code = "import pickle, sys; pickle.load(sys.stdin.buffer); sys.exit('torch' in sys.modules)"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], input=pickle.dumps(work[0]), cwd=root).returncode == 0


def test_workers_turn_exceptions_into_notes(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    work, listing = work
    first = item(listing, work, 0)
    monkeypatch.setattr(data, "read_images", lambda *_: 1 / 0)
    failed = read_shard(first, work)
    note = note_of(write_shard(ExplainShard(work)(failed), work))
    assert note == {"stage": "read", "error": "ZeroDivisionError: division by zero"}
    assert [note_of(read_shard(first, work)).get("given_up") for _ in range(3)] == [None, None, True]


def test_workers_survive_a_panic(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3 has it, beside Exception."""

    def panic(*_: Any) -> None:
        raise PanicException("planted")

    work, listing = work
    monkeypatch.setattr(data, "read_images", panic)
    assert note_of(read_shard(item(listing, work, 0), work)) == {"stage": "read", "error": "PanicException: planted"}


def test_workers_count_a_death_as_an_attempt(work: Any) -> None:
    work, listing = work
    images = read_shard(item(listing, work, 1), work)
    for _ in range(MAX_ATTEMPTS):
        begin_attempt(work.uri, work.run, 1, "explain")  # and no end to it
    note = note_of(ExplainShard(work, threads=1)(images))
    assert note["given_up"]
    assert "died" in note["error"]


def test_workers_do_not_repeat_what_is_committed(work: Any) -> None:
    work, listing = work
    images = read_shard(item(listing, work, 0), work)
    explained = ExplainShard(work, threads=1)(images)
    write_shard(explained, work)
    assert note_of(ExplainShard(work, threads=1)(images)) == {"committed": True}
    assert note_of(write_shard(explained, work)) == {"committed": True}


def test_workers_say_what_a_broken_model_lacks(work: Any) -> None:
    work, listing = work
    Path(work.uri, "model", "vae.safetensors").unlink()
    note = note_of(ExplainShard(work, threads=1)(read_shard(item(listing, work, 0), work)))
    assert note["stage"] == "explain"
    assert "vae.safetensors" in note["error"]


def test_workers_refuse_another_model_than_the_plans(work: Any, model: Model) -> None:
    work, listing = work
    save_model(model, Path(work.uri, "model"), card={})  # whole, and with sums of its own
    note = note_of(ExplainShard(work, threads=1)(read_shard(item(listing, work, 0), work)))
    assert note["stage"] == "explain"
    assert "expected the model of the plan" in note["error"]


def test_decode_gives_the_pictures_back(work: Any, tiny_digits_model: Path) -> None:
    work, listing = work
    write_shard(ExplainShard(work, threads=1)(read_shard(item(listing, work, 0), work)), work)
    opened = clarity.read_audit(work.uri)
    rows = opened.counterfactuals.to_table()
    shown = decode_png(rows["x_cf"], (1, 28, 28))
    assert (clarity.decode(opened, rows) == shown).all()
    assert clarity.decode(work.uri, opened.codes.to_table(), column="z").shape == (5, 1, 28, 28)


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


def test_probe_measures(tiny_digits_model: Path) -> None:
    dataset = data.open_dataset("digits", split="test")
    rows = data.list_images(dataset).slice(0, 4)
    config = SearchConfig(max_steps=5)
    found = probe(str(tiny_digits_model), dataset, rows, method="clarity", config=config, threads=1)
    assert found["seconds_per_image"] > 0
    assert found["bytes_per_image"] > 9 * 150
    slow = probe(str(tiny_digits_model), dataset, rows, steps=1, method="clarity", config=config, threads=1)
    assert slow["pairs_per_second"] > 0
