"""A small data set of bars, and short trainings on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from clarity.classifiers import EnsembleConfig
from clarity.training.loops import EnsembleTraining, VAETraining
from clarity.vae import VAEConfig

CONFIG = VAEConfig(image_shape=(1, 8, 12), latent_dim=5, channels=(6, 7))
ENSEMBLE = EnsembleConfig(num_classes=3, latent_dim=5, hidden=(6, 7), num_members=5)
SHORT_VAE = VAETraining(epochs=3, min_updates=0, batch_size=16)
SHORT = EnsembleTraining(epochs=3, min_updates=0, batch_size=16)
SHORT_IMAGES = EnsembleTraining(epochs=2, min_updates=0, batch_size=16)


def arguments(**changes: Any) -> dict[str, Any]:
    """Of ``plan_training``, for a training of a second."""
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


def bars(rows: int = 50, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Bars at one of three heights, with noise: uint8 (N, C, 8, 12) and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % 3
    x = torch.randint(0, 60, (rows, channels, 8, 12), generator=generator)
    for i, k in enumerate(labels.tolist()):
        x[i, :, 1 + 2 * k : 3 + 2 * k, 2:10] += 180
    return x.to(torch.uint8), labels


def write_bars(root: Path, rows: int, folder: Callable[[int, int], str] = lambda i, k: f"bar{k}") -> Path:
    """Bars as pictures, each in the folder of its number and label; returns the root."""
    for i, (x, k) in enumerate(zip(*bars(rows))):
        file = root / folder(i, int(k)) / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[0].numpy()).save(file)
    return root


class BarsGuide(nn.Module):
    """A guide without a training, which would differ between processors: one logit for each place of a bar."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:, 0, 1:7, 2:10].mean(2)
        return 10 * (rows.unflatten(1, (3, 2)).mean(2) - 0.35)


def files_of(out: Path) -> dict[str, bytes]:
    """The weight files of a model."""
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}
