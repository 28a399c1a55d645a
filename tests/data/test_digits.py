"""The digits that ship with the package."""

import hashlib
import io
from pathlib import Path

import numpy as np
from pictures import opened, pixels_of
from PIL import Image

from clarity import data, schema, storage
from clarity.images import Preprocessing

ROOT = Path(__file__).parent.parent.parent


def test_digits_are_there_in_a_fixed_stratified_split() -> None:
    train, test, everything = (
        data.list_images(data.open_dataset("digits", split=split)) for split in ("train", "test", "all")
    )
    assert (len(train), len(test), len(everything)) == (4_500, 500, 5_000)
    assert set(test["label_name"].value_counts().field("counts").to_pylist()) == {50}
    assert set(train["label_name"].value_counts().field("counts").to_pylist()) == {450}
    assert data.class_names_of(train) == tuple("0123456789")
    assert test["image_id"].to_pylist()[:2] == ["test/0000", "test/0001"]
    assert everything["image_id"].to_pylist() == train["image_id"].to_pylist() + test["image_id"].to_pylist()


def test_digits_are_read_in_any_order() -> None:
    dataset, listing = opened("digits", split="all")
    preprocessing = data.infer_preprocessing(dataset, listing)
    assert preprocessing == Preprocessing("L", 28, 28)
    rows = listing.take([4_999, 0, 2_500, 499, 500, 0])
    shard = data.read_images(dataset, rows, preprocessing)
    assert shard.schema.equals(schema.shard_schema((1, 28, 28)), check_metadata=True)
    assert shard["image_id"].to_pylist() == rows["image_id"].to_pylist()
    assert shard["error"].null_count == 6
    with storage.open_parquet(ROOT / "clarity" / "data" / "digits.parquet") as parquet:
        images = parquet.read()["image"].to_pylist()
    for row, pixels in zip(rows["row"].to_pylist(), pixels_of(shard, (1, 28, 28)), strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(images[row]["bytes"]))), pixels[0])


def test_digits_are_still_those_of_the_notice() -> None:
    content = storage.read_bytes(ROOT / "clarity" / "data" / "digits.parquet")
    assert hashlib.sha256(content).hexdigest() == DIGITS_SHA256


DIGITS_SHA256 = "a798e8602e4645f9034f0434f7e679d1763b615350e50ab568215f34b012694c"
