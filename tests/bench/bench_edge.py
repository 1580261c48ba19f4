"""A site's week: a hundred machines behind a thin line, with squid, with an edge, with neither.

Every machine looks once a day, asks for repomd.xml and, where that is new, for the files that it
has not; this is what librepo does. Counted is what goes over the line, both ways, heads included.

Input is ``../shared/data/updates-sim`` where it lies beside the checkout, else a generated
repository of a like size.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from support import repos
from support.edge import start_edge
from support.fronts import ForwardProxy
from support.servers import Servers, Wire
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.publisher import publish

HERE = Path(__file__).resolve().parents[2]
SHARED = HERE.parent / "shared"
PATH = "updates/43"
_HREF = re.compile(rb'<location href="(repodata/[^"]+)"')


def histories(folder: Path, days: int) -> list[Path]:
    """A version for each day, and one before them."""
    packed = SHARED / "data" / "updates-sim"
    if packed.is_dir():
        tool = SHARED / "tools" / "expand_history.py"
        subprocess.run([sys.executable, tool, packed, folder], check=True, capture_output=True)
        return sorted(path for path in folder.iterdir() if path.is_dir())[: days + 1]
    made, found = repos.packages(15_000), []
    for day in range(days + 1):
        found.append(folder / f"{day:03}")
        when = repos.START + day * repos.DAY
        repos.rpm_md(found[-1], made, codec="zst", types=("primary",), timestamp=when)
        made = repos.evolve(made, day, 0.01)
    return found


@dataclass
class Machine:
    """What one machine has, as names: the files are checked once for all of them."""

    http: httpx.Client
    base: str
    repomd: bytes = b""
    had: frozenset[str] = frozenset()

    def look(self, right: dict[str, bytes]) -> int:
        """One day's look; bytes that it got. Raises when they are not the day's."""
        repomd = self.http.get(f"{self.base}/repodata/repomd.xml")
        repomd.raise_for_status()
        if repomd.content != right["repodata/repomd.xml"]:
            raise RuntimeError(f"{self.base}: not the day's repomd.xml")
        got = len(repomd.content)
        if repomd.content != self.repomd:
            names = frozenset(match.decode() for match in _HREF.findall(repomd.content))
            for name in names - self.had:
                body = self.http.get(f"{self.base}/{name}").content
                if body != right[name]:
                    raise RuntimeError(f"{name} is not what was published")
                got += len(body)
            self.repomd, self.had = repomd.content, names
        return got


@dataclass
class Way:
    """One way to the mirror: where machines ask, and the wire that is the thin line."""

    name: str
    url: str
    line: Wire
    proxy: str | None = None
    first: int = 0
    bytes: int = 0
    requests: int = 0
    inside: int = 0
    seconds: float = 0.0


def week(folder: Path, clients: int, days: int) -> list[Way]:
    """Run it: all ways side by side, day by day."""
    tree = folder / "www" / PATH
    versions = histories(folder / "versions", days)
    with Servers(folder / "servers") as servers, ForwardProxy.start(cache=True) as squid:
        tree.mkdir(parents=True)
        static = servers.nginx(folder / "www").url
        mirror = servers.mirror(folder / "www", "--cache", folder / "cache").url
        lines = [servers.wire(url) for url in (static, static, mirror, static)]
        edges = [
            start_edge(servers, folder / f"edge{n}", {PATH: {"urls": [f"{line.url}/{PATH}/"]}})
            for n, line in enumerate(lines[2:])
        ]
        ways = [
            Way("no cache", f"{lines[0].url}/{PATH}", lines[0]),
            Way("squid", f"{lines[1].url}/{PATH}", lines[1], squid.url),
            Way("edge, mirror with Tidings", f"{edges[0].url}/{PATH}", lines[2]),
            Way("edge, static mirror", f"{edges[1].url}/{PATH}", lines[3]),
        ]
        machines = {
            way.name: [
                Machine(httpx.Client(proxy=way.proxy, timeout=120), way.url) for _ in range(clients)
            ]
            for way in ways
        }
        for day, version in enumerate(versions):
            shutil.rmtree(tree / "repodata", ignore_errors=True)
            # With times of their own: nginx makes an ETag of time and size.
            shutil.copytree(version / "repodata", tree / "repodata", copy_function=shutil.copyfile)
            publish(tree, LocalBackend(tree / "tidings"))
            time.sleep(1.2)  # the edges' states are fresh for a second
            right = {f"repodata/{p.name}": p.read_bytes() for p in (tree / "repodata").iterdir()}
            for way in ways:
                way.line.reset()
                started = time.monotonic()
                inside = sum(machine.look(right) for machine in machines[way.name])
                moved = way.line.sent + way.line.received
                if day == 0:
                    way.first = moved
                else:
                    way.bytes += moved
                    way.requests += way.line.requests
                    way.inside += inside
                    way.seconds += time.monotonic() - started
        for each in machines.values():
            for machine in each:
                machine.http.close()
        return ways


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=100, metavar="N", help="machines (100)")
    parser.add_argument("--days", type=int, default=7, metavar="N", help="days (7, at most 8)")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tidings-edge-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        ways = week(folder, said.clients, said.days)
    print(f"{said.clients} machines, {said.days} days; bytes over the line, both ways:\n")
    print("| way | first day | the days after | requests | of squid's | machines got |")
    print("|---|---:|---:|---:|---:|---:|")
    squid = next(way for way in ways if way.name == "squid")
    for way in ways:
        share = f"{way.bytes / squid.bytes:.3f}"
        print(
            f"| {way.name} | {way.first:,} | {way.bytes:,} | {way.requests:,} | {share} "
            f"| {way.inside:,} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
