"""The head: the one mutable object of a repository, and the first thing every client reads.

It names the current snapshot's files with their recipes, and for each retained snapshot which
content each *track* had and where the edges between them lie. It is in every update's bill, so the
history is one block of varints in base64, and content ids are cut to PREFIX bytes: they only say
where to look, the full hashes of repomd.xml, Release and the sections prove what was found.
A head is a pure function of the retained packs' tables of contents: ``build``.
The format is in docs/format.md, section "Head".
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .errors import FormatError
from .fields import Fields, as_integer, parse_json
from .ids import FileId
from .limits import LIMITS
from .pack import REPO_ID, File, Toc
from .places import PackName, Span
from .recipe import Recipe
from .wire import Reader, put_uvarint

FORMAT = "tidings-head"
VERSION = 1
PREFIX = 6  #: bytes of a content id in the history

# Kinds of entry in a step. An edge follows kinds 1 to 4.
# A skip moves the place of the next edge past bytes that no retained snapshot can use.
_CHANGED, _FROM_PREVIOUS, _ALONE, _PREVIOUS_AND_USES, _USES, _GONE, _SKIP = range(7)
_MAX_STATE_ENTRIES = 1 << 20  # over all states: a small head must not unfold without bound


@dataclass(frozen=True, slots=True)
class HeadContent:
    """One content of the current snapshot. Without *index* it is not stored."""

    track: str
    size: int
    index: Span | None


@dataclass(frozen=True, slots=True)
class HeadEdge:
    """A delta to *track*'s content in snapshot *target*; see pack.Edge."""

    track: str
    target: int
    base: int | None
    uses: tuple[str, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class State:
    """A retained snapshot: its pack, and the content id prefix of each track."""

    serial: int
    pack: PackName
    contents: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Head:
    """A repository's head. *states* are oldest first; the last one is the current snapshot."""

    repo: bytes
    serial: int
    time: int
    layout: str
    main: str
    timestamp: int
    files: tuple[File, ...]
    contents: tuple[HeadContent, ...]
    states: tuple[State, ...]
    edges: tuple[HeadEdge, ...]
    features: Mapping[str, int] = field(default_factory=dict)  #: what a dynamic server adds

    @property
    def current(self) -> State:
        """The current snapshot's state."""
        return self.states[-1]

    def content(self, track: str) -> HeadContent | None:
        """The current content of *track*."""
        return next((c for c in self.contents if c.track == track), None)

    def file(self, path: str) -> File | None:
        """The current file at *path*."""
        return next((f for f in self.files if f.path == path), None)


def build(tocs: Sequence[tuple[PackName, Toc]]) -> Head:
    """The head over the retained packs, oldest first. Edges from a snapshot not retained are left
    out, so a history with a hole is still right.
    """
    name, last = tocs[-1]
    now = last.snapshot
    states: list[State] = []
    edges: list[HeadEdge] = []
    retained = {toc.snapshot.serial for _, toc in tocs}
    for pack, toc in tocs:
        serial = toc.snapshot.serial
        states.append(State(serial, pack, {c.track: c.id[:PREFIX] for c in toc.snapshot.contents}))
        edges += [
            HeadEdge(e.track, serial, e.base, e.uses, Span(pack, e.offset, e.length))
            for e in toc.edges
            if e.base is None or e.base in retained
        ]
    return Head(
        now.repo,
        now.serial,
        now.time,
        now.layout,
        now.main,
        now.timestamp,
        now.files,
        tuple(
            HeadContent(c.track, c.size, c.index.within(name) if c.index else None)
            for c in now.contents
        ),
        tuple(states),
        tuple(edges),
    )


# -- bytes ---------------------------------------------------------------------------------------


def encode(head: Head) -> bytes:
    """The bytes of head.json."""
    tracks = list(dict.fromkeys(t for s in head.states for t in s.contents))
    number = {track: i for i, track in enumerate(tracks)}
    steps = {state.pack: i for i, state in enumerate(head.states)}
    value: dict[str, object] = {
        "format": FORMAT,
        "v": VERSION,
        "repo": _b64(head.repo),
        "serial": head.serial,
        "time": head.time,
        "layout": head.layout,
        "main": head.main,
        "timestamp": head.timestamp,
        "files": [_file_json(f, number) for f in head.files],
        "tracks": tracks,
        "contents": [
            [number[c.track], c.size, *_place_json(c.index, steps)] for c in head.contents
        ],
        "steps": _b64(_encode_steps(head, number)),
    }
    if head.features:
        value["features"] = dict(head.features)
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


def _unb64(text: object, what: str) -> bytes:
    if not isinstance(text, str):
        raise FormatError(f"{what}: not a text")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{what}: not base64") from error


def _file_json(file: File, number: Mapping[str, int]) -> dict[str, object]:
    """A published name often holds the file's own hash: it is written as ``{}``."""
    digest = file.sha256.hex()
    path = file.path
    if digest in path and "{" not in path:
        path = path.replace(digest, "{}", 1)
    return {
        "path": path,
        "type": file.type,
        "track": number[file.track],
        "size": file.size,
        "sha256": _b64(file.sha256),
        "recipe": file.recipe.to_json() if file.recipe else None,
    }


def _place_json(index: Span | None, steps: Mapping[PackName, int]) -> list[object]:
    """An index in a retained snapshot's own pack is named by the number of its step."""
    if index is None:
        return []
    pack: object = steps.get(index.pack, str(index.pack))
    return [pack, index.offset, index.length]


def _encode_steps(head: Head, number: Mapping[str, int]) -> bytes:
    out = bytearray()
    put_uvarint(out, len(head.states))
    serial = 0
    before: Mapping[str, bytes] = {}
    direct: list[tuple[int, list[HeadEdge]]] = []
    for i, state in enumerate(head.states):
        previous = head.states[i - 1].serial if i else None
        mine = sorted((e for e in head.edges if e.target == state.serial), key=_offset)
        plain = [e for e in mine if e.base is None or e.base == previous]
        direct += [(i, run) for run in _direct_runs(e for e in mine if e not in plain)]
        put_uvarint(out, state.serial - serial)
        serial = state.serial
        out += state.pack.id
        place = plain[0].span.offset if plain else 0
        put_uvarint(out, place)
        entries = bytearray()
        count = 0
        stated: set[str] = set()
        for edge in plain:
            if edge.span.offset != place:
                put_uvarint(entries, _SKIP)
                put_uvarint(entries, edge.span.offset - place)
                count += 1
            place = edge.span.end
            with_uses = _PREVIOUS_AND_USES if edge.base is not None else _USES
            without = _FROM_PREVIOUS if edge.base is not None else _ALONE
            put_uvarint(entries, number[edge.track] << 3 | (with_uses if edge.uses else without))
            if edge.track not in stated:
                entries += state.contents[edge.track]
            stated.add(edge.track)
            put_uvarint(entries, edge.span.length)
            if edge.uses:
                put_uvarint(entries, len(edge.uses))
                for use in edge.uses:
                    put_uvarint(entries, number[use])
            count += 1
        for track, content in state.contents.items():
            if track not in stated and content != before.get(track):
                put_uvarint(entries, number[track] << 3 | _CHANGED)
                entries += content
                count += 1
        for track in before:
            if track not in state.contents:
                put_uvarint(entries, number[track] << 3 | _GONE)
                count += 1
        put_uvarint(out, count)
        out += entries
        before = state.contents
    put_uvarint(out, len(direct))
    for step, run in direct:
        put_uvarint(out, step)
        put_uvarint(out, head.states[step].serial - (run[0].base or 0))
        put_uvarint(out, run[0].span.offset)
        put_uvarint(out, len(run))
        for edge in run:
            put_uvarint(out, number[edge.track])
            put_uvarint(out, edge.span.length)
    return bytes(out)


def _offset(edge: HeadEdge) -> int:
    return edge.span.offset


def _direct_runs(edges: Iterable[HeadEdge]) -> list[list[HeadEdge]]:
    """Direct edges, grouped where they share a base and lie one after the other."""
    runs: list[list[HeadEdge]] = []
    for edge in sorted(edges, key=_offset):
        last = runs[-1][-1] if runs else None
        if last and last.base == edge.base and last.span.end == edge.span.offset:
            runs[-1].append(edge)
        else:
            runs.append([edge])
    return runs


def decode(data: bytes) -> Head:
    """Read head.json. Raises FormatError; code ``format-version`` for a version from the future."""
    what = "head"
    if len(data) > LIMITS.head:
        raise FormatError(f"{what}: larger than {LIMITS.head} bytes")
    value = Fields(parse_json(data, what), what)
    if value.get("format") != FORMAT:
        raise FormatError(f"{what}: not a Tidings head")
    if value.get("v") != VERSION:
        raise FormatError(
            f"{what}: format version {value.get('v')!r} is not known to this release",
            code="format-version",
        )
    tracks = []
    for item in value.items("tracks", 2 * LIMITS.files):
        if not isinstance(item, str) or len(item) > LIMITS.path or not item.isprintable():
            raise FormatError(f"{what}: not a track's name")
        tracks.append(item)
    states, edges = _decode_steps(_unb64(value.get("steps"), what), tracks)
    files = tuple(_decode_file(item, tracks) for item in value.items("files", LIMITS.files))
    contents = tuple(
        _decode_content(item, tracks, states) for item in value.items("contents", 2 * LIMITS.files)
    )
    repo = _unb64(value.get("repo"), f"{what}: repo")
    if len(repo) != REPO_ID:
        raise FormatError(f"{what}: repo has {len(repo)} bytes, not {REPO_ID}")
    features = value.get("features")
    if features is None:
        features = {}
    if not isinstance(features, dict) or len(features) > 32:
        raise FormatError(f"{what}: features is not a small object")
    head = Head(
        repo,
        value.integer("serial", (1 << 32) - 1),
        value.integer("time"),
        value.text("layout"),
        value.text("main"),
        value.integer("timestamp"),
        files,
        contents,
        states,
        edges,
        {str(k): as_integer(v, f"{what}: features") for k, v in features.items()},
    )
    _check(head)
    return head


def _check(head: Head) -> None:
    what = "head"
    if head.current.serial != head.serial:
        raise FormatError(f"{what}: serial {head.serial} is not its last step's")
    present = set(head.current.contents)
    if {c.track for c in head.contents} != present or len(head.contents) != len(present):
        raise FormatError(f"{what}: contents and steps name different tracks")
    if any(f.track not in present for f in head.files):
        raise FormatError(f"{what}: a file has no content")
    paths = {f.path for f in head.files}
    if len(paths) != len(head.files) or head.main not in paths:
        raise FormatError(f"{what}: files do not name {head.main!r} once, or repeat a path")


def _track(tracks: Sequence[str], value: object) -> str:
    return tracks[as_integer(value, "head: track", len(tracks) - 1)]


def _decode_file(item: object, tracks: Sequence[str]) -> File:
    entry = Fields(item, "head: files")
    sha256 = FileId(_unb64(entry.get("sha256"), "head: sha256"))
    recipe = entry.get("recipe")
    return File(
        entry.text("path").replace("{}", sha256.hex(), 1),
        entry.text("type"),
        _track(tracks, entry.get("track")),
        entry.integer("size", LIMITS.published),
        sha256,
        None if recipe is None else Recipe.from_json(recipe),
    )


def _decode_content(item: object, tracks: Sequence[str], states: Sequence[State]) -> HeadContent:
    what = "head: contents"
    if not isinstance(item, list) or len(item) not in (2, 5):
        raise FormatError(f"{what}: not a content")
    index = None
    if len(item) == 5:
        if isinstance(item[2], str):
            pack = PackName.parse(item[2])
        else:
            pack = states[as_integer(item[2], what, len(states) - 1)].pack
        index = Span(
            pack, as_integer(item[3], what, LIMITS.pack), as_integer(item[4], what, LIMITS.index)
        )
    return HeadContent(_track(tracks, item[0]), as_integer(item[1], what, LIMITS.content), index)


def _decode_steps(
    data: bytes, tracks: Sequence[str]
) -> tuple[tuple[State, ...], tuple[HeadEdge, ...]]:
    what = "head: steps"
    reader = Reader(data, what)
    states: list[State] = []
    edges: list[HeadEdge] = []
    serial = unfolded = 0
    contents: dict[str, bytes] = {}
    count = reader.uvarint(min(LIMITS.snapshots, reader.left // 10))
    if count == 0:
        raise FormatError(f"{what}: no snapshot")
    for _ in range(count):
        previous = serial
        serial += reader.uvarint((1 << 32) - 1 - serial)
        if serial == previous:
            raise FormatError(f"{what}: serial {serial} twice")
        pack = PackName(serial, bytes(reader.take(8)))
        offset = reader.uvarint(LIMITS.pack)
        contents = dict(contents)
        stated: set[str] = set()
        for _ in range(reader.uvarint(reader.left)):
            # A track with two edges states its content with the first one only.
            key = reader.uvarint()
            kind = key & 7
            if kind == _SKIP:
                offset += reader.uvarint(LIMITS.pack)
                continue
            track = _track(tracks, key >> 3)
            if kind == _GONE:
                if contents.pop(track, None) is None:
                    raise FormatError(f"{what}: {track} goes before it came")
                continue
            if kind > _USES:
                raise FormatError(f"{what}: unknown kind of entry {kind}")
            if track not in stated:
                contents[track] = bytes(reader.take(PREFIX))
                stated.add(track)
            if kind == _CHANGED:
                continue
            span = Span(pack, offset, reader.uvarint(LIMITS.pack))
            offset = span.end
            uses: tuple[str, ...] = ()
            if kind in (_PREVIOUS_AND_USES, _USES):
                uses = tuple(
                    _track(tracks, reader.uvarint())
                    for _ in range(reader.uvarint(LIMITS.delta_bases))
                )
            base = previous if kind in (_FROM_PREVIOUS, _PREVIOUS_AND_USES) else None
            edges.append(HeadEdge(track, serial, base, uses, span))
        unfolded += len(contents)
        if unfolded > _MAX_STATE_ENTRIES:
            raise FormatError(f"{what}: more than {_MAX_STATE_ENTRIES} contents in its history")
        states.append(State(serial, pack, contents))
    serials = {state.serial for state in states}
    for _ in range(reader.uvarint(reader.left)):
        state = states[reader.uvarint(len(states) - 1)]
        base = state.serial - reader.uvarint(state.serial)
        if base not in serials:
            raise FormatError(f"{what}: a direct edge from a snapshot that is not retained")
        offset = reader.uvarint(LIMITS.pack)
        for _ in range(reader.uvarint(reader.left)):
            track = _track(tracks, reader.uvarint())
            span = Span(state.pack, offset, reader.uvarint(LIMITS.pack))
            offset = span.end
            edges.append(HeadEdge(track, state.serial, base, (), span))
    reader.done()
    return tuple(states), tuple(edges)
