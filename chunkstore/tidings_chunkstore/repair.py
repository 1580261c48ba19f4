"""Repair a store: packs from other mirrors, chunks from the published files, a head from the packs.

In this order: packs that are damaged or missing are fetched whole by name, and believed by their
hash alone. What then is still damaged is gone around: a maintenance pack (``rewrite``) takes over
what is intact, chunks that are not are made again from the published files, and snapshots of which
something is lost leave the head. At last the published files are published, if they are another
state than the head's. Damaged packs are condemned, not deleted: gc does that after its grace time.

The order of writes is packs, maintenance pack, head, gc.json: killed anywhere, run it again.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from . import chunker, condemned, head, publisher, reach
from .backends.base import HEAD_NAME
from .backends.local import LocalBackend
from .check import CheckReport, check
from .errors import FormatError, InputError, StoreError, VerificationError
from .ids import ContentId
from .layout import read_tree
from .limits import LIMITS
from .opening import codec_of, open_stream
from .pack import Toc, pack_digest
from .places import PackName
from .reach import Tocs
from .rewrite import Rescuer, Rewritten, Supplier, compose
from .store import Store

_ROUNDS = 8  # a restored pack may name further ones that are missing
_SHORT = 5  #: bytes of the shortest chunk id in an index

Progress = Callable[[str], None]


class PackSource(Protocol):
    """Another mirror of the same repository."""

    def fetch(self, name: str) -> bytes | None:
        """The bytes of a pack, whatever they are; None where it has none of that name."""


@dataclass(slots=True)
class RepairReport:
    """What was done, and what is lost."""

    before: CheckReport
    after: CheckReport | None = None  #: None: there was nothing to do
    restored: list[str] = field(default_factory=list)  #: packs that another mirror gave
    refused: list[str] = field(default_factory=list)  #: packs that a mirror gave with wrong bytes
    head_rebuilt: bool = False
    pack: str | None = None  #: the maintenance pack
    remade: int = 0  #: frames made again from the published files
    condemned: list[str] = field(default_factory=list)  #: damaged packs that go, now or by gc
    lost: dict[int, dict[str, str]] = field(default_factory=dict)  #: serial -> track -> why
    published: publisher.Report | None = None
    unpublished: str = ""  #: why the published files were of no use

    @property
    def whole(self) -> bool:
        """Whether all that the head names now can be had."""
        return not (self.after or self.before).damaged


def repair(
    backend: LocalBackend,
    sources: Sequence[PackSource] = (),
    root: Path | None = None,
    options: publisher.Options | None = None,
    progress: Progress = lambda _: None,
) -> RepairReport:
    """Repair the store from *sources*, and from the published repository in *root*.

    Raises:
        InputError: there is no store.
        LockedError: a publish, gc or repair is at work.
        LocalError: a read or write failed; run it again.
    """
    if not backend.names():
        raise InputError("there is no store", code="no-store")
    types = None if options is None else options.types
    with backend.lock():
        backend.sweep()
        report = RepairReport(check(backend, progress=progress))
        if not (report.before.damaged or report.before.damaged_packs):
            return report
        if root is not None:
            try:
                read_tree(root, None, types=types)
            except InputError as error:
                report.unpublished = str(error)
                root = None
        work = _Repair(backend, sources, root, progress, report, types)
        now = work.run()
    if root is not None:
        keep = max((options or publisher.Options()).keep, len(now.states) + 1 if now else 1)
        wanted = publisher.Options(keep=keep, rebuild=now is None, types=types)
        try:
            made = publisher.publish(root, backend, wanted, progress)
            report.published = made if made.changed else None
        except InputError as error:  # it changes as we read it: the next publish takes it in
            report.unpublished = str(error)
        with backend.lock():
            work.condemn()
    report.after = check(backend, progress=progress)
    return report


@dataclass(slots=True)
class _Repair:
    backend: LocalBackend
    sources: Sequence[PackSource]
    root: Path | None
    progress: Progress
    report: RepairReport
    types: Sequence[str] | None  #: that the published tree must have; None: all
    damaged: set[PackName] = field(default_factory=set)

    def run(self) -> head.Head | None:
        """The head afterwards, None where no snapshot could be kept."""
        damaged = self.damaged = self._restore(set(self.report.before.damaged_packs))
        now = self._head(damaged)
        if now is None:
            return None
        # A head that was just found may name packs that were not looked at before.
        found = check(self.backend, progress=self.progress)
        damaged = self.damaged = self._restore(set(found.damaged_packs))
        if found.damaged and (damaged or check(self.backend).damaged):
            now = self._go_around(now, damaged)
        self.condemn()
        return now

    # -- from other mirrors ----------------------------------------------------------------------

    def _restore(self, damaged: set[PackName]) -> set[PackName]:
        """Fetch what is damaged; what still is."""
        for _ in range(_ROUNDS if self.sources else 0):
            healed = {name for name in sorted(damaged, key=str) if self._fetch(name)}
            damaged -= healed
            if not healed:
                break
            damaged |= set(check(self.backend, quick=True).damaged_packs)
        return damaged

    def _fetch(self, name: PackName) -> bool:
        text = str(name)
        for source in self.sources:
            self.progress(f"fetching {text}")
            data = source.fetch(text)
            if data is None:
                continue
            if pack_digest([data]) != name.id:
                self.report.refused.append(text)
                continue
            self.backend.put(text, [data])
            self.report.restored.append(text)
            return True
        return False

    # -- the head --------------------------------------------------------------------------------

    def _head(self, damaged: set[PackName]) -> head.Head | None:
        """The head in place where it says what the packs say; else one rebuilt."""
        store = Store(self.backend)
        try:
            found = store.read_head()
        except StoreError:
            found = None
        if found is not None:
            differs = any(f.code == "head-differs" for f in self.report.before.findings)
            present = set(store.pack_names())
            # A damaged head may name a pack that never was, instead of the one that is there.
            meant = {name.serial for name in present - damaged}
            astray = any(s.pack not in present and s.serial in meant for s in found.states)
            if not (differs or astray):
                return found
        doomed = condemned.read(self.backend).keys() | damaged
        rebuilt = reach.rebuild(store, doomed) or reach.rebuild(store)
        if rebuilt is None:
            return None
        self.backend.swap_head(head.encode(rebuilt), self._head_bytes())
        self.report.head_rebuilt = True
        return rebuilt

    def _head_bytes(self) -> bytes | None:
        size = self.backend.size(HEAD_NAME)
        return None if size is None else self.backend.read_at(HEAD_NAME, 0, size)

    # -- around the damage -----------------------------------------------------------------------

    def _go_around(self, now: head.Head, damaged: set[PackName]) -> head.Head | None:
        """A head over what can be had without the damaged packs."""
        store = Store(self.backend)
        present = store.pack_names()
        tocs, _ = reach.readable_tocs(store, [n for n in present if n.serial <= now.serial])
        states = {state.pack for state in now.states}
        retained = [entry for entry in tocs if entry[0] in states]
        sound = [entry for entry in retained if entry[0] not in damaged]
        for state in now.states:
            if state.pack in damaged:
                self.report.lost[state.serial] = {"*": f"pack {state.pack} is damaged"}
        contents = self._published()
        supply = _supply(store, tocs, contents)
        located = store.locate(tocs)

        def rescue(content: ContentId) -> bytes | None:
            whole = next((data for data, _ in contents if ContentId.of(data) == content), None)
            try:
                return store.content(content, located) if whole is None else whole
            except (StoreError, VerificationError):
                return None

        serial = max([now.serial, *(name.serial for name in present)]) + 1
        good = [entry for entry in tocs if entry[0] not in damaged]
        standing = [name for name in present if name not in damaged]
        for current in reversed(sound):
            made = self._compose(store, serial, current, retained, tocs, damaged, supply, rescue)
            self.backend.put(str(made.name), made.pieces)
            store.remember(made.name, made.toc)
            whole, lost = reach.whole_snapshots(
                store,
                [*sound, (made.name, made.toc)],
                [*good, (made.name, made.toc)],
                [*standing, made.name],
            )
            if whole and whole[-1][0] == made.name:
                encoded = head.build(whole)
                self.backend.swap_head(head.encode(encoded), self._head_bytes())
                self.report.pack, self.report.remade = str(made.name), made.remade
                self.report.lost |= lost
                return encoded
            self.backend.delete(str(made.name))
        self.report.lost |= {s.serial: {"*": "nothing of it can be had"} for s in now.states}
        return None

    def _compose(
        self,
        store: Store,
        serial: int,
        current: tuple[PackName, Toc],
        retained: Tocs,
        tocs: Tocs,
        damaged: set[PackName],
        supply: Supplier,
        rescue: Rescuer,
    ) -> Rewritten:
        wanted = [content for _, toc in retained for content in reach.needed_by(toc)]
        # As if everything were there: what is not shows when it is read.
        everywhere = {name for name, _ in tocs} | damaged
        needs = reach.survey(store, wanted, tocs, everywhere)
        good = [entry for entry in tocs if entry[0] not in damaged]
        standing = reach.survey(store, wanted, good, [name for name, _ in good])
        stored = reach.claimed(tocs)
        return compose(
            store,
            serial,
            current,
            [c for c in dict.fromkeys(wanted) if c in stored and c not in standing.found],
            needs,
            tocs,
            damaged,
            supply=supply,
            rescue=rescue,
            salvage=True,
        )

    def _published(self) -> list[tuple[bytes, str]]:
        """The published files' contents, with their tracks."""
        if self.root is None:
            return []
        try:
            tree = read_tree(self.root, None, types=self.types)
        except InputError as error:  # it was good a moment ago: it is being replaced
            self.report.unpublished = str(error)
            return []
        found = [(main.data, main.file.track) for main in tree.mains]
        for entry in tree.files:
            try:
                data = entry.source.read_bytes()
            except OSError:
                continue  # replaced meanwhile
            codec = codec_of(entry.file.path, data[:16])
            try:
                opened = b"".join(open_stream(io.BytesIO(data), codec, limit=LIMITS.content))
            except FormatError:
                continue  # opaque: it was never stored
            found.append((opened, entry.file.track))
        return found

    def condemn(self) -> None:
        """Damaged packs that nothing needs any more are gc's."""
        store = Store(self.backend)
        now = store.read_head()
        named = {state.pack for state in now.states} if now else set()
        doomed = [name for name in store.pack_names() if name in self.damaged - named]
        if not doomed:
            return
        _, unreadable = reach.readable_tocs(store, doomed)
        for name in unreadable:
            self.backend.delete(str(name))  # it cannot even say what it held
        patient = dict.fromkeys(set(doomed) - unreadable.keys(), int(time.time()))
        if patient:
            table = {**condemned.read(self.backend), **patient}
            self.backend.put(condemned.NAME, [condemned.encode(table)])
        self.report.condemned = sorted({*self.report.condemned, *map(str, doomed)})


def _supply(store: Store, tocs: Tocs, contents: Iterable[tuple[bytes, str]]) -> Supplier:
    """The chunks of *contents* (with their tracks), by the first bytes of their ids."""
    chunks: dict[bytes, list[tuple[bytes, bytes]]] = {}
    for data, track in contents:
        for params in _params(store, tocs, track):
            ends = chunker.cuts(data, params)
            start = 0
            for end, chunk in zip(ends, chunker.chunk_ids(data, ends), strict=True):
                chunks.setdefault(chunk[:_SHORT], []).append((chunk, data[start:end]))
                start = end

    def supply(short: bytes) -> bytes | None:
        near = chunks.get(short[:_SHORT], ())
        return next((piece for id_, piece in near if id_[: len(short)] == short), None)

    return supply


def _params(store: Store, tocs: Tocs, track: str) -> list[chunker.ChunkerParams]:
    """How the contents of a track were cut, newest first."""
    found: dict[chunker.ChunkerParams, None] = {}
    seen: set[ContentId] = set()
    for name, toc in reversed(tocs):
        content = toc.snapshot.content(track)
        if content is None or content.index is None or content.id in seen:
            continue
        seen.add(content.id)
        try:
            found[store.read_index(content.index.within(name)).params] = None
        except StoreError:
            continue  # a damaged index; another has the same parameters
    return list(found)
