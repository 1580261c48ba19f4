"""Log lines on stderr: for people on a terminal, one JSON object a line otherwise."""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import time
from collections.abc import Mapping
from typing import Any

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")

log = logging.getLogger("tidings.access")


class _JsonLines(logging.Formatter):
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
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up() -> None:
    """Send log lines to stderr. Called by the command, in each of its processes."""
    handler = logging.StreamHandler(sys.stderr)
    if sys.stderr.isatty():
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    else:
        handler.setFormatter(_JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("tidings").setLevel(logging.INFO)


def request_id(scope: Mapping[str, Any]) -> str:
    """The request's id: the one a proxy in front gave it, or a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return secrets.token_hex(6)


def access(
    scope: Mapping[str, Any], request_id: str, status: int, sent: int, seconds: float
) -> None:
    """One line for a request."""
    client = scope.get("client")
    facts = {
        "request": request_id,
        "client": client[0] if client else "",
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "bytes": sent,
        "seconds": round(seconds, 6),
    }
    # A path is what a client sent: ascii() keeps it from steering a terminal.
    text = f"{facts['client']} {facts['method']} {ascii(facts['path'])[1:-1]} {status} {sent} B"
    log.info(f"{text} {seconds * 1000:.1f} ms {request_id}", extra={"facts": facts})
