"""A client's memory does not grow with the content: 128 MB at most, whatever the route."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from support.repos import DAY, START, compress, packages, rpm_md
from support.servers import Misbehaving
from support.syncing import fetch, tree
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.publisher import publish

_LIMIT = 128 << 20
_RUN = """
import re, sys
from pathlib import Path
from tidings_client.remote import Remote
from tidings_client.sync import SyncOptions, sync
with Remote([sys.argv[1]]) as remote:
    result = sync(SyncOptions(Path(sys.argv[2]), route=sys.argv[3]), remote)
big = next(f.route for f in result.files if f.type == "big")
# Not getrusage: its peak is the parent's own where that was larger, for exec keeps it.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(big, int(peak[1]) * 1024)
"""


def _lines(seed: int) -> list[bytes]:
    choice = random.Random(seed)
    return [b"<package id='%032x'/> %d\n" % (choice.getrandbits(128), n) for n in range(2_200_000)]


@pytest.mark.slow
def test_a_content_of_120_megabytes(misbehaving: Misbehaving, tmp_path: Path) -> None:
    lines = _lines(1)
    made = packages(20)
    root = misbehaving.root

    def write(step: int) -> None:
        content = b"".join(lines)
        assert len(content) > 110 << 20
        big = {"big": ("big.xml.zst", compress(content, "zst"))}
        rpm_md(root, made, timestamp=START + step * DAY, extra=big)
        publish(root, LocalBackend(root / "tidings"))

    write(0)
    for route in ("delta", "chunks", "full"):
        fetch(misbehaving.url, tmp_path / route)
    for n in range(0, len(lines), 9000):
        lines[n] = b"<package id='new %d'/>\n" % n
    write(1)
    for route in ("delta", "chunks", "full"):
        ran = subprocess.run(
            [sys.executable, "-c", _RUN, misbehaving.url, str(tmp_path / route), route],
            capture_output=True,
            text=True,
            check=True,
        )
        used, peak = ran.stdout.split()
        assert used == route
        assert int(peak) < _LIMIT, (route, int(peak) >> 20)
        assert tree(tmp_path / route) == tree(root)
