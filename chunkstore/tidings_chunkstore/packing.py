"""From the contents of a new snapshot to the sections of its pack. No file is touched here.

``Packer.add`` takes one content after the other: chunks that no pack has yet become frames, the
chunk list becomes an index, and the way from the previous content becomes an edge. ``finish``
lays the sections out so that what one client wants lies together (docs/format.md, "Pack").
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from . import chunker, delta, deltamake, frames, index
from .ids import ChunkId, ContentId, FileId
from .limits import KIB, MIB
from .pack import Content, Dictionary, Edge, FrameRun, PackWriter, Snapshot, Toc
from .places import PackName, Span
from .store import pack_dictionary

#: Contents up to this size also get an edge that needs no older content: a client that is
#: several snapshots behind, or comes without any, then needs one section and no chain.
ALONE = 16 * KIB
#: Contents up to this size are also tried against small contents of the same snapshot.
SMALL = 64 * KIB
#: Where such a section exists, one from the previous content must be below this share of it.
_WORTH = 0.7
#: Contents from this size on get a dictionary trained for their track.
_TRAIN = 1 * MIB
#: A delta above this share of the published file saves too little to be made.
PAYS = 0.9

#: New frames and index above this share of the published file serve nobody: a client without a
#: known base does as well with the whole file. The content is then stored by its delta alone.
_FRAMES_PAY = 0.15
#: The share falls as the store fills, by so much for each time that it has the published files'
#: size, to nothing at the second number: then files whose frames are small still have theirs.
_FILLING = 0.067
_FULL = 4.5
#: What so many snapshots did not use the next one may: one large change does not end it.
_SAVED_UP = 3
_SAMPLES = 48
_INDEXED = 7  #: about the bytes that an index has for a chunk

#: No more than this many deltas lead to a content, ...
MAX_DEPTH = 32
#: ... and above the second number no more than so many bytes are rebuilt on the way to it.
_EASY_DEPTH = 8
_REBUILT = 512 * MIB

Known = Mapping[ChunkId, tuple[Span, Span | None]]


@dataclass(frozen=True, slots=True)
class Base:
    """An older content that a client may hold: of snapshot *serial*; *read* gives its bytes."""

    serial: int
    id: ContentId
    read: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Pinned:
    """What the previous content of a track settled for its successors."""

    params: chunker.ChunkerParams
    dictionary: Span | None
    dictionary_bytes: bytes


@dataclass(frozen=True, slots=True)
class Tally:
    """What went into a pack: numbers of chunks, and bytes."""

    chunks: int = 0
    new_chunks: int = 0
    frames: int = 0
    indexes: int = 0
    edges: int = 0


@dataclass(slots=True)
class _Section:
    track: str
    base: int | None
    uses: tuple[str, ...]
    data: bytes


@dataclass(slots=True)
class Packer:
    """Fills the pack of snapshot *serial*. *known* are the chunks that older packs hold, *fill* is
    how many times the size of the published files they have.
    """

    serial: int
    known: Known
    fill: float = 0.0
    tally: Tally = field(default_factory=Tally)
    _writer: PackWriter = field(init=False)
    _own: dict[ChunkId, tuple[Span, Span | None]] = field(default_factory=dict)
    _runs: list[FrameRun] = field(default_factory=list)
    _dictionaries: list[Dictionary] = field(default_factory=list)
    _indexes: list[tuple[Content, bytes]] = field(default_factory=list)
    _alone: list[_Section] = field(default_factory=list)
    _edges: list[_Section] = field(default_factory=list)
    _direct: list[_Section] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._writer = PackWriter(self.serial)

    def add(
        self,
        track: str,
        content: ContentId,
        data: bytes,
        published_size: int,
        pinned: Pinned | None,
        depth: int,
    ) -> None:
        """Store a content: its new chunks as frames, and its index.

        Where frames do not pay and an edge that ``connect`` made leads here, the edge is all that
        is stored. *depth* is the number of deltas that would then lead to the content.
        """
        before = pinned.params if pinned else None
        params = chunker.params_for(len(data), published_size, before)
        ends = chunker.cuts(data, params)
        ids = chunker.chunk_ids(data, ends)
        view = memoryview(data)
        pieces = [view[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        fresh = {
            chunk: piece
            for chunk, piece in zip(ids, pieces, strict=True)
            if chunk not in self.known and chunk not in self._own
        }
        edged = any(edge.track == track for edge in (*self._edges, *self._alone))
        if edged and bearable(depth, len(data)):
            share = min(_FRAMES_PAY, _FILLING * (_FULL - self.fill))
            allowed = (published_size * share - _INDEXED * len(ids)) * min(depth, _SAVED_UP)
            dictionary = pinned.dictionary_bytes if pinned else b""
            if _estimate(list(fresh.values()), dictionary) > allowed:
                return
        place: Span | None = None
        dictionary = b""
        if pinned and pinned.dictionary:
            place, dictionary = pinned.dictionary, pinned.dictionary_bytes
        elif not pinned and len(data) >= _TRAIN:
            dictionary = frames.train_dictionary(list(fresh.values()))
            if dictionary:
                place = self._add_dictionary(dictionary)
        level = frames.level_for(sum(map(len, fresh.values())))
        written = self._add_frames(fresh, place, frames.FrameWriter(dictionary, level))

        id_size = index.id_size_for(len(ids))
        found = [self._own.get(chunk) or self.known[chunk] for chunk in ids]
        encoded = index.encode(
            index.Index(
                content,
                len(data),
                params,
                id_size,
                b"".join(chunk[:id_size] for chunk in ids),
                tuple(index.Frame(span, used) for span, used in found),
            )
        )
        self._indexes.append((Content(track, content, len(data), None), encoded))
        self.tally = Tally(
            self.tally.chunks + len(ids),
            self.tally.new_chunks + len(fresh),
            self.tally.frames + written,
            self.tally.indexes + len(encoded),
            self.tally.edges,
        )

    def connect(
        self,
        track: str,
        content: ContentId,
        data: bytes,
        published_size: int,
        previous: Base | None,
        helpers: Sequence[tuple[str, ContentId, bytes]] = (),
    ) -> None:
        """Make the edges to a content: from *previous*, and alone where it is small.

        *helpers* are small contents of this snapshot (track, id, bytes) that clients rebuild
        before this one, tried as a further base: InRelease is mostly the Release beside it.
        """
        alone = self._best_alone(track, content, data, helpers)
        limit = int(published_size * PAYS)
        if alone is not None:
            limit = min(limit, int(len(alone.data) * _WORTH))
        section = None
        if previous is not None and limit > 0:
            section = deltamake.make(
                [(previous.id, previous.read())],
                content,
                data,
                budget=delta.Budget(limit=limit),
            )
        if section is not None and previous is not None:
            self._edges.append(_Section(track, previous.serial, (), section))
            if alone is not None:
                self._alone.append(alone)
        elif alone is not None:
            self._edges.append(alone)

    def connect_directly(
        self, track: str, content: ContentId, data: bytes, published_size: int, base: Base
    ) -> None:
        """Make a direct edge from an older snapshot's content."""
        section = deltamake.make(
            [(base.id, base.read())],
            content,
            data,
            budget=delta.Budget(limit=int(published_size * PAYS)),
        )
        if section is not None:
            self._direct.append(_Section(track, base.serial, (), section))

    def finish(self, snapshot: Snapshot, previous: int | None) -> tuple[PackName, list[bytes], Toc]:
        """Close the pack. *snapshot*'s contents without an index get the one made here."""
        places: dict[ContentId, Span] = {}
        for content, encoded in reversed(self._indexes):
            places[content.id] = self._writer.add(encoded)
        direct = sorted(self._direct, key=lambda section: -(section.base or 0))
        edges = [*self._lay(self._alone), *self._lay(self._edges), *self._lay(direct)]
        contents = tuple(
            Content(c.track, c.id, c.size, c.index or places.get(c.id)) for c in snapshot.contents
        )
        whole = replace(snapshot, contents=contents)
        toc = Toc(whole, previous, tuple(self._runs), tuple(self._dictionaries), tuple(edges))
        name, pieces = self._writer.finish(toc)
        return name, pieces, toc

    def _add_dictionary(self, dictionary: bytes) -> Span:
        stored = pack_dictionary(dictionary)
        span = self._writer.add(stored)
        self._dictionaries.append(
            Dictionary(span.offset, span.length, FileId(hashlib.sha256(stored).digest()))
        )
        return span

    def _add_frames(
        self,
        fresh: Mapping[ChunkId, memoryview],
        dictionary: Span | None,
        writer: frames.FrameWriter,
    ) -> int:
        if not fresh:
            return 0
        rows = []
        start = self._writer.size
        for chunk, piece in fresh.items():
            span = self._writer.add(writer.frame(piece))
            self._own[chunk] = (span, dictionary)
            rows.append((chunk, len(piece), span.length))
        self._runs.append(FrameRun(start, dictionary, tuple(rows)))
        return self._writer.size - start

    def _best_alone(
        self,
        track: str,
        content: ContentId,
        data: bytes,
        helpers: Iterable[tuple[str, ContentId, bytes]],
    ) -> _Section | None:
        """The best section that needs no older content, for a small content."""
        best = None
        if len(data) <= ALONE:
            best = _Section(track, None, (), _must(deltamake.make([], content, data)))
        for other, other_id, other_data in helpers if len(data) <= SMALL else ():
            limit = int((len(best.data) if best else len(data)) * _WORTH)
            section = deltamake.make(
                [(other_id, other_data)], content, data, budget=delta.Budget(limit=limit)
            )
            if section is not None:
                best = _Section(track, None, (other,), section)
        return best

    def _lay(self, sections: Iterable[_Section]) -> list[Edge]:
        edges = []
        for section in sections:
            span = self._writer.add(section.data)
            edges.append(Edge(section.track, section.base, section.uses, span.offset, span.length))
            self.tally = Tally(
                self.tally.chunks,
                self.tally.new_chunks,
                self.tally.frames,
                self.tally.indexes,
                self.tally.edges + span.length,
            )
        return edges


def bearable(depth: int, size: int) -> bool:
    """Whether *depth* deltas may lead to a content of *size* bytes: publish reads through them."""
    return depth <= _EASY_DEPTH or (depth <= MAX_DEPTH and depth * size <= _REBUILT)


def _estimate(chunks: Sequence[memoryview], dictionary: bytes) -> float:
    """About how many bytes the frames of *chunks* will take, from a few of them."""
    if not chunks:
        return 0.0
    step = -(-len(chunks) // _SAMPLES)
    writer = frames.FrameWriter(dictionary, frames.LEVEL_FIRST)
    some = chunks[::step]
    return sum(len(writer.frame(chunk)) for chunk in some) / len(some) * len(chunks)


def _must(section: bytes | None) -> bytes:
    if section is None:
        raise AssertionError("a delta without a limit is always made")
    return section
