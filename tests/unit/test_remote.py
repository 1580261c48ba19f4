"""The pure parts of the client's HTTP: URLs, redirects, batch requests, gzip in bounds."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings_chunkstore.errors import InputError, VerificationError
from tidings_client.answers import BATCH_BYTES, BATCH_RANGES, BATCH_REQUEST, Batch, decoded
from tidings_client.mirrors import Failed, Mirror, next_url, remember
from tidings_client.remote import Remote
from tidings_client.transport import proxy_for

BASE = "https://user:pass@host.example/a/b"


@pytest.mark.parametrize(
    "text",
    ["", "host", "/path", "file:///etc", "ftp://h/", "http://", "http:///x", "http://h/?q",
     "http://h/#f", "http://h:99999999/", "https://[::1/", "http://h\x00/", "\ud800"],
)  # fmt: skip
def test_what_is_no_base_url(text: str) -> None:
    with pytest.raises(InputError) as caught:
        Mirror(text, 0)
    assert caught.value.code == "bad-url"
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        Remote([])


def test_no_password_in_a_message() -> None:
    with pytest.raises(InputError) as caught:
        Mirror("https://user:s3cret@host/?q", 0)
    assert "s3cret" not in str(caught.value)
    assert str(Mirror(BASE, 0)) == "https://host.example/a/b/"


@pytest.mark.parametrize("base", ["http://h/a", "http://h/a/"])
def test_paths_are_quoted_once(base: str) -> None:
    mirror = Mirror(base, 0)
    assert mirror.url("x/y z").raw_path == b"/a/x/y%20z"
    assert mirror.url("100%25+?#").raw_path == b"/a/100%2525%2B%3F%23"
    assert Mirror("http://h/with%20space", 0).url("x").raw_path == b"/with%20space/x"


@pytest.mark.parametrize(
    ("location", "found"),
    [
        ("/c", "https://user:pass@host.example/c"),
        ("c", "https://user:pass@host.example/a/b/tidings/c"),
        ("https://host.example/c", "https://user:pass@host.example/c"),
        ("https://host.example:443/c", "https://user:pass@host.example/c"),
        ("https://host.example:444/c", "https://host.example:444/c"),
        ("https://other.example/c", "https://other.example/c"),
        ("https://evil:x@other.example/c", "https://other.example/c"),
        ("//other.example/c", "https://other.example/c"),
        ("http://host.example/c", None),
        ("http://other.example/c", None),
        ("file:///etc/passwd", None),
        ("https://host.example:99999/", None),
    ],
)
def test_where_redirects_may_lead(location: str, found: str | None) -> None:
    mirror = Mirror(BASE, 0)
    url = mirror.url("tidings/head.json")
    if found is None:
        with pytest.raises(Failed) as caught:
            next_url(mirror.base, url, location, mirror)
        assert caught.value.error.code == "redirect"
        assert not caught.value.again
    else:
        assert next_url(mirror.base, url, location, mirror) == httpx.URL(found)


def test_http_may_become_https() -> None:
    mirror = Mirror("http://host/", 0)
    assert next_url(mirror.base, mirror.url("x"), "https://host/x", mirror).scheme == "https"


def test_only_a_whole_move_is_remembered() -> None:
    mirror = Mirror("http://host/repo/", 0)
    remember(mirror, httpx.URL("http://cdn/objects/4711"), "tidings/head.json")
    assert mirror.url("x") == httpx.URL("http://host/repo/x")
    remember(mirror, httpx.URL("http://near/pub/repo/tidings/head.json"), "tidings/head.json")
    assert mirror.url("x") == httpx.URL("http://near/pub/repo/x")


@pytest.mark.parametrize(
    ("environ", "url", "proxy"),
    [
        ({}, "http://h/", None),
        ({"http_proxy": "http://p:1"}, "http://h/", "http://p:1"),
        ({"http_proxy": "p:1"}, "http://h/", "http://p:1"),
        ({"http_proxy": "http://p:1"}, "https://h/", None),
        ({"https_proxy": "http://p:1"}, "https://h/", "http://p:1"),
        ({"all_proxy": "socks5://p:1"}, "https://h/", "socks5://p:1"),
        ({"http_proxy": "http://p:1", "no_proxy": "h"}, "http://h/", None),
        ({"http_proxy": "http://p:1", "no_proxy": ".org"}, "http://a.org/", None),
        ({"http_proxy": "http://p:1", "no_proxy": "*"}, "http://h/", None),
    ],
)
def test_proxies(
    environ: dict[str, str], url: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert proxy_for(httpx.URL(url)) == proxy


# -- batches --------------------------------------------------------------------------------------

WANTED = st.lists(
    st.tuples(
        st.sampled_from(["000001-0123456789abcdef.pack", "000002-0123456789abcdef.pack"]),
        st.integers(0, 200),
        st.integers(0, 60),
    ),
    min_size=1,
    max_size=60,
)


@given(WANTED)
def test_a_batch_asks_for_exactly_what_is_wanted(wanted: list[tuple[str, int, int]]) -> None:
    body, count, total = Batch(wanted).request()
    assert count == len(wanted)
    assert total == sum(length for _, _, length in wanted)
    asked = [
        (name, numbers[i] + at)
        for name, numbers in json.loads(body)["frames"]
        for i in range(0, len(numbers), 2)
        for at in range(numbers[i + 1])
    ]
    assert asked == [(name, offset + at) for name, offset, size in wanted for at in range(size)]


@pytest.mark.parametrize(
    "wanted",
    [
        [("x" * 28, i * 20, 10) for i in range(3 * BATCH_RANGES)],
        [("x" * 28, 10**9 * i, 10**7) for i in range(30)],
        [(f"{i % 2:028d}", 10**9 * i, 1) for i in range(60_000)],
        [("x", 0, BATCH_BYTES + 1), ("x", 0, 1)],
    ],
)
def test_batches_keep_to_the_limits(wanted: list[tuple[str, int, int]]) -> None:
    batch = Batch(wanted)
    while batch.next < len(wanted):
        body, count, total = batch.request()
        ranges = sum(len(numbers) // 2 for _, numbers in json.loads(body)["frames"])
        assert count > 0
        assert ranges <= BATCH_RANGES
        assert len(body) <= BATCH_REQUEST
        assert total <= BATCH_BYTES or count == 1
        batch.next += count


# -- gzip -----------------------------------------------------------------------------------------


def answer(data: bytes, encoding: str, step: int) -> httpx.Response:
    def pieces() -> Iterator[bytes]:
        for start in range(0, len(data), step):
            yield data[start : start + step]

    return httpx.Response(200, headers={"Content-Encoding": encoding}, content=pieces())


@given(st.binary(max_size=3000), st.integers(1, 5), st.integers(1, 500), st.booleans())
def test_gzip_is_taken_off(data: bytes, times: int, step: int, packed: bool) -> None:
    plain = data * times * 40
    sent = gzip.compress(plain, 6) if packed else plain
    got = decoded(
        answer(sent, "gzip" if packed else "identity", step), len(plain), Mirror(BASE, 0), "x"
    )
    assert b"".join(got) == plain


@given(st.integers(0, 300_000), st.integers(0, 300_000))
def test_gzip_is_bounded(size: int, limit: int) -> None:
    pieces = decoded(answer(gzip.compress(bytes(size)), "gzip", 50), limit, Mirror(BASE, 0), "x")
    got = 0
    try:
        for piece in pieces:
            got += len(piece)
    except Failed as failed:
        assert failed.error.code == "too-large"
        assert size > limit or len(gzip.compress(bytes(size))) > limit
    else:
        assert got == size <= limit
    assert got <= limit


def test_gzip_that_is_none() -> None:
    for data, kind in (
        (b"no gzip at all", VerificationError),
        (zlib.compress(b"x"), VerificationError),
    ):
        with pytest.raises(kind):
            list(decoded(answer(data, "gzip", 100), 100, Mirror(BASE, 0), "x"))
    for encoding in ("br", "deflate", "gzip, gzip"):
        with pytest.raises(Failed):
            list(decoded(answer(b"x", encoding, 100), 100, Mirror(BASE, 0), "x"))
