"""One day of a large repository with a zchunk record: all bytes on the wire, over nginx."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import zchunk
from support.repos import DAY, START
from support.servers import Servers
from support.syncing import fetch, tree
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.publisher import Options, publish
from tidings_chunkstore.zstd import zstd

ROOT = Path(__file__).resolve().parents[2]
MOST = 1_500  #: bytes more a day
DAYS = 3

pytestmark = [pytest.mark.slow, pytest.mark.tools]


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """The first days of updates-sim, each a repodata/ in a folder."""
    script = ROOT.parent / "shared" / "tools" / "expand_history.py"
    if not script.is_file():
        pytest.skip("no ../shared/tools beside the checkout (real repositories, not part of it)")
    folder = tmp_path_factory.mktemp("updates-sim")
    packed = ROOT.parent / "shared" / "data" / "updates-sim"
    words = [sys.executable, str(script), str(packed), str(folder), "--versions", str(DAYS)]
    subprocess.run(words, check=True, capture_output=True)
    yield sorted(path.parent for path in folder.rglob("repodata"))
    shutil.rmtree(folder)


def costs(
    days: list[Path], servers: Servers, folder: Path, *, wrapped: bool, dictionary: bool = False
) -> list[tuple[int, int]]:
    """Bytes on the wire and requests of each day's sync but the first."""
    from tidings_measure.rivals.zchunk import write_zck

    root, dest = folder / "www", folder / "dest"
    root.mkdir(parents=True)
    site = servers.nginx(root)
    trained: bytes | None = None
    found = []
    for number, day in enumerate(days):
        shutil.rmtree(root / "repodata", ignore_errors=True)
        shutil.copytree(day / "repodata", root / "repodata")
        if wrapped:
            content = zstd.decompress(next(root.glob("repodata/*.zst")).read_bytes())
            if dictionary and trained is None:
                trained = zchunk.dictionary(content, 110 << 10)
            cuts = [match.start() for match in re.finditer(b"<package type", content)]
            write_zck(folder / "new.zck", content, cuts, trained)
            data = (folder / "new.zck").read_bytes()
            zchunk.add_records(root, {"primary": data}, START + number * DAY)
        assert publish(root, LocalBackend(root / "tidings"), Options()).opaque == ()
        with servers.wire(site.url) as wire:
            result = fetch(wire.url, dest)
            assert tree(dest) == tree(root)
            found.append((wire.sent + wire.received, result.requests))
    for path in dest.glob("repodata/*.zck"):
        assert len(zchunk.accepted(path)) > 20_000_000
    return found[1:]


def test_a_day_with_zchunk_costs_little_more(
    days: list[Path], servers: Servers, tmp_path: Path
) -> None:
    plain = costs(days, servers, tmp_path / "plain", wrapped=False)
    for dictionary in (False, True):
        folder = tmp_path / f"wrapped-{dictionary}"
        more = costs(days, servers, folder, wrapped=True, dictionary=dictionary)
        for (bytes_plain, _), (bytes_more, requests) in zip(plain, more, strict=True):
            assert bytes_more <= bytes_plain + MOST
            assert requests == 2
