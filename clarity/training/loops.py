"""Training loops of the VAE and of ensemble members, which yield the metrics of each epoch."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from clarity.classifiers import EnsembleConfig, ImageEnsemble, LatentEnsemble, stack_members
from clarity.rows import one_thread
from clarity.training.batch_norm import synchronise
from clarity.training.optimiser import Adam, cosine_decay, derived_seed, generator_for, one_cycle
from clarity.vae import VAE, VAEConfig, elbo

#: Receives lines about the progress.
Log = Callable[[str], None]

#: Seconds after which a loop logs how far it is, however long an epoch takes.
LOG_SECONDS = 20.0
#: A training whose loss exceeds so many times that of its first epoch has diverged, and would go on for nothing.
DIVERGED = 100.0

#: Arithmetic of convolutions in training: fp32; bf16, with float32 weights and sums; auto: bf16 on the GPUs that have
#: it (since 2020; others are slower by it), else fp32.
PRECISIONS = ("auto", "fp32", "bf16")


def mixed_precision(precision: str, device: torch.device) -> torch.autocast:
    """The autocast context of one of PRECISIONS."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "auto" and device.type == "cuda":
        enabled = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        enabled = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@dataclass(frozen=True)
class VAETraining:
    """How the VAE is trained.

    Args:
        epochs: passes over the data.
        min_updates: minimum number of updates: a small data set gets more epochs; none where epochs are given.
        batch_size: images of an update, over all workers.
        learning_rate: peak of the one-cycle schedule (Smith and Topin 2018).
        seed: of the weights, the order and the noise.
    """

    epochs: int = 12
    min_updates: int = 1200
    batch_size: int = 128
    learning_rate: float = 0.003
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"epochs": 1, "min_updates": 0, "batch_size": 1, "seed": 0, "adversarial_eps": 0, "balance": 0}
        for name, value in asdict(self).items():
            if name in least and not value >= least[name]:
                raise ValueError(f"{name}: expected at least {least[name]}, got {value}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected more than 0, got {self.learning_rate}")


@dataclass(frozen=True)
class EnsembleTraining(VAETraining):
    """How an ensemble of classifiers is trained; the defaults are those of the latent ensemble.

    Args:
        epochs: passes over the data.
        min_updates: minimum number of updates: a small data set gets more epochs; none where epochs are given.
        batch_size: rows of an update, for each member.
        learning_rate: at the start of the cosine decay.
        adversarial_eps: FGSM step (Goodfellow et al. 2015), in standard deviations of the codes, or in pixel values.
        balance: class weights, as a power of the inverse class frequency; 0: none, 1: all classes count equally.
        seed: with a member's number, of its weights, order and noise.
    """

    epochs: int = 15
    min_updates: int = 5000
    batch_size: int = 256
    learning_rate: float = 0.02
    adversarial_eps: float = 0.2
    balance: float = 0.0


#: Defaults of the image ensemble.
IMAGE_TRAINING = EnsembleTraining(epochs=4, min_updates=600, batch_size=128, learning_rate=0.003, adversarial_eps=0.1)


def updates_per_epoch(num_rows: int, batch_size: int) -> int:
    """Updates in an epoch; rows left over by an uneven division are dropped until the next epoch's shuffle."""
    if num_rows < 2:
        raise ValueError(f"training needs at least 2 images, got {num_rows}")
    return max(num_rows // batch_size, 1)


def num_epochs(training: VAETraining, num_rows: int) -> int:
    """Epochs over so many rows: those asked for, or more until ``min_updates`` are made."""
    return max(training.epochs, math.ceil(training.min_updates / updates_per_epoch(num_rows, training.batch_size)))


def num_updates(training: VAETraining, num_rows: int) -> int:
    """Updates of a whole training on so many rows."""
    return num_epochs(training, num_rows) * updates_per_epoch(num_rows, training.batch_size)


@dataclass(frozen=True)
class Epoch:
    """The end of an epoch, from 1: means of its metrics, and a function that makes the tensors of the checkpoint."""

    number: int
    total: int
    metrics: dict[str, float]
    state: Callable[[], dict[str, Tensor]]


def checkpoint(network: nn.Module, adam: Adam, epoch: int, first_loss: float) -> dict[str, Tensor]:
    """The tensors from which training continues after an epoch."""
    numbers = {"epoch": torch.tensor(epoch), "first_loss": torch.tensor(first_loss)}
    weights = {f"model.{name}": tensor.detach().clone() for name, tensor in network.state_dict().items()}
    return {**weights, **adam.tensors(), **numbers}


def weights_of(state: Mapping[str, Tensor], part: str = "") -> dict[str, Tensor]:
    """The tensors of a network, or of its ``part`` of that name, among those of its checkpoint."""
    prefix = f"model.{part}." if part else "model."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def member_states(stack: Mapping[str, Tensor], num_members: int) -> list[dict[str, Tensor]]:
    """The checkpoint of a stack, split into one for each of its members."""
    split: dict[str, Sequence[Tensor]] = {
        name: [tensor] * num_members if tensor.ndim == 0 else tensor.chunk(num_members)
        for name, tensor in stack.items()
    }
    return [{name: parts[m].clone() for name, parts in split.items()} for m in range(num_members)]


def vae_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's tensors among those of its checkpoint, without those of the heads that were trained with it."""
    return weights_of(state, "vae") or weights_of(state)


def join_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The inverse of ``member_states``."""
    return {
        name: tensor if tensor.ndim == 0 else torch.cat([state[name] for state in states])
        for name, tensor in states[0].items()
    }


def minutes_since(started: float) -> str:
    """Minutes and seconds since then."""
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    return f"{minutes}:{seconds:02d}"


def run_epochs(
    network: nn.Module,
    training: VAETraining,
    num_rows: int,
    schedule_of: Callable[[Adam, int], LRScheduler],
    state: Mapping[str, Tensor] | None,
    updates_of: Callable[[int, int], Iterator[dict[str, Tensor]]],
    log: Log,
) -> Iterator[Epoch]:
    """Adam under a schedule, for a network on its device, which has the weights of the checkpoint ``state``.

    ``updates_of``, given an epoch and its number of updates, sets gradients and yields metrics, the loss among them.
    """
    started = logged = time.monotonic()
    total, updates = num_epochs(training, num_rows), updates_per_epoch(num_rows, training.batch_size)
    adam = Adam(network.named_parameters(), training.learning_rate)
    schedule = schedule_of(adam, total * updates)
    done, first = 0, 0.0
    if state is not None:
        adam.load_tensors(state)
        schedule.last_epoch = adam.count
        done, first = int(state["epoch"]), float(state.get("first_loss", 0.0))
    for epoch in range(done, total):
        sums: dict[str, Any] = {}
        for metrics in updates_of(epoch, updates):
            adam.step()
            schedule.step()
            sums = {name: sums.get(name, 0) + value.detach().double() for name, value in metrics.items()}
            if time.monotonic() - logged > LOG_SECONDS:
                logged = time.monotonic()
                loss = float(metrics["loss"].detach())
                log(f"update {adam.count}/{total * updates}  loss {loss:#.4g}  {minutes_since(started)}")
        means = {name: float(value) / updates for name, value in sums.items()}
        first = first or means["loss"]
        if not math.isfinite(means["loss"]) or means["loss"] > DIVERGED * first:
            parameter, what, remedy = {
                VAE: ("vae_learning_rate", "VAE", "lower it"),
                VAEWithHeads: ("vae_learning_rate", "VAE", "lower it"),
                ImageEnsemble: ("image_learning_rate", "image ensemble", "lower it"),
                nn.ModuleDict: ("decoder", "sharp decoder", "choose the plain one"),
            }.get(type(network), ("ensemble_learning_rate", "ensemble", "lower it"))
            before = f", {first:.4g} after the first" if epoch else ""
            raise ValueError(
                f"{parameter}: the {what}'s loss is {means['loss']:.4g} after epoch {epoch + 1}{before}: {remedy}"
            )
        yield Epoch(epoch + 1, total, means, partial(checkpoint, network, adam, epoch + 1, first))


class VAEWithHeads(nn.Module):
    """A VAE with linear heads of its codes for classes and attributes, with which it is trained."""

    def __init__(self, vae: VAE, num_outputs: int) -> None:
        super().__init__()
        self.vae, self.heads = vae, nn.Linear(vae.config.latent_dim, num_outputs)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """What the VAE returns, and the heads' logits (B, F) of the sampled codes."""
        logits, mean, log_var = self.vae(x, noise)
        return logits, mean, log_var, self.heads(mean + torch.exp(0.5 * log_var) * noise)


def guide_loss(guide: nn.Module, drawn: Tensor, x: Tensor) -> Tensor:
    """Cross-entropy between a guide's predictions for decoded pictures and those for their images (B, C, H, W).

    In nats a row, summed over the F classes and attributes of the guide's logits (B, F).
    """
    with torch.no_grad():
        asked = torch.sigmoid(guide(x).float())
    return F.binary_cross_entropy_with_logits(guide(drawn).float(), asked, reduction="sum") / len(x)


def train_vae(
    images: Tensor,
    config: VAEConfig,
    training: VAETraining,
    *,
    known: Tensor | None = None,
    guide: nn.Module | None = None,
    state: Mapping[str, Tensor] | None = None,
    rank: int = 0,
    world: int = 1,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    device: str | torch.device = "cpu",
    precision: str = "auto",
    log: Log = lambda line: None,
) -> Iterator[Epoch]:
    """Trains a VAE with Adam under a one-cycle schedule and yields an Epoch each; loss, reconstruction and kl in nats.

    All ranks draw the same order and noise and take their share of each batch; gradients are averaged by ``wrap`` and
    BatchNorm's moments over all ranks, so the result depends on the number of ranks only by rounding. ``images`` are
    uint8 (N, C, H, W), the same on every rank. With ``config.label_weight`` count ``known`` (N, F), whether an image is
    of each class and has each attribute (1, 0, or -1 where that is unknown), which the codes are to tell; and
    ``guide``, see ``guide_loss``, which the pictures are to show. ``state`` is a checkpoint to continue from;
    ``vae_weights`` takes the VAE out of one.
    """
    device = torch.device(device)
    images = images.to(device)
    if not config.label_weight or (known is not None and (known < 0).all()):
        known = guide = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        network: nn.Module = (vae := VAE(config))
        if known is not None:
            network, known = VAEWithHeads(vae, known.shape[1]), known.to(device).float()
    if state is not None:
        network.load_state_dict(weights_of(state))
    network.to(device).to(memory_format=torch.channels_last).train()
    guide = None if guide is None else guide.to(device)
    model = wrap(synchronise(network) if world > 1 else network)

    def updates_of(epoch: int, updates: int) -> Iterator[dict[str, Tensor]]:
        generator = generator_for(training.seed, "vae", epoch)
        order = torch.randperm(len(images), generator=generator)
        for update in range(updates):
            batch = order[update * training.batch_size : (update + 1) * training.batch_size]
            noise = torch.randn((len(batch), config.latent_dim), generator=generator)[rank::world]
            rows = batch[rank::world].to(device)
            x = images[rows].float().div_(255).contiguous(memory_format=torch.channels_last)
            with mixed_precision(precision, device):
                logits, mean, log_var, *told = model(x, noise.to(device))
                terms = elbo(logits, mean, log_var, x, config)
                taught = {}
                if guide is not None:
                    taught["guide"] = guide_loss(guide, torch.sigmoid(logits), x)
            if known is not None:
                truth = known[rows]
                wrong = F.binary_cross_entropy_with_logits(told[0].float(), truth.clamp(min=0), reduction="none")
                taught["labels"] = (wrong * (truth >= 0)).sum() / len(x)
            terms |= {"loss": terms["loss"] + config.label_weight * sum(taught.values()), **taught}
            # Ranks' gradients are averaged: this makes the average the mean over the whole batch.
            share = len(x) * world / len(batch)
            model.zero_grad()
            (terms["loss"] * share).backward()
            yield {name: term * share for name, term in terms.items()}

    yield from run_epochs(network, training, len(images), one_cycle, state, updates_of, log)


@dataclass(frozen=True)
class Codes:
    """Training set of the latent ensemble: posteriors (N, D) with labels (N,), or a predictor's probabilities (N, K).

    A log-variance of minus infinity is that of a perturbed code, which stands for itself alone.
    """

    mean: Tensor
    log_var: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def labels(self) -> Tensor:
        """Classes (N,), of probabilities the likeliest."""
        return classes_of(self.targets)

    def take(self, rows: Tensor) -> "Codes":
        """Some of the rows."""
        return Codes(self.mean[rows], self.log_var[rows], self.targets[rows])

    def std(self) -> float:
        """Standard deviation of the codes of images, over all dimensions."""
        some = self.take(self.log_var.isfinite().all(1))
        return float((some.mean.var(0, unbiased=False) + some.log_var.exp().mean(0)).mean().sqrt())


def train_latent_members(
    codes: Codes, config: EnsembleConfig, training: EnsembleTraining, members: Sequence[int], **options: Any
) -> Iterator[Epoch]:
    """Trains the members of the latent ensemble with these numbers as one stack, see ``train_members``.

    The loss is the cross-entropy of codes drawn from the posterior, plus that of the same codes after an FGSM step. On
    CPU the bits of a member depend on its number, the codes and the training, not on the rest of the stack.
    """
    one = replace(config, num_members=1)
    stack = stack_members([seeded(lambda: LatentEnsemble(one), training.seed, "latent", m) for m in members])

    def sample(posteriors: Tensor, generators: list[torch.Generator]) -> Tensor:
        mean, deviation = posteriors.chunk(2, -1)
        noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
        return mean + deviation * noise.to(mean.device)

    posteriors = torch.cat([codes.mean, torch.exp(0.5 * codes.log_var)], 1)
    eps = training.adversarial_eps * codes.std()
    given = stack, members, posteriors, codes.targets, sample, training, eps
    yield from train_members(*given, precision="fp32", **options)


def train_latent_ensemble(
    codes: Codes,
    config: EnsembleConfig,
    training: EnsembleTraining,
    *,
    device: str | torch.device = "cpu",
    log: Log = lambda line: None,
) -> LatentEnsemble:
    """The ensemble of all members, trained as one stack."""
    *_, last = train_latent_members(codes, config, training, range(config.num_members), device=device, log=log)
    ensemble = LatentEnsemble(config)
    ensemble.load_state_dict(weights_of(last.state()))
    return ensemble.to(device).requires_grad_(False).eval()


def train_image_members(
    images: Tensor,
    labels: Tensor,
    config: EnsembleConfig,
    vae_config: VAEConfig,
    training: EnsembleTraining,
    members: Sequence[int],
    **options: Any,
) -> Iterator[Epoch]:
    """``train_latent_members`` for the image ensemble, on images uint8 (N, C, H, W) with labels int64 (N,)."""
    one = replace(config, num_members=1)
    stack = stack_members([seeded(lambda: ImageEnsemble(one, vae_config), training.seed, "image", m) for m in members])
    stack.to(memory_format=torch.channels_last)

    def sample(images: Tensor, generators: list[torch.Generator]) -> Tensor:
        return images.float().div_(255)

    given = stack, members, images, labels, sample, training, training.adversarial_eps
    yield from train_members(*given, limits=(0.0, 1.0), **options)


def seeded(build: Callable[[], Any], seed: int, purpose: str, member: int) -> Any:
    """What ``build`` makes from a seed of its own, the global generator restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, purpose, member))
        return build()


def train_members(
    stack: LatentEnsemble | ImageEnsemble,
    members: Sequence[int],
    data: Tensor,
    targets: Tensor,
    sample: Callable[[Tensor, list[torch.Generator]], Tensor],
    training: EnsembleTraining,
    eps: float,
    *,
    limits: tuple[float, float] | None = None,
    states: Mapping[int, Mapping[str, Tensor]] | None = None,
    device: str | torch.device = "cpu",
    precision: str = "auto",
    log: Log = lambda line: None,
) -> Iterator[Epoch]:
    """Trains an untrained stack with Adam under a cosine decay, and yields an Epoch each.

    ``sample`` makes inputs of rows (M, B, ...) of ``data``, with one generator for each member; ``targets`` are labels
    (N,) or probabilities (N, K). ``eps`` is the FGSM step in units of the inputs, 0 for none; ``limits`` is the range
    of the inputs after it. ``states`` are checkpoints of these members, all of one epoch, to continue from.
    """
    device = torch.device(device)
    data, targets = data.to(device), targets.to(device)
    state = None if states is None else join_states([states[m] for m in members])
    if state is not None:
        stack.load_state_dict(weights_of(state))
    stack.to(device).train()
    weights = class_weights(classes_of(targets).cpu(), stack.config.num_classes, training.balance).to(device)
    parameters = list(stack.parameters())

    def updates_of(epoch: int, updates: int) -> Iterator[dict[str, Tensor]]:
        generators = [generator_for(training.seed, f"{type(stack).__name__}:{m}", epoch) for m in members]
        orders = torch.stack([torch.randperm(len(data), generator=generator) for generator in generators])
        # One thread: the order of a long sum depends on the number of threads, and members must not.
        with one_thread():
            for update in range(updates):
                rows = orders[:, update * training.batch_size : (update + 1) * training.batch_size].to(device)
                chosen = data.index_select(0, rows.flatten()).view(*rows.shape, *data.shape[1:])
                x, wanted = sample(chosen, generators).requires_grad_(), targets[rows]
                with mixed_precision(precision, device):
                    logits = stack(x).float()
                clean = summed_cross_entropy(logits, wanted, weights)
                gradients = torch.autograd.grad(clean, [x, *parameters])
                if eps > 0:
                    moved = x.detach() + gradients[0].sign() * eps
                    moved = moved.clamp_(*limits) if limits else moved
                    with mixed_precision(precision, device):
                        attacked = stack(moved).float()
                    extra = torch.autograd.grad(summed_cross_entropy(attacked, wanted, weights), parameters)
                    gradients = (gradients[0], *(a + b for a, b in zip(gradients[1:], extra)))
                for parameter, gradient in zip(parameters, gradients[1:]):
                    parameter.grad = gradient
                hits = (logits.detach().argmax(-1) == classes_of(wanted)).double().mean()
                yield {"loss": clean.detach().double() / len(members), "accuracy": hits}

    yield from run_epochs(stack, training, len(data), cosine_decay, state, updates_of, log)


def classes_of(targets: Tensor) -> Tensor:
    """Labels as they are, or the likeliest classes of probabilities (..., K)."""
    return targets.argmax(-1) if targets.is_floating_point() else targets


def summed_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum over members of the mean over their rows; targets are labels (M, B), or probabilities (M, B, K)."""
    # With the rows innermost the softmax fills the vector lanes, which a handful of classes does not.
    log_probs = logits.transpose(1, 2).contiguous().log_softmax(1)
    if targets.is_floating_point():
        return -(log_probs * (targets * weights).transpose(1, 2)).sum() / targets.shape[1]
    found = log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)
    return -(found * weights[targets]).sum() / targets.shape[1]


def class_weights(labels: Tensor, num_classes: int, balance: float) -> Tensor:
    """A weight for each class, with mean 1 over the images."""
    counts = torch.bincount(labels, minlength=num_classes).double().clamp_min(1)
    weights = (counts / counts.sum()) ** -balance
    return (weights * counts.sum() / (weights * counts).sum()).float()
