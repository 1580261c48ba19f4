"""Real package managers with folders of their own: nothing of the system is read or changed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from support.dnf import dnf_program
from support.system import require


def run(*command: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """What a command said; it must end well."""
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=240,
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C", **(env or {})},
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}"
    return done.stdout


class Dnf:
    """dnf with the repository at *url*; it asks anew each time."""

    def __init__(self, folder: Path, url: str) -> None:
        self.root = folder / "root"
        for name in ("repos", "cache", "log", "root"):
            (folder / name).mkdir(parents=True)
        (folder / "repos" / "many.repo").write_text(
            f"[many]\nname=many\nbaseurl={url}\ngpgcheck=0\nmetadata_expire=0\n"
        )
        self.command = [
            *(dnf_program(), "-y", "--noplugins", f"--installroot={self.root}"),
            *("--releasever=43", f"--setopt=reposdir={folder / 'repos'}"),
            *(f"--setopt=cachedir={folder / 'cache'}", f"--setopt=logdir={folder / 'log'}"),
            *("--setopt=retries=1", "--forcearch=x86_64"),
        ]

    def packages(self) -> set[str]:
        """name-version-release of all that can be installed."""
        query = ["repoquery", "--refresh", "--qf", "P %{name}-%{version}-%{release}"]
        said = run(*self.command, *query)
        return {line[2:] for line in said.splitlines() if line.startswith("P ")}

    def install(self, name: str) -> None:
        """Install a package."""
        run(*self.command, "install", "--setopt=install_weak_deps=0", name)

    def has(self, path: str) -> bool:
        """Whether a file is installed."""
        return (self.root / path).exists()


class Zypper:
    """zypper with the repository at *url*."""

    def __init__(self, folder: Path, url: str) -> None:
        program = require("zypper")
        self.root = folder / "root"
        self.root.mkdir(parents=True)
        self.command = [program, "--root", self.root, "--non-interactive", "--no-gpg-checks"]
        run(*self.command, "addrepo", "--refresh", url, "many")

    def packages(self) -> set[str]:
        """name-version-release of all that can be installed."""
        run(*self.command, "refresh", "--force")
        said = run(*self.command, "search", "-s", "-t", "package")
        rows = [[cell.strip() for cell in line.split("|")] for line in said.splitlines()]
        return {f"{row[1]}-{row[3]}" for row in rows if len(row) > 4 and row[2] == "package"}

    def install(self, name: str) -> None:
        """Install a package."""
        run(*self.command, "install", "--no-recommends", name)

    def has(self, path: str) -> bool:
        """Whether a file is installed."""
        return (self.root / path).exists()


class Apt:
    """apt-get with *source*, the rest of a ``deb`` line."""

    def __init__(self, folder: Path, source: str, architecture: str = "amd64") -> None:
        require("apt-get")
        for name in ("state/lists/partial", "cache/archives/partial", "etc", "log", "out"):
            (folder / name).mkdir(parents=True)
        (folder / "state" / "status").write_text("")
        (folder / "etc" / "sources.list").write_text(f"deb [trusted=yes] {source}\n")
        self.folder = folder
        options = {
            "Dir": "/nonexistent",
            "Dir::State": folder / "state",
            "Dir::State::status": folder / "state" / "status",
            "Dir::Cache": folder / "cache",
            "Dir::Etc": folder / "etc",
            "Dir::Etc::sourcelist": folder / "etc" / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::Etc::main": "-",
            "Dir::Etc::parts": "-",
            "Dir::Log": folder / "log",
            "Dir::Bin::methods": "/usr/lib/apt/methods",
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Acquire::Retries": "0",
            "APT::Update::Error-Mode": "any",
        }
        self.options = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]

    def update(self) -> str:
        """``apt-get update``."""
        return run(require("apt-get"), *self.options, "update")

    def packages(self) -> set[str]:
        """name-version of all that can be installed."""
        said = run(require("apt-cache"), *self.options, "dumpavail").splitlines()
        names = [line[9:] for line in said if line.startswith("Package: ")]
        numbers = [line[9:] for line in said if line.startswith("Version: ")]
        return {f"{name}-{number}" for name, number in zip(names, numbers, strict=True)}

    def version(self, name: str) -> str:
        """The candidate's."""
        said = run(require("apt-cache"), *self.options, "show", name)
        return next(line[9:] for line in said.splitlines() if line.startswith("Version: "))

    def download(self, name: str) -> bytes:
        """The package's file."""
        run(require("apt-get"), *self.options, "download", name, cwd=self.folder / "out")
        return next((self.folder / "out").iterdir()).read_bytes()
