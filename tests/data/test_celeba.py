"""CelebA in its official layout."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pictures import encoded, listed, opened, pixels_of, random_pixels
from PIL import Image

from clarity import data, schema
from clarity.images import Preprocessing

ATTRIBUTES = ["Bald", "Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair", "Male", "Young"]
FACES = {  # partition and the attributes that are set
    "000001.jpg": ("0", "Black_Hair", "Male"),
    "000002.jpg": ("0", "Blond_Hair", "Brown_Hair"),
    "000003.jpg": ("1", "Gray_Hair", "Male"),
    "000004.jpg": ("2", "Brown_Hair", "Young"),
    "000005.jpg": ("2", "Bald", "Male"),
    "000006.jpg": ("0", "Blond_Hair"),
}


@pytest.fixture
def celeba(tmp_path: Path) -> Path:
    (tmp_path / "img_align_celeba").mkdir()
    rows = [f"{len(FACES)}", " ".join(ATTRIBUTES)]
    for number, (name, (_, *chosen)) in enumerate(FACES.items()):
        rows.append(f"{name} " + " ".join(f"{1 if attribute in chosen else -1:2d}" for attribute in ATTRIBUTES))
        shape = (64, 64, 3) if number % 2 else (218, 178, 3)
        (tmp_path / "img_align_celeba" / name).write_bytes(encoded(random_pixels(number, *shape), "JPEG"))
    (tmp_path / "list_attr_celeba.txt").write_text("\n".join(rows) + "\n")
    lines = [f"{name} {partition}\n" for name, (partition, *_) in FACES.items()]
    (tmp_path / "list_eval_partition.txt").write_text("".join(lines))
    return tmp_path


def test_celeba_lists_faces_of_exactly_one_hair_colour(celeba: Path) -> None:
    expected = {
        "train": ({"000001.jpg": "black", "000006.jpg": "blond"}, 1),
        "valid": ({"000003.jpg": "gray"}, 0),
        "test": ({"000004.jpg": "brown"}, 1),
        "all": ({"000001.jpg": "black", "000003.jpg": "gray", "000004.jpg": "brown", "000006.jpg": "blond"}, 2),
    }
    for split, (faces, others) in expected.items():
        assert listed(celeba, split, "celeba_hair") == faces
        listing = data.list_images(data.open_dataset("celeba_hair", celeba, split))
        assert sum(data.left_out(listing).values()) == others
    assert data.class_names_of(listing) == ("black", "blond", "brown", "gray")


def test_celeba_reads_both_sizes_and_carries_attributes(celeba: Path) -> None:
    every = data.open_dataset("celeba_hair", celeba, "all", attributes=["all"]).attributes
    assert set(every) == set(ATTRIBUTES)
    dataset, listing = opened("celeba_hair", celeba, "all", attributes=["Male", "Bald"], unlabelled=True)
    assert len(listing) == len(FACES) and listing["label_name"].null_count == 2 and data.left_out(listing) == {}
    preprocessing = data.infer_preprocessing(dataset, listing)
    assert preprocessing == Preprocessing("RGB", 64, 64, center_crop=148)
    shard = data.read_images(dataset, listing, preprocessing)
    assert shard["error"].null_count == len(FACES)
    assert shard.schema.equals(
        schema.shard_schema((3, 64, 64), [pa.field(name, pa.int8()) for name in ("Male", "Bald")])
    )
    assert shard["Male"].to_pylist() == [1, 0, 1, 0, 1, 0]
    assert shard["Bald"].to_pylist() == [0, 0, 0, 0, 1, 0]
    content = (celeba / "img_align_celeba/000002.jpg").read_bytes()
    as_is = np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1)
    assert np.array_equal(pixels_of(shard, (3, 64, 64))[1], as_is)
