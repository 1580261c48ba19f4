"""Reconcile over a real server: what it costs, what is right at the end, what is refused."""

from __future__ import annotations

import hashlib
import io
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from support.servers import Command, Servers
from support.syncing import Notes, Repository, copy, fetch, left_over, tree
from tidings_chunkstore import bundle, delta, head, publisher, reconcile
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.ids import ContentId
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.store import Store
from tidings_chunkstore.zstd import zstd
from tidings_client.remote import Remote, RemoteSettings
from tidings_client.sync import SyncOptions, plan

PATIENT = RemoteSettings(read_timeout=60, total_timeout=60, backoff=0.05)
#: What is alike from one state to the next; of updateinfo every record is new.
TYPES = ("primary", "filelists", "other")
IMMUTABLE = "public, max-age=31536000, immutable, no-transform"


@dataclass
class Case:
    """A repository whose first state Tidings never saw, and a client that has it."""

    root: Path
    repository: Repository
    dest: Path

    @property
    def store(self) -> Store:
        return Store(LocalBackend(self.root / "tidings"))

    @property
    def head(self) -> head.Head:
        found = self.store.read_head()
        assert found is not None
        return found

    @property
    def snapshot(self) -> str:
        return str(self.head.current.pack).removesuffix(".pack")

    def content(self, track: str = "primary") -> bytes:
        """The current content of a track."""
        toc = self.store.toc(self.head.current.pack)
        found = toc.snapshot.content(track)
        assert found is not None
        return self.store.content(found.id, self.store.locate([(self.head.current.pack, toc)]))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    top = tmp_path_factory.mktemp("case")
    repository = Repository.at(top / "www", count=2500, steps=0)
    shutil.rmtree(top / "www" / "tidings")
    shutil.copytree(top / "www", top / "dest")
    repository.advance(0.01)
    return Case(top / "www", repository, top / "dest")


@pytest.fixture(scope="module")
def running(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    folder = tmp_path_factory.mktemp("running")
    with Servers(folder / "servers") as servers:
        yield servers.mirror(case.root, "--reconcile", "--cache", folder / "cache")


@pytest.fixture
def client(running: Command) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60) as made:
        yield made


def inquiry(case: Case, base: bytes, track: str = "primary") -> tuple[reconcile.Survey, bytes]:
    target = case.content(track)
    table = reconcile.make_table(ContentId.of(target), target)
    chunks = reconcile.decode_list(reconcile.encode_list(table))
    found = reconcile.survey(io.BytesIO(base), chunks)
    return found, reconcile.encode_inquiries([(track, found.inquiry)])


def edited(data: bytes, number: int = 1) -> bytes:
    return data[:50_000] + b"another line %d\n" % number + data[51_000:]


# -- a client --------------------------------------------------------------------------------------


def test_an_unknown_base_costs_three_requests(
    case: Case, running: Command, servers: Servers, tmp_path: Path
) -> None:
    wire = servers.wire(running.url)
    dest = copy(case.dest, tmp_path / "dest")
    notes = Notes()
    result = fetch(wire.url, dest, PATIENT, notes, types=TYPES)
    new = tree(case.root)
    for file in result.files:
        assert (dest / file.path).read_bytes() == new[file.path]
    assert {file.route for file in result.files} == {"reconcile"}
    assert left_over(dest) == set()
    assert result.route == "reconcile"
    assert result.fallback_reason is None
    assert notes.texts == []
    assert wire.requests == result.requests == 3
    assert wire.sent + wire.received == result.bytes_sent + result.bytes_received
    other = copy(case.dest, tmp_path / "other")
    by_chunks = fetch(wire.url, other, PATIENT, route="chunks", types=TYPES)
    assert by_chunks.route == "chunks"
    both = result.bytes_sent + result.bytes_received
    assert both < (by_chunks.bytes_sent + by_chunks.bytes_received) * 0.6
    assert not fetch(wire.url, dest, PATIENT, types=TYPES).changed


def test_the_route_can_be_asked_for(case: Case, running: Command, tmp_path: Path) -> None:
    result = fetch(running.url, copy(case.dest, tmp_path / "dest"), PATIENT, route="reconcile")
    assert "reconcile" in {file.route for file in result.files}
    assert tree(tmp_path / "dest") == tree(case.root)


def test_a_plan_has_its_price(case: Case, running: Command, tmp_path: Path) -> None:
    dest = copy(case.dest, tmp_path / "dest")
    with Remote([running.url], PATIENT) as remote:
        made = plan(SyncOptions(dest, types=TYPES), remote)
    primary = next(file for file in made.files if file.type == "primary")
    assert primary.route == "reconcile"
    assert not primary.exact
    assert primary.alternatives["reconcile"][0] < primary.alternatives["chunks"][0]
    assert made.requests == 2
    assert tree(dest) == tree(case.dest)


def test_without_a_base_nothing_is_asked(case: Case, running: Command, tmp_path: Path) -> None:
    result = fetch(running.url, tmp_path / "dest", PATIENT)
    assert {file.route for file in result.files} <= {"full", "delta"}
    assert tree(tmp_path / "dest") == tree(case.root)


def test_a_strange_base_goes_another_way(case: Case, running: Command, tmp_path: Path) -> None:
    """Same tracks, nothing in common: the client does not ask, and gets the files all the same."""
    Repository.at(tmp_path / "other", count=300, steps=0)
    shutil.rmtree(tmp_path / "other" / "tidings")
    result = fetch(running.url, tmp_path / "other", PATIENT)
    assert tree(tmp_path / "other") == tree(case.root)
    assert result.route != "reconcile"


def test_it_is_off_unless_asked_for(case: Case, servers: Servers, tmp_path: Path) -> None:
    plain = servers.mirror(case.root, "--cache", tmp_path / "cache")
    with httpx.Client(base_url=plain.url) as client:
        assert "reconcile" not in client.get("/tidings/head.json").json()["features"]
        assert client.get(f"/tidings/reconcile/{case.snapshot}").status_code == 404
        assert client.post(f"/tidings/reconcile/{case.snapshot}", content=b"x").status_code == 404
    result = fetch(plain.url, copy(case.dest, tmp_path / "dest"), PATIENT)
    assert result.route == "chunks"


# -- the routes ------------------------------------------------------------------------------------


def test_the_head_promises_it(client: httpx.Client) -> None:
    assert client.get("/tidings/head.json").json()["features"]["reconcile"] == 1


def test_lists_are_immutable_and_limited_to_tracks(case: Case, client: httpx.Client) -> None:
    answer = client.get(f"/tidings/reconcile/{case.snapshot}?tracks=primary,repomd,nothing")
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == IMMUTABLE
    sections = dict(bundle.decode(answer.content))
    assert set(sections) == {"primary", "repomd"}
    assert reconcile.decode_list(sections["primary"]).target == ContentId.of(case.content())
    out = io.BytesIO()
    delta.apply(sections["repomd"], [], out.write)
    assert out.getvalue() == (case.root / "repodata/repomd.xml").read_bytes()
    everything = client.get(f"/tidings/reconcile/{case.snapshot}")
    assert set(dict(bundle.decode(everything.content))) > {"primary", "filelists", "repomd"}


def test_the_answer_is_a_delta_against_what_the_client_has(
    case: Case, client: httpx.Client
) -> None:
    target = case.content()
    base = edited(target)
    found, body = inquiry(case, base)
    path = f"/tidings/reconcile/{case.snapshot}"
    answer = client.post(path, content=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    ((track, section),) = bundle.decode(answer.content)
    assert track == "primary"
    out = io.BytesIO()
    reconcile.rebuild(section, delta.reader_of(base), found, ContentId.of(target), out.write)
    assert out.getvalue() == target
    # Asked again it comes from the cache, byte for byte.
    started = time.monotonic()
    assert client.post(path, content=body).content == answer.content
    assert time.monotonic() - started < 1


def test_only_the_current_snapshot_is_known(case: Case, client: httpx.Client) -> None:
    _, body = inquiry(case, edited(case.content()))
    for name in ("000001-0123456789abcdef", "nothing", f"{case.snapshot}.pack"):
        assert client.get(f"/tidings/reconcile/{name}").status_code == 404
        assert client.post(f"/tidings/reconcile/{name}", content=body).status_code == 404
    assert client.get(f"/elsewhere/tidings/reconcile/{case.snapshot}").status_code == 404
    assert client.put(f"/tidings/reconcile/{case.snapshot}", content=b"").status_code == 405


def test_less_than_half_in_common_is_refused_at_once(case: Case, client: httpx.Client) -> None:
    client.get(f"/tidings/reconcile/{case.snapshot}")  # the tables are there
    target = case.content()
    table = reconcile.make_table(ContentId.of(target), target)
    some = reconcile.Inquiry((reconcile.Run(0, len(table.coarse_ends) // 3, 0),), 4, ())
    started = time.monotonic()
    body = reconcile.encode_inquiries([("primary", some)])
    answer = client.post(f"/tidings/reconcile/{case.snapshot}", content=body)
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "not-alike"
    assert time.monotonic() - started < 1


def test_a_client_has_few_requests_at_a_time(case: Case, client: httpx.Client) -> None:
    """More at once than are allowed: some are told to wait, none fails otherwise."""
    target = case.content()
    bodies = [inquiry(case, edited(target, 10 + number))[1] for number in range(6)]
    path = f"/tidings/reconcile/{case.snapshot}"
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda body: client.post(path, content=body), bodies))
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= LIMITS.reconcile_at_once
    told = next(answer for answer in answers if answer.status_code == 429)
    assert told.headers["retry-after"].isdigit()
    assert client.post(path, content=bodies[codes.index(429)]).status_code == 200


def test_the_loop_is_free_meanwhile(case: Case, client: httpx.Client, running: Command) -> None:
    _, body = inquiry(case, edited(case.content(), 99))
    with ThreadPoolExecutor(1) as pool:
        path = f"{running.url}/tidings/reconcile/{case.snapshot}"
        under_way = pool.submit(httpx.post, path, content=body, timeout=60)
        longest = 0.0
        while not under_way.done():
            started = time.monotonic()
            assert client.get("/healthz").status_code == 200
            longest = max(longest, time.monotonic() - started)
        assert under_way.result().status_code == 200
    assert longest < 1.0


# -- the goal --------------------------------------------------------------------------------------


def publishable(root: Path, content: bytes, timestamp: int) -> None:
    """A repository of one file, as createrepo_c compresses it."""
    parameter = zstd.CompressionParameter
    options: dict[int, int] = {parameter.compression_level: 10, parameter.content_size_flag: 0}
    packer = zstd.ZstdCompressor(options=options)
    packed = packer.compress(content) + packer.flush()
    digest = hashlib.sha256(packed).hexdigest()
    folder = root / "repodata"
    folder.mkdir(parents=True)
    (folder / f"{digest}-primary.xml.zst").write_bytes(packed)
    (folder / "repomd.xml").write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<repomd xmlns="http://linux.duke.edu/metadata/repo">\n'
        f'<revision>{timestamp}</revision>\n<data type="primary">\n'
        f'<checksum type="sha256">{digest}</checksum>\n'
        f'<open-checksum type="sha256">{hashlib.sha256(content).hexdigest()}</open-checksum>\n'
        f'<location href="repodata/{digest}-primary.xml.zst"/>\n'
        f"<timestamp>{timestamp}</timestamp>\n"
        f"<size>{len(packed)}</size>\n<open-size>{len(content)}</open-size>\n</data>\n</repomd>\n"
    )


@pytest.mark.slow
def test_a_day_of_updates_sim(shared_data: Path, servers: Servers, tmp_path: Path) -> None:
    """The mirror has version 8 alone, the client version 7: 60,000 bytes both ways at most."""
    packed = shared_data / "updates-sim"
    window: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 27}
    contents = [zstd.decompress((packed / "000.zst").read_bytes(), options=window)]
    for patch in sorted(packed.glob("*.patch"))[:8]:
        before = zstd.ZstdDict(contents[-1], is_raw=True).as_prefix
        contents.append(zstd.decompress(patch.read_bytes(), zstd_dict=before, options=window))
    publishable(tmp_path / "old", contents[7], 7_000_000)
    publishable(tmp_path / "new", contents[8], 8_000_000)
    publisher.publish(tmp_path / "new", LocalBackend(tmp_path / "new" / "tidings"))
    server = servers.mirror(tmp_path / "new", "--reconcile", "--cache", tmp_path / "cache")
    wire = servers.wire(server.url)
    result = fetch(wire.url, tmp_path / "old", PATIENT)
    assert result.route == "reconcile"
    assert tree(tmp_path / "old") == tree(tmp_path / "new")
    assert wire.sent + wire.received <= 60_000
    assert wire.requests == 3
