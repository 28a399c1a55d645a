"""Train a model in this process, from a data source or from arrays."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from clarity import storage
from clarity.data import Dataset, held_out_of, open_dataset
from clarity.images import encode_png
from clarity.model import Model, load_model
from clarity.training.directory import begin, finish
from clarity.training.plan import plan_training
from clarity.training.recipe import with_recipe
from clarity.training.stages import TRAINED, Worker, run_stages

Arrays = tuple[Any, Sequence[Any] | None]


def train(
    dataset: str | Dataset | Arrays = "digits",
    out: storage.URI | None = None,
    *,
    data: storage.URI | None = None,
    held_out: Dataset | Arrays | None = None,
    device: str = "auto",
    log: Callable[[str], None] = lambda line: None,
    **fields: Any,
) -> Model:
    """Trains a model in this process (``clarity.train``), with the loops and the directory of jobs/train.py.

    Args:
        dataset: the name of a source, a Dataset, or (images, labels): uint8 or floats in [0, 1], (N, C, H, W) or
            (N, H, W), with one label each, or None where a predictor teaches.
        out: the model directory; None keeps the model in memory only.
        data: path or URI of a named source's data.
        held_out: for the metrics; by default test, or validation where there is no test; one in ten of the arrays.
        device: "auto" takes a GPU when there is one.
        log: receives lines about the progress; ``print`` shows them.
        fields: as in ``plan_training``, such as ``predictor``, a function of your own that the ensemble learns from.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        about: dict[str, Any] = {}
        if isinstance(dataset, tuple):
            about = {"source": "arrays", "uri": None}
            tested = held_out if isinstance(held_out, tuple) else None
            dataset = open_dataset("parquet", write_arrays(dataset, tested, scratch))
            held_out = None if tested else held_out  # the split test of the files
        elif isinstance(dataset, str):
            dataset = open_dataset(dataset, data, unlabelled=True)
        if held_out is None:
            held_out = held_out_of(dataset)
        if not isinstance(held_out, Dataset):
            found = type(held_out).__name__
            raise ValueError(f"held_out: expected a Dataset, or arrays where the others are arrays, got a {found}")
        if out is None:
            out = os.path.join(scratch, "model")
        plan = plan_training(str(out), dataset, held_out, **fields)
        plan = replace(plan, data=plan.data | about)
        run_stages(plan, ["recipe"], Worker(device=device, log=log))
        plan = with_recipe(plan) or plan
        if begin(plan):
            return load_model(plan.out).to(device)
        run_stages(plan, TRAINED, Worker(device=device, log=log))
        return finish(plan, log).to(device)


def write_arrays(training: Arrays, held_out: Arrays | None, scratch: str) -> str:
    """Writes arrays as a Parquet data set, named by their digest, and returns its directory."""
    parts = [(checked_pixels(*training), training[1], "train", "")]
    if held_out is not None:
        parts.append((checked_pixels(*held_out), held_out[1], "test", "held_out/"))
    tables, digest = [], hashlib.sha256()
    for pixels, labels, split, prefix in parts:
        digest.update(f"{split} {pixels.shape}".encode() + pixels.tobytes())
        names = [None] * len(pixels) if labels is None else [str(label) for label in labels]
        columns = {
            "image": pa.array(encode_png(pixels), pa.binary()),
            "image_id": [f"{prefix}{i}" for i in range(len(pixels))],
            "label": pa.array(names, pa.string()),
        }
        tables.append(pa.table(columns | ({} if held_out is None else {"split": [split] * len(pixels)})))
    directory = os.path.join(scratch, "arrays")
    os.makedirs(directory)
    file = os.path.join(directory, f"{digest.hexdigest()}.parquet")
    pq.write_table(pa.concat_tables(tables), file, row_group_size=1024)
    return directory


def checked_pixels(images: Any, labels: Sequence[Any] | None) -> np.ndarray:
    """Images as uint8 (N, C, H, W)."""
    pixels = np.asarray(images)
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or (labels is not None and len(pixels) != len(labels)):
        raise ValueError(
            f"expected images (N, C, H, W) or (N, H, W) with C = 1 or 3 and N labels, got {pixels.shape} "
            f"and {'no' if labels is None else len(labels)} labels"
        )
    if pixels.dtype != np.uint8:
        if not (np.issubdtype(pixels.dtype, np.floating) and pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError(f"expected images of uint8, or floats in [0, 1], got {pixels.dtype}")
        pixels = np.round(pixels * 255).astype(np.uint8)
    return np.ascontiguousarray(pixels)
