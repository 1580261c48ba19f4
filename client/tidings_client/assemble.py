"""From sections, chunks and old files to published files: streaming, bounded, and proven.

Contents that are needed by position, or more than once, are spooled decompressed in
``DEST/.tidings/``; all else runs through: one thread rebuilds the content, the other compresses it
again. What comes out is a *done* file: whole, hashed, compared with what repomd.xml or Release
promise, and fsynced. Nothing else ever leaves the work folder.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol

from tidings_chunkstore import delta
from tidings_chunkstore.errors import FormatError, LocalError, VerificationError
from tidings_chunkstore.ids import ContentId, FileId
from tidings_chunkstore.limits import LIMITS, MIB
from tidings_chunkstore.listing import Checksum
from tidings_chunkstore.recipe import Recipe, run

from .local import Destination, hash_file, translated, write_all
from .stock import Source, Stock

DONE = "done-"
SPOOL = "spool-"
TEMPORARY = "tmp-"
_QUEUED = 4  # pieces of at most 1 MiB between the two threads
_READ = 1 * MIB

Write = Callable[[delta.Buffer], object]
#: Writes a content piece by piece; what was written counts only when it returns.
Produce = Callable[[Write], object]


@dataclass(frozen=True, slots=True)
class Proof:
    """What a published file must be: as the main file says, and as the head says."""

    path: str
    size: int | None
    sha256: FileId | None = None
    checksum: Checksum | None = None

    @property
    def strong(self) -> bool:
        """Whether a forged file would be noticed."""
        return self.sha256 is not None or (self.checksum is not None and self.checksum.strong)


@dataclass(frozen=True, slots=True)
class Done:
    """A finished, proven file in the work folder."""

    name: str
    size: int
    sha256: FileId


@dataclass(frozen=True, slots=True)
class Wrap:
    """A published file to make from a content."""

    recipe: Recipe
    proof: Proof
    sides: Mapping[ContentId, bytes] = field(default_factory=dict)  #: what the recipe needs besides


class _Sum(Protocol):
    def update(self, data: delta.Buffer, /) -> None: ...
    def hexdigest(self) -> str: ...


class _Checked:
    """A file in the making: its hashes and size as it is written."""

    def __init__(self, file: BinaryIO, name: str, proof: Proof) -> None:
        self.file = file
        self.name = name
        self.proof = proof
        self.restart()

    def restart(self) -> None:
        """Begin anew: what was written is void."""
        self.file.seek(0)
        self.file.truncate()
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._named: _Sum | None = None
        named = self.proof.checksum
        if named is not None and named.algorithm != "sha256":
            self._named = hashlib.new(named.algorithm, usedforsecurity=False)

    def write(self, data: delta.Buffer) -> None:
        self.size += len(data)
        if self.size > (LIMITS.published if self.proof.size is None else self.proof.size):
            raise VerificationError(f"{self.proof.path}: longer than promised", code="wrong-size")
        self._sha256.update(data)
        if self._named is not None:
            self._named.update(data)
        write_all(self.file, memoryview(data))

    def verify(self) -> FileId:
        """Raises VerificationError unless the file is what was promised."""
        proof, digest = self.proof, FileId(self._sha256.digest())
        if proof.size is not None and self.size != proof.size:
            raise VerificationError(
                f"{proof.path}: {self.size} bytes, not {proof.size}", code="wrong-size"
            )
        if proof.sha256 is not None and digest != proof.sha256:
            raise VerificationError(
                f"{proof.path}: not the SHA-256 promised", code="wrong-checksum"
            )
        named = proof.checksum
        if named is not None:
            found = digest.hex() if self._named is None else self._named.hexdigest()
            if found != named.hex:
                raise VerificationError(
                    f"{proof.path}: not the {named.algorithm} promised", code="wrong-checksum"
                )
        return digest


class Workbench:
    """Makes contents and files in the work folder of *dest*, from the sources in *stock*."""

    def __init__(self, dest: Destination, stock: Stock) -> None:
        self._dest = dest
        self._stock = stock
        self._spools: dict[ContentId, BinaryIO] = {}
        self._count = 0

    def close(self) -> None:
        """Drop the spools."""
        for content, file in self._spools.items():
            file.close()
            self._dest.work_remove(_spool_name(content))
        self._spools.clear()

    # -- contents --------------------------------------------------------------------------------

    def contents(self) -> set[ContentId]:
        """The contents that are here, proven or claimed."""
        return self._stock.contents() | set(self._spools)

    def reader(self, prefix: bytes) -> delta.FileReader | None:
        """The content whose id begins with *prefix*, by position; None where it is not here.

        A claim that turns out wrong is forgotten, and the next source is tried.
        """
        while True:
            for content, file in self._spools.items():
                if content.startswith(prefix):
                    return delta.FileReader(file.fileno())
            source = self._stock.content(prefix)
            if source is None:
                return None
            self._spool_source(source)

    def _spool_source(self, source: Source) -> None:
        def produce(write: Write) -> None:
            for piece in source.pieces():
                write(piece)

        try:
            self.spool(produce, source.content)
        except (FormatError, VerificationError):
            self._stock.drop(source.key)
        except LocalError:
            if source.open() is not None:
                raise
            self._stock.drop(source.key)  # it went meanwhile

    def spool(self, produce: Produce, expected: ContentId | None) -> ContentId:
        """Write a content to a spool. Raises VerificationError unless it is *expected*."""
        name = self._temporary()
        digest = hashlib.sha256()
        file = self._dest.work_create(name)
        try:
            with translated(self._dest.path):
                size = 0

                def write(piece: delta.Buffer) -> None:
                    nonlocal size
                    size += len(piece)
                    if size > LIMITS.content:
                        raise FormatError("a content is beyond the limit")
                    digest.update(piece)
                    write_all(file, memoryview(piece))

                produce(write)
            content = ContentId(digest.digest())
            if expected is not None and content != expected:
                raise VerificationError("a content is not what it was said to be", code="content")
            self._dest.work_rename(name, _spool_name(content))
        except BaseException:
            file.close()
            self._dest.work_remove(name)
            raise
        old = self._spools.pop(content, None)
        if old is not None:
            old.close()
        self._spools[content] = file
        return content

    def pieces(self, content: ContentId) -> Iterator[bytes]:
        """A spooled content, piece by piece."""
        descriptor = self._spools[content].fileno()
        offset = 0
        while piece := os.pread(descriptor, _READ, offset):
            offset += len(piece)
            yield piece

    def small(self, content: ContentId, limit: int) -> bytes | None:
        """A whole content of at most *limit* bytes; None where it is not here."""
        if self.reader(content) is None:
            return None
        descriptor = self._spools[content].fileno()
        size = os.fstat(descriptor).st_size
        return os.pread(descriptor, size, 0) if size <= limit else None

    def apply(self, section: bytes) -> Produce:
        """What writes the target of a delta section.

        Raises FormatError for a malformed section, VerificationError when a base is not here.
        """
        info = delta.inspect(section)
        bases: list[delta.FileReader] = []
        for prefix, _ in info.bases:
            base = self.reader(prefix)
            if base is None:
                raise VerificationError("a base of a delta is not here", code="no-base")
            bases.append(base)
        return lambda write: delta.apply(section, bases, write)

    def bases(self, track: str, most: int = 4) -> list[BinaryIO]:
        """Old contents of a kind, spooled."""
        for source in self._stock.of_track(track)[:most]:
            if source.content is not None:
                self.reader(source.content)
        wanted = [s.content for s in self._stock.of_track(track)[:most]]
        return [file for content, file in self._spools.items() if content in wanted]

    def spooled(self) -> set[ContentId]:
        """The contents that lie open in the work folder."""
        return set(self._spools)

    def drop(self, contents: Iterable[ContentId]) -> None:
        """Give back the disk space of spools."""
        for content in contents:
            self._spools.pop(content).close()
            self._dest.work_remove(_spool_name(content))

    # -- files -----------------------------------------------------------------------------------

    def make(
        self, produce: Produce, expected: ContentId | None, wraps: Sequence[Wrap], keep: bool
    ) -> tuple[dict[str, Done], dict[str, Exception]]:
        """Make a content, and files of it: those done, and why others are not, by path.

        *keep*: the content is spooled, for others build on it. Raises FormatError and
        VerificationError when the content is not right; then nothing is done.
        """
        if keep or len(wraps) != 1:
            return self.wrap_all(self.spool(produce, expected), wraps)
        wrap = wraps[0]
        try:
            done = self._through(produce, expected, wrap)
        except WrapError as failed:
            return {}, {wrap.proof.path: failed.error}
        return {wrap.proof.path: done}, {}

    def wrap_all(
        self, content: ContentId, wraps: Sequence[Wrap]
    ) -> tuple[dict[str, Done], dict[str, Exception]]:
        """The files of a content that is spooled; see ``make``."""
        done: dict[str, Done] = {}
        failed: dict[str, Exception] = {}
        for wrap in wraps:
            try:
                done[wrap.proof.path] = self._wrap(wrap, lambda: self.pieces(content))
            except WrapError as error:
                failed[wrap.proof.path] = error.error
        return done, failed

    def _through(self, produce: Produce, expected: ContentId | None, wrap: Wrap) -> Done:
        """A content that is made in another thread runs through the recipe into its file."""
        with _pulled(produce) as (pieces, digest):
            done = self._wrap(wrap, lambda: pieces)
            # The published file is right, whatever its content was said to be.
            if expected is not None and digest.digest() != expected:
                self._dest.work_remove(done.name)
                raise VerificationError("a content is not what it was said to be", code="content")
        return done

    def _wrap(self, wrap: Wrap, content: Callable[[], Iterator[bytes]]) -> Done:
        """Raises WrapError when the recipe does not give the file, else the content's own error."""
        with self.new_file(wrap.proof) as out:
            pieces = _guarded(content())
            try:
                for piece in run(wrap.recipe, pieces, wrap.sides):
                    out.write(piece)
                out.verify()
            except _ContentError as error:
                raise error.error from error
            except (OSError, LocalError):
                raise
            except Exception as error:  # whatever an engine raises: the file is downloaded then
                raise WrapError(error) from error
            return self.finish(out)

    @contextmanager
    def new_file(self, proof: Proof) -> Iterator[_Checked]:
        """A file in the making, removed unless it is finished."""
        name = self._temporary()
        with self._dest.work_create(name) as file, translated(self._dest.path):
            try:
                yield _Checked(file, name, proof)
            finally:
                self._dest.work_remove(name)

    def finish(self, out: _Checked, suffix: str = "") -> Done:
        """Prove the file and keep it; *suffix* tells copies apart. Raises VerificationError."""
        digest = out.verify()
        with translated(self._dest.path):
            os.fsync(out.file.fileno())
        name = DONE + digest.hex() + suffix
        self._dest.work_rename(out.name, name)
        return Done(name, out.size, digest)

    def copy(self, source: Source, proof: Proof) -> Done:
        """The file *source*, if it is what *proof* says. Raises VerificationError, LocalError."""
        file = source.open()
        if file is None:
            raise VerificationError(f"{source.key}: gone", code="gone")
        with file, self.new_file(proof) as out:
            hash_file(file, out.write)
            return self.finish(out)

    def _temporary(self) -> str:
        self._count += 1
        return f"{TEMPORARY}{self._count}"


class WrapError(Exception):
    """A recipe did not give the published file."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _ContentError(Exception):
    """The content failed while a recipe was fed with it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


def _guarded(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """*pieces*, whose own errors are told apart from those of who reads them."""
    while True:
        try:
            piece = next(pieces, None)
        except Exception as error:
            raise _ContentError(error) from error
        if piece is None:
            return
        yield piece


class _Stopped(Exception):
    """Nobody wants the rest."""


@contextmanager
def _pulled(produce: Produce) -> Iterator[tuple[Iterator[bytes], _Hash]]:
    """Run *produce* in a thread: its pieces as an iterator, and their SHA-256."""
    pieces: queue.Queue[bytes | BaseException | None] = queue.Queue(_QUEUED)
    stopped = threading.Event()
    digest = hashlib.sha256()

    def put(item: bytes | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                pieces.put(item, timeout=0.2)
            except queue.Full:
                continue
            return
        raise _Stopped

    def write(piece: delta.Buffer) -> None:
        digest.update(piece)
        put(bytes(piece))

    def work() -> None:
        try:
            produce(write)
            put(None)
        except _Stopped:
            return
        except BaseException as error:  # noqa: BLE001 - raised in the thread that reads
            try:
                put(error)
            except _Stopped:
                return

    def read() -> Iterator[bytes]:
        while True:
            item = pieces.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=work, name="rebuild", daemon=True)
    thread.start()
    try:
        yield read(), digest
    finally:
        stopped.set()
        thread.join()


class _Hash(Protocol):
    def digest(self) -> bytes: ...


def _spool_name(content: ContentId) -> str:
    return SPOOL + content.hex()
