"""``tidings-mirror gc``, ``check`` and ``repair``: arguments to the library, reports to lines.

``cli`` calls ``add_commands``; what the commands need is imported when one runs.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidings_chunkstore.errors import InputError, LocalError, NetworkError, TidingsError
from tidings_chunkstore.limits import LIMITS
from tidings_client.exits import Exit
from tidings_client.progress import Reporter, seconds_text, size_text

from .settings import ENVIRONMENT, Settings

if TYPE_CHECKING:
    from tidings_chunkstore import gc, repair
    from tidings_chunkstore.backends.local import LocalBackend
    from tidings_chunkstore.check import CheckReport

    from .publish import Job

Run = Callable[[argparse.Namespace, Settings, Reporter], Exit]
AddCommand = Callable[[Any, str, str, Run], argparse.ArgumentParser]
Work = Callable[["Job", Reporter], Exit]

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_DAY = 86400
_TIMEOUT = 30.0  # seconds for each answer of another mirror
_PIECE = 1 << 20


def seconds(text: str) -> int:
    """``24h``, ``90m``, ``7d``, ``0``: seconds. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,9})([smhd]?)", text)
    if match is None:
        raise ValueError(f"a time is wanted, as 24h, 90m or 0: {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def size(text: str) -> int:
    """``500M``, ``10G``, ``0``: bytes. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,12})([KMG]?)", text)
    if match is None:
        raise ValueError(f"a size is wanted, as 500M or 10G: {text!r}")
    return int(match[1]) * _SIZES[match[2]]


def _whole(text: str) -> int:
    value = int(text)
    if not 1 <= value <= LIMITS.snapshots:
        raise ValueError(f"a number from 1 to {LIMITS.snapshots} is wanted: {text!r}")
    return value


def _flag(text: str) -> bool:
    if text.lower() not in ("0", "1", "false", "true", "no", "yes"):
        raise ValueError(f"yes or no is wanted: {text!r}")
    return text.lower() in ("1", "true", "yes")


def _words(text: str) -> list[str]:
    return text.split()


#: Options by command: name, how it is read (flags: ``_flag``), metavar, what it is. Each has the
#: environment variable ``<prefix>_<COMMAND>_<NAME>``.
_OPTIONS: Mapping[str, tuple[tuple[str, Callable[[str], Any], str, str], ...]] = {
    "gc": (
        ("keep", _whole, "N", "retain so many snapshots; else what the head has"),
        ("keep-days", _whole, "DAYS", "and none older than so many days"),
        ("grace", seconds, "TIME", "keep unneeded packs for so long, as 24h, 7d or 0 (24h)"),
        (
            "max-rewrite",
            size,
            "BYTES",
            "rewrite mostly unneeded packs up to so much; 0: never (64M)",
        ),
        ("plan", _flag, "", "say what would be done, do nothing"),
    ),
    "check": (("quick", _flag, "", "the structure alone: no chunk, content, recipe or delta"),),
    "repair": (
        ("from", _words, "URL", "another Tidings mirror of the repository, or its folder"),
        ("no-publish", _flag, "", "do not use the published files"),
    ),
}


def add_commands(commands: Any, add: AddCommand) -> None:
    """Add the three commands to *commands* by way of the command line's own *add*."""
    for name, what, run in (
        ("gc", "drop old snapshots, delete packs that nothing needs", _gc),
        ("check", "check stores from the head to each chunk", _check),
        ("repair", "repair stores, and say what is lost", _repair),
    ):
        parser = add(commands, name, what, run)
        parser.add_argument("dirs", metavar="DIR", nargs="*", type=Path, help="a repository's root")
        for option, variable, kind, metavar, text in (
            ("--recursive", "RECURSIVE", Path, "ROOT", "all repositories in ROOT and below"),
            ("--store", "STORE", Path, "FOLDER", "the store tree"),
            ("--as", "AS", str, "PATH", "the repository's path in the store tree"),
        ):
            parser.add_argument(
                option,
                dest="name" if option == "--as" else None,
                metavar=metavar,
                type=kind,
                help=f"{text} [{ENVIRONMENT}{variable}]",
            )
        for option, read, metavar, text in _OPTIONS[name]:
            help_ = f"{text} [{_variable(name, option)}]"
            if read is _flag:
                parser.add_argument(f"--{option}", action="store_true", default=None, help=help_)
            elif read is _words:
                parser.add_argument(
                    f"--{option}", dest="sources", action="append", metavar=metavar, help=help_
                )
            else:
                parser.add_argument(
                    f"--{option}", type=_typed(read), default=None, metavar=metavar, help=help_
                )
        parser.set_defaults(health=name)


def _variable(command: str, option: str) -> str:
    return f"{ENVIRONMENT}{command}_{option}".upper().replace("-", "_")


def _typed(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def typed(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return typed


def _chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options' values: the command line's, else the environment's. Raises InputError."""
    found: dict[str, Any] = {}
    for option, read, _, _ in _OPTIONS[arguments.health]:
        name = "sources" if read is _words else option.replace("-", "_")
        value = getattr(arguments, name)
        said = os.environ.get(_variable(arguments.health, option))
        if value is None and said:
            try:
                value = read(said)
            except ValueError as error:
                variable = _variable(arguments.health, option)
                raise InputError(f"{variable}: {error}") from error
        found[name] = value
    return found


def _each(
    arguments: argparse.Namespace, settings: Settings, reporter: Reporter, work: Work
) -> Exit:
    """Do *work* for each store that is named, or configured."""
    from . import publish

    chosen = settings.publish
    if arguments.store is not None:
        chosen = replace(chosen, store=arguments.store)
    jobs: Iterable[Job]
    if arguments.recursive is not None:
        if arguments.dirs or arguments.name:
            raise InputError("--recursive ROOT takes neither DIR nor --as")
        jobs, many = publish.jobs_below(arguments.recursive, chosen), True
    elif arguments.dirs:
        jobs = publish.jobs_for(arguments.dirs, chosen, name=arguments.name)
        many = len(arguments.dirs) > 1
    elif settings.repos and not arguments.name:
        jobs, many = publish.jobs_of(settings.repos, chosen), True
    else:
        raise InputError(f"nothing to {arguments.health}: name DIR, or [[repo]] in the settings")
    worst, count, failed = Exit.OK, 0, 0
    for job in jobs:
        count += 1
        try:
            result = work(job, reporter)
        except TidingsError as error:
            told = publish.advised(error, job) if arguments.health == "gc" else error
            if not many:
                raise told from None
            reporter.note(f"{job.root}: {told}", repo=str(job.root), code=error.code)
            failed += 1
            continue
        worst = max(worst, result)
    if many:
        result = worst or (Exit.SOME_FAILED if failed else Exit.OK)
        facts = {"command": arguments.health, "repositories": count, "failed": failed}
        reporter.summary({**facts, "exit": int(result)}, f"{count} repositories, {failed} failed")
        return result
    return worst


def _backend(job: Job) -> LocalBackend:
    from .publish import backend_of

    return backend_of(job)


# -- gc --------------------------------------------------------------------------------------------


def _gc(arguments: argparse.Namespace, settings: Settings, reporter: Reporter) -> Exit:
    from tidings_chunkstore import gc
    from tidings_chunkstore.store import Store

    said = _chosen(arguments)

    def work(job: Job, reporter: Reporter) -> Exit:
        default = gc.Options()
        options = gc.Options(
            said["keep"],
            None if said["keep_days"] is None else said["keep_days"] * _DAY,
            default.grace if said["grace"] is None else said["grace"],
            default.max_rewrite if said["max_rewrite"] is None else said["max_rewrite"],
        )
        if said["plan"]:
            plan = gc.preview(Store(_backend(job)), options)
            facts = {"type": "plan", "repo": str(job.root), **plan_facts(plan)}
        else:
            report = gc.run(
                _backend(job), options, lambda text: reporter.progress(f"{job.root}: {text}", 0)
            )
            plan = report.plan
            facts = {
                "type": "gc",
                "repo": str(job.root),
                **plan_facts(plan),
                "pack": report.pack,
                "pack_bytes": report.pack_bytes,
                "seconds": round(report.seconds, 3),
            }
        reporter.data(facts)
        for line in plan_lines(str(job.root), plan, bool(said["plan"])):
            reporter.line(line)
        return Exit.OK

    return _each(arguments, settings, reporter, work)


_PARTS = ("leftovers", "deleted", "condemned", "waiting", "rewritten", "spared")


def plan_facts(plan: gc.Plan) -> dict[str, object]:
    """A plan for programs. Sizes in bytes, times in seconds."""
    facts: dict[str, object] = {
        "serial": plan.serial,
        "snapshots": plan.snapshots,
        "dropped": list(plan.dropped),
        "freed": plan.freed,
        "freed_later": plan.freed_later,
        "rewrite_bytes": plan.rewrite_bytes,
        "kept_bytes": plan.kept_bytes,
    }
    for part in _PARTS:
        facts[part] = [
            {"pack": str(f.name), "size": f.size, "live": f.live, "seconds": f.seconds}
            for f in getattr(plan, part)
        ]
    return facts


def plan_lines(name: str, plan: gc.Plan, only: bool) -> list[str]:
    """A plan for people; *only*: nothing is done."""
    if plan.nothing and not plan.waiting:
        return [f"{name}: nothing to do, {size_text(plan.kept_bytes)} in use"]
    would = "would be " if only else ""
    lines = [
        f"{name}: {size_text(plan.freed)} {would}freed, {size_text(plan.freed_later)} later, "
        f"{size_text(plan.kept_bytes)} in use"
    ]
    if plan.dropped:
        lines.append(f"  snapshots that leave the head: {', '.join(map(str, plan.dropped))}")
    words = {
        "leftovers": "left by an interrupted publish",
        "deleted": "deleted",
        "condemned": "not needed any more",
        "waiting": "not needed any more",
        "rewritten": "rewritten",
        "spared": "needed again",
    }
    for part in _PARTS:
        for fact in getattr(plan, part):
            line = f"  {fact.name}  {size_text(fact.size):>10}  {words[part]}"
            if part == "rewritten":
                line += f", {size_text(fact.live)} of it needed"
            if fact.seconds and part != "spared":
                line += f", goes in {seconds_text(fact.seconds)}"
            lines.append(line)
    return lines


# -- check -----------------------------------------------------------------------------------------


def _check(arguments: argparse.Namespace, settings: Settings, reporter: Reporter) -> Exit:
    from tidings_chunkstore.check import check

    quick = bool(_chosen(arguments)["quick"])

    def work(job: Job, reporter: Reporter) -> Exit:
        report = check(
            _backend(job),
            quick=quick,
            progress=lambda text: reporter.progress(f"{job.root}: {text}", 0),
        )
        reporter.data({"type": "check", "repo": str(job.root), **check_facts(report)})
        for line in check_lines(str(job.root), report):
            reporter.line(line)
        if report.damaged:
            reporter.line("  `tidings-mirror repair` with the same DIR mends what can be mended")
        return Exit.STORE if report.damaged else Exit.OK

    return _each(arguments, settings, reporter, work)


def check_facts(report: CheckReport) -> dict[str, object]:
    """A report for programs."""
    checked = report.checked
    return {
        "serial": report.serial,
        "quick": report.quick,
        "damaged": report.damaged,
        "findings": [finding.to_json() for finding in report.findings],
        "damaged_packs": [str(name) for name in report.damaged_packs],
        "packs": checked.packs,
        "pack_bytes": checked.pack_bytes,
        "snapshots": checked.snapshots,
        "contents": checked.contents,
        "chunks": checked.chunks,
        "recipes": checked.recipes,
        "edges": checked.edges,
    }


def check_lines(name: str, report: CheckReport) -> list[str]:
    """A report for people: a verdict, then a table of findings."""
    checked = report.checked
    verdict = "damaged" if report.damaged else "good"
    looked = f"{checked.packs} packs ({size_text(checked.pack_bytes)}), "
    looked += f"{checked.snapshots} snapshots, {checked.contents} contents"
    if not report.quick:
        looked += f", {checked.chunks:,} chunks, {checked.recipes} recipes, {checked.edges} deltas"
    lines = [f"{name}: {verdict}; {looked}"]
    rows = [(str(f.severity), f.code, f.where, f.text) for f in report.findings]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
        lines.append("  " + "  ".join([*cells, row[3]]))
    return lines


# -- repair ----------------------------------------------------------------------------------------


class MirrorPacks:
    """The packs of the same repository on another mirror, fetched by name."""

    def __init__(self, url: str) -> None:
        import httpx

        self._base = url.rstrip("/") + "/tidings/"
        headers = {"Accept-Encoding": "identity"}
        self._client = httpx.Client(timeout=_TIMEOUT, headers=headers, follow_redirects=True)

    def fetch(self, name: str) -> bytes | None:
        """See repair.PackSource. Raises NetworkError; at most ``LIMITS.pack`` bytes are read."""
        import httpx

        url = self._base + name
        data = bytearray()
        try:
            with self._client.stream("GET", url) as answer:
                if answer.status_code in (404, 410):
                    return None
                if answer.status_code != 200:
                    raise NetworkError(f"{url}: status {answer.status_code}", url=url)
                for piece in answer.iter_raw(_PIECE):
                    data += piece
                    if len(data) > LIMITS.pack:
                        raise NetworkError(f"{url}: larger than any pack", url=url)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NetworkError(f"{url}: {error}", url=url) from error
        return bytes(data)


class FolderPacks:
    """The packs of a copy of the repository on this machine."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "tidings" if (root / "tidings").is_dir() else root

    def fetch(self, name: str) -> bytes | None:
        """See repair.PackSource. Raises LocalError."""
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LocalError(f"{self._folder / name}: {error.strerror}") from error


class _Patient:
    """A source whose failures are noted: the next one may have the pack."""

    def __init__(self, source: repair.PackSource, reporter: Reporter) -> None:
        self._source, self._reporter = source, reporter

    def fetch(self, name: str) -> bytes | None:
        """See repair.PackSource."""
        try:
            return self._source.fetch(name)
        except (NetworkError, LocalError) as error:
            self._reporter.note(str(error), code=error.code)
            return None


def _repair(arguments: argparse.Namespace, settings: Settings, reporter: Reporter) -> Exit:
    from tidings_chunkstore.repair import repair

    said = _chosen(arguments)
    named: list[str] = said["sources"] or []
    if named and len(arguments.dirs) != 1:
        raise InputError("--from names mirrors of one repository: name its DIR")
    sources = [
        _Patient(
            MirrorPacks(text) if "://" in text else FolderPacks(Path(text)),
            reporter,
        )
        for text in named
    ]

    def work(job: Job, reporter: Reporter) -> Exit:
        report = repair(
            _backend(job),
            sources,
            None if said["no_publish"] else job.root,
            job.options,
            lambda text: reporter.progress(f"{job.root}: {text}", 0),
        )
        reporter.data({"type": "repair", "repo": str(job.root), **repair_facts(report)})
        for line in repair_lines(str(job.root), report):
            reporter.line(line)
        return Exit.OK if report.whole else Exit.STORE

    return _each(arguments, settings, reporter, work)


def repair_facts(report: repair.RepairReport) -> dict[str, object]:
    """A report for programs."""
    return {
        "whole": report.whole,
        "restored": report.restored,
        "refused": report.refused,
        "head_rebuilt": report.head_rebuilt,
        "pack": report.pack,
        "remade": report.remade,
        "condemned": report.condemned,
        "lost": {str(serial): tracks for serial, tracks in report.lost.items()},
        "published": report.published.serial if report.published else None,
        "unpublished": report.unpublished,
        "before": check_facts(report.before),
        "after": check_facts(report.after) if report.after else None,
    }


def repair_lines(name: str, report: repair.RepairReport) -> list[str]:
    """A report for people."""
    if report.after is None:
        return [f"{name}: good, nothing to do"]
    lines = [f"{name}: {'whole again' if report.whole else 'still damaged'}"]
    lines += [f"  {pack}  restored from another mirror" for pack in report.restored]
    lines += [f"  {pack}  offered with wrong bytes, refused" for pack in report.refused]
    if report.head_rebuilt:
        lines.append("  head rebuilt from the packs")
    if report.pack:
        lines.append(
            f"  {report.pack}  takes over what was intact, {report.remade} chunks made anew"
        )
    lines += [f"  {pack}  damaged, not used any more" for pack in report.condemned]
    for serial, tracks in sorted(report.lost.items()):
        lines.append(f"  lost: snapshot {serial}")
        for track, why in tracks.items():
            lines.append(f"    {'all of it' if track == '*' else track}: {why}")
    if report.unpublished:
        lines.append(f"  the published files were of no use: {report.unpublished}")
    if report.published:
        lines.append(f"  published anew as snapshot {report.published.serial}")
    if not report.whole:
        lines += [f"  {f.severity}  {f.where}  {f.text}" for f in report.after.findings]
        lines.append("  `tidings-mirror repair --from URL` takes what is lost from another mirror")
    return lines
