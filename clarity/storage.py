"""Where bytes lie: URIs of local files and of object stores, read, listed, and written whole or not at all.

Knows paths, atomic writes, bounded retries. Does not know what the bytes mean.

A URI is a local path, or ``s3://bucket/key[?endpoint_url=http://host:port&region=name]``. Credentials come from the
standard chain (environment, ~/.aws, the machine's role), never from a URI.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

URI = str | Path
T = TypeVar("T")

ATTEMPTS = 5
FIRST_PAUSE_S = 0.2
STREAM_BYTES = 1 << 20
OPTIONS = ("endpoint_url", "region")

_QUERY = re.compile(r"\?([A-Za-z][\w-]*=[^&?]*(?:&[A-Za-z][\w-]*=[^&?]*)*)$")
_SECRET = re.compile(
    r"(?i)\b(?:AKIA|ASIA)[A-Z0-9]{12,}|(?<=//)[^/@\s]+(?=@)|(?<=[?&])[^=&\s]*(?:key|secret|token|password|signature)[^&\s]*"
)
_TRANSIENT_ERRNO = {errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED}
_TRANSIENT_TEXT = re.compile(
    r"(?i)SLOW_?DOWN|SERVICE_?UNAVAILABLE|INTERNAL_?(FAILURE|ERROR)|THROTTL|REQUEST_?TIMEOUT|NETWORK_CONNECTION"
    r"|curlCode|timed? ?out|connection reset|HTTP status 5\d\d|HTTP response code:? 5\d\d"
)
_REMEDY = {
    errno.ENOSPC: "free space on that disk, or choose another place",
    errno.EDQUOT: "free space in that quota, or choose another place",
    errno.EROFS: "that file system is read-only: choose another place",
    errno.EACCES: "give this user the right to it, or choose another place",
    errno.EPERM: "give this user the right to it, or choose another place",
    errno.ENOENT: "check the path, and that it is mounted on this machine",
    errno.ENOTDIR: "a file stands where a directory is expected: check the path",
    errno.EISDIR: "a directory stands where a file is expected: check the path",
    errno.EEXIST: "a file stands where a directory is expected: check the path",
    errno.ELOOP: "its links go in circles: mend the link",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


class StorageError(OSError):
    """A place could not be read or written; the message says which, why, and what to do.

    ``reason`` is the why alone, the same wherever the data lies. ``transient`` tells a store that failed for the moment
    (and at every retry) from an answer that will not change.
    """

    def __init__(self, message: str, reason: str = "", code: int | None = None, transient: bool = False) -> None:
        super().__init__(message)
        self.reason = reason or message
        self.errno = code
        self.transient = transient

    def __reduce__(self) -> tuple[Any, ...]:
        return StorageError, (self.args[0], self.reason, self.errno, self.transient)


@dataclass(frozen=True)
class FileInfo:
    """A file in a listing: its path relative to what was listed, with ``/`` between parts, and its size in bytes."""

    path: str
    size: int


def is_remote(uri: URI) -> bool:
    """Whether the URI names an object store."""
    return isinstance(uri, str) and uri.startswith("s3://")


def display(uri: URI) -> str:
    """The URI as it may be printed: without a user, a password or a key that somebody put into it."""
    return _SECRET.sub("***", str(uri))


def join(uri: URI, *parts: str) -> str:
    """The URI of something below ``uri``; an object store's options stay at the end."""
    if not is_remote(uri):
        return os.path.join(str(uri), *parts)
    base, query = _split(uri)
    return "/".join([base.rstrip("/"), *parts]) + query


def name(uri: URI) -> str:
    """The last part of the path."""
    return os.path.basename(_split(uri)[0].rstrip("/"))


def filesystem(uri: URI) -> tuple[pafs.FileSystem, str]:
    """The Arrow file system of a URI and the path in it.

    Raises:
        ValueError: another scheme, an unknown option, or credentials in the URI.
    """
    if not is_remote(uri):
        if found := re.match(r"([A-Za-z][\w+.-]*)://", str(uri)):
            raise ValueError(
                f"expected a local path or s3://bucket/key, found the scheme {found[1]!r} in {display(uri)}: "
                "copy the data to one of them, or mount it"
            )
        return pafs.LocalFileSystem(), os.path.abspath(uri)
    base, query = _split(uri)
    options = dict(parse_qsl(query[1:], keep_blank_values=True))
    bucket, _, key = base.removeprefix("s3://").partition("/")
    endpoint = urlsplit(options.get("endpoint_url", ""))
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ValueError(
            f"unknown option {', '.join(unknown)} in {display(uri)}: expected {' or '.join(OPTIONS)}; "
            "credentials come from the environment, ~/.aws or the machine's role, never from a URI"
        )
    if "@" in bucket or ":" in bucket or "@" in endpoint.netloc:
        raise ValueError(
            f"expected no credentials in a URI, found some in {display(uri)}: take them out; they come from the "
            "environment, ~/.aws or the machine's role"
        )
    if not bucket or (endpoint.geturl() and not (endpoint.scheme in ("http", "https") and endpoint.netloc)):
        raise ValueError(
            f"expected s3://bucket/key, found {display(uri)}: write it so, with or without "
            "?endpoint_url=http://host:port"
        )
    return _s3(bucket, endpoint.scheme, endpoint.netloc, options.get("region")), f"{bucket}/{key}".rstrip("/")


def exists(uri: URI) -> bool:
    """Whether a file, a directory or a prefix with objects below it is there."""
    if not is_remote(uri):
        filesystem(uri)
        return os.path.exists(uri)
    fs, path = filesystem(uri)
    return bool(attempt("look at", uri, lambda: fs.get_file_info(path)).type != pafs.FileType.NotFound)


def is_dir(uri: URI) -> bool:
    """Whether a directory, or a prefix with objects below it, is there."""
    if not is_remote(uri):
        filesystem(uri)
        return os.path.isdir(uri)
    fs, path = filesystem(uri)
    return bool(attempt("look at", uri, lambda: fs.get_file_info(path)).type == pafs.FileType.Directory)


def list_files(uri: URI, suffix: str = "") -> list[FileInfo]:
    """Every file below a directory whose name ends in ``suffix``, sorted by path.

    Links are followed, but each directory is listed once, under its own name rather than a link's, so that links in
    circles end. A link that leads nowhere is listed with size 0: reading it says so.

    Raises:
        StorageError: the directory, or one below it, cannot be listed: nothing is left out silently.
    """
    if is_remote(uri):
        fs, path = filesystem(uri)
        found = attempt("list", uri, lambda: fs.get_file_info(pafs.FileSelector(path, recursive=True)))
        files = [FileInfo(info.path[len(path) + 1 :], info.size) for info in found if info.type == pafs.FileType.File]
    else:
        filesystem(uri)
        files = attempt("list", uri, lambda: list(_walk(str(uri))))
    return sorted((file for file in files if file.path.endswith(suffix)), key=lambda file: file.path)


def list_dirs(uri: URI) -> list[str]:
    """The names of the directories directly in a directory, sorted."""
    if is_remote(uri):
        fs, path = filesystem(uri)
        found = attempt("list", uri, lambda: fs.get_file_info(pafs.FileSelector(path)))
        return sorted(info.base_name for info in found if info.type == pafs.FileType.Directory)
    return attempt("list", uri, lambda: sorted(entry.name for entry in os.scandir(uri) if entry.is_dir()))


def read_bytes(uri: URI) -> bytes:
    """The content of a file."""
    fs, path = filesystem(uri)
    if not is_remote(uri):
        return attempt("read", uri, lambda: Path(uri).read_bytes())

    def read() -> bytes:
        with fs.open_input_file(path) as file:
            return bytes(file.read())

    return attempt("read", uri, read)


def write_bytes(uri: URI, data: bytes, *, scratch: URI | None = None) -> None:
    """Put a file there whole or not at all, replacing what was there.

    On a disk: a temporary file, fsync, rename, with the rights that the user's umask gives. On an object store: one
    object, which appears when its upload is complete.

    Args:
        uri: the file; its directory is made when missing.
        data: its content.
        scratch: a directory of the same file system for the temporary file; by default the file's own, hidden there.
    """
    fs, path = filesystem(uri)
    if not is_remote(uri):
        attempt("write", uri, lambda: _write_local(path, data, os.path.abspath(scratch) if scratch else None))
        return

    def put() -> None:
        # One write call: a stream that fails half-way is never closed into a complete object.
        with fs.open_output_stream(path) as file:
            file.write(data)

    attempt("write", uri, put)


def read_json(uri: URI) -> Any:
    """The parsed content of a JSON file.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise ValueError(f"expected JSON in {display(uri)}, found none ({error}): restore or delete it") from None


def write_json(uri: URI, value: Any, *, scratch: URI | None = None) -> None:
    """Write a value as JSON, whole or not at all; NaN and infinities, which JSON lacks, become null."""
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(uri, (text + "\n").encode(), scratch=scratch)


def delete(uri: URI) -> None:
    """Delete a file; one that is not there is deleted already."""
    fs, path = filesystem(uri)

    def remove() -> None:
        try:
            fs.delete_file(path)
        except FileNotFoundError:
            return

    attempt("delete", uri, remove)


def delete_tree(uri: URI) -> None:
    """Delete a directory with everything below it; links in it are removed, not followed."""
    if not is_remote(uri):
        filesystem(uri)
        if os.path.lexists(uri):
            attempt("delete", uri, lambda: shutil.rmtree(uri))
        return
    fs, path = filesystem(uri)
    attempt("delete", uri, lambda: fs.delete_dir_contents(path, missing_dir_ok=True))
    delete(join(uri, ""))


def make_dir(uri: URI) -> None:
    """Make a directory and those above it; an object store needs none."""
    filesystem(uri)
    if not is_remote(uri):
        attempt("make", uri, lambda: os.makedirs(uri, exist_ok=True))


def copy_tree(source: URI, destination: URI) -> None:
    """Copy every file below a directory, each whole or not at all, between any two places."""
    for file in list_files(source):
        write_bytes(join(destination, file.path), read_bytes(join(source, file.path)))


def open_parquet(uri: URI) -> pq.ParquetFile:
    """A Parquet file, opened so that reading one row group reads no other and streams through it.

    Raises:
        ValueError: it is not a whole Parquet file.
    """
    fs, path = filesystem(uri)
    try:
        return attempt(
            "read", uri, lambda: pq.ParquetFile(fs.open_input_file(path), buffer_size=STREAM_BYTES, pre_buffer=False)
        )
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"expected a whole Parquet file, found {display(uri)}, which is none ({reason}): restore or leave it out"
        ) from None


def attempt(what: str, uri: URI, action: Callable[[], T]) -> T:
    """Do something with a place: transient errors are tried again with growing pauses, others are said at once.

    Args:
        what: the verb of the message: "read", "write", "list".
        uri: the place.
        action: what to do; done again from its start.

    Raises:
        StorageError: it failed for good, or at each of ATTEMPTS attempts.
    """
    for tried in range(1, ATTEMPTS + 1):
        try:
            return action()
        except OSError as error:
            transient = error.transient if isinstance(error, StorageError) else _is_transient(uri, error)
            if transient and tried < ATTEMPTS:
                time.sleep(FIRST_PAUSE_S * 2 ** (tried - 1) * (1 + secrets.randbelow(1000) / 1000))
                continue
            # The chain is cut on purpose: a store's own message may carry what a log must not.
            raise _storage_error(what, uri, error, transient) from None
    raise AssertionError("unreachable")


def _storage_error(what: str, uri: URI, error: OSError, transient: bool) -> StorageError:
    if isinstance(error, StorageError):
        return error
    code = error.errno or (errno.ENOENT if isinstance(error, FileNotFoundError) else None)
    answer = re.search(r"AWS Error (\w+)", str(error))
    reason = os.strerror(code) if code else (answer[1] if answer else "the store's answer was not understood")
    detail = "" if code else f" ({_public(str(error))})"
    if transient:
        remedy = f"it failed {ATTEMPTS} times: try again later"
    elif is_remote(uri) and code is None:
        remedy = "check the bucket, the endpoint_url, the region, and this machine's credentials and rights"
    else:
        remedy = _REMEDY.get(code or 0, "check the path and its disk")
    place = error.filename if isinstance(error.filename, str) and not is_remote(uri) else uri
    return StorageError(f"cannot {what} {display(place)}: {reason}{detail}: {remedy}", reason, code, transient)


def _is_transient(uri: URI, error: OSError) -> bool:
    if error.errno is not None:
        return error.errno in _TRANSIENT_ERRNO
    return is_remote(uri) and _TRANSIENT_TEXT.search(str(error)) is not None


def _public(text: str) -> str:
    """A store's message without anything secret that this process knows."""
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        if value := os.environ.get(variable):
            text = text.replace(value, "***")
    return _SECRET.sub("***", text)


def _split(uri: URI) -> tuple[str, str]:
    """The path and the options ("?..." or "") of a URI; a question mark in a file's name stays in the path."""
    text = str(uri)
    found = _QUERY.search(text) if is_remote(uri) else None
    return (text[: found.start()], text[found.start() :]) if found else (text, "")


@functools.lru_cache(maxsize=16)
def _s3(bucket: str, scheme: str, endpoint: str, region: str | None) -> pafs.FileSystem:
    region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region:
        place = f"s3://{bucket}"
        region = "us-east-1" if endpoint else attempt("find", place, lambda: pafs.resolve_s3_region(bucket))
    return pafs.S3FileSystem(
        region=region,
        scheme=scheme or "https",
        endpoint_override=endpoint or None,
        connect_timeout=5,
        request_timeout=30,
        allow_delayed_open=True,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=2),
    )


def _walk(root: str) -> Iterator[FileInfo]:
    """Every file below ``root``; directories before the links to directories, so that real names win."""
    seen: set[tuple[int, int]] = set()
    real, links = [""], [""][:0]
    while real or links:
        below = real.pop() if real else links.pop(0)
        status = os.stat(os.path.join(root, below))
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(os.path.join(root, below)) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = os.path.join(below, entry.name)
                try:
                    if entry.is_dir():
                        (links if entry.is_symlink() else real).append(path)
                    else:
                        yield FileInfo(path, entry.stat().st_size)
                except OSError:
                    yield FileInfo(path, 0)


def _write_local(path: str, data: bytes, scratch: str | None) -> None:
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(scratch or folder, f".{secrets.token_hex(8)}.tmp")
    if scratch:
        os.makedirs(scratch, exist_ok=True)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # so that the name survives a power cut too
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
