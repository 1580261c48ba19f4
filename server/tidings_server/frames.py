"""``POST .../tidings/frames``: a batch of ranges of packs in one answer (docs/protocol.md).

Nothing is compressed or cut anew: the stored bytes go out in the order in which they were asked
for, neighbours read together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from tidings_chunkstore.errors import FormatError, TidingsError
from tidings_chunkstore.limits import MIB
from tidings_chunkstore.places import PackName, Span

MOST_RANGES = 65_536
MOST_BYTES = 64 * MIB  #: of the answer
MOST_REQUEST = 1 * MIB  #: of the request's body


class TooMuch(TidingsError):
    """A batch over a limit."""

    code = "too-much"


@dataclass(frozen=True, slots=True)
class Batch:
    """What is asked for, in order, neighbours merged. *size* is the answer's, in bytes."""

    spans: tuple[Span, ...]
    size: int

    def packs(self) -> tuple[PackName, ...]:
        """The packs it reads from, each once."""
        return tuple(dict.fromkeys(span.pack for span in self.spans))


def parse(body: bytes) -> Batch:
    """Read a request's body. Raises FormatError, or TooMuch."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not JSON: {error}") from error
    if (
        not isinstance(value, dict)
        or value.get("v") != 1
        or not isinstance(value.get("frames"), list)
    ):
        raise FormatError('not {"v":1,"frames":[...]}')
    count = size = 0
    spans: list[Span] = []
    for item in value["frames"]:
        for span in _spans(item):
            count += 1
            size += span.length
            if count > MOST_RANGES or size > MOST_BYTES:
                raise TooMuch(f"more than {MOST_RANGES} ranges or {MOST_BYTES} bytes")
            last = spans[-1] if spans else None
            if last is not None and last.pack == span.pack and last.end == span.offset:
                spans[-1] = Span(span.pack, last.offset, last.length + span.length)
            else:
                spans.append(span)
    if not spans:
        raise FormatError("no range is asked for")
    return Batch(tuple(spans), size)


def _spans(item: object) -> Iterator[Span]:
    if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], str):
        raise FormatError("not a pack and its ranges")
    name, numbers = PackName.parse(item[0]), item[1]
    if not isinstance(numbers, list) or len(numbers) % 2:
        raise FormatError("ranges are pairs of offset and length")
    for offset, length in zip(numbers[::2], numbers[1::2], strict=True):
        for number in (offset, length):
            if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 1 << 53:
                raise FormatError("an offset or length is no number")
        if length == 0:
            raise FormatError("an empty range is asked for")
        yield Span(name, offset, length)
