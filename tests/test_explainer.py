"""The explainer: rows do not depend on each other, and columns hold what the schema says."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from predictors import as_predictor, constant

from clarity import schema
from clarity.checks import Check
from clarity.classifiers import LatentEnsemble
from clarity.explainer import Explained, Explainer, quantise
from clarity.ids import fold_of, noise
from clarity.images import decode_png
from clarity.judges import build_judge, predict_probs
from clarity.methods import METHODS
from clarity.model import Model
from clarity.rows import decode_rows, encode_rows, logits_rows
from clarity.search import SearchConfig
from clarity.tables import l1
from clarity.uncertainty import decompose

CONFIG = SearchConfig(min_target_prob=0.32, max_steps=12, learning_rate=0.3)
ROWS = 9
IDS = ["i0", "i1", "i10", "i2", "nn", "o", "pp", "q", "r33"]


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


def explain(
    model: Model, method: str = "clarity", config: SearchConfig = CONFIG, ids: list[str] = IDS, **options: Any
) -> Explained:
    """The tables of one shard."""
    broken = options.pop("broken", ())
    return Explainer(model, method, config, threads=1, **options).explain_shard(shard_of(model, ids, broken))


def rows_of(table: pa.Table, keys: tuple[str, ...]) -> dict[Any, Any]:
    return {tuple(row[key] for key in keys): row for row in table.to_pylist()}


def keys_of(name: str) -> tuple[str, ...]:
    return ("image_id",) if name == "codes" else ("target", "image_id")


def same_in_any_shard(explainer: Explainer) -> Explained:
    """The tables of one shard, whose rows are the same in other shards."""
    whole = explainer.explain_shard(shard_of(explainer.model, IDS))
    cuts = {
        "alone": [[name] for name in IDS],
        "in threes": [IDS[i : i + 3] for i in range(0, len(IDS), 3)],
        "shuffled": [np.random.default_rng(0).permutation(IDS).tolist()],
        "among strangers": [IDS[:4] + [f"stranger{i}" for i in range(40)] + IDS[4:]],
    }
    for how, shards in cuts.items():
        parts = [explainer.explain_shard(shard_of(explainer.model, shard)) for shard in shards]
        for name in ("codes", "counterfactuals"):
            found = rows_of(pa.concat_tables([getattr(part, name) for part in parts]), keys_of(name))
            expected = rows_of(getattr(whole, name), keys_of(name))
            assert {key: found[key] for key in expected} == expected, f"{name}, {how}"
    return whole


@pytest.mark.parametrize("method", ["clarity", "revise_e", "schut"])
def test_explainer_rows_do_not_depend_on_their_shard(model: Model, method: str) -> None:
    same_in_any_shard(Explainer(model, method, CONFIG, threads=1))


@pytest.fixture
def explained(model: Model) -> Any:
    return explain(model, broken=("q",))


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


def test_judge_sees_the_written_images_in_any_shard(model: Model) -> None:
    torch.manual_seed(3)
    judge = build_judge(model.image_shape, model.num_classes).eval()
    explainer = Explainer(replace(model, judge=judge), "clarity", CONFIG, threads=1)
    pairs = explainer.explain_shard(shard_of(model, IDS)).counterfactuals
    x = decode_png(pairs["x_cf"], model.image_shape)
    probs = predict_probs(judge, x)
    target = pairs["target"].to_numpy()
    assert np.allclose(pairs["judge_target_prob"].to_numpy(), probs[np.arange(len(target)), target], atol=1e-5)
    assert (pairs["judge_class"].to_numpy() == probs.argmax(1)).all()
    alone = explainer.explain_shard(shard_of(model, IDS[:1])).counterfactuals
    first = pairs.filter(pc.equal(pairs["image_id"], IDS[0]))
    assert alone["judge_target_prob"].equals(first["judge_target_prob"])
    without = explain(model).counterfactuals
    assert without["judge_class"].null_count == len(without)
    assert without.drop(["judge_class", "judge_target_prob"]).equals(pairs.drop(["judge_class", "judge_target_prob"]))


@pytest.mark.parametrize("method", METHODS)
def test_converged_is_what_the_probability_says(model: Model, method: str) -> None:
    pairs = explain(model, method).counterfactuals
    final, converged = pairs["target_prob_final"].to_numpy(), pairs["converged"].to_numpy()
    assert (converged == (final > np.float32(CONFIG.min_target_prob))).all()
    assert 0 < converged.sum() < len(pairs) or METHODS[method].classifies_images
    assert set(pairs["method"].to_pylist()) == {method}
    single = METHODS[method].classifier.endswith("member")
    for name in ("epistemic_initial", "epistemic_final"):
        assert pairs[name].null_count == (len(pairs) if single else 0)


def test_initial_values_of_a_sampled_start_are_those_of_the_sample(model: Model) -> None:
    explained = explain(model, "revise_e")
    codes = explained.codes
    x = torch.tensor(decode_png(codes["x"], model.image_shape)) / 255
    z, log_var = encode_rows(model.vae, x)
    start = z + torch.exp(log_var / 2) * torch.tensor(noise(codes["image_id"].to_pylist(), 5))
    assert model.image_ensemble is not None
    logits = logits_rows(model.image_ensemble, decode_rows(model.vae, start))
    expected = dict(zip(codes["image_id"].to_pylist(), decompose(logits).predictive.tolist()))
    found = rows_of(explained.counterfactuals, ("target", "image_id"))
    assert all(row["predictive_initial"] == pytest.approx(expected[name], abs=1e-6) for (_, name), row in found.items())


def test_image_space_methods_keep_the_code_of_their_image(model: Model) -> None:
    pairs = explain(model, "fgsm").counterfactuals
    shown = torch.tensor(decode_png(pairs["x_cf"], model.image_shape)) / 255
    assert (schema.matrix(pairs["z_cf"]) == encode_rows(model.vae, shown)[0].numpy()).all()


def test_distances_of_images_on_a_device_are_summed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[torch.Size] = []
    monkeypatch.setattr("clarity.tables.to_numpy", lambda tensor: fetched.append(tensor.shape))
    images = torch.rand((5, 3, 8, 12), device="meta")
    l1(images, images)
    assert fetched == [(5,)]


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
    explained = explain(model, only="misclassified")
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
    explained = explain(model, ids=["a", "b"], targets=[1])
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
    shard = shard_of(model, IDS, ("q",)).append_column("smiling", pa.array([i % 2 for i in range(ROWS)], pa.int8()))
    shard = shard.append_column("guess", pa.array([f"g{i}" for i in IDS]))
    codes = Explainer(model, "clarity", CONFIG, threads=1).explain_shard(shard).codes
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


def test_explainer_leaves_the_model_and_the_threads_of_its_caller(model: Model) -> None:
    before = torch.get_num_threads()
    explainer = Explainer(model, device="meta", threads=before + 1)
    assert (model.device.type, explainer.model.device.type) == ("cpu", "meta")
    assert torch.get_num_threads() == before
    assert Explainer(model, device="cpu").model is model


def test_thresholds_of_classes_decide_convergence(model: Model) -> None:
    thresholds = [0.3, 0.4, 0.5, 0.999]
    explained = explain(model, min_target_probs=thresholds)
    rows = explained.counterfactuals.to_pylist()
    for row in rows:
        assert row["converged"] == (row["target_prob_final"] > np.float32(thresholds[row["target"]]))
    assert {row["target"] for row in rows if row["converged"]} == {0, 1, 2}


LADDER = SearchConfig(min_target_prob=0.32, max_steps=200, learning_rate=0.3)


def far(distance: float) -> Check:
    """A check that points nearer to 1 pass more often, even those of a model that learned nothing."""
    return lambda written, target: written.distance_x_l1 > distance


@pytest.mark.parametrize("method", ["clarity", "latent", "schut"])
def test_rungs_change_only_pairs_that_fail_a_check(model: Model, method: str) -> None:
    shard = shard_of(model, IDS)
    explainer = Explainer(model, method, LADDER, threads=1)
    plain = rows_of(explainer.explain_shard(shard).counterfactuals, keys_of(""))
    assert all(row["confirmed"] is None and row["rungs"] == 0 for row in plain.values())
    distance = float(np.quantile([row["distance_x_l1"] for row in plain.values() if row["converged"]], 0.6))
    explainer.checks = [far(distance), far(0)]
    rows = rows_of(explainer.explain_shard(shard).counterfactuals, keys_of(""))
    for key, row in rows.items():
        assert row["confirmed"] == (row["distance_x_l1"] > np.float32(distance))
        if row["rungs"] == 0 or not row["confirmed"]:  # past the last rung, too, the first result stays
            assert {**row, "rungs": 0, "confirmed": None} == plain[key]
        else:
            assert row["converged"] and plain[key]["steps"] < row["steps"] <= LADDER.max_steps
            assert row["target_prob_final"] > 1 - (1 - LADDER.min_target_prob) / 3 ** row["rungs"]
            assert row["target_prob_initial"] == plain[key]["target_prob_initial"]
    assert method == "schut" or {row["rungs"] for row in rows.values() if row["confirmed"]} >= {0, 1}
    assert method != "clarity" or {row["rungs"] for row in rows.values() if not row["confirmed"]} - {0}


def test_rungs_do_not_depend_on_the_shard(model: Model) -> None:
    explainer = Explainer(model, "clarity", LADDER, threads=1)
    first = explainer.explain_shard(shard_of(model, IDS)).counterfactuals
    explainer.checks = [far(float(np.quantile(first["distance_x_l1"].to_numpy()[first["converged"].to_numpy()], 0.6)))]
    pairs = same_in_any_shard(explainer).counterfactuals.to_pylist()
    assert len({row["rungs"] for row in pairs if row["confirmed"]}) > 1


@pytest.mark.parametrize("witness", ["reencoded", "judge"])
def test_least_probabilities_are_asked_of_the_written_image(model: Model, witness: str) -> None:
    torch.manual_seed(1)
    judged = replace(model, judge=build_judge(model.image_shape, model.num_classes).eval())
    plain = Explainer(judged, "clarity", LADDER, threads=1).explain_shard(shard_of(model, IDS)).counterfactuals
    least = float(np.quantile(plain[f"{witness}_target_prob"].to_numpy(), 0.5))
    asked: dict[str, Any] = {f"min_{witness}_prob": least}
    checked = Explainer(judged, "clarity", LADDER, threads=1, **asked)
    rows = checked.explain_shard(shard_of(model, IDS)).counterfactuals.to_pylist()
    assert {row["confirmed"] for row in rows} == {True, False} and any(row["rungs"] for row in rows)
    for row in rows:
        assert row["confirmed"] == (row[f"{witness}_target_prob"] >= np.float32(least))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"min_target_probs": [0.9, 0.9]}, "expected 4 thresholds, got 2"),
        ({"min_reencoded_prob": 1.0}, "min_reencoded_prob: expected at least 0 and less than 1, got 1"),
        ({"min_judge_prob": 0.5}, "min_judge_prob: expected a model with a judge, got one without"),
        ({"min_predictor_prob": 2, "predictor": "mine"}, "min_predictor_prob: expected at least 0 and less than 1"),
        ({"predictor": "other"}, "with ant, bee, cow, elk, which differ in 'dog'"),
    ],
)
def test_explainer_refuses_what_it_cannot_ask(model: Model, asked: dict[str, Any], message: str) -> None:
    predictors = {"mine": their_model(model), "other": constant(["ant", "bee", "cow", "elk"], 0), None: None}
    with pytest.raises(ValueError, match=message):
        Explainer(model, **asked | {"predictor": predictors[asked.get("predictor")]})


def their_model(model: Model) -> Any:
    """A model of the user's that decides by the brightness of a quarter of the image."""

    def call(pixels: np.ndarray) -> np.ndarray:
        halves = pixels.reshape(len(pixels), 2, 4, 2, 6).mean((2, 4)).reshape(len(pixels), 4) / 16
        odds = np.exp(halves - halves.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    return as_predictor(call, model.class_names)


def test_predictor_is_the_explained_model(model: Model) -> None:
    predictor = their_model(model)
    shard = shard_of(model, IDS, broken=("q",))
    explained = Explainer(model, "clarity", LADDER, predictor=predictor, threads=1).explain_shard(shard)
    codes = explained.codes.filter(pc.equal(explained.codes["status"], "ok"))
    probs = predictor(decode_png(codes["x"], model.image_shape))
    assert schema.matrix(codes["prediction_probs"]) == pytest.approx(probs, abs=1e-6)
    assert codes["prediction"].to_pylist() == codes["source"].to_pylist() == probs.argmax(1).tolist()
    assert codes["source_name"].to_pylist() == [model.class_names[k] for k in probs.argmax(1)]
    assert explained.codes["prediction"].null_count == 1
    ensemble = schema.matrix(codes["probs"]).argmax(1)
    assert (ensemble != probs.argmax(1)).any()
    pairs = explained.counterfactuals
    assert len(pairs) == 3 * len(codes) and not pc.any(pc.equal(pairs["source"], pairs["target"])).as_py()
    row = {image_id: i for i, image_id in enumerate(codes["image_id"].to_pylist())}
    image = [row[image_id] for image_id in pairs["image_id"].to_pylist()]
    target = pairs["target"].to_numpy()
    reconstruction = decode_rows(model.vae, torch.tensor(schema.matrix(codes["z"])))
    final = predictor(decode_png(pairs["x_cf"], model.image_shape))
    for name, values in (
        ("initial", probs[image]),
        ("reconstruction", predictor(quantise(reconstruction))[image]),
        ("final", final),
    ):
        column = pairs[f"prediction_target_prob_{name}"].to_numpy()
        assert column == pytest.approx(values[np.arange(len(target)), target], abs=1e-6)
    passed = (final.argmax(1) == target) & (final[np.arange(len(target)), target] >= 0.5)
    started = ensemble[image] == target
    confirmed, rungs = pairs["confirmed"].to_numpy(), pairs["rungs"].to_numpy()
    assert (confirmed == passed)[~started].all() and not (confirmed & ~passed).any()
    assert started.any() and not (confirmed & started & (rungs == 0)).any()


@pytest.mark.parametrize("config", [LADDER, replace(LADDER, max_steps=1, min_target_prob=0.9)])
def test_pair_that_the_ensemble_sees_as_its_target_at_the_start_is_searched_again_and_loses_nothing(
    model: Model, config: SearchConfig
) -> None:
    explainer = Explainer(model, "clarity", config, predictor=their_model(model), threads=1)
    explainer.checks = [far(0.0)]
    explained = explainer.explain_shard(shard_of(model, IDS))
    ensemble = dict(zip(explained.codes["image_id"].to_pylist(), schema.matrix(explained.codes["probs"]).argmax(1)))
    rows = explained.counterfactuals.to_pylist()
    started = [row for row in rows if ensemble[row["image_id"]] == row["target"]]
    assert all(row["confirmed"] == (row["steps"] > 0) for row in rows)
    if config.max_steps == 1:
        assert any(row["confirmed"] and not row["converged"] and row["rungs"] == 0 for row in started)
    else:
        assert all(row["rungs"] > 0 or row["steps"] == config.max_steps for row in started)


def test_image_without_an_answer_of_the_predictor_is_an_error_row_and_such_a_picture_is_not_confirmed(
    model: Model,
) -> None:
    shard = shard_of(model, IDS)
    silent, theirs = schema.matrix(shard["image"])[3], their_model(model)

    def call(pixels: np.ndarray) -> np.ndarray:
        drawn = pixels.std((1, 2, 3)) < 50  # the images are noise
        probs = np.where(drawn[:, None], [0.1, 0.7, 0.1, 0.1], theirs(pixels))
        probs[[row.tobytes() == silent.tobytes() for row in pixels]] = np.nan
        probs[drawn & (pixels.sum((1, 2, 3)) % 2 == 0)] = np.inf
        return probs

    predictor = as_predictor(call, model.class_names)
    explained = Explainer(model, "clarity", LADDER, predictor=predictor, threads=1).explain_shard(shard)
    row = rows_of(explained.codes, ("image_id",))[(IDS[3],)]
    assert (row["status"], row["error"]) == ("error", "the predictor answers NaN or an infinity")
    assert IDS[3] not in explained.counterfactuals["image_id"].to_pylist()
    pairs = explained.counterfactuals
    unanswered = decode_png(pairs["x_cf"], model.image_shape).sum((1, 2, 3)) % 2 == 0
    assert 0 < unanswered.sum() < len(pairs)
    assert (pairs["prediction_target_prob_final"].is_null().to_numpy() == unanswered).all()
    confirmed = pairs["confirmed"].to_numpy()
    assert confirmed.any() and not (confirmed & unanswered).any()


def test_predictor_sees_the_original_in_its_own_size(model: Model) -> None:
    shown: list[np.ndarray] = []

    def call(pixels: np.ndarray) -> np.ndarray:
        shown.append(pixels)
        return np.tile([0.4, 0.3, 0.2, 0.1], (len(pixels), 1))

    wide = as_predictor(call, model.class_names, mode="RGB", size=(10, 14))
    shard = shard_of(model, IDS)
    originals = np.random.default_rng(1).integers(0, 256, (ROWS, 3, 10, 14), np.uint8)
    column = schema.fixed_size_list(originals.reshape(ROWS, -1))
    Explainer(model, config=CONFIG, predictor=wide, threads=1).explain_shard(
        shard.append_column(schema.PREDICTOR_IMAGE, column)
    )
    assert all(pixels.shape[1:] == (3, 10, 14) for pixels in shown)
    assert (shown[1][:ROWS] == originals).all()  # the first call is about the fixed images of the digest


def test_predictor_rows_do_not_depend_on_the_shard(model: Model) -> None:
    same_in_any_shard(Explainer(model, "clarity", LADDER, predictor=their_model(model), threads=1))
