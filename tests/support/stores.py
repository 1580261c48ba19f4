"""Stores with a history, small enough for a test, and proof that all of one comes back."""

from __future__ import annotations

import io
import shutil
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from unittest import mock

from tidings_chunkstore import delta, head, packing, publisher, recipe
from tidings_chunkstore.backends import LocalBackend
from tidings_chunkstore.ids import ContentId
from tidings_chunkstore.pack import Snapshot
from tidings_chunkstore.publisher import Options, Report
from tidings_chunkstore.store import Store

from . import repos


class History:
    """A repository that is published step by step. *published* has each state's files by serial."""

    def __init__(
        self, root: Path, count: int = 150, types: Iterable[str] = ("primary", "group")
    ) -> None:
        self.root = root
        self.types = tuple(types)
        self.packages = repos.packages(count)
        self.number = 0
        self.options = Options()
        self.published: dict[int, dict[str, bytes]] = {}

    def copy(self, root: Path) -> History:
        """The same at another place."""
        shutil.copytree(self.root, root)
        twin = History(root, 0, self.types)
        twin.packages, twin.number, twin.options = self.packages, self.number, self.options
        twin.published = dict(self.published)
        return twin

    @property
    def backend(self) -> LocalBackend:
        return LocalBackend(self.root / "tidings")

    @property
    def folder(self) -> Path:
        return self.root / "tidings"

    @property
    def store(self) -> Store:
        return Store(self.backend)

    def head(self) -> head.Head:
        found = self.store.read_head()
        assert found is not None
        return found

    def serials(self) -> list[int]:
        return [state.serial for state in self.head().states]

    def packs(self) -> set[str]:
        return {path.name for path in self.folder.glob("*.pack")}

    def step(self, share: float = 0.02) -> Report:
        """Publish the next state."""
        if self.number:
            self.packages = repos.evolve(self.packages, self.number, share)
        stamp = repos.START + self.number * repos.DAY
        repos.rpm_md(self.root, self.packages, types=self.types, timestamp=stamp)
        self.number += 1
        report = publisher.publish(self.root, self.backend, self.options)
        self.published[report.serial] = self.files()
        return report

    def steps(self, count: int, share: float = 0.02) -> None:
        for _ in range(count):
            self.step(share)

    def files(self) -> dict[str, bytes]:
        """What is published now."""
        found = sorted((self.root / "repodata").iterdir())
        return {f"repodata/{path.name}": path.read_bytes() for path in found}

    def listing(self) -> dict[str, tuple[int, int]]:
        """Inode and time of each file of the store."""
        return {
            path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in sorted(self.folder.iterdir())
        }

    def flip(self, name: str, offset: int) -> None:
        """Damage one byte, in a new file, as hard-linked copies are left alone."""
        path = self.folder / name
        data = bytearray(path.read_bytes())
        data[offset] ^= 0x40
        path.unlink()
        path.write_bytes(data)


def rich_in_frames() -> AbstractContextManager[object]:
    """Publishes inside keep each content by its frames, however large the change."""
    return mock.patch.multiple(packing, _FRAMES_PAY=9.0, _FULL=1000.0)


def assert_whole(store: Store, published: dict[int, dict[str, bytes]] | None = None) -> None:
    """All that the head names is there: files, contents, edges, by this pack alone or others."""
    now = store.read_head()
    assert now is not None
    tocs = store.tocs(store.pack_names())
    located = store.locate(tocs)
    by_name = dict(tocs)
    snapshots: dict[int, Snapshot] = {}
    contents: dict[ContentId, bytes] = {}
    for state in now.states:
        snapshot = by_name[state.pack].snapshot
        snapshots[state.serial] = snapshot
        for file in snapshot.files:
            entry = snapshot.content(file.track)
            assert entry is not None
            if file.recipe is None:
                continue
            for content in (entry.id, *file.recipe.sides):
                if content not in contents:
                    contents[content] = store.content(content, located)
            expected = (published or {}).get(state.serial, {}).get(file.path)
            if expected is not None:
                sides = {side: contents[side] for side in file.recipe.sides}
                made = b"".join(recipe.run(file.recipe, [contents[entry.id]], sides))
                assert made == expected
    for place in (content.index for content in now.contents):
        if place is not None:
            chunk_list = store.read_index(place)
            data = b"".join(store.chunks(chunk_list))
            assert ContentId.of(data) == chunk_list.content
    for edge in now.edges:
        target = snapshots[edge.target].content(edge.track)
        assert target is not None
        bases = [snapshots[edge.target].content(use) for use in edge.uses]
        if edge.base is not None:
            bases.insert(0, snapshots[edge.base].content(edge.track))
        out = io.BytesIO()
        readers = [delta.reader_of(contents[base.id]) for base in bases if base]
        delta.apply(store.read_span(edge.span), readers, out.write)
        assert ContentId.of(out.getvalue()) == target.id
    rebuilt = head.build([(state.pack, by_name[state.pack]) for state in now.states])
    assert head.decode(head.encode(rebuilt)) == replace(now, features={})


class DyingBackend(LocalBackend):
    """Dies at the write number *fatal*, before it (*after* False) or just after it."""

    def __init__(self, folder: Path, fatal: int, after: bool = False) -> None:
        super().__init__(folder)
        self.fatal = fatal
        self.after = after
        self.writes = 0

    def _write(self) -> bool:
        self.writes += 1
        if self.writes == self.fatal and not self.after:
            raise KilledError
        return self.writes == self.fatal

    def put(self, name: str, pieces: Iterable[bytes | memoryview]) -> int:
        last = self._write()
        size = super().put(name, pieces)
        if last:
            raise KilledError
        return size

    def swap_head(self, data: bytes, expected: bytes | None) -> None:
        last = self._write()
        super().swap_head(data, expected)
        if last:
            raise KilledError

    def delete(self, name: str) -> None:
        last = self._write()
        super().delete(name)
        if last:
            raise KilledError


class KilledError(BaseException):
    """Stands for SIGKILL: nobody catches it."""


class PackFolder:
    """Another mirror's packs, for repair. *lies* are served with a flipped byte."""

    def __init__(self, folder: Path, lies: Collection[str] = ()) -> None:
        self.folder = folder
        self.lies = lies

    def fetch(self, name: str) -> bytes | None:
        path = self.folder / name
        if not path.exists():
            return None
        data = bytearray(path.read_bytes())
        if name in self.lies:
            data[len(data) // 2] ^= 1
        return bytes(data)


__all__ = [
    "DyingBackend",
    "History",
    "KilledError",
    "PackFolder",
    "assert_whole",
    "rich_in_frames",
]
