"""Makes delta sections: finds copies, tries what a budget allows, keeps the smallest."""

from __future__ import annotations

import lzma
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .delta import (
    COLUMN_FILTERS,
    ID_PREFIX,
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
_CONTEXTS = (64 * KIB, 16 * KIB, 4 * KIB, 512)
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


@dataclass(frozen=True, slots=True)
class _Prefix:
    """A choice of prefix: its rule, its parameter, and the bytes."""

    rule: PrefixRule
    context: int
    data: bytes


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


def make_section(
    bases: Sequence[tuple[ContentId, Buffer]],
    target_id: ContentId,
    target: Buffer,
    budget: Budget,
) -> bytes | None:
    """See ``delta.make``."""
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
        if self._hopeless(copies):
            return
        if MIN_PREFIX <= self._total <= _WHOLE:
            whole = _Prefix(PrefixRule.WHOLE, 0, b"".join(self._views))
            yield copies, whole
            if copies:
                yield [], whole
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
            return _Prefix(PrefixRule.NONE, 0, b"")
        bearable = int(_BEARABLE * self._budget.seconds) - new
        for context in _CONTEXTS:
            ranges = context_ranges(rows, tail, self._total, context)
            size = sum(end - start for start, end in ranges)
            if size <= bearable:
                break
        return _Prefix(PrefixRule.CONTEXT, context, self._cut(ranges))

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

    def _hopeless(self, copies: Sequence[Copy]) -> bool:
        """Whether nearly all is new and does not compress, by samples: no time is spent then."""
        if self._budget.limit is None:
            return False
        new = len(self._target) - sum(copy.length for copy in copies)
        return new > 1 * MIB and new * _ratio(self._target, copies) >= self._budget.limit

    def _try(self, copies: Sequence[Copy], prefix: _Prefix) -> None:
        """Make one section; keep it if it is the smallest."""
        rows, tail = _rows(copies, len(self._target))
        new = tail + sum(row[0] for row in rows)
        section = bytearray(MAGIC + bytes(8))
        flags = len(self._views) << 3
        columns = _columns(rows)
        packed = _pack(columns)
        if len(packed) < len(columns):
            flags, columns = flags | 4, packed
        rule = prefix.rule if new else PrefixRule.NONE
        section.append(flags | rule)
        section += self._names
        if rule == PrefixRule.CONTEXT:
            put_uvarint(section, prefix.context)
            put_uvarint(section, len(prefix.data))
        descriptor = _descriptor(new)
        section.append(descriptor)
        put_uvarint(section, len(rows))
        put_uvarint(section, len(columns))
        section += columns
        if new:
            frame = self._frame(rows, tail, new, prefix.data if rule else b"", len(section))
            if frame is None:
                return
            section += frame
        section[len(MAGIC) : len(MAGIC) + 8] = checksum(memoryview(section)[len(MAGIC) + 8 :])
        if self._smallest is None or len(section) < len(self._smallest):
            self._smallest = bytes(section)

    def _frame(
        self,
        rows: Sequence[tuple[int, int, int]],
        tail: int,
        new: int,
        prefix: bytes,
        head: int,
    ) -> bytes | None:
        """The frame without its header; None when it grows too large. Raises OutOfTime."""
        limits = [bound for bound in (self._budget.limit, self._size()) if bound is not None]
        most = min(limits) - head if limits else None
        parameter = zstd.CompressionParameter
        compressor = zstd.ZstdCompressor(
            options={
                parameter.compression_level: self._level(len(prefix) + new),
                parameter.window_log: min(LIMITS.delta_window_log, max(10, (new - 1).bit_length())),
                parameter.enable_long_distance_matching: 1,
                parameter.content_size_flag: 0,
                parameter.checksum_flag: 0,
                parameter.dict_id_flag: 0,
            },
            zstd_dict=zstd.ZstdDict(prefix, is_raw=True).as_prefix if prefix else None,
        )
        compressor.set_pledged_input_size(new)
        frame = bytearray()
        for piece in self._new_pieces(rows, tail):
            self._clock.check()
            frame += compressor.compress(piece)
            if most is not None and len(frame) >= most:
                return None
        frame += compressor.flush(zstd.ZstdCompressor.FLUSH_FRAME)
        header = frame_header(0)
        if frame[: len(header) - 1] != header[:-1]:
            raise AssertionError("zstd wrote another frame header than it was asked for")
        return bytes(frame[len(header) :])

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

    def _new_pieces(self, rows: Sequence[tuple[int, int, int]], tail: int) -> Iterable[memoryview]:
        """The new bytes in order, in pieces between two looks at the clock."""
        at = 0
        for new, length in [(row[0], row[2]) for row in rows] + [(tail, 0)]:
            for start in range(at, at + new, _STEP):
                yield self._target[start : min(start + _STEP, at + new)]
            at += new + length


def _rows(copies: Sequence[Copy], size: int) -> tuple[list[tuple[int, int, int]], int]:
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


def _columns(rows: Sequence[tuple[int, int, int]]) -> bytes:
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


def _descriptor(new: int) -> int:
    """The smallest zstd window, 128 MiB at most, that holds *new* bytes."""
    highest = (LIMITS.delta_window_log - 10) << 3
    return next((d for d in range(highest) if window_size(d) >= new), highest)


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
