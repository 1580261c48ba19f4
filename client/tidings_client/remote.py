"""One repository on one or more mirrors, over HTTP: failover by object, bounds, everything counted.

The protocol is in docs/protocol.md. What comes back is bounded and has the length that was asked
for; whether it is right is for the caller's ``check`` to say, and a wrong answer is asked for once
more past all caches before the next mirror is.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar
from urllib.parse import quote

import httpx

from tidings_chunkstore.errors import (
    FormatError,
    InputError,
    NetworkError,
    TidingsError,
    VerificationError,
)
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.places import PackName

from .answers import (
    BATCH_BYTES,
    SKIP,
    Batch,
    Validators,
    Wanted,
    bounded,
    decoded,
    drain,
    expect,
    promised,
    range_body,
    validators_of,
)
from .mirrors import Failed, Mirror, Page, next_url, remember
from .transport import NETWORK_ERRORS, TIMEOUTS, UNREACHABLE, Meter, Transport

if TYPE_CHECKING:
    from .guard import Guard

__all__ = ["HeadAnswer", "Looked", "Remote", "RemoteSettings", "Validators", "Wanted"]

Check = Callable[[int, bytes], object]
Sink = Callable[[bytes], object]
T = TypeVar("T")

FOLDER = "tidings/"
_HEAD = FOLDER + "head.json"
_FRAMES = FOLDER + "frames"
_RECONCILE = FOLDER + "reconcile/"
_FRESH = ("Cache-Control", "no-cache")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True, slots=True)
class RemoteSettings:
    """How patient a client is. Times in seconds."""

    connect_timeout: float = 3.0
    read_timeout: float = 30.0  #: without any byte
    total_timeout: float = 300.0  #: for one object, all tries and mirrors; see ``slowest``
    slowest: int = 1000  #: bytes/s that extend total_timeout for a large object
    patience: float = 20.0  #: for a server that answers 503 to the making of a bundle
    tries: int = 3  #: rounds over all mirrors
    backoff: float = 0.25  #: before the second round; doubles, with jitter
    parallel: int = 4  #: requests at a time
    redirects: int = 5
    user_agent: str = "tidings/0.1"
    guard: Guard | None = None  #: where connections may go; None: wherever URLs lead


@dataclass(frozen=True, slots=True)
class Looked:
    """A document, or None when it is what *validators* said."""

    data: bytes | None
    validators: Validators


@dataclass(frozen=True, slots=True)
class HeadAnswer:
    """The head's bytes, or None when they are those that the caller knows."""

    data: bytes | None
    etag: str | None


class Remote:
    """One repository on its mirrors, the preferred one first. A context manager; thread-safe.

    Every method raises NetworkError when no mirror has a usable answer (``missing``, ``timeout``,
    ``connect``, ``connection``, ``denied``, ``forbidden``, ``status``, ``protocol``, ``redirect``,
    ``truncated``, ``no-ranges``, ``busy``, ``too-large``), and VerificationError when the caller's
    check refused what they sent.
    """

    def __init__(self, urls: Sequence[str | Page], settings: RemoteSettings | None = None) -> None:
        """*urls*: base URLs, http or https, of one repository, or one Page. Raises InputError."""
        if not urls:
            raise InputError("no URL of a repository is given", code="bad-url")
        self._settings = settings or RemoteSettings()
        self._mirrors: list[Mirror] = [
            url if isinstance(url, Page) else Mirror(url, i)
            for i, url in enumerate(dict.fromkeys(urls))
        ]
        self._home = self._mirrors[0]  # the mirror whose head is followed
        self._last = self._mirrors[0]  # the one that answered last
        self._told: set[int] = set()  # mirrors of whose failure the user knows
        self._on_failover: Callable[[str], object] | None = None
        self._meter = Meter()
        self._stop = threading.Event()
        self._requests = 0
        self._lock = threading.Lock()
        self._client = httpx.Client(
            transport=Transport(self._meter, self._settings.parallel, self._settings.guard),
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all that is under way and close the connections."""
        self._stop.set()
        self._meter.cut()
        self._client.close()

    @property
    def name(self) -> str:
        """The preferred mirror's URL, without credentials."""
        return str(self._mirrors[0])

    @property
    def answered(self) -> str:
        """The base URL of the mirror that answered last, with a slash and without credentials."""
        return str(self._last).rstrip("/") + "/"

    @property
    def bytes_received(self) -> int:
        """Bytes read from sockets so far, headers and all (inside TLS)."""
        return self._meter.received

    @property
    def bytes_sent(self) -> int:
        """Bytes written to sockets so far, headers and all (inside TLS)."""
        return self._meter.sent

    @property
    def requests(self) -> int:
        """Requests sent so far, redirects and failed ones included."""
        return self._requests

    def watch(self, on_bytes: Callable[[int], None] | None) -> None:
        """Call *on_bytes* with the size of each read, from whichever thread made it."""
        self._meter.on_bytes = on_bytes

    def on_failover(self, tell: Callable[[str], object] | None) -> None:
        """Call *tell* with a line when another mirror answers for one that failed; once for each.

        It is called from whichever thread asked.
        """
        self._on_failover = tell

    # -- what a client asks for -------------------------------------------------------------------

    def head(self, etag: str | None = None, known: bytes | None = None) -> HeadAnswer:
        """The head, at most LIMITS.head bytes; compressed transfer is welcome here.

        Raises:
            NetworkError: ``no-tidings`` when a mirror says that there is none and no other has it.
        """
        headers = [("Accept-Encoding", "gzip"), _FRESH]
        if etag is not None:
            headers.append(("If-None-Match", etag))

        def attempt(mirror: Mirror, fresh: bool) -> HeadAnswer:
            with self._send(mirror, _HEAD, headers, follow=True) as answer:
                if answer.status_code == 304:
                    drain(answer)
                    self._home = mirror
                    return HeadAnswer(None, answer.headers.get("etag", etag))
                expect(answer, 200, mirror, _HEAD)
                data = b"".join(decoded(answer, LIMITS.head, mirror, _HEAD))
                self._home = mirror
                return HeadAnswer(None if data == known else data, answer.headers.get("etag"))

        try:
            return self._anywhere(_HEAD, attempt, LIMITS.head)
        except NetworkError as error:
            codes = error.details.get("codes")
            if isinstance(codes, list) and not {"missing", "forbidden"}.isdisjoint(codes):
                raise NetworkError(
                    f"{self._mirrors[0]}: no {_HEAD} there: this repository is not published by "
                    "Tidings",
                    code="no-tidings",
                ) from error
            raise

    def look(self, path: str, limit: int, known: Validators | None = None) -> Looked:
        """A small file as the first mirror has it now, unless it is the one that *known* tells of.

        No other mirror is asked: what one says of its file says nothing of another's.
        """
        headers = [_FRESH]
        if known is not None and known.etag is not None:
            headers.append(("If-None-Match", known.etag))
        elif known is not None and known.modified is not None:
            headers.append(("If-Modified-Since", known.modified))
        asked = len(headers) > 1

        def attempt(mirror: Mirror, fresh: bool) -> Looked:
            with self._send(mirror, path, headers, follow=True) as answer:
                if answer.status_code == 304 and asked and known is not None:
                    drain(answer)
                    return Looked(None, known)
                expect(answer, 200, mirror, path)
                data = b"".join(decoded(answer, limit, mirror, path))
                return Looked(data, validators_of(answer.headers))

        return self._anywhere(path, attempt, limit, among=self._mirrors[:1])

    def ranges(
        self, wanted: Sequence[Wanted], *, check: Check | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """The bytes of each of *wanted* with its position in the list, as they arrive.

        *check* is called as ``check(position, data)`` from the thread that fetched.
        """
        if min(len(wanted), self._settings.parallel) <= 1:
            for i, want in enumerate(wanted):
                yield i, self._range(i, want, check)
            return
        yield from self._parallel(wanted, check)

    def frames(self, wanted: Sequence[Wanted]) -> Iterator[bytes]:
        """The bytes of each of *wanted*, in order, by batch requests. Bounded by one range.

        A request that breaks off is continued with the ranges that have not come.
        """
        batch = Batch(wanted)
        broken = 0
        while batch.next < len(wanted):
            _, _, total = batch.request()
            settings = self._settings
            deadline = time.monotonic() + settings.total_timeout + total / settings.slowest
            # Failover until the first piece is here; what breaks later is asked for anew.
            pieces = self._anywhere(
                _FRAMES,
                lambda mirror, fresh: _primed(self._batch(mirror, batch)),
                total,
                home=True,
            )
            try:
                while True:
                    with self._meter.deadline(deadline):
                        piece = next(pieces, None)
                    if piece is None:
                        break
                    batch.next += 1
                    yield piece
            except Failed as failed:
                broken += 1
                if not failed.again or broken >= settings.tries:
                    raise failed.error from failed
                self._wait(settings.backoff * 2**broken)

    def bundle(self, start: PackName, target: PackName, tracks: Iterable[str] = ()) -> bytes:
        """The bundle of direct deltas from snapshot *start* to *target*, see docs/protocol.md.

        Raises:
            NetworkError: ``missing`` when there is none, ``busy`` when the making took too long.
        """
        path = f"{FOLDER}delta/{_stem(start)}/{_stem(target)}"
        query = ",".join(quote(track, safe="") for track in sorted(tracks))

        def attempt(mirror: Mirror, fresh: bool) -> bytes:
            with self._send(mirror, path, [], query=query) as answer:
                expect(answer, 200, mirror, path)
                return b"".join(bounded(answer, BATCH_BYTES, mirror, path))

        return self._anywhere(path, attempt, BATCH_BYTES, home=True, patient=True)

    def reconcile(
        self, snapshot: PackName, tracks: Iterable[str] = (), *, body: bytes | None = None
    ) -> bytes:
        """The lists of *tracks* in a snapshot, or with a *body* the answer to that request.

        See docs/protocol.md, "Reconcile". A busy server is not waited for: there are other routes.
        """
        path = _RECONCILE + _stem(snapshot)
        query = ",".join(quote(track, safe="") for track in sorted(tracks))
        method = "GET" if body is None else "POST"
        limit = LIMITS.reconcile_answer

        def attempt(mirror: Mirror, fresh: bool) -> bytes:
            with self._send(mirror, path, [], method=method, content=body, query=query) as answer:
                expect(answer, 200, mirror, path)
                return b"".join(bounded(answer, limit, mirror, path))

        return self._anywhere(path, attempt, limit, home=True)

    def file(
        self,
        path: str,
        sink: Sink,
        *,
        limit: int,
        reset: Callable[[], object] | None = None,
        check: Callable[[], object] | None = None,
        size: int | None = None,
        fresh: bool = False,
    ) -> None:
        """A published file, piece by piece into *sink*.

        Args:
            path: relative to the repository; it names the file literally and is quoted here.
            limit: most bytes that *sink* gets.
            reset: called before a second attempt: what *sink* got so far is void. Without it there
                is none once *sink* has got a byte.
            check: called after the last byte; raises VerificationError or FormatError.
            size: the exact bytes, where they are known.
            fresh: ask past all caches.
        """
        fed = False

        def attempt(mirror: Mirror, again: bool) -> None:
            nonlocal fed
            if fed and reset is not None:
                reset()
                fed = False
            headers = [_FRESH] if fresh or again else []
            with self._send(mirror, path, headers) as answer:
                expect(answer, 200, mirror, path)
                promised(answer, size, limit, mirror, path)
                got = 0
                # A server that compresses what was asked for as it is: undone where the file
                # itself is no gzip file (Apache says x-gzip of those, too, and sends them as is).
                pieces = bounded if path.endswith((".gz", ".tgz")) else decoded
                for piece in pieces(answer, limit, mirror, path):
                    got += len(piece)
                    fed = True
                    sink(piece)
                if size is not None and got != size:
                    raise VerificationError(
                        f"{mirror}: {path} has {got} bytes, not {size}", code="wrong-size"
                    )
            if check is not None:
                check()

        self._anywhere(path, attempt, size or limit, once=lambda: fed and reset is None)

    # -- ranges -----------------------------------------------------------------------------------

    def _parallel(
        self, wanted: Sequence[Wanted], check: Check | None
    ) -> Iterator[tuple[int, bytes]]:
        """Worker threads take from one list; at most two results a thread wait to be taken."""
        count = min(len(wanted), self._settings.parallel)
        todo = iter(enumerate(wanted))
        lock = threading.Lock()
        results: queue.Queue[tuple[int, bytes | BaseException]] = queue.Queue(2 * count)
        ended = threading.Event()

        def put(item: tuple[int, bytes | BaseException]) -> None:
            while not (ended.is_set() or self._stop.is_set()):
                with contextlib.suppress(queue.Full):
                    results.put(item, timeout=0.2)
                    return

        def work() -> None:
            while not (ended.is_set() or self._stop.is_set()):
                with lock:
                    i, want = next(todo, (-1, ("", 0, 0)))
                if i < 0:
                    return
                try:
                    data = self._range(i, want, check)
                except BaseException as error:  # noqa: BLE001 (raised in the thread that asked)
                    put((i, error))
                    return
                put((i, data))

        # Daemons: an interrupt must not wait for a peer that stalls.
        for number in range(count):
            threading.Thread(target=work, name=f"range-{number}", daemon=True).start()
        try:
            for _ in range(len(wanted)):
                i, result = results.get()
                if isinstance(result, BaseException):
                    raise result
                yield i, result
        finally:
            ended.set()

    def _range(self, i: int, want: Wanted, check: Check | None) -> bytes:
        name, offset, length = want
        path = FOLDER + name
        if length == 0:
            return b""

        def attempt(mirror: Mirror, fresh: bool) -> bytes:
            if not mirror.ranges and offset > SKIP:
                raise Failed(NetworkError(f"{mirror}: answers no ranges", code="no-ranges"))
            headers = [("Range", f"bytes={offset}-{offset + length - 1}")]
            with self._send(mirror, path, [*headers, _FRESH] if fresh else headers) as answer:
                data = range_body(answer, mirror, path, offset, length)
            if check is not None:
                check(i, data)
            return data

        return self._anywhere(path, attempt, length)

    # -- batches ----------------------------------------------------------------------------------

    def _batch(self, mirror: Mirror, batch: Batch) -> Iterator[bytes]:
        body, count, total = batch.request()
        wanted = batch.wanted[batch.next : batch.next + count]
        headers = [("Content-Type", "application/json")]
        with self._send(mirror, _FRAMES, headers, method="POST", content=body) as answer:
            expect(answer, 200, mirror, _FRAMES)
            promised(answer, total, BATCH_BYTES, mirror, _FRAMES)
            left = bytearray()
            position = 0
            for piece in answer.iter_raw():
                left += piece
                at = 0
                while position < count and len(left) - at >= wanted[position][2]:
                    end = at + wanted[position][2]
                    yield bytes(memoryview(left)[at:end])
                    at = end
                    position += 1
                del left[:at]
            if position < count or left:
                error = NetworkError(f"{mirror}: {_FRAMES}: not the length", code="truncated")
                raise Failed(error, again=True)

    # -- one request, and failover ----------------------------------------------------------------

    def _anywhere(
        self,
        what: str,
        attempt: Callable[[Mirror, bool], T],
        length: int,
        *,
        home: bool = False,
        patient: bool = False,
        once: Callable[[], bool] = lambda: False,
        among: Sequence[Mirror] | None = None,
    ) -> T:
        """The first good answer of the mirrors, in rounds; *length* is about what it has in bytes.

        A mirror that has not got the object, or sends a wrong one twice, is not asked again for
        it. *home*: begin with the mirror that the head came from. *patient*: a 503 is waited for.
        """
        settings = self._settings
        started = time.monotonic()
        deadline = started + settings.total_timeout + length / settings.slowest
        out: set[int] = set()
        errors: list[TidingsError] = []
        failures: dict[int, TidingsError] = {}  # by mirror, the last
        turn = 0
        while True:
            after = 0.0
            for mirror in self._order(home) if among is None else among:
                if mirror.index in out:
                    continue
                try:
                    with self._meter.deadline(deadline):
                        found = self._twice(mirror, attempt, once)
                    self._last = mirror
                    self._tell_failover(failures, mirror)
                    return found
                except (FormatError, VerificationError) as error:
                    mirror.penalty += 1  # what it has is old or damaged: asked last from now on
                    out.add(mirror.index)
                    errors.append(error)
                    failures[mirror.index] = error
                except Failed as failed:
                    errors.append(failed.error)
                    failures[mirror.index] = failed.error
                    after = max(after, failed.after)
                    if not failed.again:
                        out.add(mirror.index)
                if once():
                    raise _verdict(what, errors)
            turn += 1
            asked = after > 0
            last = turn >= settings.tries and not (asked and patient)
            if last or len(out) == len(self._mirrors if among is None else among):
                raise _verdict(what, errors)
            pause = max(settings.backoff * 2 ** (turn - 1) * random.uniform(0.5, 1.5), after)
            end = min(deadline, started + settings.patience) if asked else deadline
            if time.monotonic() + pause > end:
                raise _verdict(what, errors)
            self._wait(pause)

    def _twice(
        self, mirror: Mirror, attempt: Callable[[Mirror, bool], T], once: Callable[[], bool]
    ) -> T:
        """One attempt; when its bytes are wrong, one more past the caches on the way."""
        try:
            return attempt(mirror, False)
        except (FormatError, VerificationError):
            if once():
                raise
        return attempt(mirror, True)

    def _tell_failover(self, failures: Mapping[int, TidingsError], mirror: Mirror) -> None:
        for number, error in failures.items():
            with self._lock:
                new = number != mirror.index and number not in self._told
                if new:
                    self._told.add(number)
            if new and self._on_failover is not None:
                self._on_failover(f"{error}; {mirror} answered")

    def _order(self, home: bool) -> list[Mirror]:
        first = self._home if home else None
        return sorted(self._mirrors, key=lambda m: (m is not first, m.penalty, m.index))

    def _wait(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise NetworkError("closed", code="closed")

    @contextlib.contextmanager
    def _send(
        self,
        mirror: Mirror,
        path: str,
        headers: Sequence[tuple[str, str]],
        *,
        method: str = "GET",
        content: bytes | None = None,
        query: str = "",
        follow: bool = False,
    ) -> Iterator[httpx.Response]:
        """Send a request and follow its redirects; the answer's body is not read yet.

        What goes wrong until the end of the block, body included, becomes Failed. *follow*: the
        mirror's other objects are asked for where this one was found.
        """
        url = mirror.url(path)
        if query:
            url = url.copy_with(query=f"tracks={query}".encode())
        try:
            answer = self._redirected(mirror, url, path, headers, method, content, follow)
            try:
                yield answer
            finally:
                answer.close()
        except NETWORK_ERRORS as error:
            if self._stop.is_set():
                raise NetworkError("closed", code="closed") from error
            mirror.penalty += 1
            mirror.moved = None
            raise Failed(_translated(error, mirror, path), again=True) from error

    def _redirected(
        self,
        mirror: Mirror,
        url: httpx.URL,
        path: str,
        headers: Sequence[tuple[str, str]],
        method: str,
        content: bytes | None,
        follow: bool,
    ) -> httpx.Response:
        settings = self._settings
        origin = mirror.base
        timeout = {
            "connect": settings.connect_timeout,
            "read": settings.read_timeout,
            "write": settings.read_timeout,
            "pool": settings.total_timeout,
        }
        common = [("User-Agent", settings.user_agent)]
        if not any(name == "Accept-Encoding" for name, _ in headers):
            common.append(("Accept-Encoding", "identity"))
        for _ in range(settings.redirects + 1):
            # A bare Request carries only what is listed, where Client.request adds its defaults.
            request = httpx.Request(
                method,
                url,
                headers=[*common, *headers],
                content=content,
                extensions={"timeout": timeout},
            )
            if settings.guard is not None:
                try:
                    settings.guard.check_name(url.raw_host.decode("ascii"))
                except NetworkError as error:
                    raise Failed(error) from error
            with self._lock:
                self._requests += 1
            answer = self._client.send(request, stream=True, follow_redirects=False)
            location = answer.headers.get("location")
            if answer.status_code not in _REDIRECTS or location is None:
                if follow and url != mirror.url(path):
                    remember(mirror, url, path)
                return answer
            drain(answer)
            answer.close()
            url = next_url(origin, url, location, mirror)
        raise Failed(
            NetworkError(
                f"{mirror}: {path}: more than {settings.redirects} redirects", code="redirect"
            ),
        )


def _primed(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """*pieces* after its first one has come, so that a refusal shows at once."""
    first = next(pieces, None)

    def all_of_them() -> Iterator[bytes]:
        if first is not None:
            yield first
            yield from pieces

    return all_of_them()


def _stem(pack: PackName) -> str:
    return str(pack).removesuffix(".pack")


def _translated(error: Exception, mirror: Mirror, path: str) -> NetworkError:
    where = f"{mirror}: {path}"
    reason = str(error) or type(error).__name__
    if isinstance(error, TIMEOUTS):
        return NetworkError(f"{where}: no answer in time ({reason})", code="timeout")
    if isinstance(error, UNREACHABLE):
        return NetworkError(f"{where}: cannot connect: {reason}", code="connect")
    return NetworkError(f"{where}: the connection broke: {reason}", code="connection")


def _verdict(what: str, errors: Sequence[TidingsError]) -> TidingsError:
    """The error that says most: wrong bytes, then whatever is not just absence."""
    codes = [error.code for error in errors]
    for error in errors:
        if isinstance(error, (FormatError, VerificationError)):
            return VerificationError(str(error), code=error.code, codes=codes)
    named = [e for e in errors if isinstance(e, NetworkError)]
    told = next((e for e in reversed(named) if e.code != "missing"), None)
    last = told or (named[-1] if named else NetworkError(f"{what}: no mirror answered"))
    return NetworkError(str(last), code=last.code, **{**last.details, "codes": codes})
