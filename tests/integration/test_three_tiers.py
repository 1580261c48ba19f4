"""Three tiers on one machine: an origin that replays real histories, a mirror that follows it, an
edge that pulls through; and real dnf, zypper and apt that know of none of it.

Each tier is a process of its own, with a counting wire between two. The origin is plain nginx; the
mirror is ``tidings-mirror follow`` with either ``tidings-mirror serve`` or nginx on its tree.
"""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import createrepo_c
import pytest

from support.clients import Apt, Dnf, Zypper
from support.edge import RunningEdge, edge_settings, start_edge
from support.servers import Servers, Wire

Packages = set[str]
RPM = {"linux-surface-f39": "linux/surface/39", "trivy-el7": "aqua/trivy/7"}
SUITE = "tur/dists/tur-packages"


def versions(shared_data: Path, history: str) -> list[Path]:
    return sorted(path for path in (shared_data / history).iterdir() if path.is_dir())


def dated(version: Path) -> float:
    """When an apt version was made; one of the history is older than the one before it."""
    text = re.search(r"^Date: .*? (.*) \+0000$", (version / "Release").read_text(), re.MULTILINE)
    assert text
    return time.mktime(time.strptime(text[1], "%d %b %Y %H:%M:%S"))


def onward(history: list[Path]) -> list[Path]:
    """The versions that are newer than all before them: a mirror takes no other."""
    kept: list[Path] = []
    for version in history:
        if not kept or dated(version) > dated(kept[-1]):
            kept.append(version)
    return kept


def of_rpm(version: Path) -> Packages:
    """name-version-release of each package, as another reader of the format finds them."""
    found: Packages = set()

    def take(package: createrepo_c.Package) -> bool:
        if package.arch in ("x86_64", "noarch"):
            found.add(f"{package.name}-{package.version}-{package.release}")
        return True

    (primary,) = (version / "repodata").glob("*-primary.xml.*")
    createrepo_c.xml_parse_primary(str(primary), pkgcb=take, do_files=False)
    return found


def of_apt(version: Path) -> Packages:
    text = gzip.decompress((version / "tur/binary-aarch64/Packages.gz").read_bytes()).decode()
    found = re.findall(r"^Package: (.*)\nVersion: (.*)$", text, re.MULTILINE)
    return {f"{name}-{number}" for name, number in found}


def published_bytes(old: Path, new: Path) -> int:
    """Of the files of *new* that *old* has not; what a plain mirror of a mirror would fetch."""
    had = {path.read_bytes() for path in old.rglob("*") if path.is_file()}
    files = [path for path in new.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if path.read_bytes() not in had)


@dataclass
class Tiers:
    """Origin, mirror and edge, and what went between them."""

    origin: Path  #: the origin's tree
    follow: list[str]
    to_origin: Wire
    to_mirror: Wire
    edge: RunningEdge

    def put(self, path: str, version: Path) -> None:
        """The origin publishes *version*, as mirrors do: the old files are gone."""
        tree = self.origin / path
        if tree.exists():
            shutil.rmtree(tree)
        shutil.copytree(version, tree, copy_function=shutil.copyfile)
        for each in (tree, *tree.rglob("*")):
            each.chmod(0o755 if each.is_dir() else 0o644)

    def step(self) -> None:
        """The mirror looks at its upstreams, and the edge's state is no longer fresh."""
        done = subprocess.run(self.follow, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        time.sleep(1.1)
        self.to_mirror.reset()


@pytest.fixture(params=["serve", "nginx"])
def make_tiers(
    request: pytest.FixtureRequest, servers: Servers, tmp_path: Path
) -> Callable[[list[str]], Tiers]:
    def make(paths: list[str]) -> Tiers:
        origin, mirror = tmp_path / "origin", tmp_path / "mirror"
        for folder in (origin, mirror):
            folder.mkdir()
        to_origin = servers.wire(servers.nginx(origin).url)
        config = tmp_path / "mirror.toml"
        followed = {
            path: {"root": str(mirror / path), "urls": [f"{to_origin.url}/{path}/"]}
            for path in paths
        }
        state = f'[follow]\nstate = "{tmp_path / "state"}"\n'
        config.write_text(state + edge_settings(followed))
        site = (
            servers.mirror(mirror, "--cache", tmp_path / "mirror-cache")
            if request.param == "serve"
            else servers.nginx(mirror)
        )
        to_mirror = servers.wire(site.url)
        pulled = {path: {"urls": [f"{to_mirror.url}/{path}/"]} for path in paths}
        follow = [sys.executable, "-m", "tidings_server.cli", "follow", "--once"]
        return Tiers(
            origin,
            [*follow, "--config", str(config)],
            to_origin,
            to_mirror,
            start_edge(servers, tmp_path / "edge", pulled),
        )

    return make


def replay_rpm(tiers: Tiers, history: list[Path], path: str, folder: Path) -> list[str]:
    """Step by step; the lines of a table."""
    url = f"{tiers.edge.url}/{path}/"
    machines: list[Dnf | Zypper] = [Dnf(folder / "dnf", url), Zypper(folder / "zypper", url)]
    lines = []
    for number, version in enumerate(history):
        tiers.put(path, version)
        tiers.step()
        right = of_rpm(version)
        for machine in machines:
            assert machine.packages() == right, (version.name, type(machine).__name__)
        moved = tiers.to_mirror.received + tiers.to_mirror.sent
        if number:
            full = published_bytes(history[number - 1], version)
            lines.append(f"| {path} | {number} | {full:,} | {moved:,} |")
            if full > 100_000:
                assert moved < full / 4, (version.name, moved, full)
    return lines


def replay_apt(tiers: Tiers, history: list[Path], folder: Path) -> list[str]:
    source = f"{tiers.edge.url}/tur tur-packages tur"
    apt = Apt(folder / "apt", source, architecture="aarch64")
    lines = []
    for number, version in enumerate(history):
        tiers.put(SUITE, version)
        tiers.step()
        apt.update()
        assert apt.packages() == of_apt(version), version.name
        moved = tiers.to_mirror.received + tiers.to_mirror.sent
        if number:
            full = published_bytes(history[number - 1], version)
            lines.append(f"| {SUITE} | {number} | {full:,} | {moved:,} |")
            assert moved < full / 4, (version.name, moved, full)
    return lines


def show(lines: list[str]) -> None:
    print("\n| repository | step | changed files as published | mirror to edge |")
    print("|---|---:|---:|---:|", *lines, sep="\n")


def test_some_versions(
    make_tiers: Callable[[list[str]], Tiers], shared_data: Path, tmp_path: Path
) -> None:
    tiers = make_tiers([RPM["trivy-el7"], SUITE])
    apt = onward(versions(shared_data, "tur-aarch64"))[:3]
    tiers.put(SUITE, apt[0])
    rpm = versions(shared_data, "trivy-el7")[::25]
    lines = replay_rpm(tiers, rpm, RPM["trivy-el7"], tmp_path)
    show([*lines, *replay_apt(tiers, apt, tmp_path)])


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("history", [*RPM, "tur-aarch64"])
def test_every_version(
    history: str, make_tiers: Callable[[list[str]], Tiers], shared_data: Path, tmp_path: Path
) -> None:
    every = versions(shared_data, history)
    if history in RPM:
        path = RPM[history]
        show(replay_rpm(make_tiers([path]), every, path, tmp_path))
    else:
        show(replay_apt(make_tiers([SUITE]), onward(every), tmp_path))
