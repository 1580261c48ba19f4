"""Syncing from what a list names: a metalink's mirrors and versions, a mirrorlist's mirrors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tidings_chunkstore.errors import FormatError, NetworkError, VerificationError
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.rpmmd import MAIN

from .guard import Guard
from .job import PlanResult, Progress, Silent, SyncOptions, SyncResult
from .metalink import LIMIT, MIRRORS, Metalink, Version, parse_metalink, parse_mirrorlist
from .mirrors import Page, shown, web_url
from .remote import Looked, Remote, RemoteSettings, Validators
from .sync import plan, sync

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
        try:
            looked = remote.look("", LIMIT, known)
        except NetworkError as error:  # the URL is the whole address: there is no path to name
            text = str(error).replace(": : ", ": ", 1)
            raise NetworkError(text, code=error.code, **error.details) from error
        return Listed(looked, remote.bytes_received, remote.bytes_sent, remote.requests)


def read_metalink(data: bytes, url: str) -> Metalink:
    """The metalink that *url* sent. Raises NetworkError (``bad-list``, ``no-mirror``)."""
    try:
        return parse_metalink(data, url)
    except FormatError as error:
        raise _bad_list(url, error) from error


def read_mirrorlist(data: bytes, url: str) -> tuple[str, ...]:
    """The base URLs that *url* sent. Raises NetworkError (``bad-list``, ``no-mirror``)."""
    try:
        return parse_mirrorlist(data, url)
    except FormatError as error:
        raise _bad_list(url, error) from error


def _bad_list(url: str, error: FormatError) -> NetworkError:
    code = "bad-list" if error.code == "format" else error.code
    return NetworkError(f"{shown(web_url(url))}: {error}", code=code)


def sync_metalink(
    options: SyncOptions,
    url: str,
    settings: RemoteSettings | None = None,
    progress: Progress | None = None,
) -> tuple[SyncResult, str]:
    """Bring DEST to what the metalink at *url* allows; the result, and the mirror that had it.

    Connections go where ``guard`` allows. Raises as ``sync``.
    """
    settings = replace(settings or RemoteSettings(), guard=Guard((url,)))
    listed = fetch_list(url, settings)
    link = read_metalink(listed.looked.data or b"", url)
    with Remote(link.mirrors[:MIRRORS], settings) as remote:
        result = sync_versions(options, link.versions, remote, progress)
        result = replace(
            result,
            bytes_received=result.bytes_received + listed.bytes_received,
            bytes_sent=result.bytes_sent + listed.bytes_sent,
            requests=result.requests + listed.requests,
        )
        return result, remote.answered


def plan_metalink(
    options: SyncOptions,
    url: str,
    settings: RemoteSettings | None = None,
    progress: Progress | None = None,
) -> PlanResult:
    """What ``sync_metalink`` would do if the first mirror has the newest. Raises as ``plan``."""
    settings = replace(settings or RemoteSettings(), guard=Guard((url,)))
    link = read_metalink(fetch_list(url, settings).looked.data or b"", url)
    with Remote(link.mirrors[:MIRRORS], settings) as remote:
        return plan(options, remote, progress)


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
            progress.note("no mirror has the newest version of the metalink yet")
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
