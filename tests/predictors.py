"""Functions that stand for a user's own model."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def as_predictor(
    call: Callable[[np.ndarray], Any], classes: Sequence[str], mode: str = "L", size: tuple[int, int] = (8, 12)
) -> Callable[[np.ndarray], Any]:
    """A function with the attributes that describe a predictor."""

    def function(pixels: np.ndarray) -> Any:
        return call(pixels)

    for name, value in {"classes": classes, "mode": mode, "size": size}.items():
        setattr(function, name, value)
    return function


def constant(classes: Sequence[str], favourite: int, **options: Any) -> Callable[[np.ndarray], Any]:
    """A predictor that gives one class 0.7, whatever it is shown."""
    probs = np.full(len(classes), 0.3 / (len(classes) - 1))
    probs[favourite] = 0.7
    return as_predictor(lambda pixels: np.tile(probs, (len(pixels), 1)), classes, **options)
