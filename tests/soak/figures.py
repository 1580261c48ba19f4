"""What a soak is judged by: counts, times, damage and its mending, weights; JSON and Markdown."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from soak.machine import Weight

MIB = 1 << 20
_QUANTILES = (0.5, 0.9, 0.99, 1.0)
# What memory and descriptors may grow by from the second quarter to the last, and be called flat:
# an allocator's fragments, and requests that happen to be open when a sample is taken.
_MORE_RSS = (0.10, 8 * MIB)
_MORE_DESCRIPTORS = (0.0, 24)


@dataclass(slots=True)
class Flip:
    """A byte that was flipped, and what became of it. Times are seconds since the soak's start."""

    at: float
    name: str
    offset: int
    source: str  #: where repair may take it from: ``mirror`` or ``published``
    found: float | None = None  #: when check named it
    codes: tuple[str, ...] = ()  #: check's words
    mended: float | None = None  #: when the file was right again, or gone
    how: str = ""  #: ``repair``, or what made it go away before: ``publish``, ``gc``

    def to_json(self) -> dict[str, object]:
        """For the report."""
        return {
            "at": round(self.at, 1),
            "file": self.name,
            "offset": self.offset,
            "source": self.source,
            "found_after": None if self.found is None else round(self.found - self.at, 1),
            "codes": list(self.codes),
            "mended_after": None if self.mended is None else round(self.mended - self.at, 1),
            "how": self.how,
        }


@dataclass(slots=True)
class Tally:
    """Everything that happened, counted. Thread-safe."""

    codes: dict[str, Counter[str]] = field(default_factory=dict)  #: by kind of command
    times: dict[str, list[float]] = field(default_factory=dict)  #: seconds, by kind
    kills: Counter[str] = field(default_factory=Counter)
    routes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)  #: of clients, by the error's word
    flips: list[Flip] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  #: what must not be; empty in a good soak
    lags: list[float] = field(default_factory=list)  #: versions behind after a sync
    outages: list[float] = field(default_factory=list)  #: seconds of a client without success
    received: int = 0  #: bytes
    full: int = 0  #: bytes of the same files as published
    weights: dict[str, list[Weight]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ended(self, kind: str, code: str, seconds: float) -> None:
        """A command has ended."""
        with self._lock:
            self.codes.setdefault(kind, Counter())[code] += 1
            if code != "killed":
                self.times.setdefault(kind, []).append(seconds)

    def error(self, text: str) -> None:
        """Something that must not be."""
        with self._lock:
            self.errors.append(text)

    def synced(self, kind: str, seconds: float, route: str, reason: str | None) -> None:
        """A client has ended well."""
        with self._lock:
            self.times.setdefault(kind, []).append(seconds)
            self.routes[route] += 1
            if reason:
                self.reasons[reason] += 1

    def failure(self, code: str) -> None:
        """A client has ended with an error of this word."""
        with self._lock:
            self.failures[code] += 1

    def synced_again(self, kind: str, seconds: float) -> None:
        """A server answers again."""
        with self._lock:
            self.times.setdefault(f"{kind} back", []).append(seconds)

    def traffic(self, received: int, full: int) -> None:
        """Bytes of a sync, and of the same files as published."""
        with self._lock:
            self.received += received
            self.full += full

    def failed(self) -> int:
        """Runs that ended with something else than 0, kills aside."""
        return sum(
            count
            for codes in self.codes.values()
            for code, count in codes.items()
            if code not in ("0", "killed")
        )


def quantiles(values: Iterable[float]) -> dict[str, float]:
    """Median, 90 %, 99 % and the largest, to three digits after the point."""
    ordered = sorted(values)
    if not ordered:
        return {}
    names = ("p50", "p90", "p99", "max")
    last = len(ordered) - 1
    return {
        name: round(ordered[min(last, int(share * len(ordered)))], 3)
        for name, share in zip(names, _QUANTILES, strict=True)
    }


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Growth a minute, by least squares over (seconds, value)."""
    if len(points) < 2:
        return 0.0
    middle_x, middle_y = fmean(x for x, _ in points), fmean(y for _, y in points)
    spread = sum((x - middle_x) ** 2 for x, _ in points)
    if not spread:
        return 0.0
    return 60 * sum((x - middle_x) * (y - middle_y) for x, y in points) / spread


def flat(values: Sequence[float], share: float, more: float) -> bool:
    """Whether the last quarter's mean is at most *share* and *more* above the second's."""
    quarter = len(values) // 4
    if not quarter:
        return True
    second, last = fmean(values[quarter : 2 * quarter]), fmean(values[-quarter:])
    return last <= second * (1 + share) + more


def weight_facts(weights: Sequence[Weight]) -> dict[str, object]:
    """How a server's memory and descriptors went. Sizes in MiB; growth a minute after warm-up."""
    quarter = max(1, len(weights) // 4)
    warm = weights[quarter:] or weights
    rss = [weight.rss / MIB for weight in weights]
    descriptors = [float(weight.descriptors) for weight in weights]
    share, more = _MORE_RSS
    return {
        "samples": len(weights),
        "rss_first_quarter": round(fmean(rss[:quarter]), 1),
        "rss_last_quarter": round(fmean(rss[-quarter:]), 1),
        "rss_max": round(max(rss), 1),
        "rss_slope": round(slope([(w.at, w.rss / MIB) for w in warm]), 3),
        "rss_flat": flat(rss, share, more / MIB),
        "fds_first_quarter": round(fmean(descriptors[:quarter]), 1),
        "fds_last_quarter": round(fmean(descriptors[-quarter:]), 1),
        "fds_max": max(int(value) for value in descriptors),
        "fds_slope": round(slope([(w.at, float(w.descriptors)) for w in warm]), 3),
        "fds_flat": flat(descriptors, *_MORE_DESCRIPTORS),
    }


def facts(tally: Tally, settings: dict[str, object], seconds: float) -> dict[str, object]:
    """The report as JSON."""
    mended = [f for f in tally.flips if f.mended is not None]
    found = [f for f in tally.flips if f.found is not None]
    return {
        "settings": settings,
        "seconds": round(seconds, 1),
        "codes": {kind: dict(sorted(codes.items())) for kind, codes in tally.codes.items()},
        "kills": dict(sorted(tally.kills.items())),
        "routes": dict(tally.routes.most_common()),
        "fallbacks": dict(tally.reasons.most_common()),
        "failures": dict(tally.failures.most_common()),
        "seconds_by_kind": {kind: quantiles(times) for kind, times in tally.times.items()},
        "versions_behind": quantiles(tally.lags),
        "outages": quantiles(tally.outages),
        "bytes": {"received": tally.received, "full": tally.full},
        "flips": {
            "flipped": len(tally.flips),
            "found": len(found),
            "overtaken": sum(1 for f in mended if f.how != "repair"),
            "mended": len(mended),
            "found_after": quantiles(f.found - f.at for f in found if f.found is not None),
            "mended_after": quantiles(f.mended - f.at for f in mended if f.mended is not None),
            "each": [flip.to_json() for flip in tally.flips],
        },
        "weights": {name: weight_facts(found) for name, found in tally.weights.items() if found},
        "errors": tally.errors,
    }


def _line(values: dict[str, float], unit: str = " s") -> str:
    return ", ".join(f"{name} {value:g}{unit}" for name, value in values.items()) or "-"


def _counts(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in values.items()) or "none"


def markdown(report: dict[str, object]) -> str:
    """The report as tables for docs/reliability.md."""
    get: dict[str, Any] = report
    settings = get["settings"]
    runs = {kind: sum(codes.values()) for kind, codes in get["codes"].items()}
    lines = [
        f"{get['seconds'] / 60:.1f} minutes, {settings['clients']} clients, seed "
        f"{settings['seed']}, {settings['cores']} cores. "
        + ("Nothing wrong." if not get["errors"] else f"{len(get['errors'])} ERRORS."),
        "",
        "| command | runs | ended with | killed | seconds |",
        "|---|---|---|---|---|",
    ]
    for kind, codes in sorted(get["codes"].items()):
        ends = ", ".join(f"{code}: {count}" for code, count in codes.items() if code != "killed")
        times = _line(get["seconds_by_kind"].get(kind, {}), "")
        lines.append(f"| {kind} | {runs[kind]} | {ends} | {get['kills'].get(kind, 0)} | {times} |")
    for kind, count in get["kills"].items():
        if kind not in get["codes"]:
            back = get["seconds_by_kind"].get(f"{kind} back")
            how = f"back after {_line(back, '')}" if back else "back by its supervisor"
            lines.append(f"| {kind} | | | {count} | {how} |")
    flips, sums = get["flips"], get["bytes"]
    saved = f" ({sums['received'] / sums['full']:.1%})" if sums["full"] else ""
    lines += [
        "",
        "| what | figure |",
        "|---|---|",
        f"| routes of syncs | {_counts(get['routes'])} |",
        f"| fallbacks | {_counts(get['fallbacks'])} |",
        f"| failures of syncs | {_counts(get['failures'])} |",
        f"| bytes received, of those published | {sums['received']:,} of {sums['full']:,}{saved} |",
        f"| versions behind after a sync | {_line(get['versions_behind'], '')} |",
        f"| a client without success | {_line(get['outages'])} |",
        f"| bytes flipped | {flips['flipped']}: found {flips['found']}, mended {flips['mended']}, "
        f"of these {flips['overtaken']} overtaken by publish or gc |",
        f"| found after | {_line(flips['found_after'])} |",
        f"| mended after | {_line(flips['mended_after'])} |",
        "",
        "| server | RSS first quarter | last quarter | max | a minute | descriptors first | last "
        "| max | flat |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, weight in get["weights"].items():
        whole = "yes" if weight["rss_flat"] and weight["fds_flat"] else "no"
        lines.append(
            f"| {name} | {weight['rss_first_quarter']} MiB | {weight['rss_last_quarter']} MiB "
            f"| {weight['rss_max']} MiB | {weight['rss_slope']:+.2f} MiB "
            f"| {weight['fds_first_quarter']} | {weight['fds_last_quarter']} "
            f"| {weight['fds_max']} | {whole} |"
        )
    if get["errors"]:
        lines += ["", *(f"- {error}" for error in get["errors"])]
    return "\n".join(lines) + "\n"
