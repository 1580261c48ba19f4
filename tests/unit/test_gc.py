"""gc: what goes, what stays, and when."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from support import repos
from support.stores import History, assert_whole, rich_in_frames
from tidings_chunkstore import condemned, gc, head, packing, reach
from tidings_chunkstore.backends.base import HEAD_NAME
from tidings_chunkstore.errors import FormatError, InputError, LockedError, StoreError
from tidings_chunkstore.gc import Options
from tidings_chunkstore.places import PackName
from tidings_chunkstore.publisher import Options as PublishOptions

T0 = 2_000_000_000
HOUR = 3600
NO_REWRITE = Options(max_rewrite=0)
NOW = Options(grace=0, rewrite_gain=0.0, rewrite_below=1.0)


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "repo")


@pytest.fixture(scope="module")
def churn(tmp_path_factory: pytest.TempPathFactory) -> History:
    history = History(tmp_path_factory.mktemp("churn") / "repo", count=40)
    history.options = PublishOptions(keep=2)
    history.steps(2, 0.02)
    history.steps(10, 1.0)
    return history


@pytest.fixture
def churned(churn: History, tmp_path: Path) -> History:
    """A store whose first packs nothing needs any more: everything changed since."""
    return churn.copy(tmp_path / "repo")


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> History:
    history = History(tmp_path_factory.mktemp("steps") / "repo")
    history.options = PublishOptions(keep=2)
    with rich_in_frames():
        history.steps(8, 0.02)
    return history


@pytest.fixture
def stepped(steps: History, tmp_path: Path) -> History:
    """A store whose old packs are needed in part."""
    return steps.copy(tmp_path / "repo")


def test_a_store_in_use_is_left_alone(history: History) -> None:
    history.steps(3)
    before = history.listing()
    report = gc.run(history.backend)
    assert report.plan.nothing
    assert history.listing() == before


def test_a_pack_goes_after_its_grace_time(churned: History) -> None:
    options = replace(NO_REWRITE, grace=HOUR)
    packs = churned.packs()

    first = gc.run(churned.backend, options, now=T0).plan
    dead = {str(fact.name) for fact in first.condemned}
    assert dead
    assert churned.packs() == packs
    assert {fact.seconds for fact in first.condemned} == {HOUR}

    early = gc.run(churned.backend, options, now=T0 + HOUR - 1).plan
    assert {str(fact.name) for fact in early.waiting} == dead
    assert churned.packs() == packs

    late = gc.run(churned.backend, options, now=T0 + HOUR).plan
    assert {str(fact.name) for fact in late.deleted} == dead
    assert churned.packs() == packs - dead
    assert condemned.read(churned.backend) == {}
    assert_whole(churned.store, churned.published)


def test_retention_drops_snapshots_and_keeps_the_current_one(history: History) -> None:
    history.steps(5)
    plan = gc.run(history.backend, Options(keep=2, grace=0, max_rewrite=0)).plan
    assert plan.dropped == (1, 2, 3)
    assert history.serials() == [4, 5]
    assert_whole(history.store, history.published)
    gc.run(history.backend, Options(keep_seconds=0, keep=1, grace=0))
    assert history.serials()[-1] >= 5
    assert_whole(history.store, history.published)


def test_retention_by_age_counts_from_the_current_snapshot(history: History) -> None:
    history.steps(3)
    states = [(s.pack, history.store.toc(s.pack)) for s in history.head().states]
    aged = [
        (name, replace(toc, snapshot=replace(toc.snapshot, time=T0 + 100 * number)))
        for number, (name, toc) in enumerate(states)
    ]
    assert [t.snapshot.serial for _, t in gc.retain(aged, None, 100)] == [2, 3]
    assert [t.snapshot.serial for _, t in gc.retain(aged, None, 0)] == [3]
    assert [t.snapshot.serial for _, t in gc.retain(aged, 2, 1000)] == [2, 3]
    assert [t.snapshot.serial for _, t in gc.retain(aged, 0, None)] == [3]


def test_the_plan_alone_changes_nothing(churned: History) -> None:
    before = churned.listing()
    plan = gc.preview(churned.store, Options(keep=1, grace=0))
    assert plan.dropped
    assert plan.deleted
    assert plan.freed > 0
    assert churned.listing() == before
    with churned.backend.lock():  # and needs no lock
        gc.preview(churned.store)


def test_mostly_dead_packs_are_rewritten(stepped: History) -> None:
    packs = stepped.packs()
    report = gc.run(stepped.backend, NOW)
    assert report.pack is not None
    gone = {str(fact.name) for fact in report.plan.rewritten}
    assert len(gone) >= 3
    gone |= {str(fact.name) for fact in report.plan.deleted}
    assert stepped.packs() == (packs - gone) | {report.pack}
    assert report.pack_bytes < report.plan.freed
    assert stepped.serials() == [7, 8, 9]
    now = stepped.head()
    assert now.time == stepped.store.toc(now.states[1].pack).snapshot.time
    published = {**stepped.published, 9: stepped.published[8]}
    assert_whole(stepped.store, published)

    # Life goes on: the files are still the same, and the next step builds on what was moved.
    before = stepped.listing()
    step = stepped.step(0.02)
    assert step.changed
    assert step.tally.new_chunks <= step.tally.chunks / 3
    assert_whole(stepped.store, {**published, **stepped.published, 9: published[8]})
    assert set(before) - {HEAD_NAME} <= set(stepped.listing())
    assert gc.run(stepped.backend, Options(grace=0)).pack is None


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> History:
    """A store whose contents are reached by long chains of deltas alone."""
    history = History(tmp_path_factory.mktemp("chains") / "repo", count=60)
    with mock.patch.object(packing, "_FRAMES_PAY", 0.0):
        history.steps(9, 0.2)
    return history


@pytest.fixture
def chained(chains: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> History:
    monkeypatch.setattr(packing, "_FRAMES_PAY", 0.0)
    return chains.copy(tmp_path / "repo")


def depth_of(history: History, track: str) -> int:
    store = history.store
    now = store.toc(history.head().current.pack).snapshot.content(track)
    assert now is not None
    return store.locate(store.tocs(store.pack_names()))[now.id].depth


def test_chains_move_out_of_packs_that_go(chained: History) -> None:
    assert depth_of(chained, "primary") == 8
    packs = chained.packs()
    report = gc.run(chained.backend, replace(NOW, keep=2))
    assert report.pack is not None
    gone = {str(fact.name) for fact in report.plan.rewritten}
    assert len(gone) >= 6
    assert chained.packs() == (packs - gone) | {report.pack}
    assert report.pack_bytes < report.plan.freed
    assert depth_of(chained, "primary") == 8
    published = {**chained.published, 10: chained.published[9]}
    assert_whole(chained.store, published)
    kept = chained.store.toc(PackName.parse(report.pack)).kept
    assert sum(entry.edge is not None and entry.track == "primary" for entry in kept) >= 7

    # Life goes on: publish builds on a moved chain, and gc moves it again.
    for _ in range(3):
        chained.step(0.2)
    assert depth_of(chained, "primary") == 11
    again = gc.run(chained.backend, replace(NOW, keep=2))
    assert report.pack in {str(fact.name) for fact in again.plan.rewritten}
    assert_whole(chained.store, chained.published)
    assert depth_of(chained, "primary") == 11


def test_a_pack_that_told_of_a_chain_may_outlive_it(chained: History) -> None:
    first = gc.run(chained.backend, replace(NOW, keep=2))
    assert first.pack in chained.packs()
    chained.published[10] = chained.published[9]
    chained.step(0.2)
    told = chained.store.toc(PackName.parse(first.pack)).kept
    second = gc.run(chained.backend, replace(NOW, keep=3))
    assert second.pack is not None
    assert first.pack in chained.packs()  # the head still names it
    left = chained.packs()
    assert any(k.edge is not None and str(k.edge.pack) not in left for k in told)
    chained.published[12] = chained.published[11]
    assert_whole(chained.store, chained.published)
    assert not gc.gather(chained.store, NOW).reach.lost


def test_a_moved_chain_ends_with_the_snapshots_that_need_it(chained: History) -> None:
    """What changed all over is whole again in the end: nothing is dragged along for ever."""
    gc.run(chained.backend, replace(NOW, keep=2))
    old = chained.packs()
    chained.options = PublishOptions(keep=1, rebuild=True)
    chained.step(0.2)
    gc.run(chained.backend, replace(NOW, keep=1))
    assert len(chained.packs()) == 1
    assert not chained.packs() & old
    assert_whole(chained.store, {chained.head().serial: chained.files()})


def test_a_damaged_delta_is_never_copied(chained: History) -> None:
    options = replace(NOW, keep=2)
    facts = gc.gather(chained.store, options)
    victim = gc.plan(facts, options).rewritten[0].name
    place = max(
        (edge for use in facts.reach.packs.values() for edge in use.edges if edge.pack == victim),
        key=lambda span: span.length,
        default=None,
    )
    assert place is not None
    chained.flip(str(victim), place.end - 3)
    before = chained.listing()
    with pytest.raises(StoreError):
        gc.run(chained.backend, options)
    assert chained.listing() == before


def test_a_lost_head_comes_back_over_moved_chains(chained: History) -> None:
    gc.run(chained.backend, replace(NOW, keep=2))
    before = (chained.folder / HEAD_NAME).read_bytes()
    rebuilt = reach.rebuild(chained.store)
    assert rebuilt is not None
    assert head.encode(rebuilt) == before


def test_a_rewrite_keeps_what_old_heads_name_for_the_grace_time(stepped: History) -> None:
    old = stepped.head()
    gc.run(stepped.backend, replace(NOW, grace=HOUR), now=T0)
    store = stepped.store
    for content in old.contents:
        if content.index is not None:
            assert b"".join(store.chunks(store.read_index(content.index)))
    gc.run(stepped.backend, replace(NOW, grace=HOUR, max_rewrite=0), now=T0 + HOUR)
    assert_whole(stepped.store, {**stepped.published, 9: stepped.published[8]})


def test_a_rewrite_stays_within_its_budget(stepped: History) -> None:
    everything = gc.preview(stepped.store, NOW)
    some = gc.preview(stepped.store, replace(NOW, max_rewrite=everything.rewrite_bytes - 1))
    assert some.rewrite_bytes < everything.rewrite_bytes
    assert len(some.rewritten) < len(everything.rewritten)
    assert gc.preview(stepped.store, replace(NOW, max_rewrite=0)).rewritten == ()
    assert gc.preview(stepped.store, replace(NOW, rewrite_gain=1.0)).rewritten == ()


def test_publish_builds_nothing_on_condemned_packs(churned: History) -> None:
    first = repos.packages(40)
    plan = gc.run(churned.backend, replace(NO_REWRITE, grace=HOUR), now=T0).plan
    dead = {str(fact.name) for fact in plan.condemned}
    assert dead
    churned.packages = first  # all chunks of the condemned packs come back
    churned.step(0.01)
    last = gc.run(churned.backend, replace(NO_REWRITE, grace=HOUR), now=T0 + HOUR).plan
    assert dead <= {str(fact.name) for fact in last.deleted}
    assert_whole(churned.store, churned.published)


def test_a_condemned_pack_that_is_needed_is_spared(history: History) -> None:
    history.steps(2)
    name = history.head().states[0].pack
    history.backend.put(condemned.NAME, [condemned.encode({name: 5})])
    plan = gc.run(history.backend, Options(grace=0)).plan
    assert [fact.name for fact in plan.spared] == [name]
    assert condemned.read(history.backend) == {}
    assert_whole(history.store, history.published)


def test_a_lost_or_damaged_gc_state_costs_time_alone(churned: History) -> None:
    options = replace(NO_REWRITE, grace=HOUR)
    dead = gc.run(churned.backend, options, now=T0).plan.condemned
    for damage in (
        b"",
        b"{}",
        b'{"format":"tidings-gc","v":1,"condemned":{"../x":1}}',
        b"[" * 9999,
    ):
        (churned.folder / condemned.NAME).write_bytes(damage)
        with pytest.raises(FormatError):
            condemned.decode(damage)
        plan = gc.run(churned.backend, options, now=T0 + 2 * HOUR).plan
        assert plan.condemned == tuple(dead)
        assert plan.deleted == ()


def test_a_clock_that_was_set_back_deletes_nothing_early(churned: History) -> None:
    options = replace(NO_REWRITE, grace=HOUR)
    gc.run(churned.backend, options, now=T0 + 365 * 24 * HOUR)
    plan = gc.run(churned.backend, options, now=T0).plan
    assert {fact.seconds for fact in plan.waiting} == {HOUR}


def test_leftovers_go_at_once(history: History) -> None:
    history.steps(2)
    before = (history.folder / HEAD_NAME).read_bytes()
    orphan = history.step().pack
    (history.folder / HEAD_NAME).write_bytes(before)  # as if killed between pack and head
    (history.folder / ".tmp-x.1").write_bytes(b"half")
    report = gc.run(history.backend)
    assert [str(fact.name) for fact in report.plan.leftovers] == [orphan]
    assert report.removed == (".tmp-x.1",)
    assert orphan not in history.packs()


def test_a_foreign_pack_is_condemned_and_a_foreign_file_is_not_ours(history: History) -> None:
    history.steps(1)
    (history.folder / "000001-0123456789abcdef.pack").write_bytes(b"nonsense")
    (history.folder / "README").write_bytes(b"mine")
    gc.run(history.backend, Options(grace=0))
    assert len(history.packs()) == 1
    assert (history.folder / "README").exists()


def test_a_damaged_store_loses_nothing_more(history: History) -> None:
    history.options = PublishOptions(keep=2)
    history.steps(3)
    first = min(history.packs())
    data = (history.folder / first).read_bytes()
    (history.folder / first).unlink()
    before = history.listing()
    with pytest.raises(StoreError, match="nothing is deleted before a repair"):
        gc.run(history.backend, Options(keep=1, grace=0))
    assert history.listing() == before
    (history.folder / first).write_bytes(data)
    gc.run(history.backend, Options(keep=1, grace=0))


def test_damage_is_never_copied_into_a_new_pack(stepped: History) -> None:
    facts = gc.gather(stepped.store, NOW)
    victims = [fact.name for fact in gc.plan(facts, NOW).rewritten]
    victim = next(name for name in victims if facts.reach.packs[name].frames)
    offset = max(facts.reach.packs[victim].frames)
    stepped.flip(str(victim), offset + 9)
    before = stepped.listing()
    with pytest.raises(StoreError):
        gc.run(stepped.backend, NOW)
    assert stepped.listing() == before


def test_no_head_no_gc(history: History) -> None:
    with pytest.raises(InputError):
        gc.run(history.backend)
    assert not history.folder.exists()
    history.steps(1)
    (history.folder / HEAD_NAME).unlink()
    with pytest.raises(StoreError):
        gc.run(history.backend, Options(grace=0))
    assert len(history.packs()) == 1


def test_one_writer_at_a_time(history: History) -> None:
    history.steps(1)
    with history.backend.lock(), pytest.raises(LockedError):
        gc.run(history.backend)


def test_a_lost_head_does_not_bring_half_snapshots_back(stepped: History) -> None:
    """Packs that are there for their frames alone name snapshots that are no longer whole."""
    gc.run(stepped.backend, Options(grace=0, max_rewrite=0))
    gc.run(stepped.backend, NOW)
    serial = stepped.head().serial
    (stepped.folder / HEAD_NAME).unlink()
    stepped.step()
    assert stepped.head().serial == serial + 1
    assert_whole(stepped.store, {})
    gc.run(stepped.backend, NOW)


def test_the_state_is_small_json() -> None:
    name = PackName(7, bytes(range(8)))
    encoded = condemned.encode({name: 12})
    expected = b'{"format":"tidings-gc","v":1,"condemned":{"000007-0001020304050607.pack":12}}\n'
    assert encoded == expected
    assert condemned.decode(encoded) == {name: 12}


def test_heads_stay_within_their_limit(history: History) -> None:
    history.options = PublishOptions(keep=3)
    history.steps(5)
    gc.run(history.backend, NOW)
    assert len(head.encode(history.head())) < 4096
