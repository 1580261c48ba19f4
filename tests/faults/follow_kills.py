"""Looks at an upstream again and again, killed before its first, second, ... change of the disk.

Arguments: URL, a folder with ``mirror`` (a root that follows the URL) and ``state`` in it, the
origin's tree, and how many points to step over each time. Each time the root must be whole, old or
new, and the store too, and the next look must leave both as if nothing had happened. Started by
test_follow_killed; a process of its own, because it forks.
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib import import_module
from pathlib import Path

from kill_points import count_down, whole

from support.stores import assert_whole
from support.syncing import HASTY, Notes, tree
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.publisher import Options
from tidings_chunkstore.recipe import engines
from tidings_chunkstore.store import Store
from tidings_server.follow import Outcome, Target, load_state, look
from tidings_server.publish import Job
from tidings_server.settings import UpstreamSettings
from tidings_server.upstream import Source


def look_at(url: str, folder: Path) -> Outcome:
    """One look of the mirror in *folder*."""
    root = folder / "mirror"
    job = Job(root, root / "tidings", Options())
    target = Target(Source("r", UpstreamSettings(urls=(url,))), job, 3600)
    return look(target, folder / "state", Notes(), settings=HASTY)


def stored(root: Path) -> dict[str, bytes]:
    """What the store gives out, proven whole."""
    store = Store(LocalBackend(root / "tidings"))
    assert_whole(store)
    head = store.read_head()
    assert head is not None
    return {file.path: bytes(file.sha256) for file in head.files}


def main(url: str, folder: Path, origin: Path, step: int) -> int:
    # A killed process loses nothing that the kernel has: waiting for the disk proves nothing here.
    os.fsync = lambda _: None  # type: ignore[assignment]
    import_module("tidings_client.update")  # once, and not in every child
    engines()
    old, new = tree(folder / "first/mirror"), tree(origin)
    old_stored = stored(folder / "first/mirror")
    for points in range(1, 2000, step):
        killed = folder / f"killed{points}"
        shutil.copytree(folder / "first", killed)
        child = os.fork()
        if child == 0:
            code = 1
            count_down(points)
            try:
                code = int(look_at(url, killed).error is not None)
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        root = killed / "mirror"
        now = whole(root)
        if now not in (old, new):
            print(f"torn after {points} changes: {sorted(now)}")
            return 1
        in_store = stored(root)
        if in_store != old_stored and now != new:
            print(f"published before it was there, after {points} changes")
            return 1
        again = look_at(url, killed)
        if again.error or tree(root) != new or stored(root).keys() != new.keys():
            print(f"not healed after {points} changes: {again.error!r} {sorted(tree(root))}")
            return 1
        state = load_state(killed / "state", "r")
        if (state.failures, state.error, state.total_changes) not in ((0, None, 1), (0, None, 2)):
            print(f"a wrong state after {points} changes: {state}")
            return 1
        quiet = look_at(url, killed)
        if quiet.error or quiet.changed:
            print(f"not quiet after {points} changes: {quiet}")
            return 1
        shutil.rmtree(killed)
        if not os.WIFSIGNALED(status):
            if os.waitstatus_to_exitcode(status):
                print("the run that nobody killed failed")
                return 1
            print(points)
            return 0
    print("no end")
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])))
