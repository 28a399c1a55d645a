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
from clarity.data.listing import as_text
from clarity.images import UnreadableImage, encode_png, to_uint8
from clarity.model import Model, load_model
from clarity.training.directory import begin, finish, require_same
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
        dataset: the name of a source, a Dataset, or (images, labels): uint8 or floats in [0, 1], (N, C, H, W),
            (N, H, W, C) or (N, H, W), with one label each, or None where a predictor teaches.
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
        plan = with_recipe(plan) or plan
        require_same(plan)
        run_stages(plan, ["recipe"], Worker(device=device, log=log))
        plan = with_recipe(plan) or plan
        if begin(plan):
            return load_model(plan.out).to(device)
        for remark in plan.data["remarks"]:
            log(remark)
        run_stages(plan, TRAINED, Worker(device=device, log=log))
        return finish(plan, log).to(device)


def write_arrays(training: Arrays, held_out: Arrays | None, scratch: str) -> str:
    """Writes arrays as a Parquet data set, named by their digest, and returns its directory."""
    parts = [(*checked_arrays(training), "train", "")]
    if held_out is not None:
        parts.append((*checked_arrays(held_out), "test", "held_out/"))
    tables, digest = [], hashlib.sha256()
    for pixels, labels, split, prefix in parts:
        digest.update(f"{split} {pixels.shape}".encode() + pixels.tobytes())
        columns = {
            "image": pa.array(encode_png(pixels), pa.binary()),
            "image_id": [f"{prefix}{i}" for i in range(len(pixels))],
            "label": labels,
        }
        tables.append(pa.table(columns | ({} if held_out is None else {"split": [split] * len(pixels)})))
    directory = os.path.join(scratch, "arrays")
    os.makedirs(directory)
    file = os.path.join(directory, f"{digest.hexdigest()}.parquet")
    pq.write_table(pa.concat_tables(tables), file, row_group_size=1024)
    return directory


def checked_arrays(arrays: Arrays) -> tuple[np.ndarray, pa.Array]:
    """Images as uint8 (N, C, H, W), and the names of their classes, null for none."""
    if len(arrays) != 2:
        raise ValueError(f"expected arrays (images, labels), got {len(arrays)} of them: leave the others out")
    pixels = as_array(arrays[0], "images of one size")
    shape = pixels.shape
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim == 4 and shape[1] not in (1, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or not pixels.size:
        raise ValueError(f"expected images (N, C, H, W), (N, H, W, C) or (N, H, W) with C = 1 or 3, got {shape}")
    if pixels.dtype == np.uint16:
        raise ValueError("expected images of uint8, or floats in [0, 1], got uint16: divide them by what is white")
    if pixels.dtype != np.uint8:
        try:
            pixels = np.stack([to_uint8(image, None) for image in pixels])
        except UnreadableImage:
            pixels = to_uint8(pixels, None)  # whose error is about all images, not about the first that has one
    return np.ascontiguousarray(pixels), label_names(arrays[1], len(pixels))


def label_names(labels: Sequence[Any] | None, count: int) -> pa.Array:
    """The names of the classes of ``count`` images: text, or whole numbers as text."""
    if labels is None:
        return pa.nulls(count, pa.string())
    values = as_array(labels, "one label for each image")
    if values.shape == (count, 1):
        values = values[:, 0]
    if values.shape != (count,):
        raise ValueError(
            f"expected one label for each of {count} images, got labels of shape {values.shape}: give names or numbers "
            "of classes, such as argmax(1) of one-hot vectors"
        )
    try:
        return as_text(pa.array(values.tolist(), from_pandas=True))
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(f"expected labels of text or whole numbers, got {error}: convert them") from None


def as_array(values: Any, expected: str) -> np.ndarray:
    """Values as an array; ValueError where their parts differ in shape."""
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(f"expected {expected}, got parts of several shapes ({error}): make them equal") from None
