"""Parquet files with a column of encoded images, plain or as Hugging Face lays them out."""

import functools
import itertools
import json
import os
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clarity import storage
from clarity.data.files import raise_if_source_failed, read_file
from clarity.data.listing import (
    FOREIGN,
    NO_LABEL,
    TABLE_FORMATS,
    Content,
    Dataset,
    annotate,
    as_text,
    drop_no_label,
    foreign_format,
    is_text,
    make_listing,
    names_of,
    note_of_split,
    require_once,
    some,
    split_named,
    split_within,
)
from clarity.ids import split_of
from clarity.images import EXTENSIONS, UnreadableImage

#: What reading a broken file raises; Arrow's errors are among them.
BROKEN = (OSError, ValueError)
BROKEN_FILE = "expected the Parquet file that was listed, found it broken: restore it"
NO_BYTES = "expected the bytes of an image, found null: fill or drop the row"
NO_PATH = "expected the path of an image, found text that cannot be one: correct or drop the row"


@dataclass(frozen=True)
class ParquetPart:
    """One file of a data set, and what its path says of all its rows: ``train-0.parquet``, ``split=test/label=3/``."""

    path: str
    uri: str
    size: int
    split: str | None
    keys: dict[str, str | None]


def list_parquet(dataset: Dataset) -> pa.Table:
    """The rows of every Parquet file of a data set."""
    tables, others, listed, by_id = [], 0, 0, 0
    parts = list_parts(dataset)
    for part in parts:
        table, dropped, rows = list_part(dataset, part)
        tables.append(table)
        others += dropped
        listed, by_id = listed + len(table) * (rows > 0), by_id + rows
    try:
        listing = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"attributes: expected one type in all files of {dataset.data}, found {error}") from None
    counts = {"rows whose split is none of train, validation and test": others}
    told = [*note_of_split(dataset, listed, by_id), *notes_on_layout(dataset, parts, listing)]
    return annotate(drop_no_label(listing), counts, told)


def notes_on_layout(dataset: Dataset, parts: list[ParquetPart], listing: pa.Table) -> list[str]:
    """Notes of folders that may be different data sets, and of labels that may lie in another column."""
    told = []
    above: dict[str | None, set[str]] = {}
    for part in parts:
        folders = itertools.takewhile(lambda name: not split_named(name) and "=" not in name, part.path.split("/")[:-1])
        above.setdefault(part.split, set()).add("/".join(folders) or ".")
    if several := next((folders for split, folders in above.items() if split and len(folders) > 1), None):
        told.append(
            f"files of one split lie in several folders ({some(several)}), which are read as one data set; if they are "
            "several configurations of it, name one"
        )
    name = dataset.column("label")
    if listing["label_name"].null_count == len(listing) and name not in parts[0].keys:
        with storage.open_parquet(parts[0].uri) as parquet:
            columns = parquet.schema_arrow.names
        if name not in columns and set(columns) - {dataset.column(other) for other in ("image", "image_id", "split")}:
            told.append(
                f"there is no column {name}, and thus no label; the columns are {names_of(columns)}: say which one "
                "holds the labels, as in columns label=NAME"
            )
    return told


def list_parts(dataset: Dataset) -> list[ParquetPart]:
    """The Parquet files of a data set, sorted by path; ValueError where their paths contradict each other."""
    root = str(dataset.data)
    files = storage.list_files(root)
    others = [kind for kind in FOREIGN if kind[1] != "Parquet files"]
    foreign = foreign_format([storage.name(root)], others) if files and not files[0].path else None
    foreign = foreign or foreign_format((file.path for file in files), TABLE_FORMATS)
    shown = [file for file in files if not re.search(r"(^|/)[._]", file.path)]
    parts = []
    for file in shown if not foreign else ():
        if not file.path or re.search(r"(?i)\.(parquet|pq)$", file.path):
            split, keys = read_path(dataset, file.path or storage.name(root))
            parts.append(ParquetPart(file.path, storage.join(root, file.path), file.size, split, keys))
    if not parts:
        found = foreign or foreign_format(file.path for file in shown) or "found none: check the path"
        if any(file.path.lower().endswith(EXTENSIONS) for file in shown):
            found = "found image files: read them with the source folder"
        raise ValueError(f"expected plain Parquet files, *.parquet or *.pq, in {storage.display(root)}, {found}")
    named = [part for part in parts if part.split]
    within = [split_within(part.path.rpartition(".")[0]) for part in parts]
    if not named and len({*within} - {None}) > 1:  # such as beans_train.parquet beside beans_test.parquet
        parts = [replace(part, split=split) for part, split in zip(parts, within)]
        named = [part for part in parts if part.split]
    if named and len(named) < len(parts):
        other = next(part for part in parts if not part.split)
        raise ValueError(
            f"expected the name of a split in the paths of all files of {storage.display(root)} or of none, found "
            f"{named[0].path} for {named[0].split} and {other.path}: rename or move one of them"
        )
    return parts


def read_path(dataset: Dataset, path: str) -> tuple[str | None, dict[str, str | None]]:
    """The split that a file's path names, and its keys, with their values unquoted as Hive quotes them."""
    *folders, name = path.split("/")
    keys: dict[str, str | None] = {}
    splits = {}
    for folder in folders:
        key, equals, value = folder.partition("=")
        if equals:
            keys[key] = None if value == "__HIVE_DEFAULT_PARTITION__" else urllib.parse.unquote(value)
        elif split := split_named(folder):
            splits[folder] = split
    if split := split_named(keys.get(dataset.column("split"))):
        splits[f"{dataset.column('split')}={split}"] = split
    if split := split_named(re.split(r"[-_.]", name)[0]):
        splits[name] = split
    if len(set(splits.values())) > 1:
        raise ValueError(f"expected one split in the path {path}, found {' and '.join(splits)}: rename the file")
    return next(iter(splits.values()), None), keys


def list_part(dataset: Dataset, part: ParquetPart) -> tuple[pa.Table, int, int]:
    """The listing of one file, how many of its rows belong to no split, and how many of all have it by their ids."""
    table, columns = read_columns(dataset, part)
    rows = np.arange(len(table))
    prefix = f"{part.path}#" if part.path else ""
    ids = columns.get("image_id", pa.array([f"{prefix}{row:08d}" for row in rows], pa.string()))
    labels = columns.get("label", pa.nulls(len(rows), pa.string()))
    labels = pc.utf8_trim_whitespace(labels)  # as in a table of text
    labels = pc.if_else(pc.equal(labels, ""), pa.scalar(None, pa.string()), labels)
    attributes = [
        attribute_column(part.uri, name, table[name]) if name in table.column_names else pa.nulls(len(rows))
        for name in dataset.attributes
    ]
    keep, others = rows_of_split(dataset, part, columns.get("split"), ids)
    by_id = 0 if part.split or "split" in columns or dataset.split == "all" else len(rows)
    same = [[value] * len(rows) for value in (part.path, part.size)]
    listing = make_listing(dataset, ids, same[0], rows, same[1], labels, attributes)
    return listing.filter(pa.array(keep)), others, by_id


def read_columns(dataset: Dataset, part: ParquetPart) -> tuple[pa.Table, dict[str, pa.Array]]:
    """The columns of a file but its images as they are; and image_id, label and split as text, those that there are."""
    names = {name: dataset.column(name) for name in ("image_id", "label", "split")}
    with storage.open_parquet(part.uri) as parquet:
        fields = parquet.schema_arrow
        wanted = [name for name in dict.fromkeys([*names.values(), *dataset.attributes]) if name in fields.names]
        require_once([dataset.column("image"), *wanted], fields.names, storage.display(part.uri))
        of_bytes, of_paths = image_leaves(dataset, part.uri, parquet)
        if of_bytes is None:
            check_paths(dataset, part, parquet, of_paths)
        if missing := [name for key, name in dataset.columns if key != "image" and name not in [*wanted, *part.keys]]:
            raise ValueError(
                f"columns: expected {names_of(missing)} in {storage.display(part.uri)}, found columns "
                f"{names_of(fields.names)}: choose from these"
            )
        table = read_whole(part.uri, parquet, wanted)
    columns = {name: text_column(part.uri, column, table[column]) for name, column in names.items() if column in wanted}
    for name in ("label", "split"):
        if names[name] in part.keys:
            columns[name] = join_key(part, names[name], columns.get(name), len(table))
    is_text_column = names["label"] in wanted and is_text(fields.field(names["label"]).type)
    classes = None if is_text_column else class_label_names(names["label"], fields.metadata)
    if "label" in columns and classes is not None:
        columns["label"] = name_labels(part.uri, names["label"], columns["label"], classes)
    return table, columns


def rows_of_split(
    dataset: Dataset, part: ParquetPart, column: pa.Array | None, ids: pa.Array
) -> tuple[np.ndarray, int]:
    """Which rows of a file (B,) belong to the split of the data set, and how many belong to none."""
    splits = [] if column is None else [split_named(value) for value in column.to_pylist()]
    if part.split and (wrong := next((split for split in splits if split not in (None, part.split)), None)):
        raise ValueError(
            f"expected one split for each row of {storage.display(part.uri)}, found {part.split} in its path and "
            f"{wrong} in column {dataset.column('split')}: rename the file or drop the column"
        )
    if part.split or dataset.split == "all":
        return np.full(len(ids), dataset.split in ("all", part.split)), 0
    if column is not None:
        return np.array([split == dataset.split for split in splits], bool), splits.count(None)
    return np.array([name is None or split_of(name) == dataset.split for name in ids.to_pylist()], bool), 0


def image_leaves(dataset: Dataset, uri: str, parquet: pq.ParquetFile) -> tuple[str | None, str | None]:
    """The leaf columns of a file's images: that of their bytes, and that of paths to files, each None where unused."""
    fields, name = parquet.schema_arrow, dataset.column("image")
    if name not in fields.names:
        likely = next((field.name for field in fields if holds_bytes(field.type)), "COLUMN")
        raise ValueError(
            f"expected a column {name} in {storage.display(uri)}, found columns {names_of(fields.names)}: say which "
            f"one holds the images, as in columns image={likely}"
        )
    kind = plain_type(fields.field(name).type)
    if is_text(kind):
        return None, name
    if not holds_bytes(kind):
        raise ValueError(
            f"expected a column {name} of bytes or struct<bytes, path> in {storage.display(uri)}, found {kind}: store "
            "the files of the images in it"
        )
    if not pa.types.is_struct(kind):
        return name, None
    nulls, index = null_count(parquet, f"{name}.bytes"), kind.get_field_index("path")
    if nulls == 0 or index < 0 or not is_text(plain_type(kind.field(index).type)):  # numbers are no paths
        return f"{name}.bytes", None
    return None if nulls == parquet.metadata.num_rows else f"{name}.bytes", f"{name}.path"


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a column, however they are encoded."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column holds bytes, or a struct with bytes."""
    kind = plain_type(kind)
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = plain_type(kind.field("bytes").type)
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    return binary or pa.types.is_binary_view(kind)


def null_count(parquet: pq.ParquetFile, leaf: str) -> int | None:
    """The nulls of a column by the statistics of its row groups; None where they do not say."""
    total = 0
    for group in range(parquet.num_row_groups):
        info = parquet.metadata.row_group(group)
        column = next(info.column(i) for i in range(info.num_columns) if info.column(i).path_in_schema == leaf)
        if column.statistics is None or not column.statistics.has_null_count:
            return None
        total += column.statistics.null_count
    return total


def check_paths(dataset: Dataset, part: ParquetPart, parquet: pq.ParquetFile, leaf: str | None) -> None:
    """Raises ValueError where a file holds paths instead of images, and none of the first is there."""
    batch = next(parquet.iter_batches(16, columns=[leaf], use_threads=False), None)
    if batch is None:
        return
    values = batch.column(0).to_pylist()
    paths = [path for value in values if (path := value["path"] if isinstance(value, dict) else value)]
    if not any(storage.exists(uri) for path in paths for uri in path_uris(dataset, part.uri, path)):
        what = f"paths such as {paths[0][:100]!r}, with no file there" if paths else "only null"
        raise ValueError(
            f"expected images in column {dataset.column('image')} of {storage.display(part.uri)}, found {what}: store "
            "the bytes of the images, or put the files beside the Parquet file"
        )


def path_uris(dataset: Dataset, uri: str, path: str) -> list[str]:
    """Where a path in a column may lead: as it stands, beside its Parquet file, below the data."""
    if storage.is_remote(path) or os.path.isabs(path):
        return [path]
    head, _, options = uri.rpartition(f"/{storage.name(uri)}")
    return list(dict.fromkeys([storage.join(head + options, path), storage.join(str(dataset.data), path)]))


def join_key(part: ParquetPart, name: str, column: pa.Array | None, count: int) -> pa.Array:
    """A column that the path of a file gives for all its rows, checked against the one inside."""
    value = part.keys[name]
    if column is not None and pc.all(pc.equal(column, pa.scalar(value, pa.string()))).as_py() is False:
        raise ValueError(
            f"expected {name}={value} in every row of {storage.display(part.uri)}, as its path says, found "
            f"{pc.unique(column).to_pylist()[:3]}: correct the path or drop the column"
        )
    return pa.array([value] * count, pa.string())


def name_labels(uri: str, name: str, numbers: pa.Array, classes: list[str]) -> pa.Array:
    """The names of classes for their numbers; -1, which stands for no label, is kept."""
    known = {str(number): text for number, text in enumerate(classes)} | {NO_LABEL: NO_LABEL}
    if unknown := [number for number in pc.unique(numbers).drop_null().to_pylist() if number not in known]:
        raise ValueError(
            f"expected labels 0 to {len(classes) - 1} in column {name} of {storage.display(uri)}, as its metadata "
            f"names {len(classes)} classes, found {unknown[0]}: correct the labels or the metadata"
        )
    return pa.array([None if number is None else known[number] for number in numbers.to_pylist()], pa.string())


def class_label_names(name: str, metadata: dict[bytes, bytes] | None) -> list[str] | None:
    """The names of a ClassLabel column in the metadata that Hugging Face's datasets writes."""
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][name]
        known = feature.get("_type") == "ClassLabel" and None not in feature["names"]
        return [str(text) for text in feature["names"]] if known else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def text_column(uri: str, name: str, column: pa.ChunkedArray) -> pa.Array:
    """A column of the listing as strings, which whole numbers are written as."""
    try:
        return as_text(column)
    except ValueError as error:
        raise ValueError(
            f"expected a column {name} of strings or whole numbers in {storage.display(uri)}, found {error}: convert it"
        ) from None


def attribute_column(uri: str, name: str, column: pa.ChunkedArray) -> pa.Array:
    """A column of integers or booleans, as it is."""
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
        raise ValueError(f"expected a column {name} of integers in {storage.display(uri)}, found {kind}: convert it")
    return column.combine_chunks()


def read_parquet(dataset: Dataset, rows: pa.Table) -> Iterator[tuple[int, Content]]:
    """The images of rows of the listing: only their row groups are read, in small batches."""
    locations, numbers = np.array(rows["location"].to_pylist(), object), rows["row"].to_numpy()
    for location in dict.fromkeys(locations):
        indices = np.flatnonzero(locations == location)
        indices = indices[np.argsort(numbers[indices], kind="stable")]
        uri = storage.join(str(dataset.data), location)
        try:
            for index, content in read_part(dataset, uri, numbers[indices]):
                yield int(indices[index]), content
        except BROKEN as error:  # before the first of its images
            raise_if_source_failed(uri, error)
            yield from ((int(index), UnreadableImage(BROKEN_FILE)) for index in indices)


def read_part(dataset: Dataset, uri: str, numbers: np.ndarray) -> Iterator[tuple[int, Content]]:
    """Pairs (index among ``numbers``, content), for ascending numbers of rows."""
    with storage.open_parquet(uri) as parquet:
        ends = np.cumsum([parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)])
        if not len(ends) or numbers[-1] >= ends[-1]:
            raise ValueError("fewer rows than were listed")
        leaves = [leaf for leaf in image_leaves(dataset, uri, parquet) if leaf]
        groups = np.searchsorted(ends, numbers, side="right")
        for group in np.unique(groups):
            pending = np.flatnonzero(groups == group).tolist()
            first = int(ends[group]) - parquet.metadata.row_group(group).num_rows
            try:
                for batch in read_row_group(uri, parquet, int(group), leaves):
                    while pending and numbers[pending[0]] < first + len(batch):
                        index = pending.pop(0)
                        value = batch.column(0)[int(numbers[index]) - first].as_py()
                        yield index, content_of(dataset, uri, value)
                    first += len(batch)
                    if not pending:
                        break
            except BROKEN as error:
                raise_if_source_failed(uri, error)
                yield from ((index, UnreadableImage(BROKEN_FILE)) for index in pending)


def content_of(dataset: Dataset, uri: str, value: bytes | str | dict[str, bytes | str | None] | None) -> Content:
    """The image of one value of the image column: its bytes, or the file that its path leads to."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None or value == "":
        return UnreadableImage(NO_BYTES)
    if isinstance(value, str):
        uris = path_uris(dataset, uri, value)
        try:
            found = next((path for path in uris[:-1] if storage.exists(path)), uris[-1])
            return read_file(found, None, named_by=uri)
        except ValueError:  # as of text with a null character
            return UnreadableImage(NO_PATH)
    return value


def read_row_group(uri: str, parquet: pq.ParquetFile, group: int, leaves: list[str]) -> Iterator[pa.RecordBatch]:
    """One row group in batches of about 4 MiB; after a transient error it is read again up to where it was."""
    info = parquet.metadata.row_group(group)
    rows = int(np.clip((4 << 20) * info.num_rows // max(1, info.total_byte_size), 1, 1024))
    fresh = functools.partial(parquet.iter_batches, rows, row_groups=[group], columns=leaves, use_threads=False)
    stream, done = fresh(), 0

    def step() -> pa.RecordBatch | None:
        nonlocal stream
        try:
            return next(stream, None)
        except OSError:
            stream = itertools.islice(fresh(), done, None)
            raise

    while (batch := storage.attempt("read", uri, step)) is not None:
        done += 1
        yield batch


def parquet_splits(dataset: Dataset) -> set[str]:
    """The splits that paths or the column of splits name; reading stops where the data set's own is among them."""
    found: set[str] = set()
    name = dataset.column("split")
    for part in list_parts(dataset):
        if part.split:
            found.add(part.split)
        else:
            with storage.open_parquet(part.uri) as parquet:
                require_once([name], parquet.schema_arrow.names, storage.display(part.uri))
                if name in parquet.schema_arrow.names:
                    values = text_column(part.uri, name, read_whole(part.uri, parquet, [name])[name])
                    found |= {split for value in pc.unique(values).to_pylist() if (split := split_named(value))}
        if dataset.split in found:
            break
    return found


def read_whole(uri: str, parquet: pq.ParquetFile, names: list[str]) -> pa.Table:
    """Some columns of a file; ValueError where it turns out broken as it is read."""
    try:
        return storage.attempt("read", uri, lambda: parquet.read(names))
    except pa.ArrowException as error:
        raise ValueError(f"expected a whole Parquet file, found {storage.display(uri)}, broken ({error})") from None


def parquet_attributes(dataset: Dataset) -> list[str]:
    """The columns of integers and booleans that are not the label, the id or the split."""
    with storage.open_parquet(list_parts(dataset)[0].uri) as parquet:
        fields = list(parquet.schema_arrow)
    taken = {dataset.column(name) for name in ("image", "image_id", "label", "split")}
    kinds = [(field.name, field.type) for field in fields if field.name not in taken]
    return [name for name, kind in kinds if pa.types.is_integer(kind) or pa.types.is_boolean(kind)]
