"""Read and atomically write files of this machine. Knows nothing of URIs and stores."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable
from typing import Any


def read_local(path: str) -> bytes:
    """The content of a regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for its writer
    with open(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.ENODEV, "no regular file", path)
        return file.read()


def write_local(path: str, data: bytes, scratch: str | None) -> None:
    """Temporary file, fsync, rename, fsync of the directory."""
    directory = os.path.dirname(path)
    if scratch is None:
        os.makedirs(directory, exist_ok=True)
    temporary = os.path.join(scratch or directory, f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        unless_missing(os.unlink, temporary)
        raise
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # so that the name survives a power cut too
    finally:
        os.close(descriptor)


def unless_missing(remove: Callable[[str], Any], path: str) -> None:
    """Remove a path if it exists."""
    with contextlib.suppress(FileNotFoundError):
        remove(path)
