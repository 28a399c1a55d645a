#!/usr/bin/env python
"""Runs the faults, or those with a word given, and prints the table of reliability.md."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from pathlib import Path

import pytest
import ray

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "jobs")]

import test_faults  # noqa: E402
from networks import save_digits_model  # noqa: E402


def main(argv: list[str]) -> int:
    """Try all faults, or those whose names hold a word given, and print the table."""
    chosen = [name for name in test_faults.FAULTS if not argv or any(word in name for word in argv)]
    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as root, test_faults.ray_directory() as directory:
        ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=directory, log_to_driver=False,
                 object_store_memory=200_000_000)  # fmt: skip
        model = Path(root) / "model"
        save_digits_model(model)
        (Path(root) / "undisturbed").mkdir()
        bench = test_faults.Bench(ray.get_runtime_context().gcs_address, str(model), Path(root) / "undisturbed")
        bench.run()
        bench.expected = bench.files()
        for name in chosen:
            start, here = time.monotonic(), bench.fresh()
            expected, found, double = test_faults.LIMIT * 9, 0, 0
            try:
                expected, found, double = test_faults.try_fault(here, name)
                verdict = "whole"
            except pytest.skip.Exception as reason:
                verdict = f"skipped: {reason}"
            except Exception as error:
                failed += 1
                verdict = f"FAILED: {(str(error).strip() or repr(error)).splitlines()[0][:80].replace('|', '/')}"
                with contextlib.suppress(Exception):
                    found, double = here.count()
                print(
                    f"--- {name}\n{error}\n{here.log()[-1500:] if (here.root / 'log').exists() else ''}",
                    file=sys.stderr,
                )
            exits = " ".join(map(str, here.exits))
            seconds = time.monotonic() - start
            rows.append(f"| {name} | {expected} | {found} | {double} | {exits} | {verdict} | {seconds:.0f} |")
            print(rows[-1], flush=True)
        ray.shutdown()
    print("\n| fault | expected rows | found | double | exit codes | result | seconds |\n|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    print(f"\n{len(rows)} faults, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
