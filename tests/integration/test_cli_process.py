"""``tidings`` as a process: what it prints, how it ends, what it leaves, over real servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support import repos
from support.servers import Misbehaving, Servers, free_port
from tidings_chunkstore import publisher
from tidings_chunkstore.backends import LocalBackend
from tidings_client.cli import main

COMMAND = [sys.executable, "-m", "tidings_client.cli"]


def tidings(
    *arguments: str | Path, code: int = 0, **environ: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environ},
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def events(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def files(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (root / "repodata").iterdir()}


def publish(root: Path, number: int) -> None:
    made = repos.packages(200)
    for step in range(number):
        made = repos.evolve(made, step)
    repos.rpm_md(root, made, codec="gz", timestamp=repos.START + number * repos.DAY)
    publisher.publish(root, LocalBackend(root / "tidings"))


@pytest.fixture
def repo(misbehaving: Misbehaving) -> Misbehaving:
    """A server that can lie, over a published repository."""
    publish(misbehaving.root, 0)
    return misbehaving


def test_a_day_in_a_mirrors_life(tmp_path: Path, servers: Servers) -> None:
    root, dest = tmp_path / "www" / "updates", tmp_path / "updates"
    publish(root, 0)
    wire = servers.wire(servers.nginx(tmp_path / "www", gzip=True).url)
    url = f"{wire.url}/updates"
    first = tidings("sync", url, dest)
    assert first.stdout.startswith("updates: ")
    assert first.stdout.count("\n") == 1
    assert first.stdout.endswith("trust: transport\n")
    assert first.stderr == ""
    assert files(dest) == files(root)

    wire.reset()
    [summary] = [e for e in events(tidings("sync", url, dest, "--json")) if e["type"] == "summary"]
    assert (summary["changed"], summary["requests"], wire.requests) == (False, 1, 1)
    assert (summary["bytes_received"], summary["bytes_sent"]) == (wire.received, wire.sent)

    publish(root, 1)
    before = files(dest)
    wire.reset()
    plan = tidings("sync", url, dest, "--plan", TIDINGS_JSON="1")
    assert events(plan)[-1]["changed"] is True
    assert wire.requests == 1
    assert files(dest) == before, "a plan does nothing"
    wire.reset()
    *_, last = events(tidings("sync", url, dest, "--json"))
    assert last["type"] == "summary"
    assert last.keys() >= {
        "v", "repo", "route", "changed", "bytes_received", "bytes_sent", "bytes_full", "requests",
        "seconds", "trust", "fallback_reason", "files",
    }  # fmt: skip
    assert (last["bytes_received"], last["bytes_sent"]) == (wire.received, wire.sent)
    assert last["requests"] == wire.requests
    assert last["route"] == "delta"
    assert last["bytes_full"] > last["bytes_received"]
    assert files(dest) == files(root)

    assert tidings("sync", "-q", url, dest).stdout == ""
    assert "all as repodata/repomd.xml says" in tidings("verify", dest).stdout


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_finds_what_is_wrong(repo: Misbehaving, tmp_path: Path, as_json: bool) -> None:
    dest = tmp_path / "dest"
    tidings("sync", repo.url, dest)
    primary, other = (
        next(p for p in (dest / "repodata").iterdir() if name in p.name)
        for name in ("primary", "other")
    )
    data = bytearray(primary.read_bytes())
    data[50] ^= 1
    primary.write_bytes(data)
    other.unlink()
    done = tidings("verify", dest, *(["--json"] if as_json else []), code=6)
    if as_json:
        found = events(done)
        assert {(e["path"], e["problem"]) for e in found if e["type"] == "finding"} == {
            (f"repodata/{primary.name}", "checksum"),
            (f"repodata/{other.name}", "missing"),
        }
        assert found[-1]["error"]["code"] == "damaged"
    else:
        assert len(done.stdout.splitlines()) == 2
        assert done.stderr.startswith("error: ")
    tidings("sync", repo.url, dest)
    assert files(dest) == files(repo.root)


def test_verify_knows_what_was_left_out(repo: Misbehaving, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    tidings("sync", "--types", "primary", repo.url, dest)
    assert "more are named and not here" in tidings("verify", dest).stdout
    next(p for p in (dest / "repodata").iterdir() if "primary" in p.name).unlink()
    tidings("verify", dest, code=6)


def test_verify_of_a_plain_download(tmp_path: Path) -> None:
    """No state of ours: everything that is named must be there."""
    root = tmp_path / "repo"
    repos.rpm_md(root, repos.packages(20), codec="zst")
    tidings("verify", root)
    next(p for p in (root / "repodata").iterdir() if "other" in p.name).unlink()
    assert "missing" in tidings("verify", root, code=6).stdout
    assert not (root / ".tidings").exists()


def test_verify_follows_no_symlink(tmp_path: Path) -> None:
    """Sync would not read through one either: the file behind it is somebody else's."""
    root = tmp_path / "repo"
    repos.rpm_md(root, repos.packages(20), codec="zst")
    primary = next(p for p in (root / "repodata").iterdir() if "primary" in p.name)
    primary.rename(tmp_path / "elsewhere")
    primary.symlink_to(tmp_path / "elsewhere")
    found = events(tidings("verify", root, "--json", code=6))
    assert [(e["path"], e["problem"]) for e in found if e["type"] == "finding"] == [
        (f"repodata/{primary.name}", "symlink")
    ]
    done = tidings("verify", root, code=6)
    assert done.stdout.count(primary.name) == 1
    assert "remove it" in done.stdout
    assert "remove what is no regular file, then tidings sync" in done.stderr
    main_file = root / "repodata/repomd.xml"
    main_file.rename(tmp_path / "repomd.xml")
    main_file.symlink_to(tmp_path / "repomd.xml")
    assert events(tidings("verify", root, "--json", code=4))[-1]["error"]["code"] == "symlink"
    main_file.unlink()
    main_file.mkdir()
    assert events(tidings("verify", root, "--json", code=4))[-1]["error"]["code"] == "not-a-file"


def test_verify_of_apt(tmp_path: Path) -> None:
    root = tmp_path / "dists"
    repos.apt(root, repos.packages(20))
    tidings("verify", root)
    (root / "Release").write_bytes(
        (root / "Release").read_bytes().replace(b"Packages", b"Package5")
    )
    assert "Release: differs" in tidings("verify", root, code=6).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["sync", "ftp://example.org/", "D"], 4, "bad-url"),
        (["sync", "http://", "D"], 4, "bad-url"),
        (["sync", "http://h/?q", "D"], 4, "bad-url"),
        (["sync", "U", "D", "--types", "no such"], 4, "unknown-type"),
        (["sync", "U", "D", "--repomd-sha256", "12"], 4, "bad-sha256"),
        (["sync", "U", "D", "--repomd-sha256", "0" * 64], 6, "wrong-sha256"),
        (["sync", "U", "D", "--gpgkey", "/nowhere"], 4, "bad-key"),
        (["sync", "U", "D", "--seed", "/nowhere"], 4, "no-seed"),
        (["sync", "U", "F"], 4, "not-a-folder"),
        (["verify", "D"], 4, "no-metadata"),
        (["verify", "F"], 4, "no-metadata"),
    ],
)
def test_bad_input_is_one_line_and_a_code(
    repo: Misbehaving,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    word: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("not a folder")
    names = {"U": repo.url, "D": str(tmp_path / "dest"), "F": str(tmp_path / "file")}
    arguments = [names.get(a, a) for a in arguments]
    assert main([*arguments, "--json"]) == code
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["type"], last["error"]["code"]) == ("error", word)
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    assert not (tmp_path / "dest" / "repodata").exists()


def test_nobody_there(tmp_path: Path) -> None:
    done = tidings("sync", f"http://127.0.0.1:{free_port()}/", tmp_path / "d", "--json", code=5)
    assert events(done)[-1]["error"]["code"] == "connect"


def test_a_second_mirror_helps(repo: Misbehaving, tmp_path: Path) -> None:
    dead = f"http://127.0.0.1:{free_port()}/"
    tidings("sync", dead, tmp_path / "a", "--mirror", repo.url)
    tidings("sync", dead, tmp_path / "b", TIDINGS_MIRROR=f"{dead} {repo.url}")
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(repo.root)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_leaves_the_old_state(
    repo: Misbehaving, tmp_path: Path, how: signal.Signals
) -> None:
    dest = tmp_path / "dest"
    tidings("sync", repo.url, dest)
    before = files(dest)
    publish(repo.root, 1)
    repo.fault(r"\.pack$|repodata", stall_at=100)
    asked = len(repo.seen)
    process = subprocess.Popen(
        [*COMMAND, "sync", repo.url, str(dest), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 20
    while len(repo.seen) < asked + 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(how)
    sent = time.monotonic()
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - sent < 3
    assert process.returncode == 130, out + err
    assert json.loads(out.splitlines()[-1])["error"]["code"] == "interrupted"
    assert err == ""
    assert files(dest) == before
    repo.heal()
    tidings("sync", repo.url, dest)
    assert files(dest) == files(repo.root)


def test_a_reader_that_has_gone_is_no_traceback(repo: Misbehaving, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*COMMAND, "sync", repo.url, str(tmp_path / "d"), "--json"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    os.close(writing)
    assert done.returncode == 10
    assert done.stderr == ""


def test_doctor(repo: Misbehaving) -> None:
    assert "engine zlib" in tidings("doctor").stdout
    found = events(tidings("doctor", repo.url, "--json"))
    checks = {e["name"]: e["status"] for e in found if e["type"] == "check"}
    assert checks[repo.url] == checks[f"{repo.url} ranges"] == "ok"
    repo.fault(r"\.pack$", ignore_range=True)
    (repo.root / "tidings" / "head.json").write_text("{}")
    assert "failed" in tidings("doctor", repo.url, code=5).stdout


def test_no_news_cost_little_time(repo: Misbehaving, tmp_path: Path) -> None:
    """The goal is 0.4 s with Python's start; here it is held against that start alone."""
    dest = tmp_path / "dest"
    tidings("sync", repo.url, dest)
    modules = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tidings_client.cli", "sync", repo.url, dest],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    loaded = {line.rpartition("|")[2].strip() for line in modules.splitlines()}
    assert "tidings_client.sync" in loaded
    heavy = {
        "fastcdc",
        "blake3",
        "backports.zstd",
        "pyzstd",
        "numpy",
        "fastapi",
        "pydantic",
        "rich",
    }
    ours = {"update", "chunkroute", "plan", "assemble", "stock", "verify", "doctor"}
    assert not loaded & (heavy | {f"tidings_client.{name}" for name in ours})
    assert not loaded & {"tidings_chunkstore.layout", "tidings_chunkstore.head"}
