#!/usr/bin/env python
"""Measure speed on this machine: search engines, networks, training, the stages of a shard, the whole job.

Figures are medians of several repeats; what is compared takes turns within one run. With --device all runs on that
device without Ray, and the engines are checked against the plain one first. Prints Markdown and writes benchmark.json
and benchmark.md under --out. Exit codes: 0 measured, 1 a check or a part failed, 2 bad input.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import driver
import measures
import pyarrow as pa
import torch
from torch import Tensor

from clarity import data, native_search, triton_search
from clarity.audit.commits import claim
from clarity.audit.plan import rows_per_shard
from clarity.model import load_model
from clarity.planning import make_plan, raw_bytes_per_image, select_images
from clarity.report.text import number
from clarity.rows import encode_rows
from clarity.vae import VAE, vae_config
from clarity.worker import ExplainShard, Work, read_shard, shard_item, unpack_row, write_shard

JOBS = Path(__file__).resolve().parent
#: What needs a model, and what needs Ray.
NEED_MODEL, NEED_RAY = ("stages", "job", "memory"), ("job", "memory")


def new_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = driver.new_parser(__doc__)
    add = driver.add_data_flags(parser, "test", "Part of the data that is explained").add_argument
    add("--limit", type=int, default=10_000, metavar="N", help="Images of the stages and the job (default: 10000).")
    about = "Images of the two runs whose peak memory is compared (default: 6000 60000)."
    add("--memory-images", type=int, nargs=2, default=(6_000, 60_000), metavar="N", help=about)
    add = parser.add_argument_group("model").add_argument
    about = "Model directory (default: random clusters and untrained networks)."
    add("--model", metavar="URI", help=about)
    add = parser.add_argument_group("measurement").add_argument
    about = "Parts to measure (default: all that --device and --model allow)."
    add("--parts", nargs="+", choices=PARTS, metavar="PART", help=about)
    about = "Measure this device only, without Ray (default: CPU, GPU if present, and the job on Ray)."
    add("--device", choices=["cpu", "cuda"], help=about)
    add("--repeats", type=int, default=5, metavar="N", help="Repeats of each timing (default: 5).")
    about = "Factor on the number of timed searches, images and updates (default: 1)."
    add("--scale", type=float, default=1.0, metavar="X", help=about)
    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="DIR", help="Output directory (default: runs/benchmark).")
    add = parser.add_argument_group("resources").add_argument
    threads = os.cpu_count() or 1
    add(
        "--threads", type=int, default=threads, metavar="N", help="CPU threads of searches and products (default: all)."
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; the exit code."""
    return driver.run(new_parser(), benchmark, argv)


def benchmark(args: argparse.Namespace) -> int:
    """Measure the parts that are asked for, and keep what is found after each; 1 where a check failed."""
    args.out = driver.job_path(args.out, "runs/benchmark", "--out")
    args.model = args.model and driver.job_path(args.model, "", "--model")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a GPU that torch can use, found none; choose --device cpu")
    barred = {*(NEED_RAY if args.device else ()), *(() if args.model or not args.device else NEED_MODEL)}
    parts = args.parts or [part for part in PARTS if part not in barred]
    if not args.model and set(parts) & set(NEED_MODEL):
        raise ValueError("--model: the parts stages, job and memory need one; train it with jobs/train.py")
    if args.device and set(parts) & set(NEED_RAY):
        raise ValueError("--parts: job and memory measure the job on Ray; leave --device out")
    torch.set_num_threads(args.threads)
    failed: dict[str, str] = {}
    found: dict[str, Any] = {"about": about(args), "failed": failed}
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for part in [part for part in PARTS if part in parts]:
        try:
            found[part] = PARTS[part](args)
        except (ValueError, OSError):  # bad input
            raise
        except (Exception, SystemExit) as error:  # of a GPU or its memory: the other parts are measured all the same
            failed[part] = measures.in_one_line(error)
        text = table(found)
        Path(args.out, "benchmark.json").write_text(json.dumps(found, indent=1))
        Path(args.out, "benchmark.md").write_text(text)
        print(f"{part} {'failed' if part in failed else 'measured'}", file=sys.stderr)
    print(text)
    checks = [*found.get("checks", []), *found.get("networks", [])]
    failed |= {way: error for case in found.get("search", []) for way, error in case["failed"].items()}
    return 0 if all(check["ok"] for check in checks) and not failed else 1


def about(args: argparse.Namespace) -> dict[str, Any]:
    """The machine and the versions."""
    lines = content_of("/proc/cpuinfo").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "device": args.device,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "native": list(native_search.modules()),
        "triton": triton_search.is_installed(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "repeats": args.repeats,
        "scale": args.scale,
        "load_before": os.getloadavg()[0],
    }


def devices(args: argparse.Namespace) -> list[str]:
    """The devices to measure; the last is where a job would search."""
    return [args.device] if args.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def cases(args: argparse.Namespace) -> list[tuple[str, measures.Layers, Tensor, Tensor]]:
    """The two ensembles that are searched, with codes and targets: of the model, or of clusters, and of clusters."""
    first = "M 50, D 16, K 10", *measures.cluster_case(50, 16, 10, args.scale)
    if args.model:
        first = "the model", *model_case(args)
    return [first, ("M 20, D 128, K 4", *measures.cluster_case(20, 128, 4, args.scale))]


def measure_checks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every engine against the plain one, on codes of the model's images where there is a model."""
    rows = max(64, int(2_000 * args.scale))
    return [
        check
        for name, layers, codes, target in cases(args)
        for device in devices(args)
        for check in measures.check_engines(name, layers, codes[:rows], target[:rows], device)
    ]


def measure_search(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each engine and two baselines, in turns; one entry for each ensemble."""
    options = {"threads": args.threads, "repeats": args.repeats, "scale": args.scale}
    return [measures.time_engines(*case, devices=devices(args), **options) for case in cases(args)]


def measure_networks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Encode and decode: the model's VAE, or else each architecture, untrained."""
    shapes = {"conv": (1, 28, 28), "beta_vae": (3, 64, 64)}
    untrained = {name: VAE(vae_config(name, shape)) for name, shape in shapes.items()}
    vaes = {"the model": load_model(args.model).vae} if args.model else untrained
    return [
        timing
        for name, vae in vaes.items()
        for device in devices(args)
        for timing in measures.time_networks(vae, name, device, args.repeats, args.scale)
    ]


def model_case(args: argparse.Namespace) -> tuple[measures.Layers, Tensor, Tensor]:
    """The model's layers, codes of its data, and every class but the one that the ensemble predicts."""
    model = load_model(args.model)
    dataset, listing = images(args)
    pixels = data.read_all(dataset, listing.slice(0, 2_500), model.preprocessing)[0]
    mean, _ = encode_rows(model.vae, torch.from_numpy(pixels).float() / 255)
    with torch.no_grad():
        source = model.ensemble(mean).softmax(-1).mean(0).argmax(-1)
    classes = model.num_classes
    others = (source.unsqueeze(1) + torch.arange(1, classes)) % classes
    order = torch.randperm(others.numel(), generator=torch.Generator().manual_seed(0))
    codes = mean.repeat_interleave(classes - 1, dim=0)[order].contiguous()
    return model.ensemble.layers(), codes, others.flatten()[order].contiguous()


def images(args: argparse.Namespace) -> tuple[data.Dataset, pa.Table]:
    """The data set and the listing of the images that are explained."""
    dataset = driver.open_dataset(args, args.split)
    return dataset, select_images(data.list_images(dataset), [], args.limit)[0]


def scratch(args: argparse.Namespace, name: str) -> str:
    """A directory that does not exist yet, for an audit that is thrown away."""
    directory = Path(args.out, "scratch", name)
    shutil.rmtree(directory, ignore_errors=True)
    return str(directory)


def measure_stages(args: argparse.Namespace) -> dict[str, Any]:
    """The stages of a job one after another in this process, without Ray: from image files to committed tables."""
    dataset, listing = images(args)
    model = load_model(args.model)
    rows = rows_per_shard(len(listing), raw_bytes_per_image(model, model.num_classes - 1))
    out = scratch(args, "stages")
    plan = make_plan(model, dataset, listing, method="clarity", config=measures.CONFIG, shard_rows=rows)
    seconds: Counter[str] = Counter()
    with claim(out, plan, args.model) as held:
        work = Work(out, held.run, held.plan, dataset, model.preprocessing)
        explain = ExplainShard(work, threads=args.threads, device=devices(args)[-1])
        _ = explain.explainer  # loading the model is start-up
        start, pairs = time.perf_counter(), 0
        for shard in held.pending:
            item = pa.Table.from_pylist([shard_item(plan, shard, listing)])
            note = unpack_row(write_shard(explain(read_shard(item, work)), work))["note"]
            if "error" in note:
                raise RuntimeError(f"stage {note['stage']}: {note['error']}")
            pairs += note["pairs"]
            seconds.update(note["seconds"])
        total = time.perf_counter() - start
    shutil.rmtree(out)
    return {
        "images": len(listing),
        "pairs": pairs,
        "seconds": total,
        "seconds_by_stage": seconds,
        "engine": note["engine"],
    }


def run_job(args: argparse.Namespace, name: str, *more: str, watch: bool = False) -> dict[str, Any]:
    """explain_all.py as a command: its summary, and with ``watch`` the peak memory of all its processes."""
    out = scratch(args, name)
    command = [sys.executable, str(JOBS / "explain_all.py"), "--dataset", args.dataset, "--split", args.split]
    command += ["--data", args.data] if args.data else []
    command += ["--columns", *args.columns] if args.columns else []
    command += ["--model", args.model, "--out", out, "--no-report", *more]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said, peak = None, 0
    while said is None:
        try:
            said, _ = process.communicate(timeout=0.5 if watch else None)
        except subprocess.TimeoutExpired:
            peak = max(peak, proportional_bytes(process.pid))
    if process.returncode:
        raise ValueError(f"{' '.join(command)} ended with {process.returncode}: {said[-1000:]}")
    summary = json.loads(Path(out, "summary.json").read_text())
    shutil.rmtree(out)
    keys = ("images", "pairs", "mean_steps", "seconds", "seconds_by_stage", "engines")
    return {"wall_seconds": time.perf_counter() - start, **{key: summary[key] for key in keys}, "peak_bytes": peak}


def measure_job(args: argparse.Namespace) -> dict[str, Any]:
    """The whole job over Ray as planned, with one and with two actors; a run of a few images tells the start-up."""
    few = run_job(args, "few", "--limit", "16")
    planned = run_job(args, "planned", "--limit", str(args.limit))
    one = run_job(args, "one", "--limit", str(args.limit), "--actors", "1")
    result: dict[str, Any] = {"few": few, "as_planned": planned, "one_actor": one}
    try:
        result["two_actors"] = run_job(args, "two", "--limit", str(args.limit), "--actors", "2")
    except ValueError as error:
        result["two_actors_refused"] = str(error)[-400:]
    return result | {"startup_seconds": few["seconds"], "seconds_after_startup": planned["seconds"] - few["seconds"]}


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Largest sum of the proportional set sizes of the driver and its Ray processes, for two numbers of images."""
    target = load_model(args.model).class_names[0]
    runs = [
        run_job(args, f"memory-{n}", "--limit", str(n), "--targets", target, watch=True) for n in args.memory_images
    ]
    return {"runs": runs, "ratio": runs[1]["peak_bytes"] / max(1, runs[0]["peak_bytes"])}


def proportional_bytes(root: int) -> int:
    """Sum over a process and all its descendants of their proportional set sizes."""
    children: dict[str, list[str]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        if fields := content_of(stat).rpartition(")")[2].split():
            children.setdefault(fields[1], []).append(stat.parent.name)
    family = [str(root)]
    for pid in family:  # which grows by the children of each
        family += children.get(pid, [])
    return sum(map(proportional_set, family))


def proportional_set(pid: int | str) -> int:
    """Bytes of a process, shared pages divided among their holders; 0 where it has ended."""
    lines = content_of(f"/proc/{pid}/smaps_rollup").splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def content_of(path: str | Path) -> str:
    """The text of a file of /proc; empty where it cannot be read, as of a process that has ended."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown: goals first, then the search, the stages and the machine."""
    of = found["about"]
    where = f"{of['cpu']}, {of['threads']} of {of['cores']} cores" + (f", {of['gpu']}" if of["gpu"] else "")
    lines = [f"{where}; Python {of['python']}, torch {of['torch']}; median of {of['repeats']}.", ""]
    if goals := list(goals_of(found)):
        rows = [f"{what} | {asked} | {value} | {'reached' if ok else 'missed'}" for what, asked, value, ok in goals]
        lines += lines_of_table("goal | asked | found |", rows)
    for case in found.get("search", []):
        sizes = "-".join(map(str, case["sizes"]))
        steps = next(iter(case["engines"].values()), {"mean_steps": math.nan})
        steps = case["engines"].get("native", steps)["mean_steps"]
        cost = f"{case['kflop_per_step']:.0f} kFLOP a step, {steps:.0f} steps a search"
        lines += [f"Search, {case['name']}: M = {case['members']}, {sizes}, {cost}", ""]
        rows = [
            f"{name} | {number(run['searches_per_second'])} | {number(run['search_steps_per_second'])} "
            f"| {number(run['gflops'])} | {100 * run['share_of_limit']:.1f} %"
            for name, run in case["engines"].items()
        ]
        rows += [f"{name} | FAILED | {error} | |" for name, error in case["failed"].items()]
        lines += lines_of_table("engine | searches/s | search-steps/s | GFLOP/s | of its limit", rows)
    if "checks" in found:
        rows = [
            f"{check['engine']}, {check['device']}, {check['case']}, {check['variant']} | {check['rows']} "
            f"| {check['same_steps']:.2%} "
            f"| {check['codes_within_1e-4']:.2%} | {'agrees' if check['ok'] else check.get('error', 'DIFFERS')}"
            for check in found["checks"]
        ]
        lines += lines_of_table("engine against plain | rows | same steps | codes within 1e-4 |", rows)
    if "networks" in found:
        rows = [
            f"{run['work']}, {run['device']}, {run['network']}, {run['precision']} "
            f"| {number(run['rows_per_second'])} | {run['ratio_to_pytorch']:.2f} x "
            f"| {run['share_of_gemm']:.0%} | {run['largest_difference']:.1e} "
            f"| {'within tolerance' if run['ok'] else 'DIFFERS'}"
            for run in found["networks"]
        ]
        lines += lines_of_table("network | images/s | against PyTorch | of gemm | largest difference |", rows)
    if "stages" in found:
        run = found["stages"]
        lines += [f"Stages in one process, {run['images']} images, {run['pairs']} pairs, {run['seconds']:.1f} s:", ""]
        seconds = run["seconds_by_stage"].items()
        rows = [f"{name} | {spent:.2f} | {number(run['pairs'] / max(spent, 1e-9))}" for name, spent in seconds]
        lines += lines_of_table("stage | seconds | pairs/s", rows)
    if "job" in found:
        startup = found["job"]["startup_seconds"]
        rows = [
            f"{name.replace('_', ' ')} | {run['pairs']} | {run['seconds']:.1f} | {startup:.1f}"
            for name in ("as_planned", "one_actor", "two_actors")
            if (run := found["job"].get(name))
        ]
        lines += lines_of_table("job | pairs | seconds | of it start-up", rows)
    for run in found.get("memory", {}).get("runs", []):
        lines.append(f"Peak memory of {run['images']} images: {run['peak_bytes'] / 1e6:.0f} MB.")
    if "training" in found:
        run = found["training"]
        together, apart = 1e3 * run["stacked_seconds_per_update"], 1e3 * run["sequence_seconds_per_update"]
        lines += [
            f"Training, an update of 50 members at batch 256: {together:.1f} ms stacked, {apart:.1f} ms in sequence.",
            f"Training the VAE of 28 x 28 images: {number(run['vae_images_per_second'])} images a second.",
        ]
    lines += [f"FAILED: {part}: {error}" for part, error in found["failed"].items()]
    for device, can in found.get("machine", {}).items():
        lines.append(f"{device}: " + ", ".join(f"{name} {number(value)}" for name, value in can.items()) + ".")
    return "\n".join(lines) + "\n"


def lines_of_table(head: str, rows: Sequence[str]) -> list[str]:
    """A Markdown table of a head and rows, the cells of each divided by bars; an empty line ends it."""
    return [f"| {head} |", "|" + "---|" * (head.count("|") + 1), *(f"| {row} |" for row in rows), ""]


def goals_of(found: dict[str, Any]) -> Iterator[tuple[str, str, str, bool]]:
    """What was asked of the parts that were measured: goal, asked, found, reached."""
    for index, case in enumerate(found.get("search", [])):
        runs, name = case["engines"], case["name"]
        rate = {way: run["search_steps_per_second"] for way, run in runs.items()}
        if "native" in runs:
            share, asked = runs["native"]["share_of_limit"], (1.0, 0.8)[index]
            yield f"search on the CPU, {name}: share of sgemm", f"{asked:.0%}", f"{share:.0%}", share >= asked
        faster = [
            ("native", "one at a time", 5000),
            ("native", "batched autograd", 20),
            ("batched", "batched autograd", 2),
            ("triton", "batched autograd on the GPU", 20),
        ]
        for way, other, asked in faster if index == 0 else []:
            if way in runs and other in runs:
                ratio = rate[way] / rate[other]
                yield f"{way} against {other}, {name}", f"{asked} x", f"{number(ratio)} x", ratio >= asked
        if index == 0 and "triton" in runs:
            yield "triton, search-steps/s", "2.0e8", f"{rate['triton']:.1e}", rate["triton"] >= 2e8
    if "job" in found:
        spent, allowed = found["job"]["seconds_after_startup"], found["job"]["as_planned"]["pairs"] / 1500
        yield "whole job after start-up, 1,500 pairs a second", f"{allowed:.0f} s", f"{spent:.1f} s", spent <= allowed
        if "stages" in found:
            ratio = spent / found["stages"]["seconds"]
            yield "whole job against the same stages in one process", "at most 1.15 x", f"{ratio:.2f} x", ratio <= 1.15
    if "memory" in found:
        ratio = found["memory"]["ratio"]
        small, large = (run["images"] for run in found["memory"]["runs"])
        yield f"peak memory, {large} images against {small}", "at most 1.1 x", f"{ratio:.2f} x", ratio <= 1.1
    if "training" in found:
        ratio = found["training"]["ratio"]
        yield "50 members stacked against in sequence", "6 x", f"{ratio:.1f} x", ratio >= 6


#: What is measured, in this order.
PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "machine": lambda args: {device: measures.machine(device, args.repeats) for device in devices(args)},
    "checks": measure_checks,
    "search": measure_search,
    "networks": measure_networks,
    "training": lambda args: measures.time_training(devices(args)[-1], args.repeats, args.scale),
    "stages": measure_stages,
    "job": measure_job,
    "memory": measure_memory,
}


if __name__ == "__main__":
    sys.exit(main())
