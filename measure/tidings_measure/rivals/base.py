"""What every measured tool is: it publishes on a mirror, and brings clients up to date.

``FileRival`` is the common shape of the rivals: each metadata file for itself, a tree of extra
files beside the published ones on a static web server, and clients that know for free which files
are new and what they are called (Tidings pays for that out of its own bytes).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tidings_chunkstore.errors import VerificationError

from .. import servers
from ..history import History, Opened, Version, VersionFile, changed
from ..process import Usage, find, first_line, run
from ..results import Cost
from ..wire import Wire

_VERSION = re.compile(r"[0-9]+(?:\.[0-9]+)+")
_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
_DOWNLOAD = """
import shutil, sys, urllib.request
with urllib.request.urlopen(sys.argv[1]) as source, open(sys.argv[2], "wb") as sink:
    shutil.copyfileobj(source, sink)
"""


class Unfit(Exception):
    """The tool cannot do this file; the text says why. A client downloads it as published."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Where a tool works: *work* is its own, and outlives an interrupted run."""

    history: History
    work: Path


@dataclass(frozen=True, slots=True)
class Done:
    """An update that was made and verified."""

    cost: Cost
    files: int
    note: str = ""


class Contender:
    """A tool. Used in the order: missing, running (around all else), publish, prepare, update."""

    name = ""
    title = ""
    about = ""  #: one line: how it is run
    programs: tuple[str, ...] = ()
    version_of: tuple[str, ...] = ()  #: the command that says its version
    from_nothing = True  #: whether a client without anything is its business

    def missing(self) -> str | None:
        """Why it cannot take part here, or None."""
        lacking = [program for program in self.programs if find(program) is None]
        return f"no {' and no '.join(lacking)} on PATH" if lacking else None

    def version(self) -> str:
        """What it says its version is."""
        said = first_line(self.version_of) if self.version_of else ""
        match = _VERSION.search(said) or re.search(r"[0-9]+", said)
        return match[0] if match else ""

    @contextlib.contextmanager
    def running(self, bench: Bench) -> Iterator[None]:
        """Its servers run inside."""
        raise NotImplementedError

    @property
    def tree(self) -> Path:
        """The folder whose files a mirror carries for it."""
        raise NotImplementedError

    def publish(self, version: Version, before: Version | None, *, measured: bool) -> None:
        """Bring the mirror from *before* to *version*; *measured*: updates to it are."""
        raise NotImplementedError

    def prepare(self, client: str, version: Version) -> None:
        """*client* will be updated from *version*, which the mirror is at now."""

    def update(self, client: str, base: Version | None, version: Version) -> Done | None:
        """Bring *client* from *base*, or nothing, to *version*; None: this is not its business."""
        raise NotImplementedError


@dataclass(slots=True)
class Place:
    """The folders of a FileRival and its wire."""

    bench: Bench
    www: Path  #: what is served
    tree: Path  #: below it: what a mirror carries
    kept: Path  #: what clients kept from earlier versions
    client: Path  #: the client at work, emptied before each file
    wire: Wire | None = None
    notes: list[str] = field(default_factory=list)


class FileRival(Contender):
    """A rival that handles one file at a time."""

    place: Place

    @contextlib.contextmanager
    def running(self, bench: Bench) -> Iterator[None]:
        www = bench.work / "www"
        self.place = Place(bench, www, www / "tree", bench.work / "kept", bench.work / "client")
        for folder in (self.place.tree, self.place.kept):
            folder.mkdir(parents=True, exist_ok=True)
        with self.served(), self._wired():
            yield

    def served(self) -> contextlib.AbstractContextManager[None]:
        """Start what serves ``place.www`` and set ``place.wire``."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _wired(self) -> Iterator[None]:
        if self.place.wire is not None:
            yield
            return
        with servers.static(self.place.www, self.place.bench.work) as url, Wire(url) as wire:
            self.place.wire = wire
            yield

    @property
    def tree(self) -> Path:
        return self.place.tree

    @property
    def url(self) -> str:
        """The mirror's tree by way of the wire."""
        assert self.place.wire is not None
        return f"{self.place.wire.url}/tree"

    def publish(self, version: Version, before: Version | None, *, measured: bool) -> None:
        for old, file in changed(before, version):
            with contextlib.suppress(Unfit):  # the update says it
                self.add(old, file, version, measured=measured)
            if old is not None:
                self.remove(old)

    def add(
        self, old: VersionFile | None, file: VersionFile, version: Version, *, measured: bool
    ) -> None:
        """Make what the mirror carries for *file*. Raises Unfit."""
        raise NotImplementedError

    def remove(self, old: VersionFile) -> None:
        """Take away what nobody fetches any more, once there is a newer file of its track."""

    def fetch(self, old: VersionFile | None, file: VersionFile) -> tuple[Usage, Path]:
        """Get *file* through the wire into ``place.client``: what it took, and the result.

        The result is the content, or the file as published. Raises Unfit.
        """
        raise NotImplementedError

    def cost(self, usage: Usage) -> Cost:
        """What crossed the wire since the last reset, with *usage*."""
        assert self.place.wire is not None
        return Cost.of(self.place.wire.traffic(), usage)

    def update(self, client: str, base: Version | None, version: Version) -> Done | None:
        if base is None and not self.from_nothing:
            return None
        pairs = changed(base, version)
        total, notes = Cost(), []
        fit = 0
        for old, file in pairs:
            try:
                total += self._measured(old, file)
                fit += 1
            except Unfit as why:
                notes.append(f"{file.track} as published: {why}")
                total += self._whole(file)
        if pairs and not fit:
            self.place.notes += notes
            return None
        return Done(total, len(pairs), "; ".join(notes))

    def _measured(self, old: VersionFile | None, file: VersionFile) -> Cost:
        wire = self.place.wire
        assert wire is not None
        fresh_folder(self.place.client)
        wire.reset()
        usage, result = self.fetch(old, file)
        cost = self.cost(usage)
        self._verify(file, result)
        return cost

    def _whole(self, file: VersionFile) -> Cost:
        """The file downloaded as it is published."""
        fresh_folder(self.place.client)
        whole = self.place.www / "whole"
        whole.mkdir(exist_ok=True)
        link_or_copy(file.source, whole / safe(Path(file.path).name))
        wire = self.place.wire
        assert wire is not None
        if not wire.url.startswith("http"):
            raise NotImplementedError(f"{self.name} has no web server to download from")
        wire.reset()
        url = f"{wire.url}/whole/{safe(Path(file.path).name)}"
        return self.cost(download(url, self.place.client / "whole"))

    def _verify(self, file: VersionFile, result: Path) -> None:
        """Raises VerificationError unless *result* is *file*'s content or its published bytes."""
        with result.open("rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
        if digest not in (self.opened(file).sha256, file.id.hex()):
            raise VerificationError(f"{self.title} made another {file.path}", code="rival")

    # -- for the rivals --------------------------------------------------------------------------

    def opened(self, file: VersionFile) -> Opened:
        """The content of *file*."""
        return self.place.bench.history.opened(file)

    def stem(self, file: VersionFile) -> str:
        """A hash-named file name for *file*, as repodata has them."""
        return f"{file.id.hex()}-{safe(file.track)}"


def download(url: str, target: Path) -> Usage:
    """A plain download: by curl, which package managers build on, or by Python."""
    if find("curl"):
        return run(["curl", "--silent", "--show-error", "--fail", "--output", target, url])
    return run([sys.executable, "-I", "-c", _DOWNLOAD, url, target])


def safe(name: str) -> str:
    """*name* with only letters, digits, dot, underscore and minus."""
    return "".join(c if c in _SAFE else "_" for c in name)


def fresh_folder(folder: Path) -> None:
    """Make *folder* an empty one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def link_or_copy(source: Path, target: Path) -> None:
    """*target* is *source*'s file, linked where the file system can."""
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
