"""When the next look is due, what a state remembers, what can be read of it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings_chunkstore.errors import NetworkError
from tidings_chunkstore.publisher import Options
from tidings_server.follow import (
    FollowState,
    Outcome,
    Target,
    _after,
    delay,
    first_due,
    load_state,
    save_state,
    state_file,
)
from tidings_server.publish import Job
from tidings_server.settings import UpstreamSettings
from tidings_server.upstream import Fetched, Source

DOCS = Path(__file__).parents[2] / "docs" / "upstream.md"
FETCHED = Fetched(True, "metalink", 1_700_000_000, "delta", "https://a/", 500, 90, 9000, 2, 0.5)
NOW = 1_800_000_000.7


def target() -> Target:
    job = Job(Path("/r"), Path("/r/tidings"), Options())
    return Target(Source("a/b", UpstreamSettings(urls=("https://a/",))), job, 3600)


def test_delays_after_failures() -> None:
    assert [delay(3600, n, 0) for n in range(7)] == [3600, 450, 900, 1800, 3600, 3600, 3600]
    assert delay(3600, 0, 1) == pytest.approx(3960)
    assert delay(3600, 0, -1) == pytest.approx(3240)


@given(st.integers(10, 2_592_000), st.integers(0, 10_000), st.floats(-1, 1))
def test_a_delay_is_never_longer_than_every_and_its_jitter(
    every: int, failures: int, jitter: float
) -> None:
    found = delay(every, failures, jitter)
    assert every / 8 * 0.9 * 0.999 <= found <= every * 1.1 * 1.001


def test_the_first_look_after_a_start() -> None:
    every = 3600
    assert first_due(FollowState("r"), every, NOW, 0) == NOW  # never looked
    assert first_due(FollowState("r", checked=int(NOW) - 4000), every, NOW, 0) == NOW
    recent = FollowState("r", checked=int(NOW) - 1000)
    assert first_due(recent, every, NOW, 0) == pytest.approx(NOW + 2600, abs=1)
    failed = dataclasses.replace(recent, failures=1)
    assert first_due(failed, every, NOW, 0) == NOW
    # A clock that was wrong does not put the look off for years.
    future = FollowState("r", checked=int(NOW) + 10**8)
    assert first_due(future, every, NOW, 0) <= NOW + every * 1.1


def test_what_a_look_leaves_in_the_state() -> None:
    changed = _after(FollowState("a/b"), Outcome(target(), FETCHED, seconds=1.25), NOW)
    assert changed == FollowState(
        "a/b", 1, int(NOW), int(NOW), int(NOW), 0, None, "https://a/", "metalink", 1_700_000_000,
        500, 2, 9000, 500, 9000, 1, 1.25,
    )  # fmt: skip
    quiet = dataclasses.replace(FETCHED, changed=False, bytes_received=100, requests=1)
    later = _after(changed, Outcome(target(), quiet, seconds=0.1), NOW + 60)
    assert later.changed == changed.changed
    assert later.good == int(NOW) + 60
    assert (later.bytes_received, later.requests) == (500, 2)  # of the last that was news
    assert (later.total_bytes_received, later.total_bytes_full, later.total_changes) == (
        600, 9000, 1,
    )  # fmt: skip


def test_failures_are_counted_until_a_good_look() -> None:
    state = FollowState("a/b", good=5, checked=5)
    for number in (1, 2):
        failed = Outcome(target(), error=NetworkError("down", code="connect"))
        state = _after(state, failed, NOW + number)
        assert (state.failures, state.good, state.checked) == (number, 5, int(NOW + number))
        assert state.error == {"code": "connect", "message": "down"}
    state = _after(state, Outcome(target(), FETCHED), NOW + 9)
    assert (state.failures, state.error) == (0, None)


def test_states_are_read_as_they_were_written(tmp_path: Path) -> None:
    state = FollowState("a/b c/ü", checked=7, error={"code": "x", "message": "y"})
    (tmp_path / "follow").mkdir()
    save_state(tmp_path, state)
    assert load_state(tmp_path, "a/b c/ü") == state
    assert state_file(tmp_path, "a/b").name == "a%2Fb.json"


def test_states_of_long_paths_are_kept(tmp_path: Path) -> None:
    (tmp_path / "follow").mkdir()
    for path in ("ä" * 100, "ä" * 101, "a" * 400):
        save_state(tmp_path, FollowState(path, checked=len(path)))
        assert load_state(tmp_path, path).checked == len(path)
    assert len(list((tmp_path / "follow").iterdir())) == 3


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"v":2}', b"\xff", b"[" * 5000, b'{"path":1,"v":1,"checked":"x"}']
)
def test_a_broken_state_is_an_empty_one(data: bytes, tmp_path: Path) -> None:
    file = state_file(tmp_path, "r")
    file.parent.mkdir()
    file.write_bytes(data)
    assert load_state(tmp_path, "r") == FollowState("r")


def test_the_documentation_has_the_keys() -> None:
    section = DOCS.read_text(encoding="utf-8").split("## State")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    documented = [key for row in rows for key in re.findall(r"`(\w+)`", row)]
    written = json.loads(json.dumps(dataclasses.asdict(FollowState("r"))))
    assert sorted(documented) == sorted(written)
