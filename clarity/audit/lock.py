"""The lock of an audit directory: one run at a time, on a disk or in an object store."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clarity import storage

#: A claim kept as an object is renewed this often, and taken from its owner after this long without a renewal.
BEAT_S = 5.0
STALE_S = 30.0
SETTLE_S = 2.0


class AuditBusy(ValueError):
    """Another run is at work in the audit directory."""


def take_lock(uri: str) -> FileLock | BeatLock:
    """Lock an audit directory: by the kernel where it can, else by a file that is renewed."""
    if storage.is_remote(uri):
        return BeatLock(uri)
    try:
        return FileLock(uri)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise storage.StorageError(
                f"cannot write {storage.display(uri)}: {os.strerror(error.errno or 0)}: choose another --out",
                code=error.errno,
            ) from None
        return BeatLock(uri)


class FileLock:
    """A lock that the kernel drops when its holder dies, however it dies."""

    def __init__(self, uri: str) -> None:
        self.path = os.path.join(uri, "_lock")
        while True:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                text = os.pread(self.file, 4096, 0)
                os.close(self.file)
                raise _busy(uri, _parsed(text)) from None
            except OSError:
                os.close(self.file)
                raise
            try:
                # Its holder may have removed it between our opening and our locking.
                if os.fstat(self.file).st_ino == os.stat(self.path).st_ino:
                    break
            except FileNotFoundError:
                pass
            os.close(self.file)
        self.owner = new_owner()
        os.ftruncate(self.file, 0)
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.pwrite(self.file, json.dumps(self.owner).encode(), 0)

    @property
    def lost(self) -> bool:
        """Whether another run holds the path, because somebody removed the file under this one."""
        try:
            return not os.path.samestat(os.fstat(self.file), os.stat(self.path))
        except OSError:
            return False

    def release(self) -> None:
        """Give the directory free."""
        if not self.lost:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        os.close(self.file)


class BeatLock:
    """A claim that its holder renews, where no lock of the kernel reaches: the object stores.

    Time is counted by whoever waits, in renewals not seen, so that clocks may disagree or go back. Two runs that both
    believe to hold it still write the same bytes under the same names.
    """

    def __init__(self, uri: str) -> None:
        self.uri, self.path, self.owner, self.lost = uri, storage.join(uri, "_lock"), new_owner(), False
        seen = self._read()
        end = time.monotonic() + STALE_S
        while seen and not _is_dead(seen) and time.monotonic() < end:
            time.sleep(min(BEAT_S / 2, 1.0))
            now = self._read()
            if now and now != seen:
                raise _busy(uri, now)
            seen = now
        self._write()
        time.sleep(SETTLE_S)  # another that began at the same moment has written by then: the last one holds it
        if (now := self._read()) and now["run"] != self.owner["run"]:
            raise _busy(uri, now)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def _beat(self) -> None:
        while not self.stopped.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a store that fails for a while: the next beat tells
                now = self._read()
                if now and now["run"] != self.owner["run"]:
                    self.lost = True
                    return
                self.owner["beat"] += 1
                self._write()

    def _read(self) -> dict[str, Any]:
        try:
            return _parsed(storage.read_bytes(self.path)) if storage.exists(self.path) else {}
        except storage.StorageError as error:
            if error.errno == errno.ENOENT:  # released between the two questions
                return {}
            raise

    def _write(self) -> None:
        storage.write_bytes(self.path, json.dumps(self.owner).encode())

    def release(self) -> None:
        """Give the directory free."""
        self.stopped.set()
        self.thread.join()
        if not self.lost:
            storage.delete(self.path)


def new_owner() -> dict[str, Any]:
    """This process, as a lock names it."""
    return {
        "run": secrets.token_hex(6),
        "host": socket.gethostname(),
        "machine": _text("/proc/sys/kernel/random/boot_id"),
        "processes": os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else "",
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "beat": 0,
    }


def _is_dead(owner: Mapping[str, Any]) -> bool:
    """Whether the owner was a process of this very machine that is gone; its number may have another bearer now."""
    mine = new_owner()
    here = all(mine[name] and mine[name] == owner.get(name) for name in ("host", "machine", "processes"))
    return bool(here and _started(owner["pid"]) != owner["started"])


def _started(pid: int) -> str:
    """When a process started, as its system counts; empty when it is gone."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _parsed(text: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        owner = json.loads(text)
        if isinstance(owner, dict) and "run" in owner:
            return owner
    return {}


def _busy(uri: str, owner: Mapping[str, Any]) -> AuditBusy:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
    return AuditBusy(
        f"--out {storage.display(uri)}: another run ({who}) is at work there; wait for its end, or stop it, or choose "
        "another --out"
    )
