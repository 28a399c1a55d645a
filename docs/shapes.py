#!/usr/bin/env python
"""Is anything wired to digits or faces? Draws colour pictures of another size and kind, and runs the jobs on them.

    python docs/shapes.py --out runs/shapes

The classes are shapes, in colours, sizes and places that say nothing of the class, on a striped ground.
They lie as a folder of PNG files; training, explanation, verification and report are the jobs as they are. What the
model's card and the audit say is printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

JOBS = Path(__file__).resolve().parents[1] / "jobs"
CLASSES = ("cross", "disc", "ring", "square")


def draw(shape: str, rng: np.random.Generator, height: int = 32, width: int = 32) -> np.ndarray:
    """One picture (H, W, 3) uint8: a shape of a random colour, size and place on a striped ground of another."""
    y, x = np.mgrid[:height, :width].astype(float)
    radius = rng.uniform(0.26, 0.36) * min(height, width)
    down, right = (np.abs(axis - rng.uniform(0.42, 0.58) * size) for axis, size in ((y, height), (x, width)))
    distance = {
        "cross": np.minimum(np.maximum(down, 3 * right), np.maximum(3 * down, right)),
        "disc": np.hypot(down, right),
        "ring": radius / 2 + 1.6 * np.abs(np.hypot(down, right) - 0.75 * radius),
        "square": 1.1 * np.maximum(down, right),
    }[shape]
    inside = 1 / (1 + np.exp(2 * (distance - radius)))[..., None]
    light, dark = rng.uniform(0.6, 1, 3), rng.uniform(0, 0.4, 3)
    ink, ground = (light, dark) if rng.random() < 0.5 else (dark, light)
    stripes = 0.04 * np.sin(2 * np.pi * (x if rng.random() < 0.5 else y) / 6)[..., None]
    pixels = inside * ink + (1 - inside) * (ground + stripes) + rng.normal(0, 0.02, (height, width, 3))
    return np.round(255 * pixels.clip(0, 1)).astype(np.uint8)


def make_folder(place: Path, count: int, classes: tuple[str, ...] = CLASSES, size: tuple[int, int] = (32, 32)) -> None:
    """``count`` pictures in a folder for each class; which are tested is drawn from their names, as for any folder."""
    rng = np.random.default_rng(0)
    for number in range(count):
        shape = classes[number % len(classes)]
        file = place / shape / f"{number:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(shape, rng, *size)).save(file)


def run(job: str, *arguments: str) -> None:
    """Run a job as a command; a job that fails ends this."""
    subprocess.run([sys.executable, str(JOBS / job), *arguments], check=True)


def main() -> None:
    """Draw, train, explain, verify, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/shapes")
    parser.add_argument("--images", type=int, default=4000)
    args, training = parser.parse_known_args()
    out = Path(args.out)
    if not (out / "images").exists():
        make_folder(out / "images", args.images)
    data = ["--dataset", "folder", "--data", str(out / "images")]
    run("train.py", *data, "--out", str(out / "model"), "--vae", "beta_vae", *training)
    run("explain_all.py", *data, "--model", str(out / "model"), "--out", str(out / "audit"))
    run("verify.py", str(out / "audit"))
    card = json.loads((out / "model" / "model.json").read_text())
    print(json.dumps(card["metrics"], indent=1))


if __name__ == "__main__":
    main()
