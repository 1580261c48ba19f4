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


@dataclass
class Rig5(Rig):
    """See the module."""

    def __post_init__(self) -> None:
        self.chroot = chroot_folder()
        super().__post_init__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        place = Path(f"{self.chroot}{self.folder}")
        if place.is_dir():
            place.rmdir()  # its mounts were other namespaces'

    def configure(self, **main: str) -> None:
        super().configure(**main)
        home = self.folder / "home"
        inside = home / "tidings-inside"
        inside.write_text(f'#!/bin/sh\nexec chroot /host {self.command} "$@"\n')
        inside.chmod(0o755)
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
        root, folder = shlex.quote(str(self.chroot)), shlex.quote(str(self.folder))
        script = f"""
            set -e
            mount --make-rprivate /
            mkdir -p {root}{folder}
            mount --rbind / {root}/host
            mount --bind {folder} {root}{folder}
            mount --bind /proc {root}/proc
            mount --bind /dev {root}/dev
            mount --bind {folder}/etc/plugins {root}/etc/dnf/plugins
            mount --bind {folder}/actions {root}/etc/dnf/libdnf5-plugins/actions.d
            mount --bind {folder}/libexec {root}/usr/libexec/tidings
            chroot {root} "$@"
        """
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
        return ["unshare", "-m", "sh", "-c", script, "sh", *dnf, *words]

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
