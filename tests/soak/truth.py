"""What was published, version by version, and whether a client's DEST is one of these.

A version's hashes are known before its first byte can be seen, so every DEST can be judged at any
time: it is byte for byte one version, or it is wrong.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from support.repos import DAY, START, evolve, packages, rpm_md
from tidings_chunkstore.layout import Listing, read_tree, select

MAIN = "repodata/repomd.xml"
CODECS = {"primary": "zst", "filelists": "gz", "other": "xz", "group": "gz", "updateinfo": "bz2"}


class WrongError(Exception):
    """A DEST that is no version, or another one than it may be."""


@dataclass(frozen=True, slots=True)
class Version:
    """One published state. *files*: SHA-256 by path."""

    number: int
    files: Mapping[str, str]
    listing: Listing

    def chosen(self, types: tuple[str, ...] | None) -> dict[str, str]:
        """What a client that wants *types* has of it."""
        paths = {MAIN, *(file.path for file in select(self.listing, types))}
        return {path: digest for path, digest in self.files.items() if path in paths}


def hashes(root: Path) -> dict[str, str]:
    """SHA-256 by path of all published files below *root*."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] not in ("tidings", ".tidings")
    }


@dataclass(slots=True)
class Truth:
    """All versions so far. Thread-safe."""

    _by_main: dict[str, Version] = field(default_factory=dict)
    _known: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, version: Version) -> None:
        """Take a version in, before it can be seen."""
        with self._lock:
            self._by_main[version.files[MAIN]] = version
            self._known |= set(version.files.values())

    def newest(self) -> Version:
        """The version made last."""
        with self._lock:
            return max(self._by_main.values(), key=lambda version: version.number)

    def version(self, found: Mapping[str, str], types: tuple[str, ...] | None) -> Version | None:
        """The version that *found* is, to the last byte; None for nothing at all.

        Raises WrongError.
        """
        version, extra = self.version_within(found, types)
        if extra:
            raise WrongError(f"beside version {version and version.number}: {sorted(extra)}")
        return version

    def version_within(
        self, found: Mapping[str, str], types: tuple[str, ...] | None
    ) -> tuple[Version | None, set[str]]:
        """The version that *found* holds whole, and what else it has of other versions.

        That is what a killed client may leave. Raises WrongError.
        """
        with self._lock:
            if MAIN not in found:
                if not set(found.values()) <= self._known:
                    raise WrongError(f"no version, and unknown bytes: {sorted(found)}")
                return None, set(found)
            version = self._by_main.get(found[MAIN])
            if version is None:
                raise WrongError(f"its {MAIN} was never published")
            wanted = version.chosen(types)
            for path, digest in wanted.items():
                if found.get(path) != digest:
                    state = "missing" if path not in found else "wrong"
                    raise WrongError(f"{path} of version {version.number} is {state}")
            extra = {path for path in found if path not in wanted}
            strange = {path for path in extra if found[path] not in self._known}
            if strange:
                raise WrongError(f"bytes that were never published: {sorted(strange)}")
            return version, extra


class Generator:
    """A repository that changes a bit with each version."""

    def __init__(self, root: Path, scratch: Path, truth: Truth, count: int, seed: int) -> None:
        self.root = root
        self._scratch = scratch
        self._truth = truth
        self._seed = seed
        self._made = packages(count, seed)
        self._number = 0

    def next(self) -> Version:
        """Make the next version, remember its hashes, put it in place as createrepo_c would."""
        self._number += 1
        if self._number > 1:
            seed = self._seed * 1_000_003 + self._number
            self._made = evolve(self._made, seed, 0.01)
        shutil.rmtree(self._scratch, ignore_errors=True)
        rpm_md(
            self._scratch, self._made, codec=CODECS, timestamp=START + self._number * (DAY // 24)
        )
        listing = read_tree(self._scratch, None).listing
        version = Version(self._number, hashes(self._scratch), listing)
        self._truth.add(version)
        self._install(set(version.files))
        return version

    def _install(self, paths: set[str]) -> None:
        """Data first, repomd.xml after it, what is no longer named last; each by rename."""
        folder = self.root / "repodata"
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(paths, key=lambda path: path == MAIN):
            if path != MAIN and (self.root / path).exists():
                continue  # named by its hash
            os.replace(self._scratch / path, self.root / path)
        for file in folder.iterdir():
            if f"repodata/{file.name}" not in paths:
                file.unlink()
