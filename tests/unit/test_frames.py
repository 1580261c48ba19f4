"""Frames and their dictionary: round trips, determinism, and damage."""

from __future__ import annotations

import random

import pytest

from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.frames import (
    FrameReader,
    FrameWriter,
    level_for,
    open_frame,
    train_dictionary,
)
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.zstd import zstd


def records(count: int, seed: int = 3) -> list[bytes]:
    generator = random.Random(seed)
    return [
        "".join(
            f'<package type="rpm"><name>lib{generator.randrange(999)}</name><arch>x86_64</arch>'
            f'<version epoch="0" ver="{generator.random():.3f}" rel="1.fc43"/></package>\n'
            for _ in range(generator.randrange(5, 20))
        ).encode()
        for _ in range(count)
    ]


CHUNKS = records(300)
DICTIONARY = train_dictionary(CHUNKS)


@pytest.mark.parametrize("dictionary", [b"", DICTIONARY], ids=["plain", "dictionary"])
@pytest.mark.parametrize("level", [1, 12, 19, 22])
def test_round_trip(dictionary: bytes, level: int) -> None:
    writer, reader = FrameWriter(dictionary, level), FrameReader(dictionary)
    for chunk in [*CHUNKS[:20], b"", b"x", bytes(100_000), random.Random(1).randbytes(70_000)]:
        frame = writer.frame(chunk)
        assert reader.open(frame, len(chunk)) == chunk
        assert open_frame(memoryview(frame), dictionary, len(chunk)) == chunk


def test_frames_do_not_depend_on_what_came_before() -> None:
    one, two = FrameWriter(DICTIONARY), FrameWriter(DICTIONARY)
    forward = [one.frame(chunk) for chunk in CHUNKS]
    backward = [two.frame(memoryview(chunk)) for chunk in reversed(CHUNKS)]
    assert forward == backward[::-1]


def test_the_dictionary_pays_and_is_deterministic() -> None:
    assert DICTIONARY
    assert len(DICTIONARY) <= 16 * 1024
    assert train_dictionary([bytearray(c) for c in CHUNKS]) == DICTIONARY
    plain, using = FrameWriter(b""), FrameWriter(DICTIONARY)
    assert sum(len(using.frame(c)) for c in CHUNKS) < 0.9 * sum(len(plain.frame(c)) for c in CHUNKS)


def test_few_large_chunks_train_a_dictionary_too() -> None:
    large = [b"".join(records(40, seed)) for seed in range(6)]
    assert train_dictionary(large)


def test_steps_compress_harder_than_first_publishes() -> None:
    assert level_for(0) == level_for(16 << 20) > level_for((16 << 20) + 1)


def test_no_dictionary_where_none_pays() -> None:
    noise = [random.Random(i).randbytes(2000) for i in range(100)]
    for chunks in ([], [b""] * 100, CHUNKS[:3], noise, [b"same bytes"] * 20):
        assert train_dictionary(chunks) == b""


def test_the_header_is_lean() -> None:
    frame = FrameWriter(DICTIONARY).frame(CHUNKS[0])
    info = zstd.get_frame_info(frame)
    assert info.decompressed_size == len(CHUNKS[0])
    assert info.dictionary_id == 0
    assert not frame[4] & 0b100, "no checksum"
    assert frame[4] & 0b10_0000, "single segment: no window byte"


def test_damage_is_a_format_error_or_other_bytes() -> None:
    chunk = CHUNKS[0]
    frame = FrameWriter(DICTIONARY).frame(chunk)
    for cut in range(len(frame)):
        with pytest.raises(FormatError):
            open_frame(frame[:cut], DICTIONARY)
    refused = 0
    for bit in range(len(frame) * 8):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = open_frame(flipped, DICTIONARY, len(chunk))
        except FormatError:
            refused += 1
            continue
        assert len(found) <= len(chunk)
    assert refused


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"not a frame",
        FrameWriter(b"").frame(b"x" * 100) + b"y",
        FrameWriter(b"").frame(b"x" * 100) * 2,
        b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip",
        zstd.compress(b"x" * 100, options={zstd.CompressionParameter.content_size_flag: 0}),
        # A single-segment header that claims 2**62 bytes.
        b"\x28\xb5\x2f\xfd\xe0" + (1 << 62).to_bytes(8, "little") + b"\x01\x00\x00",
    ],
    ids=["empty", "text", "tail", "two", "skippable", "unsized", "bomb"],
)
def test_what_is_not_one_sized_frame_is_refused(frame: bytes) -> None:
    with pytest.raises(FormatError):
        open_frame(frame, b"")


def test_promises_above_the_maximum_are_refused() -> None:
    frame = FrameWriter(b"").frame(bytes(LIMITS.chunk))
    assert len(open_frame(frame, b"")) == LIMITS.chunk
    with pytest.raises(FormatError):
        open_frame(frame, b"", LIMITS.chunk - 1)


@pytest.mark.parametrize(
    "dictionary",
    [b"no", b"not a dictionary at all", DICTIONARY[:40], bytes(LIMITS.dictionary + 1)],
)
def test_a_bad_dictionary_is_refused(dictionary: bytes) -> None:
    with pytest.raises(FormatError):
        FrameWriter(dictionary)
    with pytest.raises(FormatError):
        open_frame(FrameWriter(b"").frame(b"x"), dictionary)


def test_another_dictionary_never_gives_more_than_promised() -> None:
    other = train_dictionary(records(300, seed=4))
    chunk = CHUNKS[1]
    frame = FrameWriter(DICTIONARY).frame(chunk)
    try:
        found = open_frame(frame, other, len(chunk))
    except FormatError:
        return
    assert found != chunk
    assert len(found) == len(chunk)
