"""The store of one repository, read side: its head, its packs, its contents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from . import delta, head, index, pack
from .backends.base import HEAD_NAME, Readable
from .errors import FormatError, InputError, StoreError
from .frames import FrameReader
from .ids import ContentId
from .limits import LIMITS
from .places import PackName, Span
from .zstd import zstd

_READ = 8 << 20  # bytes of frames read at once


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a content lies: by *index*, or in the delta *edge* from the contents *bases*.

    *depth* is the number of deltas that lead to it from contents with an index, or from nothing.
    *tellers* are the packs whose tables of contents say all this.
    """

    id: ContentId
    size: int
    index: Span | None
    edge: Span | None = None
    bases: tuple[ContentId, ...] = ()
    depth: int = 0
    tellers: tuple[PackName, ...] = ()


class Store:
    """Reads one repository's store. Tables of contents are kept: packs never change."""

    def __init__(self, backend: Readable) -> None:
        self.backend = backend
        self._tocs: dict[PackName, pack.Toc] = {}
        self._dictionaries: dict[Span, bytes] = {}
        self._indexes: dict[Span, index.Index] = {}

    def read_head_bytes(self) -> bytes | None:
        """head.json as it lies there, None where there is none."""
        size = self.backend.size(HEAD_NAME)
        if size is None:
            return None
        if size > LIMITS.head:
            raise StoreError(f"{HEAD_NAME} has {size} bytes", code="store-head")
        return self.backend.read_at(HEAD_NAME, 0, size)

    def read_head(self) -> head.Head | None:
        """The head, None where there is none.

        Raises StoreError when it is damaged, InputError when a newer release wrote it.
        """
        data = self.read_head_bytes()
        if data is None:
            return None
        try:
            return head.decode(data)
        except FormatError as error:
            refuse_newer(error)
            raise StoreError(str(error), code="store-head") from error

    def pack_names(self) -> list[PackName]:
        """All packs in the folder, oldest first. Other names are none of the store's business."""
        found = []
        for name in self.backend.names():
            if name.endswith(".pack"):
                try:
                    found.append(PackName.parse(name))
                except FormatError:
                    continue  # a foreign file; check reports it, nobody else minds
        return sorted(found, key=lambda n: (n.serial, n.id))

    def toc(self, name: PackName) -> pack.Toc:
        """A pack's table of contents. Raises StoreError."""
        if name not in self._tocs:
            self._tocs[name] = pack.read_toc(self.backend, name)
        return self._tocs[name]

    def remember(self, name: PackName, toc: pack.Toc) -> None:
        """Take in the table of contents of a pack just written."""
        self._tocs[name] = toc

    def tocs(self, names: Sequence[PackName]) -> list[tuple[PackName, pack.Toc]]:
        """The tables of contents of *names*, in their order."""
        return [(name, self.toc(name)) for name in names]

    def locate(self, tocs: Sequence[tuple[PackName, pack.Toc]]) -> dict[ContentId, Stored]:
        """Where each content that *tocs* know of lies: by the newest index, else by the shortest
        chain of deltas. Contents that are not stored are absent.
        """
        found: dict[ContentId, Stored] = {}
        for name, toc in tocs:
            for content in toc.told:
                if content.index is not None:
                    place = content.index.within(name)
                    found[content.id] = Stored(content.id, content.size, place, tellers=(name,))
        # gc tells of deltas in newer packs than those that hold them: any order has to do. It ends,
        # as depths only fall; nearly all is found in the first round.
        edges = list(_edges(tocs))
        there = {name for name, _ in tocs}
        present = [edge for edge in edges if edge.edge and edge.edge.pack in there]
        while _reach_further(present, found):
            pass
        # A pack that told where a delta lay outlives it when gc moves the delta once more. Only
        # what is nowhere else is looked for there, so that it can be said what is missing.
        gone = [edge for edge in edges if edge.id not in found]
        while _reach_further(gone, found):
            pass
        return found

    def read_span(self, span: Span) -> bytes:
        """The bytes of *span*. Raises StoreError."""
        return self.backend.read_at(str(span.pack), span.offset, span.length)

    def read_index(self, span: Span) -> index.Index:
        """Raises StoreError when the index is damaged."""
        if span not in self._indexes:
            try:
                self._indexes[span] = index.decode(self.read_span(span), span.pack)
            except FormatError as error:
                raise StoreError(f"{span.pack}: {error}", name=str(span.pack)) from error
        return self._indexes[span]

    def read_dictionary(self, span: Span | None) -> bytes:
        """The dictionary at *span*, opened; empty for None. Raises StoreError."""
        if span is None:
            return b""
        if span not in self._dictionaries:
            try:
                self._dictionaries[span] = open_dictionary(self.read_span(span))
            except FormatError as error:
                raise StoreError(f"{span.pack}: {error}", name=str(span.pack)) from error
        return self._dictionaries[span]

    def chunks(self, chunk_list: index.Index) -> Iterator[bytes]:
        """The chunks of a content in order. Raises StoreError when a frame is damaged."""
        readers: dict[Span | None, FrameReader] = {}
        for frames in _stretches(chunk_list.frames):
            first, last = frames[0].span, frames[-1].span
            stretch = memoryview(
                self.read_span(Span(first.pack, first.offset, last.end - first.offset))
            )
            reader = readers.get(frames[0].dictionary)
            if reader is None:
                reader = FrameReader(self.read_dictionary(frames[0].dictionary))
                readers[frames[0].dictionary] = reader
            for frame in frames:
                start = frame.span.offset - first.offset
                try:
                    yield reader.open(stretch[start : start + frame.span.length])
                except FormatError as error:
                    raise StoreError(f"{first.pack}: {error}", name=str(first.pack)) from error

    def content(self, wanted: ContentId, located: dict[ContentId, Stored]) -> bytes:
        """A whole content, its SHA-256 checked.

        Raises StoreError where it is not stored, or damaged.
        """
        stored = located.get(wanted)
        if stored is None:
            raise StoreError(f"content {wanted.hex()} is not stored", code="store-missing")
        if stored.index is not None:
            data = b"".join(self.chunks(self.read_index(stored.index)))
        else:
            assert stored.edge is not None
            bases = [delta.reader_of(self.content(base, located)) for base in stored.bases]
            pieces: list[bytes] = []
            try:
                delta.apply(self.read_span(stored.edge), bases, lambda b: pieces.append(bytes(b)))
            except FormatError as error:
                raise StoreError(f"{stored.edge.pack}: {error}") from error
            data = b"".join(pieces)
        if hashlib.sha256(data).digest() != wanted:
            raise StoreError(f"content {wanted.hex()} comes out wrong", code="store-damaged")
        return data


def _edges(tocs: Sequence[tuple[PackName, pack.Toc]]) -> Iterator[Stored]:
    """All deltas that *tocs* tell of, each with a depth of 0."""
    snapshots = {toc.snapshot.serial: (name, toc.snapshot) for name, toc in tocs}
    for name, toc in tocs:
        for kept in toc.kept:
            if kept.edge is not None:
                place = kept.edge.within(name)
                yield Stored(kept.id, kept.size, None, place, kept.bases, 0, (name,))
        contents = {c.track: c for c in toc.snapshot.contents}
        for edge in toc.edges:
            content = contents[edge.track]
            bases = [contents[use].id for use in edge.uses]
            tellers = [name]
            if edge.base is not None:
                teller, older = snapshots.get(edge.base, (name, None))
                base = older.content(edge.track) if older else None
                if base is None:
                    continue
                bases.insert(0, base.id)
                tellers.append(teller)
            place = Span(name, edge.offset, edge.length)
            yield Stored(content.id, content.size, None, place, tuple(bases), 0, tuple(tellers))


def _reach_further(edges: Sequence[Stored], found: dict[ContentId, Stored]) -> bool:
    """Enter the contents that *edges* lead to from those in *found*; whether there were any."""
    more = False
    for edge in edges:
        if any(base not in found for base in edge.bases):
            continue
        depth = 1 + max((found[base].depth for base in edge.bases), default=0)
        known = found.get(edge.id)
        if known is None or (known.index is None and depth < known.depth):
            found[edge.id] = replace(edge, depth=depth)
            more = True
    return more


def _stretches(frames: Sequence[index.Frame]) -> Iterator[list[index.Frame]]:
    """Frames grouped where one read serves: side by side, of one dictionary."""
    group: list[index.Frame] = []
    size = 0
    for frame in frames:
        if group and (
            frame.span.pack != group[-1].span.pack
            or frame.span.offset != group[-1].span.end
            or frame.dictionary != group[-1].dictionary
            or size + frame.span.length > _READ
        ):
            yield group
            group, size = [], 0
        group.append(frame)
        size += frame.span.length
    if group:
        yield group


def refuse_newer(error: FormatError) -> None:
    """A head of a later format is no damage. Raises InputError (``format-version``) for one."""
    if error.code == "format-version":
        text = f"{HEAD_NAME} was written by a newer release ({error}); upgrade tidings-mirror"
        raise InputError(text, code=error.code) from error


def pack_dictionary(dictionary: bytes) -> bytes:
    """A dictionary as packs carry it: one zstd frame with its size."""
    return zstd.compress(dictionary, 19)


def open_dictionary(stored: bytes | memoryview) -> bytes:
    """The dictionary in *stored*. Raises FormatError."""
    try:
        opener = zstd.ZstdDecompressor()
        data = opener.decompress(stored, max_length=LIMITS.dictionary + 1)
    except zstd.ZstdError as error:
        raise FormatError(f"dictionary: damaged ({error})") from error
    if len(data) > LIMITS.dictionary or not opener.eof:
        raise FormatError(f"dictionary: larger than {LIMITS.dictionary} bytes, or cut short")
    return data
