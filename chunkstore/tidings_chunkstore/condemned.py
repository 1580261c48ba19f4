"""Packs that nothing needs any more, and since when: gc's memory between two runs.

It is a small object of its own in the store, ``gc.json``, replaced atomically. Nothing that is
served depends on it: without it each grace time starts anew. A second tier may carry it or not.

    {"format": "tidings-gc", "v": 1, "condemned": {"000001-<id>.pack": <seconds since 1970>}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from .backends.base import Readable
from .errors import FormatError, StoreError
from .fields import Fields, as_integer, parse_json
from .limits import MIB
from .places import PackName

NAME = "gc.json"
_FORMAT = "tidings-gc"
_MAX = 16 * MIB


def encode(condemned: Mapping[PackName, int]) -> bytes:
    """The bytes of gc.json."""
    names = sorted(condemned, key=lambda name: (name.serial, name.id))
    value = {
        "format": _FORMAT,
        "v": 1,
        "condemned": {str(name): condemned[name] for name in names},
    }
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def decode(data: bytes) -> dict[PackName, int]:
    """Since when each condemned pack is one, seconds since 1970. Raises FormatError."""
    value = Fields(parse_json(data, NAME), NAME)
    if value.get("format") != _FORMAT or value.get("v") != 1:
        raise FormatError(f"{NAME}: not a gc state of version 1")
    table = value.get("condemned")
    if not isinstance(table, dict):
        raise FormatError(f"{NAME}: condemned is not an object")
    return {PackName.parse(name): as_integer(since, NAME) for name, since in table.items()}


def read(backend: Readable) -> dict[PackName, int]:
    """The condemned packs; none where gc.json is absent or damaged, which only costs time."""
    try:
        size = backend.size(NAME)
        if size is None or size > _MAX:
            return {}
        return decode(backend.read_at(NAME, 0, size))
    except (FormatError, StoreError):
        return {}  # check names it; the next gc writes it anew
