"""``tidings stage``: what dnf's plugins run. It fills a scratch folder; dnf alone judges that.

A program's interface, not a person's. One JSON object comes on standard input, so that settings
never show among the arguments, and standard input stays open: its end means that dnf is gone.
Events go out as with ``--json``: ``progress``, ``head`` once a mirror has answered, and last a
``summary`` or an ``error``. docs/dnf.md has the fields.

In contrast to ``sync`` it gives up early, because dnf's own download is always there: no head, a
head that is not newer than what dnf has, a mirror that hangs, or one whose head leads nowhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from tidings_chunkstore import head as heads
from tidings_chunkstore.errors import (
    FormatError,
    InputError,
    LocalError,
    NetworkError,
    RollbackError,
    TidingsError,
    VerificationError,
)
from tidings_chunkstore.layout import LAYOUTS, Listing
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.places import PackName

from . import state as states
from .answers import Wanted
from .ask import Ask
from .job import SyncOptions, SyncResult
from .local import Destination
from .progress import Reporter
from .remote import Check, HeadAnswer, Remote, RemoteSettings, Sink

VERSION = 1  #: of the request
REQUEST_LIMIT = 1 << 20  #: bytes of a request

_LAYOUT = "rpm-md"
_REPOMD = "repodata/repomd.xml"
_PLAIN = re.compile(r"repodata/[^/]+")  #: all that dnf's repomd.xml may lead to
_HANGS = frozenset({"timeout", "connect", "connection", "closed"})
_ABSENT = frozenset({"no-tidings", "missing", "forbidden"})
#: dnf waits for this, so it is short: a mirror that is worth asking answers at once. A trickle ends
#: after 5 s and what the object's size allows at 10 kB/s.
PATIENCE = RemoteSettings(
    connect_timeout=1.5,
    read_timeout=1.5,
    total_timeout=5.0,
    slowest=10_000,
    patience=2.0,
    tries=1,
    user_agent="tidings/0.1 (dnf)",
)


class GivenUp(Exception):  # not a TidingsError: it must pass by those who know other ways
    """This mirror is not worth more of dnf's time. *reason* is one of ``REASONS``."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


#: Why nothing was staged from a mirror.
REASONS: Mapping[str, str] = {
    "missing": "the mirror publishes no tidings/ there",
    "hangs": "the mirror cannot be reached, stalls or is too slow",
    "current": "the mirror has what dnf has",
    "older": "the mirror's metadata is not newer than dnf's",
    "useless": "the head, or what it leads to, cannot be used",
    "refused": "what arrived is not what was promised",
    "local": "this machine's disk or permissions",
}


@dataclass(frozen=True, slots=True)
class Request:
    """What dnf wants staged."""

    urls: tuple[str, ...]  #: base URLs, each tried on its own
    dest: Path  #: the scratch folder
    live: Path | None  #: dnf's folder of the repository, where it has metadata
    types: tuple[str, ...]
    zchunk: bool = False
    proxy: str | None = None  #: for all of *urls*; None: the environment's; empty: none
    cafile: str | None = None  #: a file of certificates, for all of *urls*

    @classmethod
    def decode(cls, data: bytes) -> Request:
        """Raises InputError."""
        try:
            value = json.loads(data)
            if value["v"] != VERSION:
                raise InputError(f"a request of version {value['v']!r}", code="bad-request")
            return cls(
                _texts(value["urls"]),
                Path(_text(value["dest"])),
                Path(_text(value["live"])) if value.get("live") else None,
                _texts(value["types"]),
                value.get("zchunk") is True,
                _text(value["proxy"]) if value.get("proxy") is not None else None,
                _text(value["cafile"]) if value.get("cafile") else None,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a request: {error}", code="bad-request") from error


@dataclass(frozen=True, slots=True)
class Staged:
    """How it ended. *tried* names each mirror that gave nothing, and its reason."""

    url: str | None
    result: SyncResult | None
    tried: Mapping[str, str]
    texts: Mapping[str, str] = field(default_factory=dict)
    requests: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0

    def to_json(self) -> dict[str, object]:
        """The facts of the summary event."""
        facts: dict[str, object] = {
            "staged": self.url is not None,
            "url": self.url,
            "tried": dict(self.tried),
            "texts": dict(self.texts),
        }
        if self.result is not None:
            facts.update(self.result.to_json())
        # Of all mirrors together.
        facts["requests"] = self.requests
        facts["bytes_received"] = self.bytes_received
        facts["bytes_sent"] = self.bytes_sent
        return facts


def stage(request: Request, reporter: Reporter, settings: RemoteSettings | None = None) -> Staged:
    """Fill ``request.dest`` from the first mirror that has something newer than dnf.

    Raises InputError for a request that cannot be served at all.
    """
    cached = _cached(request.live)
    tried: dict[str, str] = {}
    texts: dict[str, str] = {}
    requests = received = sent = 0
    for url in request.urls:
        with _Hasty([url], settings or PATIENCE) as remote:
            try:
                result = _from(remote, url, request, cached, reporter)
            except GivenUp as given_up:
                tried[url], texts[url] = given_up.reason, str(given_up)
                result = None
            except TidingsError as error:
                tried[url], texts[url] = _reason(error), str(error)
                result = None
            requests += remote.requests
            received += remote.bytes_received
            sent += remote.bytes_sent
        if result is not None:
            return Staged(url, result, tried, texts, requests, received, sent)
        if tried[url] in ("current", "local"):
            break  # the next mirror would say the same
    return Staged(None, None, tried, texts, requests, received, sent)


def _from(
    remote: Remote, url: str, request: Request, cached: _Cached | None, reporter: Reporter
) -> SyncResult:
    """Stage from one mirror. Raises GivenUp and what ``sync`` raises."""
    started = time.monotonic()
    options = SyncOptions(
        request.dest,
        seeds=(request.live,) if request.live is not None else (),
        zchunk=request.zchunk,
        pauses=(0.0,),
    )
    with Destination(request.dest) as dest:
        state = states.load(dest.work_read(states.STATE, states.LIMIT))
        ask = Ask.of(dest, state, options, remote)
        reporter.data({"type": "head", "url": url})
        if ask.data is None:
            missing = ask.reason in _ABSENT
            raise GivenUp("missing" if missing else "useless", f"no head: {ask.reason}")
        found = heads.decode(ask.data)
        if found.layout != _LAYOUT:
            raise GivenUp("useless", f"a repository of layout {found.layout}")
        if cached is not None:
            _must_be_newer(found, cached)
        options = _with_types(options, request, found, cached)
        _must_fit(found, request.dest)
        from .update import Update

        return Update(options, remote, reporter, dest, state, ask, started).run()


# -- what dnf has --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cached:
    """dnf's copy: its repomd.xml, and the types whose files are there."""

    data: bytes
    listing: Listing
    types: frozenset[str]


def _cached(live: Path | None) -> _Cached | None:
    """None where dnf has none, or none that can be read."""
    if live is None:
        return None
    try:
        with (live / _REPOMD).open("rb") as file:
            data = file.read(LIMITS.main + 1)
        listing = LAYOUTS[_LAYOUT].parse(data, _REPOMD)
    except (OSError, FormatError):
        return None  # dnf will find it as unusable as we do
    there = frozenset(f.track for f in listing.files if (live / f.path).is_file())
    return _Cached(data, listing, there)


def _must_be_newer(found: heads.Head, cached: _Cached) -> None:
    now = found.file(found.main)
    if now is not None and now.sha256 == hashlib.sha256(cached.data).digest():
        raise GivenUp("current", "nothing new")
    if found.timestamp <= cached.listing.timestamp:
        raise GivenUp("older", f"of {found.timestamp}, dnf's is of {cached.listing.timestamp}")


def _with_types(
    options: SyncOptions, request: Request, found: heads.Head, cached: _Cached | None
) -> SyncOptions:
    """Also what dnf took before, where there still is such: plugins of dnf ask for more types."""
    types = list(request.types)
    if cached is not None:
        offered = {file.track for file in found.files}
        types += sorted((cached.types & offered) - set(types))
    return replace(options, types=tuple(types))


def _must_fit(found: heads.Head, dest: Path) -> None:
    """A hostile head shall not fill dnf's disk: what it names must fit three times.

    That is here, as dnf takes it, and once more where dnf imports a key meanwhile.
    """
    wanted = sum(file.size for file in found.files)
    if any(not _PLAIN.fullmatch(file.path) for file in found.files):
        raise GivenUp("refused", "the head names files that are not in repodata/")
    try:
        free = shutil.disk_usage(dest).free
    except OSError as error:
        raise GivenUp("local", str(error)) from error
    if 3 * wanted > free:
        raise GivenUp("local", f"{wanted} bytes of metadata and {free} free")


def _reason(error: TidingsError) -> str:
    if isinstance(error, NetworkError):
        if error.code in _HANGS:
            return "hangs"
        return "missing" if error.code in _ABSENT else "useless"
    if isinstance(error, RollbackError):
        return "older"
    if isinstance(error, VerificationError):
        return "refused"
    if isinstance(error, FormatError):
        return "useless"
    return "local" if isinstance(error, LocalError) else "useless"


# -- giving up early -----------------------------------------------------------------------------


@contextlib.contextmanager
def _hurried() -> Iterator[None]:
    try:
        yield
    except NetworkError as error:
        if error.code in _HANGS:
            raise GivenUp("hangs", str(error)) from error
        raise


class _Hasty(Remote):
    """A mirror that hangs once is left: the other routes lead to the same machine."""

    def __init__(self, urls: Sequence[str], settings: RemoteSettings) -> None:
        super().__init__(urls, settings)
        self._patience = settings.total_timeout / 2

    def head(self, etag: str | None = None, known: bytes | None = None) -> HeadAnswer:
        # A head may be large, so a trickle is within what its size allows; not here.
        timer = threading.Timer(self._patience, self.close)
        timer.daemon = True
        timer.start()
        try:
            with _hurried():
                return super().head(etag, known)
        finally:
            timer.cancel()

    def ranges(
        self, wanted: Sequence[Wanted], *, check: Check | None = None
    ) -> Iterator[tuple[int, bytes]]:
        with _hurried():
            yield from super().ranges(wanted, check=check)

    def frames(self, wanted: Sequence[Wanted]) -> Iterator[bytes]:
        with _hurried():
            yield from super().frames(wanted)

    def bundle(self, start: PackName, target: PackName, tracks: Sequence[str] = ()) -> bytes:  # type: ignore[override]
        with _hurried():
            return super().bundle(start, target, tracks)

    def file(self, path: str, sink: Sink, **how: object) -> None:
        if how.get("fresh"):
            # The head led nowhere and the mirror's own main file is asked for: everything whole
            # from this mirror is what dnf does itself, from its own mirrors.
            raise GivenUp("useless", "the head does not lead to a whole publish")
        with _hurried():
            super().file(path, sink, **how)  # type: ignore[arg-type]


# -- the command ---------------------------------------------------------------------------------


def main(stdin: TextIO | None = None, environ: MutableMapping[str, str] | None = None) -> int:
    """``tidings stage``. Returns the exit code."""
    from .cli import run

    reporter = Reporter(as_json=True)
    source = stdin if stdin is not None else sys.stdin
    variables = environ if environ is not None else os.environ
    return run(lambda: _run(source, variables, reporter), reporter)


def _run(source: TextIO, environ: MutableMapping[str, str], reporter: Reporter) -> int:
    line = source.readline(REQUEST_LIMIT)
    request = Request.decode(line.encode())
    _apply(request, environ)
    reporter.data({"type": "ready"})
    threading.Thread(target=_end_with, args=(source,), daemon=True).start()
    staged = stage(request, reporter)
    reporter.summary(staged.to_json(), "")
    return 0


def _apply(request: Request, environ: MutableMapping[str, str]) -> None:
    """dnf's settings for this repository, where the transport looks for them."""
    if request.proxy is not None:
        for name in list(environ):
            if name.lower() in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
                del environ[name]
        if request.proxy:
            environ["http_proxy"] = environ["https_proxy"] = request.proxy
        else:
            environ["no_proxy"] = "*"
    if request.cafile is not None:
        environ["SSL_CERT_FILE"] = request.cafile


def _end_with(source: TextIO) -> None:
    """Wait until dnf is gone, and go. What is in the scratch folder serves the next run."""
    with contextlib.suppress(OSError, ValueError):
        while source.read(4096):
            pass
    os._exit(130)


def _text(value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("not a text")
    return value


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > 64:
        raise ValueError("not a short list")
    return tuple(_text(each) for each in value)


if __name__ == "__main__":
    sys.exit(main())
