"""A mirror of the mirror, copied by rsync: its clients end correct, wherever the copy broke off."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import repos
from support.servers import Servers
from support.system import require
from tidings_chunkstore import publisher
from tidings_chunkstore.backends import LocalBackend


def _publish(root: Path, made: tuple[repos.GeneratedPackage, ...], number: int) -> None:
    repos.rpm_md(root, made, codec="zst", timestamp=repos.START + number * repos.DAY)
    publisher.publish(root, LocalBackend(root / "tidings"))


def _sync(url: str, dest: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tidings_client.cli", "sync", url, str(dest)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _files(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (root / "repodata").iterdir()}


def _transfers(source: Path, target: Path) -> list[str]:
    """The files that a plain rsync would send, in its order."""
    answer = subprocess.run(
        [require("rsync"), "-rtn", "--out-format=%n", f"{source}/", f"{target}/"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [name for name in answer.splitlines() if name and not name.endswith("/")]


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    root = tmp_path / "origin" / "repo"
    made = repos.packages(300)
    _publish(root, made, 0)
    shutil.copytree(tmp_path / "origin", tmp_path / "before")
    _publish(root, repos.evolve(made, 1), 1)
    return tmp_path / "origin"


def test_rsync_sends_the_head_last(origin: Path, tmp_path: Path) -> None:
    sent = _transfers(origin, tmp_path / "before")
    assert [Path(name).name for name in sent if "tidings" in name][-1] == "head.json"
    folders = [Path(name).parent.name for name in sent]
    assert folders == sorted(folders)  # repodata before tidings


def test_clients_of_a_copy_that_broke_off_after_each_file(origin: Path, tmp_path: Path) -> None:
    """After n files sent, a client syncs: it has the old state or the new one, whole."""
    states = [_files(tmp_path / "before" / "repo"), _files(origin / "repo")]
    order = _transfers(origin, tmp_path / "before")
    assert len(order) >= 8
    tier = tmp_path / "tier"
    shutil.copytree(tmp_path / "before", tier)
    with Servers(tmp_path / "servers") as servers:
        url = f"{servers.nginx(tier).url}/repo"
        start = tmp_path / "start"
        assert _sync(url, start).returncode == 0
        for count, name in enumerate([None, *order]):
            if name is not None:
                (tier / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(origin / name, tier / name)
            dest = tmp_path / f"dest{count}"
            shutil.copytree(start, dest)
            found = _sync(url, dest)
            whole = _files(dest) in states
            assert whole, f"after {name}: {found.stderr}"
            if name in (None, order[-1]):
                assert found.returncode == 0, found.stderr
        assert _files(dest) == states[1]
        empty = tmp_path / "empty"
        assert _sync(url, empty).returncode == 0
        assert _files(empty) == states[1]


def test_a_killed_rsync_is_finished_by_the_next(origin: Path, tmp_path: Path) -> None:
    """rsync itself, ended by its own limit on time, then run again with no option of ours."""
    tier = tmp_path / "tier"
    shutil.copytree(tmp_path / "before", tier)
    rsync = require("rsync")
    subprocess.run(
        [rsync, "-rt", "--bwlimit=20", "--timeout=1", f"{origin}/", f"{tier}/"],
        capture_output=True,
        check=False,
        timeout=60,
    )
    subprocess.run([rsync, "-rt", f"{origin}/", f"{tier}/"], check=True, timeout=60)
    with Servers(tmp_path / "servers") as servers:
        url = f"{servers.nginx(tier).url}/repo"
        dest = tmp_path / "dest"
        assert _sync(url, dest).returncode == 0
        assert _files(dest) == _files(origin / "repo")
