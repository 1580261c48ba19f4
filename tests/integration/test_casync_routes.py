"""casync and desync, as Debian has them, fetch from a real server; what it answers to the rest."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from support.repos import DAY, START, evolve, packages, rpm_md
from support.servers import Command, Servers
from support.system import require
from tidings_chunkstore import publisher
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.store import Store
from tidings_chunkstore.zstd import zstd
from tidings_server.casync import CasyncId, CasyncIndex

IMMUTABLE = "public, max-age=31536000, immutable, no-transform"
ROOT = Path(__file__).parents[2]
REPO = "fedora/43"
BASE = f"/{REPO}/tidings/casync"
OPENERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": zstd.decompress,
}
# Each real history and the stride with which the quick tests go through it; the slow ones take all.
SHORT = {"trivy-el7": 50, "tur-aarch64": 50}
LONG = {"trivy-el7": 1, "tur-aarch64": 1, "rpmsphere-noarch": 1}


def opened(files: dict[str, bytes]) -> dict[str, bytes]:
    """What compressed files open to, by their paths without the suffix."""
    found = {}
    for path, data in files.items():
        stem, suffix = os.path.splitext(path)
        if suffix in OPENERS:
            found[stem] = OPENERS[suffix](data)
    return found


def read_tree(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] != "tidings"
    }


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@dataclass
class Watched:
    """A server, and which chunks it was asked for since one looked last."""

    server: Command
    client: httpx.Client
    seen: int = 0  # bytes of the log
    marks: int = 0

    def requests(self) -> list[dict[str, object]]:
        # A line is written when the answer is sent. Lines come in the order of the answers, so all
        # of before are there once the one of a last request is.
        self.marks += 1
        mark = f"/mark/{self.marks}"
        self.client.get(self.server.url + mark)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            with self.server.log.open("rb") as log:
                log.seek(self.seen)
                text = log.read()
            lines = text[: text.rfind(b"\n") + 1].splitlines()
            found = [json.loads(line) for line in lines if line.startswith(b"{")]
            if any(line.get("path") == mark for line in found):
                self.seen += text.rfind(b"\n") + 1
                return [line for line in found if "path" in line and line["path"] != mark]
            time.sleep(0.01)
        raise AssertionError("the access log lacks a request")

    def chunks(self) -> list[CasyncId]:
        """Those asked for, each as often as it was; all were answered."""
        found = []
        for line in self.requests():
            path = str(line["path"])
            assert line["status"] == 200, line
            if match := re.search(r"/(?:store|default)\.castr/(.*)", path):
                found.append(CasyncId.from_name(match[1]))
        return found


def ids(index: bytes) -> set[CasyncId]:
    known = CasyncIndex.from_caibx(index)
    return {known.chunk(number)[0] for number in range(len(known))}


# -- the real programs, over real histories --------------------------------------------------------


@dataclass(frozen=True)
class Version:
    stem: str  # the snapshot's, as addresses have it
    published: dict[str, bytes]
    opened: dict[str, bytes]


def publish_history(source: Path, stride: int, tree: Path) -> list[Version]:
    """Publish every so many versions of a history; what each had, oldest first."""
    tree.mkdir(parents=True)
    found = []
    for version in sorted(path for path in source.iterdir() if path.is_dir())[::stride]:
        for entry in tree.iterdir():
            if entry.name != "tidings":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        shutil.copytree(version, tree, dirs_exist_ok=True, copy_function=shutil.copyfile)
        for path in (tree, *tree.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        options = publisher.Options(keep=100)
        report = publisher.publish(tree, LocalBackend(tree / "tidings"), options)
        assert report.pack is not None
        files = read_tree(tree)
        found.append(Version(str(report.pack).removesuffix(".pack"), files, opened(files)))
    return found


@dataclass
class Bench:
    """Where one program extracts, from one server."""

    folder: Path
    base: str
    watched: Watched

    def old(self, data: bytes) -> Path:
        path = self.folder / "old"
        path.write_bytes(data)
        return path

    def result(self) -> Path:
        path = self.folder / "result"
        path.unlink(missing_ok=True)
        return path


def casync_all(bench: Bench, versions: Sequence[Version]) -> None:
    """Each file of each version, from nothing and from the version before, bit for bit."""
    casync = require("casync")
    before: dict[str, bytes] = {}
    for version in versions:
        for name, data in version.opened.items():
            prefix = f"{bench.base}/@{version.stem}/4k"
            index = bench.watched.client.get(f"{prefix}/{name}.caibx").content
            own, result = bench.old(data), bench.result()
            sizes = f"--chunk-size={1024}:{4096}:{16384}"
            local: list[str | Path] = ["--store", bench.folder / "local.castr"]
            run(casync, "make", *local, sizes, bench.folder / "own.caibx", own)
            assert index == (bench.folder / "own.caibx").read_bytes(), "not as casync makes it"
            key = re.sub(r"[0-9a-f]{32,}-", "", name)
            seed, have = before.get(key, b""), set()
            if seed:
                run(casync, "make", *local, sizes, bench.folder / "own.caibx", bench.old(seed))
                have = ids((bench.folder / "own.caibx").read_bytes())
            bench.watched.requests()
            more: list[str | Path] = ["--seed", bench.old(seed)] if seed else []
            run(casync, "extract", *more, f"{prefix}/{name}.caibx", result)
            assert result.read_bytes() == data, (version.stem, name)
            asked = bench.watched.chunks()
            assert len(asked) == len(set(asked))
            assert set(asked) == ids(index) - have, (version.stem, name)
            before[key] = data
        for name, data in version.published.items():
            result = bench.result()
            run(casync, "extract", f"{bench.base}/@{version.stem}/{name}.caibx", result)
            assert result.read_bytes() == data, (version.stem, name)


def desync_all(bench: Bench, versions: Sequence[Version]) -> None:
    """The same with desync: with a cache that lasts, with a seed, and in place."""
    desync = require("desync")
    cache = bench.folder / "cache"
    cache.mkdir()
    before: dict[str, bytes] = {}
    cached: set[CasyncId] = set()
    for version in versions:
        for name, data in {**version.published, **version.opened}.items():
            sizes = "4k-desync" if name in version.opened else "64k-desync"
            prefix = f"{bench.base}/@{version.stem}/{sizes}"
            index, store = f"{prefix}/{name}.caibx", f"{prefix}/store.castr"
            wanted = ids(bench.watched.client.get(index).content)
            bench.watched.requests()
            result = bench.result()
            run(desync, "extract", "-c", cache, "-s", store, index, result)
            assert result.read_bytes() == data, (version.stem, name)
            asked = set(bench.watched.chunks())
            assert asked == wanted - cached - NULL, (version.stem, name)
            cached |= asked
            key = re.sub(r"[0-9a-f]{32,}-", "", name)
            if name in version.opened and before.get(key):
                old, made = bench.old(before[key]), bench.folder / "seed.caibx"
                run(desync, "make", "-m", "1:4:16", made, old)
                result = bench.result()
                seed = f"{made}:{old}"
                run(desync, "extract", "--seed", seed, "-s", store, index, result)
                assert result.read_bytes() == data, (version.stem, name)
                missing = wanted - ids(made.read_bytes()) - NULL
                assert set(bench.watched.chunks()) == missing, (version.stem, name)
            before[key] = data


#: desync makes the chunk of zeros of the greatest size itself.
NULL = {CasyncId.of(bytes(size)) for size in (16384, 262144)}


@pytest.fixture(scope="module")
def history(
    request: pytest.FixtureRequest, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Bench, list[Version]]]:
    name, stride = request.param
    folder = tmp_path_factory.mktemp(name)
    versions = publish_history(shared_data / name, stride, folder / "www" / REPO)
    with Servers(folder / "servers") as servers, httpx.Client(timeout=30) as client:
        server = servers.mirror(folder / "www", "--access-log", "--cache", folder / "kept")
        yield Bench(folder, server.url + BASE, Watched(server, client)), versions


@pytest.mark.parametrize("history", SHORT.items(), indirect=True, ids=list(SHORT))
@pytest.mark.parametrize("fetch", [casync_all, desync_all], ids=["casync", "desync"])
def test_a_real_history_comes_back(
    history: tuple[Bench, list[Version]], fetch: Callable[[Bench, list[Version]], None]
) -> None:
    fetch(*history)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("history", LONG.items(), indirect=True, ids=list(LONG))
@pytest.mark.parametrize("fetch", [casync_all, desync_all], ids=["casync", "desync"])
def test_a_real_history_comes_back_whole(
    history: tuple[Bench, list[Version]], fetch: Callable[[Bench, list[Version]], None]
) -> None:
    fetch(*history)


# -- a made repository -----------------------------------------------------------------------------


@dataclass
class Mirror:
    """A published repository that goes on, and a server over it."""

    root: Path
    servers: Servers
    made: int = 0

    @property
    def tree(self) -> Path:
        return self.root / REPO

    def publish(self) -> dict[str, bytes]:
        listed = packages(400)
        for day in range(self.made):
            listed = evolve(listed, seed=day + 1)
        types = ("primary", "filelists")
        rpm_md(self.tree, listed, types=types, timestamp=START + self.made * DAY)
        publisher.publish(self.tree, LocalBackend(self.tree / "tidings"))
        self.made += 1
        return read_tree(self.tree)

    def stem(self, place: int = -1) -> str:
        head = Store(LocalBackend(self.tree / "tidings")).read_head()
        assert head is not None
        return str(head.states[place].pack).removesuffix(".pack")

    def serve(self, *options: str | Path) -> tuple[Command, httpx.Client]:
        cache = self.root.parent / f"cache-{len(list(self.root.parent.iterdir()))}"
        cache.mkdir()
        server = self.servers.mirror(self.root, "--cache", cache, "--access-log", *options)
        return server, httpx.Client(base_url=server.url + BASE, timeout=30)


@pytest.fixture
def mirror(tmp_path: Path, servers: Servers) -> Mirror:
    (tmp_path / "www").mkdir()
    made = Mirror(tmp_path / "www", servers)
    made.publish()
    return made


def primary(files: dict[str, bytes]) -> tuple[str, bytes]:
    """The primary's path without suffix, and what it opens to."""
    return next((n, d) for n, d in opened(files).items() if n.endswith("primary.xml"))


def first_chunk(index: bytes) -> tuple[CasyncId, int, int]:
    return CasyncIndex.from_caibx(index).chunk(0)


def test_addresses_and_their_caching(mirror: Mirror) -> None:
    before = read_tree(mirror.tree)
    server, client = mirror.serve()
    name, data = primary(before)
    index = client.get(f"/{name}.caibx")
    assert index.headers["cache-control"] == IMMUTABLE
    assert index.headers["content-length"] == str(len(index.content))
    assert CasyncIndex.from_caibx(index.content).size == len(data)
    stem = mirror.stem()
    same = {
        f"/@{stem}/{name}.caibx": IMMUTABLE,
        f"/@{stem}/primary.xml.caibx": IMMUTABLE,
        f"/@1/{name}.caibx": IMMUTABLE,
        "/@1/primary.xml.caibx": "no-cache, no-transform",  # a store made anew counts from 1, too
        "/primary.xml.caibx": "no-cache, no-transform",
        f"/64k/{name}.caibx": IMMUTABLE,
    }
    for path, caching in same.items():
        answer = client.get(path)
        assert answer.content == index.content, path
        assert answer.headers["cache-control"] == caching, path
    assert client.get("/repodata/repomd.xml.caibx").headers["cache-control"].startswith("no-cache")

    head = client.head(f"/{name}.caibx")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(index.content))
    asked = {"if-none-match": index.headers["etag"]}
    assert client.get("/primary.xml.caibx", headers=asked).status_code == 304

    identity, offset, length = first_chunk(index.content)
    for store in ("store.castr", "default.castr", "repodata/default.castr", "64k/store.castr"):
        chunk = client.get(f"/{store}/{identity.name}")
        assert chunk.status_code == 200, store
        assert chunk.headers["cache-control"] == IMMUTABLE
        assert zstd.decompress(chunk.content) == data[offset : offset + length]
    assert client.head(f"/store.castr/{identity.name}").status_code == 200

    # The next publish: the alias moves on, what was promised for ever does not.
    later_name, later = primary(mirror.publish())
    moved = client.get("/primary.xml.caibx", headers=asked)
    assert moved.status_code == 200
    assert CasyncIndex.from_caibx(moved.content).size == len(later)
    assert client.get(f"/{later_name}.caibx").content == moved.content
    assert client.get(f"/@{stem}/{name}.caibx").content == index.content
    assert client.get(f"/{name}.caibx").status_code == 404
    # A client that began before the publish finds its chunks at the same address.
    assert client.get(f"/store.castr/{identity.name}").status_code == 200
    assert client.get(f"/@{stem}/store.castr/{identity.name}").status_code == 200
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


GARBAGE = {
    "/": 404,
    "/x": 404,
    "/nothing.caibx": 404,
    "/.caibx": 404,
    "/repodata/.caibx": 404,
    "/../repodata/repomd.xml.caibx": 404,
    "/%2e%2e/%2e%2e/repodata/repomd.xml.caibx": 404,
    "/%2fetc%2fpasswd.caibx": 404,
    "/repodata%5crepomd.xml.caibx": 404,
    "/%00.caibx": 404,
    "/%ff.caibx": 404,
    "/" + "x" * 3000 + ".caibx": 404,
    "/tidings/head.json.caibx": 404,
    "/@/primary.xml.caibx": 404,
    "/@99/primary.xml.caibx": 404,
    "/@-1/primary.xml.caibx": 404,
    "/@000001-0000000000000000/primary.xml.caibx": 404,
    "/@1": 404,
    "/@1/@1/primary.xml.caibx": 404,
    "/store.castr": 404,
    "/store.castr/": 404,
    "/store.castr/0000": 404,
    "/store.castr/0000/" + "0" * 64 + ".cacnk": 404,
    "/@99/store.castr/0000/" + "0" * 64 + ".cacnk": 404,
    "/store.castr/0001/" + "0" * 64 + ".cacnk": 404,
    "/store.castr/0000/" + "0" * 63 + ".cacnk": 404,
    "/store.castr/zzzz/" + "z" * 64 + ".cacnk": 404,
    "/store.castr/0000/" + "0" * 64: 404,
    "/0k/primary.xml.caibx": 422,
    "/5k/primary.xml.caibx": 422,
    "/512k/primary.xml.caibx": 422,
    "/999999999k/primary.xml.caibx": 422,
    "/9999999999k/primary.xml.caibx": 404,  # no size, but a folder's name
    "/-4k/primary.xml.caibx": 404,
    "/4k-other/primary.xml.caibx": 404,
    "/4K/primary.xml.caibx": 404,
    "/5k/store.castr/0000/" + "0" * 64 + ".cacnk": 422,
}


def test_garbage_is_refused(mirror: Mirror) -> None:
    server, client = mirror.serve()
    quiet = (require("curl"), "-s", "-o", "/dev/null", "-w", "%{http_code}")
    for path, status in GARBAGE.items():
        said = run(*quiet, "--path-as-is", f"{server.url}{BASE}{path}")
        assert said == str(status), path[:100]
    elsewhere = f"{server.url}/nowhere/tidings/casync/primary.xml.caibx"
    assert httpx.get(elsewhere).status_code == 404
    assert httpx.get(f"{server.url}/tidings/casync/primary.xml.caibx").status_code == 404
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert client.request(method, "/primary.xml.caibx").status_code == 405
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("program", ["casync", "desync"])
def test_the_documented_commands(mirror: Mirror, tmp_path: Path, program: str) -> None:
    require(program)
    _, old = primary(read_tree(mirror.tree))
    _, data = primary(mirror.publish())
    server, _ = mirror.serve()
    work = tmp_path / "work"
    work.mkdir()
    (work / "old.xml").write_bytes(old)
    text = (ROOT / "docs" / "casync.md").read_text()
    section = text[text.index("## Commands") : text.index("## Addresses")]
    blocks = re.findall(r"^```\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    extracted = 0
    for line in "\n".join(blocks).splitlines():
        words = line.split()
        if not words or words[0].startswith("B=") or words[0] in {"casync", "desync"} - {program}:
            continue
        result = work / "primary.xml"
        if "extract" in words and "-k" not in words:
            result.unlink(missing_ok=True)
        run("bash", "-ec", f"cd {work}; B={server.url}{BASE}; {line}")
        if "extract" in words:
            extracted += 1
            assert result.read_bytes() == data, line
    assert extracted == {"casync": 2, "desync": 4}[program]


def test_off_where_it_is_not_wanted(mirror: Mirror) -> None:
    for option in (["--no-casync"], ["--bundle-queue", "0"]):
        _, client = mirror.serve(*option)
        assert client.get("/primary.xml.caibx").status_code == 404
        assert client.get("/primary.xml.caibx").json()["error"]["code"] == "not-found"


def test_a_server_that_knows_nothing_finds_a_chunk(mirror: Mirror) -> None:
    """A restart without its cache, or the next one behind a load balancer."""
    _, client = mirror.serve()
    wanted = {}
    published = next(name for name in read_tree(mirror.tree) if "primary" in name)
    for prefix, name in (("4k", "primary.xml"), ("16k-desync", published)):
        answer = client.get(f"/{prefix}/{name}.caibx")
        wanted[prefix, name] = first_chunk(answer.content)[0]
    _, other = mirror.serve()
    for (prefix, name), identity in wanted.items():
        assert other.get(f"/{prefix}/store.castr/{identity.name}").status_code == 200, name


def test_a_damaged_cache_heals(mirror: Mirror) -> None:
    cache = mirror.root.parent / "own"
    server, client = mirror.serve("--cache", cache)
    _, data = primary(read_tree(mirror.tree))
    index = client.get("/4k/primary.xml.caibx")
    known = CasyncIndex.from_caibx(index.content)

    def chunk(number: int) -> None:
        identity, offset, length = known.chunk(number)
        answer = client.get(f"/4k/store.castr/{identity.name}")
        assert answer.status_code == 200
        assert zstd.decompress(answer.content) == data[offset : offset + length]

    chunk(0)
    blob = max(cache.glob("*.blob"), key=lambda path: path.stat().st_size == len(data))
    assert blob.read_bytes() == data
    blob.write_bytes(data[:-1000])
    chunk(len(known) - 1)
    blob.write_bytes(bytes(len(data)))
    chunk(1)
    assert blob.read_bytes() == data
    blob.unlink()
    chunk(2)
    for kept in cache.glob("*.caibx"):
        kept.write_bytes(kept.read_bytes()[:-1])
    chunk(3)  # from memory
    assert server.stop() == 0
    server, client = mirror.serve("--cache", cache)
    chunk(4)  # nothing in memory, and the index on disk cut short
    # What a crash left of a blob is not indexed.
    for kept in cache.glob("*.caibx"):
        kept.unlink()
    blob.write_bytes(bytes(len(data)))
    assert client.get("/4k/primary.xml.caibx").content == index.content
    assert "Traceback" not in server.log.read_text()


def test_the_cache_keeps_its_limit(mirror: Mirror) -> None:
    contents = opened(read_tree(mirror.tree))
    largest = max(len(data) for data in contents.values())
    cache = mirror.root.parent / "own"
    limit = largest + largest // 2
    _, client = mirror.serve("--cache", cache, "--cache-size", str(limit))
    for name in (*contents, *list(contents)[:1]):
        index = client.get(f"/16k/{name}.caibx")
        assert index.status_code == 200
        known = CasyncIndex.from_caibx(index.content)
        for number in (0, len(known) - 1):
            identity, offset, length = known.chunk(number)
            answer = client.get(f"/16k/store.castr/{identity.name}")
            assert zstd.decompress(answer.content) == contents[name][offset : offset + length]
        kept = [path for path in cache.iterdir() if not path.name.startswith(".tmp-")]
        assert sum(path.stat().st_size for path in kept) <= limit
    _, small = mirror.serve("--cache-size", str(largest - 1))
    answers = {small.get(f"/{name}.caibx").status_code for name in contents}
    assert answers == {200, 404}


def test_a_bounded_number_wait_and_the_loop_goes_on(mirror: Mirror) -> None:
    server, client = mirror.serve("--bundle-queue", "2")
    rules = ("", "-desync")
    paths = [f"/{size}k{rule}/primary.xml.caibx" for size in (4, 8, 16, 32) for rule in rules]
    with ThreadPoolExecutor(len(paths) + 1) as pool:
        answers = [pool.submit(client.get, path) for path in paths]
        slowest = 0.0
        while not all(answer.done() for answer in answers):
            started = time.monotonic()
            assert httpx.get(f"{server.url}/healthz").status_code == 200
            slowest = max(slowest, time.monotonic() - started)
    found = [answer.result() for answer in answers]
    codes = [answer.status_code for answer in found]
    assert set(codes) == {200, 503}
    assert codes.count(200) >= 2
    assert all(int(a.headers["retry-after"]) > 0 for a in found if a.status_code == 503)
    assert slowest < 1.0
    assert client.get(paths[-1]).status_code == 200
