"""What a sync tells when it goes another way than asked, and what it leaves when it fails."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from support.servers import Misbehaving, Servers
from support.syncing import Notes, Repository, fetch, tree
from tidings_chunkstore.errors import InputError, NetworkError, VerificationError
from tidings_client.cli import main
from tidings_client.remote import Remote, RemoteSettings
from tidings_client.sync import SyncOptions, plan


@pytest.fixture
def repo(misbehaving: Misbehaving) -> Repository:
    return Repository.at(misbehaving.root, count=40)


# -- a route that cannot be taken ------------------------------------------------------------------


def test_a_route_that_is_not_there_is_told(
    repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    notes = Notes()
    result = fetch(misbehaving.url, tmp_path / "dest", notes=notes, route="reconcile")
    assert result.fallback_reason == "no-reconcile"
    assert [text for text in notes.texts if text.startswith("--route reconcile")]
    assert tree(tmp_path / "dest") == tree(repo.root)


def test_a_plan_tells_it_too(repo: Repository, misbehaving: Misbehaving, tmp_path: Path) -> None:
    with Remote([misbehaving.url]) as remote:
        planned = plan(SyncOptions(tmp_path / "dest", route="reconcile"), remote)
    assert planned.fallback_reason == "no-reconcile"


def test_a_route_that_is_taken_is_not_told(
    repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    fetch(misbehaving.url, tmp_path / "dest")
    repo.advance()
    notes = Notes()
    result = fetch(misbehaving.url, tmp_path / "dest", notes=notes, route="delta")
    assert (result.route, result.fallback_reason, notes.texts) == ("delta", None, [])


# -- arguments -------------------------------------------------------------------------------------


def test_a_seed_that_is_no_folder_is_refused_when_nothing_is_new(
    repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    fetch(misbehaving.url, tmp_path / "dest")
    with pytest.raises(InputError) as caught:
        fetch(misbehaving.url, tmp_path / "dest", seeds=(tmp_path / "nowhere",))
    assert caught.value.code == "no-seed"


# -- a mirror that fails ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "said"),
    [(500, "the mirror fails (status)"), (404, "the mirror's files do not fit together (missing)")],
)
def test_why_it_is_tried_again(
    repo: Repository, misbehaving: Misbehaving, tmp_path: Path, status: int, said: str
) -> None:
    misbehaving.fault(r"primary", status=status)
    notes = Notes()
    with pytest.raises(NetworkError):
        fetch(misbehaving.url, tmp_path / "dest", notes=notes, route="full", pauses=(0.0, 0.01))
    assert f"{said}, trying again" in notes.texts


# -- a wrong URL -----------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["auto", "full"])
def test_a_wrong_url_is_said_at_once(route: str, misbehaving: Misbehaving, tmp_path: Path) -> None:
    dest = tmp_path / "made" / "dest"
    notes = Notes()
    started = time.monotonic()
    with pytest.raises(NetworkError) as caught:
        fetch(
            misbehaving.url,
            dest,
            RemoteSettings(),
            notes,
            route=route,
            pauses=SyncOptions(dest).pauses,
        )
    assert caught.value.code == "no-repository"
    assert time.monotonic() - started < 1
    paths = [seen.path for seen in misbehaving.seen]
    assert len(paths) == len(set(paths))
    assert notes.texts == []
    assert not dest.parent.exists()


def test_a_repository_that_is_being_swapped_is_waited_for(
    repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    """Its head is there, so the URL is right."""
    misbehaving.fault(r"\.pack$", status=404)
    misbehaving.fault("repomd.xml$", status=404, times=1)
    fetch(misbehaving.url, tmp_path / "dest")
    assert tree(tmp_path / "dest") == tree(repo.root)


def test_a_plan_asks_past_the_caches(misbehaving: Misbehaving, tmp_path: Path) -> None:
    Repository.at(misbehaving.root)
    misbehaving.fault("head.json", status=404)
    with Remote([misbehaving.url]) as remote:
        assert plan(SyncOptions(tmp_path / "dest"), remote).changed
    [asked] = [seen for seen in misbehaving.seen if seen.path.endswith("repomd.xml")]
    headers = {name.lower(): value for name, value in asked.headers.items()}
    assert headers["cache-control"] == "no-cache"


# -- another mirror --------------------------------------------------------------------------------


def test_a_mirror_that_failed_is_named_once(
    repo: Repository, misbehaving: Misbehaving, servers: Servers, tmp_path: Path
) -> None:
    good = servers.nginx(repo.root).url
    misbehaving.fault("", status=500)
    notes = Notes()
    fetch([misbehaving.url, good], tmp_path / "dest", notes=notes, route="full")
    [note] = notes.texts
    assert note.startswith(f"{misbehaving.url}: ")
    assert "HTTP 500" in note
    assert note.endswith(f"; {good} answered")


def test_a_retry_at_the_same_mirror_is_no_failover(
    repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    misbehaving.fault("head.json", status=503, times=1)
    notes = Notes()
    fetch([misbehaving.url], tmp_path / "dest", notes=notes)
    assert notes.texts == []


# -- what a failure leaves -------------------------------------------------------------------------


def test_a_first_sync_that_fails_leaves_nothing(
    repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    dest = tmp_path / "a" / "b"
    misbehaving.fault("", status=500)
    with pytest.raises(NetworkError):
        fetch(misbehaving.url, dest)
    assert not (tmp_path / "a").exists()


def test_a_main_file_that_is_refused_is_not_kept(
    repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    from tidings_client.trust import TrustSettings

    dest = tmp_path / "dest"
    dest.mkdir()
    with pytest.raises(VerificationError):
        fetch(misbehaving.url, dest, route="full", trust=TrustSettings(repomd_sha256="0" * 64))
    assert list(dest.iterdir()) == []


def test_what_was_proven_stays_for_the_next_run(
    repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    dest = tmp_path / "dest"
    misbehaving.fault("-other", status=404)
    with pytest.raises(NetworkError):
        fetch(misbehaving.url, dest, route="full")
    assert {p.name[:5] for p in (dest / ".tidings").iterdir()} == {"done-"}
    misbehaving.heal()
    fetch(misbehaving.url, dest, route="full")
    assert not [seen for seen in misbehaving.seen if "-primary" in seen.path]
    assert tree(dest) == tree(repo.root)


# -- one failure, one line -------------------------------------------------------------------------


def test_a_failure_is_told_once(
    repo: Repository,
    misbehaving: Misbehaving,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    misbehaving.fault("repodata/.*-", truncate_at=10)
    misbehaving.fault(r"\.pack$", status=404)
    assert main(["sync", misbehaving.url, str(tmp_path / "dest")]) != 0
    lines = capsys.readouterr().err.splitlines()
    told = lines[-1].removeprefix("error: ")
    assert lines[-1].startswith("error: ")
    assert not [line for line in lines[:-1] if told in line]
    assert all(line.count(".pack") <= 1 for line in lines)


def test_the_detail_is_in_the_event(
    repo: Repository,
    misbehaving: Misbehaving,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    misbehaving.fault("repomd.xml$", status=404, times=1)
    misbehaving.fault(r"\.pack$", status=404)
    assert main(["sync", "--json", misbehaving.url, str(tmp_path / "dest")]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    notes = [event for event in events if event["type"] == "note"]
    assert any("HTTP 404" in str(note.get("detail")) for note in notes)
