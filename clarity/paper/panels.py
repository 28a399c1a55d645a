"""Drawings of the paper's Figures 5, 7 and 10, and of scores with their intervals.

Shapes: M members, T points of a segment or steps of a path, N points of a plane, G cells of a map's side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from clarity.figure import DARK, FULL_WIDTH, LIGHT, MIDDLE, Picture, new_picture, styled
from clarity.plots import Array, draw_image

IMAGE_CURVE: dict[str, Any] = {"color": DARK, "ls": (0, (4, 1.5))}


def probability_curves(
    panels: Mapping[str, tuple[Array, Array]], *, xlabel: str = "position t on the segment between the two codes"
) -> Picture:
    """Figure 5: the target's probability along a segment, one thin line for each classifier, in one panel a segment.

    Args:
        panels: title -> (curves of image classifiers (M, T), curves of latent classifiers (M', T)).
        xlabel: below the middle of the panels.
    """
    latent: dict[str, Any] = {"color": LIGHT, "lw": 0.7, "alpha": 0.6, "zorder": 2}
    image = {**IMAGE_CURVE, "lw": 0.6, "alpha": 0.7, "zorder": 3}
    image_count, latent_count = (len(curves) for curves in next(iter(panels.values())))
    handles = [
        Line2D([], [], **IMAGE_CURVE, label=f"{image_count} image classifiers (REVISE)"),
        Line2D([], [], color=LIGHT, label=f"{latent_count} latent classifiers"),
    ]
    drawn = {title: ((latent_curves, latent), (curves, image)) for title, (curves, latent_curves) in panels.items()}
    return segment_panels(drawn, handles, xlabel, height=2.3)


def segment_curves(panels: Mapping[str, tuple[Array, Array]]) -> Picture:
    """Figure 7: the image ensemble's target probability on one segment, in the image space and in the latent space.

    Args:
        panels: title -> (curve in the image space (T,), curve in the latent space (T,)).
    """
    latent: dict[str, Any] = {"color": MIDDLE}
    handles = [
        Line2D([], [], **IMAGE_CURVE, label="walked in the image space"),
        Line2D([], [], **latent, label="walked in the latent space"),
    ]
    drawn = {title: ((curves[0][None], IMAGE_CURVE), (curves[1][None], latent)) for title, curves in panels.items()}
    return segment_panels(drawn, handles, "position t on the segment", height=2.2)


@styled
def segment_panels(
    panels: Mapping[str, Sequence[tuple[Array, dict[str, Any]]]], handles: list[Line2D], xlabel: str, height: float
) -> Picture:
    """Probabilities over t in [0, 1], one panel for each title: groups of curves (M, T) with their line style."""
    picture = new_picture(min(FULL_WIDTH, 0.4 + 3.1 * len(panels)), height)
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

    Args:
        panels: name -> map and path.
        extent: (z1 low, z1 high, z2 low, z2 high) of every map.
        source_points: (N, 2) codes of test images of the source class.
        target_points: (N', 2) of the target class.
        source: name of the class.
        target: name of the class.
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


@styled
def score_bars(scores: Mapping[str, tuple[float, float, float]], *, label: str) -> Picture:
    """Scores as points with intervals: name -> (mean, low, high), the first on top."""
    picture = new_picture(3.3, 0.5 + 0.2 * len(scores))
    ax = picture.subplots()
    for i, (mean, low, high) in enumerate(scores.values()):
        ax.plot([low, high], [i, i], color="0.4", lw=1)
        ax.plot(mean, i, marker="o", color="black", ms=3.5)
    ax.set_yticks(range(len(scores)), list(scores))
    ax.invert_yaxis()
    ax.set_xlabel(label)
    ax.grid(axis="x", lw=0.3, color="0.8")
    return picture
