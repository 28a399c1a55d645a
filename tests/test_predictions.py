"""Predictions of the user's own model: by name, index or probability, and what is rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_store import ObjectStore

from clarity import data, storage
from clarity.predictions import add_predictions, read_predictions

LISTING = pa.table(
    {
        "image_id": ["a", "b", "c", "d"],
        "location": [""] * 4,
        "row": [0, 1, 2, 3],
        "size": [0] * 4,
        "label_name": ["ant", "bee", None, "ant"],
    }
)


NAMES = ("ant", "bee", "cow")


def predicted(path: Path, **columns: Any) -> pa.Table:
    """LISTING with what a file of these columns says."""
    pq.write_table(pa.table(columns), path / "predictions.parquet")
    return add_predictions(LISTING, read_predictions(str(path / "predictions.parquet"), LISTING), NAMES)


@pytest.mark.parametrize(
    "classes",
    [
        ["cow", None, "ant"],
        [2, None, 0],
        pa.array([2.0, None, 0.0], pa.float64()),
        pa.array(["cow", None, "ant"]).dictionary_encode(),
        pa.array(["cow", None, "ant"], pa.large_string()),
    ],
)
def test_predictions_come_by_name_or_index(classes: Any, tmp_path: Path) -> None:
    found = predicted(tmp_path, image_id=["c", "b", "a"], **{"class": classes})
    assert found["prediction"].to_pylist() == [0, None, 2, None]
    assert found["prediction_name"].to_pylist() == ["ant", None, "cow", None]
    assert found.column_names == [*LISTING.column_names, "prediction", "prediction_name"]
    assert data.left_out(found) == {}


def test_predictions_come_as_probabilities(tmp_path: Path) -> None:
    rows = {"image_id": ["d", "stranger", "b"], "probabilities": [[0.1, 0.2, 0.7], [1.0, 0.0, 0.0], None]}
    found = predicted(tmp_path, **rows)
    assert found["prediction_name"].to_pylist() == [None, None, None, "cow"]
    assert found["prediction_probs"].type == pa.list_(pa.float32(), 3)
    assert found["prediction_probs"][0].as_py() is None
    assert found["prediction_probs"][3].as_py() == pytest.approx([0.1, 0.2, 0.7])
    assert data.left_out(found) == {"predictions for images that are not in the data": 1}
    # A class of its own counts more than the largest probability: a model may have a threshold.
    both = predicted(tmp_path, **rows, **{"class": ["ant", None, "bee"]})
    assert both["prediction_name"].to_pylist() == [None, "bee", None, "ant"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a"], "class": ["ant"]}, "expected columns image_id and class or probabilities, found id, class"),
        ({"image_id": ["a"]}, "found image_id: rename"),
        ({"image_id": [0.5], "class": ["ant"]}, "image_id as text or integers"),
        ({"image_id": ["a", None], "class": ["ant", "ant"]}, "found null in 1"),
        ({"image_id": ["a", "b", "a"], "class": ["ant"] * 3}, "1 duplicates, the first a"),
        ({"image_id": ["x"], "class": ["ant"]}, "none of its 1 ids is an image of the data, such as x; .* like a"),
        ({"image_id": ["a"], "class": pa.nulls(1, pa.string())}, "none of the 4 images asked for has one"),
        ({"image_id": ["a", "b"], "class": ["ant", "cat"]}, "found cat for image b and 0 others; choose from ant, bee"),
        ({"image_id": ["a"], "class": [3]}, "found 3 for image a"),
        ({"image_id": ["a"], "class": [-1]}, "found -1 for image a"),
        ({"image_id": ["a"], "class": [0.5]}, "found 0.5"),
        ({"image_id": ["a"], "class": [float("nan")]}, "found nan"),
        ({"image_id": ["a"], "class": [True]}, "names or indices, found bool"),
        ({"image_id": ["a"], "probabilities": [0.5]}, "lists of numbers, found double"),
        ({"image_id": ["a"], "probabilities": [[0.5, 0.5]]}, "expected 3 probabilities an image, found 2 for image a"),
        ({"image_id": ["a"], "probabilities": [[0.5, 0.5, float("nan")]]}, "that are numbers, found .*nan"),
        ({"image_id": ["a"], "probabilities": [[0.5, 0.5, None]]}, "that are numbers"),
        ({"image_id": ["a"], "probabilities": [[3.0, -1.0, -1.0]]}, "not negative and sum to 1, found a sum of 1"),
        ({"image_id": ["a"], "probabilities": [[3.0, 2.0, 1.0]]}, "found a sum of 6 for image a"),
    ],
)
def test_predictions_that_are_invalid_are_rejected(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        predicted(tmp_path, **columns)


def test_predictions_may_lie_on_an_object_store(tmp_path: Path) -> None:
    file = tmp_path / "predictions.parquet"
    pq.write_table(pa.table({"image_id": ["a", "b"], "class": ["cow", "ant"]}), file)
    with ObjectStore() as store:
        storage.write_bytes(store.uri("told/p.parquet"), file.read_bytes())
        assert read_predictions(store.uri("told/p.parquet"), LISTING).equals(read_predictions(str(file), LISTING))
