"""Learning from a predictor: its probabilities as targets, without labels, resumed, refitted and measured."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audits import fill
from bars import ENSEMBLE, SHORT, SHORT_VAE, arguments, bars, files_of, write_bars
from pictures import opened, write_images
from predictors import as_predictor, constant

import clarity
from clarity import data
from clarity.audit.commits import claim
from clarity.checks import Requirements
from clarity.classifiers import LatentEnsemble
from clarity.findings.verdict import verdict
from clarity.model import load_model
from clarity.planning import make_checks, make_plan
from clarity.predictor import load_predictor
from clarity.search import SearchConfig
from clarity.training.directory import begin, finish
from clarity.training.distil import COPIES, agreement, original_probs, perturb
from clarity.training.evaluate import LabelledImages
from clarity.training.loops import Codes, member_states, train_latent_members
from clarity.training.plan import plan_training
from clarity.training.stages import TRAINED, Worker, load_codes, load_images, run_stages
from clarity.worker import Work

CLASSES = ["top", "middle", "bottom"]


def heights(pixels: np.ndarray) -> np.ndarray:
    """Softmax of the mean brightness of three bands: which of the three bars an image shows."""
    bands = np.stack([pixels[:, 0, 1 + 2 * k : 3 + 2 * k].mean((1, 2)) for k in range(3)], 1) / 32
    odds = np.exp(bands - bands.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def teacher(call: Callable[[np.ndarray], np.ndarray] = heights) -> Any:
    return as_predictor(call, CLASSES)


def taught_by(**changes: Any) -> dict[str, Any]:
    """Arguments of a training by the teacher."""
    ensemble = dataclasses.replace(SHORT, epochs=20)
    fields = {"vae_training": dataclasses.replace(SHORT_VAE, epochs=20), "ensemble_training": ensemble}
    return arguments(**{**fields, "predictor": teacher(), **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 pictures in two splits, in one folder each: without labels."""
    return write_bars(tmp_path_factory.mktemp("unlabelled"), 120, lambda i, _: "train" if i % 4 else "test")


def plan_of(folder: Path, out: Path, **changes: Any) -> Any:
    dataset = data.open_dataset("folder", folder, "train")
    return plan_training(str(out), dataset, dataclasses.replace(dataset, split="test"), **taught_by(**changes))


@pytest.fixture(scope="module")
def taught(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a model that a predictor taught, uncut."""
    out = tmp_path_factory.mktemp("taught")
    clarity.train("folder", out, data=folder, **taught_by())
    return out


def test_soft_targets_are_matched_rather_than_their_likeliest_class() -> None:
    """The cross-entropy is least where the probabilities are the targets, so that 0.6 is learned as 0.6."""
    mean = torch.randn((400, 5), generator=torch.Generator().manual_seed(0))
    probs = torch.tensor([[0.6, 0.3, 0.1]]).repeat(400, 1)
    codes = Codes(mean, torch.full_like(mean, -torch.inf), probs)
    codes.log_var[:200] = -9.0
    training = dataclasses.replace(SHORT, epochs=12, adversarial_eps=0.0)
    *_, last = train_latent_members(codes, ENSEMBLE, training, [0])
    member = LatentEnsemble(dataclasses.replace(ENSEMBLE, num_members=1))
    state = member_states(last.state(), 1)[0]
    member.load_state_dict({name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")})
    found = member(mean).softmax(-1).mean((0, 1))
    assert torch.allclose(found, probs[0], atol=0.05)


def test_perturbed_codes_do_not_widen_the_step_of_the_adversary() -> None:
    mean = torch.randn((50, 5), generator=torch.Generator().manual_seed(0))
    probs = torch.full((100, 3), 1 / 3)
    around = torch.full((50, 5), 9.0)
    log_var = torch.cat([torch.full((50, 5), -3.0), torch.full((50, 5), -torch.inf)])
    both = Codes(torch.cat([mean, around]), log_var, probs)
    assert both.std() == pytest.approx(Codes(mean, log_var[:50], torch.zeros(50).long()).std(), rel=1e-6)


def test_perturbed_codes_lie_around_and_between_the_codes() -> None:
    z = torch.randn((300, 5), generator=torch.Generator().manual_seed(0)) + 4
    found = perturb(z, torch.Generator().manual_seed(1), copies=2)
    assert found.shape == (600, 5) and torch.equal(found, perturb(z, torch.Generator().manual_seed(1), copies=2))
    moved = (found - z.repeat(2, 1)).norm(dim=1)
    assert 0 < moved.min() < 0.5 and moved.max() > 3
    assert torch.allclose(found.mean(0), z.mean(0), atol=0.3)


def test_agreement_and_divergence() -> None:
    p, q = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    assert agreement(p, p)["kl"] == 0
    assert agreement(p, q)["kl"] == pytest.approx(np.log(2) / 2)
    assert agreement(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([[0.8, 0.2], [0.7, 0.3]]))["agreement"] == 0.5


def test_predictor_sees_the_files_through_its_own_preprocessing(folder: Path) -> None:
    dataset, listing = opened("folder", folder, "test")
    small = data.infer_preprocessing(dataset, listing, image_size=(4, 6))
    pixels, ids, *_ = data.read_all(dataset, listing, small)
    images = LabelledImages(torch.from_numpy(pixels), ids, torch.full((len(ids),), -1)).take(slice(3, 9))
    probs = original_probs(load_predictor(teacher()), dataset, listing, images, small)
    own = data.read_all(dataset, listing, dataclasses.replace(small, height=8, width=12))[0]
    assert np.allclose(probs, heights(own[3:9]), atol=1e-6)


def test_predictor_of_the_models_size_sees_its_crop(folder: Path) -> None:
    dataset, listing = opened("folder", folder, "test")
    cropping = data.infer_preprocessing(dataset, listing, image_size=(8, 12), center_crop=6)
    wide = load_predictor(teacher())
    assert wide.sees(cropping) == cropping and wide.sees(dataclasses.replace(cropping, height=9)).height == 8
    pixels, ids, *_ = data.read_all(dataset, listing, cropping)
    images = LabelledImages(torch.from_numpy(pixels), ids, torch.zeros(len(ids)))
    probs = original_probs(wide, dataset, listing, images, cropping)
    assert np.allclose(probs, heights(pixels), atol=1e-6)


def test_model_is_taught_without_labels_and_its_card_says_how_well(taught: Path) -> None:
    model = clarity.load(taught)
    assert model.class_names == tuple(CLASSES) and model.judge is None
    told = model.card["predictor"]
    assert (
        told["images"] == 30
        and told["labelled"] == {"correct": 0, "images": 0}
        and told["refit"] is None
        and len(told["digest"]) == 64
    )
    assert all(told[name]["agreement"] >= 0.8 for name in ("codes", "reconstructions", "reconstructing")), told
    assert 0 <= told["perturbed"]["agreement"] <= 1 and told["codes"]["kl"] > 0
    assert "ensemble" not in model.card["metrics"] and "evaluation" not in model.card
    assert verdict(model.card).level in ("sound", "with care")  # by its agreement with the predictor


def test_images_without_an_answer_of_the_predictor_are_left_out(folder: Path, tmp_path: Path) -> None:
    def call(pixels: np.ndarray) -> np.ndarray:
        silent = (pixels[:, 0, 0, 0] % 4 == 0) & (pixels.mean((1, 2, 3)) < 90)  # not the noise of its digest
        return np.where(silent[:, None], np.nan, heights(pixels))

    lines: list[str] = []
    model = clarity.train("folder", tmp_path, data=folder, log=lines.append, **taught_by(predictor=teacher(call)))
    assert any("codes for which the predictor gives no probabilities" in line for line in lines), lines
    told = model.card["predictor"]
    assert 0 < told["images"] < 30
    for name in ("codes", "reconstructions", "perturbed", "reconstructing"):
        assert 0 <= told[name]["agreement"] <= 1 and np.isfinite(told[name]["kl"]), told


def test_classes_that_the_latent_space_loses_are_named(folder: Path, tmp_path: Path) -> None:
    """Decided by one dark pixel, which no reconstruction keeps: the classes are not told apart."""

    def by_pixel(pixels: np.ndarray) -> np.ndarray:
        seen = (pixels[:, 0, 0, 0] % 2)[:, None] == np.array([0, 1, 2])
        return np.where(seen, 0.8, 0.1)

    predictor = teacher(by_pixel)
    told = clarity.train("folder", tmp_path, data=folder, **taught_by(predictor=predictor)).card["predictor"]
    assert told["reconstructing"]["agreement"] < 0.8
    name, other, share = told["confused"][0]
    assert {name, other} == {"top", "middle"} and share > 0.1


def test_a_label_that_the_predictor_has_not_counts_as_none(tmp_path: Path) -> None:
    write_images(
        tmp_path / "data", *(f"train/{name}/{number}.png" for name in ("ant", "bee", "cow") for number in "12")
    )
    dataset = data.open_dataset("folder", tmp_path / "data", "train")
    plan = plan_training(str(tmp_path), dataset, None, predictor=constant(("ant", "bee"), 0), recipe="paper")
    assert plan.data["labelled"] == 4
    assert load_images(plan, dataset, 100).labels.tolist() == [0, 0, 1, 1]
    assert load_images(plan, dataset).labels.tolist() == [0, 0, 1, 1, -1, -1]
    (note,) = plan.data["remarks"]
    assert note == "note: labels that are no class of the predictor (cow; 2 images) count as none"
    others = plan_training(str(tmp_path), dataset, None, predictor=constant(("cat", "dog"), 0), recipe="paper")
    (warning,) = others.data["remarks"]
    assert warning.startswith("WARNING: no label (ant, bee, cow) is a class of the predictor (cat, dog):")


def test_labels_are_not_needed_for_arrays() -> None:
    images, _ = bars(60)
    model = clarity.train((images.numpy(), None), **taught_by())
    assert model.class_names == tuple(CLASSES) and model.card["data"]["labelled"] == 0


def test_training_cut_after_it_asked_ends_the_same(
    folder: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clarity.training.stages.CHECKPOINT_SECONDS", 0.0)
    cuts: list[str] = []

    def log(line: str) -> None:
        if line.startswith("encoded") and not cuts:
            cuts.append(line)
            raise KeyboardInterrupt

    for _ in range(2):
        plan = plan_of(folder, tmp_path)
        assert not begin(plan)
        try:
            run_stages(plan, TRAINED, Worker(log=log))
            break
        except KeyboardInterrupt:
            continue
    finish(plan)
    assert cuts and files_of(tmp_path) == files_of(taught)


def test_workers_ask_about_parts_of_the_images(
    folder: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block is asked about once, and a block that was asked about before a cut is not asked about again."""
    monkeypatch.setattr("clarity.training.stages.ENCODE_ROWS", 32)
    asked: list[int] = []

    def counted(pixels: np.ndarray) -> np.ndarray:
        asked.append(len(pixels))
        return heights(pixels)

    plan = plan_of(folder, tmp_path, predictor=teacher(counted))
    begin(plan)
    run_stages(plan, ["vae"], Worker())
    asked.clear()
    for rank in (1, 1, 0):
        run_stages(plan, ["encode"], Worker(rank, 2))
    codes, _ = load_codes(plan)
    assert len(codes) == 90 * (1 + COPIES) and codes.targets.shape[1] == 3
    blocks = 3  # of 32 rows: one question of 64 for the images, one for their copies; loading asks one each time
    assert len(asked) == 2 * blocks + 3


def test_another_predictor_does_not_resume(folder: Path, tmp_path: Path) -> None:
    begin(plan_of(folder, tmp_path))
    turned = teacher(lambda pixels: heights(pixels)[:, ::-1])
    with pytest.raises(ValueError, match="training of another model: predictor: another one there"):
        begin(plan_of(folder, tmp_path, predictor=turned))
    with pytest.raises(ValueError, match=r"predictor: expected that of the plan, found another"):
        plan = plan_of(folder, tmp_path, vae_training=SHORT_VAE)
        run_stages(dataclasses.replace(plan, predictor=turned), TRAINED, Worker())


def test_model_of_labels_is_taught_by_a_predictor_and_keeps_its_vae_and_judge(tmp_path: Path) -> None:
    directory = write_bars(tmp_path / "data", 90, lambda i, k: f"{['train', 'test'][i % 5 == 0]}/{CLASSES[k]}")
    predictor = as_predictor(lambda pixels: heights(pixels)[:, [2, 1, 0]], sorted(CLASSES))
    found = []
    for teaching in (None, predictor):
        clarity.train("folder", tmp_path / "out", data=directory, **taught_by(predictor=teaching))
        found.append(files_of(tmp_path / "out"))
    same = {name for name in found[0] if found[0][name] == found[1][name]}
    assert same == {"vae.safetensors", "judge.safetensors"} and set(found[1]) == {*same, "ensemble.safetensors"}
    card = clarity.load(tmp_path / "out").card  # labels measure what a predictor taught
    assert card["metrics"]["ensemble"]["accuracy"] > 0.5 and card["evaluation"]["images"] > 0
    assert card["predictor"]["codes"]["agreement"] > 0.5
    assert card["predictor"]["labelled"] == {"correct": 18, "images": 18}


def test_held_out_images_that_cannot_be_read_are_compared_with_nothing(tmp_path: Path) -> None:
    directory = write_bars(tmp_path / "data", 90, lambda i, k: f"train/{CLASSES[k]}")
    (directory / "test" / CLASSES[0]).mkdir(parents=True)
    (directory / "test" / CLASSES[0] / "broken.png").write_bytes(b"no picture")
    predictor = as_predictor(heights, sorted(CLASSES))
    model = clarity.train("folder", tmp_path / "out", data=directory, **taught_by(predictor=predictor))
    assert model.card["metrics"] == {} and set(model.card["predictor"]) == {"name", "digest", "refit"}


def test_finished_model_is_not_taught_by_labels_again(folder: Path, taught: Path) -> None:
    plan = plan_of(folder, taught)
    assert begin(plan)
    without = dataclasses.replace(plan, predictor=None, teachers={}, data=plan.data | {"labelled": 90})
    with pytest.raises(ValueError, match="holds another model: predictor: one there, none here"):
        begin(without)


def test_refit_learns_from_an_audit_and_keeps_the_vae(folder: Path, taught: Path, tmp_path: Path) -> None:
    out, audit = tmp_path / "model", tmp_path / "audit"
    shutil.copytree(taught, out)
    write_audit(folder, out, audit, "train")
    with pytest.raises(ValueError, match=r"refit: expected an audit of the images to train on \(folder, split train\)"):
        write_audit(folder, out, tmp_path / "test", "test")
        plan_of(folder, out, refit=str(tmp_path / "test"))
    plan = plan_of(folder, out, refit=str(audit))
    assert not begin(plan)
    run_stages(plan, ["vae", "encode"], Worker())
    pairs = clarity.read_audit(audit).counterfactuals.count_rows()
    assert pairs == 2 * 12 and len(load_codes(plan)[0]) == 90 * (1 + COPIES) + pairs
    assert not begin(plan)  # cut here, it goes on
    run_stages(plan, TRAINED, Worker())
    model = finish(plan)
    before, after = files_of(taught), files_of(out)
    assert before["vae.safetensors"] == after["vae.safetensors"]
    assert before["ensemble.safetensors"] != after["ensemble.safetensors"]
    assert model.card["predictor"]["refit"] == str(audit)
    assert begin(plan_of(folder, out, refit=str(audit)))
    with pytest.raises(ValueError, match="refit: one there, none here"):
        begin(plan_of(folder, out))
    with pytest.raises(ValueError, match=r"refit: expected the predictor"):
        plan_of(folder, out, refit=str(audit), predictor=None)
    with pytest.raises(ValueError, match=r"refit: expected the model of .* found none"):
        plan_of(folder, tmp_path / "elsewhere", refit=str(audit))


def write_audit(folder: Path, model: Path, out: Path, split: str) -> None:
    """An audit of twelve images, written without Ray."""
    dataset = data.open_dataset("folder", folder, split)
    listing, loaded = data.list_images(dataset).slice(0, 12), load_model(model)
    config = SearchConfig(max_steps=8)
    checks = make_checks(loaded, config, Requirements(), load_predictor(teacher()))
    plan = make_plan(loaded, dataset, listing, method="clarity", config=config, checks=checks)
    with claim(str(out), plan, str(model)) as held:
        fill(Work(str(out), held.run, plan, dataset, loaded.preprocessing, None, teacher()), listing)
