"""What all sources share: the types Dataset and Source, and the listing of the images of a data set."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from clarity import storage
from clarity.images import Preprocessing, UnreadableImage
from clarity.report.text import plural

LISTING_COLUMNS = ("image_id", "location", "row", "size", "label_name")

#: The usual names of the splits of a data set, in any case.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}

#: Rows of a listing that become Python objects at a time.
PIECE = 1 << 16

#: What stands for an image without a label among numbers.
NO_LABEL = "-1"

#: Characters that break the lines of a console or a table.
CONTROLS = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029]")

#: What a source reads for one row: a file's bytes, decoded pixels, or why there are none.
Content = bytes | Image.Image | UnreadableImage


@dataclass(frozen=True)
class Dataset:
    """Which images: a source, where its data lies, which part. Cheap and picklable; made by ``open_dataset``."""

    source: str
    data: str | None = None
    split: str = "train"
    attributes: tuple[str, ...] = ()
    unlabelled: bool = False
    columns: tuple[tuple[str, str], ...] = ()

    def column(self, name: str) -> str:
        """What the data calls a column."""
        return dict(self.columns).get(name, name)


@dataclass(frozen=True)
class Source:
    """What a source can do."""

    doc: str  # the layout that it reads, in a line
    list_images: Callable[[Dataset], pa.Table]  # the listing of a data set
    #: for rows of a listing, pairs (index among the rows, content), in any order
    read_images: Callable[[Dataset, pa.Table], Iterable[tuple[int, Content]]]
    #: the splits that the data itself names; none: images are split by their ids
    find_splits: Callable[[Dataset], set[str]] = lambda dataset: set()
    default_preprocessing: Preprocessing | None = None  # None: looked up in the images
    needs_data: bool = True  # whether the user names where the data lies
    remote: bool = True  # whether the data may lie on an object store
    columns: tuple[str, ...] = ()  # the columns that may have another name in the data
    #: the attributes that a data set can carry; None: the source has none
    attributes: Callable[[Dataset], list[str]] | None = None


def split_named(name: str | None) -> str | None:
    """The split that a folder, file or value of a column names: train, validation, test, or None."""
    folded = (name or "").strip().casefold()
    return next((split for split, names in SPLIT_NAMES.items() if folded in names), None)


def split_within(name: str) -> str | None:
    """The split that a word of a name names, as in Final_Training or seg-train2; None: no word, or several splits."""
    found = {split for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name) if (split := split_named(word))}
    return found.pop() if len(found) == 1 else None


def make_listing(
    dataset: Dataset,
    image_ids: Any,
    locations: Any,
    rows: Any,
    sizes: Any,
    label_names: Any,
    attributes: Sequence[pa.Array | pa.ChunkedArray] = (),
) -> pa.Table:
    """The listing of a data set: one row for each image."""
    types = [pa.string(), pa.string(), pa.int64(), pa.int64(), pa.string(), *(array.type for array in attributes)]
    fields = pa.schema(list(zip((*LISTING_COLUMNS, *dataset.attributes), types)))
    return pa.table([image_ids, locations, rows, sizes, label_names, *attributes], fields)


def annotate(listing: pa.Table, counts: Mapping[str, int] | None = None, sentences: Iterable[str] = ()) -> pa.Table:
    """The listing with reasons and numbers of what it leaves out, and notes on how it was read, beside those it has."""
    counts = left_out(listing) | {reason: count for reason, count in (counts or {}).items() if count}
    noted = {b"clarity.left_out": json.dumps(counts), b"clarity.notes": json.dumps([*notes(listing), *sentences])}
    return listing.replace_schema_metadata({**(listing.schema.metadata or {}), **noted})


def left_out(listing: pa.Table) -> dict[str, int]:
    """What the source saw and did not list: reason -> count."""
    return dict(json.loads((listing.schema.metadata or {}).get(b"clarity.left_out", b"{}")))


def notes(listing: pa.Table) -> list[str]:
    """Notes for the user on how the images were read: a sentence each."""
    return list(json.loads((listing.schema.metadata or {}).get(b"clarity.notes", b"[]")))


def drop_no_label(listing: pa.Table) -> pa.Table:
    """The listing with null for labels of -1, and a note of it; where classes are -1 and 1 both are classes."""
    labels = listing["label_name"]
    count = pc.sum(pc.equal(labels, NO_LABEL)).as_py() or 0
    if not count or set(pc.unique(labels).drop_null().to_pylist()) == {NO_LABEL, "1"}:
        return listing
    index = listing.column_names.index("label_name")
    labels = pc.if_else(pc.equal(labels, NO_LABEL), pa.scalar(None, pa.string()), labels)
    listing = listing.set_column(index, "label_name", labels)
    have = plural(count, "image has", "images have")
    return annotate(listing, sentences=[f"{have} the label -1, which is read as no label"])


def note_of_split(dataset: Dataset, listed: int, total: int, relatives: Sequence[tuple[str, str]] = ()) -> list[str]:
    """The note on images that the data does not split, of which ``listed`` are of its split by their ids.

    ``relatives`` are held-out images that seem to show the same as one to train on, each with that one.
    """
    tests = listed if dataset.split == "test" else total - listed
    text = (
        f"the data names no splits: {tests} of {total} images, chosen by their ids, are the split test, the others the "
        "split train (split all: every image); "
    )
    if len(relatives) > 0.1 * tests:
        first = " and ".join(map(escaped, relatives[0]))
        images = plural(len(relatives), "test image is", "test images are")
        text += f"{images} named like training images but for the last number ({first}): "
    text += "if several show one object or person, name splits"
    return [text] if total else []


def escaped(text: str) -> str:
    """Text with its control characters, such as line breaks, as escapes."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def names_of(columns: Iterable[str]) -> str:
    """Names of columns in a message."""
    return ", ".join(columns) or "none"


def some(names: Iterable[str]) -> str:
    """The first of some names, for a message."""
    found = sorted(set(names))
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def require_unique(ids: pa.Array | pa.ChunkedArray, where: str) -> None:
    """Raise ValueError if image ids are missing or double."""
    if ids.null_count:
        raise ValueError(f"{where}: expected an image_id in every row, found null in {ids.null_count}: fill them")
    texts = (text for start in range(0, len(ids), PIECE) for text in ids[start : start + PIECE].to_pylist())
    hashes = np.fromiter(map(hash, texts), np.int64, len(ids))
    hashes.sort()
    if (hashes[1:] != hashes[:-1]).all():
        return
    counts = pc.value_counts(ids)  # takes ten times the memory of the hashes
    double = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(double):
        first = ", ".join(map(repr, double[:3].to_pylist()))
        raise ValueError(f"{where}: expected each image_id once, found {len(double)} duplicates ({first}): drop them")


def require_once(names: Iterable[str], columns: Sequence[str], where: str) -> None:
    """Raise ValueError if a table has more than one of its ``columns`` by one of these names."""
    for name in names:
        if columns.count(name) > 1:
            raise ValueError(f"{where}: expected one column {name}, found {columns.count(name)}: rename the others")


def as_text(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column of text or whole numbers as strings, NaN as null; ValueError for another type."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    kind = array.type
    if pa.types.is_dictionary(kind):
        array, kind = array.cast(kind.value_type), kind.value_type
    if pa.types.is_floating(kind):
        array = pc.if_else(pc.is_nan(array), pa.scalar(None, kind), array)
        try:
            array = array.cast(pa.int64())
        except pa.ArrowInvalid:
            part = array.filter(pc.not_equal(pc.floor(array), array))
            raise ValueError(f"{kind} that are not whole, such as {part[0] if len(part) else array[0]}") from None
    whole = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or (pa.types.is_decimal(kind) and not kind.scale)
    if not (whole or is_text(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise ValueError(str(kind))
    return array.cast(pa.string())


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


#: What to do with arrays, and with images of formats that are not read.
ARRAYS = "write the images as files or Parquet, or train on the arrays in Python with clarity.train"
UNREAD = ("images of a format that is not read", "convert them to PNG or JPEG")

#: What tells formats that look like a folder of images or of Parquet files, by a name in a path, and what to do.
FOREIGN = (
    (r"(^|/)_delta_log/", "a Delta table", "export the current version as plain Parquet files"),
    (r"(^|/)metadata/[^/]*\.metadata\.json$", "an Iceberg table", "export the current snapshot as plain Parquet files"),
    (r"(^|/)\.hoodie/", "a Hudi table", "export the current snapshot as plain Parquet files"),
    (r"\.lance(/|$)", "a Lance data set", "export it as Parquet files"),
    (r"\.arrow$", "Arrow files, as save_to_disk of Hugging Face's datasets writes", "export it with to_parquet"),
    (r"(?i)\.tfrecords?(-\d+-of-\d+)?(\.gz)?$", "TFRecord files", "export the images as files or Parquet"),
    (r"(?i)\.(tar|tgz|tar\.(gz|bz2|xz|zst))$", "tar archives", "unpack them"),
    (r"(?i)\.(zip|7z|rar)$", "zip archives", "unpack them"),
    (r"(?i)\.(parquet|pq)$", "Parquet files", "read them with the source parquet"),
    (r"[-.]idx\d-ubyte(\.gz)?$", "files of MNIST's format", "read them with the source mnist"),
    (r"(?i)\.(npz|npy|mat|h5|hdf5|pkl|pickle|pt)$", "files of arrays", ARRAYS),
    (r"(^|/)((data|test)_batch(_\d)?(\.bin)?|cifar-100-\w+/(train|test)(\.bin)?)$", "files of CIFAR's format", ARRAYS),
    (r"(?i)\.(heic|heif|avif|jp2|jxl|dcm|nii|nii\.gz|svs|svg|psd|cr2|nef|dng)$", *UNREAD),
)
TABLE_FORMATS = FOREIGN[:4]


def foreign_format(paths: Iterable[str], formats: Sequence[tuple[str, str, str]] = FOREIGN) -> str | None:
    """An unsupported format and its remedy, as the end of a message; None if no format is recognised."""
    paths = list(paths)
    for pattern, what, remedy in formats:
        if found := next((path for path in paths if re.search(pattern, path)), None):
            return f"found {what} ({found}): {remedy}"
    return None


def where_of(dataset: Dataset) -> str:
    """The source of a data set and where it lies, for a message."""
    return f"{dataset.source} {storage.display(dataset.data or '')}".strip()
