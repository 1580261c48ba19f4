"""One pulled repository in one server process: what is held, and one look at a time for more.

Looks happen in processes of their own (``edge_worker``); a lock file
makes it one at a time over all server processes. A few go on at a time, two at most at one host.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, replace
from typing import Protocol
from urllib.parse import urlsplit

from tidings_chunkstore.errors import LocalError, TidingsError

from .edge_rules import Do, decide
from .edge_states import Held, Problem, Status, View
from .edge_worker import WAITING, Looked
from .settings import PulledSettings

log = logging.getLogger("tidings.edge")

_COLD = 25.0  # seconds a request waits when nothing is held: below the 30 that clients wait
_WARM = 10.0  # seconds a look may take before what is held is given out
_LONGEST = 900.0  # seconds one look may take; what it fetched is kept for the next
_AT_ONCE = 8  # looks at a time in one process
_AT_ONE_HOST = 2  # of these, so that a host that hangs leaves room for the others


class Told(Protocol):
    """Who wants to know; ``metrics.Metrics`` is one."""

    def upstream(
        self, repository: str, *, good: bool, received: int, whole: int, seconds: float
    ) -> None:
        """A look ended: bytes received, and of the whole files that came of it."""

    def edge(self, repository: str, state: str) -> None:
        """A request was answered: ``fresh``, ``stale``, ``redirect``, ``missing``, ``failed``."""


class Stopping(Exception):
    """The server was told to stop while a request waited."""


class Upstream:
    """One pulled repository in one server process."""

    def __init__(
        self, settings: PulledSettings, held: Held, fresh: float, budget: int, pool: Pool
    ) -> None:
        self.path = settings.path
        self.held = held
        self.fresh = float(settings.upstream.every or fresh)
        self._settings = settings
        self._budget = budget
        self._pool = pool
        self._view = View()
        self._reading = asyncio.Lock()
        self._look: asyncio.Task[None] | None = None
        self._started = 0.0
        self._last = Status(settings.path)  # of this process: a full disk keeps no status

    def base(self, view: View) -> str | None:
        """The base URL that packages are redirected to; None where none is known yet."""
        if view.status.upstream:
            return view.status.upstream
        return next(iter(self._settings.upstream.urls), None)

    def likely_base(self) -> str | None:
        """The same by what this process has seen: no I/O."""
        return self.base(self._view)

    async def view(self) -> View:
        """What is held now. Raises LocalError."""
        # A local file system answers from memory; a thread would cost 20 times as much.
        if self.held.signature() == self._view.signature:
            return self._view
        async with self._reading:
            if self.held.signature() != self._view.signature:
                loop = asyncio.get_running_loop()
                self._view = await loop.run_in_executor(
                    self._pool.threads, self.held.view, self._view
                )
            return self._view

    def status(self, view: View) -> Status:
        """The last look, this process's own where it could not be written."""
        own = self._last.looks
        return self._last if own.checked > view.status.looks.checked else view.status

    async def renewed(self) -> View:
        """What is held after asking the upstream if that is due.

        Raises LocalError, and Stopping when the server is told to stop meanwhile.
        """
        view = await self.view()
        held = view.current is not None
        now = time.time()
        if decide(self.status(view).looks, held, now, self.fresh) is not Do.FETCH:
            return view
        if self._look is None:
            self._started = time.monotonic()
            self._look = asyncio.ensure_future(self._run(now))
            self._look.add_done_callback(self._done)
        # With something in hand, all wait for the same moment; else each for its own.
        patience = self._started + _WARM - time.monotonic() if held else _COLD
        if patience > 0:
            try:
                await asyncio.wait([self._look], timeout=patience)
            except asyncio.CancelledError as error:
                # The server cancels at the end of its grace, and nothing was sent yet.
                raise Stopping from error
        return await self.view()

    @property
    def looking(self) -> bool:
        """Whether the upstream is being asked right now."""
        return self._look is not None

    async def close(self) -> None:
        """Stop what is under way; what it fetched is kept."""
        if self._look is not None:
            self._look.cancel()
            await asyncio.gather(self._look, return_exceptions=True)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._look = None
        if not task.cancelled() and task.exception() is not None:
            log.error("%s: a look at the upstream failed", self.path, exc_info=task.exception())

    async def _run(self, asked: float) -> None:
        before = self._last
        try:
            looked = await self._looked(asked)
            now = looked.status
            if now.error is not None and now.error.local:
                # A disk that takes nothing counts no failures.
                failures = max(now.looks.failures, before.looks.failures + 1)
                now = replace(now, looks=replace(now.looks, failures=failures))
            self._last = now
            if looked.mine and self._pool.told is not None:
                self._pool.told.upstream(
                    self.path,
                    good=now.error is None,
                    received=looked.received,
                    whole=looked.full,
                    seconds=now.seconds,
                )
        except TimeoutError:
            text = f"a look took more than {_LONGEST:.0f} s; the next goes on from there"
            self._failed(Problem("timeout", text))
        except (OSError, ValueError, TidingsError) as error:
            self._failed(Problem("worker", str(error) or type(error).__name__, local=True))
        if self._last.error is not None:
            log.warning("%s: %s", self.path, self._last.error.message)
        elif before.error is not None:
            log.info("%s: the upstream answers again", self.path)

    def _failed(self, problem: Problem) -> None:
        """The upstream is left alone for a while, and requests are answered."""
        self._last = self.status(self._view).failed(time.time(), problem)

    async def _looked(self, asked: float) -> Looked:
        """A look of this process, or what another one found since *asked*."""
        while True:
            async with self._pool.slot(_host(self._settings)) as give_back:
                looked = await self._worker(asked, give_back)
            if looked.mine or looked.status.looks.checked >= asked:
                return looked
            # The other process was stopped while this one waited for its lock.

    async def _worker(self, asked: float, waits: Callable[[], Awaitable[None]]) -> Looked:
        """Run a worker; *waits* is called once it has to wait for another process's."""
        source = asdict(self._settings)
        request = {
            "folder": str(self.held.folder),
            "path": self.path,
            "asked": asked,
            "budget": self._budget,
            "source": source,
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-P", "-m", "tidings_server.edge_worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_LONGEST):
                # By standard input: a URL may have credentials, and arguments are for all to see.
                # It stays open: the worker ends with this process, however that ends.
                process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
                await process.stdin.drain()
                said = await process.stdout.readline()
                if said == WAITING:
                    await waits()
                    said = await process.stdout.readline()
                await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            raise LocalError(f"the fetch ended with {process.returncode}")
        return Looked.decode(said)


class Pool:
    """What the repositories of a process share."""

    def __init__(self, threads: ThreadPoolExecutor, told: Told | None) -> None:
        self.threads = threads
        self.told = told
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._of_host: dict[str, asyncio.Semaphore] = {}  # as many as the settings name

    @asynccontextmanager
    async def slot(self, host: str) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Wait for a turn to look at *host*. What comes gives it back before the end."""
        of_host = self._of_host.setdefault(host, asyncio.Semaphore(_AT_ONE_HOST))
        async with AsyncExitStack() as taken:
            await taken.enter_async_context(of_host)  # first: who waits here keeps no other away
            await taken.enter_async_context(self._slots)
            yield taken.aclose


def _host(settings: PulledSettings) -> str:
    """The host, with its port, of what is asked first."""
    up = settings.upstream
    url = next(iter([*up.urls, *(link for link in (up.metalink, up.mirrorlist) if link)]), "")
    return urlsplit(url).netloc.rpartition("@")[2].lower()
