"""The results of a replay as values, and as JSON and CSV. Sizes in bytes, times in seconds."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tidings_chunkstore.errors import FormatError

from .process import Usage
from .wire import Traffic

VERSION = 1  #: ``v`` in results.json


@dataclass(frozen=True, slots=True)
class Cost:
    """What one update cost its client."""

    received: int = 0  #: bytes on the wire, headers included
    sent: int = 0  #: the same, to the server
    requests: int = 0
    connections: int = 0
    round_trips: int = 0  #: one after another: connections opened and requests, side by side as one
    shared: int = 0  #: bytes, both ways, of exchanges that a shared cache would answer
    cpu: float = 0.0
    wall: float = 0.0
    peak: int = 0  #: bytes of memory at most

    @property
    def bytes(self) -> int:
        """Both ways."""
        return self.received + self.sent

    @classmethod
    def of(cls, traffic: Traffic, usage: Usage, round_trips: int | None = None) -> Cost:
        """From what the wire and the process tell. *round_trips* where it is no HTTP."""
        side = max(traffic.parallel, 1)
        requests = len(traffic.exchanges)
        turns = -(-requests // side) + -(-traffic.connections // side)
        return cls(
            traffic.received,
            traffic.sent,
            requests if round_trips is None else traffic.connections,
            traffic.connections,
            turns if round_trips is None else round_trips,
            sum(e.sent + e.received for e in traffic.exchanges if e.shared),
            usage.cpu,
            usage.wall,
            usage.peak,
        )

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.received + other.received,
            self.sent + other.sent,
            self.requests + other.requests,
            self.connections + other.connections,
            self.round_trips + other.round_trips,
            self.shared + other.shared,
            self.cpu + other.cpu,
            self.wall + other.wall,
            max(self.peak, other.peak),
        )


@dataclass(frozen=True, slots=True)
class Update:
    """One client brought from *base* to *version*, and verified."""

    tool: str
    lag: int  #: publishes between the two; 0: from nothing
    base: str | None
    version: str
    files: int  #: metadata files that were new
    cost: Cost
    note: str = ""


@dataclass(frozen=True, slots=True)
class Publish:
    """What a publish did to the files that a mirror carries for a tool."""

    tool: str
    version: str
    written: int = 0  #: files that were not there
    changed: int = 0  #: files with other bytes than before
    deleted: int = 0
    bytes_written: int = 0
    bytes_changed: int = 0
    bytes_deleted: int = 0
    second_tier: int | None = None  #: bytes a second mirror's rsync moved, both ways
    seconds: float = 0.0  #: wall, to make what is published

    @property
    def touched(self) -> int:
        """Files written, changed or deleted."""
        return self.written + self.changed + self.deleted

    @property
    def bytes(self) -> int:
        """Bytes written and changed."""
        return self.bytes_written + self.bytes_changed


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that took part, or why it did not."""

    name: str
    title: str
    about: str
    version: str = ""
    left_out: str | None = None


@dataclass(frozen=True, slots=True)
class Results:
    """A whole replay."""

    history: str
    versions: tuple[str, ...]
    types: tuple[str, ...]
    lags: tuple[int, ...]
    steps: int
    tools: tuple[Tool, ...]
    updates: tuple[Update, ...]
    publishes: tuple[Publish, ...]
    notes: tuple[str, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)  #: the machine and the programs

    def of(self, tool: str, lag: int) -> list[Update]:
        """The updates of a tool at a lag, oldest first."""
        return [u for u in self.updates if u.tool == tool and u.lag == lag]

    def churn(self, tool: str) -> list[Publish]:
        """The publishes of a tool, oldest first."""
        return [p for p in self.publishes if p.tool == tool]

    def mean(self, tool: str, lag: int) -> Cost | None:
        """The mean cost of a tool at a lag; the largest peak. None where it was not measured."""
        costs = [update.cost for update in self.of(tool, lag)]
        if not costs:
            return None
        total = sum(costs, Cost())
        count = len(costs)
        values: dict[str, Any] = {}
        for entry in fields(Cost):
            value = getattr(total, entry.name)
            if entry.name == "peak":
                values[entry.name] = value
            elif isinstance(value, float):
                values[entry.name] = value / count
            else:
                values[entry.name] = round(value / count)
        return Cost(**values)


def to_json(results: Results) -> str:
    """results.json."""
    return json.dumps({"v": VERSION, **asdict(results)}, indent=1, ensure_ascii=False) + "\n"


def from_json(text: str) -> Results:
    """What ``to_json`` wrote. Raises FormatError."""
    try:
        raw = json.loads(text)
        if raw.pop("v") != VERSION:
            raise FormatError("results.json is of another version")
        return Results(
            **{
                **raw,
                "versions": tuple(raw["versions"]),
                "types": tuple(raw["types"]),
                "lags": tuple(raw["lags"]),
                "notes": tuple(raw["notes"]),
                "tools": tuple(Tool(**t) for t in raw["tools"]),
                "updates": tuple(update_of(u) for u in raw["updates"]),
                "publishes": tuple(Publish(**p) for p in raw["publishes"]),
            }
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"not results of a replay: {error}") from error


def update_of(raw: Mapping[str, Any]) -> Update:
    """An Update from its dict."""
    return Update(**{**raw, "cost": Cost(**raw["cost"])})


def to_csv(results: Results) -> str:
    """results.csv: a row for each update and for each publish."""
    out = io.StringIO()
    update = ["tool", "lag", "base", "version", "files"]
    cost = [entry.name for entry in fields(Cost)]
    publish = [entry.name for entry in fields(Publish) if entry.name not in ("tool", "version")]
    names = ["kind", *update, *cost, *publish, "note"]
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rows(results))
    return out.getvalue()


def _rows(results: Results) -> Iterable[dict[str, object]]:
    for update in results.updates:
        row = asdict(update)
        yield {"kind": "update", **row.pop("cost"), **row}
    for publish in results.publishes:
        yield {"kind": "publish", **asdict(publish)}
