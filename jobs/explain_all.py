#!/usr/bin/env python
"""Explain a whole data set: for every image and every other class, the closest picture that is seen as that class.

Plans shards, reads, searches, writes and commits them over Ray, verifies the result. The same command resumes a run
that was cut, and reports one that is complete. Exit codes: 0 complete, 1 incomplete (run it again), 2 bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from clarity import audit, data, storage
from clarity.checkpoints import Model, load_model
from clarity.explain import (
    ExplainShard,
    Work,
    choose,
    class_indices,
    make_plan,
    probe,
    raw_bytes_per_image,
    read_shard,
    shard_item,
    verify,
    write_shard,
)
from clarity.methods import METHODS
from clarity.resources import Resources, job_path, plan_resources
from clarity.search import ENGINES, SearchConfig

#: Of a Ray that this job starts itself: fixed, so that memory does not grow with the data.
OBJECT_STORE_BYTES = 1_000_000_000


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="digits", choices=list(data.SOURCES), help="source of the images (digits)")
    add("--data", help="where the images lie: a path or an s3:// URI, for every source but digits")
    add("--split", default="test", help="part of the data: test, train, all, or one of its own (test)")
    add("--where", nargs="+", default=[], metavar="COND", help="label=A,B and/or misclassified and/or ids=FILE")
    add("--limit", type=int, help="the first so many images")
    add("--attributes", nargs="+", default=[], metavar="NAME", help="further columns of the data, carried into codes")
    add("--model", help="model directory (runs/DATASET/model; for digits it is trained when missing)")
    add("--out", help="audit directory (runs/DATASET/audit)")
    add("--method", default="clarity", choices=list(METHODS), help="how to search (clarity)")
    add("--targets", nargs="+", default=["all"], metavar="CLASS", help="wanted classes, or all (all)")
    for field in dataclasses.fields(SearchConfig):
        kind = type(field.default)
        add(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            default=field.default,
            help=f"of the search ({field.default})",
        )
    add("--images", default="png", choices=["png", "none"], help="write pictures, or codes alone (png)")
    add(
        "--trace",
        type=int,
        default=0,
        metavar="N",
        help="write the paths of the first N images, by the plain engine (0)",
    )
    add("--engine", default="auto", choices=["auto", *ENGINES], help="of the search (auto: the fastest that fits)")
    add("--mixed-engines", action="store_true", help="accept shards searched by different engines")
    add("--actors", type=int, help="processes that search (as many as are useful)")
    add("--gpus-per-actor", type=float, help="1 where there are GPUs, else 0; a fraction shares one")
    add("--shard-rows", type=int, help="images of a shard (from their size and the method's speed)")
    add("--dry-run", action="store_true", help="say what would be done, from a measured probe, and write nothing")
    add("--no-report", action="store_true", help="do not write the HTML report")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        config = SearchConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(SearchConfig)})
        default_out = f"runs/{args.dataset}/audit" + (f"-{args.method}" if args.method != "clarity" else "")
        out = job_path(args.out, default_out, "--out")
        model_uri = job_path(args.model, f"runs/{args.dataset}/model", "--model")
        model = find_model(args, model_uri)
        dataset = data.open_dataset(args.dataset, args.data, args.split, attributes=args.attributes)
        listing, only = choose(data.list_images(dataset), args.where, args.limit)
        targets = "all" if args.targets == ["all"] else args.targets
        options = {"method": args.method, "config": config, "images": args.images, "only": only}
        class_indices(targets, model.class_names)
        rows = args.shard_rows or shard_rows(args, out, model, model_uri, dataset, listing, options)
        plan = make_plan(
            model, dataset, listing, targets=targets, trace=args.trace, shard_rows=rows, where=args.where, **options
        )
        if args.dry_run:
            return dry_run(args, plan, out, model_uri, dataset, listing, options)
        with audit.claim(out, plan, model_uri) as held:
            if held.complete:
                print(f"complete already: {out}")
                show(storage.read_json(storage.join(out, "summary.json")), out, model_uri)
                return 0
            start_ray()
            resources = plan_resources(nodes(), num_shards=len(held.pending), **asked(args))
            check_visible(held, dataset)
            return run(args, held, resources, dataset, listing, model, model_uri)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 1


def find_model(args: argparse.Namespace, uri: str) -> Model:
    """The model to explain with; that of the digits is trained when nobody named another."""
    train = [sys.executable, str(Path(__file__).with_name("train.py")), "--dataset", args.dataset, "--out", uri]
    if not storage.exists(storage.join(uri, "model.json")):
        if args.model or args.dataset != "digits" or args.dry_run:
            train += ["--data", args.data] if args.data else []
            raise ValueError(f"no model in {storage.display(uri)}; train one first: {' '.join(['python', *train[1:]])}")
        import ray

        start_ray()
        # The training runs on the same Ray, and leaves it running.
        address = ray.get_runtime_context().gcs_address
        if subprocess.run(train, env=os.environ | {"RAY_ADDRESS": address}).returncode:
            raise ValueError(f"the training failed; see above, or run it alone: {' '.join(['python', *train[1:]])}")
    return load_model(uri)


def shard_rows(
    args: argparse.Namespace,
    out: str,
    model: Model,
    model_uri: str,
    dataset: data.Dataset,
    listing: Any,
    options: dict[str, Any],
) -> int:
    """Images of a shard: as an unfinished audit has it, else from their size and, for slow methods, a measurement."""
    if storage.exists(storage.join(out, "plan.json")):
        first = audit.read_plan(out).shards[0]
        return int(first["stop"] - first["start"])
    num_targets = model.num_classes - 1
    seconds = 0.0
    if METHODS[args.method].classifier not in ("ensemble", "member") or METHODS[args.method].space != "latent":
        rows = listing.slice(0, max(1, 256 // num_targets))
        seconds = on_actor(args, probe)(model_uri, dataset, rows, steps=1, **options)["seconds_per_image"]
    return audit.rows_per_shard(len(listing), raw_bytes_per_image(model, num_targets), seconds)


def run(
    args: argparse.Namespace,
    held: audit.Claim,
    resources: Resources,
    dataset: data.Dataset,
    listing: Any,
    model: Model,
    model_uri: str,
) -> int:
    """Fill the audit, verify it, and say how it went; the exit code."""
    plan, start, begun = held.plan, time.time(), len(held.pending)
    print(f"{plan.num_images} images, {begun} of {len(plan.shards)} shards to do; {resources.describe()}")
    work = Work(held.uri, held.run, plan, dataset, model.preprocessing)
    failures: dict[int, dict[str, Any]] = {}
    pairs = 0
    with progress(begun) as advance:
        for _ in range(audit.MAX_ATTEMPTS):
            todo = [shard for shard in held.pending if not failures.get(shard, {}).get("given_up")]
            if not todo:
                break
            for shard, note in pipeline(args, resources, work, listing, todo):
                held.check()
                if "error" in note:
                    failures[shard] = note
                    continue
                failures.pop(shard, None)
                pairs += note.get("pairs", 0)
                advance(f"{pairs} pairs")
            held.refresh()
    for shard, note in failures.items():
        print(f"shard {shard} failed at stage {note['stage']}: {note['error']}", file=sys.stderr)
        audit.record_failure(held.uri, shard, note["stage"], note["error"])
    searched = time.time() - start
    checked = verify(held.uri, workers=os.cpu_count() or 1)
    summary = audit.summarise(audit.read_audit(held.uri))
    engines = [engine for engine in summary["engines"] if engine != "none"]
    if len(engines) > 1 and not args.mixed_engines:
        checked.problems.append(f"shards were searched by {' and '.join(engines)}: --mixed-engines accepts that")
    summary |= {
        "complete": checked.ok,
        "problems": checked.problems[:20],
        "redecoded": checked.redecoded,
        "seconds": round(searched, 2),
        "pairs_per_second": round(pairs / searched, 1),
        "resources": dataclasses.asdict(resources),
    }
    held.finish(summary, checked.ok)
    show(summary, held.uri, model_uri)
    return 0 if checked.ok else 1


def pipeline(
    args: argparse.Namespace, resources: Resources, work: Work, listing: Any, todo: Sequence[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The way of the shards over Ray, one row each: read, explain, write; yields how each ended."""
    import json

    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    spans = {shard: work.plan.shards[shard] for shard in todo}
    items = [shard_item(shard, listing[span["start"] : span["stop"]]) for shard, span in spans.items()]
    gpus = resources.gpus_per_actor
    options = {"engine": args.engine, "threads": resources.threads_per_actor, "device": "cuda" if gpus else "cpu"}
    one = {"batch_size": 1, "batch_format": "pyarrow"}
    ended = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(read_shard, fn_args=(work,), num_cpus=resources.io_cpus, **one)
        .map_batches(
            ExplainShard,
            fn_constructor_args=(work,),
            fn_constructor_kwargs=options,
            compute=ray.data.ActorPoolStrategy(size=min(resources.num_actors, len(items))),
            num_cpus=resources.cpus_per_actor,
            num_gpus=gpus,
            **one,
        )
        .map_batches(write_shard, fn_args=(work,), num_cpus=resources.io_cpus, **one)
    )
    for row in ended.iter_rows():
        yield int(row["shard"]), json.loads(row["note"])


# ---- around it -----------------------------------------------------------------------------------------------------


def start_ray() -> None:
    import ray

    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING", "include_dashboard": False}
    try:
        ray.init(object_store_memory=OBJECT_STORE_BYTES, **quiet)
    except ValueError:  # a Ray that runs already (RAY_ADDRESS, or ray start on this machine) brings its own store
        ray.init(**quiet)
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))


def nodes() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def asked(args: argparse.Namespace) -> dict[str, Any]:
    return {"actors": args.actors, "gpus_per_actor": args.gpus_per_actor}


def on_actor(args: argparse.Namespace, function: Any) -> Any:
    """The function, run where an actor would run: on its kind of machine, with its threads."""
    import ray

    start_ray()
    plan = plan_resources(nodes(), num_shards=1, **asked(args) | {"actors": 1})
    remote = ray.remote(num_cpus=plan.cpus_per_actor, num_gpus=plan.gpus_per_actor, max_retries=0)(function)
    return lambda *a, **k: ray.get(remote.remote(*a, threads=plan.threads_per_actor, engine=args.engine, **k))


def check_visible(held: audit.Claim, dataset: data.Dataset) -> None:
    """Raise ValueError unless every node sees the audit directory and the data."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) < 2:
        return
    remote = ray.remote(num_cpus=0, max_retries=0)(audit.sees)
    strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in alive]
    seen = [remote.options(scheduling_strategy=s).remote(held.uri, held.run, dataset.data) for s in strategies]
    for node, missing in zip(alive, ray.get(seen, timeout=120)):
        if missing:
            place = held.uri if missing[0] == "--out" else dataset.data
            raise ValueError(
                f"{missing[0]} {storage.display(place)}: node {node['NodeManagerAddress']} does not see what this one does; "
                "use an s3:// URI, or a directory that every node mounts"
            )


def dry_run(
    args: argparse.Namespace,
    plan: audit.Plan,
    out: str,
    model_uri: str,
    dataset: data.Dataset,
    listing: Any,
    options: dict[str, Any],
) -> int:
    start_ray()
    resources = plan_resources(nodes(), num_shards=len(plan.shards), **asked(args))
    steps = None if METHODS[args.method].classifier in ("ensemble", "member") else 1
    measured = on_actor(args, probe)(
        model_uri, dataset, listing.slice(0, 32), steps=steps, targets=plan.targets, **options
    )
    seconds = plan.num_images * measured["seconds_per_image"] / resources.num_actors
    size = plan.num_images * measured["bytes_per_image"]
    print(f"out        {out}")
    print(f"images     {plan.num_images}")
    print(f"pairs      {plan.num_images * plan.pairs_per_image} at most")
    print(f"shards     {len(plan.shards)} of {plan.shards[0]['stop']} images")
    print(f"files      {3 * len(plan.shards)}, {size / 1e6:.1f} MB")
    print(f"resources  {resources.describe()}: can be scheduled")
    print(
        f"time       {seconds:.0f} s, from {measured['pairs_per_second']:.0f} pairs/s measured ({measured['engine']})"
    )
    return 0


class progress:
    """A bar on a terminal, else a line now and then."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.said = total, 0, time.time()
        columns = (TextColumn("shards"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self.bar = Progress(
            *columns, TextColumn("{task.description}"), console=console, disable=not console.is_terminal
        )

    def __enter__(self) -> Any:
        self.bar.start()
        self.task = self.bar.add_task("", total=self.total)
        return self.advance

    def advance(self, text: str) -> None:
        self.done += 1
        self.bar.update(self.task, advance=1, description=text)
        if self.bar.disable and (time.time() - self.said > 10 or self.done == self.total):
            self.said = time.time()
            print(f"{self.done} of {self.total} shards, {text}", flush=True)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def show(summary: dict[str, Any], out: str, model_uri: str) -> None:
    """The summary, for people."""
    share = lambda part: f"{part} ({100 * part / max(summary['pairs'], 1):.2f} %)"  # noqa: E731
    print(f"images     {summary['images']}, {summary['unread']} unreadable")
    for reason, count in summary["errors"].items():
        print(f"           {count} x {reason}")
    print(f"pairs      {summary['pairs']}")
    print(f"converged  {share(summary['converged'])}, re-encoded as the target {share(summary['reencoded_as_target'])}")
    print(f"steps      median {summary['median_steps']}")
    print(f"speed      {summary['pairs_per_second']} pairs/s, {summary['seconds']} s")
    print("stages     " + ", ".join(f"{name} {value:.1f} s" for name, value in summary["seconds_by_stage"].items()))
    slow = ", ".join(f"{p['source']}->{p['target']} {p['mean_steps']:.0f}" for p in summary["slowest_class_pairs"])
    print(f"slowest    {slow} steps")
    print(f"engine     {', '.join(f'{name} ({count} shards)' for name, count in summary['engines'].items())}")
    print(f"verified   {summary['redecoded']} pairs decoded again" if summary["complete"] else "NOT COMPLETE")
    for problem in summary["problems"]:
        print(f"           {problem}")
    print(f"model      {model_uri}")
    print(f"audit      {out}")


if __name__ == "__main__":
    sys.exit(main())
