"""All metrics by name, and where their values lie: in this process, or in files for several.

``prometheus_client`` decides on its first import, by ``PROMETHEUS_MULTIPROC_DIR``, where values
lie; ``values_folder`` sets it before the workers start. Nothing else in the server may import
``prometheus_client`` before.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import Metric

FOLDER = "PROMETHEUS_MULTIPROC_DIR"

#: Upper bounds in seconds: a hot range takes 0.2 ms, a bundle of a large repository 20 s.
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 2.5, 10.0, 60.0)
MAKING = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 300.0)


@dataclass(frozen=True, slots=True)
class Row:
    """A metric: its name as Prometheus shows it, its kind, its labels, and what it is."""

    name: str
    kind: str  #: counter, gauge or histogram
    labels: tuple[str, ...]
    what: str
    #: Who writes it: "worker" counts it, "scrape" reads it when asked, "run" is of a command.
    source: str = "worker"


_REPO = ("repository",)

METRICS: tuple[Row, ...] = (
    # -- counted by the workers
    Row(
        "tidings_requests_total",
        "counter",
        ("route", "repository", "status"),
        "requests that were answered",
    ),
    Row("tidings_sent_bytes_total", "counter", ("route", "repository"), "bytes of bodies sent"),
    Row("tidings_request_seconds", "histogram", ("route",), "seconds from request to end of body"),
    Row(
        "tidings_whole_bytes_total",
        "counter",
        ("route", "repository"),
        "bytes of the whole published files that clients would have taken instead",
    ),
    Row("tidings_cache_answers_total", "counter", ("kind", "result"), "questions to the cache"),
    Row("tidings_cache_making_seconds", "histogram", ("kind",), "seconds that making took"),
    Row("tidings_cache_making", "gauge", (), "things in the making, or waiting for their turn"),
    Row("tidings_errors_total", "counter", ("logger",), "log lines of level error"),
    Row(
        "tidings_upstream_fetches_total",
        "counter",
        ("repository", "result"),
        "fetches from upstreams by the edge",
    ),
    Row("tidings_upstream_received_bytes_total", "counter", _REPO, "bytes received by them"),
    Row("tidings_upstream_whole_bytes_total", "counter", _REPO, "bytes of whole files instead"),
    Row("tidings_upstream_seconds", "histogram", (), "seconds that such a fetch took"),
    Row("tidings_edge_answers_total", "counter", ("repository", "state"), "answers of the edge"),
    Row("tidings_cpu_seconds_total", "counter", (), "processor seconds of all workers"),
    Row("tidings_worker_resident_bytes", "gauge", ("worker",), "memory of a worker"),
    Row("tidings_worker_open_files", "gauge", ("worker",), "open files of a worker"),
    Row("tidings_worker_max_files", "gauge", ("worker",), "open files that it may have"),
    Row("tidings_worker_start_time_seconds", "gauge", ("worker",), "when it started"),
    # -- read at a scrape
    Row("tidings_build_info", "gauge", ("version",), "1", "scrape"),
    Row("tidings_cache_bytes", "gauge", (), "bytes in the cache folder", "scrape"),
    Row("tidings_cache_limit_bytes", "gauge", (), "bytes that it may hold", "scrape"),
    Row("tidings_cache_queue_limit", "gauge", (), "most in the making per worker", "scrape"),
    Row("tidings_snapshot_time_seconds", "gauge", _REPO, "when it was published last", "scrape"),
    Row("tidings_metadata_time_seconds", "gauge", _REPO, "the metadata's own time", "scrape"),
    Row("tidings_snapshot_serial", "gauge", _REPO, "serial of the newest snapshot", "scrape"),
    Row("tidings_snapshots", "gauge", _REPO, "retained snapshots", "scrape"),
    Row("tidings_published_bytes", "gauge", _REPO, "published files of the newest", "scrape"),
    Row("tidings_head_bytes", "gauge", _REPO, "bytes of the head", "scrape"),
    Row("tidings_store_bytes", "gauge", _REPO, "bytes of all packs and the head", "scrape"),
    Row("tidings_packs", "gauge", _REPO, "packs in the store", "scrape"),
    Row("tidings_newest_pack_bytes", "gauge", _REPO, "the newest snapshot's pack", "scrape"),
    Row("tidings_repository_up", "gauge", _REPO, "1: its head can be read; 0: not", "scrape"),
    Row("tidings_follow_checked_time_seconds", "gauge", _REPO, "last finished look", "scrape"),
    Row("tidings_follow_good_time_seconds", "gauge", _REPO, "last look that went well", "scrape"),
    Row("tidings_follow_changed_time_seconds", "gauge", _REPO, "last that found news", "scrape"),
    Row("tidings_follow_failures", "gauge", _REPO, "failed looks since a good one", "scrape"),
    Row("tidings_follow_seconds", "gauge", _REPO, "seconds of the last look", "scrape"),
    Row("tidings_follow_received_bytes_total", "counter", _REPO, "bytes received", "scrape"),
    Row("tidings_follow_whole_bytes_total", "counter", _REPO, "bytes of whole files", "scrape"),
    Row("tidings_follow_changes_total", "counter", _REPO, "looks that found news", "scrape"),
    Row("tidings_scrape_seconds", "gauge", (), "seconds that reading all this took", "scrape"),
    # -- written by a command that a timer runs: --metrics FILE
    Row("tidings_run_time_seconds", "gauge", ("command",), "when it ended", "run"),
    Row("tidings_run_good_time_seconds", "gauge", ("command",), "when it last went well", "run"),
    Row("tidings_run_success", "gauge", ("command",), "1: it ended with exit code 0", "run"),
    Row("tidings_run_exit_code", "gauge", ("command",), "its exit code", "run"),
    Row("tidings_run_seconds", "gauge", ("command",), "seconds that it took", "run"),
    Row("tidings_run_repositories", "gauge", ("command", "result"), "repositories", "run"),
    Row("tidings_publish_pack_bytes", "gauge", (), "bytes of new packs", "run"),
    Row("tidings_publish_changed_bytes", "gauge", (), "published bytes that changed", "run"),
    Row("tidings_gc_freed_bytes", "gauge", (), "bytes freed", "run"),
    Row("tidings_gc_waiting_bytes", "gauge", (), "bytes that go after the grace time", "run"),
    Row("tidings_check_findings", "gauge", ("severity",), "findings", "run"),
    Row("tidings_check_damaged_packs", "gauge", (), "packs that are damaged", "run"),
    Row("tidings_follow_run_received_bytes", "gauge", (), "bytes received", "run"),
)

ROWS: Mapping[str, Row] = {row.name: row for row in METRICS}


@contextmanager
def values_folder(workers: int) -> Iterator[Path | None]:
    """Where values of *workers* processes lie; None for one, whose own memory does.

    A fresh folder, removed at the end. What the environment says beforehand is of another program.
    """
    before = os.environ.pop(FOLDER, None)
    # The library's older spelling counts too.
    lower = os.environ.pop(FOLDER.lower(), None)
    folder = Path(tempfile.mkdtemp(prefix="tidings-metrics-")) if workers > 1 else None
    if folder is not None:
        os.environ[FOLDER] = str(folder)
    try:
        yield folder
    finally:
        os.environ.pop(FOLDER, None)
        for name, value in ((FOLDER, before), (FOLDER.lower(), lower)):
            if value is not None:
                os.environ[name] = value
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def forget_dead(folder: Path, alive: Iterable[int]) -> None:
    """Drop the gauges of workers that are gone; what they counted stays."""
    pids = {str(pid) for pid in alive}
    for file in folder.glob("gauge_live*_*.db"):
        if file.stem.rpartition("_")[2] not in pids:
            file.unlink(missing_ok=True)


class Values:
    """The metrics that workers write, and reading them over all workers."""

    def __init__(self) -> None:
        import prometheus_client as prometheus

        prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._several = os.environ.get(FOLDER) is not None
        self._registry = prometheus.CollectorRegistry()
        self._by_name: dict[str, Any] = {
            row.name: self._make(row) for row in METRICS if row.source == "worker"
        }

    def _make(self, row: Row) -> Any:  # one of three classes with three interfaces
        import prometheus_client as prometheus

        where = self._registry
        if row.kind == "counter":
            return prometheus.Counter(row.name, row.what, row.labels, registry=where)
        if row.kind == "gauge":
            return prometheus.Gauge(
                row.name, row.what, row.labels, registry=where, multiprocess_mode="livesum"
            )
        bounds = SECONDS if row.name == "tidings_request_seconds" else MAKING
        return _summed()(row.name, row.what, row.labels, registry=where, buckets=bounds)

    def add(self, name: str, count: float, *labels: str) -> None:
        """Add to a counter."""
        metric = self._by_name[name]
        (metric.labels(*labels) if labels else metric).inc(count)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        metric = self._by_name[name]
        (metric.labels(*labels) if labels else metric).set(value)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """One observation of a histogram."""
        metric = self._by_name[name]
        (metric.labels(*labels) if labels else metric).observe(value)

    def observe_all(self, name: str, counts: list[int], total: float, *labels: str) -> None:
        """Many observations: how many fell into each bucket, and their sum."""
        self._by_name[name].labels(*labels).add(counts, total)

    def read(self) -> list[Metric]:
        """All of them, over all workers. Reads files where there are several."""
        if not self._several:
            return list(self._registry.collect())
        from prometheus_client import CollectorRegistry
        from prometheus_client.multiprocess import MultiProcessCollector

        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return list(registry.collect())


def _summed() -> Any:
    """A histogram that takes many observations at once, which the library's does not."""
    from prometheus_client import Histogram

    class Summed(Histogram):
        def add(self, counts: list[int], total: float) -> None:
            self._sum.inc(total)
            for bucket, count in zip(self._buckets, counts, strict=True):
                if count:
                    bucket.inc(count)

    return Summed


def family(name: str, rows: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    """A metric of ``METRICS`` with values that were read just now: labels' values, value."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    row = ROWS[name]
    kind: Callable[..., Any] = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
    made = kind(row.name, row.what, labels=row.labels)
    for labels, value in rows:
        made.add_metric(labels, value)
    found: Metric = made
    return found


def text(families: Iterable[Metric]) -> tuple[bytes, str]:
    """The exposition format of *families*, and its media type."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
    from prometheus_client.registry import Collector

    found = sorted(families, key=lambda metric: metric.name)

    class Read(Collector):
        def collect(self) -> Iterable[Metric]:
            return found

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Read())
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4
