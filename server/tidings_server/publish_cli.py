"""``tidings-mirror publish``: arguments to jobs, outcomes to lines and events."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tidings_chunkstore.errors import InputError, UnsettledError
from tidings_client.exits import Exit, exit_of
from tidings_client.progress import Reporter, seconds_text, size_text

from . import publish
from .publish import Job, Outcome
from .settings import Settings

_SHOWN = 5  # opaque files named in a report for people


@dataclass(slots=True)
class _Totals:
    repositories: int = 0
    published: int = 0
    unchanged: int = 0
    failed: int = 0
    new_chunks: int = 0
    pack_bytes: int = 0
    changed_bytes: int = 0


def command(arguments: argparse.Namespace, settings: Settings, reporter: Reporter) -> Exit:
    """Run it. Raises InputError for arguments that do not fit together."""
    started = time.monotonic()
    jobs, many = _jobs(arguments, settings)
    totals = _Totals()
    first_error: Exception | None = None
    outcomes = publish.run(
        jobs,
        retry=settings.publish.retry,
        plan_only=arguments.plan,
        progress=lambda job, text: reporter.progress(f"{job.root}: {text}", 0),
        waiting=lambda job, error, left: _waiting(reporter, error, left),
        locked=lambda job, seconds: reporter.note(
            f"another process is at work on {job.store}, waiting {seconds:.0f} s at most"
        ),
    )
    last: dict[str, object] = {}
    for outcome in outcomes:
        totals.repositories += 1
        if outcome.error is not None:
            totals.failed += 1
            first_error = first_error or publish.advised(outcome.error, outcome.job)
            if many:
                _failed(reporter, outcome)
            continue
        last = _facts(outcome)
        _count(totals, outcome)
        reporter.data({"type": "plan" if outcome.plan else "publish", **last})
        report = outcome.report
        quiet = report is not None and (reporter.quiet or (many and not report.changed))
        for line in () if quiet else _lines(outcome):
            reporter.line(line)
    if first_error is not None and not many:
        reporter.error(first_error, repo=str(next(iter(arguments.dirs), "")))
        return exit_of(first_error) or Exit.INPUT
    if many and totals.repositories == 0:
        raise InputError(f"{arguments.recursive}: no repository there or below", code="no-metadata")
    _summary(reporter, arguments, totals, last, many, time.monotonic() - started)
    if first_error is None:
        return Exit.OK
    if totals.repositories == 1 and arguments.recursive is None:
        return exit_of(first_error) or Exit.INPUT  # the only [[repo]]: as `follow --once` does
    return Exit.SOME_FAILED


def _jobs(arguments: argparse.Namespace, settings: Settings) -> tuple[Iterable[Job], bool]:
    """The jobs, and whether there may be several of them."""
    rebuild: bool = arguments.rebuild
    folders: list[Path] = arguments.dirs
    if arguments.recursive is not None:
        if folders or arguments.name:
            raise InputError("--recursive ROOT takes neither DIR nor --as", code="usage")
        if not arguments.recursive.is_dir():
            raise InputError(f"{arguments.recursive}: no such folder", code="no-metadata")
        return publish.jobs_below(arguments.recursive, settings.publish, rebuild=rebuild), True
    if folders:
        jobs = publish.jobs_for(folders, settings.publish, name=arguments.name, rebuild=rebuild)
        return jobs, len(jobs) > 1
    if settings.repos and not arguments.name:
        return publish.jobs_of(settings.repos, settings.publish, rebuild=rebuild), True
    raise InputError(
        "nothing to publish: name DIR, --recursive ROOT, or [[repo]] in the settings", code="usage"
    )


def _waiting(reporter: Reporter, error: UnsettledError, left: float) -> None:
    reporter.note(f"waiting for it to settle, {left:.0f} s left: {error}")


def _count(totals: _Totals, outcome: Outcome) -> None:
    if outcome.report is not None:
        totals.published += outcome.report.changed
        totals.unchanged += not outcome.report.changed
        totals.new_chunks += outcome.report.tally.new_chunks
        totals.pack_bytes += outcome.report.pack_bytes
        totals.changed_bytes += outcome.report.changed_bytes
    elif outcome.plan is not None:
        would = bool(outcome.plan.changes or outcome.plan.gone)
        totals.published += would
        totals.unchanged += not would
        totals.changed_bytes += outcome.plan.changed_bytes


def _facts(outcome: Outcome) -> dict[str, object]:
    """An outcome for programs. Sizes in bytes."""
    facts: dict[str, object] = {"repo": str(outcome.job.root), "store": str(outcome.job.store)}
    report, plan = outcome.report, outcome.plan
    if report is not None:
        facts |= {
            "changed": report.changed,
            "serial": report.serial,
            "snapshots": report.snapshots,
            "seconds": round(report.seconds, 3),
        }
        if report.changed:
            facts |= {
                "pack": report.pack,
                "pack_bytes": report.pack_bytes,
                "changed_bytes": report.changed_bytes,
                "published_bytes": report.published_bytes,
                "share": round(report.share, 4),
                "chunks": report.tally.chunks,
                "new_chunks": report.tally.new_chunks,
                "frame_bytes": report.tally.frames,
                "index_bytes": report.tally.indexes,
                "edge_bytes": report.tally.edges,
                "engines": dict(report.engines),
                "missing_engines": publish.missing_engines(report.engines),
                "opaque": [{"path": f.path, "size": f.size} for f in report.opaque],
                "skipped": [{"record": what, "reason": why} for what, why in report.skipped],
            }
        if report.removed:
            facts["removed"] = list(report.removed)
    if plan is not None:
        facts |= {
            "changed": bool(plan.changes or plan.gone),
            "serial": plan.serial,
            "changed_bytes": plan.changed_bytes,
            "published_bytes": plan.published_bytes,
            "files": [{"path": c.path, "size": c.size, "new": c.new} for c in plan.changes],
            "gone": list(plan.gone),
        }
    return facts


def _lines(outcome: Outcome) -> list[str]:
    """An outcome for people."""
    name, report, plan = outcome.job.root, outcome.report, outcome.plan
    if plan is not None:
        if not plan.changes and not plan.gone:
            return [f"{name}: unchanged, snapshot {plan.serial}"]
        lines = [
            f"{name}: snapshot {plan.serial} would take in {len(plan.changes)} files, "
            f"{size_text(plan.changed_bytes)} of {size_text(plan.published_bytes)}"
        ]
        marks = [("+" if c.new else "~", c.path, size_text(c.size)) for c in plan.changes]
        lines += [f"  {mark} {path}  {size}" for mark, path, size in marks]
        return lines + [f"  - {path}" for path in plan.gone]
    if report is None:
        return []
    lines = [f"{name}: unchanged, snapshot {report.serial}"]
    if report.changed:
        lines = [
            f"{name}: snapshot {report.serial}, {report.tally.new_chunks:,} new chunks, pack "
            f"{size_text(report.pack_bytes)} ({report.share:.1%} of "
            f"{size_text(report.changed_bytes)} changed), {seconds_text(report.seconds)}"
        ]
    for engine in publish.missing_engines(report.engines):
        count = report.engines[engine]
        lines.append(f"  {count} recipe(s) need {engine}, which released clients may lack")
    for file in report.opaque[:_SHOWN]:
        lines.append(f"  no recipe gives back {file.path} ({size_text(file.size)}): sent whole")
    if len(report.opaque) > _SHOWN:
        lines.append(f"  ... and {len(report.opaque) - _SHOWN} more without a recipe")
    for what, why in report.skipped[:_SHOWN]:
        lines.append(f"  not published: {what}: {why}")
    if len(report.skipped) > _SHOWN:
        lines.append(f"  ... and {len(report.skipped) - _SHOWN} more records")
    if report.removed:
        lines.append(f"  removed what an interrupted publish left: {', '.join(report.removed)}")
    return lines


def _failed(reporter: Reporter, outcome: Outcome) -> None:
    assert outcome.error is not None
    error = publish.advised(outcome.error, outcome.job)
    if reporter.as_json:
        code = exit_of(error) or Exit.INPUT
        reporter.data(
            {
                "type": "failed",
                "repo": str(outcome.job.root),
                "error": {
                    "code": getattr(error, "code", "error"),
                    "message": str(error),
                    "exit": code.value,
                },
            }
        )
    else:
        reporter.error(error, repo=str(outcome.job.root))


def _summary(
    reporter: Reporter,
    arguments: argparse.Namespace,
    totals: _Totals,
    last: dict[str, object],
    many: bool,
    seconds: float,
) -> None:
    facts: dict[str, object] = {
        "command": "publish",
        "plan": bool(arguments.plan),
        "repositories": totals.repositories,
        "published": totals.published,
        "unchanged": totals.unchanged,
        "failed": totals.failed,
    }
    share = totals.pack_bytes / totals.changed_bytes if totals.changed_bytes else 0.0
    if many:
        facts |= {
            "new_chunks": totals.new_chunks,
            "pack_bytes": totals.pack_bytes,
            "changed_bytes": totals.changed_bytes,
            "share": round(share, 4),
        }
    else:
        facts |= last
    facts["seconds"] = round(seconds, 3)
    if not many:
        reporter.data({"type": "summary", **facts})  # the repository's own lines say it all
        return
    text = (
        f"{totals.repositories} repositor{'y' if totals.repositories == 1 else 'ies'}: "
        f"{totals.published} "
        f"{'would be ' if arguments.plan else ''}published, {totals.unchanged} unchanged, "
        f"{totals.failed} failed; "
    )
    if totals.pack_bytes:
        text += (
            f"{totals.new_chunks:,} new chunks, packs {size_text(totals.pack_bytes)} "
            f"({share:.1%} of {size_text(totals.changed_bytes)} changed), "
        )
    reporter.summary(facts, text + seconds_text(seconds))
