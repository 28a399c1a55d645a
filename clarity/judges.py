"""Held-out evaluation networks: image classifiers that are never used to generate counterfactuals.

Independent of the ensembles by another architecture (pairs of 3x3 convolutions with max pooling and global averaging),
another seed, and other training images: only those for which ``ids.in_judges_half`` is true.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from clarity.compiled import Maps, kept
from clarity.images import shrunk_shape, square_of
from clarity.rows import compiled_or_not, folded, in_blocks, require_eval, require_rows

#: Widths of the blocks for images above 32 pixels.
LARGE_CHANNELS = (16, 32, 64, 96)
#: Images of which a side is longer, in pixels, are averaged over squares first.
MAX_SIDE = 64


@dataclass(frozen=True)
class JudgeConfig:
    """The shape of a held-out image network, with an output for each class or attribute.

    It looks at means of squares of ``square`` pixels a side.
    """

    image_shape: tuple[int, int, int]
    num_outputs: int
    channels: tuple[int, ...] = (12, 24, 48)
    num_features: int = 64
    square: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_shape", tuple(self.image_shape))
        object.__setattr__(self, "channels", tuple(self.channels))


class JudgeNet(nn.Module):
    """Pairs of 3x3 convolutions with BatchNorm and ReLU, max pooling, a global average, F features, the outputs."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        self.shrink = nn.AvgPool2d(config.square, ceil_mode=True) if config.square > 1 else nn.Identity()
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
        return self.project(self.trunk(self.shrink(x).contiguous(memory_format=torch.channels_last)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, outputs) of images in [0, 1]."""
        return self.head(self.features(x))


def build_judge(image_shape: tuple[int, int, int], num_outputs: int) -> JudgeNet:
    """An untrained network; images above 32 pixels get one more block and wider ones, above 64 they are shrunk."""
    channels = LARGE_CHANNELS if max(image_shape[1:]) > 32 else JudgeConfig.channels
    return JudgeNet(JudgeConfig(image_shape, num_outputs, channels, square=square_of(image_shape, MAX_SIDE)))


@torch.inference_mode()
def judge_rows(net: JudgeNet, x: Tensor) -> np.ndarray:
    """Class probabilities (B, K) of images (B, C, H, W) in [0, 1], each row independent of its batch (``rows``)."""
    require_eval(net)
    require_rows(x, net.config.image_shape)
    return in_blocks(kept(net, "judge", lambda: judge_of(net)), x).cpu().numpy()


def judge_of(net: JudgeNet) -> Maps:
    """Class probabilities (B, K) of blocks of images."""
    *layers, mean, flatten = folded(net.trunk)
    shape = shrunk_shape(net.config.image_shape, net.config.square)
    maps, end = compiled_or_not(layers, shape), nn.Sequential(mean, flatten, net.project, net.head)
    return lambda block, count: end(maps(net.shrink(block), count)).softmax(1)


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
