"""An edge whose upstream, disk or processes fail: the last good state, or a clear refusal."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from support.edge import RunningEdge, start_edge
from support.servers import HOST, Misbehaving, Servers, free_port
from support.syncing import Repository

PATH = "many/43"


def get(edge: RunningEdge, name: str = "repodata/repomd.xml") -> httpx.Response:
    return httpx.get(f"{edge.url}/{PATH}/{name}", timeout=60, verify=False)


def repomd(repository: Repository) -> bytes:
    return (repository.root / "repodata" / "repomd.xml").read_bytes()


def until(done: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something that must come."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.2)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.at(tmp_path / "www" / PATH, count=60)


@pytest.fixture
def origin(repository: Repository, servers: Servers, tmp_path: Path) -> Misbehaving:
    return servers.misbehaving(tmp_path / "www")


@pytest.fixture
def edge(origin: Misbehaving, servers: Servers, tmp_path: Path) -> RunningEdge:
    return start_edge(servers, tmp_path / "edge", {PATH: {"urls": [f"{origin.url}/{PATH}"]}})


def test_nothing_held_and_nobody_there(servers: Servers, tmp_path: Path) -> None:
    base = f"http://me:secret@{HOST}:{free_port()}/x"
    edge = start_edge(servers, tmp_path / "edge", {PATH: {"urls": [base]}})
    answer = get(edge)
    assert answer.status_code == 502
    assert "gave no usable answer (connect)" in answer.text
    assert 1 <= int(answer.headers["retry-after"]) <= 5
    assert get(edge, "repodata/x.xml.gz").status_code == 502
    assert get(edge, "a.rpm").status_code == 302
    assert "secret" not in edge.log() + answer.text
    assert edge.status(PATH)["failures"] == 1, "asked once, then left alone"


def test_a_failing_upstream_is_not_hammered_and_heals(
    edge: RunningEdge, origin: Misbehaving, repository: Repository
) -> None:
    first = get(edge)
    assert first.status_code == 200
    repository.advance()
    origin.fault("", status=500)
    time.sleep(1.1)
    for _ in range(30):
        answer = get(edge)
        assert (answer.status_code, answer.content) == (200, first.content)
        assert answer.headers["warning"] == '111 - "Revalidation Failed"'
        assert int(answer.headers["age"]) >= 1
    same = httpx.get(
        f"{edge.url}/{PATH}/repodata/repomd.xml", headers={"if-none-match": first.headers["etag"]}
    )
    assert same.status_code == 304
    assert "warning" in same.headers
    assert edge.status(PATH)["failures"] <= 3, "the pause between two looks grows"
    assert len(origin.seen) < 60
    origin.heal()
    until(lambda: get(edge).content == repomd(repository))
    answer = get(edge)
    assert "warning" not in answer.headers
    assert edge.status(PATH)["failures"] == 0
    assert edge.states(PATH) == [1, 2]


@pytest.mark.slow
def test_a_half_synced_upstream_changes_nothing(
    edge: RunningEdge, origin: Misbehaving, repository: Repository
) -> None:
    first = get(edge).content
    repository.advance()
    origin.fault("/tidings/", status=404)
    origin.fault("primary", status=404)
    time.sleep(1.1)
    assert get(edge).content == first
    assert edge.states(PATH) == [1]
    origin.heal()
    until(lambda: get(edge).content == repomd(repository))


def test_an_upstream_that_goes_back_is_not_followed(
    edge: RunningEdge, repository: Repository
) -> None:
    old = repository.root.with_name("old")
    shutil.copytree(repository.root, old)
    repository.advance()
    new = get(edge).content
    shutil.rmtree(repository.root)
    old.rename(repository.root)
    time.sleep(1.1)
    answer = get(edge)
    assert answer.content == new
    assert answer.headers["warning"].startswith("111")
    error = edge.status(PATH)["error"]
    assert error["code"] in ("rollback", "serial")
    assert "--allow" not in error["message"], "an edge has no such option"
    assert error["message"].endswith(f"; to accept that, delete {edge.folder(PATH)}")
    shutil.rmtree(edge.folder(PATH))
    until(lambda: get(edge).content == repomd(repository))


def workers_of(edge: RunningEdge) -> list[int]:
    """The processes that the edge started."""
    pid = edge.command.process.pid
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    found = []
    for child in text.split():
        try:
            if b"edge_worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
        except FileNotFoundError:
            continue  # it has just ended
    return found


def test_a_fetch_that_is_killed(
    edge: RunningEdge, origin: Misbehaving, repository: Repository
) -> None:
    origin.fault("/tidings/", status=404)
    origin.fault("primary", stall_at=100)
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(get(edge)))
    asking.start()
    until(lambda: any("primary" in seen.path for seen in origin.seen))
    (worker,) = workers_of(edge)
    os.kill(worker, signal.SIGKILL)
    asking.join(30)
    assert answers[0].status_code == 503
    assert "retry-after" in answers[0].headers
    origin.heal()
    until(lambda: get(edge).status_code == 200)
    assert get(edge).content == repomd(repository)


def ask_in_vain(edge: RunningEdge) -> None:
    with pytest.raises(httpx.HTTPError):
        get(edge)


@pytest.mark.slow
def test_an_edge_that_is_killed_goes_on_from_where_it_was(
    origin: Misbehaving, repository: Repository, servers: Servers, tmp_path: Path
) -> None:
    repos = {PATH: {"urls": [f"{origin.url}/{PATH}"]}}
    edge = start_edge(servers, tmp_path / "edge", repos)
    first = get(edge).content
    repository.advance()
    origin.fault(r"\.pack$|repodata/[^r]", stall_at=50)
    time.sleep(1.1)
    asking = threading.Thread(target=ask_in_vain, args=(edge,))
    asking.start()
    until(lambda: bool(workers_of(edge)))
    left = workers_of(edge)
    edge.command.stop(signal.SIGKILL)
    asking.join(30)
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    # Whatever was half made: neither shown nor in the way.
    (edge.folder(PATH) / "tmp-state").mkdir(exist_ok=True)
    origin.heal()
    origin.fault("", status=500)
    edge = start_edge(servers, tmp_path / "edge", repos)
    assert get(edge).content == first
    origin.heal()
    until(lambda: get(edge).content == repomd(repository))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """*folder* on a file system of its own."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        check=False,
        capture_output=True,
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr!r}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(ballast: Path) -> None:
    """Take all that a file system has."""
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))


def test_a_full_disk(
    origin: Misbehaving, repository: Repository, servers: Servers, tmp_path: Path
) -> None:
    cache = tmp_path / "edge" / "cache"
    with small_disk(cache, "1m"):
        edge = start_edge(servers, tmp_path / "edge", {PATH: {"urls": [f"{origin.url}/{PATH}"]}})
        ballast = cache / "ballast"
        fill(ballast)
        answer = get(edge)
        assert answer.status_code == 503
        assert "cannot keep what it fetches" in answer.text
        assert str(tmp_path) not in answer.text
        assert get(edge).status_code == 503
        ballast.unlink()
        until(lambda: get(edge).status_code == 200)
        first = get(edge).content
        repository.advance()
        fill(ballast)
        time.sleep(1.1)
        answer = get(edge)
        assert (answer.status_code, answer.content) == (200, first)
        assert answer.headers["warning"].startswith("111")
        ballast.unlink()
        until(lambda: get(edge).content == repomd(repository))
        edge.command.stop()


def test_a_cache_that_cannot_be_written(edge: RunningEdge) -> None:
    edge.cache.mkdir(parents=True, exist_ok=True)
    (edge.cache / "pulled").write_text("in the way")
    answer = get(edge)
    assert answer.status_code == 503
    assert "retry-after" in answer.headers
    assert httpx.get(f"{edge.url}/healthz").status_code == 200


@pytest.mark.parametrize("hashed", [pytest.param(True, marks=pytest.mark.slow), False])
def test_clients_never_see_a_mix(hashed: bool, servers: Servers, tmp_path: Path) -> None:
    """While the mirror moves on, each client reads a main file and then all that it names."""
    repository = Repository(tmp_path / "www" / PATH, made=Repository.at(tmp_path / "x").made)
    repository.write(hashed_names=hashed)
    origin = servers.nginx(tmp_path / "www")
    edge = start_edge(
        servers,
        tmp_path / "edge",
        {PATH: {"urls": [f"{origin.url}/{PATH}"]}},
        *("--workers", "2"),
    )
    over = threading.Event()
    wrong: list[str] = []
    seen: set[bytes] = set()

    def read(number: int) -> None:
        transport = httpx.HTTPTransport(local_address=f"127.0.0.{number + 2}")
        with httpx.Client(transport=transport, timeout=60) as client:
            while not over.is_set():
                base = f"{edge.url}/{PATH}/"
                main = client.get(base + "repodata/repomd.xml").content
                seen.add(main)
                named = re.findall(
                    r'<checksum type="sha256">(\w+)<.*?href="([^"]+)"', main.decode(), re.DOTALL
                )
                assert len(named) == 6
                for digest, path in named:
                    time.sleep(0.05)
                    answer = client.get(base + path)
                    if hashlib.sha256(answer.content).hexdigest() != digest:
                        wrong.append(f"{path}: {answer.status_code}")

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(seen) == 1)
    for step in range(2, 5):
        # As a careful mirror does: in one step, so that the upstream itself is never mixed.
        repository.root = tmp_path / "new" / PATH
        repository.change(hashed_names=hashed)
        live = tmp_path / "www" / PATH
        live.rename(tmp_path / f"gone-{repository.step}")
        (tmp_path / "new" / PATH).rename(live)
        until(lambda: len(seen) >= step)  # noqa: B023 - called in this turn
    over.set()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.slow
def test_an_upstream_that_hangs(edge: RunningEdge, origin: Misbehaving) -> None:
    origin.fault("", stall_at=0)
    started = time.monotonic()
    answer = get(edge)
    assert answer.status_code in (503, 504)
    assert time.monotonic() - started < 28, "below the 30 s that clients wait"
    assert httpx.get(f"{edge.url}/healthz", timeout=1).status_code == 200
    assert get(edge, "a.rpm").status_code == 302


def ask_all(edge: RunningEdge, paths: list[str]) -> list[threading.Thread]:
    """Ask for main files, each in a thread that waits for no answer."""

    def ask(path: str) -> None:
        with suppress(httpx.HTTPError):
            httpx.get(f"{edge.url}/{path}/repodata/repomd.xml", timeout=2)

    threads = [threading.Thread(target=ask, args=[path]) for path in paths]
    for thread in threads:
        thread.start()
    return threads


def test_a_host_that_hangs_leaves_room_for_others(
    origin: Misbehaving, servers: Servers, tmp_path: Path
) -> None:
    hangs = servers.misbehaving(tmp_path / "www")
    hangs.fault("", stall_at=0)
    paths = [f"hangs/{number}" for number in range(10)]
    repos = {path: {"urls": [f"{hangs.url}/{PATH}"]} for path in paths}
    edge = start_edge(
        servers, tmp_path / "edge", {**repos, PATH: {"urls": [f"{origin.url}/{PATH}"]}}
    )
    threads = ask_all(edge, paths)
    until(lambda: len(workers_of(edge)) == 2)
    assert get(edge).status_code == 200
    for thread in threads:
        thread.join()
    assert len(workers_of(edge)) == 2


def test_who_waits_for_another_process_keeps_nobody_away(
    origin: Misbehaving, servers: Servers, tmp_path: Path
) -> None:
    waiting = [f"waits/{number}" for number in range(9)]
    repos = {path: {"urls": [f"{origin.url}/{PATH}"]} for path in [*waiting, PATH]}
    edge = start_edge(servers, tmp_path / "edge", repos)
    with ExitStack() as locks:
        for path in waiting:
            edge.folder(path).mkdir(parents=True)
            lock = locks.enter_context((edge.folder(path) / "lock").open("ab"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        threads = ask_all(edge, waiting)
        until(lambda: len(workers_of(edge)) == len(waiting))
        assert get(edge).status_code == 200
        for thread in threads:
            thread.join()
    # Whoever had the locks is gone without a look: it is made up for.
    answer = httpx.get(f"{edge.url}/{waiting[-1]}/repodata/repomd.xml", timeout=60)
    assert answer.status_code == 200
