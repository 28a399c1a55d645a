"""Heads of attributes: fitted to columns of a data set, added to a finished model, refused where they make no sense."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bars import SHORT_VAE, arguments, bars, files_of

import clarity
from clarity.data import open_dataset
from clarity.images import encode_png
from clarity.model import load_model
from clarity.training.attributes import choose_attributes
from clarity.training.directory import begin
from clarity.training.plan import plan_training

FIELDS = arguments(num_members=2, vae_training=dataclasses.replace(SHORT_VAE, epochs=30), judge_updates=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 bars, with columns of which ``low`` is seen in the image, ``noise`` is not, and ``age`` has many values."""
    images, labels = bars(240)
    low = [None if i < 5 else bool(k == 2) for i, k in enumerate(labels.tolist())]
    columns = {
        "image": pa.array(encode_png(images.numpy()), pa.binary()),
        "label": [f"bar{k}" for k in labels.tolist()],
        "split": ["test" if i % 4 == 0 else "train" for i in range(240)],
        "low": pa.array(low, pa.bool_()),
        "noise": np.random.default_rng(0).integers(0, 2, 240),
        "age": [i % 60 for i in range(240)],
    }
    file = tmp_path_factory.mktemp("bars") / "bars.parquet"
    pq.write_table(pa.table(columns), file)
    return file


def test_heads_are_added_to_a_finished_model_and_say_how_good_they_are(data: Path, tmp_path: Path) -> None:
    before = clarity.train("parquet", tmp_path / "model", data=data, **FIELDS)
    files = files_of(tmp_path / "model")
    clarity.train("parquet", tmp_path / "model", data=data, attributes=("all",), **FIELDS)
    model = load_model(tmp_path / "model")
    assert model.heads is not None and model.heads.names == ("low", "noise")
    assert model.fingerprint == before.fingerprint
    assert {name: content for name, content in files_of(tmp_path / "model").items() if name in files} == files
    found = model.card["metrics"]["attributes"]
    assert found["low"]["balanced_accuracy"] > 0.9 and 0.3 < found["noise"]["balanced_accuracy"] < 0.7
    assert found["low"]["share"] == pytest.approx(1 / 3, abs=0.02)
    # The second direction tells the attribute, too, and is fitted to what the first one leaves.
    first, second = (layer.weight[0] for layer in (model.heads.linear, *model.heads.further))
    assert torch.cosine_similarity(first, second, dim=0).abs() < 0.01
    assert second.norm() > 0.1
    # Nothing is trained again, and nothing is lost, where the same is asked for once more.
    content = files_of(tmp_path / "model")
    again = clarity.train("parquet", tmp_path / "model", data=data, attributes=("noise",), **FIELDS)
    assert again.heads is not None and files_of(tmp_path / "model") == content


def test_finished_model_keeps_what_it_has_when_more_is_asked_for(data: Path, tmp_path: Path) -> None:
    fields = FIELDS | {"vae_training": SHORT_VAE}
    extras: list[dict[str, Any]] = [{"attributes": ("low",)}, {"image_members": 2}, {}]
    for more in [{"num_folds": 2}, *extras]:
        model = clarity.train("parquet", tmp_path / "model", data=data, **fields | more)
    assert model.heads is not None and model.heads.names == ("low",) and len(model.folds) == 2
    assert model.card["metrics"]["out_of_fold"]["accuracy"] > 0
    assert model.image_ensemble is not None and model.image_ensemble.config.num_members == 2
    before = files_of(tmp_path / "model")
    clarity.train("parquet", tmp_path / "model", data=data, **fields)
    assert files_of(tmp_path / "model") == before


def test_attributes_that_a_cut_training_learned_are_not_left_out_of_it(data: Path, tmp_path: Path) -> None:
    """Its guide has an output for each."""
    fields: dict[str, Any] = FIELDS | {"vae_fields": FIELDS["vae_fields"] | {"label_weight": 1.0}}
    dataset = open_dataset("parquet", data, "train")
    begin(plan_training(str(tmp_path), dataset, None, attributes=("low",), **fields))
    with pytest.raises(ValueError, match=r'training of another model: attributes: \["low"\] there, null here'):
        begin(plan_training(str(tmp_path), dataset, None, **fields))


def test_attributes_of_data_that_have_none_are_to_be_left_out() -> None:
    said = "attributes: expected columns of integers or booleans, which these data lack, got 'blue': leave them out"
    with pytest.raises(ValueError, match=said):
        choose_attributes(open_dataset("digits"), None, ["blue"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["age"], "attributes: expected a column of two values, found 45 in 'age'"),
        (["blue"], "attributes: expected some of low, noise, age, got 'blue': choose from these"),
    ],
)
def test_attributes_that_are_none_are_refused_before_anything_starts(
    data: Path, names: list[str], message: str
) -> None:
    dataset = open_dataset("parquet", data, "train")
    with pytest.raises(ValueError, match=message):
        choose_attributes(dataset, None, names)
    assert choose_attributes(dataset, None, ["low"]) == ("low",)
