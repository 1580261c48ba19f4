"""Where casync and desync cut a blob, vectorised with NumPy.

The rule, from casync 2 (``src/cachunker.c``) and desync 1.0 (``chunker.go``): a chunk ends at
the first offset, at least ``min`` bytes into it, where the buzhash *h* of the 48 bytes before has
``h % d == d - 1``; at ``max`` bytes without one; and at the end of the blob. *d* follows from the
wanted average. Both programs start the hash anew in each chunk, but on the 48 bytes before ``min``,
so it never depends on more than the window, and all cuts can be found in two steps: the boundaries
of the whole blob at once, then a walk over them that honours ``min`` and ``max``.

The programs differ in one place: casync tests the window that ends at ``min`` itself, desync the
first one after it (about one chunk in d). ``Rule`` names whose cuts are wanted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.limits import KIB, LIMITS, MIB

WINDOW = 48  #: bytes that a hash covers
READ = 8 * MIB  #: bytes read, and searched for boundaries, at a time
_BATCH = 1 << 16  #: positions hashed at a time: the scratch arrays stay within a CPU's second cache

Words = NDArray[np.uint32]

# casync's buzhash table: a fact of the format, one 32-bit value for each byte.
_TABLE = """
    458be752 c10748cc fbbcdbb8 6ded5b68 b10a82b5 20d75648 dfc5665f a8428801
    7ebf5191 841135c7 65cc53b3 280a597c 16f60255 c78cbc3e 294415f5 b938d494
    ec85c4e6 b7d33edc e549b544 fdeda5aa 882bf287 3116737c 05569956 e8cc1f68
    0806ac5e 22a14443 15297e10 50d090e7 4ba60f6f efd9f1a7 5c5c885c 82482f93
    9bfd7c64 0b3e7276 f2688e77 8fad8abc b0509568 f1ada29f a53efdfe cb2b1d00
    f2a9e986 6463432b 95094051 5a223ad2 9be8401b 61e579cb 1a556a14 5840fdc2
    9261ddf6 cde002bb 52432bb0 bf17373e 7b7c222f 2955ed16 9f10ca59 e840c4c9
    ccabd806 14543f34 1462417a 0d4a1f9c 087ed925 d7f8f24c 7338c425 cf86c8f5
    b19165cd 9891c393 325384ac 0308459d 86141d7e c922116a e2ffa6b6 53f52aed
    2cd86197 f5b9f498 bf319c8f e0411fae 977eb18c d8770976 9833466a c674df7f
    8c297d45 8ca48d26 c49ed8e2 7344f874 556f79c7 6b25eaed a03e2b42 f68f66a4
    8e8b09a2 f2e0e62a 0d3a9806 9729e493 8c72b0fc 160b94f6 450e4d3d 7a320e85
    bef8f0e1 21d73653 4e3d977a 1e7b3929 1cc6c719 be478d53 8d752809 e6d8c2c6
    275f0892 c8acc273 4cc21580 ecc4a617 f5f7be70 e795248a 375a2fe9 425570b6
    8898dcf8 dc2d97c4 0106114b 364dc22f 1e0cad1f be63803c 5f69fac2 4d5afa6f
    1bc0dfb5 fb273589 0ea47f7b 3c1c2b50 21b2a932 6b1223fd 2fe706a8 f9bd6ce2
    a268e64e e987f486 3eacf563 1ca2018c 65e18228 2207360a 57cf1715 34c37d2b
    1f8f3cde 93b657cf 31a019fd e69eb729 8bca7b9b 4c9d5bed 277ebeaf e0d8f8ae
    d150821c 31381871 afc3f1b0 927db328 e95effac 305a47bd 426ba35b 1233af3f
    686a5b83 50e072e5 d9d3bb2a 8befc475 487f0de6 c88dff89 bd664d5e 971b5d18
    63b14847 d7d3c1ce 7f583cf3 72cbcb09 c0d0a81c 7fa3429b e9158a1b 225ea19a
    d8ca9ea3 c763b282 bb0c6341 020b8293 d4cd299d 58cfa7f8 91b4ee53 37e4d140
    95ec764c 30f76b06 5ee68d24 679c8661 a41979c2 f2b61284 4fac1475 0adb49f9
    19727a23 15a7e374 c43a18d5 3fb1aa73 342fc615 924c0793 bee2d7f0 8a279de9
    4aa2d70c e24dd37f be862c0b 177c22c2 5388e5ee cd8a7510 f901b4fd dbc13dbc
    6c0bae5b 64efe8c7 48b02079 80331a49 ca3d8ae6 f3546190 fed7108b c49b941b
    32baf4a9 eb833a4a 88a3f1a5 3a91ce0a 3cc27da1 7112e684 4a3096b1 3794574c
    a3c8b6f3 1d213941 6e0a2e00 233479f1 0f4cd82f 6093edd2 5d7d209e 464fe319
    d4dcac9e 0db845cb fb5e4bc3 e0256ce1 09fb4ed1 0914be1e a5bdb2c3 c6eb57bb
    30320350 3f397e91 a67791bc 86bc0e2c efa0a7e2 e9ff7543 e733612c d185897b
    329e5388 91dd236b 2ecb0d93 f4d82a3d 35b5c03f e4e606f0 05b21843 37b45964
    5eff22f4 6027f4cc 77178b3c ae507131 7bf7cabc f9c18d66 593ade65 d95ddf11
"""


class Source(Protocol):
    """What is read from front to back: any binary file."""

    def read(self, size: int, /) -> bytes | None:
        """At most *size* bytes; none at the end."""
        ...


class Rule(StrEnum):
    """Whose cuts, and whose header flags."""

    CASYNC = "casync"
    DESYNC = "desync"


@dataclass(frozen=True, slots=True)
class ChunkSizes:
    """What decides where a blob is cut; sizes in bytes.

    Raises FormatError for sizes that casync or desync refuse, or with chunks above the limit.
    """

    min: int
    avg: int
    max: int
    rule: Rule = Rule.CASYNC

    def __post_init__(self) -> None:
        if not WINDOW <= self.min <= self.avg <= self.max <= LIMITS.chunk:
            sizes = (self.min, self.avg, self.max)
            raise FormatError(f"casync chunk sizes out of range: min, avg, max = {sizes!r:.80}")

    @classmethod
    def of(cls, average: int = 64 * KIB, rule: Rule = Rule.CASYNC) -> ChunkSizes:
        """casync's own choice for *average*: a quarter of it to four times."""
        return cls(average // 4, average, average * 4, rule)

    @property
    def discriminator(self) -> int:
        """*d* for the wanted average, by casync's formula (``src/cachunker.h``), in doubles."""
        value = int(self.avg / (-1.42888852e-7 * self.avg + 1.33237515))
        if self.rule is Rule.DESYNC:
            return value
        return min(max(value, self.min), self.max)


def cuts(stream: Source, sizes: ChunkSizes, read: int = READ) -> list[int]:
    """The end offsets of the chunks of *stream*, from its position to its end."""
    ends, end = [], 0
    for chunk in chunks(stream, sizes, read):
        end += len(chunk)
        ends.append(end)
    return ends


def chunks(stream: Source, sizes: ChunkSizes, read: int = READ) -> Iterator[memoryview]:
    """The chunks of *stream*, in order. An empty stream has none.

    Holds at most *read* plus ``sizes.max`` bytes, twice; *read* never changes the cuts.
    """
    rest = b""
    last = False
    while not last:
        fresh = _fill(stream, read)
        last = len(fresh) < read
        window = rest + fresh
        view = memoryview(window)
        start = 0
        for end in _select(boundaries(window, sizes.discriminator), len(window), sizes, last):
            yield view[start:end]
            start = end
        rest = window[start:]


def _fill(stream: Source, size: int) -> bytes:
    """*size* bytes of *stream*, or all that are left: a raw stream may give fewer at a time."""
    first = stream.read(size) or b""
    if not first or len(first) == size:
        return first
    parts, missing = [first], size - len(first)
    while missing and (part := stream.read(missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _select(marks: list[int], size: int, sizes: ChunkSizes, last: bool) -> Iterator[int]:
    """The cuts among the boundaries *marks* of a window of *size* bytes that starts with a chunk.

    A chunk that may go on behind the window is left out, unless the window is the *last*.
    """
    least = sizes.min + (1 if sizes.rule is Rule.DESYNC else 0)
    start = at = 0
    while start < size:
        at = bisect_left(marks, start + least, at)
        end = start + sizes.max
        if at < len(marks):
            end = min(end, marks[at])
        if end > size:
            if not last:
                return
            end = size
        yield end
        start = end


def boundaries(data: bytes | memoryview, discriminator: int) -> list[int]:
    """Every end offset in *data* whose last 48 bytes hash to a boundary, ascending."""
    source = np.frombuffer(data, np.uint8)
    table = _table()
    scratch = [np.empty(_BATCH + WINDOW, np.uint32) for _ in range(3)]
    divisor, wanted = np.uint32(discriminator), np.uint32(discriminator - 1)
    found: list[int] = []
    for start in range(0, len(source) - WINDOW + 1, _BATCH):
        batch = source[start : start + _BATCH + WINDOW - 1]
        hashes, spare = _hashes(batch, table, scratch)
        # NumPy divides by a constant with SIMD, which its remainder does not.
        np.floor_divide(hashes, divisor, out=spare)
        np.multiply(spare, divisor, out=spare)
        np.subtract(hashes, spare, out=spare)
        found += (np.flatnonzero(spare == wanted) + (start + WINDOW)).tolist()
    return found


def _hashes(batch: NDArray[np.uint8], table: Words, scratch: list[Words]) -> tuple[Words, Words]:
    """The buzhash of each 48 bytes of *batch*, and a spare array of the same length.

    The hash of a window is the XOR of its bytes' table values, each rotated left by its distance
    from the window's end. Hence windows of twice the length follow from two neighbours, and the
    one of 48 from those of 32 and 16, whose rotation by 32 is none.
    """
    size = len(batch)
    one, two, spare = (array[:size] for array in scratch)
    np.take(table, batch, out=one, mode="clip")
    _double(one, 1, two, spare)
    _double(two[: size - 1], 2, one, spare)
    _double(one[: size - 3], 4, two, spare)
    _double(two[: size - 7], 8, one, spare)
    sixteen, size = one[: size - 15], size - WINDOW + 1
    _double(sixteen, 16, two, spare)
    hashes = two[16 : 16 + size]
    np.bitwise_xor(hashes, sixteen[:size], out=hashes)
    return hashes, spare[:size]


def _double(windows: Words, length: int, out: Words, spare: Words) -> None:
    """From the hashes of all windows of *length* bytes, those of twice the length, into *out*."""
    size = len(windows) - length
    out, spare, older = out[:size], spare[:size], windows[:size]
    np.left_shift(older, length, out=out)
    np.right_shift(older, 32 - length, out=spare)
    np.bitwise_or(out, spare, out=out)
    np.bitwise_xor(out, windows[length:], out=out)


@cache
def _table() -> Words:
    return np.frombuffer(bytes.fromhex(_TABLE), ">u4").astype(np.uint32)
