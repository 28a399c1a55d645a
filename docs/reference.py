#!/usr/bin/env python
"""Writes docs/reference.md from the code: columns from the schema, flags from each job's own parser.

    python docs/reference.py [--check]

Rewrites the sections of tables and jobs and leaves the rest. With --check it names stale sections (exit code 1) and
changes nothing.
"""

import argparse
import re
import runpy
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "jobs")]

from clarity.schema import CODES, COUNTERFACTUALS, PREDICTIONS, TRACES, Column  # noqa: E402

PAGE = ROOT / "docs" / "reference.md"
JOBS = ("explain_all", "train", "verify", "report")
TABLES = {"codes": CODES | PREDICTIONS, "counterfactuals": COUNTERFACTUALS, "traces": TRACES}


def columns_list(columns: Mapping[str, Column]) -> str:
    """The columns of a table, each with its type and what it holds."""
    return "\n".join(item(f"`{name}` {column.type}: {column.doc}") for name, column in columns.items())


def item(text: str) -> str:
    """An item of a list in lines of at most 120 characters."""
    return textwrap.fill(text, 120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def flags_list(parser: argparse.ArgumentParser, known: dict[tuple[str, str], str], name: str) -> str:
    """The flags of a job by group; those that an earlier job explains in the same words are only named.

    Args:
        parser: of the job.
        known: job by flag and text; the job's own flags are added.
        name: of the job.
    """
    parts, repeated = [" ".join((parser.description or "").split("\n\n")[0].split())], dict[str, list[str]]()
    said: dict[str, str] = {}
    for group in parser._action_groups:
        lines = []
        for action in group._group_actions:
            text = " ".join((action.help or "").replace("%%", "%").split())
            meaning, default, value = text.partition(" (default:")
            if (like := said.setdefault(meaning, name_of(action).split()[0])) not in name_of(action):
                text = f"as {like}{default}{value}"
            flag = f"{name_of(action)}: {text}"
            if isinstance(action, argparse._HelpAction):
                continue
            if known.setdefault((flag, text), name) != name:
                repeated.setdefault(known[flag, text], []).append(f"`{action.option_strings[0]}`")
            else:
                lines.append(item(flag))
        title = group.title or ""
        if lines and title not in ("options", "positional arguments"):
            parts.append(f"*{title[0].upper()}{title[1:]}*")
        if lines:
            parts.append("\n".join(lines))
    parts += [f"As in `jobs/{job}.py`: {', '.join(flags)}." for job, flags in repeated.items()]
    return "\n\n".join(parts)


def name_of(action: argparse.Action) -> str:
    """A flag with its choices or what it takes."""
    name = f"`{action.option_strings[0] if action.option_strings else action.metavar or action.dest}`"
    if action.choices:
        return f"{name} {', '.join(f'`{choice}`' for choice in action.choices)}"
    metavar = action.metavar if action.option_strings and action.nargs != 0 else None
    return f"{name} {metavar} {'...' if action.nargs in ('+', '*') else ''}".rstrip() if metavar else name


def sections() -> dict[str, str]:
    """What each generated section says, by its heading."""
    found = {f"### `{table}/*.parquet`": columns_list(columns) for table, columns in TABLES.items()}
    known: dict[tuple[str, str], str] = {}
    for name in JOBS:
        job = runpy.run_path(str(ROOT / "jobs" / f"{name}.py"))
        found[f"### `jobs/{name}.py`"] = flags_list(job["new_parser"](), known, name)
    return found


def rewritten(page: str, contents: Mapping[str, str]) -> str:
    """The page with these sections' contents, each up to the next heading."""
    for heading, content in contents.items():
        pattern = re.compile(rf"^{re.escape(heading)}\n.*?(?=^#|\Z)", re.MULTILINE | re.DOTALL)
        if not pattern.search(page):
            raise ValueError(f"{PAGE.name} has no section {heading!r}")
        page = pattern.sub(lambda _, text=f"{heading}\n\n{content}\n\n": text, page)  # type: ignore[misc]
    return page.rstrip() + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite, or check; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Say what is stale, and change nothing.")
    check = parser.parse_args(argv).check
    page, contents = PAGE.read_text(), sections()
    if not check:
        PAGE.write_text(rewritten(page, contents))
        return 0
    stale = [heading for heading, content in contents.items() if rewritten(page, {heading: content}) != page]
    for heading in stale:
        print(f"stale: {heading}; run python docs/reference.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
