"""Update rules of the search, Adam and jsma, with separate state for each slot of a block.

A rule maps the points of a block and their gradients to the next points; what it remembers of a row is forgotten when
the slot goes to the next one. Does not know objectives.

``lane`` is the shape in which (S,) numbers broadcast over the points.
"""

import torch
from torch import Tensor

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # Adam's constants, those of its paper and of torch.optim.Adam
MAX_CHANGES = 5  # of one pixel by jsma, as in the code of Schut et al. 2021


class Adam:
    """Adam (Kingma and Ba 2015), with moments and bias corrections of each slot's own."""

    def __init__(self, point: Tensor, learning_rate: float, max_steps: int) -> None:
        step = torch.arange(1, max_steps + 2, dtype=torch.float64)
        self.rate = (learning_rate / (1 - BETA1**step)).float().to(point.device)
        self.root = (1 - BETA2**step).sqrt().float().to(point.device)
        self.mean, self.square = torch.zeros_like(point), torch.zeros_like(point)

    def reset(self, slots: Tensor, dim: int) -> None:
        """Forget the rows that were in these slots."""
        self.mean.index_fill_(dim, slots, 0)
        self.square.index_fill_(dim, slots, 0)

    def __call__(self, point: Tensor, grad: Tensor, steps: Tensor, lane: tuple[int, ...]) -> Tensor:
        """The next points."""
        self.mean.lerp_(grad, 1 - BETA1)
        self.square.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        scale = self.square.sqrt().div_(self.root.take(steps).view(lane)).add_(EPS)
        return point - torch.div(self.mean, scale, out=scale).mul_(self.rate.take(steps).view(lane))


class Jsma:
    """One pixel at a time (Schut et al. 2021): of those that may change, the one with the largest |gradient|, downhill.

    A pixel may change MAX_CHANGES times, and only where the step would move it: a pixel at 0 or 1 does not leave that
    range, and one without a gradient stays. Ties go to the lowest index. Rows are axis 0 of the points in [0, 1].
    """

    def __init__(self, point: Tensor, step_size: float) -> None:
        self.step_size = step_size
        self.changes = torch.zeros_like(point, dtype=torch.uint8).flatten(1)

    def reset(self, slots: Tensor, dim: int) -> None:
        """Forget the rows that were in these slots."""
        self.changes.index_fill_(dim, slots, 0)

    def __call__(self, point: Tensor, grad: Tensor, steps: Tensor, lane: tuple[int, ...]) -> Tensor:
        """The next points."""
        flat, slope = point.flatten(1), grad.flatten(1)
        moved = (flat - self.step_size * slope.sign()).clamp_(0, 1)
        allowed = (moved != flat) & (self.changes < MAX_CHANGES)
        best = torch.where(allowed, slope.abs(), -1).argmax(dim=1, keepdim=True)
        any_allowed = allowed.gather(1, best)
        self.changes.scatter_add_(1, best, any_allowed.to(torch.uint8))
        pixel = torch.where(any_allowed, moved.gather(1, best), flat.gather(1, best))
        return flat.scatter(1, best, pixel).view_as(point)
