"""The wire: a TCP proxy on loopback that counts every byte both ways, headers included.

It also reads along: HTTP's frames (RFC 9112) say where a request and its answer begin and end,
so each exchange has its own bytes, and what a shared cache could have answered is known.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import urllib.parse
from collections import deque
from dataclasses import dataclass, field
from typing import Self

HOST = "127.0.0.1"
_BLOCK = 65536
_HEAD_LIMIT = 65536
_PATIENCE = 10.0  # seconds
_HASH = re.compile(r"[0-9a-f]{16}")
_FRESH = re.compile(r"(?:s-maxage|max-age)=[1-9]")


@dataclass(slots=True)
class Exchange:
    """A request and its answer. Bytes are HTTP's, heads included."""

    method: str
    path: str
    ranged: bool
    sent: int = 0
    received: int = 0
    status: int = 0
    control: str = ""  #: the answer's Cache-Control

    @property
    def shared(self) -> bool:
        """Whether a cache at a site's border, as they are set up, answers it the second time.

        A whole object that is hash-named, or that its server calls fresh. A range is not: most
        caches pass ranges through.
        """
        if self.method != "GET" or self.status != 200 or self.ranged:
            return False
        if "no-cache" in self.control or "no-store" in self.control or "private" in self.control:
            return False
        return bool(_FRESH.search(self.control) or _HASH.search(self.path))


@dataclass(frozen=True, slots=True)
class Traffic:
    """What crossed the wire. Bytes as the client sees them."""

    received: int
    sent: int
    connections: int
    parallel: int  #: connections that were open at the same time, at most
    exchanges: tuple[Exchange, ...] = ()


class Wire:
    """A counting proxy to one server.

    *http*: False for another protocol, whose bytes are counted and not read.
    """

    def __init__(self, target: str, *, http: bool = True) -> None:
        parts = urllib.parse.urlsplit(target)
        if parts.hostname is None or parts.port is None:
            raise ValueError(f"no host and port in {target}")
        self._target = (parts.hostname, parts.port)
        self._rest = parts.path.rstrip("/")
        self._scheme = parts.scheme
        self._http = http
        self._lock = threading.Lock()
        self._received = self._sent = self._connections = self._parallel = 0
        self._exchanges: list[Exchange] = []
        self._open: set[_Pair] = set()
        self._listener = socket.create_server((HOST, 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The target's URL by way of this wire."""
        return f"{self._scheme}://{HOST}:{self.port}{self._rest}"

    def traffic(self) -> Traffic:
        """What crossed since the last ``reset``."""
        with self._lock:
            return Traffic(
                self._received,
                self._sent,
                self._connections,
                self._parallel,
                tuple(self._exchanges),
            )

    def reset(self) -> None:
        """Count anew from nothing. Call it between clients: an open connection is cut."""
        with self._lock:
            pairs = list(self._open)
        for pair in pairs:
            pair.cut()
        with self._lock:
            self._received = self._sent = self._connections = self._parallel = 0
            self._exchanges = []

    def close(self) -> None:
        """End it and all its connections."""
        with contextlib.suppress(OSError):  # not connected: nothing waits in accept
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            pairs = list(self._open)
        for pair in pairs:
            pair.cut()
        self._thread.join(_PATIENCE)

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
                far = socket.create_connection(self._target, timeout=_PATIENCE)
            except OSError:  # the server is gone: so is the connection
                near.close()
                continue
            far.settimeout(None)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = _Pair(near, far, self)
            with self._lock:
                self._open.add(pair)
                self._connections += 1
                self._parallel = max(self._parallel, len(self._open))
            pair.start()

    def count(self, reader: HttpReader | None, data: bytes, *, up: bool) -> None:
        """Add *data*, going up to the server or down from it."""
        with self._lock:
            if up:
                self._sent += len(data)
            else:
                self._received += len(data)
            if reader is not None:
                self._exchanges += reader.feed(data, up=up)

    def reader(self) -> HttpReader | None:
        """What reads along on a new connection."""
        return HttpReader() if self._http else None

    def forget(self, pair: _Pair) -> None:
        """*pair* is closed."""
        with self._lock:
            self._open.discard(pair)


class _Pair:
    """One proxied connection: two sockets, a thread each way, closed when both are done."""

    def __init__(self, near: socket.socket, far: socket.socket, wire: Wire) -> None:
        self._near, self._far = near, far
        self._wire = wire
        self._reader = wire.reader()
        self._left = 2
        self._lock = threading.Lock()
        self._done = threading.Event()

    def start(self) -> None:
        for up in (True, False):
            threading.Thread(target=self._pump, args=(up,), daemon=True).start()

    def cut(self) -> None:
        """End it now."""
        for end in (self._near, self._far):
            with contextlib.suppress(OSError):  # closed already
                end.shutdown(socket.SHUT_RDWR)
        self._done.wait(_PATIENCE)

    def _pump(self, up: bool) -> None:
        source, sink = (self._near, self._far) if up else (self._far, self._near)
        try:
            while data := source.recv(_BLOCK):
                # Counted first: once the other side has a byte, it is in the sum.
                self._wire.count(self._reader, data, up=up)
                sink.sendall(data)
        except OSError:
            pass  # reset by one side; the other learns of it below
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._wire.forget(self)
            self._near.close()
            self._far.close()
            self._done.set()


@dataclass(slots=True)
class _Side:
    """One direction of a connection: a head being collected, or a body being passed over."""

    head: bytearray = field(default_factory=bytearray)
    body: int | None = 0  #: bytes of the body to come; None: until the connection ends
    chunked: bool = False
    line: bytearray = field(default_factory=bytearray)  #: a chunk's size, a trailer
    last: bool = False  #: the chunk of size 0 was seen: trailers follow


class HttpReader:
    """Follows the HTTP/1.1 messages of one connection without changing them."""

    def __init__(self) -> None:
        self._up = _Side()
        self._down = _Side()
        self._waiting: deque[Exchange] = deque()
        self._asking: Exchange | None = None
        self._answered: Exchange | None = None

    def feed(self, data: bytes, *, up: bool) -> list[Exchange]:
        """Read on; the exchanges that began with *data*."""
        begun: list[Exchange] = []
        position = 0
        while position < len(data):
            taken = self._feed_up(data, position, begun) if up else self._feed_down(data, position)
            position += taken
        return begun

    def _feed_up(self, data: bytes, position: int, begun: list[Exchange]) -> int:
        side = self._up
        if side.body or side.chunked:
            taken = _pass_over(side, data, position)
            if self._asking is not None:
                self._asking.sent += taken
            return taken
        taken, head = _collect(side, data, position)
        if head is not None:
            lines, fields = _parse(head)
            words = lines.split(" ")
            exchange = Exchange(
                words[0], words[1] if len(words) > 1 else "", "range" in fields, sent=len(head)
            )
            begun.append(exchange)
            self._waiting.append(exchange)
            self._asking = exchange
            _frame(side, fields, bodiless=False, request=True)
        return taken

    def _feed_down(self, data: bytes, position: int) -> int:
        side = self._down
        if side.body is None or side.body or side.chunked:
            taken = _pass_over(side, data, position)
            if self._answered is not None:
                self._answered.received += taken
            return taken
        taken, head = _collect(side, data, position)
        if head is not None:
            first, fields = _parse(head)
            words = first.split(" ")
            status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
            exchange = self._waiting[0] if self._waiting else Exchange("", "", ranged=False)
            exchange.received += len(head)
            if 100 <= status < 200:
                return taken  # the answer proper follows
            if self._waiting:
                self._waiting.popleft()
            exchange.status = status
            exchange.control = fields.get("cache-control", "").lower()
            self._answered = exchange
            bodiless = exchange.method == "HEAD" or status in (204, 304)
            _frame(side, fields, bodiless=bodiless, request=False)
        return taken


def _collect(side: _Side, data: bytes, position: int) -> tuple[int, bytes | None]:
    """Take bytes of a head up to its empty line: how many, and the head once it is whole."""
    before = len(side.head)
    side.head += data[position : position + _HEAD_LIMIT]
    end = side.head.find(b"\r\n\r\n", max(0, before - 3))
    if end < 0:
        if len(side.head) > _HEAD_LIMIT:
            side.body = None  # not HTTP: count on, read no more
        return len(side.head) - before, None
    head = bytes(side.head[: end + 4])
    side.head.clear()
    return len(head) - before, head


def _parse(head: bytes) -> tuple[str, dict[str, str]]:
    """First line, and fields by their names in lower case."""
    first, *lines = head.decode("latin-1").split("\r\n")
    fields = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields[name.strip().lower()] = value.strip()
    return first, fields


def _frame(side: _Side, fields: dict[str, str], *, bodiless: bool, request: bool) -> None:
    """Set how the body of a message ends (RFC 9112, section 6.3)."""
    side.body, side.chunked, side.last = 0, False, False
    if bodiless:
        return
    if "chunked" in fields.get("transfer-encoding", "").lower():
        side.chunked = True
    elif fields.get("content-length", "").isdigit():
        side.body = int(fields["content-length"])
    elif not request:
        side.body = None


def _pass_over(side: _Side, data: bytes, position: int) -> int:
    """Take bytes of a body: how many."""
    left = len(data) - position
    if side.body is None:
        return left
    if side.body:
        taken = min(left, side.body)
        side.body -= taken
        return taken
    # Chunked, between two chunks: a line with a size, an empty one behind a chunk, or a trailer.
    end = data.find(b"\n", position)
    stop = end + 1 if end >= 0 else len(data)
    side.line += data[position:stop]
    if end >= 0:
        line = bytes(side.line).strip()
        side.line.clear()
        if side.last:
            side.chunked = bool(line)
        elif line:
            try:
                side.body = int(line.split(b";")[0], 16)
            except ValueError:
                side.body = None
            side.last = side.body == 0
    return stop - position
