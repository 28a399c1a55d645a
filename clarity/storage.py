"""Where bytes lie: URIs of local files and of object stores, read, listed, and written whole or not at all.

Knows paths, atomic writes, bounded retries. Does not know what the bytes mean.

A URI is a local path, or ``s3://bucket/key[?endpoint_url=http://host:port&region=name]``. The options default to
AWS_ENDPOINT_URL and AWS_REGION; credentials come from the standard chain (environment, ~/.aws, the machine's role),
never from a URI.
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
import stat
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

#: Attempts at each operation, with a pause between them that doubles, and the requests of the store's client in each.
ATTEMPTS = 6
REQUESTS = 3
FIRST_PAUSE_S = 0.25
OPTIONS = ("endpoint_url", "region")

_QUERY = re.compile(r"\?([A-Za-z][\w-]*=[^&?]*(?:&[A-Za-z][\w-]*=[^&?]*)*)$")
_SECRET = re.compile(
    r"(?i)(?<=//)[^/@\s]+(?=@)|\b(?:AKIA|ASIA)[A-Z0-9]{12,}|(?<=[?&])[^=&\s]*(?:key|secret|token|password|signature)[^&\s]*"
)
_ANSWER = re.compile(r"AWS Error (\w+(?: \(HTTP status \d+\))?)")
_TRANSIENT = re.compile(r"(?i)slow_?down|unavailable|internal_?(fail|err)|throttl|time_?out|network_|curl|status 5\d\d")
_TRANSIENT_ERRNO = {errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EMFILE}
_REMEDY = {
    errno.ENOSPC: "free space there, or choose another place",
    errno.EDQUOT: "free space there, or choose another place",
    errno.EROFS: "that file system is read-only: choose another place",
    errno.EACCES: "give this user the right to it, or choose another place",
    errno.EPERM: "give this user the right to it, or choose another place",
    errno.ENOTDIR: "a file stands where a directory is expected: choose another path",
    errno.EEXIST: "a file stands where a directory is expected: choose another path",
    errno.EISDIR: "a directory stands where a file is expected: choose another path",
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
    """A URI, or a text that quotes one, as it may be printed: without a secret in it or known to this process."""
    text = str(uri)
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        text = text.replace(os.environ.get(variable) or "\0", "***")
    return _SECRET.sub("***", text)


def join(uri: URI, *parts: str) -> str:
    """The URI of something below ``uri``; an object store's options stay at the end."""
    if not is_remote(uri):
        return os.path.join(uri, *filter(None, parts))
    base, query = _split(uri)
    return "/".join([base.rstrip("/"), *filter(None, parts)]) + query


def lies_in(uri: URI, place: URI) -> bool:
    """Whether a URI names ``place`` or something below it."""
    if is_remote(uri) != is_remote(place):
        return False
    paths = [_split(each)[0].rstrip("/") if is_remote(each) else os.path.realpath(each) for each in (uri, place)]
    return f"{paths[0]}/".startswith(f"{paths[1].rstrip('/')}/")


def name(uri: URI) -> str:
    """The last part of the path."""
    return os.path.basename(_split(uri)[0].rstrip("/"))


def filesystem(uri: URI) -> tuple[pafs.FileSystem, str]:
    """The Arrow file system of a URI and the path in it.

    Raises:
        ValueError: another scheme, an unknown option, or credentials in the URI.
    """
    if not is_remote(uri):
        return pafs.LocalFileSystem(), _local(uri)
    base, query = _split(uri)
    options = dict(parse_qsl(query[1:], keep_blank_values=True))
    endpoint = urlsplit(options.get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL") or "")
    bucket, _, key = base.removeprefix("s3://").partition("/")
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ValueError(
            f"expected only {' and '.join(OPTIONS)} behind the question mark, found {', '.join(unknown)} in "
            f"{display(uri)}: take it out; credentials come from the environment, ~/.aws or the machine's role"
        )
    if "@" in bucket or ":" in bucket or "@" in endpoint.netloc:
        raise ValueError(
            f"expected no credentials in a URI, found some in {display(uri)}: take them out; they come from the "
            "environment, ~/.aws or the machine's role"
        )
    if not bucket or (endpoint.geturl() and not (endpoint.scheme in ("http", "https") and endpoint.netloc)):
        raise ValueError(
            f"expected s3://bucket/key, or that and ?endpoint_url=http://host:port, found {display(uri)}: write it so"
        )
    return _s3(bucket, endpoint.scheme, endpoint.netloc, options.get("region")), f"{bucket}/{key}".rstrip("/")


def exists(uri: URI) -> bool:
    """Whether a file, a directory or a prefix with objects below it is there."""
    return _kind(uri) != pafs.FileType.NotFound


def is_dir(uri: URI) -> bool:
    """Whether a directory, or a prefix with objects below it, is there."""
    return _kind(uri) == pafs.FileType.Directory


def list_files(uri: URI, suffix: str = "") -> list[FileInfo]:
    """Every file below a directory whose name ends in ``suffix``, sorted by path; of a file: itself, its path empty.

    Links are followed, but each directory is listed once, under its own name rather than a link's, so that links in
    circles end. A link that leads nowhere is listed with size 0: reading it says so.

    Raises:
        StorageError: the directory, or one below it, cannot be listed: nothing is left out silently.
    """
    if is_remote(uri):
        fs, path = filesystem(uri)
        info = attempt("look at", uri, lambda: fs.get_file_info(path))
        if info.type == pafs.FileType.File:
            return [FileInfo("", info.size)]
        found = attempt("list", uri, lambda: fs.get_file_info(pafs.FileSelector(path, recursive=True)))
        files = [FileInfo(info.path[len(path) + 1 :], info.size) for info in found if info.type == pafs.FileType.File]
    else:
        root = _local(uri)
        if os.path.isfile(root):
            return [FileInfo("", os.path.getsize(root))]
        files = attempt("list", uri, lambda: list(_walk(root)))
    return sorted((file for file in files if file.path.endswith(suffix)), key=lambda file: file.path)


def list_dirs(uri: URI) -> list[str]:
    """The names of the directories directly in a directory, sorted."""
    if is_remote(uri):
        fs, path = filesystem(uri)
        found = attempt("list", uri, lambda: fs.get_file_info(pafs.FileSelector(path)))
        return sorted(info.base_name for info in found if info.type == pafs.FileType.Directory)
    return attempt("list", uri, lambda: sorted(entry.name for entry in os.scandir(_local(uri)) if entry.is_dir()))


def read_bytes(uri: URI) -> bytes:
    """The content of a file."""
    if not is_remote(uri):
        return attempt("read", uri, lambda: _read_local(_local(uri)))
    fs, path = filesystem(uri)

    def get() -> bytes:
        with fs.open_input_file(path) as file:
            return bytes(file.read())

    return attempt("read", uri, get)


def write_bytes(uri: URI, data: bytes, *, scratch: URI | None = None) -> None:
    """Put a file there whole or not at all, replacing what was there.

    On a disk: a temporary file, fsync, rename, with the rights that the user's umask gives. On an object store: one
    object, which appears when its upload is complete.

    Args:
        uri: the file.
        data: its content.
        scratch: a directory of the same file system for the temporary file: then both directories must be there. By
            default the temporary file lies hidden in the file's own directory, which is made when missing.
    """
    if not is_remote(uri):
        attempt("write", uri, lambda: _write_local(_local(uri), data, _local(scratch) if scratch else None))
        return
    fs, path = filesystem(uri)

    def put() -> None:
        with fs.open_output_stream(path) as file:
            file.write(data)  # one call: a stream that failed half-way is never completed by its closing

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
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    # Half a character, as in a file's name that is no UTF-8, becomes its escape, which JSON reads back.
    write_bytes(uri, (text + "\n").encode(errors="backslashreplace"), scratch=scratch)


def delete(uri: URI) -> None:
    """Delete a file; one that is not there is deleted already."""
    fs, path = filesystem(uri)
    attempt("delete", uri, lambda: _unless_missing(fs.delete_file, path))


def delete_tree(uri: URI) -> None:
    """Delete a directory with everything below it; links in it are removed, not followed."""
    fs, path = filesystem(uri)
    remove = fs.delete_dir if is_remote(uri) else shutil.rmtree
    attempt("delete", uri, lambda: _unless_missing(remove, path))


def make_dir(uri: URI) -> None:
    """Make a directory and those above it; an object store needs none."""
    if not is_remote(uri):
        attempt("make", uri, lambda: os.makedirs(_local(uri), exist_ok=True))


def copy_tree(source: URI, destination: URI) -> None:
    """Copy every file below a directory, each whole or not at all, between any two places."""
    for file in list_files(source):
        write_bytes(join(destination, file.path), read_bytes(join(source, file.path)))


def open_parquet(uri: URI) -> pq.ParquetFile:
    """A Parquet file, opened so that reading one row group reads no other, in pieces of 1 MiB.

    Raises:
        ValueError: it is not a whole Parquet file.
    """
    fs, path = filesystem(uri)
    try:
        return attempt(
            "read", uri, lambda: pq.ParquetFile(fs.open_input_file(path), buffer_size=1 << 20, pre_buffer=False)
        )
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"expected a whole Parquet file, found {display(uri)}, which is none ({str(error).splitlines()[0]}): "
            "copy it again or leave it out"
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
        except StorageError:
            raise
        except OSError as error:
            text = str(error)
            transient = error.errno in _TRANSIENT_ERRNO if error.errno else bool(_TRANSIENT.search(text))
            if not transient or tried == ATTEMPTS:
                # The chain is cut on purpose: a store's own message may carry what a log must not.
                raise _storage_error(what, uri, error, transient) from None
        time.sleep(FIRST_PAUSE_S * 2 ** (tried - 1) * (1 + secrets.randbelow(1000) / 1000))
    raise AssertionError("unreachable")


def _storage_error(what: str, uri: URI, error: OSError, transient: bool) -> StorageError:
    code = error.errno or (errno.ENOENT if isinstance(error, FileNotFoundError) else None)
    answer = _ANSWER.search(str(error))
    reason = os.strerror(code) if code else (answer[1] if answer else str(error))
    remedy = "check the bucket, the key, the endpoint_url, the region, and this machine's rights to them"
    if transient:
        remedy = f"it failed {ATTEMPTS} times: try again later"
    elif not is_remote(uri):
        remedy = _REMEDY.get(code or 0, "check the path and its disk on this machine")
    place = error.filename if isinstance(error.filename, str) and not is_remote(uri) else uri
    said = reason if code else str(error)
    return StorageError(display(f"cannot {what} {place}: {said}: {remedy}"), display(reason), code, transient)


def _kind(uri: URI) -> pafs.FileType:
    if is_remote(uri):
        fs, path = filesystem(uri)
        return attempt("look at", uri, lambda: fs.get_file_info(path).type)

    def look() -> pafs.FileType:
        try:
            mode = os.stat(_local(uri)).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return pafs.FileType.NotFound
        return pafs.FileType.Directory if stat.S_ISDIR(mode) else pafs.FileType.File

    return attempt("look at", uri, look)


def _local(uri: URI) -> str:
    if found := re.match(r"([A-Za-z][\w+.-]*)://", str(uri)):
        raise ValueError(
            f"expected a local path or s3://bucket/key, found the scheme {found[1]!r} in {display(uri)}: "
            "copy the data to one of them, or mount it"
        )
    return os.path.abspath(uri)


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
        request_timeout=20,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=REQUESTS),
        allow_delayed_open=True,  # a small object is then one PUT
    )


def _walk(root: str) -> Iterator[FileInfo]:
    """Every file below ``root``; directories before the links to directories, so that their own names win."""
    seen: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    while folders or links:
        below = folders.pop() if folders else links.pop(0)
        place = os.path.join(root, below)
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(place) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = os.path.join(below, entry.name)
                try:
                    if entry.is_dir():
                        (links if entry.is_symlink() else folders).append(path)
                    else:
                        yield FileInfo(path, entry.stat().st_size)
                except OSError:
                    yield FileInfo(path, 0)


def _read_local(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for its writer
    with open(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.ENODEV, "no regular file", path)
        return file.read()


def _write_local(path: str, data: bytes, scratch: str | None) -> None:
    folder = os.path.dirname(path)
    if scratch is None:
        os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(scratch or folder, f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        _unless_missing(os.unlink, temporary)
        raise
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # so that the name survives a power cut too
    finally:
        os.close(descriptor)


def _unless_missing(remove: Callable[[str], Any], path: str) -> None:
    try:
        remove(path)
    except FileNotFoundError:
        return


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
