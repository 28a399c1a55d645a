"""Attributes of images as linear heads on their codes, and the directions along which an attribute changes."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from clarity.rows import in_blocks, require_rows

#: Share of a direction that must not lie in the span of those before it.
LEAST_INDEPENDENT = 1e-3


class AttributeHeads(nn.Module):
    """Logistic regressions on codes, one for each attribute, and the next directions that tell it.

    Args:
        names: of the attributes.
        latent_dim: D.
        num_directions: of an attribute; each is fitted to codes without their parts along those before.
    """

    def __init__(self, names: Sequence[str], latent_dim: int, num_directions: int = 1) -> None:
        super().__init__()
        self.names = tuple(names)
        self.linear = nn.Linear(latent_dim, len(self.names))
        self.further = nn.ModuleList(nn.Linear(latent_dim, len(self.names), False) for _ in range(num_directions - 1))

    @property
    def num_directions(self) -> int:
        """Directions of an attribute."""
        return 1 + len(self.further)

    def forward(self, z: Tensor) -> Tensor:
        """Logits (B, A) of codes (B, D)."""
        return self.linear(z)

    def select(self, names: Sequence[str]) -> "AttributeHeads":
        """The heads of some attributes, in this order; ValueError for a name without a head or twice there."""
        for name in names:
            if name not in self.names:
                raise ValueError(f"keep: no head for attribute {name!r}; choose from {', '.join(self.names)}")
            if list(names).count(name) > 1:
                raise ValueError(f"keep: attribute {name!r} is named twice; name it once")
        heads = AttributeHeads(names, self.linear.in_features, self.num_directions)
        rows = [self.names.index(name) for name in names]
        heads.load_state_dict({key: tensor[rows] for key, tensor in self.state_dict().items()})
        return heads.to(self.linear.weight.device).requires_grad_(False).eval()

    def directions(self) -> Tensor:
        """Orthonormal directions (D, k): a code that moves along none of them keeps the logits of every attribute.

        ValueError: as many directions as the code has dimensions, or some that depend on each other linearly.
        """
        weight = torch.cat([tensor for key, tensor in self.state_dict().items() if key.endswith("weight")])
        if len(weight) >= weight.shape[1]:
            raise ValueError(
                f"keep: expected fewer than {math.ceil(weight.shape[1] / self.num_directions)} attributes, for a code "
                f"of {weight.shape[1]} dimensions and {self.num_directions} directions each, got {len(self.names)}"
            )
        # On the CPU in float64, so that each device and engine is given the same numbers.
        q, r = torch.linalg.qr(torch.nn.functional.normalize(weight, dim=1).t().double().cpu())
        if (dependent := (r.diagonal().abs() < LEAST_INDEPENDENT).nonzero()).numel():
            name = self.names[int(dependent[0]) % len(self.names)]
            raise ValueError(f"keep: {name!r} depends on the attributes before it; leave it out")
        return q.float().contiguous().to(weight.device)


@torch.inference_mode()
def attribute_rows(heads: AttributeHeads, z: Tensor) -> np.ndarray:
    """Probabilities (B, A) of attributes at codes (B, D), each row independent of its batch (``rows``)."""
    require_rows(z, (heads.linear.in_features,))
    return in_blocks(lambda block, _: torch.sigmoid(heads(block)), z).cpu().numpy()
