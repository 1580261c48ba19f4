"""casync's index of a blob (``.caibx``) and the chunks of its store (``.castr``).

The formats, from casync 2 (``src/caformat.h``, ``src/castore.c``) and desync 1.0 (``format.go``);
all integers are 64 bits, little-endian:

====== ================================================================================
bytes  index
====== ================================================================================
48     header: 48, type 0x96824d9c7b129ff9, feature flags, min, avg and max chunk size
16     table: 2**64 - 1, type 0xe75b9e112f17417d
40 n   for each chunk: its end offset in the blob, its id
40     tail: 0, 0, 48, size of table, items and tail in bytes, 0x4b4f050e5549ecd1
====== ================================================================================

A chunk's id is the SHA-512/256 of its bytes. In a store it lies in ``<4 hex>/<64 hex>.cacnk``,
the first four digits of the id and the whole of it, as one bare zstd frame.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tidings_chunkstore.errors import EngineError, FormatError
from tidings_chunkstore.ids import Digest
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.wire import Reader
from tidings_chunkstore.zstd import zstd

from .casync_chunker import READ, ChunkSizes, Rule, Source, chunks

#: Flags of a blob's index with SHA-512/256 ids: what each program's ``make`` writes. Apart from
#: the digest (0x2...) they speak of directory trees, and neither program minds the other's.
_FLAGS = {Rule.CASYNC: 0xB000000000000000, Rule.DESYNC: 0xA000000000000000}
_INDEX, _TABLE, _TAIL = 0x96824D9C7B129FF9, 0xE75B9E112F17417D, 0x4B4F050E5549ECD1
_ENDLESS = (1 << 64) - 1
_ITEM = np.dtype([("end", "<u8"), ("id", "V32")])
_EDGES = 48 + 16 + 40  # bytes of an index without chunks

#: The level casync's store and desync's use by default; a chunk takes about a millisecond.
_LEVEL = 3

_CHUNK_NAME = re.compile(r"([0-9a-f]{4})/(\1[0-9a-f]{60})\.cacnk", re.ASCII)


class CasyncId(Digest):
    """SHA-512/256 of a chunk's bytes, as casync and desync name it."""

    __slots__ = ()

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> CasyncId:
        """Hash *data*. Raises EngineError when this Python's OpenSSL has no SHA-512/256."""
        return cls(_digest()(data))

    @property
    def name(self) -> str:
        """Where the chunk lies in a store."""
        text = self.hex()
        return f"{text[:4]}/{text}.cacnk"

    @classmethod
    def from_name(cls, name: str) -> CasyncId:
        """The opposite of ``name``. Raises FormatError."""
        match = _CHUNK_NAME.fullmatch(name)
        if match is None:
            raise FormatError(f"not the name of a casync chunk: {name[:100]!r}")
        return cls.from_hex(match[2])


def _digest() -> Callable[[bytes | bytearray | memoryview], bytes]:
    """SHA-512/256. In Python itself it would take a minute for each 10 MB, so none is there."""
    try:
        hashlib.new("sha512_256", usedforsecurity=False)
    except ValueError as error:
        message = "this Python's hashlib has no SHA-512/256"
        raise EngineError(message, engine="sha512_256") from error
    return lambda data: hashlib.new("sha512_256", data, usedforsecurity=False).digest()


def encode_chunk(data: bytes) -> bytes:
    """The bytes of a store's chunk file."""
    return zstd.compress(data, _LEVEL)


@dataclass(frozen=True, slots=True, eq=False)
class CasyncIndex:
    """The chunks of one blob, in order: end offsets in bytes, and ids, 32 bytes each.

    Raises FormatError when the two do not fit together, or not the sizes.
    """

    sizes: ChunkSizes
    ends: NDArray[np.uint64]
    ids: bytes
    #: first 8 bytes of the ids, sorted, and the chunks they belong to
    _keys: NDArray[np.uint64] = field(init=False, repr=False)
    _order: NDArray[np.intp] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.ends) * CasyncId.SIZE:
            raise FormatError("casync index: ids and offsets differ in number")
        before = np.concatenate((np.zeros(1, np.uint64), self.ends))[:-1]
        # Unsigned: an offset below the one before it makes a huge length.
        lengths = self.ends - before
        if np.any(lengths == 0) or np.any(lengths > np.uint64(self.sizes.max)):
            raise FormatError("casync index: a chunk's length is out of range")
        keys = np.frombuffer(self.ids, ">u8")[:: CasyncId.SIZE // 8].astype(np.uint64)
        order = np.argsort(keys, kind="stable")
        object.__setattr__(self, "_keys", keys[order])
        object.__setattr__(self, "_order", order)

    @classmethod
    def make(cls, stream: Source, sizes: ChunkSizes, read: int = READ) -> CasyncIndex:
        """Cut and hash *stream*, from its position to its end, as the real programs do.

        Raises EngineError without SHA-512/256.
        """
        digest = _digest()
        lengths, ids = [], bytearray()
        for chunk in chunks(stream, sizes, read):
            lengths.append(len(chunk))
            ids += digest(chunk)
        return cls(sizes, np.cumsum(np.array(lengths, np.uint64), dtype=np.uint64), bytes(ids))

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def size(self) -> int:
        """Bytes of the blob."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def memory(self) -> int:
        """Bytes this index takes in memory, about."""
        return len(self.ids) + 3 * self.ends.nbytes + 1024

    def chunk(self, number: int) -> tuple[CasyncId, int, int]:
        """Id, offset and length of a chunk, counted from 0."""
        start = int(self.ends[number - 1]) if number else 0
        place = number * CasyncId.SIZE
        identity = CasyncId(self.ids[place : place + CasyncId.SIZE])
        return identity, start, int(self.ends[number]) - start

    def find(self, wanted: CasyncId) -> tuple[int, int] | None:
        """Offset and length of a chunk with this id; the first one where there are several."""
        key = np.uint64(int.from_bytes(wanted[:8], "big"))
        for at in range(int(np.searchsorted(self._keys, key)), len(self._keys)):
            if self._keys[at] != key:
                break
            identity, offset, length = self.chunk(int(self._order[at]))
            if identity == wanted:
                return offset, length
        return None

    def to_caibx(self) -> bytes:
        """The index as a file, byte for byte as ``casync make`` or ``desync make`` writes it."""
        sizes = self.sizes
        items = np.empty(len(self), _ITEM)
        items["end"] = self.ends
        items["id"] = np.frombuffer(self.ids, "V32")
        header = struct.pack("<6Q", 48, _INDEX, _FLAGS[sizes.rule], sizes.min, sizes.avg, sizes.max)
        tail = struct.pack("<5Q", 0, 0, 48, 16 + items.nbytes + 40, _TAIL)
        return header + struct.pack("<2Q", _ENDLESS, _TABLE) + items.tobytes() + tail

    @classmethod
    def from_caibx(cls, data: bytes) -> CasyncIndex:
        """Read what ``to_caibx`` or either program's ``make`` wrote. Raises FormatError."""
        count, odd = divmod(len(data) - _EDGES, _ITEM.itemsize)
        if count < 0 or odd or count > LIMITS.chunks:
            raise FormatError(f"casync index: {len(data)} bytes are no whole number of chunks")
        reader = Reader(data, "casync index")
        header = struct.unpack("<6Q", reader.take(48))
        rules = {flags: rule for rule, flags in _FLAGS.items()}
        if header[:2] != (48, _INDEX) or header[2] not in rules:
            raise FormatError("casync index: not the header of a blob's index with SHA-512/256")
        sizes = ChunkSizes(header[3], header[4], header[5], rules[header[2]])
        if struct.unpack("<2Q", reader.take(16)) != (_ENDLESS, _TABLE):
            raise FormatError("casync index: no table")
        items = np.frombuffer(reader.take(count * _ITEM.itemsize), _ITEM)
        size = 16 + items.nbytes + 40
        if struct.unpack("<5Q", reader.take(40)) != (0, 0, 48, size, _TAIL):
            raise FormatError("casync index: no tail")
        return cls(sizes, items["end"].astype(np.uint64), items["id"].tobytes())
