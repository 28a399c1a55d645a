"""Predictions of the user's own model, read from a file and joined to the images of a listing."""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from clarity import data, schema, storage
from clarity.data.listing import annotate, as_text, is_text, names_of, require_once, require_unique
from clarity.data.parquet import class_label_names, read_whole
from clarity.report.text import counted


def read_predictions(uri: str, listing: pa.Table) -> pa.Table:
    """Read predictions of the user's own model: columns image_id, and class or probabilities or both.

    Args:
        uri: a Parquet or CSV file, local or s3://. ``class`` holds names or indices, ``probabilities`` lists of
            numbers. What indices and lists refer to is given by the file's metadata (``classes``, or a ClassLabel), or
            by FILE.classes.txt beside it, a name a line.
        listing: all images; rows of the file about others are dropped and counted (``data.left_out``).

    Raises:
        ValueError: columns are missing or of another type, ids are null or duplicate, or none belongs to an image.
    """
    file = f"predictions: {storage.display(uri)}"
    table = read_table(uri)
    found = table.column_names
    try:
        ids = as_text(table["image_id"])
    except ValueError as error:
        raise ValueError(f"{file}: expected image_id as text or integers, found {error}: convert it") from None
    require_unique(ids, file)
    known = pc.is_in(ids, value_set=listing["image_id"].combine_chunks())
    strangers = len(ids) - (pc.sum(known).as_py() or 0)
    if strangers == len(ids):
        example = f", such as {ids[0]}; its own are like {listing['image_id'][0]}" if len(ids) else ""
        raise ValueError(f"{file}: none of its {len(ids)} ids is an image of the data{example}: check both")
    classes = {"clarity.classes": json.dumps(read_classes(uri, table))}
    for number, column in enumerate(table.itercolumns()):
        if is_text(column.type) or pa.types.is_dictionary(column.type):
            table = table.set_column(number, found[number], column.cast(pa.string()))
    table = table.set_column(found.index("image_id"), "image_id", ids).filter(known).replace_schema_metadata(classes)
    return annotate(table, {"predictions for images that are not in the data": strangers})


def read_table(uri: str) -> pa.Table:
    """The columns of a Parquet or CSV file that are predictions; ids of a CSV file stay as they are written."""

    def wanted(found: list[str]) -> list[str]:
        names = [name for name in found if name in ("image_id", "class", "probabilities")]
        require_once(names, found, f"predictions: {storage.display(uri)}")
        if "image_id" not in names or len(names) < 2:
            expected = "expected columns image_id and class or probabilities"
            raise ValueError(f"predictions: {storage.display(uri)}: {expected}, found {names_of(found)}: rename them")
        return names

    if not re.search(r"(?i)\.(csv|tsv)$", storage.name(uri)):
        with storage.open_parquet(uri) as parquet:
            return read_whole(uri, parquet, wanted(parquet.schema_arrow.names))
    content = storage.read_bytes(uri)
    delimiter = max(",;\t", key=lambda sign: content.partition(b"\n")[0].count(sign.encode()))
    options = {"column_types": {"image_id": pa.string()}, "strings_can_be_null": True, "null_values": [""]}
    try:
        table = csv.read_csv(
            pa.BufferReader(content),
            parse_options=csv.ParseOptions(delimiter=delimiter),
            convert_options=csv.ConvertOptions(**options),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(f"predictions: expected a CSV file, found {storage.display(uri)} ({error})") from None
    return table.select(wanted(table.column_names))


def read_classes(uri: str, table: pa.Table) -> list[str] | None:
    """The classes in the order to which indices and probabilities refer, where the file or one beside it tells."""
    metadata = table.schema.metadata or {}
    if b"classes" in metadata:
        found = json.loads(metadata[b"classes"])
        if not isinstance(found, list):
            raise ValueError(f"predictions: expected a list of classes in the metadata, found {found!r}: correct it")
    elif (found := class_label_names("class", metadata)) is None:
        beside = re.sub(r"\.\w+(?=\?|$)", ".classes.txt", uri)
        if beside == uri or not storage.exists(beside):
            return None
        found = storage.read_bytes(beside).decode("utf-8-sig").splitlines()
    classes = [str(name).strip() for name in found]
    if len(set(classes)) < len(classes):
        raise ValueError(f"predictions: expected each class once in the order of classes, found {classes}: correct it")
    return [unicodedata.normalize("NFC", name) for name in classes]


def add_predictions(listing: pa.Table, predictions: pa.Table, class_names: Sequence[str]) -> pa.Table:
    """The listing with the columns of ``schema.PREDICTIONS``, null for an image without a prediction.

    A row's class takes precedence over its probabilities. Indices and probabilities refer to ``class_names``, those of
    the explaining model. ValueError: unknown classes, invalid probabilities, or no image has a prediction.
    """
    rows = len(predictions)
    classes, has_class = np.zeros(rows, np.int32), np.zeros(rows, bool)
    probs, has_probs = np.zeros((rows, len(class_names)), np.float32), np.zeros(rows, bool)
    if "probabilities" in predictions.column_names:
        probs, has_probs = probability_column(predictions, class_names)
        classes, has_class = probs.argmax(1).astype(np.int32), has_probs.copy()
    if "class" in predictions.column_names:
        named = class_column(predictions, class_names)
        known = named.is_valid().to_numpy(zero_copy_only=False)
        classes[known] = named.drop_null().to_numpy()
        has_class |= known
    index = pc.index_in(listing["image_id"], value_set=predictions["image_id"].combine_chunks())
    at, there = index.fill_null(0).to_numpy(), index.is_valid().to_numpy()
    found = there & has_class[at]
    if not found.any():
        raise ValueError(f"predictions: none of the {len(listing)} images asked for has one; check its ids")
    prediction = pa.array(np.where(found, classes[at], 0).astype(np.int32), mask=~found)
    columns = {"prediction": prediction, "prediction_name": pa.array(class_names, pa.string()).take(prediction)}
    if has_probs.any():
        valid = there & has_probs[at]
        columns["prediction_probs"] = schema.fixed_size_list(np.where(valid[:, None], probs[at], 0), valid)
    for name, column in columns.items():
        listing = listing.append_column(name, column)
    return annotate(listing, data.left_out(predictions))


def class_order(predictions: pa.Table, class_names: Sequence[str], what: str) -> list[int]:
    """The index in ``class_names`` of each class, in the order of the user's model.

    ValueError: the order is not told, and the usual two, by number and by text, differ.
    """
    classes = json.loads((predictions.schema.metadata or {}).get(b"clarity.classes", b"null"))
    by_text, by_number = sorted(class_names), [str(index) for index in range(len(class_names))]
    if classes is None:
        numbers = all(re.fullmatch(r"-?[0-9]+", name) for name in class_names)
        if list(class_names) == by_text and (what != "indices" or not numbers or by_text == by_number):
            return list(range(len(class_names)))
        raise ValueError(
            f"predictions: expected the order of the classes to which {what} refer, as names that are numbers have "
            f"more than one ({', '.join(class_names[:4])} ... or {', '.join(by_text[:4])} ...), found none in the "
            "file: write names, or list the classes in that order, one a line, in a file of the same name that ends in "
            ".classes.txt"
        )
    names = [unicodedata.normalize("NFC", name) for name in class_names]
    if not set(classes) <= set(names) or (what != "indices" and len(classes) < len(names)):
        raise ValueError(
            f"predictions: expected the classes that the model knows ({', '.join(class_names)}) in the order to which "
            f"{what} refer, found {', '.join(classes)}: correct it"
        )
    return [names.index(name) for name in classes]


def class_column(predictions: pa.Table, class_names: Sequence[str]) -> pa.Array:
    """The column ``class`` as class indices; null stays null."""
    column = predictions["class"].combine_chunks()
    if is_text(column.type):
        found = data.label_indices(column.cast(pa.string()), class_names)
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        # An integer column with gaps reaches Parquet as floats from pandas.
        order = pa.array(class_order(predictions, class_names, "indices"), pa.int32())
        numbers = column.cast(pa.float64(), safe=False)
        known = pc.is_in(numbers, value_set=pa.array(range(len(order)), pa.float64()))
        found = order.take(pc.if_else(known, numbers, pa.scalar(None, pa.float64())).cast(pa.int32()))
    elif pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.int32())
    else:
        raise ValueError(f"predictions: expected class as names or indices, found {column.type}: convert it")
    wrong = np.flatnonzero(pc.and_(found.is_null(), column.is_valid()))
    if len(wrong):
        raise ValueError(
            f"predictions: expected classes that the model knows, found {column[wrong[0]]} for image "
            f"{predictions['image_id'][wrong[0]]} ({len(wrong)} in all); choose from {', '.join(class_names)}, "
            f"or indices 0 to {len(class_names) - 1}"
        )
    return found


def probability_column(predictions: pa.Table, class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The column ``probabilities`` (B, K), zero where it is null, and the mask (B,) of rows that are not."""
    column, count = predictions["probabilities"].combine_chunks(), len(class_names)
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise ValueError(f"predictions: expected probabilities as lists of numbers, found {kind}: convert it")
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    ids, rows = predictions["image_id"].filter(pa.array(valid)), column.drop_null()

    def check(bad: np.ndarray, what: str, found: Callable[[int], Any]) -> None:
        if len(rows_ := np.flatnonzero(bad)):
            raise ValueError(
                f"predictions: expected {what}, found {found(int(rows_[0]))} for image {ids[rows_[0]]} "
                f"({len(rows_)} in all); the classes are {', '.join(class_names)}, in this order"
            )

    lengths = pc.list_value_length(rows).to_numpy()
    check(lengths != count, f"{count} probabilities an image", lambda row: lengths[row])
    values = rows.flatten().cast(pa.float64()).to_numpy(zero_copy_only=False).reshape(-1, count)  # null becomes NaN
    right = (values >= 0).all(1) & (np.abs(values.sum(1) - 1) <= 0.01)
    check(~right, "probabilities that are not negative and sum to 1", lambda row: values[row].tolist())
    probs = np.zeros((len(column), count), np.float32)
    probs[np.ix_(valid, class_order(predictions, class_names, "probabilities"))] = values
    return probs, valid


def describe_coverage(listing: pa.Table, predictions: pa.Table) -> str:
    """How many images have a prediction, and what was left out, for the console."""
    told = f"{len(listing) - listing['prediction'].null_count} of {len(listing)} images have a prediction"
    return "; ".join([told, *(f"left out: {counted(n, what)}" for what, n in data.left_out(predictions).items())])
