"""Reconcile: any base, any edits, any bytes."""

from __future__ import annotations

import io
import random
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from tidings_chunkstore.delta import Budget, reader_of
from tidings_chunkstore.errors import FormatError, VerificationError
from tidings_chunkstore.ids import ContentId
from tidings_chunkstore.reconcile import (
    Common,
    Inquiry,
    NotPromisingError,
    Run,
    decode_inquiries,
    decode_list,
    decode_table,
    encode_inquiries,
    encode_list,
    encode_table,
    find_common,
    make_answer,
    make_table,
    rebuild,
    survey,
)

SIZE = 400_000
BASE = random.Random(1).randbytes(SIZE)

edits = st.lists(
    st.tuples(
        st.integers(0, SIZE),  # where
        st.integers(0, 40_000),  # bytes removed
        st.integers(0, 20_000),  # bytes put there
        st.integers(0, SIZE),  # taken from here, or new when odd
    ),
    max_size=6,
)


def edited(base: bytes, changes: list[tuple[int, int, int, int]]) -> bytes:
    data = bytearray(base)
    for at, removed, added, source in changes:
        piece = random.Random(source).randbytes(added) if source & 1 else base[source:][:added]
        data[at : at + removed] = piece
    return bytes(data)


@settings(max_examples=40)
@given(edits, edits)
def test_any_edit_of_any_base_comes_out_right(
    first: list[tuple[int, int, int, int]], then: list[tuple[int, int, int, int]]
) -> None:
    base = edited(BASE, first)
    target = edited(base, then)
    table = make_table(ContentId.of(target), target)
    assert decode_table(encode_table(table)) == table
    try:
        found = survey(io.BytesIO(base), decode_list(encode_list(table)))
        common = find_common(table, found.inquiry)
    except NotPromisingError:
        return
    # No byte of the target twice.
    spans = sorted(common.spans)
    assert all(one[1] <= other[0] for one, other in pairwise(spans))
    answer = make_answer(table.target, target, common, Budget(1.0))
    if answer is None:
        return
    out = io.BytesIO()
    rebuild(answer, reader_of(base), found, table.target, out.write)
    assert out.getvalue() == target


runs = st.lists(
    st.builds(Run, st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 5)), max_size=8
)


@given(runs, st.integers(4, 8), st.text("abc-é", min_size=1, max_size=8))
def test_inquiries_survive_the_wire(made: list[Run], id_size: int, track: str) -> None:
    total = sum(run.fine for run in made)
    ids = tuple(number.to_bytes(id_size, "big") for number in range(total))
    sent = [(track, Inquiry(tuple(made), id_size, ids)), ("other" + track, Inquiry((), 4, ()))]
    assert decode_inquiries(encode_inquiries(sent)) == sent


TABLE = make_table(ContentId.of(BASE), BASE)
LIST = encode_list(TABLE)
FOUND = survey(io.BytesIO(edited(BASE, [(200_000, 100, 50, 1)])), decode_list(LIST))
REQUEST = encode_inquiries([("primary", FOUND.inquiry)])


@given(st.binary(max_size=200))
def test_garbage_is_malformed_or_an_inquiry(data: bytes) -> None:
    for sent in (data, b"TDQ1" + data, b"TDQ1\x01\x01p" + data):
        try:
            for _, inquiry in decode_inquiries(sent):
                find_common(TABLE, inquiry)
        except (FormatError, NotPromisingError):
            continue


@given(st.integers(0, len(REQUEST) - 1), st.integers(1, 255))
def test_a_flipped_request_is_refused_or_bounded(at: int, bits: int) -> None:
    data = bytearray(REQUEST)
    data[at] ^= bits
    try:
        for _, inquiry in decode_inquiries(bytes(data)):
            common: Common = find_common(TABLE, inquiry)
            assert common.size <= TABLE.size
    except (FormatError, NotPromisingError):
        pass


@settings(max_examples=60)
@given(st.integers(0, len(LIST) - 1), st.integers(1, 255))
def test_a_flipped_list_never_gives_a_wrong_content(at: int, bits: int) -> None:
    data = bytearray(LIST)
    data[at] ^= bits
    base = edited(BASE, [(200_000, 100, 50, 1)])
    try:
        chunks = decode_list(bytes(data))
        found = survey(io.BytesIO(base), chunks)
        common = find_common(TABLE, found.inquiry)
    except (FormatError, VerificationError):
        return
    answer = make_answer(TABLE.target, BASE, common, Budget(1.0))
    assert answer is not None
    out = io.BytesIO()
    try:
        rebuild(answer, reader_of(base), found, TABLE.target, out.write)
    except (FormatError, VerificationError):
        return
    assert out.getvalue() == BASE
