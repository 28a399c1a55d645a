"""The end of a run: output that nobody reads, data of which nothing can be read, a death amid the report."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobfiles import load_job

from clarity.audit.read import read_audit
from clarity.images import encode_png

JOBS = Path(__file__).parents[2] / "jobs"
FLAGS = ["--limit", "9", "--shard-rows", "3", "--max-steps", "5", "--min-target-prob", "0.4"]


@pytest.fixture
def job(ray_local: Any) -> Any:
    return load_job("explain_all")


PRINTER = """
import argparse, sys
sys.path.insert(0, sys.argv[1])
import driver

def job(args):
    for number in range(30_000):
        print("line", number)
    print("\\u5b57 \\udcff", file=sys.stderr)
    return 0

sys.exit(driver.run(argparse.ArgumentParser(), job, []))
"""


def test_printing_into_a_closed_pipe_decides_nothing() -> None:
    command = f'"{sys.executable}" -c "$0" "{JOBS}" | head -1; exit ${{PIPESTATUS[0]}}'
    run = subprocess.run(["bash", "-c", command, PRINTER], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "line 0\n"), run.stderr
    assert "Broken" not in run.stderr and "\\udcff" in run.stderr


def test_printing_what_a_terminal_cannot_encode_decides_nothing() -> None:
    command = [sys.executable, "-c", PRINTER.replace("30_000", "3"), str(JOBS)]
    env = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0 and "\\u5b57 \\udcff" in run.stderr


def test_a_set_in_which_nothing_can_be_read_is_bad_input_every_time(
    job: Any, tiny_digits_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "3").mkdir(parents=True)
    for number in range(7):
        (tmp_path / "data" / "3" / f"{number}.png").write_bytes(b"torn")
    out = tmp_path / "audit"
    command = ["--dataset", "folder", "--data", str(tmp_path / "data"), "--split", "all"]
    command += ["--model", str(tiny_digits_model), "--out", str(out), *FLAGS]
    for _ in range(2):
        assert job.main(command) == 2
        assert "--data: expected images, got 7 of which none could be read: 7 x" in capsys.readouterr().err
        page = (out / "report.html").read_text()
        assert "7 x" in page or "none" in page.lower()


def test_a_report_that_was_cut_is_written_by_the_next_run(
    job: Any, tiny_digits_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "audit"
    command = ["--model", str(tiny_digits_model), "--out", str(out), *FLAGS]
    real, job.report_of = job.report_of, lambda uri: 1 / 0
    with pytest.raises(ZeroDivisionError):
        job.main(command)
    assert (out / "_SUCCESS").exists() and not (out / "report.html").exists()
    job.report_of = real
    assert job.main(command) == 0
    printed = capsys.readouterr().out
    assert "already complete" in printed and "report.html" in printed
    before = (out / "report.html").stat().st_mtime_ns
    assert job.main(command) == 0
    assert (out / "report.html").stat().st_mtime_ns == before
    # The page of an audit that lost a shard is not left to speak for it.
    (out / "_commits" / "shard-00001.json").unlink()
    assert job.main([*command, "--no-report"]) == 0
    assert not (out / "report.html").exists()


def test_a_source_that_vanishes_costs_shards_and_no_image(
    job: Any, tiny_digits_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 1, 28, 28)).astype(np.uint8)
    share = tmp_path / "share"
    (share / "3").mkdir(parents=True)
    for number, png in enumerate(encode_png(pixels)):
        (share / "3" / f"{number}.png").write_bytes(png)
    out = tmp_path / "audit"
    command = ["--dataset", "folder", "--data", str(share), "--split", "all", "--no-report"]
    command += ["--model", str(tiny_digits_model), "--out", str(out), *FLAGS]
    real = job.fill

    def fill(*args: Any) -> None:
        """The share is unmounted after its images were listed, and mounted again after the run."""
        share.rename(tmp_path / "elsewhere")
        share.mkdir()
        real(*args)

    job.fill = fill
    assert job.main(command) == 1
    printed = capsys.readouterr()
    assert "shard 0 failed at stage read: StorageError: cannot read" in printed.err
    assert "INCOMPLETE 0 of 3 shards" in printed.out
    assert read_audit(out).codes.count_rows() == 0
    share.rmdir()
    (tmp_path / "elsewhere").rename(share)
    job.fill = real
    assert job.main(command) == 0
    assert read_audit(out).summary()["unread"] == 0
