"""Makes delta sections: finds copies, tries what a budget allows, keeps the smallest."""

from __future__ import annotations

import lzma
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from . import lzmadict
from .delta import (
    COLUMN_FILTERS,
    ID_PREFIX,
    LZMA2,
    MAGIC,
    MIN_PREFIX,
    Budget,
    Buffer,
    PrefixRule,
    apply,
    checksum,
    context_ranges,
    frame_header,
    reader_of,
    window_size,
)
from .errors import InputError
from .ids import ContentId
from .limits import KIB, LIMITS, MIB
from .match import COARSE, FINE, Copy, OutOfTime, find_copies
from .wire import put_uvarint, uvarints
from .zstd import zstd

_WHOLE = 4 * MIB  #: bases up to this size together are tried as a prefix as they are
#: Contexts and reaches, log2 of bytes, the best first.
_CONTEXTS = ((16, 25), (14, 25), (12, 25))
_REACHES = ((12, 25), (12, 20), (12, 18), (10, 16))
_BEARABLE = (
    1.4 * MIB
)  #: prefix and new bytes for each second of the budget, when contexts are chosen
_STEP = 256 * KIB  #: bytes between two looks at the clock
_SAMPLE = 64 * KIB

#: Levels and about how many bytes a second of prefix and new bytes they take, on a slow machine.
_RATES = (
    (22, MIB // 2),
    (19, 3.5 * MIB),
    (15, 6 * MIB),
    (12, 12 * MIB),
    (7, 40 * MIB),
    (3, 120 * MIB),
)
_EFFORTS = (
    (lzmadict.Effort.HIGH, 2.8 * MIB),
    (lzmadict.Effort.MEDIUM, 4.2 * MIB),
)
_LENGTHS = (0, 1 * KIB, 8 * KIB, 1 << 62)  #: copies below are left to the codec, one after another
_LARGE = 1 * MIB  #: so many new bytes are looked at before time is spent on them
_REDUNDANT = 0.2  #: what compresses so well at the fastest level is worth more time than asked for:
_EXTENSION = 3 * MIB  #: a second for so many new bytes
_WORTHWHILE = 19  #: below this level zstd is not tried when there is a section
_WARM = 8 * KIB  #: fewer new bytes than this and LZMA, which starts cold, gains nothing
_LZMA = 24 * MIB  #: prefix and new bytes; liblzma takes about 12 times as much memory

_USUAL = Budget()

_Row: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class _Prefix:
    """A choice of prefix: its rule, its parameter, and the bytes."""

    rule: PrefixRule
    data: bytes
    context: int = 0  #: log2 of bytes, as is *reach*
    reach: int = 0


class _Clock:
    """Seconds of a budget, as this thread's processor counts them: load elsewhere is no reason
    for a larger section."""

    def __init__(self, seconds: float) -> None:
        self._end = time.thread_time() + seconds
        self._grace = seconds / 2

    def left(self) -> float:
        """What may be planned with."""
        return self._end - time.thread_time()

    def check(self) -> None:
        """Raises OutOfTime when what is under way has used half of the budget more than planned."""
        if self.left() < -self._grace:
            raise OutOfTime


def make(
    bases: Sequence[tuple[ContentId, Buffer]],
    target_id: ContentId,
    target: Buffer,
    *,
    budget: Budget = _USUAL,
) -> bytes | None:
    """A section that leads from *bases* (16 at most, none is legal) to *target*.

    None when it would not stay below ``budget.limit``, or not be ready in time. A section is
    applied before it is given out: raises VerificationError when *target_id* is not the target's.
    """
    if len(bases) > LIMITS.delta_bases:
        raise InputError(f"{len(bases)} bases are above the limit of {LIMITS.delta_bases}")
    clock = _Clock(budget.seconds)
    views = [memoryview(data).cast("B") for _, data in bases]
    maker = _Maker(bases, views, target_id, memoryview(target).cast("B"), budget, clock)
    try:
        section = maker.best()
    except OutOfTime:
        return None
    if section is None or (budget.limit is not None and len(section) >= budget.limit):
        return None
    apply(section, [reader_of(view) for view in views], lambda _: None)
    return section


class _Maker:
    """One section in the making: what is fixed, and the smallest result so far."""

    def __init__(
        self,
        bases: Sequence[tuple[ContentId, Buffer]],
        views: Sequence[memoryview],
        target_id: ContentId,
        target: memoryview,
        budget: Budget,
        clock: _Clock,
    ) -> None:
        self._views = views
        self._total = sum(len(view) for view in views)
        self._target = target
        self._budget = budget
        self._clock = clock
        names = bytearray()
        for (name, _), view in zip(bases, views, strict=True):
            names += name[:ID_PREFIX]
            put_uvarint(names, len(view))
        names += target_id
        put_uvarint(names, len(target))
        self._names = bytes(names)
        self._smallest: bytes | None = None
        self._hurry = False

    def best(self) -> bytes | None:
        """The smallest section within the budget. Raises OutOfTime when there is none in time."""
        for copies, prefix in self._choices():
            try:
                self._try(copies, prefix)
            except OutOfTime:
                if self._smallest is None:
                    self._clock = _Clock(self._budget.seconds / 2)
                    self._hurry = True
                    self._try(copies, prefix)
                break
        return self._smallest

    def _choices(self) -> Iterable[tuple[list[Copy], _Prefix]]:
        """What to try, the most promising first."""
        copies = self._copies()
        new = len(self._target) - sum(copy.length for copy in copies)
        if new > _LARGE:
            ratio = _ratio(self._target, copies)
            if self._budget.limit is not None and new * ratio >= self._budget.limit:
                return
            if ratio < _REDUNDANT and 2 * new < len(self._target):
                self._clock = _Clock(max(self._clock.left(), min(new, _LZMA) / _EXTENSION))
        if MIN_PREFIX <= self._total <= _WHOLE:
            whole = _Prefix(PrefixRule.WHOLE, b"".join(self._views))
            # Where zstd can see all of the bases, a short copy may cost more than it saves.
            for length in _LENGTHS:
                longer = [copy for copy in copies if copy.length >= length]
                if not length or len(longer) < len(copies):
                    yield longer, whole
                    copies = longer
        else:
            yield copies, self._context(copies)

    def _copies(self) -> list[Copy]:
        """Copies at the grain that suits the sizes and, where much is new, at a finer one."""
        if not self._total or not len(self._target):
            return []
        size = self._total + len(self._target)
        grain = FINE if size <= 64 * MIB else COARSE // 2
        copies = find_copies(self._views, self._target, grain, self._clock.check)
        new = len(self._target) - sum(copy.length for copy in copies)
        if grain > FINE and 4 * new > len(self._target):
            copies = find_copies(self._views, self._target, FINE, self._clock.check)
        return copies

    def _context(self, copies: Sequence[Copy]) -> _Prefix:
        """The widest context that the budget of seconds bears."""
        rows, tail = _rows(copies, len(self._target))
        new = tail + sum(row[0] for row in rows)
        if self._total < MIN_PREFIX or not new:
            return _Prefix(PrefixRule.NONE, b"")
        for choices, rate in ((_CONTEXTS, _BEARABLE), (_REACHES, _RATES[1][1])):
            for context, reach in choices:
                ranges = context_ranges(rows, tail, self._total, 1 << context, 1 << reach)
                size = new + sum(end - start for start, end in ranges)
                if size <= rate * self._clock.left():
                    return _Prefix(PrefixRule.CONTEXT, self._cut(ranges), context, reach)
        return _Prefix(PrefixRule.CONTEXT, self._cut(ranges), context, reach)

    def _cut(self, ranges: Iterable[tuple[int, int]]) -> bytes:
        """The bytes of *ranges* of the joined bases, as many as a prefix may have."""
        prefix = bytearray()
        for start, end in ranges:
            end = min(end, start + LIMITS.delta_prefix - len(prefix))
            begin = 0
            for view in self._views:
                prefix += view[max(0, start - begin) : max(0, end - begin)]
                begin += len(view)
        return bytes(prefix)

    def _try(self, copies: Sequence[Copy], prefix: _Prefix) -> None:
        """Make sections from these; keep the smallest so far. Raises OutOfTime."""
        rows, tail = _rows(copies, len(self._target))
        new = tail + sum(row[0] for row in rows)
        if not new:
            prefix = _Prefix(PrefixRule.NONE, b"")
        columns = _columns(rows)
        packed = _pack(columns)
        flags = len(self._views) << 3 | prefix.rule
        if len(packed) < len(columns):
            flags, columns = flags | 4, packed
        front = bytearray([flags])
        front += self._names
        if prefix.rule == PrefixRule.CONTEXT:
            front += bytes([prefix.context, prefix.reach])
            put_uvarint(front, len(prefix.data))
        behind = uvarints([len(rows), len(columns)]) + columns
        if not new:
            self._keep(front, behind, (0, b""))
            return
        work = len(prefix.data) + new
        if new >= _WARM and work <= _LZMA and (copies or not self._total):
            self._keep(front, behind, self._lzma(rows, tail, new, prefix.data))
        level = self._level(work)
        if self._smallest is None or level >= _WORTHWHILE:
            self._keep(front, behind, self._zstd(rows, tail, new, prefix.data, level))

    def _keep(self, front: Buffer, behind: bytes, frame: tuple[int, bytes] | None) -> None:
        """Put a section together; forget it unless it is the smallest."""
        if frame is None:
            return
        coding, data = frame
        rest = b"".join((front, bytes([coding]), behind, data))
        section = MAGIC + checksum(memoryview(rest)) + rest
        if self._smallest is None or len(section) < len(self._smallest):
            self._smallest = section

    def _zstd(
        self, rows: Sequence[_Row], tail: int, new: int, prefix: bytes, level: int
    ) -> tuple[int, bytes] | None:
        """The new bytes as a zstd frame without its header; None when it grows too large."""
        parameter = zstd.CompressionParameter
        compressor = zstd.ZstdCompressor(
            options={
                parameter.compression_level: level,
                parameter.window_log: min(LIMITS.delta_window_log, max(10, (new - 1).bit_length())),
                parameter.enable_long_distance_matching: 1,
                parameter.content_size_flag: 0,
                parameter.checksum_flag: 0,
                parameter.dict_id_flag: 0,
            },
            zstd_dict=zstd.ZstdDict(prefix, is_raw=True).as_prefix if prefix else None,
        )
        compressor.set_pledged_input_size(new)
        frame = self._drive(
            compressor.compress,
            lambda: compressor.flush(zstd.ZstdCompressor.FLUSH_FRAME),
            self._new_pieces(rows, tail),
        )
        header = frame_header(0)
        if frame is None:
            return None
        if frame[: len(header) - 1] != header[:-1]:
            raise AssertionError("zstd wrote another frame header than it was asked for")
        return _smallest_coding(range((LIMITS.delta_window_log - 10) * 8 + 1), new), frame[6:]

    def _lzma(
        self, rows: Sequence[_Row], tail: int, new: int, prefix: bytes
    ) -> tuple[int, bytes] | None:
        """The new bytes as LZMA2; None when it grows too large, or liblzma is not there."""
        work = len(prefix) + new
        coding = _smallest_coding(range(LZMA2, LZMA2 + 31), work)
        effort = lzmadict.Effort.LOW
        if not self._hurry:
            left = self._clock.left()
            effort = next((e for e, rate in _EFFORTS if work <= rate * left), effort)
        try:
            encoder = lzmadict.Encoder(prefix, window_size(coding), effort)
        except (OSError, MemoryError):
            return None  # zstd will do
        data = self._drive(
            lambda piece: encoder.compress(bytes(piece)),
            encoder.flush,
            self._new_pieces(rows, tail),
        )
        return None if data is None else (coding, data)

    def _drive(
        self,
        compress: Callable[[memoryview], bytes],
        flush: Callable[[], bytes],
        pieces: Iterable[memoryview],
    ) -> bytes | None:
        """Compress *pieces*; None when the result is larger than of use. Raises OutOfTime."""
        limits = [size for size in (self._budget.limit, self._size()) if size is not None]
        most = min(limits, default=None)
        result = bytearray()
        for piece in pieces:
            self._clock.check()
            result += compress(piece)
            if most is not None and len(result) >= most:
                return None
        result += flush()
        return bytes(result)

    def _size(self) -> int | None:
        return None if self._smallest is None else len(self._smallest)

    def _level(self, work: int) -> int:
        """The highest level that should be through *work* bytes in the time that is left."""
        left = self._clock.left()
        for level, rate in _RATES[-2:] if self._hurry else _RATES:
            if work <= rate * left:
                return level
        if self._smallest is not None:
            raise OutOfTime
        return _RATES[-1][0]

    def _new_pieces(self, rows: Sequence[_Row], tail: int) -> Iterable[memoryview]:
        """The new bytes in order, in pieces between two looks at the clock."""
        at = 0
        for new, length in [(row[0], row[2]) for row in rows] + [(tail, 0)]:
            for start in range(at, at + new, _STEP):
                yield self._target[start : min(start + _STEP, at + new)]
            at += new + length


def _rows(copies: Sequence[Copy], size: int) -> tuple[list[_Row], int]:
    """Copies as rows of (new, source, length), and the new bytes behind the last."""
    rows = []
    at = 0
    for copy in copies:
        rows.append((copy.target - at, copy.source, copy.length))
        at = copy.target + copy.length
    return rows, size - at


def _runs(copies: Sequence[Copy], size: int) -> list[tuple[int, int]]:
    """Size and start of each run of new bytes."""
    ends = [0, *(copy.target + copy.length for copy in copies)]
    starts = [*(copy.target for copy in copies), size]
    return [(start - end, end) for end, start in zip(ends, starts, strict=True)]


def _columns(rows: Sequence[_Row]) -> bytes:
    """Rows as they go over the wire: all *new*, all *length*, all jumps of *source* (zigzag)."""
    jumps = []
    expected = 0
    for _, source, length in rows:
        jump = source - expected
        jumps.append(2 * jump if jump >= 0 else -2 * jump - 1)
        expected = source + length
    return uvarints([row[0] for row in rows] + [row[2] for row in rows] + jumps)


def _pack(columns: bytes) -> bytes:
    compressor = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=COLUMN_FILTERS)
    return compressor.compress(columns) + compressor.flush()


def _smallest_coding(codings: Sequence[int], size: int) -> int:
    """The first coding byte whose window holds *size* bytes, else the last."""
    return next((coding for coding in codings if window_size(coding) >= size), codings[-1])


def _ratio(target: memoryview, copies: Sequence[Copy]) -> float:
    """How far three samples of the new bytes compress at the fastest level; 1 is not at all."""
    size, at = max(_runs(copies, len(target)))
    taken = packed = 0
    for part in range(3):
        start = at + (size - _SAMPLE) * part // 2 if size > _SAMPLE else at
        sample = target[start : min(start + _SAMPLE, at + size)]
        taken += len(sample)
        packed += len(zstd.compress(sample, 1))
    return packed / taken
