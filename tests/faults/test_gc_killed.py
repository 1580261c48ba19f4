"""gc is killed at every write: the store is whole at once, and the next run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.stores import DyingBackend, History, KilledError, assert_whole
from tidings_chunkstore import condemned, gc
from tidings_chunkstore.gc import Options
from tidings_chunkstore.publisher import Options as PublishOptions

NOW = Options(keep=2, grace=0, rewrite_gain=0.0, rewrite_below=1.0)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> History:
    """A store with snapshots to drop, packs to delete and packs to rewrite."""
    history = History(tmp_path_factory.mktemp("origin") / "repo", count=150)
    history.options = PublishOptions(keep=3)
    history.steps(2, 0.02)
    history.steps(1, 1.0)
    history.options = PublishOptions(keep=3, rebuild=True)
    history.step(0.02)
    history.options = PublishOptions(keep=3)
    history.steps(6, 0.02)
    return history


def count_writes(origin: History, root: Path) -> int:
    backend = DyingBackend(origin.copy(root).folder, 0)
    report = gc.run(backend, NOW)
    plan = report.plan
    assert report.pack, "the store gives a rewrite nothing to do"
    assert plan.deleted, "the store gives gc nothing to delete"
    assert plan.dropped
    return backend.writes


@pytest.mark.parametrize("follower", ["gc", "publish"])
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_write(origin: History, tmp_path: Path, after: bool, follower: str) -> None:
    writes = count_writes(origin, tmp_path / "count")
    assert writes >= 6
    current = origin.head().serial
    for fatal in range(1, writes + 1):
        history = origin.copy(tmp_path / f"{fatal}")
        with pytest.raises(KilledError):
            gc.run(DyingBackend(history.folder, fatal, after), NOW)
        published = {**history.published, current + 1: history.published[current]}
        assert_whole(history.store, published)
        if follower == "publish":
            history.options = PublishOptions(keep=3)
            history.step(0.02)
            published.update(history.published)
            published[history.head().serial] = history.files()
            assert_whole(history.store, published)
        gc.run(history.backend, NOW)
        assert condemned.read(history.backend) == {}
        assert_whole(history.store, published if follower == "gc" else {})
        shutil.rmtree(history.root)
