"""casync's and desync's view of a repository: indexes and chunks below ``tidings/casync/``.

Opening a blob and cutting it is a job of ``bundles``: in a process of its own, once however many
ask, a bounded number waiting, kept in the cache within its limit. The loop waits, never works;
threads only look chunks up. See docs/casync.md.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fastapi import APIRouter, Request, Response

from tidings_chunkstore import pack
from tidings_chunkstore.errors import InputError, StoreError, TidingsError, UnsettledError
from tidings_chunkstore.ids import Digest
from tidings_chunkstore.places import PackName

from .api import KEPT, Here, Kept, Mirror, Refused, Shared
from .bundles import RETRY_AFTER, Bundles, Busy, NotRetained
from .casync_chunker import ChunkSizes
from .casync_names import Blob, Names, names_of, packs_of, stem_of
from .casync_view import (
    CasyncView,
    ChunkRequest,
    IndexRequest,
    blob_name,
    index_name,
    parse_request,
)
from .objects import IMMUTABLE, is_hash_named
from .site import Repository, Target

log = logging.getLogger("tidings.casync")

_KIND = "application/octet-stream"
_PATH = "/tidings/casync/{asked:path}"
_THREADS = 4  # that look chunks up at a time, of those that all routes share
_WAITING = 256  # chunks looked up or waited for; who comes then is told to come again
_PATIENCE = 25.0  # seconds in which one request for a chunk may have indexes made
_SNAPSHOTS = 256  # whose names are kept
_MISSES = 1024  # indexes that could not be made, remembered for a while
_MISSED = 60.0  # seconds


class NotOpened(TidingsError):
    """A blob is not in the cache (any more)."""

    code = "not-opened"

    def __init__(self, digest: Digest) -> None:
        super().__init__(f"{digest.hex()} is not opened")
        self.digest = digest


@dataclass(frozen=True, slots=True)
class IndexJob:
    """The index of a blob; see ``bundles.Job``. *tree* is where the published file lies now."""

    store: Path
    blob: Blob
    sizes: ChunkSizes
    tree: str | None
    keep: bool = True  #: the blob too, not the index alone

    @property
    def name(self) -> str:
        """Its file in the cache."""
        return index_name(self.blob.digest, self.sizes)

    @property
    def worker(self) -> str:
        """The module that makes it."""
        return "tidings_server.casync_worker"

    def request(self) -> dict[str, object]:
        """What the worker reads."""
        return {
            "store": str(self.store),
            "pack": str(self.blob.pack),
            "path": self.blob.path,
            "blob": self.blob.digest.hex(),
            "opened": self.blob.opened,
            "tree": self.tree,
            "average": self.sizes.avg,
            "rule": str(self.sizes.rule),
            "keep": self.keep,
        }


class Casync:
    """What the routes share: names of snapshots, indexes in memory, and how many requests wait."""

    def __init__(self, made: Bundles) -> None:
        self._made = made
        # It makes nothing itself (effort 0): that is the jobs' part.
        self._view = CasyncView(self._open, made.folder, effort=0)
        self._names: OrderedDict[PackName, Names] = OrderedDict()
        self._reading = asyncio.Lock()
        self._threads = asyncio.Semaphore(_THREADS)
        self._waiting = 0
        self._missed: OrderedDict[str, float] = OrderedDict()

    async def index(self, asked: IndexRequest, here: Repository, mirror: Shared) -> Response:
        """The answer to a request for an index. Raises Refused."""
        names = (await self._snapshots(here, asked.snapshot, mirror))[0]
        blob = names.find(asked.file)
        if blob is None:
            raise Refused(404, "no-file", "no such file in this snapshot, or it is not stored")
        if blob.size > self._made.most:
            raise Refused(404, "too-large", "the file is larger than this server's cache")
        path = await self._index(blob, asked.sizes, here, mirror)
        by_snapshot = asked.snapshot == stem_of(names.pack)
        immutable = by_snapshot or (asked.file in names.files and is_hash_named(asked.file))
        return Kept(mirror.objects, path, immutable=immutable)

    async def chunk(self, asked: ChunkRequest, here: Repository, mirror: Shared) -> Response:
        """The answer to a request for a chunk. Raises Refused."""
        async with self._slot():
            snapshots = await self._snapshots(here, asked.snapshot, mirror)
            blobs = {
                blob.digest: blob
                for names in snapshots
                for blob in names.blobs()
                if blob.size <= self._made.most
            }
            data = await self._find(asked, blobs, here, mirror)
        if data is None:
            raise Refused(404, "no-chunk", "no file of this repository has such a chunk")
        headers = {"cache-control": IMMUTABLE.decode(), "etag": f'"{asked.id.hex()}"'}
        return Response(data, headers=headers, media_type=_KIND)

    # -- looking for a chunk -----------------------------------------------------------------------

    async def _find(
        self, asked: ChunkRequest, blobs: dict[Digest, Blob], here: Repository, mirror: Shared
    ) -> bytes | None:
        """In the indexes that are there; then, one after the other, in those that are not."""
        until = time.monotonic() + _PATIENCE
        with suppress(UnsettledError):
            return await self._look(asked, blobs, here, mirror, until)
        for blob in blobs.values():
            self._patient(until)
            try:
                await self._index(blob, asked.sizes, here, mirror, keep=False)
                data = await self._look_again(asked, blob, here, mirror, until)
            except Refused as error:
                if error.status != 404:
                    raise
                continue  # it cannot be had: its chunks are nobody's
            if data is not None:
                return data
        return None

    async def _look_again(
        self,
        asked: ChunkRequest,
        blob: Blob,
        here: Repository,
        mirror: Shared,
        until: float,
    ) -> bytes | None:
        """Look into one index just made, or found on disk. Raises Refused."""
        one = {blob.digest: blob}
        with suppress(UnsettledError):
            return await self._look(asked, one, here, mirror, until)
        # Damaged, or fallen to the cache's limit this moment.
        await mirror.thread(self._drop, [index_name(blob.digest, asked.sizes)])
        await self._index(blob, asked.sizes, here, mirror)
        try:
            return await self._look(asked, one, here, mirror, until)
        except UnsettledError as error:
            raise _busy(error) from error

    async def _look(
        self,
        asked: ChunkRequest,
        blobs: dict[Digest, Blob],
        here: Repository,
        mirror: Shared,
        until: float,
    ) -> bytes | None:
        """Look into the indexes there are. Raises UnsettledError when there are not all."""
        while True:
            try:
                async with self._threads:
                    return await mirror.thread(self._view.chunk, asked.id, list(blobs), asked.sizes)
            except NotOpened as error:
                # The index outlived its blob in the cache. Both are made together.
                self._patient(until)
                blob = blobs[error.digest]
                await mirror.thread(self._drop, [index_name(blob.digest, asked.sizes)])
                await self._index(blob, asked.sizes, here, mirror)
            except StoreError as error:
                if error.code != "casync-chunk":
                    log.error("%s: a chunk cannot be read: %s", here.folder, error)
                    raise _later(error) from error
                # The blob or the index is damaged; the view has dropped the index.
                self._patient(until)
                await mirror.thread(self._drop, [blob_name(digest) for digest in blobs])

    def _patient(self, until: float) -> None:
        if time.monotonic() > until:
            raise _busy(Busy("the indexes are in the making"))

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            (self._made.folder / name).unlink(missing_ok=True)

    def _open(self, digest: Digest) -> BinaryIO:
        """A blob of the cache; it counts as used now. Raises NotOpened."""
        try:
            stream = (self._made.folder / blob_name(digest)).open("rb", buffering=0)
        except OSError as error:
            raise NotOpened(digest) from error
        found = os.fstat(stream.fileno())
        os.utime(stream.fileno(), ns=(time.time_ns(), found.st_mtime_ns))
        return stream

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """A place among those that are waited for. Raises Refused."""
        if self._waiting >= _WAITING:
            raise _busy(Busy(f"{self._waiting} chunks are waited for"))
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    # -- indexes and names -------------------------------------------------------------------------

    async def _index(
        self, blob: Blob, sizes: ChunkSizes, here: Repository, mirror: Shared, *, keep: bool = True
    ) -> Path:
        """The index's file in the cache, and its blob beside it with *keep*. Raises Refused."""
        tree = None if blob.opened else await mirror.thread(_published, mirror, here, blob.path)
        job = IndexJob(here.folder, blob, sizes, tree, keep)
        missed = self._missed.get(job.name)
        if missed is not None and time.monotonic() < missed + _MISSED:
            raise Refused(404, "not-retained", "the file cannot be made any more")
        try:
            return await self._made.get(job)
        except Busy as error:
            raise _busy(error) from error
        except NotRetained as error:
            self._missed[job.name] = time.monotonic()
            if len(self._missed) > _MISSES:
                self._missed.popitem(last=False)
            raise Refused(404, error.code, str(error)) from error
        except TidingsError as error:
            raise _later(error) from error

    async def _snapshots(
        self, here: Repository, snapshot: str | None, mirror: Shared
    ) -> list[Names]:
        """The names in the snapshots that are meant, the likeliest first. Raises Refused."""
        try:
            first, *others = packs_of(await mirror.thread(here.head), snapshot)
            found = [await self._names_of(here, first, mirror)]
        except InputError as error:
            raise Refused(404, error.code, str(error)) from error
        except StoreError as error:
            raise Refused(404, error.code, "the snapshot cannot be read") from error
        for name in others:
            with suppress(StoreError):  # gone, or damaged: nobody needs it for the first one
                found.append(await self._names_of(here, name, mirror))
        return found

    async def _names_of(self, here: Repository, name: PackName, mirror: Shared) -> Names:
        """The names in one snapshot; a pack's table is large, what is kept of it is not."""
        found = self._names.get(name)
        if found is None:
            async with self._reading:
                found = self._names.get(name)
                if found is None:
                    toc = await mirror.thread(pack.read_toc, here.store.backend, name)
                    found = names_of(name, toc.snapshot)
                self._names[name] = found
        self._names.move_to_end(name)
        while len(self._names) > _SNAPSHOTS:
            self._names.popitem(last=False)
        return found


def _published(mirror: Shared, here: Repository, path: str) -> str | None:
    """Where the published file lies, inside the site; None where it does not."""
    parts = tuple(part for part in (*here.name.split("/"), *path.split("/")) if part)
    try:
        opened = mirror.site.open(mirror.site.candidates(Target(parts)))
    except PermissionError:
        return None
    if opened is None:
        return None
    os.close(opened[0])
    return opened[1]


def _busy(error: TidingsError) -> Refused:
    return Refused(503, error.code, str(error), retry_after=str(RETRY_AFTER))


def _later(error: TidingsError) -> Refused:
    return Refused(503, error.code, "it could not be made", retry_after=str(RETRY_AFTER))


def make_router(casync: Casync) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.get(
        "/{repository:path}" + _PATH,
        summary="Indexes and chunks for casync and desync",
        response_class=Response,
        responses={
            200: {"content": {_KIND: {}}, "description": "a .caibx index, or a .cacnk chunk"},
            **KEPT,
            404: {"description": "no such file, snapshot or chunk"},
            422: {"description": "an average chunk size that is not on offer"},
            503: {"description": "too many in the making, not ready yet, or a damaged store"},
        },
        openapi_extra={
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in ("repository", "asked")
            ]
        },
    )
    @router.get(_PATH, include_in_schema=False)
    @router.head("/{repository:path}" + _PATH, include_in_schema=False)
    @router.head(_PATH, include_in_schema=False)
    async def get_casync(request: Request, repository: Here, mirror: Mirror) -> Response:
        """``[@snapshot/][<n>k[-desync]/]``, then ``<file>.caibx`` or ``store.castr/...``."""
        target: Target = request.scope["tidings.target"]
        parts = [part for part in repository.name.split("/") if part]
        try:
            asked = parse_request("/".join(target.parts[len(parts) + 2 :]))
        except InputError as error:
            status = 422 if error.code == "casync-sizes" else 404
            raise Refused(status, error.code, str(error)) from error
        if isinstance(asked, IndexRequest):
            return await casync.index(asked, repository, mirror)
        return await casync.chunk(asked, repository, mirror)

    return router
