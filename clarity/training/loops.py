"""Training loops, which yield the metrics of each epoch.

Knows the losses, the adversarial steps, the schedules, and how a run is cut and taken up again. Does not know files,
nor who else trains beside it: a process is told its rank and the world's size, and members of an ensemble do not depend
on either.

Shapes: N images, B rows, C, H, W image, D latent, K classes, M members.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clarity.classifiers import EnsembleConfig, ImageEnsemble, LatentEnsemble, stack_members
from clarity.rows import one_thread
from clarity.vae import VAEConfig, build_vae, elbo

Stacked = LatentEnsemble | ImageEnsemble

#: Of convolutions in training: fp32; bf16, with weights and sums in float32; auto: bf16 on CUDA, fp32 elsewhere.
PRECISIONS = ("auto", "fp32", "bf16")


def mixed_precision(precision: str, device: torch.device) -> torch.autocast:
    """The arithmetic of convolutions in training, for one of PRECISIONS."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    enabled = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@dataclass(frozen=True)
class VAETraining:
    """How the VAE is trained.

    Args:
        epochs: passes over the images.
        min_updates: a small data set is passed over more often, up to this many updates.
        batch_size: of all workers together.
        learning_rate: the peak of a one-cycle schedule (Smith and Topin 2018).
        seed: of the weights, the order and the noise.
    """

    epochs: int = 12
    min_updates: int = 1200
    batch_size: int = 128
    learning_rate: float = 0.003
    seed: int = 0

    def __post_init__(self) -> None:
        _check_training(self)


@dataclass(frozen=True)
class EnsembleTraining:
    """How the latent ensemble is trained.

    Args:
        epochs: passes over the codes.
        min_updates: a small data set is passed over more often, up to this many updates.
        batch_size: codes that each member sees in an update.
        learning_rate: at the start of a cosine decay.
        adversarial_eps: FGSM step (Goodfellow et al. 2015), in standard deviations of the codes.
        balance: weight of a class, as a power of one over its share of the images: 0 is none, 1 makes all count alike.
        seed: with a member's number, of its weights, order and noise.
    """

    epochs: int = 15
    min_updates: int = 5000
    batch_size: int = 256
    learning_rate: float = 0.02
    adversarial_eps: float = 0.2
    balance: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_training(self)


@dataclass(frozen=True)
class ImageTraining:
    """How the image ensemble is trained; fields as in ``EnsembleTraining``, but eps in pixel values."""

    epochs: int = 4
    min_updates: int = 600
    batch_size: int = 128
    learning_rate: float = 0.003
    adversarial_eps: float = 0.1
    balance: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_training(self)


def _check_training(training: Any) -> None:
    for name, least in (("epochs", 1), ("min_updates", 0), ("batch_size", 1), ("seed", 0)):
        if getattr(training, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(training, name)}")
    if not training.learning_rate > 0:
        raise ValueError(f"learning_rate must be above 0, got {training.learning_rate}")
    for name in ("adversarial_eps", "balance"):
        if not getattr(training, name, 0) >= 0:
            raise ValueError(f"{name} must be at least 0, got {getattr(training, name)}")


def num_epochs(training: VAETraining | EnsembleTraining | ImageTraining, num_images: int) -> int:
    """Epochs over so many images: those asked for, or more until ``min_updates`` are made."""
    return max(training.epochs, math.ceil(training.min_updates / _updates(num_images, training.batch_size)))


@dataclass(frozen=True)
class Epoch:
    """One epoch of a loop: what to print, and what a later process needs to go on from here.

    Args:
        number: epochs done, from 1.
        total: epochs in all.
        metrics: means over the epoch.
        state: makes the tensors of the checkpoint; copies nothing until called.
    """

    number: int
    total: int
    metrics: dict[str, float]
    state: Callable[[], dict[str, Tensor]]


# ---- the VAE -------------------------------------------------------------------------------------------------------


def train_vae(
    images: Tensor,
    config: VAEConfig,
    training: VAETraining,
    *,
    state: Mapping[str, Tensor] | None = None,
    rank: int = 0,
    world: int = 1,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    device: str | torch.device = "cpu",
    precision: str = "auto",
) -> Iterator[Epoch]:
    """Train a VAE by Adam under a one-cycle schedule.

    Every rank sees the same order and noise and takes its share of each batch, gradients are averaged by ``wrap`` and
    BatchNorm's moments over all ranks, so the result depends on the world's size only by rounding.

    Args:
        images: uint8 (N, C, H, W), the same on every rank; moved to the device whole, so no step waits for data.
        config: of the VAE.
        training: how.
        state: of an earlier run's epoch, to go on from it.
        rank: of this process.
        world: number of processes.
        wrap: makes the module data-parallel.
        device: to train on.
        precision: one of PRECISIONS.

    Yields:
        An Epoch each, with loss, reconstruction and kl in nats.
    """
    device = torch.device(device)
    images = images.to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        vae = build_vae(config)
    adam = Adam(dict(vae.named_parameters()))
    done = 0
    if state is not None:
        vae.load_state_dict(weights_of(state))
        done = int(state["epoch"])
    vae.to(device).to(memory_format=torch.channels_last).train()
    adam.load(state, device)
    model = wrap(_synchronised(vae) if world > 1 else vae)

    total, updates = num_epochs(training, len(images)), _updates(len(images), training.batch_size)
    for epoch in range(done, total):
        generator = _generator(training.seed, "vae", epoch)
        order = torch.randperm(len(images), generator=generator)
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for update in range(updates):
            batch = order[update * training.batch_size : (update + 1) * training.batch_size]
            noise = torch.randn((len(batch), config.latent_dim), generator=generator)[rank::world]
            x = images[batch[rank::world].to(device)].float().div_(255).contiguous(memory_format=torch.channels_last)
            with mixed_precision(precision, device):
                parts = elbo(model, x, noise.to(device), config)
            # Ranks' gradients are averaged: this makes the average the mean over the whole batch.
            share = len(x) * world / len(batch)
            model.zero_grad()
            (parts["loss"] * share).backward()
            step = epoch * updates + update
            adam.step(one_cycle(step, total * updates, training.learning_rate))
            sums += torch.stack(list(parts.values())).detach() * share
        loss, reconstruction, kl = (sums / updates).tolist()
        metrics = {"loss": loss, "reconstruction": reconstruction, "kl": kl}
        if not math.isfinite(loss):
            raise ValueError(f"the VAE's loss is {loss} after epoch {epoch + 1}: lower its learning_rate")

        def snapshot(done: int = epoch + 1) -> dict[str, Tensor]:
            weights = {f"model.{name}": tensor.detach().clone() for name, tensor in vae.state_dict().items()}
            return {**weights, **adam.state(), "epoch": torch.tensor(done)}

        yield Epoch(epoch + 1, total, metrics, snapshot)


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all processes; what each of them makes of it flows back to all."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """The sum."""
        value = value.clone()
        torch.distributed.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The sum of the gradients."""
        gradient = gradients[0].clone()
        torch.distributed.all_reduce(gradient)
        return gradient


class SynchronisedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes, also on CPU, where torch's own does not work."""

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x; running moments are those of all processes' batches."""
        if not self.training:
            return super().forward(x)
        rows = x.new_tensor([x.numel() / x.shape[1]])
        sums = _SumOverRanks.apply(torch.cat([x.sum((0, 2, 3)), rows]).float())
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean[:, None, None].to(x.dtype)
        variance = _SumOverRanks.apply(centred.float().square().sum((0, 2, 3))) / count
        with torch.no_grad():
            momentum = self.momentum or 0.1
            assert self.running_mean is not None and self.running_var is not None
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / (count - 1).clamp_min(1), momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centred * scale[:, None, None].to(x.dtype) + self.bias[:, None, None].to(x.dtype)


def _synchronised(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if type(part) is nn.BatchNorm2d:
            part.__class__ = SynchronisedBatchNorm
    return module


# ---- ensembles -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codes:
    """What the latent ensemble is trained on: posteriors (N, D) and labels (N,) of the labelled images."""

    mean: Tensor
    log_var: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Codes:
        """Some of the rows."""
        return Codes(self.mean[rows], self.log_var[rows], self.labels[rows])


def train_latent_members(
    codes: Codes,
    config: EnsembleConfig,
    training: EnsembleTraining,
    members: Sequence[int],
    *,
    states: Mapping[int, Mapping[str, Tensor]] | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[Epoch]:
    """Train some members of the latent ensemble as one stack.

    The loss is the cross-entropy of codes drawn from the posterior, plus that of the same codes after an FGSM step. A
    member's bits on CPU depend on its number, the codes and the training alone, not on which others share the stack.

    Args:
        codes: the training set.
        config: of the ensemble.
        training: how.
        members: their numbers.
        states: checkpoints of these members, all of one epoch, to go on from.
        device: to train on.

    Yields:
        An Epoch each, with loss and accuracy (on clean codes); its state is a stack, cut by ``member_states``.
    """
    device = torch.device(device)
    std = (codes.mean.var(0, unbiased=False) + codes.log_var.exp().mean(0)).mean().sqrt()
    eps = training.adversarial_eps * float(std)
    labels = codes.labels.to(device)
    posteriors = torch.cat([codes.mean, torch.exp(0.5 * codes.log_var)], 1).to(device)

    def draw(rows: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        noise = torch.stack([torch.randn((rows.shape[1], config.latent_dim), generator=g) for g in generators])
        rows = rows.to(device)
        mean, deviation = posteriors.index_select(0, rows.flatten()).view(*rows.shape, -1).chunk(2, -1)
        return mean + deviation * noise.to(device), labels[rows]

    def build(m: int) -> LatentEnsemble:
        return _fresh(lambda: LatentEnsemble(_single(config)), training.seed, "latent", m)

    yield from _train_members(build, draw, len(codes), labels, config, training, members, states, device, eps, None)


def train_image_members(
    images: Tensor,
    labels: Tensor,
    config: EnsembleConfig,
    vae_config: VAEConfig,
    training: ImageTraining,
    members: Sequence[int],
    *,
    states: Mapping[int, Mapping[str, Tensor]] | None = None,
    device: str | torch.device = "cpu",
    precision: str = "auto",
) -> Iterator[Epoch]:
    """Train some members of the image ensemble as one stack: cross-entropy of images, plus that after an FGSM step.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        config: of the ensemble.
        vae_config: whose encoder is the members' architecture.
        training: how.
        members: their numbers.
        states: checkpoints of these members, all of one epoch, to go on from.
        device: to train on.
        precision: one of PRECISIONS.
    """
    device = torch.device(device)
    images, labels = images.to(device), labels.to(device)

    def draw(rows: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        rows = rows.to(device)
        return images[rows].float().div_(255), labels[rows]

    def build(m: int) -> ImageEnsemble:
        return _fresh(lambda: ImageEnsemble(_single(config), vae_config), training.seed, "image", m)

    limits = (0.0, 1.0)
    yield from _train_members(
        build,
        draw,
        len(labels),
        labels,
        config,
        training,
        members,
        states,
        device,
        training.adversarial_eps,
        limits,
        precision,
    )


def _train_members(
    build: Callable[[int], Stacked],
    draw: Callable[[Tensor, list[torch.Generator]], tuple[Tensor, Tensor]],
    num_rows: int,
    labels: Tensor,
    config: EnsembleConfig,
    training: EnsembleTraining | ImageTraining,
    members: Sequence[int],
    states: Mapping[int, Mapping[str, Tensor]] | None,
    device: torch.device,
    eps: float,
    limits: tuple[float, float] | None,
    precision: str = "fp32",
) -> Iterator[Epoch]:
    stack: Any = stack_members([build(m) for m in members])  # type: ignore[type-var]
    adam = Adam(dict(stack.named_parameters()))
    done = 0
    joined = None
    if states is not None:
        joined = join_states([states[m] for m in members])
        stack.load_state_dict(weights_of(joined))
        done = int(joined["epoch"])
    stack.to(device).train()
    if isinstance(stack, ImageEnsemble):
        stack.to(memory_format=torch.channels_last)
    adam.load(joined, device)
    weights = _class_weights(labels.cpu(), config.num_classes, training.balance).to(device)

    total, updates = num_epochs(training, num_rows), _updates(num_rows, training.batch_size)
    parameters = list(stack.parameters())
    for epoch in range(done, total):
        generators = [_generator(training.seed, f"{type(stack).__name__}:{m}", epoch) for m in members]
        orders = torch.stack([torch.randperm(num_rows, generator=generator) for generator in generators])
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        # One thread, because long sums cut by the number of threads would make a member depend on the machine.
        with one_thread():
            for update in range(updates):
                rows = orders[:, update * training.batch_size : (update + 1) * training.batch_size]
                x, targets = draw(rows, generators)
                x.requires_grad_()
                with mixed_precision(precision, device):
                    logits = stack(x).float()
                clean = _cross_entropy(logits, targets, weights)
                gradients = torch.autograd.grad(clean, [x, *parameters])
                if eps > 0:
                    moved = x.detach() + gradients[0].sign() * eps
                    moved = moved.clamp_(*limits) if limits else moved
                    with mixed_precision(precision, device):
                        attacked = stack(moved).float()
                    extra = torch.autograd.grad(_cross_entropy(attacked, targets, weights), parameters)
                    gradients = (gradients[0], *(a + b for a, b in zip(gradients[1:], extra)))
                for parameter, gradient in zip(parameters, gradients[1:]):
                    parameter.grad = gradient
                step = epoch * updates + update
                adam.step(cosine(step, total * updates, training.learning_rate))
                hits = (logits.detach().argmax(-1) == targets).double().mean()
                sums += torch.stack([clean.detach().double() / len(members), hits])
        loss, accuracy = (sums / updates).tolist()
        if not math.isfinite(loss):
            raise ValueError(f"the ensemble's loss is {loss} after epoch {epoch + 1}: lower its learning_rate")

        def snapshot(done: int = epoch + 1) -> dict[str, Tensor]:
            tensors = {f"model.{name}": tensor.detach().clone() for name, tensor in stack.state_dict().items()}
            return {**tensors, **adam.state(), "epoch": torch.tensor(done)}

        yield Epoch(epoch + 1, total, {"loss": loss, "accuracy": accuracy}, snapshot)


def weights_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's own tensors among those of a checkpoint."""
    return {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}


def member_states(stack: Mapping[str, Tensor], num_members: int) -> list[dict[str, Tensor]]:
    """The checkpoint of a stack cut into one for each of its members."""
    cut: dict[str, Sequence[Tensor]] = {
        name: [tensor] * num_members if tensor.ndim == 0 else tensor.chunk(num_members)
        for name, tensor in stack.items()
    }
    return [{name: parts[m].clone() for name, parts in cut.items()} for m in range(num_members)]


def join_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The inverse of ``member_states``."""
    return {
        name: tensor if tensor.ndim == 0 else torch.cat([state[name] for state in states])
        for name, tensor in states[0].items()
    }


def _cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum over the members of the mean over their rows, so that no member feels another's gradient."""
    # With the rows innermost the softmax fills the vector lanes, which a handful of classes does not.
    log_probs = logits.transpose(1, 2).contiguous().log_softmax(1)
    found = log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)
    return -(found * weights[targets]).sum() / targets.shape[1]


def _class_weights(labels: Tensor, num_classes: int, balance: float) -> Tensor:
    """A weight for each class, with mean 1 over the images."""
    counts = torch.bincount(labels, minlength=num_classes).double().clamp_min(1)
    weights = (counts / counts.sum()) ** -balance
    return (weights * counts.sum() / (weights * counts).sum()).float()


def _single(config: EnsembleConfig) -> EnsembleConfig:
    return replace(config, num_members=1)


def _fresh(build: Callable[[], Any], seed: int, stage: str, member: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(seed, stage, member))
        return build()


# ---- updates that have the same bits in any stack ------------------------------------------------------------------


class Adam:
    """Adam (Kingma and Ba 2015) of single, exactly rounded operations.

    Torch's own fuses products and sums in vector lanes but not in the remainder of an array, so a parameter's bits
    depend on its place in the stack; here they do not.
    """

    def __init__(
        self, parameters: dict[str, Tensor], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        self.parameters = parameters
        self.betas = betas
        self.eps = eps
        self.count = 0
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}

    def load(self, state: Mapping[str, Tensor] | None, device: torch.device) -> None:
        """Take up an earlier run's moments, or start with none."""
        self.count = 0 if state is None else int(state["adam.count"])
        for name, parameter in self.parameters.items():
            for key, moments in (("adam.first.", self.first), ("adam.second.", self.second)):
                moments[name] = torch.zeros_like(parameter, device=device)
                if state is not None:
                    moments[name].copy_(state[key + name])

    def state(self) -> dict[str, Tensor]:
        """Moments and count, for a checkpoint."""
        first = {f"adam.first.{name}": tensor.clone() for name, tensor in self.first.items()}
        second = {f"adam.second.{name}": tensor.clone() for name, tensor in self.second.items()}
        return {**first, **second, "adam.count": torch.tensor(self.count)}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update from the parameters' ``grad``."""
        self.count += 1
        beta1, beta2 = self.betas
        rate = learning_rate / (1 - beta1**self.count)
        root = math.sqrt(1 - beta2**self.count)
        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            first, second = self.first[name], self.second[name]
            first.mul_(beta1).add_(gradient * (1 - beta1))
            second.mul_(beta2).add_(gradient.square().mul_(1 - beta2))
            parameter.sub_((first * rate).div_(second.sqrt().div_(root).add_(self.eps)))


def one_cycle(step: int, total: int, peak: float, warmup: float = 0.3) -> float:
    """Learning rate of a one-cycle schedule: cosine from peak / 25 up to the peak, then down to almost nothing."""
    turn = warmup * total
    if step < turn:
        start, end, share = peak / 25, peak, step / turn
    else:
        start, end, share = peak, peak / 250_000, (step - turn) / max(total - 1 - turn, 1)
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def cosine(step: int, total: int, start: float) -> float:
    """Learning rate of a cosine decay to zero."""
    return start * (1 + math.cos(math.pi * step / total)) / 2


def _updates(num_images: int, batch_size: int) -> int:
    """Updates in an epoch; the rest of an uneven division waits for another epoch's order."""
    if num_images < 2:
        raise ValueError(f"training needs at least 2 images, got {num_images}")
    return max(num_images // batch_size, 1)


def _seed(seed: int, stage: str, number: int) -> int:
    """A seed for one use: neighbours do not overlap."""
    return (
        int.from_bytes(np.random.SeedSequence([seed, *stage.encode(), number]).generate_state(2).tobytes(), "little")
        >> 1
    )


def _generator(seed: int, stage: str, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(seed, stage, number))
