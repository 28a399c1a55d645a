"""Training of held-out networks: random shifts, turns and scales instead of adversarial steps."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clarity.judges import JudgeNet
from clarity.training.loops import LOG_SECONDS, Log, minutes_since, mixed_precision


@dataclass(frozen=True)
class JudgeTraining:
    """How a judge is trained: Adam under a one-cycle schedule, images shifted, turned and scaled at random.

    The defaults are for MNIST's half of 30,000 images (99.4 % on its test images; eight minutes on one core);
    ``for_images`` is less where there are fewer (99.0 % on the digits from 2,250 images, in one minute).

    Args:
        updates: of ``batch_size`` images each.
        batch_size: images in an update.
        learning_rate: peak of the schedule.
        weight_decay: of Adam.
        shift: largest shift, as a share of the side.
        turn: largest rotation, in radians.
        scale: largest change of size, as a share.
        seed: of the order and the augmentation.
        precision: one of training.loops.PRECISIONS.
    """

    updates: int = 2400
    batch_size: int = 128
    learning_rate: float = 0.005
    weight_decay: float = 1e-4
    shift: float = 0.08
    turn: float = 0.17
    scale: float = 0.1
    seed: int = 90210
    precision: str = "auto"

    @classmethod
    def for_images(cls, count: int) -> "JudgeTraining":
        """The budget for ``count`` images: ten passes over them, within bounds."""
        return cls(updates=min(cls.updates, max(400, 10 * count // cls.batch_size)))


def train_judge(
    net: JudgeNet,
    images: np.ndarray,
    truth: np.ndarray,
    config: JudgeTraining,
    name: str = "judge",
    device: str | torch.device = "cpu",
) -> Iterator[dict[str, Any]]:
    """Trains an image network by cross-entropy, see ``fit``, on images uint8 (N, C, H, W).

    ``truth`` are class indices (N,), or for binary cross-entropy the values 0 and 1 of F classes and attributes (N, F);
    negative where unknown.
    """
    targets = torch.from_numpy(truth)
    rows = np.flatnonzero(truth >= 0) if truth.ndim == 1 else np.arange(len(truth))

    def loss(net: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
        logits, wanted = net(x).float(), targets[rows].to(x.device)
        if wanted.ndim == 1:
            return F.cross_entropy(logits, wanted.long())
        weight = (wanted >= 0).float()
        return F.binary_cross_entropy_with_logits(logits, wanted.float().clamp(min=0), weight=weight)

    yield from fit(name, net, images, rows, config, loss, device)


def fit(
    name: str,
    net: nn.Module,
    images: np.ndarray,
    rows: np.ndarray,
    config: JudgeTraining,
    loss_of: Callable[[Any, Tensor, Tensor], Tensor],
    device: str | torch.device = "cpu",
) -> Iterator[dict[str, Any]]:
    """Adam under a one-cycle schedule over ``rows`` in random order, drawn from the network's name and the seed.

    A JudgeNet sees ``augmented`` images. It is trained on ``device``, from which it returns to the CPU.
    """
    generator = torch.Generator().manual_seed(
        config.seed + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    )
    updates = config.updates
    net.to(device)
    if isinstance(net, JudgeNet):  # half as fast again; the autoencoders lose by it
        net.to(memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=updates + 1)
    pixels, order = torch.from_numpy(images), torch.empty(0, dtype=torch.int64)
    nothing = torch.zeros((), dtype=torch.float64, device=device)
    total, since, report, reported = nothing, 0, max(1, updates // 10), time.monotonic()
    net.train()
    for update in range(1, updates + 1):
        while len(order) < config.batch_size:
            order = torch.cat([order, torch.from_numpy(rows)[torch.randperm(len(rows), generator=generator)]])
        batch, order = order[: config.batch_size], order[config.batch_size :]
        x = pixels[batch].to(device).float() / 255
        if isinstance(net, JudgeNet):
            x = augmented(x, config, generator)
        optimiser.zero_grad(set_to_none=True)
        with mixed_precision(config.precision, x.device):
            loss = loss_of(net, x, batch)
        loss.backward()
        optimiser.step()
        cycle.step()
        total, since = total + loss.detach(), since + 1
        if update % report == 0 or update == updates or time.monotonic() - reported > LOG_SECONDS:
            yield {"net": name, "update": update, "updates": updates, "loss": float(total) / since}
            total, since, reported = nothing, 0, time.monotonic()
    net.eval().to("cpu")


def augmented(x: Tensor, config: JudgeTraining, generator: torch.Generator) -> Tensor:
    """Each image shifted, turned and scaled on its own, its border continued outwards."""
    shift, turn, scale = (
        (torch.rand(len(x), 2, generator=generator) * 2 - 1) * size
        for size in (2 * config.shift, config.turn, config.scale)
    )
    cosine, sine, size = turn[:, 0].cos(), turn[:, 0].sin(), 1 + scale[:, 0]
    aspect = x.shape[2] / x.shape[3]
    theta = torch.stack(
        [
            torch.stack([cosine * size, -sine * size * aspect, shift[:, 0]], dim=1),
            torch.stack([sine * size / aspect, cosine * size, shift[:, 1]], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta.to(x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def log_updates(what: str, training: Iterable[Mapping[str, Any]], log: Log) -> None:
    """Runs a training of this module, with a line of progress for each of its reports."""
    started = time.monotonic()
    for report in training:
        update = f"update {report['update']}/{report['updates']}"
        log(f"{what}: {update}  loss {report['loss']:#.4g}  {minutes_since(started)}")
