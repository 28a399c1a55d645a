#!/usr/bin/env python
"""Compare the paper's methods on the same images by the same held-out networks; draw the paper's figures.

Runs explain_all.py for each method, then scores the audits together with control rows and counterfactuals made
elsewhere. The same command resumes. Exit codes: 0 complete, 1 incomplete (run it again), 2 bad input.
"""

import argparse
import dataclasses
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import driver
import numpy as np
import pyarrow as pa

from clarity import data, storage
from clarity.audit.commits import to_parquet
from clarity.audit.read import ATTRIBUTES_FILE
from clarity.ids import in_judges_half
from clarity.methods import METHODS
from clarity.model import Model, load_model
from clarity.paper import claims, compare, evaluators, figures, metrics, tables
from clarity.paper.compare import CONTROLS, NAMES
from clarity.plots import Picture
from clarity.search import SearchConfig

log = logging.getLogger("clarity.paper")

JOBS = Path(__file__).resolve().parent
#: Pairs of a shard of a method with image classifiers.
SHARD_PAIRS = 144


def new_parser() -> argparse.ArgumentParser:
    """The flags; those of the search come from SearchConfig."""
    parser = driver.new_parser(__doc__)
    add = driver.add_data_flags(parser, "test", "Part of the data that is explained").add_argument
    about = "Attributes that a held-out network is trained to judge, or all."
    add("--attributes", nargs="+", default=[], metavar="NAME", help=about)
    about = "Images to explain, balanced over the classes; 0: all (default: 50)."
    add("--images", type=int, default=50, metavar="N", help=about)
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="URI", help="Model directory (default: OUT/model, trained if missing).")
    about = "Image classifiers of a model trained here (default: 10)."
    add("--image-members", type=int, default=10, metavar="N", help=about)
    add("--judges", metavar="URI", help="Held-out networks (default: OUT/judges, trained if missing).")
    about = "Model with a 2-D latent space for Figure 10, trained if missing (default for digits: OUT/flat-model)."
    add("--flat-model", metavar="URI", help=about)
    add = (search := parser.add_argument_group("search")).add_argument
    about = "Methods to compare, as in explain_all.py, or all (default: all)."
    add("--methods", nargs="+", default=["all"], metavar="METHOD", help=about)
    driver.add_config_flags(search, SearchConfig())
    add("--audit", nargs="+", type=named, default=[], metavar="METHOD=URI", help="Use an existing audit for a method.")
    about = "Images made elsewhere: an npz file with image_id, target, image."
    add("--external", nargs="+", type=named, default=[], metavar="NAME=URI", help=about)
    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="URI", help="Output directory (default: runs/DATASET/compare).")
    add("--no-figures", action="store_true", help="Write tables only.")
    return parser


def named(text: str) -> tuple[str, str]:
    """NAME=URI as its two parts."""
    name, _, uri = text.partition("=")
    if not name or not uri:
        raise argparse.ArgumentTypeError(f"expected NAME=URI, found {text!r}")
    return name, uri


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; the exit code."""
    logging.basicConfig(format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    return driver.run(new_parser(), run_comparison, argv)


def run_comparison(args: argparse.Namespace) -> int:
    """The whole comparison, step by step; the exit code."""
    methods = list(METHODS) if args.methods == ["all"] else list(dict.fromkeys(args.methods))
    if unknown := [name for name in (*methods, *(name for name, _ in args.audit)) if name not in METHODS]:
        raise ValueError(f"unknown method {unknown[0]!r}: expected all, or some of {', '.join(METHODS)}")
    taken = [*METHODS, *CONTROLS]
    for name, _ in args.external:
        if name in taken:
            raise ValueError(f"external: the name {name!r} is taken; choose another than {', '.join(taken)}")
        taken.append(name)
    config = driver.config_from(args, SearchConfig)
    out = driver.job_path(args.out, f"runs/{args.dataset}/compare", "--out")
    tested = driver.open_dataset(args, args.split)
    unlabelled = bool(args.attributes) and args.dataset == "celeba_hair"
    trained = driver.open_dataset(args, "train", attributes=args.attributes, unlabelled=unlabelled)

    model_uri = driver.job_path(args.model, storage.join(out, "model"), "--model")
    if args.model is None:
        train_if_missing(args, model_uri, "--image-members", str(args.image_members))
    model = load_model(model_uri)
    if lacking := [name for name in methods if METHODS[name].classifies_images and not model.image_ensemble]:
        raise ValueError(
            f"methods {', '.join(lacking)} need image classifiers, which {storage.display(model_uri)} lacks: train it "
            f"with --image-members, or choose --methods {' '.join(name for name in methods if name not in lacking)}"
        )
    judges, real = find_judges(args, model, out, trained, tested)

    audits = find_audits(args, methods, tested, model, model_uri, config, out)
    results = {method: compare.results_of_audit(model, method, uri) for method, uri in audits.items()}
    common = compare.common_images(list(results.values()))
    if not common:
        raise ValueError(f"audit: expected audits of the same images, found none in common of {', '.join(results)}")
    chosen = compare.common_images(list(results.values()), compare.CHOSEN_IMAGES)
    results = {method: compare.restrict(found, common) for method, found in results.items()}
    first = next(iter(results.values()))
    for name in CONTROLS:
        results[name] = compare.control_results(name, compare.restrict(first, chosen), model, real)
    for name, uri in args.external:
        results[name] = compare.external_results(name, uri, first, model)
    scored = {name: compare.score(found, judges, real, chosen) for name, found in results.items()}
    for method in audits if judges.attributes else ():
        table = compare.attribute_table(results[method], judges)
        storage.write_bytes(storage.join(audits[method], ATTRIBUTES_FILE), to_parquet(table))

    log.info("measuring the paper's claims")
    pixels, ids, labels, _ = read(tested, model)
    measured = claims.measure_claims(model, judges.oracle, first.images, scored, pixels, labels)
    measured["steps"] = claims.time_steps(model, config, first.images)
    if not args.no_figures:

        def write(name: str, picture: Picture) -> None:
            for suffix in ("png", "pdf"):
                storage.write_bytes(storage.join(out, "figures", f"{name}.{suffix}"), picture.render(suffix))
            log.info("figure %s", name)

        figures.draw_tables(write, model.class_names, results)
        flat = flat_model(args, model, out)
        measured["figure 10"] = figures.draw_searches(write, model, config, first.images, flat, (pixels, labels, ids))
    storage.write_json(storage.join(out, "measurements.json"), measured)
    head = tables.introduction(model, config, judges, real, measured["accuracy"])
    tables.write_tables(out, tables.summary(scored, real, model), head, measured["steps"])
    log.info("written: %s, .parquet, measurements.json, figures/", storage.display(storage.join(out, "comparison.md")))
    return 0


def run(job: str, *arguments: str) -> None:
    """Run another job as a command; what it prints is shown. Where it fails, this job ends with its exit code."""
    code = subprocess.run([sys.executable, str(JOBS / job), *arguments], stdout=sys.stderr).returncode
    if code:
        print(f"error: {job} ended with exit code {code}, see above", file=sys.stderr)
        sys.exit(max(code, 1))  # a negative one is the number of a signal


def train_if_missing(args: argparse.Namespace, uri: str, *more: str) -> None:
    """Train a model, unless it is there."""
    if storage.exists(storage.join(uri, "model.json")):
        return
    log.info("training %s", storage.display(uri))
    where = ["--data", args.data] if args.data else []
    where += ["--columns", *args.columns] if args.columns else []
    run("train.py", "--dataset", args.dataset, *where, "--out", uri, *more)


def find_audits(
    args: argparse.Namespace,
    methods: Sequence[str],
    tested: data.Dataset,
    model: Model,
    model_uri: str,
    config: SearchConfig,
    out: str,
) -> dict[str, str]:
    """The audit of each method: the one that was given, or one of a sample, resumed where it was cut."""
    audits = dict(args.audit)
    sample = storage.join(out, f"sample-{args.images}.parquet")
    fields = dataclasses.asdict(config).items()
    search = [f"--{name.replace('_', '-')}={value}" for name, value in fields if not isinstance(value, bool)]
    search += [f"--{name.replace('_', '-')}" for name, value in fields if value is True]
    for method in methods:
        if method in audits:
            continue
        compare.sample_images(tested, model.preprocessing, args.images, sample)
        audits[method] = storage.join(out, "audits", method)
        log.info("%s on %s", NAMES.get(method, method), storage.name(sample))
        where = ["--dataset", "parquet", "--data", sample, "--split", "test", "--model", model_uri]
        if args.images and METHODS[method].classifies_images:
            # Enough pairs in each that few slots idle beside the longest search, enough shards to keep progress.
            enough = -(-SHARD_PAIRS // (model.num_classes - 1))
            where += ["--shard-rows", str(min(enough, -(-args.images // 8)))]
        run("explain_all.py", *where, "--out", audits[method], "--method", method, "--no-report", *search)
    return {method: audits[method] for method in methods}


def find_judges(
    args: argparse.Namespace, model: Model, out: str, trained: data.Dataset, tested: data.Dataset
) -> tuple[evaluators.Judges, metrics.Reality]:
    """The held-out networks, trained on their half of the training images unless they are there, and real images."""
    pixels, ids, labels, truth = read(trained, model)
    uri = driver.job_path(args.judges, storage.join(out, "judges"), "--judges")
    if args.judges or storage.exists(storage.join(uri, evaluators.JUDGES_JSON)):
        judges = evaluators.load_judges(uri)
    else:
        half = in_judges_half(ids)
        judges = evaluators.Judges(model.image_shape, model.class_names, trained.attributes)
        for report in evaluators.train_judges(judges, pixels[half], labels[half], truth[half]):
            log.info("judges: %s", ", ".join(f"{name} {value}" for name, value in report.items()))
        images, _, kinds, answers = read(dataclasses.replace(tested, attributes=trained.attributes), model)
        evaluators.evaluate_judges(judges, images, kinds, answers)
        evaluators.save_judges(judges, uri)
    if judges.image_shape != model.image_shape or judges.class_names != model.class_names:
        raise ValueError(
            f"judges in {storage.display(uri)} are of {judges.image_shape} images and classes {judges.class_names}, "
            f"the model of {model.image_shape} and {model.class_names}: give judges of the same data"
        )
    return judges, metrics.split_reality(judges, pixels[labels >= 0], labels[labels >= 0])


def read(dataset: data.Dataset, model: Model) -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray]:
    """Images that can be read, their ids, classes (B,) and attributes (B, A); -1 where one is unknown."""
    listing = data.list_images(dataset)
    log.info("reading %d images of split %s", len(listing), dataset.split)
    pixels, ids, names, _ = data.read_all(dataset, listing, model.preprocessing)
    labels = data.label_indices(pa.array(names, pa.string()), model.class_names).fill_null(-1).to_numpy()
    row = {name: index for index, name in enumerate(listing["image_id"].to_pylist())}
    taken = listing.take(pa.array([row[name] for name in ids], pa.int64()))
    columns = [taken[name].cast(pa.int64()).fill_null(-1).to_numpy() for name in dataset.attributes]
    for name, column in zip(dataset.attributes, columns):
        if column.max(initial=0) > 1:
            raise ValueError(f"attributes: expected values of 0 and 1 in {name}, got {column.max()}: leave it out")
    return pixels, ids, labels, np.stack(columns, axis=1) if columns else np.empty((len(ids), 0))


def flat_model(args: argparse.Namespace, model: Model, out: str) -> Model | None:
    """The model of Figure 10: a 2-D latent space, with the image classifiers of the model compared."""
    if model.image_ensemble is None or (args.flat_model is None and args.dataset != "digits"):
        return None
    uri = driver.job_path(args.flat_model, storage.join(out, "flat-model"), "--flat-model")
    train_if_missing(args, uri, "--latent-dim", "2")
    flat = load_model(uri)
    if flat.latent_dim != 2 or flat.image_shape != model.image_shape or flat.class_names != model.class_names:
        raise ValueError(
            f"{storage.display(uri)} has {flat.latent_dim} latent dimensions, images {flat.image_shape} and classes "
            f"{flat.class_names}: Figure 10 needs 2, {model.image_shape} and {model.class_names}"
        )
    return dataclasses.replace(flat, image_ensemble=model.image_ensemble)


if __name__ == "__main__":
    sys.exit(main())
