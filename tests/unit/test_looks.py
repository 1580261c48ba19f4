"""Looks at upstreams when the clock is set back."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from tidings_chunkstore.publisher import Options
from tidings_client.job import Silent
from tidings_server import follow
from tidings_server.edge_rules import Looks
from tidings_server.edge_states import Held, Status
from tidings_server.edge_worker import look
from tidings_server.publish import Job
from tidings_server.settings import PulledSettings, UpstreamSettings
from tidings_server.upstream import Source

NOWHERE = UpstreamSettings()  # a look fails at once, and has looked


@pytest.mark.parametrize(
    ("checked", "mine"),
    [(-10.0, True), (5.0, False), (10**6, True)],  # the last: the clock was set back since
)
def test_only_a_look_of_this_moment_spares_one(checked: float, mine: bool, tmp_path: Path) -> None:
    held = Held.below(tmp_path, "a")
    held.folder.mkdir(parents=True)
    asked = time.time() - 20
    held.write_status(Status("a", Looks(asked + checked, asked + checked, 0)))
    source = asdict(PulledSettings("a", NOWHERE))
    looked = look(held, {"path": "a", "asked": asked, "budget": 0, "source": source})
    assert looked.mine is mine
    assert (held.status().looks.failures == 1) is mine
    assert held.status().looks.checked <= time.time()


def test_a_wait_that_is_under_way_ends_when_the_clock_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr(follow, "time", clock)
    job = Job(tmp_path / "r", tmp_path / "r" / "tidings", Options())
    target = follow.Target(Source("r", NOWHERE), job, every=1)
    checked = follow.FollowState("r", checked=int(time.time()))
    (tmp_path / "follow").mkdir()
    follow.save_state(tmp_path, checked)  # so the first look is due in a second
    ended: list[follow.Outcome] = []
    follower = follow.Follower([target], tmp_path, 1, ended.append, lambda _: Silent())

    def set_back() -> None:
        clock.time = lambda: time.time() - 86_400

    timers = [threading.Timer(0.05, set_back), threading.Timer(3, follower.stop)]
    for timer in timers:
        timer.start()
    follower.stay()
    assert ended
