"""The rig for dnf5: the same servers and repositories, dnf5 in a chroot of Debian sid.

Mounts are made in a namespace of each run's own, so nothing is left behind. The client runs on
the host's Python: the chroot sees the host at /host.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.dnf import PLUGINS, Rig, Run
from support.system import ROOT


def chroot_folder() -> Path:
    """The chroot, or the test skips."""
    folder = Path(os.environ.get("TIDINGS_DNF5_CHROOT", ROOT / ".make" / "dnf5-chroot"))
    if not (folder / "usr/bin/dnf5").exists():
        pytest.skip(f"no dnf5 in {folder}: scripts/dnf5-chroot makes it (root, debootstrap)")
    if os.geteuid() != 0:
        pytest.skip("needs root for the chroot")
    done = subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True)
    if done.returncode:
        pytest.skip("no mount namespaces here")
    return folder


def inside(chroot: Path, folder: Path, mounts: Sequence[str], words: Sequence[str]) -> list[str]:
    """*words*, to be run in the chroot, where *folder* has the path that it has outside.

    *mounts* are lines of shell, with ``{root}`` and ``{folder}``.
    """
    root, there = shlex.quote(str(chroot)), shlex.quote(str(folder))
    lines = [
        "set -e",
        "mount --make-rprivate /",
        "mkdir -p {root}{folder}",
        "mount --rbind / {root}/host",
        "mount --bind {folder} {root}{folder}",
        "mount --bind /proc {root}/proc",
        "mount --bind /dev {root}/dev",
        *mounts,
        'exec chroot {root} "$@"',
    ]
    script = "\n".join(line.format(root=root, folder=there) for line in lines)
    return ["unshare", "-m", "sh", "-c", script, "sh", *words]


def run_on_the_host(home: Path, command: Path) -> Path:
    """A program for the chroot that runs *command* on the host's Python."""
    program = home / "tidings-inside"
    program.write_text(f'#!/bin/sh\nexec chroot /host {command} "$@"\n')
    program.chmod(0o755)
    return program


def leave(chroot: Path, folder: Path) -> None:
    """Remove what ``inside`` made; its mounts were other namespaces'."""
    place = Path(f"{chroot}{folder}")
    if place.is_dir():
        place.rmdir()


@dataclass
class Sid4(Rig):
    """dnf 4 of the chroot, newer than that of the system; runs the tests of dnf 4."""

    def __post_init__(self) -> None:
        self.chroot = chroot_folder()
        if not (self.chroot / "usr/bin/dnf-3").exists():
            pytest.skip(f"no dnf 4 in {self.chroot}")
        if self.user is not None:
            pytest.skip("mounts need root")
        super().__post_init__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        leave(self.chroot, self.folder)

    def service_at(self, url: str) -> None:
        program = run_on_the_host(self.folder / "home", self.command)
        (self.folder / "etc" / "plugins" / "tidings.conf").write_text(
            f"[main]\nenabled=1\ncommand={program}\n[repos]\n" + (f"many = {url}\n" if url else "")
        )

    def command_line(self, *words: str) -> list[str]:
        self.program = "/usr/bin/dnf-3"
        return inside(self.chroot, self.folder, [], super().command_line(*words))


@dataclass
class Rig5(Rig):
    """See the module."""

    def __post_init__(self) -> None:
        self.chroot = chroot_folder()
        super().__post_init__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        leave(self.chroot, self.folder)

    def configure(self, **main: str) -> None:
        super().configure(**main)
        run_on_the_host(self.folder / "home", self.command)
        for name in ("libexec", "actions"):
            (self.folder / name).mkdir(exist_ok=True)
        for name in ("tidings_dnf.py", "tidings-dnf5"):
            shutil.copy(PLUGINS / name, self.folder / "libexec" / name)
        if self.plugin:
            shutil.copy(PLUGINS / "tidings.actions", self.folder / "actions")
        else:
            (self.folder / "actions" / "tidings.actions").unlink(missing_ok=True)

    def service_at(self, url: str) -> None:
        (self.folder / "etc" / "plugins" / "tidings.conf").write_text(
            f"[main]\ncommand={self.folder}/home/tidings-inside\n[repos]\n"
            + (f"many = {url}\n" if url else "")
        )

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def command_line(self, *words: str) -> list[str]:
        mounts = [
            "mount --bind {folder}/etc/plugins {root}/etc/dnf/plugins",
            "mount --bind {folder}/actions {root}/etc/dnf/libdnf5-plugins/actions.d",
            "mount --bind {folder}/libexec {root}/usr/libexec/tidings",
        ]
        options = {
            "reposdir": self.folder / "etc" / "repos",
            "cachedir": self.cache,
            "system_cachedir": self.cache,
            "logdir": self.folder / "log",
            "gpgcheck": 0,
            "zchunk": 0,
            "timeout": 5,
            "retries": 1,
            "skip_if_unavailable": 0,
        }
        dnf = ["dnf5", "-y", *(f"--setopt={name}={value}" for name, value in options.items())]
        dnf.append(f"--installroot={self.folder}/root")
        return inside(self.chroot, self.folder, mounts, [*dnf, *words])

    def dnf(self, *words: str, prefix: Sequence[str] = ()) -> Run:
        assert not prefix
        return super().dnf(*words)

    def packages(self, *words: str) -> list[str]:
        run = self.dnf("-C", "repoquery", "--qf", "P %{name}-%{version}\\n", *words)
        assert not run.origin, "-C used the network"
        assert not run.service, "-C used the network"
        return sorted(line[2:] for line in run.output.splitlines() if line.startswith("P "))

    def log(self) -> list[str]:
        path = next(self.folder.rglob("dnf5.log"), None)
        lines = path.read_text().splitlines() if path else []
        return [line for line in lines if "tidings: " in line]
