"""The first question of a sync: has the mirror's head changed, and is DEST what it described?"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tidings_chunkstore.errors import InputError, NetworkError, VerificationError
from tidings_chunkstore.limits import LIMITS

from . import state as states
from .job import SyncOptions
from .local import Destination

if TYPE_CHECKING:
    from .remote import HeadAnswer, Remote


@dataclass(frozen=True, slots=True)
class Ask:
    """What the mirror said about its head. *data* None: there is none, *reason* says why."""

    data: bytes | None
    etag: str | None
    same: bool  #: these are the bytes that the last run followed
    reason: str | None = None
    problem: str | None = None  #: what is wrong with a head that is there, for people

    @classmethod
    def of(
        cls, dest: Destination, state: states.State, options: SyncOptions, remote: Remote
    ) -> Ask:
        """Ask for the head, conditionally. Raises NetworkError when no mirror answers at all."""
        if options.route == "full":
            return cls(None, None, False, None)
        known = dest.work_read(states.HEAD, LIMITS.head)
        if known is not None and hashlib.sha256(known).digest() != state.head_sha256:
            known = None
        try:
            answer: HeadAnswer = remote.head(state.etag if known else None, known)
        except NetworkError as error:
            if error.code in ("connect", "timeout", "denied", "closed"):
                raise
            return cls(None, None, False, error.code)
        except VerificationError as error:  # its gzip is broken: as bad as any other damaged head
            return cls(None, None, False, "head-format", str(error))
        if answer.data is None:
            if known is None:  # a 304 that nobody asked for
                return cls(None, None, False, "no-head")
            return cls(known, answer.etag, True)
        return cls(answer.data, answer.etag, False)

    def unchanged(self, dest: Destination, state: states.State, options: SyncOptions) -> bool:
        """Whether DEST is what the last finished run made of this very head and question."""
        return (
            self.same
            and bool(state.complete)
            and state.wanted == question_key(options)
            and all(
                path in state.seen and dest.stamp(path) == state.seen[path].stamp
                for path in state.complete
            )
        )


def question_key(options: SyncOptions) -> str:
    """A word for what was asked: two runs with the same word want the same files and proofs."""
    key = b""
    if options.trust.gpgkey is not None:
        try:
            key = options.trust.gpgkey.read_bytes()
        except OSError as error:
            raise InputError(
                f"{options.trust.gpgkey}: cannot read the key: {error.strerror}", code="bad-key"
            ) from error
    parts = (
        ",".join(options.types) if options.types is not None else "*",
        "zck" if options.zchunk else "",
        (options.trust.repomd_sha256 or "").lower(),
        key.hex(),
        *([options.trust.repomd_sha512.lower()] if options.trust.repomd_sha512 else []),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
