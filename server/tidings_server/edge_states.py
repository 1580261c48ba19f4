"""What an edge holds of one repository: a folder of states, none of which ever changes.

::

    FOLDER/lock               flock: one fetch at a time, whichever process asks
    FOLDER/work/              what the sync writes to; serves nobody
    FOLDER/memory/            what ``upstream`` remembers
    FOLDER/states/<n>/        a whole publish: published files, and .state.json
    FOLDER/status.json        how the looks at the upstream went
    FOLDER/pins/<slot>        which state a client is reading

A state is made aside and renamed, so a process that dies leaves whole states only; the newest is
the one with the highest number. Files that are the same in two states are hard links.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tidings_chunkstore.backends.local import explain, fsync_folder, write_atomically
from tidings_chunkstore.errors import FormatError, LocalError, StoreError
from tidings_chunkstore.layout import detect
from tidings_chunkstore.limits import LIMITS, MIB

from .edge_rules import BESIDE, MAINS, NEVER, Looks, file_name
from .objects import is_hash_named
from .site import Signature, signature

KEEP = 3600.0  #: seconds for which a state is kept after a newer one came
MOST_STATES = 16
PIN = 60.0  #: seconds for which a client that read a main file stays with its state
_SLOTS = 1024  # clients that are pinned at a time, at most
_STATE = ".state.json"
_STATUS_MAX = 64 * 1024
_STATE_MAX = 64 * MIB
_NUMBER = re.compile(r"[0-9]{1,12}", re.ASCII)
_ENTRY = re.compile(rb"(?m)^ ([0-9a-f]{32,128})[ \t]+[0-9]+[ \t]+(\S+)$")


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a look ended badly. *code* is the error's; *local*: this machine's own disk."""

    code: str
    message: str
    local: bool = False


@dataclass(frozen=True, slots=True)
class Status:
    """The looks at one upstream: docs/upstream.md, "State", has the keys. Times in seconds."""

    path: str = ""
    looks: Looks = NEVER
    changed: float = 0.0  #: of the last look that brought something new
    error: Problem | None = None
    upstream: str = ""  #: base URL that answered last, without credentials
    trust: str = ""
    timestamp: int = 0
    bytes_received: int = 0
    requests: int = 0
    bytes_full: int = 0
    total_bytes_received: int = 0
    total_bytes_full: int = 0
    total_changes: int = 0
    seconds: float = 0.0

    def failed(self, now: float, error: Problem, seconds: float = 0.0) -> Status:
        """After a look that ended badly at *now*."""
        looks = replace(self.looks, checked=now, failures=self.looks.failures + 1)
        return replace(self, looks=looks, error=error, seconds=seconds)

    def encode(self) -> bytes:
        """As status.json."""
        value = asdict(self)
        value |= value.pop("looks")
        return json.dumps({"v": 1, **value}, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> Status:
        """From status.json. Raises FormatError."""
        try:
            value = json.loads(data)
            if value.pop("v") != 1:
                raise FormatError("status of another version")
            error = value.pop("error")
            looks = {name: value.pop(name) for name in ("checked", "good", "failures")}
            made = cls(
                **value,
                looks=Looks(**looks),
                error=None if error is None else Problem(**error),
            )
            numbers = (*looks.values(), made.changed, made.timestamp, made.seconds)
            if not all(isinstance(each, int | float) for each in numbers):
                raise FormatError("status with a number that is none")
            if not isinstance(made.upstream, str):
                raise FormatError("status with an upstream that is no text")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FormatError(f"not a status: {error}") from error
        return made


@dataclass(frozen=True, slots=True)
class State:
    """One publish, whole. *hashes*: apt's look-ups by content, from checksum to path."""

    number: int
    folder: Path
    made: float  #: seconds since 1970
    layout: str
    timestamp: int
    files: frozenset[str]
    hashes: Mapping[str, str]

    @property
    def has_plain_names(self) -> bool:
        """Whether a name may stand for another file in the next state."""
        return any(path not in MAINS and not is_hash_named(path) for path in self.files)

    def find(self, rest: str) -> Path | None:
        """The file at *rest*; it may be gone by the time it is opened."""
        return self.folder / rest if rest in self.files else None


@dataclass(frozen=True, slots=True)
class View:
    """What is held at one moment; *states* oldest first."""

    signature: tuple[Signature, ...] = ()
    status: Status = Status()
    states: tuple[State, ...] = ()

    @property
    def current(self) -> State | None:
        """The newest state."""
        return self.states[-1] if self.states else None

    def state(self, number: int | None) -> State | None:
        """The state of this number, the newest one where it is gone."""
        return next((each for each in self.states if each.number == number), self.current)

    def anywhere(self, rest: str, content: str | None) -> Path | None:
        """The file that is named by its checksum, or that has this *content*: newest first."""
        for each in reversed(self.states):
            path = each.hashes.get(content) if content is not None else rest
            found = each.find(path) if path is not None else None
            if found is not None:
                return found
        return None


@dataclass(frozen=True, slots=True)
class Held:
    """The folder of one repository. Every method does I/O."""

    folder: Path
    path: str  #: of the repository in URLs

    @classmethod
    def below(cls, cache: Path, path: str) -> Held:
        """The folder of the repository at *path* in a cache folder."""
        return cls(cache / "pulled" / file_name(path), path)

    @property
    def work(self) -> Path:
        """What the sync writes to."""
        return self.folder / "work"

    @property
    def memory(self) -> Path:
        """What ``upstream`` remembers."""
        return self.folder / "memory"

    @property
    def lock(self) -> Path:
        """The lock file."""
        return self.folder / "lock"

    @property
    def _states(self) -> Path:
        return self.folder / "states"

    def signature(self) -> tuple[Signature, ...]:
        """Changes after each look and with each new state."""
        found: list[Signature] = []
        for path in (self._states, self.folder / "status.json"):
            try:
                found.append(signature(os.stat(path)))
            except FileNotFoundError:
                found.append(())
            except OSError as error:
                raise explain(error, path) from error
        return tuple(found)

    def status(self) -> Status:
        """How the looks went; nothing is known where it cannot be read."""
        try:
            with (self.folder / "status.json").open("rb") as file:
                return Status.decode(file.read(_STATUS_MAX))
        except (FileNotFoundError, FormatError):
            return Status(self.path)  # it costs one look at the upstream
        except OSError as error:
            raise explain(error, self.folder) from error

    def write_status(self, status: Status) -> None:
        """Replace status.json. Raises LocalError."""
        write_atomically(self.folder / "status.json", [status.encode()])

    def view(self, known: View | None = None) -> View:
        """What is held now; states that *known* has are not read again. Raises LocalError."""
        now = self.signature()
        read = {each.number: each for each in known.states} if known is not None else {}
        states = []
        for number in self._numbers():
            state = read.get(number)
            if state is None:
                try:
                    state = self._read(number)
                except StoreError:
                    continue  # pruned this moment, or not of this version
            states.append(state)
        return View(now, self.status(), tuple(states))

    def _numbers(self) -> list[int]:
        try:
            names = os.listdir(self._states)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise explain(error, self._states) from error
        return sorted(int(name) for name in names if _NUMBER.fullmatch(name))

    def _read(self, number: int) -> State:
        folder = self._states / str(number)
        try:
            with (folder / _STATE).open("rb") as file:
                value = json.loads(file.read(_STATE_MAX))
            if value["v"] != 1:
                raise StoreError(f"{folder}: of another version")
            return State(
                number,
                folder,
                float(value["made"]),
                str(value["layout"]),
                int(value["timestamp"]),
                frozenset(value["files"]),
                dict(value["hashes"]),
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{folder}: {error}") from error

    # -- making and dropping states --------------------------------------------------------------

    def take_in(self, now: float) -> bool:
        """Make a state of the work folder; False when it is the newest state already.

        The caller holds the lock, and the work folder is whole. Raises LocalError.
        """
        layout = detect(self.work)
        if layout is None:
            raise LocalError(f"{self.work}: nothing was fetched", code="no-metadata")
        files = dict(_walk(self.work))
        numbers = self._numbers()
        before: State | None = None
        if numbers:
            with suppress(StoreError):
                before = self._read(numbers[-1])
        if before is not None and self._same(files, before):
            return False
        main = next(path for path in reversed(layout.mains()) if path in files)
        data = (self.work / main).read_bytes()
        listing = layout.parse(data, main)
        # Its own time is the same at every edge, so a client that changes edges is never told
        # "not modified" of another state; and it always goes up.
        modified = listing.timestamp
        if before is not None and (before.folder / main).exists():
            modified = max(modified, int((before.folder / main).stat().st_mtime) + 1)
        value = {
            "v": 1,
            "made": now,
            "layout": layout.name,
            "timestamp": listing.timestamp,
            "files": sorted(files),
            "hashes": _hashes(data, files) if layout.name == "apt" else {},
        }
        made = self.folder / "tmp-state"
        try:
            shutil.rmtree(made, ignore_errors=True)
            self._states.mkdir(parents=True, exist_ok=True)
            made.mkdir()
            for path in files:
                _bring(self.work / path, made / path, modified if path in MAINS | BESIDE else None)
            write_atomically(made / _STATE, [json.dumps(value).encode()])
            for folder in {(made / path).parent for path in files}:
                fsync_folder(folder)
            made.rename(self._states / str(numbers[-1] + 1 if numbers else 1))
            fsync_folder(self._states)
        except OSError as error:
            raise explain(error, made) from error
        return True

    def _same(self, files: Mapping[str, os.stat_result], state: State) -> bool:
        if state.files != files.keys():
            return False
        for path, found in files.items():
            try:
                if path in MAINS | BESIDE:
                    if (self.work / path).read_bytes() != (state.folder / path).read_bytes():
                        return False
                    continue
                other = os.stat(state.folder / path)
            except OSError:
                return False
            if (found.st_size, found.st_mtime_ns) != (other.st_size, other.st_mtime_ns):
                return False
        return True

    def prune(self, now: float, budget: int) -> None:
        """Drop old states: by age, by number, and when they hold more than *budget* bytes.

        The newest one stays, and the one before it for KEEP seconds unless the budget is passed.
        """
        view = self.view()
        for number in to_drop(view.states, now, budget, self._own_bytes(view.states)):
            # Renamed first: a state whose files are half gone must not be found.
            gone = self.folder / f"tmp-gone-{number}"
            with suppress(OSError):
                (self._states / str(number)).rename(gone)
        for gone in self.folder.glob("tmp-gone-*"):
            shutil.rmtree(gone, ignore_errors=True)

    def _own_bytes(self, states: Sequence[State]) -> dict[int, int]:
        """Bytes that each state holds and no newer one."""
        seen: set[tuple[int, int]] = set()
        held: dict[int, int] = {}
        for state in reversed(states):
            held[state.number] = 0
            for _, found in _walk(state.folder):
                if (found.st_dev, found.st_ino) not in seen:
                    seen.add((found.st_dev, found.st_ino))
                    held[state.number] += found.st_size
        return held

    # -- pins ------------------------------------------------------------------------------------

    def pin(self, client: str, number: int) -> None:
        """Remember that *client* read the main file of this state now.

        A symlink of a few bytes, so that every process knows; a fixed number of them, so two
        clients may share one: the earlier then gets what is current.
        """
        slot, who = _slot(client)
        target = self.folder / "pins" / slot
        wanted = f"{number} {who}"
        temporary = f"{target}.{os.getpid()}"
        with suppress(OSError):  # a disk that takes nothing: the client gets what is current
            target.parent.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            os.symlink(wanted, temporary)
            os.rename(temporary, target)

    def pinned(self, client: str, now: float) -> int | None:
        """The number of the state that *client* reads, if it began lately."""
        slot, who = _slot(client)
        target = self.folder / "pins" / slot
        try:
            number, _, whose = os.readlink(target).partition(" ")
            if whose != who or not 0 <= now - os.lstat(target).st_mtime <= PIN:
                return None
            return int(number)
        except (OSError, ValueError):
            return None


def to_drop(states: Sequence[State], now: float, budget: int, own: Mapping[int, int]) -> list[int]:
    """The numbers of the *states* (oldest first) that go; *own* has the bytes each holds alone."""
    kept: list[int] = []
    gone: list[int] = []
    spent = 0
    for at in range(len(states) - 1, -1, -1):
        state = states[at]
        if at < len(states) - 1:
            old = not 0 <= now - states[at + 1].made <= KEEP
            spent += own.get(state.number, 0)
            if gone or old or spent > budget or len(kept) >= MOST_STATES:
                gone.append(state.number)
                continue
        kept.append(state.number)
    return gone


def _slot(client: str) -> tuple[str, str]:
    digest = hashlib.blake2b(client.encode(), digest_size=16).digest()
    return str(int.from_bytes(digest[:4], "big") % _SLOTS), digest.hex()


def _walk(top: Path) -> Iterator[tuple[str, os.stat_result]]:
    """The regular files below *top* that are not hidden."""
    with os.scandir(top) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            found = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                for path, inner in _walk(top / entry.name):
                    yield f"{entry.name}/{path}", inner
            elif stat.S_ISREG(found.st_mode):
                yield entry.name, found


def _bring(source: Path, target: Path, modified: int | None) -> None:
    """A hard link, a copy where there is none to be had; a copy with its own time if *modified*."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if modified is None:
        try:
            os.link(source, target)
            return
        except OSError:
            modified = None  # a file system without links, or too many: a copy
    with source.open("rb") as read, target.open("xb") as write:
        shutil.copyfileobj(read, write, MIB)
        write.flush()
        os.fchmod(write.fileno(), 0o644)
        os.fsync(write.fileno())
    status = source.stat()
    times = (status.st_atime_ns, status.st_mtime_ns)
    os.utime(target, ns=times if modified is None else (modified * 10**9, modified * 10**9))


def _hashes(main: bytes, files: Mapping[str, object]) -> dict[str, str]:
    """From each checksum in a Release to the file that is held under it.

    By the Release's own word, in all of its algorithms: apt asks by the strongest it knows.
    """
    found: dict[str, str] = {}
    for match in _ENTRY.finditer(main[: LIMITS.main]):
        path = match[2].decode(errors="replace")
        if path in files:
            found.setdefault(match[1].decode(), path)
    return found
