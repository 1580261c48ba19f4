"""A sync that has something to do: plan, fetch, rebuild, prove, switch.

The head is followed first. Where it does not lead to a publish that fits together (a pack or file
not there yet, a main file that does not prove), the mirror's own main file is asked for and obeyed
instead, a few times with pauses, for a mirror in the middle of its rsync heals in minutes; the head
then still serves every file that it knows by hash. Failures take ways out of the planner's graph,
and it is asked again: see ``plan``.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tidings_chunkstore import delta, head, recipe
from tidings_chunkstore.errors import (
    EngineError,
    FormatError,
    NetworkError,
    RollbackError,
    TidingsError,
    VerificationError,
)
from tidings_chunkstore.ids import ContentId, FileId
from tidings_chunkstore.layout import LAYOUTS, Layout, Listing, PublishedFile, safe_path, select
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.listing import COMPRESSIONS
from tidings_chunkstore.opening import codec_of, open_stream
from tidings_chunkstore.places import PackName, Span

from . import state as states
from .assemble import DONE, SPOOL, TEMPORARY, Done, Proof, Workbench, Wrap, Write
from .bundle import decode_bundle
from .local import Destination, translated, write_all
from .plan import Bundle, Plan, Question, Route, Task, Wanted, assign, make_plan
from .remote import Remote
from .state import Seen, State
from .stock import Source, gather, present
from .sync import (
    Ask,
    PlannedFile,
    PlanResult,
    Progress,
    SyncedFile,
    SyncOptions,
    SyncResult,
    question_key,
)
from .trust import check_main, check_step, signature_paths

_PART = "part-"  # a section that was fetched, kept for the next run


class _Unfit(Exception):
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
class _Got:
    """What this run has obtained."""

    done: dict[str, Done] = field(default_factory=dict)  #: by path, in the work folder
    in_place: dict[str, FileId] = field(default_factory=dict)  #: by path, in DEST already
    absent: set[str] = field(default_factory=set)  #: optional, and not there
    routes: dict[str, tuple[Route, int]] = field(default_factory=dict)  #: route and bytes by path
    contents: dict[FileId, ContentId] = field(default_factory=dict)

    def has(self, path: str) -> bool:
        """Whether nothing is left to do for *path*."""
        return path in self.done or path in self.in_place or path in self.absent


class Update:
    """One run over an open DEST. Use it once."""

    def __init__(
        self,
        options: SyncOptions,
        remote: Remote,
        progress: Progress,
        dest: Destination,
        state: State,
        ask: Ask,
        started: float,
    ) -> None:
        self.options = options
        self.remote = remote
        self.progress = progress
        self.dest = dest
        self.state = state
        self.ask = ask
        self.started = started
        self.reason = ask.reason
        self.now = present(dest)
        self.head: head.Head | None = None
        self.got = _Got()
        self.bad: set[Hashable] = set()
        self.sections: set[Span] = set()  # fetched and whole, each in a file of the work folder
        self.bundled: dict[ContentId, int] = {}  # contents that came in a bundle, and their bytes
        self.dry = False
        self.word = ""
        self.stock = gather(dest, self.now, state.seen, state.owned, options.seeds)
        self.bench = Workbench(dest, self.stock)

    # -- the two things one can ask for ----------------------------------------------------------

    def run(self) -> SyncResult:
        """See ``sync.sync``."""
        self._sweep()
        self.head = self._decode_head()
        self.remote.watch(self._tell)
        try:
            layout, listing, items = self._follow()
            changed = self._switch(layout, listing, items)
        finally:
            self.remote.watch(None)
            self.bench.close()
        return self._result(layout, listing, items, changed)

    def plan(self) -> PlanResult:
        """See ``sync.plan``."""
        self.dry = True
        self.head = self._decode_head()
        try:
            if self.head is not None:
                items = self._items_of_head(self.head)
            else:
                items = self._items_of_mirror_in_memory()
            planned = self._plan(items)
        finally:
            self.bench.close()
        return _plan_result(self.head, planned, self.reason)

    # -- the head --------------------------------------------------------------------------------

    def _decode_head(self) -> head.Head | None:
        """The head, where it can be used. Raises RollbackError."""
        if self.ask.data is None:
            return None
        try:
            found = head.decode(self.ask.data)
            _check_head(found)
        except FormatError as error:
            self.reason = "head-" + error.code
            self.progress.note(f"the head cannot be used: {error}")
            return None
        same = found.repo == self.state.repo
        check_step(
            self.options.trust,
            old_timestamp=None,
            new_timestamp=0,
            old_trust=None,
            new_trust="",
            old_serial=self.state.serial if same else None,
            new_serial=found.serial,
        )
        return found

    # -- from a question to finished files -------------------------------------------------------

    def _follow(self) -> tuple[Layout, Listing, list[Item]]:
        """Obtain everything: by the head, else by the mirror's own main file."""
        failure: TidingsError | None = None
        if self.head is not None:
            try:
                return self._by_head(self.head)
            except _Unfit as unfit:
                failure = unfit.error
                self._note_fallback(failure)
        for pause in self.options.pauses or (0.0,):
            time.sleep(pause)
            try:
                return self._by_mirror()
            except _Unfit as unfit:
                failure = unfit.error
                self._note_fallback(failure)
        assert failure is not None
        raise failure

    def _note_fallback(self, error: TidingsError) -> None:
        if self.reason is None:
            self.reason = error.code
        self.progress.note(f"trying by the mirror's own main file: {error}", code=error.code)

    def _by_head(self, now: head.Head) -> tuple[Layout, Listing, list[Item]]:
        layout = LAYOUTS[now.layout]
        items = self._items_of_head(now)
        mains = [item for item in items if item.path in layout.mains()]
        # What the whole publish needs lies side by side, so it is fetched at once.
        self._fetch(self._plan(items))
        self._obtain(mains)
        listing = self._check_mains(layout, now.main, mains, by_head=True)
        data = self._items_of_listing(layout, listing, now)
        self._obtain(data)
        return layout, listing, [*data, *mains]

    def _by_mirror(self) -> tuple[Layout, Listing, list[Item]]:
        layout, main, mains = self._mains_of_mirror()
        listing = self._check_mains(layout, main, mains, by_head=False)
        data = self._items_of_listing(layout, listing, self.head)
        self._obtain(data)
        if data and all(item.path in self.got.absent for item in data):
            raise _Unfit(NetworkError(f"none of the files of {main} is there", code="missing"))
        return layout, listing, [*data, *mains]

    def _mains_of_mirror(self) -> tuple[Layout, str, list[Item]]:
        """The main file as the mirror has it now, and what lies beside it."""
        layouts = [self.now.layout] if self.now else []
        layouts += [lay for lay in LAYOUTS.values() if lay not in layouts]
        failure: TidingsError | None = None
        for layout in layouts:
            for main in reversed(layout.mains()):
                if layout.describe(main)[0] in ("signature", "key"):
                    continue
                paths = [main, *reversed(layout.beside(main))]
                for path in layout.mains():
                    self.got.done.pop(path, None)
                    self.got.in_place.pop(path, None)
                    self.got.absent.discard(path)
                items = [
                    Item(
                        Wanted(path, *layout.describe(path), None),
                        Proof(path, None),
                        optional=path != main,
                    )
                    for path in paths
                ]
                try:
                    for item in items:
                        self._download(item, fresh=True, limit=LIMITS.main)
                except _Unfit as unfit:
                    failure = failure or unfit.error
                    if unfit.error.code in ("missing", "forbidden"):
                        continue
                    raise
                return layout, main, [i for i in items if i.path not in self.got.absent]
        assert failure is not None
        raise _Unfit(
            NetworkError(f"no repository there: {failure}", code="no-repository", **failure.details)
        )

    def _check_mains(
        self, layout: Layout, main: str, mains: Sequence[Item], *, by_head: bool
    ) -> Listing:
        """Prove the main file, refuse a step back, and read it."""
        data = {item.path: self._bytes_of(item.path) for item in mains}
        try:
            listing = layout.parse(data[main], main)
            self.word = check_main(self.options.trust, main, data[main], data)
            check_step(
                self.options.trust,
                old_timestamp=self.now.listing.timestamp if self.now else None,
                new_timestamp=listing.timestamp,
                old_trust=self.state.trust or None,
                new_trust=self.word,
                old_signed=self.now is not None and _signed(self.dest, self.now.main),
                new_signed=any(path in data for path in signature_paths(main))
                or main == "InRelease",
            )
        except FormatError as error:
            raise _Unfit(VerificationError(str(error), code="broken-main")) from error
        except (VerificationError, RollbackError) as error:
            # A head that lags may lead back or to what the caller does not want, where the
            # mirror itself is right; and a mirror may be between repomd.xml and its signature.
            if by_head or error.code in ("bad-signature", "no-signature"):
                raise _Unfit(error) from error
            raise
        return listing

    def _bytes_of(self, path: str) -> bytes:
        done = self.got.done.get(path)
        if done is not None:
            data = self.dest.work_read(done.name, LIMITS.main)
        else:
            data = self.dest.read(path, LIMITS.main)
        if data is None:
            raise VerificationError(f"{path} is gone, or too large", code="too-large")
        return data

    # -- what is wanted --------------------------------------------------------------------------

    def _items_of_head(self, now: head.Head) -> list[Item]:
        """What the head says: the main file and what lies beside it, and the files asked for."""
        mains = LAYOUTS[now.layout].mains()
        published = [
            PublishedFile(f.path, f.type, f.track, 0, f.size)
            for f in now.files
            if f.path not in mains
        ]
        listing = Listing(now.layout, now.main, tuple(published), now.timestamp, "")
        chosen = {f.path for f in select(listing, self.options.types, self.options.zchunk)}
        return [
            self._item_of_head(now, file)
            for file in now.files
            if file.path in mains or file.path in chosen
        ]

    def _item_of_head(self, now: head.Head, file: head.HeadFile) -> Item:
        content = now.current.contents.get(file.track)
        return Item(
            Wanted(
                file.path,
                file.type,
                file.track,
                file.size,
                content,
                file.recipe or recipe.IDENTITY,
            ),
            Proof(file.path, file.size, file.sha256),
            small=file.path in LAYOUTS[now.layout].mains(),
        )

    def _items_of_listing(
        self, layout: Layout, listing: Listing, now: head.Head | None
    ) -> list[Item]:
        """What the main file says; the head helps with the files that it knows by hash."""
        known = {f.path: f for f in now.files} if now else {}
        own = known.get(listing.main)
        same = own is not None and own.sha256 == self._sha256_of(listing.main)
        items = []
        for file in select(listing, self.options.types, self.options.zchunk):
            entry = known.get(file.path)
            if layout.partial and same and entry is None:
                continue  # listed, and not in the tree when it was published: as ever with apt
            item = self._item_of_listing(layout, file)
            if now is not None and entry is not None and _agree(file, entry):
                item = replace(
                    self._item_of_head(now, entry),
                    proof=replace(item.proof, size=entry.size, sha256=entry.sha256),
                    optional=item.optional,
                )
            if (
                self.word not in ("", "transport")
                and not Proof(file.path, file.size, None, file.checksum).strong
            ):
                raise VerificationError(
                    f"{file.path}: {listing.main} names no strong checksum, so nothing proves it",
                    code="weak-checksum",
                )
            items.append(item)
        return items

    def _sha256_of(self, path: str) -> FileId | None:
        done = self.got.done.get(path)
        return done.sha256 if done else self.got.in_place.get(path)

    def _item_of_listing(self, layout: Layout, file: PublishedFile) -> Item:
        sha256 = None
        if file.checksum is not None and file.checksum.algorithm == "sha256":
            sha256 = FileId.from_hex(file.checksum.hex)
        content, how = file.open_id, None
        if sha256 is not None and not file.path.endswith(COMPRESSIONS):
            content, how = ContentId(sha256), recipe.IDENTITY
        return Item(
            Wanted(file.path, file.type, file.track, file.size, content, how),
            Proof(file.path, file.size, sha256, file.checksum),
            optional=layout.partial,
        )

    def _items_of_mirror_in_memory(self) -> list[Item]:
        """What the mirror's main file says, for a plan that writes nothing."""
        layouts = [self.now.layout] if self.now else []
        layouts += [lay for lay in LAYOUTS.values() if lay not in layouts]
        failure: NetworkError | None = None
        for layout in layouts:
            for main in reversed(layout.mains()):
                if layout.describe(main)[0] in ("signature", "key"):
                    continue
                data = bytearray()
                try:
                    self.remote.file(main, data.extend, limit=LIMITS.main, reset=data.clear)
                except NetworkError as error:
                    failure = error
                    continue
                try:
                    listing = layout.parse(bytes(data), main)
                except FormatError as error:
                    raise VerificationError(str(error), code="broken-main") from error
                own = Item(
                    Wanted(main, *layout.describe(main), len(data)),
                    Proof(main, len(data), FileId.of(data)),
                )
                return [own, *self._items_of_listing(layout, listing, None)]
        assert failure is not None
        raise failure

    # -- obtaining -------------------------------------------------------------------------------

    def _plan(self, items: Sequence[Item]) -> Plan:
        wanted = []
        for item in items:
            local = self.got.has(item.path) or self._find_here(item)
            wanted.append(replace(item.wanted, local=local))
        forced = None if self.options.route == "auto" else Route(self.options.route)
        return make_plan(
            Question(
                wanted,
                self.head,
                frozenset(content[: head.PREFIX] for content in self.bench.contents()),
                frozenset(s.track for s in self.stock.sources if s.content),
                frozenset(self.sections),
                frozenset(self.bad),
                forced,
                recipe.available,
                recipe.cost,
            )
        )

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

    def _obtain(self, items: Sequence[Item]) -> None:
        """Finish every one of *items*. Raises _Unfit when the mirror cannot serve one."""
        by_path = {item.path: item for item in items}
        while True:
            todo = [item for item in items if not self.got.has(item.path)]
            if not todo:
                return
            mark = self._progress_mark()
            planned = self._plan(todo)
            self._fetch(planned)
            needed = {use for task in planned.tasks for edge in task.edges for use in edge.uses}
            for task in planned.tasks:
                if all(self.got.has(w.path) for w in task.files):
                    continue
                before_task = self.bench.spooled()
                keep = task.track in needed or any(item.small for item in items)
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

    def _fetch(self, planned: Plan) -> None:
        """Get what the plan's tasks need from packs; what cannot be had goes to ``bad``."""
        if planned.bundle is not None:
            self._fetch_bundle(planned.bundle)
        needed = [e.span for t in planned.tasks for e in t.edges]
        needed += [t.index for t in planned.tasks if t.index is not None]
        missing = [s for s in needed if s not in self.sections and not self._kept(s)]
        ranges = planned.ranges
        inside = assign(ranges, [s for s in missing if _within(s, ranges)])
        todo = [i for i, spans in enumerate(inside) if spans]

        def check(i: int, data: bytes) -> None:
            for span, section in _cut(ranges[todo[i]], inside[todo[i]], data):
                _check_section(span, section)

        while todo:
            wanted = [(str(ranges[i].pack), ranges[i].offset, ranges[i].length) for i in todo]
            arrived: set[int] = set()
            try:
                for i, data in self.remote.ranges(wanted, check=check):
                    for span, section in _cut(ranges[todo[i]], inside[todo[i]], data):
                        self._keep(span, section)
                    arrived.add(todo[i])
            except (NetworkError, VerificationError) as error:
                left = [i for i in todo if i not in arrived]
                if len(left) == 1:
                    self._give_up(ranges[left[0]].pack, inside[left[0]], error)
                    return
                # Which of several failed is not told: one by one from here.
                for i in left:
                    self._fetch_one(ranges[i], inside[i])
            return

    def _fetch_one(self, whole: Span, spans: Sequence[Span]) -> None:
        if whole.pack in self.bad:
            return

        def check(_: int, data: bytes) -> None:
            for span, section in _cut(whole, spans, data):
                _check_section(span, section)

        try:
            wanted = [(str(whole.pack), whole.offset, whole.length)]
            for _, data in self.remote.ranges(wanted, check=check):
                for span, section in _cut(whole, spans, data):
                    self._keep(span, section)
        except (NetworkError, VerificationError) as error:
            self._give_up(whole.pack, spans, error)

    def _give_up(self, pack: PackName, spans: Iterable[Span], error: TidingsError) -> None:
        if self.reason is None:
            self.reason = f"pack-{error.code}"
        self.progress.note(f"{pack}: {error}", code=error.code)
        if isinstance(error, NetworkError):
            self.bad.add(pack)
        self.bad.update(spans)

    def _kept(self, span: Span) -> bool:
        """Whether a run before has fetched *span*; it is proven again."""
        data = self.dest.work_read(_part_name(span), span.length)
        if data is None or len(data) != span.length:
            return False
        try:
            _check_section(span, data)
        except FormatError:
            return False
        self.sections.add(span)
        return True

    def _keep(self, span: Span, section: bytes) -> None:
        with self.dest.work_create(_part_name(span)) as file, translated(self.dest.path):
            write_all(file, section)
        self.sections.add(span)

    def _section(self, span: Span) -> bytes | None:
        """A section that was fetched; None where it could not be had."""
        return self.dest.work_read(_part_name(span), span.length) if span in self.sections else None

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
            self.bundled[target] = len(section)

    # -- tasks -----------------------------------------------------------------------------------

    def _perform(self, task: Task, items: Mapping[str, Item], keep: bool) -> None:
        wraps = [
            Wrap(w.recipe or recipe.IDENTITY, items[w.path].proof)
            for w in task.files
            if w not in task.downloads and not self.got.has(w.path)
        ]
        if task.route is Route.FULL:
            for wanted in task.downloads:
                self._download(items[wanted.path])
            if wraps:
                self._derive(task, wraps)
        elif task.route is Route.CURRENT:
            self._from_here(task, wraps)
        elif task.route is Route.DELTA:
            self._by_edges(task, wraps, keep)
        else:
            self._by_chunks(task, wraps, keep)

    def _settle(
        self,
        task: Task,
        content: ContentId | None,
        made: tuple[dict[str, Done], dict[str, Exception]],
        size: int,
    ) -> None:
        """Take in what was made of a content; a recipe that failed is not tried again."""
        done, failed = made
        for path, file in done.items():
            route = task.route
            if content is not None and content in self.bundled:
                route, size = Route.DELTA, self.bundled[content]
            self.got.done[path] = file
            self.got.routes[path] = (route, size)
            size = 0  # the next file of the same content costs nothing
            if content is not None:
                self.got.contents[file.sha256] = content
        for path, error in failed.items():
            self.bad.add(path)
            code = getattr(error, "code", "recipe")
            if self.reason is None:
                self.reason = f"recipe-{code}"
            self.progress.note(f"{path}: rebuilt bytes differ ({error})", code=code)

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
            section = self._section(edge.span)
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
                self.bad.add(edge.span)
                self.sections.discard(edge.span)
                self.dest.work_remove(_part_name(edge.span))
                self.progress.note(f"a delta of {task.track}: {error}", code=error.code)
                if self.reason is None:
                    self.reason = f"delta-{error.code}"
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
        stored = self._section(task.index)
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
                if self.options.route != "chunks" and price.score(question.costs) > full:
                    raise VerificationError("the file itself is smaller", code="dear")
                route.fetch(self.remote, question.costs, batched)
                made = self.bench.make(route.produce, chunk_list.content, wraps, keep)
            except (FormatError, VerificationError, NetworkError, EngineError) as error:
                self.bad.add(task.index)
                self.progress.note(f"chunks of {task.track}: {error}", code=error.code)
                if self.reason is None:
                    self.reason = f"chunks-{error.code}"
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

    def _download(self, item: Item, *, fresh: bool = False, limit: int = LIMITS.published) -> None:
        """The published file, whole. Raises _Unfit when no mirror has it as it must be."""
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
            if item.optional and error.code in ("missing", "forbidden"):
                self.got.absent.add(item.path)
                return
            raise _Unfit(error) from error
        except VerificationError as error:
            raise _Unfit(error) from error
        self.got.done[item.path] = done
        self.got.routes[item.path] = (Route.FULL, done.size)

    # -- the switch ------------------------------------------------------------------------------

    def _switch(self, layout: Layout, listing: Listing, items: Sequence[Item]) -> bool:
        """Put the finished files in place, the main file last; remove what is no more.

        Before anything is renamed the state learns what this run owns, so that a kill at any
        point leaves no file that nobody removes.
        """
        order = {path: i for i, path in enumerate(layout.mains())}
        for path in order.keys() & self.got.done.keys():
            if self.dest.read(path, LIMITS.main) == self._bytes_of(path):
                self.got.in_place[path] = self.got.done.pop(path).sha256
        kept = [item.path for item in items if item.path not in self.got.absent]
        new = [path for path in kept if path in self.got.done]
        named = set(self.now.listing.by_path()) if self.now else set()
        named |= {path for lay in LAYOUTS.values() for path in lay.mains()} if self.now else set()
        owned = {path for path in self.state.owned | named if self.dest.stamp(path) is not None}
        # A type that was not asked for stays, as long as it is the one that the publish names.
        gone = sorted(owned - set(kept) - self._still_right(listing))
        if new or gone:
            self.dest.work_write(
                states.STATE,
                states.encode(replace(self.state, owned=frozenset(owned | set(kept)), complete=())),
            )
        # What replaces a file of the old publish goes after all that is only new beside it.
        data = sorted((p for p in new if p not in order), key=lambda p: (p in owned, p))
        beside = sorted((p for p in new if p in order), key=order.__getitem__)
        self._install(data)
        self._install(beside)
        for path in gone:
            self.dest.remove(path)
        self._remember(listing, items, kept, frozenset(owned - set(gone) | set(kept)))
        states.tidy(self.dest)
        return bool(new)

    def _install(self, paths: Sequence[str]) -> None:
        for path in paths:
            done = self.got.done[path]
            # Two paths may be one and the same file: the first takes it, the next a copy.
            if sum(1 for other in self.got.done.values() if other.name == done.name) > 1:
                self.got.done[path] = done = self._copy_done(done, path)
            self.dest.install(done.name, path)
        for folder in {path.rpartition("/")[0]: path for path in paths}.values():
            self.dest.settle(folder)

    def _copy_done(self, done: Done, path: str) -> Done:
        file = self.dest.work_open(done.name)
        assert file is not None
        with file, self.bench.new_file(Proof(path, done.size, done.sha256)) as out:
            while piece := file.read(1 << 20):
                out.write(piece)
            return self.bench.finish(out, f"-{hashlib.sha256(path.encode()).hexdigest()[:16]}")

    def _still_right(self, listing: Listing) -> set[str]:
        """Files of DEST that the new publish names just as the old one did."""
        if self.now is None:
            return set()
        old = self.now.listing.by_path()
        return {
            path
            for path, file in listing.by_path().items()
            if path in old and (old[path].checksum, old[path].size) == (file.checksum, file.size)
        }

    def _remember(
        self, listing: Listing, items: Sequence[Item], kept: Sequence[str], owned: frozenset[str]
    ) -> None:
        seen = {key: value for key, value in self.stock.seen().items() if key.startswith("/")}
        for path in kept:
            stamp = self.dest.stamp(path)
            sha256 = self._sha256_of(path)
            if stamp is not None and sha256 is not None:
                seen[path] = Seen(stamp, sha256, self.got.contents.get(sha256))
        followed = self.head is not None and self.ask.data is not None
        if self.head is not None and self.ask.data is not None:
            self.dest.work_write(states.HEAD, self.ask.data)
        else:
            self.dest.work_remove(states.HEAD)
        by_head = followed and self._is_head(items)
        new = State(
            self.head.repo if self.head else self.state.repo,
            self.head.serial if self.head else self.state.serial,
            self.ask.etag,
            question_key(self.options),
            self.word,
            hashlib.sha256(self.ask.data or b"").digest() if followed else b"",
            self._bytes_full(items),
            owned,
            tuple(kept) if by_head else (),
            seen,
        )
        self.dest.work_write(states.STATE, states.encode(new))

    def _is_head(self, items: Sequence[Item]) -> bool:
        """Whether DEST is now what the head describes: only then does an unchanged head mean it."""
        assert self.head is not None
        known = {f.path: f.sha256 for f in self.head.files}
        for item in items:
            if item.path in self.got.absent:
                continue
            if known.get(item.path) != self._sha256_of(item.path):
                return False
        return True

    def _sweep(self) -> None:
        """Remove what a killed run left half done, and take up what it finished."""
        for name in self.dest.work_names():
            if name.startswith((TEMPORARY, SPOOL)):
                self.dest.work_remove(name)
            elif name.startswith(DONE):
                self._take_up(name)

    def _take_up(self, name: str) -> None:
        try:
            sha256 = FileId.from_hex(name.removeprefix(DONE)[:64])
        except FormatError:
            self.dest.work_remove(name)
            return
        # It is read again before it is used: a power cut may have left anything.
        codec = codec_of(name, b"")
        self.stock.add(
            Source(
                f"{states.FOLDER}/{name}",
                "",
                lambda: self.dest.work_open(name),
                states.Stamp(0, 0, 0),
                codec,
                sha256,
                None,
            )
        )

    # -- telling ---------------------------------------------------------------------------------

    def _tell(self, _: int) -> None:
        self.progress.progress("downloading", self.remote.bytes_received)

    def _bytes_full(self, items: Sequence[Item]) -> int:
        sizes = 0
        for item in items:
            if item.wanted.type == "key" or item.path in self.got.absent:
                continue
            done = self.got.done.get(item.path)
            sizes += done.size if done else item.proof.size or 0
        return sizes

    def _result(
        self, layout: Layout, listing: Listing, items: Sequence[Item], changed: bool
    ) -> SyncResult:
        files = []
        weights: dict[Route, int] = {}
        for item in items:
            if item.path in self.got.absent:
                continue
            route, size = self.got.routes.get(item.path, (Route.CURRENT, 0))
            weights[route] = weights.get(route, 0) + size
            done = self.got.done.get(item.path)
            total = done.size if done else item.proof.size or 0
            files.append(SyncedFile(item.path, item.wanted.type, total, str(route), size))
        weights.pop(Route.CURRENT, None)
        best = max(weights, key=weights.__getitem__, default=Route.CURRENT)
        return SyncResult(
            self.head.repo.hex() if self.head else "",
            self.head.serial if self.head else None,
            str(best),
            changed,
            self.remote.bytes_received,
            self.remote.bytes_sent,
            self._bytes_full(items),
            self.remote.requests,
            time.monotonic() - self.started,
            self.word,
            self.reason,
            tuple(files),
            listing.timestamp,
        )


def _check_head(found: head.Head) -> None:
    """What the format leaves open: a layout that is known here, and paths that may be joined."""
    layout = LAYOUTS.get(found.layout)
    if layout is None:
        raise FormatError(f"head: unknown layout {found.layout[:40]!r}", code="format-version")
    if found.main not in layout.mains():
        raise FormatError(f"head: {found.main[:80]!r} is no main file")
    for file in found.files:
        safe_path(file.path, "head")


def _agree(file: PublishedFile, entry: head.HeadFile) -> bool:
    if file.size not in (None, entry.size):
        return False
    if file.checksum is None or file.checksum.algorithm != "sha256":
        return True  # the rebuilt file must have both hashes
    return file.checksum.hex == entry.sha256.hex()


def _signed(dest: Destination, main: str) -> bool:
    return main == "InRelease" or any(
        dest.stamp(path) is not None for path in signature_paths(main)
    )


def _check_section(span: Span, section: bytes) -> None:
    """Raises FormatError unless *section* is a whole delta or index, by its own checksum."""
    view = memoryview(section)
    if section.startswith(delta.MAGIC):
        start = len(delta.MAGIC)
    elif section.startswith(b"TDX1"):
        start = 4
    else:
        raise FormatError(f"{span.pack}: neither a delta nor an index at {span.offset}")
    rest = view[start + delta.CHECKSUM :]
    if bytes(view[start : start + delta.CHECKSUM]) != delta.checksum(rest):
        raise FormatError(f"{span.pack}: damaged at {span.offset}")


def _cut(whole: Span, spans: Sequence[Span], data: bytes) -> list[tuple[Span, bytes]]:
    return [(span, data[span.offset - whole.offset : span.end - whole.offset]) for span in spans]


def _within(span: Span, ranges: Iterable[Span]) -> bool:
    return any(
        r.pack == span.pack and r.offset <= span.offset and span.end <= r.end for r in ranges
    )


def _part_name(span: Span) -> str:
    stem = str(span.pack).removesuffix(".pack")
    return f"{_PART}{stem}-{span.offset}-{span.length}"


def _plan_result(now: head.Head | None, planned: Plan, reason: str | None) -> PlanResult:
    files = []
    for task in planned.tasks:
        left = task.price.bytes
        requests = task.price.requests
        for wanted in task.files:
            files.append(
                PlannedFile(
                    wanted.path,
                    wanted.type,
                    wanted.size,
                    str(task.route),
                    left,
                    requests,
                    task.price.exact,
                    {str(r): (p.bytes, p.requests) for r, p in task.alternatives.items()},
                )
            )
            left = requests = 0
    price = planned.price
    return PlanResult(
        now.repo.hex() if now else "",
        now.serial if now else None,
        any(task.route is not Route.CURRENT for task in planned.tasks),
        price.bytes,
        price.requests,
        price.exact,
        reason,
        tuple(files),
    )
