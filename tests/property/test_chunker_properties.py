"""Chunking as a function: the cuts cover, bound, agree between paths and survive edits."""

from __future__ import annotations

import io
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tidings_chunkstore.chunker import ChunkerParams, chunk_ids, cuts, scan


@st.composite
def parameters(draw: st.DrawFn) -> ChunkerParams:
    average = draw(st.integers(256, 4096))
    minimum = draw(st.integers(64, average))
    return ChunkerParams.of(minimum, average, draw(st.integers(max(1024, average), 20_000)))


@st.composite
def contents(draw: st.DrawFn, most: int = 200_000) -> bytes:
    """Random, repetitive or constant bytes; large, so made from a drawn seed."""
    generator = random.Random(draw(st.integers(0, 2**32)))
    size = draw(st.integers(0, most))
    match draw(st.sampled_from(["random", "text", "runs"])):
        case "random":
            return generator.randbytes(size)
        case "text":
            return bytes(generator.choices(b"<>abc \n", k=size))
        case _:
            return b"".join(bytes([generator.randrange(256)]) * 5000 for _ in range(40))[:size]


@settings(deadline=None)
@given(contents(), parameters())
def test_cuts_cover_the_data_within_the_bounds(data: bytes, params: ChunkerParams) -> None:
    ends = cuts(data, params)
    starts = [0, *ends][:-1]
    assert (ends[-1] if ends else 0) == len(data)
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    assert all(0 < length <= params.max for length in lengths)
    assert all(length > params.min or params.min == params.max for length in lengths[:-1])
    assert len(chunk_ids(data, ends)) == len(ends)


@settings(deadline=None)
@given(contents(), parameters(), st.integers(1, 100_000))
def test_windows_cut_as_the_whole(data: bytes, params: ChunkerParams, window: int) -> None:
    found = list(scan(io.BytesIO(data), params, window=window))
    assert [end for end, _ in found] == cuts(data, params)
    assert b"".join(chunk for _, chunk in found) == data


@settings(deadline=None, max_examples=25)
@given(contents(most=30_000), parameters())
def test_pure_python_cuts_alike(data: bytes, params: ChunkerParams) -> None:
    cuts(b"", params)  # the first import of the library, with its stdout kept clean
    from fastcdc.fastcdc_py import fastcdc_py

    slow = [c.offset + c.length for c in fastcdc_py(data, params.min, params.avg, params.max)]
    assert slow == cuts(data, params)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 99_999), st.binary(max_size=500))
def test_an_edit_changes_few_chunks(seed: int, position: int, insert: bytes) -> None:
    data = random.Random(seed).randbytes(100_000)
    params = ChunkerParams.of(256, 1024, 8192)
    edited = data[:position] + insert + data[position:]
    old = set(chunk_ids(data, cuts(data, params)))
    new = chunk_ids(edited, cuts(edited, params))
    assert sum(chunk not in old for chunk in new) <= 12
