"""expat on bytes from strangers: no document type, no entities, UTF-8 alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from xml.parsers import expat

from .errors import FormatError

Start = Callable[[str, Mapping[str, str]], object]
End = Callable[[str], object]
Characters = Callable[[str], object]


def parse(data: bytes, what: str, start: Start, end: End, characters: Characters) -> None:
    """Parse *data* in one go; names are ``namespace name``. *what* begins each message.

    How deep and how many elements may be is for *start* to bound. Raises FormatError.
    """

    def declaration(_version: str, encoding: str | None, _standalone: int) -> None:
        if encoding is not None and encoding.lower() not in ("utf-8", "us-ascii"):
            raise FormatError(f"{what}: encoding {encoding[:40]!r} is not UTF-8")

    def doctype(*_: object) -> None:
        raise FormatError(f"{what}: has a document type, which metadata never needs")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.XmlDeclHandler = declaration
    parser.StartDoctypeDeclHandler = doctype
    parser.EntityDeclHandler = doctype
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = characters
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise FormatError(
            f"{what}: not XML: {expat.ErrorString(error.code)}, line {error.lineno}"
        ) from error
    finally:
        # The handlers hold their object and the parser holds them: without this the cycle keeps
        # what was read alive until the collector runs.
        parser.StartElementHandler = parser.EndElementHandler = None
        parser.CharacterDataHandler = None
