"""What clients should not send, to the real server: refused or bounded, never served wrongly.

After each test the server answers, its log has no traceback, and its memory and file descriptors
are where they were.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import select
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from support.repos import DAY, START, evolve, packages, rpm_md
from support.servers import HOST, Command, Servers
from tidings_chunkstore import publisher
from tidings_chunkstore.backends.local import LocalBackend

REPO = "fedora/43"
SECRET = b"not for you"
PATIENCE = 2  # seconds the server under test grants
MIB = 1 << 20
BIG = 24 * MIB


@dataclass(frozen=True)
class Tree:
    """A root with two snapshots of a repository, a large file, and links to what lies outside."""

    root: Path
    big: bytes

    @property
    def pack(self) -> Path:
        return min((self.root / REPO / "tidings").glob("*.pack"))

    @property
    def repomd(self) -> bytes:
        return (self.root / REPO / "repodata" / "repomd.xml").read_bytes()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    top = tmp_path_factory.mktemp("abuse")
    root = top / "www"
    made = packages(200)
    for day in range(2):
        rpm_md(root / REPO, made, timestamp=START + day * DAY)
        publisher.publish(root / REPO, LocalBackend(root / REPO / "tidings"))
        made = evolve(made, seed=day + 1)
    big = random.Random(1).randbytes(BIG)
    (root / "big.bin").write_bytes(big)
    outside = top / "outside"
    (outside / "repodata").mkdir(parents=True)
    (outside / "secret").write_bytes(SECRET)
    (outside / "repodata" / "repomd.xml").write_bytes(SECRET)
    (root / ".htpasswd").write_bytes(SECRET)
    (root / "fedora" / ".git").mkdir()
    (root / "fedora" / ".git" / "config").write_bytes(SECRET)
    (root / "file-out").symlink_to(outside / "secret")
    (root / "relative-out").symlink_to("../outside/secret")
    (root / "folder-out").symlink_to(outside)
    (root / "dot-link").symlink_to(root / ".htpasswd")
    (root / "loop").symlink_to("loop")
    # A store that leads outside, and one whose head and pack do.
    (root / "store-out").mkdir()
    published = root / REPO / "tidings"
    elsewhere = outside / "tidings"
    elsewhere.mkdir()
    for path in published.iterdir():
        if path.is_file():
            (elsewhere / path.name).write_bytes(path.read_bytes())
    (root / "store-out" / "tidings").symlink_to(elsewhere)
    (root / "parts-out" / "tidings").mkdir(parents=True)
    for path in elsewhere.iterdir():
        (root / "parts-out" / "tidings" / path.name).symlink_to(path)
    os.mkfifo(root / "fifo")
    return Tree(root, big)


@pytest.fixture(scope="module")
def server(tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    folder = tmp_path_factory.mktemp("running")
    with Servers(folder / "servers") as servers:
        options: list[str | Path] = [
            "--cache",
            folder / "cache",
            "--reconcile",
            "--patience",
            str(PATIENCE),
        ]
        running = servers.mirror(tree.root, *options)
        # What it holds once it is warm is no growth.
        for path in ("big.bin", f"{REPO}/tidings/head.json", f"{REPO}/tidings/casync/x.caibx"):
            httpx.get(f"{running.url}/{path}")
        for _ in range(3):
            _read_all(running, _get("/big.bin"))
        yield running


@dataclass(frozen=True)
class Held:
    """What a process holds: open files, and bytes of memory."""

    files: int
    memory: int


def held(server: Command) -> Held:
    pid = server.process.pid
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Held(len(os.listdir(f"/proc/{pid}/fd")), pages * resource.getpagesize())


@pytest.fixture(autouse=True)
def unharmed(server: Command, tree: Tree) -> Iterator[None]:
    before, told = held(server), server.log.stat().st_size
    yield
    check_unharmed(server, tree, before, told)


def check_unharmed(
    server: Command, tree: Tree, before: Held, told: int = 0, memory: int = 48 * MIB
) -> None:
    """It answers, it told no traceback, and it gave back what it had taken."""
    assert server.process.poll() is None
    answer = httpx.get(f"{server.url}/{REPO}/repodata/repomd.xml")
    assert (answer.status_code, answer.content) == (200, tree.repomd)
    until = time.monotonic() + 4 * PATIENCE + 5
    while (now := held(server)).files > before.files + 8 and time.monotonic() < until:
        time.sleep(0.1)
    assert now.files <= before.files + 8
    assert now.memory <= before.memory + memory
    log = server.log.read_text(errors="replace")[told:]
    if "Traceback" in log or "Exception" in log:
        pytest.fail(log[-2000:])


FRAMES = f"/{REPO}/tidings/frames"
PAGE = f"/{REPO}/repodata/repomd.xml"
CHUNKED, DECLARED = "Transfer-Encoding: chunked", "Content-Length: 100000"


# -- talking -------------------------------------------------------------------------------------


def connect(server: Command, seconds: float = 10, receive: int | None = None) -> socket.socket:
    link = socket.socket()
    if receive is not None:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    link.settimeout(seconds)
    link.connect((HOST, server.port))
    return link


def _get(path: str, *fields: str, close: bool = True, method: str = "GET") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", *fields, *(["Connection: close"] * close)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _read_all(server: Command, request: bytes, seconds: float = 15) -> bytes:
    """All that comes back until the connection ends; it must end in that time."""
    with connect(server, seconds) as link:
        received = bytearray()
        try:
            link.sendall(request)
        except OSError:
            pass  # cut while it was sent: what came back is there still, or not
        try:
            while piece := link.recv(1 << 16):
                received += piece
        except ConnectionError:
            pass
    return bytes(received)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


def answers(received: bytes) -> list[Answer]:
    """The answers in what was received, one behind the other; each must be whole."""
    found: list[Answer] = []
    while received:
        start, _, rest = received.partition(b"\r\n\r\n")
        line, *fields = start.decode("latin-1").split("\r\n")
        assert line.startswith("HTTP/1.1 "), line
        headers = {name.lower(): value for name, value in (f.split(": ", 1) for f in fields)}
        status = int(line.split()[1])
        if headers.get("transfer-encoding") == "chunked":
            body, rest = _unchunked(rest)
        else:
            length = 0 if status in (100, 304) else int(headers["content-length"])
            body, rest = rest[:length], rest[length:]
            assert len(body) == length
        found.append(Answer(status, headers, body))
        received = rest
    return found


def _unchunked(data: bytes) -> tuple[bytes, bytes]:
    body = bytearray()
    while True:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        body += data[:length]
        assert data[length : length + 2] == b"\r\n"
        data = data[length + 2 :]
        if not length:
            return bytes(body), data


def one(server: Command, request: bytes) -> Answer:
    """The only answer to *request*, after which the connection ends."""
    (answer,) = answers(_read_all(server, request))
    return answer


def refused(server: Command, request: bytes) -> None:
    """No answer but 400 at most, and the connection ends."""
    assert [answer.status for answer in answers(_read_all(server, request))] in ([], [400])


# -- paths ---------------------------------------------------------------------------------------

UP = {
    "raw": "/../outside/secret",
    "raw, deep": f"/{REPO}/../../../outside/secret",
    "raw, at the end": f"/{REPO}/..",
    "double slashes": "//..//..//outside//secret",
    "encoded dots": "/%2e%2e/outside/secret",
    "half encoded dots": "/.%2e/outside/secret",
    "encoded slash": "/..%2foutside%2fsecret",
    "encoded slash, upper case": "/..%2Foutside%2Fsecret",
    "double encoded": "/%252e%252e/outside/secret",
    "double encoded slash": "/..%252foutside%252fsecret",
    "backslash": "/..\\outside\\secret",
    "encoded backslash": "/..%5coutside%5csecret",
    "NUL": "/file%00.xml",
    "NUL behind a real file": f"/{REPO}/repodata/repomd.xml%00.gz",
    "overlong dot": "/%c0%ae%c0%ae/outside/secret",
    "overlong slash": "/..%c0%afoutside%c0%afsecret",
    "overlong in three bytes": "/..%e0%80%afoutside%e0%80%afsecret",
    "fullwidth dots": "/%ef%bc%8e%ef%bc%8e/outside/secret",
    "not UTF-8": "/%ff%fe",
    "UTF-16's %u": "/%u002e%u002e/outside/secret",
    "half an escape": "/%2",
    "semicolon": "/..;/outside/secret",
    "absolute path behind the root": "//etc/passwd",
    "drive": "/C:/secret",
    "control characters": "/%0d%0aX-Injected:%20yes",
    "right-to-left mark": "/%e2%80%8fsecret",
    "dot file": "/.htpasswd",
    "dot folder": "/fedora/.git/config",
    "encoded dot file": "/%2ehtpasswd",
    "encoded slash before a real file": f"/{REPO}/repodata%2frepomd.xml",
    "a file as a folder": f"/{REPO}/repodata/repomd.xml/",
    "below a file": f"/{REPO}/repodata/repomd.xml/x",
    "a folder": f"/{REPO}/repodata",
    "very long": "/" + "a" * 5000,
    "very deep": "/a" * 2000,
    "symlink to a file outside": "/file-out",
    "relative symlink outside": "/relative-out",
    "symlink to a folder outside": "/folder-out/secret",
    "a repository behind a symlink": "/folder-out/repodata/repomd.xml",
    "symlink to a dot file": "/dot-link",
    "symlink to itself": "/loop",
    "a fifo": "/fifo",
    "a store that leads outside": "/store-out/tidings/head.json",
    "a head that leads outside": "/parts-out/tidings/head.json",
    "up from a store": f"/{REPO}/tidings/../../../../outside/secret",
    "up from a feature": f"/{REPO}/tidings/casync/../../../../../outside/secret.caibx",
    "up in a casync name": f"/{REPO}/tidings/casync/..%2f..%2f..%2foutside%2fsecret.caibx",
    "up in a delta": f"/{REPO}/tidings/delta/../../../../outside/secret",
    "up in a reconcile": f"/{REPO}/tidings/reconcile/..%2f..%2fsecret",
}


@pytest.mark.parametrize("path", UP.values(), ids=list(UP))
def test_paths_that_lead_elsewhere(server: Command, path: str) -> None:
    answer = one(server, _get(path))
    assert answer.status in (400, 404)
    assert SECRET not in answer.body and b"root:" not in answer.body
    assert "x-injected" not in answer.headers


def test_packs_and_batches_through_symlinks_outside(server: Command, tree: Tree) -> None:
    for folder in ("store-out", "parts-out"):
        assert one(server, _get(f"/{folder}/tidings/{tree.pack.name}")).status == 404
        request = {"v": 1, "frames": [[tree.pack.name, [0, 8]]]}
        answer = httpx.post(f"{server.url}/{folder}/tidings/frames", json=request)
        assert answer.status_code == 404


def test_names_that_cannot_be_encoded(server: Command) -> None:
    url = f"{server.url}/{REPO}/tidings"
    surrogate = b'{"v":1,"frames":[["\\ud800.pack",[0,1]]]}'
    answer = httpx.post(f"{url}/frames", content=surrogate)
    assert answer.status_code == 422
    for name in ("%ff", "%ED%A0%80", "%00", "%F0%9F%92%A9"):
        assert httpx.get(f"{url}/delta/{name}/{name}").status_code == 404
        assert httpx.get(f"{url}/reconcile/{name}?tracks={name}").status_code == 404
        assert httpx.get(f"{url}/casync/{name}.caibx").status_code in (404, 422)


# -- heads of requests ---------------------------------------------------------------------------

HEADS = {
    "one huge field": b"X: " + b"a" * 4 * MIB + b"\r\n",
    "a field of 40 KB": b"X: " + b"a" * 40_000 + b"\r\n",
    "a huge field name": b"X" * 100_000 + b": 1\r\n",
    "100,000 fields": b"X: aaaaaaaa\r\n" * 100_000,
    "5,000 fields in one piece": b"Xx: aaaa\r\n" * 5_000,
    "folded lines": b"X: a\r\n" + b" b\r\n" * 20_000,
    "a NUL": b"X: a\0b\r\n",
    "a bare CR": b"X: a\rY: b\r\n",
    "a space before the colon": b"Transfer-Encoding : chunked\r\n",
    "a second Host": b"Host: y\r\n",
}


@pytest.mark.parametrize("fields", HEADS.values(), ids=list(HEADS))
def test_heads_that_are_too_large_or_wrong(server: Command, fields: bytes) -> None:
    refused(server, b"GET / HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n")


LINES = {
    "no Host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "HTTP/0.9": b"GET /healthz\r\n\r\n",
    "HTTP/3.7": b"GET /healthz HTTP/3.7\r\nHost: x\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)),
    "a huge target": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a target of 8-bit bytes": b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    "a space in the target": b"GET /health z HTTP/1.1\r\nHost: x\r\n\r\n",
    "lower case": b"get /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    "an unknown method": b"STEAL /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT": b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n",
    "no target": b"GET  HTTP/1.1\r\nHost: x\r\n\r\n",
    "an absolute target without a path": b"GET http:// HTTP/1.1\r\nHost: x\r\n\r\n",
    "noise": random.Random(2).randbytes(5000),
}


@pytest.mark.parametrize("request_", LINES.values(), ids=list(LINES))
def test_lines_that_are_no_request(server: Command, request_: bytes) -> None:
    refused(server, request_)


def test_methods_that_change_nothing_here(server: Command, tree: Tree) -> None:
    paths = (f"/{REPO}/repodata/repomd.xml", f"/{REPO}/tidings/head.json", "/nothing")
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "MKCOL"):
        for path in paths:
            answer = one(server, _get(path, "Content-Length: 0", method=method))
            assert answer.status == 405, (method, path)
            assert answer.headers["allow"] == "GET, HEAD"
            assert tree.repomd not in answer.body
        for path in ("/healthz", f"/{REPO}/tidings/frames"):
            wrong = method if method != "POST" or path == "/healthz" else "GET"
            assert one(server, _get(path, "Content-Length: 0", method=wrong)).status == 405


def test_an_asterisk_is_not_found(server: Command) -> None:
    assert one(server, _get("*", method="OPTIONS")).status in (400, 405)


def test_an_absolute_target_is_its_path_whoever_it_names(server: Command, tree: Tree) -> None:
    path = f"/{REPO}/repodata/repomd.xml"
    for origin in ("http://x", "http://evil.example:81", "https://user:word@169.254.169.254"):
        answer = one(server, _get(origin + path))
        assert (answer.status, answer.body) == (200, tree.repomd)
    assert one(server, _get("http://x/../outside/secret")).status == 404
    assert one(server, _get("ftp://x/.htpasswd")).status in (400, 404)


@pytest.mark.parametrize("host", ["", "a b", "[::1", "x:99999", "..", "\xff", "x" * 8000, "x/../y"])
def test_a_strange_host_changes_nothing(server: Command, tree: Tree, host: str) -> None:
    request = f"GET /{REPO}/tidings/head.json HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    answer = one(server, request.encode("latin-1"))
    assert answer.status == 200
    assert not host.strip(".") or host.encode("latin-1") not in answer.body
    assert "location" not in answer.headers


def test_an_upgrade_is_not_taken(server: Command, tree: Tree) -> None:
    path = f"/{REPO}/repodata/repomd.xml"
    for kind in ("h2c", "websocket", "TLS/1.0", "nonsense"):
        fields = (f"Upgrade: {kind}", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")
        request = _get(path, *fields, "Connection: Upgrade, HTTP2-Settings", close=False)
        answer = one(server, request + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _get("/healthz"))
        assert (answer.status, answer.body) == (200, tree.repomd), kind
        assert answer.headers["connection"] == "close"


# -- bodies --------------------------------------------------------------------------------------


def bodies(tree: Tree) -> list[str]:
    snapshot = tree.pack.stem
    return [f"/{REPO}/tidings/frames", f"/{REPO}/tidings/reconcile/{snapshot}"]


def test_a_huge_body_that_is_declared(server: Command, tree: Tree) -> None:
    for path in bodies(tree):
        for length in ("1048577", "99999999999", "9" * 18):
            request = _get(path, f"Content-Length: {length}", close=False, method="POST")
            started = time.monotonic()
            answer = one(server, request)  # none of the body is waited for
            assert (answer.status, answer.headers["connection"]) == (413, "close")
            assert time.monotonic() - started < PATIENCE
        continued = _get(path, "Content-Length: 2000000", "Expect: 100-continue", method="POST")
        assert one(server, continued).status == 413


def test_a_huge_body_in_chunks(server: Command, tree: Tree) -> None:
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    for path in bodies(tree):
        request = _get(path, "Transfer-Encoding: chunked", method="POST")
        received = _read_all(server, request + chunk * 400)
        assert [answer.status for answer in answers(received)] in ([413], [])


def test_a_huge_body_that_nobody_asked_for(server: Command, tree: Tree) -> None:
    path = f"/{REPO}/repodata/repomd.xml"
    for framing in (["Content-Length: 100000000"], ["Transfer-Encoding: chunked"]):
        with connect(server) as link:
            link.sendall(_get(path, *framing, close=False))
            piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
            sent = 0
            with contextlib.suppress(OSError):
                while sent < 100 * MIB:
                    link.sendall(piece)
                    sent += len(piece)
            # What the server drops, and what lies in two kernels.
            assert sent < 32 * MIB


TRAILERS = {
    "endless trailers": b"0\r\n" + b"X: aaaaaaaa\r\n" * 200_000,
    "a huge trailer": b"0\r\nX: " + b"a" * 3 * MIB,
    "endless extensions": b"1;" + b"x=y;" * 500_000,
    "endless chunks of nothing much": b"1\r\nx\r\n" * 400_000,
}


def test_chunked_bodies_without_end(server: Command, tree: Tree) -> None:
    before = held(server)
    requests: dict[tuple[str, str], bytes] = {}
    for path in (*bodies(tree), PAGE):
        method = "GET" if path == PAGE else "POST"
        start = _get(path, CHUNKED, close=False, method=method)
        requests |= {(path, name): start + rest for name, rest in TRAILERS.items()}
    with ThreadPoolExecutor(len(requests)) as pool:
        seconds = 4 * PATIENCE + 10
        sent = {
            key: pool.submit(_read_all, server, what, seconds) for key, what in requests.items()
        }
        for key, received in sent.items():
            assert len(received.result()) < 10_000, key
        assert held(server).memory < before.memory + 32 * MIB


def drip(server: Command, start: bytes, piece: bytes, seconds: float) -> tuple[float, bytes]:
    """Send *start*, then *piece* again and again: when the server ended it, and what it said."""
    received = b""
    started = time.monotonic()
    with connect(server) as link:
        link.sendall(start)
        while time.monotonic() - started < seconds:
            time.sleep(0.1)
            try:
                link.sendall(piece)
                if select.select([link], [], [], 0)[0]:
                    data = link.recv(1 << 16)
                    if not data:
                        break
                    received += data
            except OSError:
                break
    return time.monotonic() - started, received


SLOW = {
    "nothing": (b"", b""),
    "empty lines": (b"", b"\r\n"),
    "a request line": (b"G", b""),
    "a head": (b"GET / HTTP/1.1\r\nHost: x\r\n", b"X: y\r\n"),
    "a body": (_get(FRAMES, DECLARED, method="POST"), b"x"),
    "chunks": (_get(FRAMES, CHUNKED, method="POST"), b"1\r\nx\r\n"),
    "extensions of a chunk": (_get(FRAMES, CHUNKED, method="POST") + b"1;", b"x"),
    "trailers": (_get(FRAMES, CHUNKED, method="POST") + b"0\r\n", b"X: y\r\n"),
    "a body for a file": (_get(PAGE, DECLARED, close=False), b"x"),
    "trailers for a file": (_get(PAGE, CHUNKED, close=False) + b"0\r\n", b"X: y\r\n"),
    "a second head": (_get(PAGE, close=False) + b"GET / HTTP/1.1\r\n", b"X: y\r\n"),
}


def test_requests_that_come_slowly(server: Command, tree: Tree) -> None:
    slow = SLOW | {"inquiries": (_get(bodies(tree)[1], DECLARED, method="POST"), b"x")}
    with ThreadPoolExecutor(len(slow)) as pool:
        dripping = {
            name: pool.submit(drip, server, start, piece, 3 * PATIENCE + 6)
            for name, (start, piece) in slow.items()
        }
        for name, ended_ in dripping.items():
            seconds, received = ended_.result()
            assert PATIENCE - 0.5 <= seconds < 2 * PATIENCE + 4, name
            said = [answer.status for answer in answers(received)]
            assert said in ([], [200], [408], [400]), name


def test_a_body_that_is_cut_off(server: Command, tree: Tree) -> None:
    for path in bodies(tree):
        for framing in (DECLARED, CHUNKED):
            for _ in range(20):
                with connect(server) as link:
                    link.sendall(_get(path, framing, method="POST") + b"5\r\n")
    assert httpx.get(f"{server.url}/healthz").status_code == 200


# -- clients that do not take their answers --------------------------------------------------------


def whole_file(tree: Tree) -> bytes:
    return _get("/big.bin", close=False)


def many_ranges(tree: Tree) -> bytes:
    return _get("/big.bin", "Range: bytes=" + ",".join(f"{i}000-{i + 40}000" for i in range(300)))


def batch(tree: Tree) -> bytes:
    size = tree.pack.stat().st_size
    times = min(60_000, 60 * MIB // size)
    body = f'{{"v":1,"frames":[["{tree.pack.name}",[{",".join([f"0,{size}"] * times)}]]]}}'
    return _get(FRAMES, f"Content-Length: {len(body)}", method="POST") + body.encode()


def small_ones(tree: Tree) -> bytes:
    return _get("/big.bin", "Range: bytes=0-250000", close=False) * 60


@pytest.mark.parametrize("request_", [whole_file, many_ranges, batch, small_ones])
@pytest.mark.parametrize("reads", [0, 1], ids=["nothing", "a byte now and then"])
def test_readers_that_hold_an_answer(
    server: Command, tree: Tree, request_: object, reads: int
) -> None:
    """40 at once: cut by the stall limit, and their answers do not lie in memory meanwhile."""
    assert callable(request_)
    before = held(server)
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(connect(server, receive=4096)) for _ in range(40)]
        for link in links:
            link.sendall(request_(tree))
        until = time.monotonic() + 4 * PATIENCE + 10
        left = list(links)
        most = 0
        while left and time.monotonic() < until:
            time.sleep(0.2)
            most = max(most, held(server).memory)
            left = [link for link in left if not ended(link)]
            for link in left if reads else ():
                with contextlib.suppress(OSError):
                    link.recv(reads)
        assert not left, f"{len(left)} are not cut"
    # One block each, and what its thread reads meanwhile; never the whole answer.
    assert most - before.memory < 40 * 2.5 * MIB


def ended(link: socket.socket) -> bool:
    """Whether the server has cut it, whatever lies in the kernel for us yet."""
    poll = select.poll()
    poll.register(link, select.POLLRDHUP)
    return any(
        event & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _, event in poll.poll(0)
    )


@pytest.mark.slow
def test_a_reader_that_is_merely_slow_gets_all(server: Command, tree: Tree) -> None:
    """It takes 400 KB a second, in small pieces, for longer than the patience."""
    with connect(server, receive=65536) as link:
        link.sendall(_get("/big.bin", "Range: bytes=0-3999999"))
        received = bytearray()
        started = time.monotonic()
        while piece := link.recv(20_000):
            received += piece
            time.sleep(0.05)
        assert time.monotonic() - started > 2 * PATIENCE
    (answer,) = answers(bytes(received))
    assert (answer.status, answer.body) == (206, tree.big[:4_000_000])


# -- ranges ----------------------------------------------------------------------------------------

RANGES = {
    "reversed": "9-3",
    "huge numbers": "0-" + "9" * 30,
    "huge start": "9" * 18 + "-",
    "a huge suffix": "-" + "9" * 18,
    "a suffix of nothing": "-0",
    "negative": "--5",
    "words": "a-b",
    "hexadecimal": "0x0-0x10",
    "empty": "",
    "commas": ",,,,",
    "10,000 single bytes": ",".join(f"{i * 2}-{i * 2}" for i in range(10_000)),
    "512 times everything": ",".join(["0-"] * 512),
    "512 that overlap": ",".join(f"0-{1_000_000 + i}" for i in range(512)),
    "500 small and one whole": ",".join([*("0-0" for _ in range(500)), "0-"]),
    "other digits": "\u0661-\u0662",
}


@pytest.mark.parametrize("ranges", RANGES.values(), ids=list(RANGES))
def test_ranges_never_send_more_than_the_file(server: Command, tree: Tree, ranges: str) -> None:
    field = b"Range: bytes=" + ranges.encode()
    for path, size in (("/big.bin", BIG), (f"/{REPO}/tidings/{tree.pack.name}", None)):
        size = size or tree.pack.stat().st_size
        request = _get(path, close=False)[:-2] + field + b"\r\nConnection: close\r\n\r\n"
        received = answers(_read_all(server, request))
        if len(field) > 32 << 10:
            assert [answer.status for answer in received] == [400]
            continue
        (answer,) = received
        assert answer.status in (200, 206, 416)
        # 512 heads of parts, besides.
        assert len(answer.body) <= size + 512 * 200
        if answer.status == 200:
            assert len(answer.body) == size


def test_many_range_fields(server: Command, tree: Tree) -> None:
    answer = one(server, _get("/big.bin", *["Range: bytes=0-9"] * 100))
    assert answer.status in (200, 206, 400)
    assert len(answer.body) <= BIG


def test_a_batch_is_bounded_in_packs_ranges_and_bytes(server: Command, tree: Tree) -> None:
    url = f"{server.url}{FRAMES}"
    size, name = tree.pack.stat().st_size, tree.pack.name
    for frames, status in [
        ([[name, [0, size] * (65 * MIB // size)]], 413),
        ([[name, [0, 1] * 65_537]], 413),
        ([[name, [0, 1]]] * 65_537, 413),
        ([[name, [0, 2**53]]], 422),
        ([[name, [2**53 - 1, 1]]], 416),
        ([[name, [-1, 1]]], 422),
        ([[name, [0.5, 1]]], 422),
        ([[f"{i:06d}-0123456789abcdef.pack", [0, 1]] for i in range(20_000)], 404),
        ([["../../.htpasswd", [0, 1]]], 422),
    ]:
        answer = httpx.post(url, json={"v": 1, "frames": frames}, timeout=30)
        assert answer.status_code == status, str(frames)[:80]
    for body in (b"[" * 1_000_000, b'{"v":' + b"9" * 1_000_000, b"", b"\0", b'{"v":NaN}', b"null"):
        assert httpx.post(url, content=body, timeout=30).status_code == 422


# -- several requests on one connection ------------------------------------------------------------


def test_pipelined_requests_are_answered_in_order(server: Command, tree: Tree) -> None:
    spans = [(i * 7, i * 7 + i) for i in range(30)]
    requests = [_get("/big.bin", f"Range: bytes={a}-{b}", close=False) for a, b in spans]
    received = answers(_read_all(server, b"".join(requests) + _get("/healthz")))
    assert [answer.body for answer in received[:-1]] == [tree.big[a : b + 1] for a, b in spans]
    assert received[-1].body == b'{"status":"ok"}'


def test_a_flood_of_pipelined_requests_is_cut(server: Command, tree: Tree) -> None:
    before = held(server)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            link = stack.enter_context(connect(server))
            with contextlib.suppress(OSError):
                link.sendall(b"GET / HTTP/1.1\r\nHost:x\r\n\r\n" * 20_000)
        time.sleep(1)
        assert held(server).memory < before.memory + 32 * MIB


def test_noise_behind_a_request_never_lands_in_its_answer(server: Command, tree: Tree) -> None:
    with connect(server) as link:
        link.sendall(_get("/big.bin", close=False))
        received = bytearray(link.recv(1000))
        link.sendall(b"noise\0\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while piece := link.recv(1 << 16):
                received += piece
    body = bytes(received).partition(b"\r\n\r\n")[2]
    assert body == tree.big[: len(body)]


INNER = b"GET /big.bin HTTP/1.1\r\nHost: x\r\n\r\n"
SMUGGLING = {
    "CL and TE": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "TE and CL": b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 0\r\nContent-Length: 5\r\n\r\n",
    "a list of lengths": b"Content-Length: 0, 5\r\n\r\n",
    "a signed length": b"Content-Length: +5\r\n\r\nxxxxx",
    "a negative length": b"Content-Length: -1\r\n\r\n",
    "a length in hexadecimal": b"Content-Length: 0x5\r\n\r\nxxxxx",
    "a length over 64 bits": b"Content-Length: 18446744073709551617\r\n\r\nx",
    "an empty length": b"Content-Length: \r\n\r\n",
    "xchunked": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: gzip\r\n\r\n0\r\n\r\n",
    "chunked, identity": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "TE with a tab": b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "a chunk size that is none": b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a negative chunk size": b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
    "a chunk size with 0x": b"Transfer-Encoding: chunked\r\n\r\n0x5\r\nxxxxx\r\n0\r\n\r\n",
    "a chunk size over 64 bits": b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 20 + b"\r\n",
    "a chunk that is longer": b"Transfer-Encoding: chunked\r\n\r\n1\r\nxxx\r\n0\r\n\r\n",
    "bare LF in chunks": b"Transfer-Encoding: chunked\r\n\r\n1\nx\n0\n\n",
}


@pytest.mark.parametrize("rest", SMUGGLING.values(), ids=list(SMUGGLING))
def test_requests_that_two_servers_read_differently(server: Command, rest: bytes) -> None:
    """Refused, or answered once: never is what follows taken for a request of its own."""
    for method, path in ((b"POST", FRAMES), (b"GET", PAGE)):
        start = b"%b %b HTTP/1.1\r\nHost: x\r\n" % (method, path.encode())
        received = _read_all(server, start + rest + INNER)
        assert [answer.status for answer in answers(received)] in ([], [400], [422])


# -- many connections ------------------------------------------------------------------------------


def raise_limit(wanted: int) -> int:
    """Open files this process may have, raised as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


@pytest.mark.parametrize(
    "room",
    [
        pytest.param(4096, id="more than there is room for"),
        pytest.param(16_000, id="with room for all", marks=pytest.mark.slow),
    ],
)
def test_10_000_idle_connections(tree: Tree, tmp_path: Path, room: int) -> None:
    """Others are answered meanwhile: where the room is used up, idle ones make way."""
    many = min(10_000, raise_limit(10_300) - 300)
    if many < 2000:
        pytest.skip(f"only {many + 300} files may be open: ulimit -n")
    with Servers(tmp_path / "servers") as servers:
        running = servers.mirror(tree.root, "--connections", str(room), "--patience", "60")
        head = f"{running.url}/{REPO}/tidings/head.json"
        httpx.get(head)
        before = held(running)
        with contextlib.ExitStack() as stack:
            # A client that is there first, and goes on: it asks again and again.
            patient = stack.enter_context(httpx.Client())
            for number in range(many):
                link = stack.enter_context(connect(running))
                if number % 2:
                    with contextlib.suppress(OSError):
                        link.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
                if not number % 1000:
                    assert patient.get(head).status_code == 200
            started = time.monotonic()
            assert httpx.get(head, timeout=5).status_code == 200
            assert time.monotonic() - started < 2
            now = held(running)
            assert now.files <= min(many, room) + 64
            assert now.memory - before.memory < min(many, room) * 24_000
        check_unharmed(running, tree, before, memory=min(many, room) * 24_000)


def test_more_connections_than_files_may_be_open(tree: Tree, tmp_path: Path) -> None:
    with Servers(tmp_path / "servers") as servers:
        limited = ["sh", "-c", 'ulimit -n 600 && exec "$@"', "sh", sys.executable, "-m"]
        command: list[str | Path] = [
            *limited,
            "tidings_server.cli",
            "serve",
            tree.root,
            "--port",
            "0",
        ]
        running = servers.command([*command, "--host", HOST])
        before = held(running)
        with contextlib.ExitStack() as stack:
            for _ in range(1500):
                stack.enter_context(connect(running))
            answer = httpx.get(f"{running.url}/{REPO}/tidings/head.json", timeout=5)
            assert answer.status_code == 200
        check_unharmed(running, tree, before)
        assert "a higher limit of open files" in running.log.read_text()


def test_connections_that_are_all_busy_are_kept(tree: Tree, tmp_path: Path) -> None:
    """Who comes then is told to come again; nobody's answer is cut for it."""
    with Servers(tmp_path / "servers") as servers:
        running = servers.mirror(tree.root, "--connections", "16")
        with contextlib.ExitStack() as stack:
            links = [stack.enter_context(connect(running, receive=4096)) for _ in range(16)]
            for link in links:
                link.sendall(_get("/big.bin"))
            time.sleep(1)
            (late,) = answers(_read_all(running, b""))
            assert (late.status, late.headers["retry-after"]) == (503, "10")
            received = bytearray()
            while piece := links[0].recv(1 << 20):
                received += piece
            assert answers(bytes(received))[0].body == tree.big
