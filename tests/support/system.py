"""Programs of the system that tests want: found, or the test skips and says what to install.

In CI (``CI`` is set) a missing program is a failure where ``scripts/system-packages`` could have
installed it, so that no test goes missing unseen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Where Debian puts servers; not on everybody's PATH.
_MORE = ("/usr/sbin", "/sbin", "/usr/local/sbin")


@cache
def packages() -> dict[str, str]:
    """Debian's package of each program, as ``scripts/system-packages`` has it."""
    done = subprocess.run(
        [ROOT / "scripts" / "system-packages", "--list"], capture_output=True, text=True, check=True
    )
    return dict(line.split() for line in done.stdout.splitlines())


def find(program: str) -> str | None:
    """The program's path, or None."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *_MORE))
    return shutil.which(program, path=path)


def require(program: str) -> str:
    """The program's path. Skips the test without it; fails it in CI where it could be there."""
    found = find(program)
    if found is not None:
        return found
    package = packages().get(program)
    how = f"apt-get install {package}" if package else "it is in no package that the tests install"
    reason = f"no {program} here: {how}"
    if package and os.environ.get("CI") and os.geteuid() == 0 and shutil.which("apt-get"):
        pytest.fail(reason)
    pytest.skip(reason)
