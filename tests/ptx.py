"""Runs the PTX of a kernel laid out for one warp, without a GPU: what the compiler made of it, lane by lane.

Triton's interpreter runs a kernel's Python, and sees neither the compiler's faults nor the lanes of a warp. Here the
compiled instructions run one by one on arrays of 32 numbers. Every access to memory is checked for its bounds, its
alignment and races: between two barriers no lane may read what another one wrote, nor change what another one read or
wrote. An asynchronous copy arrives when it is waited for, the latest that it may. Tensor cores cut their operands to
tf32. Programs take turns at each atomic operation; races between programs are not looked for.

Not modelled: programs of several warps, branches that part a warp, time, and the roundings of the GPU's approximate
functions and of the sums in its tensor cores, which are computed exactly and rounded once. Only the instructions that
Triton 3.6 and 3.8 make of the search's kernel are known.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray

LANES = np.arange(32)
EVERY_LANE = np.ones(32, bool)
LANE_BITS = np.uint32(1) << LANES.astype(np.uint32)  # of each lane, in a set of lanes
REGISTERS = {"r": "u4", "rd": "u8", "rs": "u2", "p": "?", "tid.x": "u4", "ctaid.x": "u4"}  # their types in numpy
KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}  # PTX's kinds of numbers


class Violation(Exception):
    """What a GPU answers with an error or, worse, with a wrong number."""


def as_bytes(values: Sequence[Array]) -> Array:
    """The bytes (32, n) of numbers (32,) that lie one after the other."""
    return np.stack(values, axis=1).view(np.uint8)


def from_bytes(rows: Array, size: int) -> list[Array]:
    """The unsigned numbers (32,), of ``size`` bytes each, that lie in bytes (32, n)."""
    return list(np.ascontiguousarray(rows).view(f"u{size}").T)


class Space:
    """A memory as one program sees it, and the lanes that read and wrote each byte since the last barrier."""

    def __init__(self, data: Array, valid: Array) -> None:
        self.data, self.valid = data, valid
        self.readers, self.writers = np.zeros((2, len(data)), np.uint32)
        self.touched: list[Array] = []

    def barrier(self) -> None:
        for index in self.touched:
            self.readers[index] = self.writers[index] = 0
        self.touched.clear()

    def find(self, addresses: Array, size: int, mask: Array) -> tuple[Array, Array]:
        """The bytes (n, size) that the n lanes of ``mask`` use, and each one's lane as a set."""
        index = addresses[mask][:, None] + np.arange(size)
        if (index[:, 0] % size).any():
            raise Violation("misaligned")
        if ((index < 0) | (index >= len(self.data))).any() or not self.valid[index].all():
            raise Violation("out of bounds")
        self.touched.append(index)
        return index, np.repeat(LANE_BITS[mask], size).reshape(index.shape)

    def load(self, addresses: Array, size: int, mask: Array) -> Array:
        """The bytes (32, size) at addresses (32,), 0 outside ``mask``."""
        index, lane = self.find(addresses, size, mask)
        writers = self.writers[index]
        if ((writers != 0) & (writers & lane == 0)).any():
            raise Violation("race: a lane reads what another one wrote")
        np.bitwise_or.at(self.readers, index.ravel(), lane.ravel())
        found = np.zeros((32, size), np.uint8)
        found[mask] = self.data[index]
        return found

    def store(self, addresses: Array, values: Array, mask: Array) -> None:
        """Store bytes (32, size); several lanes may write the same number."""
        index, lane = self.find(addresses, values.shape[1], mask)
        values, readers, writers = values[mask], self.readers[index], self.writers[index]
        same = self.data[index] == values
        self.data[index] = values
        if ((writers & ~lane != 0) & ~same | (self.data[index] != values)).any():
            raise Violation("race: two lanes write")
        if ((readers & ~lane != 0) & ~(same & (writers != 0))).any():
            raise Violation("race: a lane writes what another one read")
        self.writers[index] = np.where(same, writers, 0)
        np.bitwise_or.at(self.writers, index.ravel(), lane.ravel())


# Instructions that only compute: functions of operands (32,), which are numbers of the instruction's type.


def widen(x: Array) -> Array:
    return x.astype(x.dtype.kind + "8")


def permute(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes of two numbers; bit 3 of a selector's digit asks for the byte's sign alone."""
    digits = selector[:, None].astype(np.int64) >> np.arange(0, 16, 4)
    chosen = np.take_along_axis(as_bytes([a, b]), digits & 7, axis=1).view(np.int8)
    return from_bytes(np.where(digits & 8, chosen >> 7, chosen), 4)[0]


def shuffle(mode: str, values: Array, which: Array, clamp: Array, members: Array) -> Array:
    """Each lane's number from another lane, or its own where that lies outside its segment."""
    if (members != 0xFFFFFFFF).any():
        raise NotImplementedError("a shuffle among some lanes")
    which, segment, end = (x.astype(np.int64) & 31 for x in (which, clamp >> 8, clamp))
    last = LANES & segment | end & ~segment
    lane = {"up": LANES - which, "bfly": LANES ^ which, "idx": LANES & segment | which & ~segment}[mode]
    return values[np.where(lane >= last if mode == "up" else lane <= last, lane, LANES)]


def tensor_core(*parts: Array) -> list[Array]:
    """(16, 8) times (8, 8) plus (16, 8), of which each lane has four, two and four numbers."""
    cut = [(part.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for part in parts[:6]]
    group, member = LANES // 4, LANES % 4
    a, b = np.zeros((16, 8)), np.zeros((8, 8))
    a[group, member], a[group + 8, member], a[group, member + 4], a[group + 8, member + 4] = cut[:4]
    b[member, group], b[member + 4, group] = cut[4:]
    corners = [(group + row, 2 * member + column) for row in (0, 8) for column in (0, 1)]
    return [((a @ b)[corner] + total).astype(np.float32) for corner, total in zip(corners, parts[6:])]


COMPUTE: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mul.lo": np.multiply, "mad.lo": lambda x, y, z: x * y + z,
    "mul.wide": lambda x, y: widen(x) * widen(y), "mad.wide": lambda x, y, z: widen(x) * widen(y) + z,
    "fma.rn": lambda x, y, z: (x.astype(np.float64) * y + z).astype(np.float32), "div.full": np.divide,
    "neg": np.negative, "min": np.fmin, "max": np.fmax, "max.NaN": np.maximum, "sqrt.approx.ftz": np.sqrt,
    "ex2.approx": lambda x: np.exp2(x.astype(np.float64)).astype(np.float32),
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "shl": np.left_shift, "shr": np.right_shift, "prmt": permute,
    "bfe": lambda x, first, count: x << (32 - first - count) >> (32 - count),
    "popc": lambda x: np.unpackbits(as_bytes([x]), axis=1).sum(axis=1, dtype=np.uint32),
    # Comparisons with NaN are false, but for those whose name ends in u.
    "setp.eq": np.equal, "setp.ne": lambda x, y: (x < y) | (x > y), "setp.neu": np.not_equal, "setp.lt": np.less,
    "setp.gt": np.greater, "setp.ge": np.greater_equal, "selp": lambda x, y, chosen: np.where(chosen, x, y),
    # Conversions between integers are the output register's.
    "ld.param": np.copy, "cvt.u16": np.copy, "cvt.u32": np.copy, "cvt.u64": np.copy, "cvt.s64": np.copy,
    "shfl.sync.up": partial(shuffle, "up"), "shfl.sync.bfly": partial(shuffle, "bfly"),
    "shfl.sync.idx": partial(shuffle, "idx"), "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32": tensor_core,
}  # fmt: skip


class Instruction(NamedTuple):
    """An instruction: ``size`` is its type's in bytes, ``guard`` tells the lanes in which it acts."""

    text: str
    name: str
    size: int
    outputs: list[str]
    inputs: list[Callable[["Program"], Array]]
    guard: Callable[["Program"], Array]


class Program:
    """One program of a launch: a warp, its registers, and its view of the memories."""

    def __init__(self, number: int, arguments: list[Array], memory: Space, shared: int) -> None:
        self.registers = {"tid.x": LANES.astype(np.uint32), "ctaid.x": np.full(32, number, np.uint32)}
        self.arguments, self.memory = arguments, memory
        self.shared = Space(np.full(shared, 255, np.uint8), np.ones(shared, bool))
        self.copies: list[list[tuple[Array, Array, Array]]] = [[]]  # by group; the last group is open

    def run(self, code: list[Instruction], labels: dict[str, int]) -> Iterator[None]:
        """Run to the end; pauses after each atomic operation."""
        at = 0
        while code[at].name != "ret":
            now, at = code[at], at + 1
            try:
                mask = now.guard(self)
                if mask.any() != mask.all() and (now.name == "bra" or ".sync" in now.name):
                    raise Violation("lanes of a warp part")
                if now.name == "bra":
                    at = labels[now.text.split()[-1]] if mask[0] else at
                    continue
                values = [read(self) for read in now.inputs]
                found = COMPUTE[now.name](*values) if now.name in COMPUTE else MOVE[now.name](self, now, mask, *values)
            except (Violation, NotImplementedError) as error:
                raise type(error)(f"{error}, at {now.text}") from None
            for name, result in zip(now.outputs, found if isinstance(found, list) else [found]):
                self.write(name, result, mask)
            if now.name.startswith("atom"):
                yield  # to the other programs

    def write(self, name: str, values: Array, mask: Array) -> None:
        if name != "_":
            dtype = REGISTERS[name.rstrip("0123456789")]
            values = values.view(dtype) if values.dtype == np.float32 else values.astype(dtype)
            self.registers[name] = np.where(mask, values, self.registers.get(name, np.zeros_like(values)))

    def space(self, now: Instruction) -> Space:
        return self.memory if ".global" in now.name else self.shared

    def move(self, now: Instruction, mask: Array, *values: Array) -> list[Array]:
        """The same bytes, in one register or in several."""
        rows = as_bytes(values)
        return from_bytes(rows, rows.shape[1] // len(now.outputs))

    def barrier(self, *_: Any) -> None:
        self.memory.barrier()
        self.shared.barrier()

    def load(self, now: Instruction, mask: Array, addresses: Array) -> list[Array]:
        return from_bytes(self.space(now).load(addresses, now.size * len(now.outputs), mask), now.size)

    def store(self, now: Instruction, mask: Array, addresses: Array, *values: Array) -> None:
        rows = as_bytes([x.view(f"u{x.itemsize}").astype(f"u{now.size}") for x in values])
        self.space(now).store(addresses, rows, mask)

    def load_matrices(self, now: Instruction, mask: Array, rows: Array) -> list[Array]:
        """Of each matrix, eight rows of 16 bytes, four bytes to every lane; eight lanes hold its rows' addresses."""
        parts = [rows[8 * i + LANES // 4] + LANES % 4 * 4 for i in range(len(now.outputs))]
        return [from_bytes(self.shared.load(part, 4, mask), 4)[0] for part in parts]

    def store_matrices(self, now: Instruction, mask: Array, rows: Array, *values: Array) -> None:
        for i, part in enumerate(values):
            self.shared.store(rows[8 * i + LANES // 4] + LANES % 4 * 4, as_bytes([part]), mask)

    def copy(self, now: Instruction, mask: Array, to: Array, source: Array, size: Array, count: Array) -> None:
        """Begin to copy ``size`` bytes, or zeros where ``count`` is 0; until it is waited for NaN lies there."""
        if ((count != 0) & (count != size)).any():
            raise NotImplementedError("a copy of a part")
        values = self.memory.load(source, int(size[0]), mask & (count != 0))
        self.shared.store(to, np.full_like(values, 255), mask)
        self.copies[-1].append((to, values, mask))

    def wait(self, now: Instruction, mask: Array, groups: Array) -> None:
        while len(self.copies) > groups[0] + 1:
            for copied in self.copies.pop(0):
                self.shared.store(*copied)

    def add(self, now: Instruction, mask: Array, addresses: Array, values: Array) -> Array:
        """Add to a number in memory, one lane after the other; the number before."""
        before = np.zeros(32, np.uint32)
        for lane, index in zip(LANES[mask], self.memory.find(addresses, 4, mask)[0]):
            before[lane] = self.memory.data[index].view(np.uint32)[0]
            self.memory.data[index] = (before + values)[lane : lane + 1].view(np.uint8)
        return before


MOVE: dict[str, Callable[..., Any]] = {
    "mov": Program.move, "bar.sync": Program.barrier, "bar.warp.sync": Program.barrier,
    "ld.global": Program.load, "ld.shared": Program.load, "st.global": Program.store, "st.shared": Program.store,
    "ldmatrix.sync.aligned.m8n8.shared": Program.load_matrices,
    "stmatrix.sync.aligned.m8n8.shared": Program.store_matrices,
    "cp.async.ca.shared.global": Program.copy, "cp.async.cg.shared.global": Program.copy,
    "cp.async.commit_group": lambda program, *_: program.copies.append([]), "cp.async.wait_group": Program.wait,
    "atom.global.gpu.relaxed.add": Program.add,
}  # fmt: skip


def reader(text: str, kind: str, size: int) -> Callable[[Program], Array]:
    """What reads an operand as numbers (32,) of this kind: a register's in its own size, others in ``size`` bytes."""
    if address := re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+)\s*)?\]", text):
        if parameter := re.fullmatch(r"\w+_param_(\d+)", address[1]):
            return lambda program: program.arguments[int(parameter[1])]
        base, offset = reader(address[1], "u", 4), int(address[2] or 0)
        return lambda program: base(program).astype(np.int64) + offset
    if dtype := REGISTERS.get(text.strip("%0123456789")):
        viewed, unwritten = dtype.replace("u", kind), np.full(32, -1).astype(dtype)
        return lambda program: program.registers.get(text[1:], unwritten).view(viewed)
    if number := re.fullmatch(r"global_smem|(0f)?(-?[0-9A-F]+|0x[0-9A-Fa-f]+)U?", text):  # shared memory begins at 0
        bits = int(number[2] or "0", 16 if number[1] else 0) % 2 ** (8 * size)
        values = np.full(32, bits, f"u{size}")
        values = values.astype(bool) if kind == "?" else values.view(f"{kind}{size}")
        return lambda _: values
    raise NotImplementedError(f"operand {text}")


def parse(text: str) -> Instruction:
    """An instruction from its text; raises NotImplementedError for one that is not known."""
    whole = re.fullmatch(r"(?:@(!?)%(p\d+)\s+)?(\S+?)(?:\.(?:([busf])(8|16|32|64)|(pred)))?(?:\s+(.*))?", text)
    # The number of operands tells of how many parts a vector or matrix is, .v2 or .x4.
    name = re.sub(r"::cta|\.uni|\.[vx][24]\b", "", whole[3]) if whole else ""
    if not whole or name not in {*COMPUTE, *MOVE, "bra", "ret"}:
        raise NotImplementedError(text)
    negated, guard, _, letter, bits, predicate, rest = whole.groups()
    kind, size = ("?", 1) if predicate else (KINDS[letter or "u"], int(bits or 32) // 8)
    parts = re.findall(r"\{.*?\}|\[.*?\]|[^\s,]+", rest or "") if name != "bra" else []
    operands = [re.findall(r"\[.*\]|[^\s,{}]+", part) for part in parts]
    outputs = [] if name.startswith(("st", "cp", "bar", "bra", "ret")) else operands.pop(0)
    return Instruction(
        text, name, size, [output.lstrip("%") for output in outputs],
        [reader(operand, kind, size) for part in operands for operand in part],
        (lambda program: program.registers[guard] ^ bool(negated)) if guard else lambda _: EVERY_LANE,
    )  # fmt: skip


def run(ptx: str, shared: int, programs: int, arguments: Sequence[Array | int | float]) -> None:
    """Launch the kernel of this PTX, which has ``shared`` bytes of shared memory; arrays are pointers, and change."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    body = re.sub(r"//.*", "", ptx[ptx.index("\n{") + 2 : ptx.index("\n}")])
    for line in filter(None, map(str.strip, re.split(r"[;\n]", body))):
        if line.endswith(":"):
            labels[line[:-1]] = len(code)
        elif not line.startswith("."):
            code.append(parse(line))
    size = 1024 + sum(x.nbytes + 512 for x in arguments if isinstance(x, Array))
    memory, valid = np.full(size, 255, np.uint8), np.zeros(size, bool)
    numbers, end = [], 1024
    for x in arguments:
        if isinstance(x, Array):  # at a multiple of 256 bytes; no lane may use what lies between two arrays
            numbers.append(end)
            memory[end : end + x.nbytes], valid[end : end + x.nbytes] = x.reshape(-1).view(np.uint8), True
            end += x.nbytes + 256 + -x.nbytes % 256
        else:
            numbers.append(int(np.float32(x).view(np.uint32)) if isinstance(x, float) else x)
    values = [np.full(32, number, np.uint64) for number in numbers]
    running = [Program(i, values, Space(memory, valid), shared).run(code, labels) for i in range(programs)]
    with np.errstate(all="ignore"):
        while running:
            running = [program for program in running if next(program, "ended") != "ended"]
    for x, start in zip(arguments, numbers):
        if isinstance(x, Array):
            x.reshape(-1).view(np.uint8)[:] = memory[start : start + x.nbytes]
