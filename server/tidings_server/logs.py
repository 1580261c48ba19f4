"""Log lines on stderr: for people on a terminal, one JSON object a line otherwise.

Every request has an id: the one that a proxy in front gave it in ``X-Request-ID``, or a new one. It
goes back with the answer, and into each line that is logged while the request is worked on, in
the loop and in threads; there the repository is named too.
"""

from __future__ import annotations

import contextvars
import itertools
import json
import logging
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from .site import split_path, target_of

P = ParamSpec("P")
T = TypeVar("T")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_SCOPE: contextvars.ContextVar[Mapping[str, Any] | None] = contextvars.ContextVar(
    "tidings_scope", default=None
)
#: Where the request's id is in its scope.
ID = "tidings.request"

log = logging.getLogger("tidings.access")
errors = logging.getLogger("tidings.error")


class Told(Exception):
    """Raised out of the application when the error that caused it is logged already."""


class Ids:
    """Makes ids of requests, unique in this process and hardly ever met in another."""

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(4)
        self._numbers = itertools.count(1)

    def begin(self, scope: MutableMapping[str, Any]) -> bytes:
        """The request's id; log lines have it from here on."""
        _SCOPE.set(scope)
        for name, value in scope["headers"]:
            if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
                scope[ID] = str(value, "ascii")
                return bytes(value)
        scope[ID] = made = f"{self._prefix}{next(self._numbers):06x}"
        return made.encode()


class Pool(ThreadPoolExecutor):
    """Threads whose log lines belong to the request that they work for."""

    def submit(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See ThreadPoolExecutor."""
        context = contextvars.copy_context()
        return super().submit(lambda: context.run(call, *args, **kwargs))


def facts_of(scope: Mapping[str, Any]) -> dict[str, object]:
    """What an error's line says of the request."""
    facts: dict[str, object] = {"request": scope.get(ID, ""), "path": scope["path"]}
    repository = repository_of(scope)
    return facts if repository is None else {**facts, "repository": repository}


def repository_of(scope: Mapping[str, Any]) -> str | None:
    """The repository that a path below ``tidings/`` names, there or not; None for other paths."""
    target = scope.get("tidings.target")
    if target is None:
        parts = split_path(scope["raw_path"])
        target = target_of(parts) if parts is not None else None
    found: str | None = target.repository if target is not None else None
    return found


class _Json(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        facts = getattr(record, "facts", None)
        if isinstance(facts, dict):
            line |= facts
        else:
            line["message"] = record.getMessage()
            scope = _SCOPE.get()
            if scope is not None:
                line |= facts_of(scope)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class _Lines(logging.Formatter):
    """Lines for people; what went wrong names its request."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        text = super().formatMessage(record)
        scope = _SCOPE.get()
        if scope is None or record.levelno < logging.WARNING:
            return text
        # A path is what a client sent: ascii() keeps it from steering a terminal.
        return f"{text} [request {scope.get(ID, '')}, {ascii(scope['path'])[1:-1]}]"


def _not_told(record: logging.LogRecord) -> bool:
    """Whether a line says something new: the web server logs again what we raise."""
    return not (record.exc_info and isinstance(record.exc_info[1], Told))


def set_up() -> None:
    """Send log lines to stderr. Called by the command, in each of its processes."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines() if sys.stderr.isatty() else _Json())
    handler.addFilter(_not_told)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("tidings").setLevel(logging.INFO)


def access(scope: Mapping[str, Any], status: int, sent: int, seconds: float) -> None:
    """One line for a request."""
    client = scope.get("client")
    repository = repository_of(scope)
    facts = {
        "request": scope[ID],
        "client": client[0] if client else "",
        "method": scope["method"],
        "path": scope["path"],
        **({} if repository is None else {"repository": repository}),
        "status": status,
        "bytes": sent,
        "seconds": round(seconds, 6),
    }
    # A path is what a client sent: ascii() keeps it from steering a terminal.
    text = f"{facts['client']} {facts['method']} {ascii(facts['path'])[1:-1]} {status} {sent} B"
    log.info(f"{text} {seconds * 1000:.1f} ms {scope[ID]}", extra={"facts": facts})


def failed(scope: Mapping[str, Any], error: BaseException) -> None:
    """One line with its traceback for an error that nobody expected."""
    facts = {**facts_of(scope), "method": scope["method"], "error": type(error).__name__}
    facts["message"] = f"a request failed: {error}"[:1000]
    trace = (type(error), error, error.__traceback__)
    errors.error(f"{facts['message']}", exc_info=trace, extra={"facts": facts})
