"""casync's cuts and index: vectors of the real programs, the programs themselves, bad bytes."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tidings_chunkstore.errors import EngineError, FormatError
from tidings_chunkstore.zstd import zstd
from tidings_server.casync import CasyncId, CasyncIndex, encode_chunk
from tidings_server.casync_chunker import ChunkSizes, Rule, cuts

TESTS = Path(__file__).resolve().parents[1]
DATA = TESTS.parents[1] / "shared" / "data"
VECTORS = json.loads((TESTS / "vectors" / "caibx.json").read_bytes())["vectors"]
KIB = 1024


def blob(seed: str, size: int) -> bytes:
    return hashlib.shake_256(seed.encode()).digest(size) if seed else bytes(size)


def index(data: bytes, sizes: ChunkSizes) -> CasyncIndex:
    return CasyncIndex.make(io.BytesIO(data), sizes)


def records(count: int) -> bytes:
    """Text as repetitive as real metadata, whose boundaries lie less evenly than those of noise."""
    lines = (
        f'<package pkgid="{hashlib.sha256(b"%d" % n).hexdigest()}"><name>lib{n % 97}</name>'
        f'<version epoch="0" ver="{n % 7}.{n % 11}" rel="{n % 5}.fc43"/></package>\n'
        for n in range(count)
    )
    return "".join(lines).encode()


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['tool']}-{v['why']}")
def test_vectors_of_the_real_programs(vector: dict[str, str | int]) -> None:
    sizes = ChunkSizes.of(int(vector["avg"]), Rule(str(vector["tool"])))
    wanted = base64.b64decode(str(vector["caibx"]))
    made = index(blob(str(vector["seed"]), int(vector["size"])), sizes)
    assert made.to_caibx() == wanted
    assert CasyncIndex.from_caibx(wanted).to_caibx() == wanted


def test_the_vectors_hold_the_difference_between_the_programs() -> None:
    special = [v for v in VECTORS if v["why"].startswith("a boundary at min")]
    ends = {v["tool"]: CasyncIndex.from_caibx(base64.b64decode(v["caibx"])).ends for v in special}
    assert ends["casync"].tolist() != ends["desync"].tolist()


def real_make(rule: Rule, average: int, source: Path, folder: Path) -> bytes:
    target = folder / f"{rule}-{average}.caibx"
    kib = average // KIB
    arguments = {
        Rule.CASYNC: [f"--store={folder / 's.castr'}", f"--chunk-size={average}"],
        Rule.DESYNC: ["-m", f"{kib // 4}:{kib}:{kib * 4}"],
    }[rule]
    subprocess.run(
        [rule, "make", *arguments, target, source], check=True, capture_output=True, timeout=120
    )
    return target.read_bytes()


def need(rule: Rule) -> None:
    if shutil.which(rule) is None:
        pytest.skip(f"{rule} is not installed")


def newest(folder: str, pattern: str) -> Path:
    """A file of the newest version in the shared data."""
    found = sorted(DATA.glob(f"{folder}/*/{pattern}"))
    if not found:
        pytest.skip(f"no ../shared/data/{folder}")
    return found[-1]


@pytest.mark.tools
@pytest.mark.parametrize("average", [64 * KIB, 16 * KIB, 4 * KIB])
@pytest.mark.parametrize("rule", Rule)
class TestRealPrograms:
    """Byte for byte the index that ``make`` writes."""

    def test_generated(self, rule: Rule, average: int, tmp_path: Path) -> None:
        need(rule)
        data = records(12_000) + blob("noise", 1_000_000) + bytes(900_000) + records(3_000)
        source = tmp_path / "blob"
        source.write_bytes(data)
        assert index(data, ChunkSizes.of(average, rule)).to_caibx() == real_make(
            rule, average, source, tmp_path
        )

    @pytest.mark.parametrize(
        ("folder", "pattern"),
        [
            ("rpmsphere-noarch", "repodata/*-primary.xml.zst"),
            ("linux-surface-f39", "repodata/*-filelists.xml.*"),
        ],
    )
    def test_real_contents(
        self, rule: Rule, average: int, folder: str, pattern: str, tmp_path: Path
    ) -> None:
        need(rule)
        published = newest(folder, pattern)
        source = tmp_path / "content"
        unpack = {".zst": zstd.decompress, ".gz": gzip.decompress}[published.suffix]
        source.write_bytes(unpack(published.read_bytes()))
        with source.open("rb") as stream:
            made = CasyncIndex.make(stream, ChunkSizes.of(average, rule)).to_caibx()
        assert made == real_make(rule, average, source, tmp_path)


@pytest.mark.tools
def test_casync_reads_our_chunks(tmp_path: Path) -> None:
    """casync extracts from an index and a store that only we wrote."""
    need(Rule.CASYNC)
    data = records(5_000)
    made = index(data, ChunkSizes.of(4 * KIB))
    (tmp_path / "x.caibx").write_bytes(made.to_caibx())
    for number in range(len(made)):
        identity, offset, length = made.chunk(number)
        path = tmp_path / "default.castr" / identity.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_chunk(data[offset : offset + length]))
    subprocess.run(
        ["casync", "extract", "x.caibx", "out"], cwd=tmp_path, check=True, capture_output=True
    )
    assert (tmp_path / "out").read_bytes() == data


def test_find_and_chunk() -> None:
    data = blob("find", 150_000) + bytes(70_000)
    made = index(data, ChunkSizes.of(4 * KIB))
    assert made.size == len(data)
    for number in range(len(made)):
        identity, offset, length = made.chunk(number)
        assert identity == CasyncId.of(data[offset : offset + length])
        place = made.find(identity)
        assert place is not None
        assert data[place[0] : place[0] + place[1]] == data[offset : offset + length]
    assert made.find(CasyncId.of(b"something else")) is None


def test_ids_with_equal_first_bytes_are_told_apart() -> None:
    ids = [bytes(8) + bytes([n]) * 24 for n in (3, 1, 2)]
    made = CasyncIndex(ChunkSizes.of(4096), np.array([2000, 5000, 5100], np.uint64), b"".join(ids))
    assert made.find(CasyncId(ids[1])) == (2000, 3000)
    assert made.find(CasyncId(bytes(8) + b"\x07" * 24)) is None


def test_names() -> None:
    identity = CasyncId.of(b"")
    assert identity.hex().startswith("c672b8d1ef56ed28")  # FIPS 180-4: SHA-512/256 of nothing
    assert CasyncId.from_name(identity.name) == identity
    text = identity.hex()
    for bad in (text, f"0000/{text}.cacnk", f"{text[:4]}/{text}", f"c672/{text.upper()}.cacnk", ""):
        with pytest.raises(FormatError):
            CasyncId.from_name(bad)


def test_chunk_is_one_bare_frame() -> None:
    data = blob("frame", 5_000)
    frame = encode_chunk(data)
    assert frame[:4] == b"\x28\xb5\x2f\xfd"
    assert zstd.decompress(frame) == data


@pytest.mark.parametrize(
    "sizes", [(47, 64, 128), (64, 48, 128), (64, 128, 127), (1024, 4096, 1 << 30), (-1, 0, 1)]
)
def test_sizes_out_of_range(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(FormatError):
        ChunkSizes(*sizes)


def test_fixed_size_chunks() -> None:
    """casync's special case, min = avg = max, follows from the general rule."""
    data = blob("fixed", 10_000)
    assert cuts(io.BytesIO(data), ChunkSizes(4096, 4096, 4096)) == [4096, 8192, 10_000]


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, 49),  # header's size
        (8, 1),  # header's type
        (16, 0x9000000000000000),  # SHA-256 ids
        (24, 47),  # min
        (40, 1 << 40),  # max
        (48, 0),  # table's size
        (64, 0),  # an empty chunk
        (64, 1 << 20),  # a chunk above max
        (104, 5),  # an offset that goes back
        (-24, 47),  # tail
        (-16, 0),
        (-8, 0),
    ],
)
def test_bad_index(at: int, value: int) -> None:
    good = index(blob("bad", 30_000), ChunkSizes.of(4 * KIB)).to_caibx()
    data = bytearray(good)
    struct.pack_into("<Q", data, at % len(data), value)
    assert bytes(data) != good
    with pytest.raises(FormatError):
        CasyncIndex.from_caibx(bytes(data))


def test_truncated_index() -> None:
    data = index(blob("bad", 30_000), ChunkSizes.of(4 * KIB)).to_caibx()
    for size in (0, 47, 103, len(data) - 40, len(data) - 1):
        with pytest.raises(FormatError):
            CasyncIndex.from_caibx(data[:size])


def test_no_digest_is_an_engine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def new(name: str, *args: object, **kwargs: object) -> None:
        raise ValueError(f"unsupported hash type {name}")

    monkeypatch.setattr(hashlib, "new", new)
    with pytest.raises(EngineError):
        CasyncId.of(b"")
