"""The goals with numbers, side by side in one run: publish, sync and serve beside zstd and nginx.

Input is ``../shared/data/rawhide-sim`` where it lies beside the checkout (120 MB open), else a
generated repository of the same kind. Ratios hold on any machine; seconds do not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from support import repos
from support.servers import Servers

HERE = Path(__file__).resolve().parents[2]
SHARED = HERE.parent / "shared"
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Run:
    """One finished process: wall seconds, and peak memory in bytes."""

    seconds: float
    peak: int


def run(argv: Sequence[str | Path], shell: str | None = None) -> Run:
    """Run a command to its end; with *shell* that line instead. Raises when it fails."""
    words = ["/bin/sh", "-c", shell] if shell else [str(word) for word in argv]
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        process = subprocess.Popen(words, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{words} failed: {log.read().decode(errors='replace')[-800:]}")
    return Run(seconds, usage.ru_maxrss * 1024)


def median(runs: Sequence[Run]) -> Run:
    """Medians of both figures."""
    return Run(
        statistics.median(r.seconds for r in runs), int(statistics.median(r.peak for r in runs))
    )


def line(name: str, value: str, goal: str, met: bool | None) -> None:
    """One row of the table."""
    verdict = "" if met is None else ("met" if met else "MISSED")
    print(f"| {name} | {value} | {goal} | {verdict} |", flush=True)


@contextlib.contextmanager
def versions(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Two consecutive publishes of one large repository."""
    packed = SHARED / "data" / "rawhide-sim"
    if packed.is_dir():
        tool = SHARED / "tools" / "expand_history.py"
        run([sys.executable, tool, packed, folder, "--versions", "2"])
        yield folder / "000", folder / "001"
        return
    made = repos.packages(40_000)
    repos.rpm_md(folder / "0", made, codec="zst", types=("primary",))
    made = repos.evolve(made, 1, 0.005)
    later = repos.START + repos.DAY
    repos.rpm_md(folder / "1", made, codec="zst", types=("primary",), timestamp=later)
    yield folder / "0", folder / "1"


def copy(source: Path, target: Path) -> None:
    """Put a publish's repodata in place of the one that is there."""
    shutil.rmtree(target / "repodata", ignore_errors=True)
    shutil.copytree(source / "repodata", target / "repodata")
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def tool(name: str) -> Path:
    """A command of this project, from the environment that runs the benchmark."""
    return Path(sys.executable).parent / name


def bench_step(folder: Path) -> None:
    """Publish and sync of one step, beside zstd on the same file."""
    with versions(folder / "versions") as (old, new):
        primary = next((new / "repodata").glob("*primary.xml.zst"))
        plain = folder / "primary.xml"
        run(["zstd", "-dqf", primary, "-o", plain])
        size = plain.stat().st_size
        root = folder / "mirror" / "repo"
        publishes, compressions, syncs, pipes, idle = [], [], [], [], []
        for number in range(ROUNDS):
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir(parents=True)
            copy(old, root)
            run([tool("tidings-mirror"), "publish", root])
            with Servers(folder / f"servers{number}") as servers:
                url = f"{servers.nginx(root.parent).url}/repo"
                dest = folder / "dest"
                shutil.rmtree(dest, ignore_errors=True)
                run([tool("tidings"), "sync", url, dest])
                copy(new, root)
                publishes.append(run([tool("tidings-mirror"), "publish", root]))
                compressions.append(run(["zstd", "-10", "-qf", plain, "-o", folder / "z"]))
                syncs.append(run([tool("tidings"), "sync", url, dest]))
                pipes.append(run([], f"zstd -dc {primary} | zstd -10 -qc > {folder}/z"))
                idle.append(run([tool("tidings"), "sync", url, dest]))
            if (dest / "repodata" / primary.name).read_bytes() != primary.read_bytes():
                raise RuntimeError("the synced file differs")
    publish, compress = median(publishes), median(compressions)
    sync, pipe, nothing = median(syncs), median(pipes), median(idle)
    ratio = publish.seconds / compress.seconds
    mb = f"{size / 1e6:.0f} MB open"
    line(
        f"publish of a step, {mb}, beside `zstd -10`",
        f"{publish.seconds:.2f} s / {compress.seconds:.2f} s = {ratio:.2f}",
        "at most 2",
        ratio <= 2,
    )
    peak = publish.peak / size
    line(
        "publish, peak memory by content",
        f"{publish.peak / 1e6:.0f} MB = {peak:.1f}",
        "at most 4",
        peak <= 4,
    )
    ratio = sync.seconds / pipe.seconds
    line(
        "sync of it beside `zstd -d \\| zstd -10`",
        f"{sync.seconds:.2f} s / {pipe.seconds:.2f} s = {ratio:.2f}",
        "at most 1.5",
        ratio <= 1.5,
    )
    line("sync, peak memory", f"{sync.peak / 1e6:.0f} MB", "at most 128 MB", sync.peak <= 128e6)
    line("sync, nothing new", f"{nothing.seconds:.2f} s", "at most 0.4 s", nothing.seconds <= 0.4)


def bench_unchanged(folder: Path, count: int = 500) -> None:
    """Going through repositories that did not change."""
    root = folder / "many"
    made = repos.packages(20)
    for number in range(count):
        repos.rpm_md(root / f"{number // 50}" / f"repo{number}", made, codec="gz")
    run([tool("tidings-mirror"), "publish", "--recursive", root])
    seconds = median(
        [run([tool("tidings-mirror"), "publish", "--recursive", root]) for _ in range(ROUNDS)]
    ).seconds
    line(f"{count} unchanged repositories", f"{seconds:.2f} s", "at most 5 s", seconds <= 5)


def requests_a_second(url: str, first: int, last: int) -> float:
    """What wrk gets for one range."""
    answer = subprocess.run(
        ["wrk", "-t1", "-c16", "-d4s", "-H", f"Range: bytes={first}-{last}", url],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.search(r"Requests/sec:\s*([\d.]+)", answer)
    if not found or "Non-2xx" in answer:
        raise RuntimeError(f"wrk failed: {answer}")
    return float(found[1])


def bench_serve(folder: Path) -> None:
    """A 20 KB range of a pack, from the server and from nginx."""
    root = folder / "serve" / "repo"
    repos.rpm_md(root, repos.packages(2000), codec="gz")
    run([tool("tidings-mirror"), "publish", root])
    pack = next((root / "tidings").glob("*.pack"))
    if pack.stat().st_size < 40_000:
        raise RuntimeError("the pack is too small for the range")
    with Servers(folder / "serve-servers") as servers:
        path = f"/repo/tidings/{pack.name}"
        ours = servers.mirror(root.parent).url + path
        theirs = servers.nginx(root.parent).url + path
        pairs = [
            (requests_a_second(ours, 9000, 28_999), requests_a_second(theirs, 9000, 28_999))
            for _ in range(ROUNDS)
        ]
    mine = statistics.median(a for a, _ in pairs)
    nginx = statistics.median(b for _, b in pairs)
    ratio = statistics.median(a / b for a, b in pairs)
    line(
        "20 KB pack range, one worker beside nginx",
        f"{mine:,.0f} / {nginx:,.0f} requests/s = {ratio:.3f}",
        "at least 0.13",
        ratio >= 0.13,
    )


def main() -> None:
    """Print the table."""
    benches = {"step": bench_step, "unchanged": bench_unchanged, "serve": bench_serve}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", choices=[[], *benches], help="which; all by default")
    chosen = parser.parse_args().only or list(benches)
    print("| what | measured | goal | |\n|---|---|---|---|")
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="tidings-bench-") as folder:
            benches[name](Path(folder))


if __name__ == "__main__":
    main()
