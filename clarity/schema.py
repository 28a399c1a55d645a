"""The tables of an audit: each column once, with its type and its meaning.

Does not know how a value is computed or where a file lies.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa

#: Of the tables; audits of another version are not read.
SCHEMA_VERSION = 2
#: Column of a shard with the original images in the predictor's own mode and size, where those are not the model's.
PREDICTOR_IMAGE = "predictor_image"


class Column(NamedTuple):
    """One column: its Arrow type, or ``float[K]``, ``float[D]``, ``float[A]`` for a list of that length; what it holds,
    with shape and unit; whether a null is rejected.
    """

    type: str
    doc: str
    required: bool = False


#: ``codes``: one row for each image.
CODES: dict[str, Column] = {
    "image_id": Column("string", "stable name: index in the split, relative path, or the data's own id", True),
    "label": Column("int32", "class in the data, an index into class_names; null if absent or unknown"),
    "label_name": Column("string", "class in the data, as written there"),
    "source": Column("int32", "class by the explained model: the ensemble, or the predictor if given"),
    "source_name": Column("string", "name of that class"),
    "probs": Column("float[K]", "mean class probabilities of the latent ensemble"),
    "predictive": Column("float", "predictive uncertainty: entropy of probs, in nats"),
    "aleatoric": Column("float", "aleatoric uncertainty: mean entropy over the members, in nats"),
    "epistemic": Column("float", "epistemic uncertainty, the members' disagreement: predictive minus aleatoric"),
    "z": Column("float[D]", "latent code: the posterior mean"),
    "reconstruction_l1": Column("float", "sum over pixels of |decode(z) - x|, pixels in [0, 1]"),
    "status": Column("string", "ok, or error if the image could not be used", True),
    "error": Column("string", "why the image could not be used"),
    "x": Column("binary", "preprocessed image as PNG; null with --images none"),
}

#: Columns of ``codes`` with --predictions or --predictor; all null for an image without a prediction.
PREDICTIONS: dict[str, Column] = {
    "prediction": Column("int32", "class by your own model, an index into class_names"),
    "prediction_name": Column("string", "name of that class"),
    "prediction_probs": Column("float[K]", "its class probabilities, if known"),
}

#: ``counterfactuals``: one row for each (image, target), the target never being the source.
COUNTERFACTUALS: dict[str, Column] = {
    "image_id": Column("string", "the image, as in codes", True),
    "label": Column("int32", "as in codes"),
    "source": Column("int32", "as in codes", True),
    "source_name": Column("string", "name of that class"),
    "target": Column("int32", "wanted class", True),
    "target_name": Column("string", "name of that class"),
    "method": Column("string", "search method, a key of METHODS", True),
    "status": Column("string", "ok, or nonfinite when the search met a NaN or an infinity", True),
    "converged": Column("bool", "whether the target probability exceeded min_target_prob"),
    "steps": Column("int32", "updates over all rungs; 0 if the start satisfies the target"),
    "confirmed": Column("bool", "whether the written image passes every check; null if none was asked for"),
    "rungs": Column("int32", "further searches after the first"),
    "target_prob_initial": Column("float", "probability of the target at the start, by the method's classifier"),
    "target_prob_final": Column("float", "the same at the end"),
    "predictive_initial": Column("float", "predictive uncertainty at the start, by the method's classifier, in nats"),
    "aleatoric_initial": Column("float", "aleatoric uncertainty at the start"),
    "epistemic_initial": Column("float", "epistemic uncertainty at the start; null for a single classifier"),
    "predictive_final": Column("float", "predictive uncertainty at the end"),
    "aleatoric_final": Column("float", "aleatoric uncertainty at the end"),
    "epistemic_final": Column("float", "epistemic uncertainty at the end; null for a single classifier"),
    "distance_z_l1": Column("float", "sum of |z_cf - z|"),
    "distance_z_l2": Column("float", "Euclidean norm of z_cf - z"),
    "distance_x_l1": Column("float", "sum over pixels of |x_cf - decode(z)|, pixels in [0, 1]"),
    "reencoded_class": Column("int32", "class by the latent ensemble for the written image, encoded again"),
    "reencoded_target_prob": Column("float", "probability of the target there"),
    "judge_class": Column("int32", "class by the held-out judge for the written image, if there is a judge"),
    "judge_target_prob": Column("float", "its probability of the target"),
    "prediction_target_prob_initial": Column("float", "the predictor's target probability, image"),
    "prediction_target_prob_reconstruction": Column("float", "the same, its reconstruction"),
    "prediction_target_prob_final": Column("float", "the same, written counterfactual"),
    "kept_probs_initial": Column("float[A]", "with --keep: probabilities of the A attributes, image's code"),
    "kept_probs_final": Column("float[A]", "the same, code of the written image"),
    "z_cf": Column("float[D]", "code of the counterfactual, or of its image for methods in pixel space"),
    "x_cf": Column("binary", "counterfactual image as PNG; null with --images none"),
}

#: ``traces``: one row for each (image, target, step) of the traced images.
TRACES: dict[str, Column] = {
    "image_id": Column("string", "the image, as in codes", True),
    "source": Column("int32", "as in codes", True),
    "target": Column("int32", "wanted class", True),
    "step": Column("int32", "updates applied so far, from 0", True),
    "target_prob": Column("float", "probability of the target, by the method's classifier"),
    "predictive": Column("float", "predictive uncertainty, in nats"),
    "aleatoric": Column("float", "aleatoric uncertainty"),
    "epistemic": Column("float", "epistemic uncertainty; null for a single classifier"),
    "z": Column("float[D]", "code of the point, or of its image for methods in pixel space"),
}


def codes_schema(num_classes: int, latent_dim: int, extra: Iterable[pa.Field] = ()) -> pa.Schema:
    """Schema of ``codes/*.parquet``, sorted by image_id; ``extra`` are further columns of the data's listing.

    Error rows carry null in every column but image_id, label, label_name, status, error and the extra ones.
    """
    schema = arrow_schema(CODES, K=num_classes, D=latent_dim)
    for field in extra:
        if field.name in CODES:
            raise ValueError(f"extra column {field.name!r} of the listing: the name is taken; rename it in the data")
        known = PREDICTIONS.get(field.name)
        schema = schema.append(field.with_metadata({"doc": known.doc}) if known else field)
    return schema


def predictions_schema(num_classes: int) -> pa.Schema:
    """Schema of the further columns of ``codes`` with a predictor."""
    return arrow_schema(PREDICTIONS, K=num_classes)


def counterfactuals_schema(latent_dim: int, num_kept: int = 0) -> pa.Schema:
    """Schema of ``counterfactuals/*.parquet``, sorted by (target, image_id); ``kept`` attributes add columns."""
    columns = {name: column for name, column in COUNTERFACTUALS.items() if num_kept or column.type != "float[A]"}
    return arrow_schema(columns, D=latent_dim, A=num_kept)


def traces_schema(latent_dim: int) -> pa.Schema:
    """Schema of ``traces/*.parquet``; rows of a file are sorted by (target, image_id, step)."""
    return arrow_schema(TRACES, D=latent_dim)


def shard_schema(image_shape: tuple[int, int, int], extra: Iterable[pa.Field] = ()) -> pa.Schema:
    """Schema of the images of one shard, in the listing's order; ``extra`` columns are carried into ``codes``.

    ``image`` holds the preprocessed pixels (C, H, W), uint8, null where ``error`` says why it could not be read.
    """
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("label_name", pa.string()),
            pa.field("image", pa.list_(pa.uint8(), math.prod(image_shape))),
            pa.field("error", pa.string()),
            *extra,
        ]
    )


def extra_columns(shard: pa.Table) -> pa.Table:
    """The columns of a shard's images that are carried into ``codes`` as they are."""
    own = ("image_id", "label_name", "image", "error", PREDICTOR_IMAGE)
    return shard.select([name for name in shard.column_names if name not in own])


def arrow_schema(columns: Mapping[str, Column], **sizes: int) -> pa.Schema:
    """The Arrow schema of some columns, each field with its doc; ``sizes`` are the lengths of lists, by letter."""
    fields = []
    for name, column in columns.items():
        kind, _, letter = column.type.rstrip("]").partition("[")
        arrow_type = pa.type_for_alias(kind)
        if letter:
            arrow_type = pa.list_(arrow_type, sizes[letter])
        fields.append(pa.field(name, arrow_type, nullable=not column.required, metadata={"doc": column.doc}))
    return pa.schema(fields)


def type_of(text: str) -> pa.DataType:
    """The Arrow type of which ``str`` gives this text: a plain one, or a list of fixed length."""
    if match := re.fullmatch(r"fixed_size_list<\w+: (\w+)>\[(\d+)\]", text):
        return pa.list_(pa.type_for_alias(match[1]), int(match[2]))
    return pa.type_for_alias(text)


def fixed_size_list(values: np.ndarray, valid: np.ndarray | None = None) -> pa.FixedSizeListArray:
    """A (B, N) array as a column fixed_size_list[N], null where ``valid`` (B,) is False; no copy of the values."""
    array = np.ascontiguousarray(values)
    mask = None if valid is None or valid.all() else pa.array(~valid)
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1], mask=mask)


def matrix(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column of lists of one length without nulls as a (B, N) array; read-only where it can be a view."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if array.null_count:
        raise ValueError(f"expected a column without nulls, found {array.null_count}; filter by status first")
    # flatten() honours the offset of a slice, .values does not.
    # DuckDB gives lists of any length for those of a fixed one.
    size = array.type.list_size if pa.types.is_fixed_size_list(array.type) else -1
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), size)
