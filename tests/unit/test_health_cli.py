"""``tidings-mirror gc``, ``check`` and ``repair`` as an operator runs them."""

from __future__ import annotations

import argparse
import functools
import http.server
import io
import json
import shutil
import threading
from pathlib import Path

import pytest

from support.stores import History, assert_whole
from tidings_chunkstore.errors import InputError
from tidings_chunkstore.publisher import Options as PublishOptions
from tidings_client.exits import Exit
from tidings_client.progress import Reporter
from tidings_server import cli, health
from tidings_server.settings import ENVIRONMENT, Settings


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> History:
    history = History(tmp_path_factory.mktemp("origin") / "repo", count=60)
    history.options = PublishOptions(keep=3)
    history.steps(4)
    return history


@pytest.fixture
def history(origin: History, tmp_path: Path) -> History:
    return origin.copy(tmp_path / "repo")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def run(*words: object, as_json: bool = True) -> tuple[Exit, str]:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    health.add_commands(commands, cli._command)
    arguments = parser.parse_args([str(word) for word in words])
    out = io.StringIO()
    reporter = Reporter(as_json=as_json, out=out, err=io.StringIO())
    return arguments.run(arguments, Settings(), reporter), out.getvalue()


def last(output: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(output.splitlines()[-1])
    return found


def test_gc_plan_then_do(history: History) -> None:
    before = history.listing()
    words = ("gc", history.root, "--keep", "1", "--grace", "0", "--max-rewrite", "0")
    code, output = run(*words, "--plan")
    planned = last(output)
    assert code is Exit.OK
    assert planned["dropped"] == [2, 3]
    assert history.listing() == before
    code, output = run(*words)
    done = last(output)
    assert {key: done[key] for key in planned if key != "type"} == {
        key: value for key, value in planned.items() if key != "type"
    }
    assert history.serials() == [4]
    assert_whole(history.store, history.published)


def test_an_option_from_the_environment(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{ENVIRONMENT}GC_KEEP", "2")
    assert last(run("gc", history.root)[1])["snapshots"] == 2
    assert last(run("gc", history.root, "--keep", "1")[1])["snapshots"] == 1
    monkeypatch.setenv(f"{ENVIRONMENT}GC_KEEP", "many")
    with pytest.raises(InputError, match="GC_KEEP"):
        run("gc", history.root)


def test_check_and_repair_by_a_copy(history: History, origin: History) -> None:
    assert run("check", history.root)[0] is Exit.OK
    name = max(history.packs())
    history.flip(name, 400)
    code, output = run("check", history.root)
    assert code is Exit.STORE
    assert last(output)["damaged_packs"] == [name]
    code, output = run("repair", history.root, "--from", origin.root)
    assert code is Exit.OK
    assert last(output)["restored"] == [name]
    assert run("check", history.root)[0] is Exit.OK
    assert_whole(history.store, history.published)


def test_repair_over_http(history: History, origin: History) -> None:
    name = max(history.packs())
    (history.folder / name).unlink()
    handler = functools.partial(QuietHandler, directory=str(origin.root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            code, output = run(
                "repair", history.root, "--from", url + "/none/", "--from", "http://127.0.0.1:1/",
                "--from", url, "--no-publish",
            )  # fmt: skip
        finally:
            server.shutdown()
            thread.join()
    assert code is Exit.OK
    assert last(output)["restored"] == [name]
    assert_whole(history.store, history.published)


def test_tables_for_people(history: History) -> None:
    name = max(history.packs())
    history.flip(name, 400)
    _, text = run("check", history.root, "--quick", as_json=False)
    assert "good" in text  # the structure does not show it
    code, text = run("check", history.root, as_json=False)
    assert code is Exit.STORE
    assert "damaged" in text.splitlines()[0]
    assert any(name in line and "error" in line for line in text.splitlines())
    assert "tidings-mirror repair" in text.splitlines()[-1]
    _, text = run("repair", history.root, as_json=False)
    assert "whole again" in text
    _, text = run("gc", history.root, as_json=False)
    assert str(history.root) in text


def test_many_repositories(history: History, tmp_path: Path) -> None:
    shutil.copytree(history.root, tmp_path / "second")
    code, output = run("check", "--recursive", tmp_path, "--quick")
    assert code is Exit.OK
    assert last(output)["repositories"] == 2
    with pytest.raises(InputError):
        run("gc")
    with pytest.raises(InputError):
        run("repair", history.root, tmp_path / "second", "--from", "http://127.0.0.1:1/")


def test_times_and_sizes() -> None:
    assert [health.seconds(text) for text in ("0", "90m", "24h", "7d")] == [0, 5400, 86400, 604800]
    assert [health.size(text) for text in ("0", "64M", "1G")] == [0, 64 << 20, 1 << 30]
    for text in ("", "-1", "1w", "soon"):
        with pytest.raises(ValueError, match="time"):
            health.seconds(text)
        with pytest.raises(ValueError, match="size"):
            health.size(text)
