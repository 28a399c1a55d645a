"""Figures of arrays and of audits, for notebooks, the README and the report.

Every figure is readable in greyscale: whatever a colour says, a dash, a marker or a shade says too.

Shapes: R rows and Q columns of a grid.
"""

import functools
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.colors import Normalize

from clarity import notebook
from clarity.audit.queries import PAIR_FIGURES, PairFigure, connect
from clarity.audit.read import Audit
from clarity.figure import Picture, new_picture, styled
from clarity.images import decode_png
from clarity.report.text import counted, decimals, short_names

Array = np.ndarray
TEXT: dict[str, Any] = {"ha": "center", "va": "center"}


def image_axes(images: Sequence[Sequence[Array | None]], rows: int, columns: int, cell: float) -> tuple[Picture, Any]:
    """A figure and its axes, rows x columns, each ``cell`` inches wide with the aspect of the images."""
    aspect = next(image.shape[1] / image.shape[2] for row in images for image in row if image is not None)
    picture = new_picture(cell * columns + 1.2, cell * aspect * rows + 0.6, "compressed")
    layout: Any = picture.get_layout_engine()
    layout.set(w_pad=0.017, h_pad=0.017, wspace=0, hspace=0)
    return picture, picture.subplots(rows, columns, squeeze=False)


def set_title(ax: Any, name: str, cell: float) -> None:
    """A title of at most three lines, as wide as an image of ``cell`` inches."""
    lines = textwrap.wrap(name, max(8, int(cell / 0.068)), max_lines=3, placeholder=" …")
    ax.set_title("\n".join(lines), pad=3, parse_math=False)


def displayed(image: Array) -> Array:
    """Converts (C, H, W), uint8 or float, to what imshow takes: (H, W) or (H, W, 3), float in [0, 1]."""
    image = np.asarray(image)
    scaled = image / 255 if image.dtype == np.uint8 else np.clip(image.astype(np.float64), 0, 1)
    if scaled.ndim != 3 or scaled.shape[0] not in (1, 3):
        raise ValueError(f"image: expected shape (1 or 3, H, W), got {scaled.shape}")
    return scaled[0] if scaled.shape[0] == 1 else scaled.transpose(1, 2, 0)


def draw_image(ax: Any, image: Array | None) -> None:
    """Draws an image (C, H, W); a dash for None."""
    frame(ax)
    if image is None:
        ax.text(0.5, 0.5, "–", transform=ax.transAxes, **TEXT)
    else:
        ax.imshow(displayed(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def draw_difference(ax: Any, image: Array | None, original: Array | None) -> None:
    """Draws image minus original in grey; nothing where one of them is missing."""
    frame(ax)
    if image is None or original is None:
        ax.spines[:].set_visible(False)
        return
    moved = displayed(image) - displayed(original)
    shown = moved if moved.ndim == 2 else moved.mean(axis=2)
    ax.imshow(shown, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")


def frame(ax: Any) -> None:
    """Axes of an image: a thin grey frame without ticks."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(visible=True, linewidth=0.4, color="0.6")


@styled
def counterfactual(
    x: Array, x_cf: Array, *, source: str, target: str, reconstruction: Array | None = None, note: str = ""
) -> Picture:
    """One counterfactual beside its original, with their difference, from the reconstruction where one is given."""
    base = x if reconstruction is None else reconstruction
    shown = [x, *([reconstruction] if reconstruction is not None else []), x_cf]
    names = ["original", *(["reconstruction"] if reconstruction is not None else []), f"{source} → {target}"]
    picture, (axes,) = image_axes([shown], 1, len(shown) + 1, 1.0)
    for ax, image, name in zip(axes, shown, names):
        draw_image(ax, image)
        set_title(ax, name, 1.0)
    axes[len(shown) - 1].set_xlabel(note, fontsize=6, labelpad=1.5)
    draw_difference(axes[-1], x_cf, base)
    axes[-1].set_title("difference", pad=3)
    return picture


@styled
def path_strip(
    images: Sequence[Array], steps: Sequence[int], target_prob: Sequence[float], *, target: str, whose: str = ""
) -> Picture:
    """Images at some steps of a search, with the step above and the target probability, and whose it is, under each."""
    picture, (axes,) = image_axes([images], 1, len(images), 0.7)
    for i, ax in enumerate(axes):
        draw_image(ax, images[i])
        ax.set_title(f"step {steps[i]}" if not i else f"{steps[i]}", pad=3)
        ax.set_xlabel(f"{target_prob[i]:.3f}", labelpad=2, fontsize=7)
    name = f"{whose}p({short_names([target], 16)[0]}) ="
    axes[0].text(-0.08, -0.03, name, parse_math=False, transform=axes[0].transAxes, ha="right", va="top", fontsize=7)
    return picture


def class_pairs(audit: Audit, what: str = "median_distance") -> Picture:
    """One of PAIR_FIGURES by source and target class of an audit, as a K x K map."""
    if what not in PAIR_FIGURES:
        raise ValueError(f"what: unknown figure {what!r}; choose from {', '.join(PAIR_FIGURES)}")
    con = connect(audit.codes, audit.counterfactuals)
    rows = con.sql(f"SELECT source, target, {what} FROM class_pair_figures WHERE source IS NOT NULL").fetchnumpy()
    values = np.full((len(audit.class_names),) * 2, np.nan)
    values[rows["source"], rows["target"]] = np.ma.filled(rows[what].astype(float), np.nan)
    return class_pair_map(values, audit.class_names, PAIR_FIGURES[what])


@styled
def class_pair_map(values: Array, class_names: Sequence[str], figure: PairFigure) -> Picture:
    """A number for each (source, target) as a K x K map with the numbers written in; NaN is a dash."""
    count = len(class_names)
    side = max(2.4, 0.36 * count + 0.9)
    picture = new_picture(side + 0.7, side)
    ax = picture.subplots()
    low, high = (np.nanmin(values), np.nanmax(values)) if np.isfinite(values).any() else (0.0, 1.0)
    if figure.share:  # a point or two below 100 % should not look dark
        low, high = min(0.95, np.floor(low * 20) / 20), 1.0
    scale = Normalize(low, high if high > low else low + 1)
    cmap = matplotlib.colormaps["gray" if figure.share else "gray_r"]
    shown = ax.imshow(np.ma.masked_invalid(values), cmap=cmap, norm=scale)
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = f"{100 * value:.0f}" if figure.share else f"{value:.{decimals(high)}f}"
            ax.text(j, i, text, color="white" if cmap(scale(value))[0] < 0.5 else "black", fontsize=6, **TEXT)
        else:
            ax.text(j, i, "–", color="0.5", fontsize=6, **TEXT)
    names = short_names(class_names, 16)
    ax.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 3 else 0, parse_math=False)
    ax.set_yticks(range(count), names, parse_math=False)
    ax.set(xlabel="target", ylabel="source", title=figure.title)
    ax.spines[:].set_visible(False)
    bar = picture.colorbar(shown, ax=ax, shrink=0.7, aspect=22)
    bar.set_label(figure.label)
    if figure.share:
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    return picture


class Counterfactual:
    """One counterfactual of an audit, which a notebook displays; ValueError where the audit holds no such pair."""

    def __init__(self, audit: Audit, image_id: str, target: str) -> None:
        if target not in audit.class_names:
            raise ValueError(f"target: expected one of the classes {', '.join(audit.class_names)}, got {target!r}")
        mine = pc.field("image_id") == image_id
        rows = audit.counterfactuals.to_table(filter=mine & (pc.field("target_name") == target))
        if not len(rows):
            seen = audit.codes.to_table(columns=["source_name", "status"], filter=mine).to_pylist()
            why = f"it is classified as {seen[0]['source_name'] or seen[0]['status']}" if seen else "no such image"
            raise ValueError(f"no counterfactual of image {image_id!r} towards {target!r}: {why}")
        self.audit = audit
        #: The row of the pair, with its code in ``z_cf``, and that of its image, with its code in ``z``.
        self.tables = {"z_cf": rows, "z": audit.codes.to_table(filter=mine)}
        self.row, self.code = (table.to_pylist()[0] for table in self.tables.values())

    def decoded(self, column: str) -> Array:
        """The picture of the pair's code in ``z`` or ``z_cf``."""
        return notebook.decode(self.audit, self.tables[column], column=column)[0]

    def stored(self, value: bytes | None, column: str) -> Array:
        """A stored picture; decoded from a code where there is none."""
        return self.decoded(column) if value is None else decode_png([value], self.audit.plan.image_shape)[0]

    def picture(self) -> Picture:
        """Original, reconstruction, counterfactual with the explained model's probability, and difference."""
        row = self.row
        by_yours = row["prediction_target_prob_final"]
        whose, prob = ("", row["target_prob_final"]) if by_yours is None else ("your model: ", by_yours)
        p = f"{whose}p({row['target_name']}) = {prob:.3f}, {counted(row['steps'], 'steps')}"
        return counterfactual(
            self.stored(self.code["x"], "z"),
            self.stored(row["x_cf"], "z_cf"),
            source=row["source_name"],
            target=row["target_name"],
            reconstruction=self.decoded("z"),
            note=p if row["converged"] else f"{p}, not converged",
        )

    def _repr_png_(self) -> bytes:
        return self.picture().render("png")

    @functools.cached_property
    def trace(self) -> pa.Table:
        """The search, one row for each step: as the audit recorded it, else searched again by the plain engine."""
        return notebook.trace(self.audit, self.row["image_id"], self.row["target"])

    def path(self, frames: int = 8) -> Picture:
        """Pictures at ``frames`` steps of the search, with the ensemble's probability of the target under each."""
        some = self.trace.take(np.unique(np.linspace(0, len(self.trace) - 1, frames).round().astype(int)))
        images = list(notebook.decode(self.audit, some, column="z"))
        steps, target_prob = (some[name].to_pylist() for name in ("step", "target_prob"))
        whose = "" if self.row["prediction_target_prob_final"] is None else "ensemble: "
        return path_strip(images, steps, target_prob, target=self.row["target_name"], whose=whose)
