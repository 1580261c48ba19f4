"""What the pages tell of repositories: their steps, where they are, what is known of upstreams.

Facts come from heads and packs' tables of contents; nothing is guessed. What clients of a static
host received is not known here, so a *step* says what it takes to follow a publish, computed
from what lies in the store.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from tidings_chunkstore.backends.base import HEAD_NAME
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.errors import LocalError, StoreError
from tidings_chunkstore.head import Head
from tidings_chunkstore.limits import KIB
from tidings_chunkstore.pack import File, Snapshot, Toc
from tidings_chunkstore.places import PackName
from tidings_chunkstore.store import Store

from .discover import DEPTH, discover
from .edge_states import Held
from .follow import state_file
from .publish import FOLDER
from .settings import PulledSettings, RepoSettings, ServeSettings, UpstreamSettings
from .site import Repository, Site, split_path

_HISTORIES = 1024  # repositories whose steps are kept
_STATE_MAX = 64 * KIB  # bytes of a follow state
_FOUND_MOST = 5000  # repositories that a search lists
SEARCH_SECONDS = 20.0  #: in which a search for repositories ends, complete or not
SEARCH_AGAIN = 600.0  #: seconds before the folders are searched anew


@dataclass(frozen=True, slots=True)
class Step:
    """A retained snapshot, and what it took to come to it. Sizes in bytes, times since 1970.

    *full* and *update* count each content once, in its smallest published form: a client wants
    ``Packages`` or ``Packages.gz``, not both. They are None for the oldest retained snapshot.
    """

    pack: PackName
    before: PackName | None
    serial: int
    time: int
    pack_bytes: int
    published: int  #: all files of the snapshot
    changed: int  #: files that the snapshot before did not have
    full: int | None  #: the changed files, downloaded whole
    update: int | None  #: the deltas to them, and whole files where there is no delta

    @property
    def share(self) -> float | None:
        """The update as a share of the whole files."""
        return self.update / self.full if self.full and self.update is not None else None


def cost(before: Snapshot, toc: Toc) -> tuple[int, int]:
    """Bytes from *before* to the snapshot of *toc*: of whole files, and by deltas."""
    had = {file.sha256 for file in before.files}
    old = {content.track: content.id for content in before.contents}
    smallest: dict[str, File] = {}
    for file in toc.snapshot.files:
        known = smallest.get(file.track)
        if known is None or file.size < known.size:
            smallest[file.track] = file
    edges: dict[str, int] = {}
    for edge in toc.edges:
        if edge.base in (None, before.serial):
            edges[edge.track] = min(edge.length, edges.get(edge.track, edge.length))
    full = update = 0
    for content in toc.snapshot.contents:
        wanted = smallest.get(content.track)
        same = old.get(content.track) == content.id
        if wanted is None:  # what a recipe needs besides
            update += 0 if same else edges.get(content.track, 0)
        elif wanted.sha256 not in had:
            full += wanted.size
            update += 0 if same else min(wanted.size, edges.get(content.track, wanted.size))
    return full, update


def read_steps(store: Store, head: Head, known: Iterable[Step] = ()) -> tuple[Step, ...]:
    """The retained snapshots of *head*, oldest first; *known* ones are not read again.

    Raises StoreError.
    """
    have = {(step.pack, step.before): step for step in known}
    steps: list[Step] = []
    before: PackName | None = None
    for state in head.states:
        name = state.pack
        step = have.get((name, before))
        if step is None:
            toc = store.toc(name)
            files = toc.snapshot.files
            full = update = None
            had: set[bytes] = set()
            if before is not None:
                older = store.toc(before).snapshot
                had = {file.sha256 for file in older.files}
                full, update = cost(older, toc)
            step = Step(
                name,
                before,
                toc.snapshot.serial,
                toc.snapshot.time,
                store.backend.size(str(name)) or 0,
                sum(file.size for file in files),
                sum(file.sha256 not in had for file in files),
                full,
                update,
            )
        steps.append(step)
        before = name
    return tuple(steps)


@dataclass(frozen=True, slots=True)
class Typical:
    """Medians over steps that changed something, and their sums. Bytes."""

    steps: int
    full: int
    update: int
    pack: int
    all_full: int
    all_update: int

    @property
    def share(self) -> float:
        """The median update as a share of the median of the whole files."""
        return self.update / self.full


def typical(steps: Sequence[Step]) -> Typical | None:
    """None where no step is known."""
    told = [(s.full, s.update, s.pack_bytes) for s in steps if s.full and s.update is not None]
    if not told:
        return None
    full, update, packs = zip(*told, strict=True)
    return Typical(
        len(told),
        round(statistics.median(full)),
        round(statistics.median(update)),
        round(statistics.median(packs)),
        sum(full),
        sum(update),
    )


class Histories:
    """Steps of repositories, read once for each publish. Safe to use from many threads."""

    def __init__(self) -> None:
        self._held: OrderedDict[Path, tuple[Step, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def known(self, here: Repository, head: Head) -> tuple[Step, ...] | None:
        """The steps of *head*, where they need no reading."""
        held = self._held.get(here.folder)
        return held if held and _names(held) == [s.pack for s in head.states] else None

    def read(self, here: Repository, head: Head) -> tuple[Step, ...]:
        """The steps of *head*. Raises StoreError."""
        held = self._held.get(here.folder, ())
        if _names(held) == [state.pack for state in head.states]:
            return held
        # A store of its own: the served one would keep every table of contents in memory.
        steps = read_steps(Store(LocalBackend(here.folder)), head, held)
        with self._lock:
            self._held[here.folder] = steps
            self._held.move_to_end(here.folder)
            while len(self._held) > _HISTORIES:
                self._held.popitem(last=False)
        return steps


def _names(steps: Iterable[Step]) -> list[PackName]:
    return [step.pack for step in steps]


# -- where repositories are ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found: names of repositories with a head, and whether it got to the end."""

    names: tuple[str, ...] = ()
    complete: bool = False
    at: float | None = None  #: time.monotonic() at its end; None: there was none yet


class Search:
    """Looks for repositories below the site's folders, one search at a time, in a thread."""

    def __init__(self, site: Site, settings: ServeSettings) -> None:
        self._site = site
        self._root = settings.root
        self._store = settings.store
        self._stopped = threading.Event()
        self.found = Found()

    def due(self) -> bool:
        """Whether the folders are to be searched (again)."""
        at = self.found.at
        return at is None or time.monotonic() - at > SEARCH_AGAIN

    def stop(self) -> None:
        """End a search under way; the process wants to end."""
        self._stopped.set()

    def run(self, seconds: float = SEARCH_SECONDS) -> None:
        """Search, for at most about *seconds*; a search that is cut short forgets nothing."""
        end = time.monotonic() + seconds

        def over() -> bool:
            return self._stopped.is_set() or time.monotonic() > end

        names: set[str] = set()
        for folder in self._folders(over):
            name = "" if folder == "." else folder
            if len(names) >= _FOUND_MOST:
                break
            if served(name) and self.has_head(name):
                names.add(name)
        complete = not over() and len(names) < _FOUND_MOST
        if not complete:
            names.update(name for name in self.found.names if self.has_head(name))
        self.found = Found(tuple(sorted(names)), complete, time.monotonic())

    def _folders(self, over: Callable[[], bool]) -> Iterator[str]:
        if self._root is not None:
            try:
                for folder in discover(self._root, over):
                    yield folder.relative_to(self._root).as_posix()
            except LocalError:
                pass  # gone for the moment; /readyz says so
        if self._store is not None:
            yield from _stores(str(self._store), "", DEPTH, over)

    def has_head(self, name: str) -> bool:
        """Whether a head lies where the repository's is looked for."""
        return any(
            os.path.isfile(os.path.join(folder, HEAD_NAME))
            for folder in self._site.store_folders(name)
        )


def served(name: str) -> bool:
    """Whether a repository of this name has a URL here."""
    return not name or split_path(b"/" + quote(name).encode()) is not None


def _stores(tree: str, name: str, depth: int, over: Callable[[], bool]) -> Iterator[str]:
    """Folders of a store tree that hold ``tidings/``."""
    inside: list[str] = []
    try:
        with os.scandir(os.path.join(tree, name)) as entries:
            for entry in entries:
                if entry.name == FOLDER and entry.is_dir():
                    yield name or "."
                elif not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                    inside.append(entry.name)
    except OSError:
        return  # vanished, or not ours to read: there is nothing to show
    if depth == 0:
        return
    for part in sorted(inside):
        if over():
            return
        yield from _stores(tree, os.path.join(name, part), depth - 1, over)


# -- upstreams -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where a repository comes from, and how the last look went (docs/upstream.md, "State")."""

    url: str  #: without credentials; empty where it is not known
    checked: int | None = None
    good: int | None = None
    changed: int | None = None
    failures: int = 0
    error: str | None = None  #: the code of the last look's
    trust: str | None = None
    received: int | None = None  #: bytes over all looks
    full: int | None = None  #: bytes that whole files would have taken


def upstream_of(file: Path, configured: UpstreamSettings | None = None) -> Upstream | None:
    """What is known of an upstream: the state in *file*, and the settings. None: nothing.

    The file is another program's: what is not as documented counts as not said.
    """
    said = _state(file)
    url = ""
    if configured is not None:
        named = (configured.metalink, configured.mirrorlist, *configured.urls)
        url = next((item for item in named if item), "")
    text = said.get("upstream")
    if isinstance(text, str) and text:
        url = text
    if not said and not url:
        return None
    error = said.get("error")
    # The code alone: a message may name folders and addresses that are nobody's business.
    code = error.get("code") if isinstance(error, dict) else None
    trust = said.get("trust")
    return Upstream(
        bare(url),
        checked=_whole(said, "checked") or None,
        good=_whole(said, "good") or None,
        changed=_whole(said, "changed") or None,
        failures=_whole(said, "failures") or 0,
        error=code[:60] if isinstance(code, str) else None,
        trust=trust[:100] if isinstance(trust, str) else None,
        received=_whole(said, "total_bytes_received"),
        full=_whole(said, "total_bytes_full"),
    )


def _state(path: Path) -> Mapping[str, object]:
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(_STATE_MAX))
    except (OSError, ValueError, RecursionError):
        return {}  # not followed, or no state to speak of
    return value if isinstance(value, dict) else {}


def _whole(value: Mapping[str, object], key: str) -> int | None:
    found = value.get(key)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < 2**53:
        return None
    return int(found)


def bare(url: str) -> str:
    """*url* without user, password, query and fragment: these may be secrets."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def followed(state: Path, name: str, repos: Iterable[RepoSettings]) -> Upstream | None:
    """The upstream of a repository that ``follow`` keeps up to date.

    None where the settings name none (any more): the state of a look stays when its table goes.
    """
    upstream = own_upstream(repos, name)
    return None if upstream is None else upstream_of(state_file(state, name), upstream)


def pulled(cache: Path | None, repo: PulledSettings) -> Upstream | None:
    """The upstream of a repository that is pulled through, and what the edge knows of it."""
    if cache is None:
        return upstream_of(Path(os.devnull), repo.upstream)
    return upstream_of(Held.below(cache, repo.path).folder / "status.json", repo.upstream)


def own_upstream(repos: Iterable[RepoSettings], name: str) -> UpstreamSettings | None:
    """What the settings say of the upstream of *name*."""
    return next((repo.upstream for repo in repos if repo.path == name), None)


def stored_bytes(here: Repository) -> tuple[int, int]:
    """Packs in the store's folder, and their bytes with the head's. Raises StoreError."""
    count = total = 0
    try:
        with os.scandir(here.folder) as entries:
            for entry in entries:
                if entry.name.endswith(".pack"):
                    count += 1
                    total += entry.stat().st_size
                elif entry.name == HEAD_NAME:
                    total += entry.stat().st_size
    except OSError as error:
        raise StoreError(f"{here.folder}: {error.strerror}", code="store-missing") from error
    return count, total
