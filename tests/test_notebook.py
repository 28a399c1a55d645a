"""The notebook's functions: counterfactuals of a few images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from predictors import as_predictor

import clarity
from clarity.images import Preprocessing
from clarity.model import Model
from clarity.search import SearchConfig

CONFIG = SearchConfig(min_target_prob=0.32, max_steps=12, learning_rate=0.3)
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 12), np.uint8)


def test_explain_takes_arrays_pictures_and_paths(model: Model, tmp_path: Path) -> None:
    pictures = [Image.fromarray(image[0]) for image in PIXELS]
    paths = []
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
        paths.append(tmp_path / f"{i}.png")
    first = clarity.explain(model, PIXELS, config=CONFIG)
    assert len(first) == 9
    assert first["image_id"].to_pylist()[0] in {"0", "1", "2"}
    for images in (PIXELS[:, 0], PIXELS / np.float32(255), torch.tensor(PIXELS), pictures, list(PIXELS)):
        assert clarity.explain(model, images, config=CONFIG).equals(first)
    by_path = clarity.explain(model, paths, config=CONFIG)
    assert by_path.drop_columns("image_id").equals(first.drop_columns("image_id"))
    assert set(by_path["image_id"].to_pylist()) == {str(path) for path in paths}


def test_explain_takes_targets_by_name_or_index(model: Model) -> None:
    by_name = clarity.explain(model, PIXELS, targets=["dog", "ant"], config=CONFIG)
    assert by_name.equals(clarity.explain(model, PIXELS, targets=[0, 3], config=CONFIG))
    assert set(by_name["target"].to_pylist()) <= {0, 3}
    assert clarity.explain(model, PIXELS, targets="dog", config=CONFIG)["target_name"].unique().to_pylist() == ["dog"]


def test_explain_takes_a_threshold_or_what_real_images_of_each_class_reach(model: Model) -> None:
    stricter = clarity.explain(model, PIXELS, config=replace(CONFIG, min_target_prob=0.4))
    assert clarity.explain(model, PIXELS, config=CONFIG, min_target_prob=0.4).equals(stricter)
    known = replace(model, card={"target_probs": {"p90": [0.9, 0.9, 0.6, 0.9]}})
    by_class = clarity.explain(known, PIXELS, config=CONFIG, min_target_prob="auto")
    # At most the config's, at least 0.5.
    assert by_class.equals(clarity.explain(model, PIXELS, config=CONFIG, min_target_probs=[0.5] * 4))
    with pytest.raises(ValueError, match="card lacks"):
        clarity.explain(replace(model, card={}), PIXELS, min_target_prob="auto")


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (np.full((2, 8, 12), np.nan, np.float32), {}, "image 0: "),
        (np.zeros((2, 9, 12), np.uint8), {}, "image 0: .*8"),
        (["/nowhere.png"], {}, "cannot read /nowhere.png"),
        ("photo.png", {}, "put it in a list"),
        ([], {}, "expected at least one, got none"),
        (np.zeros((2, 8, 12), np.uint8), {"targets": ["cat"]}, "unknown class 'cat'; choose from ant, bee"),
        (np.zeros((2, 8, 12), np.uint8), {"targets": [7]}, "unknown class 7"),
        (np.zeros((2, 8, 12), np.uint8), {"targets": []}, "at least one target"),
        (np.zeros((2, 8, 12), np.uint8), {"image_ids": ["a", "a"]}, "2 distinct names, got 1"),
    ],
)
def test_explain_says_what_is_wrong(model: Model, images: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        clarity.explain(model, images, **options)


def test_explain_names_an_image_without_an_answer_of_the_predictor(model: Model) -> None:
    def call(pixels: np.ndarray) -> np.ndarray:
        return np.where(pixels.any((1, 2, 3))[:, None], 0.25, np.nan) * np.ones((1, 4))

    black = np.zeros((2, *model.image_shape), np.uint8)
    with pytest.raises(ValueError, match="image dark: the predictor answers NaN or an infinity"):
        clarity.explain(model, black, image_ids=["dark", "darker"], predictor=as_predictor(call, model.class_names))


def test_explain_confirms_by_a_function_of_the_users(model: Model, tmp_path: Path) -> None:
    shown: list[np.ndarray] = []

    def call(pixels: np.ndarray) -> np.ndarray:
        shown.append(pixels)
        return np.tile([0.1, 0.7, 0.1, 0.1], (len(pixels), 1))

    predictor = as_predictor(call, model.class_names, mode="RGB", size=(16, 24))
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 60, 3), np.uint8))
    picture.save(tmp_path / "photo.png")
    for image in (tmp_path / "photo.png", (tmp_path / "photo.png").read_bytes(), picture):
        shown.clear()
        pairs = clarity.explain(model, [image], config=CONFIG, predictor=predictor)
        assert set(pairs["source_name"].to_pylist()) == {"bee"} and len(pairs) == 3
        assert pairs["confirmed"].to_pylist() == [False] * 3
        # The file itself is shown to it, in its own mode and size, not what is left of it for the model.
        assert (shown[1][0] == Preprocessing("RGB", 16, 24).apply(picture)).all()
