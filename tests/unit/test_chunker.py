"""The chunker: vectors, validation, laziness, and the path without compiled code."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tidings_chunkstore.chunker import (
    ALGORITHM,
    ChunkerParams,
    chunk_id,
    chunk_ids,
    cuts,
    params_for,
    scan,
    scan_ids,
)
from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.limits import LIMITS, MIB

VECTORS = Path(__file__).parent.parent / "vectors" / "chunks.json"


def sample(size: int, seed: int = 1) -> bytes:
    """Text-like bytes: repeated words, so that the hash sees structure."""
    words = [f"<package name='p{i}' arch='noarch'/>\n".encode() for i in range(200)]
    return b"".join(random.Random(seed).choices(words, k=size // 30))[:size]


def vectors() -> list[dict[str, object]]:
    loaded: list[dict[str, object]] = json.loads(VECTORS.read_text())["vectors"]
    return loaded


@pytest.mark.parametrize("vector", vectors(), ids=lambda v: str(v["name"]))
def test_cuts_and_ids_are_pinned(vector: dict[str, object]) -> None:
    """A change here is a format change: stored indexes would find nothing again."""
    generator = random.Random(int(str(vector["seed"])))
    alphabet = str(vector["alphabet"]).encode("latin-1")
    data = bytes(generator.choices(alphabet, k=int(str(vector["size"]))))
    params = ChunkerParams(*vector["params"])  # type: ignore[misc]
    ends = cuts(data, params)
    assert ends == vector["cuts"]
    assert [i.hex()[:16] for i in chunk_ids(data, ends)] == vector["ids"]


@pytest.mark.parametrize(
    "values",
    [
        ("fastcdc-2020", 1024, 4096, 32768),
        ("", 1024, 4096, 32768),
        (ALGORITHM, 0, 4096, 32768),
        (ALGORITHM, -1, 4096, 32768),
        (ALGORITHM, 63, 4096, 32768),
        (ALGORITHM, 64, 255, 1024),
        (ALGORITHM, 64, 256, 1023),
        (ALGORITHM, 4097, 4096, 32768),
        (ALGORITHM, 1024, 4096, 4095),
        (ALGORITHM, 1024, 4096, LIMITS.chunk + 1),
        (ALGORITHM, 1 << 80, 1 << 80, 1 << 80),
        (ALGORITHM, 1024.0, 4096, 32768),
        (ALGORITHM, True, 4096, 32768),
        (ALGORITHM, 1024, 4096, None),
        (None, 1024, 4096, 32768),
    ],
)
def test_hostile_parameters_are_refused(values: tuple[object, ...]) -> None:
    with pytest.raises(FormatError):
        ChunkerParams(*values)  # type: ignore[arg-type]


def test_extreme_allowed_parameters_run() -> None:
    data = sample(100_000)
    for sizes in [(64, 256, 1024), (256, 256, 1024), (LIMITS.chunk,) * 3]:
        ends = cuts(data, ChunkerParams.of(*sizes))
        assert ends[-1] == len(data)


@pytest.mark.parametrize("published", [0, 1, 10_000, 26_000_000, 1 << 40])
@pytest.mark.parametrize("content", [0, 1, 300_000, 26_000_000, 1 << 32])
def test_params_for_answers_for_any_sizes(content: int, published: int) -> None:
    params = params_for(content, published)
    assert ChunkerParams(params.name, params.min, params.avg, params.max) == params


@pytest.mark.parametrize(
    ("content", "published", "average"),
    [
        (1_200_000, 17_780, 2048),
        (26_000_000, 2_839_894, 4096),
        (120_000_000, 12_000_000, 4096),
        (56_630_260, 4_060_858, 8192),
        (61_216_456, 534_858, 8192),
        (61_216_456, 0, 8192),
    ],
)
def test_the_rule_of_the_adr(content: int, published: int, average: int) -> None:
    assert params_for(content, published) == ChunkerParams.of(average // 4, average, average * 8)


def test_previous_parameters_are_kept_near_a_threshold_only() -> None:
    small, medium = params_for(MIB, MIB), params_for(20 * MIB, 10 * MIB)
    assert params_for(5 * MIB, MIB) == medium
    assert params_for(5 * MIB, MIB, small) == small
    assert params_for(9 * MIB, MIB, small) == medium
    assert params_for(3 * MIB, MIB, medium) == medium
    assert params_for(MIB, MIB, medium) == small
    assert params_for(MIB, MIB, ChunkerParams.of(64, 256, 1024)) == small


def test_nothing_and_little() -> None:
    params = ChunkerParams.of(1024, 4096, 32768)
    assert cuts(b"", params) == []
    assert chunk_ids(b"", []) == []
    assert list(scan(io.BytesIO(b""), params)) == []
    assert cuts(b"x", params) == [1]
    assert chunk_ids(b"x", [1]) == [chunk_id(b"x")]


def test_views_of_wider_items_are_cut_by_bytes() -> None:
    data = sample(40_000)
    wide = memoryview(data).cast("I")
    params = ChunkerParams.of(1024, 4096, 32768)
    assert cuts(wide, params) == cuts(bytearray(data), params) == cuts(data, params)


def test_scan_starts_at_the_position_and_reads_short_reads() -> None:
    class Short(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 0, 1000))

    data = sample(300_000)
    params = ChunkerParams.of(256, 1024, 8192)
    ends = cuts(data, params)
    file = Short(b"skipped" + data)
    file.seek(7)
    found = list(scan(file, params, window=1))
    assert [end for end, _ in found] == ends
    assert b"".join(chunk for _, chunk in found) == data
    assert scan_ids(io.BytesIO(data), params) == (ends, chunk_ids(data, ends))


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=True
    )


def test_import_leaves_the_heavy_libraries_out() -> None:
    done = run(
        "import sys, tidings_chunkstore.chunker as c, tidings_chunkstore.frames\n"
        "c.params_for(10, 10)\n"
        "print(sorted({'fastcdc', 'blake3', 'click'} & set(sys.modules)))"
    )
    assert done.stdout.strip() == "[]"


def test_without_compiled_code_same_cuts_clean_stdout_one_warning() -> None:
    code = (
        "import sys, random\n"
        "{block}\n"
        "from tidings_chunkstore.chunker import ChunkerParams, cuts\n"
        "data = random.Random(5).randbytes(200_000)\n"
        "for sizes in [(256, 1024, 8192), (1024, 2048, 4096)]:\n"
        "    print(cuts(data, ChunkerParams.of(*sizes)))\n"
    )
    slow = run(code.format(block="sys.modules['fastcdc.fastcdc_cy'] = None"))
    normal = run(code.format(block=""))
    assert slow.stdout == normal.stdout
    assert len(slow.stdout.splitlines()) == 2
    assert slow.stderr.count("RuntimeWarning") == 1
    assert "pure python" not in slow.stdout + slow.stderr


@pytest.mark.parametrize("missing", ["fastcdc", "blake3"])
def test_a_missing_library_is_named(missing: str) -> None:
    done = run(
        "import sys\n"
        f"sys.modules[{missing!r}] = None\n"
        "from tidings_chunkstore.chunker import ChunkerParams, cuts, chunk_ids\n"
        "from tidings_chunkstore.errors import EngineError\n"
        "try:\n"
        "    chunk_ids(b'x', cuts(b'x', ChunkerParams.of(1024, 4096, 32768)))\n"
        "except EngineError as error:\n"
        "    print(error)\n"
    )
    assert missing in done.stdout
