"""What the paper claims beside its tables, measured: accuracies, curves, gradients, uncertainty, paths, speed."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from clarity import judges
from clarity.classifiers import ImageEnsemble, LatentEnsemble
from clarity.methods import METHODS, Pairs, require_image_ensemble
from clarity.model import Model
from clarity.paper import metrics
from clarity.paper.compare import NAMES, Images, first_pairs, pairs_of, parts
from clarity.report.text import number, plural
from clarity.rows import decode_rows, logits_rows
from clarity.search import SearchConfig
from clarity.tables import quantise
from clarity.training.evaluate import encode_pixels
from clarity.uncertainty import decompose

#: Pairs of a batch in which steps are timed.
STEP_PAIRS = 128


def measure_claims(
    model: Model,
    oracle: judges.JudgeNet,
    images: Images,
    tables: Mapping[str, pa.Table],
    x: np.ndarray,
    label: np.ndarray,
) -> dict[str, Any]:
    """Accuracies, parameters, curves, gradients, uncertainty far from the data, and methods pair by pair.

    ``oracle`` is the held-out network, ``images`` the evaluated ones, ``tables`` scored results by name; ``x`` (N, C,
    H, W) uint8 and ``label`` (N,), -1 where unknown, are all test images.
    """
    return {
        "accuracy": accuracies(model, oracle, x, label),
        "curves": curve_measures(model, images),
        "gradients": gradient_measures(model, images),
        "far from the data": far_measures(model, images),
        "REVISE-E minus REVISE": paired_difference(tables, "revise_e", "revise"),
        "REVISE-E (latent) minus REVISE-E": paired_difference(tables, "revise_e_latent", "revise_e"),
        "Clarity minus Latent": paired_difference(tables, "clarity", "latent"),
    }


def accuracies(model: Model, oracle: judges.JudgeNet, x: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Shares of the test images that each classifier sees as labelled; images without a label are left out."""
    known = label >= 0
    images, label = x[known], label[known]
    z, _ = encode_pixels(model.vae, torch.from_numpy(images))
    drawn = np.concatenate([quantise(decode_rows(model.decoder, z[part])) for part in parts(len(z))])

    def share(probs: Any) -> float:
        return float((np.asarray(probs).argmax(-1) == label).mean())

    def shares(ensemble: str, logits: Tensor) -> dict[str, float]:
        probs = logits.softmax(-1)
        return {f"{ensemble}_ensemble": share(probs.mean(0)), f"{ensemble}_member": share(probs)}

    out = {
        "images": float(len(label)),
        **shares("latent", logits_rows(model.ensemble, z)),
        "oracle": share(judges.predict_probs(oracle, images)),
        "oracle_on_reconstructions": share(judges.predict_probs(oracle, drawn)),
    }
    if model.image_ensemble is not None:
        pixels = torch.from_numpy(images).split(1024)
        logits = [logits_rows(model.image_ensemble, some.float() / 255) for some in pixels]
        out |= shares("image", torch.cat(logits, dim=1))
    return out


def curve_measures(model: Model, images: Images) -> dict[str, dict[str, float]]:
    """Figures 5 and 7 over 100 segments between images of different classes, means over segments and members."""
    known = np.flatnonzero((images.label >= 0) & (images.label == images.source))
    pairs = zip(known.tolist(), np.roll(known, 1).tolist())
    ends = [(a, b) for a, b in pairs if images.label[a] != images.label[b]][:100]
    curves: dict[str, list[np.ndarray]] = {}
    for a, b in ends:
        for name, curve in segment_curves(model, images, a, b, 101).items():
            curves.setdefault(name, []).append(curve)
    out = {}
    for name, members in curves.items():
        each, together = np.stack(members), np.stack([curve.mean(0) for curve in members])
        for label, values in ((name, each), (f"{name}, mean of the ensemble", together)):
            out[label] = {
                "segments": float(len(ends)),
                "monotonicity": float(metrics.monotonicity(values).mean()),
                "plateau_width": float(metrics.plateau_width(values).mean()),
                "steepest_slope": float(np.median(metrics.steepest(values))),
            }
    return out


def segment_curves(model: Model, images: Images, a: int, b: int, points: int = 201) -> dict[str, np.ndarray]:
    """Each member's probability (M, T) of the label of image b along the segment between the codes of images a and b.

    The image ensemble's, where there is one, also along the segment between the decoded ends.
    """
    target = int(images.label[b])
    z = along_segment(torch.from_numpy(images.z[a]), torch.from_numpy(images.z[b]), points)
    curves = {"latent classifiers": target_curves(model.ensemble, z, target)}
    if model.image_ensemble is not None:
        decoded = decode_rows(model.vae, z)
        walk = along_segment(decoded[0], decoded[-1], points)
        curves["image classifiers"] = target_curves(model.image_ensemble, decoded, target)
        curves["image classifiers, image space"] = target_curves(model.image_ensemble, walk, target)
    return curves


def gradient_measures(model: Model, images: Images) -> dict[str, dict[str, float]]:
    """How much the members' gradients with respect to the code disagree, on the same 90 codes and targets."""
    of, target = first_pairs(images, 90, model.num_classes)
    z, wanted = torch.from_numpy(images.z[of]), torch.from_numpy(target)
    image = model.image_ensemble
    members = min(each.config.num_members for each in (model.ensemble, image) if each is not None)
    if members < 2:
        return {}
    latent = model.ensemble.select(range(members))
    out = {"latent classifiers": metrics.gradient_spread(member_gradients(latent, z, wanted))}
    if image is not None:
        through_decoder = partial(decoded_logits, replace(model, image_ensemble=image.select(range(members))))
        blocks = [member_gradients(through_decoder, z[part], wanted[part]) for part in parts(len(z), 30)]
        out["image classifiers"] = metrics.gradient_spread(np.concatenate(blocks, axis=1))
    return out


def far_measures(model: Model, images: Images) -> list[dict[str, float]]:
    """Mean epistemic uncertainty and certainty at 200 random codes of growing norm, in units of the images' codes'."""
    generator = torch.Generator().manual_seed(0)
    direction = F.normalize(torch.randn(200, model.latent_dim, generator=generator), dim=1)
    norm = float(np.median(np.linalg.norm(images.z, axis=1)))
    out = []
    for radius in (1.0, 2.0, 4.0):
        z = direction * norm * radius
        row = {"radius": radius}
        seen = {"latent": logits_rows(model.ensemble, z)}
        if model.image_ensemble is not None:
            seen["image"] = logits_rows(model.image_ensemble, decode_rows(model.vae, z))
        for name, logits in seen.items():
            row[f"{name}_epistemic"] = float(decompose(logits).epistemic.mean())
            row[f"{name}_certainty"] = float(torch.softmax(logits, -1).mean(0).max(-1).values.mean())
        out.append(row)
    return out


def paired_difference(tables: Mapping[str, pa.Table], better: str, than: str) -> dict[str, Any] | None:
    """Difference of two methods on the pairs that both answered, for a few metrics, with intervals."""
    if better not in tables or than not in tables:
        return None
    names = ["oracle_agreement", "reencoded_agreement", "im1", "implausibility", "l1_x", "steps"]
    first, second = (tables[name].select(["image_id", "target", *names]).to_pandas() for name in (better, than))
    both = first.merge(second, on=["image_id", "target"], suffixes=("", "_than"))
    groups = both["image_id"].to_numpy()
    differences = {name: (both[name] - both[f"{name}_than"]).to_numpy(float) for name in names}
    means = {name: metrics.clustered_mean(values, groups) for name, values in differences.items()}
    return {"pairs": len(both), **means}


def along_segment(start: Tensor, end: Tensor, points: int) -> Tensor:
    """Points (T, ...) at equal distances on the segment from ``start`` to ``end``, both included."""
    t = torch.linspace(0, 1, points).view(-1, *([1] * start.dim()))
    return start + t * (end - start)


@torch.inference_mode()
def target_curves(ensemble: LatentEnsemble | ImageEnsemble, points: Tensor, target: int) -> np.ndarray:
    """Each member's probability of ``target`` (M, T) at codes or images (T, ...)."""
    return torch.softmax(logits_rows(ensemble, points), dim=-1)[..., target].numpy()


def member_gradients(logits_of: Callable[[Tensor], Tensor], z: Tensor, target: Tensor) -> np.ndarray:
    """Gradient (M, B, D) of each member's cross-entropy to ``target`` (B,) at codes z (B, D).

    ``logits_of`` maps codes to logits (M, B, K), each row by itself: the latent ensemble (Eq. 5), or the image ensemble
    on decoded codes (Eq. 3).
    """
    point = z.detach().clone().requires_grad_()
    losses = [F.cross_entropy(logits, target, reduction="sum") for logits in logits_of(point)]
    return torch.stack([torch.autograd.grad(loss, point, retain_graph=True)[0] for loss in losses]).numpy()


def trace_search(model: Model, method: str, pairs: Pairs, config: SearchConfig) -> list[dict[str, np.ndarray]]:
    """Each pair's search by the plain engine, step by step (Figures 8 and 10): points and figures (T,)."""
    seen: list[list[Any]] = [[] for _ in range(len(pairs))]

    def on_step(step: Tensor, indices: Tensor, point: Tensor, target_prob: Tensor, logits: Tensor) -> None:
        columns = [values.numpy() for values in (point, target_prob, *decompose(logits))]
        for pair, *values in zip(indices.tolist(), *columns):
            seen[pair].append(values)

    METHODS[method].search(model, pairs, config, on_step=on_step)
    names = ("point", "target_prob", "predictive", "aleatoric", "epistemic")
    return [{name: np.stack(values) for name, values in zip(names, zip(*steps))} for steps in seen]


def time_steps(model: Model, config: SearchConfig, images: Images) -> list[dict[str, Any]]:
    """The paper's claim on speed, both sides with the same number of members.

    ``gradient`` rows time one gradient with respect to the codes in plain PyTorch, for one image and for STEP_PAIRS
    pairs; ``search`` rows an update of one pair in searches of STEP_PAIRS pairs. Medians over repeats in which all take
    turns; ``ratio`` is the median of the repeats' own, ``_low`` and ``_high`` the least and the largest.
    """
    ensemble = model.image_ensemble
    if ensemble is None:
        return []
    members = min(ensemble.config.num_members, model.ensemble.config.num_members)
    # So close to certainty that next to no row ends early: what is timed is the step.
    long = replace(config, min_target_prob=1 - 1e-6, max_steps=10)
    rows: list[dict[str, Any]] = []
    for batch in (1, STEP_PAIRS):
        pairs = pairs_of(model, images, *first_pairs(images, batch, model.num_classes))
        for fast, slow, count in (("latent", "revise", 1), ("clarity", "revise_e", members)):
            latent, image = model.ensemble.select(range(count)), ensemble.select(range(count))
            same = replace(model, ensemble=latent, image_ensemble=image)
            about = {"fast": fast, "slow": slow, "members": count, "pairs": len(pairs)}
            tasks = {
                "autograd": partial(take_gradient, latent, pairs),
                slow: partial(take_gradient, partial(decoded_logits, same), pairs),
            }
            rows += compare_times({"kind": "gradient", **about}, tasks)
            if batch == 1:
                continue
            chosen = METHODS[fast].search(same, pairs, replace(long, max_steps=0)).engine
            engines = dict.fromkeys((chosen, "plain"))
            tasks = {engine: partial(count_updates, same, fast, pairs, long, engine) for engine in engines}
            tasks[slow] = partial(count_updates, same, slow, pairs, long, "auto")
            rows += compare_times({"kind": "search", **about}, tasks)
    return rows


def decoded_logits(model: Model, z: Tensor) -> Tensor:
    """Logits (M, B, K) of the image ensemble at decoded codes z (B, D)."""
    return require_image_ensemble(model)(model.vae.decode(z))


def take_gradient(logits_of: Callable[[Tensor], Tensor], pairs: Pairs) -> int:
    """Take one gradient of the mean cross-entropy over members with respect to the codes."""
    point = pairs.z.detach().requires_grad_()
    logits = logits_of(point)
    loss = F.cross_entropy(logits.flatten(0, 1), pairs.target.repeat(len(logits)), reduction="sum") / len(logits)
    torch.autograd.grad(loss, point)
    return 1


def count_updates(model: Model, method: str, pairs: Pairs, config: SearchConfig, engine: str) -> int:
    """Updates of a search."""
    return int(METHODS[method].search(model, pairs, config, engine=engine).steps.sum())


def compare_times(about: Mapping[str, Any], tasks: Mapping[str, Callable[[], int]]) -> list[dict[str, Any]]:
    """One row for each task but the last, timed against the last."""
    seconds = seconds_in_turns(tasks)
    *engines, last = tasks
    rows = []
    for engine in engines:
        ratios = seconds[last] / seconds[engine]
        times = {"fast_ms": 1000 * np.median(seconds[engine]), "slow_ms": 1000 * np.median(seconds[last])}
        times |= {"ratio": np.median(ratios), "ratio_low": ratios.min(), "ratio_high": ratios.max()}
        rows.append({**about, "engine": engine, **{name: float(value) for name, value in times.items()}})
    return rows


def seconds_in_turns(
    tasks: Mapping[str, Callable[[], int]], *, repeats: int = 7, at_least: float = 0.1
) -> dict[str, np.ndarray]:
    """Seconds of one unit of each task, (``repeats``,); a task returns how many units it has done.

    In each repeat all have their turn of ``at_least`` seconds, so that what else the machine does meets all of them.
    """
    for task in tasks.values():
        task()  # what the first call alone costs
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            units, begin = 0, time.perf_counter()
            while (spent := time.perf_counter() - begin) < at_least:
                units += task()
            seconds[name].append(spent / units)
    return {name: np.array(values) for name, values in seconds.items()}


def describe_step(row: Mapping[str, Any]) -> str:
    """One row of ``time_steps`` in words."""
    what = "a gradient" if row["kind"] == "gradient" else "an update of one pair"
    sizes = f"{plural(row['pairs'], 'pair')}, {plural(row['members'], 'member')} each"
    fast, slow = (f"{NAMES[row[name]]} {number(row[f'{name}_ms'])} ms" for name in ("fast", "slow"))
    low, ratio, high = (number(row[name]) for name in ("ratio_low", "ratio", "ratio_high"))
    return f"{what}, {sizes}, engine {row['engine']}: {fast}, {slow}, {ratio} times [{low}, {high}]"
