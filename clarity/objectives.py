"""Objectives of the search, and their gradients.

An objective maps points and the tensors of their rows to a loss, a target probability and logits, each row by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clarity.classifiers import perceptron_logits

Rows = Mapping[str, Tensor]
#: Of stacked classifiers: weights (M, in, out) and biases (M, out).
Layers = Sequence[tuple[Tensor, Tensor]]
Objective = Callable[[Tensor, Rows], tuple[Tensor, Tensor, Tensor]]
#: Of points and their rows: gradient, target probability, and the logits where an engine has them.
Gradient = Callable[[Tensor, Rows], tuple[Tensor, Tensor, "Tensor | None"]]


def ensemble_terms(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The members' mean cross-entropy to ``target``, not that of their mean, and their mean probability of it (B,)."""
    chosen = F.log_softmax(logits, dim=2).gather(2, target.expand(len(logits), -1).unsqueeze(2)).squeeze(2)
    return -chosen.mean(dim=0), chosen.exp().mean(dim=0)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """L1 distance (B,) of each row of a to its row of b: a sum, not a mean."""
    return (a - b).abs().flatten(1).sum(dim=1)


@dataclass(frozen=True)
class LatentObjective:
    """Eq. 6: mean cross-entropy of stacked latent classifiers plus ``distance_weight`` times the L1 distance of codes.

    ``layers`` are (weight (M, in, out), bias (M, out)), a ReLU between two; no update moves along the orthonormal
    directions ``fixed`` (D, k). Rows: ``target`` (B,) int64, ``reference`` (B, D).
    """

    layers: Layers
    distance_weight: float
    fixed: Tensor | None = None

    @property
    def directions(self) -> Tensor:
        """The fixed directions as rows (k, D), with k = 0 for none."""
        weight = self.layers[0][0]
        return weight.new_zeros(0, weight.shape[1]) if self.fixed is None else self.fixed.t()

    def __call__(self, point: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (B,), target probability (B,) and logits (M, B, K) of codes (B, D)."""
        logits = perceptron_logits(point, self.layers)
        cross_entropy, target_prob = ensemble_terms(logits, rows["target"])
        return cross_entropy + self.distance_weight * l1(point, rows["reference"]), target_prob, logits


def autograd_gradient(objective: Objective, of: str = "loss") -> Gradient:
    """Gradient of any objective's loss, or of its target probability, by autograd."""

    def gradient(point: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            variable = point.detach().requires_grad_()
            loss, target_prob, logits = objective(variable, rows)
            value = loss if of == "loss" else target_prob
            (grad,) = torch.autograd.grad(value, variable, torch.ones_like(value))
        return grad, target_prob.detach(), logits.detach()

    return gradient


def analytic_gradient(objective: LatentObjective, slots: int, of: str = "loss") -> Gradient:
    """Gradient of Eq. 6, or of its target probability, in closed form, with rows along the second axis.

    Points are (D, S), rows ``target_is`` (K, S) and ``reference`` (D, S), so that elementwise work runs along the slots
    and each layer of all members is one product (M, out, in) x (M, in, S).
    """
    weights = [weight.contiguous() for weight, _ in objective.layers]
    biases = [bias.unsqueeze(2).contiguous() for _, bias in objective.layers]
    transposed = [weight.transpose(1, 2).contiguous() for weight in weights]
    members, latent = weights[0].shape[:2]
    first = transposed[0].view(-1, latent)  # (M * out, D)
    first_back = first.t().contiguous()
    hidden = [bias.new_empty(members, bias.shape[1], slots) for bias in biases]
    slopes = [torch.empty_like(values) for values in hidden]
    scale = first.new_empty(members, 1, slots)
    mask_ = torch.ops.aten.threshold_backward.grad_input

    def gradient(point: Tensor, rows: Rows) -> tuple[Tensor, Tensor, None]:
        torch.mm(first, point, out=hidden[0].view(-1, slots))
        hidden[0].add_(biases[0])
        for index in range(1, len(weights)):
            torch.bmm(transposed[index], hidden[index - 1].relu_(), out=hidden[index])
            hidden[index].add_(biases[index])
        logits = hidden[-1]
        torch.amax(logits, dim=1, keepdim=True, out=scale)
        probs = logits.sub_(scale).exp_()
        torch.sum(probs, dim=1, keepdim=True, out=scale)
        probs.mul_(scale.reciprocal_())
        target_prob = (probs.sum(dim=0) * rows["target_is"]).sum(dim=0).div_(members)
        if of == "loss":
            slope = probs.sub_(rows["target_is"])
        else:
            own = (probs * rows["target_is"]).sum(dim=1, keepdim=True)
            slope = (rows["target_is"] - probs).mul_(own)
        for index in range(len(weights) - 1, 0, -1):
            slope = torch.bmm(weights[index], slope, out=slopes[index - 1])
            mask_(slope, hidden[index - 1], 0, grad_input=slope)
        if of == "loss":
            pull = (point - rows["reference"]).sign_()
            beta = objective.distance_weight
        else:
            pull, beta = torch.zeros_like(point), 0.0
        grad = torch.addmm(pull, first_back, slope.view(-1, slots), beta=beta, alpha=1 / members)
        return grad, target_prob, None

    return gradient


def as_columns(objective: LatentObjective, rows: Rows) -> dict[str, Tensor]:
    """The rows of a LatentObjective in the layout of ``analytic_gradient``."""
    classes = torch.arange(objective.layers[-1][0].shape[2], device=rows["target"].device)
    return {
        "target_is": (classes.unsqueeze(1) == rows["target"]).to(rows["reference"].dtype),
        "reference": rows["reference"].t().contiguous(),
        "min_target_prob": rows["min_target_prob"],
    }


def in_columns(objective: LatentObjective, slots: int) -> Gradient:
    """``analytic_gradient`` of the target probability for points and rows that lie along the first axis."""
    gradient = analytic_gradient(objective, slots, "target_prob")

    def by_rows(point: Tensor, rows: Rows) -> tuple[Tensor, Tensor, None]:
        grad, target_prob, _ = gradient(point.t().contiguous(), as_columns(objective, rows))
        return grad.t(), target_prob, None

    return by_rows


def require_latent(objective: LatentObjective, start: Tensor, rows: Rows) -> None:
    """Raise ValueError when codes, rows and stacked layers do not fit together."""
    for name in ("target", "reference"):
        if name not in rows:
            raise ValueError(f"rows: a LatentObjective needs target and reference, got {', '.join(rows) or 'none'}")
    members, width = objective.layers[0][0].shape[:2]
    for weight, bias in objective.layers:
        if weight.shape[:2] != (members, width) or bias.shape != (members, weight.shape[2]):
            raise ValueError(
                f"layers: expected weights ({members}, {width}, out) with biases ({members}, out), "
                f"got {tuple(weight.shape)} with {tuple(bias.shape)}"
            )
        width = weight.shape[2]
    expected = (len(start), objective.layers[0][0].shape[1])
    for name, shape in (("start", start.shape), ("rows['reference']", rows["reference"].shape)):
        if tuple(shape) != expected:
            raise ValueError(f"{name}: expected codes {expected}, got {tuple(shape)}")
    target = rows["target"]
    if target.dtype != torch.int64 or target.dim() != 1:
        raise ValueError(f"rows['target']: expected int64 ({len(start)},), got {target.dtype} {tuple(target.shape)}")
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < width:
        raise ValueError(
            f"rows['target']: expected classes 0 ... {width - 1}, got {int(target.min())} ... {int(target.max())}"
        )
