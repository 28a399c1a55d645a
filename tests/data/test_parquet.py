"""Parquet files: columns, row groups, memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import HEIGHT, WIDTH, encoded, listed, parquet_table, pixels_of, random_pixels

from clarity import data, schema, storage
from clarity.images import Preprocessing

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
    pq.write_table(parquet_table(2, label=[12, None], split=["train", "validation"]), path)
    listing = data.list_images(data.open_dataset("parquet", path))
    assert listing["label_name"].to_pylist() == ["12"]
    assert data.left_out(listing) == {"rows whose split is neither train nor test": 1}


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_parquet_images_may_be_plain_bytes(kind: pa.DataType, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([encoded(random_pixels(0)), None], kind)}), tmp_path / "x.parquet")
    dataset = data.open_dataset("parquet", tmp_path / "x.parquet", "all")
    shard = data.read_images(dataset, data.list_images(dataset), Preprocessing("L", HEIGHT, WIDTH))
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
    shard = data.read_images(dataset, listing.take([4, 1, 3, 0]), Preprocessing("L", HEIGHT, WIDTH))
    expected = [random_pixels(1), random_pixels(1), random_pixels(0), random_pixels(0)]
    assert np.array_equal(pixels_of(shard, (1, HEIGHT, WIDTH))[:, 0], expected)


def test_parquet_carries_integer_columns(tmp_path: Path) -> None:
    pq.write_table(parquet_table(2, old=[3, None], wild=[True, False], far=[1, 300]), tmp_path / "x.parquet")
    dataset = data.open_dataset("parquet", tmp_path / "x.parquet", "all", attributes=("wild", "old", "wild"))
    listing = data.list_images(dataset)
    shard = data.read_images(dataset, listing, Preprocessing("L", HEIGHT, WIDTH))
    assert shard.schema.equals(schema.shard_schema((1, HEIGHT, WIDTH), ("wild", "old")))
    assert shard.select(["wild", "old"]).to_pylist() == [{"wild": 1, "old": 3}, {"wild": 0, "old": None}]
    with pytest.raises(ValueError, match="expected values of int8 in column far"):
        data.list_images(data.open_dataset("parquet", tmp_path / "x.parquet", "all", attributes=("far",)))


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
    shard = data.read_images(dataset, listing.take([39, 12, 30, 19]), Preprocessing("L", HEIGHT, WIDTH))
    assert asked == [([1], ["image.bytes"]), ([3], ["image.bytes"])]
    assert np.array_equal(
        pixels_of(shard, (1, HEIGHT, WIDTH))[:, 0],
        [random_pixels(39), random_pixels(12), random_pixels(30), random_pixels(19)],
    )


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
    shard = data.read_images(dataset, rows, Preprocessing("L", HEIGHT, WIDTH))
    assert pixels_of(shard, (1, HEIGHT, WIDTH))[:, 0, 0, 0].tolist() == [150, 3, 30, 249, 23]
    assert batches == [0, 1_024, 0, 1_024, 2_048]


def test_parquet_stops_at_the_last_row_it_needs(long_row_group: tuple[data.Dataset, list[int]]) -> None:
    dataset, batches = long_row_group
    shard = data.read_images(dataset, data.list_images(dataset).take([7, 2]), Preprocessing("L", HEIGHT, WIDTH))
    assert pixels_of(shard, (1, HEIGHT, WIDTH))[:, 0, 0, 0].tolist() == [7, 2]
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
