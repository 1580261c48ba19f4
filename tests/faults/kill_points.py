"""Runs one sync again and again, killed before its first, second, ... change of the disk.

Arguments: URL, a folder with ``dest`` in it, the published tree, the route. Started by
test_sync_kills; a process of its own, because it forks.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from support.syncing import fetch, left_over, tree
from tidings_chunkstore.recipe import engines
from tidings_client import assemble, local


def count_down(points: int) -> None:
    """SIGKILL to this very process before change number *points*."""
    left = [points]

    def wrap(module: Any, name: str) -> None:
        inner: Callable[..., Any] = getattr(module, name)

        def call(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*args, **options)

        setattr(module, name, call)

    for name in ("rename", "fsync", "unlink", "mkdir", "rmdir"):
        wrap(os, name)
    for module in (local, assemble):
        wrap(module, "write_all")


def whole(dest: Path) -> dict[str, bytes]:
    """What DEST publishes: the main file and the files it names, which must be there and right."""
    from tidings_chunkstore.layout import read_tree

    found = read_tree(dest)
    names = [f.file.path for f in found.files] + [f.file.path for f in found.mains]
    return {name: (dest / name).read_bytes() for name in names}


def main(url: str, folder: Path, published: Path, route: str) -> int:
    # A killed process loses nothing that the kernel has: waiting for the disk proves nothing here.
    os.fsync = lambda _: None  # type: ignore[assignment]
    old, new = tree(folder / "dest"), tree(published)
    import_module("tidings_client.update")  # once, and not in every child
    engines()
    seen_new = False
    for points in range(1, 1000):
        dest = folder / f"killed{points}"
        shutil.copytree(folder / "dest", dest)
        child = os.fork()
        if child == 0:
            count_down(points)
            try:
                fetch(url, dest, route=route)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        now = whole(dest)
        if now not in (old, new):
            print(f"torn after {points} changes: {sorted(now)}")
            return 1
        seen_new = seen_new or now == new
        if not os.WIFSIGNALED(status):
            break
        again = os.fork()
        if again == 0:
            code = 1
            try:
                fetch(url, dest, route=route)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(again, 0)
        if os.waitstatus_to_exitcode(status) or tree(dest) != new or left_over(dest):
            print(f"not healed after {points} changes: {sorted(tree(dest))} {left_over(dest)}")
            return 1
        shutil.rmtree(dest)
    else:
        print("no end")
        return 1
    if tree(dest) != new or not seen_new:
        print("the run that nobody killed is not right")
        return 1
    print(points)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]))
