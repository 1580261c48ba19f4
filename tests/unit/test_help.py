"""``--help`` and ``--version`` of the commands: what a value is, what holds without it."""

from __future__ import annotations

import argparse
import dataclasses
import re

import pytest

from tidings_client import cli as client
from tidings_client import version
from tidings_client.exits import Exit
from tidings_measure import cli as measure
from tidings_server import cli as server
from tidings_server import settings


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers below *parser*, whatever their depth."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                found |= commands(inner) or {name: inner}
    return found


PARSERS = {
    **{f"tidings {name}": p for name, p in commands(client.build_parser()).items()},
    **{f"tidings-mirror {name}": p for name, p in commands(server.build_parser()).items()},
    "tidings-measure": measure.build_parser(),
}


@pytest.mark.parametrize("name", PARSERS)
def test_every_value_has_a_name(name: str) -> None:
    for action in PARSERS[name]._actions:
        if action.option_strings and action.nargs != 0:
            assert action.metavar or action.choices, action.option_strings
            assert action.metavar != "VALUE", action.option_strings


@pytest.mark.parametrize("table", ["publish", "serve"])
def test_every_default_is_told(table: str) -> None:
    helped = {a.dest: a.help or "" for a in PARSERS[f"tidings-mirror {table}"]._actions}
    defaults = dataclasses.asdict(getattr(settings.Settings(), table))
    checked = 0
    for name, value in defaults.items():
        if name not in helped or value is None or value == ():
            continue
        [told] = re.findall(r" \(([^()]*)\) \[TIDINGS_", helped[name])
        assert (
            settings.rows(table)[name].read(told if told not in ("on", "off") else value) == value
        )
        checked += 1
    assert checked >= 3


@pytest.mark.parametrize(
    ("main", "name"),
    [(client.main, "tidings"), (server.main, "tidings-mirror"), (measure.main, "tidings-measure")],
)
def test_the_version(main: object, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(main)
    try:
        code = main(["--version"])
    except SystemExit as ended:
        code = ended.code
    assert not code
    assert capsys.readouterr().out == f"{name} {version()}\n"


def test_a_settings_file_that_is_missing_is_bad_input(
    capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    assert server.main(["config", "check", "--config", f"{tmp_path}/none"]) == Exit.INPUT
    assert capsys.readouterr().err == f"error: {tmp_path}/none: no such settings file\n"
