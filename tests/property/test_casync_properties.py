"""casync's cuts against its algorithm a byte at a time, and round trips of the index."""

from __future__ import annotations

import io
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from tidings_chunkstore.errors import FormatError
from tidings_server.casync import CasyncId, CasyncIndex
from tidings_server.casync_chunker import _TABLE, WINDOW, ChunkSizes, Rule, cuts

TABLE = [int(word, 16) for word in _TABLE.split()]


class Trickle(io.RawIOBase):
    """A stream that gives a few bytes at a time, as sockets do."""

    def __init__(self, data: bytes, step: int) -> None:
        self._inner, self._step = io.BytesIO(data), step

    def read(self, size: int = -1) -> bytes:
        return self._inner.read(min(size, self._step))


def rotate(value: int, by: int) -> int:
    by %= 32
    return (value << by | value >> (32 - by)) & 0xFFFFFFFF


def slow_cuts(data: bytes, sizes: ChunkSizes) -> list[int]:
    """The programs' loop: skip to the window before min, fill it, roll."""
    ends, start, d = [], 0, sizes.discriminator
    while start < len(data):
        limit = min(start + sizes.max, len(data))
        at = start + sizes.min
        value = 0
        for byte in data[at - WINDOW : at]:
            value = rotate(value, 1) ^ TABLE[byte]
        tested = sizes.rule is Rule.CASYNC and value % d == d - 1
        while at < limit and not tested:
            value = rotate(value, 1) ^ rotate(TABLE[data[at - WINDOW]], WINDOW) ^ TABLE[data[at]]
            at += 1
            tested = value % d == d - 1
        start = min(at, limit)
        ends.append(start)
    return ends


small_sizes = st.builds(
    lambda least, more, rest, rule: ChunkSizes(least, least + more, least + more + rest, rule),
    st.integers(WINDOW, 80),
    st.integers(0, 100),
    st.integers(0, 400),
    st.sampled_from(Rule),
)
blobs = st.one_of(
    st.binary(max_size=3000),
    st.builds(
        lambda unit, count: (unit * count)[:4000], st.binary(max_size=40), st.integers(0, 99)
    ),
    st.builds(lambda seed, size: Random(seed).randbytes(size), st.integers(), st.integers(0, 6000)),
)


@given(blobs, small_sizes)
def test_cuts_are_those_of_the_loop(data: bytes, sizes: ChunkSizes) -> None:
    assert cuts(io.BytesIO(data), sizes) == slow_cuts(data, sizes)


@settings(max_examples=5, deadline=None)
@given(st.integers(), st.sampled_from(Rule))
def test_cuts_across_batches(seed: int, rule: Rule) -> None:
    data = Random(seed).randbytes(150_000)
    sizes = ChunkSizes(48, 192, 768, rule)
    assert cuts(io.BytesIO(data), sizes) == slow_cuts(data, sizes)


@given(blobs, small_sizes, st.integers(1, 5000), st.integers(1, 999))
def test_how_the_stream_is_read_never_matters(
    data: bytes, sizes: ChunkSizes, read: int, step: int
) -> None:
    assert cuts(Trickle(data, step), sizes, read) == cuts(io.BytesIO(data), sizes)


@given(blobs, small_sizes)
def test_index_round_trip(data: bytes, sizes: ChunkSizes) -> None:
    made = CasyncIndex.make(io.BytesIO(data), sizes)
    assert made.size == len(data)
    again = CasyncIndex.from_caibx(made.to_caibx())
    assert (again.sizes, again.ids, again.ends.tolist()) == (
        sizes,
        made.ids,
        cuts(io.BytesIO(data), sizes),
    )
    for number in range(len(again)):
        identity, offset, length = again.chunk(number)
        assert identity == CasyncId.of(data[offset : offset + length])


@given(st.binary(min_size=200, max_size=2000), st.data())
def test_damaged_index_is_refused_or_still_an_index(data: bytes, choose: st.DataObject) -> None:
    raw = bytearray(CasyncIndex.make(io.BytesIO(data), ChunkSizes(64, 128, 512)).to_caibx())
    at = choose.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= choose.draw(st.integers(1, 255))
    try:
        index = CasyncIndex.from_caibx(bytes(raw))
    except FormatError:
        return
    assert index.to_caibx() == bytes(raw)
