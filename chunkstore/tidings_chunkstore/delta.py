"""A delta section: what leads from contents a client has to one it wants. Its format, and apply.

A section names its bases and its target, and holds copy operations and one frame, zstd or LZMA2,
with every byte that no base has. The frame's *prefix*, the text that the codec takes to stand
before it, is old text: the whole bases, or what lies around the ends of the copies. Both follow
from the operations, so no list of ranges is stored. Several bases are addressed as if they lay one
after another. Byte tables: docs/format.md, "Delta sections".

Applying needs the standard library and zstd only; ``deltamake`` makes sections.
"""

from __future__ import annotations

import hashlib
import lzma
import mmap
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from typing import Protocol, TypeAlias

from .errors import FormatError, VerificationError
from .ids import ContentId
from .limits import KIB, LIMITS, MIB
from .lzmadict import decoder as lzma_decoder
from .wire import Reader
from .zstd import zstd

Buffer: TypeAlias = bytes | bytearray | memoryview | mmap.mmap

MAGIC = b"D\x01"
CHECKSUM = 8  #: bytes of SHA-256 over what follows them
ID_PREFIX = 8  #: bytes that name a base
#: LZMA as an entropy coder for columns of small numbers; the values are part of the format.
COLUMN_FILTERS = (
    {"id": lzma.FILTER_LZMA1, "preset": 9, "dict_size": 64 * KIB, "lc": 0, "lp": 0, "pb": 0},
)
#: Coding bytes below are a zstd window descriptor (RFC 8878, 3.1.1.1.2); from here on they mean
#: LZMA2, and count up its dictionary as the .xz format does (5.3.1 of its specification).
LZMA2 = 0xC0
MIN_PREFIX = 8  #: bytes; zstd takes no shorter one
_PIECE = 1 * MIB
_SMALL = 64 * KIB  # pieces below are joined before they are written
_COLUMN_BYTES = 24 * MIB


class PrefixRule(IntEnum):
    """What the frame's prefix is made of."""

    NONE = 0
    WHOLE = 1  #: all bases, one after another
    CONTEXT = 2  #: the text around the ends of copies that new bytes touch


@dataclass(frozen=True, slots=True)
class Budget:
    """What making may cost: *seconds* of this thread's processor, and *limit* bytes in the end.

    A section of *limit* bytes or more is none. It takes at most about twice the seconds.
    """

    seconds: float = 3.0
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class DeltaInfo:
    """A section's header. Sizes in bytes; *bases* are pairs of id prefix and size."""

    target: ContentId
    target_size: int
    bases: tuple[tuple[bytes, int], ...]
    operations: int
    prefix_rule: PrefixRule
    context: int
    reach: int
    prefix_size: int
    coding: int
    packed: bool
    header_size: int

    @property
    def bases_size(self) -> int:
        """Bytes of all bases together."""
        return sum(size for _, size in self.bases)

    @property
    def window(self) -> int:
        """Bytes of the codec's window."""
        return window_size(self.coding)

    @property
    def memory(self) -> int:
        """About what applying takes, in bytes: the window and two copies of the prefix."""
        return self.window + 2 * self.prefix_size + 4 * MIB


class RandomReader(Protocol):
    """A base, read by position."""

    @property
    def size(self) -> int:
        """Bytes in all."""
        ...

    def read_at(self, offset: int, length: int) -> Buffer:
        """Exactly *length* bytes from *offset* on."""
        ...


class BufferReader:
    """A base in memory, or mapped."""

    __slots__ = ("_view", "size")

    def __init__(self, data: Buffer) -> None:
        self._view = memoryview(data).cast("B")
        self.size = len(self._view)

    def read_at(self, offset: int, length: int) -> Buffer:
        """A view, not copied. Raises VerificationError past the end."""
        piece = self._view[offset : offset + length]
        if len(piece) != length:
            raise VerificationError(f"a base ends at {self.size}, not at {offset + length}")
        return piece


class FileReader:
    """A base in an open file, read by position: the file's own offset is left alone."""

    __slots__ = ("_descriptor", "size")

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def read_at(self, offset: int, length: int) -> Buffer:
        """Raises VerificationError where the file has become shorter."""
        piece = os.pread(self._descriptor, length, offset)
        while len(piece) < length:
            more = os.pread(self._descriptor, length - len(piece), offset + len(piece))
            if not more:
                raise VerificationError(f"a base ends at {offset + len(piece)}, not {self.size}")
            piece += more
        return piece


def reader_of(data: Buffer) -> RandomReader:
    """A base that lies in memory."""
    return BufferReader(data)


def inspect(section: Buffer) -> DeltaInfo:
    """The header of a section, bounds checked; the checksum is not looked at.

    Raises FormatError. The first ``LIMITS.delta_bases * 20 + 100`` bytes of a section are enough.
    """
    return _header(Reader(memoryview(section), "delta"))


def verify(section: Buffer) -> DeltaInfo:
    """The header of a section, and its checksum looked at: that nothing was damaged on its way.

    Raises FormatError.
    """
    info = inspect(section)
    _verify_checksum(memoryview(section).cast("B"))
    return info


def apply(
    section: Buffer, bases: Sequence[RandomReader], write: Callable[[Buffer], object]
) -> None:
    """Rebuild the target from *bases*, in the order the section names them, front to back.

    *write* gets pieces of at most 1 MiB, valid during the call only. What it got is the target only
    when this returns. Memory: ``DeltaInfo.memory``. Raises FormatError for a damaged or malformed
    section, and VerificationError when a base has another size or the result is not the target.
    """
    view = memoryview(section)
    _verify_checksum(view)
    reader = Reader(view, "delta")
    info = _header(reader)
    if len(bases) != len(info.bases):
        raise VerificationError(f"the delta has {len(info.bases)} bases, not {len(bases)}")
    for base, (_, size) in zip(bases, info.bases, strict=True):
        if base.size != size:
            raise VerificationError(f"the delta is for a base of {size} bytes, not {base.size}")
    operations = Operations.unpack(info, reader)
    joined = _Joined(bases)
    fresh = _Frame(info, operations.new_size, _prefix(info, operations, joined), reader)
    output = _Output(write)
    for new, source, length in operations:
        fresh.copy_to(output, new)
        joined.copy_to(output, source, length)
    fresh.copy_to(output, operations.tail)
    fresh.close()
    output.close()
    if output.digest() != info.target:
        raise VerificationError("the delta's result is not its target", target=info.target.hex())


class Operations:
    """Copy operations: rows of *new* (bytes from the frame first), *source* and *length*.

    A source is a position in the joined bases. After the last row come ``tail`` more new bytes.
    """

    __slots__ = ("_columns", "_starts", "count", "new_size", "tail", "target_size")

    def __init__(self, columns: bytes, count: int, sizes: Sequence[int], target_size: int) -> None:
        """Columns as on the wire. Raises FormatError unless every row is within its bounds."""
        self._columns = memoryview(columns)
        self._starts = list(accumulate(sizes, initial=0))
        self.count = count
        self.target_size = target_size
        self.new_size = self.tail = 0
        left = target_size
        for new, source, length in self:
            base = bisect_right(self._starts, source) - 1
            if not 0 <= base < len(sizes) or source + length > self._starts[base + 1]:
                raise FormatError(f"delta: a copy of {length} bytes at {source} leaves its base")
            left -= new + length
            if length < 1 or left < 0:
                raise FormatError("delta: the operations do not fit the target")
            self.new_size += new
        self.tail = left
        self.new_size += left

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """The rows as (new, source, length)."""
        news = Reader(self._columns, "delta operations")
        lengths = Reader(self._columns, "delta operations")
        sources = Reader(self._columns, "delta operations")
        for _ in range(self.count):
            lengths.uvarint()
        sources.take(lengths.position)
        for _ in range(self.count):
            sources.uvarint()
        lengths, sources = (
            Reader(self._columns[lengths.position : sources.position], "delta operations"),
            Reader(self._columns[sources.position :], "delta operations"),
        )
        expected = 0
        for _ in range(self.count):
            length, jump = lengths.uvarint(), sources.uvarint()
            source = expected + (-(jump + 1 >> 1) if jump & 1 else jump >> 1)
            yield news.uvarint(), source, length
            expected = source + length
        sources.done()

    @classmethod
    def unpack(cls, info: DeltaInfo, reader: Reader) -> Operations:
        """Reads the operations where *reader* stands. Raises FormatError."""
        columns: bytes = bytes(reader.take(reader.uvarint(_COLUMN_BYTES)))
        if info.packed:
            columns = _unpack_columns(columns)
        if 3 * info.operations > len(columns):
            raise FormatError(f"delta: {len(columns)} bytes are no {info.operations} operations")
        return cls(columns, info.operations, [size for _, size in info.bases], info.target_size)


def context_ranges(
    rows: Iterable[tuple[int, int, int]], tail: int, total: int, context: int, reach: int
) -> list[tuple[int, int]]:
    """The pieces of the joined bases (*total* bytes) that make a CONTEXT prefix, as (start, end).

    Around each run of n new bytes: from r bytes before the end of the copy in
    front to as many after it, and the same about the start of the copy behind; merged, in order
    of position; r is n, but at most *reach* and at least *context*. A copy in front of all ends
    at 0, one behind all starts at *total*.
    """
    ranges: list[tuple[int, int]] = []
    before = 0

    def add(new: int, behind: int) -> None:
        radius = max(context, min(new, reach))
        ranges.extend(
            (max(0, middle - radius), min(total, middle + radius)) for middle in (before, behind)
        )

    for new, source, length in rows:
        if new:
            add(new, source)
        before = source + length
    if tail:
        add(tail, total)
    ranges.sort()
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        elif start < end:
            merged.append((start, end))
    return merged


def checksum(rest: memoryview) -> bytes:
    """What stands behind the magic: the start of the SHA-256 of all bytes after it."""
    return hashlib.sha256(rest).digest()[:CHECKSUM]


def frame_header(window_descriptor: int) -> bytes:
    """What a section leaves out (RFC 8878, 3.1.1): the magic, and a descriptor that promises
    neither size nor checksum nor dictionary id.
    """
    return b"\x28\xb5\x2f\xfd\x00" + bytes([window_descriptor])


def window_size(coding: int) -> int:
    """Bytes of the window that a coding byte stands for, whichever codec."""
    if coding >= LZMA2:
        return (2 | coding & 1) << (11 + (coding - LZMA2 >> 1))
    base = 1 << (10 + (coding >> 3))
    return base + (base >> 3) * (coding & 7)


def _verify_checksum(view: memoryview) -> None:
    start = Reader(view, "delta")
    _expect_version(start)
    if bytes(start.take(CHECKSUM)) != checksum(view[start.position :]):
        raise FormatError("delta: damaged (its checksum differs)")


def _expect_version(reader: Reader) -> None:
    reader.expect(MAGIC[:1])
    version = reader.fixed(1)
    if version != MAGIC[1]:
        raise FormatError(f"delta: version {version} is unknown", code="format-version")


def _header(reader: Reader) -> DeltaInfo:
    _expect_version(reader)
    reader.take(CHECKSUM)
    kind = reader.fixed(1)
    rule, packed, count = kind & 3, bool(kind & 4), kind >> 3
    if rule not in list(PrefixRule):
        raise FormatError(f"delta: prefix rule {rule} is unknown")
    if count > LIMITS.delta_bases:
        raise FormatError(f"delta: {count} bases are above the limit of {LIMITS.delta_bases}")
    bases = tuple(
        (bytes(reader.take(ID_PREFIX)), reader.uvarint(LIMITS.content)) for _ in range(count)
    )
    target = ContentId(bytes(reader.take(ContentId.SIZE)))
    target_size = reader.uvarint(LIMITS.content)
    context = reach = prefix_size = 0
    if rule == PrefixRule.WHOLE:
        prefix_size = sum(size for _, size in bases)
    elif rule == PrefixRule.CONTEXT:
        context, reach = (1 << min(reader.fixed(1), 32) for _ in range(2))
        prefix_size = reader.uvarint(LIMITS.delta_prefix)
    if prefix_size > LIMITS.delta_prefix or 0 < prefix_size < MIN_PREFIX:
        raise FormatError(f"delta: a prefix of {prefix_size} bytes is beyond the limits")
    coding = reader.fixed(1)
    if window_size(coding) > 1 << LIMITS.delta_window_log:
        raise FormatError(f"delta: a window of {window_size(coding)} bytes is above the limit")
    operations = reader.uvarint(LIMITS.delta_ops)
    return DeltaInfo(
        target=target,
        target_size=target_size,
        bases=bases,
        operations=operations,
        prefix_rule=PrefixRule(rule),
        context=context,
        reach=reach,
        prefix_size=prefix_size,
        coding=coding,
        packed=packed,
        header_size=reader.position,
    )


def _unpack_columns(packed: bytes) -> bytes:
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=COLUMN_FILTERS)
    try:
        columns = decoder.decompress(packed, max_length=_COLUMN_BYTES)
    except lzma.LZMAError as error:
        raise FormatError(f"delta: its operations cannot be unpacked: {error}") from error
    if not decoder.eof or decoder.unused_data:
        raise FormatError("delta: its operations have no end")
    return columns


def _prefix(info: DeltaInfo, operations: Operations, joined: _Joined) -> bytes:
    """The frame's prefix, read from the bases."""
    if not info.prefix_size:
        return b""
    if info.prefix_rule == PrefixRule.WHOLE:
        ranges = [(0, joined.size)]
    else:
        ranges = context_ranges(operations, operations.tail, joined.size, info.context, info.reach)
    prefix = bytearray()
    for start, end in ranges:
        for piece in joined.pieces(start, min(end - start, info.prefix_size - len(prefix))):
            prefix += piece
    if len(prefix) != info.prefix_size:
        raise FormatError(f"delta: the prefix has {len(prefix)} bytes, not {info.prefix_size}")
    return bytes(prefix)


class _Joined:
    """The bases as one, read by position."""

    __slots__ = ("_bases", "_starts", "size")

    def __init__(self, bases: Sequence[RandomReader]) -> None:
        self._bases = bases
        self._starts = list(accumulate((base.size for base in bases), initial=0))
        self.size = self._starts[-1]

    def pieces(self, start: int, length: int) -> Iterator[Buffer]:
        """*length* bytes from *start* on, in pieces of at most 1 MiB."""
        while length > 0:
            number = bisect_right(self._starts, start) - 1
            base, at = self._bases[number], start - self._starts[number]
            piece = base.read_at(at, min(length, _PIECE, base.size - at))
            yield piece
            start += len(piece)
            length -= len(piece)

    def copy_to(self, output: _Output, start: int, length: int) -> None:
        for piece in self.pieces(start, length):
            output.write(piece)


class _Frame:
    """The new bytes, decompressed as they are asked for; *size* in all."""

    __slots__ = ("_at", "_buffer", "_decoder", "_left", "_rest", "_started")

    def __init__(self, info: DeltaInfo, size: int, prefix: bytes, reader: Reader) -> None:
        self._left = size  # to be decompressed
        self._buffer = memoryview(b"")
        self._rest = reader.take(reader.left)
        self._at = 0
        self._started = size > 0
        self._decoder: zstd.ZstdDecompressor | lzma.LZMADecompressor
        if info.coding >= LZMA2:
            self._decoder = lzma_decoder(prefix, info.window)
            return
        self._decoder = zstd.ZstdDecompressor(
            zstd_dict=zstd.ZstdDict(prefix, is_raw=True).as_prefix if prefix else None,
            options={zstd.DecompressionParameter.window_log_max: LIMITS.delta_window_log},
        )
        if size:
            self._decode(frame_header(info.coding), 1)

    def copy_to(self, output: _Output, length: int) -> None:
        """The next *length* bytes. Raises FormatError where the frame has fewer."""
        while length:
            if not self._buffer:
                self._buffer = memoryview(self._next(min(_PIECE, self._left)))
                self._left -= len(self._buffer)
            piece = self._buffer[:length]
            output.write(piece)
            self._buffer = self._buffer[len(piece) :]
            length -= len(piece)

    def close(self) -> None:
        """Raises FormatError unless the frame ends where the operations do."""
        if self._started and not self._decoder.eof and self._next(1):
            raise FormatError("delta: the frame holds more than the operations take")
        if self._at < len(self._rest) or (self._started and self._decoder.unused_data):
            raise FormatError("delta: bytes behind the frame")

    def _next(self, most: int) -> bytes:
        """1 to *most* bytes; none at the end of a whole frame, if that is where the size ends."""
        decoder = self._decoder
        piece = b""
        while not piece and not decoder.eof:
            data: bytes | memoryview = b""
            if decoder.needs_input:
                data = self._rest[self._at : self._at + _PIECE]
                self._at += len(data)
                if not data:
                    raise FormatError("delta: the frame is truncated")
            piece = self._decode(data, most)
        if not piece and self._left:
            raise FormatError("delta: the frame holds less than the operations take")
        return piece

    def _decode(self, data: bytes | memoryview, most: int) -> bytes:
        try:
            return self._decoder.decompress(data, max_length=most)
        except (zstd.ZstdError, lzma.LZMAError) as error:
            raise FormatError(f"delta: the frame is damaged: {error}") from error


class _Output:
    """Hashes what goes by, and joins small pieces on their way to *write*."""

    __slots__ = ("_hash", "_pending", "_write")

    def __init__(self, write: Callable[[Buffer], object]) -> None:
        self._write = write
        self._hash = hashlib.sha256()
        self._pending = bytearray()

    def write(self, piece: Buffer) -> None:
        if len(piece) < _SMALL:
            self._pending += piece
            if len(self._pending) >= _SMALL:
                self.close()
            return
        self.close()
        self._hash.update(piece)
        self._write(piece)

    def close(self) -> None:
        """Give out what is pending."""
        if self._pending:
            pending, self._pending = self._pending, bytearray()
            self._hash.update(pending)
            self._write(pending)

    def digest(self) -> bytes:
        return self._hash.digest()
