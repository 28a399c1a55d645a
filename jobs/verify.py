#!/usr/bin/env python
"""Check an audit against its plan: files and sums, images, pairs, order, contents; decode a sample of it again.

Exit codes: 0 complete and sound, 1 not, 2 no audit there.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from clarity import storage
from clarity.audit.commits import drop_commits
from clarity.audit.verify import verify
from clarity.notebook import redecoder


def main(argv: Sequence[str] | None = None) -> int:
    """Verify one audit and print what was found; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audit", help="the audit directory, or its s3:// URI")
    parser.add_argument(
        "--repair", action="store_true", help="drop the commits of unsound shards: the next run redoes them"
    )
    args = parser.parse_args(argv)
    try:
        found = verify(args.audit, redecode=redecoder(args.audit), workers=os.cpu_count() or 1)
        marked = storage.exists(storage.join(args.audit, "_SUCCESS"))
        if args.repair and found.shards:
            drop_commits(args.audit, found.shards)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"images     {found.images}, {found.errors} unreadable")
    print(f"pairs      {found.pairs}, {found.converged} converged")
    print(f"decoded    {found.redecoded} pairs again, within one grey level")
    for problem in found.problems:
        print(f"problem    {problem}")
    if not found.ok:
        print("NOT SOUND: run jobs/explain_all.py again" + (" after --repair" if marked and not args.repair else ""))
        return 1
    print("sound" if marked else "sound, but not marked complete: run jobs/explain_all.py again")
    return 0 if marked else 1


if __name__ == "__main__":
    sys.exit(main())
