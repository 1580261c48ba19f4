"""zchunk as createrepo_c makes it: a chunk is a run of packages of one source, zstd level 10.

Written through libzck, as createrepo_c does; its own command can only split at a fixed string.
Options by their numbers in zck.h (1.1 and later).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tidings_chunkstore.errors import LocalError

from ..history import Version, VersionFile
from ..process import Usage, run
from .base import FileRival, link_or_copy, safe

_MANUAL_CHUNK = 101  # ZCK_MANUAL_CHUNK
_LEVEL = 1000  # ZCK_ZSTD_COMP_LEVEL
_DICTIONARY = 100  # ZCK_COMP_DICT
_ZSTD_LEVEL = 10
_PACKAGE = re.compile(rb"^[ \t]*<package[ >]", re.MULTILINE)
_SOURCE = re.compile(rb"<rpm:sourcerpm>([^<]*)</rpm:sourcerpm>")
_STANZA = re.compile(rb"^Package: ", re.MULTILINE)


class Zchunk(FileRival):
    """zckdl against a .zck file, from the .zck of before."""

    programs = ("zckdl", "unzck", "zck_gen_zdict")
    version_of = ("zckdl", "--version")

    def __init__(self, *, dictionary: bool) -> None:
        self.dictionary = dictionary
        self.name = "zchunk-dict" if dictionary else "zchunk"
        self.title = "zchunk, dictionary" if dictionary else "zchunk"
        self.about = "zckdl; .zck by libzck as createrepo_c does: chunk per source, level 10" + (
            ", with a dictionary by zck_gen_zdict" if dictionary else ""
        )

    def missing(self) -> str | None:
        lacking = super().missing()
        return lacking or (None if ctypes.util.find_library("zck") else "no libzck here")

    def add(
        self, old: VersionFile | None, file: VersionFile, version: Version, *, measured: bool
    ) -> None:
        target = self.place.tree / self._name(file)
        data = self.opened(file).path.read_bytes()
        cuts = _cuts(data, self._runs(version))
        write_zck(target, data, cuts, self._dictionary(file, data, cuts))
        link_or_copy(target, self.place.kept / target.name)

    def remove(self, old: VersionFile) -> None:
        (self.place.tree / self._name(old)).unlink(missing_ok=True)

    def fetch(self, old: VersionFile | None, file: VersionFile) -> tuple[Usage, Path]:
        folder, kept = self.place.client, self.place.kept
        source = ["-s", str(kept / self._name(old))] if old is not None else []
        usage = run(["zckdl", "-q", "-q", *source, f"{self.url}/{self._name(file)}"], folder)
        result = folder / self._name(file)
        opened = folder / "opened"
        # Not charged: zchunk's user reads the .zck itself.
        run(["unzck", "--stdout", result], folder, stdout=opened)
        return usage, opened

    def _name(self, file: VersionFile) -> str:
        return f"{self.stem(file)}.zck"

    def _dictionary(self, file: VersionFile, data: bytes, cuts: list[int] | None) -> bytes | None:
        """One for each track, trained on the first version that is published."""
        if not self.dictionary or cuts is None:
            return None
        made = self.place.bench.work / "dictionaries" / safe(file.track)
        if not made.exists():
            made.parent.mkdir(exist_ok=True)
            plain = made.with_name(f"{made.name}.zck")
            write_zck(plain, data, cuts, None)
            try:
                run(["zck_gen_zdict", plain.name], made.parent)
            except LocalError:
                made.write_bytes(b"")  # too few chunks to train on
            else:
                made.with_name(f"{made.name}.zdict").rename(made)
        return made.read_bytes() or None

    def _runs(self, version: Version) -> list[int]:
        """Packages in each run of one source, by primary; empty without one."""
        primary = next((f for f in version.files if f.type == "primary"), None)
        if primary is None:
            return []
        sources = _SOURCE.findall(self.opened(primary).path.read_bytes())
        runs: list[int] = []
        last: bytes | None = None
        for source in sources:
            if source == last:
                runs[-1] += 1
            else:
                runs.append(1)
            last = source
        return runs


def _cuts(data: bytes, runs: list[int]) -> list[int] | None:
    """Offsets at which chunks begin; None: cut where zchunk would by itself."""
    starts = [match.start() for match in _PACKAGE.finditer(data)]
    if not starts:
        starts = [match.start() for match in _STANZA.finditer(data)]
        return starts or None
    if sum(runs) != len(starts):
        return starts
    cuts = []
    position = 0
    for count in runs:
        cuts.append(starts[position])
        position += count
    end = data.rfind(b"</package>")
    return [*cuts, data.find(b"\n", end) + 1] if end >= 0 else cuts


def _pieces(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    bounds = [0, *(cut for cut in cuts if 0 < cut < len(data)), len(data)]
    for start, end in itertools.pairwise(bounds):
        yield data[start:end]


def write_zck(target: Path, data: bytes, cuts: list[int] | None, dictionary: bytes | None) -> None:
    """Write *data* as .zck with chunks that begin at *cuts*. Raises LocalError."""
    name = ctypes.util.find_library("zck")
    if name is None:
        raise LocalError("no libzck here", code="program")
    library = ctypes.CDLL(name)
    library.zck_create.restype = ctypes.c_void_p
    library.zck_write.restype = ctypes.c_ssize_t
    library.zck_end_chunk.restype = ctypes.c_ssize_t
    library.zck_get_error.restype = ctypes.c_char_p
    context = ctypes.c_void_p(library.zck_create())
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)

    def check(good: bool) -> None:
        if not good:
            said = library.zck_get_error(context) or b""
            raise LocalError(f"libzck: {said.decode(errors='replace')}", code="program")

    try:
        check(library.zck_init_write(context, descriptor))
        check(library.zck_set_ioption(context, _LEVEL, ctypes.c_ssize_t(_ZSTD_LEVEL)))
        if dictionary is not None:
            size = ctypes.c_size_t(len(dictionary))
            check(library.zck_set_soption(context, _DICTIONARY, dictionary, size))
        if cuts is None:
            check(library.zck_write(context, data, ctypes.c_size_t(len(data))) == len(data))
        else:
            check(library.zck_set_ioption(context, _MANUAL_CHUNK, ctypes.c_ssize_t(1)))
            for piece in _pieces(data, cuts):
                check(library.zck_write(context, piece, ctypes.c_size_t(len(piece))) >= 0)
                check(library.zck_end_chunk(context) >= 0)
        check(library.zck_close(context))
    finally:
        library.zck_free(ctypes.byref(context))
        os.close(descriptor)


ZCHUNK = partial(Zchunk, dictionary=False)
ZCHUNK_DICT = partial(Zchunk, dictionary=True)
