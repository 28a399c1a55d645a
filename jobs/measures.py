"""What jobs/benchmark.py times on one device, without Ray: engines, networks, training; and the checks of the engines.

What is compared is measured in turns within one run, since a machine's speed drifts. Products of matrices in the same
turn stand for what the device can do.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from clarity import native_search, triton_search
from clarity.classifiers import EnsembleConfig
from clarity.objectives import LatentObjective
from clarity.rows import decode_rows, encode_rows, float32_convolutions
from clarity.search import SearchConfig, descend
from clarity.training.loops import (
    Codes,
    EnsembleTraining,
    VAETraining,
    train_latent_ensemble,
    train_latent_members,
    train_vae,
)
from clarity.vae import VAE, vae_config

CONFIG = SearchConfig()
Layers = list[tuple[Tensor, Tensor]]
#: Largest difference from the network as PyTorch runs it, in float32: of codes and of pixels in [0, 1].
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25}


def machine(device: str, repeats: int) -> dict[str, float]:
    """GFLOP/s of float32 and, on a GPU, tf32 and bfloat16 products, and bytes read and written by a copy."""
    source = torch.rand((64 if device == "cpu" else 1024) << 20, device=device)
    goal = torch.empty_like(source)
    copies = [timed(lambda: goal.copy_(source), device) for _ in range(repeats + 1)][1:]
    found = {
        "sgemm_gflops": statistics.median(gemm(device) for _ in range(repeats)),
        "copy_gb_per_second": 2 * source.nbytes / statistics.median(copies) / 1e9,
    }
    if device == "cuda":
        found["tf32_gflops"] = statistics.median(gemm(device, precision="tf32") for _ in range(repeats))
        found["bf16_gflops"] = statistics.median(gemm(device, torch.bfloat16) for _ in range(repeats))
    return found


def gemm(device: str, dtype: torch.dtype = torch.float32, scale: float = 1.0, precision: str = "ieee") -> float:
    """GFLOP/s of a product, the best of three so that a pause of the machine does not flatter what is compared.

    ``precision`` is ieee, or tf32: that of float32 numbers on a GPU.
    """
    size = int((2048 if device == "cpu" else 8192) * min(1.0, max(0.125, scale)))
    a = torch.rand(size, size, device=device, dtype=dtype)
    products: Any = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, precision
    try:
        return max(2e-9 * size**3 / timed(lambda: a @ a, device) for _ in range(3))
    finally:
        products.fp32_precision = before


def limit(way: str, device: str) -> float:
    """GFLOP/s of a search that does products alone: sgemm's, or for the Triton kernel, which takes three, tf32's."""
    return gemm(device, precision="tf32") / 3 if way == "triton" else gemm(device)


def fast_engines(device: str) -> list[str]:
    """The engines of a device other than the plain one; of the native builds that which it runs by default."""
    if device == "cuda":
        return ["batched", *(["triton"] if triton_search.is_installed() else [])]
    return ["batched", *(f"native-{build}" for build in list(native_search.modules())[:1])]


def check_engines(name: str, layers: Layers, codes: Tensor, target: Tensor, device: str) -> list[dict[str, Any]]:
    """Each engine of a device against the plain engine on the CPU, for the plain search and each of its options.

    The tolerance: of all rows 99.5 % make the same number of updates and none differs by more than one; of those with
    the same number all converge alike and 98 % end within 1e-4 (rounding may part two searches at a kink).
    """
    noise = torch.Generator().manual_seed(0)
    thresholds = 0.5 + 0.49 * torch.rand(len(codes), generator=noise)
    directions = torch.linalg.qr(torch.randn(codes.shape[1], 2, generator=noise))[0]
    variants = {"plain": ({}, None), "thresholds": ({"min_target_prob": thresholds}, None), "fixed": ({}, directions)}
    results = []
    for variant, (more, fixed) in variants.items():
        rows = {"target": target, "reference": codes, **more}
        expected = descend(LatentObjective(layers, CONFIG.distance_weight, fixed), codes, rows, CONFIG, engine="plain")
        for engine_name in fast_engines(device):
            moved = [(weight.to(device), bias.to(device)) for weight, bias in layers]
            objective = LatentObjective(moved, CONFIG.distance_weight, None if fixed is None else fixed.to(device))
            given = {key: value.to(device) for key, value in rows.items()}
            about = {"case": name, "engine": engine_name, "device": device, "variant": variant, "rows": len(codes)}
            try:
                found = descend(objective, codes.to(device), given, CONFIG, engine=engine_name)
            except Exception as error:  # of a GPU or its compiler: the other engines are measured all the same
                results.append(
                    about | {"same_steps": 0.0, "codes_within_1e-4": 0.0, "ok": False, "error": in_one_line(error)}
                )
                continue
            off = (found.steps.cpu() - expected.steps).abs()
            same = off == 0
            apart = (found.point.cpu() - expected.point).abs().amax(1)[same]
            leak = 0.0 if fixed is None else float(((found.point.cpu() - codes) @ fixed).abs().max())
            result = {
                "same_steps": float(same.float().mean()),
                "most_steps_off": int(off.max()),
                "converged_alike": bool((found.converged.cpu() == expected.converged)[same].all()),
                "codes_within_1e-4": float((apart < 1e-4).float().mean()),
                "moved_along_fixed": leak,
            }
            ok = result["same_steps"] >= 0.995 and result["most_steps_off"] <= 1 and result["converged_alike"]
            ok = ok and result["codes_within_1e-4"] >= 0.98 and leak < 1e-4
            results.append(about | result | {"ok": ok})
    return results


def time_engines(
    name: str,
    layers: Layers,
    codes: Tensor,
    target: Tensor,
    *,
    devices: list[str],
    threads: int,
    repeats: int,
    scale: float,
) -> dict[str, Any]:
    """Time every engine of the devices on as many rows as it searches in about a second or two."""
    ways: dict[str, tuple[Callable[..., int], int, str]] = {}
    if "cpu" in devices:
        ways = {
            "one at a time": (one_at_a_time, 2, "cpu"),
            "batched autograd": (batched_autograd, 512, "cpu"),
            "plain": (partial(search, "plain", threads), 512, "cpu"),
            "batched": (partial(search, "batched", threads), 2_048, "cpu"),
        }
        for native in fast_engines("cpu")[1:]:
            ways["native"] = (partial(search, native, threads), 20_000, "cpu")
            ways["native, 1 thread"] = (partial(search, native, 1), 10_000, "cpu")
    if "cuda" in devices:
        ways["batched autograd on the GPU"] = (batched_autograd, 50_000, "cuda")
        ways["batched on the GPU"] = (partial(search, "batched", None), 200_000, "cuda")
        for triton in fast_engines("cuda")[1:]:
            ways[triton] = (partial(search, triton, None), 2_000_000, "cuda")
    flop = 4 * sum(weight.numel() for weight, _ in layers)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    failed: dict[str, str] = {}
    for turn, (way, (run, rows, device)) in itertools.product(range(repeats + 1), ways.items()):
        if way in failed or (way == "one at a time" and turn > 2):
            continue
        count = max(2, int(rows * scale))
        index = torch.arange(count) % len(codes)
        given = [[(w.to(device), b.to(device)) for w, b in layers], codes[index].to(device), target[index].to(device)]
        peak, start = limit(way, device), time.perf_counter()
        try:
            updates = run(*given)
        except Exception as error:  # as in ``check_engines``
            failed[way] = in_one_line(error)
            continue
        seconds = time.perf_counter() - start
        if turn:  # the first turn warms up
            steps = (updates + count) / seconds  # a search of n updates evaluates its objective n + 1 times
            found = {
                "searches_per_second": count / seconds,
                "search_steps_per_second": steps,
                "mean_steps": updates / count,
                "gflops": steps * flop / 1e9,
                "share_of_limit": steps * flop / 1e9 / peak,
                "rows": count,
            }
            runs[way].append(found)
    medians = {
        way: {key: statistics.median(run[key] for run in each) for key in each[0]}
        for way, each in runs.items()
        if way not in failed
    }
    shape = {"members": layers[0][0].shape[0], "sizes": [layers[0][0].shape[1], *(w.shape[2] for w, _ in layers)]}
    return {"name": name, **shape, "kflop_per_step": flop / 1e3, "engines": medians, "failed": failed}


def in_one_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def search(engine: str, threads: int | None, layers: Layers, codes: Tensor, target: Tensor) -> int:
    """All searches by one engine; the total of updates, as of the baselines below."""
    rows = {"target": target, "reference": codes}
    objective = LatentObjective(layers, CONFIG.distance_weight)
    return int(descend(objective, codes, rows, CONFIG, engine=engine, threads=threads).steps.sum())


def one_at_a_time(layers: Layers, codes: Tensor, target: Tensor) -> int:
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


def batched_autograd(layers: Layers, codes: Tensor, target: Tensor) -> int:
    """A baseline as a researcher would write it: all searches side by side, autograd, until the last one has ended."""
    objective = LatentObjective(layers, CONFIG.distance_weight)
    rows = {"target": target, "reference": codes}
    point = codes.clone().requires_grad_()
    adam = torch.optim.Adam([point], lr=CONFIG.learning_rate)
    searching = torch.ones(len(codes), dtype=torch.bool, device=codes.device)
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


def network(layers: Layers, member: int) -> nn.Sequential:
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


def cluster_case(members: int, latent: int, classes: int, scale: float) -> tuple[Layers, Tensor, Tensor]:
    """Layers of an ensemble trained on random clusters, codes to start from, and wanted classes."""
    codes = cluster_codes(latent, classes, 256 * 10)
    config = EnsembleConfig(num_classes=classes, latent_dim=latent, num_members=members)
    training = EnsembleTraining(epochs=1, min_updates=max(10, int(400 * scale)))
    ensemble = train_latent_ensemble(codes, config, training)
    target = (codes.labels + 1 + torch.arange(len(codes)) // classes % (classes - 1)) % classes
    return ensemble.layers(), codes.mean, target


def num_images(image_shape: tuple[int, int, int], device: str) -> int:
    """Images of a timing on a device, few enough for their widest maps, of which several are in memory at once."""
    return 1024 if device == "cpu" else min(65_536, max(1024, 2**25 // math.prod(image_shape[1:])))


def time_networks(vae: VAE, name: str, device: str, repeats: int, scale: float) -> list[dict[str, Any]]:
    """Encode and decode, in float32 and bfloat16, against the network as PyTorch runs it and against products."""
    vae = vae.to(device).eval()
    count = max(32, int(num_images(vae.config.image_shape, device) * scale))
    noise = torch.Generator().manual_seed(0)
    x = torch.rand((count, *vae.config.image_shape), generator=noise).to(device)
    z = torch.randn((count, vae.config.latent_dim), generator=noise).to(device)
    works: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "encode": (lambda: encode_rows(vae, x)[0], lambda: vae.encode(x)[0]),
        "decode": (lambda: decode_rows(vae, z), lambda: vae.decode(z)),
    }
    results = []
    for work, (ours, plain) in works.items():
        with torch.inference_mode(), float32_convolutions(), FlopCounterMode(display=False) as counter:
            exact = plain()
        flop = counter.get_total_flops()
        for precision, tolerance in TOLERANCES.items():
            turns, dtype = [], getattr(torch, precision)
            short = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")
            with torch.inference_mode(), float32_convolutions(), short:
                for _ in range(repeats + 1):
                    turns.append((timed(ours, device), timed(plain, device), gemm(device, dtype, scale)))
                error = float((ours().float() - exact).abs().max())
            seconds, seconds_plain, peak = (statistics.median(each) for each in zip(*turns[1:]))
            results.append(
                {
                    "network": name,
                    "device": device,
                    "work": work,
                    "precision": precision,
                    "rows_per_second": count / seconds,
                    "ratio_to_pytorch": seconds_plain / seconds,
                    "share_of_gemm": flop / seconds / 1e9 / peak,
                    "largest_difference": error,
                    "ok": error < tolerance,
                }
            )
    return results


def time_training(device: str, repeats: int, scale: float) -> dict[str, Any]:
    """50 latent classifiers in one stack against one after another, at batch 256, and an epoch of the VAE."""
    updates = max(4, int(60 * scale))
    codes = cluster_codes(16, 10, 256 * updates)
    config = EnsembleConfig(num_classes=10, latent_dim=16, num_members=50)
    training = EnsembleTraining(epochs=1, min_updates=1)

    def train(stacks: Sequence[Sequence[int]]) -> None:
        for members in stacks:
            list(train_latent_members(codes, config, training, members, device=device))

    stacked, in_sequence = partial(train, [range(50)]), partial(train, [[member] for member in range(5)])
    turns = [(timed(stacked, device), timed(in_sequence, device) * 10) for _ in range(repeats + 1)][1:]
    together, apart = (statistics.median(each) / updates for each in zip(*turns))
    images = torch.randint(0, 256, (128 * updates, 1, 28, 28), dtype=torch.uint8)

    def vae() -> None:
        once = VAETraining(epochs=1, min_updates=1)
        list(train_vae(images, vae_config("conv", (1, 28, 28)), once, device=device))

    epochs = [timed(vae, device) for _ in range(min(repeats, 2) + 1)][1:]
    return {
        "stacked_seconds_per_update": together,
        "sequence_seconds_per_update": apart,
        "ratio": statistics.median(b / a for a, b in turns),
        "vae_images_per_second": len(images) / statistics.median(epochs),
    }


def timed(action: Callable[[], Any], device: str) -> float:
    """Seconds of a call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
