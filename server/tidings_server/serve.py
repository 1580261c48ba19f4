"""``tidings-mirror serve``: the application on uvicorn, in one process or several."""

from __future__ import annotations

import asyncio
import functools
import logging
import resource
import socket
import sys
from pathlib import Path
from typing import cast

import uvicorn
from uvicorn.supervisors import Multiprocess

from tidings_chunkstore.errors import InputError, LocalError
from tidings_chunkstore.limits import KIB
from tidings_client.exits import Exit

from . import logs
from .app import Front, make_app
from .metrics_store import forget_dead, values_folder
from .orphans import end_with_parent
from .protocol import KEEP_ALIVE, Bounded, Bounds, Connections
from .settings import ServeSettings, Settings

_GRACE = 10  # seconds for answers under way when told to stop
_BACKLOG = 1024
_OWN_FILES = 128  # descriptors besides two for each connection: itself, and what it is sent
_UNSENT = 256 * KIB  # bytes of an answer that wait in the kernel before it is sent

log = logging.getLogger("tidings.serve")


def serve(settings: Settings) -> Exit:
    """Serve until told to stop by SIGTERM or SIGINT.

    Raises InputError when there is nothing to serve, LocalError when it cannot listen.
    """
    wanted = settings.serve
    for folder in (wanted.root, wanted.store):
        if folder is not None and not folder.is_dir():
            raise InputError(f"{folder} is no folder", code="no-folder")
    pulled = settings.pulled if wanted.pull_through else ()
    if wanted.pull_through and not pulled:
        raise InputError("nothing to pull through: no [[repo]] has an upstream and no root")
    if wanted.root is None and wanted.store is None and not settings.repos and not pulled:
        raise InputError("nothing to serve: name ROOT, or [[repo]] in the settings")
    listener = _listen(wanted)
    bounds = Bounds(_affordable(wanted.connections), float(wanted.patience))
    config = uvicorn.Config(
        functools.partial(worker_app, settings),
        factory=True,
        http=cast(type[asyncio.Protocol], functools.partial(Bounded, Connections(bounds))),
        ws="none",
        lifespan="on",
        workers=wanted.workers,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=_GRACE,
        backlog=_BACKLOG,
    )
    what = wanted.root or wanted.store or f"{len(settings.repos) + len(pulled)} repositories"
    line = f"serving {what} at http://{_address(listener)}"
    if wanted.workers > 1:
        # Connections wait in the backlog until the first worker is up.
        listener.listen(_BACKLOG)
        print(line, file=sys.stderr, flush=True)
        with values_folder(wanted.workers) as folder:
            _Workers(config, [listener], folder).run()
        return Exit.OK
    server = _Server(config, line)
    try:
        with values_folder(1):
            server.run([listener])
    except KeyboardInterrupt:
        pass  # uvicorn has stopped cleanly and passes the signal on
    finally:
        listener.close()
    if not server.started:
        raise LocalError("the server did not start")
    return Exit.OK


def worker_app(settings: Settings) -> Front:
    """The application in each process."""
    logs.set_up()
    end_with_parent()
    affordable = _affordable(settings.serve.connections)
    if affordable < settings.serve.connections:
        log.warning("%d connections at a time: more need a higher limit of open files", affordable)
    return make_app(settings)


class _Server(uvicorn.Server):
    """Says where it is once it accepts connections."""

    def __init__(self, config: uvicorn.Config, line: str) -> None:
        super().__init__(config)
        self._line = line

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._line, file=sys.stderr, flush=True)


class _Workers(Multiprocess):
    """Forgets how workers were that are gone."""

    def __init__(
        self, config: uvicorn.Config, sockets: list[socket.socket], folder: Path | None
    ) -> None:
        super().__init__(config, sockets)
        self._folder = folder
        self._alive: list[int | None] = []

    def keep_subprocess_alive(self) -> None:
        """Called twice a second."""
        super().keep_subprocess_alive()
        alive = [process.pid for process in self.processes]
        if self._folder is not None and alive != self._alive:
            self._alive = alive
            forget_dead(self._folder, [pid for pid in alive if pid is not None])


def _listen(wanted: ServeSettings) -> socket.socket:
    """A bound socket. Raises LocalError."""
    try:
        found = socket.getaddrinfo(
            wanted.host, wanted.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            # Connections inherit it: who reads slowly holds this much, not megabytes.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
        listener.bind(address)
    except OSError as error:
        raise LocalError(
            f"cannot listen on {wanted.host} port {wanted.port}: {error.strerror}", code="listen"
        ) from error
    listener.set_inheritable(True)
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _affordable(connections: int) -> int:
    """The connections that the limit of open files allows; it is raised as far as it may be."""
    needed = 2 * connections + _OWN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return connections
    return max(1, (soft - _OWN_FILES) // 2)
