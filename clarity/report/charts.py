"""Charts of the page: distributions of steps and distances, uncertainty by class; drawn by matplotlib as inline SVG.

The colours of the drawing stand for variables of the page's style sheet, so that charts follow its theme.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from clarity.plots import Picture, new_picture, styled
from clarity.report.text import number
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
    svg = picture.render("svg", {"svg.fonttype": "none"}).decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' id="[a-z]+(?:[._][a-z\d]+)*_\d+"', "", svg)
    svg = re.sub(r'font: ([\d.]+)px [^;"]*', r"font: \1px var(--sans)", svg)
    for drawn, variable in COLOURS.items():
        svg = svg.replace(drawn, variable)
    return re.sub(r"\s*\n\s*", "\n", svg)


def axis(ax: Any) -> None:
    """Axes with one quiet line below and ticks without marks."""
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, colors=FAINT)


def histogram(view: View, column: str, title: str) -> dict[str, str]:
    """Distribution of a column over the converged pairs, up to its 99.5 % quantile."""
    count, high, top = view.rows(
        f"SELECT count({column}), quantile_cont({column}, 0.995), max({column}) FROM counterfactuals WHERE converged"
    )[0]
    if not count or not high:
        return {"title": f"{title}: nothing converged", "svg": ""}
    power = 10.0 ** math.floor(math.log10(high / BINS))
    width = next(step * power for step in (1, 2, 5, 10) if step * power * BINS >= high * 0.999)
    rows = view.rows(
        f"SELECT least(floor({column} / $width), $last)::INT, count(*) FROM counterfactuals WHERE converged GROUP BY 1",
        {"width": width, "last": BINS},
    )
    counts = np.zeros(BINS + 1, np.int64)
    for i, n in rows:
        counts[i] = n
    beyond = int(counts[BINS])
    used = max(8, int(np.flatnonzero(counts[:BINS]).max(initial=0)) + 1)
    tail = f"; {beyond:,} lie beyond, up to {number(top)}" if beyond else ""
    picture = draw_histogram(counts[:used], width)
    return {"title": f"{title}, {count:,} pairs{tail}", "svg": inline_svg(picture)}


@styled
def draw_histogram(counts: np.ndarray, width: float) -> Picture:
    """Bars of equal width from 0 on."""
    picture = new_picture(6.2, 1.35)
    ax = picture.subplots()
    edges = width * np.arange(len(counts))
    ax.bar(edges, counts, 0.92 * width, align="edge", color=ACCENT)
    ax.axhline(0, color=LINE, lw=1)
    ax.set_xlim(0, width * len(counts))
    ax.set_yticks([])
    axis(ax)
    return picture


def ranges(view: View) -> dict[str, str] | None:
    """Epistemic uncertainty by class: of images predicted as it, and of counterfactuals towards it."""
    quantiles = list(QUANTILES)
    own = dict(
        view.rows(f"SELECT source, quantile_cont(epistemic, {quantiles}) FROM codes WHERE status = 'ok' GROUP BY 1")
    )
    after = dict(
        view.rows(
            f"SELECT target, quantile_cont(epistemic_final, {quantiles}) FROM counterfactuals "
            "WHERE epistemic_final IS NOT NULL GROUP BY 1 ORDER BY 1"
        )
    )
    classes = list(after)
    if len(classes) > MAX_RANGES:
        classes = sorted(classes, key=lambda k: (own.get(k) or after[k])[2] - after[k][2])[:MAX_RANGES]
    groups = {
        "images": {k: own[k] for k in classes if own.get(k) and own[k][4] > 0},
        "counterfactuals": {k: after[k] for k in classes if after[k][4] > 0},
    }
    if not any(groups.values()):
        return None
    names = [view.class_names[k] for k in classes]
    spoken = [
        f"{view.class_names[k]}, {what}: median {number(values[k][2])} nats, 5 % {number(values[k][0])}, "
        f"95 % {number(values[k][4])}"
        for k in classes
        for what, values in groups.items()
        if k in values
    ]
    lines = {what: {classes.index(k): value for k, value in values.items()} for what, values in groups.items()}
    alt = "Epistemic uncertainty of images and of counterfactuals, by class: " + "; ".join(spoken)
    return {"alt": alt, "svg": inline_svg(draw_ranges(names, lines))}


@styled
def draw_ranges(names: list[str], groups: dict[str, dict[int, list[float]]]) -> Picture:
    """Two ranges for each class on one logarithmic axis: 5 % to 95 % thin, the middle half thick, the median a dot."""
    picture = new_picture(6.2, 0.35 + 0.27 * len(names))
    ax = picture.subplots()
    least = max(1e-6, min(v for values in groups.values() for q in values.values() for v in q if v > 0))
    for values, colour, shift in zip(groups.values(), (FAINT, ALERT), (-0.17, 0.17)):
        y = np.array(list(values)) + shift
        low, quarter, middle, three_quarters, high = np.maximum(np.array(list(values.values())), least).reshape(-1, 5).T
        ax.hlines(y, low, high, color=colour, lw=1)
        ax.hlines(y, quarter, three_quarters, color=colour, lw=3)
        ax.plot(middle, y, ls="", marker="o", ms=4.5, mew=0, color=colour)
    ax.set_xscale("log")
    ax.grid(axis="x", color=LINE, lw=0.6)
    ax.set_axisbelow(True)
    ax.set_yticks(range(len(names)), [name if len(name) <= 22 else name[:21] + "…" for name in names], parse_math=False)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.minorticks_off()
    axis(ax)
    ax.tick_params(axis="y", labelcolor=INK)
    return picture
