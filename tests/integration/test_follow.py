"""``tidings-mirror follow`` against real origins: states, events, exit codes, signals, locks."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support.repos import packages
from support.servers import Misbehaving, Seen, Servers
from support.stores import assert_whole
from support.syncing import Repository, fetch, tree
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.store import Store
from tidings_server import upstream
from tidings_server.cli import main

COMMAND = [sys.executable, "-m", "tidings_server.cli", "follow"]
PATIENCE = 30.0  # seconds that a test waits for what must come


@dataclass
class Operator:
    """Settings in a file, and runs of the command with them."""

    folder: Path
    tables: list[str] = field(default_factory=list)
    every: int = 3600
    parallel: int = 2

    def follow(self, path: str, *lines: str) -> Path:
        """One more ``[[repo]]``; its root."""
        root = self.folder / "roots" / path.replace("/", "-")
        self.tables.append("\n".join(["[[repo]]", f'path = "{path}"', f'root = "{root}"', *lines]))
        return root

    def command(self, *arguments: str) -> list[str]:
        config = self.folder / "mirror.toml"
        head = f'[follow]\nstate = "{self.folder}/state"\nevery = {self.every}\n'
        config.write_text("\n".join([f"{head}parallel = {self.parallel}\n", *self.tables]))
        return [*COMMAND, "--config", str(config), *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command in this process, which saves its start."""
        command = self.command(*arguments)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(command[len(COMMAND) - 1 :])
        return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())

    def events(self, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
        done = self.run("--once", "--json", *arguments)
        events = [json.loads(line) for line in done.stdout.splitlines()]
        return done.returncode, [e for e in events if e["type"] not in ("progress", "note")]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def state(self, path: str) -> dict[str, Any]:
        name = path.replace("/", "%2F") + ".json"
        value: dict[str, Any] = json.loads((self.folder / "state/follow" / name).read_bytes())
        return value


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Operator:
    monkeypatch.setattr(upstream, "_PAUSES", (0.0, 0.05))
    return Operator(tmp_path)


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def published(root: Path) -> Store:
    """The store beside *root*, whole, and of what lies in it now."""
    store = Store(LocalBackend(root / "tidings"))
    assert_whole(store)
    head = store.read_head()
    assert head is not None
    assert {f.path for f in head.files} <= tree(root).keys()
    return store


@pytest.mark.tools
def test_three_tiers_by_deltas(servers: Servers, operator: Operator, tmp_path: Path) -> None:
    """nginx before an origin, a mirror that follows it, uvicorn before that, a client."""
    origin = Repository.at(tmp_path / "www/r")
    nginx = servers.nginx(tmp_path / "www")
    root = operator.follow("fedora/r", f'urls = "{nginx.url}/r/"')
    code, (look, summary) = operator.events()
    assert (code, look["type"], look["repo"], look["route"]) == (0, "look", "fedora/r", "full")
    assert (look["published"], look["serial"]) == (True, 1)
    assert (summary["type"], summary["changed"], summary["failed"]) == ("summary", 1, 0)
    assert tree(root) == tree(origin.root)

    mirror = servers.mirror(root)
    client = tmp_path / "client"
    fetch(mirror.url, client)
    for step in (2, 3):
        origin.advance()
        code, (look, _) = operator.events()
        assert (code, look["route"], look["serial"]) == (0, "delta", step)
        assert look["bytes_received"] < look["bytes_full"] / 5
        result = fetch(mirror.url, client)
        assert result.route == "delta"
        assert tree(client) == tree(root) == tree(origin.root)
    published(root)

    code, (look, _) = operator.events()
    assert (code, look["changed"], look["published"], look["requests"]) == (0, False, False, 1)
    state = operator.state("fedora/r")
    assert (state["failures"], state["error"], state["total_changes"]) == (0, None, 3)
    assert state["upstream"] == f"{nginx.url}/r/"
    assert state["checked"] >= state["good"] >= state["changed"] > 0
    assert state["total_bytes_received"] < state["total_bytes_full"]


def test_one_bad_upstream_of_several(operator: Operator, misbehaving: Misbehaving) -> None:
    good = Repository.at(misbehaving.root / "good", count=20)
    root = operator.follow("good", f'urls = "{misbehaving.url}/good/"')
    operator.follow("bad", f'urls = "{misbehaving.url}/bad/"')
    done = operator.run("--once")
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: bad: no repository there: ")
    assert "good: " in done.stdout
    assert "1 changed, 1 failed" in done.stdout
    assert tree(root) == tree(good.root)
    assert operator.state("bad")["error"]["code"] == "no-repository"
    assert operator.state("bad")["failures"] == 1
    assert operator.run("--once", "bad").returncode == 5  # alone, its own code
    assert operator.state("bad")["failures"] == 2
    done = operator.run("--once", "good")
    assert (done.returncode, done.stderr) == (0, "")
    assert "good: unchanged" in done.stdout
    assert operator.run("--once", "--quiet", "good").stdout == ""


def test_names_that_are_none(operator: Operator, misbehaving: Misbehaving) -> None:
    done = operator.run("--once")
    assert (done.returncode, "nothing to follow" in done.stderr) == (2, True)
    operator.follow("fedora/updates", f'urls = "{misbehaving.url}/"')
    done = operator.run("--once", "fedora/update")
    assert (done.returncode, "is fedora/updates meant?" in done.stderr) == (2, True)


@pytest.mark.parametrize("fault", ["half", "older", "flipped", "down"])
def test_the_last_good_state_stays_published(
    fault: str, operator: Operator, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    origin = Repository(misbehaving.root / "r", made=packages(30))
    origin.root.mkdir()
    origin.write()
    shutil.copytree(origin.root, tmp_path / "older")
    origin.change()
    root = operator.follow("r", f'urls = "{misbehaving.url}/r/"')
    assert operator.events()[0] == 0
    before, head = tree(root), (root / "tidings/head.json").read_bytes()
    if fault == "half":
        origin.change()
        misbehaving.fault("primary", status=404)
    elif fault == "older":
        shutil.rmtree(origin.root)
        shutil.copytree(tmp_path / "older", origin.root)
    elif fault == "flipped":
        origin.change()
        misbehaving.fault("filelists", flip_at=50)
    else:
        misbehaving.fault("", status=403)
    code, (failed, _) = operator.events()
    assert failed["type"] == "failed"
    expected = {"half": 5, "older": 7, "flipped": 6, "down": 5}[fault]
    assert (code, failed["error"]["exit"]) == (expected, expected)
    assert tree(root) == before
    assert (root / "tidings/head.json").read_bytes() == head
    published(root)
    state = operator.state("r")
    assert (state["failures"], state["error"]["code"]) == (1, failed["error"]["code"])
    if fault == "older":
        way_out = f"; to accept that once: tidings sync --allow-older URL {root}"
        assert state["error"]["message"].endswith(way_out)
    misbehaving.heal()
    if fault == "older":
        shutil.rmtree(origin.root)
        origin.write()
    code, (look, _) = operator.events()
    assert (code, look["type"]) == (0, "look")
    assert tree(root) == tree(origin.root)
    assert operator.state("r")["failures"] == 0


def test_a_publish_that_failed_is_made_up_for(operator: Operator, misbehaving: Misbehaving) -> None:
    """The fetch is done, the store cannot be written; next time nothing is new but the publish."""
    Repository.at(misbehaving.root, count=20)
    root = operator.follow("r", f'urls = "{misbehaving.url}/"')
    root.mkdir(parents=True)
    (root / "tidings").write_bytes(b"in the way")
    code, (failed, _) = operator.events()
    assert (code, failed["type"]) == (failed["error"]["exit"], "failed")
    assert operator.state("r")["total_changes"] == 1
    (root / "tidings").unlink()
    code, (look, _) = operator.events()
    assert (code, look["published"], look["serial"]) == (0, True, 1)
    published(root)


def test_it_publishes_what_lies_there_though_the_upstream_is_down(
    operator: Operator, misbehaving: Misbehaving
) -> None:
    Repository.at(misbehaving.root, count=20)
    root = operator.follow("r", f'urls = "{misbehaving.url}/"')
    operator.events()
    shutil.rmtree(root / "tidings")  # as a kill between fetch and publish would leave it
    misbehaving.fault("", status=403)
    code, (failed, _) = operator.events()
    assert (code, failed["type"]) == (5, "failed")
    published(root)


def test_staying_follows_and_ends_by_sigterm(operator: Operator, misbehaving: Misbehaving) -> None:
    origin = Repository.at(misbehaving.root / "a", count=20)
    operator.every = 10
    root = operator.follow("a", f'urls = "{misbehaving.url}/a/"')
    operator.follow("b", f'urls = "{misbehaving.url}/b/"')
    process = operator.start("--json")
    try:
        wait_for((root / "tidings/head.json").exists)
        origin.advance()
        wait_for(lambda: operator.state("a")["total_changes"] == 2)
        assert tree(root) == tree(origin.root)
        # b failed at once, and is tried after 10 / 8, 20 / 8, ... seconds.
        wait_for(lambda: operator.state("b")["failures"] >= 3)
    finally:
        process.terminate()
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    events = [json.loads(line) for line in out.splitlines()]
    assert events[-1]["type"] == "summary"
    assert events[-1]["changed"] == 2
    assert sum(e["type"] == "failed" for e in events) >= 3
    published(root)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_download_that_drips(
    how: signal.Signals, operator: Operator, misbehaving: Misbehaving
) -> None:
    Repository(misbehaving.root, made=packages(200)).write()
    misbehaving.fault("primary", drip=0.02, drip_size=10)
    root = operator.follow("r", f'urls = "{misbehaving.url}/"')
    process = operator.start()
    try:
        wait_for(lambda: any("primary" in seen.path for seen in misbehaving.seen))
        time.sleep(0.3)
        started = time.monotonic()
        process.send_signal(how)
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert time.monotonic() - started < 10
    assert "error" not in err
    assert not (root / "repodata/repomd.xml").exists()
    assert not (operator.folder / "state/follow/r.json").exists()  # no failure of the upstream's
    misbehaving.heal()
    assert operator.run("--once").returncode == 0
    assert tree(root) == tree(misbehaving.root)


def test_two_never_work_on_one_repository(operator: Operator, misbehaving: Misbehaving) -> None:
    Repository(misbehaving.root, made=packages(20)).write()
    go = threading.Event()

    def answer(seen: Seen) -> tuple[int, bytes] | None:
        if "primary" in seen.path:
            go.wait(PATIENCE)
        return None

    misbehaving.answer(answer)
    root = operator.follow("r", f'urls = "{misbehaving.url}/"')
    first = operator.start("--once")
    try:
        wait_for(lambda: any("primary" in seen.path for seen in misbehaving.seen))
        done = operator.run("--once")
        assert done.returncode == 9
        assert done.stderr == "error: r: another follow is at work on it\n"
        assert not (operator.folder / "state/follow/r.json").exists()
    finally:
        go.set()
        _, err = first.communicate(timeout=PATIENCE)
    assert first.returncode == 0, err
    published(root)


def test_parallel_is_a_limit(operator: Operator, misbehaving: Misbehaving) -> None:
    Repository.at(misbehaving.root / "r", count=5)
    lock, now, most = threading.Lock(), set[str](), [0]

    def answer(seen: Seen) -> tuple[int, bytes] | None:
        name = seen.path.split("/")[1]
        with lock:
            now.add(name)
            most[0] = max(most[0], len(now))
        time.sleep(0.15)
        with lock:
            now.discard(name)
        return 404, b"no"

    misbehaving.answer(answer)
    operator.parallel = 3
    for number in range(7):
        operator.follow(f"r{number}", f'urls = "{misbehaving.url}/{number}/"')
    code, events = operator.events()
    assert (code, len(events)) == (3, 8)
    assert most[0] == 3


def test_state_folder_that_cannot_be_written(operator: Operator, misbehaving: Misbehaving) -> None:
    Repository.at(misbehaving.root, count=5)
    operator.follow("r", f'urls = "{misbehaving.url}/"')
    (operator.folder / "state").write_bytes(b"a file")
    done = operator.run("--once")
    assert done.returncode == 10
    assert len(done.stderr.splitlines()) == 1
    assert "state" in done.stderr


def test_a_store_tree_and_settings_of_its_own(
    operator: Operator, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    origin = Repository.at(misbehaving.root, count=10)
    root = operator.follow(
        "x/r", f'urls = ["{misbehaving.url}/"]', f'store = "{tmp_path}/stores"', "keep = 2"
    )
    for _ in range(4):
        assert operator.events()[0] == 0
        origin.advance(0.2)
    assert not (root / "tidings").exists()
    head = Store(LocalBackend(tmp_path / "stores/x/r/tidings")).read_head()
    assert head is not None
    assert [state.serial for state in head.states] == [3, 4]


def test_the_environment_goes_over_the_file(operator: Operator, misbehaving: Misbehaving) -> None:
    Repository.at(misbehaving.root, count=5)
    operator.follow("r", f'urls = "{misbehaving.url}/"')
    elsewhere = operator.folder / "elsewhere"
    done = subprocess.run(
        operator.command(),
        env={
            **os.environ,
            "TIDINGS_MIRROR_FOLLOW_STATE": str(elsewhere),
            "TIDINGS_MIRROR_ONCE": "1",
        },
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "follow/r.json").is_file()


def test_some_types_only(servers: Servers, operator: Operator, tmp_path: Path) -> None:
    """The listing stays whole, as it was signed; of its files only those are here and published."""
    origin = Repository.at(tmp_path / "www/r")
    assert any("filelists" in path for path in tree(origin.root))
    nginx = servers.nginx(tmp_path / "www")
    root = operator.follow("r", f'urls = "{nginx.url}/r/"', 'types = ["primary", "group"]')
    root.mkdir(parents=True)
    mirror = servers.mirror(root.parent)
    client = tmp_path / "client"
    for step in (1, 2):
        code, (look, _) = operator.events()
        assert (code, look["published"], look["serial"]) == (0, True, step)
        here = tree(root)
        assert here.items() <= tree(origin.root).items()
        assert any("primary" in path for path in here)
        assert not any("filelists" in path for path in here)
        published(root)
        result = fetch(f"{mirror.url}/{root.name}", client, types=("primary", "group"))
        assert tree(client) == here
        assert result.route == ("full" if step == 1 else "delta")
        origin.advance()
    # A file of the types that is not there is a tree in the middle of something.
    next(root.glob("repodata/*primary*")).unlink()
    done = operator.run("--once")
    assert done.returncode == 0, done.stderr  # the look brought it back
    published(root)
