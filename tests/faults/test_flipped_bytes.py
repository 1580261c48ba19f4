"""One flipped bit in the head or in a pack, anywhere: no client is ever wrong, none is stuck."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from support.servers import Servers
from support.syncing import Repository, copy, fetch, tree
from tidings_chunkstore import head
from tidings_chunkstore.errors import FormatError, TidingsError
from tidings_client.exits import exit_of

#: Flips for each; SOAK_FLIPS=500 looks closer.
FLIPS = int(os.environ.get("SOAK_FLIPS", "15"))
ALLOWED = {5, 6, 7}


def decodes(data: bytes) -> bool:
    try:
        head.decode(data)
    except FormatError:
        return False
    return True


def flips(path: Path, seed: str) -> list[bytes]:
    """Damaged copies of a file; of a head only such as can be read, for others are refused."""
    dice = random.Random(seed)
    whole = path.read_bytes()
    found: list[bytes] = []
    while len(found) < FLIPS:
        data = bytearray(whole)
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        if path.suffix != ".json" or (
            decodes(bytes(data)) and head.decode(bytes(data)) != head.decode(whole)
        ):
            found.append(bytes(data))
    return found


@pytest.mark.parametrize("what", ["head", "oldest", "newest"])
@pytest.mark.parametrize("route", ["auto", "chunks"])
def test_a_flip_anywhere(servers: Servers, tmp_path: Path, what: str, route: str) -> None:
    repo = Repository.at(tmp_path / "repo", count=40, steps=2)
    site = servers.nginx(tmp_path)
    url = f"{site.url}/repo"
    fetch(url, tmp_path / "dest")
    repo.advance()
    repo.advance()
    old, new = tree(tmp_path / "dest"), tree(repo.root)
    store = repo.root / "tidings"
    packs = sorted(store.glob("*.pack"))
    path = {"head": store / "head.json", "oldest": packs[0], "newest": packs[-1]}[what]
    whole = path.read_bytes()
    ends: Counter[str] = Counter()
    for number, damaged in enumerate(flips(path, f"{what}/{route}")):
        dest = copy(tmp_path / "dest", tmp_path / "again", state=number % 2 == 0)
        later = path.stat().st_mtime + 1
        path.write_bytes(damaged)
        os.utime(path, (later, later))
        try:
            result = fetch(url, dest, route=route)
        except TidingsError as error:
            ends[error.code] += 1
            assert exit_of(error) in ALLOWED, (number, error)
            assert tree(dest) == old, (number, error)
        else:
            ends["done"] += 1
            assert tree(dest) == new, (number, result)
        path.write_bytes(whole)
        os.utime(path, (later + 1, later + 1))
        fetch(url, dest)  # whatever it believed, it finds the way back
        assert tree(dest) == new, number
        shutil.rmtree(dest)
    assert ends["done"] > FLIPS // 2, ends
