"""The log of what dnf's plugins saved."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from tidings_client.saved import caches, totals, updates

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def plugin() -> ModuleType:
    """What writes the log."""
    path = ROOT / "client" / "dnf-plugins" / "tidings_dnf.py"
    spec = importlib.util.spec_from_file_location("tidings_dnf_for_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def summary(received: int) -> dict[str, object]:
    return {
        "url": "https://user:secret@mirror.example.org/updates",
        "route": "delta",
        "bytes_received": received,
        "bytes_sent": 300,
        "requests": 2,
        "bytes_full": 50_000,
        "files": [{"type": "primary"}, {"type": "group"}, {"type": "repomd"}],
    }


def test_what_the_plugins_write_is_read(plugin: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "tidings"
    folder.mkdir()
    for received in (1000, 2000):
        plugin.record(str(folder), plugin.saved("updates", "dnf4", summary(received)))
    plugin.record(str(folder), plugin.saved("fedora", "dnf5", summary(5)))
    log = list(updates(tmp_path))
    assert [update.bytes for update in log] == [1300, 2300, 305]
    assert log[0].url == "https://mirror.example.org/updates"
    fedora, both = totals(log)
    assert (both.repo, both.updates, both.bytes, both.requests) == ("updates", 2, 3600, 4)
    assert (both.bytes_full, both.requests_full, both.saved) == (100_000, 4, 96_400)
    assert fedora.repo == "fedora"


def test_lines_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "tidings"
    folder.mkdir()
    good = {
        "v": 1, "time": 1, "repo": "a", "program": "dnf4", "url": "u",
        "bytes": 1, "requests": 1, "bytes_full": 9, "requests_full": 4,
    }  # fmt: skip
    bad = [
        b"{", b"[]", b"\xff", json.dumps(good | {"v": 2}).encode(),
        json.dumps(good | {"bytes": "1"}).encode(), json.dumps(good | {"bytes": True}).encode(),
        json.dumps(good | {"repo": 3}).encode(),
    ]  # fmt: skip
    (folder / "saved.jsonl").write_bytes(b"\n".join([*bad, json.dumps(good).encode()]) + b"\n")
    assert [update.repo for update in updates(tmp_path)] == ["a"]


def test_caches_are_those_with_a_log(tmp_path: Path) -> None:
    user = tmp_path / "home" / ".cache" / "libdnf5"
    (user / "tidings").mkdir(parents=True)
    temporary = tmp_path / "tmp"
    (temporary / "dnf-alice-x1" / "tidings").mkdir(parents=True)
    assert caches(tmp_path / "home", temporary) == []
    (user / "tidings" / "saved.jsonl").write_text("")
    (temporary / "dnf-alice-x1" / "tidings" / "saved.jsonl").write_text("")
    found = caches(tmp_path / "home", temporary)
    assert found[-2:] == [user, temporary / "dnf-alice-x1"]


def test_a_mirror_is_remembered_for_about_a_week(plugin: ModuleType, tmp_path: Path) -> None:
    url = "https://mirror.example.org/updates"
    memory = plugin.Memory(str(tmp_path), now=1000.0)
    assert not memory.skips(url)
    memory.learn(url, "missing")
    for days, skips in ((1, True), (5, True), (9, False)):
        assert plugin.Memory(str(tmp_path), now=1000.0 + days * 86400).skips(url) == skips
    assert not plugin.Memory(str(tmp_path), now=1000.0).skips(url + "/other")


def test_a_host_that_hangs_is_left_alone_for_minutes(plugin: ModuleType, tmp_path: Path) -> None:
    memory = plugin.Memory(str(tmp_path), now=1000.0)
    memory.learn("https://mirror.example.org/updates", "hangs")
    other = "https://mirror.example.org/fedora"
    assert plugin.Memory(str(tmp_path), now=1060.0).skips(other)
    assert not plugin.Memory(str(tmp_path), now=1000.0 + 3600).skips(other)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": "b"}', '{"a": null}', '{"a": 1e300}'])
def test_a_broken_memory_remembers_nothing(plugin: ModuleType, tmp_path: Path, text: str) -> None:
    (tmp_path / "mirrors.json").write_text(text)
    memory = plugin.Memory(str(tmp_path), now=1000.0)
    assert not memory.skips("a")
    memory.learn("b", "missing")
    assert plugin.Memory(str(tmp_path), now=1000.0).skips("b")


def test_whom_to_ask(plugin: ModuleType, tmp_path: Path) -> None:
    config = tmp_path / "tidings.conf"
    config.write_text("[repos]\nupdates = https://m.example.org/$basearch/\nrawhide*=off\n")
    settings = plugin.Settings(str(config))
    variables = {"basearch": "x86_64"}

    def ask(repo_id: str, **what: object) -> object:
        return plugin.Source(repo_id, **what).candidates(settings, variables)

    assert ask("updates") == (["https://m.example.org/x86_64"], False)
    with pytest.raises(plugin.Quiet):
        ask("rawhide-modular", baseurls=["https://a.example.org"])
    urls = ["ftp://x", "http://a.example.org/r/", "https://b.example.org", "https://c.example.org"]
    assert ask("plain", baseurls=urls) == (
        ["http://a.example.org/r", "https://b.example.org"],
        True,
    )
    with pytest.raises(plugin.Quiet):
        ask("none")


METALINK = """<metalink xmlns="http://www.metalinker.org/"><files><file name="repomd.xml">
<resources>
<url protocol="https" preference="90">https://b.example.org/u/repodata/repomd.xml</url>
<url protocol="http" preference="100">http://a.example.org/u/repodata/repomd.xml</url>
<url protocol="rsync" preference="100">rsync://a.example.org/u/repodata/repomd.xml</url>
<url protocol="https" preference="95">https://c.example.org/u/repodata/repomd.xml</url>
<url protocol="https" preference="10">https://d.example.org/u/repodata/repomd.xml</url>
</resources></file></files></metalink>"""


def test_the_first_two_https_mirrors_of_a_metalink(plugin: ModuleType, tmp_path: Path) -> None:
    settings = plugin.Settings(str(tmp_path / "none.conf"))
    source = plugin.Source("u", metalink="https://x.example.org/m", live=str(tmp_path))
    with pytest.raises(plugin.Quiet):  # none on disk: no request is made for one
        source.candidates(settings)
    (tmp_path / "metalink.xml").write_text(METALINK)
    urls, own = source.candidates(settings)
    assert (urls, own) == (["https://c.example.org/u", "https://b.example.org/u"], True)
    (tmp_path / "metalink.xml").write_text("<!DOCTYPE x>" + METALINK)
    with pytest.raises(plugin.Quiet):
        source.candidates(settings)


def test_mirrors_that_repomd_announces(plugin: ModuleType, tmp_path: Path) -> None:
    settings = plugin.Settings(str(tmp_path / "none.conf"))
    (tmp_path / "repodata").mkdir()
    (tmp_path / "repodata" / "repomd.xml").write_text(
        '<repomd xmlns="http://linux.duke.edu/metadata/repo"><tags><content>x</content>'
        "<content>tidings</content><content>tidings+https://t.example.org/u/</content></tags></repomd>"
    )
    source = plugin.Source("u", ["https://a.example.org"], live=str(tmp_path))
    assert source.candidates(settings) == (["https://t.example.org/u"], False)


def test_a_proxy_as_a_url(plugin: ModuleType) -> None:
    assert plugin.proxy("_none_", "", "") == ""
    assert plugin.proxy("http://p:3128", "", "") == "http://p:3128"
    assert plugin.proxy("http://p:3128", "a", "b@/") == "http://a:b%40%2F@p:3128"


def test_a_folder_is_exchanged_in_one_step(plugin: ModuleType, tmp_path: Path) -> None:
    for name in ("scratch", "live"):
        (tmp_path / name / "repodata").mkdir(parents=True)
        (tmp_path / name / "repodata" / "repomd.xml").write_text(name)
    (tmp_path / "scratch" / "metalink.xml").write_text("new")
    (tmp_path / "scratch" / "pubring").symlink_to(tmp_path)
    plugin.move_in(
        str(tmp_path / "scratch"), str(tmp_path / "live"), ("pubring", "metalink.xml", "repodata")
    )
    assert (tmp_path / "live/repodata/repomd.xml").read_text() == "scratch"
    assert (tmp_path / "live/metalink.xml").read_text() == "new"
    assert not (tmp_path / "live/pubring").exists()
    plugin.clear(str(tmp_path / "scratch"))
    assert list((tmp_path / "scratch").iterdir()) == []
