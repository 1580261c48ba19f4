"""The chunks route: an index, what of it lies here, and the frames of the rest.

For a client whose old content the head does not know. Only this route cuts and hashes chunks, so
only this module needs ``fastcdc`` and ``blake3``; import it when the route is taken.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import BinaryIO

from tidings_chunkstore.chunker import chunk_id, scan_ids
from tidings_chunkstore.errors import FormatError, NetworkError, VerificationError
from tidings_chunkstore.frames import FrameReader
from tidings_chunkstore.index import Frame, Index
from tidings_chunkstore.places import Span
from tidings_chunkstore.store import open_dictionary

from .assemble import Write
from .local import write_all
from .plan import Costs, Price, assign, merge
from .remote import Remote


class ChunkRoute:
    """One content by its chunks.

    *bases* are old contents, open and spooled; *frames* is a new file that holds what is fetched.
    Memory: about 100 bytes a chunk of index and bases, and what the remote holds.
    """

    def __init__(self, index: Index, bases: Sequence[BinaryIO], frames: BinaryIO) -> None:
        """Cuts and hashes the bases. Raises EngineError where a library is missing."""
        self.index = index
        self._frames = frames
        self._local: dict[bytes, tuple[int, int, int]] = {}
        self._at: dict[Span, int] = {}  # where a fetched frame lies in the file
        self._dictionaries: dict[Span, bytes] = {}
        self._readers: dict[Span | None, FrameReader] = {}
        for base in bases:
            self._scan(base)
        missing: dict[Span, tuple[Frame, bytes]] = {}
        for frame, short in zip(index.frames, index.short_ids(), strict=True):
            if short not in self._local:
                missing.setdefault(frame.span, (frame, short))
        self._missing = missing
        used = {f.dictionary for f, _ in missing.values() if f.dictionary is not None}
        self._wanted = sorted(used, key=_place)

    def price(self, costs: Costs, batched: bool) -> Price:
        """What fetching the rest costs, exactly (headers aside)."""
        spans = [*self._missing, *self._wanted]
        if batched:
            return Price(sum(span.length for span in spans), 1 if spans else 0)
        ranges = merge(spans, costs.gap)
        return Price(sum(span.length for span in ranges), len(ranges))

    def fetch(self, remote: Remote, costs: Costs, batched: bool) -> None:
        """Get every missing frame; each is opened and hashed as it comes.

        Raises NetworkError and VerificationError. A batch that fails is continued by ranges.
        """
        if batched:
            spans = [*self._wanted, *sorted(self._missing, key=_place)]
            try:
                wanted = [(str(s.pack), s.offset, s.length) for s in spans]
                for span, data in zip(spans, remote.frames(wanted), strict=False):
                    self._take(span, data)
            except (NetworkError, FormatError, VerificationError):
                pass  # the same bytes are to be had by ranges, from any mirror
        self._fetch_ranges(remote, [s for s in self._wanted if s not in self._dictionaries], costs)
        self._fetch_ranges(remote, [s for s in self._missing if s not in self._at], costs)

    def produce(self, write: Write) -> None:
        """Write the content. Raises FormatError when a frame is damaged."""
        for frame, short in zip(self.index.frames, self.index.short_ids(), strict=True):
            local = self._local.get(short)
            if local is None:
                at = self._at[frame.span]
                stored = os.pread(self._frames.fileno(), frame.span.length, at)
                write(self._reader(frame.dictionary).open(stored))
                continue
            descriptor, offset, length = local
            write(os.pread(descriptor, length, offset))

    def _scan(self, base: BinaryIO) -> None:
        base.seek(0)
        ends, ids = scan_ids(base, self.index.params)
        start = 0
        size = self.index.id_size
        for end, chunk in zip(ends, ids, strict=True):
            self._local.setdefault(chunk[:size], (base.fileno(), start, end - start))
            start = end

    def _fetch_ranges(self, remote: Remote, spans: Sequence[Span], costs: Costs) -> None:
        ranges = merge(spans, costs.gap)
        inside = assign(ranges, spans)

        def check(i: int, data: bytes) -> None:
            for span in inside[i]:
                start = span.offset - ranges[i].offset
                self._open(span, data[start : start + span.length])

        wanted = [(str(r.pack), r.offset, r.length) for r in ranges]
        for i, data in remote.ranges(wanted, check=check):
            for span in inside[i]:
                start = span.offset - ranges[i].offset
                self._keep(span, data[start : start + span.length])

    def _take(self, span: Span, data: bytes) -> None:
        self._open(span, data)
        self._keep(span, data)

    def _open(self, span: Span, data: bytes) -> None:
        """Raises FormatError or VerificationError unless *data* is what lies at *span*."""
        missing = self._missing.get(span)
        if missing is None:
            open_dictionary(data)
            return
        frame, short = missing
        if chunk_id(self._reader(frame.dictionary).open(data))[: len(short)] != short:
            raise VerificationError("a frame holds another chunk", code="frame")

    def _keep(self, span: Span, data: bytes) -> None:
        if span not in self._missing:
            self._dictionaries[span] = open_dictionary(data)
            return
        self._at[span] = self._frames.seek(0, os.SEEK_END)
        write_all(self._frames, data)

    def _reader(self, dictionary: Span | None) -> FrameReader:
        reader = self._readers.get(dictionary)
        if reader is None:
            raw = b"" if dictionary is None else self._dictionaries[dictionary]
            reader = self._readers[dictionary] = FrameReader(raw)
        return reader


def _place(span: Span) -> tuple[int, bytes, int]:
    return span.pack.serial, span.pack.id, span.offset
