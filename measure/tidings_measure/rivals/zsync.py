"""zsync: a control file with a checksum for each block, and ranges of the file itself."""

from __future__ import annotations

import gzip
from functools import partial
from pathlib import Path

from ..history import Version, VersionFile
from ..process import Usage, run
from .base import FileRival, link_or_copy


class Zsync(FileRival):
    """zsync from the old content, to the content itself or to its gzip."""

    programs = ("zsync", "zsyncmake")
    version_of = ("zsync", "-V")

    def __init__(self, *, gz: bool) -> None:
        self.gz = gz
        self.name = "zsync-gz" if gz else "zsync"
        self.title = "zsync on .gz" if gz else "zsync, plain"
        self.about = "zsync, seeded with the old content, " + (
            "4 KiB blocks of the .gz (gzip -9, or as published)"
            if gz
            else "2 KiB blocks of the open file"
        )

    def add(
        self, old: VersionFile | None, file: VersionFile, version: Version, *, measured: bool
    ) -> None:
        target = self.place.tree / self._name(file)
        if not self.gz:
            link_or_copy(self.opened(file).path, target)
        elif file.path.endswith(".gz"):
            link_or_copy(file.source, target)
        else:
            data = self.opened(file).path.read_bytes()
            target.write_bytes(gzip.compress(data, 9, mtime=0))
        # The best of 512 to 8192 on a primary.xml of 26 MB; 2048 is the default.
        block = "4096" if self.gz else "2048"
        control = ["-b", block, "-u", target.name, "-o", f"{target.name}.zsync", target.name]
        run(["zsyncmake", *control], self.place.tree)

    def remove(self, old: VersionFile) -> None:
        for name in (self._name(old), f"{self._name(old)}.zsync"):
            (self.place.tree / name).unlink(missing_ok=True)

    def fetch(self, old: VersionFile | None, file: VersionFile) -> tuple[Usage, Path]:
        target = self.place.client / "content"
        seed = ["-i", str(self.opened(old).path)] if old is not None else []
        url = f"{self.url}/{self._name(file)}.zsync"
        usage = run(["zsync", "-q", *seed, "-o", target, url], self.place.client)
        data = target.read_bytes()
        if self.gz and data.startswith(b"\x1f\x8b"):
            # Small files come as the .gz; opening it is not charged, as with the others.
            target.write_bytes(gzip.decompress(data))
        return usage, target

    def _name(self, file: VersionFile) -> str:
        return f"{self.stem(file)}.gz" if self.gz else self.stem(file)


ZSYNC = partial(Zsync, gz=False)
ZSYNC_GZ = partial(Zsync, gz=True)
