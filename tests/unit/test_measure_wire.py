"""The wire of tidings-measure: what it counts, and how it reads along."""

from __future__ import annotations

import itertools
import socket
import threading
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings_measure import servers as measured
from tidings_measure.wire import Exchange, HttpReader, Wire

GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
RANGE = b"GET /b HTTP/1.1\r\nHost: x\r\nRange: bytes=0-1\r\n\r\n"
POST = b"POST /c HTTP/1.1\r\nContent-Length: 31\r\n\r\nGET /not-me HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = b"HEAD /d HTTP/1.1\r\n\r\n"
LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nCache-Control: max-age=60\r\n\r\nHTTP/"
PART = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 2\r\n\r\nxy"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"4;x=y\r\nabcd\r\nA\r\n0123456789\r\n0\r\nTrailer: 1\r\n\r\n"
)
NO_BODY = b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"
EARLY = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
SAME = b"HTTP/1.1 304 Not Modified\r\nContent-Length: 77\r\n\r\n"


def follow(up: bytes, down: bytes, cuts: list[int]) -> list[Exchange]:
    reader = HttpReader()
    found: list[Exchange] = []
    for data, way in ((up, True), (down, False)):
        bounds = [0, *sorted({cut % len(data) for cut in cuts}), len(data)]
        for start, end in itertools.pairwise(bounds):
            found += reader.feed(data[start:end], up=way)
    return found


@given(st.lists(st.integers(0, 100_000), max_size=40))
def test_messages_are_told_apart_however_they_arrive(cuts: list[int]) -> None:
    post = POST.replace(b": 31", b": %d" % len(POST.split(b"\r\n\r\n", 1)[1]))
    asked = [GET, RANGE, post, HEAD, GET]
    answered = [LENGTH, PART, CHUNKED, NO_BODY, EARLY + SAME]
    found = follow(b"".join(asked), b"".join(answered), cuts)
    assert [e.method for e in found] == ["GET", "GET", "POST", "HEAD", "GET"]
    assert [e.sent for e in found] == [len(request) for request in asked]
    assert [e.received for e in found] == [len(answer) for answer in answered]
    assert [e.status for e in found] == [200, 206, 200, 200, 304]
    assert [e.ranged for e in found] == [False, True, False, False, False]
    assert found[0].control == "max-age=60"


def test_an_answer_may_end_with_the_connection() -> None:
    answer = b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 1000
    (found,) = follow(GET, answer, [3, 17, 19, 500])
    assert found.received == len(answer)


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_garbage_does_not_stop_it(up: bytes, down: bytes) -> None:
    reader = HttpReader()
    reader.feed(up, up=True)
    reader.feed(down, up=False)
    reader.feed(GET, up=True)


def test_every_byte_is_counted(tmp_path: Path) -> None:
    """Against a server that says itself what it sent."""
    body = b"z" * 100_000
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + body
    seen = bytearray()

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            for _ in range(2):
                while b"\r\n\r\n" not in (got := connection.recv(65536)):
                    seen.extend(got)
                seen.extend(got)
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        with Wire(f"http://127.0.0.1:{listener.getsockname()[1]}") as wire:
            with httpx.Client(trust_env=False) as client:
                for _ in range(2):
                    assert client.get(f"{wire.url}/x").content == body
            thread.join(10)
            traffic = wire.traffic()
            assert traffic.received == 2 * len(answer)
            assert traffic.sent == len(seen)
            assert (len(traffic.exchanges), traffic.connections, traffic.parallel) == (2, 1, 1)
            wire.reset()
            assert wire.traffic().received == 0


def test_our_own_static_server_answers_many_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that stands in for nginx: zckdl and zsync ask for many ranges at once."""
    monkeypatch.setattr(measured, "find", lambda _: None)
    (tmp_path / "www").mkdir()
    data = bytes(range(256)) * 4
    (tmp_path / "www" / "file").write_bytes(data)
    (tmp_path / "secret").write_text("no")
    with (
        measured.static(tmp_path / "www", tmp_path) as url,
        httpx.Client(trust_env=False) as client,
    ):
        assert client.get(f"{url}/file").content == data
        one = client.get(f"{url}/file", headers={"Range": "bytes=10-19"})
        assert (one.status_code, one.content) == (206, data[10:20])
        assert one.headers["content-range"] == "bytes 10-19/1024"
        many = client.get(f"{url}/file", headers={"Range": "bytes=0-1,1000-1023"})
        assert many.status_code == 206
        mark = many.headers["content-type"].split("boundary=")[1].encode()
        parts = many.content.split(b"\r\n--" + mark)
        assert [part.split(b"\r\n\r\n", 1)[1] for part in parts[1:-1]] == [data[:2], data[1000:]]
        assert client.get(f"{url}/file", headers={"Range": "bytes=5000-"}).status_code == 416
        assert client.get(f"{url}/none").status_code == 404
        assert client.get(f"{url}/%2e%2e/secret").status_code == 404
        assert client.head(f"{url}/file").headers["content-length"] == "1024"
