"""Figures: the grids, curves and maps of notebooks, of the README and of the comparison.

Knows how to draw arrays, and which rows of an audit they come from. Nothing global is touched: no pyplot, no backend,
no style outside the figure being made. Every figure reads in greyscale: what colour tells, a dash, a marker or a shade
tells too.

Shapes: R rows and Q columns of a grid, C, H, W image, K classes, M members, T points of a curve, N points.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypeVar

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clarity import schema, storage

if TYPE_CHECKING:
    from clarity.audit.read import Audit

Array = np.ndarray

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,  # letters stay letters in the PDF
    "svg.hashsalt": "clarity",
    "figure.dpi": 150,
    "savefig.dpi": 200,
}
DARK, MIDDLE, LIGHT = "#7f0000", "#2166ac", "#6baed6"  # falling darkness
FULL_WIDTH = 6.75  # inches, two columns of a paper
TEXT: dict[str, Any] = {"ha": "center", "va": "center"}


class Picture(Figure):
    """A matplotlib figure that shows itself as the last line of a notebook cell, and writes itself to files."""

    def _repr_png_(self) -> bytes:
        return self.render("png")

    def render(self, suffix: str) -> bytes:
        """The figure as the bytes of a png, pdf or svg file, the same bytes each time."""
        if suffix not in ("png", "pdf", "svg"):
            raise ValueError(f"a figure is written as png, pdf or svg, got {suffix!r}")
        metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[suffix]
        buffer = BytesIO()
        with style.context(["default", STYLE]):
            self.savefig(buffer, format=suffix, bbox_inches="tight", pad_inches=0.04, metadata=metadata)
        return buffer.getvalue()

    def write(self, stem: str, suffixes: Sequence[str] = ("png", "pdf")) -> list[str]:
        """Write ``stem``.png and ``stem``.pdf (or what ``suffixes`` names), on a disk or an object store."""
        paths = [f"{stem}.{suffix}" for suffix in suffixes]
        for path, suffix in zip(paths, suffixes):
            storage.write_bytes(path, self.render(suffix))
        return paths


Drawing = TypeVar("Drawing", bound=Callable[..., Picture])


def _styled(draw: Drawing) -> Drawing:
    """Draw under ``STYLE``, and leave every setting of the session as it was."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Picture:
        with style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return styled  # type: ignore[return-value]


def _picture(width: float, height: float) -> Picture:
    picture = Picture(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(picture)
    return picture


# --- grids ------------------------------------------------------------------------------------------------------------


@_styled
def image_grid(
    images: Sequence[Sequence[Array | None]],
    column_names: Sequence[str],
    row_names: Sequence[str] = (),
    *,
    notes: Sequence[Sequence[str]] = (),
    differences: bool = False,
    cell: float = 0.62,
) -> Picture:
    """Images in R rows and Q columns, the original first in each row (Tables 1 and 2, Figures 1, 2, 4 and 9).

    Args:
        images: (C, H, W) each, uint8 or float in [0, 1]; None leaves the place empty with a dash.
        column_names: Q names, above.
        row_names: R names, on the left.
        notes: R x Q short texts under the images.
        differences: under each row, each image minus the row's first: black where it lost light, white where it
            gained, grey where nothing changed.
        cell: side of an image, in inches.
    """
    _check_grid(images, column_names, row_names, notes)
    told = any(text for row in notes for text in row)
    aspect = next(image.shape[1] / image.shape[2] for row in images for image in row if image is not None)
    below = [0.13 if told and not (differences and k % 2) else 0.0 for k in range(len(images) * (1 + differences))]
    left = 0.075 * max((len(name) for name in row_names), default=0)
    titles = ["\n".join(textwrap.wrap(name, max(8, int(cell / 0.068)))) for name in column_names]
    lines = max(title.count("\n") for title in titles)
    right = 0.7 if differences else 0.0
    picture, axes = _cells(len(column_names), below, cell, aspect, left, right, 0.2 + 0.13 * lines)
    for q, title in enumerate(titles):
        axes[0][q].set_title(title, pad=3)
    for r, row in enumerate(images):
        line = axes[r * (1 + differences)]
        if row_names:
            line[0].set_ylabel(row_names[r], rotation=0, ha="right", va="center", labelpad=4)
        for q, image in enumerate(row):
            _blank(line[q])
            if image is None:
                line[q].text(0.5, 0.5, "–", transform=line[q].transAxes, **TEXT)
            else:
                line[q].imshow(_displayed(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if told:
                line[q].set_xlabel(notes[r][q], fontsize=6, labelpad=1.5)
            if differences:
                _difference(axes[2 * r + 1][q], image if q else None, row[0])
    if differences:
        box = axes[-1][-1].get_position()
        width, height = picture.get_size_inches()
        bar = picture.colorbar(
            ScalarMappable(Normalize(-1, 1), "gray"),
            cax=picture.add_axes((box.x1 + 0.12 / width, box.y0, 0.09 / width, min(1.8 / height, 0.8))),
        )
        bar.set_label("difference from the original")
        bar.set_ticks([-1, 0, 1], labels=["−1", "0", "+1"])
    return picture


def _cells(
    columns: int,
    below: Sequence[float],
    cell: float,
    aspect: float,
    left: float = 0.0,
    right: float = 0.0,
    top: float = 0.2,
) -> tuple[Picture, list[list[Any]]]:
    """A picture of places for images, ``cell`` inches wide, with ``below`` inches of text under each row."""
    gap, height = 0.035, cell * aspect
    size = (left + columns * (cell + gap) + right, top + sum(height + gap + extra for extra in below))
    picture = Picture(figsize=size)
    FigureCanvasAgg(picture)
    axes, y = [], size[1] - top
    for extra in below:
        y -= height
        boxes = [(left + q * (cell + gap), y, cell, height) for q in range(columns)]
        axes.append([picture.add_axes((x / size[0], b / size[1], w / size[0], h / size[1])) for x, b, w, h in boxes])
        y -= extra + gap
    return picture, axes


def _check_grid(images: Any, column_names: Any, row_names: Any, notes: Any) -> None:
    if not images or any(len(row) != len(column_names) for row in images):
        raise ValueError(
            f"a grid needs rows of {len(column_names)} images each, got rows of {[len(row) for row in images]}"
        )
    for name, given in (("row_names", row_names), ("notes", notes)):
        if given and len(given) != len(images):
            raise ValueError(f"a grid of {len(images)} rows needs as many {name}, got {len(given)}")
    if all(image is None for row in images for image in row):
        raise ValueError("a grid needs at least one image")


def _displayed(image: Array) -> Array:
    """(C, H, W) uint8 or float as imshow takes it: (H, W) or (H, W, 3), float in [0, 1]."""
    image = np.asarray(image)
    scaled = image / 255 if image.dtype == np.uint8 else np.clip(image.astype(np.float64), 0, 1)
    if scaled.ndim != 3 or scaled.shape[0] not in (1, 3):
        raise ValueError(f"an image to draw has shape (1 or 3, H, W), got {scaled.shape}")
    return scaled[0] if scaled.shape[0] == 1 else scaled.transpose(1, 2, 0)


def _difference(place: Any, image: Array | None, original: Array | None) -> None:
    _blank(place)
    if image is None or original is None:
        for spine in place.spines.values():
            spine.set_visible(False)
        return
    moved = _displayed(image) - _displayed(original)
    shown = moved if moved.ndim == 2 else moved.mean(axis=2)
    place.imshow(shown, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")


def _blank(place: Any) -> None:
    place.set_xticks([])
    place.set_yticks([])
    for spine in place.spines.values():
        spine.set_visible(True)
        spine.set_linewidth(0.4)
        spine.set_color("0.6")


def counterfactual_grid(originals: Mapping[str, Array], table: pa.Table, *, cell: float = 0.5) -> Picture:
    """Originals in rows, every target in a column of its own, as ``explain`` and audits return them.

    Args:
        originals: image id -> image (C, H, W); their order is the rows'.
        table: counterfactuals with ``image_id``, ``target``, ``target_name`` and ``x_cf``; other images' are left out.
        cell: side of an image, in inches.

    The place of a class that needs no counterfactual, since the model sees it already, holds a dash.
    """
    shape = next(iter(originals.values())).shape if originals else None
    if shape is None or len(shape) != 3:
        raise ValueError(f"a grid needs images (C, H, W) by their id, got {shape}")
    rows = table.select(["image_id", "target", "target_name", "x_cf"]).to_pylist()
    rows = [row for row in rows if row["image_id"] in originals]
    if not rows or any(row["x_cf"] is None for row in rows):
        raise ValueError("a grid needs counterfactuals with pictures of the images given: explain them with pictures")
    names = {row["target"]: row["target_name"] for row in sorted(rows, key=lambda row: row["target"])}
    pictures = schema.from_png([row["x_cf"] for row in rows], shape)
    found = {(row["image_id"], row["target"]): picture for row, picture in zip(rows, pictures)}
    grid = [[image, *(found.get((name, target)) for target in names)] for name, image in originals.items()]
    return image_grid(grid, ["original", *(f"→ {name}" for name in names.values())], cell=cell)


@_styled
def counterfactual(
    x: Array, x_cf: Array, *, source: str, target: str, reconstruction: Array | None = None, note: str = ""
) -> Picture:
    """One counterfactual beside its original with their difference: the inline picture of a notebook.

    The difference is taken from the reconstruction where one is given, so that the VAE's own error is not shown.
    """
    base = x if reconstruction is None else reconstruction
    shown = [x, *([reconstruction] if reconstruction is not None else []), x_cf]
    names = ["original", *(["reconstruction"] if reconstruction is not None else []), f"{source} → {target}"]
    picture, (axes,) = _cells(len(shown) + 1, [0.13], 1.0, x.shape[1] / x.shape[2])
    for place, image, name in zip(axes, shown, names):
        _blank(place)
        place.imshow(_displayed(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        place.set_title(name, pad=3)
    axes[len(shown) - 1].set_xlabel(note, fontsize=6, labelpad=1.5)
    _difference(axes[-1], x_cf, base)
    axes[-1].set_title("difference", pad=3)
    return picture


@_styled
def path_strip(images: Sequence[Array], steps: Sequence[int], target_prob: Sequence[float], *, target: str) -> Picture:
    """A search as a strip: images at some of its steps, with the step and the target probability under each."""
    if not len(images) == len(steps) == len(target_prob) > 0:
        raise ValueError(
            f"a strip needs one step and one probability an image, got {len(images)}, {len(steps)}, {len(target_prob)}"
        )
    picture, (axes,) = _cells(len(images), [0.13], 0.7, images[0].shape[1] / images[0].shape[2], left=0.7)
    for i, place in enumerate(axes):
        _blank(place)
        place.imshow(_displayed(images[i]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        place.set_title(f"step {steps[i]}" if not i else f"{steps[i]}", pad=3)
        place.set_xlabel(f"{target_prob[i]:.3f}", labelpad=2, fontsize=7)
    axes[0].text(-0.08, -0.03, f"p({target}) =", transform=axes[0].transAxes, ha="right", va="top", fontsize=7)
    return picture


@_styled
def class_pair_map(
    values: Array,
    class_names: Sequence[str],
    *,
    title: str,
    label: str,
    percent: bool = False,
    low_is_bad: bool = True,
    bounds: tuple[float, float] | None = None,
) -> Picture:
    """A number for each (source, target) as a K x K map with the numbers written in; NaN is a dash.

    Args:
        values: (K, K), sources in rows, targets in columns.
        class_names: K names.
        title: above the map.
        label: of the shade, with its unit.
        percent: write shares as percentages.
        low_is_bad: the worst value gets the darkest shade.
        bounds: of the shades, for maps to be compared; None takes them from the values.
    """
    values, count = np.asarray(values, dtype=np.float64), len(class_names)
    if values.shape != (count, count):
        raise ValueError(f"a map of {count} classes needs values ({count}, {count}), got {values.shape}")
    side = max(2.4, 0.36 * count + 0.9)
    picture = _picture(side + 0.7, side)
    place = picture.subplots()
    low, high = (np.nanmin(values), np.nanmax(values)) if np.isfinite(values).any() else (0.0, 1.0)
    if percent:  # up to all; a point or two below it is no dark spot
        low, high = min(0.95, np.floor(low * 20) / 20), 1.0
    low, high = bounds or (low, high)
    scale = Normalize(low, high if high > low else low + 1)
    decimals = 0 if high >= 100 else 1 if high >= 10 else 2 if high >= 1 else 3
    cmap = matplotlib.colormaps["gray" if low_is_bad else "gray_r"]
    shown = place.imshow(np.ma.masked_invalid(values), cmap=cmap, norm=scale)
    for i in range(count):
        for j in range(count):
            if np.isfinite(values[i, j]):
                text = f"{100 * values[i, j]:.0f}" if percent else f"{values[i, j]:.{decimals}f}"
                dark = cmap(scale(values[i, j]))[0] < 0.5
                place.text(j, i, text, color="white" if dark else "black", fontsize=6, **TEXT)
            else:
                place.text(j, i, "–", color="0.5", fontsize=6, **TEXT)
    place.set_xticks(range(count), class_names, rotation=90 if max(map(len, class_names)) > 3 else 0)
    place.set_yticks(range(count), class_names)
    place.set_xlabel("target")
    place.set_ylabel("source")
    place.set_title(title)
    place.spines[:].set_visible(False)
    bar = picture.colorbar(shown, ax=place, shrink=0.7, aspect=22)
    bar.set_label(label)
    if percent:
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    return picture


# --- curves -----------------------------------------------------------------------------------------------------------


@_styled
def probability_curves(
    panels: Mapping[str, tuple[Array, Array]], *, xlabel: str = "position t on the segment between the two codes"
) -> Picture:
    """Figure 5: the target's probability along a segment, one thin line for each classifier, in one panel a segment.

    Args:
        panels: title -> (curves of image classifiers (M, T), curves of latent classifiers (M', T)).
        xlabel: below the middle of the panels.
    """
    picture = _picture(min(FULL_WIDTH, 0.4 + 3.1 * len(panels)), 2.3)
    axes = picture.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    image_count = latent_count = 0
    for place, (title, (image_curves, latent_curves)) in zip(axes, panels.items()):
        image_count, latent_count = len(image_curves), len(latent_curves)
        t = np.linspace(0, 1, image_curves.shape[-1])
        for curve in latent_curves:
            place.plot(t, curve, color=LIGHT, lw=0.7, alpha=0.6, zorder=2)
        for curve in image_curves:
            place.plot(t, curve, color=DARK, lw=0.6, alpha=0.7, ls=(0, (4, 1.5)), zorder=3)
        place.set_title(title)
        _unit_axes(place)
    axes[0].set_ylabel("probability of the target")
    picture.supxlabel(xlabel, fontsize=8)
    handles = [
        Line2D([], [], color=DARK, ls=(0, (4, 1.5)), label=f"{image_count} image classifiers (REVISE)"),
        Line2D([], [], color=LIGHT, label=f"{latent_count} latent classifiers"),
    ]
    picture.legend(handles=handles, loc="outside upper center", ncols=2)
    return picture


@_styled
def segment_curves(panels: Mapping[str, tuple[Array, Array]]) -> Picture:
    """Figure 7: the image ensemble's target probability on the same segment, walked in the image and in the latent
    space.

    Args:
        panels: title -> (curve in the image space (T,), curve in the latent space (T,)).
    """
    picture = _picture(min(FULL_WIDTH, 0.4 + 3.1 * len(panels)), 2.2)
    axes = picture.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for place, (title, curves) in zip(axes, panels.items()):
        t = np.linspace(0, 1, len(curves[0]))
        place.plot(t, curves[0], color=DARK, ls=(0, (4, 1.5)))
        place.plot(t, curves[1], color=MIDDLE)
        place.set_title(title)
        _unit_axes(place)
    axes[0].set_ylabel("probability of the target")
    picture.supxlabel("position t on the segment", fontsize=8)
    handles = [
        Line2D([], [], color=DARK, ls=(0, (4, 1.5)), label="walked in the image space"),
        Line2D([], [], color=MIDDLE, label="walked in the latent space"),
    ]
    picture.legend(handles=handles, loc="outside upper center", ncols=2)
    return picture


def _unit_axes(place: Any) -> None:
    place.set_xlim(0, 1)
    place.set_ylim(-0.02, 1.02)
    place.set_xticks([0, 0.5, 1], labels=["0", "0.5", "1"])
    place.set_yticks([0, 0.5, 1], labels=["0", "0.5", "1"])


@dataclass(frozen=True)
class Trace:
    """One search, step by step: each (T,), the start included; ``images`` may hold the first and the last."""

    target_prob: Array
    aleatoric: Array
    epistemic: Array
    images: tuple[Array, Array] | None = None


@_styled
def search_traces(traces: Mapping[str, Trace], *, source: str, target: str, min_target_prob: float = 0.99) -> Picture:
    """Figure 8: target probability, logarithm of the epistemic uncertainty and aleatoric uncertainty at each step."""
    picture = _picture(min(FULL_WIDTH, 0.5 + 3.1 * len(traces)), 2.5)
    axes = picture.subplots(1, len(traces), sharey=True, squeeze=False)[0]
    logs = [np.log10(np.maximum(trace.epistemic, 1e-8)) for trace in traces.values()]
    # The upper part of each panel is kept free for the images.
    free = 0.3 if any(trace.images for trace in traces.values()) else 0.0
    bottom, top = float(np.floor(min(map(np.min, logs)))), float(np.ceil(max(map(np.max, logs))))
    powers = np.arange(bottom, top + 1)
    top = bottom + (top - bottom) / (1 - free)
    height = max(1.02, max(float(np.max(trace.aleatoric)) for trace in traces.values()) * 1.03) / (1 - free)
    for i, (place, (name, trace), log) in enumerate(zip(axes, traces.items(), logs)):
        steps = np.arange(len(trace.target_prob))
        place.axhline(min_target_prob, color="0.75", lw=0.6, zorder=0)
        place.plot(steps, trace.target_prob, color=MIDDLE)
        place.plot(steps, trace.aleatoric, color="#4d9221", ls=(0, (1, 1)), lw=1.4)
        right = place.twinx()
        right.plot(steps, log, color=DARK, ls=(0, (5, 1.5)), lw=1)
        right.set_ylim(bottom, top)
        right.set_yticks(powers)
        right.spines["right"].set_visible(True)
        if i == len(traces) - 1:
            right.set_ylabel("log$_{10}$ epistemic uncertainty (nats)")
        else:
            right.set_yticklabels([])
        place.set_ylim(-0.02, height)
        place.set_yticks(np.arange(0, height * (1 - free), 0.5))
        place.set_xlim(0, max(1, steps[-1]))
        place.set_xlabel("step")
        place.set_title(f"{name}, {source} → {target}, {steps[-1]} steps")
        for k, image in enumerate(trace.images or ()):
            corner = place.inset_axes((0.02 if k == 0 else 0.81, 0.74, 0.17, 0.25))
            corner.imshow(_displayed(image), cmap="gray", vmin=0, vmax=1)
            _blank(corner)
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


def uncertainty_curve(trace: Trace, *, source: str, target: str, name: str = "Clarity") -> Picture:
    """One search's probability and uncertainties by step; see ``search_traces`` for several side by side."""
    return search_traces({name: trace}, source=source, target=target)


@dataclass(frozen=True)
class LatentMap:
    """One panel of Figure 10: a map (G, G) of epistemic uncertainty, rows by z2 and columns by z1, and a path (T, 2).

    ``image`` is what the search ended with; ``group`` names the panels that share one scale of shades.
    """

    epistemic: Array
    path: Array
    image: Array | None = None
    group: str = ""


@_styled
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
    picture = _picture(3.3 * columns, 0.3 + 2.75 * rows)
    axes = picture.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for place in axes.flat[len(panels) :]:
        place.set_visible(False)
    for i, (place, (name, panel)) in enumerate(zip(axes.flat, panels.items())):
        shared = max(float(other.epistemic.max()) for other in panels.values() if other.group == panel.group)
        shown = place.imshow(
            panel.epistemic, extent=extent, origin="lower", cmap="gray", vmin=0, vmax=shared, aspect="auto"
        )
        place.scatter(*source_points.T, s=4, marker="o", c="#fec44f", edgecolors="black", linewidths=0.15, alpha=0.7)
        place.scatter(*target_points.T, s=5, marker="^", c="#1c9099", edgecolors="white", linewidths=0.15, alpha=0.7)
        place.plot(*panel.path.T, color="white", lw=2.6, zorder=4)
        place.plot(*panel.path.T, color="#d7301f", lw=1.3, zorder=5)
        place.scatter(*panel.path[0], s=34, marker="o", c="white", edgecolors="black", linewidths=1, zorder=6)
        place.scatter(*panel.path[-1], s=34, marker="s", c="black", edgecolors="white", linewidths=1, zorder=7)
        place.set_xlim(extent[0], extent[1])
        place.set_ylim(extent[2], extent[3])
        place.set_title(f"{name} ({panel.group})" if panel.group else name)
        place.set_box_aspect(1)
        if i >= len(panels) - columns:
            place.set_xlabel("$z_1$")
        if i % columns == 0:
            place.set_ylabel("$z_2$")
        if panel.image is not None:
            corner = place.inset_axes((0.76, 0.76, 0.23, 0.23))
            corner.imshow(_displayed(panel.image), cmap="gray", vmin=0, vmax=1)
            _blank(corner)
            corner.spines[:].set_color("white")
        bar = picture.colorbar(shown, ax=place, shrink=0.8, aspect=24, pad=0.02)
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


@_styled
def score_bars(scores: Mapping[str, tuple[float, float, float]], *, label: str) -> Picture:
    """Methods' scores as points with intervals: name -> (mean, low, high), best on top in the order given."""
    picture = _picture(3.3, 0.5 + 0.2 * len(scores))
    place = picture.subplots()
    for i, (mean, low, high) in enumerate(scores.values()):
        place.plot([low, high], [i, i], color="0.4", lw=1)
        place.plot(mean, i, marker="o", color="black", ms=3.5)
    place.set_yticks(range(len(scores)), list(scores))
    place.invert_yaxis()
    place.set_xlabel(label)
    place.grid(axis="x", lw=0.3, color="0.8")
    return picture


# --- of an audit ------------------------------------------------------------------------------------------------------

#: What ``class_pairs`` can show: title, label with its unit, whether it is a share, whether low values are bad.
PAIR_FIGURES = {
    "strict_validity": ("Strict validity", "share of pairs that converged", True, True),
    "reencoded_agreement": ("Re-encoded agreement", "share of pairs still seen as the target", True, True),
    "median_steps": ("Steps", "updates, median of converged pairs", False, False),
    "median_distance": ("Latent distance", "L1, median of converged pairs", False, False),
    "epistemic_final": ("Epistemic uncertainty after", "nats, median", False, False),
}


def class_pairs(audit: Audit, what: str = "median_distance") -> Picture:
    """How every class becomes every other in an audit: one of PAIR_FIGURES as a K x K map."""
    if what not in PAIR_FIGURES:
        raise ValueError(f"unknown figure {what!r}; choose from {', '.join(PAIR_FIGURES)}")
    column = {"median_steps": "steps", "median_distance": "distance_z_l1", "epistemic_final": "epistemic_final"}
    names = ["source", "target", "converged", "reencoded_class", *([column[what]] if what in column else [])]
    table = audit.counterfactuals.to_table(columns=names)
    source, target, converged, again = (table[name].to_numpy() for name in names[:4])
    if what in column:
        values = table[column[what]].to_numpy()
        kept = converged if what.startswith("median") else np.isfinite(values)
        source, target, values = source[kept], target[kept], values[kept]
    else:
        values = converged if what == "strict_validity" else again == target
    count = len(audit.class_names)
    cell = source * count + target
    order = np.argsort(cell, kind="stable")
    cells, starts = np.unique(cell[order], return_index=True)
    middle = np.median if what in column else np.mean
    shown = np.full(count * count, np.nan)
    for place, part in zip(cells, np.split(values[order], starts[1:])):
        shown[place] = middle(part)
    title, label, percent, low_is_bad = PAIR_FIGURES[what]
    square = shown.reshape(count, count)
    return class_pair_map(square, audit.class_names, title=title, label=label, percent=percent, low_is_bad=low_is_bad)


class Counterfactual:
    """One counterfactual of an audit, which shows itself as the last line of a notebook cell.

    Args:
        audit: of ``clarity.read_audit``.
        image_id: which image.
        target: name of the wanted class.

    Raises:
        ValueError: the audit holds no such pair.
    """

    def __init__(self, audit: Audit, image_id: str, target: str) -> None:
        import pyarrow.compute as pc

        mine = pc.field("image_id") == image_id
        rows = audit.counterfactuals.to_table(filter=mine & (pc.field("target_name") == target))
        if not len(rows):
            seen = audit.codes.to_table(columns=["source_name", "status"], filter=mine).to_pylist()
            why = f"it is seen as {seen[0]['source_name'] or seen[0]['status']}" if seen else "there is no such image"
            raise ValueError(f"no counterfactual of image {image_id!r} towards {target!r}: {why}")
        self.audit = audit
        #: The pair's row of ``counterfactuals``, and the image's of ``codes``.
        self.row: dict[str, Any] = rows.to_pylist()[0]
        self.code: dict[str, Any] = audit.codes.to_table(filter=mine).to_pylist()[0]
        self._tables = {"z_cf": rows, "z": audit.codes.to_table(filter=mine)}

    def _decoded(self, column: str) -> Array:
        from clarity.explainer import decode

        return decode(self.audit, self._tables[column], column=column)[0]

    def _stored(self, value: bytes | None, column: str) -> Array:
        return self._decoded(column) if value is None else schema.from_png([value], self.audit.plan.image_shape)[0]

    def picture(self) -> Picture:
        """Original, reconstruction, counterfactual and difference; without stored pictures from the codes alone."""
        row, reconstruction = self.row, self._decoded("z")
        p = f"p({row['target_name']}) = {row['target_prob_final']:.3f}, {row['steps']} steps"
        x = self._stored(self.code["x"], "z")
        return counterfactual(
            x,
            self._stored(row["x_cf"], "z_cf"),
            source=row["source_name"],
            target=row["target_name"],
            reconstruction=reconstruction,
            note=p if row["converged"] else f"{p}, not converged",
        )

    def _repr_png_(self) -> bytes:
        return self.picture().render("png")

    @functools.cached_property
    def trace(self) -> pa.Table:
        """The search, one row a step: as the audit recorded it, else searched once more by the plain engine."""
        import pyarrow.compute as pc

        row, audit = self.row, self.audit
        if audit.traces is not None:
            here = (pc.field("image_id") == row["image_id"]) & (pc.field("target") == row["target"])
            if len(table := audit.traces.to_table(filter=here)):
                return table.sort_by("step")
        from clarity.explainer import Explainer
        from clarity.model import load_model
        from clarity.search import SearchConfig

        if self.code["x"] is None:
            raise ValueError("an audit with --images none lacks the image to search from: make it with --trace")
        plan = audit.plan
        explainer = Explainer(
            load_model(storage.join(audit.uri, "model")),
            plan.method,
            SearchConfig(**plan.config),
            targets=[row["target"]],
            by_fold=bool(plan.model.get("num_folds")),
            engine="plain",
        )
        pixels = schema.from_png([self.code["x"]], plan.image_shape)
        columns = [[row["image_id"]], [None], schema.fixed_size_list(pixels.reshape(1, -1)), [None]]
        shard = pa.table(columns, schema=schema.shard_schema(plan.image_shape))
        traces = explainer.explain_shard(shard, trace=1).traces
        assert traces is not None
        return traces.sort_by("step")

    def path(self, frames: int = 8) -> Picture:
        """The search as a strip of pictures, with the step and the target's probability under each."""
        from clarity.explainer import decode

        steps = self.trace["step"].to_numpy()
        chosen = np.unique(np.round(np.linspace(0, len(steps) - 1, frames)).astype(int))
        some = self.trace.take(pa.array(chosen))
        images = list(decode(self.audit, some, column="z"))
        return path_strip(
            images, steps[chosen].tolist(), some["target_prob"].to_pylist(), target=self.row["target_name"]
        )

    def uncertainty(self) -> Picture:
        """Target probability, aleatoric and epistemic uncertainty at each step of the search."""
        if self.trace["epistemic"].null_count:
            raise ValueError(f"the method {self.row['method']} has a single classifier: no epistemic uncertainty")
        probs, aleatoric, epistemic = (self.trace[n].to_numpy() for n in ("target_prob", "aleatoric", "epistemic"))
        ends = (self._decoded("z"), self._stored(self.row["x_cf"], "z_cf"))
        names = {"source": self.row["source_name"], "target": self.row["target_name"]}
        return uncertainty_curve(
            Trace(probs, aleatoric, epistemic, ends), **names, name=f"image {self.row['image_id']}"
        )
