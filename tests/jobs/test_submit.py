"""`ray job submit`, end to end: a head on loopback with token authentication, whose workers Ray's autoscaler brings.

The head offers no CPU, as in cluster.yaml; the kind of node that may come, a process of this machine, offers CPUs and
what the scheduler takes for a GPU. Nothing here has a GPU: the planted job below asks for one and computes without.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent))
from jobfiles import load_job

from clarity import planning

ROOT = Path(__file__).parent.parent.parent
WORKER = {"CPU": 2, "GPU": 1, "object_store_memory": 200_000_000}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@contextlib.contextmanager
def head_that_scales(worker: dict[str, Any]) -> Iterator[dict[str, str]]:
    """A head with token authentication while the block runs, to which two nodes that offer ``worker`` may come.

    Yields the environment in which `ray job` reaches it; the autoscaler's description is its AUTOSCALER_FILE.
    """
    home, temp = (tempfile.mkdtemp(prefix=prefix, dir="/tmp") for prefix in ("h-", "r-"))
    binaries = Path(sys.executable).parent
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"HOME": home, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    env["PATH"] = f"{binaries}:{env['PATH']}"
    subprocess.run([binaries / "ray", "get-auth-token", "--generate"], env=env, check=True, capture_output=True)
    port, dashboard = free_port(), free_port()
    command = [str(binaries / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=0", "--num-gpus=0"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    # Ports of its own: the job agent does not start where another Ray on this machine holds the usual one.
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    command += ["--object-store-memory=200000000", f"--temp-dir={temp}"]
    env |= {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    description = describe_autoscaler(worker, port)
    env["AUTOSCALER_FILE"] = str(Path(home) / "autoscaler.yaml")
    Path(env["AUTOSCALER_FILE"]).write_text(json.dumps(description))
    command.append(f"--autoscaling-config={env['AUTOSCALER_FILE']}")
    node = description["provider"]["head_node_id"]
    starting = env | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1"}
    starting |= {"RAY_CLOUD_INSTANCE_ID": node, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node}
    with open(Path(home) / "head.log", "w") as log:
        process = subprocess.Popen(command, env=starting, stdout=log, stderr=log, start_new_session=True)
    try:
        yield env
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # SIGTERM would wait half a minute for jobs that have ended
        process.wait(120)
        shutil.rmtree(temp, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)


def describe_autoscaler(worker: dict[str, Any], port: int) -> dict[str, Any]:
    """As cluster.yaml, for the provider with which Ray tests its autoscaler; a head without CPUs and no workers yet."""
    from ray._private.services import node_ip_address_from_perspective
    from ray.autoscaler._private.fake_multi_node import node_provider

    provider = {
        # By its class: the wheel lacks the defaults that go with its name.
        "type": "external",
        "module": f"{node_provider.__name__}.{node_provider.FakeMultiNodeProvider.__name__}",
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "gcs_address": f"{node_ip_address_from_perspective()}:{port}",
        "head_node_id": node_provider.FAKE_HEAD_NODE_ID,
        "launch_multiple": True,
    }
    head = {"ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
    return {
        "cluster_name": "test",
        "max_workers": 2,
        "provider": provider,
        "available_node_types": head | {"worker": {"resources": worker, "node_config": {}, "max_workers": 2}},
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1,
        "idle_timeout_minutes": 5,
        "file_mounts_sync_continuously": False,
        **{key: [] for key in ("head_start_ray_commands", "worker_start_ray_commands", "initialization_commands")},
        **{key: [] for key in ("setup_commands", "head_setup_commands", "worker_setup_commands")},
        **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        **{key: {} for key in ("auth", "docker", "file_mounts")},
    }


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """The environment in which `ray job` reaches a head that may bring two workers; it ends with the tests."""
    with head_that_scales(WORKER) as env:
        yield env


def submit(env: dict[str, str], *entrypoint: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, tried again while the head's job agent is still starting (10 to 20 seconds)."""
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", str(ROOT), "--", *entrypoint]
    for _ in range(30):
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        if not any(words in run.stdout + run.stderr for words in ("No available agent", "Failed to connect")):
            break
        time.sleep(2)
    return run


def on_cpus(argv: list[str]) -> int:
    """The job, whose actors hold a GPU in the scheduler's books and do not use it."""
    job = load_job("explain_all")
    base = job.ExplainShard

    class OnCPU(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, device: str, **options: Any) -> None:
            assert device == "cuda"
            super().__init__(*args, device="cpu", **options)

    job.ExplainShard = OnCPU
    planning.START_BYTES = 1  # a dozen digits are worth two actors
    return int(job.main(argv))


def flags(model: Path, out: Path) -> list[str]:
    return ["--model", str(model), "--out", str(out), "--limit", "12", "--shard-rows", "3", "--no-report"]


def test_job_brings_gpu_workers_from_zero(head: dict[str, str], tiny_digits_model: Path, tmp_path: Path) -> None:
    import clarity

    out = tmp_path / "audit"
    # What `ray up` leaves in the home directory of the head.
    shutil.copy(head["AUTOSCALER_FILE"], Path(head["HOME"]) / "ray_bootstrap_config.yaml")
    run = submit(head, "python", "tests/jobs/test_submit.py", *flags(tiny_digits_model, out))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 actors on 2 nodes, each 1 GPU" in run.stdout
    assert (out / "_SUCCESS").exists()
    assert clarity.read_audit(out).counterfactuals.count_rows() == 12 * 9


def test_submit_refuses_a_relative_path(head: dict[str, str], tiny_digits_model: Path) -> None:
    # The file itself is the entry point: its run bit and its first line survive the upload.
    run = submit(head, "jobs/explain_all.py", "--model", str(tiny_digits_model), "--out", "audit")
    assert run.returncode != 0
    assert "absolute" in run.stdout + run.stderr


def test_submit_needs_the_token(head: dict[str, str], tmp_path: Path) -> None:
    stranger: dict[str, Any] = {key: value for key, value in head.items() if key != "RAY_AUTH_MODE"}
    stranger["HOME"] = str(tmp_path)
    command = [str(Path(sys.executable).parent / "ray"), "job", "list"]
    run = subprocess.run(command, env=stranger, capture_output=True, text=True, timeout=60)
    assert run.returncode != 0
    assert "token" in run.stdout + run.stderr


@pytest.mark.slow
def test_job_is_told_how_many_nodes_may_come(tiny_digits_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "audit"
    argv = ["jobs/explain_all.py", *flags(tiny_digits_model, out), "--gpus-per-actor", "0"]
    with head_that_scales(WORKER) as env:
        blind = submit(env, *argv)
        assert blind.returncode != 0
        assert "--max-nodes" in blind.stdout
        run = submit(env, *argv, "--max-nodes", "2")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "asking the autoscaler for one" in run.stdout
    assert json.loads((out / "summary.json").read_text())["resources"]["num_nodes"] == 2


@pytest.mark.slow
def test_training_brings_workers_from_zero(tmp_path: Path) -> None:
    out = tmp_path / "model"
    argv = ["jobs/train.py", "--out", str(out), "--vae-epochs", "1", "--vae-min-updates", "40"]
    argv += ["--ensemble-epochs", "1", "--ensemble-min-updates", "100", "--num-members", "4"]
    with head_that_scales(WORKER | {"GPU": 0}) as env:
        shutil.copy(env["AUTOSCALER_FILE"], Path(env["HOME"]) / "ray_bootstrap_config.yaml")
        run = submit(env, *argv)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (out / "model.json").exists()


if __name__ == "__main__":
    sys.exit(on_cpus(sys.argv[1:]))
