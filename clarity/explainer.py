"""Explains a shard of images: encode, pair each with its targets, search, decode to 8 bits, check, build tables."""

import copy
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from clarity import data, schema
from clarity.audit.plan import Plan
from clarity.checks import Requirements, at_least, kept_heads, passes, require_judge, search_again
from clarity.classifiers import LatentEnsemble
from clarity.ids import fold_of
from clarity.ids import noise as draw_noise
from clarity.images import encode_png_column
from clarity.judges import judge_rows
from clarity.methods import METHODS, Pairs, classifier_logits, ensemble_of
from clarity.model import Model, load_model
from clarity.predictor import load_predictor
from clarity.rows import (
    decode_rows,
    encode_rows,
    logits_rows,
    mean_probs,
    one_thread,
    uncertainties,
)
from clarity.search import Counterfactuals, SearchConfig
from clarity.tables import (
    Asked,
    Encoded,
    Results,
    Written,
    code_rows,
    column_dict,
    error_rows,
    l1,
    pair_rows,
    prediction_columns,
    quantise,
    sort,
    to_float,
    to_numpy,
    to_table,
)
from clarity.uncertainty import Uncertainty, decompose

#: Pairs decoded at a time. Bounds the memory of float images; does not change any row.
CHUNK = 2048


@dataclass(frozen=True)
class Explained:
    """The tables of a shard, and ``stats``: engine, device, threads, seconds by stage."""

    codes: pa.Table
    counterfactuals: pa.Table
    stats: dict[str, Any]
    traces: pa.Table | None = None


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time spent inside to the seconds of a stage."""
    start = time.perf_counter()
    yield
    seconds[stage] += time.perf_counter() - start


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
        min_target_probs: a threshold for each of the K classes as a target; None for the config's min_target_prob.
        min_reencoded_prob: the probability that the ensemble must give the target on the written image, encoded again;
            0 for no such check. Pairs that fail continue on further rungs.
        predictor: the user's own model, which is then the explained model: see ``load_predictor``. Its prediction is
            the ``source``, and each written image must be its target class with ``min_predictor_prob``.
        min_judge_prob: the probability that the model's judge must give the target on the written image; 0 for no such
            check.
        min_predictor_prob: the probability that the predictor must give the target on the written image.
        keep: attributes of the model's heads whose logits no search changes.
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
        min_target_probs: Sequence[float] | None = None,
        min_reencoded_prob: float = 0.0,
        predictor: Any = None,
        min_judge_prob: float = 0.0,
        min_predictor_prob: float = 0.5,
        keep: Sequence[str] = (),
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
        ensemble_of(model, method)  # or ValueError
        self.kept = kept_heads(model, method, keep)
        self.fixed = None if self.kept is None else self.kept.directions()
        if min_target_probs is not None and len(min_target_probs) != model.num_classes:
            raise ValueError(f"min_target_probs: expected {model.num_classes} thresholds, got {len(min_target_probs)}")
        self.folds = model.folds if by_fold else ()
        self.min_target_probs = min_target_probs
        Requirements(min_reencoded_prob, min_judge_prob, min_predictor_prob)
        require_judge(model, min_judge_prob)
        self.predictor = None if predictor is None else load_predictor(predictor, device).ordered(model.class_names)
        self.checks = [at_least("probs", min_reencoded_prob)] if min_reencoded_prob else []
        if min_judge_prob:
            self.checks.append(at_least("judge_probs", min_judge_prob))
        if self.predictor is not None:
            self.checks.append(at_least("predictor_probs", min_predictor_prob, likeliest=True))

    def explain_shard(self, shard: pa.Table, trace: int = 0) -> Explained:
        """Explain a shard (``schema.shard_schema``): its codes sorted by image_id, its pairs by (target, image_id).

        The search paths of the first ``trace`` images are recorded.
        """
        explained = self.search_shard(shard, trace)
        shape = self.model.image_shape
        codes = encode_png_column(explained.codes, "x", shape)
        pairs = encode_png_column(explained.counterfactuals, "x_cf", shape)
        return replace(explained, codes=codes, counterfactuals=pairs)

    def search_shard(self, shard: pa.Table, trace: int = 0) -> Explained:
        """``explain_shard`` without PNG encoding: the columns ``x`` and ``x_cf`` hold raw pixels."""
        seconds, engine = defaultdict[str, float](float), None
        codes = []
        num_kept = 0 if self.kept is None else len(self.kept.names)
        pairs = [schema.counterfactuals_schema(self.model.latent_dim, num_kept=num_kept).empty_table()]
        traces = [schema.traces_schema(self.model.latent_dim).empty_table()]
        with one_thread(self.threads):
            shard, predicted = self.predict_images(shard, seconds)
            valid = shard["error"].is_null().to_numpy(zero_copy_only=False)
            codes.append(error_rows(self.model, shard.filter(pa.array(~valid)), predicted is not None))
            for ensemble, rows in self.by_ensemble(shard["image_id"].to_pylist(), valid):
                probs = None if predicted is None else predicted[rows]
                encoded = self.encode(ensemble, shard.take(rows), probs, seconds)
                codes.append(code_rows(encoded, self.images))
                asked = self.ask(encoded)
                if not len(asked.target):
                    continue
                results = self.find(encoded, asked, seconds)
                engine = results.found.engine
                with timed(seconds, "predict"):
                    initial = self.predict_start(encoded)
                    final = uncertainties(classifier_logits(encoded.model, self.method, results.found.point))
                with timed(seconds, "table"):
                    ends = (results, initial, final)
                    pairs.append(pair_rows(self.method, encoded, asked, *ends, self.images, self.kept))
                if traced := set(shard["image_id"][:trace].to_pylist()):
                    with timed(seconds, "trace"):
                        traces.append(self.trace_rows(encoded, asked, traced))
        with timed(seconds, "table"):
            counterfactuals = sort(pairs, "target", "image_id")
            final = counterfactuals["target_prob_final"].drop_null().to_numpy()
            return Explained(
                codes=pa.concat_tables(codes).sort_by("image_id"),
                counterfactuals=counterfactuals,
                traces=sort(traces, "target", "image_id", "step") if trace else None,
                stats={
                    "engine": engine,
                    "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
                    "threads": self.threads,
                    "images": len(shard),
                    "pairs": len(counterfactuals),
                    "converged": pc.sum(counterfactuals["converged"]).as_py() or 0,
                    "reach": float(np.quantile(final, 0.05)) if len(final) else None,
                    "seconds": seconds,
                },
            )

    def by_ensemble(self, image_ids: Sequence[str], valid: np.ndarray) -> Iterator[tuple[LatentEnsemble, np.ndarray]]:
        """Each ensemble that explains some of the images, with their rows."""
        ensembles = self.folds or (self.model.ensemble,)
        fold = np.array([fold_of(image_id, len(ensembles)) for image_id in image_ids], int)
        for number, ensemble in enumerate(ensembles):
            if len(rows := np.flatnonzero(valid & (fold == number))):
                yield ensemble, rows

    def predict_images(self, shard: pa.Table, seconds: dict[str, float]) -> tuple[pa.Table, np.ndarray | None]:
        """The shard, with an error for each image to which the predictor has no answer, and its answers (N, K)."""
        if self.predictor is None:
            return shard, None
        column, shape = "image", self.model.image_shape
        if schema.PREDICTOR_IMAGE in shard.column_names:
            column, shape = schema.PREDICTOR_IMAGE, self.predictor.preprocessing.image_shape
        readable = shard["error"].is_null()
        probs = np.full((len(shard), self.model.num_classes), np.nan, np.float32)
        with timed(seconds, "predictor"):
            pixels = schema.matrix(shard[column].filter(readable)).reshape(-1, *shape)
            probs[readable.to_numpy()] = self.predictor.predict(pixels, self.threads)
        unanswered = pc.and_(readable, pa.array(np.isnan(probs).any(1)))
        error = pc.if_else(unanswered, "the predictor answers NaN or an infinity", shard["error"])
        return shard.set_column(shard.column_names.index("error"), shard.schema.field("error"), error), probs

    def encode(
        self, ensemble: LatentEnsemble, shard: pa.Table, predicted: np.ndarray | None, seconds: dict[str, float]
    ) -> Encoded:
        """Encode images, reconstruct them, and predict their classes from their codes.

        ``predicted`` (B, K) are the predictor's answers, None where there is none.
        """
        with timed(seconds, "encode"):
            pixels = schema.matrix(shard["image"]).reshape(-1, *self.model.image_shape)
            x = to_float(pixels, self.device)
            z, log_var = encode_rows(self.model.vae, x)
            logits = logits_rows(ensemble, z)
            probs = mean_probs(logits)
            ids = shard["image_id"].combine_chunks()
            encoded = Encoded(
                model=replace(self.model, ensemble=ensemble),
                image_id=ids,
                label=data.label_indices(shard["label_name"], self.model.class_names),
                label_name=shard["label_name"].combine_chunks(),
                extra=schema.extra_columns(shard),
                pixels=pixels,
                x=x,
                z=z,
                log_var=log_var,
                noise=torch.from_numpy(draw_noise(ids.to_pylist(), self.model.latent_dim)).to(self.device),
                reconstruction=decode_rows(self.model.vae, z),
                probs=probs,
                uncertainty=uncertainties(logits),
                source=probs.argmax(1).astype(np.int32),
            )
        if self.predictor is None or predicted is None:
            return encoded
        with timed(seconds, "predictor"):
            redrawn = quantise(decode_rows(self.model.decoder, encoded.z))  # by the decoder that draws what is written
            return replace(
                encoded,
                extra=pa.table(column_dict(encoded.extra) | column_dict(prediction_columns(self.model, predicted))),
                source=predicted.argmax(1).astype(np.int32),
                predictor_probs=predicted,
                reconstruction_probs=self.predictor.predict(redrawn, self.threads),
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
        x, z, log_var, noise = (tensor[image] for tensor in (encoded.x, encoded.z, encoded.log_var, encoded.noise))
        pairs = Pairs(x, z, log_var, noise, torch.from_numpy(target).to(self.device))
        if self.min_target_probs is not None:
            thresholds = np.array(self.min_target_probs, np.float32)[target]
            pairs = replace(pairs, min_target_prob=torch.from_numpy(thresholds).to(self.device))
        return Asked(image, target, pairs)

    def find(self, encoded: Encoded, asked: Asked, seconds: dict[str, float]) -> Results:
        """Search pairs and write their images; those that fail a check continue, see ``checks.search_again``."""

        def search(pairs: Pairs, config: SearchConfig) -> Counterfactuals:
            with timed(seconds, "search"):
                return self.search(encoded.model, pairs, config)

        found = search(asked.pairs, self.config)
        write = partial(self.write, encoded, seconds)
        results = Results(found, write(asked, found.point), None, np.zeros(len(asked.target), np.int32))
        if not self.checks:
            return results
        confirmed = passes(self.checks, results.written, asked.target)
        doubtful = np.zeros(len(confirmed), bool)
        if self.predictor is not None:
            # Where the ensemble predicts the target at the start, a search proves little, and without a step nothing.
            doubtful = encoded.probs.argmax(1)[asked.image] == asked.target
            confirmed &= ~doubtful | (found.steps > 0).cpu().numpy()
        results = replace(results, confirmed=confirmed)
        return search_again(results, asked, self.config, self.checks, search, write, doubtful)

    def search(self, model: Model, pairs: Pairs, config: SearchConfig, **run: Any) -> Counterfactuals:
        """Search pairs by the explainer's method and engine."""
        run = {"engine": self.engine, "threads": self.threads, "fixed": self.fixed} | run
        return METHODS[self.method].search(model, pairs, config, **run)

    def write(self, encoded: Encoded, seconds: dict[str, float], asked: Asked, points: Tensor) -> Written:
        """Decode points to 8-bit images, and predict what those show; a few pairs at a time."""
        latent = METHODS[self.method].space == "latent"
        judge, pixels, distances, codes, probs, judge_probs = self.model.judge, [], [], [], [], []
        for start in range(0, len(points), CHUNK):
            rows = slice(start, start + CHUNK)
            with timed(seconds, "decode"):
                x_cf = decode_rows(self.model.vae, points[rows]) if latent else points[rows]
                distances.append(l1(x_cf, encoded.reconstruction[asked.image[rows]]))
                if latent and self.model.sharp is not None:
                    x_cf = decode_rows(self.model.sharp, points[rows])
                pixels.append(quantise(x_cf))
            with timed(seconds, "reencode"):
                codes.append(encode_rows(self.model.vae, to_float(pixels[-1], self.device))[0])
                probs.append(mean_probs(logits_rows(encoded.model.ensemble, codes[-1])))
            if judge is not None:
                with timed(seconds, "judge"):
                    judge_probs.append(judge_rows(judge, to_float(pixels[-1], self.device)))
        written = Written(
            pixels=np.concatenate(pixels),
            distance_x_l1=np.concatenate(distances),
            z=torch.cat(codes),
            probs=np.concatenate(probs),
            judge_probs=np.concatenate(judge_probs) if judge_probs else None,
        )
        if self.predictor is None:
            return written
        with timed(seconds, "predictor"):
            return replace(written, predictor_probs=self.predictor.predict(written.pixels, self.threads))

    def trace_rows(self, encoded: Encoded, asked: Asked, image_ids: set[str]) -> pa.Table:
        """Rows of ``traces``: pairs of some images, searched again by the plain engine, which shows its steps."""
        chosen = np.flatnonzero(np.isin(encoded.image_id.to_pylist(), sorted(image_ids))[asked.image])
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
            self.search(encoded.model, asked.pairs.select(chosen), self.config, on_step=on_step)
        return pa.concat_tables(tables)

    def predict_start(self, encoded: Encoded) -> Uncertainty[np.ndarray]:
        """Uncertainties of the method's own classifier at the start of each image's search."""
        if self.method == "clarity":
            return encoded.uncertainty
        target = torch.zeros(len(encoded.source), dtype=torch.int64, device=self.device)
        pairs = Pairs(encoded.x, encoded.z, encoded.log_var, encoded.noise, target)
        # A search of no step ends where it starts.
        start = self.search(encoded.model, pairs, replace(self.config, max_steps=0, refine=False))
        return uncertainties(classifier_logits(encoded.model, self.method, start.point))


def explainer_of(plan: Plan, model: Model, predictor: Any = None, **options: Any) -> Explainer:
    """The explainer that a plan describes, with its model and predictor; ``options`` replace those of the plan."""
    checks = dict(plan.checks)
    if "predictor" in checks:
        loaded = load_predictor(predictor, options.get("device", "cpu"))
        if loaded.digest != checks["predictor"]:
            raise ValueError(f"predictor: expected that of the plan, found another in {loaded.name}: restore it")
        checks["predictor"] = loaded
    planned = {"targets": plan.targets, "images": plan.images, "only": plan.only, **checks}
    planned["by_fold"] = bool(plan.model.get("num_folds"))
    return Explainer(model, plan.method, SearchConfig(**plan.config), **(planned | options))
