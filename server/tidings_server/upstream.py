"""Where a repository comes from, and bringing a folder to what is there now.

    source = Source("fedora/updates", UpstreamSettings(metalink="https://..."), None)
    fetched = fetch(source, Path("/srv/mirror/fedora/updates"), memory=Path("/var/lib/..."))

The work is the client's: ``sync`` fetches, proves and switches. Here is what asking again and again
needs: a look that finds nothing new costs one small request. See docs/upstream.md.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tidings_chunkstore.backends.local import explain, write_atomically
from tidings_chunkstore.errors import FormatError, InputError, NetworkError, RollbackError
from tidings_chunkstore.layout import LAYOUTS
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.types import parse_types
from tidings_client.guard import Guard
from tidings_client.job import Progress, Silent, SyncOptions, SyncResult
from tidings_client.listed import (
    fetch_list,
    read_metalink,
    read_mirrorlist,
    sync_versions,
    version_of,
)
from tidings_client.local import Destination
from tidings_client.metalink import MIRRORS, Metalink
from tidings_client.mirrors import base_url, shown
from tidings_client.remote import Remote, RemoteSettings, Validators
from tidings_client.stock import present
from tidings_client.sync import sync
from tidings_client.trust import TrustSettings

from .settings import UpstreamSettings

#: Seconds after which all is asked for anew: whether an upstream has a head by now, and whether a
#: signature changed though what it signs did not.
THOROUGH = 86_400

_MEMORY = "look.json"
_LIST = "list"
_VERSION = 1
_PAUSES = (0.0, 1.0, 2.0)  # seconds before each try with the main file; follow adds its backoff


@dataclass(frozen=True, slots=True)
class Source:
    """Where a repository comes from, from the settings alone."""

    path: str
    upstream: UpstreamSettings
    layout: str | None = None

    def urls(self) -> tuple[str, ...]:
        """The configured URLs, of the repository or of the list that names its mirrors."""
        up = self.upstream
        return up.urls or tuple(url for url in (up.metalink, up.mirrorlist) if url is not None)


@dataclass(frozen=True, slots=True)
class Fetched:
    """What one look brought. Bytes are those on the wire, headers included."""

    changed: bool
    trust: str  #: what proved the main file
    timestamp: int  #: of the metadata, seconds since 1970
    route: str  #: the route that brought the most bytes; ``current`` where none was needed
    base: str  #: base URL that answered last, without credentials
    bytes_received: int
    bytes_sent: int
    bytes_full: int  #: of the same files as published
    requests: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Kept:
    """What is remembered of the last good look. A help: without it everything is asked for."""

    question: str = ""  #: what was asked for, as a digest
    base: str = ""
    main: str = ""  #: path of the main file
    files: Mapping[str, list[int]] = field(default_factory=dict)  #: size and mtime_ns by path
    trust: str = ""
    timestamp: int = 0
    bytes_full: int = 0
    head: bool = False  #: the upstream is published by Tidings
    thorough: float = 0.0  #: when all was asked for, seconds since 1970
    etag: str | None = None  #: of the main file at *base*
    modified: str | None = None
    list_etag: str | None = None  #: of the metalink or mirrorlist
    list_modified: str | None = None


def fetch(
    source: Source,
    dest: Path,
    *,
    memory: Path,
    progress: Progress | None = None,
    settings: RemoteSettings | None = None,
    way_out: str | None = None,
) -> Fetched:
    """Bring *dest* (a metadata folder: repodata/ or an apt tree) to what the upstream has now.

    *dest* is whole either way: the old state or the new one. Other files in it are not touched.

    Args:
        memory: a folder of its own, where validators and the last list are kept between looks.
            One fetch at a time uses it.
        settings: patience; its guard is set here.
        way_out: how an operator accepts what is older or less signed, for the error's text;
            ``{option}`` in it becomes the option of ``tidings sync``.

    Raises:
        NetworkError: nobody answers, or what is there is half synced. VerificationError: it is not
        what was promised or signed. RollbackError: it is older than what is in place. InputError,
        LockedError, LocalError: as ``tidings_client.sync.sync``.
    """
    look = _Look(source, dest, memory, progress or Silent(), settings or RemoteSettings())
    try:
        return look.run()
    except RollbackError as error:
        text, option = error.details.get("text"), error.details.get("option")
        if way_out is None or text is None:
            raise
        way = way_out.replace("{option}", str(option))
        raise RollbackError(f"{text}; {way}", code=error.code, **error.details) from error


class _Look:
    """One look. Use it once."""

    def __init__(
        self,
        source: Source,
        dest: Path,
        memory: Path,
        progress: Progress,
        settings: RemoteSettings,
    ) -> None:
        self.source = source
        self.dest = dest
        self.memory = memory
        self.progress = progress
        self.settings = replace(settings, guard=Guard(source.urls()))
        self.started = time.monotonic()
        self.options = _options(source.upstream, dest)
        self.question = _question(source)
        kept = _load(memory)
        self.kept = kept if kept.question == self.question else Kept(self.question)
        self.list_cost = (0, 0, 0)  # received, sent, requests

    def run(self) -> Fetched:
        """See ``fetch``."""
        link, bases = self._find()
        # A look may be cut short only where dest is as the last one left it, and not for ever.
        held = _as_left(self.dest, self.kept.files)
        shortcut = held and 0 <= time.time() - self.kept.thorough < THOROUGH
        with Remote(bases, self.settings) as remote:
            news: bytes | None = None
            if shortcut and link is not None:
                if version_of(link.versions, self._main()) == 0:
                    return self._same(remote)
            elif shortcut and not self.kept.head and _shown(bases[0]) == self.kept.base:
                news = self._news(remote)
                if news is None:
                    return self._same(remote)
            # Where there was no head an hour ago there is none now: it is looked for once a day.
            options = self.options
            if shortcut and not self.kept.head:
                options = replace(options, route="full")
            if link is not None:
                result = sync_versions(options, link.versions, remote, self.progress)
            else:
                result = sync(options, remote, self.progress)
            return self._finished(result, remote, thorough=not shortcut, news=news)

    # -- where it is -----------------------------------------------------------------------------

    def _find(self) -> tuple[Metalink | None, tuple[str, ...]]:
        """The metalink, where one is configured, and the mirrors' base URLs."""
        up = self.source.upstream
        if up.urls:
            return None, up.urls
        if up.metalink is not None:
            data = self._list(up.metalink)
            link = read_metalink(data, up.metalink)
            return link, link.mirrors[:MIRRORS]
        if up.mirrorlist is None:
            raise InputError(f"{self.source.path}: it has no upstream", code="usage")
        bases = read_mirrorlist(self._list(up.mirrorlist), up.mirrorlist)
        # Such lists are shuffled: the mirror of the last look first, that it may say "no news".
        again = [base for base in bases if _shown(base) == self.kept.base]
        return None, tuple(dict.fromkeys([*again, *bases]))[:MIRRORS]

    def _list(self, url: str) -> bytes:
        """The list as it is now; the copy in memory where its server says that it is the same."""
        copy = _read(self.memory / _LIST)
        known = Validators(self.kept.list_etag, self.kept.list_modified)
        listed = fetch_list(url, self.settings, known if copy is not None else None)
        self.list_cost = (listed.bytes_received, listed.bytes_sent, listed.requests)
        if listed.looked.data is None:
            assert copy is not None
            return copy
        found = listed.looked.validators
        # The copy goes first: validators must never tell of another one than what lies there.
        self.kept = replace(self.kept, list_etag=None, list_modified=None)
        if found != Validators():
            _save(self.memory, self.kept)
            _write(self.memory / _LIST, listed.looked.data)
            self.kept = replace(self.kept, list_etag=found.etag, list_modified=found.modified)
        return listed.looked.data

    # -- whether there is news -------------------------------------------------------------------

    def _main(self) -> bytes:
        return _read(self.dest / self.kept.main) or b""

    def _news(self, remote: Remote) -> bytes | None:
        """The main file where it is another than in place, None where it is the same."""
        known = Validators(self.kept.etag, self.kept.modified)
        try:
            looked = remote.look(self.kept.main, LIMITS.main, known)
        except NetworkError as error:
            if error.code == "closed":
                raise
            return b""  # the sync that follows asks all mirrors, and says what is wrong
        if looked.data is None:
            return None
        self.kept = replace(
            self.kept, etag=looked.validators.etag, modified=looked.validators.modified
        )
        return None if looked.data == self._main() else looked.data

    # -- what is told and remembered -------------------------------------------------------------

    def _same(self, remote: Remote) -> Fetched:
        """No news."""
        _save(self.memory, self.kept)
        base = remote.answered if remote.requests else self.kept.base
        return self._fetched(
            remote, False, self.kept.trust, self.kept.timestamp, "current", base,
            self.kept.bytes_full,
        )  # fmt: skip

    def _finished(
        self, result: SyncResult, remote: Remote, *, thorough: bool, news: bytes | None
    ) -> Fetched:
        with Destination(self.dest, create=False) as dest:
            now = present(dest)
        if now is None:
            raise FormatError(f"{self.dest}: what was fetched cannot be read")
        paths = {*now.listing.by_path(), *now.layout.mains()}
        if news != now.data:  # what was looked at is not what came: its validators say nothing
            self.kept = replace(self.kept, etag=None, modified=None)
        self.kept = replace(
            self.kept,
            base=remote.answered,
            main=now.main,
            files=_stamps(self.dest, paths),
            trust=result.trust,
            timestamp=now.listing.timestamp,
            bytes_full=result.bytes_full,
            head=result.serial is not None,
            # Only "there is no head" is remembered, not that nobody could say.
            thorough=time.time() if thorough and _sure(result) else self.kept.thorough,
        )
        _save(self.memory, self.kept)
        return self._fetched(
            remote, result.changed, result.trust, now.listing.timestamp, result.route,
            remote.answered, result.bytes_full,
        )  # fmt: skip

    def _fetched(
        self,
        remote: Remote,
        changed: bool,
        trust: str,
        timestamp: int,
        route: str,
        base: str,
        full: int,
    ) -> Fetched:
        received, sent, requests = self.list_cost
        return Fetched(
            changed,
            trust,
            timestamp,
            route,
            base,
            received + remote.bytes_received,
            sent + remote.bytes_sent,
            full,
            requests + remote.requests,
            time.monotonic() - self.started,
        )


def _sure(result: SyncResult) -> bool:
    return result.serial is not None or result.fallback_reason == "no-tidings"


def _options(upstream: UpstreamSettings, dest: Path) -> SyncOptions:
    return SyncOptions(
        dest,
        types=None if upstream.types is None else parse_types(",".join(upstream.types)),
        adopt=True,  # packages may lie there; what sync did not put there it never touches
        trust=TrustSettings(gpgkey=upstream.gpgkey),
        pauses=_PAUSES,
    )


def _question(source: Source) -> str:
    """A digest of what is asked for: what is kept of another question is not used."""
    up = source.upstream
    key = ""
    if up.gpgkey is not None:
        try:
            key = hashlib.sha256(up.gpgkey.read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(
                f"{up.gpgkey}: cannot read the key: {error.strerror}", code="bad-key"
            ) from error
    value = [_VERSION, source.path, up.urls, up.metalink, up.mirrorlist, up.types, key]
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _shown(base: str) -> str:
    """A base URL as ``Remote.answered`` tells it."""
    return shown(base_url(base)).rstrip("/") + "/"


# -- memory ----------------------------------------------------------------------------------------


def _stamps(dest: Path, paths: set[str]) -> dict[str, list[int]]:
    found = {}
    for path in sorted(paths):
        try:
            status = (dest / path).stat(follow_symlinks=False)
        except OSError:
            continue  # not asked for, or optional and not there
        found[path] = [status.st_size, status.st_mtime_ns]
    return found


def _as_left(dest: Path, files: Mapping[str, list[int]]) -> bool:
    return bool(files) and _stamps(dest, set(files)) == files


def _load(memory: Path) -> Kept:
    """What is kept; nothing where it cannot be read, for it only saves requests."""
    data = _read(memory / _MEMORY)
    if data is None:
        return Kept()
    try:
        value = json.loads(data)
        kept = Kept(**value)
    except (ValueError, TypeError, RecursionError):
        return Kept()
    texts = (kept.etag, kept.modified, kept.list_etag, kept.list_modified)
    right = (
        isinstance(kept.question, str)
        and isinstance(kept.base, str)
        and kept.main in {main for layout in LAYOUTS.values() for main in layout.mains()} | {""}
        and isinstance(kept.files, dict)
        and isinstance(kept.thorough, float)
        and all(text is None or isinstance(text, str) for text in texts)
    )
    return kept if right else Kept()


def _save(memory: Path, kept: Kept) -> None:
    _write(memory / _MEMORY, json.dumps(asdict(kept), separators=(",", ":")).encode())


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(error, path.parent) from error
    write_atomically(path, [data])


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(LIMITS.main)
    except OSError:
        return None  # only a help
