"""Schemathesis over the server's own description: no 5xx, no status that it does not name.

The server is a real process with published data, and nothing that is asked changes its tree.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.repos import DAY, START, evolve, packages, rpm_md
from support.servers import Command, Servers
from tidings_chunkstore import publisher
from tidings_chunkstore.backends.local import LocalBackend

REPO = "repo"  # one part: an encoded slash names nothing here, and schemathesis encodes it
CHECKS = "not_a_server_error,status_code_conformance,response_schema_conformance"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("www")
    made = packages(60)
    for day in range(2):
        rpm_md(top / REPO, made, timestamp=START + day * DAY)
        publisher.publish(top / REPO, LocalBackend(top / REPO / "tidings"))
        made = evolve(made, seed=day + 1)
    return top


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    folder = tmp_path_factory.mktemp("running")
    with Servers(folder / "servers") as servers:
        cache = folder / "cache"
        yield servers.mirror(root, "--cache", cache, "--reconcile", "--patience", "5")


def tree(root: Path) -> dict[str, tuple[int, str]]:
    """All of a tree: names, times of change and bytes."""
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(root.rglob("*"))
    }


def with_examples(described: dict[str, object], root: Path) -> dict[str, object]:
    """The description with values that lead to what is published, besides any others."""
    older, newer = sorted(path.stem for path in (root / REPO / "tidings").glob("*.pack"))
    known = {
        "repository": [REPO],
        "older": [older],
        "newer": [newer],
        "snapshot": [newer],
        "pack": [f"{older}.pack", f"{newer}.pack"],
        "asked": ["primary.xml.caibx", "4k-desync"],
        "file": [REPO],
        "tracks": ["primary", "primary,filelists"],
        "Range": ["bytes=0-9", "bytes=5-1,9-", "bytes=-1"],
    }
    changed: dict[str, Any] = json.loads(json.dumps(described))
    for item in changed["paths"].values():
        for operation in item.values():
            for parameter in operation.get("parameters", []):
                values = known.get(parameter["name"])
                if values is not None:
                    either = [{"enum": values}, {"type": "string", "minLength": 1}]
                    parameter["schema"] = {"anyOf": either}
    return changed


def test_statuses_are_described_and_the_tree_stays(
    server: Command, root: Path, tmp_path: Path
) -> None:
    schema = tmp_path / "openapi.json"
    described = httpx.get(f"{server.url}/openapi.json").json()
    schema.write_text(json.dumps(with_examples(described, root)))
    before = tree(root)
    done = subprocess.run(
        [
            *(Path(sys.executable).parent / "st", "run", schema, "--url", server.url),
            *("--checks", CHECKS, "--mode", "all", "--max-examples", "8", "--seed", "1"),
            *("--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--no-color"),
            *("--request-timeout", "30", "--generation-database", "none", "--max-time", "20"),
            *("--suppress-health-check", "all", "--warnings", "off"),
        ],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    assert tree(root) == before
    assert server.process.poll() is None
    assert "Traceback" not in server.log.read_text()


def test_the_description_has_every_route(server: Command) -> None:
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    features = {"frames", "delta/{older}/{newer}", "reconcile/{snapshot}", "casync/{asked}"}
    objects = {"/{repository}/tidings/head.json", "/{repository}/tidings/{pack}", "/{file}"}
    wanted = objects | {f"/{{repository}}/tidings/{feature}" for feature in features}
    assert wanted | {"/healthz", "/readyz", "/api/repos"} <= set(paths)
    for path, item in paths.items():
        assert set(item) <= {"get", "head", "post"}, path  # nothing here changes anything
        for method, operation in item.items():
            assert operation["responses"], (method, path)
    posts = {path for path, item in paths.items() if "post" in item}
    changing = {f"/{{repository}}/tidings/{name}" for name in ("frames", "reconcile/{snapshot}")}
    assert posts == changing  # questions that are too long for a URL
