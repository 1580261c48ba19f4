"""What a store takes after 30 snapshots of a 1% daily change: at most four times the repodata.

Two histories: a generated repository of 1,500 packages, and ``../shared/data/updates-sim`` where it
lies beside the checkout: its nine versions, then as many more as are wanted, in each of which 1% of
the packages (as the last version has them) get another build: version, times, sizes and checksums.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from support import repos
from tidings_chunkstore import publisher
from tidings_chunkstore.backends import LocalBackend

HERE = Path(__file__).resolve().parents[2]
SHARED = HERE.parent / "shared"
GOAL = 4.0
TYPES = ("primary", "filelists", "other", "group")

_PACKAGE = re.compile(rb"<package type=.*?</package>", re.DOTALL)
_RELEASE = re.compile(rb'(?<=rel=")[^"]*(?=")')
_HEX = re.compile(rb"(?<=>)[0-9a-f]{64}(?=</checksum>)")
_NUMBER = re.compile(rb'(?<=build=")\d+|(?<=file=")\d+|(?<=package=")\d+')


def generated(root: Path, count: int, share: float) -> Iterator[None]:
    """Writes one version of the generated repository after the other."""
    made = repos.packages(count)
    day = 0
    while True:
        stamp = repos.START + day * repos.DAY
        repos.rpm_md(root, made, codec="zst", types=TYPES, timestamp=stamp)
        yield
        day += 1
        made = repos.evolve(made, day, share)


def rebuilt(primary: bytes, day: int, share: float) -> bytes:
    """*primary* with another build of *share* of its packages."""
    choice = random.Random(f"rebuilt/{day}")

    def package(found: re.Match[bytes]) -> bytes:
        text = found[0]
        if choice.random() >= share:
            return text
        # The release is in the file's name and in what the package provides, too.
        release = _RELEASE.search(text)
        if release is not None:
            text = text.replace(release[0], release[0] + b".%d" % day)
        text = _HEX.sub(lambda _: choice.randbytes(32).hex().encode(), text)
        return _NUMBER.sub(lambda n: b"%d" % (int(n[0]) + choice.randrange(1000, 90_000)), text)

    return _PACKAGE.sub(package, primary)


def extended(root: Path, share: float) -> Iterator[None]:
    """Writes the versions of updates-sim, then generated ones."""
    with tempfile.TemporaryDirectory(prefix="tidings-bench-") as folder:
        tool = SHARED / "tools" / "expand_history.py"
        packed = SHARED / "data" / "updates-sim"
        subprocess.run(
            [sys.executable, tool, packed, folder], check=True, stdout=subprocess.DEVNULL
        )
        for version in sorted(Path(folder).iterdir()):
            shutil.rmtree(root / "repodata", ignore_errors=True)
            shutil.copytree(version / "repodata", root / "repodata")
            yield
    last = next((root / "repodata").glob("*primary.xml.*"))
    primary = subprocess.run(["zstd", "-dc", last], check=True, stdout=subprocess.PIPE).stdout
    day = 0
    while True:
        day += 1
        primary = rebuilt(primary, day, share)
        write_primary(root, primary, day)
        yield


def write_primary(root: Path, primary: bytes, day: int) -> None:
    """A repodata that has *primary* alone."""
    stamp = repos.START + (1000 + day) * repos.DAY
    packed = {"primary": ("primary.xml.zst", repos.compress(primary, "zst"))}
    repos.rpm_md(root, (), types=(), extra=packed, timestamp=stamp)


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def measure(name: str, versions: Iterator[None], root: Path, count: int, goal: float) -> float:
    """Publish *count* versions; the row of the table, and how many times the repodata it takes."""
    backend = LocalBackend(root / "tidings")
    first = steps = 0.0
    with_frames = 0
    for number in range(count):
        next(versions)
        report = publisher.publish(root, backend, publisher.Options(keep=count))
        if not report.changed:
            raise RuntimeError(f"{name}: version {number} is the one before")
        if number == 0:
            first = report.share
        else:
            steps += report.share
            with_frames += report.tally.frames > 0
    ratio = size_of(root / "tidings") / size_of(root / "repodata")
    verdict = "met" if ratio <= goal else "MISSED"
    value = f"{ratio:.2f} (first pack {first:.2f}, steps {steps / max(1, count - 1):.3f}, "
    value += f"{with_frames} with frames)"
    print(f"| {name} | {count} | {value} | at most {goal:g} | {verdict} |", flush=True)
    return ratio


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="generated, updates-sim; all by default")
    parser.add_argument("--snapshots", type=int, default=30)
    parser.add_argument("--share", type=float, default=0.01, help="of the packages, daily")
    options = parser.parse_args()
    only = options.only or ["generated", "updates-sim"]
    print("| history | snapshots | `tidings/` by repodata | goal | |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="tidings-bench-") as folder:
        if "generated" in only:
            root = Path(folder) / "generated"
            versions = generated(root, 1500, options.share)
            measure("generated, 1,500 packages", versions, root, options.snapshots, GOAL)
        if "updates-sim" in only and (SHARED / "data" / "updates-sim").is_dir():
            root = Path(folder) / "updates-sim"
            versions = extended(root, options.share)
            measure("updates-sim, extended", versions, root, options.snapshots, GOAL)


if __name__ == "__main__":
    main()
