"""Real servers for tests: nginx, uvicorn, one that misbehaves, and a wire that counts bytes.

All listen on 127.0.0.1 at a free port and are stopped by their own process or thread.

    with Servers(tmp_path) as servers:
        site = servers.nginx(root, gzip=True)
        wire = servers.wire(site.url)
        ... fetch from wire.url ...
        assert wire.received < 20_000 and site.requests()[0].sent > 0
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Self

from support.system import require

HOST = "127.0.0.1"
START_SECONDS = 30.0
STOP_SECONDS = 10.0


class ServerFailed(RuntimeError):
    """A server did not start, or ended by itself; the text has its log."""


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def wait_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        time.sleep(0.02)
    stop(process)
    text = log.read_text(errors="replace")[-4000:] if log.exists() else ""
    raise ServerFailed(f"{process.args!r} does not listen on port {port}:\n{text}")


def stop(process: subprocess.Popen[bytes], how: int = signal.SIGTERM) -> None:
    if process.poll() is None:
        process.send_signal(how)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# --- nginx ---------------------------------------------------------------------------------------

NGINX = """
daemon off;
master_process off;
worker_processes 1;
{user}
pid {folder}/nginx.pid;
error_log {folder}/error.log notice;
events {{ worker_connections 256; }}
http {{
    default_type application/octet-stream;
    log_format counted escape=json
        '{{"method":"$request_method","uri":"$request_uri","status":$status,'
        '"sent":$bytes_sent,"received":$request_length,"range":"$http_range",'
        '"encoding":"$sent_http_content_encoding","cache":"$upstream_cache_status"}}';
    access_log {folder}/access.log counted;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    sendfile on;
    tcp_nodelay on;
    keepalive_requests 100000;
    {http}
    server {{
        listen {host}:{port};
        {server}
    }}
}}
"""

GZIP_ALL = "gzip on; gzip_types *; gzip_min_length 1; gzip_proxied any; gzip_comp_level 1;"


@dataclass(frozen=True, slots=True)
class Request:
    """One request as nginx logged it. Bytes are those of HTTP, heads included."""

    method: str
    uri: str
    status: int
    sent: int
    received: int
    range: str
    encoding: str
    cache: str


@dataclass(slots=True)
class Nginx:
    """A running nginx of its own configuration, in the foreground, as the test's user."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """Base URL without a slash at the end."""
        return f"http://{HOST}:{self.port}"

    def requests(self, since: int = 0) -> list[Request]:
        """What was asked of it, from the ``since``-th on. A request is logged when it is done."""
        lines = (self.folder / "access.log").read_text().splitlines()
        return [Request(**json.loads(line)) for line in lines[since:]]

    def stop(self) -> None:
        """Ends it; a second time does nothing."""
        stop(self.process)


def start_nginx(folder: Path, server: str, http: str = "") -> Nginx:
    """nginx with ``server`` and ``http`` as the text of those blocks. Skips without nginx."""
    program = require("nginx")
    folder.mkdir(parents=True)
    port = free_port()
    # Files of a test belong to its user, root included; as another user it might not read them.
    user = "user root;" if os.geteuid() == 0 else ""
    config = folder / "nginx.conf"
    config.write_text(
        NGINX.format(user=user, folder=folder, host=HOST, port=port, http=http, server=server)
    )
    output = folder / "output.log"
    with output.open("wb") as sink:
        process = subprocess.Popen(
            [program, "-p", str(folder), "-c", str(config), "-e", str(folder / "error.log")],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    wait_port(port, process, folder / "error.log")
    return Nginx(folder, port, process)


# --- commands that serve -------------------------------------------------------------------------


@dataclass(slots=True)
class Command:
    """A running command that serves, with its log in a file."""

    url: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Ends it by ``how``; its exit status."""
        stop(self.process, how)
        status: int = self.process.returncode
        return status


_URL = re.compile(rb"http://[\w.\[\]:-]+:(\d+)")


def start_command(
    folder: Path, arguments: Sequence[str | Path], env: dict[str, str] | None = None
) -> Command:
    """Runs a command that says ``... at http://HOST:PORT`` once it listens."""
    folder.mkdir(parents=True)
    log = folder / "output.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [str(a) for a in arguments],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
        )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        match = _URL.search(log.read_bytes())
        if match:
            port = int(match[1])
            wait_port(port, process, log)
            return Command(f"http://{HOST}:{port}", port, process, log)
        time.sleep(0.02)
    stop(process)
    raise ServerFailed(f"{process.args!r} names no URL:\n{log.read_text(errors='replace')[-4000:]}")


# --- the wire ------------------------------------------------------------------------------------


class Wire:
    """A TCP proxy that counts: everything on the wire between a client and one server.

    ``sent`` and ``received`` are the client's: bytes of HTTP both ways, heads included.
    """

    def __init__(self, target: str) -> None:
        parts = urllib.parse.urlsplit(target)
        if parts.hostname is None or parts.port is None:
            raise ValueError(f"no host and port in {target}")
        self._target = (parts.hostname, parts.port)
        self._path = parts.path.rstrip("/")
        self._lock = threading.Lock()
        self.sent = 0
        self.received = 0
        self.connections = 0
        self.requests = 0
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The target's URL through this wire."""
        return f"http://{HOST}:{self.port}{self._path}"

    def reset(self) -> None:
        """Counts anew from nothing."""
        with self._lock:
            self.sent = self.received = self.connections = self.requests = 0

    def close(self) -> None:
        """Ends all connections."""
        with self._lock:
            self._closed = True
            ends = list(self._open)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._thread.join(STOP_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                far = socket.create_connection(self._target, timeout=STOP_SECONDS)
            except OSError:  # the server is gone: so is the connection
                near.close()
                continue
            far.settimeout(None)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self.connections += 1
                self._open |= {near, far}
            pair = _Pair(near, far, self._forget)
            for source, sink, count in ((near, far, self._count_up), (far, near, self._count_down)):
                threading.Thread(target=pair.pump, args=(source, sink, count), daemon=True).start()

    def _forget(self, *ends: socket.socket) -> None:
        with self._lock:
            self._open -= set(ends)
        for end in ends:
            end.close()

    def _count_up(self, data: bytes) -> None:
        with self._lock:
            self.sent += len(data)
            # A request's head arrives whole and a body never looks like one here.
            self.requests += len(re.findall(rb"(?m)^[A-Z]+ \S+ HTTP/1\.[01]\r$", data))

    def _count_down(self, data: bytes) -> None:
        with self._lock:
            self.received += len(data)


class _Pair:
    """Two ends of one proxied connection; closed when both directions are done."""

    def __init__(self, near: socket.socket, far: socket.socket, done: Callable[..., None]) -> None:
        self._ends = (near, far)
        self._left = 2
        self._lock = threading.Lock()
        self._done = done

    def pump(
        self, source: socket.socket, sink: socket.socket, count: Callable[[bytes], None]
    ) -> None:
        try:
            while data := source.recv(65536):
                # Counted first: once the client has a byte, it is in the sum.
                count(data)
                sink.sendall(data)
        except OSError:
            # Reset by one side: the other learns of it below.
            pass
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._done(*self._ends)


# --- the one that misbehaves ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with an answer. All offsets and sizes count bytes of its body.

    ``times`` faults happen, then the path is served right; None: always. Combinations work.
    """

    status: int | None = None  #: answer with this status and a short text instead
    reset_at: int | None = None  #: connection reset (RST) after so many bytes
    truncate_at: int | None = None  #: connection closed in order after so many bytes
    stall_at: int | None = None  #: nothing more after so many bytes, connection held open
    drip: float | None = None  #: seconds between pieces of ``drip_size``
    drip_size: int = 1
    flip_at: int | None = None  #: this byte of the file has one bit turned
    length: int | None = None  #: Content-Length says this, whatever is sent
    no_length: bool = False  #: no Content-Length; the end of the connection ends the body
    ignore_range: bool = False  #: 200 and the whole file to a range
    wrong_range: int = 0  #: the range answered begins so many bytes later, and says the asked one
    extra: bytes = b""  #: sent behind the body
    body: bytes | None = None  #: this instead of the file
    headers: tuple[tuple[str, str], ...] = ()  #: further headers
    ranged: bool = False  #: only requests with a Range
    times: int | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """A request that arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class _State:
    root: Path
    faults: list[tuple[re.Pattern[str], Fault]] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)
    handler: Callable[[Seen], tuple[int, bytes] | None] | None = None

    def fault_for(self, path: str, ranged: bool) -> Fault:
        with self.lock:
            for place, (pattern, fault) in enumerate(self.faults):
                if not pattern.search(path) or (fault.ranged and not ranged):
                    continue
                if fault.times is None:
                    return fault
                if fault.times > 0:
                    self.faults[place] = (pattern, replace(fault, times=fault.times - 1))
                    return fault
        return Fault()


class Misbehaving:
    """A web server over a folder (HEAD, GET, single ranges, ETag) with faults path by path.

    server.fault(r"\\.pack$", truncate_at=1000, times=1)
    server.fault("", status=503)                  # every path
    server.handler = lambda seen: (200, b"...")   # before the files; None passes on
    """

    def __init__(self, root: Path) -> None:
        self._state = _State(root)
        state = self._state

        class Handler(_Handler):
            shared = state

        self._server = _Threaded((HOST, 0), Handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """Base URL without a slash at the end."""
        return f"http://{HOST}:{self.port}"

    @property
    def seen(self) -> list[Seen]:
        """The requests so far, in order of arrival."""
        with self._state.lock:
            return list(self._state.seen)

    @property
    def root(self) -> Path:
        """The folder it serves."""
        return self._state.root

    def fault(self, pattern: str, fault: Fault | None = None, **what: object) -> None:
        """Paths that match ``pattern`` (searched) go wrong; the first that fits counts."""
        made = fault if fault is not None else Fault(**what)  # type: ignore[arg-type]
        with self._state.lock:
            self._state.faults.append((re.compile(pattern), made))

    def heal(self) -> None:
        """No faults any more, and nothing seen."""
        with self._state.lock:
            self._state.faults.clear()
            self._state.seen.clear()

    def answer(self, handler: Callable[[Seen], tuple[int, bytes] | None] | None) -> None:
        """``handler`` is asked before the files: a status and a body, or None to pass on."""
        self._state.handler = handler

    def close(self) -> None:
        """Ends it, stalled answers included."""
        self._state.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(STOP_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Threaded(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no news here."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Cut(Exception):
    """The answer ends here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shared: _State
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base's name)
        """Silent: tests look at ``seen``."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        seen = Seen(
            self.command,
            self.path,
            {name.lower(): value for name, value in self.headers.items()},
            self.rfile.read(length),
        )
        with self.shared.lock:
            self.shared.seen.append(seen)
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        wanted = _single_range(seen.headers.get("range"))
        fault = self.shared.fault_for(path, wanted is not None)
        try:
            self._answer(seen, path, wanted, fault)
        except _Cut:
            self.close_connection = True

    def _answer(
        self, seen: Seen, path: str, wanted: tuple[int, int | None] | None, fault: Fault
    ) -> None:
        if fault.status is not None:
            self._send(fault.status, f"status {fault.status}\n".encode(), fault, {})
            return
        made = self.shared.handler(seen) if self.shared.handler else None
        if made is not None:
            self._send(made[0], made[1], fault, {})
            return
        file = (self.shared.root / path.lstrip("/")).resolve()
        inside = file.is_relative_to(self.shared.root.resolve())
        if fault.body is None and not (inside and file.is_file()):
            self._send(404, b"no such file\n", fault, {})
            return
        data = fault.body if fault.body is not None else file.read_bytes()
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if fault.body is None:
            stat = file.stat()
            headers["ETag"] = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'
            headers["Last-Modified"] = self.date_time_string(int(stat.st_mtime))
            if seen.headers.get("if-none-match") == headers["ETag"]:
                self._send(304, b"", fault, headers)
                return
        if fault.flip_at is not None and fault.flip_at < len(data):
            data = (
                data[: fault.flip_at]
                + bytes([data[fault.flip_at] ^ 0x10])
                + data[fault.flip_at + 1 :]
            )
        if wanted is None or fault.ignore_range:
            self._send(200, data, fault, headers)
            return
        first, last = wanted
        end = len(data) if last is None else min(last + 1, len(data))
        if first >= len(data) or end <= first:
            self._send(416, b"", fault, {"Content-Range": f"bytes */{len(data)}"})
            return
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
        shift = fault.wrong_range
        self._send(206, data[first + shift : end + shift], fault, headers)

    def _send(self, status: int, body: bytes, fault: Fault, headers: dict[str, str]) -> None:
        self.send_response(status, HTTPStatus(status).phrase)
        for name, value in (*headers.items(), *fault.headers):
            self.send_header(name, value)
        if fault.no_length:
            self.send_header("Connection", "close")
            self.close_connection = True
        elif status != HTTPStatus.NOT_MODIFIED:
            length = fault.length if fault.length is not None else len(body) + len(fault.extra)
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD" or status == HTTPStatus.NOT_MODIFIED:
            return
        self._body(body + fault.extra, fault)
        if fault.length is not None and fault.length != len(body) + len(fault.extra):
            raise _Cut

    def _body(self, body: bytes, fault: Fault) -> None:
        cuts = [
            (at, how)
            for at, how in (
                (fault.reset_at, self._reset),
                (fault.truncate_at, self._truncate),
                (fault.stall_at, self._stall),
            )
            if at is not None
        ]
        if cuts:
            at, how = min(cuts, key=lambda cut: cut[0])
            self._write(body[:at], fault)
            how()
        self._write(body, fault)

    def _write(self, data: bytes, fault: Fault) -> None:
        if fault.drip is None:
            self.wfile.write(data)
            return
        for start in range(0, len(data), fault.drip_size):
            self.wfile.write(data[start : start + fault.drip_size])
            if self.shared.closing.wait(fault.drip):
                raise _Cut

    def _reset(self) -> None:
        # Lingering for no time makes close() send RST.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0" + b"\0\0\0\0")
        self.connection.close()
        raise _Cut

    def _truncate(self) -> None:
        raise _Cut

    def _stall(self) -> None:
        self.shared.closing.wait()
        raise _Cut


def _single_range(text: str | None) -> tuple[int, int | None] | None:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", text or "")
    return (int(match[1]), int(match[2]) if match[2] else None) if match else None


# --- all of them for one test --------------------------------------------------------------------


class Servers:
    """Starts servers below one folder and stops them all, the last first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        # Proxy caches may be large.
        shutil.rmtree(self._folder, ignore_errors=True)

    def nginx(self, root: Path, *, gzip: bool = False, extra: str = "", http: str = "") -> Nginx:
        """Plain nginx over ``root``; ``gzip``: on, for everything. ``extra`` is server text."""
        server = f"root {root}; {GZIP_ALL if gzip else ''} {extra}"
        return self._nginx(server, http)

    def caching_proxy(self, target: str, *, gzip: bool = False, valid: str = "1h") -> Nginx:
        """nginx as a caching proxy in front of ``target``, no slices: ranges come from whole files.

        ``valid`` is how long it keeps answers without asking again, whatever they are.
        """
        zone = f"proxy_cache_path {self._next()} keys_zone=cache:1m max_size=1g inactive=1h;"
        server = f"""
            {GZIP_ALL if gzip else ""}
            location / {{
                proxy_pass {target};
                proxy_http_version 1.1;
                proxy_set_header Connection "";
                proxy_cache cache;
                proxy_cache_valid 200 206 {valid};
                proxy_cache_lock on;
                proxy_cache_revalidate on;
                add_header X-Cache $upstream_cache_status;
            }}
        """
        return self._nginx(server, zone)

    def in_front(self, root: Path, target: str) -> Nginx:
        """nginx that serves ``root`` itself and passes all that is not there to ``target``."""
        server = f"""
            root {root};
            location / {{ try_files $uri @api; }}
            location @api {{ proxy_pass {target}; proxy_http_version 1.1; }}
        """
        return self._nginx(server)

    def mirror(
        self, root: Path, *options: str | Path, env: dict[str, str] | None = None
    ) -> Command:
        """``tidings-mirror serve ROOT`` on uvicorn, with further options."""
        arguments: list[str | Path] = [sys.executable, "-m", "tidings_server.cli", "serve", root]
        arguments += ["--host", HOST, "--port", "0", *options]
        return self.command(arguments, env)

    def command(
        self, arguments: Sequence[str | Path], env: dict[str, str] | None = None
    ) -> Command:
        """Any command that prints its URL once it listens."""
        command = start_command(self._next(), arguments, env)
        self._stack.callback(command.stop)
        return command

    def misbehaving(self, root: Path) -> Misbehaving:
        """A server with faults over ``root``."""
        return self._stack.enter_context(Misbehaving(root))

    def wire(self, target: str) -> Wire:
        """A counting wire to ``target``."""
        return self._stack.enter_context(Wire(target))

    def _nginx(self, server: str, http: str = "") -> Nginx:
        nginx = start_nginx(self._next(), server, http)
        self._stack.callback(nginx.stop)
        return nginx

    def _next(self) -> Path:
        self._count += 1
        return self._folder / f"{self._count:02d}"
