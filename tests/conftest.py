"""What every test may ask for: Hypothesis profiles, the real data, real servers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from support.servers import Misbehaving, Servers

ROOT = Path(__file__).resolve().parent.parent

# Deterministic in CI, so that a change is judged and not the dice; no deadline: cores are shared.
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real repositories that lies beside the checkout; skips without it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the checkout (real repositories, not part of it)")
    return folder


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    """Starts real servers and stops them when the test ends."""
    with Servers(tmp_path / "servers") as running:
        yield running


@pytest.fixture
def misbehaving(tmp_path: Path) -> Iterator[Misbehaving]:
    """A web server over ``tmp_path / "www"`` that lies as it is told to, path by path."""
    root = tmp_path / "www"
    root.mkdir(exist_ok=True)
    with Misbehaving(root) as server:
        yield server
