"""The training loops learn, resume bit by bit, and members do not depend on their stack."""

import dataclasses
import math
import multiprocessing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bars import CONFIG, ENSEMBLE, SHORT, SHORT_IMAGES, SHORT_VAE, BarsGuide, bars
from torch import Tensor

from clarity.judges import build_judge
from clarity.rows import encode_rows
from clarity.training.batch_norm import synchronise
from clarity.training.loops import (
    Codes,
    EnsembleTraining,
    Epoch,
    VAETraining,
    guide_loss,
    member_states,
    mixed_precision,
    num_epochs,
    seeded,
    train_image_members,
    train_latent_ensemble,
    train_latent_members,
    train_vae,
    vae_weights,
    weights_of,
)
from clarity.training.optimiser import Adam
from clarity.vae import VAE, vae_config


def some_codes(rows: int = 50) -> Codes:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(rows) % 3
    mean = torch.randn((rows, 5), generator=generator) * 0.3
    mean[torch.arange(rows), labels] += 1.5
    return Codes(mean, torch.full((rows, 5), -3.0), labels)


def known(labels: Tensor) -> Tensor:
    """Whether each image is of each of three classes, -1 where its class is unknown."""
    return torch.where(labels[:, None] < 0, -1, (labels[:, None] == torch.arange(3)).long())


def last(epochs: Iterator[Epoch]) -> Epoch:
    return list(epochs)[-1]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_train_vae_lowers_its_loss() -> None:
    images, _ = bars()
    epochs = list(train_vae(images, CONFIG, dataclasses.replace(SHORT_VAE, epochs=12)))
    assert [epoch.number for epoch in epochs] == list(range(1, 13))
    assert epochs[-1].metrics["loss"] < 0.9 * epochs[0].metrics["loss"]
    parts = epochs[-1].metrics
    assert parts["loss"] == pytest.approx(parts["reconstruction"] + parts["kl"], rel=1e-6)


@pytest.mark.parametrize(("architecture", "label_weight"), [("conv", 0), ("beta_vae", 0), ("conv", 2)])
def test_train_vae_goes_on_where_it_was_cut(architecture: str, label_weight: float) -> None:
    images, labels = bars(channels=3)
    config = vae_config(architecture, (3, 8, 12), latent_dim=5, channels=(6, 7), label_weight=label_weight)
    guide = build_judge((3, 8, 12), 3).eval().requires_grad_(False)
    loop = partial(train_vae, images, config, SHORT_VAE, known=known(labels), guide=guide)
    whole, first = last(loop()).state(), next(loop()).state()
    assert equal(last(loop(state=first)).state(), whole)
    VAE(config).load_state_dict(vae_weights(whole))


def test_train_vae_learns_labels_by_their_weight_where_there_are_any() -> None:
    images, labels = bars()
    config, training = dataclasses.replace(CONFIG, label_weight=20.0), dataclasses.replace(SHORT_VAE, epochs=24)
    plain = last(train_vae(images, CONFIG, training))
    assert equal(last(train_vae(images, CONFIG, training, known=known(labels))).state(), plain.state())
    assert equal(last(train_vae(images, config, training, known=known(labels * 0 - 1))).state(), plain.state())
    some = torch.where(torch.arange(len(labels)) % 4 > 0, labels, -1)
    epochs = list(train_vae(images, config, training, known=known(some)))
    parts = epochs[-1].metrics
    assert parts["labels"] < 0.5 * epochs[0].metrics["labels"]
    assert parts["loss"] == pytest.approx(parts["reconstruction"] + parts["kl"] + 20 * parts["labels"], rel=1e-6)
    apart = [between_classes(epoch.state(), images, labels) for epoch in (plain, epochs[-1])]
    assert apart[1] > 1.5 * apart[0]


def test_train_vae_draws_what_a_guide_sees_in_the_images() -> None:
    images, labels = bars(90)
    guide = BarsGuide()
    config, training = dataclasses.replace(CONFIG, label_weight=20.0), dataclasses.replace(SHORT_VAE, epochs=15)
    x = images.float() / 255
    excess = []
    for each in (None, guide):
        epoch = last(train_vae(images, config, training, known=known(labels), guide=each))
        vae = VAE(config).eval()
        vae.load_state_dict(vae_weights(epoch.state()))
        with torch.no_grad():
            excess.append(float(guide_loss(guide, vae.decode(vae.encode(x)[0]), x) - guide_loss(guide, x, x)))
    assert excess[1] < 0.8 * excess[0]
    parts = epoch.metrics
    taught = 20 * (parts["labels"] + parts["guide"])
    assert parts["loss"] == pytest.approx(parts["reconstruction"] + parts["kl"] + taught, rel=1e-6)


def between_classes(state: dict[str, Tensor], images: Tensor, labels: Tensor) -> float:
    """Variance of the classes' mean codes over that within the classes."""
    vae = VAE(CONFIG).eval()
    vae.load_state_dict(vae_weights(state))
    z, _ = encode_rows(vae, images.float() / 255)
    means = torch.stack([z[labels == label].mean(0) for label in labels.unique()])
    return float(means.var(0).mean() / (z - means[labels]).var(0).mean())


def test_train_vae_in_bf16_comes_close_and_keeps_float32_weights() -> None:
    images, _ = bars()
    full = last(train_vae(images, CONFIG, SHORT_VAE, precision="fp32"))
    short = last(train_vae(images, CONFIG, SHORT_VAE, precision="bf16"))
    assert short.metrics["loss"] == pytest.approx(full.metrics["loss"], rel=0.02)
    assert short.metrics["loss"] != full.metrics["loss"]
    assert {t.dtype for name, t in short.state().items() if name.endswith("weight")} == {torch.float32}
    with pytest.raises(ValueError, match="precision: expected one of auto, fp32, bf16, got 'fp8'"):
        next(train_vae(images, CONFIG, SHORT_VAE, precision="fp8"))


@pytest.mark.parametrize("has_it", [True, False])
def test_automatic_precision_is_bf16_on_the_gpus_that_have_it(has_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_it or including_emulation)
    expected = {"auto": has_it, "bf16": True, "fp32": False}
    assert {name: mixed_precision(name, torch.device("cuda"))._enabled for name in expected} == expected
    assert not mixed_precision("auto", torch.device("cpu"))._enabled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_synchronised_batch_norm_normalises_as_batch_norm_does(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: None)  # one process
    x = (8 + 0.3 * torch.randn((5, 3, 13, 17), generator=torch.Generator().manual_seed(0))).to(dtype)
    plain, ours = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    found = synchronise(ours)(x)
    torch.testing.assert_close(found, plain(x.float()).to(dtype), atol=1e-4, rtol=0.01)
    assert found.dtype == dtype
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, atol=1e-5, rtol=1e-5)


def test_train_vae_says_when_it_diverges() -> None:
    images, _ = bars()
    with pytest.raises(ValueError, match=r"^vae_learning_rate: the VAE's loss is .*: lower it$"):
        list(train_vae(images, CONFIG, dataclasses.replace(SHORT_VAE, learning_rate=1e30)))
    longer = dataclasses.replace(SHORT_VAE, learning_rate=3.0, epochs=20)
    with pytest.raises(ValueError, match=r"VAE's loss is \d.* after epoch \d+, \d\S* after the first: lower it"):
        list(train_vae(images, CONFIG, longer))


def test_training_goes_on_with_the_loss_by_which_it_tells_that_it_diverges() -> None:
    images, _ = bars()
    epoch = next(train_vae(images, CONFIG, SHORT_VAE))
    state = epoch.state()
    assert float(state["first_loss"]) == pytest.approx(epoch.metrics["loss"])
    state["first_loss"] = torch.tensor(0.01)
    with pytest.raises(ValueError, match=r"VAE's loss is \d\S* after epoch 2, 0\.01 after the first: lower it"):
        next(train_vae(images, CONFIG, SHORT_VAE, state=state))


LABELLED = dataclasses.replace(CONFIG, label_weight=2.0)


def fixed_guide() -> torch.nn.Module:
    """A guide with the same weights in every process."""
    return seeded(lambda: build_judge((1, 8, 12), 3), 1, "guide", 0).eval().requires_grad_(False)


def _rank(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    images, labels = bars()
    wrap: Callable[..., Any] = torch.nn.parallel.DistributedDataParallel if world > 1 else lambda module: module
    epoch = last(
        train_vae(
            images, LABELLED, SHORT_VAE, known=known(labels), guide=fixed_guide(), rank=rank, world=world, wrap=wrap
        )
    )
    torch.save(epoch.state(), f"{out}-{rank}")
    torch.distributed.destroy_process_group()


def test_train_vae_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    """Three ranks that share each batch of 16 unevenly end where one does, up to rounding."""
    images, labels = bars()
    alone = last(train_vae(images, LABELLED, SHORT_VAE, known=known(labels), guide=fixed_guide())).state()
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
    for state in states:
        del state["first_loss"]  # of the rank's share of the images
    assert equal(states[0], states[1]) and equal(states[0], states[2])
    # What the networks do, not their weights: a bias before BatchNorm has no effect, and follows rounding alone.
    codes = []
    for state in (alone, states[0]):
        vae = VAE(CONFIG).eval()
        vae.load_state_dict(vae_weights(state))
        codes.append(encode_rows(vae, images.float() / 255)[0])
    # 0.005 by rounding, which Adam's first steps enlarge; 0.03 when each rank normalises by its own rows.
    assert (codes[0] - codes[1]).abs().max() < 0.01


def latent_loop(members: list[int], states: Any = None, training: EnsembleTraining = SHORT) -> Iterator[Epoch]:
    return train_latent_members(some_codes(), ENSEMBLE, training, members, states=states)


def image_loop(members: list[int], states: Any = None, training: EnsembleTraining = SHORT_IMAGES) -> Iterator[Epoch]:
    images, labels = bars()
    return train_image_members(images, labels, ENSEMBLE, CONFIG, training, members, states=states)


def by_member(epoch: Epoch, members: list[int]) -> dict[int, dict[str, Tensor]]:
    return dict(zip(members, member_states(epoch.state(), len(members))))


@pytest.mark.parametrize(
    ("loop", "said"),
    [
        (latent_loop, "^ensemble_learning_rate: the ensemble's loss is .*: lower it$"),
        (image_loop, "^image_learning_rate: the image ensemble's loss is .*: lower it$"),
    ],
)
def test_members_that_diverge_name_their_own_learning_rate(loop: Callable[..., Iterator[Epoch]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        list(loop([0, 1], training=dataclasses.replace(SHORT, learning_rate=1e30)))


def test_latent_members_learn() -> None:
    epochs = list(latent_loop([0, 1, 2], training=dataclasses.replace(SHORT, epochs=40)))
    assert epochs[-1].metrics["accuracy"] > 0.9
    assert epochs[-1].metrics["loss"] < epochs[0].metrics["loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_image_members_learn(precision: str) -> None:
    images, labels = bars()
    training = dataclasses.replace(SHORT_IMAGES, epochs=80)
    epochs = list(train_image_members(images, labels, ENSEMBLE, CONFIG, training, [0, 1], precision=precision))
    assert epochs[-1].metrics["accuracy"] > 0.9
    weights = weights_of(epochs[-1].state())
    assert {t.dtype for t in weights.values() if t.is_floating_point()} == {torch.float32}


def test_latent_members_have_the_same_bits_in_any_stack() -> None:
    everyone = list(range(5))
    expected = by_member(last(latent_loop(everyone)), everyone)
    for mine in ([0, 3], [4, 1], [2]):
        for m, state in by_member(last(latent_loop(mine)), mine).items():
            assert equal({**state, "first_loss": expected[m]["first_loss"]}, expected[m]), m  # the mean over a stack


@pytest.mark.parametrize("loop", [latent_loop, image_loop])
def test_members_go_on_where_they_were_cut(loop: Callable[..., Iterator[Epoch]]) -> None:
    members = [1, 4]
    whole = by_member(last(loop(members)), members)
    first = by_member(next(loop(members)), members)
    assert all(equal(state, whole[m]) for m, state in by_member(last(loop(members, first)), members).items())
    assert not equal(whole[1], whole[4])


def test_adversarial_training_withstands_the_step() -> None:
    """After an FGSM step of half a standard deviation, who was trained with such steps is right more often."""
    accuracy = []
    for eps in (0.0, 0.5):
        training = dataclasses.replace(SHORT, epochs=60, adversarial_eps=eps)
        codes = some_codes()
        ensemble = train_latent_ensemble(codes, dataclasses.replace(ENSEMBLE, num_members=3), training)
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
        ensemble = train_latent_ensemble(codes, dataclasses.replace(ENSEMBLE, num_members=1), training)
        probs = ensemble(codes.mean[codes.labels == 2]).softmax(-1)
        recall.append(float(probs[..., 2].mean()))
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
