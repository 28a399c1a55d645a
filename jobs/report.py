#!/usr/bin/env python
"""Makes the report of an audit, or of several side by side: one HTML file that works offline.

python jobs/report.py AUDIT [AUDIT ...] [--out report.html] [--image ID ...] [--pair SOURCE:TARGET ...]
"""

from __future__ import annotations

import argparse
import sys

from clarity import storage
from clarity.report.page import write_report


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, writes the page, and says where it is and what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "audits", nargs="+", metavar="AUDIT", help="audit directory, local or s3://; several stand side by side"
    )
    parser.add_argument("--out", help="where the page goes (default: report.html in the first audit)")
    parser.add_argument(
        "--image", action="append", default=[], metavar="ID", help="an image to embed besides the sample"
    )
    parser.add_argument(
        "--pair",
        action="append",
        default=[],
        metavar="SOURCE:TARGET",
        help="class names whose examples are embedded first",
    )
    args = parser.parse_args(argv)
    try:
        pairs = [_pair(text) for text in args.pair]
        report = write_report(args.audits, args.out, images=args.image, pairs=pairs)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{storage.display(report.uri)}: {report.size / 1e6:.1f} MB, {report.tiles:,} pictures, {report.seconds:.1f} s"
    )
    for finding in report.findings:
        print(f"  {finding.level:5}  {finding.sentence}")
    if not report.complete:
        print("warning: the audit is not complete; the page says what is missing", file=sys.stderr)
    return 0


def _pair(text: str) -> tuple[str, str]:
    source, colon, target = text.partition(":")
    if not colon:
        raise ValueError(f"--pair: expected SOURCE:TARGET, found {text!r}")
    return source, target


if __name__ == "__main__":
    sys.exit(main())
