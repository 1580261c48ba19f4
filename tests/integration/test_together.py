"""Publish, gc without grace, check, serve and sync at the same time on one tree: nobody is harmed.

The short form of the soak (``tests/soak``): the same processes and the same judge, no kills and no
damage, so nothing may end with anything but 0.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from soak.machine import command_line, tree
from soak.soak import Settings, Soak
from support.repos import packages, rpm_md
from support.servers import Servers
from support.system import require

SHORT = Settings(
    seconds=10.0,
    clients=8,
    seed=2,
    packages=60,
    publish_every=0.5,
    gc_every=0.7,
    check_every=0.7,
    rsync_every=2.0,
    sample_every=1.0,
    flip_every=0.0,
    kill_every=0.0,
    syncs=2,
    pace=(0.2, 4.0),
    keep=6,
)


def test_all_at_once(tmp_path: Path) -> None:
    require("nginx")
    require("rsync")
    report: dict[str, Any] = Soak(tmp_path / "soak", SHORT, lambda _: None).run()
    shutil.rmtree(tmp_path / "soak")
    assert report["errors"] == []
    codes = report["codes"]
    # Busy machines make fewer runs; each kind has met the others all the same.
    for kind, least in (("publish", 5), ("gc", 3), ("check", 3), ("sync", 16), ("rsync", 2)):
        assert codes[kind]["0"] >= least, codes
    for kind in ("publish", "gc", "check"):
        assert set(codes[kind]) == {"0"}, codes
    # Without damage and kills a client may find its mirror in the middle of a publish, no worse.
    assert set(codes["sync"]) <= {"0", "5"}, codes
    assert report["routes"].get("delta"), report["routes"]


def test_the_judge_sees_what_is_wrong(tmp_path: Path) -> None:
    """A DEST with a mixed, a wrong, an old or a foreign file is none of the versions."""
    from soak.truth import Generator, Truth, WrongError, hashes

    truth = Truth()
    generator = Generator(tmp_path / "repo", tmp_path / "next", truth, 20, 1)
    first = generator.next()
    old = hashes(tmp_path / "repo")
    second = generator.next()
    new = hashes(tmp_path / "repo")
    assert truth.version(old, None) == first
    assert truth.version(new, None) == second
    main = "repodata/repomd.xml"
    with pytest.raises(WrongError, match="missing"):
        truth.version({**old, main: new[main]}, None)
    with pytest.raises(WrongError, match="never published"):
        truth.version({**new, main: "00" * 32}, None)
    path = next(path for path in new if path != main)
    with pytest.raises(WrongError, match="is wrong"):
        truth.version({**new, path: "00" * 32}, None)
    with pytest.raises(WrongError, match="beside version 2"):
        truth.version({**old, **new}, None)
    assert truth.version_within({**old, **new}, None) == (second, old.keys() - new.keys())
    with pytest.raises(WrongError, match="never published"):
        truth.version_within({**new, "repodata/x": "00" * 32}, None)
    with pytest.raises(WrongError, match="unknown"):
        truth.version({"repodata/x": "00" * 32}, None)


def test_workers_of_a_killed_server_end(servers: Servers, tmp_path: Path) -> None:
    """They would hold the port, and serve by the old settings for ever."""
    rpm_md(tmp_path / "www", packages(5), types=("primary",))
    server = servers.mirror(tmp_path / "www", "--workers", "2")
    deadline = time.monotonic() + 30
    family: list[int] = []
    while time.monotonic() < deadline:  # it listens before they are up
        family = list(tree(server.process.pid))
        if sum("spawn_main" in command_line(pid) for pid in family) == 2:
            break
        time.sleep(0.1)
    assert httpx.get(f"{server.url}/repodata/repomd.xml", timeout=30).status_code == 200
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    deadline = time.monotonic() + 30
    while any(command_line(pid) for pid in family) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [command_line(pid) for pid in family if command_line(pid)] == []
    servers.mirror(tmp_path / "www", "--workers", "2", "--port", str(server.port))
