"""A real uvicorn over a real tree: what is served, how, and what never is."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path

import httpx
import pytest

from support.repos import DAY, START, evolve, packages, rpm_md
from support.servers import HOST, Command, Servers
from tidings_chunkstore import bundle, head, publisher
from tidings_chunkstore.backends.local import LocalBackend

REPO = "fedora/43"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published repository of three snapshots, below a root."""
    top = tmp_path_factory.mktemp("www")
    made = packages(300)
    for day in range(3):
        rpm_md(top / REPO, made, timestamp=START + day * DAY)
        publisher.publish(top / REPO, LocalBackend(top / REPO / "tidings"))
        made = evolve(made, seed=day + 1)
    return top


@pytest.fixture(scope="module")
def running(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    folder = tmp_path_factory.mktemp("running")
    with Servers(folder / "servers") as servers:
        yield servers.mirror(root, "--cache", folder / "cache")


@pytest.fixture
def client(running: Command) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=running.url, headers={"accept-encoding": "identity"}, timeout=60
    ) as made:
        yield made


def packs(root: Path) -> list[Path]:
    return sorted((root / REPO / "tidings").glob("*.pack"))


def published(root: Path, kind: str = "primary") -> Path:
    return next((root / REPO / "repodata").glob(f"*{kind}*"))


def url(root: Path, path: Path) -> str:
    return "/" + path.relative_to(root).as_posix()


def _get(url: str) -> httpx.Response:
    """Making a bundle takes a while on a busy machine."""
    return httpx.get(url, timeout=60)


def test_every_published_file_and_pack_comes_whole(client: httpx.Client, root: Path) -> None:
    for path in sorted((root / REPO).rglob("*")):
        if path.is_file() and path.name != "head.json":
            answer = client.get(url(root, path))
            assert answer.status_code == 200, path
            assert answer.content == path.read_bytes()
            assert answer.headers["content-length"] == str(path.stat().st_size)
            assert answer.headers["etag"].startswith('"')
            modified = formatdate(int(path.stat().st_mtime), usegmt=True)
            assert answer.headers["last-modified"] == modified
            assert "content-encoding" not in answer.headers


def test_caching_headers(client: httpx.Client, root: Path) -> None:
    immutable = "public, max-age=31536000, immutable, no-transform"
    expected = {
        f"/{REPO}/tidings/head.json": "no-cache, no-transform",
        url(root, packs(root)[0]): immutable,
        url(root, published(root)): immutable,
        f"/{REPO}/repodata/repomd.xml": "no-cache, no-transform",
    }
    for path, value in expected.items():
        assert client.get(path).headers["cache-control"] == value, path


def test_the_head_is_the_stored_one_with_features(client: httpx.Client, root: Path) -> None:
    path = f"/{REPO}/tidings/head.json"
    answer = client.get(path)
    stored = (root / REPO / "tidings" / "head.json").read_bytes()
    plain = json.loads(answer.content)
    assert plain.pop("features") == {"delta": 1, "frames": 1}
    assert plain == json.loads(stored)
    assert head.decode(answer.content).serial == head.decode(stored).serial
    assert client.get(path).content == answer.content
    zipped = client.get(path, headers={"accept-encoding": "br, gzip"})
    assert zipped.headers["content-encoding"] == "gzip"
    assert zipped.content == answer.content
    assert int(zipped.headers["content-length"]) < len(answer.content)
    assert zipped.headers["etag"] != answer.headers["etag"]
    assert "accept-encoding" in zipped.headers["vary"]
    refused = client.get(path, headers={"accept-encoding": "gzip;q=0, *"})
    assert "content-encoding" not in refused.headers
    for first in (answer, zipped):
        asked = {"if-none-match": first.headers["etag"]}
        if first is zipped:
            asked["accept-encoding"] = "gzip"
        again = client.get(path, headers=asked)
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
        assert again.headers["cache-control"] == "no-cache, no-transform"


def test_conditions(client: httpx.Client, root: Path) -> None:
    path = url(root, published(root))
    first = client.get(path)
    for name, value, status in [
        ("if-none-match", first.headers["etag"], 304),
        ("if-none-match", '"other", ' + first.headers["etag"], 304),
        ("if-none-match", '"other"', 200),
        ("if-modified-since", first.headers["last-modified"], 304),
        ("if-modified-since", formatdate(0, usegmt=True), 200),
        ("if-modified-since", "nonsense", 200),
    ]:
        answer = client.get(path, headers={name: value})
        assert answer.status_code == status, (name, value)


def test_heads_of_get_and_head_agree(client: httpx.Client, root: Path) -> None:
    for path in (
        f"/{REPO}/tidings/head.json",
        url(root, packs(root)[0]),
        url(root, published(root)),
    ):
        got, asked = client.get(path), client.head(path)
        assert asked.content == b""
        assert asked.status_code == 200
        for headers in (got.headers, asked.headers):
            headers.pop("date")
            headers.pop("x-request-id")
        assert got.headers == asked.headers
    assert client.head(f"/{REPO}/nothing").status_code == 404


@pytest.mark.parametrize("what", ["pack", "published"])
def test_single_ranges(client: httpx.Client, root: Path, what: str) -> None:
    file = packs(root)[0] if what == "pack" else published(root)
    path, data = url(root, file), file.read_bytes()
    size = len(data)
    for header, start, end in [
        ("bytes=0-0", 0, 1),
        ("bytes=10-99", 10, 100),
        (f"bytes={size - 5}-", size - 5, size),
        ("bytes=-7", size - 7, size),
        (f"bytes=3-{size * 9}", 3, size),
    ]:
        answer = client.get(path, headers={"range": header})
        assert answer.status_code == 206, header
        assert answer.content == data[start:end]
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    beyond = client.get(path, headers={"range": f"bytes={size}-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{size}")
    for header in ("bytes=9-3", "lines=1-2", "bytes=x"):
        assert client.get(path, headers={"range": header}).content == data
    etag = client.get(path).headers["etag"]
    for value, status in [(etag, 206), ('"other"', 200)]:
        answer = client.get(path, headers={"range": "bytes=1-2", "if-range": value})
        assert answer.status_code == status


def test_several_ranges_of_a_published_file(client: httpx.Client, root: Path) -> None:
    file = published(root)
    data = file.read_bytes()
    answer = client.get(url(root, file), headers={"range": "bytes=0-9,20-29,-5"})
    assert answer.status_code == 206
    assert answer.headers["content-length"] == str(len(answer.content))
    found = re.fullmatch(r"multipart/byteranges; boundary=(\w+)", answer.headers["content-type"])
    assert found is not None
    parts = answer.content.split(b"\r\n--" + found[1].encode())
    assert parts[0] == b"" and parts[-1] == b"--\r\n"
    bodies = []
    for part in parts[1:-1]:
        _, _, text = part.partition(b"\r\n")
        headers, _, body = text.partition(b"\r\n\r\n")
        assert b"Content-Range: bytes " in headers
        bodies.append(body)
    assert bodies == [data[0:10], data[20:30], data[-5:]]
    many = "bytes=" + ",".join(f"{i * 2}-{i * 2}" for i in range(600))
    assert client.get(url(root, file), headers={"range": many}).content == data


def test_several_ranges_of_a_pack_get_the_whole(client: httpx.Client, root: Path) -> None:
    file = packs(root)[0]
    answer = client.get(url(root, file), headers={"range": "bytes=0-1,4-5"})
    assert (answer.status_code, answer.content) == (200, file.read_bytes())


def raw(running: Command, request: bytes, seconds: float = 10) -> bytes:
    """The answer to bytes that no client library would send."""
    with socket.create_connection((HOST, running.port), timeout=seconds) as link:
        link.sendall(request)
        answer = b""
        while piece := link.recv(65536):
            answer += piece
    return answer


def status_of(running: Command, path: bytes, method: bytes = b"GET") -> int:
    request = b"%b %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % (method, path)
    answer = raw(running, request)
    return int(answer.split(b" ")[1])


def test_what_is_not_shown(running: Command, root: Path) -> None:
    secret = root.parent / "secret"
    secret.write_bytes(b"secret")
    (root / "out").symlink_to(secret)
    (root / REPO / ".tidings").mkdir(exist_ok=True)
    (root / REPO / ".tidings" / "state").write_bytes(b"state")
    (root / REPO / "tidings" / ".tmp-x").write_bytes(b"half")
    base = f"/{REPO}".encode()
    for path in [
        *(b"//", base, base + b"/", base + b"/repodata", base + b"/repodata/"),
        *(b"/../secret", b"/%2e%2e/secret", b"/..%2fsecret", b"/fedora/..%2F..%2Fsecret"),
        *(b"/fedora/../../secret", b"//..//secret", b"/.%2e/secret", b"/out", b"/%00", b"/a%00b"),
        *(base + b"/.tidings/state", base + b"/tidings/.tmp-x", base + b"/tidings/nothing"),
        *(base + b"/repodata%2frepomd.xml", base + b"/repodata/repomd.xml/", b"/" + b"a" * 6000),
        *(base + b"/tidings/000009-0123456789abcdef.pack", base + b"/tidings/", b"/%ff%fe"),
    ]:
        assert status_of(running, path) == 404, path
    assert status_of(running, base + b"/repodata/repomd.xml?x=../..") == 200


def test_methods(running: Command, root: Path) -> None:
    path = f"/{REPO}/repodata/repomd.xml".encode()
    for method in (b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE", b"PROPFIND"):
        assert status_of(running, path, method) == 405, method
    assert status_of(running, f"/{REPO}/tidings/frames".encode()) == 405


def test_heads_of_requests_are_bounded(running: Command) -> None:
    start = b"GET / HTTP/1.1\r\nHost: x\r\n"
    for rest in (b"X-Y: " + b"a" * 4_000_000, b"X-Y: aaaaaaaaaaaaa\r\n" * 200_000):
        try:
            assert b" 400 " in raw(running, start + rest)
        except ConnectionError:
            continue  # it closed before we had sent it all
    assert b" 400 " in raw(running, b"nonsense\r\n\r\n")


def batch(root: Path, *items: tuple[int, list[int]]) -> dict[str, object]:
    names = packs(root)
    return {"v": 1, "frames": [[names[at].name, numbers] for at, numbers in items]}


def test_a_batch_of_frames(client: httpx.Client, root: Path) -> None:
    data = [path.read_bytes() for path in packs(root)]
    request = batch(root, (0, [8, 100, 108, 50, 1000, 10, 0, 8]), (2, [20, 30]), (0, [500, 1]))
    answer = client.post(f"/{REPO}/tidings/frames", json=request)
    assert answer.status_code == 200
    assert answer.content == (
        data[0][8:158] + data[0][1000:1010] + data[0][:8] + data[2][20:50] + data[0][500:501]
    )
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-length"] == str(len(answer.content))


def test_a_large_batch_streams(client: httpx.Client, root: Path) -> None:
    size = packs(root)[0].stat().st_size
    times = 5_000_000 // size + 1
    request = batch(root, (0, [0, size] * times))
    answer = client.post(f"/{REPO}/tidings/frames", json=request)
    assert answer.content == packs(root)[0].read_bytes() * times


def test_bad_batches(client: httpx.Client, root: Path) -> None:
    size = packs(root)[0].stat().st_size
    path = f"/{REPO}/tidings/frames"
    missing = {"v": 1, "frames": [["000009-0123456789abcdef.pack", [0, 1]]]}
    for status, request in [
        (404, missing),
        (416, batch(root, (0, [size - 1, 2]))),
        (413, batch(root, (0, [0, size] * 65_537))),
        (413, batch(root, (0, [0, 1 << 27]))),
        (422, {"v": 2, "frames": []}),
        (422, {"v": 1, "frames": [["../head.json", [0, 1]]]}),
        (422, {"v": 1}),
    ]:
        answer = client.post(path, json=request)
        assert answer.status_code == status, request
        assert answer.json()["error"]["code"]
    assert client.post(path, content=b"x" * (1 << 20 | 1)).status_code == 413
    assert client.post(path, content=iter([b"x" * 70_000] * 20)).status_code == 413
    assert client.post("/fedora/tidings/frames", json=batch(root, (0, [0, 1]))).status_code == 404


def test_a_bundle_from_an_older_snapshot(client: httpx.Client, root: Path) -> None:
    older, newer = packs(root)[0].stem, packs(root)[2].stem
    path = f"/{REPO}/tidings/delta/{older}/{newer}"
    answer = client.get(path)
    assert answer.status_code == 200
    assert "immutable" in answer.headers["cache-control"]
    tracks = [track for track, _ in bundle.decode(answer.content)]
    assert {"repomd", "primary"} <= set(tracks)
    some = client.get(path, params={"tracks": "primary"})
    assert [track for track, _ in bundle.decode(some.content)] == ["primary"]
    again = client.get(path, headers={"if-none-match": answer.headers["etag"]})
    assert again.status_code == 304
    assert client.get(path, headers={"range": "bytes=0-3"}).content == b"TDB1"
    assert client.head(path).headers["content-length"] == str(len(answer.content))
    for wrong in (f"{newer}/{older}", f"{older}/{packs(root)[1].stem}", "x/y", f"{older}/{older}"):
        refused = client.get(f"/{REPO}/tidings/delta/{wrong}")
        assert refused.status_code == 404, wrong


def test_a_bundle_is_made_once_however_many_ask(
    servers: Servers, root: Path, tmp_path: Path
) -> None:
    running = servers.mirror(root, "--cache", tmp_path / "cache", "--bundle-queue", "1")
    path = f"{running.url}/{REPO}/tidings/delta/{packs(root)[1].stem}/{packs(root)[2].stem}"
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(_get, [path] * 8))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1
    busy = [f"{path}?tracks={track}" for track in ("primary", "filelists", "other")]
    with ThreadPoolExecutor(3) as pool:
        states = list(pool.map(_get, busy))
    refused = [answer for answer in states if answer.status_code == 503]
    assert refused and len(refused) < 3
    assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)


def test_the_bundle_cache_is_bounded(servers: Servers, root: Path, tmp_path: Path) -> None:
    running = servers.mirror(root, "--cache", tmp_path / "cache", "--cache-size", "1")
    base = f"{running.url}/{REPO}/tidings/delta"
    newer = packs(root)[2].stem
    for older in (packs(root)[0].stem, packs(root)[1].stem, packs(root)[0].stem):
        assert _get(f"{base}/{older}/{newer}").status_code == 200
        assert len(list((tmp_path / "cache").glob("*.tdb"))) == 1


def test_without_bundles_the_head_promises_none(servers: Servers, root: Path) -> None:
    running = servers.mirror(root, "--bundle-queue", "0")
    served = httpx.get(f"{running.url}/{REPO}/tidings/head.json").json()
    assert served["features"] == {"frames": 1}
    older, newer = packs(root)[0].stem, packs(root)[2].stem
    assert httpx.get(f"{running.url}/{REPO}/tidings/delta/{older}/{newer}").status_code == 404


def test_the_application_itself(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ok"}
    for path in ("/healthz", "/readyz"):  # some supervisors ask by HEAD
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")
    client.post(f"/{REPO}/tidings/frames", content=b"{}")  # from now on it is known
    repos = client.get("/api/repos").json()
    (entry,) = [repo for repo in repos["repositories"] if repo["path"] == REPO]
    assert (entry["serial"], entry["snapshots"], entry["layout"]) == (3, 3, "rpm-md")
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/healthz", "/api/repos", "/{repository}/tidings/frames"} <= set(paths)
    assert "/{repository}/tidings/frames" in client.get("/docs").text
    assert client.get("/api/nothing").status_code == 404


# -- while it runs ---------------------------------------------------------------------------------


@pytest.fixture
def own(root: Path, tmp_path: Path) -> Path:
    """A copy of the tree that a test may change."""
    shutil.copytree(root / REPO, tmp_path / "own" / REPO)
    return tmp_path / "own"


def test_a_new_head_shows_without_a_restart(servers: Servers, own: Path) -> None:
    running = servers.mirror(own)
    path = f"{running.url}/{REPO}/tidings/head.json"
    first = httpx.get(path)
    rpm_md(own / REPO, packages(50, seed=9), timestamp=START + 9 * DAY)
    report = publisher.publish(own / REPO, LocalBackend(own / REPO / "tidings"))
    second = httpx.get(path, headers={"if-none-match": first.headers["etag"]})
    assert (second.status_code, second.json()["serial"]) == (200, report.serial)
    assert httpx.get(f"{running.url}/{REPO}/tidings/{report.pack}").status_code == 200
    repomd = httpx.get(f"{running.url}/{REPO}/repodata/repomd.xml")
    assert repomd.content == (own / REPO / "repodata" / "repomd.xml").read_bytes()


def test_a_repository_that_comes_and_goes(servers: Servers, own: Path) -> None:
    running = servers.mirror(own)
    path = f"{running.url}/late/tidings/head.json"
    assert httpx.get(path).status_code == 404
    shutil.copytree(own / REPO, own / "late")
    assert httpx.get(path).status_code == 200
    shutil.rmtree(own / "late")
    assert httpx.get(path).status_code == 404


def test_a_damaged_pack_is_not_served(servers: Servers, own: Path) -> None:
    running = servers.mirror(own)
    pack = packs(own)[0]
    path = f"{running.url}/{REPO}/tidings/{pack.name}"
    assert httpx.get(path).status_code == 200
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    assert httpx.get(path).status_code == 404
    assert httpx.get(path, headers={"range": "bytes=0-1"}).status_code == 404
    request = {"v": 1, "frames": [[pack.name, [0, 8]]]}
    assert httpx.post(f"{running.url}/{REPO}/tidings/frames", json=request).status_code == 404
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    assert httpx.get(path).status_code == 200


def test_a_damaged_head_goes_out_as_it_is(servers: Servers, own: Path) -> None:
    running = servers.mirror(own)
    path = own / REPO / "tidings" / "head.json"
    for data in (b"{}", b"\xff", b"", path.read_bytes().replace(b'"v":1', b'"v":9')):
        path.write_bytes(data)
        answer = httpx.get(f"{running.url}/{REPO}/tidings/head.json")
        assert (answer.status_code, answer.content) == (200, data)
        refused = httpx.post(f"{running.url}/{REPO}/tidings/frames", json={"v": 1, "frames": []})
        assert refused.status_code == 422


def test_a_large_file_streams_and_survives_its_replacement(servers: Servers, own: Path) -> None:
    running = servers.mirror(own)
    large = own / REPO / "repodata" / "large.bin"
    first = os.urandom(1 << 20) * 24
    large.write_bytes(first)
    path = f"{running.url}/{REPO}/repodata/large.bin"
    assert hashlib.sha256(httpx.get(path).content).digest() == hashlib.sha256(first).digest()
    with httpx.stream("GET", path) as answer:
        pieces = answer.iter_raw(65536)
        got = next(pieces)
        new = large.with_name("new")
        new.write_bytes(b"other" * 1000)
        os.replace(new, large)
        got += b"".join(pieces)
    assert got == first  # the old file, to its end
    assert httpx.get(path).content == b"other" * 1000


def test_clients_that_go_away_leave_nothing_open(servers: Servers, own: Path) -> None:
    running = servers.mirror(own)
    large = own / REPO / "large.bin"
    large.write_bytes(bytes(64 << 20))
    descriptors = Path(f"/proc/{running.process.pid}/fd")
    httpx.get(f"{running.url}/healthz")
    before = len(list(descriptors.iterdir()))
    for _ in range(20):
        link = socket.create_connection((HOST, running.port))
        link.sendall(f"GET /{REPO}/large.bin HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        link.recv(1000)
        link.close()
    deadline = time.monotonic() + 10
    while len(list(descriptors.iterdir())) > before + 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(list(descriptors.iterdir())) <= before + 2
    assert httpx.get(f"{running.url}/healthz").status_code == 200


def test_a_store_tree_of_its_own(servers: Servers, own: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    (store / REPO).mkdir(parents=True)
    shutil.move(own / REPO / "tidings", store / REPO / "tidings")
    running = servers.mirror(own, "--store", store)
    assert httpx.get(f"{running.url}/{REPO}/tidings/head.json").status_code == 200
    assert httpx.get(f"{running.url}/{REPO}/repodata/repomd.xml").status_code == 200


def test_several_workers_and_a_clean_stop(servers: Servers, own: Path) -> None:
    running = servers.mirror(own, "--workers", "2")
    path = f"{running.url}/{REPO}/tidings/head.json"
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(httpx.get, [path] * 40))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert running.stop() == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_cleanly(servers: Servers, own: Path, how: signal.Signals) -> None:
    running = servers.mirror(own)
    assert httpx.get(f"{running.url}/healthz").status_code == 200
    assert running.stop(how) == 0
    assert "Traceback" not in running.log.read_text()


def test_the_access_log(servers: Servers, own: Path) -> None:
    running = servers.mirror(own, "--access-log")
    answer = httpx.get(f"{running.url}/{REPO}/repodata/repomd.xml", headers={"x-request-id": "a-1"})
    assert answer.headers["x-request-id"] == "a-1"
    other = httpx.get(f"{running.url}/%1b[31mred", headers={"x-request-id": "bad id"})
    deadline = time.monotonic() + 10  # a line is written once the answer is on its way
    while running.log.read_text().count('"status"') < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    lines = [json.loads(line) for line in running.log.read_text().splitlines() if line[0] == "{"]
    assert [line["status"] for line in lines] == [200, 404]
    assert lines[0]["request"] == "a-1"
    assert lines[0]["bytes"] == len(answer.content)
    assert lines[1]["request"] == other.headers["x-request-id"] != "bad id"


def test_pipelined_requests_and_kept_connections(running: Command) -> None:
    connection = http.client.HTTPConnection(HOST, running.port)
    for _ in range(3):
        connection.request("GET", f"/{REPO}/repodata/repomd.xml")
        assert connection.getresponse().read()
    connection.close()
    one = f"GET /{REPO}/repodata/repomd.xml HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    last = one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    assert raw(running, one + one + last).count(b"HTTP/1.1 200") == 3
