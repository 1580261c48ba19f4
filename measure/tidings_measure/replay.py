"""A replay: the publishes of a history one after another, and clients that update now and then.

Each tool goes through the history alone: it publishes a version, what that does to a mirror is
taken down, the clients that are due update over loopback, then comes the next version.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tidings_chunkstore.errors import InputError, TidingsError

from . import churn
from .history import History, Version
from .journal import Journal
from .results import Publish, Results, Tool, Update
from .rivals import TOOLS, Bench, Contender

LAGS = (1, 7, 30)
_RETAINED = 30  # publishes that the mirror keeps: as many go before the first measured update


@dataclass(frozen=True, slots=True)
class Case:
    """One update to measure: versions by index; *base* None: from nothing."""

    lag: int
    base: int | None
    target: int


@dataclass(frozen=True, slots=True)
class Event:
    """How far a replay is: *done* of *total* pieces of work, and what is next or was found."""

    done: int
    total: int
    text: str
    note: bool = False  #: the text is worth keeping


Listener = Callable[[Event], None]


def _silent(_: Event) -> None:
    pass


def cases(versions: int, lags: Sequence[int], steps: int | None = None) -> list[Case]:
    """The updates of a history with so many *versions*: clients that are current at its end.

    Args:
        lags: publishes between two updates of a client; each kind of client updates as often as
            the history allows.
        steps: only the last so many updates of each kind of client.
    """
    last = versions - 1
    found = [Case(0, None, last)]
    for lag in sorted(set(lags)):
        targets = range(last, lag - 1, -lag)[:steps]
        found += [Case(lag, target - lag, target) for target in targets]
    return sorted(found, key=lambda case: (case.target, case.lag == 0, case.lag))


def replay(
    history: Path,
    out: Path,
    *,
    tools: Collection[str] | None = None,
    lags: Sequence[int] = LAGS,
    steps: int | None = None,
    types: Collection[str] | None = None,
    listener: Listener = _silent,
    keep: bool = False,
) -> Results:
    """Measure every tool on the publishes in *history*; results so far are kept in *out*.

    Args:
        tools: names from ``TOOLS``; None: all. One whose programs are not here is left out, and
            the results say so.
        lags: clients update every so many publishes; one from nothing is always there.
        steps: measure the last so many updates of each kind of client; None: all.
        types: rpm-md or apt types; None: all but other wrappings of the same contents.
        keep: leave the trees of mirrors and clients in *out*.
    Raises:
        InputError: no history, an unknown tool, *out* of another history.
        TidingsError: a tool failed or made wrong bytes.
    """
    for name in tools or ():
        if name not in TOOLS:
            raise InputError(f"unknown tool {name[:40]!r}; there are {', '.join(TOOLS)}")
    if any(lag < 1 for lag in lags) or (steps is not None and steps < 1):
        raise InputError("lags and steps are 1 or more")
    out = out.absolute()  # programs run in folders of their own
    work = out / "work"
    source = History(history, work / "contents", types)
    versions = source.versions
    settings = {"versions": [version.name for version in versions], "types": list(source.types)}
    journal = Journal(out, settings)
    wanted = cases(len(versions), lags, steps)
    notes = [
        f"no client updates every {lag} publishes: the history has {len(versions)}"
        for lag in sorted(set(lags))
        if not any(case.lag == lag for case in wanted)
    ]
    taking_part: list[tuple[Contender, str | None]] = []
    for name, make in TOOLS.items():
        if tools is None or name in tools:
            contender = make()
            taking_part.append((contender, contender.missing()))
    here = [contender for contender, missing in taking_part if missing is None]
    for contender, missing in taking_part:
        if missing is not None:
            listener(Event(0, 0, f"{contender.title} is left out: {missing}", note=True))
    total = len(here) * len(wanted)
    for number, contender in enumerate(here):
        run = _Run(contender, source, wanted, journal, work / contender.name, listener)
        run.done, run.total = number * len(wanted), total
        run.all(steps)
        if not keep:
            shutil.rmtree(work / contender.name, ignore_errors=True)
    if not keep:
        source.drop()
        shutil.rmtree(work, ignore_errors=True)
    names = {contender.name for contender, _ in taking_part}
    keys = {(case.lag, versions[case.target].name) for case in wanted}
    measured = {version for _, version in keys}
    for name in names:
        title = next(c.title for c, _ in taking_part if c.name == name)
        notes += [f"{title}: {text}" for text in journal.notes.get(name, ())]
    # One that could do nothing with these files costs a mirror nothing, which would look good.
    did = names & {tool for tool, _, _ in journal.updates}
    order = {version.name: version.index for version in versions}
    return Results(
        Path(os.path.abspath(history)).name,  # as it is called, symlink or not
        tuple(version.name for version in versions),
        source.types,
        tuple(sorted(set(lags))),
        steps or 0,
        tuple(
            Tool(c.name, c.title, c.about, c.version() if missing is None else "", missing)
            for c, missing in taking_part
        ),
        tuple(
            sorted(
                (u for k, u in journal.updates.items() if k[0] in names and k[1:] in keys),
                key=lambda u: (list(TOOLS).index(u.tool), u.lag, order[u.version]),
            )
        ),
        tuple(
            sorted(
                (p for p in journal.publishes.values() if p.tool in did and p.version in measured),
                key=lambda p: (list(TOOLS).index(p.tool), order[p.version]),
            )
        ),
        tuple(dict.fromkeys(notes)),
        {
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
        },
    )


class _Run:
    """One tool through the history."""

    def __init__(
        self,
        contender: Contender,
        history: History,
        wanted: Sequence[Case],
        journal: Journal,
        work: Path,
        listener: Listener,
    ) -> None:
        self.contender = contender
        self.history = history
        self.wanted = wanted
        self.journal = journal
        self.work = work
        self.listener = listener
        self.done = self.total = 0

    def all(self, steps: int | None) -> None:
        """Publish and update, where the journal does not have it yet."""
        name = self.contender.name
        versions = self.history.versions
        targets = {case.target for case in self.wanted}
        left = [case for case in self.wanted if not self._has(case)]
        published = {version for tool, version in self.journal.publishes if tool == name}
        if not left and all(versions[target].name in published for target in targets):
            self._say(len(self.wanted), f"{self.contender.title}: done before")
            return
        self.work.mkdir(parents=True, exist_ok=True)
        first = self._first()
        at = self._published()
        with self.contender.running(Bench(self.history, self.work)):
            before = versions[at] if at is not None and at >= first else None
            for version in versions[first if before is None else before.index :]:
                if before is not version:
                    self._publish(version, before, measured=version.index in targets)
                before = version
                for case in self.wanted:
                    if case.target == version.index:
                        self._update(case)
                for lag in {case.lag for case in self.wanted if case.base == version.index}:
                    self.contender.prepare(f"every-{lag}", version)

    def _first(self) -> int:
        """Where to begin: early enough for the oldest base, and for a mirror with its history."""
        bases = [case.base for case in self.wanted if case.base is not None]
        oldest = min(bases, default=len(self.history.versions) - 1)
        return (
            max(0, min(oldest, len(self.history.versions) - 1 - _RETAINED))
            if (self.contender.name.startswith("tidings"))
            else oldest
        )

    def _has(self, case: Case) -> bool:
        key = (self.contender.name, case.lag, self.history.versions[case.target].name)
        return key in self.journal.updates or key in self.journal.declined

    def _say(self, done: int, text: str, *, note: bool = False) -> None:
        self.listener(Event(self.done + done, self.total, text, note))

    @property
    def _finished(self) -> int:
        return sum(self._has(case) for case in self.wanted)

    def _publish(self, version: Version, before: Version | None, *, measured: bool) -> None:
        name = self.contender.name
        self._say(self._finished, f"{self.contender.title}: publishes {version.name}")
        kept = self.work / "tree.json"
        started = time.monotonic()
        self.contender.publish(version, before, measured=measured)
        seconds = time.monotonic() - started
        after = churn.read_state(self.contender.tree)
        moved = churn.second_tier(self.contender.tree, self.work / "second-tier", self.work)
        known = (name, version.name) in self.journal.publishes
        if measured and before is not None and not known:
            seen = churn.difference(churn.load_state(kept), after)
            self.journal.publish(
                Publish(name, version.name, **asdict(seen), second_tier=moved, seconds=seconds)
            )
        churn.save_state(kept, after)
        (self.work / "at").write_text(version.name)

    def _published(self) -> int | None:
        """The version that the mirror was at when the last run ended."""
        mark = self.work / "at"
        if not mark.exists():
            shutil.rmtree(self.work)
            self.work.mkdir()
            return None
        name = mark.read_text()
        return next((v.index for v in self.history.versions if v.name == name), None)

    def _update(self, case: Case) -> None:
        if self._has(case):
            return
        versions = self.history.versions
        target = versions[case.target]
        base = versions[case.base] if case.base is not None else None
        start = base.name if base else "nothing"
        title = self.contender.title
        self._say(self._finished, f"{title}: {start} to {target.name}")
        client = f"every-{case.lag}" if case.lag else "new"
        try:
            done = self.contender.update(client, base, target)
        except TidingsError as error:
            raise type(error)(f"{title}, {start} to {target.name}: {error}") from error
        if done is None:
            place = getattr(self.contender, "place", None)
            for text in getattr(place, "notes", ()):
                self.journal.note(self.contender.name, text)
            self.journal.decline(self.contender.name, case.lag, target.name)
            return
        self.journal.update(
            Update(
                self.contender.name,
                case.lag,
                base.name if base else None,
                target.name,
                done.files,
                done.cost,
                done.note,
            )
        )
