"""HTTP's conditional and range requests as pure decisions (RFC 9110, sections 13 and 14)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import formatdate, parsedate_to_datetime

#: Ranges of one request that are answered one by one; more are answered with the whole file.
#: librepo asks for up to 256 of a zchunk file.
MOST_RANGES = 512
_HEADER_MAX = 16 * 1024
_SPEC = re.compile(rb"\s*(?:([0-9]{1,18})-([0-9]{1,18})?|-([0-9]{1,18}))\s*")


@dataclass(frozen=True, slots=True)
class Validators:
    """What identifies a version of an object: a strong entity tag, and its time in seconds."""

    etag: bytes  #: with its quotes
    modified: int


def http_date(seconds: int) -> bytes:
    """An HTTP date."""
    return formatdate(seconds, usegmt=True).encode()


def _seconds(date: bytes) -> int | None:
    try:
        parsed = parsedate_to_datetime(date.decode("ascii"))
        return int((parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None  # a date nobody can read says nothing: RFC 9110 has it ignored


def not_modified(now: Validators, if_none_match: bytes | None, since: bytes | None) -> bool:
    """Whether a GET or HEAD is answered with 304."""
    if if_none_match is not None:
        tags = (tag.strip().removeprefix(b"W/") for tag in if_none_match.split(b","))
        return any(tag in (now.etag, b"*") for tag in tags)
    if since is not None:
        seconds = _seconds(since)
        return seconds is not None and now.modified <= seconds
    return False


def range_holds(now: Validators, if_range: bytes | None) -> bool:
    """Whether the Range is honoured: If-Range names this very version, or is not there."""
    if if_range is None:
        return True
    if if_range.startswith((b'"', b"W/")):
        return if_range.strip() == now.etag
    # A date is a strong validator only when the object is not of this very second.
    recent = datetime.now(UTC).timestamp() - 2
    return _seconds(if_range) == now.modified and now.modified < recent


def parse(header: bytes, size: int, most: int = MOST_RANGES) -> list[tuple[int, int]] | None:
    """The ranges asked for as pairs of offset and length, those that lie outside left out.

    An empty list: none can be satisfied (416). None: the header is to be ignored, because it is
    malformed, has more than *most* ranges, or asks for more bytes than the object has.
    """
    unit, _, specs = header.partition(b"=")
    if unit.strip().lower() != b"bytes" or len(header) > _HEADER_MAX:
        return None
    parts = specs.split(b",")
    if len(parts) > most:
        return None
    found: list[tuple[int, int]] = []
    for part in parts:
        match = _SPEC.fullmatch(part)
        if match is None:
            return None
        first, last, suffix = match.groups()
        if first is None:
            length = min(int(suffix), size)
            start = size - length
        else:
            start = int(first)
            end = min(int(last), size - 1) if last is not None else size - 1
            if last is not None and int(last) < start:
                return None
            length = end - start + 1
        if length > 0 and start < size:
            found.append((start, length))
    if sum(length for _, length in found) > size:
        return None
    return found
