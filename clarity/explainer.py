"""Explains a shard of images: encode, pair each image with its targets, search, decode to 8 bits, build the tables.

Combines model, method and schema into output tables; each stage hands the next a frozen result. Does not know how
shards are read and written, nor Ray.

Shapes: B images, P pairs (image, target), C, H, W image, D latent, K classes, M members.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from clarity import data, schema
from clarity.classifiers import LatentEnsemble
from clarity.ids import fold_of
from clarity.ids import noise as draw_noise
from clarity.images import encode_png_column
from clarity.judges import judge_rows
from clarity.methods import METHODS, Pairs, classifier_logits
from clarity.model import Model, load_model
from clarity.rows import Prediction, decode_rows, encode_rows, logits_rows, mean_probs, one_thread, predict
from clarity.search import Counterfactuals, SearchConfig
from clarity.uncertainty import decompose

#: Pairs decoded at a time. Bounds the memory of float images; does not change any row.
CHUNK = 2048


@dataclass(frozen=True)
class Explained:
    """The tables of a shard, and ``stats``: engine, device, threads, seconds by stage."""

    codes: pa.Table
    counterfactuals: pa.Table
    stats: dict[str, Any]
    traces: pa.Table | None = None


@dataclass(frozen=True)
class Encoded:
    """B images and what one ensemble predicts for them; ``model`` carries that ensemble."""

    model: Model
    image_id: pa.Array
    label: pa.Array
    label_name: pa.Array
    extra: pa.Table
    pixels: np.ndarray
    x: Tensor
    z: Tensor
    log_var: Tensor
    noise: Tensor
    reconstruction: Tensor
    prediction: Prediction
    source: np.ndarray


@dataclass(frozen=True)
class Asked:
    """P pairs to search: ``image`` (P,) indexes the encoded images, ``target`` (P,) are the wanted classes."""

    image: np.ndarray
    target: np.ndarray
    pairs: Pairs


@dataclass(frozen=True)
class Written:
    """P counterfactual images as they are written, and what the ensemble predicts for them.

    Args:
        pixels: (P, C, H, W) uint8.
        distance_x_l1: (P,), between the decoded counterfactual and the reconstruction, before rounding to 8 bits.
        z: (P, D), the codes of ``pixels``.
        probs: (P, K), mean probabilities of the latent ensemble at those codes.
        judge_probs: (P, K), of the held-out judge for ``pixels``; None where the model has no judge.
    """

    pixels: np.ndarray
    distance_x_l1: np.ndarray
    z: Tensor
    probs: np.ndarray
    judge_probs: np.ndarray | None


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


class Explainer:
    """Explains shards of images with one method and one model.

    A row's bits depend on its image, its target, the model and the configuration alone.

    Args:
        model: a Model, which is copied where it has to be moved to another device, or the URI of one.
        method: a key of METHODS.
        config: of the search.
        targets: wanted class indices; None for all. An image's own predicted class is never a target.
        images: png, or none to keep codes only.
        only: all, or misclassified: pairs only for images whose predicted class is not their label.
        by_fold: explain each image by the ensemble of the fold that has not seen it, for images of the training split.
        device: auto (cuda where there is one), cpu or cuda.
        threads: of the search and of inference on a CPU; None for torch's number.
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
        for name, value, choices in (
            ("method", method, METHODS),
            ("images", images, ("png", "none")),
            ("only", only, ("all", "misclassified")),
        ):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if isinstance(model, str | Path):
            model = load_model(model, device)
        elif model.device.type != torch.device(device).type:
            model = copy.deepcopy(model).to(device)
        self.model, self.method, self.config = model, method, config or SearchConfig()
        self.images, self.only, self.device, self.engine = images, only, device, engine
        self.threads = threads or torch.get_num_threads()
        self.targets = tuple(range(model.num_classes)) if targets is None else tuple(sorted(set(targets)))
        if bad := [target for target in self.targets if not 0 <= target < model.num_classes]:
            raise ValueError(f"targets {bad}: expected class indices below {model.num_classes}")
        require_classifier(model, method)
        self.folds = model.folds if by_fold else ()

    def explain_shard(self, shard: pa.Table, extra: pa.Table | None = None, trace: int = 0) -> Explained:
        """Explain a shard (``schema.shard_schema``): its codes sorted by image_id, its pairs by (target, image_id).

        Args:
            shard: images, or the reasons why they could not be read.
            extra: further columns for ``codes``, a row for each of the shard.
            trace: also record the search paths of this many of its first images.
        """
        explained = self.search_shard(shard, extra, trace)
        shape = self.model.image_shape
        codes = encode_png_column(explained.codes, "x", shape)
        pairs = encode_png_column(explained.counterfactuals, "x_cf", shape)
        return replace(explained, codes=codes, counterfactuals=pairs)

    def search_shard(self, shard: pa.Table, extra: pa.Table | None = None, trace: int = 0) -> Explained:
        """``explain_shard`` without PNG encoding: the columns ``x`` and ``x_cf`` hold raw pixels."""
        extra = pa.table({}) if extra is None else extra
        clock, engine = Clock(), None
        valid = shard["image"].is_valid().to_numpy(zero_copy_only=False)
        codes = [self.error_rows(shard, extra, np.flatnonzero(~valid))]
        pairs = [schema.counterfactuals_schema(self.model.latent_dim).empty_table()]
        traces = [schema.traces_schema(self.model.latent_dim).empty_table()]
        with one_thread(self.threads):
            for ensemble, rows in self.by_ensemble(shard["image_id"].to_pylist(), valid):
                encoded = self.encode(ensemble, shard.take(rows), extra.take(rows), clock)
                codes.append(self.code_rows(encoded))
                asked = self.ask(encoded)
                if not len(asked.target):
                    continue
                with clock("search"):
                    found = self.search(encoded.model, asked.pairs)
                engine = found.engine
                written = self.write(encoded, asked, found.point, clock)
                with clock("predict"):
                    pairs.append(self.pair_rows(encoded, asked, found, written))
                if traced := set(shard["image_id"][:trace].to_pylist()):
                    with clock("trace"):
                        traces.append(self.trace_rows(encoded, asked, traced))
        with clock("table"):
            explained = Explained(
                codes=pa.concat_tables(codes).sort_by("image_id"),
                counterfactuals=sort(pairs, "target", "image_id"),
                traces=sort(traces, "target", "image_id", "step") if trace else None,
                stats={
                    "engine": engine,
                    "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
                    "threads": self.threads,
                    "images": len(shard),
                    "pairs": sum(map(len, pairs)),
                    "seconds": clock.seconds,
                },
            )
        return explained

    # Stages.

    def by_ensemble(self, image_ids: Sequence[str], valid: np.ndarray) -> Iterator[tuple[LatentEnsemble, np.ndarray]]:
        """Each ensemble that explains some of the images, with their rows."""
        if not self.folds:
            groups = [(self.model.ensemble, valid)]
        else:
            fold = np.array([fold_of(image_id, len(self.folds)) for image_id in image_ids], int)
            groups = [(ensemble, valid & (fold == number)) for number, ensemble in enumerate(self.folds)]
        for ensemble, mask in groups:
            if mask.any():
                yield ensemble, np.flatnonzero(mask)

    def encode(self, ensemble: LatentEnsemble, shard: pa.Table, extra: pa.Table, clock: Clock) -> Encoded:
        """Encode readable images, reconstruct them, and predict their classes from their codes."""
        with clock("encode"):
            pixels = schema.matrix(shard["image"]).reshape(-1, *self.model.image_shape)
            x = to_float(pixels, self.device)
            z, log_var = encode_rows(self.model.vae, x)
            prediction = predict(logits_rows(ensemble, z))
            ids = shard["image_id"].combine_chunks()
            return Encoded(
                model=replace(self.model, ensemble=ensemble),
                image_id=ids,
                label=data.label_indices(shard["label_name"], self.model.class_names),
                label_name=shard["label_name"].combine_chunks(),
                extra=extra,
                pixels=pixels,
                x=x,
                z=z,
                log_var=log_var,
                noise=torch.from_numpy(draw_noise(ids.to_pylist(), self.model.latent_dim)).to(self.device),
                reconstruction=decode_rows(self.model.vae, z),
                prediction=prediction,
                source=prediction.probs.argmax(1).astype(np.int32),
            )

    def ask(self, encoded: Encoded) -> Asked:
        """Pair each image with each wanted target that is not its predicted class."""
        chosen = np.ones(len(encoded.source), bool)
        if self.only == "misclassified":
            label = encoded.label.fill_null(-1).to_numpy(zero_copy_only=False)
            chosen = (label >= 0) & (label != encoded.source)
        images = [np.flatnonzero(chosen & (encoded.source != target)) for target in self.targets]
        image = np.concatenate([np.zeros(0, np.int64), *images])
        target = np.repeat(np.array(self.targets, np.int64), [len(rows) for rows in images])
        index = torch.from_numpy(image).to(self.device)
        x, z, log_var, noise = (tensor[index] for tensor in (encoded.x, encoded.z, encoded.log_var, encoded.noise))
        return Asked(image, target, Pairs(x, z, log_var, noise, torch.from_numpy(target).to(self.device)))

    def search(self, model: Model, pairs: Pairs, config: SearchConfig | None = None, **run: Any) -> Counterfactuals:
        """Search pairs by the explainer's method and engine."""
        run = {"engine": self.engine, "threads": self.threads} | run
        return METHODS[self.method].search(model, pairs, config or self.config, **run)

    def write(self, encoded: Encoded, asked: Asked, points: Tensor, clock: Clock) -> Written:
        """Decode points to 8-bit images, and predict what those show; a few pairs at a time."""
        latent = METHODS[self.method].space == "latent"
        image = torch.from_numpy(asked.image).to(self.device)
        pixels, distances, codes, probs, judge_probs = [], [], [], [], []
        for start in range(0, len(points), CHUNK):
            rows = slice(start, start + CHUNK)
            with clock("decode"):
                x_cf = decode_rows(self.model.vae, points[rows]) if latent else points[rows]
                pixels.append(quantise(x_cf))
                distances.append(l1(x_cf, encoded.reconstruction[image[rows]]))
            with clock("reencode"):
                codes.append(encode_rows(self.model.vae, to_float(pixels[-1], self.device))[0])
                probs.append(mean_probs(logits_rows(encoded.model.ensemble, codes[-1])))
            if encoded.model.judge is not None:
                with clock("judge"):
                    judge_probs.append(judge_rows(encoded.model.judge, to_float(pixels[-1], self.device)))
        return Written(
            pixels=np.concatenate(pixels),
            distance_x_l1=np.concatenate(distances),
            z=torch.cat(codes),
            probs=np.concatenate(probs),
            judge_probs=np.concatenate(judge_probs) if judge_probs else None,
        )

    # Tables.

    def code_rows(self, encoded: Encoded) -> pa.Table:
        """Rows of ``codes`` for images that could be read."""
        count, prediction = len(encoded.source), encoded.prediction
        columns = {
            "image_id": encoded.image_id,
            "label": encoded.label,
            "label_name": encoded.label_name,
            "source": encoded.source,
            "source_name": self.class_name(encoded.source),
            "probs": schema.fixed_size_list(prediction.probs),
            "predictive": prediction.predictive,
            "aleatoric": prediction.aleatoric,
            "epistemic": prediction.epistemic,
            "z": schema.fixed_size_list(to_numpy(encoded.z)),
            "reconstruction_l1": l1(encoded.reconstruction, encoded.x),
            "status": ["ok"] * count,
            "error": pa.nulls(count, pa.string()),
            "x": self.raw_column(encoded.pixels),
        }
        return to_table(self.codes_schema(encoded.extra), columns | column_dict(encoded.extra))

    def error_rows(self, shard: pa.Table, extra: pa.Table, rows: np.ndarray) -> pa.Table:
        """Rows of ``codes`` for images that could not be read."""
        shard, extra = shard.take(rows), extra.take(rows)
        expected = self.codes_schema(extra)
        columns = dict.fromkeys(expected.names, [None] * len(rows)) | column_dict(extra)
        columns |= {name: shard[name] for name in ("image_id", "label_name", "error")}
        columns["label"] = data.label_indices(shard["label_name"], self.model.class_names)
        columns["status"] = ["error"] * len(rows)
        return to_table(expected, columns)

    def pair_rows(self, encoded: Encoded, asked: Asked, found: Counterfactuals, written: Written) -> pa.Table:
        """Rows of ``counterfactuals``."""
        pair, target = np.arange(len(asked.target)), asked.target.astype(np.int32)
        initial, final = self.predict_start(encoded), self.predict_points(encoded.model, found.point)
        z_cf = found.point if METHODS[self.method].space == "latent" else written.z
        judged = written.judge_probs
        single, no_values = METHODS[self.method].classifier.endswith("member"), pa.nulls(len(pair), pa.float32())
        columns = {
            "image_id": encoded.image_id.take(pa.array(asked.image)),
            "label": encoded.label.take(pa.array(asked.image)),
            "source": encoded.source[asked.image],
            "source_name": self.class_name(encoded.source[asked.image]),
            "target": target,
            "target_name": self.class_name(target),
            "method": [self.method] * len(pair),
            "status": np.where(to_numpy(found.finite), "ok", "nonfinite"),
            "converged": to_numpy(found.converged),
            "steps": to_numpy(found.steps),
            "target_prob_initial": to_numpy(found.target_prob_initial),
            "target_prob_final": to_numpy(found.target_prob_final),
            "predictive_initial": initial.predictive[asked.image],
            "aleatoric_initial": initial.aleatoric[asked.image],
            "epistemic_initial": no_values if single else initial.epistemic[asked.image],
            "predictive_final": final.predictive,
            "aleatoric_final": final.aleatoric,
            "epistemic_final": no_values if single else final.epistemic,
            "distance_z_l1": l1(z_cf, asked.pairs.z),
            "distance_z_l2": l2(z_cf, asked.pairs.z),
            "distance_x_l1": written.distance_x_l1,
            "reencoded_class": written.probs.argmax(1).astype(np.int32),
            "reencoded_target_prob": written.probs[pair, target],
            "judge_class": [None] * len(pair) if judged is None else judged.argmax(1).astype(np.int32),
            "judge_target_prob": no_values if judged is None else judged[pair, target],
            "z_cf": schema.fixed_size_list(to_numpy(z_cf)),
            "x_cf": self.raw_column(written.pixels),
        }
        return to_table(schema.counterfactuals_schema(self.model.latent_dim), columns)

    def trace_rows(self, encoded: Encoded, asked: Asked, image_ids: set[str]) -> pa.Table:
        """Rows of ``traces``: pairs of some images, searched again by the plain engine, which shows its steps."""
        chosen = np.flatnonzero(np.isin(encoded.image_id.to_pylist(), sorted(image_ids))[asked.image])
        index = torch.from_numpy(chosen).to(self.device)
        expected = schema.traces_schema(self.model.latent_dim)
        tables = [expected.empty_table()]

        def on_step(steps: Tensor, rows: Tensor, point: Tensor, target_prob: Tensor, logits: Tensor) -> None:
            pair, uncertainty = chosen[to_numpy(rows)], decompose(logits)
            z = point if point.dim() == 2 else encode_rows(self.model.vae, point)[0]
            columns = {
                "image_id": encoded.image_id.take(pa.array(asked.image[pair])),
                "source": encoded.source[asked.image[pair]],
                "target": asked.target[pair].astype(np.int32),
                "step": to_numpy(steps).astype(np.int32),
                "target_prob": to_numpy(target_prob),
                "predictive": to_numpy(uncertainty.predictive),
                "aleatoric": to_numpy(uncertainty.aleatoric),
                "epistemic": to_numpy(uncertainty.epistemic) if len(logits) > 1 else [None] * len(pair),
                "z": schema.fixed_size_list(to_numpy(z)),
            }
            tables.append(to_table(expected, columns))

        if len(chosen):
            pairs = asked.pairs.select(index)
            self.search(encoded.model, pairs, on_step=on_step)
        return pa.concat_tables(tables)

    def predict_points(self, model: Model, points: Tensor) -> Prediction:
        """What the method's own classifier predicts at points of its space."""
        return predict(classifier_logits(model, self.method, points))

    def predict_start(self, encoded: Encoded) -> Prediction:
        """What the method's own classifier predicts where the search of each image starts, whatever the target."""
        if self.method == "clarity":
            return encoded.prediction
        target = torch.zeros(len(encoded.source), dtype=torch.int64, device=self.device)
        pairs = Pairs(encoded.x, encoded.z, encoded.log_var, encoded.noise, target)
        # A search of no step ends where it starts.
        start = self.search(encoded.model, pairs, replace(self.config, max_steps=0))
        return self.predict_points(encoded.model, start.point)

    def raw_column(self, pixels: np.ndarray) -> pa.Array:
        """Raw pixels as a binary column, until ``encode_png_column``; null where no images are wanted."""
        if self.images == "none":
            return pa.nulls(len(pixels), pa.binary())
        flat = schema.fixed_size_list(pixels.reshape(len(pixels), -1))
        size = flat.type.list_size
        return pa.Array.from_buffers(pa.binary(size), len(flat), [None, flat.values.buffers()[1]]).cast(pa.binary())

    def class_name(self, classes: np.ndarray) -> pa.Array:
        """Names of class indices."""
        return pa.array(self.model.class_names, pa.string()).take(pa.array(classes))

    def codes_schema(self, extra: pa.Table) -> pa.Schema:
        """Schema of this model's ``codes`` with further columns."""
        return schema.codes_schema(self.model.num_classes, self.model.latent_dim, extra.schema)


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


def require_classifier(model: Model, method: str) -> None:
    """Raise ValueError when a method needs image classifiers and the model has none."""
    if METHODS[method].classifier.startswith("image") and model.image_ensemble is None:
        raise ValueError(
            f"method {method!r} needs image classifiers, which this model lacks; train it with image_members above 0"
        )


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
    return np.abs(to_numpy(a) - to_numpy(b)).reshape(len(a), -1).sum(1)


def l2(a: Tensor, b: Tensor) -> np.ndarray:
    """Euclidean distance of each row of a to its row of b."""
    return np.sqrt(np.square(to_numpy(a) - to_numpy(b)).reshape(len(a), -1).sum(1))
