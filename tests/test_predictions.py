"""Predictions of the user's own model: by name, index or probability, and what is rejected."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_store import ObjectStore

from clarity import data, storage
from clarity.predictions import add_predictions, read_predictions

LISTING = pa.table({"image_id": ["a", "b", "c", "d"], "label_name": ["ant", "bee", None, "ant"]})
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
        pa.array([np.float16(2), None, np.float16(0)], pa.float16()),
        pa.array(["cow", None, "ant"]).dictionary_encode(),
        pa.array(["cow", None, "ant"], pa.large_string()),
        pa.array(["cow", None, "ant"], pa.string_view()),
    ],
)
def test_predictions_come_by_name_or_index(classes: Any, tmp_path: Path) -> None:
    ids = pa.array(["c", "b", "a"])
    if isinstance(classes, pa.Array) and not pa.types.is_floating(classes.type):  # ids too may be text of any type
        ids = ids.dictionary_encode() if pa.types.is_dictionary(classes.type) else ids.cast(classes.type)
    found = predicted(tmp_path, image_id=ids, **{"class": classes})
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
        ({"image_id": ["a"], "score": [0.5]}, "class or probabilities, found image_id, score: rename"),
        ({"image_id": [0.5], "class": ["ant"]}, "image_id as text or integers"),
        ({"image_id": ["a", None], "class": ["ant", "ant"]}, "found null in 1"),
        ({"image_id": ["a", "b", "a"], "class": ["ant"] * 3}, r"1 duplicates \('a'\)"),
        ({"image_id": ["x"], "class": ["ant"]}, "none of its 1 ids is an image of the data, such as x; .* like a"),
        ({"image_id": ["a"], "class": pa.nulls(1, pa.string())}, "none of the 4 images asked for has one"),
        (
            {"image_id": ["a", "b"], "class": ["ant", "cat"]},
            r"found cat for image b \(1 in all\); choose from ant, bee",
        ),
        ({"image_id": ["a"], "class": [3]}, "found 3 for image a"),
        ({"image_id": ["a"], "class": [-1]}, "found -1 for image a"),
        ({"image_id": ["a"], "class": [0.5]}, "found 0.5"),
        ({"image_id": ["a"], "class": [float("nan")]}, "found nan"),
        ({"image_id": ["a"], "class": [True]}, "names or indices, found bool"),
        ({"image_id": ["a"], "probabilities": [0.5]}, "lists of numbers, found double"),
        ({"image_id": ["a"], "probabilities": [[0.5, 0.5]]}, "expected 3 probabilities an image, found 2 for image a"),
        (
            {"image_id": ["a"], "probabilities": [[0.5, 0.5, float("nan")]]},
            "that are not negative and sum to 1, found .*nan",
        ),
        ({"image_id": ["a"], "probabilities": [[0.5, 0.5, None]]}, "found .*nan"),
        ({"image_id": ["a"], "probabilities": [[3.0, -1.0, -1.0]]}, "found .3.0, -1.0, -1.0. for image a"),
        ({"image_id": ["a"], "probabilities": [[3.0, 2.0, 1.0]]}, "found .3.0, 2.0, 1.0. for image a"),
    ],
)
def test_predictions_that_are_invalid_are_rejected(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        predicted(tmp_path, **columns)


def test_predictions_in_a_file_that_contradicts_itself_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("image_id,class,class\na,ant,bee\n")
    with pytest.raises(ValueError, match=r"p\.csv: expected one column class, found 2: rename the others"):
        read_predictions(str(tmp_path / "p.csv"), LISTING)
    table = pa.table({"image_id": ["a"], "class": [0]}).replace_schema_metadata({"classes": "3"})
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="expected a list of classes in the metadata, found 3"):
        read_predictions(str(tmp_path / "p.parquet"), LISTING)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.csv", "image_id,class\na,cow\nb,\nc,ant\n", ["cow", None, "ant", None]),
        ("p.CSV", "class;image_id\n2;a\n0;c\n", ["cow", None, "ant", None]),
        ("p.tsv", "image_id\tclass\tnote\na\tcow\tx\nc\tant\ty\n", ["cow", None, "ant", None]),
    ],
)
def test_predictions_may_be_csv(name: str, text: str, expected: list[str | None], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    found = add_predictions(LISTING, read_predictions(str(tmp_path / name), LISTING), NAMES)
    assert found["prediction_name"].to_pylist() == expected


def test_predictions_keep_ids_of_csv_as_they_are_written(tmp_path: Path) -> None:
    listing = LISTING.set_column(0, "image_id", pa.array(["0001", "0002", "3", "x"]))
    (tmp_path / "p.csv").write_text("image_id,class\n0001,ant\n0002,bee\n")
    found = add_predictions(listing, read_predictions(str(tmp_path / "p.csv"), listing), NAMES)
    assert found["prediction"].to_pylist() == [0, 1, None, None]


ELEVEN = tuple(str(number) for number in range(11))
#: In the order of torchvision's ImageFolder.
AS_TEXT = sorted(ELEVEN)


@pytest.mark.parametrize("way", ["metadata", "ClassLabel", "beside"])
def test_predictions_by_index_follow_the_order_that_is_told(way: str, tmp_path: Path) -> None:
    table = pa.table({"image_id": ["a", "b"], "class": [2, None], "probabilities": [None, [0.0] * 10 + [1.0]]})
    if way == "metadata":
        table = table.replace_schema_metadata({"classes": json.dumps(AS_TEXT)})
    elif way == "ClassLabel":
        features = {"class": {"_type": "ClassLabel", "names": AS_TEXT}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    else:
        (tmp_path / "p.classes.txt").write_text("\n".join(AS_TEXT) + "\n")
    pq.write_table(table, tmp_path / "p.parquet")
    found = add_predictions(LISTING, read_predictions(str(tmp_path / "p.parquet"), LISTING), ELEVEN)
    assert found["prediction_name"].to_pylist() == ["10", "9", None, None]
    assert found["prediction"].to_pylist() == [10, 9, None, None]
    assert found["prediction_probs"][1].as_py() == [0.0] * 9 + [1.0, 0.0]


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (ELEVEN, {"class": [2]}),
        (ELEVEN, {"probabilities": [[1.0] + [0.0] * 10]}),
        (("1", "2", "3"), {"class": [1]}),  # the index of 2, or the name 1
    ],
)
def test_predictions_whose_order_is_ambiguous_are_refused(
    names: tuple[str, ...], columns: dict[str, Any], tmp_path: Path
) -> None:
    pq.write_table(pa.table({"image_id": ["a"], **columns}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"expected the order of the classes .*: write names, or list .*classes\.txt"):
        add_predictions(LISTING, read_predictions(str(tmp_path / "p.parquet"), LISTING), names)
    named = pa.table({"image_id": ["a"], "class": ["2"]})
    pq.write_table(named, tmp_path / "p.parquet")
    found = add_predictions(LISTING, read_predictions(str(tmp_path / "p.parquet"), LISTING), names)
    assert found["prediction_name"].to_pylist() == ["2", None, None, None]


def test_predictions_of_ten_digits_need_no_order(tmp_path: Path) -> None:
    names = tuple("0123456789")
    pq.write_table(pa.table({"image_id": ["a"], "class": [7]}), tmp_path / "p.parquet")
    found = add_predictions(LISTING, read_predictions(str(tmp_path / "p.parquet"), LISTING), names)
    assert found["prediction_name"].to_pylist() == ["7", None, None, None]


@pytest.mark.parametrize(
    ("classes", "said"), [(["ant", "bee", "cat"], "found ant, bee, cat: correct"), (["ant"], "found ant: correct")]
)
def test_predictions_with_another_set_of_classes_are_refused(classes: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "predictions.classes.txt").write_text("\n".join(classes))
    with pytest.raises(ValueError, match=said):
        predicted(tmp_path, image_id=["a"], probabilities=[[1.0, 0.0, 0.0]])


def test_predictions_may_lie_on_an_object_store(tmp_path: Path) -> None:
    file = tmp_path / "predictions.parquet"
    pq.write_table(pa.table({"image_id": ["a", "b"], "class": ["cow", "ant"]}), file)
    with ObjectStore() as store:
        storage.write_bytes(store.uri("told/p.parquet"), file.read_bytes())
        assert read_predictions(store.uri("told/p.parquet"), LISTING).equals(read_predictions(str(file), LISTING))
