"""`ray job submit`, end to end: a head on loopback with token authentication, the job uploaded, the audit read."""

from __future__ import annotations

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

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """The environment in which `ray job` reaches a head of two CPUs; the head ends with the tests."""
    home, temp = (tempfile.mkdtemp(prefix=prefix, dir="/tmp") for prefix in ("h-", "r-"))
    binaries = Path(sys.executable).parent
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"HOME": home, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    env["PATH"] = f"{binaries}:{env['PATH']}"
    subprocess.run([binaries / "ray", "get-auth-token", "--generate"], env=env, check=True, capture_output=True)
    dashboard = free_port()
    command = [str(binaries / "ray"), "start", "--head", "--block", f"--port={free_port()}", "--num-cpus=2"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    # Ports of its own: the job agent does not start where another Ray on this machine holds the usual one.
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    command += ["--object-store-memory=200000000", f"--temp-dir={temp}"]
    with open(Path(home) / "head.log", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        yield env | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(120)
        shutil.rmtree(temp, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)


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
