"""Ranges and conditions by RFC 9110's own rules."""

from __future__ import annotations

import pytest

from tidings_server.ranges import Validators, http_date, not_modified, parse, range_holds

NOW = Validators(b'"abc"', 1_700_000_000)


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (b"bytes=0-0", [(0, 1)]),
        (b"bytes=0-99", [(0, 100)]),
        (b"bytes=10-", [(10, 90)]),
        (b"bytes=-10", [(90, 10)]),
        (b"bytes=-1000", [(0, 100)]),
        (b"bytes=90-1000", [(90, 10)]),
        (b"Bytes = 1-2, 4-5 ,-1", [(1, 2), (4, 2), (99, 1)]),
        (b"bytes=100-", []),
        (b"bytes=100-200,300-", []),
        (b"bytes=0-1,100-", [(0, 2)]),
        (b"bytes=-0", []),
        (b"bytes=5-4", None),
        (b"bytes=", None),
        (b"bytes=a-b", None),
        (b"bytes=1-2,", None),
        (b"lines=1-2", None),
        (b"bytes=0-99,0-99", None),  # more than there is
        (b"bytes=" + b"9" * 30 + b"-", None),
        (b"bytes=" + b",".join(b"%d-%d" % (i, i) for i in range(6)), None),
    ],
)
def test_ranges(header: bytes, found: list[tuple[int, int]] | None) -> None:
    assert parse(header, 100, most=5) == found


def test_a_range_of_nothing_cannot_be_satisfied() -> None:
    assert parse(b"bytes=0-", 0) == []


@pytest.mark.parametrize(
    ("tag", "date", "same"),
    [
        (b'"abc"', None, True),
        (b'W/"abc"', None, True),
        (b'"x", "abc"', None, True),
        (b"*", None, True),
        (b'"x"', None, False),
        (b'"x"', http_date(NOW.modified), False),  # the tag goes before the date
        (None, http_date(NOW.modified), True),
        (None, http_date(NOW.modified - 1), False),
        (None, b"tomorrow, perhaps", False),
        (None, b"Tue, 99 Nov 2023 22:13:20 GMT", False),
        (None, None, False),
    ],
)
def test_not_modified(tag: bytes | None, date: bytes | None, same: bool) -> None:
    assert not_modified(NOW, tag, date) is same


@pytest.mark.parametrize(
    ("if_range", "holds"),
    [
        (None, True),
        (b'"abc"', True),
        (b'W/"abc"', False),
        (b'"x"', False),
        (http_date(NOW.modified), True),
        (http_date(NOW.modified + 1), False),
        (b"garbage", False),
    ],
)
def test_if_range(if_range: bytes | None, holds: bool) -> None:
    assert range_holds(NOW, if_range) is holds
