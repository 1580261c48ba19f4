"""Opens one blob into the cache and makes its casync index: started as ``bundle_worker`` is.

The blob stays beside its index, for chunks are read out of it. Neither is held in memory whole;
only what has no index of its own in the store is, which is small (docs/format.md).
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from tidings_chunkstore import reach, recipe
from tidings_chunkstore.backends.local import LocalBackend, explain
from tidings_chunkstore.errors import EngineError, InputError
from tidings_chunkstore.ids import ContentId, Digest
from tidings_chunkstore.limits import MIB
from tidings_chunkstore.places import PackName
from tidings_chunkstore.store import Store, Stored

from .bundle_worker import main
from .casync import CasyncIndex
from .casync_chunker import ChunkSizes, Rule
from .casync_view import blob_name

_BLOCK = 1 * MIB


def make(request: dict[str, Any]) -> bytes:
    """The index's file. Raises InputError for a blob that cannot be had (any more)."""
    digest = Digest.from_hex(request["blob"])
    path = Path(request["out"]).parent / blob_name(digest)
    passing = None
    if not _holds(path, digest):
        if not request["keep"]:
            # It would push out what others asked for, and may well be asked for by nobody.
            passing = path = path.with_name(f".tmp-{path.name}.{os.getpid()}.looked-into")
        _open(request, digest, path)
    sizes = ChunkSizes.of(request["average"], Rule(request["rule"]))
    try:
        with path.open("rb", buffering=0) as stream:
            return CasyncIndex.make(stream, sizes).to_caibx()
    finally:
        if passing is not None:
            passing.unlink(missing_ok=True)


def _open(request: dict[str, Any], digest: Digest, target: Path) -> None:
    """Write the blob *digest* to *target*, from the published file or from the store."""
    tree = request["tree"]
    if tree is not None and not request["opened"]:
        # Gone, or another one by now: the store may have it.
        with suppress(OSError), open(tree, "rb", buffering=0) as stream:
            if _write(target, _blocks(stream), digest):
                return
    store = Store(LocalBackend(Path(request["store"])))
    reach.steady(store, lambda tocs: _rebuild(store, tocs, request, digest, target))


def _rebuild(
    store: Store, tocs: reach.Tocs, request: dict[str, Any], digest: Digest, target: Path
) -> None:
    """Write the blob *digest* to *target* from the store."""
    pack = PackName.parse(request["pack"])
    snapshot = next((toc.snapshot for name, toc in tocs if name == pack), None)
    file = snapshot.file(request["path"]) if snapshot is not None else None
    content = snapshot.content(file.track) if snapshot is not None and file is not None else None
    located = store.locate(tocs)
    if file is None or content is None or file.recipe is None or content.id not in located:
        raise InputError(f"{request['path']} of {pack} is not stored", code="not-retained")
    pieces = _content(store, content.id, located)
    try:
        if not request["opened"]:
            sides = {side: store.content(side, located) for side in file.recipe.sides}
            pieces = recipe.run(file.recipe, pieces, sides)
        if not _write(target, pieces, digest):
            raise InputError(f"{request['path']} of {pack} comes out otherwise", code="engine")
    except EngineError as error:
        raise InputError(f"{request['path']}: {error}", code="engine") from error


def _content(store: Store, content: ContentId, located: dict[ContentId, Stored]) -> Iterator[bytes]:
    stored = located[content]
    if stored.index is None:
        return iter([store.content(content, located)])
    return store.chunks(store.read_index(stored.index))


def _write(target: Path, pieces: Iterable[bytes], digest: Digest) -> bool:
    """Write *pieces*, when they are what *digest* says. Raises LocalError.

    Nothing is synced: what a crash leaves is hashed before it is used again.
    """
    temporary = target.with_name(f".tmp-{target.name}.{os.getpid()}")
    hashing = hashlib.sha256()
    try:
        with temporary.open("xb") as file:
            for piece in pieces:
                hashing.update(piece)
                file.write(piece)
        if hashing.digest() != digest:
            return False
        os.replace(temporary, target)
    except OSError as error:
        raise explain(error, target) from error
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _holds(path: Path, digest: Digest) -> bool:
    """Whether the blob is there, and whole."""
    try:
        with path.open("rb", buffering=0) as stream:
            return hashlib.file_digest(stream, "sha256").digest() == digest
    except OSError:
        return False  # absent, or as good as


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    while block := stream.read(_BLOCK):
        yield block


if __name__ == "__main__":
    sys.exit(main(make))
