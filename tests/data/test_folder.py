"""Folders of images: classes, splits, names, what is left out."""

import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import GREY, encoded, listed, opened, pixels_of, random_pixels, read, write_images

from clarity import data
from clarity.images import Preprocessing


def test_folder_takes_its_classes_from_folders(tmp_path: Path) -> None:
    write_images(tmp_path, "cat/2.png", "cat/deep/er/1.PNG", "dog/1.png", "loose.png")
    expected = {"cat/2.png": "cat", "cat/deep/er/1.PNG": "cat", "dog/1.png": "dog", "loose.png": None}
    assert listed(tmp_path) == expected
    assert list(listed(tmp_path)) == sorted(expected)


def test_folder_takes_its_splits_from_folders_where_there_are_any(tmp_path: Path) -> None:
    write_images(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "loose.png")
    assert listed(tmp_path, "train") == {"train/cat/1.png": "cat", "train/dog/1.png": "dog"}
    assert listed(tmp_path, "test") == {"test/cat/1.png": "cat"}
    assert len(listed(tmp_path)) == 3
    listing = data.list_images(data.open_dataset("folder", tmp_path))
    assert data.left_out(listing) == {"images beside test/, train/": 1}
    write_images(tmp_path, "val/cat/2.png")
    assert data.open_dataset("folder", tmp_path, "held-out").split == "test"
    assert listed(tmp_path, "validation") == {"val/cat/2.png": "cat"}


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("train", "val", "validation"),
        ("Train", "Test", "test"),
        ("training", "validation", "validation"),
        ("TRAIN", "valid", "validation"),
        ("train", "dev", "validation"),
        ("training", "testing", "test"),
    ],
)
def test_folder_knows_the_usual_names_of_splits(train: str, other: str, split: str, tmp_path: Path) -> None:
    write_images(tmp_path, f"{train}/cat/1.png", f"{train}/dog/1.png", f"{other}/cat/1.png")
    assert listed(tmp_path, "train") == {f"{train}/cat/1.png": "cat", f"{train}/dog/1.png": "dog"}
    assert listed(tmp_path, split) == listed(tmp_path, other) == {f"{other}/cat/1.png": "cat"}
    held_out = data.open_dataset("folder", tmp_path, "held-out")
    assert held_out.split == split
    assert set(listed(tmp_path, "all").values()) == {"cat", "dog"}


def test_folder_without_splits_says_how_many_images_its_ids_hold_out(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"cat/{number}.png" for number in range(40)))
    counts = {split: len(listed(tmp_path, split)) for split in ("train", "test")}
    assert sum(counts.values()) == 40 and 0 < counts["test"] < 10
    said = f"the data names no splits: {counts['test']} of 40 images, chosen by their ids, are the split test"
    for split in counts:
        (note,) = data.notes(data.list_images(data.open_dataset("folder", tmp_path, split)))
        assert note.startswith(said)
    assert data.notes(data.list_images(data.open_dataset("folder", tmp_path, "all"))) == []
    few = tmp_path / "few"
    write_images(few, "cat/0.png")
    with pytest.raises(ValueError, match=r"found none; the data names no splits: 0 of 1 images"):
        listed(few, "held-out")


@pytest.mark.parametrize(
    ("name", "related"),
    [
        ("aug_Y{0}_0_{1}.png", True),
        ("person{0}-bacteria ({1}).png", True),
        ("{0}{1}.png", False),
        ("image_{0}{1}.png", False),
        ("2_{0}{1}.png", False),
        ("{0}-{1}_n.png", False),
    ],
)
def test_folder_without_splits_names_images_of_one_series(name: str, related: bool, tmp_path: Path) -> None:
    write_images(tmp_path, *(f"cat/{name.format(number, turn)}" for number in range(10, 30) for turn in range(4)))
    (note,) = data.notes(data.list_images(data.open_dataset("folder", tmp_path, "train")))
    assert ("test images are named like training images but for the last number (cat/" in note) == related
    assert note in data.notes(data.list_images(data.open_dataset("folder", tmp_path, "test")))
    assert note.endswith("if several show one object or person, name splits")


@pytest.mark.parametrize(
    ("train", "test"), [("Final_Training", "Final_Test"), ("seg_train", "seg_test"), ("train2017", "TestImages")]
)
def test_folder_reads_splits_within_names_and_says_so(train: str, test: str, tmp_path: Path) -> None:
    write_images(tmp_path, f"{train}/a/1.png", f"{train}/b/2.png", f"{test}/a/3.png")
    listing = data.list_images(data.open_dataset("folder", tmp_path, "train"))
    assert listing["label_name"].to_pylist() == ["a", "b"]
    assert f"{train}/ is read as the split train" in data.notes(listing)
    assert listed(tmp_path, "test") == {f"{test}/a/3.png": "a"}


def test_folder_leaves_classes_with_the_word_of_a_split_alone(tmp_path: Path) -> None:
    write_images(tmp_path, "freight train/1.png", "passenger-train/2.png", "bus/3.png")
    assert set(listed(tmp_path).values()) == {"freight train", "passenger-train", "bus"}
    write_images(tmp_path / "other", "images/a/1.png", "test-images/a/1.png")
    with pytest.raises(ValueError, match=r"test-images/ beside images/: if .* are splits, move images/ away"):
        listed(tmp_path / "other")


def test_folder_names_what_it_leaves_out(tmp_path: Path) -> None:
    write_images(tmp_path, "cat/1.png", "dog/1.png", "@eaDir/1.png", "$RECYCLE.BIN/1.png", "cat/@eaDir/1.png")
    write_images(tmp_path, "__MACOSX/1.png")
    for empty in ("lost+found", "empty"):
        (tmp_path / empty).mkdir()
    (tmp_path / "kitty").symlink_to("cat")
    assert listed(tmp_path) == {"cat/1.png": "cat", "dog/1.png": "dog"}
    listing = data.list_images(data.open_dataset("folder", tmp_path, "all"))
    assert data.left_out(listing) == {
        "files in folders of the system ($RECYCLE.BIN, @eaDir, __MACOSX)": 4,
        "class folders linked to others (kitty)": 1,
        "class folders without an image (empty)": 1,
    }


def test_folder_notes_a_folder_that_may_only_wrap_classes(tmp_path: Path) -> None:
    write_images(tmp_path, "Dataset/0/1.png", "Dataset/1/2.png", "Examples/1.png", "cat/deep/1.png")
    (note,) = data.notes(data.list_images(data.open_dataset("folder", tmp_path, "all")))
    assert note.startswith("1 class has all its images in folders below (Dataset: 0, 1), which are not read as")
    assert note.endswith(f"if they are, name {tmp_path}/Dataset")
    assert data.notes(data.list_images(data.open_dataset("folder", tmp_path / "Dataset", "all"))) == []
    write_images(tmp_path / "split", "train/Images/0/1.png", "train/Images/1/2.png", "test/Images/0/3.png")
    (note,) = data.notes(data.list_images(data.open_dataset("folder", tmp_path / "split", "train")))
    assert note.endswith(f"if they are, name {tmp_path}/split/train/Images")


@pytest.mark.parametrize("split", ["", "train/"])
def test_folder_that_holds_all_classes_once_more_is_no_class(split: str, tmp_path: Path) -> None:
    write_images(tmp_path, *(f"{split}{name}" for name in ("yes/1.png", "no/2.png", "more data/yes/3.png")))
    with pytest.raises(ValueError, match=r"found more data/ with folders named as those beside it \(yes\)"):
        listed(tmp_path)
    write_images(tmp_path, f"{split}more data/cat/4.png")
    assert set(listed(tmp_path).values()) == {"yes", "no", "more data"}


@pytest.mark.parametrize("above", ["", "train/"])
@pytest.mark.parametrize(
    "names",
    [
        ("images", "masks"),
        ("Image", "Labels"),
        ("JPEGImages", "SegmentationClass"),
        ("fold_1", "fold_2"),
        ("part1", "part2"),
        ("x_part_1", "data"),
    ],
)
def test_folder_refuses_folders_that_are_named_for_what_they_hold(
    names: tuple[str, str], above: str, tmp_path: Path
) -> None:
    write_images(tmp_path, *(f"{above}{name}/1.png" for name in (*names, "cat")))
    with pytest.raises(ValueError, match=f"named for what they hold .*{names[0]}.*: to read one alone, name it; if"):
        listed(tmp_path)
    (tmp_path / "labels.csv").write_text(f"file_name,label\n{above}{names[0]}/1.png,owl\n")
    assert listed(tmp_path)[f"{above}{names[0]}/1.png"] == "owl", "a table names the classes"


def test_folder_takes_one_folder_of_such_a_name_for_a_class(tmp_path: Path) -> None:
    write_images(tmp_path, "labels/1.png", "bottles/2.png", "part/3.png", "apart 1/4.png")
    assert set(listed(tmp_path).values()) == {"labels", "bottles", "part", "apart 1"}


def test_folder_classes_in_two_forms_of_unicode_are_one(tmp_path: Path) -> None:
    write_images(tmp_path, "caf\u00e9/1.png", "cafe\u0301/2.png", "Tea/1.png", "tea/2.png")
    listing = data.list_images(data.open_dataset("folder", tmp_path, "all"))
    assert data.class_names_of(listing) == ("Tea", "caf\u00e9", "tea")
    unicode, case = data.notes(listing)
    assert "'caf\u00e9' is written in two ways" in unicode
    assert "differ in case only: Tea, tea" in case
    assert data.label_indices(pa.array(["cafe\u0301", "tea"]), ("Tea", "caf\u00e9", "tea")).to_pylist() == [1, 2]


FOREIGN = {
    "images.tar": "tar archives",
    "shard-00.tar.gz": "tar archives",
    "images.zip": "zip archives",
    "data-00000-of-00001.arrow": "Arrow files",
    "x.tfrecord": "TFRecord",
    "a.lance/data/x": "Lance",
    "train.npz": "files of arrays",
    "train-0.parquet": "Parquet files",
    "t10k-images-idx3-ubyte.gz": "files of MNIST's format",
    "train-images.idx3-ubyte": "files of MNIST's format",
    "cifar-10-batches-py/data_batch_1": "files of CIFAR's format",
    "cifar-100-python/train": "files of CIFAR's format",
    "a/scan.nii.gz": "images of a format that is not read",
    "a/IMG_1.HEIC": "images of a format that is not read",
}


@pytest.mark.parametrize(("name", "what"), FOREIGN.items())
def test_folder_refuses_other_formats_by_name(name: str, what: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"found .*{what}.*: (unpack|export|write|read|convert)"):
        listed(tmp_path)
    if "/" not in name:
        with pytest.raises(ValueError, match=f"expected a folder, found .*{what}"):
            listed(tmp_path / name)


def test_folder_of_train_alone_is_split_where_train_itself_is_named(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"train/{number % 2}/{number}.png" for number in range(40)))
    with pytest.raises(ValueError, match="found train alone: to hold out one image in ten, name the folder train/"):
        data.open_dataset("folder", tmp_path, "held-out")
    assert 0 < len(listed(tmp_path / "train", "held-out")) < 12


def test_folder_splits_by_hash_and_keeps_each_image_where_it_was(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"c{number % 2}/{number}.png" for number in range(60)))
    before = {split: set(listed(tmp_path, split)) for split in ("train", "test")}
    assert len(before["train"]) + len(before["test"]) == 60
    assert before["test"]
    write_images(tmp_path, *(f"c{number % 3}/new{number}.png" for number in range(60)))
    assert all(before[split] <= set(listed(tmp_path, split)) for split in before)


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
        ("b/4.JFIF", random_pixels(3, 5, 5)),
        ("b/5.jpe", random_pixels(4, 129, 40)),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(pixels, {"png": "PNG", "bmp": "BMP"}.get(name[-3:], "JPEG")))
    dataset, listing = opened("folder", tmp_path, "all")
    assert data.infer_preprocessing(dataset, listing) == Preprocessing("RGB", 64, 64)
    assert data.infer_preprocessing(dataset, listing, image_size=(6, 9), mode="L") == Preprocessing("L", 6, 9)
    assert data.infer_preprocessing(dataset, listing.slice(0, 1)) == GREY
    assert data.infer_preprocessing(dataset, listing.slice(4)) == Preprocessing("L", 64, 64), "large images are reduced"
    shard = data.read_images(dataset, listing, Preprocessing("RGB", 6, 9))
    assert shard["error"].null_count == 5


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
        shard = read(root)
        assert shard["error"].null_count == len(names)
        found = {pixels.tobytes() for pixels in pixels_of(shard)}
        assert found == {random_pixels(number).tobytes() for number in range(len(names))}
        assert all(text.encode() for text in shard["image_id"].to_pylist())
