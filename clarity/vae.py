"""Variational autoencoders: images to latent codes and back.

Knows architectures and the evidence lower bound. Does not know about classes, files or training loops. Ends in
``VAES``: a new architecture is one function and one entry.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VAEConfig:
    """Hyperparameters of a VAE; the defaults are the paper's network for MNIST.

    Args:
        architecture: a key of ``VAES``.
        image_shape: (C, H, W).
        latent_dim: D.
        channels: output channels of each stride-2 convolution of the encoder; the decoder mirrors them.
        beta: weight of the KL term.
        loss: a key of ``LOSSES``.
        label_weight: weight, in the training, of the cross-entropy of linear heads of sampled codes for classes and
            attributes (after Kingma et al. 2014, Eq. 9), so that the codes know them, and of what a guide sees in
            pictures (``training.loops.guide_loss``), so that the decoder shows them; 0: none, as in the paper.
    """

    architecture: str = "conv"
    image_shape: tuple[int, int, int] = (1, 28, 28)
    latent_dim: int = 16
    channels: tuple[int, ...] = (32, 64, 128)
    beta: float = 1.0
    loss: str = "bce"
    label_weight: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_shape", tuple(self.image_shape))
        object.__setattr__(self, "channels", tuple(self.channels))
        if self.architecture not in VAES:
            raise ValueError(f"unknown VAE architecture {self.architecture!r}; choose from {', '.join(sorted(VAES))}")
        if self.loss not in LOSSES:
            raise ValueError(f"unknown reconstruction loss {self.loss!r}; choose from {', '.join(sorted(LOSSES))}")
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise ValueError(f"image_shape must be three positive numbers (C, H, W), got {self.image_shape}")
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels must be one or more positive numbers, got {self.channels}")
        if self.latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {self.latent_dim}")
        for name in ("beta", "label_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def to_json(self) -> dict[str, Any]:
        """Its fields; without a ``label_weight`` of 0, which older models do not have."""
        return {name: value for name, value in asdict(self).items() if name != "label_weight" or value}


#: Reconstruction losses of decoder logits, one value for each pixel. Binary cross-entropy is the negative
#: log-likelihood of black and white pixels; of grey ones it is a loss, and its sum with the KL term no bound.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": lambda logits, x: F.binary_cross_entropy_with_logits(logits, x, reduction="none"),
    "mse": lambda logits, x: (torch.sigmoid(logits) - x).square(),
    "l1": lambda logits, x: (torch.sigmoid(logits) - x).abs(),
}


class VAE(nn.Module):
    """A Gaussian encoder and a decoder (Kingma and Welling 2014)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder_layers, self.decoder_layers = VAES[config.architecture].layers(config)
        self.feature_shape = feature_shape(config)
        features = math.prod(self.feature_shape)
        self.mean = nn.Linear(features, config.latent_dim)
        self.log_var = nn.Linear(features, config.latent_dim)
        self.decoder_input = nn.Linear(config.latent_dim, features)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, D) and log-variance (B, D) of the posteriors of images (B, C, H, W)."""
        h = self.encoder_layers(x).flatten(1)
        return self.mean(h), self.log_var(h)

    def decode_logits(self, z: Tensor) -> Tensor:
        """Pixel logits (B, C, H, W) of codes (B, D)."""
        return self.decoder_layers(self.decoder_input(z).unflatten(1, self.feature_shape))

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of codes (B, D)."""
        return torch.sigmoid(self.decode_logits(z))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixel logits of a sampled code (noise (B, D) standard normal), and the posterior's mean and log-variance.

        The whole forward pass of a training step in one call, as data-parallel wrappers require.
        """
        mean, log_var = self.encode(x)
        return self.decode_logits(mean + torch.exp(0.5 * log_var) * noise), mean, log_var


class Decoder(nn.Module):
    """A second decoder of a VAE's codes, of the same layers and shapes as the first."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        vae = VAE(config)
        self.config, self.feature_shape = config, vae.feature_shape
        self.decoder_layers, self.decoder_input = vae.decoder_layers, vae.decoder_input

    def forward(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of codes (B, D)."""
        return torch.sigmoid(self.decoder_layers(self.decoder_input(z).unflatten(1, self.feature_shape)))


def elbo(logits: Tensor, mean: Tensor, log_var: Tensor, x: Tensor, config: VAEConfig) -> dict[str, Tensor]:
    """The negative evidence lower bound with the KL term weighted by beta (Higgins et al. 2017).

    Args:
        logits: pixel logits (B, C, H, W) of sampled codes, as a VAE returns them with mean and log_var.
        mean: of the posteriors (B, D).
        log_var: their log-variances (B, D).
        x: images (B, C, H, W).
        config: of the VAE.

    Returns:
        ``loss`` = ``reconstruction`` + beta * ``kl``: sums over pixels or dimensions, means over rows, in nats.
    """
    # Sums are taken in float32 even where the network ran in bfloat16.
    reconstruction = LOSSES[config.loss](logits.float(), x.float()).flatten(1).sum(1).mean()
    mean, log_var = mean.float(), log_var.float()
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
    return {"loss": reconstruction + config.beta * kl, "reconstruction": reconstruction, "kl": kl}


def feature_shape(config: VAEConfig) -> tuple[int, int, int]:
    """Shape (channels, height, width) of the encoder's last feature map."""
    height, width = feature_sizes(config)[-1]
    return config.channels[-1], height, width


def feature_sizes(config: VAEConfig) -> list[tuple[int, int]]:
    """Heights and widths of the image and the encoder's feature maps: each convolution halves them, rounding up."""
    sizes = [config.image_shape[1:]]
    for _ in config.channels:
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes


def encoder_layers(config: VAEConfig, activation: Callable[[int], nn.Module]) -> nn.Sequential:
    """Stride-2 convolution, BatchNorm and activation for each entry of channels."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((config.image_shape[0], *config.channels)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        layers += [convolution, nn.BatchNorm2d(outputs), activation(outputs)]
    return nn.Sequential(*layers)


def upsampling_layers(config: VAEConfig, outputs: tuple[int, ...]) -> list[nn.ConvTranspose2d]:
    """Transposed convolutions that mirror the encoder's sizes exactly, for any height and width."""
    sizes = reversed(feature_sizes(config))
    inputs = (config.channels[-1], *outputs[:-1])
    return [
        nn.ConvTranspose2d(
            inputs[i],
            outputs[i],
            3,
            stride=2,
            padding=1,
            output_padding=(after[0] - 2 * before[0] + 1, after[1] - 2 * before[1] + 1),
        )
        for i, (before, after) in enumerate(pairwise(sizes))
    ]


def conv_layers(config: VAEConfig) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder and decoder of the paper's VAE for MNIST, with PReLU."""
    encoder = encoder_layers(config, nn.PReLU)
    decoder: list[nn.Module] = [nn.PReLU(config.channels[-1])]
    ups = upsampling_layers(config, (*config.channels[-2::-1], config.image_shape[0]))
    for up in ups[:-1]:
        decoder += [up, nn.BatchNorm2d(up.out_channels), nn.PReLU(up.out_channels)]
    return encoder, nn.Sequential(*decoder, ups[-1])


def beta_vae_layers(config: VAEConfig) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder and decoder of the paper's VAE for CelebA.

    It is PyTorch-VAE's beta-VAE (Subramanian 2020), with pixel logits instead of its tanh.
    """

    def activation(_: int) -> nn.Module:
        return nn.LeakyReLU(inplace=True)

    encoder, decoder = encoder_layers(config, activation), list[nn.Module]()
    for up in upsampling_layers(config, (*config.channels[-2::-1], config.channels[0])):
        decoder += [up, nn.BatchNorm2d(up.out_channels), activation(up.out_channels)]
    return encoder, nn.Sequential(*decoder, nn.Conv2d(config.channels[0], config.image_shape[0], 3, padding=1))


@dataclass(frozen=True)
class Architecture:
    """An entry of ``VAES``: how to build the layers, and the values of ``VAEConfig`` that suit them."""

    layers: Callable[[VAEConfig], tuple[nn.Sequential, nn.Sequential]]
    defaults: dict[str, Any] = field(default_factory=dict)


VAES: dict[str, Architecture] = {
    "conv": Architecture(conv_layers),
    "beta_vae": Architecture(
        beta_vae_layers,
        # Beta for squared errors summed over pixels; with 1 linear codes of faces keep 76 nats instead of 222.
        {"channels": (32, 64, 128, 256, 512), "latent_dim": 128, "loss": "mse", "beta": 0.1},
    ),
}


def vae_config(architecture: str, image_shape: tuple[int, int, int], **fields: Any) -> VAEConfig:
    """The config of an architecture: its defaults, overridden by the given fields that are not None."""
    config = VAEConfig(architecture, image_shape)
    given = {name: value for name, value in fields.items() if value is not None}
    return replace(config, **{**VAES[architecture].defaults, **given})
