"""Runs over several repositories: jobs, retries, plans, outcomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.repos import evolve, packages, rpm_md
from tidings_chunkstore.errors import InputError, TidingsError, UnsettledError
from tidings_chunkstore.publisher import Options
from tidings_server import publish
from tidings_server.publish import Job
from tidings_server.settings import PublishSettings, RepoSettings

FEW = packages(12)


def job(root: Path) -> Job:
    return Job(root, root / "tidings", Options())


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in folder.rglob("*"):
        status = path.stat()
        found[str(path)] = (status.st_mtime_ns, status.st_ino)
    return found


def test_where_stores_lie(tmp_path: Path) -> None:
    plain = publish.jobs_for([tmp_path / "a", tmp_path / "b"], PublishSettings())
    assert [j.store for j in plain] == [tmp_path / "a/tidings", tmp_path / "b/tidings"]
    tree = PublishSettings(store=tmp_path / "S")
    (one,) = publish.jobs_for([tmp_path / "a"], tree, name="x/y/")
    assert one.store == tmp_path / "S/x/y/tidings"
    rpm_md(tmp_path / "m/f/43", FEW)
    (found,) = publish.jobs_below(tmp_path / "m", tree)
    assert found.store == tmp_path / "S/f/43/tidings"
    assert tmp_path / "m" in found.options.follow


@pytest.mark.parametrize(
    ("count", "name", "tree"), [(1, None, True), (2, "x", True), (1, "../x", True), (1, "x", False)]
)
def test_stores_that_have_no_place(tmp_path: Path, count: int, name: str, tree: bool) -> None:
    settings = PublishSettings(store=tmp_path if tree else None)
    with pytest.raises(InputError):
        publish.jobs_for([tmp_path] * count, settings, name=name)


def test_configured_repositories_say_what_differs(tmp_path: Path) -> None:
    repos = [
        RepoSettings("a", tmp_path / "a", keep=3, direct=0),
        RepoSettings("b/c", tmp_path / "b", store=tmp_path / "own"),
    ]
    first, second = publish.jobs_of(repos, PublishSettings(keep=9, keep_days=2, direct=4))
    assert (first.options.keep, first.options.keep_seconds, first.options.direct) == (3, 172800, 0)
    assert first.store == tmp_path / "a/tidings"
    assert (second.options.keep, second.options.direct) == (9, 4)
    assert second.store == tmp_path / "own/b/c/tidings"


def test_an_unchanged_one_is_not_touched(tmp_path: Path) -> None:
    rpm_md(tmp_path, FEW)
    (first,) = publish.run([job(tmp_path)])
    assert first.report is not None and first.report.changed
    before = listing(tmp_path)
    (second,) = publish.run([job(tmp_path)])
    assert second.report is not None and not second.report.changed
    assert listing(tmp_path) == before


def test_a_plan_writes_nothing(tmp_path: Path) -> None:
    rpm_md(tmp_path, FEW)
    (first,) = publish.run([job(tmp_path)], plan_only=True)
    assert first.plan is not None and first.plan.serial == 1
    assert all(change.new for change in first.plan.changes)
    assert first.plan.changed_bytes == first.plan.published_bytes
    assert not (tmp_path / "tidings").exists()
    list(publish.run([job(tmp_path)]))
    rpm_md(tmp_path, evolve(FEW, seed=1))
    before = listing(tmp_path)
    (second,) = publish.run([job(tmp_path)], plan_only=True)
    assert listing(tmp_path) == before
    assert second.plan is not None and second.plan.serial == 2
    changed = {change.path: change.new for change in second.plan.changes}
    assert changed["repodata/repomd.xml"] is False
    assert any("primary" in path for path in changed)
    assert any("primary" in path for path in second.plan.gone)
    (done,) = publish.run([job(tmp_path)])
    assert done.report is not None
    assert done.report.changed_bytes == second.plan.changed_bytes


def test_one_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    rpm_md(tmp_path / "good", FEW)
    (tmp_path / "bad").mkdir()
    bad, good = publish.run([job(tmp_path / "bad"), job(tmp_path / "good")])
    assert isinstance(bad.error, TidingsError) and bad.error.code == "no-metadata"
    assert good.report is not None and good.report.changed


def test_waiting_for_a_tree_to_settle(tmp_path: Path) -> None:
    rpm_md(tmp_path / "a", FEW)
    rpm_md(tmp_path / "b", FEW)
    held = next((tmp_path / "a" / "repodata").glob("*primary*"))
    data = held.read_bytes()
    held.unlink()
    naps: list[float] = []
    told: list[str] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            held.write_bytes(data)

    outcomes = list(
        publish.run(
            [job(tmp_path / "a"), job(tmp_path / "b")],
            retry=60,
            sleep=sleep,
            waiting=lambda job, error, left: told.append(error.code),
        )
    )
    assert [o.job.root.name for o in outcomes] == ["b", "a"]  # the settled one goes first
    assert all(o.report is not None and o.report.changed for o in outcomes)
    assert naps == [1, 2, 4]
    assert set(told) == {"missing-files"}


def test_waiting_ends(tmp_path: Path) -> None:
    rpm_md(tmp_path, FEW)
    next((tmp_path / "repodata").glob("*primary*")).write_bytes(b"half")
    (outcome,) = publish.run([job(tmp_path)], retry=0.02)
    assert isinstance(outcome.error, UnsettledError)
    assert not (tmp_path / "tidings").exists()


def test_engines_that_clients_may_lack() -> None:
    assert publish.missing_engines(["zlib", "zstd-1.4.4", "zstd-1.5.7"]) == ["zstd-1.4.4"]
