"""What a static host cannot do, for each repository: routes that get a ``Repository``.

Later features are routes here too: they take ``Here`` (the repository of the request's path) and
``Mirror`` (what the process shares). A feature that clients may rely on is promised in the heads
this server sends, see ``app.features``.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

from tidings_chunkstore.backends.base import HEAD_NAME
from tidings_chunkstore.errors import FormatError, StoreError, TidingsError
from tidings_chunkstore.head import Head
from tidings_chunkstore.limits import KIB, MIB
from tidings_chunkstore.places import PackName

from . import frames
from .bundles import RETRY_AFTER, Bundles, Busy, NotRetained, Wanted, chosen_tracks
from .metrics import Metrics
from .objects import (
    Changed,
    Entry,
    Known,
    Objects,
    Receive,
    Scope,
    Send,
    pread,
    reopen,
    send_block,
    until_gone,
)
from .settings import Settings
from .site import Repository, Signature, Site, Target, signature

log = logging.getLogger("tidings.serve")

P = ParamSpec("P")
T = TypeVar("T")

_AT_ONCE = 1 * MIB  # read in one go, and sent in one piece
_BLOCK = 256 * KIB  # of longer answers, one of which each slow client holds
_OPEN = 16  # packs of one batch that are open at a time
_LISTED = 1000  # repositories in one answer
_KIND = "application/octet-stream"

#: What ``Kept`` may answer besides 200.
KEPT: dict[int | str, dict[str, Any]] = {
    206: {"content": {_KIND: {}}, "description": "the range that was asked for"},
    304: {"description": "not modified"},
    416: {"description": "a range that lies outside"},
}


class Refused(Exception):
    """An answer that is an error: *status*, and the stable word and text of its body."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True, slots=True)
class Shared:
    """What all requests of a process share."""

    settings: Settings
    site: Site
    objects: Objects
    pool: ThreadPoolExecutor
    bundles: Bundles | None = None
    metrics: Metrics | None = None

    async def thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run *call* in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.pool, lambda: call(*args, **kwargs))


def _shared(request: Request) -> Shared:
    shared: Shared = request.app.state.shared
    return shared


Mirror = Annotated[Shared, Depends(_shared)]


async def _here(request: Request, mirror: Mirror) -> Repository:
    """The repository of the path. The front has checked and taken apart the path as sent."""
    target: Target | None = request.scope.get("tidings.target")
    if target is None or target.repository is None:
        raise Refused(404, "not-found", "no such repository")
    found = await mirror.thread(mirror.site.repository, target.repository)
    if found is None:
        raise Refused(404, "not-found", "no such repository, or it is not published")
    return found


Here = Annotated[Repository, Depends(_here)]

router = APIRouter()


class FramesRequest(BaseModel):
    """A batch of ranges of packs."""

    v: int = Field(1, description="version of this request")
    frames: list[tuple[str, list[int]]] = Field(
        description="a pack's name, and offset, length, offset, length, ... in it",
        examples=[[["000001-0123456789abcdef.pack", [8, 2000, 9000, 512]]]],
    )


@router.post(
    "/{repository:path}/tidings/frames",
    summary="A batch of ranges of packs in one answer",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}}, "description": "the ranges, joined"},
        400: {"description": "a body that is cut off"},
        404: {"description": "no such pack in this repository"},
        408: {"description": "the body did not come in time"},
        413: {"description": "over a limit"},
        416: {"description": "a range ends beyond its pack"},
        422: {"description": "not such a request"},
        503: {"description": "the packs change this moment"},
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": FramesRequest.model_json_schema()}},
        },
        "parameters": [
            {"name": "repository", "in": "path", "required": True, "schema": {"type": "string"}}
        ],
    },
)
@router.post("/tidings/frames", include_in_schema=False)
async def post_frames(request: Request, repository: Here, mirror: Mirror) -> Response:
    """Answered in the order in which they are asked, concatenated, as stored."""
    body = await bounded_body(request, frames.MOST_REQUEST)
    try:
        batch = await mirror.thread(frames.parse, body)
    except frames.TooMuch as error:
        raise Refused(413, error.code, str(error)) from error
    except FormatError as error:
        raise Refused(422, "bad-request", str(error)) from error
    entries: dict[PackName, Entry] = {}
    for name in batch.packs():
        entry = await mirror.objects.pack(repository.name, name)
        if entry is None:
            raise Refused(404, "no-pack", f"no pack {name} in this repository")
        entries[name] = entry
    for span in batch.spans:
        if span.end > entries[span.pack].size:
            raise Refused(416, "range", f"a range ends beyond {span.pack}")
    request.scope["tidings.spans"] = batch.spans
    pieces = _pieces(batch, entries)
    if batch.size > _AT_ONCE:
        return Pieces(mirror, pieces, batch.size)
    try:
        data = await mirror.thread(lambda: b"".join(pieces))
    except OSError as error:
        raise _changing(repository, error) from error
    return Response(data, headers={"cache-control": "no-store"}, media_type=_KIND)


@router.get(
    "/{repository:path}/tidings/delta/{older}/{newer}",
    summary="Direct deltas to the current snapshot from a retained one",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}}, "description": "a bundle"},
        404: {"description": "not retained, or not current any more: read the head again"},
        **KEPT,
        503: {"description": "too many in the making, not ready yet, or a damaged store"},
    },
    openapi_extra={
        "parameters": [
            {"name": "repository", "in": "path", "required": True, "schema": {"type": "string"}}
        ],
    },
)
@router.get("/tidings/delta/{older}/{newer}", include_in_schema=False)
@router.head("/{repository:path}/tidings/delta/{older}/{newer}", include_in_schema=False)
async def get_delta(
    request: Request,
    older: str,
    newer: str,
    repository: Here,
    mirror: Mirror,
    tracks: str | None = None,
) -> Response:
    """Snapshots are named by their packs, without the suffix; *tracks* is comma-separated."""
    if mirror.bundles is None:
        raise Refused(404, "no-bundles", "this server makes no bundles")
    try:
        packs = PackName.parse(f"{older}.pack"), PackName.parse(f"{newer}.pack")
        version, head = await mirror.thread(_versioned, repository)
    except (FormatError, StoreError) as error:
        raise Refused(404, "not-retained", str(error)) from error
    retained = {state.pack for state in head.states[:-1]}
    if packs[0] not in retained or packs[1] != head.current.pack:
        raise Refused(404, "not-retained", "not retained, or not current any more")
    asked = None if tracks is None else tracks.split(",")
    chosen = chosen_tracks([content.track for content in head.contents], asked)
    wanted = Wanted(repository.folder, head.repo, *packs, chosen)
    try:
        path = await mirror.bundles.get(wanted, client_of(request))
    except Busy as error:
        raise Refused(503, error.code, str(error), retry_after=str(RETRY_AFTER)) from error
    except NotRetained as error:
        message = "%s: the head retains what the packs do not have: %s; see `tidings-mirror check`"
        log.warning(message, repository.folder, error)
        raise Refused(404, error.code, str(error)) from error
    except TidingsError as error:
        message = "the bundle could not be made"
        raise Refused(503, error.code, message, retry_after=str(RETRY_AFTER)) from error
    used = functools.partial(mirror.bundles.used, wanted, path)
    known = Known(path, str(repository.folder / HEAD_NAME), version, used)
    mirror.objects.know(request.scope, known)
    return Kept(mirror.objects, path)


def _versioned(repository: Repository) -> tuple[Signature, Head]:
    """The head, and a signature of its file that is no later. Raises StoreError."""
    try:
        version = signature(os.stat(repository.folder / HEAD_NAME))
    except OSError as error:
        raise StoreError(f"{repository.folder}: no head", code="store-missing") from error
    return version, repository.head()


class Kept(Response):
    """A file of the cache, answered as objects are."""

    def __init__(self, objects: Objects, path: Path, *, immutable: bool = True) -> None:
        super().__init__()
        self._objects = objects
        self._path = path
        self._immutable = immutable

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        await self._objects.send_kept(self._path, scope, receive, send, immutable=self._immutable)


def _pieces(batch: frames.Batch, entries: dict[PackName, Entry]) -> Iterator[bytes]:
    """The bytes of a batch, in pieces of at most _BLOCK. Raises OSError."""
    opened: dict[PackName, int] = {}
    try:
        for span in batch.spans:
            if span.pack not in opened:
                if len(opened) >= _OPEN:
                    os.close(opened.pop(next(iter(opened))))
                opened[span.pack] = reopen(entries[span.pack])
            for start in range(span.offset, span.end, _BLOCK):
                yield pread(opened[span.pack], start, min(_BLOCK, span.end - start))
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


class Pieces(Response):
    """*size* bytes in blocks, as the client takes them."""

    def __init__(self, mirror: Shared, pieces: Iterator[bytes], size: int) -> None:
        headers = {"content-length": str(size), "cache-control": "no-store"}
        super().__init__(headers=headers, media_type=_KIND)
        self._mirror = mirror
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. A pack that goes away on the way ends the connection, short of the length."""
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            data = await self._mirror.thread(self._block)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while data and not gone.done():
                await send_block(send, data)
                data = await self._mirror.thread(self._block)
            if not gone.done():
                await send({"type": "http.response.body"})
        except OSError as error:
            log.warning("a batch of frames ends early: %s", error)
        finally:
            gone.cancel()
            close = getattr(self._pieces, "close", None)
            if close is not None:
                close()

    def _block(self) -> bytes:
        """Pieces joined to a block, read in one visit to a thread."""
        joined = bytearray()
        for piece in self._pieces:
            joined += piece
            if len(joined) >= _BLOCK:
                break
        return bytes(joined)


def _changing(repository: Repository, error: OSError) -> Refused:
    if not isinstance(error, Changed):
        log.error("%s: a pack cannot be read: %s", repository.folder, error)
    return Refused(503, "changing", "the packs change this moment", retry_after="1")


def client_of(request: Request) -> str:
    """The client's address, for limits; a proxy on this machine may name it."""
    return request.client.host if request.client else ""


async def bounded_body(request: Request, most: int) -> bytes:
    """The request's body. Raises Refused above *most* bytes, and when it does not come."""
    patience = _shared(request).settings.serve.patience
    said = request.headers.get("content-length", "0")
    if not said.isascii() or not said.isdigit() or len(said) > 18 or int(said) > most:
        raise Refused(413, "too-much", f"a body has at most {most} bytes", connection="close")
    body = bytearray()
    try:
        async with asyncio.timeout(patience):
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    message = f"a body has at most {most} bytes"
                    raise Refused(413, "too-much", message, connection="close")
    except TimeoutError as error:
        raise Refused(408, "slow", "the body did not come", connection="close") from error
    except ClientDisconnect as error:
        raise Refused(400, "cut-off", "the body is cut off", connection="close") from error
    return bytes(body)


# -- the mirror as a whole -------------------------------------------------------------------------


class RepositoryInfo(BaseModel):
    """A repository as its head describes it. Sizes in bytes, times in seconds since 1970."""

    path: str
    serial: int | None = None
    time: int | None = None
    layout: str | None = None
    files: int | None = None
    published_bytes: int | None = None
    snapshots: int | None = None
    error: str | None = None


class RepositoryList(BaseModel):
    """Repositories that are configured, or that were asked for since this process started."""

    repositories: list[RepositoryInfo]
    more: bool = Field(description="whether there are more than are listed")


@router.get("/healthz", summary="Whether the process answers")
@router.head("/healthz", summary="The status alone")
async def healthz() -> dict[str, str]:
    """For a supervisor: this process is alive."""
    return {"status": "ok"}


@router.get("/readyz", summary="Whether its folders are there")
@router.head("/readyz", summary="The status alone")
async def readyz(mirror: Mirror) -> dict[str, str]:
    """For a load balancer: requests can be answered."""
    if not await mirror.thread(mirror.site.ready):
        raise Refused(503, "not-ready", "a folder to serve is not there")
    return {"status": "ok"}


@router.get("/api/repos", summary="Known repositories")
async def repos(mirror: Mirror) -> RepositoryList:
    """Nothing is searched for: the tree below the root may be large."""
    names = mirror.site.names()
    found = await mirror.thread(lambda: [_info(mirror.site, name) for name in names[:_LISTED]])
    return RepositoryList(repositories=found, more=len(names) > _LISTED)


def _info(site: Site, name: str) -> RepositoryInfo:
    found = site.repository(name)
    if found is None:
        return RepositoryInfo(path=name, error="not published")
    try:
        now = found.head()
    except StoreError as error:
        return RepositoryInfo(path=name, error=str(error))
    return RepositoryInfo(
        path=name,
        serial=now.serial,
        time=now.time,
        layout=now.layout,
        files=len(now.files),
        published_bytes=sum(file.size for file in now.files),
        snapshots=len(now.states),
    )
