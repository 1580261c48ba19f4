"""packaging/nginx/tidings-edge.conf: real nginx that keeps packages in front of a real edge."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import certifi
import httpx
import pytest

from support.edge import RunningEdge, start_edge
from support.repos import packages
from support.servers import HOST, Misbehaving, Nginx, Servers, free_port
from support.syncing import Repository
from support.system import ROOT

PATH = "many/43"
PACKAGE = "Packages/a/a+b-1~rc1-1.noarch.rpm"
BODY = os.urandom(300_000)


@pytest.fixture
def origin(servers: Servers, tmp_path: Path) -> Misbehaving:
    repository = Repository(tmp_path / "www" / PATH, made=packages(30))
    repository.write(hashed_names=False)  # what pins are for
    package = repository.root / PACKAGE
    package.parent.mkdir(parents=True)
    package.write_bytes(BODY)
    return servers.misbehaving(tmp_path / "www")


@pytest.fixture
def edge(origin: Misbehaving, servers: Servers, tmp_path: Path) -> RunningEdge:
    return start_edge(servers, tmp_path / "edge", {PATH: {"urls": [f"{origin.url}/{PATH}"]}})


@pytest.fixture
def front(edge: RunningEdge, servers: Servers, tmp_path: Path) -> tuple[Nginx, str]:
    """nginx with the shipped configuration, and its URL."""
    text = (ROOT / "packaging" / "nginx" / "tidings-edge.conf").read_text()
    port = free_port()
    for shipped, here in (
        ("server edge:8080;", f"server {HOST}:{edge.command.port};"),
        ("listen 8000;", f"listen {HOST}:{port};"),
        ("/var/cache/nginx/packages", str(tmp_path / "packages")),
        ("/etc/ssl/certs/ca-certificates.crt", certifi.where()),
    ):
        assert shipped in text
        text = text.replace(shipped, here)
    return servers.nginx(tmp_path / "www", http=text), f"http://{HOST}:{port}"


def test_packages_are_kept_and_metadata_is_not(
    front: tuple[Nginx, str], origin: Misbehaving, edge: RunningEdge
) -> None:
    url = f"{front[1]}/{PATH}/{PACKAGE.replace('+', '%2B')}"
    with httpx.Client(headers={"cookie": "a=b", "authorization": "Basic eA=="}) as client:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: client.get(url), range(8)))
        assert all((each.status_code, each.content) == (200, BODY) for each in answers)
        asked = [seen for seen in origin.seen if seen.path.endswith(".rpm")]
        assert len(asked) == 1, "fetched once for all"
        assert not {"cookie", "authorization"} & asked[0].headers.keys()
        part = client.get(url, headers={"range": "bytes=1000-1999"})
        assert (part.status_code, part.content) == (206, BODY[1000:2000])
        assert part.headers["x-cache"] == "HIT"
        origin.fault("", status=500)
        assert client.get(url).content == BODY
        missing = client.get(f"{front[1]}/{PATH}/Packages/other.rpm")
        assert missing.status_code == 500, "an error is passed on and not kept"
        origin.heal()
        assert client.get(f"{front[1]}/{PATH}/Packages/other.rpm").status_code == 404
        for _ in range(2):
            repomd = client.get(f"{front[1]}/{PATH}/repodata/repomd.xml")
            assert (repomd.status_code, "x-cache" in repomd.headers) == (200, False)


def test_a_redirect_of_the_upstream_goes_to_the_client(
    front: tuple[Nginx, str], origin: Misbehaving
) -> None:
    elsewhere = "http://169.254.169.254/x.rpm"
    origin.fault("", status=302, headers=(("Location", elsewhere),))
    answer = httpx.get(f"{front[1]}/{PATH}/x.rpm")
    assert (answer.status_code, answer.headers["location"]) == (302, elsewhere)


def test_clients_behind_it_are_told_apart(front: tuple[Nginx, str], edge: RunningEdge) -> None:
    """Pins go by the address that nginx saw."""
    url = f"{front[1]}/{PATH}/repodata/repomd.xml"
    for last in (2, 3, 4):
        transport = httpx.HTTPTransport(local_address=f"127.0.0.{last}")
        with httpx.Client(transport=transport) as client:
            assert client.get(url).status_code == 200
    assert len(list((edge.folder(PATH) / "pins").iterdir())) == 3
