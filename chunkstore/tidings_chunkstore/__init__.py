"""Tidings' chunk store: chunking, recipes, deltas, packs and heads. No network, no command line.

``publish(root, backend)`` adds what a repository holds now to its store, ``Store`` reads one. The
names below are loaded when they are first used: a client needs few of them, and at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .backends import LocalBackend, Readable, Writable
    from .errors import (
        EngineError,
        FormatError,
        InputError,
        LocalError,
        LockedError,
        NetworkError,
        RollbackError,
        StoreError,
        TidingsError,
        UnsettledError,
        VerificationError,
    )
    from .head import Head
    from .ids import ChunkId, ContentId, FileId
    from .publisher import Options, Report, publish
    from .store import Store

__all__ = [
    "ChunkId",
    "ContentId",
    "EngineError",
    "FileId",
    "FormatError",
    "Head",
    "InputError",
    "LocalBackend",
    "LocalError",
    "LockedError",
    "NetworkError",
    "Options",
    "Readable",
    "Report",
    "RollbackError",
    "Store",
    "StoreError",
    "TidingsError",
    "UnsettledError",
    "VerificationError",
    "Writable",
    "publish",
]

_MODULES = {
    "backends": ("LocalBackend", "Readable", "Writable"),
    "head": ("Head",),
    "ids": ("ChunkId", "ContentId", "FileId"),
    "publisher": ("Options", "Report", "publish"),
    "store": ("Store",),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE.get(name, 'errors')}", __name__), name)
