"""Images and where they come from: sources list a data set, then read any part of its listing into an Arrow table.

Knows file layouts, decoding and preprocessing. Does not know shards' sizes, models, or what is asked of an image.

A listing is a table of one row for each image, in an order that depends on the data alone: ``image_id`` (unique),
``location`` and ``row`` (where its bytes lie), ``size`` (of that file), ``label_name`` (null when there is none), then the
attributes. Adding a source means writing its two functions and its line in ``SOURCES``.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from clarity import schema, storage

MAX_PIXELS = 64 << 20
#: What is decoded, and nothing else: some of Pillow's other formats start programs.
FORMATS = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)
SPLITS = ("train", "test", "all")
SAMPLE_ROWS = 64
LISTING_COLUMNS = ("image_id", "location", "row", "size", "label_name")

_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FORMAT_NAMES = ", ".join(FORMATS)


class UnreadableImage(ValueError):
    """Why one image cannot be used: what was expected, what was found, what to do. Becomes the row's ``error``."""


# --------------------------------------------------------------------------------------------- from bytes to pixels


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's pixels, the same in training and explaining; stored in model.json.

    In this order: first frame; orientation by EXIF; 16-bit and float pixels scaled to 8 bits; transparency laid on white;
    mode (grey by ITU-R 601-2 luma); centre crop; resize (bilinear, antialiased, the aspect is not kept).

    Args:
        mode: "L" (grey, C=1) or "RGB" (C=3).
        height: H in pixels.
        width: W in pixels.
        center_crop: side of the centred square taken first, from images that are not (height, width) already.
    """

    mode: str
    height: int
    width: int
    center_crop: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("L", "RGB"):
            raise ValueError(f"expected mode 'L' (grey) or 'RGB' (colour), found {self.mode!r}: choose one of them")
        for name, value in (("height", self.height), ("width", self.width), ("center_crop", self.center_crop)):
            if name == "center_crop" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 8192:
                raise ValueError(f"expected {name} in pixels, 1 to 8192, found {value!r}: choose one in that range")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (1 if self.mode == "L" else 3, self.height, self.width)

    def apply(self, image: bytes | np.ndarray | Image.Image) -> np.ndarray:
        """The pixels of one image, uint8 (C, H, W).

        Args:
            image: a file's bytes or a PIL image, of any size; or an array of exactly the model's size, (C, H, W),
                (H, W, C) or, for one channel, (H, W): uint8, integers in [0, 255], or floats in [0, 1].

        Raises:
            UnreadableImage: it is none, or cannot be used; says why.
        """
        if isinstance(image, np.ndarray):
            return self._from_array(image)
        try:
            picture = _upright(image if isinstance(image, Image.Image) else _open(image))
            picture = self._fit(_convert(picture, self.mode))
        except (UnreadableImage, MemoryError):
            raise
        except Exception as error:  # Pillow's decoders raise what they like on broken bytes
            raise UnreadableImage(f"expected a whole image, found a broken one ({error}): copy it again") from None
        pixels = np.asarray(picture)
        return pixels.reshape(self.image_shape) if self.mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def to_json(self) -> dict[str, Any]:
        """The fields, for model.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Any) -> Preprocessing:
        """The inverse of ``to_json``.

        Raises:
            ValueError: another set of fields, or a value out of its range.
        """
        expected = set(cls.__dataclass_fields__)
        if not isinstance(fields, dict) or not {"mode", "height", "width"} <= set(fields) <= expected:
            raise ValueError(f"expected preprocessing with {', '.join(sorted(expected))}, found {fields!r}: restore it")
        return cls(**fields)

    def _fit(self, picture: Image.Image) -> Image.Image:
        width, height = picture.size
        if (width, height) == (self.width, self.height):
            return picture
        if side := self.center_crop:
            if side > min(width, height):
                raise UnreadableImage(
                    f"expected at least {side} x {side} pixels for the centre crop, found {width} x {height}: leave it out, "
                    "or train with a smaller center_crop"
                )
            left, top = round((width - side) / 2), round((height - side) / 2)
            picture = picture.crop((left, top, left + side, top + side))
        return picture.resize((self.width, self.height), Image.Resampling.BILINEAR)

    def _from_array(self, array: np.ndarray) -> np.ndarray:
        channels, height, width = self.image_shape
        if array.shape == (height, width, channels) and array.shape != self.image_shape:
            array = array.transpose(2, 0, 1)
        elif channels == 1 and array.shape == (height, width):
            array = array[None]
        if array.shape != self.image_shape:
            raise UnreadableImage(
                f"expected an array of shape {self.image_shape}, found {array.shape}: resize it, or give a PIL image, "
                "which is cropped and resized as in training"
            )
        return np.ascontiguousarray(_to_uint8(array, whole=255))


def _open(data: bytes) -> Image.Image:
    """An image of which only the header has been read."""
    if not data:
        raise UnreadableImage("expected an image, found an empty file: copy it again")
    try:
        return Image.open(io.BytesIO(data), formats=list(FORMATS))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImage(_too_large("more")) from None
    except UnidentifiedImageError:
        start = data[:16]
        what = "text" if all(9 <= byte <= 13 or 32 <= byte < 127 for byte in start) else "bytes"
        raise UnreadableImage(
            f"expected an image ({_FORMAT_NAMES}), found {what} that begins with {start!r}: convert it or leave it out"
        ) from None


def _too_large(found: Any) -> str:
    return f"expected at most {MAX_PIXELS} pixels, found {found}: make it smaller"


def _upright(picture: Image.Image) -> Image.Image:
    """The first frame, decoded, turned as its EXIF orientation says."""
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(_too_large(f"{width} x {height}"))
    picture.load()
    turn = _TURNS.get(_orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF does not make the pixels unreadable
        return 1


def _convert(picture: Image.Image, mode: str) -> Image.Image:
    """The picture in mode "L" or "RGB", 8 bits."""
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = Image.fromarray(_to_uint8(np.asarray(picture), whole=65535))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == mode else picture.convert(mode)


def _to_uint8(values: np.ndarray, whole: int) -> np.ndarray:
    """Pixels as 8 bits: integers of [0, whole], floats of [0, 1]; rounded."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values * np.uint8(255)
    if values.dtype == np.uint16:
        whole = 65535
    if values.dtype.kind == "f":
        if bad := int(values.size - np.isfinite(values).sum()):
            raise UnreadableImage(
                f"expected finite pixels, found {bad} of {values.size} NaN or infinite: mend or leave out"
            )
        top: float = 1
    elif values.dtype.kind in "iu":
        top = whole
    else:
        raise UnreadableImage(f"expected pixels of type uint8 or float32, found {values.dtype}: convert them")
    low, high = values.min(), values.max()
    if low < 0 or high > top:
        raise UnreadableImage(f"expected {values.dtype} pixels in [0, {top}], found {low} to {high}: scale them")
    return np.rint(values.astype(np.float64) * (255 / top)).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ the data set


@dataclass(frozen=True)
class Dataset:
    """Which images: a source, where its data lies, which part. Cheap and picklable; ``open_dataset`` checks it.

    Args:
        source: a key of SOURCES.
        data: local path or s3:// URI; None for digits.
        split: "train", "test" or "all"; celeba_hair also has "valid".
        attributes: names of the columns carried along as int8.
        unlabelled: celeba_hair: list the faces without exactly one hair colour too, with a null label. Other sources always
            list what has no label.
    """

    source: str
    data: str | None = None
    split: str = "train"
    attributes: tuple[str, ...] = ()
    unlabelled: bool = False


Readable = bytes | Image.Image | UnreadableImage


@dataclass(frozen=True)
class Source:
    """What a source can do.

    Args:
        doc: one line on the layout that it reads.
        list_images: the listing of a data set.
        read_images: for rows of the listing, pairs (place in the rows, content), in any order.
        default_preprocessing: None: looked up in the images.
        needs_data: whether a place must be given.
        remote: whether the place may be an object store.
        splits: the choices of ``split``.
        attributes: the names that can be carried along, given the place; None: it has none.
    """

    doc: str
    list_images: Callable[[Dataset], pa.Table]
    read_images: Callable[[Dataset, pa.Table], Iterable[tuple[int, Readable]]]
    default_preprocessing: Preprocessing | None = None
    needs_data: bool = True
    remote: bool = True
    splits: tuple[str, ...] = SPLITS
    attributes: Callable[[str], list[str]] | None = None


def open_dataset(
    source: str,
    data: storage.URI | None = None,
    split: str = "train",
    *,
    download: bool = False,
    attributes: Sequence[str] = (),
    unlabelled: bool = False,
) -> Dataset:
    """A data set, checked at the door.

    Args:
        source: a key of SOURCES.
        data: where it lies; a local path is made absolute, for workers in other directories.
        split: one of the source's splits.
        download: mnist: fetch what is missing into ``data``.
        attributes: see Dataset.
        unlabelled: see Dataset.

    Raises:
        ValueError: an unknown source, split or attribute; data missing, superfluous or not there.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown data set {source!r}: expected one of {', '.join(SOURCES)}")
    kind = SOURCES[source]
    if split not in kind.splits:
        raise ValueError(f"unknown split {split!r} of {source}: expected one of {', '.join(kind.splits)}")
    if download and source != "mnist":
        raise ValueError(f"{source} cannot be downloaded: expected download for mnist only; give the place of the data")
    if kind.needs_data and not (data and str(data).strip()):
        raise ValueError(f"{source} expects a place of its data ({kind.doc}), found none: name it")
    if data and not kind.needs_data:
        raise ValueError(
            f"{source} ships with the package and expects no data, found {storage.display(data)}: leave it out"
        )
    if data:
        storage.filesystem(data)
        if not storage.is_remote(data):
            data = os.path.abspath(os.path.expanduser(data))
        elif not kind.remote:
            raise ValueError(f"{source} expects a local directory, found {storage.display(data)}: copy it here")
        if download:
            _download_mnist(str(data))
        if not storage.exists(data):
            raise ValueError(
                f"{source} expects data ({kind.doc}), found nothing at {storage.display(data)}: check the path, and that it "
                "is there on this machine"
            )
    if attributes:
        choices = kind.attributes(str(data)) if kind.attributes else []
        if unknown := [name for name in attributes if name not in choices]:
            raise ValueError(
                f"unknown attributes {', '.join(map(repr, unknown))} of {source}: expected some of "
                f"{', '.join(choices) or 'none, as this source has no attributes'}"
            )
    return Dataset(source, None if data is None else str(data), split, tuple(dict.fromkeys(attributes)), unlabelled)


def list_images(dataset: Dataset) -> pa.Table:
    """The listing: one row for each image, see the module's docstring. ``left_out`` tells what is not in it.

    Raises:
        ValueError: no image, or image ids that are missing or double.
    """
    listing = SOURCES[dataset.source].list_images(dataset)
    where = f"{dataset.source} {storage.display(dataset.data or '')}".strip()
    if not len(listing):
        reasons = "".join(f"; left out: {count} {reason}" for reason, count in left_out(listing).items())
        raise ValueError(
            f"expected images in split {dataset.split!r} of {where}, found none{reasons}: check the place and its layout "
            f"({SOURCES[dataset.source].doc}), or choose another split"
        )
    ids = listing["image_id"]
    if ids.null_count:
        row = pc.index(pc.is_null(ids), True).as_py()
        raise ValueError(
            f"expected an image_id in every row of {where}, found null ({ids.null_count}, first at {row}): fill it"
        )
    if len(pc.unique(ids)) < len(ids):
        counts = pc.value_counts(ids)
        double = counts.filter(pc.greater(pc.struct_field(counts, "counts"), 1)).field("values")
        raise ValueError(
            f"expected each image_id of {where} once, found {len(double)} more than once "
            f"({', '.join(repr(name) for name in double[:3].to_pylist())}): rename or drop them"
        )
    return listing


def left_out(listing: pa.Table) -> dict[str, int]:
    """What the source saw and did not list: reason -> count."""
    return dict(json.loads((listing.schema.metadata or {}).get(b"clarity.left_out", b"{}")))


def class_names_of(listing: pa.Table) -> tuple[str, ...]:
    """The classes to train on: the listing's labels, sorted; as numbers where all of them are.

    Raises:
        ValueError: fewer than two.
    """
    names = pc.unique(listing["label_name"]).drop_null().to_pylist()
    if len(names) < 2:
        raise ValueError(
            f"expected images of at least two classes, found {len(names)} ({', '.join(map(repr, names)) or 'no labels'}): "
            "a class is a folder, or a value of the label column"
        )
    return tuple(sorted(names, key=int if all(re.fullmatch(r"-?\d{1,18}", name) for name in names) else None))


def label_indices(label_names: pa.Array | pa.ChunkedArray, class_names: Sequence[str]) -> pa.Array:
    """The index of each label in ``class_names``, int32; null for a missing or an unknown one."""
    found = pc.index_in(label_names, value_set=pa.array(class_names, pa.string()))
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def listing_fingerprint(listing: pa.Table) -> str:
    """sha256 over the listing, the sizes of the files included; independent of how the table is cut into chunks."""
    digest = hashlib.sha256()
    for name in listing.column_names:
        digest.update(json.dumps([name, str(listing.schema.field(name).type), len(listing)]).encode())
        column = listing[name]
        digest.update(np.packbits(pc.is_null(column).to_numpy()).tobytes())
        if pa.types.is_string(column.type):
            digest.update(pc.binary_length(pc.fill_null(column, "")).to_numpy().astype("<i4").tobytes())
            for chunk in column.chunks:
                digest.update("".join(value or "" for value in chunk.to_pylist()).encode())
        else:
            digest.update(pc.fill_null(column, 0).to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def infer_preprocessing(
    dataset: Dataset,
    listing: pa.Table,
    *,
    image_size: int | tuple[int, int] | None = None,
    mode: str | None = None,
    center_crop: int | None = None,
) -> Preprocessing:
    """The preprocessing for training: what is given, else the source's own, else looked up in a sample of the images.

    Looked up: grey if all of the sample are, else RGB; their size if it is common to all and no side is above 128, else
    64 x 64.

    Args:
        dataset: where the images are.
        listing: its listing.
        image_size: side, or (height, width), in pixels.
        mode: "L" or "RGB".
        center_crop: side of the centred square taken first.

    Raises:
        ValueError: none of the sample can be read, or a value out of its range.
    """
    known = SOURCES[dataset.source].default_preprocessing
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if known is None:
        if size is None or mode is None:
            sizes, grey = _sample(dataset, listing)
            mode = mode or ("L" if grey else "RGB")
            size = size or (sizes.pop() if len(sizes) == 1 and max(min(sizes)) <= 128 and not center_crop else (64, 64))
        return Preprocessing(mode, *size, center_crop)
    if image_size is not None and size is not None:
        known = replace(known, height=size[0], width=size[1])
    return replace(known, mode=mode or known.mode, center_crop=center_crop or known.center_crop)


def _sample(dataset: Dataset, listing: pa.Table) -> tuple[set[tuple[int, int]], bool]:
    """The sizes (height, width) in a sample of the images, and whether all of it is grey."""
    places = np.unique(np.linspace(0, len(listing) - 1, SAMPLE_ROWS).astype(int))
    sizes, grey, reason = set(), True, ""
    for _, content in SOURCES[dataset.source].read_images(dataset, listing.take(places)):
        try:
            if isinstance(content, UnreadableImage):
                raise content
            picture = content if isinstance(content, Image.Image) else _open(content)
            width, height = picture.size
            sizes.add((width, height) if _orientation(picture) >= 5 else (height, width))
            grey = grey and (picture.mode in ("1", "L", "LA", "F") or picture.mode.startswith("I"))
        except UnreadableImage as error:
            reason = reason or str(error)
    if not sizes:
        raise ValueError(f"expected images, found none that can be read among {len(places)}; the first: {reason}")
    return sizes, grey


def read_shard(dataset: Dataset, rows: pa.Table, preprocessing: Preprocessing) -> pa.Table:
    """Rows of the listing with their pixels (``schema.shard_schema``), in the same order.

    An image that cannot be read is a row with a null image and its reason; its neighbours are unharmed.

    Raises:
        storage.StorageError: the place itself fails for the moment: no image's fault, so the shard is to be read again.
    """
    pixels = np.zeros((len(rows), *preprocessing.image_shape), np.uint8)
    errors: list[str | None] = ["expected an image, found nothing read: report this"] * len(rows)
    for place, content in SOURCES[dataset.source].read_images(dataset, rows):
        try:
            if isinstance(content, UnreadableImage):
                raise content
            pixels[place] = preprocessing.apply(content)
            errors[place] = None
        except UnreadableImage as error:
            errors[place] = str(error)
    bad = np.array([error is not None for error in errors], bool)
    fields = schema.shard_schema(preprocessing.image_shape, dataset.attributes)
    kind = fields.field("image").type
    images = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), type=kind, mask=pa.array(bad))
    columns = [rows["image_id"], rows["label_name"], images, pa.array(errors, pa.string())]
    return pa.table([*columns, *(rows[name] for name in dataset.attributes)], schema=fields)


def read_all(
    dataset: Dataset, listing: pa.Table, preprocessing: Preprocessing, *, rows_at_once: int = 1024
) -> tuple[np.ndarray, list[str], list[str | None], dict[str, str]]:
    """Every readable image, for training.

    Returns:
        Pixels uint8 (N, C, H, W), image ids and label names of the N readable images, and image id -> reason of the others.
    """
    images = np.empty((len(listing), *preprocessing.image_shape), np.uint8)
    ids: list[str] = []
    label_names: list[str | None] = []
    errors: dict[str, str] = {}
    for start in range(0, len(listing), rows_at_once):
        shard = read_shard(dataset, listing.slice(start, rows_at_once), preprocessing)
        good = pc.is_null(shard["error"])
        for image_id, error in zip(
            *(shard.filter(pc.invert(good))[name].to_pylist() for name in ("image_id", "error"))
        ):
            errors[image_id] = error
        shard = shard.filter(good)
        pixels = shard["image"].combine_chunks().flatten().to_numpy().reshape(-1, *preprocessing.image_shape)
        images[len(ids) : len(ids) + len(pixels)] = pixels
        ids += shard["image_id"].to_pylist()
        label_names += shard["label_name"].to_pylist()
    return images[: len(ids)], ids, label_names, errors


def split_of(image_id: str) -> str:
    """Either "train", or "test" for one image in ten: by a hash of its id, so that it stays when images are added."""
    digest = hashlib.sha256(b"split:" + image_id.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % 10 == 0 else "train"


def noise(image_ids: Sequence[str], dim: int, seed: int = 0) -> np.ndarray:
    """Standard normal noise, float32 (B, dim), each row drawn from its image id and the seed alone (SHAKE-256, Box-Muller)."""
    pairs = (dim + 1) // 2
    stream = b"".join(hashlib.shake_256(f"noise:{seed}:{name}".encode()).digest(16 * pairs) for name in image_ids)
    uniform = ((np.frombuffer(stream, "<u8") >> np.uint64(11)) + 0.5) / 2.0**53
    radius, angle = uniform.reshape(len(image_ids), 2, pairs).transpose(1, 0, 2)
    radius, angle = np.sqrt(-2 * np.log(radius)), 2 * np.pi * angle
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :dim].astype(np.float32)


def _listing(
    dataset: Dataset,
    image_ids: Any,
    locations: Any,
    rows: Any,
    sizes: Any,
    label_names: Any,
    attributes: Sequence[Any] = (),
    left_out: dict[str, int] | None = None,
) -> pa.Table:
    fields = [pa.string(), pa.string(), pa.int64(), pa.int64(), pa.string(), *([pa.int8()] * len(dataset.attributes))]
    metadata = {"clarity.left_out": json.dumps({reason: count for reason, count in (left_out or {}).items() if count})}
    return pa.table(
        [image_ids, locations, rows, sizes, label_names, *attributes],
        pa.schema(list(zip((*LISTING_COLUMNS, *dataset.attributes), fields)), metadata=metadata),
    )


# --------------------------------------------------------------------------------------------------- mnist


_IDX = {"train": "train", "test": "t10k"}
_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}


def _list_mnist(dataset: Dataset) -> pa.Table:
    parts = []
    for split in ("train", "test") if dataset.split == "all" else (dataset.split,):
        images, labels = _idx(str(dataset.data), split)
        count = len(images)
        names = np.array([str(digit) for digit in range(256)])[labels]
        ids = [f"{split}/{row:05d}" for row in range(count)]
        parts.append(_listing(dataset, ids, [split] * count, range(count), [images.size] * count, names))
    return pa.concat_tables(parts)


def _read_mnist(dataset: Dataset, rows: pa.Table) -> Iterator[tuple[int, Readable]]:
    for place, (split, row) in enumerate(zip(rows["location"].to_pylist(), rows["row"].to_pylist())):
        yield place, Image.fromarray(_idx(str(dataset.data), split)[0][row])


@functools.lru_cache(maxsize=4)
def _idx(data: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,), uint8, mapped from the disk where the files are unpacked."""
    images = _read_idx(data, f"{_IDX[split]}-images-idx3-ubyte", 3)
    labels = _read_idx(data, f"{_IDX[split]}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise ValueError(
            f"expected as many labels as images in {data}, found {len(labels)} and {len(images)}: copy it again"
        )
    return images, labels


def _read_idx(data: str, file: str, axes: int) -> np.ndarray:
    found = [
        path
        for folder in (os.path.join(data, "MNIST", "raw"), os.path.join(data, "raw"), data)
        for path in (os.path.join(folder, file), os.path.join(folder, f"{file}.gz"))
        if os.path.exists(path)
    ]
    if not found:
        raise ValueError(
            f"expected MNIST/raw/{file}[.gz] below {data}, found none: check the path, or ask for the download"
        )
    try:
        if found[0].endswith(".gz"):
            content = np.frombuffer(gzip.decompress(storage.read_bytes(found[0])), np.uint8)
        else:
            content = np.memmap(found[0], np.uint8, "r")
    except (EOFError, ValueError, gzip.BadGzipFile) as error:
        raise ValueError(f"expected a whole idx file, found {found[0]} ({error}): copy it again") from None
    shape = tuple(np.frombuffer(content[4 : 4 + 4 * axes].tobytes().ljust(4 * axes, b"\0"), ">i4").tolist())
    if content[:4].tobytes() != bytes([0, 0, 8, axes]) or len(content) != 4 + 4 * axes + np.prod(shape, dtype=np.int64):
        raise ValueError(
            f"expected a whole idx file of {axes} axes, found {found[0]} of {len(content)} bytes: copy it again"
        )
    return content[4 + 4 * axes :].reshape(shape)


def _download_mnist(data: str) -> None:
    for file, expected in _MNIST_SHA256.items():
        path = os.path.join(data, "MNIST", "raw", file)
        if os.path.exists(path) or os.path.exists(path.removesuffix(".gz")):
            continue
        try:
            with urllib.request.urlopen(_MNIST_URL + file, timeout=60) as answer:
                content = answer.read(16 << 20)
        except OSError as error:
            raise ValueError(
                f"expected to fetch {_MNIST_URL}{file}, found {error}: copy MNIST to {path} by hand"
            ) from None
        if (found := hashlib.sha256(content).hexdigest()) != expected:
            raise ValueError(f"expected {file} with sha256 {expected}, found {found}: try again, or copy it by hand")
        storage.write_bytes(path, content)


# --------------------------------------------------------------------------------------------------- folder


def _list_folder(dataset: Dataset) -> pa.Table:
    root = str(dataset.data)
    if not storage.is_dir(root):
        raise ValueError(f"expected a folder, found a file at {storage.display(root)}: name the folder that holds it")
    files = [(file, tuple(file.path.split("/"))) for file in storage.list_files(root)]
    shown = [(file, parts) for file, parts in files if not any(part.startswith(".") for part in parts)]
    images = [(file, parts) for file, parts in shown if file.path.lower().endswith(EXTENSIONS)]
    missed = {"hidden files": len(files) - len(shown), "files without an image's extension": len(shown) - len(images)}
    # train/ and test/ are splits where both are there or nothing else is; a lone "train" among others is a class.
    tops = {parts[0] for _, parts in images if len(parts) > 1}
    splits = {"train", "test"} & tops
    if len(splits) == 2 or (splits and splits == tops):
        if dataset.split != "all" and dataset.split not in splits:
            raise ValueError(
                f"expected a folder {dataset.split}/ in {storage.display(root)}, found only {splits.pop()}/: "
                "choose that split, or all"
            )
        inside = [(file, parts) for file, parts in images if len(parts) > 1 and parts[0] in splits]
        missed["images outside train/ and test/"] = len(images) - len(inside)
        images = [(file, parts) for file, parts in inside if dataset.split in (parts[0], "all")]
        folders = sorted(splits) if dataset.split == "all" else [dataset.split]
        depth = 1
    else:
        missed_classes = set()
        folders, depth = [""], 0
    missed_classes = {
        (*([folder] if folder else []), label)
        for folder in folders
        for label in storage.list_dirs(storage.join(root, folder) if folder else root)
        if not label.startswith(".")
    } - {parts[: depth + 1] for _, parts in images}
    missed["class folders without an image"] = len(missed_classes)
    if not depth and dataset.split != "all":
        images = [(file, parts) for file, parts in images if split_of(_printable(file.path)) == dataset.split]
    return _listing(
        dataset,
        [_printable(file.path) for file, _ in images],
        [_quote(file.path) for file, _ in images],
        [0] * len(images),
        [file.size for file, _ in images],
        [_printable(parts[depth]) if len(parts) > depth + 1 else None for _, parts in images],
        left_out=missed,
    )


def _read_files(dataset: Dataset, rows: pa.Table) -> Iterator[tuple[int, Readable]]:
    """Each location as a file below the data's place; an object store is asked for several at once."""

    def read(location: str) -> Readable:
        try:
            return storage.read_bytes(storage.join(str(dataset.data), _unquote(location)))
        except storage.StorageError as error:
            if error.transient:
                raise
            return UnreadableImage(f"expected a file, found none that can be read ({error.reason}): restore it")

    locations = rows["location"].to_pylist()
    if not storage.is_remote(str(dataset.data)):
        yield from enumerate(map(read, locations))
        return
    with ThreadPoolExecutor(16) as pool:
        for start in range(0, len(locations), 64):
            yield from enumerate(pool.map(read, locations[start : start + 64]), start)


def _printable(path: str) -> str:
    """A file's name as text: bytes that are no UTF-8 are written as their hexadecimal escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _quote(path: str) -> str:
    """A file's name as text from which ``_unquote`` gets it back, whatever its bytes."""
    text = path.replace("%", "%25")
    return re.sub(r"[\udc80-\udcff]", lambda found: f"%{ord(found[0]) - 0xDC00:02X}", text)


def _unquote(location: str) -> str:
    return os.fsdecode(urllib.parse.unquote_to_bytes(location)) if "%" in location else location


# --------------------------------------------------------------------------------------------------- parquet


def _list_parquet(dataset: Dataset) -> pa.Table:
    root = str(dataset.data)
    if storage.is_dir(root):
        files = [file for file in storage.list_files(root, ".parquet") if not re.search(r"(^|/)[._]", file.path)]
        prefixes = [f"{file.path}#" for file in files]
    else:
        fs, path = storage.filesystem(root)
        files = [storage.FileInfo("", fs.get_file_info(path).size)]
        prefixes = [""]
    if not files:
        raise ValueError(f"expected files *.parquet in {storage.display(root)}, found none: check the place")
    parts, other = [], 0
    for file, prefix in zip(files, prefixes):
        uri = storage.join(root, file.path) if file.path else root
        table, missed = _list_parquet_file(dataset, uri, file, prefix)
        parts.append(table)
        other += missed
    if dataset.split == "all":
        other = 0
    left = {"rows whose split is neither train nor test": other} if other else {}
    return pa.concat_tables(parts).combine_chunks().replace_schema_metadata({"clarity.left_out": json.dumps(left)})


def _list_parquet_file(dataset: Dataset, uri: str, file: storage.FileInfo, prefix: str) -> tuple[pa.Table, int]:
    wanted = ["image_id", "label", "split", *dataset.attributes]
    with storage.open_parquet(uri) as parquet:
        kinds = {field.name: field.type for field in parquet.schema_arrow}
        _image_path(uri, kinds)
        names = [name for name in wanted if name in kinds]
        table = storage.attempt("read", uri, lambda: parquet.read(columns=names))
        count = parquet.metadata.num_rows
    columns = {}
    for name in wanted:
        if name in names:
            columns[name] = _cast(uri, name, table[name], pa.int8() if name in dataset.attributes else pa.string())
        else:
            columns[name] = pa.nulls(count, pa.int8() if name in dataset.attributes else pa.string())
    if "image_id" not in kinds:
        columns["image_id"] = pa.array([f"{prefix}{row:08d}" for row in range(count)], pa.string())
    rows = np.arange(count)
    missed = 0
    if "split" in kinds:
        split = columns["split"].to_numpy(zero_copy_only=False) if count else np.array([], object)
        keep = np.ones(count, bool) if dataset.split == "all" else split == dataset.split
        missed = sum(value not in ("train", "test") for value in split.tolist())
    elif dataset.split != "all":
        keep = np.array(
            [name is None or split_of(name) == dataset.split for name in columns["image_id"].to_pylist()], bool
        )
    else:
        keep = np.ones(count, bool)
    mask = pa.array(keep, pa.bool_())
    kept = int(keep.sum())
    listing = _listing(
        dataset,
        columns["image_id"].filter(mask),
        [file.path] * kept,
        rows[keep],
        [file.size] * kept,
        columns["label"].filter(mask),
        [columns[name].filter(mask) for name in dataset.attributes],
    )
    return listing, missed


def _image_path(uri: str, kinds: dict[str, pa.DataType]) -> str:
    """The leaf that holds the images' bytes: "image", or "image.bytes"."""
    if "image" not in kinds:
        raise ValueError(
            f"expected a column image in {storage.display(uri)}, found {', '.join(kinds) or 'no columns'}: rename the column "
            "that holds the images' bytes"
        )
    kind, path = kinds["image"], "image"
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind, path = kind.field("bytes").type, "image.bytes"
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)):
        raise ValueError(
            f"expected a column image of bytes or struct<bytes, path> in {storage.display(uri)}, found {kinds['image']}: store "
            "the images' files in it"
        )
    return path


def _cast(uri: str, name: str, column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    found = column.type
    if pa.types.is_dictionary(found):
        column = column.cast(found.value_type)
    text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    whole = pa.types.is_integer(column.type) or pa.types.is_boolean(column.type) or pa.types.is_null(column.type)
    if not (whole or (text and pa.types.is_string(kind))):
        raise ValueError(
            f"expected a column {name} of {'strings or integers' if pa.types.is_string(kind) else 'integers'} in "
            f"{storage.display(uri)}, found {found}: convert it"
        )
    try:
        return column.cast(kind).combine_chunks()
    except pa.ArrowInvalid as error:
        raise ValueError(f"expected {name} of type {kind} in {storage.display(uri)}, found {error}: mend it") from None


def _read_parquet(dataset: Dataset, rows: pa.Table) -> Iterator[tuple[int, Readable]]:
    """The images of the rows: only the row groups that hold them are read, and those in small batches."""
    locations, numbers = np.array(rows["location"].to_pylist(), object), rows["row"].to_numpy()
    for location in dict.fromkeys(locations):
        uri = storage.join(str(dataset.data), location) if location else str(dataset.data)
        places = np.flatnonzero(locations == location)
        places = places[np.argsort(numbers[places], kind="stable")]
        with storage.open_parquet(uri) as parquet:
            leaf = _image_path(uri, {field.name: field.type for field in parquet.schema_arrow})
            starts = np.cumsum([0] + [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)])
            groups = np.searchsorted(starts, numbers[places], side="right") - 1
            for group in np.unique(groups):
                inside = places[groups == group]
                yield from _read_row_group(uri, parquet, int(group), leaf, inside, numbers[inside] - starts[group])


def _read_row_group(
    uri: str, parquet: pq.ParquetFile, group: int, leaf: str, places: np.ndarray, offsets: np.ndarray
) -> Iterator[tuple[int, Readable]]:
    info = parquet.metadata.row_group(group)
    size = max(1, info.total_byte_size // max(1, info.num_rows))
    batch_rows = int(np.clip((16 << 20) // size, 1, 1024))
    done, first = 0, 0
    try:
        for batch in parquet.iter_batches(batch_rows, row_groups=[group], columns=[leaf], use_threads=False):
            column = batch.column(0)
            column = column.field("bytes") if leaf == "image.bytes" else column
            while done < len(places) and offsets[done] < first + len(batch):
                content = column[int(offsets[done] - first)].as_py()
                missing = UnreadableImage("expected an image's bytes, found null: fill or drop the row")
                yield int(places[done]), missing if content is None else content
                done += 1
            first += len(batch)
            if done == len(places):
                return
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, storage.StorageError) and error.transient:
            raise
        reason = str(error).splitlines()[0]
        for place in places[done:]:
            yield (
                int(place),
                UnreadableImage(f"expected a whole Parquet file, found a broken part ({reason}): restore it"),
            )


# --------------------------------------------------------------------------------------------------- digits


def _as_parquet(dataset: Dataset) -> Dataset:
    return replace(dataset, source="parquet", data=str(Path(__file__).with_name("digits.parquet")))


def _list_digits(dataset: Dataset) -> pa.Table:
    return _list_parquet(_as_parquet(dataset))


def _read_digits(dataset: Dataset, rows: pa.Table) -> Iterator[tuple[int, Readable]]:
    return _read_parquet(_as_parquet(dataset), rows)


# --------------------------------------------------------------------------------------------------- celeba_hair


_HAIR = {"Black_Hair": "black", "Blond_Hair": "blond", "Brown_Hair": "brown", "Gray_Hair": "gray"}
_PARTITIONS = ("train", "valid", "test")


def _list_celeba(dataset: Dataset) -> pa.Table:
    root = str(dataset.data)
    names = _celeba_attributes(root)
    wanted = [names.index(name) + 1 for name in (*_HAIR, *dataset.attributes)]
    lines = _celeba_lines(root, "list_attr_celeba.txt")[2:]
    table: list[list[Any]] = []
    for number, line in enumerate(lines, 3):
        cells = line.split()
        if len(cells) != len(names) + 1 or not set(cells[1:]) <= {"1", "-1"}:
            raise ValueError(
                f"expected a file name and {len(names)} values 1 or -1 in line {number} of list_attr_celeba.txt, found "
                f"{line[:60]!r}: restore the file"
            )
        table.append([cells[0], *(cells[column] == "1" for column in wanted)])
    partitions = {}
    for number, line in enumerate(_celeba_lines(root, "list_eval_partition.txt"), 1):
        cells = line.split()
        if len(cells) != 2 or cells[1] not in ("0", "1", "2"):
            raise ValueError(
                f"expected 'name 0|1|2' in line {number} of list_eval_partition.txt, found {line[:60]!r}: restore it"
            )
        partitions[cells[0]] = _PARTITIONS[int(cells[1])]
    if lost := [row[0] for row in table if row[0] not in partitions]:
        raise ValueError(
            f"expected every face in list_eval_partition.txt, found {len(lost)} missing ({lost[0]}): restore it"
        )
    if dataset.split != "all":
        table = [row for row in table if partitions[row[0]] == dataset.split]
    hair = [[colour for colour, given in zip(_HAIR.values(), row[1:]) if given] for row in table]
    listed = [place for place, colours in enumerate(hair) if dataset.unlabelled or len(colours) == 1]
    sizes = {file.path: file.size for file in storage.list_files(storage.join(root, "img_align_celeba"))}
    return _listing(
        dataset,
        [table[place][0] for place in listed],
        [f"img_align_celeba/{_quote(table[place][0])}" for place in listed],
        [0] * len(listed),
        [sizes.get(table[place][0]) for place in listed],
        [hair[place][0] if len(hair[place]) == 1 else None for place in listed],
        [[int(table[place][5 + k]) for place in listed] for k in range(len(dataset.attributes))],
        {"faces without exactly one of black, blond, brown, gray hair": len(table) - len(listed)},
    )


def _celeba_lines(root: str, file: str) -> list[str]:
    try:
        return storage.read_bytes(storage.join(root, file)).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"expected {file} beside img_align_celeba/ in {storage.display(root)}, found {error}: lay out the official files"
        ) from None


def _celeba_attributes(root: str) -> list[str]:
    lines = _celeba_lines(root, "list_attr_celeba.txt")
    names = lines[1].split() if len(lines) > 1 else []
    if missing := set(_HAIR) - set(names):
        raise ValueError(
            f"expected the attributes' names in line 2 of list_attr_celeba.txt, found no {', '.join(sorted(missing))}: restore it"
        )
    if lines[0].strip() != str(len(lines) - 2):
        raise ValueError(
            f"expected {lines[0].strip()} faces in list_attr_celeba.txt, found {len(lines) - 2}: copy it again"
        )
    return names


def _parquet_attributes(data: str) -> list[str]:
    uri = data
    if storage.is_dir(data):
        uri = storage.join(data, next((file.path for file in storage.list_files(data, ".parquet")), ""))
    with storage.open_parquet(uri) as parquet:
        return [
            field.name
            for field in parquet.schema_arrow
            if pa.types.is_integer(field.type) or pa.types.is_boolean(field.type)
        ]


SOURCES: dict[str, Source] = {
    "digits": Source(
        "5,000 digits of MNIST that ship with the package",
        _list_digits,
        _read_digits,
        Preprocessing("L", 28, 28),
        needs_data=False,
    ),
    "mnist": Source(
        "torchvision's layout: MNIST/raw/*-ubyte[.gz]",
        _list_mnist,
        _read_mnist,
        Preprocessing("L", 28, 28),
        remote=False,
    ),
    "folder": Source("class folders of images, with or without train/ and test/ above them", _list_folder, _read_files),
    "parquet": Source(
        "a Parquet file or a directory of them: image (bytes or struct<bytes, path>), with or without label, image_id, split",
        _list_parquet,
        _read_parquet,
        attributes=_parquet_attributes,
    ),
    "celeba_hair": Source(
        "official layout: img_align_celeba/, list_attr_celeba.txt, list_eval_partition.txt",
        _list_celeba,
        _read_files,
        Preprocessing("RGB", 64, 64, center_crop=148),
        splits=("train", "valid", "test", "all"),
        attributes=_celeba_attributes,
    ),
}
