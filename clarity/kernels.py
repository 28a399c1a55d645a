"""The doors to the fast searches over stacked latent classifiers: the compiled one for CPUs, the fused one for CUDA.

Both follow Algorithm 1 as ``search.descend`` defines it: the target probability (mean over the members, float32) is
tested before each update and once after the last, each row by itself. Knows tensors and engines; does not choose one.

Shapes: B rows, D latent, K classes, M members; layers are (weight (M, in, out), bias (M, out)), a ReLU between two.
"""

from __future__ import annotations

# ruff: noqa: RUF005 - Triton's compiler joins tuples with +, it knows no unpacking
import functools
import importlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, no_type_check

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

try:
    import triton
    import triton.language as tl
except ImportError:  # where torch comes without it
    triton = None

if TYPE_CHECKING:
    from clarity.search import SearchConfig

Layers = Sequence[tuple[Tensor, Tensor]]


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


# ---- CPU -------------------------------------------------------------------------------------------------------------


def native_levels() -> tuple[str, ...]:
    """The compiled searches that are installed and that this processor can run, fastest first; () where none is."""
    return tuple(_modules())


def native_available() -> bool:
    """Whether the compiled search can run here."""
    return bool(_modules())


@functools.cache
def _modules() -> dict[str, ModuleType]:
    # The plain build asks the processor; another one could stop the process on its first instruction.
    base = _import("base")
    found = {level: _import(level) for level in base.levels()} if base is not None else {}
    return {level: module for level, module in found.items() if module is not None}


def _import(level: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"_clarity_native_{level}")
    except ImportError:
        return None


def native_search(
    layers: Layers,
    start: Tensor,
    reference: Tensor,
    target: Tensor,
    config: SearchConfig,
    threads: int,
    level: str | None = None,
) -> dict[str, Tensor]:
    """Algorithm 1 in the compiled search, on ``threads`` threads of its own; other Python threads run meanwhile.

    start, reference (B, D) float32, target (B,) int64. Returns point (B, D), steps (B,) int32, target_prob_initial and
    target_prob_final (B,), finite (B,) bool: False where the probability or the next update was no finite number; such
    a row ends at its last finite point. ``level`` is one of ``native_levels``; None takes the fastest. A row's bits
    depend on the row, the layers, the config and the level alone. Raises ValueError for shapes that do not fit.
    """
    modules = _modules()
    if not modules:
        raise ValueError("the native search is not built here; pip install . builds it where a C++ compiler is")
    level = level or next(iter(modules))
    if level not in modules:
        raise ValueError(f"unknown level {level!r} of the native search; this machine has {', '.join(modules)}")
    rows, latent = start.shape
    found = {
        "point": np.empty((rows, latent), np.float32),
        "steps": np.empty(rows, np.int32),
        "target_prob_initial": np.empty(rows, np.float32),
        "target_prob_final": np.empty(rows, np.float32),
        "finite": np.empty(rows, np.bool_),
    }
    modules[level].search(
        weights=[_array(weight, torch.float32) for weight, _ in layers],
        biases=[_array(bias, torch.float32) for _, bias in layers],
        start=_array(start, torch.float32),
        reference=_array(reference, torch.float32),
        target=_array(target, torch.int64),
        **found,
        min_target_prob=config.min_target_prob,
        max_steps=config.max_steps,
        distance_weight=config.distance_weight,
        learning_rate=config.learning_rate,
        threads=threads,
    )
    return {name: torch.from_numpy(values) for name, values in found.items()}


def _array(values: Tensor, dtype: torch.dtype) -> np.ndarray:
    return values.detach().to("cpu", dtype).contiguous().numpy()


# ---- CUDA ------------------------------------------------------------------------------------------------------------

MOST_LATENT, MOST_WIDTH, MOST_CLASSES = 512, 64, 100


def triton_available() -> bool:
    """Whether the package triton, in which the fused search is written, is installed."""
    return triton is not None


def triton_refusal(layers: Layers) -> str:
    """Why the fused search cannot hold these classifiers; empty when it can."""
    latent, classes = layers[0][0].shape[1], layers[-1][0].shape[2]
    width = max((weight.shape[2] for weight, _ in layers[:-1]), default=0)
    if latent <= MOST_LATENT and width <= MOST_WIDTH and classes <= MOST_CLASSES:
        return ""
    return (
        f"holds codes up to {MOST_LATENT}, widths up to {MOST_WIDTH} and {MOST_CLASSES} classes, "
        f"got {latent}, {width} and {classes}"
    )


@_jit
@no_type_check
def _logits_and_slope(hidden, weights, biases, aim, LAYER: tl.constexpr, DEPTH: tl.constexpr, HP: tl.constexpr,
                      KP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Layers LAYER + 1 and on of one member, then the way back: the target's probability, and the gradient of the
    cross-entropy by the outputs of layer LAYER before its ReLU, which come as ``hidden`` (BLOCK, HP or KP).

    ``weights`` and ``biases`` point to layer LAYER + 1's; ``aim`` (BLOCK, KP) is 1 at the target.
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
        prob, slope = _logits_and_slope(
            above, weights + HP * columns, biases + columns, aim, LAYER + 1, DEPTH, HP, KP, PRECISION
        )
        slope = tl.dot(slope, tl.trans(weight), input_precision=PRECISION)
        slope = tl.where(hidden > 0, slope, 0.0)
    return prob, slope


@_jit
@no_type_check
def _search_kernel(weights, biases, start, reference, target, rates, roots, point, steps_out, initial_out, final_out,
                   finite_out, counter, total, max_steps, corrections, min_target_prob, distance_weight,
                   MEMBERS: tl.constexpr,
                   D: tl.constexpr, SIZE: tl.constexpr, BIASES: tl.constexpr, DEPTH: tl.constexpr, TILES: tl.constexpr,
                   TILE: tl.constexpr, HP: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """Algorithm 1 for BLOCK searches at a time; a lane whose search has ended takes the next row from ``counter``.

    Codes are held as TILES tensors (BLOCK, TILE), so that no product asks for more shared memory than there is. SIZE
    and BIASES are the numbers of weights and biases of one member.
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
            p, slope = _logits_and_slope(
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
        odd = tl.zeros((BLOCK,), tl.float32)
        moved, mean_next, square_next = (), (), ()
        for t in tl.static_range(TILES):
            away = z[t] - origin[t]
            pull = distance_weight * ((away > 0).to(tl.float32) - (away < 0).to(tl.float32))
            slope = grad[t] / MEMBERS + pull
            first = mean[t] + (slope - mean[t]) * 0.1
            second = square[t] * 0.999 + slope * (0.001 * slope)
            there = z[t] - rate * tl.div_rn(first, tl.sqrt_rn(second) * root + 1e-8)
            odd += tl.sum(there * 0.0, axis=1)  # 0, or NaN where one is infinite or NaN
            moved, mean_next, square_next = moved + (there,), mean_next + (first,), square_next + (second,)
        mean, square = mean_next, square_next

        known = prob * 0.0 == 0
        over = (prob > min_target_prob) | (steps >= max_steps)
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


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


@dataclass(frozen=True)
class _Plan:
    """How the fused search is laid out for one ensemble: constants of its compilation."""

    constants: dict[str, Any]
    warps: int

    @staticmethod
    def of(layers: Layers, precision: str) -> _Plan:
        refusal = triton_refusal(layers)
        if refusal:
            raise ValueError(f"the fused search {refusal}; use engine batched")
        latent, classes = layers[0][0].shape[1], layers[-1][0].shape[2]
        widths = [weight.shape[2] for weight, _ in layers[:-1]]
        dp, hp, kp, depth = _padded(latent), _padded(max(widths, default=1)), _padded(classes), len(layers)
        ins = [dp] + [hp] * (depth - 1)
        outs = [hp] * (depth - 1) + [kp]
        # Five tensors of BLOCK codes live in registers: at most 16 numbers of each in a thread.
        block = 64 if dp <= 32 else 32 if dp <= 128 else 16
        constants = dict(
            MEMBERS=layers[0][0].shape[0],
            D=latent, SIZE=sum(i * o for i, o in zip(ins, outs)), BIASES=sum(outs), DEPTH=depth, TILES=-(-dp // 64),
            TILE=min(dp, 64), HP=hp, KP=kp, BLOCK=block, PRECISION=precision,
        )  # fmt: skip
        return _Plan(constants, warps=4 if dp < 128 else 8)

    def pack(self, layers: Layers) -> tuple[Tensor, Tensor]:
        """Weights (M, SIZE) and biases (M, BIASES), padded with zeros; classes that do not exist get no probability."""
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
    layers: Layers, start: Tensor, reference: Tensor, target: Tensor, config: SearchConfig, threads: int = 1
) -> dict[str, Tensor]:
    """Algorithm 1 in one kernel on a GPU: a block of searches stays on chip through all members and all steps.

    The arguments and results of ``native_search``, on the device of ``start``; ``threads`` is of no use here. Products
    are tf32x3, whose error is that of float32. Raises ValueError for sizes that the kernel does not hold.
    """
    if triton is None:
        raise ValueError("the fused search needs the package triton; use engine batched")
    device, total = start.device, len(start)
    # Triton's interpreter, which runs on the CPU, has float32 products only.
    plan = _Plan.of(layers, "tf32x3" if device.type == "cuda" else "ieee")
    found = {
        "point": torch.empty_like(start, memory_format=torch.contiguous_format),
        "steps": torch.zeros(total, dtype=torch.int32, device=device),
        "target_prob_initial": torch.zeros(total, device=device),
        "target_prob_final": torch.zeros(total, device=device),
        "finite": torch.zeros(total, dtype=torch.int8, device=device),
    }
    if total > 2**30:
        raise ValueError(f"the fused search counts up to 2**30 rows, got {total}; search in parts")
    if total:
        weights, biases = plan.pack(layers)
        # From about 17,000 updates on the corrections are 1 in float32.
        updates = torch.arange(1, min(config.max_steps, 20_000) + 2, dtype=torch.float64)
        rates = (config.learning_rate / (1 - 0.9**updates)).float().to(device)
        roots = (1 - 0.999**updates).rsqrt().float().to(device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        programs = min(-(-total // plan.constants["BLOCK"]), 4 * processors)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            _search_kernel[(programs,)](
                weights, biases, start.contiguous(), reference.contiguous(), target.contiguous(), rates, roots,
                *found.values(), torch.zeros(1, dtype=torch.int32, device=device), total,
                config.max_steps, len(updates), config.min_target_prob, config.distance_weight,
                **plan.constants, num_warps=plan.warps,
            )  # fmt: skip
    found["finite"] = found["finite"].bool()
    return found
