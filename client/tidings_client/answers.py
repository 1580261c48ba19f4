"""What an answer's head and body must be before anybody uses them: bounds, lengths, encodings.

And the request that asks for many ranges at once. Each refusal is a ``Failed``: one mirror's
failure with one object, which another attempt or another mirror may heal.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx

from tidings_chunkstore.errors import NetworkError, VerificationError
from tidings_chunkstore.limits import KIB, MIB

from .mirrors import Failed, Mirror

Wanted = tuple[str, int, int]  #: an object's name under tidings/, offset and length in bytes

#: Limits of one batch of frames, as docs/protocol.md states them.
BATCH_RANGES = 65_536
BATCH_BYTES = 64 * MIB
BATCH_REQUEST = 1 * MIB

SKIP = 256 * KIB  #: bytes of a 200 that are read past to reach the wanted range
_DRAINED = 16 * KIB
_FRESH, _STILL = 2, 60  # seconds that a file has lain still
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(?:\d{1,19}|\*)", re.ASCII)
_MISSING = frozenset({404, 410})
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Validators:
    """What a server said of a document, to ask later whether it is still the same (RFC 9110)."""

    etag: str | None = None
    modified: str | None = None  #: Last-Modified, where it is a strong validator


class Batch:
    """The ranges of one or more batch requests, and which comes next."""

    def __init__(self, wanted: Sequence[Wanted]) -> None:
        self.wanted = wanted
        self.next = 0

    def request(self) -> tuple[bytes, int, int]:
        """The body of the next request, how many of *wanted* it asks for, and their bytes.

        Neighbours are asked for as one: the answer is the same, the request is shorter.
        """
        packs: list[tuple[str, list[int]]] = []
        count = ranges = total = size = 0
        for name, offset, length in self.wanted[self.next : self.next + 4 * BATCH_RANGES]:
            new = not packs or packs[-1][0] != name
            joined = not new and packs[-1][1][-2] + packs[-1][1][-1] == offset
            ranges += not joined
            size += (len(name) + 8 if new else 0) + (0 if joined else 22)
            if count and (
                total + length > BATCH_BYTES or ranges > BATCH_RANGES or size > BATCH_REQUEST
            ):
                break
            if new:
                packs.append((name, []))
            if joined:
                packs[-1][1][-1] += length
            else:
                packs[-1][1].extend((offset, length))
            total += length
            count += 1
        body = {"v": 1, "frames": packs}
        return json.dumps(body, separators=(",", ":")).encode(), count, total


def expect(answer: httpx.Response, status: int, mirror: Mirror, path: str) -> None:
    """Raises Failed unless the answer has *status*."""
    found = answer.status_code
    if found == status:
        return
    drain(answer)
    where = f"{mirror}: {path}"
    if found in _MISSING:
        raise Failed(NetworkError(f"{where}: not there (HTTP {found})", code="missing"))
    if found in (401, 403, 407):
        # An S3 that may not be listed says 403 of what is not there.
        code = "forbidden" if found == 403 else "denied"
        raise Failed(NetworkError(f"{where}: access denied (HTTP {found})", code=code))
    transient = found in _TRANSIENT
    busy = found in (429, 503)
    raise Failed(
        NetworkError(f"{where}: HTTP {found}", code="busy" if busy else "status", status=found),
        again=transient,
        after=_retry_after(answer.headers.get("retry-after")) if busy else 0.0,
    )


def drain(answer: httpx.Response) -> None:
    """Read a small body that nobody wants: else its connection could not be used again."""
    got = 0
    for piece in answer.iter_raw():
        got += len(piece)
        if got > _DRAINED:
            return


def promised(
    answer: httpx.Response, size: int | None, limit: int, mirror: Mirror, path: str
) -> None:
    """Refuse by Content-Length what need not be read first. Raises Failed."""
    text = answer.headers.get("content-length", "")
    if not text.isdecimal() or "content-encoding" in answer.headers:
        return
    if int(text) > limit:
        raise Failed(
            NetworkError(f"{mirror}: {path}: {text} bytes, {limit} at most", code="too-large")
        )
    if size is not None and int(text) != size:
        raise VerificationError(
            f"{mirror}: {path} has {text} bytes there, not {size}", code="wrong-size"
        )


def bounded(answer: httpx.Response, limit: int, mirror: Mirror, path: str) -> Iterator[bytes]:
    """The body as it lies on the wire. Raises Failed past *limit* bytes."""
    got = 0
    for piece in answer.iter_raw():
        got += len(piece)
        if got > limit:
            raise Failed(
                NetworkError(f"{mirror}: {path}: longer than {limit} bytes", code="too-large")
            )
        yield piece


def decoded(answer: httpx.Response, limit: int, mirror: Mirror, path: str) -> Iterator[bytes]:
    """The body without a gzip transfer encoding; bounded in steps, so a bomb stays packed."""
    encoding = answer.headers.get("content-encoding", "identity").strip().lower()
    if encoding == "identity":
        yield from bounded(answer, limit, mirror, path)
        return
    if encoding not in ("gzip", "x-gzip"):
        raise Failed(
            NetworkError(f"{mirror}: {path}: encoded as {encoding[:40]!r}", code="protocol")
        )
    packed = zlib.decompressobj(31)
    left = limit
    # What does not compress grows a little in gzip.
    for piece in bounded(answer, limit + limit // 1000 + KIB, mirror, path):
        data = piece
        while not packed.eof:
            room = min(left + 1, 64 * KIB)
            try:
                plain = packed.decompress(data, room)
            except zlib.error as error:
                raise VerificationError(f"{mirror}: {path}: broken gzip") from error
            left -= len(plain)
            if left < 0:
                raise Failed(
                    NetworkError(f"{mirror}: {path}: longer than {limit} bytes", code="too-large")
                )
            if plain:
                yield plain
            data = packed.unconsumed_tail
            if not data and len(plain) < room:
                break
    if not packed.eof:
        raise Failed(
            NetworkError(f"{mirror}: {path}: the answer is cut short", code="truncated"), again=True
        )


def validators_of(headers: Mapping[str, str]) -> Validators:
    """What of an answer's headers can stand for the very bytes (RFC 9110, section 8.8.2.2).

    Last-Modified counts in seconds, and web servers make an ETag of it and the size: a file that
    was written in this very second may be written again in it.
    """
    etag, modified = headers.get("etag"), headers.get("last-modified")
    if modified is None:
        return Validators(etag)
    try:
        age = parsedate_to_datetime(headers.get("date", "")) - parsedate_to_datetime(modified)
    except (ValueError, TypeError):
        return Validators(etag)
    seconds = age.total_seconds()
    return Validators(etag if seconds >= _FRESH else None, modified if seconds >= _STILL else None)


def _retry_after(text: str | None) -> float:
    """Seconds; a date or nothing is one second."""
    return float(text) if text is not None and re.fullmatch(r"[0-9]{1,6}", text) else 1.0


def range_body(
    answer: httpx.Response, mirror: Mirror, path: str, offset: int, length: int
) -> bytes:
    skip = 0
    skip_rest = answer.status_code == 200
    if skip_rest:
        # The whole object: a static host or a cache on the way does not do ranges.
        mirror.ranges = False
        skip = offset
        if skip > SKIP:
            raise Failed(NetworkError(f"{mirror}: answers no ranges", code="no-ranges"))
    elif answer.status_code == 416:
        drain(answer)
        raise Failed(NetworkError(f"{mirror}: {path} is shorter there", code="missing"))
    else:
        expect(answer, 206, mirror, path)
        match = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
        if not match or (int(match[1]), int(match[2])) != (offset, offset + length - 1):
            raise Failed(
                NetworkError(f"{mirror}: {path}: another range than asked", code="protocol")
            )
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise Failed(NetworkError(f"{mirror}: {path}: compressed on the way", code="no-ranges"))
    data = bytearray()
    for piece in answer.iter_raw():
        data += piece
        # One that is read to its end leaves its connection to the next request; where there is
        # more than was asked for, leaving the block cuts it off.
        if len(data) > skip + length or (skip_rest and len(data) == skip + length):
            break
    if len(data) < skip + length:
        raise Failed(
            NetworkError(f"{mirror}: {path}: the answer is cut short", code="truncated"),
            again=True,
        )
    return bytes(memoryview(data)[skip : skip + length])
