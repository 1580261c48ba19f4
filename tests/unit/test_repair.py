"""repair: what comes back from where, and what is said to be lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.stores import (
    DyingBackend,
    History,
    KilledError,
    PackFolder,
    assert_whole,
    rich_in_frames,
)
from tidings_chunkstore import gc, head, layout
from tidings_chunkstore import repair as repairing
from tidings_chunkstore.backends.base import HEAD_NAME
from tidings_chunkstore.check import check
from tidings_chunkstore.errors import InputError
from tidings_chunkstore.places import PackName
from tidings_chunkstore.publisher import Options as PublishOptions
from tidings_chunkstore.repair import repair


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> History:
    history = History(tmp_path_factory.mktemp("origin") / "repo")
    history.options = PublishOptions(keep=4)
    with rich_in_frames():
        history.steps(5)
    return history


@pytest.fixture
def history(origin: History, tmp_path: Path) -> History:
    return origin.copy(tmp_path / "repo")


def test_nothing_to_do(history: History) -> None:
    before = history.listing()
    report = repair(history.backend)
    assert report.whole
    assert report.after is None
    assert history.listing() == before
    with pytest.raises(InputError):
        repair(History(history.root / "none", 0).backend)


def test_packs_come_from_another_mirror(history: History, origin: History) -> None:
    names = sorted(history.packs())
    before = {name: (history.folder / name).read_bytes() for name in names}
    history.flip(names[0], 500)
    history.flip(names[4], 20)
    (history.folder / names[2]).unlink()
    liar = PackFolder(origin.folder, lies=names)
    report = repair(history.backend, [PackFolder(history.root), liar, PackFolder(origin.folder)])
    assert report.whole
    assert sorted(report.restored) == [names[0], names[2], names[4]]
    assert sorted(report.refused) == sorted(report.restored)
    assert report.lost == {}
    assert {name: (history.folder / name).read_bytes() for name in names} == before
    assert_whole(history.store, history.published)


def test_a_head_comes_from_the_packs(history: History) -> None:
    path = history.folder / HEAD_NAME
    before = path.read_bytes()
    for damage in (b"{}", before.replace(b'"timestamp":1', b'"timestamp":3'), None):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        report = repair(history.backend)
        assert report.head_rebuilt
        assert report.whole
        assert history.serials()[-4:] == [2, 3, 4, 5]
        assert_whole(history.store, history.published)


@pytest.mark.parametrize("place", [0, 2, -1])
def test_a_head_that_names_a_pack_that_never_was(history: History, place: int) -> None:
    """One flipped byte in it can do that: the pack that is meant is there, and nothing is lost."""
    now = history.head()
    states = list(now.states)
    name = states[place].pack
    wrong = PackName(name.serial, bytes([name.id[0] ^ 1]) + name.id[1:])
    data = (history.folder / HEAD_NAME).read_bytes()
    states[place] = replace(states[place], pack=wrong)
    (history.folder / HEAD_NAME).write_bytes(head.encode(replace(now, states=tuple(states))))
    assert check(history.backend).damaged
    report = repair(history.backend)
    assert report.whole
    assert report.head_rebuilt
    assert not report.lost
    assert not report.condemned
    assert history.head().states[-len(states) :] == head.decode(data).states


def test_chunks_come_from_the_published_files(history: History) -> None:
    """One flipped byte in the first pack, which everything rests on: no snapshot is lost."""
    facts = gc.gather(history.store, gc.Options())
    first = min(facts.sizes, key=lambda name: name.serial)
    current = history.head().content("primary")
    assert current is not None
    assert current.index is not None
    frames = history.store.read_index(current.index).frames
    frame = next(f for f in frames if f.span.pack == first)
    history.flip(str(first), frame.span.offset + frame.span.length // 2)
    report = repair(history.backend, root=history.root)
    assert report.whole
    assert 1 <= report.remade <= 2  # the frame, and a small content that was a delta in it
    assert report.lost == {}
    assert report.published is None
    assert report.condemned == [str(first)]
    assert history.serials() == [2, 3, 4, 5, 6]
    assert_whole(history.store, {**history.published, 6: history.published[5]})
    gc.run(history.backend, gc.Options(grace=0))
    assert str(first) not in history.packs()
    assert check(history.backend).findings == ()
    assert_whole(history.store)


def test_what_is_lost_is_said(history: History) -> None:
    now = history.head()
    middle = now.states[1]
    history.flip(str(middle.pack), 40)
    report = repair(history.backend)
    assert report.whole
    assert middle.serial in report.lost
    assert middle.serial not in history.serials()
    assert_whole(history.store)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_any_damaged_pack_with_the_published_files(history: History, part: float) -> None:
    for name in sorted(history.packs()):
        twin = history.copy(history.root.parent / name)
        size = (twin.folder / name).stat().st_size
        twin.flip(name, int(size * part))
        report = repair(twin.backend, root=twin.root)
        assert report.whole, name
        assert twin.head().serial > 5 or not report.before.damaged
        assert_whole(twin.store)
        current = twin.files()
        assert {file.path for file in twin.head().files} == set(current)
        twin.step()
        assert_whole(twin.store)
        assert not check(twin.backend).damaged


def test_everything_is_lost(history: History) -> None:
    for name in history.packs():
        (history.folder / name).write_bytes(b"gone")
    report = repair(history.backend)
    assert not report.whole
    report = repair(history.backend, root=history.root)
    assert report.published is not None
    assert history.head().serial == 6
    assert_whole(history.store, {6: history.published[5]})


def test_killed_at_every_write(history: History, origin: History) -> None:
    names = sorted(history.packs())
    for after in (False, True):
        fatal = 0
        while True:
            fatal += 1
            twin = history.copy(history.root.parent / f"{after}{fatal}")
            twin.flip(names[0], 3000)
            twin.flip(names[3], 40)
            backend = DyingBackend(twin.folder, fatal, after)
            try:
                repair(backend, root=twin.root)
            except KilledError:
                assert repair(twin.backend, root=twin.root).whole
                assert_whole(twin.store)
                continue
            assert fatal > 3
            break


def test_published_files_that_do_not_fit_are_of_no_use(history: History) -> None:
    history.flip(min(history.packs()), 500)
    next((history.root / "repodata").glob("*-primary.xml.gz")).unlink()
    report = repair(history.backend, root=history.root)
    assert "primary" in report.unpublished
    assert report.published is None


@pytest.mark.parametrize("reading", [2, 3])
def test_published_files_that_go_meanwhile_are_no_failure(
    history: History, monkeypatch: pytest.MonkeyPatch, reading: int
) -> None:
    """createrepo_c replaces the tree between two looks at it: what is left of it is used."""
    middle = str(history.head().states[1].pack)
    history.flip(middle, 40)
    looks = 0

    def look(*arguments: Any, **options: Any) -> layout.TreeListing:
        nonlocal looks
        looks += 1
        if looks == reading:  # a file that its repomd.xml names is not there any more
            next((history.root / "repodata").glob("*primary*")).unlink()
        found = layout.read_tree(*arguments, **options)
        if looks == reading - 1:
            next((history.root / "repodata").glob("*comps.xml")).unlink()
        return found

    monkeypatch.setattr(repairing, "read_tree", look)
    report = repair(history.backend, root=history.root)
    assert report.whole
    assert report.unpublished
    assert report.condemned == [middle]
    assert_whole(history.store)
