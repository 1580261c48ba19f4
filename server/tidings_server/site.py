"""From a URL's path to a file, without looking at anything that was not asked for.

A *site* is what one server shows: everything below a root, configured repositories at their own
paths, and a store tree laid over both. Symlinks are followed inside these folders only, names
that begin with a dot do not exist, and below ``tidings/`` there are the head and packs alone.
"""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote_to_bytes

from tidings_chunkstore.backends.base import HEAD_NAME
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.errors import FormatError, StoreError
from tidings_chunkstore.head import Head
from tidings_chunkstore.head import decode as decode_head
from tidings_chunkstore.places import PackName
from tidings_chunkstore.store import Store

from .publish import FOLDER
from .settings import RepoSettings, ServeSettings

_PATH_MAX = 4096  # bytes of a path as it is sent
_REPOSITORIES = 1024  # kept with their heads and tables of contents
#: What lies below a repository's ``tidings/`` besides objects; each is a route of ``api``.
FEATURES = frozenset({"frames", "delta", "reconcile", "casync"})

Signature = tuple[int, ...]


def signature(found: os.stat_result) -> Signature:
    """What changes when a file does, whatever replaced it."""
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Target:
    """What a path asks for: an object (*pack*, *head* or a published file), or a feature.

    *repository* is the repository's path in URLs; for a published file it is not known.
    """

    parts: tuple[str, ...]
    repository: str | None = None
    pack: PackName | None = None
    is_head: bool = False
    feature: str | None = None


def split_path(raw: bytes) -> tuple[str, ...] | None:
    """The parts of a path as sent, decoded; None for one that names no file here.

    Encoded slashes, backslashes, NUL and other control characters, dot files and ``..`` are
    refused; empty parts and ``.`` are dropped, as web servers do: apt sends ``/flat/./InRelease``.
    """
    if len(raw) > _PATH_MAX or not raw.startswith(b"/") or raw.endswith(b"/"):
        return None
    while b"/./" in raw:
        raw = raw.replace(b"/./", b"/")
    if b"%" in raw:
        lower = raw.lower()
        if b"%2f" in lower or b"%5c" in lower:
            return None
        raw = unquote_to_bytes(raw)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return None
    if not text.isprintable() or "\\" in text:
        return None
    parts = tuple(part for part in text.split("/") if part)
    if not parts or any(part.startswith(".") for part in parts):
        return None
    return parts


def target_of(parts: Sequence[str]) -> Target:
    """What *parts* ask for. A repository may itself lie below a folder ``tidings``."""
    parts = tuple(parts)
    for at, part in enumerate(parts):
        rest = parts[at + 1 :]
        if part != FOLDER or not rest:
            continue
        repository = "/".join(parts[:at])
        if rest[0] in FEATURES:
            return Target(parts, repository, feature=rest[0])
        if len(rest) == 1:
            if rest[0] == HEAD_NAME:
                return Target(parts, repository, is_head=True)
            try:
                return Target(parts, repository, pack=PackName.parse(rest[0]))
            except FormatError:
                continue  # a published file, if anything
    return Target(parts)


@dataclass(slots=True)
class Repository:
    """A repository with a store. Safe to use from many threads; reads files, so not in the loop."""

    name: str  #: its path in URLs
    root: Path  #: the folder of its metadata
    store: Store
    folder: Path  #: the store's folder
    _head: tuple[Signature, bytes, Head] | None = field(default=None, repr=False)

    def head_bytes(self) -> bytes:
        """head.json as it lies there now. Raises StoreError where it is missing or damaged."""
        return self._read()[1]

    def head(self) -> Head:
        """The head as it is now. Raises StoreError where it is missing or damaged."""
        return self._read()[2]

    def _read(self) -> tuple[Signature, bytes, Head]:
        try:
            now = signature(os.stat(self.folder / HEAD_NAME))
        except OSError as error:
            raise StoreError(f"{self.folder}: no head", code="store-missing") from error
        known = self._head
        if known is not None and known[0] == now:
            return known
        data = self.store.read_head_bytes()
        if data is None:
            raise StoreError(f"{self.folder}: no head", code="store-missing")
        try:
            decoded = decode_head(data)
        except FormatError as error:
            raise StoreError(f"{self.folder}: {error}", code="store-head") from error
        self._head = (now, data, decoded)
        return self._head


class Site:
    """The folders that one server shows."""

    def __init__(self, settings: ServeSettings, repos: Iterable[RepoSettings] = ()) -> None:
        self._root = settings.root
        self._store = settings.store
        self._repos = {repo.path: repo for repo in repos}
        self._known: OrderedDict[str, Repository] = OrderedDict()
        self._lock = threading.Lock()

    def ready(self) -> bool:
        """Whether every folder is there."""
        return all(os.path.isdir(folder) for folder in self._roots())

    def candidates(self, target: Target) -> list[str]:
        """Where the object may lie, the likeliest first."""
        if target.repository is not None:
            return [
                os.path.join(folder, target.parts[-1])
                for folder in self.store_folders(target.repository)
            ]
        name, rest = self._configured(target.parts)
        found = []
        if name is not None and rest:
            found.append(os.path.join(self._repos[name].root, *rest))
        if self._root is not None:
            found.append(os.path.join(self._root, *target.parts))
        return found

    def store_folders(self, name: str) -> list[str]:
        """Where the store of the repository at *name* may lie."""
        found: list[str] = []
        repo = self._repos.get(name)
        if repo is not None:
            own = [repo.store / name] if repo.store else []
            found += [os.path.join(folder, FOLDER) for folder in (*own, repo.root)]
        for tree in (self._store, self._root):
            if tree is not None:
                found.append(os.path.join(tree, name, FOLDER))
        return found

    def open(self, candidates: Iterable[str]) -> tuple[int, str, os.stat_result] | None:
        """The first regular file of *candidates* inside the site: descriptor, real path, stat.

        Raises PermissionError.
        """
        roots = [os.path.join(os.path.realpath(folder), "") for folder in self._roots()]
        for candidate in candidates:
            try:
                real = os.path.realpath(candidate, strict=True)
            except PermissionError:
                raise
            except (OSError, ValueError):
                continue
            if not any(real.startswith(root) for root in roots):
                continue
            if any(part.startswith(".") for part in os.path.relpath(real, "/").split("/")[-1:]):
                continue  # a symlink to a dot file shows what is not to be shown
            try:
                # O_NONBLOCK: a fifo must not hold us up; it changes nothing for regular files.
                descriptor = os.open(
                    real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
                )
            except PermissionError:
                raise
            except OSError:
                continue
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode):
                return descriptor, real, found
            os.close(descriptor)
        return None

    def repository(self, name: str) -> Repository | None:
        """The repository at *name*, when it has a head inside the site."""
        roots = [os.path.join(os.path.realpath(folder), "") for folder in self._roots()]
        for folder in self.store_folders(name):
            real = os.path.realpath(folder)
            inside = any(os.path.join(real, "").startswith(root) for root in roots)
            if not inside or not os.path.isfile(os.path.join(real, HEAD_NAME)):
                continue
            with self._lock:
                known = self._known.get(name)
                if known is None or str(known.folder) != real:
                    repo = self._repos.get(name)
                    root = repo.root if repo else Path(self._root or self._store or "/", name)
                    store = Store(LocalBackend(Path(real)))
                    known = self._known[name] = Repository(name, root, store, Path(real))
                self._known.move_to_end(name)
                while len(self._known) > _REPOSITORIES:
                    self._known.popitem(last=False)
            return known
        return None

    def names(self) -> list[str]:
        """The paths of the repositories that are configured or were asked for, sorted."""
        with self._lock:
            return sorted({*self._repos, *self._known})

    def _roots(self) -> list[Path]:
        repos = [folder for repo in self._repos.values() for folder in (repo.root, repo.store)]
        return [folder for folder in (self._root, self._store, *repos) if folder is not None]

    def _configured(self, parts: Sequence[str]) -> tuple[str | None, Sequence[str]]:
        """The configured repository that *parts* lie in, and the rest of them."""
        if self._repos:
            for at in range(len(parts), -1, -1):
                name = "/".join(parts[:at])
                if name in self._repos:
                    return name, parts[at:]
        return None, parts
