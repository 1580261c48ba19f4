"""How long a server takes to open and cut one large content, beside ``casync make``, in one run.

    python tests/bench/bench_casync.py [CONTENT_MB] [--average 4k] [--json]

A repository of that size is generated and published; then the index is asked of a real server with
an empty cache, and ``casync make`` is run over the opened file with an empty store and a full one.
Memory is the greatest that the server, and a worker of it, held (resident, in MiB).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.repos import packages, rpm_md
from support.servers import Servers
from tidings_chunkstore import publisher
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.limits import MIB
from tidings_chunkstore.zstd import zstd

ROUNDS = 3
MOST = 3.0  # times what casync make takes with an empty store, as a goal


class Memory(threading.Thread):
    """The greatest sum of resident memory of a process and those it started, in MiB."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self._process = process
        self._done = threading.Event()
        self.server = self.worker = 0.0

    def run(self) -> None:
        """Look 50 times a second."""
        while not self._done.wait(0.02):
            self.server = max(self.server, _resident(self._process))
            for child in _children(self._process):
                self.worker = max(self.worker, _resident(child))

    def stop(self) -> None:
        """Look no more."""
        self._done.set()
        self.join()


def _resident(process: int) -> float:
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0.0  # it has ended
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / MIB


def _children(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        try:
            found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue  # the thread has ended
    return found


def casync_make(folder: Path, content: Path, average: int) -> tuple[float, float, bytes]:
    """Seconds with an empty store, seconds with a full one, and the index."""
    sizes = f"--chunk-size={average // 4}:{average}:{average * 4}"
    index = folder / "made.caibx"
    command: list[str | Path] = [
        "casync",
        "make",
        sizes,
        f"--store={folder / 'made.castr'}",
        index,
        content,
    ]
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    subprocess.run(["rm", "-r", folder / "made.castr"], check=True)
    return seconds[0], seconds[1], index.read_bytes()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("megabytes", nargs="?", type=float, default=120.0)
    parser.add_argument("--average", choices=("4k", "64k"), default="64k")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    average = int(arguments.average[:-1]) * 1024
    with tempfile.TemporaryDirectory() as scratch, Servers(Path(scratch, "servers")) as servers:
        folder = Path(scratch)
        tree = folder / "www" / "repo"
        each = len(_primary(folder / "probe", 200)) / 200
        data = _primary(tree, round(arguments.megabytes * 1e6 / each))
        publisher.publish(tree, LocalBackend(tree / "tidings"))
        content = folder / "content"
        content.write_bytes(data)
        ours: list[float] = []
        again: list[float] = []
        empty: list[float] = []
        full: list[float] = []
        memory = Memory(0)
        for number in range(ROUNDS):
            server = servers.mirror(folder / "www", "--cache", folder / f"cache-{number}")
            memory = Memory(server.process.pid)
            memory.start()
            url = f"{server.url}/repo/tidings/casync/{arguments.average}/primary.xml.caibx"
            for seconds in (ours, again):
                started = time.perf_counter()
                answer = httpx.get(url, timeout=120)
                seconds.append(time.perf_counter() - started)
                answer.raise_for_status()
            memory.stop()
            server.stop()
            first, second, index = casync_make(folder, content, average)
            if answer.content != index:
                print("the index is not casync's", file=sys.stderr)
                return 1
            empty.append(first)
            full.append(second)
    figures = {
        "content_mb": round(len(data) / 1e6, 1),
        "average": arguments.average,
        "index_seconds": round(min(ours), 2),
        "index_again_seconds": round(min(again), 4),
        "casync_make_seconds": round(min(empty), 2),
        "casync_make_full_store_seconds": round(min(full), 2),
        "times_casync": round(min(ours) / min(empty), 2),
        "server_mib": round(memory.server),
        "worker_mib": round(memory.worker),
    }
    if arguments.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name.replace('_', ' '):32} {value}")
    return 0 if figures["times_casync"] <= MOST else 1


def _primary(tree: Path, count: int) -> bytes:
    """Generate a repository; what its primary opens to."""
    tree.mkdir(parents=True)
    rpm_md(tree, packages(count), codec="zst", types=("primary",))
    published = next((tree / "repodata").glob("*primary*"))
    return zstd.decompress(published.read_bytes())


if __name__ == "__main__":
    sys.exit(main())
