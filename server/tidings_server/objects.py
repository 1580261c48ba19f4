"""Objects over HTTP, as a plain ASGI application: published files, heads and packs.

A hot object costs one ``stat`` and no thread: what was sent lately lies in memory, bounded in
bytes, and belongs to one version of a file. Everything else is read in threads, in large blocks,
and sent as the client takes it.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import itertools
import json
import logging
import os
import re
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

from tidings_chunkstore import head
from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.limits import KIB, LIMITS, MIB
from tidings_chunkstore.pack import pack_digest
from tidings_chunkstore.places import PackName

from .ranges import MOST_RANGES, Validators, http_date, not_modified, parse, range_holds
from .site import Signature, Site, Target, signature, split_path, target_of

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Headers: TypeAlias = list[tuple[bytes, bytes]]

log = logging.getLogger("tidings.serve")

_ENTRIES = 4096  # objects whose headers are kept ready
_HOT = 256 * KIB  # bytes of the largest piece that is kept in memory
_AT_ONCE = 1 * MIB  # up to this size an answer is read in one go
_BLOCK = 512 * KIB
_HASHED = 1 * MIB  # published files up to this size have their hash as entity tag
_STALL = 120.0  # seconds in which a client must take a block

IMMUTABLE = b"public, max-age=31536000, immutable, no-transform"
REVALIDATE = b"no-cache, no-transform"
#: A file whose name holds a whole checksum never changes under it (createrepo_c's unique names,
#: apt's by-hash).
_HASH_NAMED = re.compile(r"(?:^|[-/])[0-9a-f]{32,128}(?:[-.]|$)")
_TYPES = {".xml": b"application/xml", ".json": b"application/json", ".asc": b"text/plain"}
_ANY = b"application/octet-stream"


@dataclass(frozen=True, slots=True)
class Entry:
    """One version of an object, ready to be sent. *body* is there for heads only."""

    path: str  #: the real path
    version: Signature
    key: int  #: names this version in the memory of pieces
    size: int
    now: Validators
    headers: tuple[tuple[bytes, bytes], ...]  #: with validators, without length
    content_type: bytes
    most_ranges: int
    body: bytes | None = None
    zipped: Entry | None = None  #: the same for clients that accept gzip


@dataclass(frozen=True, slots=True)
class Known:
    """An answer from the cache that stands as long as a head is the one it was asked with."""

    path: Path
    head: str
    version: Signature
    used: Callable[[], bool]  #: counts the file as used; whether it is there


class Changed(FileNotFoundError):
    """The file is another one than a moment ago."""


class Memory:
    """Pieces of objects by key, the ones used last, up to *most* bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: OrderedDict[tuple[int, int, int], bytes] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[int, int, int]) -> bytes | None:
        """The piece, if it is here."""
        piece = self._held.get(key)
        if piece is not None:
            self._held.move_to_end(key)
        return piece

    def put(self, key: tuple[int, int, int], piece: bytes) -> None:
        """Keep a piece; older ones go."""
        if key in self._held or len(piece) > self._most:
            return
        self._held[key] = piece
        self._bytes += len(piece)
        while self._bytes > self._most:
            self._bytes -= len(self._held.popitem(last=False)[1])


class Objects:
    """The ASGI application. *features* is what the served heads promise."""

    def __init__(
        self,
        site: Site,
        pool: ThreadPoolExecutor,
        *,
        memory: int = 64 * MIB,
        features: dict[str, int] | None = None,
    ) -> None:
        self._site = site
        self._pool = pool
        self._memory = Memory(memory)
        self._features = features or {}
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._opening: dict[bytes, asyncio.Task[Entry | None]] = {}
        self._keys = itertools.count()
        self._checked: OrderedDict[Signature, bool] = OrderedDict()
        self._recalled: OrderedDict[tuple[bytes, bytes], Known] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        method: str = scope["method"]
        if method not in ("GET", "HEAD"):
            await plain(send, 405, b"method not allowed\n", [(b"allow", b"GET, HEAD")], close=True)
            return
        raw: bytes = scope["raw_path"]
        asked = {name: value for name, value in scope["headers"] if name in _ASKED}
        for _ in range(3):
            try:
                entry = await self._entry(raw)
            except PermissionError:
                await plain(send, 403, b"forbidden\n")
                return
            if entry is None:
                await plain(send, 404, b"not found\n")
                return
            try:
                await self._answer(entry, method, asked, receive, send)
                return
            except Changed:
                self._entries.pop(raw, None)
        await plain(send, 503, b"changing\n", [(b"retry-after", b"1")])

    # -- entries -----------------------------------------------------------------------------------

    async def _entry(self, raw: bytes) -> Entry | None:
        """What *raw* names now. Raises PermissionError."""
        entry = self._known(raw)
        if entry is not None:
            return entry
        # One look-up however many ask: a pack is hashed whole before its first byte is sent.
        task = self._opening.get(raw)
        if task is None:
            task = asyncio.ensure_future(self._look_up(raw))
            self._opening[raw] = task
            task.add_done_callback(lambda _: self._opening.pop(raw, None))
        return await asyncio.shield(task)

    def _known(self, key: bytes) -> Entry | None:
        """The entry under *key*, if its file is still the same."""
        entry = self._entries.get(key)
        if entry is not None:
            try:
                # A local file system answers from memory; a thread would cost 20 times as much.
                if signature(os.stat(entry.path)) == entry.version:
                    self._entries.move_to_end(key)
                    return entry
            except OSError:
                pass  # gone, or another place now: to be looked up anew
            self._entries.pop(key, None)
        return None

    async def _look_up(self, raw: bytes) -> Entry | None:
        parts = split_path(raw)
        if parts is None:
            return None
        loop = asyncio.get_running_loop()
        entry = await loop.run_in_executor(self._pool, self._open, target_of(parts))
        if entry is not None:
            self._remember(raw, entry)
        return entry

    def _remember(self, raw: bytes, entry: Entry) -> None:
        self._entries[raw] = entry
        if len(self._entries) > _ENTRIES:
            self._entries.popitem(last=False)

    def _open(self, target: Target) -> Entry | None:
        """Find, check and describe an object; runs in a thread. Raises PermissionError."""
        if target.feature is not None:
            return None
        opened = self._site.open(self._site.candidates(target))
        if opened is None:
            return None
        descriptor, path, found = opened
        try:
            version = signature(found)
            if target.is_head:
                return self._head_entry(descriptor, path, found, version)
            if target.pack is not None:
                if not self._pack_holds(descriptor, target.pack, version, path):
                    return None
                etag = b'"%b"' % target.pack.id.hex().encode()
                return self._make(path, version, found, etag, _ANY, IMMUTABLE, 1)
            return self._published(descriptor, path, found, target.parts)
        finally:
            os.close(descriptor)

    def _published(
        self, descriptor: int, path: str, found: os.stat_result, parts: Sequence[str]
    ) -> Entry:
        """A published file; *parts* is the path it was asked by."""
        etag = b'"%x-%x"' % (found.st_mtime_ns, found.st_size)
        if found.st_size <= _HASHED:
            data = os.pread(descriptor, _HASHED, 0)
            etag = b'"%b"' % hashlib.sha256(data).hexdigest()[:24].encode()
        kind = _TYPES.get(os.path.splitext(parts[-1])[1], _ANY)
        cache = IMMUTABLE if is_hash_named("/".join(parts[-3:])) else REVALIDATE
        return self._make(path, signature(found), found, etag, kind, cache, MOST_RANGES)

    def _make(
        self,
        path: str,
        version: Signature,
        found: os.stat_result,
        etag: bytes,
        kind: bytes,
        cache: bytes,
        most_ranges: int,
    ) -> Entry:
        modified = int(found.st_mtime)
        headers = (
            (b"etag", etag),
            (b"last-modified", http_date(modified)),
            (b"cache-control", cache),
            (b"accept-ranges", b"bytes"),
        )
        return Entry(
            path,
            version,
            next(self._keys),
            found.st_size,
            Validators(etag, modified),
            headers,
            kind,
            most_ranges,
        )

    def _head_entry(
        self, descriptor: int, path: str, found: os.stat_result, version: Signature
    ) -> Entry | None:
        """A head with what this server adds, plain and compressed once."""
        if found.st_size > LIMITS.head:
            log.error("%s: larger than a head may be", path)
            return None
        body = with_features(os.pread(descriptor, LIMITS.head, 0), self._features)
        digest = hashlib.sha256(body).hexdigest()[:24].encode()
        modified = Validators(b"", int(found.st_mtime))

        def entry(body: bytes, etag: bytes, *extra: tuple[bytes, bytes]) -> Entry:
            headers = (
                (b"etag", etag),
                (b"last-modified", http_date(modified.modified)),
                (b"cache-control", REVALIDATE),
                (b"vary", b"accept-encoding"),
                *extra,
            )
            now = replace(modified, etag=etag)
            key = next(self._keys)
            kind = b"application/json"
            return Entry(path, version, key, len(body), now, headers, kind, 0, body)

        packed = gzip.compress(body, 9, mtime=0)
        zipped = entry(packed, b'"%b-gz"' % digest, (b"content-encoding", b"gzip"))
        return replace(entry(body, b'"%b"' % digest), zipped=zipped)

    def _pack_holds(self, descriptor: int, name: PackName, version: Signature, path: str) -> bool:
        """Whether a pack is what its name says: hashed once, then remembered by its stat."""
        known = self._checked.get(version)
        if known is None:
            with os.fdopen(os.dup(descriptor), "rb", buffering=0) as file:
                known = pack_digest(iter(lambda: file.read(_BLOCK), b"")) == name.id
            self._checked[version] = known
            if len(self._checked) > 4 * _ENTRIES:
                with suppress(KeyError):  # another thread was faster
                    self._checked.popitem(last=False)
            if not known:
                log.error(
                    "%s is not what its name says and is not served; `tidings-mirror check` shows "
                    "what is damaged, `tidings-mirror repair` mends it",
                    path,
                )
        return known

    async def pack(self, repository: str, name: PackName) -> Entry | None:
        """A pack of a repository, checked. Raises PermissionError."""
        return await self._entry(f"/{quote(repository)}/tidings/{name}".encode())

    async def send_kept(
        self, path: Path, scope: Scope, receive: Receive, send: Send, *, immutable: bool = True
    ) -> None:
        """Answer with a file that is named by what made it, and never changes.

        Not *immutable*: the address may lead to another file tomorrow.
        """
        asked = {name: value for name, value in scope["headers"] if name in _ASKED}
        try:
            entry = self._kept(path, immutable)
            await self._answer(entry, scope["method"], asked, receive, send)
        except FileNotFoundError:  # it fell to the cache's limit this moment
            await plain(send, 503, b"gone\n", [(b"retry-after", b"1")])

    def _kept(self, path: Path, immutable: bool) -> Entry:
        found = os.stat(path)  # on a local disk, as in _entry
        # Without its times: that it was used now is written into them.
        version = signature(found)[:3]
        # No path as sent begins so. One entry, so that its pieces are in memory once.
        key = b"kept:%d:%b" % (immutable, os.fsencode(path))
        entry = self._entries.get(key)
        if entry is None or entry.version != version:
            etag = b'"%b"' % path.stem.encode()
            cache = IMMUTABLE if immutable else REVALIDATE
            entry = self._make(str(path), version, found, etag, _ANY, cache, 1)
            self._remember(key, entry)
        self._entries.move_to_end(key)
        return entry

    def know(self, scope: Scope, known: Known) -> None:
        """Let ``recall`` find an answer to a request by its address."""
        self._recalled[scope["raw_path"], scope["query_string"]] = known
        if len(self._recalled) > _ENTRIES:
            self._recalled.popitem(last=False)

    def recall(self, scope: Scope) -> Path | None:
        """The file that answers a GET or HEAD, if that is known and stands."""
        key = (scope["raw_path"], scope["query_string"])
        known = self._recalled.get(key)
        if known is None or scope["method"] not in ("GET", "HEAD"):
            return None
        try:
            stands = signature(os.stat(known.head)) == known.version and known.used()
        except OSError:
            stands = False
        if not stands:
            del self._recalled[key]
            return None
        self._recalled.move_to_end(key)
        return known.path

    async def holds(self, raw: bytes) -> bool:
        """Whether there is an object at the path *raw*, readable or not."""
        try:
            return await self._entry(raw) is not None
        except PermissionError:
            return True

    async def send_file(
        self,
        path: Path,
        parts: Sequence[str],
        scope: Scope,
        receive: Receive,
        send: Send,
        more: Sequence[tuple[bytes, bytes]] = (),
    ) -> bool:
        """Answer with a published file that the caller found; False when it is gone.

        *parts*: the path it was asked by; *more*: further headers.
        """
        asked = {name: value for name, value in scope["headers"] if name in _ASKED}
        # The path decides its caching headers; no path of a request holds a NUL.
        key = b"\0".join((b"", os.fsencode(path), "/".join(parts[-3:]).encode()))
        for _ in range(3):
            entry = self._known(key)
            if entry is None:
                loop = asyncio.get_running_loop()
                entry = await loop.run_in_executor(self._pool, self._found, path, parts)
                if entry is None:
                    return False
                self._remember(key, entry)
            try:
                given = replace(entry, headers=(*entry.headers, *more)) if more else entry
                await self._answer(given, scope["method"], asked, receive, send)
                return True
            except Changed:
                self._entries.pop(key, None)
        return False

    def _found(self, path: Path, parts: Sequence[str]) -> Entry | None:
        """Describe a file; runs in a thread."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return self._published(descriptor, str(path), os.fstat(descriptor), parts)
        finally:
            os.close(descriptor)

    # -- answers -----------------------------------------------------------------------------------

    async def _answer(
        self, entry: Entry, method: str, asked: dict[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        """Send an object. Raises Changed as long as nothing was sent."""
        if entry.zipped is not None and _accepts_gzip(asked.get(b"accept-encoding")):
            entry = entry.zipped
        if not_modified(entry.now, asked.get(b"if-none-match"), asked.get(b"if-modified-since")):
            headers = [h for h in entry.headers if h[0] not in _NOT_IN_304]
            await send({"type": "http.response.start", "status": 304, "headers": headers})
            await send({"type": "http.response.body"})
            return
        wanted = asked.get(b"range") if entry.most_ranges and method == "GET" else None
        ranges = None
        if wanted is not None and range_holds(entry.now, asked.get(b"if-range")):
            ranges = parse(wanted, entry.size, entry.most_ranges)
        if ranges is None:
            parts = [(b"", 0, entry.size)]
            await self._send(entry, 200, _typed(entry, entry.size), parts, method, receive, send)
        elif not ranges:
            extent = (b"content-range", b"bytes */%d" % entry.size)
            await plain(send, 416, b"", [*entry.headers, extent])
        elif len(ranges) == 1:
            start, length = ranges[0]
            extent = (b"content-range", _extent(start, length, entry.size))
            headers = [*_typed(entry, length), extent]
            await self._send(entry, 206, headers, [(b"", start, length)], method, receive, send)
        else:
            await self._send_many(entry, ranges, receive, send)

    async def _send_many(
        self, entry: Entry, ranges: Sequence[tuple[int, int]], receive: Receive, send: Send
    ) -> None:
        """multipart/byteranges (RFC 9110, 14.6), laid out as nginx does: zchunk knows that."""
        boundary = b"%020d" % secrets.randbelow(10**20)
        parts = []
        for start, length in ranges:
            opening = b"\r\n--%b\r\nContent-Type: %b\r\nContent-Range: %b\r\n\r\n" % (
                boundary,
                entry.content_type,
                _extent(start, length, entry.size),
            )
            parts.append((opening, start, length))
        parts.append((b"\r\n--%b--\r\n" % boundary, 0, 0))
        total = sum(len(opening) + length for opening, _, length in parts)
        kind = b"multipart/byteranges; boundary=" + boundary
        headers = [*entry.headers, (b"content-type", kind), (b"content-length", b"%d" % total)]
        await self._send(entry, 206, headers, parts, "GET", receive, send)

    async def _send(
        self,
        entry: Entry,
        status: int,
        headers: Headers,
        parts: Sequence[tuple[bytes, int, int]],
        method: str,
        receive: Receive,
        send: Send,
    ) -> None:
        """Send *parts*: text to go before, offset and length of each."""
        start: Message = {"type": "http.response.start", "status": status, "headers": headers}
        if method == "HEAD":
            await send(start)
            await send({"type": "http.response.body"})
            return
        total = sum(length for _, _, length in parts)
        body = entry.body
        if body is None and total <= _HOT and len(parts) == 1:
            key = (entry.key, parts[0][1], total)
            body = self._memory.get(key)
            if body is None:
                body = await self._read(entry, parts)
                self._memory.put(key, body)
        elif body is None and total <= _AT_ONCE:
            body = await self._read(entry, parts)
        if body is not None:
            await send(start)
            await send({"type": "http.response.body", "body": body})
            return
        await self._stream(entry, start, parts, receive, send)

    async def _read(self, entry: Entry, parts: Sequence[tuple[bytes, int, int]]) -> bytes:
        def read() -> bytes:
            descriptor = reopen(entry)
            try:
                return b"".join(
                    opening + pread(descriptor, offset, length) for opening, offset, length in parts
                )
            finally:
                os.close(descriptor)

        return await asyncio.get_running_loop().run_in_executor(self._pool, read)

    async def _stream(
        self,
        entry: Entry,
        start: Message,
        parts: Sequence[tuple[bytes, int, int]],
        receive: Receive,
        send: Send,
    ) -> None:
        loop = asyncio.get_running_loop()
        descriptor = await loop.run_in_executor(self._pool, reopen, entry)
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            await send(start)
            for opening, offset, length in parts:
                if opening:
                    await send_block(send, opening)
                end = offset + length
                while offset < end and not gone.done():
                    size = min(_BLOCK, end - offset)
                    block = await loop.run_in_executor(self._pool, pread, descriptor, offset, size)
                    await send_block(send, block)
                    offset += size
            if not gone.done():
                await send({"type": "http.response.body"})
        finally:
            gone.cancel()
            os.close(descriptor)


_ASKED = frozenset(
    {
        *(b"range", b"if-range", b"if-none-match", b"if-modified-since"),
        b"accept-encoding",
    }
)
_NOT_IN_304 = frozenset({b"accept-ranges", b"content-encoding"})


async def plain(
    send: Send, status: int, body: bytes, headers: Headers | None = None, *, close: bool = False
) -> None:
    """An answer that is a line of text, for nobody to keep."""
    said = [*(headers or ()), (b"content-length", b"%d" % len(body))]
    if body:
        said += [(b"content-type", b"text/plain"), (b"cache-control", b"no-store")]
    if close:
        said.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": said})
    await send({"type": "http.response.body", "body": body})


async def until_gone(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_block(send: Send, block: bytes) -> None:
    """Send a part of a body. Raises TimeoutError for a client that takes nothing."""
    async with asyncio.timeout(_STALL):
        await send({"type": "http.response.body", "body": block, "more_body": True})


def pread(descriptor: int, offset: int, length: int) -> bytes:
    """Exactly *length* bytes. Raises OSError where the file has become shorter."""
    data = os.pread(descriptor, length, offset)
    while len(data) < length:
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            raise OSError(f"a file ends at {offset + len(data)}, not at {offset + length}")
        data += more
    return data


def is_hash_named(path: str) -> bool:
    """Whether a checksum in the name says that the file never changes under it."""
    return _HASH_NAMED.search(path) is not None


def with_features(stored: bytes, features: dict[str, int]) -> bytes:
    """A head as it is served: the stored one, and what this server adds.

    One that cannot be read, or is of a later version, goes out as it lies there: its readers say
    what is wrong with it better than a server that changes it.
    """
    try:
        head.decode(stored)
    except FormatError:
        return stored
    value = json.loads(stored)
    value["features"] = dict(sorted(features.items()))
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def reopen(entry: Entry) -> int:
    """Open the entry's file. Raises Changed when it is another one by now."""
    try:
        descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise Changed from error
    if signature(os.fstat(descriptor))[: len(entry.version)] != entry.version:
        os.close(descriptor)
        raise Changed
    return descriptor


def _typed(entry: Entry, length: int) -> Headers:
    return [
        *entry.headers,
        (b"content-type", entry.content_type),
        (b"content-length", b"%d" % length),
    ]


def _extent(start: int, length: int, size: int) -> bytes:
    return b"bytes %d-%d/%d" % (start, start + length - 1, size)


def _accepts_gzip(header: bytes | None) -> bool:
    if header is None or b"gzip" not in header:
        return False
    for item in header.lower().split(b","):
        coding, _, quality = item.partition(b";")
        if coding.strip() == b"gzip":
            return not re.fullmatch(rb"\s*q\s*=\s*0(\.0{0,3})?\s*", quality)
    return False
