"""Mirrors that lie, lag or break off: every sync ends in a correct, complete DEST, or in an error
that leaves the old one as it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.repos import packages, rpm_md
from support.servers import Misbehaving, Seen
from support.syncing import Repository, copy, fetch, left_over, tree
from tidings_chunkstore import head
from tidings_chunkstore.errors import NetworkError, RollbackError, TidingsError, VerificationError
from tidings_client.sync import SyncResult

FAULTS: dict[str, dict[str, Any]] = {
    "gone": {"status": 404},
    "broken": {"status": 500},
    "flipped at the start": {"flip_at": 20},
    "cut": {"truncate_at": 100},
    "reset": {"reset_at": 50},
    "whole file to a range": {"ignore_range": True},
    "another range": {"wrong_range": 7},
    "more than asked": {"extra": b"x" * 1000, "no_length": True},
    "html": {"body": b"<html>please log in</html>"},
    "empty": {"body": b""},
}


@pytest.fixture
def repo(misbehaving: Misbehaving) -> Repository:
    return Repository.at(misbehaving.root, steps=2)


@pytest.fixture
def old(repo: Repository, misbehaving: Misbehaving, tmp_path: Path) -> Path:
    """A DEST that is one step behind."""
    dest = tmp_path / "old"
    fetch(misbehaving.url, dest)
    repo.advance()
    misbehaving.heal()
    return dest


def right(result: SyncResult, dest: Path, repo: Repository) -> None:
    assert tree(dest) == tree(repo.root)
    assert result.changed
    assert left_over(dest) == set()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("what", [r"\.pack$", r"head\.json$"])
def test_a_bad_pack_or_head_never_fails_the_update(
    what: str, fault: str, old: Path, repo: Repository, misbehaving: Misbehaving
) -> None:
    misbehaving.fault(what, **FAULTS[fault])
    result = fetch(misbehaving.url, old)
    right(result, old, repo)


@pytest.mark.parametrize("fault", ["gone", "flipped at the start", "cut", "reset"])
def test_a_fault_that_passes_costs_a_retry(
    fault: str, old: Path, repo: Repository, misbehaving: Misbehaving
) -> None:
    misbehaving.fault(r"\.pack$", times=1, **FAULTS[fault])
    result = fetch(misbehaving.url, old)
    right(result, old, repo)
    if fault != "gone":
        assert result.route == "delta"


@pytest.mark.parametrize("fault", FAULTS)
def test_the_next_mirror_has_it(
    fault: str, old: Path, repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    shutil.copytree(repo.root, tmp_path / "good")
    misbehaving.fault(r"\.pack$", **FAULTS[fault])
    with Misbehaving(tmp_path / "good") as good:
        result = fetch([misbehaving.url, good.url], old)
    right(result, old, repo)
    assert result.route == "delta"


@pytest.mark.parametrize("fault", ["gone", "flipped at the start", "cut", "html", "empty"])
@pytest.mark.parametrize("what", ["primary", "repomd"])
def test_a_bad_published_file_leaves_the_old_state(
    what: str, fault: str, old: Path, repo: Repository, misbehaving: Misbehaving
) -> None:
    before = tree(old)
    misbehaving.fault(f"repodata/.*{what}", **FAULTS[fault])
    misbehaving.fault("tidings/", status=404)
    with pytest.raises((NetworkError, VerificationError)):
        fetch(misbehaving.url, old)
    assert tree(old) == before
    misbehaving.heal()
    right(fetch(misbehaving.url, old), old, repo)


def test_a_flip_anywhere_in_the_pack(
    old: Path, repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    pack = max((repo.root / "tidings").glob("*.pack"))
    size = pack.stat().st_size
    for number, at in enumerate(range(size - 1, 0, -max(1, size // 12))):
        dest = copy(old, tmp_path / f"dest{number}")
        misbehaving.heal()
        misbehaving.fault(r"\.pack$", flip_at=at)
        right(fetch(misbehaving.url, dest), dest, repo)


def test_chunks_that_are_damaged(misbehaving: Misbehaving, tmp_path: Path) -> None:
    made = packages(1500)
    rpm_md(tmp_path / "old", made, codec="zst")
    repo = Repository(misbehaving.root, made=made, codecs={"primary": "zst"})
    repo.change(0.005)
    repo.publish()
    for number, fault in enumerate(("flipped at the start", "cut", "gone", "html")):
        dest = copy(tmp_path / "old", tmp_path / f"dest{number}")
        misbehaving.heal()
        misbehaving.fault(r"\.pack$", **FAULTS[fault])
        result = fetch(misbehaving.url, dest, route="chunks")
        assert tree(dest) == tree(repo.root)
        assert result.fallback_reason is not None
    for at in range(8, 40_000, 5000):
        dest = copy(tmp_path / "old", tmp_path / f"flip{at}")
        misbehaving.heal()
        misbehaving.fault(r"\.pack$", flip_at=at)
        fetch(misbehaving.url, dest, route="chunks")
        assert tree(dest) == tree(repo.root)


def test_the_publish_runs_behind(old: Path, repo: Repository, misbehaving: Misbehaving) -> None:
    """repodata/ is new, tidings/ is not: the head leads to what was, and that is whole."""
    behind = tree(repo.root)
    repo.change()
    fetch(misbehaving.url, old)
    assert tree(old) == behind


def test_the_publish_runs_behind_and_files_are_gone(
    repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    repo.change()
    dest = tmp_path / "new"
    result = fetch(misbehaving.url, dest)
    right(result, dest, repo)
    assert result.fallback_reason == "missing"


def test_a_head_that_is_ahead_of_its_packs(
    old: Path, repo: Repository, misbehaving: Misbehaving
) -> None:
    for pack in (repo.root / "tidings").glob("*.pack"):
        pack.unlink()
    right(fetch(misbehaving.url, old), old, repo)


def test_a_mirror_in_the_middle_of_its_rsync(
    old: Path, repo: Repository, misbehaving: Misbehaving
) -> None:
    """repomd.xml is new, its files come later, tidings/ is not there."""
    shutil.rmtree(repo.root / "tidings")
    misbehaving.fault("primary", status=404, times=3)
    right(fetch(misbehaving.url, old, pauses=(0.0, 0.0, 0.0, 0.0)), old, repo)


def test_a_mirror_that_swaps_while_we_read(
    old: Path, repo: Repository, misbehaving: Misbehaving
) -> None:
    """A publish between the head and the files: what is taken fits together."""
    done: list[Seen] = []

    def swap(seen: Seen) -> tuple[int, bytes] | None:
        if seen.path.endswith(".pack") and not done:
            done.append(seen)
            for pack in (repo.root / "tidings").glob("*.pack"):
                pack.unlink()
            shutil.rmtree(repo.root / "tidings")
            repo.change(0.5)
            repo.publish()
        return None

    misbehaving.answer(swap)
    right(fetch(misbehaving.url, old), old, repo)
    assert done


@pytest.mark.parametrize(
    "edit",
    [
        {"v": 99},
        {"layout": "pacman"},
        {"main": "repodata/other.xml"},
        {"files": []},
        {"files": "x"},
        {"steps": "AAAA"},
        {"serial": 1 << 40},
    ],
)
def test_a_head_that_makes_no_sense(
    edit: dict[str, object], old: Path, repo: Repository, misbehaving: Misbehaving
) -> None:
    path = repo.root / "tidings/head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    result = fetch(misbehaving.url, old)
    right(result, old, repo)
    assert result.route == "full"


def test_a_head_in_broken_gzip(old: Path, repo: Repository, misbehaving: Misbehaving) -> None:
    misbehaving.fault(r"head\.json$", body=b"no gzip", headers=(("Content-Encoding", "gzip"),))
    result = fetch(misbehaving.url, old)
    right(result, old, repo)
    assert (result.route, result.fallback_reason) == ("full", "head-format")


@pytest.mark.parametrize("path", ["../../evil", "/etc/evil", "repodata/../../evil", ".tidings/x"])
def test_a_path_that_leaves_its_folder(
    path: str, old: Path, repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    place = repo.root / "tidings/head.json"
    value = json.loads(place.read_text())
    value["files"][-1]["path"] = path
    place.write_text(json.dumps(value))
    right(fetch(misbehaving.url, old), old, repo)
    assert not (tmp_path / "evil").exists()


def test_a_forged_head_cannot_change_a_byte(
    old: Path, repo: Repository, misbehaving: Misbehaving
) -> None:
    """The head's hashes are only a help: repomd.xml says what the files are."""
    place = repo.root / "tidings/head.json"
    now = head.decode(place.read_bytes())
    value = json.loads(place.read_text())
    for file in value["files"]:
        if "repomd" not in file["path"]:
            file["sha256"] = value["files"][0]["sha256"]
            file["size"] = 10
    place.write_text(json.dumps(value))
    assert head.decode(place.read_bytes()).serial == now.serial
    result = fetch(misbehaving.url, old)
    assert tree(old) == tree(repo.root)
    assert result.changed


def test_a_serial_that_goes_back(old: Path, repo: Repository, misbehaving: Misbehaving) -> None:
    saved = (repo.root / "tidings/head.json").read_bytes()
    repo.advance()
    fetch(misbehaving.url, old)
    before = tree(old)
    (repo.root / "tidings/head.json").write_bytes(saved)
    with pytest.raises(RollbackError) as failure:
        fetch(misbehaving.url, old)
    assert failure.value.code == "serial"
    assert tree(old) == before


def test_a_bundle_that_lies(old: Path, repo: Repository, misbehaving: Misbehaving) -> None:
    for _ in range(3):
        repo.advance()
    place = repo.root / "tidings/head.json"
    value = json.loads(place.read_text())
    value["features"] = {"delta": 1, "frames": 1}
    place.write_text(json.dumps(value))
    asked = []

    def lie(seen: Seen) -> tuple[int, bytes] | None:
        if "/delta/" in seen.path:
            asked.append(seen.path)
            return 200, b"TDB1" + bytes(60)
        return None

    misbehaving.answer(lie)
    result = fetch(misbehaving.url, old)
    right(result, old, repo)
    assert result.route == "delta"
    assert len(asked) == 1


def test_nothing_is_reused_unproven(old: Path, repo: Repository, misbehaving: Misbehaving) -> None:
    """What an earlier run left behind may be anything."""
    misbehaving.fault("repodata/", status=404)
    before = tree(old)
    shutil.copytree(repo.root, repo.root.parent / "aside")
    work = old / ".tidings"
    for path in (repo.root / "repodata").iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        (work / f"done-{digest}").write_bytes(b"not this")
    (work / "tmp-1").write_bytes(b"x")
    (work / "spool-xyz").write_bytes(b"x")
    assert tree(old) == before
    right(fetch(misbehaving.url, old), old, repo)


def test_a_full_disk(old: Path, repo: Repository, misbehaving: Misbehaving) -> None:
    """The file size limit of the process stands for it: writes fail half-way."""
    import resource
    import signal

    before = tree(old)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
        with pytest.raises(TidingsError) as failure:
            fetch(misbehaving.url, old)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert type(failure.value).__name__ == "LocalError"
    assert tree(old) == before
    right(fetch(misbehaving.url, old), old, repo)
