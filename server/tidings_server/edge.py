"""The pull-through edge: repositories that are fetched when they are asked for (docs/upstream.md).

A request for a repository's main file asks the upstream first where what is held is not fresh; all
else is looked up in the states that are held, and what is no metadata is answered by a redirect.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from tidings_chunkstore.errors import InputError, LocalError, TidingsError

from .bundles import default_folder
from .edge_rules import Do, Kind, archive, by_hash, decide, kind_of, location
from .edge_states import Held, Problem, Status, View
from .objects import Headers, Objects, Receive, Scope, Send, plain
from .settings import PulledSettings, Settings
from .site import split_path

log = logging.getLogger("tidings.edge")

_COLD = 25.0  # seconds a request waits when nothing is held: below the 30 that clients wait
_WARM = 10.0  # seconds a look may take before what is held is given out
_LONGEST = 3600.0  # seconds one look may take; what it fetched is kept for the next
_AT_ONCE = 4  # looks at a time in one process
_SOON = 5  # seconds, told to who was sent away while the first fetch goes on
_SAID_MAX = 64 * 1024


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
        """What is held after asking the upstream if that is due. Raises LocalError."""
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
            await asyncio.wait([self._look], timeout=patience)
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
        async with self._pool.slots:
            before = self._last
            try:
                now = await self._worker(asked)
                if now.error is not None and now.error.local:
                    # A disk that takes nothing counts no failures.
                    failures = max(now.looks.failures, before.looks.failures + 1)
                    now = replace(now, looks=replace(now.looks, failures=failures))
                self._last = now
            except (OSError, ValueError, TimeoutError, TidingsError) as error:
                # The upstream is left alone for a while, and requests are answered.
                problem = Problem("worker", str(error) or type(error).__name__, local=True)
                self._last = self.status(self._view).failed(time.time(), problem)
        if self._last.error is not None:
            log.warning("%s: %s", self.path, self._last.error.message)
        elif before.error is not None:
            log.info("%s: the upstream answers again", self.path)

    async def _worker(self, asked: float) -> Status:
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
        try:
            async with asyncio.timeout(_LONGEST):
                # By standard input: a URL may have credentials, and arguments are for all to see.
                said, _ = await process.communicate(json.dumps(request, default=str).encode())
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            raise LocalError(f"the fetch ended with {process.returncode}")
        return Status.decode(said[:_SAID_MAX])


class Pool:
    """What the repositories of a process share."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.threads = threads
        self.slots = asyncio.Semaphore(_AT_ONCE)


class Edge:
    """The pulled repositories of one server process."""

    def __init__(
        self, settings: Settings, cache: Path, objects: Objects, threads: ThreadPoolExecutor
    ) -> None:
        """*cache*: the folder that what is fetched is kept in."""
        pool = Pool(threads)
        wanted = settings.serve
        budget = wanted.cache_size // max(1, len(settings.pulled))
        self._objects = objects
        self._others = frozenset(repo.path for repo in settings.repos)
        self._upstreams = {
            repo.path: Upstream(repo, Held.below(cache, repo.path), wanted.fresh, budget, pool)
            for repo in settings.pulled
        }

    async def close(self) -> None:
        """Stop all fetches."""
        await asyncio.gather(*(each.close() for each in self._upstreams.values()))

    async def answers(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Answer a GET or HEAD if its path is one of the edge's; False otherwise."""
        parts = split_path(scope["raw_path"])
        if parts is None:
            return False
        for at in range(len(parts), 0, -1):
            name = "/".join(parts[:at])
            if name in self._others:
                return False
            if name in self._upstreams and parts[at:]:
                await self._answer(self._upstreams[name], parts[at:], scope, receive, send)
                return True
        target = self._in_archive(parts)
        if target is None or await self._objects.holds(scope["raw_path"]):
            return False
        await _redirect(send, target)
        return True

    def _in_archive(self, parts: Sequence[str]) -> str | None:
        """Where to redirect a path that lies in the archive of a suite, pool/ above all."""
        for each in self._upstreams.values():
            base = each.likely_base()
            here = archive(each.path, base) if base is not None else None
            if here is None:
                continue
            above = tuple(here[0].split("/")) if here[0] else ()
            rest = parts[len(above) :]
            if parts[: len(above)] != above or not rest:
                continue
            if rest[0] == "pool" or kind_of(rest[-1]) is Kind.PACKAGE:
                return location(here[1], rest)
        return None

    async def _answer(
        self, upstream: Upstream, parts: Sequence[str], scope: Scope, receive: Receive, send: Send
    ) -> None:
        rest = "/".join(parts)
        kind = kind_of(rest)
        if kind is Kind.STORE:
            await plain(send, 404, b"an edge has no store\n")
            return
        try:
            if kind is Kind.PACKAGE:
                view = await upstream.view()
                base = upstream.base(view)
                if base is not None:
                    await _redirect(send, location(base, parts))
                    return
            client = scope["client"][0] if scope.get("client") else ""
            view = await (upstream.renewed() if kind is Kind.MAIN else upstream.view())
            found = self._look_up(upstream, view, rest, kind, client)
            if found is None and kind is not Kind.MAIN:
                # Named by a main file that is newer than ours, or we hold nothing yet.
                view = await upstream.renewed()
                found = self._look_up(upstream, view, rest, kind, client)
        except LocalError as error:
            log.error("%s: %s", upstream.path, error)
            await plain(send, 503, _local(error.code), [(b"retry-after", b"%d" % _SOON)])
            return
        status = upstream.status(view)
        if found is not None:
            warned = [] if kind is Kind.HASHED else _warning(upstream, status)
            if await self._objects.send_file(found, parts, scope, receive, send, warned):
                return
        base = upstream.base(view)
        if view.current is None and (kind is not Kind.PACKAGE or base is None):
            await _nothing(send, upstream, status)
            return
        if kind in (Kind.MAIN, Kind.BESIDE) or base is None:
            # Never from the upstream: it may have another state by now.
            await plain(send, 404, b"not found\n")
            return
        await _redirect(send, location(base, parts))

    def _look_up(
        self, upstream: Upstream, view: View, rest: str, kind: Kind, client: str
    ) -> Path | None:
        current = view.current
        if current is None:
            return None
        if kind is Kind.MAIN:
            found = current.find(rest)
            if found is not None and current.has_plain_names:
                upstream.held.pin(client, current.number)
            return found
        if kind is Kind.HASHED:
            return view.anywhere(rest, by_hash(rest))
        state = view.state(upstream.held.pinned(client, time.time()))
        return state.find(rest) if state is not None else None


def make_edge(settings: Settings, objects: Objects, threads: ThreadPoolExecutor) -> Edge | None:
    """The edge that *settings* ask for, if any. Raises InputError."""
    if not settings.serve.pull_through:
        return None
    cache = settings.serve.cache or default_folder()
    if cache is None:
        raise InputError("pull-through needs a cache folder: name one by --cache", code="no-cache")
    return Edge(settings, cache, objects, threads)


async def _redirect(send: Send, to: str) -> None:
    await plain(send, 302, b"", [(b"location", to.encode()), (b"cache-control", b"no-store")])


def _warning(upstream: Upstream, status: Status) -> Headers:
    """Age and Warning (RFC 9111, 5.1; RFC 7234, 5.5) of what could not be asked about."""
    now = time.time()
    if status.looks.is_fresh(now, upstream.fresh):
        return []
    text = b'111 - "Revalidation Failed"' if status.looks.failures else b'110 - "Response is Stale"'
    return [(b"age", b"%d" % status.looks.age(now)), (b"warning", text)]


async def _nothing(send: Send, upstream: Upstream, status: Status) -> None:
    """Nothing is held."""
    if upstream.looking or status.error is None:
        text = f"{upstream.path} is being fetched from its upstream; try again\n"
        await plain(send, 503, text.encode(), [(b"retry-after", b"%d" % _SOON)])
        return
    after = b"%d" % max(1, min(60, round(status.looks.again() - time.time())))
    if status.error.local:
        await plain(send, 503, _local(status.error.code), [(b"retry-after", after)])
        return
    slow = status.error.code == "timeout"
    what = "does not answer" if slow else "gave no usable answer"
    text = f"the upstream of {upstream.path} {what} ({status.error.code}); nothing is held yet\n"
    await plain(send, 504 if slow else 502, text.encode(), [(b"retry-after", after)])


def _local(code: str) -> bytes:
    return f"this edge cannot keep what it fetches ({code})\n".encode()
