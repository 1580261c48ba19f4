"""Recipes: how the published bytes follow from the content, proven to the last bit.

A recipe names an engine, its parameters and the few bytes that no engine can know (a gzip
header). ``find`` searches for one and proves it by running it against the published bytes;
``run`` makes the published bytes from the content. See ``docs/format.md``, "Recipes".
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from . import engines as _engines
from . import zck
from .engines import (
    ZSTD_CHECKSUM,
    ZSTD_SIZE,
    ZSTD_WORKERS,
    Buffer,
    EngineInfo,
    Stream,
    ZstdMaker,
    engines,
)
from .errors import EngineError, FormatError
from .ids import ContentId
from .limits import KIB, LIMITS, MIB
from .opening import Codec, codec_of, open_stream

__all__ = [
    "IDENTITY",
    "Buffer",
    "Codec",
    "EngineInfo",
    "Found",
    "Recipe",
    "available",
    "codec_of",
    "cost",
    "engines",
    "find",
    "open_stream",
    "run",
]

_FEED = 1 * MIB  #: bytes given to an engine at a time
_PARAMETERS = 8  #: most parameters of one recipe
_PARAMETER_MAX = 1 << 53  #: largest integer that every JSON reader keeps exact
#: Seconds, and times what one proof should take, after which no further candidate is begun: an
#: encoder that nobody has, near to one at level 19, would cost minutes at every publish.
_PATIENCE, _PATIENCE_PROOFS = 15.0, 4.0
_BLOCK_TOLD = 1 * KIB  #: bytes, more than a frame's header and less than a first block
_BZ2_LEVELS = b"123456789"
_GZ_MAGIC = b"\x1f\x8b\x08"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What turns one content into its published bytes.

    *params* are the engine's, as ``engines`` tells; *header* are bytes kept from the published
    file (the gzip header); *sides* are contents that the recipe needs besides (``zck``).
    """

    codec: Codec
    engine: str
    params: tuple[int, ...]
    header: bytes = b""
    sides: tuple[ContentId, ...] = ()

    def to_json(self) -> dict[str, object]:
        """The compact form that lies in the head: keys of one letter, absent where empty."""
        value: dict[str, object] = {}
        if self.codec is not Codec.NONE:
            value["c"] = str(self.codec)
            value["e"] = self.engine
            value["p"] = list(self.params)
        if self.header:
            value["h"] = _base64(self.header.removeprefix(_GZ_MAGIC))
        if self.sides:
            value["s"] = [_base64(side) for side in self.sides]
        return value

    @classmethod
    def from_json(cls, value: object) -> Recipe:
        """The reverse of ``to_json``.

        An engine that this release does not know is taken as it is: it is not available.
        Raises FormatError on anything but a valid recipe.
        """
        if not isinstance(value, dict) or not value.keys() <= {"c", "e", "p", "h", "s"}:
            raise FormatError(f"not a recipe: {str(value)[:80]}")
        if not value:
            return IDENTITY
        codec, engine, params = value.get("c"), value.get("e"), value.get("p")
        if not isinstance(codec, str) or codec not in tuple(Codec):
            raise FormatError(f"a recipe with an unknown codec: {str(codec)[:40]!r}")
        if not isinstance(engine, str):
            raise FormatError("a recipe without an engine")
        if not isinstance(params, list) or len(params) > _PARAMETERS:
            raise FormatError("a recipe without a short list of parameters")
        header = _unbase64(value.get("h", ""), LIMITS.recipe_header)
        sides = value.get("s", [])
        if not isinstance(sides, list) or len(sides) > LIMITS.side_contents:
            raise FormatError("a recipe with a bad list of side contents")
        recipe = cls(
            Codec(codec),
            engine,
            tuple(_parameter(item) for item in params),
            _GZ_MAGIC + header if codec == Codec.GZ else header,
            tuple(ContentId(_unbase64(side, ContentId.SIZE)) for side in sides),
        )
        _check(recipe)
        return recipe


#: The content is the published bytes.
IDENTITY = Recipe(Codec.NONE, "", ())


@dataclass(frozen=True, slots=True)
class Found:
    """A proven recipe, and the side contents that it names."""

    recipe: Recipe
    sides: Mapping[ContentId, bytes]


def find(
    published: bytes, content: Buffer, codec: Codec, hint: Recipe | None = None
) -> Found | None:
    """The recipe by which *content* gives exactly *published*, proven by running it.

    *hint*, the last publish's recipe, is tried first. A wrong candidate costs what the engine
    takes up to the first different byte. None when no engine here gives the same bytes, or the
    search takes too long: the file is opaque then. The engines release the GIL, so searches run
    side by side in threads.
    """
    if codec is Codec.NONE:
        return Found(IDENTITY, {}) if published == content else None
    if codec is Codec.ZCK:
        return _find_zck(published, content, hint)
    tried = set()
    started = time.monotonic()

    def patient(candidate: Recipe) -> bool:
        limit = _PATIENCE + _PATIENCE_PROOFS * cost(candidate, len(content))
        return time.monotonic() - started <= limit

    for candidate in _candidates(published, len(content), codec, hint):
        if candidate in tried or not available(candidate):
            continue
        tried.add(candidate)
        if not patient(candidate):
            return None
        same = _same(candidate, published, content)
        if same == len(published):
            return Found(candidate, {})
        # The workers' encoder starts as the plain one does, and holds its first output back for
        # long: it is worth a try only where the plain one gave the first block.
        workers = _with_workers(candidate)
        if workers is None or workers in tried or not patient(workers):
            continue
        if same > _BLOCK_TOLD:
            tried.add(workers)
            if _same(workers, published, content) == len(published):
                return Found(workers, {})
    return None


def run(
    recipe: Recipe, content: Iterable[Buffer], sides: Mapping[ContentId, bytes] | None = None
) -> Iterator[bytes]:
    """The published bytes, piece by piece, from the *content*'s pieces of any size.

    Memory: the engine's own (2 to 50 MiB, about 100 at zstd's level 19) and 2 MiB. Closing the
    iterator early stops the engine.

    Raises EngineError when the engine is not here or fails, FormatError when the content does
    not have the size that the recipe states.
    """
    _check(recipe)
    pieces = _cut(content)
    if recipe.codec is Codec.NONE:
        return map(bytes, pieces)
    _engines.require(recipe.engine)
    if recipe.codec is Codec.ZCK:
        return _run_zck(recipe, pieces, sides or {})
    if recipe.codec is Codec.GZ:
        return _run_gz(recipe, pieces)
    return _run_stream(recipe, pieces)


def available(recipe: Recipe) -> bool:
    """Whether this machine has the recipe's engine."""
    return recipe.codec is Codec.NONE or _engines.is_available(recipe.engine)


def cost(recipe: Recipe, content_size: int) -> float:
    """Rough seconds that ``run`` takes for *content_size* bytes, for the planner."""
    return content_size / (_speed(recipe) * 1e6)


def _check(recipe: Recipe) -> None:
    """Raises FormatError unless the parameters are ones that the engine may be given."""
    codec, name, params = recipe.codec, recipe.engine, recipe.params
    if codec is Codec.NONE:
        if recipe != IDENTITY:
            raise FormatError("a recipe without a codec takes no parameters")
        return
    if not _engines.is_engine_name(name):
        raise FormatError(f"not an engine's name: {name[:40]!r}")
    if _engines.is_zstd(name):
        fits = codec in (Codec.ZST, Codec.ZCK)
    else:
        fits = _CODEC_OF_ENGINE.get(name, codec) is codec
    if not fits:
        raise FormatError(f"the engine {name} makes no {codec} files")
    if (codec is Codec.GZ) != bool(recipe.header) or len(recipe.header) > LIMITS.recipe_header:
        raise FormatError("a header belongs to gz recipes, and to them alone")
    if recipe.sides and codec is not Codec.ZCK:
        raise FormatError("side contents belong to zck recipes")
    allowed = zck.PARAMETERS if codec is Codec.ZCK else _engines.parameters(name)
    if allowed is None:
        return
    count = len(allowed)
    if codec is Codec.ZST and not (len(params) > 1 and params[1] & ZSTD_SIZE):
        count = 2
    if len(params) != count or any(
        value not in values for value, values in zip(params, allowed, strict=False)
    ):
        raise FormatError(f"recipe parameters out of range for {name}: {params}")
    if codec is Codec.ZCK and len(recipe.sides) != zck.side_count(params):
        raise FormatError("a zck recipe whose side contents do not fit its parameters")


_CODEC_OF_ENGINE = {
    "zlib": Codec.GZ,
    "gzip-1": Codec.GZ,
    "liblzma": Codec.XZ,
    "bzip2": Codec.BZ2,
}


def _parameter(item: object) -> int:
    if type(item) is not int or not 0 <= item <= _PARAMETER_MAX:
        raise FormatError(f"not a recipe parameter: {str(item)[:40]}")
    return item


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _unbase64(text: object, limit: int) -> bytes:
    """Raises FormatError on anything but URL-safe base64 without padding, *limit* bytes at most."""
    if not isinstance(text, str) or len(text) > (limit * 4 + 2) // 3:
        raise FormatError(f"not a short base64 text: {str(text)[:40]!r}")
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"not base64: {text[:40]!r}") from error
    if _base64(data) != text:
        raise FormatError(f"not base64 in its one form: {text[:40]!r}")
    return data


#: Millions of content bytes a second on one core of 2020, by level from 1 on.
_SPEED: Mapping[str, Sequence[float]] = {
    "zlib": (150, 140, 110, 100, 75, 55, 45, 30, 25),
    "gzip-1": (130, 120, 90, 85, 60, 45, 35, 22, 18),
    "zstd": (500, 400, 300, 250, 180, 150, 130, 110, 90, 75, 65, 55, 22, 20, 16, 12, 10, 8, 6),
    "liblzma": (25, 20, 16, 12, 9, 7, 6, 6, 6),
    "bzip2": (12,) * 9,
}


_SPEED_ZCK = 20.0  #: btopt at level 9 or 10, small chunks


def _speed(recipe: Recipe) -> float:
    if recipe.codec is Codec.NONE:
        return 2000.0
    if recipe.codec is Codec.ZCK:
        return _SPEED_ZCK
    kind = "zstd" if _engines.is_zstd(recipe.engine) else recipe.engine
    table = _SPEED.get(kind)
    if table is None or not recipe.params:
        return 10.0
    return table[min(max(recipe.params[0], 1), len(table)) - 1]


# --- running --------------------------------------------------------------------------------


def _cut(content: Iterable[Buffer]) -> Iterator[memoryview]:
    for buffer in content:
        view = memoryview(buffer)
        for start in range(0, len(view), _FEED):
            yield view[start : start + _FEED]


@contextlib.contextmanager
def _started(recipe: Recipe) -> Iterator[Stream]:
    stream = _engines.start(recipe.engine, recipe.params)
    try:
        yield stream
    finally:
        close = getattr(stream, "close", None)
        if close is not None:
            close()


def _run_gz(recipe: Recipe, pieces: Iterator[memoryview]) -> Iterator[bytes]:
    yield recipe.header
    check = size = 0
    with _started(recipe) as stream:
        for piece in pieces:
            check = zlib.crc32(piece, check)
            size += len(piece)
            if made := stream.compress(piece):
                yield made
        yield stream.flush()
    yield check.to_bytes(4, "little") + (size & 0xFFFFFFFF).to_bytes(4, "little")


def _run_stream(recipe: Recipe, pieces: Iterator[memoryview]) -> Iterator[bytes]:
    promised = recipe.params[2] if len(recipe.params) == 3 and recipe.codec is Codec.ZST else None
    size = 0
    with _started(recipe) as stream:
        for piece in pieces:
            size += len(piece)
            if promised is not None and size > promised:
                break
            if made := stream.compress(piece):
                yield made
        if promised is not None and size != promised:
            raise FormatError(f"the content does not have the recipe's {promised} bytes")
        yield stream.flush()


def _run_zck(
    recipe: Recipe, pieces: Iterator[memoryview], sides: Mapping[ContentId, bytes]
) -> Iterator[bytes]:
    missing = [side for side in recipe.sides if side not in sides]
    if missing:
        raise FormatError(f"the side content {missing[0]} is not at hand")
    how = zck.Rebuild.of(recipe.params, [sides[side] for side in recipe.sides])
    return zck.build(how, pieces, _engines.zstd_makers()[recipe.engine][1])


def _find_zck(published: bytes, content: Buffer, hint: Recipe | None) -> Found | None:
    tiers: tuple[list[tuple[str, ZstdMaker]], ...] = ([], [])
    for name, (provider, maker) in _engines.zstd_makers().items():
        tiers[0 if provider in _engines.MODULES else 1].append((name, maker))
    before = (hint.engine, hint.params) if hint is not None and hint.codec is Codec.ZCK else None
    found = zck.find(published, content, tiers, before)
    if found is None:
        return None
    engine, how = found
    sides = {ContentId.of(side): side for side in how.sides()}
    return Found(Recipe(Codec.ZCK, engine, how.params, b"", tuple(sides)), sides)


def _same(recipe: Recipe, published: bytes, content: Buffer) -> int:
    """How far the recipe gives *published*, in whole pieces; all of it is proof.

    Stops at the first different piece.
    """
    position = 0
    view = memoryview(content)
    # A wrong encoder shows in its first block, so the first pieces are small.
    made = run(recipe, (view[: 128 * KIB], view[128 * KIB : 512 * KIB], view[512 * KIB :]))
    try:
        for piece in made:
            if not published.startswith(piece, position):
                return min(position, len(published) - 1)
            position += len(piece)
    except EngineError:
        return 0
    finally:
        close = getattr(made, "close", None)
        if close is not None:
            close()
    return position


def _with_workers(recipe: Recipe) -> Recipe | None:
    if recipe.codec is not Codec.ZST or recipe.params[1] & ZSTD_WORKERS:
        return None
    level, flags, *tail = recipe.params
    return replace(recipe, params=(level, flags | ZSTD_WORKERS, *tail))


# --- searching: what the published bytes tell, then the likely before the rare ------------------


def _candidates(published: bytes, size: int, codec: Codec, hint: Recipe | None) -> Iterator[Recipe]:
    if codec is Codec.GZ:
        yield from _gz_candidates(published, size, hint)
    elif codec is Codec.ZST:
        yield from _zst_candidates(published, size, hint)
    elif codec is Codec.XZ:
        yield from _xz_candidates(published, hint)
    elif codec is Codec.BZ2 and len(published) > 3 and published[3] in _BZ2_LEVELS:
        yield Recipe(Codec.BZ2, "bzip2", (_BZ2_LEVELS.index(published[3]) + 1,))


def _gz_candidates(published: bytes, size: int, hint: Recipe | None) -> Iterator[Recipe]:
    header = gz_header(published)
    # The last member's size: another one tells of several members, which no recipe makes.
    if header is None or int.from_bytes(published[-4:], "little") != size & 0xFFFFFFFF:
        return
    if hint is not None and hint.codec is Codec.GZ:
        yield replace(hint, header=header)
    likely = {2: (9,), 4: (1,)}.get(published[8], (6, 5, 7, 8, 4, 3, 2))
    levels = likely + tuple(level for level in (6, 9, 1, 5, 7, 8, 4, 3, 2) if level not in likely)
    for engine, variants in (("zlib", (8, 9)), ("gzip-1", (0, 1))):
        for variant in variants:
            for level in levels:
                yield Recipe(Codec.GZ, engine, (level, variant), header)


def gz_header(published: bytes) -> bytes | None:
    """The header of a gzip file (RFC 1952, 2.3); None when it is none, or beyond the limit."""
    if len(published) < 18 or not published.startswith(_GZ_MAGIC) or published[3] & 0xE0:
        return None
    flags, end = published[3], 10
    if flags & 4:  # FEXTRA
        end += 2 + int.from_bytes(published[end : end + 2], "little")
    for flag in (8, 16):  # FNAME, FCOMMENT: up to a zero byte
        if flags & flag:
            end = published.find(0, end, end + LIMITS.recipe_header) + 1
            if end == 0:
                return None
    if flags & 2:  # FHCRC
        end += 2
    return published[:end] if end <= min(LIMITS.recipe_header, len(published) - 8) else None


#: Levels in the order in which publishers use them: createrepo_c, older ones, the zstd program.
_ZST_LEVELS = (10, 9, 3, 19, 6, 7, 5, 8, 4, 2, 1, 12, 11, 13, 14, 15, 16, 17, 18)
#: log2 of the window of levels 1 to 19 for contents above 256 KiB (libzstd, clevels.h, row 0).
_ZST_WINDOW = (19, 20, 21, 21, 21, 21, 21, 21, 22, 22, 22, 22, 22, 22, 22, 22, 23, 23, 23)


def _zst_candidates(published: bytes, size: int, hint: Recipe | None) -> Iterator[Recipe]:
    if len(published) < 6 or published[4] & 0x1B:  # unused, reserved, or with a dictionary
        return
    descriptor = published[4]  # RFC 8878, 3.1.1.1.1
    states_size = descriptor & 0xE0 != 0
    window = None if descriptor & 0x20 else published[5]
    flags = (ZSTD_CHECKSUM if descriptor & 4 else 0) | (ZSTD_SIZE if states_size else 0)
    tail = (size,) if states_size else ()
    if hint is not None and hint.codec is Codec.ZST:
        yield replace(hint, params=(hint.params[0], hint.params[1] & ZSTD_WORKERS | flags, *tail))
    for level in _ZST_LEVELS:
        if _zst_window(level, size if states_size else None) in (window, -1):
            for name in _engines.zstd_makers():
                yield Recipe(Codec.ZST, name, (level, flags, *tail))


def _zst_window(level: int, size: int | None) -> int | None:
    """The window byte that *level* writes; None for none, -1 where only a try can tell."""
    log = _ZST_WINDOW[level - 1]
    if size is not None:
        if size <= 256 * KIB:
            return -1
        log = min(log, (size - 1).bit_length())
        if size <= 1 << log:
            return None
    return (log - 10) << 3


#: The dictionary size byte of presets 0 to 9: 256 KiB, 1, 2, 4, 4, 8, 8, 16, 32, 64 MiB.
_XZ_DICTIONARY = (12, 16, 18, 20, 20, 22, 22, 24, 26, 28)


def _xz_candidates(published: bytes, hint: Recipe | None) -> Iterator[Recipe]:
    if len(published) < 24 or not published.startswith(b"\xfd7zXZ\0\0"):
        return
    check = published[7]  # .xz format 2.1.1.2
    if check not in (0, 1, 4, 10):
        return
    if hint is not None and hint.codec is Codec.XZ:
        yield replace(hint, params=(*hint.params[:2], check))
    # One block with the LZMA2 filter tells its dictionary's size (.xz format 3.1 and 5.3.1).
    told = published[16] if published[13:16] == b"\0\x21\1" else None
    for extreme in (0, 1):
        for preset in (6, 9, 5, 7, 8, 4, 3, 2, 1, 0):
            if told in (None, _XZ_DICTIONARY[preset]):
                yield Recipe(Codec.XZ, "liblzma", (preset, extreme, check))
