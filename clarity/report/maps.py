"""The maps of class pairs: each cell's text and shade, on scales that can be compared."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from clarity.audit.queries import PAIR_FIGURES
from clarity.report.text import decimals, percent
from clarity.report.view import View


def pair_maps(views: Sequence[View]) -> list[dict[str, Any]]:
    """Every map that has figures as the script draws it: texts and shades (0 to 100) of each audit's cells (K, K)."""
    maps = []
    for key, figure in PAIR_FIGURES.items():
        # Before and after share one scale, as do audits side by side, so that they can be compared.
        keys = ["epistemic_initial", "epistemic_final"] if key.startswith("epistemic") else [key]
        values = np.concatenate([view.facts.pairs[name].ravel() for view in views for name in keys])
        if key in ("judge_agreement", "confirmed_share") and not np.isfinite(values).any():
            continue
        low, high = scale_of(values[np.isfinite(values)], figure.share)
        digits = 0 if key == "pairs" else decimals(high)
        audits = []
        for pairs in (view.facts.pairs[key] for view in views):
            shades = np.clip(np.round(100 * (np.nan_to_num(pairs, nan=low) - low) / (high - low or 1.0)), 0, 100)
            text = [[cell_text(value, figure.share, digits) for value in line] for line in pairs]
            audits.append({"text": text, "shade": shades.astype(int).tolist()})
        maps.append(
            {
                "key": key,
                "title": figure.title,
                "unit": figure.label,
                "doc": figure.doc,
                "low": cell_text(low, figure.share, digits),
                "high": cell_text(high, figure.share, digits),
                "audits": audits,
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


def cell_text(value: float, share: bool, digits: int) -> str:
    """One number of a map; all of a map have the same digits after the point."""
    if not np.isfinite(value):
        return "–"
    return percent(value).replace(" ", "\u00a0") if share else f"{value:,.{digits}f}"
