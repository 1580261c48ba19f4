"""zchunk files: read, open, find, build; and every absurd header."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import subprocess
import time
import tracemalloc
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tidings_chunkstore import engines as engine_table
from tidings_chunkstore import zck
from tidings_chunkstore.errors import EngineError, FormatError
from tidings_chunkstore.ids import ContentId
from tidings_chunkstore.recipe import Codec, Found, Recipe, codec_of, cost, find, open_stream, run

VECTORS = Path(__file__).parent.parent / "vectors" / "zck.json"
MAKER = engine_table.zstd_makers()["zstd-1.5.7"][1]


def text(packages: int = 200) -> bytes:
    """Metadata-like text, deterministic: about 250 bytes a package."""
    rows = [b'<?xml version="1.0"?>\n<metadata>\n']
    for number in range(packages):
        checksum = hashlib.sha256(b"%d" % number).hexdigest().encode()
        rows.append(
            b'<package type="rpm"><name>package-%d</name><arch>noarch</arch><version epoch="0" '
            b'ver="1.%d" rel="%d"/><checksum type="sha256" pkgid="YES">%s</checksum></package>\n'
            % (number, number % 17, number % 5, checksum)
        )
    return b"".join(rows) + b"</metadata>\n"


def lengths(content: bytes, dictionary: bytes = b"") -> array[int]:
    """Chunks that start at each package."""
    parts = content.split(b"<package")
    rest = [len(part) + len(b"<package") for part in parts[1:]]
    return array("q", [len(dictionary), len(parts[0]), *rest])


def how(content: bytes, **changes: object) -> zck.Rebuild:
    base = zck.Rebuild(9, 7, 1, 3, 0, False, lengths(content), b"", {})
    return replace(base, **changes)  # type: ignore[arg-type]


def build(rebuild: zck.Rebuild, content: bytes) -> bytes:
    return b"".join(zck.build(rebuild, [content], MAKER))


def opened(published: bytes, limit: int = 1 << 30) -> bytes:
    return b"".join(open_stream(io.BytesIO(published), Codec.ZCK, limit=limit))


def rebuilt(found: Found, content: bytes) -> bytes:
    return b"".join(run(found.recipe, [content], found.sides))


# --- files that we make ------------------------------------------------------------


def dictionary_of(content: bytes) -> bytes:
    return b"".join(content.split(b"<package")[3:9])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"level": 10},
        {"level": 9, "strategy": 0},
        {"level": 17},
        {"level": 0, "strategy": 0},
        {"digest": 0, "chunk_digest": 0},
        {"digest": 2, "chunk_digest": 2},
        {"digest": 3, "chunk_digest": 1},
        {"flags": 4},
        {"flags": 4, "no_data_digest": True},
        {"dictionary": True},
        {"dictionary": True, "flags": 4, "level": 10},
        {"dictionary": True, "level": 0, "strategy": 0},
    ],
    ids=str,
)
def test_what_is_built_opens_and_is_found_again(changes: dict[str, object]) -> None:
    content = text()
    if changes.get("dictionary"):
        dictionary = dictionary_of(content)
        changes = {**changes, "dictionary": dictionary, "lengths": lengths(content, dictionary)}
    made = how(content, **changes)
    published = build(made, content)
    assert codec_of("x", published[:16]) is Codec.ZCK
    assert opened(published) == content
    found = find(published, content, Codec.ZCK)
    assert found is not None
    assert rebuilt(found, content) == published
    assert Recipe.from_json(json.loads(json.dumps(found.recipe.to_json()))) == found.recipe
    assert all(ContentId.of(side) == key for key, side in found.sides.items())
    assert tuple(found.sides) == found.recipe.sides
    hinted = find(published, content, Codec.ZCK, found.recipe)
    assert hinted is not None
    assert hinted.recipe == found.recipe


def test_pieces_of_any_size_build_the_same() -> None:
    content = text()
    made = how(content)
    whole = build(made, content)
    pieces = [content[i : i + 777] for i in range(0, len(content), 777)]
    assert b"".join(zck.build(made, pieces, MAKER)) == whole
    assert b"".join(zck.build(made, [b"", bytearray(content), memoryview(b"")], MAKER)) == whole


def test_a_content_of_another_length_is_a_format_error() -> None:
    content = text(20)
    for wrong in (content[:-1], content + b"x", b""):
        with pytest.raises(FormatError, match=r"shorter|longer"):
            build(how(content), wrong)


def test_chunks_that_the_engine_makes_otherwise_are_carried() -> None:
    content = text()
    foreign = zck.Rebuild(3, 1, 1, 3, 0, False, lengths(content), b"", {})
    others = {
        number: stored
        for number, _, stored in zck._chunks(foreign, zck._Source([content]).take, MAKER)
        if number in (5, 6, 90)
    }
    mixed = build(how(content, carried=others), content)
    assert opened(mixed) == content
    found = find(mixed, content, Codec.ZCK)
    assert found is not None
    assert found.recipe.params[5] == zck.CARRIED
    assert rebuilt(found, content) == mixed
    assert sum(len(side) for side in found.sides.values()) < len(mixed) // 10 + 500


def test_a_file_of_foreign_chunks_is_opaque() -> None:
    content = text()
    settings = ((3, 1), (1, 2))
    carried: dict[int, bytes] = {}
    for number, (level, strategy) in enumerate(settings):
        other = how(content, level=level, strategy=strategy)
        rows = zck._chunks(other, zck._Source([content]).take, MAKER)
        carried |= {chunk: stored for chunk, _, stored in rows if chunk and chunk % 2 == number}
    published = build(how(content, carried=carried), content)
    assert opened(published) == content
    assert find(published, content, Codec.ZCK) is None


def test_another_content_or_another_file_has_no_recipe() -> None:
    content = text()
    published = build(how(content), content)
    assert find(published, content[:-1], Codec.ZCK) is None
    assert find(published, text()[::-1], Codec.ZCK) is None
    assert find(published + b"\0", content, Codec.ZCK) is None
    assert find(published[:-1], content, Codec.ZCK) is None
    assert find(b"\0ZCK1", content, Codec.ZCK) is None


def test_a_recipe_without_its_side_contents() -> None:
    content = text()
    found = find(build(how(content), content), content, Codec.ZCK)
    assert found is not None
    with pytest.raises(FormatError, match="not at hand"):
        run(found.recipe, [content], {})
    for side in (b"", b"\0", b"\x02\x01", b"\xff" * 9, b"\x01\x05" + b"x"):
        with pytest.raises(FormatError):
            b"".join(run(found.recipe, [content], {found.recipe.sides[0]: side}))


@pytest.mark.parametrize(
    "params",
    [
        (20, 7, 1, 3, 0, 0),
        (9, 10, 1, 3, 0, 0),
        (9, 7, 4, 3, 0, 0),
        (9, 7, 1, 4, 0, 0),
        (9, 7, 1, 3, 1, 0),
        (9, 7, 1, 3, 0, 8),
        (9, 7, 1, 3, 0, 1),
        (9, 7, 1, 3, 0),
        (),
    ],
)
def test_parameters_out_of_range(params: tuple[int, ...]) -> None:
    wire = {"c": "zck", "e": "zstd-1.5.7", "p": list(params), "s": ["A" * 43]}
    with pytest.raises(FormatError):
        Recipe.from_json(wire)


def test_an_engine_that_is_missing() -> None:
    wire = {"c": "zck", "e": "zstd-1.99.9", "p": [9, 7, 1, 3, 0, 0], "s": ["A" * 43]}
    recipe = Recipe.from_json(wire)
    assert cost(recipe, 1 << 20) > 0
    with pytest.raises(EngineError):
        run(recipe, [b""])
    with pytest.raises(FormatError):
        Recipe.from_json({**wire, "e": "zlib"})


@pytest.mark.parametrize("name", list(engine_table.zstd_makers()))
def test_dictionaries_that_libzstd_refuses_or_ignores(name: str) -> None:
    content = text(5)
    maker = engine_table.zstd_makers()[name][1]
    garbage = b"\x37\xa4\x30\xec" + b"garbage" * 40
    refused = how(content, dictionary=garbage, lengths=lengths(content, garbage))
    with pytest.raises(EngineError):
        b"".join(zck.build(refused, [content], maker))
    tiny = how(content, dictionary=b"abc", lengths=lengths(content, b"abc"))
    published = b"".join(zck.build(tiny, [content], maker))
    assert opened(published) == content
    found = find(published, content, Codec.ZCK)
    assert found is not None
    assert rebuilt(found, content) == published


def test_a_published_dictionary_that_libzstd_refuses() -> None:
    content = text(5)
    plain = how(content)
    garbage = b"\x37\xa4\x30\xec" + b"garbage" * 40
    stored = MAKER({100: 9, 107: 7}, None).frame(garbage)
    chunks = {n: data for n, _, data in zck._chunks(plain, zck._Source([content]).take, MAKER)}
    changes = {"dictionary": garbage, "lengths": lengths(content, garbage)}
    published = build(how(content, carried={**chunks, 0: stored}, **changes), content)
    assert find(published, content, Codec.ZCK) is None
    with pytest.raises(FormatError):
        opened(published)


def test_stored_bytes_beyond_the_spool_go_to_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zck, "_SPOOL", 1000)
    content = text()
    spooled = build(how(content), content)
    monkeypatch.undo()
    assert spooled == build(how(content), content)


# --- absurd files ------------------------------------------------------------


def ci(value: int) -> bytes:
    out = bytearray()
    zck._put_ci(out, value)
    return bytes(out)


ENTRY = bytes(16)


def header(
    *,
    lead: bytes = zck.MAGIC,
    size: int | None = None,
    flags: int = 0,
    compression: int = 2,
    count: int = 1,
    entries: bytes = ENTRY + b"\x80\x80",
    index_size: int | None = None,
    signatures: bytes = b"\x80",
    digest: int = 1,
    chunk_digest: int = 3,
    tail: bytes = b"",
) -> bytes:
    """A header with a right digest, whatever it says."""
    index = ci(chunk_digest) + ci(count) + entries
    rest = bytes(32) + ci(flags) + ci(compression)
    rest += ci(len(index) if index_size is None else index_size) + index + signatures + tail
    start = lead + ci(digest) + ci(len(rest) if size is None else size)
    return start + hashlib.sha256(start + rest).digest() + rest


BIG = (1 << 40) - 1
ABSURD = {
    "a billion chunks": header(count=1_000_000_000),
    "chunks beyond the limit": header(count=zck._CHUNKS_MAX + 1),
    "no chunks": header(count=0, entries=b""),
    "more chunks than entries": header(count=2),
    "fewer chunks than entries": header(count=1, entries=(ENTRY + b"\x80\x80") * 2),
    "a header of a terabyte": header(size=BIG),
    "a header beyond the file": header(size=5000),
    "an index beyond the header": header(index_size=5000),
    "an index of a terabyte": header(index_size=BIG),
    "a stored length beyond any file": header(entries=ENTRY + ci(BIG) + b"\x80"),
    "an open length beyond any file": header(entries=ENTRY + b"\x80" + ci(BIG)),
    "a stored length beyond this file": header(entries=ENTRY + ci(77) + ci(5)),
    "an open length without bytes": header(
        count=2, entries=ENTRY + b"\x80\x80" + ENTRY + b"\x80" + ci(5)
    ),
    "lengths that add up beyond any file": header(
        count=3, entries=ENTRY + b"\x80\x80" + (ENTRY + ci(3 << 30) + ci(3 << 30)) * 2
    ),
    "a dictionary of two megabytes": header(entries=ENTRY + ci(9) + ci(2 << 20)),
    "a number without an end": header(entries=ENTRY + b"\x00" * 9 + b"\x80"),
    "a number cut off": header(entries=ENTRY + b"\x00"),
    "streams": header(flags=1),
    "optional elements": header(flags=2),
    "unknown flags": header(flags=64),
    "unknown compression": header(compression=1),
    "two lengths uncompressed": header(compression=0, entries=ENTRY + ci(1) + ci(2)) + b"x",
    "unknown digest": header(digest=4),
    "unknown chunk digest": header(chunk_digest=9),
    "a signature": header(signatures=b"\x81\x80\x80"),
    "bytes behind the signatures": header(tail=b"x"),
    "bytes behind the file": header() + b"x",
    "a detached header": header(lead=b"\0ZHR1"),
    "nothing": b"",
    "a magic": zck.MAGIC,
    "a lead": header()[:30],
    "half a header": header()[:60],
    "a chunk that is no zstd": header(count=2, entries=ENTRY + b"\x80\x80" + ENTRY + ci(9) + ci(5))
    + b"not zstd!",
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_files_end_in_one_line_fast_and_small(name: str) -> None:
    published = ABSURD[name]
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(FormatError) as caught:
        opened(published)
    assert time.process_time() - started < 1
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
    assert find(published, b"", Codec.ZCK) is None


def test_the_smallest_header_is_fine() -> None:
    assert opened(header()) == b""


def test_damage_anywhere_is_a_format_error_or_other_bytes() -> None:
    content = text(12)
    whole = build(how(content), content)
    size = zck.read_header(io.BytesIO(whole)).size
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x04
        try:
            got = opened(bytes(damaged), limit=1 << 20)
        except FormatError:
            continue
        assert position >= size, "the header's digest covers it"
        assert len(got) == len(content)
    for cut in range(0, len(whole), 7):
        with pytest.raises(FormatError):
            opened(whole[:cut])


def test_a_bomb_stops_before_it_is_opened() -> None:
    content = bytes(8 << 20)
    published = build(how(content, lengths=array("q", [0, len(content)])), content)
    assert len(published) < 2000
    with pytest.raises(FormatError, match="beyond"):
        opened(published, limit=1 << 20)
    # A chunk that expands further than its header says.
    frame = published[zck.read_header(io.BytesIO(published)).size :]
    lying = header(count=2, entries=ENTRY + b"\x80\x80" + ENTRY + ci(len(frame)) + ci(5)) + frame
    with pytest.raises(FormatError, match="longer"):
        opened(lying)


def test_a_chunk_too_large_to_build_is_opaque_but_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    content = text(50)
    published = build(how(content, lengths=array("q", [0, len(content)])), content)
    monkeypatch.setattr(zck, "_CHUNK_MAX", 1000)
    assert opened(published) == content
    assert find(published, content, Codec.ZCK) is None


# --- files of the real tools ------------------------------------------------------------


def need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"needs {program} (apt install zchunk createrepo-c)")
    return found


def accepted(path: Path) -> None:
    for program, option in (("unzck", "--stdout"), ("zck_read_header", "-f")):
        subprocess.run([need(program), option, path], check=True, capture_output=True)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-m"],
        ["-s", "<package"],
        ["-u", "-s", "<package"],
        ["-h", "sha256"],
        ["-h", "sha512", "-m"],
        ["--compression-format=none"],
        ["-s", "<package", "-D"],
    ],
    ids=" ".join,
)
def test_files_of_zck(arguments: list[str], tmp_path: Path) -> None:
    program = need("zck")
    content = text(900)
    plain, target, dictionary = tmp_path / "p.xml", tmp_path / "p.zck", tmp_path / "dict"
    plain.write_bytes(content)
    dictionary.write_bytes(dictionary_of(content))
    given = [f"--dict={dictionary}" if argument == "-D" else argument for argument in arguments]
    subprocess.run([program, *given, "-o", target, plain], check=True, capture_output=True)
    published = target.read_bytes()
    assert opened(published) == content
    found = find(published, content, Codec.ZCK)
    assert found is not None
    again = tmp_path / "again.zck"
    again.write_bytes(rebuilt(found, content))
    assert again.read_bytes() == published
    accepted(again)


def test_an_empty_file_of_zck(tmp_path: Path) -> None:
    program = need("zck")
    (tmp_path / "empty").write_bytes(b"")
    subprocess.run([program, "-o", tmp_path / "e.zck", tmp_path / "empty"], check=True)
    published = (tmp_path / "e.zck").read_bytes()
    assert opened(published) == b""
    found = find(published, b"", Codec.ZCK)
    assert found is not None
    assert rebuilt(found, b"") == published


# --- vectors ------------------------------------------------------------


@pytest.mark.parametrize("row", json.loads(VECTORS.read_text())["files"], ids=lambda r: r["name"])
def test_vectors(row: dict[str, Any]) -> None:
    """Files of the zck program, and the recipe and side contents that they must give."""
    published = base64.b64decode(row["published"])
    content = opened(published)
    assert ContentId.of(content).hex() == row["content"]
    found = find(published, content, Codec.ZCK)
    assert found is not None
    assert found.recipe.to_json() == row["recipe"]
    assert [base64.b64encode(side).decode() for side in found.sides.values()] == row["sides"]
    assert rebuilt(found, content) == published
