"""Delta sections: what they lead to, what they cost, and what damaged or forged ones end in."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tidings_chunkstore import delta, deltamake, lzmadict
from tidings_chunkstore.delta import Budget, DeltaInfo, FileReader, PrefixRule, reader_of
from tidings_chunkstore.errors import FormatError, InputError, VerificationError
from tidings_chunkstore.ids import ContentId
from tidings_chunkstore.limits import KIB, LIMITS, MIB
from tidings_chunkstore.wire import uvarints
from tidings_chunkstore.zstd import zstd

VECTORS = Path(__file__).parent.parent / "vectors" / "delta.json"


def records(count: int, seed: int = 1) -> list[bytes]:
    """Lines like those of package metadata: alike, each with a digest of its own."""
    draw = random.Random(seed)
    return [
        b"<package><name>p%05d</name><pkgid>%064x</pkgid><size>%d</size>\n"
        b"  <file>/usr/share/%d</file></package>\n"
        % (number, draw.getrandbits(256), draw.randrange(10**7), number * 7)
        for number in range(count)
    ]


def make(bases: Sequence[bytes], target: bytes) -> bytes:
    section = deltamake.make(
        [(ContentId.of(base), base) for base in bases], ContentId.of(target), target
    )
    assert section is not None
    return section


def rebuild(section: bytes, bases: Sequence[bytes]) -> bytes:
    pieces: list[bytes] = []
    delta.apply(section, [reader_of(base) for base in bases], lambda p: pieces.append(bytes(p)))
    assert all(len(piece) <= MIB for piece in pieces)
    return b"".join(pieces)


def sealed(rest: bytes) -> bytes:
    """A section with a valid checksum, whatever it says."""
    return delta.MAGIC + delta.checksum(memoryview(rest)) + rest


def forged(
    base: bytes,
    target: bytes,
    *,
    rule: int = 0,
    rule_parameters: bytes = b"",
    coding: int = 0,
    count: int = 0,
    columns: bytes = b"",
    packed: bool = False,
    target_size: int | None = None,
    frame: bytes = b"",
) -> bytes:
    """A section by hand, for one base."""
    head = bytes([1 << 3 | packed << 2 | rule]) + ContentId.of(base)[:8] + uvarints([len(base)])
    size = len(target) if target_size is None else target_size
    head += ContentId.of(target) + uvarints([size]) + rule_parameters + bytes([coding])
    return sealed(head + uvarints([count, len(columns)]) + columns + frame)


OLD = b"".join(records(3000))
_LINES = records(3000)
_LINES[100] = b"one line changed\n"
_LINES[1500:1503] = records(9, seed=2)[3:]
del _LINES[2000:2005]
NEW = b"".join(_LINES)


def test_leads_from_the_base_to_the_target_at_the_size_of_the_change() -> None:
    section = make([OLD], NEW)
    assert rebuild(section, [OLD]) == NEW
    assert len(section) < 700


def test_equal_contents_cost_the_header_only() -> None:
    assert len(make([OLD], OLD)) < 70


def test_a_target_without_bases_stands_alone() -> None:
    text = b"<repomd>" + b"".join(records(8)) + b"</repomd>"
    section = make([], text)
    assert rebuild(section, []) == text
    assert len(section) < len(zstd.compress(text, 19)) + 60


@pytest.mark.parametrize("target", [b"", b"x", b"short", bytes(100)])
@pytest.mark.parametrize("base", [b"", b"y", b"short", bytes(5000)])
def test_tiny_contents(base: bytes, target: bytes) -> None:
    assert rebuild(make([base], target), [base]) == target


def test_several_bases_each_give_their_part() -> None:
    one, two = b"".join(records(500, 3)), b"".join(records(500, 4))
    target = two[:30000] + b"between" + one[20000:60000]
    section = make([one, two], target)
    assert rebuild(section, [one, two]) == target
    assert len(section) < 250
    with pytest.raises(VerificationError):
        rebuild(section, [two, one])


def test_the_header_says_what_applying_takes() -> None:
    info = delta.inspect(make([OLD], NEW)[:200])
    assert info.target == ContentId.of(NEW)
    assert info.target_size == len(NEW)
    assert info.bases == ((ContentId.of(OLD)[:8], len(OLD)),)
    assert info.prefix_rule == PrefixRule.WHOLE
    assert info.prefix_size == len(OLD)
    assert info.memory < 8 * MIB


def test_a_large_base_gives_context_only() -> None:
    lines = records(40000)
    old = b"".join(lines)
    assert len(old) > 4 * MIB
    for number in range(0, 40000, 1000):
        lines[number] = lines[number].replace(b"/usr/share", b"/usr/lib")
    section = make([old], b"".join(lines))
    info = delta.inspect(section)
    assert info.prefix_rule == PrefixRule.CONTEXT
    assert info.prefix_size < len(old) // 2
    assert rebuild(section, [old]) == b"".join(lines)
    assert len(section) < 1200


def test_lzma_and_zstd_frames_lead_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deltamake, "_WORTHWHILE", 99)  # no zstd where there is LZMA
    target = OLD + b"".join(records(2000, seed=9))
    with_lzma = make([OLD], target)

    def missing(*_: object) -> None:
        raise OSError("no liblzma")

    monkeypatch.setattr(lzmadict, "Encoder", missing)
    without = make([OLD], target)
    assert delta.inspect(without).coding < delta.LZMA2 <= delta.inspect(with_lzma).coding
    assert rebuild(without, [OLD]) == rebuild(with_lzma, [OLD]) == target


@pytest.mark.parametrize("effort", list(lzmadict.Effort))
def test_lzma_behind_a_dictionary(effort: lzmadict.Effort) -> None:
    encoder = lzmadict.Encoder(OLD, 2 * MIB, effort)
    stream = encoder.compress(NEW[:1000]) + encoder.compress(NEW[1000:]) + encoder.flush()
    assert len(stream) < len(NEW) // 50
    assert lzmadict.decoder(OLD, 2 * MIB).decompress(stream) == NEW


def test_a_file_is_a_base(tmp_path: Path) -> None:
    path = tmp_path / "base"
    path.write_bytes(OLD)
    section, pieces = make([OLD], NEW), bytearray()
    with path.open("rb") as file:
        base = FileReader(file.fileno())
        delta.apply(section, [base], pieces.extend)
        assert pieces == NEW
        os.truncate(path, 1000)
        with pytest.raises(VerificationError):
            delta.apply(section, [base], pieces.extend)


def test_no_section_above_the_limit() -> None:
    noise = random.Random(7).randbytes(3 * MIB)
    arguments = [(ContentId.of(OLD), OLD)], ContentId.of(noise), noise
    assert deltamake.make(*arguments, budget=Budget(limit=len(noise) * 9 // 10)) is None
    assert deltamake.make([], ContentId.of(b"abc"), b"abc", budget=Budget(limit=20)) is None


def test_a_wrong_target_id_is_the_callers_error() -> None:
    with pytest.raises(VerificationError):
        deltamake.make([(ContentId.of(OLD), OLD)], ContentId.of(OLD), NEW)


def test_too_many_bases() -> None:
    with pytest.raises(InputError):
        make([b"x"] * (LIMITS.delta_bases + 1), b"y")


def test_applying_loads_nothing_that_only_publishers_have() -> None:
    code = (
        "import sys; import tidings_chunkstore.delta; "
        "print(sorted({'fastcdc', 'blake3', 'numpy', 'ctypes.util'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


# Damage and forgery


def test_every_truncation_is_noticed() -> None:
    section = make([OLD], NEW)
    for end in range(len(section)):
        with pytest.raises(FormatError):
            rebuild(section[:end], [OLD])


def test_every_flipped_byte_is_noticed() -> None:
    section = make([OLD], NEW)
    for at in range(len(section)):
        broken = bytearray(section)
        broken[at] ^= 1 << at % 8
        with pytest.raises(FormatError):
            rebuild(bytes(broken), [OLD])


def test_flips_below_a_valid_checksum_never_pass() -> None:
    """Nothing wrong is taken for the target, and nothing but the two errors comes out."""
    section = make([OLD], NEW)
    for at in range(len(delta.MAGIC) + delta.CHECKSUM, len(section)):
        for bit in (1, 0x80):
            rest = bytearray(section[len(delta.MAGIC) + delta.CHECKSUM :])
            rest[at - len(delta.MAGIC) - delta.CHECKSUM] ^= bit
            try:
                result = rebuild(sealed(bytes(rest)), [OLD])
            except (FormatError, VerificationError):
                continue
            assert result == NEW  # a base's id prefix: the caller compares it


def test_another_base_is_refused() -> None:
    section = make([OLD], NEW)
    with pytest.raises(VerificationError):
        rebuild(section, [OLD[:-1]])
    with pytest.raises(VerificationError):
        rebuild(section, [OLD[:-1] + b"?"])
    with pytest.raises(VerificationError):
        rebuild(section, [])


BASE, TARGET = bytes(range(100)), bytes(range(50))


def test_forging_by_hand_follows_the_format() -> None:
    assert rebuild(forged(BASE, TARGET, count=1, columns=uvarints([0, 50, 0])), [BASE]) == TARGET


@pytest.mark.parametrize(
    ("count", "columns"),
    [
        (1, [0, 51, 0]),  # more than the target
        (2, [0, 0, 30, 30, 0, 0]),  # together more than the target
        (1, [51, 1, 0]),  # new bytes past the end
        (1, [0, 50, 2 * 51]),  # past the end of the base
        (1, [0, 50, 2 * 10**12]),  # far past it
        (1, [0, 50, 1]),  # before the base
        (2, [0, 0, 0, 50, 0, 0]),  # a copy of nothing
        (1, [0, 50]),  # a column missing
        (1, [0, 50, 0, 0]),  # bytes behind the columns
        (1_000_000, [0, 50, 0, 0, 0, 0, 0, 0, 0, 0]),  # a million operations in ten bytes
        (LIMITS.delta_ops + 1, [0, 50, 0]),
    ],
)
def test_operations_out_of_bounds(count: int, columns: list[int]) -> None:
    with pytest.raises(FormatError):
        rebuild(forged(BASE, TARGET, count=count, columns=uvarints(columns)), [BASE])


def zstd_frame(data: bytes) -> bytes:
    options: dict[int, int] = {zstd.CompressionParameter.content_size_flag: 0}
    return zstd.compress(data, options=options)[6:]


def lzma_frame(data: bytes) -> bytes:
    encoder = lzmadict.Encoder(b"", 64 * KIB, lzmadict.Effort.LOW)
    return encoder.compress(data) + encoder.flush()


@pytest.mark.parametrize(("coding", "pack"), [(136, zstd_frame), (0xC0 + 30, lzma_frame)])
def test_frames_that_do_not_fit(coding: int, pack: Callable[[bytes], bytes]) -> None:
    def attempt(frame: bytes, size: int = 50) -> bytes:
        section = forged(BASE, TARGET, coding=coding, frame=frame, target_size=size)
        return rebuild(section, [BASE])

    assert attempt(pack(TARGET)) == TARGET
    bomb = pack(bytes(200 * MIB))
    assert len(bomb) < 64 * KIB
    for frame in (b"", pack(TARGET[:49]), pack(TARGET + b"!"), bomb, b"garbage" * 9):
        with pytest.raises(FormatError):
            attempt(frame)
    with pytest.raises(FormatError):
        attempt(pack(TARGET) + b"more")
    with pytest.raises(FormatError):
        attempt(pack(TARGET)[:-2])
    with pytest.raises(FormatError):
        attempt(b"unwanted", size=0)


@pytest.mark.parametrize(
    ("rule", "parameters", "coding"),
    [
        (3, b"", 0),  # no such rule
        (2, bytes([12, 20]) + uvarints([101]), 0),  # more prefix than there is
        (2, bytes([12, 20]) + uvarints([4]), 0),  # less than zstd takes
        (2, bytes([12, 20]) + uvarints([LIMITS.delta_prefix + 1]), 0),
        (0, b"", 137),  # windows above 128 MiB
        (0, b"", 0xBF),
        (0, b"", 0xFF),
    ],
)
def test_headers_out_of_bounds(rule: int, parameters: bytes, coding: int) -> None:
    section = forged(
        BASE, TARGET, rule=rule, rule_parameters=parameters, coding=coding, frame=zstd_frame(TARGET)
    )
    with pytest.raises(FormatError):
        rebuild(section, [BASE])


def test_packed_operations_that_expand_without_end() -> None:
    columns = deltamake._pack(bytes(40 * MIB))
    assert len(columns) < MIB
    with pytest.raises(FormatError):
        rebuild(forged(BASE, TARGET, count=1, columns=columns, packed=True), [BASE])
    with pytest.raises(FormatError):
        rebuild(forged(BASE, TARGET, count=1, columns=b"garbage!", packed=True), [BASE])


def test_vectors() -> None:
    """Sections in hexadecimal with their bases and targets: they must be readable for ever."""
    vectors = json.loads(VECTORS.read_text())
    assert {delta.inspect(bytes.fromhex(v["section"])).prefix_rule for v in vectors} == set(
        PrefixRule
    )
    for vector in vectors:
        bases = [base.encode() * vector["repeat"] for base in vector["bases"]]
        section = bytes.fromhex(vector["section"])
        info: DeltaInfo = delta.inspect(section)
        assert info.target.hex() == vector["sha256"], vector["name"]
        assert ContentId.of(rebuild(section, bases)) == info.target


def test_another_version_is_named_as_such() -> None:
    with pytest.raises(FormatError) as caught:
        delta.inspect(b"D\x02" + make([OLD], NEW)[2:])
    assert caught.value.code == "format-version"
