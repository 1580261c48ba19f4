"""Everything at once on one tree for minutes: publish, gc, check, repair, rsync, serve and sync.

    PYTHONPATH=tests python -m soak.soak --minutes 10 --clients 50 --seed 1 --report soak.json

A publish each second; gc without a grace time; 50 clients of mixed age and habit over
``tidings-mirror serve``, over nginx on the same tree, and over an rsync'd second tier; SIGKILL to
every kind of process at random; one byte flipped a minute. All processes are the real commands.
What each client has afterwards is compared with what was published (``truth``): byte for byte one
version, never an older one than before; or, after an error that the documents name, what it had.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from soak import figures, truth
from soak.figures import Flip, Tally
from soak.machine import Commands, Ran, Server, every, weigh
from soak.truth import Generator, Truth, Version, WrongError
from support.servers import HOST, NGINX, free_port
from support.system import find
from tidings_chunkstore import head
from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.pack import pack_digest
from tidings_chunkstore.places import PackName

REPO = "updates/x86_64"
_HEAD = "head.json"
_MIRROR = (sys.executable, "-m", "tidings_server.cli")
_CLIENT = (sys.executable, "-m", "tidings_client.cli")

#: How a client may end: done, network, verification, rollback. All else is a fault of the client.
CLIENT_CODES = {0, 5, 6, 7}
#: How an operator's command may end besides 0 while there is damage: told so, or, where the head
#: was hit under its hands, as if somebody else had written it.
DAMAGED, CHANGED = 8, 9
#: rsync's words for files that went while it read.
_RSYNC_VANISHED = {23, 24}

#: The share of runs that is killed, by kind.
_KILLED = {"publish": 0.05, "gc": 0.15, "check": 0.1, "repair": 0.2, "sync": 0.04, "rsync": 0.1}


@dataclass(frozen=True, slots=True)
class Settings:
    """A soak. Times in seconds."""

    seconds: float = 600.0
    clients: int = 50
    seed: int = 1
    packages: int = 150
    publish_every: float = 1.0
    gc_every: float = 5.0
    check_every: float = 5.0
    rsync_every: float = 5.0
    sample_every: float = 5.0
    flip_every: float = 60.0  #: 0: nothing is flipped
    kill_every: float = 10.0  #: one server; 0: no process is killed
    syncs: int = 4  #: client processes at a time
    pace: tuple[float, float] = (4.0, 120.0)  #: between two syncs of a client, by client
    keep: int = 30
    bound: float = 60.0  #: in which every client has success


@dataclass(slots=True)
class Client:
    """A client with a DEST of its own."""

    number: int
    dest: Path
    urls: tuple[str, ...]
    pace: float
    types: tuple[str, ...] | None
    route: str
    before: dict[str, str] = field(default_factory=dict)
    version: Version | None = None
    dirty: bool = False  #: it was killed: files of another version may lie beside
    failing: float | None = None  #: since when


class Soak:
    """One soak in a folder of its own. ``run`` once."""

    def __init__(self, folder: Path, settings: Settings, say: Callable[[str], None]) -> None:
        self.settings = settings
        self.folder = folder
        self.say = say
        self.root = folder / "origin"
        self.repo = self.root / REPO
        self.second = folder / "second"
        self.store = self.repo / "tidings"
        self.truth = Truth()
        self.tally = Tally()
        self.stop = threading.Event()
        self.generator = Generator(
            self.repo, folder / "next", self.truth, settings.packages, settings.seed
        )
        shares = _KILLED if settings.kill_every else {}
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(folder / "home"),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PYTHONUNBUFFERED": "1",
        }
        self.commands = Commands(settings.seed, environment, shares, self.tally.kills)
        self.servers = self._servers(environment)
        self.clients = [self._client(number) for number in range(settings.clients)]
        self._started = 0.0
        self._flip: Flip | None = None  # the one that is not mended
        self._flipped = b""
        self._healthy_since = 0.0  # monotonic; damage before it may still be seen by a check
        self._due: list[tuple[float, int]] = []
        self._lock = threading.Lock()

    # -- the cast --------------------------------------------------------------------------------

    def _servers(self, environment: dict[str, str]) -> dict[str, Server]:
        """``steady`` is never killed, so that its weight can be watched."""
        (self.folder / "home").mkdir(parents=True)
        (self.folder / "logs").mkdir()
        made = {}
        for name in ("serve", "steady"):
            port = free_port()
            options: list[str | Path] = ["--host", HOST, "--port", str(port), "--workers", "2"]
            options += ["--reconcile", "--memory", "8M", "--cache", self.folder / f"cache-{name}"]
            made[name] = self._server(name, port, [*_MIRROR, "serve", self.root, *options])
        program = find("nginx")
        assert program, "no nginx here: apt-get install nginx"
        for name, root in (("nginx", self.root), ("second", self.second)):
            port = free_port()
            where = self.folder / name if name == "nginx" else self.folder / "nginx-second"
            where.mkdir()
            root.mkdir(parents=True, exist_ok=True)
            user = "user root;" if os.geteuid() == 0 else ""
            text = f"root {root}; location ~ \\.json$ {{ add_header Cache-Control no-cache; }}"
            config = where / "nginx.conf"
            config.write_text(
                NGINX.format(user=user, folder=where, host=HOST, port=port, http="", server=text)
            )
            made[name] = self._server(
                name, port, [program, "-p", where, "-c", config, "-e", where / "error.log"]
            )
        for server in made.values():
            server.environment.update(environment)
        return made

    def _server(self, name: str, port: int, arguments: Sequence[str | Path]) -> Server:
        return Server(name, port, arguments, self.folder / "logs" / f"{name}.log")

    def _client(self, number: int) -> Client:
        dice = random.Random(f"{self.settings.seed}/client/{number}")
        names = ["serve", "steady", "nginx", "second"]
        first = names[number % 4]
        urls = [first]
        if dice.random() < 0.4:
            urls.append(dice.choice([name for name in names if name != first]))
        low, high = self.settings.pace
        return Client(
            number,
            self.folder / "clients" / f"{number:03d}",
            tuple(f"{self.servers[name].url}/{REPO}" for name in urls),
            low * (high / low) ** dice.random(),
            ("primary", "group") if number % 5 == 4 else None,
            dice.choice(["auto"] * 7 + ["delta", "chunks", "reconcile"]),
        )

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    # -- the run ---------------------------------------------------------------------------------

    def run(self) -> dict[str, object]:
        """All of it; the report."""
        wanted = self.settings
        self._started = time.monotonic()
        try:
            self._publish(spare=True)
            self._rsync()
            for server in self.servers.values():
                server.start()
            self._started = time.monotonic()
            jobs: list[tuple[float, Callable[[], object]]] = [
                (wanted.publish_every, self._publish),
                (wanted.gc_every, self._gc),
                (wanted.check_every, self._check),
                (wanted.rsync_every, self._rsync),
                (wanted.sample_every, self._sample),
            ]
            if wanted.kill_every:
                jobs.append((wanted.kill_every, self._kill_server))
            if wanted.flip_every:
                jobs.append((wanted.flip_every, self._flip_byte))
            threads = [self._thread(every, pace, self.stop, job) for pace, job in jobs]
            dice = random.Random(f"{wanted.seed}/start")
            self._due = [(dice.uniform(0, client.pace), client.number) for client in self.clients]
            threads += [self._thread(self._client_loop) for _ in range(wanted.syncs)]
            while self.now() < wanted.seconds and not self.stop.wait(1):
                if int(self.now()) % 10 == 0:
                    self.say(self._line())
            self.stop.set()
            for thread in threads:
                thread.join()
            self._finish()
            took = self.now()
        finally:
            self.stop.set()
            for server in self.servers.values():
                server.stop()
        self._read_logs()
        settings = {**asdict(wanted), "cores": os.cpu_count()}
        return figures.facts(self.tally, settings, took)

    def _thread(self, work: Callable[..., None], *arguments: object) -> threading.Thread:
        def guarded() -> None:
            try:
                work(*arguments)
            except Exception as error:  # the soak's own fault must not pass for silence
                self.tally.error(f"the soak itself: {type(error).__name__}: {error}")
                self.stop.set()
                raise

        thread = threading.Thread(target=guarded)
        thread.start()
        return thread

    def _line(self) -> str:
        counts = {kind: sum(codes.values()) for kind, codes in self.tally.codes.items()}
        flips = sum(1 for flip in self.tally.flips if flip.mended is not None)
        return (
            f"{self.now():4.0f} s  {counts}  {sum(self.tally.kills.values())} kills, "
            f"{flips} of {len(self.tally.flips)} flips mended, {len(self.tally.errors)} errors"
        )

    def _end(self, ran: Ran, allowed: Sequence[int] = ()) -> Ran:
        """Count a command's end; anything but 0 and *allowed* is an error."""
        code = "killed" if ran.code is None else str(ran.code)
        self.tally.ended(ran.kind, code, ran.seconds)
        if ran.hung:
            self.tally.error(f"{ran.kind} hung at {self.now():.0f} s")
        elif ran.code not in (None, 0, *allowed) or "Traceback" in ran.err:
            self.tally.error(
                f"{ran.kind} ended with {code} at {self.now():.0f} s: {ran.err[-1500:]}"
            )
        return ran

    def _excuses(self, ran: Ran) -> list[int]:
        """The codes for a run in whose time there was damage."""
        damaged = self._flip is not None or ran.started < self._healthy_since
        return [DAMAGED, CHANGED] if damaged else []

    # -- the operator ----------------------------------------------------------------------------

    def _publish(self, *, spare: bool = False) -> None:
        self.generator.next()
        keep = ["--keep", str(self.settings.keep)]
        arguments: list[str | Path] = [*_MIRROR, "publish", self.repo, *keep]
        ran = self.commands.run("publish", arguments, spare=spare)
        self._end(ran, self._excuses(ran))

    def _gc(self) -> None:
        keep = str(max(2, self.settings.keep * 2 // 3))
        ran = self.commands.run("gc", [*_MIRROR, "gc", self.repo, "--grace", "0", "--keep", keep])
        self._end(ran, self._excuses(ran))

    def _rsync(self) -> None:
        (self.second / REPO).mkdir(parents=True, exist_ok=True)
        program = find("rsync")
        assert program, "no rsync here: apt-get install rsync"
        ran = self.commands.run(
            "rsync",
            [program, "-a", "--delete-after", f"{self.repo}/", f"{self.second / REPO}/"],
        )
        self._end(ran, sorted(_RSYNC_VANISHED))

    def _check(self, *, spare: bool = False) -> bool:
        """Check, and repair what it finds; whether all is well."""
        ran = self.commands.run("check", [*_MIRROR, "check", "--json", self.repo], spare=spare)
        self._end(ran, self._excuses(ran))
        if ran.code not in (0, DAMAGED):
            return False  # killed
        report = _event(ran.out, "check")
        if report is None:
            self.tally.error(f"check gave no report: {ran.out[-500:]}")
            return False
        self._judge(ran, report)
        if not report["damaged"] and not report["damaged_packs"]:
            return True
        self._repair(spare=spare)
        return False

    def _judge(self, ran: Ran, report: Mapping[str, object]) -> None:
        """Whether this check, begun after the flip, saw it."""
        flip = self._flip
        if flip is None:
            return
        findings: list[dict[str, str]] = report["findings"]  # type: ignore[assignment]
        codes = tuple(
            dict.fromkeys(
                finding["code"]
                for finding in findings
                if finding["where"] == flip.name or flip.name == _HEAD
            )
        )
        if codes and flip.found is None:
            flip.found, flip.codes = self.now(), codes
        elif not findings and ran.started > self._started + flip.at:
            if self._still_flipped(flip):
                self.tally.error(f"check did not find the flip of {flip.to_json()}")
            self._mended(flip, "publish" if flip.name == _HEAD else "gc")

    def _still_flipped(self, flip: Flip) -> bool:
        try:
            return (self.store / flip.name).read_bytes() == self._flipped
        except FileNotFoundError:
            return False

    def _mended(self, flip: Flip, how: str) -> None:
        flip.mended, flip.how = self.now(), how
        self._healthy_since = time.monotonic()
        self._flip = None

    def _repair(self, *, spare: bool = False) -> None:
        flip = self._flip
        more: list[str | Path] = []
        if flip is None or flip.source == "mirror":
            more = ["--from", f"{self.servers['second'].url}/{REPO}"]
        arguments = [*_MIRROR, "repair", "--json", self.repo, *more]
        ran = self._end(self.commands.run("repair", arguments, spare=spare), [DAMAGED, CHANGED])
        if ran.code == 0 and flip is not None and not self._still_flipped_and_needed(flip):
            self._mended(flip, "repair")

    def _still_flipped_and_needed(self, flip: Flip) -> bool:
        """A damaged pack that repair went around may lie there until gc; then it is condemned."""
        if not self._still_flipped(flip):
            return False
        if flip.name == _HEAD:
            return True
        try:
            return flip.name not in (self.store / "gc.json").read_text()
        except FileNotFoundError:
            return True

    # -- what goes wrong -------------------------------------------------------------------------

    def _kill_server(self) -> None:
        """SIGKILL to one process of a server, and it is brought back."""
        count = sum(self.tally.kills[kind] for kind in ("worker", "serve", "nginx", "second"))
        dice = random.Random(f"{self.settings.seed}/server/{count}")
        kind = ("worker", "serve", "nginx", "second")[count % 4]
        name = "serve" if kind == "worker" else kind
        server = self.servers[name]
        if self.stop.wait(dice.uniform(0, self.settings.kill_every * 0.5)):
            return
        if kind == "worker":
            workers = server.workers()
            if not workers:
                self.tally.error(f"the server has no workers at {self.now():.0f} s")
                return
            os.kill(dice.choice(workers), 9)
        else:
            server.kill()
        self.tally.kills[kind] += 1
        if kind == "worker":
            return  # the supervisor's work
        try:
            self.tally.synced_again(kind, server.start())
        except TimeoutError as error:
            self.tally.error(str(error))

    def _flip_byte(self) -> None:
        """One byte of a pack or of the head, as a disk would: in place, no time of change."""
        dice = random.Random(f"{self.settings.seed}/flip/{len(self.tally.flips)}")
        if self.stop.wait(dice.uniform(0.1, 0.5) * self.settings.flip_every):
            return
        if self._flip is not None:
            return  # one at a time, so that each can be followed
        packs = sorted(path.name for path in self.store.glob("*.pack"))
        name = _HEAD if dice.random() < 0.25 else dice.choice(packs)
        path = self.store / name
        try:
            data = bytearray(path.read_bytes())
            stat = path.stat()
            offset = dice.randrange(len(data))
            if name == _HEAD:
                while not _means_another(data, offset):
                    offset = dice.randrange(len(data))
            data[offset] ^= 0x01
            flip = Flip(self.now(), name, offset, dice.choice(["mirror", "mirror", "published"]))
            self._flip, self._flipped = flip, bytes(data)
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(data[offset : offset + 1])
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        except FileNotFoundError:
            self._flip = None  # gc was quicker
            return
        self.tally.flips.append(flip)

    # -- clients ---------------------------------------------------------------------------------

    def _client_loop(self) -> None:
        while not self.stop.is_set():
            with self._lock:
                due = min(self._due, default=None)
                if due is not None and due[0] <= self.now():
                    self._due.remove(due)
                else:
                    due = None
            if due is None:
                self.stop.wait(0.05)
                continue
            client = self.clients[due[1]]
            ok = self._sync(client)
            # A failure is tried again soon, as a timer with a retry does.
            pause = client.pace if ok else 2.0
            with self._lock:
                self._due.append((self.now() + pause, client.number))

    def _sync(self, client: Client, *, spare: bool = False) -> bool:
        """One sync of *client*, judged; whether it ended with 0."""
        client.dest.mkdir(parents=True, exist_ok=True)
        arguments: list[str | Path] = [*_CLIENT, "sync", "--json", client.urls[0], client.dest]
        arguments += [word for url in client.urls[1:] for word in ("--mirror", url)]
        arguments += ["--route", client.route]
        if client.types:
            arguments += ["--types", ",".join(client.types)]
        newest = self.truth.newest().number
        ran = self._end(self.commands.run("sync", arguments, spare=spare), sorted(CLIENT_CODES))
        try:
            self._judge_client(client, ran)
        except WrongError as error:
            self.tally.error(
                f"client {client.number} ({client.route}, {client.urls}) after code {ran.code} at "
                f"{self.now():.0f} s: {error}; {ran.out[-800:]}"
            )
            shutil.rmtree(client.dest)
            client.before, client.version, client.dirty = {}, None, False
            return False
        if ran.code == 0:
            assert client.version is not None
            summary = _event(ran.out, "summary") or {}
            kind = "sync, changed" if summary.get("changed") else "sync, unchanged"
            reason = summary.get("fallback_reason")
            self.tally.synced(
                kind, ran.seconds, str(summary.get("route")), str(reason) if reason else None
            )
            if summary.get("changed"):
                self.tally.traffic(
                    int(str(summary["bytes_received"])), int(str(summary["bytes_full"]))
                )
            self.tally.lags.append(max(0, newest - client.version.number))
            if client.failing is not None:
                outage = time.monotonic() - client.failing
                self.tally.outages.append(outage)
                if outage > self.settings.bound:
                    self.tally.error(f"client {client.number} had no success for {outage:.0f} s")
                client.failing = None
            return True
        if ran.code is not None:
            event = _event(ran.out, "error") or {}
            self.tally.failure(_code(event))
            if client.failing is None:
                client.failing = ran.started
        return False

    def _judge_client(self, client: Client, ran: Ran) -> None:
        """Compare DEST with what it may be. Raises WrongError."""
        found = truth.hashes(client.dest)
        wanted = client.types
        if ran.code == 0:
            version = self.truth.version(found, wanted)
            if version is None:
                raise WrongError("done, and nothing is there")
            client.dirty = False
        elif ran.code is None or client.dirty:
            version, extra = self.truth.version_within(found, wanted)
            client.dirty = client.dirty or bool(extra)
            if ran.code is not None and version != client.version:
                raise WrongError("it failed and has changed DEST")
        else:
            if found != client.before:
                raise WrongError(f"it failed and has changed DEST: {sorted(found)}")
            version = client.version
        if client.version is not None and (
            version is None or version.number < client.version.number
        ):
            raise WrongError(f"from version {client.version.number} back to {version}")
        client.version, client.before = version, found

    # -- the end ---------------------------------------------------------------------------------

    def _finish(self) -> None:
        """No more harm: everything must come to the newest version, and to a sound store."""
        for _ in range(6):
            if self._check(spare=True) and self._flip is None:
                break
        else:
            self.tally.error("the store is not sound at the end")
        self.commands = replace(self.commands, shares={})
        self._publish()
        self._gc()
        self._rsync()
        if not self._check(spare=True):
            self.tally.error("the store is not sound after the last publish and gc")
        for server in self.servers.values():
            if not server.alive:
                server.start()
        for server in self.servers.values():
            strays = server.strays()
            if strays:
                self.tally.error(f"{server.name}: processes of killed parents live on: {strays}")
        newest = self.truth.newest()
        for client in self.clients:
            if not any(self._sync(client, spare=True) for _ in range(3)):
                self.tally.error(f"client {client.number} does not come to an end")
            elif client.version is None or client.version.number != newest.number:
                self.tally.error(f"client {client.number} is not at the last version")

    def _sample(self) -> None:
        for name in ("steady", "serve", "nginx"):
            server = self.servers[name]
            if server.alive:
                weight = weigh(server.pid, self.now())
                self.tally.weights.setdefault(name, []).append(weight)

    def _read_logs(self) -> None:
        for path in sorted((self.folder / "logs").glob("*.log")):
            text = path.read_text(errors="replace")
            if "Traceback" in text:
                at = text.index("Traceback")
                self.tally.error(f"{path.name}: {text[max(0, at - 300) : at + 2000]}")


def _means_another(data: bytes | bytearray, offset: int) -> bool:
    """Whether the head says something else, or nothing, with the lowest bit there turned."""
    turned = bytearray(data)
    turned[offset] ^= 0x01
    try:
        return head.decode(bytes(turned)) != head.decode(bytes(data))
    except FormatError:
        return True


def _event(out: str, kind: str) -> dict[str, object] | None:
    """The last event of a kind."""
    found = None
    for line in out.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # cut off by a kill
        if event.get("type") == kind:
            found = event
    return found


def _code(event: Mapping[str, object]) -> str:
    inner = event.get("error", event)
    return str(inner.get("code", "?")) if isinstance(inner, dict) else "?"


def pack_is_right(path: Path) -> bool:
    """Whether a pack's bytes are those of its name."""
    return pack_digest([path.read_bytes()]) == PackName.parse(path.name).id


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--flip-every", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--kill-every", type=float, default=10.0, metavar="SECONDS")
    parser.add_argument("--report", type=Path, metavar="FILE", help="JSON; a .md beside it")
    parser.add_argument("--folder", type=Path, help="work there and leave it")
    chosen = parser.parse_args(argv)
    settings = Settings(
        seconds=chosen.minutes * 60,
        clients=chosen.clients,
        seed=chosen.seed,
        flip_every=chosen.flip_every,
        kill_every=chosen.kill_every,
    )
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="tidings-soak-"))
    try:
        report = Soak(folder, settings, lambda text: print(text, file=sys.stderr, flush=True)).run()
    finally:
        if chosen.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    tables = figures.markdown(report)
    print(tables)
    if chosen.report:
        chosen.report.write_text(json.dumps(report, indent=1) + "\n")
        chosen.report.with_suffix(".md").write_text(tables)
    return 1 if report["errors"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
