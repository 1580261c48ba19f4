"""A repository that is published and synced: for tests of the client against real servers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from support.repos import DAY, START, GeneratedPackage, apt, evolve, packages, rpm_md
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.publisher import Options, Report, publish
from tidings_client.remote import Remote, RemoteSettings
from tidings_client.sync import SyncOptions, SyncResult, sync

#: Patience for tests: faults are answered at once, not after minutes.
HASTY = RemoteSettings(connect_timeout=1, read_timeout=2, total_timeout=10, tries=2, backoff=0.01)
CODECS = {"primary": "zst", "filelists": "gz", "other": "xz", "group": "gz", "updateinfo": "bz2"}


@dataclass
class Notes:
    """A progress that remembers what it was told."""

    texts: list[str] = field(default_factory=list)

    def progress(self, what: str, done: int, total: int | None = None) -> None:
        """Not of interest."""

    def note(self, text: str, **facts: object) -> None:
        self.texts.append(text)


@dataclass
class Repository:
    """A repository in a folder, with a history that is made step by step."""

    root: Path
    kind: str = "rpm-md"
    made: tuple[GeneratedPackage, ...] = ()
    step: int = 0
    codecs: Mapping[str, str] = field(default_factory=lambda: CODECS)

    @classmethod
    def at(cls, root: Path, count: int = 120, steps: int = 1, kind: str = "rpm-md") -> Repository:
        """*steps* publishes of *count* packages."""
        root.mkdir(parents=True, exist_ok=True)
        made = cls(root, kind, packages(count))
        made.write()
        made.publish()
        for _ in range(steps - 1):
            made.advance()
        return made

    def write(self, **options: object) -> None:
        """Write the metadata of now, without a publish."""
        time = START + self.step * DAY
        if self.kind == "apt":
            apt(self.root, self.made, timestamp=time, **options)  # type: ignore[arg-type]
        else:
            options.setdefault("codec", self.codecs)
            rpm_md(self.root, self.made, timestamp=time, **options)  # type: ignore[arg-type]

    def change(self, share: float = 0.02, **options: object) -> None:
        """The next state of the repository, without a publish."""
        self.step += 1
        self.made = evolve(self.made, self.step, share)
        self.write(**options)

    def publish(self, **options: object) -> Report:
        """Add what is there to ``tidings/``."""
        backend = LocalBackend(self.root / "tidings")
        return publish(self.root, backend, Options(**options))  # type: ignore[arg-type]

    def advance(self, share: float = 0.02, **options: object) -> Report:
        """Change and publish."""
        self.change(share, **options)
        return self.publish()


def tree(root: Path) -> dict[str, bytes]:
    """All published files below *root*."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] not in ("tidings", ".tidings")
    }


def fetch(
    url: str | list[str],
    dest: Path,
    settings: RemoteSettings = HASTY,
    notes: Notes | None = None,
    **options: object,
) -> SyncResult:
    """One sync."""
    options.setdefault("pauses", (0.0, 0.05, 0.1))
    urls = [url] if isinstance(url, str) else url
    with Remote(urls, settings) as remote:
        return sync(SyncOptions(dest, **options), remote, notes)  # type: ignore[arg-type]


def left_over(dest: Path) -> set[str]:
    """What lies in the work folder and should not."""
    return {p.name for p in (dest / ".tidings").iterdir()} - {"state.json", "head.json"}


def copy(source: Path, target: Path, *, state: bool = True) -> Path:
    """A copy of a DEST; without *state*, as another program would have left it."""
    shutil.copytree(source, target)
    if not state:
        shutil.rmtree(target / ".tidings", ignore_errors=True)
    return target
