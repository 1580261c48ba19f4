"""dnf 4 with the plugin: the system's dnf, real rpms and repositories, every request counted."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.dnf import PLUGINS, Key, Rig
from support.system import require

pytestmark = pytest.mark.dnf
REPOMD = "/repodata/repomd.xml"
Make = Callable[..., Rig]

#: Kinds of repository: what dnf's own confirmation asks of the origin.
KINDS = {
    "plain": [REPOMD],
    "repo_gpgcheck": [REPOMD, REPOMD + ".asc"],
    "metalink": ["/metalink"],
}


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of repository."""
    return str(request.param)


@pytest.fixture
def rig(kind: str, make_rig: Make, request: pytest.FixtureRequest) -> Rig:
    """A rig of that kind."""
    key = request.getfixturevalue("signer") if kind == "repo_gpgcheck" else None
    return make_rig(key=key, metalink=kind == "metalink")


@pytest.fixture
def plain(make_rig: Make) -> Rig:
    """A rig with a baseurl."""
    return make_rig()


def only(paths: list[str], allowed: list[str]) -> bool:
    """Nothing but *allowed*, each at least once."""
    return set(paths) == set(allowed)


# -- what is fetched -----------------------------------------------------------------------------


def test_cold_and_refreshed_come_from_the_service(rig: Rig, kind: str) -> None:
    rig.both_have(1)
    cold = rig.dnf("makecache").ok()
    assert only(cold.origin, KINDS[kind]), cold.origin
    assert rig.cached_version() == "1"
    assert rig.packages() == rig.expected(1)

    rig.both_have(2)
    new = rig.dnf("--refresh", "makecache").ok()
    assert only(new.origin, KINDS[kind]), new.origin
    assert len(new.origin) == len(KINDS[kind])
    assert [path.rpartition(".")[2] for path in new.service] == ["json", "pack"]
    assert rig.cached_version() == "2"
    assert rig.packages() == rig.expected(2)
    assert new.service_bytes < cold.service_bytes / 4


def test_nothing_new_costs_one_short_answer(rig: Rig, kind: str) -> None:
    rig.both_have(1)
    rig.dnf("makecache").ok()
    again = rig.dnf("--refresh", "makecache").ok()
    assert only(again.origin, KINDS[kind])
    assert again.service == ["/tidings/head.json"]
    assert again.service_bytes < 1000


def test_no_request_where_dnf_makes_none(rig: Rig) -> None:
    rig.both_have(1)
    rig.dnf("makecache").ok()
    rig.both_have(2)
    for words in (
        ["-C", "repoquery"],
        ["-C", "--refresh", "repoquery"],
        ["repoquery", "pack1"],
        ["list", "--available", "pack1"],
    ):
        run = rig.dnf(*words)
        assert (run.origin, run.service) == ([], []), words
    assert rig.cached_version() == "1"


def test_lazy_takes_an_expired_cache_without_asking(plain: Rig) -> None:
    plain.both_have(1)
    plain.dnf("makecache").ok()
    plain.both_have(2)
    for path in plain.live.rglob("repodata/*"):
        os.utime(path, (1, 1))
    # "remove" wants no fresh metadata: dnf loads lazily.
    run = plain.dnf("remove", "pack1")
    assert (run.origin, run.service) == ([], [])
    assert plain.cached_version() == "1"


def test_an_expired_cache_is_brought_up_to_date(plain: Rig) -> None:
    plain.both_have(1)
    plain.dnf("makecache").ok()
    plain.both_have(2)
    for path in plain.live.rglob("repodata/*"):
        os.utime(path, (1, 1))
    run = plain.dnf("makecache").ok()
    assert run.origin == [REPOMD]
    assert plain.cached_version() == "2"
    # And is fresh now, as after dnf's own download.
    run = plain.dnf("repoquery", "pack1").ok()
    assert (run.origin, run.service) == ([], [])


def test_packages_come_from_the_origin(rig: Rig, kind: str) -> None:
    rig.both_have(1)
    run = rig.dnf("install", "pack1").ok()
    rpms = [path for path in run.origin if path.endswith(".rpm")]
    assert rpms == ["/pack1-1-1.noarch.rpm"]
    assert {p for p in run.origin if not p.endswith(".rpm")} == set(KINDS[kind])
    assert not any(path.endswith(".rpm") for path in run.service)
    assert (rig.folder / "root/usr/share/many/pack1").read_text() == "1 1\n"

    rig.both_have(2)
    run = rig.dnf("--refresh", "upgrade").ok()
    assert [path for path in run.origin if path.endswith(".rpm")] == ["/pack1-2-1.noarch.rpm"]
    assert (rig.folder / "root/usr/share/many/pack1").read_text() == "1 2\n"

    run = rig.dnf("install", "--downloadonly", "pack2").ok()
    assert run.origin[-1:] == ["/pack2-2-1.noarch.rpm"]
    assert run.service == []


def test_updateinfo_and_groups_are_there(plain: Rig) -> None:
    plain.both_have(1)
    plain.dnf("install", "pack1").ok()
    plain.both_have(2)
    plain.dnf("--refresh", "makecache").ok()
    assert "MANY-2" in plain.dnf("-C", "updateinfo", "list").output
    assert "Many" in plain.dnf("-C", "group", "list", "--hidden").output


# -- what goes wrong with the service ------------------------------------------------------------


def down(rig: Rig) -> None:
    rig.service_at("http://127.0.0.1:9")


def missing(rig: Rig) -> None:
    rig.service.server.fault("/tidings/", status=404)


def failing(rig: Rig) -> None:
    rig.service.server.fault("", status=500)


def slow(rig: Rig) -> None:
    rig.service.server.fault("/tidings/", drip=0.5, drip_size=10)


def hanging(rig: Rig) -> None:
    rig.service.server.fault("", stall_at=0)


def stalling(rig: Rig) -> None:
    rig.service.server.fault("pack$", stall_at=50)


def cut(rig: Rig) -> None:
    rig.service.server.fault("pack$", truncate_at=50)


def flipped_head(rig: Rig) -> None:
    rig.service.server.fault("head.json$", flip_at=300)


def flipped_packs(rig: Rig) -> None:
    for path in (rig.service.server.root / "tidings").glob("*.pack"):
        data = bytearray(path.read_bytes())
        for place in range(40, len(data), 101):
            data[place] ^= 0x41
        path.chmod(0o644)
        path.write_bytes(data)


def nonsense(rig: Rig) -> None:
    rig.service.server.fault("/tidings/", body=b"<html>" * 1000)


def stale(rig: Rig) -> None:
    pass  # the service stays at version 1


FAULTS = [
    down, missing, failing, slow, hanging, stalling, cut, flipped_head, flipped_packs, nonsense,
    stale,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_bad_service_ends_in_dnf_s_own_result(plain: Rig, fault: Callable[[Rig], None]) -> None:
    plain.both_have(1)
    plain.dnf("makecache").ok()
    plain.origin_has(2)
    if fault is not stale:
        plain.service_has(2)
    fault(plain)
    run = plain.dnf("--refresh", "makecache").ok()
    assert plain.cached_version() == "2", plain.log()
    assert plain.packages() == plain.expected(2)
    assert plain.cached_version() == "2"
    # dnf asks at most once more for what it asks without us.
    assert run.origin.count(REPOMD) <= 2
    assert "Traceback" not in run.output


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "cached"])
def test_forged_metadata_never_reach_the_cache(rig: Rig, cold: bool, kind: str) -> None:
    rig.both_have(1)
    if not cold:
        rig.dnf("makecache").ok()
    rig.origin_has(2)
    forged = rig.forged_tree(2)
    rig.service_has(9, forged)
    run = rig.dnf("--refresh", "makecache").ok()
    assert "/tidings/head.json" in run.service
    assert rig.cached_version() == "2", rig.log()
    assert rig.packages() == rig.expected(2)
    assert "evil" not in " ".join(rig.packages("evil"))
    # It is not believed again for a while.
    assert rig.dnf("--refresh", "makecache").ok().service == []


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "cached"])
def test_forged_metadata_while_the_origin_is_down(rig: Rig, cold: bool) -> None:
    rig.both_have(1)
    if not cold:
        rig.dnf("makecache").ok()
    rig.service_has(9, rig.forged_tree(1))
    rig.origin.server.fault("", status=503)
    run = rig.dnf("--refresh", "repoquery", "evil")
    assert "/tidings/head.json" in run.service
    assert run.code != 0
    assert "evil-0" not in run.output
    assert rig.cached_version() == (None if cold else "1")
    if not cold:
        assert rig.packages() == rig.expected(1)
    later = rig.dnf("-C", "repoquery", "evil")
    assert "evil-0" not in later.output
    # As without the plugin: the origin is back, and all is well.
    rig.origin.server.heal()
    rig.dnf("--refresh", "makecache").ok()
    assert rig.packages() == rig.expected(1)


def test_forged_metadata_with_a_signature_of_another_file(make_rig: Make, signer: Key) -> None:
    """The signature does not fit, so dnf refuses before it even asks the origin."""
    rig = make_rig(key=signer)
    rig.both_have(1)
    rig.dnf("makecache").ok()
    rig.service_has(9, rig.forged_tree(1))
    run = rig.dnf("--refresh", "makecache").ok()
    assert "/tidings/head.json" in run.service
    assert any("WARNING" in line for line in rig.log())
    assert rig.packages() == rig.expected(1)


def test_a_service_ahead_of_its_origin(plain: Rig) -> None:
    plain.both_have(1)
    plain.dnf("makecache").ok()
    plain.service_has(2)
    plain.dnf("--refresh", "makecache").ok()
    assert plain.cached_version() == "1"
    assert plain.packages() == plain.expected(1)


@pytest.mark.parametrize("folder", ["pubring", "solv", "repodata/sub"])
def test_a_hostile_repomd_that_names_other_folders(
    make_rig: Make, signer: Key, folder: str
) -> None:
    """Forged metadata, self-consistent, with a record whose location is dnf's own folder."""
    rig = make_rig(key=signer)
    rig.both_have(1)
    forged = rig.forged_tree(1)
    place = forged / folder
    place.mkdir(exist_ok=True)
    (place / "gpg.conf").write_bytes(b"x" * 100)
    repomd = forged / "repodata" / "repomd.xml"
    sha = hashlib.sha256(b"x" * 100).hexdigest()
    record = (
        f'<data type="prestodelta"><checksum type="sha256">{sha}</checksum>'
        f'<location href="{folder}/gpg.conf"/><size>100</size></data></repomd>'
    )
    repomd.write_text(repomd.read_text().replace("</repomd>", record))
    root = rig.service.server.root
    for name in {folder.partition("/")[0], "repodata"}:
        shutil.rmtree(root / name, ignore_errors=True)
        shutil.copytree(forged / name, root / name)
    rig.tidings_mirror("publish", root)
    rig.dnf("--refresh", "makecache").ok()
    assert not list(rig.cache.rglob("gpg.conf"))
    assert rig.cached_version() == "1"
    assert rig.packages() == rig.expected(1)


# -- time ----------------------------------------------------------------------------------------


@pytest.mark.slow  # a timing: it wants a machine of its own
@pytest.mark.parametrize("fault", [hanging, stalling], ids=lambda fault: fault.__name__)
def test_a_black_hole_costs_three_seconds_at_most(
    make_rig: Make, fault: Callable[[Rig], None]
) -> None:
    def measured(plugin: bool) -> float:
        rig = make_rig(plugin=plugin)
        rig.both_have(1)
        rig.dnf("makecache").ok()
        rig.both_have(2)
        fault(rig)
        run = rig.dnf("--refresh", "makecache").ok()
        assert rig.cached_version() == "2"
        assert bool(run.service) == plugin
        return run.seconds

    # The clock also sees what else this machine does; a real excess is there each time.
    assert any(measured(True) - measured(False) <= 3.0 for _ in range(3))


def test_a_connection_that_is_never_made_costs_three_seconds_at_most(plain: Rig) -> None:
    plain.both_have(1)
    plain.dnf("makecache").ok()
    # A listener whose queue is full: connections hang.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        queue = []
        for _ in range(4):
            queue.append(socket.socket())
            queue[-1].setblocking(False)
            queue[-1].connect_ex(("127.0.0.1", port))
        plain.service_at(f"http://127.0.0.1:{port}")
        plain.origin_has(2)
        slow = plain.dnf("--refresh", "makecache").ok()
        plain.origin_has(3)
        # The host is remembered: the next run loses nothing.
        quick = plain.dnf("--refresh", "makecache").ok()
        for each in queue:
            each.close()
    assert plain.cached_version() == "3"
    assert slow.seconds - quick.seconds <= 3.0


# -- this machine --------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0.4, 0.8, 1.1, 1.4])
def test_killed_at_any_time(plain: Rig, delay: float) -> None:
    plain.both_have(1)
    plain.dnf("makecache").ok()
    plain.both_have(2)
    process = plain.start("--refresh", "makecache")
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert plain.cached_version() in ("1", "2")
    version = int(plain.cached_version() or 0)
    assert plain.packages() == plain.expected(version)
    plain.dnf("--refresh", "makecache").ok()
    assert plain.cached_version() == "2"
    assert plain.packages() == plain.expected(2)


@pytest.mark.parametrize(
    ("call", "nth"),
    [("renameat2", 1), ("rename", 1), ("rename", 3), ("rename", 8), ("unlink", 2), ("unlink", 9)],
)
def test_killed_at_a_system_call(plain: Rig, call: str, nth: int) -> None:
    """strace kills dnf, or the command, at the nth such call: every step of the switch is hit."""
    strace = require("strace")
    plain.both_have(1)
    plain.dnf("makecache").ok()
    plain.both_have(2)
    plain.dnf(
        "--refresh", "makecache",
        prefix=[strace, "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}",
                "-e", f"inject={call}:signal=SIGKILL:when={nth}"],
    )  # fmt: skip
    version = plain.cached_version()
    assert version in ("1", "2", None)  # None only where dnf itself was replacing its cache
    if version is not None:
        assert plain.packages() == plain.expected(int(version))
    plain.dnf("--refresh", "makecache").ok()
    assert plain.packages() == plain.expected(2)


def test_no_cache_file_before_the_origin_has_confirmed(plain: Rig) -> None:
    """The system calls in their order: nothing enters dnf's folder before its own request."""
    strace = require("strace")
    plain.both_have(1)
    plain.dnf("makecache").ok()
    plain.both_have(2)
    trace = plain.folder / "trace"
    plain.dnf(
        "--refresh", "makecache",
        prefix=[strace, "-f", "-qq", "-s", "200", "-o", str(trace), "-e",
                "trace=connect,sendto,openat,rename,renameat,renameat2,link,linkat,symlink"],
    ).ok()  # fmt: skip
    lines = trace.read_text().splitlines()
    port = f"htons({plain.origin.url.rpartition(':')[2]})"
    asked = next(n for n, line in enumerate(lines) if port in line)
    name = plain.live.name
    inside = [
        n
        for n, line in enumerate(lines)
        if f"/cache/{name}" in line
        and ("O_CREAT" in line or "rename" in line or "link" in line)
        and "ENOENT" not in line
    ]
    assert inside, "the switch was not seen"
    assert min(inside) > asked, lines[min(inside)]


def test_two_at_once(plain: Rig) -> None:
    plain.both_have(1)
    plain.dnf("makecache").ok()
    plain.both_have(2)
    running = [plain.start("--refresh", "makecache") for _ in range(2)]
    for process in running:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    assert plain.packages() == plain.expected(2)


def test_a_full_disk(make_rig: Make) -> None:
    """The scratch folder's file system has no room: dnf's own download, which has."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    rig = make_rig()
    rig.both_have(1)
    rig.dnf("makecache").ok()
    rig.both_have(2)
    small = rig.cache / "tidings"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)],
        check=False,
        capture_output=True,
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr!r}")
    try:
        (small / "fill").write_bytes(bytes(32768))
        rig.dnf("--refresh", "makecache").ok()
        assert not list(small.rglob("part-*")), "what could not be finished is in the way of nobody"
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert rig.packages() == rig.expected(2)


def test_a_scratch_folder_that_cannot_be_written(plain: Rig) -> None:
    plain.both_have(1)
    plain.cache.mkdir(parents=True)
    (plain.cache / "tidings").write_text("in the way")
    run = plain.dnf("makecache").ok()
    assert run.service == []
    assert plain.packages() == plain.expected(1)


def test_a_planted_symlink_is_not_followed(plain: Rig) -> None:
    plain.both_have(1)
    plain.dnf("makecache").ok()
    elsewhere = plain.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    for version, place in ((2, "."), (3, "staged")):
        planted = plain.cache / "tidings" / place / plain.live.name
        subprocess.run(["rm", "-rf", str(planted)], check=True)
        planted.symlink_to(elsewhere)
        plain.both_have(version)
        plain.dnf("--refresh", "makecache").ok()
        assert [path.name for path in elsewhere.iterdir()] == ["precious"]
        assert plain.packages() == plain.expected(version)


#: A `tidings` that stages what the origin has, and what a hostile mirror would like to be there.
HOSTILE = """#!/usr/bin/env python3
import json, os, pathlib, shutil, sys
request = json.loads(sys.stdin.readline())
dest = pathlib.Path(request["dest"])
shutil.copytree({tree!r}, dest / "repodata")
{plant}
print(json.dumps({{"type": "head", "url": request["urls"][0]}}))
print(json.dumps({{"type": "summary", "staged": True, "url": request["urls"][0], "tried": {{}}}}))
"""
PLANTS = {
    "keys": 'shutil.copytree({gpg!r}, dest / "pubring")',
    "gpg.conf": '(dest / "pubring").mkdir(); (dest / "pubring/gpg.conf").write_text({log!r})',
    "solv": '(dest / "solv").mkdir(); (dest / "solv/many.solv").write_text("x")',
    "lists": '(dest / "metalink.xml").write_text("x"); (dest / "mirrorlist").write_text("x")',
    "kept": '(dest / "kept").mkdir()',
    "a folder in repodata": '(dest / "repodata/sub").mkdir()',
    "a link in repodata": '(dest / "repodata/link").symlink_to("/etc/passwd")',
    "a link": 'shutil.rmtree(dest / "repodata"); (dest / "repodata").symlink_to("/etc")',
    "nothing": 'shutil.rmtree(dest / "repodata")',
}


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "cached"])
@pytest.mark.parametrize("what", sorted(PLANTS))
def test_nothing_but_plain_metadata_is_handed_to_dnf(
    make_rig: Make, signer: Key, tmp_path: Path, what: str, cold: bool
) -> None:
    """Keys, solv files and lists in dnf's cache are dnf's own, whatever a mirror names."""
    rig = make_rig(key=signer)
    rig.both_have(1)
    if not cold:
        rig.dnf("makecache").ok()
    rig.both_have(2)
    log = tmp_path / "written-by-gpg"
    tree = rig.origin.server.root / "repodata"
    plant = PLANTS[what].format(gpg=str(tmp_path / "stranger"), log=f"log-file {log}\n")
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "pubring.kbx").write_bytes(b"not a key of anybody's")
    rig.command.write_text(HOSTILE.format(tree=str(tree), plant=plant))
    rig.dnf("--refresh", "makecache").ok()
    assert not log.exists()
    assert rig.cached_version() == "2"
    assert rig.packages() == rig.expected(2)
    names = {path.name for path in rig.live.iterdir()}
    assert names <= {"repodata", "pubring"}, names
    assert not any(p.is_symlink() or p.is_dir() for p in (rig.live / "repodata").iterdir())
    keys = {path.name for path in (rig.live / "pubring").iterdir()}
    assert "gpg.conf" not in keys
    for path in (rig.live / "pubring").rglob("*"):
        assert not path.is_file() or b"not a key of anybody" not in path.read_bytes()


def test_a_user_without_root(make_rig: Make) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    rig = make_rig(user=65534)
    subprocess.run(["chown", "-R", "65534", str(rig.folder / "root")], check=True)
    rig.both_have(1)
    for version in (1, 2):
        rig.both_have(version)
        run = rig.dnf("--refresh", "repoquery", "pack1").ok()
        assert run.origin == [REPOMD], rig.log()
        assert f"pack1-0:{version}-1" in run.output


def test_a_cache_that_cannot_be_written(make_rig: Make) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    rig = make_rig()
    rig.both_have(1)
    rig.dnf("makecache").ok()
    rig.both_have(2)
    subprocess.run(["chown", "-R", "65534", str(rig.folder / "root" / "log")], check=False)
    rig.user = 65534
    with_plugin = rig.dnf("--refresh", "repoquery", "pack1")
    rig.plugin = False
    rig.configure()
    without = rig.dnf("--refresh", "repoquery", "pack1")
    assert with_plugin.code == without.code
    assert with_plugin.service == []
    assert with_plugin.origin == without.origin


def test_without_the_plugin_after_it(plain: Rig) -> None:
    """--noplugins, and the plugin removed: the cache is one that dnf could have made."""
    plain.both_have(1)
    plain.dnf("makecache").ok()
    run = plain.dnf("--noplugins", "-C", "repoquery", "pack1").ok()
    assert "pack1-0:1-1" in run.output
    plain.both_have(2)
    run = plain.dnf("--noplugins", "--refresh", "makecache").ok()
    assert run.service == []
    assert plain.packages() == plain.expected(2)
    plain.both_have(3)
    plain.dnf("--refresh", "makecache").ok()
    (plain.folder / "plugins" / "tidings.py").unlink()
    run = plain.dnf("--refresh", "makecache").ok()
    assert (run.origin, run.service) == ([REPOMD], [])
    assert plain.packages() == plain.expected(3)


def test_without_the_command(plain: Rig) -> None:
    plain.both_have(1)
    plain.command.unlink()
    run = plain.dnf("makecache").ok()
    assert run.service == []
    assert plain.packages() == plain.expected(1)


@pytest.mark.parametrize(
    "text",
    ["exit 1", "echo garbage; exit 0", "sleep 60", 'yes \'{"type":"progress"}\'', "exit 130"],
)
def test_a_command_that_misbehaves(plain: Rig, text: str) -> None:
    plain.both_have(1)
    plain.command.write_text(f"#!/bin/sh\n{text}\n")
    run = plain.dnf("makecache").ok()
    assert run.seconds < 8
    assert plain.packages() == plain.expected(1)
    assert subprocess.run(["pgrep", "-f", str(plain.command)], check=False).returncode == 1


# -- whom it asks --------------------------------------------------------------------------------


def test_switched_off_by_id(plain: Rig) -> None:
    plain.both_have(1)
    plain.service_at("off")
    assert plain.dnf("makecache").ok().service == []


def test_the_baseurl_is_asked_by_itself_and_remembered(plain: Rig) -> None:
    plain.both_have(1)
    plain.service_at("")
    first = plain.dnf("makecache").ok()
    assert "/tidings/head.json" in first.origin
    again = plain.dnf("--refresh", "makecache").ok()
    assert again.origin == [REPOMD]  # there was none: a week of peace
    assert all("libdnf" in agent or "tidings/" in agent for agent in plain.origin.agents)


def test_its_own_user_agent_and_no_countme(make_rig: Make) -> None:
    rig = make_rig(repo_lines=["countme=1"])
    rig.both_have(1)
    rig.dnf("makecache").ok()
    assert {agent.partition("/")[0] for agent in rig.service.agents} == {"tidings"}
    assert not any("countme" in seen.path for seen in rig.service.server.seen)


def test_secrets_stay_with_the_repository_s_host(make_rig: Make) -> None:
    rig = make_rig(repo_lines=["username=alice", "password=wonderland"])
    rig.both_have(1)
    rig.dnf("makecache").ok()
    assert rig.service.server.seen
    for seen in rig.service.server.seen:
        assert "wonderland" not in repr(seen.headers)
        assert not any(name.lower() == "authorization" for name in seen.headers)


def test_what_was_saved_is_logged(plain: Rig) -> None:
    plain.both_have(1)
    plain.dnf("makecache").ok()
    plain.both_have(2)
    run = plain.dnf("--refresh", "makecache").ok()
    lines = (plain.cache / "tidings" / "saved.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["repo"] == "many"
    assert last["bytes"] == run.service_bytes
    assert last["requests"] == len(run.service)
    files = [path for path in plain.live.rglob("repodata/*") if path.name != "repomd.xml"]
    assert last["requests_full"] == len(files)
    assert last["bytes_full"] >= sum(path.stat().st_size for path in files)


def test_dnf_s_table(make_rig: Make, signer: Key, record_property: Callable[..., None]) -> None:
    """Prints the table of docs/dnf.md."""
    rows = []
    for kind in KINDS:
        for plugin in (False, True):
            key = signer if kind == "repo_gpgcheck" else None
            rig = make_rig(key=key, metalink=kind == "metalink", plugin=plugin)
            rig.both_have(1)
            for case, version in (("cold", 1), ("next version", 2), ("nothing new", 2)):
                rig.both_have(version)
                run = rig.dnf("--refresh", "makecache").ok()
                rows.append(
                    f"| {kind} | {case} | {'with' if plugin else 'without'} "
                    f"| {run.origin_bytes:,} in {len(run.origin)} "
                    f"| {run.service_bytes:,} in {len(run.service)} |"
                )
    print("| repository | case | plugin | origin | service |\n|---|---|---|---|---|")
    print("\n".join(rows))
    assert len(rows) == 18


def test_the_plugin_is_old_python() -> None:
    """Python 3.6 syntax and the standard library, as far as a newer Python can tell."""
    for path in [*sorted(PLUGINS.glob("*.py")), PLUGINS / "tidings-dnf5"]:
        tree = ast.parse(path.read_text(), feature_version=(3, 6))
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                root = name.partition(".")[0]
                assert root in sys.stdlib_module_names | {"dnf", "libdnf", "tidings_dnf"}, (
                    path.name,
                    name,
                )
