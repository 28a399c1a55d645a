"""The doors to the fast searches over stacked latent classifiers: the compiled one for CPUs, the fused one for CUDA.

Both follow Algorithm 1 as ``search.descend`` defines it: the target probability (mean over the members, float32) is
tested before each update and once after the last, each row by itself. Knows tensors and engines; does not choose one.

Shapes: B rows, D latent, K classes, M members; layers are (weight (M, in, out), bias (M, out)), a ReLU between two.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from clarity.search import SearchConfig

Layers = Sequence[tuple[Tensor, Tensor]]


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


def triton_available() -> bool:
    """Whether the fused search can run here: not yet anywhere."""
    return False


def triton_search(
    layers: Layers, start: Tensor, reference: Tensor, target: Tensor, config: SearchConfig, threads: int
) -> dict[str, Tensor]:
    """Algorithm 1 in the fused search, on a GPU."""
    raise ValueError("the fused search for CUDA is not there yet; use engine batched")
