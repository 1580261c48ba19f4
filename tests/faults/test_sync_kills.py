"""kill -9 before every system call that changes DEST: old state or new, and the next run heals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.servers import Misbehaving
from support.syncing import Repository, fetch

SCRIPT = Path(__file__).with_name("kill_points.py")


@pytest.mark.parametrize("route", ["delta", "full"])
def test_a_kill_at_every_point(route: str, misbehaving: Misbehaving, tmp_path: Path) -> None:
    repo = Repository.at(misbehaving.root, count=40)
    fetch(misbehaving.url, tmp_path / "dest")
    repo.advance(0.1)
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), misbehaving.url, str(tmp_path), str(repo.root), route],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert int(ran.stdout.split()[-1]) > 20  # points
