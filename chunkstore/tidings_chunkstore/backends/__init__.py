"""Where a store's bytes lie. Nothing outside this package touches the store's paths."""

from .base import Locked, Readable, Writable
from .local import LocalBackend

__all__ = ["LocalBackend", "Locked", "Readable", "Writable"]
