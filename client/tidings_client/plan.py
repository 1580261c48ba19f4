"""The planner: which way each wanted file is best obtained. Pure: values in, a Plan out.

Contents are nodes, named by track and the first bytes of their id; the head's edges lead from one
to another, and a content that is here already is where a path begins. Prices are bytes first; a
request and a second of work count as so many bytes (``Costs``). A file whose recipe cannot be run
here, or has failed, is downloaded whole. Two files with one content cost one content.

The executor fetches, applies, and comes back with what failed in ``Question.bad`` and what it has
got in ``held``: every failure takes a way out of the graph, so asking again ends.
"""

from __future__ import annotations

import enum
import heapq
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from tidings_chunkstore.head import PREFIX, Head, HeadEdge
from tidings_chunkstore.limits import KIB, LIMITS, MIB
from tidings_chunkstore.places import PackName, Span
from tidings_chunkstore.recipe import Recipe

#: A section is held in memory while it is applied: larger ones are left to the full route.
SECTION_LIMIT = 16 * MIB
#: Bytes of one merged range: several are in flight, each held in memory until it is checked.
RANGE_LIMIT = 2 * MIB
#: What new chunks cost of the published size, before the index is there to tell, and the factor
#: by which that guess must beat a delta whose price is known.
CHUNKS_GUESS = 0.15
#: Side contents are held in memory while a recipe runs; and what the chunks of one cost of it,
#: of which no older one is here.
SIDE_LIMIT = 32 * MIB
SIDE_GUESS = 0.6
DOUBT = 2.0
#: What reconcile costs of the published size, both ways, on top of the list.
RECONCILE_GUESS = 0.05
#: Contents below have too few coarse chunks for one of them to be met again.
RECONCILE_LEAST = 64 * KIB
#: Bytes of the largest section without a base that comes along with the lists.
ALONG = 16 * KIB
#: What a bundle of direct deltas costs of the chain that it replaces.
BUNDLE_GUESS = 0.75


class Route(enum.StrEnum):
    """How a file is obtained."""

    CURRENT = "current"  #: nothing to download: it, or its content, is here
    DELTA = "delta"
    RECONCILE = "reconcile"
    CHUNKS = "chunks"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Costs:
    """What else counts, in bytes."""

    request: int = 4 * KIB  #: its headers, and the round trip at a Mbit/s
    gap: int = 2 * KIB  #: least bytes between two frames that make them two requests
    second: int = 16 * KIB  #: a second of rebuilding and recompression


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to obtain.

    *content* is its content's id or the first PREFIX bytes of it; None: not known. *recipe* None:
    not known. *size* None: not known. *local*: it is here, byte for byte.
    """

    path: str
    type: str
    track: str
    size: int | None
    content: bytes | None = None
    recipe: Recipe | None = None
    local: bool = False

    @property
    def node(self) -> bytes | None:
        """The content's name in the graph."""
        return None if self.content is None else self.content[:PREFIX]


@dataclass(frozen=True, slots=True)
class Question:
    """All that decides. *held* and *cached* are what is here; *bad* is what has failed.

    *bad* holds spans (sections, indexes), pack names, paths (their recipe) and names of features.
    """

    wanted: Sequence[Wanted]
    head: Head | None = None
    held: frozenset[bytes] = frozenset()  #: first PREFIX bytes of contents
    kinds: frozenset[str] = frozenset()  #: tracks of which some content is here
    cached: frozenset[Span] = frozenset()  #: sections that are here
    bad: frozenset[Hashable] = frozenset()
    route: Route | None = None  #: taken wherever it leads there; the rest is downloaded whole
    runnable: Callable[[Recipe], bool] = lambda _: True
    seconds: Callable[[Recipe, int], float] = lambda _recipe, size: size / 50e6
    costs: Costs = field(default_factory=Costs)


@dataclass(frozen=True, slots=True)
class Price:
    """What a way costs. ``exact`` where nothing in it is a guess."""

    bytes: int
    requests: int
    seconds: float = 0.0
    exact: bool = True

    def score(self, costs: Costs) -> float:
        """One number to compare by."""
        return self.bytes + self.requests * costs.request + self.seconds * costs.second


@dataclass(frozen=True, slots=True)
class Task:
    """One content and the files that come of it, all by one route.

    CURRENT: the content *node* is here, or there is nothing to do. DELTA: *edges* in their order.
    CHUNKS: by *index*. RECONCILE: by what the server answers. FULL: *downloads* whole; the other
    files come of the first download.
    Without files: a side content, which the recipes of the next task need.
    """

    track: str
    node: bytes | None
    route: Route
    files: tuple[Wanted, ...]
    price: Price
    edges: tuple[HeadEdge, ...] = ()
    index: Span | None = None
    downloads: tuple[Wanted, ...] = ()
    alternatives: Mapping[Route, Price] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bundle:
    """Direct deltas that the server makes: from one snapshot to the current one."""

    start: PackName
    target: PackName
    tracks: tuple[str, ...]
    price: Price


@dataclass(frozen=True, slots=True)
class Reconcile:
    """Deltas against bases of which the server learns: for *tracks* of the snapshot of *pack*."""

    pack: PackName
    tracks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Tasks in the order in which they are done, and what they fetch together."""

    tasks: tuple[Task, ...]
    ranges: tuple[Span, ...] = ()
    bundle: Bundle | None = None
    reconcile: Reconcile | None = None

    @property
    def price(self) -> Price:
        """Bytes and requests of all; each full download is a request."""
        full = [w for task in self.tasks for w in task.downloads]
        by_guess = (Route.CHUNKS, Route.RECONCILE)
        guessed = [t.price for t in self.tasks if t.route in by_guess]
        size = sum(span.length for span in self.ranges) + sum(w.size or 0 for w in full)
        size += sum(p.bytes for p in guessed) + (self.bundle.price.bytes if self.bundle else 0)
        requests = len(self.ranges) + len(full) + sum(p.requests for p in guessed)
        seconds = sum(task.price.seconds for task in self.tasks)
        exact = self.bundle is None and all(t.price.exact for t in self.tasks)
        return Price(size, requests + (1 if self.bundle else 0), seconds, exact)


def make_plan(question: Question) -> Plan:
    """The cheapest plan. Every wanted file is in exactly one task."""
    return _Planner(question).plan()


def merge(spans: Iterable[Span], gap: int, limit: int = RANGE_LIMIT) -> tuple[Span, ...]:
    """Contiguous ranges over *spans*: near ones joined where the gap costs less than a request."""
    merged: list[Span] = []
    for span in sorted(set(spans), key=lambda s: (s.pack.serial, s.pack.id, s.offset, -s.length)):
        last = merged[-1] if merged else None
        if last is not None and last.pack == span.pack and span.offset <= last.end + gap:
            end = max(last.end, span.end)
            if end - last.offset <= limit or span.end <= last.end:
                merged[-1] = Span(last.pack, last.offset, end - last.offset)
                continue
        merged.append(span)
    return tuple(merged)


def assign(ranges: Sequence[Span], spans: Iterable[Span]) -> list[list[Span]]:
    """For each of *ranges*, as ``merge`` gives them, the *spans* that lie in it."""
    starts: dict[PackName, list[tuple[int, int]]] = {}
    for number, whole in enumerate(ranges):
        starts.setdefault(whole.pack, []).append((whole.offset, number))
    inside: list[list[Span]] = [[] for _ in ranges]
    for span in spans:
        mine = starts[span.pack]
        inside[mine[bisect_right(mine, (span.offset, len(ranges))) - 1][1]].append(span)
    return inside


class _Planner:
    def __init__(self, question: Question) -> None:
        self.q = question
        self.opened: set[PackName] = set()  # packs that some task fetches from already
        self.reconciles = False  # whether some task does already
        self.reached = set(question.held)  # contents that are here when a later task begins
        self.edges: dict[tuple[str, bytes | None], list[tuple[HeadEdge, bytes]]] = {}
        self.states: dict[int, Mapping[str, bytes]] = {}
        self.sizes: dict[str, int] = {}
        self.tracks: dict[bytes, str] = {}  # of the current contents
        if question.head is not None:
            self._graph(question.head)

    def plan(self) -> Plan:
        groups: dict[tuple[str, bytes | None], list[Wanted]] = {}
        for number, wanted in enumerate(self.q.wanted):
            # A content of unknown name is shared with nobody.
            key = (wanted.track, wanted.node) if wanted.node else (f"{number} ", None)
            groups.setdefault(key, []).append(wanted)
        tasks = [task for group in groups.values() for task in self._group(group)]
        spans = [e.span for t in tasks for e in t.edges] + [t.index for t in tasks if t.index]
        ranges = merge((span for span in spans if span not in self.q.cached), self.q.costs.request)
        return self._with_reconcile(self._with_bundle(Plan(tuple(tasks), ranges)))

    def _graph(self, head: Head) -> None:
        bad = self.q.bad
        self.states = {state.serial: state.contents for state in head.states}
        self.sizes = {content.track: content.size for content in head.contents}
        self.tracks = {node: track for track, node in head.current.contents.items()}
        for edge in head.edges:
            if edge.span in bad or edge.span.pack in bad or edge.span.length > SECTION_LIMIT:
                continue
            target = self.states.get(edge.target, {}).get(edge.track)
            start = None
            if edge.base is not None:
                start = self.states.get(edge.base, {}).get(edge.track)
                if start is None:
                    continue  # the track was not there: an edge from nowhere
            if target is not None and start != target:
                self.edges.setdefault((edge.track, start), []).append((edge, target))

    # -- one content -----------------------------------------------------------------------------

    def _group(self, group: Sequence[Wanted]) -> list[Task]:
        """The tasks of the files that share a content: those rebuilt, and those downloaded."""
        local = tuple(w for w in group if w.local)
        rest = [w for w in group if not w.local]
        rebuilt = tuple(w for w in rest if self._runs(w))
        whole = [w for w in rest if not self._runs(w)]
        first = group[0]
        tasks = []
        if local:
            tasks.append(Task(first.track, first.node, Route.CURRENT, local, Price(0, 0)))
        if rebuilt:
            best = self._best(rebuilt)
            tasks += self._side_tasks([w for w in best.files if w not in best.downloads])
            tasks.append(best)
        tasks += [
            Task(w.track, w.node, Route.FULL, (w,), self._full([w]), downloads=(w,)) for w in whole
        ]
        return tasks

    def _runs(self, wanted: Wanted) -> bool:
        recipe = wanted.recipe
        return (
            recipe is not None
            and wanted.node is not None
            and wanted.path not in self.q.bad
            and self.q.runnable(recipe)
            and self._sides_pay(wanted)
        )

    # -- side contents ---------------------------------------------------------------------------

    def _sides_pay(self, wanted: Wanted) -> bool:
        """Whether the side contents of its recipe can be had, for less than the file itself."""
        price = self._sides_price([wanted])
        return price is not None and (wanted.size is None or price.bytes <= wanted.size)

    def _sides_price(self, files: Iterable[Wanted]) -> Price | None:
        tasks = [self._side(side) for side in self._missing_sides(files)]
        if any(task is None for task in tasks):
            return None
        size = sum(task.price.bytes for task in tasks if task)
        return Price(size, sum(task.price.requests for task in tasks if task))

    def _missing_sides(self, files: Iterable[Wanted]) -> list[bytes]:
        named = dict.fromkeys(side for w in files if w.recipe for side in w.recipe.sides)
        return [side for side in named if side[:PREFIX] not in self.reached]

    def _side_tasks(self, files: Iterable[Wanted]) -> list[Task]:
        tasks = []
        for side in self._missing_sides(files):
            task = self._side(side)
            assert task is not None  # or the file were not rebuilt
            tasks.append(task)
            self.reached |= {self.states[e.target][task.track] for e in task.edges}
            self.reached.add(side[:PREFIX])
            self.opened |= {e.span.pack for e in task.edges}
        return tasks

    def _side(self, side: bytes) -> Task | None:
        """The cheapest way to a side content; None where there is none."""
        node = side[:PREFIX]
        track = self.tracks.get(node)
        if track is None or self.sizes.get(track, 0) > SIDE_LIMIT:
            return None
        ways = []
        path = self._path(track, node)
        if path is not None:
            ways.append(Task(track, node, Route.DELTA, (), self._price_of(path), path))
        index = self._index(track, node)
        if index is not None:
            guess = int(self.sizes[track] * SIDE_GUESS)
            stored = 0 if index in self.q.cached else index.length
            price = Price(guess + stored, 2, exact=False)
            ways.append(Task(track, node, Route.CHUNKS, (), price, index=index))
        return min(ways, key=lambda task: task.price.score(self.q.costs), default=None)

    def _price_of(self, path: Sequence[HeadEdge]) -> Price:
        fresh = [e for e in path if e.span not in self.q.cached]
        return Price(
            sum(e.span.length for e in fresh), len({e.span.pack for e in fresh} - self.opened)
        )

    def _best(self, files: tuple[Wanted, ...]) -> Task:
        first = files[0]
        track, node = first.track, first.node
        assert node is not None
        work = self._work(files, track)
        if node in self.q.held:
            return Task(track, node, Route.CURRENT, files, Price(0, 0, work))
        ways: dict[Route, Task] = {}
        path = self._path(track, node)
        if path is not None:
            fresh = [e for e in path if e.span not in self.q.cached]
            packs = {e.span.pack for e in fresh} - self.opened
            price = Price(
                sum(e.span.length for e in fresh),
                len(packs),
                work + len(path) * self._pass(track),
            )
            ways[Route.DELTA] = Task(track, node, Route.DELTA, files, price, path)
        index = self._index(track, node)
        if index is not None and (track in self.q.kinds or self.q.route is Route.CHUNKS):
            ways[Route.CHUNKS] = self._chunks(files, index, work)
        if self._reconcilable(track, node):
            ways[Route.RECONCILE] = self._reconcile(files, work)
        downloads = self._downloads(files)
        ways[Route.FULL] = Task(
            track, node, Route.FULL, files, self._full(downloads), downloads=downloads
        )
        prices = {route: task.price for route, task in ways.items()}
        best = self._choose(ways)
        if best.route is Route.DELTA:
            self.opened |= {e.span.pack for e in best.edges}
            self.reached |= {self.states[e.target][track] for e in best.edges}
        self.reconciles |= best.route is Route.RECONCILE
        self.reached.add(node)
        return Task(
            track,
            node,
            best.route,
            files,
            best.price,
            best.edges,
            best.index,
            best.downloads,
            prices,
        )

    def _choose(self, ways: Mapping[Route, Task]) -> Task:
        forced = self.q.route
        if forced is not None:
            return ways.get(forced, ways[Route.FULL])

        def score(task: Task) -> float:
            # A guess must promise much to be taken before a way whose price is known.
            doubt = DOUBT if Route.DELTA in ways and not task.price.exact else 1.0
            return task.price.score(self.q.costs) * doubt

        return min(ways.values(), key=score)

    def _work(self, files: Sequence[Wanted], track: str) -> float:
        size = self.sizes.get(track, 0)
        return sum(self.q.seconds(w.recipe, size) for w in files if w.recipe is not None)

    def _pass(self, track: str) -> float:
        """Seconds of writing or reading a content once."""
        return self.sizes.get(track, 0) / 300e6

    def _full(self, downloads: Sequence[Wanted]) -> Price:
        return Price(sum(w.size or 0 for w in downloads), len(downloads))

    def _downloads(self, files: tuple[Wanted, ...]) -> tuple[Wanted, ...]:
        """All files whole, or the smallest one where the others follow from it for less."""
        if len(files) == 1 or any(w.size is None for w in files):
            return files
        smallest = min(files, key=lambda w: w.size or 0)
        others = [w for w in files if w is not smallest]
        saved = self._full(others).score(self.q.costs)
        spent = self._work(others, smallest.track) * self.q.costs.second
        sides = self._sides_price(others)
        if sides is not None:
            spent += sides.score(self.q.costs)
        return files if sides is None or spent > saved else (smallest,)

    def _index(self, track: str, node: bytes) -> Span | None:
        head = self.q.head
        if head is None or head.current.contents.get(track) != node:
            return None
        content = head.content(track)
        index = content.index if content else None
        if index is None or index in self.q.bad or index.pack in self.q.bad:
            return None
        return index

    def _chunks(self, files: tuple[Wanted, ...], index: Span, work: float) -> Task:
        track = files[0].track
        smallest = min((w.size or 0 for w in files), default=0)
        share = CHUNKS_GUESS if track in self.q.kinds else 1.3
        guess = int(smallest * share)
        batched = self.q.head is not None and self.q.head.features.get("frames") == 1
        price = Price(
            guess + (0 if index in self.q.cached else index.length),
            1 + (1 if batched and "frames" not in self.q.bad else max(4, guess // 2048)),
            work + 2 * self._pass(track),
            exact=False,
        )
        return Task(track, files[0].node, Route.CHUNKS, files, price, index=index)

    def _reconcilable(self, track: str, node: bytes) -> bool:
        head = self.q.head
        if head is None or head.features.get("reconcile") != 1 or "reconcile" in self.q.bad:
            return False
        content = head.content(track)
        if content is None or head.current.contents.get(track) != node:
            return False
        stored = content.index is not None or any(
            edge.track == track and edge.target == head.serial for edge in head.edges
        )
        fits = RECONCILE_LEAST <= content.size <= LIMITS.reconcile_content
        return stored and fits and track in self.q.kinds

    def _reconcile(self, files: tuple[Wanted, ...], work: float) -> Task:
        track = files[0].track
        smallest = min((w.size or 0 for w in files), default=0)
        size = self.sizes.get(track, 0)
        price = Price(
            int(smallest * RECONCILE_GUESS) + size // (4 * KIB) + KIB,
            0 if self.reconciles else 2,
            work + 4 * self._pass(track),
            exact=False,
        )
        return Task(track, files[0].node, Route.RECONCILE, files, price)

    def _with_reconcile(self, plan: Plan) -> Plan:
        """*plan* with the request that its tasks share, and what comes along with it."""
        head = self.q.head
        tracks = {task.track for task in plan.tasks if task.route is Route.RECONCILE}
        if head is None or not tracks:
            return plan
        if plan.bundle is not None:
            return replace(plan, reconcile=Reconcile(head.current.pack, tuple(sorted(tracks))))

        def along(edges: Sequence[HeadEdge]) -> bool:
            return len(edges) == 1 and all(
                e.target == head.serial
                and e.base is None
                and not e.uses
                and e.span.length <= ALONG
                and e.span not in self.q.cached
                for e in edges
            )

        tracks |= {task.track for task in plan.tasks if along(task.edges)}
        spans = [e.span for task in plan.tasks if not along(task.edges) for e in task.edges]
        spans += [task.index for task in plan.tasks if task.index]
        ranges = merge((s for s in spans if s not in self.q.cached), self.q.costs.request)
        return Plan(
            plan.tasks, ranges, reconcile=Reconcile(head.current.pack, tuple(sorted(tracks)))
        )

    # -- paths -----------------------------------------------------------------------------------

    def _path(self, track: str, goal: bytes) -> tuple[HeadEdge, ...] | None:
        """The cheapest edges that lead to *goal* from what is here (Dijkstra)."""
        costs = self.q.costs
        order = count()
        starts = [None, *(p for p in self._nodes(track) if p in self.reached)]
        queue: list[tuple[float, int, bytes | None, tuple[HeadEdge, ...]]] = [
            (0.0, next(order), node, ()) for node in starts
        ]
        heapq.heapify(queue)
        done: set[bytes | None] = set()
        while queue:
            spent, _, node, path = heapq.heappop(queue)
            if node == goal:
                return path
            if node in done:
                continue
            done.add(node)
            packs = self.opened | {e.span.pack for e in path}
            for edge, target in self.edges.get((track, node), ()):
                if target in done or not self._usable(edge):
                    continue
                more = self._pass(track) * costs.second
                if edge.span not in self.q.cached:
                    more += edge.span.length
                    more += 0 if edge.span.pack in packs else costs.request
                heapq.heappush(queue, (spent + more, next(order), target, (*path, edge)))
        return None

    def _nodes(self, track: str) -> set[bytes]:
        return {node for kind, node in self.edges if kind == track and node is not None}

    def _usable(self, edge: HeadEdge) -> bool:
        """Whether the contents of other tracks that *edge* needs are here before it."""
        state = self.states[edge.target]
        return all(state.get(use) in self.reached for use in edge.uses)

    # -- bundles ---------------------------------------------------------------------------------

    def _with_bundle(self, plan: Plan) -> Plan:
        """*plan*, with a bundle where the server makes them and the chain would cost more."""
        head = self.q.head
        forced = self.q.route not in (None, Route.DELTA)
        if head is None or forced or head.features.get("delta") != 1 or "delta" in self.q.bad:
            return plan
        chained = [task for task in plan.tasks if task.route is Route.DELTA]
        best: tuple[int, int] = (0, 0)
        for state in head.states[:-1]:
            covers = sum(1 for t in chained if state.contents.get(t.track) in self.q.held)
            if covers and (covers, state.serial) >= best:
                best = (covers, state.serial)
        start = next((s for s in head.states if s.serial == best[1]), None)
        if start is None:
            return plan
        covered = [t for t in chained if start.contents.get(t.track) in self.q.held]
        others = [t for t in plan.tasks if t.route is Route.DELTA and t not in covered]
        replaced = merge(
            (e.span for t in covered for e in t.edges if e.span not in self.q.cached),
            self.q.costs.request,
        )
        chain = Price(sum(s.length for s in replaced), len(replaced))
        price = Price(int(chain.bytes * BUNDLE_GUESS), 1, exact=False)
        # A chain of one or two steps is as static as it can be, and caches have it.
        if len(replaced) < 2 or price.score(self.q.costs) >= chain.score(self.q.costs):
            return plan
        spans = [e.span for t in others for e in t.edges]
        spans += [t.index for t in plan.tasks if t.index]
        ranges = merge((s for s in spans if s not in self.q.cached), self.q.costs.request)
        tracks = tuple(sorted({t.track for t in covered}))
        return Plan(plan.tasks, ranges, Bundle(start.pack, head.current.pack, tracks, price))
