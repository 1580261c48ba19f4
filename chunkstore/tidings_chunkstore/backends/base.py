"""What a backend can do, by capability. A store holds flat names: packs and one head."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol

HEAD_NAME = "head.json"


class Readable(Protocol):
    """Reads objects."""

    def names(self) -> list[str]:
        """The names of all objects, sorted; empty where the store does not exist yet."""

    def size(self, name: str) -> int | None:
        """Bytes of an object, None where there is none."""

    def read_at(self, name: str, offset: int, length: int) -> bytes:
        """Exactly *length* bytes from *offset*. Raises StoreError where they are not there."""


class Writable(Readable, Protocol):
    """Adds, replaces and deletes objects. Each call is atomic and durable when it returns."""

    def put(self, name: str, pieces: Iterable[bytes | memoryview]) -> int:
        """Write a new object of *pieces* and return its size."""

    def swap_head(self, data: bytes, expected: bytes | None) -> None:
        """Replace the head, or raise LockedError when it is not *expected* (None: no head)."""

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens where there is none."""

    def sweep(self) -> list[str]:
        """Remove what an interrupted write left behind; the names removed."""


class Locked(Protocol):
    """Holds off other writers."""

    def lock(self) -> AbstractContextManager[bool]:
        """Gives whether it had to be waited for.

        Raises LockedError when another process holds it, and goes on to.
        """
