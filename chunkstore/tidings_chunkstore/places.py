"""Where bytes lie: a pack's name, and a span of bytes in a pack."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import FormatError

SELF = bytes(8)  #: stands for the pack itself inside it: no file can hold its own hash


@dataclass(frozen=True, slots=True)
class PackName:
    """A pack's file name: its serial and the first 8 bytes of the SHA-256 of the whole file."""

    serial: int
    id: bytes

    def __str__(self) -> str:
        return f"{self.serial:06d}-{self.id.hex()}.pack"

    @classmethod
    def parse(cls, text: str) -> PackName:
        """Raises FormatError when *text* is no pack's name."""
        stem, dot, suffix = text.partition(".")
        serial, dash, digest = stem.partition("-")
        if dot and dash and suffix == "pack" and serial.isdigit() and len(digest) == 16:
            try:
                name = cls(int(serial), bytes.fromhex(digest))
            except ValueError as error:
                raise FormatError(f"not a pack's name: {text[:80]!r}") from error
            if str(name) == text and name.serial < 1 << 32:
                return name
        raise FormatError(f"not a pack's name: {text[:80]!r}")


@dataclass(frozen=True, slots=True)
class Span:
    """*length* bytes from *offset* in *pack*."""

    pack: PackName
    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.length

    def within(self, own: PackName) -> Span:
        """This span with SELF read as *own*."""
        return Span(own, self.offset, self.length) if self.pack.id == SELF else self
