"""Parquet files with a column of encoded images."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clarity import storage
from clarity.data.listing import Content, Dataset, make_listing, note_left_out
from clarity.ids import split_of
from clarity.images import UnreadableImage

#: What reading a broken file raises; Arrow's errors are among them.
BROKEN = (OSError, ValueError)
BROKEN_FILE = "expected the Parquet file that was listed, found it broken: restore it"


def list_parquet(dataset: Dataset) -> pa.Table:
    """The rows of every Parquet file of a data set."""
    parts, others = [], 0
    for file, uri in parquet_files(str(dataset.data)):
        listing, dropped = list_parquet_file(dataset, uri, file)
        parts.append(listing)
        others += dropped
    listing = pa.concat_tables(parts).combine_chunks()
    return note_left_out(listing, {"rows whose split is neither train nor test": others})


def parquet_files(root: str) -> list[tuple[storage.FileInfo, str]]:
    """The files of a data set, each with its URI; a data set of a single file has an empty path."""
    files = [file for file in storage.list_files(root) if not file.path or file.path.endswith(".parquet")]
    files = [file for file in files if not re.search(r"(^|/)[._]", file.path)]
    if not files:
        raise ValueError(f"expected files *.parquet in {storage.display(root)}, found none: check the path")
    return [(file, storage.join(root, file.path)) for file in files]


def list_parquet_file(dataset: Dataset, uri: str, file: storage.FileInfo) -> tuple[pa.Table, int]:
    """The listing of one file, and how many of its rows belong to no split."""
    with storage.open_parquet(uri) as parquet:
        kinds = column_types(uri, parquet)
        names = [name for name in ("image_id", "label", "split", *dataset.attributes) if name in kinds]
        try:
            table = storage.attempt("read", uri, lambda: parquet.read(names))
        except pa.ArrowException as error:
            raise ValueError(f"expected a whole Parquet file, found {storage.display(uri)}, broken ({error})") from None
        rows = np.arange(parquet.metadata.num_rows)
    columns = {name: cast_column(uri, name, table[name], name in dataset.attributes) for name in names}
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
    listing = make_listing(
        dataset,
        ids.filter(pa.array(keep)),
        [file.path] * int(keep.sum()),
        rows[keep],
        [file.size] * int(keep.sum()),
        columns.get("label", empty).filter(pa.array(keep)).cast(pa.string()),
        [columns.get(name, empty).filter(pa.array(keep)).cast(pa.int8()) for name in dataset.attributes],
    )
    return listing, others


def column_types(uri: str, parquet: pq.ParquetFile) -> dict[str, pa.DataType]:
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


def cast_column(uri: str, name: str, column: pa.ChunkedArray, attribute: bool) -> pa.Array:
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


def read_parquet(dataset: Dataset, rows: pa.Table) -> Iterator[tuple[int, Content]]:
    """The images of rows of the listing: only their row groups are read, in small batches."""
    locations, numbers = np.array(rows["location"].to_pylist(), object), rows["row"].to_numpy()
    for location in dict.fromkeys(locations):
        indices = np.flatnonzero(locations == location)
        indices = indices[np.argsort(numbers[indices], kind="stable")]
        try:
            for index, content in read_parquet_file(storage.join(str(dataset.data), location), numbers[indices]):
                yield int(indices[index]), content
        except BROKEN as error:  # before the first of its images
            if getattr(error, "transient", False):
                raise
            yield from ((int(index), UnreadableImage(BROKEN_FILE)) for index in indices)


def read_parquet_file(uri: str, numbers: np.ndarray) -> Iterator[tuple[int, Content]]:
    """Pairs (index among ``numbers``, content), for ascending numbers of rows."""
    with storage.open_parquet(uri) as parquet:
        ends = np.cumsum([parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)])
        if not len(ends) or numbers[-1] >= ends[-1]:
            raise ValueError("fewer rows than were listed")
        struct = pa.types.is_struct(column_types(uri, parquet)["image"])
        groups = np.searchsorted(ends, numbers, side="right")
        for group in np.unique(groups):
            pending = np.flatnonzero(groups == group).tolist()
            first = int(ends[group]) - parquet.metadata.row_group(group).num_rows
            try:
                for batch in read_row_group(uri, parquet, int(group), "image.bytes" if struct else "image"):
                    column = batch.column(0).field("bytes") if struct else batch.column(0)
                    while pending and numbers[pending[0]] < first + len(batch):
                        index = pending.pop(0)
                        content = column[int(numbers[index]) - first].as_py()
                        missing = UnreadableImage("expected the bytes of an image, found null: fill or drop the row")
                        yield index, missing if content is None else content
                    first += len(batch)
                    if not pending:
                        break
            except BROKEN as error:
                if getattr(error, "transient", False):
                    raise
                yield from ((index, UnreadableImage(BROKEN_FILE)) for index in pending)


def read_row_group(uri: str, parquet: pq.ParquetFile, group: int, leaf: str) -> Iterator[pa.RecordBatch]:
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


def parquet_attributes(data: str) -> list[str]:
    """The columns of integers and booleans."""
    with storage.open_parquet(parquet_files(data)[0][1]) as parquet:
        kinds = {field.name: field.type for field in parquet.schema_arrow}
    return [name for name, kind in kinds.items() if pa.types.is_integer(kind) or pa.types.is_boolean(kind)]
