"""Tidings by its own commands: publish, serve and sync, each a process of its own."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tidings_chunkstore.errors import VerificationError

from .. import servers
from ..history import Version, changed, copy_publish
from ..process import Usage, run
from ..results import Cost
from ..wire import Wire
from .base import Bench, Contender, Done, fresh_folder, safe

_REPO = "repo"
_MARK = "version.txt"  # beside a client's folder: where it is


class Tidings(Contender):
    """Clients sync with a live server, and keep what a client keeps between two runs."""

    def __init__(self, *, static: bool) -> None:
        self.static = static
        self.name = "tidings-static" if static else "tidings"
        self.title = "Tidings, static host" if static else "Tidings"
        self.about = "tidings sync from " + (
            "a static web server, no process of ours" if static else "tidings-mirror serve"
        )

    def version(self) -> str:
        from importlib.metadata import PackageNotFoundError, version

        try:
            return f"tidings {version('tidings')}"
        except PackageNotFoundError:  # run from a checkout
            return ""

    @contextlib.contextmanager
    def running(self, bench: Bench) -> Iterator[None]:
        self.bench = bench
        self.root = bench.work / "root"
        self.repo = self.root / _REPO
        self.clients = bench.work / "clients"
        self.repo.mkdir(parents=True, exist_ok=True)
        self.clients.mkdir(exist_ok=True)
        self.types = _types(bench)
        with self._server(bench) as url, Wire(f"{url}/{_REPO}") as self.wire:
            yield

    def _server(self, bench: Bench) -> contextlib.AbstractContextManager[str]:
        if self.static:
            return servers.static(self.root, bench.work)
        return servers.mirror(self.root, bench.work, "--cache", str(bench.work / "cache"))

    @property
    def tree(self) -> Path:
        return self.repo / "tidings"

    def publish(self, version: Version, before: Version | None, *, measured: bool) -> None:
        copy_publish(version, self.repo)
        run([sys.executable, "-m", "tidings_server.cli", "publish", "--quiet", self.repo])

    def prepare(self, client: str, version: Version) -> None:
        folder = self._client(client)
        if self._at(client) == version.name:
            return
        if self._at(client) is None:
            fresh_folder(folder)
        self._sync(client, version)

    def update(self, client: str, base: Version | None, version: Version) -> Done | None:
        note = ""
        if base is None:
            self._forget(client)
        elif self._at(client) != base.name:
            # After an interruption the mirror is past the base: the client has its plain files.
            self._forget(client)
            copy_publish(base, self._client(client))
            note = "from plain files"
        self.wire.reset()
        facts, usage = self._sync(client, version)
        cost = Cost.of(self.wire.traffic(), usage)
        route = str(facts.get("route", ""))
        reason = facts.get("fallback_reason")
        parts = [part for part in (route, str(reason) if reason else "", note) if part]
        return Done(cost, len(changed(base, version)), "; ".join(parts))

    def _sync(self, client: str, version: Version) -> tuple[dict[str, Any], Usage]:
        folder = self._client(client)
        output = self.clients / "output.json"
        types = ["--types", self.types] if self.types else []
        # A history may hold a step back in time; it is replayed as it was.
        options = ["--json", "--allow-older", *types]
        command = [sys.executable, "-m", "tidings_client.cli", "sync", *options]
        usage = run([*command, self.wire.url, folder], stdout=output)
        facts = json.loads(output.read_text().splitlines()[-1])
        for path in (*(file.path for file in version.files), version.paths[-1]):
            made = folder / path
            if not made.exists() or made.read_bytes() != (version.folder / path).read_bytes():
                raise VerificationError(f"tidings made another {path}", code="rival")
        (self.clients / f"{safe(client)}.{_MARK}").write_text(version.name)
        return facts, usage

    def _client(self, client: str) -> Path:
        return self.clients / safe(client)

    def _at(self, client: str) -> str | None:
        mark = self.clients / f"{safe(client)}.{_MARK}"
        return mark.read_text() if mark.exists() else None

    def _forget(self, client: str) -> None:
        (self.clients / f"{safe(client)}.{_MARK}").unlink(missing_ok=True)
        shutil.rmtree(self._client(client), ignore_errors=True)


def _types(bench: Bench) -> str:
    """What to ask for; empty where that is all there is."""
    for version in bench.history.versions:
        mains = {path for path in version.paths if path.rsplit("/", 1)[-1].startswith(_MAINS)}
        if {file.path for file in version.files} | mains != set(version.paths):
            return ",".join(bench.history.types)
    return ""


_MAINS = ("repomd.xml", "Release", "InRelease")

TIDINGS = partial(Tidings, static=False)
STATIC = partial(Tidings, static=True)
