"""Publish: from a proven tree to one new pack and a new head. Owns the order of writes.

The pack is written first, the head swapped last, both under the folder's lock: a crash in
between leaves the old state whole, and the next publish removes the pack that no head names.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from . import condemned, head, packing, reach
from . import recipe as recipes
from .backends.base import HEAD_NAME
from .backends.local import LocalBackend
from .errors import FormatError, InputError, LocalError, StoreError, UnsettledError
from .ids import ChunkId, ContentId, FileId
from .layout import Layout, PublishedFile, TreeListing, by_name, read_tree, unchanged
from .limits import LIMITS
from .opening import UNOPENED, Codec, codec_of, open_stream
from .pack import REPO_ID, Content, File, Snapshot, Toc
from .places import PackName, Span
from .recipe import Recipe
from .store import Store, Stored, refuse_newer

Progress = Callable[[str], None]


def _silent(_: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Options:
    """How to publish."""

    layout: str | None = None  #: forces a layout; None: detected
    keep: int = 30  #: snapshots that the head retains, at most
    keep_seconds: int | None = None  #: and no older than this, the current one aside
    direct: int = 0  #: make direct edges from this many snapshots back
    rebuild: bool = False  #: start the store anew, whatever is there
    follow: tuple[Path, ...] = ()  #: further roots that the operator's symlinks may lead into
    types: tuple[str, ...] | None = None  #: rpm-md types that must be there; None: all


@dataclass(frozen=True, slots=True)
class OpaqueFile:
    """A published file that no recipe gives back, and why that may be."""

    path: str
    size: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a publish did. Sizes in bytes."""

    changed: bool
    serial: int
    snapshots: int
    seconds: float
    pack: str | None = None
    pack_bytes: int = 0
    changed_bytes: int = 0  #: published bytes of the files that are new in this snapshot
    published_bytes: int = 0  #: of all files
    tally: packing.Tally = field(default_factory=packing.Tally)
    opaque: tuple[OpaqueFile, ...] = ()
    engines: Mapping[str, int] = field(default_factory=dict)  #: files by the recipe's engine
    removed: tuple[str, ...] = ()  #: leftovers of an interrupted publish
    skipped: tuple[tuple[str, str], ...] = ()  #: records left out, and why

    @property
    def share(self) -> float:
        """The pack's bytes as a share of the changed files' published bytes."""
        return self.pack_bytes / self.changed_bytes if self.changed_bytes else 0.0


def publish(
    root: Path,
    backend: LocalBackend,
    options: Options | None = None,
    progress: Progress = _silent,
) -> Report:
    """Publish the repository in *root* to the store *backend*.

    Raises:
        InputError, UnsettledError: see ``layout.read_tree``.
            InputError too where the store holds another layout (``other-layout``).
        LockedError: another publish is at work.
        StoreError: the store is damaged; nothing was changed.
        LocalError: a read or write failed; the last published state is whole.
    """
    options = options or Options()
    started = time.monotonic()
    layout = by_name(options.layout) if options.layout else None
    if not root.is_dir():
        raise InputError(f"{root}: no such folder", code="no-metadata")
    store = Store(backend)
    quick = None if options.rebuild else _unchanged(root, layout, store, options)
    if quick is not None:
        return Report(False, quick.serial, len(quick.states), time.monotonic() - started)
    tree = read_tree(root, layout, follow=options.follow, types=options.types)
    with backend.lock() as waited:
        if waited:  # the tree may have gone on meanwhile
            tree = read_tree(root, layout, follow=options.follow, types=options.types)
        return _Publish(tree, store, backend, options, progress, started).run()


def refuse_other_layout(before: head.Head | None, tree: TreeListing, backend: LocalBackend) -> None:
    """Clients of one layout would find another one's files. Raises InputError."""
    if before is not None and before.layout != tree.layout.name:
        raise InputError(
            f"{backend.folder} holds {before.layout} and {tree.root} is {tree.layout.name}: choose "
            "another place, or start that one anew with --rebuild",
            code="other-layout",
        )


def _unchanged(
    root: Path, layout: Layout | None, store: Store, options: Options
) -> head.Head | None:
    """The head, when it describes what *root* holds as far as stat can tell."""
    try:
        now = store.read_head()
    except StoreError:
        return None  # the publish proper says what is wrong
    if now is None or (layout is not None and layout.name != now.layout):
        return None
    try:
        known = by_name(now.layout)
    except InputError:
        return None
    beside = set(known.mains())
    mains = {f.path: bytes(f.sha256) for f in now.files if f.path in beside}
    sizes = {f.path: f.size for f in now.files if f.path not in beside}
    same = unchanged(root, known, mains, sizes, follow=options.follow, types=options.types)
    return now if same and store.backend.size(str(now.current.pack)) is not None else None


@dataclass(frozen=True, slots=True)
class _Source:
    """A file to publish and how to get its bytes."""

    file: PublishedFile
    id: FileId
    size: int
    read: Callable[[], bytes]


@dataclass(slots=True)
class _Publish:
    tree: TreeListing
    store: Store
    backend: LocalBackend
    options: Options
    progress: Progress
    started: float
    _located: dict[ContentId, Stored] = field(default_factory=dict)
    _contents: dict[str, Content] = field(default_factory=dict)
    _files: list[File] = field(default_factory=list)
    _small: list[tuple[str, ContentId, bytes]] = field(default_factory=list)
    _head: head.Head | None = None
    _last: Toc | None = None
    _tocs: Sequence[tuple[PackName, Toc]] = ()
    _pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
    )
    _ahead: dict[ContentId, Future[bytes]] = field(default_factory=dict)

    def run(self) -> Report:
        """Under the lock: pack, then head."""
        before_bytes = self.store.read_head_bytes()
        before = None if self.options.rebuild else self._before(before_bytes)
        refuse_other_layout(before, self.tree, self.backend)
        removed = self._sweep(before)
        names = self._usable(before) if before else []
        tocs = self.store.tocs(names)
        last = next((t for n, t in tocs if before and n == before.current.pack), None)
        if before and last is None:
            raise StoreError(
                f"the head names pack {before.current.pack}, which is missing; "
                "restore it, or publish with --rebuild",
                code="store-missing",
            )
        sources = self._sources()
        if last and _same(last.snapshot, sources):
            assert before is not None
            if before_bytes is None:  # stopped between pack and head, or the head was lost
                self.backend.swap_head(head.encode(before), None)
            return Report(
                False, before.serial, len(before.states), self._seconds(), removed=removed
            )
        self._located = self.store.locate(tocs)
        serial = self._next_serial(before, before_bytes)
        stored = sum(self.backend.size(str(name)) or 0 for name in names)
        fill = stored / max(1, sum(source.size for source in sources))
        packer = packing.Packer(serial, self._known(before, tocs), fill)
        self._head, self._last, self._tocs = before, last, tocs
        with self._pool:
            for source in sources:
                self._take(source, packer)
        snapshot = self._snapshot(before, serial)
        name, pieces, toc = packer.finish(snapshot, before.serial if before else None)

        retained = self._retained(before, (name, toc))
        new_head = head.encode(head.build(retained))
        if len(new_head) > LIMITS.head:
            raise InputError(f"the head would have {len(new_head)} bytes; keep fewer snapshots")
        self.progress(f"writing {name}")
        size = self.backend.put(str(name), pieces)
        self.backend.swap_head(new_head, before_bytes)
        self.store.remember(name, toc)

        old = {f.sha256 for f in last.snapshot.files} if last else set()
        engines: dict[str, int] = {}
        for file in self._files:
            if file.recipe and file.recipe.engine:
                engines[file.recipe.engine] = engines.get(file.recipe.engine, 0) + 1
        return Report(
            True,
            serial,
            len(retained),
            self._seconds(),
            str(name),
            size,
            sum(f.size for f in self._files if f.sha256 not in old),
            sum(f.size for f in self._files),
            packer.tally,
            tuple(OpaqueFile(f.path, f.size) for f in self._files if f.recipe is None),
            engines,
            removed,
            self.tree.listing.skipped,
        )

    def _seconds(self) -> float:
        return time.monotonic() - self.started

    def _before(self, data: bytes | None) -> head.Head | None:
        """The head to build on: the one in place, or one rebuilt where it is gone."""
        if data is None:
            return reach.rebuild(self.store, condemned.read(self.backend))
        try:
            return head.decode(data)
        except FormatError as error:
            refuse_newer(error)
            raise StoreError(
                f"{HEAD_NAME} is damaged ({error}); remove it to have it rebuilt from the packs",
                code="store-head",
            ) from error

    def _sweep(self, before: head.Head | None) -> tuple[str, ...]:
        """Remove temporary files, and packs that were written and never named by a head."""
        removed = self.backend.sweep()
        if before is not None:
            for name in self.store.pack_names():
                if name.serial > before.serial:
                    self.backend.delete(str(name))
                    removed.append(str(name))
        return tuple(removed)

    def _usable(self, before: head.Head) -> list[PackName]:
        """The packs to build on: not those that gc has condemned, which are soon gone."""
        named = {state.pack for state in before.states}
        doomed = condemned.read(self.backend).keys() - named
        return [name for name in self.store.pack_names() if name not in doomed]

    def _known(
        self, before: head.Head | None, tocs: Sequence[tuple[PackName, Toc]]
    ) -> dict[ChunkId, tuple[Span, Span | None]]:
        """The chunks that the packs hold, each with the dictionary that opens its frame.

        After gc a dictionary may have gone, or lie elsewhere: the current indexes know where. A
        frame whose dictionary nobody knows is as good as gone.
        """
        there = {name for name, _ in tocs}
        moved: dict[Span, Span | None] | None = None
        known: dict[ChunkId, tuple[Span, Span | None]] = {}
        for name, toc in tocs:
            for run in toc.runs:
                dictionary = run.dictionary.within(name) if run.dictionary else None
                gone = dictionary is not None and dictionary.pack not in there
                if gone and moved is None:
                    moved = self._dictionaries(before, tocs)
                offset = run.offset
                for chunk, _, length in run.rows:
                    span = Span(name, offset, length)
                    offset += length
                    if not gone:
                        known[chunk] = (span, dictionary)
                    elif moved and span in moved:
                        known[chunk] = (span, moved[span])
        return known

    def _dictionaries(
        self, before: head.Head | None, tocs: Sequence[tuple[PackName, Toc]]
    ) -> dict[Span, Span | None]:
        """By frame: the dictionary that opens it, as the indexes say that gc wrote last."""
        there = {name for name, _ in tocs}
        places = {c.index for c in before.contents if c.index} if before else set()
        places |= {c.index.within(name) for name, toc in tocs for c in toc.kept if c.index}
        return {
            frame.span: frame.dictionary
            for place in places
            if place.pack in there
            for frame in self.store.read_index(place).frames
            if frame.dictionary is None or frame.dictionary.pack in there
        }

    def _next_serial(self, before: head.Head | None, data: bytes | None) -> int:
        """One above everything ever seen here: a serial is never used twice."""
        last = before.serial if before else 0
        if self.options.rebuild and data is not None:
            try:
                last = head.decode(data).serial
            except FormatError:
                last = 0  # a damaged head tells no serial; the packs still do
        return max([last, *(name.serial for name in self.store.pack_names())]) + 1

    def _sources(self) -> list[_Source]:
        found = [
            _Source(main.file, main.id, len(main.data), lambda data=main.data: data)  # type: ignore[misc]
            for main in reversed(self.tree.mains)
        ]
        for entry in self.tree.files:
            found.append(
                _Source(
                    entry.file,
                    entry.id,
                    entry.size,
                    lambda entry=entry: _read(entry.source, entry.size, entry.id),  # type: ignore[misc]
                )
            )
        # Release goes before InRelease, which is mostly the same text and is made from it.
        return sorted(found, key=lambda s: (s.file.rank, s.file.track == "inrelease"))

    def _take(self, source: _Source, packer: packing.Packer) -> None:
        """Add one file, and its content where it is new."""
        file = source.file
        old = self._last.snapshot if self._last else None
        same = next((f for f in old.files if f.sha256 == source.id), None) if old else None
        if same is not None and old is not None and self._head is not None:
            self._keep(source, same, old, self._head.current.pack)
            return
        self.progress(f"reading {file.path}")
        self._read_ahead(file.track)
        published = source.read()
        codec = codec_of(file.path, published[:16])
        content = published
        if codec is not Codec.NONE:
            try:
                stream = open_stream(io.BytesIO(published), codec, limit=LIMITS.content)
                content = b"".join(stream)
            except FormatError:
                # Whatever it is, clients get it as it is.
                self._add_file(source, self._opaque(file, published), None)
                return
        content_id = ContentId.of(content)
        self._check_opened(file, content_id, len(content))
        hint = next((f.recipe for f in old.files if f.type == file.type), None) if old else None
        proof = self._pool.submit(recipes.find, published, content, codec, hint)
        if hint is None and proof.result() is None:
            self._add_file(source, self._opaque(file, published), None)
            return
        # With a recipe that held last time, the proof runs beside the chunking and the delta.
        track = self._track_for(file, content_id)
        self._store(track, content_id, content, source.size, packer)
        found = proof.result()
        if found is None:
            self._add_file(source, self._opaque(file, published), None)
            return
        for number, (side, data) in enumerate(found.sides.items()):
            side_track = f"{track}.{file.type}.side{number}"
            self._store(side_track, side, data, source.size, packer, is_side=True)
        self._add_file(source, track, found.recipe)

    def _check_opened(self, file: PublishedFile, content: ContentId, size: int) -> None:
        """A client's ``verify`` holds the content to what the main file says of it: so do we."""
        if file.path.endswith(UNOPENED):
            return
        what, main = f"{self.tree.root}/{file.path}", self.tree.listing.main
        if file.open_size is not None and size != file.open_size:
            text = f"opens to {size} bytes, and open-size in {main} is {file.open_size}"
            raise UnsettledError(f"{what}: {text}", code="wrong-size", paths=[file.path])
        if file.open_id is not None and content != file.open_id:
            text = f"opens to another content than {main} says (open-checksum)"
            raise UnsettledError(f"{what}: {text}", code="wrong-checksum", paths=[file.path])

    def _add_file(self, source: _Source, track: str, recipe: Recipe | None) -> None:
        file = source.file
        self._files.append(File(file.path, file.type, track, source.size, source.id, recipe))

    def _opaque(self, file: PublishedFile, published: bytes) -> str:
        """The track of a file that only the whole file can serve; its content is not stored."""
        content = ContentId.of(published)
        track = self._track_for(file, content)
        self._contents.setdefault(track, Content(track, content, len(published), None))
        return track

    def _keep(self, source: _Source, same: File, old: Snapshot, pack: PackName) -> None:
        """The file is as before: so are its content, its recipe and its side contents."""
        recipe = same.recipe
        for content in old.contents:
            if content.track == same.track and recipe is not None:
                self._check_opened(source.file, content.id, content.size)
            wanted = content.track == same.track or (recipe and content.id in recipe.sides)
            if wanted and content.track not in self._contents:
                place = content.index.within(pack) if content.index else None
                self._contents[content.track] = Content(
                    content.track, content.id, content.size, place
                )
                if content.size <= packing.SMALL and content.id in self._located:
                    data = self.store.content(content.id, self._located)
                    self._small.append((content.track, content.id, data))
        self._add_file(source, same.track, recipe)

    def _track_for(self, file: PublishedFile, content: ContentId) -> str:
        """The file's track, or one of its own where its kin have another content."""
        for track in (file.track, f"{file.track}.{file.type}", f"{file.track}.{file.path}"):
            taken = self._contents.get(track)
            if taken is None or taken.id == content:
                return track
        raise InputError(f"{file.path} is listed twice with different contents")

    def _store(
        self,
        track: str,
        content: ContentId,
        data: bytes,
        published_size: int,
        packer: packing.Packer,
        *,
        is_side: bool = False,
    ) -> None:
        # Side contents are small beside the file that needs them. They are always stored by an
        # index, for a client may have none to start from, and no other content builds on them.
        helpers = () if is_side else self._small
        limit = len(data) if is_side else published_size
        if track in self._contents:
            return  # another wrapping of the same content
        before = self._head
        by_serial = {toc.snapshot.serial: (name, toc) for name, toc in self._tocs}
        previous = None
        depth = 1
        if before is not None:
            name, toc = by_serial[before.serial]
            old = toc.snapshot.content(track)
            if old is not None and old.id == content:
                place = old.index.within(name) if old.index else None
                self._contents[track] = Content(track, content, len(data), place)
                if not is_side:
                    self._note_small(track, content, data)
                return
            if old is not None and old.id in self._located:
                previous = self._base(before.serial, old.id)
                depth = self._located[old.id].depth + 1
        self._contents[track] = Content(track, content, len(data), None)
        self.progress(f"delta for {track}")
        packer.connect(track, content, data, limit, previous, helpers)
        self.progress(f"chunking {track}")
        packer.add(track, content, data, published_size, self._pinned(track), depth)
        for state in before.states[-1 - self.options.direct : -1] if before else ():
            entry = by_serial.get(state.serial)
            older = entry[1].snapshot.content(track) if entry else None
            taken = {content, previous.id} if previous else {content}
            if older and older.id in self._located and older.id not in taken:
                base = self._base(state.serial, older.id)
                packer.connect_directly(track, content, data, limit, base)
        if not is_side:
            self._note_small(track, content, data)

    def _note_small(self, track: str, content: ContentId, data: bytes) -> None:
        if len(data) <= packing.SMALL:
            self._small.append((track, content, data))

    def _pinned(self, track: str) -> packing.Pinned | None:
        """What the newest index of the track settled, if there is one."""
        there = {name for name, _ in self._tocs}
        for name, toc in reversed(self._tocs):
            told = (toc.snapshot.content(track), *(c for c in toc.kept if c.track == track))
            places = (c.index.within(name) for c in told if c is not None and c.index)
            place = next((place for place in places if place.pack in there), None)
            if place is None:
                continue  # stored by a delta, or gone with its pack
            chunk_list = self.store.read_index(place)
            dictionaries = (f.dictionary for f in reversed(chunk_list.frames) if f.dictionary)
            used = next((span for span in dictionaries if span.pack in there), None)
            return packing.Pinned(chunk_list.params, used, self.store.read_dictionary(used))
        return None

    def _base(self, serial: int, content: ContentId) -> packing.Base:
        ahead = self._ahead.pop(content, None)
        if ahead is not None:
            return packing.Base(serial, content, ahead.result)
        return packing.Base(serial, content, lambda: self.store.content(content, self._located))

    def _read_ahead(self, track: str) -> None:
        """Read the track's last content beside opening the new one: the delta will want it."""
        old = self._last.snapshot.content(track) if self._last else None
        if old is not None and old.id in self._located and track not in self._contents:
            self._ahead[old.id] = self._pool.submit(self.store.content, old.id, self._located)

    def _snapshot(self, before: head.Head | None, serial: int) -> Snapshot:
        listing = self.tree.listing
        return Snapshot(
            before.repo if before else secrets.token_bytes(REPO_ID),
            serial,
            int(time.time()),
            listing.layout,
            listing.main,
            listing.timestamp,
            tuple(self._files),
            tuple(self._contents.values()),
        )

    def _retained(
        self, before: head.Head | None, new: tuple[PackName, Toc]
    ) -> list[tuple[PackName, Toc]]:
        retained = []
        oldest = 0
        if self.options.keep_seconds is not None:
            oldest = new[1].snapshot.time - self.options.keep_seconds
        for state in before.states if before else ():
            toc = self.store.toc(state.pack)
            if toc.snapshot.time >= oldest:
                retained.append((state.pack, toc))
        keep = max(self.options.keep, 1) - 1
        return [*(retained[-keep:] if keep else ()), new]


def _same(old: Snapshot, sources: Sequence[_Source]) -> bool:
    return {(f.path, f.sha256) for f in old.files} == {(s.file.path, s.id) for s in sources}


def _read(path: Path, size: int, expected: FileId) -> bytes:
    """The file's bytes as they were proven. Raises UnsettledError when they changed since."""
    try:
        with path.open("rb") as file:
            data = file.read(size + 1)
    except FileNotFoundError as error:
        raise UnsettledError(f"{path} went while it was published", code="moving") from error
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror}") from error
    if hashlib.sha256(data).digest() != expected:
        raise UnsettledError(f"{path} changed while it was published", code="moving")
    return data
