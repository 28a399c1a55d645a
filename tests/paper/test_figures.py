"""Drawings of the paper's figures: each renders to every format, the same bytes each time."""

from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.lines import Line2D

from clarity import figure
from clarity.paper import figures


def latent_map(group: str) -> figures.LatentMap:
    image = np.full((3, 8, 12), 0.5, np.float32)
    return figures.LatentMap(np.random.default_rng(0).random((6, 6)), np.array([[0.0, 0], [1, 1]]), image, group)


def curves(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).random(shape)


def search(count: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    t = np.linspace(0, 1, count + 1)
    return {"target_prob": t, "aleatoric": t * (1 - t) / 2, "epistemic": t * (1 - t) / 10}, curves(2, 3, 8, 12)


DRAWINGS = {
    "image_grid": lambda: figures.image_grid(
        [[curves(1, 8, 12), None]], ["original", "a"], ["1 → 2"], [["", "not converged"]], differences=True
    ),
    "search_traces": lambda: figures.search_traces(
        {"R": search(9), "C": search(4)}, source="3", target="8", min_target_prob=0.99
    ),
    "segment_panels": lambda: figures.segment_panels(
        {"a": [(curves(2, 9), {"lw": 1}), (curves(3, 9), {})], "b": [(curves(1, 9), {})]}, [Line2D([], [])], "t"
    ),
    "latent_paths": lambda: figures.latent_paths(
        {"FGSM": latent_map("image"), "R": latent_map("image"), "Clarity": latent_map("latent")},
        (-3, 3, -2, 2), np.zeros((5, 2)), np.ones((7, 2)), source="5", target="1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_drawing_renders_the_same_bytes_each_time(draw: Callable[[], figure.Picture]) -> None:
    picture = draw()
    assert picture.render() == draw().render()
    assert picture.get_size_inches()[0] <= 2 * figure.FULL_WIDTH


def test_grid_keeps_rows_and_columns_apart() -> None:
    rows = [[np.full((3, 8, 12), (r * 3 + q) / 10) for q in range(3)] for r in range(2)]
    picture = figures.image_grid(rows, ["original", "a", "b"], ["first", "second"], [["", "x", "y"]] * 2)
    values = [float(axis.images[0].get_array().mean()) for axis in picture.axes]
    assert values == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert [axis.get_title() for axis in picture.axes[:3]] == ["original", "a", "b"]
