"""The spec for Fedora and RHEL: rpmlint and rpmbuild take it, and it names every file we have."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from support.system import ROOT, require

SPEC = ROOT / "packaging" / "rpm" / "tidings.spec"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)


def test_rpmlint_finds_no_error() -> None:
    done = run(require("rpmlint"), SPEC)
    assert "0 errors" in done.stdout, done.stdout


def test_rpmbuild_makes_a_source_package(tmp_path: Path) -> None:
    rpmbuild = require("rpmbuild")
    if run("git", "-C", ROOT, "rev-parse", "HEAD").returncode:
        pytest.skip("the sources are made from a commit")
    made = run(ROOT / "packaging" / "rpm" / "sources", tmp_path / "sources", "--no-wheels")
    assert made.returncode == 0, made.stderr
    defines = {"_topdir": tmp_path / "top", "_sourcedir": tmp_path / "sources"}
    words = [w for name, value in defines.items() for w in ("--define", f"{name} {value}")]
    done = run(rpmbuild, "-bs", *words, tmp_path / "sources" / "tidings.spec")
    assert done.returncode == 0, done.stderr
    (package,) = (tmp_path / "top" / "SRPMS").glob("tidings-*.src.rpm")
    listed = run("rpm", "-qpl", package).stdout.split()
    assert {"tidings.spec", *(p.name for p in (tmp_path / "sources").iterdir())} == set(listed)


def test_every_subpackage_is_there() -> None:
    names = run("rpmspec", "-q", "--qf", "%{NAME}\n", SPEC).stdout.split()
    parts = ["tidings", "tidings-dnf-common", "tidings-dnf4", "tidings-dnf5"]
    assert names == [*parts, "tidings-server", "tidings-measure"]
