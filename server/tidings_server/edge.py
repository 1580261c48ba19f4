"""The pull-through edge: repositories that are fetched when they are asked for (docs/upstream.md).

A request for a repository's main file asks the upstream first where what is held is not fresh; all
else is looked up in the states that are held, and what is no metadata is answered by a redirect.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tidings_chunkstore.errors import InputError, LocalError

from .bundles import default_folder
from .edge_rules import Kind, archive, by_hash, kind_of, location
from .edge_states import Held, Status, View
from .edge_upstream import Pool, Stopping, Told, Upstream
from .objects import Headers, Objects, Receive, Scope, Send, plain
from .settings import Settings
from .site import split_path

log = logging.getLogger("tidings.edge")

_SOON = 5  # seconds, told to who was sent away while the first fetch goes on


class Edge:
    """The pulled repositories of one server process."""

    def __init__(
        self,
        settings: Settings,
        cache: Path,
        objects: Objects,
        threads: ThreadPoolExecutor,
        told: Told | None = None,
    ) -> None:
        """*cache*: the folder that what is fetched is kept in."""
        pool = Pool(threads, told)
        self._told = told
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
        try:
            how = await self._answered(upstream, parts, scope, receive, send)
        except LocalError as error:
            log.error("%s: %s", upstream.path, error)
            await plain(send, 503, _local(error.code), [(b"retry-after", b"%d" % _SOON)])
            how = "failed"
        except Stopping:
            await plain(send, 503, b"this edge is stopping\n", [(b"retry-after", b"1")])
            how = "failed"
        if self._told is not None:
            self._told.edge(upstream.path, how)

    async def _answered(
        self, upstream: Upstream, parts: Sequence[str], scope: Scope, receive: Receive, send: Send
    ) -> str:
        """Answer, and say how. Raises LocalError and Stopping before anything is sent."""
        rest = "/".join(parts)
        kind = kind_of(rest)
        if kind is Kind.STORE:
            return await _missing(send)
        view = await upstream.view()
        base = upstream.base(view)
        if kind is Kind.PACKAGE and base is not None:
            return await _redirect(send, location(base, parts))
        client = scope["client"][0] if scope.get("client") else ""
        if kind is Kind.MAIN:
            view = await upstream.renewed()
        found = self._look_up(upstream, view, rest, kind, client)
        if found is None and kind is not Kind.MAIN and not (kind is Kind.BESIDE and view.current):
            # Named by a main file that is newer than ours, or nothing is held yet. A signature that
            # is not there is no reason: a new state's would not fit what the client has read.
            view = await upstream.renewed()
            found = self._look_up(upstream, view, rest, kind, client)
        status = upstream.status(view)
        if found is not None:
            warned = [] if kind is Kind.HASHED else _warning(upstream, status)
            if await self._objects.send_file(found, parts, scope, receive, send, warned):
                return "stale" if warned else "fresh"
        base = upstream.base(view)
        if view.current is None and (kind is not Kind.PACKAGE or base is None):
            return await _nothing(send, upstream, status)
        if kind in (Kind.MAIN, Kind.BESIDE) or base is None:
            # Never from the upstream: it may have another state by now.
            return await _missing(send)
        return await _redirect(send, location(base, parts))

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


def make_edge(
    settings: Settings, objects: Objects, threads: ThreadPoolExecutor, told: Told | None = None
) -> Edge | None:
    """The edge that *settings* ask for, if any. Raises InputError."""
    if not settings.serve.pull_through:
        return None
    cache = settings.serve.cache or default_folder()
    if cache is None:
        raise InputError("pull-through needs a cache folder: name one by --cache", code="no-cache")
    return Edge(settings, cache, objects, threads, told)


async def _redirect(send: Send, to: str) -> str:
    await plain(send, 302, b"", [(b"location", to.encode()), (b"cache-control", b"no-store")])
    return "redirect"


async def _missing(send: Send) -> str:
    await plain(send, 404, b"not found\n")
    return "missing"


def _warning(upstream: Upstream, status: Status) -> Headers:
    """Age and Warning (RFC 9111, 5.1; RFC 7234, 5.5) of what could not be asked about."""
    now = time.time()
    if status.looks.is_fresh(now, upstream.fresh):
        return []
    text = b'111 - "Revalidation Failed"' if status.looks.failures else b'110 - "Response is Stale"'
    return [(b"age", b"%d" % status.looks.age(now)), (b"warning", text)]


async def _nothing(send: Send, upstream: Upstream, status: Status) -> str:
    """Nothing is held."""
    wait = max(1, min(60, round(status.looks.again() - time.time())))
    if upstream.looking or status.error is None:
        answer, text = 503, f"{upstream.path} is being fetched from its upstream; try again\n"
        wait = _SOON
    elif status.error.local:
        answer, text = 503, _local(status.error.code).decode()
    else:
        slow = status.error.code == "timeout"
        answer, what = (504, "does not answer") if slow else (502, "gave no usable answer")
        code = status.error.code
        text = f"the upstream of {upstream.path} {what} ({code}); nothing is held yet\n"
    await plain(send, answer, text.encode(), [(b"retry-after", b"%d" % wait)])
    return "failed"


def _local(code: str) -> bytes:
    return f"this edge cannot keep what it fetches ({code})\n".encode()
