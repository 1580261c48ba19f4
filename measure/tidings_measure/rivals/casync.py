"""casync and desync: an index a file and a store of chunks, over HTTP, from the old content."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..history import Version, VersionFile
from ..process import Usage, run
from .base import FileRival, link_or_copy


class _Chunked(FileRival):
    def __init__(self, average: int | None) -> None:
        self.average = average  #: bytes; None: the program's own default, 64 KiB
        tool = self.programs[0]
        self.name = f"{tool}-4k" if average else tool
        self.title = f"{tool}, 4 KiB" if average else tool
        chunks = "4 KiB chunks" if average else "64 KiB chunks (default)"
        self.about = f"{tool} extract over HTTP, {chunks}, seeded with the old content"

    def _index(self, file: VersionFile) -> str:
        return f"{self.stem(file)}.caibx"

    def remove(self, old: VersionFile) -> None:
        # Chunks stay, as packs do: a mirror that removed them would have to list each store first.
        (self.place.tree / self._index(old)).unlink(missing_ok=True)


class Casync(_Chunked):
    """casync: the seed is chunked anew by the client."""

    programs = ("casync",)
    version_of = ("casync", "--version")

    def add(
        self, old: VersionFile | None, file: VersionFile, version: Version, *, measured: bool
    ) -> None:
        size = [f"--chunk-size={self.average}"] if self.average else []
        store, index = self.place.tree / "default.castr", self.place.tree / self._index(file)
        run(["casync", "make", *size, f"--store={store}", index, self.opened(file).path])

    def fetch(self, old: VersionFile | None, file: VersionFile) -> tuple[Usage, Path]:
        target = self.place.client / "content"
        seed = [f"--seed={self.opened(old).path}"] if old is not None else []
        index = f"{self.url}/{self._index(file)}"
        return run(["casync", "extract", *seed, index, target], self.place.client), target


class Desync(_Chunked):
    """desync: the seed is named by the index that the client kept."""

    programs = ("desync",)

    def add(
        self, old: VersionFile | None, file: VersionFile, version: Version, *, measured: bool
    ) -> None:
        store, index = self.place.tree / "store.castr", self.place.tree / self._index(file)
        store.mkdir(exist_ok=True)
        size = []
        if self.average:
            kib = self.average // 1024
            size = ["-m", f"{kib // 4}:{kib}:{kib * 4}"]
        run(["desync", "make", "-s", store, *size, index, self.opened(file).path])
        link_or_copy(index, self.place.kept / index.name)

    def fetch(self, old: VersionFile | None, file: VersionFile) -> tuple[Usage, Path]:
        target = self.place.client / "content"
        seed: list[str] = []
        if old is not None:
            seed = ["--seed", f"{self.place.kept / self._index(old)}:{self.opened(old).path}"]
        command = ["desync", "extract", "-s", f"{self.url}/store.castr", *seed]
        return run([*command, f"{self.url}/{self._index(file)}", target], self.place.client), target


_4K = 4096
CASYNC = partial(Casync, None)
CASYNC_4K = partial(Casync, _4K)
DESYNC = partial(Desync, None)
DESYNC_4K = partial(Desync, _4K)
