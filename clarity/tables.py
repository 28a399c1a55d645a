"""Intermediate results of the explainer's stages, and the tables that are built from them."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from clarity import data, schema
from clarity.attributes import AttributeHeads, attribute_rows
from clarity.methods import METHODS, Pairs
from clarity.model import Model
from clarity.search import Counterfactuals
from clarity.uncertainty import Uncertainty


@dataclass(frozen=True)
class Encoded:
    """B images and what one ensemble predicts for them."""

    model: Model  # with that ensemble
    image_id: pa.Array  # columns of the shard; ``extra`` further ones for ``codes``
    label: pa.Array
    label_name: pa.Array
    extra: pa.Table
    pixels: np.ndarray  # (B, C, H, W) uint8; ``x`` and ``reconstruction``, by the VAE's own decoder, in [0, 1]
    x: Tensor
    z: Tensor  # the posterior of the codes, (B, D)
    log_var: Tensor
    noise: Tensor  # (B, D), standard normal, of the image id alone
    reconstruction: Tensor
    probs: np.ndarray  # (B, K), of the ensemble at ``z``, and its uncertainty there
    uncertainty: Uncertainty[np.ndarray]
    source: np.ndarray  # (B,) int32, the class predicted for each image by the explained model
    #: (B, K), of the predictor for the original images and for the reconstructions in 8 bits; None where there is none
    predictor_probs: np.ndarray | None = None
    reconstruction_probs: np.ndarray | None = None


@dataclass(frozen=True)
class Asked:
    """P pairs to search: ``image`` (P,) indexes the encoded images, ``target`` (P,) are the wanted classes."""

    image: np.ndarray
    target: np.ndarray
    pairs: Pairs

    def select(self, rows: np.ndarray) -> "Asked":
        """The pairs with these indices."""
        return Asked(self.image[rows], self.target[rows], self.pairs.select(rows))


@dataclass(frozen=True)
class Written:
    """P counterfactual images as they are written, and what they are predicted to be."""

    pixels: np.ndarray  # (P, C, H, W) uint8
    #: (P,), between counterfactual and reconstruction, both by the VAE's own decoder, unrounded
    distance_x_l1: np.ndarray
    z: Tensor  # (P, D), the codes of ``pixels``
    probs: np.ndarray  # (P, K), mean probabilities of the latent ensemble at those codes
    judge_probs: np.ndarray | None = None  # (P, K), of the held-out judge for ``pixels``; None where the model has none
    predictor_probs: np.ndarray | None = None  # (P, K), of the predictor for ``pixels``; None where there is none


@dataclass(frozen=True)
class Results:
    """P counterfactuals: how the search ended, the written images, and how the checks on those ended."""

    found: Counterfactuals  # of the search, over all rungs
    written: Written  # the images of its points
    confirmed: np.ndarray | None  # (P,) bool, whether the image passes every check; None where no check was asked for
    rungs: np.ndarray  # (P,) int32, further searches after the first

    def updated(self, rows: np.ndarray, found: Counterfactuals, written: Written) -> "Results":
        """These results with other ones, which confirm the pair, in these rows."""
        assert self.confirmed is not None
        confirmed = self.confirmed.copy()
        confirmed[rows] = True
        # What is known of the start stays.
        found = replace(found, target_prob_initial=self.found.target_prob_initial[rows])
        parts = {"found": merge(self.found, rows, found), "written": merge(self.written, rows, written)}
        return replace(self, confirmed=confirmed, **parts)


def columns_of(results: Any) -> dict[str, Any]:
    """The fields of a dataclass that hold a row for each pair."""
    return {name: values for name, values in vars(results).items() if isinstance(values, Tensor | np.ndarray)}


def merge(results: Any, rows: np.ndarray, others: Any) -> Any:
    """A dataclass of columns with those of another one in these rows."""
    columns = {name: copy.deepcopy(values) for name, values in columns_of(results).items()}
    for name, values in columns.items():
        values[rows] = getattr(others, name)
    return replace(results, **columns)


def select(results: Any, rows: np.ndarray) -> Any:
    """The rows with these indices, or where this is true, of a dataclass of columns."""
    return replace(results, **{name: values[rows] for name, values in columns_of(results).items()})


def code_rows(encoded: Encoded, images: str) -> pa.Table:
    """Rows of ``codes`` for images that could be read; ``images`` is png, or none to leave the images out."""
    count = len(encoded.source)
    columns = {
        "image_id": encoded.image_id,
        "label": encoded.label,
        "label_name": encoded.label_name,
        "source": encoded.source,
        "source_name": class_names(encoded.model, encoded.source),
        "probs": schema.fixed_size_list(encoded.probs),
        **encoded.uncertainty._asdict(),
        "z": schema.fixed_size_list(to_numpy(encoded.z)),
        "reconstruction_l1": l1(encoded.reconstruction, encoded.x),
        "status": ["ok"] * count,
        "error": [None] * count,
        "x": raw_column(encoded.pixels, images),
    }
    expected = schema.codes_schema(encoded.model.num_classes, encoded.model.latent_dim, encoded.extra.schema)
    return to_table(expected, columns | column_dict(encoded.extra))


def error_rows(model: Model, shard: pa.Table, predicted: bool) -> pa.Table:
    """Rows of ``codes`` for images that could not be used, with the columns of a predictor where one was asked."""
    extra = schema.extra_columns(shard)
    fields = [*extra.schema, *(schema.predictions_schema(model.num_classes) if predicted else ())]
    expected = schema.codes_schema(model.num_classes, model.latent_dim, fields)
    columns = dict.fromkeys(expected.names, [None] * len(shard)) | column_dict(extra)
    columns |= {name: shard[name] for name in ("image_id", "label_name", "error")}
    columns["label"] = data.label_indices(shard["label_name"], model.class_names)
    columns["status"] = ["error"] * len(shard)
    return to_table(expected, columns)


def pair_rows(
    method: str,
    encoded: Encoded,
    asked: Asked,
    results: Results,
    initial: Uncertainty[np.ndarray],
    final: Uncertainty[np.ndarray],
    images: str,
    kept: AttributeHeads | None = None,
) -> pa.Table:
    """Rows of ``counterfactuals``; ``initial`` and ``final`` are uncertainties of the method's classifier."""
    found, written, target = results.found, results.written, asked.target.astype(np.int32)
    pair, nulls = np.arange(len(target)), [None] * len(target)
    single = METHODS[method].single
    z_cf = found.point if METHODS[method].space == "latent" else written.z
    columns = {
        "image_id": encoded.image_id.take(pa.array(asked.image)),
        "label": encoded.label.take(pa.array(asked.image)),
        "source": encoded.source[asked.image],
        "source_name": class_names(encoded.model, encoded.source[asked.image]),
        "target": target,
        "target_name": class_names(encoded.model, target),
        "method": [method] * len(pair),
        "status": np.where(to_numpy(found.finite), "ok", "nonfinite"),
        "converged": to_numpy(found.converged),
        "steps": to_numpy(found.steps),
        "confirmed": nulls if results.confirmed is None else results.confirmed,
        "rungs": results.rungs,
        "target_prob_initial": to_numpy(found.target_prob_initial),
        "target_prob_final": to_numpy(found.target_prob_final),
        "predictive_initial": initial.predictive[asked.image],
        "aleatoric_initial": initial.aleatoric[asked.image],
        "epistemic_initial": nulls if single else initial.epistemic[asked.image],
        "predictive_final": final.predictive,
        "aleatoric_final": final.aleatoric,
        "epistemic_final": nulls if single else final.epistemic,
        "distance_z_l1": l1(z_cf, asked.pairs.z),
        "distance_z_l2": l2(z_cf, asked.pairs.z),
        "distance_x_l1": written.distance_x_l1,
        "reencoded_class": written.probs.argmax(1).astype(np.int32),
        "reencoded_target_prob": written.probs[pair, target],
        "judge_class": nulls if written.judge_probs is None else written.judge_probs.argmax(1).astype(np.int32),
        "judge_target_prob": target_probs(written.judge_probs, pair, target),
        "prediction_target_prob_initial": target_probs(encoded.predictor_probs, asked.image, target),
        "prediction_target_prob_reconstruction": target_probs(encoded.reconstruction_probs, asked.image, target),
        "prediction_target_prob_final": target_probs(written.predictor_probs, pair, target),
        "z_cf": schema.fixed_size_list(to_numpy(z_cf)),
        "x_cf": raw_column(written.pixels, images),
    }
    if kept is not None:
        columns["kept_probs_initial"] = schema.fixed_size_list(attribute_rows(kept, encoded.z)[asked.image])
        columns["kept_probs_final"] = schema.fixed_size_list(attribute_rows(kept, written.z))
    num_kept = 0 if kept is None else len(kept.names)
    return to_table(schema.counterfactuals_schema(encoded.model.latent_dim, num_kept), columns)


def prediction_columns(model: Model, probs: np.ndarray) -> pa.Table:
    """Columns of ``schema.PREDICTIONS`` from the predictor's probabilities (B, K)."""
    prediction = probs.argmax(1).astype(np.int32)
    names = class_names(model, prediction)
    columns = [prediction, names, schema.fixed_size_list(probs)]
    return pa.table(columns, schema=schema.predictions_schema(model.num_classes))


def target_probs(probs: np.ndarray | None, rows: np.ndarray, target: np.ndarray) -> Any:
    """The probability of each pair's target; null where there is no model to ask."""
    return [None] * len(target) if probs is None else probs[rows, target]


def class_names(model: Model, classes: np.ndarray) -> pa.Array:
    """Names of class indices."""
    return pa.array(model.class_names, pa.string()).take(pa.array(classes))


def raw_column(pixels: np.ndarray, images: str) -> pa.Array:
    """Raw pixels as a binary column, until ``encode_png_column``; nulls where ``images`` is none."""
    if images == "none":
        return pa.nulls(len(pixels), pa.binary())
    flat = schema.fixed_size_list(pixels.reshape(len(pixels), -1))
    size = flat.type.list_size
    return pa.Array.from_buffers(pa.binary(size), len(flat), [None, flat.values.buffers()[1]]).cast(pa.binary())


def to_table(expected: pa.Schema, columns: Mapping[str, Any]) -> pa.Table:
    """A table of a schema filled by column name; NaN becomes null."""
    arrays = []
    for field in expected:
        values = columns[field.name]
        if not isinstance(values, pa.Array | pa.ChunkedArray):
            values = pa.array(values, field.type, from_pandas=True)
        arrays.append(values)
    return pa.table(arrays, schema=expected)


def column_dict(table: pa.Table) -> dict[str, Any]:
    """The columns of a table by name."""
    return dict(zip(table.column_names, table.columns))


def sort(tables: Sequence[pa.Table], *keys: str) -> pa.Table:
    """One table of all rows, sorted by some columns."""
    return pa.concat_tables(tables).sort_by([(key, "ascending") for key in keys])


def quantise(x: Tensor) -> np.ndarray:
    """Images in [0, 1] as uint8."""
    return to_numpy((x * 255).round().clamp(0, 255).to(torch.uint8))


def to_float(pixels: np.ndarray, device: str | torch.device) -> Tensor:
    """Pixels (B, C, H, W) uint8 as float32 in [0, 1]."""
    return torch.tensor(pixels, device=device).float() / 255


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor as an array on the CPU."""
    return tensor.detach().cpu().numpy()


def l1(a: Tensor, b: Tensor) -> np.ndarray:
    """L1 distance of each row of a to its row of b."""
    if a.device.type != "cpu":  # summed there, so that the images need not come here
        return to_numpy((a - b).abs().flatten(1).sum(1))
    return np.abs(to_numpy(a) - to_numpy(b)).reshape(len(a), -1).sum(1)


def l2(a: Tensor, b: Tensor) -> np.ndarray:
    """Euclidean distance of each row of a to its row of b."""
    return np.sqrt(np.square(to_numpy(a) - to_numpy(b)).reshape(len(a), -1).sum(1))
