"""Readers without a lock, while a gc deletes packs and beside a pack that nobody needs."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from support.stores import History
from tidings_chunkstore import bundle, gc, reach
from tidings_chunkstore.backends import LocalBackend
from tidings_chunkstore.errors import StoreError
from tidings_chunkstore.ids import Digest
from tidings_chunkstore.places import PackName
from tidings_chunkstore.store import Store
from tidings_server import casync_worker, inventory, reconcile_worker
from tidings_server.casync_view import blob_name


class Swept(LocalBackend):
    """A gc runs between the first look at the folder and all that is read after it."""

    sweeps = 1

    def names(self) -> list[str]:
        found = list(super().names())
        if self.sweeps:
            self.sweeps -= 1
            options = gc.Options(keep=1, grace=0, rewrite_below=1.0, rewrite_gain=0.0)
            for _ in range(2):
                gc.run(LocalBackend(self.folder), options)
        return found


class Listed(LocalBackend):
    """The first look shows a pack that is gone when it is read."""

    looks = 0

    def names(self) -> list[str]:
        self.looks += 1
        gone = [str(PackName(1, bytes(8)))] if self.looks == 1 else []
        return [*super().names(), *gone]


@pytest.fixture
def history(tmp_path: Path) -> History:
    made = History(tmp_path / "repo", count=60)
    made.steps(3, share=0.3)
    return made


@pytest.fixture
def swept(history: History) -> Store:
    return Store(Swept(history.folder))


READERS: dict[str, Callable[[Store], object]] = {
    "snapshots": inventory.snapshots,
    "stats": inventory.stats,
}


@pytest.mark.parametrize("name", READERS)
def test_a_gc_at_the_same_time(name: str, history: History, swept: Store) -> None:
    before = history.packs()
    found = READERS[name](swept)
    assert before - history.packs()  # or nothing was tried
    assert found == READERS[name](history.store)


def test_the_workers_when_a_pack_goes(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)  # it would be this process's
    for module in (reconcile_worker, casync_worker):
        monkeypatch.setattr(module, "LocalBackend", Listed)
    head = history.head()
    file = next(f for f in head.files if f.track == "primary")
    request = {"store": str(history.folder), "pack": str(head.current.pack)}
    assert reconcile_worker.make({**request, "table": "primary"})
    asked = {
        **request,
        "out": str(tmp_path / "out"),
        "blob": file.sha256.hex(),
        "path": file.path,
        "tree": None,
        "opened": False,
        "keep": True,
        "average": 65536,
        "rule": "casync",
    }
    assert casync_worker.make(asked)
    blob = tmp_path / blob_name(Digest(file.sha256))
    assert blob.read_bytes() == (history.root / file.path).read_bytes()


def test_a_pack_that_nobody_needs_disturbs_nobody(history: History) -> None:
    junk = history.folder / str(PackName(1, bytes(8)))
    junk.write_bytes(b"of no use")
    states = history.head().states
    assert bundle.decode(bundle.make(history.store, states[0].pack, states[-1].pack))
    found = inventory.stats(history.store)
    assert (found.unreadable, found.packs) == (1, len(history.packs()) - 1)


def test_damage_is_told_and_read_once(history: History) -> None:
    calls = []

    def read(tocs: reach.Tocs) -> None:
        calls.append(len(tocs))
        raise StoreError("damaged")

    with pytest.raises(StoreError):
        reach.steady(history.store, read)
    assert calls == [len(history.packs())]
