"""Attributes of images as linear heads on their codes, and the directions along which an attribute changes.

Shapes: B rows, D latent, A attributes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from clarity.rows import in_blocks, require_rows

#: Share of a direction that must not lie in the span of those before it.
LEAST_INDEPENDENT = 1e-3


class AttributeHeads(nn.Module):
    """Logistic regressions on codes, one for each attribute."""

    def __init__(self, names: Sequence[str], latent_dim: int) -> None:
        super().__init__()
        self.names = tuple(names)
        self.linear = nn.Linear(latent_dim, len(self.names))

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
        heads = AttributeHeads(names, self.linear.in_features).to(self.linear.weight.device)
        rows = [self.names.index(name) for name in names]
        heads.linear.weight.data = self.linear.weight[rows].detach().clone()
        heads.linear.bias.data = self.linear.bias[rows].detach().clone()
        return heads.requires_grad_(False).eval()

    def directions(self) -> Tensor:
        """Orthonormal directions (D, A): a code that moves along none of them keeps the logits of every attribute.

        ValueError: as many attributes as the code has dimensions, or heads that depend on each other linearly.
        """
        weight = self.linear.weight.detach()
        if len(weight) >= weight.shape[1]:
            raise ValueError(
                f"keep: expected fewer attributes than the code has dimensions ({weight.shape[1]}), got {len(weight)}"
            )
        # On the CPU in float64, so that each device and engine is given the same numbers.
        q, r = torch.linalg.qr(torch.nn.functional.normalize(weight, dim=1).t().double().cpu())
        if (dependent := (r.diagonal().abs() < LEAST_INDEPENDENT).nonzero()).numel():
            name = self.names[int(dependent[0])]
            raise ValueError(f"keep: {name!r} depends on the attributes before it; leave it out")
        return q.float().contiguous().to(weight.device)


@torch.inference_mode()
def attribute_rows(heads: AttributeHeads, z: Tensor) -> np.ndarray:
    """Probabilities (B, A) of attributes at codes (B, D), each row independent of its batch (``rows``)."""
    require_rows(z, (heads.linear.in_features,))
    return in_blocks(lambda block: torch.sigmoid(heads(block)), z).cpu().numpy()
