#!/usr/bin/env python
"""Measure everything that the README says about speed, on whatever machine this runs: figures, ratios, goals.

Each figure is the median of several repeats; what is compared is measured in turns within one run, since a machine's
speed drifts. Prints a Markdown table as it goes; keeps benchmark.json and benchmark.md under --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import driver
import pyarrow as pa
import torch
from torch import Tensor, nn

from clarity import data, kernels
from clarity import model as checkpoints
from clarity.audit.commits import claim
from clarity.audit.plan import rows_per_shard
from clarity.classifiers import EnsembleConfig, LatentEnsemble
from clarity.planning import choose, make_plan, raw_bytes_per_image
from clarity.rows import encode_rows
from clarity.search import LatentObjective, SearchConfig, descend
from clarity.training.loops import Codes, EnsembleTraining, train_latent_members, weights_of
from clarity.worker import ExplainShard, Work, read_shard, shard_item, unpack_row, write_shard

JOBS = Path(__file__).resolve().parent
PARTS = ("machine", "search", "training", "stages", "job", "memory")
CONFIG = SearchConfig()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    add("--model", help="model directory; without one the search runs over classifiers of random clusters")
    add("--dataset", default="digits", choices=list(data.SOURCES), help="images of the stages, job, memory (digits)")
    add("--data", help="where the images lie: a path or an s3:// URI, for every source but digits")
    add("--split", default="test", help="part of the data that is explained (test)")
    add("--limit", type=int, default=10_000, help="images of the stages and the job (10000)")
    add("--memory-images", type=int, nargs=2, default=(6_000, 60_000), metavar="N",
        help="images of the two runs whose peak memory is compared, to one class each (6000 60000)")  # fmt: skip
    add("--threads", type=int, default=os.cpu_count() or 1, help="of the search and of matrix products (all)")
    add("--repeats", type=int, default=5, help="of each timing (5)")
    add("--scale", type=float, default=1.0, help="of the numbers of searches and updates that are timed (1)")
    add("--out", help="where the figures and the scratch audits go (runs/benchmark)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the parts that are asked for; the exit code."""
    args = parse(argv)
    try:
        args.out = driver.job_path(args.out, "runs/benchmark", "--out")
        args.model = args.model and driver.job_path(args.model, "", "--model")
        if not args.model and set(args.parts) & {"stages", "job", "memory"}:
            raise ValueError("--model: the parts stages, job and memory need one; train it with jobs/train.py")
        torch.set_num_threads(args.threads)
        found: dict[str, Any] = {"about": about(args)}
        Path(args.out).mkdir(parents=True, exist_ok=True)
        for part in [part for part in PARTS if part in args.parts]:
            found[part] = globals()[f"measure_{part}"](args)
            text = table(found)
            Path(args.out, "benchmark.json").write_text(json.dumps(found, indent=1))
            Path(args.out, "benchmark.md").write_text(text)
            print(f"{part} measured", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


def about(args: argparse.Namespace) -> dict[str, Any]:
    """The machine and the versions."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "native": list(kernels.native_builds()),
        "triton": kernels.triton_available(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "repeats": args.repeats,
        "scale": args.scale,
        "load_before": os.getloadavg()[0],
    }


# ---- machine and search ----------------------------------------------------------------------------------------------


def measure_machine(args: argparse.Namespace) -> dict[str, Any]:
    """Products of 2048 x 2048 in float32, and bytes read and written by a copy of 256 MB."""
    source = torch.rand(64 << 20)
    goal = torch.empty_like(source)
    copies = [timed(lambda: goal.copy_(source)) for _ in range(args.repeats + 1)][1:]
    result = {
        "sgemm_gflops": statistics.median(sgemm("cpu") for _ in range(args.repeats)),
        "copy_gb_per_second": 2 * source.nbytes / statistics.median(copies) / 1e9,
    }
    if torch.cuda.is_available():
        result["cuda_sgemm_gflops"] = statistics.median(sgemm("cuda") for _ in range(args.repeats))
    return result


def sgemm(device: str) -> float:
    """GFLOP/s of a float32 product, the best of three so that a pause of the machine does not flatter the search."""
    size = 2048 if device == "cpu" else 8192
    a = torch.rand(size, size, device=device)
    return max(2e-9 * size**3 / timed(lambda: a @ a, device) for _ in range(3))


def measure_search(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each engine and two baselines, in turns; one entry for each ensemble."""
    cases = [
        ("M 50, D 16, K 10", *cluster_case(50, 16, 10, args.scale)),
        ("M 20, D 128, K 4", *cluster_case(20, 128, 4, args.scale)),
    ]
    if args.model:
        cases[0] = ("the model", *model_case(args))
    return [search_case(args, name, layers, codes, target) for name, layers, codes, target in cases]


def search_case(
    args: argparse.Namespace, name: str, layers: list[tuple[Tensor, Tensor]], codes: Tensor, target: Tensor
) -> dict[str, Any]:
    """Time every engine on as many rows as it does in about a second or two."""
    ways: dict[str, tuple[Callable[..., int], int, str]] = {
        "one at a time": (one_at_a_time, 2, "cpu"),
        "batched autograd": (batched_autograd, 512, "cpu"),
        "plain": (engine("plain", args.threads), 512, "cpu"),
        "batched": (engine("batched", args.threads), 2_048, "cpu"),
    }
    if builds := kernels.native_builds():
        ways["native"] = (engine(f"native-{builds[0]}", args.threads), 20_000, "cpu")
        ways["native, 1 thread"] = (engine(f"native-{builds[0]}", 1), 10_000, "cpu")
    if torch.cuda.is_available():
        ways["batched on the GPU"] = (engine("batched", None), 200_000, "cuda")
        if kernels.triton_available():
            ways["triton"] = (engine("triton", None), 2_000_000, "cuda")
    flop = 4 * sum(weight.numel() for weight, _ in layers)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for turn, (way, (run, rows, device)) in itertools.product(range(args.repeats + 1), ways.items()):
        if way == "one at a time" and turn > 2:
            continue
        count = max(2, int(rows * args.scale))
        index = torch.arange(count) % len(codes)
        given = [[(w.to(device), b.to(device)) for w, b in layers], codes[index].to(device), target[index].to(device)]
        peak, start = sgemm(device), time.perf_counter()
        updates = run(*given)
        seconds = time.perf_counter() - start
        if turn:  # the first turn warms up
            steps = (updates + count) / seconds  # a search of n updates evaluates its objective n + 1 times
            speed = {
                "searches_per_second": count / seconds,
                "search_steps_per_second": steps,
                "mean_steps": updates / count,
            }
            runs[way].append(
                speed | {"gflops": steps * flop / 1e9, "share_of_sgemm": steps * flop / 1e9 / peak, "rows": count}
            )
    medians = {way: {key: statistics.median(run[key] for run in each) for key in each[0]} for way, each in runs.items()}
    shape = {"members": layers[0][0].shape[0], "sizes": [layers[0][0].shape[1], *(w.shape[2] for w, _ in layers)]}
    return {"name": name, **shape, "kflop_per_step": flop / 1e3, "engines": medians}


def engine(name: str, threads: int | None) -> Callable[..., int]:
    """A way to search: the total of updates."""

    def run(layers: list[tuple[Tensor, Tensor]], codes: Tensor, target: Tensor) -> int:
        rows = {"target": target, "reference": codes}
        found = descend(
            LatentObjective(layers, CONFIG.distance_weight), codes, rows, CONFIG, engine=name, threads=threads
        )
        return int(found.steps.sum())

    return run


def one_at_a_time(layers: list[tuple[Tensor, Tensor]], codes: Tensor, target: Tensor) -> int:
    """A baseline as a researcher would write it: one search after another over M separate networks, torch's Adam."""
    members = [network(layers, m) for m in range(layers[0][0].shape[0])]
    updates = 0
    for z, wanted in zip(codes, target):
        point = z.clone().unsqueeze(0).requires_grad_()
        adam = torch.optim.Adam([point], lr=CONFIG.learning_rate)
        for step in range(CONFIG.max_steps + 1):
            logits = [member(point) for member in members]
            prob = torch.stack([each.softmax(1)[0, wanted] for each in logits]).mean()
            if prob > CONFIG.min_target_prob or step == CONFIG.max_steps:
                break
            adam.zero_grad()
            entropy = torch.stack([nn.functional.cross_entropy(each, wanted.view(1)) for each in logits]).mean()
            (entropy + CONFIG.distance_weight * (point - z).abs().sum()).backward()
            adam.step()
            updates += 1
    return updates


def batched_autograd(layers: list[tuple[Tensor, Tensor]], codes: Tensor, target: Tensor) -> int:
    """A baseline as a researcher would write it: all searches side by side, autograd, until the last one has ended."""
    objective = LatentObjective(layers, CONFIG.distance_weight)
    rows = {"target": target, "reference": codes}
    point = codes.clone().requires_grad_()
    adam = torch.optim.Adam([point], lr=CONFIG.learning_rate)
    searching = torch.ones(len(codes), dtype=torch.bool)
    updates = 0
    for step in range(CONFIG.max_steps + 1):
        loss, prob, _ = objective(point, rows)
        searching &= prob.detach() <= CONFIG.min_target_prob
        if step == CONFIG.max_steps or not searching.any():
            break
        adam.zero_grad()
        (loss * searching).sum().backward()
        adam.step()
        updates += int(searching.sum())
    return updates


def network(layers: list[tuple[Tensor, Tensor]], member: int) -> nn.Sequential:
    """One member as a network of its own."""
    stack: list[nn.Module] = []
    for weight, bias in layers:
        linear = nn.Linear(*weight.shape[1:])
        linear.weight.data, linear.bias.data = weight[member].t().contiguous(), bias[member].clone()
        stack += [nn.ReLU(), linear] if stack else [linear]
    return nn.Sequential(*stack).requires_grad_(False)


def cluster_codes(latent: int, classes: int, rows: int) -> Codes:
    """Codes of random clusters that overlap as the classes of real images do."""
    noise = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % classes
    centres = torch.randn(classes, latent, generator=noise) * (16 / latent) ** 0.5
    mean = centres[labels] + 0.6 * torch.randn(rows, latent, generator=noise)
    return Codes(mean, torch.full_like(mean, -3.0), labels)


def cluster_case(
    members: int, latent: int, classes: int, scale: float
) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """Layers of an ensemble trained on random clusters, codes to start from, and wanted classes."""
    codes = cluster_codes(latent, classes, 256 * 10)
    config = EnsembleConfig(num_classes=classes, latent_dim=latent, num_members=members)
    training = EnsembleTraining(epochs=1, min_updates=max(10, int(400 * scale)))
    state: dict[str, Tensor] = {}
    for epoch in train_latent_members(codes, config, training, range(members)):
        state = epoch.state()
    ensemble = LatentEnsemble(config)
    ensemble.load_state_dict(weights_of(state))
    target = (codes.labels + 1 + torch.arange(len(codes)) // classes % (classes - 1)) % classes
    return [(w.detach(), b.detach()) for w, b in ensemble.layers()], codes.mean, target


def model_case(args: argparse.Namespace) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """The model's layers, codes of its data, and every class but the one that the ensemble sees."""
    model = checkpoints.load_model(args.model)
    _, listing = images(args)
    pixels = data.read_all(_, listing.slice(0, 2_500), model.preprocessing)[0]
    mean, _ = encode_rows(model.vae, torch.from_numpy(pixels).float() / 255)
    with torch.no_grad():
        seen = model.ensemble(mean).softmax(-1).mean(0).argmax(-1)
    classes = model.num_classes
    others = (seen.unsqueeze(1) + torch.arange(1, classes)) % classes
    layers = [(weight.detach(), bias.detach()) for weight, bias in model.ensemble.layers()]
    order = torch.randperm(others.numel(), generator=torch.Generator().manual_seed(0))
    return layers, mean.repeat_interleave(classes - 1, dim=0)[order].contiguous(), others.flatten()[order].contiguous()


# ---- training --------------------------------------------------------------------------------------------------------


def measure_training(args: argparse.Namespace) -> dict[str, Any]:
    """50 latent classifiers in one stack against one after another, at batch 256; the sequence is timed on five."""
    updates = max(4, int(60 * args.scale))
    codes = cluster_codes(16, 10, 256 * updates)
    config = EnsembleConfig(num_classes=10, latent_dim=16, num_members=50)
    training = EnsembleTraining(epochs=1, min_updates=1)

    def stacked() -> None:
        for _ in train_latent_members(codes, config, training, range(50)):
            pass

    def in_sequence() -> None:
        for member in range(5):
            for _ in train_latent_members(codes, config, training, [member]):
                pass

    turns = [(timed(stacked), timed(in_sequence) * 10) for _ in range(args.repeats + 1)][1:]
    together, apart = (statistics.median(each) / updates for each in zip(*turns))
    ratio = statistics.median(b / a for a, b in turns)
    return {"stacked_seconds_per_update": together, "sequence_seconds_per_update": apart, "ratio": ratio}


# ---- stages, job, memory ---------------------------------------------------------------------------------------------


def images(args: argparse.Namespace) -> tuple[data.Dataset, pa.Table]:
    """The data set and the listing of the images that are explained."""
    dataset = data.open_dataset(args.dataset, args.data, args.split)
    return dataset, choose(data.list_images(dataset), [], args.limit)[0]


def scratch(args: argparse.Namespace, name: str) -> str:
    """An empty place for an audit that is thrown away."""
    place = Path(args.out, "scratch", name)
    shutil.rmtree(place, ignore_errors=True)
    return str(place)


def measure_stages(args: argparse.Namespace) -> dict[str, Any]:
    """The stages of a job one after another in this process, without Ray, on all threads."""
    dataset, listing = images(args)
    model = checkpoints.load_model(args.model)
    rows = rows_per_shard(len(listing), raw_bytes_per_image(model, model.num_classes - 1))
    out = scratch(args, "stages")
    plan = make_plan(model, dataset, listing, method="clarity", config=CONFIG, shard_rows=rows)
    seconds: dict[str, float] = {}
    with claim(out, plan, args.model) as held:
        work = Work(out, held.run, held.plan, dataset, model.preprocessing)
        explain = ExplainShard(work, threads=args.threads, device="cuda" if torch.cuda.is_available() else "cpu")
        _ = explain.explainer  # loading the model is start-up
        start, pairs = time.perf_counter(), 0
        for shard in held.pending:
            span = plan.shards[shard]
            item = pa.Table.from_pylist([shard_item(shard, listing[span["start"] : span["stop"]])])
            note = unpack_row(write_shard(explain(read_shard(item, work)), work))["note"]
            if "error" in note:
                raise ValueError(f"stage {note['stage']}: {note['error']}")
            pairs += note["pairs"]
            for stage, spent in note["seconds"].items():
                seconds[stage] = seconds.get(stage, 0.0) + spent
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
    command += ["--model", args.model, "--out", out, "--no-report", *more]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak: list[int] = [0]
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.5):
            peak[0] = max(peak[0], proportional_bytes(process.pid))

    watcher = threading.Thread(target=look)
    if watch:
        watcher.start()
    said, _ = process.communicate()
    over.set()
    if watch:
        watcher.join()
    if process.returncode:
        raise ValueError(f"{' '.join(command)} ended with {process.returncode}: {said[-1000:]}")
    summary = json.loads(Path(out, "summary.json").read_text())
    shutil.rmtree(out)
    keys = ("images", "pairs", "mean_steps", "seconds", "seconds_by_stage", "engines")
    return {"wall_seconds": time.perf_counter() - start, **{key: summary[key] for key in keys}, "peak_bytes": peak[0]}


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
    target = checkpoints.load_model(args.model).class_names[0]
    runs = [
        run_job(args, f"memory-{n}", "--limit", str(n), "--targets", target, watch=True) for n in args.memory_images
    ]
    return {"runs": runs, "ratio": runs[1]["peak_bytes"] / max(1, runs[0]["peak_bytes"])}


def proportional_bytes(root: int) -> int:
    """Sum over a process and all its descendants of their proportional set sizes."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # it has ended
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    return sum(_proportional_set(pid) for pid in _family(root, children))


def _family(pid: int, children: dict[int, list[int]]) -> Iterator[int]:
    yield pid
    for child in children.get(pid, ()):
        yield from _family(child, children)


def _proportional_set(pid: int) -> int:
    return 1024 * sum(int(line.split()[1]) for line in _lines(f"/proc/{pid}/smaps_rollup") if line.startswith("Pss:"))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def timed(action: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of a call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ---- the table -------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown: goals first, then the search, the stages and the machine."""
    of = found["about"]
    where = f"{of['cpu']}, {of['threads']} of {of['cores']} cores" + (f", {of['gpu']}" if of["gpu"] else "")
    lines = [f"{where}; Python {of['python']}, torch {of['torch']}; median of {of['repeats']}.", ""]
    if goals := list(goals_of(found)):
        lines += ["| goal | asked | found | |", "|---|---|---|---|"]
        lines += [
            f"| {what} | {asked} | {value} | {'reached' if ok else 'missed'} |" for what, asked, value, ok in goals
        ]
        lines.append("")
    for case in found.get("search", []):
        sizes = "-".join(map(str, case["sizes"]))
        steps = next(iter(case["engines"].values()))
        steps = case["engines"].get("native", steps)["mean_steps"]
        cost = f"{case['kflop_per_step']:.0f} kFLOP a step, {steps:.0f} steps a search"
        lines.append(f"Search, {case['name']}: M = {case['members']}, {sizes}, {cost}")
        lines += ["", "| engine | searches/s | search-steps/s | GFLOP/s | of sgemm |", "|---|---|---|---|---|"]
        for name, run in case["engines"].items():
            lines.append(
                f"| {name} | {_number(run['searches_per_second'])} | {_number(run['search_steps_per_second'])} "
                f"| {_number(run['gflops'])} | {100 * run['share_of_sgemm']:.1f} % |"
            )
        lines.append("")
    if "stages" in found:
        run = found["stages"]
        lines += [f"Stages in one process, {run['images']} images, {run['pairs']} pairs, {run['seconds']:.1f} s:", ""]
        lines += ["| stage | seconds | pairs/s |", "|---|---|---|"]
        lines += [
            f"| {name} | {spent:.2f} | {_number(run['pairs'] / max(spent, 1e-9))} |"
            for name, spent in run["seconds_by_stage"].items()
        ]
        lines.append("")
    if "job" in found:
        lines += ["| job | pairs | seconds | of it start-up |", "|---|---|---|---|"]
        for name in ("as_planned", "one_actor", "two_actors"):
            if run := found["job"].get(name):
                startup = found["job"]["startup_seconds"]
                lines.append(f"| {name.replace('_', ' ')} | {run['pairs']} | {run['seconds']:.1f} | {startup:.1f} |")
        lines.append("")
    for run in found.get("memory", {}).get("runs", []):
        lines.append(f"Peak memory of {run['images']} images: {run['peak_bytes'] / 1e6:.0f} MB.")
    if "training" in found:
        run = found["training"]
        together, apart = 1e3 * run["stacked_seconds_per_update"], 1e3 * run["sequence_seconds_per_update"]
        lines += [
            f"Training, an update of 50 members at batch 256: {together:.1f} ms stacked, {apart:.1f} ms in sequence."
        ]
    if "machine" in found:
        lines.append(", ".join(f"{name} {_number(value)}" for name, value in found["machine"].items()) + ".")
    return "\n".join(lines) + "\n"


def goals_of(found: dict[str, Any]) -> Iterator[tuple[str, str, str, bool]]:
    """What was asked of the parts that were measured: goal, asked, found, reached."""
    for number, case in enumerate(found.get("search", [])):
        runs, name = case["engines"], case["name"]
        rate = {way: run["search_steps_per_second"] for way, run in runs.items()}
        if "native" in runs:
            share, asked = runs["native"]["share_of_sgemm"], (1.0, 0.8)[number]
            yield f"search on the CPU, {name}: share of sgemm", f"{asked:.0%}", f"{share:.0%}", share >= asked
        faster = [
            ("native", "one at a time", 5000),
            ("native", "batched autograd", 20),
            ("batched", "batched autograd", 2),
        ]
        faster += [("triton", "batched on the GPU", 20)]
        for way, other, asked in faster if number == 0 else []:
            if way in runs and other in runs:
                ratio = rate[way] / rate[other]
                yield f"{way} against {other}, {name}", f"{asked} x", f"{_number(ratio)} x", ratio >= asked
        if number == 0 and "triton" in runs:
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


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
