"""docs/cli.md says what the command does: options, variables, exit codes, error codes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tidings_client
from tidings_client.cli import COMMANDS
from tidings_client.exits import TABLE

TEXT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under a heading of the second level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no section {title}"
    return found[1]


def rows(text: str, first: str) -> list[list[str]]:
    """The cells of the table whose head starts with *first*."""
    lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()[2:]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line.strip().strip("|"))] for line in lines]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_documented(command: str) -> None:
    documented = {
        (re.search(r"`(--[a-z0-9-]+)", name)[1], variable.strip("`"), text)  # type: ignore[index]
        for name, variable, text in rows(section(f"tidings {command}"), "option")
    }
    assert documented == {(o.name, o.env, o.help) for o in COMMANDS[command]}


def test_the_exit_codes_are_the_same() -> None:
    documented = [(int(c), what, act) for c, what, act in rows(section("Exit codes"), "code")]
    assert documented == [(m.exit.value, m.what, m.act) for m in TABLE]


def test_every_error_code_is_documented() -> None:
    folder = Path(str(tidings_client.__file__)).parent
    used = {
        code
        for path in folder.glob("*.py")
        for code in re.findall(r'code="([a-z0-9-]+)"', path.read_text(encoding="utf-8"))
    }
    documented = {
        c for row in rows(section("Events"), "exit") for c in re.findall("`(.*?)`", row[1])
    }
    assert used - documented == set()
