"""What a command says while it works and when it is done: for people, or one event a line.

People: a bar on stderr, only where stderr is a terminal, and one line on stdout at the end.
Programs (``--json``): one JSON object a line on stdout, each with ``type``: ``progress`` and
``note`` on the way, and last a ``summary`` or an ``error``. Shared by all commands.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from typing import TextIO

from tidings_chunkstore.errors import TidingsError

from .exits import code_of, exit_of

EVENTS_VERSION = 1  #: ``v`` of each event

_REDRAW = 0.1  # seconds
_EVENT_EVERY = 0.5  # seconds between two progress events
_UNITS = ("KB", "MB", "GB", "TB")


class Reporter:
    """Takes what a command has to say, from any thread. Write only through it."""

    def __init__(
        self,
        *,
        as_json: bool = False,
        quiet: bool = False,
        out: TextIO | None = None,
        err: TextIO | None = None,
    ) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._out = out if out is not None else sys.stdout
        self._err = err if err is not None else sys.stderr
        self._bar = not as_json and not quiet and self._err.isatty()
        self._every = _EVENT_EVERY if as_json else _REDRAW
        self._next = 0.0
        self._drawn = False
        self._noted = ""
        self._lock = threading.Lock()

    def progress(self, what: str, done: int, total: int | None = None) -> None:
        """*done* of *total* bytes; *what* is short: a file, a step. Cheap to call often."""
        if not (self._bar or self.as_json):
            return
        now = time.monotonic()
        with self._lock:
            if now < self._next:
                return
            self._next = now + self._every
            if self.as_json:
                self._event({"type": "progress", "what": what, "done": done, "total": total})
            else:
                self._draw(what, done, total)

    def note(self, text: str, **facts: object) -> None:
        """Something worth knowing that is no failure."""
        with self._lock:
            if self.as_json:
                self._event({"type": "note", "text": text, **facts})
            elif not self.quiet and text != self._noted:  # a retry has the same to say
                self._noted = text
                self._clear()
                print(_line(text), file=self._err, flush=True)

    def line(self, text: str) -> None:
        """A line of output for people; nothing with --json."""
        with self._lock:
            if not self.as_json:
                self._clear()
                print(_line(text), file=self._out, flush=True)

    def data(self, value: Mapping[str, object]) -> None:
        """An event of its own type, for programs only."""
        with self._lock:
            if self.as_json:
                self._event(value)

    def summary(self, facts: Mapping[str, object], text: str) -> None:
        """The end of a command that did its work."""
        with self._lock:
            if self.as_json:
                self._event({"type": "summary", **facts})
            else:
                self._clear()
                if not self.quiet:
                    print(_line(text), file=self._out, flush=True)

    def error(self, error: BaseException, **facts: object) -> None:
        """The end of a command that failed. With *repo*, people are told of which one."""
        with self._lock:
            if self.as_json:
                code = exit_of(error)
                details = error.details if isinstance(error, TidingsError) else {}
                told = {
                    "code": code_of(error),
                    "message": _line(str(error)),
                    "exit": code.value if code is not None else 1,
                    "details": {k: _plain(v) for k, v in details.items()},
                }
                self._event({"type": "error", **facts, "error": told})
            else:
                self._clear()
                text, repo = _line(str(error)), _line(str(facts.get("repo", "")))
                where = "" if repo in text else f"{repo}: "
                print(f"error: {where}{text}", file=self._err, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        with self._lock:
            self._clear()

    def _event(self, value: Mapping[str, object]) -> None:
        event = {"type": value["type"], "v": EVENTS_VERSION, **value}
        print(json.dumps(event, ensure_ascii=False, default=_plain), file=self._out, flush=True)

    def _draw(self, what: str, done: int, total: int | None) -> None:
        columns = shutil.get_terminal_size().columns
        if total:
            share = min(done / total, 1.0)
            width = max(10, min(30, columns - 50))
            bar = "#" * int(share * width)
            text = f"[{bar:<{width}}] {share:4.0%} {size_text(done)} of {size_text(total)}  {what}"
        else:
            text = f"{size_text(done)}  {what}"
        self._err.write("\r\x1b[K" + _line(text)[: columns - 1])
        self._err.flush()
        self._drawn = True

    def _clear(self) -> None:
        if self._drawn:
            self._err.write("\r\x1b[K")
            self._err.flush()
            self._drawn = False


def _line(text: str) -> str:
    """*text* as one line that cannot steer a terminal: names in it may come from the network."""
    return "".join(c if c.isprintable() else " " for c in text)


def _plain(value: object) -> object:
    """*value* as JSON has it."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    return str(value)


def size_text(count: int) -> str:
    """Bytes for people, in powers of ten: ``19.7 KB``."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in _UNITS:
        value /= 1000
        if value < 999.95 or unit == _UNITS[-1]:
            return f"{value:.1f} {unit}"
    raise AssertionError


def cost_text(size: int, requests: int) -> str:
    """Bytes and requests; what comes in the request of another file has none of its own."""
    if requests == 0:
        return size_text(size)
    return f"{size_text(size)} in {requests} request{'' if requests == 1 else 's'}"


def seconds_text(seconds: float) -> str:
    """Seconds for people."""
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def summary_text(name: str, facts: Mapping[str, object]) -> str:
    """The line of a sync from the facts of its summary: what it cost, and what it would have."""
    cost = cost_text(_int(facts.get("bytes_received")), _int(facts.get("requests")))
    end = f"{seconds_text(_float(facts.get('seconds')))}; trust: {facts.get('trust')}"
    if not facts.get("changed"):
        return f"{name}: unchanged, {cost}, {end}"
    text = f"{name}: {cost} instead of {size_text(_int(facts.get('bytes_full')))}"
    text += f" ({_routes_text(facts)}), {end}"
    reason = facts.get("fallback_reason")
    return f"{text}; {reason}" if reason else text


def _routes_text(facts: Mapping[str, object]) -> str:
    """The routes by their shares of the files' bytes; one that brought nearly all stands alone."""
    weights: dict[str, int] = {}
    files = facts.get("files")
    for file in files if isinstance(files, list) else ():
        if isinstance(file, Mapping):
            route = str(file.get("route"))
            weights[route] = weights.get(route, 0) + _int(file.get("bytes"))
    whole = sum(weights.values())
    shares = {route: round(100 * size / whole) for route, size in weights.items() if size}
    told = sorted((r for r in shares if shares[r]), key=lambda r: (-weights[r], r))
    if len(told) < 2:
        return str(facts.get("route"))
    return ", ".join(f"{route} {shares[route]}%" for route in told)


def _int(value: object) -> int:
    return value if isinstance(value, int) else 0


def _float(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
