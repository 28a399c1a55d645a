"""Read, list and atomically write files on disk or S3.

A URI is a local path, or ``s3://bucket/key[?endpoint_url=http://host:port&region=name]``. The options default to
AWS_ENDPOINT_URL and AWS_REGION; credentials come from the standard chain (environment, ~/.aws, the machine's role),
never from a URI.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, quote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

log = logging.getLogger(__name__)

URI = str | Path
T = TypeVar("T")

#: Attempts at each operation, with a pause between them that doubles.
ATTEMPTS = 6
FIRST_PAUSE_S = 0.25
#: A request to a store ends after this long without a byte.
REQUEST_S = 20.0
#: A store that has not answered this process yet is given up after this long.
FIRST_CONTACT_S = 15.0
#: How the file begins that Git leaves where the content of a large one was not fetched.
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\n"
#: Servers that have answered this process; the disk is one, named "".
ANSWERED = {""}
#: Shorter values of the environment are no secrets of AWS, and might be words of a path.
SHORTEST_SECRET = 16

QUERY = re.compile(r"\?([A-Za-z][\w-]*=[^&?]*(?:&[A-Za-z][\w-]*=[^&?]*)*)$")
SECRET = re.compile(
    r"(?i)(?<=//)[^/@\s]+(?=@)|\b(?:AKIA|ASIA)[A-Z0-9]{12,}"
    r"|(?<=[?&])[\w-]*(?:key|secret|token|password|signature)[\w-]*=[^&\s]*"
)
ANSWER = re.compile(r"AWS Error (\w+(?: \(HTTP status \d+\))?)")
NO_ANSWER = re.compile(r"(?i)network_|curl|time_?out")
TRANSIENT = re.compile(rf"{NO_ANSWER.pattern}|slow_?down|unavailable|internal_?(fail|err)|throttl|status 5\d\d")
TRANSIENT_ERRNO = {errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EMFILE}
REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT): "free space there, or choose another directory",
    (errno.EROFS,): "that file system is read-only: choose another directory",
    (errno.EACCES, errno.EPERM): "give this user the right to it, or choose another directory",
    (errno.ENOTDIR, errno.EEXIST): "a file stands where a directory is expected: choose another path",
    (errno.EISDIR,): "a directory stands where a file is expected: choose another path",
}


class StorageError(OSError):
    """A file or directory could not be read or written; the message says which, why, and what to do.

    ``reason`` is the same for every path; ``transient`` tells a store that failed at every retry from a final answer.
    """

    def __init__(self, message: str, reason: str = "", code: int | None = None, transient: bool = False) -> None:
        super().__init__(message)
        self.reason = reason or message
        self.errno = code
        self.transient = transient

    def __reduce__(self) -> tuple[Any, ...]:
        return StorageError, (self.args[0], self.reason, self.errno, self.transient)


class FileInfo(NamedTuple):
    """A file in a listing: its path relative to what was listed, with ``/`` between parts, and its size in bytes."""

    path: str
    size: int


def is_remote(uri: URI) -> bool:
    """Whether the URI names an object store."""
    return isinstance(uri, str) and uri.startswith("s3://")


def display(uri: URI) -> str:
    """A URI, or a text that quotes one, with credentials masked."""
    text = str(uri)
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        secret = os.environ.get(variable, "")
        if len(secret) >= SHORTEST_SECRET:
            forms = "|".join(re.escape(form) for form in (secret, quote(secret, safe="")))
            text = re.sub(rf"(?<![\w+/])(?:{forms})(?![\w+/=])", "***", text)
    return SECRET.sub("***", text)


def join(uri: URI, *parts: str) -> str:
    """The URI of something below ``uri``; an object store's options stay at the end."""
    if not is_remote(uri):
        return os.path.join(uri, *filter(None, parts))
    base, query = split_options(uri)
    return "/".join([base.rstrip("/"), *filter(None, parts)]) + query


def lies_in(uri: URI, directory: URI) -> bool:
    """Whether a URI names ``directory`` or something below it."""
    path, root = (os.path.realpath(split_options(each)[0]) for each in (uri, directory))
    return is_remote(uri) == is_remote(directory) and Path(path).is_relative_to(root)


def name(uri: URI) -> str:
    """The last part of the path."""
    return os.path.basename(split_options(uri)[0].rstrip("/"))


def filesystem(uri: URI) -> tuple[pafs.FileSystem, str]:
    """The Arrow file system of a URI and the path in it; ValueError for another scheme, option, or credentials."""
    if not is_remote(uri):
        return pafs.LocalFileSystem(), local_path(uri)
    base, query = split_options(uri)
    options = dict(parse_qsl(query[1:], keep_blank_values=True))
    endpoint = urlsplit(options.get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL") or "")
    bucket, _, key = base.removeprefix("s3://").partition("/")
    is_server = endpoint.scheme in ("http", "https") and endpoint.netloc
    has_credentials = "@" in bucket or ":" in bucket or "@" in endpoint.netloc
    unknown = options.keys() - {"endpoint_url", "region"}
    if not bucket or (endpoint.geturl() and not is_server) or has_credentials or unknown:
        raise ValueError(
            f"expected s3://bucket/key[?endpoint_url=http://host:port&region=name], found {display(uri)}: write it so; "
            "credentials come from the environment, ~/.aws or the machine's role"
        )
    return s3_filesystem(bucket, endpoint.scheme, endpoint.netloc, options.get("region")), f"{bucket}/{key}".rstrip("/")


def exists(uri: URI) -> bool:
    """Whether a file, a directory or a prefix with objects below it is there."""
    return type_of(uri) != pafs.FileType.NotFound


def is_dir(uri: URI) -> bool:
    """Whether a directory, or a prefix with objects below it, is there."""
    return type_of(uri) == pafs.FileType.Directory


def list_files(uri: URI) -> list[FileInfo]:
    """Every file below a directory, sorted by path; of a file: itself, its path empty.

    Links are followed, but each directory is listed once, under its own name rather than a link's, so that links in
    circles end. A link that leads nowhere is listed with size 0: reading it says so. Nothing is left out silently.
    """
    fs, path = filesystem(uri)
    if is_remote(uri):
        info = attempt("look at", uri, lambda: fs.get_file_info(path))
        if info.type == pafs.FileType.File:
            return [FileInfo("", info.size)]
        found = attempt("list", uri, lambda: fs.get_file_info(pafs.FileSelector(path, recursive=True)))
        files = [FileInfo(info.path[len(path) + 1 :], info.size) for info in found if info.type == pafs.FileType.File]
    elif os.path.isfile(path):
        return [FileInfo("", os.path.getsize(path))]
    else:
        files = attempt("list", uri, lambda: list(walk(path)))
    return sorted(files)


def list_dirs(uri: URI) -> list[str]:
    """The names of the directories directly in a directory, sorted."""
    fs, path = filesystem(uri)

    def names() -> list[str]:
        if not is_remote(uri):
            return [entry.name for entry in os.scandir(path) if entry.is_dir()]
        return [i.base_name for i in fs.get_file_info(pafs.FileSelector(path)) if i.type == pafs.FileType.Directory]

    return sorted(attempt("list", uri, names))


def read_bytes(uri: URI) -> bytes:
    """The content of a file; StorageError where Git has left a pointer instead of it."""
    fs, path = filesystem(uri)

    def get() -> bytes:
        with fs.open_input_file(path) as file:
            return file.read()

    content = attempt("read", uri, get if is_remote(uri) else lambda: read_local(path))
    if content.startswith(LFS_POINTER):
        reason = "a Git LFS pointer to it, which git lfs pull replaces"
        raise StorageError(f"cannot read {display(uri)}: found {reason}", reason, errno.ENODATA)
    return content


def write_bytes(uri: URI, data: bytes, *, scratch: URI | None = None) -> None:
    """Write a file atomically, replacing what was there.

    On a disk: a temporary file, fsync, rename, with the rights that the user's umask gives. On an object store: one
    object, which appears when its upload is complete. The temporary file lies in the file's own directory, made when
    missing; or in ``scratch``, of the same file system: then both directories must be there.
    """
    fs, path = filesystem(uri)

    def put() -> None:
        if not is_remote(uri):
            write_local(path, data, local_path(scratch) if scratch else None)
            return
        with fs.open_output_stream(path) as file:
            file.write(data)  # one call: a stream that failed half-way is never completed by its closing

    attempt("write", uri, put)


def read_json(uri: URI) -> Any:
    """The parsed content of a JSON file; ValueError where it is none."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise ValueError(f"expected JSON in {display(uri)}, found none ({error}): restore or delete it") from None


def write_json(uri: URI, value: Any, *, scratch: URI | None = None) -> None:
    """Write a value atomically as JSON; NaN and infinities, which JSON lacks, become null."""
    value = json.loads(json.dumps(value), parse_constant=lambda constant: None)
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # Half a character, as in a file's name that is no UTF-8, becomes its escape, which JSON reads back.
    write_bytes(uri, (text + "\n").encode(errors="backslashreplace"), scratch=scratch)


def delete(uri: URI) -> None:
    """Delete a file if it exists."""
    fs, path = filesystem(uri)
    attempt("delete", uri, lambda: unless_missing(fs.delete_file, path))


def delete_tree(uri: URI) -> None:
    """Delete a directory with everything below it; links in it are removed, not followed."""
    fs, path = filesystem(uri)
    remove = fs.delete_dir if is_remote(uri) else shutil.rmtree
    attempt("delete", uri, lambda: unless_missing(remove, path))


def make_dir(uri: URI) -> None:
    """Make a directory and those above it; an object store needs none."""
    if not is_remote(uri):
        attempt("make", uri, lambda: os.makedirs(local_path(uri), exist_ok=True))


def open_parquet(uri: URI) -> pq.ParquetFile:
    """A Parquet file, opened so that reading one row group reads no other; ValueError where it is not a whole one."""
    fs, path = filesystem(uri)

    def opened() -> pq.ParquetFile:
        return pq.ParquetFile(fs.open_input_file(path), buffer_size=1 << 20, pre_buffer=False)

    try:
        return attempt("read", uri, opened)
    except pa.ArrowInvalid as error:
        if fs.get_file_info(path).size < 1024:  # as a Git LFS pointer is
            read_bytes(uri)
        found = f"{display(uri)}, which is none ({str(error).splitlines()[0]})"
        raise ValueError(f"expected a whole Parquet file, found {found}: copy it again or leave it out") from None


def attempt(what: str, uri: URI, action: Callable[[], T]) -> T:
    """Run an operation on a URI; transient errors are retried with growing pauses, others raised as StorageError.

    ``what`` is the verb of the message: "read", "write", "list"; ``action`` is done again from its start.
    """
    server, begin, tried = server_of(uri), time.monotonic(), 0
    while True:
        tried += 1
        try:
            result = action()
            ANSWERED.add(server)
            return result
        except StorageError:
            raise
        except OSError as error:
            text = str(error)
            transient = error.errno in TRANSIENT_ERRNO if error.errno else bool(TRANSIENT.search(text))
            if not NO_ANSWER.search(text):
                ANSWERED.add(server)
            last = tried == ATTEMPTS or (server not in ANSWERED and time.monotonic() - begin > FIRST_CONTACT_S)
            if not transient or last:
                # The chain is cut on purpose: a store's own message may carry what a log must not.
                raise storage_error(what, uri, error, transient, "" if server in ANSWERED else server) from None
        pause = FIRST_PAUSE_S * 2 ** (tried - 1) * (1 + secrets.randbelow(1000) / 1000)
        reason = ANSWER.search(text)
        again = f"trying again in {pause:.1f} s (attempt {tried + 1} of {ATTEMPTS})"
        log.warning("cannot %s %s: %s: %s", what, display(uri), display(reason[1] if reason else text), again)
        time.sleep(pause)


def server_of(uri: URI) -> str:
    """Who answers for a URI: an endpoint or a bucket; empty for a disk."""
    if not is_remote(uri):
        return ""
    base, query = split_options(uri)
    endpoint = dict(parse_qsl(query[1:])).get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL")
    return endpoint or "/".join(base.split("/")[:3])


def storage_error(what: str, uri: URI, error: OSError, transient: bool, absent: str) -> StorageError:
    """The error of a failed operation with its remedy; ``absent`` names a server that has never answered, if any."""
    code = error.errno or (errno.ENOENT if isinstance(error, FileNotFoundError) else None)
    answer = ANSWER.search(str(error))
    reason = os.strerror(code) if code else (answer[1] if answer else str(error))
    remedy = "check the bucket, the key, the endpoint_url, the region, and this machine's rights to them"
    if absent:
        remedy = f"{absent} has not answered: check the endpoint_url, and that this machine reaches it"
    elif transient:
        remedy = f"it failed {ATTEMPTS} times: try again later"
    elif not is_remote(uri):
        found = (text for codes, text in REMEDIES.items() if code in codes)
        remedy = next(found, "check the path and its disk on this machine")
    path = error.filename if isinstance(error.filename, str) and not is_remote(uri) else uri
    said = reason if code or absent else str(error)
    return StorageError(display(f"cannot {what} {path}: {said}: {remedy}"), display(reason), code, transient)


def type_of(uri: URI) -> pafs.FileType:
    """File, Directory, or NotFound."""
    fs, path = filesystem(uri)

    def look() -> pafs.FileType:
        if is_remote(uri):
            return fs.get_file_info(path).type
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                raise
            return pafs.FileType.NotFound
        return pafs.FileType.Directory if stat.S_ISDIR(mode) else pafs.FileType.File

    return attempt("look at", uri, look)


def local_path(uri: URI) -> str:
    """The absolute path of a local URI; ValueError for another scheme."""
    if found := re.match(r"([A-Za-z][\w+.-]*)://", str(uri)):
        raise ValueError(
            f"expected a local path or s3://bucket/key, found the scheme {found[1]!r} in {display(uri)}: "
            "copy the data to one of them, or mount it"
        )
    return os.path.abspath(uri)


def split_options(uri: URI) -> tuple[str, str]:
    """The path and the options ("?..." or "") of a URI; a question mark in a file's name stays in the path."""
    text = str(uri)
    found = QUERY.search(text) if is_remote(uri) else None
    return (text[: found.start()], text[found.start() :]) if found else (text, "")


@functools.lru_cache(maxsize=16)
def s3_filesystem(bucket: str, scheme: str, endpoint: str, region: str | None) -> pafs.FileSystem:
    """The client of a store, which tries each request once: ``attempt`` retries, and says so.

    Not s3fs: with it, 15 tests of stores that cut, refuse or never answer fail, and a process holds 14 MB more.
    """
    region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region:
        found = functools.partial(pafs.resolve_s3_region, bucket)
        region = "us-east-1" if endpoint else attempt("find", f"s3://{bucket}", found)
    return pafs.S3FileSystem(
        region=region,
        scheme=scheme or "https",
        endpoint_override=endpoint or None,
        connect_timeout=5,
        request_timeout=REQUEST_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1),
        allow_delayed_open=True,  # a small object is then one PUT
    )


def walk(root: str) -> Iterator[FileInfo]:
    """Every file below ``root``; directories before the links to directories, so that their own names win."""
    seen: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    while folders or links:
        below = folders.pop() if folders else links.pop(0)
        directory = os.path.join(root, below)
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = os.path.join(below, entry.name)
                try:
                    if entry.is_dir():
                        (links if entry.is_symlink() else folders).append(path)
                    else:
                        yield FileInfo(path, entry.stat().st_size)
                except OSError:
                    yield FileInfo(path, 0)


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
