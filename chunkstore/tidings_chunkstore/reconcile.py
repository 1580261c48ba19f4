"""Reconcile: a delta against a base that nobody but the client has seen. Formats, and both sides.

The server cuts the target coarsely and hands out a *list* of short ids. The client cuts its base
alike, and *surveys* it: chunks that stand in the list are common, the others are cut finely and
asked about by short ids. From this *inquiry* the server knows a text that both sides can put
together, each from its own content: the *common text*, all common pieces in the order in which
they stand in the client's base. What it answers is a bitmap of the fine pieces that it knew, and
an ordinary delta section with the common text as its only base.

Ids are cut so short that a false match happens now and then; the SHA-256 of the target notices.
Byte tables: docs/protocol.md, "Reconcile"; the reasons: docs/adr/0005-reconcile.md.
Pure but for reading the base; ``fastcdc`` and ``blake3`` are loaded when something is cut.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import BinaryIO

from . import delta
from .chunker import ChunkerParams, chunk_id, cuts, scan
from .errors import FormatError, VerificationError
from .ids import ContentId
from .limits import KIB, LIMITS
from .wire import Reader, put_uvarint, uvarints

LIST_MAGIC = b"TDR1"
INQUIRY_MAGIC = b"TDQ1"
ANSWER_MAGIC = b"TDA1"
TABLE_MAGIC = b"TDT1"

COARSE = ChunkerParams.of(4 * KIB, 16 * KIB, 128 * KIB)
FINE = ChunkerParams.of(256, 1 * KIB, 8 * KIB)

_CHUNKER = 1  #: number of ``fastcdc-ronomon``, as in an index
_ID = 8  #: bytes of an id in a table: the longest that goes over the wire
_COARSE_IDS = range(5, _ID + 1)
_FINE_IDS = range(4, _ID + 1)
_LIST_ODDS = 16  #: log2 of lists in which one false match is borne
_FINE_ODDS = 10  #: the same of inquiries: a false match there costs one update another route
_LEAST_COMMON = 2  #: at least 1/2 of the target, or no delta is made
_PROMISING = 8  #: at least 1/8 of the base in coarse chunks, or the client does not ask

Span = tuple[int, int]  #: start and end, in bytes


class NotPromisingError(VerificationError):
    """The base has too little in common with the target."""

    code = "not-alike"


# -- the server: what it knows of a target ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Table:
    """A target's coarse chunks, and the fine pieces of each: ends in bytes, ids of 8 bytes.

    ``first[i]`` is the number of the first fine piece of coarse chunk i; its last item counts all.
    """

    target: ContentId
    coarse_ends: array[int]
    coarse_ids: bytes
    fine_ends: array[int]
    fine_ids: bytes
    first: array[int]

    @property
    def size(self) -> int:
        """Bytes of the target."""
        return self.coarse_ends[-1] if self.coarse_ends else 0

    def coarse_span(self, number: int) -> Span:
        """Where coarse chunk *number* lies in the target."""
        return (self.coarse_ends[number - 1] if number else 0), self.coarse_ends[number]

    def fine_span(self, number: int) -> Span:
        """Where fine piece *number* lies in the target."""
        return (self.fine_ends[number - 1] if number else 0), self.fine_ends[number]


def make_table(target: ContentId, data: delta.Buffer) -> Table:
    """Cut a target. Raises EngineError without fastcdc or blake3."""
    view = memoryview(data).cast("B")
    coarse_ends, fine_ends, first = array("Q"), array("Q"), array("Q", [0])
    coarse_ids, fine_ids = bytearray(), bytearray()
    for start, end in pairwise((0, *cuts(view, COARSE))):
        coarse_ends.append(end)
        coarse_ids += chunk_id(view[start:end])[:_ID]
        for at, until in _fine_pieces(view[start:end], FINE):
            fine_ends.append(start + until)
            fine_ids += chunk_id(view[start + at : start + until])[:_ID]
        first.append(len(fine_ends))
    return Table(target, coarse_ends, bytes(coarse_ids), fine_ends, bytes(fine_ids), first)


def encode_table(table: Table) -> bytes:
    """A table as a server keeps it; nobody else reads it."""
    lengths = [end - start for start, end in pairwise((0, *table.fine_ends))]
    counts = [end - start for start, end in pairwise(table.first)]
    head = TABLE_MAGIC + table.target + uvarints([len(counts), *counts, *lengths])
    rest = head + table.coarse_ids + table.fine_ids
    return delta.checksum(memoryview(rest)) + rest


def decode_table(data: bytes) -> Table:
    """Raises FormatError."""
    reader = Reader(data, "reconcile table")
    if bytes(reader.take(delta.CHECKSUM)) != delta.checksum(memoryview(data)[delta.CHECKSUM :]):
        raise FormatError("reconcile table: damaged")
    reader.expect(TABLE_MAGIC)
    target = ContentId(bytes(reader.take(ContentId.SIZE)))
    first, coarse_ends, fine_ends = array("Q", [0]), array("Q"), array("Q")
    for _ in range(reader.uvarint(reader.left)):
        first.append(first[-1] + reader.uvarint(reader.left))
    end = 0
    for _ in range(first[-1]):
        end += reader.uvarint(LIMITS.chunk)
        fine_ends.append(end)
    coarse_ends.extend(fine_ends[last - 1] for last in first[1:] if last)
    coarse_ids = bytes(reader.take(_ID * (len(first) - 1)))
    fine_ids = bytes(reader.take(_ID * len(fine_ends)))
    reader.done()
    return Table(target, coarse_ends, coarse_ids, fine_ends, fine_ids, first)


def _fine_pieces(chunk: memoryview, params: ChunkerParams) -> Iterator[Span]:
    """Each coarse chunk is cut anew: both sides then cut a chunk's beginning alike."""
    return pairwise((0, *cuts(chunk, params)))


# -- the list --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CoarseList:
    """A target's coarse chunks as a client sees them: short ids in order."""

    target: ContentId
    size: int
    coarse: ChunkerParams
    fine: ChunkerParams
    id_size: int
    ids: tuple[bytes, ...]


def encode_list(table: Table) -> bytes:
    """The list that goes out for a target."""
    count = len(table.coarse_ends)
    size = _id_size(_COARSE_IDS, count * count, _LIST_ODDS)
    out = bytearray(LIST_MAGIC + table.target)
    params = (COARSE.min, COARSE.avg, COARSE.max, FINE.min, FINE.avg, FINE.max)
    out += uvarints([table.size, _CHUNKER, *params, count])
    out.append(size)
    for at in range(0, _ID * count, _ID):
        out += table.coarse_ids[at : at + size]
    return bytes(out)


def decode_list(data: delta.Buffer) -> CoarseList:
    """Raises FormatError."""
    what = "reconcile list"
    reader = Reader(memoryview(data), what)
    reader.expect(LIST_MAGIC)
    target = ContentId(bytes(reader.take(ContentId.SIZE)))
    size = reader.uvarint(LIMITS.reconcile_content)
    if reader.uvarint() != _CHUNKER:
        raise FormatError(f"{what}: unknown chunker")
    numbers = [reader.uvarint(LIMITS.chunk) for _ in range(6)]
    coarse, fine = ChunkerParams.of(*numbers[:3]), ChunkerParams.of(*numbers[3:])
    if coarse.min < COARSE.min // 2 or fine.min < FINE.min // 4 or coarse.avg < fine.avg:
        raise FormatError(f"{what}: pieces of {coarse.avg} and {fine.avg} bytes")
    # No chunk but the last is shorter than the minimum.
    count = reader.uvarint(size // coarse.min + 1)
    id_size = reader.fixed(1)
    if id_size not in _COARSE_IDS:
        raise FormatError(f"{what}: ids of {id_size} bytes")
    ids = tuple(bytes(reader.take(id_size)) for _ in range(count))
    reader.done()
    return CoarseList(target, size, coarse, fine, id_size, ids)


# -- the inquiry -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """*count* chunks of the list from *start* on, then *fine* pieces that are asked about."""

    start: int
    count: int
    fine: int


@dataclass(frozen=True, slots=True)
class Inquiry:
    """What a client tells about its base, in its base's order; ids are cut to *id_size* bytes."""

    runs: tuple[Run, ...]
    id_size: int
    ids: tuple[bytes, ...]


def encode_inquiries(inquiries: Sequence[tuple[str, Inquiry]]) -> bytes:
    """The body of a request, for one track or several."""
    out = bytearray(INQUIRY_MAGIC)
    put_uvarint(out, len(inquiries))
    for track, inquiry in inquiries:
        name = track.encode()
        put_uvarint(out, len(name))
        out += name
        put_uvarint(out, len(inquiry.runs))
        expected = 0
        for run in inquiry.runs:
            jump = run.start - expected
            zigzag = 2 * jump if jump >= 0 else -2 * jump - 1
            out += uvarints([zigzag, run.count, run.fine])
            expected = run.start + run.count
        out.append(inquiry.id_size)
        out += b"".join(inquiry.ids)
    return bytes(out)


def decode_inquiries(data: bytes) -> list[tuple[str, Inquiry]]:
    """Raises FormatError. Whether a run lies in the list is for ``find_common`` to say."""
    what = "reconcile request"
    if len(data) > LIMITS.reconcile_request:
        raise FormatError(f"{what}: larger than {LIMITS.reconcile_request} bytes")
    reader = Reader(data, what)
    reader.expect(INQUIRY_MAGIC)
    found: dict[str, Inquiry] = {}
    for _ in range(reader.uvarint(LIMITS.reconcile_tracks)):
        raw = bytes(reader.take(reader.uvarint(4 * LIMITS.path)))
        try:
            track = raw.decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{what}: a track's name is not UTF-8") from error
        if track in found:
            raise FormatError(f"{what}: a track twice")
        found[track] = _decode_inquiry(reader, what)
    reader.done()
    if not found:
        raise FormatError(f"{what}: no track")
    return list(found.items())


def _decode_inquiry(reader: Reader, what: str) -> Inquiry:
    runs = []
    expected = total = 0
    for _ in range(reader.uvarint(reader.left)):
        zigzag = reader.uvarint(2 * LIMITS.chunks)
        start = expected + (-(zigzag + 1 >> 1) if zigzag & 1 else zigzag >> 1)
        if start < 0:
            raise FormatError(f"{what}: a run before the first chunk")
        run = Run(start, reader.uvarint(LIMITS.chunks), reader.uvarint(reader.left))
        total += run.fine
        expected = start + run.count
        runs.append(run)
    id_size = reader.fixed(1)
    if id_size not in _FINE_IDS:
        raise FormatError(f"{what}: ids of {id_size} bytes")
    ids = tuple(bytes(reader.take(id_size)) for _ in range(total))
    return Inquiry(tuple(runs), id_size, ids)


# -- the client: what it has -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Survey:
    """A base beside a list. Spans are in the base: for each run those of its chunks, and those of
    the fine pieces that the inquiry asks about.
    """

    inquiry: Inquiry
    known: tuple[tuple[Span, ...], ...]
    asked: tuple[tuple[Span, ...], ...]
    common: int  #: bytes of the base in coarse chunks of the list


def survey(base: BinaryIO, chunks: CoarseList) -> Survey:
    """Cut *base*, from its beginning, and compare it with the list.

    Memory: about 300 bytes for each piece that is asked about. Raises NotPromisingError where too
    little is alike to be worth an inquiry, or it would be larger than one may be; EngineError
    without fastcdc or blake3.
    """
    base.seek(0)
    surveyor = _Surveyor(chunks)
    end = 0
    start = 0
    for end, chunk in scan(base, chunks.coarse):
        surveyor.take(start, chunk)
        start = end
    return surveyor.finish(end)


class _Surveyor:
    """One pass over a base."""

    def __init__(self, chunks: CoarseList) -> None:
        self._list = chunks
        self._numbers: dict[bytes, int] = {}
        for number, short in enumerate(chunks.ids):
            self._numbers.setdefault(short, number)
        self._seen: set[int] = set()
        self._ids: dict[bytes, None] = {}
        self._runs: list[tuple[int, list[Span], list[Span]]] = []
        self._common = 0

    def take(self, start: int, chunk: memoryview) -> None:
        """The next chunk of the base. What stands there twice is taken once."""
        short = chunk_id(chunk)[: self._list.id_size]
        number = self._numbers.get(short)
        if number is None:
            self._ask(start, chunk)
        elif number not in self._seen:
            self._seen.add(number)
            self._common += len(chunk)
            span = start, start + len(chunk)
            if self._runs:
                first, known, asked = self._runs[-1]
                if not asked and first + len(known) == number:
                    known.append(span)
                    return
            self._runs.append((number, [span], []))

    def _ask(self, start: int, chunk: memoryview) -> None:
        if not self._runs:
            self._runs.append((0, [], []))
        asked = self._runs[-1][2]
        for at, until in _fine_pieces(chunk, self._list.fine):
            piece = chunk_id(chunk[at:until])[:_ID]
            if piece not in self._ids:
                self._ids[piece] = None
                asked.append((start + at, start + until))
        if len(self._ids) * _FINE_IDS[0] > LIMITS.reconcile_request:
            raise NotPromisingError("too many pieces to ask about")

    def finish(self, size: int) -> Survey:
        if self._common * _PROMISING < size:
            raise NotPromisingError(f"{self._common} of {size} bytes are alike, coarsely")
        theirs = len(self._list.ids) - len(self._seen)
        pieces = theirs * (self._list.coarse.avg // self._list.fine.avg)
        id_size = _id_size(_FINE_IDS, pieces * len(self._ids), _FINE_ODDS)
        runs = tuple(Run(first, len(known), len(asked)) for first, known, asked in self._runs)
        return Survey(
            Inquiry(runs, id_size, tuple(piece[:id_size] for piece in self._ids)),
            tuple(tuple(known) for _, known, _ in self._runs),
            tuple(tuple(asked) for _, _, asked in self._runs),
            self._common,
        )


def _id_size(sizes: range, pairs: int, odds: int) -> int:
    """The least size at which *pairs* comparisons meet a false match once in ``2**odds`` times."""
    return next((size for size in sizes if pairs << odds <= 1 << 8 * size), sizes[-1])


# -- the answer ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Common:
    """What both sides have: *spans* of the target, which joined are the common text, and a bit for
    each piece of the inquiry, the lowest first, whether it is among them.
    """

    spans: tuple[Span, ...]
    bitmap: bytes

    @property
    def size(self) -> int:
        """Bytes of the common text."""
        return sum(end - start for start, end in self.spans)


def find_common(table: Table, inquiry: Inquiry) -> Common:
    """The common text of a target and an inquiry; each byte of the target is in it once at most.

    Raises FormatError for an inquiry about another list, NotPromisingError where less than half of
    the target is common.
    """
    count = len(table.coarse_ends)
    known = bytearray(count)
    for run in inquiry.runs:
        end = run.start + run.count
        if end > count or known.count(1, run.start, end):
            raise FormatError("reconcile request: a chunk that is not in the list, or twice")
        known[run.start : end] = b"\x01" * run.count
    # Only what no whole chunk gives is looked for: fewer pieces, fewer false matches.
    places: dict[bytes, int] = {}
    for number in range(count):
        if not known[number]:
            for piece in range(table.first[number], table.first[number + 1]):
                short = table.fine_ids[_ID * piece : _ID * piece + inquiry.id_size]
                places.setdefault(short, piece)
    spans: list[Span] = []
    bits = bytearray(len(inquiry.ids) + 7 >> 3)
    at = 0
    for run in inquiry.runs:
        if run.count:
            start, _ = table.coarse_span(run.start)
            _append(spans, (start, table.coarse_ends[run.start + run.count - 1]))
        for number in range(at, at + run.fine):
            found = places.pop(inquiry.ids[number], None)
            if found is not None:
                bits[number >> 3] |= 1 << (number & 7)
                _append(spans, table.fine_span(found))
        at += run.fine
    common = Common(tuple(spans), bytes(bits))
    if common.size * _LEAST_COMMON < table.size:
        raise NotPromisingError(f"{common.size} of {table.size} bytes are alike")
    return common


def make_answer(
    target: ContentId, data: delta.Buffer, common: Common, budget: delta.Budget
) -> bytes | None:
    """The answer about one track; None where no delta comes within the budget."""
    view = memoryview(data).cast("B")
    text = b"".join(view[start:end] for start, end in common.spans)
    from . import deltamake  # its machinery is for those who make

    section = deltamake.make([(ContentId.of(text), text)], target, view, budget=budget)
    return None if section is None else ANSWER_MAGIC + common.bitmap + section


def rebuild(
    answer: delta.Buffer,
    base: delta.RandomReader,
    found: Survey,
    wanted: ContentId,
    write: Callable[[delta.Buffer], object],
) -> None:
    """Write the target *wanted* from an answer to *found*'s inquiry, and its base; see
    ``delta.apply``. Raises FormatError and VerificationError.
    """
    view = memoryview(answer)
    reader = Reader(view, "reconcile answer")
    reader.expect(ANSWER_MAGIC)
    bitmap = bytes(reader.take(len(found.inquiry.ids) + 7 >> 3))
    spans: list[Span] = []
    number = 0
    for known, asked in zip(found.known, found.asked, strict=True):
        for span in known:
            _append(spans, span)
        for span in asked:
            if bitmap[number >> 3] >> (number & 7) & 1:
                _append(spans, span)
            number += 1
    section = view[reader.position :]
    if delta.inspect(section).target != wanted:
        raise FormatError("reconcile answer: a delta to another content")
    delta.apply(section, [_CommonText(base, spans)], write)


def _append(spans: list[Span], span: Span) -> None:
    """Append, joined with the last one where it goes on there."""
    if spans and spans[-1][1] == span[0]:
        spans[-1] = spans[-1][0], span[1]
    else:
        spans.append(span)


class _CommonText:
    """Spans of a base as if they lay one after another, read by position."""

    __slots__ = ("_base", "_spans", "_starts", "size")

    def __init__(self, base: delta.RandomReader, spans: Sequence[Span]) -> None:
        self._base = base
        self._spans = spans
        ends = list(accumulate((end - start for start, end in spans), initial=0))
        self._starts = ends[:-1]
        self.size = ends[-1]

    def read_at(self, offset: int, length: int) -> delta.Buffer:
        """Raises VerificationError past the end."""
        if offset + length > self.size:
            raise VerificationError(f"a base ends at {self.size}, not at {offset + length}")
        pieces: list[delta.Buffer] = []
        number = bisect_right(self._starts, offset) - 1
        while length:
            start, end = self._spans[number]
            start += offset - self._starts[number]
            piece = self._base.read_at(start, min(length, end - start))
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
            number += 1
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
