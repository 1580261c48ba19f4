"""Packs: one immutable file per publish, and the table of contents at its end.

A pack holds, in this order: dictionaries and new frames, indexes, deltas (*edges*), the table of
contents (TOC), a tail of fixed size. The TOC describes the whole snapshot, so that a head can be
rebuilt from packs alone. Clients never read it: the head tells them where to look.
The byte table is in docs/format.md, section "Pack".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .backends.base import Readable
from .errors import FormatError, StoreError
from .fields import Fields, as_integer, as_text, parse_json
from .ids import ChunkId, ContentId, FileId
from .limits import LIMITS
from .places import SELF, PackName, Span
from .recipe import Recipe
from .wire import Reader, put_uvarint
from .zstd import zstd

MAGIC = b"TIDPACK1"
TAIL_MAGIC = b"TIDTOC_1"
_TAIL = 8 + 8 + 8 + 32 + len(TAIL_MAGIC)
REPO_ID = 16  #: bytes of a repository's identity


@dataclass(frozen=True, slots=True)
class File:
    """One published file. Without *recipe* it is opaque: its content is the published bytes."""

    path: str
    type: str
    track: str
    size: int
    sha256: FileId
    recipe: Recipe | None


@dataclass(frozen=True, slots=True)
class Content:
    """The content of *track* in a snapshot. Without *index* it is not stored."""

    track: str
    id: ContentId
    size: int
    index: Span | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One published state. Files and contents are in the order in which clients want them."""

    repo: bytes
    serial: int
    time: int  #: when it was published, seconds since 1970
    layout: str
    main: str
    timestamp: int  #: newest data timestamp of repomd.xml, or Date of Release
    files: tuple[File, ...]
    contents: tuple[Content, ...]

    def content(self, track: str) -> Content | None:
        """The content of *track*, if there is one."""
        return next((c for c in self.contents if c.track == track), None)

    def file(self, path: str) -> File | None:
        """The file at *path*, if there is one."""
        return next((f for f in self.files if f.path == path), None)


@dataclass(frozen=True, slots=True)
class Edge:
    """A delta to this snapshot's content of *track*.

    It needs the content of the same track in snapshot *base* (None: it needs no older content),
    and this snapshot's contents of the tracks in *uses*.
    """

    track: str
    base: int | None
    uses: tuple[str, ...]
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class FrameRun:
    """Consecutive frames; *dictionary* opens them. Row i: chunk id, open length, frame length."""

    offset: int
    dictionary: Span | None
    rows: tuple[tuple[ChunkId, int, int], ...]


@dataclass(frozen=True, slots=True)
class Dictionary:
    """A frame dictionary, stored as one zstd frame; the checksum is the SHA-256 of those bytes."""

    offset: int
    length: int
    checksum: bytes


@dataclass(frozen=True, slots=True)
class Kept:
    """Where a content lies whose pack goes: by *index*, or in the delta *edge* from *bases*.

    It tells all that the packs' tables of contents told: *track* is the content's in some
    snapshot, and the bases are named by their ids, in the order in which the delta has them.
    """

    track: str
    id: ContentId
    size: int
    index: Span | None
    edge: Span | None = None
    bases: tuple[ContentId, ...] = ()


@dataclass(frozen=True, slots=True)
class Toc:
    """A pack's table of contents. *previous* is the serial of the snapshot before, if any.

    *kept* are contents that gc moved here, or tells of here, out of a pack that goes.
    """

    snapshot: Snapshot
    previous: int | None
    runs: tuple[FrameRun, ...]
    dictionaries: tuple[Dictionary, ...]
    edges: tuple[Edge, ...]
    kept: tuple[Kept, ...] = ()

    @property
    def told(self) -> tuple[Content | Kept, ...]:
        """All contents of which it says something."""
        return (*self.kept, *self.snapshot.contents)


@dataclass(slots=True)
class PackWriter:
    """Lays sections one after the other, in memory: a pack is the size of a change.

    Spans that point into the pack being written carry ``PackName(serial, SELF)``: the name is the
    hash of the bytes, so no byte can hold it. Readers put the real name in.
    """

    serial: int
    _pieces: list[bytes] = field(default_factory=lambda: [MAGIC])
    _size: int = len(MAGIC)

    @property
    def own(self) -> PackName:
        """The name that stands for this pack inside it."""
        return PackName(self.serial, SELF)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._size

    def add(self, data: bytes) -> Span:
        """Append a section."""
        span = Span(self.own, self._size, len(data))
        self._pieces.append(data)
        self._size += len(data)
        return span

    def finish(self, toc: Toc) -> tuple[PackName, list[bytes]]:
        """Close the pack with *toc*: its name and its bytes."""
        plain = encode_toc(toc)
        packed = zstd.compress(plain, 9)
        offset = self.add(packed).offset
        tail = (
            offset.to_bytes(8, "little")
            + len(packed).to_bytes(8, "little")
            + len(plain).to_bytes(8, "little")
            + hashlib.sha256(packed).digest()
            + TAIL_MAGIC
        )
        self.add(tail)
        digest = hashlib.sha256()
        for piece in self._pieces:
            digest.update(piece)
        return PackName(self.serial, digest.digest()[:8]), self._pieces


def read_toc(backend: Readable, name: PackName) -> Toc:
    """Read the table of contents of a pack.

    Raises StoreError when the pack is missing, damaged, or not what its name says.
    """
    text = str(name)
    size = backend.size(text)
    if size is None:
        raise StoreError(f"pack {text} is missing", code="store-missing", name=text)
    if not len(MAGIC) + _TAIL <= size <= LIMITS.pack:
        raise StoreError(f"pack {text}: {size} bytes cannot be a pack", name=text)
    try:
        tail = Reader(backend.read_at(text, size - _TAIL, _TAIL), f"pack {text}")
        offset, stored, plain = (tail.fixed(8) for _ in range(3))
        digest = bytes(tail.take(32))
        tail.expect(TAIL_MAGIC)
        if offset + stored + _TAIL != size or offset < len(MAGIC) or plain > LIMITS.toc:
            raise FormatError(f"pack {text}: the table of contents does not fit the file")
        packed = backend.read_at(text, offset, stored)
        if hashlib.sha256(packed).digest() != digest:
            raise FormatError(f"pack {text}: the table of contents is damaged")
        opener = zstd.ZstdDecompressor()
        data = opener.decompress(packed, max_length=plain + 1)
        if len(data) != plain or not opener.eof:
            raise FormatError(f"pack {text}: the table of contents has the wrong size")
        toc = decode_toc(data, name)
    except (FormatError, zstd.ZstdError) as error:
        raise StoreError(str(error), code="store-damaged", name=text) from error
    if toc.snapshot.serial != name.serial:
        raise StoreError(f"pack {text} holds snapshot {toc.snapshot.serial}", name=text)
    return toc


def pack_digest(pieces: Iterable[bytes]) -> bytes:
    """The digest part of a pack's name, for checking a whole pack."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()[:8]


# -- the table of contents -----------------------------------------------------------------------


def _span_json(span: Span | None) -> object:
    if span is None:
        return None
    name = "" if span.pack.id == SELF else str(span.pack)
    return [name, span.offset, span.length]


def _content_json(content: Content | Kept) -> dict[str, object]:
    return {
        "track": content.track,
        "id": content.id.hex(),
        "size": content.size,
        "index": _span_json(content.index),
    }


def _kept_json(kept: Kept) -> dict[str, object]:
    value = _content_json(kept)
    if kept.edge is not None:
        value["edge"] = _span_json(kept.edge)
        value["bases"] = [base.hex() for base in kept.bases]
    return value


def encode_toc(toc: Toc) -> bytes:
    """A uvarint length, that many bytes of JSON, then the frame rows."""
    snapshot = toc.snapshot
    value: dict[str, object] = {
        "v": 1,
        "repo": snapshot.repo.hex(),
        "serial": snapshot.serial,
        "previous": toc.previous,
        "time": snapshot.time,
        "layout": snapshot.layout,
        "main": snapshot.main,
        "timestamp": snapshot.timestamp,
        "files": [
            {
                "path": f.path,
                "type": f.type,
                "track": f.track,
                "size": f.size,
                "sha256": f.sha256.hex(),
                "recipe": f.recipe.to_json() if f.recipe else None,
            }
            for f in snapshot.files
        ],
        "contents": [_content_json(c) for c in snapshot.contents],
        "runs": [[r.offset, len(r.rows), _span_json(r.dictionary)] for r in toc.runs],
        "dictionaries": [[d.offset, d.length, d.checksum.hex()] for d in toc.dictionaries],
        "edges": [[e.track, e.base, list(e.uses), e.offset, e.length] for e in toc.edges],
    }
    if toc.kept:
        value["kept"] = [_kept_json(c) for c in toc.kept]
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    out = bytearray()
    put_uvarint(out, len(text))
    out += text
    for run in toc.runs:
        for _, size, length in run.rows:
            put_uvarint(out, size)
            put_uvarint(out, length)
        out += b"".join(row[0] for row in run.rows)
    return bytes(out)


def _as_span(value: object, own: PackName, what: str) -> Span | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 3:
        raise FormatError(f"{what}: not a span")
    pack = PackName.parse(as_text(value[0], what)) if value[0] != "" else own
    return Span(
        pack, as_integer(value[1], what, LIMITS.pack), as_integer(value[2], what, LIMITS.pack)
    )


def decode_toc(data: bytes, own: PackName) -> Toc:
    """Read a table of contents of the pack *own*. Raises FormatError."""
    what = f"pack {own}"
    reader = Reader(data, what)
    value = Fields(parse_json(reader.take(reader.uvarint(LIMITS.toc)), what), what)
    if value.get("v") != 1:
        raise FormatError(f"{what}: unknown version {value.get('v')!r}", code="format-version")

    files = []
    for item in value.items("files", LIMITS.files):
        entry = Fields(item, what)
        recipe = entry.get("recipe")
        files.append(
            File(
                entry.text("path"),
                entry.text("type"),
                entry.text("track"),
                entry.integer("size", LIMITS.published),
                FileId.from_hex(entry.text("sha256")),
                None if recipe is None else Recipe.from_json(recipe),
            )
        )
    contents = _contents(value.items("contents", 2 * LIMITS.files), own, what)
    kept: tuple[Kept, ...] = ()
    if value.get("kept") is not None:
        kept = tuple(_kept(value.items("kept", 64 * LIMITS.files), own, what))
    try:
        repo = bytes.fromhex(value.text("repo"))
    except ValueError as error:
        raise FormatError(f"{what}: repo is not hexadecimal") from error
    if len(repo) != REPO_ID:
        raise FormatError(f"{what}: repo has {len(repo)} bytes, not {REPO_ID}")
    snapshot = Snapshot(
        repo,
        value.integer("serial", (1 << 32) - 1),
        value.integer("time"),
        value.text("layout"),
        value.text("main"),
        value.integer("timestamp"),
        tuple(files),
        contents,
    )

    runs = []
    heads = []
    for item in value.items("runs", LIMITS.chunks):
        if not isinstance(item, list) or len(item) != 3:
            raise FormatError(f"{what}: not a run of frames")
        heads.append(
            (
                as_integer(item[0], what, LIMITS.pack),
                as_integer(item[1], what, reader.left // 34),
                _as_span(item[2], own, what),
            )
        )
    for offset, count, dictionary in heads:
        sizes = [(reader.uvarint(LIMITS.chunk), reader.uvarint(LIMITS.pack)) for _ in range(count)]
        ids = bytes(reader.take(count * ChunkId.SIZE))
        rows = tuple(
            (ChunkId(ids[i * 32 : i * 32 + 32]), size, length)
            for i, (size, length) in enumerate(sizes)
        )
        runs.append(FrameRun(offset, dictionary, rows))
    reader.done()

    dictionaries = []
    for item in value.items("dictionaries", LIMITS.files):
        if not isinstance(item, list) or len(item) != 3:
            raise FormatError(f"{what}: not a dictionary")
        dictionaries.append(
            Dictionary(
                as_integer(item[0], what, LIMITS.pack),
                as_integer(item[1], what, LIMITS.dictionary),
                FileId.from_hex(as_text(item[2], what)),
            )
        )
    previous = value.get("previous")
    return Toc(
        snapshot,
        None if previous is None else as_integer(previous, what),
        tuple(runs),
        tuple(dictionaries),
        tuple(_edges(value.items("edges", 64 * LIMITS.files), what)),
        kept,
    )


def _contents(items: list[object], own: PackName, what: str) -> tuple[Content, ...]:
    contents = []
    for item in items:
        entry = Fields(item, what)
        contents.append(
            Content(
                entry.text("track"),
                ContentId.from_hex(entry.text("id")),
                entry.integer("size", LIMITS.content),
                _as_span(entry.get("index"), own, what),
            )
        )
    return tuple(contents)


def _kept(items: list[object], own: PackName, what: str) -> Iterator[Kept]:
    for item, content in zip(items, _contents(items, own, what), strict=True):
        entry = Fields(item, what)
        edge = _as_span(entry.get("edge"), own, what)
        bases: tuple[ContentId, ...] = ()
        if edge is not None:
            found = entry.items("bases", LIMITS.delta_bases)
            bases = tuple(ContentId.from_hex(as_text(base, what)) for base in found)
        yield Kept(content.track, content.id, content.size, content.index, edge, bases)


def _edges(items: list[object], what: str) -> Iterator[Edge]:
    for item in items:
        if not isinstance(item, list) or len(item) != 5 or not isinstance(item[2], list):
            raise FormatError(f"{what}: not an edge")
        track, base, uses, offset, length = item
        yield Edge(
            as_text(track, what),
            None if base is None else as_integer(base, what),
            tuple(as_text(use, what) for use in uses),
            as_integer(offset, what, LIMITS.pack),
            as_integer(length, what, LIMITS.pack),
        )
