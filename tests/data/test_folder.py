"""Folders of images: classes, splits, names, what is left out."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import HEIGHT, WIDTH, encoded, listed, pixels_of, random_pixels, write_images
from PIL import Image

from clarity import data
from clarity.images import Preprocessing


def test_folder_takes_its_classes_from_folders(tmp_path: Path) -> None:
    write_images(tmp_path, "cat/2.png", "cat/deep/er/1.PNG", "dog/1.png", "loose.png")
    expected = {"cat/2.png": "cat", "cat/deep/er/1.PNG": "cat", "dog/1.png": "dog", "loose.png": None}
    assert listed(tmp_path) == expected
    assert list(listed(tmp_path)) == sorted(expected)


def test_folder_takes_its_splits_from_folders_where_there_are_any(tmp_path: Path) -> None:
    write_images(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "extra/x.png", "loose.png")
    assert listed(tmp_path, "train") == {"train/cat/1.png": "cat", "train/dog/1.png": "dog"}
    assert listed(tmp_path, "test") == {"test/cat/1.png": "cat"}
    assert len(listed(tmp_path)) == 3
    listing = data.list_images(data.open_dataset("folder", tmp_path))
    assert data.left_out(listing) == {"images outside train/ and test/": 2}


def test_folder_takes_a_train_among_other_classes_for_a_class(tmp_path: Path) -> None:
    write_images(tmp_path, "train/1.png", "bus/1.png")
    assert listed(tmp_path) == {"bus/1.png": "bus", "train/1.png": "train"}


def test_folder_splits_by_hash_and_keeps_each_image_where_it_was(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"c{number % 2}/{number}.png" for number in range(60)))
    before = {split: set(listed(tmp_path, split)) for split in ("train", "test")}
    assert len(before["train"]) + len(before["test"]) == 60
    assert before["test"]
    write_images(tmp_path, *(f"c{number % 3}/new{number}.png" for number in range(60)))
    assert all(before[split] <= set(listed(tmp_path, split)) for split in before)


def test_folder_counts_what_it_leaves_out(tmp_path: Path) -> None:
    write_images(tmp_path, "cat/1.png", "dog/1.png", "cat/._1.png", ".hidden/2.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    listing = data.list_images(data.open_dataset("folder", tmp_path, "all"))
    assert data.left_out(listing) == {
        "hidden files": 2,
        "files without an image's extension": 1,
        "class folders without an image": 2,
    }


def test_folder_ids_do_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    write_images(tmp_path / "a", "cat/1.png", "dog/2.png")
    (tmp_path / "a").rename(tmp_path / "b")
    first = data.listing_fingerprint(data.list_images(data.open_dataset("folder", tmp_path / "b", "all")))
    write_images(tmp_path / "c/d", "cat/1.png", "dog/2.png")
    assert data.listing_fingerprint(data.list_images(data.open_dataset("folder", tmp_path / "c/d", "all"))) == first
    (tmp_path / "c/d/cat/1.png").write_bytes(b"another size")
    assert data.listing_fingerprint(data.list_images(data.open_dataset("folder", tmp_path / "c/d", "all"))) != first


def test_folder_of_mixed_sizes_and_modes_is_read(tmp_path: Path) -> None:
    for name, pixels in (
        ("a/1.png", random_pixels(0)),
        ("a/2.jpg", random_pixels(1, 30, 20, 3)),
        ("b/3.bmp", random_pixels(2, 5, 5, 3)),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(pixels, {"png": "PNG", "jpg": "JPEG", "bmp": "BMP"}[name[-3:]]))
    dataset = data.open_dataset("folder", tmp_path, "all")
    listing = data.list_images(dataset)
    assert data.infer_preprocessing(dataset, listing) == Preprocessing("RGB", 64, 64)
    assert data.infer_preprocessing(dataset, listing, image_size=(6, 9), mode="L") == Preprocessing("L", 6, 9)
    assert data.infer_preprocessing(dataset, listing.slice(0, 1)) == Preprocessing("L", HEIGHT, WIDTH)
    shard = data.read_images(dataset, listing, Preprocessing("RGB", 6, 9))
    assert shard["error"].null_count == 3


def test_inferred_size_is_that_after_turning(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "x.jpg").write_bytes(encoded(random_pixels(0, 8, 12, 3), "JPEG", exif=exif))
    dataset = data.open_dataset("folder", tmp_path, "all")
    assert data.infer_preprocessing(dataset, data.list_images(dataset)) == Preprocessing("RGB", 12, 8)


def test_large_images_are_not_the_inferred_size(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded(random_pixels(0, 129, 40)))
    dataset = data.open_dataset("folder", tmp_path, "all")
    assert data.infer_preprocessing(dataset, data.list_images(dataset)) == Preprocessing("L", 64, 64)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.binary(min_size=1, max_size=12).filter(lambda b: not set(b"/\0") & set(b) and not b.startswith(b".")),
        min_size=1,
        max_size=5,
        unique=True,
    )
)
def test_folder_reads_files_of_any_name(names: list[bytes]) -> None:

    with tempfile.TemporaryDirectory() as root:
        os.mkdir(os.path.join(root, "c"))
        for number, name in enumerate(names):
            with open(os.path.join(os.fsencode(root), b"c", name + b".png"), "wb") as file:
                file.write(encoded(random_pixels(number)))
        dataset = data.open_dataset("folder", root, "all")
        listing = data.list_images(dataset)
        shard = data.read_images(dataset, listing, Preprocessing("L", HEIGHT, WIDTH))
        assert shard["error"].null_count == len(names)
        found = {pixels.tobytes() for pixels in pixels_of(shard, (1, HEIGHT, WIDTH))}
        assert found == {random_pixels(number).tobytes() for number in range(len(names))}
        for column in ("image_id", "location"):
            assert all(text.encode() for text in listing[column].to_pylist())
