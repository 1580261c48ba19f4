"""rsync -z of the open file from a daemon."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from .. import servers
from ..history import Version, VersionFile
from ..process import Usage, run
from ..results import Cost
from ..wire import Wire
from .base import FileRival, safe

_ROUND_TRIPS = 6  # connect, greeting, module, options, file list and checksums, end


class Rsync(FileRival):
    """The old content is the file in place; names stay, or rsync would start from nothing."""

    name = "rsync"
    title = "rsync -z"
    about = "rsync -z of the open file from a daemon, zstd level 19"
    programs = ("rsync",)
    version_of = ("rsync", "--version")

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        work = self.place.bench.work
        with servers.rsync(self.place.www, work) as url, Wire(url, http=False) as wire:
            self.place.wire = wire
            yield

    def add(
        self, old: VersionFile | None, file: VersionFile, version: Version, *, measured: bool
    ) -> None:
        shutil.copy2(self.opened(file).path, self.place.tree / safe(file.track))

    def fetch(self, old: VersionFile | None, file: VersionFile) -> tuple[Usage, Path]:
        target = self.place.client / "content"
        if old is not None:
            shutil.copyfile(self.opened(old).path, target)
        options = ["-z", "--compress-choice=zstd", "--compress-level=19", "--no-whole-file"]
        # -I: sizes and times must not decide; a real client knows that the file is new.
        source = f"{self.url}/{safe(file.track)}"
        return run(["rsync", "-I", *options, source, target], self.place.client), target

    def cost(self, usage: Usage) -> Cost:
        assert self.place.wire is not None
        return Cost.of(self.place.wire.traffic(), usage, _ROUND_TRIPS)


RSYNC = Rsync
