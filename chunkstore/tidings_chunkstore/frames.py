"""Frames: one chunk, compressed on its own with the dictionary that its pack carries.

A frame is one zstd frame (RFC 8878) with the content size in its header, without checksum and
without dictionary id: the index already says which pack it lies in, and the chunk's id or the
content's SHA-256 proves the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from .errors import FormatError
from .limits import KIB, LIMITS, MIB
from .zstd import zstd

Buffer = bytes | bytearray | memoryview

#: Levels for FrameWriter, chosen by measuring (docs/adr/0001-chunk-parameters.md).
LEVEL_FIRST = 9
LEVEL_STEP = 15

#: Bytes of new chunks up to which the high level's time, at some 10 MB/s, is no matter.
_STEP_BYTES = 16 * MIB

#: Bytes of samples that a dictionary is trained on; one sample; the fewest worth a try; how many
#: chunks are compressed to see whether it pays.
_SAMPLE_BYTES = 4 * MIB
_PIECE = 4 * KIB
_FEWEST_SAMPLES = 16
_TRIAL_CHUNKS = 64

#: RFC 8878, section 3.1.1.
_MAGIC = b"\x28\xb5\x2f\xfd"


def train_dictionary(chunks: Sequence[Buffer], size: int = 16 * KIB) -> bytes:
    """A zstd dictionary of at most *size* bytes for frames of *chunks*; b"" where none pays.

    The same chunks give the same dictionary with the same libzstd. At most 4 MiB of them, spread
    evenly, are looked at. A dictionary pays when what it saves on *chunks*, estimated on a few,
    is more than its own compressed size, which every client must download once.
    """
    # Pieces, or the samples from a few large chunks would be too few to find what repeats.
    views = [memoryview(chunk) for chunk in chunks]
    pieces = [view[i : i + _PIECE] for view in views for i in range(0, len(view), _PIECE)]
    stride = max(1, -(-len(pieces) * _PIECE // _SAMPLE_BYTES))
    samples = [bytes(piece) for piece in pieces[::stride] if len(piece) >= 8]
    if len(samples) < _FEWEST_SAMPLES:
        return b""
    # With too little to learn from, the trainer wants a smaller dictionary than it was asked for.
    size = min(size, max(256, sum(map(len, samples)) // 8))
    try:
        trained = zstd.train_dict(samples, size).dict_content
    except (zstd.ZstdError, ValueError):
        return b""  # samples that zstd finds nothing common in: an answer, not a failure
    step = max(1, len(chunks) // _TRIAL_CHUNKS)
    trial = list(islice(chunks, 0, None, step))
    without, using = FrameWriter(b"", LEVEL_FIRST), FrameWriter(trained, LEVEL_FIRST)
    saved = sum(len(without.frame(chunk)) - len(using.frame(chunk)) for chunk in trial)
    cost = len(zstd.compress(trained, 19))
    return trained if saved * len(chunks) > cost * len(trial) else b""


def level_for(new_bytes: int) -> int:
    """The level for a publish with *new_bytes* of chunks that the store does not hold yet."""
    return LEVEL_STEP if new_bytes <= _STEP_BYTES else LEVEL_FIRST


class FrameWriter:
    """Makes frames at one level with one dictionary, digested once. Not for several threads."""

    __slots__ = ("_compressor",)

    def __init__(self, dictionary: bytes, level: int = LEVEL_STEP) -> None:
        """*dictionary* as ``train_dictionary`` gives it (b"": none).

        Raises FormatError when *dictionary* is not a zstd dictionary.
        """
        options: dict[int, int] = {
            zstd.CompressionParameter.compression_level: level,
            zstd.CompressionParameter.content_size_flag: 1,
            zstd.CompressionParameter.checksum_flag: 0,
            zstd.CompressionParameter.dict_id_flag: 0,
        }
        loaded = _load(dictionary)
        # One compressor for all frames: it digests the dictionary once and keeps its tables.
        self._compressor = zstd.ZstdCompressor(
            options=options, zstd_dict=None if loaded is None else loaded.as_digested_dict
        )

    def frame(self, chunk: Buffer) -> bytes:
        """The frame of *chunk*."""
        frame: bytes = self._compressor.compress(chunk, mode=zstd.ZstdCompressor.FLUSH_FRAME)
        return frame


class FrameReader:
    """Opens frames of one dictionary, which is loaded once."""

    __slots__ = ("_dictionary",)

    def __init__(self, dictionary: bytes) -> None:
        """*dictionary* from the pack (b"": none). Raises FormatError when it is not one."""
        self._dictionary = _load(dictionary)

    def open(self, frame: Buffer, max_size: int = LIMITS.chunk) -> bytes:
        """The chunk in *frame*, which must be exactly one frame and hold at most *max_size* bytes.

        Raises FormatError otherwise, before any memory is taken for what the header claims.
        """
        if bytes(frame[:4]) != _MAGIC:  # zstd would skip a "skippable" frame without a word
            raise FormatError("a frame does not start as a zstd frame")
        try:
            info = zstd.get_frame_info(frame)
        except zstd.ZstdError as error:
            raise FormatError("a frame has no zstd header") from error
        size = info.decompressed_size
        if size is None or size > max_size:
            raise FormatError(f"a frame promises {size} bytes, {max_size} are allowed")
        decompressor = zstd.ZstdDecompressor(zstd_dict=self._dictionary)
        try:
            chunk: bytes = decompressor.decompress(frame, max_length=size + 1)
        except zstd.ZstdError as error:
            raise FormatError("a frame is damaged, or of another dictionary") from error
        if len(chunk) != size or not decompressor.eof or decompressor.unused_data:
            raise FormatError("a frame does not hold what its header says")
        return chunk


def open_frame(frame: Buffer, dictionary: bytes, max_size: int = LIMITS.chunk) -> bytes:
    """The chunk in *frame*; for many frames of one dictionary use FrameReader.

    Raises FormatError when *frame* or *dictionary* is damaged or above the limits.
    """
    return FrameReader(dictionary).open(frame, max_size)


def _load(dictionary: bytes) -> zstd.ZstdDict | None:
    if not dictionary:
        return None
    if len(dictionary) > LIMITS.dictionary:
        raise FormatError(f"a dictionary of {len(dictionary)} bytes is above the limit")
    try:
        loaded = zstd.ZstdDict(dictionary)
        # Loading checks no more than the magic; a decompressor parses the entropy tables.
        zstd.ZstdDecompressor(zstd_dict=loaded)
    except (zstd.ZstdError, ValueError) as error:
        raise FormatError("not a zstd dictionary") from error
    return loaded
