#!/usr/bin/env python
"""Explain a whole data set: for every image and every other class, the closest picture that is seen as that class.

Plans shards; reads, searches, writes and commits them over Ray; verifies the result. The same command resumes a run
that was cut, and reports one that is complete. Exit codes: 0 complete, 1 incomplete (run it again), 2 bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.autoscaler.sdk
import ray.data
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clarity import data, storage
from clarity.audit.commits import MAX_ATTEMPTS, Claim, claim, drop_commits, unreachable_paths
from clarity.audit.plan import read_plan, rows_per_shard
from clarity.audit.read import read_audit
from clarity.audit.summary import describe, describe_plan
from clarity.audit.verify import verify
from clarity.methods import METHODS
from clarity.model import Model, load_model
from clarity.notebook import redecoder
from clarity.planning import choose, make_plan, probe, raw_bytes_per_image
from clarity.predictions import add_predictions, read_predictions
from clarity.report.page import write_report
from clarity.resources import (
    Resources,
    autoscaler_description,
    interruptible,
    job_path,
    nodes_to_come,
    plan_resources,
)
from clarity.search import ENGINES, SearchConfig
from clarity.worker import ExplainShard, Work, read_shard, shard_item, write_shard

#: Of a Ray that this job starts itself: fixed, so that memory does not grow with the data.
OBJECT_STORE_BYTES = 1_000_000_000
#: Patience with an autoscaler that was asked for its first node.
FIRST_NODE_S = 900


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; defaults of the search come from SearchConfig."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="digits", choices=list(data.SOURCES), help="source of the images (digits)")
    add("--data", help="where the images lie: a path or an s3:// URI, for every source but digits")
    add("--split", default="test", help="part of the data: train, test, all, or one of its own (test)")
    add("--where", nargs="+", default=[], metavar="COND", help="label=A,B and/or misclassified and/or ids=FILE")
    add("--limit", type=int, help="the first so many images")
    add("--attributes", nargs="+", default=[], metavar="NAME", help="columns of the data carried into codes, or all")
    add(
        "--predictions", metavar="FILE", help="Parquet: image_id, class or probabilities, of your own model; into codes"
    )
    add("--model", help="model directory (runs/DATASET/model; for digits it is trained when missing)")
    add("--out", help="audit directory (runs/DATASET/audit)")
    add("--method", default="clarity", choices=list(METHODS), help="how to search (clarity)")
    add("--targets", nargs="+", default=["all"], metavar="CLASS", help="wanted classes, or all (all)")
    for field in dataclasses.fields(SearchConfig):
        flag, kind = f"--{field.name.replace('_', '-')}", type(field.default)
        add(flag, type=kind, default=field.default, help=f"of the search ({field.default})")
    add("--images", default="png", choices=["png", "none"], help="write pictures, or codes alone (png)")
    add("--trace", type=int, default=0, metavar="N", help="write the paths of the first N images too, plain engine (0)")
    add("--engine", default="auto", choices=["auto", *ENGINES], help="of the search (auto: the fastest that fits)")
    add("--actors", type=int, help="processes that search (as many as are useful)")
    add("--gpus-per-actor", type=float, help="1 where there are GPUs, else 0; a fraction shares one")
    add("--max-nodes", type=int, help="plan for so many nodes, where an autoscaler's reach cannot be seen (Kubernetes)")
    add("--shard-rows", type=int, help="images of a shard (from their size and the method's speed)")
    add("--dry-run", action="store_true", help="say what would be done, from a measured probe, and write nothing")
    add("--no-report", action="store_true", help="write no HTML report at the end")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, run, verify; the exit code."""
    args = parse(argv)
    try:
        config = SearchConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(SearchConfig)})
        name = "audit" if args.method == "clarity" else f"audit-{args.method}"
        out = job_path(args.out, f"runs/{args.dataset}/{name}", "--out")
        model_uri = job_path(args.model, f"runs/{args.dataset}/model", "--model")
        dataset = data.open_dataset(args.dataset, args.data, args.split, attributes=args.attributes)
        if args.dataset in ("folder", "parquet") and storage.lies_in(out, str(dataset.data)):
            raise ValueError(
                f"--out {storage.display(out)} lies in --data, where it would be read; choose another --out"
            )
        everything = data.list_images(dataset)
        predictions = read_predictions(args.predictions, everything) if args.predictions else None
        listing, only = choose(everything, args.where, args.limit)
        model = find_model(args, model_uri)
        if predictions is not None:
            listing = add_predictions(listing, predictions, model.class_names)
            told = f"{len(listing) - listing['prediction'].null_count} of {len(listing)} images have a prediction"
            print("; ".join([told, *(f"left out: {n} {what}" for what, n in data.left_out(predictions).items())]))
        asked = {"method": args.method, "config": config, "images": args.images, "only": only}
        targets = None if args.targets == ["all"] else args.targets
        about = {"targets": targets, "trace": args.trace, "where": args.where, "shard_rows": args.shard_rows or 1}
        plan = make_plan(model, dataset, listing.slice(0, None if args.shard_rows else 1), **asked, **about)
        if not args.shard_rows:
            about["shard_rows"] = shard_rows(args, out, model, [model_uri, dataset, listing], asked)
            plan = make_plan(model, dataset, listing, **asked, **about)
        if args.dry_run:
            start_ray()
            resources = plan_resources(nodes(args), len(plan.shards), args.actors, args.gpus_per_actor)
            measured = measure(args, [model_uri, dataset, listing.slice(0, 32)], asked | {"targets": plan.targets})
            print(describe_plan(plan, out, measured, resources.num_actors), resources.describe(), sep="\n")
            return 0
        with claim(out, plan, model_uri) as held:
            if held.complete:
                print(f"complete already\n{describe(held.summary())}")
            else:
                start_ray()
                resources = plan_resources(nodes(args), len(held.pending), args.actors, args.gpus_per_actor)
                check_visible(held, dataset)
                fill(args, held, resources, Work(out, held.run, held.plan, dataset, model.preprocessing), listing)
            print(f"model      {model_uri}\naudit      {out}")
            return 0 if held.complete else 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ray.exceptions.RayError as error:
        print(f"error: {error}\nthe same command resumes", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 1


def find_model(args: argparse.Namespace, uri: str) -> Model:
    """The model to explain with; that of the digits is trained when it is missing and nobody named another."""
    train = [str(Path(__file__).with_name("train.py")), "--dataset", args.dataset, "--out", uri]
    train += ["--data", args.data] if args.data else []
    if not storage.exists(storage.join(uri, "model.json")):
        if args.model or args.dataset != "digits" or args.dry_run:
            raise ValueError(f"no model in {storage.display(uri)}; train one first: python {' '.join(train)}")
        start_ray()
        # The training uses the Ray of this job.
        env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        if subprocess.run([sys.executable, *train], env=env).returncode:
            raise ValueError(f"the training failed, see above; alone it is: python {' '.join(train)}")
    return load_model(uri)


def shard_rows(args: argparse.Namespace, out: str, model: Model, where: list[Any], asked: dict[str, Any]) -> int:
    """Images of a shard: as an audit there has it, else from their size and the measured speed of a slow method."""
    if storage.exists(storage.join(out, "plan.json")):
        first = read_plan(out).shards[0]
        return int(first["stop"] - first["start"])
    *place, listing = where
    seconds, targets = 0.0, model.num_classes - 1
    if METHODS[args.method].classifier not in ("ensemble", "member"):
        some = listing.slice(0, max(1, 256 // targets))
        seconds = measure(args, [*place, some], asked)["seconds_per_image"]
    gpu = args.gpus_per_actor != 0 and (torch.cuda.is_available() or "RAY_ADDRESS" in os.environ)
    if gpu:  # only then is Ray worth asking before the rest has been checked
        start_ray()
        gpu = any(node.get("GPU", 0) > 0 for node in nodes(args))
    return rows_per_shard(len(listing), raw_bytes_per_image(model, targets), seconds, gpu)


def fill(args: argparse.Namespace, held: Claim, resources: Resources, work: Work, listing: pa.Table) -> None:
    """Do what is pending, try again what failed, verify, and say how it went."""
    plan, start, pairs = held.plan, time.time(), 0
    held.keep_one_engine()
    print(f"{plan.num_images} images, {len(held.pending)} of {len(plan.shards)} shards to do; {resources.describe()}")
    failures: dict[int, dict[str, Any]] = {}
    for _ in range(MAX_ATTEMPTS):
        todo = [shard for shard in held.pending if "given_up" not in failures.get(shard, {})]
        try:
            for shard, note in progress(pipeline(args, resources, work, listing, todo), len(todo)) if todo else ():
                held.check()
                held.require_same_engine(shard, note.get("engine"))
                failures |= {shard: note} if "error" in note else {}
                pairs += note.get("pairs", 0)
        except ray.exceptions.RayError as error:
            print(f"Ray gave up: {error}", file=sys.stderr)
        held.refresh()
    for shard in held.pending:
        note = failures.get(shard, {"stage": "run", "error": "it was lost"})
        print(f"shard {shard} failed at stage {note['stage']}: {note['error']}", file=sys.stderr)
        held.record_failure(shard, note["stage"], note["error"])
    seconds = time.time() - start
    checked = verify(held.uri, redecode=redecoder(held.uri), workers=os.cpu_count() or 1)
    summary = read_audit(held.uri).summary()
    summary |= {"problems": checked.problems[:20], "redecoded": checked.redecoded, "seconds": round(seconds, 2)}
    summary |= {"pairs_per_second": round(pairs / seconds, 1), "resources": dataclasses.asdict(resources)}
    held.finish(summary, checked.ok)
    print(describe(summary))
    if checked.shards:
        drop_commits(held.uri, checked.shards)
        print(f"{len(checked.shards)} unsound shards are taken back; the same command does them again", file=sys.stderr)
    if checked.ok and not args.no_report:
        print(f"report     {storage.display(write_report([held.uri]).uri)}")


def pipeline(
    args: argparse.Namespace, resources: Resources, work: Work, listing: pa.Table, todo: Sequence[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The way of the shards over Ray, one row each: read, explain, write; yields how each ended."""
    spans = [work.plan.shards[shard] for shard in todo]
    items = [shard_item(shard, listing[span["start"] : span["stop"]]) for shard, span in zip(todo, spans)]
    one: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    ended = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(read_shard, fn_args=(work,), num_cpus=resources.io_cpus, **one)
        .map_batches(
            ExplainShard,
            fn_constructor_args=(work,),
            fn_constructor_kwargs={
                "engine": args.engine,
                "threads": resources.threads_per_actor,
                "device": "cuda" if resources.gpus_per_actor else "cpu",
            },
            compute=ray.data.ActorPoolStrategy(size=min(resources.num_actors, len(items))),
            num_cpus=resources.cpus_per_actor,
            num_gpus=resources.gpus_per_actor,
            **one,
        )
        .map_batches(write_shard, fn_args=(work,), num_cpus=resources.io_cpus, **one)
    )
    for row in ended.iter_rows():
        yield int(row["shard"]), json.loads(row["note"])


# ---- around it -----------------------------------------------------------------------------------------------------


def start_ray() -> None:
    """Join the Ray that runs here (RAY_ADDRESS, or ray start), else start one."""
    logging.getLogger("ray.data").setLevel("ERROR")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    interruptible()
    try:
        ray.init(object_store_memory=OBJECT_STORE_BYTES, **quiet)
    except ValueError:  # one that runs already brings its own store
        ray.init(**quiet)
    except Exception as error:  # of no kind of its own: a machine too busy for Ray's patience of 30 seconds
        raise ray.exceptions.RaySystemError(f"Ray did not start: {error}") from None
    interruptible()  # Ray took SIGTERM for itself


def nodes(args: argparse.Namespace) -> list[dict[str, float]]:
    """What each node offers, and each that the autoscaler may still bring: a cluster may start without workers."""
    joined = any(name in os.environ for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"))
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if args.max_nodes and not any(node.get("CPU") for node in alive):
        alive = first_node(args.gpus_per_actor)
    return nodes_to_come(alive, autoscaler_description() if joined else None, args.max_nodes)


def first_node(gpus: float | None) -> list[dict[str, float]]:
    """Ask the autoscaler for a node with a CPU, and the GPUs asked for, and wait; what each node then offers."""
    print("no node offers a CPU yet; the autoscaler is asked for one", flush=True)
    ray.autoscaler.sdk.request_resources(bundles=[{"CPU": 1} | ({"GPU": math.ceil(gpus)} if gpus else {})])
    for _ in range(FIRST_NODE_S):
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(node.get("CPU") for node in alive):
            break
        time.sleep(1)
    ray.autoscaler.sdk.request_resources(bundles=[])
    return alive


def measure(args: argparse.Namespace, place: Sequence[Any], asked: dict[str, Any]) -> dict[str, Any]:
    """``probe`` where an actor would run, with its threads; slow methods are measured by one step."""
    start_ray()
    one = plan_resources(nodes(args), 1, 1, args.gpus_per_actor)
    steps = None if METHODS[args.method].classifier in ("ensemble", "member") else 1
    remote = ray.remote(num_cpus=one.cpus_per_actor, num_gpus=one.gpus_per_actor)(probe)
    found = remote.remote(*place, steps=steps, threads=one.threads_per_actor, engine=args.engine, **asked)
    return dict(ray.get(found))


def check_visible(held: Claim, dataset: data.Dataset) -> None:
    """Raise ValueError unless every node sees the audit directory and the data."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    unreachable = ray.remote(num_cpus=0)(unreachable_paths)
    paths = {"out": held.uri, "data": dataset.data or ""}
    for node in alive if len(alive) > 1 else []:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        for name in ray.get(unreachable.options(scheduling_strategy=there).remote(held.uri, held.run, dataset.data)):
            raise ValueError(
                f"--{name} {storage.display(paths[name])}: node {node['NodeManagerAddress']} does not see what "
                "this one sees there; use an s3:// URI, or a directory that every node mounts"
            )


def progress(ended: Iterable[tuple[int, dict[str, Any]]], total: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Pass on what ended, under a bar on a terminal, with a line now and then elsewhere."""
    console, said, pairs = Console(stderr=True), time.time(), 0
    columns = (
        TextColumn("shards"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        for done, (shard, note) in enumerate(ended, 1):
            pairs += note.get("pairs", 0)
            bar.update(task, advance=1, description=f"{pairs} pairs")
            if bar.disable and (time.time() - said > 10 or done == total):
                said = time.time()
                print(f"{done} of {total} shards, {pairs} pairs", flush=True)
            yield shard, note


if __name__ == "__main__":
    sys.exit(main())
