"""Which folders below a root are repositories, without reading the packages' folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tidings_chunkstore.backends.local import explain

DEPTH = 24  #: folders below the root; real mirrors have up to 9

#: Folders that hold packages, metadata, or our own files; never a repository below them.
_SKIPPED = frozenset({"repodata", "tidings", "by-hash", "pool", "packages", "rpms", "srpms"})
_APT_MAINS = ("InRelease", "Release")
_PACKAGES = (".rpm", ".deb", ".drpm", ".udeb", ".dsc")


def discover(top: Path, over: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """The repositories in *top* and below, a folder before those below it.

    A folder with ``repodata/repomd.xml``, ``InRelease`` or ``Release`` is one. Below an apt one
    there is none; an rpm-md one may hold others beside its packages (Fedora's ``debug/``).
    Symlinks to folders are not followed: what they show has a place of its own. Raises LocalError
    when *top* cannot be read; a folder below it that cannot is left out. Asked at each folder,
    *over* ends the search.
    """
    try:
        os.scandir(top).close()
    except OSError as error:
        raise explain(error, top) from error
    yield from _below(str(top), DEPTH, over)


def _below(folder: str, depth: int, over: Callable[[], bool]) -> Iterator[Path]:
    if over():
        return
    if any(os.path.isfile(os.path.join(folder, name)) for name in _APT_MAINS):
        yield Path(folder)
        return
    repository = os.path.isfile(os.path.join(folder, "repodata", "repomd.xml"))
    if repository:
        yield Path(folder)
    if depth == 0:
        return
    folders: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.endswith(_PACKAGES):
                    if not repository:
                        return  # a/ b/ ... of a package folder: no metadata here nor below
                elif (
                    not name.startswith(".")
                    and name.lower() not in _SKIPPED
                    and entry.is_dir(follow_symlinks=False)
                ):
                    folders.append(name)
    except OSError:
        return  # vanished, or no permission: it is no repository to this process
    # One letter beside the metadata: packages by their first letter.
    letters = repository
    for name in sorted(folders):
        if not (letters and len(name) == 1):
            yield from _below(os.path.join(folder, name), depth - 1, over)
