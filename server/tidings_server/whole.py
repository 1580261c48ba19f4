"""What clients would have downloaded without Tidings: published files whole, told by the head.

An answer by Tidings leads to contents of the current snapshot; a client without Tidings would have
downloaded the published files of these contents. Which ones an answer leads to is read from

- a bundle or an answer to an inquiry: the tracks that it names;
- ranges of packs (one by one, or a batch): each edge to a content of the current snapshot, and
  each index of one, that *begins* in the range. A client fetches such an edge, or the index,
  once for each content it makes; the chunks that follow are not counted again.

What is not seen is not counted: ranges that a cache or another web server answers, packs fetched
whole, chunks whose index the client has already, and heads that say that nothing changed.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable

from tidings_chunkstore.bundle import MAGIC
from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.head import Head
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.places import PackName, Span
from tidings_chunkstore.wire import Reader

PEEK = 64 * 1024  #: bytes of a bundle's beginning in which its tracks are looked for
_CHECKSUM = 8  # bytes after the magic
_TRACKS = 1024  # looked at in a bundle, and in a batch of ranges
_RANGE = re.compile(rb"bytes=(\d{1,15})-(\d{0,15})")
_END = 1 << 53


class Whole:
    """The published bytes behind the parts of one head. All sizes in bytes."""

    def __init__(self, head: Head) -> None:
        self._sizes: dict[str, int] = {}
        for file in head.files:
            self._sizes[file.track] = self._sizes.get(file.track, 0) + file.size
        self._starts: dict[PackName, list[tuple[int, str]]] = {}
        states = {state.serial: state.contents for state in head.states}
        current = head.current.contents
        spans = [(c.track, c.index) for c in head.contents if c.index is not None]
        spans += [
            (edge.track, edge.span)
            for edge in head.edges
            if edge.track in current
            and states.get(edge.target, {}).get(edge.track) == current[edge.track]
        ]
        for track, span in spans:
            self._starts.setdefault(span.pack, []).append((span.offset, track))
        for starts in self._starts.values():
            starts.sort()

    def of_tracks(self, tracks: Iterable[str]) -> int:
        """The published files of *tracks*, each once."""
        return sum(self._sizes.get(track, 0) for track in set(tracks))

    def of_spans(self, spans: Iterable[Span]) -> int:
        """The published files of what begins in *spans*."""
        found: set[str] = set()
        for span in spans:
            starts = self._starts.get(span.pack)
            if starts is None:
                continue
            at = bisect_left(starts, (span.offset, ""))
            while at < len(starts) and starts[at][0] < span.end and len(found) < _TRACKS:
                found.add(starts[at][1])
                at += 1
        return self.of_tracks(found)


def span_of(pack: PackName, header: bytes) -> Span | None:
    """The span that a Range header with one range asks for; None for anything else."""
    match = _RANGE.fullmatch(header)
    if match is None:
        return None
    first = int(match[1])
    last = int(match[2]) if match[2] else _END
    return Span(pack, first, last - first + 1) if last >= first else None


def tracks_of(beginning: bytes) -> list[str]:
    """The tracks that a bundle names, from its first bytes; as many as are there and well-formed.

    The format is in docs/protocol.md, "Bundles".
    """
    found: list[str] = []
    reader = Reader(beginning[:PEEK], "bundle")
    try:
        reader.expect(MAGIC)
        reader.take(_CHECKSUM)
        for _ in range(reader.uvarint(_TRACKS)):
            name = bytes(reader.take(reader.uvarint(4 * LIMITS.path))).decode()
            reader.uvarint(LIMITS.pack)
            found.append(name)
    except (FormatError, UnicodeDecodeError):
        pass  # cut off at PEEK, or an error's body: what was read so far counts
    return found
