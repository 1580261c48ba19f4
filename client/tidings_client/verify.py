"""``tidings verify``: is every file in DEST what its main file says? Reads only, writes nothing."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tidings_chunkstore.errors import FormatError, InputError, LocalError
from tidings_chunkstore.layout import Layout, Listing, PublishedFile, detect
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.opening import PIECE, codec_of, open_stream

from . import state
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
        InputError: *dest* holds no metadata, or a main file that cannot be read as one.
        VerificationError: the main file is not what *trust* demands.
        LocalError: a file cannot be read.
    """
    if not dest.is_dir():
        raise InputError(f"{dest}: no such folder", code="no-metadata")
    layout = detect(dest)
    if layout is None:
        raise InputError(
            f"{dest}: no repodata/repomd.xml, InRelease or Release", code="no-metadata"
        )
    main = _main(dest, layout)
    data = _small(dest, main)
    if data is None:
        raise InputError(f"{dest}/{main}: not a regular file", code="no-metadata")
    beside = {path: read for path in layout.beside(main) if (read := _small(dest, path))}
    word = check_main(trust or TrustSettings(), main, data, beside)
    try:
        listing = layout.parse(data, main)
    except FormatError as error:
        raise InputError(f"{dest}: {error}", code="broken-metadata") from error
    expected = _expected(dest, layout, listing, data)
    findings = _other_mains(layout, listing, beside)
    absent: list[str] = []
    good = size = opened = 0
    for file in listing.files:
        problem = _check(dest, file, progress)
        if problem is None:
            good += 1
            size += (dest / file.path).stat().st_size
            opened += file.open_id is not None or file.open_size is not None
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


def _expected(dest: Path, layout: Layout, listing: Listing, main: bytes) -> frozenset[str]:
    """Paths that must be there: what the last sync completed, or all where none was run."""
    known = state.load(_small(dest, f"{state.FOLDER}/{state.STATE}"))
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


def _check(dest: Path, file: PublishedFile, progress: Progress) -> Finding | None:
    def finding(problem: str, text: str) -> Finding:
        return Finding(file.path, problem, text)

    try:
        handle = _open(dest, file.path)
    except InputError as error:
        return finding("not-a-file", str(error))
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
        if file.open_id is None and file.open_size is None:
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


def _open(dest: Path, path: str) -> BinaryIO | None:
    """The regular file at *path*; None where there is none. Raises InputError, LocalError."""
    try:
        # O_NONBLOCK: opening a fifo must not hang.
        descriptor = os.open(dest / path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise LocalError(f"{dest / path}: {error.strerror}", code="unreadable") from error
    handle = os.fdopen(descriptor, "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        handle.close()
        raise InputError(f"{dest / path}: not a regular file", code="not-a-file")
    return handle


def _small(dest: Path, path: str) -> bytes | None:
    """The bytes of a main file or of the state; None where there is none."""
    handle = _open(dest, path)
    if handle is None:
        return None
    with handle:
        data = b"".join(_bounded(handle, LIMITS.main + 1))
    if len(data) > LIMITS.main:
        raise InputError(f"{dest / path}: longer than {LIMITS.main} bytes", code="too-large")
    return data


def _bounded(handle: BinaryIO, limit: int) -> Iterator[bytes]:
    while limit > 0 and (piece := handle.read(min(limit, PIECE))):
        limit -= len(piece)
        yield piece
