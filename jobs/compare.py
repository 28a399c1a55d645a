#!/usr/bin/env python
"""Every method of the paper on the same images, judged by the same nets: one table, the paper's figures, its claims.

Runs explain_all.py once for each method, then judges what the audits hold together with control rows and with
counterfactuals made elsewhere. The same command resumes: audits, judges, models and judged rows are kept under --out.
Exit codes: 0 complete, 1 incomplete (run it again), 2 bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clarity import data, storage
from clarity import model as checkpoints
from clarity.audit.commits import to_parquet
from clarity.audit.read import ATTRIBUTES_FILE
from clarity.ids import in_judges_half
from clarity.methods import METHODS
from clarity.paper import comparison, evaluators, metrics
from clarity.paper.comparison import CONTROLS, NAMES, Bench
from clarity.resources import job_path
from clarity.search import SearchConfig

JOBS = Path(__file__).resolve().parent
#: Pairs of a shard of a method with image classifiers.
SHARD_PAIRS = 144


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="digits", choices=list(data.SOURCES), help="source of the images (digits)")
    add("--data", help="where the images lie: a path or an s3:// URI, for every source but digits")
    add("--split", default="test", help="part of the data that is explained (test)")
    add("--attributes", nargs="+", default=[], metavar="NAME", help="train a net that judges these too; all: every one")
    add("--out", help="where everything is kept (runs/DATASET/compare)")
    add("--model", help="model directory (OUT/model, trained when missing)")
    add("--judges", help="judges' directory (OUT/judges, trained when missing)")
    add(
        "--flat-model",
        help="model with a 2-D latent space for Figure 10, trained when missing (digits: OUT/flat-model)",
    )
    add("--methods", nargs="+", default=["all"], metavar="METHOD", help=f"all, or some of {', '.join(METHODS)} (all)")
    add("--images", type=int, default=50, help="images to explain, as many of each class as there are; 0 for all (50)")
    add("--image-method-limit", type=int, help="images for the methods with image classifiers (as --images)")
    add("--image-members", type=int, default=10, help="image classifiers of a model that is trained here (10)")
    add("--audit", nargs="+", type=named, default=[], metavar="METHOD=URI", help="take this audit for the method")
    add("--external", nargs="+", type=named, default=[], metavar="NAME=URI",
        help="judge images made elsewhere too: npz or Parquet with image_id, target, image")  # fmt: skip
    for field in dataclasses.fields(SearchConfig):
        flag, kind = f"--{field.name.replace('_', '-')}", type(field.default)
        add(flag, type=kind, default=field.default, help=f"of the search ({field.default})")
    add("--speed-pairs", type=int, default=Bench.speed_pairs, help=f"pairs of a timed batch ({Bench.speed_pairs})")
    add("--draws", type=int, default=Bench.draws, help=f"of the bootstrap ({Bench.draws})")
    add("--no-figures", action="store_true", help="tables alone")
    add("--differences", action="store_true", help="difference maps in the grids of Tables 1 and 2")
    add("--formats", nargs="+", default=list(Bench.formats), choices=["png", "pdf", "svg"], help="of figures (png pdf)")
    return parser.parse_args(argv)


def named(text: str) -> tuple[str, str]:
    """NAME=URI as its two parts."""
    name, _, uri = text.partition("=")
    if not name or not uri:
        raise argparse.ArgumentTypeError(f"expected NAME=URI, found {text!r}")
    return name, uri


class JobFailed(RuntimeError):
    """Another job ended with an exit code that is not 0, which becomes ours."""

    def __init__(self, job: str, code: int) -> None:
        super().__init__(f"{job} ended with exit code {code}, see above")
        self.code = code if code > 0 else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, and turn what went wrong into an exit code."""
    args = parse(argv)
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:5.0f} s] {text}", file=sys.stderr, flush=True)

    try:
        return compare(args, say)
    except JobFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 1


def compare(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """The whole comparison, step by step; the exit code."""
    methods = list(METHODS) if args.methods == ["all"] else list(dict.fromkeys(args.methods))
    if unknown := [name for name in (*methods, *(name for name, _ in args.audit)) if name not in METHODS]:
        raise ValueError(f"unknown method {unknown[0]!r}: expected all, or some of {', '.join(METHODS)}")
    config = SearchConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(SearchConfig)})
    out = job_path(args.out, f"runs/{args.dataset}/compare", "--out")
    tested = data.open_dataset(args.dataset, args.data, args.split)
    unlabelled = bool(args.attributes) and args.dataset == "celeba_hair"
    trained = data.open_dataset(args.dataset, args.data, "train", attributes=args.attributes, unlabelled=unlabelled)

    model_uri = job_path(args.model, storage.join(out, "model"), "--model")
    train_model(args, model_uri, say, "--image-members", str(args.image_members), given=args.model is not None)
    model = checkpoints.load_model(model_uri)
    if lacking := [
        name for name in methods if METHODS[name].classifier.startswith("image") and not model.image_ensemble
    ]:
        raise ValueError(
            f"methods {', '.join(lacking)} need image classifiers, which {storage.display(model_uri)} lacks: train it "
            f"with --image-members, or choose --methods {' '.join(name for name in methods if name not in lacking)}"
        )
    bench = make_bench(args, model, config, out, trained, tested, say)

    audits, given = {}, dict(args.audit)
    samples: dict[int, str] = {}
    for method in methods:
        limit = args.image_method_limit if METHODS[method].classifier.startswith("image") else None
        count = args.images if limit is None else limit
        if method not in given and count not in samples:
            samples[count] = storage.join(out, f"sample-{count}.parquet")
            comparison.sample(tested, model.preprocessing, count, samples[count])
        audits[method] = given.get(method) or explain(method, samples[count], count, model_uri, bench)

    results = {method: comparison.results_of_audit(bench, method, uri) for method, uri in audits.items()}
    widest = max(results.values(), key=lambda found: len(found.of))
    chosen = comparison.chosen_images(list(results.values()))
    asked = comparison.only(widest, chosen)
    for name in CONTROLS:
        results[name] = comparison.control(bench, name, asked)
    for name, uri in args.external:
        if name in results:
            raise ValueError(f"--external {name}: the name is taken; choose another")
        results[name] = comparison.external(bench, name, uri, widest)
    tables = {name: comparison.judged(bench, found, chosen) for name, found in results.items()}

    for method, uri in (audits if bench.judges.attributes else {}).items():
        table = comparison.attribute_table(bench, results[method])
        storage.write_bytes(storage.join(uri, ATTRIBUTES_FILE), to_parquet(table))

    test_images = labelled(tested, model, say)
    found = comparison.measure(bench, results, tables, *test_images[:2])
    kinds = {name: result.kind for name, result in results.items()}
    rows = comparison.summary(bench, tables, kinds, found["speed"])
    flat = None if args.no_figures else flat_model(args, model, out, say)
    if not args.no_figures:
        found["figure 10"] = comparison.draw(bench, results, rows, widest.images, flat, test_images)
        storage.write_json(bench.place("measurements.json"), found)
    comparison.write_tables(bench, rows, found)
    say(f"written: {storage.display(storage.join(out, 'comparison.md'))}, .csv, .parquet, measurements.json, figures/")
    return 0


def run(job: str, *arguments: str) -> None:
    """Run another job as a command; what it prints is shown.

    Raises:
        JobFailed: it did not end with 0.
    """
    code = subprocess.run([sys.executable, str(JOBS / job), *arguments], stdout=sys.stderr).returncode
    if code:
        raise JobFailed(job, code)


def train_model(args: argparse.Namespace, uri: str, say: Callable[[str], None], *more: str, given: bool) -> None:
    """Train the model, unless it is there; one that the user named must be."""
    if storage.exists(storage.join(uri, "model.json")):
        return
    if given:
        raise ValueError(f"no model in {storage.display(uri)}: train it with jobs/train.py, or leave --model out")
    say(f"training {storage.display(uri)}")
    place = ["--data", args.data] if args.data else []
    run("train.py", "--dataset", args.dataset, *place, "--out", uri, *more)


def explain(method: str, sample: str, count: int, model_uri: str, bench: Bench) -> str:
    """The audit of a method on the sample, resumed where it was cut; its place."""
    out = bench.place("audits", method)
    bench.say(
        f"{NAMES.get(method, method)}: {bench.model.num_classes - 1} targets for each image of {Path(sample).name}"
    )
    fields = dataclasses.asdict(bench.config).items()
    search = [text for name, value in fields for text in (f"--{name.replace('_', '-')}", str(value))]
    place = ["--dataset", "parquet", "--data", sample, "--split", "test"]
    if count and METHODS[method].classifier.startswith("image"):
        # Enough pairs in each that few slots idle beside the longest search, enough shards to see and keep progress.
        enough = -(-SHARD_PAIRS // (bench.model.num_classes - 1))
        place += ["--shard-rows", str(min(enough, -(-count // 8)))]
    run("explain_all.py", *place, "--model", model_uri, "--out", out, "--method", method, "--no-report", *search)
    return out


def make_bench(
    args: argparse.Namespace,
    model: checkpoints.Model,
    config: SearchConfig,
    out: str,
    trained: data.Dataset,
    tested: data.Dataset,
    say: Any,
) -> Bench:
    """Read the training images, train the judges on their half unless they are there, and look at real images."""
    listing = data.list_images(trained)
    say(f"reading {len(listing)} training images")
    pixels, ids, labels, truth = read(trained, listing, model)
    uri = job_path(args.judges, storage.join(out, "judges"), "--judges")
    if storage.exists(storage.join(uri, evaluators.JUDGES_JSON)):
        found = evaluators.load_judges(uri)
    elif args.judges:
        raise ValueError(f"no judges in {storage.display(uri)}: leave --judges out, and they are trained")
    else:
        half = in_judges_half(ids)
        found = evaluators.build_judges(model.image_shape, model.class_names, trained.attributes)
        judged = dataclasses.replace(tested, attributes=trained.attributes)
        images, _, kinds, answers = read(judged, data.list_images(judged), model)
        known = kinds >= 0
        for report in evaluators.train_judges(
            found, pixels[half], labels[half], attributes=truth[half] if trained.attributes else None,
            held_out=(images[known], kinds[known]), held_out_attributes=answers[known] if trained.attributes else None,
        ):  # fmt: skip
            say("judges: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in report.items()))
        evaluators.save_judges(found, uri)
    if found.image_shape != model.image_shape or found.class_names != model.class_names:
        raise ValueError(
            f"judges in {storage.display(uri)} are of {found.image_shape} images and classes {found.class_names}, the "
            f"model of {model.image_shape} and {model.class_names}: give judges of the same data"
        )
    real = metrics.reality(found, pixels[labels >= 0], labels[labels >= 0])
    return Bench(
        model, found, real, config, out, data.listing_fingerprint(listing), args.draws, args.speed_pairs,
        tuple(args.formats), args.differences, say,
    )  # fmt: skip


def read(
    dataset: data.Dataset, listing: pa.Table, model: checkpoints.Model
) -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray]:
    """Images that can be read, their ids, classes (B,) and attributes (B, A); -1 where one is unknown."""
    pixels, ids, names, _ = data.read_all(dataset, listing, model.preprocessing)
    labels = data.label_indices(pa.array(names, pa.string()), model.class_names).fill_null(-1).to_numpy()
    row = {name: place for place, name in enumerate(listing["image_id"].to_pylist())}
    taken = listing.take(pa.array([row[name] for name in ids], pa.int64()))
    columns = [taken[name].fill_null(-1).to_numpy() for name in dataset.attributes]
    return pixels, ids, labels, np.stack(columns, axis=1) if columns else np.empty((len(ids), 0))


def labelled(
    tested: data.Dataset, model: checkpoints.Model, say: Callable[[str], None]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """All images of the tested split, their labels and their ids."""
    listing = data.list_images(tested)
    say(f"reading {len(listing)} images of split {tested.split}")
    pixels, ids, labels, _ = read(tested, listing, model)
    return pixels, labels, ids


def flat_model(
    args: argparse.Namespace, model: checkpoints.Model, out: str, say: Callable[[str], None]
) -> checkpoints.Model | None:
    """The model of Figure 10: a 2-D latent space, with the image classifiers of the model compared."""
    if model.image_ensemble is None or (args.flat_model is None and args.dataset != "digits"):
        return None
    uri = job_path(args.flat_model, storage.join(out, "flat-model"), "--flat-model")
    train_model(args, uri, say, "--latent-dim", "2", given=False)
    flat = checkpoints.load_model(uri)
    if flat.latent_dim != 2 or flat.image_shape != model.image_shape or flat.class_names != model.class_names:
        raise ValueError(
            f"{storage.display(uri)} has {flat.latent_dim} latent dimensions, images {flat.image_shape} and classes "
            f"{flat.class_names}: Figure 10 needs 2, {model.image_shape} and {model.class_names}"
        )
    return dataclasses.replace(flat, image_ensemble=model.image_ensemble)


if __name__ == "__main__":
    sys.exit(main())
