#!/usr/bin/env python
"""Asks every documented question of an audit of the shipped digits, and writes the answers into the documentation.

    python jobs/explain_all.py && python docs/queries.py [--check]

Rewrites the part of docs/queries.md below its first question, and the answer on the README's first screen; with --check
it says what would change, and changes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas
import pyarrow as pa
from PIL import Image

import clarity
from clarity import data
from clarity.audit import queries

ROOT = Path(__file__).parent.parent
AUDIT = "runs/digits/audit"
SHOWN = 5
VIEWS = "What several questions share, with the page and the figures:"
#: What is said between a question's SQL and its answer, where the answer needs more than the audit.
ABOUT = {
    "predictions": """Here one's own model is a simple one: the class whose mean training image is nearest in pixels.
With count = 5:""",
    "by_metadata": """Here the metadata is how much ink an image has, in three groups of equal size:

```python
codes = pandas.read_parquet("runs/digits/audit/codes", columns=["image_id", "x"])
ink = [np.asarray(Image.open(io.BytesIO(picture))).mean() for picture in codes.x]
segment = pandas.qcut(ink, 3, labels=["1 thin", "2 usual", "3 bold"]).astype(str)
con.register("metadata", codes[["image_id"]].assign(segment=segment))
```""",
}


def by_ink(codes: pa.Table) -> pandas.DataFrame:
    """The metadata of the documentation: each image's third by the mean of its pixels."""
    ink = [np.asarray(Image.open(io.BytesIO(picture))).mean() for picture in codes["x"].to_pylist()]
    segment = pandas.qcut(ink, 3, labels=["1 thin", "2 usual", "3 bold"]).astype(str)
    return pandas.DataFrame({"image_id": codes["image_id"].to_pylist(), "segment": segment})


def by_nearest_mean(codes: pa.Table, class_names: list[str]) -> pa.Table:
    """The tables' codes with the predictions of a classifier that never saw an ensemble: the nearest mean image."""
    train = data.open_dataset("digits", split="train")
    listing = data.list_images(train)
    kind = data.SOURCES["digits"].default_preprocessing
    assert kind is not None
    images, _, labels, _ = data.read_all(train, listing, kind)
    means = np.stack([images[np.array(labels) == name].mean(0).ravel() for name in class_names])
    mine = np.stack([np.asarray(Image.open(io.BytesIO(x))).ravel() for x in codes["x"].to_pylist()]).astype(float)
    nearest = ((mine[:, None] - means) ** 2).sum(2).argmin(1).astype(np.int32)
    codes = codes.append_column("prediction", pa.array(nearest))
    return codes.append_column("prediction_name", pa.array(class_names).take(pa.array(nearest)))


def answer(con: duckdb.DuckDBPyConnection, name: str) -> str:
    """A question and its answer, as Markdown."""
    query = queries.load_queries()[name]
    parameters = {**query.parameters, **({"count": SHOWN} if "count" in query.parameters else {})}
    told = con.sql(query.sql, params=parameters).to_arrow_table()
    said = ", ".join(f"{key} = {value!r}" for key, value in parameters.items())
    about = ABOUT.get(name) or (f"With {said}:" if said else "")
    if told.num_rows > 12:
        about = f"The first {SHOWN} of its {told.num_rows} rows:"
        told = told.slice(0, SHOWN)
    drawn = io.StringIO()
    with contextlib.redirect_stdout(drawn):
        duckdb.from_arrow(told).show(max_width=120)  # columns in the middle of a wider table are left out
    shown = drawn.getvalue().rstrip()
    parts = [f"### `{name}`", query.doc, f"```sql\n{query.sql}\n```", about, f"```text\n{shown}\n```"]
    return "\n\n".join(part for part in parts if part)


def documented(text: str, audit: Any) -> str:
    """docs/queries.md with the answers of an audit."""
    codes = audit.codes.to_table()
    con = queries.connect(
        by_nearest_mean(codes, audit.class_names), audit.counterfactuals.to_table(), metadata=by_ink(codes)
    )
    head = text[: text.index("\n## Views\n")]
    views = [f"```sql\n{view.strip()}\n```" for view in queries.load_views().values()]
    parts = ["## Views", VIEWS, *views, "## Questions", *(answer(con, name) for name in queries.load_queries())]
    return head + "\n" + "\n\n".join(parts) + "\n"


def first_screen(text: str) -> str:
    """The README with the answer to the query of its first screen, which is run as it stands there."""
    before, _, rest = text.partition("<!-- query -->\n```python\n")
    code, _, after = rest.partition("```\n\n```\n")
    _, _, after = after.partition("```\n")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return f"{before}<!-- query -->\n```python\n{code}```\n\n```\n{run.stdout.strip()}\n```\n{after}"


def main(argv: list[str] | None = None) -> int:
    """Writes the answers, or says what differs; 1 where --check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, say what would change")
    args = parser.parse_args(argv)
    audit = clarity.read_audit(AUDIT)
    changed = False
    for path, new in (
        (ROOT / "docs" / "queries.md", lambda text: documented(text, audit)),
        (ROOT / "README.md", first_screen),
    ):
        old = path.read_text()
        if (text := new(old)) == old:
            continue
        changed = True
        if args.check:
            lines = difflib.unified_diff(old.splitlines(), text.splitlines(), str(path), "asked now", lineterm="", n=0)
            print(*lines, sep="\n")
        else:
            path.write_text(text)
            print(f"wrote {path}")
    return int(changed and args.check)


if __name__ == "__main__":
    sys.exit(main())
