"""Servers on loopback for a measurement: nginx where there is one, our own for static files,
the mirror's server, and a rsync daemon. All listen on 127.0.0.1 at a free port.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tidings_chunkstore.errors import LocalError

from .process import find
from .wire import HOST

_START = 30.0  # seconds
_STOP = 10.0  # seconds
_URL = re.compile(rb"http://[\w.\[\]:-]+:(\d+)")
_RANGES = 4096  # ranges in one request to our own static server
_BLOCK = 262_144

_NGINX = """
daemon off;
master_process off;
{user}
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    default_type application/octet-stream;
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    sendfile on;
    tcp_nodelay on;
    keepalive_requests 100000;
    server {{ listen {host}:{port}; root {root}; }}
}}
"""


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def static(root: Path, work: Path) -> Iterator[str]:
    """Serve the files below *root*, ranges included: the URL. *work*: a server's own files."""
    nginx = find("nginx")
    if nginx is None:
        with _builtin(root) as url:
            yield url
        return
    folder = _fresh(work, "nginx")
    port = free_port()
    # As root its worker would be another user, who may not read the tree.
    user = "user root;" if os.geteuid() == 0 else ""
    config = folder / "nginx.conf"
    config.write_text(
        _NGINX.format(user=user, folder=folder, host=HOST, port=port, root=root.resolve())
    )
    command = [nginx, "-p", str(folder), "-c", str(config), "-e", str(folder / "error.log")]
    with _running(command, folder / "output.log", port):
        yield f"http://{HOST}:{port}"


@contextlib.contextmanager
def rsync(root: Path, work: Path) -> Iterator[str]:
    """A rsync daemon with *root* as module ``tree``: its URL."""
    folder = _fresh(work, "rsyncd")
    port = free_port()
    config = folder / "rsyncd.conf"
    owner = "uid = 0\ngid = 0\n" if os.geteuid() == 0 else ""
    config.write_text(
        f"use chroot = no\npid file = {folder}/pid\nlog file = {folder}/log\n{owner}"
        f"[tree]\npath = {root.resolve()}\nread only = yes\n"
    )
    command = ["rsync", "--daemon", "--no-detach", f"--port={port}", f"--address={HOST}"]
    with _running([*command, f"--config={config}"], folder / "output.log", port):
        yield f"rsync://{HOST}:{port}/tree"


@contextlib.contextmanager
def mirror(root: Path, work: Path, *options: str) -> Iterator[str]:
    """``tidings-mirror serve`` over *root*: its URL."""
    folder = _fresh(work, "mirror")
    log = folder / "output.log"
    command = [sys.executable, "-m", "tidings_server.cli", "serve", str(root.resolve())]
    command += ["--host", HOST, "--port", "0", *options]
    with _process(command, log) as process:
        deadline = time.monotonic() + _START
        while time.monotonic() < deadline and process.poll() is None:
            match = _URL.search(log.read_bytes())
            if match:
                _wait(int(match[1]), process, log)
                yield f"http://{HOST}:{int(match[1])}"
                return
            time.sleep(0.02)
        raise _failed(process, log)


def _fresh(work: Path, name: str) -> Path:
    folder = (work / f"{name}-{secrets.token_hex(4)}").resolve()
    folder.mkdir(parents=True)
    return folder


@contextlib.contextmanager
def _running(command: Sequence[str], log: Path, port: int) -> Iterator[None]:
    with _process(command, log) as process:
        _wait(port, process, log)
        yield


@contextlib.contextmanager
def _process(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection((HOST, port), timeout=1).close()
        except OSError:  # not listening yet
            time.sleep(0.02)
        else:
            return
    raise _failed(process, log)


def _failed(process: subprocess.Popen[bytes], log: Path) -> LocalError:
    text = log.read_text(errors="replace")[-2000:].strip()
    name = Path(str(process.args[0])).name if isinstance(process.args, list) else "server"
    return LocalError(f"{name} did not start to serve: {text}", code="server")


# --- our own static server ------------------------------------------------------------------------


@contextlib.contextmanager
def _builtin(root: Path) -> Iterator[str]:
    class Handler(_Files):
        folder = root.resolve()

    server = ThreadingHTTPServer((HOST, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(_STOP)


@dataclass(frozen=True, slots=True)
class _Piece:
    head: bytes
    start: int
    length: int


class _Files(BaseHTTPRequestHandler):
    """Files with one or many ranges (RFC 9110, section 14), as zchunk and zsync ask for them."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    folder: Path

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base's name)
        """Silent."""

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def _serve(self, *, body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        file = (self.folder / path.lstrip("/")).resolve()
        if not (file.is_relative_to(self.folder) and file.is_file()):
            self.send_response(HTTPStatus.NOT_FOUND)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = file.stat().st_size
        ranges = parse_ranges(self.headers.get("Range"), size)
        kind = "application/octet-stream"
        pieces = [_Piece(b"", 0, size)]
        status = HTTPStatus.OK
        end = b""
        if ranges is not None and len(ranges) == 1:
            status = HTTPStatus.PARTIAL_CONTENT
            pieces = [_Piece(b"", *ranges[0])]
        elif ranges:
            status = HTTPStatus.PARTIAL_CONTENT
            mark = secrets.token_hex(8)
            pieces = [
                _Piece(
                    f"\r\n--{mark}\r\nContent-Type: {kind}\r\n"
                    f"Content-Range: bytes {start}-{start + length - 1}/{size}\r\n\r\n".encode(),
                    start,
                    length,
                )
                for start, length in ranges
            ]
            end = f"\r\n--{mark}--\r\n".encode()
            kind = f"multipart/byteranges; boundary={mark}"
        elif ranges is not None:
            status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
            pieces = []
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Last-Modified", self.date_time_string(int(file.stat().st_mtime)))
        if ranges is not None and len(ranges) == 1:
            start, length = ranges[0]
            self.send_header("Content-Range", f"bytes {start}-{start + length - 1}/{size}")
        total = sum(len(piece.head) + piece.length for piece in pieces) + len(end)
        self.send_header("Content-Length", str(total))
        self.end_headers()
        if body:
            with file.open("rb") as source, contextlib.suppress(OSError):  # the client went away
                for piece in pieces:
                    self.wfile.write(piece.head)
                    source.seek(piece.start)
                    left = piece.length
                    while left > 0 and (block := source.read(min(left, _BLOCK))):
                        self.wfile.write(block)
                        left -= len(block)
                self.wfile.write(end)


def parse_ranges(text: str | None, size: int) -> list[tuple[int, int]] | None:
    """(start, length) of each range that can be served; None: no Range, or one to be ignored."""
    match = re.fullmatch(r"bytes=([0-9,\- ]+)", text or "")
    if match is None:
        return None
    ranges = []
    for part in match[1].split(",")[: _RANGES + 1]:
        first, _, last = part.strip().partition("-")
        if not (first.isdigit() or last.isdigit()) or (last and not last.isdigit()):
            return None
        if first:
            start, stop = int(first), min(int(last) + 1 if last else size, size)
        else:
            start, stop = max(size - int(last), 0), size
        if start < stop:
            ranges.append((start, stop - start))
    return ranges if len(ranges) <= _RANGES else None
