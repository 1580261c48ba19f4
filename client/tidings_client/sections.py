"""Sections of packs: deltas and indexes, fetched in contiguous ranges, proven, kept on disk.

Each lies in a file of the work folder until the run is done, so that a run that was killed pays for
none of them twice, and none of them stays in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

from tidings_chunkstore import delta, index
from tidings_chunkstore.errors import FormatError, NetworkError, TidingsError, VerificationError
from tidings_chunkstore.places import PackName, Span

from .job import Progress
from .local import Destination, translated, write_all
from .plan import Plan, assign
from .remote import Remote

_PART = "part-"


class Sections:
    """What was fetched of packs. *bad* learns what could not be had, *blame* why."""

    def __init__(
        self,
        remote: Remote,
        dest: Destination,
        progress: Progress,
        bad: set[Hashable],
        blame: Callable[[str], None],
    ) -> None:
        self._remote = remote
        self._dest = dest
        self._progress = progress
        self._bad = bad
        self._blame = blame
        self.spans: set[Span] = set()  #: what is here, whole by its own checksum

    def drop(self, span: Span) -> None:
        """Forget a section that turned out to be of no use."""
        self._bad.add(span)
        self.spans.discard(span)
        self._dest.work_remove(_part_name(span))

    def fetch(self, planned: Plan) -> None:
        """Get what the plan's tasks need from packs; what cannot be had goes to ``bad``."""
        needed = [e.span for t in planned.tasks for e in t.edges]
        needed += [t.index for t in planned.tasks if t.index is not None]
        missing = [s for s in needed if s not in self.spans and not self._kept(s)]
        ranges = planned.ranges
        inside = assign(ranges, [s for s in missing if _within(s, ranges)])
        todo = [i for i, spans in enumerate(inside) if spans]

        def check(i: int, data: bytes) -> None:
            for span, section in _cut(ranges[todo[i]], inside[todo[i]], data):
                _check_section(span, section)

        while todo:
            wanted = [(str(ranges[i].pack), ranges[i].offset, ranges[i].length) for i in todo]
            arrived: set[int] = set()
            try:
                for i, data in self._remote.ranges(wanted, check=check):
                    for span, section in _cut(ranges[todo[i]], inside[todo[i]], data):
                        self._keep(span, section)
                    arrived.add(todo[i])
            except (NetworkError, VerificationError) as error:
                left = [i for i in todo if i not in arrived]
                if len(left) == 1:
                    self._give_up(ranges[left[0]].pack, inside[left[0]], error)
                    return
                # Which of several failed is not told: one by one from here.
                for i in left:
                    self._fetch_one(ranges[i], inside[i])
            return

    def _fetch_one(self, whole: Span, spans: Sequence[Span]) -> None:
        if whole.pack in self._bad:
            return

        def check(_: int, data: bytes) -> None:
            for span, section in _cut(whole, spans, data):
                _check_section(span, section)

        try:
            wanted = [(str(whole.pack), whole.offset, whole.length)]
            for _, data in self._remote.ranges(wanted, check=check):
                for span, section in _cut(whole, spans, data):
                    self._keep(span, section)
        except (NetworkError, VerificationError) as error:
            self._give_up(whole.pack, spans, error)

    def _give_up(self, pack: PackName, spans: Iterable[Span], error: TidingsError) -> None:
        self._blame(f"pack-{error.code}")
        text = str(error)
        self._progress.note(text if str(pack) in text else f"{pack}: {text}", code=error.code)
        if isinstance(error, NetworkError):
            self._bad.add(pack)
        self._bad.update(spans)

    def _kept(self, span: Span) -> bool:
        """Whether a run before has fetched *span*; it is proven again."""
        data = self._dest.work_read(_part_name(span), span.length)
        if data is None or len(data) != span.length:
            return False
        try:
            _check_section(span, data)
        except FormatError:
            return False
        self.spans.add(span)
        return True

    def _keep(self, span: Span, section: bytes) -> None:
        with self._dest.work_create(_part_name(span)) as file, translated(self._dest.path):
            write_all(file, section)
        self.spans.add(span)

    def read(self, span: Span) -> bytes | None:
        """A section that was fetched; None where it could not be had."""
        return self._dest.work_read(_part_name(span), span.length) if span in self.spans else None


def _check_section(span: Span, section: bytes) -> None:
    """Raises FormatError unless *section* is a whole delta or index, by its own checksum."""
    view = memoryview(section)
    if section.startswith(delta.MAGIC):
        start = len(delta.MAGIC)
    elif section.startswith(index.MAGIC):
        start = len(index.MAGIC)
    else:
        raise FormatError(f"{span.pack}: neither a delta nor an index at {span.offset}")
    rest = view[start + delta.CHECKSUM :]
    if bytes(view[start : start + delta.CHECKSUM]) != delta.checksum(rest):
        raise FormatError(f"{span.pack}: damaged at {span.offset}")


def _cut(whole: Span, spans: Sequence[Span], data: bytes) -> list[tuple[Span, bytes]]:
    return [(span, data[span.offset - whole.offset : span.end - whole.offset]) for span in spans]


def _within(span: Span, ranges: Iterable[Span]) -> bool:
    return any(
        r.pack == span.pack and r.offset <= span.offset and span.end <= r.end for r in ranges
    )


def _part_name(span: Span) -> str:
    stem = str(span.pack).removesuffix(".pack")
    return f"{_PART}{stem}-{span.offset}-{span.length}"
