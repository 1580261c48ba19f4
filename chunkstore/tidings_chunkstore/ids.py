"""Names of things: value types over raw digest bytes, so that one id cannot pass for another."""

from __future__ import annotations

import hashlib
from typing import Self

from .errors import FormatError


class Digest(bytes):
    """A 32-byte digest; compares, hashes and slices as bytes."""

    __slots__ = ()
    SIZE = 32

    def __new__(cls, value: bytes) -> Self:
        """Raises FormatError when *value* is not SIZE bytes."""
        if len(value) != cls.SIZE:
            raise FormatError(f"a {cls.__name__} has {cls.SIZE} bytes, not {len(value)}")
        return super().__new__(cls, value)

    @classmethod
    def from_hex(cls, text: str) -> Self:
        """Raises FormatError when *text* is not SIZE bytes of hexadecimal."""
        try:
            raw = bytes.fromhex(text)
        except (ValueError, TypeError) as error:
            raise FormatError(f"not a hexadecimal {cls.__name__}: {str(text)[:80]!r}") from error
        return cls(raw)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hex()})"

    __str__ = __repr__


class ContentId(Digest):
    """SHA-256 of a content: repomd's open-checksum where there is one."""

    __slots__ = ()

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Self:
        """Hash *data*."""
        return cls(hashlib.sha256(data).digest())


class FileId(Digest):
    """SHA-256 of a file as published."""

    __slots__ = ()

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Self:
        """Hash *data*."""
        return cls(hashlib.sha256(data).digest())


class ChunkId(Digest):
    """BLAKE3-256 of a chunk's bytes."""

    __slots__ = ()
