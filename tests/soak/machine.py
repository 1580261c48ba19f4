"""Processes of the soak: short ones that may be killed, servers that come back, their weight."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.servers import HOST

_PATIENCE = 120.0  # seconds after which a short command hangs
_RISE = 30.0  # seconds in which a server must listen again
_LOG = 65536  # bytes of a message that are kept


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that has ended. *code* is None where it was killed; times are monotonic seconds."""

    kind: str
    code: int | None
    out: str
    err: str
    started: float
    ended: float
    hung: bool = False

    @property
    def seconds(self) -> float:
        """How long it ran."""
        return self.ended - self.started


@dataclass(slots=True)
class Commands:
    """Runs commands, and kills some: which ones and how late, *seed* says."""

    seed: int
    environment: Mapping[str, str]
    shares: Mapping[str, float]  #: of the runs that are killed, by kind
    kills: Counter[str] = field(default_factory=Counter)
    _count: Counter[str] = field(default_factory=Counter)
    _typical: dict[str, float] = field(default_factory=dict)  #: seconds, by kind
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, kind: str, arguments: Sequence[str | Path], *, spare: bool = False) -> Ran:
        """Run it to its end, or to its kill; *spare*: it is not killed."""
        with self._lock:
            number = self._count[kind]
            self._count[kind] += 1
            typical = self._typical.get(kind, 0.5)
        dice = random.Random(f"{self.seed}/{kind}/{number}")
        doomed = dice.random() < self.shares.get(kind, 0.0) and not spare
        patience = dice.uniform(0.0, 1.1) * typical if doomed else _PATIENCE
        started = time.monotonic()
        process = subprocess.Popen(
            [str(argument) for argument in arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(self.environment),
            text=True,
            errors="replace",
        )
        killed = hung = False
        try:
            out, err = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            killed, hung = doomed, not doomed
        ended = time.monotonic()
        # It may have ended by itself in the last moment.
        killed = killed and process.returncode == -signal.SIGKILL
        with self._lock:
            if killed:
                self.kills[kind] += 1
            else:
                self._typical[kind] = 0.8 * typical + 0.2 * (ended - started)
        code = None if killed else process.returncode
        return Ran(kind, code, out, err[-_LOG:], started, ended, hung)


class Server:
    """A server on a fixed port that can be killed and comes back, as under a service manager."""

    def __init__(self, name: str, port: int, arguments: Sequence[str | Path], log: Path) -> None:
        self.name = name
        self.port = port
        self.log = log
        self._arguments = [str(argument) for argument in arguments]
        self.environment: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._groups: list[int] = []

    @property
    def url(self) -> str:
        """Base URL without a slash at the end."""
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """Of the process that was started. It must be up."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether that process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> float:
        """Start it, again and again until it listens; seconds that took. Raises TimeoutError."""
        started = time.monotonic()
        while time.monotonic() < started + _RISE:
            with self.log.open("ab") as sink:
                self._process = subprocess.Popen(
                    self._arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                    start_new_session=True,
                )
            self._groups.append(self._process.pid)
            while self._process.poll() is None and time.monotonic() < started + _RISE:
                if self._answers():
                    return time.monotonic() - started
                time.sleep(0.05)
            time.sleep(0.2)
        raise TimeoutError(f"{self.name} does not come back; see {self.log}")

    def _answers(self) -> bool:
        """Whether it answers a request; a socket alone may be that of a dead one's children."""
        request = f"HEAD / HTTP/1.0\r\nHost: {HOST}\r\n\r\n".encode()
        with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), 1) as sock:
            sock.settimeout(2)
            sock.sendall(request)
            return sock.recv(5) == b"HTTP/"
        return False

    def kill(self) -> None:
        """SIGKILL to that process alone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def workers(self) -> list[int]:
        """Its worker processes."""
        return [pid for pid in children(self.pid) if "spawn_main" in command_line(pid)]

    def stop(self) -> None:
        """End it and all that it ever started."""
        if self._process is not None and self.alive:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(12)
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def strays(self) -> list[int]:
        """Processes of earlier lives that are still there."""
        own = {self.pid, *tree(self.pid)}
        return [pid for pid in pids() if group_of(pid) in self._groups and pid not in own]


# --- /proc ---------------------------------------------------------------------------------------


def pids() -> list[int]:
    """All processes."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def group_of(pid: int) -> int:
    """The process group; 0 where the process is gone."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def children(pid: int) -> list[int]:
    """Child processes, of all threads; none where the process is gone."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def tree(pid: int) -> Iterator[int]:
    """All descendants."""
    for child in children(pid):
        yield child
        yield from tree(child)


def command_line(pid: int) -> str:
    """Its arguments; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Weight:
    """What a server and its children hold at one time. *at*: seconds since the soak's start."""

    at: float
    rss: int  #: bytes, shared ones counted for each process
    descriptors: int
    processes: int


def weigh(pid: int, at: float) -> Weight:
    """Now. Processes that end meanwhile do not count."""
    rss = descriptors = count = 0
    page = os.sysconf("SC_PAGESIZE")
    for each in (pid, *tree(pid)):
        with contextlib.suppress(OSError):
            resident = int(Path(f"/proc/{each}/statm").read_text().split()[1]) * page
            descriptors += len(os.listdir(f"/proc/{each}/fd"))
            rss += resident
            count += 1
    return Weight(at, rss, descriptors, count)


def every(seconds: float, stop: threading.Event, work: Callable[[], object]) -> None:
    """Call *work* at this pace until *stop*; what is late is not made up for."""
    due = time.monotonic()
    while not stop.wait(max(0.0, due - time.monotonic())):
        work()
        due = max(due + seconds, time.monotonic())
