"""Algorithm 1 over stacked latent classifiers, and their gradients, on CPUs in compiled code: native/search.cpp.

It does what ``search.descend`` specifies, each row by itself. Layers are (weight (M, in, out), bias (M, out)), with a
ReLU between two.
"""

import functools
import importlib
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from clarity.objectives import LatentObjective, Layers, Rows

#: The builds of native/search.cpp by instruction set, fastest first.
BUILDS = ("avx512", "avx2", "base")


def import_build(build: str) -> ModuleType | None:
    """The compiled module of a build, or None where it is not installed."""
    try:
        return importlib.import_module(f"_clarity_engine_{build}")
    except ImportError:
        return None


@functools.cache
def modules() -> dict[str, ModuleType]:
    """The compiled modules that are installed and that this processor can run, by build, fastest first."""
    # The base build asks the processor: any other could crash the process at its first instruction.
    base = import_build("base")
    found = {build: import_build(build) for build in base.builds()} if base is not None else {}
    return {build: module for build, module in found.items() if module is not None}


def refusal(build: str) -> str:
    """Why a build cannot run on this machine; empty where it can."""
    if build in modules():
        return ""
    have = ", ".join(f"native-{build}" for build in modules())
    return f"cannot run on this machine, which has {have or 'none (pip install . with a C++ compiler builds it)'}"


def search(
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
        KeyError: the build cannot run here.
        ValueError: shapes do not agree.
    """
    found = {
        "point": np.empty(tuple(start.shape), np.float32),
        "steps": np.empty(len(start), np.int32),
        "target_prob_initial": np.empty(len(start), np.float32),
        "target_prob_final": np.empty(len(start), np.float32),
        "finite": np.empty(len(start), np.bool_),
    }
    modules()[build].search(
        weights=[as_array(weight) for weight, _ in objective.layers],
        biases=[as_array(bias) for _, bias in objective.layers],
        start=as_array(start),
        reference=as_array(rows["reference"]),
        target=as_array(rows["target"], torch.int64),
        min_target_prob=as_array(rows["min_target_prob"]),
        fixed=as_array(objective.directions),
        **found,
        max_steps=max_steps,
        distance_weight=objective.distance_weight,
        learning_rate=learning_rate,
        threads=threads,
    )
    return {name: torch.from_numpy(values) for name, values in found.items()}


def value_and_grad(layers: Layers, points: Tensor, target: Tensor, threads: int, build: str) -> tuple[Tensor, Tensor]:
    """Mean target probability (B,) of codes (B, D) and its gradient (B, D), computed as in ``search``."""
    target_prob, gradient = np.empty(len(points), np.float32), np.empty(tuple(points.shape), np.float32)
    modules()[build].value_and_grad(
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
