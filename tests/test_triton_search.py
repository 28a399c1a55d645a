"""The Triton kernel: interpreted, compiled for a GPU that is not there, emulated, and on a GPU."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ptx
import pytest
import torch
from searches import (
    CONFIG,
    SIZES,
    arguments_of,
    assert_agree_with_plain,
    assert_same_bits,
    make_layers,
    make_rows,
    take,
)
from torch import Tensor

from clarity import triton_search
from clarity.objectives import LatentObjective
from clarity.search import SearchConfig, descend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL: Any = triton_search.search_kernel
SHARED_MEMORY = 227 * 1024  # bytes that one block may have on compute capability 9.0

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, started by the test above")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
with_triton = pytest.mark.skipif(not triton_search.is_installed(), reason="triton is not installed")


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


def run_triton(*args: Any, **change: Any) -> dict[str, Tensor]:
    return triton_search.search(*arguments_of(*args, **change))


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


def compile_for_hopper(layout: triton_search.Layout) -> Any:
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
    built = compile_for_hopper(triton_search.Layout.of(layers, directions))
    assert built.asm["cubin"]
    assert "mma" in built.asm["ptx"], "the products should use the tensor cores"
    assert built.metadata.shared <= SHARED_MEMORY


class EmulatedKernel:
    """Launches of the kernel on CPU tensors that run its PTX, on outputs and a state that hold other numbers before."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        return partial(self.launch, grid[0])

    def launch(self, programs: int, *arguments: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
        layout = triton_search.Layout(constants)
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
    monkeypatch.setattr(triton_search, "search_kernel", EmulatedKernel())
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
    found = triton_search.search(objective, z, given, config.max_steps, config.learning_rate)
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
