"""The jobs over a real Ray: a whole run, what a second run does, deaths of workers and of the driver, exit codes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jobfiles import load_job

import clarity
from clarity.audit.verify import verify
from clarity.notebook import redecoder

ROOT = Path(__file__).parent.parent.parent
LIMIT = 40
FLAGS = ["--limit", str(LIMIT), "--shard-rows", "7", "--max-steps", "25", "--min-target-prob", "0.4", "--no-report"]


@pytest.fixture
def job(ray_local: Any) -> Any:
    return load_job("explain_all")


def files_of(out: Path) -> dict[str, bytes]:
    """The data files, by name."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for name in ("codes", "counterfactuals")
        for path in sorted((out / name).iterdir())
    }


@pytest.fixture(scope="module")
def undisturbed(
    ray_local: Any, tiny_digits_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, bytes]]]:
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "audit"
    assert load_job("explain_all").main(["--model", str(tiny_digits_model), "--out", str(out), *FLAGS]) == 0
    yield out, files_of(out)


def flags(model: Path, out: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--out", str(out), *FLAGS, *more]


def test_actors_of_one_core_write_the_same_files(
    job: Any, tiny_digits_model: Path, undisturbed: tuple[Path, dict[str, bytes]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert job.main(flags(tiny_digits_model, tmp_path / "audit", "--actors", "2")) == 0
    assert "2 actors on 1 node, each 0.5 CPU, 1 thread\n" in capsys.readouterr().out
    assert files_of(tmp_path / "audit") == undisturbed[1]


def test_job_fills_an_audit(undisturbed: tuple[Path, dict[str, bytes]]) -> None:
    out, _ = undisturbed
    found = verify(out, redecode=redecoder(out))
    assert found.ok, found.problems
    assert (found.images, found.pairs) == (LIMIT, LIMIT * 9)
    opened = clarity.read_audit(out)
    assert opened.complete
    assert [span["stop"] - span["start"] for span in opened.plan.shards] == [7] * 5 + [5]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["pairs"] == LIMIT * 9
    assert summary["problems"] == []
    assert {"read", "search", "pictures"} <= set(summary["seconds_by_stage"])
    assert sorted(path.name for path in out.iterdir()) == [
        "_SUCCESS", "_commits", "codes", "counterfactuals", "model", "plan.json", "summary.json",
    ]  # fmt: skip
    commit = opened.commits[0]
    assert {"engine", "device", "threads", "seconds"} <= set(commit)


def test_job_reports_a_finished_audit(
    job: Any, tiny_digits_model: Path, undisturbed: tuple[Path, dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, files = undisturbed
    before = (out / "summary.json").stat().st_mtime_ns
    assert job.main(flags(tiny_digits_model, out)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("already complete")
    assert str(out) in printed
    assert (out / "summary.json").stat().st_mtime_ns == before
    assert files_of(out) == files


def test_job_ends_alike_on_a_new_and_on_a_finished_audit(
    job: Any, tiny_digits_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--limit", "4", "--max-steps", "3", "--min-target-prob", "0.4"]
    argv = ["--model", str(tiny_digits_model), "--out", str(tmp_path / "audit"), *few]
    ends = []
    for first in ("4 images of split test, 1 of 1 shard to do", "already complete"):
        assert job.main(argv) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(first)
        ends.append(lines[next(i for i, line in enumerate(lines) if line.startswith("model ")) :])
    assert ends[0] == ends[1] and ends[0][-1] == f"report     {tmp_path / 'audit/report.html'}"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--max-steps", "26"], "another plan: --max-steps: 25 in the audit, 26 in this run"),
        (["--limit", "39"], "another plan: --data: 40 images in the audit, 39 in this run. Ask"),
    ],
)
def test_job_refuses_another_plan(
    job: Any,
    tiny_digits_model: Path,
    undisturbed: tuple[Path, dict[str, bytes]],
    more: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert job.main(flags(tiny_digits_model, undisturbed[0], *more)) == 2
    assert named in capsys.readouterr().err


def test_job_keeps_attributes_and_refuses_to_keep_others_in_the_same_audit(
    job: Any, tiny_digits_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from clarity.attributes import AttributeHeads
    from clarity.model import load_model, save_model

    model, out = load_model(tiny_digits_model), tmp_path / "audit"
    model.heads = AttributeHeads(("thin", "tall", "old"), 5)
    save_model(model, tmp_path / "model")
    argv = flags(tmp_path / "model", out, "--keep", "old", "thin")
    assert job.main(argv) == 0
    assert "keeping    old, thin, as far as the code knows them" in capsys.readouterr().out
    assert verify(out, redecode=redecoder(out)).ok
    pairs = clarity.read_audit(out).counterfactuals.to_table()
    assert pairs["kept_probs_final"].type.list_size == 2 and not pairs["kept_probs_final"].null_count
    assert job.main([*argv, "tall"]) == 2
    assert "plan: --keep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "/x"], "ships its own"),
        (["--split", "middle"], "--split: expected one of train, test, all"),
        (["--keep", "Male"], "--keep: this model has no heads for attributes"),
        (["--trace", "-5"], "--trace: expected at least 0 images, got -5"),
        (["--actors", "99"], "--actors 99 cannot be scheduled"),
        (["--gpus-per-actor", "1"], "no node offers that many GPUs"),
    ],
)
def test_job_refuses_what_cannot_be_done(
    job: Any, tiny_digits_model: Path, tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.main([*flags(tiny_digits_model, tmp_path / "audit"), *argv]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_job_says_what_it_would_do(
    job: Any, tiny_digits_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.main(flags(tiny_digits_model, tmp_path / "audit", "--dry-run")) == 0
    printed = capsys.readouterr().out
    for line in ("40 images of split test", "pairs      360", "shards     6 of 7", "pairs/s", "1 actor on 1 node"):
        assert line in printed
    assert not (tmp_path / "audit").exists()


def test_job_measures_a_slow_method_before_it_cuts_shards(
    job: Any, tiny_digits_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from clarity.classifiers import ImageEnsemble
    from clarity.model import load_model, save_model

    model = load_model(tiny_digits_model)
    model.image_ensemble = ImageEnsemble(model.ensemble.config, model.vae.config).eval()
    save_model(model, tmp_path / "model", card={})
    argv = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "audit"), "--limit", "5", "--max-steps", "2"]
    assert job.main([*argv, "--method", "revise_e", "--targets", "1", "2", "--no-report"]) == 0
    opened = clarity.read_audit(tmp_path / "audit")
    assert opened.plan.model["sums"].keys() == {"image_ensemble.safetensors"}
    assert 1 <= opened.plan.shards[0]["stop"] <= 5
    # The same command takes the shards as they are, whatever it would measure now.
    assert job.main([*argv, "--method", "revise_e", "--targets", "1", "2", "--no-report"]) == 0
    assert "already complete" in capsys.readouterr().out


def test_job_keeps_codes_alone_and_traces(job: Any, tiny_digits_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "audit"
    assert job.main(flags(tiny_digits_model, out, "--images", "none", "--trace", "9", "--targets", "3")) == 0
    opened = clarity.read_audit(out)
    rows = opened.counterfactuals.to_table()
    assert rows["x_cf"].null_count == len(rows)
    assert clarity.decode(opened, rows).shape == (len(rows), 1, 28, 28)
    assert opened.traces is not None
    assert len(opened.traces.to_table()["image_id"].unique()) <= 9
    assert verify(out, redecode=redecoder(out)).ok


def test_job_refuses_a_mixture_of_engines(
    job: Any, tiny_digits_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "audit"
    few = flags(tiny_digits_model, out, "--limit", "14")
    assert job.main([*few, "--engine", "plain"]) == 0
    (out / "_commits/shard-00000.json").unlink()
    assert job.main([*few, "--engine", "batched"]) == 2
    assert "engine: expected plain, which searched the shards before, got batched" in capsys.readouterr().err
    assert len(clarity.read_audit(out).commits) == 1
    assert job.main(few) == 0, "auto goes on with the engine of the audit"
    assert set(json.loads((out / "summary.json").read_text())["engines"]) == {"plain"}
    assert verify(out, redecode=redecoder(out)).ok


def test_verify_job_tells_intact_from_damaged_and_incomplete(
    undisturbed: tuple[Path, dict[str, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = load_job("verify")
    out = tmp_path / "audit"
    shutil.copytree(undisturbed[0], out)
    assert job.main([str(out)]) == 0
    assert capsys.readouterr().out.endswith("\nintact\n")
    commit = out / "_commits/shard-00000.json"
    kept = commit.read_text()
    commit.unlink()
    assert job.main([str(out)]) == 1
    printed = capsys.readouterr().out
    assert printed.endswith("incomplete, 5 of 6 shards: run jobs/explain_all.py again\n")
    assert "problem" not in printed and "DAMAGED" not in printed
    commit.write_text(kept)
    path = out / "codes/shard-00002.parquet"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(bytes(data))
    assert job.main([str(out)]) == 1
    assert capsys.readouterr().out.endswith("DAMAGED: run jobs/explain_all.py again after --repair\n")
    assert job.main([str(out), "--repair"]) == 1
    assert sorted(clarity.read_audit(out).commits) == [0, 1, 3, 4, 5]
    assert job.main([str(tmp_path)]) == 2


def test_small_job_runs_without_ray_resumes_and_writes_the_same_files(
    tiny_digits_model: Path, undisturbed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    program = """
import sys, weakref
import explain_all
from clarity import data, planning, worker

def list_images(dataset, listed=data.list_images):
    listing = listed(dataset)
    listings.append(weakref.ref(listing))
    return listing

def select_images(*conditions, chosen=planning.select_images):
    listing, only = chosen(*conditions)
    listings.append(weakref.ref(listing))
    return listing, only

def interrupted(batch, work, write=worker.write_shard, seen=[]):
    seen.append(batch)
    held.extend(listing() for listing in listings if listing() is not None)
    if len(seen) == 3:
        raise KeyboardInterrupt
    return write(batch, work)

listings, held = [], []
data.list_images, planning.select_images, worker.write_shard = list_images, select_images, interrupted
codes = [explain_all.main([*sys.argv[1:], "--dry-run"]), *(explain_all.main(sys.argv[1:]) for _ in range(2))]
print(codes, "ray" in sys.modules, len(listings), held)
"""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'jobs'}"
    argv = [sys.executable, "-c", program, *flags(tiny_digits_model, tmp_path)]
    run = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=300)
    assert run.stdout.splitlines()[-1] == "[0, 1, 0] False 6 []", run.stderr
    assert "4 of 6 shards to do; in this process" in run.stdout
    assert "interrupted; the same command resumes" in run.stderr
    assert files_of(tmp_path) == undisturbed[1]
