"""How a store grows: the goal of ``tests/bench/bench_store.py``, in fewer and larger steps."""

from __future__ import annotations

from pathlib import Path

from support import repos
from tidings_chunkstore import publisher
from tidings_chunkstore.backends import LocalBackend

STEPS = 6
TYPES = ("primary", "filelists", "other")


def test_a_months_changes_stay_below_four_times_the_repodata(tmp_path: Path) -> None:
    """As many packages change as in 29 daily steps of 1%."""
    made = repos.packages(250)
    for number in range(STEPS + 1):
        if number:
            made = repos.evolve(made, number, 0.29 / STEPS)
        stamp = repos.START + number * repos.DAY
        repos.rpm_md(tmp_path, made, codec="zst", types=TYPES, timestamp=stamp)
        assert publisher.publish(tmp_path, LocalBackend(tmp_path / "tidings")).changed
    repodata = sum(path.stat().st_size for path in (tmp_path / "repodata").iterdir())
    store = sum(path.stat().st_size for path in (tmp_path / "tidings").iterdir())
    assert store <= 4 * repodata, f"{store / repodata:.2f}"
