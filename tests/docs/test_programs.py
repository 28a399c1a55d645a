"""The experiments: what they plant is what they say; slowly, what is planted is found and what is documented holds."""

from __future__ import annotations

import itertools
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from jobfiles import load_job

import clarity
from clarity.audit.queries import connect
from clarity.findings.finding import gather
from clarity.findings.registry import Results, find

DIGITS = tuple("0123456789")
labels, shortcuts = load_job("labels", "docs"), load_job("shortcuts", "docs")
ROOT = Path(__file__).parent.parent.parent


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


def results_of_two_classes(codes: pa.Table, pairs: pa.Table, names: list[str], two: tuple[int, int]) -> Results:
    """What the checks say of the part of an audit that is about two classes."""
    source, target = (pairs[name].to_numpy() for name in ("source", "target"))
    mine = codes.filter(pa.array(np.isin(codes["source"].to_numpy(), two)))
    some = pairs.filter(pa.array(np.isin(source, two) & np.isin(target, two)))
    return find(gather(connect(mine, some), names, config={"min_target_prob": 0.99, "max_steps": 500}))


@pytest.mark.slow
def test_clean_digits_and_two_classes_of_them_raise_no_alarm(tmp_path: Path) -> None:
    shortcuts.make_data(tmp_path / "images.parquet", "digits", None, "grey", "3", None)
    made = shortcuts.run(tmp_path, tmp_path / "images.parquet", **shortcuts.settings(10, 1000))
    judged = {"shortcut", "region", "labels", "epistemic", "asymmetry", "attributes"}
    assert not [finding.title for finding in made.findings if finding.level == "alert"]
    audit = clarity.read_audit(str(tmp_path / "audit"))
    codes, pairs = audit.codes.to_table(), audit.counterfactuals.to_table()
    for two in itertools.combinations(range(10), 2):
        found = results_of_two_classes(codes, pairs, audit.class_names, two).findings
        assert not [f.title for f in found if f.level == "alert" or (f.level == "look" and f.kind in judged)]


def test_documented_answers_are_of_one_audit() -> None:
    """The README's first screen and docs/queries.md name the same images in the same order."""
    shown = re.findall(r"│ (test/\d+) ", (ROOT / "README.md").read_text().split("<!-- query -->")[1].split("\n\n\n")[0])
    part = (ROOT / "docs" / "queries.md").read_text().split("### `closest_to`")[1].split("\n### ")[0]
    assert len(shown) == 3 and re.findall(r"^(test/\d+) ", part, re.MULTILINE) == shown


@pytest.mark.slow
def test_first_command_prints_what_the_readme_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same order, and with the same answers but for the last digits, which differ from CPU to CPU."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, str(ROOT / "jobs" / "explain_all.py")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert run.returncode == 0, run.stderr
    block = (ROOT / "README.md").read_text().split("<!-- main output -->\n```\n")[1].split("```")[0]
    begins = [line.split()[0] for line in block.splitlines() if line != "..."]
    printed = iter(line.split()[0] for line in run.stdout.splitlines())
    assert all(word in printed for word in begins)  # consumes what it passes: the order counts
    monkeypatch.chdir(tmp_path)
    first_screen = runpy.run_path(str(ROOT / "docs" / "queries.py"))["first_screen"]
    documented = re.findall(r"│ (test/\d+) ", (ROOT / "README.md").read_text())
    found = re.findall(r"│ (test/\d+) ", first_screen((ROOT / "README.md").read_text()))
    assert len(set(documented) & set(found)) >= 2
