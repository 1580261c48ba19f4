"""Whether a command line as a document or a unit writes it exists, asked from ``--help``."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@cache
def scripts() -> dict[str, str]:
    """Module of each command that the distribution installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {name: target.partition(":")[0] for name, target in project["scripts"].items()}


@cache
def help_of(*command: str) -> str:
    """What ``command --help`` prints; fails the test if it ends otherwise than with 0."""
    program, *rest = command
    module = scripts()[program]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{program} is not written yet")
    done = subprocess.run(
        [sys.executable, "-m", module, *rest, "--help"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "200"},
    )
    assert done.returncode == 0, f"{' '.join(command)} --help: {done.stderr}"
    return done.stdout


def check_command(words: Sequence[str]) -> None:
    """Fails the test unless the program, its subcommand and all options exist."""
    program, *rest = words
    assert program in scripts(), f"no command {program}"
    path = [program]
    # A subcommand is a plain word that the help of what came so far lists among its choices.
    while len(path) <= len(rest) and re.fullmatch(r"[a-z][a-z-]*", rest[len(path) - 1]):
        choices = re.search(r"\{([a-z,-]+)\}", help_of(*path))
        if not choices or rest[len(path) - 1] not in choices[1].split(","):
            break
        path.append(rest[len(path) - 1])
    text = help_of(*path)
    assert len(path) > 1 or not re.search(r"\{[a-z,-]+\} \.\.\.", text), (
        f"{program} has no subcommand {rest[:1]}"
    )
    known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", text))
    for word in rest:
        if word.startswith("-") and word != "--":
            assert word.partition("=")[0] in known, f"{' '.join(path)} has no option {word}"
