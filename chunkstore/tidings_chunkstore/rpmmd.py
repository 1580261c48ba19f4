"""The rpm-md layout: repodata/repomd.xml and the files that it names.

Format: what createrepo_c writes and librepo reads (librepo ``repomd.c``); there is no other
specification. Elements are matched by their local names, as librepo does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from . import saferxml
from .errors import FormatError
from .ids import ContentId
from .limits import LIMITS
from .listing import (
    Checksum,
    Listing,
    PublishedFile,
    check_tree,
    checksum,
    number,
    order,
    safe_path,
    timestamp,
)

NAME = "rpm-md"
_FOLDER = "repodata"
MAIN = "repodata/repomd.xml"
SIGNATURE = "repodata/repomd.xml.asc"
KEY = "repodata/repomd.xml.key"

#: Order in a pack: what every dnf loads first, what few clients ask for last.
_RANKS = {
    "primary": 1,
    "group": 2,
    "modules": 3,
    "updateinfo": 4,
    "prestodelta": 5,
    "filelists": 6,
    "other": 7,
}
_RANK_REST = 8
_RANK_DATABASE = 9

#: Suffixes of a record's type that say how the same content is wrapped.
_WRAPPINGS = ("_gz", "_xz", "_bz2", "_zst", "_zck")

_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@:-]{0,63}")
_XML_BASE = "http://www.w3.org/XML/1998/namespace base"
_ELEMENTS_MAX = 32 * LIMITS.files
_DEPTH_MAX = 16
_TEXT_MAX = 4096  # characters of one element that is read
_TAGS_MAX = 256
_REVISION_MAX = 256

#: Elements of a <data> whose text is read.
_FIELDS = frozenset({"checksum", "open-checksum", "size", "open-size", "timestamp"})


def track_of(record_type: str) -> str:
    """The track of a record: its type without the suffix of a wrapping."""
    for suffix in _WRAPPINGS:
        if record_type.endswith(suffix) and len(record_type) > len(suffix):
            return track_of(record_type[: -len(suffix)])
    return record_type


def rank_of(track: str) -> int:
    """The rank of a track; see ``_RANKS``."""
    if track.endswith("_db"):
        return _RANK_DATABASE
    return _RANKS.get(track, _RANK_REST)


class RpmMd:
    """The layout; see ``layout.Layout``."""

    name = NAME
    partial = False

    def mains(self) -> tuple[str, ...]:
        """The main file and what lies beside it, in the order in which they are switched."""
        return (KEY, SIGNATURE, MAIN)

    def beside(self, main: str) -> tuple[str, ...]:
        """The paths that may lie beside *main*, in the order in which they are switched."""
        return tuple(path for path in self.mains() if path != main)

    def describe(self, path: str) -> tuple[str, str]:
        """Type and track of a path of ``mains``."""
        return {KEY: ("key", "key"), SIGNATURE: ("signature", "signature")}.get(
            path, ("repomd", "repomd")
        )

    def parse(self, main: bytes, path: str | None = None) -> Listing:
        """The publish that the bytes of a repomd.xml describe.

        Left out and named in ``skipped``: a record with ``xml:base``, without location or type,
        of a type or checksum not known here, the second of two equal records, and a location that
        is not directly in ``repodata/``: what a mirror names is written there and nowhere else.

        Raises:
            FormatError: one clear line: not a repomd.xml, an entity or document type in it, an
                unsafe path, a number or digest that is none, two different records of one path,
                or a limit passed.
        """
        what = path or MAIN
        if len(main) > LIMITS.main:
            raise FormatError(f"{what}: longer than {LIMITS.main} bytes")
        document = _Document(what)
        document.read(main)
        files: dict[str, PublishedFile] = {}
        skipped: list[tuple[str, str]] = []
        for record in document.records:
            reason = record.unusable()
            if reason is not None:
                skipped.append((record.label(), reason))
                continue
            file = record.file(what)
            folder, _, name = file.path.partition("/")
            if folder != _FOLDER or not name or "/" in name:
                skipped.append((record.label(), "its location is not in repodata/"))
                continue
            other = files.setdefault(file.path, file)
            if other is not file:
                if (other.checksum, other.size) != (file.checksum, file.size):
                    raise FormatError(f"{what}: two different records of {file.path!r}")
                skipped.append((record.label(), f"{file.path} is named by {other.type} already"))
        check_tree([*files, *self.mains()], what)
        for reserved in self.mains():
            if reserved in files:
                raise FormatError(f"{what}: a record names {reserved!r}", code="unsafe-path")
        return Listing(
            layout=NAME,
            main=MAIN,
            files=order(files.values()),
            timestamp=max((file.timestamp for file in files.values()), default=0),
            revision=document.revision,
            tags=tuple(document.tags),
            skipped=tuple(skipped),
        )


class _Record:
    """One <data> element: its attributes and texts as they stand."""

    __slots__ = ("base", "href", "texts", "type")

    def __init__(self, record_type: str) -> None:
        self.type = record_type  #: empty when it has none
        self.href: str | None = None
        self.base: str | None = None
        #: element: (its type attribute, its text)
        self.texts: dict[str, tuple[str, str]] = {}

    def label(self) -> str:
        """How ``skipped`` names the record."""
        if not self.type:
            return "a record without a type"
        return self.type[:64] if self.type.isprintable() else ascii(self.type[:64])

    def unusable(self) -> str | None:
        """Why the record is left out, if it is."""
        if not self.type:
            return "no type"
        if not _TYPE.fullmatch(self.type):
            return "its type is not a word"
        if self.base:
            return "xml:base points to another host"
        if self.href is None:
            return "no location"
        if "checksum" in self.texts:
            algorithm, digest = self.texts["checksum"]
            if checksum(algorithm, digest, self.label()) is None:
                return f"unknown checksum {algorithm[:20]!r}"
        return None

    def file(self, what: str) -> PublishedFile:
        """The file that a usable record names."""
        about = f"{what}: {self.type}"
        promised = self._digest("open-checksum", about)
        track = track_of(self.type)
        return PublishedFile(
            path=safe_path(self.href or "", about),
            type=self.type,
            track=track,
            rank=rank_of(track),
            size=self._number("size", LIMITS.published, about),
            checksum=self._digest("checksum", about),
            open_size=self._number("open-size", LIMITS.content, about),
            open_id=(
                ContentId.from_hex(promised.hex)
                if promised is not None and promised.algorithm == "sha256"
                else None
            ),
            timestamp=self._timestamp(about),
        )

    def _digest(self, field: str, about: str) -> Checksum | None:
        if field not in self.texts:
            return None
        return checksum(*self.texts[field], f"{about}: {field}")

    def _number(self, field: str, maximum: int, about: str) -> int | None:
        text = self.texts.get(field, ("", ""))[1]
        return number(text, maximum, f"{about}: {field}") if text.strip() else None

    def _timestamp(self, about: str) -> int:
        text = self.texts.get("timestamp", ("", ""))[1]
        return timestamp(text, f"{about}: timestamp") if text.strip() else 0


class _Document:
    """Reads a repomd.xml with expat: no document type, no entities, bounded depth and count."""

    def __init__(self, what: str) -> None:
        self.records: list[_Record] = []
        self.revision = ""
        self.tags: list[str] = []
        self._what = what
        self._path: list[str] = []
        self._elements = 0
        self._text: list[str] | None = None
        self._text_size = 0
        self._text_type = ""

    def read(self, data: bytes) -> None:
        """Fill the document. Raises FormatError."""
        saferxml.parse(data, self._what, self._start, self._end, self._characters)

    def _start(self, name: str, attributes: Mapping[str, str]) -> None:
        self._elements += 1
        if self._elements > _ELEMENTS_MAX or len(self._path) >= _DEPTH_MAX:
            raise FormatError(f"{self._what}: too many elements")
        local = name.rpartition(" ")[2]
        self._path.append(local)
        if self._path[0] != "repomd":
            raise FormatError(f"{self._what}: not a repomd.xml, its root is <{local[:40]}>")
        self._text = None
        match self._path[1:]:
            case ["data"]:
                if len(self.records) >= LIMITS.files:
                    raise FormatError(f"{self._what}: more than {LIMITS.files} records")
                self.records.append(_Record(attributes.get("type", "")))
            case ["data", "location"]:
                record = self.records[-1]
                if record.href is not None:
                    raise FormatError(f"{self._what}: two locations in {record.label()}")
                record.href = attributes.get("href")
                record.base = attributes.get(_XML_BASE)
            case ["data", field] if field in _FIELDS:
                if field in self.records[-1].texts:
                    raise FormatError(
                        f"{self._what}: two {field} elements in {self.records[-1].label()}"
                    )
                self._collect(attributes.get("type", ""))
            case ["revision"] | ["tags", "content"]:
                self._collect("")

    def _collect(self, type_attribute: str) -> None:
        self._text, self._text_size, self._text_type = [], 0, type_attribute

    def _characters(self, text: str) -> None:
        if self._text is None:
            return
        self._text_size += len(text)
        if self._text_size > _TEXT_MAX:
            raise FormatError(f"{self._what}: <{self._path[-1]}> is too long")
        self._text.append(text)

    def _end(self, _name: str) -> None:
        if self._text is not None:
            text = "".join(self._text).strip()
            match self._path[1:]:
                case ["data", field]:
                    self.records[-1].texts[field] = (self._text_type, text)
                case ["revision"]:
                    self.revision = self._word(text)
                case ["tags", "content"]:
                    if len(self.tags) >= _TAGS_MAX:
                        raise FormatError(f"{self._what}: more than {_TAGS_MAX} tags")
                    self.tags.append(self._word(text))
            self._text = None
        self._path.pop()

    def _word(self, text: str) -> str:
        if len(text) > _REVISION_MAX or not text.isprintable():
            raise FormatError(f"{self._what}: <{self._path[-1]}> is not a short line")
        return text


RPM_MD = RpmMd()
