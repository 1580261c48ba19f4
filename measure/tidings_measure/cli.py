"""The command ``tidings-measure``. The only part of the package that reads options and prints."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tidings_chunkstore.errors import InputError, LocalError
from tidings_chunkstore.types import parse_types
from tidings_client.cli import run as run_command
from tidings_client.exits import Exit, help_text
from tidings_client.options import Kind, Option, add, add_version, resolve
from tidings_client.progress import Reporter, size_text

from .link import Link
from .record import record
from .replay import LAGS, Event, replay
from .report import summary, write
from .results import to_csv, to_json
from .rivals import TOOLS
from .table import Models, clients, mirrors


@dataclass(frozen=True, slots=True)
class _Option(Option):
    @property
    def env(self) -> str:
        return "TIDINGS_MEASURE_" + self.dest.upper()


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(word) for word in text.split(","))
    if not all(1 <= number <= 100_000 for number in numbers):
        raise ValueError(text)
    return numbers


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 1_000_000:
        raise ValueError(text)
    return number


def _link(text: str) -> Link:
    try:
        return Link.parse(text)
    except InputError as error:
        raise ValueError(text) from error


_JSON = _Option("--json", "print one JSON event a line; the last is the summary or the error")
_QUIET = _Option("--quiet", "print errors only", short="-q")
_TYPES = _Option("--types", "only these metadata types, comma-separated", Kind.VALUE, "LIST")

REPLAY: tuple[Option, ...] = (
    _Option("--out", "results, pictures and report go here", Kind.VALUE, "DIR", parse=Path),
    _Option("--tools", "only these tools, comma-separated (--list-tools)", Kind.VALUE, "LIST"),
    _Option(
        "--lags",
        "clients that update every so many publishes (1,7,30)",
        Kind.VALUE,
        "LIST",
        LAGS,
        _numbers,
    ),
    _Option(
        "--steps",
        "only the last so many updates of each kind of client",
        Kind.VALUE,
        "N",
        parse=_count,
    ),
    _TYPES,
    _Option(
        "--link",
        "model seconds on a line: bits a second and round trip, as 10M/50ms; repeatable",
        Kind.LIST,
        "RATE/DELAY",
        parse=_link,
    ),
    _Option("--clients", "model a site of so many clients", Kind.VALUE, "N", 1, _count),
    _Option("--behind-proxy", "the site's clients share a cache"),
    _Option("--no-plots", "draw no pictures (needs no matplotlib)"),
    _Option("--keep", "leave the trees of mirrors and clients in DIR/work"),
    _JSON,
    _QUIET,
)
RECORD: tuple[Option, ...] = (_TYPES, _JSON, _QUIET)

#: All commands and their options; a test compares docs/measure.md with it.
COMMANDS = {"": REPLAY, "record": RECORD}

_EXAMPLES = """\
examples:
  tidings-measure record https://mirror.example.org/fedora/updates/43/x86_64 history
  tidings-measure history --out results
  tidings-measure history --out results --tools tidings,published --link 10M/50ms

"""


def build_parser(command: str = "") -> argparse.ArgumentParser:
    """The parser of ``tidings-measure``, or of its command ``record``."""
    if command == "record":
        parser = argparse.ArgumentParser(
            prog="tidings-measure record",
            description="Add a live repository's metadata of now to a history.",
            epilog=help_text(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("url", metavar="URL", help="the repository's base URL")
        parser.add_argument("history", metavar="DIR", type=Path, help="the history to add to")
    else:
        parser = argparse.ArgumentParser(
            prog="tidings-measure",
            description="Replay a history of publishes, and count what an update costs with "
            "Tidings and with every other tool that is here.",
            epilog="tidings-measure record URL DIR adds a live repository to a history.\n\n"
            + _EXAMPLES
            + help_text(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument(
            "history",
            metavar="HISTORY",
            type=Path,
            nargs="?",
            help="a folder of consecutive publishes",
        )
        add_version(parser)
        parser.add_argument("--list-tools", action="store_true", help="list the tools and exit")
    add(parser, COMMANDS[command])
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = "record" if words[:1] == ["record"] else ""
    parser = build_parser(command)
    parsed = parser.parse_args(words[1:] if command else words)
    resolve(parser, parsed, COMMANDS[command], os.environ)
    reporter = Reporter(as_json=parsed.json, quiet=parsed.quiet)
    if command:
        return run_command(lambda: _record(parsed, reporter), reporter)
    if parsed.list_tools:
        return run_command(lambda: _list(reporter), reporter)
    if parsed.history is None:
        parser.error("HISTORY is missing")
    if parsed.out is None:
        parser.error("--out DIR is missing")
    told = shlex.join(["tidings-measure", *words])
    return run_command(lambda: _replay(parsed, reporter, told), reporter)


def _record(parsed: argparse.Namespace, reporter: Reporter) -> int:
    types = parse_types(parsed.types) if parsed.types is not None else None
    done = record(parsed.url, parsed.history, types=types, progress=reporter)
    what = f"recorded {done.folder}" if done.new else f"nothing new since {done.folder}"
    cost = f"{size_text(done.received)} in {done.requests} requests"
    reporter.summary(
        {
            "url": parsed.url,
            "history": str(parsed.history),
            "version": done.folder.name,
            "new": done.new,
            "versions": done.versions,
            "bytes": done.received,
            "requests": done.requests,
        },
        f"{what}: {cost}; {done.versions} version{'' if done.versions == 1 else 's'}",
    )
    return Exit.OK


def _list(reporter: Reporter) -> int:
    for name, make in TOOLS.items():
        tool = make()
        missing = tool.missing()
        state = f"not here: {missing}" if missing else tool.about
        reporter.line(f"{name:15} {state}")
        reporter.data({"type": "tool", "name": name, "about": tool.about, "left_out": missing})
    return Exit.OK


def _replay(parsed: argparse.Namespace, reporter: Reporter, command: str) -> int:
    if not parsed.no_plots:
        _need_matplotlib()
    screen = _Screen(reporter)
    results = replay(
        parsed.history,
        parsed.out,
        tools=parsed.tools.split(",") if parsed.tools else None,
        lags=parsed.lags,
        steps=parsed.steps,
        types=parse_types(parsed.types) if parsed.types is not None else None,
        listener=screen,
        keep=parsed.keep,
    )
    screen.clear()
    models = Models(parsed.link, parsed.clients, parsed.behind_proxy)
    out: Path = parsed.out
    (out / "results.json").write_text(to_json(results), encoding="utf-8")
    (out / "results.csv").write_text(to_csv(results), encoding="utf-8")
    tables = (clients(results, models), mirrors(results))
    markdown = "\n\n".join(f"{table.title}:\n\n{table.markdown()}" for table in tables)
    (out / "tables.md").write_text(f"{markdown}\n\n`{command}`\n", encoding="utf-8")
    pictures = []
    if not parsed.no_plots:
        from .plots import draw

        pictures = draw(results, out)
    write(results, models, pictures, command, out / "report.html")
    for table in tables:
        for line in (*table.text().splitlines(), ""):
            reporter.line(line)
    for note in results.notes:
        reporter.note(note)
    reporter.summary(
        {
            "out": str(out),
            "updates": len(results.updates),
            "publishes": len(results.publishes),
            "left_out": [tool.name for tool in results.tools if tool.left_out],
            "report": str(out / "report.html"),
        },
        f"{summary(results)}; see {out / 'report.html'}",
    )
    return Exit.OK


def _need_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise LocalError(
            "matplotlib is not installed: pip install 'tidings[measure]', or give --no-plots",
            code="no-matplotlib",
        )


class _Screen:
    """A bar on a terminal, notes for everybody, events for programs."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._bar = not reporter.as_json and not reporter.quiet and sys.stderr.isatty()
        self._drawn = False

    def __call__(self, event: Event) -> None:
        if event.note:
            self.clear()
            self._reporter.note(event.text)
        elif self._reporter.as_json:
            self._reporter.progress(event.text, event.done, event.total)
        elif self._bar:
            share = event.done / event.total if event.total else 0.0
            text = f"[{'#' * int(share * 24):<24}] {event.done}/{event.total}  {event.text}"
            sys.stderr.write("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1])
            sys.stderr.flush()
            self._drawn = True

    def clear(self) -> None:
        """Take the bar away."""
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._drawn = False


if __name__ == "__main__":
    sys.exit(main())
