"""The head: its size, and what a hostile one may not do."""

from __future__ import annotations

import base64
import json
import random

import pytest

from tidings_chunkstore import head, pack
from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.ids import ContentId, FileId
from tidings_chunkstore.places import SELF, PackName, Span
from tidings_chunkstore.recipe import IDENTITY, Codec, Recipe
from tidings_chunkstore.wire import uvarints

TYPES = ("primary", "group", "modules", "updateinfo", "filelists", "other")


def _history(count: int) -> list[tuple[PackName, pack.Toc]]:
    """*count* snapshots of repomd.xml, its signature and six files, all of them new each time."""
    choice = random.Random("head")
    tocs = []
    for serial in range(1, count + 1):
        own = PackName(serial, SELF)
        files, contents, edges = [], [], []
        offset = choice.randrange(200_000, 3_000_000)
        for kind in ("repomd", "signature", *TYPES):
            digest = FileId(choice.randbytes(32))
            small = kind in ("repomd", "signature")
            path = {
                "repomd": "repodata/repomd.xml",
                "signature": "repodata/repomd.xml.asc",
            }.get(kind, f"repodata/{digest.hex()}-{kind}.xml.zst")
            recipe = IDENTITY if small else Recipe(Codec.ZST, "zstd-1.5.6", (10, 0))
            files.append(pack.File(path, kind, kind, choice.randrange(10**7), digest, recipe))
            place = Span(own, choice.randrange(3_000_000), choice.randrange(60_000))
            contents.append(
                pack.Content(kind, ContentId(choice.randbytes(32)), choice.randrange(10**8), place)
            )
            if small or serial > 1:
                length = choice.randrange(200, 60_000)
                base = None if small else serial - 1
                edges.append(pack.Edge(kind, base, (), offset, length))
                offset += length
        snapshot = pack.Snapshot(
            choice.randbytes(16),
            serial,
            1_760_000_000 + serial,
            "rpm-md",
            "repodata/repomd.xml",
            1_760_000_000 + serial,
            tuple(files),
            tuple(contents),
        )
        name = PackName(serial, choice.randbytes(8))
        tocs.append((name, pack.Toc(snapshot, serial - 1 or None, (), (), tuple(edges))))
    return tocs


def test_thirty_snapshots_of_six_files_stay_small() -> None:
    """The head is in every update's bill, and a static host may not compress it."""
    encoded = head.encode(head.build(_history(30)))
    assert len(encoded) <= 6 * 1024
    found = head.decode(encoded)
    assert len(found.states) == 30
    assert len(found.edges) == 30 * 2 + 29 * len(TYPES)


def _with_steps(steps: bytes, tracks: int = 8) -> bytes:
    value = json.loads(head.encode(head.build(_history(1))))
    value["steps"] = base64.b64encode(steps).decode()
    value["tracks"] = [f"t{number}" for number in range(tracks)]
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    ("steps", "what"),
    [
        (b"", "truncated"),
        (uvarints([0]), "no snapshot"),
        (uvarints([10**9]), "above the limit"),
        (uvarints([1, 1]) + bytes(8) + uvarints([0, 1, 99 << 3]), "track"),
        (uvarints([1, 1]) + bytes(8) + uvarints([0, 1, 7]), "unknown kind"),
        (uvarints([1, 1]) + bytes(8) + uvarints([0, 1, 5]), "goes before it came"),
        (uvarints([2, 1]) + bytes(8) + uvarints([0, 0, 0]) + bytes(10), "twice"),
        (uvarints([1, 1]) + bytes(8) + uvarints([0, 0, 1, 0, 1, 8, 0]), "not retained"),
        (uvarints([1, 1]) + bytes(8) + uvarints([0, 0, 0]) + b"x", "too many"),
    ],
)
def test_a_broken_history_is_refused(steps: bytes, what: str) -> None:
    with pytest.raises(FormatError, match=what):
        head.decode(_with_steps(steps))


def test_a_small_head_cannot_unfold_without_bound() -> None:
    """Thousands of steps that change nothing, after one with thousands of tracks."""
    tracks = 4000
    first = uvarints([1]) + bytes(8) + uvarints([0, tracks])
    first += b"".join(uvarints([number << 3]) + bytes(6) for number in range(tracks))
    steps = uvarints([4000]) + first + (uvarints([1]) + bytes(8) + uvarints([0, 0])) * 3999
    with pytest.raises(FormatError, match="contents in its history"):
        head.decode(_with_steps(steps + b"\0", tracks))


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"format": "other"},
        {"serial": 9},
        {"repo": "AAAA"},
        {"main": "elsewhere"},
        {"files": []},
        {"contents": []},
        {"timestamp": -1},
        {"time": True},
        {"features": {"frames": "yes"}},
        {"layout": "rpm\u0000md"},
    ],
)
def test_a_head_that_contradicts_itself_is_refused(change: dict[str, object]) -> None:
    value = json.loads(head.encode(head.build(_history(2))))
    with pytest.raises(FormatError):
        head.decode(json.dumps(value | change).encode())
    assert head.decode(json.dumps(value | {"signature": "later"}).encode()).serial == 2
