"""Clusters that start without workers: Ray's own autoscaler brings them, as processes of this machine.

The head offers no CPU, as in cluster.yaml; the kind of node that may come offers CPUs and what the scheduler takes for
a GPU. Nothing here has a GPU: the planted job below asks for one and computes without.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent))
from jobfiles import load_job
from test_submit import head_of, submit

WORKER = {"CPU": 2, "GPU": 1, "object_store_memory": 200_000_000}


@pytest.fixture
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which `ray job` reaches a head that may bring two workers."""
    with head_of("--num-cpus=0", "--num-gpus=0", autoscaler={"worker": {"resources": WORKER, "max_workers": 2}}) as env:
        yield env


def on_cpus(argv: list[str]) -> int:
    """The job, whose actors hold a GPU in the scheduler's books and do not use it."""
    job = load_job("explain_all")
    base = job.ExplainShard

    class OnCPU(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, device: str, **options: Any) -> None:
            assert device == "cuda"
            super().__init__(*args, device="cpu", **options)

    job.ExplainShard = OnCPU
    return int(job.main(argv))


def flags(model: Path, out: Path) -> list[str]:
    return ["--model", str(model), "--out", str(out), "--limit", "12", "--shard-rows", "3", "--no-report"]


def test_job_brings_gpu_workers_from_zero(cluster: dict[str, str], tiny_digits_model: Path, tmp_path: Path) -> None:
    import clarity

    out = tmp_path / "audit"
    # What `ray up` leaves in the home directory of the head.
    shutil.copy(cluster["AUTOSCALER_FILE"], Path(cluster["HOME"]) / "ray_bootstrap_config.yaml")
    run = submit(cluster, "python", "tests/jobs/test_autoscaler.py", *flags(tiny_digits_model, out))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 actors on 2 nodes, each 1 GPU" in run.stdout
    assert (out / "_SUCCESS").exists()
    assert clarity.read_audit(out).counterfactuals.count_rows() == 12 * 9


@pytest.mark.slow
def test_job_is_told_how_many_nodes_may_come(cluster: dict[str, str], tiny_digits_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "audit"
    argv = ["jobs/explain_all.py", *flags(tiny_digits_model, out), "--gpus-per-actor", "0"]
    blind = submit(cluster, *argv)
    assert blind.returncode != 0
    assert "--max-nodes" in blind.stdout
    run = submit(cluster, *argv, "--max-nodes", "2")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "the autoscaler is asked for one" in run.stdout
    assert json.loads((out / "summary.json").read_text())["resources"]["num_nodes"] == 2


@pytest.mark.slow
def test_training_brings_workers_from_zero(tmp_path: Path) -> None:
    out = tmp_path / "model"
    argv = ["jobs/train.py", "--out", str(out), "--vae-epochs", "1", "--vae-min-updates", "40"]
    argv += ["--ensemble-epochs", "1", "--ensemble-min-updates", "100", "--num-members", "4"]
    kinds = {"worker": {"resources": WORKER | {"GPU": 0}, "max_workers": 2}}
    with head_of("--num-cpus=0", "--num-gpus=0", autoscaler=kinds) as env:
        shutil.copy(env["AUTOSCALER_FILE"], Path(env["HOME"]) / "ray_bootstrap_config.yaml")
        run = submit(env, *argv)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (out / "model.json").exists()


if __name__ == "__main__":
    sys.exit(on_cpus(sys.argv[1:]))
