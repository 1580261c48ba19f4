"""What happens in a server process, counted: requests, bytes, the cache, upstreams, errors.

A request adds to plain integers, a microsecond or two of work; once a second, and before each
scrape, a thread folds them into the values of ``metrics_store``, which all workers share. Only
there paths become labels: routes are few, and a repository is named only when the site knows it
(it is configured, or a request below it was answered well), so no client can make up labels.

The rest of the server says what it knows by ``count`` (the cache), ``upstream`` and ``edge``
(pulled repositories), and reads ``saved``. docs/metrics.md has every metric.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import resource
import threading
import time
from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from tidings_chunkstore.errors import TidingsError
from tidings_chunkstore.places import PackName, Span

from .gauges import Gauges, Rows, label
from .metrics_store import SECONDS, Values, family, text
from .settings import Settings
from .site import Site, Target, split_path, target_of
from .whole import PEEK, Whole, span_of, tracks_of

log = logging.getLogger("tidings.metrics")

PATH = "/metrics"
#: What a request may be counted as.
ROUTES = ("head", "pack", "file", "frames", "delta", "reconcile", "casync", "page", "api", "other")
#: Routes by which Tidings answers what whole files would have; their bytes are its cost.
TIDINGS = ("head", "pack", "frames", "delta", "reconcile")

_SOON = 1.0  # seconds from a request to its place in the shared values
_IDLE = 15.0  # seconds after which an idle worker says how it is
_CELLS = 4096  # different paths that are told apart between two folds
_NOTED = 256  # answers between two folds whose whole files are worked out
_RANGES = 4096  # different ranges of one pack, the same
_REPOSITORIES = 1024  # named in labels
_FOLDERS = 4096  # of which is known which repository they lie in
_FORGET = 60.0  # seconds after which that is looked up anew
_SAVED = 5.0  # seconds for which the totals are kept
_LOGGERS = 32  # named in labels
#: Say that a request came by way of a proxy, which is on this machine but asks for anybody.
_FORWARDED = frozenset({b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via"})


class _Cell:
    """What came of the requests for one path since the last fold."""

    __slots__ = ("batches", "buckets", "heads", "ranges", "route", "seconds", "sent", "statuses")

    def __init__(self, route: str) -> None:
        self.route = route
        self.statuses = [0] * 6  #: by first digit; 0: no answer
        self.buckets = [0] * (len(SECONDS) + 1)
        self.seconds = 0.0
        self.sent = 0
        self.ranges: dict[bytes, int] = {}  #: Range headers of a pack that were answered by 206
        self.heads: list[bytes] = []  #: beginnings of bundles that were sent
        self.batches: list[tuple[Span, ...]] = []  #: batches that were sent


@dataclass(frozen=True, slots=True)
class Saved:
    """Of one repository, in bytes since the server started (and not since any worker did)."""

    sent: int = 0  #: what Tidings sent: heads, ranges, batches, bundles
    whole: int = 0  #: whole published files that clients would have taken instead
    received: int = 0  #: what the edge received from upstreams
    upstream_whole: int = 0  #: whole files that it would have taken instead

    @property
    def bytes(self) -> int:
        """What clients were spared: never below 0."""
        return max(0, self.whole - self.sent)


@dataclass(slots=True)
class _Place:
    """The repository that a folder lies in."""

    name: str | None
    until: float


@dataclass(slots=True)
class _Events:
    """What others said since the last fold; may come from any thread."""

    counts: deque[tuple[str, float, tuple[str, ...]]] = field(
        default_factory=lambda: deque(maxlen=100_000)
    )
    seconds: deque[tuple[str, float, tuple[str, ...]]] = field(
        default_factory=lambda: deque(maxlen=100_000)
    )


class Metrics:
    """The metrics of one server process. All that reads files runs in *pool*."""

    def __init__(
        self,
        settings: Settings,
        site: Site,
        pool: Executor,
        *,
        version: str = "",
        cache: Path | None = None,
        making: Callable[[], int] = lambda: 0,
    ) -> None:
        """*cache*: the folder of what is made on request; *making*: how many are in the making."""
        self._site = site
        self._pool = pool
        self._making = making
        self._version = version
        self._fixed = {
            "tidings_cache_limit_bytes": float(settings.serve.cache_size),
            "tidings_cache_queue_limit": float(settings.serve.bundle_queue),
        }
        followed = [repo.path for repo in settings.repos if repo.upstream is not None]
        self._gauges = Gauges(site, settings.follow.state, cache, followed)
        self._cells: dict[bytes, _Cell] = {}
        self._series: dict[bytes, _Cell] = {}
        self._noted = 0
        self._soon = False
        self._timer: asyncio.TimerHandle | None = None
        self._events = _Events()
        self._errors: Counter[str] = Counter()
        self._handler = _Errors(self._errors)
        # Below: folding and reading, one thread at a time.
        self._lock = threading.Lock()
        self._values: Values | None = None
        self._known = {repo.path for repo in settings.repos}
        self._known |= {repo.path for repo in settings.pulled}
        self._folders: OrderedDict[bytes, _Place] = OrderedDict()
        self._wholes: OrderedDict[str, tuple[Any, Whole]] = OrderedDict()
        self._errors_told: Counter[str] = Counter()
        self._cpu_told = 0.0
        self._totals: tuple[float, Mapping[str, Saved]] | None = None
        self._scrape: asyncio.Task[tuple[bytes, str]] | None = None

    # -- in the loop -----------------------------------------------------------------------------

    def start(self) -> None:
        """Called in the loop, before the first request."""
        logging.getLogger("tidings").addHandler(self._handler)
        self._idle()

    def close(self) -> None:
        """Called after the last request: nothing that was counted is lost."""
        if self._timer is not None:
            self._timer.cancel()
        logging.getLogger("tidings").removeHandler(self._handler)
        self._fold(self._take())

    def observe(
        self, scope: Mapping[str, Any], status: int, sent: int, seconds: float, first: bytes
    ) -> None:
        """A request was answered: *sent* bytes of body, of which *first* are the first."""
        raw: bytes = scope["raw_path"]
        cell = self._cells.get(raw)
        if cell is None:
            cell = self._cell(scope, raw)
        cell.statuses[status // 100 if status < 600 else 0] += 1
        cell.sent += sent
        cell.seconds += seconds
        cell.buckets[bisect_left(SECONDS, seconds)] += 1
        if cell.route == "pack":
            if status == 206 and sent:
                for name, value in scope["headers"]:
                    if name == b"range":
                        if value in cell.ranges or len(cell.ranges) < _RANGES:
                            cell.ranges[value] = cell.ranges.get(value, 0) + 1
                        break
        elif status == 200 and first and self._noted < _NOTED:
            if cell.route in ("delta", "reconcile"):
                self._noted += 1
                cell.heads.append(first[:PEEK])
            elif cell.route == "frames":
                self._noted += 1
                cell.batches.append(scope.get("tidings.spans", ()))
        if not self._soon:
            self._soon = True
            asyncio.get_running_loop().call_later(_SOON, self._tick)

    def _cell(self, scope: Mapping[str, Any], raw: bytes) -> _Cell:
        route, key = _route_of(scope, raw)
        cell = self._series.get(key)
        if cell is None:
            if len(self._series) >= _CELLS:
                route, key = "other", b"other"
            cell = self._series.setdefault(key, _Cell(route))
        if len(self._cells) < _CELLS:
            self._cells[raw] = cell
        return cell

    def _take(self) -> dict[bytes, _Cell]:
        taken, self._series, self._cells, self._noted = self._series, {}, {}, 0
        return taken

    def _tick(self) -> None:
        self._soon = False
        with suppress(RuntimeError):  # the pool is closed: ``close`` folds what is left
            self._pool.submit(self._fold, self._take())

    def _idle(self) -> None:
        self._tick()
        self._timer = asyncio.get_running_loop().call_later(_IDLE, self._idle)

    async def scrape(self) -> tuple[bytes, str]:
        """The exposition format over all workers, and its media type. One reading at a time."""
        if self._scrape is None or self._scrape.done():
            self._scrape = asyncio.ensure_future(self._read())
        return await asyncio.shield(self._scrape)

    async def _read(self) -> tuple[bytes, str]:
        taken = self._take()
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._text, taken)

    # -- from anywhere -----------------------------------------------------------------------------

    def count(self, kind: str, result: str, seconds: float | None = None) -> None:
        """A question to the cache for a *kind* of thing, or that it was made in *seconds*."""
        if seconds is None:
            self._events.counts.append(("tidings_cache_answers_total", 1, (kind, result)))
        else:
            self._events.seconds.append(("tidings_cache_making_seconds", seconds, (kind,)))

    def upstream(
        self, repository: str, *, good: bool, received: int, whole: int, seconds: float
    ) -> None:
        """The edge asked an upstream: bytes received, and of the whole files that came of it.

        *repository* must be one of the settings.
        """
        here = (label(repository),)
        counts = self._events.counts
        result = "good" if good else "failed"
        counts.append(("tidings_upstream_fetches_total", 1, (*here, result)))
        counts.append(("tidings_upstream_received_bytes_total", received, here))
        counts.append(("tidings_upstream_whole_bytes_total", whole, here))
        self._events.seconds.append(("tidings_upstream_seconds", seconds, ()))

    def edge(self, repository: str, state: str) -> None:
        """The edge answered: *state* is one of few words, as fresh, waited, stale, redirect."""
        name = "tidings_edge_answers_total"
        self._events.counts.append((name, 1, (label(repository), state)))

    def saved(self) -> Mapping[str, Saved]:
        """Totals by repository, over all workers, a few seconds old. Reads files: in a thread."""
        with self._lock:
            if self._totals is None or time.monotonic() > self._totals[0] + _SAVED:
                self._totals = (time.monotonic(), _totals(self._shared().read()))
            return self._totals[1]

    # -- in a thread -------------------------------------------------------------------------------

    def _shared(self) -> Values:
        if self._values is None:
            self._values = Values()
            now = time.time()
            worker = str(os.getpid())
            self._values.set("tidings_worker_start_time_seconds", now, worker)
        return self._values

    def _fold(self, cells: dict[bytes, _Cell]) -> None:
        try:
            with self._lock:
                self._add(cells)
        except Exception:
            # Whatever it is, requests must not suffer, and the next fold may work.
            log.exception("counts were lost")

    def _add(self, cells: dict[bytes, _Cell]) -> None:
        values = self._shared()
        for raw, cell in cells.items():
            self._add_cell(values, raw, cell)
        events = self._events
        for queue, put in ((events.counts, values.add), (events.seconds, values.observe)):
            for _ in range(len(queue)):
                name, value, labels = queue.popleft()
                put(name, value, *labels)
        for name in list(self._errors):
            new = self._errors[name] - self._errors_told[name]
            values.add("tidings_errors_total", new, name)
            self._errors_told[name] += new
        cpu = time.process_time()
        values.add("tidings_cpu_seconds_total", cpu - self._cpu_told)
        self._cpu_told = cpu
        values.set("tidings_cache_making", self._making())
        worker = str(os.getpid())
        for name, found in _process():
            values.set(name, found, worker)

    def _add_cell(self, values: Values, raw: bytes, cell: _Cell) -> None:
        route = cell.route
        repository = self._repository(raw, cell) if route not in ("api", "page", "other") else None
        where = "" if repository is None else label(repository)
        for digit, count in enumerate(cell.statuses):
            if count:
                status = f"{digit}xx" if digit else "none"
                values.add("tidings_requests_total", count, route, where, status)
        values.add("tidings_sent_bytes_total", cell.sent, route, where)
        values.observe_all("tidings_request_seconds", cell.buckets, cell.seconds, route)
        if repository is not None and (cell.ranges or cell.heads or cell.batches):
            whole = self._whole_bytes(raw, cell, repository)
            if whole:
                values.add("tidings_whole_bytes_total", whole, route, where)

    def _repository(self, raw: bytes, cell: _Cell) -> str | None:
        """The repository of a path, when the site knows it."""
        good = any(cell.statuses[1:4])
        if cell.route == "file":
            return self._repository_of_folder(raw, good)
        target = _target(raw)
        if target is None or target.repository is None:
            return None
        name = target.repository
        if name in self._known:
            return name
        # What was answered well below tidings/ is there; nothing else becomes a label.
        if not good or len(self._known) >= _REPOSITORIES:
            return None
        self._known.add(name)
        return name

    def _repository_of_folder(self, raw: bytes, good: bool) -> str | None:
        now = time.monotonic()
        place = self._folders.get(raw)
        if place is not None and now < place.until:
            return place.name
        parts = split_path(raw + b"/x") or ()
        names = ["/".join(parts[:at]) for at in range(len(parts) - 1, -1, -1)]
        known = next((name for name in names if name in self._known), None)
        if not good:
            return known
        for name in names:
            if name == known:
                break
            if len(self._known) < _REPOSITORIES and self._site.repository(name) is not None:
                self._known.add(name)
                known = name
                break
        self._folders[raw] = _Place(known, now + _FORGET)
        self._folders.move_to_end(raw)
        while len(self._folders) > _FOLDERS:
            self._folders.popitem(last=False)
        return known

    def _whole_bytes(self, raw: bytes, cell: _Cell, repository: str) -> int:
        try:
            found = self._site.repository(repository)
            head = found.head() if found is not None else None
        except TidingsError:
            return 0  # no head to tell by
        if head is None:
            return 0
        known = self._wholes.get(repository)
        if known is None or known[0] is not head:
            known = self._wholes[repository] = (head, Whole(head))
        self._wholes.move_to_end(repository)
        while len(self._wholes) > _NOTED:
            self._wholes.popitem(last=False)
        whole = known[1]
        total = sum(whole.of_tracks(tracks_of(beginning)) for beginning in cell.heads)
        total += sum(whole.of_spans(spans) for spans in cell.batches)
        target = _target(raw) if cell.ranges else None
        if target is not None and target.pack is not None:
            total += sum(
                count * _of_range(whole, target.pack, header)
                for header, count in cell.ranges.items()
            )
        return total

    def _text(self, cells: dict[bytes, _Cell]) -> tuple[bytes, str]:
        started = time.perf_counter()
        with self._lock:
            self._add(cells)
            families = self._shared().read()
            # What other workers have counted names repositories that this one may not know.
            names = {
                "" if sample.labels["repository"] == "/" else sample.labels["repository"]
                for metric in families
                if metric.name == "tidings_requests"
                for sample in metric.samples
                if sample.labels["repository"]
            }
            names |= {*self._site.names(), *(name for name in self._known if name in names)}
            rows: Rows = dict(self._gauges.rows(sorted(names)[:_REPOSITORIES]))
        rows |= {name: [((), value)] for name, value in self._fixed.items()}
        rows["tidings_build_info"] = [((self._version,), 1)]
        rows["tidings_scrape_seconds"] = [((), time.perf_counter() - started)]
        return text([*families, *(family(name, values) for name, values in rows.items())])


def _route_of(scope: Mapping[str, Any], raw: bytes) -> tuple[str, bytes]:
    """A request's route, and what it is counted together with: for a file its folder.

    Paths begin with a slash, so a word alone is nobody's path.
    """
    said = scope.get("tidings.route")
    if said is not None:
        return (said, said.encode()) if said in ROUTES else ("other", b"other")
    if b"/tidings/" in raw:
        target = _target(raw)
        if target is not None:
            if target.feature is not None:
                return (target.feature if target.feature in ROUTES else "other"), raw
            if target.is_head:
                return "head", raw
            if target.pack is not None:
                return "pack", raw
    return "file", raw.rpartition(b"/")[0]


def _target(raw: bytes) -> Target | None:
    parts = split_path(raw)
    return target_of(parts) if parts is not None else None


def _of_range(whole: Whole, pack: PackName, header: bytes) -> int:
    span = span_of(pack, header)
    return whole.of_spans([span]) if span is not None else 0


def _process() -> Iterable[tuple[str, float]]:
    """How this process is, as far as /proc says."""
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        yield "tidings_worker_resident_bytes", pages * resource.getpagesize()
    with suppress(OSError):
        yield "tidings_worker_open_files", len(os.listdir("/proc/self/fd"))
    yield "tidings_worker_max_files", resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _totals(families: Iterable[Any]) -> Mapping[str, Saved]:
    sums: Counter[tuple[str, str]] = Counter()
    of = {
        "tidings_sent_bytes_total": "sent",
        "tidings_whole_bytes_total": "whole",
        "tidings_upstream_received_bytes_total": "received",
        "tidings_upstream_whole_bytes_total": "upstream_whole",
    }
    for metric in families:
        for sample in metric.samples:
            name = of.get(sample.name)
            repository = sample.labels.get("repository")
            if name and repository and sample.labels.get("route", "head") in TIDINGS:
                sums["" if repository == "/" else repository, name] += int(sample.value)
    return {
        path: Saved(**{name: sums[path, name] for name in of.values()})
        for path in {path for path, _ in sums}
    }


class _Errors(logging.Handler):
    """Counts the lines of level error, by their logger."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__(logging.ERROR)
        self._counts = counts

    def emit(self, record: logging.LogRecord) -> None:
        """Count a line."""
        known = record.name in self._counts or len(self._counts) < _LOGGERS
        self._counts[record.name if known else "other"] += 1


def local(client: str, headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a request is this machine's own: from loopback, and by way of no proxy."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    own = (mapped or address).is_loopback
    return own and not any(name in _FORWARDED for name, _ in headers)


def make_router(metrics: Metrics, access: str) -> APIRouter:
    """The route, for *access* "local" or "all"."""
    router = APIRouter()

    @router.get(
        PATH,
        summary="Metrics for Prometheus",
        response_class=Response,
        responses={
            200: {"content": {"text/plain": {}}, "description": "the exposition format"},
            404: {"description": "not for this client: serve.metrics decides"},
        },
    )
    async def get_metrics(request: Request) -> Response:
        """Counted over all workers since the server started."""
        client = request.client.host if request.client else ""
        if access != "all" and not local(client, request.scope["headers"]):
            return Response(b"not found\n", 404, {"cache-control": "no-store"}, "text/plain")
        data, kind = await metrics.scrape()
        return Response(data, headers={"cache-control": "no-store"}, media_type=kind)

    return router
