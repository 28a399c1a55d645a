"""A whole training: shared by workers, cut anywhere, resumed, extended, and refused where another model is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bars import SHORT, SHORT_IMAGES, SHORT_VAE, bars
from object_store import ObjectStore

import clarity
from clarity import storage
from clarity.data import open_dataset
from clarity.model import load_tensors, read_card
from clarity.training.directory import begin, finish
from clarity.training.plan import TrainingPlan, plan_training
from clarity.training.stages import FINISHED, STAGES, TRAINED, Worker, late_fall, run_stages, save_finished


def arguments(**changes: Any) -> dict[str, Any]:
    return {
        "vae_fields": {"latent_dim": 5, "channels": (6, 7)},
        "num_members": 4,
        "hidden": (6, 7),
        "vae_training": SHORT_VAE,
        "ensemble_training": SHORT,
        "image_training": SHORT_IMAGES,
        "judge_updates": 3,
        "recipe": "paper",
        **changes,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 120 pictures in class folders, two of them broken."""
    from PIL import Image

    directory = tmp_path_factory.mktemp("bars")
    images, labels = bars(120)
    for i, (x, k) in enumerate(zip(images, labels)):
        file = directory / f"bar{k}" / f"{i:03d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(x[0].numpy()).save(file)
    (directory / "bar0" / "broken.png").write_bytes(b"no picture")
    (directory / "bar1" / "broken.png").write_bytes(b"")
    return directory


def plan_of(folder: Path, out: Path, **changes: Any) -> TrainingPlan:
    dataset = open_dataset("folder", folder, "train", unlabelled=True)
    return plan_training(str(out), dataset, dataclasses.replace(dataset, split="test"), **arguments(**changes))


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def uncut(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weight files of a training by one worker, never cut."""
    out = tmp_path_factory.mktemp("uncut")
    plan = plan_of(folder, out, image_members=3, num_folds=2)
    assert not begin(plan)
    run_stages(plan, TRAINED, Worker())
    finish(plan)
    return files_of(out)


def test_training_of_a_folder_writes_a_model_that_says_how_it_was_made(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    model = clarity.train(
        "folder", tmp_path / "model", data=folder, log=lines.append, **arguments(image_members=3, num_folds=2)
    )
    loaded = clarity.load(tmp_path / "model")
    assert loaded.fingerprint == model.fingerprint
    card = loaded.card
    assert card["class_names"] == ["bar0", "bar1", "bar2"] and loaded.image_shape == (1, 8, 12)
    assert card["data"]["source"] == "folder" and len(card["data"]["fingerprint"]) == 64
    metrics = card["metrics"]
    assert set(metrics["ensemble"]["per_class"]) <= {"bar0", "bar1", "bar2"}
    assert len(metrics["ensemble"]["member_accuracy"]) == 4 and len(metrics["image_ensemble"]["member_accuracy"]) == 3
    parts = metrics["vae"]
    assert parts["loss"] == pytest.approx(parts["reconstruction"] + parts["kl"], rel=1e-6)
    assert 0 <= metrics["out_of_fold"]["accuracy"] <= 1
    assert loaded.judge is not None and card["evaluation"]["judge"]["accuracy"] >= 0
    assert card["evaluation"]["images"] == metrics["images"] and len(card["target_probs"]["median"]) == 3
    assert card["plan"]["vae_training"]["epochs"] == 3
    assert card["versions"]["clarity"] == clarity.__version__
    assert not (tmp_path / "model" / "_training").exists()
    assert any(line.startswith("vae: epoch 3/3  loss ") for line in lines)
    assert any("accuracy" in line for line in lines)


def test_stages_shared_by_workers_give_the_same_members(folder: Path, tmp_path: Path, uncut: dict[str, bytes]) -> None:
    plan = plan_of(folder, tmp_path, image_members=3, num_folds=2)
    begin(plan)
    run_stages(plan, ("vae",), Worker())
    for rank in (2, 0, 1):
        run_stages(plan, ("encode",), Worker(rank, 3)) if rank == 0 else None
    for rank in (2, 0, 1):
        run_stages(plan, ("latent", "images", "judge"), Worker(rank, 3))
    finish(plan)
    assert files_of(tmp_path) == uncut


def test_training_cut_goes_on_with_another_number_of_folds(
    folder: Path, tmp_path: Path, uncut: dict[str, bytes]
) -> None:
    plan = plan_of(folder, tmp_path, image_members=3, num_folds=3)
    begin(plan)
    run_stages(plan, ("vae", "encode", "latent"), Worker())
    plan = dataclasses.replace(plan, num_folds=2)
    assert not begin(plan)
    run_stages(plan, TRAINED, Worker())
    finish(plan)
    assert files_of(tmp_path) == uncut


class Cut(Exception):
    pass


@pytest.mark.parametrize(
    "where", ["vae: epoch 2", "encoded", "latent classifiers", "fold-1", "image classifiers (member 2"]
)
def test_training_cut_anywhere_ends_the_same(
    where: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncut: dict[str, bytes]
) -> None:
    monkeypatch.setattr("clarity.training.stages.CHECKPOINT_SECONDS", 0.0)
    plan = plan_of(folder, tmp_path, image_members=3, num_folds=2)
    cuts: list[str] = []

    def log(line: str) -> None:
        if line.startswith(where) and len(cuts) < 2:
            cuts.append(line)
            raise Cut

    for _ in range(4):
        assert not begin(plan)
        try:
            run_stages(plan, TRAINED, Worker(log=log))
            break
        except Cut:
            continue
    assert cuts
    finish(plan)
    assert files_of(tmp_path) == uncut


def test_late_fall_of_a_loss() -> None:
    assert late_fall({14: 100.0, 19: 90.0, 20: 80.0}, 20) == pytest.approx(0.2)
    assert late_fall({4: 100.0, 6: 99.5}, 6) == pytest.approx(0.005)
    assert late_fall({1: 9.0, 2: 1.0}, 2) == 0.0  # too few epochs to tell
    assert late_fall({20: 80.0}, 20) == 0.0  # taken up again at the last one


def test_training_says_when_its_loss_still_falls(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clarity.training.stages.STILL_FALLING", 0.005)
    lines: list[str] = []
    plan = plan_of(folder, tmp_path, vae_training=dataclasses.replace(SHORT_VAE, epochs=6))
    begin(plan)
    run_stages(plan, ("vae",), Worker(log=lines.append))
    assert lines[-1].startswith("vae: the loss still fell by ") and lines[-1].endswith("more of them would help")


def test_finished_training_is_not_done_again(folder: Path, tmp_path: Path) -> None:
    clarity.train("folder", tmp_path, data=folder, **arguments())
    before = files_of(tmp_path), (tmp_path / "model.json").read_bytes()
    assert begin(plan_of(folder, tmp_path))
    lines: list[str] = []
    clarity.train("folder", tmp_path, data=folder, log=lines.append, **arguments())
    assert lines == [] and (files_of(tmp_path), (tmp_path / "model.json").read_bytes()) == before


def test_finished_model_takes_an_image_ensemble_and_folds_later(
    folder: Path, tmp_path: Path, uncut: dict[str, bytes]
) -> None:
    fingerprints = set()
    for more in ({}, {"image_members": 2}, {"image_members": 3, "num_folds": 2}):
        fingerprints.add(clarity.train("folder", tmp_path, data=folder, **arguments(**more)).fingerprint)
    assert len(fingerprints) == 1
    assert files_of(tmp_path) == uncut


def test_another_model_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    plan = plan_of(folder, tmp_path)
    begin(plan)
    with pytest.raises(ValueError, match=r"holds another model: ensemble is \{.*'num_members': 4\} there, .*5\} here"):
        begin(plan_of(folder, tmp_path, num_members=5))
    run_stages(plan, TRAINED, Worker())
    finish(plan)
    with pytest.raises(ValueError, match=r"Choose another directory, or delete that one"):
        begin(plan_of(folder, tmp_path, vae_training=dataclasses.replace(SHORT_VAE, seed=1)))


def test_judge_of_an_abandoned_search_is_not_taken(folder: Path, tmp_path: Path) -> None:
    plan = plan_of(folder, tmp_path)
    save_finished(plan.file("judge.safetensors"), {})
    begin(plan)
    assert not STAGES["judge"].done(plan)


def test_worker_that_does_not_see_the_model_directory_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rank 1 does not see .* a shared mount"):
        run_stages(plan_of(folder, tmp_path), TRAINED, Worker(1, 2))


def test_training_on_an_object_store_is_that_on_a_disk(folder: Path, tmp_path: Path, uncut: dict[str, bytes]) -> None:
    with ObjectStore() as store:
        plan = dataclasses.replace(plan_of(folder, tmp_path, image_members=3, num_folds=2), out=store.uri("runs/model"))
        assert not begin(plan)
        run_stages(plan, TRAINED, Worker())
        finish(plan)
        model = clarity.load(plan.out)
        names = [file.path for file in storage.list_files(plan.out)]
        assert names == sorted([*uncut, "model.json"])
        assert {name: storage.read_bytes(storage.join(plan.out, name)) for name in uncut} == uncut
        assert model.num_classes == 3 and begin(plan)


def test_checkpoints_are_of_members_and_finished_ones_hold_weights_alone(folder: Path, tmp_path: Path) -> None:
    plan = plan_of(folder, tmp_path)
    begin(plan)
    run_stages(plan, ("vae", "encode"), Worker())
    run_stages(plan, ("latent",), Worker(1, 2))
    files = storage.list_files(plan.file("members"))
    assert [file.path for file in files] == ["latent-001.safetensors", "latent-003.safetensors"]
    state = load_tensors(plan.member_file("latent", 1))
    assert int(state.pop("epoch")) == FINISHED and all(name.startswith("model.") for name in state)
    assert not STAGES["latent"].done(plan)
    assert read_card(tmp_path) is None


def test_train_takes_arrays() -> None:
    images, labels = bars(90)
    names = np.array(["low", "mid", "top"])[labels.numpy()]
    model = clarity.train((images.numpy()[:, 0], names), **arguments())
    assert model.class_names == ("low", "mid", "top") and model.image_shape == (1, 8, 12)
    assert model.card["metrics"]["images"] + model.card["data"]["images"] == 90
    other = clarity.train((images.numpy()[:, 0] / 255, names), **arguments())
    assert other.fingerprint == model.fingerprint


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((4, 2, 8, 12), np.uint8), r"expected images \(N, C, H, W\) or \(N, H, W\)"),
        (np.zeros((3, 8, 12), np.uint8), r"got \(3, 1, 8, 12\) and 4 labels"),
        (np.full((4, 8, 12), 7.0), r"floats in \[0, 1\], got float64"),
    ],
)
def test_train_says_what_is_wrong_with_arrays(images: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clarity.train((images, ["a", "b", "a", "b"]), **arguments())
