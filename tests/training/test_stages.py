"""A whole training: shared by workers, cut anywhere, resumed, extended, and refused where another model is."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bars import SHORT_IMAGES, SHORT_VAE, arguments, bars, files_of, write_bars
from object_store import ObjectStore

import clarity
from clarity import storage
from clarity.data import open_dataset
from clarity.model import load_tensors, read_card
from clarity.training.directory import begin, finish, networks
from clarity.training.local import label_names
from clarity.training.loops import Epoch
from clarity.training.plan import TrainingPlan, plan_training
from clarity.training.stages import FINISHED, STAGES, TRAINED, Worker, run_loop, run_stages, save_finished


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 120 pictures in class folders, two of them broken."""
    directory = write_bars(tmp_path_factory.mktemp("bars"), 120)
    (directory / "bar0" / "broken.png").write_bytes(b"no picture")
    (directory / "bar1" / "broken.png").write_bytes(b"")
    return directory


def plan_of(folder: Path, out: Path, **changes: Any) -> TrainingPlan:
    dataset = open_dataset("folder", folder, "train", unlabelled=True)
    return plan_training(str(out), dataset, dataclasses.replace(dataset, split="test"), **arguments(**changes))


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a training by one process, never cut; what it said is in the file ``log`` beside it."""
    out, lines = tmp_path_factory.mktemp("trained") / "model", list[str]()
    fields = arguments(image_members=3, num_folds=2)
    model = clarity.train("folder", out, data=folder, log=lines.append, **fields)
    assert clarity.load(out).fingerprint == model.fingerprint
    (out.parent / "log").write_text("\n".join(lines))
    return out


@pytest.fixture(scope="module")
def uncut(trained: Path) -> dict[str, bytes]:
    """Its weight files."""
    return files_of(trained)


def test_training_of_a_folder_writes_a_model_that_says_how_it_was_made(trained: Path) -> None:
    loaded = clarity.load(trained)
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
    assert not (trained / "_training").exists()
    lines = (trained.parent / "log").read_text().splitlines()
    unread = [line for line in lines if "cannot be read" in line]
    assert unread and all(re.search(r"\(bar[01]/broken.png\)$", line) for line in unread)
    assert any(line.startswith("vae: epoch 3/3  loss ") for line in lines)
    assert any("accuracy" in line for line in lines)
    said = {line.partition(":")[0] for line in lines}
    assert {"latent classifiers (4 of 4 members)", "image classifiers (member 1 of 3)"} <= said


@pytest.mark.parametrize(("device", "ids"), [("cpu", None), ("cuda:3", [3]), ("cuda", [0])])
def test_workers_wait_for_each_other_on_their_own_gpu(
    device: str, ids: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", lambda device_ids: waited.append(device_ids))
    Worker(rank=5, world=8, device=device).wait_for_all()
    Worker(device=device).wait_for_all()
    assert waited == [ids]


def test_workers_wait_for_each_other_at_a_stage_that_one_of_them_finds_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or one would go on to the next stage, while a faster one waits for it at the end of this one."""
    waited = list[Worker]()
    monkeypatch.setattr(Worker, "wait_for_all", lambda worker: waited.append(worker))
    plan = plan_of(folder, tmp_path)
    begin(plan)
    save_finished(plan.file("vae.safetensors"), {})
    run_stages(plan, ("vae",), Worker(1, 2))
    assert len(waited) == 1


def test_stages_shared_by_workers_give_the_same_members(folder: Path, tmp_path: Path, uncut: dict[str, bytes]) -> None:
    plan = plan_of(folder, tmp_path, image_members=3, num_folds=2)
    begin(plan)
    lines: list[str] = []
    run_stages(plan, ("vae",), Worker())
    for rank in (2, 0, 1):
        run_stages(plan, ("encode",), Worker(rank, 3)) if rank == 0 else None
    for rank in (2, 0, 1):
        run_stages(plan, ("latent", "images", "judge"), Worker(rank, 3, log=lines.append))
    finish(plan)
    assert files_of(tmp_path) == uncut
    assert any(line.startswith("latent classifiers (2 of 4 members): epoch 1/") for line in lines)


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


@pytest.mark.parametrize("where", ["vae: epoch 2", "encoded", "fold-1", "image classifiers (member 2"])
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


def test_training_says_when_its_loss_still_falls(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clarity.training.stages.STILL_FALLING", 0.005)
    lines: list[str] = []
    plan = plan_of(folder, tmp_path, vae_training=dataclasses.replace(SHORT_VAE, epochs=6))
    begin(plan)
    run_stages(plan, ("vae",), Worker(log=lines.append))
    assert lines[-1].startswith("vae: the loss still fell by ") and lines[-1].endswith("more of them would help")


@pytest.mark.parametrize(("accuracy", "said"), [({}, 1), ({"accuracy": 0.9}, 1), ({"accuracy": 1.0}, 0)])
def test_training_that_knows_all_its_images_is_not_called_short(accuracy: dict[str, float], said: int) -> None:
    lines: list[str] = []
    epochs = [Epoch(number, 6, {"loss": 6.0 - number, **accuracy}, dict) for number in range(1, 7)]
    run_loop(lambda log: iter(epochs), "ensemble", lines.append)
    assert sum("the loss still fell by 100.0%" in line for line in lines) == said


def test_training_says_how_far_it_is_within_a_long_epoch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("loops", "judge"):
        monkeypatch.setattr(f"clarity.training.{module}.LOG_SECONDS", -1.0)
    lines: list[str] = []
    plan = plan_of(folder, tmp_path, image_members=2, judge_updates=11)
    begin(plan)
    run_stages(plan, TRAINED, Worker(log=lines.append))
    told = "\n".join(lines)
    assert lines[0] == f"reading {plan.data['images']} images"
    for what in (r"vae", r"latent classifiers \(4 of 4 members\)", r"image classifiers \(member 1 of 2\)", "judge"):
        assert re.search(rf"^{what}: update 1/\d+  loss \S+  \d+:\d\d\n{what}: update 2/", told, re.MULTILINE), what


def test_finished_training_is_not_done_again(folder: Path, trained: Path, uncut: dict[str, bytes]) -> None:
    card, lines = (trained / "model.json").read_bytes(), list[str]()
    assert begin(plan_of(folder, trained, image_members=3, num_folds=2))
    clarity.train("folder", trained, data=folder, log=lines.append, **arguments())
    assert lines == [] and files_of(trained) == uncut and (trained / "model.json").read_bytes() == card


def test_finished_model_takes_an_image_ensemble_and_folds_later(
    folder: Path, tmp_path: Path, uncut: dict[str, bytes]
) -> None:
    fingerprints = set()
    for more in ({}, {"image_members": 2}, {"image_members": 3, "num_folds": 2}):
        fingerprints.add(clarity.train("folder", tmp_path, data=folder, **arguments(**more)).fingerprint)
    assert len(fingerprints) == 1
    assert files_of(tmp_path) == uncut


def test_another_model_is_not_overwritten(folder: Path, tmp_path: Path, trained: Path) -> None:
    begin(plan_of(folder, tmp_path))
    with pytest.raises(ValueError, match=r"the unfinished training of another model: num_members: 4 there, 5"):
        begin(plan_of(folder, tmp_path, num_members=5))
    vae = dataclasses.replace(plan_of(folder, tmp_path).vae, latent_dim=9)
    ensemble = dataclasses.replace(plan_of(folder, tmp_path).ensemble, latent_dim=9)
    other = dataclasses.replace(plan_of(folder, tmp_path), vae=vae, ensemble=ensemble)
    other.data["fingerprint"] = "0"
    said = r"unfinished training of another model: data: other images; latent_dim: \d there, 9 here\. Choose"
    with pytest.raises(ValueError, match=said):
        begin(other)
    with pytest.raises(ValueError, match=r"Choose another directory, or delete that one"):
        begin(plan_of(folder, trained, vae_training=dataclasses.replace(SHORT_VAE, seed=1)))


def test_cut_training_of_an_image_ensemble_goes_on_with_it_as_it_is(folder: Path, tmp_path: Path) -> None:
    begin(plan_of(folder, tmp_path, image_members=3))
    with pytest.raises(ValueError, match=r"another model: image_members: 3 there, (0|none) here\. Choose"):
        begin(plan_of(folder, tmp_path))
    longer = dataclasses.replace(SHORT_IMAGES, epochs=7)
    with pytest.raises(ValueError, match=r"another model: image_epochs: 2 there, 7 here\. Choose"):
        begin(plan_of(folder, tmp_path, image_members=3, image_training=longer))
    assert not begin(plan_of(folder, tmp_path, image_members=2))


def test_judge_of_an_abandoned_search_is_not_taken(folder: Path, tmp_path: Path) -> None:
    plan = plan_of(folder, tmp_path)
    save_finished(plan.file("judge.safetensors"), {})
    begin(plan)
    assert not STAGES["judge"].done(plan)


def test_judge_of_another_number_of_updates_is_not_kept(folder: Path, tmp_path: Path) -> None:
    plan = plan_of(folder, tmp_path)
    begin(plan)
    run_stages(plan, ("judge",), Worker())
    other = plan_of(folder, tmp_path, judge_updates=4)
    assert networks(other) == networks(plan) | {"judge": False} and networks(plan)["judge"]
    begin(other)
    assert not STAGES["judge"].done(other)


def test_search_on_other_images_leaves_a_training_as_it_is(folder: Path, tmp_path: Path) -> None:
    """Its judge would take the place of the one that is there, before the training is refused."""
    plan, other = plan_of(folder, tmp_path / "model"), write_bars(tmp_path / "other", 93)
    begin(plan)
    run_stages(plan, ("judge",), Worker())
    judge = (tmp_path / "model" / "_training" / "judge.safetensors").read_bytes()
    with pytest.raises(ValueError, match="the unfinished training of another model: data: other images"):
        clarity.train("folder", tmp_path / "model", data=other, **arguments(recipe="auto"))
    assert (tmp_path / "model" / "_training" / "judge.safetensors").read_bytes() == judge


def test_worker_that_does_not_see_the_model_directory_or_the_data_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^out: the worker of rank 1 does not see .* a shared mount"):
        run_stages(plan_of(folder, tmp_path), TRAINED, Worker(1, 2))
    data = write_bars(tmp_path / "data", 90)
    plan = plan_of(data, tmp_path / "model")
    begin(plan)
    data.rename(tmp_path / "elsewhere")
    for stage in ("recipe", "vae"):
        open_plan = dataclasses.replace(plan, searched=("beta",))
        with pytest.raises(ValueError, match=r"^data: the worker of rank 0 does not see .*/data; .* a shared mount"):
            run_stages(open_plan, [stage], Worker())


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
    other = clarity.train((images.numpy().transpose(0, 2, 3, 1) / 255, names[:, None]), **arguments())
    assert other.fingerprint == model.fingerprint


def test_train_refuses_held_out_images_that_it_would_not_measure_on() -> None:
    images, labels = bars(90)
    with pytest.raises(ValueError, match="held_out: expected a Dataset, or arrays where the others are arrays, got a"):
        clarity.train("digits", held_out=(images.numpy(), labels.tolist()), **arguments())


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((4, 2, 8, 12), np.uint8), "abab", r"expected images \(N, C, H, W\), .* got \(4, 2, 8, 12\)"),
        (np.zeros((0, 8, 12), np.uint8), "", r"got \(0, 8, 12\)"),
        ([np.zeros((8, 12)), np.zeros((8, 9))], "ab", "images of one size, got parts of several shapes"),
        (np.full((4, 8, 12), 7.0), "abab", r"expected float64 pixels in \[0, 1\], found 7.0 to 7.0: scale them"),
        (np.arange(384.0).reshape(4, 8, 12), "abab", "found 0.0 to 383.0: scale them"),
        (np.full((4, 8, 12), np.nan), "abab", "expected finite pixels, found 384 of 384 NaN"),
        (np.zeros((4, 8, 12), np.uint16), "abab", "got uint16: divide them by what is white"),
        (np.zeros((3, 8, 12), np.uint8), "abab", r"for each of 3 images, got labels of shape \(4,\)"),
        (np.zeros((3, 8, 12), np.uint8), np.eye(3), r"got labels of shape \(3, 3\): .* argmax\(1\) of one-hot"),
        (np.zeros((3, 8, 12), np.uint8), [0.5, 1, 2], "expected labels of text or whole numbers, got double"),
        (np.zeros((3, 8, 12), np.uint8), np.array([b"a", b"b", b"c"]), "or whole numbers, got binary: convert them"),
        (np.zeros((3, 8, 12), np.uint8), ["a", 1, None], "expected labels of text or whole numbers, got "),
    ],
)
def test_train_says_what_is_wrong_with_arrays(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clarity.train((images, list(labels) if isinstance(labels, str) else labels), **arguments())


def test_train_takes_two_arrays_alone() -> None:
    with pytest.raises(ValueError, match=r"expected arrays \(images, labels\), got 3 of them"):
        clarity.train((np.zeros((3, 8, 12)), [0, 1, 2], [1.0, 1.0, 1.0]), **arguments())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (np.array([0.0, 1.0, np.nan]), ["0", "1", None]),
        (torch.tensor([2, 0, 1]), ["2", "0", "1"]),
        (np.array([[2], [0], [1]]), ["2", "0", "1"]),
        (["cat", None, "dog"], ["cat", None, "dog"]),
    ],
)
def test_labels_of_arrays_are_names_of_classes(labels: Any, names: list[str | None]) -> None:
    assert label_names(labels, 3).to_pylist() == names
