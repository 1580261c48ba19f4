"""Delta programs: a file from each old content to the new one, fetched whole and applied.

A client fetches the direct delta from what it has, whatever that is; the mirror is charged for the
delta of the last publish alone, which flatters them.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path

from ..history import Version, VersionFile
from ..process import Usage, run
from .base import FileRival, Unfit, download, safe

_MB = 1_000_000
_BSDIFF_LIMIT = 8 * _MB  # its maker takes 17 times the content in memory


class DeltaRival(FileRival):
    """A program that makes one file out of two."""

    from_nothing = False

    def add(
        self, old: VersionFile | None, file: VersionFile, version: Version, *, measured: bool
    ) -> None:
        if old is not None and measured:
            self.make(old, file, self.place.tree / self._name(old, file))

    def fetch(self, old: VersionFile | None, file: VersionFile) -> tuple[Usage, Path]:
        if old is None:
            raise Unfit("there is no older one")
        name = self._name(old, file)
        published = self.place.tree / name
        if not published.exists():
            direct = self.place.www / "direct"
            direct.mkdir(exist_ok=True)
            published = direct / name
            self.make(old, file, published)
        assert self.place.wire is not None
        delta = self.place.client / "delta"
        url = f"{self.place.wire.url}/{published.relative_to(self.place.www).as_posix()}"
        usage = download(url, delta)
        target = self.place.client / "content"
        return usage + self.apply(self.opened(old).path, delta, target), target

    def make(self, old: VersionFile, file: VersionFile, target: Path) -> None:
        """Write the delta to *target*. Raises Unfit."""
        raise NotImplementedError

    def apply(self, old: Path, delta: Path, target: Path) -> Usage:
        """Make *target* of *old* and *delta*."""
        raise NotImplementedError

    def _name(self, old: VersionFile, file: VersionFile) -> str:
        return f"{safe(file.track)}-{old.id.hex()[:16]}-{file.id.hex()[:16]}"


class Xdelta(DeltaRival):
    """xdelta3."""

    name = "xdelta3"
    title = "xdelta3"
    about = "xdelta3 -9 -S lzma, the source window as large as the content"
    programs = ("xdelta3",)
    version_of = ("xdelta3", "-V")

    def make(self, old: VersionFile, file: VersionFile, target: Path) -> None:
        one, two = self.opened(old), self.opened(file)
        window = max(one.size, 1 << 20)
        sizes = ["-B", str(1 << (window - 1).bit_length()), "-W", str(min(two.size + 1, 1 << 24))]
        run(
            [
                "xdelta3",
                "-q",
                "-f",
                "-9",
                "-S",
                "lzma",
                *sizes,
                "-e",
                "-s",
                one.path,
                two.path,
                target,
            ]
        )

    def apply(self, old: Path, delta: Path, target: Path) -> Usage:
        window = 1 << (max(old.stat().st_size, 1 << 20) - 1).bit_length()
        return run(["xdelta3", "-q", "-f", "-B", str(window), "-d", "-s", old, delta, target])


class Bsdiff(DeltaRival):
    """bsdiff and bspatch."""

    name = "bsdiff"
    title = "bsdiff"
    about = "bsdiff; contents to 8 MB"
    programs = ("bsdiff", "bspatch")

    def make(self, old: VersionFile, file: VersionFile, target: Path) -> None:
        one, two = self.opened(old), self.opened(file)
        if max(one.size, two.size) > _BSDIFF_LIMIT:
            raise Unfit(f"bsdiff takes contents to {_BSDIFF_LIMIT // _MB} MB here")
        run(["bsdiff", one.path, two.path, target])

    def apply(self, old: Path, delta: Path, target: Path) -> Usage:
        return run(["bspatch", old, target, delta])


class Ed(DeltaRival):
    """diff --ed, gzip -9, as Debian's pdiffs were."""

    name = "ed"
    title = "diff --ed | gzip"
    about = "diff --ed, gzip -9, applied by ed"
    programs = ("diff", "ed", "gzip")
    version_of = ("diff", "--version")

    def make(self, old: VersionFile, file: VersionFile, target: Path) -> None:
        sides = [self.place.bench.work / name for name in ("old-lines", "new-lines")]
        for content, side in zip((old, file), sides, strict=True):
            _as_lines(self.opened(content).path, side)
        script = self.place.bench.work / "script"
        run(["diff", "--ed", "--text", *sides], stdout=script, accept=(0, 1), env={"LC_ALL": "C"})
        target.write_bytes(gzip.compress(script.read_bytes(), 9, mtime=0))

    def apply(self, old: Path, delta: Path, target: Path) -> Usage:
        script = self.place.bench.work / "client-script"
        usage = run(["gzip", "-dc"], stdin=delta, stdout=script)
        with script.open("ab") as out:
            out.write(b"w\nq\n")
        _as_lines(old, target)
        return usage + run(["ed", "-s", target], stdin=script, env={"LC_ALL": "C"})

    def fetch(self, old: VersionFile | None, file: VersionFile) -> tuple[Usage, Path]:
        usage, target = super().fetch(old, file)
        # What ``_as_lines`` added goes again; a client knows the size from repomd.xml.
        os.truncate(target, self.opened(file).size)
        return usage, target


def _as_lines(source: Path, target: Path) -> None:
    """Copy a content so that its last line ends. Raises Unfit for what is no text."""
    data = source.read_bytes()
    if b"\0" in data:
        raise Unfit("it is no text")
    target.write_bytes(data if data.endswith(b"\n") or not data else data + b"\n")


class PatchFrom(DeltaRival):
    """zstd --patch-from."""

    name = "zstd-patch"
    title = "zstd --patch-from"
    about = "zstd -19 --long=27 --patch-from"
    programs = ("zstd",)
    version_of = ("zstd", "--version")

    def make(self, old: VersionFile, file: VersionFile, target: Path) -> None:
        one, two = self.opened(old), self.opened(file)
        command = ["zstd", "-q", "-f", "-19", "--long=27", f"--patch-from={one.path}"]
        run([*command, two.path, "-o", target])

    def apply(self, old: Path, delta: Path, target: Path) -> Usage:
        command = ["zstd", "-q", "-f", "-d", "--long=27", f"--patch-from={old}"]
        return run([*command, delta, "-o", target])


XDELTA, BSDIFF, ED, PATCH_FROM = Xdelta, Bsdiff, Ed, PatchFrom
