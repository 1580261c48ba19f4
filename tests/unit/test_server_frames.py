"""The body of a batch of frames."""

from __future__ import annotations

import json

import pytest

from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.places import PackName, Span
from tidings_server import frames

NAME = "000001-0123456789abcdef.pack"
OTHER = "000002-0123456789abcdef.pack"
PACK = PackName.parse(NAME)


def body(*items: object, v: object = 1) -> bytes:
    return json.dumps({"v": v, "frames": items}).encode()


def test_neighbours_are_read_together_and_the_order_stays() -> None:
    batch = frames.parse(body([NAME, [8, 10, 18, 5, 40, 1, 8, 2]], [OTHER, [10, 3]]))
    other = PackName.parse(OTHER)
    assert batch.spans == (
        *(Span(PACK, 8, 15), Span(PACK, 40, 1), Span(PACK, 8, 2)),
        Span(other, 10, 3),
    )
    assert batch.size == 21
    assert batch.packs() == (PACK, other)


@pytest.mark.parametrize(
    "bad",
    [
        *(b"", b"[]", b"null", b"{", b"\xff", b"[" * 5000, b'{"v":1}'),
        *(body(v=1), body([NAME, [1, 1]], v=2), body([NAME, []]), body([NAME, [1]])),
        *(body([NAME, [0, 0]]), body([NAME, [-1, 1]]), body([NAME, [0, True]])),
        *(body([NAME, [0, 1.5]]), body([NAME, "01"]), body(["head.json", [0, 1]])),
        *(body(["../" + NAME, [0, 1]]), body([NAME]), body(NAME), body([1, [0, 1]])),
        body([NAME, [1 << 60, 1]]),
    ],
)
def test_bad_bodies(bad: bytes) -> None:
    with pytest.raises(FormatError):
        frames.parse(bad)


def test_limits() -> None:
    many = [0, 1] * frames.MOST_RANGES
    assert frames.parse(body([NAME, many])).size == frames.MOST_RANGES
    with pytest.raises(frames.TooMuch):
        frames.parse(body([NAME, [*many, 0, 1]]))
    with pytest.raises(frames.TooMuch):
        frames.parse(body([NAME, [0, frames.MOST_BYTES, 0, 1]]))
