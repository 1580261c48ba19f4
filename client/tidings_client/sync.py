"""One sync: ``sync(options, remote)`` brings DEST to what the mirror publishes.

This module holds what a run without a change needs, and no more, for that run is the common one:
the head has not changed, DEST is as the last run left it. All else is in ``update``, loaded then.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tidings_chunkstore.errors import InputError

from . import state as states
from .ask import Ask
from .job import ROUTES, PlanResult, Progress, Silent, SyncOptions, SyncResult
from .local import Destination

if TYPE_CHECKING:
    from .remote import Remote

__all__ = ["PlanResult", "Progress", "SyncOptions", "SyncResult", "plan", "sync"]

_FAILOVER = "failover"  # the code of a note


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
    remote.on_failover(lambda text: progress.note(text, code=_FAILOVER))
    with Destination(options.dest) as dest:
        try:
            state = states.load(dest.work_read(states.STATE, states.LIMIT))
            _may_use(dest, state, options)
            ask = Ask.of(dest, state, options, remote)
            if ask.unchanged(dest, state, options):
                states.tidy(dest)  # a run may have been killed after its last word
                return _unchanged(state, remote, started)
            from .update import Update

            return Update(options, remote, progress, dest, state, ask, started).run()
        except BaseException:
            dest.undo()
            raise


def plan(options: SyncOptions, remote: Remote, progress: Progress | None = None) -> PlanResult:
    """What ``sync`` would do. Only the head is fetched (repomd.xml where there is none).

    Raises as ``sync``; nothing is written.
    """
    from .update import Update

    progress = progress or Silent()
    remote.on_failover(lambda text: progress.note(text, code=_FAILOVER))
    with Destination(options.dest, create=False) as dest:
        state = states.load(dest.work_read(states.STATE, states.LIMIT))
        ask = Ask.of(dest, state, options, remote)
        return Update(options, remote, progress, dest, state, ask, time.monotonic()).plan()


def _may_use(dest: Destination, state: states.State, options: SyncOptions) -> None:
    """Refuse a folder that holds something else."""
    if options.route not in ROUTES:
        raise InputError(f"unknown route {options.route!r}", code="unknown-route")
    for seed in options.seeds:
        if not seed.is_dir():
            raise InputError(f"seed {seed}: not a folder", code="no-seed")
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
