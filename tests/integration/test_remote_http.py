"""The client's HTTP over real servers: nginx that compresses everything, and one that lies."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.servers import Misbehaving, Seen, Servers, free_port
from support.system import require
from tidings_chunkstore.errors import NetworkError, TidingsError, VerificationError
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.places import PackName
from tidings_client.guard import Guard
from tidings_client.remote import Remote, RemoteSettings

PACK = "000001-0123456789abcdef.pack"
BLOB = random.Random(1).randbytes(600_000)
HEAD = json.dumps({"some": ["head"] * 300}).encode()
QUICK = RemoteSettings(backoff=0.01, read_timeout=0.4, total_timeout=5.0, patience=3.0)


def fill(root: Path) -> Path:
    (root / "tidings").mkdir(parents=True, exist_ok=True)
    (root / "tidings" / "head.json").write_bytes(HEAD)
    (root / "tidings" / PACK).write_bytes(BLOB)
    (root / "repodata").mkdir(exist_ok=True)
    (root / "repodata" / "primary.xml").write_bytes(BLOB)
    return root


@pytest.fixture
def www(misbehaving: Misbehaving) -> Misbehaving:
    """A server that can lie, over a small repository."""
    fill(misbehaving.root)
    return misbehaving


def right(i: int, data: bytes, wanted: tuple[str, int, int]) -> None:
    if data != BLOB[wanted[1] : wanted[1] + wanted[2]]:
        raise VerificationError("other bytes than promised")


def fetch(remote: Remote, offset: int = 1000, length: int = 5000) -> bytes:
    want = (PACK, offset, length)
    [(i, data)] = remote.ranges([want], check=lambda i, data: right(i, data, want))
    assert i == 0
    return data


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(TidingsError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return caught.value.code


# -- a plain, honest server -----------------------------------------------------------------------


def test_nginx_that_compresses_everything_costs_what_we_say(
    tmp_path: Path, servers: Servers
) -> None:
    site = servers.nginx(fill(tmp_path / "root"), gzip=True)
    wire = servers.wire(site.url)
    wanted = [(PACK, 7000 * i, 900 + i) for i in range(65)]
    with Remote([wire.url]) as remote:
        answer = remote.head()
        assert answer.data == HEAD
        again = remote.head(answer.etag, HEAD)
        assert again.data is None
        got = dict(remote.ranges(wanted))
        pieces: list[bytes] = []
        remote.file("repodata/primary.xml", pieces.append, limit=LIMITS.published, size=len(BLOB))
        assert (remote.bytes_received, remote.bytes_sent) == (wire.received, wire.sent)
        assert remote.requests == wire.requests == 68
    assert wire.connections <= 4
    assert got == {i: BLOB[o : o + n] for i, (_, o, n) in enumerate(wanted)}
    assert b"".join(pieces) == BLOB
    log = site.requests()
    assert [r.status for r in log] == [200, 304, *[206] * 65, 200]
    assert log[0].encoding == "gzip", "the head may be compressed"
    assert log[0].sent < len(HEAD) / 2
    assert {r.encoding for r in log[1:]} == {""}, "objects and files never"
    assert sum(r.sent for r in log) == wire.received
    # Headers, not the range: what 65 requests cost beyond their bytes.
    assert max(r.received for r in log) < 220


def test_only_needed_headers_are_sent(www: Misbehaving) -> None:
    with Remote([www.url]) as remote:
        fetch(remote)
        remote.head('"x"')
    pack, head = www.seen
    assert pack.headers.keys() == {"host", "user-agent", "accept-encoding", "range"}
    assert pack.headers["accept-encoding"] == "identity"
    assert head.headers.keys() == {
        "host", "user-agent", "accept-encoding", "cache-control", "if-none-match",
    }  # fmt: skip
    assert head.headers["cache-control"] == "no-cache"


def test_same_bytes_without_an_etag_are_no_news(www: Misbehaving) -> None:
    with Remote([www.url]) as remote:
        assert remote.head(None, HEAD).data is None
        assert remote.head(None, HEAD[:-1]).data == HEAD


def test_absence_is_told_apart(www: Misbehaving, tmp_path: Path) -> None:
    (www.root / "tidings" / "head.json").unlink()
    with Remote([www.url], QUICK) as remote:
        assert code_of(remote.head) == "no-tidings"
        assert code_of(lambda: list(remote.ranges([("absent.pack", 0, 9)]))) == "missing"
        assert code_of(lambda: list(remote.ranges([(PACK, len(BLOB), 9)]))) == "missing"
        assert code_of(lambda: list(remote.frames([(PACK, 0, 9)]))) == "missing"
        assert code_of(lambda: remote.file("gone", len, limit=9)) == "missing"
    assert len(www.seen) == 5, "absence is final: no second try"


def test_nobody_there(www: Misbehaving) -> None:
    dead = f"http://127.0.0.1:{free_port()}/"
    with Remote([dead], QUICK) as remote:
        assert code_of(remote.head) == "connect"
        assert remote.requests == QUICK.tries
    with Remote([dead, www.url], QUICK) as remote:
        assert remote.head().data == HEAD
        tried = remote.requests
        for offset in range(0, 5000, 1000):
            fetch(remote, offset)
        assert remote.requests == tried + 5, "the dead mirror is not asked first any more"


# -- faults ---------------------------------------------------------------------------------------

FAULTS: dict[str, dict[str, Any]] = {
    "reset": {"reset_at": 700},
    "reset before a byte": {"reset_at": 0},
    "truncated": {"truncate_at": 700},
    "truncated without a length": {"truncate_at": 700, "no_length": True},
    "stalled": {"stall_at": 700},
    "length too large": {"length": 9999},
    "flipped": {"flip_at": 1500},
    "another range": {"wrong_range": 5},
    "500": {"status": 500},
    "502": {"status": 502},
    "503": {"status": 503, "headers": (("Retry-After", "0"),)},
    "429": {"status": 429, "headers": (("Retry-After", "0"),)},
    "encoded": {"headers": (("Content-Encoding", "br"),)},
    "other Content-Range": {"ignore_range": False, "headers": (("X", "y"),), "flip_at": 1001},
}


@pytest.mark.parametrize("fault", [f for f in FAULTS if f != "encoded"])
def test_a_fault_that_passes_is_healed_by_the_same_mirror(www: Misbehaving, fault: str) -> None:
    www.fault(r"\.pack$", **FAULTS[fault], times=1)
    with Remote([www.url], QUICK) as remote:
        assert fetch(remote) == BLOB[1000:6000]
    assert len(www.seen) == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_left_to_the_next_mirror(
    www: Misbehaving, servers: Servers, fault: str
) -> None:
    other = servers.misbehaving(www.root)
    www.fault(r"\.pack$", **FAULTS[fault])
    with Remote([www.url, other.url], QUICK) as remote:
        assert fetch(remote) == BLOB[1000:6000]
        many = [(PACK, i * 9000, 700) for i in range(20)]
        got = dict(remote.ranges(many, check=lambda i, data: right(i, data, many[i])))
        assert len(got) == 20
    assert other.seen


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_everywhere_is_one_clear_error(www: Misbehaving, fault: str) -> None:
    www.fault("", **FAULTS[fault])
    started = time.monotonic()
    with Remote([www.url], QUICK) as remote:
        code = code_of(lambda: fetch(remote))
        assert remote.requests <= 4
    assert code in {
        "connection", "truncated", "timeout", "verification", "status", "busy", "no-ranges",
    }  # fmt: skip
    assert time.monotonic() - started < 6


def test_wrong_bytes_are_asked_for_past_the_caches(www: Misbehaving) -> None:
    www.fault(r"\.pack$", flip_at=1500, times=1)
    with Remote([www.url], QUICK) as remote:
        fetch(remote)
    assert [seen.headers.get("cache-control") for seen in www.seen] == [None, "no-cache"]


def test_an_error_of_one_range_ends_the_rest_at_once(www: Misbehaving) -> None:
    many = [(PACK if i != 7 else "absent.pack", i * 9000, 700) for i in range(60)]
    with Remote([www.url], QUICK) as remote:
        assert code_of(lambda: list(remote.ranges(many))) == "missing"
    time.sleep(0.1)
    assert len(www.seen) < 30


def test_ranges_left_unread_stop(www: Misbehaving) -> None:
    many = [(PACK, i * 9000, 700) for i in range(60)]
    with Remote([www.url], QUICK) as remote:
        results = remote.ranges(many)
        next(results)
        results.close()  # type: ignore[attr-defined]
        time.sleep(0.2)
        assert len(www.seen) < 25, "a few in flight and a few in the queue, then no more"


def test_a_whole_object_for_a_range(www: Misbehaving, servers: Servers) -> None:
    large = random.Random(2).randbytes(8_000_000)
    (www.root / "tidings" / "large.pack").write_bytes(large)
    www.fault(r"\.pack$", ignore_range=True)
    with Remote([www.url], QUICK) as remote:
        # Near the front: what was asked for is taken out of it, the rest is cut off.
        [(_, data)] = remote.ranges([("large.pack", 200_000, 5000)])
        assert data == large[200_000:205_000]
        [(_, data)] = remote.ranges([("large.pack", 0, 5000)])
        assert data == large[:5000]
        assert remote.bytes_received < 1_000_000
        # Far in: not worth it.
        before = remote.bytes_received
        assert code_of(lambda: list(remote.ranges([("large.pack", 4_000_000, 50)]))) == "no-ranges"
        assert remote.bytes_received - before < 500_000
        asked = len(www.seen)
        assert code_of(lambda: list(remote.ranges([("large.pack", 5_000_000, 50)]))) == "no-ranges"
        assert len(www.seen) == asked, "once is enough to know"
    other = servers.misbehaving(www.root)
    with Remote([www.url, other.url], QUICK) as remote:
        [(_, data)] = remote.ranges([("large.pack", 4_000_000, 50)])
        assert data == large[4_000_000:4_000_050]


def test_one_byte_a_moment_ends_at_the_total_timeout(www: Misbehaving) -> None:
    www.fault(r"\.pack$", drip=0.05)
    settings = RemoteSettings(read_timeout=5, total_timeout=0.6, slowest=1_000_000, backoff=0.01)
    started = time.monotonic()
    with Remote([www.url], settings) as remote:
        assert code_of(lambda: fetch(remote)) == "timeout"
    assert time.monotonic() - started < 2.5


def test_close_wakes_a_thread_that_waits(www: Misbehaving) -> None:
    www.fault(r"\.pack$", stall_at=100)
    remote = Remote([www.url], RemoteSettings(read_timeout=60))
    codes: list[str] = []
    thread = threading.Thread(target=lambda: codes.append(code_of(lambda: fetch(remote))))
    thread.start()
    time.sleep(0.3)
    started = time.monotonic()
    remote.close()
    thread.join(5)
    assert codes == ["closed"]
    assert time.monotonic() - started < 2


# -- the head -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_a_head_without_end_is_bounded(www: Misbehaving, packed: bool) -> None:
    body = b" " * (64 << 20) if packed else b" " * (LIMITS.head + 1)
    headers = (("Content-Encoding", "gzip"),) if packed else ()
    www.fault("head", body=gzip.compress(body, 1) if packed else body, headers=headers)
    with Remote([www.url], QUICK) as remote:
        assert code_of(remote.head) == "too-large"
        assert remote.bytes_received < 2 * LIMITS.head


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"body": gzip.compress(HEAD)[:-9]}, "truncated"),
        ({"body": b"\x1f\x8b" + HEAD}, "verification"),
        ({"body": gzip.compress(HEAD), "truncate_at": 20}, "connection"),
    ],
)
def test_a_broken_head(www: Misbehaving, fault: dict[str, Any], code: str) -> None:
    www.fault("head", **fault, headers=(("Content-Encoding", "gzip"),))
    with Remote([www.url], QUICK) as remote:
        assert code_of(remote.head) == code
    www.heal()
    www.fault("head", **fault, headers=(("Content-Encoding", "gzip"),), times=1)
    with Remote([www.url], QUICK) as remote:
        assert remote.head().data == HEAD


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["reset", "truncated", "stalled", "500", "flipped"])
def test_a_file_begins_anew(www: Misbehaving, fault: str) -> None:
    # Twice wrong, and a mirror is not asked a third time.
    www.fault("primary", **FAULTS[fault], times=1 if fault == "flipped" else 2)
    pieces: list[bytes] = []

    def check() -> None:
        if b"".join(pieces) != BLOB:
            raise VerificationError("other bytes")

    with Remote([www.url], QUICK) as remote:
        path = "repodata/primary.xml"
        remote.file(path, pieces.append, limit=1 << 20, reset=pieces.clear, check=check)
    assert b"".join(pieces) == BLOB


def test_a_file_that_is_wrong_everywhere(www: Misbehaving) -> None:
    def check() -> None:
        raise VerificationError("not what was promised", code="wrong")

    with Remote([www.url], QUICK) as remote:
        path = "repodata/primary.xml"
        assert code_of(lambda: remote.file(path, len, limit=1 << 20, check=check)) == "wrong"
        assert remote.requests == 1, "what the sink has got cannot be taken back"
        code = code_of(
            lambda: remote.file(path, len, limit=1 << 20, check=check, reset=lambda: None)
        )
        assert (code, remote.requests) == ("wrong", 3)


def test_a_file_without_reset_is_not_fed_twice(www: Misbehaving) -> None:
    www.fault("primary", reset_at=70_000, times=1)
    pieces: list[bytes] = []
    with Remote([www.url], QUICK) as remote:
        code = code_of(lambda: remote.file("repodata/primary.xml", pieces.append, limit=1 << 20))
    assert code == "connection"
    assert BLOB.startswith(b"".join(pieces))


@pytest.mark.parametrize("no_length", [False, True])
def test_a_file_is_bounded(www: Misbehaving, no_length: bool) -> None:
    www.fault("primary", no_length=no_length)
    pieces: list[bytes] = []
    with Remote([www.url], QUICK) as remote:
        code = code_of(
            lambda: remote.file(
                "repodata/primary.xml", pieces.append, limit=100_000, reset=pieces.clear
            )
        )
        assert code == "too-large"
        assert remote.bytes_received < 250_000
    assert len(b"".join(pieces)) <= 100_000


def test_a_file_of_another_size_comes_from_the_next_mirror(
    www: Misbehaving, servers: Servers, tmp_path: Path
) -> None:
    other = servers.misbehaving(fill(tmp_path / "other"))
    (www.root / "repodata" / "primary.xml").write_bytes(BLOB[:-1])
    pieces: list[bytes] = []
    with Remote([www.url, other.url], QUICK) as remote:
        remote.file(
            "repodata/primary.xml",
            pieces.append,
            limit=1 << 20,
            size=len(BLOB),
            reset=pieces.clear,
        )
    assert b"".join(pieces) == BLOB


@pytest.mark.parametrize("name", ["a b+c", "100%25", "ü?#&", "~x:y@z"])
def test_names_are_literal(www: Misbehaving, name: str) -> None:
    (www.root / "repodata" / name).write_bytes(b"right")
    pieces: list[bytes] = []
    with Remote([www.url + "/"], QUICK) as remote:
        remote.file(f"repodata/{name}", pieces.append, limit=10)
    assert pieces == [b"right"]


def test_an_encoding_nobody_asked_for(www: Misbehaving) -> None:
    packed = gzip.compress(b"content" * 99)
    encoded = (("Content-Encoding", "gzip"),)
    www.fault(r"\.xml$", body=packed, headers=encoded)
    www.fault(r"\.xml\.gz$", body=packed, headers=encoded)  # as Apache does with AddEncoding
    plain: list[bytes] = []
    raw: list[bytes] = []
    with Remote([www.url], QUICK) as remote:
        remote.file("repodata/x.xml", plain.append, limit=1000)
        remote.file("repodata/x.xml.gz", raw.append, limit=1000)
    assert (b"".join(plain), b"".join(raw)) == (b"content" * 99, packed)


# -- batches and bundles --------------------------------------------------------------------------


def answer_frames(seen: Seen) -> tuple[int, bytes] | None:
    if seen.method != "POST":
        return None
    request = json.loads(seen.body)
    assert request["v"] == 1
    spans = [
        (numbers[i], numbers[i + 1])
        for _, numbers in request["frames"]
        for i in range(0, len(numbers), 2)
    ]
    return 200, b"".join(BLOB[offset : offset + length] for offset, length in spans)


def test_frames_come_in_one_request(www: Misbehaving) -> None:
    www.answer(answer_frames)
    wanted = [(PACK, i * 7000, 100 + i) for i in range(60)]
    wanted += [(PACK, 500_000, 10), (PACK, 500_010, 20), (PACK, 500_030, 5)]
    with Remote([www.url], QUICK) as remote:
        assert list(remote.frames(wanted)) == [BLOB[o : o + n] for _, o, n in wanted]
        assert remote.requests == 1
    [(name, numbers)] = json.loads(www.seen[0].body)["frames"]
    assert name == PACK
    assert numbers[-2:] == [500_000, 35], "neighbours are one range"


@pytest.mark.parametrize(
    "fault", [{"reset_at": 3000}, {"truncate_at": 3000}, {"stall_at": 3000}, {"status": 503}]
)
def test_a_batch_that_breaks_goes_on_where_it_was(www: Misbehaving, fault: dict[str, Any]) -> None:
    www.answer(answer_frames)
    www.fault("frames", **fault, times=1)
    wanted = [(PACK, i * 7000, 200) for i in range(60)]
    with Remote([www.url], QUICK) as remote:
        assert list(remote.frames(wanted)) == [BLOB[o : o + n] for _, o, n in wanted]
        assert remote.requests == 2
        # The deadline of a stream must not outlive it.
        time.sleep(0.01)
        assert remote.head().data == HEAD


def test_a_batch_over_the_limits_is_split(www: Misbehaving) -> None:
    www.answer(answer_frames)
    wanted = [(PACK, (i * 5) % 590_000, 3) for i in range(70_000)]
    with Remote([www.url], QUICK) as remote:
        got = list(remote.frames(wanted))
        assert remote.requests >= 2
    assert got == [BLOB[o : o + n] for _, o, n in wanted]
    assert all(len(seen.body) <= 1 << 20 for seen in www.seen)


def test_frames_are_asked_of_the_mirror_that_gave_the_head(
    www: Misbehaving, servers: Servers, tmp_path: Path
) -> None:
    plain = servers.misbehaving(tmp_path / "empty")
    www.answer(answer_frames)
    with Remote([plain.url, www.url], QUICK) as remote:
        remote.head()
        assert list(remote.frames([(PACK, 5, 5)])) == [BLOB[5:10]]
    assert [seen.method for seen in plain.seen] == ["GET"]


START, TARGET = PackName(1, bytes(8)), PackName(9, b"\xaa" * 8)


def test_a_bundle_is_waited_for(www: Misbehaving) -> None:
    made = iter([(503, b"busy"), (503, b"busy"), (200, b"bundle")])
    www.answer(lambda seen: next(made) if "/delta/" in seen.path else None)
    with Remote([www.url], QUICK) as remote:
        assert remote.bundle(START, TARGET, ["primary", "b,c"]) == b"bundle"
    assert www.seen[0].path == (
        "/tidings/delta/000001-0000000000000000/000009-aaaaaaaaaaaaaaaa?tracks=b%2Cc,primary"
    )


def test_a_bundle_that_is_never_ready(www: Misbehaving) -> None:
    www.fault("delta", status=503, headers=(("Retry-After", "600"),))
    started = time.monotonic()
    with Remote([www.url], QUICK) as remote:
        assert code_of(lambda: remote.bundle(START, TARGET)) == "busy"
    assert time.monotonic() - started < 1, "no use in waiting that long"
    assert www.seen[0].path.endswith("-aaaaaaaaaaaaaaaa"), "all tracks: no query"


# -- redirects, credentials, proxies --------------------------------------------------------------


def test_redirects_are_followed_and_remembered(www: Misbehaving, servers: Servers) -> None:
    door = servers.misbehaving(www.root)
    door.fault("", status=302, headers=(("Location", f"{www.url}/tidings/head.json"),))
    with Remote([door.url], QUICK) as remote:
        assert remote.head().data == HEAD
        fetch(remote)
        assert remote.requests == 3
    assert len(door.seen) == 1, "what the head led to is where the rest is asked for"


def test_redirects_end(www: Misbehaving) -> None:
    www.fault("", status=302, headers=(("Location", "/again"),))
    with Remote([www.url], QUICK) as remote:
        assert code_of(remote.head) == "redirect"
        assert remote.requests == 6
    www.heal()
    www.fault("", status=302, headers=(("Location", "ftp://example.org/"),))
    with Remote([www.url], QUICK) as remote:
        assert code_of(remote.head) == "redirect"


def test_credentials_stay_with_their_host(www: Misbehaving, servers: Servers) -> None:
    other = servers.misbehaving(www.root)
    www.fault("primary", status=302, headers=(("Location", f"{other.url}/repodata/primary.xml"),))
    url = www.url.replace("http://", "http://user:s3cret@")
    with Remote([url], QUICK) as remote:
        fetch(remote)
        remote.file("repodata/primary.xml", len, limit=1 << 20)
        code = code_of(lambda: remote.file("gone", len, limit=9))
        with pytest.raises(NetworkError) as caught:
            remote.file("gone", len, limit=9)
    assert code == "missing"
    assert "s3cret" not in str(caught.value)
    assert all("authorization" in seen.headers for seen in www.seen)
    assert ["authorization" in seen.headers for seen in other.seen] == [False]


def test_proxies_come_from_the_environment(
    www: Misbehaving, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = servers.misbehaving(www.root)
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with Remote(["http://mirror.invalid/"], QUICK) as remote:
        assert remote.head().data == HEAD
    assert [seen.path for seen in proxy.seen] == ["http://mirror.invalid/tidings/head.json"]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Remote([www.url], QUICK) as remote:
        assert remote.head().data == HEAD
    assert len(proxy.seen) == 1


# -- TLS ------------------------------------------------------------------------------------------


def test_tls(
    www: Misbehaving, servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = [require("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-keyout", str(key), "-out", str(certificate), "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    port = free_port()
    site = servers.nginx(
        www.root,
        extra=f"listen 127.0.0.1:{port} ssl; ssl_certificate {certificate}; "
        f"ssl_certificate_key {key};",
    )
    with Remote([f"https://127.0.0.1:{port}/"], QUICK) as remote:
        assert code_of(remote.head) == "connect", "nobody vouches for this certificate"
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with Remote([f"https://127.0.0.1:{port}/"], QUICK) as remote:
        assert remote.head().data == HEAD
        fetch(remote)
        log = site.requests()
        assert sum(r.sent for r in log) == remote.bytes_received, "what HTTP read, inside TLS"
        assert sum(r.received for r in log) == remote.bytes_sent
    guard = Guard(("https://127.0.0.3/",), lambda host: ["127.0.0.1"])
    guarded = replace(QUICK, guard=guard)  # connects to the address that it looked at
    with Remote([f"https://localhost:{port}/"], guarded) as remote:
        assert remote.head().data == HEAD
    with Remote([f"https://other.test:{port}/"], guarded) as remote:
        assert code_of(remote.head) == "connect", "the certificate is checked by the name"
    secure = servers.nginx(
        tmp_path / "nothing",
        extra=f"listen 127.0.0.1:{(other := free_port())} ssl; ssl_certificate {certificate}; "
        f"ssl_certificate_key {key}; return 302 {site.url}$request_uri;",
    )
    assert secure.url
    with Remote([f"https://127.0.0.1:{other}/"], QUICK) as remote:
        assert code_of(remote.head) == "redirect", "never from https to http"
