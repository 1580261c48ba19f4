"""Metalinks as MirrorManager writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from support.repos import START

_HASHES = ("md5", "sha1", "sha256", "sha512")


def details(data: bytes, timestamp: int = START, hashes: Sequence[str] = _HASHES) -> str:
    """What is said of one repomd.xml."""
    lines = "".join(
        f'    <hash type="{name}">{hashlib.new(name, data).hexdigest()}</hash>\n' for name in hashes
    )
    return (
        f"   <mm0:timestamp>{timestamp}</mm0:timestamp>\n   <size>{len(data)}</size>\n"
        f"   <verification>\n{lines}   </verification>\n"
    )


def metalink(
    newest: bytes,
    bases: Iterable[str],
    older: Sequence[tuple[bytes, int]] = (),
    *,
    timestamp: int = START,
    hashes: Sequence[str] = _HASHES,
) -> bytes:
    """A metalink of *newest* (a repomd.xml), mirrors by preference, *older* ones as alternates."""
    alternates = "".join(
        f"    <mm0:alternate>\n{details(data, when, hashes)}    </mm0:alternate>\n"
        for data, when in older
    )
    if alternates:
        alternates = f"   <mm0:alternates>\n{alternates}   </mm0:alternates>\n"
    urls = "".join(
        f'    <url protocol="{base.partition(":")[0]}" type="{base.partition(":")[0]}" '
        f'location="XX" preference="{max(1, 100 - number)}">'
        f"{base.rstrip('/')}/repodata/repomd.xml</url>\n"
        for number, base in enumerate(bases)
    )
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        '<metalink version="3.0" xmlns="http://www.metalinker.org/" type="dynamic" '
        'pubdate="Thu, 21 May 2026 19:54:04 GMT" generator="mirrormanager" '
        'xmlns:mm0="http://fedorahosted.org/mirrormanager">\n <files>\n'
        '  <file name="repomd.xml">\n'
        f"{details(newest, timestamp, hashes)}{alternates}"
        f'   <resources maxconnections="1">\n{urls}   </resources>\n'
        "  </file>\n </files>\n</metalink>\n"
    ).encode()
