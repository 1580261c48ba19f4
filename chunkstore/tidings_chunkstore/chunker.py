"""Content-defined chunking: FastCDC with pinned parameters, and the ids of the chunks.

The algorithm is that of PyPI ``fastcdc`` 1.7.0, a port of ronomon's FastCDC: a gear hash that
shifts right by one bit a byte, a strict mask of ``log2(avg) + 1`` bits up to ``avg - 1.5 * min``
bytes, then a loose one of ``log2(avg) - 1`` bits up to ``max``. A cut depends on nothing but the
``max`` bytes that follow the cut before it, which is what lets a file be cut window by window.

``fastcdc`` and ``blake3`` are imported on first use: a client on the delta route needs neither.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import Any, BinaryIO

from .errors import EngineError, FormatError
from .ids import ChunkId
from .limits import KIB, LIMITS, MIB

Buffer = bytes | bytearray | memoryview

#: The only algorithm so far. A change of cuts for the same parameters is a new name.
ALGORITHM = "fastcdc-ronomon"

#: The library's own lower bounds, in bytes.
_LEAST_MIN, _LEAST_AVG, _LEAST_MAX = 64, 256, 1024


@dataclass(frozen=True, slots=True)
class ChunkerParams:
    """What decides where a content is cut; every index carries it. Sizes in bytes.

    Raises FormatError for an unknown algorithm and for sizes that the algorithm or the limits do
    not allow, so an instance read from the network is safe to run.
    """

    name: str
    min: int
    avg: int
    max: int

    def __post_init__(self) -> None:
        if self.name != ALGORITHM:
            raise FormatError(f"unknown chunker {str(self.name)[:40]!r}")
        sizes = (self.min, self.avg, self.max)
        if any(type(size) is not int for size in sizes):
            raise FormatError(f"chunk sizes are not integers: {sizes!r:.80}")
        if not (
            _LEAST_MIN <= self.min <= self.avg <= self.max <= LIMITS.chunk
            and self.avg >= _LEAST_AVG
            and self.max >= _LEAST_MAX
        ):
            raise FormatError(f"chunk sizes out of range: min, avg, max = {sizes!r}")

    @classmethod
    def of(cls, minimum: int, average: int, maximum: int) -> ChunkerParams:
        """The current algorithm with these sizes."""
        return cls(ALGORITHM, minimum, average, maximum)


def params_for(
    content_size: int, published_size: int, previous: ChunkerParams | None = None
) -> ChunkerParams:
    """The parameters for a content of *content_size* bytes, published in *published_size* bytes.

    docs/adr/0001-chunk-parameters.md has the rule and the measurements behind it. *previous* are
    those of the same file's last version: other cuts would end all reuse, so they are kept as
    long as a content of half or twice the size would have got them.
    """
    if previous is not None and any(
        previous == _rule(size, published_size)
        for size in (content_size // 2, content_size, content_size * 2)
    ):
        return previous
    return _rule(content_size, published_size)


def _rule(content_size: int, published_size: int) -> ChunkerParams:
    if content_size < 4 * MIB:
        average = 2 * KIB  # so few chunks that the index costs less than what is missing
    elif content_size < 12 * published_size:
        average = 4 * KIB
    else:
        average = 8 * KIB  # compresses so well that the index would outgrow the frames
    return ChunkerParams.of(average // 4, average, average * 8)


def cuts(data: Buffer, params: ChunkerParams) -> list[int]:
    """The end offset of every chunk of *data*, ascending; the last is its length.

    Empty data has no chunks. Raises EngineError when ``fastcdc`` is not installed.
    """
    view = memoryview(data).cast("B")
    return [
        chunk.offset + chunk.length
        for chunk in _fastcdc()(view, params.min, params.avg, params.max)
    ]


def chunk_ids(data: Buffer, ends: Sequence[int]) -> list[ChunkId]:
    """The BLAKE3-256 of each chunk of *data*; *ends* as ``cuts`` gives them."""
    digest = _blake3()
    view = memoryview(data).cast("B")
    return [ChunkId(digest(view[start:end])) for start, end in pairwise((0, *ends))]


def chunk_id(chunk: Buffer) -> ChunkId:
    """The BLAKE3-256 of *chunk*."""
    return ChunkId(_blake3()(chunk))


def scan(
    file: BinaryIO, params: ChunkerParams, *, window: int = 8 * MIB
) -> Iterator[tuple[int, memoryview]]:
    """Cut *file* from its position to its end: (end offset, bytes) of each chunk.

    Offsets count from the starting position. The cuts are those of ``cuts`` on the whole; memory
    stays near twice the larger of *window* and four chunks of ``params.max`` bytes. A view stays
    valid as long as it is held, and holds its window in memory.
    """
    window = max(window, 4 * params.max)
    base = 0
    data = b""
    while True:
        wanted = window - len(data)
        more = _read(file, wanted)
        last = len(more) < wanted
        data += more
        done = 0
        view = memoryview(data)
        for end in cuts(data, params):
            # Near the window's end a cut may come from the lack of bytes, not from their values.
            if not last and done + params.max > len(data):
                break
            yield base + end, view[done:end]
            done = end
        if last:
            return
        data = data[done:]
        base += done


def scan_ids(file: BinaryIO, params: ChunkerParams) -> tuple[list[int], list[ChunkId]]:
    """The end offsets and the ids of the chunks of *file*, in bounded memory; see ``scan``."""
    digest = _blake3()
    ends: list[int] = []
    ids: list[ChunkId] = []
    for end, chunk in scan(file, params):
        ends.append(end)
        ids.append(ChunkId(digest(chunk)))
    return ends, ids


def _read(file: BinaryIO, size: int) -> bytes:
    """*size* bytes, fewer only at the end of *file* (a raw file may return short)."""
    first = file.read(size)
    if len(first) == size or not first:
        return first
    parts = [first]
    left = size - len(first)
    while left and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


@cache
def _fastcdc() -> Callable[[memoryview, int, int, int], Iterable[Any]]:
    """The library's chunker, the compiled one where there is one."""
    # Without its compiled half the library prints a line to stdout, which is for data alone.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            library = import_module("fastcdc")
        except ImportError as error:
            raise EngineError("chunking needs the Python package fastcdc") from error
    function: Callable[[memoryview, int, int, int], Iterable[Any]] = library.fastcdc
    if getattr(function, "__name__", "") == "fastcdc_py":
        warnings.warn(
            "fastcdc has no compiled part for this Python: chunking runs at some 10 MB/s",
            RuntimeWarning,
            stacklevel=3,
        )
    return function


@cache
def _blake3() -> Callable[[Buffer], bytes]:
    """BLAKE3-256 as a function from bytes to a digest."""
    try:
        hasher = import_module("blake3").blake3
    except ImportError as error:
        raise EngineError("chunk ids need the Python package blake3") from error

    def digest(data: Buffer) -> bytes:
        result: bytes = hasher(data).digest()
        return result

    return digest
