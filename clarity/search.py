"""The search: Algorithm 1 over many rows at once, each row on its own.

A row is one (image, target) pair. Rows sit in the slots of a block of fixed size; one that ends leaves its slot to the
next one waiting, and no operation mixes slots, so that a row's result depends on the row alone. Knows points,
objectives, update rules and engines. Does not know images, VAEs or methods: an objective brings those along.

Shapes: B rows, D latent, K classes, M members, S slots of a block.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from clarity import kernels
from clarity.rows import one_thread

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # Adam's constants, those of its paper and of torch.optim.Adam
MAX_CHANGES = 5  # of one pixel by jsma: the code of Schut et al. 2021

#: Slots of a block on a CPU. Part of the arithmetic, no tuning flag: libraries choose their kernels by shape. It is a
#: multiple of 32, as torch computes what is left beyond a tensor's last run of 32 numbers by other instructions.
SLOTS = 128
#: The most slots of a block elsewhere, where a row's bits may depend on the batch.
DEVICE_SLOTS = 16384

Rows = Mapping[str, Tensor]
Objective = Callable[[Tensor, Rows], tuple[Tensor, Tensor, Tensor]]
OnStep = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
Gradient = Callable[[Tensor, Rows], tuple[Tensor, Tensor, "Tensor | None"]]


@dataclass(frozen=True)
class SearchConfig:
    """What a search depends on besides model and row; defaults are the paper's (Sections 2 and 5) where it has any.

    Args:
        min_target_prob: gamma, the mean target probability to exceed.
        max_steps: N, the most updates of a row.
        distance_weight: lambda, the weight of the L1 distance.
        learning_rate: of Adam; the paper gives none. With 0.05 searches on digits take about 70 steps.
        step_size: delta, the change of a pixel in one step of jsma.
    """

    min_target_prob: float = 0.99
    max_steps: int = 500
    distance_weight: float = 0.001
    learning_rate: float = 0.05
    step_size: float = 0.2

    def __post_init__(self) -> None:
        def require(name: str, fits: bool, expected: str) -> None:
            if not fits:
                raise ValueError(f"SearchConfig.{name}: expected {expected}, got {getattr(self, name)!r}")

        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            require(field.name, number and math.isfinite(value), "a finite number")
        below_one = torch.tensor(self.min_target_prob, dtype=torch.float32).item() < 1
        require("min_target_prob", self.min_target_prob > 0 and below_one, "more than 0 and, in float32, less than 1")
        require("max_steps", isinstance(self.max_steps, int) and self.max_steps >= 0, "an integer of at least 0")
        require("distance_weight", self.distance_weight >= 0, "at least 0")
        require("learning_rate", self.learning_rate > 0, "more than 0")
        require("step_size", 0 < self.step_size <= 1, "more than 0 and at most 1")


@dataclass
class Counterfactuals:
    """How each row ended.

    Args:
        point: (B, ...) float32, where it ended.
        steps: (B,) int32, updates applied; 0 when the start already satisfies.
        converged: (B,) bool, whether ``target_prob_final`` exceeds min_target_prob in float32.
        target_prob_initial: (B,), mean target probability at the start.
        target_prob_final: (B,), the same at the point.
        finite: (B,) bool. False: the target probability at the point, or the next point, was not a finite number; the
            row ended there, unconverged.
        engine: which engine searched.
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


# ---- objectives ------------------------------------------------------------------------------------------------------


def ensemble_terms(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the members of the cross-entropy to ``target`` and of the target's probability, each (B,).

    The mean of the members' cross-entropies, as in the paper, not the cross-entropy of their mean. Logits (M, B, K).
    """
    chosen = F.log_softmax(logits, dim=2).gather(2, target.expand(len(logits), -1).unsqueeze(2)).squeeze(2)
    return -chosen.mean(dim=0), chosen.exp().mean(dim=0)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """L1 distance (B,) of each row of a to its row of b: a sum, not a mean."""
    return (a - b).abs().flatten(1).sum(dim=1)


@dataclass(frozen=True)
class LatentObjective:
    """Eq. 6: mean cross-entropy of stacked latent classifiers plus ``distance_weight`` times the L1 distance of codes.

    The plain engine calls it; the others read its fields. Rows: ``target`` (B,) int64, ``reference`` (B, D).

    Args:
        layers: (weight (M, in, out), bias (M, out)) of each layer, a ReLU between two of them.
        distance_weight: lambda.
    """

    layers: Sequence[tuple[Tensor, Tensor]]
    distance_weight: float

    def __call__(self, point: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (B,), target probability (B,) and logits (M, B, K) of codes (B, D)."""
        logits = point.expand(len(self.layers[0][0]), -1, -1)
        for index, (weight, bias) in enumerate(self.layers):
            logits = torch.baddbmm(bias.unsqueeze(1), torch.relu(logits) if index else logits, weight)
        cross_entropy, target_prob = ensemble_terms(logits, rows["target"])
        return cross_entropy + self.distance_weight * l1(point, rows["reference"]), target_prob, logits


# ---- update rules: the next points of a block. ``lane`` is the shape in which (S,) numbers go with its points --------


class _Adam:
    """Adam (Kingma and Ba 2015); moments and bias corrections are each slot's own, as if it had an optimiser alone."""

    def __init__(self, point: Tensor, config: SearchConfig) -> None:
        step = torch.arange(1, config.max_steps + 2, dtype=torch.float64)
        self.rate = (config.learning_rate / (1 - BETA1**step)).float().to(point.device)
        self.root = (1 - BETA2**step).sqrt().float().to(point.device)
        self.mean, self.square = torch.zeros_like(point), torch.zeros_like(point)

    def reset(self, slots: Tensor, dim: int) -> None:
        self.mean.index_fill_(dim, slots, 0)
        self.square.index_fill_(dim, slots, 0)

    def __call__(self, point: Tensor, grad: Tensor, steps: Tensor, lane: tuple[int, ...]) -> Tensor:
        self.mean.lerp_(grad, 1 - BETA1)
        self.square.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        scale = self.square.sqrt().div_(self.root.take(steps).view(lane)).add_(EPS)
        return point - torch.div(self.mean, scale, out=scale).mul_(self.rate.take(steps).view(lane))


class _Jsma:
    """One pixel at a time (Schut et al. 2021): of those that may change, the one with the largest |gradient|, downhill.

    A pixel may change MAX_CHANGES times, and only where the step would move it: not at 0 or 1 on its way out, not
    without a gradient. Ties go to the lowest index. Rows are axis 0 of the points, which stay in [0, 1].
    """

    def __init__(self, point: Tensor, config: SearchConfig) -> None:
        self.step_size = config.step_size
        self.changes = torch.zeros_like(point, dtype=torch.uint8).flatten(1)

    def reset(self, slots: Tensor, dim: int) -> None:
        self.changes.index_fill_(dim, slots, 0)

    def __call__(self, point: Tensor, grad: Tensor, steps: Tensor, lane: tuple[int, ...]) -> Tensor:
        flat, slope = point.flatten(1), grad.flatten(1)
        moved = (flat - self.step_size * slope.sign()).clamp_(0, 1)
        allowed = (moved != flat) & (self.changes < MAX_CHANGES)
        best = torch.where(allowed, slope.abs(), -1).argmax(dim=1, keepdim=True)
        any_allowed = allowed.gather(1, best)
        self.changes.scatter_add_(1, best, any_allowed.to(torch.uint8))
        pixel = torch.where(any_allowed, moved.gather(1, best), flat.gather(1, best))
        return flat.scatter(1, best, pixel).view_as(point)


UPDATES: dict[str, type[_Adam] | type[_Jsma]] = {"adam": _Adam, "jsma": _Jsma}


# ---- the loop --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """How to search, apart from what. Rows lie along axis ``dim`` of points and of the tensors that go with them."""

    engine: str
    update: str
    bounds: tuple[float, float] | None
    on_step: OnStep | None
    workers: int
    slots: int
    stride: int
    dim: int = 0


class _Queue:
    """Hands out row numbers in their order; all that workers share."""

    def __init__(self, total: int) -> None:
        self.total, self.next, self.lock = total, 0, threading.Lock()

    def take(self, count: int) -> range:
        with self.lock:
            first, self.next = self.next, min(self.next + count, self.total)
            return range(first, self.next)


def _search(
    make_gradient: Callable[[int], Gradient], start: Tensor, rows: Rows, config: SearchConfig, run: _Run
) -> Counterfactuals:
    """Algorithm 1 for all rows.

    On a CPU each worker is a thread with a block of its own, and each operation stays on its worker's thread: so the
    number of threads changes no bit, and none waits for another at the end of every small operation.
    """
    total, device = start.shape[run.dim], start.device
    result = Counterfactuals(
        point=start.clone(),
        steps=torch.zeros(total, dtype=torch.int32, device=device),
        converged=torch.zeros(total, dtype=torch.bool, device=device),
        target_prob_initial=torch.zeros(total, device=device),
        target_prob_final=torch.zeros(total, device=device),
        finite=torch.ones(total, dtype=torch.bool, device=device),
        engine=run.engine,
    )
    if not total:
        return result
    queue = _Queue(total)

    def work() -> None:
        with torch.no_grad():
            _search_block(make_gradient(run.slots), start, rows, config, run, queue, result)

    workers = min(run.workers, math.ceil(total / run.slots))
    if workers <= 1:
        work()
    else:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for done in [pool.submit(work) for _ in range(workers)]:
                done.result()
    return result


def _search_block(
    gradient: Gradient,
    start: Tensor,
    rows: Rows,
    config: SearchConfig,
    run: _Run,
    queue: _Queue,
    result: Counterfactuals,
) -> None:
    """Search in one block until the queue is empty and every slot has ended.

    Every ``stride`` evaluations the rows that have ended are written out and the next ones take their slots; until then
    an ended row stands still. So ``stride`` changes no result, only how often the host looks at the device.
    """
    device, dim = start.device, run.dim
    lane = tuple(-1 if axis == dim else 1 for axis in range(start.dim()))
    others = [axis for axis in range(start.dim()) if axis != dim]

    def axis_of(values: Tensor) -> int:
        return min(dim, values.dim() - 1)

    # An empty slot holds the first row and never moves: any numbers do.
    empty = torch.zeros(run.slots, dtype=torch.int64, device=device)
    point = start.index_select(dim, empty)
    held = {name: values.index_select(axis_of(values), empty) for name, values in rows.items()}
    row, steps, active = empty - 1, empty.clone(), empty > 0
    prob = torch.zeros(run.slots, device=device)
    update = UPDATES[run.update](point, config)
    # What a row must exceed to end; after the last update anything does.
    limit = torch.full((config.max_steps + 1,), config.min_target_prob, device=device)
    limit[-1] = -1

    free, occupied = torch.arange(run.slots, device=device), 0
    while True:
        taken = queue.take(len(free))
        fresh = free[: len(taken)]
        occupied += len(taken)
        if not occupied:
            return
        if len(taken):
            index = torch.arange(taken.start, taken.stop, device=device)
            row[fresh], steps[fresh], active[fresh] = index, 0, True
            point.index_copy_(dim, fresh, start.index_select(dim, index))
            for name, values in rows.items():
                axis = axis_of(values)
                held[name].index_copy_(axis, fresh, values.index_select(axis, index))
            update.reset(fresh, dim)

        for turn in range(run.stride):
            grad, target_prob, logits = gradient(point, held)
            prob = torch.where(active, target_prob, prob)
            if turn == 0 and len(taken):
                result.target_prob_initial[row[fresh]] = prob[fresh]
            if run.on_step is not None and logits is not None:
                seen = active.nonzero().squeeze(1)
                if len(seen):
                    run.on_step(steps[seen], row[seen], point.index_select(dim, seen), prob[seen], logits[:, seen])
            moved = update(point, grad, steps, lane)
            if run.bounds is not None:
                moved.clamp_(*run.bounds)
            # Zero times a sum is zero, or NaN where the next point is not finite; NaN is <= nothing.
            active &= torch.add(prob, moved.sum(others), alpha=0) <= limit.take(steps)
            point = torch.where(active.view(lane), moved, point)
            steps += active

        free = (~active & (row >= 0)).nonzero().squeeze(1)
        if len(free):
            occupied -= len(free)
            index, final, applied = row[free], prob[free], steps[free]
            result.point.index_copy_(dim, index, point.index_select(dim, free))
            result.steps[index], result.target_prob_final[index] = applied.int(), final
            result.converged[index] = final > config.min_target_prob
            # A row ends because it got there, because its updates are spent, or because a number was not finite.
            result.finite[index] = final > limit[applied]
            row[free] = -1
        if occupied + len(free) < run.slots:
            free = (row < 0).nonzero().squeeze(1)


# ---- engines ---------------------------------------------------------------------------------------------------------


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

    A slot is a column, so that elementwise work runs along the slots and each layer of all members is one product
    (M, out, in) x (M, in, S); the sum over the members' gradients is part of the last product.
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
        slope = probs.sub_(rows["target_is"])
        for index in range(len(weights) - 1, 0, -1):
            slope = torch.bmm(weights[index], slope, out=slopes[index - 1])
            mask_(slope, hidden[index - 1], 0, grad_input=slope)
        pull = (point - rows["reference"]).sign_()
        grad = torch.addmm(pull, first_back, slope.view(-1, slots), beta=objective.distance_weight, alpha=1 / members)
        return grad, target_prob, None

    return gradient


def _plain(objective: Objective, start: Tensor, rows: Rows, config: SearchConfig, run: _Run) -> Counterfactuals:
    """Autograd through any objective, on any device: what the other engines must agree with."""
    return _search(lambda _: _autograd(objective), start, rows, config, run)


def _batched(objective: Objective, start: Tensor, rows: Rows, config: SearchConfig, run: _Run) -> Counterfactuals:
    """Analytic gradients of a LatentObjective in PyTorch, on any device."""
    assert isinstance(objective, LatentObjective)
    classes = torch.arange(objective.layers[-1][0].shape[2], device=start.device)
    columns = {
        "target_is": (classes.unsqueeze(1) == rows["target"]).to(start.dtype),
        "reference": rows["reference"].t().contiguous(),
    }
    run = replace(run, dim=1, stride=max(4, run.stride))
    result = _search(lambda slots: _analytic(objective, slots), start.t().contiguous(), columns, config, run)
    result.point = result.point.t().contiguous()
    return result


def _native(objective: Objective, start: Tensor, rows: Rows, config: SearchConfig, run: _Run) -> Counterfactuals:
    """The compiled search of a LatentObjective, on a CPU."""
    assert isinstance(objective, LatentObjective)
    found = kernels.native_search(objective.layers, start, rows["reference"], rows["target"], config, run.workers)
    return _from_kernel(found, config, run)


def _triton(objective: Objective, start: Tensor, rows: Rows, config: SearchConfig, run: _Run) -> Counterfactuals:
    """The fused search of a LatentObjective, on a GPU."""
    assert isinstance(objective, LatentObjective)
    found = kernels.triton_search(objective.layers, start, rows["reference"], rows["target"], config, run.workers)
    return _from_kernel(found, config, run)


def _from_kernel(found: Mapping[str, Tensor], config: SearchConfig, run: _Run) -> Counterfactuals:
    final, finite = found["target_prob_final"], found["finite"].bool()
    converged = (final > config.min_target_prob) & finite
    return Counterfactuals(
        found["point"], found["steps"].int(), converged, found["target_prob_initial"], final, finite, run.engine
    )


#: Engines, slowest first. All but plain need a LatentObjective, Adam, no bounds and no ``on_step``.
ENGINES: dict[str, Callable[[Objective, Tensor, Rows, SearchConfig, _Run], Counterfactuals]] = {
    "plain": _plain,
    "batched": _batched,
    "native": _native,
    "triton": _triton,
}


def descend(
    objective: Objective,
    start: Tensor,
    rows: Rows,
    config: SearchConfig,
    update: str = "adam",
    *,
    bounds: tuple[float, float] | None = None,
    slots: int | None = None,
    on_step: OnStep | None = None,
    engine: str = "auto",
    threads: int | None = None,
) -> Counterfactuals:
    """Algorithm 1: from each row of ``start``, descend until its target probability exceeds ``min_target_prob``.

    At most ``max_steps`` updates; the probability is tested before each and once after the last. A row's result depends
    on the row alone: on a CPU its bits are the same alone, shuffled, among strangers and on any number of threads,
    within one engine.

    Args:
        objective: (point (B, ...), rows) -> (loss (B,), target_prob (B,), logits (M, B, K)), each row by itself.
        start: (B, ...) float32.
        rows: tensors of B rows each, handed to the objective in step with the points.
        config: when to stop and how to step.
        update: a key of ``UPDATES``.
        bounds: what each updated point is clamped to: (0, 1) for pixels.
        slots: rows computed together; on a CPU part of the arithmetic, so give a constant, and one with which the
            tensors of a block fill runs of 32 numbers. None: the module's own.
        on_step: called at each evaluation with (steps (b,), indices (b,), point (b, ...), target_prob (b,), logits
            (M, b, K)) of the rows still searching, by the plain engine.
        engine: a key of ``ENGINES``; auto takes the fastest that fits.
        threads: CPU threads; None takes torch's number.

    Raises:
        ValueError: an argument that does not fit. Nothing raises for a row: see ``Counterfactuals.finite``.
    """
    if update not in UPDATES:
        raise ValueError(f"unknown update {update!r}; choose from {', '.join(UPDATES)}")
    if start.dim() < 2 or start.dtype != torch.float32:
        raise ValueError(f"start: expected float32 (B, ...), got {start.dtype} {tuple(start.shape)}")
    for name, values in rows.items():
        if values.shape[:1] != start.shape[:1] or values.device != start.device:
            raise ValueError(
                f"rows[{name!r}]: expected {len(start)} rows on {start.device}, "
                f"got shape {tuple(values.shape)} on {values.device}"
            )
    if threads is not None and threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    if isinstance(objective, LatentObjective):
        _check_latent(objective, start, rows)
    fits = isinstance(objective, LatentObjective) and update == "adam" and bounds is None
    # Only the plain engine stops at each step to show it.
    wanted = "plain" if on_step is not None and engine in ENGINES else engine
    chosen = _chosen(wanted, objective, fits and on_step is None, start.device.type)

    on_cpu = start.device.type == "cpu"
    with one_thread() as torch_threads:
        run = _Run(
            engine=chosen,
            update=update,
            bounds=bounds,
            on_step=on_step,
            workers=(threads or torch_threads) if on_cpu and on_step is None else 1,
            slots=(slots or SLOTS) if on_cpu else max(1, min(slots or DEVICE_SLOTS, len(start))),
            stride=1 if on_cpu or on_step is not None else 8,
        )
        return ENGINES[chosen](objective, start.detach(), rows, config, run)


def _chosen(engine: str, objective: Objective, fits: bool, device: str) -> str:
    """The engine to use; ``fits`` tells whether those that need a LatentObjective could."""
    if engine != "auto" and engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; choose from auto, {', '.join(ENGINES)}")
    if engine == "plain" or (engine == "auto" and not fits):
        return "plain"
    if not fits or not isinstance(objective, LatentObjective):
        raise ValueError(f"engine {engine} searches over latent classifiers only; use auto or plain for this method")
    if engine == "auto":
        return next((name for name in ("triton", "native") if not _missing(name, objective, device)), "batched")
    missing = _missing(engine, objective, device)
    if missing:
        raise ValueError(f"engine {engine} {missing}; use auto, batched or plain")
    return engine


def _missing(engine: str, objective: LatentObjective, device: str) -> str:
    """What an engine lacks to search with these classifiers on this device; empty when nothing."""
    if engine == "native":
        if device != "cpu":
            return f"runs on a CPU, not on {device}"
        return "" if kernels.native_available() else "is not built here (pip install . with a C++ compiler builds it)"
    if engine == "triton":
        if device != "cuda":
            return f"runs on a CUDA GPU, not on {device}"
        if not kernels.triton_available():
            return "needs the package triton"
        return kernels.triton_refusal(objective.layers)
    return ""


def _check_latent(objective: LatentObjective, start: Tensor, rows: Rows) -> None:
    """Raise ValueError when codes, rows and stacked layers do not go together."""
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
