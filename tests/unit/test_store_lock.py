"""The lock of a store: who waits, who does not, and what a publish does that had to wait."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from support.repos import DAY, START, evolve, packages, rpm_md
from tidings_chunkstore.backends import LocalBackend
from tidings_chunkstore.errors import LockedError, UnsettledError
from tidings_chunkstore.layout import read_tree
from tidings_chunkstore.publisher import publish
from tidings_chunkstore.store import Store

FEW = packages(12)


def test_without_patience_a_held_lock_is_an_error(tmp_path: Path) -> None:
    with LocalBackend(tmp_path).lock() as waited, pytest.raises(LockedError):
        assert not waited
        with LocalBackend(tmp_path).lock():
            pass


def test_patience_ends(tmp_path: Path) -> None:
    started = time.monotonic()
    patient = LocalBackend(tmp_path, 0.3)
    with LocalBackend(tmp_path).lock(), pytest.raises(LockedError), patient.lock():
        pass
    assert time.monotonic() - started >= 0.3


def test_a_lock_that_is_let_go_is_taken(tmp_path: Path) -> None:
    held = threading.Event()
    go = threading.Event()

    def hold() -> None:
        with LocalBackend(tmp_path).lock():
            held.set()
            go.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)
    threading.Timer(0.2, go.set).start()
    with LocalBackend(tmp_path, 60).lock() as waited:
        assert waited
    thread.join()


class Slow(LocalBackend):
    """Somebody else has the lock until the tree has changed."""

    def _wait_for(self, descriptor: int) -> bool:
        super()._wait_for(descriptor)
        rpm_md(self.folder.parent, evolve(FEW, 1, 0.5), types=("primary",), timestamp=START + DAY)
        return True


def test_a_publish_that_waited_takes_what_is_there_then(tmp_path: Path) -> None:
    rpm_md(tmp_path, FEW, types=("primary",))
    backend = Slow(tmp_path / "tidings")
    assert publish(tmp_path, backend).changed
    head = Store(backend).read_head()
    assert head is not None
    now = {entry.file.path for entry in read_tree(tmp_path, None).files}
    assert {file.path for file in head.files} == {*now, "repodata/repomd.xml"}


class Fickle(LocalBackend):
    """The tree changes just when the publish has the lock, which it did not wait for."""

    def _wait_for(self, descriptor: int) -> bool:
        super()._wait_for(descriptor)
        next((self.folder.parent / "repodata").glob("*primary*")).unlink()
        return False


def test_a_file_that_goes_while_it_is_published_is_waited_for(tmp_path: Path) -> None:
    """UnsettledError is what ``publish --retry`` tries again."""
    rpm_md(tmp_path, FEW, types=("primary",))
    with pytest.raises(UnsettledError):
        publish(tmp_path, Fickle(tmp_path / "tidings"))
    assert not (tmp_path / "tidings" / "head.json").exists()
