"""What a mirror pays for a publish: which of its files change, and what a second tier moves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import servers
from .process import find, run
from .wire import Wire

State = Mapping[str, tuple[int, str]]  #: path to (bytes, SHA-256)


@dataclass(frozen=True, slots=True)
class Difference:
    """Files and bytes between two states of a tree."""

    written: int
    changed: int
    deleted: int
    bytes_written: int
    bytes_changed: int
    bytes_deleted: int


def read_state(tree: Path) -> dict[str, tuple[int, str]]:
    """The files below *tree*. Empty when there is none."""
    state = {}
    for path in sorted(tree.rglob("*")) if tree.is_dir() else ():
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            state[path.relative_to(tree).as_posix()] = (path.stat().st_size, digest)
    return state


def difference(before: State, after: State) -> Difference:
    """What was done to get from one to the other."""
    new = [after[path][0] for path in after.keys() - before.keys()]
    other = [after[path][0] for path in after.keys() & before.keys() if after[path] != before[path]]
    gone = [before[path][0] for path in before.keys() - after.keys()]
    return Difference(len(new), len(other), len(gone), sum(new), sum(other), sum(gone))


def save_state(file: Path, state: State) -> None:
    """Keep *state* for the next run."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(state))
    temporary.rename(file)


def load_state(file: Path) -> dict[str, tuple[int, str]]:
    """What was kept; empty when nothing was."""
    if not file.exists():
        return {}
    return {path: (size, digest) for path, (size, digest) in json.loads(file.read_text()).items()}


def second_tier(tree: Path, target: Path, work: Path) -> int | None:
    """Bring *target* up to *tree* by rsync, as mirrors do: bytes moved, or None without it."""
    if find("rsync") is None:
        return None
    target.mkdir(parents=True, exist_ok=True)
    tree.mkdir(parents=True, exist_ok=True)
    with servers.rsync(tree, work) as url, Wire(url, http=False) as wire:
        run(["rsync", "-rt", "--delete-delay", f"{wire.url}/", f"{target}/"])
        traffic = wire.traffic()
    return traffic.received + traffic.sent
