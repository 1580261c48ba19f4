"""What a client remembers in ``DEST/.tidings/`` between runs: state.json and the head's bytes.

The state says what this program put into DEST, so that it removes nothing else, and which content
each file held when it was last read, so that an unchanged file is not read again. It is a help,
never a proof of anything that comes from the network: where it is missing or broken, the client
reads the files instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.fields import Fields, as_integer, as_text, parse_json
from tidings_chunkstore.ids import ContentId, FileId
from tidings_chunkstore.limits import LIMITS

FOLDER = ".tidings"
STATE = "state.json"
HEAD = "head.json"
SIDE = "side-"  #: and the content id: a side content that no file in DEST tells
FORMAT = "tidings-state"
VERSION = 1
LIMIT = 16 << 20  #: bytes of a state.json that is read
_PATH = 4096  # characters: seeds are absolute paths


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells cheaply that a file is the one that was read: size in bytes, mtime, inode."""

    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class Seen:
    """A file that was read to its end, and what it was."""

    stamp: Stamp
    sha256: FileId
    content: ContentId | None  #: None: not opened


@dataclass(frozen=True, slots=True)
class State:
    """The remembered state. An empty one knows nothing.

    *owned* are the paths that runs of this program put into DEST, or that a main file in DEST
    named; *complete* holds the paths of the last finished run, and *wanted* what it was asked for.
    """

    repo: bytes = b""
    serial: int = 0
    etag: str | None = None
    wanted: str = ""
    trust: str = ""
    head_sha256: bytes = b""  #: of the head.json that the last finished run followed
    bytes_full: int = 0
    owned: frozenset[str] = frozenset()
    complete: tuple[str, ...] = ()
    seen: Mapping[str, Seen] = field(default_factory=dict)  #: by path; absolute for seeds


def encode(state: State) -> bytes:
    """The bytes of state.json."""
    value = {
        "format": FORMAT,
        "v": VERSION,
        "repo": state.repo.hex(),
        "serial": state.serial,
        "etag": state.etag,
        "wanted": state.wanted,
        "trust": state.trust,
        "head_sha256": state.head_sha256.hex(),
        "bytes_full": state.bytes_full,
        "owned": sorted(state.owned),
        "complete": list(state.complete),
        "seen": {
            path: [
                seen.stamp.size,
                seen.stamp.mtime_ns,
                seen.stamp.inode,
                seen.sha256.hex(),
                seen.content.hex() if seen.content else None,
            ]
            for path, seen in sorted(state.seen.items())
        },
    }
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def decode(data: bytes) -> State:
    """Read state.json. Raises FormatError."""
    what = STATE
    value = Fields(parse_json(data, what), what)
    if value.get("format") != FORMAT or value.get("v") != VERSION:
        raise FormatError(f"{what}: of another version")
    etag = value.get("etag")
    return State(
        _hex(value.get("repo"), what),
        value.integer("serial", (1 << 32) - 1),
        None if etag is None else as_text(etag, what),
        value.text("wanted", _PATH),
        value.text("trust"),
        _hex(value.get("head_sha256"), what),
        value.integer("bytes_full"),
        frozenset(as_text(p, what) for p in value.items("owned", 4 * LIMITS.files)),
        tuple(as_text(p, what) for p in value.items("complete", 2 * LIMITS.files)),
        _decode_seen(value.get("seen"), what),
    )


class WorkFolder(Protocol):
    """What ``tidy`` needs of a destination."""

    def work_names(self) -> list[str]:
        """What lies in the work folder."""

    def work_remove(self, name: str) -> None:
        """Remove a file of it."""


def tidy(dest: WorkFolder) -> None:
    """Leave nothing in the work folder but what the next run wants to know."""
    for name in dest.work_names():
        if name not in (STATE, HEAD) and not name.startswith(SIDE):
            dest.work_remove(name)


def load(data: bytes | None) -> State:
    """The state in *data*; an empty one where there is none, or none that can be read."""
    if data is None:
        return State()
    try:
        return decode(data)
    except FormatError:
        return State()  # only a help: everything in it can be found out again


def _decode_seen(value: object, what: str) -> dict[str, Seen]:
    if not isinstance(value, dict) or len(value) > 8 * LIMITS.files:
        raise FormatError(f"{what}: seen is not an object")
    seen = {}
    for path, row in value.items():
        if not isinstance(row, list) or len(row) != 5:
            raise FormatError(f"{what}: not a file that was seen")
        stamp = Stamp(*(as_integer(n, what, (1 << 64) - 1) for n in row[:3]))
        content = None if row[4] is None else ContentId(_hex(row[4], what))
        seen[path] = Seen(stamp, FileId(_hex(row[3], what)), content)
    return seen


def _hex(text: object, what: str) -> bytes:
    try:
        return bytes.fromhex(as_text(text, what))
    except ValueError as error:
        raise FormatError(f"{what}: not hexadecimal") from error
