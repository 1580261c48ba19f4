"""Counting, labels, whole files by a head; what documents, rules and dashboard name exists."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from support.system import require
from tidings_chunkstore import bundle
from tidings_chunkstore.head import Head, HeadContent, HeadEdge, State
from tidings_chunkstore.ids import FileId
from tidings_chunkstore.pack import File
from tidings_chunkstore.places import PackName, Span
from tidings_server import logs
from tidings_server.app import Front
from tidings_server.gauges import Gauges, follow_states
from tidings_server.metrics import ROUTES, Metrics, local
from tidings_server.metrics_store import METRICS, ROWS, Row
from tidings_server.objects import Objects
from tidings_server.runfile import COMMANDS, Recorder, write
from tidings_server.settings import RepoSettings, ServeSettings, Settings
from tidings_server.site import Site
from tidings_server.whole import Whole, span_of, tracks_of

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "packaging" / "prometheus" / "tidings.rules.yml"
DASHBOARD = ROOT / "packaging" / "grafana" / "tidings.json"
OLD, NEW = PackName(1, bytes(8)), PackName(2, b"12345678")


# -- documents, rules, dashboard -------------------------------------------------------------------


def test_the_document_has_every_metric_as_the_code_does() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(tidings_\w+)` \| (\w+) \| ([\w, ]*) \| (.+) \|$", text, re.MULTILINE)
    documented = [(n, k, tuple(w for w in ls.split(", ") if w), what) for n, k, ls, what in rows]
    assert documented == [
        (r.name, r.kind, r.labels, r.what)
        for source in ("worker", "scrape", "run")
        for r in METRICS
        if r.source == source
    ]
    for route in ROUTES:
        assert f"`{route}`" in text


@pytest.mark.parametrize("row", METRICS, ids=lambda row: row.name)
def test_names_follow_the_rules_of_prometheus(row: Row) -> None:
    assert re.fullmatch(r"tidings_[a-z_]+", row.name)
    assert row.name.endswith("_total") == (row.kind == "counter")


def metrics_of(expression: str) -> set[str]:
    names = set(re.findall(r"\btidings_\w+", expression))
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in names}


def expressions() -> list[str]:
    rules = yaml.safe_load(RULES.read_text())
    found = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    dashboard = json.loads(DASHBOARD.read_text())
    found += [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    return found + [v["definition"] for v in dashboard["templating"]["list"] if "definition" in v]


def test_rules_and_dashboard_use_metrics_that_exist_and_their_labels() -> None:
    for expression in expressions():
        for name in metrics_of(expression):
            assert name in ROWS, expression
        for name, matchers in re.findall(r"\b(tidings_\w+)\{([^}]*)\}", expression):
            row = ROWS[next(iter(metrics_of(name)))]
            for wanted in re.findall(r"(\w+)\s*(?:=~|!=|=|!~)", matchers):
                assert wanted in (*row.labels, "instance"), (name, wanted)
    # And most of them are used somewhere: a metric that nobody looks at is a cost.
    used = set().union(*(metrics_of(expression) for expression in expressions()))
    assert len(used) > len(METRICS) / 2


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["schemaVersion"] >= 36 and dashboard["title"] and dashboard["uid"]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24 and panel["title"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["datasource"]["uid"] == "${datasource}" and panel["targets"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references))
        for target in panel["targets"]:
            named = set(re.findall(r"\$(\w+)", target["expr"]))
            assert named <= variables | {"__range", "__rate_interval"}
            assert target["expr"].count("(") == target["expr"].count(")")


def test_the_rules_fire_when_they_should() -> None:
    program = require("promtool")
    for arguments in (["check", "rules", RULES.name], ["test", "rules", "tidings.rules.test.yml"]):
        done = subprocess.run(
            [program, *arguments], cwd=RULES.parent, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboards_expressions_are_promql(tmp_path: Path) -> None:
    program = require("promtool")
    filled = [
        re.sub(r"\$__\w+", "5m", expression).replace("$instance", ".*").replace("$repository", ".*")
        for expression in expressions()
        if not expression.startswith("label_values")
    ]
    rules = [{"record": f"checked:{i}", "expr": e} for i, e in enumerate(filled)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": rules}]}))
    command = [program, "check", "rules", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# -- whole files -----------------------------------------------------------------------------------


def a_head() -> Head:
    """Two snapshots: *a* changed, *b* did not, *c* is stored by an index."""

    def file(track: str, size: int) -> File:
        return File(f"repodata/{track}", track, track, size, FileId(bytes(32)), None)

    return Head(
        b"r" * 16,
        2,
        0,
        "rpm-md",
        "repodata/a",
        0,
        (file("a", 1000), file("a", 500), file("b", 70), file("c", 9)),
        (
            HeadContent("a", 1, None),
            HeadContent("b", 1, None),
            HeadContent("c", 1, Span(NEW, 800, 50)),
        ),
        (
            State(1, OLD, {"a": b"a1", "b": b"b1", "c": b"c1"}),
            State(2, NEW, {"a": b"a2", "b": b"b1", "c": b"c2"}),
        ),
        (
            HeadEdge("a", 1, None, (), Span(OLD, 100, 10)),
            HeadEdge("b", 1, None, (), Span(OLD, 110, 10)),
            HeadEdge("a", 2, 1, (), Span(NEW, 100, 10)),
        ),
    )


def test_ranges_count_what_they_lead_to() -> None:
    whole = Whole(a_head())
    assert whole.of_spans([Span(NEW, 100, 10)]) == 1500  # the edge to a's content of now
    assert whole.of_spans([Span(OLD, 100, 10)]) == 0  # to one that is past
    assert whole.of_spans([Span(OLD, 0, 1000)]) == 70  # b's is still the same
    assert whole.of_spans([Span(NEW, 800, 1)]) == 9  # an index
    assert whole.of_spans([Span(NEW, 801, 900)]) == 0  # chunks behind it
    assert whole.of_spans([Span(NEW, 0, 105), Span(NEW, 90, 20)]) == 1500  # once a request
    assert whole.of_spans([Span(NEW, 0, 900), Span(OLD, 105, 20)]) == 1579
    assert whole.of_tracks(["a", "a", "nobody's"]) == 1500


@pytest.mark.parametrize(
    ("header", "span"),
    [
        (b"bytes=5-9", Span(NEW, 5, 5)),
        (b"bytes=5-", Span(NEW, 5, (1 << 53) - 4)),
        (b"bytes=9-5", None),
        (b"bytes=-5", None),
        (b"bytes=1-2,4-5", None),
        (b"items=1-2", None),
        (b"bytes=" + b"9" * 99 + b"-", None),
    ],
)
def test_span_of_a_range_header(header: bytes, span: Span | None) -> None:
    assert span_of(NEW, header) == span


@given(st.lists(st.text("abc/ü", min_size=1, max_size=9), unique=True, max_size=20), st.integers(0))
def test_tracks_of_a_bundle_that_may_be_cut_off(names: list[str], cut: int) -> None:
    data = bundle.encode([(name, b"x" * 30) for name in names])
    assert tracks_of(data) == names
    some = tracks_of(data[: cut % (len(data) + 1)])
    assert some == names[: len(some)]


@given(st.binary(max_size=300))
def test_tracks_of_anything(data: bytes) -> None:
    assert len(tracks_of(b"TDB1" + data)) <= len(data)


# -- counting --------------------------------------------------------------------------------------


def scope(path: str, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http", "method": "GET", "path": path, "raw_path": path.encode()} | {
        "headers": list(headers),
        "query_string": b"",
        "client": ("127.0.0.1", 1),
    }


def counted(
    use: Callable[[Metrics], None], *repos: RepoSettings
) -> dict[tuple[str, str, str], float]:
    """Requests by route, repository and status after *use*, as a scrape has them."""
    settings = Settings(serve=ServeSettings(), repos=repos)

    async def run() -> str:
        with ThreadPoolExecutor(2) as pool:
            metrics = Metrics(settings, Site(settings.serve, repos), pool)
            metrics.start()
            use(metrics)
            text, _ = await metrics.scrape()
            metrics.close()
            return text.decode()

    return {
        (s.labels["route"], s.labels["repository"], s.labels["status"]): s.value
        for family in text_string_to_metric_families(asyncio.run(run()))
        for s in family.samples
        if s.name == "tidings_requests_total"
    }


def test_no_client_makes_up_labels() -> None:
    def use(metrics: Metrics) -> None:
        for i in range(9000):
            metrics.observe(scope(f"/evil{i}/tidings/head.json"), 404, 9, 0.001, b"")
        for i in range(2000):  # a tree of very many repositories
            metrics.observe(scope(f"/real{i}/tidings/head.json"), 200, 9, 0.001, b"")

    found = counted(use)
    assert sum(found.values()) == 11_000
    assert not [key for key in found if "evil" in key[1]]
    assert len(found) <= 1024 + 4


def test_a_file_counts_for_the_innermost_repository(tmp_path: Path) -> None:
    repos = [RepoSettings("a", tmp_path), RepoSettings("a/b", tmp_path)]

    def use(metrics: Metrics) -> None:
        for path in ("/a/b/repodata/x", "/a//b/repodata/x", "/a/%62/x", "/a/x", "/c/x", "/x"):
            metrics.observe(scope(path), 404, 9, 0.001, b"")
        metrics.observe(scope("/a/tidings/head.json"), 0, 0, 0.001, b"")
        metrics.observe(scope("/healthz") | {"tidings.route": "api"}, 200, 0, 0.001, b"")
        metrics.observe(scope("/q") | {"tidings.route": "made up"}, 200, 0, 0.001, b"")

    assert counted(use, *repos) == {
        ("file", "a/b", "4xx"): 3,
        ("file", "a", "4xx"): 1,
        ("file", "", "4xx"): 2,
        ("head", "a", "none"): 1,
        ("api", "", "2xx"): 1,
        ("other", "", "2xx"): 1,
    }


@pytest.mark.parametrize(
    ("client", "headers", "is_local"),
    [
        ("127.0.0.1", [], True),
        ("127.9.9.9", [(b"host", b"x")], True),
        ("::1", [], True),
        ("::ffff:127.0.0.1", [], True),
        ("::ffff:10.0.0.1", [], False),
        ("10.0.0.1", [], False),
        ("", [], False),
        ("testclient", [], False),
        ("127.0.0.1", [(b"x-forwarded-for", b"127.0.0.1")], False),
        ("127.0.0.1", [(b"via", b"1.1 squid")], False),
    ],
)
def test_local(client: str, headers: list[tuple[bytes, bytes]], is_local: bool) -> None:
    assert local(client, headers) is is_local


# -- state files -----------------------------------------------------------------------------------


def test_junk_among_the_states_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "follow"
    folder.mkdir()
    good = {"v": 1, "path": "a/b", "checked": 5, "failures": "many"}
    (folder / "a%2Fb.json").write_text(json.dumps(good))
    (folder / "c.json").write_text(json.dumps(good))  # speaks for another
    (folder / "d.json").write_text("{")
    (folder / "e.json").write_text("[" * 60_000)
    (folder / "f.json").write_text(json.dumps({"v": 1, "path": "f", "x": "y" * 70_000}))
    (folder / "g.json").write_text(json.dumps({"v": 2, "path": "g"}))
    (folder / "h.json").write_text(json.dumps({"v": 1, "path": ["h"]}))
    (folder / "i.json").write_bytes(b"\xff\xfe")
    (folder / "j.json").mkdir()
    (folder / "k.json").symlink_to("/nowhere")
    subprocess.run(["mkfifo", folder / "l.json"], check=True)
    (folder / ".hidden.json").write_text(json.dumps(good))
    (folder / "m.json").write_text(json.dumps({"v": 1, "path": "m", "checked": 10**400}))
    assert [path for path, _ in follow_states(tmp_path)] == ["a/b", "m"]
    assert list(follow_states(tmp_path / "none")) == []


def test_states_of_what_is_followed_no_more_are_not_exported(tmp_path: Path) -> None:
    (tmp_path / "follow").mkdir()
    for path in ("now", "once"):
        text = json.dumps({"v": 1, "path": path, "checked": 5})
        (tmp_path / "follow" / f"{path}.json").write_text(text)
    rows = Gauges(Site(ServeSettings()), tmp_path, None, ["now"]).rows([])
    assert rows == {"tidings_follow_checked_time_seconds": [(("now",), 5)]}


# -- errors and ids --------------------------------------------------------------------------------


class Sent:
    """What an application sent."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    async def __call__(self, message: Any) -> None:
        self.messages.append(message)


async def _receive() -> Any:
    return {"type": "http.disconnect"}


def failing(before: int) -> Callable[..., Any]:
    """An application that fails after *before* messages of two."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        messages = [
            {"type": "http.response.start", "status": 200, "headers": []},
            {"type": "http.response.body", "body": b"x", "more_body": True},
        ]
        for message in messages[:before]:
            await send(message)
        raise RuntimeError("as planned")

    return app


@pytest.fixture
def log() -> Any:
    """Log lines as JSON, as a service writes them."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs._Json())
    logger = logging.getLogger("tidings")
    logger.addHandler(handler)
    before, logger.level = logger.level, logging.INFO
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.removeHandler(handler)
    logger.setLevel(before)


def front(app: Callable[..., Any]) -> Front:
    site = Site(ServeSettings(), ())
    return Front(app, Objects(site, ThreadPoolExecutor(1)), observers=[])


def test_what_nobody_expected_is_one_line_and_an_answer_with_the_id(log: Any) -> None:
    sent = Sent()
    asked = scope("/r/tidings/frames", (b"x-request-id", b"id-7"))
    asyncio.run(front(failing(0))(asked, _receive, sent))
    start, body = sent.messages
    assert start["status"] == 500 and (b"x-request-id", b"id-7") in start["headers"]
    error = json.loads(body["body"])["error"]
    assert error["code"] == "internal" and error["request"] == "id-7"
    assert "planned" not in body["body"].decode()
    (line,) = log()
    assert line["level"] == "error" and line["request"] == "id-7" and line["repository"] == "r"
    assert line["error"] == "RuntimeError" and "Traceback" in line["exception"]


def test_an_answer_that_breaks_off_ends_the_connection_and_is_told_once(log: Any) -> None:
    sent = Sent()
    with pytest.raises(logs.Told) as raised:
        asyncio.run(front(failing(2))(scope("/r/tidings/frames"), _receive, sent))
    assert len(log()) == 1 and len(sent.messages) == 2
    # The web server logs what comes out of an application; that line is not written.
    trace = (type(raised.value), raised.value, None)
    record = logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, "again", None, trace)
    assert not logs._not_told(record)
    record.exc_info = None
    assert logs._not_told(record)


def test_threads_log_for_the_request_that_they_work_for(log: Any) -> None:
    async def ask() -> None:
        logs.Ids().begin(scope("/r/tidings/head.json", (b"x-request-id", b"id-8")))
        with logs.Pool(1) as pool:
            work = logging.getLogger("tidings.serve").error
            await asyncio.get_running_loop().run_in_executor(pool, work, "in a thread")

    asyncio.run(ask())
    (line,) = log()
    assert line["request"] == "id-8" and line["repository"] == "r"


# -- commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, "", "junk {", "\xff", "tidings_run_good_time_seconds x"])
def test_a_first_failure_has_no_good_time(tmp_path: Path, before: str | None) -> None:
    file = tmp_path / "run.prom"
    if before is not None:
        file.write_text(before, "latin-1")
    write(file, "gc", Recorder(), 3)
    assert "tidings_run_good_time_seconds{" not in file.read_text()
    assert 'tidings_run_success{command="gc"} 0.0' in file.read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_what_commands_leave_is_in_the_table(tmp_path: Path, command: str) -> None:
    file = tmp_path / "run.prom"
    write(file, command, Recorder(), 0)
    for family in text_string_to_metric_families(file.read_text()):
        assert ROWS[family.name].source == "run"
        for sample in family.samples:
            assert set(sample.labels) == set(ROWS[family.name].labels)
