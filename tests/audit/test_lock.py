"""Locks of the kernel and leases: one run at a time."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from clarity import storage
from clarity.audit import lock
from clarity.audit.commits import claim
from clarity.audit.lock import AuditBusy, FileLock, Lease, take_lock
from clarity.audit.plan import Plan

ROOT = Path(__file__).parents[2]


HOLD = """
import sys, time
from clarity.audit.lock import FileLock
lock = FileLock(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_claim_is_refused_while_another_process_holds_it(plan: Plan, filled: str, model_dir: str) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, filled], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with pytest.raises(AuditBusy, match=f"process {holder.pid}"), claim(filled, plan, model_dir):
            pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with claim(filled, plan, model_dir) as held:
        assert held.complete


@pytest.fixture
def quick_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_S", 0.05)
    monkeypatch.setattr(lock, "STALE_S", 0.4)
    monkeypatch.setattr(lock, "SETTLE_S", 0.05)


def write_holder(uri: str) -> None:
    holder = {"run": "other", "host": "elsewhere", "pid": 1}
    storage.write_bytes(storage.join(uri, "_lock"), json.dumps(holder).encode())


def test_lease_is_refused_while_its_holder_renews_it(quick_renewals: None, tmp_path: Path) -> None:
    first = Lease(str(tmp_path))
    with pytest.raises(AuditBusy):
        Lease(str(tmp_path))
    first.release()
    second = Lease(str(tmp_path))
    second.release()
    assert not (tmp_path / "_lock").exists()


def test_lease_is_taken_over_from_a_silent_holder(quick_renewals: None, tmp_path: Path) -> None:
    write_holder(str(tmp_path))
    start = time.monotonic()
    Lease(str(tmp_path)).release()
    assert time.monotonic() - start > 0.4


def test_lease_notices_that_it_was_taken_over(quick_renewals: None, tmp_path: Path) -> None:
    held = Lease(str(tmp_path))
    write_holder(str(tmp_path))
    held.thread.join(5)
    assert held.lost
    held.release()
    assert json.loads((tmp_path / "_lock").read_text())["run"] == "other"


@pytest.mark.parametrize("kind", [Lease, FileLock])
def test_lock_of_those_that_begin_at_once_is_held_by_one(
    kind: Any, quick_renewals: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "SETTLE_S", 0.5)
    monkeypatch.setattr(lock, "STALE_S", 10.0)
    locks: list[Any] = []
    start = threading.Barrier(4)

    def take() -> None:
        start.wait()
        with contextlib.suppress(AuditBusy):
            locks.append(kind(str(tmp_path)))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(locks) == 1
    locks[0].release()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EACCES])
def test_lease_serves_where_a_file_system_has_no_locks_and_only_there(
    code: int, quick_renewals: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    if code == errno.ENOLCK:
        held = take_lock(str(tmp_path))
        assert isinstance(held, Lease)
        held.release()
    else:
        with pytest.raises(storage.StorageError, match=r"cannot lock .*: Permission denied: give"):
            take_lock(str(tmp_path))
