"""check: damaged stores, each with its verdict."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.stores import History, rich_in_frames
from tidings_chunkstore import condemned, gc, head
from tidings_chunkstore.backends.base import HEAD_NAME
from tidings_chunkstore.check import CheckReport, Severity, check
from tidings_chunkstore.publisher import Options as PublishOptions


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> History:
    history = History(tmp_path_factory.mktemp("origin") / "repo")
    history.options = PublishOptions(keep=3, direct=1)
    with rich_in_frames():
        history.steps(5)
    return history


@pytest.fixture
def history(origin: History, tmp_path: Path) -> History:
    return origin.copy(tmp_path / "repo")


def codes(report: CheckReport) -> set[str]:
    return {finding.code for finding in report.findings if finding.severity is Severity.ERROR}


@pytest.mark.parametrize("quick", [False, True])
def test_a_good_store(history: History, quick: bool) -> None:
    before = history.listing()
    report = check(history.backend, quick=quick)
    assert report.findings == ()
    assert not report.damaged
    assert report.serial == 5
    assert report.checked.packs == 5
    assert report.checked.snapshots == 3
    assert (report.checked.edges > 4) is not quick
    assert (report.checked.chunks > 50) is not quick
    assert (report.checked.recipes >= 7) is not quick
    assert history.listing() == before


def test_a_good_store_after_gc(history: History) -> None:
    gc.run(history.backend, gc.Options(keep=2, grace=0, rewrite_below=1.0, rewrite_gain=0.0))
    assert check(history.backend).findings == ()


def test_one_flipped_byte_anywhere_is_found(history: History) -> None:
    needed = {str(name) for name in gc.gather(history.store, gc.Options()).reach.packs}
    for name in sorted(history.packs()):
        data = (history.folder / name).read_bytes()
        for part in range(10):
            offset = part * (len(data) - 1) // 9
            history.flip(name, offset)
            report = check(history.backend)
            assert [str(pack) for pack in report.damaged_packs] == [name], offset
            assert report.damaged is (name in needed)
            (history.folder / name).write_bytes(data)
    assert check(history.backend).findings == ()


def test_a_missing_pack(history: History) -> None:
    for name in sorted(history.packs()):
        data = (history.folder / name).read_bytes()
        (history.folder / name).unlink()
        for quick in (True, False):
            report = check(history.backend, quick=quick)
            assert "pack-missing" in codes(report)
            assert name in {finding.where for finding in report.findings}
        (history.folder / name).write_bytes(data)


def test_a_pack_cut_short(history: History) -> None:
    name = min(history.packs())
    path = history.folder / name
    data = path.read_bytes()
    for size in (0, 10, len(data) - 1):
        path.unlink()
        path.write_bytes(data[:size])
        assert "pack-damaged" in codes(check(history.backend, quick=True))


def test_heads(history: History) -> None:
    path = history.folder / HEAD_NAME
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    assert codes(check(history.backend)) == {"head-damaged"}
    path.unlink()
    assert codes(check(history.backend)) == {"head-missing"}
    now = head.decode(data)
    lie = head.build([(s.pack, history.store.toc(s.pack)) for s in now.states])
    path.write_bytes(data.replace(b'"timestamp":1', b'"timestamp":2'))
    assert codes(check(history.backend, quick=True)) == {"head-differs"}
    path.write_bytes(head.encode(lie))
    assert check(history.backend).findings == ()


def test_no_store(tmp_path: Path) -> None:
    report = check(History(tmp_path, 0).backend)
    assert codes(report) == {"head-missing"}
    assert report.serial is None


def test_what_does_not_matter_is_no_damage(history: History) -> None:
    (history.folder / "notes.txt").write_bytes(b"mine")
    (history.folder / "000001-0000000000000000.pack").write_bytes(b"not a pack")
    (history.folder / "000009-0000000000000000.pack").write_bytes(b"not a pack")
    (history.folder / condemned.NAME).write_bytes(b"?")
    report = check(history.backend)
    assert not report.damaged
    found = {finding.code: finding.severity for finding in report.findings}
    assert found["foreign"] is Severity.WARNING
    assert found["gc-state"] is Severity.WARNING
    assert found["unnamed-pack"] is Severity.INFO
    assert found["pack-damaged"] is Severity.WARNING


def test_a_finding_for_programs(history: History) -> None:
    (history.folder / "x").write_bytes(b"")
    finding = check(history.backend, quick=True).findings[0]
    assert finding.to_json() == {
        "severity": "warning",
        "code": "foreign",
        "where": "x",
        "text": "not a file of a store",
    }


def test_a_store_that_changes_meanwhile(history: History) -> None:
    """gc drops and deletes in the middle of a check: it looks again, and finds nothing wrong."""
    told: list[str] = []

    def progress(text: str) -> None:
        told.append(text)
        if len(told) == 1:
            gc.run(
                history.backend, gc.Options(keep=1, grace=0, rewrite_below=1.0, rewrite_gain=0.0)
            )

    report = check(history.backend, progress=progress)
    assert report.findings == ()
