"""Published bytes to content: which codec they have, and a bounded decompressor for each.

Formats: gzip RFC 1952, zstd RFC 8878, .xz file format 1.2.0, bzip2 1.0, zchunk (``zck``).
"""

from __future__ import annotations

import bz2
import enum
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

from . import zck
from .errors import FormatError
from .limits import KIB, MIB
from .zstd import zstd

PIECE = 1 * MIB  #: bytes of the largest piece that ``open_stream`` yields
#: Suffixes of files that are not held to what the main file says they open to: wrappings that are
#: not opened here, and .zck: createrepo_c wraps what was wrapped, and promises the inner wrapping.
UNOPENED = (".lzma", ".lz4", ".zck")
_READ = 64 * KIB  #: small, because each member's end copies what was read behind it
_MEMBERS = 65_536  #: gzip members, zstd frames or streams in one file
_XZ_MEMORY = 160 * MIB  #: a decoder of preset 9 takes 65 MiB
_ZSTD_WINDOW_LOG = 27  #: libzstd's own default


class Codec(enum.StrEnum):
    """What published bytes are."""

    NONE = "none"
    GZ = "gz"
    ZST = "zst"
    XZ = "xz"
    BZ2 = "bz2"
    ZCK = "zck"


_MAGICS = (
    (b"\x1f\x8b\x08", Codec.GZ),
    (b"\x28\xb5\x2f\xfd", Codec.ZST),
    (b"\xfd7zXZ\x00", Codec.XZ),
    (b"\x00ZCK1", Codec.ZCK),
)
_BZ2_BLOCK, _BZ2_END = b"1AY&SY", b"\x17rE8P\x90"


def codec_of(path: str, start: bytes) -> Codec:
    """The codec of a file from its first bytes (16 are enough), by its name only in doubt.

    A file that is named ``.gz`` and is none is plain: its bytes are its content.
    """
    for magic, codec in _MAGICS:
        if start.startswith(magic):
            return codec
    if start[:3] == b"BZh" and start[3:4] in b"123456789" and start[4:10] in (_BZ2_BLOCK, _BZ2_END):
        return Codec.BZ2
    if start[1:4] == b"\x2a\x4d\x18" and start[:1] >= b"\x50" and start[:1] <= b"\x5f":
        # A skippable frame: zstd and lz4 share these magics, so the name decides.
        return Codec.ZST if path.endswith((".zst", ".zstd")) else Codec.NONE
    return Codec.NONE


def open_stream(published: BinaryIO, codec: Codec, *, limit: int) -> Iterator[bytes]:
    """Decompress *published* from its position to its end, in pieces of at most 1 MiB.

    *limit* is the most the content may have, in bytes; nothing beyond it is held. For ``zck``
    *published* must be seekable. Memory: the format's window and about 2 MiB.

    Raises FormatError when the bytes are damaged, truncated, followed by others, or expand
    beyond *limit*. What was yielded before may then be wrong.
    """
    total = 0
    for piece in _pieces(published, codec, limit):
        total += len(piece)
        if total > limit:
            raise FormatError(f"the {codec} file expands beyond {limit} bytes", limit=limit)
        yield piece


def _pieces(published: BinaryIO, codec: Codec, limit: int) -> Iterator[bytes]:
    if codec is Codec.NONE:
        return iter(lambda: published.read(PIECE), b"")
    if codec is Codec.ZCK:
        return zck.open_stream(published, limit=limit)
    return _members(published, codec)


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Gunzip:
    """zlib's decompressor with the interface of the other three."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self._full = False

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        # A full piece may have left output inside zlib with no input left over.
        return not self._inner.unconsumed_tail and not self._full

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        made = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self._full = len(made) == max_length
        return made


def _decoder(codec: Codec) -> tuple[Callable[[], _Decompressor], tuple[type[Exception], ...]]:
    """How to start on one member, and what it raises on damage."""
    if codec is Codec.GZ:
        return _Gunzip, (zlib.error,)
    if codec is Codec.BZ2:
        return bz2.BZ2Decompressor, (OSError, EOFError)
    if codec is Codec.XZ:
        return (
            lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY),
            (lzma.LZMAError, EOFError),
        )
    options = {int(zstd.DecompressionParameter.window_log_max): _ZSTD_WINDOW_LOG}
    return lambda: zstd.ZstdDecompressor(options=options), (zstd.ZstdError, EOFError)


def _members(published: BinaryIO, codec: Codec) -> Iterator[bytes]:
    make, errors = _decoder(codec)
    data = published.read(_READ)
    if not data:
        raise FormatError(f"the {codec} file is empty")
    for _ in range(_MEMBERS):
        decompressor = make()
        while not decompressor.eof:
            if decompressor.needs_input and not data:
                data = published.read(_READ)
                if not data:
                    raise FormatError(f"the {codec} file is truncated")
            fed, data = (data, b"") if decompressor.needs_input else (b"", data)
            try:
                piece = decompressor.decompress(fed, PIECE)
            except errors as error:
                raise FormatError(f"the {codec} file is damaged: {error}") from error
            if piece:
                yield piece
        data = decompressor.unused_data or published.read(_READ)
        if not data:
            return
    raise FormatError(f"the {codec} file has more than {_MEMBERS} members")
