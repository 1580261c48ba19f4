"""DEST: one folder that is written safely. Nothing here knows repositories or the network.

Every access goes by descriptor from DEST's own, component by component, and follows no symlink
below it: what another user planted there can neither be read as metadata nor written through.
DEST itself may be a symlink of the caller's. New files are made in ``DEST/.tidings/``, fsynced,
and renamed into place; the lock is flock(2) on DEST.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from tidings_chunkstore.backends.local import explain
from tidings_chunkstore.errors import InputError, LocalError, LockedError

from .state import FOLDER, Stamp

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def translated(path: Path | str) -> Iterator[None]:
    """Failed system calls on *path* as LocalError."""
    try:
        yield
    except OSError as error:
        raise explain(error, path) from error


def stamp_of(status: os.stat_result) -> Stamp:
    """What tells the file apart from a later one at the same path."""
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


class Destination:
    """DEST, open and locked. Paths are relative to it; they are ``listing.safe_path``s."""

    def __init__(self, path: Path, *, create: bool = True, lock: bool = True) -> None:
        """Opens and locks *path*; makes it where it is missing.

        Without *create* nothing is written, and a missing folder is an empty one; without *lock*
        another run may be at work on it.

        Raises LockedError when another run holds it, LocalError, and InputError when it is not a
        folder or its ``.tidings`` is a symlink.
        """
        self.path = path
        self._made: list[Path] = []  # folders, the innermost first
        self._made_work = False
        self._work: int | None = None
        self._root: int | None = None
        if not create and not path.exists():
            return
        with translated(path):
            try:
                if create:
                    missing = [p for p in (path, *path.parents) if not os.path.lexists(p)]
                    path.mkdir(mode=0o755, parents=True, exist_ok=True)
                    self._made = missing
                self._root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except (FileExistsError, NotADirectoryError) as error:
                raise InputError(f"{path}: not a folder", code="not-a-folder") from error
        try:
            try:
                if lock:
                    fcntl.flock(self._root, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LockedError(f"another run is at work on {path}", path=str(path)) from error
        except BaseException:
            os.close(self._root)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in (self._work, self._root):
            if descriptor is not None:
                os.close(descriptor)
        self._work = self._root = None

    def undo(self) -> None:
        """After a failure: remove the folders that were made for this run and hold nothing."""
        if self._root is None:
            return
        with suppress(OSError):  # not empty: what is in there is of use to the next run
            if self._made_work:
                os.rmdir(FOLDER, dir_fd=self._root)
            for folder in self._made:
                folder.rmdir()

    # -- published files -------------------------------------------------------------------------

    def names(self) -> list[str]:
        """What lies in DEST itself, ``.tidings`` aside."""
        if self._root is None:
            return []
        with translated(self.path):
            return sorted(name for name in os.listdir(self._root) if name != FOLDER)

    def stamp(self, path: str) -> Stamp | None:
        """The stamp of the file at *path*; None where there is none."""
        with self._parent(path) as (folder, name):
            if folder is None:
                return None
            try:
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                return None
            self._refuse_odd(status, path)
            return stamp_of(status)

    def open(self, path: str) -> BinaryIO | None:
        """The file at *path* for reading; None where there is none."""
        with self._parent(path) as (folder, name):
            if folder is None:
                return None
            try:
                descriptor = os.open(name, _READ_FLAGS, dir_fd=folder)
            except FileNotFoundError:
                return None
            except OSError as error:
                self._refuse_odd(os.stat(name, dir_fd=folder, follow_symlinks=False), path)
                raise explain(error, self.path / path) from error
            try:
                self._refuse_odd(os.fstat(descriptor), path)  # before fdopen, which takes no folder
            except BaseException:
                os.close(descriptor)
                raise
            return os.fdopen(descriptor, "rb", buffering=0)

    def read(self, path: str, limit: int) -> bytes | None:
        """The bytes of a small file, None where there is none. Raises InputError above *limit*."""
        file = self.open(path)
        if file is None:
            return None
        with file, translated(self.path / path):
            data = file.read(limit + 1)
            while len(data) <= limit and (more := file.read(limit + 1 - len(data))):
                data += more
        if len(data) > limit:
            raise InputError(f"{self.path / path}: longer than {limit} bytes", code="too-large")
        return data

    def install(self, name: str, path: str) -> None:
        """Rename the file *name* of the work folder to *path*; ``settle`` makes it durable."""
        with self._parent(path, create=True) as (folder, last):
            assert folder is not None
            with suppress(FileNotFoundError):
                status = os.stat(last, dir_fd=folder, follow_symlinks=False)
                self._refuse_odd(status, path)
            with translated(self.path / path):
                os.rename(name, last, src_dir_fd=self.work, dst_dir_fd=folder)

    def settle(self, path: str) -> None:
        """Make the names in *path*'s folder durable."""
        with self._parent(path) as (folder, _), translated(self.path / path):
            if folder is not None:
                os.fsync(folder)

    def remove(self, path: str) -> None:
        """Remove a file, and the folders that it leaves empty."""
        try:
            with self._parent(path) as (folder, name):
                if folder is None:
                    return
                with suppress(FileNotFoundError):
                    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        os.unlink(name, dir_fd=folder)
        except OSError as error:
            raise explain(error, self.path / path) from error
        while "/" in path:
            path = path.rpartition("/")[0]
            with self._parent(path) as (folder, name):
                if folder is None:
                    return
                try:
                    os.rmdir(name, dir_fd=folder)
                except OSError:
                    return  # not empty, as most folders are: it stays

    @contextmanager
    def _parent(self, path: str, create: bool = False) -> Iterator[tuple[int | None, str]]:
        """The folder of *path* and the name in it; None where the folder is missing."""
        *folders, name = path.split("/")
        descriptor = None if self._root is None else os.dup(self._root)
        try:
            for i, part in enumerate(folders):
                if descriptor is None:
                    break
                inner = self._enter(descriptor, part, "/".join(folders[: i + 1]), create)
                os.close(descriptor)
                descriptor = inner
            yield descriptor, name
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _enter(self, parent: int, name: str, path: str, create: bool) -> int | None:
        for _ in range(2):
            try:
                return os.open(name, _FOLDER_FLAGS, dir_fd=parent)
            except FileNotFoundError:
                if not create:
                    return None
            except OSError as error:
                self._refuse_link(os.stat(name, dir_fd=parent, follow_symlinks=False), path)
                raise explain(error, self.path / path) from error
            with translated(self.path / path), suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=parent)
                os.chmod(name, 0o755, dir_fd=parent)  # noqa: S103 - metadata is for all to read
                os.fsync(parent)
        raise LocalError(f"{self.path / path}: comes and goes", path=path)

    def _refuse_link(self, status: os.stat_result, path: str) -> None:
        if stat.S_ISLNK(status.st_mode):
            raise InputError(
                f"{self.path / path}: a symlink, which is not read or written through; remove it",
                code="symlink",
                path=path,
            )

    def _refuse_odd(self, status: os.stat_result, path: str) -> None:
        self._refuse_link(status, path)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(
                f"{self.path / path}: not a regular file; remove it", code="not-a-file"
            )

    # -- the work folder -------------------------------------------------------------------------

    @property
    def work(self) -> int:
        """The descriptor of ``.tidings``, made where it is missing."""
        if self._work is None:
            assert self._root is not None
            self._work = self._enter(self._root, FOLDER, FOLDER, create=False)
            self._made_work = self._work is None
            if self._work is None:
                self._work = self._enter(self._root, FOLDER, FOLDER, create=True)
            assert self._work is not None
        return self._work

    def work_names(self) -> list[str]:
        """What lies in the work folder; it is not made for this."""
        with translated(self.path / FOLDER):
            if self._work is None and self._root is not None:
                self._work = self._enter(self._root, FOLDER, FOLDER, create=False)
            return [] if self._work is None else sorted(os.listdir(self._work))

    def work_create(self, name: str) -> BinaryIO:
        """A new, empty file in the work folder, for writing and reading; an old one goes."""
        with translated(self.path / FOLDER / name):
            self.work_remove(name)
            descriptor = os.open(name, _WRITE_FLAGS, 0o644, dir_fd=self.work)
            os.fchmod(descriptor, 0o644)
            return os.fdopen(descriptor, "w+b", buffering=0)

    def work_open(self, name: str) -> BinaryIO | None:
        """A file of the work folder for reading; None where there is none."""
        if name not in self.work_names():
            return None
        with translated(self.path / FOLDER / name):
            descriptor = os.open(name, _READ_FLAGS, dir_fd=self.work)
            return os.fdopen(descriptor, "rb", buffering=0)

    def work_read(self, name: str, limit: int) -> bytes | None:
        """The bytes of a file of the work folder; None where there is none within *limit*."""
        file = self.work_open(name)
        if file is None:
            return None
        with file, translated(self.path / FOLDER / name):
            data = bytearray()
            while len(data) <= limit and (more := file.read(limit + 1 - len(data))):
                data += more
        return bytes(data) if len(data) <= limit else None

    def work_write(self, name: str, data: bytes) -> None:
        """Write a file of the work folder, whole or not at all."""
        temporary = f"tmp-{name}"
        with self.work_create(temporary) as file, translated(self.path / FOLDER / name):
            write_all(file, data)
            os.fsync(file.fileno())
        with translated(self.path / FOLDER / name):
            os.rename(temporary, name, src_dir_fd=self.work, dst_dir_fd=self.work)
            os.fsync(self.work)

    def work_rename(self, name: str, target: str) -> None:
        """Rename within the work folder."""
        with translated(self.path / FOLDER / name):
            os.rename(name, target, src_dir_fd=self.work, dst_dir_fd=self.work)

    def work_remove(self, name: str) -> None:
        """Remove a file of the work folder; nothing happens where there is none."""
        with translated(self.path / FOLDER / name), suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.work)


def write_all(file: BinaryIO, data: bytes | bytearray | memoryview) -> None:
    """Write all of *data* to an unbuffered file."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def hash_file(file: BinaryIO, tap: Callable[[bytes], object] | None = None) -> tuple[int, bytes]:
    """Size and SHA-256 of *file* from its position on; *tap* sees every piece."""
    digest = hashlib.sha256()
    size = 0
    while piece := file.read(1 << 20):
        digest.update(piece)
        size += len(piece)
        if tap is not None:
            tap(piece)
    return size, digest.digest()
