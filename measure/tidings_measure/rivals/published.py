"""Download as published: what a client without any of these tools does."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..history import Version, VersionFile
from ..process import Usage
from .base import FileRival, download


class Published(FileRival):
    """Each new file whole."""

    name = "published"
    title = "as published"
    about = "each new file downloaded whole (curl)"

    def add(
        self, old: VersionFile | None, file: VersionFile, version: Version, *, measured: bool
    ) -> None:
        target = self.place.tree / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file.source, target)

    def publish(self, version: Version, before: Version | None, *, measured: bool) -> None:
        super().publish(version, before, measured=measured)
        # The main file and what lies beside it are published too, though no rival pays for them.
        listed = {file.path for file in version.files}
        main = version.paths[-1]
        target = self.place.tree / main
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(version.folder / main, target)
        for found in self.place.tree.rglob("*"):
            inside = found.relative_to(self.place.tree).as_posix()
            if found.is_file() and inside != main and inside not in listed:
                found.unlink()

    def fetch(self, old: VersionFile | None, file: VersionFile) -> tuple[Usage, Path]:
        target = self.place.client / "file"
        return download(f"{self.url}/{file.path}", target), target


PUBLISHED = Published
