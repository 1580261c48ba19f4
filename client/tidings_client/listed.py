"""Syncing from what a list names: a metalink's mirrors and versions, a mirrorlist's mirrors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tidings_chunkstore.errors import VerificationError
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.rpmmd import MAIN

from .job import Progress, Silent, SyncOptions, SyncResult
from .metalink import LIMIT, Version
from .mirrors import Page
from .remote import Looked, Remote, RemoteSettings, Validators
from .sync import sync

_VERSIONS = 4  # of a metalink that are tried, the newest first


@dataclass(frozen=True, slots=True)
class Listed:
    """A list as its server has it now, and what asking for it cost on the wire."""

    looked: Looked
    bytes_received: int
    bytes_sent: int
    requests: int


def fetch_list(
    url: str, settings: RemoteSettings | None = None, known: Validators | None = None
) -> Listed:
    """The metalink or mirrorlist at *url*, unless it is the one that *known* tells of.

    Raises NetworkError, and InputError for a URL that is none.
    """
    with Remote([Page(url)], settings) as remote:
        looked = remote.look("", LIMIT, known)
        return Listed(looked, remote.bytes_received, remote.bytes_sent, remote.requests)


def version_of(versions: Sequence[Version], data: bytes) -> int | None:
    """Which of *versions* a repomd.xml is; None for none of them."""
    sha256, sha512 = hashlib.sha256(data).hexdigest(), hashlib.sha512(data).hexdigest()
    for number, version in enumerate(versions):
        if version.sha256 == sha256 or (version.sha256 is None and version.sha512 == sha512):
            return number
    return None


def sync_versions(
    options: SyncOptions,
    versions: Sequence[Version],
    remote: Remote,
    progress: Progress | None = None,
) -> SyncResult:
    """Bring DEST to the newest of *versions* that a mirror has; never behind the one in place.

    Mirrors take hours to follow: one that has an older version is passed over where another has
    the newest, and taken where none has. Raises as ``sync``.
    """
    progress = progress or Silent()
    held = version_of(versions, _main_of(options.dest))
    tried = versions[:_VERSIONS] if held is None else versions[: min(held, _VERSIONS - 1)]
    if held is not None:
        tried = (*tried, versions[held])
    failure: VerificationError | None = None
    for version in tried:
        trust = replace(
            options.trust,
            repomd_sha256=version.sha256,
            repomd_sha512=None if version.sha256 else version.sha512,
            metalink=True,
        )
        try:
            result = sync(replace(options, trust=trust), remote, progress)
        except VerificationError as error:
            if error.code != "wrong-sha256":
                raise
            failure = failure or error
            continue
        if failure is not None:
            progress.note("no mirror has the metalink's newest version yet", code="mirrors-behind")
        return result
    assert failure is not None
    raise VerificationError(
        "no mirror has a repomd.xml that the metalink allows", code="wrong-sha256"
    ) from failure


def _main_of(dest: Path) -> bytes:
    """The repomd.xml in place; empty where there is none that can be read."""
    try:
        with (dest / MAIN).open("rb") as file:
            return file.read(LIMITS.main)
    except OSError:
        return b""  # sync says what is wrong with it
