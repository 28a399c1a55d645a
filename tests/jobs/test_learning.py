"""The jobs with a user's own model: it teaches a model of images without labels, is explained, and a refit follows."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bars import write_bars

import clarity

ROOT = Path(__file__).parent.parent.parent
MODULE = """
import numpy as np

def predict(pixels):
    bands = np.stack([pixels[:, 0, 1 + 2 * k : 3 + 2 * k].mean((1, 2)) for k in range(3)], 1) / 16
    odds = np.exp(bands - bands.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)

predict.classes, predict.mode, predict.size = ["top", "middle", "bottom"], "L", (8, 12)
"""
SMALL = ["--latent-dim", "5", "--channels", "6", "7", "--hidden", "9", "--num-members", "3", "--recipe", "paper"]
BUDGET = ["--vae-epochs", "8", "--ensemble-epochs", "4"]


@pytest.mark.slow
def test_jobs_learn_from_a_predictor_explain_it_and_refit(tmp_path: Path, ray_local: Any) -> None:
    write_bars(tmp_path / "bars", 90, lambda i, _: "train" if i % 4 else "test")
    (tmp_path / "mine.py").write_text(MODULE)
    address = ray_local.get_runtime_context().gcs_address
    env = os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}

    def run(job: str, *flags: str) -> str:
        command = [sys.executable, str(ROOT / "jobs" / job), "--dataset", "folder", "--data", "bars", *flags]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    train = ["--predictor", "mine:predict", "--out", "model", *SMALL, *BUDGET]
    said = run("train.py", *train)
    assert "predictor  mine:predict: image train" in said and "(no label) is " in said
    assert "images of folder at 8 x 12 without labels" in said and "no judge" in said
    assert "predictor  the ensemble agrees on " in said and "the reconstruction alone changes its answer on" in said
    again = run("train.py", *train)
    assert again.startswith("already finished\n") and "predictor  the ensemble agrees on " in again
    before = clarity.load(tmp_path / "model")
    assert before.class_names == ("top", "middle", "bottom")

    audit = ["--predictor", "mine:predict", "--model", "model", "--split", "train", "--limit", "8", "--no-report"]
    run("explain_all.py", *audit, "--out", "audit", "--max-steps", "20")
    run("train.py", *train, "--refit", "audit")
    after = clarity.load(tmp_path / "model")
    assert after.card["predictor"]["refit"] == str(tmp_path / "audit")
    assert after.fingerprint != before.fingerprint
    files = [model.card["files"]["vae.safetensors"] for model in (before, after)]
    assert files[0] == files[1]
