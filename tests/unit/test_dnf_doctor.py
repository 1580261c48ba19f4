"""What ``tidings doctor`` says of dnf's plugins, their settings, their command and their caches."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tidings_client import dnfdoctor
from tidings_client.dnfdoctor import dnf_checks, our_caches
from tidings_client.doctor import FAILED, MISSING, OK, Check

PLUGINS = Path(__file__).resolve().parents[2] / "client" / "dnf-plugins"
LIBEXEC = "usr/libexec/tidings"
DNF4 = "usr/lib/python3/dist-packages/dnf-plugins"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with dnf 4 and its plugin, as packages install them."""
    root = tmp_path / "machine"
    for name, folder in (("tidings.py", DNF4), ("tidings_dnf.py", LIBEXEC)):
        (root / folder).mkdir(parents=True)
        shutil.copy(PLUGINS / name, root / folder)
    (root / "etc/dnf/plugins").mkdir(parents=True)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("dnf", "echo 4.14.0"), ("tidings", "echo tidings 9.9")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    return root


def configure(root: Path, text: str) -> None:
    (root / "etc/dnf/plugins/tidings.conf").write_text(text)


def by_name(root: Path) -> dict[str, Check]:
    return {check.name: check for check in dnf_checks(root)}


def test_all_is_in_place(root: Path) -> None:
    for text in (None, "[main]\ntimeout = 30 ; s\n[repos]\ncopr:a:b:c = off\n"):
        if text is not None:
            configure(root, text)
        checks = by_name(root)
        assert {check.status for check in checks.values()} == {OK}, checks
        assert "tidings 9.9" in checks["dnf command"].text
        assert LIBEXEC in checks["dnf plugins' part"].text


def test_the_line_of_a_mistake_is_named(root: Path) -> None:
    configure(root, "[main]\nenabled = 1\ntimeout = abc\n")
    check = by_name(root)["dnf configuration"]
    assert check.status == FAILED
    assert "tidings.conf: line 3: timeout: 'abc'" in check.text
    configure(root, "[repos]\nu = m.example.org\n\nv = of\n")
    check = by_name(root)["dnf configuration"]
    assert check.status == FAILED
    assert "line 2: u: " in check.text
    assert "line 4: v: " in check.text


def test_switched_off(root: Path) -> None:
    configure(root, "[main]\nenabled = no  # for now\n")
    check = by_name(root)["dnf configuration"]
    assert (check.status, "switched off" in check.text) == (MISSING, True)


@pytest.mark.parametrize(
    ("script", "says"),
    [(None, "does not start"), ("exit 3", "ends with 3"), ("echo GNU hello 2", "is not tidings"),
     ("exec sleep 9", "does not end")],
)  # fmt: skip
def test_the_command_is_started(
    root: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, says: str
) -> None:
    command = root / "fetch"
    if script is not None:
        command.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
        command.chmod(0o755)
    monkeypatch.setattr(dnfdoctor, "_SECONDS", 1.0)
    configure(root, f"[main]\ncommand = {command}\n")
    check = by_name(root)["dnf command"]
    assert check.status == FAILED
    assert says in check.text
    assert str(command) in check.text


def test_the_plugins_part_is_looked_for_where_they_do(root: Path) -> None:
    (root / LIBEXEC / "tidings_dnf.py").rename(root / DNF4 / "tidings_dnf.py")
    assert by_name(root)["dnf plugins' part"] == Check(
        "dnf plugins' part", OK, str(root / DNF4 / "tidings_dnf.py")
    )
    (root / DNF4 / "tidings_dnf.py").write_text("def broken(:\n")
    assert by_name(root)["dnf plugins' part"].status == FAILED
    (root / DNF4 / "tidings_dnf.py").unlink()
    check = by_name(root)["dnf plugins' part"]
    assert check.status == MISSING
    assert f"{LIBEXEC}/tidings_dnf.py" in check.text
    assert '"Installing" in docs/dnf.md' in check.text


def test_without_plugin_it_says_how_to_install(root: Path) -> None:
    shutil.rmtree(root / "usr")
    checks = by_name(root)
    assert list(checks) == ["dnf", "dnf 4 plugin"]
    assert "tidings-dnf4" in checks["dnf 4 plugin"].text
    assert '"Installing" in docs/dnf.md' in checks["dnf 4 plugin"].text


def test_dnf5_needs_its_helper(root: Path) -> None:
    (root.parent / "bin" / "dnf").write_text("#!/bin/sh\necho dnf5 version 5.4.6.0\n")
    for path in ("etc/dnf/libdnf5-plugins/actions.d/tidings.actions",
                 "usr/lib64/libdnf5/plugins/actions.so"):  # fmt: skip
        (root / path).parent.mkdir(parents=True)
        (root / path).write_text("")
    check = by_name(root)["dnf 5 helper"]
    assert check.status == MISSING
    assert "tidings-dnf5 cannot be run" in check.text
    shutil.copy(PLUGINS / "tidings-dnf5", root / LIBEXEC)
    assert by_name(root)["dnf 5 helper"].status == OK


def with_log(cache: Path) -> Path:
    (cache / "tidings").mkdir(parents=True)
    facts = {
        "v": 1, "time": 1_700_000_000, "repo": cache.name, "program": "dnf4", "url": "u",
        "bytes": 1, "requests": 1, "bytes_full": 9, "requests_full": 4,
    }  # fmt: skip
    (cache / "tidings" / "saved.jsonl").write_text(json.dumps(facts) + "\n")
    return cache


def test_caches_that_dnf_s_configuration_names(root: Path, tmp_path: Path) -> None:
    first = with_log(tmp_path / "srv" / "cache-43")
    second = with_log(tmp_path / "five")
    (root / "etc/dnf/dnf.conf").write_text(
        f"nonsense\n[main]\ncachedir={tmp_path}/srv/cache-$releasever\nexclude=a:b\n"
    )
    assert first not in our_caches({"HOME": str(tmp_path)}, root)  # dnf refuses such a file
    (root / "etc/dnf/dnf.conf").write_text(
        f"[main]\ngpgcheck=1\ncachedir={tmp_path}/srv/cache-$releasever\nexclude=50%\n"
    )
    drop_in = root / "etc/dnf/libdnf5.conf.d"
    drop_in.mkdir()
    (drop_in / "a.conf").write_text(f"[main]\nsystem_cachedir = {second}\n")
    (drop_in / "b.conf").write_bytes(b"\xff\x00[")
    assert our_caches({"HOME": str(tmp_path)}, root)[:2] == [first, second]


def test_doctor_prints_what_was_saved_and_who_is_skipped(tmp_path: Path) -> None:
    """The command itself, with a user's log and one that would have crashed it."""
    cache = with_log(tmp_path / ".cache" / "libdnf5")
    log = cache / "tidings" / "saved.jsonl"
    log.write_text(log.read_text() + log.read_text().replace("1700000000", "1" + "0" * 30))
    mirrors = cache / "tidings" / "mirrors.json"
    until = {"https://far.example.org/u": 9e9, "https://m.example.org/u": time.time() + 90_000}
    mirrors.write_text(json.dumps(until))
    run = [sys.executable, "-m", "tidings_client.cli", "doctor", "--dnf"]
    environment = {"HOME": str(tmp_path), "PATH": str(tmp_path)}
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment)
    assert done.stderr == ""
    assert "libdnf5" in done.stdout
    assert "2023-11-14 22:13" in done.stdout
    assert "https://m.example.org/u (nothing is published there)" in done.stdout
    assert "far.example.org" not in done.stdout
    assert f"remove {mirrors}\n" in done.stdout
