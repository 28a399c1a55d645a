"""The search: Algorithm 1 over many rows at once, each row on its own.

A row is one (image, target) pair. Rows live in the slots of a block of fixed size; a row that ends leaves its slot to
the next one waiting, and no operation mixes slots, so a row's result depends on the row alone. Knows points,
objectives, update rules and engines. Does not know images, VAEs or methods: an objective brings those along.

Shapes: B rows, D latent, K classes, M members, N rows waiting in all, S slots.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # Adam's constants (Kingma and Ba, 2015), those of torch.optim.Adam
MAX_CHANGES = 5  # of one pixel by jsma (Schut et al. 2021, the authors' code)

#: Slots of a block. Part of the arithmetic, not a tuning flag: another size may give other last bits.
SLOTS = 256
BATCHED_SLOTS = 128
BATCHED_STRIDE = 4
CUDA_SLOTS = 4096
CUDA_STRIDE = 8

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


@dataclass(frozen=True)
class _Run:
    """How to run a search, apart from what is searched."""

    update: str
    bounds: tuple[float, float] | None
    slots: int
    on_step: OnStep | None
    threads: int


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


class _Queue:
    """Hands out row numbers in order; the only thing that workers share."""

    def __init__(self, total: int) -> None:
        self.total, self.next = total, 0
        self.lock = threading.Lock()

    def take(self, count: int) -> range:
        with self.lock:
            first, self.next = self.next, min(self.next + count, self.total)
            return range(first, self.next)


def _search(
    make_gradient: Callable[[], Gradient],
    start: Tensor,
    rows: Rows,
    config: SearchConfig,
    update: str,
    *,
    dim: int,
    slots: int,
    stride: int,
    workers: int,
    bounds: tuple[float, float] | None,
    on_step: OnStep | None,
    engine: str,
) -> Counterfactuals:
    """Algorithm 1 for all rows, which lie along ``dim`` of start and of each tensor in ``rows``, ``slots`` at a time.

    On a CPU each worker is a thread of the host with a block of its own, and each operation runs on that thread alone:
    how many there are cannot change a bit, and none waits for another at the end of every operation.
    """
    total = start.shape[dim]
    result = Counterfactuals(
        point=start.clone(),
        steps=torch.zeros(total, dtype=torch.int32, device=start.device),
        converged=torch.zeros(total, dtype=torch.bool, device=start.device),
        target_prob_initial=torch.zeros(total, device=start.device),
        target_prob_final=torch.zeros(total, device=start.device),
        finite=torch.ones(total, dtype=torch.bool, device=start.device),
        engine=engine,
    )
    queue = _Queue(total)

    def work() -> None:
        with torch.no_grad():
            _run_block(make_gradient(), start, rows, config, update, dim, slots, stride, bounds, on_step, queue, result)

    workers = min(workers, -(-total // slots))
    if start.device.type != "cpu":
        work()
        return result
    with _threads(1), ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work) for _ in range(workers)]:
            done.result()
    return result


def _run_block(
    gradient: Gradient,
    start: Tensor,
    rows: Rows,
    config: SearchConfig,
    update: str,
    dim: int,
    slots: int,
    stride: int,
    bounds: tuple[float, float] | None,
    on_step: OnStep | None,
    queue: _Queue,
    result: Counterfactuals,
) -> None:
    """Search in one block until the queue is empty and every slot has ended.

    Every ``stride`` evaluations the rows that have ended are written out and the next ones take their slots; until then
    an ended row stands still, so that ``stride`` changes no result, only how often the host looks.
    """
    device = start.device
    lane = tuple(-1 if axis == dim % start.dim() else 1 for axis in range(start.dim()))
    others = [axis for axis in range(start.dim()) if axis != dim % start.dim()]

    # A slot without a row holds the first row and never moves: its numbers are as good as any.
    nobody = torch.zeros(slots, dtype=torch.int64, device=device)
    point = start.index_select(dim, nobody)
    held = {name: values.index_select(dim if values.dim() > 1 else 0, nobody) for name, values in rows.items()}
    row = nobody - 1
    steps, active, prob = torch.zeros_like(nobody), row >= 0, torch.zeros(slots, device=device)
    state = UPDATES[update](point, config)
    # What a row must exceed to end. After the last update -1 ends every row; NaN is never <= and ends its row too.
    limit = torch.full((config.max_steps + 1,), config.min_target_prob, device=device)
    limit[-1] = -1

    free = torch.arange(slots, device=device)
    living = 0
    while True:
        taken = queue.take(len(free))
        fresh = free[: len(taken)]
        living += len(taken)
        if len(taken):
            index = torch.arange(taken.start, taken.stop, device=device)
            row[fresh], steps[fresh], active[fresh] = index, 0, True
            point.index_copy_(dim, fresh, start.index_select(dim, index))
            for name, values in rows.items():
                axis = dim if values.dim() > 1 else 0
                held[name].index_copy_(axis, fresh, values.index_select(axis, index))
            state.load(fresh, dim)
        if not living:
            return

        for turn in range(stride):
            grad, target_prob, logits = gradient(point, held)
            prob = torch.where(active, target_prob, prob)
            if turn == 0 and len(taken):
                result.target_prob_initial[row[fresh]] = prob[fresh]
            if on_step is not None and logits is not None:
                seen = active.nonzero().squeeze(1)
                on_step(steps[seen], row[seen], point.index_select(dim, seen), prob[seen], logits[:, seen])
            active &= prob <= limit[steps]
            moved = state(point, grad, steps, lane)
            if bounds is not None:
                moved.clamp_(*bounds)
            active &= torch.linalg.vector_norm(moved, ord=math.inf, dim=others) < math.inf
            point = torch.where(active.view(lane), moved, point)
            steps += active

        free = ((row >= 0) & ~active).nonzero().squeeze(1)
        living -= len(free)
        if len(free):
            index = row[free]
            final, applied = prob[free], steps[free]
            result.point.index_copy_(dim, index, point.index_select(dim, free))
            result.steps[index], result.target_prob_final[index] = applied.int(), final
            result.converged[index] = final > config.min_target_prob
            # A row ends because it got there, because its updates are spent, or because a number was not finite.
            result.finite[index] = (final > limit[applied]) & (final < math.inf)
            row[free] = -1
        if living < slots - len(free):
            free = (row < 0).nonzero().squeeze(1)


# --- engines ----------------------------------------------------------------------------------------------------------


def _autograd(objective: Objective) -> Gradient:
    def gradient(point: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            variable = point.detach().requires_grad_()
            loss, target_prob, logits = objective(variable, rows)
            (grad,) = torch.autograd.grad(loss, variable, torch.ones_like(loss))
        return grad, target_prob.detach(), logits.detach()

    return gradient


def _analytic(objective: LatentObjective, slots: int) -> Gradient:
    """Gradient of Eq. 6 written out, for points (D, S) and rows ``target_is`` (K, S), ``reference`` (D, S).

    A slot is a column, so that every operation runs along the slots, and each of them through all members: what a
    hidden layer of all members costs is one (M, out, in) x (M, in, S) product and two passes in place.
    """
    members, latent = objective.layers[0][0].shape[:2]
    first = objective.layers[0][0].transpose(1, 2).reshape(-1, latent).contiguous()  # (M * out, D)
    forward = [weight.transpose(1, 2).contiguous() for weight, _ in objective.layers[1:]]
    biases = [bias.unsqueeze(2).contiguous() for _, bias in objective.layers]
    backward = [weight.contiguous() for weight, _ in objective.layers[1:]]
    first_back = first.t().contiguous()
    hidden = [torch.empty(members, weight.shape[2], slots, device=weight.device) for weight, _ in objective.layers]
    slopes = [torch.empty_like(values) for values in hidden]
    top = torch.empty(members, 1, slots, device=first.device)
    chain = torch.ops.aten.threshold_backward.grad_input

    def gradient(point: Tensor, rows: Rows) -> tuple[Tensor, Tensor, None]:
        torch.mm(first, point, out=hidden[0].view(-1, slots))
        hidden[0].add_(biases[0])
        for index, weight in enumerate(forward):
            hidden[index].relu_()
            torch.bmm(weight, hidden[index], out=hidden[index + 1])
            hidden[index + 1].add_(biases[index + 1])
        logits = hidden[-1]
        torch.amax(logits, dim=1, keepdim=True, out=top)
        probs = logits.sub_(top).exp_()
        torch.sum(probs, dim=1, keepdim=True, out=top)
        probs.mul_(top.reciprocal_())
        target_prob = (probs.mean(dim=0) * rows["target_is"]).sum(dim=0)
        slope = probs.sub_(rows["target_is"])
        for index in range(len(backward) - 1, -1, -1):
            torch.bmm(backward[index], slope, out=slopes[index])
            slope = slopes[index]
            chain(slope, hidden[index], 0, grad_input=slope)
        pull = (point - rows["reference"]).sign_()
        grad = torch.addmm(pull, first_back, slope.view(-1, slots), beta=objective.distance_weight, alpha=1 / members)
        return grad, target_prob, None

    return gradient


def _plain(objective: Objective, start: Tensor, rows: Rows, config: SearchConfig, run: _Run) -> Counterfactuals:
    """Autograd through any objective: the engine that defines what the others must give."""
    return _search(
        lambda: _autograd(objective),
        start,
        rows,
        config,
        run.update,
        dim=0,
        slots=run.slots,
        stride=1 if run.on_step is not None or start.device.type == "cpu" else CUDA_STRIDE,
        workers=1 if run.on_step is not None else run.threads,
        bounds=run.bounds,
        on_step=run.on_step,
        engine="plain",
    )


def _batched(objective: LatentObjective, start: Tensor, rows: Rows, config: SearchConfig, run: _Run) -> Counterfactuals:
    """Analytic gradients of the stacked classifiers in PyTorch alone; a row is a column there."""
    slots = BATCHED_SLOTS if start.device.type == "cpu" else CUDA_SLOTS
    classes = torch.arange(objective.layers[-1][0].shape[2], device=start.device)
    result = _search(
        lambda: _analytic(objective, slots),
        start.t().contiguous(),
        {
            "target_is": (classes[:, None] == rows["target"]).float(),
            "reference": rows["reference"].t().contiguous(),
        },
        config,
        run.update,
        dim=1,
        slots=slots,
        stride=BATCHED_STRIDE if start.device.type == "cpu" else CUDA_STRIDE,
        workers=run.threads,
        bounds=None,
        on_step=None,
        engine="batched",
    )
    result.point = result.point.t().contiguous()
    return result


#: What the engines are and what they need; ``auto`` takes the fastest that fits.
ENGINES: dict[str, str] = {
    "batched": "analytic gradients of a LatentObjective in PyTorch, any device",
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
    run = _Run(update, bounds, slots, on_step, torch.get_num_threads() if threads is None else threads)
    with torch.no_grad():
        if engine in ("auto", "batched") and isinstance(objective, LatentObjective) and on_step is None:
            return _batched(objective, start.detach(), rows, config, run)
        return _plain(objective, start.detach(), rows, config, run)


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
