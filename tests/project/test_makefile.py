"""The Makefile, the CI script, the locks and the helpers beside them fit together."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from support import system

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def targets() -> set[str]:
    listed = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert listed
    return set(listed[1].split())


def test_every_target_has_a_help_line() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"]},
    )
    shown = set(re.findall(r"make ([a-z-]+) ", done.stdout))
    assert shown == targets()


def test_help_is_what_a_bare_make_shows() -> None:
    assert ".DEFAULT_GOAL := help" in MAKEFILE


def test_ci_runs_targets_that_exist() -> None:
    called = set(re.findall(r"^make (\S+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE))
    assert called == {"test", "check"}
    assert called <= targets()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_targets_that_exist(document: str) -> None:
    named = set(
        re.findall(r"(?:^|`)make ([a-z][a-z-]*)", (ROOT / document).read_text(), re.MULTILINE)
    )
    assert named
    assert named <= targets()


SCRIPTS = sorted(p for p in (ROOT / "scripts").iterdir() if p.is_file() and not p.suffix)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_can_be_run(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["sh", "-n", script], check=True)


def test_locks_name_no_host_and_pin_every_line() -> None:
    assert {lock.stem for lock in LOCKS} == {"build", "client", "dev", "measure", "server"}
    for lock in LOCKS:
        text = lock.read_text().replace("\\\n", " ")
        assert "://" not in text
        for line in text.splitlines():
            assert re.match(r"[a-z0-9-]+==\S+ ", line), line
            assert "--hash=sha256:" in line


def pins(lock: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9-]+)==(\S+)", lock.read_text(), re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


def wanted(requirements: list[str]) -> set[str]:
    names = {re.split(r"[\[><=;! ]", line)[0].lower() for line in requirements}
    return {re.sub(r"[-_.]+", "-", name) for name in names} - {"tidings"}


def test_locks_hold_what_the_project_asks_for_in_one_version() -> None:
    base = wanted(PROJECT["project"]["dependencies"])
    extras = PROJECT["project"]["optional-dependencies"]
    everything = pins(ROOT / "requirements/dev.txt")
    asked = {"client": base, **{name: base | wanted(lines) for name, lines in extras.items()}}
    asked["build"] = wanted(extras["build"])
    assert asked["build"] >= wanted(PROJECT["build-system"]["requires"])
    for lock in LOCKS:
        pinned = pins(lock)
        assert asked[lock.stem] <= set(pinned), lock.name
        for name, versions in pinned.items():
            assert versions <= everything[name], name


def test_no_server_framework_reaches_a_client() -> None:
    assert not {"fastapi", "starlette", "uvicorn", "numpy"} & set(
        pins(ROOT / "requirements/client.txt")
    )


def test_system_packages_lists_what_tests_may_require() -> None:
    listed = system.packages()
    assert listed["nginx"] == "nginx-light"
    required = {
        name
        for file in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"\brequire\(\s*\"([a-z_]+)\"", file.read_text())
    }
    # desync is in Debian's unstable release alone: its tests run where somebody has it.
    assert required - {"desync"} <= set(listed)


def test_find_python_refuses_one_that_does_not_work(tmp_path: Path) -> None:
    shim = tmp_path / "python3.12"
    shim.write_text("#!/bin/sh\necho 'no such version' >&2\nexit 127\n")
    shim.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [ROOT / "scripts/find-python"], capture_output=True, text=True, check=True, env=env
    )
    assert Path(done.stdout.strip()) != shim
    env["PYTHON"] = str(shim)
    refused = subprocess.run(
        [ROOT / "scripts/find-python"], check=False, capture_output=True, env=env
    )
    assert refused.returncode == 1


def test_missing_program_fails_in_ci_where_it_could_be_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(system, "packages", lambda: {"no-such-program": "no-such-package"})
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: "/x" if not path else None)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt-get install no-such-package"):
        system.require("no-such-program")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="apt-get install no-such-package"):
        system.require("no-such-program")
