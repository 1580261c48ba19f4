"""Reconcile on request: lists of a current snapshot, and deltas against what a client says it has.

Tables (all ids of a content) and answers are made in processes of their own and kept in the cache
of ``bundles``, under names that follow from all that decides their bytes: a question asked again
costs a read. What an inquiry has in common with a content is found here, in a thread, from the
table alone, so a base that has too little is refused before any work. See docs/protocol.md.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

from tidings_chunkstore import bundle, reconcile
from tidings_chunkstore.errors import FormatError, StoreError, TidingsError
from tidings_chunkstore.head import Head, HeadContent
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.packing import ALONE
from tidings_chunkstore.places import PackName, Span

from .api import Here, Mirror, Refused, Shared, bounded_body, client_of
from .bundles import RETRY_AFTER, SUFFIX, Bundles, Busy, Job, NotRetained
from .site import Repository

log = logging.getLogger("tidings.reconcile")

_TABLES = 8  # kept in memory
_KIND = "application/octet-stream"
_WORKER = "tidings_server.reconcile_worker"
_VERSION = 1  # of tables and answers in the cache


def _name(*key: object) -> str:
    text = json.dumps(["reconcile", _VERSION, *map(str, key)])
    return hashlib.sha256(text.encode()).hexdigest()[:40] + SUFFIX


@dataclass(frozen=True, slots=True)
class TableJob:
    """The table of a content of a snapshot."""

    store: Path
    repo: bytes
    pack: PackName
    track: str

    @property
    def name(self) -> str:
        """See ``bundles.Job``."""
        return _name("table", self.repo.hex(), self.pack, self.track)

    @property
    def worker(self) -> str:
        """See ``bundles.Job``."""
        return _WORKER

    def request(self) -> dict[str, object]:
        """See ``bundles.Job``."""
        return {"store": str(self.store), "pack": str(self.pack), "table": self.track}


@dataclass(frozen=True, slots=True)
class AnswerJob:
    """The answer to a request, named by its *digest*: tracks and what is common of each."""

    store: Path
    repo: bytes
    pack: PackName
    digest: str
    commons: tuple[tuple[str, reconcile.Common], ...]

    @property
    def name(self) -> str:
        """See ``bundles.Job``."""
        return _name("answer", self.repo.hex(), self.pack, self.digest)

    @property
    def worker(self) -> str:
        """See ``bundles.Job``."""
        return _WORKER

    def request(self) -> dict[str, object]:
        """See ``bundles.Job``."""
        return {
            "store": str(self.store),
            "pack": str(self.pack),
            "commons": [
                [track, common.spans, base64.b64encode(common.bitmap).decode()]
                for track, common in self.commons
            ],
        }


class Reconciler:
    """What the routes share: tables in memory, and how many requests each client has open."""

    def __init__(self, made: Bundles) -> None:
        self._made = made
        self._tables: OrderedDict[str, reconcile.Table] = OrderedDict()
        self._open: Counter[str] = Counter()

    @contextmanager
    def slot(self, client: str) -> Iterator[None]:
        """A place for one request of *client*. Raises Refused when it has too many."""
        if self._open[client] >= LIMITS.reconcile_at_once:
            message = f"{LIMITS.reconcile_at_once} requests at a time"
            raise Refused(429, "busy", message, retry_after=str(RETRY_AFTER))
        self._open[client] += 1
        try:
            yield
        finally:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]

    async def table(self, job: TableJob, mirror: Shared, client: str) -> reconcile.Table:
        """The table of a content. Raises Refused."""
        known = self._tables.get(job.name)
        if known is None:
            data = await self._make(job, mirror, client)
            try:
                known = await mirror.thread(reconcile.decode_table, data)
            except FormatError as error:  # the disk's doing: it is made anew
                log.error("%s: %s", self._made.folder / job.name, error)
                await mirror.thread((self._made.folder / job.name).unlink, missing_ok=True)
                raise _later("damaged", "a file of the cache is damaged") from error
            self._tables[job.name] = known
            while len(self._tables) > _TABLES:
                self._tables.popitem(last=False)
        elif job.name in self._tables:
            self._tables.move_to_end(job.name)
        return known

    async def answer(self, job: AnswerJob, mirror: Shared, client: str) -> bytes:
        """The answer. Raises Refused."""
        return await self._make(job, mirror, client)

    async def _make(self, job: Job, mirror: Shared, client: str) -> bytes:
        try:
            path = await self._made.get(job, client)
            return await mirror.thread(path.read_bytes)
        except Busy as error:
            raise _later("busy", str(error)) from error
        except FileNotFoundError as error:
            raise _later("busy", "it fell to the cache's limit") from error
        except NotRetained as error:
            raise Refused(404, "not-current", "not current any more") from error
        except TidingsError as error:
            raise _later(error.code, "the answer could not be made") from error
        except OSError as error:
            log.error("%s: %s", self._made.folder / job.name, error)
            raise _later("local", "the answer cannot be read") from error


def make_router(reconciler: Reconciler) -> APIRouter:
    """The two routes."""
    router = APIRouter()
    path = "/{repository:path}/tidings/reconcile/{snapshot}"
    extra = {
        "parameters": [
            {"name": "repository", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    }

    @router.get(
        path,
        summary="Lists of coarse chunks of a current snapshot",
        response_class=Response,
        responses={
            200: {"content": {_KIND: {}}, "description": "a bundle of lists"},
            404: {"description": "not current any more: read the head again"},
            503: {"description": "too many in the making, or a damaged store"},
        },
        openapi_extra=extra,
    )
    @router.get("/tidings/reconcile/{snapshot}", include_in_schema=False)
    async def get_lists(
        snapshot: str,
        request: Request,
        repository: Here,
        mirror: Mirror,
        tracks: str | None = None,
    ) -> Response:
        """*tracks* is comma-separated. A small content comes whole, as a delta without a base."""
        client = client_of(request)
        head = await _current(snapshot, repository, mirror)
        asked = None if tracks is None else set(tracks.split(","))
        chosen = [c for c in head.contents if asked is None or c.track in asked]
        small = await mirror.thread(_small_sections, repository, head)
        entries: list[tuple[str, bytes]] = []
        for content in chosen[: LIMITS.reconcile_tracks]:
            if content.track in small:
                entries.append((content.track, small[content.track]))
            elif _has_list(head, content):
                job = TableJob(repository.folder, head.repo, head.current.pack, content.track)
                table = await reconciler.table(job, mirror, client)
                entries.append((content.track, await mirror.thread(reconcile.encode_list, table)))
        # The bytes follow from the snapshot and the tracks in the URL, for ever.
        caching = {"cache-control": "public, max-age=31536000, immutable, no-transform"}
        return Response(bundle.encode(entries), headers=caching, media_type=_KIND)

    @router.post(
        path,
        summary="Deltas against what the client has",
        response_class=Response,
        responses={
            200: {"content": {_KIND: {}}, "description": "a bundle of answers"},
            400: {"description": "a body that is cut off"},
            404: {"description": "not current any more: read the head again"},
            408: {"description": "the body did not come in time"},
            409: {"description": "less than half in common, in every track"},
            413: {"description": "over a limit"},
            422: {"description": "not such a request, or about another list"},
            429: {"description": "too many requests of this client at a time"},
            503: {"description": "too many in the making, or a damaged store"},
        },
        openapi_extra={
            **extra,
            "requestBody": {
                "required": True,
                "content": {_KIND: {"schema": {"type": "string", "format": "binary"}}},
            },
        },
    )
    @router.post("/tidings/reconcile/{snapshot}", include_in_schema=False)
    async def post_inquiries(
        snapshot: str, request: Request, repository: Here, mirror: Mirror
    ) -> Response:
        """A track whose base has too little in common, or that no delta pays for, is left out."""
        client = client_of(request)
        with reconciler.slot(client):
            body = await bounded_body(request, LIMITS.reconcile_request)
            try:
                inquiries = await mirror.thread(reconcile.decode_inquiries, body)
            except FormatError as error:
                raise Refused(422, "bad-request", str(error)) from error
            head = await _current(snapshot, repository, mirror)
            commons = await _commons(reconciler, inquiries, repository, head, mirror, client)
            digest = hashlib.sha256(body).hexdigest()
            job = AnswerJob(repository.folder, head.repo, head.current.pack, digest, commons)
            data = await reconciler.answer(job, mirror, client)
        return Response(data, headers={"cache-control": "no-store"}, media_type=_KIND)

    return router


def _later(code: str, message: str) -> Refused:
    return Refused(503, code, message, retry_after=str(RETRY_AFTER))


async def _current(snapshot: str, repository: Repository, mirror: Shared) -> Head:
    """The head. Raises Refused unless *snapshot* is the current one."""
    try:
        pack = PackName.parse(f"{snapshot}.pack")
        head = await mirror.thread(repository.head)
    except (FormatError, StoreError) as error:
        raise Refused(404, "not-current", str(error)) from error
    if head.current.pack != pack:
        raise Refused(404, "not-current", "not current any more")
    return head


def _has_list(head: Head, content: HeadContent) -> bool:
    """Whether inquiries about a content are answered: it is stored, and not too large."""
    stored = content.index is not None or any(
        edge.track == content.track and edge.target == head.serial for edge in head.edges
    )
    return stored and content.size <= LIMITS.reconcile_content


def _small_sections(repository: Repository, head: Head) -> dict[str, bytes]:
    """The edges of the current snapshot that need nothing, those of small contents."""
    found: dict[str, bytes] = {}
    for edge in head.edges:
        alone = edge.target == head.serial and edge.base is None and not edge.uses
        if alone and edge.span.length <= ALONE:
            found[edge.track] = _read(repository, edge.span)
    return found


def _read(repository: Repository, span: Span) -> bytes:
    try:
        return repository.store.read_span(span)
    except StoreError as error:
        raise Refused(404, "not-current", str(error)) from error


async def _commons(
    reconciler: Reconciler,
    inquiries: Sequence[tuple[str, reconcile.Inquiry]],
    repository: Repository,
    head: Head,
    mirror: Shared,
    client: str,
) -> tuple[tuple[str, reconcile.Common], ...]:
    """What each inquiry has in common with its content; raises Refused when none has enough."""
    commons: list[tuple[str, reconcile.Common]] = []
    reason = ""
    for track, inquiry in inquiries:
        content = head.content(track)
        if content is None or not _has_list(head, content):
            raise Refused(422, "bad-request", "a track that has no list")
        job = TableJob(repository.folder, head.repo, head.current.pack, track)
        table = await reconciler.table(job, mirror, client)
        try:
            commons.append((track, await mirror.thread(reconcile.find_common, table, inquiry)))
        except reconcile.NotPromisingError as error:
            reason = str(error)
        except FormatError as error:
            raise Refused(422, "bad-request", str(error)) from error
    if not commons:
        raise Refused(409, "not-alike", reason)
    return tuple(commons)
