"""``tidings doctor``: what this machine has for Tidings, what it lacks, and how to get it."""

from __future__ import annotations

import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from tidings_chunkstore.errors import FormatError, NetworkError, TidingsError
from tidings_chunkstore.head import decode
from tidings_chunkstore.recipe import engines

from . import version
from .remote import Remote, RemoteSettings

OK = "ok"
MISSING = "missing"
FAILED = "failed"

#: Distributions that a route needs, and what does not work without.
_PACKAGES = (
    ("httpx", "everything", True),
    ("fastcdc", "the chunks route", False),
    ("blake3", "the chunks route", False),
)
_PROGRAMS = (("gpgv", "--gpgkey", "the package gpgv (Debian), gnupg2 (Fedora)"),)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. *status* is ``ok``, ``missing`` or ``failed``."""

    name: str
    status: str
    text: str
    needed: bool = False  #: nothing works without it


def local_checks() -> list[Check]:
    """Python, packages, engines and programs of this machine."""
    checks = [
        Check("python", OK, f"{platform.python_version()} ({sys.executable})", needed=True),
        Check("tidings", OK, version()),
    ]
    for name, what, needed in _PACKAGES:
        try:
            checks.append(Check(name, OK, metadata.version(name), needed))
        except metadata.PackageNotFoundError:
            text = f"{what} does not work without it; pip install {name}"
            checks.append(Check(name, MISSING, text, needed))
    for engine in engines():
        if engine.available:
            checks.append(Check(f"engine {engine.name}", OK, engine.version))
        else:
            text = f"files that need it are downloaded whole; {engine.how}"
            checks.append(Check(f"engine {engine.name}", MISSING, text))
    for name, what, how in _PROGRAMS:
        found = shutil.which(name)
        if found is not None:
            checks.append(Check(name, OK, found))
        else:
            checks.append(Check(name, MISSING, f"needed for {what}: {how}"))
    return checks


def mirror_checks(urls: Sequence[str], settings: RemoteSettings | None = None) -> list[Check]:
    """Each of *urls* on its own: reachable, published by Tidings, ranges. Raises InputError."""
    return [check for url in urls for check in _mirror(url, settings)]


def _mirror(url: str, settings: RemoteSettings | None) -> list[Check]:
    with Remote([url], settings) as remote:
        started = time.monotonic()
        try:
            data = remote.head().data or b""
        except TidingsError as error:
            return [Check(url, FAILED, str(error), needed=True)]
        took = time.monotonic() - started
        try:
            head = decode(data)
        except FormatError as error:
            return [Check(url, FAILED, f"its head cannot be used: {error}", needed=True)]
        features = ", ".join(sorted(head.features)) or "static files"
        checks = [
            Check(
                url,
                OK,
                f"head of {len(data)} bytes in {took * 1000:.0f} ms: serial {head.serial}, "
                f"{len(head.states)} snapshots, {len(head.files)} files; {features}",
                needed=True,
            )
        ]
        pack = str(head.current.pack)
        try:
            for _ in remote.ranges([(pack, 1, 1)]):
                checks.append(Check(f"{url} ranges", OK, pack))
        except NetworkError as error:
            checks.append(Check(f"{url} ranges", FAILED, str(error)))
    return checks
