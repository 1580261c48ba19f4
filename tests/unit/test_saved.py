"""The log of what dnf's plugins saved."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import pytest

from tidings_client.dnfdoctor import savings_lines, skipped_lines
from tidings_client.saved import caches, skipped, totals, updates

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


GOOD = {
    "v": 1, "time": 1, "repo": "a", "program": "dnf4", "url": "u",
    "bytes": 1, "requests": 1, "bytes_full": 9, "requests_full": 4,
}  # fmt: skip


def line(**members: object) -> bytes:
    return json.dumps(GOOD | members).encode()


@pytest.mark.parametrize(
    "bad",
    [b"{", b"[]", b"\xff", b"[" * 100_000, b'{"v":' * 3000, line(v=2), line(bytes="1"),
     line(bytes=True), line(repo=3), line(time=1e20), line(time=10**20), line(time=-1),
     line(time=253402300800), b'{"time":1e999}', line(bytes=10**30), line(requests=-1),
     line(bytes_full=1 << 54), line(requests_full=float("nan")), line(repo="\x1b[2J"),
     line(repo="a\nb"), line(url="\ud800"), line(repo="x" * 5000), line(url="y" * 20_000)],
    ids=range(23),
)  # fmt: skip
def test_lines_that_cannot_be_read_are_left_out(tmp_path: Path, bad: bytes) -> None:
    folder = tmp_path / "tidings"
    folder.mkdir()
    (folder / "saved.jsonl").write_bytes(bad + b"\n" + line(time=253402300799) + b"\n")
    found = totals(updates(tmp_path))
    assert [(total.repo, total.updates) for total in found] == [("a", 1)]
    assert len(savings_lines(found)) == 2


def test_files_of_other_users_are_not_believed(tmp_path: Path) -> None:
    cache = tmp_path / "dnf-x"
    (cache / "tidings").mkdir(parents=True)
    (cache / "tidings" / "saved.jsonl").write_bytes(line() + b"\n")
    (cache / "tidings" / "mirrors.json").write_text('{"https://m.example.org": 2000}')
    home = tmp_path / "home"
    assert len(list(updates(cache))) == 1
    assert len(skipped(cache, 1000.0)) == 1
    assert caches(home, tmp_path) == [cache]
    others = {os.getuid() + 1}
    assert list(updates(cache, others)) == []
    assert skipped(cache, 1000.0, others) == []
    assert caches(home, tmp_path, owners=others) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("foreign", [".", "tidings", "tidings/saved.jsonl"])
def test_one_foreign_part_of_the_path_is_enough(tmp_path: Path, foreign: str) -> None:
    (tmp_path / "tidings").mkdir()
    (tmp_path / "tidings" / "saved.jsonl").write_bytes(line() + b"\n")
    assert len(list(updates(tmp_path))) == 1
    os.chown(tmp_path / foreign, 12345, 12345)
    assert list(updates(tmp_path)) == []


@pytest.mark.parametrize("part", ["cache", "cache/tidings", "cache/tidings/saved.jsonl"])
def test_links_are_not_followed(tmp_path: Path, part: str) -> None:
    folder = tmp_path / "cache" / "tidings"
    folder.mkdir(parents=True)
    (folder / "saved.jsonl").write_bytes(line() + b"\n")
    assert len(list(updates(tmp_path / "cache"))) == 1
    path = tmp_path / part
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert list(updates(tmp_path / "cache")) == []


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "tidings").mkdir()
    os.mkfifo(tmp_path / "tidings" / "saved.jsonl")
    (tmp_path / "tidings" / "mirrors.json").mkdir()
    assert list(updates(tmp_path)) == []
    assert skipped(tmp_path, 0.0) == []


def test_a_cache_by_two_names_counts_once(tmp_path: Path) -> None:
    cache = tmp_path / "dnf-x"
    (cache / "tidings").mkdir(parents=True)
    (cache / "tidings" / "saved.jsonl").write_text("")
    (tmp_path / "link").symlink_to(cache)
    assert caches(tmp_path, tmp_path, [tmp_path / "link", cache]) == [cache]


def test_who_is_not_asked_and_why(plugin: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "tidings"
    folder.mkdir()
    memory = plugin.Memory(str(folder), now=1000.0)
    memory.learn("https://a.example.org/u", "missing")
    memory.learn("https://me:hidden@b.example.org/u", "refused")
    memory.learn("https://c.example.org/u", "hangs")
    hangs, refused, missing = skipped(tmp_path, 1000.0)
    assert (hangs.url, hangs.why) == ("https://c.example.org", "the host did not answer in time")
    assert refused.url == "https://b.example.org/u"
    assert refused.why == "it gave nothing that could be used"
    assert (missing.url, missing.why) == ("https://a.example.org/u", "nothing is published there")
    assert 4 * 86400 < missing.until < 9 * 86400
    assert skipped(tmp_path, 1000.0 + 5000) == [missing]
    *lines, last = skipped_lines({tmp_path: [hangs, missing]})
    assert lines[0].startswith("not asked until 1970-01-01 00:")
    assert "https://a.example.org/u (nothing is published there)" in lines[1]
    assert str(folder / "mirrors.json") in last
    assert skipped_lines({tmp_path: []}) == []


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "[" * 100_000, '{"a": 1e400}', '{"a": NaN}', '{"a": 1' + "0" * 400 + "}",
     '{"a": true}', '{"a": "2000"}', '{"a": null}', '{"\\u001b[2J": 2000}', '{"a": 1e9}'],
)  # fmt: skip
def test_a_list_of_mirrors_that_cannot_be_believed(tmp_path: Path, text: str) -> None:
    (tmp_path / "tidings").mkdir()
    (tmp_path / "tidings" / "mirrors.json").write_text(text)
    assert skipped(tmp_path, 0.5) == []


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
