"""Metrics and log lines of a real server: one worker and several, real clients, real damage."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.repos import DAY, START, evolve, packages, rpm_md
from support.servers import Command, Servers
from tidings_chunkstore import head, publisher
from tidings_chunkstore.backends.local import LocalBackend

REPO = "fedora/43"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A published repository of three snapshots below a root, and a client of the first one."""
    top = tmp_path_factory.mktemp("www")
    dest = tmp_path_factory.mktemp("client") / "dest"
    made = packages(800)
    for day in range(3):
        rpm_md(top / REPO, made, timestamp=START + day * DAY)
        publisher.publish(top / REPO, LocalBackend(top / REPO / "tidings"))
        if day == 0:
            with Servers(dest.parent / "servers") as servers:
                url = f"{servers.misbehaving(top).url}/{REPO}"
                done = run("tidings_client.cli", "sync", url, dest)
                assert done.returncode == 0, done.stderr
        made = evolve(made, seed=day + 1)
    return top, dest


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    with Servers(tmp_path / "servers") as made:
        yield made


def run(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def fresh(url: str) -> httpx.Client:
    """A client that makes a connection for each request, so that all workers have some."""
    none = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(base_url=url, limits=none, timeout=30, verify=False)


def scrape(url: str) -> Samples:
    with fresh(url) as client:
        answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return parsed(answer.text)


def parsed(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(samples: Samples, metric: str, **labels: str) -> float:
    """The sum of all samples of *metric* that have *labels*."""
    wanted = set(labels.items())
    return sum(v for (name, has), v in samples.items() if name == metric and wanted <= set(has))


def until(look: Callable[[], bool], seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if look():
            return True
        time.sleep(0.1)
    return look()


def lines(server: Command) -> list[dict[str, object]]:
    text = server.log.read_text(errors="replace")
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def pack(top: Path) -> Path:
    return max((top / REPO / "tidings").glob("*.pack"))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_requests_and_bytes_by_route_and_repository(
    trees: tuple[Path, Path], servers: Servers, tmp_path: Path, workers: str
) -> None:
    top, _ = trees
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    server = servers.mirror(
        top, "--workers", workers, "--cache", tmp_path / "cache", env={"TMPDIR": str(temporary)}
    )
    published = next((top / REPO / "repodata").glob("*primary*"))
    sent = 0
    with fresh(server.url) as client:
        for _ in range(20):
            for path in (f"/{REPO}/tidings/head.json", f"/{REPO}/repodata/{published.name}"):
                sent += len(client.get(path, headers={"accept-encoding": ""}).content)
            part = {"range": "bytes=0-99"}
            answer = client.get(f"/{REPO}/tidings/{pack(top).name}", headers=part)
            assert answer.status_code == 206
            assert client.get("/nobody/knows/tidings/head.json").status_code == 404
            assert client.get("/healthz").status_code == 200
    # What another worker has counted shows a second later.
    assert until(lambda: total(scrape(server.url), "tidings_requests_total", route="head") == 40), (
        scrape(server.url)
    )
    found = scrape(server.url)
    name = "tidings_requests_total"
    assert total(found, name, route="head", repository=REPO, status="2xx") == 20
    assert total(found, name, route="file", repository=REPO, status="2xx") == 20
    assert total(found, name, route="pack", repository=REPO, status="2xx") == 20
    assert total(found, name, route="head", repository="", status="4xx") == 20
    assert total(found, name, route="api", status="2xx") >= 20
    bytes_of = "tidings_sent_bytes_total"
    assert total(found, bytes_of, repository=REPO, route="pack") == 2000
    in_sum = sum(total(found, bytes_of, repository=REPO, route=r) for r in ("head", "file"))
    assert in_sum == sent
    assert total(found, "tidings_request_seconds_count", route="pack") == 20
    assert total(found, "tidings_request_seconds_bucket", route="pack", le="+Inf") == 20
    assert 0 < total(found, "tidings_request_seconds_sum", route="pack") < 60
    # No client makes up a repository.
    known = {dict(has).get("repository") for _, has in found}
    assert known == {None, "", REPO}
    # Gauges of the head and the store's folder, and of each worker.
    store = top / REPO / "tidings"
    now = head.decode((store / "head.json").read_bytes())
    size = sum(path.stat().st_size for path in store.iterdir() if path.is_file())
    assert total(found, "tidings_store_bytes", repository=REPO) == size
    assert total(found, "tidings_packs", repository=REPO) == 3
    assert total(found, "tidings_snapshot_time_seconds", repository=REPO) == now.time
    assert total(found, "tidings_snapshots", repository=REPO) == 3
    assert until(
        lambda: (
            len([1 for n, _ in scrape(server.url) if n == "tidings_worker_resident_bytes"])
            == int(workers)
        )
    )
    assert total(scrape(server.url), "tidings_worker_resident_bytes") > 10e6
    assert len(list(temporary.glob("tidings-metrics-*"))) == (workers != "1")
    server.stop()
    assert list(temporary.glob("tidings-metrics-*")) == []


def test_a_dead_worker_is_forgotten_and_its_counts_are_not(
    trees: tuple[Path, Path], servers: Servers, tmp_path: Path
) -> None:
    top, _ = trees
    server = servers.mirror(top, "--workers", "2", "--cache", tmp_path / "cache")

    def workers() -> set[str]:
        found = scrape(server.url)
        return {dict(has)["worker"] for n, has in found if n == "tidings_worker_resident_bytes"}

    assert until(lambda: len(workers()) == 2)
    with fresh(server.url) as client:
        for _ in range(10):
            client.get(f"/{REPO}/tidings/head.json")
    assert until(lambda: total(scrape(server.url), "tidings_requests_total", route="head") == 10)
    gone = min(workers())
    os.kill(int(gone), signal.SIGKILL)

    def recovered() -> bool:
        try:
            now = workers()
        except httpx.HTTPError:
            return False
        return len(now) == 2 and gone not in now

    assert until(recovered, 30)
    assert total(scrape(server.url), "tidings_requests_total", route="head") == 10


@pytest.mark.parametrize("route", ["bundle", "edges", "chunks"])
def test_what_whole_files_would_have_taken(
    trees: tuple[Path, Path], servers: Servers, tmp_path: Path, route: str
) -> None:
    """A real client's update: the files that changed, whole, however Tidings sent them."""
    top, dest = trees
    options: list[str | Path] = ["--cache", tmp_path / "cache"]
    if route == "edges":
        options += ["--bundle-queue", "0"]  # no bundles: ranges of edges
    server = servers.mirror(top, *options)
    copy = tmp_path / "dest"
    subprocess.run(["cp", "-a", dest, copy], check=True)
    arguments = ["--route", "chunks"] if route == "chunks" else []
    done = run("tidings_client.cli", "sync", f"{server.url}/{REPO}", copy, "--json", *arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    summary = json.loads(done.stdout.splitlines()[-1])
    by_tidings = [f["size"] for f in summary["files"] if f["route"] in ("delta", "chunks")]
    assert len(by_tidings) >= 3
    found = scrape(server.url)
    whole = total(found, "tidings_whole_bytes_total", repository=REPO)
    assert whole == sum(by_tidings), summary
    tidings = sum(
        total(found, "tidings_sent_bytes_total", repository=REPO, route=r)
        for r in ("head", "pack", "frames", "delta")
    )
    assert 0 < tidings < whole
    if route == "bundle":
        count = "tidings_cache_answers_total"
        assert total(found, count, kind="bundle", result="miss") == 1
        assert total(found, "tidings_cache_making_seconds_count", kind="bundle") == 1
        assert total(found, "tidings_cache_bytes") > 0


def test_ids_come_back_and_log_lines_have_them(
    trees: tuple[Path, Path], servers: Servers, tmp_path: Path
) -> None:
    top, _ = trees
    server = servers.mirror(top, "--access-log", "--cache", tmp_path / "cache")
    url = f"{server.url}/{REPO}/tidings/head.json"
    own = httpx.get(url, headers={"x-request-id": "from-the-proxy.7"})
    assert own.headers["x-request-id"] == "from-the-proxy.7"
    made = [httpx.get(url).headers["x-request-id"] for _ in range(3)]
    assert len(set(made)) == 3
    bad = httpx.get(url, headers={"x-request-id": 'x" or "'}).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{14,}", bad)
    assert httpx.get(f"{server.url}/nope").headers["x-request-id"]
    assert httpx.get(f"{server.url}/api/repos").headers["x-request-id"]
    assert until(lambda: len(lines(server)) >= 7)
    first = lines(server)[0]
    assert first["request"] == "from-the-proxy.7" and first["repository"] == REPO
    assert first["status"] == 200 and first["method"] == "GET"


def test_a_damaged_pack_is_an_error_line_with_request_and_repository(
    trees: tuple[Path, Path], servers: Servers, tmp_path: Path
) -> None:
    top = tmp_path / "copy"
    subprocess.run(["cp", "-a", trees[0], top], check=True)
    damaged = pack(top)
    data = bytearray(damaged.read_bytes())
    data[100] ^= 1
    damaged.write_bytes(data)
    server = servers.mirror(top, "--cache", tmp_path / "cache")
    answer = httpx.get(f"{server.url}/{REPO}/tidings/{damaged.name}")
    assert answer.status_code == 404
    (line,) = [line for line in lines(server) if line["level"] == "error"]
    assert line["request"] == answer.headers["x-request-id"]
    assert line["repository"] == REPO and damaged.name in str(line["message"])
    assert total(scrape(server.url), "tidings_errors_total", logger="tidings.serve") == 1


def test_who_may_read_them(trees: tuple[Path, Path], servers: Servers) -> None:
    top, _ = trees
    local = servers.mirror(top).url + "/metrics"
    assert httpx.get(local).status_code == 200
    for name in ("x-forwarded-for", "forwarded", "via", "x-real-ip"):
        hidden = httpx.get(local, headers={name: "127.0.0.1"})
        assert hidden.status_code == 404 and "tidings_" not in hidden.text
    off = servers.mirror(top, "--metrics", "off").url
    assert httpx.get(off + "/metrics").status_code == 404
    assert httpx.get(off + "/healthz").headers["x-request-id"]
    everyone = servers.mirror(top, "--metrics", "all").url
    assert httpx.get(everyone + "/metrics", headers={"via": "1.1 p"}).status_code == 200


def test_other_programs_settings_of_the_library_do_not_matter(
    trees: tuple[Path, Path], servers: Servers, tmp_path: Path
) -> None:
    folder = tmp_path / "somebody"
    folder.mkdir()
    env = {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    server = servers.mirror(trees[0], env=env)
    httpx.get(f"{server.url}/{REPO}/tidings/head.json")
    assert total(scrape(server.url), "tidings_requests_total", route="head") == 1
    assert list(folder.iterdir()) == []


def test_commands_leave_metrics_in_a_file(trees: tuple[Path, Path], tmp_path: Path) -> None:
    top = tmp_path / "copy"
    subprocess.run(["cp", "-a", trees[0], top], check=True)
    rpm_md(top / REPO, packages(450), timestamp=START + 9 * DAY)
    file = tmp_path / "publish.prom"

    def published() -> Samples:
        done = run("tidings_server.cli", "publish", top / REPO, "--metrics", file)
        found = parsed(file.read_text())
        here = (("command", "publish"),)
        assert found["tidings_run_exit_code", here] == done.returncode
        return found

    first = published()
    assert total(first, "tidings_run_success", command="publish") == 1
    assert total(first, "tidings_run_repositories", result="changed") == 1
    assert total(first, "tidings_publish_pack_bytes") == pack(top).stat().st_size
    assert total(published(), "tidings_run_repositories", result="unchanged") == 1
    good = total(parsed(file.read_text()), "tidings_run_good_time_seconds", command="publish")
    assert abs(good - time.time()) < 60
    (top / REPO / "repodata" / "repomd.xml").write_text("<broken")
    failed = published()
    assert total(failed, "tidings_run_success", command="publish") == 0
    assert total(failed, "tidings_run_good_time_seconds", command="publish") == good
    assert [path.name for path in tmp_path.glob("publish.prom*")] == ["publish.prom"]


def test_check_leaves_its_findings(trees: tuple[Path, Path], tmp_path: Path) -> None:
    top = tmp_path / "copy"
    subprocess.run(["cp", "-a", trees[0], top], check=True)
    file = tmp_path / "check.prom"
    good = run("tidings_server.cli", "check", top / REPO, "--metrics", file)
    assert good.returncode == 0
    assert total(parsed(file.read_text()), "tidings_check_findings", severity="error") == 0
    damaged = pack(top)
    damaged.write_bytes(damaged.read_bytes()[:-10])
    bad = run("tidings_server.cli", "check", top / REPO, "--metrics", file, "--json")
    found = parsed(file.read_text())
    assert bad.returncode == 8 == total(found, "tidings_run_exit_code", command="check")
    assert total(found, "tidings_check_findings", severity="error") >= 1
    assert total(found, "tidings_check_damaged_packs") == 1
    unwritable = run("tidings_server.cli", "gc", top / REPO, "--metrics", tmp_path / "no" / "f")
    assert unwritable.returncode != 0 and "Traceback" not in unwritable.stderr
