"""From a shard of images to the rows of an audit: encode, predict, search every wanted target, decode, judge.

Here the rooms meet: models, methods and tables. Does not know how shards come and go, nor Ray.

Shapes: B images, P pairs (image, target), C, H, W image, D latent, K classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

import clarity
from clarity import data, schema, storage
from clarity import worker as shards
from clarity.audit.commits import to_parquet
from clarity.audit.plan import Plan, read_plan, shard_table
from clarity.audit.read import Audit
from clarity.data.listing import note_left_out
from clarity.ids import fold_of, noise
from clarity.images import UnreadableImage
from clarity.methods import METHODS, Pairs, classifier_logits
from clarity.model import Model, load_model
from clarity.rows import Prediction, decode_rows, encode_rows, logits_rows, mean_probs, one_thread, predict
from clarity.search import Counterfactuals, SearchConfig
from clarity.uncertainty import decompose
from clarity.worker import Clock, Work, attempted, pack, pack_row, unpack, unpack_row

#: Pairs whose pictures exist as floats at one time; bounds the memory, changes no row.
CHUNK = 2048


@dataclass
class Explained:
    """The tables of a shard, and ``stats``: engine, device, threads, seconds by stage."""

    codes: pa.Table
    counterfactuals: pa.Table
    stats: dict[str, Any]
    traces: pa.Table | None = None


@dataclass
class _Part:
    """Images that one ensemble explains, and what is known of them so far: B images, P pairs.

    ``of`` (P,) is the image of each pair, ``target`` (P,) its target.
    """

    model: Model
    ids: list[str]
    label: pa.Array
    pixels: np.ndarray = field(init=False)
    x: Tensor = field(init=False)
    z: Tensor = field(init=False)
    log_var: Tensor = field(init=False)
    noise: Tensor = field(init=False)
    reconstruction: Tensor = field(init=False)
    seen: Prediction = field(init=False)
    source: np.ndarray = field(init=False)
    of: np.ndarray = field(init=False)
    target: np.ndarray = field(init=False)
    pairs: Pairs = field(init=False)
    found: Counterfactuals = field(init=False)
    initial: Prediction = field(init=False)
    final: Prediction = field(init=False)
    z_cf: Tensor = field(init=False)
    off: np.ndarray = field(init=False)
    shown: np.ndarray = field(init=False)
    again: np.ndarray = field(init=False)


class Explainer:
    """Explains shards of images with one method and one model.

    A row's bits depend on its image, its target, the model and the configuration alone.

    Args:
        model: a Model, or the place of one.
        method: a key of METHODS.
        config: of the search.
        targets: class indices to ask for; None for all. The class that the model sees is never asked for.
        images: png, or none to keep codes only.
        only: all, or misclassified: the images for which the model sees another class than the data.
        by_fold: judge and search each image with the classifiers of the fold that did not see it, for images that the
            model was trained on.
        device: auto, cpu or cuda.
        threads: of this process; None leaves them as they are.
        engine: of the search; a key of ENGINES, or auto.
    """

    def __init__(
        self,
        model: Model | str | Path,
        method: str = "clarity",
        config: SearchConfig | None = None,
        *,
        targets: Sequence[int] | None = None,
        images: str = "png",
        only: str = "all",
        by_fold: bool = False,
        device: str = "auto",
        threads: int | None = None,
        engine: str = "auto",
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
        if images not in ("png", "none"):
            raise ValueError(f"unknown images {images!r}; choose from png, none")
        if only not in ("all", "misclassified"):
            raise ValueError(f"unknown only {only!r}; choose from all, misclassified")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if threads is not None:
            torch.set_num_threads(threads)
        self.model = load_model(model, device) if isinstance(model, str | Path) else model.to(device)
        self.method, self.config, self.images, self.only, self.engine = (
            method,
            config or SearchConfig(),
            images,
            only,
            engine,
        )
        self.device, self.threads = device, threads or torch.get_num_threads()
        self.targets = tuple(range(self.model.num_classes)) if targets is None else tuple(sorted(set(targets)))
        if bad := [target for target in self.targets if not 0 <= target < self.model.num_classes]:
            raise ValueError(f"targets {bad}: expected class indices below {self.model.num_classes}")
        _require_classifier(self.model, method)
        self.folds = self.model.folds if by_fold else ()

    def explain_shard(self, shard: pa.Table, extra: pa.Table | None = None, trace: int = 0) -> Explained:
        """Explain a shard (``schema.shard_schema``): its codes sorted by image_id, its pairs by (target, image_id).

        Args:
            shard: images, or the reasons why they could not be read.
            extra: further columns for ``codes``, a row for each of the shard.
            trace: how many of its first images are traced too.
        """
        explained = self.search_shard(shard, extra, trace)
        shape = self.model.image_shape
        codes, pairs = shards.drawn(explained.codes, "x", shape), shards.drawn(explained.counterfactuals, "x_cf", shape)
        return replace(explained, codes=codes, counterfactuals=pairs)

    def search_shard(self, shard: pa.Table, extra: pa.Table | None = None, trace: int = 0) -> Explained:
        """``explain_shard`` before its pictures are made: columns ``x`` and ``x_cf`` hold raw pixels."""
        # What is worth several threads starts its own.
        with one_thread():
            return self._search_shard(shard, extra, trace)

    def _search_shard(self, shard: pa.Table, extra: pa.Table | None, trace: int) -> Explained:
        clock = Clock()
        extra = extra if extra is not None else pa.table({})
        traced = set(shard["image_id"][:trace].to_pylist())
        labels = data.label_indices(shard["label_name"], self.model.class_names)
        valid = shard["image"].is_valid().to_numpy(zero_copy_only=False)
        ids = np.array(shard["image_id"].to_pylist(), object)
        codes = [self._error_rows(shard, labels, extra, np.flatnonzero(~valid))]
        pairs, traces, engine = [self._no_pairs()], [], None

        fold = np.array([fold_of(name, len(self.folds)) if self.folds else 0 for name in ids], int)
        for number, ensemble in enumerate(self.folds or (self.model.ensemble,)):
            rows = np.flatnonzero(valid & (fold == number))
            if not len(rows):
                continue
            part = _Part(replace(self.model, ensemble=ensemble), ids[rows].tolist(), labels.take(pa.array(rows)))
            self._see(part, schema.matrix(shard["image"].take(rows)), clock)
            codes.append(self._code_rows(part, shard["label_name"].take(rows), extra.take(rows)))
            self._ask(part)
            if len(part.target):
                self._search(part, clock)
                engine = part.found.engine
                pairs.append(self._pair_rows(part))
                if traced:
                    with clock("trace"):
                        traces.append(self._trace(part, traced))

        with clock("table"):
            tables = [
                pa.concat_tables(codes).sort_by("image_id"),
                pa.concat_tables(pairs).sort_by([("target", "ascending"), ("image_id", "ascending")]),
            ]
            trace_table = None
            if trace:
                keys = [(name, "ascending") for name in ("target", "image_id", "step")]
                trace_table = pa.concat_tables([self._no_traces(), *traces]).sort_by(keys)
        stats = {
            "engine": engine,
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "threads": self.threads,
            "images": len(ids),
            "pairs": len(tables[1]),
            "seconds": clock.seconds,
        }
        return Explained(tables[0], tables[1], stats, trace_table)

    # ---- the stages ------------------------------------------------------------------------------------------------

    def _see(self, part: _Part, pixels: np.ndarray, clock: Clock) -> None:
        """Encode the images, reconstruct them, and let the ensemble look at their codes."""
        with clock("encode"):
            part.pixels = pixels.reshape(-1, *self.model.image_shape)
            part.x = self._unit(part.pixels)
            part.z, part.log_var = encode_rows(self.model.vae, part.x)
            part.reconstruction = decode_rows(self.model.vae, part.z)
            part.seen = predict(logits_rows(part.model.ensemble, part.z))
            part.source = part.seen.probs.argmax(1).astype(np.int32)

    def _ask(self, part: _Part) -> None:
        """Make the pairs: every wanted target of every image, the class that the ensemble sees excepted."""
        asked = np.ones(len(part.ids), bool)
        if self.only == "misclassified":
            known = part.label.fill_null(-1).to_numpy(zero_copy_only=False)
            asked = (known >= 0) & (known != part.source)
        of = [np.flatnonzero(asked & (part.source != target)) for target in self.targets]
        part.of = np.concatenate([np.zeros(0, np.int64), *of])
        part.target = np.repeat(np.array(self.targets, np.int64), [len(places) for places in of])
        place = torch.from_numpy(part.of).to(self.device)
        part.noise = torch.from_numpy(noise(part.ids, self.model.latent_dim)).to(self.device)
        target = torch.from_numpy(part.target).to(self.device)
        part.pairs = Pairs(part.x[place], part.z[place], part.log_var[place], part.noise[place], target)

    def _search(self, part: _Part, clock: Clock) -> None:
        """Search the pairs, then decode what was found, quantise it, and let the ensemble look at it again."""
        method = METHODS[self.method]
        with clock("search"):
            part.found = method.search(part.model, part.pairs, self.config, engine=self.engine, threads=self.threads)
        with clock("judge"):
            part.final = predict(classifier_logits(part.model, self.method, part.found.point))
            part.initial = self._judge_start(part)
        self._look_again(part, clock)

    def _look_again(self, part: _Part, clock: Clock) -> None:
        """Decode what was found, quantise it, and let the ensemble look at it again; a few pairs at a time."""
        latent, points = METHODS[self.method].space == "latent", part.found.point
        images = torch.from_numpy(part.of).to(self.device)
        shown, off, again, codes = [], [], [], []
        for start in range(0, len(points), CHUNK):
            rows = slice(start, start + CHUNK)
            with clock("decode"):
                x_cf = decode_rows(self.model.vae, points[rows]) if latent else points[rows]
                shown.append(quantise(x_cf))
                off.append(_l1(x_cf, part.reconstruction[images[rows]]))
            with clock("reencode"):
                codes.append(encode_rows(self.model.vae, self._unit(shown[-1]))[0])
                again.append(mean_probs(logits_rows(part.model.ensemble, codes[-1])))
        part.shown, part.off, part.again = (np.concatenate(parts) for parts in (shown, off, again))
        part.z_cf = points if latent else torch.cat(codes)

    def _judge_start(self, part: _Part) -> Prediction:
        """What the method's own classifier sees where each pair starts, which depends on the image alone."""
        if self.method == "clarity":
            return Prediction(*(values[part.of] for values in vars(part.seen).values()))
        each = Pairs(part.x, part.z, part.log_var, part.noise, torch.zeros_like(part.noise[:, 0], dtype=torch.int64))
        # A search of no step ends where it starts.
        start = METHODS[self.method].search(part.model, each, replace(self.config, max_steps=0), threads=self.threads)
        judged = predict(classifier_logits(part.model, self.method, start.point))
        return Prediction(*(values[part.of] for values in vars(judged).values()))

    def _unit(self, pixels: np.ndarray) -> Tensor:
        """Pixels (B, C, H, W) uint8 as the model takes them: float32 in [0, 1], on its device."""
        return torch.tensor(pixels, device=self.device).float() / 255

    def _trace(self, part: _Part, traced: set[str]) -> pa.Table:
        """The path of the chosen images' pairs, searched once more by the engine that shows its steps (plain)."""
        chosen = np.flatnonzero([part.ids[place] in traced for place in part.of])
        index = torch.from_numpy(chosen).to(self.device)
        some = Pairs(*(getattr(part.pairs, fields.name)[index] for fields in dataclasses.fields(Pairs)))
        parts = [self._no_traces()]

        def on_step(steps: Tensor, rows: Tensor, point: Tensor, target_prob: Tensor, logits: Tensor) -> None:
            pair = chosen[_numpy(rows)]
            uncertainty = decompose(logits)
            several = len(logits) > 1
            z = point if point.dim() == 2 else encode_rows(self.model.vae, point)[0]
            columns = {
                "image_id": pa.array(part.ids, pa.string()).take(pa.array(part.of[pair])),
                "source": part.source[part.of[pair]],
                "target": part.target[pair].astype(np.int32),
                "step": _numpy(steps).astype(np.int32),
                "target_prob": _numpy(target_prob),
                "predictive": _numpy(uncertainty.predictive),
                "aleatoric": _numpy(uncertainty.aleatoric),
                "epistemic": _numpy(uncertainty.epistemic) if several else pa.nulls(len(pair), pa.float32()),
                "z": schema.fixed_size_list(_numpy(z)),
            }
            parts.append(self._table(columns, parts[0].schema))

        if len(chosen):
            METHODS[self.method].search(part.model, some, self.config, on_step=on_step, threads=self.threads)
        return pa.concat_tables(parts)

    # ---- the tables ------------------------------------------------------------------------------------------------

    def _code_rows(self, part: _Part, label_name: pa.ChunkedArray, extra: pa.Table) -> pa.Table:
        columns = {
            "image_id": part.ids,
            "label": part.label,
            "label_name": label_name,
            "source": part.source,
            "source_name": self._names(part.source),
            "probs": schema.fixed_size_list(part.seen.probs),
            "predictive": part.seen.predictive,
            "aleatoric": part.seen.aleatoric,
            "epistemic": part.seen.epistemic,
            "z": schema.fixed_size_list(_numpy(part.z)),
            "reconstruction_l1": _l1(part.reconstruction, part.x),
            "status": ["ok"] * len(part.ids),
            "error": pa.nulls(len(part.ids), pa.string()),
            "x": self._raw(part.pixels),
        }
        return self._table(columns, self._codes_schema(extra), extra)

    def _error_rows(self, shard: pa.Table, label: pa.Array, extra: pa.Table, rows: np.ndarray) -> pa.Table:
        expected = self._codes_schema(extra)
        columns: dict[str, Any] = {field.name: pa.nulls(len(rows), field.type) for field in expected}
        columns["label"] = label.take(pa.array(rows))
        for name in ("image_id", "label_name", "error"):
            columns[name] = shard[name].take(pa.array(rows))
        columns["status"] = ["error"] * len(rows)
        return self._table(columns, expected, extra.take(pa.array(rows)))

    def _pair_rows(self, part: _Part) -> pa.Table:
        found, several = part.found, not METHODS[self.method].classifier.endswith("member")
        finite = _numpy(found.finite)
        rows = len(part.target)
        target = part.target.astype(np.int32)
        columns = {
            "image_id": pa.array(part.ids, pa.string()).take(pa.array(part.of)),
            "label": part.label.take(pa.array(part.of)),
            "source": part.source[part.of],
            "source_name": self._names(part.source[part.of]),
            "target": target,
            "target_name": self._names(target),
            "method": [self.method] * rows,
            "status": pa.array(np.where(finite, "ok", "nonfinite")),
            "converged": _numpy(found.converged),
            "steps": _numpy(found.steps),
            "target_prob_initial": _numpy(found.target_prob_initial),
            "target_prob_final": _numpy(found.target_prob_final),
            "predictive_initial": part.initial.predictive,
            "aleatoric_initial": part.initial.aleatoric,
            "epistemic_initial": part.initial.epistemic if several else pa.nulls(rows, pa.float32()),
            "predictive_final": part.final.predictive,
            "aleatoric_final": part.final.aleatoric,
            "epistemic_final": part.final.epistemic if several else pa.nulls(rows, pa.float32()),
            "distance_z_l1": _l1(part.z_cf, part.pairs.z),
            "distance_z_l2": _l2(part.z_cf, part.pairs.z),
            "distance_x_l1": part.off,
            "reencoded_class": part.again.argmax(1).astype(np.int32),
            "reencoded_target_prob": part.again[np.arange(rows), target],
            "z_cf": schema.fixed_size_list(_numpy(part.z_cf)),
            "x_cf": self._raw(part.shown),
        }
        return self._table(columns, schema.counterfactuals_schema(self.model.latent_dim))

    def _table(self, columns: dict[str, Any], expected: pa.Schema, extra: pa.Table | None = None) -> pa.Table:
        """Columns as a table of a schema, numbers that are NaN as null, the picture column still raw."""
        arrays = []
        for fields in expected:
            if extra is not None and fields.name in extra.column_names:
                arrays.append(extra[fields.name])
            elif isinstance(columns[fields.name], pa.Array | pa.ChunkedArray):
                arrays.append(columns[fields.name])
            else:
                arrays.append(pa.array(columns[fields.name], fields.type, from_pandas=True))
        return pa.table(arrays, schema=expected)

    def _codes_schema(self, extra: pa.Table) -> pa.Schema:
        return schema.codes_schema(self.model.num_classes, self.model.latent_dim, extra.schema)

    def _no_pairs(self) -> pa.Table:
        return schema.counterfactuals_schema(self.model.latent_dim).empty_table()

    def _no_traces(self) -> pa.Table:
        return schema.traces_schema(self.model.latent_dim).empty_table()

    def _names(self, classes: np.ndarray) -> pa.Array:
        return pa.array(self.model.class_names, pa.string()).take(pa.array(classes))

    def _raw(self, pixels: np.ndarray) -> pa.Array:
        """Raw pixels as a binary column, until ``shards.drawn``."""
        if self.images == "none":
            return pa.nulls(len(pixels), pa.binary())
        flat = schema.fixed_size_list(pixels.reshape(len(pixels), -1))
        size = flat.type.list_size
        return pa.Array.from_buffers(pa.binary(size), len(flat), [None, flat.values.buffers()[1]]).cast(pa.binary())


# ---- small things --------------------------------------------------------------------------------------------------


def _require_classifier(model: Model, method: str) -> None:
    if METHODS[method].classifier.startswith("image") and model.image_ensemble is None:
        raise ValueError(
            f"method {method!r} needs a classifier of images, which this model lacks; train it with --image-members"
        )


def quantise(x: Tensor) -> np.ndarray:
    """Pictures in [0, 1] as uint8."""
    return _numpy((x * 255).round().clamp(0, 255).to(torch.uint8))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _l1(a: Tensor, b: Tensor) -> np.ndarray:
    return np.abs(_numpy(a) - _numpy(b)).reshape(len(a), -1).sum(1)


def _l2(a: Tensor, b: Tensor) -> np.ndarray:
    return np.sqrt(np.square(_numpy(a) - _numpy(b)).reshape(len(a), -1).sum(1))


# ---- what a job asks for -------------------------------------------------------------------------------------------


def choose(listing: pa.Table, where: Sequence[str] = (), limit: int | None = None) -> tuple[pa.Table, str]:
    """The images of a listing that are asked for, and whether ``all`` of them get pairs or the ``misclassified``.

    Args:
        listing: of ``data.list_images``.
        where: conditions that all hold: label=A,B (names), ids=FILE (one id a line), misclassified.
        limit: the first so many of what is left.

    Raises:
        ValueError: an unknown condition, label or id; or nothing is left.
    """
    only = "all"
    for condition in where:
        kind, _, value = condition.partition("=")
        if kind == "misclassified" and not value:
            only = "misclassified"
        elif kind == "label" and value:
            names = value.split(",")
            known = listing["label_name"].unique().drop_null().to_pylist()
            if unknown := sorted(set(names) - set(known)):
                raise ValueError(
                    f"--where {condition}: no image has the label {unknown[0]!r}; there are {', '.join(sorted(known))}"
                )
            listing = listing.filter(pc.is_in(listing["label_name"], pa.array(names)))
        elif kind == "ids" and value:
            names = storage.read_bytes(value).decode().splitlines()
            kept = listing.filter(pc.is_in(listing["image_id"], pa.array(names, pa.string())))
            if len(kept) < len(set(names)):
                unknown = sorted(set(names) - set(kept["image_id"].to_pylist()))
                raise ValueError(
                    f"--where {condition}: {len(unknown)} ids are not in the data, the first {unknown[0]!r}"
                )
            listing = kept
        else:
            raise ValueError(f"--where {condition}: expected label=NAME[,NAME...], ids=FILE or misclassified")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit: expected at least 1, got {limit}")
    listing = listing.slice(0, limit)
    if not len(listing):
        raise ValueError("no image is left after --where; ask for more")
    return listing, only


def read_predictions(uri: str, listing: pa.Table) -> pa.Table:
    """What a file says that another model predicts: columns image_id, and class or probabilities or both.

    Args:
        uri: a Parquet file, local or s3://. ``class`` holds names or indices, ``probabilities`` lists of numbers.
        listing: all images; rows of the file about others are dropped and counted (``data.left_out``).

    Raises:
        ValueError: columns are missing or of another type, ids are null or double, or none is an image's.
    """
    place = f"--predictions {storage.display(uri)}"
    with storage.open_parquet(uri) as parquet:
        found = parquet.schema_arrow.names
        names = [name for name in ("image_id", "class", "probabilities") if name in found]
        if names[:1] != ["image_id"] or len(names) < 2:
            raise ValueError(
                f"{place}: expected columns image_id and class or probabilities, found {', '.join(found) or 'none'}: "
                "rename them"
            )
        table = storage.attempt("read", uri, lambda: parquet.read(names))
    for number, column in enumerate(table.itercolumns()):
        if pa.types.is_dictionary(column.type):
            table = table.set_column(number, names[number], column.cast(column.type.value_type))
    kind = table["image_id"].type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{place}: expected image_id as text or integers, found {kind}: convert it")
    ids = table["image_id"].cast(pa.string()).combine_chunks()
    if ids.null_count:
        raise ValueError(f"{place}: expected an image_id in every row, found null in {ids.null_count}: fill them")
    if double := len(ids) - len(pc.unique(ids)):
        counts = pc.value_counts(ids)
        first = counts.field("values").filter(pc.greater(counts.field("counts"), 1))[0]
        raise ValueError(f"{place}: expected each image_id once, found {double} double, the first {first}: drop them")
    known = pc.is_in(ids, value_set=listing["image_id"].combine_chunks())
    strangers = len(ids) - (pc.sum(known).as_py() or 0)
    if strangers == len(ids):
        example = f", such as {ids[0]}; its own are like {listing['image_id'][0]}" if len(ids) else ""
        raise ValueError(f"{place}: none of its {len(ids)} ids is an image of the data{example}: check both")
    table = table.set_column(0, "image_id", ids).filter(known)
    return note_left_out(table, {"predictions for images that are not in the data": strangers})


def add_predictions(listing: pa.Table, predictions: pa.Table, class_names: Sequence[str]) -> pa.Table:
    """The listing with ``schema.PREDICTIONS_DOC``'s columns: null for an image without a prediction.

    Args:
        listing: the images that are asked for.
        predictions: of ``read_predictions``. Where a row has both, its class counts, not its largest probability.
        class_names: of the model that explains: what indices and probabilities refer to.

    Raises:
        ValueError: unknown classes, values that are no probabilities of these classes, or no image has a prediction.
    """
    rows = len(predictions)
    classes, probs = np.zeros(rows, np.int32), np.zeros((rows, len(class_names)), np.float32)
    has_class, has_probs = np.zeros(rows, bool), np.zeros(rows, bool)
    if "probabilities" in predictions.column_names:
        probs, has_probs = _probabilities(predictions, class_names)
        classes, has_class = probs.argmax(1).astype(np.int32), has_probs.copy()
    if "class" in predictions.column_names:
        named = _classes(predictions, class_names)
        known = named.is_valid().to_numpy(zero_copy_only=False)
        classes[known] = named.drop_null().to_numpy()
        has_class |= known
    place = pc.index_in(listing["image_id"], value_set=predictions["image_id"].combine_chunks())
    at = place.fill_null(0).to_numpy()
    found = place.is_valid().to_numpy() & has_class[at]
    if not found.any():
        raise ValueError(
            f"--predictions: none of the {len(listing)} images asked for has one; check --where and --limit"
        )
    prediction = pa.array(np.where(found, classes[at], 0).astype(np.int32), mask=~found)
    columns = {"prediction": prediction, "prediction_name": pa.array(class_names, pa.string()).take(prediction)}
    if has_probs.any():
        valid = place.is_valid().to_numpy() & has_probs[at]
        columns["prediction_probs"] = schema.fixed_size_list(np.where(valid[:, None], probs[at], 0), valid)
    for name, column in columns.items():
        listing = listing.append_column(name, column)
    return note_left_out(listing, data.left_out(listing) | data.left_out(predictions))


def _classes(predictions: pa.Table, class_names: Sequence[str]) -> pa.Array:
    """The column class as indices, null where it is."""
    column, count = predictions["class"].combine_chunks(), len(class_names)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        found = data.label_indices(column.cast(pa.string()), class_names)
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        # An integer column with gaps reaches Parquet as floats from pandas.
        whole = pc.and_(pc.equal(pc.floor(column), column), pc.is_finite(column))
        inside = pc.and_(whole, pc.and_(pc.greater_equal(column, 0), pc.less(column, count)))
        found = pc.if_else(inside, column, pa.scalar(None, column.type)).cast(pa.int32())
    else:
        raise ValueError(f"--predictions: expected class as names or indices, found {column.type}: convert it")
    wrong = np.flatnonzero(pc.and_(found.is_null(), column.is_valid()))
    if len(wrong):
        raise ValueError(
            f"--predictions: expected classes that the model knows, found {column[wrong[0]]} for image "
            f"{predictions['image_id'][wrong[0]]} and {len(wrong) - 1} others; choose from {', '.join(class_names)}, "
            f"or indices 0 to {count - 1}"
        )
    return found


def _probabilities(predictions: pa.Table, class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The column probabilities (B, K), zero where it is null; and where it is not."""
    column, count = predictions["probabilities"].combine_chunks(), len(class_names)
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise ValueError(f"--predictions: expected probabilities as lists of numbers, found {kind}: convert it")
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    ids, rows = predictions["image_id"].filter(pa.array(valid)), column.drop_null()

    def check(bad: np.ndarray, what: str, found: Callable[[int], Any]) -> None:
        if len(places := np.flatnonzero(bad)):
            raise ValueError(
                f"--predictions: expected {what}, found {found(int(places[0]))} for image {ids[places[0]]} and "
                f"{len(places) - 1} others; the classes are {', '.join(class_names)}, in this order"
            )

    lengths = pc.list_value_length(rows).to_numpy()
    check(lengths != count, f"{count} probabilities an image", lambda row: lengths[row])
    values = rows.flatten().cast(pa.float64()).to_numpy(zero_copy_only=False).reshape(-1, count)  # null becomes NaN
    check(~np.isfinite(values).all(1), "probabilities that are numbers", lambda row: values[row].tolist())
    outside = (values < 0).any(1) | (np.abs(values.sum(1) - 1) > 0.01)
    check(outside, "probabilities that are not negative and sum to 1", lambda row: f"a sum of {values[row].sum():.4g}")
    probs = np.zeros((len(column), count), np.float32)
    probs[valid] = values
    return probs, valid


def make_plan(
    model: Model,
    dataset: data.Dataset,
    listing: pa.Table,
    *,
    method: str,
    config: SearchConfig,
    targets: Any = "all",
    images: str = "png",
    only: str = "all",
    trace: int = 0,
    shard_rows: int,
    where: Sequence[str] = (),
) -> Plan:
    """The plan of an audit over the images of a listing.

    Images of the training split are explained by the classifiers of the fold that did not see them, where the model has
    folds.
    """
    _require_classifier(model, method)
    indices = class_indices(targets, model.class_names)
    num_folds = len(model.folds) if dataset.split != "test" else 0
    needed = {
        "image_ensemble.safetensors": METHODS[method].classifier.startswith("image"),
        "folds.safetensors": num_folds > 0,
    }
    sums = {name: about["sha256"] for name, about in model.card.get("files", {}).items() if needed.get(name)}
    extra = [field for field in listing.schema if field.name not in data.LISTING_COLUMNS]
    return Plan(
        dataset={
            "source": dataset.source,
            "data": storage.display(dataset.data or ""),
            "split": dataset.split,
            "where": list(where),
            "num_images": len(listing),
            "listing": data.listing_fingerprint(listing.select(list(data.LISTING_COLUMNS))),
            "extra": [[field.name, str(field.type), _column_digest(listing[field.name])] for field in extra],
            "left_out": data.left_out(listing),
        },
        model={
            "fingerprint": model.fingerprint,
            "class_names": list(model.class_names),
            "image_shape": list(model.image_shape),
            "latent_dim": model.latent_dim,
            "num_members": model.ensemble.config.num_members,
            "num_folds": num_folds,
            "sums": sums,
        },
        method=method,
        config=dataclasses.asdict(config),
        targets=None if indices is None else list(indices),
        images=images,
        shards=shard_table(listing["image_id"].to_pylist(), shard_rows),
        only=only,
        trace=trace,
        versions={
            "clarity": clarity.__version__,
            "torch": str(torch.__version__),  # a class of its own, which would load torch wherever the plan goes
            "numpy": np.__version__,
            "pyarrow": pa.__version__,
        },
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def probe(
    model_uri: str, dataset: data.Dataset, listing: pa.Table, steps: int | None = None, **options: Any
) -> dict[str, Any]:
    """Measure the job on a few images: seconds and bytes for an image, pairs a second, engine.

    Args:
        model_uri: a model directory.
        dataset: where the images lie.
        listing: the images to measure on.
        steps: measure this many updates, and reckon with a hundred for each pair; None searches to the end.
        **options: of the Explainer.
    """
    model = load_model(model_uri)
    if steps is not None:
        options["config"] = replace(options["config"], max_steps=steps)
    explainer = Explainer(model, **options)
    images = data.read_images(dataset, listing, model.preprocessing)
    explainer.search_shard(images.slice(0, 2))  # what the first call alone costs
    start = time.perf_counter()
    explained = explainer.explain_shard(images)
    seconds = time.perf_counter() - start
    if steps is not None:
        search = explained.stats["seconds"].get("search", 0.0)
        seconds += search / (steps + 1) * 100 - search
    size = sum(len(to_parquet(table)) for table in (explained.codes, explained.counterfactuals))
    return {
        "seconds_per_image": seconds / len(listing),
        "bytes_per_image": size / len(listing),
        "pairs_per_second": explained.stats["pairs"] / seconds,
        "engine": explained.stats["engine"],
    }


def raw_bytes_per_image(model: Model, num_targets: int) -> float:
    """Bytes that an image's rows hold before compression, at most."""
    pixels = int(np.prod(model.image_shape))
    return (1 + num_targets) * (pixels + 4 * model.latent_dim + 160)


def _column_digest(column: pa.ChunkedArray) -> str:
    sink = pa.BufferOutputStream()
    table = pa.table({"": column.combine_chunks()})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return hashlib.sha256(sink.getvalue()).hexdigest()[:16]


# ---- in a job ------------------------------------------------------------------------------------------------------


class ExplainShard:
    """Second worker of a shard: images in, tables out; keeps the model from shard to shard."""

    def __init__(self, work: Work, **options: Any) -> None:
        self.work, self.options = work, options

    @cached_property
    def explainer(self) -> Explainer:
        """The model at work."""
        # Made under the first attempt rather than with the worker: a model that cannot be loaded, or that kills the
        # process, then counts as this shard's failure instead of being tried for ever.
        plan = self.work.plan
        model = load_model(storage.join(self.work.uri, "model"))
        sums = {name: about["sha256"] for name, about in model.card.get("files", {}).items()}
        if model.fingerprint != plan.model["fingerprint"] or not plan.model["sums"].items() <= sums.items():
            raise ValueError(
                f"expected the model of the plan in {storage.display(self.work.uri)}/model, found another: restore it"
            )
        return Explainer(
            model,
            plan.method,
            SearchConfig(**plan.config),
            targets=plan.targets,
            images=plan.images,
            only=plan.only,
            by_fold=bool(plan.model["num_folds"]),
            **self.options,
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Explain one shard; pass on what failed before."""
        row = unpack_row(batch)
        names = ("codes", "counterfactuals", "traces")
        if not row["note"].get("seconds"):
            return pack_row(row["shard"], row["note"], dict.fromkeys(names))

        def run() -> dict[str, Any]:
            listing, plan = unpack(row["listing"]), self.work.plan
            extra = listing.select([name for name, *_ in plan.dataset["extra"]])
            trace = plan.trace - plan.shards[row["shard"]]["start"]
            explained = self.explainer.search_shard(unpack(row["images"]), extra, max(0, trace))
            explained.stats["seconds"] |= row["note"]["seconds"]
            tables = (explained.codes, explained.counterfactuals, explained.traces)
            packed = {name: None if table is None else pack(table) for name, table in zip(names, tables)}
            return {"note": explained.stats, **packed}

        return attempted(self.work, row["shard"], "explain", run, names)


# ---- in a notebook -------------------------------------------------------------------------------------------------


def explain(
    model: Model | str | Path,
    images: Any,
    targets: Any = "all",
    *,
    method: str = "clarity",
    config: SearchConfig | None = None,
    image_ids: Sequence[str] | None = None,
    **options: Any,
) -> pa.Table:
    """Counterfactuals of a few images: the table of ``schema.counterfactuals_schema``, pictures as PNG.

    Args:
        model: a Model, or the place of one.
        images: (B, C, H, W) or (B, H, W) pixels, uint8 or floats in [0, 1], of the model's size; or a sequence of such
            arrays, PIL images, or places of image files.
        targets: all, or class names or indices; the class that the model sees is left out.
        method: a key of METHODS.
        config: of the search.
        image_ids: names for the rows; by default the files' places, else 0, 1, 2 ...
        **options: of the Explainer.

    Raises:
        ValueError: an image that cannot be used, naming it; an unknown target or method.
    """
    model = load_model(model) if isinstance(model, str | Path) else model
    if isinstance(images, str | Path | bytes) or not hasattr(images, "__len__"):
        raise ValueError(
            f"images: expected an array or a sequence of images, got {type(images).__name__}; put it in a list"
        )
    if image_ids is None:
        image_ids = [str(image) if isinstance(image, str | Path) else str(i) for i, image in enumerate(images)]
    if len(image_ids) != len(images) or len(set(image_ids)) != len(image_ids):
        raise ValueError(f"image_ids: expected {len(images)} distinct names, got {len(set(image_ids))}")
    pixels = np.zeros((len(images), *model.image_shape), np.uint8)
    for place, image in enumerate(images):
        content = storage.read_bytes(image) if isinstance(image, str | Path) else image
        try:
            pixels[place] = model.preprocessing.apply(_array(content))
        except UnreadableImage as error:
            raise ValueError(f"image {image_ids[place]}: {error}") from None
    count = len(images)
    shard = pa.table(
        [
            pa.array(image_ids, pa.string()),
            pa.nulls(count, pa.string()),
            schema.fixed_size_list(pixels.reshape(count, -1)),
            pa.nulls(count, pa.string()),
        ],
        schema=schema.shard_schema(model.image_shape),
    )
    chosen = class_indices(targets, model.class_names)
    return Explainer(model, method, config, targets=chosen, **options).explain_shard(shard).counterfactuals


def _array(image: Any) -> Any:
    """Torch tensors as arrays; the rest as it is."""
    return image.detach().cpu().numpy() if isinstance(image, Tensor) else image


def class_indices(names: Any, class_names: Sequence[str]) -> tuple[int, ...] | None:
    """Class indices of names or indices; None for "all".

    Raises:
        ValueError: an unknown one, with the choices.
    """
    if names is None or (isinstance(names, str) and names == "all"):
        return None
    found = []
    for name in [names] if isinstance(names, str | int) else names:
        if isinstance(name, str) and name in class_names:
            found.append(list(class_names).index(name))
        elif isinstance(name, int | np.integer) and not isinstance(name, bool) and 0 <= name < len(class_names):
            found.append(int(name))
        else:
            raise ValueError(f"unknown class {name!r}; choose from {', '.join(class_names)}")
    if not found:
        raise ValueError("expected at least one target, got none")
    return tuple(sorted(set(found)))


def decode(source: Audit | str | Path, rows: pa.Table, *, column: str = "z_cf", device: str = "cpu") -> np.ndarray:
    """Pictures (B, C, H, W) uint8 of codes in an audit's tables, by the model that the audit keeps.

    Gives the pictures of a run with ``--images none``, and those of the tables again within one grey level. For
    pixel methods, whose ``z_cf`` is the code of a picture, it gives that picture's reconstruction.

    Args:
        source: an audit, or the place of one.
        rows: rows of counterfactuals, or of codes with ``column`` = z.
        column: the codes' column.
        device: where to decode.
    """
    uri = source.uri if isinstance(source, Audit) else str(source)
    model = load_model(storage.join(uri, "model"), device)
    codes = torch.tensor(schema.matrix(rows[column]), device=device)
    return quantise(decode_rows(model.vae, codes))


def redecoder(uri: str | Path) -> Callable[[np.ndarray], np.ndarray] | None:
    """The audit's own decoder for ``verify``: codes (B, D) to uint8 images; None where codes are not latent."""
    if METHODS[read_plan(str(uri)).method].space != "latent":
        return None
    model = load_model(storage.join(str(uri), "model"))

    def redecode(codes: np.ndarray) -> np.ndarray:
        return quantise(decode_rows(model.vae, torch.tensor(codes)))

    return redecode
