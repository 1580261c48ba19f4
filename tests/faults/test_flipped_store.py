"""One flipped bit anywhere in a store: check finds it, repair mends it, by a mirror or without."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from support.stores import History, PackFolder, assert_whole
from tidings_chunkstore import gc, head
from tidings_chunkstore.check import check
from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.repair import repair

#: Flips for each; SOAK_FLIPS=500 looks closer.
FLIPS = int(os.environ.get("SOAK_FLIPS", "12"))


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> History:
    history = History(tmp_path_factory.mktemp("origin") / "repo", count=40)
    history.steps(5, 0.05)
    return history


def same_head(one: bytes | bytearray, other: bytes) -> bool:
    try:
        return head.decode(bytes(one)) == head.decode(other)
    except FormatError:
        return False


@pytest.mark.parametrize("source", ["mirror", "published", "nothing"])
def test_a_flip_anywhere(origin: History, tmp_path: Path, source: str) -> None:
    dice = random.Random(source)
    names = [path.name for path in sorted(origin.folder.iterdir()) if path.name != "gc.json"]
    for number in range(FLIPS):
        history = origin.copy(tmp_path / str(number))
        name = names[number % len(names)]
        path = history.folder / name
        whole = path.read_bytes()
        data = bytearray(whole)
        while data == whole or (name == "head.json" and same_head(data, whole)):
            data = bytearray(whole)
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        found = check(history.backend)
        place = (source, name, next(i for i, byte in enumerate(whole) if byte != data[i]))
        assert found.damaged, place
        assert any(f.where == name for f in found.findings) or name == "head.json", place
        sources = [PackFolder(origin.folder)] if source == "mirror" else []
        report = repair(history.backend, sources, None if source == "nothing" else history.root)
        serials = {state.serial for state in history.head().states}
        if source != "nothing":
            assert report.whole, (place, report)
            assert max(serials) >= 5, (place, report)
            now = {file.path: bytes(file.sha256) for file in history.head().files}
            was = {file.path: bytes(file.sha256) for file in origin.head().files}
            assert now == was, place
        if source == "mirror":
            assert path.read_bytes() == whole or name == "head.json", place
            assert serials == {1, 2, 3, 4, 5}, (place, report)
        if report.whole:
            assert_whole(history.store, history.published if source == "mirror" else None)
            gc.run(history.backend, gc.Options(grace=0))
            assert check(history.backend).findings == (), place
            continue
        # The first pack holds what all others build on: nothing can be kept, and it is said.
        assert report.lost, place
        assert repair(history.backend, [PackFolder(origin.folder)]).whole, place
