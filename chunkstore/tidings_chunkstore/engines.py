"""Compressors by name: what turns a content into published bytes, to the last bit.

An engine is one encoder in one state of its source code, for the same format and level give
other bytes from another encoder, and at times from another release. The table is small on
purpose: one more engine is one more row, a row in the format document, and a vector.

========== ==================== ==================================================================
engine     parameters           bytes
========== ==================== ==================================================================
zlib       level, memLevel      raw deflate (RFC 1951) by the stock zlib, 32 KiB window
gzip-1     level, rsyncable     raw deflate by the GNU gzip program 1.x (its own deflate)
zstd-X.Y.Z level, flags[, size] one zstd frame (RFC 8878) by libzstd X.Y.Z, streamed; also the
                                chunks of a zchunk file
liblzma    preset, extreme,     one .xz stream, one block
           check
bzip2      level                one bzip2 stream
========== ==================== ==================================================================

Engines are looked for when they are first asked for. Parameters are enumerated integers, and the
one program that is started gets a fixed command line made from them: no text from outside
reaches it.
"""

from __future__ import annotations

import bz2
import functools
import hashlib
import importlib
import lzma
import os
import re
import shutil
import subprocess
import threading
import zlib
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from .errors import EngineError
from .libzstd import SharedZstd, libraries
from .limits import KIB, LIMITS

Buffer: TypeAlias = bytes | bytearray | memoryview

#: Flags of a zstd recipe. SIZE: the content size is pledged and lies in the frame header, and a
#: third parameter holds it. WORKERS: the multi-threaded encoder, which the zstd program uses even
#: for one thread; its bytes do not depend on the number of threads.
ZSTD_CHECKSUM, ZSTD_SIZE, ZSTD_WORKERS = 1, 2, 4

#: Numbers of ``ZSTD_cParameter`` that lie in zstd.h's stable part.
LEVEL, STRATEGY, CHECKSUM, WORKERS = 100, 107, 201, 400

#: Level, flags, size. Levels 20 and up take a gigabyte, and no publisher uses them.
ZSTD_PARAMETERS: tuple[Container[int], ...] = (
    range(1, 20),
    range(8),
    range(LIMITS.content + 1),
)

#: Bytes below which libzstd takes a dictionary for none, and Python's modules refuse it.
MIN_DICTIONARY = 8

#: Python modules that carry a libzstd, in the order in which a search tries them.
MODULES = ("compression.zstd", "backports.zstd", "pyzstd")

_ZSTD_NAME = re.compile(r"zstd-\d{1,2}\.\d{1,3}\.\d{1,3}")
_NAME = re.compile(r"[a-z0-9][a-z0-9.+-]{0,31}")


class Stream(Protocol):
    """A running compression. Both calls release the GIL while they compress."""

    def compress(self, data: Buffer, /) -> bytes:
        """Take *data*; give the bytes that are ready."""

    def flush(self) -> bytes:
        """End the stream; give the rest."""


class ZstdStream(Protocol):
    """A libzstd compressor, reusable frame after frame."""

    def compress(self, data: Buffer, /) -> bytes:
        """Take *data*; give the bytes that are ready."""

    def flush(self) -> bytes:
        """End the frame; give the rest."""

    def frame(self, data: Buffer, /) -> bytes:
        """*data* as one whole frame that states its content size."""

    def pledge(self, size: int, /) -> None:
        """Promise the size of the next frame's content, in bytes."""


#: Makes a compressor from libzstd's own parameter numbers and an optional dictionary.
ZstdMaker: TypeAlias = Callable[[Mapping[int, int], bytes | None], ZstdStream]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What ``doctor`` and ``stats`` show of one engine."""

    name: str
    version: str  #: as found here; empty when not available
    available: bool
    how: str  #: how to get it


# --- zlib, liblzma, bzip2: the standard library ---------------------------------------------------

#: SHA-256 of what the stock zlib makes of ``_sample()`` at level 6, and of the same at level 9.
_ZLIB_SAMPLES = {
    6: "13fb4106adce05b82003054f816a2015cffe356ab83246d1719bf1ef20750d64",
    9: "5342e1d21684ef2ca084da2dd4f42d3568fffd54dcdf43b38f386323b88e0791",
}


def _sample() -> bytes:
    """A text of 40 KB on which deflate encoders differ."""
    return b"".join(b"<p n='%d' v='%d'/>" % (i * i % 1021, i * 7919 % 101) for i in range(2200))


@functools.cache
def _zlib_version() -> str:
    """The version of a zlib that compresses as the stock zlib does.

    Python may be linked to zlib-ng, which answers to the same name with other bytes, so the
    test is a compression.
    """
    for level, expected in _ZLIB_SAMPLES.items():
        stream = _zlib((level, 8))
        made = stream.compress(_sample()) + stream.flush()
        if hashlib.sha256(made).hexdigest() != expected:
            return ""
    return zlib.ZLIB_RUNTIME_VERSION


def _zlib(params: tuple[int, ...]) -> Stream:
    level, mem_level = params
    return zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, mem_level)


def _lzma(params: tuple[int, ...]) -> Stream:
    preset, extreme, check = params
    flag = lzma.PRESET_EXTREME if extreme else 0
    return lzma.LZMACompressor(lzma.FORMAT_XZ, check, preset | flag)


def _bzip2(params: tuple[int, ...]) -> Stream:
    return bz2.BZ2Compressor(params[0])


# --- GNU gzip: a program -----------------------------------------------------------------------


@functools.cache
def _gzip_program() -> str | None:
    return shutil.which("gzip")


@functools.cache
def _gzip_version() -> str:
    """The version of a GNU gzip 1.x on PATH; busybox and pigz answer with other words."""
    program = _gzip_program()
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.match(rb"gzip (1\.\d+)\b", done.stdout)
    return found[1].decode() if found and b"Free Software Foundation" in done.stdout else ""


class _GzipProgram:
    """GNU gzip as a stream of raw deflate: header and trailer are cut off.

    A thread drains the program while ``compress`` fills it, so neither waits for the other.
    """

    def __init__(self, params: tuple[int, ...]) -> None:
        level, rsyncable = params
        argv = [_gzip_program() or "gzip", f"-{level:d}", "-n", "-c"]
        if rsyncable:
            argv.append("--rsyncable")
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"LC_ALL": "C"},
        )
        self._lock = threading.Lock()
        self._ready = bytearray()
        self._header_left = 10
        self._reader = threading.Thread(target=self._drain, name="gzip", daemon=True)
        self._reader.start()

    def _drain(self) -> None:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while piece := os.read(descriptor, 256 * KIB):
            with self._lock:
                self._ready += piece

    def _take(self, keep: int) -> bytes:
        with self._lock:
            skip = min(self._header_left, len(self._ready))
            self._header_left -= skip
            piece = bytes(self._ready[skip : len(self._ready) - keep])
            del self._ready[: skip + len(piece)]
        return piece

    def compress(self, data: Buffer) -> bytes:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
        except OSError as error:
            raise EngineError("the gzip program ended early") from error
        return self._take(8)

    def flush(self) -> bytes:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError as error:
            raise EngineError("the gzip program ended early") from error
        self._reader.join()
        if self._process.wait() != 0:
            raise EngineError(f"the gzip program failed with status {self._process.returncode}")
        return self._take(8)

    def close(self) -> None:
        """Stop the program, whatever it is at. Harmless after ``flush``."""
        if self._process.poll() is None:
            self._process.kill()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:
                pass  # what a killed program did not read is of no interest
        self._process.wait()


# --- libzstd: by version, whoever brings it -----------------------------------------------------


class _ModuleZstd:
    """A libzstd compressor of a Python module (``compression.zstd``, ``pyzstd``)."""

    __slots__ = ("_compressor", "_error", "_frame", "_pledge")

    def __init__(
        self,
        module: Any,
        compressor: Any,
        frame: Callable[[Buffer], bytes],
        pledge: Callable[[int], None],
    ) -> None:
        self._error: type[Exception] = module.ZstdError
        self._compressor = compressor
        self._frame = frame
        self._pledge = pledge

    def compress(self, data: Buffer) -> bytes:
        made: bytes = self._compressor.compress(data)
        return made

    def flush(self) -> bytes:
        made: bytes = self._compressor.flush()
        return made

    def frame(self, data: Buffer) -> bytes:
        try:
            return self._frame(data)
        except self._error as error:  # a dictionary that is damaged inside shows only here
            raise EngineError(f"libzstd refuses: {error}") from error

    def pledge(self, size: int) -> None:
        self._pledge(size)


def _to_the_end(compressor: Any, data: Buffer) -> bytes:
    made: bytes = compressor.compress(data, compressor.FLUSH_FRAME)
    return made


def _module_maker(module: Any) -> ZstdMaker:
    is_pyzstd = module.__name__ == "pyzstd"

    def make(options: Mapping[int, int], dictionary: bytes | None) -> ZstdStream:
        # Loaded by value, as ZSTD_CCtx_loadDictionary does: a digested one compresses otherwise.
        loaded = None
        if dictionary is not None and len(dictionary) >= MIN_DICTIONARY:
            raw = not dictionary.startswith(b"\x37\xa4\x30\xec")
            try:
                loaded = module.ZstdDict(dictionary, is_raw=raw).as_undigested_dict
            except ValueError as error:
                raise EngineError(f"{module.__name__} refuses the dictionary: {error}") from error
        given = dict(options)
        if is_pyzstd:
            compressor = module.ZstdCompressor(given, loaded)
            # With room for all of the frame libzstd takes the content at once, as zchunk has it;
            # streamed, a content beyond the window wraps around and gives other bytes.
            whole = module.RichMemZstdCompressor(given, loaded).compress
            return _ModuleZstd(module, compressor, whole, compressor._set_pledged_input_size)
        compressor = module.ZstdCompressor(options=given, zstd_dict=loaded)
        frame = functools.partial(_to_the_end, compressor)
        return _ModuleZstd(module, compressor, frame, compressor.set_pledged_input_size)

    return make


@functools.cache
def zstd_makers() -> Mapping[str, tuple[str, ZstdMaker]]:
    """Engine name to (provider, maker), in the order in which a search tries them.

    The standard library's libzstd (or its backport's) comes first, for every client has it;
    then 1.5.6, which made most of the files published today; then shared libraries.
    """
    found: dict[str, tuple[str, ZstdMaker]] = {}
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        found.setdefault(f"zstd-{module.zstd_version}", (name, _module_maker(module)))
    for version, provider, path in libraries():
        found.setdefault(f"zstd-{version}", (provider, functools.partial(SharedZstd, path)))
    return found


def _zstd(name: str, params: tuple[int, ...]) -> Stream:
    level, flags = params[:2]
    options = {LEVEL: level}
    if flags & ZSTD_CHECKSUM:
        options[CHECKSUM] = 1
    if flags & ZSTD_WORKERS:
        options[WORKERS] = 1
    stream = zstd_makers()[name][1](options, None)
    if flags & ZSTD_SIZE:
        stream.pledge(params[2])
    return stream


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Engine:
    """One row: the parameters' allowed values, how to start it, what is found of it here."""

    parameters: tuple[Container[int], ...]
    start: Callable[[tuple[int, ...]], Stream]
    version: Callable[[], str]  #: empty when it is missing, or not what its name says
    how: str


_STDLIB = "comes with Python"
_FIXED: Mapping[str, _Engine] = {
    "zlib": _Engine(
        (range(1, 10), (8, 9)), _zlib, _zlib_version, "a Python that is linked to the stock zlib"
    ),
    "gzip-1": _Engine(
        (range(1, 10), range(2)), _GzipProgram, _gzip_version, "GNU gzip 1.x in the PATH"
    ),
    "liblzma": _Engine((range(10), range(2), (0, 1, 4, 10)), _lzma, lambda: "5", _STDLIB),
    "bzip2": _Engine((range(1, 10),), _bzip2, lambda: "1.0", _STDLIB),
}

#: The engines that publishers meet most, named by ``engines()`` even where they are missing.
_KNOWN_ZSTD = {
    "zstd-1.4.4": "pip install createrepo_c",
    "zstd-1.5.6": "pip install pyzstd==0.16.2",
    "zstd-1.5.7": "Python 3.14, or pip install backports.zstd",
}


def is_engine_name(name: str) -> bool:
    """Whether *name* could name an engine of this release or of a later one."""
    return _NAME.fullmatch(name) is not None


def is_zstd(name: str) -> bool:
    """Whether *name* is a libzstd of some version."""
    return _ZSTD_NAME.fullmatch(name) is not None


def parameters(name: str) -> tuple[Container[int], ...] | None:
    """The allowed values of each parameter of engine *name*; None for an unknown engine."""
    if is_zstd(name):
        return ZSTD_PARAMETERS
    row = _FIXED.get(name)
    return row.parameters if row else None


def is_available(name: str) -> bool:
    """Whether engine *name* is here and compresses as its name says."""
    if is_zstd(name):
        return name in zstd_makers()
    row = _FIXED.get(name)
    return row is not None and row.version() != ""


def start(name: str, params: tuple[int, ...]) -> Stream:
    """Start a compression. Raises EngineError when engine *name* is not available here."""
    require(name)
    return _zstd(name, params) if is_zstd(name) else _FIXED[name].start(params)


def require(name: str) -> None:
    """Raises EngineError when engine *name* is not available here."""
    if not is_available(name):
        how = _KNOWN_ZSTD.get(name) or (_FIXED[name].how if name in _FIXED else "a newer release")
        raise EngineError(f"the engine {name} is not available here ({how})", engine=name)


def engines() -> tuple[EngineInfo, ...]:
    """Every engine this release knows, whether it is here or not."""
    rows = []
    for name, row in _FIXED.items():
        version = row.version()
        rows.append(EngineInfo(name, version, version != "", row.how))
    makers = zstd_makers()
    for name in sorted({*_KNOWN_ZSTD, *makers}):
        version = name.removeprefix("zstd-") if name in makers else ""
        how = makers[name][0] if name in makers else _KNOWN_ZSTD[name]
        rows.append(EngineInfo(name, version, name in makers, how))
    return tuple(rows)
