"""Parquet files: columns, row groups, memory."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import GREY, HEIGHT, WIDTH, encoded, listed, parquet_table, pixels_of, random_pixels, read, write_images

from clarity import data, storage

ROOT = Path(__file__).parent.parent.parent


def test_parquet_has_optional_labels_ids_and_splits(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(parquet_table(3), path)
    assert listed(path, source="parquet") == {"00000000": None, "00000001": None, "00000002": None}
    pq.write_table(
        parquet_table(3, label=["b", None, "a"], image_id=["x", "y", "z"], split=["train", "test", "train"]), path
    )
    assert listed(path, "train", "parquet") == {"x": "b", "z": "a"}
    assert listed(path, "test", "parquet") == {"y": None}
    pq.write_table(parquet_table(3, label=pa.array(["b", None, "a"]).dictionary_encode(), image_id=[7, 8, 9]), path)
    assert listed(path, source="parquet") == {"7": "b", "8": None, "9": "a"}
    pq.write_table(parquet_table(2, label=[12, None], split=["train", "extra"]), path)
    listing = data.list_images(data.open_dataset("parquet", path))
    assert listing["label_name"].to_pylist() == ["12"]
    assert data.left_out(listing) == {"rows whose split is none of train, validation and test": 1}


def test_parquet_without_splits_says_how_many_rows_its_ids_hold_out(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pq.write_table(parquet_table(30), tmp_path / f"{name}.parquet")
    tests = len(listed(tmp_path, "test", "parquet"))
    for split in ("train", "test"):
        (note,) = data.notes(data.list_images(data.open_dataset("parquet", tmp_path, split)))
        assert note.startswith(f"the data names no splits: {tests} of 60 images, chosen by their ids")
    pq.write_table(parquet_table(2, split=["train", "test"]), tmp_path / "x.parquet")
    assert data.notes(data.list_images(data.open_dataset("parquet", tmp_path / "x.parquet", "test"))) == []


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_parquet_images_may_be_plain_bytes(kind: pa.DataType, tmp_path: Path) -> None:
    ids = pa.array(["x", "y"], pa.string_view())
    images = pa.array([encoded(random_pixels(0)), None], kind)
    pq.write_table(pa.table({"image": images, "image_id": ids}), tmp_path / "x.parquet")
    shard = read(tmp_path, "parquet")
    assert shard["image_id"].to_pylist() == ["x", "y"]
    assert shard["error"].to_pylist() == [None, "expected the bytes of an image, found null: fill or drop the row"]


def test_parquet_directory_is_one_data_set(tmp_path: Path) -> None:
    for number, name in enumerate(("b.parquet", "a/c.parquet", "_SUCCESS", "_tmp/d.parquet", ".e.parquet")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith("parquet"):
            pq.write_table(parquet_table(2 + number, label=[number] * (2 + number)), tmp_path / name)
        else:
            (tmp_path / name).touch()
    dataset = data.open_dataset("parquet", tmp_path, "all")
    listing = data.list_images(dataset)
    assert listing["image_id"].to_pylist()[2:4] == ["a/c.parquet#00000002", "b.parquet#00000000"]
    assert listing["label_name"].to_pylist() == ["1", "1", "1", "0", "0"]
    shard = data.read_images(dataset, listing.take([4, 1, 3, 0]), GREY)
    expected = [random_pixels(1), random_pixels(1), random_pixels(0), random_pixels(0)]
    assert np.array_equal(pixels_of(shard)[:, 0], expected)


def test_parquet_carries_integers_and_booleans_as_they_are(tmp_path: Path) -> None:
    columns = {"old": [3, None], "wild": [True, False], "year": pa.array([1999, 2024], pa.uint16()), "w": [1 << 40, 2]}
    pq.write_table(parquet_table(2, price=[0.5, 1.5], **columns), tmp_path / "x.parquet")
    dataset = data.open_dataset("parquet", tmp_path / "x.parquet", "all", attributes=("all",))
    assert dataset.attributes == ("old", "wild", "year", "w")
    listing = data.list_images(dataset)
    shard = data.read_images(dataset, listing, GREY)
    types = [shard.schema.field(name).type for name in dataset.attributes]
    assert types == [pa.int64(), pa.bool_(), pa.uint16(), pa.int64()]
    assert shard.select(dataset.attributes).to_pylist() == [
        {"old": 3, "wild": True, "year": 1999, "w": 1 << 40},
        {"old": None, "wild": False, "year": 2024, "w": 2},
    ]
    assert data.listing_fingerprint(listing)
    some = data.open_dataset("parquet", tmp_path / "x.parquet", "all", attributes=("wild", "old", "wild"))
    assert some.attributes == ("wild", "old")


def test_parquet_reads_only_the_row_groups_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(parquet_table(50, label=list(range(50))), tmp_path / "x.parquet", row_group_size=10)
    dataset = data.open_dataset("parquet", tmp_path / "x.parquet", "all")
    listing = data.list_images(dataset)
    asked: list[tuple[Any, Any]] = []
    read = pq.ParquetFile.iter_batches

    def spy(self: pq.ParquetFile, *arguments: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        asked.append((options["row_groups"], options["columns"]))
        return read(self, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    shard = data.read_images(dataset, listing.take([39, 12, 30, 19]), GREY)
    assert asked == [([1], ["image.bytes"]), ([3], ["image.bytes"])]
    assert np.array_equal(pixels_of(shard)[:, 0], [random_pixels(number) for number in (39, 12, 30, 19)])


@pytest.fixture
def long_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[data.Dataset, list[int]]:
    """2,500 images in one row group, read in batches of 1,024; and the batches that were read, by their first row."""
    images = [encoded(np.full((HEIGHT, WIDTH), value, np.uint8)) for value in range(250)] * 10
    pq.write_table(pa.table({"image": pa.array(images, pa.binary())}), tmp_path / "x.parquet")
    batches: list[int] = []
    read = pq.ParquetFile.iter_batches

    def spy(self: pq.ParquetFile, *arguments: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        first = 0
        for batch in read(self, *arguments, **options):
            batches.append(first)
            if batches == [0, 1024]:
                raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 56, Failure")
            yield batch
            first += len(batch)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.001)
    return data.open_dataset("parquet", tmp_path / "x.parquet", "all"), batches


def test_parquet_goes_on_where_a_store_failed(long_row_group: tuple[data.Dataset, list[int]]) -> None:
    dataset, batches = long_row_group
    rows = data.list_images(dataset).take([2_400, 3, 1_030, 2_499, 1_023])
    shard = data.read_images(dataset, rows, GREY)
    assert pixels_of(shard)[:, 0, 0, 0].tolist() == [150, 3, 30, 249, 23]
    assert batches == [0, 1_024, 0, 1_024, 2_048]


def test_parquet_stops_at_the_last_row_it_needs(long_row_group: tuple[data.Dataset, list[int]]) -> None:
    dataset, batches = long_row_group
    shard = data.read_images(dataset, data.list_images(dataset).take([7, 2]), GREY)
    assert pixels_of(shard)[:, 0, 0, 0].tolist() == [7, 2]
    assert batches == [0]


def test_parquet_of_large_images_is_read_in_small_pieces(tmp_path: Path) -> None:
    """Forty images of 4 MB in one row group: reading half of them needs the memory of a few."""
    image = encoded(random_pixels(0, 1_000, 1_333, 3), "BMP")
    table = pa.table({"image": pa.array([image] * 40, pa.binary())})
    pq.write_table(table, tmp_path / "x.parquet", use_dictionary=False, compression="none", write_batch_size=2)
    del table
    code = (
        "import re, sys; from clarity import data; from clarity.images import Preprocessing\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024\n"
        "dataset = data.open_dataset('parquet', sys.argv[1], 'all'); listing = data.list_images(dataset)\n"
        "before = peak()\n"
        "shard = data.read_images(dataset, listing.slice(20), Preprocessing('RGB', 8, 12))\n"
        "assert shard['error'].null_count == 20\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x.parquet"], cwd=ROOT, capture_output=True, check=True
    )
    assert 5 < int(done.stdout) < 70


def hugging_face(labels: list[Any], names: list[str], column: str = "label", count: int | None = None) -> pa.Table:
    """A table as Hugging Face's datasets writes it, with a ClassLabel in the metadata."""
    table = parquet_table(count or len(labels), **{column: pa.array(labels, pa.int64())})
    features = {column: {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def test_parquet_of_hugging_face_has_splits_and_names(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    names = ["shirt", "bag", "boot"]
    pq.write_table(hugging_face([2, 0, -1], names), tmp_path / "data/train-00000-of-00001.parquet")
    pq.write_table(hugging_face([1], names), tmp_path / "data/test-00000-of-00001.parquet")
    prefix = "data/train-00000-of-00001.parquet#0000000"
    assert listed(tmp_path, "train", "parquet") == {f"{prefix}0": "boot", f"{prefix}1": "shirt", f"{prefix}2": None}
    assert listed(tmp_path, "held-out", "parquet") == {"data/test-00000-of-00001.parquet#00000000": "bag"}
    listing = data.list_images(data.open_dataset("parquet", tmp_path, "train"))
    assert data.notes(listing) == ["1 image has the label -1, which is read as no label"]


def test_parquet_of_hugging_face_without_names_of_classes_has_their_numbers(tmp_path: Path) -> None:
    pq.write_table(hugging_face([0, 1], [None, None]), tmp_path / "x.parquet")  # type: ignore[list-item]
    assert list(listed(tmp_path, source="parquet").values()) == ["0", "1"]


def test_parquet_without_the_column_of_labels_says_which_columns_there_are(tmp_path: Path) -> None:
    pq.write_table(parquet_table(2, labels=["cat", "dog"]), tmp_path / "x.parquet")
    listing = data.list_images(data.open_dataset("parquet", tmp_path, "all"))
    with pytest.raises(ValueError, match=r"no column label, .*; the columns are image, labels: say .* label=NAME"):
        data.class_names_of(listing)
    renamed = data.open_dataset("parquet", tmp_path, "all", columns={"label": "labels"})
    assert data.class_names_of(data.list_images(renamed)) == ("cat", "dog")
    pq.write_table(parquet_table(2), tmp_path / "x.parquet")
    assert data.notes(data.list_images(data.open_dataset("parquet", tmp_path, "all"))) == []


def test_parquet_of_several_configurations_is_noted(tmp_path: Path) -> None:
    for folder in ("small", "large", "small/test"):
        (tmp_path / folder).mkdir()
        pq.write_table(parquet_table(2), tmp_path / folder / ("0.parquet" if "/" in folder else "train-0.parquet"))
    (note,) = data.notes(data.list_images(data.open_dataset("parquet", tmp_path, "all")))
    assert note.startswith("files of one split lie in several folders (large, small), which are read as one data set")
    assert data.notes(data.list_images(data.open_dataset("parquet", tmp_path / "small", "all"))) == []


def test_parquet_names_of_classes_that_are_numbers_are_looked_up_by_index(tmp_path: Path) -> None:
    pq.write_table(hugging_face([0, 1, 2], ["1", "2", "3"]), tmp_path / "x.parquet")
    assert list(listed(tmp_path, source="parquet").values()) == ["1", "2", "3"]
    pq.write_table(hugging_face([0, 7], ["1", "2", "3"]), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"expected labels 0 to 2 in column label .* names 3 classes, found 7"):
        listed(tmp_path, source="parquet")


def test_parquet_takes_split_and_label_from_keys_of_paths(tmp_path: Path) -> None:
    for number, (split, label) in enumerate([("train", "3"), ("train", "a%20b"), ("val", "3")]):
        path = tmp_path / f"split={split}/label={label}/part-{number}.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(parquet_table(1), path)
    assert set(listed(tmp_path, "train", "parquet").values()) == {"3", "a b"}
    assert set(listed(tmp_path, "held-out", "parquet").values()) == {"3"}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"train-0.parquet": {"split": ["test"]}}, "found train in its path and test in column split"),
        ({"split=test/train-0.parquet": {}}, "expected one split in the path .* found split=test and train-0"),
        ({"label=3/x.parquet": {"label": [4]}}, "expected label=3 in every row"),
        ({"train-0.parquet": {}, "extra.parquet": {}}, "in the paths of all files .* or of none"),
        ({"_delta_log/0.parquet": {}, "x.parquet": {}}, "found a Delta table"),
        ({"metadata/1.metadata.json": {}, "data/x.parquet": {}}, "found an Iceberg table"),
    ],
)
def test_parquet_paths_that_contradict_are_refused(files: dict[str, Any], said: str, tmp_path: Path) -> None:
    for name, columns in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(parquet_table(1, **columns), tmp_path / name)
    with pytest.raises(ValueError, match=said):
        listed(tmp_path, source="parquet")


def test_parquet_columns_of_other_names(tmp_path: Path) -> None:
    table = hugging_face([1, 0], ["apple", "bear"], "fine_label").append_column("coarse", pa.array([5, 6]))
    metadata = table.schema.metadata
    table = table.rename_columns(["img", "fine_label", "coarse"]).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"a column image .* found columns img, fine_label, coarse: .* image=img"):
        listed(tmp_path, source="parquet")
    columns = {"image": "img", "label": "fine_label"}
    dataset = data.open_dataset("parquet", tmp_path, "all", columns=columns, attributes=("all",))
    listing = data.list_images(dataset)
    assert listing["label_name"].to_pylist() == ["bear", "apple"]
    assert dataset.attributes == ("coarse",)
    assert data.read_images(dataset, listing, GREY)["error"].null_count == 2
    with pytest.raises(ValueError, match=r"columns: expected kind in .*, found columns img, fine_label, coarse"):
        data.list_images(data.open_dataset("parquet", tmp_path, "all", columns={"image": "img", "label": "kind"}))
    with pytest.raises(ValueError, match=r"names of image, label, image_id, split for parquet, got size"):
        data.open_dataset("parquet", tmp_path, columns={"size": "img"})


@pytest.mark.parametrize("name", ["image", "label", "split", "year"])
def test_parquet_with_two_columns_of_a_name_is_refused(name: str, tmp_path: Path) -> None:
    table = parquet_table(2, label=["a", "b"], split=["train", "test"], year=[1, 2], other=[1, 2])
    pq.write_table(table.append_column("other", table[name]), tmp_path / "x.parquet")
    assert list(listed(tmp_path, source="parquet").values()) == ["a", "b"], "columns that nobody asks for"
    pq.write_table(table.append_column(name, table[name]), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=f"expected one column {name}, found 2: rename the others"):
        data.list_images(data.open_dataset("parquet", tmp_path, "train", attributes=["year"]))


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([1.0, 2.0, None]),
        pa.array([1.0, 2.0, float("nan")], pa.float32()),
        pa.array(["1", "2", None], pa.string_view()),
        pa.array(["1", "2", None], pa.large_string()),
        pa.array(["1", "2", None]).dictionary_encode(),
        pa.array([1, 2, None], pa.uint8()),
        pa.array([1, 2, None], pa.decimal128(5, 0)),
    ],
    ids=lambda labels: str(labels.type),
)
def test_parquet_labels_of_any_type_of_text_or_whole_numbers(labels: pa.Array, tmp_path: Path) -> None:
    pq.write_table(parquet_table(3, label=labels), tmp_path / "x.parquet")
    assert list(listed(tmp_path, source="parquet").values()) == ["1", "2", None]


NULL = "expected the bytes of an image, found null: fill or drop the row"
NO_PATH = "expected the path of an image, found text that cannot be one: correct or drop the row"


@pytest.mark.parametrize(
    ("kind", "path", "reason"),
    [
        (pa.int64(), 7, NULL),
        (pa.binary(), b"x.png", NULL),
        (pa.list_(pa.string()), ["x.png"], NULL),
        (pa.null(), None, NULL),
        (pa.string(), None, NULL),
        (pa.string(), "", NULL),
        (pa.string(), "a\0b", NO_PATH),
        (pa.string(), "a" * 5000, "expected a file, found none that can be read (File name too long): restore it"),
    ],
)
def test_parquet_rows_with_neither_bytes_nor_a_path_say_so(
    kind: pa.DataType, path: Any, reason: str, tmp_path: Path
) -> None:
    struct = pa.struct([("bytes", pa.large_binary()), ("path", kind)])
    rows = [{"bytes": None, "path": path}, {"bytes": encoded(random_pixels(0)), "path": path}, None]
    pq.write_table(pa.table({"image": pa.array(rows, struct)}), tmp_path / "x.parquet")
    for where in (tmp_path, tmp_path / "x.parquet"):
        assert read(where, "parquet")["error"].to_pylist() == [reason, None, NULL]
    if not isinstance(path, str):
        pq.write_table(pa.table({"image": pa.array([*rows[:1], None], struct)}), tmp_path / "x.parquet")
        with contextlib.suppress(ValueError):  # only null
            assert read(tmp_path, "parquet")["error"].to_pylist() == [NULL, NULL]


@pytest.mark.parametrize("kind", [pa.list_(pa.uint8()), pa.list_(pa.binary()), pa.int64(), pa.null()])
def test_parquet_images_of_other_types_are_refused(kind: pa.DataType, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.nulls(2, kind)}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"expected a column image of bytes or struct<bytes, path>"):
        listed(tmp_path, source="parquet")


def test_parquet_images_may_be_encoded_as_a_dictionary(tmp_path: Path) -> None:
    write_images(tmp_path, "0.png")
    for images in (pa.array([encoded(random_pixels(0))] * 2), pa.array(["0.png"] * 2)):
        pq.write_table(pa.table({"image": images.dictionary_encode()}), tmp_path / "x.parquet")
        assert np.array_equal(pixels_of(read(tmp_path, "parquet"))[:, 0], [random_pixels(0)] * 2)


def test_parquet_labels_have_no_blanks_around_them(tmp_path: Path) -> None:
    pq.write_table(parquet_table(3, label=["cat ", " ", "cat"]), tmp_path / "x.parquet")
    assert list(listed(tmp_path, source="parquet").values()) == ["cat", None, "cat"]


def test_parquet_label_of_empty_text_is_none(tmp_path: Path) -> None:
    pq.write_table(parquet_table(2, label=["", "a"]), tmp_path / "x.parquet")
    assert list(listed(tmp_path, source="parquet").values()) == [None, "a"]


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_paths_are_followed_where_the_files_are(struct: bool, tmp_path: Path) -> None:
    write_images(tmp_path, "files/0.png", "files/sub/1.png")
    paths = ["0.png", "sub/1.png", str(tmp_path / "files/0.png"), "gone.png"]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": path} for path in paths], kind) if struct else pa.array(paths)
    pq.write_table(pa.table({"image": images}), tmp_path / "files/x.parquet")
    for where in (tmp_path, tmp_path / "files/x.parquet"):
        shard = read(where, "parquet")
        assert shard["error"].is_null().to_pylist() == [True, True, True, False]
        found = pixels_of(shard.slice(0, 3))[:, 0]
        assert np.array_equal(found, [random_pixels(0), random_pixels(1), random_pixels(0)])
    pq.write_table(pa.table({"image": images.slice(3)}), tmp_path / "files/x.parquet")
    with pytest.raises(ValueError, match=r"found paths such as 'gone.png', with no file there: store the bytes"):
        listed(tmp_path, source="parquet")
