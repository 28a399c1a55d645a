"""Ensembles of classifiers of latent codes and of images, all members computed as one batched network.

Members are stacked along a leading axis, so that fifty small classifiers take about the time of one.

Every ensemble maps rows to logits (M, B, K).
"""

import math
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


Some = TypeVar("Some", bound="Ensemble")


class Ensemble(nn.Module):
    """What the ensembles share: members along the first axis of each tensor, of which some can be taken."""

    def __init__(self, config: EnsembleConfig) -> None:
        super().__init__()
        self.config = config

    def like(self: Some, num_members: int) -> Some:
        """An untrained ensemble of so many members."""
        return type(self)(replace(self.config, num_members=num_members))

    def select(self: Some, members: Sequence[int]) -> Some:
        """The ensemble of the members with these indices, in this order."""
        state = self.state_dict()
        for name, tensor in state.items():
            if tensor.ndim:
                state[name] = tensor.unflatten(0, (self.config.num_members, -1))[list(members)].flatten(0, 1)
        chosen = self.like(len(members)).to(next(self.parameters()).device)
        chosen.load_state_dict(state)
        return chosen.train(self.training)

    def member(self: Some, m: int) -> Some:
        """The ensemble that consists of member m."""
        return self.select([m])


class LatentEnsemble(Ensemble):
    """M multilayer perceptrons on latent codes; ``weights.{i}`` is (M, in, out), ``biases.{i}`` (M, out)."""

    def __init__(self, config: EnsembleConfig) -> None:
        super().__init__(config)
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


class ImageEnsemble(Ensemble):
    """M of the paper's CNNs, the VAE's encoder up to its mean and the latent classifier, with grouped convolutions."""

    def __init__(self, config: EnsembleConfig, vae_config: VAEConfig) -> None:
        super().__init__(config)
        if config.latent_dim != vae_config.latent_dim:
            raise ValueError(
                f"latent_dim of the ensemble is {config.latent_dim}, of the encoder {vae_config.latent_dim}"
            )
        self.vae_config = vae_config
        encoder, _ = VAES[vae_config.architecture].layers(vae_config)
        self.encoder_layers = nn.Sequential(*(grouped(layer, config.num_members) for layer in encoder))
        features = math.prod(feature_shape(vae_config))
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

    def like(self, num_members: int) -> "ImageEnsemble":
        """An untrained ensemble of so many members."""
        return ImageEnsemble(replace(self.config, num_members=num_members), self.vae_config)


def stack_members(ensembles: Sequence[Some]) -> Some:
    """One ensemble of the members of all given ones, in their order."""
    stacked = ensembles[0].like(sum(ensemble.config.num_members for ensemble in ensembles))
    states = [ensemble.state_dict() for ensemble in ensembles]
    state = {name: tensor for name, tensor in states[0].items() if tensor.ndim == 0}
    state |= {name: torch.cat([other[name] for other in states]) for name in states[0].keys() - state.keys()}
    stacked.load_state_dict(state)
    return stacked.train(ensembles[0].training)


def stacked_perceptrons(config: EnsembleConfig) -> tuple[nn.ParameterList, nn.ParameterList]:
    """Weights and biases of each layer, uniform within 1 / sqrt(fan-in), drawn from torch's global generator."""
    weights, biases = nn.ParameterList(), nn.ParameterList()
    for inputs, outputs in pairwise((config.latent_dim, *config.hidden, config.num_classes)):
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
