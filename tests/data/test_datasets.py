"""What holds for every source: labels, fingerprints, reading in parts."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pictures import GREY, HEIGHT, WIDTH, opened, random_pixels, write_images

from clarity import data
from clarity.data.listing import require_unique
from clarity.images import Preprocessing

ROOT = Path(__file__).parent.parent.parent


def test_label_indices_are_null_for_what_the_model_does_not_know() -> None:
    names = pa.chunked_array([["dog", None], ["ant", "cow", "dog"]], pa.string())
    found = data.label_indices(names, ("ant", "bee", "dog"))
    assert found.type == pa.int32()
    assert found.to_pylist() == [2, None, 0, None, 2]


def test_class_names_stay_on_one_line(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png", "b/2\n.png", "c\td/3.png")
    (tmp_path / "labels.csv").write_text('file_name,label\na/1.png,"one\nuno"\n3.png,"x,\u2028y"\n')
    listing = data.list_images(data.open_dataset("folder", tmp_path, "all"))
    assert listing["image_id"].to_pylist() == ["a/1.png", "b/2\n.png", "c\td/3.png"]
    assert listing["label_name"].to_pylist() == ["one\\nuno", None, "x,\\u2028y"]
    assert data.read_images(data.open_dataset("folder", tmp_path, "all"), listing, GREY)["error"].null_count == 3
    (tmp_path / "labels.csv").unlink()
    listing = data.list_images(data.open_dataset("folder", tmp_path, "all"))
    assert data.class_names_of(listing) == ("a", "b", "c\\td")
    assert data.label_indices(listing["label_name"], ("c\td",)).to_pylist() == [None, None, 0]


def test_class_names_are_sorted_as_numbers_where_they_are_numbers() -> None:
    assert data.class_names_of(pa.table({"label_name": ["10", "9", None, "2", "9"]})) == ("2", "9", "10")
    assert data.class_names_of(pa.table({"label_name": ["10", "9", "b"]})) == ("10", "9", "b")


def test_fingerprint_sees_each_change_and_no_chunks() -> None:
    listing = data.list_images(data.open_dataset("digits", split="test")).slice(0, 7)
    fingerprint = data.listing_fingerprint(listing)
    assert data.listing_fingerprint(pa.concat_tables([listing.slice(0, 2), listing.slice(2)])) == fingerprint
    changed = {
        "image_id": pa.array(["x", *listing["image_id"].to_pylist()[1:]]),
        "row": pa.array([1, *listing["row"].to_pylist()[1:]]),
        "size": pa.array([None, *listing["size"].to_pylist()[1:]], pa.int64()),
        "label_name": pa.array([None, *listing["label_name"].to_pylist()[1:]]),
        "location": pa.array(["x", *listing["location"].to_pylist()[1:]]),
    }
    others = [listing.slice(1), listing.take([1, 0, 2, 3, 4, 5, 6])]
    others.append(listing.rename_columns(["id", *listing.column_names[1:]]))
    for name, column in changed.items():
        others.append(listing.set_column(listing.schema.get_field_index(name), name, column))
    assert len({fingerprint, *map(data.listing_fingerprint, others)}) == 1 + len(others)


def test_ids_with_equal_hashes_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = pa.chunked_array([["a", "b"], ["c"]], pa.string())
    monkeypatch.setattr("clarity.data.listing.hash", lambda text: 7, raising=False)
    require_unique(ids, "here")
    with pytest.raises(ValueError, match=r"found 1 duplicates \('b'\)"):
        require_unique(pa.chunked_array([*ids.chunks, ["b"]], pa.string()), "here")


def test_a_listing_is_checked_in_less_memory_than_it_takes() -> None:
    code = (
        "import re; import numpy as np; import pyarrow as pa; import pyarrow.compute as pc; from clarity import data\n"
        "from clarity.data.listing import require_unique\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) << 10\n"
        "rows = pa.array(np.arange(1_000_000))\n"
        "ids = pc.binary_join_element_wise('photos/of/people/', rows.cast(pa.string()), '.png', '')\n"
        "listing = pa.table({'image_id': ids, 'location': ids, 'row': rows})\n"
        "before = peak()\n"
        "require_unique(listing['image_id'], 'here'); data.listing_fingerprint(listing)\n"
        "print((peak() - before) / listing.nbytes)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert float(done.stdout) < 0.5


def test_reading_is_the_same_in_shards_of_any_size() -> None:
    dataset, listing = opened("digits", split="test")
    preprocessing = Preprocessing("L", 20, 24)
    whole = data.read_images(dataset, listing, preprocessing)
    parts = [data.read_images(dataset, listing.slice(start, 77), preprocessing) for start in range(0, 500, 77)]
    parts.append(data.read_images(dataset, listing.slice(500), preprocessing))  # of no rows
    assert pa.concat_tables(parts).combine_chunks().equals(whole.combine_chunks())


def test_read_all_gives_the_readable_images_and_the_reasons(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png", "a/2.png", "b/3.png")
    (tmp_path / "a/2.png").write_bytes(b"")
    dataset = data.open_dataset("folder", tmp_path, "all")
    images, ids, label_names, errors = data.read_all(dataset, data.list_images(dataset), GREY)
    assert images.shape == (2, 1, HEIGHT, WIDTH)
    assert np.array_equal(images[:, 0], [random_pixels(0), random_pixels(2)])
    assert (ids, label_names) == (["a/1.png", "b/3.png"], ["a", "b"])
    assert errors == {"a/2.png": "expected an image, found an empty file: copy it again"}
