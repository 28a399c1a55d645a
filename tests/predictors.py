"""Functions and an ONNX file that stand for a user's own model."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

H, W, K = 4, 6, 3
CLASSES = ["ant", "bee", "cow"]
DESCRIPTION = {"classes": CLASSES, "mode": "L", "size": [H, W], "mean": [0.5], "std": [0.25], "output": "logits"}
WEIGHT = np.random.default_rng(5).normal(size=(H * W, K)).astype(np.float32)


def as_predictor(
    call: Callable[[np.ndarray], Any], classes: Sequence[str], mode: str = "L", size: tuple[int, int] = (8, 12)
) -> Callable[[np.ndarray], Any]:
    """A function with the attributes that describe a predictor."""

    def function(pixels: np.ndarray) -> Any:
        return call(pixels)

    for name, value in {"classes": classes, "mode": mode, "size": size}.items():
        setattr(function, name, value)
    return function


def constant(classes: Sequence[str], favourite: int, **options: Any) -> Callable[[np.ndarray], Any]:
    """A predictor that gives one class 0.7, whatever it is shown."""
    probs = np.full(len(classes), 0.3 / (len(classes) - 1))
    probs[favourite] = 0.7
    return as_predictor(lambda pixels: np.tile(probs, (len(pixels), 1)), classes, **options)


def write_onnx(
    directory: Path, shape: tuple[Any, ...] = ("batch", 1, H, W), external: str | None = None, **changes: Any
) -> str:
    """A linear classifier of images as model.onnx, and model.onnx.json."""
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(WEIGHT, "weight")
    if external:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", external), ("offset", "0"), ("length", str(WEIGHT.nbytes))):
            entry = weight.external_data.add()
            entry.key, entry.value = key, value
    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "weight"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (shape[0], K))],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (directory / "model.onnx").write_bytes(model.SerializeToString())
    (directory / "model.onnx.json").write_text(json.dumps({**DESCRIPTION, **changes}))
    return str(directory / "model.onnx")
