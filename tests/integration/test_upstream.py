"""Looks at real origins: what a look costs, what proves it, what is refused, what stays."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from support.metalinks import metalink
from support.repos import DAY, START, packages
from support.servers import Fault, Misbehaving, Servers
from support.syncing import HASTY, Notes, Repository, tree
from support.system import require
from tidings_chunkstore.errors import NetworkError, RollbackError, VerificationError
from tidings_server import upstream
from tidings_server.settings import UpstreamSettings
from tidings_server.upstream import Fetched, Source, fetch

REPOMD = "repodata/repomd.xml"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "_PAUSES", (0.0, 0.05))


class Follower:
    """A folder that follows one upstream."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.source = Source("u/r", UpstreamSettings(**settings))  # type: ignore[arg-type]
        self.dest = folder / "dest"
        self.memory = folder / "memory"
        self.notes = Notes()

    def look(self) -> Fetched:
        return fetch(
            self.source, self.dest, memory=self.memory, progress=self.notes, settings=HASTY
        )

    def tree(self) -> dict[str, bytes]:
        return tree(self.dest)

    def remembered(self) -> dict[str, object]:
        value: dict[str, object] = json.loads((self.memory / "look.json").read_bytes())
        return value

    def forget(self, **facts: object) -> None:
        (self.memory / "look.json").write_text(json.dumps(self.remembered() | facts))


def plain(root: Path, count: int = 60) -> Repository:
    """A repository that nobody publishes with Tidings."""
    root.mkdir(parents=True, exist_ok=True)
    made = Repository(root, made=packages(count))
    made.write()
    return made


# -- what a look costs -----------------------------------------------------------------------------


@pytest.mark.tools
def test_no_news_from_a_plain_host_costs_one_304(servers: Servers, tmp_path: Path) -> None:
    repo = plain(tmp_path / "www/r")
    nginx = servers.nginx(tmp_path / "www")
    here = Follower(tmp_path, urls=(f"{nginx.url}/r/",))
    first = here.look()
    assert (first.changed, first.route, first.trust) == (True, "full", "transport")
    assert first.base == f"{nginx.url}/r/"
    assert first.timestamp == START
    assert here.tree() == tree(repo.root)
    assert not here.look().changed  # learns the validators
    count = len(nginx.requests())
    quiet = here.look()
    (asked,) = nginx.requests(count)
    assert (asked.uri, asked.status) == (f"/r/{REPOMD}", 304)
    assert (quiet.changed, quiet.route, quiet.requests) == (False, "current", 1)
    assert quiet.bytes_received < 250
    assert (quiet.base, quiet.trust, quiet.timestamp) == (first.base, "transport", START)
    assert quiet.bytes_full == first.bytes_full > 0


@pytest.mark.tools
def test_news_from_a_plain_host_is_only_what_changed(servers: Servers, tmp_path: Path) -> None:
    repo = plain(tmp_path / "www/r")
    nginx = servers.nginx(tmp_path / "www")
    here = Follower(tmp_path, urls=(f"{nginx.url}/r/",))
    here.look()
    # The same packages with a new group file: primary, filelists and other stay as they are.
    repo.write(extra={"news": ("news.txt", b"something new")})
    count = len(nginx.requests())
    found = here.look()
    assert found.changed
    assert here.tree() == tree(repo.root)
    files = [r.uri for r in nginx.requests(count) if r.status == 200]
    assert [uri for uri in files if "primary" in uri or "filelists" in uri] == []
    assert not [uri for uri in files if "tidings" in uri]  # there was no head before, either


@pytest.mark.tools
def test_an_upstream_with_a_head_costs_a_304_and_a_delta(servers: Servers, tmp_path: Path) -> None:
    repo = Repository.at(tmp_path / "www/r")
    nginx = servers.nginx(tmp_path / "www")
    here = Follower(tmp_path, urls=(f"{nginx.url}/r/",))
    here.look()
    quiet = here.look()
    assert (quiet.changed, quiet.requests) == (False, 1)
    assert quiet.bytes_received < 250
    assert quiet.timestamp == START
    repo.advance()
    found = here.look()
    assert (found.changed, found.route) == (True, "delta")
    assert found.bytes_received < found.bytes_full / 5
    assert here.tree() == tree(repo.root)


def test_a_head_that_comes_later_is_found_within_a_day(
    misbehaving: Misbehaving, tmp_path: Path
) -> None:
    repo = plain(misbehaving.root)
    here = Follower(tmp_path, urls=(misbehaving.url,))
    here.look()
    repo.publish()
    here.look()
    assert here.remembered()["head"] is False
    here.forget(thorough=here.remembered()["thorough"] - upstream.THOROUGH - 1)  # type: ignore[operator]
    here.look()
    assert here.remembered()["head"] is True
    repo.advance()
    assert here.look().route == "delta"


def test_an_unsure_answer_about_the_head_is_not_remembered(
    misbehaving: Misbehaving, tmp_path: Path
) -> None:
    Repository.at(misbehaving.root, count=30)
    misbehaving.fault("head.json", status=500)
    here = Follower(tmp_path, urls=(misbehaving.url,))
    assert here.look().changed
    misbehaving.heal()
    here.look()
    assert here.remembered()["head"] is True


@pytest.mark.parametrize("memory", [b"", b"[]", b"{}", b'{"question": 1}', b"\xff", b"{" * 5000])
def test_a_broken_memory_costs_requests_and_nothing_else(
    memory: bytes, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    repo = plain(misbehaving.root, 10)
    here = Follower(tmp_path, urls=(misbehaving.url,))
    here.look()
    (here.memory / "look.json").write_bytes(memory)
    assert not here.look().changed
    assert here.tree() == tree(repo.root)


@pytest.mark.parametrize("head", [True, False])
def test_a_damaged_folder_is_mended_though_nothing_is_new(
    head: bool, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    repo = Repository.at(misbehaving.root, count=30) if head else plain(misbehaving.root)
    here = Follower(tmp_path, urls=(misbehaving.url,))
    for _ in range(3):
        here.look()
    victim = next((here.dest / "repodata").glob("*primary*"))
    victim.write_bytes(b"damaged")
    here.look()
    assert here.tree() == tree(repo.root)


def test_packages_and_all_else_beside_the_metadata_stay(
    misbehaving: Misbehaving, tmp_path: Path
) -> None:
    repo = plain(misbehaving.root)
    here = Follower(tmp_path, urls=(misbehaving.url,))
    (here.dest / "Packages/a").mkdir(parents=True)
    (here.dest / "Packages/a/a-1.rpm").write_bytes(b"rpm")
    (here.dest / "repodata").mkdir()
    (here.dest / "repodata/mine.txt").write_bytes(b"mine")
    here.look()
    repo.change()
    here.look()
    now = here.tree()
    assert now.pop("Packages/a/a-1.rpm") == b"rpm"
    assert now.pop("repodata/mine.txt") == b"mine"
    assert now == tree(repo.root)


def test_an_apt_suite(misbehaving: Misbehaving, tmp_path: Path) -> None:
    repo = Repository(misbehaving.root, "apt", packages(40))
    repo.write()
    here = Follower(tmp_path, urls=(misbehaving.url,))
    assert here.look().timestamp == START
    here.look()
    quiet = here.look()
    assert (quiet.changed, quiet.requests) == (False, 1)
    repo.change()
    assert here.look().changed
    assert here.tree()["InRelease"] == (misbehaving.root / "InRelease").read_bytes()


# -- several mirrors -------------------------------------------------------------------------------


def test_the_preferred_url_is_asked_again_once_it_is_back(
    misbehaving: Misbehaving, tmp_path: Path
) -> None:
    plain(misbehaving.root / "a")
    shutil.copytree(misbehaving.root / "a", misbehaving.root / "b")
    a, b = f"{misbehaving.url}/a/", f"{misbehaving.url}/b/"
    here = Follower(tmp_path, urls=(a, b))
    misbehaving.fault("^/a/", status=503)
    assert here.look().base == b
    assert not here.look().changed
    misbehaving.heal()
    assert here.look().base == a


def test_a_mirrorlist(misbehaving: Misbehaving, tmp_path: Path) -> None:
    repo = plain(misbehaving.root / "a")
    bases = [f"{misbehaving.url}/none/", f"{misbehaving.url}/a/"]
    (misbehaving.root / "list").write_text("# a list\n" + "\n".join(bases))
    here = Follower(tmp_path, mirrorlist=f"{misbehaving.url}/list")
    found = here.look()
    assert (found.changed, found.base) == (True, bases[1])
    here.look()
    quiet = here.look()
    assert (quiet.changed, quiet.requests) == (False, 2)  # the list and repomd.xml, two 304
    repo.change()
    assert here.look().changed
    assert here.tree() == tree(repo.root)


# -- metalinks -------------------------------------------------------------------------------------


class Mirrors:
    """Mirrors of one repository in folders of one server, and its metalink."""

    def __init__(self, server: Misbehaving, *names: str) -> None:
        self.server = server
        self.names = names
        self.writes = 0
        self.origin = plain(server.root / "origin", 30)
        self.history = [(self.main(), self.time())]
        for name in names:
            self.update(name)
        self.write()

    def main(self) -> bytes:
        return (self.origin.root / REPOMD).read_bytes()

    def time(self) -> int:
        return START + self.origin.step * DAY

    def advance(self) -> None:
        self.origin.change(0.1)
        self.history.insert(0, (self.main(), self.time()))
        self.write()

    def update(self, name: str) -> None:
        if name == "origin":
            return
        shutil.rmtree(self.server.root / name, ignore_errors=True)
        shutil.copytree(self.origin.root, self.server.root / name)

    def write(self, **options: object) -> None:
        (newest, when), *older = self.history
        options.setdefault("timestamp", when)
        bases = [f"{self.server.url}/{name}" for name in self.names]
        text = metalink(newest, bases, older, **options)  # type: ignore[arg-type]
        file = self.server.root / "metalink"
        file.write_bytes(text)
        self.writes += 1
        os.utime(file, (START + self.writes, START + self.writes))

    @property
    def url(self) -> str:
        return f"{self.server.url}/metalink?repo=r&arch=x86_64"


def test_no_news_of_a_metalink_is_one_304(misbehaving: Misbehaving, tmp_path: Path) -> None:
    mirrors = Mirrors(misbehaving, "a", "b")
    here = Follower(tmp_path, metalink=mirrors.url)
    first = here.look()
    assert (first.trust, first.base) == ("metalink", f"{misbehaving.url}/a/")
    misbehaving.heal()
    quiet = here.look()
    assert (quiet.changed, quiet.requests, quiet.trust) == (False, 1, "metalink")
    assert quiet.base == first.base
    assert [seen.path for seen in misbehaving.seen] == ["/metalink?repo=r&arch=x86_64"]
    assert quiet.bytes_received < 300
    assert "if-none-match" in misbehaving.seen[0].headers


def test_a_mirror_that_is_behind_is_passed_over(misbehaving: Misbehaving, tmp_path: Path) -> None:
    mirrors = Mirrors(misbehaving, "a", "b")
    here = Follower(tmp_path, metalink=mirrors.url)
    here.look()
    mirrors.advance()
    mirrors.update("b")
    found = here.look()
    assert (found.changed, found.base) == (True, f"{misbehaving.url}/b/")
    assert here.tree() == tree(mirrors.origin.root)
    assert not any("newest version" in text for text in here.notes.texts)


def test_all_mirrors_behind_nothing_changes_and_it_is_told(
    misbehaving: Misbehaving, tmp_path: Path
) -> None:
    mirrors = Mirrors(misbehaving, "a")
    here = Follower(tmp_path, metalink=mirrors.url)
    here.look()
    before = here.tree()
    mirrors.advance()
    assert not here.look().changed
    assert here.tree() == before
    assert here.notes.texts == ["no mirror has the newest version of the metalink yet"]
    mirrors.update("a")
    assert here.look().changed
    assert here.tree() == tree(mirrors.origin.root)


def test_an_alternate_is_taken_where_it_is_news(misbehaving: Misbehaving, tmp_path: Path) -> None:
    mirrors = Mirrors(misbehaving, "a")
    here = Follower(tmp_path, metalink=mirrors.url)
    here.look()
    mirrors.advance()
    mirrors.update("a")
    middle = tree(mirrors.origin.root)
    mirrors.advance()
    found = here.look()
    assert (found.changed, found.timestamp, found.trust) == (True, START + DAY, "metalink")
    assert here.tree() == middle


def test_an_alternate_never_replaces_a_newer_state(
    misbehaving: Misbehaving, tmp_path: Path
) -> None:
    """Mirror b has the newest, then only a answers, which is behind."""
    mirrors = Mirrors(misbehaving, "a", "b")
    here = Follower(tmp_path, metalink=mirrors.url)
    mirrors.advance()
    mirrors.update("b")
    here.look()
    newest = here.tree()
    misbehaving.fault("^/b/", status=503)
    here.forget(thorough=0.0)  # else the metalink alone says that nothing is new
    with pytest.raises((VerificationError, NetworkError)):
        here.look()
    assert here.tree() == newest


def test_a_metalink_that_is_behind_is_refused(misbehaving: Misbehaving, tmp_path: Path) -> None:
    mirrors = Mirrors(misbehaving, "a")
    here = Follower(tmp_path, metalink=mirrors.url)
    old_link, old_mirror = (misbehaving.root / "metalink").read_bytes(), tmp_path / "old"
    shutil.copytree(misbehaving.root / "a", old_mirror)
    mirrors.advance()
    mirrors.update("a")
    here.look()
    newest = here.tree()
    (misbehaving.root / "metalink").write_bytes(old_link)
    shutil.rmtree(misbehaving.root / "a")
    shutil.copytree(old_mirror, misbehaving.root / "a")
    with pytest.raises(RollbackError) as caught:
        here.look()
    assert caught.value.code == "older"
    assert here.tree() == newest


@pytest.mark.parametrize("hashes", [("sha256",), ("sha512",)])
def test_a_repomd_that_no_hash_allows_is_refused(
    hashes: tuple[str, ...], misbehaving: Misbehaving, tmp_path: Path
) -> None:
    mirrors = Mirrors(misbehaving, "a", "b")
    mirrors.write(hashes=hashes)
    here = Follower(tmp_path, metalink=mirrors.url)
    assert here.look().trust == "metalink"
    before = here.tree()
    mirrors.advance()
    newest = mirrors.history[0]
    mirrors.history = [(b"<repomd>another</repomd>", newest[1])]
    mirrors.write(hashes=hashes)
    for name in ("a", "b"):
        mirrors.update(name)
    with pytest.raises(VerificationError, match="that the metalink allows") as caught:
        here.look()
    assert caught.value.code == "wrong-sha256"
    assert here.tree() == before


def test_a_metalink_and_a_head_agree_on_a_delta(misbehaving: Misbehaving, tmp_path: Path) -> None:
    mirrors = Mirrors(misbehaving, "origin")
    mirrors.origin.publish()
    here = Follower(tmp_path, metalink=mirrors.url)
    here.look()
    mirrors.advance()
    mirrors.origin.publish()
    found = here.look()
    assert (found.changed, found.trust, found.route) == (True, "metalink", "delta")
    mirrors.advance()  # its head is behind now: the mirror's own repomd.xml is the right one
    found = here.look()
    assert found.changed
    assert here.tree() == tree(mirrors.origin.root)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"<html>down for maintenance</html>", "metalink: its root is <html>"),
        (b"", "not XML"),
        (metalink(b"x", []), "names no mirror"),
    ],
)
def test_a_broken_metalink_is_the_networks_fault(
    text: bytes, says: str, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    mirrors = Mirrors(misbehaving, "a")
    here = Follower(tmp_path, metalink=mirrors.url)
    here.look()
    before = here.tree()
    (misbehaving.root / "metalink").write_bytes(text)
    with pytest.raises(NetworkError, match=says):
        here.look()
    assert here.tree() == before
    mirrors.write()
    assert not here.look().changed


def test_strangers_urls_lead_nowhere_private(misbehaving: Misbehaving, tmp_path: Path) -> None:
    """The upstream is on loopback, so loopback is allowed to its mirrors, and nothing else is."""
    mirrors = Mirrors(misbehaving, "a")
    port = misbehaving.port
    bad = [
        "http://10.0.0.1/u", "http://192.168.7.7/u", "http://169.254.169.254/latest", "http://0/u",
        "http://[fe80::1]/u", "http://[::ffff:10.0.0.1]/u", "http://167772161/u",
        "http://0xa.1/u", "http://[fd00::1]/u",
    ]  # fmt: skip
    for number, url in enumerate(bad):
        text = metalink(mirrors.main(), [url, f"http://localhost:{port}/a"], timestamp=START)
        (misbehaving.root / "metalink").write_bytes(text)
        here = Follower(tmp_path / str(number), metalink=mirrors.url)
        assert here.look().base == f"http://localhost:{port}/a/"
        (misbehaving.root / "metalink").write_bytes(metalink(mirrors.main(), [url]))
        alone = Follower(tmp_path / f"alone{number}", metalink=mirrors.url)
        with pytest.raises(NetworkError) as caught:
            alone.look()
        assert caught.value.code == "address"


def test_a_redirect_of_the_metalink_or_a_mirror_into_a_private_net(
    misbehaving: Misbehaving, tmp_path: Path
) -> None:
    mirrors = Mirrors(misbehaving, "a")
    moved = (("Location", "http://10.1.2.3/repodata/repomd.xml"),)
    for number, path in enumerate(("^/metalink", "^/a/")):
        misbehaving.heal()
        misbehaving.fault(path, status=302, headers=moved)
        with pytest.raises(NetworkError) as caught:
            Follower(tmp_path / str(number), metalink=mirrors.url).look()
        assert caught.value.code == "address"


def test_a_name_that_resolves_into_a_private_net(
    misbehaving: Misbehaving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrors = Mirrors(misbehaving, "a")
    real = socket.getaddrinfo

    def patched(host: object, *rest: object, **options: object) -> object:
        found = {"inside.test": "10.9.8.7", "here.test": "127.0.0.1"}.get(str(host), host)
        return real(found, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", patched)
    bases = ["http://inside.test/u", f"http://here.test:{misbehaving.port}/a"]
    (misbehaving.root / "metalink").write_bytes(metalink(mirrors.main(), bases))
    assert Follower(tmp_path, metalink=mirrors.url).look().base == f"{bases[1]}/"


def test_credentials_stay_with_their_origin(misbehaving: Misbehaving, tmp_path: Path) -> None:
    repo = plain(misbehaving.root / "a", 10)
    secret = misbehaving.url.replace("://", "://user:secret@")
    with Misbehaving(misbehaving.root) as other:
        misbehaving.fault(
            "primary",
            status=302,
            headers=(("Location", f"{other.url}/a/repodata/x"),),
        )
        here = Follower(tmp_path, urls=(f"{secret}/a/",))
        with pytest.raises(NetworkError):
            here.look()
        misbehaving.heal()
        found = here.look()
        assert found.base == f"{misbehaving.url}/a/"
        assert all("authorization" in seen.headers for seen in misbehaving.seen)
        assert other.seen
        assert not any("authorization" in seen.headers for seen in other.seen)
    assert here.tree() == tree(repo.root)
    kept = b"".join(p.read_bytes() for p in here.memory.iterdir())
    assert b"secret" not in kept


# -- upstreams that go wrong -----------------------------------------------------------------------


def test_half_synced_is_not_taken_and_healed_later(
    misbehaving: Misbehaving, tmp_path: Path
) -> None:
    repo = plain(misbehaving.root)
    here = Follower(tmp_path, urls=(misbehaving.url,))
    for _ in range(2):
        here.look()
    before = here.tree()
    repo.change()
    misbehaving.fault("filelists", status=404)
    with pytest.raises(NetworkError) as caught:
        here.look()
    assert caught.value.code == "missing"
    assert here.tree() == before
    misbehaving.heal()
    misbehaving.fault("filelists", flip_at=100)
    with pytest.raises(VerificationError):
        here.look()
    assert here.tree() == before
    misbehaving.heal()
    assert here.look().changed
    assert here.tree() == tree(repo.root)


def test_an_upstream_that_gets_older_is_refused(misbehaving: Misbehaving, tmp_path: Path) -> None:
    repo = plain(misbehaving.root)
    old = tmp_path / "old"
    shutil.copytree(repo.root / "repodata", old)
    repo.change()
    here = Follower(tmp_path, urls=(misbehaving.url,))
    here.look()
    newest = here.tree()
    shutil.rmtree(repo.root / "repodata")
    shutil.copytree(old, repo.root / "repodata")
    with pytest.raises(RollbackError) as caught:
        here.look()
    assert caught.value.code == "older"
    assert here.tree() == newest


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(status=403), Fault(body=b"<html>")])
def test_an_upstream_that_is_down_changes_nothing(
    fault: Fault, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    plain(misbehaving.root)
    here = Follower(tmp_path, urls=(misbehaving.url,))
    for _ in range(2):
        here.look()
    before = here.tree()
    misbehaving.fault("", fault)
    with pytest.raises((NetworkError, VerificationError)):
        here.look()
    assert here.tree() == before
    misbehaving.heal()
    assert not here.look().changed


@pytest.fixture(scope="module")
def signer() -> Iterator[Path]:
    """A home of gpg with one key, and that key in ``key.asc``."""
    gpg = require("gpg")
    require("gpgv")
    home = Path(tempfile.mkdtemp(prefix="tf-"))  # the agent's socket needs a short path
    base = [gpg, "--homedir", str(home), "--batch", "--yes", "--quiet", "--passphrase", ""]
    try:
        subprocess.run(
            [*base, "--pinentry-mode", "loopback", "--quick-gen-key", "up", "ed25519", "sign"],
            check=True,
            capture_output=True,
        )
        key = subprocess.run([*base, "--armor", "--export"], check=True, capture_output=True).stdout
        (home / "key.asc").write_bytes(key)
        yield home
    finally:
        subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=False)
        shutil.rmtree(home, ignore_errors=True)


def sign(home: Path, data: bytes) -> bytes:
    command = [
        "gpg",
        "--homedir",
        str(home),
        "--batch",
        "--yes",
        "--quiet",
        "--armor",
        "--detach-sign",
    ]
    return subprocess.run(command, input=data, check=True, capture_output=True).stdout


@pytest.mark.tools
def test_a_broken_signature_is_refused(
    signer: Path, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    repo = plain(misbehaving.root, 20)
    repo.write(asc=lambda data: sign(signer, data))
    here = Follower(tmp_path, urls=(misbehaving.url,), gpgkey=signer / "key.asc")
    assert here.look().trust == "gpg"
    before = here.tree()
    assert here.look().trust == "gpg"
    repo.change(asc=lambda data: sign(signer, data + b"x"))
    with pytest.raises(VerificationError) as caught:
        here.look()
    assert caught.value.code == "bad-signature"
    assert here.tree() == before
    repo.write()
    with pytest.raises(VerificationError) as caught:
        here.look()
    assert caught.value.code == "no-signature"
    repo.write(asc=lambda data: sign(signer, data))
    assert here.look().trust == "gpg"
    assert here.tree() == tree(repo.root)


def test_other_settings_ask_anew(misbehaving: Misbehaving, tmp_path: Path) -> None:
    repo = plain(misbehaving.root, 20)
    here = Follower(tmp_path, urls=(misbehaving.url,), types=("primary",))
    here.look()
    assert not any("filelists" in path for path in here.tree())
    here.look()
    here.source = replace(here.source, upstream=UpstreamSettings(urls=(misbehaving.url,)))
    assert here.look().changed
    assert here.tree() == tree(repo.root)
