"""Obtaining files: plan, fetch, rebuild, and plan again without what has failed.

Every failure takes a way out of the planner's graph (``bad``) or a source out of the stock, so the
loop ends: at the latest where every file is downloaded whole.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from tidings_chunkstore import delta, head, recipe
from tidings_chunkstore.errors import (
    EngineError,
    FormatError,
    NetworkError,
    TidingsError,
    VerificationError,
)
from tidings_chunkstore.ids import ContentId, FileId
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.opening import Codec, codec_of, open_stream

from .assemble import TEMPORARY, Done, Proof, Workbench, Wrap, Write
from .bundle import decode_bundle
from .job import Progress
from .local import Destination
from .plan import SIDE_LIMIT, Bundle, Plan, Question, Reconcile, Route, Task, Wanted, make_plan
from .remote import Remote
from .sections import Sections
from .state import SIDE, Stamp
from .stock import Source, Stock


class Unfit(Exception):
    """What the head, or the main file just read, leads to is not there, or not right."""

    def __init__(self, error: TidingsError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True, slots=True)
class Item:
    """A file to obtain: what the planner needs to know, and what proves it."""

    wanted: Wanted
    proof: Proof
    optional: bool = False  #: it may be absent from the mirror
    small: bool = False  #: a main file, or beside one: others may build on its content

    @property
    def path(self) -> str:
        """Relative to the repository and to DEST."""
        return self.wanted.path


@dataclass(slots=True)
class Got:
    """What this run has obtained."""

    done: dict[str, Done] = field(default_factory=dict)  #: by path, in the work folder
    in_place: dict[str, FileId] = field(default_factory=dict)  #: by path, in DEST already
    absent: set[str] = field(default_factory=set)  #: optional, and not there
    routes: dict[str, tuple[Route, int]] = field(default_factory=dict)  #: route and bytes by path
    contents: dict[FileId, ContentId] = field(default_factory=dict)

    def has(self, path: str) -> bool:
        """Whether nothing is left to do for *path*."""
        return path in self.done or path in self.in_place or path in self.absent

    def sha256_of(self, path: str) -> FileId | None:
        """What this run has made of *path*, or found in place."""
        done = self.done.get(path)
        return done.sha256 if done else self.in_place.get(path)


class Obtain:
    """The files of one run, from all that is here and all that the mirrors have."""

    def __init__(
        self,
        remote: Remote,
        progress: Progress,
        dest: Destination,
        stock: Stock,
        route: Route | None,
        reason: str | None,
    ) -> None:
        """*route* is forced where it leads; *reason* says why a cheaper way is closed already."""
        self.remote = remote
        self.progress = progress
        self.dest = dest
        self.stock = stock
        self.route = route
        self.reason = reason
        self.bench = Workbench(dest, stock)
        self.head: head.Head | None = None
        self.got = Got()
        self.bad: set[Hashable] = set()
        self.sections = Sections(remote, dest, progress, self.bad, self.blame)
        # Contents that a server's answer led to, by which route, and their bytes.
        self.answered: dict[ContentId, tuple[Route, int]] = {}
        self.side_bytes: dict[ContentId, int] = {}  # side contents, and what each has cost
        self.sides_open = False
        self.dry = False  #: nothing is written: for a plan

    def blame(self, reason: str) -> None:
        """Note why a cheaper way was left; the first reason is the one that is told."""
        if self.reason is None:
            self.reason = reason

    def fetch(self, planned: Plan) -> None:
        """Get what the tasks need besides whole files; what cannot be had goes to ``bad``."""
        if planned.bundle is not None:
            self._fetch_bundle(planned.bundle)
        if planned.reconcile is not None:
            self._fetch_reconcile(planned.reconcile)
        self.sections.fetch(planned)

    def plan(self, items: Sequence[Item]) -> Plan:
        """The plan for *items*, with what is here now and without what has failed."""
        wanted = []
        for item in items:
            local = self.got.has(item.path) or self._find_here(item)
            wanted.append(replace(item.wanted, local=local))
        self._open_sides(items)
        return make_plan(
            Question(
                wanted,
                self.head,
                frozenset(content[: head.PREFIX] for content in self.bench.contents()),
                frozenset(s.track for s in self.stock.sources if s.content),
                frozenset(self.sections.spans),
                frozenset(self.bad),
                self.route,
                recipe.available,
                recipe.cost,
            )
        )

    def _open_sides(self, items: Iterable[Item]) -> None:
        """Look into the zchunk files that are here, once a recipe wants what they hold."""
        recipes = (item.wanted.recipe for item in items)
        if not self.sides_open and any(how and how.sides for how in recipes):
            self.sides_open = True
            self.stock.open_sides()
            for name in self.dest.work_names():
                if name.startswith(SIDE):
                    self._add_side(name)

    def _add_side(self, name: str) -> None:
        try:
            content = ContentId.from_hex(name.removeprefix(SIDE))
        except FormatError:
            return  # nobody's; the next run's end removes it
        opener = partial(self.dest.work_open, name)
        self.stock.add(Source(name, "", opener, Stamp(0, 0, 0), Codec.NONE, None, content))

    def _find_here(self, item: Item) -> bool:
        """Whether the file lies here byte for byte: in place, finished by a run before, a seed."""
        proof = item.proof
        if proof.sha256 is None and proof.checksum is None:
            return False
        for source in self.stock.sources:
            here = source.key == item.path
            if proof.sha256 is None:
                if not here or source.stamp.size != proof.size:
                    continue
            elif source.sha256 != proof.sha256:
                continue
            if here and proof.sha256 is not None:
                proven = source if source.proven else self.stock.prove(source)
                if proven.sha256 == proof.sha256:
                    self.got.in_place[item.path] = proof.sha256
                    self.got.routes.setdefault(item.path, (Route.CURRENT, 0))
                    if proven.content:
                        self.got.contents[proof.sha256] = proven.content
                    return True
                return False
            if self.dry:
                return True
            try:
                self.got.done[item.path] = self.bench.copy(source, proof)
            except VerificationError:
                continue  # not what it was said to be
            self.got.routes.setdefault(item.path, (Route.CURRENT, 0))
            return True
        return False

    def obtain(self, items: Sequence[Item]) -> None:
        """Finish every one of *items*. Raises Unfit when the mirror cannot serve one."""
        by_path = {item.path: item for item in items}
        while True:
            todo = [item for item in items if not self.got.has(item.path)]
            if not todo:
                return
            mark = self._progress_mark()
            planned = self.plan(todo)
            self.fetch(planned)
            needed = {use for task in planned.tasks for edge in task.edges for use in edge.uses}
            for task in planned.tasks:
                if task.files and all(self.got.has(w.path) for w in task.files):
                    continue
                before_task = self.bench.spooled()
                keep = (
                    not task.files  # a side content, for the tasks behind it
                    or task.track in needed
                    or any(item.small for item in items)
                )
                self._perform(task, by_path, keep)
                if not keep:
                    self.bench.drop(self.bench.spooled() - before_task)
            if self._progress_mark() == mark:
                raise AssertionError("the planner offers a way that leads nowhere")

    def _progress_mark(self) -> tuple[int, ...]:
        got = self.got
        return (
            len(got.done) + len(got.in_place) + len(got.absent),
            len(self.bad),
            len(self.stock.sources),
            len(self.bench.contents()),
        )

    def _fetch_bundle(self, bundle: Bundle) -> None:
        """Ask for direct deltas and rebuild what they lead to; the planner then finds it here."""
        self.bad.add("delta")  # asked once, whatever comes
        try:
            data = self.remote.bundle(bundle.start, bundle.target, bundle.tracks)
            sections = decode_bundle(data)
        except (NetworkError, VerificationError, FormatError) as error:
            self.progress.note(f"no bundle of deltas: {error}", code=error.code)
            return
        assert self.head is not None
        for track, section in sections:
            node = self.head.current.contents.get(track)
            try:
                if node is None or track not in bundle.tracks:
                    raise FormatError(f"a bundle with a delta for {track!r}, not asked for")
                target = delta.inspect(section).target
                if not target.startswith(node):
                    raise FormatError("a bundle with a delta to another content")
                self.bench.spool(self.bench.apply(section), target)
            except (FormatError, VerificationError) as error:
                self.progress.note(f"a bundle's delta for {track}: {error}", code=error.code)
                continue
            self.answered[target] = (Route.DELTA, len(section))

    def _fetch_reconcile(self, wanted: Reconcile) -> None:
        """Ask for deltas against what is here, and rebuild what they lead to."""
        self.bad.add("reconcile")  # asked once, whatever comes
        assert self.head is not None
        from .reconcileroute import fetch

        bench = self.bench
        try:
            found = fetch(
                self.remote,
                wanted.pack,
                wanted.tracks,
                bench.bases,
                bench.apply,
                self.progress.note,
            )
        except (NetworkError, VerificationError, FormatError, EngineError) as error:
            self.progress.note(f"no reconcile: {error}", code=error.code)
            self.blame(f"reconcile-{error.code}")
            return
        for one in found:
            node = self.head.current.contents.get(one.track)
            try:
                if node is None or not one.target.startswith(node):
                    raise FormatError("reconcile led to another content")
                self.bench.spool(one.produce, one.target)
            except (FormatError, VerificationError) as error:
                self.progress.note(f"reconcile of {one.track}: {error}", code=error.code)
                self.blame(f"reconcile-{error.code}")
                continue
            self.answered[one.target] = (Route.RECONCILE, one.size)

    # -- tasks -----------------------------------------------------------------------------------

    def _perform(self, task: Task, items: Mapping[str, Item], keep: bool) -> None:
        wraps = []
        for wanted in task.files:
            if wanted in task.downloads or self.got.has(wanted.path):
                continue
            how = wanted.recipe or recipe.IDENTITY
            sides = self._sides_of(how, wanted.path)
            if sides is not None:
                wraps.append(Wrap(how, items[wanted.path].proof, sides))
        if task.route is Route.FULL:
            for wanted in task.downloads:
                self.download(items[wanted.path])
            if wraps or (keep and task.node is not None):
                self._derive(task, wraps)  # other files come of it, or a delta builds on it
        elif task.route is Route.CURRENT:
            self._from_here(task, wraps)
        elif task.route is Route.RECONCILE:
            pass  # asked for when the plan was fetched: what it led to is CURRENT in the next plan
        elif task.route is Route.DELTA:
            self._by_edges(task, wraps, keep)
        else:
            self._by_chunks(task, wraps, keep)

    def _sides_of(self, how: recipe.Recipe, path: str) -> dict[ContentId, bytes] | None:
        """The recipe's side contents; None where one is not here, which is then planned anew."""
        sides: dict[ContentId, bytes] = {}
        for side in how.sides:
            data = self.bench.small(side, SIDE_LIMIT)
            if data is None:
                if any(c.startswith(side[: head.PREFIX]) for c in self.bench.contents()):
                    self.bad.add(path)  # another content goes by its name in the head
                return None
            sides[side] = data
        return sides

    def _settle(
        self,
        task: Task,
        content: ContentId | None,
        made: tuple[dict[str, Done], dict[str, Exception]],
        size: int,
    ) -> None:
        """Take in what was made of a content; a recipe that failed is not tried again."""
        done, failed = made
        if not task.files and content is not None:
            self.side_bytes[content] = size
        for path, file in done.items():
            route = task.route
            if content is not None and content in self.answered:
                route, size = self.answered[content]
            used = next((w.recipe.sides for w in task.files if w.path == path and w.recipe), ())
            size += sum(self.side_bytes.pop(side, 0) for side in used)
            self.got.done[path] = file
            self.got.routes[path] = (route, size)
            size = 0  # the next file of the same content costs nothing
            if content is not None:
                self.got.contents[file.sha256] = content
        for path, error in failed.items():
            self.bad.add(path)
            code = getattr(error, "code", "recipe")
            self.blame(f"recipe-{code}")
            told = str(error).removeprefix(f"{path}: ")
            self.progress.note(f"{path}: rebuilt bytes differ ({told})", code=code)

    def _from_here(self, task: Task, wraps: Sequence[Wrap]) -> None:
        """Only the wrapping is new."""
        assert task.node is not None
        content = next(c for c in self.bench.contents() if c.startswith(task.node))
        if self.bench.reader(content) is None:
            return  # not what it was said to be; forgotten now, and planned anew
        self._settle(task, content, self.bench.wrap_all(content, wraps), 0)

    def _by_edges(self, task: Task, wraps: Sequence[Wrap], keep: bool) -> None:
        assert task.node is not None
        made_here: set[ContentId] = set()
        for edge in task.edges:
            section = self.sections.read(edge.span)
            if section is None:
                return  # it could not be had, and is in bad
            last = edge is task.edges[-1]
            behind = self.bench.spooled()
            try:
                info = delta.inspect(section)
                node = self._node_of(edge)
                if node is None or not info.target.startswith(node):
                    raise FormatError("a delta to another content than the head says")
                produce = self.bench.apply(section)
                made = self.bench.make(
                    produce, info.target, wraps if last else (), keep or not last
                )
            except (FormatError, VerificationError) as error:
                self.sections.drop(edge.span)
                self.progress.note(f"a delta of {task.track}: {error}", code=error.code)
                self.blame(f"delta-{error.code}")
                return
            if not keep:
                self.bench.drop(behind & made_here)  # an intermediate content has served
                made_here = self.bench.spooled() - behind
            if last:
                size = sum(e.span.length for e in task.edges)
                self._settle(task, info.target, made, size)

    def _node_of(self, edge: head.HeadEdge) -> bytes | None:
        assert self.head is not None
        state = next(s for s in self.head.states if s.serial == edge.target)
        return state.contents.get(edge.track)

    def _by_chunks(self, task: Task, wraps: Sequence[Wrap], keep: bool) -> None:
        assert task.index is not None
        assert task.node is not None
        assert self.head is not None
        stored = self.sections.read(task.index)
        if stored is None:
            return
        from tidings_chunkstore import index as indexes

        from .chunkroute import ChunkRoute

        question = Question([])
        with self.dest.work_create(TEMPORARY + "frames") as frames:
            try:
                chunk_list = indexes.decode(stored, task.index.pack)
                if not chunk_list.content.startswith(task.node):
                    raise FormatError("an index of another content than the head says")
                bases = self.bench.bases(task.track)
                route = ChunkRoute(chunk_list, bases, frames)
                batched = self.head.features.get("frames") == 1
                price = route.price(question.costs, batched)
                full = sum(w.size or 0 for w in task.files) or LIMITS.published
                if self.route is not Route.CHUNKS and price.score(question.costs) > full:
                    raise VerificationError("the file itself is smaller", code="dear")
                route.fetch(self.remote, question.costs, batched)
                made = self.bench.make(route.produce, chunk_list.content, wraps, keep)
            except (FormatError, VerificationError, NetworkError, EngineError) as error:
                self.bad.add(task.index)
                self.progress.note(f"chunks of {task.track}: {error}", code=error.code)
                self.blame(f"chunks-{error.code}")
                return
            finally:
                self.dest.work_remove(TEMPORARY + "frames")
        self._settle(task, chunk_list.content, made, price.bytes + task.index.length)

    def _derive(self, task: Task, wraps: Sequence[Wrap]) -> None:
        """The other files of a content of which one was downloaded whole."""
        first = task.downloads[0]
        done = self.got.done.get(first.path)
        if done is None:
            return  # absent
        file = self.dest.work_open(done.name)
        assert file is not None

        def produce(write: Write) -> None:
            assert file is not None
            codec = codec_of(first.path, file.read(16))
            file.seek(0)
            for piece in open_stream(file, codec, limit=LIMITS.content):
                write(piece)

        with file:
            try:
                content = self.bench.spool(produce, None)
            except (FormatError, VerificationError):
                self.bad.update(w.proof.path for w in wraps)
                return
        self._settle(task, content, self.bench.wrap_all(content, wraps), 0)

    def download(self, item: Item, *, fresh: bool = False, limit: int = LIMITS.published) -> None:
        """The published file, whole. Raises Unfit when no mirror has it as it must be."""
        proof = item.proof
        try:
            with self.bench.new_file(proof) as out:
                self.remote.file(
                    item.path,
                    out.write,
                    limit=limit if proof.size is None else proof.size,
                    reset=out.restart,
                    check=out.verify,
                    size=proof.size,
                    fresh=fresh,
                )
                done = self.bench.finish(out)
        except NetworkError as error:
            codes = error.details.get("codes")
            # A signature may be on no mirror that works; trust says later whether that is right.
            beside = fresh and isinstance(codes, list) and "missing" in codes
            if item.optional and (beside or error.code in ("missing", "forbidden")):
                self.got.absent.add(item.path)
                return
            raise Unfit(error) from error
        except VerificationError as error:
            raise Unfit(error) from error
        self.got.done[item.path] = done
        self.got.routes[item.path] = (Route.FULL, done.size)

    def bytes_of(self, path: str) -> bytes:
        """A small file that this run has made, or found in place."""
        done = self.got.done.get(path)
        if done is not None:
            data = self.dest.work_read(done.name, LIMITS.main)
        else:
            data = self.dest.read(path, LIMITS.main)
        if data is None:
            raise VerificationError(f"{path} is gone, or too large", code="too-large")
        return data

    def bytes_full(self, items: Sequence[Item]) -> int:
        """Bytes of *items* as published, which is what librepo would fetch."""
        sizes = 0
        for item in items:
            if item.wanted.type == "key" or item.path in self.got.absent:
                continue
            done = self.got.done.get(item.path)
            sizes += done.size if done else item.proof.size or 0
        return sizes
