"""The planner over random heads: no plan leads over something that is not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from tidings_chunkstore.head import PREFIX, Head, HeadContent, HeadEdge, State
from tidings_chunkstore.places import PackName, Span
from tidings_chunkstore.recipe import IDENTITY
from tidings_client.plan import Question, Route, Wanted, assign, make_plan, merge

TRACKS = ("repomd", "primary", "group")
Draw = Callable[[st.SearchStrategy[object]], object]


def node(track: str, version: int) -> bytes:
    return (track[:2].encode() + bytes([version])).ljust(PREFIX, b"-")


def pack(serial: int) -> PackName:
    return PackName(serial, bytes([serial] * 8))


@st.composite
def questions(draw: st.DrawFn, tracks: tuple[str, ...] = TRACKS, uses: bool = True) -> Question:
    """Snapshots whose contents may repeat, edges of every kind, and anything held or failed."""
    count = draw(st.integers(1, 5))
    states = []
    for serial in range(1, count + 1):
        contents = {
            t: node(t, draw(st.integers(1, count))) for t in tracks if draw(st.integers(0, 9))
        }
        states.append(State(serial, pack(serial), contents))
    last = states[-1]
    edges = []
    for target, base, track in product(states, [None, *states], tracks):
        if track not in target.contents or not draw(st.booleans()):
            continue
        if base is not None and (base.serial >= target.serial or track not in base.contents):
            continue
        used = tuple(t for t in tracks if uses and t in target.contents and t < track)
        edges.append(
            HeadEdge(
                track,
                target.serial,
                base.serial if base else None,
                used if draw(st.booleans()) else (),
                Span(target.pack, draw(st.integers(0, 40_000)), draw(st.integers(1, 20_000))),
            )
        )
    now = tuple(
        HeadContent(t, 50_000, Span(last.pack, i, 500) if draw(st.booleans()) else None)
        for i, t in enumerate(last.contents)
    )
    head = Head(
        bytes(16), last.serial, 0, "rpm-md", "repodata/repomd.xml", 0, (), now,
        tuple(states), tuple(edges), {"delta": 1} if draw(st.booleans()) else {},
    )  # fmt: skip
    nodes = sorted({n for s in states for n in s.contents.values()})
    wanted = [
        Wanted(
            f"{t}{i}", t, t, draw(st.integers(1, 30_000)), n, IDENTITY, draw(st.integers(0, 9)) == 0
        )
        for t, n in last.contents.items()
        for i in range(draw(st.integers(1, 2)))
    ]
    spans = [e.span for e in edges]
    some = st.sets(st.sampled_from(nodes)) if nodes else st.just(set())
    failed = st.sets(st.sampled_from(spans)) if spans else st.just(set())
    return Question(
        wanted,
        head,
        frozenset(draw(some)),
        frozenset(draw(st.sets(st.sampled_from(tracks)))),
        frozenset(draw(failed)),
        frozenset(draw(failed)),
        draw(st.sampled_from([None, None, None, *Route])) if uses else None,
    )


@given(questions())
def test_every_file_is_in_one_task_and_every_way_exists(question: Question) -> None:
    plan = make_plan(question)
    assert sorted(w.path for t in plan.tasks for w in t.files) == sorted(
        w.path for w in question.wanted
    )
    head = question.head
    assert head is not None
    states = {state.serial: state.contents for state in head.states}
    here = set(question.held)
    fetched = assign(plan.ranges, [])
    assert len(fetched) == len(plan.ranges)
    for task in plan.tasks:
        if task.route is Route.DELTA:
            at: bytes | None = None
            for edge in task.edges:
                start = None if edge.base is None else states[edge.base][task.track]
                assert start is None or start == at or start in here
                assert all(states[edge.target][use] in here for use in edge.uses)
                assert edge.span not in question.bad
                covered = any(
                    r.pack == edge.span.pack and r.offset <= edge.span.offset
                    and edge.span.end <= r.end
                    for r in plan.ranges
                )  # fmt: skip
                assert covered or edge.span in question.cached or plan.bundle is not None
                at = states[edge.target][task.track]
                here.add(at)
            assert at == task.node
        elif task.route is Route.CURRENT:
            assert all(w.local for w in task.files) or task.node in question.held
        elif task.route is Route.CHUNKS:
            content = head.content(task.track)
            assert content is not None and content.index == task.index
        else:
            assert task.downloads
        if task.node is not None:
            here.add(task.node)


def cheapest(question: Question, goal: bytes, work: float) -> float:
    """The score of the best simple path to *goal*, by trying all; *work* seconds at its end."""
    head = question.head
    assert head is not None
    states = {state.serial: state.contents for state in head.states}

    def walk(at: bytes | None, seen: frozenset[bytes | None], path: list[HeadEdge]) -> float:
        if at == goal:
            fresh = [e.span for e in path if e.span not in question.cached]
            seconds = work + len(path) * 50_000 / 300e6
            packs = {span.pack for span in fresh}
            return (
                sum(span.length for span in fresh)
                + len(packs) * question.costs.request
                + seconds * question.costs.second
            )
        ways = [float("inf")]
        for edge in head.edges:
            start = None if edge.base is None else states[edge.base]["primary"]
            target = states[edge.target]["primary"]
            if start == at and target not in seen and edge.span not in question.bad:
                ways.append(walk(target, seen | {target}, [*path, edge]))
        return min(ways)

    return min(walk(start, frozenset({start}), []) for start in (None, *question.held))


@given(questions(("primary",), uses=False))
def test_the_cheapest_way_is_taken(question: Question) -> None:
    """Against every simple path, for one track."""
    for task in make_plan(question).tasks:
        if task.route is Route.DELTA:
            assert task.node is not None
            work = task.price.seconds - len(task.edges) * 50_000 / 300e6
            best = cheapest(question, task.node, work)
            # Dijkstra counts a pack's request once a path; ways that meet again may differ by one.
            assert task.price.score(question.costs) <= best + question.costs.request + 1e-6


@given(questions(("primary",), uses=False), st.data())
def test_more_at_hand_never_costs_more_and_failures_never_less(
    question: Question, data: st.DataObject
) -> None:
    question = replace(question, cached=frozenset(), head=replace(question.head, features={}))  # type: ignore[type-var]
    head = question.head
    assert head is not None
    slack = question.costs.request + 1e-6
    before = make_plan(question).price.score(question.costs)
    nodes = sorted({n for s in head.states for n in s.contents.values()})
    if nodes:
        more = replace(question, held=question.held | {data.draw(st.sampled_from(nodes))})
        assert make_plan(more).price.score(question.costs) <= before + slack
    if head.edges:
        gone = replace(question, bad=question.bad | {data.draw(st.sampled_from(head.edges)).span})
        assert make_plan(gone).price.score(question.costs) >= before - slack


spans = st.builds(
    Span,
    st.sampled_from([pack(1), pack(2)]),
    st.integers(0, 3_000_000),
    st.integers(1, 3_000_000),
)


@given(st.lists(spans, max_size=30), st.integers(0, 5000))
def test_merged_ranges_cover_every_span(wanted: list[Span], gap: int) -> None:
    ranges = merge(wanted, gap)
    inside = assign(ranges, wanted)
    assert sum(map(len, inside)) == len(wanted)
    for whole, held in zip(ranges, inside, strict=True):
        for span in held:
            assert whole.pack == span.pack
            assert whole.offset <= span.offset and span.end <= whole.end
