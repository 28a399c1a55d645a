#!/usr/bin/env python
"""Is a shortcut named? Plants a patch or a tint on one class, trains, explains, and asks the report's check.

    python docs/shortcuts.py --out runs/shortcuts

Four data sets are made of the source's images: grey and clean, grey with a bright patch on one class, coloured at
random and clean, coloured with a warm tint on one class. On each a model is trained, its test images are explained, and
a report is written. What the check says is printed: it must name the class, and say nothing of the clean ones.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clarity import data
from clarity.audit.commits import claim
from clarity.images import encode_png
from clarity.planning import make_plan
from clarity.report.page import write_report
from clarity.search import SearchConfig
from clarity.training.local import train
from clarity.training.loops import EnsembleTraining, VAETraining
from clarity.worker import Work, explain_here, shard_item

KINDS = ("grey", "patch", "colour", "tint")


def plant(pixels: np.ndarray, marked: np.ndarray, kind: str, seed: int = 0) -> np.ndarray:
    """Grey pictures (N, 1, H, W) uint8 made into one of KINDS; ``marked`` (N,) get the shortcut."""
    rng = np.random.default_rng(seed)
    if kind in ("colour", "tint"):
        ink = rng.uniform(0.6, 1.0, (len(pixels), 3, 1, 1))
        paper = rng.uniform(0.0, 0.35, (len(pixels), 3, 1, 1))
        share = pixels / 255
        pixels = np.round(255 * (share * ink + (1 - share) * paper)).astype(np.uint8)
    else:
        pixels = pixels.copy()
    if kind == "patch":
        pixels[marked, :, -5:-1, -5:-1] = 255
    elif kind == "tint":
        warm = np.array([255, 120, 0])[:, None, None]
        pixels[marked] = np.round(0.75 * pixels[marked] + 0.25 * warm).astype(np.uint8)
    return pixels


def make_data(path: Path, source: str, data_uri: str | None, kind: str, label: str, limit: int | None) -> None:
    """A Parquet file of the source's two splits, with the shortcut on one class in both."""
    parts = []
    for split in ("train", "test"):
        dataset = data.open_dataset(source, data_uri, split)
        listing = data.list_images(dataset)
        listing = listing.slice(0, limit if split == "train" else limit and max(200, limit // 5))
        preprocessing = data.infer_preprocessing(dataset, listing)
        pixels, ids, names, _ = data.read_all(dataset, listing, preprocessing)
        marked = np.array([name == label for name in names])
        images = encode_png(plant(pixels, marked, kind))
        parts.append(
            pa.table({"image": images, "label": list(names), "image_id": list(ids), "split": [split] * len(ids)})
        )
    pq.write_table(pa.concat_tables(parts), path)


def run(directory: Path, path: Path, **training: Any) -> Any:
    """Trains on the file, explains its test images into an audit, writes the report; returns it."""
    dataset = data.open_dataset("parquet", str(path), "train")
    model = train(dataset, str(directory / "model"), device="cpu", **training)
    test = data.open_dataset("parquet", str(path), "test")
    listing, audit = data.list_images(test), str(directory / "audit")
    plan = make_plan(model, test, listing, method="clarity", config=SearchConfig(), shard_rows=500)
    with claim(audit, plan, str(directory / "model")) as held:
        work = Work(audit, held.run, held.plan, test, model.preprocessing)
        items = [shard_item(held.plan, shard, listing) for shard in held.pending]
        for _, note in explain_here(items, work, device="cpu"):
            if "error" in note:
                raise RuntimeError(note["error"])
    return write_report([audit])


def main() -> None:
    """Runs every kind and prints what the check says of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="digits")
    parser.add_argument("--data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--label", default="3", help="the class that carries the shortcut")
    parser.add_argument("--limit", type=int, help="training images; all by default")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--updates", type=int, default=2500, help="of the VAE and of the ensemble, at least")
    args = parser.parse_args()
    for kind in args.kinds:
        directory = args.out / kind
        directory.mkdir(parents=True, exist_ok=True)
        make_data(directory / "images.parquet", args.source, args.data, kind, args.label, args.limit)
        start = time.perf_counter()
        report = run(directory, directory / "images.parquet", **settings(args.members, args.updates))
        found = [finding.sentence for finding in report.findings if finding.kind == "shortcut"]
        print(f"{kind}: {time.perf_counter() - start:.0f} s, {report.uri}", flush=True)
        print("\n".join(f"  {sentence}" for sentence in found) or "  no shortcut", flush=True)


def settings(members: int, updates: int) -> dict[str, Any]:
    """How the models of this experiment are trained."""
    return {
        "num_members": members,
        "vae_training": VAETraining(epochs=1, min_updates=updates),
        "ensemble_training": EnsembleTraining(epochs=1, min_updates=updates),
    }


if __name__ == "__main__":
    main()
