"""From a shard of images to the rows of an audit: encode, predict, search every wanted target, decode, judge.

Here the rooms meet: models, methods and tables. Does not know how shards come and go, nor Ray.

Shapes: B images, P pairs (image, target), C, H, W image, D latent, K classes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from clarity import data, schema
from clarity.ids import fold_of, noise
from clarity.images import encode_png_column
from clarity.methods import METHODS, Pairs, classifier_logits
from clarity.model import Model, load_model
from clarity.rows import Prediction, decode_rows, encode_rows, logits_rows, mean_probs, one_thread, predict
from clarity.search import Counterfactuals, SearchConfig
from clarity.uncertainty import decompose

#: Pairs whose pictures exist as floats at one time; bounds the memory, changes no row.
CHUNK = 2048


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to a stage."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


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
        require_classifier(self.model, method)
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
        codes = encode_png_column(explained.codes, "x", shape)
        pairs = encode_png_column(explained.counterfactuals, "x_cf", shape)
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
        """Raw pixels as a binary column, until ``encode_png_column``."""
        if self.images == "none":
            return pa.nulls(len(pixels), pa.binary())
        flat = schema.fixed_size_list(pixels.reshape(len(pixels), -1))
        size = flat.type.list_size
        return pa.Array.from_buffers(pa.binary(size), len(flat), [None, flat.values.buffers()[1]]).cast(pa.binary())


# ---- small things --------------------------------------------------------------------------------------------------


def require_classifier(model: Model, method: str) -> None:
    """Raise ValueError when a method needs image classifiers and the model has none."""
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
