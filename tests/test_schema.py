"""The tables' schemas, and the way between arrays and list columns."""

import numpy as np
import pyarrow as pa
import pytest

from clarity import schema
from clarity.images import decode_png, encode_png


def test_schemas_document_every_column() -> None:
    codes, pairs = schema.codes_schema(4, 5), schema.counterfactuals_schema(5, num_kept=2)
    assert (codes.names, pairs.names) == (list(schema.CODES), list(schema.COUNTERFACTUALS))
    assert all(field.metadata[b"doc"] for field in [*codes, *pairs])
    assert codes.field("probs").type == pa.list_(pa.float32(), 4)
    assert codes.field("z").type == pairs.field("z_cf").type == pa.list_(pa.float32(), 5)
    assert not pairs.field("target").nullable


def test_codes_schema_takes_extra_columns_but_no_taken_name() -> None:
    assert schema.codes_schema(4, 5, [pa.field("smiling", pa.int8())]).names[-1] == "smiling"
    with pytest.raises(ValueError, match="taken"):
        schema.codes_schema(4, 5, [pa.field("source", pa.int8())])


def test_fixed_size_list_and_matrix_are_inverse() -> None:
    values = np.arange(15, dtype=np.float32).reshape(3, 5)
    column = pa.chunked_array([schema.fixed_size_list(values[:2]), schema.fixed_size_list(values[2:])])
    assert (schema.matrix(column) == values).all()
    assert (schema.matrix(schema.fixed_size_list(values)[1:]) == values[1:]).all()
    assert schema.matrix(column[:0]).shape == (0, 5)


def test_fixed_size_list_nulls_rows_that_are_not_valid() -> None:
    column = schema.fixed_size_list(np.ones((3, 2), np.float32), np.array([True, False, True]))
    assert column.to_pylist() == [[1, 1], None, [1, 1]]
    with pytest.raises(ValueError, match="1; filter by status"):
        schema.matrix(column)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_hold_the_images_and_are_the_same_in_any_batch(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, channels, 8, 12), dtype=np.uint8)
    files = encode_png(images)
    assert (decode_png(files, (channels, 8, 12)) == images).all()
    assert encode_png(images[1:2]) == files[1:2] and encode_png(images[:0]) == []
    with pytest.raises(OSError, match=r"truncated|broken"):
        decode_png([files[0][:60]], (channels, 8, 12))


def test_png_refuses_other_channels() -> None:
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        encode_png(np.zeros((1, 2, 8, 12), np.uint8))
