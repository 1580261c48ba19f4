"""The command ``tidings``. The only part of the client that reads the environment and prints.

Everything heavy is imported where it is used: a sync that finds nothing new is mostly Python's
own start.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from tidings_chunkstore.errors import InputError, TidingsError, VerificationError

from . import version
from .exits import Exit, exit_of, help_text
from .options import PATHS, Kind, Option, add, resolve, seconds
from .progress import Reporter, cost_text, size_text, summary_text

if TYPE_CHECKING:
    from .job import PlanResult, SyncOptions
    from .remote import RemoteSettings
    from .trust import TrustSettings

ROUTES = ("auto", "delta", "reconcile", "chunks", "full")

_JSON = Option("--json", "print one JSON event a line; the last one is the summary or the error")
_QUIET = Option("--quiet", "print errors only", short="-q")
_NETWORK = (
    Option(
        "--connect-timeout",
        "seconds for a connection to be made (3)",
        Kind.VALUE,
        "SECONDS",
        3.0,
        seconds,
    ),
    Option(
        "--timeout",
        "seconds without a byte from the mirror (30)",
        Kind.VALUE,
        "SECONDS",
        30.0,
        seconds,
    ),
    Option(
        "--total-timeout",
        "seconds for one file in all (300), and 1 more for each 1,000 bytes",
        Kind.VALUE,
        "SECONDS",
        300.0,
        seconds,
    ),
)
_TRUST = (
    Option(
        "--repomd-sha256",
        "accept only a repomd.xml (InRelease, Release) with this SHA-256",
        Kind.VALUE,
        "HEX",
    ),
    Option(
        "--gpgkey",
        "accept only what a key of this file has signed (checked with gpgv)",
        Kind.VALUE,
        "FILE",
        parse=Path,
    ),
)

SYNC: tuple[Option, ...] = (
    Option(
        "--seed",
        "take what this folder holds as a base, too; repeatable",
        Kind.LIST,
        "DIR",
        parse=Path,
        separator=PATHS,
    ),
    Option(
        "--mirror",
        "the same repository on another mirror, asked where the first fails; repeatable",
        Kind.LIST,
        "URL",
    ),
    Option(
        "--types",
        "only these metadata types, comma-separated: primary,group,updateinfo; "
        "@dnf4 and @dnf5 are what these fetch",
        Kind.VALUE,
        "LIST",
    ),
    Option(
        "--zchunk",
        "with --types: of each type take the zchunk record where there is one, "
        "as a dnf with zchunk does",
    ),
    Option(
        "--metalink",
        "URL is a metalink's: it names mirrors and proves repomd.xml",
    ),
    Option("--plan", "show bytes and requests of each route and file; download nothing"),
    Option(
        "--route",
        "auto (the cheapest), delta, reconcile, chunks or full",
        Kind.VALUE,
        default="auto",
        choices=ROUTES,
    ),
    _JSON,
    Option("--adopt", "take over a DEST that is not empty and holds no known metadata"),
    *_TRUST,
    Option("--allow-older", "accept metadata older than what DEST holds"),
    Option("--allow-unsigned", "accept unsigned metadata where DEST holds signed"),
    *_NETWORK,
    _QUIET,
)
VERIFY: tuple[Option, ...] = (_JSON, *_TRUST, _QUIET)
DOCTOR: tuple[Option, ...] = (
    Option("--dnf", "also show what dnf saved on this machine, by repository"),
    _JSON,
    *_NETWORK,
)

#: All commands and their options; a test compares docs/cli.md with it.
COMMANDS: Mapping[str, tuple[Option, ...]] = {"sync": SYNC, "verify": VERIFY, "doctor": DOCTOR}

_EXAMPLES = """\
examples:
  tidings sync https://mirror.example.org/fedora/updates/43/x86_64 /srv/updates
  tidings sync --types @dnf5 --mirror https://b.example.org/u43 https://a.example.org/u43 u43
  tidings sync --plan https://mirror.example.org/u43 u43
  tidings verify /srv/updates
  tidings doctor https://mirror.example.org/u43

"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command ``tidings``."""
    parser = argparse.ArgumentParser(
        prog="tidings",
        description="Fetch package-repository metadata at the size of what changed, "
        "bit for bit as published.",
        epilog=_EXAMPLES + help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command")

    def command(name: str, text: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  {example}\n\n{help_text()}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add(made, COMMANDS[name])
        return made

    sync = command(
        "sync",
        "bring a repository's metadata in DEST up to date",
        "tidings sync https://mirror.example.org/fedora/updates/43/x86_64 /srv/updates",
    )
    sync.add_argument("url", metavar="URL", help="the repository's base URL (holds repodata/)")
    sync.add_argument("dest", metavar="DEST", type=_folder, help="the folder to bring up to date")
    verify = command(
        "verify",
        "check every file in DEST against its repomd.xml or Release",
        "tidings verify DEST",
    )
    verify.add_argument("dest", metavar="DEST", type=Path, help="a folder that holds metadata")
    doctor = command(
        "doctor",
        "show what this machine has and lacks, and try mirrors",
        "tidings doctor https://mirror.example.org/fedora/updates/43/x86_64",
    )
    doctor.add_argument("urls", metavar="URL", nargs="*", help="base URLs of repositories to try")
    return parser


def _folder(text: str) -> Path:
    """A folder's path; an empty one would be the current folder, which nobody means by it."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return Path(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if list(words) == ["stage"]:  # what dnf's plugins run; people have no use for it
        from .stage import main as stage

        return stage()
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    if parsed.version:
        print(f"tidings {version()}")
        return Exit.OK
    if parsed.command is None:
        parser.print_help(sys.stderr)
        return Exit.USAGE
    resolve(parser, parsed, COMMANDS[parsed.command], os.environ)
    reporter = Reporter(as_json=parsed.json, quiet=getattr(parsed, "quiet", False))
    command = {"sync": _sync, "verify": _verify, "doctor": _doctor}[parsed.command]
    return run(lambda: command(parsed, reporter), reporter)


def run(work: Callable[[], int], reporter: Reporter) -> int:
    """Run *work* and end every failure in one line and an exit code. Shared with tidings-mirror."""
    struck: list[int] = []
    try:
        with _interruptible(struck):
            return work()
    except BrokenPipeError:
        # Whoever read our output has gone: nothing is left to say, to anybody.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.LOCAL
    except KeyboardInterrupt:
        return _interrupted(reporter)
    except (TidingsError, OSError, MemoryError) as error:
        if struck:
            return _interrupted(reporter)
        reporter.error(error)
        code = exit_of(error)
        assert code is not None
        return code
    except Exception as error:  # noqa: BLE001 (a bug: programs get their event, people the trace)
        if struck:  # Python 3.11 turns what is raised while a class is made into RuntimeError
            return _interrupted(reporter)
        traceback.print_exc()
        reporter.error(RuntimeError(f"this is a bug in tidings: {type(error).__name__}: {error}"))
        return 1


def _interrupted(reporter: Reporter) -> int:
    reporter.error(KeyboardInterrupt("interrupted; what was in place is in place"))
    return Exit.INTERRUPTED


class _Interrupt(KeyboardInterrupt):
    """A subclass, because Python kills itself in the end where it saw KeyboardInterrupt itself
    leave an exec(), as dataclasses use it; then the exit code would not be ours.
    """


@contextlib.contextmanager
def _interruptible(struck: list[int]) -> Iterator[None]:
    """SIGTERM and SIGHUP as Ctrl-C. *struck* gets the signals that came."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        struck.append(number)
        raise _Interrupt

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    try:
        before = {each: signal.getsignal(each) for each in signals}
        for each in signals:
            if before[each] is not signal.SIG_IGN:  # nohup, or a shell's background job
                signal.signal(each, interrupt)
    except ValueError:  # not the main thread: whoever started it handles signals
        yield
        return
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def _without_its_command_line(package: str) -> Iterator[None]:
    """Import *package*, in the block, without its ``_main``.

    httpx tries to import one, and does without it where click and rich are missing. Where they are
    not, they cost as much time as all else that a sync without news does.
    """
    name = f"{package}._main"
    hidden = package not in sys.modules
    if hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # how Python spells "not to be found"
    try:
        yield
    finally:
        if hidden:
            del sys.modules[name]


# -- sync ----------------------------------------------------------------------------------------


def _remote_settings(parsed: argparse.Namespace) -> RemoteSettings:
    from .remote import RemoteSettings

    return RemoteSettings(
        connect_timeout=parsed.connect_timeout,
        read_timeout=parsed.timeout,
        total_timeout=parsed.total_timeout,
    )


def _trust_settings(parsed: argparse.Namespace) -> TrustSettings:
    from .trust import TrustSettings

    return TrustSettings(
        repomd_sha256=parsed.repomd_sha256,
        gpgkey=parsed.gpgkey,
        allow_older=getattr(parsed, "allow_older", False),
        allow_unsigned=getattr(parsed, "allow_unsigned", False),
    )


def _sync(parsed: argparse.Namespace, reporter: Reporter) -> int:
    from .sync import SyncOptions, plan, sync

    with _without_its_command_line("httpx"):
        from .remote import Remote

    types = None
    if parsed.types is not None:
        from tidings_chunkstore.types import parse_types

        types = parse_types(parsed.types)
    options = SyncOptions(
        dest=parsed.dest,
        types=types,
        zchunk=parsed.zchunk,
        seeds=tuple(parsed.seed),
        route=parsed.route,
        adopt=parsed.adopt,
        trust=_trust_settings(parsed),
    )
    if parsed.metalink:
        return _sync_metalink(parsed, options, reporter)
    with Remote([parsed.url, *parsed.mirror], _remote_settings(parsed)) as remote:
        if parsed.plan:
            planned = plan(options, remote, reporter)
            _show_plan(parsed.dest, planned, reporter)
            return Exit.OK
        result = sync(options, remote, reporter)
    facts = {"url": remote.name, "dest": str(parsed.dest), **result.to_json()}
    reporter.summary(facts, summary_text(_name(parsed.dest), result.to_json()))
    return Exit.OK


def _sync_metalink(parsed: argparse.Namespace, options: SyncOptions, reporter: Reporter) -> int:
    from .listed import plan_metalink, sync_metalink

    if parsed.mirror or parsed.repomd_sha256:
        raise InputError(
            "--metalink names the mirrors and the checksum: without --mirror and --repomd-sha256",
            code="usage",
        )
    settings = _remote_settings(parsed)
    if parsed.plan:
        planned = plan_metalink(options, parsed.url, settings, reporter)
        _show_plan(parsed.dest, planned, reporter)
        return Exit.OK
    result, base = sync_metalink(options, parsed.url, settings, reporter)
    facts = {"url": base, "dest": str(parsed.dest), **result.to_json()}
    reporter.summary(facts, summary_text(_name(parsed.dest), result.to_json()))
    return Exit.OK


def _name(dest: Path) -> str:
    return dest.name or dest.resolve().name or str(dest)


def _show_plan(dest: Path, planned: PlanResult, reporter: Reporter) -> None:
    """One line a file with all its routes, then the sum."""
    for file in planned.files:
        others = ", ".join(
            f"{route} {cost_text(size, requests)}"
            for route, (size, requests) in sorted(file.alternatives.items())
            if route != file.route
        )
        about = "" if file.exact else "about "
        text = f"{file.path}: {file.route}"
        if file.bytes or file.requests:
            text += f" {about}{cost_text(file.bytes, file.requests)}"
        reporter.line(f"{text} (instead of {others})" if others else text)
    text = f"{_name(dest)}: unchanged, nothing to download"
    if planned.changed:
        about = "" if planned.exact else "about "
        text = f"{_name(dest)}: {about}{cost_text(planned.bytes, planned.requests)}"
    if planned.fallback_reason:
        text += f"; {planned.fallback_reason}"
    reporter.summary({"plan": True, "dest": str(dest), **planned.to_json()}, text)


# -- verify --------------------------------------------------------------------------------------


def _verify(parsed: argparse.Namespace, reporter: Reporter) -> int:
    from .verify import verify

    verdict = verify(parsed.dest, _trust_settings(parsed), reporter.progress)
    for finding in verdict.findings:
        reporter.line(f"{finding.path}: {finding.problem}: {finding.text}")
        reporter.data(
            {
                "type": "finding",
                "path": finding.path,
                "problem": finding.problem,
                "text": finding.text,
            }
        )
    if verdict.findings:
        count = len(verdict.findings)
        odd = any(finding.problem in ("symlink", "not-a-file") for finding in verdict.findings)
        advice = "remove what is no regular file, then tidings sync" if odd else "tidings sync"
        raise VerificationError(
            f"{parsed.dest}: {count} file{'' if count == 1 else 's'} not as "
            f"{verdict.main} says; {advice} puts that right",
            code="damaged",
            paths=[finding.path for finding in verdict.findings],
        )
    facts = {
        "dest": str(parsed.dest),
        "layout": verdict.layout,
        "main": verdict.main,
        "trust": verdict.trust,
        "files": verdict.files,
        "opened": verdict.opened,
        "bytes": verdict.bytes,
        "absent": list(verdict.absent),
    }
    files = "1 file" if verdict.files == 1 else f"{verdict.files} files"
    text = f"{parsed.dest}: {files}, {size_text(verdict.bytes)}, "
    text += f"all as {verdict.main} says"
    if verdict.absent:
        text += f" ({len(verdict.absent)} more are named and not here)"
    reporter.summary(facts, f"{text}; trust: {verdict.trust}")
    return Exit.OK


# -- doctor --------------------------------------------------------------------------------------


def _doctor(parsed: argparse.Namespace, reporter: Reporter) -> int:
    from .dnfdoctor import dnf_checks, our_caches, savings, savings_lines, skipped_lines
    from .doctor import FAILED, OK, local_checks, mirror_checks
    from .saved import skipped

    checks = local_checks() + dnf_checks()
    checks += mirror_checks(parsed.urls, _remote_settings(parsed))
    for check in checks:
        reporter.line(f"{check.status:8} {check.name}: {check.text}")
        reporter.data(
            {"type": "check", "name": check.name, "status": check.status, "text": check.text}
        )
    if parsed.dnf:
        caches = our_caches(os.environ)
        found = savings(caches)
        left_out = {cache: skipped(cache, time.time()) for cache in caches}
        for line in savings_lines(found) + skipped_lines(left_out):
            reporter.line(line)
        for total in found:
            reporter.data({"type": "saved", **asdict(total)})
        for mirror in (mirror for mirrors in left_out.values() for mirror in mirrors):
            reporter.data({"type": "skipped", **asdict(mirror)})
    lacking = sum(check.status != OK for check in checks)
    failed = [check for check in checks if check.needed and check.status != OK]
    text = "everything is there" if not lacking else f"{lacking} of {len(checks)} not there"
    reporter.summary({"checks": len(checks), "lacking": lacking, "failed": len(failed)}, text)
    if any(check.status == FAILED for check in failed):
        return Exit.NETWORK
    return Exit.LOCAL if failed else Exit.OK


if __name__ == "__main__":
    sys.exit(main())
