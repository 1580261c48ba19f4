"""Publish is killed, or finds the disk full, at every write: old or new, and the next one heals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.repos import DAY, START, evolve, packages, rpm_md
from tidings_chunkstore import publisher
from tidings_chunkstore.backends import LocalBackend

TYPES = ("primary", "group")


@pytest.mark.parametrize("how", ["kill", "full"])
@pytest.mark.parametrize("steps", [0, 2])
def test_stopped_at_every_write(tmp_path: Path, how: str, steps: int) -> None:
    repo = tmp_path / "repo"
    made = packages(30)
    for day in range(steps):
        rpm_md(repo, made, types=TYPES, timestamp=START + day * DAY)
        publisher.publish(repo, LocalBackend(repo / "tidings"))
        made = evolve(made, seed=day + 1)
    rpm_md(repo, made, types=TYPES, timestamp=START + steps * DAY)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("publish_kills.py"), tmp_path, how],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Pack and head each: its pieces, fsync, rename, fsync of the folder.
    assert int(done.stdout) >= 8


def test_a_leftover_pack_of_a_killed_publish_is_never_read(tmp_path: Path) -> None:
    """A pack that no head names may be half of anything: it goes, unread."""
    repo = tmp_path / "repo"
    made = packages(30)
    rpm_md(repo, made, types=TYPES)
    publisher.publish(repo, LocalBackend(repo / "tidings"))
    (repo / "tidings" / "000002-0123456789abcdef.pack").write_bytes(b"garbage")
    (repo / "tidings" / ".tmp-000002-0123456789abcdef.pack.1").write_bytes(b"half")
    rpm_md(repo, evolve(made, seed=1), types=TYPES, timestamp=START + DAY)
    report = publisher.publish(repo, LocalBackend(repo / "tidings"))
    assert set(report.removed) == {
        "000002-0123456789abcdef.pack",
        ".tmp-000002-0123456789abcdef.pack.1",
    }
    assert report.changed
