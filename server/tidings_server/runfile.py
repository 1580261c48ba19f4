"""What a command did, for node_exporter's textfile collector: ``--metrics FILE``.

Commands that timers run live too short to be scraped. They leave a file instead, which is replaced
as a whole; it is written however the command ends. The time of the last good run is carried over
from the file before, so that "no publish for a day" can be told from one file.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tidings_chunkstore.limits import MIB
from tidings_client.progress import Reporter

COMMANDS = ("publish", "follow", "gc", "check", "repair")  #: those that have the option
_GOOD = "tidings_run_good_time_seconds"
_FILE_MAX = 1 * MIB


class Recorder(Reporter):
    """A reporter that remembers what a command said of each repository."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        super().__init__(as_json=as_json, quiet=quiet)
        self.started = time.time()
        self._results: Counter[str] = Counter()
        self._sums: Counter[str] = Counter()
        self._findings: Counter[str] = Counter()
        self._failed = 0

    def data(self, value: Mapping[str, object]) -> None:
        """See Reporter."""
        kind = value.get("type")
        if kind == "failed":
            self._failed += 1
        elif kind in ("publish", "look"):
            self._results["changed" if value.get("changed") else "unchanged"] += 1
            self._add("tidings_publish_pack_bytes", value.get("pack_bytes"))
            self._add("tidings_publish_changed_bytes", value.get("changed_bytes"))
            self._add("tidings_follow_run_received_bytes", value.get("bytes_received"))
        elif kind == "gc":
            self._results["good"] += 1
            self._add("tidings_gc_freed_bytes", value.get("freed"))
            self._add("tidings_gc_waiting_bytes", value.get("freed_later"))
        elif kind == "check":
            self._results["damaged" if value.get("damaged") else "good"] += 1
            found = value.get("findings")
            for finding in found if isinstance(found, list) else ():
                self._findings[str(finding.get("severity", ""))] += 1
            packs = value.get("damaged_packs")
            self._sums["tidings_check_damaged_packs"] += (
                len(packs) if isinstance(packs, list) else 0
            )
        elif kind == "repair":
            self._results["good"] += 1
        super().data(value)

    def note(self, text: str, **facts: object) -> None:
        """See Reporter. A failure of one of many repositories is told as a note with its code."""
        if "repo" in facts and "code" in facts:
            self._failed += 1
        super().note(text, **facts)

    def error(self, error: BaseException, **facts: object) -> None:
        """See Reporter."""
        self._failed += "repo" in facts
        super().error(error, **facts)

    def values(self, command: str, code: int) -> dict[str, dict[tuple[str, ...], float]]:
        """Metrics, their labels' values and values; *code*: what the command ends with."""
        now = time.time()
        here = (command,)
        found: dict[str, dict[tuple[str, ...], float]] = {
            "tidings_run_time_seconds": {here: now},
            "tidings_run_success": {here: float(code == 0)},
            "tidings_run_exit_code": {here: code},
            "tidings_run_seconds": {here: now - self.started},
        }
        results = {**self._results, "failed": self._failed}
        found["tidings_run_repositories"] = {(command, r): n for r, n in results.items()}
        names = {
            "publish": ("tidings_publish_pack_bytes", "tidings_publish_changed_bytes"),
            "follow": ("tidings_publish_pack_bytes", "tidings_follow_run_received_bytes"),
            "gc": ("tidings_gc_freed_bytes", "tidings_gc_waiting_bytes"),
            "check": ("tidings_check_damaged_packs",),
        }
        for name in names.get(command, ()):
            found[name] = {(): self._sums[name]}
        if command == "check":
            severities = sorted({"error", "warning", "info", *self._findings})
            found["tidings_check_findings"] = {(s,): self._findings[s] for s in severities}
        if code == 0:
            found[_GOOD] = {here: now}
        return found

    def _add(self, name: str, value: object) -> None:
        self._sums[name] += int(number(value) or 0)


def number(value: object) -> float | None:
    """A number that a metric can have; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if 0 <= found < 1e18 else None


def write(file: Path, command: str, recorder: Recorder, code: int) -> None:
    """Replace *file*. Raises OSError."""
    from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

    from .metrics_store import ROWS

    values = recorder.values(command, code)
    if _GOOD not in values:
        before = _good_time(file, command)
        if before is not None:
            values[_GOOD] = {(command,): before}
    registry = CollectorRegistry()
    for name, rows in values.items():
        gauge = Gauge(name, ROWS[name].what, ROWS[name].labels, registry=registry)
        for labels, value in rows.items():
            (gauge.labels(*labels) if labels else gauge).set(value)
    write_to_textfile(os.fspath(file), registry)


def _good_time(file: Path, command: str) -> float | None:
    """When *command* last went well, as the file before says; None where it says nothing."""
    from prometheus_client.parser import text_string_to_metric_families as parse

    try:
        with file.open("rb") as opened:
            text = opened.read(_FILE_MAX).decode()
        for family in parse(text):
            for sample in family.samples:
                if sample.name == _GOOD and sample.labels.get("command") == command:
                    return number(sample.value)
    except (OSError, ValueError, KeyError, IndexError):
        return None  # none yet, or somebody else's: the next good run says it anew
    return None
