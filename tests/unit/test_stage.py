"""``tidings stage``: what dnf's plugins run, against a server that can misbehave."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.repos import START, evolve, packages, rpm_md
from support.servers import Misbehaving
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.errors import InputError
from tidings_chunkstore.publisher import publish
from tidings_client.progress import Reporter
from tidings_client.stage import PATIENCE, REASONS, Request, Staged, stage

QUICK = replace(PATIENCE, connect_timeout=0.5, read_timeout=0.5, total_timeout=1.0)
TYPES = ("primary", "filelists")
DAY = 86_400


@pytest.fixture
def site(misbehaving: Misbehaving) -> Misbehaving:
    """A mirror with one published version."""
    _publish(misbehaving, 1)
    return misbehaving


def _publish(site: Misbehaving, version: int) -> None:
    made = packages(60)
    for seed in range(1, version):
        made = evolve(made, seed=seed)
    rpm_md(site.root, made, codec="gz", timestamp=START + version * DAY)
    publish(site.root, LocalBackend(site.root / "tidings"))


def _live(site: Misbehaving, folder: Path) -> Path:
    """dnf's copy of what the site has now."""
    live = folder / "live"
    shutil.copytree(site.root / "repodata", live / "repodata")
    return live


@pytest.fixture
def run(site: Misbehaving, tmp_path: Path) -> Callable[..., Staged]:
    """Stage from the site into a scratch folder."""

    def staged(live: Path | None = None, urls: tuple[str, ...] = ()) -> Staged:
        request = Request(urls or (site.url,), tmp_path / "scratch", live, TYPES)
        return stage(request, Reporter(as_json=True, out=io.StringIO()), QUICK)

    return staged


def reason(staged: Staged) -> str:
    assert staged.url is None
    assert staged.result is None
    (only,) = staged.tried.values()
    assert only in REASONS
    return only


def test_cold(site: Misbehaving, run: Callable[..., Staged], tmp_path: Path) -> None:
    staged = run()
    assert staged.url == site.url
    for path in (tmp_path / "scratch" / "repodata").iterdir():
        assert path.read_bytes() == (site.root / "repodata" / path.name).read_bytes()
    assert (tmp_path / "scratch" / "repodata" / "repomd.xml").exists()


def test_newer(site: Misbehaving, run: Callable[..., Staged], tmp_path: Path) -> None:
    live = _live(site, tmp_path)
    before = sorted(path.name for path in live.rglob("*"))
    _publish(site, 2)
    staged = run(live)
    assert staged.result is not None
    assert staged.result.route == "delta"
    assert staged.requests == 2
    new = (site.root / "repodata" / "repomd.xml").read_bytes()
    assert (tmp_path / "scratch" / "repodata" / "repomd.xml").read_bytes() == new
    assert sorted(path.name for path in live.rglob("*")) == before
    # dnf had it, so it is staged, too.
    assert any("other" in path.name for path in (tmp_path / "scratch" / "repodata").iterdir())


def test_nothing_new(site: Misbehaving, run: Callable[..., Staged], tmp_path: Path) -> None:
    assert reason(run(_live(site, tmp_path))) == "current"
    assert not (tmp_path / "scratch" / "repodata").exists()


def test_older(site: Misbehaving, run: Callable[..., Staged], tmp_path: Path) -> None:
    _publish(site, 2)
    live = _live(site, tmp_path)
    shutil.rmtree(site.root / "tidings")
    shutil.rmtree(site.root / "repodata")
    _publish(site, 1)
    assert reason(run(live)) == "older"


@pytest.mark.parametrize(
    ("pattern", "fault", "expected"),
    [
        ("", {"status": 404}, "missing"),
        ("", {"status": 403}, "missing"),
        ("", {"status": 500}, "useless"),
        ("", {"stall_at": 0}, "hangs"),
        ("pack$", {"stall_at": 10}, "hangs"),
        ("head.json$", {"drip": 0.3, "drip_size": 1}, "hangs"),
        ("head.json$", {"body": b"{}"}, "useless"),
        ("pack$", {"status": 404}, "useless"),
    ],
)
def test_why_not(
    site: Misbehaving,
    run: Callable[..., Staged],
    tmp_path: Path,
    pattern: str,
    fault: dict[str, Any],
    expected: str,
) -> None:
    live = _live(site, tmp_path)
    _publish(site, 2)
    site.fault(pattern, **fault)
    if expected == "useless" and pattern == "pack$":
        site.fault("/repodata/", status=404)  # else files come whole from the same mirror
    assert reason(run(live)) == expected
    assert not (tmp_path / "scratch" / "repodata" / "repomd.xml").exists()


def test_the_next_mirror(site: Misbehaving, run: Callable[..., Staged]) -> None:
    staged = run(None, ("http://127.0.0.1:9", site.url))
    assert staged.url == site.url
    assert staged.tried == {"http://127.0.0.1:9": "hangs"}


def test_a_head_that_would_fill_the_disk(
    site: Misbehaving, run: Callable[..., Staged], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(site.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert reason(run()) == "local"


@pytest.mark.parametrize(
    "data",
    [
        b"", b"x", b"[]", b"null", b"{}", b'{"v":2}',
        b'{"v":1,"urls":"x","dest":"d","types":[]}',
        b'{"v":1,"urls":[1],"dest":"d","types":[]}',
        b'{"v":1,"urls":[],"dest":"a\\u0000","types":[]}',
    ],
)  # fmt: skip
def test_a_request_that_is_none(data: bytes) -> None:
    with pytest.raises(InputError) as caught:
        Request.decode(data)
    assert caught.value.code == "bad-request"


def command(line: bytes, *, close: bool = True) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tidings_client.cli", "stage"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert process.stdin is not None
    process.stdin.write(line)
    process.stdin.flush()
    if close:
        process.stdin.close()
        process.stdin = None
    return process


def test_it_ends_with_its_standard_input(site: Misbehaving, tmp_path: Path) -> None:
    site.fault("", stall_at=0)
    request = {"v": 1, "urls": [site.url], "dest": str(tmp_path / "s"), "types": ["primary"]}
    process = command(json.dumps(request).encode() + b"\n")
    process.communicate(timeout=1.9)
    assert process.returncode == 130


def test_the_command(site: Misbehaving, tmp_path: Path) -> None:
    request = {
        "v": 1, "urls": [site.url], "dest": str(tmp_path / "s"), "types": ["primary"],
        "proxy": "", "live": None,
    }  # fmt: skip
    process = command(json.dumps(request).encode() + b"\n", close=False)
    assert process.stdout is not None
    output = process.stdout.read()  # communicate() would close its standard input
    process.wait(timeout=30)
    events = [json.loads(line) for line in output.splitlines()]
    assert process.returncode == 0
    assert [event["type"] for event in events if event["type"] != "progress"] == [
        *("ready", "head", "summary")
    ]
    assert events[-1]["staged"] is True


def test_nonsense_as_a_request(tmp_path: Path) -> None:
    process = command(b"nonsense\n")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 4
    assert json.loads(output.splitlines()[-1])["error"]["code"] == "bad-request"
