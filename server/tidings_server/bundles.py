"""Delta bundles on request: made once however many ask, in a process of its own, kept on disk.

A bundle's name in the cache follows from the repository, the two packs and the tracks, all of
which are named by hashes: what is kept never goes stale, and any number of server processes may
share a folder. Making takes seconds of a processor, so a few are made at a time and a bounded
number wait; who comes then is told to come again, and walks the edges in the packs meanwhile.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tidings_chunkstore.backends.local import explain
from tidings_chunkstore.errors import TidingsError, UnsettledError
from tidings_chunkstore.places import PackName

log = logging.getLogger("tidings.bundles")

RETRY_AFTER = 10  #: seconds, told to who was sent away
_PATIENCE = 25.0  # seconds a request waits for its bundle; the making goes on
_LONGEST = 300.0  # seconds one making may take
_AGAIN = 60.0  # seconds before what could not be made is tried again
_FAILURES = 256  # that are remembered
_USED = 60.0  # seconds by which the note of a last use may be late
_INDEX = ".caibx"
_INDEX_NS = 86_400 * 10**9  # indexes are small, and answer for blobs that are gone: kept longer
SUFFIX = ".tdb"  #: of bundles, and what is kept like them
#: Of all that lies in the cache; the blobs are those that casync's chunks are read from.
SUFFIXES = (SUFFIX, _INDEX, ".blob")
#: Exit codes of the maker for "not retained" and for a damaged store; any other but 0 is a failure.
NOT_RETAINED = 44
DAMAGED = 45


class Busy(UnsettledError):
    """Too many are in the making, or this one is not ready yet."""

    code = "busy"


class NotRetained(TidingsError):
    """One of the two snapshots is not in the store any more."""

    code = "not-retained"


class NotMade(TidingsError):
    """Making it failed, and is not tried again for a while."""

    code = "not-made"


class Job(Protocol):
    """Something that is made in a process of its own, and kept by its name."""

    @property
    def store(self) -> Path:
        """The folder of the store that it is made from."""
        ...

    @property
    def name(self) -> str:
        """Its file in the cache; it follows from all that decides the bytes."""
        ...

    @property
    def worker(self) -> str:
        """The module that makes it."""
        ...

    def request(self) -> dict[str, object]:
        """What the worker reads, as JSON."""
        ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """A bundle: the store's folder, the repository's identity, the two packs, and the tracks."""

    store: Path
    repo: bytes
    older: PackName
    newer: PackName
    tracks: tuple[str, ...] | None  #: None: all of them

    @property
    def name(self) -> str:
        """Its file in the cache."""
        key = [self.repo.hex(), str(self.older), str(self.newer), self.tracks]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:40] + SUFFIX

    @property
    def worker(self) -> str:
        """The module that makes it."""
        return "tidings_server.bundle_worker"

    def request(self) -> dict[str, object]:
        """What the worker reads."""
        return {
            "store": str(self.store),
            "older": str(self.older),
            "newer": str(self.newer),
            "tracks": self.tracks,
        }


class Bundles:
    """The bundles of one server process. *most* bytes are kept in *folder*; *queue* may wait."""

    def __init__(self, folder: Path, *, most: int, queue: int, at_once: int = 1) -> None:
        self.folder = folder
        self.most = most
        self._queue = queue
        self._slots = asyncio.Semaphore(at_once)
        self._making: dict[str, asyncio.Task[Path]] = {}
        self._makes_for: dict[str, str] = {}
        self._failed: OrderedDict[str, float] = OrderedDict()
        #: Told of each question, its kind and result, and of each that was made, with its seconds.
        self.told: Callable[[str, str, float | None], None] = lambda kind, result, seconds: None

    def making(self) -> int:
        """How many are in the making, or wait for their turn."""
        return len(self._making)

    async def get(self, wanted: Job, client: str = "") -> Path:
        """The file of a bundle. One *client* (its address) has half of the queue at most.

        Raises Busy, NotRetained, LocalError, and NotMade when making it failed.
        """
        path = self.folder / wanted.name
        if await asyncio.to_thread(_touch, path):
            self._tell(wanted, "hit")
            return path
        task = self._making.get(wanted.name)
        if task is not None:
            self._tell(wanted, "joined")
        else:
            if len(self._making) >= self._queue:
                self._tell(wanted, "refused")
                raise Busy(f"{len(self._making)} bundles are in the making")
            if list(self._makes_for.values()).count(client) >= max(2, self._queue // 2):
                self._tell(wanted, "refused")
                raise Busy("too many are in the making for one client")
            if time.monotonic() < self._failed.get(wanted.name, -_AGAIN) + _AGAIN:
                self._tell(wanted, "failed")
                raise NotMade("it could not be made a moment ago")
            self._makes_for[wanted.name] = client
            self._tell(wanted, "miss")
            task = asyncio.ensure_future(self._make(wanted, path))
            self._making[wanted.name] = task
            task.add_done_callback(lambda done: self._done(wanted, done))
        try:
            return await asyncio.wait_for(asyncio.shield(task), _PATIENCE)
        except TimeoutError as error:
            self._tell(wanted, "late")
            raise Busy("the bundle is in the making") from error

    def used(self, wanted: Job, path: Path) -> bool:
        """Whether a bundle that was made is there; it counts as used, give or take a minute."""
        try:
            if time.time() - os.stat(path).st_atime > _USED:
                _touch(path)
        except (OSError, TidingsError):
            return False
        self._tell(wanted, "hit")
        return True

    async def close(self) -> None:
        """Stop what is under way."""
        tasks = list(self._making.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _done(self, wanted: Job, task: asyncio.Task[Path]) -> None:
        self._making.pop(wanted.name, None)
        self._makes_for.pop(wanted.name, None)
        error = None if task.cancelled() else task.exception()
        if error is None or isinstance(error, NotRetained):
            return
        self._tell(wanted, "failed")
        # Once, however many waited.
        self._failed[wanted.name] = time.monotonic()
        self._failed.move_to_end(wanted.name)
        if len(self._failed) > _FAILURES:
            self._failed.popitem(last=False)
        hint = ""
        if isinstance(error, NotMade) and error.code == "damaged":
            hint = "; `tidings-mirror check` names the damage, `tidings-mirror repair` mends it"
        log.error("%s: a delta or index could not be made: %s%s", wanted.store, error, hint)

    def _tell(self, wanted: Job, result: str, seconds: float | None = None) -> None:
        kind = wanted.worker.rpartition(".")[2].removesuffix("_worker")
        self.told(kind, result, seconds)

    async def _make(self, wanted: Job, path: Path) -> Path:
        async with self._slots:
            await asyncio.to_thread(self._prepare)
            try:
                started = time.monotonic()
                await self._run(wanted, path)
                self._tell(wanted, "made", time.monotonic() - started)
                await asyncio.to_thread(self._prune, path.name)
            except OSError as error:  # no process or no file to be had, say
                raise explain(error, self.folder) from error
        return path

    async def _run(self, wanted: Job, out: Path) -> None:
        """Make a bundle in a process of its own: its memory goes with it, and the loop is free."""
        request = {**wanted.request(), "out": str(out)}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-P", "-m", wanted.worker),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        try:
            async with asyncio.timeout(_LONGEST):
                _, said = await process.communicate(json.dumps(request).encode())
        except TimeoutError as error:
            raise NotMade(f"it took more than {_LONGEST:.0f} s") from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode == NOT_RETAINED:
            raise NotRetained(_last_line(said))
        if process.returncode != 0:
            code = "damaged" if process.returncode == DAMAGED else None
            raise NotMade(_last_line(said) or f"exit code {process.returncode}", code=code)

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise explain(error, self.folder) from error

    def _prune(self, newest: str) -> None:
        """Delete the bundles used least recently, as far as the limit asks; never *newest*."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process prunes too
                    status = entry.stat()
                    if entry.name.endswith(SUFFIXES):
                        found.append((status, entry))
                    elif entry.name.startswith(".tmp-") and status.st_mtime < time.time() - 3600:
                        os.unlink(entry.path)  # of a process that was killed
        kept = sum(status.st_size for status, _ in found)

        def used(item: tuple[os.stat_result, os.DirEntry[str]]) -> int:
            status, entry = item
            return status.st_atime_ns + (_INDEX_NS if entry.name.endswith(_INDEX) else 0)

        for status, entry in sorted(found, key=used):
            if kept <= self.most:
                break
            if entry.name[:64] != newest[:64]:  # an index's blob is named like it
                Path(entry.path).unlink(missing_ok=True)
                kept -= status.st_size


def chosen_tracks(known: Sequence[str], asked: Collection[str] | None) -> tuple[str, ...] | None:
    """The tracks to bundle, in one order for all who ask the same; None for all of them."""
    if asked is None or set(asked) >= set(known):
        return None
    return tuple(sorted(set(asked) & set(known)))


def default_folder() -> Path | None:
    """Where bundles are kept when the settings do not say; None when nothing can be written."""
    for base in (os.environ.get("XDG_CACHE_HOME"), os.path.expanduser("~/.cache"), _temporary()):
        if not base:
            continue
        wanted = Path(base, f"tidings-mirror-{os.getuid()}")
        try:
            wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(wanted, os.W_OK) and wanted.stat().st_uid == os.getuid():
                return wanted
        except OSError:
            continue  # a service without a home: the next one
    return None


def _temporary() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # what it raises when no folder can be written to
        return ""


def _touch(path: Path) -> bool:
    """Whether the bundle is there; it then counts as used now."""
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise explain(error, path) from error
    return True


def _last_line(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
