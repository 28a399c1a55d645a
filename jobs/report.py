#!/usr/bin/env python
"""Write the report of an audit, or of several side by side: one HTML file that works offline.

Exit codes: 0 written, 2 bad input.
"""

import argparse
import sys
from collections.abc import Sequence

import driver

from clarity import storage
from clarity.audit.plan import read_plan
from clarity.report.page import write_report


def new_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = driver.new_parser(__doc__)
    parser.add_argument("audits", nargs="+", metavar="AUDIT", help="Audit directories, local or s3://.")
    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="URI", help="File to write (default: report.html in the first audit).")
    add("--image", action="append", default=[], metavar="ID", help="Embed this image too; repeatable.")
    about = "Embed more examples of this class pair; repeatable."
    add("--pair", action="append", default=[], metavar="SOURCE:TARGET", help=about)
    return parser


def pair(text: str, names: Sequence[str]) -> tuple[str, str]:
    """SOURCE:TARGET as its two names, which may hold colons themselves."""
    cuts = [(text[:i], text[i + 1 :]) for i, letter in enumerate(text) if letter == ":"]
    if not cuts:
        raise ValueError(f"pair: expected SOURCE:TARGET, got {text!r}")
    return next((cut for cut in cuts if set(cut) <= set(names)), cuts[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; the exit code."""
    return driver.run(new_parser(), report, argv)


def report(args: argparse.Namespace) -> int:
    """Write the page, print its URI and what it found."""
    pairs = [pair(text, read_plan(args.audits[0]).class_names) for text in args.pair]
    page = write_report(args.audits, args.out, images=args.image, pairs=pairs)
    print(f"{storage.display(page.uri)}: {page.size / 1e6:.1f} MB, {page.tiles:,} images, {page.seconds:.1f} s")
    for verdict in page.verdicts:
        print(f"  model  {verdict.sentence}")
    for finding in page.findings:
        print(f"  {finding.level:5}  {finding.sentence}")
    if not page.complete:
        print("warning: the audit is not complete; the page says what is missing", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
