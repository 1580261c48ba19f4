"""Publishes a changed repository again and again, stopped before the first, second, ... write.

Arguments: a folder with ``repo`` in it, "kill" or "full". Each time the store must be whole, old or
new, and the next publish must leave it as if nothing had happened. Started by
test_publish_faults; a process of its own, because it forks.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.stores import assert_whole
from tidings_chunkstore import publisher
from tidings_chunkstore.backends import LocalBackend
from tidings_chunkstore.errors import LocalError, TidingsError
from tidings_chunkstore.store import Store

_MOST = 200  # writes in a publish; there are about 20
_LOCAL, _OTHER = 10, 11


class Stopper:
    """Counts writes down; then it kills the process, or lets this and all later ones fail."""

    def __init__(self, points: int, how: str) -> None:
        self.left = points
        self.how = how

    def due(self) -> bool:
        self.left -= 1
        return self.left <= 0

    def stop(self) -> None:
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TornWriter(io.BufferedWriter):
    """Writes half of the fatal piece."""

    stopper: Stopper

    def write(self, data: Any, /) -> int:
        if self.stopper.due():
            super().write(bytes(data)[: len(data) // 2])
            super().flush()
            self.stopper.stop()
        return super().write(data)


def arm(stopper: Stopper) -> None:
    """From now on this process's writes are counted."""
    names = ["rename", "fsync", "mkdir"]
    if stopper.how == "kill":
        names += ["unlink"]  # a full disk still lets go of files

    def wrap(name: str) -> None:
        inner: Callable[..., Any] = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            if stopper.due():
                stopper.stop()
            return inner(*args, **options)

        setattr(os, name, call)

    for name in names:
        wrap(name)

    def fdopen(descriptor: int, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if mode != "wb":
            return io.open(descriptor, mode, *rest, **options)  # noqa: UP020 (os.fdopen is ours)
        writer = TornWriter(io.FileIO(descriptor, "wb"))
        writer.stopper = stopper
        return writer

    os.fdopen = fdopen  # type: ignore[assignment]


def publish(repo: Path) -> publisher.Report:
    return publisher.publish(repo, LocalBackend(repo / "tidings"))


def child(repo: Path, points: int, how: str) -> int:
    """Publish in a child that stops at write number *points*; its wait status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = _OTHER
    try:
        arm(Stopper(points, how))
        publish(repo)
        code = 0
    except LocalError as error:
        code = _LOCAL if error.code == "disk-full" else _OTHER
    except TidingsError:
        code = _OTHER
    finally:
        os._exit(code)


def served(repo: Path) -> dict[str, bytes]:
    """What a mirror of the store gives out, proven whole; nothing where nothing is published."""
    store = Store(LocalBackend(repo / "tidings"))
    if not (repo / "tidings" / "head.json").exists():
        return {}
    assert_whole(store)
    head = store.read_head()
    assert head is not None
    return {file.path: bytes(file.sha256) for file in head.files}


def leftovers(repo: Path) -> set[str]:
    """What no head names."""
    head = Store(LocalBackend(repo / "tidings")).read_head()
    assert head is not None
    named = {str(state.pack) for state in head.states} | {"head.json"}
    return set(os.listdir(repo / "tidings")) - named


def main(folder: Path, how: str) -> int:
    """All points in turn; prints how many there were."""
    origin = folder / "repo"
    shutil.copytree(origin, folder / "good")
    publish(folder / "good")
    old, new = served(origin), served(folder / "good")
    assert old != new
    for points in range(1, _MOST):
        repo = folder / f"stopped{points}"
        shutil.copytree(origin, repo)
        status = child(repo, points, how)
        now = served(repo)
        assert now in (old, new), f"torn after {points} writes"
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            assert now == new
            print(points - 1)
            return 0
        if how == "full":
            assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == _LOCAL, status
            half = (
                [name for name in os.listdir(repo / "tidings") if name.startswith(".tmp-")]
                if (repo / "tidings").exists()
                else []
            )
            assert not half, half
        headless = not (repo / "tidings" / "head.json").exists()
        report = publish(repo)
        # A pack that lay there without a head is taken up: nothing is made again.
        assert report.changed == (now == old) or headless, points
        assert served(repo) == new, f"not healed after {points} writes"
        assert not leftovers(repo), (points, leftovers(repo))
        shutil.rmtree(repo)
    raise AssertionError("no end")


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2]))
