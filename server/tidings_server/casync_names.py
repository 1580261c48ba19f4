"""What the files of a snapshot are called to casync and desync clients.

A file has two names: its path as published, and its path without the suffix of its compression,
which is what it opens to. Files whose names begin with a checksum have two more, without folder
and checksum (``primary.xml``, ``primary.xml.zst``), where that is unambiguous: those stay the
same from one publish to the next.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from tidings_chunkstore.errors import InputError
from tidings_chunkstore.head import Head
from tidings_chunkstore.ids import Digest
from tidings_chunkstore.listing import COMPRESSIONS
from tidings_chunkstore.pack import Snapshot
from tidings_chunkstore.places import PackName

_HASH = re.compile(r"[0-9a-f]{32,128}-(.+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Blob:
    """A file as published, or what it opens to (*opened*). *size* in bytes."""

    digest: Digest  #: the SHA-256 of its bytes
    size: int
    pack: PackName  #: its snapshot's
    path: str  #: the published file's
    opened: bool


@dataclass(frozen=True, slots=True)
class Names:
    """The blobs of one snapshot. An alias is a name that another snapshot uses for other bytes."""

    pack: PackName
    files: Mapping[str, Blob]
    aliases: Mapping[str, Blob]

    def find(self, name: str) -> Blob | None:
        """The blob called *name*."""
        return self.files.get(name) or self.aliases.get(name)

    def blobs(self) -> list[Blob]:
        """Each once; what files open to first, for that is what clients ask for."""
        once = {blob.digest: blob for blob in reversed([*self.files.values()])}
        return sorted(once.values(), key=lambda blob: not blob.opened)


def names_of(pack: PackName, snapshot: Snapshot) -> Names:
    """The names in *snapshot*. A published file goes before what another one opens to."""
    files: dict[str, Blob] = {}
    contents = {content.track: content for content in snapshot.contents}
    for file in snapshot.files:
        files[file.path] = Blob(file.sha256, file.size, pack, file.path, opened=False)
    for file in snapshot.files:
        content = contents.get(file.track)
        if file.recipe is not None and content is not None:
            blob = Blob(content.id, content.size, pack, file.path, opened=True)
            files.setdefault(opened_path(file.path), blob)
    called: dict[str, list[Blob]] = {}
    for path, blob in files.items():
        if match := _HASH.fullmatch(path.rpartition("/")[2]):
            called.setdefault(match[1], []).append(blob)
    aliases = {
        name: blobs[0]
        for name, blobs in called.items()
        if len({blob.digest for blob in blobs}) == 1 and name not in files
    }
    return Names(pack, files, aliases)


def opened_path(path: str) -> str:
    """*path* without the suffix of its compression."""
    for suffix in COMPRESSIONS:
        if path.endswith(suffix):
            return path[: -len(suffix)]
    return path


def packs_of(head: Head, snapshot: str | None) -> list[PackName]:
    """The packs of the snapshots that a request means, the likeliest first.

    *snapshot* is a pack's name without its suffix, or a serial. Without one, it is the current
    snapshot, then the one before it: a client may have begun before the last publish.

    Raises InputError when *snapshot* is not retained.
    """
    packs = [state.pack for state in reversed(head.states)]
    if snapshot is None:
        return packs[:2]
    for pack in packs:
        if snapshot in (str(pack.serial), stem_of(pack)):
            return [pack]
    raise InputError("casync: no such snapshot is retained", code="not-retained")


def stem_of(pack: PackName) -> str:
    """A pack's name without its suffix."""
    return str(pack).removesuffix(".pack")
