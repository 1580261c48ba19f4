"""The tools that are measured: Tidings itself, and every rival."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .base import Bench, Contender
from .casync import CASYNC, CASYNC_4K, DESYNC, DESYNC_4K
from .deltas import BSDIFF, ED, PATCH_FROM, XDELTA
from .published import PUBLISHED
from .rsync import RSYNC
from .tidings import STATIC, TIDINGS
from .zchunk import ZCHUNK, ZCHUNK_DICT
from .zsync import ZSYNC, ZSYNC_GZ

__all__ = ["TOOLS", "Bench", "Contender"]

_ALL: tuple[Callable[[], Contender], ...] = (
    *(TIDINGS, STATIC, PUBLISHED, ZCHUNK, ZCHUNK_DICT, CASYNC, CASYNC_4K, DESYNC, DESYNC_4K),
    *(ZSYNC, ZSYNC_GZ, RSYNC, XDELTA, BSDIFF, ED, PATCH_FROM),
)

#: Makes each tool anew, by its name, in the order in which they run.
TOOLS: Mapping[str, Callable[[], Contender]] = {make().name: make for make in _ALL}
