"""httpx on top of sockets that are counted and can be cut off.

httpx has no place to count what a request costs on the wire, headers and all, nor a deadline for
a peer that sends one byte a minute. Both live in a network backend of httpcore (a public
extension point), below the connections and above TLS: what is counted is what HTTP wrote and read.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import httpcore
import httpx

from tidings_chunkstore.errors import InputError, NetworkError

from .mirrors import Failed

if TYPE_CHECKING:
    from .guard import Guard

#: What a request can raise when the network or the peer is at fault.
NETWORK_ERRORS = (
    httpx.TransportError,
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
    httpcore.UnsupportedProtocol,
)
TIMEOUTS = (httpx.TimeoutException, httpcore.TimeoutException)
#: Those that say the mirror cannot be reached at all.
UNREACHABLE = (httpcore.ConnectError, httpcore.ConnectTimeout, httpcore.ProxyError)

_KEEPALIVE = 4.0  # seconds; uvicorn closes idle connections after 5


class Meter:
    """Counts the bytes of all connections, holds each thread's deadline, and can cut all off."""

    def __init__(self) -> None:
        self.received = 0  #: bytes
        self.sent = 0  #: bytes
        self.on_bytes: Callable[[int], None] | None = None  #: called with each read's size
        self._lock = threading.Lock()
        self._streams: set[_Stream] = set()
        self._thread = threading.local()
        self._cut = False

    @contextlib.contextmanager
    def deadline(self, at: float) -> Iterator[None]:
        """Reads and writes of this thread inside the block end at *at* (time.monotonic)."""
        before = getattr(self._thread, "at", None)
        self._thread.at = at if before is None else min(at, before)
        try:
            yield
        finally:
            self._thread.at = before

    def timeout(self, timeout: float | None) -> float | None:
        """*timeout* (seconds), or what the deadline leaves of it. Raises ReadTimeout."""
        at = getattr(self._thread, "at", None)
        if at is None:
            return timeout
        left = float(at) - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("took longer than allowed in total")
        return left if timeout is None else min(timeout, left)

    def count(self, received: int, sent: int) -> None:
        """Add to the counters."""
        with self._lock:
            self.received += received
            self.sent += sent
        if received and self.on_bytes is not None:
            self.on_bytes(received)

    def opened(self, stream: _Stream) -> None:
        """Keep *stream* until it is closed."""
        with self._lock:
            self._streams.add(stream)
            cut = self._cut
        if cut:
            stream.shutdown()

    def closed(self, stream: _Stream) -> None:
        """Forget *stream*."""
        with self._lock:
            self._streams.discard(stream)

    def cut(self) -> None:
        """End what all threads are reading or writing, now and from now on."""
        with self._lock:
            self._cut = True
            streams = list(self._streams)
        for stream in streams:
            stream.shutdown()


class _Stream(httpcore.NetworkStream):
    """A connection, counted."""

    def __init__(self, inner: httpcore.NetworkStream, meter: Meter) -> None:
        self._inner = inner
        self._meter = meter
        meter.opened(self)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = self._inner.read(max_bytes, self._meter.timeout(timeout))
        self._meter.count(len(data), 0)
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, self._meter.timeout(timeout))
        self._meter.count(0, len(buffer))

    def close(self) -> None:
        self._meter.closed(self)
        self._inner.close()

    def shutdown(self) -> None:
        """Wake the thread that waits on it; that thread closes it."""
        raw = self._inner.get_extra_info("socket")
        if raw is not None:
            with contextlib.suppress(OSError):  # the peer was quicker
                raw.shutdown(socket.SHUT_RDWR)

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        inner = self._inner.start_tls(ssl_context, server_hostname, self._meter.timeout(timeout))
        self._meter.closed(self)
        return _Stream(inner, self._meter)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Backend(httpcore.NetworkBackend):
    """Opens connections that are counted, and only where *guard* allows it."""

    def __init__(self, meter: Meter, guard: Guard | None) -> None:
        self._inner = httpcore.SyncBackend()
        self._meter = meter
        self._guard = guard

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        problem: Exception | None = None
        for address in self._addresses(host):
            try:
                stream = self._inner.connect_tcp(
                    address, port, self._meter.timeout(timeout), local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                problem = error
                continue
            return _Stream(stream, self._meter)
        assert problem is not None
        raise problem

    def _addresses(self, host: str) -> Iterable[str]:
        """What to connect to: the name, or the addresses that were looked at. Raises Failed."""
        if self._guard is None:
            return (host,)
        try:
            return self._guard.addresses(host) or (host,)
        except NetworkError as error:
            raise Failed(error) from error

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


class _Body(httpx.SyncByteStream):
    """An answer's body, as httpx wants it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        self._stream.close()


class Transport(httpx.BaseTransport):
    """Connection pools: one direct, one for each proxy that the environment names.

    They and the TLS settings are made when first needed: loading the trust store costs more time
    than an update over plain HTTP.
    """

    def __init__(self, meter: Meter, connections: int, guard: Guard | None = None) -> None:
        self._meter = meter
        self._guard = guard
        self._connections = connections
        self._pools: dict[str, httpcore.ConnectionPool] = {}
        self._tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        answer = self._pool(url).handle_request(
            httpcore.Request(
                method=request.method,
                url=httpcore.URL(
                    scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
                ),
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        return httpx.Response(
            status_code=answer.status,
            headers=answer.headers,
            stream=_Body(answer.stream),
            extensions=answer.extensions,
        )

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()

    def _pool(self, url: httpx.URL) -> httpcore.ConnectionPool:
        proxy = proxy_for(url)
        key = f"{proxy} {url.scheme == 'https'}"
        with self._lock:
            if key not in self._pools:
                self._pools[key] = self._make(proxy, url.scheme == "https")
            return self._pools[key]

    def _make(self, proxy: str | None, tls: bool) -> httpcore.ConnectionPool:
        if self._tls is None and (tls or (proxy or "").startswith("https:")):
            self._tls = httpx.create_ssl_context()
        # Without a context httpcore would load the trust store even for plain HTTP.
        context = self._tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        common: dict[str, Any] = {
            "ssl_context": context,
            "max_connections": self._connections,
            "keepalive_expiry": _KEEPALIVE,
            # A proxy is the caller's own, and judges addresses itself.
            "network_backend": _Backend(self._meter, self._guard if proxy is None else None),
        }
        if proxy is None:
            return httpcore.ConnectionPool(**common)
        at = httpx.URL(proxy)
        auth = (at.username.encode(), at.password.encode()) if at.userinfo else None
        plain = str(at.copy_with(username=None, password=None))
        if at.scheme in ("http", "https"):
            if at.scheme == "https":
                common["proxy_ssl_context"] = context
            return httpcore.HTTPProxy(proxy_url=plain, proxy_auth=auth, **common)
        if at.scheme in ("socks5", "socks5h"):
            try:
                return httpcore.SOCKSProxy(proxy_url=plain, proxy_auth=auth, **common)
            except RuntimeError as error:  # httpcore without socksio
                raise InputError(
                    "a SOCKS proxy needs the package socksio (httpx[socks])", code="bad-proxy"
                ) from error
        raise InputError(f"not a proxy that can be used: {plain[:200]}", code="bad-proxy")


def proxy_for(url: httpx.URL) -> str | None:
    """The proxy that the environment's http_proxy, https_proxy, all_proxy and no_proxy name."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(url.netloc.decode()):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"
