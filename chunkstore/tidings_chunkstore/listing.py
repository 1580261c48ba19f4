"""What a repository's main file says: the files of one publish, as values.

Shared by the two layouts (``rpmmd``, ``apt``); ``layout`` exports it all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import FormatError
from .ids import ContentId
from .limits import LIMITS

#: First folders that belong to Tidings: no published file may lie there.
RESERVED = frozenset({"tidings", ".tidings"})

#: Suffixes of the compressed forms in which one content is published.
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst", ".lzma", ".lz4", ".zck")

_PART_BYTES = 255  # NAME_MAX of every file system that a mirror uses
_TIMESTAMP_MAX = 253_402_300_799  # 9999-12-31T23:59:59Z, the last second datetime can name
_DIGITS = re.compile(r"[0-9]{1,19}")

#: Digest sizes in bytes by the names that repomd.xml and Release use; hashlib has them all.
_DIGEST_BYTES = {"md5": 16, "sha1": 20, "sha224": 28, "sha256": 32, "sha384": 48, "sha512": 64}
_ALIASES = {"sha": "sha1", "md5sum": "md5"}


@dataclass(frozen=True, slots=True)
class Checksum:
    """A digest of a file as published. ``algorithm`` is hashlib's name for it."""

    algorithm: str
    hex: str

    @property
    def strong(self) -> bool:
        """Whether it proves a file against somebody who wants to forge one."""
        return self.algorithm not in ("md5", "sha1")


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """One file of a publish, as its main file names it."""

    path: str  #: relative to the repository's root; safe to join
    type: str  #: rpm-md: the record's type; apt: what the index is ("packages", ...)
    track: str  #: lineage over time: the same track has the same kind of content
    rank: int  #: order in a pack, what clients want most first
    size: int | None = None  #: bytes as published
    checksum: Checksum | None = None  #: of the bytes as published
    open_size: int | None = None  #: bytes of the content
    open_id: ContentId | None = None  #: as promised by the main file; to be proven
    timestamp: int = 0  #: seconds since 1970


@dataclass(frozen=True, slots=True)
class Listing:
    """The publish that one main file describes."""

    layout: str  #: "rpm-md" or "apt"
    main: str  #: path of the file that is switched last
    files: tuple[PublishedFile, ...]  #: all but the main file and what lies beside it, by rank
    timestamp: int  #: newest data timestamp; apt: Date; 0 when there is none
    revision: str  #: rpm-md: revision; apt: Date as written
    tags: tuple[str, ...] = ()  #: rpm-md: content tags
    skipped: tuple[tuple[str, str], ...] = ()  #: (what, why it is neither published nor fetched)
    valid_until: int | None = None  #: apt: Valid-Until, seconds since 1970

    def by_path(self) -> dict[str, PublishedFile]:
        """The files by their paths."""
        return {file.path: file for file in self.files}


def safe_path(path: str, what: str) -> str:
    """*path* when it may be joined to a repository's root.

    A path names a file literally: it has no escapes, so a client quotes it for a URL.

    Raises:
        FormatError: it is absolute, climbs, has empty parts, characters that do not print or a
            backslash, is too long, or lies in a folder of Tidings. *what* begins the message.
    """
    problem = _path_problem(path)
    if problem:
        raise FormatError(f"{what}: unsafe path {path[:100]!r}: {problem}", code="unsafe-path")
    return path


def _path_problem(path: str) -> str | None:
    if not path:
        return "it is empty"
    if len(path) > LIMITS.path:
        return f"it is longer than {LIMITS.path} characters"
    if not path.isprintable():  # also refuses NUL, line ends, lone surrogates, bidi controls
        return "a character in it does not print"
    if "\\" in path:
        return "it has a backslash"
    parts = path.split("/")
    if not parts[0]:
        return "it is absolute"
    if parts[0] in RESERVED:
        return f"{parts[0]}/ belongs to Tidings"
    for part in parts:
        if part in ("", ".", ".."):
            return f"it has the part {part!r}"
        if len(part.encode()) > _PART_BYTES:
            return f"a part of it is longer than {_PART_BYTES} bytes"
    return None


def check_tree(paths: Iterable[str], what: str) -> None:
    """Raises FormatError when one of *paths* is named as a file and as a folder."""
    known = set(paths)
    for path in known:
        end = path.rfind("/")
        while end > 0:
            if path[:end] in known:
                raise FormatError(f"{what}: {path[:end]!r} is named as a file and as a folder")
            end = path.rfind("/", 0, end)


def checksum(algorithm: str, digest: str, what: str) -> Checksum | None:
    """The checksum, or None when the algorithm is not known here.

    Raises:
        FormatError: *digest* is not the hexadecimal of such a digest.
    """
    name = algorithm.strip().lower()
    name = _ALIASES.get(name, name)
    size = _DIGEST_BYTES.get(name)
    if size is None:
        return None
    text = digest.strip().lower()
    if len(text) != 2 * size or not re.fullmatch("[0-9a-f]+", text):
        raise FormatError(f"{what}: {digest.strip()[:80]!r} is not a {name} checksum")
    return Checksum(name, text)


def number(text: str, maximum: int, what: str) -> int:
    """The decimal *text*. Raises FormatError when it is not one, or above *maximum*."""
    text = text.strip()
    if not _DIGITS.fullmatch(text):  # fullmatch on ASCII: int() takes "1_0", "٣" and " -1"
        raise FormatError(f"{what}: {text[:40]!r} is not a number")
    value = int(text)
    if value > maximum:
        raise FormatError(f"{what}: {value} is above the limit of {maximum}")
    return value


def timestamp(text: str, what: str) -> int:
    """Seconds since 1970; the old yum createrepo writes a fraction, which is dropped.

    Raises:
        FormatError: it is not a number, or past the year 9999.
    """
    whole, _, fraction = text.strip().partition(".")
    if fraction and not _DIGITS.fullmatch(fraction):
        raise FormatError(f"{what}: {text.strip()[:40]!r} is not a time")
    return number(whole, _TIMESTAMP_MAX, what)


def order(files: Iterable[PublishedFile]) -> tuple[PublishedFile, ...]:
    """*files* by rank, kin together, the same for every order in the main file."""
    return tuple(sorted(files, key=lambda file: (file.rank, file.track, file.type, file.path)))
