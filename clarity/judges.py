"""Held-out evaluation networks, never used to generate counterfactuals.

Knows their architecture and training. Independent of the ensembles by another architecture (pairs of 3x3 convolutions
with max pooling and global averaging), another seed, random shifts, turns and scales instead of adversarial steps, and
by its training images: only those for which ``ids.in_judges_half`` is true. Ensembles that were trained on all training
images have seen that half too; a judge has never seen their weights, codes or gradients.

Shapes: B rows, C, H, W image, K classes, F features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clarity.training.loops import mixed_precision

#: Widths of the blocks for images above 32 pixels.
LARGE_CHANNELS = (16, 32, 64, 96)


@dataclass(frozen=True)
class JudgeConfig:
    """The shape of a held-out image network, with an output for each class or attribute."""

    image_shape: tuple[int, int, int]
    num_outputs: int
    channels: tuple[int, ...] = (12, 24, 48)
    num_features: int = 64

    def __post_init__(self) -> None:
        check_image_shape(self.image_shape)
        if self.num_outputs < 1 or not self.channels:
            raise ValueError(
                f"a held-out network needs outputs and channels, got {self.num_outputs} and {self.channels}"
            )


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

    def __post_init__(self) -> None:
        if self.updates < 1 or self.batch_size < 2:
            raise ValueError(f"judges need updates of at least 1 and batches of at least 2, got {self}")
        mixed_precision(self.precision, torch.device("cpu"))

    @classmethod
    def for_images(cls, count: int) -> JudgeTraining:
        """The budget for ``count`` images: ten passes over them, within bounds."""
        return cls(updates=min(cls.updates, max(400, 10 * count // cls.batch_size)))


class JudgeNet(nn.Module):
    """Pairs of 3x3 convolutions with BatchNorm and ReLU, max pooling, a global average, F features, the outputs."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        before = config.image_shape[0]
        for channels in config.channels:
            for _ in range(2):
                layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
                before = channels
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.project = nn.Sequential(nn.Linear(before, config.num_features), nn.ReLU())
        self.head = nn.Linear(config.num_features, config.num_outputs)

    def features(self, x: Tensor) -> Tensor:
        """The (B, F) activations before the last layer: the space of implausibility and Frechet distances."""
        return self.project(self.trunk(x.contiguous(memory_format=torch.channels_last)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, outputs) of images in [0, 1]."""
        return self.head(self.features(x))


def build_judge(image_shape: tuple[int, int, int], num_outputs: int) -> JudgeNet:
    """An untrained network; images above 32 pixels get one more block and wider ones."""
    large = max(image_shape[1:]) > 32
    return JudgeNet(JudgeConfig(image_shape, num_outputs, LARGE_CHANNELS if large else JudgeConfig.channels))


def train_judge(
    net: JudgeNet, images: np.ndarray, labels: np.ndarray, config: JudgeTraining | None = None, name: str = "judge"
) -> Iterator[dict[str, Any]]:
    """Trains a judge in place by cross-entropy, see ``fit``.

    Args:
        net: from ``build_judge``.
        images: (N, C, H, W) uint8, the judges' half of the training images.
        labels: (N,) class indices, negative where unknown.
        config: budget; ``JudgeTraining.for_images`` when None.
        name: of the network.
    """
    config = config or JudgeTraining.for_images(len(images))
    targets = torch.from_numpy(np.asarray(labels, dtype=np.int64))

    def loss(net: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(net(x).float(), targets[rows])

    yield from fit(name, net, images, np.flatnonzero(labels >= 0), config.updates, config, loss, augment=True)


def fit(
    name: str,
    net: nn.Module,
    images: np.ndarray,
    rows: np.ndarray,
    updates: int,
    config: JudgeTraining,
    loss_of: Callable[[Any, Tensor, Tensor], Tensor],
    *,
    augment: bool = False,
) -> Iterator[dict[str, Any]]:
    """Adam under a one-cycle schedule over ``rows`` in random order, drawn from the network's name and the seed."""
    generator = torch.Generator().manual_seed(
        config.seed + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    )
    optimiser = torch.optim.Adam(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=updates + 1)
    pixels, order = torch.from_numpy(images), torch.empty(0, dtype=torch.int64)
    total, since, report = 0.0, 0, max(1, updates // 10)
    if isinstance(net, JudgeNet):  # half as fast again; the autoencoders lose by it
        net.to(memory_format=torch.channels_last)
    net.train()
    for update in range(1, updates + 1):
        while len(order) < config.batch_size:
            order = torch.cat([order, torch.from_numpy(rows)[torch.randperm(len(rows), generator=generator)]])
        batch, order = order[: config.batch_size], order[config.batch_size :]
        x = pixels[batch].float() / 255
        if augment:
            x = augmented(x, config, generator)
        optimiser.zero_grad(set_to_none=True)
        with mixed_precision(config.precision, x.device):
            loss = loss_of(net, x, batch)
        loss.backward()
        optimiser.step()
        cycle.step()
        total, since = total + float(loss.detach()), since + 1
        if update % report == 0 or update == updates:
            yield {"net": name, "update": update, "updates": updates, "loss": total / since}
            total, since = 0.0, 0
    net.eval()


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
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def predict_probs(net: JudgeNet, images: np.ndarray, *, sigmoid: bool = False, batch_size: int = 512) -> np.ndarray:
    """Class probabilities (B, K) float32 of images (uint8 or float in [0, 1]); ``sigmoid`` for attributes (B, A)."""
    squash = torch.sigmoid if sigmoid else lambda logits: torch.softmax(logits, dim=1)
    return in_batches(lambda x: squash(net(x)), images, batch_size)


def predict_features(net: JudgeNet, images: np.ndarray, *, batch_size: int = 512) -> np.ndarray:
    """Features (B, F) float32, see ``JudgeNet.features``."""
    return in_batches(net.features, images, batch_size)


def probs_of_features(net: JudgeNet, features: np.ndarray) -> np.ndarray:
    """Class probabilities (B, K) from what ``predict_features`` gave, without reading the images again."""
    with torch.inference_mode():
        return torch.softmax(net.head(torch.from_numpy(features)), dim=1).numpy()


def in_batches(function: Callable[[Tensor], Tensor], images: np.ndarray, batch_size: int) -> np.ndarray:
    """A function of images in [0, 1], applied to uint8 or float images some at a time."""
    parts = []
    with torch.inference_mode():
        for start in range(0, max(1, len(images)), batch_size):
            batch = torch.from_numpy(np.array(images[start : start + batch_size]))
            x = batch.float() / 255 if batch.dtype == torch.uint8 else batch.float()
            parts.append(function(x).float().numpy())
    return np.concatenate(parts)


def check_image_shape(image_shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless it is (C, H, W)."""
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"an image shape is (channels, height, width), got {image_shape}")
