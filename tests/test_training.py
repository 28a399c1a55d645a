"""The training loops: they learn, they resume bit by bit, and a member does not know who trains beside it."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from object_store import ObjectStore
from torch import Tensor

import clarity
from clarity import storage
from clarity.classifiers import EnsembleConfig, LatentEnsemble
from clarity.data import open_dataset
from clarity.model import load_tensors, read_card
from clarity.rows import encode_rows
from clarity.training.batch_norm import SynchronisedBatchNorm
from clarity.training.evaluate import classification_metrics
from clarity.training.loops import (
    Codes,
    EnsembleTraining,
    Epoch,
    VAETraining,
    join_states,
    member_states,
    num_epochs,
    train_image_members,
    train_latent_members,
    train_vae,
    weights_of,
)
from clarity.training.optimiser import Adam, cosine_decay, one_cycle
from clarity.training.plan import FINISHED, TrainingPlan, begin, plan_training
from clarity.training.stages import STAGES, Worker, finish, run_stages, stage_done
from clarity.vae import VAE, VAEConfig, vae_config

CONFIG = VAEConfig(image_shape=(1, 8, 12), latent_dim=5, channels=(6, 7))
ENSEMBLE = EnsembleConfig(num_classes=3, latent_dim=5, hidden=(6, 7), num_members=5)
SHORT_VAE = VAETraining(epochs=3, min_updates=0, batch_size=16)
SHORT = EnsembleTraining(epochs=3, min_updates=0, batch_size=16)
SHORT_IMAGES = EnsembleTraining(epochs=2, min_updates=0, batch_size=16)


def pictures(rows: int = 50, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Bars at one of three heights, with noise: uint8 (N, C, 8, 12) and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % 3
    x = torch.randint(0, 60, (rows, channels, 8, 12), generator=generator)
    for i, k in enumerate(labels.tolist()):
        x[i, :, 1 + 2 * k : 3 + 2 * k, 2:10] += 180
    return x.to(torch.uint8), labels


def some_codes(rows: int = 50) -> Codes:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(rows) % 3
    mean = torch.randn((rows, 5), generator=generator) * 0.3
    mean[torch.arange(rows), labels] += 1.5
    return Codes(mean, torch.full((rows, 5), -3.0), labels)


def last(epochs: Iterator[Epoch]) -> Epoch:
    return list(epochs)[-1]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_train_vae_lowers_its_loss() -> None:
    images, _ = pictures()
    epochs = list(train_vae(images, CONFIG, dataclasses.replace(SHORT_VAE, epochs=12)))
    assert [epoch.number for epoch in epochs] == list(range(1, 13))
    assert epochs[-1].metrics["loss"] < 0.9 * epochs[0].metrics["loss"]
    parts = epochs[-1].metrics
    assert parts["loss"] == pytest.approx(parts["reconstruction"] + parts["kl"], rel=1e-6)


@pytest.mark.parametrize("architecture", ["conv", "beta_vae"])
def test_train_vae_goes_on_where_it_was_cut(architecture: str) -> None:
    images, _ = pictures(channels=3)
    config = vae_config(architecture, (3, 8, 12), latent_dim=5, channels=(6, 7))
    whole = last(train_vae(images, config, SHORT_VAE)).state()
    first = next(train_vae(images, config, SHORT_VAE)).state()
    assert equal(last(train_vae(images, config, SHORT_VAE, state=first)).state(), whole)


def test_train_vae_in_bf16_comes_close_and_keeps_float32_weights() -> None:
    images, _ = pictures()
    full = last(train_vae(images, CONFIG, SHORT_VAE, precision="fp32"))
    short = last(train_vae(images, CONFIG, SHORT_VAE, precision="bf16"))
    assert short.metrics["loss"] == pytest.approx(full.metrics["loss"], rel=0.02)
    assert short.metrics["loss"] != full.metrics["loss"]
    assert {t.dtype for name, t in short.state().items() if name.endswith("weight")} == {torch.float32}
    with pytest.raises(ValueError, match="precision: expected one of auto, fp32, bf16, got 'fp8'"):
        next(train_vae(images, CONFIG, SHORT_VAE, precision="fp8"))


def test_train_vae_depends_on_the_seed() -> None:
    images, _ = pictures()
    states = [
        last(train_vae(images, CONFIG, dataclasses.replace(SHORT_VAE, epochs=1, seed=seed))).state()
        for seed in (0, 0, 1)
    ]
    assert equal(states[0], states[1]) and not equal(states[0], states[2])


def test_train_vae_says_when_it_diverges() -> None:
    images, _ = pictures()
    with pytest.raises(ValueError, match=r"the VAE's loss is .* lower its learning_rate"):
        list(train_vae(images, CONFIG, dataclasses.replace(SHORT_VAE, learning_rate=1e30)))


def _rank(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    images, _ = pictures()
    wrap: Callable[..., Any] = torch.nn.parallel.DistributedDataParallel if world > 1 else lambda module: module
    epoch = last(train_vae(images, CONFIG, SHORT_VAE, rank=rank, world=world, wrap=wrap))
    torch.save(epoch.state(), f"{out}-{rank}")
    torch.distributed.destroy_process_group()


def test_train_vae_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    """Three ranks that share each batch of 16 unevenly end where one does, up to rounding."""
    images, _ = pictures()
    alone = last(train_vae(images, CONFIG, SHORT_VAE)).state()
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_rank, args=(rank, 3, str(tmp_path / "store"), str(tmp_path / "state")))
        for rank in range(3)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        assert process.exitcode == 0
    states = [torch.load(tmp_path / f"state-{rank}", weights_only=True) for rank in range(3)]
    assert equal(states[0], states[1]) and equal(states[0], states[2])
    # What the networks do, not their weights: a bias before BatchNorm has no effect, and follows rounding alone.
    codes = []
    for state in (alone, states[0]):
        vae = VAE(CONFIG).eval()
        vae.load_state_dict(weights_of(state))
        codes.append(encode_rows(vae, images.float() / 255)[0])
    # 0.005 by rounding, which Adam's first steps enlarge; 0.03 when each rank normalises by its own rows.
    assert (codes[0] - codes[1]).abs().max() < 0.01


def test_synchronised_batch_norm_alone_is_batch_norm(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ours, theirs = SynchronisedBatchNorm(4), torch.nn.BatchNorm2d(4)
        x = torch.randn(5, 4, 3, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [layer(value) for layer, value in zip((ours, theirs), inputs)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            (output * torch.linspace(0, 1, 120).view(5, 4, 3, 2)).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    finally:
        torch.distributed.destroy_process_group()


def latent_loop(members: list[int], states: Any = None, training: EnsembleTraining = SHORT) -> Iterator[Epoch]:
    return train_latent_members(some_codes(), ENSEMBLE, training, members, states=states)


def image_loop(members: list[int], states: Any = None, training: EnsembleTraining = SHORT_IMAGES) -> Iterator[Epoch]:
    images, labels = pictures()
    return train_image_members(images, labels, ENSEMBLE, CONFIG, training, members, states=states)


def by_member(epoch: Epoch, members: list[int]) -> dict[int, dict[str, Tensor]]:
    return dict(zip(members, member_states(epoch.state(), len(members))))


def test_latent_members_learn() -> None:
    epochs = list(latent_loop([0, 1, 2], training=dataclasses.replace(SHORT, epochs=40)))
    assert epochs[-1].metrics["accuracy"] > 0.9
    assert epochs[-1].metrics["loss"] < epochs[0].metrics["loss"]


def test_image_members_learn() -> None:
    epochs = list(image_loop([0, 1], training=dataclasses.replace(SHORT_IMAGES, epochs=80)))
    assert epochs[-1].metrics["accuracy"] > 0.9


def test_image_members_learn_in_bf16() -> None:
    images, labels = pictures()
    training = dataclasses.replace(SHORT_IMAGES, epochs=80)
    epochs = list(train_image_members(images, labels, ENSEMBLE, CONFIG, training, [0, 1], precision="bf16"))
    assert epochs[-1].metrics["accuracy"] > 0.9
    weights = weights_of(epochs[-1].state())
    assert {t.dtype for t in weights.values() if t.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("world", [2, 3])
def test_latent_members_have_the_same_bits_in_any_stack(world: int) -> None:
    everyone = list(range(5))
    expected = by_member(last(latent_loop(everyone)), everyone)
    for rank in range(world):
        mine = everyone[rank::world]
        for m, state in by_member(last(latent_loop(mine)), mine).items():
            assert equal(state, expected[m]), m


@pytest.mark.parametrize("loop", [latent_loop, image_loop])
def test_members_go_on_where_they_were_cut(loop: Callable[..., Iterator[Epoch]]) -> None:
    members = [1, 4]
    whole = by_member(last(loop(members)), members)
    first = by_member(next(loop(members)), members)
    assert all(equal(state, whole[m]) for m, state in by_member(last(loop(members, first)), members).items())
    assert not equal(whole[1], whole[4])


def test_members_go_on_in_another_stack() -> None:
    everyone = list(range(5))
    expected = by_member(last(latent_loop(everyone)), everyone)
    first = by_member(next(latent_loop(everyone)), everyone)
    for members in ([0, 2, 4], [1, 3]):
        for m, state in by_member(last(latent_loop(members, first)), members).items():
            assert equal(state, expected[m])


def test_adversarial_step_changes_the_result() -> None:
    plain = last(latent_loop([0], training=dataclasses.replace(SHORT, adversarial_eps=0.0))).state()
    moved = last(latent_loop([0])).state()
    assert not equal(plain, moved)


def test_adversarial_training_withstands_the_step() -> None:
    """After an FGSM step of half a standard deviation, who was trained with such steps is right more often."""
    accuracy = []
    for eps in (0.0, 0.5):
        training = dataclasses.replace(SHORT, epochs=60, adversarial_eps=eps)
        state = last(latent_loop([0, 1, 2], training=training)).state()
        ensemble = LatentEnsemble(dataclasses.replace(ENSEMBLE, num_members=3))
        ensemble.load_state_dict(weights_of(state))
        codes = some_codes()
        z = codes.mean.expand(3, -1, -1).clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(ensemble(z).flatten(0, 1), codes.labels.repeat(3))
        (gradient,) = torch.autograd.grad(loss, z)
        moved = ensemble(z.detach() + 0.5 * gradient.sign())
        accuracy.append(float((moved.argmax(-1) == codes.labels).double().mean()))
    assert accuracy[1] > accuracy[0]


def test_balance_lifts_the_rare_class() -> None:
    codes = some_codes(90)
    rare = (codes.labels != 2) | (torch.arange(90) < 9)
    codes = Codes(codes.mean * 0.5, codes.log_var, codes.labels).take(rare)
    recall = []
    for balance in (0.0, 1.0):
        training = EnsembleTraining(epochs=40, min_updates=0, batch_size=16, balance=balance, learning_rate=0.01)
        state = last(train_latent_members(codes, ENSEMBLE, training, [0])).state()
        ensemble = LatentEnsemble(dataclasses.replace(ENSEMBLE, num_members=1))
        ensemble.load_state_dict(weights_of(state))
        probs = ensemble(codes.mean[codes.labels == 2]).softmax(-1)
        recall.append(float(probs[..., 2].mean().detach()))
    assert recall[1] > recall[0] + 0.1


def test_adam_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(3, 4), torch.nn.Parameter(torch.empty(3, 4))
    theirs.data.copy_(ours)
    adam = Adam([("p", ours)], 0.02)
    reference = torch.optim.Adam([theirs], lr=0.02)
    for _ in range(7):
        gradient = torch.randn(3, 4)
        ours.grad, theirs.grad = gradient, gradient.clone()
        adam.step()
        reference.step()
    torch.testing.assert_close(ours, theirs.data)


def test_member_states_and_join_are_inverse() -> None:
    stack = {"a": torch.randn(6, 2), "b": torch.tensor(3)}
    parts = member_states(stack, 3)
    assert [part["a"].shape for part in parts] == [(2, 2)] * 3
    assert equal(join_states(parts), stack)


def test_schedules_start_peak_and_end() -> None:
    rates: dict[Any, list[float]] = {}
    for schedule_of, peak in ((one_cycle, 0.003), (cosine_decay, 0.02)):
        adam = Adam([("p", torch.zeros(1))], peak)
        schedule = schedule_of(adam, 100)
        for _ in range(100):
            rates.setdefault(schedule_of, []).append(schedule.get_last_lr()[0])
            adam.step()
            schedule.step()
    cycle, decay = rates[one_cycle], rates[cosine_decay]
    assert max(cycle) == pytest.approx(0.003) and cycle.index(max(cycle)) == 29
    assert cycle[0] == pytest.approx(0.003 / 25) and cycle[-1] < 1e-6
    assert decay[0] == 0.02 and decay == sorted(decay, reverse=True) and decay[-1] < 1e-5


def test_small_sets_are_passed_over_more_often() -> None:
    training = VAETraining(epochs=12, min_updates=1000, batch_size=128)
    assert num_epochs(training, 60_000) == 12
    assert num_epochs(training, 4_500) == math.ceil(1000 / 35)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate: expected more than 0, got nan"),
        ({"adversarial_eps": -0.1}, "adversarial_eps: expected at least 0"),
        ({"balance": -1.0}, "balance: expected at least 0"),
    ],
)
def test_training_says_what_is_wrong(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnsembleTraining(**fields)


def arguments(**changes: Any) -> dict[str, Any]:
    return {
        "vae_fields": {"latent_dim": 5, "channels": (6, 7)},
        "num_members": 4,
        "hidden": (6, 7),
        "vae_training": SHORT_VAE,
        "ensemble_training": SHORT,
        "image_training": SHORT_IMAGES,
        **changes,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 120 pictures in class folders, two of them broken."""
    from PIL import Image

    directory = tmp_path_factory.mktemp("bars")
    images, labels = pictures(120)
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
    run_stages(plan, STAGES, Worker())
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
        run_stages(plan, ("latent", "images"), Worker(rank, 3))
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
    run_stages(plan, STAGES, Worker())
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
            run_stages(plan, STAGES, Worker(log=log))
            break
        except Cut:
            continue
    assert cuts
    finish(plan)
    assert files_of(tmp_path) == uncut


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
    run_stages(plan, STAGES, Worker())
    finish(plan)
    with pytest.raises(ValueError, match=r"Choose another directory, or delete that one"):
        begin(plan_of(folder, tmp_path, vae_training=dataclasses.replace(SHORT_VAE, seed=1)))


def test_worker_that_does_not_see_the_model_directory_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rank 1 does not see .* a shared mount"):
        run_stages(plan_of(folder, tmp_path), STAGES, Worker(1, 2))


def test_training_on_an_object_store_is_that_on_a_disk(folder: Path, tmp_path: Path, uncut: dict[str, bytes]) -> None:
    with ObjectStore() as store:
        plan = dataclasses.replace(plan_of(folder, tmp_path, image_members=3, num_folds=2), out=store.uri("runs/model"))
        assert not begin(plan)
        run_stages(plan, STAGES, Worker())
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
    assert not stage_done(plan, "latent")
    assert read_card(tmp_path) is None


def test_train_takes_arrays() -> None:
    images, labels = pictures(90)
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


def test_classification_metrics_by_hand() -> None:
    probs = torch.tensor([[[0.8, 0.1, 0.1], [0.6, 0.3, 0.1]], [[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]]])
    found = classification_metrics(probs.log(), torch.tensor([0, 0]), ["a", "b", "c"])
    assert found["accuracy"] == 0.5 and found["member_accuracy"] == [1.0, 0.5]
    assert found["per_class"] == {"a": 0.5} and found["balanced_accuracy"] == 0.5
    # Two bins of one image each: certain by 0.7 and right, by 0.5 and wrong.
    assert found["calibration_error"] == pytest.approx((0.3 + 0.5) / 2)
    assert found["nll"] == pytest.approx(-(math.log(0.7) + math.log(0.4)) / 2)
    json.dumps(found)
