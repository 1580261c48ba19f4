"""What chunk parameters cost: the script behind docs/adr/0001-chunk-parameters.md.

For each candidate and each repository history (a folder of versions, each with ``repodata/``),
one line of a Markdown table, bytes as a mirror and its clients would see them:

- *bill*: what a client of the version before the last downloads from a static mirror that has
  only the last one: dictionary, index, missing frames, 500 bytes of HTTP a range (ranges whose
  gap is smaller are one), one request each for the index section and the dictionary.
- *step*: the publisher's median step without deltas: new frames, every changed content's index
  and 32 bytes a new chunk, as share of the changed files as published.
- *first*: the first pack (frames, indexes, 32 bytes a chunk, dictionary) as share of its files.

Run: ``python tests/bench/chunk_parameters.py --avg 4,8 DIR...``
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from tidings_chunkstore.chunker import ChunkerParams, chunk_ids, cuts, params_for
from tidings_chunkstore.frames import LEVEL_FIRST, LEVEL_STEP, FrameWriter, train_dictionary
from tidings_chunkstore.ids import ChunkId
from tidings_chunkstore.wire import uvarints
from tidings_chunkstore.zstd import zstd

REQUEST = 500  #: bytes of HTTP headers, both ways, of one range
TOC_ENTRY = 32  #: bytes of a pack's table of contents for one chunk: its full id


@dataclass(frozen=True)
class Published:
    """One published file of one version."""

    kind: str
    path: Path

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def content(self) -> bytes:
        return opened(self.path)


@cache
def opened(path: Path) -> bytes:
    data = path.read_bytes()
    match path.suffix:
        case ".gz":
            return gzip.decompress(data)
        case ".bz2":
            return bz2.decompress(data)
        case ".zst":
            return zstd.decompress(data)
        case _:
            return data


def versions(root: Path) -> list[list[Published]]:
    found = []
    for version in sorted(root.iterdir()):
        names = sorted((version / "repodata").glob("*-*"))
        found.append([Published(kind(p.name), p) for p in names])
    return found


def kind(name: str) -> str:
    """primary.xml, primary.sqlite: a type whatever its wrapping."""
    match = re.search(r"-(\w+\.\w+)", name)
    return match[1] if match else name


def prefix_bytes(chunks: int) -> int:
    """Bytes of an id prefix at which a false match is less likely than 1 in 10,000.

    Of n*n pairs between two contents of n chunks, 2**(8*k) must be 10,000 times more.
    """
    return next((k for k in range(5, 8) if chunks * chunks * 10_000 < 1 << 8 * k), 8)


@dataclass(frozen=True)
class Cut:
    """One content, cut."""

    ids: list[ChunkId]
    chunks: dict[ChunkId, bytes]


def cut(data: bytes, params: ChunkerParams) -> Cut:
    ends = cuts(data, params)
    ids = chunk_ids(data, ends)
    spans = pairwise([0, *ends])
    return Cut(ids, {i: data[start:end] for i, (start, end) in zip(ids, spans, strict=True)})


def index_bytes(cut_: Cut, frames: dict[ChunkId, int], place: dict[ChunkId, int]) -> int:
    """Each distinct chunk once (id, frame length), frame positions and the order as runs."""
    distinct = list(cut_.chunks)
    lengths = [frames[i] for i in distinct]
    planes = bytes(n & 255 for n in lengths) + bytes(min(n >> 8, 255) for n in lengths)
    number = {i: n for n, i in enumerate(distinct)}
    columns = (planes, runs([place[i] for i in distinct]), runs([number[i] for i in cut_.ids]))
    packed = sum(len(zstd.compress(column, 19)) for column in columns)
    return len(distinct) * prefix_bytes(len(distinct)) + packed + 64


def runs(numbers: list[int]) -> bytes:
    """*numbers* as runs of consecutive ones: jumps, then lengths, each a uvarint."""
    jumps: list[int] = []
    lengths: list[int] = []
    expected = 0
    for n in numbers:
        if n == expected and lengths:
            lengths[-1] += 1
        else:
            jump = n - expected
            jumps.append(jump * 2 if jump >= 0 else -jump * 2 - 1)
            lengths.append(1)
        expected = n + 1
    return uvarints(jumps) + uvarints(lengths)


class Mirror:
    """A model of one store: frame sizes and places, pack after pack."""

    def __init__(self, dictionary_size: int, level_first: int, level_step: int) -> None:
        self.levels = (level_first, level_step)
        self.dictionary_size = dictionary_size
        self.dictionary = b""
        self.writer: FrameWriter | None = None
        self.frames: dict[ChunkId, int] = {}
        self.place: dict[ChunkId, int] = {}
        self.next_place = 0

    def publish(self, files: list[tuple[Cut, int]], skip: float) -> tuple[int, int, list[int]]:
        """(bytes of new frames, new chunks, index sizes) for cut files with their published sizes.

        In a step a file is not stored at all when its new frames exceed *skip* of that size.
        """
        first = self.writer is None
        if first:
            chunks = list({i: c for f, _ in files for i, c in f.chunks.items()}.values())
            self.dictionary = train_dictionary(chunks, self.dictionary_size)
            self.writer = FrameWriter(self.dictionary, self.levels[0])
        writer = self.writer
        assert writer is not None
        new_bytes = new_chunks = 0
        indexes = []
        for file, published in files:
            made = {
                i: len(writer.frame(chunk))
                for i, chunk in file.chunks.items()
                if i not in self.frames
            }
            if not first and sum(made.values()) > skip * published:
                continue
            self.place |= {i: self.next_place + n for n, i in enumerate(made)}
            self.frames |= made
            self.next_place += len(made)
            new_bytes += sum(made.values())
            new_chunks += len(made)
            indexes.append(index_bytes(file, self.frames, self.place))
        if first:
            self.writer = FrameWriter(self.dictionary, self.levels[1])
        self.next_place += 1000  # another pack: never consecutive with the one before
        return new_bytes, new_chunks, indexes


def bill(old: Cut, new: Cut, mirror: Mirror) -> tuple[int, int, int]:
    """(bytes of missing frames, bytes of gaps fetched along, requests) of one content."""
    have = set(old.ids)
    order = list(dict.fromkeys(new.ids))
    missing = gaps = requests = gap = 0
    near = False
    for i in order:
        size = mirror.frames[i]
        if i in have:
            gap += size
            continue
        if near and gap <= REQUEST:
            gaps += gap
        else:
            requests += 1
        missing += size
        near, gap = True, 0
    return missing, gaps, requests


def parameters(rule: str, published: Published) -> ChunkerParams:
    """*rule* is "rule" for params_for, or min/avg/max in bytes."""
    if rule == "rule":
        return params_for(len(published.content()), published.size)
    return ChunkerParams.of(*map(int, rule.split("/")))


def study(root: Path, rule: str, options: argparse.Namespace) -> Iterator[str]:
    history = versions(root)
    if options.kinds:
        history = [[f for f in v if f.kind in options.kinds] for v in history]
    sizes = (options.dictionary * 1024, options.first, options.step)

    mirror = Mirror(*sizes)
    before: dict[str, Cut] = {}
    paths: dict[str, str] = {}
    shares = []
    first_share = 0.0
    for number, version in enumerate(history):
        changed = [f for f in version if paths.get(f.kind) != f.path.name]
        now = {f.kind: cut(f.content(), parameters(rule, f)) for f in changed}
        new, count, indexes = mirror.publish([(now[f.kind], f.size) for f in changed], options.skip)
        total = new + sum(indexes) + TOC_ENTRY * count
        published = sum(f.size for f in changed)
        if number == 0:
            first_share = (total + len(zstd.compress(mirror.dictionary, 19))) / published
        else:
            shares.append(total / published)
            if options.verbose:
                print(f"    {root.name} {number}: {new:,} frames, {count} chunks, "
                      f"{sum(indexes):,} index, {published:,} published: {total / published:.3f}",
                      file=sys.stderr)  # fmt: skip
        if number == len(history) - 1:
            old = dict(before)
        before |= now
        paths |= {f.kind: f.path.name for f in version}
        for f in version:
            if f not in history[-1] and f not in (history[-2] if len(history) > 1 else []):
                opened.cache_clear()

    last = [f for f in history[-1] if f.kind in now and f.kind in old]
    for only in last:
        fresh = Mirror(*sizes)
        start = time.perf_counter()
        _, _, indexes = fresh.publish([(now[only.kind], only.size)], options.skip)
        seconds = time.perf_counter() - start
        missing, gaps, requests = bill(old[only.kind], now[only.kind], fresh)
        dictionary = len(zstd.compress(fresh.dictionary, 19))
        total = missing + gaps + indexes[0] + dictionary + (requests + 2) * REQUEST
        params = parameters(rule, only)
        yield (
            f"| {root.name} {only.kind} | {params.min}/{params.avg}/{params.max} "
            f"| {len(now[only.kind].ids):,} | {indexes[0]:,} | {missing:,} | {gaps:,} "
            f"| {dictionary:,} | {requests + 2} | **{total:,}** ({total / only.size:.3f}) "
            f"| {statistics.median(shares):.3f} | {first_share:.2f} | {seconds:.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("roots", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--avg", default="4", help="averages in KiB, comma-separated; or 'rule'")
    parser.add_argument("--ratio", default="4:8", help="avg/min:max/avg, comma-separated")
    parser.add_argument("--dictionary", type=int, default=16, help="KiB")
    parser.add_argument("--first", type=int, default=LEVEL_FIRST, help="level of a first publish")
    parser.add_argument("--step", type=int, default=LEVEL_STEP, help="level of a step")
    parser.add_argument(
        "--skip", type=float, default=0.5, help="store no file whose new frames exceed this share"
    )
    parser.add_argument("--kinds", nargs="*", default=(), help="primary.xml ...")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    rules = []
    for average in options.avg.split(","):
        if average == "rule":
            rules.append("rule")
            continue
        for ratio in options.ratio.split(","):
            low, high = map(float, ratio.split(":"))
            size = int(float(average) * 1024)
            rules.append(f"{max(64, int(size / low))}/{size}/{int(size * high)}")
    print("| content | min/avg/max | chunks | index | missing | gaps | dictionary | requests "
          "| bill (of published) | step | first | s |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for root in options.roots:
        for rule in rules:
            for line in study(root, rule, options):
                print(line, flush=True)


if __name__ == "__main__":
    main()
