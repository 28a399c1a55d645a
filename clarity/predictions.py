"""Predictions of the user's own model, read from a file and joined to the images of a listing.

Does not know our models: class names are passed in.

Shapes: B rows, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clarity import data, schema, storage
from clarity.data.listing import note_left_out


def read_predictions(uri: str, listing: pa.Table) -> pa.Table:
    """Read predictions of the user's own model: columns image_id, and class or probabilities or both.

    Args:
        uri: a Parquet file, local or s3://. ``class`` holds names or indices, ``probabilities`` lists of numbers.
        listing: all images; rows of the file about others are dropped and counted (``data.left_out``).

    Raises:
        ValueError: columns are missing or of another type, ids are null or duplicate, or none belongs to an image.
    """
    file = f"predictions: {storage.display(uri)}"
    with storage.open_parquet(uri) as parquet:
        found = parquet.schema_arrow.names
        names = [name for name in ("image_id", "class", "probabilities") if name in found]
        if names[:1] != ["image_id"] or len(names) < 2:
            raise ValueError(
                f"{file}: expected columns image_id and class or probabilities, found {', '.join(found) or 'none'}: "
                "rename them"
            )
        table = storage.attempt("read", uri, lambda: parquet.read(names))
    for number, column in enumerate(table.itercolumns()):
        if pa.types.is_dictionary(column.type):
            table = table.set_column(number, names[number], column.cast(column.type.value_type))
    kind = table["image_id"].type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{file}: expected image_id as text or integers, found {kind}: convert it")
    ids = table["image_id"].cast(pa.string()).combine_chunks()
    if ids.null_count:
        raise ValueError(f"{file}: expected an image_id in every row, found null in {ids.null_count}: fill them")
    if double := len(ids) - len(pc.unique(ids)):
        counts = pc.value_counts(ids)
        first = counts.field("values").filter(pc.greater(counts.field("counts"), 1))[0]
        raise ValueError(
            f"{file}: expected each image_id once, found {double} duplicates, the first {first}: drop them"
        )
    known = pc.is_in(ids, value_set=listing["image_id"].combine_chunks())
    strangers = len(ids) - (pc.sum(known).as_py() or 0)
    if strangers == len(ids):
        example = f", such as {ids[0]}; its own are like {listing['image_id'][0]}" if len(ids) else ""
        raise ValueError(f"{file}: none of its {len(ids)} ids is an image of the data{example}: check both")
    table = table.set_column(0, "image_id", ids).filter(known)
    return note_left_out(table, {"predictions for images that are not in the data": strangers})


def add_predictions(listing: pa.Table, predictions: pa.Table, class_names: Sequence[str]) -> pa.Table:
    """The listing with the columns of ``schema.PREDICTIONS``, null for an image without a prediction.

    Args:
        listing: the images of the audit.
        predictions: of ``read_predictions``. Where a row has both, its class takes precedence over its probabilities.
        class_names: of the explaining model, to which indices and probabilities refer.

    Raises:
        ValueError: unknown classes, invalid probabilities, or no image has a prediction.
    """
    rows = len(predictions)
    classes, probs = np.zeros(rows, np.int32), np.zeros((rows, len(class_names)), np.float32)
    has_class, has_probs = np.zeros(rows, bool), np.zeros(rows, bool)
    if "probabilities" in predictions.column_names:
        probs, has_probs = probability_column(predictions, class_names)
        classes, has_class = probs.argmax(1).astype(np.int32), has_probs.copy()
    if "class" in predictions.column_names:
        named = class_column(predictions, class_names)
        known = named.is_valid().to_numpy(zero_copy_only=False)
        classes[known] = named.drop_null().to_numpy()
        has_class |= known
    index = pc.index_in(listing["image_id"], value_set=predictions["image_id"].combine_chunks())
    at = index.fill_null(0).to_numpy()
    found = index.is_valid().to_numpy() & has_class[at]
    if not found.any():
        raise ValueError(f"predictions: none of the {len(listing)} images asked for has one; check its ids")
    prediction = pa.array(np.where(found, classes[at], 0).astype(np.int32), mask=~found)
    columns = {"prediction": prediction, "prediction_name": pa.array(class_names, pa.string()).take(prediction)}
    if has_probs.any():
        valid = index.is_valid().to_numpy() & has_probs[at]
        columns["prediction_probs"] = schema.fixed_size_list(np.where(valid[:, None], probs[at], 0), valid)
    for name, column in columns.items():
        listing = listing.append_column(name, column)
    return note_left_out(listing, data.left_out(listing) | data.left_out(predictions))


def class_column(predictions: pa.Table, class_names: Sequence[str]) -> pa.Array:
    """The column ``class`` as class indices; null stays null."""
    column, count = predictions["class"].combine_chunks(), len(class_names)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        found = data.label_indices(column.cast(pa.string()), class_names)
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        # An integer column with gaps reaches Parquet as floats from pandas.
        whole = pc.and_(pc.equal(pc.floor(column), column), pc.is_finite(column))
        inside = pc.and_(whole, pc.and_(pc.greater_equal(column, 0), pc.less(column, count)))
        found = pc.if_else(inside, column, pa.scalar(None, column.type)).cast(pa.int32())
    else:
        raise ValueError(f"predictions: expected class as names or indices, found {column.type}: convert it")
    wrong = np.flatnonzero(pc.and_(found.is_null(), column.is_valid()))
    if len(wrong):
        raise ValueError(
            f"predictions: expected classes that the model knows, found {column[wrong[0]]} for image "
            f"{predictions['image_id'][wrong[0]]} and {len(wrong) - 1} others; choose from {', '.join(class_names)}, "
            f"or indices 0 to {count - 1}"
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
                f"predictions: expected {what}, found {found(int(rows_[0]))} for image {ids[rows_[0]]} and "
                f"{len(rows_) - 1} others; the classes are {', '.join(class_names)}, in this order"
            )

    lengths = pc.list_value_length(rows).to_numpy()
    check(lengths != count, f"{count} probabilities an image", lambda row: lengths[row])
    values = rows.flatten().cast(pa.float64()).to_numpy(zero_copy_only=False).reshape(-1, count)  # null becomes NaN
    check(~np.isfinite(values).all(1), "probabilities that are numbers", lambda row: values[row].tolist())
    outside = (values < 0).any(1) | (np.abs(values.sum(1) - 1) > 0.01)
    check(outside, "probabilities that are not negative and sum to 1", lambda row: f"a sum of {values[row].sum():.4g}")
    probs = np.zeros((len(column), count), np.float32)
    probs[valid] = values
    return probs, valid
