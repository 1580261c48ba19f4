"""Recipes as properties: what is made opens to the content, what is found makes the bytes."""

from __future__ import annotations

import io
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.recipe import Codec, Recipe, available, find, open_stream, run

HEADERS = st.binary(min_size=6, max_size=6).map(lambda tail: b"\x1f\x8b\x08\0" + tail)
RECIPES = st.one_of(
    st.builds(
        lambda level, memory, header: Recipe(Codec.GZ, "zlib", (level, memory), header),
        st.integers(1, 9),
        st.sampled_from((8, 9)),
        HEADERS,
    ),
    st.builds(
        lambda name, level, flags: Recipe(Codec.ZST, name, (level, flags)),
        st.sampled_from(("zstd-1.5.6", "zstd-1.5.7")),
        st.integers(1, 12),
        st.sampled_from((0, 1)),
    ),
    st.builds(
        lambda preset, check: Recipe(Codec.XZ, "liblzma", (preset, 0, check)),
        st.integers(0, 2),
        st.sampled_from((0, 1, 4, 10)),
    ),
    st.builds(lambda level: Recipe(Codec.BZ2, "bzip2", (level,)), st.integers(1, 9)),
)
WORDS = st.lists(
    st.one_of(st.binary(max_size=40), st.sampled_from((b"<package>", b"name" * 30))), max_size=40
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=12,
)


@settings(max_examples=120, deadline=None)
@given(RECIPES, WORDS)
def test_round_trip(recipe: Recipe, words: list[bytes]) -> None:
    if not available(recipe):
        return
    content = b"".join(words)
    published = b"".join(run(recipe, words))
    assert published == b"".join(run(recipe, [content]))
    opened = b"".join(open_stream(io.BytesIO(published), recipe.codec, limit=len(content)))
    assert opened == content
    found = find(published, content, recipe.codec, recipe)
    assert found is not None
    assert b"".join(run(found.recipe, words)) == published
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@settings(max_examples=100, deadline=None)
@given(RECIPES, WORDS, st.data())
def test_damaged_bytes_open_or_are_format_errors(
    recipe: Recipe, words: list[bytes], data: st.DataObject
) -> None:
    if not available(recipe):
        return
    published = bytearray(b"".join(run(recipe, words)))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(published) - 1))
        published[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(published)))
    content = b"".join(words)
    try:
        opened = b"".join(
            open_stream(io.BytesIO(bytes(published[:cut])), recipe.codec, limit=100_000)
        )
    except FormatError:
        opened = None
    assert opened is None or len(opened) <= 100_000
    found = find(bytes(published[:cut]), content, recipe.codec, recipe)
    if found is not None:
        assert b"".join(run(found.recipe, [content])) == published[:cut]


@settings(max_examples=300, deadline=None)
@given(
    JSON
    | st.fixed_dictionaries({"c": JSON | st.sampled_from(list(Codec)), "e": JSON, "p": JSON})
    | st.fixed_dictionaries(
        {
            "c": st.sampled_from([str(codec) for codec in Codec]),
            "e": st.sampled_from(["zlib", "gzip-1", "zstd-1.5.6", "liblzma", "bzip2", "x"]),
            "p": st.lists(st.integers(-2, 30), max_size=6),
        },
        optional={"h": JSON | st.just("AAAAAAAAAw"), "s": JSON},
    )
)
def test_any_json_is_a_recipe_or_a_format_error(value: object) -> None:
    try:
        recipe = Recipe.from_json(value)
    except FormatError:
        return
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
