"""Layouts: how a kind of repository names its files, and reading one from a folder.

A layout knows the main file, which is switched last, what lies beside it, and how to parse it.
All else is the same for every layout. ``read_tree`` proves a tree; the pure parts are in
``listing``, ``rpmmd``, ``apt`` and ``types``.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from .apt import APT
from .errors import FormatError, InputError, LocalError, UnsettledError
from .ids import FileId
from .limits import KIB, LIMITS
from .listing import Checksum, Listing, PublishedFile, safe_path
from .rpmmd import RPM_MD
from .types import parse_types, select

__all__ = [
    "APT",
    "LAYOUTS",
    "RPM_MD",
    "Checksum",
    "Layout",
    "Listing",
    "MainFile",
    "PublishedFile",
    "TreeFile",
    "TreeListing",
    "by_name",
    "detect",
    "parse_types",
    "read_tree",
    "safe_path",
    "select",
    "unchanged",
]

_BLOCK = 256 * KIB


class Layout(Protocol):
    """One kind of repository."""

    @property
    def name(self) -> str:
        """The layout's name in heads and options."""

    @property
    def partial(self) -> bool:
        """Whether a tree may lack files that the main file lists."""

    def mains(self) -> tuple[str, ...]:
        """The main file and all that may lie beside it, in the order in which they are switched."""

    def beside(self, main: str) -> tuple[str, ...]:
        """The paths that may lie beside *main*, in the order in which they are switched."""

    def describe(self, path: str) -> tuple[str, str]:
        """Type and track of a path of ``mains``."""

    def parse(self, main: bytes, path: str | None = None) -> Listing:
        """The publish that the main file's bytes describe. Raises FormatError."""


LAYOUTS: Mapping[str, Layout] = {RPM_MD.name: RPM_MD, APT.name: APT}


@dataclass(frozen=True, slots=True)
class MainFile:
    """The main file, or one that lies beside it, with its bytes."""

    file: PublishedFile  #: rank 0, size and SHA-256 known
    data: bytes
    id: FileId


@dataclass(frozen=True, slots=True)
class TreeFile:
    """A listed file that is in the tree and is what the main file says."""

    file: PublishedFile
    source: Path  #: where the bytes are, symlinks resolved
    size: int  #: bytes
    id: FileId


@dataclass(frozen=True, slots=True)
class TreeListing:
    """A whole, proven publish in a folder."""

    root: Path
    layout: Layout
    listing: Listing
    mains: tuple[MainFile, ...]  #: those present, in the order in which they are switched
    files: tuple[TreeFile, ...]  #: those present, in the listing's order
    absent: tuple[str, ...] = ()  #: listed and not in the tree, where the layout allows that

    @property
    def main(self) -> MainFile:
        """The file that is switched last."""
        return self.mains[-1]


def by_name(name: str) -> Layout:
    """The layout of that name. Raises InputError."""
    if name not in LAYOUTS:
        raise InputError(
            f"unknown layout: {name[:40]!r} (there are {', '.join(LAYOUTS)})", code="unknown-layout"
        )
    return LAYOUTS[name]


def detect(root: Path) -> Layout | None:
    """The layout whose main file *root* holds, rpm-md first; None when there is none."""
    for layout in LAYOUTS.values():
        if _main_of(root, layout) is not None:
            return layout
    return None


def read_tree(
    root: Path,
    layout: Layout | None = None,
    *,
    follow: Sequence[Path] = (),
    types: Sequence[str] | None = None,
) -> TreeListing:
    """Read and prove the repository in *root*: all its files are there and as listed.

    Every file is hashed once. Who reads the bytes later compares them with ``TreeFile.id``, for
    the tree may change meanwhile. Symlinks may lead anywhere inside *root* and *follow*. With
    *types* only the files that these select (``select``) must be there.

    Raises:
        InputError: no metadata (``no-metadata``), a main file that is broken or names nothing
            (``broken-metadata``, ``unsafe-path``), a symlink out of the roots (``outside``),
            something that is no regular file (``not-a-file``).
        UnsettledError: as in the middle of a mirror's rsync: files are missing
            (``missing-files``) or differ (``wrong-size``, ``wrong-checksum``), InRelease and
            Release differ (``mixed-release``), the main file changed meanwhile (``moving``).
        LocalError: a file cannot be read.
    """
    if layout is None:
        layout = detect(root)
    main = _main_of(root, layout) if layout is not None else None
    if layout is None or main is None:
        kinds = [layout.name] if layout is not None else list(LAYOUTS)
        raise InputError(f"{root}: no {' or '.join(kinds)} metadata", code="no-metadata")
    tree = _Tree(root, follow)
    mains = _read_mains(tree, layout, main)
    listing = _parse(layout, mains[-1].data, main, root)
    if not listing.files:
        left_out = f" ({len(listing.skipped)} left out)" if listing.skipped else ""
        raise InputError(
            f"{root}: {main} names no file that can be published{left_out}", code="broken-metadata"
        )
    absent = _check_sizes(tree, layout, listing, types)
    _check_beside(layout, listing, mains, set(absent), root)
    files = tuple(_prove(tree, file, main) for file in listing.files if file.path not in absent)
    if [(file.file.path, file.id) for file in _read_mains(tree, layout, main)] != [
        (file.file.path, file.id) for file in mains
    ]:
        raise UnsettledError(f"{root}: {main} changed while it was read", code="moving")
    return TreeListing(root, layout, listing, mains, files, tuple(absent))


def unchanged(
    root: Path,
    layout: Layout,
    mains: Mapping[str, bytes],
    sizes: Mapping[str, int],
    *,
    follow: Sequence[Path] = (),
    types: Sequence[str] | None = None,
) -> bool:
    """Whether *root* still holds a publish, as far as the main files' bytes and stat tell.

    Args:
        mains: SHA-256 by path of the main file and of each that lay beside it. One that has
            appeared or gone is a change.
        sizes: bytes by path of all other files of that publish.

    Listed files that were absent and have come are a change too, where some may be absent (a
    mirror may send apt's InRelease first). Any error is a change: ``read_tree`` then says what is
    wrong.
    """
    try:
        tree = _Tree(root, follow)
        main = _main_of(root, layout)
        if main is None or mains.keys() != {main, *_present(tree, layout.beside(main))}:
            return False
        data = {path: tree.read(path) for path in mains}
        if any(hashlib.sha256(data[path]).digest() != mains[path] for path in mains):
            return False
        if any(tree.size(path) != size for path, size in sizes.items()):
            return False
        if layout.partial or types is not None:
            listed = layout.parse(data[main], main).by_path()
            return not any(tree.size(path) is not None for path in listed.keys() - sizes.keys())
    except (InputError, FormatError, LocalError):
        return False
    return True


class _Tree:
    """Reads files below a root, following symlinks inside the allowed roots only."""

    def __init__(self, root: Path, follow: Sequence[Path]) -> None:
        self.root = root
        try:
            self._roots = [os.path.realpath(path, strict=True) for path in (root, *follow)]
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}", code="no-metadata") from error

    def resolve(self, path: str) -> str | None:
        """The real path of *path*, or None when there is no such file.

        Raises InputError when it lies outside the roots.
        """
        try:
            real = os.path.realpath(os.path.join(self.root, path), strict=True)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:  # a loop of symlinks, a folder without permission
            raise LocalError(f"{self.root}/{path}: {error.strerror}", code="unreadable") from error
        if not any(real.startswith(os.path.join(root, "")) for root in self._roots):
            raise InputError(
                f"{self.root}/{path}: a symlink leads out of the repository to {real}",
                code="outside",
                path=path,
            )
        return real

    def size(self, path: str) -> int | None:
        """Bytes of the regular file at *path*, or None when there is none."""
        real = self.resolve(path)
        if real is None:
            return None
        try:
            status = os.stat(real)
        except FileNotFoundError:  # gone since it was resolved
            return None
        except OSError as error:
            raise LocalError(f"{self.root}/{path}: {error.strerror}", code="unreadable") from error
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{self.root}/{path}: not a regular file", code="not-a-file")
        return status.st_size

    @contextmanager
    def open(self, path: str) -> Iterator[tuple[BinaryIO, str]]:
        """The file at *path* for reading, and its real path. Raises UnsettledError if gone."""
        real = self.resolve(path)
        if real is None:
            raise UnsettledError(f"{self.root}/{path}: not there", code="missing-files")
        try:
            # O_NONBLOCK: opening a fifo must not hang; it changes nothing for regular files.
            handle = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:  # gone since it was resolved
            raise UnsettledError(f"{self.root}/{path}: not there", code="missing-files") from error
        except OSError as error:
            raise LocalError(f"{self.root}/{path}: {error.strerror}", code="unreadable") from error
        if not stat.S_ISREG(os.fstat(handle).st_mode):  # before fdopen, which takes no folder
            os.close(handle)
            raise InputError(f"{self.root}/{path}: not a regular file", code="not-a-file")
        with os.fdopen(handle, "rb", buffering=0) as file:
            yield file, real

    def read(self, path: str) -> bytes:
        """The bytes of a small file. Raises InputError above LIMITS.main."""
        with self.open(path) as (file, _):
            data = b"".join(_blocks(file, self.root, path, LIMITS.main + 1))
        if len(data) > LIMITS.main:
            raise InputError(
                f"{self.root}/{path}: longer than {LIMITS.main} bytes", code="broken-metadata"
            )
        return data


def _blocks(file: BinaryIO, root: Path, path: str, maximum: int) -> Iterator[bytes]:
    """The file's bytes, at most *maximum*. Raises LocalError."""
    left = maximum
    while left > 0:
        try:
            block = file.read(min(left, _BLOCK))
        except OSError as error:
            raise LocalError(f"{root}/{path}: {error.strerror}", code="unreadable") from error
        if not block:
            return
        left -= len(block)
        yield block


def _main_of(root: Path, layout: Layout) -> str | None:
    """The path of the main file in *root*: InRelease, or Release where there is none."""
    for path in reversed(layout.mains()):
        kind, _ = layout.describe(path)
        if kind not in ("signature", "key") and os.path.lexists(root / path):
            return path
    return None


def _present(tree: _Tree, paths: Iterable[str]) -> list[str]:
    return [path for path in paths if tree.resolve(path) is not None]


def _read_mains(tree: _Tree, layout: Layout, main: str) -> tuple[MainFile, ...]:
    return tuple(
        _main_file(layout, path, tree.read(path))
        for path in (*_present(tree, layout.beside(main)), main)
    )


def _main_file(layout: Layout, path: str, data: bytes) -> MainFile:
    kind, track = layout.describe(path)
    identity = FileId.of(data)
    file = PublishedFile(
        path=path,
        type=kind,
        track=track,
        rank=0,
        size=len(data),
        checksum=Checksum("sha256", identity.hex()),
    )
    return MainFile(file, data, identity)


def _parse(layout: Layout, data: bytes, path: str, root: Path) -> Listing:
    try:
        return layout.parse(data, path)
    except FormatError as error:
        code = error.code if error.code != FormatError.code else "broken-metadata"
        raise InputError(f"{root}: {error}", code=code) from error


def _check_sizes(
    tree: _Tree, layout: Layout, listing: Listing, types: Sequence[str] | None
) -> list[str]:
    """Compare presence and sizes, which is cheap, before anything is hashed; what is absent."""
    needed = {file.path for file in (() if layout.partial else select(listing, types))}
    absent: list[str] = []
    wrong: list[str] = []
    for file in listing.files:
        size = tree.size(file.path)
        if size is None:
            absent.append(file.path)
        elif file.size is not None and size != file.size:
            wrong.append(file.path)
    missing = [path for path in absent if path in needed]
    if missing or (absent and len(absent) == len(listing.files)):
        raise _unsettled(
            tree.root,
            missing or absent,
            f"named by {listing.main} and not there",
            code="missing-files",
        )
    if wrong:
        raise _unsettled(
            tree.root, wrong, f"not the size that {listing.main} says", code="wrong-size"
        )
    return absent


def _unsettled(root: Path, paths: Sequence[str], problem: str, *, code: str) -> UnsettledError:
    more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
    return UnsettledError(f"{root}/{paths[0]}: {problem}{more}", code=code, paths=list(paths))


def _check_beside(
    layout: Layout, listing: Listing, mains: Sequence[MainFile], absent: set[str], root: Path
) -> None:
    """A Release beside an InRelease must say the same about the files that are there."""
    for other in mains[:-1]:
        if other.file.type != "release":
            continue
        release = _parse(layout, other.data, other.file.path, root)
        if _facts(release, absent) != _facts(listing, absent):
            raise UnsettledError(
                f"{root}: {other.file.path} and {listing.main} are of different publishes",
                code="mixed-release",
            )


def _facts(listing: Listing, absent: set[str]) -> dict[str, tuple[int | None, Checksum | None]]:
    return {
        file.path: (file.size, file.checksum) for file in listing.files if file.path not in absent
    }


def _prove(tree: _Tree, file: PublishedFile, main: str) -> TreeFile:
    """Hash one file and compare it with what the main file says."""
    sha256 = hashlib.sha256()
    named = file.checksum
    extra = (
        hashlib.new(named.algorithm, usedforsecurity=False)
        if named is not None and named.algorithm != "sha256"
        else None
    )
    size = 0
    with tree.open(file.path) as (handle, real):
        for block in _blocks(handle, tree.root, file.path, LIMITS.published + 1):
            size += len(block)
            sha256.update(block)
            if extra is not None:
                extra.update(block)
    if size > LIMITS.published:
        raise InputError(
            f"{tree.root}/{file.path}: longer than {LIMITS.published} bytes", code="too-large"
        )
    if named is not None and (extra or sha256).hexdigest() != named.hex:
        raise _unsettled(
            tree.root,
            [file.path],
            f"not the {named.algorithm} that {main} says",
            code="wrong-checksum",
        )
    return TreeFile(file, Path(real), size, FileId(sha256.digest()))
