"""``tidings sync --metalink URL DEST``: the real command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.metalinks import metalink
from support.repos import DAY, START, packages
from support.servers import Misbehaving
from support.syncing import Repository, tree


def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the last event and stderr."""
    command = [sys.executable, "-m", "tidings_client.cli", "sync", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


def test_a_metalink_names_the_mirror_and_proves_it(
    misbehaving: Misbehaving, tmp_path: Path
) -> None:
    origin = Repository(misbehaving.root / "b", made=packages(20))
    origin.root.mkdir()
    origin.write()
    old = (origin.root / "repodata/repomd.xml").read_bytes()
    shutil.copytree(origin.root, misbehaving.root / "a")
    origin.change(0.2)
    new = (origin.root / "repodata/repomd.xml").read_bytes()
    bases = [f"{misbehaving.url}/{name}" for name in "ab"]
    link = misbehaving.root / "metalink"
    link.write_bytes(metalink(new, bases, [(old, START)], timestamp=START + DAY))
    url, dest = f"{misbehaving.url}/metalink?repo=x&arch=y", tmp_path / "dest"

    code, plan, _ = run("--metalink", "--plan", url, str(dest))
    assert (code, plan["plan"], plan["changed"]) == (0, True, True)
    code, summary, _ = run("--metalink", url, str(dest))
    assert (code, summary["trust"], summary["url"]) == (0, "metalink", f"{bases[1]}/")
    assert tree(dest) == tree(origin.root)
    # The metalink's own request is counted, too.
    assert summary["bytes_received"] > summary["bytes_full"] + link.stat().st_size

    code, summary, _ = run(url, "--metalink", str(dest))  # options may stand between
    assert (code, summary["changed"]) == (0, False)

    link.write_bytes(metalink(b"<repomd/>", bases))
    code, error, _ = run("--metalink", url, str(dest))
    assert (code, error["error"]["code"]) == (6, "wrong-sha256")
    assert tree(dest) == tree(origin.root)

    link.write_bytes(metalink(new, ["http://10.0.0.1/u", "http://169.254.169.254/u"]))
    code, error, _ = run("--metalink", url, str(dest))
    assert (code, error["error"]["code"]) == (5, "address")

    link.write_bytes(b"<html/>")
    code, error, _ = run("--metalink", url, str(dest))
    assert (code, error["error"]["code"]) == (5, "bad-list")

    link.unlink()
    code, error, _ = run("--metalink", url, str(dest))
    assert code == 5
    assert error["error"]["message"].startswith(f"{url}: ")
    assert ": :" not in error["error"]["message"]


def test_what_does_not_go_with_it(tmp_path: Path) -> None:
    for more in (["--mirror", "http://127.0.0.1:9/"], ["--repomd-sha256", "a" * 64]):
        code, error, _ = run("--metalink", *more, "http://127.0.0.1:9/m", str(tmp_path / "d"))
        assert (code, error["error"]["code"]) == (2, "usage")
    assert not (tmp_path / "d").exists()
