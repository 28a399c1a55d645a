#!/usr/bin/env python
"""Draws the pictures of the README from the audit of the shipped digits.

python jobs/explain_all.py && python docs/pictures.py runs/digits/audit

The images are the first of their classes that are classified as labelled.
report.png is the first screen of the audit's report.html in Chromium, 1400 x 900 pixels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pyarrow.compute as pc

from clarity import plots
from clarity.audit.read import Audit, read_audit
from clarity.figure import Picture
from clarity.images import decode_png
from clarity.paper.figures import image_grid

HERE = Path(__file__).parent


def first_images(audit: Audit, classes: list[str]) -> list[str]:
    """Of each class, the first image that is classified as it is labelled."""
    seen = pc.field("source_name")
    codes = audit.codes.to_table(columns=["image_id", "source_name"], filter=seen == pc.field("label_name"))
    rows = sorted(codes.to_pylist(), key=lambda row: row["image_id"])
    return [next(row["image_id"] for row in rows if row["source_name"] == name) for name in classes]


def every_class(audit: Audit, image_ids: list[str]) -> Picture:
    """Images, each beside its counterfactuals towards every other class."""
    shape, names = audit.plan.image_shape, audit.plan.model["class_names"]
    rows = []
    for image_id in image_ids:
        mine = pc.field("image_id") == image_id
        original = audit.codes.to_table(columns=["x"], filter=mine).to_pylist()[0]["x"]
        found = audit.counterfactuals.to_table(columns=["target_name", "x_cf"], filter=mine).to_pylist()
        x_cf = {row["target_name"]: row["x_cf"] for row in found}
        pictures = [original, *(x_cf.get(name) for name in names)]
        rows.append([None if png is None else decode_png([png], shape)[0] for png in pictures])
    columns = ["original", *(f"as {name}" for name in names)]
    return image_grid(rows, columns, [""] * len(rows), [[""] * len(columns)] * len(rows))


def main(argv: list[str] | None = None) -> int:
    """Writes digits.png and four-to-nine.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audit", help="Directory of the audit.")
    parser.add_argument("--out", type=Path, default=HERE, help="Where to write (default: docs).")
    args = parser.parse_args(argv)
    audit = read_audit(args.audit)
    every_class(audit, first_images(audit, ["0", "2", "4", "7", "9"])).savefig(args.out / "digits.png", dpi=110)
    plots.Counterfactual(audit, "test/0227", "9").picture().savefig(args.out / "four-to-nine.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
