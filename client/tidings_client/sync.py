"""One sync: ``sync(options, remote)`` brings DEST to what the mirror publishes.

This module holds what a run without a change needs, and no more, for that run is the common one:
the head has not changed, DEST is as the last run left it. All else is in ``update``, loaded then.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tidings_chunkstore.errors import InputError, NetworkError
from tidings_chunkstore.limits import LIMITS

from . import state as states
from .local import Destination
from .trust import TrustSettings

if TYPE_CHECKING:
    from .remote import HeadAnswer, Remote

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


def sync(options: SyncOptions, remote: Remote, progress: Progress | None = None) -> SyncResult:
    """Bring ``options.dest`` to what the mirrors publish, verified to the last byte.

    Whatever happens, DEST holds the old state or the new one, and what was downloaded and proven
    is used by the next run.

    Raises:
        InputError: ``needs-adopt``, ``symlink``, ``not-a-folder``, ``unknown-type``, ``no-seed``.
        NetworkError: no mirror has a complete publish. VerificationError: none has a right one.
        RollbackError: what is offered is older than, or less signed than, what is in place.
        LockedError: another run is at work on DEST. LocalError: disk or permissions.
    """
    started = time.monotonic()
    progress = progress or Silent()
    with Destination(options.dest) as dest:
        state = states.load(dest.work_read(states.STATE, states.LIMIT))
        _may_use(dest, state, options)
        ask = Ask.of(dest, state, options, remote)
        if ask.unchanged(dest, state, options):
            states.tidy(dest)  # a run may have been killed after its last word
            return _unchanged(state, remote, started)
        from .update import Update

        return Update(options, remote, progress, dest, state, ask, started).run()


def plan(options: SyncOptions, remote: Remote, progress: Progress | None = None) -> PlanResult:
    """What ``sync`` would do. Only the head is fetched (repomd.xml where there is none).

    Raises as ``sync``; nothing is written.
    """
    from .update import Update

    with Destination(options.dest, create=False) as dest:
        state = states.load(dest.work_read(states.STATE, states.LIMIT))
        ask = Ask.of(dest, state, options, remote)
        return Update(
            options, remote, progress or Silent(), dest, state, ask, time.monotonic()
        ).plan()


@dataclass(frozen=True, slots=True)
class Ask:
    """What the mirror said about its head. *data* None: there is none, *reason* says why."""

    data: bytes | None
    etag: str | None
    same: bool  #: these are the bytes that the last run followed
    reason: str | None = None

    @classmethod
    def of(
        cls, dest: Destination, state: states.State, options: SyncOptions, remote: Remote
    ) -> Ask:
        """Ask for the head, conditionally. Raises NetworkError when no mirror answers at all."""
        if options.route == "full":
            return cls(None, None, False, None)
        known = dest.work_read(states.HEAD, LIMITS.head)
        if known is not None and hashlib.sha256(known).digest() != state.head_sha256:
            known = None
        try:
            answer: HeadAnswer = remote.head(state.etag if known else None, known)
        except NetworkError as error:
            if error.code in ("connect", "timeout", "denied", "closed"):
                raise
            return cls(None, None, False, error.code)
        if answer.data is None:
            if known is None:  # a 304 that nobody asked for
                return cls(None, None, False, "no-head")
            return cls(known, answer.etag, True)
        return cls(answer.data, answer.etag, False)

    def unchanged(self, dest: Destination, state: states.State, options: SyncOptions) -> bool:
        """Whether DEST is what the last finished run made of this very head and question."""
        return (
            self.same
            and bool(state.complete)
            and state.wanted == question_key(options)
            and all(
                path in state.seen and dest.stamp(path) == state.seen[path].stamp
                for path in state.complete
            )
        )


def question_key(options: SyncOptions) -> str:
    """A word for what was asked: two runs with the same word want the same files and proofs."""
    key = b""
    if options.trust.gpgkey is not None:
        try:
            key = options.trust.gpgkey.read_bytes()
        except OSError as error:
            raise InputError(
                f"{options.trust.gpgkey}: cannot read the key: {error.strerror}", code="bad-key"
            ) from error
    parts = (
        ",".join(options.types) if options.types is not None else "*",
        "zck" if options.zchunk else "",
        (options.trust.repomd_sha256 or "").lower(),
        key.hex(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _may_use(dest: Destination, state: states.State, options: SyncOptions) -> None:
    """Refuse a folder that holds something else."""
    if options.route not in ROUTES:
        raise InputError(f"unknown route {options.route!r}", code="unknown-route")
    if options.adopt or state.owned or not dest.names():
        return
    from tidings_chunkstore.layout import LAYOUTS

    if not any(dest.stamp(path) for layout in LAYOUTS.values() for path in layout.mains()):
        raise InputError(
            f"{dest.path} holds files and no repository's metadata; --adopt uses it all the same",
            code="needs-adopt",
        )


def _unchanged(state: states.State, remote: Remote, started: float) -> SyncResult:
    return SyncResult(
        state.repo.hex(),
        state.serial,
        "current",
        False,
        remote.bytes_received,
        remote.bytes_sent,
        state.bytes_full,
        remote.requests,
        time.monotonic() - started,
        state.trust,
    )
