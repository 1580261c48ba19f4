"""Typed access to JSON from outside."""

from __future__ import annotations

import json

from .errors import FormatError
from .limits import LIMITS


class Fields:
    """Typed access to a JSON object from outside: every surprise is a FormatError."""

    __slots__ = ("_value", "_what")

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise FormatError(f"{what}: not an object")
        self._value = value
        self._what = what

    def integer(self, key: str, maximum: int = (1 << 53) - 1) -> int:
        """An integer from 0 to *maximum*."""
        return as_integer(self._value.get(key), f"{self._what}: {key}", maximum)

    def text(self, key: str, maximum: int = LIMITS.path) -> str:
        """A string of at most *maximum* characters, none of them a control character."""
        return as_text(self._value.get(key), f"{self._what}: {key}", maximum)

    def items(self, key: str, maximum: int) -> list[object]:
        """A list of at most *maximum* entries."""
        value = self._value.get(key)
        if not isinstance(value, list) or len(value) > maximum:
            raise FormatError(f"{self._what}: {key} is not a list of at most {maximum}")
        return value

    def get(self, key: str) -> object:
        """Whatever is there, None where nothing is."""
        return self._value.get(key)


def as_integer(value: object, what: str, maximum: int = (1 << 53) - 1) -> int:
    """*value* as an integer from 0 to *maximum*. Raises FormatError."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= maximum:
        raise FormatError(f"{what}: not a number from 0 to {maximum}")
    return value


def as_text(value: object, what: str, maximum: int = LIMITS.path) -> str:
    """*value* as a string without control characters. Raises FormatError."""
    if not isinstance(value, str) or len(value) > maximum or not value.isprintable():
        raise FormatError(f"{what}: not a text of at most {maximum} characters")
    return value


def parse_json(data: bytes | memoryview, what: str) -> object:
    """Raises FormatError for anything that is not JSON."""
    try:
        return json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what}: not JSON ({error})") from error
