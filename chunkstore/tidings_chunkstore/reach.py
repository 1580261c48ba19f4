"""What contents need: which packs, and which bytes of them. gc, check and repair rest on it.

A content needs its index, the frames that the index names and their dictionaries, or a chain of
deltas and what they start from. It also needs the tables of contents that say so: of the newest
pack that names its index, and of the snapshots that its deltas start from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from . import head
from .errors import StoreError, TidingsError
from .ids import ContentId
from .index import Index
from .pack import Toc
from .places import PackName, Span
from .store import Store, Stored

Tocs = Sequence[tuple[PackName, Toc]]
ReadIndex = Callable[[Span], Index]
T = TypeVar("T")


@dataclass(slots=True)
class Use:
    """What is needed of one pack. Offsets and lengths in bytes."""

    frames: dict[int, int] = field(default_factory=dict)  #: offset -> length
    dictionaries: set[Span] = field(default_factory=set)
    indexes: set[Span] = field(default_factory=set)
    edges: set[Span] = field(default_factory=set)
    users: set[ContentId] = field(default_factory=set)  #: contents that it is needed for

    @property
    def live(self) -> int:
        """Bytes of frames, dictionaries and deltas that are needed."""
        spans = (*self.dictionaries, *self.edges)
        return sum(self.frames.values()) + sum(span.length for span in spans)


@dataclass(slots=True)
class Reach:
    """What a set of contents needs. *lost* are those that cannot be had, and why."""

    packs: dict[PackName, Use] = field(default_factory=dict)
    found: dict[ContentId, Stored] = field(default_factory=dict)
    lost: dict[ContentId, str] = field(default_factory=dict)
    missing: set[PackName] = field(default_factory=set)  #: packs that are needed and not there

    def of(self, name: PackName) -> Use:
        """The use of a pack, an empty one to fill where there was none."""
        return self.packs.setdefault(name, Use())


def survey(
    store: Store,
    contents: Iterable[ContentId],
    tocs: Tocs,
    present: Collection[PackName],
    read_index: ReadIndex | None = None,
) -> Reach:
    """What *contents* need. *tocs* are in order of their serials; *present* are all packs there.

    Reads the indexes and nothing else. A content that no pack claims to hold needs nothing.
    """
    return _Survey(store, tocs, set(present), read_index or store.read_index).run(contents)


class _Survey:
    def __init__(
        self, store: Store, tocs: Tocs, present: set[PackName], read_index: ReadIndex
    ) -> None:
        self.read_index = read_index
        self.present = present
        self.located = store.locate(tocs)
        self.claimed = claimed(tocs)
        self.reach = Reach()

    def run(self, contents: Iterable[ContentId]) -> Reach:
        for content in contents:
            self.take(content)
        return self.reach

    def take(self, content: ContentId) -> bool:
        """Note what *content* needs; whether it can be had."""
        reach = self.reach
        if content in reach.found:
            return True
        if content in reach.lost:
            return False
        stored = self.located.get(content)
        if stored is None:
            if content not in self.claimed:
                return True  # published, never stored
            reach.lost[content] = "what its deltas start from is missing"
            return False
        why = self.by_index(stored) if stored.index is not None else self.by_edge(stored)
        if why is None:
            reach.found[content] = stored
            for teller in stored.tellers:
                reach.of(teller).users.add(content)
        else:
            reach.lost[content] = why
        return why is None

    def by_index(self, stored: Stored) -> str | None:
        assert stored.index is not None
        place = stored.index
        if place.pack not in self.present:
            self.reach.missing.add(place.pack)
            return f"pack {place.pack} is missing"
        try:
            chunk_list = self.read_index(place)
        except StoreError as error:
            return f"its index is damaged: {error}"
        spans = {frame.span for frame in chunk_list.frames}
        dictionaries = {frame.dictionary for frame in chunk_list.frames if frame.dictionary}
        gone = {span.pack for span in (*spans, *dictionaries)} - self.present
        if gone:
            self.reach.missing |= gone
            return f"pack {min(map(str, gone))} is missing"
        own = self.reach.of(place.pack)
        own.indexes.add(place)
        own.users.add(stored.id)
        for span in spans:
            use = self.reach.of(span.pack)
            use.frames[span.offset] = span.length
            use.users.add(stored.id)
        for span in dictionaries:
            use = self.reach.of(span.pack)
            use.dictionaries.add(span)
            use.users.add(stored.id)
        return None

    def by_edge(self, stored: Stored) -> str | None:
        assert stored.edge is not None
        place = stored.edge
        if place.pack not in self.present:
            self.reach.missing.add(place.pack)
            return f"pack {place.pack} is missing"
        for base in stored.bases:
            if not self.take(base):
                return f"it is a delta from a content that is lost: {self.reach.lost[base]}"
        use = self.reach.of(place.pack)
        use.edges.add(place)
        use.users.add(stored.id)
        return None


def claimed(tocs: Tocs) -> set[ContentId]:
    """The contents that ought to be stored: all but those of opaque files."""
    found: set[ContentId] = set()
    for _, toc in tocs:
        edged = {edge.track for edge in toc.edges}
        edged |= {file.track for file in toc.snapshot.files if file.recipe is not None}
        found |= {c.id for c in toc.snapshot.contents if c.index is not None or c.track in edged}
        found |= {side for f in toc.snapshot.files if f.recipe for side in f.recipe.sides}
        found |= {c.id for c in toc.kept}
    return found


def needed_by(toc: Toc) -> list[ContentId]:
    """The contents of a snapshot: those of its files, and the side contents of its recipes."""
    return list(dict.fromkeys(content.id for content in toc.snapshot.contents))


def readable_tocs(
    store: Store, names: Sequence[PackName]
) -> tuple[list[tuple[PackName, Toc]], dict[PackName, StoreError]]:
    """The tables of contents of *names* in their order, and what is wrong with the others."""
    good: list[tuple[PackName, Toc]] = []
    bad: dict[PackName, StoreError] = {}
    for name in names:
        try:
            good.append((name, store.toc(name)))
        except StoreError as error:
            bad[name] = error
    return good, bad


def steady(store: Store, read: Callable[[Tocs], T]) -> T:
    """What *read* makes of every table of contents that can be read; for readers without a lock.

    When packs came or went meanwhile, as with a gc at the same time, and *read* failed or a table
    could not be read, it is called once more with what is there then. A damaged pack is nobody's
    business who needs nothing of it. Raises what *read* raises.
    """
    names = store.pack_names()
    tocs, unreadable = readable_tocs(store, names)
    try:
        found = read(tocs)
        failure = None
    except TidingsError as error:
        failure = error
    if failure is None and not unreadable:
        return found
    now = store.pack_names()
    if now != names:
        return read(readable_tocs(store, now)[0])
    if failure is not None:
        raise failure
    return found


def whole_snapshots(
    store: Store, candidates: Tocs, tocs: Tocs, present: Collection[PackName]
) -> tuple[list[tuple[PackName, Toc]], dict[int, dict[str, str]]]:
    """Which of *candidates* have all their contents; of the others, what is lost by track."""
    whole: list[tuple[PackName, Toc]] = []
    lost: dict[int, dict[str, str]] = {}
    walk = _Survey(store, tocs, set(present), store.read_index)
    for name, toc in candidates:
        tracks: dict[str, str] = {}
        for content in toc.snapshot.contents:
            if not walk.take(content.id):
                tracks[content.track] = walk.reach.lost[content.id]
        if tracks:
            lost[toc.snapshot.serial] = tracks
        else:
            whole.append((name, toc))
    return whole, lost


def rebuild(store: Store, condemned: Collection[PackName] = ()) -> head.Head | None:
    """The head over every snapshot that the packs hold whole; None where there is none.

    A pack may be there for its frames alone, long after its own snapshot has gone from the head:
    such a snapshot comes back only where nothing of it was lost. Of two packs with one serial the
    one with the later time counts.
    """
    names = [name for name in store.pack_names() if name not in condemned]
    tocs, _ = readable_tocs(store, names)
    chosen: dict[int, tuple[PackName, Toc]] = {}
    for name, toc in tocs:
        other = chosen.get(name.serial)
        if other is None or other[1].snapshot.time <= toc.snapshot.time:
            chosen[name.serial] = (name, toc)
    whole, _ = whole_snapshots(store, [chosen[s] for s in sorted(chosen)], tocs, names)
    return head.build(whole) if whole else None


def chunk_rows(tocs: Mapping[PackName, Toc], name: PackName) -> dict[int, tuple[bytes, int, int]]:
    """By offset: the id, open length and frame length of each frame in a pack."""
    rows: dict[int, tuple[bytes, int, int]] = {}
    for run in tocs[name].runs:
        offset = run.offset
        for chunk, size, length in run.rows:
            rows[offset] = (chunk, size, length)
            offset += length
    return rows
