"""Integers on the wire, and a reader that never runs past its bounds.

A *uvarint* is an unsigned integer in groups of 7 bits, least significant first, the top bit set
on every byte but the last (LEB128; DWARF 5, section 7.6). Fixed integers are little-endian.
"""

from __future__ import annotations

from collections.abc import Iterable

from .errors import FormatError

_MAX = (1 << 63) - 1


def put_uvarint(out: bytearray, value: int) -> None:
    """Append *value* (0 to 2**63 - 1) to *out*."""
    if not 0 <= value <= _MAX:
        raise ValueError(f"not a uvarint: {value}")
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def uvarints(values: Iterable[int]) -> bytes:
    """The concatenated uvarints of *values*."""
    out = bytearray()
    for value in values:
        put_uvarint(out, value)
    return bytes(out)


def _shown(data: bytes) -> str:
    return f"bytes {data.hex(' ')}" if data else "nothing"


class Reader:
    """Reads one buffer from front to back. Every shortfall is a FormatError that names *what*."""

    __slots__ = ("_data", "_position", "what")

    def __init__(self, data: bytes | bytearray | memoryview, what: str) -> None:
        self._data = memoryview(data)
        self._position = 0
        self.what = what

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._position

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._position

    def take(self, count: int) -> memoryview:
        """The next *count* bytes, not copied. Raises FormatError when fewer are left."""
        if count < 0 or count > self.left:
            raise FormatError(f"{self.what}: truncated ({self.left} bytes left, {count} wanted)")
        start = self._position
        self._position += count
        return self._data[start : self._position]

    def uvarint(self, maximum: int = _MAX) -> int:
        """The next uvarint. Raises FormatError above *maximum*, or for over 9 bytes."""
        value = shift = 0
        data, position = self._data, self._position
        while True:
            if position >= len(data):
                raise FormatError(f"{self.what}: truncated in a number")
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > 56:
                raise FormatError(f"{self.what}: a number is too long")
        if value > maximum:
            raise FormatError(f"{self.what}: {value} is above the limit of {maximum}")
        self._position = position
        return value

    def fixed(self, size: int) -> int:
        """The next little-endian unsigned integer of *size* bytes."""
        return int.from_bytes(self.take(size), "little")

    def expect(self, magic: bytes) -> None:
        """Raises FormatError unless the next bytes are *magic*."""
        found = bytes(self.take(min(len(magic), self.left)))
        if found != magic:
            raise FormatError(f"{self.what}: starts with {_shown(found)}, not {_shown(magic)}")

    def done(self) -> None:
        """Raises FormatError when bytes are left over."""
        if self.left:
            raise FormatError(f"{self.what}: {self.left} bytes too many")
