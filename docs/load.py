#!/usr/bin/env python
"""A million pairs in one run: does memory stay flat, how many files are there, what does the driver cost?

    python docs/load.py MODEL --dataset mnist --data DATA --out runs/load

Makes a Parquet data set of ``--images`` pictures (those of the source, moved by up to two pixels, with noise), explains
it with ``jobs/explain_all.py --images none`` on ``--cpus`` cores, and samples all processes of the job meanwhile: their
proportional set size (what they hold, shared pages divided among their holders) and their CPU time, by role. Prints
Markdown; the samples stay in OUT/samples.json. Linux alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clarity import data
from clarity.images import Preprocessing, encode_png

ROOT = Path(__file__).parent.parent
CHUNK = 4096
#: Of the shards, at which the table looks.
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
TICKS = os.sysconf("SC_CLK_TCK")


def make_data(path: Path, source: data.Dataset, images: int) -> None:
    """A Parquet file of so many digits: those of the source over and over, no two alike."""
    listing = data.list_images(source)
    pixels = np.stack(data.read_images(source, listing, Preprocessing("L", 28, 28))["image"].to_numpy())
    pixels = pixels.reshape(-1, 1, 28, 28)
    labels = listing["label_name"].to_pylist()
    kinds = pa.schema(
        [("image_id", pa.string()), ("label", pa.string()), ("split", pa.string()), ("image", pa.binary())]
    )
    with pq.ParquetWriter(path, kinds) as writer:
        for start in range(0, images, CHUNK):
            rng = np.random.default_rng(start)
            rows = np.arange(start, min(start + CHUNK, images))
            made = pixels[rows % len(pixels)].astype(int)
            for picture, by in zip(made, rng.integers(-2, 3, (len(rows), 2))):
                picture[0] = np.roll(picture[0], by, (0, 1))
            made = np.clip(made + rng.integers(-8, 9, made.shape), 0, 255).astype(np.uint8)
            names = [[f"{row:07d}" for row in rows], [labels[row % len(labels)] for row in rows], ["test"] * len(rows)]
            writer.write_table(pa.table([*names, list(encode_png(made))], schema=kinds))


# ---- looking on ----------------------------------------------------------------------------------------------------


def processes(root: int) -> list[int]:
    """A process and all that descend from it."""
    children = defaultdict(list)
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            children[int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])].append(int(name))
        except OSError:
            continue
    found, todo = [], [root]
    while todo:
        found.append(todo.pop())
        todo += children[found[-1]]
    return found


def role(pid: int, driver: int) -> str:
    """What a process is for in the job."""
    if pid == driver:
        return "driver"
    command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    if "ExplainShard" in command:
        return "actors"
    return "readers and writers" if command.startswith("ray::") else "Ray"


def sample(driver: int) -> dict[str, Any]:
    """MB by role (the largest process of it, for workers come and go), and the driver's CPU seconds."""
    memory: dict[str, float] = defaultdict(float)
    for pid in processes(driver):
        try:
            kind = role(pid, driver)
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            memory[kind] = max(memory[kind], int(text.partition("Pss:")[2].split()[0]) / 1024)
        except (OSError, IndexError):
            continue
    fields = Path(f"/proc/{driver}/stat").read_text().rpartition(")")[2].split()
    return {"memory": dict(memory), "cpu": (int(fields[11]) + int(fields[12])) / TICKS}


def watch(command: list[str], env: dict[str, str], every: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Run a command to its end: samples with their second and the shards done by then, and what it printed."""
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()))
    reader.start()
    samples, start = [], time.monotonic()
    while process.poll() is None:
        done = [int(line.split()[0]) for line in list(lines) if " shards, " in line and " of " in line[:12]]
        try:
            samples.append(sample(process.pid) | {"second": time.monotonic() - start, "done": max(done, default=0)})
        except (OSError, IndexError):
            break
        time.sleep(every)
    reader.join()
    if process.wait():
        raise SystemExit("".join(lines))
    return samples, lines


def table(samples: list[dict[str, Any]], shards: int) -> list[str]:
    """Memory by role as the shards are done, and the driver's CPU time for each of them."""
    lines = [
        "| of the shards done | second | driver | largest actor | largest reader or writer | largest of Ray's own |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for share in SHARES:
        at = next(s for s in samples if s["done"] >= share * shards)
        shown = [f"{at['memory'].get(kind, 0):.0f} MB" for kind in ("driver", "actors", "readers and writers", "Ray")]
        lines.append(f"| {share:.0%} | {at['second']:.0f} | {' | '.join(shown)} |")
    first, last = (next(s for s in samples if s["done"] >= share * shards) for share in (SHARES[0], SHARES[-1]))
    spent = (last["cpu"] - first["cpu"]) / (last["done"] - first["done"])
    most = {kind: max(s["memory"].get(kind, 0) for s in samples) for kind in ("driver", "actors")}
    lines += ["", f"driver: {spent:.3f} CPU seconds for each shard between {SHARES[0]:.0%} and {SHARES[-1]:.0%}"]
    lines += [f"driver: {samples[-1]['cpu']:.0f} CPU seconds in all, listing and verification with it"]
    lines += [f"most at any time: driver {most['driver']:.0f} MB, an actor {most['actors']:.0f} MB"]
    return lines


def main() -> None:
    """Make, run, look on, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model of 28 x 28 grey images in 10 classes")
    parser.add_argument("--dataset", default="digits", choices=["digits", "mnist"], help="whose pictures (digits)")
    parser.add_argument("--data", help="where they lie, for mnist")
    parser.add_argument("--images", type=int, default=111_112, help="times 9 targets each (111112)")
    parser.add_argument("--cpus", type=int, default=2, help="of the job's Ray (2)")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between samples (2)")
    parser.add_argument("--out", type=Path, default=Path("runs/load"), help="where everything goes (runs/load)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    images = args.out / f"images-{args.images}.parquet"
    if not images.exists():
        make_data(images.with_suffix(".tmp"), data.open_dataset(args.dataset, args.data, "train"), args.images)
        images.with_suffix(".tmp").rename(images)
    audit = args.out / "audit"
    shutil.rmtree(audit, ignore_errors=True)
    command = [sys.executable, str(ROOT / "jobs/explain_all.py"), "--dataset", "parquet", "--data", str(images)]
    command += ["--model", args.model, "--out", str(audit), "--images", "none", "--no-report"]
    directory = tempfile.mkdtemp(prefix="r-", dir="/tmp")
    env = os.environ | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": directory, "RAY_ADDRESS": "local"}
    env |= {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": args.cpus})}
    samples, lines = watch(command, env, args.every)
    shutil.rmtree(directory, ignore_errors=True)
    (args.out / "samples.json").write_text(json.dumps(samples))
    shards = len(list(audit.glob("_commits/*.json")))
    files = [path for path in audit.rglob("*") if path.is_file()]
    print("".join(lines))
    print("\n".join(table(samples, shards)))
    print(f"files: {len(files)} for {shards} shards, {sum(path.stat().st_size for path in files) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
