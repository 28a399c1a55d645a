"""Networks of 3x3 convolutions on CPUs in compiled code, each image in a vector lane of its own: native/maps.cpp.

An image's bits depend on the image, the weights and the build alone; those for AVX2 and AVX-512 give the same. Knows
layers of torch. Does not know VAEs or judges.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

#: Of a convolution, in native/maps.cpp: 3x3 of stride 1, of stride 2, and transposed of stride 2; and what its weights
#: are transformed by along each axis (Winograd's minimal filtering).
SAME, DOWN, UP = range(3)
TRANSFORMS = {
    SAME: ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)),
    DOWN: ((1, 0, 0), (1, 0, 1), (0, 0, 1), (0, 1, 0), (0, 1, 0)),
    UP: ((0, 0, 1), (1, 0, 1), (1, 0, 0), (0, 1, 0), (0, 1, 0)),
}


#: Maps (B, ...) of images and of how many of them.
Maps = Callable[[Tensor, int], Tensor]

#: By network and name: the state of the weights, and what was made of them.
_KEPT: WeakKeyDictionary[nn.Module, dict[str, tuple[Any, Any]]] = WeakKeyDictionary()

Made = TypeVar("Made")


@functools.cache
def maps_module() -> ModuleType | None:
    """The fastest build of native/maps.cpp that is installed and that this processor can run, or None."""
    with suppress(ImportError):
        for build in importlib.import_module("_clarity_engine_base").builds():
            with suppress(ImportError):
                return importlib.import_module(f"_clarity_maps_{build}")
    return None


def compiled(layers: Sequence[nn.Module], shape: Sequence[int]) -> Maps | None:
    """The layers as a function of images (B, *shape) on a CPU; None where they cannot be compiled here.

    The function is also told how many of the images it is asked for: the maps of the others are zero.

    Layers are convolutions, each with an activation behind it or none, and ReLUs with max pooling behind; BatchNorm is
    to be folded into the convolutions.
    """
    module, rest = maps_module(), list(layers)
    described, weights, before = list[tuple[int, ...]](), list[Tensor](), tuple(shape)
    while rest:
        layer: Any = rest.pop(0)
        kind = kind_of(layer)
        if kind is None or before[0] != layer.in_channels:
            return None
        bias = layer.weight.new_zeros(layer.out_channels) if layer.bias is None else layer.bias
        slope = slope_of(rest[0], bias) if rest else None
        if slope is None:
            slope = torch.ones_like(bias)
        else:
            rest.pop(0)
        pooled = bool(rest) and kind == SAME and not slope.any() and is_halving(rest[0])
        if pooled:
            rest.pop(0)
        more = layer.output_padding if kind == UP else (0, 0)
        size = tuple({SAME: n, DOWN: (n + 1) // 2, UP: 2 * n - 1 + m}[kind] for n, m in zip(before[1:], more))
        described.append((kind, layer.out_channels, *size, int(pooled)))
        weights += [transformed(layer.weight, kind).flatten(), bias, slope]
        before = (layer.out_channels, *(((n + 1) // 2 for n in size) if pooled else size))
    if module is None or not described:
        return None
    table, parameters = np.array(described, np.int32), torch.cat(weights).detach().numpy()
    module.pack(*shape, table, parameters)

    def apply(images: Tensor, count: int) -> Tensor:
        found = np.zeros((len(images), *before), np.float32)
        module.apply(images[:count].float().contiguous().numpy(), *shape, table, parameters, found[:count])
        return torch.from_numpy(found)

    return apply


def kept(network: nn.Module, name: str, build: Callable[[], Made]) -> Made:
    """What ``build`` makes of a network, by name; made again after a change of the network's weights.

    What is made must not hold the network, which would then never be freed.
    """
    tensors = [*network.parameters(), *network.buffers()]
    if any(tensor.is_inference() for tensor in tensors):  # which do not count their changes
        return build()
    state = [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors]
    made = _KEPT.setdefault(network, {})
    if name not in made or made[name][0] != state:
        made[name] = (state, build())
    return made[name][1]


def kind_of(layer: nn.Module) -> int | None:
    """Which of the known convolutions a layer is; None for any other layer."""
    if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) or layer.weight.dtype != torch.float32:
        return None
    common = (layer.kernel_size, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    if common != ((3, 3), (1, 1), (1, 1), 1, "zeros") or layer.weight.device.type != "cpu":
        return None
    kinds = {(1, 1): SAME, (2, 2): DOWN} if isinstance(layer, nn.Conv2d) else {(2, 2): UP}
    return kinds.get(layer.stride)  # type: ignore[arg-type]


def slope_of(layer: nn.Module, bias: Tensor) -> Tensor | None:
    """The slope below zero of an activation, for each channel; None for any other layer."""
    if isinstance(layer, nn.ReLU):
        return torch.zeros_like(bias)
    if isinstance(layer, nn.LeakyReLU):
        return torch.full_like(bias, layer.negative_slope)
    if isinstance(layer, nn.PReLU):
        return layer.weight.expand_as(bias)
    return None


def is_halving(layer: nn.Module) -> bool:
    """Whether a layer takes the maxima of 2x2 windows, of incomplete ones, too."""
    if not isinstance(layer, nn.MaxPool2d):
        return False
    return (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode) == (2, 2, 0, 1, True)


def transformed(weight: Tensor, kind: int) -> Tensor:
    """A convolution's weights (out, in, 3, 3), or (in, out, 3, 3) of a transposed one, as factors (terms, in, out)."""
    weight = weight.permute(2, 3, 0, 1) if kind == UP else weight.permute(2, 3, 1, 0)

    def along_first(values: Tensor) -> Tensor:
        return torch.stack(
            [sum(factor * values[k] for k, factor in enumerate(row) if factor) for row in TRANSFORMS[kind]]  # type: ignore[misc]
        )

    # One addition after the other, so that the bits do not depend on the number of threads.
    return along_first(along_first(weight.contiguous()).transpose(0, 1)).transpose(0, 1).flatten(0, 1)
