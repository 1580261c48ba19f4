"""Recipes: finding, running, opening, and what each refuses."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest

from tidings_chunkstore import engines as engine_table
from tidings_chunkstore.errors import EngineError, FormatError
from tidings_chunkstore.ids import ContentId
from tidings_chunkstore.recipe import (
    IDENTITY,
    Codec,
    Recipe,
    available,
    codec_of,
    cost,
    engines,
    find,
    open_stream,
    run,
)
from tidings_chunkstore.zstd import zstd

VECTORS = Path(__file__).parent.parent / "vectors" / "recipes.json"


def text(packages: int = 2000, seed: int = 1) -> bytes:
    """Metadata-like text, deterministic: about 250 bytes a package."""
    out = [b'<?xml version="1.0"?>\n<metadata>\n']
    state = seed
    for number in range(packages):
        state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        out.append(
            b'<package type="rpm"><name>p%d-%d</name><arch>noarch</arch><version epoch="0" '
            b'ver="%d.%d" rel="%d"/><checksum type="sha256">%s</checksum></package>\n'
            % (
                number,
                state >> 60,
                state >> 40 & 15,
                state >> 44 & 63,
                state >> 50 & 3,
                hashlib.sha256(b"%d" % state).hexdigest().encode(),
            )
        )
    return b"".join(out) + b"</metadata>\n"


def opened(published: bytes, codec: Codec, limit: int = 1 << 30) -> bytes:
    return b"".join(open_stream(io.BytesIO(published), codec, limit=limit))


def made(recipe: Recipe, content: bytes) -> bytes:
    return b"".join(run(recipe, [content]))


HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\x03"
ALL = [
    Recipe(Codec.GZ, "zlib", (6, 8), HEADER),
    Recipe(Codec.GZ, "zlib", (9, 9), HEADER),
    Recipe(Codec.GZ, "gzip-1", (9, 0), HEADER),
    Recipe(Codec.GZ, "gzip-1", (6, 1), HEADER),
    Recipe(Codec.ZST, "zstd-1.5.7", (10, 0)),
    Recipe(Codec.ZST, "zstd-1.5.6", (10, 0)),
    Recipe(Codec.ZST, "zstd-1.4.4", (10, 0)),
    Recipe(Codec.ZST, "zstd-1.5.6", (3, engine_table.ZSTD_CHECKSUM)),
    Recipe(Codec.XZ, "liblzma", (5, 0, 1)),
    Recipe(Codec.XZ, "liblzma", (2, 1, 4)),
    Recipe(Codec.BZ2, "bzip2", (5,)),
]


def need(recipe: Recipe) -> None:
    if not available(recipe):
        pytest.skip(f"needs {recipe.engine}")


@pytest.mark.parametrize("recipe", ALL, ids=lambda r: f"{r.engine}{r.params}")
def test_what_a_recipe_made_is_found_and_made_again(recipe: Recipe) -> None:
    need(recipe)
    content = text(3000)
    published = made(recipe, content)
    assert codec_of("x", published[:16]) is recipe.codec
    assert opened(published, recipe.codec) == content
    found = find(published, content, recipe.codec)
    assert found is not None
    assert made(found.recipe, content) == published
    assert not found.sides
    hinted = find(published, content, recipe.codec, recipe)
    assert hinted is not None
    assert hinted.recipe == recipe


@pytest.mark.parametrize("recipe", ALL, ids=lambda r: f"{r.engine}{r.params}")
def test_the_cut_of_the_content_does_not_matter(recipe: Recipe) -> None:
    need(recipe)
    content = text(800)
    whole = made(recipe, content)
    for size in (1, 999, 131_072):
        start = content[:3000]
        pieces = [start[i : i + size] for i in range(0, len(start), size)] + [content[3000:]]
        assert b"".join(run(recipe, pieces)) == whole
    assert b"".join(run(recipe, [bytearray(content[:70]), memoryview(content)[70:]])) == whole


@pytest.mark.parametrize("recipe", ALL, ids=lambda r: f"{r.engine}{r.params}")
def test_an_empty_content(recipe: Recipe) -> None:
    need(recipe)
    published = made(recipe, b"")
    assert opened(published, recipe.codec) == b""
    found = find(published, b"", recipe.codec)
    assert found is not None
    assert b"".join(run(found.recipe, [])) == published


def test_a_file_that_states_its_size() -> None:
    content = text(4000)
    compressor = zstd.ZstdCompressor(level=7)
    compressor.set_pledged_input_size(len(content))
    published = compressor.compress(content) + compressor.flush()
    found = find(published, content, Codec.ZST)
    assert found is not None
    assert found.recipe.params[1:] == (engine_table.ZSTD_SIZE, len(content))
    assert made(found.recipe, content) == published
    for wrong in (content + b"x", content[:-1], b""):
        with pytest.raises(FormatError, match="does not have the recipe"):
            made(found.recipe, wrong)
    # Tomorrow's file has another size; yesterday's recipe is still the first guess.
    tomorrow = content + b"<!-- one more -->"
    compressor = zstd.ZstdCompressor(level=7)
    compressor.set_pledged_input_size(len(tomorrow))
    published = compressor.compress(tomorrow) + compressor.flush()
    found = find(published, tomorrow, Codec.ZST, found.recipe)
    assert found is not None
    assert found.recipe.params == (7, engine_table.ZSTD_SIZE, len(tomorrow))


@pytest.mark.parametrize("arguments", [["-10"], ["-19", "--no-check"], ["-3", "--single-thread"]])
def test_files_of_the_zstd_program(arguments: list[str], tmp_path: Path) -> None:
    program = shutil.which("zstd")
    if program is None:
        pytest.skip("needs the zstd program (apt install zstd)")
    plain = tmp_path / "plain"
    plain.write_bytes(text(6000))
    subprocess.run([program, "-q", *arguments, plain], check=True)
    published = plain.with_suffix(".zst").read_bytes()
    found = find(published, plain.read_bytes(), Codec.ZST)
    if found is None:
        version = subprocess.run([program, "-V"], capture_output=True, text=True, check=True).stdout
        assert not any(e.version and e.version in version for e in engines()), version
        pytest.skip(f"no engine of this version here: {version.strip()}")
    assert made(found.recipe, plain.read_bytes()) == published


def test_gzip_headers_are_kept() -> None:
    content = text(500)
    body = made(ALL[0], content)[10:]
    fancy = (
        b"\x1f\x8b\x08\x1e\x78\x56\x34\x12\x02\xff"
        + struct.pack("<H", 5)
        + b"extra"
        + b"Packages\0"
        + b"a comment\0"
        + b"\x12\x34"
    )
    found = find(fancy + body, content, Codec.GZ)
    assert found is not None
    assert found.recipe.header == fancy
    assert Recipe.from_json(found.recipe.to_json()) == found.recipe
    assert made(found.recipe, content) == fancy + body


@pytest.mark.parametrize(
    "published",
    [
        gzip.compress(b"a" * 5000, mtime=0) + gzip.compress(b"b" * 5000, mtime=0),
        b"\x1f\x8b\x08\x08" + b"\0" * 6 + b"n" * 20_000,
        b"\x1f\x8b\x08\x04" + b"\0" * 6 + b"\xff\xff" + b"x" * 70_000,
        b"\x1f\x8b\x08\xe0" + b"\0" * 30,
        b"\x1f\x8b\x08",
        b"",
    ],
    ids=["two members", "endless name", "long extra field", "reserved flags", "magic", "empty"],
)
def test_gzip_files_without_a_recipe(published: bytes) -> None:
    assert find(published, b"a" * 5000 + b"b" * 5000, Codec.GZ) is None


@pytest.mark.parametrize("codec", [c for c in Codec if c is not Codec.NONE])
def test_an_altered_file_is_opaque(codec: Codec) -> None:
    recipe = next((r for r in ALL if r.codec is codec), None)
    if recipe is None:
        return
    content = text(150)
    published = bytearray(made(recipe, content))
    published[len(published) // 2] ^= 1
    assert find(bytes(published), content, codec) is None
    assert find(made(recipe, content)[:-1], content, codec) is None
    assert find(made(recipe, content) + b"\0", content, codec) is None


def test_a_plain_file_is_its_own_content() -> None:
    found = find(b"plain", b"plain", Codec.NONE)
    assert found is not None
    assert found.recipe == IDENTITY
    assert find(b"plain", b"other", Codec.NONE) is None
    assert b"".join(run(IDENTITY, [b"pl", b"ain"])) == b"plain"
    assert IDENTITY.to_json() == {}
    assert Recipe.from_json({}) == IDENTITY


def test_wrong_engines_are_left_at_their_first_difference() -> None:
    """An opaque file of many candidates costs little, however long it is."""
    content = text(40_000)
    published = zlib.compressobj(6, zlib.DEFLATED, 31, 8, zlib.Z_FILTERED)
    data = published.compress(content) + published.flush()
    started = time.process_time()
    assert find(data, content, Codec.GZ) is None
    tries = time.process_time() - started
    started = time.process_time()
    made(Recipe(Codec.GZ, "zlib", (6, 8), HEADER), content)
    assert tries < 6 * (time.process_time() - started)


# --- opening ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "start", "codec"),
    [
        ("a.gz", b"\x1f\x8b\x08\0", Codec.GZ),
        ("a.xml", b"\x1f\x8b\x08\0", Codec.GZ),
        ("a.zst", b"\x28\xb5\x2f\xfd\0", Codec.ZST),
        ("a.zst", b"\x50\x2a\x4d\x18\0", Codec.ZST),
        ("a.lz4", b"\x50\x2a\x4d\x18\0", Codec.NONE),
        ("a.xz", b"\xfd7zXZ\0\0\1", Codec.XZ),
        ("a.bz2", b"BZh91AY&SY", Codec.BZ2),
        ("a.txt", b"BZh9 is a word", Codec.NONE),
        ("comps.xml.gz.zck", b"\0ZCK1\x81", Codec.ZCK),
        ("a.gz", b"<?xml", Codec.NONE),
        ("a.gz", b"", Codec.NONE),
    ],
)
def test_codec_by_magic_then_name(path: str, start: bytes, codec: Codec) -> None:
    assert codec_of(path, start) is codec


ENCODED = {
    Codec.GZ: gzip.compress(b"text " * 9000, 6, mtime=0),
    Codec.ZST: zstd.compress(b"text " * 9000),
    Codec.XZ: lzma.compress(b"text " * 9000),
    Codec.BZ2: bz2.compress(b"text " * 9000),
}


@pytest.mark.parametrize("codec", ENCODED)
def test_members_follow_each_other(codec: Codec) -> None:
    assert opened(ENCODED[codec] * 3, codec) == b"text " * 27_000


@pytest.mark.parametrize("codec", ENCODED)
def test_damage_truncation_garbage_and_emptiness_are_format_errors(codec: Codec) -> None:
    whole = ENCODED[codec]
    bad = [whole[:-1], whole[: len(whole) // 2], whole[:3], b"", whole + b"x", whole + b"\0" * 32]
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x10
    if codec is not Codec.ZST:  # no checksum in createrepo_c's zst files: a flip may decode
        bad.append(bytes(flipped))
    for published in bad:
        with pytest.raises(FormatError):
            opened(published, codec)


@pytest.mark.parametrize("codec", ENCODED)
def test_a_bomb_stops_at_the_limit(codec: Codec) -> None:
    zeros = bytes(64 << 20)
    published = {
        Codec.GZ: lambda: gzip.compress(zeros, 6),
        Codec.ZST: lambda: zstd.compress(zeros),
        Codec.XZ: lambda: lzma.compress(zeros, preset=0),
        Codec.BZ2: lambda: bz2.compress(zeros),
    }[codec]()
    assert len(published) < 200_000
    seen = 0
    with pytest.raises(FormatError, match="beyond"):
        for piece in open_stream(io.BytesIO(published), codec, limit=3_000_000):
            assert len(piece) <= 1 << 20
            seen += len(piece)
    assert seen <= 3_000_000


def test_too_many_members() -> None:
    with pytest.raises(FormatError, match="members"):
        opened(gzip.compress(b"") * 70_000, Codec.GZ)


# --- the wire form ----------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ALL, ids=lambda r: f"{r.engine}{r.params}")
def test_json_is_compact_and_comes_back(recipe: Recipe) -> None:
    wire = json.dumps(recipe.to_json(), separators=(",", ":"))
    assert len(wire) <= 64
    assert Recipe.from_json(json.loads(wire)) == recipe


GOOD = {"c": "gz", "e": "zlib", "p": [6, 8], "h": "AAAAAAAAAw"}


@pytest.mark.parametrize(
    "change",
    [
        {"c": "lz4"},
        {"c": 1},
        {"c": "none"},
        {"c": "zst"},
        {"e": "gzip-1 -r /"},
        {"e": ""},
        {"e": None},
        {"e": "x" * 40},
        {"e": "bzip2"},
        {"p": [6]},
        {"p": [0, 8]},
        {"p": [10, 8]},
        {"p": [6, 7]},
        {"p": [6, 8, 1]},
        {"p": [-1, 8]},
        {"p": [True, 8]},
        {"p": [6.0, 8]},
        {"p": ["6", 8]},
        {"p": [1 << 60, 8]},
        {"p": [1] * 100},
        {"p": {}},
        {"h": "A"},
        {"h": "AAA="},
        {"h": "AB+/"},
        {"h": "A" * 6000},
        {"h": 5},
        {"s": ["A" * 43]},
        {"s": "x"},
        {"s": [1]},
        {"s": ["A" * 43] * 9},
        {"x": 1},
        {"e": "zstd-1.5.6"},
    ],
)
def test_a_hostile_recipe_is_a_format_error(change: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        Recipe.from_json({**GOOD, **change})


@pytest.mark.parametrize("value", [None, [], "gz", 3, {"c": "gz"}, {"e": "zlib"}, {"p": []}])
def test_what_is_no_recipe(value: object) -> None:
    with pytest.raises(FormatError):
        Recipe.from_json(value)


@pytest.mark.parametrize("params", [(10, 8), (10, 2), (0, 0), (20, 0), (10, 0, 5), (10,), ()])
def test_zst_parameters(params: tuple[int, ...]) -> None:
    with pytest.raises(FormatError):
        run(Recipe(Codec.ZST, "zstd-1.5.7", params), [b""])


def test_an_engine_of_a_later_release_is_unavailable_not_malformed() -> None:
    for wire in (
        {"c": "zst", "e": "zstd-1.99.0", "p": [10, 0]},
        {"c": "gz", "e": "libdeflate-1.20", "p": [6, 1, 2], "h": "AAAAAAAAAw"},
    ):
        recipe = Recipe.from_json(wire)
        assert not available(recipe)
        with pytest.raises(EngineError, match="not available"):
            run(recipe, [b""])
        assert cost(recipe, 1_000_000) > 0


# --- engines ----------------------------------------------------------------------------------


def test_the_engines_tell_what_they_are() -> None:
    rows = {row.name: row for row in engines()}
    assert {"zlib", "gzip-1", "liblzma", "bzip2", "zstd-1.5.6", "zstd-1.5.7"} <= rows.keys()
    for row in rows.values():
        assert row.how
        assert row.available == (row.version != "")
        assert row.available == engine_table.is_available(row.name)
    assert rows["liblzma"].available
    assert rows["bzip2"].available


def test_an_engine_that_is_absent_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyzstd", None)
    engine_table.zstd_makers.cache_clear()
    try:
        recipe = Recipe(Codec.ZST, "zstd-1.5.6", (10, 0))
        row = next(row for row in engines() if row.name == "zstd-1.5.6")
        if row.available:
            pytest.skip("the system's libzstd is 1.5.6")
        assert not available(recipe)
        with pytest.raises(EngineError, match=r"pyzstd==0\.16\.2"):
            run(recipe, [b"x"])
        content = text(300)
        assert find(made(Recipe(Codec.ZST, "zstd-1.5.7", (10, 0)), content), content, Codec.ZST)
    finally:
        monkeypatch.undo()
        engine_table.zstd_makers.cache_clear()


def test_a_zlib_that_compresses_otherwise_is_not_zlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_table, "_sample", lambda: b"as if another encoder " * 99)
    engine_table._zlib_version.cache_clear()
    try:
        assert not engine_table.is_available("zlib")
    finally:
        monkeypatch.undo()
        engine_table._zlib_version.cache_clear()


def test_no_program_is_left_when_a_run_is_closed_early() -> None:
    recipe = Recipe(Codec.GZ, "gzip-1", (1, 0), HEADER)
    need(recipe)
    before = threading.active_count()
    for _ in range(3):
        pieces = run(recipe, [text(20_000)] * 4)
        assert next(pieces) == HEADER
        assert next(pieces)
        pieces.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_a_gzip_program_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "gzip"
    fake.write_text("#!/bin/sh\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setattr(engine_table, "_gzip_program", lambda: str(fake))
    monkeypatch.setattr(engine_table, "_gzip_version", lambda: "1.0")
    with pytest.raises(EngineError, match="gzip program"):
        made(Recipe(Codec.GZ, "gzip-1", (9, 0), HEADER), text(9000))
    assert find(gzip.compress(b"x"), b"y", Codec.GZ) is None


def test_cost_grows_with_size_and_level() -> None:
    fast, slow = (Recipe(Codec.ZST, "zstd-1.5.7", (level, 0)) for level in (3, 19))
    assert 0 == cost(fast, 0) < cost(fast, 10**6) < cost(slow, 10**6)
    assert cost(IDENTITY, 10**9) < 1


# --- vectors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", json.loads(VECTORS.read_text())["recipes"], ids=lambda r: r["name"])
def test_vectors(row: dict[str, object]) -> None:
    """The bytes of each engine, pinned: a change here is a new engine, not a new vector."""
    recipe = Recipe.from_json(row["recipe"])
    need(recipe)
    content = text(3000)
    assert ContentId.of(content).hex() == row["content"]
    assert hashlib.sha256(made(recipe, content)).hexdigest() == row["published"]


def test_a_search_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that is nobody's, near to all of them: the first tries are made, then no more."""
    import tidings_chunkstore.recipe as module

    monkeypatch.setattr(module, "_PATIENCE", 0.1)
    monkeypatch.setattr(module, "_PATIENCE_PROOFS", 0.0)
    tries: list[Recipe] = []

    def almost(candidate: Recipe, published: bytes, _: bytes) -> int:
        tries.append(candidate)
        time.sleep(0.06)
        return len(published) - 1

    monkeypatch.setattr(module, "_same", almost)
    content = b"words and more words " * 40_000
    published = zstd.compress(content, 19)
    assert find(published, content, Codec.ZST) is None
    assert 1 <= len(tries) <= 3
