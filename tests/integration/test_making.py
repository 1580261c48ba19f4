"""What is made on request, when the store is damaged, the head changes, or nobody needs it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.repos import DAY, START, GeneratedPackage, evolve, packages, rpm_md
from support.servers import Servers
from tidings_chunkstore import publisher
from tidings_chunkstore.backends.local import LocalBackend

REPO = "fedora/43"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two snapshots."""
    top = tmp_path / "www"
    made = packages(100)
    for day in range(2):
        publish(top, made, day)
        made = evolve(made, seed=day + 1)
    return top


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    with Servers(tmp_path / "servers") as made:
        yield made


def publish(root: Path, made: tuple[GeneratedPackage, ...], day: int) -> None:
    rpm_md(root / REPO, made, timestamp=START + day * DAY)
    publisher.publish(root / REPO, LocalBackend(root / REPO / "tidings"))


def delta(root: Path) -> str:
    older, newer = sorted(path.stem for path in (root / REPO / "tidings").glob("*.pack"))[-2:]
    return f"/{REPO}/tidings/delta/{older}/{newer}"


def get(url: str) -> httpx.Response:
    return httpx.get(url, timeout=60)


@pytest.mark.parametrize("which", [0, 1], ids=["the older", "the newer"])
def test_a_damaged_pack_makes_a_delta_unavailable(
    servers: Servers, root: Path, tmp_path: Path, which: int
) -> None:
    """404 or 503 for the client, who goes another way; a log line says what the operator does."""
    running = servers.mirror(root, "--cache", tmp_path / "cache")
    pack = sorted((root / REPO / "tidings").glob("*.pack"))[which]
    data = bytearray(pack.read_bytes())
    for at in range(100, len(data) - 100, 50):
        data[at] ^= 0xFF
    pack.write_bytes(data)
    answer = get(running.url + delta(root))
    assert answer.status_code in (404, 503)
    told = [line for line in running.log.read_text().splitlines() if "tidings-mirror check" in line]
    assert len(told) == 1
    assert REPO in told[0]
    if answer.status_code == 503:
        assert int(answer.headers["retry-after"]) > 0
        started = time.monotonic()
        for _ in range(20):  # not tried again for each who asks
            assert get(running.url + delta(root)).status_code == 503
        assert time.monotonic() - started < 5


def test_a_known_delta_falls_with_its_head_and_its_file(
    servers: Servers, root: Path, tmp_path: Path
) -> None:
    running = servers.mirror(root, "--cache", tmp_path / "cache")
    url = running.url + delta(root)
    first = get(url)
    assert first.status_code == 200
    again = get(url)
    assert (again.content, again.headers["etag"]) == (first.content, first.headers["etag"])
    for path in (tmp_path / "cache").glob("*.tdb"):
        path.unlink()
    assert get(url).content == first.content  # made again
    publish(root, packages(150, seed=5), 9)
    assert get(url).status_code == 404  # not current any more
    assert get(running.url + delta(root)).status_code == 200


@pytest.mark.slow
def test_chunks_that_nobody_has_push_nothing_out(
    servers: Servers, root: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    running = servers.mirror(root, "--cache", cache, "--cache-size", "300K")
    kept = get(running.url + delta(root)).content
    (bundle,) = cache.glob("*.tdb")
    base = f"{running.url}/{REPO}/tidings/casync"
    for size in ("16k", "64k"):
        unknown = f"{size}/store.castr/0123/0123{'0' * 60}.cacnk"
        answer = get(f"{base}/{unknown}")
        while answer.status_code == 503:  # the indexes are in the making
            answer = get(f"{base}/{unknown}")
        assert answer.status_code == 404
    assert list(cache.glob("*.caibx"))
    assert not list(cache.glob("*.blob")) and not list(cache.glob(".tmp-*looked-into"))
    assert bundle.exists() and bundle.read_bytes() == kept
