"""A real S3 server for tests: moto's, in a process of its own on loopback, behind a small proxy that breaks requests.

Use it as a context manager; no object of it outlives the block::

    with ObjectStore() as store:
        store.faults.append(Fault("503", "PUT", times=2))
        storage.write_bytes(store.uri("a/b.json"), b"{}")
        assert store.requests == [("PUT", "/bucket/a/b.json")] * 3
"""

import atexit
import functools
import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from clarity import storage

ACCESS_KEY = "AKIAPLANTEDPLANTED77"
SECRET_KEY = "planted/secret+key/of/the/tests"
HOP_BY_HOP = ("content-length", "connection", "transfer-encoding", "expect", "date", "server")


def leaks(*directories: Path) -> list[str]:
    """The files below, Parquet unpacked, in which a key of the store stands, plain or as in a URL."""
    keys = [form.encode() for key in (ACCESS_KEY, SECRET_KEY) for form in (key, urllib.parse.quote(key, safe=""))]
    found = []
    for path in sorted(path for directory in directories for path in directory.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            content += repr((table.schema.metadata, table.to_pylist())).encode()
        if any(key in content for key in keys):
            found.append(str(path))
    return found


def copy_tree(source: str | Path, destination: str | Path) -> None:
    """Copy every file below a directory, between a disk and a store or within one."""
    for file in storage.list_files(source):
        storage.write_bytes(storage.join(destination, file.path), storage.read_bytes(storage.join(source, file.path)))


@functools.cache
def moto_port() -> int:
    """The port of moto's server, which starts with the first store and ends with this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = "import ctypes; ctypes.CDLL(None).prctl(1, 9)\n" if sys.platform == "linux" else ""  # dies with us
    command += f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-c", command], **quiet)
    atexit.register(server.kill)
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return port
        except OSError:
            if time.monotonic() > end or server.poll() is not None:
                raise
            time.sleep(0.05)


@dataclass
class Fault:
    """What befalls requests of ``method`` whose path matches ``match``, ``times`` times, each ``every``-th of them.

    Kinds: "503", "403", "slow" (a pause of ``seconds``, then the answer), "cut" (half of the answer, then the end of
    the connection; of an upload half is taken, nothing passed on), "hang" (no answer for ``seconds``, then the end).
    """

    kind: str
    method: str = "GET"
    match: str = ""
    times: int = 1
    seconds: float = 1.0
    every: int = 1
    matched: int = 0


@dataclass
class ObjectStore:
    bucket: str = "bucket"
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def uri(self, key: str = "") -> str:
        return f"s3://{self.bucket}/{key}?endpoint_url={self.url}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._proxy.server_port}"

    def __enter__(self) -> "ObjectStore":
        self._environ = dict(os.environ)
        os.environ.update(
            AWS_ACCESS_KEY_ID=ACCESS_KEY, AWS_SECRET_ACCESS_KEY=SECRET_KEY, AWS_EC2_METADATA_DISABLED="true"
        )
        for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
            os.environ.pop(name, None)
        self._port = moto_port()
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        self.forward("POST", "/moto-api/reset", b"", {})
        self.forward("PUT", f"/{self.bucket}", b"", {})
        return self

    def __exit__(self, *_: object) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        os.environ.clear()
        os.environ.update(self._environ)

    def forward(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, list[Any], bytes]:
        """What the server itself answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            sent = {name: value for name, value in headers.items() if name.lower() not in HOP_BY_HOP}
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def fault_for(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and re.search(fault.match, path):
                fault.matched += 1
                if fault.matched % fault.every == 0:
                    fault.times -= 1
                    return fault
        return None


def _handler(store: ObjectStore) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle_any(self) -> None:
            path = urllib.parse.unquote(self.path)
            store.requests.append((self.command, path))
            fault = store.fault_for(self.command, path)
            kind = fault.kind if fault else ""
            length = int(self.headers.get("content-length") or 0)
            if kind == "cut" and self.command == "PUT":
                self.rfile.read(int(self.headers.get("x-amz-decoded-content-length") or length) // 2)
                self.close()
                return
            body = self.body(length)
            if fault and kind in ("slow", "hang"):
                time.sleep(fault.seconds)
                if kind == "hang":
                    self.close()
                    return
            if kind in ("503", "403"):
                code = {"503": "SlowDown", "403": "AccessDenied"}[kind]
                text = f"<Error><Code>{code}</Code><Message>{ACCESS_KEY} may not</Message></Error>".encode()
                self.answer(int(kind), [("Content-Type", "application/xml")], text)
                return
            status, headers, content = store.forward(self.command, self.path, body, dict(self.headers))
            self.answer(status, headers, content, cut=kind == "cut")

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

        def body(self, length: int) -> bytes:
            if self.headers.get("transfer-encoding") != "chunked":
                return self.rfile.read(length)
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, cut: bool = False) -> None:
            self.send_response(status)
            length = str(len(content))
            for name, value in headers:
                if name.lower() == "content-length":
                    length = value
                if name.lower() not in HOP_BY_HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self.close()

        def close(self) -> None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    return Handler
