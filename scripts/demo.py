"""The main job at work, through the real commands; `make demo` runs it.

Makes a repository with createrepo_c from generated packages, publishes and serves it, and lets a
client sync: from nothing, after a day's change, and again with nothing new; then one that has only
an old plain copy. All bytes are counted on the wire, and every file is compared with the mirror's.

    demo.py [--packages N] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.repos import DAY, START, evolve, packages, rpm_md_by_createrepo_c
from support.servers import Wire, start_command

BIN = Path(sys.executable).parent


@dataclass(frozen=True, slots=True)
class Row:
    """One sync: bytes are everything on the wire, both ways."""

    what: str
    route: str
    requests: int
    wire: int
    plain: int
    seconds: float


def run(*arguments: str | Path) -> dict[str, Any]:
    """Runs a command, says so, and returns the last JSON line it printed."""
    line = " ".join(str(a) for a in arguments)
    print(f"$ {line}", flush=True)
    done = subprocess.run(
        [str(BIN / str(arguments[0])), *map(str, arguments[1:]), "--json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"demo: {line} ended with {done.returncode}\n{done.stdout}")
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last


def same(mirror: Path, client: Path) -> int:
    """The number of metadata files, all byte for byte the mirror's; ends the demo if not."""
    names = {path.name for path in mirror.iterdir()}
    if names != {path.name for path in client.iterdir() if not path.name.startswith(".")}:
        raise SystemExit(f"demo: {client} holds other files than {mirror}")
    for name in names:
        if (mirror / name).read_bytes() != (client / name).read_bytes():
            raise SystemExit(f"demo: {client / name} differs from the mirror's")
    return len(names)


def sync(what: str, wire: Wire, repo: Path, dest: Path) -> Row:
    """One sync through the counting wire, checked against the mirror's own files."""
    wire.reset()
    started = time.monotonic()
    summary = run("tidings", "sync", wire.url, dest)
    seconds = time.monotonic() - started
    files = same(repo / "repodata", dest / "repodata")
    print(f"  {files} files, bit for bit as on the mirror", flush=True)
    plain = sum(path.stat().st_size for path in (repo / "repodata").iterdir())
    return Row(
        what, str(summary["route"]), wire.requests, wire.received + wire.sent, plain, seconds
    )


def table(rows: list[Row]) -> str:
    """The rows for a terminal. Sizes in bytes."""
    lines = [
        f"{'client':34} {'route':8} {'requests':>8} {'on the wire':>12} {'plain files':>12} saved"
    ]
    for row in rows:
        saved = f"{1 - row.wire / row.plain:6.1%}"
        lines.append(
            f"{row.what:34} {row.route:8} {row.requests:8} {row.wire:12,} {row.plain:12,} {saved}"
        )
    return "\n".join(lines)


def demo(folder: Path, count: int) -> list[Row]:
    """The whole story below ``folder``."""
    root = folder / "mirror"
    repo = root / "example" / "x86_64"
    print(f"A repository of {count} packages, by createrepo_c")
    first = packages(count)
    rpm_md_by_createrepo_c(repo, first)
    rows: list[Row] = []
    with ExitStack() as stack:
        report(run("tidings-mirror", "publish", repo))

        print(f"$ tidings-mirror serve {root}")
        server = start_command(
            folder / "server", [BIN / "tidings-mirror", "serve", root, "--port", "0"]
        )
        stack.callback(server.stop)
        wire = stack.enter_context(Wire(f"{server.url}/example/x86_64"))

        rows.append(sync("new, nothing yet", wire, repo, folder / "client"))
        # What any other program downloaded: no state of ours in it.
        shutil.copytree(repo / "repodata", folder / "plain" / "repodata")

        print("A day later: some packages updated, added and removed")
        rpm_md_by_createrepo_c(repo, evolve(first, seed=1), timestamp=START + DAY)
        report(run("tidings-mirror", "publish", repo))

        rows.append(sync("updates after a day", wire, repo, folder / "client"))
        rows.append(sync("asks again, nothing changed", wire, repo, folder / "client"))
        rows.append(sync("has a plain copy of yesterday", wire, repo, folder / "plain"))
    return rows


def report(summary: dict[str, Any]) -> None:
    """What a publish did, in a line."""
    parts = [
        f"{name.replace('_', ' ')} {value:,}"
        for name, value in summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "v"
    ]
    print("  " + ", ".join(parts), flush=True)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Publish, serve and sync a generated repository.")
    parser.add_argument("--packages", type=int, default=4000, metavar="N", help="how many")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work there and leave it")
    options = parser.parse_args()
    with ExitStack() as stack:
        if options.keep:
            folder: Path = options.keep.resolve()
            folder.mkdir(parents=True, exist_ok=False)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidings-demo-")))
        rows = demo(folder, options.packages)
    print()
    print(table(rows))
    print("\nOn the wire: all HTTP both ways, heads included. Plain files: repodata/ as published.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
