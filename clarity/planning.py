"""Plan an audit: select images and targets, check the request, and measure speed and size on a few images."""

import dataclasses
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

import clarity
from clarity import data, schema, storage
from clarity.audit.commits import to_parquet
from clarity.audit.plan import MAX_SHARD_ROWS, Plan, shard_table
from clarity.audit.summary import describe_foreign_labels
from clarity.checks import Requirements, kept_heads, require_judge
from clarity.explainer import explainer_of
from clarity.findings.statistics import share_interval
from clarity.findings.verdict import describe_other
from clarity.ids import sample
from clarity.images import Preprocessing
from clarity.methods import METHODS, ensemble_of
from clarity.model import Model, load_model
from clarity.predictor import BATCH_TOLERANCE, Predictor, batch_difference
from clarity.report.text import plural
from clarity.search import SearchConfig
from clarity.worker import pack

#: Raw bytes of rows that an actor finds, by a search over latent classifiers, in about the time that its start takes.
START_BYTES = 8 << 20
#: Of more images than these, some are read before a run: where none can be, none is explained.
LOOKED_AT = 64
#: Images of other labels than the commonest from which a predictor that guesses is warned of, as chance is always right
#: where there is one label; images of a label from which one that sees another class in most is; labels shown then.
LEAST_OTHERS, LEAST_ALIKE, SHOWN = 10, 3, 4


def select_images(listing: pa.Table, where: Sequence[str] = (), limit: int | None = None) -> tuple[pa.Table, str]:
    """Select images of a listing; also returns which of them get pairs: ``all`` or the ``misclassified``.

    ``where`` are conditions, all of which must hold: label=A,B (names), ids=FILE (one id a line), misclassified.
    ``limit`` keeps a fixed sample of the rest. ValueError: an unknown condition, label or id; or nothing is left.
    """
    only = "all"
    for condition in where:
        kind, _, value = condition.partition("=")
        if kind == "misclassified" and not value:
            only = "misclassified"
        elif kind == "label" and value:
            known = listing["label_name"].unique().drop_null().to_pylist()
            names = [value] if value in known else value.split(",")  # a name may hold commas itself
            if unknown := sorted(set(names) - set(known)):
                raise ValueError(f"where: no image has the label {unknown[0]!r}; there are {', '.join(sorted(known))}")
            listing = listing.filter(pc.is_in(listing["label_name"], pa.array(names)))
        elif kind == "ids" and value:
            names = storage.read_bytes(value).decode("utf-8-sig").splitlines()
            listing = listing.filter(pc.is_in(listing["image_id"], pa.array(names, pa.string())))
            if unknown := sorted(set(names) - set(listing["image_id"].to_pylist())):
                count = plural(len(unknown), f"id of {value} is", f"ids of {value} are")
                raise ValueError(f"where: {count} not in the data, the first {unknown[0]!r}")
        else:
            raise ValueError(f"where: expected label=NAME[,NAME...], ids=FILE or misclassified, got {condition!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    if not len(listing):
        raise ValueError("where: no image is left; drop a condition")
    if limit is not None:
        listing = listing.take(sample(listing["image_id"].to_pylist(), limit))
    return listing, only


def class_indices(names: Any, class_names: Sequence[str]) -> tuple[int, ...] | None:
    """Class indices of names or indices, sorted, None for "all"; ValueError for an unknown class, or none."""
    if names is None:
        return None
    wanted = [names] if isinstance(names, str | int | np.integer) else list(names)
    if wanted == ["all"]:
        return None
    found = set()
    for name in wanted:
        if isinstance(name, str) and name in class_names:
            found.add(list(class_names).index(name))
        elif isinstance(name, int | np.integer) and not isinstance(name, bool) and 0 <= name < len(class_names):
            found.add(int(name))
        else:
            hint = "; spaces separate names" if "," in str(name) else ""
            raise ValueError(f"unknown class {name!r}; choose from {', '.join(class_names)}{hint}")
    if not found:
        raise ValueError("expected at least one target, got none")
    return tuple(sorted(found))


def require_readable(dataset: data.Dataset, listing: pa.Table, preprocessing: Preprocessing) -> None:
    """Raise ValueError if none of LOOKED_AT images can be read; of fewer, the audit's rows say why they cannot."""
    if len(listing) <= LOOKED_AT:
        return
    rows = np.linspace(0, len(listing) - 1, LOOKED_AT).astype(int)
    reasons = data.read_images(dataset, listing.take(rows), preprocessing)["error"]
    if not reasons.null_count:
        raise ValueError(f"data: expected images, found none that can be read among {LOOKED_AT}: {reasons[0]}")


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
    shard_rows: int | None = None,
    where: Sequence[str] = (),
    checks: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan of an audit over the images of a listing, in shards of ``shard_rows`` images.

    ``checks`` are those of ``make_checks``. Where the model has folds, each image that it may have been trained on is
    explained by the ensemble of the fold that has not seen it; images of other data by the ensemble.

    ValueError: what is asked for does not fit the model, or none of many images can be read.
    """
    ensemble_of(model, method)  # or ValueError
    require_readable(dataset, listing, model.preprocessing)
    if trace < 0:
        raise ValueError(f"trace: expected at least 0 images, got {trace}")
    checks = dict(checks or {})
    kept_heads(model, method, checks.get("keep", ()))
    indices = class_indices(targets, model.class_names)
    trained, notes = trained_on(model, dataset), data.notes(listing)
    if trained is None:
        where = model.card["data"]["uri"] or model.card["data"]["source"]
        notes.append(
            f"the model was trained on other data ({where}): whether that holds some of these images, under other ids, "
            "is unknown, whatever their split"
        )
    num_folds = len(model.folds) if trained else 0
    needed = {
        "image_ensemble.safetensors": METHODS[method].classifies_images,
        "folds.safetensors": num_folds > 0,
        "judge.safetensors": True,
        "attributes.safetensors": "keep" in checks,
    }
    sums = {name: about["sha256"] for name, about in model.card.get("files", {}).items() if needed.get(name)}

    def digest_of(column: pa.ChunkedArray) -> str:
        return hashlib.sha256(pack(pa.table({"": column.combine_chunks()}))).hexdigest()[:16]

    extra = [field for field in listing.schema if field.name not in data.LISTING_COLUMNS]
    return Plan(
        dataset={
            "source": dataset.source,
            "data": storage.display(dataset.data or ""),
            "split": dataset.split,
            "where": list(where),
            "num_images": len(listing),
            "listing": data.listing_fingerprint(listing.select(list(data.LISTING_COLUMNS))),
            "extra": [[field.name, str(field.type), digest_of(listing[field.name])] for field in extra],
            "left_out": data.left_out(listing),
            "notes": notes,
            "trained": trained,
            **({"columns": dict(dataset.columns)} if dataset.columns else {}),
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
        shards=shard_table(listing["image_id"], MAX_SHARD_ROWS if shard_rows is None else shard_rows),
        only=only,
        trace=trace,
        versions={
            "clarity": clarity.__version__,
            "torch": str(torch.__version__),  # a str: unpickling the class would load torch
            "numpy": np.__version__,
            "pyarrow": pa.__version__,
        },
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        checks=checks,
    )


def trained_on(model: Model, dataset: data.Dataset) -> bool | None:
    """Whether a model was trained on images of a data set, by its card; None where that is unknown, as of other data.

    Image ids tell only where the data is that of the training: it lies there, or its listing is the same elsewhere.
    """
    known = model.card.get("data") or {}
    if "fingerprint" not in known:  # a model without its history: its training split is assumed to be called train
        return dataset.split in ("train", "all")
    uri = None if dataset.data is None else storage.display(dataset.data)
    if (dataset.source, uri) != (known["source"], known["uri"]):
        try:
            listing = data.list_images(replace(dataset, split=known["split"], attributes=(), unlabelled=True))
        except ValueError:  # as it has no such split
            return None
        if data.listing_fingerprint(listing) != known["fingerprint"]:
            return None
    return dataset.split == known["split"] or "all" in (dataset.split, known["split"])


def shared_engine(engine: str, method: str, offered: Sequence[Sequence[str]], kept: str | None) -> str:
    """The engine of a run on several machines: builds of one engine round differently, and an audit takes one.

    ``offered`` are ``search.cpu_engines`` of each machine, fastest first; none where the search runs on GPUs. ``kept``
    is the engine of the shards that are there, which goes on where all machines have it.
    """
    if engine != "auto" or not offered or METHODS[method].classifies_images:
        return engine
    common = [name for name in offered[0] if all(name in names for names in offered)]
    return kept if kept in common else common[0]


def make_checks(
    model: Model,
    config: SearchConfig,
    requirements: Requirements,
    predictor: Predictor | None = None,
    by_class: bool = False,
    keep: Sequence[str] = (),
) -> dict[str, Any]:
    """What a plan's counterfactuals must satisfy beside its config; ``by_class`` gives each class its own threshold."""
    checks: dict[str, Any] = {}
    if by_class:
        checks["min_target_probs"] = class_thresholds(model, config.min_target_prob)
    require_judge(model, requirements.min_judge_prob)
    for name in ("min_reencoded_prob", "min_judge_prob"):
        if value := getattr(requirements, name):
            checks[name] = value
    if predictor is not None:
        predictor.ordered(model.class_names)
        checks |= {"predictor": predictor.digest, "min_predictor_prob": requirements.min_predictor_prob}
    if keep:
        checks["keep"] = list(keep)
    return checks


def describe_inputs(
    model: Model, plan: Plan, predictor: Predictor | None, dataset: data.Dataset, listing: pa.Table
) -> str:
    """What a run says, before it starts, of labels, thresholds, kept attributes and a predictor: a line each."""
    names, told = listing["label_name"].drop_null(), []
    if len(names) and not pc.any(pc.is_in(names, pa.array(model.class_names))).as_py():
        told.append(f"WARNING    {describe_foreign_labels(len(names), plan)}")
    if thresholds := plan.checks.get("min_target_probs"):
        by_class = sorted(zip(thresholds, model.class_names))
        (low, lowest), (high, highest) = by_class[0], by_class[-1]
        told.append(f"thresholds {low:.3f} ({lowest}) to {high:.3f} ({highest}); plan.json holds that of each class")
    if plan.keep:
        told.append(describe_kept(model, plan.keep))
    if predictor is not None:
        told.append(describe_predictor(predictor, dataset, listing, model.preprocessing))
        if (taught := model.card.get("predictor", {})).get("digest", predictor.digest) != predictor.digest:
            told.append(f"WARNING    {describe_other(taught['name'])}")
    return "".join(f"{text}\n" for text in told)


def describe_kept(model: Model, keep: Sequence[str]) -> str:
    """How well the heads of kept attributes know them, as text: what a head does not know is not kept."""
    known = model.card.get("metrics", {}).get("attributes", {})
    figures = {name: known.get(name, {}).get("balanced_accuracy") for name in keep}
    told = [name if right is None else f"{name} (balanced accuracy {right:.1%})" for name, right in figures.items()]
    return f"keeping    {', '.join(told)}, as far as the code knows them"


def describe_predictor(
    predictor: Predictor, dataset: data.Dataset, listing: pa.Table, preprocessing: Preprocessing
) -> str:
    """What a predictor sees in some images, so that wrong preprocessing or a wrong order of classes shows, as text."""
    names, own = predictor.class_names, predictor.preprocessing
    known = listing.filter(pc.is_in(listing["label_name"], pa.array(names)))
    rows = known if len(known) else listing
    some = rows.take(pa.array(sample(rows["image_id"].to_pylist(), LOOKED_AT), pa.int64()))
    images = data.read_images(dataset, some, predictor.sees(preprocessing))
    images = images.filter(images["image"].is_valid())
    if not len(images):
        return f"predictor  {predictor.name}, none of {plural(len(some), 'image')} can be read"
    pixels = schema.matrix(images["image"]).reshape(-1, *own.image_shape)
    probs = predictor.predict(pixels)
    given = ~np.isnan(probs).any(1)
    if not given.any():
        raise ValueError(
            f"predictor: expected {predictor.name} to answer probabilities, got NaN or an infinity for each of "
            f"{plural(len(images), 'image')}, such as {images['image_id'][0]}"
        )
    unanswered = images["image_id"].filter(pa.array(~given)).to_pylist()
    images, pixels, probs = images.filter(pa.array(given)), pixels[given], probs[given]
    best = [f"{names[k]} {probs[0, k]:.3f}" for k in np.argsort(-probs[0], kind="stable")[:3]]
    label = f"label {images['label_name'][0]}" if images["label_name"][0].is_valid else "no label"
    lines = [f"predictor  {predictor.name}: image {images['image_id'][0]} ({label}) is {', '.join(best)}"]
    if own.image_shape != preprocessing.image_shape:
        theirs, ours = (
            f"{shape[1]} x {shape[2]} in {'colour' if shape[0] == 3 else 'grey'}"
            for shape in (own.image_shape, preprocessing.image_shape)
        )
        lines.append(f"{'':<10} sees {theirs}: pictures, of {ours}, are converted for it")
    if len(known):
        labels = np.array([names.index(name) for name in images["label_name"].to_pylist()])
        lines += describe_answers(predictor.name, names, labels, probs.argmax(1))
    if unanswered:
        lines.append(
            f"WARNING    {predictor.name} answers NaN or an infinity for {plural(len(unanswered), 'image')}, such as "
            f"{unanswered[0]}: such images are not explained"
        )
    if (difference := batch_difference(predictor, pixels)) > BATCH_TOLERANCE:
        lines.append(
            f"WARNING    {predictor.name} answers differently by {difference:.2g} for an image alone and among others: "
            "the same image may get another answer in another run (does a network in PyTorch miss eval()?)"
        )
    return "\n".join(lines)


def describe_answers(name: str, class_names: Sequence[str], labels: np.ndarray, seen: np.ndarray) -> list[str]:
    """How many labels of some images a predictor sees, and a warning where they look like those of another order."""
    right, count = int((labels == seen).sum()), len(labels)
    lines = [f"{'':<10} sees the label in {right} of {plural(count, 'labelled image')}"]
    shares = [np.bincount(classes, minlength=len(class_names)) / count for classes in (labels, seen)]
    found = np.zeros((len(class_names),) * 2, int)
    np.add.at(found, (labels, seen), 1)
    others = [
        f"{class_names[k]} as {class_names[other]}"
        for k, other in enumerate(found.argmax(1))
        if other != k
        and found[k].sum() >= LEAST_ALIKE
        and 2 * found[k, other] > found[k].sum()
        # Another order moves the other class, too; where it stays, a few hard images are no evidence.
        and (2 * found[other, other] <= found[other].sum() or share_interval(found[k, other], found[k].sum())[0] > 0.5)
    ]
    rest = count - int(found.sum(1).max())
    if rest >= LEAST_OTHERS and share_interval(right, count)[0] <= float(np.dot(*shares)):
        lines.append(
            f"WARNING    {name} may be right no more often than by chance: check the order of its classes and what it "
            "expects of pixels"
        )
    elif others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        lines.append(
            f"WARNING    {name} sees most images of one label as another class ({', '.join(others[:SHOWN])}{more}): "
            "check the order of its classes and what it expects of pixels"
        )
    return lines


def class_thresholds(model: Model, limit: float) -> list[float]:
    """Thresholds for the target probability that real images of each class reach, from the model's card.

    The 90th percentile of what held-out images of the class got in training, at most ``limit``, and at least 0.5, so
    that the ensemble predicts the target.
    """
    known = model.card.get("target_probs", {}).get("p90")
    if known is None:
        raise ValueError(
            "min_target_prob: auto needs the held-out images' probabilities, which this model's card lacks: "
            "train it again, or give a number"
        )
    # Null where no held-out image had the class.
    return [limit if value is None else max(0.5, min(limit, value)) for value in known]


def probe(
    plan: Plan, model_uri: str, dataset: data.Dataset, listing: pa.Table, predictor: str | None = None, **options: Any
) -> dict[str, Any]:
    """Explain the images of a listing to measure seconds and bytes per image, pairs per second, and the engine.

    A method with image classifiers is measured by one update, extrapolated to a hundred per pair.
    """
    model, slow = load_model(model_uri), METHODS[plan.method].classifies_images
    if slow:
        plan = replace(plan, config=plan.config | {"max_steps": 1})
    explainer = explainer_of(plan, model, predictor, **options)
    images = data.read_images(dataset, listing, model.preprocessing)
    explainer.search_shard(images.slice(0, 2))  # warm up: the first call compiles and allocates
    start = time.perf_counter()
    explained = explainer.explain_shard(images)
    seconds = time.perf_counter() - start
    if slow:
        search = explained.stats["seconds"].get("search", 0.0)
        seconds += search / 2 * 100 - search  # of one update, which evaluates its objective twice
    size = sum(len(to_parquet(table)) for table in (explained.codes, explained.counterfactuals))
    return {
        "seconds_per_image": seconds / len(listing),
        "bytes_per_image": size / len(listing),
        "pairs_per_second": explained.stats["pairs"] / seconds,
        "engine": explained.stats["engine"],
    }


def useful_actors(plan: Plan, model: Model, shards: Sequence[int]) -> int:
    """How many actors some shards are worth: one each, but fewer, or none, where searching takes less than a start."""
    if METHODS[plan.method].classifies_images or plan.requires_checks:
        return len(shards)
    images = sum(plan.shards[shard]["stop"] - plan.shards[shard]["start"] for shard in shards)
    starts = images * raw_bytes_per_image(model, plan.pairs_per_image) / START_BYTES
    return min(len(shards), math.ceil(starts)) if starts > 1 else 0


def raw_bytes_per_image(model: Model, num_targets: int) -> float:
    """Upper bound of the bytes of an image's rows before compression."""
    pixels = int(np.prod(model.image_shape))
    return (1 + num_targets) * (pixels + 4 * model.latent_dim + 160)
