#!/usr/bin/env python
"""Verify an audit against its plan: files, checksums, images, pairs, order and contents; decode a sample again.

Exit codes: 0 complete and intact, 1 not, 2 no audit there.
"""

import argparse
import sys
from collections.abc import Sequence

import driver

from clarity import storage
from clarity.audit.commits import drop_commits
from clarity.audit.verify import verify
from clarity.notebook import redecoder
from clarity.report.text import counted


def new_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = driver.new_parser(__doc__)
    parser.add_argument("audit", help="Audit directory, local or s3://.")
    about = "Drop the commits of damaged shards; the next run of explain_all.py redoes them."
    parser.add_argument("--repair", action="store_true", help=about)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; the exit code."""
    return driver.run(new_parser(), check, argv)


def check(args: argparse.Namespace) -> int:
    """Verify one audit and print what was found."""
    found = verify(args.audit, redecode=redecoder(args.audit))
    marked = storage.exists(storage.join(args.audit, "_SUCCESS"))
    if args.repair and found.shards:
        drop_commits(args.audit, found.shards)
    print(f"images     {found.images}, {found.errors} unusable")
    print(f"pairs      {found.pairs}, {found.converged} converged")
    print(f"decoded    {counted(found.redecoded, 'pairs')} again, within one grey level")
    for problem in found.problems:
        print(f"problem    {problem}")
    if found.problems:
        print("DAMAGED: run jobs/explain_all.py again" + (" after --repair" if marked and not args.repair else ""))
    elif not found.ok:
        print(f"incomplete, {found.committed} of {counted(found.planned, 'shards')}: run jobs/explain_all.py again")
    else:
        print("intact" if marked else "intact, but not marked complete: run jobs/explain_all.py again")
    return 0 if found.ok and marked else 1


if __name__ == "__main__":
    sys.exit(main())
