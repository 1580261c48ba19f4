"""Finds what a target can copy from its bases: the publish side of a delta, a pure function.

Both sides are cut by content (FastCDC), equal pieces are found by hash, and every hit is grown byte
by byte at both ends, so what counts is only that some piece of a common stretch is cut alike.
The bases are addressed as if they lay one after another.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import fastcdc

COARSE = 1024  #: average piece, bytes
FINE = 256  #: average piece where the sides have little in common, bytes
_PIECES = 1 << 19  #: about as many pieces of the bases are kept at most (about 150 bytes each)
_ALIKE = 32  #: equal pieces of the bases that are remembered, the first ones


class OutOfTime(Exception):
    """The deadline passed before the search was over."""


@dataclass(frozen=True, slots=True)
class Copy:
    """*length* bytes that stand at *target* in the target and at *source* in the joined bases."""

    target: int
    source: int
    length: int


def find_copies(
    bases: Sequence[memoryview],
    target: memoryview,
    grain: int,
    check: Callable[[], None] = lambda: None,
) -> list[Copy]:
    """Stretches of *target* that the *bases* hold: in target order, disjoint, each in one base.

    *grain* is the average piece in bytes (256 and more). *check* is called now and then and may
    raise to end the search.
    """
    starts = list(accumulate((len(base) for base in bases), initial=0))
    grain = _bounded_grain(grain, starts[-1])
    first, alike = _piece_table(bases, starts, grain, check)
    copies: list[Copy] = []
    covered = expected = 0
    for start, size, key in _pieces(target, grain, check):
        if start + size <= covered or key not in first:
            continue
        source = first[key]
        if source < expected and key in alike:
            # Of equal pieces the one after the last copy: contents mostly keep their order.
            places = alike[key]
            source = places[min(bisect_left(places, expected), len(places) - 1)]
        number = bisect_left(starts, source + 1) - 1
        base, begin = bases[number], starts[number]
        at = source - begin
        if start < covered:
            at, size, start = at + covered - start, size - (covered - start), covered
        if base[at : at + size].tobytes() != target[start : start + size].tobytes():
            continue  # two pieces with one hash
        back = common_suffix(base, at, target, start, min(at, start - covered))
        ahead = at + size, start + size
        length = back + size + common_prefix(base, ahead[0], target, ahead[1])
        copies.append(Copy(start - back, begin + at - back, length))
        covered = start - back + length
        expected = begin + at - back + length
    return copies


def common_prefix(one: memoryview, i: int, other: memoryview, j: int) -> int:
    """How many bytes are equal from ``one[i:]`` and ``other[j:]`` on."""
    limit = min(len(one) - i, len(other) - j)
    done, step = 0, 64
    while done < limit:
        step = min(step, limit - done)
        a = one[i + done : i + done + step].tobytes()
        b = other[j + done : j + done + step].tobytes()
        if a != b:
            return done + _first_difference(a, b)
        done += step
        step = min(step * 4, 1 << 16)
    return limit


def common_suffix(one: memoryview, i: int, other: memoryview, j: int, limit: int) -> int:
    """How many bytes, *limit* at most, are equal before ``one[i]`` and ``other[j]``."""
    done, step = 0, 64
    while done < limit:
        step = min(step, limit - done)
        a = one[i - done - step : i - done].tobytes()
        b = other[j - done - step : j - done].tobytes()
        if a != b:
            return done + _first_difference(a[::-1], b[::-1])
        done += step
        step = min(step * 4, 1 << 16)
    return limit


def _first_difference(a: bytes, b: bytes) -> int:
    """Index of the first byte that differs; a and b differ and are equally long."""
    low, high = 0, len(a)
    while high - low > 64:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    both = int.from_bytes(a[low:high], "little") ^ int.from_bytes(b[low:high], "little")
    return low + ((both & -both).bit_length() - 1) // 8


def _bounded_grain(grain: int, size: int) -> int:
    """The grain, doubled until *size* bytes are not too many pieces."""
    while size // grain > _PIECES and grain < 1 << 16:
        grain *= 2
    return grain


def _piece_table(
    bases: Sequence[memoryview], starts: Sequence[int], grain: int, check: Callable[[], None]
) -> tuple[dict[int, int], dict[int, list[int]]]:
    """Where each piece stands in the joined bases first, and the places of those that recur."""
    first: dict[int, int] = {}
    alike: dict[int, list[int]] = {}
    for base, begin in zip(bases, starts, strict=False):
        for start, _, key in _pieces(base, grain, check):
            place = begin + start
            if first.setdefault(key, place) != place:
                places = alike.setdefault(key, [first[key]])
                if len(places) < _ALIKE:
                    places.append(place)
    return first, alike


def _pieces(
    data: memoryview, grain: int, check: Callable[[], None]
) -> Iterator[tuple[int, int, int]]:
    """Offset, size and hash of each piece; the hash is the interpreter's, keyed for this run."""
    cuts = fastcdc.fastcdc(data, max(64, grain // 4), grain, grain * 8)
    for number, cut in enumerate(cuts):
        if not number & 0xFFF:
            check()
        start, size = cut.offset, cut.length
        yield start, size, hash(data[start : start + size])
