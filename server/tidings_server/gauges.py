"""What a scrape reads: heads, store folders, the cache, and the state files of ``follow``.

Reads files, so not in the loop. What was read is kept for some seconds, and a store's folder is
listed again only when it changed: a scrape of a thousand repositories costs a ``stat`` for each.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tidings_chunkstore.backends.base import HEAD_NAME
from tidings_chunkstore.errors import StoreError
from tidings_chunkstore.limits import KIB

from .bundles import SUFFIXES
from .edge_rules import file_name
from .runfile import number
from .settings import url_path
from .site import Repository, Site

_KEPT = 10.0  # seconds
_FILES = 2048  # state files that are read
_FILE_MAX = 64 * KIB  # bytes of a state file
_ENTRIES = 100_000  # entries of a folder that are looked at

#: Metric: key of a state file (docs/upstream.md, "State").
FOLLOW: Mapping[str, str] = {
    "tidings_follow_checked_time_seconds": "checked",
    "tidings_follow_good_time_seconds": "good",
    "tidings_follow_changed_time_seconds": "changed",
    "tidings_follow_failures": "failures",
    "tidings_follow_seconds": "seconds",
    "tidings_follow_received_bytes_total": "total_bytes_received",
    "tidings_follow_whole_bytes_total": "total_bytes_full",
    "tidings_follow_changes_total": "total_changes",
}

Rows = dict[str, list[tuple[tuple[str, ...], float]]]


def label(name: str) -> str:
    """A repository's path as a label: that of the root is "/", for "" says "not known"."""
    return name or "/"


@dataclass(frozen=True, slots=True)
class StoreSize:
    """What lies in a store's folder. Sizes in bytes."""

    packs: int
    bytes: int


class Gauges:
    """Reads them for one server process; one call at a time."""

    def __init__(
        self, site: Site, state: Path | None, cache: Path | None, followed: Iterable[str] = ()
    ) -> None:
        """*state*: ``follow``'s folder, if there is one; *cache*: of what is made on request.

        *followed*: the repositories that are followed now; a state outlives its ``[[repo]]``.
        """
        self._site = site
        self._state = state
        self._followed = frozenset(followed)
        self._cache = cache
        self._sizes: dict[Path, tuple[int, StoreSize]] = {}
        self._read: tuple[float, frozenset[str], Rows] | None = None

    def rows(self, names: Iterable[str]) -> Rows:
        """Values by metric, for the repositories at *names* and for all that are followed."""
        wanted = frozenset(names)
        now = time.monotonic()
        if self._read is not None and now < self._read[0] + _KEPT and self._read[1] == wanted:
            return self._read[2]
        rows: Rows = {}
        held = set(self._site.names())
        for name in sorted(wanted):
            for metric, found in self._repository(name, name in held):
                rows.setdefault(metric, []).append(((label(name),), found))
        if self._cache is not None:
            rows["tidings_cache_bytes"] = [((), float(_cache_bytes(self._cache)))]
        if self._state is not None:
            for path, state in follow_states(self._state):
                if path not in self._followed:
                    continue
                for metric, key in FOLLOW.items():
                    value = number(state.get(key))
                    if value is not None:
                        rows.setdefault(metric, []).append(((label(path),), value))
        if len(self._sizes) > 2 * _FILES:
            self._sizes.clear()
        self._read = (time.monotonic(), wanted, rows)
        return rows

    def _repository(self, name: str, held: bool) -> Iterator[tuple[str, float]]:
        found = self._site.repository(name)
        if found is None:
            if held:  # one that is pulled through has no store
                yield "tidings_repository_up", 0
            return
        try:
            head = found.head()
        except StoreError:
            yield "tidings_repository_up", 0
            return
        yield "tidings_repository_up", 1
        yield "tidings_snapshot_time_seconds", head.time
        yield "tidings_metadata_time_seconds", head.timestamp
        yield "tidings_snapshot_serial", head.serial
        yield "tidings_snapshots", len(head.states)
        yield "tidings_published_bytes", sum(file.size for file in head.files)
        with suppress(OSError, StoreError):  # it is being replaced; the next scrape has it
            yield "tidings_head_bytes", os.stat(found.folder / HEAD_NAME).st_size
            newest = os.stat(found.folder / str(head.current.pack)).st_size
            yield "tidings_newest_pack_bytes", newest
            size = self._store_size(found)
            yield "tidings_store_bytes", size.bytes
            yield "tidings_packs", size.packs

    def _store_size(self, repository: Repository) -> StoreSize:
        """Raises OSError. A pack that comes or goes changes the folder's time."""
        changed = os.stat(repository.folder).st_mtime_ns
        known = self._sizes.get(repository.folder)
        if known is not None and known[0] == changed:
            return known[1]
        packs = total = 0
        for name, size in _sizes(repository.folder):
            packs += name.endswith(".pack")
            total += size if name.endswith(".pack") or name == HEAD_NAME else 0
        counted = StoreSize(packs, total)
        self._sizes[repository.folder] = (changed, counted)
        return counted


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """Names and sizes of the regular files in *folder*. Raises OSError."""
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries):
            if count >= _ENTRIES:
                return
            with suppress(FileNotFoundError):  # deleted meanwhile
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(found.st_mode):
                    yield entry.name, found.st_size


def _cache_bytes(folder: Path) -> int:
    try:
        return sum(size for name, size in _sizes(folder) if name.endswith(SUFFIXES))
    except OSError:
        return 0  # nothing was made yet


def follow_states(state: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Repositories and what ``follow`` knows of them (docs/upstream.md, "State").

    Files that are too large, no such state, or of another version are passed over.
    """
    try:
        names = sorted(os.listdir(state / "follow"))[:_FILES]
    except OSError:
        return  # nothing is followed, or it is not for us
    for name in names:
        if not name.endswith(".json") or name.startswith("."):
            continue
        try:
            descriptor = os.open(state / "follow" / name, os.O_RDONLY | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    continue
                data = file.read(_FILE_MAX + 1)
            value = json.loads(data) if len(data) <= _FILE_MAX else None
        except (OSError, ValueError, RecursionError):
            continue
        if not isinstance(value, dict) or value.get("v") != 1:
            continue
        try:
            path = url_path(value.get("path"))
        except ValueError:
            continue
        # The file's name is its repository's: no file can speak for another one.
        if name == file_name(str(value["path"])) + ".json":
            yield path, value
