"""``tidings-mirror`` as an operator runs it: real processes, exit codes, what they leave."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.repos import DAY, START, apt, evolve, packages, rpm_md
from tidings_server import cli, publish

FEW = packages(40)


def run(
    *arguments: str | Path, code: int = 0, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command and checks its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "tidings_server.cli", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(env or {})},
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def events(*arguments: str | Path, code: int = 0, **more: Any) -> list[dict[str, Any]]:
    done = run(*arguments, "--json", code=code, **more)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found[-1]["type"] in ("summary", "error")
    return [event for event in found if event["type"] != "progress"]


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        status = path.stat()
        found[str(path)] = (status.st_mtime_ns, status.st_ino, status.st_size)
    return found


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    rpm_md(tmp_path / "repo", FEW)
    return tmp_path / "repo"


def test_publish_change_publish(repo: Path) -> None:
    first = events("publish", repo)[-1]
    assert (first["changed"], first["serial"], first["failed"]) == (True, 1, 0)
    pack = repo / "tidings" / first["pack"]
    assert pack.stat().st_size == first["pack_bytes"]
    assert first["missing_engines"] == []
    before = listing(repo)
    again = events("publish", repo)[-1]
    assert (again["changed"], again["serial"]) == (False, 1)
    assert listing(repo) == before
    rpm_md(repo, evolve(FEW, seed=1), timestamp=START + DAY)
    tidings = listing(repo / "tidings")
    text = run("publish", repo).stdout
    assert "snapshot 2" in text and "% of" in text
    now = listing(repo / "tidings")
    changed = {name for name in now if now[name] != tidings.get(name)} - {str(repo / "tidings")}
    assert {Path(name).suffix for name in changed} == {".pack", ".json"} and len(changed) == 2
    for path in (repo / "tidings").iterdir():
        assert path.stat().st_mode & 0o777 == 0o644
    assert (repo / "tidings").stat().st_mode & 0o777 == 0o755


def test_the_umask_does_not_matter(repo: Path) -> None:
    before = os.umask(0o077)
    try:
        run("publish", repo)
    finally:
        os.umask(before)
    assert (repo / "tidings").stat().st_mode & 0o777 == 0o755
    assert {p.stat().st_mode & 0o777 for p in (repo / "tidings").iterdir()} == {0o644}


def test_a_plan(repo: Path) -> None:
    before = listing(repo)
    plan = events("publish", "--plan", repo)[-1]
    assert plan["plan"] is True and plan["changed"] is True
    assert {file["path"] for file in plan["files"]} >= {"repodata/repomd.xml"}
    assert "would take in" in run("publish", "--plan", repo).stdout
    assert listing(repo) == before


def test_several_of_which_one_fails(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = events("publish", tmp_path / "empty", repo, code=3)
    assert [event["type"] for event in found] == ["failed", "publish", "summary"]
    assert found[0]["error"]["code"] == "no-metadata"
    assert (found[-1]["published"], found[-1]["failed"]) == (1, 1)
    done = run("publish", tmp_path / "empty", repo, code=3)
    assert done.stderr.count("error: ") == 1


def test_recursive(tmp_path: Path) -> None:
    for number in range(3):
        rpm_md(tmp_path / f"top/f/{number}", evolve(FEW, seed=number))
    apt(tmp_path / "top/debian", FEW)
    assert events("publish", "--recursive", tmp_path / "top")[-1]["published"] == 4
    before = listing(tmp_path / "top")
    found = events("publish", "--recursive", tmp_path / "top")[-1]
    assert (found["unchanged"], found["published"]) == (4, 0)
    assert listing(tmp_path / "top") == before
    (tmp_path / "none").mkdir()
    done = run("publish", "--recursive", tmp_path / "none", code=4)
    assert f"{tmp_path / 'none'}: no repository" in done.stderr
    assert "no such folder" in run("publish", "--recursive", tmp_path / "x", code=4).stderr
    assert "no such folder" in run("publish", tmp_path / "x", code=4).stderr


def test_records_with_a_base_elsewhere_are_named(repo: Path) -> None:
    repomd = repo / "repodata/repomd.xml"
    text = repomd.read_text()
    repomd.write_text(text.replace("<location href", '<location xml:base="http://a.b/" href', 1))
    assert "xml:base" in run("publish", repo).stdout


def test_a_store_tree(repo: Path, tmp_path: Path) -> None:
    before = listing(repo)
    run("publish", repo, "--store", tmp_path / "S", "--as", "f/43")
    assert (tmp_path / "S/f/43/tidings/head.json").is_file()
    assert listing(repo) == before
    run("publish", repo, "--store", tmp_path / "S", code=2)
    run("publish", repo, "--store", tmp_path / "S", "--as", "../out", code=4)
    assert not (tmp_path / "out").exists()
    rows = events("snapshots", repo, "--store", tmp_path / "S", "--as", "f/43")
    assert rows[-1]["snapshots"] == 1


def test_a_place_that_holds_another_layout(repo: Path, tmp_path: Path) -> None:
    apt(tmp_path / "debian", FEW)
    place: list[str | Path] = ["--store", tmp_path / "S", "--as", "p"]
    run("publish", repo, *place)
    before = listing(tmp_path / "S")
    for more in ([], ["--plan"]):
        found = events("publish", tmp_path / "debian", *place, *more, code=4)
        assert found[-1]["error"]["code"] == "other-layout"
        assert "--rebuild" in found[-1]["error"]["message"]
    assert listing(tmp_path / "S") == before
    assert events("publish", tmp_path / "debian", *place, "--rebuild")[-1]["serial"] == 2


def test_snapshots_and_stats(repo: Path) -> None:
    for day in range(3):
        rpm_md(repo, evolve(FEW, seed=day), timestamp=START + day * DAY)
        run("publish", repo, "--keep", "2")
    rows = [event for event in events("snapshots", repo) if event["type"] == "snapshot"]
    assert [row["serial"] for row in rows] == [2, 3]
    for row in rows:
        assert (repo / "tidings" / row["pack"]).stat().st_size == row["pack_bytes"]
    assert len(run("snapshots", repo).stdout.splitlines()) == 3
    stats = events("stats", repo)[-1]
    kinds = ("frame", "index", "edge", "dictionary", "toc", "head")
    assert sum(stats[f"{kind}_bytes"] for kind in kinds) == stats["bytes"]
    assert stats["bytes"] == sum(p.stat().st_size for p in (repo / "tidings").iterdir())
    assert (stats["packs"], stats["snapshots"]) == (3, 2)
    assert "tables of contents" in run("stats", repo).stdout
    run("stats", repo / "repodata", code=4)


def test_settings_from_a_file(repo: Path, tmp_path: Path) -> None:
    file = tmp_path / "mirror.toml"
    file.write_text(f'[publish]\nkeep = 1\n[[repo]]\npath = "a"\nroot = "{repo}"\n')
    assert events("publish", "--config", file)[-1]["published"] == 1
    environment = {"TIDINGS_MIRROR_CONFIG": str(file)}
    assert events("publish", env=environment)[-1]["unchanged"] == 1
    assert "fine" in run("config", "check", "--config", file).stdout
    assert "1 repository: 0 published, 1 unchanged" in run("publish", "--config", file).stdout
    main = repo / "repodata/repomd.xml"
    main.rename(tmp_path / "repomd.xml")
    found = events("publish", "--config", file, code=4)
    assert [event["type"] for event in found] == ["failed", "summary"]
    (tmp_path / "repomd.xml").rename(main)
    file.write_text("[publsh]\nkeep = 1\n[serve]\nport = -1\n")
    done = run("config", "check", "--config", file, code=4)
    assert len(done.stderr.splitlines()) == 2
    assert events("config", "check", "--config", file, code=4)[-1]["error"]["code"] == "config"
    run("publish", repo, "--config", tmp_path / "none.toml", code=4)
    run("publish", code=2)


def test_usage() -> None:
    for arguments in [[], ["publish", "--keep", "0"], ["publish", "--layout", "yum"], ["fly"]]:
        run(*arguments, code=2)


#: Ways to break a repository, each with the code of its error.
BROKEN = [
    ("truncate repomd", "broken-metadata"),
    ("remove primary", "missing-files"),
    ("shorten primary", "wrong-size"),
    ("flip primary", "wrong-checksum"),
    ("climb", "unsafe-path"),
    ("link out", "outside"),
]


@pytest.mark.parametrize(("how", "code"), BROKEN)
def test_bad_input_leaves_all_as_it_was(repo: Path, tmp_path: Path, how: str, code: str) -> None:
    run("publish", repo)
    rpm_md(repo, evolve(FEW, seed=4), timestamp=START + DAY)
    repomd = repo / "repodata" / "repomd.xml"
    primary = next((repo / "repodata").glob("*primary*"))
    data = bytearray(primary.read_bytes())
    if how == "truncate repomd":
        repomd.write_bytes(repomd.read_bytes()[:-30])
    elif how == "remove primary":
        primary.unlink()
    elif how == "shorten primary":
        primary.write_bytes(data[:-1])
    elif how == "flip primary":
        data[100] ^= 1
        primary.write_bytes(data)
    elif how == "climb":
        repomd.write_text(repomd.read_text().replace(f"repodata/{primary.name}", "../../x"))
    else:
        shutil.move(primary, tmp_path / "outside")
        primary.symlink_to(tmp_path / "outside")
    before = listing(repo / "tidings")
    event = events("publish", repo, code=4)[-1]
    assert event["error"]["code"] == code
    assert listing(repo / "tidings") == before


def test_a_symlink_may_lead_where_the_operator_says(repo: Path, tmp_path: Path) -> None:
    primary = next((repo / "repodata").glob("*primary*"))
    (tmp_path / "shared").mkdir()
    shutil.move(primary, tmp_path / "shared" / "p")
    primary.symlink_to(tmp_path / "shared" / "p")
    run("publish", repo, code=4)
    run("publish", repo, "--follow", tmp_path / "shared")


def test_waiting_for_an_rsync(repo: Path) -> None:
    primary = next((repo / "repodata").glob("*primary*"))
    data = primary.read_bytes()
    primary.unlink()
    started = time.monotonic()
    run("publish", repo, code=4)
    command = [sys.executable, "-m", "tidings_server.cli", "publish", "--retry", "60", str(repo)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "waiting for it to settle" in process.stderr.readline()
        primary.write_bytes(data)
        assert process.wait(60) == 0
    assert time.monotonic() - started < 60
    assert (repo / "tidings" / "head.json").is_file()


def test_a_publish_waits_for_another_one(
    repo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (repo / "tidings").mkdir()
    descriptor = os.open(repo / "tidings", os.O_RDONLY)
    command = [sys.executable, "-m", "tidings_server.cli", "publish", str(repo)]
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        monkeypatch.setattr(publish, "_LOCK_PATIENCE", 0.1)
        assert cli.main(["publish", "--json", str(repo)]) == 9
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["code"] == "locked"
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            told = process.stderr.readline()
            assert f"at work on {repo / 'tidings'}, waiting 60 s" in told
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            assert not (repo / "tidings" / "head.json").exists()
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            assert process.wait(60) == 0
    finally:
        os.close(descriptor)
    assert (repo / "tidings" / "head.json").is_file()


def test_quiet_says_nothing_of_success(repo: Path) -> None:
    done = run("publish", "--quiet", repo)
    assert (done.stdout, done.stderr) == ("", "")
    assert (repo / "tidings" / "head.json").exists()


def test_a_damaged_store(repo: Path) -> None:
    run("publish", repo)
    head = repo / "tidings" / "head.json"
    data = head.read_bytes()
    head.write_bytes(data[:-50])
    before = listing(repo)
    assert events("publish", repo, code=8)[-1]["error"]["code"] == "store-head"
    for arguments, code in (([repo], 8), (["--recursive", repo.parent], 3)):
        told = run("publish", *arguments, code=code).stderr
        assert str(repo) in told  # or the operator of many has to search
        assert "tidings-mirror check" in told
        assert "tidings-mirror repair" in told
    run("snapshots", repo, code=8)
    assert listing(repo) == before
    head.write_bytes(data)
    next((repo / "tidings").glob("*.pack")).unlink()
    rpm_md(repo, evolve(FEW, seed=4), timestamp=START + DAY)
    run("publish", repo, code=8)
    assert events("publish", "--rebuild", repo)[-1]["serial"] == 2


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write")
def test_a_read_only_tree(repo: Path) -> None:
    prefix = ["setpriv", "--reuid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    for path in [repo, *repo.parents]:
        if os.access(path, os.W_OK) and path.stat().st_uid == os.geteuid() and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | 0o055)
        if path.name.startswith("pytest-of"):
            break
    if os.geteuid() != 0:
        repo.chmod(0o555)
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "tidings_server.cli", "publish", str(repo), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (4, 10) or "Permission" in done.stderr:
        pytest.skip(f"another user cannot run Python here: {done.stderr[-200:]}")
    assert done.returncode == 10, done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["error"]["code"] == "permission"
    assert not (repo / "tidings").exists()


def test_nobody_reads_the_output(repo: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "tidings_server.cli", "publish", str(repo)],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert "Traceback" not in done.stderr
    assert (repo / "tidings" / "head.json").is_file()


def test_interrupted(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    rpm_md(repo, FEW)
    next((repo / "repodata").glob("*primary*")).unlink()
    command = [sys.executable, "-m", "tidings_server.cli", "publish", "--retry", "600", str(repo)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert "Traceback" not in process.stderr.read()


def test_serve_says_what_is_wrong(tmp_path: Path) -> None:
    run("serve", code=4)
    run("serve", tmp_path / "none", code=4)
    run("serve", tmp_path, "--host", "203.0.113.1", "--port", "0", code=10)
