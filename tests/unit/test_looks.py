"""Looks at upstreams when the clock is set back."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import pytest

from tidings_server.edge_rules import Looks
from tidings_server.edge_states import Held, Status
from tidings_server.edge_worker import look
from tidings_server.settings import PulledSettings, UpstreamSettings

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
