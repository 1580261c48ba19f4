"""kill -9 while it follows: root and store stay whole, and the next look makes up for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.repos import packages
from support.servers import Misbehaving
from support.syncing import Repository, tree

SCRIPT = Path(__file__).with_name("follow_kills.py")


def kill_at_points(origin: Repository, url: str, folder: Path, step: int) -> int:
    """Runs the script; how many points there are."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from follow_kills import look_at
    finally:
        sys.path.remove(str(SCRIPT.parent))
    assert look_at(url, folder / "first").error is None
    origin.change(0.1)
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), url, str(folder), str(origin.root), str(step)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return int(ran.stdout.split()[-1])


def plain(root: Path) -> Repository:
    root.mkdir(parents=True, exist_ok=True)
    made = Repository(root, made=packages(12))
    made.write()
    return made


def test_kills_at_some_points(misbehaving: Misbehaving, tmp_path: Path) -> None:
    assert kill_at_points(plain(misbehaving.root), misbehaving.url, tmp_path, 9) > 30


@pytest.mark.slow
def test_kills_at_every_point(misbehaving: Misbehaving, tmp_path: Path) -> None:
    assert kill_at_points(plain(misbehaving.root), misbehaving.url, tmp_path, 1) > 30


def test_the_command_is_killed_at_random_times(misbehaving: Misbehaving, tmp_path: Path) -> None:
    """The real command, killed while it downloads, publishes, waits; then left alone."""
    origin = plain(misbehaving.root)
    root = tmp_path / "root"
    config = tmp_path / "mirror.toml"
    config.write_text(
        f'[follow]\nstate = "{tmp_path}/state"\n'
        f'[[repo]]\npath = "r"\nroot = "{root}"\nurls = "{misbehaving.url}"\n'
    )
    command = [sys.executable, "-m", "tidings_server.cli", "follow", "--once"]
    command += ["--config", str(config)]
    for number in range(4):
        origin.change(0.2)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen = len(misbehaving.seen)
        while len(misbehaving.seen) < seen + 1 + 2 * number and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert tree(root) == tree(origin.root)
