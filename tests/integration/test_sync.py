"""Publish, serve, sync: whatever the route, DEST holds the published bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from support.repos import DAY, START, packages, rpm_md
from support.servers import Misbehaving, Servers
from support.stores import rich_in_frames
from support.syncing import Notes, Repository, copy, fetch, left_over, tree
from tidings_chunkstore.errors import InputError, LockedError, NetworkError, RollbackError
from tidings_chunkstore.head import decode, encode
from tidings_client.local import Destination
from tidings_client.remote import Remote
from tidings_client.sync import SyncOptions, plan
from tidings_client.trust import TrustSettings


@pytest.fixture
def repo(misbehaving: Misbehaving) -> Repository:
    return Repository.at(misbehaving.root, steps=3)


def test_from_nothing_then_step_by_step(misbehaving: Misbehaving, tmp_path: Path) -> None:
    repo = Repository.at(misbehaving.root)
    dest = tmp_path / "dest"
    first = fetch(misbehaving.url, dest)
    assert first.changed
    assert tree(dest) == tree(repo.root)
    for _ in range(3):
        repo.advance()
        result = fetch(misbehaving.url, dest)
        assert tree(dest) == tree(repo.root)
        assert (result.route, result.changed, result.requests) == ("delta", True, 2)
        assert result.bytes_received + result.bytes_sent < result.bytes_full / 8
        assert result.trust == "transport"
        assert result.fallback_reason is None
        assert left_over(dest) == set()


def test_bytes_full_is_what_the_published_files_have(
    repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    result = fetch(misbehaving.url, tmp_path / "dest")
    assert result.bytes_full == sum(map(len, tree(repo.root).values()))


def test_an_unchanged_head_is_one_request(
    repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    dest = tmp_path / "dest"
    fetch(misbehaving.url, dest)
    before = {p: p.stat().st_mtime_ns for p in dest.rglob("*")}
    misbehaving.heal()
    again = fetch(misbehaving.url, dest)
    assert (again.route, again.changed, again.requests) == ("current", False, 1)
    assert [s.path for s in misbehaving.seen] == ["/tidings/head.json"]
    assert {p: p.stat().st_mtime_ns for p in dest.rglob("*")} == before


def test_a_file_that_somebody_changed_is_put_right(
    repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    dest = tmp_path / "dest"
    fetch(misbehaving.url, dest)
    victim = next(dest.glob("repodata/*primary*"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    gone = next(dest.glob("repodata/*updateinfo*"))
    gone.unlink()
    assert fetch(misbehaving.url, dest).changed
    assert tree(dest) == tree(repo.root)


def test_a_plain_download_is_a_base(misbehaving: Misbehaving, tmp_path: Path) -> None:
    repo = Repository.at(misbehaving.root)
    dest = tmp_path / "dest"
    shutil.copytree(repo.root / "repodata", dest / "repodata")
    repo.advance()
    result = fetch(misbehaving.url, dest)
    assert (result.route, result.requests) == ("delta", 2)
    assert tree(dest) == tree(repo.root)


def test_a_chain_of_steps(repo: Repository, misbehaving: Misbehaving, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    fetch(misbehaving.url, dest)
    for _ in range(4):
        repo.advance()
    result = fetch(misbehaving.url, dest)
    assert result.route == "delta"
    assert result.requests <= 5
    assert tree(dest) == tree(repo.root)
    assert left_over(dest) == set()


def test_seeds_of_every_kind(misbehaving: Misbehaving, tmp_path: Path) -> None:
    repo = Repository.at(misbehaving.root)
    shutil.copytree(repo.root / "repodata", tmp_path / "cache" / "updates-1234" / "repodata")
    shutil.copytree(repo.root / "repodata", tmp_path / "loose")
    (tmp_path / "loose" / "repomd.xml").unlink()
    repo.advance()
    for name in ("cache", "loose"):
        dest = tmp_path / f"dest-{name}"
        result = fetch(misbehaving.url, dest, seeds=(tmp_path / name,))
        assert result.route == "delta", name
        assert tree(dest) == tree(repo.root)
    same = fetch(misbehaving.url, tmp_path / "third", seeds=(tmp_path / "dest-cache",))
    assert same.route == "current"
    assert tree(tmp_path / "third") == tree(repo.root)
    with pytest.raises(InputError):
        fetch(misbehaving.url, tmp_path / "fourth", seeds=(tmp_path / "nowhere",))


def test_a_base_that_the_head_does_not_know_goes_by_chunks(
    misbehaving: Misbehaving, tmp_path: Path
) -> None:
    made = packages(3000)
    old = tmp_path / "old"
    rpm_md(old, made, codec="zst")
    repo = Repository(misbehaving.root, made=made, codecs={"primary": "zst", "other": "zst"})
    repo.change(0.002)
    repo.publish()
    dest = copy(old, tmp_path / "dest")
    result = fetch(misbehaving.url, dest)
    assert tree(dest) == tree(repo.root)
    routes = {f.type: f.route for f in result.files}
    assert routes["primary"] == "chunks"
    primary = next(f for f in result.files if f.type == "primary")
    assert primary.bytes < primary.size / 2


@pytest.mark.parametrize("route", ["delta", "chunks", "full"])
def test_forced_routes(
    route: str, repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    dest = tmp_path / "dest"
    fetch(misbehaving.url, dest)
    with rich_in_frames():
        repo.advance()
    fresh = copy(dest, tmp_path / "other", state=False)
    result = fetch(misbehaving.url, fresh, route=route)
    assert route in {f.route for f in result.files if f.type == "primary"}
    assert tree(fresh) == tree(repo.root)
    from_nothing = tmp_path / "nothing"
    fetch(misbehaving.url, from_nothing, route=route)
    assert tree(from_nothing) == tree(repo.root)


def test_types(repo: Repository, misbehaving: Misbehaving, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    result = fetch(misbehaving.url, dest, types=("primary", "group"))
    assert {f.type for f in result.files} == {"primary", "group_gz", "repomd"}
    assert set(tree(dest)) < set(tree(repo.root))
    again = fetch(misbehaving.url, dest, types=("primary", "group"))
    assert not again.changed
    more = fetch(misbehaving.url, dest)
    assert more.changed
    assert tree(dest) == tree(repo.root)
    # What is not asked for stays while it is right, and goes when it is not.
    fetch(misbehaving.url, dest, types=("primary",))
    assert tree(dest) == tree(repo.root)
    repo.advance()
    fetch(misbehaving.url, dest, types=("primary",))
    assert tree(dest).items() < tree(repo.root).items()
    with pytest.raises(InputError) as failure:
        fetch(misbehaving.url, dest, types=("nonsense",))
    assert failure.value.code == "unknown-type"


def test_apt(misbehaving: Misbehaving, tmp_path: Path) -> None:
    repo = Repository.at(misbehaving.root, kind="apt")
    dest = tmp_path / "dest"
    first = fetch(misbehaving.url, dest)
    assert tree(dest) == tree(repo.root)
    packages_gz = sum(f.size for f in first.files if f.path.endswith(".gz"))
    assert first.bytes_received < first.bytes_full  # Packages follow from Packages.gz
    assert first.bytes_received > packages_gz / 2
    for _ in range(2):
        repo.advance()
        result = fetch(misbehaving.url, dest)
        assert tree(dest) == tree(repo.root)
        assert (result.route, result.requests) == ("delta", 2)


def test_apt_lists_what_the_tree_lacks(misbehaving: Misbehaving, tmp_path: Path) -> None:
    repo = Repository(misbehaving.root, "apt", packages(60))
    repo.write(present=["amd64"])
    repo.publish()
    for name, route in (("head", "auto"), ("mirror", "full")):
        dest = tmp_path / name
        fetch(misbehaving.url, dest, route=route)
        assert tree(dest) == tree(repo.root)


@pytest.mark.parametrize("lie", ["left out", "misnamed"])
def test_apt_gives_up_no_file_on_the_heads_word(
    lie: str, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    repo = Repository.at(misbehaving.root, kind="apt")
    dest = tmp_path / "dest"
    fetch(misbehaving.url, dest)
    repo.advance()
    path = repo.root / "tidings" / "head.json"
    head = json.loads(path.read_bytes())
    victim = next(f for f in head["files"] if f["path"].endswith("/Packages"))
    if lie == "left out":
        head["files"].remove(victim)
    else:
        victim["path"] = victim["path"].replace("Packages", "Pabkages")
    path.write_text(json.dumps(head, separators=(",", ":")))
    fetch(misbehaving.url, dest)
    assert tree(dest) == tree(repo.root)


def test_apt_from_nothing_with_a_head_that_names_nothing(
    misbehaving: Misbehaving, tmp_path: Path
) -> None:
    repo = Repository.at(misbehaving.root, kind="apt")
    path = repo.root / "tidings" / "head.json"
    head = json.loads(path.read_bytes())
    mains = ("InRelease", "Release", "Release.gpg")
    head["files"] = [f for f in head["files"] if f["path"] in mains]
    path.write_text(json.dumps(head, separators=(",", ":")))
    fetch(misbehaving.url, tmp_path / "dest")
    assert tree(tmp_path / "dest") == tree(repo.root)


def test_a_delta_builds_on_what_was_downloaded_whole(
    misbehaving: Misbehaving, tmp_path: Path
) -> None:
    repo = Repository.at(misbehaving.root, kind="apt", steps=2)
    path = repo.root / "tidings" / "head.json"
    head = decode(path.read_bytes())
    edges = tuple(e for e in head.edges if e.track != "release")
    path.write_bytes(encode(replace(head, edges=edges)))
    dest, notes = tmp_path / "dest", Notes()
    result = fetch(misbehaving.url, dest, notes=notes)
    routes = {f.path: f.route for f in result.files}
    assert (routes["Release"], routes["InRelease"]) == ("full", "delta")
    assert (notes.texts, result.fallback_reason) == ([], None)
    assert tree(dest) == tree(repo.root)


def test_without_tidings(misbehaving: Misbehaving, tmp_path: Path) -> None:
    repo = Repository.at(misbehaving.root)
    shutil.rmtree(repo.root / "tidings")
    dest = tmp_path / "dest"
    result = fetch(misbehaving.url, dest)
    assert (result.route, result.fallback_reason) == ("full", "no-tidings")
    assert tree(dest) == tree(repo.root)
    again = fetch(misbehaving.url, dest)
    assert not again.changed
    assert tree(dest) == tree(repo.root)


def test_nothing_there_at_all(misbehaving: Misbehaving, tmp_path: Path) -> None:
    with pytest.raises(NetworkError) as failure:
        fetch(misbehaving.url, tmp_path / "dest")
    assert failure.value.code == "no-repository"
    assert tree(tmp_path / "dest") == {}


@pytest.mark.parametrize("checksum", ["sha1", "sha512"])
def test_other_checksums(checksum: str, misbehaving: Misbehaving, tmp_path: Path) -> None:
    repo = Repository(misbehaving.root, made=packages(100))
    repo.write(checksum=checksum)
    repo.publish()
    dest = tmp_path / "dest"
    fetch(misbehaving.url, dest)
    assert tree(dest) == tree(repo.root)
    repo.change(checksum=checksum)
    repo.publish()
    result = fetch(misbehaving.url, copy(dest, tmp_path / "plain", state=False))
    assert result.route == "delta"
    assert tree(tmp_path / "plain") == tree(repo.root)
    full = fetch(misbehaving.url, copy(dest, tmp_path / "full", state=False), route="full")
    assert full.route == "full"
    assert tree(tmp_path / "full") == tree(repo.root)


def test_a_new_wrapping_downloads_no_content(misbehaving: Misbehaving, tmp_path: Path) -> None:
    repo = Repository(misbehaving.root, made=packages(400))
    repo.write(codec="gz")
    repo.publish()
    dest = tmp_path / "dest"
    fetch(misbehaving.url, dest)
    repo.step += 1
    repo.write(codec="zst")
    repo.publish()
    result = fetch(misbehaving.url, dest)
    assert tree(dest) == tree(repo.root)
    assert {f.route for f in result.files if f.type == "primary"} == {"current"}
    assert result.bytes_received < 8000


def test_signed_repositories_stay_signed(misbehaving: Misbehaving, tmp_path: Path) -> None:
    repo = Repository(misbehaving.root, made=packages(60))
    repo.write(asc=b"-----BEGIN PGP SIGNATURE-----\n", key=b"key")
    repo.publish()
    dest = tmp_path / "dest"
    fetch(misbehaving.url, dest)
    assert tree(dest) == tree(repo.root)
    repo.change()
    repo.publish()
    before = tree(dest)
    with pytest.raises(RollbackError) as failure:
        fetch(misbehaving.url, dest)
    assert failure.value.code == "unsigned"
    assert tree(dest) == before
    fetch(misbehaving.url, dest, trust=TrustSettings(allow_unsigned=True))
    assert tree(dest) == tree(repo.root)


def test_an_older_publish_is_refused(misbehaving: Misbehaving, tmp_path: Path) -> None:
    repo = Repository.at(misbehaving.root, steps=2)
    older = tmp_path / "older"
    shutil.copytree(repo.root, older)
    repo.advance()
    dest = tmp_path / "dest"
    fetch(misbehaving.url, dest)
    with Misbehaving(older) as server:
        before = tree(dest)
        with pytest.raises(RollbackError):
            fetch(server.url, dest)
        with pytest.raises(RollbackError):
            fetch(server.url, dest, route="full")
        with pytest.raises(RollbackError):
            fetch(server.url, copy(dest, tmp_path / "plain", state=False))
        assert tree(dest) == before
        fetch(server.url, dest, trust=TrustSettings(allow_older=True))
        assert tree(dest) == tree(older)


def test_an_expected_hash(repo: Repository, misbehaving: Misbehaving, tmp_path: Path) -> None:
    import hashlib

    digest = hashlib.sha256((repo.root / "repodata/repomd.xml").read_bytes()).hexdigest()
    result = fetch(misbehaving.url, tmp_path / "a", trust=TrustSettings(repomd_sha256=digest))
    assert result.trust == "sha256"
    # The publish runs behind: what the caller wants is the mirror's own.
    repo.change()
    digest = hashlib.sha256((repo.root / "repodata/repomd.xml").read_bytes()).hexdigest()
    result = fetch(misbehaving.url, tmp_path / "a", trust=TrustSettings(repomd_sha256=digest))
    assert (result.trust, result.fallback_reason) == ("sha256", "wrong-sha256")
    assert tree(tmp_path / "a") == tree(repo.root)


def test_other_peoples_files(repo: Repository, misbehaving: Misbehaving, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    dest.mkdir()
    (dest / "mine.txt").write_text("mine")
    with pytest.raises(InputError) as failure:
        fetch(misbehaving.url, dest)
    assert failure.value.code == "needs-adopt"
    assert [p.name for p in dest.iterdir()] == ["mine.txt"]
    fetch(misbehaving.url, dest, adopt=True)
    (dest / "repodata" / "note").write_text("mine too")
    repo.advance()
    fetch(misbehaving.url, dest)
    expected = tree(repo.root) | {"mine.txt": b"mine", "repodata/note": b"mine too"}
    assert tree(dest) == expected


def test_a_lock(repo: Repository, misbehaving: Misbehaving, tmp_path: Path) -> None:
    with Destination(tmp_path / "dest"), pytest.raises(LockedError):
        fetch(misbehaving.url, tmp_path / "dest")
    fetch(misbehaving.url, tmp_path / "dest")


def test_symlinks(repo: Repository, misbehaving: Misbehaving, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "repomd.xml").write_text("precious")
    for link, target in (("repodata", elsewhere), (".tidings", elsewhere)):
        dest = tmp_path / f"dest-{link}"
        dest.mkdir()
        (dest / link).symlink_to(target)
        with pytest.raises(InputError) as failure:
            fetch(misbehaving.url, dest, adopt=True)
        assert failure.value.code == "symlink"
    dest = tmp_path / "dest-file"
    (dest / "repodata").mkdir(parents=True)
    (dest / "repodata/repomd.xml").symlink_to(elsewhere / "repomd.xml")
    with pytest.raises(InputError):
        fetch(misbehaving.url, dest, adopt=True)
    assert [p.name for p in elsewhere.iterdir()] == ["repomd.xml"]
    assert (elsewhere / "repomd.xml").read_text() == "precious"
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    fetch(misbehaving.url, tmp_path / "link")
    assert tree(real) == tree(repo.root)


def test_modes(repo: Repository, misbehaving: Misbehaving, tmp_path: Path) -> None:
    fetch(misbehaving.url, tmp_path / "dest")
    for path in (tmp_path / "dest" / "repodata").rglob("*"):
        assert path.stat().st_mode & 0o777 == 0o644


def test_a_plan_writes_nothing_and_is_right(
    repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    dest = tmp_path / "dest"
    fetch(misbehaving.url, dest)
    repo.advance()
    before = {p: p.stat().st_mtime_ns for p in dest.rglob("*")}
    misbehaving.heal()
    with Remote([misbehaving.url]) as remote:
        planned = plan(SyncOptions(dest), remote)
    assert [s.path for s in misbehaving.seen] == ["/tidings/head.json"]
    assert {p: p.stat().st_mtime_ns for p in dest.rglob("*")} == before
    primary = next(f for f in planned.files if f.type == "primary")
    assert primary.route == "delta"
    assert primary.alternatives["full"] == (primary.size, 1)
    assert primary.bytes < primary.alternatives["full"][0]
    result = fetch(misbehaving.url, dest)
    assert result.requests == planned.requests + 1
    assert sum(f.bytes for f in result.files) == sum(f.bytes for f in planned.files)
    assert json.loads(json.dumps(planned.to_json()))["files"]
    with Remote([misbehaving.url]) as remote:
        empty = plan(SyncOptions(tmp_path / "new"), remote)
    assert empty.changed
    assert not (tmp_path / "new").exists()


def test_two_mirrors_of_which_one_lags(
    repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    lagging = tmp_path / "lagging"
    shutil.copytree(repo.root, lagging)
    dest = tmp_path / "dest"
    fetch(misbehaving.url, dest)
    repo.advance()
    shutil.copy(repo.root / "tidings/head.json", lagging / "tidings/head.json")
    with Misbehaving(lagging) as behind:
        result = fetch([behind.url, misbehaving.url], dest)
    assert result.route == "delta"
    assert tree(dest) == tree(repo.root)


def test_nginx_with_gzip_for_everything(servers: Servers, tmp_path: Path) -> None:
    repo = Repository.at(tmp_path / "www", steps=2)
    site = servers.nginx(repo.root, gzip=True)
    proxy = servers.caching_proxy(site.url, gzip=True, valid="1s")
    for number, url in enumerate((site.url, proxy.url)):
        dest = tmp_path / f"dest{number}"
        fetch(url, dest)
        assert tree(dest) == tree(repo.root)
    repo.advance()
    result = fetch(site.url, tmp_path / "dest0")
    assert (result.route, result.requests) == ("delta", 2)
    assert tree(tmp_path / "dest0") == tree(repo.root)


def test_the_delta_route_needs_no_chunker(
    repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    dest = tmp_path / "dest"
    fetch(misbehaving.url, dest)
    repo.advance()
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tidings_client.remote import Remote\n"
        "from tidings_client.sync import SyncOptions, sync\n"
        "with Remote([sys.argv[1]]) as remote:\n"
        "    result = sync(SyncOptions(Path(sys.argv[2])), remote)\n"
        "assert result.route == sys.argv[3], result\n"
        "print([m for m in ('fastcdc', 'blake3', 'tidings_chunkstore.deltamake',\n"
        "       'tidings_chunkstore.publisher', 'tidings_client.plan') if m in sys.modules])\n"
    )
    command = [sys.executable, "-c", code, misbehaving.url, str(dest)]
    ran = subprocess.run([*command, "delta"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "['tidings_client.plan']"
    ran = subprocess.run([*command, "current"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_notes_say_what_went_another_way(
    repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    notes = Notes()
    misbehaving.fault(r"\.pack$", status=404)
    result = fetch(misbehaving.url, tmp_path / "dest", notes=notes)
    assert result.fallback_reason == "pack-missing"
    assert notes.texts


def test_the_timestamps_of_the_summary(
    repo: Repository, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    assert fetch(misbehaving.url, tmp_path / "dest").timestamp == START + 2 * DAY
