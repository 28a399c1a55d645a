"""The tables of Clarity: every Arrow schema, with one doc line for each column.

Knows names, types and meanings of columns. Does not know how a value is computed or where a file lies.

Shapes: C, H, W image; D latent; K classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 1

#: What each column of ``codes`` says. One row for each image.
CODES_DOC = {
    "image_id": "stable name of the image: its index in the split, its relative path, or its id column",
    "label": "class given by the data set, an index into class_names; null when absent or unknown to the model",
    "label_name": "class given by the data set, as written there",
    "source": "class that the latent ensemble sees (argmax of probs)",
    "source_name": "name of that class",
    "probs": "mean class probabilities of the latent ensemble, K values",
    "predictive": "entropy of probs, in nats",
    "aleatoric": "mean entropy over the members, in nats",
    "epistemic": "predictive minus aleatoric, in nats",
    "z": "latent code, the posterior mean, D values",
    "reconstruction_l1": "sum over pixels of |decode(z) - x|, pixels in [0, 1]",
    "status": "ok, or error when the image could not be read",
    "error": "why the image could not be read; null when status is ok",
    "x": "the preprocessed image as PNG; null with --images none",
}

#: What the columns of ``codes`` say that --predictions adds; all null for an image without a prediction.
PREDICTIONS_DOC = {
    "prediction": "class that one's own model predicts, an index into class_names",
    "prediction_name": "name of that class",
    "prediction_probs": "its probabilities, K values; only where the file gives them",
}

#: What each column of ``counterfactuals`` says. One row for each (image, target), the target never being the source.
COUNTERFACTUALS_DOC = {
    "image_id": "the image, as in codes",
    "label": "class given by the data set; null when absent or unknown to the model",
    "source": "class that the latent ensemble sees in the image",
    "source_name": "name of that class",
    "target": "wanted class",
    "target_name": "name of that class",
    "method": "method that searched, a key of METHODS",
    "status": "ok, or nonfinite when the search met a NaN or an infinity",
    "converged": "whether the target probability exceeded min_target_prob",
    "steps": "updates applied; 0 when the start already satisfies the target",
    "target_prob_initial": "mean probability of the target at the start, by the method's own classifier",
    "target_prob_final": "the same at the end",
    "predictive_initial": "predictive uncertainty at the start, by the method's own classifier, in nats",
    "aleatoric_initial": "aleatoric uncertainty at the start, in nats",
    "epistemic_initial": "epistemic uncertainty at the start, in nats; null for a single classifier",
    "predictive_final": "predictive uncertainty at the end, in nats",
    "aleatoric_final": "aleatoric uncertainty at the end, in nats",
    "epistemic_final": "epistemic uncertainty at the end, in nats; null for a single classifier",
    "distance_z_l1": "sum of |z_cf - z|",
    "distance_z_l2": "Euclidean norm of z_cf - z",
    "distance_x_l1": "sum over pixels of |x_cf - decode(z)|, pixels in [0, 1]",
    "reencoded_class": "class that the latent ensemble sees after decode, quantise to 8 bits, encode",
    "reencoded_target_prob": "probability of the target there",
    "z_cf": "code of the counterfactual, D values; pixel methods: the code of their image",
    "x_cf": "the counterfactual image as PNG; null with --images none",
}

#: What each column of ``traces`` says. One row for each (image, target, step) of the traced images.
TRACES_DOC = {
    "image_id": "the image, as in codes",
    "source": "class that the latent ensemble sees in the image",
    "target": "wanted class",
    "step": "updates applied so far, from 0",
    "target_prob": "mean probability of the target, by the method's own classifier",
    "predictive": "predictive uncertainty, by the method's own classifier, in nats",
    "aleatoric": "aleatoric uncertainty, in nats",
    "epistemic": "epistemic uncertainty, in nats; null for a single classifier",
    "z": "code of the point, D values; pixel methods: the code of the image",
}


def shard_schema(image_shape: tuple[int, int, int], attributes: tuple[str, ...] = ()) -> pa.Schema:
    """Table that a source reads for one shard: one row for each image, in the listing's order.

    ``image`` holds the preprocessed pixels (C, H, W), uint8, null where ``error`` says why it could not be read.

    Args:
        image_shape: (C, H, W).
        attributes: extra nullable int8 columns carried into ``codes``.
    """
    channels, height, width = image_shape
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("label_name", pa.string()),
            pa.field("image", pa.list_(pa.uint8(), channels * height * width)),
            pa.field("error", pa.string()),
            *(pa.field(name, pa.int8()) for name in attributes),
        ],
        metadata={"clarity.image_shape": f"{channels},{height},{width}"},
    )


def codes_schema(num_classes: int, latent_dim: int, extra: Iterable[pa.Field] = ()) -> pa.Schema:
    """Schema of ``codes/*.parquet``, sorted by image_id.

    Error rows carry null in every column but image_id, label, label_name, status, error and the extra ones.

    Args:
        num_classes: K.
        latent_dim: D.
        extra: further columns that came with the data's listing (attributes, another classifier's predictions).
    """
    types = {
        "image_id": pa.string(),
        "label": pa.int32(),
        "label_name": pa.string(),
        "source": pa.int32(),
        "source_name": pa.string(),
        "probs": pa.list_(pa.float32(), num_classes),
        "predictive": pa.float32(),
        "aleatoric": pa.float32(),
        "epistemic": pa.float32(),
        "z": pa.list_(pa.float32(), latent_dim),
        "reconstruction_l1": pa.float32(),
        "status": pa.string(),
        "error": pa.string(),
        "x": pa.binary(),
    }
    schema = _described(types, CODES_DOC, required=("image_id", "status"))
    for field in extra:
        if field.name in types:
            raise ValueError(f"extra column {field.name!r} of the listing: the name is taken; rename it in the data")
        doc = PREDICTIONS_DOC.get(field.name)
        schema = schema.append(field.with_metadata({"doc": doc}) if doc else field)
    return schema


def type_of(text: str) -> pa.DataType:
    """The type of which ``str`` gives this text: a plain one, or a list of fixed length."""
    if match := re.fullmatch(r"fixed_size_list<\w+: (\w+)>\[(\d+)\]", text):
        return pa.list_(pa.type_for_alias(match[1]), int(match[2]))
    return pa.type_for_alias(text)


def counterfactuals_schema(latent_dim: int) -> pa.Schema:
    """Schema of ``counterfactuals/*.parquet``; rows of a file are sorted by (target, image_id)."""
    types = {
        "image_id": pa.string(),
        "label": pa.int32(),
        "source": pa.int32(),
        "source_name": pa.string(),
        "target": pa.int32(),
        "target_name": pa.string(),
        "method": pa.string(),
        "status": pa.string(),
        "converged": pa.bool_(),
        "steps": pa.int32(),
        "target_prob_initial": pa.float32(),
        "target_prob_final": pa.float32(),
        "predictive_initial": pa.float32(),
        "aleatoric_initial": pa.float32(),
        "epistemic_initial": pa.float32(),
        "predictive_final": pa.float32(),
        "aleatoric_final": pa.float32(),
        "epistemic_final": pa.float32(),
        "distance_z_l1": pa.float32(),
        "distance_z_l2": pa.float32(),
        "distance_x_l1": pa.float32(),
        "reencoded_class": pa.int32(),
        "reencoded_target_prob": pa.float32(),
        "z_cf": pa.list_(pa.float32(), latent_dim),
        "x_cf": pa.binary(),
    }
    return _described(types, COUNTERFACTUALS_DOC, required=("image_id", "source", "target", "method", "status"))


def traces_schema(latent_dim: int) -> pa.Schema:
    """Schema of ``traces/*.parquet``; rows of a file are sorted by (target, image_id, step)."""
    types = {
        "image_id": pa.string(),
        "source": pa.int32(),
        "target": pa.int32(),
        "step": pa.int32(),
        "target_prob": pa.float32(),
        "predictive": pa.float32(),
        "aleatoric": pa.float32(),
        "epistemic": pa.float32(),
        "z": pa.list_(pa.float32(), latent_dim),
    }
    return _described(types, TRACES_DOC, required=("image_id", "source", "target", "step"))


def fixed_size_list(values: np.ndarray, valid: np.ndarray | None = None) -> pa.FixedSizeListArray:
    """A (B, N) array as a column fixed_size_list[N], null where ``valid`` (B,) is False; no copy of the values."""
    array = np.ascontiguousarray(values)
    mask = None if valid is None or valid.all() else pa.array(~valid)
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1], mask=mask)


def matrix(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column fixed_size_list[N] without nulls as a (B, N) array; read-only where it can be a view."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if array.null_count:
        raise ValueError(f"expected a column without nulls, found {array.null_count}; filter by status first")
    # flatten() honours the offset of a slice, .values does not.
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)


def _described(types: dict[str, pa.DataType], docs: dict[str, str], required: tuple[str, ...]) -> pa.Schema:
    return pa.schema(
        [
            pa.field(name, kind, nullable=name not in required, metadata={"doc": docs[name]})
            for name, kind in types.items()
        ]
    )
