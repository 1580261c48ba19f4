"""Options as a table: one entry makes the argument, its environment name and its line in the docs.

An option on the command line goes over its variable, and that over the default. The environment
is handed in, so that only the command's entry reads it.
"""

from __future__ import annotations

import argparse
import enum
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import version

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"", "0", "false", "no", "off"})


class Kind(enum.Enum):
    """How often an option is given, and what follows it."""

    FLAG = "flag"
    VALUE = "value"
    LIST = "list"  #: repeatable; in the environment separated by white space


@dataclass(frozen=True, slots=True)
class Option:
    """One option. *parse* turns text into the value and raises ValueError."""

    name: str  #: like ``--repomd-sha256``
    help: str
    kind: Kind = Kind.FLAG
    metavar: str = ""
    default: Any = None
    parse: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    short: str = ""
    separator: str | None = None  #: of a LIST in the environment; None: white space

    @property
    def dest(self) -> str:
        """The attribute of the parsed arguments."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def env(self) -> str:
        """The environment variable."""
        return "TIDINGS_" + self.dest.upper()


def add(parser: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    """Add *options* to *parser*; their defaults come later, from ``resolve``."""
    for option in options:
        names = [option.short, option.name] if option.short else [option.name]
        text = f"{option.help} [{option.env}]"
        if option.kind is Kind.FLAG:
            parser.add_argument(*names, action="store_true", default=None, help=text)
            continue
        parser.add_argument(
            *names,
            action="append" if option.kind is Kind.LIST else "store",
            metavar=option.metavar or None,
            choices=option.choices or None,
            type=_typed(option),
            default=None,
            help=text,
        )


def _typed(option: Option) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return option.parse(text)

    parse.__name__ = option.metavar or "value"  # argparse: "invalid SECONDS value"
    return parse


def resolve(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    options: Sequence[Option],
    environ: Mapping[str, str],
) -> None:
    """Fill in what the command line left open. A bad variable ends as a bad option does."""
    for option in options:
        if getattr(arguments, option.dest, None) is not None:
            continue
        value = option.default
        if option.env in environ:
            try:
                value = _from_environment(option, environ[option.env])
            except ValueError:
                parser.error(f"{option.env}: invalid value: {environ[option.env][:80]!r}")
        elif option.kind is Kind.FLAG:
            value = False
        elif option.kind is Kind.LIST:
            value = list(option.default or ())
        setattr(arguments, option.dest, value)


def _from_environment(option: Option, text: str) -> Any:
    if option.kind is Kind.FLAG:
        word = text.strip().lower()
        if word not in _TRUE | _FALSE:
            raise ValueError(text)
        return word in _TRUE
    if option.kind is Kind.LIST:
        items = text.split(option.separator)
        return [option.parse(item) for item in items if item]
    if option.choices and text not in option.choices:
        raise ValueError(text)
    return option.parse(text)


class ShowVersion(argparse.Action):
    """``--version``: looked up only when it is asked for."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Print it and end."""
        print(f"{parser.prog} {version()}")
        parser.exit()


def add_version(parser: argparse.ArgumentParser) -> None:
    """Give *parser* a ``--version``."""
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="print the version and exit")


def seconds(text: str) -> float:
    """A positive number of seconds, at most a week."""
    value = float(text)
    if not 0 < value <= 604_800:  # also refuses nan
        raise ValueError(text)
    return value


#: Separator of lists of paths in the environment.
PATHS = os.pathsep
