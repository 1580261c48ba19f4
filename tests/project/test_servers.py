"""The tests' own servers do what they say: or every test on top of them would prove nothing."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest

from support.servers import Fault, Misbehaving, Servers, Wire

BODY = bytes(range(256)) * 400
IDENTITY = {"Accept-Encoding": "identity"}


@pytest.fixture
def www(tmp_path: Path) -> Path:
    root = tmp_path / "www"
    root.mkdir(exist_ok=True)
    (root / "file.bin").write_bytes(BODY)
    (root / "text.xml").write_bytes(b"<a>hello</a>\n" * 2000)
    return root


def test_nginx_serves_ranges_and_logs_bytes(www: Path, servers: Servers) -> None:
    site = servers.nginx(www)
    got = httpx.get(f"{site.url}/file.bin", headers={"Range": "bytes=100-299"})
    assert (got.status_code, got.content) == (206, BODY[100:300])
    site.stop()
    (request,) = site.requests()
    assert (request.uri, request.status, request.range) == ("/file.bin", 206, "bytes=100-299")
    assert request.sent > 200
    assert request.received > 50


def test_nginx_with_gzip_compresses_everything(www: Path, servers: Servers) -> None:
    site = servers.nginx(www, gzip=True)
    packed = httpx.get(f"{site.url}/file.bin", headers={"Accept-Encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.content == BODY
    # The trap that clients of ranges must know: with gzip on, a range is answered by everything.
    ranged = {"Range": "bytes=100-299"}
    trap = httpx.get(f"{site.url}/text.xml", headers={**ranged, "Accept-Encoding": "gzip"})
    assert trap.status_code == 200
    right = httpx.get(f"{site.url}/text.xml", headers={**ranged, **IDENTITY})
    assert (right.status_code, len(right.content)) == (206, 200)


def test_caching_proxy_answers_from_its_cache(www: Path, servers: Servers) -> None:
    origin = servers.nginx(www)
    proxy = servers.caching_proxy(origin.url)
    first = httpx.get(f"{proxy.url}/file.bin", headers=IDENTITY)
    origin.stop()
    again = httpx.get(f"{proxy.url}/file.bin", headers={**IDENTITY, "Range": "bytes=5-9"})
    assert first.content == BODY
    assert (again.status_code, again.content) == (206, BODY[5:10])
    assert (first.headers["x-cache"], again.headers["x-cache"]) == ("MISS", "HIT")


def test_static_tree_in_front_passes_the_rest_on(www: Path, servers: Servers) -> None:
    behind = servers.misbehaving(www)
    behind.answer(lambda seen: (200, b"api") if seen.path == "/api" else None)
    front = servers.in_front(www, behind.url)
    assert httpx.get(f"{front.url}/file.bin").content == BODY
    assert behind.seen == []
    assert httpx.get(f"{front.url}/api").content == b"api"


def test_wire_counts_what_passes(www: Path, servers: Servers) -> None:
    site = servers.nginx(www)
    wire = servers.wire(site.url)
    with httpx.Client() as client:
        for _ in range(3):
            assert client.get(f"{wire.url}/file.bin", headers=IDENTITY).content == BODY
    site.stop()
    logged = site.requests()
    assert (wire.requests, wire.connections) == (3, 1)
    assert wire.received == sum(request.sent for request in logged)
    assert wire.sent == sum(request.received for request in logged)
    wire.reset()
    assert (wire.sent, wire.received, wire.requests) == (0, 0, 0)


def test_wire_to_nobody_ends_the_connection(misbehaving: Misbehaving) -> None:
    wire = Wire(misbehaving.url)
    misbehaving.close()
    with wire, pytest.raises(httpx.TransportError):
        httpx.get(wire.url)


def test_a_well_behaved_path(www: Path, misbehaving: Misbehaving) -> None:
    url = f"{misbehaving.url}/file.bin"
    whole = httpx.get(url, headers=IDENTITY)
    assert whole.content == BODY
    same = httpx.get(url, headers={"If-None-Match": whole.headers["etag"]})
    assert same.status_code == 304
    assert httpx.head(url).headers["content-length"] == str(len(BODY))
    part = httpx.get(url, headers={"Range": "bytes=102390-"})
    assert (part.status_code, part.content) == (206, BODY[102390:])
    assert httpx.get(url, headers={"Range": "bytes=102400-"}).status_code == 416
    assert httpx.get(f"{misbehaving.url}/../conftest.py").status_code == 404
    assert [seen.method for seen in misbehaving.seen] == ["GET", "GET", "HEAD", "GET", "GET", "GET"]
    assert misbehaving.seen[3].headers["range"] == "bytes=102390-"


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(reset_at=1000), httpx.ReadError),
        (Fault(truncate_at=1000), httpx.RemoteProtocolError),
        (Fault(stall_at=1000), httpx.ReadTimeout),
        (Fault(length=len(BODY) + 5), httpx.RemoteProtocolError),
    ],
)
def test_broken_answers(
    www: Path, misbehaving: Misbehaving, fault: Fault, error: type[Exception]
) -> None:
    misbehaving.fault(r"\.bin$", fault)
    with pytest.raises(error):
        httpx.get(f"{misbehaving.url}/file.bin", timeout=0.5)
    assert httpx.get(f"{misbehaving.url}/text.xml").status_code == 200


def test_lies(www: Path, misbehaving: Misbehaving) -> None:
    url = f"{misbehaving.url}/file.bin"
    ranged = {"Range": "bytes=100-199"}
    misbehaving.fault("", ignore_range=True, times=1)
    misbehaving.fault("", wrong_range=7, times=1)
    misbehaving.fault("", flip_at=150, times=1)
    misbehaving.fault("", status=404, ranged=True, times=1)
    misbehaving.fault("", no_length=True, extra=b"more", times=1)
    assert httpx.get(url, headers=ranged).content == BODY
    shifted = httpx.get(url, headers=ranged)
    assert (shifted.status_code, shifted.content) == (206, BODY[107:207])
    flipped = httpx.get(url, headers=ranged).content
    assert [a ^ b for a, b in zip(flipped, BODY[100:200], strict=True) if a != b] == [0x10]
    assert httpx.get(url, headers=ranged).status_code == 404
    assert httpx.get(url).content == BODY + b"more"
    assert httpx.get(url).content == BODY


def test_heal_and_drip(www: Path, misbehaving: Misbehaving) -> None:
    misbehaving.fault("", drip=0.05, drip_size=40_000)
    got = httpx.get(f"{misbehaving.url}/file.bin")
    assert got.content == BODY
    assert got.elapsed.total_seconds() >= 0.1
    misbehaving.fault("", status=500)
    misbehaving.heal()
    assert httpx.get(f"{misbehaving.url}/file.bin").content == BODY
    assert len(misbehaving.seen) == 1


def test_closing_ends_a_stalled_answer(www: Path) -> None:
    server = Misbehaving(www)
    server.fault("", stall_at=10)
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(b"GET /file.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        data = b""
        while b"\r\n\r\n" not in data or len(data.split(b"\r\n\r\n", 1)[1]) < 10:
            data += client.recv(4096)
        server.close()
        assert client.recv(4096) == b""
