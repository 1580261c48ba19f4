"""librepo with zchunk on loads a rebuilt cache, and asks the network for repomd.xml only.

Debian builds its librepo without zchunk, so the test builds that very source with it: some
minutes and a download. ``make test-librepo`` runs it; nothing else does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support import zchunk
from support.repos import DAY, START, evolve, packages, rpm_md
from support.servers import Misbehaving
from support.syncing import fetch, tree
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.publisher import Options, publish

HERE = Path(__file__).parent
TYPES = ("primary", "filelists", "other")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.tools,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not os.environ.get("TIDINGS_LIBREPO"),
        reason="builds librepo from Debian's source: make test-librepo",
    ),
]


@pytest.fixture(scope="session")
def load_cache() -> Path:
    """The program, built in the folder that TIDINGS_LIBREPO names, or there already."""
    folder = Path(os.environ["TIDINGS_LIBREPO"]).resolve()
    done = subprocess.run([HERE / "build-librepo", folder], check=False)
    log = folder / "build.log"
    assert done.returncode == 0, log.read_text(errors="replace")[-4000:]
    return folder / "load_cache"


@pytest.mark.parametrize("writer", ["zck", "mergerepo_c"])
def test_a_rebuilt_cache(
    writer: str, load_cache: Path, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    root, cache, scratch = misbehaving.root, tmp_path / "cache", tmp_path / "scratch"
    scratch.mkdir()
    made = packages(300)
    for step in range(3):
        made = evolve(made, step)
        if writer == "zck":
            zchunk.by_zck(root, made, timestamp=START + step * DAY)
        else:
            rpm_md(tmp_path / "a", made, timestamp=START + step * DAY)
            zchunk.by_mergerepo(root, [tmp_path / "a"])
        publish(root, LocalBackend(root / "tidings"), Options())
        result = fetch(misbehaving.url, cache, types=TYPES, zchunk=True)
        assert step == 0 or "full" not in {f.route for f in result.files}
    shutil.rmtree(cache / ".tidings")
    before = tree(cache)
    misbehaving.heal()

    words = [str(word) for word in (load_cache, cache, misbehaving.url, scratch, *TYPES)]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps: dict[str, dict[str, str]] = {}
    for line in done.stdout.splitlines():
        step_name, kind, path = line.split(" ", 2)
        steps.setdefault(step_name, {})[kind] = path
    wanted = {f"{kind}_zck" for kind in ("primary", "filelists", "other")}
    assert wanted <= steps["local"].keys()
    assert all(steps["local"][kind].endswith(".zck") for kind in wanted)
    assert steps["local"].keys() - {"repomd"} == wanted
    assert steps["remote"] == steps["local"]
    assert (scratch / "repodata/repomd.xml").read_bytes() == before["repodata/repomd.xml"]
    asked = [seen.path for seen in misbehaving.seen]
    assert asked == ["/repodata/repomd.xml"]
    assert tree(cache) == before


def test_a_cache_with_one_byte_wrong_is_noticed(
    load_cache: Path, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    """What the test above proves with: librepo looks into every chunk of the cache."""
    root, cache, scratch = misbehaving.root, tmp_path / "cache", tmp_path / "scratch"
    scratch.mkdir()
    zchunk.by_zck(root, packages(300))
    publish(root, LocalBackend(root / "tidings"), Options())
    fetch(misbehaving.url, cache, types=("primary",), zchunk=True)
    victim = next(cache.glob("repodata/*.zck"))
    data = bytearray(victim.read_bytes())
    data[-100] ^= 1
    victim.write_bytes(data)
    words = [str(word) for word in (load_cache, cache, misbehaving.url, scratch, "primary")]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Checksum error" in done.stderr
    assert "zchunk checksums" in done.stderr
