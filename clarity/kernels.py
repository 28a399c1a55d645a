"""Fast implementations of Algorithm 1 over stacked latent classifiers: compiled for CPUs, in Triton for CUDA.

Both do what ``search.descend`` specifies: the target probability (mean over the members, float32) is tested before
each update and once after the last, each row by itself. Does not choose an engine.

Layers are (weight (M, in, out), bias (M, out)), with a ReLU between two.
"""

# ruff: noqa: RUF005 - Triton's compiler joins tuples with +, it knows no unpacking
import functools
import importlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, no_type_check

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clarity.objectives import LatentObjective, Rows

try:
    import triton
    import triton.language as tl
except ImportError:  # where torch comes without it
    triton = None

Layers = Sequence[tuple[Tensor, Tensor]]

#: The builds of native/search.cpp by instruction set, fastest first.
BUILDS = ("avx512", "avx2", "base")


def import_build(build: str) -> ModuleType | None:
    """The compiled module of a build, or None where it is not installed."""
    try:
        return importlib.import_module(f"_clarity_engine_{build}")
    except ImportError:
        return None


@functools.cache
def native_modules() -> dict[str, ModuleType]:
    """The compiled modules that are installed and that this processor can run, by build, fastest first."""
    # The base build asks the processor: any other could crash the process at its first instruction.
    base = import_build("base")
    found = {build: import_build(build) for build in base.builds()} if base is not None else {}
    return {build: module for build, module in found.items() if module is not None}


def native_module(build: str) -> ModuleType:
    """The compiled module of a build; raises ValueError where it cannot run."""
    modules = native_modules()
    if build not in modules:
        have = f"this machine runs {', '.join(modules)}" if modules else "pip install . with a C++ compiler builds it"
        raise ValueError(f"build {build!r} of the native search is not available; {have}")
    return modules[build]


def native_search(
    objective: LatentObjective,
    start: Tensor,
    rows: Rows,
    max_steps: int,
    learning_rate: float,
    threads: int,
    build: str,
) -> dict[str, Tensor]:
    """Search in compiled code, on ``threads`` threads of its own and without the GIL.

    A row's bits depend on the row, the objective, the two parameters and the build alone. ``rows`` are target (B,)
    int64, reference (B, D) and min_target_prob (B,), which each row must exceed.

    Returns:
        point (B, D), steps (B,) int32, target_prob_initial and target_prob_final (B,), finite (B,) bool: False where
        the probability or the next update was not a finite number; such a row ends at its last finite point.

    Raises:
        ValueError: shapes do not agree, or the build cannot run here.
    """
    found = {
        "point": np.empty(tuple(start.shape), np.float32),
        "steps": np.empty(len(start), np.int32),
        "target_prob_initial": np.empty(len(start), np.float32),
        "target_prob_final": np.empty(len(start), np.float32),
        "finite": np.empty(len(start), np.bool_),
    }
    native_module(build).search(
        weights=[as_array(weight) for weight, _ in objective.layers],
        biases=[as_array(bias) for _, bias in objective.layers],
        start=as_array(start),
        reference=as_array(rows["reference"]),
        target=as_array(rows["target"], torch.int64),
        min_target_prob=as_array(rows["min_target_prob"]),
        fixed=as_array(directions_of(objective, start)),
        **found,
        max_steps=max_steps,
        distance_weight=objective.distance_weight,
        learning_rate=learning_rate,
        threads=threads,
    )
    return {name: torch.from_numpy(values) for name, values in found.items()}


def directions_of(objective: LatentObjective, start: Tensor) -> Tensor:
    """The objective's fixed directions as (k, D), with k = 0 for none."""
    return start.new_zeros(0, start.shape[1]) if objective.fixed is None else objective.fixed.t()


def native_value_and_grad(
    layers: Layers, points: Tensor, target: Tensor, threads: int, build: str
) -> tuple[Tensor, Tensor]:
    """Mean target probability (B,) of codes (B, D) and its gradient (B, D), computed as in ``native_search``."""
    target_prob, gradient = np.empty(len(points), np.float32), np.empty(tuple(points.shape), np.float32)
    native_module(build).value_and_grad(
        weights=[as_array(weight) for weight, _ in layers],
        biases=[as_array(bias) for _, bias in layers],
        points=as_array(points),
        target=as_array(target, torch.int64),
        target_prob=target_prob,
        gradient=gradient,
        threads=threads,
    )
    return torch.from_numpy(target_prob), torch.from_numpy(gradient)


def as_array(values: Tensor, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """A contiguous array of this type; shares the memory of a tensor that is one already."""
    return values.detach().to("cpu", dtype).contiguous().numpy()


#: The largest sizes that the Triton kernel holds.
MOST_LATENT, MOST_WIDTH, MOST_CLASSES = 512, 64, 100


def triton_available() -> bool:
    """Whether the package triton is installed."""
    return triton is not None


def triton_refusal(layers: Layers) -> str:
    """Why the Triton kernel cannot hold these classifiers; empty when it can."""
    latent, classes = layers[0][0].shape[1], layers[-1][0].shape[2]
    width = max((weight.shape[2] for weight, _ in layers[:-1]), default=0)
    if latent <= MOST_LATENT and width <= MOST_WIDTH and classes <= MOST_CLASSES:
        return ""
    return (
        f"holds codes up to {MOST_LATENT}, widths up to {MOST_WIDTH} and {MOST_CLASSES} classes, "
        f"got {latent}, {width} and {classes}"
    )


def jit(function: Any) -> Any:
    """``triton.jit`` where Triton is installed."""
    return function if triton is None else triton.jit(function)


@jit
@no_type_check
def prob_and_slope(hidden, weights, biases, aim, LAYER: tl.constexpr, DEPTH: tl.constexpr, HP: tl.constexpr,
                   KP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The target's probability of one member, and the gradient of its cross-entropy by ``hidden``.

    ``hidden`` (BLOCK, HP or KP) are the outputs of layer LAYER before its ReLU; ``weights`` and ``biases`` point to
    those of layer LAYER + 1; ``aim`` (BLOCK, KP) is 1 at the target.
    """
    if LAYER == DEPTH - 1:
        power = tl.exp(hidden - tl.max(hidden, axis=1)[:, None])
        probs = power / tl.sum(power, axis=1)[:, None]
        prob = tl.sum(probs * aim, axis=1)
        slope = probs - aim
    else:
        columns: tl.constexpr = KP if LAYER == DEPTH - 2 else HP
        column = tl.arange(0, columns)
        weight = tl.load(weights + tl.arange(0, HP)[:, None] * columns + column[None, :])
        active = tl.where(hidden < 0, 0.0, hidden)  # NaN stays
        above = tl.dot(active, weight, input_precision=PRECISION) + tl.load(biases + column)[None, :]
        prob, slope = prob_and_slope(
            above, weights + HP * columns, biases + columns, aim, LAYER + 1, DEPTH, HP, KP, PRECISION
        )
        slope = tl.dot(slope, tl.trans(weight), input_precision=PRECISION)
        slope = tl.where(hidden > 0, slope, 0.0)
    return prob, slope


@jit
@no_type_check
def search_kernel(weights, biases, start, reference, target, min_target_prob, fixed, rates, roots, point, steps_out,
                  initial_out, final_out, finite_out, counter, total, max_steps, corrections, distance_weight,
                  MEMBERS: tl.constexpr, DIRECTIONS: tl.constexpr,
                  D: tl.constexpr, SIZE: tl.constexpr, BIASES: tl.constexpr, DEPTH: tl.constexpr, TILES: tl.constexpr,
                  TILE: tl.constexpr, HP: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Algorithm 1 for BLOCK searches at a time; a lane whose search has ended takes the next row from ``counter``.

    Codes are held as TILES tensors (BLOCK, TILE), so that each product fits into shared memory. SIZE and BIASES are the
    numbers of weights and biases of one member.
    """
    FIRST: tl.constexpr = KP if DEPTH == 1 else HP
    lane = tl.arange(0, BLOCK)
    unit = tl.arange(0, TILE)
    column = tl.arange(0, FIRST)
    corner = unit[:, None] * FIRST + column[None, :]
    nothing = tl.zeros((BLOCK, TILE), tl.float32)
    z, origin, mean, square = (nothing,), (nothing,), (nothing,), (nothing,)
    for _ in tl.static_range(1, TILES):
        z, origin, mean, square = z + (nothing,), origin + (nothing,), mean + (nothing,), square + (nothing,)
    aim = tl.zeros((BLOCK, KP), tl.float32)
    limit = tl.zeros((BLOCK,), tl.float32)
    steps = tl.zeros((BLOCK,), tl.int32)
    row = tl.zeros((BLOCK,), tl.int64) - 1
    ended = lane >= 0
    empty = BLOCK
    alive = 1
    while alive > 0:
        if empty > 0:
            taken = tl.atomic_add(counter, empty, sem="relaxed") + tl.cumsum(ended.to(tl.int32), axis=0) - 1
            row = tl.where(ended, tl.where(taken < total, taken.to(tl.int64), -1), row)
            fresh = ended & (row >= 0)
            old = ended[:, None]
            z_next, origin_next, mean_next, square_next = (), (), (), ()
            for t in tl.static_range(TILES):
                at = row[:, None] * D + (t * TILE + unit)[None, :]
                mask = fresh[:, None] & (t * TILE + unit < D)[None, :]
                z_next = z_next + (tl.where(old, tl.load(start + at, mask=mask, other=0.0), z[t]),)
                origin_next = origin_next + (tl.where(old, tl.load(reference + at, mask=mask, other=0.0), origin[t]),)
                mean_next = mean_next + (tl.where(old, 0.0, mean[t]),)
                square_next = square_next + (tl.where(old, 0.0, square[t]),)
            z, origin, mean, square = z_next, origin_next, mean_next, square_next
            wanted = tl.load(target + row, mask=fresh, other=0)
            aim = tl.where(old, (wanted[:, None] == tl.arange(0, KP)[None, :]).to(tl.float32), aim)
            limit = tl.where(ended, tl.load(min_target_prob + row, mask=fresh, other=1.0), limit)
            steps = tl.where(ended, 0, steps)
        busy = row >= 0
        alive = tl.sum(busy.to(tl.int32), axis=0)

        prob = tl.zeros((BLOCK,), tl.float32)
        grad = (nothing,)
        for _ in tl.static_range(1, TILES):
            grad = grad + (nothing,)
        for member in range(MEMBERS):
            own = weights + member * SIZE
            own_biases = biases + member * BIASES
            hidden = tl.zeros((BLOCK, FIRST), tl.float32) + tl.load(own_biases + column)[None, :]
            for t in tl.static_range(TILES):
                hidden = tl.dot(z[t], tl.load(own + t * TILE * FIRST + corner), hidden, input_precision=PRECISION)
            p, slope = prob_and_slope(
                hidden, own + TILES * TILE * FIRST, own_biases + FIRST, aim, 0, DEPTH, HP, KP, PRECISION
            )
            prob += p
            grad_next = ()
            for t in tl.static_range(TILES):
                back = tl.trans(tl.load(own + t * TILE * FIRST + corner))
                grad_next = grad_next + (tl.dot(slope, back, grad[t], input_precision=PRECISION),)
            grad = grad_next
        prob = prob / MEMBERS

        corrected = tl.minimum(steps, corrections - 1)
        rate = tl.load(rates + corrected)[:, None]
        root = tl.load(roots + corrected)[:, None]
        moved, mean_next, square_next = (), (), ()
        for t in tl.static_range(TILES):
            away = z[t] - origin[t]
            pull = distance_weight * ((away > 0).to(tl.float32) - (away < 0).to(tl.float32))
            slope = grad[t] / MEMBERS + pull
            first = mean[t] + (slope - mean[t]) * 0.1
            second = square[t] * 0.999 + slope * (0.001 * slope)
            there = z[t] - rate * tl.div_rn(first, tl.sqrt_rn(second) * root + 1e-8)
            moved, mean_next, square_next = moved + (there,), mean_next + (first,), square_next + (second,)
        mean, square = mean_next, square_next
        if DIRECTIONS > 0:
            for j in range(DIRECTIONS):
                along = tl.zeros((BLOCK,), tl.float32)
                for t in tl.static_range(TILES):
                    direction = tl.load(fixed + j * TILES * TILE + t * TILE + unit)[None, :]
                    along += tl.sum((moved[t] - z[t]) * direction, axis=1)
                kept = ()
                for t in tl.static_range(TILES):
                    direction = tl.load(fixed + j * TILES * TILE + t * TILE + unit)[None, :]
                    kept = kept + (moved[t] - along[:, None] * direction,)
                moved = kept
        odd = tl.zeros((BLOCK,), tl.float32)
        for t in tl.static_range(TILES):
            odd += tl.sum(moved[t] * 0.0, axis=1)  # 0, or NaN where a number is infinite or NaN

        known = prob * 0.0 == 0
        over = (prob > limit) | (steps >= max_steps)
        ended = busy & (over | (known == 0) | (odd != 0))
        tl.store(initial_out + row, prob, mask=busy & (steps == 0))
        tl.store(final_out + row, prob, mask=ended)
        tl.store(steps_out + row, steps, mask=ended)
        tl.store(finite_out + row, (known & over).to(tl.int8), mask=ended)
        going = (busy & (ended == 0))[:, None]
        z_next = ()
        for t in tl.static_range(TILES):
            mask = ended[:, None] & (t * TILE + unit < D)[None, :]
            tl.store(point + row[:, None] * D + (t * TILE + unit)[None, :], z[t], mask=mask)
            z_next = z_next + (tl.where(going, moved[t], z[t]),)
        z = z_next
        steps += 1
        empty = tl.sum(ended.to(tl.int32), axis=0)


@dataclass(frozen=True)
class Layout:
    """How the kernel is laid out for one ensemble: the constants of its compilation, and its number of warps."""

    constants: dict[str, Any]
    warps: int

    @staticmethod
    def of(layers: Layers, precision: str, directions: int = 0) -> "Layout":
        """The layout for these layers; raises ValueError for sizes that the kernel does not hold."""

        def padded(size: int) -> int:
            return max(16, 1 << (size - 1).bit_length())

        refusal = triton_refusal(layers)
        if refusal:
            raise ValueError(f"the Triton kernel {refusal}; use engine batched")
        latent, classes = layers[0][0].shape[1], layers[-1][0].shape[2]
        widths = [weight.shape[2] for weight, _ in layers[:-1]]
        dp, hp, kp, depth = padded(latent), padded(max(widths, default=1)), padded(classes), len(layers)
        ins = [dp] + [hp] * (depth - 1)
        outs = [hp] * (depth - 1) + [kp]
        # Five tensors of BLOCK codes live in registers: at most 16 numbers of each in a thread.
        block = 64 if dp <= 32 else 32 if dp <= 128 else 16
        constants = dict(
            MEMBERS=layers[0][0].shape[0], DIRECTIONS=directions,
            D=latent, SIZE=sum(i * o for i, o in zip(ins, outs)), BIASES=sum(outs), DEPTH=depth, TILES=-(-dp // 64),
            TILE=min(dp, 64), HP=hp, KP=kp, BLOCK=block, PRECISION=precision,
        )  # fmt: skip
        return Layout(constants, warps=4 if dp < 128 else 8)

    def pack(self, layers: Layers) -> tuple[Tensor, Tensor]:
        """Weights (M, SIZE) and biases (M, BIASES), padded with zeros; padding classes get probability 0."""
        sizes, depth = self.constants, len(layers)
        weights, biases = [], []
        for index, (weight, bias) in enumerate(layers):
            rows = (sizes["HP"] if index else sizes["TILES"] * sizes["TILE"]) - weight.shape[1]
            last = index == depth - 1
            columns = (sizes["KP"] if last else sizes["HP"]) - weight.shape[2]
            weights.append(functional.pad(weight.float(), (0, columns, 0, rows)).flatten(1))
            biases.append(functional.pad(bias.float(), (0, columns), value=-1e30 if last else 0.0))
        return torch.cat(weights, dim=1).contiguous(), torch.cat(biases, dim=1).contiguous()


def triton_search(
    objective: LatentObjective, start: Tensor, rows: Rows, max_steps: int, learning_rate: float
) -> dict[str, Tensor]:
    """Search in one kernel on a GPU: a block of searches stays on the chip through all members and steps.

    Returns what ``native_search`` returns, on the device of ``start``. Products are tf32x3, whose error is that of
    float32. Raises ValueError for sizes that the kernel does not hold.
    """
    if triton is None:
        raise ValueError("the Triton kernel needs the package triton; use engine batched")
    total, device, directions = len(start), start.device, directions_of(objective, start)
    # Triton's interpreter, which runs on a CPU, has float32 products only.
    layout = Layout.of(objective.layers, "tf32x3" if device.type == "cuda" else "ieee", len(directions))
    found = {
        "point": torch.empty_like(start, memory_format=torch.contiguous_format),
        "steps": torch.zeros(total, dtype=torch.int32, device=device),
        "target_prob_initial": torch.zeros(total, device=device),
        "target_prob_final": torch.zeros(total, device=device),
        "finite": torch.zeros(total, dtype=torch.int8, device=device),
    }
    if total > 2**30:
        raise ValueError(f"start: the Triton kernel takes up to 2**30 rows, got {total}; search in parts")
    if total:
        weights, biases = layout.pack(objective.layers)
        padding = layout.constants["TILES"] * layout.constants["TILE"] - start.shape[1]
        # From about 17,000 updates on the corrections are 1 in float32.
        updates = torch.arange(1, min(max_steps, 20_000) + 2, dtype=torch.float64)
        rates = (learning_rate / (1 - 0.9**updates)).float().to(device)
        roots = (1 - 0.999**updates).rsqrt().float().to(device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        programs = min(-(-total // layout.constants["BLOCK"]), 4 * processors)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            search_kernel[(programs,)](
                weights, biases, start.contiguous(), rows["reference"].contiguous(), rows["target"].contiguous(),
                rows["min_target_prob"].contiguous(), functional.pad(directions.float(), (0, padding)).contiguous(),
                rates, roots, *found.values(), torch.zeros(1, dtype=torch.int32, device=device), total,
                max_steps, len(updates), objective.distance_weight,
                **layout.constants, num_warps=layout.warps,
            )  # fmt: skip
    found["finite"] = found["finite"].bool()
    return found
