"""The errors of Tidings, split by who must act.

TidingsError
├── InputError           the caller: what was handed in is wrong
│   └── UnsettledError   the same, but time may heal it (a mirror in the middle of its rsync)
├── FormatError          bytes do not follow their format, or break a limit; whoever read them
│                        knows where they came from and translates
├── EngineError          a recipe needs an engine that this machine lacks
├── NetworkError         the network or the peer: no usable answer
├── VerificationError    bytes arrived whole and are not what was promised
├── RollbackError        the offered state is older, or less signed, than the one in place
├── StoreError           the store on disk is damaged
├── LockedError          another process holds the lock
└── LocalError           this machine's disk or permissions

Every error carries ``code``, a stable word for programs, and the facts as ``details``.
Exit codes are the command lines' business: ``tidings_client.exits`` has the table.
"""

from __future__ import annotations


class TidingsError(Exception):
    """Base of all. ``code`` is stable across releases; the text is for people."""

    code = "error"

    def __init__(self, message: str, *, code: str | None = None, **details: object) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code
        self.details = details


class InputError(TidingsError):
    """What the caller handed in cannot be used."""

    code = "input"


class UnsettledError(InputError):
    """The input does not fit together now, but may in a minute."""

    code = "unsettled"


class FormatError(TidingsError):
    """Bytes do not follow their format, are inconsistent, or exceed a limit."""

    code = "format"


class EngineError(TidingsError):
    """A recipe names an engine that is not installed here."""

    code = "engine"


class NetworkError(TidingsError):
    """No usable answer from the network."""

    code = "network"


class VerificationError(TidingsError):
    """Bytes differ from what their hash, size or signature promised."""

    code = "verification"


class RollbackError(TidingsError):
    """The offered state is older, or less signed, than what is in place."""

    code = "rollback"


class StoreError(TidingsError):
    """The store on disk is damaged."""

    code = "store"


class LockedError(TidingsError):
    """Another process is at work on the same folder."""

    code = "locked"


class LocalError(TidingsError):
    """This machine's disk or permissions are in the way."""

    code = "local"
