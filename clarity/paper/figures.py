"""The paper's figures, drawn from results and from searches of their own.

Shapes: B images, T points of a segment or steps of a path, K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from clarity import plots
from clarity.figure import Picture
from clarity.methods import METHODS
from clarity.model import Model
from clarity.paper import panels
from clarity.paper.claims import along_segment, target_curves, trace_search
from clarity.paper.compare import NAMES, Images, Results, encode_images, pairs_of, parts
from clarity.rows import decode_rows, encode_rows, logits_rows
from clarity.search import SearchConfig
from clarity.uncertainty import decompose

log = logging.getLogger(__name__)

Write = Callable[[str, Picture], None]

#: Test images of each class in Figure 10.
CLOUD_IMAGES = 300
#: Methods of the grids, in the paper's order.
GRID_1 = ("fgsm", "schut", "revise_e", "clarity")
GRID_2 = ("revise_e", "revise_e_latent", "clarity")
GRID_EXAMPLES = ("fgsm", "schut", "revise", "revise_e", "latent", "clarity")
#: Source and target of each row of the grids, by class name.
TABLE_1 = (("3", "8"), ("0", "9"), ("4", "7"), ("8", "0"), ("2", "1"), ("9", "5"))
TABLE_2 = [("blond", "black"), ("black", "gray"), ("black", "blond")]
TABLE_2 += [("brown", "gray"), ("gray", "black"), ("blond", "brown")]
EXAMPLES = (("5", "1"), ("6", "3"))
#: Segments of Figures 5 and 7; the first is Figure 8's search, the last Figure 10's.
SEGMENTS = (("3", "8"), ("5", "1"))


def draw_tables(write: Write, class_names: Sequence[str], results: Mapping[str, Results]) -> None:
    """The grids of Tables 1 and 2 and of the examples: a row for each class pair that has an image."""
    known = named_pairs((*TABLE_1, *TABLE_2), class_names, 6)
    shown = [pair for pair in EXAMPLES if set(pair) <= set(class_names)] or known[:2]
    for file, pairs, wanted in (
        ("table1", known, GRID_1),
        ("table2", known, GRID_2),
        ("examples", shown, GRID_EXAMPLES),
    ):
        methods, vae = [method for method in wanted if method in results], file == "table2"
        found = {pair: row for pair in pairs if (row := grid_row(class_names, results, methods, pair, vae))}
        if found:
            columns = ["original", *(["VAE"] if vae else []), *(NAMES[method] for method in methods)]
            labels = [f"{source} → {target}" for source, target in found]
            pictures, notes = zip(*found.values())
            write(file, panels.image_grid(pictures, columns, labels, notes, differences=file == "examples"))


def grid_row(
    class_names: Sequence[str],
    results: Mapping[str, Results],
    methods: Sequence[str],
    pair: tuple[str, str],
    vae: bool,
) -> tuple[list[np.ndarray | None], list[str]] | None:
    """One row of a grid: an image of the source, chosen by ``first_of``, and what each method made of it."""
    source, target = (class_names.index(name) for name in pair)
    if not methods:
        return None
    fewest = min((results[method].images for method in methods), key=lambda images: len(images.ids))
    if not (fewest.label == source).any():
        return None
    chosen = first_of(fewest, source)
    pictures: list[np.ndarray | None] = [fewest.x[chosen], *([fewest.reconstruction[chosen]] if vae else [])]
    notes = ["" for _ in pictures]
    for method in methods:
        found = results[method]
        index = found.images.row.get(fewest.ids[chosen], -1)
        rows = np.flatnonzero((found.of == index) & (found.target == target))
        pictures.append(found.x_cf[rows[0]] if len(rows) else None)
        reached = len(rows) and found.columns["strict_validity"][rows[0]]
        notes.append("" if reached or not len(rows) else "not converged")
    return pictures, notes


def named_pairs(wanted: Iterable[tuple[str, str]], class_names: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Those of the wanted class pairs that the data has; without any, the first ``count`` neighbours."""
    neighbours = [(class_names[k], class_names[(k + 1) % len(class_names)]) for k in range(len(class_names))]
    return [pair for pair in wanted if set(pair) <= set(class_names)] or neighbours[:count]


def first_of(images: Images, label: int) -> int:
    """The first image of a class of which the model is sure (probability above 0.9), else sees as such, else any."""
    of_class = images.label == label
    agreed = of_class & (images.source == label)
    for wanted in (agreed & (images.certainty > 0.9), agreed, of_class):
        if wanted.any():
            return int(np.flatnonzero(wanted)[0])
    raise ValueError(f"no image is of class {label}")


def draw_searches(
    write: Write,
    model: Model,
    config: SearchConfig,
    images: Images,
    flat: Model | None,
    tested: tuple[np.ndarray, np.ndarray, list[str]],
) -> dict[str, Any]:
    """Figures 5, 7, 8 and, with a model of a 2-D latent space, 10; returns what Figure 10 measures.

    ``write`` takes each figure by name; without image classifiers nothing is drawn. ``tested`` are pixels, labels and
    ids of all test images.
    """
    names = list(model.class_names)
    segments = [
        pair
        for pair in named_pairs(SEGMENTS, names, 2)
        if all((images.label == names.index(name)).any() for name in pair)
    ]
    if model.image_ensemble is None or not segments:
        log.info("figures 5, 7, 8 and 10 need image classifiers and labelled images: left out")
        return {}
    draw_curves(write, model, images, segments)
    draw_traces(write, model, config, images, segments[0])
    return {} if flat is None else draw_latent_map(write, flat, config, tested, segments[-1])


def draw_curves(write: Write, model: Model, images: Images, segments: Sequence[tuple[str, str]]) -> None:
    """Figures 5 and 7."""
    names = list(model.class_names)
    assert model.image_ensemble is not None
    five, seven = {}, {}
    for letter, (source, target) in zip("abc", segments):
        a, b = (first_of(images, names.index(name)) for name in (source, target))
        z = along_segment(torch.from_numpy(images.z[a]), torch.from_numpy(images.z[b]))
        decoded = decode_rows(model.vae, z)
        walk = along_segment(decoded[0], decoded[-1])
        k = names.index(target)
        image = target_curves(model.image_ensemble, decoded, k)
        title = f"({letter}) {source} → {target}"
        five[title] = (image, target_curves(model.ensemble, z, k))
        seven[title] = (target_curves(model.image_ensemble, walk, k).mean(0), image.mean(0))
    write("figure5", panels.probability_curves(five))
    write("figure7", panels.segment_curves(seven))


def draw_traces(write: Write, model: Model, config: SearchConfig, images: Images, pair: tuple[str, str]) -> None:
    """Figure 8."""
    source, target = (list(model.class_names).index(name) for name in pair)
    pairs = pairs_of(model, images, np.array([first_of(images, source)]), np.array([target]))
    shown = {}
    for method in ("revise_e", "clarity"):
        steps = trace_search(model, method, pairs, config)[0]
        ends = decode_rows(model.vae, torch.from_numpy(steps["point"][[0, -1]])).numpy()
        shown[NAMES[method]] = plots.Trace(
            steps["target_prob"], steps["aleatoric"], steps["epistemic"], (ends[0], ends[1])
        )
    drawn = plots.search_traces(shown, source=pair[0], target=pair[1], min_target_prob=config.min_target_prob)
    write("figure8", drawn)


def draw_latent_map(
    write: Write,
    flat: Model,
    config: SearchConfig,
    tested: tuple[np.ndarray, np.ndarray, list[str]],
    pair: tuple[str, str],
    paths: int = 10,
) -> dict[str, Any]:
    """Figure 10: the methods' paths in a 2-D latent space over the epistemic uncertainty of their classifiers.

    Draws the first of ``paths`` starts, test images of the source class, and measures all of them: how many end among
    the target's test images, that is no farther from their 5 nearest than 95 % of those are from each other.
    """
    source, target = (list(flat.class_names).index(name) for name in pair)
    chosen = np.concatenate([np.flatnonzero(tested[1] == k)[:CLOUD_IMAGES] for k in (source, target)])
    label = tested[1][chosen]
    images = encode_images(flat, [tested[2][index] for index in chosen], tested[0][chosen], label)
    wide = 1.6 * np.abs(images.z).max(axis=0)
    extent = (-float(wide[0]), float(wide[0]), -float(wide[1]), float(wide[1]))
    z1, z2 = np.meshgrid(np.linspace(*extent[:2], 61), np.linspace(*extent[2:], 61))
    grid = torch.from_numpy(np.stack([z1.ravel(), z2.ravel()], axis=1).astype(np.float32))
    assert flat.image_ensemble is not None
    decoded = [logits_rows(flat.image_ensemble, decode_rows(flat.vae, grid[part])) for part in parts(len(grid), 512)]
    logits = {"latent ensemble": logits_rows(flat.ensemble, grid), "image ensemble": torch.cat(decoded, dim=1)}
    maps = {name: decompose(values).epistemic.numpy().reshape(z1.shape) for name, values in logits.items()}

    first = first_of(images, source)
    seen = np.flatnonzero((label == source) & (images.source == source))
    starts = np.array([first, *(index for index in seen if index != first)][:paths])
    pairs = pairs_of(flat, images, starts, np.full(len(starts), target))
    cloud = torch.from_numpy(images.z[label == target])
    # Each point's nearest is itself.
    spread = torch.cdist(cloud, cloud).topk(min(6, len(cloud)), largest=False).values[:, 1:].mean(1).quantile(0.95)
    drawn: dict[str, panels.LatentMap] = {}
    ends: dict[str, dict[str, float]] = {}
    for method in GRID_1:
        steps = trace_search(flat, method, pairs, config)
        walks, last = [found["point"] for found in steps], torch.from_numpy(steps[0]["point"][-1:])
        if METHODS[method].space == "image":
            whole, *others = walks
            walks = [encode_rows(flat.vae, torch.from_numpy(walk))[0].numpy()
                     for walk in (whole, *(walk[[0, -1]] for walk in others))]  # fmt: skip
        else:
            last = decode_rows(flat.vae, last)
        group = "latent ensemble" if method == "clarity" else "image ensemble"
        drawn[NAMES[method]] = panels.LatentMap(maps[group], walks[0], last[0].numpy(), group)
        away = torch.cdist(torch.from_numpy(np.stack([walk[-1] for walk in walks])), cloud)
        away = away.topk(min(5, len(cloud)), largest=False).values.mean(1)
        ends[NAMES[method]] = {
            "paths": float(len(walks)),
            "reached": float(np.mean([found["target_prob"][-1] > config.min_target_prob for found in steps])),
            "end_in_cloud": float((away <= spread).float().mean()),
            "moved": float(np.mean([np.linalg.norm(walk[-1] - walk[0]) for walk in walks])),
        }
    points = [images.z[label == k] for k in (source, target)]
    write("figure10", panels.latent_paths(drawn, extent, points[0], points[1], source=pair[0], target=pair[1]))
    return ends
