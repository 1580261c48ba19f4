"""Real dnf, zypper and apt with an edge as their mirror, while the mirror behind it moves on."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from email.utils import formatdate
from pathlib import Path

import httpx
import pytest

from support.clients import Apt, Dnf, Zypper, run
from support.dnf import build_packages, dnf_program, make_repository
from support.edge import start_edge
from support.servers import Servers
from support.system import require
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.publisher import publish

PATH = "many/43"


def metadata_bytes(root: Path) -> int:
    """What the published files have together."""
    return sum(file.stat().st_size for file in (root / "repodata").iterdir())


# -- rpm -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Sequence[Path]]:
    dnf_program()
    return build_packages(tmp_path_factory.mktemp("rpms"))


def expected(built: Mapping[int, Sequence[Path]], version: int) -> set[str]:
    return {
        rpm.name.removesuffix(".noarch.rpm")
        for each in range(1, version + 1)
        for rpm in built[each]
    }


@pytest.mark.parametrize("client", [Dnf, Zypper])
def test_rpm_clients_follow_the_mirror_by_its_deltas(
    client: type[Dnf] | type[Zypper],
    built: Mapping[int, Sequence[Path]],
    tmp_path: Path,
    servers: Servers,
) -> None:
    root = tmp_path / "www" / PATH
    make_repository(root, built, 1)
    publish(root, LocalBackend(root / "tidings"))
    origin = servers.mirror(tmp_path / "www", "--cache", tmp_path / "mirror-cache")
    wire = servers.wire(origin.url)
    edge = start_edge(servers, tmp_path / "edge", {PATH: {"urls": [f"{wire.url}/{PATH}"]}})
    machine = client(tmp_path / "client", f"{edge.url}/{PATH}/")
    assert machine.packages() == expected(built, 1)
    for version in (2, 3):
        shutil.rmtree(root / "repodata")  # as a mirror that keeps nothing old
        make_repository(root, built, version)
        publish(root, LocalBackend(root / "tidings"))
        time.sleep(1.1)
        wire.reset()
        assert machine.packages() == expected(built, version)
        assert wire.received < metadata_bytes(root) / 2, (wire.received, metadata_bytes(root))
    machine.install("pack7")
    assert machine.has("usr/share/many/pack7"), "the package came by the redirect"


def test_dnf_while_names_without_checksums_change_beneath_it(
    built: Mapping[int, Sequence[Path]], tmp_path: Path, servers: Servers
) -> None:
    """A state that comes between repomd.xml and the files it names leaves the client at peace."""
    root = tmp_path / "www" / PATH
    options = ["--simple-md-filenames"]
    make_repository(root, built, 1)
    run(require("createrepo_c"), "-q", "--no-database", *options, ".", cwd=root)
    origin = servers.misbehaving(tmp_path / "www")
    edge = start_edge(servers, tmp_path / "edge", {PATH: {"urls": [f"{origin.url}/{PATH}"]}})
    old = (root / "repodata" / "primary.xml.gz").read_bytes()
    machine = Dnf(tmp_path / "client", f"{edge.url}/{PATH}/")
    assert machine.packages() == expected(built, 1)
    # Another program reads the main file only; then the mirror moves on.
    with (
        httpx.Client() as here,
        httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2")) as there,
    ):
        base = f"{edge.url}/{PATH}/repodata"
        first = here.get(f"{base}/repomd.xml").content
        make_repository(root, built, 2)
        run(require("createrepo_c"), "-q", "--no-database", *options, ".", cwd=root)
        time.sleep(1.1)
        second = there.get(f"{base}/repomd.xml").content
        assert first != second
        new = (root / "repodata" / "primary.xml.gz").read_bytes()
        assert here.get(f"{base}/primary.xml.gz").content == old
        assert there.get(f"{base}/primary.xml.gz").content == new
    assert machine.packages() == expected(built, 2)


# -- apt -------------------------------------------------------------------------------------------


class Archive:
    """An apt archive of one real package and many in its index, version by version."""

    def __init__(self, root: Path, *, by_hash: bool, flat: bool) -> None:
        self.root = root
        self.by_hash = by_hash
        self.suite = root if flat else root / "dists" / "stable" / "updates"
        self.index = "." if flat else "main/binary-all"
        self.pool = "" if flat else "pool/main/t/tale/"

    def write(self, version: int) -> None:
        """Publish *version*; files of older ones go, but for by-hash."""
        deb = self._deb(version)
        data = deb.read_bytes()
        text = (
            f"Package: tale\nVersion: {version}\nArchitecture: all\nMaintainer: A <a@example.org>\n"
            f"Filename: {self.pool}{deb.name}\nSize: {len(data)}\n"
            f"SHA256: {hashlib.sha256(data).hexdigest()}\nDescription: a tale\n\n"
        )
        for number in range(400):
            # Every twentieth changes with each version.
            at = version if number % 20 == 0 else 1
            name = hashlib.sha256(f"{number}/{at}".encode()).hexdigest()
            text += (
                f"Package: many{number}\nVersion: {at}\nArchitecture: all\nMaintainer: A <a@b.c>\n"
                f"Filename: {self.pool}many{number}.deb\nSize: {number + 1}\nSHA256: {name}\n"
                f"Description: number {name[:20]}\n\n"
            )
        files = {"Packages": text.encode(), "Packages.gz": gzip.compress(text.encode(), mtime=0)}
        folder = self.suite / self.index
        folder.mkdir(parents=True, exist_ok=True)
        prefix = "" if self.index == "." else f"{self.index}/"
        date = formatdate(1_700_000_000 + version)[:-5]
        release = (
            f"Suite: stable\nCodename: stable\nDate: {date}UTC\n"
            "Architectures: all amd64\nComponents: main\n"
        )
        if self.by_hash:
            release += "Acquire-By-Hash: yes\n"
        for algorithm in ("SHA256", "SHA512"):
            release += f"{algorithm}:\n"
            for name, content in files.items():
                digest = hashlib.new(algorithm, content).hexdigest()
                release += f" {digest} {len(content)} {prefix}{name}\n"
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (self.suite / "Release").write_text(release)

    def _deb(self, version: int) -> Path:
        build = self.root.parent / f"build-{version}"
        (build / "DEBIAN").mkdir(parents=True)
        (build / "DEBIAN" / "control").write_text(
            f"Package: tale\nVersion: {version}\nArchitecture: all\n"
            "Maintainer: A <a@example.org>\nDescription: a tale\n"
        )
        (build / "usr").mkdir()
        target = self.root / self.pool / f"tale_{version}_all.deb"
        target.parent.mkdir(parents=True, exist_ok=True)
        run(require("dpkg-deb"), "--root-owner-group", "-b", build, target)
        return target


@pytest.mark.parametrize("kind", ["by-hash", "by-name", "flat"])
def test_apt_follows_the_mirror_by_its_deltas(kind: str, tmp_path: Path, servers: Servers) -> None:
    require("apt-get")
    archive = Archive(tmp_path / "www" / "deb", by_hash=kind == "by-hash", flat=kind == "flat")
    archive.write(1)
    backend = LocalBackend(archive.suite / "tidings")
    publish(archive.suite, backend)
    wire = servers.wire(servers.mirror(tmp_path / "www", "--cache", tmp_path / "mc").url)
    place = archive.suite.relative_to(tmp_path / "www").as_posix()
    here = place.replace("deb", "inside/debian", 1)
    repos = {here: {"urls": [f"{wire.url}/{place}"]}}
    edge = start_edge(servers, tmp_path / "edge", repos, "--access-log")
    suite = "./" if kind == "flat" else "stable/updates main"
    apt = Apt(tmp_path / "client", f"{edge.url}/inside/debian {suite}")
    apt.update()
    assert apt.version("tale") == "1"
    for version in (2, 3):
        archive.write(version)
        publish(archive.suite, backend)
        full = (archive.suite / archive.index / "Packages.gz").stat().st_size
        time.sleep(1.1)
        wire.reset()
        apt.update()
        assert apt.version("tale") == str(version)
        assert wire.received < full / 2, (wire.received, full)
    by_hash = [line for line in edge.log().splitlines() if "/by-hash/SHA512/" in line]
    assert len(by_hash) == (3 if kind == "by-hash" else 0)
    assert all('"status": 200' in line for line in by_hash)
    deb = archive.root / archive.pool / "tale_3_all.deb"
    assert apt.download("tale") == deb.read_bytes()


def test_apt_reads_what_is_not_held_from_the_upstream(tmp_path: Path, servers: Servers) -> None:
    """Of two types in the Release the edge keeps one: the other is a redirect away."""
    require("apt-get")
    archive = Archive(tmp_path / "www" / "deb", by_hash=True, flat=False)
    archive.write(1)
    (archive.suite / "main" / "source").mkdir()
    (archive.suite / "main" / "source" / "Sources").write_bytes(b"")
    empty = hashlib.sha256(b"").hexdigest()
    release = archive.suite / "Release"
    release.write_text(
        release.read_text().replace("SHA256:\n", f"SHA256:\n {empty} 0 main/source/Sources\n")
    )
    by_hash = archive.suite / archive.index / "by-hash"
    for name in ("Packages", "Packages.gz"):
        data = (archive.suite / archive.index / name).read_bytes()
        for algorithm in ("SHA256", "SHA512"):
            (by_hash / algorithm).mkdir(parents=True, exist_ok=True)
            (by_hash / algorithm / hashlib.new(algorithm, data).hexdigest()).write_bytes(data)
    origin = servers.misbehaving(tmp_path / "www")
    here = "deb/dists/stable/updates"
    repos = {here: {"urls": [f"{origin.url}/{here}"], "types": ["sources"]}}
    edge = start_edge(servers, tmp_path / "edge", repos)
    apt = Apt(tmp_path / "client", f"{edge.url}/deb stable/updates main")
    apt.update()
    assert apt.version("tale") == "1"
    fetched = [seen.path for seen in origin.seen if "Packages" in seen.path]
    assert fetched == [], "not by name"
    assert any("/by-hash/" in seen.path for seen in origin.seen)
