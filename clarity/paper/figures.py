"""The paper's figures, drawn from results and from searches of their own.

Shapes: R rows and Q columns of a grid, N points of a plane, G cells of a map's side.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D

from clarity.figure import DARK, FULL_WIDTH, LIGHT, MIDDLE, Picture, new_picture, styled
from clarity.methods import METHODS
from clarity.model import Model
from clarity.paper.claims import segment_curves, trace_search
from clarity.paper.compare import NAMES, Images, Results, encode_images, pairs_of
from clarity.plots import Array, draw_difference, draw_image, image_axes, set_title
from clarity.rows import decode_rows, encode_rows, logits_rows
from clarity.search import SearchConfig
from clarity.uncertainty import decompose

log = logging.getLogger(__name__)

Write = Callable[[str, Picture], None]

#: Side of an image in a grid, in inches.
CELL = 0.62
IMAGE_CURVE: dict[str, Any] = {"color": DARK, "ls": (0, (4, 1.5))}
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
        drawn = [results[method] for method in methods]
        found = {pair: row for pair in pairs if drawn and (row := grid_row(class_names, drawn, pair, vae))}
        if found:
            columns = ["original", *(["VAE"] if vae else []), *(NAMES[method] for method in methods)]
            labels = [f"{source} → {target}" for source, target in found]
            pictures, notes = zip(*found.values())
            write(file, image_grid(pictures, columns, labels, notes, differences=file == "examples"))


def grid_row(
    class_names: Sequence[str], results: Sequence[Results], pair: tuple[str, str], vae: bool
) -> tuple[list[np.ndarray | None], list[str]] | None:
    """One row of a grid: an image of the source, chosen by ``first_of``, and what each method made of it."""
    source, target = (class_names.index(name) for name in pair)
    images = results[0].images
    compared = np.isin(np.arange(len(images.ids)), results[0].of)
    if not (compared & (images.label == source)).any():
        return None
    chosen = first_of(replace(images, label=np.where(compared, images.label, -1)), source)
    pictures: list[np.ndarray | None] = [images.x[chosen], *([images.reconstruction[chosen]] if vae else [])]
    notes = ["" for _ in pictures]
    for found in results:
        index = found.images.row[images.ids[chosen]]
        rows = np.flatnonzero((found.of == index) & (found.target == target))
        pictures.append(found.x_cf[rows[0]] if len(rows) else None)
        notes.append("" if not len(rows) or found.columns["strict_validity"][rows[0]] else "not converged")
    return pictures, notes


def named_pairs(wanted: Iterable[tuple[str, str]], class_names: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Those of the wanted class pairs that the data has; without any, the first ``count`` neighbours."""
    neighbours = [(class_names[k], class_names[(k + 1) % len(class_names)]) for k in range(len(class_names))]
    return [pair for pair in wanted if set(pair) <= set(class_names)] or neighbours[:count]


def first_of(images: Images, label: int) -> int:
    """The first image of a class of which the model is sure (probability above 0.9), else sees as such, else any."""
    of_class = images.label == label
    agreed = of_class & (images.source == label)
    wanted = next(rows for rows in (agreed & (images.certainty > 0.9), agreed, of_class) if rows.any())
    return int(wanted.argmax())


def draw_searches(
    write: Write,
    model: Model,
    config: SearchConfig,
    images: Images,
    flat: Model | None,
    tested: tuple[np.ndarray, np.ndarray, list[str]],
) -> dict[str, Any]:
    """Figures 5, 7, 8 and, with a model of a 2-D latent space, 10; returns what Figure 10 measures.

    ``tested`` are pixels, labels and ids of all test images.
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
    """Figure 5: the target's probability by each image and latent classifier, along segments between two codes.

    Figure 7: by the image ensemble, along the same segments and along those between the decoded ends.
    """
    names = list(model.class_names)
    one_of_many: dict[str, Any] = {"color": LIGHT, "lw": 0.7, "alpha": 0.6, "zorder": 2}
    image_of_many = {**IMAGE_CURVE, "lw": 0.6, "alpha": 0.7, "zorder": 3}
    five, seven = {}, {}
    for letter, (source, target) in zip("abc", segments):
        a, b = (first_of(images, names.index(name)) for name in (source, target))
        latent, image, walked = segment_curves(model, images, a, b).values()
        title = f"({letter}) {source} → {target}"
        five[title] = ((latent, one_of_many), (image, image_of_many))
        walked, means = (curves.mean(0, keepdims=True) for curves in (walked, image))
        seven[title] = ((walked, IMAGE_CURVE), (means, {"color": MIDDLE}))
    handles = [
        Line2D([], [], **IMAGE_CURVE, label=f"{len(image)} image classifiers (REVISE)"),
        Line2D([], [], color=LIGHT, label=f"{len(latent)} latent classifiers"),
    ]
    write("figure5", segment_panels(five, handles, "position t on the segment between the two codes"))
    handles = [
        Line2D([], [], **IMAGE_CURVE, label="walked in the image space"),
        Line2D([], [], color=MIDDLE, label="walked in the latent space"),
    ]
    write("figure7", segment_panels(seven, handles, "position t on the segment"))


def draw_traces(write: Write, model: Model, config: SearchConfig, images: Images, pair: tuple[str, str]) -> None:
    """Figure 8."""
    source, target = (list(model.class_names).index(name) for name in pair)
    pairs = pairs_of(model, images, np.array([first_of(images, source)]), np.array([target]))
    shown = {}
    for method in ("revise_e", "clarity"):
        steps = trace_search(model, method, pairs, config)[0]
        ends = decode_rows(model.decoder, torch.from_numpy(steps["point"][[0, -1]])).numpy()
        shown[NAMES[method]] = steps, ends
    drawn = search_traces(shown, source=pair[0], target=pair[1], min_target_prob=config.min_target_prob)
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
    wide, high = (1.6 * np.abs(images.z).max(axis=0)).tolist()
    extent = (-wide, wide, -high, high)
    z1, z2 = np.meshgrid(np.linspace(*extent[:2], 61), np.linspace(*extent[2:], 61))
    grid = torch.from_numpy(np.stack([z1.ravel(), z2.ravel()], axis=1).astype(np.float32))
    assert flat.image_ensemble is not None
    logits = {
        "latent ensemble": logits_rows(flat.ensemble, grid),
        "image ensemble": logits_rows(flat.image_ensemble, decode_rows(flat.vae, grid)),
    }
    maps = {name: decompose(values).epistemic.numpy().reshape(z1.shape) for name, values in logits.items()}

    first = first_of(images, source)
    seen = np.flatnonzero((label == source) & (images.source == source))
    starts = np.array([first, *seen[seen != first]][:paths])
    pairs = pairs_of(flat, images, starts, np.full(len(starts), target))
    cloud = torch.from_numpy(images.z[label == target])
    # Each point's nearest is itself.
    spread = torch.cdist(cloud, cloud).topk(min(6, len(cloud)), largest=False).values[:, 1:].mean(1).quantile(0.95)
    drawn: dict[str, LatentMap] = {}
    ends: dict[str, dict[str, float]] = {}
    for method in GRID_1:
        steps = trace_search(flat, method, pairs, config)
        walks, last = [found["point"] for found in steps], torch.from_numpy(steps[0]["point"][-1:])
        if METHODS[method].space == "image":
            walks = [encode_rows(flat.vae, torch.from_numpy(walk))[0].numpy() for walk in walks]
        else:
            last = decode_rows(flat.vae, last)
        group = "latent ensemble" if method == "clarity" else "image ensemble"
        drawn[NAMES[method]] = LatentMap(maps[group], walks[0], last[0].numpy(), group)
        away = torch.cdist(torch.tensor(np.stack([walk[-1] for walk in walks])), cloud)
        away = away.topk(min(5, len(cloud)), largest=False).values.mean(1)
        ends[NAMES[method]] = {
            "paths": float(len(walks)),
            "reached": float(np.mean([found["target_prob"][-1] > config.min_target_prob for found in steps])),
            "end_in_cloud": float((away <= spread).float().mean()),
            "moved": float(np.mean([np.linalg.norm(walk[-1] - walk[0]) for walk in walks])),
        }
    points = [images.z[label == k] for k in (source, target)]
    write("figure10", latent_paths(drawn, extent, points[0], points[1], source=pair[0], target=pair[1]))
    return ends


@styled
def search_traces(
    traces: Mapping[str, tuple[Mapping[str, Array], Array]],
    *,
    source: str,
    target: str,
    min_target_prob: float,
) -> Picture:
    """Figure 8: target probability, logarithm of the epistemic uncertainty and aleatoric uncertainty at each step.

    By method its search as in ``claims.trace_search``, and pictures (2, C, H, W) of the start and the end.
    """
    picture = new_picture(min(FULL_WIDTH, 0.5 + 3.1 * len(traces)), 2.5)
    axes = picture.subplots(1, len(traces), sharey=True, squeeze=False)[0]
    logs = [np.log10(np.maximum(steps["epistemic"], 1e-8)) for steps, _ in traces.values()]
    free = 0.3  # the upper part of each panel, for the images
    bottom, top = float(np.floor(min(map(np.min, logs)))), float(np.ceil(max(map(np.max, logs))))
    powers = np.arange(bottom, top + 1)
    top = bottom + (top - bottom) / (1 - free)
    height = max(1.02, max(float(np.max(steps["aleatoric"])) for steps, _ in traces.values()) * 1.03) / (1 - free)
    for i, (ax, (name, (steps, ends)), log) in enumerate(zip(axes, traces.items(), logs)):
        last = len(log) - 1
        ax.axhline(min_target_prob, color="0.75", lw=0.6, zorder=0)
        ax.plot(steps["target_prob"], color=MIDDLE)
        ax.plot(steps["aleatoric"], color="#4d9221", ls=(0, (1, 1)), lw=1.4)
        right = ax.twinx()
        right.plot(log, color=DARK, ls=(0, (5, 1.5)), lw=1)
        right.set_ylim(bottom, top)
        right.set_yticks(powers)
        right.spines["right"].set_visible(True)
        if i == len(traces) - 1:
            right.set_ylabel("log$_{10}$ epistemic uncertainty (nats)")
        else:
            right.set_yticklabels([])
        ax.set_ylim(-0.02, height)
        ax.set_yticks(np.arange(0, height * (1 - free), 0.5))
        ax.set_xlim(0, max(1, last))
        ax.set_xlabel("step")
        set_title(ax, f"{name}, {source} → {target}, {last} steps", 2.6)
        for k, image in enumerate(ends):
            corner = ax.inset_axes((0.02 if k == 0 else 0.81, 0.74, 0.17, 0.25))
            draw_image(corner, image)
            side = {"x": 1.06, "ha": "left"} if k == 0 else {"x": -0.06, "ha": "right"}
            corner.text(y=0.5, s=("start", "end")[k], va="center", fontsize=7, transform=corner.transAxes, **side)
    axes[0].set_ylabel("target probability;\naleatoric uncertainty (nats)")
    handles = [
        Line2D([], [], color=MIDDLE, label="target probability"),
        Line2D([], [], color="#4d9221", ls=(0, (1, 1)), lw=1.4, label="aleatoric (nats)"),
        Line2D([], [], color=DARK, ls=(0, (5, 1.5)), label="log$_{10}$ epistemic (right axis)"),
    ]
    picture.legend(handles=handles, loc="outside upper center", ncols=3)
    return picture


@styled
def segment_panels(
    panels: Mapping[str, Sequence[tuple[Array, dict[str, Any]]]], handles: list[Line2D], xlabel: str
) -> Picture:
    """Probabilities over t in [0, 1], one panel for each title: groups of curves (M, T) with their line style."""
    picture = new_picture(min(FULL_WIDTH, 0.4 + 3.1 * len(panels)), 2.3)
    axes = picture.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, groups) in zip(axes, panels.items()):
        for curves, line in groups:
            ax.plot(np.linspace(0, 1, curves.shape[-1]), curves.T, **line)
        ax.set(title=title, xlim=(0, 1), ylim=(-0.02, 1.02))
        ax.set_xticks([0, 0.5, 1], labels=["0", "0.5", "1"])
        ax.set_yticks([0, 0.5, 1], labels=["0", "0.5", "1"])
    axes[0].set_ylabel("probability of the target")
    picture.supxlabel(xlabel, fontsize=8)
    picture.legend(handles=handles, loc="outside upper center", ncols=2)
    return picture


@styled
def image_grid(
    images: Sequence[Sequence[Array | None]],
    column_names: Sequence[str],
    row_names: Sequence[str],
    notes: Sequence[Sequence[str]],
    *,
    differences: bool = False,
) -> Picture:
    """Images in R rows and Q columns, the original first in each row (Tables 1 and 2, Figures 1, 2, 4 and 9).

    ``notes`` (R x Q) are short texts under the images; None leaves a cell empty with a dash. ``differences``: under
    each row, each image minus the row's first, grey where nothing changed.
    """
    picture, axes = image_axes(images, len(images) * (1 + differences), len(column_names), CELL)
    for q, name in enumerate(column_names):
        set_title(axes[0][q], name, CELL)
    for r, row in enumerate(images):
        line = axes[r * (1 + differences)]
        line[0].set_ylabel(row_names[r], parse_math=False, rotation=0, ha="right", va="center", labelpad=4)
        for q, image in enumerate(row):
            draw_image(line[q], image)
            line[q].set_xlabel(notes[r][q], fontsize=6, labelpad=1.5)
            if differences:
                draw_difference(axes[2 * r + 1][q], image if q else None, row[0])
    if differences:
        shades = ScalarMappable(Normalize(-1, 1), "gray")
        bar = picture.colorbar(shades, ax=axes, shrink=min(0.8, 4 / len(axes)), aspect=18, anchor=(0, 0), pad=0.02)
        bar.set_label("difference from the original")
        bar.set_ticks([-1, 0, 1], labels=["−1", "0", "+1"])
    return picture


@dataclass(frozen=True)
class LatentMap:
    """One panel of Figure 10: a map (G, G) of epistemic uncertainty, rows by z2 and columns by z1, and a path (T, 2).

    Panels of one ``group`` share their scale of shades.
    """

    epistemic: Array
    path: Array
    image: Array
    group: str


@styled
def latent_paths(
    panels: Mapping[str, LatentMap],
    extent: tuple[float, float, float, float],
    source_points: Array,
    target_points: Array,
    *,
    source: str,
    target: str,
) -> Picture:
    """Figure 10; ``extent`` (z1 low, z1 high, z2 low, z2 high) is that of every map, points (N, 2) are codes."""
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    picture = new_picture(3.3 * columns, 0.3 + 2.75 * rows)
    axes = picture.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for i, (ax, (name, panel)) in enumerate(zip(axes.flat, panels.items())):
        brightest = max(float(other.epistemic.max()) for other in panels.values() if other.group == panel.group)
        shown = ax.imshow(
            panel.epistemic, extent=extent, origin="lower", cmap="gray", vmin=0, vmax=brightest, aspect="auto"
        )
        ax.scatter(*source_points.T, s=4, marker="o", c="#fec44f", edgecolors="black", linewidths=0.15, alpha=0.7)
        ax.scatter(*target_points.T, s=5, marker="^", c="#1c9099", edgecolors="white", linewidths=0.15, alpha=0.7)
        ax.plot(*panel.path.T, color="white", lw=2.6, zorder=4)
        ax.plot(*panel.path.T, color="#d7301f", lw=1.3, zorder=5)
        ax.scatter(*panel.path[0], s=34, marker="o", c="white", edgecolors="black", linewidths=1, zorder=6)
        ax.scatter(*panel.path[-1], s=34, marker="s", c="black", edgecolors="white", linewidths=1, zorder=7)
        ax.set(xlim=extent[:2], ylim=extent[2:], title=f"{name} ({panel.group})")
        ax.set_box_aspect(1)
        if i >= len(panels) - columns:
            ax.set_xlabel("$z_1$")
        if i % columns == 0:
            ax.set_ylabel("$z_2$")
        corner = ax.inset_axes((0.76, 0.76, 0.23, 0.23))
        draw_image(corner, panel.image)
        corner.spines[:].set_color("white")
        bar = picture.colorbar(shown, ax=ax, shrink=0.8, aspect=24, pad=0.02)
        if i % columns == columns - 1 or i == len(panels) - 1:
            bar.set_label("epistemic uncertainty (nats)")
    handles = [
        Line2D([], [], ls="", marker="o", mfc="#fec44f", mec="black", mew=0.3, ms=4, label=f"test images of {source}"),
        Line2D([], [], ls="", marker="^", mfc="#1c9099", mec="black", mew=0.3, ms=4, label=f"test images of {target}"),
        Line2D([], [], color="#d7301f", label="path"),
        Line2D([], [], ls="", marker="o", mfc="white", mec="black", ms=5, label="start"),
        Line2D([], [], ls="", marker="s", mfc="black", mec="white", ms=6, label="end"),
    ]
    picture.legend(handles=handles, loc="outside upper center", ncols=5, columnspacing=1, handletextpad=0.3)
    return picture
