"""Tidings client: fetch, rebuild, verify, switch.

The doors are ``sync.sync(options, remote)``, ``sync.plan`` and ``verify.verify``; the command's is
``cli.main``. The names below are what they take and give. Nothing is imported here until it is
used: a sync that finds no news is mostly Python's own start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .job import PlanResult, Progress, SyncOptions, SyncResult
    from .remote import Remote, RemoteSettings
    from .trust import TrustSettings
    from .verify import Finding, Verdict

__all__ = [
    "Finding",
    "PlanResult",
    "Progress",
    "Remote",
    "RemoteSettings",
    "SyncOptions",
    "SyncResult",
    "TrustSettings",
    "Verdict",
    "version",
]

_WHERE = {
    "Finding": "verify",
    "Remote": "remote",
    "RemoteSettings": "remote",
    "TrustSettings": "trust",
    "Verdict": "verify",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE.get(name, 'job')}", __name__), name)


def version() -> str:
    """The installed release; ``0`` in a checkout that is not installed."""
    from importlib import metadata

    try:
        return metadata.version("tidings")
    except metadata.PackageNotFoundError:
        return "0"
