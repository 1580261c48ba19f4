"""What dnf's plugins keep in dnf's cache: the log of what they saved, and mirrors left alone.

Each line of ``CACHE/tidings/saved.jsonl`` is one update that dnf confirmed, and
``CACHE/tidings/mirrors.json`` has the times until which mirrors are not asked (``record`` and
``Memory`` in ``client/dnf-plugins/tidings_dnf.py``). Both are a help for people. Caches of dnf 4
lie in a folder where everybody may write, so files of other users are not read, links are not
followed, and what cannot be is left out.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

VERSION = 1
FOLDER = "tidings"
NAMES = ("saved.jsonl.1", "saved.jsonl")  #: the older one first
MIRRORS = "mirrors.json"
_LIMIT = 4 << 20  # bytes of one file that are read
_LINE = 1 << 14  # bytes of a line that are parsed
_TEXT = 2048  # characters of an id or a URL
_MOST = 1 << 53  # bytes or requests of one update
_LAST = 253402300799  # seconds: the end of the year 9999
_HOUR = 3600.0
_LONGEST = 14 * 24 * _HOUR  # seconds; the plugins leave out what is further ahead, too

#: Where dnf 4 and dnf 5 keep their caches when they run as root; ``~`` is a user's own.
CACHES = ("/var/cache/dnf", "/var/cache/libdnf5", "~/.cache/libdnf5")
#: dnf 4's cache of a user, in the folder for temporary files.
USER_CACHES = ("/var/tmp", "dnf-*")  # noqa: S108 (read only)


@dataclass(frozen=True, slots=True)
class Update:
    """One confirmed update. Bytes of ours are on the wire, those of dnf without headers."""

    time: int  #: seconds since 1970
    repo: str
    program: str  #: dnf4 or dnf5
    url: str
    bytes: int
    requests: int
    bytes_full: int
    requests_full: int


@dataclass(frozen=True, slots=True)
class Total:
    """The updates of one repository together."""

    repo: str
    updates: int
    bytes: int
    requests: int
    bytes_full: int
    requests_full: int
    last: int

    @property
    def saved(self) -> int:
        """Bytes that were not downloaded; negative where Tidings cost more."""
        return self.bytes_full - self.bytes


@dataclass(frozen=True, slots=True)
class Skipped:
    """A mirror, or a whole host, that the plugins do not ask for a while."""

    url: str
    until: int  #: seconds since 1970
    why: str


def trusted_owners() -> frozenset[int]:
    """The users whose files are read: who runs this, and root."""
    return frozenset((os.geteuid(), 0))


def caches(
    home: Path,
    temporary: Path = Path(USER_CACHES[0]),
    configured: Iterable[Path] = (),
    owners: Collection[int] | None = None,
) -> list[Path]:
    """The cache folders of this machine that hold one of our files; *configured* come first."""
    system = [*configured, *(Path(path) for path in CACHES if path[0] != "~")]
    found = [Path(os.path.realpath(path)) for path in system]  # an administrator may have links
    found += [Path(str(home) + path[1:]) for path in CACHES if path[0] == "~"]
    try:
        found += sorted(temporary.glob(USER_CACHES[1]))
    except OSError:
        pass  # somebody else's folder
    by_place: dict[tuple[int, int], Path] = {}
    for path in found:
        if any(_read(path, name, owners) is not None for name in (*NAMES, MIRRORS)):
            status = path.stat()
            by_place.setdefault((status.st_dev, status.st_ino), path)
    return list(by_place.values())


def _read(cache: Path, name: str, owners: Collection[int] | None) -> bytes | None:
    """The start of a file of ours in *cache*; None where there is none that may be believed."""
    owners = trusted_owners() if owners is None else owners
    with ExitStack() as stack:

        def opened(path: str, flags: int, folder: int | None = None) -> int:
            # O_NONBLOCK: a pipe is not waited for.
            flags |= os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            number = os.open(path, flags, dir_fd=folder)
            stack.callback(os.close, number)
            if os.fstat(number).st_uid not in owners:
                raise PermissionError(path)
            return number

        try:
            outer = opened(str(cache), os.O_DIRECTORY)
            inner = opened(FOLDER, os.O_DIRECTORY, outer)
            number = opened(name, 0, inner)
            if not stat.S_ISREG(os.fstat(number).st_mode):
                return None
            with os.fdopen(number, "rb", closefd=False) as file:
                return file.read(_LIMIT)
        except (OSError, ValueError):  # ValueError: a zero byte in a configured name
            return None


def updates(cache: Path, owners: Collection[int] | None = None) -> Iterator[Update]:
    """The lines of the log in *cache*, oldest first."""
    for name in NAMES:
        for line in (_read(cache, name, owners) or b"").splitlines():
            update = _update(line)
            if update is not None:
                yield update


def _parsed(data: bytes) -> Mapping[str, object] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_text(value: object) -> bool:
    """Whether it is short and can go to a terminal."""
    return isinstance(value, str) and len(value) <= _TEXT and value.isprintable()


def _update(line: bytes) -> Update | None:
    value = _parsed(line) if len(line) <= _LINE else None
    if value is None or value.get("v") != VERSION:
        return None
    names = ("bytes", "requests", "bytes_full", "requests_full")
    counts = [n for n in map(value.get, names) if type(n) is int and 0 <= n <= _MOST]
    words = [str(text) for text in map(value.get, ("repo", "program", "url")) if _is_text(text)]
    when = value.get("time")
    if len(counts) != 4 or len(words) != 3 or type(when) is not int or not 0 <= when <= _LAST:
        return None
    return Update(when, words[0], words[1], words[2], *counts)


def skipped(cache: Path, now: float, owners: Collection[int] | None = None) -> list[Skipped]:
    """Whom the plugins do not ask at *now* (seconds since 1970), the soonest first."""
    found = []
    for url, until in (_parsed(_read(cache, MIRRORS, owners) or b"{}") or {}).items():
        if not _is_text(url) or isinstance(until, bool) or not isinstance(until, int | float):
            continue
        if now < until <= now + _LONGEST:  # nor NaN
            shown = re.sub(r"^(\w+://)[^/@]*@", r"\1", url)
            found.append(Skipped(shown, int(until), _why(url, until - now)))
    return sorted(found, key=lambda each: (each.until, each.url))


def _why(url: str, left: float) -> str:
    """The reason, which the file does not name: it follows from whom and for how long."""
    if url.count("/") == 2:
        return "the host did not answer in time"
    if left > 1.2 * _HOUR:
        return "nothing is published there"
    return "it gave nothing that could be used"


def totals(log: Iterable[Update]) -> list[Total]:
    """Summed up by repository, in the order of their ids."""
    by_repo: dict[str, list[Update]] = {}
    for update in log:
        by_repo.setdefault(update.repo, []).append(update)
    return [
        Total(
            repo,
            len(each),
            sum(u.bytes for u in each),
            sum(u.requests for u in each),
            sum(u.bytes_full for u in each),
            sum(u.requests_full for u in each),
            max(u.time for u in each),
        )
        for repo, each in sorted(by_repo.items())
    ]
