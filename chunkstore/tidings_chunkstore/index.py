"""The ordered chunk list of one content, as small as a client can use it.

An entry is a short id and the length of the chunk's frame. A chunk's own length is left out: who
matches the id knows it from the chunk at hand, who fetches the frame learns it from there, and the
content's SHA-256 proves the whole. Frames lie in *runs*: one after the other in one pack.
The byte table is in docs/format.md, section "Index".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .chunker import ALGORITHM, ChunkerParams
from .errors import FormatError
from .ids import ContentId
from .limits import LIMITS
from .places import SELF, PackName, Span
from .wire import Reader, put_uvarint, uvarints
from .zstd import zstd

MAGIC = b"TDX1"
_CHECKSUM = 8
_CHUNKERS = ("", ALGORITHM)  # number on the wire -> name; 0 is never written
_LENGTH_BYTES = 4
_PACKED_IDS = 0x80  # flag beside the id size
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Frame:
    """Where one chunk's frame lies, and the dictionary that opens it (None: none)."""

    span: Span
    dictionary: Span | None


@dataclass(frozen=True, slots=True)
class Index:
    """The chunk list of *content*. ``ids[i*id_size:(i+1)*id_size]`` names chunk i."""

    content: ContentId
    size: int
    params: ChunkerParams
    id_size: int
    ids: bytes
    frames: tuple[Frame, ...]

    def __len__(self) -> int:
        return len(self.frames)

    def short_ids(self) -> Iterator[bytes]:
        """The short ids in order."""
        k = self.id_size
        return (self.ids[i : i + k] for i in range(0, len(self.ids), k))


def id_size_for(chunks: int) -> int:
    """Bytes of a short id: a client with as many chunks meets a false match once in 2**14 updates.

    Birthday bound over pairs: chunks**2 / 2**(8 * size) <= 2**-14.
    """
    bits = 2 * max(chunks, 1).bit_length() + 14
    return min(8, max(5, -(-bits // 8)))


def _planes(lengths: Sequence[int]) -> bytes:
    """The lengths as byte planes, low bytes first: the high planes compress to almost nothing."""
    width = max(1, (max(lengths, default=0).bit_length() + 7) // 8)
    packed = b"".join(length.to_bytes(_LENGTH_BYTES, "little") for length in lengths)
    return bytes([width]) + b"".join(packed[p::_LENGTH_BYTES] for p in range(width))


def _from_planes(data: bytes, count: int, what: str) -> list[int]:
    width = data[0] if data else 0
    if not 1 <= width <= _LENGTH_BYTES or len(data) != 1 + width * count:
        raise FormatError(f"{what}: the lengths do not fit the number of chunks")
    packed = bytearray(_LENGTH_BYTES * count)
    for p in range(width):
        packed[p::_LENGTH_BYTES] = data[1 + p * count : 1 + (p + 1) * count]
    return [
        int.from_bytes(packed[i : i + _LENGTH_BYTES], "little")
        for i in range(0, len(packed), _LENGTH_BYTES)
    ]


def encode(index: Index) -> bytes:
    """The bytes of *index*."""
    packs: dict[PackName, int] = {}
    dictionaries: dict[Span, int] = {}
    for frame in index.frames:
        packs.setdefault(frame.span.pack, len(packs))
        if frame.dictionary is not None:
            packs.setdefault(frame.dictionary.pack, len(packs))
            dictionaries.setdefault(frame.dictionary, len(dictionaries) + 1)

    table = bytearray()
    put_uvarint(table, len(packs))
    for pack in packs:
        put_uvarint(table, pack.serial)
        table += pack.id
    put_uvarint(table, len(dictionaries))
    for span in dictionaries:
        table += uvarints((packs[span.pack], span.offset, span.length))

    runs: list[list[int]] = []  # pack, dictionary, offset, count
    end = -1
    for frame in index.frames:
        number = packs[frame.span.pack]
        dictionary = dictionaries[frame.dictionary] if frame.dictionary else 0
        if (
            runs
            and runs[-1][0] == number
            and runs[-1][1] == dictionary
            and frame.span.offset == end
        ):
            runs[-1][3] += 1
        else:
            runs.append([number, dictionary, frame.span.offset, 1])
        end = frame.span.end
    put_uvarint(table, len(runs))
    for column in range(4):
        for run in runs:
            put_uvarint(table, run[column])
    table += _planes([frame.span.length for frame in index.frames])

    body = bytearray(index.content)
    put_uvarint(body, index.size)
    put_uvarint(body, _CHUNKERS.index(index.params.name))
    params = index.params
    body += uvarints((params.min, params.avg, params.max, len(index.frames)))
    # A content that repeats itself repeats its ids; others' ids do not compress.
    ids = zstd.compress(index.ids, 19)
    body.append(index.id_size | (_PACKED_IDS if len(ids) < len(index.ids) else 0))
    if len(ids) < len(index.ids):
        put_uvarint(body, len(ids))
        body += ids
    else:
        body += index.ids
    packed = zstd.compress(bytes(table), 19)
    put_uvarint(body, len(table))
    body += packed
    return MAGIC + hashlib.sha256(body).digest()[:_CHECKSUM] + bytes(body)


def decode(data: bytes | memoryview, own: PackName) -> Index:
    """Read an index that lies in the pack *own*.

    Raises FormatError for anything that is not one, or exceeds the limits.
    """
    what = "index"
    if len(data) > LIMITS.index:
        raise FormatError(f"{what}: larger than {LIMITS.index} bytes")
    reader = Reader(data, what)
    reader.expect(MAGIC)
    checksum = bytes(reader.take(_CHECKSUM))
    if hashlib.sha256(memoryview(data)[reader.position :]).digest()[:_CHECKSUM] != checksum:
        raise FormatError(f"{what}: damaged (checksum)")
    content = ContentId(bytes(reader.take(ContentId.SIZE)))
    size = reader.uvarint(LIMITS.content)
    chunker = reader.uvarint(len(_CHUNKERS) - 1)
    if chunker == 0:
        raise FormatError(f"{what}: unknown chunker 0")
    params = ChunkerParams(_CHUNKERS[chunker], reader.uvarint(), reader.uvarint(), reader.uvarint())
    count = reader.uvarint(min(LIMITS.chunks, max(1, size)))
    flags = reader.fixed(1)
    id_size = flags & ~_PACKED_IDS
    if not 5 <= id_size <= 8:
        raise FormatError(f"{what}: ids of {id_size} bytes")
    if flags & _PACKED_IDS:
        ids = _open(reader.take(reader.uvarint(reader.left)), count * id_size, what)
    else:
        ids = bytes(reader.take(count * id_size))
    table_size = reader.uvarint(LIMITS.index)
    table = Reader(_open(reader.take(reader.left), table_size, what), what)

    packs = []
    for _ in range(table.uvarint(table.left // 9)):
        serial = table.uvarint((1 << 32) - 1)
        digest = bytes(table.take(8))
        packs.append(own if digest == SELF else PackName(serial, digest))
    dictionaries: list[Span | None] = [None]
    for _ in range(table.uvarint(table.left // 3)):
        pack = _item(packs, table.uvarint(), what)
        offset = table.uvarint(LIMITS.pack)
        dictionaries.append(Span(pack, offset, table.uvarint(LIMITS.dictionary)))
    runs = table.uvarint(min(count, table.left // 4))
    columns = [[table.uvarint() for _ in range(runs)] for _ in range(4)]
    lengths = _from_planes(bytes(table.take(table.left)), count, what)
    if sum(columns[3]) != count or 0 in columns[3]:
        raise FormatError(f"{what}: the runs do not fit the number of chunks")
    frames: list[Frame] = []
    for pack_number, dictionary_number, offset, run in zip(*columns, strict=True):
        pack = _item(packs, pack_number, what)
        dictionary = _item(dictionaries, dictionary_number, what)
        for length in lengths[len(frames) : len(frames) + run]:
            frames.append(Frame(Span(pack, offset, length), dictionary))
            offset += length
        if offset > LIMITS.pack:
            raise FormatError(f"{what}: a run ends beyond any pack")
    return Index(content, size, params, id_size, ids, tuple(frames))


def _open(data: memoryview, size: int, what: str) -> bytes:
    """Open one zstd frame of exactly *size* bytes."""
    try:
        opener = zstd.ZstdDecompressor()
        table = opener.decompress(data, max_length=size + 1)
    except zstd.ZstdError as error:
        raise FormatError(f"{what}: damaged ({error})") from error
    if len(table) != size or not opener.eof or opener.unused_data:
        raise FormatError(f"{what}: a part does not have its promised size")
    return table


def _item(items: Sequence[_T], number: int, what: str) -> _T:
    if number >= len(items):
        raise FormatError(f"{what}: names entry {number} of a table of {len(items)}")
    return items[number]
