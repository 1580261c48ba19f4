"""The local file system: one folder, files 0644, folders 0755, every write whole or not at all.

A write goes to a temporary file beside its target, is fsynced and renamed, then the folder is
fsynced. Nothing is written in place, so hard-linked copies of a mirror stay as they were.
The lock is flock(2) on the folder itself: no lock file, nothing left after a crash.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import LocalError, LockedError, StoreError
from .base import HEAD_NAME

_TEMPORARY = ".tmp-"
_PAUSE = 0.05  # seconds between two looks at a lock that another process holds


def explain(error: OSError, path: Path | str) -> LocalError:
    """The LocalError for a failed system call on *path*, in words that say what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LocalError(f"no space left to write {path}", code="disk-full", path=str(path))
    if error.errno == errno.EROFS:
        return LocalError(f"{path} is on a read-only file system", code="read-only", path=str(path))
    if error.errno in (errno.EACCES, errno.EPERM):
        return LocalError(f"no permission for {path}", code="permission", path=str(path))
    return LocalError(f"{path}: {error.strerror or error}", path=str(path))


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(
    target: Path, pieces: Iterable[bytes | memoryview], *, after: int | None = None
) -> int:
    """Write *pieces* to *target* by way of a fsynced temporary file; bytes written.

    *after*: the file gets a time of change above this second.

    Raises LocalError. Whatever happens, *target* is the old file or the new one.
    """
    temporary = target.parent / f"{_TEMPORARY}{target.name}.{os.getpid()}"
    size = 0
    try:
        descriptor = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644
        )
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), 0o644)
                for piece in pieces:
                    size += file.write(piece)
                file.flush()
                if after is not None and int(os.fstat(file.fileno()).st_mtime) <= after:
                    os.utime(file.fileno(), (after + 1, after + 1))
                os.fsync(file.fileno())
            os.rename(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(target.parent)
    except OSError as error:
        raise explain(error, target) from error
    return size


class LocalBackend:
    """A store in one folder (``.../tidings``).

    *patience*: seconds that ``lock`` waits for another process; *waits* is told them when it
    begins to.
    """

    def __init__(
        self,
        folder: Path,
        patience: float = 0.0,
        waits: Callable[[float], object] = lambda _: None,
    ) -> None:
        self.folder = folder
        self.patience = patience
        self._waits = waits

    def names(self) -> list[str]:
        """See Readable."""
        try:
            return sorted(n for n in os.listdir(self.folder) if not n.startswith("."))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise explain(error, self.folder) from error

    def size(self, name: str) -> int | None:
        """See Readable."""
        try:
            found = (self.folder / name).stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise explain(error, self.folder / name) from error
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def read_at(self, name: str, offset: int, length: int) -> bytes:
        """See Readable."""
        path = self.folder / name
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(length)
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing", code="store-missing", name=name) from error
        except OSError as error:
            raise explain(error, path) from error
        if len(data) != length:
            raise StoreError(f"{path} is too short", code="store-short", name=name)
        return data

    def put(self, name: str, pieces: Iterable[bytes | memoryview]) -> int:
        """See Writable."""
        return write_atomically(self.folder / name, pieces)

    def swap_head(self, data: bytes, expected: bytes | None) -> None:
        """See Writable. The caller holds the lock, so compare and rename cannot be torn apart."""
        path = self.folder / HEAD_NAME
        current = path.read_bytes() if path.exists() else None
        if current != expected:
            raise LockedError(f"{path} was changed by another process")
        # Static servers make the ETag of size and second: two heads of one second look the same.
        after = None if current is None else int(path.stat().st_mtime)
        write_atomically(path, [data], after=after)

    def delete(self, name: str) -> None:
        """See Writable."""
        try:
            (self.folder / name).unlink(missing_ok=True)
            fsync_folder(self.folder)
        except OSError as error:
            raise explain(error, self.folder / name) from error

    def sweep(self) -> list[str]:
        """See Writable. The caller holds the lock, so no live writer owns a temporary file."""
        try:
            left = [n for n in os.listdir(self.folder) if n.startswith(_TEMPORARY)]
        except FileNotFoundError:
            return []
        for name in left:
            self.delete(name)
        return left

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """See Locked. Makes the folder where it is missing. Says whether it had to wait."""
        try:
            self._make_folder()
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise explain(error, self.folder) from error
        try:
            yield self._wait_for(descriptor)
        finally:
            os.close(descriptor)

    def _wait_for(self, descriptor: int) -> bool:
        deadline = time.monotonic() + self.patience
        waited = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise LockedError(f"another process is at work on {self.folder}") from error
            else:
                return waited
            if not waited:
                self._waits(self.patience)
            waited = True
            time.sleep(_PAUSE)

    def _make_folder(self) -> None:
        missing = []
        folder = self.folder
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o755)
            fsync_folder(folder.parent)
