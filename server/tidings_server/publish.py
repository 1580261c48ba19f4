"""Publishing one or many repositories: which, where to, what to do when one is not settled.

``publisher`` of the library does the work for one. Here is what an operator's run adds: finding
repositories, ``--store``, ``--retry``, ``--plan``, one outcome for each repository.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tidings_chunkstore import layout as layouts
from tidings_chunkstore import publisher
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.errors import (
    InputError,
    LocalError,
    StoreError,
    TidingsError,
    UnsettledError,
)
from tidings_chunkstore.publisher import Options, Report
from tidings_chunkstore.store import Store

from .discover import discover
from .settings import PublishSettings, RepoSettings, url_path

FOLDER = "tidings"  #: the store's folder beside a repository's metadata

#: Engines that every installation of the client has: the standard library, the pinned zstd
#: distributions (1.5.7 and 1.5.6), and gzip, which no Linux distribution is without. A recipe
#: that needs another serves only some clients; the rest download the file whole.
EVERYWHERE = frozenset({"zlib", "liblzma", "bzip2", "gzip-1", "zstd-1.5.6", "zstd-1.5.7"})

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0  # seconds between two looks at an unsettled tree
_LOCK_PATIENCE = 60.0  # seconds for another publish, gc or repair of the same store to end
_DAY = 86400

Sleep = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Job:
    """One repository to publish: the folder with its metadata, and the folder of its store."""

    root: Path
    store: Path
    options: Options


def advised(error: Exception, job: Job) -> Exception:
    """*error*; where it says that the store is damaged, with the commands that help."""
    if not isinstance(error, StoreError) or "tidings-mirror" in str(error):
        return error
    where = shlex.quote(str(job.root))
    if job.store != job.root / FOLDER:
        where = "with the same DIR, --store and --as"
    return StoreError(
        f"{error}; `tidings-mirror check` shows what is damaged, `tidings-mirror repair` mends it"
        f" ({where})",
        code=error.code,
        **error.details,
    )


@dataclass(frozen=True, slots=True)
class Change:
    """A file that a publish would take in. *size* in bytes."""

    path: str
    size: int
    new: bool  #: its path was not published before


@dataclass(frozen=True, slots=True)
class Plan:
    """What a publish would do."""

    serial: int
    changes: tuple[Change, ...]
    gone: tuple[str, ...]
    published_bytes: int

    @property
    def changed_bytes(self) -> int:
        """Published bytes of the files to take in."""
        return sum(change.size for change in self.changes)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one repository: a report or a plan, or an error."""

    job: Job
    report: Report | None = None
    plan: Plan | None = None
    error: Exception | None = None
    waited: float = field(default=0.0, compare=False)  #: seconds until it was settled


def jobs_for(
    folders: Sequence[Path],
    settings: PublishSettings,
    *,
    name: str | None = None,
    rebuild: bool = False,
) -> list[Job]:
    """A job for each named folder. *name*: its path in the store tree, for one folder only.

    Raises InputError.
    """
    if settings.store is not None and (name is None or len(folders) != 1):
        raise InputError(
            "a store tree needs one folder and --as PATH, or --recursive", code="usage"
        )
    if settings.store is None and name is not None:
        raise InputError(
            "--as PATH names a place in a store tree: --store is missing", code="usage"
        )
    options = _options(settings, rebuild)
    jobs = []
    for folder in folders:
        if settings.store is not None and name is not None:
            try:
                store = settings.store / url_path(name) / FOLDER
            except ValueError as error:
                raise InputError(f"--as {name!r}: {error}") from error
        else:
            store = folder / FOLDER
        jobs.append(Job(folder, store, options))
    return jobs


def jobs_below(top: Path, settings: PublishSettings, *, rebuild: bool = False) -> Iterator[Job]:
    """A job for each repository in *top* and below. Symlinks may lead anywhere inside *top*."""
    options = _options(settings, rebuild, top)
    for folder in discover(top):
        if settings.store is not None:
            store = settings.store / folder.relative_to(top) / FOLDER
        else:
            store = folder / FOLDER
        yield Job(folder, store, options)


def jobs_of(
    repos: Iterable[RepoSettings], settings: PublishSettings, *, rebuild: bool = False
) -> list[Job]:
    """A job for each ``[[repo]]``: what it does not say itself comes from ``[publish]``."""
    jobs = []
    for repo in repos:
        tree = repo.store or settings.store
        mine = PublishSettings(
            keep=repo.keep or settings.keep,
            keep_days=repo.keep_days or settings.keep_days,
            direct=settings.direct if repo.direct is None else repo.direct,
            layout=repo.layout or settings.layout,
            follow=settings.follow,
        )
        store = tree / repo.path / FOLDER if tree else repo.root / FOLDER
        options = _options(mine, rebuild)
        if repo.upstream is not None and repo.upstream.types is not None:
            options = replace(options, types=repo.upstream.types)
        jobs.append(Job(repo.root, store, options))
    return jobs


def _options(settings: PublishSettings, rebuild: bool, *follow: Path) -> Options:
    return Options(
        layout=settings.layout,
        keep=settings.keep,
        keep_seconds=None if settings.keep_days is None else settings.keep_days * _DAY,
        direct=settings.direct,
        rebuild=rebuild,
        follow=(*follow, *settings.follow),
    )


def run(
    jobs: Iterable[Job],
    *,
    retry: float = 0.0,
    plan_only: bool = False,
    progress: Callable[[Job, str], None] = lambda job, text: None,
    waiting: Callable[[Job, UnsettledError, float], None] = lambda job, error, left: None,
    locked: Callable[[Job, float], None] = lambda job, seconds: None,
    sleep: Sleep = time.sleep,
) -> Iterator[Outcome]:
    """Publish one after the other, an outcome for each as it is done. Errors become outcomes.

    A tree that is not settled is tried again, with growing pauses, for *retry* seconds over the
    whole run: while one waits for its rsync, the others' turns have come first. *locked* is told
    when one begins to wait for another process, and for how many seconds it will at most.
    """
    unsettled: list[tuple[Job, UnsettledError]] = []
    started = time.monotonic()
    for job in jobs:
        outcome = _once(job, plan_only, progress, locked)
        if retry > 0 and isinstance(outcome.error, UnsettledError):
            unsettled.append((job, outcome.error))
        else:
            yield outcome
    wait = _FIRST_WAIT
    while unsettled:
        left = started + retry - time.monotonic()
        if left <= 0:
            break
        waiting(unsettled[0][0], unsettled[0][1], left)
        sleep(min(wait, left))
        wait = min(wait * 2, _LONGEST_WAIT)
        still: list[tuple[Job, UnsettledError]] = []
        for job, _ in unsettled:
            outcome = _once(job, plan_only, progress, locked)
            if isinstance(outcome.error, UnsettledError):
                still.append((job, outcome.error))
            else:
                waited = time.monotonic() - started
                yield Outcome(job, outcome.report, outcome.plan, outcome.error, waited)
        unsettled = still
    for job, error in unsettled:
        yield Outcome(job, error=error, waited=time.monotonic() - started)


def backend_of(job: Job, locked: Callable[[float], object] = lambda _: None) -> LocalBackend:
    """The job's store, for a command that changes it: it waits for another one to end."""
    return LocalBackend(job.store, _LOCK_PATIENCE, locked)


def _once(
    job: Job,
    plan_only: bool,
    progress: Callable[[Job, str], None],
    locked: Callable[[Job, float], None],
) -> Outcome:
    try:
        if plan_only:
            return Outcome(job, plan=plan(job))
        report = publisher.publish(
            job.root,
            backend_of(job, lambda seconds: locked(job, seconds)),
            job.options,
            lambda text: progress(job, text),
        )
    except TidingsError as error:
        return Outcome(job, error=error)
    except MemoryError:
        return Outcome(job, error=LocalError(f"{job.root}: not enough memory", code="memory"))
    except OSError as error:
        text = f"{error.filename or job.root}: {error.strerror or error}"
        return Outcome(job, error=LocalError(text))
    return Outcome(job, report=report)


def plan(job: Job) -> Plan:
    """What publishing would do. Reads and proves the tree, writes nothing. Raises as publish."""
    chosen = layouts.by_name(job.options.layout) if job.options.layout else None
    tree = layouts.read_tree(job.root, chosen, follow=job.options.follow, types=job.options.types)
    backend = LocalBackend(job.store)
    store = Store(backend)
    before = store.read_head()
    if not job.options.rebuild:
        publisher.refuse_other_layout(before, tree, backend)
    now = [(main.file.path, main.id, len(main.data)) for main in tree.mains]
    now += [(file.file.path, file.id, file.size) for file in tree.files]
    old = {} if before is None or job.options.rebuild else {f.path: f.sha256 for f in before.files}
    known = set(old.values())
    changes = tuple(
        Change(path, size, path not in old) for path, id_, size in now if id_ not in known
    )
    gone = tuple(path for path in old if path not in {entry[0] for entry in now})
    last = max(
        [before.serial if before else 0, *(name.serial for name in store.pack_names())], default=0
    )
    changed = bool(changes or gone or before is None or job.options.rebuild)
    return Plan(last + 1 if changed else last, changes, gone, sum(entry[2] for entry in now))


def missing_engines(engines: Iterable[str]) -> list[str]:
    """Those that not every client has."""
    return sorted(set(engines) - EVERYWHERE)
