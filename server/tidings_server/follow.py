"""Following upstreams: look, publish what is new, remember, look again later.

``look`` does it once for one repository; ``Follower`` does it for many, once or for ever. When the
next look is due is decided by ``delay`` alone, from values.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import queue
import random
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tidings_chunkstore.backends.local import explain, write_atomically
from tidings_chunkstore.errors import LocalError, LockedError, NetworkError, TidingsError
from tidings_chunkstore.publisher import Report
from tidings_client.exits import code_of
from tidings_client.job import Progress
from tidings_client.remote import RemoteSettings

from . import publish
from .edge_rules import file_name
from .settings import RepoSettings, Settings
from .upstream import Fetched, Source, fetch

VERSION = 1
JITTER = 0.1  #: share of a delay by which it is longer or shorter
_FIRST = 8  # the first retry comes after every / 8
_ENDING = 20.0  # seconds that looks under way get to end
_STATE_MAX = 1 << 20
_MESSAGE_MAX = 1000


@dataclass(frozen=True, slots=True)
class Target:
    """A repository to follow."""

    source: Source
    job: publish.Job
    every: int  #: seconds from one look to the next

    @property
    def path(self) -> str:
        """The repository's path in the settings."""
        return self.source.path


@dataclass(frozen=True, slots=True)
class FollowState:
    """What is known of one upstream; the file is described in docs/upstream.md."""

    path: str
    v: int = VERSION
    checked: int = 0
    good: int = 0
    changed: int = 0
    failures: int = 0
    error: dict[str, str] | None = None
    upstream: str = ""
    trust: str = ""
    timestamp: int = 0
    bytes_received: int = 0
    requests: int = 0
    bytes_full: int = 0
    total_bytes_received: int = 0
    total_bytes_full: int = 0
    total_changes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one look. *error*: why it did not end well."""

    target: Target
    fetched: Fetched | None = None
    report: Report | None = None
    error: Exception | None = None
    seconds: float = 0.0

    @property
    def changed(self) -> bool:
        """Whether something new is in place or published."""
        fetched = self.fetched is not None and self.fetched.changed
        return fetched or (self.report is not None and self.report.changed)


def targets_of(settings: Settings) -> list[Target]:
    """All ``[[repo]]`` tables with a root and an upstream."""
    return [_target(repo, settings) for repo in settings.repos if repo.upstream is not None]


def _target(repo: RepoSettings, settings: Settings) -> Target:
    assert repo.upstream is not None
    (job,) = publish.jobs_of([repo], settings.publish)
    source = Source(repo.path, repo.upstream, repo.layout or settings.publish.layout)
    return Target(source, job, repo.upstream.every or settings.follow.every)


# -- when ------------------------------------------------------------------------------------------


def delay(every: float, failures: int, jitter: float) -> float:
    """Seconds to the next look after *failures* failed ones in a row. Pure.

    An eighth of *every* after the first failure, twice as much after each more, *every* at most;
    *jitter* (-1 to 1) moves it by up to a tenth, so that a thousand followers do not come at once.
    """
    wait = every if failures == 0 else min(every, every / _FIRST * 2.0 ** min(failures - 1, 16))
    return wait * (1 + JITTER * jitter)


def first_due(state: FollowState, every: float, now: float, jitter: float) -> float:
    """When to look first after a start: at once, unless the last look is not long ago. Pure."""
    due = state.checked + delay(every, state.failures, jitter)
    return min(max(due, now), now + every * (1 + JITTER))


# -- one look --------------------------------------------------------------------------------------


def look(
    target: Target,
    folder: Path,
    progress: Progress,
    *,
    settings: RemoteSettings | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Look once: fetch, publish, remember in *folder*. Errors become outcomes.

    What was in place stays where something goes wrong. Two looks at one repository never meet: the
    second is refused (``locked``), and remembers nothing.
    """
    started = time.monotonic()
    memory = folder / "follow" / (file_name(target.path) + ".d")
    fetched: Fetched | None = None
    report: Report | None = None
    error: Exception | None = None
    try:
        with _lock(memory):
            try:
                fetched = fetch(
                    target.source,
                    target.job.root,
                    memory=memory,
                    progress=_Stoppable(progress, stopping),
                    settings=settings,
                    way_out="to accept that once: "
                    f"tidings sync {{option}} URL {shlex.quote(str(target.job.root))}",
                )
            except (TidingsError, OSError, MemoryError) as failure:
                error = failure
            if not stopping():
                # Where the last run was killed before its publish, this one makes up for it.
                outcome = next(publish.run([target.job]))
                report = outcome.report
                error = error or outcome.error
            elif error is None and fetched is not None and fetched.changed:
                error = NetworkError("stopped before the publish", code="closed")
            done = Outcome(target, fetched, report, error, time.monotonic() - started)
            if not stopping():
                save_state(folder, _after(load_state(folder, target.path), done, time.time()))
            return done
    except (TidingsError, OSError) as failure:
        return Outcome(target, fetched, report, failure, time.monotonic() - started)


class _Stoppable:
    """A progress that ends the fetch which tells it something, once *stopping*."""

    def __init__(self, inner: Progress, stopping: Callable[[], bool]) -> None:
        self._inner = inner
        self._stopping = stopping

    def progress(self, what: str, done: int, total: int | None = None) -> None:
        """See Progress. Raises NetworkError (``closed``)."""
        if self._stopping():
            raise NetworkError("stopped; what was in place is in place", code="closed")
        self._inner.progress(what, done, total)

    def note(self, text: str, **facts: object) -> None:
        """See Progress."""
        self._inner.note(text, **facts)


@contextmanager
def _lock(memory: Path) -> Iterator[None]:
    """Holds *memory*, which is made. Raises LockedError, LocalError."""
    try:
        memory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(memory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise explain(error, memory) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError("another follow is at work on it", path=str(memory)) from error
        yield
    finally:
        os.close(descriptor)


# -- state -----------------------------------------------------------------------------------------


def state_file(folder: Path, path: str) -> Path:
    """Where the state of the repository at *path* lies."""
    return folder / "follow" / (file_name(path) + ".json")


def load_state(folder: Path, path: str) -> FollowState:
    """The state of a repository; an empty one where there is none that can be read."""
    try:
        with state_file(folder, path).open("rb") as file:
            value = json.loads(file.read(_STATE_MAX))
        known = {field: value[field] for field in FollowState.__dataclass_fields__}
        state = FollowState(**known)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return FollowState(path)
    numbers = (state.checked, state.failures, state.total_changes, state.total_bytes_received)
    right = state.v == VERSION and all(isinstance(n, int) and n >= 0 for n in numbers)
    return state if right else FollowState(path)


def save_state(folder: Path, state: FollowState) -> None:
    """Write the state, whole or not at all. Raises LocalError."""
    data = json.dumps(asdict(state), indent=1).encode() + b"\n"
    write_atomically(state_file(folder, state.path), [data])


def _after(state: FollowState, done: Outcome, now: float) -> FollowState:
    """The state after a look that ended at *now* (seconds since 1970). Pure."""
    state = replace(state, checked=int(now), seconds=round(done.seconds, 3))
    fetched = done.fetched
    if fetched is not None:
        state = replace(
            state,
            upstream=fetched.base,
            trust=fetched.trust,
            timestamp=fetched.timestamp,
            total_bytes_received=state.total_bytes_received + fetched.bytes_received,
        )
        if done.changed:
            state = replace(state, changed=int(now))
        if fetched.changed:
            state = replace(
                state,
                bytes_received=fetched.bytes_received,
                requests=fetched.requests,
                bytes_full=fetched.bytes_full,
                total_bytes_full=state.total_bytes_full + fetched.bytes_full,
                total_changes=state.total_changes + 1,
            )
    if done.error is None:
        return replace(state, good=int(now), failures=0, error=None)
    told = {"code": code_of(done.error), "message": str(done.error)[:_MESSAGE_MAX]}
    return replace(state, failures=state.failures + 1, error=told)


# -- many ------------------------------------------------------------------------------------------


class Follower:
    """Looks at many repositories, *parallel* at a time. Use it once, from one thread.

    Args:
        folder: of the states.
        ended: called with each outcome, from the thread that called ``once`` or ``stay``.
        progress: makes the progress of a look.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        folder: Path,
        parallel: int,
        ended: Callable[[Outcome], object],
        progress: Callable[[Target], Progress],
        settings: RemoteSettings | None = None,
    ) -> None:
        self._targets = targets
        self._folder = folder
        self._parallel = parallel
        self._ended = ended
        self._progress = progress
        self._settings = settings
        self._stop = threading.Event()
        # SimpleQueue may be put to from a signal handler; None wakes the loop.
        self._results: queue.SimpleQueue[tuple[int, Outcome] | None] = queue.SimpleQueue()
        self._running = 0

    def stop(self) -> None:
        """End ``stay`` soon: nothing new is begun, downloads end. For signal handlers, too."""
        self._stop.set()
        self._results.put(None)

    def once(self) -> None:
        """Look at each one time, now."""
        self._run([(0.0, number) for number in range(len(self._targets))], again=False)

    def stay(self) -> None:
        """Look at each when it is due, until ``stop``."""
        now = time.time()
        due = []
        for number, target in enumerate(self._targets):
            state = load_state(self._folder, target.path)
            wait = first_due(state, target.every, now, _jitter()) - now
            due.append((time.monotonic() + wait, number))
        self._run(due, again=True)

    def _run(self, due: list[tuple[float, int]], *, again: bool) -> None:
        # In monotonic seconds: a clock that is set back must not put looks off.
        heapq.heapify(due)
        while not self._stop.is_set() and (due or self._running):
            now = time.monotonic()
            while due and due[0][0] <= now and self._running < self._parallel:
                self._begin(heapq.heappop(due)[1])
            wait = max(due[0][0] - now, 0.0) if due and self._running < self._parallel else None
            done = self._next(None if wait is None else min(wait, 3600.0))
            if done is not None and again:
                number, outcome = done
                heapq.heappush(due, (self._due(outcome), number))
        deadline = time.monotonic() + _ENDING
        while self._running and time.monotonic() < deadline:
            self._next(max(deadline - time.monotonic(), 0.0))

    def _due(self, outcome: Outcome) -> float:
        target = outcome.target
        failures = load_state(self._folder, target.path).failures
        if outcome.error is not None:  # also where the state could not be written
            failures = max(failures, 1)
        return time.monotonic() + delay(target.every, failures, _jitter())

    def _begin(self, number: int) -> None:
        self._running += 1

        def work() -> None:
            target = self._targets[number]
            try:
                outcome = look(
                    target,
                    self._folder,
                    self._progress(target),
                    settings=self._settings,
                    stopping=self._stop.is_set,
                )
            except Exception as error:  # noqa: BLE001 (a bug must end one look, not them all)
                outcome = Outcome(
                    target, error=LocalError(f"a bug: {type(error).__name__}: {error}", code="bug")
                )
            self._results.put((number, outcome))

        # Daemons: what stalls must not keep the program from ending.
        threading.Thread(target=work, name=f"follow-{number}", daemon=True).start()

    def _next(self, timeout: float | None) -> tuple[int, Outcome] | None:
        """The next outcome, which is told; None when there was none in *timeout* seconds."""
        try:
            done = self._results.get(timeout=timeout)
        except queue.Empty:
            return None
        if done is not None:
            self._running -= 1
            if not (self._stop.is_set() and code_of(done[1].error or OSError()) == "closed"):
                self._ended(done[1])
        return done


def _jitter() -> float:
    return random.uniform(-1, 1)
