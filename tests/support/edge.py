"""An edge for tests: ``tidings-mirror serve --pull-through`` in front of real servers.

edge = start_edge(servers, tmp_path, {"fedora/43": {"urls": [mirror.url + "/fedora/43"]}})
httpx.get(f"{edge.url}/fedora/43/repodata/repomd.xml")
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from support.servers import HOST, Command, Servers, free_port


@dataclass
class RunningEdge:
    """A running edge, its cache folder, and its settings file."""

    command: Command
    cache: Path
    config: Path

    @property
    def url(self) -> str:
        """Base URL without a slash at the end."""
        return self.command.url

    def folder(self, path: str) -> Path:
        """What it holds of the repository at *path*."""
        return self.cache / "pulled" / quote(path, safe="")

    def status(self, path: str) -> dict[str, Any]:
        """How the looks at the upstream of *path* went."""
        value: dict[str, Any] = json.loads((self.folder(path) / "status.json").read_text())
        return value

    def states(self, path: str) -> list[int]:
        """The numbers of the states that are held, oldest first."""
        return sorted(int(each.name) for each in (self.folder(path) / "states").iterdir())

    def log(self) -> str:
        """What it said."""
        return self.command.log.read_text()


def edge_settings(repos: Mapping[str, Mapping[str, object]]) -> str:
    """The settings file's text; values are strings, numbers or lists of strings."""
    tables = []
    for path, wanted in repos.items():
        lines = ["[[repo]]", f"path = {json.dumps(path)}"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in wanted.items()]
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n"


def start_edge(
    servers: Servers,
    folder: Path,
    repos: Mapping[str, Mapping[str, object]],
    *options: str | Path,
    fresh: int = 1,
    wrap: Sequence[str] = (),
    port: int | None = None,
    env: dict[str, str] | None = None,
) -> RunningEdge:
    """Start an edge whose cache and settings lie in *folder*; *wrap* goes before the command."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "mirror.toml"
    config.write_text(edge_settings(repos))
    cache = folder / "cache"
    arguments: list[str | Path] = [*wrap, sys.executable, "-m", "tidings_server.cli", "serve"]
    arguments += ["--pull-through", "--config", config, "--cache", cache, "--fresh", str(fresh)]
    arguments += ["--host", HOST, "--port", str(port or free_port()), *options]
    return RunningEdge(servers.command(arguments, env), cache, config)
