"""zchunk as properties: any chunking builds and comes back, no bytes do harm."""

from __future__ import annotations

import io
from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from tidings_chunkstore import engines, zck
from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.recipe import Codec, find, open_stream, run

CHUNKS = st.lists(
    st.one_of(st.binary(max_size=60), st.sampled_from((b"<package>" * 30, b"name", b""))),
    max_size=12,
)
MAKER = engines.zstd_makers()["zstd-1.5.7"][1]


@st.composite
def rebuilds(draw: st.DrawFn) -> tuple[zck.Rebuild, bytes]:
    chunks = draw(CHUNKS)
    dictionary = draw(st.sampled_from((b"", b"<package>name" * 9)))
    level = draw(st.sampled_from((0, 9, 10)))
    how = zck.Rebuild(
        level,
        7 if level else 0,
        draw(st.integers(0, 3)),
        draw(st.integers(0, 3)),
        draw(st.sampled_from((0, 4))),
        draw(st.booleans()),
        array("q", [len(dictionary), *map(len, chunks)]),
        dictionary,
        {},
    )
    return how, b"".join(chunks)


@settings(max_examples=150, deadline=None)
@given(rebuilds())
def test_round_trip(made: tuple[zck.Rebuild, bytes]) -> None:
    how, content = made
    published = b"".join(zck.build(how, [content], MAKER))
    assert b"".join(open_stream(io.BytesIO(published), Codec.ZCK, limit=10_000)) == content
    found = find(published, content, Codec.ZCK)
    assert found is not None
    assert b"".join(run(found.recipe, [content], found.sides)) == published
    again = zck.Rebuild.of(how.params, how.sides())
    assert again == how


@settings(max_examples=150, deadline=None)
@given(rebuilds(), st.data())
def test_damage_is_a_format_error_or_other_bytes(
    made: tuple[zck.Rebuild, bytes], data: st.DataObject
) -> None:
    how, content = made
    published = bytearray(b"".join(zck.build(how, [content], MAKER)))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(published) - 1))
        published[place] = data.draw(st.integers(0, 255))
    cut = bytes(published[: data.draw(st.integers(0, len(published)))])
    try:
        opened = b"".join(open_stream(io.BytesIO(cut), Codec.ZCK, limit=10_000))
    except FormatError:
        opened = b""
    assert len(opened) <= len(content)
    found = find(cut, content, Codec.ZCK)
    assert found is None or b"".join(run(found.recipe, [content], found.sides)) == cut


@settings(max_examples=300, deadline=None)
@given(rebuilds(), st.lists(st.binary(max_size=40), max_size=3), st.integers(0, 7))
def test_any_side_contents_build_or_are_a_format_error(
    made: tuple[zck.Rebuild, bytes], sides: list[bytes], parts: int
) -> None:
    how, content = made
    params = (*how.params[:5], parts)
    for given_sides in (sides, [how.sides()[0], *sides], [*how.sides(), *sides]):
        try:
            b"".join(zck.build(zck.Rebuild.of(params, given_sides), [content], MAKER))
        except FormatError:
            continue
