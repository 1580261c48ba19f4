"""Record: add a live repository's state of now to a history, each time it runs.

Fetched and proven by the client, whole and from any mirror with or without Tidings; a file that
the last recorded version has already is taken from there.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tidings_chunkstore.errors import InputError, LocalError
from tidings_chunkstore.layout import detect, read_tree
from tidings_client.remote import Remote
from tidings_client.sync import Progress, SyncOptions, sync
from tidings_client.trust import TrustSettings

_NAME = re.compile(r"([0-9]{4,8})_.*")
_PARTIAL = ".recording"


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a run of record did. Sizes in bytes."""

    folder: Path  #: the newest version of the history
    new: bool  #: whether it was added now
    versions: int
    received: int
    requests: int


def record(
    url: str,
    history: Path,
    *,
    types: tuple[str, ...] | None = None,
    progress: Progress | None = None,
) -> Recorded:
    """Add what *url* publishes now to *history*, unless it is what was recorded last.

    Raises:
        InputError: *history* is a repository itself, or has a file in the way.
        NetworkError, VerificationError: see ``tidings_client.sync.sync``.
        LocalError: disk or permissions.
    """
    history.mkdir(parents=True, exist_ok=True)
    if detect(history) is not None:
        raise InputError(f"{history} holds a repository, not a history of one", code="history")
    known = versions(history)
    partial = history / _PARTIAL
    if not partial.exists():
        _start(partial, known[-1] if known else None)
    # What is older upstream than the last record is history too.
    options = SyncOptions(
        partial, types=types, adopt=True, trust=TrustSettings(allow_older=True, allow_unsigned=True)
    )
    with Remote([url]) as remote:
        result = sync(options, remote, progress)
    shutil.rmtree(partial / ".tidings", ignore_errors=True)
    if known and _mains(known[-1]) == _mains(partial):
        shutil.rmtree(partial)
        return Recorded(
            known[-1], False, len(known), result.bytes_received + result.bytes_sent, result.requests
        )
    number = int(known[-1].name.split("_")[0]) + 1 if known else 0
    target = history / f"{number:04d}_{_date(result.timestamp)}"
    try:
        os.rename(partial, target)
    except OSError as error:
        raise LocalError(f"{target}: {error.strerror}") from error
    return Recorded(
        target, True, len(known) + 1, result.bytes_received + result.bytes_sent, result.requests
    )


def versions(history: Path) -> list[Path]:
    """The recorded versions, oldest first."""
    return sorted(path for path in history.iterdir() if _NAME.fullmatch(path.name))


def _start(partial: Path, last: Path | None) -> None:
    """A folder for the client to bring up to date; with the last version's files, linked."""
    if last is None:
        partial.mkdir()
        return
    try:
        shutil.copytree(last, partial, copy_function=os.link)
    except OSError:  # a file system without hard links
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(last, partial)


def _mains(folder: Path) -> dict[str, bytes]:
    """The main files, which name all others by their checksums."""
    return {main.file.path: main.data for main in read_tree(folder).mains}


def _date(timestamp: int) -> str:
    moment = datetime.fromtimestamp(timestamp, UTC) if timestamp else datetime.now(UTC)
    return moment.strftime("%Y%m%d")
