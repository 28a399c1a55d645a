"""For notebooks and scripts: counterfactuals of a few images, and the images of an audit's codes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from clarity import schema, storage
from clarity.audit.plan import read_plan
from clarity.audit.read import Audit
from clarity.explainer import Explainer, explainer_of
from clarity.images import Preprocessing, UnreadableImage, decode_png
from clarity.methods import METHODS
from clarity.model import Model, load_model
from clarity.planning import class_indices, class_thresholds
from clarity.rows import decode_rows
from clarity.search import SearchConfig
from clarity.tables import quantise


def explain(
    model: Model | str | Path,
    images: Any,
    targets: Any = "all",
    *,
    method: str = "clarity",
    config: SearchConfig | None = None,
    min_target_prob: float | str | None = None,
    image_ids: Sequence[str] | None = None,
    **options: Any,
) -> pa.Table:
    """Counterfactuals of a few images: the table of ``schema.counterfactuals_schema``, images as PNG.

    Args:
        model: a Model, or the URI of one.
        images: (B, C, H, W) or (B, H, W) pixels, uint8 or floats in [0, 1], of the model's size; or a sequence of such
            arrays, PIL images, or paths or bytes of image files.
        targets: all, or class names or indices; an image's own predicted class is left out.
        method: a key of METHODS.
        config: of the search.
        min_target_prob: instead of the config's; auto for what real images of each class reach, at most the config's.
        image_ids: names for the rows; by default the paths of the files, else 0, 1, 2 ...
        **options: of the Explainer, such as ``keep=["Male"]``, or ``predictor``, a function of your own that is then
            explained.

    Raises:
        ValueError: an image that cannot be used, by name; an unknown target or method.
    """
    model = load_model(model) if isinstance(model, str | Path) else model
    if isinstance(images, str | Path | bytes) or not hasattr(images, "__len__"):
        raise ValueError(
            f"images: expected an array or a sequence of images, got {type(images).__name__}; put it in a list"
        )
    if not len(images):
        raise ValueError("images: expected at least one, got none")
    if image_ids is None:
        image_ids = [str(image) if isinstance(image, str | Path) else str(i) for i, image in enumerate(images)]
    if len(image_ids) != len(images) or len(set(image_ids)) != len(image_ids):
        raise ValueError(f"image_ids: expected {len(images)} distinct names, got {len(set(image_ids))}")
    config = config or SearchConfig()
    if min_target_prob == "auto":
        options["min_target_probs"] = class_thresholds(model, config.min_target_prob)
    elif min_target_prob is not None:
        config = replace(config, min_target_prob=float(min_target_prob))
    explainer = Explainer(model, method, config, targets=class_indices(targets, model.class_names), **options)
    pixels = prepare(images, image_ids, model.preprocessing)
    shard = as_shard(image_ids, pixels)
    if explainer.predictor is not None and explainer.predictor.sees(model.preprocessing) != model.preprocessing:
        originals = explainer.predictor.prepare(pixels)
        for row, image in enumerate(images):
            if not isinstance(image, np.ndarray | Tensor):  # which hold nothing but the model's pixels
                originals[row] = prepare([image], [image_ids[row]], explainer.predictor.preprocessing)[0]
        column = schema.fixed_size_list(originals.reshape(len(images), -1))
        shard = shard.append_column(schema.PREDICTOR_IMAGE, column)
    explained = explainer.explain_shard(shard)
    for unused in explained.codes.filter(pc.field("status") == "error").to_pylist():
        raise ValueError(f"image {unused['image_id']}: {unused['error']}")
    return explained.counterfactuals


def as_shard(image_ids: Sequence[str], pixels: np.ndarray) -> pa.Table:
    """Images (B, C, H, W) uint8 without labels as the explainer takes them, see ``schema.shard_schema``."""
    count, shape = len(pixels), pixels.shape[1:]
    columns = [image_ids, [None] * count, schema.fixed_size_list(pixels.reshape(count, -1)), [None] * count]
    return pa.table(columns, schema=schema.shard_schema(shape))


def prepare(images: Any, image_ids: Sequence[str], preprocessing: Preprocessing) -> np.ndarray:
    """Pixels (B, C, H, W) uint8 of images."""
    pixels = np.zeros((len(images), *preprocessing.image_shape), np.uint8)
    for row, image in enumerate(images):
        content = storage.read_bytes(image) if isinstance(image, str | Path) else image
        if isinstance(content, Tensor):
            content = content.detach().cpu().numpy()
        try:
            pixels[row] = preprocessing.apply(content)
        except UnreadableImage as error:
            raise ValueError(f"image {image_ids[row]}: {error}") from None
    return pixels


def decode(
    source: Audit | str | Path, rows: pa.Table, *, column: str = "z_cf", decoder: str = "written", device: str = "cpu"
) -> np.ndarray:
    """Images (B, C, H, W) uint8 of codes in an audit's tables, decoded by the model that the audit keeps.

    Gives the images of an audit without any, and those in the tables again to within one grey level. ``rows`` are rows
    of counterfactuals, or of codes with ``column`` = z. ``decoder`` is written, that of the audit's pictures, or plain,
    the VAE's own, where the model has a sharp one, too.
    """
    if decoder not in ("written", "plain"):
        raise ValueError(f"unknown decoder {decoder!r}; choose from written, plain")
    uri = source.uri if isinstance(source, Audit) else str(source)
    model = load_model(storage.join(uri, "model"), device)
    codes = torch.tensor(schema.matrix(rows[column]), device=device)
    return quantise(decode_rows(model.vae if decoder == "plain" else model.decoder, codes))


def trace(audit: Audit, image_id: str, target: int) -> pa.Table:
    """The search of one pair, one row for each step: as the audit recorded it, else searched again."""
    mine = pc.field("image_id") == image_id
    if audit.traces is not None:
        recorded = audit.traces.to_table(filter=mine & (pc.field("target") == target))
        if len(recorded):
            return recorded.sort_by("step")
    png = audit.codes.to_table(columns=["x"], filter=mine)["x"]
    if png.null_count:
        raise ValueError("audit: it stores neither this search nor the image to repeat it from; explain with traces")
    plan = audit.plan
    # The path of the first search: checks come after it.
    first = {key: value for key, value in plan.checks.items() if key in ("min_target_probs", "keep")}
    searched = replace(plan, checks=first)
    model = load_model(storage.join(audit.uri, "model"))
    explainer = explainer_of(searched, model, targets=[target], only="all", engine="plain")
    traces = explainer.explain_shard(as_shard([image_id], decode_png(png, plan.image_shape)), trace=1).traces
    assert traces is not None
    return traces.sort_by("step")


def redecoder(uri: str | Path) -> Callable[[np.ndarray], np.ndarray] | None:
    """The audit's own decoder for ``verify``: codes (B, D) to uint8 images; None where codes are not latent."""
    if METHODS[read_plan(str(uri)).method].space != "latent":
        return None
    model = load_model(storage.join(str(uri), "model"))
    return lambda codes: quantise(decode_rows(model.decoder, torch.tensor(codes)))
