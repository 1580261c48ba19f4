"""docs/cli-mirror.md has each command's options and their variables, and no others."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from tidings_server.cli import build_parser

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "cli-mirror.md").read_text()


def choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


COMMANDS = choices(build_parser())


@pytest.mark.parametrize("command", COMMANDS)
def test_options(command: str) -> None:
    parser = COMMANDS[command]
    parser = next(iter(choices(parser).values()), parser)  # config check
    options = {}
    for action in parser._actions:
        name = next((o for o in action.option_strings if o.startswith("--")), None)
        if name is not None and name != "--help":
            variable = re.search(r"\[(TIDINGS_\w+)\]", action.help or "")
            assert variable, f"{name} has no variable"
            options[name] = variable[1]
    section = TEXT.split(f"\n## tidings-mirror {command}\n")[1].split("\n## ")[0]
    documented = dict(re.findall(r"^\| `(--[\w-]+)` \| `(\w+)` \|", section, re.MULTILINE))
    assert documented == options


def test_every_command_has_its_section() -> None:
    sections = re.findall(r"^## tidings-mirror (\w+)$", TEXT, re.MULTILINE)
    assert sections == list(COMMANDS)
