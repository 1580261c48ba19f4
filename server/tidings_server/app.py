"""The application: objects by ``objects``, everything else by FastAPI, told apart by the path."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from . import casync_routes, described, logs, metrics, pages, reconcile
from .api import Refused, Shared, router
from .bundles import Bundles, default_folder
from .edge import Edge, make_edge
from .objects import Message, Objects, Receive, Scope, Send, plain
from .settings import ServeSettings, Settings
from .site import FEATURES, Site, split_path, target_of

_DESCRIPTION = """
Serves published files, `tidings/head.json` and packs below each repository's path with validators,
caching headers and ranges, as a static host does (docs/protocol.md), and the routes below.
"""

#: Paths of the application itself; a repository cannot have them.
OWN = frozenset({"/", "/healthz", "/readyz", "/docs", "/openapi.json", metrics.PATH})
PAGES = frozenset({"/", "/docs"})  #: those of them that are for people
OWN_BELOW = ("/api/", pages.BELOW)

#: Told of each answered request: scope, status, bytes of the body, seconds, the body's beginning.
Observer = Callable[[Scope, int, int, float, bytes], None]


def features(bundles: Bundles | None, reconciles: bool = False) -> dict[str, int]:
    """What the heads of this server promise."""
    promised = {"frames": 1}
    if bundles is not None:
        promised["delta"] = 1
        if reconciles:
            promised["reconcile"] = 1
    return promised


def make_app(settings: Settings) -> Front:
    """The ASGI application for *settings*. Nothing is started before its first request."""
    pool = logs.Pool(
        max_workers=min(32, 4 + 4 * (os.cpu_count() or 1)), thread_name_prefix="tidings"
    )
    bundles = _bundles(settings.serve)
    site = Site(settings.serve, settings.repos)
    promised = features(bundles, settings.serve.reconcile)
    objects = Objects(site, pool, memory=settings.serve.memory, features=promised)
    counted = _metrics(settings, site, pool, bundles)
    shared = Shared(settings, site, objects, pool, bundles, counted)
    observers: list[Observer] = [counted.observe] if counted is not None else []
    edge = make_edge(settings, objects, pool, counted)
    api = _api(shared, edge)
    return Front(api, objects, edge, observers=observers, access_log=settings.serve.access_log)


def _metrics(
    settings: Settings, site: Site, pool: logs.Pool, bundles: Bundles | None
) -> metrics.Metrics | None:
    if settings.serve.metrics == "off":
        return None
    if bundles is None:
        return metrics.Metrics(settings, site, pool, version=_version())
    cache, making = bundles.folder, bundles.making
    counted = metrics.Metrics(settings, site, pool, version=_version(), cache=cache, making=making)
    bundles.told = counted.count
    return counted


def _bundles(wanted: ServeSettings) -> Bundles | None:
    folder = wanted.cache or default_folder()
    if folder is None or not wanted.bundle_queue:
        return None
    at_once = max(1, (os.cpu_count() or 1) // 2)
    return Bundles(folder, most=wanted.cache_size, queue=wanted.bundle_queue, at_once=at_once)


def _api(shared: Shared, edge: Edge | None = None) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if shared.metrics is not None:
            shared.metrics.start()
        yield
        shown.close()
        if edge is not None:
            await edge.close()
        if shared.bundles is not None:
            await shared.bundles.close()
        if shared.metrics is not None:
            shared.metrics.close()
        shared.pool.shutdown(wait=False, cancel_futures=True)

    api = FastAPI(
        title="Tidings mirror",
        version=_version(),
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts of another host; pages has one of our own
        redoc_url=None,
        redirect_slashes=False,
    )
    api.state.shared = shared
    api.openapi = described.with_objects(api.openapi)  # type: ignore[method-assign]
    api.include_router(router)
    shown = pages.Pages(shared, api.openapi, _version())
    if shared.settings.serve.pages:
        api.include_router(pages.make_router(shown))
    if shared.bundles is not None and shared.settings.serve.reconcile:
        api.include_router(reconcile.make_router(reconcile.Reconciler(shared.bundles)))
    if shared.bundles is not None and shared.settings.serve.casync:
        api.include_router(casync_routes.make_router(casync_routes.Casync(shared.bundles)))
    if shared.metrics is not None:
        api.include_router(metrics.make_router(shared.metrics, shared.settings.serve.metrics))
    api.add_exception_handler(Exception, _unexpected)
    api.add_exception_handler(Refused, _refused)
    api.add_exception_handler(HTTPException, _http_error)
    return api


def _version() -> str:
    try:
        return version("tidings")
    except PackageNotFoundError:
        return "0"  # run from a checkout that is not installed


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    return _error(error.status, error.code, str(error), error.headers)


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = {404: "not-found", 405: "method"}.get(error.status_code, "http")
    return _error(error.status_code, code, str(error.detail), dict(error.headers or {}))


async def _unexpected(request: Request, _: Exception) -> JSONResponse:
    """Starlette raises the error again after this: ``Front`` logs it."""
    return JSONResponse(_internal(request.scope), 500, {"cache-control": "no-store"})


def _internal(scope: Scope) -> dict[str, object]:
    message = "an error inside the server; its log has it under the request's id"
    return {"error": {"code": "internal", "message": message, "request": scope.get(logs.ID, "")}}


def _error(status: int, code: str, message: str, headers: dict[str, str]) -> JSONResponse:
    body = {"error": {"code": code, "message": message}}
    return JSONResponse(body, status, {"cache-control": "no-store", **headers})


class Front:
    """Tells requests apart by their path, and shows each to the observers."""

    def __init__(
        self,
        api: Callable[[Scope, Receive, Send], Any],
        objects: Objects,
        edge: Edge | None = None,
        *,
        observers: list[Observer],
        access_log: bool = False,
    ) -> None:
        self.api = api
        self.observers = observers
        self._objects = objects
        self._edge = edge
        self._access_log = access_log
        self._ids = logs.Ids()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (or the lifespan). Raises ``logs.Told`` when it broke off."""
        if scope["type"] != "http":
            await self.api(scope, receive, send)
            return
        started = time.perf_counter()
        id_header = (b"x-request-id", self._ids.begin(scope))
        status = sent = 0
        first = b""
        whole = False

        def watched(message: Message) -> Awaitable[None]:
            nonlocal status, sent, first, whole
            if message["type"] == "http.response.body":
                body = message.get("body", b"")
                if not sent:
                    first = body
                sent += len(body)
                whole = not message.get("more_body", False)
            else:
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), id_header]
            return send(message)  # no coroutine of its own: this is for each of them

        try:
            await self._answer(scope, receive, watched)
        except Exception as error:
            # Whatever it is: one line, an answer that names the request, and the server goes on.
            if status and isinstance(error, (TimeoutError, ConnectionError)):
                raise logs.Told from error  # a client that takes nothing any more
            logs.failed(scope, error)
            if not status:
                await _send_internal(scope, watched)
            elif not whole:
                raise logs.Told from error
        finally:
            seconds = time.perf_counter() - started
            if self._access_log:
                logs.access(scope, status, sent, seconds)
            for observer in self.observers:
                observer(scope, status, sent, seconds, first)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if path in OWN or path.startswith(OWN_BELOW):
            people = path in PAGES or path.startswith(pages.BELOW)
            scope["tidings.route"] = "page" if people else "api"
            await self.api(scope, receive, send)
            return
        raw: bytes = scope["raw_path"]
        if b"/tidings/" in raw:
            parts = split_path(raw)
            target = target_of(parts) if parts is not None else None
            if target is not None and target.feature in FEATURES:
                scope["tidings.target"] = target
                known = self._objects.recall(scope)
                if known is not None:
                    await self._objects.send_kept(known, scope, receive, send)
                    return
                await self.api(scope, receive, send)
                return
        if scope["method"] not in ("GET", "HEAD"):
            headers = [(b"allow", b"GET, HEAD")]
            await plain(send, 405, b"method not allowed\n", headers, close=True)
            return
        if self._edge is not None and await self._edge.answers(scope, receive, send):
            return
        await self._objects(scope, receive, send)


async def _send_internal(scope: Scope, send: Send) -> None:
    body = json.dumps(_internal(scope)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
