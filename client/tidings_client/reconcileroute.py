"""The reconcile route: a delta against old content that the head does not know.

The server hands out lists of the coarse chunks of its contents, the client tells what of them it
has, and gets deltas against exactly that, for all tracks in two requests. Only bases are cut here,
so only this module and ``chunkroute`` need ``fastcdc`` and ``blake3``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from tidings_chunkstore import delta, reconcile
from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.ids import ContentId
from tidings_chunkstore.places import PackName

from .assemble import Produce, Write
from .bundle import decode_bundle
from .remote import Remote


@dataclass(frozen=True, slots=True)
class Reconciled:
    """A content that can be made now. *size*: the bytes that it took, both ways."""

    track: str
    target: ContentId
    produce: Produce
    size: int


@dataclass(frozen=True, slots=True)
class _Asked:
    """A track in the request: its list, and the base that has most in common with it."""

    chunks: reconcile.CoarseList
    base: BinaryIO
    survey: reconcile.Survey
    size: int


def fetch(
    remote: Remote,
    snapshot: PackName,
    tracks: Iterable[str],
    bases: Callable[[str], Sequence[BinaryIO]],
    apply: Callable[[bytes], Produce],
    note: Callable[[str], object],
) -> list[Reconciled]:
    """What of *tracks* the server of *snapshot* leads to; *note* is told what it does not, and why.

    *bases* gives the old contents of a track, spooled; *apply* makes the target of a delta section.
    Raises NetworkError, VerificationError and FormatError when nothing can be had at all,
    EngineError where a library is missing.
    """
    wanted = set(tracks)
    made: list[Reconciled] = []
    asked: dict[str, _Asked] = {}
    for track, section in decode_bundle(remote.reconcile(snapshot, sorted(wanted))):
        if track not in wanted:
            raise FormatError(f"a list of {track!r}, not asked for")
        wanted.remove(track)
        try:
            if section.startswith(delta.MAGIC):
                target = delta.inspect(section).target
                made.append(Reconciled(track, target, apply(section), len(section)))
                continue
            found = _ask(section, bases(track))
        except reconcile.NotPromisingError as error:
            note(f"reconcile of {track}: {error}")
            continue
        if found is not None:
            asked[track] = found
    if asked:
        made += _answers(remote, snapshot, asked)
    return made


def _ask(section: bytes, bases: Sequence[BinaryIO]) -> _Asked | None:
    """Raises NotPromisingError where no base has enough in common."""
    chunks = reconcile.decode_list(section)
    best: _Asked | None = None
    failure: reconcile.NotPromisingError | None = None
    for base in bases:
        try:
            survey = reconcile.survey(base, chunks)
        except reconcile.NotPromisingError as error:
            failure = error
            continue
        if best is None or survey.common > best.survey.common:
            best = _Asked(chunks, base, survey, len(section))
    if best is None and failure is not None:
        raise failure
    return best


def _answers(remote: Remote, snapshot: PackName, asked: dict[str, _Asked]) -> list[Reconciled]:
    body = reconcile.encode_inquiries([(track, one.survey.inquiry) for track, one in asked.items()])
    made: list[Reconciled] = []
    for track, answer in decode_bundle(remote.reconcile(snapshot, body=body)):
        one = asked.pop(track, None)
        if one is None:
            raise FormatError(f"an answer about {track!r}, not asked for")
        own = len(reconcile.encode_inquiries([(track, one.survey.inquiry)]))
        size = one.size + own + len(answer)
        made.append(Reconciled(track, one.chunks.target, _produce(answer, one), size))
    return made


def _produce(answer: bytes, one: _Asked) -> Produce:
    def produce(write: Write) -> None:
        base = delta.FileReader(one.base.fileno())
        reconcile.rebuild(answer, base, one.survey, one.chunks.target, write)

    return produce
