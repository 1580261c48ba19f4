"""What one uvicorn worker answers beside nginx on the same bytes, both asked in turn in one run.

A row has requests a second as wrk counts them, and requests for each second of processor time
that the server itself used: the second holds also where wrk and others share the cores. Reconcile
has no rival; a question asked again is read from the cache, a new one is a process of its own.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from support import repos
from support.servers import Command, Nginx, Servers
from tidings_chunkstore import bundle, publisher, reconcile
from tidings_chunkstore.backends.local import LocalBackend

REPO = "repo"
ROUNDS = 5
TICKS = os.sysconf("SC_CLK_TCK")
GOAL = 0.13
POST = """
local file = io.open("{body}", "rb")
wrk.method = "POST"
wrk.body = file:read("*a")
wrk.headers["Content-Type"] = "application/octet-stream"
"""


@dataclass(frozen=True, slots=True)
class Rate:
    """Requests for a second on the clock, and for a second of the server's processor time."""

    wall: float
    core: float


def processor_seconds(server: Command | Nginx) -> float:
    """What the server's process has used so far."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def rate(server: Command | Nginx, path: str, options: Sequence[str], seconds: int) -> Rate:
    """One run of wrk. Raises RuntimeError when an answer was an error."""
    before = processor_seconds(server)
    answer = subprocess.run(
        ["wrk", "-t1", f"-d{seconds}s", *options, server.url + path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    used = processor_seconds(server) - before
    wall = re.search(r"Requests/sec:\s*([\d.]+)", answer)
    count = re.search(r"(\d+) requests in", answer)
    if wall is None or count is None or "Non-2xx" in answer:
        raise RuntimeError(f"wrk failed: {answer}")
    return Rate(float(wall[1]), int(count[1]) / max(used, 1 / TICKS))


def row(what: str, ours: Sequence[Rate], theirs: Sequence[Rate], goal: float | None) -> None:
    """A line of the table: medians, and the median of the rounds' ratios."""
    wall = statistics.median(rate.wall for rate in ours)
    core = statistics.median(rate.core for rate in ours)
    if not theirs:
        print(f"| {what} | {wall:,.0f} | | | {core:,.0f} | | | | |", flush=True)
        return
    nginx = statistics.median(rate.wall for rate in theirs)
    nginx_core = statistics.median(rate.core for rate in theirs)
    by_wall = statistics.median(a.wall / b.wall for a, b in zip(ours, theirs, strict=True))
    by_core = statistics.median(a.core / b.core for a, b in zip(ours, theirs, strict=True))
    verdict = "" if goal is None else ("met" if by_core >= goal else "MISSED")
    print(
        f"| {what} | {wall:,.0f} | {nginx:,.0f} | {by_wall:.3f} | {core:,.0f} | {nginx_core:,.0f} "
        f"| {by_core:.3f} | {goal or ''} | {verdict} |",
        flush=True,
    )


def publish(root: Path) -> bytes:
    """Two snapshots of a repository; the primary.xml of the first."""
    made = repos.packages(2000)
    first = b""
    for day in range(2):
        repos.rpm_md(root / REPO, made, codec="gz", timestamp=repos.START + day * repos.DAY)
        publisher.publish(root / REPO, LocalBackend(root / REPO / "tidings"))
        if not first:
            first = gzip.decompress(next((root / REPO / "repodata").glob("*primary*")).read_bytes())
        made = repos.evolve(made, day + 1)
    return first


def inquiry(url: str, old: bytes) -> bytes:
    """A question by who has *old* for the primary."""
    sections = dict(bundle.decode(httpx.get(f"{url}?tracks=primary", timeout=60).content))
    found = reconcile.survey(io.BytesIO(old), reconcile.decode_list(sections["primary"]))
    return reconcile.encode_inquiries([("primary", found.inquiry)])


def edited(old: bytes, number: int) -> bytes:
    """*old* with something of its own, so that nobody has asked about it before."""
    at = 1000 * (number + 1)
    return old[:at] + b"<!-- %d -->" % number + old[at:]


def bench(folder: Path, seconds: int) -> None:
    """Print the table."""
    root = folder / "www"
    old = publish(root)
    older, newer = sorted(path.stem for path in (root / REPO / "tidings").glob("*.pack"))
    delta = f"/{REPO}/tidings/delta/{older}/{newer}"
    pack = f"/{REPO}/tidings/{older}.pack"
    with Servers(folder / "servers") as servers:
        # As an operator behind nginx runs it: nginx counts and logs there.
        plain = ["--metrics", "off"]
        ours = servers.mirror(root, "--cache", folder / "cache", "--reconcile", *plain)
        counting = servers.mirror(root, "--cache", folder / "cache2")
        # nginx has the bundle, and the head as it is served, as plain files.
        beside = folder / "beside"
        for path in (delta, f"/{REPO}/tidings/head.json"):
            target = beside / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(httpx.get(ours.url + path, timeout=60).content)
        httpx.get(counting.url + delta, timeout=60)
        (beside / pack.lstrip("/")).symlink_to(root / pack.lstrip("/"))
        nginx = servers.nginx(beside, http="access_log off;")
        size = (beside / delta.lstrip("/")).stat().st_size
        head_size = (beside / REPO / "tidings" / "head.json").stat().st_size
        many = ["-c16"]
        rows: list[tuple[str, str, list[str], float | None]] = [
            ("20 KB of a pack", pack, [*many, "-H", "Range: bytes=9000-28999"], GOAL),
            (f"head, {head_size:,} bytes", f"/{REPO}/tidings/head.json", many, None),
            (f"cached delta, {size:,} bytes", delta, many, None),
        ]
        for what, path, options, goal in rows:
            mine, counted, theirs = [], [], []
            for _ in range(ROUNDS):
                mine.append(rate(ours, path, options, seconds))
                counted.append(rate(counting, path, options, seconds))
                theirs.append(rate(nginx, path, options, seconds))
            row(what, mine, theirs, goal)
            row(f"{what}, with metrics", counted, theirs, goal)
        url = f"/{REPO}/tidings/reconcile/{newer}"
        question, script = folder / "question", folder / "post.lua"
        question.write_bytes(inquiry(ours.url + url, old))
        row("reconcile: list", [rate(ours, url, many, seconds) for _ in range(3)], [], None)
        script.write_text(POST.format(body=question))
        first = httpx.post(ours.url + url, content=question.read_bytes(), timeout=60)
        first.raise_for_status()
        again = ["-c2", "-s", str(script)]
        row(
            f"reconcile: a question of {question.stat().st_size:,} bytes again",
            [rate(ours, url, again, seconds) for _ in range(3)],
            [],
            None,
        )
        taken = []
        for number in range(ROUNDS):
            body = inquiry(ours.url + url, edited(old, number))
            started = time.monotonic()
            httpx.post(ours.url + url, content=body, timeout=60).raise_for_status()
            taken.append(time.monotonic() - started)
        each = statistics.median(taken)
        print(f"| reconcile: a new question, one at a time | {1 / each:,.1f} | | | | | | | |")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=2, help="of each run of wrk")
    seconds = parser.parse_known_args()[0].seconds
    print("| what | requests/s | nginx | ratio | a core-second | nginx | ratio | goal | |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory(prefix="tidings-bench-") as folder:
        bench(Path(folder), seconds)


if __name__ == "__main__":
    main()
