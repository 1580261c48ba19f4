"""tidings-measure as a whole: a small history through real servers, clients and rivals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.repos import evolve, packages, rpm_md
from support.servers import Servers
from tidings_chunkstore.errors import InputError
from tidings_measure import Event, from_json, replay
from tidings_measure.record import record
from tidings_measure.rivals import TOOLS

TYPES = ("primary", "filelists", "group")


def history(folder: Path, versions: int = 3, count: int = 400) -> Path:
    made = packages(count)
    for number in range(versions):
        rpm_md(
            folder / f"{number:03d}",
            made,
            codec="zst",
            types=TYPES,
            timestamp=1_700_000_000 + 86_400 * number,
        )
        made = evolve(made, seed=number)
    return folder


def test_replay(tmp_path: Path) -> None:
    source = history(tmp_path / "history")
    results = replay(
        source, tmp_path / "out", tools=["tidings", "tidings-static", "published"], lags=(1, 2, 30)
    )
    assert results.types == ("primary", "group", "filelists")
    assert "no client updates every 30 publishes: the history has 3" in results.notes
    for tool in ("tidings", "tidings-static", "published"):
        assert [(u.lag, u.base, u.version) for u in results.updates if u.tool == tool] == [
            (0, None, "002"),
            (1, "000", "001"),
            (1, "001", "002"),
            (2, "000", "002"),
        ]
    for update in results.updates:
        files = source / update.version / "repodata"
        new = {path.name: path.stat().st_size for path in files.iterdir()}
        if update.base:
            for path in (source / update.base / "repodata").iterdir():
                new.pop(path.name, None)
        new.pop("repomd.xml", None)
        assert update.cost.wall > 0
        assert update.cost.peak > 0
        if update.tool == "published":
            assert update.cost.received > sum(new.values())
            assert update.cost.received < sum(new.values()) + 1000 * len(new)
            assert update.cost.requests == update.files == len(new)
            assert update.cost.shared == update.cost.bytes, "all is hash-named"
        elif update.base:
            assert update.note.startswith("delta"), update.note
            assert update.cost.bytes < sum(new.values()) / 2
    for publish in results.churn("tidings"):
        assert (publish.written, publish.changed, publish.deleted) == (1, 1, 0)
        assert publish.second_tier is None or publish.second_tier > publish.bytes_written
    assert not (tmp_path / "out" / "work").exists()


def test_an_interrupted_replay_goes_on(tmp_path: Path) -> None:
    source = history(tmp_path / "history")
    out = tmp_path / "out"
    tools = ["tidings", "published"]

    class Stop(Exception):
        pass

    def stop(event: Event) -> None:
        if event.text.endswith("001 to 002"):
            raise Stop

    with pytest.raises(Stop):
        replay(source, out, tools=tools, lags=(1, 2), listener=stop)
    before = (out / "journal.jsonl").read_bytes()
    assert b'"version": "001"' in before
    said: list[str] = []
    results = replay(source, out, tools=tools, lags=(1, 2), listener=lambda e: said.append(e.text))
    assert (out / "journal.jsonl").read_bytes().startswith(before)
    assert "Tidings: publishes 001" not in said
    assert len(results.updates) == 8
    assert len(results.publishes) == 4
    assert all(u.note == "delta" for u in results.updates if u.tool == "tidings" and u.base)
    # All is there: nothing runs any more, and the results are the same.
    again = replay(source, out, tools=tools, lags=(1, 2), listener=lambda e: said.append(e.text))
    assert again == results
    assert said[-2:] == ["Tidings: done before", "as published: done before"]


@pytest.mark.slow
def test_every_rival_that_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history(tmp_path / "history", versions=2, count=2500)
    monkeypatch.chdir(tmp_path)  # programs run elsewhere: names relative to here must do
    results = replay(Path("history"), Path("out"), lags=(1,))
    here = [tool.name for tool in results.tools if tool.left_out is None]
    assert {"tidings", "tidings-static", "published"} <= set(here)
    whole = results.mean("published", 1)
    assert whole is not None
    for name in here:
        cost = results.mean(name, 1)
        assert cost is not None, name
        assert cost.requests >= 1
    ours = results.mean("tidings", 1)
    assert ours is not None
    assert ours.bytes < whole.bytes / 5
    for tool in results.tools:
        if tool.left_out is not None:
            assert tool.left_out.startswith("no "), tool


def test_one_that_is_not_here_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    source = history(tmp_path / "history", versions=2, count=20)
    said: list[Event] = []
    results = replay(
        source, tmp_path / "out", tools=["casync", "xdelta3", "published"], listener=said.append
    )
    left_out = {tool.name: tool.left_out for tool in results.tools}
    assert left_out == {
        "published": None,
        "casync": "no casync on PATH",
        "xdelta3": "no xdelta3 on PATH",
    }
    assert "casync is left out: no casync on PATH" in [e.text for e in said if e.note]
    assert {update.tool for update in results.updates} == {"published"}


def test_wrong_arguments(tmp_path: Path) -> None:
    source = history(tmp_path / "history", versions=2, count=5)
    with pytest.raises(InputError, match="unknown tool"):
        replay(source, tmp_path / "out", tools=["zip"])
    with pytest.raises(InputError, match="1 or more"):
        replay(source, tmp_path / "out", lags=(0,))
    with pytest.raises(InputError, match="none of its files"):
        replay(source, tmp_path / "out", types=["updateinfo"])


def measure(*arguments: str | Path) -> tuple[int, list[dict[str, object]], str]:
    """The command with --json: exit status, events, what it said on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "tidings_measure.cli", *map(str, arguments), "--json"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_command(tmp_path: Path) -> None:
    source = history(tmp_path / "history")
    out = tmp_path / "out"
    options = ["--tools", "tidings,published", "--steps", "1", "--lags", "1,2"]
    code, events, said = measure(
        source, "--out", out, *options, "--link", "10M/50ms", "--clients", "100", "--behind-proxy"
    )
    assert code == 0, said
    assert events[-1]["type"] == "summary"
    assert events[-1]["updates"] == 6
    names = {path.name for path in out.iterdir()}
    assert names >= {"results.json", "results.csv", "report.html", "tables.md", "bytes.png"}
    results = from_json((out / "results.json").read_text())
    assert [tool.name for tool in results.tools] == ["tidings", "published"]
    assert results.steps == 1
    page = (out / "report.html").read_text()
    assert "On a line of 10 Mbit/s and 50 ms" in page
    assert "A site of 100 clients" in page
    assert "100 clients, shared cache" in (out / "tables.md").read_text()
    code, events, _ = measure(tmp_path / "none", "--out", out)
    assert code == 4
    assert events[-1]["type"] == "error"


def test_record(tmp_path: Path, servers: Servers) -> None:
    """A live repository, without Tidings, three times: new, the same, changed."""
    live, target = tmp_path / "live", tmp_path / "recorded"
    made = packages(50)
    rpm_md(live, made, types=TYPES, timestamp=1_700_000_000)
    web = servers.misbehaving(live)
    first = record(web.url, target)
    assert (first.new, first.versions, first.folder.name) == (True, 1, "0000_20231114")
    second = record(web.url, target)
    assert (second.new, second.versions, second.folder) == (False, 1, first.folder)
    rpm_md(live, evolve(made, seed=1), types=TYPES, timestamp=1_700_086_400)
    third = record(web.url, target)
    assert (third.new, third.versions, third.folder.name) == (True, 2, "0001_20231115")
    found = {path.name: path.read_bytes() for path in (third.folder / "repodata").iterdir()}
    assert found == {path.name: path.read_bytes() for path in (live / "repodata").iterdir()}
    assert {p.name for p in target.iterdir()} == {first.folder.name, third.folder.name}
    assert {p.name for p in third.folder.iterdir()} == {"repodata"}
    results = replay(target, tmp_path / "out", tools=["published"])
    assert [u.base for u in results.updates] == [None, first.folder.name]
    with pytest.raises(InputError, match="not a history"):
        record(web.url, live)


def test_tools_have_names_for_people() -> None:
    for name, make in TOOLS.items():
        tool = make()
        assert tool.name == name
        assert tool.title
        assert tool.about
