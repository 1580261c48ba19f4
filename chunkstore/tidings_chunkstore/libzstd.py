"""Shared libraries of libzstd by ctypes: more versions, on machines that have them.

A distribution's createrepo_c compresses with the distribution's libzstd, and the createrepo_c
wheel with the one it carries (1.4.4), so these are the engines that made such files. Only
zstd.h's stable interface is used (libzstd 1.4.0 and later); ctypes releases the GIL during each
call.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import re
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

from .errors import EngineError
from .limits import KIB

_SYSTEM = "libzstd.1.dylib" if sys.platform == "darwin" else "libzstd.so.1"
_WHEELS = ("createrepo_c",)
_CONTINUE, _END = 0, 2


class _InBuffer(ctypes.Structure):
    _fields_ = (("src", ctypes.c_void_p), ("size", ctypes.c_size_t), ("pos", ctypes.c_size_t))


class _OutBuffer(ctypes.Structure):
    _fields_ = (("dst", ctypes.c_void_p), ("size", ctypes.c_size_t), ("pos", ctypes.c_size_t))


@functools.cache
def _library(path: str) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(path)
    except OSError:
        return None
    size, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    signatures: dict[str, tuple[type, tuple[type, ...]]] = {
        "ZSTD_versionNumber": (ctypes.c_uint, ()),
        "ZSTD_isError": (ctypes.c_uint, (size,)),
        "ZSTD_createCCtx": (pointer, ()),
        "ZSTD_freeCCtx": (size, (pointer,)),
        "ZSTD_CCtx_setParameter": (size, (pointer, number, number)),
        "ZSTD_compressBound": (size, (size,)),
        "ZSTD_compress2": (size, (pointer, pointer, size, ctypes.c_char_p, size)),
        "ZSTD_CCtx_setPledgedSrcSize": (size, (pointer, ctypes.c_ulonglong)),
        "ZSTD_CCtx_loadDictionary": (size, (pointer, ctypes.c_char_p, size)),
        "ZSTD_compressStream2": (
            size,
            (pointer, ctypes.POINTER(_OutBuffer), ctypes.POINTER(_InBuffer), number),
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name, None)
        if function is None:
            return None
        function.restype, function.argtypes = result, arguments
    return library


def libraries() -> Iterator[tuple[str, str, str]]:
    """Version (as ``1.5.4``), provider and path of each libzstd found here."""
    places = [("the system's libzstd", _SYSTEM)]
    places += [(f"the {wheel} wheel", path) for wheel in _WHEELS for path in _carried(wheel)]
    for provider, path in places:
        library = _library(path)
        if library is not None:
            number = library.ZSTD_versionNumber()
            yield f"{number // 10000}.{number // 100 % 100}.{number % 100}", provider, path


def _carried(wheel: str) -> list[str]:
    """Paths of the libzstd that auditwheel put into an installed *wheel*."""
    try:
        files = importlib.metadata.files(wheel) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    name = re.compile(r"libzstd-[0-9a-f]{4,16}\.so[0-9.]*")
    return [str(Path(file.locate())) for file in files if name.fullmatch(file.name)]


class SharedZstd:
    """A libzstd compressor, reusable frame after frame. Memory: libzstd's own and 128 KiB."""

    def __init__(self, path: str, options: Mapping[int, int], dictionary: bytes | None) -> None:
        """Raises EngineError when *path* is no libzstd, or it refuses a parameter."""
        library = _library(path)
        if library is None:
            raise EngineError("libzstd cannot be loaded any more")
        self._library = library
        self._context = library.ZSTD_createCCtx()
        if not self._context:
            raise MemoryError("libzstd made no context")
        weakref.finalize(self, library.ZSTD_freeCCtx, self._context)
        self._room = ctypes.create_string_buffer(128 * KIB)
        for parameter, value in options.items():
            self._check(library.ZSTD_CCtx_setParameter(self._context, parameter, value))
        if dictionary is not None:
            self._check(
                library.ZSTD_CCtx_loadDictionary(self._context, dictionary, len(dictionary))
            )

    def compress(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take *data*; give the bytes that are ready."""
        return self._feed(data, _CONTINUE)

    def flush(self) -> bytes:
        """End the frame; give the rest."""
        return self._feed(b"", _END)

    def frame(self, data: bytes | bytearray | memoryview) -> bytes:
        """*data* as one whole frame that states its content size; takes the frame's room too."""
        room = ctypes.create_string_buffer(self._library.ZSTD_compressBound(len(data)))
        size = self._library.ZSTD_compress2(self._context, room, len(room), bytes(data), len(data))
        self._check(size)
        return ctypes.string_at(room, size)

    def pledge(self, size: int) -> None:
        """Promise the size of the next frame's content, in bytes."""
        self._check(self._library.ZSTD_CCtx_setPledgedSrcSize(self._context, size))

    def _feed(self, data: bytes | bytearray | memoryview, directive: int) -> bytes:
        held = data if isinstance(data, bytes) else bytes(data)
        source = _InBuffer(ctypes.cast(ctypes.c_char_p(held), ctypes.c_void_p), len(held), 0)
        target = _OutBuffer(ctypes.addressof(self._room), len(self._room), 0)
        made = []
        while True:
            left = self._library.ZSTD_compressStream2(
                self._context, ctypes.byref(target), ctypes.byref(source), directive
            )
            self._check(left)
            made.append(ctypes.string_at(self._room, target.pos))
            target.pos = 0
            if left == 0 if directive == _END else source.pos == source.size:
                return b"".join(made)

    def _check(self, result: int) -> None:
        if self._library.ZSTD_isError(result):
            raise EngineError(f"libzstd refused (code {result})")
