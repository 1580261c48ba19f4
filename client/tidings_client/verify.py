"""``tidings verify``: is every file in DEST what its main file says? Reads only, writes nothing.

What ``sync`` refuses, a symlink in DEST above all, is a finding here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tidings_chunkstore.errors import FormatError, InputError
from tidings_chunkstore.layout import Layout, Listing, PublishedFile, detect
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.opening import PIECE, UNOPENED, codec_of, open_stream

from . import state
from .local import Destination
from .trust import TrustSettings, check_main

Progress = Callable[[str, int, int | None], object]

_MAGIC = 16  # bytes that tell a codec


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with one file. *problem* is a stable word, *text* is for people."""

    path: str
    problem: str
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was looked at, and what was found."""

    layout: str
    main: str
    trust: str
    files: int  #: that were read and are right
    bytes: int  #: of them
    opened: int  #: files whose content was checked too
    absent: tuple[str, ...]  #: named by the main file and not asked for by the last sync
    findings: tuple[Finding, ...]


def verify(
    dest: Path, trust: TrustSettings | None = None, progress: Progress = lambda *_: None
) -> Verdict:
    """Read every file that the main file of *dest* names; compare size, checksum, open-checksum.

    A file that is not there is a finding, unless the last sync was told to leave it out, or the
    layout allows it (apt) and no sync has put the tree there.

    Raises:
        InputError: *dest* holds no metadata, or a main file that cannot be read as one, a symlink
            included.
        VerificationError: the main file is not what *trust* demands.
        LocalError: a file cannot be read.
    """
    if not dest.is_dir():
        raise InputError(f"{dest}: no such folder", code="no-metadata")
    with Destination(dest, create=False, lock=False) as opened:
        return _verify(opened, trust or TrustSettings(), progress)


def _verify(dest: Destination, trust: TrustSettings, progress: Progress) -> Verdict:
    layout = detect(dest.path)
    if layout is None:
        raise InputError(
            f"{dest.path}: no repodata/repomd.xml, InRelease or Release", code="no-metadata"
        )
    main = _main(dest.path, layout)
    data = dest.read(main, LIMITS.main)
    if data is None:
        raise InputError(f"{dest.path / main}: gone", code="no-metadata")
    found = {path: dest.read(path, LIMITS.main) for path in layout.beside(main)}
    beside = {path: read for path, read in found.items() if read}
    word = check_main(trust, main, data, beside)
    try:
        listing = layout.parse(data, main)
    except FormatError as error:
        raise InputError(f"{dest.path}: {error}", code="broken-metadata") from error
    expected = _expected(dest, layout, listing, data)
    findings = _other_mains(layout, listing, beside)
    absent: list[str] = []
    good = size = opened = 0
    for file in listing.files:
        problem = _check(dest, file, progress)
        if problem is None:
            good += 1
            stamp = dest.stamp(file.path)
            size += stamp.size if stamp else 0
            opened += _opens(file)
        elif problem.problem == "missing" and file.path not in expected:
            absent.append(file.path)
        else:
            findings.append(problem)
    if not good and not findings and listing.files:
        findings.append(Finding(main, "missing", "none of the files that it names is there"))
    return Verdict(layout.name, main, word, good, size, opened, tuple(absent), tuple(findings))


def _main(dest: Path, layout: Layout) -> str:
    """The main file that counts: InRelease before Release."""
    return next(
        path
        for path in reversed(layout.mains())
        if layout.describe(path)[0] not in ("signature", "key") and os.path.lexists(dest / path)
    )


def _expected(dest: Destination, layout: Layout, listing: Listing, main: bytes) -> frozenset[str]:
    """Paths that must be there: what the last sync completed, or all where none was run."""
    known = state.load(dest.work_read(state.STATE, state.LIMIT))
    every = frozenset(file.path for file in listing.files)
    seen = known.seen.get(listing.main)
    if known.complete and seen is not None and seen.sha256 == hashlib.sha256(main).digest():
        return every & frozenset(known.complete)
    return frozenset() if layout.partial else every


def _other_mains(layout: Layout, listing: Listing, beside: Mapping[str, bytes]) -> list[Finding]:
    """A Release beside an InRelease must be of the same publish."""
    found = []
    for path, data in beside.items():
        if layout.describe(path)[0] != "release":
            continue
        try:
            other = layout.parse(data, path)
        except FormatError as error:
            found.append(Finding(path, "broken", str(error)))
            continue
        if other.by_path() != listing.by_path():
            text = f"says something else than {listing.main}"
            found.append(Finding(path, "differs", text))
    return found


def _opens(file: PublishedFile) -> bool:
    """Whether the main file says what *file* opens to, and it can be opened here."""
    promised = file.open_id is not None or file.open_size is not None
    return promised and not file.path.endswith(UNOPENED)


def _check(dest: Destination, file: PublishedFile, progress: Progress) -> Finding | None:
    def finding(problem: str, text: str) -> Finding:
        return Finding(file.path, problem, text)

    try:
        handle = dest.open(file.path)
    except InputError as error:
        return finding(error.code, str(error).removeprefix(f"{dest.path / file.path}: "))
    if handle is None:
        return finding("missing", "not there")
    with handle:
        size = os.fstat(handle.fileno()).st_size
        if file.size is not None and size != file.size:
            return finding("size", f"has {size} bytes, not {file.size}")
        if file.checksum is not None:
            digest = hashlib.new(file.checksum.algorithm, usedforsecurity=False)
            done = 0
            for piece in iter(lambda: handle.read(PIECE), b""):
                digest.update(piece)
                done += len(piece)
                progress(file.path, done, size)
            if digest.hexdigest() != file.checksum.hex:
                return finding("checksum", f"has another {file.checksum.algorithm} than named")
        if not _opens(file):
            return None
        handle.seek(0)
        start = handle.read(_MAGIC)
        handle.seek(0)
        opened, count = hashlib.sha256(), 0
        limit = LIMITS.content if file.open_size is None else file.open_size
        try:
            for piece in open_stream(handle, codec_of(file.path, start), limit=limit):
                opened.update(piece)
                count += len(piece)
        except FormatError as error:
            return finding("content", str(error))
        if file.open_size is not None and count != file.open_size:
            return finding("open-size", f"opens to {count} bytes, not {file.open_size}")
        if file.open_id is not None and opened.digest() != file.open_id:
            return finding("open-checksum", "opens to another content than named")
    return None
