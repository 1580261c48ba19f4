"""The planner: which way, at what price."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tidings_chunkstore.head import PREFIX, Head, HeadContent, HeadEdge, State
from tidings_chunkstore.places import PackName, Span
from tidings_chunkstore.recipe import IDENTITY, Recipe
from tidings_client.plan import (
    RANGE_LIMIT,
    SECTION_LIMIT,
    Question,
    Route,
    Wanted,
    assign,
    make_plan,
    merge,
)

PACKS = [PackName(serial, bytes([serial] * 8)) for serial in range(16)]


def node(track: str, serial: int) -> bytes:
    """The content of *track* in snapshot *serial*."""
    return (track[:2].encode() + bytes([serial])).ljust(PREFIX, b"-")


def make_head(
    serials: range = range(1, 5),
    tracks: tuple[str, ...] = ("repomd", "primary"),
    edge_size: int = 1000,
    features: dict[str, int] | None = None,
    index: bool = True,
) -> Head:
    """Every track changes at every step, and an edge leads along; sections lie side by side."""
    states = tuple(State(s, PACKS[s], {t: node(t, s) for t in tracks}) for s in serials)
    edges = [
        HeadEdge(track, s, s - 1, (), Span(PACKS[s], 5000 + i * edge_size, edge_size))
        for s in serials[1:]
        for i, track in enumerate(tracks)
    ]
    last = serials[-1]
    contents = tuple(
        HeadContent(t, 1_000_000, Span(PACKS[last], 100 * i, 100) if index else None)
        for i, t in enumerate(tracks)
    )
    return Head(
        bytes(16), last, 0, "rpm-md", "repodata/repomd.xml", 0, (), contents, states,
        tuple(edges), features or {},
    )  # fmt: skip


def wanted(track: str, serial: int = 4, size: int = 100_000, path: str = "") -> Wanted:
    return Wanted(path or f"repodata/{track}", track, track, size, node(track, serial), IDENTITY)


def test_nothing_here_downloads_the_published_files() -> None:
    plan = make_plan(Question([wanted("repomd", size=3000), wanted("primary")], make_head()))
    assert [task.route for task in plan.tasks] == [Route.FULL, Route.FULL]
    assert (plan.price.bytes, plan.price.requests) == (103_000, 2)


def test_one_step_is_one_range() -> None:
    held = frozenset({node("repomd", 3), node("primary", 3)})
    plan = make_plan(Question([wanted("repomd"), wanted("primary")], make_head(), held=held))
    assert [task.route for task in plan.tasks] == [Route.DELTA, Route.DELTA]
    assert plan.ranges == (Span(PACKS[4], 5000, 2000),)
    assert (plan.price.bytes, plan.price.requests) == (2000, 1)


def test_three_steps_are_three_ranges_in_order() -> None:
    held = frozenset({node("primary", 1)})
    plan = make_plan(Question([wanted("primary")], make_head(), held=held))
    assert [e.target for e in plan.tasks[0].edges] == [2, 3, 4]
    assert [s.pack for s in plan.ranges] == PACKS[2:5]


def test_a_direct_edge_is_taken_where_it_is_cheaper() -> None:
    head = make_head()
    direct = HeadEdge("primary", 4, 1, (), Span(PACKS[4], 9000, 2500))
    held = frozenset({node("primary", 1)})
    question = Question([wanted("primary")], replace(head, edges=(*head.edges, direct)), held=held)
    assert make_plan(question).tasks[0].edges == (direct,)
    dear = replace(direct, span=replace(direct.span, length=50_000))
    question = replace(question, head=replace(head, edges=(*head.edges, dear)))
    assert dear not in make_plan(question).tasks[0].edges


def test_a_bundle_replaces_a_chain_where_the_server_makes_them() -> None:
    head = make_head(features={"delta": 1})
    held = frozenset({node("repomd", 1), node("primary", 1)})
    question = Question([wanted("repomd"), wanted("primary")], head, held=held)
    plan = make_plan(question)
    assert plan.bundle is not None
    assert (plan.bundle.start, plan.bundle.target) == (PACKS[1], PACKS[4])
    assert plan.bundle.tracks == ("primary", "repomd")
    assert plan.ranges == ()
    assert make_plan(replace(question, bad=frozenset({"delta"}))).bundle is None
    one_step = replace(question, held=frozenset({node("repomd", 3), node("primary", 3)}))
    assert make_plan(one_step).bundle is None


def test_a_new_wrapping_of_a_content_that_is_here_costs_nothing() -> None:
    held = frozenset({node("primary", 4)})
    plan = make_plan(Question([wanted("primary")], make_head(), held=held))
    assert plan.tasks[0].route is Route.CURRENT
    assert plan.price.bytes == plan.price.requests == 0


def test_two_files_of_one_content_are_one_rebuild() -> None:
    held = frozenset({node("primary", 3)})
    files = [wanted("primary", path="Packages"), wanted("primary", path="Packages.gz")]
    plan = make_plan(Question(files, make_head(), held=held))
    assert len(plan.tasks) == 1
    assert plan.tasks[0].files == tuple(files)
    assert plan.price.bytes == 1000


def test_of_two_whole_files_with_one_content_the_smaller_is_downloaded() -> None:
    files = [wanted("primary", path="Packages", size=400_000), wanted("primary", path="P.gz")]
    plan = make_plan(Question(files))
    assert plan.tasks[0].downloads == (files[1],)
    slow = Question(files, seconds=lambda _recipe, _size: 100.0)
    assert make_plan(slow).tasks[0].downloads == tuple(files)


def test_an_edge_that_uses_another_track_needs_it_first() -> None:
    head = make_head(range(4, 5))
    section = Span(PACKS[4], 5000, 400)
    head = replace(head, edges=(HeadEdge("primary", 4, None, ("repomd",), section),))
    alone = Question([wanted("primary")], head)
    assert make_plan(alone).tasks[0].route is Route.FULL
    behind = replace(alone, wanted=[wanted("repomd"), wanted("primary")])
    assert make_plan(behind).tasks[1].route is Route.DELTA
    before = replace(alone, wanted=[wanted("primary"), wanted("repomd")])
    assert make_plan(before).tasks[0].route is Route.FULL
    held = replace(alone, held=frozenset({node("repomd", 4)}))
    assert make_plan(held).tasks[0].route is Route.DELTA


def test_a_recipe_that_cannot_run_is_a_download() -> None:
    held = frozenset({node("primary", 3)})
    question = Question([wanted("primary")], make_head(), held=held)

    def never(_: Recipe) -> bool:
        return False

    assert make_plan(replace(question, runnable=never)).tasks[0].route is Route.FULL
    failed = replace(question, bad=frozenset({"repodata/primary"}))
    assert make_plan(failed).tasks[0].route is Route.FULL
    unknown = replace(question, wanted=[replace(wanted("primary"), recipe=None)])
    assert make_plan(unknown).tasks[0].route is Route.FULL


@pytest.mark.parametrize("bad", [PACKS[4], Span(PACKS[4], 6000, 1000)])
def test_what_has_failed_is_not_tried_again(bad: object) -> None:
    held = frozenset({node("primary", 3)})
    question = Question([wanted("primary")], make_head(), held=held, bad=frozenset({bad}))
    assert make_plan(question).tasks[0].route is Route.FULL


def test_chunks_need_a_base_and_a_price_below_the_file() -> None:
    head = replace(make_head(features={"frames": 1}), edges=())
    question = Question([wanted("primary")], head)
    assert make_plan(question).tasks[0].route is Route.FULL
    based = replace(question, kinds=frozenset({"primary"}))
    assert make_plan(based).tasks[0].route is Route.CHUNKS
    assert make_plan(based).ranges == (Span(PACKS[4], 100, 100),)
    small = replace(based, wanted=[wanted("primary", size=200)])
    assert make_plan(small).tasks[0].route is Route.FULL
    unstored = replace(based, head=replace(make_head(index=False), edges=()))
    assert make_plan(unstored).tasks[0].route is Route.FULL


@pytest.mark.parametrize("route", [Route.DELTA, Route.CHUNKS, Route.FULL])
def test_a_forced_route_is_taken_where_it_leads(route: Route) -> None:
    held = frozenset({node("primary", 3)})
    question = Question(
        [wanted("primary", size=10), wanted("repomd", size=10)],
        replace(make_head(), edges=make_head().edges[1::2]),
        held=held,
        route=route,
    )
    by_track = {task.track: task.route for task in make_plan(question).tasks}
    assert by_track["primary"] is route
    assert by_track["repomd"] is (Route.CHUNKS if route is Route.CHUNKS else Route.FULL)


def test_a_section_too_large_for_memory_is_left() -> None:
    head = make_head(edge_size=SECTION_LIMIT + 1)
    held = frozenset({node("primary", 3)})
    plan = make_plan(Question([wanted("primary", size=1 << 30)], head, held=held))
    assert plan.tasks[0].route is Route.FULL


def test_cached_sections_are_not_fetched_again() -> None:
    held = frozenset({node("primary", 3)})
    cached = frozenset({Span(PACKS[4], 6000, 1000)})
    plan = make_plan(Question([wanted("primary")], make_head(), held=held, cached=cached))
    assert plan.tasks[0].route is Route.DELTA
    assert (plan.ranges, plan.price.bytes) == ((), 0)


def test_merging_joins_what_is_nearer_than_a_request() -> None:
    one, two, far = Span(PACKS[1], 0, 10), Span(PACKS[1], 100, 10), Span(PACKS[1], 9000, 10)
    other = Span(PACKS[2], 0, 10)
    assert merge([far, two, other, one], 2048) == (Span(PACKS[1], 0, 110), far, other)
    assert merge([one, two], 10) == (one, two)
    large = Span(PACKS[1], 10, RANGE_LIMIT)
    assert merge([one, large], 2048) == (one, large)
    assert assign((Span(PACKS[1], 0, 110), far, other), [far, other, two, one]) == [
        [two, one],
        [far],
        [other],
    ]
