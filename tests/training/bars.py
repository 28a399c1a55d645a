"""A small data set of bars, and short trainings on it."""

from __future__ import annotations

import torch
from torch import Tensor

from clarity.classifiers import EnsembleConfig
from clarity.training.loops import (
    EnsembleTraining,
    VAETraining,
)
from clarity.vae import VAEConfig

CONFIG = VAEConfig(image_shape=(1, 8, 12), latent_dim=5, channels=(6, 7))
ENSEMBLE = EnsembleConfig(num_classes=3, latent_dim=5, hidden=(6, 7), num_members=5)
SHORT_VAE = VAETraining(epochs=3, min_updates=0, batch_size=16)
SHORT = EnsembleTraining(epochs=3, min_updates=0, batch_size=16)
SHORT_IMAGES = EnsembleTraining(epochs=2, min_updates=0, batch_size=16)


def bars(rows: int = 50, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Bars at one of three heights, with noise: uint8 (N, C, 8, 12) and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % 3
    x = torch.randint(0, 60, (rows, channels, 8, 12), generator=generator)
    for i, k in enumerate(labels.tolist()):
        x[i, :, 1 + 2 * k : 3 + 2 * k, 2:10] += 180
    return x.to(torch.uint8), labels
