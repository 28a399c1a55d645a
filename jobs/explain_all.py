#!/usr/bin/env python
"""Explain a data set: for every image and every other class, a similar picture that is classified as that class.

Reads, searches and writes the images by shards, over Ray unless the audit is small; then verifies. The same command
resumes an interrupted run and reports a complete one. Exit codes: 0 complete, 1 incomplete or damaged, 2 bad input.
"""

import dataclasses
import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any

import driver
from actors import Resources

from clarity import data, planning, storage
from clarity.audit.commits import MAX_ATTEMPTS, Claim, claim
from clarity.audit.plan import Plan, read_plan, rows_per_shard, shard_table
from clarity.audit.read import read_audit
from clarity.audit.summary import describe, describe_extent, describe_plan, require_readable
from clarity.audit.verify import verify
from clarity.checks import Requirements
from clarity.methods import METHODS
from clarity.model import Model, load_model
from clarity.notebook import redecoder
from clarity.predictions import add_predictions, describe_coverage, read_predictions
from clarity.predictor import load_predictor
from clarity.report.page import report_of
from clarity.report.text import counted
from clarity.search import ENGINES, SearchConfig, cpu_engines
from clarity.worker import ExplainShard, Work, explain_here, read_shard, shard_item, write_shard


def new_parser() -> ArgumentParser:
    """The flags; those of the search come from SearchConfig."""
    parser = driver.new_parser(__doc__)
    add = (group := driver.add_data_flags(parser, "held-out", "Split: train, validation, test or all")).add_argument
    add("--where", nargs="+", default=[], metavar="COND", help="Select images: label=A,B, misclassified, ids=FILE.")
    add("--limit", type=int, metavar="N", help="Explain a fixed sample of N images.")
    add("--attributes", nargs="+", default=[], metavar="NAME", help="Integer columns to copy into codes, or all.")
    add = group.add_mutually_exclusive_group().add_argument
    add("--predictions", metavar="FILE", help="Your model's classes or probabilities by image_id, Parquet or CSV.")
    add("--predictor", metavar="MODEL", help="Your own model, to be explained: FILE.onnx or module:function.")
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="URI", help="Model directory (default: runs/DATASET/model, trained for digits if missing).")
    add = (search := parser.add_argument_group("search")).add_argument
    about = "Search method: the paper's own, clarity, or one that docs/paper.md compares with it (default: clarity)."
    add("--method", default="clarity", choices=list(METHODS), help=about)
    add("--targets", nargs="+", default=["all"], metavar="CLASS", help="Target classes, by name (default: all).")
    about = "Probability of the target to exceed; auto: what real images of each class reach, at most 0.99"
    add("--min-target-prob", type=driver.number_or_auto, default=0.99, metavar="X", help=f"{about} (default: 0.99).")
    driver.add_config_flags(search, SearchConfig(), skip=["min_target_prob"])
    driver.add_config_flags(search, Requirements())
    add("--keep", nargs="+", default=[], metavar="NAME", help="Attributes not to change; the model needs their heads.")
    about = "Implementation of the search: GPU kernel (triton), C++ (native), PyTorch (default: auto, the fastest)."
    add("--engine", default="auto", choices=["auto", *ENGINES], help=about)
    add("--trace", type=int, default=0, metavar="N", help="Trace the searches of the first N images (default: 0).")
    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="URI", help="Audit directory (default: runs/DATASET/audit, or audit-METHOD).")
    add("--images", default="png", choices=["png", "none"], help="Write pictures as PNG, or only codes (default: png).")
    add("--shard-rows", type=int, metavar="N", help="Images of a shard (default: by image size and method).")
    add("--dry-run", action="store_true", help="Measure a few images, print the plan, write nothing.")
    add("--no-report", action="store_true", help="Write no HTML report.")
    return driver.add_resource_flags(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; the exit code."""
    return driver.run(new_parser(), explain_all, argv)


def explain_all(args: Namespace) -> int:
    """Plan, run, verify; 0 when the audit is complete."""
    by_class = args.min_target_prob == "auto"
    config = driver.config_from(args, SearchConfig, min_target_prob=0.99 if by_class else args.min_target_prob)
    requirements = driver.config_from(args, Requirements)
    method = "" if args.method == "clarity" else f"-{args.method}"
    out = driver.job_path(args.out, f"runs/{args.dataset}/audit{method}", "--out")
    model_uri = driver.job_path(args.model, f"runs/{args.dataset}/model", "--model")
    dataset = driver.open_dataset(args, args.split, attributes=args.attributes)
    data.require_outside(dataset, out)
    everything = data.list_images(dataset)
    predictions = read_predictions(args.predictions, everything) if args.predictions else None
    listing, only = planning.select_images(everything, args.where, args.limit)
    taught = ["--predictor", args.predictor] if args.predictor else []
    driver.train_if_missing(model_uri, args.dataset, args.data, *taught, may_train=not (args.model or args.dry_run))
    model = load_model(model_uri)
    if predictions is not None:
        listing = add_predictions(listing, predictions, model.class_names)
        print(describe_coverage(listing, predictions))
    predictor = load_predictor(args.predictor) if args.predictor else None
    flags = {name: getattr(args, name) for name in ("method", "targets", "images", "trace", "where")}
    checks = planning.make_checks(model, config, requirements, predictor, by_class, args.keep)
    plan = planning.make_plan(model, dataset, listing, config=config, only=only, checks=checks, **flags)
    print(planning.describe_inputs(model, plan, predictor, dataset, listing), end="")

    def measure(useful: int, images: Any) -> dict[str, Any]:
        probed = plan, model_uri, dataset, images, args.predictor
        return driver.call_as_actor(args, useful, planning.probe, *probed, engine=args.engine)

    rows = shard_rows(args, out, model, plan, listing, measure) if args.shard_rows is None else args.shard_rows
    plan = dataclasses.replace(plan, shards=shard_table(listing["image_id"], rows))
    if args.dry_run:
        resources = driver.plan_actors(args, planning.useful_actors(plan, model, range(len(plan.shards))))
        measured = measure(resources.num_actors, listing.slice(0, 32))
        print(describe_plan(plan, out, measured, resources.num_actors), resources.describe(), sep="\n")
        return 0
    items = [shard_item(plan, shard, listing) for shard in range(len(plan.shards))]
    del everything, listing  # while the job runs, the items alone stay in memory, compressed
    with claim(out, plan, model_uri) as held:
        if held.complete:
            print(f"already complete\n{describe(held.summary())}")
        else:
            resources = driver.plan_actors(args, planning.useful_actors(plan, model, held.pending))
            driver.check_visible(held.uri, held.run, dataset.data)
            preprocessing = (model.preprocessing, predictor and predictor.sees(model.preprocessing))
            work = Work(out, held.run, held.plan, dataset, *preprocessing, args.predictor)
            fill(args, held, resources, work, items)
        print(f"model      {model_uri}\naudit      {out}")
        if held.complete:
            if not args.no_report:
                print(f"report     {storage.display(report_of(out))}")
            require_readable(held.summary())
        return 0 if held.complete else 1


def shard_rows(args: Namespace, out: str, model: Model, plan: Plan, listing: Any, measure: Callable[..., Any]) -> int:
    """Images of a shard: those of an audit in ``out``, else from their size and the measured speed of a slow method."""
    if storage.exists(storage.join(out, "plan.json")):
        return int(read_plan(out).shards[0]["stop"])
    slow, targets = METHODS[plan.method].classifies_images, model.num_classes - 1
    seconds = measure(1, listing.slice(0, max(1, 256 // targets)))["seconds_per_image"] if slow else 0.0
    return rows_per_shard(len(listing), planning.raw_bytes_per_image(model, targets), seconds, driver.has_gpus(args))


def fill(args: Namespace, held: Claim, resources: Resources, work: Work, items: Sequence[dict[str, Any]]) -> None:
    """Explain what is pending, retry what failed, verify, and print how it went."""
    plan, start, pairs, shards = held.plan, time.time(), 0, counted(len(held.plan.shards), "shards")
    driver.interruptible()
    offered = [] if resources.gpus_per_actor else [names for _, names in driver.on_each_node(cpu_engines)]
    args.engine = planning.shared_engine(args.engine, plan.method, offered, held.keep_one_engine())
    print(f"{describe_extent(plan)}, {len(held.pending)} of {shards} to do; {resources.describe()}")
    failures: dict[int, dict[str, Any]] = {}
    for _ in range(MAX_ATTEMPTS):
        todo = [shard for shard in held.pending if "given_up" not in failures.get(shard, {})]
        try:
            ended = pipeline(args, resources, work, [items[shard] for shard in todo]) if todo else ()
            for shard, note in driver.progress(ended, len(todo), "min_target_probs" in plan.checks):
                held.check()
                held.require_same_engine(shard, note.get("engine"))
                failures |= {shard: note} if "error" in note else {}
                pairs += note.get("pairs", 0)
        except driver.ray_errors() as error:
            print(f"Ray failed: {error}", file=sys.stderr)
        held.refresh()
    for shard in held.pending:
        note = failures.get(shard, {"stage": "run", "error": "the shard was lost"})
        print(f"shard {shard} failed at stage {note['stage']}: {note['error']}", file=sys.stderr)
        held.record_failure(shard, note["stage"], note["error"])
    seconds = time.time() - start
    driver.end_ray()
    checked = verify(held.uri, redecode=redecoder(held.uri))
    summary = read_audit(held.uri, without=checked.shards).summary()
    summary |= {"problems": checked.problems[:20], "damaged": len(checked.shards), "redecoded": checked.redecoded}
    summary |= {"seconds": round(seconds, 2), "pairs_per_second": round(pairs / seconds, 1)}
    held.finish(summary | {"resources": dataclasses.asdict(resources)}, checked.ok, checked.shards)
    print(describe(summary))


def pipeline(args: Namespace, resources: Resources, work: Work, items: list[dict[str, Any]]) -> driver.Notes:
    """Read, explain and write shards, over Ray or, without an actor, here; gives each, as it ends, with its note."""
    options = {"engine": args.engine, "threads": resources.threads_per_actor, "device": resources.device}
    if not resources.num_actors:
        return explain_here(items, work, **options)
    import ray.data

    actors_write = resources.actors_write(work.uri)
    one: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    actor = {"num_cpus": resources.cpus_per_actor, "num_gpus": resources.gpus_per_actor, **one}
    io = {"num_cpus": resources.io_cpus, **one}
    ended = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(read_shard, fn_args=(work,), **(actor if actors_write else io))  # alike, they run in one process
        .map_batches(
            ExplainShard,
            fn_constructor_args=(work, write_shard if actors_write else None),
            fn_constructor_kwargs=options,
            compute=ray.data.ActorPoolStrategy(size=min(resources.num_actors, len(items))),
            **actor,
        )
    )
    rows = (ended if actors_write else ended.map_batches(write_shard, fn_args=(work,), **io)).iter_rows()
    return ((int(row["shard"]), json.loads(row["note"])) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
