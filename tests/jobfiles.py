"""Loads the programs in jobs/ as modules, for tests that call their functions or plant a fault in them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

JOBS = Path(__file__).parent.parent / "jobs"
sys.path.append(str(JOBS))

import driver as driver  # noqa: E402


def load_job(name: str) -> Any:
    """A fresh module of ``jobs/NAME.py``. Not in sys.modules, so that Ray sends its functions to workers by value."""
    spec = importlib.util.spec_from_file_location(f"job_{name}", JOBS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
