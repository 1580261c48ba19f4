"""uvicorn's HTTP protocol with bounds on a request's head, in bytes and seconds."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_MAX = 32 * 1024  #: bytes of a request's head
HEAD_SECONDS = 30.0  #: in which it must have come, and the first one after connecting


class Bounded(HttpToolsProtocol):
    """httptools gathers a head without bound, and uvicorn waits for it for ever."""

    _in_head = True
    _head_bytes = 0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called with a new connection."""
        super().connection_made(transport)
        self._late = self.loop.call_later(HEAD_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when it is gone."""
        self._on_time()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Called at a request's first byte."""
        self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Called at the end of a request's head."""
        self._in_head = False
        self._on_time()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Called with what came: the part of a head that is not whole yet is counted."""
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > HEAD_MAX:
            self.send_400_response("Request head too large.")
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _on_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
