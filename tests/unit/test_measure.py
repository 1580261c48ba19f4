"""tidings-measure, the pure parts: cases, models, results, tables, churn, journal."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tidings_measure
from support.repos import evolve, packages, rpm_md
from tidings_chunkstore.errors import FormatError, InputError
from tidings_measure import (
    Case,
    Cost,
    Publish,
    Results,
    Tool,
    Update,
    cases,
    from_json,
    to_csv,
    to_json,
)
from tidings_measure.churn import Difference, difference, read_state
from tidings_measure.cli import COMMANDS
from tidings_measure.history import History, changed, copy_publish
from tidings_measure.journal import Journal
from tidings_measure.link import Link, site_bytes
from tidings_measure.plots import draw
from tidings_measure.process import ProgramError, Usage, run
from tidings_measure.report import summary, write
from tidings_measure.results import Cost as CostOf
from tidings_measure.rivals import TOOLS
from tidings_measure.rivals.zchunk import _cuts
from tidings_measure.servers import parse_ranges
from tidings_measure.table import Models, Table, clients, mirrors
from tidings_measure.wire import Exchange, Traffic


def test_exports() -> None:
    assert sorted(tidings_measure.__all__) == tidings_measure.__all__
    assert all(hasattr(tidings_measure, name) for name in tidings_measure.__all__)


# -- cases ----------------------------------------------------------------------------------------


def test_clients_are_current_at_the_end() -> None:
    assert cases(9, (1, 7, 30), 2) == [
        Case(1, 6, 7),
        Case(1, 7, 8),
        Case(7, 1, 8),
        Case(0, None, 8),
    ]


@given(st.integers(2, 80), st.lists(st.integers(1, 40), max_size=4), st.none() | st.integers(1, 9))
def test_a_client_goes_on_from_where_it_was(
    versions: int, lags: list[int], steps: int | None
) -> None:
    made = cases(versions, lags, steps)
    assert [case.target for case in made] == sorted(case.target for case in made)
    for lag in set(lags):
        mine = [case for case in made if case.lag == lag]
        possible = (versions - 1) // lag
        assert len(mine) == (possible if steps is None else min(steps, possible))
        assert all(case.base == case.target - lag for case in mine)
        assert all(one.target == two.base for one, two in itertools.pairwise(mine))
        assert not mine or mine[-1].target == versions - 1
    assert [case for case in made if case.base is None] == [Case(0, None, versions - 1)]


# -- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rate", "delay"),
    [("10M/50ms", 10e6, 0.05), ("1.5G/0.2s", 1.5e9, 0.2), ("64k/300ms", 64e3, 0.3)],
)
def test_link(text: str, rate: float, delay: float) -> None:
    assert Link.parse(text) == Link(text, rate, delay)


@pytest.mark.parametrize("text", ["", "10M", "10M/50", "0/1ms", "-1M/5ms", "10X/5ms", "M/ms"])
def test_no_link(text: str) -> None:
    with pytest.raises(InputError):
        Link.parse(text)


def test_modelled_seconds() -> None:
    cost = Cost(received=1_200_000, sent=50_000, requests=3, round_trips=4, cpu=0.5)
    # 4 round trips of 50 ms, 10 Mbit at 10 Mbit/s, and the CPU.
    assert Link.parse("10M/50ms").seconds(cost) == pytest.approx(0.2 + 1.0 + 0.5)


def test_a_site_pays_once_for_what_its_cache_holds() -> None:
    cost = Cost(received=900, sent=100, shared=600)
    assert site_bytes(cost, 1) == 1000
    assert site_bytes(cost, 100) == 600 + 100 * 400
    assert Models(clients=100).site_bytes(cost) == 100_000
    assert Models(clients=100, behind_proxy=True).site_bytes(cost) == 40_600


def test_what_a_shared_cache_answers() -> None:
    name = "/repodata/0123456789abcdef-primary.xml.zst"

    def shared(path: str, control: str = "", *, ranged: bool = False, status: int = 200) -> bool:
        return Exchange("GET", path, ranged, status=status, control=control).shared

    assert shared(name)
    assert not shared(name, ranged=True)
    assert not shared(name, status=404)
    assert not shared(name, "no-cache")
    assert not shared("/repodata/repomd.xml")
    assert shared("/tidings/delta/1/2", "public, max-age=31536000, immutable")
    assert not shared("/tidings/head.json", "max-age=0")
    assert not Exchange("POST", name, ranged=False, status=200).shared


def test_round_trips_side_by_side_count_as_one() -> None:
    exchanges = tuple(Exchange("GET", "/", False, 10, 20, 200) for _ in range(65))
    cost = CostOf.of(Traffic(1300, 650, 10, 10, exchanges), Usage(1.0, 2.0, 3))
    assert (cost.requests, cost.round_trips, cost.bytes) == (65, 7 + 1, 1950)
    raw = CostOf.of(Traffic(1300, 650, 1, 1), Usage(), 6)
    assert (raw.requests, raw.round_trips) == (1, 6)


# -- results --------------------------------------------------------------------------------------


def results() -> Results:
    """Two tools, one left out."""
    tools = (
        Tool("tidings", "Tidings", "ours"),
        Tool("published", "as published", "whole"),
        Tool("casync", "casync", "chunks", left_out="no casync on PATH"),
    )
    updates = [
        Update("tidings", 1, "001", "002", 3, Cost(18_000, 1_000, 2, 1, 3, 0, 0.2, 0.3, 50 << 20)),
        Update("tidings", 1, "002", "003", 3, Cost(20_000, 1_000, 3, 1, 4, 0, 0.4, 0.3, 60 << 20)),
        Update("tidings", 0, None, "003", 3, Cost(2_000_000, 1_000, 4, 1, 5), "full"),
        Update("published", 1, "001", "002", 3, Cost(2_000_000, 300, 3, 1, 4, 2_000_300)),
        Update("published", 1, "002", "003", 3, Cost(2_100_000, 300, 3, 1, 4, 2_100_300)),
    ]
    publishes = [
        Publish("tidings", "002", 1, 1, 0, 180_000, 900, 0, 182_000, 1.5),
        Publish("published", "002", 3, 1, 3, 2_000_000, 600, 1_990_000, None, 0.1),
    ]
    return Results(
        "history <b>",
        ("001", "002", "003"),
        ("primary", "filelists"),
        (1, 7),
        0,
        tools,
        tuple(updates),
        tuple(publishes),
        ("a note & more",),
        {"machine": "test"},
    )


def test_mean() -> None:
    cost = results().mean("tidings", 1)
    assert cost is not None
    assert (cost.bytes, cost.peak, round(cost.cpu, 3)) == (20_000, 60 << 20, 0.3)
    assert results().mean("tidings", 7) is None


def test_json_comes_back() -> None:
    assert from_json(to_json(results())) == results()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"v": 2}', '{"v": 1, "history": "x"}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        from_json(text)


def test_csv_has_a_row_for_each() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(results()))))
    assert [row["kind"] for row in rows] == ["update"] * 5 + ["publish"] * 2
    assert rows[0]["received"] == "18000"
    assert rows[2]["base"] == ""
    assert rows[5]["second_tier"] == "182000"


def test_tables() -> None:
    models = Models((Link.parse("10M/50ms"),), 100, behind_proxy=True)
    table = clients(results(), models)
    assert list(table.names) == [
        *("tool", "every publish", "from nothing", "requests", "CPU", "wall", "memory"),
        *("at 10M/50ms", "100 clients, shared cache"),
    ]
    assert [row[0] for row in table.rows] == ["Tidings", "as published"]  # casync was left out
    assert table.rows[0][1:4] == ["20.0 KB", "2.0 MB", "2"]
    assert table.rows[1][2] == "–"
    assert all(len(row) == len(table.names) for row in table.rows)
    lines = table.markdown().splitlines()
    assert len(lines) == 4
    assert "**20.0 KB**" in lines[2]
    assert len({line.count("|") for line in lines}) == 1
    assert mirrors(results()).rows[0] == [
        *("Tidings", "1", "1", "0", "180.9 KB", "182.0 KB", "1.5 s")
    ]
    assert mirrors(results()).rows[1][5] == "–"


def test_report_is_one_file_and_escapes(tmp_path: Path) -> None:
    pictures = draw(results(), tmp_path)
    assert [path.name for _, path in pictures] == ["bytes.png", "churn.png", "time.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for _, path in pictures)
    target = tmp_path / "report.html"
    write(results(), Models(), pictures, "tidings-measure 'a <b>'", target)
    page = target.read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "history &lt;b&gt;" in page
    assert "<b>'" not in page
    assert "a note &amp; more" in page
    assert "casync: no casync on PATH" in page
    assert 'src="http' not in page
    assert 'href="' not in page
    assert "20.0 KB in 2 requests with Tidings" in summary(results())


def test_report_of_nothing(tmp_path: Path) -> None:
    empty = Results("h", ("1", "2"), ("primary",), (1,), 0, (), (), ())
    assert draw(empty, tmp_path) == []
    write(empty, Models(), [], "x", tmp_path / "report.html")
    assert "How it was measured" in (tmp_path / "report.html").read_text()
    assert summary(empty) == "nothing was measured"


# -- churn, journal, history ----------------------------------------------------------------------


def test_difference(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"22")
    (tmp_path / "same").write_bytes(b"x")
    before = read_state(tmp_path)
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_bytes(b"333")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "c").write_bytes(b"4444")
    assert difference(before, read_state(tmp_path)) == Difference(1, 1, 1, 4, 3, 1)
    assert read_state(tmp_path / "none") == {}


def test_journal_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    settings = {"versions": ["1", "2"]}
    journal = Journal(tmp_path, settings)
    update, publish = results().updates[0], results().publishes[0]
    journal.update(update)
    journal.publish(publish)
    journal.note("casync", "as it is")
    journal.decline("casync", 0, "002")
    file = tmp_path / "journal.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"update": {"tool"')
    again = Journal(tmp_path, settings)
    assert list(again.updates.values()) == [update]
    assert list(again.publishes.values()) == [publish]
    assert again.notes == {"casync": ["as it is"]}
    assert again.declined == {("casync", 0, "002")}
    assert file.read_bytes() == whole
    with pytest.raises(InputError, match="another history"):
        Journal(tmp_path, {"versions": ["1"]})


def test_history(tmp_path: Path) -> None:
    made = packages(20)
    folder = tmp_path / "history"
    for number in range(2):
        rpm_md(folder / f"{number:03d}", made, codec={"primary": "zst"}, types=("primary", "other"))
        made = evolve(made, seed=number)
    (folder / "notes").mkdir()
    history = History(folder, tmp_path / "cache", ["primary"])
    one, two = history.versions
    assert (one.name, two.name, history.types) == ("000", "001", ("primary",))
    assert [file.type for file in two.files] == ["primary"]
    assert [new.type for _, new in changed(one, two)] == ["primary"]
    assert changed(two, two) == []
    assert changed(None, two)[0][0] is None
    opened = history.opened(two.files[0])
    assert opened.path.read_bytes().startswith(b"<?xml")
    assert opened.size == opened.path.stat().st_size
    # One publish after another in one place leaves exactly the last one, and Tidings' own folder.
    target = tmp_path / "copy"
    (target / "tidings").mkdir(parents=True)
    (target / "tidings" / "head.json").write_text("{}")
    for version in (one, two):
        copy_publish(version, target)
        found = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
        assert found == {*version.paths, "tidings/head.json"}


def test_no_history(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        History(tmp_path / "none", tmp_path)
    rpm_md(tmp_path / "one", packages(1))
    with pytest.raises(InputError, match="at least two publishes"):
        History(tmp_path, tmp_path / "cache")


# -- processes and ranges -------------------------------------------------------------------------


def test_a_program_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = "x = bytearray(80_000_000); print(sum(range(2_000_000)))"
    usage = run(["python3", "-c", code], stdout=out)
    assert out.read_text() == "1999999000000\n"
    assert usage.peak > 80_000_000
    assert 0 < usage.cpu <= usage.wall * 4
    small = run(["true"])
    assert small.peak < 40_000_000, "what runs the measurement must not count as the program"


def test_a_program_that_fails_says_why() -> None:
    with pytest.raises(ProgramError, match="ended with 3: so it is"):
        run(["sh", "-c", "echo so it is; exit 3"])
    assert run(["sh", "-c", "exit 3"], accept=(3,)).cpu >= 0
    with pytest.raises(ProgramError, match="ended with 127"):
        run(["no-such-program-here"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("bytes=0-9", [(0, 10)]),
        ("bytes=5-", [(5, 95)]),
        ("bytes=-10", [(90, 10)]),
        ("bytes=90-200,0-0", [(90, 10), (0, 1)]),
        ("bytes=100-", []),
        ("items=0-1", None),
        ("bytes=a-b", None),
    ],
)
def test_ranges(text: str | None, expected: list[tuple[int, int]] | None) -> None:
    assert parse_ranges(text, 100) == expected


def test_zchunk_cuts_where_the_source_changes() -> None:
    records = [b'<package type="rpm">\n%d\n</package>\n' % number for number in range(4)]
    data = b"<metadata>\n" + b"".join(records) + b"</metadata>\n"
    cuts = _cuts(data, [1, 2, 1])
    assert cuts is not None
    starts = [data.index(record) for record in records]
    assert cuts == [starts[0], starts[1], starts[3], data.index(b"</metadata>")]
    assert _cuts(data, [1, 1]) == starts, "runs of another file: a chunk a package"
    assert _cuts(b"no records", []) is None


def test_results_are_plain_json() -> None:
    raw = json.loads(to_json(results()))
    assert raw["v"] == 1
    assert raw["updates"][0]["cost"]["received"] == 18_000


# -- docs -----------------------------------------------------------------------------------------

DOCUMENT = Path(__file__).parents[2] / "docs" / "measure.md"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_documented(command: str) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    title = f"### `tidings-measure{' ' + command if command else ''}`\n\n"
    rows = text.split(title)[1].split("\n\n")[0].splitlines()[2:]
    assert rows == [
        f"| `{o.name}{' ' + o.metavar if o.metavar else ''}` | `{o.env}` | {o.help} |"
        for o in COMMANDS[command]
    ]


def test_every_tool_is_documented() -> None:
    text = DOCUMENT.read_text(encoding="utf-8").split("\n## Tools\n")[1].split("\n## ")[0]
    rows = [row for row in text.splitlines() if row.startswith("| `")]
    assert [name for row in rows for name in re.findall("`(.*?)`", row.split("|")[1])] == list(
        TOOLS
    )


def test_a_bar_in_a_title_does_not_split_a_row() -> None:
    table = Table("", ["tool", "x"], [["diff | gzip", "1"]])
    assert table.markdown().splitlines()[2] == r"| diff \| gzip | 1 |"
