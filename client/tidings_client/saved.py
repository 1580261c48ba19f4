"""What dnf's plugins saved: the small log that they keep in dnf's cache, read and summed up.

Each line of ``CACHE/tidings/saved.jsonl`` is one update that dnf confirmed (see
``client/dnf-plugins/tidings_dnf.py``, ``saved``). It is a help for people; a line that cannot be
read is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

VERSION = 1
FOLDER = "tidings"
NAMES = ("saved.jsonl.1", "saved.jsonl")  #: the older one first
_LIMIT = 4 << 20  # bytes of one log that are read

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


def caches(home: Path, temporary: Path = Path(USER_CACHES[0])) -> list[Path]:
    """The cache folders of this machine that hold a log."""
    found = [Path(str(home) + path[1:] if path[0] == "~" else path) for path in CACHES]
    try:
        found += sorted(temporary.glob(USER_CACHES[1]))
    except OSError:
        pass  # somebody else's folder
    return [path for path in found if any(_is_log(path / FOLDER / name) for name in NAMES)]


def _is_log(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False  # in a folder that is not ours to read


def updates(cache: Path) -> Iterator[Update]:
    """The lines of the log in *cache*, oldest first."""
    for name in NAMES:
        try:
            with (cache / FOLDER / name).open("rb") as file:
                data = file.read(_LIMIT)
        except OSError:
            continue
        for line in data.splitlines():
            update = _update(line)
            if update is not None:
                yield update


def _update(line: bytes) -> Update | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, Mapping) or value.get("v") != VERSION:
        return None
    numbers = [value.get(name) for name in ("bytes", "requests", "bytes_full", "requests_full")]
    texts = [value.get(name) for name in ("repo", "program", "url")]
    when = value.get("time")
    counts = [n for n in numbers if type(n) is int and n >= 0]
    words = [text for text in texts if isinstance(text, str)]
    if len(counts) != 4 or len(words) != 3 or type(when) is not int:
        return None
    return Update(when, words[0], words[1], words[2], *counts)


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
