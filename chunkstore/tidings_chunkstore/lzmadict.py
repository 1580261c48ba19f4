"""LZMA2 with a preset dictionary, from the system's liblzma: what Python's ``lzma`` cannot encode.

Decoding needs no such thing: LZMA2 has chunks of plain bytes (control bytes 1 and 2), so the
dictionary goes through ``lzma.LZMADecompressor`` as plain chunks in front of the stream, and what
comes out of them is thrown away. Structures and constants: liblzma 5's ``lzma/base.h``,
``lzma/filter.h`` and ``lzma/lzma12.h``, whose binary interface is stable.
"""

from __future__ import annotations

import ctypes
import lzma
from enum import Enum

_LIBRARIES = ("liblzma.so.5", "liblzma.5.dylib", "liblzma.dll")
_LZMA2, _END = 0x21, (1 << 64) - 1
_OK, _STREAM_END = 0, 1
_RUN, _FINISH = 0, 3
_HC4, _BT4 = 0x04, 0x14
_FAST, _NORMAL = 1, 2
_ROOM = 256 * 1024
_CHUNK = 1 << 16


class Effort(Enum):
    """Search modes as (mode, match finder, depth; 0 is liblzma's choice)."""

    HIGH = (_NORMAL, _BT4, 0)
    MEDIUM = (_NORMAL, _BT4, 8)
    LOW = (_FAST, _HC4, 16)


class _Options(ctypes.Structure):
    _fields_ = (
        ("dict_size", ctypes.c_uint32),
        ("preset_dict", ctypes.c_char_p),
        ("preset_dict_size", ctypes.c_uint32),
        ("lc", ctypes.c_uint32),
        ("lp", ctypes.c_uint32),
        ("pb", ctypes.c_uint32),
        ("mode", ctypes.c_uint32),
        ("nice_len", ctypes.c_uint32),
        ("mf", ctypes.c_uint32),
        ("depth", ctypes.c_uint32),
        ("reserved", ctypes.c_uint64 * 32),
    )


class _Filter(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint64), ("options", ctypes.c_void_p))


class _Stream(ctypes.Structure):
    _fields_ = (
        ("next_in", ctypes.c_char_p),
        ("avail_in", ctypes.c_size_t),
        ("total_in", ctypes.c_uint64),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_size_t),
        ("total_out", ctypes.c_uint64),
        ("allocator", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
        ("reserved", ctypes.c_uint64 * 16),
    )


class Encoder:
    """One raw LZMA2 stream behind a dictionary. Memory: about 12 times *dict_size*."""

    def __init__(self, dictionary: bytes, dict_size: int, effort: Effort) -> None:
        """Raises OSError where the system has no liblzma 5, MemoryError when it has no room."""
        self._library = _load()
        mode, finder, depth = effort.value
        self._dictionary = dictionary  # liblzma reads it while it encodes
        self._options = _Options(
            dict_size=dict_size,
            preset_dict=dictionary or None,
            preset_dict_size=len(dictionary),
            lc=3,
            mode=mode,
            nice_len=273,
            mf=finder,
            depth=depth,
        )
        self._filters = (_Filter * 2)(
            _Filter(_LZMA2, ctypes.addressof(self._options)), _Filter(_END, None)
        )
        self._stream = _Stream()
        self._room = ctypes.create_string_buffer(_ROOM)
        code = self._library.lzma_raw_encoder(ctypes.byref(self._stream), self._filters)
        if code != _OK:
            raise MemoryError(f"liblzma cannot start an encoder (code {code})")

    def __del__(self) -> None:
        if hasattr(self, "_stream"):
            self._library.lzma_end(ctypes.byref(self._stream))

    def compress(self, piece: bytes) -> bytes:
        """What *piece* adds to the stream."""
        return self._code(piece, _RUN)

    def flush(self) -> bytes:
        """The end of the stream."""
        return self._code(b"", _FINISH)

    def _code(self, piece: bytes, action: int) -> bytes:
        stream, out = self._stream, bytearray()
        stream.next_in, stream.avail_in = piece, len(piece)
        while True:
            stream.next_out, stream.avail_out = ctypes.addressof(self._room), _ROOM
            code = self._library.lzma_code(ctypes.byref(stream), action)
            out += self._room.raw[: _ROOM - stream.avail_out]
            if code == _STREAM_END or (code == _OK and action == _RUN and not stream.avail_in):
                return bytes(out)
            if code != _OK:
                raise MemoryError(f"liblzma cannot go on encoding (code {code})")


def decoder(dictionary: bytes, dict_size: int) -> lzma.LZMADecompressor:
    """A decompressor that has seen *dictionary* and now takes an ``Encoder``'s stream."""
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": max(4096, dict_size)}]
    result = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
    control = 1  # plain bytes that begin a dictionary; 2 adds to it
    for start in range(0, len(dictionary), _CHUNK):
        plain = dictionary[start : start + _CHUNK]
        result.decompress(bytes([control]) + (len(plain) - 1).to_bytes(2, "big") + plain)
        control = 2
    return result


def _load() -> ctypes.CDLL:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError("liblzma 5 is not installed")
