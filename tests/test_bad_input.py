"""Bad input, and what each kind of it gets. ``python docs/bad_input.py`` prints the outcomes as Markdown.

Three outcomes: *refused* at the door, by a ValueError or, where a place cannot be listed, a StorageError; an *error
row* in ``codes``, its neighbours unharmed; *read*, as it can be made good use of. Each reason says what was expected,
what was found, and what to do.
"""

import contextlib
import gzip
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobfiles import load_job
from pictures import GREY, encoded, random_pixels
from pictures import HEIGHT as H
from pictures import WIDTH as W
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from clarity import data, storage  # noqa: E402
from clarity.images import Preprocessing, UnreadableImage  # noqa: E402

COLOUR = Preprocessing("RGB", H, W)
Outcome = tuple[str, str]  # refused, error row or read; and the reason or what was made of it
Builder = Callable[[Path], Outcome]


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return random_pixels(seed, *shape)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *extra: bytes) -> bytes:
    """A grey PNG of any size that costs nothing to make: a header, and no more pixels than a few."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1_000)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body + chunk(b"IEND", b"")


CROPPED = Preprocessing("L", H, W, 100)
NO_EXIF = encoded(pixels(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
BILEVEL = encoded(Image.fromarray(pixels()).convert("1"), "PPM")
NANS, LARGE = np.full((H, W), np.nan, np.float32), np.full((H, W), 70_000, np.int32)
PNG, JPEG = encoded(pixels(90, 90)), encoded(pixels(90, 90), "JPEG")
DIGITS = pixels(3, 28, 28)
FACES = """2
Black_Hair Blond_Hair Brown_Hair Gray_Hair Male
1.jpg  1 -1 -1 -1  1
2.jpg -1 -1  1 -1 -1
"""


def animated() -> bytes:
    frames = [Image.fromarray(pixels(seed=seed)) for seed in (0, 1)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


# How each kind is tried


def outcome_of(act: Callable[[], Any]) -> Outcome:
    try:
        return "read", str(act())
    except (ValueError, storage.StorageError) as error:
        return "refused", str(error)


def explained(dataset: data.Dataset, place: int, count: int, preprocessing: Preprocessing = GREY) -> Outcome:
    """What becomes of the row at ``place`` of ``count``; all of the others are to be read."""
    shard = data.read_images(dataset, data.list_images(dataset), preprocessing)
    errors = shard["error"].to_pylist()
    assert len(errors) == count
    assert shard["image"].is_null().to_pylist() == [error is not None for error in errors]
    error = errors.pop(place)
    assert errors == [None] * (count - 1)
    return ("error row", error) if error else ("read", "")


def image(content: bytes | Callable[[], bytes], suffix: str = "png", preprocessing: Preprocessing = GREY) -> Builder:
    """A file between two good ones of a folder."""

    def build(root: Path) -> Outcome:
        lay_out(root, "c/0.png", "c/z.png")
        (root / f"c/1.{suffix}").write_bytes(content if isinstance(content, bytes) else content())
        return explained(data.open_dataset("folder", root, "all"), 1, 3, preprocessing)

    return build


def array(value: np.ndarray) -> Builder:
    return lambda _: outcome_of(lambda: GREY.apply(value).shape)


def lay_out(root: Path, *names: str) -> None:
    """Files below ``root``: images where the name says so, else text."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(pixels(200, 200)) if name.endswith(".png") else b"text")


def dataset(source: str, root: Path, split: str = "all", then: str = "", **options: Any) -> Outcome:
    """Open and list; ``then`` names a function of data.py that the listing is handed to."""

    def act() -> Any:
        listing = data.list_images(data.open_dataset(source, root, split, **options))
        return getattr(data, then)(listing) if then else listing["image_id"].to_pylist()

    return outcome_of(act)


def folder(*names: str, **options: Any) -> Builder:
    def build(root: Path) -> Outcome:
        lay_out(root, *names)
        return dataset("folder", root, **options)

    return build


def circles(root: Path) -> Outcome:
    lay_out(root, "a/1.png", "a/2.png")
    (root / "a/again").symlink_to(root)
    (root / "b").symlink_to("a")
    return dataset("folder", root)


def odd_file(make: Callable[[Path], None]) -> Builder:
    """Something odd called c/1.png between two good files."""

    def build(root: Path) -> Outcome:
        lay_out(root, "c/0.png", "c/z.png")
        make(root / "c/1.png")
        return explained(data.open_dataset("folder", root, "all"), 1, 3)

    return build


def vanished(root: Path) -> Outcome:
    lay_out(root, "c/0.png", "c/1.png")
    listed = data.open_dataset("folder", root, "all")
    listing = data.list_images(listed)
    (root / "c/0.png").unlink()
    errors = data.read_images(listed, listing, GREY)["error"].to_pylist()
    assert errors[1] is None
    return "error row", errors[0]


def as_nobody(locked: str) -> Builder:
    """Rights do not stop root: the reading process drops its own first."""
    code = """
import os, sys
from clarity import data
from clarity.images import Preprocessing
def errors():
    dataset = data.open_dataset("folder", sys.argv[1], "all")
    return data.read_images(dataset, data.list_images(dataset), Preprocessing("L", 8, 12))["error"]
if os.getuid() == 0:
    errors()  # loads what is loaded at need: it may lie where others may not read
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(*errors(), sep="|")
"""

    def build(root: Path) -> Outcome:
        # A place of its own: pytest's are closed to other users from the top.
        with tempfile.TemporaryDirectory() as place:
            lay_out(Path(place), "c/0.png", "c/1.png", "c/z.png")
            os.chmod(place, 0o755)
            os.chmod(Path(place) / locked, 0)
            done = subprocess.run([sys.executable, "-c", code, place], cwd=ROOT, capture_output=True, text=True)
            os.chmod(Path(place) / locked, 0o700)
        if done.returncode:
            return "refused", done.stderr.splitlines()[-1].partition(": ")[2]
        first, error, last = done.stdout.strip().split("|")
        assert first == last == "None"
        return "error row", error

    return build


def parquet(content: pa.Table | bytes, **options: Any) -> Builder:
    return lambda root: dataset("parquet", written(root, content), **options)


def parquet_row(*images: bytes | None) -> Builder:
    """The second of three rows."""
    return lambda root: explained(data.open_dataset("parquet", written(root, table(images)), "all"), 1, 3)


def table(images: Sequence[bytes | None] = (PNG, PNG), **columns: Any) -> pa.Table:
    return pa.table({"image": pa.array(images, pa.binary()), **columns})


def written(root: Path, content: pa.Table | bytes) -> Path:
    path = root / "x.parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pq.write_table(content, path, row_group_size=1, compression="zstd", use_dictionary=False)
    return path


def parquet_bytes() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table(), buffer)
    return buffer.getvalue()


def broken_row_group(root: Path) -> Outcome:
    path = written(root, table([PNG] * 3))
    content = bytearray(path.read_bytes())
    with storage.open_parquet(path) as file:
        part = file.metadata.row_group(1).column(0)
    pages = slice(part.data_page_offset, part.data_page_offset + part.total_compressed_size)
    content[pages] = bytes(255 - byte for byte in content[pages])
    path.write_bytes(content)
    return explained(data.open_dataset("parquet", path, "all"), 1, 3)


def replaced_parquet(root: Path) -> Outcome:
    path = written(root, table([PNG]))
    listed = data.open_dataset("parquet", path, "all")
    listing = data.list_images(listed)
    path.write_bytes(b"PAR1 but no more")
    return "error row", data.read_images(listed, listing, GREY)["error"][0].as_py()


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes()


def mnist(images: bytes = b"", labels: bytes = b"", suffix: str = "") -> Builder:
    def build(root: Path) -> Outcome:
        (root / f"train-images-idx3-ubyte{suffix}").write_bytes(images)
        (root / "train-labels-idx1-ubyte").write_bytes(labels)
        return dataset("mnist", root, "train")

    return build


def celeba(
    values: str = FACES, partition: str = "1.jpg 0\n2.jpg 1\n", images: str = "img_align_celeba", **options: Any
) -> Builder:
    """CelebA's layout with two faces, of which the file of the second is missing."""

    def build(root: Path) -> Outcome:
        (root / images).mkdir()
        (root / images / "1.jpg").write_bytes(encoded(pixels(64, 64, 3), "JPEG"))
        for name, content in (("list_attr_celeba.txt", values), ("list_eval_partition.txt", partition)):
            if content:
                (root / name).write_text(content)
        found = dataset("celeba_hair", root, **options)
        return explained(data.open_dataset("celeba_hair", root, "all"), 1, 2, COLOUR) if found[0] == "read" else found

    return build


def door(source: str, *arguments: Any, **options: Any) -> Builder:
    return lambda _: outcome_of(lambda: data.open_dataset(source, *arguments, **options))


def labels(*names: str | None) -> Builder:
    return lambda _: ("read", f"labels {data.label_indices(pa.array(names), ('cat', 'dog')).to_pylist()}")


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def big_gif() -> bytes:
    """A screen of one pixel and a first frame of 60,000 x 60,000 on it."""
    screen = struct.pack("<6sHHBBB", b"GIF89a", 1, 1, 0x80, 0, 0) + bytes(6)
    frame = struct.pack("<BHHHHB", 0x2C, 0, 0, 60_000, 60_000, 0)
    return screen + frame + b"\2\2\x4c\1\0;"


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(pixels(W, H, 3), "JPEG", exif=exif)


def with_transparent_colour() -> bytes:
    return encoded(Image.fromarray(pixels()).convert("P"), transparency=3)


def with_text(size: int) -> bytes:
    return png(9, 9, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(size))))


SPLIT = table(split=["extra", "train"])

#: (kind, builder, outcome, a part of what is said)
BAD_INPUT: list[tuple[str, Builder, str, str]] = [
    # Files that are no images
    ("image file of zero bytes", image(b""), "error row", "found an empty file: copy it again"),
    ("JPEG cut in the middle", image(cut(JPEG), "jpg"), "error row", "image file is truncated"),
    ("PNG cut in the middle", image(cut(PNG)), "error row", "truncated"),
    ("PNG with a changed byte", image(PNG[:900] + b"\xff\0\xff" + PNG[903:]), "error row", "found a broken one"),
    ("PNG header without pixels", image(PNG[:40]), "error row", "found bytes beginning with"),
    (
        "text named .png",
        image(b"hello, world, this is text"),
        "error row",
        "found bytes beginning with b'hello, world'",
    ),
    ("Git LFS pointer", image(storage.LFS_POINTER, "jpg"), "error row", "a Git LFS pointer to it, which git lfs pull"),
    ("random bytes named .jpg", image(pixels(500).tobytes(), "jpg"), "error row", "found bytes beginning with"),
    ("EPS program named .png", image(encoded(pixels(), "EPS")), "error row", "found bytes beginning with b'%!PS-Adobe"),
    ("PDF named .jpg", image(b"%PDF-1.7\n1 0 obj", "jpg"), "error row", "found bytes"),
    ("SVG named .png", image(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "error row", "found bytes"),
    ("broken link", odd_file(lambda path: path.symlink_to("x")), "error row", "No such file or directory"),
    ("named pipe called .png", odd_file(os.mkfifo), "error row", "expected a file, found none that can be read"),
    ("file that vanished after the listing", vanished, "error row", "No such file or directory"),
    ("unreadable file", as_nobody("c/1.png"), "error row", "Permission denied"),
    # Images that are too much
    (
        "gigapixel PNG, 100,000 x 100,000",
        image(png(100_000, 100_000)),
        "error row",
        "67108864 pixels, found 10000000000:",
    ),
    ("PNG of 8,193 x 8,192", image(png(8_193, 8_192)), "error row", "found 8193 x 8192: make the image smaller"),
    ("gigapixel frame of a small GIF", image(big_gif(), "gif"), "error row", "at most 67108864 pixels"),
    ("PNG with 100 MB of packed text", image(lambda: with_text(100_000_000)), "error row", "found a broken one"),
    # Images of other kinds
    ("smaller than the centre crop", image(PNG, preprocessing=CROPPED), "error row", "at least 100 x 100"),
    ("TIFF of floats with NaN", image(encoded(NANS, "TIFF"), "tif"), "error row", "96 of 96 NaN or infinite"),
    ("TIFF of integers over 65,535", image(encoded(LARGE, "TIFF"), "tif"), "error row", "in [0, 255], found 70000"),
    ("CMYK JPEG", image(encoded(Image.new("CMYK", (W, H)), "JPEG"), "jpg"), "read", "its colours converted"),
    ("16-bit grey PNG", image(encoded(pixels().astype(np.uint16) * 257)), "read", "scaled to 8 bits"),
    ("PNG with alpha", image(encoded(pixels(H, W, 4))), "read", "laid on white"),
    ("palette with a transparent colour", image(with_transparent_colour), "read", "laid on white"),
    ("animated GIF", image(animated, "gif"), "read", "its first frame"),
    ("JPEG turned by EXIF", image(turned, "jpg"), "read", "turned upright"),
    ("JPEG with broken EXIF", image(NO_EXIF, "jpg"), "read", "as it lies"),
    ("bilevel PBM", image(BILEVEL, "pbm"), "read", "as black and white"),
    ("JPEG named .PNG", image(JPEG, "PNG"), "read", "by its content"),
    ("image of another size", image(encoded(pixels(1, 300))), "read", "resized"),
    # Arrays
    ("array with NaN", array(np.where(np.eye(H, W), np.nan, 0.5)), "refused", "found 8 of 96 NaN or infinite"),
    ("array with infinity", array(np.full((H, W), np.inf, np.float32)), "refused", "NaN or infinite"),
    ("array of another size", array(pixels(W, H)), "refused", "an array of shape (1, 8, 12), found (12, 8)"),
    ("array of two channels", array(pixels(2, H, W)), "refused", "an array of shape (1, 8, 12), found (2, 8, 12)"),
    ("array of floats of 0 to 255", array(pixels().astype(np.float32)), "refused", "expected float32 pixels in [0, 1]"),
    ("array of negative integers", array(pixels().astype(int) - 300), "refused", "expected int64 pixels in [0, 255]"),
    ("array of strings", array(pixels().astype(str)), "refused", "expected pixels of type uint8 or float32"),
    # Folders
    ("empty folder", folder(), "refused", "expected images in split 'all'"),
    ("folder of other files", folder("c/a.txt", "c/b.md"), "refused", "an image's extension (c/a.txt, c/b.md)"),
    ("file in place of a folder", lambda root: dataset("folder", written(root, b"x")), "refused", "Parquet files (x.p"),
    ("missing folder", lambda root: dataset("folder", root / "nowhere"), "refused", "found nothing at"),
    ("unreadable folder", as_nobody("c"), "refused", "Permission denied: give this user the right"),
    ("test/ asked of train/ alone", folder("train/c/1.png", split="test"), "refused", "expected one of train, all"),
    ("one class, for training", folder("c/1.png", then="class_names_of"), "refused", "two classes, found 'c'"),
    ("no classes, for training", folder("1.png", "2.png", then="class_names_of"), "refused", "found no labels"),
    ("no classes, for explaining", folder("1.png", "2.png"), "read", "['1.png', '2.png']"),
    ("class without images", folder("c/1.png", "d/a.txt", then="left_out"), "read", "without an image (d)': 1"),
    ("hidden files", folder("c/1.png", "c/._1.png", ".x/2.png", then="left_out"), "read", "'hidden files': 2"),
    ("circular links", circles, "read", "['a/1.png', 'a/2.png']"),
    ("usual names of splits", folder("Training/c/1.png", "val/c/2.png", split="held-out"), "read", "['val/c/2.png']"),
    ("splits in longer names", folder("seg_train/c/1.png", "seg_test/c/2.png", split="held-out"), "read", "/c/2.png"),
    ("splits beside other folders", folder("train/c/1.png", "bus/1.png"), "refused", "if they are classes, give"),
    ("splits inside class folders", folder("c/train/1.png", "c/test/2.png"), "refused", "splits above class folders"),
    ("folders of the system", folder("c/1.png", "@eaDir/1.png", then="left_out"), "read", "(@eaDir)': 1"),
    ("classes that differ in case", folder("Cat/1.png", "cat/2.png", then="notes"), "read", "in case only: Cat, cat"),
    ("folder around the classes", folder("d/a/1.png", "d/b/2.png", then="notes"), "read", "not read as classes"),
    (
        "folder around the classes beside other images",
        folder("e/1.png", "d/a/1.png", *(f"d/b/{number}.png" for number in range(8))),
        "refused",
        "found 9 of 10 images in folders below one (d: a, b): if those are the classes, name",
    ),
    ("archives", folder("train.tar.gz"), "refused", "found tar archives (train.tar.gz): unpack them"),
    ("spaces, unicode, newlines in names", folder("ü ñ/a\nb .png", "c/猫.png"), "read", r"/猫.png', 'ü ñ/a\nb .png']"),
    ("file name that is not UTF-8", folder("c/caf\udce9.png"), "read", r"['c/caf\\xe9.png']"),
    # Parquet
    ("Parquet file cut short", parquet(cut(parquet_bytes())), "refused", "expected a whole Parquet file"),
    ("text named .parquet", parquet(b"image,label\n"), "refused", "expected a whole Parquet file"),
    ("Parquet with zero rows", parquet(table([])), "refused", "expected images in split 'all'"),
    ("Parquet without a column image", parquet(pa.table({"img": [b"x"]})), "refused", "expected a column image"),
    ("column image of strings", parquet(pa.table({"image": ["a.png"]})), "refused", "paths such as 'a.png'"),
    ("column image of lists", parquet(pa.table({"image": [[1, 2]]})), "refused", "found list<"),
    ("column label of floats", parquet(table(label=[1.5, 2.5])), "refused", "column label of strings or whole numbers"),
    ("labels of -1", parquet(table(label=[-1, 0]), then="notes"), "read", "which is read as no label"),
    ("null image", parquet_row(PNG, None, PNG), "error row", "found null: fill or drop the row"),
    ("image of zero bytes", parquet_row(PNG, b"", PNG), "error row", "found an empty file"),
    ("null label", parquet(table(label=["a", None])), "read", "['00000000', '00000001']"),
    ("label unknown to the model", labels("dog", "cow", "99", None), "read", "[1, None, None, None]"),
    ("null image_id", parquet(table(image_id=["a", None])), "refused", "found null in 1: fill them"),
    ("duplicate image_id", parquet(table(image_id=["a", "a"])), "refused", "found 1 duplicates ('a')"),
    ("split that is neither train nor test", parquet(SPLIT, split="train", then="left_out"), "read", "is none of"),
    ("no row of the split asked for", parquet(SPLIT, split="test"), "refused", "expected one of train, all"),
    ("directory without Parquet files", lambda root: dataset("parquet", root), "refused", "*.parquet or *.pq, in"),
    ("row group with changed bytes", broken_row_group, "error row", "found it broken: restore it"),
    ("Parquet file replaced after its listing", replaced_parquet, "error row", "found it broken: restore it"),
    # MNIST
    ("MNIST without its files", lambda root: dataset("mnist", root, "train"), "refused", "train-images-idx3-ubyte[.gz"),
    ("idx file cut short", mnist(idx(DIGITS)[:-1]), "refused", "expected a whole idx file of 3 axes"),
    ("idx file of zero bytes", mnist(b""), "refused", "expected a whole idx file of 3 axes"),
    ("labels instead of images", mnist(idx(pixels(3))), "refused", "expected a whole idx file of 3 axes"),
    ("more images than labels", mnist(idx(DIGITS), idx(pixels(2))), "refused", "found 2 and 3"),
    ("idx.gz cut short", mnist(cut(gzip.compress(idx(DIGITS))), suffix=".gz"), "refused", "expected a whole idx file"),
    # CelebA
    ("CelebA without its images", celeba(images="x"), "refused", "expected a folder img_align_celeba/"),
    ("CelebA without its attributes", celeba(""), "refused", "expected list_attr_celeba.txt"),
    ("CelebA without its partition", celeba(partition=""), "refused", "expected list_eval_partition.txt"),
    ("attributes cut short", celeba(FACES[:-25]), "refused", "a line for each face, found 3 lines"),
    ("attributes with a broken line", celeba(FACES[:-3] + "7"), "refused", "in line 4 of list_attr_celeba.txt"),
    ("attributes that point outside", celeba(FACES.replace("1.jpg", "../1.jpg")), "refused", "in line 3 of"),
    ("face without a partition", celeba(partition="2.jpg 0\n"), "refused", "found no '1.jpg'"),
    ("attribute that is not there", celeba(attributes=["Hat"]), "refused", "expected some of Black_Hair, Blond_Hair"),
    ("face whose file is missing", celeba(), "error row", "No such file or directory"),
    # Doors
    ("unknown data set", door("imagenet"), "refused", "expected one of digits, mnist, folder, parquet, celeba_hair"),
    ("unknown split", door("digits", split="val"), "refused", "split: expected one of train, test, all"),
    ("data given to digits", door("digits", "photos"), "refused", "data: expected none for digits"),
    ("folder without --data", door("folder"), "refused", "data: expected where the images of folder lie"),
    ("URI of an unknown scheme", door("folder", "https://host/photos"), "refused", "found the scheme 'https'"),
    ("MNIST on an object store", door("mnist", "s3://bucket/mnist"), "refused", "expects a local directory"),
    ("password in a URI", door("folder", "s3://me:secret@bucket/x"), "refused", "found s3://***@bucket/x"),
    ("unknown mode", lambda _: outcome_of(lambda: Preprocessing("CMYK", H, W)), "refused", "expected mode 'L'"),
    ("size of zero", lambda _: outcome_of(lambda: Preprocessing("L", 0, W)), "refused", "height of 1 to 8192"),
]


@pytest.mark.parametrize(("kind", "build", "outcome", "said"), BAD_INPUT, ids=[kind[0] for kind in BAD_INPUT])
def test_bad_input_gets_what_the_table_says(kind: str, build: Builder, outcome: str, said: str, tmp_path: Path) -> None:
    found, message = build(tmp_path)
    assert found == outcome, message
    assert not message or said in message
    if outcome == "error row":
        # Nothing in it depends on where the data lies or on the process: tables stay equal byte for byte.
        assert message.startswith("expected ") and ", found " in message and ": " in message
        assert str(tmp_path) not in message and "0x" not in message
    if outcome == "refused":
        assert len(message) > 20
        assert "expect" in message or "cannot" in message
        assert "secret" not in message


# Requests that jobs/explain_all.py refuses on the driver, exit code 2, before it starts Ray and before it writes


def filled_with(name: str) -> Callable[[Path], list[str]]:
    """--out is a directory that holds something."""

    def argv(root: Path) -> list[str]:
        (root / "taken").mkdir()
        (root / "taken" / name).write_bytes(b"{}")
        return ["--out", str(root / "taken")]

    return argv


def a_file(flag: str, *below: str) -> Callable[[Path], list[str]]:
    """The place of ``flag`` is a file, or below one."""

    def argv(root: Path) -> list[str]:
        (root / "file").write_bytes(b"mine")
        return [flag, str(root.joinpath("file", *below))]

    return argv


def ids_file(content: str) -> Callable[[Path], list[str]]:
    def argv(root: Path) -> list[str]:
        (root / "ids.txt").write_text(content)
        return ["--where", f"ids={root / 'ids.txt'}"]

    return argv


def below_the_data(root: Path) -> list[str]:
    (root / "photos").mkdir()
    return ["--dataset", "folder", "--data", str(root / "photos"), "--out", str(root / "photos" / "audit")]


DESCRIBED = {"classes": [str(digit) for digit in range(10)], "mode": "L", "size": [28, 28], "output": "logits"}


def onnx_file(described: dict[str, Any] | None) -> Callable[[Path], list[str]]:
    """A file that is no ONNX, with a description beside it or without one."""

    def build(root: Path) -> list[str]:
        (root / "model.onnx").write_bytes(b"no graph")
        if described is not None:
            (root / "model.onnx.json").write_text(json.dumps(described))
        return ["--predictor", str(root / "model.onnx")]

    return build


#: name, flags beside a good command's (or what makes them), what the message must say.
BAD_REQUESTS: list[tuple[str, list[str] | Callable[[Path], list[str]], str]] = [
    ("unknown method", ["--method", "gradcam"], "invalid choice: 'gradcam' (choose from"),
    ("method whose classifiers the model lacks", ["--method", "fgsm"], "train it with image_members"),
    ("unknown target", ["--targets", "11"], "unknown class '11'; choose from 0, 1, 2"),
    ("unknown target among known ones", ["--targets", "3", "three"], "unknown class 'three'"),
    ("unknown engine", ["--engine", "warp"], "invalid choice: 'warp'"),
    ("unknown form of pictures", ["--images", "jpeg"], "invalid choice: 'jpeg'"),
    ("unknown flag", ["--treshold", "1"], "unrecognized arguments: --treshold"),
    ("probability of 1", ["--min-target-prob", "1"], "--min-target-prob: expected"),
    ("NaN probability", ["--min-target-prob", "nan"], "--min-target-prob: expected"),
    ("negative number of steps", ["--max-steps", "-1"], "--max-steps: expected"),
    ("number of steps that is no integer", ["--max-steps", "ten"], "invalid int value: 'ten'"),
    ("learning rate of zero", ["--learning-rate", "0"], "--learning-rate: expected"),
    ("infinite learning rate", ["--learning-rate", "inf"], "--learning-rate: expected"),
    ("negative weight of the distance", ["--distance-weight", "-1"], "--distance-weight: expected"),
    ("step size of zero", ["--step-size", "0"], "--step-size: expected"),
    ("re-encoded probability of 1", ["--min-reencoded-prob", "1"], "--min-reencoded-prob: expected at least 0 and"),
    ("auto threshold without held-out figures", ["--min-target-prob", "auto"], "auto needs the held-out"),
    ("predictor and predictions at once", ["--predictor", "a:b", "--predictions", "c"], "not allowed with argument"),
    ("predictor of an unknown kind", ["--predictor", "model.pt"], "file ending in .onnx, or module:function"),
    ("predictor that cannot be imported", ["--predictor", "no.such:model"], "cannot be imported: ModuleNotFoundError"),
    ("predictor whose file is missing", ["--predictor", "/nowhere/m.onnx"], "an ONNX file, found no /nowhere/m.onnx"),
    ("predictor without its description", onnx_file(None), "model.onnx.json beside the model"),
    (
        "predictor without the order of its classes",
        onnx_file({"mode": "L"}),
        "expected the entries classes, mode, size, output",
    ),
    ("predictor that is not ONNX", onnx_file(DESCRIBED), "model.onnx cannot be loaded"),
    ("no images asked for", ["--limit", "0"], "--limit: expected at least 1, got 0"),
    ("shards of no images", ["--shard-rows", "0"], "--shard-rows: expected at least 1, got 0"),
    ("unknown condition", ["--where", "size=8"], "expected label=NAME[,NAME...], ids=FILE or misclassified"),
    ("label without a name", ["--where", "label="], "expected label=NAME[,NAME...]"),
    ("label that no image has", ["--where", "label=x"], "no image has the label 'x'; there are 0, 1"),
    (
        "ids that are not in the data",
        ids_file("test/0001\ntest/9999\n"),
        "ids.txt is not in the data, the first 'test/9999'",
    ),
    ("file of ids that is missing", ["--where", "ids=/nowhere/ids.txt"], "cannot read /nowhere/ids.txt"),
    ("file of ids that is empty", ids_file(""), "no image is left"),
    ("attributes of data without any", ["--attributes", "Hat"], "Hat"),
    ("model that is missing", ["--model", "/nowhere"], "no model in /nowhere; train one first: python"),
    ("model that is a file", a_file("--model"), "a file: name the directory that training wrote"),
    ("model on an unknown kind of store", ["--model", "gs://bucket/model"], "found the scheme 'gs'"),
    ("output path that is a file", a_file("--out"), "expected a directory, found a file"),
    ("output path below a file", a_file("--out", "audit"), "a file stands where a directory is expected"),
    ("output directory that holds other files", filled_with("cat.png"), "an audit, found cat.png"),
    ("output directory that holds another model", filled_with("model.json"), "an audit, found model.json"),
    ("output directory with a damaged plan", filled_with("plan.json"), "plan.json is damaged"),
    ("output path that is not UTF-8", ["--out", "/tmp/\udcff"], "expected a path in UTF-8; choose another --out"),
    ("output below the data", below_the_data, "--out: expected a directory outside the data"),
    ("read-only output", ["--out", "/proc/nowhere/audit"], "cannot make /proc/nowhere"),
    ("output on an unknown kind of store", ["--out", "https://host/audit"], "found the scheme 'https'"),
    ("password in --out", ["--out", "s3://me:secret@bucket/audit"], "found s3://***@bucket/audit"),
]


#: What the rows above put where the job works.
KEPT = ("taken", "photos", "file", "ids.txt", "cat.png", "model.json", "plan.json", "model.onnx", "model.onnx.json")


def refusal(model: Path, argv: list[str] | Callable[[Path], list[str]], root: Path) -> tuple[int, str]:
    """Exit code and last line of the job on a bad request; nothing is left of it where --out was free."""
    job = load_job("explain_all")
    free = root / "free"
    more = argv(root) if callable(argv) else argv
    said, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(job.driver, "start_ray", lambda *_: pytest.fail("Ray was started"))
        try:
            code = job.main(["--model", str(model), "--out", str(free), "--limit", "4", *more])
        except SystemExit as error:  # argparse
            code = error.code
    assert not free.exists() and not printed.getvalue(), "something was begun"
    return code, said.getvalue().splitlines()[-1]


@pytest.mark.parametrize(("argv", "said"), [kind[1:] for kind in BAD_REQUESTS], ids=[kind[0] for kind in BAD_REQUESTS])
def test_bad_requests_are_refused_before_anything_starts(
    argv: list[str] | Callable[[Path], list[str]], said: str, tiny_digits_model: Path, tmp_path: Path
) -> None:
    code, message = refusal(tiny_digits_model, argv, tmp_path)
    assert code == 2 and said in message, message
    assert "secret" not in message
    # What lay at --out lies there still.
    for path in tmp_path.rglob("*"):
        assert path.name in KEPT, path


# Kinds without end


PICTURES = [
    encoded(pixels(30, 40, 3), kind, **options)
    for kind, options in (("PNG", {}), ("JPEG", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {}), ("PPM", {}))
] + [encoded(pixels(), "TIFF", compression="tiff_lzw"), encoded(pixels().astype(np.uint16)), turned(), animated()]


def is_read_or_refused(content: bytes | np.ndarray) -> None:
    for preprocessing in (GREY, COLOUR):
        try:
            found = preprocessing.apply(content)
        except UnreadableImage as error:
            assert "expected" in str(error) and "found" in str(error) and len(str(error)) < 500
        else:
            assert (found.shape, found.dtype) == (preprocessing.image_shape, np.uint8)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PICTURES), st.data())
def test_damaged_images_are_read_or_refused_with_a_reason(content: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(content)
    for _ in range(draw.draw(st.integers(1, 4))):
        damaged[draw.draw(st.integers(0, len(content) - 1))] = draw.draw(st.integers(0, 255))
    is_read_or_refused(bytes(damaged[: draw.draw(st.integers(len(content) // 2, len(content)))]))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([np.uint8, np.uint16, np.int32, np.float16, np.float32, np.float64, np.bool_, np.complex64, "S3"]),
    st.lists(st.integers(0, 13), max_size=4),
    st.sampled_from([0, 1, 255, 300, -1, np.nan, np.inf]),
)
@pytest.mark.filterwarnings("ignore")
def test_any_array_is_read_or_refused_with_a_reason(kind: Any, shape: list[int], value: float) -> None:
    is_read_or_refused(
        np.full(shape, np.nan_to_num(value) if kind in (np.uint8, np.uint16, np.int32) else value).astype(kind)
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(), min_size=1, max_size=6, unique=True))
def test_any_image_ids_come_back(image_ids: list[str]) -> None:
    with tempfile.TemporaryDirectory() as root:
        path = written(Path(root), table([PNG] * len(image_ids), image_id=pa.array(image_ids, pa.string())))
        listed = data.open_dataset("parquet", path, "all")
        listing = data.list_images(listed)
        assert listing["image_id"].to_pylist() == image_ids
        assert data.read_images(listed, listing, GREY)["image_id"].to_pylist() == image_ids
        found = []
        for split in ("train", "test"):
            with contextlib.suppress(ValueError):  # of no image
                found += data.list_images(data.open_dataset("parquet", path, split))["image_id"].to_pylist()
        assert sorted(found) == sorted(image_ids)
