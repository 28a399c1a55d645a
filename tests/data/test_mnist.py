"""MNIST in torchvision's layout."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from pictures import opened, pixels_of, random_pixels

from clarity import data
from clarity.images import Preprocessing


def write_idx(path: Path, array: np.ndarray) -> None:
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    for stem, count in (("train", 7), ("t10k", 5)):
        write_idx(tmp_path / "MNIST/raw" / f"{stem}-images-idx3-ubyte", random_pixels(count, count, 28, 28))
        write_idx(tmp_path / "MNIST/raw" / f"{stem}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    return tmp_path


def test_mnist_is_read_from_torchvisions_layout(mnist: Path) -> None:
    for place, split, count in ((mnist, "train", 7), (mnist / "MNIST", "test", 5), (mnist / "MNIST/raw", "test", 5)):
        dataset, listing = opened("mnist", place, split)
        assert listing["label_name"].to_pylist() == [str(number) for number in range(count)]
        assert listing["image_id"].to_pylist()[-1] == f"{split}/{count - 1:05d}"
        shard = data.read_images(dataset, listing.take([2, 0]), data.infer_preprocessing(dataset, listing))
        assert np.array_equal(pixels_of(shard, (1, 28, 28))[:, 0], random_pixels(count, count, 28, 28)[[2, 0]])
    both = data.list_images(data.open_dataset("mnist", mnist, "all"))
    assert len(set(both["image_id"].to_pylist())) == 12


def test_mnist_is_read_from_files_with_a_dot_in_their_names(tmp_path: Path) -> None:
    write_idx(tmp_path / "train-images.idx3-ubyte", random_pixels(0, 3, 28, 28))
    write_idx(tmp_path / "train-labels.idx1-ubyte", np.arange(3, dtype=np.uint8))
    assert opened("mnist", tmp_path)[1]["label_name"].to_pylist() == ["0", "1", "2"]


def test_mnist_is_resized_when_asked(mnist: Path) -> None:
    dataset, listing = opened("mnist", mnist)
    preprocessing = data.infer_preprocessing(dataset, listing, image_size=32, mode="RGB")
    assert preprocessing == Preprocessing("RGB", 32, 32)
    assert data.read_images(dataset, listing, preprocessing)["error"].null_count == 7
