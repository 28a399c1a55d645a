"""BatchNorm over the batches of all training processes, on any device.

``torch.nn.SyncBatchNorm`` raises on CPU tensors as soon as there is more than one process.
"""

from typing import Any

import torch
from torch import Tensor, nn


class SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over all processes; the backward pass sums the gradients likewise."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """The sum."""
        value = value.clone()
        torch.distributed.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The sum of the gradients."""
        gradient = gradients[0].clone()
        torch.distributed.all_reduce(gradient)
        return gradient


class SynchronisedBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose moments are those of all processes' batches together."""

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x."""
        if not self.training:
            return super().forward(x)
        # In float32 even where the network runs in bfloat16, which holds a mean, or a count, to 8 bits.
        values = x.float()
        rows = values.new_full((1,), x.numel() / x.shape[1])
        sums = SumOverRanks.apply(torch.cat([values.sum((0, 2, 3)), rows]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = values - mean[:, None, None]
        variance = SumOverRanks.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            momentum = self.momentum or 0.1
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / (count - 1).clamp_min(1), momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronise(module: nn.Module) -> nn.Module:
    """The module itself, each BatchNorm2d in it turned into a SynchronisedBatchNorm."""
    for part in module.modules():
        if type(part) is nn.BatchNorm2d:
            part.__class__ = SynchronisedBatchNorm
    return module
