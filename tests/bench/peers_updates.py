"""Tidings beside every peer that is installed, over one history: ``tidings-measure`` does the work.

    peers_updates.py [--history FOLDER] [--out FOLDER] [OPTION OF tidings-measure]...

Without ``--history`` it makes one with the project's own generator: nine publishes of 4,000
packages, one in a hundred changed each time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from support.repos import DAY, START, evolve, packages, rpm_md
from tidings_measure.cli import main as measure

PUBLISHES = 9
PACKAGES = 4000


def generated(folder: Path) -> Path:
    """A history in *folder*."""
    made = packages(PACKAGES)
    for number in range(PUBLISHES):
        rpm_md(folder / f"{number:03d}", made, codec="zst", timestamp=START + number * DAY)
        made = evolve(made, seed=number)
    return folder


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--history", type=Path, help="a folder of publishes")
    parser.add_argument("--out", type=Path, help="where results go, and stay")
    own, rest = parser.parse_known_args()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidings-peers-")))
        history = own.history or generated(scratch / "generated")
        return measure([str(history), "--out", str(own.out or scratch / "out"), *rest])


if __name__ == "__main__":
    sys.exit(main())
