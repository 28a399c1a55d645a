"""Images that are files of their own: their names as text, and their bytes."""

import errno
import os
import re
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from clarity import storage
from clarity.data.listing import Content, Dataset
from clarity.images import MAX_BYTES, UnreadableImage

#: The device or the server behind a path is gone.
GONE = {errno.EIO, errno.ENXIO, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH}


def read_files(dataset: Dataset, rows: pa.Table) -> Iterator[tuple[int, Content]]:
    """Each location as a file below where the data lies; an object store is asked for several at once."""
    uris = [storage.join(str(dataset.data), unquote(location)) for location in rows["location"].to_pylist()]
    sizes = rows["size"].to_pylist()
    if not storage.is_remote(str(dataset.data)):
        yield from enumerate(map(read_file, uris, sizes))
        return
    with ThreadPoolExecutor(16) as pool:
        for start in range(0, len(rows), 64):
            yield from enumerate(pool.map(read_file, uris[start : start + 64], sizes[start : start + 64]), start)


def read_file(uri: str, size: int | None, named_by: str = "") -> Content:
    """The bytes of a file of the listed ``size``, or why it cannot be read; ``named_by`` is the file that names it."""
    if (size or 0) > MAX_BYTES:
        return UnreadableImage(f"expected a file of at most {MAX_BYTES} bytes, found {size}: make the image smaller")
    try:
        return storage.read_bytes(uri)
    except storage.StorageError as error:
        raise_if_source_failed(named_by or uri, error)
        return UnreadableImage(f"expected a file, found none that can be read ({error.reason}): restore it")


def raise_if_source_failed(uri: str, error: Exception) -> None:
    """Raise a transient error if the whole source is unreachable, and not this file alone."""
    if isinstance(error, storage.StorageError) and source_failed(uri, error):
        error.transient = True
        raise error


def source_failed(uri: str, error: storage.StorageError) -> bool:
    """Whether a store fails, a device is gone, or a file is missing with all beside it, as on an unmounted share."""
    if error.transient or error.errno in GONE:
        return True
    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
        return storage.is_remote(uri) and error.errno != errno.ENODATA  # of a Git LFS pointer
    base, query = storage.split_options(uri)
    directory = os.path.dirname(base) + query
    try:
        return not (storage.exists(directory) if storage.is_remote(uri) else os.listdir(storage.local_path(directory)))
    except OSError:
        return True


def printable(path: str) -> str:
    """A file's name as text; bytes that are no UTF-8 become their hexadecimal escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def quote(path: str) -> str:
    """A file's name as text from which ``unquote`` gets it back, whatever its bytes."""
    return re.sub(r"[\udc80-\udcff]", lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", path.replace("%", "%25"))


def unquote(location: str) -> str:
    """The inverse of ``quote``."""
    return os.fsdecode(urllib.parse.unquote_to_bytes(location)) if "%" in location else location
