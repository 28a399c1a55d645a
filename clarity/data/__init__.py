"""Images and where they come from: a source lists a data set, then reads any part of the listing into an Arrow table.

Knows file layouts. Does not know how bytes become pixels, the sizes of shards, models, or what is asked of an image.

The listing is a table of one row for each image, in an order that depends on the data alone: ``image_id`` (unique),
``location`` and ``row`` (where its bytes lie), ``size`` (of that file), ``label_name`` (null: none), the attributes.
To add a source, write its two functions and its line in ``SOURCES``.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from clarity import schema, storage
from clarity.ids import split_of
from clarity.images import EXTENSIONS, MAX_BYTES, Preprocessing, UnreadableImage, open_image, orientation

LISTING_COLUMNS = ("image_id", "location", "row", "size", "label_name")


# The data set


@dataclass(frozen=True)
class Dataset:
    """Which images: a source, where its data lies, which part. Cheap and picklable; made by ``open_dataset``."""

    source: str
    data: str | None = None
    split: str = "train"
    attributes: tuple[str, ...] = ()
    unlabelled: bool = False


Content = bytes | Image.Image | UnreadableImage


@dataclass(frozen=True)
class Source:
    """What a source can do.

    Args:
        doc: the layout that it reads, in a line.
        list_images: the listing of a data set.
        read_images: for rows of a listing, pairs (place among the rows, content), in any order.
        default_preprocessing: None: looked up in the images.
        needs_data: whether a place must be given.
        remote: whether the place may be an object store.
        splits: the choices of ``split``.
        attributes: what can be carried along, for a place; None: nothing.
    """

    doc: str
    list_images: Callable[[Dataset], pa.Table]
    read_images: Callable[[Dataset, pa.Table], Iterable[tuple[int, Content]]]
    default_preprocessing: Preprocessing | None = None
    needs_data: bool = True
    remote: bool = True
    splits: tuple[str, ...] = ("train", "test", "all")
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
        data: where it lies; a local path is made absolute, for workers in other directories. None for digits.
        split: "train", "test" or "all"; celeba_hair also has "valid".
        download: mnist: fetch what is missing into ``data``.
        attributes: columns carried along as int8: celeba_hair's 40 (1 or 0), integer columns of parquet; ("all",) is
            every one that there is.
        unlabelled: celeba_hair: list the faces without exactly one hair colour too, with a null label. Other sources
            list what has no label in any case.

    Raises:
        ValueError: an unknown source, split or attribute; data missing, superfluous or not there.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown data set {source!r}: expected one of {', '.join(SOURCES)}")
    kind = SOURCES[source]
    if split not in kind.splits:
        raise ValueError(f"unknown split {split!r} of {source}: expected one of {', '.join(kind.splits)}")
    if download and source != "mnist":
        raise ValueError(f"expected a download of mnist only, found {source}: name the place of its data instead")
    if data is not None and not kind.needs_data:
        raise ValueError(
            f"expected no data for {source}, which ships its own, found {storage.display(data)}: leave it out"
        )
    if kind.needs_data:
        if not str(data or "").strip():
            raise ValueError(f"{source} expects the place of its data ({kind.doc}), found none: name it")
        data = _checked_place(source, str(data), download)
    if attributes:
        choices = [name for name in kind.attributes(str(data)) if name not in _TAKEN] if kind.attributes else []
        if tuple(attributes) == ("all",):
            attributes = choices
        if unknown := [name for name in attributes if name not in choices]:
            raise ValueError(
                f"unknown attributes {', '.join(map(repr, unknown))} of {source}: expected some of "
                f"{', '.join(choices) or 'none, as there are none'}"
            )
    return Dataset(source, None if data is None else str(data), split, tuple(dict.fromkeys(attributes)), unlabelled)


def _checked_place(source: str, data: str, download: bool) -> str:
    if not storage.is_remote(data):
        storage.filesystem(data)
        data = os.path.abspath(os.path.expanduser(data))
    elif not SOURCES[source].remote:
        raise ValueError(f"{source} expects a local directory, found {storage.display(data)}: copy it here")
    if download:
        _download_mnist(data)
    if not storage.exists(data):
        raise ValueError(
            f"{source} expects data ({SOURCES[source].doc}), found nothing at "
            f"{storage.display(data)}: check the path, and that this machine can reach it"
        )
    return data


def list_images(dataset: Dataset) -> pa.Table:
    """The listing: one row for each image, see the module's docstring. ``left_out`` tells what is not in it.

    Raises:
        ValueError: no image, or image ids that are missing or double.
    """
    listing = SOURCES[dataset.source].list_images(dataset)
    ids = listing["image_id"]
    where = f"{dataset.source} {storage.display(dataset.data or '')}".strip()
    if not len(ids):
        reasons = "".join(f"; left out: {count} {reason}" for reason, count in left_out(listing).items())
        raise ValueError(
            f"expected images in split {dataset.split!r} of {where}, found none{reasons}: check the place and its "
            f"layout ({SOURCES[dataset.source].doc}), or choose another split"
        )
    if ids.null_count:
        raise ValueError(f"expected an image_id in every row of {where}, found null in {ids.null_count}: fill them")
    if len(pc.unique(ids)) < len(ids):
        counts = pc.value_counts(ids)
        double = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        raise ValueError(
            f"expected each image_id of {where} once, found {len(double)} more than once "
            f"({', '.join(map(repr, double[:3].to_pylist()))}): rename or drop them"
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
            f"expected images of at least two classes, found {', '.join(map(repr, names)) or 'no labels'}: "
            "a class is a folder, or a value of the column label"
        )
    return tuple(sorted(names, key=int if all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names) else None))


def label_indices(label_names: pa.Array | pa.ChunkedArray, class_names: Sequence[str]) -> pa.Array:
    """The index of each label in ``class_names``, int32; null for a missing or an unknown one."""
    found = pc.index_in(label_names, value_set=pa.array(class_names, pa.string()))
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def listing_fingerprint(listing: pa.Table) -> str:
    """sha256 over the rows of a listing, sizes of files included, however the table is cut into chunks."""
    digest = hashlib.sha256()
    for field in listing.schema:
        column = listing[field.name]
        digest.update(json.dumps([field.name, str(field.type), len(column)]).encode())
        digest.update(np.packbits(column.is_null().to_numpy()).tobytes())
        if pa.types.is_string(field.type):
            digest.update(pc.binary_length(column.fill_null("")).to_numpy().astype("<i4").tobytes())
            digest.update("".join(text or "" for text in column.to_pylist()).encode())
        else:
            digest.update(column.fill_null(0).to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def infer_preprocessing(
    dataset: Dataset,
    listing: pa.Table,
    *,
    image_size: int | tuple[int, int] | None = None,
    mode: str | None = None,
    center_crop: int | None = None,
) -> Preprocessing:
    """The preprocessing for training: what is given, else the source's own, else looked up in 64 of the images.

    Looked up: grey if all of them are, else RGB; their size if all have one and no side is above 128, else 64 x 64.

    Args:
        dataset: where the images are.
        listing: its listing.
        image_size: side, or (height, width), in pixels.
        mode: "L" or "RGB".
        center_crop: side of the centred square taken first.

    Raises:
        ValueError: none of them can be read, or a value out of its range.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if known := SOURCES[dataset.source].default_preprocessing:
        height, width = size or (known.height, known.width)
        return Preprocessing(mode or known.mode, height, width, center_crop or known.center_crop)
    if size is None or mode is None:
        sizes, grey = _sample(dataset, listing)
        mode = mode or ("L" if grey else "RGB")
        common = sizes.pop() if len(sizes) == 1 and not center_crop else (64, 64)
        size = size or (common if max(common) <= 128 else (64, 64))
    return Preprocessing(mode, *size, center_crop)


def _sample(dataset: Dataset, listing: pa.Table) -> tuple[set[tuple[int, int]], bool]:
    """The sizes (height, width) in 64 of the images, and whether all of these are grey."""
    places = np.unique(np.linspace(0, len(listing) - 1, 64).astype(int))
    sizes, grey, reasons = set(), True, []
    for _, content in SOURCES[dataset.source].read_images(dataset, listing.take(places)):
        try:
            if isinstance(content, UnreadableImage):
                raise content
            picture = content if isinstance(content, Image.Image) else open_image(content)
            width, height = picture.size
            sizes.add((width, height) if orientation(picture) >= 5 else (height, width))
            grey = grey and (picture.mode in ("1", "L", "LA", "F") or picture.mode.startswith("I"))
        except UnreadableImage as error:
            reasons.append(str(error))
    if not sizes:
        raise ValueError(f"expected images, found none that can be read among {len(places)}; the first: {reasons[0]}")
    return sizes, grey


def read_shard(dataset: Dataset, rows: pa.Table, preprocessing: Preprocessing) -> pa.Table:
    """Rows of the listing with their pixels (``schema.shard_schema``), in the same order.

    An image that cannot be read is a row with a null image and its reason; its neighbours are unharmed.

    Raises:
        StorageError: the place itself fails for the moment: no image's fault, so the shard is to be read again.
    """
    pixels = np.zeros((len(rows), math.prod(preprocessing.image_shape)), np.uint8)
    errors: list[str | None] = ["expected an image, found that its source gave none: report this"] * len(rows)
    for place, content in SOURCES[dataset.source].read_images(dataset, rows):
        try:
            if isinstance(content, UnreadableImage):
                raise content
            pixels[place] = preprocessing.apply(content).reshape(-1)
            errors[place] = None
        except UnreadableImage as error:
            errors[place] = str(error)
    fields = schema.shard_schema(preprocessing.image_shape, dataset.attributes)
    images = schema.fixed_size_list(pixels, np.array([error is None for error in errors], bool))
    columns = [rows["image_id"], rows["label_name"], images, pa.array(errors, pa.string())]
    return pa.table([*columns, *(rows[name] for name in dataset.attributes)], schema=fields)


def read_all(
    dataset: Dataset, listing: pa.Table, preprocessing: Preprocessing
) -> tuple[np.ndarray, list[str], list[str | None], dict[str, str]]:
    """Every readable image, for training.

    Returns:
        Pixels uint8 (N, C, H, W), ids and label names of the N readable images; id -> reason of the others.
    """
    images = np.empty((len(listing), *preprocessing.image_shape), np.uint8)
    ids: list[str] = []
    label_names: list[str | None] = []
    errors: dict[str, str] = {}
    for start in range(0, len(listing), 1024):
        shard = read_shard(dataset, listing.slice(start, 1024), preprocessing)
        good = shard["error"].is_null()
        bad = shard.filter(pc.invert(good))
        errors.update(zip(bad["image_id"].to_pylist(), bad["error"].to_pylist()))
        shard = shard.filter(good)
        pixels = schema.matrix(shard["image"]).reshape(-1, *preprocessing.image_shape)
        images[len(ids) : len(ids) + len(pixels)] = pixels
        ids += shard["image_id"].to_pylist()
        label_names += shard["label_name"].to_pylist()
    return images[: len(ids)], ids, label_names, errors


def _listing(
    dataset: Dataset,
    image_ids: Any,
    locations: Any,
    rows: Any,
    sizes: Any,
    label_names: Any,
    attributes: Sequence[Any] = (),
) -> pa.Table:
    kinds = [pa.string(), pa.string(), pa.int64(), pa.int64(), pa.string(), *[pa.int8()] * len(dataset.attributes)]
    fields = pa.schema(list(zip((*LISTING_COLUMNS, *dataset.attributes), kinds)))
    return pa.table([image_ids, locations, rows, sizes, label_names, *attributes], fields)


def without(listing: pa.Table, missed: dict[str, int]) -> pa.Table:
    """The listing, with a note of what was left out of it; the inverse of ``left_out``."""
    said = {reason: count for reason, count in missed.items() if count}
    return listing.replace_schema_metadata({"clarity.left_out": json.dumps(said)})


# mnist


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
        images, labels = _mnist(str(dataset.data), split)
        ids = [f"{split}/{row:05d}" for row in range(len(images))]
        sizes = np.full(len(images), images.size)
        parts.append(_listing(dataset, ids, [split] * len(images), range(len(images)), sizes, labels.astype(str)))
    return pa.concat_tables(parts)


def _read_mnist(dataset: Dataset, rows: pa.Table) -> Iterator[tuple[int, Content]]:
    for place, (split, row) in enumerate(zip(rows["location"].to_pylist(), rows["row"].to_pylist())):
        yield place, Image.fromarray(_mnist(str(dataset.data), split)[0][row])


@functools.lru_cache(maxsize=4)
def _mnist(data: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,), uint8, mapped from the disk where the files are unpacked."""
    stem = {"train": "train", "test": "t10k"}[split]
    images = _read_idx(data, f"{stem}-images-idx3-ubyte", 3)
    labels = _read_idx(data, f"{stem}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise ValueError(
            f"expected as many labels as images in {data}, found {len(labels)} and {len(images)}: copy it again"
        )
    return images, labels


def _read_idx(data: str, file: str, axes: int) -> np.ndarray:
    folders = [os.path.join(data, "MNIST", "raw"), os.path.join(data, "raw"), data]
    paths = [os.path.join(folder, name) for folder in folders for name in (file, f"{file}.gz")]
    path = next(filter(os.path.exists, paths), None)
    if path is None:
        raise ValueError(f"expected MNIST/raw/{file}[.gz] in {data}, found none: check the path, or ask for a download")
    broken = f"expected a whole idx file of {axes} axes, found {path}, which is none: copy it again"
    try:
        mapped = not path.endswith(".gz") and os.path.getsize(path)
        content = np.memmap(path, np.uint8, "r") if mapped else np.frombuffer(_gunzip(path), np.uint8)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise ValueError(broken) from None
    start = 4 + 4 * axes
    shape = [int.from_bytes(content[place : place + 4].tobytes(), "big") for place in range(4, start, 4)]
    if content[:4].tobytes() != bytes([0, 0, 8, axes]) or len(content) != start + int(np.prod(shape, dtype=np.int64)):
        raise ValueError(broken)
    return content[start:].reshape(shape)


def _gunzip(path: str) -> bytes:
    return gzip.decompress(storage.read_bytes(path))


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
                f"expected to fetch {_MNIST_URL}{file}, found {error}: copy it to {path} by hand"
            ) from None
        if (found := hashlib.sha256(content).hexdigest()) != expected:
            raise ValueError(f"expected {file} with sha256 {expected}, found {found}: try again, or copy it by hand")
        storage.write_bytes(path, content)


# folder


def _list_folder(dataset: Dataset) -> pa.Table:
    root = str(dataset.data)
    if not storage.is_dir(root):
        raise ValueError(f"expected a folder, found a file at {storage.display(root)}: name the folder that holds it")
    files = [(file, tuple(file.path.split("/"))) for file in storage.list_files(root)]
    shown = [(file, parts) for file, parts in files if not any(part.startswith(".") for part in parts)]
    images = [(file, parts) for file, parts in shown if file.path.lower().endswith(EXTENSIONS)]
    missed = {"hidden files": len(files) - len(shown), "files without an image's extension": len(shown) - len(images)}
    splits = _split_folders(images)
    folders = [root]
    if splits:
        chosen = splits if dataset.split == "all" else splits & {dataset.split}
        if not chosen:
            raise ValueError(
                f"expected a folder {dataset.split}/ in {storage.display(root)}, found only {', '.join(splits)}/: "
                "choose that split, or all"
            )
        missed["images outside train/ and test/"] = sum(parts[0] not in splits for _, parts in images)
        images = [(file, parts[1:]) for file, parts in images if parts[0] in chosen]
        folders = [storage.join(root, split) for split in chosen]
    classes = {parts[0] for _, parts in images if len(parts) > 1}
    named = {label for folder in folders for label in storage.list_dirs(folder) if not label.startswith(".")}
    missed["class folders without an image"] = len(named - classes)
    if not splits and dataset.split != "all":
        images = [(file, parts) for file, parts in images if split_of(_printable(file.path)) == dataset.split]
    listing = _listing(
        dataset,
        [_printable(file.path) for file, _ in images],
        [_quote(file.path) for file, _ in images],
        [0] * len(images),
        [file.size for file, _ in images],
        [_printable(parts[0]) if len(parts) > 1 else None for _, parts in images],
    )
    return without(listing, missed)


def _split_folders(images: list[tuple[storage.FileInfo, tuple[str, ...]]]) -> set[str]:
    """The split folders at the top: train and test together, or one that is alone; among others it is a class."""
    tops = {parts[0] for _, parts in images if len(parts) > 1}
    found = {"train", "test"} & tops
    return found if len(found) == 2 or found == tops else set()


def _read_files(dataset: Dataset, rows: pa.Table) -> Iterator[tuple[int, Content]]:
    """Each location as a file below the data's place; an object store is asked for several at once."""

    def read(location: str, size: int | None) -> Content:
        if (size or 0) > MAX_BYTES:
            return UnreadableImage(
                f"expected a file of at most {MAX_BYTES} bytes, found {size}: make the image smaller"
            )
        try:
            return storage.read_bytes(storage.join(str(dataset.data), _unquote(location)))
        except storage.StorageError as error:
            if error.transient:
                raise
            return UnreadableImage(f"expected a file, found none that can be read ({error.reason}): restore it")

    locations, sizes = rows["location"].to_pylist(), rows["size"].to_pylist()
    if not storage.is_remote(str(dataset.data)):
        yield from enumerate(map(read, locations, sizes))
        return
    with ThreadPoolExecutor(16) as pool:
        for start in range(0, len(rows), 64):
            yield from enumerate(pool.map(read, locations[start : start + 64], sizes[start : start + 64]), start)


def _printable(path: str) -> str:
    """A file's name as text; bytes that are no UTF-8 become their hexadecimal escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _quote(path: str) -> str:
    """A file's name as text from which ``_unquote`` gets it back, whatever its bytes."""
    return re.sub(r"[\udc80-\udcff]", lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", path.replace("%", "%25"))


def _unquote(location: str) -> str:
    return os.fsdecode(urllib.parse.unquote_to_bytes(location)) if "%" in location else location


# parquet


#: What reading a broken file raises; Arrow's errors are among them.
_BROKEN = (OSError, ValueError)
#: Column names that attributes cannot have, as tables of an audit or a listing hold others under them.
_TAKEN = {*LISTING_COLUMNS, *schema.CODES_DOC, *schema.PREDICTIONS_DOC, "image", "split"}


def _list_parquet(dataset: Dataset) -> pa.Table:
    parts, missed = [], 0
    for file, uri in _parquet_files(str(dataset.data)):
        listing, others = _list_parquet_file(dataset, uri, file)
        parts.append(listing)
        missed += others
    return without(pa.concat_tables(parts).combine_chunks(), {"rows whose split is neither train nor test": missed})


def _parquet_files(root: str) -> list[tuple[storage.FileInfo, str]]:
    """The files of a data set, each with its URI; a data set of a single file has an empty path."""
    files = [file for file in storage.list_files(root) if not file.path or file.path.endswith(".parquet")]
    files = [file for file in files if not re.search(r"(^|/)[._]", file.path)]
    if not files:
        raise ValueError(f"expected files *.parquet in {storage.display(root)}, found none: check the place")
    return [(file, storage.join(root, file.path)) for file in files]


def _list_parquet_file(dataset: Dataset, uri: str, file: storage.FileInfo) -> tuple[pa.Table, int]:
    with storage.open_parquet(uri) as parquet:
        kinds = _parquet_kinds(uri, parquet)
        names = [name for name in ("image_id", "label", "split", *dataset.attributes) if name in kinds]
        try:
            table = storage.attempt("read", uri, lambda: parquet.read(names))
        except pa.ArrowException as error:
            raise ValueError(f"expected a whole Parquet file, found {storage.display(uri)}, broken ({error})") from None
        rows = np.arange(parquet.metadata.num_rows)
    columns = {name: _cast(uri, name, table[name], name in dataset.attributes) for name in names}
    prefix = f"{file.path}#" if file.path else ""
    numbered = pa.array([f"{prefix}{row:08d}" for row in rows], pa.string())
    ids = columns.get("image_id", numbered)
    others = 0
    if dataset.split == "all":
        keep = np.ones(len(rows), bool)
    elif "split" in columns:
        keep = np.array([split == dataset.split for split in columns["split"].to_pylist()], bool)
        others = sum(split not in ("train", "test") for split in columns["split"].to_pylist())
    else:
        keep = np.array([name is None or split_of(name) == dataset.split for name in ids.to_pylist()], bool)
    empty = pa.nulls(len(rows))
    listing = _listing(
        dataset,
        ids.filter(pa.array(keep)),
        [file.path] * int(keep.sum()),
        rows[keep],
        [file.size] * int(keep.sum()),
        columns.get("label", empty).filter(pa.array(keep)).cast(pa.string()),
        [columns.get(name, empty).filter(pa.array(keep)).cast(pa.int8()) for name in dataset.attributes],
    )
    return listing, others


def _parquet_kinds(uri: str, parquet: pq.ParquetFile) -> dict[str, pa.DataType]:
    """The type of each column; that of image has been checked."""
    kinds = {field.name: field.type for field in parquet.schema_arrow}
    if "image" not in kinds:
        raise ValueError(
            f"expected a column image in {storage.display(uri)}, found {', '.join(kinds) or 'no columns'}: "
            "rename the one that holds the files of the images"
        )
    kind = kinds["image"]
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)):
        raise ValueError(
            f"expected a column image of bytes or struct<bytes, path> in {storage.display(uri)}, found "
            f"{kinds['image']}: store the files of the images in it"
        )
    return kinds


def _cast(uri: str, name: str, column: pa.ChunkedArray, attribute: bool) -> pa.Array:
    """A column of the listing: int8 for an attribute, else strings, which integers are written as."""
    found = column.type
    if pa.types.is_dictionary(found):
        column = column.cast(found.value_type)
    kind = column.type
    whole = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)
    if not whole and (attribute or not (pa.types.is_string(kind) or pa.types.is_large_string(kind))):
        raise ValueError(
            f"expected a column {name} of {'integers' if attribute else 'strings or integers'} in "
            f"{storage.display(uri)}, found {found}: convert it"
        )
    try:
        return column.cast(pa.int8() if attribute else pa.string()).combine_chunks()
    except pa.ArrowInvalid as error:
        raise ValueError(f"expected values of int8 in column {name} of {storage.display(uri)}, found {error}") from None


def _read_parquet(dataset: Dataset, rows: pa.Table) -> Iterator[tuple[int, Content]]:
    """The images of the rows: only the row groups that hold them are read, and those in small batches."""
    locations, numbers = np.array(rows["location"].to_pylist(), object), rows["row"].to_numpy()
    for location in dict.fromkeys(locations):
        places = np.flatnonzero(locations == location)
        places = places[np.argsort(numbers[places], kind="stable")]
        try:
            for place, content in _read_parquet_file(storage.join(str(dataset.data), location), numbers[places]):
                yield int(places[place]), content
        except _BROKEN as error:  # before the first of its images
            if getattr(error, "transient", False):
                raise
            yield from ((int(place), _broken_parquet()) for place in places)


def _broken_parquet() -> UnreadableImage:
    return UnreadableImage("expected the Parquet file that was listed, found it broken: restore it")


def _read_parquet_file(uri: str, numbers: np.ndarray) -> Iterator[tuple[int, Content]]:
    """Pairs (place among ``numbers``, content), for ascending numbers of rows."""
    with storage.open_parquet(uri) as parquet:
        ends = np.cumsum([parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)])
        if not len(ends) or numbers[-1] >= ends[-1]:
            raise ValueError("fewer rows than were listed")
        struct = pa.types.is_struct(_parquet_kinds(uri, parquet)["image"])
        groups = np.searchsorted(ends, numbers, side="right")
        for group in np.unique(groups):
            places = np.flatnonzero(groups == group).tolist()
            first = int(ends[group]) - parquet.metadata.row_group(group).num_rows
            try:
                for batch in _read_row_group(uri, parquet, int(group), "image.bytes" if struct else "image"):
                    column = batch.column(0).field("bytes") if struct else batch.column(0)
                    while places and numbers[places[0]] < first + len(batch):
                        place = places.pop(0)
                        content = column[int(numbers[place]) - first].as_py()
                        missing = UnreadableImage("expected the bytes of an image, found null: fill or drop the row")
                        yield place, missing if content is None else content
                    first += len(batch)
                    if not places:
                        break
            except _BROKEN as error:
                if getattr(error, "transient", False):
                    raise
                yield from ((place, _broken_parquet()) for place in places)


def _read_row_group(uri: str, parquet: pq.ParquetFile, group: int, leaf: str) -> Iterator[pa.RecordBatch]:
    """One row group in batches of about 4 MiB; after a transient error it is read again up to where it was."""
    info = parquet.metadata.row_group(group)
    rows = int(np.clip((4 << 20) * info.num_rows // max(1, info.total_byte_size), 1, 1024))
    stream: Iterator[pa.RecordBatch] | None = None
    done = 0

    def step() -> pa.RecordBatch | None:
        nonlocal stream
        if stream is None:
            fresh = parquet.iter_batches(rows, row_groups=[group], columns=[leaf], use_threads=False)
            stream = itertools.islice(fresh, done, None)
        try:
            return next(stream, None)
        except OSError:
            stream = None
            raise

    while (batch := storage.attempt("read", uri, step)) is not None:
        done += 1
        yield batch


def _parquet_attributes(data: str) -> list[str]:
    with storage.open_parquet(_parquet_files(data)[0][1]) as parquet:
        kinds = {field.name: field.type for field in parquet.schema_arrow}
    return [name for name, kind in kinds.items() if pa.types.is_integer(kind) or pa.types.is_boolean(kind)]


# digits


def _as_parquet(dataset: Dataset) -> Dataset:
    return replace(dataset, data=str(Path(__file__).with_name("digits.parquet")))


def _list_digits(dataset: Dataset) -> pa.Table:
    return _list_parquet(_as_parquet(dataset))


def _read_digits(dataset: Dataset, rows: pa.Table) -> Iterator[tuple[int, Content]]:
    return _read_parquet(_as_parquet(dataset), rows)


# celeba_hair


_HAIR = {"Black_Hair": "black", "Blond_Hair": "blond", "Brown_Hair": "brown", "Gray_Hair": "gray"}
_PARTITIONS = {"0": "train", "1": "valid", "2": "test"}


def _list_celeba(dataset: Dataset) -> pa.Table:
    root = str(dataset.data)
    folder = storage.join(root, "img_align_celeba")
    if not storage.is_dir(folder):
        raise ValueError(f"expected a folder img_align_celeba/ in {storage.display(root)}, found none: check the path")
    names = _celeba_attributes(root)
    partitions = dict(_celeba_rows(root, "list_eval_partition.txt", 0, 1, set(_PARTITIONS)))
    hair = [names.index(name) + 1 for name in _HAIR]
    carried = [names.index(name) + 1 for name in dataset.attributes]
    faces: list[tuple[Any, ...]] = []
    others = 0
    for cells in _celeba_rows(root, "list_attr_celeba.txt", 2, len(names), {"1", "-1"}):
        if cells[0] not in partitions:
            raise ValueError(f"expected every face in list_eval_partition.txt, found no {cells[0]!r}: restore the file")
        if dataset.split not in ("all", _PARTITIONS[partitions[cells[0]]]):
            continue
        colours = [colour for colour, column in zip(_HAIR.values(), hair) if cells[column] == "1"]
        if len(colours) != 1:
            others += 1
            if not dataset.unlabelled:
                continue
        label = colours[0] if len(colours) == 1 else None
        faces.append((cells[0], label, *(int(cells[column] == "1") for column in carried)))
    ids, label_names, *attributes = zip(*faces) if faces else [()] * (2 + len(carried))
    sizes = {file.path: file.size for file in storage.list_files(folder)}
    locations = [f"img_align_celeba/{_quote(name)}" for name in ids]
    listing = _listing(
        dataset, ids, locations, [0] * len(ids), [sizes.get(name) for name in ids], label_names, attributes
    )
    reason = "faces without exactly one of black, blond, brown, gray hair"
    return without(listing, {} if dataset.unlabelled else {reason: others})


def _celeba_rows(root: str, file: str, skipped: int, values: int, choices: set[str]) -> Iterator[list[str]]:
    """The cells of each line: a file's name and its values."""
    for number, line in enumerate(_celeba_lines(root, file)[skipped:], skipped + 1):
        cells = line.split()
        if len(cells) != values + 1 or "/" in cells[0] or not choices.issuperset(cells[1:]):
            raise ValueError(
                f"expected a file's name and {values} of {', '.join(sorted(choices))} in line {number} of {file}, "
                f"found {line[:60]!r}: restore the file"
            )
        yield cells


def _celeba_attributes(root: str) -> list[str]:
    lines = _celeba_lines(root, "list_attr_celeba.txt")
    names = lines[1].split() if len(lines) > 1 else []
    if missing := [name for name in _HAIR if name not in names]:
        raise ValueError(
            f"expected the names of the attributes in line 2 of list_attr_celeba.txt, found no {', '.join(missing)}: "
            "restore the file"
        )
    if lines[0].strip() != str(len(lines) - 2):
        raise ValueError(
            f"expected {lines[0].strip()[:20]} faces in list_attr_celeba.txt, as its first line says, found "
            f"{len(lines) - 2}: copy it again"
        )
    return names


def _celeba_lines(root: str, file: str) -> list[str]:
    try:
        return storage.read_bytes(storage.join(root, file)).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"expected {file} beside img_align_celeba/, found none that can be read ({error}): "
            "lay out the official files"
        ) from None


SOURCES: dict[str, Source] = {
    "digits": Source(
        "5,000 digits of MNIST that ship with the package",
        _list_digits,
        _read_digits,
        Preprocessing("L", 28, 28),
        needs_data=False,
    ),
    "mnist": Source(
        "torchvision's layout, MNIST/raw/*-ubyte[.gz]",
        _list_mnist,
        _read_mnist,
        Preprocessing("L", 28, 28),
        remote=False,
    ),
    "folder": Source(
        "class folders of images, with or without train/ and test/ above them",
        _list_folder,
        _read_files,
    ),
    "parquet": Source(
        "a Parquet file or a directory of them, with a column image; optional label, image_id, split",
        _list_parquet,
        _read_parquet,
        attributes=_parquet_attributes,
    ),
    "celeba_hair": Source(
        "official layout, img_align_celeba/, list_attr_celeba.txt, list_eval_partition.txt",
        _list_celeba,
        _read_files,
        Preprocessing("RGB", 64, 64, center_crop=148),
        splits=("train", "valid", "test", "all"),
        attributes=_celeba_attributes,
    ),
}
