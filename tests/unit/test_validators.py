"""Which validators stand for the very bytes of a file."""

from __future__ import annotations

import pytest

from tidings_client.answers import Validators, validators_of

DATE = "Sun, 22 Nov 2026 20:00:00 GMT"
NOW, SECONDS, HOURS = DATE, "Sun, 22 Nov 2026 19:59:55 GMT", "Sun, 22 Nov 2026 12:00:00 GMT"


@pytest.mark.parametrize(
    ("headers", "etag", "modified"),
    [
        ({}, None, None),
        ({"etag": '"a"'}, '"a"', None),
        ({"etag": '"a"', "last-modified": HOURS, "date": DATE}, '"a"', HOURS),
        ({"etag": '"a"', "last-modified": SECONDS, "date": DATE}, '"a"', None),
        # The web server made the ETag of this second, which is not over.
        ({"etag": '"a"', "last-modified": NOW, "date": DATE}, None, None),
        ({"last-modified": HOURS, "date": DATE}, None, HOURS),
        ({"last-modified": HOURS}, None, None),
        ({"etag": '"a"', "last-modified": "yesterday", "date": DATE}, '"a"', None),
        ({"last-modified": HOURS, "date": "Sun, 22 Nov 2026 20:00:00 -0000"}, None, None),
    ],
)
def test_validators(headers: dict[str, str], etag: str | None, modified: str | None) -> None:
    assert validators_of(headers) == Validators(etag, modified)
