"""Charts of the page: distributions of steps and distances, uncertainty by class; drawn by matplotlib as inline SVG.

The colours of the drawing stand for variables of the page's style sheet, so that charts follow its theme.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from clarity.figure import Picture, new_picture, styled
from clarity.report.text import number, short_names
from clarity.report.view import View

#: Colours as drawn -> as the page's style sheet names them.
COLOURS = {
    "#0000f1": "var(--accent)",
    "#0000f2": "var(--alert)",
    "#0000f3": "var(--faint)",
    "#0000f4": "var(--line)",
    "#0000f5": "var(--ink)",
}
ACCENT, ALERT, FAINT, LINE, INK = COLOURS
BINS = 36
#: Classes of the chart of uncertainties at most: those whose counterfactuals rise the most.
MAX_RANGES = 24
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def inline_svg(picture: Picture) -> str:
    """A figure as an SVG element for a page: in the page's font and colours, without names that could clash."""
    svg = picture.render("svg", {"svg.fonttype": "none", "savefig.transparent": True}).decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' id="[a-z]+(?:[._][a-z\d]+)*_\d+"', "", svg)
    svg = re.sub(r'font: ([\d.]+)px [^;"]*', r"font: \1px var(--sans)", svg)
    for drawn, variable in COLOURS.items():
        svg = svg.replace(drawn, variable)
    return re.sub(r"\s*\n\s*", "\n", svg)


def quiet_axes(ax: Any) -> None:
    """Axes without frame and tick marks, labelled in grey."""
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, colors=FAINT)


def histogram(view: View, column: str, title: str) -> dict[str, str]:
    """Distribution of a column over the converged pairs, up to its 99.5 % quantile."""
    table = view.table(f"SELECT {column} FROM counterfactuals WHERE converged AND {column} IS NOT NULL")
    values = table[column].to_numpy()
    high = float(np.quantile(values, 0.995)) if len(values) else 0.0
    if not high:
        return {"title": f"{title}: nothing converged", "svg": ""}
    beyond = int((values > high).sum())
    tail = f"; {beyond:,} lie beyond, up to {number(values.max())}" if beyond else ""
    return {"title": f"{title}, {len(values):,} pairs{tail}", "svg": inline_svg(draw_histogram(values, high))}


@styled
def draw_histogram(values: np.ndarray, high: float) -> Picture:
    """Bars of equal width from 0 to ``high``."""
    picture = new_picture(5.2, 1.2)
    ax = picture.subplots()
    ax.hist(values, bins=BINS, range=(0, high), rwidth=0.92, color=ACCENT)
    ax.axhline(0, color=LINE, lw=1)
    ax.set(xlim=(0, high), yticks=[])
    quiet_axes(ax)
    return picture


def ranges(view: View) -> dict[str, str] | None:
    """Epistemic uncertainty by class: of images classified as it, and of counterfactuals towards it."""
    sides = [
        "SELECT source AS class, epistemic AS value FROM codes WHERE status = 'ok'",
        "SELECT target AS class, epistemic_final AS value FROM counterfactuals",
    ]
    query = "SELECT class, quantile_cont(value, {}) FROM ({}) WHERE value > 0 AND isfinite(value) GROUP BY 1"
    quantiles: list[dict[int, list[float]]] = [dict(view.rows(query.format(list(QUANTILES), side))) for side in sides]
    images, pairs = quantiles
    # Where not all classes fit, those whose counterfactuals are more uncertain than the images.
    classes = sorted(sorted(pairs, key=lambda k: images.get(k, pairs[k])[2] - pairs[k][2])[:MAX_RANGES])
    if not classes:
        return None
    names = [view.class_names[k] for k in classes]
    groups = [{i: side[k] for i, k in enumerate(classes) if k in side} for side in quantiles]
    medians = "; ".join(
        f"{name}: {' → '.join(number(group[i][2]) for group in groups if i in group)}" for i, name in enumerate(names)
    )
    alt = f"Median epistemic uncertainty of images and of counterfactuals, by class: {medians}"
    return {"alt": alt, "svg": inline_svg(draw_ranges(names, groups))}


@styled
def draw_ranges(names: list[str], groups: list[dict[int, list[float]]]) -> Picture:
    """Two ranges for each class on one logarithmic axis: 5 % to 95 % thin, the middle half thick, the median a dot."""
    picture = new_picture(5.2, 0.35 + 0.24 * len(names))
    ax = picture.subplots()
    for group, colour, shift in zip(groups, (FAINT, ALERT), (-0.17, 0.17)):
        y = np.array(list(group)) + shift
        low, quarter, middle, three_quarters, high = np.array(list(group.values())).reshape(-1, 5).T
        ax.hlines(y, low, high, color=colour, lw=1)
        ax.hlines(y, quarter, three_quarters, color=colour, lw=3)
        ax.plot(middle, y, ls="", marker="o", ms=4.5, mew=0, color=colour)
    ax.set_xscale("log")
    ax.minorticks_off()
    ax.grid(axis="x", color=LINE, lw=0.6)
    ax.set_axisbelow(True)
    ax.set_yticks(range(len(names)), short_names(names, 22), parse_math=False)
    ax.set_ylim(len(names) - 0.5, -0.5)
    quiet_axes(ax)
    ax.tick_params(axis="y", labelcolor=INK)
    return picture
