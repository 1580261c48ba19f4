"""uvicorn's HTTP protocol with bounds on what a client may hold: connections, bytes and seconds.

uvicorn waits for ever for a head, for the rest of a body that nobody reads, and for a client that
does not take its answer; it gathers heads, trailers and pipelined requests without bound. Here
one look at all connections every few seconds ends what is over its time (no timer is set for a
request), and the parser's callbacks count what they are given. docs/protocol.md has the table.
"""

from __future__ import annotations

import asyncio
import fcntl
import heapq
import os
import socket
import struct
import sys
import termios
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from tidings_chunkstore.limits import KIB, MIB

HEAD_MAX = 32 * KIB  #: bytes of a request's head
PIPELINED = 64  #: requests that may wait behind the one that is answered
LINGER_MAX = 1 * MIB  #: bytes of a body that are read and dropped once its request is answered
LEAST_TAKEN = 16 * KIB  #: bytes of an answer that a client takes within the patience, or all of it
UNSENT_MAX = 256 * MIB  #: bytes of answers that wait in memory for their clients, of all of them
KEEP_ALIVE = 75  #: seconds; what web servers grant, so that a client's next request finds it open

_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 10\r\ncontent-type: text/plain\r\n"
    b"content-length: 5\r\nconnection: close\r\n\r\nbusy\n"
)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one process grants: connections at a time, and a client's time in seconds."""

    connections: int
    #: For a request's head, for its body, and for each LEAST_TAKEN bytes of an answer.
    patience: float


class Stage(IntEnum):
    """How much of a request has come."""

    NEW = 0  #: of a connection: nothing yet
    HEAD = 1
    BODY = 2  #: the head is whole
    WHOLE = 3


def longest_idle(idle: Sequence[tuple[str, float]], count: int) -> list[int]:
    """Which *count* of the idle connections (address, idle since) to close, by their places.

    The longest idle one of the address that has the most, again and again: who holds many pays
    for the room that others need.
    """
    of: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    for place, (address, since) in enumerate(idle):
        of[address].append((since, place))
    for held in of.values():
        held.sort(reverse=True)
    most = [(-len(held), address) for address, held in of.items()]
    heapq.heapify(most)
    chosen: list[int] = []
    while most and len(chosen) < count:
        left, address = most[0]
        chosen.append(of[address].pop()[1])
        if left == -1:
            heapq.heappop(most)
        else:
            heapq.heapreplace(most, (left + 1, address))
    return chosen


class Connections:
    """All connections of a process; made before it, so that it can be handed to workers."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._held: set[Bounded] = set()
        self._looking = False

    def enter(self, new: Bounded) -> bool:
        """Take a connection in, if need be in the place of idle ones; whether there was room."""
        if len(self._held) >= self.bounds.connections:
            idle = [held for held in self._held if held.is_idle()]
            # Some at a time: a look at all of them for each new one would be work for nothing.
            wanted = max(1, self.bounds.connections // 64)
            for place in longest_idle([(held.address, held.since) for held in idle], wanted):
                self._held.discard(idle[place])
                idle[place].cut()
            if len(self._held) >= self.bounds.connections:
                return False
        self._held.add(new)
        if not self._looking:
            self._looking = True
            self._again(new.loop)
        return True

    def leave(self, gone: Bounded) -> None:
        """Forget a connection."""
        self._held.discard(gone)

    def _again(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_later(min(2.0, self.bounds.patience / 8), self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        unsent: list[tuple[int, Bounded]] = []
        for held in list(self._held):
            held.look(now)
            size = held.transport.get_write_buffer_size()
            if size:
                unsent.append((size, held))
        total = sum(size for size, _ in unsent)
        if total > UNSENT_MAX:
            unsent.sort(key=lambda item: item[0])
            while total > UNSENT_MAX:
                size, slowest = unsent.pop()
                slowest.cut()
                total -= size
        self._looking = bool(self._held)
        if self._looking:
            self._again(loop)


class Bounded(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        connections: Connections,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._all = connections
        self._patience = connections.bounds.patience
        self.address = ""
        self.since = 0.0  #: when its stage, or its being idle, began
        self._stage = Stage.NEW
        self._answered: RequestResponseCycle | None = None
        self._unparsed = 0  # bytes of a head that is not whole yet
        self._fields = 0  # bytes of a head's fields
        self._hosts = 0
        self._dropped = 0  # bytes of a body that came after the answer
        self._mark: tuple[float, int] | None = None  # when so many bytes were not taken yet

    # -- the connection ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called with a new connection."""
        super().connection_made(transport)
        self.since = self.loop.time()
        self.address = self.client[0] if self.client else ""
        if not self._all.enter(self):
            transport.write(_BUSY)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when it is gone."""
        self._all.leave(self)
        self._unset_keepalive_if_required()
        self.pipeline.clear()
        # uvicorn tells the request that came last, which need not be the one that is answered.
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        """Called when the client has taken the most of what was written."""
        self._mark = None
        super().resume_writing()

    def is_idle(self) -> bool:
        """Whether nothing is answered: between requests, or in a head that is not whole yet."""
        return (
            self.cycle is None or self.cycle.response_complete
        ) and not self.transport.get_write_buffer_size()

    def cut(self) -> None:
        """End it with a reset: what the client does not take shall not wait in the kernel."""
        link = self.transport.get_extra_info("socket")
        if link is not None:
            with suppress(OSError), socket.socket(fileno=os.dup(link.fileno())) as same:
                same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def look(self, now: float) -> None:
        """End what is over its time."""
        transport = self.transport
        unsent = transport.get_write_buffer_size()
        if unsent:
            self._look_at_answer(now, unsent + in_kernel(transport))
        else:
            self._mark = None
        if transport.is_closing():
            return
        waited = now - self.since
        if self._stage <= Stage.HEAD:
            late = waited > self._patience
        elif self.cycle is None or not self.cycle.response_complete:
            return
        elif self._stage is Stage.BODY:
            late = waited > self._patience
        else:  # bytes that begin no request have stopped uvicorn's own timer
            late = waited > KEEP_ALIVE + self._patience
        if late:
            self.cut()

    def _look_at_answer(self, now: float, unsent: int) -> None:
        if self._mark is None:
            self._mark = (now, unsent)
        elif now > self._mark[0] + self._patience:
            if unsent > self._mark[1] - LEAST_TAKEN:
                self.cut()
            self._mark = (now, unsent)

    # -- what comes --------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Called with what came."""
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Answered as if it had not been asked for; what follows may be anything.
            self.cycle.keep_alive = False
            self.flow.pause_reading()
            return
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
            return
        if self._stage is Stage.HEAD:
            self._unparsed += len(data)
            if self._unparsed > HEAD_MAX:
                self.send_400_response("Request head too large.")
        elif self._stage is Stage.BODY and self.cycle.response_complete:
            self._dropped += len(data)
            if self._dropped > LINGER_MAX:
                self.cut()

    def send_400_response(self, msg: str) -> None:
        """Refuse what came; never into the middle of another request's answer."""
        if self.transport.is_closing():
            return
        if self._stage is Stage.BODY or (self.cycle and not self.cycle.response_complete):
            self.cut()
        else:
            super().send_400_response(msg)

    def on_message_begin(self) -> None:
        """Called at a request's first byte."""
        self._stage = Stage.HEAD
        self.since = self.loop.time()
        self._unparsed = self._fields = self._hosts = self._dropped = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called with a field of the head, and of a chunked body's trailer, which nobody wants."""
        if self._stage is not Stage.HEAD:
            return
        self._fields += len(name) + len(value) + 4
        if self._fields > HEAD_MAX:
            raise ValueError("too large")
        super().on_header(name, value)
        if self.headers[-1][0] == b"host":
            self._hosts += 1

    def on_headers_complete(self) -> None:
        """Called at the end of a request's head."""
        # RFC 9112, 3.2: one Host, and with HTTP/1.1 not none.
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1") or self._hosts > 1 or self._hosts < (version == "1.1"):
            raise ValueError("another HTTP, no Host, or several")
        if len(self.url) > HEAD_MAX or len(self.pipeline) >= PIPELINED:
            raise ValueError("too much")
        super().on_headers_complete()
        self._stage = Stage.BODY
        self.since = self.loop.time()

    def on_message_complete(self) -> None:
        """Called at the end of a request."""
        self._stage = Stage.WHOLE
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Called when a request is answered."""
        self.since = self.loop.time()
        super().on_response_complete()


def in_kernel(transport: asyncio.Transport) -> int:
    """Bytes that the kernel holds for the peer, sent and not acknowledged, or not sent."""
    link = transport.get_extra_info("socket")
    if link is None or sys.platform != "linux":
        return 0
    try:
        left = fcntl.ioctl(link.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
    except OSError:  # closed this moment
        return 0
    return int(struct.unpack("i", left)[0])
