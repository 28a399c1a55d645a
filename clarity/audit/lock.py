"""The lock of an audit directory: one run at a time, on a disk or in an object store."""

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
from typing import Any

from clarity import storage

#: A lease is renewed this often, and may be taken over after this long without a renewal.
RENEW_S = 5.0
STALE_S = 30.0
#: After two runs wrote their lease at the same moment, the later write has landed by then.
SETTLE_S = 2.0


class AuditBusy(ValueError):
    """Another run is at work in the audit directory."""


def take_lock(uri: str) -> "FileLock | Lease":
    """Lock an audit directory, else AuditBusy: by the kernel where the file system can, else by a lease."""
    if storage.is_remote(uri):
        return Lease(uri)
    try:
        return storage.attempt("lock", uri, lambda: FileLock(uri))
    except storage.StorageError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return Lease(uri)


class FileLock:
    """A lock that the kernel releases when its holder dies, however it dies."""

    def __init__(self, uri: str) -> None:
        self.path = os.path.join(uri, "_lock")
        self.run = secrets.token_hex(6)
        while True:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(self.file), os.stat(self.path)):
                    break
            except BlockingIOError:
                holder = parse_holder(os.pread(self.file, 4096, 0))
                os.close(self.file)
                raise busy(uri, holder) from None
            except FileNotFoundError:
                pass
            except OSError:
                os.close(self.file)
                raise
            os.close(self.file)  # its holder removed it between our opening and our locking
        os.ftruncate(self.file, 0)
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.pwrite(self.file, json.dumps(holder_of(self.run)).encode(), 0)

    @property
    def lost(self) -> bool:
        """Whether somebody removed the file and another run made its own."""
        try:
            return not os.path.samestat(os.fstat(self.file), os.stat(self.path))
        except OSError:
            return False

    def release(self) -> None:
        """Unlock the directory."""
        if not self.lost:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        os.close(self.file)


class Lease:
    """A lock file that its holder renews, for object stores and file systems without locks.

    Whoever waits counts the time since the last renewal that it saw, so clocks need not agree. Two runs that both
    believe they hold it still write the same bytes under the same names.
    """

    def __init__(self, uri: str) -> None:
        self.path, self.run, self.renewals, self.lost = storage.join(uri, "_lock"), secrets.token_hex(6), 0, False
        seen = self.read()
        end = time.monotonic() + STALE_S
        while seen and time.monotonic() < end:
            time.sleep(min(RENEW_S / 2, 1.0))
            now = self.read()
            if now and now != seen:
                raise busy(uri, now)
            seen = now
        self.write()
        time.sleep(SETTLE_S)
        if (now := self.read()) and now["run"] != self.run:
            raise busy(uri, now)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.renew, daemon=True)
        self.thread.start()

    def renew(self) -> None:
        """Write the lease again and again, until it is released or another run has written its own."""
        while not self.stopped.wait(RENEW_S):
            with contextlib.suppress(OSError):  # a store that fails for a while: the next renewal tells
                now = self.read()
                if now and now["run"] != self.run:
                    self.lost = True
                    return
                self.renewals += 1
                self.write()

    def read(self) -> dict[str, Any]:
        """Whoever holds the lease; empty where nobody does."""
        try:
            return parse_holder(storage.read_bytes(self.path))
        except storage.StorageError as error:
            if error.errno == errno.ENOENT:
                return {}
            raise

    def write(self) -> None:
        """Write the lease in this run's name."""
        storage.write_bytes(self.path, json.dumps(holder_of(self.run) | {"renewals": self.renewals}).encode())

    def release(self) -> None:
        """Unlock the directory."""
        self.stopped.set()
        self.thread.join()
        if not self.lost:
            storage.delete(self.path)


def holder_of(run: str) -> dict[str, Any]:
    """What a lock file says about its holder."""
    return {"run": run, "host": socket.gethostname(), "pid": os.getpid()}


def parse_holder(content: bytes) -> dict[str, Any]:
    """The holder that a lock file names; empty where it is torn."""
    with contextlib.suppress(ValueError):
        holder = json.loads(content)
        if isinstance(holder, dict) and "run" in holder:
            return holder
    return {}


def busy(uri: str, holder: Mapping[str, Any]) -> AuditBusy:
    """The error that names the run at work."""
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    return AuditBusy(
        f"out: another run ({who}) is at work there, in {storage.display(uri)}: wait for its end, stop it, or choose "
        "another directory"
    )
