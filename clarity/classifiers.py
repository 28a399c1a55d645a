"""Ensembles of classifiers of latent codes and of images, all members computed as one batched network.

Members are stacked along a leading axis, so that fifty small classifiers take about the time of one. Does not know how
they are trained or stored.

Shapes: B rows, C, H, W image, D latent, K classes, M members; every ensemble maps rows to logits (M, B, K).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clarity.vae import VAES, VAEConfig, feature_shape

#: Outputs to which a layer is padded: with fewer, MKL's products round differently by the index of a row on some
#: processors (AMD's fourth EPYC generation: 5 to 7 and 9 to 11).
LEAST_OUTPUTS = 12


@dataclass(frozen=True)
class EnsembleConfig:
    """Hyperparameters of an ensemble; the defaults are the paper's 16-16-16-K for MNIST.

    Args:
        num_classes: K.
        latent_dim: D, the width of the input.
        hidden: widths of the hidden layers, each followed by a ReLU.
        num_members: M.
    """

    num_classes: int
    latent_dim: int = 16
    hidden: tuple[int, ...] = (16, 16)
    num_members: int = 50

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if self.num_classes < 2:
            raise ValueError(f"an ensemble needs at least 2 classes, got {self.num_classes}")
        if min(self.latent_dim, self.num_members, *self.hidden) < 1:
            raise ValueError(f"latent_dim, hidden and num_members must be at least 1, got {self}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of all layers, from the code to the classes."""
        return (self.latent_dim, *self.hidden, self.num_classes)


class LatentEnsemble(nn.Module):
    """M multilayer perceptrons on latent codes; ``weights.{i}`` is (M, in, out), ``biases.{i}`` (M, out)."""

    def __init__(self, config: EnsembleConfig) -> None:
        super().__init__()
        self.config = config
        self.weights, self.biases = stacked_perceptrons(config)

    def forward(self, z: Tensor) -> Tensor:
        """Logits (M, B, K) of codes (B, D), the same for all members, or (M, B, D), a batch for each."""
        return perceptron_logits(z, zip(self.weights, self.biases))

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """(weight (M, in, out), bias (M, out)) of each layer, contiguous float32; a ReLU follows all but the last."""
        return [
            (weight.detach().float().contiguous(), bias.detach().float().contiguous())
            for weight, bias in zip(self.weights, self.biases)
        ]

    def select(self, members: Sequence[int]) -> LatentEnsemble:
        """The ensemble of the members with these indices, in this order."""
        config = require_members(self.config, members)
        return copy_members(self, members, LatentEnsemble(config))

    def member(self, m: int) -> LatentEnsemble:
        """The ensemble that consists of member m."""
        return self.select([m])


class ImageEnsemble(nn.Module):
    """M convolutional classifiers, the paper's CNN: the VAE's encoder up to its mean, then the latent classifier.

    The members' convolutions are one grouped convolution, with the channels of each tensor ordered by member.
    """

    def __init__(self, config: EnsembleConfig, vae_config: VAEConfig) -> None:
        super().__init__()
        if config.latent_dim != vae_config.latent_dim:
            raise ValueError(
                f"latent_dim of the ensemble is {config.latent_dim}, of the encoder {vae_config.latent_dim}"
            )
        self.config = config
        self.vae_config = vae_config
        encoder, _ = VAES[vae_config.architecture].layers(vae_config)
        self.encoder_layers = nn.Sequential(*(grouped(layer, config.num_members) for layer in encoder))
        channels, height, width = feature_shape(vae_config)
        features = channels * height * width
        bound = features**-0.5
        self.mean_weight = uniform_parameter((config.num_members, config.latent_dim, features), bound)
        self.mean_bias = uniform_parameter((config.num_members, config.latent_dim), bound)
        self.weights, self.biases = stacked_perceptrons(config)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (M, B, K) of images (B, C, H, W), the same for all members, or (M, B, C, H, W), a batch for each."""
        members = self.config.num_members
        if x.ndim == 4:
            # All members read the same input channels: a convolution without groups needs no copies of them.
            first: Any = self.encoder_layers[0]
            h = F.conv2d(x, first.weight, first.bias, first.stride, first.padding)
            h = self.encoder_layers[1:](h)
        else:
            h = self.encoder_layers(x.transpose(0, 1).flatten(1, 2))
        h = h.unflatten(1, (members, -1)).flatten(2).transpose(0, 1)
        z = affine(h, self.mean_weight.transpose(1, 2), self.mean_bias)
        return perceptron_logits(z, zip(self.weights, self.biases))

    def select(self, members: Sequence[int]) -> ImageEnsemble:
        """The ensemble of the members with these indices, in this order."""
        config = require_members(self.config, members)
        return copy_members(self, members, ImageEnsemble(config, self.vae_config))

    def member(self, m: int) -> ImageEnsemble:
        """The ensemble that consists of member m."""
        return self.select([m])


Ensemble = TypeVar("Ensemble", LatentEnsemble, ImageEnsemble)


def stack_members(ensembles: Sequence[Ensemble]) -> Ensemble:
    """One ensemble of the members of all given ones, in their order."""
    first = ensembles[0]
    config = replace(first.config, num_members=sum(ensemble.config.num_members for ensemble in ensembles))
    if isinstance(first, ImageEnsemble):
        stacked: nn.Module = ImageEnsemble(config, first.vae_config)
    else:
        stacked = LatentEnsemble(config)
    states = [ensemble.state_dict() for ensemble in ensembles]
    stacked.load_state_dict(
        {
            name: tensor if tensor.ndim == 0 else torch.cat([state[name] for state in states])
            for name, tensor in states[0].items()
        }
    )
    return stacked.train(first.training)  # type: ignore[return-value]


def stacked_perceptrons(config: EnsembleConfig) -> tuple[nn.ParameterList, nn.ParameterList]:
    """Weights and biases of each layer, uniform within 1 / sqrt(fan-in), drawn from torch's global generator."""
    weights, biases = nn.ParameterList(), nn.ParameterList()
    for inputs, outputs in pairwise(config.widths):
        weights.append(uniform_parameter((config.num_members, inputs, outputs), inputs**-0.5))
        biases.append(uniform_parameter((config.num_members, outputs), inputs**-0.5))
    return weights, biases


def uniform_parameter(shape: tuple[int, ...], bound: float) -> nn.Parameter:
    """A parameter drawn uniformly from [-bound, bound]."""
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def perceptron_logits(z: Tensor, layers: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Logits (M, B, K) of stacked perceptrons at codes (B, D) or (M, B, D); a ReLU between two layers."""
    h = z
    for i, (weight, bias) in enumerate(layers):
        h = affine(F.relu(h) if i else z.expand(len(weight), *z.shape[-2:]), weight, bias)
    return h


def affine(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The product of rows (M, B, in) and weights (M, in, out) plus biases (M, out), each row by the same arithmetic."""
    outputs = weight.shape[2]
    if outputs < LEAST_OUTPUTS:
        weight, bias = F.pad(weight, (0, LEAST_OUTPUTS - outputs)), F.pad(bias, (0, LEAST_OUTPUTS - outputs))
    return torch.baddbmm(bias.unsqueeze(1), h, weight)[..., :outputs]


def grouped(layer: nn.Module, members: int) -> nn.Module:
    """One layer that computes this layer for each member, on channels ordered by member."""
    if isinstance(layer, nn.Conv2d):
        return nn.Conv2d(
            layer.in_channels * members,
            layer.out_channels * members,
            layer.kernel_size,  # type: ignore[arg-type]
            stride=layer.stride,  # type: ignore[arg-type]
            padding=layer.padding,  # type: ignore[arg-type]
            groups=members,
        )
    if isinstance(layer, nn.BatchNorm2d):
        return nn.BatchNorm2d(layer.num_features * members, eps=layer.eps, momentum=layer.momentum)
    if isinstance(layer, nn.PReLU):
        return nn.PReLU(layer.num_parameters * members)
    if not list(layer.parameters()):
        return layer
    raise ValueError(f"no grouped form is known for the layer {type(layer).__name__}")


def require_members(config: EnsembleConfig, members: Sequence[int]) -> EnsembleConfig:
    """The config of an ensemble of these members; raises ValueError for indices that do not exist."""
    if not len(members) or not all(0 <= m < config.num_members for m in members):
        raise ValueError(f"members must be one or more of 0 ... {config.num_members - 1}, got {list(members)}")
    return replace(config, num_members=len(members))


def copy_members(ensemble: Ensemble, members: Sequence[int], target: Ensemble) -> Ensemble:
    """Copy these members' weights from an ensemble into ``target``, and return it."""
    device = next(ensemble.parameters()).device
    index = torch.as_tensor(list(members), device=device)
    state = {
        name: tensor
        if tensor.ndim == 0
        else tensor.unflatten(0, (ensemble.config.num_members, -1))[index].flatten(0, 1)
        for name, tensor in ensemble.state_dict().items()
    }
    target.load_state_dict(state)
    return target.train(ensemble.training).to(device)
