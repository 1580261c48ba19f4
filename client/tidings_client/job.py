"""What one may ask of a sync, and what it says it did: plain values, shared by all its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from .trust import TrustSettings

ROUTES = ("auto", "delta", "reconcile", "chunks", "full")


class Progress(Protocol):
    """Who wants to know; ``progress.Reporter`` is one."""

    def progress(self, what: str, done: int, total: int | None = None) -> None:
        """*done* of *total* bytes."""

    def note(self, text: str, **facts: object) -> None:
        """Something worth knowing that is no failure."""


class Silent:
    """Nobody wants to know."""

    def progress(self, what: str, done: int, total: int | None = None) -> None:
        """See Progress."""

    def note(self, text: str, **facts: object) -> None:
        """See Progress."""


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """What is asked for."""

    dest: Path
    types: tuple[str, ...] | None = None  #: rpm-md types and sets; None: all
    seeds: tuple[Path, ...] = ()
    route: str = "auto"  #: one of ROUTES; taken wherever it leads, the rest is downloaded whole
    adopt: bool = False  #: use a folder that holds other files
    zchunk: bool = False  #: prefer ``_zck`` records, as a librepo with zchunk does
    trust: TrustSettings = field(default_factory=TrustSettings)
    pauses: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)  #: seconds before each try with repomd.xml


@dataclass(frozen=True, slots=True)
class SyncedFile:
    """A file of DEST and how it came; *bytes* are those of objects, headers not counted."""

    path: str
    type: str
    size: int
    route: str
    bytes: int

    def to_json(self) -> dict[str, object]:
        """For the summary."""
        return {
            "path": self.path,
            "type": self.type,
            "size": self.size,
            "route": self.route,
            "bytes": self.bytes,
        }


@dataclass(frozen=True, slots=True)
class SyncResult:
    """What a sync did. Bytes are those on the wire, headers included."""

    repo: str  #: the repository's identity in hexadecimal; empty without a head
    serial: int | None
    route: str  #: the route that brought the most bytes; ``current`` where none was needed
    changed: bool
    bytes_received: int
    bytes_sent: int
    bytes_full: int  #: of the same files as published, which is what librepo would fetch
    requests: int
    seconds: float
    trust: str
    fallback_reason: str | None = None
    files: Sequence[SyncedFile] = ()
    timestamp: int = 0  #: of the metadata, seconds since 1970

    def to_json(self) -> dict[str, object]:
        """The facts of the summary event; ``type`` and ``v`` are the reporter's."""
        return {
            "repo": self.repo,
            "serial": self.serial,
            "route": self.route,
            "changed": self.changed,
            "bytes_received": self.bytes_received,
            "bytes_sent": self.bytes_sent,
            "bytes_full": self.bytes_full,
            "requests": self.requests,
            "seconds": round(self.seconds, 3),
            "trust": self.trust,
            "fallback_reason": self.fallback_reason,
            "timestamp": self.timestamp,
            "files": [file.to_json() for file in self.files],
        }


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file in a plan; *alternatives* are bytes and requests by route, where there is one."""

    path: str
    type: str
    size: int | None
    route: str
    bytes: int
    requests: int
    exact: bool
    alternatives: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class PlanResult:
    """What a sync would do. Bytes are those of objects, headers not counted."""

    repo: str
    serial: int | None
    changed: bool
    bytes: int
    requests: int
    exact: bool
    fallback_reason: str | None
    files: Sequence[PlannedFile]

    def to_json(self) -> dict[str, object]:
        """The facts of the plan event."""
        return {
            "repo": self.repo,
            "serial": self.serial,
            "changed": self.changed,
            "bytes": self.bytes,
            "requests": self.requests,
            "exact": self.exact,
            "fallback_reason": self.fallback_reason,
            "files": [
                {
                    "path": f.path,
                    "type": f.type,
                    "size": f.size,
                    "route": f.route,
                    "bytes": f.bytes,
                    "requests": f.requests,
                    "exact": f.exact,
                    "alternatives": {
                        route: {"bytes": size, "requests": requests}
                        for route, (size, requests) in f.alternatives.items()
                    },
                }
                for f in self.files
            ],
        }
