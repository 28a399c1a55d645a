"""Held-out evaluation networks: image classifiers that are never used to generate counterfactuals.

Independent of the ensembles by another architecture (pairs of 3x3 convolutions with max pooling and global averaging),
another seed, and other training images: only those for which ``ids.in_judges_half`` is true.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clarity import kernels
from clarity.rows import folded, in_blocks, in_halves, require_eval, require_rows

#: Widths of the blocks for images above 32 pixels.
LARGE_CHANNELS = (16, 32, 64, 96)
#: Of the 3x3 weights for F(2x2, 3x3), see native/judge.cpp.
WINOGRAD = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)


@dataclass(frozen=True)
class JudgeConfig:
    """The shape of a held-out image network, with an output for each class or attribute."""

    image_shape: tuple[int, int, int]
    num_outputs: int
    channels: tuple[int, ...] = (12, 24, 48)
    num_features: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_shape", tuple(self.image_shape))
        object.__setattr__(self, "channels", tuple(self.channels))


class JudgeNet(nn.Module):
    """Pairs of 3x3 convolutions with BatchNorm and ReLU, max pooling, a global average, F features, the outputs."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        before = config.image_shape[0]
        for channels in config.channels:
            for _ in range(2):
                layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]
                layers.append(nn.ReLU(inplace=True))  # the same bits without a second map in memory
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


@torch.inference_mode()
def judge_rows(net: JudgeNet, x: Tensor) -> np.ndarray:
    """Class probabilities (B, K) of images (B, C, H, W) in [0, 1], each row independent of its batch (``rows``)."""
    require_eval(net)
    require_rows(x, net.config.image_shape)
    compiled = x.device.type == "cpu" and kernels.judge_module() is not None
    trunk = compiled_trunk(net) if compiled else batched_trunk(net)
    return in_blocks(lambda block: net.head(net.project(trunk(block))).softmax(1), x).cpu().numpy()


def batched_trunk(net: JudgeNet) -> Callable[[Tensor], Tensor]:
    """The trunk on blocks of images in PyTorch."""
    layers = [max_of_four if isinstance(layer, nn.MaxPool2d) else layer for layer in net.trunk]
    return lambda block: in_halves(layers, block.contiguous(memory_format=torch.channels_last))


def compiled_trunk(net: JudgeNet) -> Callable[[Tensor], Tensor]:
    """The trunk on blocks of images in compiled code, with BatchNorm folded: a third of the time."""
    convolutions = [layer for layer in folded(net.trunk) if isinstance(layer, nn.Conv2d)]
    transformed = [
        torch.einsum("rx,oixy,cy->rcio", WINOGRAD, layer.weight.double(), WINOGRAD) for layer in convolutions
    ]
    weights = torch.cat([weight.flatten() for weight in transformed]).float().numpy()
    biases = torch.cat([layer.bias for layer in convolutions if layer.bias is not None]).numpy()
    widths = np.array([layer.out_channels for layer in convolutions], np.int32)

    def trunk(block: Tensor) -> Tensor:
        features = np.empty((len(block), widths[-1]), np.float32)
        module = kernels.judge_module()
        assert module is not None
        module.features(block.numpy(), *net.config.image_shape, widths, weights, biases, features)
        return torch.from_numpy(features)

    return trunk


def max_of_four(h: Tensor) -> Tensor:
    """The maximum of each 2x2 window of maps without negative values: max pooling, several times as fast on CPUs."""
    if h.shape[2] % 2 or h.shape[3] % 2:
        h = F.pad(h, (0, h.shape[3] % 2, 0, h.shape[2] % 2))
    wide = torch.maximum(h[..., ::2], h[..., 1::2])
    return torch.maximum(wide[:, :, ::2], wide[:, :, 1::2])


def predict_probs(net: JudgeNet, images: np.ndarray, *, sigmoid: bool = False) -> np.ndarray:
    """Class probabilities (B, K) float32 of images (uint8 or float in [0, 1]); ``sigmoid`` for attributes (B, A)."""
    return in_batches(lambda x: net(x).sigmoid() if sigmoid else net(x).softmax(1), images)


def predict_features(net: JudgeNet, images: np.ndarray) -> np.ndarray:
    """Features (B, F) float32, see ``JudgeNet.features``."""
    return in_batches(net.features, images)


@torch.inference_mode()
def probs_of_features(net: JudgeNet, features: np.ndarray) -> np.ndarray:
    """Class probabilities (B, K) from what ``predict_features`` gave, without reading the images again."""
    return net.head(torch.from_numpy(features)).softmax(1).numpy()


@torch.inference_mode()
def in_batches(function: Callable[[Tensor], Tensor], images: np.ndarray) -> np.ndarray:
    """A function of images in [0, 1], applied to uint8 or float images some at a time."""
    parts = []
    for start in range(0, max(1, len(images)), 512):
        batch = torch.from_numpy(np.array(images[start : start + 512]))
        x = batch.float() / 255 if batch.dtype == torch.uint8 else batch.float()
        parts.append(function(x).float().numpy())
    return np.concatenate(parts)
