"""Vectors of index, pack and head: these bytes mean this, for ever.

Run this file as a program to write the vectors anew after a deliberate change of format.
"""

from __future__ import annotations

import json
from pathlib import Path

from tidings_chunkstore import head, index, pack
from tidings_chunkstore.backends import LocalBackend
from tidings_chunkstore.chunker import ChunkerParams
from tidings_chunkstore.ids import ChunkId, ContentId, FileId
from tidings_chunkstore.places import SELF, PackName, Span
from tidings_chunkstore.recipe import IDENTITY, Codec, Recipe

VECTORS = Path(__file__).parent.parent / "vectors" / "formats.json"
FIRST = PackName(1, bytes(range(8)))
SECOND = PackName(3, bytes(range(8, 16)))


def _index() -> index.Index:
    other = PackName(1, bytes(range(8)))
    frames = (
        index.Frame(Span(SECOND, 8, 300), None),
        index.Frame(Span(SECOND, 308, 70_000), None),
        index.Frame(Span(other, 8, 1), Span(other, 5000, 40)),
        index.Frame(Span(SECOND, 8, 300), None),
    )
    ids = bytes(range(20))
    return index.Index(
        ContentId(bytes(32)), 123_456, ChunkerParams.of(1024, 4096, 32768), 5, ids, frames
    )


def _tocs() -> list[tuple[PackName, pack.Toc]]:
    repo = bytes(range(16))
    repomd = pack.File(
        "repodata/repomd.xml", "repomd", "repomd", 3, FileId(bytes([1]) * 32), IDENTITY
    )
    tocs = []
    for name, fill in ((FIRST, 2), (SECOND, 3)):
        digest = bytes([fill]) * 32
        primary = pack.File(
            f"repodata/{digest.hex()}-primary.xml.bz2",
            "primary",
            "primary",
            1000 + fill,
            FileId(digest),
            Recipe(Codec.BZ2, "bzip2", (9,)),
        )
        own = PackName(name.serial, SELF)
        snapshot = pack.Snapshot(
            repo,
            name.serial,
            1_700_000_000 + fill,
            "rpm-md",
            repomd.path,
            1_600_000_000 + fill,
            (repomd, primary),
            (
                pack.Content("repomd", ContentId(bytes([fill + 4]) * 32), 3, Span(own, 60, 9)),
                pack.Content("primary", ContentId(bytes([fill + 8]) * 32), 9000, Span(own, 50, 9)),
            ),
        )
        previous = 1 if name is SECOND else None
        edges = [pack.Edge("repomd", None, (), 70, 30)]
        if previous:
            edges.append(pack.Edge("primary", 1, (), 120, 40))
        runs = (
            pack.FrameRun(8, Span(FIRST, 5, 3), ((ChunkId(bytes([fill]) * 32), 5, 4),)),
            pack.FrameRun(12, None, ((ChunkId(bytes([fill + 1]) * 32), 500, 4),)),
        )
        dictionaries = (pack.Dictionary(8, 5, FileId(bytes([9]) * 32)),)
        tocs.append((name, pack.Toc(snapshot, previous, runs, dictionaries, tuple(edges))))
    return tocs


def _placed(toc: pack.Toc, name: PackName) -> pack.Toc:
    return pack.decode_toc(pack.encode_toc(toc), name)


def _write_pack() -> tuple[PackName, bytes]:
    writer = pack.PackWriter(3)
    writer.add(b"sections")
    name, pieces = writer.finish(_tocs()[1][1])
    return name, b"".join(pieces)


def test_the_vector_of_an_index() -> None:
    stored = bytes.fromhex(json.loads(VECTORS.read_text())["index"])
    assert index.decode(stored, SECOND) == _index()


def test_the_vector_of_a_pack(tmp_path: Path) -> None:
    vector = json.loads(VECTORS.read_text())
    name = PackName.parse(vector["pack_name"])
    data = bytes.fromhex(vector["pack"])
    (tmp_path / str(name)).write_bytes(data)
    assert pack.pack_digest([data]) == name.id
    assert pack.read_toc(LocalBackend(tmp_path), name) == _placed(_tocs()[1][1], name)


def test_the_vector_of_a_head() -> None:
    """A head has no compressed part, so its bytes are the same everywhere."""
    stored = json.loads(VECTORS.read_text())["head"].encode()
    tocs = [(name, _placed(toc, name)) for name, toc in _tocs()]
    assert head.encode(head.build(tocs)) == stored
    assert head.decode(stored) == head.build(tocs)


if __name__ == "__main__":
    pack_name, pack_bytes = _write_pack()
    placed = [(name, _placed(toc, name)) for name, toc in _tocs()]
    VECTORS.write_text(
        json.dumps(
            {
                "index": index.encode(_index()).hex(),
                "pack_name": str(pack_name),
                "pack": pack_bytes.hex(),
                "head": head.encode(head.build(placed)).decode(),
            },
            indent=1,
        )
        + "\n"
    )
