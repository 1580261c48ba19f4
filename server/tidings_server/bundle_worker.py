"""Makes one bundle: started by ``bundles`` with the request as JSON on standard input.

A lock beside the bundle holds off other server processes' workers, which then find it made.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tidings_chunkstore import bundle
from tidings_chunkstore.backends.local import LocalBackend, write_atomically
from tidings_chunkstore.errors import InputError, StoreError, TidingsError
from tidings_chunkstore.places import PackName
from tidings_chunkstore.store import Store

from .bundles import DAMAGED, NOT_RETAINED

_NICE = 5  # requests come first


def main(make: Callable[[dict[str, Any]], bytes]) -> int:
    """Answer the request on standard input with what *make* makes of it; an exit code."""
    request = json.load(sys.stdin)
    os.nice(_NICE)
    out = Path(request["out"])
    lock = out.parent / f".tmp-{out.name}.lock"
    try:
        with lock.open("wb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if not out.exists():
                write_atomically(out, [make(request)])
                lock.unlink(missing_ok=True)
    except InputError as error:
        print(error, file=sys.stderr)
        return NOT_RETAINED
    except StoreError as error:
        print(error, file=sys.stderr)
        return DAMAGED
    except (TidingsError, OSError, MemoryError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _make(request: dict[str, Any]) -> bytes:
    tracks = request["tracks"]
    return bundle.make(
        Store(LocalBackend(Path(request["store"]))),
        PackName.parse(request["older"]),
        PackName.parse(request["newer"]),
        None if tracks is None else set(tracks),
    )


if __name__ == "__main__":
    sys.exit(main(_make))
