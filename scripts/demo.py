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
from tidings_client.progress import cost_text, size_text

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


def run(folder: Path, *arguments: str | Path) -> dict[str, Any]:
    """Runs a command, shows it with paths below *folder*, and returns the last JSON line of it."""
    line = " ".join(str(a) for a in arguments).replace(f"{folder}/", "")
    print(f"\n$ {line}", flush=True)
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


def sync(folder: Path, what: str, wire: Wire, repo: Path, dest: Path) -> Row:
    """One sync through the counting wire, checked against the mirror's own files."""
    wire.reset()
    started = time.monotonic()
    summary = run(folder, "tidings", "sync", wire.url, dest)
    seconds = time.monotonic() - started
    files = same(repo / "repodata", dest / "repodata")
    plain = sum(path.stat().st_size for path in (repo / "repodata").iterdir())
    row = Row(what, str(summary["route"]), wire.requests, wire.received + wire.sent, plain, seconds)
    print(f"  {what}: {cost_text(row.wire, row.requests)}, {seconds:.1f} s")
    print(f"  all {files} files are bit for bit the mirror's", flush=True)
    return row


def table(rows: list[Row]) -> str:
    """The rows for a terminal."""
    lines = [
        f"{'client':32} {'plain download':>14} {'with Tidings':>13} {'requests':>9} "
        f"{'saved':>7}  by"
    ]
    for row in rows:
        saved = f"{1 - row.wire / row.plain:.1%}" if row.wire < row.plain else "-"
        lines.append(
            f"{row.what:32} {size_text(row.plain):>14} {size_text(row.wire):>13} "
            f"{row.requests:>9} {saved:>7}  {row.route}"
        )
    return "\n".join(lines)


def demo(folder: Path, count: int) -> list[Row]:
    """The whole story below ``folder``."""
    root = folder / "mirror"
    repo = root / "example" / "x86_64"
    print(f"A mirror has a repository of {count:,} packages, made by createrepo_c.")
    first = packages(count)
    rpm_md_by_createrepo_c(repo, first)
    rows: list[Row] = []
    with ExitStack() as stack:
        report(run(folder, "tidings-mirror", "publish", repo))

        print("\n$ tidings-mirror serve mirror", flush=True)
        server = start_command(
            folder / "server", [BIN / "tidings-mirror", "serve", root, "--port", "0"]
        )
        stack.callback(server.stop)
        wire = stack.enter_context(Wire(f"{server.url}/example/x86_64"))

        rows.append(sync(folder, "new, nothing yet", wire, repo, folder / "client"))
        # What any other program downloaded: no state of ours in it.
        shutil.copytree(repo / "repodata", folder / "plain" / "repodata")

        print("\nA day later some packages are updated, added and removed.")
        rpm_md_by_createrepo_c(repo, evolve(first, seed=1), timestamp=START + DAY)
        report(run(folder, "tidings-mirror", "publish", repo))

        rows.append(sync(folder, "updates after a day", wire, repo, folder / "client"))
        rows.append(sync(folder, "asks again, nothing is new", wire, repo, folder / "client"))
        rows.append(sync(folder, "has a plain copy of yesterday", wire, repo, folder / "plain"))
    return rows


def report(summary: dict[str, Any]) -> None:
    """What a publish did, in a line."""
    changed, pack = summary["changed_bytes"], summary["pack_bytes"]
    print(
        f"  snapshot {summary['serial']}: {size_text(pack)} beside {size_text(changed)} of "
        f"changed metadata, {summary['seconds']:.1f} s",
        flush=True,
    )


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
    day = rows[1]
    print(f"\n{table(rows)}")
    print(
        f"\nThe daily update costs {size_text(day.wire)} instead of {size_text(day.plain)}: "
        f"{day.plain / day.wire:.0f} times less.\n"
        "Counted on the wire: all of HTTP, both ways. A plain download is repodata/ as it lies."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
