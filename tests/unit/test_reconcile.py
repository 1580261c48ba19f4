"""Reconcile's formats and both sides of it: what they agree on, what it costs, what is refused."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest

from tidings_chunkstore import delta, reconcile
from tidings_chunkstore.delta import Budget, reader_of
from tidings_chunkstore.errors import FormatError, VerificationError
from tidings_chunkstore.ids import ContentId
from tidings_chunkstore.limits import KIB, LIMITS, Limits
from tidings_chunkstore.reconcile import (
    ANSWER_MAGIC,
    CoarseList,
    Common,
    Inquiry,
    NotPromisingError,
    Run,
    Survey,
    Table,
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
from tidings_chunkstore.wire import uvarints

VECTORS = Path(__file__).parent.parent / "vectors" / "reconcile.json"


def records(count: int, seed: int = 1) -> list[bytes]:
    """Lines like those of package metadata: alike, each with a digest of its own."""
    draw = random.Random(seed)
    return [
        b"<package><name>p%05d</name><pkgid>%064x</pkgid><size>%d</size>\n"
        b"  <file>/usr/share/%d</file></package>\n"
        % (number, draw.getrandbits(256), draw.randrange(10**7), number * 7)
        for number in range(count)
    ]


def changed(lines: list[bytes], count: int, seed: int = 2) -> list[bytes]:
    """*count* lines replaced, spread evenly."""
    fresh = records(len(lines), seed)
    result = list(lines)
    for number in range(0, len(lines), max(1, len(lines) // count)):
        result[number] = fresh[number]
    return result


def both(base: bytes, target: bytes) -> tuple[Table, CoarseList, Survey, Common]:
    """One exchange up to what is common, over the wire's bytes."""
    table = make_table(ContentId.of(target), target)
    chunks = decode_list(encode_list(table))
    found = survey(io.BytesIO(base), chunks)
    ((track, inquiry),) = decode_inquiries(encode_inquiries([("primary", found.inquiry)]))
    assert track == "primary"
    assert inquiry == found.inquiry
    return table, chunks, found, find_common(table, inquiry)


def exchange(base: bytes, target: bytes) -> tuple[bytes, Survey]:
    table, _, found, common = both(base, target)
    answer = make_answer(table.target, target, common, Budget())
    assert answer is not None
    return answer, found


def applied(answer: bytes, base: bytes, found: Survey, target: bytes) -> bytes:
    out = io.BytesIO()
    rebuild(answer, reader_of(base), found, ContentId.of(target), out.write)
    return out.getvalue()


OLD = records(8000)
BASE = b"".join(OLD)
TARGET = b"".join(changed(OLD, 20))


# -- it works, and costs what it should ------------------------------------------------------------


def test_a_target_is_rebuilt_from_a_base_that_the_server_never_saw() -> None:
    answer, found = exchange(BASE, TARGET)
    assert applied(answer, BASE, found, TARGET) == TARGET
    request = encode_inquiries([("primary", found.inquiry)])
    table = make_table(ContentId.of(TARGET), TARGET)
    cost = len(encode_list(table)) + len(request) + len(answer)
    assert cost < 25_000  # 20 of 8,000 records; 1.2 MB open
    assert len(answer) < 12_000


def test_what_is_asked_about_lies_in_unmatched_chunks_alone() -> None:
    table, chunks, found, common = both(BASE, TARGET)
    assert found.common > len(BASE) // 2
    asked = sum(end - start for spans in found.asked for start, end in spans)
    assert asked + found.common <= len(BASE)
    assert found.inquiry.id_size == 4
    assert chunks.id_size == 5
    # The fine ids find most of what no coarse chunk has.
    assert common.size > found.common
    assert common.size > len(TARGET) * 0.97
    assert table.size == len(TARGET)


def test_both_sides_put_together_the_same_text() -> None:
    _, _, found, common = both(BASE, TARGET)
    theirs = b"".join(TARGET[start:end] for start, end in common.spans)
    ours, number = b"", 0
    for known, asked in zip(found.known, found.asked, strict=True):
        ours += b"".join(BASE[start:end] for start, end in known)
        for start, end in asked:
            if common.bitmap[number >> 3] >> (number & 7) & 1:
                ours += BASE[start:end]
            number += 1
    assert ours == theirs


def test_no_byte_of_the_target_is_common_twice() -> None:
    base = BASE + BASE  # every chunk recurs
    table, _, found, common = both(base, TARGET)
    assert common.size <= table.size
    assert sum(run.count for run in found.inquiry.runs) <= len(table.coarse_ends)
    answer = make_answer(table.target, TARGET, common, Budget())
    assert answer is not None
    assert applied(answer, base, found, TARGET) == TARGET


def test_equal_contents_need_no_fine_ids() -> None:
    answer, found = exchange(BASE, BASE)
    assert found.inquiry.ids == ()
    assert [run.fine for run in found.inquiry.runs] == [0]
    assert len(answer) < 120
    assert applied(answer, BASE, found, BASE) == BASE


def test_records_that_moved_are_found() -> None:
    target = b"".join([*OLD[4000:], *OLD[:4000]])
    answer, found = exchange(BASE, target)
    assert applied(answer, BASE, found, target) == target
    assert len(answer) < 6_000


def test_ids_grow_with_what_they_are_compared_with() -> None:
    _, few, _, _ = both(BASE, TARGET)
    assert few.id_size == 5
    ids = tuple(number.to_bytes(5, "big") for number in range(9000))
    many = CoarseList(few.target, 1 << 27, few.coarse, few.fine, 5, ids)
    with pytest.raises(NotPromisingError):
        survey(io.BytesIO(BASE), many)
    part = CoarseList(few.target, 1 << 27, few.coarse, few.fine, 5, few.ids[:20] + ids)
    found = survey(io.BytesIO(BASE), part)
    assert found.inquiry.id_size == 5
    assert len(found.inquiry.ids) * 144_000 << 10 > 1 << 32


def test_a_table_survives_the_cache() -> None:
    table = make_table(ContentId.of(TARGET), TARGET)
    assert decode_table(encode_table(table)) == table
    empty = make_table(ContentId.of(b""), b"")
    assert decode_table(encode_table(empty)) == empty
    assert empty.size == 0
    data = bytearray(encode_table(table))
    data[len(data) // 2] ^= 1
    with pytest.raises(FormatError, match="damaged"):
        decode_table(bytes(data))


# -- a base that does not pay ----------------------------------------------------------------------


def test_a_strange_base_is_not_even_asked_about() -> None:
    table = make_table(ContentId.of(TARGET), TARGET)
    chunks = decode_list(encode_list(table))
    with pytest.raises(NotPromisingError):
        survey(io.BytesIO(b"".join(records(8000, seed=9))), chunks)


def test_less_than_half_in_common_is_refused_before_a_delta_is_made() -> None:
    target = b"".join(OLD[:3000] + records(5000, seed=7))
    base = b"".join(OLD[:3000])
    table = make_table(ContentId.of(target), target)
    found = survey(io.BytesIO(base), decode_list(encode_list(table)))
    with pytest.raises(NotPromisingError):
        find_common(table, found.inquiry)


def test_an_inquiry_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = random.Random(3).randbytes(3 * 1024 * KIB)
    target = BASE + noise[:KIB]
    chunks = decode_list(encode_list(make_table(ContentId.of(target), target)))
    small = Limits(reconcile_request=4 * KIB)
    monkeypatch.setattr(reconcile, "LIMITS", small)
    with pytest.raises(NotPromisingError, match="too many"):
        survey(io.BytesIO(BASE + noise), chunks)


# -- bytes that do not follow the format -----------------------------------------------------------


@pytest.mark.parametrize(
    ("inquiry", "what"),
    [
        (Inquiry((Run(0, 10_000, 0),), 4, ()), "not in the list"),
        (Inquiry((Run(3, 1, 0), Run(3, 1, 0)), 4, ()), "twice"),
        (Inquiry((Run(2, 3, 0), Run(0, 3, 0)), 4, ()), "twice"),
        (Inquiry((Run(9_999_999, 0, 0),), 4, ()), "not in the list"),
    ],
)
def test_runs_lie_in_the_list_once(inquiry: Inquiry, what: str) -> None:
    table = make_table(ContentId.of(TARGET), TARGET)
    ((_, read),) = decode_inquiries(encode_inquiries([("primary", inquiry)]))
    with pytest.raises(FormatError, match=what):
        find_common(table, read)


def _request(*numbers: int, tail: bytes = b"", track: bytes = b"p") -> bytes:
    return b"TDQ1" + uvarints([1, len(track)]) + track + uvarints(numbers) + tail


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"TDQ1",
        b"TDQ2\x00",
        b"TDQ1\x00",  # no track
        _request(0, tail=b"\x03"),  # ids of 3 bytes
        _request(0, tail=b"\x09"),
        _request(0, tail=b"\x04more"),
        _request(1, 1, 0, 0, tail=b"\x04"),  # before the first chunk
        _request(1, 0, 0, 1_000_000, tail=b"\x04" + bytes(100)),  # a million ids, 25 sent
        _request(1 << 40),
        _request(1, 1 << 62, 0, 0, tail=b"\x04"),
        _request(0, tail=b"\x04", track=b"\xff"),
        b"TDQ1" + uvarints([2]) + 2 * (uvarints([1]) + b"p" + uvarints([0]) + b"\x04"),
        b"TDQ1" + uvarints([65]),
        b"\x80" * 100,
    ],
)
def test_malformed_requests_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode_inquiries(data)


def test_a_fine_piece_counts_once_and_only_outside_of_named_chunks() -> None:
    table = make_table(ContentId.of(TARGET), TARGET)
    count = len(table.coarse_ends)
    last = table.first[count - 1]  # the first fine piece of the last chunk
    outside, inside = (table.fine_ids[8 * at :][:4] for at in (last, 0))
    asked = (outside, outside, inside, bytes(4))
    common = find_common(table, Inquiry((Run(0, count - 1, 4),), 4, asked))
    assert common.bitmap == b"\x01"
    assert common.spans == ((0, table.fine_span(last)[1]),)


def test_a_request_above_the_limit_is_not_read() -> None:
    with pytest.raises(FormatError, match="larger"):
        decode_inquiries(b"TDQ1" + bytes(LIMITS.reconcile_request))


def _list(
    size: int = 100_000,
    chunker: int = 1,
    coarse: tuple[int, ...] = (4096, 16384, 131072),
    fine: tuple[int, ...] = (256, 1024, 8192),
    count: int = 2,
    id_size: int = 5,
    ids: bytes = bytes(10),
) -> bytes:
    head = b"TDR1" + bytes(32) + uvarints([size, chunker, *coarse, *fine, count])
    return head + bytes([id_size]) + ids


def test_the_list_that_the_others_differ_from_is_read() -> None:
    assert decode_list(_list()).ids == (bytes(5), bytes(5))


@pytest.mark.parametrize(
    "data",
    [
        b"TDR2" + _list()[4:],
        _list(chunker=2),
        _list(size=LIMITS.reconcile_content + 1),
        _list(coarse=(64, 256, 1024)),  # a million chunks
        _list(coarse=(16384, 4096, 131072)),
        _list(coarse=(4096, 16384, LIMITS.chunk + 1)),
        _list(fine=(32, 1024, 8192)),
        _list(fine=(4096, 32768, 131072)),  # coarser than coarse
        _list(count=3),
        _list(count=1),
        _list(count=1_000_000, ids=bytes(5_000_000)),  # more than the size has
        _list(id_size=4, ids=bytes(8)),
        _list(id_size=9, ids=bytes(18)),
        _list()[:-1],
        _list() + b"\0",
    ],
)
def test_malformed_lists_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode_list(data)


def test_every_damaged_answer_ends_in_an_error() -> None:
    answer, found = exchange(BASE, TARGET)
    for cut in range(0, len(answer), max(1, len(answer) // 40)):
        with pytest.raises((FormatError, VerificationError)):
            applied(answer[:cut], BASE, found, TARGET)
    for at in range(0, len(answer), max(1, len(answer) // 60)):
        damaged = bytearray(answer)
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises((FormatError, VerificationError)):
            applied(bytes(damaged), BASE, found, TARGET)


def test_an_answer_to_another_question_is_refused() -> None:
    answer, found = exchange(BASE, TARGET)
    with pytest.raises(FormatError, match="another content"):
        applied(answer, BASE, found, BASE)
    other = b"".join(changed(OLD, 30, seed=5))
    _, another = exchange(other, TARGET)
    with pytest.raises((FormatError, VerificationError)):
        applied(answer, other, another, TARGET)
    with pytest.raises(VerificationError):  # the base has changed meanwhile
        applied(answer, BASE[:-100_000] + bytes(100_000), found, TARGET)


def test_a_false_match_is_noticed() -> None:
    table, _, found, common = both(BASE, TARGET)
    text = bytearray(TARGET)
    start = common.spans[0][0]
    text[start + 10] ^= 1  # the server believes a chunk to be another than the client has
    answer = make_answer(ContentId.of(bytes(text)), bytes(text), common, Budget())
    assert answer is not None
    with pytest.raises(VerificationError):
        out = io.BytesIO()
        rebuild(answer, reader_of(BASE), found, ContentId.of(bytes(text)), out.write)
    assert table.target == ContentId.of(TARGET)


# -- the format is pinned --------------------------------------------------------------------------


def test_vectors() -> None:
    pinned = json.loads(VECTORS.read_text())
    old = records(pinned["records"])
    base, target = b"".join(old), b"".join(changed(old, pinned["changed"]))
    table, _, found, common = both(base, target)
    assert ContentId.of(base).hex() == pinned["base"]
    assert encode_list(table).hex() == pinned["list"]
    assert encode_inquiries([("primary", found.inquiry)]).hex() == pinned["request"]
    assert common.bitmap.hex() == pinned["bitmap"]
    assert [list(span) for span in common.spans] == pinned["spans"]
    # The delta's own bytes hang on the codecs' versions; an old answer must be read for ever.
    answer = bytes.fromhex(pinned["answer"])
    assert answer.startswith(ANSWER_MAGIC + common.bitmap + delta.MAGIC)
    assert applied(answer, base, found, target) == target
