"""``tidings-mirror follow``: arguments to repositories, outcomes to lines and events."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from tidings_chunkstore.errors import InputError, TidingsError
from tidings_client.exits import Exit, code_of, exit_of
from tidings_client.progress import Reporter, cost_text, seconds_text, size_text

from .follow import Follower, Outcome, Target, targets_of
from .settings import Settings


@dataclass(slots=True)
class _Totals:
    looks: int = 0
    changed: int = 0
    failed: int = 0
    bytes_received: int = 0
    bytes_full: int = 0
    first_error: Exception | None = field(default=None)


class _Named:
    """A reporter's progress and notes, with the repository in front."""

    def __init__(self, path: str, reporter: Reporter) -> None:
        self._path = path
        self._reporter = reporter

    def progress(self, what: str, done: int, total: int | None = None) -> None:
        """See Progress."""
        self._reporter.progress(f"{self._path}: {what}", done, total)

    def note(self, text: str, **facts: object) -> None:
        """See Progress."""
        self._reporter.note(f"{self._path}: {text}", repo=self._path, **facts)


def command(arguments: argparse.Namespace, settings: Settings, reporter: Reporter) -> Exit:
    """Run it. Raises InputError where nothing is to be followed."""
    started = time.monotonic()
    targets = _chosen(targets_of(settings), arguments.names)
    totals = _Totals()
    follower = Follower(
        targets,
        settings.follow.state,
        settings.follow.parallel,
        lambda outcome: _tell(reporter, outcome, totals, alone=len(targets) == 1),
        lambda target: _Named(target.path, reporter),
    )
    if arguments.once:
        follower.once()
    else:
        reporter.note(f"following {_count(len(targets))}")
        with _ended_by_signals(follower):
            follower.stay()
    looks = f"{totals.looks} look{'' if totals.looks == 1 else 's'}"
    text = (
        f"{_count(len(targets))}: {looks}, {totals.changed} changed, "
        f"{totals.failed} failed; {size_text(totals.bytes_received)}"
    )
    if totals.bytes_full:
        text += f" instead of {size_text(totals.bytes_full)}"
    seconds = time.monotonic() - started
    facts = {
        "command": "follow",
        "once": bool(arguments.once),
        "repositories": len(targets),
        "looks": totals.looks,
        "changed": totals.changed,
        "failed": totals.failed,
        "bytes_received": totals.bytes_received,
        "bytes_full": totals.bytes_full,
        "seconds": round(seconds, 3),
    }
    reporter.summary(facts, f"{text}, {seconds_text(seconds)}")
    if not arguments.once or totals.first_error is None:
        return Exit.OK
    if len(targets) == 1:
        return exit_of(totals.first_error) or Exit.LOCAL
    return Exit.SOME_FAILED


def _chosen(targets: list[Target], names: list[str]) -> list[Target]:
    known = {target.path: target for target in targets}
    if not known:
        raise InputError(
            "nothing to follow: no [[repo]] of the settings has a root and an upstream "
            "(urls, metalink or mirrorlist)",
            code="usage",
        )
    chosen: dict[str, Target] = {}
    for name in names:
        path = name.strip("/")
        if path not in known:
            near = difflib.get_close_matches(path, known, 1)
            hint = f"; is {near[0]} meant?" if near else ""
            raise InputError(f"{name}: no [[repo]] with a root and an upstream{hint}", code="usage")
        chosen[path] = known[path]
    return list(chosen.values()) or targets


def _count(number: int) -> str:
    return f"{number} repositor{'y' if number == 1 else 'ies'}"


@contextlib.contextmanager
def _ended_by_signals(follower: Follower) -> Iterator[None]:
    """SIGTERM and SIGINT end the follower in the block, and the command well."""
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in signals}
    for number in signals:
        signal.signal(number, lambda *_: follower.stop())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(reporter: Reporter, outcome: Outcome, totals: _Totals, *, alone: bool) -> None:
    """One look: a line where it brought something or failed, and an event."""
    path, fetched, report = outcome.target.path, outcome.fetched, outcome.report
    totals.looks += 1
    totals.changed += outcome.changed
    if fetched is not None:
        totals.bytes_received += fetched.bytes_received
        totals.bytes_full += fetched.bytes_full if fetched.changed else 0
    if outcome.error is not None:
        totals.failed += 1
        totals.first_error = totals.first_error or outcome.error
        _failed(reporter, path, outcome.error)
        return
    assert fetched is not None
    facts: dict[str, object] = {"repo": path, **asdict(fetched), "changed": outcome.changed}
    facts["seconds"] = round(outcome.seconds, 3)
    if report is not None:
        facts |= {
            "published": report.changed,
            "serial": report.serial,
            "pack_bytes": report.pack_bytes if report.changed else 0,
        }
    reporter.data({"type": "look", **facts})
    cost = cost_text(fetched.bytes_received, fetched.requests)
    if outcome.changed:
        text = f"{path}: {cost}"
        if fetched.changed:
            text += f" instead of {size_text(fetched.bytes_full)} ({fetched.route})"
        if report is not None and report.changed:
            text += f"; snapshot {report.serial}, pack {size_text(report.pack_bytes)}"
        text += f"; {seconds_text(outcome.seconds)}; trust: {fetched.trust}"
    elif alone and not reporter.quiet:
        text = f"{path}: unchanged, {cost}, {seconds_text(outcome.seconds)}"
    else:
        return
    if not reporter.quiet:
        reporter.line(text)


def _failed(reporter: Reporter, path: str, error: Exception) -> None:
    if not reporter.as_json:
        reporter.error(TidingsError(f"{path}: {error}"))
        return
    code = exit_of(error)
    reporter.data(
        {
            "type": "failed",
            "repo": path,
            "error": {
                "code": code_of(error),
                "message": str(error),
                "exit": code.value if code is not None else 1,
            },
        }
    )
