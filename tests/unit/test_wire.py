"""Integers and bounded reading."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.places import PackName
from tidings_chunkstore.wire import Reader, uvarints


def test_a_wrong_start_is_said_for_people() -> None:
    with pytest.raises(FormatError, match=r"x: starts with bytes 3c 68, not bytes 41 00$"):
        Reader(b"<html>", "x").expect(b"A\0")
    with pytest.raises(FormatError, match=r"starts with nothing"):
        Reader(b"", "x").expect(b"A")


@given(st.lists(st.integers(0, 2**63 - 1), max_size=20))
def test_uvarints_come_back(values: list[int]) -> None:
    reader = Reader(uvarints(values), "test")
    assert [reader.uvarint() for _ in values] == values
    reader.done()


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 9 + b"\x01", b"\x80" * 12])
def test_a_cut_or_endless_number_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        Reader(data, "test").uvarint()


def test_limits_hold() -> None:
    with pytest.raises(FormatError, match="above the limit"):
        Reader(uvarints([11]), "test").uvarint(10)
    with pytest.raises(FormatError, match="truncated"):
        Reader(b"abc", "test").take(4)
    with pytest.raises(FormatError, match="too many"):
        Reader(b"abc", "test").done()
    with pytest.raises(ValueError, match="uvarint"):
        uvarints([-1])


def test_pack_names() -> None:
    name = PackName(42, bytes.fromhex("0123456789abcdef"))
    assert str(name) == "000042-0123456789abcdef.pack"
    assert PackName.parse(str(name)) == name
    for wrong in (
        "42-0123456789abcdef.pack",
        "000042-0123456789ABCDEF.pack",
        "000042-.pack",
        "../000042-0123456789abcdef.pack",
        "000042-0123456789abcdef.pack.x",
        "head.json",
        "99999999999-0123456789abcdef.pack",
        "０00042-0123456789abcdef.pack",
    ):
        with pytest.raises(FormatError):
            PackName.parse(wrong)
