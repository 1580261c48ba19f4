"""Delta sections beside zstd --patch-from, xdelta3, bsdiff and diff --ed, pair by pair.

    python tests/bench/delta_vs_peers.py [--data ../shared/data] [--cache peers.json] [WORD...]

Takes every consecutive pair and first-to-last of primary, filelists and other of the histories in
DATA, those whose name holds a WORD (all without one). Peers that are not on PATH are left out,
with a line that says so; sizes are kept in the cache file. Exits with 1 when a section of an XML
pair is above 1.01 times the smallest peer plus 64 bytes, or their geometric mean above 0.8.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tidings_chunkstore import delta, deltamake
from tidings_chunkstore.ids import ContentId
from tidings_chunkstore.zstd import zstd

NAME = re.compile(r"(primary|filelists|other)\.(xml|sqlite)(\.\w+)?$")
BSDIFF_MOST = 8 << 20


def opened(path: Path) -> bytes:
    """What a published file decompresses to."""
    data = path.read_bytes()
    opener = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".zst": zstd.decompress}
    return opener[path.suffix](data) if path.suffix in opener else data


def histories(data: Path) -> Iterator[tuple[str, list[Path]]]:
    """Name and published files, oldest first, of each track of each history."""
    for history in sorted(path for path in data.iterdir() if path.is_dir()):
        tracks: dict[str, list[Path]] = {}
        for path in sorted(history.glob("*/**/*"), key=lambda p: p.relative_to(history).parts[0]):
            found = NAME.search(path.name)
            if found and path.is_file():
                track = f"{history.name} {found[1]}.{found[2]}"
                tracks.setdefault(track, []).append(path)
        for name, files in sorted(tracks.items()):
            if len(files) > 1:
                yield name, files


def peer_sizes(old: Path, new: Path, out: Path, xml: bool) -> dict[str, int]:
    """Bytes of each peer's delta, at its best fair settings."""
    commands = {"zstd": ["zstd", "-q", "-f", "-19", "--long=27", f"--patch-from={old}", str(new)]}
    commands["zstd"] += ["-o", str(out)]
    source = max(64 << 20, old.stat().st_size + (1 << 20))
    commands["xdelta3"] = ["xdelta3", "-9", "-S", "lzma", "-B", str(source), "-e", "-f", "-s"]
    commands["xdelta3"] += [str(old), str(new), str(out)]
    if new.stat().st_size <= BSDIFF_MOST:
        commands["bsdiff"] = ["bsdiff", str(old), str(new), str(out)]
    sizes = {}
    for name, command in commands.items():
        if shutil.which(name):
            subprocess.run(command, check=True, capture_output=True)
            sizes[name] = out.stat().st_size
    if xml and shutil.which("diff"):
        script = subprocess.run(
            ["diff", "--ed", "-a", str(old), str(new)], check=False, capture_output=True
        )
        sizes["diff"] = len(gzip.compress(script.stdout, 9))
    return sizes


def measure(
    name: str, files: list[Path], peers: dict[str, dict[str, int]], seconds: float
) -> list[float]:
    """Prints a line for each pair; the ratios to the smallest peer, infinite above the bound."""
    pairs = [(at, at + 1) for at in range(len(files) - 1)] + [(0, len(files) - 1)] * (
        len(files) > 2
    )
    ratios = []
    for first, second in pairs:
        old, new = opened(files[first]), opened(files[second])
        if old == new:
            continue
        key = f"{name} {first}>{second}"
        if key not in peers:
            with tempfile.TemporaryDirectory() as folder:
                before, after, out = (Path(folder) / part for part in ("old", "new", "out"))
                before.write_bytes(old)
                after.write_bytes(new)
                peers[key] = peer_sizes(before, after, out, ".xml" in name)
        begun = time.monotonic()
        budget = delta.Budget(seconds=seconds)
        section = deltamake.make([(ContentId.of(old), old)], ContentId.of(new), new, budget=budget)
        made = time.monotonic()
        if section is None:
            raise SystemExit(f"{key}: no delta")
        delta.apply(section, [delta.reader_of(old)], lambda _: None)
        applied = time.monotonic()
        best = min(peers[key], key=lambda peer: peers[key][peer])
        size = peers[key][best]
        ratio = len(section) / size
        over = len(section) > 1.01 * size + 64
        print(
            f"{key:42} {len(section):9,} {best:>8} {size:9,} {ratio:6.3f}"
            f" {'OVER' if over else '    '} {made - begun:5.2f} s, {applied - made:5.2f} s",
            flush=True,
        )
        ratios.append(math.inf if over else ratio)
    return ratios


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    root = Path(__file__).resolve().parents[3]
    parser.add_argument("--data", type=Path, default=root / "shared" / "data")
    parser.add_argument("--cache", type=Path, help="JSON file that keeps the peers' sizes")
    parser.add_argument("--seconds", type=float, default=delta.Budget().seconds)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    for peer in ("zstd", "xdelta3", "bsdiff", "diff"):
        if not shutil.which(peer):
            print(f"{peer} is not installed and left out")
    cached = options.cache is not None and options.cache.exists()
    peers = json.loads(options.cache.read_text()) if cached else {}
    ratios: list[float] = []
    print(f"{'pair':42} {'section':>9} {'best':>8} {'bytes':>9}  ratio      made   applied")
    for name, files in histories(options.data):
        if options.words and not any(word in name for word in options.words):
            continue
        found = measure(name, files, peers, options.seconds)
        if ".xml" in name:
            ratios += found
        if options.cache is not None:
            options.cache.write_text(json.dumps(peers, indent=1))
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0
    over = sum(ratio == math.inf for ratio in ratios)
    print(f"{len(ratios)} XML pairs, geometric mean {mean:.3f} of the best, {over} over the bound")
    return int(over > 0 or mean > 0.8)


if __name__ == "__main__":
    sys.exit(main())
