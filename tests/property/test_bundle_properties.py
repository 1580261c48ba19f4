"""Bundles: what is encoded is decoded; nothing damaged is; a made bundle leads where it says."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.repos import DAY, START, evolve, packages, rpm_md
from tidings_chunkstore import bundle, delta, publisher
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.errors import FormatError, InputError
from tidings_chunkstore.ids import ContentId
from tidings_chunkstore.places import PackName
from tidings_chunkstore.store import Store

TRACKS = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2FF, categories=("L", "N", "P")),
    min_size=1,
    max_size=20,
)
ENTRIES = st.lists(
    st.tuples(TRACKS, st.binary(max_size=200)), max_size=8, unique_by=lambda entry: entry[0]
)


@given(ENTRIES)
def test_what_is_encoded_is_decoded(entries: list[tuple[str, bytes]]) -> None:
    assert [(t, bytes(s)) for t, s in bundle.decode(bundle.encode(entries))] == entries


@given(ENTRIES, st.data())
def test_damage_is_seen(entries: list[tuple[str, bytes]], data: st.DataObject) -> None:
    good = bundle.encode(entries)
    at = data.draw(st.integers(0, len(good) - 1))
    flipped = bytearray(good)
    flipped[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FormatError):
        bundle.decode(bytes(flipped))
    with pytest.raises(FormatError):
        bundle.decode(good[:at])


@given(st.binary(max_size=100))
def test_forged_bodies_raise_format_errors_only(body: bytes) -> None:
    forged = bundle.MAGIC + hashlib.sha256(body).digest()[:8] + body
    try:
        entries = bundle.decode(forged)
    except FormatError:
        return
    assert sum(len(section) for _, section in entries) <= len(body)


def test_a_track_comes_once() -> None:
    with pytest.raises(FormatError):
        bundle.decode(bundle.encode([("a", b"1"), ("a", b"2")]))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Four snapshots of a generated repository."""
    root: Path = tmp_path_factory.mktemp("repo")
    made = packages(120)
    for day in range(4):
        rpm_md(root, made, timestamp=START + day * DAY)
        publisher.publish(root, LocalBackend(root / "tidings"))
        made = evolve(made, seed=day + 1)
    return Store(LocalBackend(root / "tidings"))


@pytest.mark.parametrize("older", [0, 1, 2])
def test_a_bundle_leads_from_any_snapshot_to_the_current_one(store: Store, older: int) -> None:
    names = store.pack_names()
    old, new = store.toc(names[older]).snapshot, store.toc(names[-1]).snapshot
    located = store.locate(store.tocs(names))
    have = {c.id[:8]: store.content(c.id, located) for c in old.contents if c.id in located}
    entries = bundle.decode(bundle.make(store, names[older], names[-1]))
    assert {"repomd", "primary"} <= {track for track, _ in entries}
    for track, section in entries:
        info = delta.inspect(section)
        pieces: list[bytes] = []
        bases = [delta.reader_of(have[prefix]) for prefix, _ in info.bases]
        delta.apply(section, bases, lambda piece: pieces.append(bytes(piece)))  # noqa: B023
        target = new.content(track)
        assert target is not None
        rebuilt = b"".join(pieces)
        assert ContentId.of(rebuilt) == target.id
        have[target.id[:8]] = rebuilt


def test_tracks_limit_it(store: Store) -> None:
    names = store.pack_names()
    some = bundle.decode(bundle.make(store, names[0], names[-1], {"primary"}))
    assert [track for track, _ in some] == ["primary"]
    assert bundle.decode(bundle.make(store, names[0], names[-1], set())) == []


def test_there_is_no_way_back_nor_from_elsewhere(store: Store) -> None:
    names = store.pack_names()
    for older, newer in [
        (names[-1], names[0]),
        (names[0], names[0]),
        (PackName(1, bytes(8)), names[-1]),
    ]:
        with pytest.raises(InputError) as caught:
            bundle.make(store, older, newer)
        assert caught.value.code == "not-retained"
