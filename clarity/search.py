"""The search: Algorithm 1 over many rows at once, each row on its own.

A row is one (image, target) pair. Rows live in the slots of a block of fixed size; a row that ends leaves its slot to
the next one waiting, and no operation mixes slots, so a row's result depends on the row alone. Knows points,
objectives, update rules and engines. Does not know images, VAEs or methods: an objective brings those along.

Shapes: B rows, D latent, K classes, M members, N rows waiting in all, S slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # Adam's constants (Kingma and Ba, 2015), those of torch.optim.Adam
MAX_CHANGES = 5  # of one pixel by jsma (Schut et al. 2021, the authors' code)

#: Slots of a block. Part of the arithmetic, not a tuning flag: another size may give other last bits.
SLOTS = 256

Rows = Mapping[str, Tensor]
Objective = Callable[[Tensor, Rows], tuple[Tensor, Tensor, Tensor]]
Gradient = Callable[[Tensor, Rows], tuple[Tensor, Tensor, Tensor | None]]
OnStep = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class SearchConfig:
    """What a search depends on besides model and row; gamma, N, lambda and delta of the paper, Section 5.

    ``min_target_prob`` is the mean target probability to exceed, ``max_steps`` the most updates, ``distance_weight``
    the weight of the L1 distance, ``learning_rate`` that of Adam (the paper gives none), ``step_size`` the change of
    one pixel in method schut. Raises ValueError on a value that cannot work.
    """

    min_target_prob: float = 0.99
    max_steps: int = 500
    distance_weight: float = 0.001
    learning_rate: float = 0.05
    step_size: float = 0.2

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"SearchConfig.{field.name}: expected a finite number, got {value!r}")
        if not 0 < self.min_target_prob < 1 or _float32(self.min_target_prob) >= 1:
            raise ValueError(
                "SearchConfig.min_target_prob: expected a number between 0 and 1 that float32 tells from 1, "
                f"got {self.min_target_prob!r}"
            )
        if not isinstance(self.max_steps, int) or self.max_steps < 0:
            raise ValueError(f"SearchConfig.max_steps: expected an integer of at least 0, got {self.max_steps!r}")
        if self.distance_weight < 0:
            raise ValueError(f"SearchConfig.distance_weight: expected at least 0, got {self.distance_weight!r}")
        if self.learning_rate <= 0:
            raise ValueError(f"SearchConfig.learning_rate: expected more than 0, got {self.learning_rate!r}")
        if not 0 < self.step_size <= 1:
            raise ValueError(f"SearchConfig.step_size: expected more than 0 and at most 1, got {self.step_size!r}")


@dataclass
class Counterfactuals:
    """How each row ended.

    ``point`` (B, ...) float32 is where it ended, ``steps`` (B,) int32 the updates applied (0 when the start already
    satisfies), ``converged`` (B,) bool whether ``target_prob_final`` > min_target_prob in float32, ``finite`` (B,) bool
    False where the target probability or the next update was not a finite number: the row ends at its last finite
    point, unconverged. ``engine`` is the one that searched.
    """

    point: Tensor
    steps: Tensor
    converged: Tensor
    target_prob_initial: Tensor
    target_prob_final: Tensor
    finite: Tensor
    engine: str

    def __len__(self) -> int:
        return len(self.steps)


def ensemble_terms(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the members of the cross-entropy to ``target`` and of the target probability, each (B,).

    The mean of the members' cross-entropies, as in the paper, not the cross-entropy of their mean. logits (M, B, K).
    """
    chosen = F.log_softmax(logits, dim=-1).gather(-1, target.expand(logits.shape[0], -1).unsqueeze(-1)).squeeze(-1)
    return -chosen.mean(dim=0), chosen.exp().mean(dim=0)


@dataclass(frozen=True)
class LatentObjective:
    """Eq. 6 over stacked latent classifiers: mean cross-entropy plus ``distance_weight`` times the L1 distance of the
    codes.

    ``layers`` are (weight (M, in, out), bias (M, out)) pairs with a ReLU between two of them; rows: ``target`` (B,)
    int64, ``reference`` (B, D). Engines other than the plain one read these fields instead of calling it.
    """

    layers: Sequence[tuple[Tensor, Tensor]]
    distance_weight: float

    def logits(self, point: Tensor) -> Tensor:
        """Logits (M, B, K) of points (B, D)."""
        hidden = point.expand(self.layers[0][0].shape[0], -1, -1)
        for index, (weight, bias) in enumerate(self.layers):
            hidden = torch.baddbmm(bias.unsqueeze(1), torch.relu(hidden) if index else hidden, weight)
        return hidden

    def __call__(self, point: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (B,), target probability (B,), logits (M, B, K)."""
        logits = self.logits(point)
        loss, target_prob = ensemble_terms(logits, rows["target"])
        return loss + self.distance_weight * l1(point, rows["reference"]), target_prob, logits


def l1(a: Tensor, b: Tensor) -> Tensor:
    """L1 distance (B,): the sum of |a - b| over everything but the rows."""
    return (a - b).abs().flatten(1).sum(dim=1)


# --- update rules: one step of S slots at once. ``lane`` tells how a (S,) tensor is viewed to go with a point. --------


class _Adam:
    """Adam (Kingma and Ba, 2015), moments and bias corrections of each slot's own; the sums of torch.optim.Adam."""

    def __init__(self, point: Tensor, config: SearchConfig) -> None:
        steps = torch.arange(1, config.max_steps + 2, dtype=torch.float64)
        self.rate = (config.learning_rate / (1 - BETA1**steps)).float().to(point.device)
        self.root = (1 - BETA2**steps).sqrt().float().to(point.device)
        self.mean, self.square = torch.zeros_like(point), torch.zeros_like(point)

    def load(self, slots: Tensor, dim: int) -> None:
        self.mean.index_fill_(dim, slots, 0)
        self.square.index_fill_(dim, slots, 0)

    def __call__(self, point: Tensor, grad: Tensor, steps: Tensor, lane: tuple[int, ...]) -> Tensor:
        self.mean.lerp_(grad, 1 - BETA1)
        self.square.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        scale = self.square.sqrt().div_(self.root[steps].view(lane)).add_(EPS)
        return point - (self.mean / scale).mul_(self.rate[steps].view(lane))


class _Jsma:
    """One pixel at a time (Schut et al. 2021): the one with the largest |gradient| that may still change, by
    ``step_size`` downhill.

    A pixel may change MAX_CHANGES times, and not where the step would leave it as it is (at 0 or 1, or without
    gradient); ties go to the lowest index. Points are (S, ...) and stay in [0, 1].
    """

    def __init__(self, point: Tensor, config: SearchConfig) -> None:
        self.step_size = config.step_size
        self.changes = torch.zeros_like(point, dtype=torch.uint8).flatten(1)

    def load(self, slots: Tensor, dim: int) -> None:
        self.changes.index_fill_(dim, slots, 0)

    def __call__(self, point: Tensor, grad: Tensor, steps: Tensor, lane: tuple[int, ...]) -> Tensor:
        flat, slope = point.flatten(1), grad.flatten(1)
        moved = (flat - self.step_size * slope.sign()).clamp_(0, 1)
        allowed = (moved != flat) & (self.changes < MAX_CHANGES)
        best = torch.where(allowed, slope.abs(), -1).argmax(dim=1, keepdim=True)
        chosen = allowed.gather(1, best)
        self.changes.scatter_add_(1, best, chosen.to(torch.uint8))
        return flat.scatter(1, best, torch.where(chosen, moved.gather(1, best), flat.gather(1, best))).view_as(point)


UPDATES: dict[str, type[_Adam] | type[_Jsma]] = {"adam": _Adam, "jsma": _Jsma}


# --- the loop ---------------------------------------------------------------------------------------------------------


def _search(
    gradient: Gradient,
    start: Tensor,
    rows: Rows,
    config: SearchConfig,
    update: str,
    *,
    dim: int,
    slots: int,
    stride: int,
    bounds: tuple[float, float] | None,
    on_step: OnStep | None,
    engine: str,
) -> Counterfactuals:
    """Algorithm 1 for all rows, ``slots`` of them at a time; rows lie along ``dim`` of start and of each tensor in
    ``rows``.

    Every ``stride`` evaluations the rows that have ended are written out and the next ones take their slots; until then
    an ended row stands still, so that ``stride`` changes no result, only how often the host looks.
    """
    device, total = start.device, start.shape[dim]
    lane = tuple(-1 if axis == dim % start.dim() else 1 for axis in range(start.dim()))
    others = [axis for axis in range(start.dim()) if axis != dim % start.dim()]

    final = start.clone()
    steps_final = torch.zeros(total, dtype=torch.int64, device=device)
    prob_initial = torch.zeros(total, device=device)
    prob_final = torch.zeros(total, device=device)

    # A slot without a row holds a copy of the first one and never moves.
    first = torch.arange(slots, device=device).clamp_(max=total - 1)
    point = start.index_select(dim, first)
    held = {name: values.index_select(dim if values.dim() > 1 else 0, first) for name, values in rows.items()}
    row = torch.where(torch.arange(slots, device=device) < total, first, -1)
    waiting = min(slots, total)
    steps = torch.zeros(slots, dtype=torch.int64, device=device)
    active = row >= 0
    prob = torch.zeros(slots, device=device)
    fresh: Tensor | None = active.nonzero().squeeze(1)  # slots whose row has not been evaluated yet
    # The probability that a row must exceed to end; -1 after the last update ends every row. NaN exceeds nothing and
    # ends too.
    limit = torch.full((config.max_steps + 1,), config.min_target_prob, device=device)
    limit[-1] = -1
    state = UPDATES[update](point, config)

    while bool((row >= 0).any()):
        for _ in range(stride):
            grad, target_prob, logits = gradient(point, held)
            prob = torch.where(active, target_prob, prob)
            if fresh is not None:
                prob_initial[row[fresh]] = prob[fresh]
                fresh = None
            if on_step is not None and logits is not None:
                seen = active.nonzero().squeeze(1)
                if len(seen):
                    on_step(steps[seen], row[seen], point.index_select(dim, seen), prob[seen], logits[:, seen])
            active &= prob <= limit[steps]
            moved = state(point, grad, steps, lane)
            if bounds is not None:
                moved.clamp_(*bounds)
            active &= torch.linalg.vector_norm(moved, ord=math.inf, dim=others) < math.inf
            point = torch.where(active.view(lane), moved, point)
            steps += active
        ended = ((row >= 0) & ~active).nonzero().squeeze(1)
        if len(ended):
            index = row[ended]
            final.index_copy_(dim, index, point.index_select(dim, ended))
            steps_final[index], prob_final[index] = steps[ended], prob[ended]
            count = min(len(ended), total - waiting)
            row[ended[count:]] = -1
            if count:
                taken, fresh = torch.arange(waiting, waiting + count, device=device), ended[:count]
                waiting += count
                row[fresh], steps[fresh], active[fresh] = taken, 0, True
                point.index_copy_(dim, fresh, start.index_select(dim, taken))
                for name, values in rows.items():
                    axis = dim if values.dim() > 1 else 0
                    held[name].index_copy_(axis, fresh, values.index_select(axis, taken))
                state.load(fresh, dim)

    converged = prob_final > config.min_target_prob
    finite = converged | (torch.isfinite(prob_final) & (steps_final == config.max_steps))
    return Counterfactuals(final, steps_final.int(), converged, prob_initial, prob_final, finite, engine)


# --- engines ----------------------------------------------------------------------------------------------------------


def _autograd(objective: Objective) -> Gradient:
    def gradient(point: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            variable = point.detach().requires_grad_()
            loss, target_prob, logits = objective(variable, rows)
            (grad,) = torch.autograd.grad(loss, variable, torch.ones_like(loss))
        return grad, target_prob.detach(), logits.detach()

    return gradient


def _plain(
    objective: Objective,
    start: Tensor,
    rows: Rows,
    config: SearchConfig,
    update: str,
    slots: int,
    bounds: tuple[float, float] | None,
    on_step: OnStep | None,
) -> Counterfactuals:
    """Autograd through any objective: the engine that defines what the others must give."""
    stride = 1 if on_step is not None or start.device.type == "cpu" else 8
    return _search(
        _autograd(objective),
        start,
        rows,
        config,
        update,
        dim=0,
        slots=slots,
        stride=stride,
        bounds=bounds,
        on_step=on_step,
        engine="plain",
    )


#: What the engines are and what they need; ``auto`` takes the fastest that fits.
ENGINES: dict[str, str] = {
    "plain": "autograd, any objective, any device",
}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Torch computes on ``count`` threads inside; None leaves it as it is."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def descend(
    objective: Objective,
    start: Tensor,
    rows: Rows,
    config: SearchConfig,
    update: str = "adam",
    *,
    bounds: tuple[float, float] | None = None,
    slots: int = SLOTS,
    on_step: OnStep | None = None,
    engine: str = "auto",
    threads: int | None = None,
) -> Counterfactuals:
    """Search from each row of ``start`` until its target probability exceeds ``config.min_target_prob``: Algorithm 1.

    At most ``max_steps`` updates; the probability is tested before each and once after the last. A row's result depends
    on nothing but the row: on a CPU its bits are the same alone, shuffled, among strangers, and on any number of
    threads, within one engine.

    Args:
        objective: (point (B, ...), rows) -> (loss (B,), target_prob (B,), logits (M, B, K)), no row looking at another.
        start: (B, ...) float32.
        rows: tensors with B rows each, handed to the objective in step with the points.
        config: when to stop and how far to go.
        update: a key of UPDATES.
        bounds: each update is clamped to them: (0, 1) for pixels.
        slots: rows computed at a time; part of the arithmetic.
        on_step: called at each evaluation with (steps (b,), indices (b,), point (b, ...), target_prob (b,), logits (M,
        b, K)) of the
            rows still searching; forces the plain engine.
        engine: a key of ENGINES, or auto.
        threads: of the CPU; None leaves torch's own number.

    Raises:
        ValueError: shapes, names or an engine that do not fit. Nothing raises for a row.
    """
    if update not in UPDATES:
        raise ValueError(f"update: expected one of {', '.join(UPDATES)}, got {update!r}")
    if engine != "auto" and engine not in ENGINES:
        raise ValueError(f"engine: expected auto or one of {', '.join(ENGINES)}, got {engine!r}")
    if start.dim() < 2 or start.dtype != torch.float32:
        raise ValueError(f"start: expected (B, ...) float32, got {tuple(start.shape)} {start.dtype}")
    for name, values in rows.items():
        if len(values) != len(start) or values.device != start.device:
            raise ValueError(
                f"rows[{name!r}]: expected {len(start)} rows on {start.device}, "
                f"got {tuple(values.shape)} on {values.device}"
            )
    if threads is not None and threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    start = start.detach()
    if not len(start):
        empty = torch.zeros(0, device=start.device)
        none = torch.zeros(0, dtype=torch.bool, device=start.device)
        return Counterfactuals(start.clone(), empty.int(), none, empty, empty.clone(), none.clone(), "plain")
    with _threads(threads), torch.no_grad():
        return _plain(objective, start, rows, config, update, slots, bounds, on_step)


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
