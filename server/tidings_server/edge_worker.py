"""One look at an upstream: started by ``edge`` with the request as JSON on standard input.

A process of its own: rebuilding a large file takes seconds of a processor and a hundred megabytes,
which the server's event loop and its memory never see, and it can be stopped. It ends with a
``Looked`` on standard output, so that the server knows how it went even where the disk took
nothing. The lock holds off other server processes' workers. Who has to wait for it says so first
(``WAITING``), then finds the look done, or ends without one: it is not its turn any more.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tidings_chunkstore.backends.local import explain
from tidings_chunkstore.errors import FormatError, LocalError, TidingsError

from .edge_rules import Looks, public
from .edge_states import Held, Problem, Status

if TYPE_CHECKING:
    from .upstream import Fetched

WAITING = b"waiting\n"  #: said before the answer by who waits for the lock
_REQUEST_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Looked:
    """How a look went."""

    status: Status
    mine: bool = True  #: whether this process looked
    received: int = 0  #: bytes of this look
    full: int = 0  #: of the whole files that came of it

    def encode(self) -> bytes:
        """As one line."""
        return b"%d %d %d %b" % (self.mine, self.received, self.full, self.status.encode())

    @classmethod
    def decode(cls, data: bytes) -> Looked:
        """From what a worker said. Raises FormatError."""
        try:
            mine, received, full, status = data.split(b" ", 3)
            return cls(Status.decode(status), mine == b"1", int(received), int(full))
        except ValueError as error:
            raise FormatError(f"not what a worker says: {error}") from error


def main() -> int:
    """Answer the request on standard input; the exit code is 0 whenever there is an answer."""
    request = json.loads(sys.stdin.readline(_REQUEST_MAX))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    held = Held(Path(request["folder"]), request["path"])
    try:
        held.folder.mkdir(parents=True, exist_ok=True)
        with held.lock.open("ab") as lock:
            if _locked(lock):
                looked = look(held, request)
            else:
                _say(WAITING)
                fcntl.flock(lock, fcntl.LOCK_EX)
                looked = Looked(held.status(), mine=False)
    except (LocalError, OSError) as error:
        looked = Looked(_after(held, request, error, 0.0))
    _say(looked.encode())
    return 0


def _locked(lock: BinaryIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _say(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def look(held: Held, request: dict[str, Any]) -> Looked:
    """Bring the states to what the upstream has; the caller holds the lock. Raises LocalError."""
    before = held.status()
    # What was checked in the future says nothing: the clock was set back since.
    if request["asked"] <= before.looks.checked <= time.time():
        return Looked(before, mine=False)  # another process did just before
    started = time.monotonic()
    try:
        fetched = _fetch(held, request["source"])
        now = time.time()
        new = held.take_in(now)
        full = fetched.bytes_full if new else 0
        looked = Looked(_fine(before, fetched, new, now), True, fetched.bytes_received, full)
    except (TidingsError, OSError, MemoryError) as error:
        looked = Looked(_after(held, request, error, time.monotonic() - started))
    held.write_status(looked.status)
    held.prune(time.time(), request["budget"])
    return looked


def _fetch(held: Held, source: dict[str, Any]) -> Fetched:
    from .settings import UpstreamSettings
    from .upstream import Source, fetch

    upstream = dict(source["upstream"])
    for name in ("urls", "types"):
        if upstream.get(name) is not None:
            upstream[name] = tuple(upstream[name])
    if upstream.get("gpgkey") is not None:
        upstream["gpgkey"] = Path(upstream["gpgkey"])
    wanted = Source(source["path"], UpstreamSettings(**upstream), source["layout"])
    way_out = f"to accept that, delete {held.folder}"
    return fetch(wanted, held.work, memory=held.memory, way_out=way_out)


def _fine(before: Status, fetched: Fetched, new: bool, now: float) -> Status:
    status = replace(
        before,
        looks=Looks(now, now, 0),
        error=None,
        upstream=public(fetched.base) if fetched.base else before.upstream,
        trust=fetched.trust,
        timestamp=fetched.timestamp or before.timestamp,
        seconds=round(fetched.seconds, 3),
    )
    if not new:
        return status
    return replace(
        status,
        changed=now,
        bytes_received=fetched.bytes_received,
        requests=fetched.requests,
        bytes_full=fetched.bytes_full,
        total_bytes_received=before.total_bytes_received + fetched.bytes_received,
        total_bytes_full=before.total_bytes_full + fetched.bytes_full,
        total_changes=before.total_changes + 1,
    )


def _after(held: Held, request: dict[str, Any], error: Exception, seconds: float) -> Status:
    """The status after *error*."""
    if isinstance(error, OSError):
        error = explain(error, held.folder)
    if isinstance(error, TidingsError):
        problem = Problem(error.code, str(error)[:1000], isinstance(error, LocalError))
    else:
        problem = Problem("memory", "out of memory", True)
    try:
        before = held.status()
    except LocalError:
        before = Status(request["path"])
    return before.failed(time.time(), problem, round(seconds, 3))


def _end_with_parent() -> None:
    """End when the server does. What was fetched is kept for the next look."""
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
