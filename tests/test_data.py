"""data.py: preprocessing, listings and shards of each source, locally and on an object store."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from object_store import Fault, ObjectStore
from PIL import Image

from clarity import data, schema, storage
from clarity.images import Preprocessing, UnreadableImage

ROOT = Path(__file__).parent.parent
HEIGHT, WIDTH = 8, 12


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (HEIGHT, WIDTH), dtype=np.uint8)


def pixels_of(shard: pa.Table, shape: tuple[int, int, int]) -> np.ndarray:
    return schema.matrix(shard["image"]).reshape(-1, *shape)


# Preprocessing


def test_apply_gives_the_pixels_of_an_image_that_fits() -> None:
    grey, colour = drawn(0), drawn(1, HEIGHT, WIDTH, 3)
    assert np.array_equal(Preprocessing("L", HEIGHT, WIDTH).apply(encoded(grey)), grey[None])
    assert np.array_equal(Preprocessing("RGB", HEIGHT, WIDTH).apply(encoded(colour)), colour.transpose(2, 0, 1))
    assert Preprocessing("RGB", HEIGHT, WIDTH).apply(Image.fromarray(grey)).shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_apply_turns_by_exif(orientation: int, kind: str) -> None:
    turned = np.zeros((HEIGHT, WIDTH), np.uint8)
    turned[:4, :4] = 255  # upright: white in the top left corner
    turned[:4, 8:] = 128
    transposes = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's codes of the inverse operations
    stored = Image.fromarray(turned).convert("RGB")
    if (code := transposes[orientation]) is not None:
        stored = stored.transpose(Image.Transpose(code))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    found = Preprocessing("L", HEIGHT, WIDTH).apply(buffer.getvalue())[0].astype(int)
    assert np.abs(found - turned).max() <= (20 if kind == "JPEG" else 0)


def test_apply_scales_sixteen_bits() -> None:
    values = np.array([[0, 127, 128, 129, 256, 257], [32767, 32768, 65279, 65280, 65406, 65535]], np.uint16)
    preprocessing = Preprocessing("L", 2, 6)
    expected = np.rint(values / 257).astype(np.uint8)[None]
    assert np.array_equal(preprocessing.apply(encoded(values)), expected)
    assert np.array_equal(preprocessing.apply(encoded(values, "TIFF")), expected)
    assert np.array_equal(preprocessing.apply(values), expected)
    assert np.array_equal(preprocessing.apply(encoded(values, "PPM")), expected)


def test_apply_lays_transparency_on_white() -> None:
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[0, :, 3], pixels[1, 0, 3] = 255, 128
    found = Preprocessing("RGB", 2, 3).apply(encoded(pixels))
    assert found[0].tolist() == [[0, 0, 0], [127, 255, 255]]
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), mode=None).convert("P")
    palette.putpalette([10, 10, 10, 20, 20, 20, 30, 30, 30])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=1)
    assert Preprocessing("L", 1, 3).apply(buffer.getvalue()).tolist()[0][0][1] == 255


def test_apply_converts_colours_of_print() -> None:
    cyan = Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0))
    buffer = io.BytesIO()
    cyan.save(buffer, "TIFF")
    assert Preprocessing("RGB", HEIGHT, WIDTH).apply(buffer.getvalue())[:, 0, 0].tolist() == [0, 255, 255]


def test_apply_takes_the_first_frame() -> None:
    frames = [Image.fromarray(np.full((HEIGHT, WIDTH), value, np.uint8)) for value in (200, 50)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert set(Preprocessing("L", HEIGHT, WIDTH).apply(buffer.getvalue()).ravel().tolist()) == {200}


def test_apply_crops_the_centre_then_resizes() -> None:
    """As torchvision's Resize(64)(CenterCrop(148)(face)), which PyTorch-VAE uses."""
    face = Image.fromarray(drawn(3, 218, 178, 3))
    square = face.crop((15, 35, 163, 183)).resize((64, 64), Image.Resampling.BILINEAR)
    preprocessing = data.SOURCES["celeba_hair"].default_preprocessing
    assert preprocessing is not None
    assert np.array_equal(preprocessing.apply(face), np.asarray(square).transpose(2, 0, 1))


def test_apply_takes_an_image_of_the_right_size_without_cropping() -> None:
    face = drawn(4, 64, 64, 3)
    assert np.array_equal(Preprocessing("RGB", 64, 64, center_crop=148).apply(encoded(face)), face.transpose(2, 0, 1))


def test_apply_takes_arrays_of_exactly_the_models_size() -> None:
    colour = drawn(5, HEIGHT, WIDTH, 3)
    rgb, grey = Preprocessing("RGB", HEIGHT, WIDTH), Preprocessing("L", HEIGHT, WIDTH)
    expected = colour.transpose(2, 0, 1)
    assert np.array_equal(rgb.apply(colour), expected)
    assert np.array_equal(rgb.apply(expected), expected)
    assert np.array_equal(rgb.apply(expected / 255), expected)
    assert np.array_equal(rgb.apply((expected / 255).astype(np.float32)), expected)
    assert np.array_equal(rgb.apply(expected.astype(np.int64)), expected)
    assert np.array_equal(grey.apply(colour[..., 0]), colour[None, ..., 0])
    assert np.array_equal(grey.apply(colour[..., :1] > 9), 255 * (colour[None, ..., 0] > 9))
    for wrong in (colour[1:], colour[..., 0], drawn(0, WIDTH, HEIGHT, 3), drawn(0, HEIGHT, WIDTH, 4), drawn(0, 5)):
        with pytest.raises(UnreadableImage, match=r"expected an array of shape \(3, 8, 12\), found"):
            rgb.apply(wrong)


def test_reasons_are_the_same_in_each_run() -> None:
    class Broken(Image.Image):
        def load(self) -> Any:
            raise OSError(f"cannot read {object()!r} now")

    picture = Broken()
    picture._size = (WIDTH, HEIGHT)
    with pytest.raises(UnreadableImage, match=r"found a broken one \(cannot read now\): copy it again"):
        Preprocessing("L", HEIGHT, WIDTH).apply(picture)


def test_preprocessing_comes_back_from_json() -> None:
    preprocessing = Preprocessing("RGB", HEIGHT, WIDTH, 7)
    assert Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json()))) == preprocessing
    assert preprocessing.image_shape == (3, HEIGHT, WIDTH)
    assert Preprocessing("L", HEIGHT, WIDTH).image_shape == (1, HEIGHT, WIDTH)
    for fields in (
        {"mode": "L"},
        {"mode": "L", "height": 1, "width": 1, "code": "x"},
        [1],
        None,
        {"mode": "L", "height": 2, "width": "x"},
    ):
        with pytest.raises(ValueError, match="expected"):
            Preprocessing.from_json(fields)


# Ids, splits, noise, labels, fingerprints


def test_label_indices_are_null_for_what_the_model_does_not_know() -> None:
    names = pa.chunked_array([["dog", None], ["ant", "cow", "dog"]], pa.string())
    found = data.label_indices(names, ("ant", "bee", "dog"))
    assert found.type == pa.int32()
    assert found.to_pylist() == [2, None, 0, None, 2]


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
    others = [
        listing.set_column(listing.schema.get_field_index(name), name, column) for name, column in changed.items()
    ]
    others += [
        listing.slice(1),
        listing.take([1, 0, 2, 3, 4, 5, 6]),
        listing.rename_columns(["id", *listing.column_names[1:]]),
    ]
    assert len({fingerprint, *map(data.listing_fingerprint, others)}) == 1 + len(others)


@given(
    st.lists(st.one_of(st.none(), st.text(max_size=3)), max_size=4),
    st.lists(st.one_of(st.none(), st.text(max_size=3)), max_size=4),
)
def test_fingerprints_are_equal_only_for_equal_columns(one: list[str | None], other: list[str | None]) -> None:
    prints = [data.listing_fingerprint(pa.table({"x": pa.array(column, pa.string())})) for column in (one, other)]
    assert (prints[0] == prints[1]) == (one == other)


# digits


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
    dataset = data.open_dataset("digits", split="all")
    listing = data.list_images(dataset)
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


def test_dataset_is_small_and_travels() -> None:
    dataset = data.open_dataset("digits", split="test")
    assert len(pickle.dumps(dataset)) < 300
    assert pickle.loads(pickle.dumps(dataset)) == dataset


def test_read_images_of_no_rows_is_an_empty_table() -> None:
    dataset = data.open_dataset("digits")
    rows = data.list_images(dataset).slice(0, 0)
    assert data.read_images(dataset, rows, Preprocessing("L", 28, 28)).num_rows == 0


def test_reading_a_thousand_digits_is_quick() -> None:
    dataset = data.open_dataset("digits")
    listing = data.list_images(dataset).slice(0, 1_024)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        data.read_images(dataset, listing, Preprocessing("L", 28, 28))
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.5  # 0.05 on an idle core


# mnist


def write_idx(path: Path, array: np.ndarray) -> None:
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    for stem, count in (("train", 7), ("t10k", 5)):
        write_idx(tmp_path / "MNIST/raw" / f"{stem}-images-idx3-ubyte", drawn(count, count, 28, 28))
        write_idx(tmp_path / "MNIST/raw" / f"{stem}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    return tmp_path


def test_mnist_is_read_from_torchvisions_layout(mnist: Path) -> None:
    for place, split, count in ((mnist, "train", 7), (mnist / "MNIST", "test", 5), (mnist / "MNIST/raw", "test", 5)):
        dataset = data.open_dataset("mnist", place, split)
        listing = data.list_images(dataset)
        assert listing["label_name"].to_pylist() == [str(number) for number in range(count)]
        assert listing["image_id"].to_pylist()[-1] == f"{split}/{count - 1:05d}"
        shard = data.read_images(dataset, listing.take([2, 0]), data.infer_preprocessing(dataset, listing))
        assert np.array_equal(pixels_of(shard, (1, 28, 28))[:, 0], drawn(count, count, 28, 28)[[2, 0]])
    both = data.list_images(data.open_dataset("mnist", mnist, "all"))
    assert len(set(both["image_id"].to_pylist())) == 12


def test_mnist_is_resized_when_asked(mnist: Path) -> None:
    dataset = data.open_dataset("mnist", mnist)
    listing = data.list_images(dataset)
    preprocessing = data.infer_preprocessing(dataset, listing, image_size=32, mode="RGB")
    assert preprocessing == Preprocessing("RGB", 32, 32)
    assert data.read_images(dataset, listing, preprocessing)["error"].null_count == 7


def test_mnist_downloads_only_when_asked_and_checks_what_it_got(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "server"
    for stem, count in (("train", 7), ("t10k", 5)):
        write_idx(source / f"{stem}-images-idx3-ubyte.gz", drawn(count, count, 28, 28))
        write_idx(source / f"{stem}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8))
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in source.iterdir()}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write((source / self.path[1:]).read_bytes())

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("clarity.data.mnist.MNIST_URL", f"http://127.0.0.1:{server.server_port}/")
        with pytest.raises(ValueError, match="found nothing at"):
            data.open_dataset("mnist", tmp_path / "data")
        assert not asked
        with pytest.raises(ValueError, match="with sha256"):
            data.open_dataset("mnist", tmp_path / "data", download=True)
        assert not (tmp_path / "data").exists()
        monkeypatch.setattr("clarity.data.mnist.MNIST_SHA256", sums)
        listing = data.list_images(data.open_dataset("mnist", tmp_path / "data", download=True))
        assert (len(listing), len(asked)) == (7, 5)
        data.open_dataset("mnist", tmp_path / "data", download=True)
        assert len(asked) == 5
        server.shutdown()


# folder


def write_images(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(drawn(number)))


def listed(root: Any, split: str = "all", source: str = "folder") -> dict[str, str | None]:
    listing = data.list_images(data.open_dataset(source, root, split))
    return dict(zip(listing["image_id"].to_pylist(), listing["label_name"].to_pylist(), strict=True))


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
    for name, pixels in (("a/1.png", drawn(0)), ("a/2.jpg", drawn(1, 30, 20, 3)), ("b/3.bmp", drawn(2, 5, 5, 3))):
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
    (tmp_path / "x.jpg").write_bytes(encoded(drawn(0, 8, 12, 3), "JPEG", exif=exif))
    dataset = data.open_dataset("folder", tmp_path, "all")
    assert data.infer_preprocessing(dataset, data.list_images(dataset)) == Preprocessing("RGB", 12, 8)


def test_large_images_are_not_the_inferred_size(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded(drawn(0, 129, 40)))
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
    import tempfile

    with tempfile.TemporaryDirectory() as root:
        os.mkdir(os.path.join(root, "c"))
        for number, name in enumerate(names):
            with open(os.path.join(os.fsencode(root), b"c", name + b".png"), "wb") as file:
                file.write(encoded(drawn(number)))
        dataset = data.open_dataset("folder", root, "all")
        listing = data.list_images(dataset)
        shard = data.read_images(dataset, listing, Preprocessing("L", HEIGHT, WIDTH))
        assert shard["error"].null_count == len(names)
        found = {pixels.tobytes() for pixels in pixels_of(shard, (1, HEIGHT, WIDTH))}
        assert found == {drawn(number).tobytes() for number in range(len(names))}
        for column in ("image_id", "location"):
            assert all(text.encode() for text in listing[column].to_pylist())


# parquet


def parquet_table(count: int, **columns: Any) -> pa.Table:
    images = [{"bytes": encoded(drawn(number)), "path": None} for number in range(count)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"image": pa.array(images, kind), **columns})


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
    pq.write_table(pa.table({"image": pa.array([encoded(drawn(0)), None], kind)}), tmp_path / "x.parquet")
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
    expected = [drawn(1), drawn(1), drawn(0), drawn(0)]
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
    assert np.array_equal(pixels_of(shard, (1, HEIGHT, WIDTH))[:, 0], [drawn(39), drawn(12), drawn(30), drawn(19)])


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
    image = encoded(drawn(0, 1_000, 1_333, 3), "BMP")
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


# celeba_hair


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
        (tmp_path / "img_align_celeba" / name).write_bytes(encoded(drawn(number, *shape), "JPEG"))
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


def test_celeba_lists_every_face_when_asked(celeba: Path) -> None:
    dataset = data.open_dataset("celeba_hair", celeba, "train", unlabelled=True)
    listing = data.list_images(dataset)
    assert listing["label_name"].to_pylist() == ["black", None, "blond"]
    assert data.left_out(listing) == {}


def test_celeba_reads_both_sizes_and_carries_attributes(celeba: Path) -> None:
    every = data.open_dataset("celeba_hair", celeba, "all", attributes=["all"]).attributes
    assert set(every) == set(data.SOURCES["celeba_hair"].attributes(str(celeba))) >= {"Male", "Bald", "Gray_Hair"}
    dataset = data.open_dataset("celeba_hair", celeba, "all", attributes=["Male", "Bald"], unlabelled=True)
    listing = data.list_images(dataset)
    preprocessing = data.infer_preprocessing(dataset, listing)
    assert preprocessing == Preprocessing("RGB", 64, 64, center_crop=148)
    shard = data.read_images(dataset, listing, preprocessing)
    assert shard["error"].null_count == len(FACES)
    assert shard.schema.equals(schema.shard_schema((3, 64, 64), ("Male", "Bald")))
    assert shard["Male"].to_pylist() == [1, 0, 1, 0, 1, 0]
    assert shard["Bald"].to_pylist() == [0, 0, 0, 0, 1, 0]
    content = (celeba / "img_align_celeba/000002.jpg").read_bytes()
    as_is = np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1)
    assert np.array_equal(pixels_of(shard, (3, 64, 64))[1], as_is)


def test_celeba_missing_and_broken_files_are_error_rows(celeba: Path) -> None:
    (celeba / "img_align_celeba/000001.jpg").unlink()
    path = celeba / "img_align_celeba/000006.jpg"
    path.write_bytes(path.read_bytes()[:300])
    dataset = data.open_dataset("celeba_hair", celeba, "all")
    listing = data.list_images(dataset)
    assert listing["size"].to_pylist()[::3] == [None, 300]
    shard = data.read_images(dataset, listing, data.infer_preprocessing(dataset, listing))
    errors = shard["error"].to_pylist()
    assert errors[0] == "expected a file, found none that can be read (No such file or directory): restore it"
    assert "broken" in errors[3]
    assert errors[1:3] == [None, None]
    assert shard["image"].is_null().to_pylist() == [True, False, False, True]


# read_all


def test_read_all_gives_the_readable_images_and_the_reasons(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png", "a/2.png", "b/3.png")
    (tmp_path / "a/2.png").write_bytes(b"")
    dataset = data.open_dataset("folder", tmp_path, "all")
    images, ids, label_names, errors = data.read_all(
        dataset, data.list_images(dataset), Preprocessing("L", HEIGHT, WIDTH)
    )
    assert images.shape == (2, 1, HEIGHT, WIDTH)
    assert np.array_equal(images[:, 0], [drawn(0), drawn(2)])
    assert (ids, label_names) == (["a/1.png", "b/3.png"], ["a", "b"])
    assert errors == {"a/2.png": "expected an image, found an empty file: copy it again"}


def test_reading_is_the_same_in_shards_of_any_size() -> None:
    dataset = data.open_dataset("digits", split="test")
    listing = data.list_images(dataset)
    preprocessing = Preprocessing("L", 20, 24)
    whole = data.read_images(dataset, listing, preprocessing)
    parts = [data.read_images(dataset, listing.slice(start, 77), preprocessing) for start in range(0, 500, 77)]
    assert pa.concat_tables(parts).combine_chunks().equals(whole.combine_chunks())


# Object stores


@pytest.fixture(scope="module")
def module_store() -> Iterator[ObjectStore]:
    with pytest.MonkeyPatch.context() as patch, ObjectStore() as store:
        patch.setattr(storage, "REQUESTS", 1)
        patch.setattr(storage, "FIRST_PAUSE_S", 0.001)
        storage.exists(store.uri())
        yield store


@pytest.fixture
def store(module_store: ObjectStore) -> ObjectStore:
    module_store.faults.clear()
    module_store.requests.clear()
    return module_store


def test_folder_on_an_object_store_is_that_on_a_disk(store: ObjectStore, tmp_path: Path) -> None:
    write_images(tmp_path, "train/cat é/1 +&?.png", "train/dog/100%41.png", "test/dog/2.png", "train/dog/bad.png")
    (tmp_path / "train/dog/bad.png").write_bytes(b"no image")
    storage.copy_tree(tmp_path, store.uri("photos"))
    tables = []
    for place in (tmp_path, store.uri("photos")):
        dataset = data.open_dataset("folder", place)
        listing = data.list_images(dataset)
        tables.append((listing, data.read_images(dataset, listing, Preprocessing("L", HEIGHT, WIDTH))))
    assert tables[0][0].equals(tables[1][0])
    assert tables[0][1].equals(tables[1][1])
    assert tables[0][1]["error"].null_count == 2


def test_parquet_on_an_object_store_is_that_on_a_disk(store: ObjectStore, tmp_path: Path) -> None:
    for number in range(2):
        pq.write_table(parquet_table(25, label=list(range(25))), tmp_path / f"{number}.parquet", row_group_size=10)
    storage.copy_tree(tmp_path, store.uri("tables"))
    for suffix in ("", "/0.parquet"):
        tables = []
        for place in (f"{tmp_path}{suffix}", store.uri(f"tables{suffix}")):
            dataset = data.open_dataset("parquet", place, "all")
            listing = data.list_images(dataset)
            tables.append((listing, data.read_images(dataset, listing.slice(7, 15), Preprocessing("L", HEIGHT, WIDTH))))
        assert tables[0][0].equals(tables[1][0])
        assert tables[0][1].equals(tables[1][1])


@pytest.mark.parametrize("kind", ["503", "cut"])
def test_reading_survives_a_store_that_fails_for_a_while(kind: str, store: ObjectStore, tmp_path: Path) -> None:
    pq.write_table(parquet_table(25), tmp_path / "x.parquet", row_group_size=10)
    storage.write_bytes(store.uri("x.parquet"), (tmp_path / "x.parquet").read_bytes())
    dataset = data.open_dataset("parquet", store.uri("x.parquet"), "all")
    listing = data.list_images(dataset)
    store.faults.append(Fault(kind, "GET", "x.parquet", times=4))
    shard = data.read_images(dataset, listing, Preprocessing("L", HEIGHT, WIDTH))
    assert shard["error"].null_count == 25
    assert np.array_equal(pixels_of(shard, (1, HEIGHT, WIDTH))[:, 0], [drawn(number) for number in range(25)])
    assert not store.faults[0].times


@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_a_store_that_is_down_is_not_the_images_fault(source: str, store: ObjectStore, tmp_path: Path) -> None:
    """The shard fails and is read again later; no row says that its image is broken."""
    place = store.uri(f"down/{source}")
    storage.write_bytes(storage.join(place, "a/1.png"), encoded(drawn(0)))
    pq.write_table(parquet_table(3), tmp_path / "x.parquet")
    storage.write_bytes(storage.join(place, "x.parquet"), (tmp_path / "x.parquet").read_bytes())
    dataset = data.open_dataset(source, place, "all")
    listing = data.list_images(dataset)
    store.faults += [Fault("503", method, times=10_000) for method in ("GET", "HEAD")]
    with pytest.raises(storage.StorageError, match="try again later") as error:
        data.read_images(dataset, listing, Preprocessing("L", HEIGHT, WIDTH))
    assert error.value.transient


def test_an_object_that_may_not_be_read_is_an_error_row(store: ObjectStore) -> None:
    for name in ("a/1.png", "a/2.png"):
        storage.write_bytes(store.uri(f"rights/{name}"), encoded(drawn(0)))
    dataset = data.open_dataset("folder", store.uri("rights"), "all")
    listing = data.list_images(dataset)
    store.faults += [Fault("403", "HEAD", "a/2", times=10_000), Fault("403", "GET", "a/2", times=10_000)]
    errors = data.read_images(dataset, listing, Preprocessing("L", HEIGHT, WIDTH))["error"].to_pylist()
    assert errors == [None, "expected a file, found none that can be read (ACCESS_DENIED): restore it"]
