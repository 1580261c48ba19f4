"""Makes one table, or one answer, of the reconcile routes: started as ``bundle_worker`` is.

The processor's time of the process is limited, whatever it is asked.
"""

from __future__ import annotations

import base64
import resource
import sys
import time
from pathlib import Path
from typing import Any

from tidings_chunkstore import bundle, delta, reach, reconcile
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.errors import InputError
from tidings_chunkstore.ids import ContentId
from tidings_chunkstore.limits import LIMITS, MIB
from tidings_chunkstore.pack import Snapshot
from tidings_chunkstore.packing import PAYS
from tidings_chunkstore.places import PackName
from tidings_chunkstore.store import Store

from .bundle_worker import main

#: Seconds for one delta: by its content's size, and no more than a share of what is left.
_LEAST, _MOST = 0.5, 3.0
_PACE = 8 * MIB  # a second


def make(request: dict[str, Any]) -> bytes:
    """What the cache keeps: an encoded table, or the answer's body."""
    resource.setrlimit(resource.RLIMIT_CPU, (LIMITS.reconcile_seconds, LIMITS.reconcile_seconds))
    store = Store(LocalBackend(Path(request["store"])))
    return reach.steady(store, lambda tocs: _make(store, tocs, request))


def _make(store: Store, tocs: reach.Tocs, request: dict[str, Any]) -> bytes:
    name = PackName.parse(request["pack"])
    snapshot = next((toc.snapshot for pack, toc in tocs if pack == name), None)
    if snapshot is None:
        raise InputError(f"{name} is not in the store", code="not-retained")
    located = store.locate(tocs)

    def content(track: str) -> tuple[ContentId, bytes]:
        found = snapshot.content(track)
        if found is None:
            raise InputError(f"{name} has no {track}", code="not-retained")
        return found.id, store.content(found.id, located)

    if "table" in request:
        return reconcile.encode_table(reconcile.make_table(*content(request["table"])))
    entries = []
    for track, spans, bitmap in request["commons"]:
        common = reconcile.Common(
            tuple((start, end) for start, end in spans), base64.b64decode(bitmap)
        )
        left = (LIMITS.reconcile_seconds - time.process_time()) / 4
        if left < _LEAST:
            break
        target, data = content(track)
        seconds = min(_MOST, left, max(_LEAST, len(data) / _PACE))
        limit = min(int(_published(snapshot, track) * PAYS), LIMITS.reconcile_answer // 2)
        answer = reconcile.make_answer(target, data, common, delta.Budget(seconds, limit))
        if answer is not None:
            entries.append((track, answer))
    return bundle.encode(entries)


def _published(snapshot: Snapshot, track: str) -> int:
    """Bytes of the smallest file that the content would otherwise come in."""
    return min((file.size for file in snapshot.files if file.track == track), default=0)


if __name__ == "__main__":
    sys.exit(main(make))
