"""The apt layout: InRelease, Release and Release.gpg beside the component folders.

Format: https://wiki.debian.org/DebianRepository/Format; InRelease is Release in the cleartext
signature framework of RFC 9580, section 7. Paths are relative to the folder of InRelease, which
is the repository's root here (``dists/SUITE``, or the folder of a flat repository).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone

from .errors import FormatError
from .ids import ContentId
from .limits import LIMITS
from .listing import (
    COMPRESSIONS,
    Checksum,
    Listing,
    PublishedFile,
    check_tree,
    checksum,
    number,
    order,
    safe_path,
)

NAME = "apt"
INRELEASE = "InRelease"
RELEASE = "Release"
SIGNATURE = "Release.gpg"

#: Sections by preference: SHA-256 names contents here, so it comes before SHA-512.
_SECTIONS = {"sha256": "sha256", "sha512": "sha512", "sha1": "sha1", "md5sum": "md5", "md5": "md5"}
_PREFERENCE = ("sha256", "sha512", "sha1", "md5")

_RANKS = {
    "packages": 1,
    "sources": 2,
    "translation": 3,
    "components": 4,
    "contents": 6,
}
_RANK_REST = 8

_BEGIN = b"-----BEGIN PGP SIGNED MESSAGE-----"
_SIGNATURE_BEGIN = b"-----BEGIN PGP SIGNATURE-----"
_SIGNATURE_END = b"-----END PGP SIGNATURE-----"

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_DATE = re.compile(
    r"(?:[A-Z][a-z]{2}, +)?(\d{1,2}) ([A-Z][a-z]{2}) (\d{4}) (\d{1,2}):(\d\d):(\d\d) "
    r"(?:UTC|GMT|Z|([+-])(\d\d)(\d\d))",
    re.ASCII,
)


def is_clearsigned(data: bytes) -> bool:
    """Whether *data* starts as a cleartext-signed message does."""
    return data.startswith(_BEGIN)


def cleartext(data: bytes, what: str = INRELEASE) -> bytes:
    """The signed text of a cleartext-signed message: armor and dash-escapes removed, LF line ends.

    As strict as apt: nothing but the message in the file, no other armor header than ``Hash``,
    no line of the text that starts with an unescaped dash.

    Raises:
        FormatError: it is not one whole such message.
    """
    lines = [line.rstrip(b" \t\r") for line in data.split(b"\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines or lines[0] != _BEGIN:
        raise FormatError(f"{what}: not a clearsigned message")
    start = 1
    while start < len(lines) and lines[start]:
        if not lines[start].startswith(b"Hash:"):
            raise FormatError(f"{what}: unknown armor header {lines[start][:40]!r}")
        start += 1
    text: list[bytes] = []
    for position in range(start + 1, len(lines)):
        line = lines[position]
        if line.startswith(b"- "):
            text.append(line[2:])
        elif not line.startswith(b"-"):
            text.append(line)
        elif line == _SIGNATURE_BEGIN:
            _expect_signature(lines, position, what)
            return b"\n".join(text) + b"\n"
        else:
            raise FormatError(f"{what}: a line of the signed text starts with a dash")
    raise FormatError(f"{what}: the signature is missing")


def _expect_signature(lines: list[bytes], begin: int, what: str) -> None:
    inner = lines[begin + 1 : -1]
    if lines[-1] != _SIGNATURE_END or any(line.startswith(b"-") for line in inner):
        raise FormatError(f"{what}: the signature does not end, or something follows it")


class Apt:
    """The layout; see ``layout.Layout``."""

    name = NAME
    partial = True

    def mains(self) -> tuple[str, ...]:
        """The main file and what lies beside it, in the order in which they are switched.

        apt asks for InRelease first and for Release only where there is none, so InRelease goes
        last; Release.gpg goes before Release because a signature without its file is ignored.
        """
        return (SIGNATURE, RELEASE, INRELEASE)

    def beside(self, main: str) -> tuple[str, ...]:
        """The paths that may lie beside *main*, in the order in which they are switched."""
        return (SIGNATURE, RELEASE) if main == INRELEASE else (SIGNATURE,)

    def describe(self, path: str) -> tuple[str, str]:
        """Type and track of a path of ``mains``."""
        kind = {SIGNATURE: "signature", RELEASE: "release"}.get(path, "inrelease")
        return kind, kind

    def parse(self, main: bytes, path: str | None = None) -> Listing:
        """The publish that the bytes of an InRelease or Release describe.

        *path* is ``InRelease`` or ``Release``; without it the armor decides. Files in ``by-hash``
        folders are copies that Release never lists, so they are not part of a listing.

        Raises:
            FormatError: one clear line: not a Release, an unsafe path, a number, date or digest
                that is none, sections that contradict each other, or a limit passed.
        """
        signed = is_clearsigned(main)
        what = path or (INRELEASE if signed else RELEASE)
        if len(main) > LIMITS.main:
            raise FormatError(f"{what}: longer than {LIMITS.main} bytes")
        if what.rpartition("/")[2] == INRELEASE and not signed:
            raise FormatError(f"{what}: not a clearsigned message")
        fields = _fields(cleartext(main, what) if signed else main, what)
        digests = _digests(fields, what)
        check_tree([*digests, *self.mains()], what)
        # apt-ftparchive lists the very Release that it is writing, with a digest of a part of it.
        skipped = tuple((name, "lists itself") for name in self.mains() if name in digests)
        date = fields.get("date", "")
        seconds = _seconds(date, f"{what}: Date") if date else 0
        until = fields.get("valid-until", "")
        return Listing(
            layout=NAME,
            main=INRELEASE if signed else RELEASE,
            files=order(
                _file(name, digests, seconds) for name in digests if name not in self.mains()
            ),
            timestamp=seconds,
            revision=date,
            skipped=skipped,
            valid_until=_seconds(until, f"{what}: Valid-Until") if until else None,
        )


_Digests = dict[str, tuple[int, dict[str, Checksum]]]


def _fields(text: bytes, what: str) -> dict[str, str]:
    """The fields of one deb822 stanza, names in lower case, continuation lines kept as lines."""
    try:
        lines = text.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise FormatError(f"{what}: not UTF-8 at byte {error.start}") from error
    fields: dict[str, list[str]] = {}
    current: list[str] | None = None
    ended = False
    for line in lines:
        if not line.strip():
            ended = ended or bool(fields)
            continue
        if ended:
            raise FormatError(f"{what}: a second paragraph")
        if line[0] in " \t":
            if current is None:
                raise FormatError(f"{what}: starts with a continuation line")
            current.append(line.strip())
            continue
        name, colon, value = line.partition(":")
        if not colon or not re.fullmatch(r"[!-9;-~]+", name):
            raise FormatError(f"{what}: not a field: {line[:60]!r}")
        if name.lower() in fields:
            raise FormatError(f"{what}: the field {name[:40]!r} twice")
        current = fields[name.lower()] = [value.strip()]
    return {name: "\n".join(values) for name, values in fields.items()}


def _digests(fields: dict[str, str], what: str) -> _Digests:
    """Size and checksums by path, merged from all sections."""
    found: _Digests = {}
    sections = [name for name in fields if name in _SECTIONS]
    if not sections:
        raise FormatError(f"{what}: not a Release, it has no list of files")
    for section in sections:
        about = f"{what}: {section}"
        for line in fields[section].split("\n"):
            if not line:
                continue
            words = line.split(None, 2)
            if len(words) != 3:
                raise FormatError(f"{about}: not a file: {line[:80]!r}")
            path = safe_path(words[2], about)
            digest = checksum(_SECTIONS[section], words[0], f"{about}: {path}")
            if digest is None:
                continue
            size = number(words[1], LIMITS.published, f"{about}: {path}")
            known_size, known = found.setdefault(path, (size, {}))
            if known_size != size or known.setdefault(digest.algorithm, digest) != digest:
                raise FormatError(f"{about}: two different entries of {path!r}")
        if len(found) > LIMITS.files:
            raise FormatError(f"{what}: more than {LIMITS.files} files")
    return found


def _file(path: str, digests: _Digests, seconds: int) -> PublishedFile:
    size, known = digests[path]
    track = _plain(path)
    kind = _kind(track)
    open_size: int | None = None
    open_id: ContentId | None = None
    # Release lists the uncompressed index even where only compressed ones are published.
    if track in digests:
        open_size, opened = digests[track]
        if "sha256" in opened:
            open_id = ContentId.from_hex(opened["sha256"].hex)
    return PublishedFile(
        path=path,
        type=kind,
        track=track,
        rank=_RANKS.get(kind, _RANK_REST),
        size=size,
        checksum=next(known[name] for name in _PREFERENCE if name in known),
        open_size=open_size,
        open_id=open_id,
        timestamp=seconds,
    )


def _plain(path: str) -> str:
    """*path* without the suffix of a compression."""
    for suffix in COMPRESSIONS:
        if path.endswith(suffix) and not path.endswith("/" + suffix):
            return path[: -len(suffix)]
    return path


def _kind(track: str) -> str:
    """What an index is, from its name: main/Contents-amd64 is "contents"."""
    name = track.rpartition("/")[2]
    word = re.split(r"[-.]", name, maxsplit=1)[0].lower()
    if word == "release":
        return "component-release"
    return word if re.fullmatch("[a-z0-9]{1,32}", word) else "index"


def _seconds(text: str, what: str) -> int:
    """Seconds since 1970 of a Release's date. Raises FormatError."""
    match = _DATE.fullmatch(text)
    if match is None or match[2] not in _MONTHS:
        raise FormatError(f"{what}: {text[:60]!r} is not a date")
    zone = UTC
    if match[7]:
        offset = timedelta(hours=int(match[8]), minutes=int(match[9]))
        if offset >= timedelta(days=1):
            raise FormatError(f"{what}: {text[:60]!r} is not a date")
        zone = timezone(offset if match[7] == "+" else -offset)
    try:
        moment = datetime(
            int(match[3]),
            _MONTHS.index(match[2]) + 1,
            int(match[1]),
            int(match[4]),
            int(match[5]),
            int(match[6]),
            tzinfo=zone,
        )
    except ValueError as error:
        raise FormatError(f"{what}: {text[:60]!r} is not a date") from error
    seconds = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)
    if seconds < 0:
        raise FormatError(f"{what}: {text[:60]!r} is before 1970")
    return seconds


APT = Apt()
