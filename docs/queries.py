#!/usr/bin/env python
"""Asks the documented questions of an audit of the shipped digits and writes the answers into the documentation.

    python jobs/explain_all.py && python docs/queries.py [--check]

Rewrites docs/queries.md below the heading Questions and the answer in the README. With --check it prints what would
change and changes nothing.
"""

import argparse
import difflib
import subprocess
import sys
from pathlib import Path
from typing import Any

import clarity
from clarity.audit import queries

ROOT = Path(__file__).parent.parent
AUDIT = "runs/digits/audit"
#: Rows of an answer that are shown, but for the README's question.
SHOWN = 1
SHOWN_OF = {"closest_to": 3}
#: SQL that a question needs first.
BEFORE = {"by_metadata": "CREATE VIEW metadata AS SELECT image_id, label_name AS segment FROM codes"}
#: Questions that the audit of the digits cannot answer: why.
UNANSWERED = {"predictions": "Asked of an audit with `--predictions`."}


def question(con: Any, name: str) -> str:
    """A question and the first rows of its answer, as Markdown."""
    query = queries.load_queries()[name]
    parts = [f"### `{name}`", query.doc]
    if name in BEFORE:
        con.execute(BEFORE[name])
        parts.append(f"Here after `{BEFORE[name]}`:")
    parts.append(f"```sql\n{query.sql}\n```")
    if name in UNANSWERED:
        return "\n\n".join([*parts, UNANSWERED[name]])
    found = con.sql(query.sql, params=query.parameters).df().head(SHOWN_OF.get(name, SHOWN))
    answer = (
        found.to_string(index=False, float_format="{:g}".format) if len(found) else "  ".join(found) + "\n(no rows)"
    )
    shown = [f"{key} = {value!r}" for key, value in query.parameters.items() if key != "count"]
    lines = "\n".join(line.rstrip() for line in answer.splitlines())
    return "\n\n".join([*parts, *([f"With {', '.join(shown)}:"] if shown else []), f"```text\n{lines}\n```"])


def documented(text: str, audit: Any) -> str:
    """docs/queries.md with the answers of an audit."""
    con = queries.connect(audit.codes, audit.counterfactuals)
    head = text[: text.index("\n## Questions\n")]
    parts = ["## Questions", *(question(con, name) for name in queries.load_queries())]
    return head + "\n" + "\n\n".join(parts) + "\n"


def first_screen(text: str) -> str:
    """The README with the answer to its query, which is run as it is written there."""
    before, _, rest = text.partition("<!-- query -->\n```python\n")
    code, _, after = rest.partition("```\n\n```\n")
    _, _, after = after.partition("```\n")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return f"{before}<!-- query -->\n```python\n{code}```\n\n```\n{run.stdout.strip()}\n```\n{after}"


def main(argv: list[str] | None = None) -> int:
    """Writes the answers, or prints what differs; 1 if --check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Print what would change, and change nothing.")
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
