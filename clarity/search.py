"""Algorithm 1: counterfactual search over many rows at once, each row independent of the others.

A row is one (image, target) pair. Rows occupy the slots of a block of fixed size; a row that ends leaves its slot to
the next one waiting, and no operation mixes slots, so that a row's result depends on the row alone. Knows points,
objectives, update rules and engines. Does not know images, VAEs or methods: these are in the objective.
"""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from clarity import native_search, triton_search
from clarity.objectives import (
    Gradient,
    LatentObjective,
    Objective,
    Rows,
    analytic_gradient,
    as_columns,
    autograd_gradient,
    in_columns,
    require_latent,
)
from clarity.refine import refine
from clarity.rows import float32_convolutions, one_thread
from clarity.updates import Adam, Jsma

#: Slots of a block on a CPU. Part of the arithmetic and never tuned, since libraries choose kernels by shape. It is a
#: multiple of 32: torch computes the remainder after a tensor's last run of 32 numbers by other instructions.
SLOTS = 128
#: The most slots of a block on other devices, where a row's bits may depend on the batch.
DEVICE_SLOTS = 16384
#: Numbers of a layer of all members in such a block, at the most.
DEVICE_NUMBERS = 1 << 28

OnStep = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class SearchConfig:
    """Parameters of a search; the defaults are the paper's (Sections 2 and 5) where it states them.

    Args:
        min_target_prob: mean probability of the target to exceed, gamma of the paper.
        max_steps: maximum number of updates, N of the paper.
        distance_weight: weight of the L1 distance, lambda of the paper.
        learning_rate: Adam's learning rate; the paper gives none.
        step_size: change of a pixel in one step of the method schut, delta of the paper.
        refine: after the search, shrink each change as far as the target's probability allows.
    """

    min_target_prob: float = 0.99
    max_steps: int = 500
    distance_weight: float = 0.001
    learning_rate: float = 0.05
    step_size: float = 0.2
    refine: bool = False

    def __post_init__(self) -> None:
        def require(name: str, fits: bool, expected: str) -> None:
            if not fits:
                raise ValueError(f"SearchConfig.{name}: expected {expected}, got {getattr(self, name)!r}")

        require("refine", isinstance(self.refine, bool), "True or False")
        for field in fields(self):
            if field.name == "refine":
                continue
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
    """Results of a search."""

    point: Tensor  # (B, ...) float32, the last point of each row
    steps: Tensor  # (B,) int32, updates applied; 0 when the start already satisfies
    converged: Tensor  # (B,) bool, whether ``target_prob_final`` exceeds min_target_prob in float32
    target_prob_initial: Tensor  # (B,), mean target probability at the start
    target_prob_final: Tensor  # (B,), the same at the point
    #: (B,) bool. False: the target probability, or the next point, was no finite number; the row ended, not converged
    finite: Tensor
    engine: str  # the engine that searched

    def __len__(self) -> int:
        return len(self.steps)


#: Update rules by name: each makes one for the points of a block.
UPDATES: dict[str, Callable[[Tensor, SearchConfig], Adam | Jsma]] = {
    "adam": lambda point, config: Adam(point, config.learning_rate, config.max_steps),
    "jsma": lambda point, config: Jsma(point, config.step_size),
}


@dataclass(frozen=True)
class Run:
    """How a search is executed. Rows lie along axis ``dim`` of points and of the tensors that go with them."""

    engine: str
    update: str
    bounds: tuple[float, float] | None
    fixed: Tensor | None
    on_step: OnStep | None
    workers: int
    slots: int
    stride: int
    dim: int = 0

    def project(self, step: Tensor) -> Tensor:
        """The steps of a block without their parts along the fixed directions."""
        if self.fixed is None:
            return step
        if self.dim:
            return step - self.fixed @ (self.fixed.t() @ step)
        return step - (step @ self.fixed) @ self.fixed.t()


class Queue:
    """Hands out row numbers in order; the only state that workers share."""

    def __init__(self, total: int) -> None:
        self.total, self.next, self.lock = total, 0, threading.Lock()

    def take(self, count: int) -> range:
        """The next rows, at most ``count``."""
        with self.lock:
            first, self.next = self.next, min(self.next + count, self.total)
            return range(first, self.next)


def search_rows(
    make_gradient: Callable[[int], Gradient], start: Tensor, rows: Rows, config: SearchConfig, run: Run
) -> Counterfactuals:
    """Algorithm 1 for all rows.

    On a CPU each worker is a thread with a block of its own, and each operation runs on its worker's thread alone: the
    number of threads changes no bit, and no thread waits for another at the end of every small operation.
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
    queue = Queue(total)

    def work() -> None:
        with torch.no_grad():
            search_block(make_gradient(run.slots), start, rows, config, run, queue, result)

    in_threads(work, min(run.workers, math.ceil(total / run.slots)))
    return result


def in_threads(work: Callable[[], None], workers: int) -> None:
    """Run ``work`` in so many threads at once, each with torch on one thread; in this thread for one."""
    if workers <= 1:
        work()
        return
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done in [pool.submit(work) for _ in range(workers)]:
            done.result()


def search_block(
    gradient: Gradient, start: Tensor, rows: Rows, config: SearchConfig, run: Run, queue: Queue, result: Counterfactuals
) -> None:
    """Search in one block until the queue is empty and every slot has ended.

    Every ``stride`` evaluations the rows that have ended are written to the result and the next ones take their slots;
    until then an ended row stands still. So ``stride`` changes no result, only how often the host waits for the device.
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
            if run.fixed is not None:
                moved = point + run.project(moved - point)
            if run.bounds is not None:
                moved.clamp_(*run.bounds)
            # What a row must exceed to end; after its last update anything does.
            limit = held["min_target_prob"].masked_fill(steps >= config.max_steps, -1)
            # Zero times a sum is zero, or NaN where the next point is not finite; NaN is <= nothing.
            active &= torch.add(prob, moved.sum(others), alpha=0) <= limit
            point = torch.where(active.view(lane), moved, point)
            steps += active

        free = (~active & (row >= 0)).nonzero().squeeze(1)
        if len(free):
            occupied -= len(free)
            index, final, applied = row[free], prob[free], steps[free]
            limit = held["min_target_prob"][free]
            result.point.index_copy_(dim, index, point.index_select(dim, free))
            result.steps[index], result.target_prob_final[index] = applied.int(), final
            result.converged[index] = final > limit
            # A row ends because it satisfies, because its updates are spent, or because a number was not finite.
            result.finite[index] = final > limit.masked_fill(applied >= config.max_steps, -1)
            row[free] = -1
        if occupied + len(free) < run.slots:
            free = (row < 0).nonzero().squeeze(1)


def plain_search(objective: Objective, start: Tensor, rows: Rows, config: SearchConfig, run: Run) -> Counterfactuals:
    """Autograd through any objective, on any device: the reference for all other engines."""
    return search_rows(lambda _: autograd_gradient(objective), start, rows, config, run)


def batched_search(objective: Objective, start: Tensor, rows: Rows, config: SearchConfig, run: Run) -> Counterfactuals:
    """Analytic gradients of a LatentObjective in PyTorch, on any device."""
    assert isinstance(objective, LatentObjective)
    run = replace(run, dim=1, stride=max(4, run.stride))
    make_gradient = partial(analytic_gradient, objective)
    result = search_rows(make_gradient, start.t().contiguous(), as_columns(objective, rows), config, run)
    result.point = result.point.t().contiguous()
    return result


def fused_search(objective: Objective, start: Tensor, rows: Rows, config: SearchConfig, run: Run) -> Counterfactuals:
    """The compiled search of a LatentObjective on a CPU, or the Triton kernel on a GPU."""
    assert isinstance(objective, LatentObjective)
    given = objective, start, rows, config.max_steps, config.learning_rate
    if run.engine == "triton":
        found = triton_search.search(*given)
    else:
        found = native_search.search(*given, run.workers, run.engine.removeprefix("native-"))
    final, finite = found["target_prob_final"], found["finite"]
    return Counterfactuals(**found, converged=(final > rows["min_target_prob"]) & finite, engine=run.engine)


Search = Callable[[Objective, Tensor, Rows, SearchConfig, Run], Counterfactuals]

#: Engines by name, fastest first. All but plain need a LatentObjective, Adam, no bounds and no ``on_step``. A compiled
#: engine is named by its build, since builds round differently: a row has the same bits wherever one build runs.
ENGINES: dict[str, Search] = {
    "triton": fused_search,
    **{f"native-{build}": fused_search for build in native_search.BUILDS},
    "batched": batched_search,
    "plain": plain_search,
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
    on the row alone: on a CPU its bits are the same alone, shuffled, among other rows and on any number of threads,
    within one engine.

    An objective may have an attribute ``fixed``, (D, k) orthonormal directions: each update, after the update rule,
    loses its part along them. Where ``config.refine`` is set, each converged result is then moved towards the row's
    ``reference`` (by default its start), see ``refine.refine``.

    Args:
        objective: (point (B, ...), rows) -> (loss (B,), target_prob (B,), logits (M, B, K)), each row by itself.
        start: (B, ...) float32.
        rows: tensors of B rows each, passed to the objective with the points; ``min_target_prob`` (B,) is a threshold
            for each row, by default the config's.
        config: when to stop and how to step.
        update: a key of ``UPDATES``.
        bounds: to which each updated point is clamped: (0, 1) for pixels.
        slots: rows computed together, by default those of this module. Part of the arithmetic on a CPU: give a
            constant with which a block's tensors fill runs of 32 numbers.
        on_step: called at each evaluation with (steps (b,), indices (b,), point (b, ...), target_prob (b,), logits
            (M, b, K)) of the rows still searching, by the plain engine.
        engine: a key of ``ENGINES``; auto takes the fastest that fits.
        threads: CPU threads; None takes torch's number.

    Raises:
        ValueError: an argument does not fit. Nothing raises for a single row: see ``Counterfactuals.finite``.
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
    if "min_target_prob" not in rows:
        rows = {**rows, "min_target_prob": torch.full((len(start),), config.min_target_prob, device=start.device)}
    require_thresholds(rows["min_target_prob"])
    if isinstance(objective, LatentObjective):
        require_latent(objective, start, rows)
    fixed = require_fixed(getattr(objective, "fixed", None), start)
    fits = isinstance(objective, LatentObjective) and update == "adam" and bounds is None
    # Only the plain engine reports each step.
    wanted = "plain" if on_step is not None and engine in ENGINES else engine
    chosen = choose_engine(wanted, objective, fits and on_step is None, start.device.type)

    on_cpu = start.device.type == "cpu"
    with one_thread() as torch_threads, float32_convolutions():
        run = Run(
            engine=chosen,
            update=update,
            bounds=bounds,
            fixed=fixed,
            on_step=on_step,
            workers=(threads or torch_threads) if on_cpu and on_step is None else 1,
            slots=(slots or SLOTS) if on_cpu else max(1, min(slots or device_slots(objective), len(start))),
            stride=1 if on_cpu or on_step is not None else 8,
        )
        found = ENGINES[chosen](objective, start.detach(), rows, config, run)
        return refined(found, objective, start.detach(), rows, config, run) if config.refine else found


def device_slots(objective: Objective) -> int:
    """Slots of a block on a GPU: fewer where many members tell many classes apart, so that a layer takes up to 1 GB."""
    if not isinstance(objective, LatentObjective):
        return DEVICE_SLOTS
    widest = max(weight.shape[0] * weight.shape[2] for weight, _ in objective.layers)
    return min(DEVICE_SLOTS, max(1, DEVICE_NUMBERS // widest))


def refined(
    found: Counterfactuals, objective: Objective, start: Tensor, rows: Rows, config: SearchConfig, run: Run
) -> Counterfactuals:
    """The result with each converged row moved towards its reference."""
    chosen = found.converged.nonzero().squeeze(1)
    if not len(chosen):
        return found
    shape = (-1, *start.shape[1:])
    some = {name: values[chosen] for name, values in rows.items()}

    def evaluate(points: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        part = {name: values[index] for name, values in some.items()}
        prob, grad = value_and_grad(objective, points.view(shape), part, run)
        return prob, grad.flatten(1)

    point, prob = refine(
        evaluate,
        found.point[chosen].flatten(1),
        rows.get("reference", start)[chosen].flatten(1),
        some["min_target_prob"],
        config.learning_rate,
        run.fixed,
        run.bounds,
    )
    found.point[chosen] = point.view(shape)
    found.target_prob_final[chosen] = torch.where(prob > some["min_target_prob"], prob, found.target_prob_final[chosen])
    return found


def value_and_grad(objective: Objective, points: Tensor, rows: Rows, run: Run) -> tuple[Tensor, Tensor]:
    """Target probability (B,) at points (B, ...) and its gradient (B, ...), by the engine of a run, row by row."""
    if run.engine.startswith("native-") and isinstance(objective, LatentObjective):
        build = run.engine.removeprefix("native-")
        return native_search.value_and_grad(objective.layers, points, rows["target"], run.workers, build)
    prob, grad = points.new_empty(len(points)), torch.empty_like(points)
    total, queue = len(points), Queue(len(points))
    if run.engine != "plain" and isinstance(objective, LatentObjective):
        make_evaluate = partial(in_columns, objective, run.slots)
    else:
        make_evaluate = partial(autograd_gradient, objective, "target_prob")

    def work() -> None:
        evaluate = make_evaluate()
        while taken := queue.take(run.slots):
            # Blocks of one shape, the last one filled up with its last row.
            index = torch.arange(taken.start, taken.start + run.slots, device=points.device).clamp_(max=total - 1)
            slope, value, _ = evaluate(points[index], {name: values[index] for name, values in rows.items()})
            grad[taken.start : taken.stop], prob[taken.start : taken.stop] = slope[: len(taken)], value[: len(taken)]

    with torch.no_grad():
        in_threads(work, min(run.workers, math.ceil(total / run.slots)))
    return prob, grad


def cpu_engines() -> list[str]:
    """The engines that can search over latent classifiers on this machine's CPU, fastest first."""
    return [*(f"native-{build}" for build in native_search.modules()), "batched", "plain"]


def choose_engine(engine: str, objective: Objective, fits: bool, device: str) -> str:
    """The engine to use; ``fits`` tells whether one for latent classifiers could."""
    if engine != "auto" and engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; choose from auto, {', '.join(ENGINES)}")
    if engine == "plain" or (engine == "auto" and not fits):
        return "plain"
    if not fits or not isinstance(objective, LatentObjective):
        raise ValueError(f"engine {engine} searches over latent classifiers only; use auto or plain for this method")
    if engine == "auto":
        return next(name for name in ENGINES if not why_not(name, objective, device))
    missing = why_not(engine, objective, device)
    if missing:
        raise ValueError(f"engine {engine} {missing}; use auto, batched or plain")
    return engine


def why_not(engine: str, objective: LatentObjective, device: str) -> str:
    """Why an engine cannot search with these classifiers on this device; empty where it can."""
    if engine.startswith("native-"):
        if device != "cpu":
            return f"runs on a CPU, not on {device}"
        return native_search.refusal(engine.removeprefix("native-"))
    if engine == "triton":
        if device != "cuda":
            return f"runs on a CUDA GPU, not on {device}"
        return triton_search.refusal(objective.layers)
    return ""


def require_thresholds(values: Tensor) -> None:
    """Raise ValueError unless each row's threshold is a float32 between 0 and 1."""
    if values.dtype != torch.float32 or values.dim() != 1:
        raise ValueError(f"rows['min_target_prob']: expected float32 (B,), got {values.dtype} {tuple(values.shape)}")
    if len(values) and not bool(((values > 0) & (values < 1)).all()):
        raise ValueError("rows['min_target_prob']: expected more than 0 and less than 1 for each row")


def require_fixed(fixed: Tensor | None, start: Tensor) -> Tensor | None:
    """The directions, or None where there are none; raises ValueError unless they are orthonormal and fit the start."""
    if fixed is None or fixed.shape[1:] == (0,):
        return None
    if start.dim() != 2 or fixed.dim() != 2 or len(fixed) != start.shape[1] or fixed.device != start.device:
        raise ValueError(
            f"fixed: expected directions ({start.shape[1]}, k) on {start.device} for codes, "
            f"got {tuple(fixed.shape)} on {fixed.device} for points {tuple(start.shape)}"
        )
    off = (fixed.t() @ fixed - torch.eye(fixed.shape[1], device=fixed.device)).abs().max()
    if fixed.dtype != torch.float32 or not off <= 1e-4:
        raise ValueError("fixed: expected orthonormal columns of float32, such as Q of torch.linalg.qr")
    return fixed
