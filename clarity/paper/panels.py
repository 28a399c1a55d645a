"""Drawings of the paper's grids of images and of its Figures 5, 7 and 10.

Shapes: R rows and Q columns of a grid, C, H, W image, M members, T points of a segment or steps of a path, N points of
a plane, G cells of a map's side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D

from clarity.figure import DARK, FULL_WIDTH, LIGHT, MIDDLE, Picture, new_picture, styled
from clarity.plots import Array, draw_difference, draw_image, image_axes, set_title

#: Side of an image in a grid, in inches.
CELL = 0.62
IMAGE_CURVE: dict[str, Any] = {"color": DARK, "ls": (0, (4, 1.5))}


def probability_curves(panels: Mapping[str, tuple[Array, Array]]) -> Picture:
    """Figure 5: the target's probability along a segment, one thin line for each classifier, in one panel a segment.

    ``panels``: title -> (curves of image classifiers (M, T), curves of latent classifiers (M', T)).
    """
    latent: dict[str, Any] = {"color": LIGHT, "lw": 0.7, "alpha": 0.6, "zorder": 2}
    image = {**IMAGE_CURVE, "lw": 0.6, "alpha": 0.7, "zorder": 3}
    image_count, latent_count = (len(curves) for curves in next(iter(panels.values())))
    handles = [
        Line2D([], [], **IMAGE_CURVE, label=f"{image_count} image classifiers (REVISE)"),
        Line2D([], [], color=LIGHT, label=f"{latent_count} latent classifiers"),
    ]
    drawn = {title: ((latent_curves, latent), (curves, image)) for title, (curves, latent_curves) in panels.items()}
    return segment_panels(drawn, handles, "position t on the segment between the two codes")


def segment_curves(panels: Mapping[str, tuple[Array, Array]]) -> Picture:
    """Figure 7: the image ensemble's target probability on one segment, in the image space and in the latent space.

    ``panels``: title -> (curve in the image space (T,), curve in the latent space (T,)).
    """
    latent: dict[str, Any] = {"color": MIDDLE}
    handles = [
        Line2D([], [], **IMAGE_CURVE, label="walked in the image space"),
        Line2D([], [], **latent, label="walked in the latent space"),
    ]
    drawn = {title: ((curves[0][None], IMAGE_CURVE), (curves[1][None], latent)) for title, curves in panels.items()}
    return segment_panels(drawn, handles, "position t on the segment")


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
    each row, each image minus the row's first: black where it lost light, white where it gained, grey where nothing
    changed.
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

    ``image`` is the result of the search; panels of one ``group`` share their scale of shades.
    """

    epistemic: Array
    path: Array
    image: Array | None = None
    group: str = ""


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
    """Figure 10: the paths of the methods in a 2-D latent space over the epistemic uncertainty of their classifier.

    ``extent`` (z1 low, z1 high, z2 low, z2 high) is that of every map; the points (N, 2) are codes of test images of
    the two classes.
    """
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
        ax.set(xlim=extent[:2], ylim=extent[2:], title=f"{name} ({panel.group})" if panel.group else name)
        ax.set_box_aspect(1)
        if i >= len(panels) - columns:
            ax.set_xlabel("$z_1$")
        if i % columns == 0:
            ax.set_ylabel("$z_2$")
        if panel.image is not None:
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
