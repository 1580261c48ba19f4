"""Bundles: the direct deltas from one retained snapshot to a later one, in one answer.

A mirror's server makes one when a client that is several snapshots behind asks for it; a static
host has none. A section's bases are contents of the older snapshot on the same track, contents
rebuilt earlier in the same bundle, or none. The byte table is in docs/protocol.md, "Bundles".
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from . import delta, deltamake, reach
from .errors import FormatError, InputError
from .ids import ContentId
from .limits import LIMITS
from .pack import Content, Snapshot, Toc
from .packing import ALONE, PAYS, SMALL
from .places import PackName, Span
from .store import Store, Stored
from .wire import Reader, put_uvarint

MAGIC = b"TDB1"
_CHECKSUM = 8  # bytes of SHA-256 over what follows them


def encode(entries: Sequence[tuple[str, bytes]]) -> bytes:
    """The bytes of a bundle of *entries*: tracks and their sections, in order."""
    body = bytearray()
    put_uvarint(body, len(entries))
    for track, section in entries:
        name = track.encode()
        put_uvarint(body, len(name))
        body += name
        put_uvarint(body, len(section))
    for _, section in entries:
        body += section
    return MAGIC + hashlib.sha256(body).digest()[:_CHECKSUM] + bytes(body)


def decode(data: bytes | bytearray | memoryview) -> list[tuple[str, memoryview]]:
    """Tracks and their sections, as views of *data*. Raises FormatError."""
    what = "bundle"
    reader = Reader(data, what)
    reader.expect(MAGIC)
    checksum = bytes(reader.take(_CHECKSUM))
    if hashlib.sha256(memoryview(data)[reader.position :]).digest()[:_CHECKSUM] != checksum:
        raise FormatError(f"{what}: damaged")
    names: list[str] = []
    lengths: list[int] = []
    for _ in range(reader.uvarint(min(2 * LIMITS.files, reader.left))):
        raw = bytes(reader.take(reader.uvarint(4 * LIMITS.path)))
        try:
            name = raw.decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{what}: a track's name is not UTF-8") from error
        if not name or len(name) > LIMITS.path or not name.isprintable() or name in names:
            raise FormatError(f"{what}: not a track's name, or twice the same")
        names.append(name)
        lengths.append(reader.uvarint(LIMITS.pack))
    sections = [reader.take(length) for length in lengths]
    reader.done()
    return list(zip(names, sections, strict=True))


def make(
    store: Store,
    older: PackName,
    newer: PackName,
    tracks: Collection[str] | None = None,
    *,
    seconds: float = 3.0,
) -> bytes:
    """The bundle from the snapshot of pack *older* to that of pack *newer*.

    *tracks* limits it; *seconds* bound the making of each section. Tracks whose content is the
    same in both, or for which no delta pays, are left out.

    Raises InputError (``not-retained``) when a pack is not in the store, StoreError when it is
    damaged.
    """
    return reach.steady(store, lambda tocs: _make(store, tocs, older, newer, tracks, seconds))


def _make(
    store: Store,
    tocs: reach.Tocs,
    older: PackName,
    newer: PackName,
    tracks: Collection[str] | None,
    seconds: float,
) -> bytes:
    by_name = dict(tocs)
    if older not in by_name or newer not in by_name or older.serial >= newer.serial:
        raise InputError(f"no way from {older} to {newer} here", code="not-retained")
    maker = _Maker(
        store,
        store.locate(tocs),
        by_name[older].snapshot,
        newer,
        by_name[newer],
        delta.Budget(seconds=seconds),
    )
    return encode(list(maker.entries(tracks)))


@dataclass(slots=True)
class _Maker:
    store: Store
    located: dict[ContentId, Stored]
    old: Snapshot
    newer: PackName
    toc: Toc
    budget: delta.Budget
    _small: list[tuple[ContentId, bytes]] = field(default_factory=list)

    def entries(self, tracks: Collection[str] | None) -> Iterator[tuple[str, bytes]]:
        """The sections, in the snapshot's order: what a section uses comes before it."""
        for content in self.toc.snapshot.contents:
            before = self.old.content(content.track)
            same = before is not None and before.id == content.id
            wanted = tracks is None or content.track in tracks
            if same or not wanted or content.id not in self.located:
                continue
            section = self._ready(content) or self._section(content, before)
            if section is not None:
                yield content.track, section

    def _ready(self, content: Content) -> bytes | None:
        """The edge that the publish made, where it starts at the older snapshot."""
        for edge in self.toc.edges:
            if edge.track == content.track and edge.base == self.old.serial and not edge.uses:
                return self.store.read_span(Span(self.newer, edge.offset, edge.length))
        return None

    def _section(self, content: Content, before: Content | None) -> bytes | None:
        target = self.store.content(content.id, self.located)
        choices: list[list[tuple[ContentId, bytes]]] = []
        if before is not None and before.id in self.located:
            choices.append([(before.id, self.store.content(before.id, self.located))])
        if content.size <= SMALL:
            choices += [[helper] for helper in self._small]
        if content.size <= ALONE:
            choices.append([])
        limit = int(self._published(content) * PAYS)
        best = None
        for bases in choices:
            budget = delta.Budget(self.budget.seconds, limit)
            made = deltamake.make(bases, content.id, target, budget=budget)
            if made is not None:
                best, limit = made, len(made)
        if best is not None and content.size <= SMALL:
            self._small.append((content.id, target))
        return best

    def _published(self, content: Content) -> int:
        """Bytes of the smallest file that the content would otherwise come in."""
        files = [f.size for f in self.toc.snapshot.files if f.track == content.track]
        return min(files, default=content.size)
