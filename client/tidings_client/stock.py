"""What lies here already: the files of DEST and of seeds, and the contents in them.

A content is *claimed* at first, by the main file beside it (open-checksum) or by what the state
remembers; it is proven when it is read. So an update reads only the files that it needs.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

from tidings_chunkstore import zck
from tidings_chunkstore.errors import FormatError, InputError, LocalError
from tidings_chunkstore.ids import ContentId, FileId
from tidings_chunkstore.layout import LAYOUTS, Layout
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.listing import COMPRESSIONS, Listing, PublishedFile
from tidings_chunkstore.opening import Codec, codec_of, open_stream

from .local import Destination, hash_file, stamp_of
from .state import FOLDER, Seen, Stamp

_SEED_DEPTH = 6
_SEED_FILES = 4096
_SEED_SUFFIXES = (".xml", ".yaml", ".yml", *COMPRESSIONS)
_HASH = re.compile(r"^[0-9a-f]{32,128}-")


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Source:
    """A file that may help: how to open it, and what it is believed to be."""

    key: str  #: path in DEST, or the absolute path of a seed's file
    track: str  #: what kind of content, as far as its name tells
    open: Callable[[], BinaryIO | None] = field(compare=False)
    stamp: Stamp
    codec: Codec
    sha256: FileId | None  #: of the file, claimed or proven
    content: ContentId | None  #: claimed or proven
    proven: bool = False

    def pieces(self) -> Iterator[bytes]:
        """The content, piece by piece. Raises FormatError, and LocalError when it is gone."""
        file = self.open()
        if file is None:
            raise LocalError(f"{self.key}: gone")
        with file:
            yield from open_stream(file, self.codec, limit=LIMITS.content)


@dataclass(slots=True)
class Stock:
    """The sources, by what they are believed to hold."""

    sources: list[Source] = field(default_factory=list)

    def add(self, source: Source) -> None:
        """One more source; better ones first."""
        self.sources.append(source)

    def drop(self, key: str) -> None:
        """Forget a source that is not what it was believed to be."""
        self.sources = [source for source in self.sources if source.key != key]

    def content(self, prefix: bytes) -> Source | None:
        """A source of the content whose id begins with *prefix*."""
        return next((s for s in self.sources if s.content and s.content.startswith(prefix)), None)

    def file(self, sha256: bytes) -> Source | None:
        """A source that is, byte for byte, the file with this SHA-256."""
        return next((s for s in self.sources if s.sha256 == sha256), None)

    def contents(self) -> set[ContentId]:
        """All contents."""
        return {s.content for s in self.sources if s.content}

    def of_track(self, track: str) -> list[Source]:
        """The sources of a kind of content."""
        return [s for s in self.sources if s.track == track and s.content]

    def prove(self, source: Source) -> Source:
        """Read *source* to its end and replace it by what it is. Raises LocalError when gone."""
        proven = read_source(source)
        self.sources = [proven if s.key == source.key else s for s in self.sources]
        return proven

    def open_sides(self) -> None:
        """Add what zchunk files hold besides their content: chunk lengths, dictionary."""
        for source in [s for s in self.sources if s.codec is Codec.ZCK]:
            for number, data in enumerate(_sides_of(source)):
                self.add(
                    Source(
                        f"{source.key} side {number}",
                        "",
                        partial(io.BytesIO, data),
                        source.stamp,
                        Codec.NONE,
                        None,
                        ContentId.of(data),
                    )
                )

    def seen(self) -> dict[str, Seen]:
        """What the state shall remember: everything proven."""
        return {
            s.key: Seen(s.stamp, s.sha256, s.content)
            for s in self.sources
            if s.proven and s.sha256 is not None
        }


def _sides_of(source: Source) -> list[bytes]:
    file = source.open()
    if file is None:
        return []
    with file:
        try:
            return zck.read_sides(file)
        except FormatError:
            return []  # damaged: of no use as a base


def read_source(source: Source) -> Source:
    """*source* with its ids proven; without a content where it cannot be opened.

    Raises LocalError when it is gone.
    """
    file = source.open()
    if file is None:
        raise LocalError(f"{source.key}: gone")
    with file:
        if source.codec is Codec.NONE:
            _, digest = hash_file(file)
            return replace(source, sha256=FileId(digest), content=ContentId(digest), proven=True)
        if source.codec is Codec.ZCK:  # read by position: the header tells what to read
            return _read_zck(source, file)
        published, opened = hashlib.sha256(), hashlib.sha256()
        content: ContentId | None = None
        try:
            tapped: BinaryIO = _Tapped(file, published)  # type: ignore[assignment]
            for piece in open_stream(tapped, source.codec, limit=LIMITS.content):
                opened.update(piece)
            content = ContentId(opened.digest())
        except FormatError:
            pass  # damaged, or a codec that is not read here: of no use as a base
        hash_rest(file, published)
    return replace(source, sha256=FileId(published.digest()), content=content, proven=True)


def _read_zck(source: Source, file: BinaryIO) -> Source:
    _, digest = hash_file(file)
    file.seek(0)
    opened = hashlib.sha256()
    content: ContentId | None = None
    try:
        for piece in open_stream(file, source.codec, limit=LIMITS.content):
            opened.update(piece)
        content = ContentId(opened.digest())
    except FormatError:
        pass  # as any damaged file: of no use as a base
    return replace(source, sha256=FileId(digest), content=content, proven=True)


def hash_rest(file: BinaryIO, digest: _Digest) -> None:
    """Feed what is left of *file* to *digest*."""
    while piece := file.read(1 << 20):
        digest.update(piece)


class _Tapped:
    """A file whose bytes are hashed as they are read."""

    def __init__(self, file: BinaryIO, digest: _Digest) -> None:
        self._file = file
        self._digest = digest

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        return data


# -- DEST ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Present:
    """The publish that DEST holds."""

    layout: Layout
    main: str
    data: bytes  #: of the main file
    listing: Listing


def present(dest: Destination) -> Present | None:
    """The publish in DEST, rpm-md first; None where there is none that can be read.

    Raises InputError and LocalError as ``Destination.read``.
    """
    for layout in LAYOUTS.values():
        for path in reversed(layout.mains()):
            kind, _ = layout.describe(path)
            if kind in ("signature", "key"):
                continue
            data = dest.read(path, LIMITS.main)
            if data is None:
                continue
            try:
                return Present(layout, path, data, layout.parse(data, path))
            except FormatError:
                return None  # broken: as good as nothing, and replaced by this run
    return None


def of_destination(
    dest: Destination, now: Present | None, seen: Mapping[str, Seen], paths: Iterable[str]
) -> Stock:
    """What DEST holds: the files of its main file, and *paths* (what earlier runs put there)."""
    stock = Stock()
    listed: dict[str, PublishedFile | None] = dict.fromkeys(paths)
    if now is not None:
        listed.update(now.listing.by_path())
        listed.update(dict.fromkeys(now.layout.mains()))
    for path, file in listed.items():
        stamp = dest.stamp(path)
        if stamp is None:
            continue
        track = file.track if file else _track_of_main(path)
        source = _source(path, track, partial(dest.open, path), stamp, file, seen)
        if source is not None:
            stock.add(source)
    return stock


def _track_of_main(path: str) -> str:
    for layout in LAYOUTS.values():
        if path in layout.mains():
            return layout.describe(path)[1]
    return _track_of_name(path.rpartition("/")[2])


def _source(
    key: str,
    track: str,
    opener: Callable[[], BinaryIO | None],
    stamp: Stamp,
    file: PublishedFile | None,
    seen: Mapping[str, Seen],
) -> Source | None:
    """The source at *key*: remembered, else claimed by its main file, else read now."""
    handle = opener()
    if handle is None:
        return None
    with handle:
        codec = codec_of(key, handle.read(16))
    claim = Source(key, track, opener, stamp, codec, None, None)
    known = seen.get(key)
    if known is not None and known.stamp == stamp:
        claim = replace(claim, sha256=known.sha256, content=known.content, proven=True)
        if claim.content is not None:
            return claim
    if file is not None and file.size in (None, stamp.size):
        sha256 = claim.sha256
        if sha256 is None and file.checksum is not None and file.checksum.algorithm == "sha256":
            sha256 = FileId.from_hex(file.checksum.hex)
        content = ContentId(sha256) if sha256 and codec is Codec.NONE else file.open_id
        if sha256 is not None and content is not None:
            return replace(claim, sha256=sha256, content=content)
    try:
        return read_source(claim)
    except LocalError:
        return None  # it went while we looked


# -- seeds ---------------------------------------------------------------------------------------


def of_seed(seed: Path, seen: Mapping[str, Seen]) -> Iterator[Source]:
    """What lies below *seed*: publishes with their main files, and loose metadata files.

    Raises InputError when it is not a folder.
    """
    if not seed.is_dir():
        raise InputError(f"seed {seed}: not a folder", code="no-seed")
    root = seed.resolve()
    listed = _listed_in(root)
    for count, path in enumerate(_walk(root)):
        if count >= _SEED_FILES:
            return
        file = listed.get(str(path))
        name = path.name
        if file is None and not _looks_useful(name):
            continue
        try:
            status = path.stat()
        except OSError:
            continue  # gone, or not ours to read: a seed is a help, not a demand
        if not stat.S_ISREG(status.st_mode) or status.st_size > LIMITS.published:
            continue
        track = file.track if file else _track_of_main_name(name)
        try:
            source = _source(
                str(path),
                track,
                partial(_open, path),
                stamp_of(status),
                file,
                seen,
            )
        except OSError:
            continue  # as above
        if source is not None:
            yield source


def _open(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb", buffering=0)
    except OSError:
        return None


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        depth = len(Path(folder).relative_to(root).parts)
        folders[:] = sorted(f for f in folders if f not in (FOLDER, "tidings"))
        if depth >= _SEED_DEPTH:
            folders.clear()
        for name in sorted(names):
            yield Path(folder) / name


def _listed_in(root: Path) -> dict[str, PublishedFile]:
    """The files that main files below *root* name, by absolute path."""
    found: dict[str, PublishedFile] = {}
    for path in _walk(root):
        for layout in LAYOUTS.values():
            for main in layout.mains():
                if path.name != main.rpartition("/")[2] or layout.describe(main)[0] in (
                    "signature",
                    "key",
                ):
                    continue
                for base, file in _listing_at(path, layout, main):
                    found.setdefault(base, file)
    return found


def _listing_at(path: Path, layout: Layout, main: str) -> Iterator[tuple[str, PublishedFile]]:
    try:
        if path.stat().st_size > LIMITS.main:
            return
        listing = layout.parse(path.read_bytes(), main)
    except (OSError, FormatError):
        return  # not a publish, or not readable: of no help
    root = path.parents[main.count("/")]
    for file in listing.files:
        yield str(root / file.path), file
        # A folder of another name that holds what was in repodata/.
        yield str(path.parent / file.path.rpartition("/")[2]), file


def _looks_useful(name: str) -> bool:
    if any(name == main.rpartition("/")[2] for lay in LAYOUTS.values() for main in lay.mains()):
        return True
    return name.endswith(_SEED_SUFFIXES) or name in ("Packages", "Sources")


def _track_of_main_name(name: str) -> str:
    for layout in LAYOUTS.values():
        for main in layout.mains():
            if main.rpartition("/")[2] == name:
                return layout.describe(main)[1]
    return _track_of_name(name)


def _track_of_name(name: str) -> str:
    """primary from ``<hash>-primary.xml.gz``."""
    name = _HASH.sub("", name)
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    stem = name.removesuffix(".xml").removesuffix(".yaml")
    return {"comps": "group"}.get(stem, stem)


def gather(
    dest: Destination,
    now: Present | None,
    seen: Mapping[str, Seen],
    owned: Iterable[str],
    seeds: Sequence[Path],
) -> Stock:
    """Everything that lies here: DEST first, then the seeds in their order."""
    stock = of_destination(dest, now, seen, owned)
    for seed in seeds:
        for source in of_seed(seed, seen):
            stock.add(source)
    return stock
