"""What an edge decides, and the folder of states that it keeps."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.repos import DAY, START, apt, evolve, packages, rpm_md
from tidings_chunkstore.errors import FormatError, LocalError
from tidings_server.edge_rules import (
    BACKOFF,
    BACKOFF_MOST,
    Do,
    Kind,
    Looks,
    archive,
    by_hash,
    decide,
    kind_of,
    location,
    public,
)
from tidings_server.edge_states import (
    KEEP,
    MOST_STATES,
    PIN,
    Held,
    Problem,
    State,
    Status,
    to_drop,
)

NOW = 1_800_000_000.0
HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("looks", "held", "do"),
    [
        (Looks(), False, Do.FETCH),
        (Looks(NOW - 10, NOW - 10), True, Do.SERVE),
        (Looks(NOW - 10, NOW - 10), False, Do.FETCH),  # its states are gone
        (Looks(NOW - 301, NOW - 301), True, Do.FETCH),
        (Looks(NOW + 500, NOW + 500), True, Do.FETCH),  # the clock was set back
        (Looks(NOW - 1, NOW - 400, 1), True, Do.LATER),
        (Looks(NOW - 1, 0, 1), False, Do.LATER),
        (Looks(NOW - BACKOFF - 1, 0, 1), False, Do.FETCH),
        (Looks(NOW - BACKOFF - 1, 0, 2), False, Do.LATER),
        (Looks(NOW + 9, NOW - 400, 3), True, Do.FETCH),  # the clock was set back
        (Looks(NOW - BACKOFF_MOST - 1, 0, 10**9), False, Do.FETCH),
    ],
)
def test_when_an_upstream_is_asked(looks: Looks, held: bool, do: Do) -> None:
    assert decide(looks, held, NOW, 300) is do


@given(st.integers(1, 10**6))
def test_the_pause_grows_to_its_limit(failures: int) -> None:
    now, more = Looks(NOW, 0, failures), Looks(NOW, 0, failures + 1)
    assert NOW + BACKOFF <= now.again() <= more.again() <= NOW + BACKOFF_MOST


@pytest.mark.parametrize(
    ("rest", "kind"),
    [
        ("repodata/repomd.xml", Kind.MAIN),
        ("InRelease", Kind.MAIN),
        ("Release", Kind.MAIN),
        ("Release.gpg", Kind.BESIDE),
        ("repodata/repomd.xml.asc", Kind.BESIDE),
        ("repodata/repomd.xml.key", Kind.BESIDE),
        (f"repodata/{HEX}-primary.xml.zst", Kind.HASHED),
        (f"main/binary-amd64/by-hash/SHA256/{HEX}", Kind.HASHED),
        ("repodata/primary.xml.gz", Kind.PLAIN),
        ("main/binary-amd64/Packages.xz", Kind.PLAIN),
        ("main/binary-amd64/Release", Kind.PLAIN),
        ("Packages/a/a-1.rpm", Kind.PACKAGE),
        ("drpms/a.drpm", Kind.PACKAGE),
        ("pool/a_1_all.deb", Kind.PACKAGE),
        (f"{HEX}.rpm", Kind.PACKAGE),
        ("tidings/head.json", Kind.STORE),
    ],
)
def test_kinds_of_paths(rest: str, kind: Kind) -> None:
    assert kind_of(rest) is kind


def test_lookups_by_content() -> None:
    assert by_hash(f"main/binary-amd64/by-hash/SHA512/{HEX}{HEX}") == HEX + HEX
    assert by_hash(f"by-hash/MD5Sum/{HEX[:32]}") == HEX[:32]
    for rest in (
        f"repodata/{HEX}-x.gz",
        f"by-hash/SHA256/{HEX}.gz",
        f"by-hash/{HEX}",
        "by-hash/a/b",
    ):
        assert by_hash(rest) is None


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://h/a", "http://h/a/"),
        ("https://me:secret@h:8443/a/", "https://h:8443/a/"),
        ("http://a@b@h/?token=x", "http://h/"),
        ("http://spiegel-für-alle.example/ä", "http://xn--spiegel-fr-alle-7vb.example/%C3%A4/"),
        ("http://[::1]:80/a%20b?x#y", "http://[::1]:80/a%20b/"),
    ],
)
def test_urls_that_are_told(url: str, told: str) -> None:
    assert public(url) == told


@given(
    st.lists(
        st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=20).filter(
            lambda part: part not in (".", "..") and "/" not in part
        ),
        min_size=1,
        max_size=4,
    )
)
def test_a_redirect_stays_below_its_base(parts: list[str]) -> None:
    to = location("https://me:secret@mirror.example/a b/?q", parts)
    assert to.startswith("https://mirror.example/a%20b/")
    assert to.isascii()
    rest = to.removeprefix("https://mirror.example/a%20b/")
    assert rest.count("/") == len(parts) - 1
    assert not set(rest) & set(" ?#\\@:\r\n\0")
    assert not {"", ".", ".."} & set(rest.split("/"))


@pytest.mark.parametrize(
    ("path", "base", "found"),
    [
        ("debian/dists/bookworm", "http://h/debian/dists/bookworm", ("debian", "http://h/debian/")),
        ("dists/s/updates", "http://u:p@h/dists/s/updates/?x", ("", "http://h/")),
        ("a/dists/b/dists/s", "http://h/x/dists/s", ("a/dists/b", "http://h/x/")),
        ("debian/dists/stable", "http://h/debian/dists/bookworm", None),
        ("debian/bookworm", "http://h/debian/dists/bookworm", None),
        ("debian/dists", "http://h/debian/dists", None),
        ("a/dists/s", "http://h/xdists/s", None),
    ],
)
def test_where_an_archive_lies(path: str, base: str, found: tuple[str, str] | None) -> None:
    assert archive(path, base) == found


# -- status ----------------------------------------------------------------------------------------


def test_a_status_comes_back() -> None:
    status = Status("a/b", Looks(2.5, 1.5, 3), upstream="http://h/", total_changes=4)
    assert Status.decode(status.encode()) == status
    failed = status.failed(NOW, Problem("timeout", "no answer"), 2.0)
    assert Status.decode(failed.encode()) == failed
    assert (failed.looks.failures, failed.looks.good) == (4, 1.5)
    value = json.loads(failed.encode())
    assert (value["v"], value["checked"], value["error"]["code"]) == (1, NOW, "timeout")


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"[]", b"1", b"{}", b'{"v": 2}', b"\xff", b"[" * 100_000),
        Status().encode().replace(b'"checked": 0.0', b'"checked": "x"'),
        Status().encode().replace(b'"upstream": ""', b'"upstream": 1'),
        Status().encode().replace(b'"error": null', b'"error": [1]'),
        Status().encode().replace(b'"trust"', b'"doubt"'),
    ],
)
def test_what_is_no_status(data: bytes) -> None:
    with pytest.raises(FormatError):
        Status.decode(data)


# -- states ----------------------------------------------------------------------------------------


def held_in(tmp_path: Path, path: str = "a/b") -> Held:
    held = Held.below(tmp_path, path)
    held.work.mkdir(parents=True)
    return held


def files(top: Path) -> dict[str, bytes]:
    return {
        path.relative_to(top).as_posix(): path.read_bytes()
        for path in sorted(top.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def test_states_are_whole_and_never_change(tmp_path: Path) -> None:
    held = held_in(tmp_path)
    made = packages(30)
    assert held.view().current is None
    rpm_md(held.work, made, timestamp=START)
    assert held.take_in(NOW)
    first = files(held.work)
    view = held.view()
    assert [state.number for state in view.states] == [1]
    assert not held.take_in(NOW + 5), "nothing is new"
    assert held.view(view).states[0] is view.states[0], "read once"
    rpm_md(held.work, evolve(made, 1), timestamp=START + DAY)
    assert held.take_in(NOW + 10)
    view = held.view(view)
    assert [state.number for state in view.states] == [1, 2]
    assert files(view.states[0].folder) == first
    assert files(view.states[1].folder) == files(held.work)
    current = view.current
    assert current is not None
    assert current.files == set(files(held.work))
    assert (current.layout, current.timestamp, current.made) == ("rpm-md", START + DAY, NOW + 10)
    old = next(path for path in first if "primary" in path)
    found = view.anywhere(old, None)
    assert found is not None
    assert found.read_bytes() == first[old]
    assert current.find(old) is None
    assert view.state(1) is view.states[0]
    assert view.state(99) is current
    assert view.state(None) is current


def test_same_files_are_links_and_the_main_file_has_the_publish_time(tmp_path: Path) -> None:
    held = held_in(tmp_path)
    made = packages(10)
    rpm_md(held.work, made, timestamp=START, hashed_names=False)
    held.take_in(NOW)
    # Signed anew: another repomd.xml of the same time.
    repomd = held.work / "repodata" / "repomd.xml"
    repomd.write_bytes(repomd.read_bytes() + b"\n")
    held.take_in(NOW + 1)
    one, two = held.view().states
    assert (one.folder / "repodata/primary.xml.gz").samefile(two.folder / "repodata/primary.xml.gz")
    times = [int((each.folder / "repodata/repomd.xml").stat().st_mtime) for each in (one, two)]
    assert times == [START, START + 1], "If-Modified-Since must tell them apart"
    assert one.has_plain_names
    assert repomd.stat().st_mtime > START + DAY, "what the sync knows of its files is left alone"


def test_apt_files_are_found_by_any_checksum_of_the_release(tmp_path: Path) -> None:
    held = held_in(tmp_path)
    made = packages(10)
    contents = []
    for step in range(2):
        apt(held.work, made, timestamp=START + step * DAY, sections=("MD5Sum", "SHA256", "SHA512"))
        held.take_in(NOW + step)
        contents.append((held.work / "main/binary-amd64/Packages.gz").read_bytes())
        made = evolve(made, step)
    view = held.view()
    for content in contents:
        for name in ("md5", "sha256", "sha512"):
            found = view.anywhere("", hashlib.new(name, content).hexdigest())
            assert found is not None
            assert found.read_bytes() == content
    assert view.anywhere("", HEX) is None


def test_half_made_and_damaged_states_are_not_shown(tmp_path: Path) -> None:
    held = held_in(tmp_path)
    rpm_md(held.work, packages(5))
    held.take_in(NOW)
    states = held.folder / "states"
    (states / "7").mkdir()
    (states / "8").mkdir()
    (states / "8" / ".state.json").write_text('{"v": 9}')
    (states / "junk").mkdir()
    (held.folder / "tmp-state").mkdir()
    (held.folder / "tmp-state" / "left").write_text("by a process that was killed")
    assert [state.number for state in held.view().states] == [1]
    rpm_md(held.work, packages(6), timestamp=START + DAY)
    held.take_in(NOW + 1)
    assert [state.number for state in held.view().states] == [1, 9]
    (held.folder / "status.json").write_text("{")
    assert held.view().status == Status("a/b")


def test_nothing_fetched_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LocalError):
        held_in(tmp_path).take_in(NOW)


def test_names_of_folders(tmp_path: Path) -> None:
    assert Held.below(tmp_path, "a/b").folder != Held.below(tmp_path, "a%2Fb").folder
    long = "ä" * 500
    assert len(Held.below(tmp_path, long).folder.name) <= 255
    assert Held.below(tmp_path, long).folder != Held.below(tmp_path, long + "x").folder


def state(number: int, made: float) -> State:
    return State(number, Path(str(number)), made, "rpm-md", 0, frozenset(), {})


def test_what_is_dropped() -> None:
    states = [state(at, NOW - KEEP * 2 + at * 600) for at in range(1, 13)]  # the last is of now
    gone = to_drop(states, NOW, 10**9, {})
    # 5 was current until 6 came, an hour ago to the second.
    assert gone == [4, 3, 2, 1]
    own = dict.fromkeys(range(1, 13), 100)
    assert to_drop(states, NOW, 250, own) == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert to_drop(states, NOW, 0, own) == list(range(11, 0, -1)), "the newest always stays"
    many = [state(at, NOW) for at in range(1, 50)]
    assert len(many) - len(to_drop(many, NOW, 10**9, {})) == MOST_STATES
    assert to_drop([], NOW, 0, {}) == []


def test_pruning_removes_the_files(tmp_path: Path) -> None:
    held = held_in(tmp_path)
    made = packages(20)
    for step in range(4):
        rpm_md(held.work, made, timestamp=START + step * DAY)
        held.take_in(time.time() - 3 * KEEP + step * KEEP)
        made = evolve(made, step)
    held.prune(time.time(), 10**9)
    assert [each.number for each in held.view().states] == [3, 4]
    held.prune(time.time(), 0)
    assert [each.number for each in held.view().states] == [4]
    assert sorted(os.listdir(held.folder)) == ["states", "work"]


def test_pins(tmp_path: Path) -> None:
    held = held_in(tmp_path)
    now = time.time()
    assert held.pinned("10.0.0.1", now) is None
    held.pin("10.0.0.1", 3)
    held.pin("10.0.0.1", 4)
    assert held.pinned("10.0.0.1", now + 1) == 4
    assert held.pinned("10.0.0.1", now + PIN + 2) is None
    assert held.pinned("10.0.0.2", now + 1) is None
    for each in range(3000):
        held.pin(f"10.1.{each // 256}.{each % 256}", 5)
    assert len(list((held.folder / "pins").iterdir())) <= 1024
