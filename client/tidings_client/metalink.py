"""Metalinks and mirrorlists: which mirrors have a repository, and which repomd.xml is right.

A metalink is version 3.0 as MirrorManager writes it (``mirrorlist_server``), with its own elements
``mm0:timestamp`` and ``mm0:alternates``; elements are matched by their local names, as librepo does
(``metalink.c``). A mirrorlist is text: a base URL on each line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import httpx

from tidings_chunkstore import saferxml
from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.limits import LIMITS, MIB

from .mirrors import origin_of

LIMIT = 4 * MIB  #: bytes of a metalink or mirrorlist
MIRRORS = 12  #: mirrors of a list that are used, the preferred ones

_NAME = "repomd.xml"
_END = "/repodata/repomd.xml"
_URLS_MAX = 4096
_ALTERNATES_MAX = 64
_ELEMENTS_MAX = 65_536
_DEPTH_MAX = 16
_TEXT_MAX = 2048  # characters of one element
_DIGITS = {"sha256": 64, "sha512": 128}
_WORD = re.compile(r"[0-9]{1,15}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Version:
    """One repomd.xml that a metalink allows."""

    timestamp: int  #: of the metadata, seconds since 1970; 0: not said
    size: int | None  #: bytes
    sha256: str | None  #: hexadecimal
    sha512: str | None

    @property
    def proves(self) -> bool:
        """Whether a forged file would be noticed."""
        return self.sha256 is not None or self.sha512 is not None


@dataclass(frozen=True, slots=True)
class Metalink:
    """What a metalink says: the newest version first, mirrors' base URLs the preferred first."""

    versions: tuple[Version, ...]
    mirrors: tuple[str, ...]


def parse_metalink(data: bytes, url: str) -> Metalink:
    """The metalink in *data*, which came from *url*.

    Left out: mirrors that are not http or https, or http where *url* is https, that carry
    credentials or a query, and versions without SHA-256 or SHA-512.

    Raises:
        FormatError: no metalink of a repomd.xml, a document type in it, a digest or number that is
            none, or a limit passed; ``no-mirror`` where nothing usable is left.
    """
    if len(data) > LIMIT:
        raise FormatError(f"metalink: longer than {LIMIT} bytes")
    document = _Document()
    document.read(data)
    if not document.seen:
        raise FormatError(f"metalink: it has no {_NAME}: {_told(data)}", code="no-mirror")
    versions = [version for version in document.versions if version.proves]
    if not versions or not document.versions[0].proves:
        raise FormatError(f"metalink: it names no SHA-256 or SHA-512 of {_NAME}")
    newest, *rest = versions
    rest.sort(key=lambda version: -version.timestamp)
    wanted = sorted(document.urls, key=lambda found: -found[1])
    return Metalink((newest, *rest), _usable([text for text, _ in wanted], url, "metalink"))


def parse_mirrorlist(data: bytes, url: str) -> tuple[str, ...]:
    """The base URLs in a mirrorlist that came from *url*, as they stand there.

    Lines that begin with ``#`` and those that are no URL are passed over, as librepo does.

    Raises:
        FormatError: it is not text, or has no URL that can be used (``no-mirror``).
    """
    if len(data) > LIMIT:
        raise FormatError(f"mirrorlist: longer than {LIMIT} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise FormatError("mirrorlist: not UTF-8") from error
    lines = [line.strip() for line in text.splitlines()[: 16 * _URLS_MAX]]
    found = [line for line in lines if line and not line.startswith("#")]
    return _usable(found[:_URLS_MAX], url, "mirrorlist")


def _usable(found: Sequence[str], url: str, what: str) -> tuple[str, ...]:
    """Base URLs that may be used, once each. Raises FormatError when none is left."""
    source = httpx.URL(url)
    good: dict[str, None] = {}
    for text in found:
        base = text.removesuffix(_END) + "/" if text.endswith(_END) else text
        if what == "metalink" and not text.endswith(_END):
            continue
        try:
            parsed = httpx.URL(base)
            port = parsed.port or 1
        except (httpx.InvalidURL, ValueError):
            continue
        if (
            parsed.scheme not in ("http", "https")
            or (source.scheme == "https" and parsed.scheme == "http")
            or not parsed.host
            or port > 65_535
            or parsed.userinfo
            or parsed.query
            or parsed.fragment
            or len(base) > _TEXT_MAX
        ):
            continue
        if origin_of(parsed) == origin_of(source):  # the origin's own credentials stay there
            parsed = parsed.copy_with(username=source.username, password=source.password)
        if not parsed.path.endswith("/"):
            parsed = parsed.copy_with(raw_path=parsed.raw_path + b"/")
        good[str(parsed)] = None
    if not good:
        wanted = "https" if source.scheme == "https" else "http or https"
        raise FormatError(f"{what}: it names no mirror with {wanted}", code="no-mirror")
    return tuple(good)


def _told(data: bytes) -> str:
    """What MirrorManager says in a comment where it has nothing, for people."""
    match = re.search(rb"<!--(.{1,300}?)-->", data, re.DOTALL)
    text = match[1].decode("utf-8", "replace") if match else "it is empty"
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


class _Document:
    """Reads a metalink with expat: no document type, no entities, bounded depth and count."""

    def __init__(self) -> None:
        self.seen = False  #: a <file> of that name was there
        self.versions: list[Version] = []
        self.urls: list[tuple[str, int]] = []  #: and preference
        self._path: list[str] = []
        self._inside = False
        self._elements = 0
        self._text: list[str] | None = None
        self._size = 0
        self._attributes: Mapping[str, str] = {}

    def read(self, data: bytes) -> None:
        """Fill the document. Raises FormatError."""
        saferxml.parse(data, "metalink", self._start, self._end, self._characters)

    def _start(self, name: str, attributes: Mapping[str, str]) -> None:
        self._elements += 1
        if self._elements > _ELEMENTS_MAX or len(self._path) >= _DEPTH_MAX:
            raise FormatError("metalink: too many elements")
        self._path.append(name.rpartition(" ")[2])
        self._text = None
        if self._path[0] != "metalink":
            raise FormatError(f"metalink: its root is <{self._path[0][:40]}>")
        if self._path == ["metalink", "files", "file"]:
            # MirrorManager once wrote the folder in front of the name.
            named = attributes.get("name", "").rpartition("/")[2] == _NAME
            if named and self.seen:
                raise FormatError(f"metalink: two files {_NAME}")
            self._inside = named
            if named:
                self.seen = True
                self._version()
            return
        if not self._inside:
            return
        match self._path[3:]:
            case ["alternates", "alternate"]:
                self._version()
            case (
                ["timestamp"]
                | ["size"]
                | ["verification", "hash"]
                | ["resources", "url"]
                | ["alternates", "alternate", "timestamp"]
                | ["alternates", "alternate", "size"]
                | ["alternates", "alternate", "verification", "hash"]
            ):
                self._text, self._size, self._attributes = [], 0, attributes

    def _version(self) -> None:
        if len(self.versions) > _ALTERNATES_MAX:
            raise FormatError(f"metalink: more than {_ALTERNATES_MAX} alternates")
        self.versions.append(Version(0, None, None, None))

    def _characters(self, text: str) -> None:
        if self._text is None:
            return
        self._size += len(text)
        if self._size > _TEXT_MAX:
            raise FormatError(f"metalink: <{self._path[-1][:40]}> is too long")
        self._text.append(text)

    def _end(self, _name: str) -> None:
        path = self._path[3:]
        if self._text is not None:
            text = "".join(self._text).strip()
            self._text = None
            if path == ["resources", "url"]:
                self._url(text)
            else:
                # What stands in <alternate> is about the alternate; the rest about the file.
                at = -1 if path[0] == "alternates" else 0
                self.versions[at] = self._told(self.versions[at], path[-1], text)
        if self._path == ["metalink", "files", "file"]:
            self._inside = False
        self._path.pop()

    def _told(self, version: Version, field: str, text: str) -> Version:
        """*version* with what one more element says."""
        if field == "timestamp":
            return replace(version, timestamp=_number(text, field))
        if field == "size":
            size = _number(text, field)
            if size > LIMITS.main:
                raise FormatError(f"metalink: {_NAME} of {size} bytes, {LIMITS.main} at most")
            return replace(version, size=size)
        kind = self._attributes.get("type", "").lower().replace("-", "")
        if kind not in _DIGITS:
            return version
        digest = text.lower()
        if not re.fullmatch(f"[0-9a-f]{{{_DIGITS[kind]}}}", digest):
            raise FormatError(f"metalink: {text[:80]!r} is not a {kind} checksum")
        if kind == "sha256":
            return replace(version, sha256=digest)
        return replace(version, sha512=digest)

    def _url(self, text: str) -> None:
        if len(self.urls) >= _URLS_MAX:
            raise FormatError(f"metalink: more than {_URLS_MAX} mirrors")
        preference = self._attributes.get("preference", "")
        self.urls.append((text, int(preference) if _WORD.fullmatch(preference) else 0))


def _number(text: str, field: str) -> int:
    if not _WORD.fullmatch(text):
        raise FormatError(f"metalink: <{field}> {text[:40]!r} is no number")
    return int(text)
