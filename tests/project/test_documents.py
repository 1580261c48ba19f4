"""Documents are tested: commands with their options, files and links that they name exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from support.commands import check_command, scripts

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
#: The starting design tells of other programs and of what is to come.
PLANS = {"docs/design.md"}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[str]:
    """The lines of fenced blocks, continued lines joined, prompts taken off."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(fenced).replace("\\\n", " ").splitlines()
    return [re.sub(r"^\s*\$ ", "", line).strip() for line in lines]


def commands(text: str) -> list[list[str]]:
    """Our own commands as the document writes them; synopses (with brackets) are left out."""
    found = []
    for line in blocks(text):
        if line.split(" ")[0] in scripts() and not re.search(r"[\[\]|]|\.\.\.", line):
            found.append(shlex.split(line, comments=True))
    return found


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if name(d) not in PLANS], ids=name)
def test_commands_in_documents_exist(document: Path) -> None:
    for command in commands(document.read_text()):
        check_command(command)


def test_the_readme_shows_the_commands() -> None:
    shown = {words[0] for words in commands((ROOT / "README.md").read_text())}
    assert {"tidings", "tidings-mirror"} <= shown


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" not in target and not target.startswith("#"):
            assert (document.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("document", sorted(ROOT.glob("*.md")), ids=name)
def test_files_named_by_the_front_pages_exist(document: Path) -> None:
    folders = "docs|docker|packaging|scripts|tests|requirements|chunkstore|client|server|measure"
    for path in re.findall(rf"`((?:{folders})/[\w./*-]+)`", document.read_text()):
        assert list(ROOT.glob(path)), path
