"""zchunk files: the one module that knows the format. Reads, opens, and builds them again.

A zchunk file is a header and independently compressed zstd frames; the header's index follows
from the frames (digest, stored length, open length of each). So the content, the list of open
lengths and the dictionary give the whole file back, given the level and the kinds of digests.

Format: zchunk_format.txt of https://github.com/zchunk/zchunk, as written by zchunk 1.1 and 1.2
(where the flags are a compressed integer, and flag 4 adds digests of the open chunks).
"""

from __future__ import annotations

import hashlib
import io
import itertools
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO, Final

from .engines import LEVEL, MIN_DICTIONARY, STRATEGY, Buffer, ZstdMaker
from .errors import EngineError, FormatError
from .limits import LIMITS, MIB
from .wire import Reader, uvarints
from .zstd import zstd

MAGIC: Final = b"\0ZCK1"
_PIECE = 1 * MIB
_HEADER_MAX = 64 * MIB  #: a header of Fedora 38 had half a megabyte
_CHUNKS_MAX = 1 << 20  #: one or fewer a package, of 100,000 at most
_CHUNK_MAX = 32 * MIB  #: open bytes of a chunk that is built again, for it lies in memory
_SPOOL = 16 * MIB  #: stored bytes held in memory before they go to a temporary file
_WINDOW_LOG = 27
_SAMPLE_CHUNKS, _SAMPLE_BYTES = 48, 4 * MIB
_SAMPLE_FIRST = 6  #: chunks after which a setting that made none right is given up
_CARRIED_COST = 4  #: bytes of a carried chunk's row
_UNCOMPRESSED, _ZSTD = 0, 2  #: compression types
_FLAG_OPEN_DIGESTS = 4
_DICT_MAGIC = b"\x37\xa4\x30\xec"

#: Digest kinds of the format: name for hashlib, bytes kept.
_DIGESTS: Final = (("sha1", 20), ("sha256", 32), ("sha512", 64), ("sha512", 16))

#: Parts of a recipe: side contents, and a data digest of zeros (as writers of flag 4 leave it).
DICTIONARY, CARRIED, NO_DATA_DIGEST = 1, 2, 4

#: Level (0: none), strategy (0: the level's own), digest of header and data, digest of chunks,
#: flags, parts.
PARAMETERS = (range(20), range(10), range(4), range(4), (0, _FLAG_OPEN_DIGESTS), range(8))


@dataclass(frozen=True, slots=True)
class Header:
    """What a zchunk header says. Chunk 0 is the dictionary, of length 0 where there is none."""

    digest: int  #: kind of the header's and the data's digest
    chunk_digest: int  #: kind of the chunks' digests
    flags: int
    is_compressed: bool
    data_digest: bytes
    size: int  #: bytes of the header: where the data start
    stored: array[int]  #: bytes of each chunk in the file
    opened: array[int]  #: bytes of each chunk's content

    @property
    def count(self) -> int:
        """Chunks, the dictionary's included."""
        return len(self.stored)


@dataclass(frozen=True, slots=True)
class Rebuild:
    """How a zchunk file is built: a recipe's parameters and side contents."""

    level: int
    strategy: int
    digest: int
    chunk_digest: int
    flags: int
    no_data_digest: bool
    lengths: array[int]  #: open lengths, the dictionary's (or 0) first
    dictionary: bytes  #: open; empty for none
    carried: dict[int, bytes]  #: chunk number to stored bytes, where the engine makes others

    @property
    def params(self) -> tuple[int, ...]:
        """As in the recipe; ``PARAMETERS`` has the allowed values."""
        parts = (
            (DICTIONARY if self.dictionary else 0)
            | (CARRIED if self.carried else 0)
            | (NO_DATA_DIGEST if self.no_data_digest else 0)
        )
        return (self.level, self.strategy, self.digest, self.chunk_digest, self.flags, parts)

    def sides(self) -> list[bytes]:
        """The side contents in the recipe's order: lengths, dictionary, carried chunks."""
        sides = [_put_lengths(self.lengths)]
        if self.dictionary:
            sides.append(self.dictionary)
        if self.carried:
            sides.append(_put_carried(self.carried))
        return sides

    @classmethod
    def of(cls, params: tuple[int, ...], sides: list[bytes]) -> Rebuild:
        """The reverse of ``params`` and ``sides``. Raises FormatError where they do not fit."""
        level, strategy, digest, chunk_digest, flags, parts = params
        if len(sides) != side_count(params):
            raise FormatError("a zck recipe whose side contents do not fit its parameters")
        lengths = _get_lengths(sides[0])
        dictionary = sides[1] if parts & DICTIONARY else b""
        if len(dictionary) > LIMITS.dictionary or lengths[0] != len(dictionary):
            raise FormatError("a zck recipe whose dictionary does not fit its lengths")
        carried = _get_carried(sides[-1], len(lengths)) if parts & CARRIED else {}
        none = bool(parts & NO_DATA_DIGEST)
        return cls(level, strategy, digest, chunk_digest, flags, none, lengths, dictionary, carried)


def side_count(params: tuple[int, ...]) -> int:
    """How many side contents a recipe with *params* has."""
    return 1 + bool(params[5] & DICTIONARY) + bool(params[5] & CARRIED)


def untold_sides(params: tuple[int, ...]) -> int:
    """How many of the side contents, the last ones, ``read_sides`` cannot tell from the file."""
    return bool(params[5] & CARRIED)


# --- reading ------------------------------------------------------------------------------------


def read_header(file: BinaryIO) -> Header:
    """Read the header of *file*, from its start; leaves the position where the data start.

    Checks the header's own digest. Memory: the header and 16 bytes a chunk.

    Raises FormatError on damage, on what no known writer makes (streams, signatures, optional
    elements, no compression), and beyond the limits.
    """
    file.seek(0)
    lead = file.read(len(MAGIC) + 20 + 64)
    reader = Reader(lead, "zchunk header")
    reader.expect(MAGIC)
    digest = _ci(reader, len(_DIGESTS) - 1)
    size = _ci(reader, _HEADER_MAX)
    name, digest_size = _DIGESTS[digest]
    check = hashlib.new(name, lead[: reader.position], usedforsecurity=False)
    promised = bytes(reader.take(digest_size))
    start = reader.position
    file.seek(start)
    rest = file.read(size)
    check.update(rest)
    if check.digest()[:digest_size] != promised:
        raise FormatError("the zchunk header is damaged or truncated")

    reader = Reader(rest, "zchunk header")
    data_digest = bytes(reader.take(digest_size))
    flags = _ci(reader)
    if flags not in (0, _FLAG_OPEN_DIGESTS):
        raise FormatError(f"a zchunk header with flags {flags}")
    if (compression := _ci(reader)) not in (_UNCOMPRESSED, _ZSTD):
        raise FormatError(f"a zchunk file with compression {compression}")
    index = Reader(reader.take(_ci(reader)), "zchunk index")
    chunk_digest = _ci(index, len(_DIGESTS) - 1)
    entry = _DIGESTS[chunk_digest][1] * (2 if flags & _FLAG_OPEN_DIGESTS else 1)
    count = _ci(index, _CHUNKS_MAX)
    if not 0 < count <= index.left // (entry + 2):
        raise FormatError(f"a zchunk index of {index.left} bytes with {count} chunks")
    stored, opened = array("q"), array("q")
    for _ in range(count):
        index.take(entry)
        stored.append(_ci(index, LIMITS.published))
        opened.append(_ci(index, LIMITS.content))
    index.done()
    if _ci(reader) != 0:
        raise FormatError("a zchunk header with signatures")
    reader.done()
    if sum(stored) > LIMITS.published or sum(opened) > LIMITS.content:
        raise FormatError("a zchunk header that promises more than any file may have")
    if opened[0] > LIMITS.dictionary:
        raise FormatError(f"a zchunk dictionary of {opened[0]} bytes")
    if compression == _UNCOMPRESSED and stored != opened:
        raise FormatError("an uncompressed zchunk file with two lengths for a chunk")
    is_zstd = compression == _ZSTD
    return Header(digest, chunk_digest, flags, is_zstd, data_digest, start + size, stored, opened)


def open_stream(published: BinaryIO, *, limit: int) -> Iterator[bytes]:
    """The content, in pieces of at most 1 MiB. Memory: the header, the dictionary, one window.

    *published* must be seekable; it is read from its start. Raises FormatError on damage,
    truncation, trailing bytes, and where the header promises more than *limit* bytes.
    """
    header = read_header(published)
    size = published.seek(0, 2)
    if size != header.size + sum(header.stored):
        raise FormatError(
            f"the zchunk file has {size} bytes, its header says {header.size + sum(header.stored)}"
        )
    if sum(header.opened[1:]) > limit:
        raise FormatError(f"the zck file expands beyond {limit} bytes", limit=limit)
    published.seek(header.size)
    dictionary = b"".join(_open_chunk(published, header, 0, None))
    loaded = _load(dictionary)
    for number in range(1, header.count):
        yield from _open_chunk(published, header, number, loaded)


def read_sides(published: BinaryIO) -> list[bytes]:
    """The side contents that the file alone tells: lengths, and the dictionary if it has one.

    *published* must be seekable. Raises FormatError on damage.
    """
    header = read_header(published)
    sides = [_put_lengths(header.opened)]
    if header.opened[0]:
        sides.append(b"".join(_open_chunk(published, header, 0, None)))
    return sides


def _open_chunk(
    file: BinaryIO, header: Header, number: int, dictionary: zstd.ZstdDict | None
) -> Iterator[bytes]:
    left, opened, made = header.stored[number], header.opened[number], 0
    if left == 0 and opened:
        raise FormatError("a zchunk chunk of no bytes with a length")
    if not header.is_compressed:
        while left:
            piece = file.read(min(left, _PIECE))
            if not piece:
                raise FormatError("a zchunk chunk is truncated")
            left -= len(piece)
            yield piece
    if left == 0:
        return
    options = {int(zstd.DecompressionParameter.window_log_max): _WINDOW_LOG}
    decompressor = zstd.ZstdDecompressor(zstd_dict=dictionary, options=options)
    while not decompressor.eof:
        data = b""
        if decompressor.needs_input:
            data = file.read(min(left, _PIECE))
            if not data:
                raise FormatError("a zchunk chunk is truncated")
            left -= len(data)
        try:
            piece = decompressor.decompress(data, _PIECE)
        except (zstd.ZstdError, EOFError) as error:
            raise FormatError(f"a zchunk chunk is damaged: {error}") from error
        made += len(piece)
        if made > opened:
            raise FormatError("a zchunk chunk is longer than its header says")
        if piece:
            yield piece
    if made != opened or left or decompressor.unused_data:
        raise FormatError("a zchunk chunk does not have the length that its header says")


def _load(dictionary: bytes) -> zstd.ZstdDict | None:
    if len(dictionary) < MIN_DICTIONARY:
        return None
    try:
        loaded = zstd.ZstdDict(dictionary, is_raw=not dictionary.startswith(_DICT_MAGIC))
        zstd.ZstdDecompressor(zstd_dict=loaded)  # a dictionary damaged inside shows only here
    except (ValueError, zstd.ZstdError) as error:
        raise FormatError(f"a bad zchunk dictionary: {error}") from error
    return loaded


def _ci(reader: Reader, maximum: int = (1 << 56) - 1) -> int:
    """A "compressed integer": 7 bits a byte, least first, the top bit set on the last byte."""
    value = shift = 0
    while shift < 56:
        byte = reader.fixed(1)
        value |= (byte & 0x7F) << shift
        if byte & 0x80:
            if value > maximum:
                raise FormatError(f"{reader.what}: {value} is above the limit of {maximum}")
            return value
        shift += 7
    raise FormatError(f"{reader.what}: a number is too long")


def _put_ci(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F)
        value >>= 7
    out.append(value | 0x80)


# --- building -----------------------------------------------------------------------------------


def build(how: Rebuild, content: Iterable[Buffer], maker: ZstdMaker) -> Iterator[bytes]:
    """The published bytes. The header comes first and needs every chunk, so chunks are spooled.

    Memory: the largest chunk (32 MiB at most) twice, libzstd's own, 16 MiB of stored chunks,
    and 80 bytes a chunk; stored bytes beyond that lie in an unnamed temporary file.

    Raises FormatError when *content* does not have the lengths, EngineError when libzstd refuses
    the dictionary.
    """
    with tempfile.SpooledTemporaryFile(max_size=_SPOOL) as spool:
        writer = _HeaderWriter(how)
        source = _Source(content)
        for number, data, stored in _chunks(how, source.take, maker):
            writer.add(data, stored, number)
            spool.write(stored)
        source.end()
        yield writer.header()
        spool.seek(0)
        while piece := spool.read(_PIECE):
            yield piece


def _chunks(
    how: Rebuild, take: Callable[[int], Buffer], maker: ZstdMaker
) -> Iterator[tuple[int, Buffer, bytes]]:
    """Number, open bytes and stored bytes of each chunk, in the file's order."""
    if max(how.lengths) > _CHUNK_MAX:
        raise FormatError(f"a zck recipe with a chunk of {max(how.lengths)} bytes")
    frame = _framer(how, maker, how.dictionary)
    for number, length in enumerate(how.lengths):
        data = take(length) if number else how.dictionary
        stored = how.carried.get(number)
        if stored is None and number:
            stored = frame(data)
        elif stored is None:
            stored = _framer(how, maker, b"")(data)  # the dictionary's own chunk goes without it
        yield number, data, stored


def _framer(how: Rebuild, maker: ZstdMaker, dictionary: bytes) -> Callable[[Buffer], bytes]:
    """What makes a chunk's stored bytes; a chunk of no bytes has none."""
    if how.level == 0:
        return bytes
    options = {LEVEL: how.level}
    if how.strategy:
        options[STRATEGY] = how.strategy
    stream = maker(options, dictionary or None)
    return lambda data: stream.frame(data) if len(data) else b""


class _Source:
    """Takes exact lengths from pieces of any size."""

    def __init__(self, pieces: Iterable[Buffer]) -> None:
        self._pieces = iter(pieces)
        self._rest = memoryview(b"")

    def take(self, length: int) -> Buffer:
        if length <= len(self._rest):
            taken, self._rest = self._rest[:length], self._rest[length:]
            return taken
        parts, wanted = [], length
        while wanted:
            if not self._rest:
                piece = next(self._pieces, None)
                if piece is None:
                    raise FormatError("the content is shorter than the recipe's chunks")
                self._rest = memoryview(piece)
            part, self._rest = self._rest[:wanted], self._rest[wanted:]
            parts.append(part)
            wanted -= len(part)
        return b"".join(parts)

    def end(self) -> None:
        if len(self._rest) or any(len(piece) for piece in self._pieces):
            raise FormatError("the content is longer than the recipe's chunks")


class _HeaderWriter:
    """Gathers the index while chunks go by, then writes the header."""

    def __init__(self, how: Rebuild) -> None:
        self._how = how
        self._name, self._size = _DIGESTS[how.digest]
        self._data = hashlib.new(self._name, usedforsecurity=False)
        self._index = bytearray()
        _put_ci(self._index, how.chunk_digest)
        _put_ci(self._index, len(how.lengths))

    def add(self, data: Buffer, stored: bytes, number: int) -> None:
        name, size = _DIGESTS[self._how.chunk_digest]
        self._data.update(stored)
        # A chunk without bytes (mostly: no dictionary) has a digest of zeros.
        both = (stored, data) if self._how.flags & _FLAG_OPEN_DIGESTS else (stored,)
        for part in both:
            digest = hashlib.new(name, part, usedforsecurity=False).digest()[:size]
            self._index += digest if len(data) else bytes(size)
        _put_ci(self._index, len(stored))
        _put_ci(self._index, self._how.lengths[number])

    def header(self) -> bytes:
        how = self._how
        rest = bytearray(
            bytes(self._size) if how.no_data_digest else self._data.digest()[: self._size]
        )
        _put_ci(rest, how.flags)
        _put_ci(rest, _ZSTD if how.level else _UNCOMPRESSED)
        _put_ci(rest, len(self._index))
        rest += self._index
        _put_ci(rest, 0)
        lead = bytearray(MAGIC)
        _put_ci(lead, how.digest)
        _put_ci(lead, len(rest))
        digest = hashlib.new(self._name, bytes(lead + rest), usedforsecurity=False).digest()
        return bytes(lead) + digest[: self._size] + bytes(rest)


# --- searching ----------------------------------------------------------------------------------

#: createrepo_c's levels with btopt, then the default strategy of zchunk before 1.1.14.
_LIKELY = ((9, 7), (10, 7), (9, 0), (10, 0))
_RARE = (*((level, 7) for level in range(1, 20) if level not in (9, 10)), (3, 0), (19, 0))


def find(
    published: bytes,
    content: Buffer,
    tiers: Iterable[Sequence[tuple[str, ZstdMaker]]],
    hint: tuple[str, tuple[int, ...]] | None = None,
) -> tuple[str, Rebuild] | None:
    """The engine's name and how it builds *published* from *content*, proven by building it.

    *tiers* are engines, those that every client has first; *hint*, the last publish's engine and
    parameters, goes before the others of its tier. Within a tier what makes every chunk
    wins, else the one that leaves least to carry, when that is below a tenth of the file.
    None when there is none, or *published* is of a kind that is not built.
    """
    try:
        header, dictionary = _parse(published, len(content))
    except FormatError:
        return None
    base = Rebuild(
        0,
        0,
        header.digest,
        header.chunk_digest,
        header.flags,
        not any(header.data_digest),
        header.opened,
        dictionary,
        {},
    )
    files = _Files(published, memoryview(content), header)
    # Level 9 makes nearly all chunks of level 10: the likely ones are compared with each other.
    settings = [_LIKELY, *((row,) for row in _RARE)] if header.is_compressed else [((0, 0),)]
    if hint is not None:
        settings.sort(key=lambda rows: hint[1][:2] not in rows)
    every = [list(tier) for tier in tiers]
    if hint is not None:
        # A whole success of yesterday's engine needs no look at the others.
        level, strategy = hint[1][:2]
        how = replace(base, level=level, strategy=strategy)
        before = [row for tier in every for row in tier if row[0] == hint[0]]
        if header.is_compressed == (level > 0) and (best := _best(how, before, files, 1)):
            return best
    for rows in settings:
        for tier in every:
            engines = sorted(tier, key=lambda row: hint is None or row[0] != hint[0])
            best, bearable = None, len(published) // 10
            for level, strategy in rows:
                how = replace(base, level=level, strategy=strategy)
                found = _best(how, engines, files, bearable)
                if found is None:
                    continue
                best = found
                bearable = sum(map(len, found[1].carried.values()))
                if not bearable:
                    break
            if best is not None:
                return best
    return None


def _best(
    how: Rebuild, engines: Iterable[tuple[str, ZstdMaker]], files: _Files, bearable: int
) -> tuple[str, Rebuild] | None:
    best = None
    for name, maker in engines:
        try:
            fits = files.sample_fits(how, maker)
            carried = files.carried(how, maker, bearable) if fits else None
        except EngineError:
            continue  # a dictionary that this engine refuses
        if carried is not None:
            best = name, replace(how, carried=carried)
            if not carried:
                break
            bearable = sum(map(len, carried.values()))
    return best


def _parse(published: bytes, content_size: int) -> tuple[Header, bytes]:
    """The header and the open dictionary. Raises FormatError on what is not built again."""
    file = io.BytesIO(published)
    header = read_header(file)
    if (
        sum(header.opened[1:]) != content_size
        or header.size + sum(header.stored) != len(published)
        or max(header.opened) > _CHUNK_MAX
    ):
        raise FormatError("lengths that do not fit the file")
    return header, b"".join(_open_chunk(file, header, 0, None))


class _Files:
    """A published file and its content, by chunk."""

    def __init__(self, published: bytes, content: memoryview, header: Header) -> None:
        self._published = published
        self._content = content
        self._header = header
        self._stored_at = list(itertools.accumulate(header.stored, initial=header.size))
        self._opened_at = [0, *itertools.accumulate(header.opened[1:], initial=0)]

    def _opened(self, number: int) -> memoryview:
        return self._content[self._opened_at[number] : self._opened_at[number + 1]]

    def _is_stored(self, number: int, made: bytes) -> bool:
        return len(made) == self._header.stored[number] and self._published.startswith(
            made, self._stored_at[number]
        )

    def sample_fits(self, how: Rebuild, maker: ZstdMaker) -> bool:
        """Whether at least half of a few chunks, spread over the file, come out right."""
        count = self._header.count
        step = max(1, count // _SAMPLE_CHUNKS)
        frame = _framer(how, maker, how.dictionary)
        tried = same = size = 0
        for number in range(1, count, step):
            data = self._opened(number)
            tried += 1
            same += self._is_stored(number, frame(data))
            size += len(data)
            if size > _SAMPLE_BYTES or (tried == _SAMPLE_FIRST and not same):
                break
        return 2 * same >= tried

    def carried(self, how: Rebuild, maker: ZstdMaker, bearable: int) -> dict[int, bytes] | None:
        """The chunks that the engine makes otherwise; None when they pass *bearable* bytes.

        This is the whole proof: each chunk and the header are compared.
        """
        carried: dict[int, bytes] = {}
        weight = 0
        writer = _HeaderWriter(how)
        source = _Source([self._content])
        for number, data, stored in _chunks(how, source.take, maker):
            kept = stored
            if not self._is_stored(number, stored):
                start = self._stored_at[number]
                kept = self._published[start : start + self._header.stored[number]]
                carried[number] = kept
                weight += len(kept) + _CARRIED_COST
                if weight > bearable:
                    return None
            writer.add(data, kept, number)
        return carried if self._published.startswith(writer.header()) else None


# --- side contents ------------------------------------------------------------------------------


def _put_lengths(lengths: array[int]) -> bytes:
    return uvarints([len(lengths), *lengths])


def _get_lengths(data: bytes) -> array[int]:
    reader = Reader(data, "zck lengths")
    count = reader.uvarint(_CHUNKS_MAX)
    if not 0 < count <= reader.left:
        raise FormatError(f"zck lengths: {count} chunks in {reader.left} bytes")
    lengths = array("q", (reader.uvarint(_CHUNK_MAX) for _ in range(count)))
    reader.done()
    return lengths


def _put_carried(carried: dict[int, bytes]) -> bytes:
    """Count; for each chunk the distance to its number and its length; then the bytes."""
    numbers = sorted(carried)
    table = [len(numbers)]
    for before, number in zip([0, *numbers], numbers, strict=False):
        table += (number - before, len(carried[number]))
    return uvarints(table) + b"".join(carried[number] for number in numbers)


def _get_carried(data: bytes, count: int) -> dict[int, bytes]:
    reader = Reader(data, "zck carried chunks")
    rows = reader.uvarint(count)
    number, lengths = 0, {}
    for _ in range(rows):
        number += reader.uvarint(count)
        if number >= count or number in lengths:
            raise FormatError("zck carried chunks: a number out of order")
        lengths[number] = reader.uvarint(len(data))
    carried = {number: bytes(reader.take(length)) for number, length in lengths.items()}
    reader.done()
    return carried
