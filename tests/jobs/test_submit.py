"""`ray job submit`, end to end: a head on loopback with token authentication, the job uploaded, the audit read."""

from __future__ import annotations

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

ROOT = Path(__file__).parent.parent.parent


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@contextlib.contextmanager
def head_of(*offers: str, autoscaler: dict[str, Any] | None = None) -> Iterator[dict[str, str]]:
    """A head with token authentication while the block runs; yields the environment in which `ray job` reaches it.

    ``autoscaler``: the kinds of node that Ray's autoscaler may start, as processes of this machine; its description
    lies where AUTOSCALER_FILE of the environment says.
    """
    home, temp = (tempfile.mkdtemp(prefix=prefix, dir="/tmp") for prefix in ("h-", "r-"))
    binaries = Path(sys.executable).parent
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"HOME": home, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    env["PATH"] = f"{binaries}:{env['PATH']}"
    subprocess.run([binaries / "ray", "get-auth-token", "--generate"], env=env, check=True, capture_output=True)
    port, dashboard = free_port(), free_port()
    command = [str(binaries / "ray"), "start", "--head", "--block", f"--port={port}", *offers]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    # Ports of its own: the job agent does not start where another Ray on this machine holds the usual one.
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    command += ["--object-store-memory=200000000", f"--temp-dir={temp}"]
    env |= {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    starting = dict(env)
    if autoscaler is not None:
        description = describe_autoscaler(autoscaler, port)
        env["AUTOSCALER_FILE"] = str(Path(home) / "autoscaler.yaml")
        Path(env["AUTOSCALER_FILE"]).write_text(json.dumps(description))
        command.append(f"--autoscaling-config={env['AUTOSCALER_FILE']}")
        head = description["provider"]["head_node_id"]
        starting |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1"}
        starting |= {"RAY_CLOUD_INSTANCE_ID": head, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head}
    with open(Path(home) / "head.log", "w") as log:
        process = subprocess.Popen(command, env=starting, stdout=log, stderr=log, start_new_session=True)
    try:
        yield env
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # SIGTERM would wait half a minute for jobs that have ended
        process.wait(120)
        shutil.rmtree(temp, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)


def describe_autoscaler(kinds: dict[str, Any], port: int) -> dict[str, Any]:
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
        "max_workers": sum(kind["max_workers"] for kind in kinds.values()),
        "provider": provider,
        "available_node_types": head | {name: {"node_config": {}, **kind} for name, kind in kinds.items()},
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
    """The environment in which `ray job` reaches a head of two CPUs; the head ends with the tests."""
    with head_of("--num-cpus=2") as env:
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


def test_submit_explains_to_the_end(head: dict[str, str], tiny_digits_model: Path, tmp_path: Path) -> None:
    import clarity

    out = tmp_path / "audit"
    # The file itself is the entry point: its run bit and its first line survive the upload.
    run = submit(head, "jobs/explain_all.py", "--model", str(tiny_digits_model), "--out", str(out), "--limit", "6")
    assert run.returncode == 0, run.stdout + run.stderr
    assert (out / "_SUCCESS").exists()
    assert clarity.read_audit(out).counterfactuals.count_rows() == 6 * 9


def test_submit_refuses_a_relative_path(head: dict[str, str], tiny_digits_model: Path) -> None:
    run = submit(head, "python", "jobs/explain_all.py", "--model", str(tiny_digits_model), "--out", "audit")
    assert run.returncode != 0
    assert "absolute" in run.stdout + run.stderr


def test_submit_needs_the_token(head: dict[str, str], tmp_path: Path) -> None:
    stranger: dict[str, Any] = {key: value for key, value in head.items() if key != "RAY_AUTH_MODE"}
    stranger["HOME"] = str(tmp_path)
    command = [str(Path(sys.executable).parent / "ray"), "job", "list"]
    run = subprocess.run(command, env=stranger, capture_output=True, text=True, timeout=60)
    assert run.returncode != 0
    assert "token" in run.stdout + run.stderr
