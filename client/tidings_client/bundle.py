"""Reading a bundle of direct deltas; docs/protocol.md, "Bundles"."""

from __future__ import annotations

import hashlib

from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.wire import Reader

MAGIC = b"TDB1"
_CHECKSUM = 8


def decode_bundle(data: bytes) -> list[tuple[str, bytes]]:
    """The tracks and their delta sections, in order. Raises FormatError."""
    what = "bundle"
    reader = Reader(data, what)
    reader.expect(MAGIC)
    checksum = bytes(reader.take(_CHECKSUM))
    rest = memoryview(data)[reader.position :]
    if hashlib.sha256(rest).digest()[:_CHECKSUM] != checksum:
        raise FormatError(f"{what}: damaged (checksum)")
    entries: list[tuple[str, int]] = []
    for _ in range(reader.uvarint(LIMITS.files)):
        try:
            track = bytes(reader.take(reader.uvarint(4 * LIMITS.path))).decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{what}: a track's name is not UTF-8") from error
        entries.append((track, reader.uvarint(reader.left)))
    sections = [(track, bytes(reader.take(length))) for track, length in entries]
    reader.done()
    return sections
