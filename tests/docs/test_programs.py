"""The experiments: what they plant is what they say; slowly, what is planted is found and what is documented holds."""

import itertools
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from audits import make_tables, write_audit
from jobfiles import load_job

import clarity
from clarity.audit.queries import connect
from clarity.audit.read import read_audit
from clarity.findings.finding import gather
from clarity.findings.registry import Results, find
from clarity.judges import build_judge
from clarity.model import Model
from clarity.search import SearchConfig
from clarity.training.loops import Codes, EnsembleTraining

DIGITS = tuple("0123456789")
labels, shortcuts, ablations, pictures = (
    load_job(name, "docs") for name in ("labels", "shortcuts", "ablations", "pictures")
)
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


def test_picture_of_every_class_leaves_the_images_own_empty(tmp_path: Path) -> None:
    audit = read_audit(write_audit(tmp_path / "audit", make_tables()))
    names = audit.plan.model["class_names"]
    ids = pictures.first_images(audit, names[1:])
    axes = pictures.every_class(audit, ids).axes
    assert len(set(ids)) == len(names) - 1 and [ax.get_title() for ax in axes[1:5]] == [f"as {name}" for name in names]
    drawn = np.array([bool(ax.images) for ax in axes]).reshape(len(ids), 1 + len(names))
    assert drawn.tolist() == [[True, *(name != own for name in names)] for own in names[1:]]


def test_ablations_ask_every_variant_the_same(tiny_model: Model) -> None:
    model = replace(tiny_model, judge=build_judge((1, 8, 12), 4).eval())
    x, ids = torch.rand(3, 1, 8, 12, generator=torch.Generator().manual_seed(0)), ["a", "b", "c"]
    pairs, image = ablations.questions(model, x, ids)
    assert image.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and len(pairs) == 9
    codes = Codes(pairs.z, pairs.log_var, pairs.target)
    training = EnsembleTraining(epochs=1, min_updates=1, batch_size=4)
    made = {name: (variant, asked, config) for name, variant, asked, config in ablations.variants(
        model, codes, pairs, training
    )}  # fmt: skip
    assert list(made)[1:4] == ["from a sample", "M 1", "M 1, from a sample"] and {"eps 0", "eps 0.5"} <= set(made)
    assert made["M 1"][0].ensemble.config.num_members == 1 and made["lambda 0.1"][2].distance_weight == 0.1
    assert torch.equal(made["from a sample"][1].z, pairs.sample()) and made["gamma 0.9"][2].min_target_prob == 0.9
    trained = [made[f"eps {eps}"][0].ensemble.weights[0] for eps in ("0", "0.5")]
    assert not torch.equal(*trained) and made["eps 0"][0].ensemble.config == model.ensemble.config
    cells = ablations.measure(*made["M 1"][:2], image, SearchConfig(max_steps=2))
    assert len(cells) == len(ablations.COLUMNS) - 1 and cells[1] == "2" and "%" in cells[3]


@pytest.mark.slow
@pytest.mark.parametrize("kind", shortcuts.KINDS)
def test_report_names_what_was_planted_and_nothing_else(kind: str, tmp_path: Path) -> None:
    shortcuts.make_data(tmp_path / "images.parquet", "digits", None, kind, "3", 1000)
    made = shortcuts.run(tmp_path, tmp_path / "images.parquet", **shortcuts.settings(4, 300))
    found = {finding.kind: finding.figures for finding in made.findings if finding.kind in ("shortcut", "region")}
    if kind in ("grey", "colour"):
        assert "shortcut" not in found
    else:  # the tint's strength varies too much for an alarm
        assert list(found) == ["shortcut" if kind == "patch" else "region"]
        assert [(figures["target"], figures["shape"]) for figures in found.values()] == [(3, kind)]


def results_of_two_classes(codes: pa.Table, pairs: pa.Table, names: list[str], two: tuple[int, int]) -> Results:
    """What the checks say of the part of an audit that is about two classes."""
    source, target = (pairs[name].to_numpy() for name in ("source", "target"))
    mine = codes.filter(pa.array(np.isin(codes["source"].to_numpy(), two)))
    some = pairs.filter(pa.array(np.isin(source, two) & np.isin(target, two)))
    return find(gather(connect(mine, some), names, thresholds=(0.99, 0.99), max_steps=500))


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
