"""The fast engines against the plain one, against closed forms, and the same row in other batches."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import ptx
import pytest
import torch
from torch import Tensor

from clarity import kernels
from clarity.objectives import LatentObjective
from clarity.search import SearchConfig, descend

BUILDS = list(kernels.native_modules())
CONFIG = SearchConfig(min_target_prob=0.6, max_steps=120)
SIZES = [
    (2, (5, 6, 7, 4)),
    (3, (5, 4)),  # no hidden layer
    (7, (16, 16, 16, 10)),
    (5, (33, 17, 9, 3, 29)),  # no multiple of a register tile anywhere
    (1, (2, 70, 2)),
]

Layers = list[tuple[Tensor, Tensor]]

native = pytest.mark.skipif(not BUILDS, reason="the native search is not built here")


def make_layers(members: int, sizes: tuple[int, ...], scale: float = 5.0, seed: int = 1) -> Layers:
    noise = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=noise) * 2 - 1) * sizes[0] ** -0.5

    return [
        (draw(members, i, o) * scale * (sizes[0] / i) ** 0.5, draw(members, o)) for i, o in itertools.pairwise(sizes)
    ]


def make_rows(layers: Layers, rows: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Codes and targets."""
    noise = torch.Generator().manual_seed(seed)
    codes = torch.randn(rows, layers[0][0].shape[1], generator=noise)
    return codes, torch.randint(0, layers[-1][0].shape[2], (rows,), generator=noise)


def arguments_of(layers: Layers, z: Tensor, target: Tensor, config: SearchConfig = CONFIG, **change: Any) -> Any:
    """What ``descend`` hands to a kernel for the same arguments, with z as the reference."""
    thresholds = torch.full((len(z),), config.min_target_prob, device=z.device)
    rows = {"target": target, "reference": z, "min_target_prob": thresholds}
    rows = {name: change.get(name, values) for name, values in rows.items()}
    objective = LatentObjective(layers, config.distance_weight, change.get("fixed"))
    return objective, z, rows, config.max_steps, config.learning_rate


def run_native(*args: Any, threads: int = 1, build: str | None = None, **change: Any) -> dict[str, Tensor]:
    return kernels.native_search(*arguments_of(*args, **change), threads, build or BUILDS[0])


def run_triton(*args: Any, **change: Any) -> dict[str, Tensor]:
    return kernels.triton_search(*arguments_of(*args, **change))


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def take(found: dict[str, Tensor], index: Tensor | slice) -> dict[str, Tensor]:
    return {name: values[index].contiguous() for name, values in found.items()}


def assert_agree_with_plain(
    searches: list[dict[str, Tensor]], layers: Layers, z: Tensor, target: Tensor, config: SearchConfig
) -> None:
    """The stated tolerance: steps equal for 99.5 % of the rows and off by one for the rest; of those with equal steps
    98 % end within 1e-4 (a coordinate that crosses the reference, or a unit that crosses 0, can part two roundings)."""
    rows = {"target": target, "reference": z}
    plain = descend(LatentObjective(layers, config.distance_weight), z, rows, config, engine="plain")
    assert plain.converged.float().mean() > 0.1
    assert len(plain.steps.unique()) > 5
    for found in searches:
        off = (found["steps"] - plain.steps).abs()
        assert (off == 0).float().mean() >= 0.995
        assert off.max() <= 1
        same = off == 0
        assert torch.equal((found["target_prob_final"] > config.min_target_prob)[same], plain.converged[same])
        assert ((found["point"] - plain.point).abs().amax(dim=1)[same] < 1e-4).float().mean() > 0.98
        assert torch.allclose(found["target_prob_initial"], plain.target_prob_initial, atol=1e-6)
        assert ((found["target_prob_final"] - plain.target_prob_final).abs()[same] < 1e-4).float().mean() > 0.98
        assert found["finite"].all()


@contextmanager
def raising_after(seconds: float) -> Iterator[None]:
    def handler(number: int, frame: FrameType | None) -> None:
        raise InterruptedError("the timer's")

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@native
@pytest.mark.parametrize(("members", "sizes"), SIZES)
def test_native_searches_agree_with_the_plain_one(members: int, sizes: tuple[int, ...]) -> None:
    layers = make_layers(members, sizes)
    z, target = make_rows(layers, 203)
    config = replace(CONFIG, min_target_prob=0.6 if sizes[-1] < 20 else 0.2)
    searches = [run_native(layers, z, target, config, build=build) for build in BUILDS]
    assert_agree_with_plain(searches, layers, z, target, config)


@native
@pytest.mark.parametrize("build", BUILDS)
def test_native_probabilities_are_a_softmax_to_float32(build: str) -> None:
    weight = torch.eye(6).unsqueeze(0)
    z = torch.randn(500, 6, generator=torch.Generator().manual_seed(4)) * torch.logspace(-2, 1.3, 500).unsqueeze(1)
    target = torch.arange(500) % 6
    config = replace(CONFIG, max_steps=0)
    found = run_native([(weight, torch.zeros(1, 6))], z, target, config, build=build)["target_prob_initial"]
    expected = torch.softmax(z.double(), dim=1).gather(1, target.unsqueeze(1)).squeeze(1)
    # The logits' own rounding, up to 60 units of 6e-8 each, comes on top of 2 ulp of the powers.
    assert ((found - expected).abs() <= expected * (4e-7 + 2e-7 * z.abs().amax(dim=1))).all()


@native
@pytest.mark.parametrize("build", BUILDS)
def test_native_search_pulls_towards_the_reference(build: str) -> None:
    """With flat classifiers only the distance acts: each update is one learning rate towards the reference."""
    layers = [(torch.zeros(2, 3, 4), torch.zeros(2, 4))]
    z = torch.zeros(2, 3)
    reference = torch.tensor([[1.0, -1.0, 0.0], [-2.0, 0.0, 3.0]])
    config = SearchConfig(min_target_prob=0.9, max_steps=4, distance_weight=0.5, learning_rate=0.01)
    found = run_native(layers, z, torch.tensor([0, 3]), config, reference=reference, build=build)
    assert torch.allclose(found["point"], 0.04 * reference.sign(), atol=1e-6)
    assert torch.equal(found["target_prob_final"], torch.tensor([0.25, 0.25]))


@native
@pytest.mark.parametrize("build", BUILDS)
def test_native_module_rejects_arrays_of_other_types_or_shapes(build: str) -> None:
    layers = make_layers(2, (5, 6, 7, 4))
    z, target = make_rows(layers, 9)
    good: dict[str, Any] = {
        "weights": [weight.numpy() for weight, _ in layers],
        "biases": [bias.numpy() for _, bias in layers],
        "start": z.numpy(),
        "reference": z.numpy(),
        "target": target.numpy(),
        "point": np.empty((9, 5), np.float32),
        "steps": np.empty(9, np.int32),
        "target_prob_initial": np.empty(9, np.float32),
        "target_prob_final": np.empty(9, np.float32),
        "finite": np.empty(9, np.bool_),
        "min_target_prob": np.full(9, 0.9, np.float32),
        "fixed": np.zeros((0, 5), np.float32),
        "max_steps": 5,
        "distance_weight": 0.0,
        "learning_rate": 0.1,
        "threads": 1,
    }
    search = kernels.native_module(build).search
    assert search(**good) is None
    frozen = np.empty((9, 5), np.float32)
    frozen.flags.writeable = False
    for name, value in [
        ("start", z.double().numpy()),
        ("start", np.zeros((5, 9), np.float32).T),
        ("start", "text"),
        ("weights", [None, None, None]),
        ("weights", tuple(good["weights"])),
        ("target", target.int().numpy()),
        ("target", target.numpy() + 1),
        ("target", -target.numpy()),
        ("weights", good["weights"][::-1]),
        ("weights", []),
        ("threads", 0),
        ("point", np.empty((9, 4), np.float32)),
        ("point", frozen),
        ("steps", np.empty(9, np.int64)),
        ("finite", np.empty(8, np.bool_)),
        ("max_steps", -1),
        ("learning_rate", float("nan")),
        ("min_target_prob", np.full(9, np.nan, np.float32)),
        ("min_target_prob", np.full(8, 0.9, np.float32)),
        ("fixed", np.zeros((1, 4), np.float32)),
    ]:
        with pytest.raises(ValueError):
            search(**good | {name: value})


@native
def test_native_search_releases_the_gil_and_handles_signals() -> None:
    layers = make_layers(7, (16, 16, 16, 10), scale=0.01)
    z, target = make_rows(layers, 2000)
    endless = SearchConfig(min_target_prob=0.9999, max_steps=2_000_000_000)
    seen: list[float] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            seen.append(time.monotonic())

    thread = threading.Thread(target=look)
    thread.start()
    began = time.monotonic()
    try:
        with pytest.raises(InterruptedError, match="the timer's"), raising_after(0.5):
            run_native(layers, z, target, endless)
    finally:
        over.set()
        thread.join()
    assert time.monotonic() - began < 20
    assert len(seen) > 3


@native
def test_native_modules_leave_denormal_numbers_alone() -> None:
    run_native(make_layers(3, (5, 4)), *make_rows(make_layers(3, (5, 4)), 4))
    tiny = np.float32(1e-40)
    assert tiny * np.float32(1) == tiny
    assert tiny != 0


def test_native_search_without_a_build_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "native_modules", dict)
    assert not kernels.native_modules()
    layers = make_layers(2, (5, 6, 7, 4))
    with pytest.raises(ValueError, match="pip install"):
        run_native(layers, *make_rows(layers, 3), build="base")


def test_native_builds_that_are_missing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Base:
        @staticmethod
        def builds() -> tuple[str, ...]:
            return "avx512", "avx2", "base"

    built = {"base": Base, "avx2": object()}
    monkeypatch.setattr(kernels, "import_build", built.get)
    assert list(kernels.native_modules.__wrapped__()) == ["avx2", "base"]
    monkeypatch.setattr(kernels, "import_build", {"avx2": object()}.get)
    assert kernels.native_modules.__wrapped__() == {}, "only the plain build may ask the processor"


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL: Any = kernels.search_kernel
SHARED_MEMORY = 227 * 1024  # bytes that one block may have on compute capability 9.0

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, started by the test above")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
with_triton = pytest.mark.skipif(not kernels.triton_available(), reason="triton is not installed")


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_triton_search_in_the_interpreter() -> None:
    """Triton decides when it is imported whether to interpret, so its CPU tests have a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "interpreted_"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


def tensor_core(_: Any, a: Any, b: Any, total: Any, *__: Any) -> Any:
    """A product as tensor cores take it: of each number all but the 10 bits of tf32's fraction are cut off."""
    from triton.runtime.interpreter import TensorHandle

    def cut(values: np.ndarray) -> np.ndarray:
        return (np.ascontiguousarray(values).view(np.int32) & -0x2000).view(np.float32).astype(np.float64)

    return TensorHandle((cut(a.data) @ cut(b.data) + total.data).astype(np.float32), total.dtype.scalar)


@pytest.fixture(autouse=INTERPRETED)
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_dot", tensor_core)


@interpreted
@pytest.mark.parametrize(("members", "sizes"), [(2, (5, 6, 7, 4)), (3, (5, 4))])
def test_interpreted_search_agrees_with_the_plain_one(members: int, sizes: tuple[int, ...]) -> None:
    layers = make_layers(members, sizes)
    z, target = make_rows(layers, 70)
    config = replace(CONFIG, min_target_prob=0.42, max_steps=14)
    assert_agree_with_plain([run_triton(layers, z, target, config)], layers, z, target, config)


@interpreted
@pytest.mark.parametrize(("members", "sizes", "directions"), [(2, (5, 6, 7, 4), 3), (1, (70, 2), 1), (1, (1, 2), 0)])
def test_interpreted_search_knows_thresholds_and_fixed_directions(
    members: int, sizes: tuple[int, ...], directions: int
) -> None:
    layers = make_layers(members, sizes)
    z, target = make_rows(layers, 70)
    noise = torch.Generator().manual_seed(4)
    fixed = torch.linalg.qr(torch.randn(sizes[0], directions, generator=noise))[0] if directions else None
    thresholds = torch.linspace(0.3, 0.7, 70)
    config = replace(CONFIG, max_steps=14)
    found = run_triton(layers, z, target, config, min_target_prob=thresholds, fixed=fixed)
    rows = {"target": target, "reference": z, "min_target_prob": thresholds}
    plain = descend(LatentObjective(layers, config.distance_weight, fixed), z, rows, config, engine="plain")
    assert len(plain.steps.unique()) > 2
    same = found["steps"] == plain.steps
    assert same.float().mean() > 0.95
    torch.testing.assert_close(found["point"][same], plain.point[same], atol=1e-3, rtol=0)
    if fixed is not None:
        assert ((found["point"] - z) @ fixed).abs().max() < 5e-6
    some = torch.tensor([69, 3, 40])
    alone = run_triton(layers, z[some], target[some], config, min_target_prob=thresholds[some], fixed=fixed)
    assert_same_bits(alone, take(found, some))


@interpreted
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # the interpreter's maximum of a row of NaN
def test_interpreted_row_keeps_its_result_in_any_batch() -> None:
    layers = make_layers(2, (5, 6, 7, 4))
    z, target = make_rows(layers, 70)
    config = replace(CONFIG, max_steps=6)
    found = run_triton(layers, z, target, config)
    some = torch.tensor([69, 3, 40])
    assert_same_bits(run_triton(layers, z[some], target[some], config), take(found, some))
    broken = z.clone()
    broken[5] = torch.nan
    beside = run_triton(layers, broken, target, config, reference=z)
    others = torch.arange(70) != 5
    assert not beside["finite"][5]
    assert beside["steps"][5] == 0
    assert_same_bits(take(beside, others), take(found, others))


@interpreted
def test_interpreted_search_pulls_towards_the_reference_and_accepts_no_rows() -> None:
    layers = [(torch.zeros(2, 3, 4), torch.zeros(2, 4))]
    z = torch.zeros(2, 3)
    reference = torch.tensor([[1.0, -1.0, 0.0], [-2.0, 0.0, 3.0]])
    config = SearchConfig(min_target_prob=0.9, max_steps=4, distance_weight=0.5, learning_rate=0.01)
    found = run_triton(layers, z, torch.tensor([0, 3]), config, reference=reference)
    assert torch.allclose(found["point"], 0.04 * reference.sign(), atol=1e-6)
    assert (found["steps"] == 4).all()
    assert found["finite"].all()
    assert len(run_triton(layers, z[:0], torch.zeros(0, dtype=torch.int64), config)["steps"]) == 0


def compile_for_hopper(layout: kernels.Layout) -> Any:
    """The kernel as a launch compiles it, with pointers and ``zero`` that are multiples of 16; needs no GPU."""
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    if "nvidia" not in backends:
        pytest.skip("this triton has no NVIDIA backend")
    names, constants = KERNEL.arg_names, layout.constants
    types = dict.fromkeys(names, "*fp32") | dict.fromkeys(constants, "constexpr")
    types |= {"target": "*i64", "steps_out": "*i32", "finite_out": "*i8", "counter": "*i32"}
    types |= dict.fromkeys(("total", "max_steps", "corrections", "zero"), "i32")
    types |= {"distance_weight": "fp32"}
    multiples = [index for index, name in enumerate(names) if types[name].startswith("*") or name == "zero"]
    attributes = {(index,): [["tt.divisibility", 16]] for index in multiples}
    source = ASTSource(fn=KERNEL, signature=types, constexprs=constants, attrs=attributes)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=layout.options)


@with_triton
@compiled
@pytest.mark.parametrize(
    ("members", "sizes"),
    [
        (50, (16, 16, 16, 10)),
        pytest.param(20, (128, 16, 16, 4), marks=pytest.mark.slow),
        pytest.param(100, (512, 64, 64, 100), marks=pytest.mark.slow),
        pytest.param(3, (5, 4), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("directions", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_triton_search_compiles_for_hopper_without_a_gpu(members: int, sizes: tuple[int, ...], directions: int) -> None:
    layers = [(torch.zeros(members, i, o), torch.zeros(members, o)) for i, o in itertools.pairwise(sizes)]
    built = compile_for_hopper(kernels.Layout.of(layers, directions))
    assert built.asm["cubin"]
    assert "mma" in built.asm["ptx"], "the products should use the tensor cores"
    assert built.metadata.shared <= SHARED_MEMORY


class EmulatedKernel:
    """Launches of the kernel on CPU tensors that run its PTX, on outputs and a state that hold other numbers before."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        return partial(self.launch, grid[0])

    def launch(self, programs: int, *arguments: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
        layout = kernels.Layout(constants)
        assert layout.options == {"num_warps": num_warps, "num_stages": num_stages}
        built = compile_for_hopper(layout)
        named = dict(zip(KERNEL.arg_names, arguments))
        outputs = [named[name] for name in ("point", "steps_out", "initial_out", "final_out", "finite_out")]
        for output in [*outputs, named["state"]]:
            output.fill_(-7)
        values = [value.numpy() if isinstance(value, Tensor) else value for value in arguments]
        # No more than two programs, whose lanes take further rows when their searches have ended.
        ptx.run(built.asm["ptx"], built.metadata.shared, min(programs, 2), values)
        assert all((output != -7).all() for output in outputs), "a row's result is not written"


@with_triton
@compiled
@pytest.mark.parametrize(
    ("members", "sizes", "rows", "directions", "min_target_prob"),
    [
        (2, (5, 6, 7, 4), 72, 2, 0.6),
        (3, (16, 16, 16, 10), 72, 0, 0.4),
        (1, (70, 2), 40, 1, 0.6),
        pytest.param(3, (128, 16, 16, 4), 40, 0, 0.6, marks=pytest.mark.slow),
        pytest.param(2, (64, 64, 64, 10), 40, 0, 0.6, marks=pytest.mark.slow),
        pytest.param(2, (33, 17, 9, 3, 29), 40, 0, 0.2, marks=pytest.mark.slow),
    ],
)
def test_triton_search_compiled_and_emulated_agrees_with_the_plain_one(
    members: int,
    sizes: tuple[int, ...],
    rows: int,
    directions: int,
    min_target_prob: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the compiler made of the kernel, run by ``ptx``, which raises where lanes race."""
    monkeypatch.setattr(kernels, "search_kernel", EmulatedKernel())
    layers = make_layers(members, sizes)
    z, target = make_rows(layers, rows)
    reference, thresholds, fixed = z.clone(), torch.full((rows,), min_target_prob), None
    if directions:
        z[5] = torch.nan
        thresholds = torch.linspace(0.3, 0.7, rows)
        noise = torch.Generator().manual_seed(4)
        fixed = torch.linalg.qr(torch.randn(sizes[0], directions, generator=noise))[0]
    config = replace(CONFIG, max_steps=6)
    given = {"target": target, "reference": reference, "min_target_prob": thresholds}
    objective = LatentObjective(layers, config.distance_weight, fixed)
    plain = descend(objective, z, given, config, engine="plain")
    found = kernels.triton_search(objective, z, given, config.max_steps, config.learning_rate)
    assert len(plain.steps.unique()) > 1
    assert torch.equal(found["finite"], plain.finite)
    assert torch.equal(found["steps"], plain.steps)
    for name in ("point", "target_prob_initial", "target_prob_final"):
        torch.testing.assert_close(found[name], getattr(plain, name), atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize(("members", "sizes"), [*SIZES[:3], (1, (130, 64, 33, 100))])
def test_triton_search_agrees_with_the_plain_one_on_a_gpu(members: int, sizes: tuple[int, ...]) -> None:
    layers = make_layers(members, sizes)
    z, target = make_rows(layers, 5003)
    config = replace(CONFIG, min_target_prob=0.6 if sizes[-1] < 20 else 0.2)
    moved = [(weight.cuda(), bias.cuda()) for weight, bias in layers]
    found = run_triton(moved, z.cuda(), target.cuda(), config)
    assert_agree_with_plain([{name: values.cpu() for name, values in found.items()}], layers, z, target, config)
