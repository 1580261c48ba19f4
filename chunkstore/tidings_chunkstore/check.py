"""Check a store, from the head to each chunk's hash, without a lock and without a change.

The order is that of dependence: head, tables of contents, spans, then (unless *quick*) the bytes:
packs against their names, dictionaries, chunks, contents, recipes, deltas. A publish or gc may be
at work meanwhile: where something was wrong and the head or the packs changed, it is looked at
again.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum

from . import condemned, delta, head, reach, recipe
from .backends.base import HEAD_NAME, Readable
from .chunker import chunk_id
from .errors import EngineError, FormatError, StoreError, VerificationError
from .frames import FrameReader
from .ids import ContentId, FileId
from .limits import LIMITS, MIB
from .pack import FrameRun, Toc
from .places import PackName, Span
from .reach import Reach
from .store import Store, Stored

_TRIES = 4  # looks at a store that changes meanwhile
_READ = 8 * MIB
_CACHE = 256 * MIB  # contents held for the deltas that start from them

Progress = Callable[[str], None]


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"  #: something that the head names cannot be had, or is wrong
    WARNING = "warning"  #: wrong, but nothing that is served needs it
    INFO = "info"  #: worth knowing


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. *code* is stable; *where* names an object of the store."""

    severity: Severity
    code: str
    where: str
    text: str

    def to_json(self) -> dict[str, object]:
        """For programs."""
        return {
            "severity": str(self.severity),
            "code": self.code,
            "where": self.where,
            "text": self.text,
        }


@dataclass(frozen=True, slots=True)
class Checked:
    """How much was looked at."""

    packs: int = 0
    pack_bytes: int = 0
    snapshots: int = 0
    contents: int = 0
    chunks: int = 0
    recipes: int = 0
    edges: int = 0


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check found. *damaged_packs* are missing, or not what they should be."""

    findings: tuple[Finding, ...]
    checked: Checked
    serial: int | None
    damaged_packs: tuple[PackName, ...] = ()
    quick: bool = False

    @property
    def damaged(self) -> bool:
        """Whether anything that is served is wrong."""
        return any(finding.severity is Severity.ERROR for finding in self.findings)


def check(
    backend: Readable, *, quick: bool = False, progress: Progress = lambda _: None
) -> CheckReport:
    """Check the store. *quick*: head, tables of contents, indexes and sizes, but no bytes.

    Raises LocalError when this machine's disk is in the way.
    """
    for _ in range(_TRIES):
        before = _state(backend)
        report = _Check(Store(backend), quick, progress).run()
        if not report.findings or _state(backend) == before:
            break
        progress("the store changed meanwhile: looking again")
    return report


def _state(backend: Readable) -> tuple[list[str], bytes]:
    names = backend.names()
    try:
        size = backend.size(HEAD_NAME) or 0
        return names, backend.read_at(HEAD_NAME, 0, min(size, LIMITS.head))
    except StoreError:
        return names, b""


@dataclass(slots=True)
class _Check:
    store: Store
    quick: bool
    progress: Progress
    findings: list[Finding] = field(default_factory=list)
    checked: Checked = field(default_factory=Checked)
    bad: dict[PackName, None] = field(default_factory=dict)
    needed: set[PackName] = field(default_factory=set)
    sizes: dict[PackName, int] = field(default_factory=dict)
    located: dict[ContentId, Stored] = field(default_factory=dict)
    cache: OrderedDict[ContentId, bytes] = field(default_factory=OrderedDict)
    broken: set[ContentId] = field(default_factory=set)

    # -- structure -------------------------------------------------------------------------------

    def run(self) -> CheckReport:
        now = self._head()
        self._names(now)
        if now is not None:
            self._store(now)
        order = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.INFO: 2}
        found = sorted(dict.fromkeys(self.findings), key=lambda f: order[f.severity])
        serial = now.serial if now else None
        return CheckReport(tuple(found), self.checked, serial, tuple(self.bad), self.quick)

    def _say(self, severity: Severity, code: str, where: object, text: str) -> None:
        self.findings.append(Finding(severity, code, str(where), text))

    def _damaged(self, pack: PackName, code: str, text: str) -> None:
        """Something about a pack: as bad as the pack is needed."""
        self.bad[pack] = None
        wanted = pack in self.needed
        severity = Severity.ERROR if wanted else Severity.WARNING
        self._say(severity, code, pack, text if wanted else f"{text} (nothing needs it)")

    def _head(self) -> head.Head | None:
        try:
            found = self.store.read_head()
        except StoreError as error:
            self._say(Severity.ERROR, "head-damaged", HEAD_NAME, str(error))
            return None
        if found is None:
            packs = self.store.pack_names()
            text = "there is no store" if not packs else f"missing, beside {len(packs)} packs"
            self._say(Severity.ERROR, "head-missing", HEAD_NAME, text)
        return found

    def _names(self, now: head.Head | None) -> None:
        packs = self.store.pack_names()
        for name in packs:
            size = self.store.backend.size(str(name))
            if size is not None:
                self.sizes[name] = size
        known = {*map(str, packs), HEAD_NAME, condemned.NAME}
        for foreign in self.store.backend.names():
            if foreign not in known:
                self._say(Severity.WARNING, "foreign", foreign, "not a file of a store")
        for name in packs if now else ():
            if now and name.serial > now.serial:
                self._say(
                    Severity.INFO,
                    "unnamed-pack",
                    name,
                    "newer than the head: a publish is at work, or was interrupted",
                )
        size = self.store.backend.size(condemned.NAME)
        if size is not None:
            try:
                condemned.decode(self.store.backend.read_at(condemned.NAME, 0, size))
            except (FormatError, StoreError) as error:
                text = f"{error}: grace times start anew"
                self._say(Severity.WARNING, "gc-state", condemned.NAME, text)

    def _store(self, now: head.Head) -> None:
        names = [name for name in self.sizes if name.serial <= now.serial]
        tocs, unreadable = reach.readable_tocs(self.store, names)
        by_name = dict(tocs)
        named = {state.pack for state in now.states}
        doomed = condemned.read(self.store.backend).keys() - named
        standing = [entry for entry in tocs if entry[0] not in doomed]
        states = [(s.pack, by_name[s.pack]) for s in now.states if s.pack in by_name]
        wanted = [content for _, toc in states for content in reach.needed_by(toc)]
        needs = reach.survey(self.store, wanted, standing, names)
        if needs.lost:
            standing = tocs
            needs = reach.survey(self.store, wanted, tocs, names)
        self.needed = named | set(needs.packs) | needs.missing
        self.needed |= {c.index.pack for c in now.contents if c.index}
        self.located = self.store.locate(standing)
        for name in sorted(self.needed - set(names), key=lambda n: (n.serial, n.id)):
            self._damaged(name, "pack-missing", "missing")
        for name, error in unreadable.items():
            # A pack that cannot even say what it holds may be what the lost contents need.
            if needs.lost:
                self.needed.add(name)
            self._damaged(name, "pack-damaged", str(error))
        for name, toc in states:
            for content in toc.snapshot.contents:
                if content.id in needs.lost:
                    what = f"snapshot {toc.snapshot.serial}, {content.track}"
                    text = f"{what}: {needs.lost[content.id]}"
                    self._say(Severity.ERROR, "content-lost", name, text)
        if len(states) == len(now.states):
            self._same_head(now, states)
        self._spans(needs, by_name, now)
        self.checked = replace(
            self.checked,
            packs=len(names),
            pack_bytes=sum(self.sizes.values()),
            snapshots=len(states),
            contents=len(needs.found),
        )
        if not self.quick:
            self._bytes(now, states, by_name, needs)

    def _same_head(self, now: head.Head, states: list[tuple[PackName, Toc]]) -> None:
        rebuilt = head.decode(head.encode(head.build(states)))
        if rebuilt != replace(now, features={}):
            text = "does not say what the packs' tables of contents say"
            self._say(Severity.ERROR, "head-differs", HEAD_NAME, text)

    def _spans(self, needs: Reach, tocs: dict[PackName, Toc], now: head.Head) -> None:
        """Everything named lies inside its pack, and is what the pack's own table says it is."""
        for edge in now.edges:
            size = self.sizes.get(edge.span.pack)
            if size is not None and edge.span.end > size:
                self._damaged(edge.span.pack, "span", "the head names bytes beyond its end")
        for name, use in needs.packs.items():
            toc = tocs.get(name)
            if toc is None:
                continue
            rows = {offset: row[2] for offset, row in reach.chunk_rows(tocs, name).items()}
            wrong = [o for o, length in use.frames.items() if rows.get(o) != length]
            if wrong:
                text = f"an index names {len(wrong)} frame(s) that it does not have"
                self._damaged(name, "span", text)
            dictionaries = {d.offset: d.length for d in toc.dictionaries}
            if any(dictionaries.get(d.offset) != d.length for d in use.dictionaries):
                self._damaged(name, "span", "an index names a dictionary that it does not have")
            size = self.sizes[name]
            if any(span.end > size for span in (*use.indexes, *use.edges)):
                self._damaged(name, "span", "names bytes beyond its end")

    # -- bytes -----------------------------------------------------------------------------------

    def _bytes(
        self,
        now: head.Head,
        states: list[tuple[PackName, Toc]],
        tocs: dict[PackName, Toc],
        needs: Reach,
    ) -> None:
        for number, name in enumerate(self.sizes, 1):
            self.progress(f"pack {number} of {len(self.sizes)}")
            self._pack(name)
        for name in needs.packs:
            if name in tocs:
                self._chunks(name, tocs[name], needs.packs[name].frames)
        edges: dict[int, list[head.HeadEdge]] = {}
        for edge in now.edges:
            edges.setdefault(edge.target, []).append(edge)
        snapshots = {toc.snapshot.serial: toc.snapshot for _, toc in states}
        proven: set[tuple[FileId, ContentId]] = set()
        for name, toc in states:
            snapshot = toc.snapshot
            self.progress(f"snapshot {snapshot.serial}")
            for file in snapshot.files:
                content = snapshot.content(file.track)
                if content is None or file.recipe is None or (file.sha256, content.id) in proven:
                    continue
                proven.add((file.sha256, content.id))
                self._recipe(name, file.path, file.recipe, content.id, file.sha256, file.size)
            for content in snapshot.contents:
                self._content(name, content.id)
            for edge in edges.get(snapshot.serial, ()):
                older = snapshots.get(edge.base) if edge.base is not None else None
                base = older.content(edge.track) if older else None
                if edge.base is not None and base is None:
                    continue  # its pack cannot be read, which was said
                bases = [base] if base else []
                uses = [snapshot.content(use) for use in edge.uses]
                bases += [use for use in uses if use]
                target = snapshot.content(edge.track)
                if target is not None:
                    self._edge(edge, [b.id for b in bases], target.id)

    def _pack(self, name: PackName) -> None:
        digest = hashlib.sha256()
        size = self.sizes[name]
        try:
            for offset in range(0, size, _READ):
                length = min(_READ, size - offset)
                digest.update(self.store.backend.read_at(str(name), offset, length))
        except StoreError as error:
            self._damaged(name, "pack-missing", str(error))
            return
        if digest.digest()[:8] != name.id:
            self._damaged(name, "pack-damaged", "its bytes are not those that its name promises")

    def _chunks(self, name: PackName, toc: Toc, live: dict[int, int]) -> None:
        """Each frame that is needed opens to the chunk that its id names.

        Frames that nothing needs may have lost their dictionary, and are none of anybody's concern.
        """
        for run in toc.runs:
            dictionary = run.dictionary.within(name) if run.dictionary else None
            try:
                reader = FrameReader(self.store.read_dictionary(dictionary))
            except (StoreError, FormatError) as error:
                if dictionary is not None and dictionary.pack in self.sizes:
                    self._damaged(dictionary.pack, "dictionary", str(error))
                continue  # or moved by gc: the contents are read by their indexes below
            for offset, row, data in self._frames(name, run):
                if offset not in live:
                    continue
                self.checked = replace(self.checked, chunks=self.checked.chunks + 1)
                try:
                    good = chunk_id(reader.open(data)) == row[0]
                except FormatError:
                    good = False
                if not good:
                    text = f"the chunk {row[0].hex()[:16]} at {offset} is damaged"
                    self._damaged(name, "chunk", text)

    def _frames(
        self, name: PackName, run: FrameRun
    ) -> Iterator[tuple[int, tuple[bytes, int, int], bytes]]:
        offset, start, group = run.offset, run.offset, list(run.rows[:0])
        for number, row in enumerate(run.rows, 1):
            group.append(row)
            offset += row[2]
            if offset - start < _READ and number < len(run.rows):
                continue
            try:
                data = self.store.read_span(Span(name, start, offset - start))
            except StoreError as error:
                self._damaged(name, "chunk", str(error))
                return
            place = 0
            for entry in group:
                yield start + place, entry, data[place : place + entry[2]]
                place += entry[2]
            start, group = offset, []

    def _content(self, pack: PackName, content: ContentId) -> bytes | None:
        if content in self.cache:
            self.cache.move_to_end(content)
            return self.cache[content]
        if content in self.broken or content not in self.located:
            return None  # said before, or never stored
        try:
            data = self.store.content(content, self.located)
        except (StoreError, VerificationError) as error:
            self.broken.add(content)
            self._say(Severity.ERROR, "content", pack, str(error))
            return None
        self.cache[content] = data
        while sum(map(len, self.cache.values())) > _CACHE and len(self.cache) > 1:
            self.cache.popitem(last=False)
        return data

    def _recipe(
        self,
        pack: PackName,
        path: str,
        how: recipe.Recipe,
        content: ContentId,
        sha256: FileId,
        size: int,
    ) -> None:
        if not recipe.available(how):
            text = f"{path}: no engine {how.engine} here to prove its recipe"
            self._say(Severity.INFO, "engine", pack, text)
            return
        data = self._content(pack, content)
        sides = {side: self._content(pack, side) for side in how.sides}
        if data is None or None in sides.values():
            return
        self.checked = replace(self.checked, recipes=self.checked.recipes + 1)
        digest, length = hashlib.sha256(), 0
        try:
            for piece in recipe.run(how, [data], {k: v for k, v in sides.items() if v is not None}):
                digest.update(piece)
                length += len(piece)
        except (EngineError, FormatError) as error:
            self._say(Severity.ERROR, "recipe", pack, f"{path}: {error}")
            return
        if digest.digest() != sha256 or length != size:
            text = f"{path}: its recipe gives other bytes than were published"
            self._say(Severity.ERROR, "recipe", pack, text)

    def _edge(self, edge: head.HeadEdge, bases: list[ContentId], target: ContentId) -> None:
        contents = [self._content(edge.span.pack, base) for base in bases]
        if None in contents:
            return
        self.checked = replace(self.checked, edges=self.checked.edges + 1)
        out = io.BytesIO()
        try:
            section = self.store.read_span(edge.span)
            readers = [delta.reader_of(data) for data in contents if data is not None]
            delta.apply(section, readers, out.write)
            good = ContentId.of(out.getbuffer()) == target
        except (StoreError, FormatError, VerificationError):
            good = False
        if not good:
            text = f"the delta to {edge.track} of snapshot {edge.target} does not lead there"
            self._damaged(edge.span.pack, "edge", text)


__all__ = ["CheckReport", "Checked", "Finding", "Severity", "check"]
