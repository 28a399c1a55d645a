"""The maps of class pairs: each cell's text and shade, on scales that can be compared.

Shapes: K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from clarity.report.text import decimals, percent
from clarity.report.view import View


class PairMap(NamedTuple):
    """One map: a column of the class pairs' figures, its title, its unit, and what it says."""

    key: str
    title: str
    unit: str
    doc: str
    share: bool = False


MAPS = (
    PairMap("strict_validity", "Strict validity", "share of pairs", "pairs that reached the target probability", True),
    PairMap(
        "reencoded_agreement",
        "Re-encoded agreement",
        "share of pairs",
        "pairs still classified as their target after decoding, rounding to 8 bits and encoding",
        True,
    ),
    PairMap("median_steps", "Steps", "updates, median of converged pairs", "length of the search"),
    PairMap("median_distance", "Latent distance", "L1 between codes, median of converged pairs", "size of the change"),
    PairMap("epistemic_initial", "Epistemic before", "nats, median", "disagreement of the members about the image"),
    PairMap(
        "epistemic_final", "Epistemic after", "nats, median", "disagreement of the members about the counterfactual"
    ),
    PairMap("pairs", "Pairs", "count", "pairs that were searched"),
)


def pair_maps(views: Sequence[View]) -> list[dict[str, Any]]:
    """Every map as the script draws it, with one entry of ``audits`` for each audit."""
    maps = []
    for kind in MAPS:
        # Before and after share one scale, as do audits side by side, so that they can be compared.
        keys = ["epistemic_initial", "epistemic_final"] if kind.key.startswith("epistemic") else [kind.key]
        values = np.concatenate([view.facts.pairs[key].ravel() for view in views for key in keys])
        low, high = scale_of(values[np.isfinite(values)], kind.share)
        digits = 0 if kind.key == "pairs" else decimals(high)
        maps.append(
            {
                **{name: getattr(kind, name) for name in ("key", "title", "unit", "doc")},
                "low": cell_text(low, kind.share, digits),
                "high": cell_text(high, kind.share, digits),
                "audits": [
                    audit_map(view.facts.pairs[kind.key], view.facts.pairs["pairs"], (low, high), kind.share, digits)
                    for view in views
                ],
            }
        )
    return maps


def scale_of(values: np.ndarray, share: bool) -> tuple[float, float]:
    """Values of the lightest and the darkest shade."""
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if share:
        return min(0.95, np.floor(low * 20) / 20), 1.0
    # The scale starts at the smallest value, which shows differences, but spans a fifth, which keeps small ones small.
    return (min(low, 0.8 * high), high) if high > 0 else (0.0, 1.0)


def audit_map(
    values: np.ndarray, pairs: np.ndarray, scale: tuple[float, float], share: bool, digits: int
) -> dict[str, Any]:
    """Texts and shades (0 to 100) of one audit's map (K, K), and its means by row and column, weighted by pairs."""
    low, high = scale
    shades = np.clip(np.round(100 * (np.nan_to_num(values, nan=low) - low) / (high - low or 1.0)), 0, 100)
    weight = np.where(np.isfinite(values), np.nan_to_num(pairs), 0.0)

    def means(axis: int) -> list[str]:
        total = weight.sum(axis)
        sums = (weight * np.nan_to_num(values)).sum(axis)
        return [cell_text(s / n if n else np.nan, share, digits) for s, n in zip(sums, total)]

    return {
        "text": [[cell_text(value, share, digits) for value in line] for line in values],
        "shade": shades.astype(int).tolist(),
        "row_means": means(1),
        "column_means": means(0),
    }


def cell_text(value: float, share: bool, digits: int) -> str:
    """One number of a map; all of a map have the same digits after the point."""
    if not np.isfinite(value):
        return "–"
    return percent(value) if share else f"{value:,.{digits}f}"
