#!/usr/bin/env python
"""Runs the faults, or those with a word given, and prints them by exit codes; reliability.md sums them up."""

import itertools
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import ray

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "jobs")]

import test_faults  # noqa: E402
from networks import save_digits_model  # noqa: E402


def shown(exits: Iterable[int]) -> str:
    """Exit codes in order, repeated ones counted."""
    counted = [(code, len(list(codes))) for code, codes in itertools.groupby(exits)]
    return ", ".join(str(code) if count == 1 else f"{code} x {count}" for code, count in counted)


def main(argv: list[str]) -> int:
    """Try all faults, or those whose names hold a word given, and print a paragraph for each list of exit codes."""
    chosen = [name for name in test_faults.FAULTS if not argv or any(word in name for word in argv)]
    outcomes: dict[str, list[str]] = {}
    failed = 0
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
            try:
                expected, found, double = test_faults.try_fault(here, name)
                assert (found, double) == (expected, 0)
                outcome = shown(here.exits)
            except pytest.skip.Exception as reason:
                outcome = f"skipped: {reason}"
            except Exception as error:
                failed += 1
                outcome = "FAILED"
                log = here.log()[-1500:] if (here.root / "log").exists() else ""
                print(f"--- {name}\n{error}\n{log}", file=sys.stderr)
            outcomes.setdefault(outcome, []).append(name)
            print(f"{name}: {outcome}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        ray.shutdown()
    for outcome, names in outcomes.items():
        print(textwrap.fill(f"**{outcome}** ({len(names)}): {'; '.join(names)}.", 120) + "\n")
    print(f"{len(chosen)} faults, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
