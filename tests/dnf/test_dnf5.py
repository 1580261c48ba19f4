"""dnf5 with the helper, in a chroot of Debian sid; where there is none, all skip and say so."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support.dnf import Key, folder_for
from support.dnf5 import Rig5

pytestmark = pytest.mark.dnf
REPOMD = "/repodata/repomd.xml"
Make = Callable[..., Rig5]


@pytest.fixture
def make_rig5(built: Mapping[int, Sequence[Path]]) -> Iterator[Make]:
    """``make_rig5(metalink=True)``: a rig that ends with the test."""
    with ExitStack() as stack:

        def make(**options: object) -> Rig5:
            folder = next(folders := folder_for())
            stack.callback(lambda: next(folders, None))
            return stack.enter_context(Rig5(folder, built, **options))  # type: ignore[arg-type]

        yield make


@pytest.fixture
def plain(make_rig5: Make) -> Rig5:
    """A rig with a baseurl."""
    return make_rig5()


@pytest.mark.parametrize("metalink", [False, True], ids=["plain", "metalink"])
def test_cold_and_refreshed_come_from_the_service(make_rig5: Make, metalink: bool) -> None:
    rig = make_rig5(metalink=metalink)
    confirmation = ["/metalink"] if metalink else [REPOMD]
    for version in (1, 2):
        rig.both_have(version)
        run = rig.dnf("--refresh", "makecache").ok()
        assert run.origin == confirmation, rig.log()
        assert run.service[0] == "/tidings/head.json"
        assert rig.cached_version() == str(version)
        assert rig.packages() == rig.expected(version)
    assert len(run.service) == 2


def test_repo_gpgcheck(make_rig5: Make, signer: Key) -> None:
    rig = make_rig5(key=signer)
    rig.both_have(1)
    first = rig.dnf("makecache").ok()
    assert first.service == []  # nobody but dnf5 itself asks about a key
    rig.both_have(2)
    run = rig.dnf("--refresh", "makecache").ok()
    assert run.origin == [REPOMD, REPOMD + ".asc"], rig.log()
    assert rig.packages() == rig.expected(2)
    rig.service_has(9, rig.forged_tree(2))
    rig.origin_has(3)
    rig.dnf("--refresh", "makecache").ok()
    assert rig.packages() == rig.expected(3)


def test_no_request_where_dnf5_makes_none(plain: Rig5) -> None:
    plain.both_have(1)
    plain.dnf("makecache").ok()
    plain.both_have(2)
    for words in (["makecache"], ["-C", "repoquery"], ["repoquery", "pack1"], ["list", "pack1"]):
        run = plain.dnf(*words)
        assert (run.origin, run.service) == ([], []), words
    # Expired, and a command that does not load it.
    for path in plain.live.rglob("repodata/*"):
        os.utime(path, (1, 1))
    for words in (["repolist"], ["list", "--installed"], ["remove", "pack1"], ["history", "list"]):
        run = plain.dnf(*words)
        assert (run.origin, run.service) == ([], []), words
    assert plain.cached_version() == "1"
    run = plain.dnf("repoquery", "pack1").ok()
    assert run.origin == [REPOMD]
    assert plain.cached_version() == "2"


def test_packages_come_from_the_origin(plain: Rig5) -> None:
    plain.both_have(1)
    run = plain.dnf("install", "pack1").ok()
    assert run.origin == [REPOMD, "/pack1-1-1.noarch.rpm"]
    assert (plain.folder / "root/usr/share/many/pack1").read_text() == "1 1\n"
    plain.both_have(2)
    run = plain.dnf("--refresh", "upgrade").ok()
    assert run.origin == [REPOMD, "/pack1-2-1.noarch.rpm"]


FAULTS: dict[str, dict[str, Any]] = {
    "missing": {"status": 404},
    "failing": {"status": 500},
    "hanging": {"stall_at": 0},
    "stalling": {"stall_at": 50},
    "nonsense": {"body": b"<html>" * 1000},
    "flipped": {"flip_at": 300},
}


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_a_bad_service_ends_in_dnf5_s_own_result(plain: Rig5, name: str) -> None:
    plain.both_have(1)
    plain.dnf("makecache").ok()
    plain.both_have(2)
    plain.service.server.fault("/tidings/", **FAULTS[name])
    plain.dnf("--refresh", "makecache").ok()
    assert plain.cached_version() == "2", plain.log()
    assert plain.packages() == plain.expected(2)


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "cached"])
def test_forged_metadata_never_reach_the_cache(plain: Rig5, cold: bool) -> None:
    plain.both_have(1)
    if not cold:
        plain.dnf("makecache").ok()
    plain.origin_has(2)
    plain.service_has(9, plain.forged_tree(2))
    run = plain.dnf("--refresh", "makecache").ok()
    assert "/tidings/head.json" in run.service
    assert plain.cached_version() == "2"
    assert plain.packages() == plain.expected(2)


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "cached"])
def test_forged_metadata_while_the_origin_is_down(plain: Rig5, cold: bool) -> None:
    plain.both_have(1)
    if not cold:
        plain.dnf("makecache").ok()
    plain.service_has(9, plain.forged_tree(1))
    plain.origin.server.fault("", status=503)
    run = plain.dnf("--refresh", "repoquery", "evil")
    assert "/tidings/head.json" in run.service
    assert run.code != 0
    assert "evil-0" not in run.output
    assert plain.cached_version() == (None if cold else "1")
    assert "evil-0" not in plain.dnf("-C", "repoquery", "evil").output
    plain.origin.server.heal()
    plain.dnf("--refresh", "makecache").ok()
    assert plain.packages() == plain.expected(1)


def test_a_black_hole_costs_three_seconds_at_most(make_rig5: Make) -> None:
    def measured(plugin: bool) -> float:
        rig = make_rig5(plugin=plugin)
        rig.both_have(1)
        rig.dnf("makecache").ok()
        rig.both_have(2)
        rig.service.server.fault("pack$", stall_at=50)
        run = rig.dnf("--refresh", "makecache").ok()
        assert bool(run.service) == plugin
        return run.seconds

    # The clock also sees what else this machine does; a real excess is there each time.
    assert any(measured(True) - measured(False) <= 3.0 for _ in range(3))


@pytest.mark.parametrize("delay", [0.3, 0.6, 0.9])
def test_killed_at_any_time(plain: Rig5, delay: float) -> None:
    plain.both_have(1)
    plain.dnf("makecache").ok()
    plain.both_have(2)
    process = plain.start("--refresh", "makecache")
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    version = plain.cached_version()
    assert version in ("1", "2")
    assert plain.packages() == plain.expected(int(version))
    plain.dnf("--refresh", "makecache").ok()
    assert plain.packages() == plain.expected(2)


def test_two_at_once(plain: Rig5) -> None:
    plain.both_have(1)
    plain.dnf("makecache").ok()
    plain.both_have(2)
    running = [plain.start("--refresh", "makecache") for _ in range(2)]
    for process in running:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    assert plain.packages() == plain.expected(2)


def test_without_the_helper_after_it(plain: Rig5) -> None:
    plain.both_have(1)
    plain.dnf("makecache").ok()
    plain.both_have(2)
    run = plain.dnf("--no-plugins", "--refresh", "makecache").ok()
    assert run.service == []
    assert plain.packages() == plain.expected(2)


def test_switched_off_by_id(plain: Rig5) -> None:
    plain.both_have(1)
    plain.service_at("off")
    assert plain.dnf("makecache").ok().service == []


def test_secrets_are_no_arguments_and_go_to_nobody_else(make_rig5: Make) -> None:
    rig = make_rig5(repo_lines=["username=alice", "password=wonderland"])
    rig.both_have(1)
    seen: list[str] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    if b"wonderland" in path.read_bytes():
                        seen.append(str(path))
                except OSError:
                    continue  # it has ended

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run = rig.dnf("makecache").ok()
    finally:
        done.set()
        watcher.join()
    assert run.origin == [REPOMD]
    assert seen == []
    origin = rig.origin.server.seen
    assert all("authorization" in request.headers for request in origin), "the inner one needs it"
    assert rig.service.server.seen
    assert not any("authorization" in request.headers for request in rig.service.server.seen)


def test_its_table(make_rig5: Make) -> None:
    """Prints the rows of docs/dnf.md."""
    rows = []
    for metalink in (False, True):
        for plugin in (False, True):
            rig = make_rig5(metalink=metalink, plugin=plugin)
            for case, version in (("cold", 1), ("next version", 2), ("nothing new", 2)):
                rig.both_have(version)
                run = rig.dnf("--refresh", "makecache").ok()
                rows.append(
                    f"| {'metalink' if metalink else 'plain'} | {case} "
                    f"| {'with' if plugin else 'without'} "
                    f"| {run.origin_bytes:,} in {len(run.origin)} "
                    f"| {run.service_bytes:,} in {len(run.service)} |"
                )
    print("\n" + "\n".join(rows))
    assert len(rows) == 12
