"""What a repository's store holds, from its head and its packs' tables of contents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tidings_chunkstore import reach
from tidings_chunkstore.backends.base import HEAD_NAME
from tidings_chunkstore.errors import StoreError
from tidings_chunkstore.head import Head
from tidings_chunkstore.pack import Toc
from tidings_chunkstore.places import PackName
from tidings_chunkstore.store import Store

from .publish import EVERYWHERE


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    """A retained snapshot. Sizes in bytes, time in seconds since 1970."""

    serial: int
    time: int
    pack: str
    pack_bytes: int
    files: int
    published_bytes: int
    changed_bytes: int  #: of files that the retained snapshot before did not have
    edge_bytes: int

    @property
    def share(self) -> float:
        """The pack's bytes as a share of the changed files' bytes."""
        return self.pack_bytes / self.changed_bytes if self.changed_bytes else 0.0


@dataclass(frozen=True, slots=True)
class Stats:
    """What a store holds. Sizes in bytes."""

    packs: int  #: that can be read
    unreadable: int  #: packs that cannot; check says why
    bytes: int  #: packs and the head
    head_bytes: int
    frame_bytes: int
    index_bytes: int
    edge_bytes: int
    dictionary_bytes: int
    toc_bytes: int  #: tables of contents and tails
    snapshots: int
    contents: int  #: different ones that are stored
    chunks: int
    files: int  #: of the current snapshot, as all below
    published_bytes: int
    recipes: dict[str, int] = field(default_factory=dict)  #: files by the engine they need
    missing: dict[str, int] = field(default_factory=dict)  #: those of engines clients may lack
    missing_bytes: int = 0
    opaque: int = 0
    opaque_bytes: int = 0

    @property
    def missing_share(self) -> float:
        """Files whose recipe needs an engine that clients may lack, of those with a recipe."""
        made = sum(self.recipes.values())
        return sum(self.missing.values()) / made if made else 0.0


def snapshots(store: Store) -> list[SnapshotRow]:
    """The retained snapshots, oldest first. Raises StoreError."""
    return reach.steady(store, lambda _: _snapshots(store))


def _snapshots(store: Store) -> list[SnapshotRow]:
    rows = []
    before: set[bytes] = set()
    for name, toc in store.tocs([state.pack for state in _head(store).states]):
        files = toc.snapshot.files
        rows.append(
            SnapshotRow(
                toc.snapshot.serial,
                toc.snapshot.time,
                str(name),
                _size(store, name),
                len(files),
                sum(file.size for file in files),
                sum(file.size for file in files if file.sha256 not in before),
                sum(edge.length for edge in toc.edges),
            )
        )
        before = {file.sha256 for file in files}
    return rows


def stats(store: Store) -> Stats:
    """Of every pack that can be read. Raises StoreError."""
    return reach.steady(store, lambda tocs: _stats(store, tocs))


def _stats(store: Store, tocs: reach.Tocs) -> Stats:
    head = _head(store)
    sizes = {name: _size(store, name) for name, _ in tocs}
    head_bytes = store.backend.size(HEAD_NAME) or 0
    frames = sum(row[2] for _, toc in tocs for run in toc.runs for row in run.rows)
    dictionaries = sum(item.length for _, toc in tocs for item in toc.dictionaries)
    edges = sum(edge.length for _, toc in tocs for edge in toc.edges)
    indexes = sum(span for name, toc in tocs for span in _own_indexes(name, toc))
    recipes: dict[str, int] = {}
    missing: dict[str, int] = {}
    missing_bytes = 0
    for file in head.files:
        engine = file.recipe.engine if file.recipe else ""
        if engine:
            recipes[engine] = recipes.get(engine, 0) + 1
            if engine not in EVERYWHERE:
                missing[engine] = missing.get(engine, 0) + 1
                missing_bytes += file.size
    opaque = [file for file in head.files if file.recipe is None]
    return Stats(
        packs=len(tocs),
        unreadable=max(0, len(store.pack_names()) - len(tocs)),
        bytes=sum(sizes.values()) + head_bytes,
        head_bytes=head_bytes,
        frame_bytes=frames,
        index_bytes=indexes,
        edge_bytes=edges,
        dictionary_bytes=dictionaries,
        toc_bytes=sum(sizes.values()) - frames - indexes - edges - dictionaries,
        snapshots=len(head.states),
        contents=len(store.locate(tocs)),
        chunks=sum(len(run.rows) for _, toc in tocs for run in toc.runs),
        files=len(head.files),
        published_bytes=sum(file.size for file in head.files),
        recipes=dict(sorted(recipes.items())),
        missing=dict(sorted(missing.items())),
        missing_bytes=missing_bytes,
        opaque=len(opaque),
        opaque_bytes=sum(file.size for file in opaque),
    )


def _head(store: Store) -> Head:
    head = store.read_head()
    if head is None:
        raise StoreError("no head.json: nothing is published here", code="store-missing")
    return head


def _size(store: Store, name: PackName) -> int:
    size = store.backend.size(str(name))
    if size is None:
        raise StoreError(f"pack {name} is missing", code="store-missing")
    return size


def _own_indexes(name: PackName, toc: Toc) -> Sequence[int]:
    """Lengths of the indexes that lie in the pack itself, each once."""
    spans = {content.index for content in toc.snapshot.contents if content.index is not None}
    return [span.length for span in spans if span.pack == name]
