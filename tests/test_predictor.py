"""The user's own model: an ONNX file or a function, its description, its answers, and what is rejected."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from predictors import CLASSES, WEIGHT, H, K, W, as_predictor, write_onnx

from clarity import predictor
from clarity.predictor import batch_difference, load_predictor


def images(count: int, shape: tuple[int, int, int] = (1, H, W)) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *shape), np.uint8)


def expected(pixels: np.ndarray) -> np.ndarray:
    logits = ((pixels.reshape(len(pixels), -1) / 255 - 0.5) / 0.25) @ WEIGHT.astype(np.float64)
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def mine(call: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], Any]:
    return as_predictor(call, CLASSES, size=(H, W))


def test_onnx_answers_probabilities_of_preprocessed_pixels(tmp_path: Path) -> None:
    loaded = load_predictor(write_onnx(tmp_path))
    assert loaded.class_names == ("ant", "bee", "cow")
    pixels = images(70)
    assert np.allclose(loaded.predict(pixels), expected(pixels), atol=1e-5)
    assert loaded.predict(pixels[:0]).shape == (0, K)


def test_onnx_answers_do_not_depend_on_the_batch_or_the_threads(tmp_path: Path) -> None:
    loaded = load_predictor(write_onnx(tmp_path))
    pixels = images(150)
    whole = loaded.predict(pixels, threads=3)
    assert (np.concatenate([loaded.predict(pixels[row : row + 1]) for row in range(150)]) == whole).all()
    assert batch_difference(loaded, pixels) == 0
    assert (load_predictor(write_onnx(tmp_path, shape=(1, 1, H, W))).predict(pixels[:3]) == whole[:3]).all()


def test_onnx_takes_probabilities_as_they_are(tmp_path: Path) -> None:
    loaded = load_predictor(write_onnx(tmp_path, output="probabilities"))
    with pytest.raises(
        ValueError, match=r"got a sum of .* and a least value of -.* for 2 of 2 images; of logits take the softmax"
    ):
        loaded.predict(images(2))


def test_predictor_resizes_and_converts_to_its_own_mode_and_size(tmp_path: Path) -> None:
    loaded = load_predictor(write_onnx(tmp_path))
    colour = images(3, (3, 8, 12))
    prepared = loaded.prepare(colour)
    assert prepared.shape == (3, 1, H, W)
    assert (loaded.predict(colour) == loaded.predict(prepared)).all()


def test_ordered_predictor_answers_in_the_order_of_names(tmp_path: Path) -> None:
    loaded, pixels = load_predictor(write_onnx(tmp_path)), images(5)
    turned = loaded.ordered(["cow", "ant", "bee"])
    assert (turned.predict(pixels) == loaded.predict(pixels)[:, [2, 0, 1]]).all()
    with pytest.raises(ValueError, match=r"with ant, bee, cow, which differ in 'dog'"):
        loaded.ordered(["ant", "bee", "cow", "dog"])
    with pytest.raises(ValueError, match=r"classes of the model \(ant, bee\), got .* differ in 'cow'"):
        loaded.ordered(["ant", "bee"])


def test_digest_changes_with_the_file_and_its_description(tmp_path: Path) -> None:
    digests = {load_predictor(write_onnx(tmp_path)).digest for _ in range(2)}
    assert len(digests) == 1
    digests.add(load_predictor(write_onnx(tmp_path, mean=[0.4])).digest)
    digests.add(load_predictor(write_onnx(tmp_path, shape=(2, 1, H, W))).digest)
    assert len(digests) == 3


def test_onnx_weights_may_lie_in_a_file_beside(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(WEIGHT.tobytes())
    loaded = load_predictor(write_onnx(tmp_path, external="weights.bin"))
    assert np.allclose(loaded.predict(images(2)), expected(images(2)), atol=1e-5)
    (tmp_path / "weights.bin").write_bytes((WEIGHT + 1).tobytes())
    assert load_predictor(str(tmp_path / "model.onnx")).digest != loaded.digest


@pytest.mark.parametrize("external", ["../weights.bin", "/etc/passwd", "sub/weights.bin"])
def test_onnx_weights_elsewhere_are_rejected(tmp_path: Path, external: str) -> None:
    with pytest.raises(ValueError, match=r"its weights lie in .*: expected them in a file beside it"):
        load_predictor(write_onnx(tmp_path, external=external))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": CLASSES[:2]}, r"and one output of floats \[B, 2 classes\], found x: .*; y: tensor\(float\)"),
        ({"classes": ["ant", "ant", "cow"]}, "classes as a list of two or more distinct texts"),
        ({"classes": [0, 1, 2]}, r"classes as a list of two or more distinct texts, got \[0, 1, 2\]"),
        ({"classes": 3}, "distinct texts, got 3"),
        ({"mode": "CMYK"}, r"mode L \(grey\) or RGB, got 'CMYK'"),
        ({"mode": "RGB", "mean": [0] * 3, "std": [1] * 3}, r"expected one input tensor\(float\) \[B, 3, 4, 6\]"),
        ({"size": [4]}, r"size as \[height, width\] in pixels, got \[4\]"),
        ({"mean": [0.5, 0.5]}, r"mean as a list of one number a channel \(1\), got"),
        ({"mean": [123.7]}, r"mean of at most 1, as pixels are in \[0, 1\], got \[123.7\]"),
        ({"std": [255]}, "std of at most 1"),
        ({"mean": [float("nan")]}, "mean of at most 1"),
        ({"std": [0]}, "std of more than 0"),
        ({"output": "scores"}, "output as one of logits, probabilities, got 'scores'"),
        ({"labels": []}, r"output \(optional: mean, std\), got \['classes', 'labels', "),
    ],
)
def test_onnx_description_that_does_not_fit_is_rejected(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_predictor(write_onnx(tmp_path, **changes))


def test_function_is_imported_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import numpy as np\ndef answer(x):\n    return np.eye(3)[x.reshape(len(x), -1).argmax(1) % 3]\n"
    (tmp_path / "their_model.py").write_text(code)
    (tmp_path / "their_model.py.json").write_text(json.dumps({"classes": CLASSES, "mode": "L", "size": [H, W]}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    loaded = load_predictor("their_model:answer")
    pixels = images(4)
    assert (loaded.predict(pixels).argmax(1) == pixels.reshape(4, -1).argmax(1) % 3).all()
    with pytest.raises(ValueError, match="their_model:missing cannot be imported: AttributeError"):
        load_predictor("their_model:missing")


def test_function_without_its_attributes_is_shown_an_example_that_fits() -> None:
    def predict(pixels: np.ndarray) -> np.ndarray:
        return np.full((len(pixels), 2), 0.5)

    with pytest.raises(ValueError, match=r"attributes classes, mode, size of the function, got \[\]; an") as refused:
        load_predictor(predict)
    exec(str(refused.value).partition("an example: ")[2])
    assert load_predictor(predict).class_names == ("cat", "dog")


def test_functions_that_answer_alike_have_the_same_digest() -> None:
    flat = mine(lambda x: np.full((len(x), K), 1 / K))
    assert load_predictor(flat).digest == load_predictor(mine(lambda x: np.full((len(x), K), 1 / K))).digest
    assert load_predictor(flat).digest != load_predictor(mine(lambda x: np.eye(K)[[0] * len(x)])).digest


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: 1 / 0, "failed: ZeroDivisionError: division by zero"),
        (lambda x: np.full((len(x), K), np.nan), "got NaN or an infinity for noise$"),
        (lambda x: np.full((len(x), 2), 0.5), r"floats of shape \(64, 3\), .* got float64 of shape \(64, 2\)"),
        (lambda x: np.ones((len(x), K), int), "got int64"),
        (
            lambda x: np.full((len(x), K), 2.0),
            "got a sum of 6 and a least value of 2 for 8 of 8 images; of logits take the softmax",
        ),
        (lambda x: np.full((len(x), K), 0.5), "got a sum of 1.5 and a least value of 0.5 for 8 of 8 images$"),
        (lambda x: np.full((len(x), K), np.inf), "got NaN or an infinity for noise$"),
        (lambda x: None, "got object of shape"),
    ],
)
def test_answers_that_are_invalid_are_rejected(call: Callable[[np.ndarray], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_predictor(mine(call))


def test_an_image_without_an_answer_is_nan_alone_and_padding_needs_none() -> None:
    def standardised(pixels: np.ndarray) -> np.ndarray:
        flat = pixels.reshape(len(pixels), -1).astype(float)
        with np.errstate(invalid="ignore"):
            scores = np.exp(((flat - flat.mean(1, keepdims=True)) / flat.std(1, keepdims=True))[:, :K])
        return scores / scores.sum(1, keepdims=True)

    loaded, pixels = load_predictor(mine(standardised)), images(5)  # black images are NaN
    assert np.allclose(loaded.predict(pixels), standardised(pixels))
    before = loaded.predict(pixels)
    pixels[3] = 0
    after = loaded.predict(pixels)
    assert np.isnan(after[3]).all() and (np.delete(after, 3, 0) == np.delete(before, 3, 0)).all()


def test_answer_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "TIMEOUT_S", 0.1)
    with pytest.raises(ValueError, match="gave no answer to 64 images for 0 s"):
        load_predictor(mine(lambda x: time.sleep(5)))


def test_batch_difference_finds_answers_that_depend_on_the_others() -> None:
    def relative(pixels: np.ndarray) -> np.ndarray:
        scores = pixels.reshape(len(pixels), -1)[:, :K] / max(1, pixels.mean()) + 1
        return scores / scores.sum(1, keepdims=True)

    assert batch_difference(load_predictor(mine(relative)), images(9)) > predictor.BATCH_TOLERANCE


@pytest.mark.parametrize("source", ["model.pt", "module", "a-b:c", "a:b c"])
def test_source_of_another_kind_is_rejected(source: str) -> None:
    with pytest.raises(ValueError, match=r"expected a file ending in .onnx, or module:function, got"):
        load_predictor(source)
    with pytest.raises(ValueError, match="builtins:len cannot be imported: AttributeError"):
        load_predictor("builtins:len")
