"""A maintenance pack: the current snapshot once more, with what is still needed of packs that go.

It is an ordinary pack with a serial of its own and the current snapshot's files. The frames that
live in the packs to replace (the *victims*) are copied into it as they are, each after its chunk
id was checked; every index that led to a victim is written anew, those of older snapshots' contents
as ``Toc.kept``. The deltas that contents are stored by are copied likewise, and ``Toc.kept`` tells
what they start from, so that no older table of contents is needed. For clients it has none: they
take the old ones, for its contents are the same.

With *salvage* frames that are damaged, or lie in packs that are gone, are made again from chunks
that the caller has from elsewhere: that is how repair works.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from . import delta, index
from .chunker import chunk_id, chunk_ids, cuts, params_for
from .errors import FormatError, StoreError
from .frames import FrameReader, FrameWriter
from .ids import ChunkId, ContentId, FileId
from .pack import Content, Dictionary, FrameRun, Kept, PackWriter, Toc
from .places import PackName, Span
from .reach import Reach, Tocs, chunk_rows
from .store import Store, Stored

#: A chunk from elsewhere by the first bytes of its id (5 or more), None where it is not known.
Supplier = Callable[[bytes], bytes | None]
#: A whole content that cannot be had by its index, None where it is not known.
Rescuer = Callable[[ContentId], bytes | None]


def _nothing(_: bytes) -> bytes | None:
    return None


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A maintenance pack in memory."""

    name: PackName
    pieces: list[bytes]
    toc: Toc
    copied: int  #: bytes of frames, dictionaries and deltas
    remade: int  #: frames made again by salvage
    lost: Mapping[ContentId, str]  #: contents that salvage could not have, and why


@dataclass(slots=True)
class _Run:
    offset: int
    dictionary: Span | None
    end: int = -1
    rows: list[tuple[ChunkId, int, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Rewrite:
    store: Store
    tocs: dict[PackName, Toc]
    victims: frozenset[PackName]
    supply: Supplier
    salvage: bool
    writer: PackWriter
    frames: dict[Span, index.Frame] = field(default_factory=dict)
    failed: dict[Span, str] = field(default_factory=dict)
    dictionaries: dict[Span, Span | None] = field(default_factory=dict)
    packs_rows: dict[PackName, dict[int, tuple[bytes, int, int]]] = field(default_factory=dict)
    readers: dict[Span | None, FrameReader] = field(default_factory=dict)
    runs: list[_Run] = field(default_factory=list)
    stored_dictionaries: list[Dictionary] = field(default_factory=list)
    copied: int = 0
    remade: int = 0

    # -- dictionaries ----------------------------------------------------------------------------

    def dictionary(self, span: Span | None) -> Span | None:
        """Where a dictionary lies afterwards: copied out of a victim, or where it was.

        Raises StoreError when it is damaged.
        """
        if span is None or span.pack not in self.victims:
            return span
        if span not in self.dictionaries:
            data = self.store.read_span(span)
            digest = hashlib.sha256(data).digest()
            toc = self.tocs.get(span.pack)
            known = {d.offset: d.checksum for d in toc.dictionaries} if toc else {}
            if toc is not None and known.get(span.offset) != digest:
                raise StoreError(f"{span.pack}: a dictionary is damaged", name=str(span.pack))
            self.reader(span)
            copy = self.writer.add(data)
            self.copied += copy.length
            self.stored_dictionaries.append(Dictionary(copy.offset, copy.length, FileId(digest)))
            self.dictionaries[span] = copy
        return self.dictionaries[span]

    def reader(self, dictionary: Span | None) -> FrameReader:
        if dictionary not in self.readers:
            try:
                reader = FrameReader(self.store.read_dictionary(dictionary))
            except FormatError as error:
                raise StoreError(f"a dictionary is damaged: {error}") from error
            self.readers[dictionary] = reader
        return self.readers[dictionary]

    # -- frames ----------------------------------------------------------------------------------

    def frame(self, frame: index.Frame, short: bytes) -> index.Frame:
        """Where a frame lies afterwards, copied or made again where needed. Raises StoreError."""
        used = frame.dictionary
        moves = frame.span.pack in self.victims or (used is not None and used.pack in self.victims)
        if not moves:
            return frame
        known = self.frames.get(frame.span)
        if known is not None:
            return known
        if frame.span in self.failed:
            raise StoreError(self.failed[frame.span], name=str(frame.span.pack))
        try:
            made = self._moved(frame, short)
        except StoreError as error:
            chunk = self.supply(short) if self.salvage else None
            if chunk is None:
                self.failed[frame.span] = str(error)
                raise
            made = self._made(chunk)
        self.frames[frame.span] = made
        return made

    def _moved(self, frame: index.Frame, short: bytes) -> index.Frame:
        dictionary = self.dictionary(frame.dictionary)
        if frame.span.pack not in self.victims:
            return index.Frame(frame.span, dictionary)
        opener = self.reader(frame.dictionary)
        data = self.store.read_span(frame.span)
        try:
            chunk = opener.open(data)
        except FormatError as error:
            raise StoreError(
                f"{frame.span.pack}: {error}", code="store-damaged", name=str(frame.span.pack)
            ) from error
        id_ = chunk_id(chunk)
        if id_[: len(short)] != short or self._full_id(frame.span) not in (None, id_):
            raise StoreError(
                f"{frame.span.pack}: a chunk is not what its id says",
                code="store-damaged",
                name=str(frame.span.pack),
            )
        span = self.writer.add(data)
        self.copied += span.length
        self._row(span, dictionary, id_, len(chunk))
        return index.Frame(span, dictionary)

    def _full_id(self, span: Span) -> bytes | None:
        """The whole id that the pack's table of contents has for a frame, if it can be read."""
        if span.pack not in self.packs_rows:
            known = span.pack in self.tocs
            self.packs_rows[span.pack] = chunk_rows(self.tocs, span.pack) if known else {}
        row = self.packs_rows[span.pack].get(span.offset)
        return row[0] if row else None

    def _made(self, chunk: bytes) -> index.Frame:
        span = self.writer.add(FrameWriter(b"").frame(chunk))
        self.remade += 1
        self._row(span, None, chunk_id(chunk), len(chunk))
        return index.Frame(span, None)

    def _row(self, span: Span, dictionary: Span | None, id_: ChunkId, size: int) -> None:
        last = self.runs[-1] if self.runs else None
        if last is None or last.end != span.offset or last.dictionary != dictionary:
            last = _Run(span.offset, dictionary)
            self.runs.append(last)
        last.rows.append((id_, size, span.length))
        last.end = span.end

    # -- deltas ----------------------------------------------------------------------------------

    def edge(self, stored: Stored) -> Span:
        """Where the delta to a content lies afterwards. Raises StoreError when it is damaged."""
        place = stored.edge
        assert place is not None
        if place.pack not in self.victims:
            return place
        data = self.store.read_span(place)
        try:
            told = delta.verify(data)
        except FormatError as error:
            raise StoreError(
                f"{place.pack}: {error}", code="store-damaged", name=str(place.pack)
            ) from error
        if told.target != stored.id:
            raise StoreError(
                f"{place.pack}: a delta leads elsewhere than its table of contents says",
                code="store-damaged",
                name=str(place.pack),
            )
        self.copied += place.length
        return self.writer.add(data)

    # -- indexes ---------------------------------------------------------------------------------

    def index(self, place: Span) -> bytes:
        """A content's index with every frame where it lies afterwards. Raises StoreError."""
        chunk_list = self.store.read_index(place)
        frames = tuple(
            self.frame(frame, short)
            for frame, short in zip(chunk_list.frames, chunk_list.short_ids(), strict=True)
        )
        return index.encode(replace(chunk_list, frames=frames))

    def whole(self, content: ContentId, data: bytes) -> bytes:
        """The index of a content that is stored anew."""
        params = params_for(len(data), len(data))
        ends = cuts(data, params)
        size = index.id_size_for(len(ends))
        ids = b"".join(id_[:size] for id_ in chunk_ids(data, ends))
        starts = [0, *ends[:-1]] if ends else []
        frames = tuple(self._made(data[i:j]) for i, j in zip(starts, ends, strict=True))
        return index.encode(index.Index(content, len(data), params, size, ids, frames))


def compose(
    store: Store,
    serial: int,
    current: tuple[PackName, Toc],
    contents: Iterable[ContentId],
    reach: Reach,
    tocs: Tocs,
    victims: Iterable[PackName],
    *,
    supply: Supplier = _nothing,
    rescue: Rescuer = _nothing,
    salvage: bool = False,
) -> Rewritten:
    """The pack of snapshot *serial*, which is *current* again; afterwards no content in *contents*
    needs a victim. *reach* says where the contents lie.

    Raises StoreError when something is damaged and *salvage* is off.
    """
    work = _Rewrite(store, dict(tocs), frozenset(victims), supply, salvage, PackWriter(serial))
    encoded: dict[ContentId, bytes] = {}
    edges: dict[ContentId, tuple[Stored, Span]] = {}
    lost: dict[ContentId, str] = {}
    sizes: dict[ContentId, int] = {}
    for content in contents:
        stored = reach.found.get(content)
        why = "it is not to be found"
        if stored is not None and stored.index is not None:
            try:
                encoded[content] = work.index(stored.index)
                sizes[content] = stored.size
                continue
            except StoreError as error:
                if not salvage:
                    raise
                why = str(error)
        elif stored is not None and not salvage:
            # What is salvaged is damaged in its chain: it is better whole.
            edges[content] = (stored, work.edge(stored))
        rescued = rescue(content) if salvage else None
        if rescued is not None:
            encoded[content] = work.whole(content, rescued)
            sizes[content] = len(rescued)
        elif salvage:
            lost[content] = why
    places = {content: work.writer.add(data) for content, data in encoded.items()}
    name, toc = current
    own = {c.id for c in toc.snapshot.contents}
    snapshot = replace(
        toc.snapshot,
        serial=serial,
        contents=tuple(
            Content(
                c.track,
                c.id,
                c.size,
                places.get(c.id) or (c.index.within(name) if c.index else None),
            )
            for c in toc.snapshot.contents
        ),
    )
    tracks = {c.id: c.track for _, t in tocs for c in t.told}
    kept = [
        Kept(tracks.get(content, ""), content, sizes[content], place)
        for content, place in places.items()
        if content not in own
    ]
    kept += [
        Kept(tracks[content], content, stored.size, None, place, stored.bases)
        for content, (stored, place) in edges.items()
    ]
    whole = Toc(
        snapshot,
        toc.snapshot.serial,
        tuple(FrameRun(run.offset, run.dictionary, tuple(run.rows)) for run in work.runs),
        tuple(work.stored_dictionaries),
        (),
        tuple(kept),
    )
    pack_name, pieces = work.writer.finish(whole)
    return Rewritten(pack_name, pieces, whole, work.copied, work.remade, lost)
