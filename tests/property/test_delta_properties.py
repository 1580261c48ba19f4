"""Whatever was edited, and whatever the bases: a section leads to its target, or is None."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tidings_chunkstore import delta, deltamake
from tidings_chunkstore.delta import Buffer, reader_of
from tidings_chunkstore.errors import FormatError, VerificationError
from tidings_chunkstore.ids import ContentId
from tidings_chunkstore.match import common_prefix, common_suffix, find_copies

edits = st.lists(
    st.tuples(
        st.sampled_from(["insert", "delete", "replace", "move", "repeat"]),
        st.floats(0, 1),
        st.integers(0, 3000),
    ),
    max_size=8,
)


def content(seed: int, size: int, alphabet: int) -> bytes:
    draw = random.Random(seed)
    words = [
        bytes(draw.randrange(alphabet) for _ in range(draw.randrange(1, 30))) for _ in range(200)
    ]
    result = bytearray()
    while len(result) < size:
        result += draw.choice(words)
    return bytes(result[:size])


def edited(data: bytes, steps: list[tuple[str, float, int]]) -> bytes:
    for number, (kind, where, length) in enumerate(steps):
        at = int(where * len(data))
        piece = data[at : at + length]
        if kind == "insert":
            data = data[:at] + content(number, length, 256) + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + length :]
        elif kind == "replace":
            data = data[:at] + content(number, len(piece), 64) + data[at + length :]
        elif kind == "move":
            data = piece + data[:at] + data[at + length :]
        else:
            data = data[:at] + piece * 3 + data[at:]
    return data


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 50),
    st.integers(0, 60000),
    st.sampled_from([1, 4, 256]),
    edits,
    st.integers(0, 3),
)
def test_random_edits_of_any_bases(
    seed: int, size: int, alphabet: int, steps: list[tuple[str, float, int]], others: int
) -> None:
    old = content(seed, size, alphabet)
    bases = [content(seed + n, size // n, alphabet) for n in range(1, others + 1)]
    bases.insert(seed % (others + 1), old)
    target = edited(old, steps)
    section = deltamake.make([(ContentId.of(b), b) for b in bases], ContentId.of(target), target)
    assert section is not None
    result = bytearray()
    delta.apply(section, [reader_of(base) for base in bases], result.extend)
    assert result == target


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), edits)
def test_copies_hold_what_they_say(seed: int, steps: list[tuple[str, float, int]]) -> None:
    one, two = content(seed, 20000, 8), content(seed + 1, 30000, 256)
    target = edited(one + two, steps)
    end = 0
    for copy in find_copies([memoryview(one), memoryview(two)], memoryview(target), 256):
        assert copy.target >= end
        end = copy.target + copy.length
        joined = (one + two)[copy.source : copy.source + copy.length]
        assert joined == target[copy.target : end]
        assert (copy.source < len(one)) == (copy.source + copy.length <= len(one))


@given(st.binary(max_size=300), st.binary(max_size=300), st.binary(max_size=300))
def test_common_ends(same: bytes, one: bytes, other: bytes) -> None:
    def expected(a: bytes, b: bytes) -> int:
        return next(
            (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
        )

    a, b = same + one, same + other
    assert common_prefix(memoryview(a), 0, memoryview(b), 0) == expected(a, b)
    a, b = one + same, other + same
    limit = min(len(a), len(b))
    found = common_suffix(memoryview(a), len(a), memoryview(b), len(b), limit)
    assert found == expected(a[::-1], b[::-1])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_garbage_is_a_format_error_and_nothing_else(garbage: bytes, magic: bool) -> None:
    rest = garbage
    section = delta.MAGIC + delta.checksum(memoryview(rest)) + rest if magic else garbage
    written: list[Buffer] = []
    try:
        delta.apply(section, [reader_of(b"some base")], written.append)
    except (FormatError, VerificationError):
        return
    raise AssertionError("garbage was applied")
