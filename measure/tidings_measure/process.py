"""Programs as they are measured: found on PATH, run with their CPU, wall time and peak memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tidings_chunkstore.errors import LocalError

_LAUNCHER = Path(__file__).with_name("launch.py")
_MORE = ("/usr/sbin", "/sbin", "/usr/local/sbin")  # where servers are; not on everybody's PATH
_TAIL = 2000  # characters of a failed program's output that its error carries


class ProgramError(LocalError):
    """A program ended with an error; the text has the end of what it said."""

    code = "program"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a run of a program took."""

    cpu: float = 0.0  #: seconds, its own children included
    wall: float = 0.0  #: seconds
    peak: int = 0  #: bytes of memory at most, of the largest process

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.cpu + other.cpu, self.wall + other.wall, max(self.peak, other.peak))


def find(program: str) -> str | None:
    """The program's path, or None."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *_MORE))
    return shutil.which(program, path=path)


def run(
    command: Sequence[str | Path],
    folder: Path | None = None,
    *,
    stdin: Path | None = None,
    stdout: Path | None = None,
    accept: Sequence[int] = (0,),
    env: Mapping[str, str] | None = None,
) -> Usage:
    """Run *command* in *folder* and measure it.

    Args:
        stdin, stdout: files; without, nothing is read, and what it says is kept for errors.
        accept: exit codes that are no failure (diff says 1 for "they differ").
    Raises:
        ProgramError: it is not there, or ended with another exit code.
    """
    reader, writer = os.pipe()
    words = [str(word) for word in command]
    program = find(words[0]) or words[0]
    source = stdin.open("rb") if stdin else None
    sink = stdout.open("wb") if stdout else None
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", _LAUNCHER, str(writer), program, *words[1:]],
            cwd=folder,
            stdin=source or subprocess.DEVNULL,
            stdout=sink or subprocess.PIPE,
            stderr=subprocess.PIPE if sink else subprocess.STDOUT,
            pass_fds=(writer,),
            env={**os.environ, **env} if env else None,
            check=False,
        )
        os.close(writer)
        writer = -1
        facts = os.read(reader, 200).split()
    finally:
        os.close(reader)
        for end in (source, sink):
            if end:
                end.close()
        if writer >= 0:
            os.close(writer)
    if done.returncode not in accept or len(facts) != 3:
        said = (done.stderr if sink else done.stdout) or b""
        text = said.decode(errors="replace").strip()[-_TAIL:]
        raise ProgramError(f"{' '.join(words)} ended with {done.returncode}: {text}")
    return Usage(float(facts[0]), float(facts[1]), int(facts[2]))


def first_line(command: Sequence[str]) -> str:
    """The first line that a program says, for its version; empty when it says none."""
    program = find(command[0])
    if program is None:
        return ""
    done = subprocess.run(
        [program, *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    lines = done.stdout.decode(errors="replace").split("\n")
    return next((line.strip() for line in lines if line.strip()), "")
