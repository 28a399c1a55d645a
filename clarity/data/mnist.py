"""MNIST in the layout of torchvision: idx files, plain or gzipped."""

import functools
import gzip
import os
import zlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from PIL import Image

from clarity import storage
from clarity.data.listing import Content, Dataset, make_listing

#: How torchvision fetches it; DATA stands for a directory.
DOWNLOAD = "python -c \"from torchvision.datasets import MNIST; MNIST('DATA', download=True)\""


def list_mnist(dataset: Dataset) -> pa.Table:
    """The images of a split, named by their index in it."""
    parts = []
    for split in ("train", "test") if dataset.split == "all" else (dataset.split,):
        images, labels = load_mnist(str(dataset.data), split)
        ids = [f"{split}/{row:05d}" for row in range(len(images))]
        sizes = np.full(len(images), images.size)
        parts.append(make_listing(dataset, ids, [split] * len(images), range(len(images)), sizes, labels.astype(str)))
    return pa.concat_tables(parts)


def read_mnist(dataset: Dataset, rows: pa.Table) -> Iterator[tuple[int, Content]]:
    """The images of rows of the listing."""
    for index, (split, row) in enumerate(zip(rows["location"].to_pylist(), rows["row"].to_pylist())):
        yield index, Image.fromarray(load_mnist(str(dataset.data), split)[0][row])


@functools.lru_cache(maxsize=4)
def load_mnist(data: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,), uint8, mapped from the disk where the files are unpacked."""
    stem = {"train": "train", "test": "t10k"}[split]
    images = read_idx(data, f"{stem}-images-idx3-ubyte", 3)
    labels = read_idx(data, f"{stem}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise ValueError(
            f"expected as many labels as images in {data}, found {len(labels)} and {len(images)}: copy it again"
        )
    return images, labels


def read_idx(data: str, file: str, axes: int) -> np.ndarray:
    """The array of an idx file, plain or gzipped, in any of the directories that torchvision uses."""
    folders = [os.path.join(data, "MNIST", "raw"), os.path.join(data, "raw"), data]
    names = (file, f"{file}.gz", file.replace("-idx", ".idx"))  # some copies have a dot there
    paths = [os.path.join(folder, name) for folder in folders for name in names]
    path = next(filter(os.path.isfile, paths), None)
    if path is None:
        raise ValueError(f"expected MNIST/raw/{file}[.gz] in {data}, found none: check the path, or run {DOWNLOAD}")
    broken = f"expected a whole idx file of {axes} axes, found {path}, which is none: copy it again"
    try:
        if path.endswith(".gz"):
            content = np.frombuffer(gzip.decompress(storage.read_bytes(path)), np.uint8)
        else:
            content = np.memmap(path, np.uint8, "r") if os.path.getsize(path) else np.empty(0, np.uint8)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise ValueError(broken) from None
    start = 4 + 4 * axes
    shape = [int.from_bytes(content[byte : byte + 4].tobytes(), "big") for byte in range(4, start, 4)]
    if content[:4].tobytes() != bytes([0, 0, 8, axes]) or len(content) != start + int(np.prod(shape, dtype=np.int64)):
        raise ValueError(broken)
    return content[start:].reshape(shape)
