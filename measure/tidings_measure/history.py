"""A history: a folder of consecutive publishes, each a whole repository's metadata, in name order.

``HISTORY/NNNN.../repodata/repomd.xml`` or ``HISTORY/NNNN.../InRelease``; other folders are passed
over. A version is read and proven once; its contents are opened into a cache when first wanted.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from tidings_chunkstore.errors import InputError
from tidings_chunkstore.ids import FileId
from tidings_chunkstore.layout import detect, read_tree
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.opening import codec_of, open_stream

_UNWANTED = ("_db", "_zck", "_xz", "_bz2", "_gz")  # other wrappings of what is there already


@dataclass(frozen=True, slots=True)
class Opened:
    """A content in a file."""

    path: Path
    size: int  #: bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class VersionFile:
    """One published metadata file of a version."""

    type: str
    track: str
    path: str  #: relative to the version's folder
    source: Path
    size: int  #: bytes as published
    id: FileId


@dataclass(frozen=True, slots=True)
class Version:
    """One publish: its folder and the files that take part, one a track."""

    index: int
    name: str
    folder: Path
    files: tuple[VersionFile, ...]
    paths: tuple[str, ...]  #: all published files, the main one last

    def track(self, name: str) -> VersionFile | None:
        """The file of a track."""
        return next((file for file in self.files if file.track == name), None)


class History:
    """The versions of a folder, oldest first, and their opened contents in *cache*."""

    def __init__(self, folder: Path, cache: Path, types: Collection[str] | None = None) -> None:
        self.folder = folder
        self._cache = cache
        self._opened: dict[FileId, Opened] = {}
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder", code="history")
        folders = sorted(path for path in folder.iterdir() if path.is_dir() and detect(path))
        if len(folders) < 2:
            raise InputError(
                f"{folder}: a history is a folder of at least two publishes, each in a folder of "
                f"its own; there {'is one' if folders else 'are none'}",
                code="history",
            )
        self.versions: Sequence[Version] = tuple(
            _version(number, path, types) for number, path in enumerate(folders)
        )
        self.types = tuple(dict.fromkeys(f.type for v in self.versions for f in v.files))
        if not self.types:
            raise InputError(f"{folder}: none of its files is of those types", code="history")

    def opened(self, file: VersionFile) -> Opened:
        """The content of *file*. Raises FormatError when it is damaged."""
        known = self._opened.get(file.id)
        if known is not None:
            return known
        self._cache.mkdir(parents=True, exist_ok=True)
        target = self._cache / file.id.hex()
        digest, size = hashlib.sha256(), 0
        with file.source.open("rb") as source:
            codec = codec_of(file.path, source.read(16))
            source.seek(0)
            partial = target.with_suffix(".part")
            with partial.open("wb") as sink:
                for piece in open_stream(source, codec, limit=LIMITS.content):
                    digest.update(piece)
                    size += sink.write(piece)
        partial.rename(target)
        made = Opened(target, size, digest.hexdigest())
        self._opened[file.id] = made
        return made

    def drop(self) -> None:
        """Remove the cache."""
        self._opened.clear()
        shutil.rmtree(self._cache, ignore_errors=True)


def changed(base: Version | None, version: Version) -> list[tuple[VersionFile | None, VersionFile]]:
    """The files of *version* that a client at *base* lacks, with the older ones of their tracks."""
    pairs = []
    for file in version.files:
        old = base.track(file.track) if base else None
        if old is None or old.id != file.id:
            pairs.append((old, file))
    return pairs


def copy_publish(version: Version, target: Path) -> None:
    """Make *target* hold exactly that publish; a file with the same bytes is left as it is."""
    wanted = set(version.paths)
    for path in wanted:
        source, sink = version.folder / path, target / path
        if sink.exists() and sink.read_bytes() == source.read_bytes():
            continue
        sink.parent.mkdir(parents=True, exist_ok=True)
        temporary = sink.with_name(f".{sink.name}.tmp")
        shutil.copy2(source, temporary)
        os.replace(temporary, sink)
    for found in sorted(target.rglob("*")):
        inside = found.relative_to(target).as_posix()
        if found.is_file() and inside not in wanted and not inside.startswith(("tidings/", ".")):
            found.unlink()


def _version(index: int, folder: Path, types: Collection[str] | None) -> Version:
    tree = read_tree(folder)
    chosen: dict[str, VersionFile] = {}
    for entry in tree.files:
        file = entry.file
        if file.type not in types if types is not None else _unwanted(file.type):
            continue
        made = VersionFile(file.type, file.track, file.path, entry.source, entry.size, entry.id)
        # Two wrappings of one content: a client fetches the smaller.
        if file.track not in chosen or made.size < chosen[file.track].size:
            chosen[file.track] = made
    paths = (*(e.file.path for e in tree.files), *(m.file.path for m in tree.mains))
    return Version(index, folder.name, folder, tuple(chosen.values()), paths)


def _unwanted(kind: str) -> bool:
    return kind.endswith(_UNWANTED)
