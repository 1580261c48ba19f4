"""The exit codes of all commands, by who must act. One table; docs/cli.md repeats it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from tidings_chunkstore.errors import (
    EngineError,
    FormatError,
    InputError,
    LocalError,
    LockedError,
    NetworkError,
    RollbackError,
    StoreError,
    TidingsError,
    VerificationError,
)


class Exit(IntEnum):
    """What a command ends with."""

    OK = 0
    USAGE = 2
    SOME_FAILED = 3
    INPUT = 4
    NETWORK = 5
    VERIFICATION = 6
    ROLLBACK = 7
    STORE = 8
    LOCKED = 9
    LOCAL = 10
    INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Meaning:
    """An exit code for people: what happened, and what to do."""

    exit: Exit
    what: str
    act: str


TABLE: tuple[Meaning, ...] = (
    Meaning(Exit.OK, "done, or nothing has changed", "nothing"),
    Meaning(Exit.USAGE, "wrong usage: an option or an argument", "see --help"),
    Meaning(Exit.SOME_FAILED, "some of several repositories failed", "see the lines about them"),
    Meaning(Exit.INPUT, "bad input: what was given cannot be used", "correct it"),
    Meaning(Exit.NETWORK, "no usable answer from the network", "try again, or another mirror"),
    Meaning(
        Exit.VERIFICATION,
        "what arrived is not what was promised or signed",
        "do not use the mirror until its operator has looked",
    ),
    Meaning(
        Exit.ROLLBACK,
        "what is offered is older, or less signed, than what is in place",
        "wait for the mirror, or allow it",
    ),
    Meaning(Exit.STORE, "the store on disk is damaged", "tidings-mirror repair"),
    Meaning(Exit.LOCKED, "another process is at work on the same folder", "wait for it"),
    Meaning(Exit.LOCAL, "this machine's disk or permissions", "free space, or change permissions"),
    Meaning(Exit.INTERRUPTED, "interrupted; the old state is in place", "run it again"),
)

#: From the most special class to the least.
_BY_ERROR: tuple[tuple[type[BaseException], Exit], ...] = (
    (InputError, Exit.INPUT),
    (NetworkError, Exit.NETWORK),
    (VerificationError, Exit.VERIFICATION),
    (RollbackError, Exit.ROLLBACK),
    (StoreError, Exit.STORE),
    (LockedError, Exit.LOCKED),
    (LocalError, Exit.LOCAL),
    (EngineError, Exit.LOCAL),
    # Who read the bytes should have said whose they are; here they can only be called bad input.
    (FormatError, Exit.INPUT),
    (TidingsError, Exit.INPUT),
    (KeyboardInterrupt, Exit.INTERRUPTED),
    (MemoryError, Exit.LOCAL),
    (OSError, Exit.LOCAL),
)


def exit_of(error: BaseException) -> Exit | None:
    """The exit code for *error*; None for one that no command should see: a bug."""
    if isinstance(error, InputError) and error.code == "usage":
        return Exit.USAGE
    return next((code for kind, code in _BY_ERROR if isinstance(error, kind)), None)


def code_of(error: BaseException) -> str:
    """The stable word for *error* in JSON."""
    if isinstance(error, TidingsError):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return "local" if isinstance(error, (OSError, MemoryError)) else "bug"


def help_text() -> str:
    """The table for ``--help``."""
    lines = [f"  {meaning.exit.value:>3}  {meaning.what}" for meaning in TABLE]
    return "exit codes:\n" + "\n".join(lines)
