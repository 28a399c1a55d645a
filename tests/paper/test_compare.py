"""The comparison: audits, controls and outside images judged alike, summed up and drawn."""

import dataclasses
import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from audits import fill, make_tables, write_audit
from jobfiles import load_job
from pictures import opened

from clarity import data, judges
from clarity import model as checkpoints
from clarity.audit.commits import claim, to_parquet
from clarity.audit.read import ATTRIBUTES_FILE, read_audit
from clarity.classifiers import EnsembleConfig, ImageEnsemble
from clarity.images import Preprocessing
from clarity.methods import METHODS
from clarity.paper import claims, compare, evaluators, figures, metrics, tables
from clarity.planning import make_plan
from clarity.report.page import write_report
from clarity.rows import decode_rows
from clarity.search import SearchConfig
from clarity.vae import VAE
from clarity.worker import Work

ROOT = Path(__file__).parents[2]
COUNT, METHODS_TRIED = 10, ("clarity", "revise_e", "fgsm", "schut", "latent", "revise", "revise_e_latent")
CONFIG = SearchConfig(max_steps=6, min_target_prob=0.4)


@pytest.fixture(scope="module")
def root(tiny_digits_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with image classifiers, a sample, an audit of each method, and judges; nothing of it is any good."""
    root = tmp_path_factory.mktemp("compare")
    model = checkpoints.load_model(tiny_digits_model)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        shape = EnsembleConfig(num_classes=10, latent_dim=5, hidden=(6, 7), num_members=2)
        model.image_ensemble = ImageEnsemble(shape, model.vae.config).eval()
    checkpoints.save_model(model, root / "model", card={})
    tested = data.open_dataset("digits", None, "test")
    compare.sample_images(tested, model.preprocessing, COUNT, str(root / "sample.parquet"))
    for method in METHODS_TRIED:
        explained(root, method, str(root / "audits" / method), *opened("parquet", root / "sample.parquet", "test"))
    jury = evaluators.Judges(model.image_shape, model.class_names)
    evaluators.save_judges(jury, str(root / "judges"))
    return root


def explained(root: Path, method: str, uri: str, dataset: data.Dataset, listing: pa.Table) -> None:
    """What explain_all.py would write, without Ray."""
    model = checkpoints.load_model(root / "model")
    plan = make_plan(model, dataset, listing, method=method, config=CONFIG, shard_rows=4)
    with claim(uri, plan, str(root / "model")) as held:
        fill(Work(uri, held.run, plan, dataset, model.preprocessing), listing)


@dataclasses.dataclass
class Bench:
    """A model, untrained judges and real images."""

    model: Any
    judges: evaluators.Judges
    real: metrics.Reality

    def results(self, root: Path, method: str = "clarity") -> compare.Results:
        return compare.results_of_audit(self.model, method, str(root / "audits" / method))

    def score(self, results: compare.Results, chosen: set[str] | None = None) -> pa.Table:
        chosen = set(results.images.ids.tolist()) if chosen is None else chosen
        return compare.score(results, self.judges, self.real, chosen)


@pytest.fixture()
def bench(root: Path) -> Bench:
    model = checkpoints.load_model(root / "model")
    judges = evaluators.load_judges(str(root / "judges"))
    pixels = np.random.default_rng(0).integers(0, 256, (120, *model.image_shape)).astype(np.uint8)
    real = metrics.split_reality(judges, pixels, np.arange(120) % 10)
    return Bench(model, judges, real)


def test_sample_takes_as_many_of_each_class(root: Path) -> None:
    sample = pq.read_table(root / "sample.parquet")
    assert sorted(sample["label"].to_pylist()) == [str(k) for k in range(10)]
    dataset = data.open_dataset("parquet", root / "sample.parquet", "test")
    pixels, ids, labels, errors = data.read_all(
        dataset, data.list_images(dataset), checkpoints.load_model(root / "model").preprocessing
    )
    tested = data.open_dataset("digits", None, "test")
    listing = data.list_images(tested)
    rows = [listing["image_id"].to_pylist().index(name) for name in ids]
    truth = data.read_all(tested, listing.take(rows), Preprocessing("L", 28, 28))
    assert np.array_equal(pixels, truth[0]) and labels == truth[2] and not errors


def test_sample_of_something_else_is_not_taken(root: Path) -> None:
    uri, preprocessing = str(root / "sample.parquet"), Preprocessing("L", 28, 28)
    before = Path(uri).read_bytes()
    compare.sample_images(data.open_dataset("digits", None, "test"), preprocessing, COUNT, uri)
    assert Path(uri).read_bytes() == before
    with pytest.raises(ValueError, match="choose another directory"):
        compare.sample_images(data.open_dataset("digits", None, "train"), preprocessing, COUNT, uri)


def test_results_of_an_audit_are_what_it_holds(bench: Bench, root: Path) -> None:
    for method in ("clarity", "fgsm", "revise"):
        found = bench.results(root, method)
        table = read_audit(root / "audits" / method).counterfactuals.to_table()
        assert len(found.of) == len(table) == COUNT * 9
        assert found.images.ids[found.of].tolist() == table["image_id"].to_pylist()
        assert np.array_equal(found.images.source[found.of], table["source"].to_numpy())
        assert np.array_equal(found.columns["steps"], table["steps"].to_numpy())
        members = {"clarity": 3, "fgsm": 1, "revise": 1}[method]
        assert np.array_equal(found.columns["gradient_evaluations"], table["steps"].to_numpy() * members)
        # Who is sure of the target sees it: more than half of the probability leaves no room for another class.
        sure = table["target_prob_final"].to_numpy() > 0.55
        assert (found.columns["argmax_validity"][sure] == 1).all()
        z = torch.from_numpy(found.images.z)
        drawn = decode_rows(bench.model.vae, z).numpy() * 255
        assert np.abs(drawn - found.images.reconstruction).max() <= 0.5


def test_audit_of_another_model_or_method_is_refused(bench: Bench, root: Path) -> None:
    with pytest.raises(ValueError, match="audit of latent"):
        compare.results_of_audit(bench.model, "latent", str(root / "audits" / "clarity"))
    bench.model.fingerprint = "another"
    with pytest.raises(ValueError, match="another"):
        bench.results(root, "clarity")


def test_attributes_of_an_audit_are_what_the_net_sees(bench: Bench, root: Path) -> None:
    attributes = ("smiling", "hat_9", "young")  # the second speaks of a class
    bench.judges = evaluators.Judges(bench.model.image_shape, bench.model.class_names, attributes)
    net = bench.judges.attribute_net
    assert net is not None
    found = bench.results(root, "clarity")
    table = compare.attribute_table(found, bench.judges)
    assert table.num_rows == 2 * len(found.of) and set(table["attribute"].to_pylist()) == {"smiling", "young"}
    row = {name: values[5] for name, values in table.to_pydict().items()}  # of the third pair
    index = found.images.row[row["image_id"]]
    assert row["attribute"] == "young" and found.of[2] == index and row["target"] == found.target[2]
    for name, image in (
        ("prob_image", found.images.x[index]),
        ("prob_initial", found.images.reconstruction[index]),
        ("prob_final", found.x_cf[2]),
    ):
        assert row[name] == pytest.approx(judges.predict_probs(net, image[None], sigmoid=True)[0, 2], abs=1e-5)


def test_report_says_which_attributes_of_an_audit_drift(tmp_path: Path) -> None:
    tables = make_tables()
    uri = write_audit(tmp_path / "audit", tables)
    assert "attributes" not in {finding.kind for finding in write_report([uri]).findings}
    pairs = tables.counterfactuals.select(["image_id", "target"])
    smiling = pairs.append_column("attribute", pa.array(["smiling"] * len(pairs)))
    for name, value in (("prob_initial", 0.2), ("prob_final", 0.9)):
        smiling = smiling.append_column(name, pa.array(np.full(len(pairs), value, np.float32)))
    (tmp_path / "audit" / ATTRIBUTES_FILE).write_bytes(to_parquet(smiling))
    (found,) = (finding for finding in write_report([uri]).findings if finding.kind == "attributes")
    assert "“smiling”" in found.title


def test_controls_answer_the_same_questions(bench: Bench, root: Path) -> None:
    like = bench.results(root, "clarity")
    original, drawn, real = (compare.control_results(name, like, bench.model, bench.real) for name in compare.CONTROLS)
    assert np.array_equal(original.x_cf, like.images.x[like.of])
    assert original.columns["reencoded_agreement"].sum() == 0 and np.allclose(original.columns["l1_z"], 0, atol=1e-4)
    assert np.array_equal(drawn.x_cf, like.images.reconstruction[like.of])
    for p in range(0, len(real.of), 7):
        assert any(np.array_equal(real.x_cf[p], image) for image in bench.real.images[real.target[p]])
    again = compare.control_results("real image", like, bench.model, bench.real)
    assert np.array_equal(real.x_cf, again.x_cf) and len(np.unique(real.x_cf.reshape(len(real.of), -1), axis=0)) > 20
    table = bench.score(drawn)
    assert np.allclose(table["l1_reconstruction"].to_numpy(), 0) and (table["l1_x"].to_numpy() > 0).all()


def test_methods_are_compared_on_the_images_that_all_answer_for(bench: Bench, root: Path) -> None:
    wide = bench.results(root, "clarity")
    ids = wide.images.ids
    narrow = compare.restrict(wide, {ids[2], ids[5]})
    assert set(narrow.of.tolist()) == {2, 5} and len(narrow.x_cf) == len(narrow.columns["steps"]) == 2 * 9
    assert np.array_equal(narrow.x_cf, wide.x_cf[np.isin(wide.of, [2, 5])])
    assert compare.common_images([narrow, wide]) == {ids[2], ids[5]} and compare.restrict(wide, set(ids)) is wide
    # However many images the methods share, the slowest metric has a limit.
    some = compare.common_images([wide, wide], 4)
    assert len(some) == 4 and some < set(ids)
    swap = bench.score(wide, some)["cout"].to_numpy()
    assert np.array_equal(np.isnan(swap), ~np.isin(ids[wide.of], list(some)))


def test_grids_show_images_that_all_methods_answer_for(bench: Bench, root: Path) -> None:
    wide, other = bench.results(root, "schut"), bench.results(root, "clarity")
    threes = {wide.images.ids[b] for b in np.flatnonzero(wide.images.label == 3)}
    drawn: dict[str, Any] = {}
    both = {"schut": compare.restrict(wide, threes), "clarity": compare.restrict(other, threes)}
    figures.draw_tables(drawn.__setitem__, bench.model.class_names, both)
    axes = drawn["table1"].axes  # one row, of 3 → 8: the other images are not compared
    assert [ax.get_title() for ax in axes] == ["original", "Schut", "Clarity"] and all(ax.images for ax in axes)
    assert axes[0].get_ylabel() == "3 → 8" and "examples" not in drawn


def test_outside_images_are_judged_in_the_same_table(bench: Bench, root: Path, tmp_path: Path) -> None:
    like = bench.results(root, "clarity")
    chosen = np.arange(0, len(like.of), 5)
    ids = [*like.images.ids[like.of[chosen]], "nobody"]
    target = [str(k) for k in (*like.target[chosen], 3)]
    pixels = np.concatenate([like.x_cf[chosen], like.x_cf[:1]])
    uri = tmp_path / "theirs.npz"
    np.savez(uri, image_id=np.array(ids), target=np.array(target), image=(pixels / 255).astype(np.float32)[:, 0])
    found = compare.external_results("theirs", str(uri), like, bench.model)
    assert np.array_equal(found.x_cf, like.x_cf[chosen]) and np.array_equal(found.target, like.target[chosen])
    ours, theirs = bench.score(like).take(chosen), bench.score(found)
    for name in ("oracle_agreement", "im1", "im2", "implausibility", "l1_x", "cout"):
        assert np.allclose(ours[name].to_numpy(), theirs[name].to_numpy(), rtol=1e-3, atol=1e-4), name
    assert np.array_equal(ours["reencoded_agreement"].to_numpy(), theirs["reencoded_agreement"].to_numpy())
    assert "strict_validity" not in theirs.column_names


@pytest.mark.parametrize(
    ("change", "message"),
    [({"image": None}, "missing: image"), ({"target": "eleven"}, "eleven"), ({"image_id": "x"}, "no counterfactual")],
)
def test_outside_images_that_cannot_be_judged_are_refused(
    change: dict[str, Any], message: str, bench: Bench, root: Path, tmp_path: Path
) -> None:
    like = bench.results(root, "clarity")
    good = {"image_id": like.images.ids[0], "target": "1", "image": np.zeros((28, 28), np.uint8)}
    content = {name: np.array([value]) for name, value in (good | change).items() if value is not None}
    np.savez(tmp_path / "theirs.npz", **content)
    with pytest.raises(ValueError, match=message):
        compare.external_results("theirs", str(tmp_path / "theirs.npz"), like, bench.model)


def test_summary_weighs_class_pairs_by_their_pairs(bench: Bench, root: Path) -> None:
    scored = {method: bench.score(bench.results(root, method)) for method in ("clarity", "fgsm")}
    rows = tables.summary(scored, bench.real, bench.model)
    overall = {row["method"]: row for row in rows if row["source"] is None}
    assert {name: (row["num_images"], row["members"]) for name, row in overall.items()} == {
        "clarity": (COUNT, 3), "fgsm": (COUNT, 1)
    }  # fmt: skip
    assert overall["fgsm"]["epistemic_final"] is None and overall["clarity"]["epistemic_final"] > 0
    assert overall["clarity"]["frechet_distance"] is None
    pairs = [row for row in rows if row["method"] == "clarity" and row["source"] is not None]
    assert sum(row["num_pairs"] for row in pairs) == COUNT * 9
    mean = sum(row["l1_x"] * row["num_pairs"] for row in pairs) / (COUNT * 9)
    assert mean == pytest.approx(overall["clarity"]["l1_x"])
    assert all(row["target_name"] == str(row["target"]) for row in pairs)


def test_paired_difference_is_over_shared_pairs() -> None:
    names = ("oracle_agreement", "reencoded_agreement", "im1", "implausibility", "l1_x", "steps")
    a = pa.table({"image_id": ["a", "a", "b"], "target": [1, 2, 1], **{name: [1.0, 2.0, 3.0] for name in names}})
    b = pa.table({"image_id": ["b", "a", "c"], "target": [1, 1, 1], **{name: [1.0, 0.5, 9.0] for name in names}})
    found = claims.paired_difference({"a": a, "b": b}, "a", "b")
    assert found is not None and found["pairs"] == 2 and found["steps"][0] == pytest.approx((2 + 0.5) / 2)
    assert claims.paired_difference({"a": a}, "a", "b") is None


def test_trace_search_follows_the_search(bench: Bench, root: Path) -> None:
    like = bench.results(root, "clarity")
    of, target = compare.first_pairs(like.images, 5, 10)
    pairs = compare.pairs_of(bench.model, like.images, of, target)
    for method in ("clarity", "schut"):
        found = METHODS[method].search(bench.model, pairs, CONFIG, engine="plain")
        for p, steps in enumerate(claims.trace_search(bench.model, method, pairs, CONFIG)):
            assert len(steps["point"]) == int(found.steps[p]) + 1
            assert np.allclose(steps["point"][-1], found.point[p].numpy(), atol=1e-5)
            assert steps["target_prob"][0] == pytest.approx(float(found.target_prob_initial[p]), abs=1e-5)
            assert steps["target_prob"][-1] == pytest.approx(float(found.target_prob_final[p]), abs=1e-5)
            gap = steps["predictive"] - steps["aleatoric"] - steps["epistemic"]
            assert np.allclose(gap, 0, atol=1e-5)


def test_curves_end_in_the_probabilities_of_the_two_images(bench: Bench, root: Path) -> None:
    classes = np.arange(COUNT)
    images = dataclasses.replace(bench.results(root).images, label=classes, source=classes)
    curves = claims.segment_curves(bench.model, images, 2, 7, 11)
    names = ["latent classifiers", "image classifiers", "image classifiers, image space"]
    assert [(name, curve.shape) for name, curve in curves.items()] == list(zip(names, [(3, 11), (2, 11), (2, 11)]))
    with torch.no_grad():
        ends = bench.model.ensemble(torch.from_numpy(images.z[[2, 7]])).softmax(-1)[..., 7].numpy()
    assert np.allclose(curves[names[0]][:, [0, -1]], ends, atol=1e-6)
    assert np.allclose(curves[names[1]][:, [0, -1]], curves[names[2]][:, [0, -1]], atol=1e-6)
    found = claims.curve_measures(bench.model, images)
    assert list(found) == [label for name in names for label in (name, f"{name}, mean of the ensemble")]
    assert all(row["segments"] == COUNT and 0 <= row["plateau_width"] <= 1 for row in found.values())


def test_member_gradients_are_those_of_each_alone(bench: Bench) -> None:
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 3, 9, 1])
    found = claims.member_gradients(bench.model.ensemble, z, target)
    for m in range(3):
        for b in range(4):
            point = z[b : b + 1].clone().requires_grad_()
            logits = bench.model.ensemble.member(m)(point)[0]
            (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target[b : b + 1]), point)
            assert np.allclose(found[m, b], slope[0].numpy(), atol=1e-6)


def test_timed_works_take_turns_and_count_their_units() -> None:
    turns = []

    def work(name: str, seconds: float, units: int) -> int:
        turns.append(name)
        time.sleep(seconds)
        return units

    works = {name: functools.partial(work, name, *of) for name, of in {"slow": (0.02, 2), "fast": (0.002, 1)}.items()}
    found = claims.seconds_in_turns(works, repeats=3, at_least=0.03)
    assert found["slow"].shape == found["fast"].shape == (3,)
    assert (found["slow"] >= 0.01).all() and (found["fast"] >= 0.002).all()
    changes = [name for name, before in zip(turns, ["", *turns]) if name != before]
    assert changes == ["slow", "fast"] * 4


def test_job_judges_given_audits_and_draws(root: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    quick = functools.partial(claims.seconds_in_turns, repeats=2, at_least=0.01)
    monkeypatch.setattr(claims, "seconds_in_turns", quick)
    audits = [f"{method}={root / 'audits' / method}" for method in METHODS_TRIED]
    out = tmp_path / "out"
    theirs = tmp_path / "theirs.npz"
    asked = read_audit(root / "audits" / "clarity").counterfactuals.to_table().slice(0, 12)
    np.savez(
        theirs, image_id=np.array(asked["image_id"].to_pylist()), target=np.array(asked["target_name"].to_pylist()),
        image=np.zeros((12, 28, 28), np.uint8),
    )  # fmt: skip
    command = [
        "--model", str(root / "model"), "--judges", str(root / "judges"), "--flat-model", str(tmp_path / "flat"),
        "--out", str(out), "--audit", *audits, "--external", f"theirs={theirs}",
        "--max-steps", "6", "--min-target-prob", "0.4",
    ]  # fmt: skip
    flat = dataclasses.replace(flattened(checkpoints.load_model(root / "model")), image_ensemble=None)
    checkpoints.save_model(flat, tmp_path / "flat", card={})
    module = load_job("compare")
    assert module.main(command) == 0, capsys.readouterr().err
    table = pq.read_table(out / "comparison.parquet")
    names = table["method"].unique().to_pylist()
    assert names == [*METHODS, *compare.CONTROLS, "theirs"]
    rows = table.to_pylist()
    overall = {row["method"]: row for row in rows if row["source"] is None}
    assert overall["theirs"]["strict_validity"] is None and overall["original"]["reencoded_agreement"] == 0
    text = (out / "comparison.md").read_text()
    assert "| oracle agreement |" in text and "REVISE-E (latent), M = 2" in text and "Clarity, M = 3" in text
    measured = json.loads((out / "measurements.json").read_text())
    steps = {(row["kind"], row["fast"], row["pairs"]) for row in measured["steps"]}
    assert {("gradient", "latent", 1), ("gradient", "clarity", 1), ("search", "clarity", COUNT * 9)} <= steps
    assert all(0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in measured["steps"])
    assert "## Time of a step" in text and text.count("REVISE-E") > 3
    # Which figures there are depends on what the random classifiers see.
    if (out / "figures" / "figure10.png").exists():
        paths = measured["figure 10"]
        assert list(paths) == ["FGSM", "Schut", "REVISE-E", "Clarity"]
        assert all(0 <= row["end_in_cloud"] <= 1 <= row["paths"] for row in paths.values())
    first = (out / "comparison.parquet").read_bytes()
    assert module.main([*command, "--no-figures"]) == 0
    assert (out / "comparison.parquet").read_bytes() == first


def flattened(model: Any) -> Any:
    """The model with an untrained VAE and ensemble of a 2-D latent space."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        vae = VAE(dataclasses.replace(model.vae.config, latent_dim=2)).eval()
        ensemble = type(model.ensemble)(dataclasses.replace(model.ensemble.config, latent_dim=2)).eval()
    return dataclasses.replace(model, vae=vae, ensemble=ensemble)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magic"], "unknown method 'magic'"),
        (["--external", "revise=a.npz"], "--external: the name 'revise' is taken"),
        (["--external", "mine=a.npz", "mine=b.npz"], "--external: the name 'mine' is taken"),
        (["--model", "/nowhere"], "no model at"),
        (["--max-steps", "-1"], "--max-steps"),
        (["--dataset", "mnist"], "data: expected"),
    ],
)
def test_job_refuses_bad_input(arguments: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    assert load_job("compare").main(["--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_flat_model_must_be_flat_and_of_the_same_data(root: Path) -> None:
    model, module = checkpoints.load_model(root / "model"), load_job("compare")
    args = module.new_parser().parse_args(["--flat-model", str(root / "model")])
    with pytest.raises(ValueError, match="Figure 10 needs 2"):
        module.flat_model(args, model, "unused")


def test_paths_end_inside_the_cloud_or_not(root: Path, bench: Bench) -> None:
    """Starts are test images of the source; a search that makes no step ends where it started, outside."""
    flat = flattened(bench.model)
    rng = np.random.default_rng(0)
    label = np.array([5] * 12 + [1] * 40)
    x = rng.integers(0, 3, (52, 1, 28, 28)).astype(np.uint8)
    x[label == 5, :, :14] += 200
    still = dataclasses.replace(CONFIG, max_steps=0)
    ids, drawn = [f"image-{number}" for number in range(52)], []
    found = figures.draw_latent_map(
        lambda name, _: drawn.append(name), flat, still, (x, label, ids), ("5", "1"), paths=3
    )
    assert drawn == ["figure10"]
    # REVISE-E starts from a draw around the code, which the untrained encoder makes wide.
    assert all(found[name]["end_in_cloud"] == 0 for name in ("FGSM", "Schut", "Clarity")), found
    assert all(1 <= row["paths"] <= 3 for row in found.values())
    assert found["Clarity"]["moved"] == 0
    same = np.array([5] + [1] * 51)
    x[0] = x[1] = x[20]
    found = figures.draw_latent_map(lambda name, _: None, flat, still, (x, same, ids), ("5", "1"))
    assert found["Clarity"]["end_in_cloud"] == 1


def test_job_asks_for_image_classifiers_where_they_lack(tiny_digits_model: Path, tmp_path: Path, capsys: Any) -> None:
    assert load_job("compare").main(["--model", str(tiny_digits_model), "--out", str(tmp_path / "out")]) == 2
    assert "--methods clarity latent" in capsys.readouterr().err


def test_job_passes_on_how_another_job_ended(root: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    command = ["--model", str(root / "model"), "--judges", str(root / "judges"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        load_job("compare").main([*command, "--methods", "clarity", "--images", "10"])
    assert ended.value.code == 1
    assert "explain_all.py ended with exit code 1" in capsys.readouterr().err
    assert (tmp_path / "out" / "sample-10.parquet").exists()


def test_job_refuses_audits_of_different_images(root: Path, tmp_path: Path, capsys: Any) -> None:
    dataset, listing = opened("digits", None, "test")
    explained(root, "latent", str(tmp_path / "latent"), dataset, listing[-3:])
    command = ["--model", str(root / "model"), "--judges", str(root / "judges"), "--out", str(tmp_path / "out")]
    audits = [f"clarity={root / 'audits' / 'clarity'}", f"latent={tmp_path / 'latent'}"]
    assert load_job("compare").main([*command, "--methods", "clarity", "latent", "--audit", *audits]) == 2
    assert "--audit: expected audits of the same images, found none in common" in capsys.readouterr().err


@pytest.mark.slow
def test_job_explains_over_ray(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "compare.py"), "--model", str(root / "model")]
    command += ["--judges", str(root / "judges"), "--out", str(tmp_path / "out"), "--methods", "clarity", "fgsm"]
    command += ["--images", "10", "--max-steps", "5", "--no-figures"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert ended.returncode == 0, ended.stderr[-2000:]
    table = pq.read_table(tmp_path / "out" / "comparison.parquet").to_pylist()
    overall = {row["method"]: row["num_images"] for row in table if row["source"] is None}
    assert overall["clarity"] == overall["fgsm"] == overall["real image"] == 10
