"""A repository's retained contents as casync sees them: indexes, and the chunks they name.

Nothing of it is stored beside the packs. An index follows from its content and the chunk sizes,
so a process that was never asked for it gives the same bytes; a folder of indexes made before
saves the work. A chunk is read out of a content at the place its index names.

The requests, below ``/<repository>/tidings/casync/``::

    [@<snapshot>/][<n>k[-desync]/]<file>.caibx
    [@<snapshot>/][<n>k[-desync]/][<folders>/]{store,default}.castr/<4 hex>/<64 hex>.cacnk

Sizes lie in the path because desync drops a query from an index's address, and casync one from a
store's; ``default.castr`` beside the index is where casync looks when it is told no store.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tidings_chunkstore.errors import (
    FormatError,
    InputError,
    LocalError,
    StoreError,
    UnsettledError,
)
from tidings_chunkstore.ids import Digest
from tidings_chunkstore.limits import GIB, KIB, LIMITS, MIB

from .casync import CasyncId, CasyncIndex, encode_chunk
from .casync_chunker import ChunkSizes, Rule

#: Average sizes on offer, in KiB. Few, because each content's index is kept for each.
AVERAGES = (4, 8, 16, 32, 64, 128, 256)

_CHUNK = re.compile(r"(?:[^\0]+/)?(?:store|default)\.castr/([0-9a-f]{4}/[0-9a-f]{64}\.cacnk)")
_INDEX = re.compile(r"([^\0]+)\.caibx")
_SNAPSHOT = re.compile(r"@([^/\0]{1,100})/(.*)", re.DOTALL)
_SIZE = re.compile(r"(\d{1,9})k(-desync)?/(.*)", re.DOTALL | re.ASCII)

#: Opens a retained blob by its SHA-256 (a content, or a file as published) for reading and
#: seeking. Raises InputError when it is not retained (any more).
Contents = Callable[[Digest], BinaryIO]


@dataclass(frozen=True, slots=True)
class IndexRequest:
    """The index of a *file*, by its path in the repository, opened or as published."""

    snapshot: str | None  #: None is the current one
    sizes: ChunkSizes
    file: str


@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """One chunk; *sizes* and *snapshot* say where to look first, or what to index."""

    snapshot: str | None
    sizes: ChunkSizes
    id: CasyncId


def parse_request(path: str) -> IndexRequest | ChunkRequest:
    """What is asked for by *path*, decoded, from below ``tidings/casync/``.

    Raises InputError, with the code ``casync-sizes`` for an average that is not on offer and
    ``casync-path`` for anything else.
    """
    snapshot, rest = None, path
    if len(path) > LIMITS.path + 200:
        raise InputError("casync: the path is too long", code="casync-path")
    if rest.startswith("@"):
        match = _SNAPSHOT.fullmatch(rest)
        if match is None:
            raise InputError("casync: not a snapshot", code="casync-path")
        snapshot, rest = match.groups()
    sizes = ChunkSizes.of()
    if match := _SIZE.fullmatch(rest):
        average, rule, rest = int(match[1]), match[2], match[3]
        if average not in AVERAGES:
            message = f"casync: the average is one of {AVERAGES} KiB, not {average}"
            raise InputError(message, code="casync-sizes")
        sizes = ChunkSizes.of(average * KIB, Rule.DESYNC if rule else Rule.CASYNC)
    if match := _CHUNK.fullmatch(rest):
        try:
            return ChunkRequest(snapshot, sizes, CasyncId.from_name(match[1]))
        except FormatError as error:
            raise InputError(str(error), code="casync-path") from error
    if match := _INDEX.fullmatch(rest):
        return IndexRequest(snapshot, sizes, match[1])
    raise InputError(f"casync: neither an index nor a chunk: {path[:100]!r}", code="casync-path")


class CasyncView:
    """Indexes and chunks of the blobs that *contents* opens.

    *folder* keeps indexes as ``<sha256>-<avg>-<rule>.caibx``: any number of processes may share
    it, for each file is renamed into place whole. *memory* bounds the indexes held, in bytes;
    *effort* the bytes of content that one call for a chunk may index before it asks to be called
    again. Safe to call from many threads: one content at a time is being cut.
    """

    def __init__(
        self,
        contents: Contents,
        folder: Path,
        *,
        memory: int = 64 * MIB,
        effort: int = 1 * GIB,
    ) -> None:
        self._contents = contents
        self._folder = folder
        self._memory = memory
        self._effort = effort
        self._held: OrderedDict[str, CasyncIndex] = OrderedDict()
        self._held_bytes = 0
        self._holding = threading.Lock()
        self._making = threading.Lock()

    def index(self, blob: Digest, sizes: ChunkSizes) -> CasyncIndex:
        """The index of *blob*. Raises what the provider raises, LocalError, EngineError."""
        name = index_name(blob, sizes)
        found = self._known(name)
        if found is not None:
            return found
        with self._making:
            found = self._known(name)  # by the thread that held the lock before
            if found is not None:
                return found
            with self._contents(blob) as stream:
                made = CasyncIndex.make(stream, sizes)
            self._keep(name, made)
        self._hold(name, made)
        return made

    def chunk(self, wanted: CasyncId, blobs: Sequence[Digest], sizes: ChunkSizes) -> bytes | None:
        """The chunk's file (a zstd frame), or None when none of *blobs* has that chunk.

        Looks into indexes at *sizes*: first those in memory, then those on disk, then, one after
        the other, it makes what is missing, so give the likeliest of *blobs* first. An id that
        another process gave out is found too.

        Raises UnsettledError when there is more to index than one call may (the work done is
        kept), StoreError when a content's bytes are not those its index was made of.
        """
        names = {index_name(blob, sizes): blob for blob in blobs}
        with self._holding:
            recent = {name: place for place, name in enumerate(reversed(self._held))}
        missing = []
        for name in sorted(names, key=lambda name: recent.get(name, len(recent))):
            index = self._known(name)
            if index is None:
                missing.append(name)
                continue
            found = self._cut_out(wanted, names[name], index)
            if found is not None:
                return found
        return self._search_new(wanted, [names[name] for name in missing], sizes)

    def prune(self, retained: Iterable[Digest]) -> int:
        """Remove the kept indexes of all other blobs; how many went. Raises LocalError."""
        stay = {blob.hex() for blob in retained}
        gone = 0
        try:
            for path in self._folder.glob("*.caibx"):
                if path.name.partition("-")[0] not in stay:
                    path.unlink(missing_ok=True)
                    gone += 1
        except OSError as error:
            raise LocalError(f"casync cache {self._folder}: {error.strerror}") from error
        with self._holding:
            for name in [name for name in self._held if name.partition("-")[0] not in stay]:
                self._held_bytes -= self._held.pop(name).memory
        return gone

    def _search_new(
        self, wanted: CasyncId, blobs: Sequence[Digest], sizes: ChunkSizes
    ) -> bytes | None:
        done = 0
        for blob in blobs:
            if done >= self._effort:
                message = "casync: more contents to index than one request may"
                raise UnsettledError(message, code="casync-busy")
            try:
                index = self.index(blob, sizes)
            except InputError:
                continue  # not retained any more: its chunks are not ours to give
            done += index.size
            found = self._cut_out(wanted, blob, index)
            if found is not None:
                return found
        return None

    def _cut_out(self, wanted: CasyncId, blob: Digest, index: CasyncIndex) -> bytes | None:
        place = index.find(wanted)
        if place is None:
            return None
        offset, length = place
        try:
            stream = self._contents(blob)
        except InputError:
            return None  # not retained any more; another content may have the same chunk
        with stream:
            stream.seek(offset)
            data = stream.read(length)
        if CasyncId.of(data) != wanted:
            self._forget(index_name(blob, index.sizes))  # which of the two is wrong, it cannot tell
            message = f"content {blob.hex()}: {length} bytes from {offset} are not its chunk's"
            raise StoreError(message, code="casync-chunk", offset=offset, length=length)
        return encode_chunk(data)

    def _known(self, name: str) -> CasyncIndex | None:
        """An index from memory, or from the folder."""
        with self._holding:
            index = self._held.get(name)
            if index is not None:
                self._held.move_to_end(name)
                return index
        try:
            data = (self._folder / name).read_bytes()
        except OSError:
            return None  # absent, or as good as: it can be made again
        try:
            index = CasyncIndex.from_caibx(data)
        except FormatError:
            return None  # damaged: made again, it replaces the file
        if _suffix(index.sizes) != name.partition("-")[2]:
            return None
        self._hold(name, index)
        return index

    def _hold(self, name: str, index: CasyncIndex) -> None:
        with self._holding:
            if name in self._held:
                return
            self._held[name] = index
            self._held_bytes += index.memory
            while self._held_bytes > self._memory and len(self._held) > 1:
                self._held_bytes -= self._held.popitem(last=False)[1].memory

    def _keep(self, name: str, index: CasyncIndex) -> None:
        """Write an index into the folder, whole or not at all. Raises LocalError."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=self._folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(index.to_caibx())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self._folder / name)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            raise LocalError(f"casync cache {self._folder}: {error.strerror}") from error

    def _forget(self, name: str) -> None:
        with self._holding:
            index = self._held.pop(name, None)
            self._held_bytes -= index.memory if index is not None else 0
        with suppress(OSError):  # at worst the next request finds the same mismatch
            (self._folder / name).unlink(missing_ok=True)


def _suffix(sizes: ChunkSizes) -> str:
    return f"{sizes.avg}-{sizes.rule}.caibx"


def index_name(blob: Digest, sizes: ChunkSizes) -> str:
    """The file that keeps an index."""
    return f"{blob.hex()}-{_suffix(sizes)}"


def blob_name(blob: Digest) -> str:
    """The file that keeps an opened blob beside its indexes."""
    return f"{blob.hex()}.blob"
