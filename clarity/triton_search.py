"""Algorithm 1 over stacked latent classifiers on CUDA GPUs, in one Triton kernel.

It does what ``search.descend`` specifies: the target probability (mean over the members, float32) is tested before
each update and once after the last, each row by itself. Layers are (weight (M, in, out), bias (M, out)), with a ReLU
between two.
"""

# ruff: noqa: RUF005 - Triton's compiler joins tuples with +, it knows no unpacking
import os
import shutil
import sysconfig
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, no_type_check

import torch
from torch import Tensor
from torch.nn import functional

from clarity.objectives import LatentObjective, Layers, Rows

try:
    import triton
    import triton.language as tl
except ImportError:  # where torch comes without it
    triton = None

#: The largest sizes that the Triton kernel holds.
MOST_LATENT, MOST_WIDTH, MOST_CLASSES = 512, 64, 100
#: Weights of a member, packed, up to which a processor's shared memory holds a copy for each of eight programs.
MOST_PREFETCHED = 6144


def is_installed() -> bool:
    """Whether the package triton is installed."""
    return triton is not None


def refusal(layers: Layers) -> str:
    """Why the kernel cannot search with these classifiers on this machine's GPU; empty where it can."""
    if not is_installed():
        return "needs the package triton"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or more, which multiplies in tf32"
    # As triton.runtime.build looks for them: it compiles what starts a kernel.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or not (header.exists() or os.environ.get("CPATH")):
        return "needs a C compiler and Python's headers, with which triton makes what starts its kernels"
    return size_refusal(layers)


def size_refusal(layers: Layers) -> str:
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


# The order of fragments: tensor cores give a matrix to the 32 lanes of a warp in an order of their own, 4 numbers each.
# Weights, and the state of the searches, lie in memory as the lanes hold them, (parts, 32, 4); the weights' rows are
# exchanged so that the result of one product is the left operand of the next. So no number moves from lane to lane
# between the products, and a program is one warp, which waits for no other.


@jit
@no_type_check
def fragments(PARTS: tl.constexpr):
    """Offsets (PARTS * 32, 4) of numbers that lie in the order of fragments."""
    return tl.arange(0, PARTS * 32)[:, None] * 4 + tl.arange(0, 4)[None, :]


@jit
@no_type_check
def load_tile(where, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """A tile (BLOCK, TILE) of codes that lies in the order of fragments."""
    parts = tl.load(where + fragments(BLOCK * TILE // 128))
    parts = tl.reshape(parts, (BLOCK // 16, TILE // 8, 8, 4, 2, 2))
    return tl.reshape(tl.permute(parts, (0, 4, 2, 1, 3, 5)), (BLOCK, TILE))


@jit
@no_type_check
def store_tile(where, tile, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Store a tile for ``load_tile``."""
    parts = tl.permute(tl.reshape(tile, (BLOCK // 16, 2, 8, TILE // 8, 4, 2)), (0, 3, 2, 4, 1, 5))
    tl.store(where + fragments(BLOCK * TILE // 128), tl.reshape(parts, (BLOCK * TILE // 4, 4)))


@jit
@no_type_check
def as_left(x, BLOCK: tl.constexpr, K: tl.constexpr):
    """(BLOCK, K) with the columns in the order in which ``as_right`` has the rows."""
    return tl.reshape(tl.permute(tl.reshape(x, (BLOCK, K // 8, 4, 2)), (0, 1, 3, 2)), (BLOCK, K))


@jit
@no_type_check
def as_right(parts, K: tl.constexpr, N: tl.constexpr):
    """A matrix (K, N) from its fragments."""
    parts = tl.reshape(parts, (K // 8, N // 16, 8, 4, 2, 2))
    return tl.reshape(tl.permute(parts, (0, 5, 3, 1, 4, 2)), (K, N))


@jit
@no_type_check
def to_tf32(x):
    """The nearest tf32 numbers, whose fraction has 10 bits; ``x`` minus them is exact."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@jit
@no_type_check
def product(a, where, total, BLOCK: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    """``total`` (BLOCK, N) plus ``a`` (BLOCK, K) times the matrix (K, N) at ``where``, with float32's error.

    High parts times high parts, and each times the other's low part: three products in tf32.
    """
    b = tl.load(where + fragments(K * N // 128))
    a_high, b_high = to_tf32(a), to_tf32(b)
    a_low, b_low = as_left(a - a_high, BLOCK, K), as_right(b - b_high, K, N)
    a_high, b_high = as_left(a_high, BLOCK, K), as_right(b_high, K, N)
    total = tl.dot(a_low, b_high, total, input_precision="tf32")
    total = tl.dot(a_high, b_low, total, input_precision="tf32")
    return tl.dot(a_high, b_high, total, input_precision="tf32")


@jit
@no_type_check
def prob_and_slope(hidden, weights, biases, aim, LAYER: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
                   HP: tl.constexpr, KP: tl.constexpr):  # fmt: skip
    """The target's probability of one member, and the gradient of its cross-entropy by ``hidden``.

    ``hidden`` (BLOCK, HP or KP) are the outputs of layer LAYER before its ReLU; ``weights`` and ``biases`` point to
    those of layer LAYER + 1; ``aim`` (BLOCK, KP) is 1 at the target, and the probability is in the same column.
    """
    if LAYER == DEPTH - 1:
        power = tl.exp(hidden - tl.max(hidden, axis=1)[:, None])
        probs = power * (1.0 / tl.sum(power, axis=1))[:, None]
        prob = probs * aim
        slope = probs - aim
    else:
        columns: tl.constexpr = KP if LAYER == DEPTH - 2 else HP
        active = tl.maximum(hidden, 0.0, propagate_nan=tl.PropagateNan.ALL)
        above = tl.zeros((BLOCK, columns), tl.float32) + tl.load(biases + tl.arange(0, columns))[None, :]
        above = product(active, weights, above, BLOCK, HP, columns)
        prob, slope = prob_and_slope(
            above, weights + 2 * HP * columns, biases + columns, aim, LAYER + 1, DEPTH, BLOCK, HP, KP
        )
        slope = product(slope, weights + HP * columns, tl.zeros((BLOCK, HP), tl.float32), BLOCK, columns, HP)
        slope = tl.where(hidden > 0, slope, 0.0)
    return prob, slope


@jit
@no_type_check
def search_kernel(weights, biases, start, reference, target, min_target_prob, fixed, rates, roots, point, steps_out,
                  initial_out, final_out, finite_out, counter, state, total, max_steps, corrections, distance_weight,
                  zero,
                  MEMBERS: tl.constexpr, DIRECTIONS: tl.constexpr,
                  D: tl.constexpr, SIZE: tl.constexpr, BIASES: tl.constexpr, DEPTH: tl.constexpr, TILES: tl.constexpr,
                  TILE: tl.constexpr, HP: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Algorithm 1 for BLOCK searches at a time; a lane whose search has ended takes the next row from ``counter``.

    Codes are TILES tiles (BLOCK, TILE). ``state`` holds four of each for every program: the codes, the references, and
    Adam's mean and square; only one member's tensors live in registers. SIZE and BIASES are the numbers of weights, of
    which each matrix is there twice, and biases of one member. ``zero`` is 0.
    """
    FIRST: tl.constexpr = KP if DEPTH == 1 else HP
    AREA: tl.constexpr = BLOCK * TILE
    lane = tl.arange(0, BLOCK)
    unit = tl.arange(0, TILE)
    column = tl.arange(0, FIRST)
    # Of each number of a tile, the offset in the order of fragments.
    spot = (lane // 16 * (TILE // 8) * 128 + lane % 8 * 16 + lane // 8 % 2 * 2)[:, None]
    spot += (unit // 8 * 128 + unit % 8 // 2 * 4 + unit % 2)[None, :]
    codes = state + tl.program_id(0) * (4 * TILES * AREA)
    origins, means, squares = codes + TILES * AREA, codes + 2 * TILES * AREA, codes + 3 * TILES * AREA
    nothing = tl.zeros((BLOCK, TILE), tl.float32)
    aim = tl.zeros((BLOCK, KP), tl.float32)
    limit = tl.zeros((BLOCK,), tl.float32)
    steps = tl.zeros((BLOCK,), tl.int32)
    row = tl.zeros((BLOCK,), tl.int64) - 1
    ended = lane >= 0
    empty = BLOCK
    alive = 1
    while alive > 0:
        tl.debug_barrier()  # between lanes that store and others that read
        if empty > 0:
            taken = tl.atomic_add(counter, empty, sem="relaxed") + tl.cumsum(ended.to(tl.int32), axis=0) - 1
            next_row = tl.where(ended, tl.where(taken < total, taken.to(tl.int64), -1), row)
            fresh = ended & (next_row >= 0)
            leaving, old = (ended & (row >= 0))[:, None], ended[:, None]
            for t in tl.static_range(TILES):
                at = (t * TILE + unit)[None, :]
                code = tl.load(codes + t * AREA + spot, mask=leaving, other=0.0)
                tl.store(point + row[:, None] * D + at, code, mask=leaving & (at < D))
            tl.debug_barrier()
            for t in tl.static_range(TILES):
                at = (t * TILE + unit)[None, :]
                mask = fresh[:, None] & (at < D)
                code = tl.load(start + next_row[:, None] * D + at, mask=mask, other=0.0)
                tl.store(codes + t * AREA + spot, code, mask=old)
                code = tl.load(reference + next_row[:, None] * D + at, mask=mask, other=0.0)
                tl.store(origins + t * AREA + spot, code, mask=old)
                tl.store(means + t * AREA + spot, nothing, mask=old)
                tl.store(squares + t * AREA + spot, nothing, mask=old)
            tl.debug_barrier()
            row = next_row
            wanted = tl.load(target + row, mask=fresh, other=0)
            aim = tl.where(old, (wanted[:, None] == tl.arange(0, KP)[None, :]).to(tl.float32), aim)
            limit = tl.where(ended, tl.load(min_target_prob + row, mask=fresh, other=1.0), limit)
            steps = tl.where(ended, 0, steps)
        busy = row >= 0
        alive = tl.sum(busy.to(tl.int32), axis=0)

        probs = tl.zeros((BLOCK, KP), tl.float32)
        grad = (nothing,)
        for _ in tl.static_range(1, TILES):
            grad = grad + (nothing,)
        for member in range(MEMBERS):
            own = weights + member * SIZE
            own_biases = biases + member * BIASES
            # Several tiles are loaded anew for each member, which ``zero`` hides: registers cannot hold them all.
            own_codes = codes + member * zero if TILES > 1 else codes
            hidden = tl.zeros((BLOCK, FIRST), tl.float32) + tl.load(own_biases + column)[None, :]
            for t in tl.static_range(TILES):
                code = load_tile(own_codes + t * AREA, BLOCK, TILE)
                hidden = product(code, own + t * TILE * FIRST, hidden, BLOCK, TILE, FIRST)
            prob, slope = prob_and_slope(
                hidden, own + 2 * TILES * TILE * FIRST, own_biases + FIRST, aim, 0, DEPTH, BLOCK, HP, KP
            )
            probs += prob
            grad_next = ()
            for t in tl.static_range(TILES):
                back = own + (TILES + t) * TILE * FIRST
                grad_next = grad_next + (product(slope, back, grad[t], BLOCK, FIRST, TILE),)
            grad = grad_next
        prob = tl.sum(probs, axis=1) / MEMBERS

        corrected = tl.minimum(steps, corrections - 1)
        rate = tl.load(rates + corrected)[:, None]
        root = tl.load(roots + corrected)[:, None]
        z, moved = (), ()
        for t in tl.static_range(TILES):
            code = load_tile(codes + t * AREA, BLOCK, TILE)
            away = code - load_tile(origins + t * AREA, BLOCK, TILE)
            pull = distance_weight * ((away > 0).to(tl.float32) - (away < 0).to(tl.float32))
            slope = grad[t] / MEMBERS + pull
            first = load_tile(means + t * AREA, BLOCK, TILE)
            first += (slope - first) * 0.1
            second = load_tile(squares + t * AREA, BLOCK, TILE) * 0.999 + slope * (0.001 * slope)
            tl.debug_barrier()
            store_tile(means + t * AREA, first, BLOCK, TILE)
            store_tile(squares + t * AREA, second, BLOCK, TILE)
            z, moved = z + (code,), moved + (code - rate * (first / (tl.sqrt(second) * root + 1e-8)),)
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
        for t in tl.static_range(TILES):
            store_tile(codes + t * AREA, tl.where(going, moved[t], z[t]), BLOCK, TILE)
        steps += 1
        empty = tl.sum(ended.to(tl.int32), axis=0)


def in_fragments(matrices: Tensor) -> Tensor:
    """Matrices (M, K, N) in the order of fragments: (M, K * N). K is a multiple of 8, N of 16."""
    members, rows, columns = matrices.shape
    parts = matrices.reshape(members, rows // 8, 4, 2, columns // 16, 2, 8)
    return parts.permute(0, 1, 4, 6, 2, 5, 3).reshape(members, -1)


@dataclass(frozen=True)
class Layout:
    """How the kernel is laid out for one ensemble: the constants of its compilation, and its options."""

    constants: dict[str, Any]

    @property
    def options(self) -> dict[str, int]:
        """Options of the compiler: one warp; small members' weights are loaded while the one before is computed."""
        return {"num_warps": 1, "num_stages": 2 if self.constants["SIZE"] <= MOST_PREFETCHED else 1}

    @staticmethod
    def of(layers: Layers, directions: int = 0) -> "Layout":
        """The layout for these layers; raises ValueError for sizes that the kernel does not hold."""

        def padded(size: int) -> int:
            return max(16, 1 << (size - 1).bit_length())

        refusal = size_refusal(layers)
        if refusal:
            raise ValueError(f"the Triton kernel {refusal}; use engine batched")
        latent, classes = layers[0][0].shape[1], layers[-1][0].shape[2]
        widths = [weight.shape[2] for weight, _ in layers[:-1]]
        dp, hp, kp, depth = padded(latent), padded(max(widths, default=1)), padded(classes), len(layers)
        ins = [dp] + [hp] * (depth - 1)
        outs = [hp] * (depth - 1) + [kp]
        tile = min(dp, 32)
        constants = dict(
            MEMBERS=layers[0][0].shape[0], DIRECTIONS=directions, D=latent,
            SIZE=2 * sum(i * o for i, o in zip(ins, outs)), BIASES=sum(outs), DEPTH=depth, TILES=dp // tile, TILE=tile,
            HP=hp, KP=kp,
            BLOCK=32 if max(dp, hp, kp) == 16 else 16,  # as many searches as one warp's registers hold
        )  # fmt: skip
        return Layout(constants)

    def state_size(self, programs: int) -> int:
        """Numbers that so many programs keep in memory."""
        return programs * 4 * self.constants["TILES"] * self.constants["TILE"] * self.constants["BLOCK"]

    def pack(self, layers: Layers) -> tuple[Tensor, Tensor]:
        """Weights (M, SIZE) and biases (M, BIASES), padded with zeros; padding classes get probability 0.

        A layer's matrix, and then its transpose, is in the order of fragments: the first layer's in TILES parts.
        """
        sizes, depth = self.constants, len(layers)
        weights, biases = [], []
        for index, (weight, bias) in enumerate(layers):
            tiles, rows = (1, sizes["HP"]) if index else (sizes["TILES"], sizes["TILE"])
            last = index == depth - 1
            columns = (sizes["KP"] if last else sizes["HP"]) - weight.shape[2]
            padded = functional.pad(weight.float(), (0, columns, 0, tiles * rows - weight.shape[1]))
            parts = padded.split(rows, dim=1)
            weights += [in_fragments(part) for part in parts] + [in_fragments(part.mT) for part in parts]
            biases.append(functional.pad(bias.float(), (0, columns), value=-1e30 if last else 0.0))
        return torch.cat(weights, dim=1).contiguous(), torch.cat(biases, dim=1).contiguous()


def search(
    objective: LatentObjective, start: Tensor, rows: Rows, max_steps: int, learning_rate: float
) -> dict[str, Tensor]:
    """Search in one kernel on a GPU: a block of searches stays on one multiprocessor through all members and steps.

    Returns what ``native_search.search`` returns, on the device of ``start``. Products are in tf32, three for each,
    whose error is that of float32. Raises ValueError for sizes that the kernel does not hold.
    """
    if triton is None:
        raise ValueError("the Triton kernel needs the package triton; use engine batched")
    total, device, directions = len(start), start.device, objective.directions
    layout = Layout.of(objective.layers, len(directions))
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
        programs = min(-(-total // layout.constants["BLOCK"]), 16 * processors)  # at least as many as run at once
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            search_kernel[(programs,)](
                weights, biases, start.contiguous(), rows["reference"].contiguous(), rows["target"].contiguous(),
                rows["min_target_prob"].contiguous(), functional.pad(directions.float(), (0, padding)).contiguous(),
                rates, roots, *found.values(), torch.zeros(1, dtype=torch.int32, device=device),
                torch.empty(layout.state_size(programs), device=device), total, max_steps, len(updates),
                objective.distance_weight, 0, **layout.constants, **layout.options,
            )  # fmt: skip
    found["finite"] = found["finite"].bool()
    return found
