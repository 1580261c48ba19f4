"""A rig for dnf: real rpms, real repositories, an origin and a Tidings service that log requests.

    rig = Rig(folder, builds)           # builds: what ``build_packages`` made once
    rig.origin_has(1); rig.service_has(1)
    run = rig.dnf("makecache")
    assert run.origin.paths == ["/repodata/repomd.xml"]

Everything lies below *folder* and talks to 127.0.0.1 only; dnf works in an installroot there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest

from support.servers import Misbehaving, Wire
from support.system import ROOT, require

PLUGINS = ROOT / "client" / "dnf-plugins"
PACKAGES = 150  #: in each version of the repository
CHANGED = 3  #: packages that are newer in the next version

_SPEC = """\
%{{lua:
  print("Name: many\\nVersion: 1\\nRelease: 1\\nSummary: Many\\nLicense: MIT\\n")
  print("BuildArch: noarch\\n")
  print("%description\\nMany.\\n")
  for i = {first}, {last} do
    local n = "pack" .. i
    print("%package -n " .. n .. "\\nVersion: {version}\\nSummary: Package " .. i .. " of " ..
      (i * 7919 % 10007) .. "\\nProvides: feature" .. (i * 31) .. " = " .. i ..
      "\\n%description -n " .. n .. "\\nAbout " .. (i * 104729 % 99991) .. " and " ..
      (i * 1299709 % 15485863) .. ".\\n%files -n " .. n .. "\\n/usr/share/many/" .. n .. "\\n")
  end
}}
%install
mkdir -p %{{buildroot}}/usr/share/many
for i in $(seq {first} {last}); do echo "$i {version}" >%{{buildroot}}/usr/share/many/pack$i; done
"""

_COMPS = """\
<?xml version="1.0" encoding="UTF-8"?>
<comps><group><id>many</id><name>Many</name><description/><default>false</default>
<uservisible>true</uservisible><packagelist><packagereq type="mandatory">pack1</packagereq>
</packagelist></group></comps>
"""
_UPDATEINFO = """\
<?xml version="1.0" encoding="UTF-8"?>
<updates><update from="a@example.org" status="stable" type="bugfix" version="1"><id>MANY-{n}</id>
<title>pack1</title><issued date="2024-01-0{n} 00:00:00"/><references/><pkglist><collection>
<name>many</name><package name="pack1" version="{n}" release="1" arch="noarch" src="x">
<filename>pack1-{n}-1.noarch.rpm</filename></package></collection></pkglist></update></updates>
"""
_METALINK = """\
<?xml version="1.0" encoding="utf-8"?>
<metalink version="3.0" xmlns="http://www.metalinker.org/"
 xmlns:mm0="http://fedorahosted.org/mirrormanager">
<files><file name="repomd.xml"><mm0:timestamp>{timestamp}</mm0:timestamp><size>{size}</size>
<verification><hash type="sha256">{sha256}</hash></verification>
<resources maxconnections="1">
<url protocol="http" type="http" location="US" preference="100">{url}/repodata/repomd.xml</url>
</resources></file></files></metalink>
"""
_FIRST = 1_700_000_000  # timestamp of version 1, seconds; a day between versions


def dnf_program() -> str:
    """dnf 4, or the test skips."""
    program = require("dnf")
    for other in ("rpmbuild", "createrepo_c", "modifyrepo_c"):
        require(other)
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    if not done.stdout.startswith("4."):
        pytest.skip(f"{program} is not dnf 4: {done.stdout[:40]!r}")
    return program


def _call(*command: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env=dict(env) if env is not None else None,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]} {done.stderr[-2000:]}"


def build_packages(folder: Path, versions: int = 3) -> dict[int, list[Path]]:
    """rpms by version: all in the first, ``CHANGED`` newer ones in each next."""
    built: dict[int, list[Path]] = {}
    for version in range(1, versions + 1):
        last = PACKAGES if version == 1 else CHANGED
        out = folder / str(version)
        out.mkdir(parents=True)
        spec = out / "many.spec"
        spec.write_text(_SPEC.format(first=1, last=last, version=version))
        _call(
            require("rpmbuild"),
            "-bb",
            "--define",
            f"_topdir {out}/top",
            "--define",
            f"_rpmdir {out}/rpms",
            "--define",
            "_build_name_fmt %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm",
            spec,
        )
        built[version] = sorted((out / "rpms").glob("*.rpm"))
        assert len(built[version]) == last
    return built


def make_repository(root: Path, built: Mapping[int, Sequence[Path]], version: int) -> None:
    """Version *version* of the repository at *root*: packages beside repodata/."""
    root.mkdir(parents=True, exist_ok=True)
    for each in range(1, version + 1):
        for rpm in built[each]:
            target = root / rpm.name
            if not target.exists():
                os.link(rpm, target)
    (root / "comps.xml").write_text(_COMPS)
    (root / "updateinfo.xml").write_text(_UPDATEINFO.format(n=version))
    _call(
        require("createrepo_c"), "-q", "--no-database", "--content", "many", "-g", "comps.xml",
        "--revision", version, "--set-timestamp-to-revision", ".", cwd=root,
    )  # fmt: skip
    _call(require("modifyrepo_c"), root / "updateinfo.xml", root / "repodata")
    # The order of versions is in the timestamps, and a test makes versions in one second.
    repomd = root / "repodata" / "repomd.xml"
    stamp = _FIRST + version * 86400
    text = re.sub(r"<timestamp>\d+", f"<timestamp>{stamp}", repomd.read_text())
    repomd.write_text(text)
    for path in root.rglob("repodata/*"):
        os.utime(path, (stamp, stamp))


def _interpreter(user: int | None) -> tuple[str, str]:
    """A Python and a PYTHONPATH with which *user* can run the client; skips the test without."""
    paths = [str(ROOT / part) for part in ("chunkstore", "client", "server")]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    # A virtual environment may lie on an interpreter in somebody's home.
    for python in (sys.executable, f"/usr/bin/python{version}"):
        path = os.pathsep.join([*paths, sysconfig.get_path("purelib")])
        done = subprocess.run(
            ["/bin/sh", "-c", 'exec "$0" -c "import tidings_client.cli, httpx"', python],
            check=False, capture_output=True, user=user, cwd="/", env={"PYTHONPATH": path},
        )  # fmt: skip
        if done.returncode == 0:
            return python, path
    reason = f"user {user} can run no Python {version} with the client's dependencies"
    raise pytest.skip.Exception(reason)


def _link_rpms(source: str, target: str) -> None:
    if source.endswith(".rpm"):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


@dataclass
class Key:
    """A GPG key that signs repomd.xml."""

    home: Path
    public: Path

    @classmethod
    def make(cls, folder: Path) -> Key:
        """A new key without passphrase."""
        gpg = require("gpg")
        home = folder / "gnupg"
        home.mkdir(mode=0o700, parents=True)
        env = {**os.environ, "GNUPGHOME": str(home)}
        _call(
            gpg, "--batch", "--passphrase", "", "--quick-generate-key",
            "Rig <rig@example.org>", "rsa2048", "sign", "never", env=env,
        )  # fmt: skip
        public = folder / "rig.asc"
        _call(gpg, "--batch", "--armor", "--output", public, "--export", env=env)
        return cls(home, public)

    def sign(self, root: Path) -> None:
        """Write repomd.xml.asc."""
        repomd = root / "repodata" / "repomd.xml"
        _call(
            require("gpg"), "--batch", "--yes", "--armor", "--detach-sign", repomd,
            env={**os.environ, "GNUPGHOME": str(self.home)},
        )  # fmt: skip


@dataclass
class Site:
    """A server that can misbehave, behind a wire that counts, behind a front if there is one."""

    server: Misbehaving
    wire: Wire
    mark: int = 0
    front: str = ""  #: base URL of what passes all on to the wire, as a terminator of TLS does

    @property
    def url(self) -> str:
        """Base URL for those who ask."""
        return self.front or self.wire.url

    def reset(self) -> None:
        """Count anew; faults stay."""
        self.mark = len(self.server.seen)
        self.wire.reset()

    @property
    def paths(self) -> list[str]:
        """What was asked for since the reset."""
        return [seen.path for seen in self.server.seen[self.mark :]]

    @property
    def agents(self) -> set[str]:
        """Who asked."""
        return {
            next((v for k, v in seen.headers.items() if k.lower() == "user-agent"), "")
            for seen in self.server.seen[self.mark :]
        }

    @property
    def bytes(self) -> int:
        """HTTP both ways, heads included."""
        return self.wire.sent + self.wire.received


@dataclass
class Run:
    """A run of dnf that ended."""

    code: int
    output: str
    seconds: float
    origin: list[str]
    origin_bytes: int
    service: list[str]
    service_bytes: int

    def ok(self) -> Self:
        """Fails the test unless dnf ended well."""
        assert self.code == 0, self.output
        return self


@dataclass
class Rig:
    """See the module. A context manager."""

    folder: Path
    built: Mapping[int, Sequence[Path]]
    key: Key | None = None
    metalink: bool = False
    user: int | None = None
    plugin: bool = True
    repo_lines: list[str] = field(default_factory=list)
    main_lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.program = dnf_program()
        for name in ("origin", "service", "root", "etc/repos", "etc/plugins", "plugins", "home"):
            (self.folder / name).mkdir(parents=True)
        self._stack = contextlib.ExitStack()
        self.origin = self._site("origin")
        self.service = self._site("service")
        for name in ("tidings.py", "tidings_dnf.py"):
            # As packages do it: the plugin among the plugins, the shared part elsewhere.
            place = "plugins" if name == "tidings.py" else "home"
            shutil.copy(PLUGINS / name, self.folder / place / name)
        plugin = self.folder / "plugins" / "tidings.py"
        plugin.write_text(
            plugin.read_text().replace("/usr/libexec/tidings", str(self.folder / "home"))
        )
        self.command = self.folder / "home" / "tidings"
        python, paths = _interpreter(self.user)
        self.command.write_text(
            f'#!/bin/sh\nPYTHONPATH={paths} exec {python} -m tidings_client.cli "$@"\n'
        )
        self.command.chmod(0o755)
        self.configure()

    def _site(self, name: str) -> Site:
        server = self._stack.enter_context(Misbehaving(self.folder / name))
        return Site(server, self._stack.enter_context(Wire(server.url)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- what the servers have -------------------------------------------------------------------

    def _tree(self, version: int) -> Path:
        root = self.folder / "trees" / str(version)
        if not root.exists():
            # Making one takes a second, so all rigs of a run share what they copy from.
            made = self.built[1][0].parents[2] / f"tree-{version}-{bool(self.key)}"
            if not made.exists():
                unfinished = made.with_suffix(".new")
                make_repository(unfinished, self.built, version)
                if self.key is not None:
                    self.key.sign(unfinished)
                unfinished.rename(made)
            shutil.copytree(made, root, copy_function=_link_rpms)
        return root

    def origin_has(self, version: int) -> None:
        """The origin publishes *version*."""
        root = self.origin.server.root
        shutil.rmtree(root)
        shutil.copytree(self._tree(version), root, copy_function=os.link)
        repomd = (root / "repodata" / "repomd.xml").read_bytes()
        (root / "metalink").write_text(
            _METALINK.format(
                timestamp=_FIRST + version * 86400,
                size=len(repomd),
                sha256=hashlib.sha256(repomd).hexdigest(),
                url=self.origin.url,
            )
        )

    def service_has(self, version: int, tree: Path | None = None) -> None:
        """The service publishes *version* (or *tree*) as its next snapshot."""
        root = self.service.server.root
        shutil.rmtree(root / "repodata", ignore_errors=True)
        shutil.copytree((tree or self._tree(version)) / "repodata", root / "repodata")
        self.tidings_mirror("publish", root)

    def both_have(self, version: int) -> None:
        """Origin and service publish *version*."""
        self.origin_has(version)
        self.service_has(version)

    def tidings_mirror(self, *words: object) -> None:
        """Run the operator's command."""
        paths = os.pathsep.join(str(ROOT / part) for part in ("chunkstore", "client", "server"))
        _call(
            sys.executable, "-m", "tidings_server.cli", *words,
            env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip

    def forged_tree(self, version: int) -> Path:
        """A self-consistent tree newer than *version*, with a package that nobody published."""
        root = self.folder / "trees" / "forged"
        if not root.exists():
            shutil.copytree(self._tree(version), root)
            evil = root / "evil-1-1.noarch.rpm"
            shutil.copy(next(root.glob("pack9-*.rpm")), evil)
            for path in (root / "repodata").iterdir():
                path.unlink()
            (root / "repodata").rmdir()
            make_repository(root, dict.fromkeys(range(1, 10), ()), 9)
            if self.key is not None:
                (root / "repodata" / "repomd.xml.asc").write_bytes(
                    (self._tree(version) / "repodata" / "repomd.xml.asc").read_bytes()
                )
        return root

    # -- dnf -------------------------------------------------------------------------------------

    def configure(self, **main: str) -> None:
        """Write dnf's and the plugin's configuration."""
        etc = self.folder / "etc"
        options = {
            "cachedir": "/cache",
            "reposdir": str(etc / "repos"),
            "logdir": "/log",
            "persistdir": "/persist",
            "pluginpath": str(self.folder / "plugins") if self.plugin else "/nowhere",
            "pluginconfpath": str(etc / "plugins"),
            "gpgcheck": "0",
            "zchunk": "0",
            "timeout": "5",
            "retries": "1",
            **main,
        }
        lines = [f"{name}={value}" for name, value in options.items()] + self.main_lines
        (etc / "dnf.conf").write_text("[main]\n" + "\n".join(lines) + "\n")
        where = (
            f"metalink={self.origin.url}/metalink"
            if self.metalink
            else f"baseurl={self.origin.url}"
        )
        more = []
        if self.key is not None:
            shutil.copy(self.key.public, self.folder / "home" / "key.asc")
            more = ["repo_gpgcheck=1", f"gpgkey=file://{self.folder}/home/key.asc"]
        (etc / "repos" / "many.repo").write_text(
            "\n".join(["[many]", "name=Many", where, *more, *self.repo_lines]) + "\n"
        )
        # Older than any cache: dnf takes a newer .repo file for a reason to ask anew.
        os.utime(etc / "repos" / "many.repo", (_FIRST, _FIRST))
        self.service_at(self.service.url)

    def service_at(self, url: str) -> None:
        """The plugin's configuration names *url* for the repository; empty: none."""
        (self.folder / "etc" / "plugins" / "tidings.conf").write_text(
            f"[main]\nenabled=1\ncommand={self.command}\n[repos]\n"
            + (f"many = {url}\n" if url else "")
        )

    def command_line(self, *words: str) -> list[str]:
        """dnf with *words*."""
        base = [
            self.program, "-y", "--config", str(self.folder / "etc" / "dnf.conf"),
            "--installroot", str(self.folder / "root"), "--releasever", "1",
        ]  # fmt: skip
        return [*base, *words]

    def environment(self) -> dict[str, str]:
        """Nothing of the test's own Python."""
        return {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.folder / "home"),
            "LC_ALL": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def start(self, *words: str, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
        """dnf, running, in a process group of its own."""
        return subprocess.Popen(
            [*prefix, *self.command_line(*words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment(),
            cwd=self.folder,
            start_new_session=True,
            user=self.user,
            group=self.user,
            extra_groups=[] if self.user is not None else None,
        )

    def dnf(self, *words: str, prefix: Sequence[str] = ()) -> Run:
        """Run dnf to its end and count."""
        self.origin.reset()
        self.service.reset()
        started = time.monotonic()
        process = self.start(*words, prefix=prefix)
        try:
            output, _ = process.communicate(timeout=120)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        return Run(
            process.returncode, output, time.monotonic() - started,
            self.origin.paths, self.origin.bytes, self.service.paths, self.service.bytes,
        )  # fmt: skip

    # -- what dnf has ----------------------------------------------------------------------------

    @property
    def cache(self) -> Path:
        """dnf's cache folder."""
        return self.folder / "root" / "cache"

    @property
    def live(self) -> Path:
        """dnf's folder of the repository."""
        return next(iter(sorted(self.cache.glob("many-*"))), self.cache / "many-none")

    def cached_version(self) -> str | None:
        """Which tree's repomd.xml is in dnf's cache: "1", "forged", None."""
        repomd = self.live / "repodata" / "repomd.xml"
        if not repomd.exists():
            return None
        data = repomd.read_bytes()
        for tree in sorted((self.folder / "trees").iterdir()):
            if (tree / "repodata" / "repomd.xml").read_bytes() == data:
                return tree.name
        return "unknown"

    def packages(self, *words: str) -> list[str]:
        """What dnf, from its cache alone, says there is."""
        run = self.dnf("-C", "repoquery", "--qf", "P %{name}-%{version}", *words)
        assert not run.origin and not run.service, "-C used the network"
        return sorted(line[2:] for line in run.output.splitlines() if line.startswith("P "))

    def expected(self, version: int) -> list[str]:
        """What dnf should list with *version*."""
        return sorted(
            rpm.name.removesuffix("-1.noarch.rpm")
            for each in range(1, version + 1)
            for rpm in self.built[each]
        )

    def log(self) -> list[str]:
        """The plugin's lines in dnf's log."""
        path = next((self.folder / "root").rglob("dnf.log"), None)
        lines = path.read_text().splitlines() if path else []
        return [line for line in lines if "tidings: " in line]


def folder_for() -> Iterator[Path]:
    """A temporary folder that other users can reach, too; removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="tidings-dnf-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
