"""docs/layouts.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tidings_chunkstore.apt as apt_module
import tidings_chunkstore.layout as layout_module
import tidings_chunkstore.listing as listing_module
import tidings_chunkstore.rpmmd as rpmmd_module
from tidings_chunkstore.layout import APT, RPM_MD, Layout
from tidings_chunkstore.types import SETS

DOCS = (Path(__file__).parents[2] / "docs" / "layouts.md").read_text(encoding="utf-8")


def rows(first_cell: str) -> list[list[str]]:
    """The cells of the table whose head starts with *first_cell*."""
    lines = DOCS[DOCS.index(f"| {first_cell} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_code_is_documented() -> None:
    sources = [layout_module, listing_module, apt_module, rpmmd_module]
    text = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in sources)
    codes = set(re.findall(r'code="([a-z-]+)"', text))
    documented = {word for row in rows("code") for word in re.findall("`([a-z-]+)`", row[0])}
    assert codes - {"unknown-layout"} == documented


@pytest.mark.parametrize(
    ("column", "ranks"), [(1, rpmmd_module._RANKS), (2, apt_module._RANKS)], ids=["rpm-md", "apt"]
)
def test_ranks(column: int, ranks: dict[str, int]) -> None:
    table = {int(row[0]): row[column] for row in rows("rank")}
    assert {name: rank for rank, name in table.items() if name in ranks} == ranks


@pytest.mark.parametrize(("column", "layout"), [(1, RPM_MD), (2, APT)], ids=["rpm-md", "apt"])
def test_what_lies_beside_the_main_file(column: int, layout: Layout) -> None:
    table = {row[0]: row[column] for row in rows("")}
    *beside, main = layout.mains()
    assert re.findall("`([^`]+)`", table["main file, switched last"])[0] == main
    assert re.findall("`([^`]+)`", table["beside it, switched before"]) == beside


def test_sets() -> None:
    table = {row[0].strip("`"): tuple(row[1].split(", ")) for row in rows("set")}
    assert table == SETS
