"""The predictor: the user's own model, which an audit can explain and which then judges each written image.

An ONNX file, of which nothing is executed but its graph, or a Python function of the user's. It is asked for
probabilities only, never for gradients, and sees 8-bit images through its own preprocessing. Does not know our models.
"""

import hashlib
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clarity import storage
from clarity.images import Preprocessing

#: Images of one call, the last one padded with zeros, so that an answer does not depend on how many are asked about.
BLOCK = 64
#: Seconds that one call may take.
TIMEOUT_S = 300.0
#: Difference of the probabilities of an image alone and among others that is worth a warning.
BATCH_TOLERANCE = 1e-4
OUTPUTS = ("logits", "probabilities")
EXAMPLE = '{"classes": ["cat", "dog"], "mode": "RGB", "size": [224, 224], "output": "logits"}'
#: Of a function, which answers probabilities.
EXAMPLE_OF_FUNCTION = 'predict.classes, predict.mode, predict.size = ["cat", "dog"], "RGB", (224, 224)'


@dataclass(frozen=True)
class Predictor:
    """A model of the user's, as a function from images to probabilities."""

    name: str  # for messages
    call: Callable[[np.ndarray], np.ndarray]  # uint8 (B, C, H, W) of its own mode and size -> probabilities (B, K)
    class_names: tuple[str, ...]  # K names, in the order of its output
    preprocessing: Preprocessing  # mode and size of its images
    digest: str  # of the file, or of a function's answers to fixed images
    block: int = BLOCK  # images of one call
    #: output columns, in the order in which ``predict`` returns them; None for its own
    order: tuple[int, ...] | None = None

    def ordered(self, class_names: Sequence[str]) -> "Predictor":
        """The predictor with its output in the order of these names; ValueError where its classes are others."""
        if different := sorted({*class_names} ^ {*self.class_names}):
            raise ValueError(
                f"predictor: expected the classes of the model ({', '.join(class_names)}), got {self.name} with "
                f"{', '.join(self.class_names)}, which differ in {different[0]!r}: train the model with its classes"
            )
        return replace(self, order=tuple(self.class_names.index(name) for name in class_names))

    def sees(self, preprocessing: Preprocessing) -> Preprocessing:
        """The preprocessing of its images: a model's, crop included, where mode and size are the same; else its own."""
        return preprocessing if preprocessing.image_shape == self.preprocessing.image_shape else self.preprocessing

    def predict(self, pixels: np.ndarray, threads: int = 1) -> np.ndarray:
        """Probabilities (B, K) float32 of images (B, C, H, W) uint8 of any size; ValueError for a bad answer.

        A row is NaN where the predictor answers NaN or an infinity, as one that standardises each image may to black.
        """
        pixels = self.prepare(pixels)

        def block(start: int) -> np.ndarray:
            part = pixels[start : start + self.block]
            padded = np.zeros((self.block, *pixels.shape[1:]), np.uint8)
            padded[: len(part)] = part
            return self.check(call_with_timeout(self.call, padded, self.name), len(part))

        starts = range(0, len(pixels), self.block)
        with ThreadPoolExecutor(max(1, min(threads, len(starts)))) as pool:
            probs = np.concatenate([np.zeros((0, len(self.class_names)), np.float32), *pool.map(block, starts)])
        return probs if self.order is None else np.ascontiguousarray(probs[:, list(self.order)])

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """Images in the predictor's own mode and size."""
        if pixels.shape[1:] == self.preprocessing.image_shape:
            return pixels
        resized = [
            self.preprocessing.apply(Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)))
            for image in pixels
        ]
        return np.stack(resized) if resized else np.zeros((0, *self.preprocessing.image_shape), np.uint8)

    def check(self, probs: Any, count: int) -> np.ndarray:
        """The answer to the first images of a block, where it holds probabilities; what it says of padding is free."""
        values, expected = np.asarray(probs), (self.block, len(self.class_names))
        if values.shape != expected or values.dtype.kind != "f":
            raise ValueError(
                f"predictor: expected {self.name} to answer floats of shape {expected}, one column for each of its "
                f"classes, got {values.dtype} of shape {values.shape}"
            )
        values = np.where(np.isfinite(values[:count]).all(1, keepdims=True), values[:count], np.nan)
        sums = values.sum(1)
        bad = np.flatnonzero((values < 0).any(1) | (np.abs(sums - 1) > 0.01))
        if len(bad):
            row = values[bad[0]]
            raise ValueError(
                f"predictor: expected {self.name} to answer probabilities that sum to 1 for each image, got a sum of "
                f"{sums[bad[0]]:.4g} and a least value of {row.min():.4g} for {len(bad)} of {count} images"
                f"{'; of logits take the softmax' if abs(row).max() > 1 else ''}"
            )
        return values.astype(np.float32)


def load_predictor(source: Any, device: str = "cpu") -> Predictor:
    """The predictor of an ONNX file, of ``module:function``, or of a function.

    ``source`` is a path or s3:// URI of a .onnx file with a .onnx.json beside it; ``module:function`` in the working
    directory; a function with the attributes ``classes``, ``mode`` and ``size``; or a Predictor. ``device``, for ONNX,
    is cpu or cuda. ValueError: it cannot be loaded, or does not fit its description.
    """
    if isinstance(source, Predictor):
        return source
    if callable(source):
        return function_predictor(source, getattr(source, "__qualname__", type(source).__name__), {})
    text = str(source)
    if text.endswith(".onnx"):
        return onnx_predictor(text, device)
    module, separator, function = text.rpartition(":")
    if not separator or not all(part.isidentifier() for part in [*module.split("."), function]):
        raise ValueError(
            f"predictor: expected a file ending in .onnx, or module:function, got {text!r}; for a model in another "
            "format, name a function that loads and asks it"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        loaded = importlib.import_module(module)
        call, beside = getattr(loaded, function), f"{loaded.__file__}.json"
    except Exception as error:  # the user's code may raise anything
        raise ValueError(f"predictor: {text} cannot be imported: {type(error).__name__}: {error}") from None
    return function_predictor(call, text, storage.read_json(beside) if Path(beside).exists() else {})


def function_predictor(call: Callable[..., Any], name: str, described: Mapping[str, Any]) -> Predictor:
    """The predictor of a function from uint8 (B, C, H, W) to probabilities (B, K)."""
    attributes = {key: getattr(call, key) for key in ("classes", "mode", "size") if hasattr(call, key)}
    fields = parse_description({**described, **attributes}, name, ("classes", "mode", "size"))
    predictor = Predictor(name, call, fields["classes"], fields["preprocessing"], "")
    # Two functions are taken for the same where they answer the same to fixed images.
    images = np.random.default_rng(0).integers(0, 256, (8, *predictor.preprocessing.image_shape), np.uint8)
    answers = np.round(predictor.predict(images).astype(np.float64), 4)
    if np.isnan(answers).any():
        raise ValueError(f"predictor: expected {name} to answer probabilities, got NaN or an infinity for noise")
    return replace(predictor, digest=hashlib.sha256(answers.tobytes()).hexdigest())


def onnx_predictor(uri: str, device: str) -> Predictor:
    """The predictor of an ONNX file and the JSON beside it."""
    try:
        import onnx
        import onnxruntime
    except ImportError:
        raise ValueError("predictor: ONNX files need onnx and onnxruntime: pip install '.[onnx]'") from None
    name = storage.display(uri)
    if not storage.exists(uri):
        raise ValueError(f"predictor: expected an ONNX file, found no {name}")
    if not storage.exists(f"{uri}.json"):
        raise ValueError(f"predictor: expected {name}.json beside the model, such as {EXAMPLE}")
    described = storage.read_json(f"{uri}.json")
    fields = parse_description(described, f"{name}.json", ("classes", "mode", "size", "output"), ("mean", "std"))
    content = storage.read_bytes(uri)
    try:
        graph = onnx.load_model_from_string(content)
        external = external_files(graph)
        if external and storage.is_remote(uri):
            raise ValueError("it keeps weights in further files, which are read from a local directory only: copy it")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
        providers = [*(p for p in wanted if p in onnxruntime.get_available_providers()), "CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(uri if external else content, options, providers=providers)
        further = [Path(uri).with_name(file).read_bytes() for file in external]
        sums = [hashlib.sha256(part).hexdigest() for part in [content, *further]]
    except Exception as error:  # of protobuf and of the runtime, whose types are not public
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"predictor: {name} cannot be loaded: {reason[:300]}") from None
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shape, count = fields["preprocessing"].image_shape, len(fields["classes"])
    takes = [put for put in inputs if put.type == "tensor(float)" and shape_fits(put.shape, (None, *shape))]
    floats = ("tensor(float)", "tensor(double)", "tensor(float16)")
    chosen = [put.name for put in outputs if put.type in floats and shape_fits(put.shape, (None, count))]
    if not len(inputs) == len(takes) == len(chosen) == 1:
        found = "; ".join(f"{put.name}: {put.type} {put.shape}" for put in [*inputs, *outputs])
        raise ValueError(
            f"predictor: {name}: expected one input tensor(float) [B, {', '.join(map(str, shape))}] and one output of "
            f"floats [B, {count} classes], found {found}"
        )
    batch = inputs[0].shape[0]
    mean, std = (np.array(fields[key], np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))

    def call(pixels: np.ndarray) -> np.ndarray:
        x = (pixels.astype(np.float32) / np.float32(255) - mean) / std
        (values,) = session.run(chosen, {inputs[0].name: x})
        if fields["output"] != "logits":
            return values
        from scipy.special import softmax  # for logits alone: its import takes 0.07 s of each actor's start

        return softmax(values.astype(np.float64), 1).astype(np.float32)

    digest = hashlib.sha256(repr((sums, sorted(described.items()))).encode()).hexdigest()
    block = batch if isinstance(batch, int) else BLOCK
    return Predictor(name, call, fields["classes"], fields["preprocessing"], digest, block)


def shape_fits(shape: Sequence[Any], expected: Sequence[int | None]) -> bool:
    """Whether an ONNX shape, in which names stand for free axes, can be the expected one."""
    return len(shape) == len(expected) and all(
        not isinstance(found, int) or size is None or found == size for found, size in zip(shape, expected)
    )


def external_files(model: Any) -> list[str]:
    """Names of the files beside an ONNX file that hold its weights; ValueError for one that lies elsewhere."""
    entries = (entry for tensor in tensors_of(model.graph) for entry in tensor.external_data)
    names = {entry.value for entry in entries if entry.key == "location"}
    if elsewhere := sorted(name for name in names if os.path.basename(name) != name or name in ("", ".", "..")):
        raise ValueError(f"its weights lie in {elsewhere[0]!r}: expected them in a file beside it")
    return sorted(names)


def tensors_of(graph: Any) -> Iterator[Any]:
    """Every tensor that an ONNX graph and its subgraphs hold."""
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from [attribute.t, *attribute.tensors]
        for part in [attribute.g, *attribute.graphs]:
            if part.node or part.initializer:
                yield from tensors_of(part)


def parse_description(found: Any, name: str, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """The description of a predictor: classes, mode, size, and for ONNX output, mean and std."""

    def require(fit: bool, expected: str, value: Any) -> None:
        if not fit:
            example = EXAMPLE if "output" in needed else EXAMPLE_OF_FUNCTION
            raise ValueError(f"predictor: {name}: expected {expected}, got {value!r}; an example: {example}")

    entries = f"the entries {', '.join(needed)}" if optional else f"the attributes {', '.join(needed)} of the function"
    entries += f" (optional: {', '.join(optional)})" if optional else ""
    require(isinstance(found, Mapping), entries, found)
    require(set(needed) <= found.keys() <= {*needed, *optional}, entries, sorted(found))
    classes, size = found["classes"], found["size"]
    names = isinstance(classes, list | tuple) and all(isinstance(label, str) and label for label in classes)
    require(
        names and len(set(classes)) == len(classes) >= 2, "classes as a list of two or more distinct texts", classes
    )
    pair = isinstance(size, list | tuple) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    require(pair, "size as [height, width] in pixels", size)
    require(found["mode"] in ("L", "RGB"), "mode L (grey) or RGB", found["mode"])
    preprocessing = Preprocessing(found["mode"], *size)
    fields: dict[str, Any] = {"classes": tuple(classes), "preprocessing": preprocessing}
    if "output" in needed:
        require(found["output"] in OUTPUTS, f"output as one of {', '.join(OUTPUTS)}", found["output"])
        fields["output"] = found["output"]
    channels = preprocessing.image_shape[0]
    for key, default in (("mean", 0.0), ("std", 1.0)):
        values = found.get(key, [default] * channels)
        numbers = isinstance(values, list | tuple) and all(isinstance(value, int | float) for value in values)
        require(numbers and len(values) == channels, f"{key} as a list of one number a channel ({channels})", values)
        # Those of pixels in [0, 255] would make all images alike.
        require(all(abs(value) <= 1 for value in values), f"{key} of at most 1, as pixels are in [0, 1]", values)
        require(key == "mean" or min(values) > 0, "std of more than 0", values)
        fields[key] = values
    return fields


def call_with_timeout(call: Callable[[np.ndarray], Any], pixels: np.ndarray, name: str) -> Any:
    """The answer of a call that is given up after ``TIMEOUT_S``, its thread left behind."""
    answer: list[Any] = []

    def run() -> None:
        try:
            answer.append((call(pixels), None))
        except BaseException as error:  # the user's code may raise anything
            answer.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    if not answer:
        raise ValueError(f"predictor: {name} gave no answer to {len(pixels)} images for {TIMEOUT_S:.0f} s")
    result, error = answer[0]
    if error is not None:
        raise ValueError(f"predictor: {name} failed: {type(error).__name__}: {error}") from error
    return result


def batch_difference(predictor: Predictor, pixels: np.ndarray) -> float:
    """Largest difference between the probabilities of the first image alone and among the others."""
    together, alone = predictor.predict(pixels[: predictor.block]), predictor.predict(pixels[:1])
    return float(np.abs(together[:1] - alone).max())
