"""Adam for stacks of networks, learning rate schedules, and seeds."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from clarity.updates import BETA1, BETA2, EPS


class Adam(torch.optim.Optimizer):
    """Adam (Kingma and Ba 2015) from individually rounded operations.

    torch.optim.Adam fuses multiplications and additions in the vectorised part of an array but not in its remainder, so
    the bits of a parameter depend on its offset in the stack. Here they do not.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], learning_rate: float) -> None:
        self.named = dict(parameters)
        super().__init__(self.named.values(), {"lr": learning_rate})
        self.count = 0
        for parameter in self.named.values():
            self.state[parameter] = {"first": torch.zeros_like(parameter), "second": torch.zeros_like(parameter)}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what ``tensors`` returned."""
        self.count = int(tensors["adam.count"])
        self.param_groups[0]["lr"] = float(tensors["adam.learning_rate"])
        for name, parameter in self.named.items():
            for key, moment in self.state[parameter].items():
                moment.copy_(tensors[f"adam.{key}.{name}"])

    def tensors(self) -> dict[str, Tensor]:
        """Moments, number of updates and learning rate, by name, for a checkpoint."""
        rate = torch.tensor(self.param_groups[0]["lr"], dtype=torch.float64)
        moments = {
            f"adam.{key}.{name}": moment.clone()
            for name, parameter in self.named.items()
            for key, moment in self.state[parameter].items()
        }
        return {**moments, "adam.count": torch.tensor(self.count), "adam.learning_rate": rate}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the parameters' ``grad``."""
        self.count += 1
        rate = self.param_groups[0]["lr"] / (1 - BETA1**self.count)
        root = math.sqrt(1 - BETA2**self.count)
        for parameter in self.named.values():
            gradient = parameter.grad
            assert gradient is not None
            first, second = self.state[parameter]["first"], self.state[parameter]["second"]
            first.mul_(BETA1).add_(gradient * (1 - BETA1))
            second.mul_(BETA2).add_(gradient.square().mul_(1 - BETA2))
            parameter.sub_((first * rate).div_(second.sqrt().div_(root).add_(EPS)))


def one_cycle(adam: Adam, total: int) -> OneCycleLR:
    """One-cycle schedule (Smith and Topin 2018) over ``total`` updates, with Adam's learning rate as its peak."""
    return OneCycleLR(adam, adam.param_groups[0]["lr"], total_steps=total, cycle_momentum=False)


def cosine_decay(adam: Adam, total: int) -> LambdaLR:
    """Cosine decay from Adam's learning rate to zero over ``total`` updates."""
    return LambdaLR(adam, lambda step: (1 + math.cos(math.pi * step / total)) / 2)


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """A seed for one purpose, statistically independent of those of other purposes and numbers."""
    sequence = np.random.SeedSequence([seed, *purpose.encode(), number])
    return int.from_bytes(sequence.generate_state(2).tobytes(), "little") >> 1


def generator_for(seed: int, purpose: str, number: int) -> torch.Generator:
    """A CPU generator, seeded by ``derived_seed``."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, number))
