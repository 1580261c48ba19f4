"""Facts of the pages: what a step costs, where repositories are, states of upstreams, plots."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.servers import Servers
from support.stores import History
from support.syncing import Repository, fetch
from tidings_chunkstore.places import PackName
from tidings_server import pages, pages_plots
from tidings_server.follow import state_file
from tidings_server.pages_facts import (
    Histories,
    Search,
    Step,
    bare,
    followed,
    own_upstream,
    read_steps,
    typical,
    upstream_of,
)
from tidings_server.settings import RepoSettings, ServeSettings, UpstreamSettings
from tidings_server.site import Site


def a_step(number: int, full: int | None = 1000, update: int | None = 10, pack: int = 50) -> Step:
    before = PackName(number - 1, bytes(8)) if number > 1 else None
    name = PackName(number, bytes(8))
    return Step(name, before, number, number * 86400, pack, 2000, 3, full, update)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    made = History(tmp_path_factory.mktemp("history") / "repo", types=("primary", "filelists"))
    made.steps(4)
    return made


def test_steps_are_what_lies_in_the_packs(history: History) -> None:
    steps = read_steps(history.store, history.head())
    assert [step.serial for step in steps] == [1, 2, 3, 4]
    assert (steps[0].full, steps[0].update, steps[0].share) == (None, None, None)
    for older, newer in pairwise(steps):
        was, now = history.published[older.serial], history.published[newer.serial]
        changed = [data for data in now.values() if data not in was.values()]
        assert newer.changed == len(changed)
        assert newer.full == sum(map(len, changed))
        assert newer.published == sum(map(len, now.values()))
        assert newer.pack_bytes == (history.folder / str(newer.pack)).stat().st_size
        assert newer.update is not None
        assert 0 < newer.update < newer.full / 3


def test_the_update_is_what_a_client_downloads(tmp_path: Path) -> None:
    made = Repository.at(tmp_path / "www" / "repo", count=400, steps=2)
    with Servers(tmp_path / "servers") as servers:
        url = f"{servers.nginx(tmp_path / 'www').url}/repo"
        fetch(url, tmp_path / "dest")
        made.advance()
        result = fetch(url, tmp_path / "dest")
    site = Site(ServeSettings(root=tmp_path / "www"))
    here = site.repository("repo")
    assert here is not None
    told = Histories().read(here, here.head())[-1]
    assert told.update is not None
    # On the wire there are the head, and the heads of two or three answers, besides.
    besides = result.bytes_received - told.update - len(here.head_bytes())
    assert 0 < besides < 1500
    assert told.full == pytest.approx(result.bytes_full, rel=0.02)


def test_an_apt_step_counts_each_content_once(tmp_path: Path) -> None:
    made = Repository.at(tmp_path / "suite", steps=2, kind="apt")
    here = Site(ServeSettings(root=tmp_path)).repository("suite")
    assert here is not None
    step = Histories().read(here, here.head())[-1]
    files = {str(p.relative_to(made.root)): p.stat().st_size for p in made.root.rglob("*")}
    smallest = sum(size for path, size in files.items() if path.endswith("Packages.gz"))
    small = sum(files[name] for name in ("InRelease", "Release", "Release.gpg"))
    assert step.full is not None
    assert step.full <= smallest + small < step.published


def test_only_new_packs_are_read(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    head = history.head()
    steps = read_steps(history.store, head)
    store = history.store
    asked: list[PackName] = []
    toc = store.toc

    def watched(name: PackName) -> object:
        asked.append(name)
        return toc(name)

    monkeypatch.setattr(store, "toc", watched)
    assert read_steps(store, head, steps) == steps
    assert asked == []
    assert read_steps(store, head, steps[:-1]) == steps
    assert set(asked) == {steps[-2].pack, steps[-1].pack}


def test_medians() -> None:
    steps = [a_step(1, None, None), a_step(2, 100, 1), a_step(3, 300, 9), a_step(4, 200, 2)]
    usual = typical([*steps, a_step(5, 0, 0)])
    assert usual is not None
    assert (usual.steps, usual.full, usual.update, usual.pack) == (3, 200, 2, 50)
    assert (usual.all_full, usual.all_update, usual.share) == (600, 12, 0.01)
    assert typical(steps[:1]) is None
    assert typical([a_step(5, 0, 0)]) is None


def test_a_search_finds_roots_and_store_trees_and_forgets_what_is_gone(tmp_path: Path) -> None:
    root, store = tmp_path / "root", tmp_path / "store"
    for name in ("a/b", "c"):
        (root / name / "repodata").mkdir(parents=True)
        (root / name / "repodata" / "repomd.xml").touch()
    (root / "a/b/tidings").mkdir()
    (root / "a/b/tidings/head.json").touch()
    for name in ("deep/down", ".hidden", "without", "back\\slash"):
        (store / name / "tidings").mkdir(parents=True)
    for name in ("deep/down", ".hidden", "back\\slash"):
        (store / name / "tidings" / "head.json").touch()
    settings = ServeSettings(root=root, store=store)
    search = Search(Site(settings), settings)
    assert search.due()
    search.run()
    assert (search.found.names, search.found.complete) == (("a/b", "deep/down"), True)
    assert not search.due()
    (root / "a/b/tidings/head.json").unlink()
    search.run()
    assert search.found.names == ("deep/down",)


def test_a_search_that_is_cut_short_keeps_what_was_found(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"r{number}" / "tidings").mkdir(parents=True)
        (tmp_path / f"r{number}" / "tidings" / "head.json").touch()
    settings = ServeSettings(store=tmp_path)
    search = Search(Site(settings), settings)
    search.run()
    assert len(search.found.names) == 5
    search.run(seconds=0)
    assert len(search.found.names) == 5
    assert not search.found.complete


def test_a_state_outlives_its_settings(tmp_path: Path) -> None:
    (tmp_path / "follow").mkdir()
    state_file(tmp_path, "r").write_text('{"v": 1, "checked": 5}')
    upstream = UpstreamSettings(urls=("https://h/",))
    now = followed(tmp_path, "r", [RepoSettings("r", tmp_path, upstream=upstream)])
    assert now is not None
    assert now.checked == 5
    assert followed(tmp_path, "r", [RepoSettings("r", tmp_path)]) is None
    assert followed(tmp_path, "r", []) is None


def test_the_state_of_an_upstream(tmp_path: Path) -> None:
    (tmp_path / "follow").mkdir()
    file = state_file(tmp_path, "a/b")
    configured = UpstreamSettings(metalink="https://u:secret@origin.example.org/m?token=1#x")
    assert upstream_of(file) is None
    known = upstream_of(file, configured)
    assert known is not None
    assert known.url == "https://origin.example.org/m"
    state = {
        "v": 1,
        "checked": 1700000000,
        "good": 1699990000.5,
        "failures": 2,
        "error": {"code": "network", "message": "no route"},
        "upstream": "https://mirror.example.org/x/",
        "total_bytes_received": 5,
        "total_bytes_full": True,
        "trust": 7,
        "changed": "soon",
    }
    file.write_text(json.dumps(state))
    found = upstream_of(file, configured)
    assert found is not None
    assert (found.url, found.checked, found.good) == (
        "https://mirror.example.org/x/",
        1700000000,
        1699990000,
    )
    assert (found.failures, found.error, found.received) == (2, "network", 5)
    assert (found.full, found.trust, found.changed) == (None, None, None)
    for text in (
        "",
        "[]",
        "{",
        "\0",
        '"x"',
        "[" * 100_000,
        '{"checked": NaN}',
        '{"checked": 1e400}',
    ):
        file.write_text(text)
        after = upstream_of(file, configured)
        assert after is not None
        assert after.checked is None


def test_addresses_are_shown_without_secrets() -> None:
    assert bare("https://user:word@host:8443/a/b?key=1#f") == "https://host:8443/a/b"
    assert bare("http://[::1") == ""


def test_the_upstream_of_the_settings() -> None:
    upstream = UpstreamSettings(urls=("https://o.example.org/",))
    repos = [RepoSettings("a", Path("/a")), RepoSettings("b", Path("/b"), upstream=upstream)]
    assert own_upstream(repos, "b") is upstream
    assert own_upstream(repos, "a") is None


# -- plots -----------------------------------------------------------------------------------------

STEPS = st.lists(
    st.builds(
        a_step,
        st.integers(1, 1 << 31),
        st.integers(1, 1 << 40),
        st.integers(0, 1 << 40),
        st.integers(0, 1 << 40),
    ),
    min_size=1,
    max_size=90,
)


@given(STEPS)
def test_marks_lie_inside_their_frames(steps: list[Step]) -> None:
    for updates in pages_plots.update_plots(steps):
        frame = updates.frame
        assert len(updates.marks) >= min(len(steps), 15)
        for mark in updates.marks:
            assert frame.left <= mark.x <= frame.right
            assert 0 < mark.full <= frame.base
            assert 0 < mark.update <= frame.base
        assert [mark.x for mark in updates.marks] == sorted({mark.x for mark in updates.marks})
    for churn in pages_plots.churn_plots(steps):
        for bar in churn.bars:
            assert churn.frame.left <= bar.x
            assert bar.x + bar.width <= churn.frame.right
            assert 0 < bar.y <= churn.frame.base
            assert bar.y + bar.height == pytest.approx(churn.frame.base, abs=0.2)
        dates = sorted(churn.frame.dates, key=lambda date: date.x)
        assert all(right.x - left.x >= 80 for left, right in pairwise(dates))


@given(st.integers(0, 1 << 45))
def test_scales_are_round_and_reach_the_top(most: int) -> None:
    top, ticks = pages_plots.scale(most)
    assert top >= most
    assert ticks[0] == 0
    assert ticks[-1] == top
    assert 2 <= len(ticks) <= 7
    assert top <= max(1, 2 * most)


def test_one_large_pack_does_not_flatten_the_others() -> None:
    large = replace(a_step(1, None, None), pack_bytes=10**9)
    wide, narrow = pages_plots.churn_plots([large, a_step(2), a_step(3)])
    assert wide.left_out == narrow.left_out == large
    assert len(wide.bars) == len(narrow.bars) == 2
    assert pages_plots.churn_plots([a_step(1), a_step(2)])[0].left_out is None
    assert pages_plots.churn_plots([a_step(1)]) == ()
    assert pages_plots.update_plots([a_step(1, None, None)]) == ()


# -- words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "in the future"),
        (59, "just now"),
        (60, "1 minute ago"),
        (7200, "2 hours ago"),
        (86400 * 2 - 1, "47 hours ago"),
        (86400 * 2, "2 days ago"),
    ],
)
def test_ages(seconds: int, text: str) -> None:
    assert pages.ago(1_000_000_000 - seconds, 1_000_000_000) == text


def test_shares_and_dates() -> None:
    shares = [pages.share_text(x) for x in (0.0, 0.00001, 0.007, 0.5)]
    assert shares == ["0.0 %", "under 0.1 %", "0.7 %", "50 %"]
    assert pages_plots.minute(1_700_000_000) == "2023-11-14 22:13 UTC"
    assert pages_plots.day(1 << 62) == "unknown"
