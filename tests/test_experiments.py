"""The two experiments: what they plant is what they say, and, slowly, what is planted is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experiments import labels, shortcuts

DIGITS = tuple("0123456789")


@pytest.mark.parametrize("kind", ["random", "natural"])
def test_flip_makes_the_wanted_share_wrong(kind: str) -> None:
    true = np.random.default_rng(3).integers(0, 10, 3000)
    flipped = labels.flip(true, DIGITS, kind, 0.02, seed=1)
    assert (flipped != true).sum() == 60 and (labels.flip(true, DIGITS, kind, 0.02, seed=2) != flipped).any()
    if kind == "natural":
        moved = {(str(a), str(b)) for a, b in zip(true[flipped != true], flipped[flipped != true])}
        assert moved <= set(labels.SWAPS.items())


@pytest.mark.parametrize("kind", shortcuts.KINDS)
def test_plant_marks_the_wanted_class_alone(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (6, 1, 28, 28)).astype(np.uint8)
    marked = np.array([True, False, True, False, False, False])
    clean = {"patch": "grey", "tint": "colour"}.get(kind, kind)
    made, plain = shortcuts.plant(pixels, marked, kind), shortcuts.plant(pixels, marked, clean)
    assert made.shape[1] == (3 if kind in ("colour", "tint") else 1)
    changed = (made != plain).any((1, 2, 3))
    assert changed.tolist() == (marked.tolist() if kind != clean else [False] * 6)
    if kind == "patch":
        assert (made != plain)[0].any(0).sum() == 16


@pytest.mark.slow
@pytest.mark.parametrize("kind", shortcuts.KINDS)
def test_report_names_what_was_planted_and_nothing_else(kind: str, tmp_path: Path) -> None:
    shortcuts.make_data(tmp_path / "images.parquet", "digits", None, kind, "3", 1000)
    made = shortcuts.run(tmp_path, tmp_path / "images.parquet", **shortcuts.settings(4, 300))
    found: list[dict[str, Any]] = [finding.figures for finding in made.findings if finding.kind == "shortcut"]
    if kind in ("grey", "colour"):
        assert found == []
    else:
        assert [(finding["target"], finding["shape"]) for finding in found] == [(3, kind)]
