"""Index, pack and head: what is written is what is read, and damage is noticed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings_chunkstore import head, index, pack
from tidings_chunkstore.chunker import ChunkerParams
from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.ids import ChunkId, ContentId, FileId
from tidings_chunkstore.places import SELF, PackName, Span
from tidings_chunkstore.recipe import IDENTITY, Codec, Recipe

OWN = PackName(7, b"ownname!")
digests = st.binary(min_size=32, max_size=32)
names = st.text(st.characters(categories=("L", "N"), max_codepoint=0x2FF), min_size=1, max_size=12)
packs = st.builds(
    PackName,
    st.integers(1, 2**32 - 1),
    st.binary(min_size=8, max_size=8).filter(lambda b: b != SELF),
)
spans = st.builds(Span, packs, st.integers(0, 2**30), st.integers(1, 2**19))


@st.composite
def indexes(draw: st.DrawFn) -> index.Index:
    """Runs of frames in a few packs, some broken, some with a dictionary."""
    count = draw(st.integers(0, 40))
    where = draw(st.lists(packs, min_size=1, max_size=3, unique=True))
    dictionaries = [None, *draw(st.lists(spans, max_size=2))]
    frames = []
    offset = 8
    for _ in range(count):
        if draw(st.booleans()):
            offset += draw(st.integers(0, 70_000))
        length = draw(st.integers(1, 200_000))
        frame = index.Frame(
            Span(draw(st.sampled_from(where)), offset, length), draw(st.sampled_from(dictionaries))
        )
        frames.append(frame)
        offset += length
    size = draw(st.integers(5, 8))
    return index.Index(
        ContentId(draw(digests)),
        draw(st.integers(count, 2**32)),
        ChunkerParams.of(1024, 4096, 32768),
        size,
        draw(st.binary(min_size=size * count, max_size=size * count)),
        tuple(frames),
    )


@given(indexes())
def test_an_index_comes_back(value: index.Index) -> None:
    assert index.decode(index.encode(value), OWN) == value


@given(indexes(), st.data())
def test_a_changed_index_is_refused(value: index.Index, data: st.DataObject) -> None:
    encoded = bytearray(index.encode(value))
    place = data.draw(st.integers(0, len(encoded) - 1))
    encoded[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FormatError):
        index.decode(bytes(encoded), OWN)
    with pytest.raises(FormatError):
        index.decode(index.encode(value)[:place], OWN)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[PackName, pack.Toc]]:
    """A few snapshots of a few tracks that come, change, stay and go."""
    tracks = draw(st.lists(names, min_size=1, max_size=5, unique=True))
    repo = draw(st.binary(min_size=16, max_size=16))
    before: dict[str, ContentId] = {}
    serial = 0
    tocs: list[tuple[PackName, pack.Toc]] = []
    for _ in range(draw(st.integers(1, 6))):
        previous = serial or None
        older = [t.snapshot.serial for _, t in tocs[:-1]]
        serial += draw(st.integers(1, 3))
        now: dict[str, ContentId] = {}
        for track in [tracks[0], *draw(st.lists(st.sampled_from(tracks), unique=True))]:
            keep = track in before and draw(st.booleans())
            now.setdefault(track, before[track] if keep else ContentId(draw(digests)))
        offset = draw(st.integers(8, 10_000))
        edges = []
        for base in [None, previous, *older[-2:]]:
            for track in now:
                if now[track] == before.get(track) or not draw(st.booleans()):
                    continue
                if base is not None and base == previous and track not in before:
                    continue
                plain = base in (None, previous)
                uses = (tracks[0],) if plain and track != tracks[0] and draw(st.booleans()) else ()
                length = draw(st.integers(1, 50_000))
                edges.append(pack.Edge(track, base, uses, offset, length))
                offset += length
        files = tuple(
            pack.File(
                f"repodata/{content.hex()}-{track}",
                track,
                track,
                draw(st.integers(0, 2**40 // 512)),
                FileId(content),
                draw(st.sampled_from([None, IDENTITY, Recipe(Codec.BZ2, "bzip2", (9,))])),
            )
            for track, content in now.items()
        )
        name = PackName(serial, draw(st.binary(min_size=8, max_size=8).filter(lambda b: b != SELF)))
        contents = tuple(
            pack.Content(
                t, c, 100, draw(st.none() | spans | st.just(Span(PackName(serial, SELF), 9, 9)))
            )
            for t, c in now.items()
        )
        runs = tuple(
            pack.FrameRun(
                8, draw(st.none() | spans), tuple((ChunkId(draw(digests)), 5, 4) for _ in range(n))
            )
            for n in draw(st.lists(st.integers(1, 3), max_size=2))
        )
        snapshot = pack.Snapshot(repo, serial, 10, "rpm-md", files[0].path, 11, files, contents)
        dictionaries = (pack.Dictionary(8, 5, FileId(draw(digests))),)
        tocs.append((name, pack.Toc(snapshot, previous, runs, dictionaries, tuple(edges))))
        before = now
    return tocs


def placed(toc: pack.Toc, name: PackName) -> pack.Toc:
    """What reading gives: SELF has become the pack's name."""
    snapshot = toc.snapshot
    contents = tuple(
        pack.Content(c.track, c.id, c.size, c.index.within(name) if c.index else None)
        for c in snapshot.contents
    )
    whole = pack.Snapshot(
        snapshot.repo,
        snapshot.serial,
        snapshot.time,
        snapshot.layout,
        snapshot.main,
        snapshot.timestamp,
        snapshot.files,
        contents,
    )
    return pack.Toc(whole, toc.previous, toc.runs, toc.dictionaries, toc.edges)


@given(histories())
def test_a_table_of_contents_comes_back(tocs: list[tuple[PackName, pack.Toc]]) -> None:
    for name, toc in tocs:
        assert pack.decode_toc(pack.encode_toc(toc), name) == placed(toc, name)


@given(histories(), st.data())
def test_a_head_comes_back_also_over_a_part_of_the_history(
    tocs: list[tuple[PackName, pack.Toc]], data: st.DataObject
) -> None:
    kept = [t for t in tocs[:-1] if data.draw(st.booleans())] + [tocs[-1]]
    built = head.build(kept)
    read = head.decode(head.encode(built))
    assert set(read.edges) == set(built.edges)
    assert read.states == built.states
    assert (read.files, read.contents) == (built.files, built.contents)
    assert head.decode(head.encode(read)) == read


@given(histories(), st.data())
def test_a_changed_head_is_refused_or_is_another_head(
    tocs: list[tuple[PackName, pack.Toc]], data: st.DataObject
) -> None:
    """A head carries no checksum: what it says is proven by what is fetched. It must not crash."""
    encoded = bytearray(head.encode(head.build(tocs)))
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = head.decode(bytes(encoded))
    except FormatError:
        return
    assert found.current.serial == found.serial


@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        index.decode(data, OWN)
    with pytest.raises(FormatError):
        head.decode(data)
    with pytest.raises(FormatError):
        pack.decode_toc(data, OWN)
