"""Loads the programs in jobs/ and docs/ as modules, for tests that call their functions or plant a fault in them."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "jobs"))

import actors as actors  # noqa: E402
import driver as driver  # noqa: E402


def load_job(name: str, folder: str = "jobs") -> Any:
    """A fresh module of ``jobs/NAME.py``, or of another folder.

    It is not in sys.modules, so that Ray sends its functions to workers by value.
    """
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", ROOT / folder / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
