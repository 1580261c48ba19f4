"""A real edge in front of real mirrors: what it fetches, keeps, serves and redirects."""

from __future__ import annotations

import hashlib
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from support.edge import start_edge
from support.servers import Servers
from support.syncing import Repository

PATH = "fedora/43"
IDENTITY = {"accept-encoding": "identity"}


def get(url: str, **headers: str) -> httpx.Response:
    """As a package manager asks: no redirect is followed. (Loading CAs takes 50 ms each time.)"""
    return httpx.get(url, headers={**IDENTITY, **headers}, timeout=60, verify=False)


def matches(edge_url: str, root: Path, path: str = PATH) -> None:
    """Every metadata file of *root* comes from the edge as it is there."""
    for file in sorted((root / "repodata").iterdir()):
        answer = get(f"{edge_url}/{path}/repodata/{file.name}")
        assert answer.status_code == 200, (file, answer.text)
        assert answer.content == file.read_bytes(), file


def settled() -> None:
    """Let what is held grow stale: edges of these tests have it fresh for a second."""
    time.sleep(1.1)


def test_an_update_costs_a_delta_and_every_file_comes_whole(
    tmp_path: Path, servers: Servers
) -> None:
    repository = Repository.at(tmp_path / "www" / PATH, count=300)
    wire = servers.wire(servers.mirror(tmp_path / "www", "--cache", tmp_path / "mc").url)
    edge = start_edge(servers, tmp_path / "edge", {PATH: {"urls": [f"{wire.url}/{PATH}"]}})
    assert wire.requests == 0, "an edge asks when it is asked"
    matches(edge.url, repository.root)
    first = wire.received
    for _ in range(2):
        repository.advance(share=0.005)
        full = sum(file.stat().st_size for file in (repository.root / "repodata").iterdir())
        settled()
        wire.reset()
        matches(edge.url, repository.root)
        assert wire.received < full / 4, (wire.received, full)
        assert wire.requests <= 3
        settled()
        wire.reset()
        matches(edge.url, repository.root)
        assert wire.requests <= 1
        assert wire.received < 500
    assert first > full / 2
    assert edge.states(PATH) == [1, 2, 3]
    status = edge.status(PATH)
    assert status["total_changes"] == 3
    assert status["error"] is None
    assert status["total_bytes_received"] < status["total_bytes_full"]
    counted = get(f"{edge.url}/metrics").text
    looks = re.search(
        rf'tidings_upstream_fetches_total{{repository="{PATH}",result="good"}} (\d)', counted
    )
    assert looks is not None
    assert int(looks[1]) >= 5
    assert f'tidings_edge_answers_total{{repository="{PATH}",state="fresh"}}' in counted


def test_static_hosts_and_hosts_without_tidings(tmp_path: Path, servers: Servers) -> None:
    with_store = Repository.at(tmp_path / "www" / PATH, steps=2)
    without = Repository(tmp_path / "plain" / PATH, made=with_store.made)
    without.write()
    edge = start_edge(
        servers,
        tmp_path / "edge",
        {
            PATH: {"urls": [f"{servers.nginx(tmp_path / 'www').url}/{PATH}"]},
            "plain": {"urls": [f"{servers.nginx(tmp_path / 'plain').url}/{PATH}/"]},
        },
    )
    matches(edge.url, with_store.root)
    matches(edge.url, without.root, "plain")
    with_store.advance()
    without.change()
    settled()
    matches(edge.url, with_store.root)
    matches(edge.url, without.root, "plain")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_one_fetch_however_many_ask(tmp_path: Path, servers: Servers, workers: str) -> None:
    repository = Repository.at(tmp_path / "www" / PATH)
    origin = servers.misbehaving(tmp_path / "www")
    edge = start_edge(
        servers,
        tmp_path / "edge",
        {PATH: {"urls": [f"{origin.url}/{PATH}"]}},
        *("--workers", workers),
        fresh=60,
    )
    primary = next((repository.root / "repodata").glob("*primary*")).name

    def ask(number: int) -> bytes:
        name = "repomd.xml" if number % 2 else primary
        answer = get(f"{edge.url}/{PATH}/repodata/{name}")
        assert answer.status_code == 200, answer.text
        return hashlib.sha256(answer.content).digest()

    with ThreadPoolExecutor(50) as pool:
        assert len(set(pool.map(ask, range(50)))) == 2
    asked = [seen.path for seen in origin.seen]
    assert len(asked) == len(set(asked)), "a file was fetched twice"
    assert asked.count(f"/{PATH}/tidings/head.json") == 1


def test_conditional_requests_ranges_and_head(tmp_path: Path, servers: Servers) -> None:
    repository = Repository.at(tmp_path / "www" / PATH, count=300)
    mirror = servers.nginx(tmp_path / "www")
    edge = start_edge(
        servers, tmp_path / "edge", {PATH: {"urls": [f"{mirror.url}/{PATH}"]}}, fresh=60
    )
    repomd = f"{edge.url}/{PATH}/repodata/repomd.xml"
    first = get(repomd)
    assert first.headers["cache-control"] == "no-cache, no-transform"
    assert "warning" not in first.headers
    assert "age" not in first.headers
    again = get(repomd, **{"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    since = get(repomd, **{"if-modified-since": first.headers["last-modified"]})
    assert since.status_code == 304
    primary = next((repository.root / "repodata").glob("*primary*"))
    url = f"{edge.url}/{PATH}/repodata/{primary.name}"
    data = primary.read_bytes()
    head = httpx.head(url, headers=IDENTITY)
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(data)))
    assert "immutable" in head.headers["cache-control"]
    one = get(url, range="bytes=100-199")
    assert (one.status_code, one.content) == (206, data[100:200])
    many = get(url, range="bytes=0-9,50-59,-10")
    assert many.status_code == 206
    boundary = many.headers["content-type"].partition("boundary=")[2].encode()
    parts = many.content.split(b"--" + boundary)[1:-1]
    bodies = [part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n") for part in parts]
    assert bodies == [data[:10], data[50:60], data[-10:]]
    assert get(url, range=f"bytes={len(data)}-").status_code == 416
    assert httpx.post(repomd).status_code == 405


def test_packages_and_types_that_are_not_held_are_redirected(
    tmp_path: Path, servers: Servers
) -> None:
    repository = Repository.at(tmp_path / "www" / PATH)
    origin = servers.misbehaving(tmp_path / "www")
    base = f"{origin.url}/{PATH}"
    edge = start_edge(
        servers,
        tmp_path / "edge",
        {PATH: {"urls": [base.replace("//", "//me:secret@")], "types": ["primary"]}},
    )
    cold = get(f"{edge.url}/{PATH}/Packages/a/a+b~1%5E2-1.noarch.rpm")
    assert cold.status_code == 302
    assert cold.headers["location"] == f"{base}/Packages/a/a%2Bb~1%5E2-1.noarch.rpm"
    assert cold.content == b""
    assert origin.seen == [], "a package needs no metadata"
    names = {
        file.name.split("-", 1)[-1]: file.name for file in (repository.root / "repodata").iterdir()
    }
    assert get(f"{edge.url}/{PATH}/repodata/repomd.xml").status_code == 200
    assert get(f"{edge.url}/{PATH}/repodata/{names['primary.xml.zst']}").status_code == 200
    other = get(f"{edge.url}/{PATH}/repodata/{names['other.xml.xz']}?x=http://evil/")
    assert other.status_code == 302
    assert other.headers["location"] == f"{base}/repodata/{names['other.xml.xz']}"
    assert "authorization" in origin.seen[-1].headers, "credentials go to the origin"


def test_packages_go_to_the_mirror_that_a_list_names(tmp_path: Path, servers: Servers) -> None:
    """Nothing says where packages are before the list was read."""
    repository = Repository.at(tmp_path / "www" / PATH)
    origin = servers.misbehaving(tmp_path / "www")
    (tmp_path / "www" / "mirrors").write_text(f"{origin.url}/gone\n{origin.url}/{PATH}/\n")
    repos = {PATH: {"mirrorlist": f"{origin.url}/mirrors"}}
    edge = start_edge(servers, tmp_path / "edge", repos, fresh=60)
    answer = get(f"{edge.url}/{PATH}/a.rpm")
    assert (answer.status_code, answer.headers["location"]) == (302, f"{origin.url}/{PATH}/a.rpm")
    matches(edge.url, repository.root)


@pytest.mark.parametrize(
    "path",
    [
        *("/../x.rpm", "/a/../../x.rpm", "/%2e%2e/x.rpm", "/a%2f..%2fx.rpm", "/a%5cx.rpm"),
        *("/.hidden.rpm", "/a%0d%0aset-cookie:x.rpm", "/x%00.rpm", "/\\evil.rpm", "/"),
    ],
)
def test_no_redirect_leads_elsewhere(
    tmp_path_factory: pytest.TempPathFactory, shared_edge: str, path: str
) -> None:
    with httpx.Client() as client:
        request = client.build_request("GET", shared_edge)
        request.url = httpx.URL(shared_edge).copy_with(raw_path=f"/{PATH}{path}".encode())
        assert client.send(request).status_code == 404


@pytest.fixture(scope="module")
def shared_edge(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("shared")
    Repository.at(folder / "www" / PATH)
    with Servers(folder / "servers") as running:
        base = f"{running.nginx(folder / 'www').url}/{PATH}"
        yield start_edge(running, folder / "edge", {PATH: {"urls": [base]}}, fresh=60).url


@pytest.mark.parametrize(
    "rest", ["x.rpm", "//evil.example/x.rpm", "@evil.example/x.rpm", "a:b@c/x.rpm"]
)
def test_redirects_stay_below_the_base_url(shared_edge: str, rest: str) -> None:
    answer = get(f"{shared_edge}/{PATH}/{rest}")
    assert answer.status_code == 302
    assert re.match(rf"http://127\.0\.0\.1:\d+/{PATH}/[^/]", answer.headers["location"])


def test_what_else_an_edge_answers(shared_edge: str) -> None:
    assert get(f"{shared_edge}/{PATH}/tidings/head.json").status_code == 404
    assert get(f"{shared_edge}/{PATH}").status_code == 404
    assert get(f"{shared_edge}/unknown/repodata/repomd.xml").status_code == 404
    assert get(f"{shared_edge}/{PATH}/InRelease").status_code == 404
    assert get(f"{shared_edge}/{PATH}/repodata/repomd.xml.asc").status_code == 404


def test_health_fetches_nothing(tmp_path: Path, servers: Servers) -> None:
    Repository.at(tmp_path / "www" / PATH)
    origin = servers.misbehaving(tmp_path / "www")
    edge = start_edge(servers, tmp_path / "edge", {PATH: {"urls": [f"{origin.url}/{PATH}"]}})
    for path in ("healthz", "readyz", "api/repos"):
        assert get(f"{edge.url}/{path}").status_code == 200
    assert origin.seen == []


def test_a_restart_serves_what_was_held(tmp_path: Path, servers: Servers) -> None:
    repository = Repository.at(tmp_path / "www" / PATH)
    origin = servers.nginx(tmp_path / "www")
    repos = {PATH: {"urls": [f"{origin.url}/{PATH}"]}}
    edge = start_edge(servers, tmp_path / "edge", repos)
    matches(edge.url, repository.root)
    edge.command.stop()
    origin.stop()
    edge = start_edge(servers, tmp_path / "edge", repos)
    answer = get(f"{edge.url}/{PATH}/repodata/repomd.xml")
    assert answer.status_code == 200
    assert answer.headers["warning"] == '111 - "Revalidation Failed"'
    assert int(answer.headers["age"]) >= 1
    matches(edge.url, repository.root)
