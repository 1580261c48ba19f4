"""Reconcile with peers that lie: requests no client sends, and answers no server gives."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from support.servers import Misbehaving, Seen, Servers
from support.syncing import Notes, Repository, copy, fetch, left_over, tree
from tidings_chunkstore import bundle, chunker, reconcile
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.delta import Budget
from tidings_chunkstore.errors import EngineError
from tidings_chunkstore.ids import ContentId
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.store import Store
from tidings_chunkstore.wire import uvarints

TYPES = ("primary",)


@dataclass
class Server:
    """What a server answers, by the library; *spoil* and *status* are the lies."""

    root: Path
    spoil: Callable[[str, bytes], bytes] = lambda _, data: data
    status: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        store = Store(LocalBackend(self.root / "tidings"))
        head = store.read_head()
        assert head is not None
        toc = store.toc(head.current.pack)
        content = toc.snapshot.content("primary")
        assert content is not None
        self.target = content.id
        self.data = store.content(content.id, store.locate([(head.current.pack, toc)]))
        self.table = reconcile.make_table(self.target, self.data)
        self.snapshot = str(head.current.pack).removesuffix(".pack")
        self.head = json.loads((self.root / "tidings/head.json").read_bytes())

    def answer(self, seen: Seen) -> tuple[int, bytes] | None:
        path = seen.path.partition("?")[0]
        if path.endswith("/head.json"):
            return 200, json.dumps(self.head | {"features": {"reconcile": 1}}).encode()
        if "/tidings/reconcile/" not in path:
            return None
        self.asked.append(seen.method)
        if seen.method in self.status:
            return self.status[seen.method], b"no\n"
        return 200, self.spoil(seen.method, self._right(seen))

    def _right(self, seen: Seen) -> bytes:
        if seen.method == "GET":
            return bundle.encode([("primary", reconcile.encode_list(self.table))])
        entries = []
        for track, inquiry in reconcile.decode_inquiries(seen.body):
            common = reconcile.find_common(self.table, inquiry)
            made = reconcile.make_answer(self.target, self.data, common, Budget(0.5))
            assert made is not None
            entries.append((track, made))
        return bundle.encode(entries)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A repository, and a DEST with a state of it that was never published by Tidings."""
    top = tmp_path_factory.mktemp("case")
    repository = Repository.at(top / "www", count=1500, steps=0)
    shutil.rmtree(top / "www/tidings")
    shutil.copytree(top / "www", top / "dest")
    repository.advance(0.01)
    return top / "www", top / "dest"


@pytest.fixture
def liar(case: tuple[Path, Path]) -> Iterator[tuple[Server, Misbehaving]]:
    with Misbehaving(case[0]) as server:
        made = Server(case[0])
        server.answer(made.answer)
        yield made, server


def update(case: tuple[Path, Path], url: str, tmp_path: Path) -> tuple[str, Notes]:
    """One sync; whatever the server said, DEST is right."""
    dest = copy(case[1], tmp_path / "dest")
    notes = Notes()
    result = fetch(url, dest, notes=notes, types=TYPES)
    new = tree(case[0])
    assert result.changed
    for file in result.files:
        assert (dest / file.path).read_bytes() == new[file.path]
    assert left_over(dest) == set()
    return next(f.route for f in result.files if f.type == "primary"), notes


def reseal(entries: list[tuple[str, bytes]]) -> bytes:
    return bundle.encode(entries)


# -- a client --------------------------------------------------------------------------------------


def test_the_truth_is_taken(
    case: tuple[Path, Path], liar: tuple[Server, Misbehaving], tmp_path: Path
) -> None:
    route, notes = update(case, liar[1].url, tmp_path)
    assert route == "reconcile"
    assert notes.texts == []
    assert liar[0].asked == ["GET", "POST"]


def _garbage(data: bytes) -> bytes:
    return random.Random(1).randbytes(len(data))


def _flipped(data: bytes) -> bytes:
    return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]


def _inside(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """The envelope is right, what it holds is not."""

    def spoil(data: bytes) -> bytes:
        return reseal([(track, change(bytes(section))) for track, section in bundle.decode(data)])

    return spoil


LIES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _: b"",
    "an empty bundle": lambda _: reseal([]),
    "garbage": _garbage,
    "truncated": lambda data: data[: len(data) // 2],
    "flipped": _flipped,
    "flipped inside": _inside(_flipped),
    "truncated inside": _inside(lambda section: section[:-7]),
    "garbage inside": _inside(_garbage),
    "empty inside": _inside(lambda _: b""),
    "another track": lambda data: reseal([("secret", bytes(bundle.decode(data)[0][1]))]),
    "more": _inside(lambda section: section + b"more"),
}


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("lie", LIES)
def test_a_lie_costs_another_route(
    case: tuple[Path, Path],
    liar: tuple[Server, Misbehaving],
    tmp_path: Path,
    method: str,
    lie: str,
) -> None:
    liar[0].spoil = lambda asked, data: LIES[lie](data) if asked == method else data
    route, _ = update(case, liar[1].url, tmp_path)
    # A flipped id of the list is a chunk that seems to be another: the rest is as good as ever.
    assert route == ("reconcile" if (lie, method) == ("flipped inside", "GET") else "chunks")
    assert liar[0].asked.count("POST") <= 2


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("status", [404, 409, 413, 429, 500, 503])
def test_a_refusal_costs_another_route(
    case: tuple[Path, Path],
    liar: tuple[Server, Misbehaving],
    tmp_path: Path,
    method: str,
    status: int,
) -> None:
    liar[0].status[method] = status
    route, notes = update(case, liar[1].url, tmp_path)
    assert route == "chunks"
    assert any("reconcile" in text for text in notes.texts)


def test_an_answer_without_end_is_cut_off(
    case: tuple[Path, Path], liar: tuple[Server, Misbehaving], tmp_path: Path
) -> None:
    endless = bytes(LIMITS.reconcile_answer + 1)
    liar[0].spoil = lambda asked, data: endless if asked == "GET" else data
    assert update(case, liar[1].url, tmp_path)[0] == "chunks"


def test_a_list_of_another_content_leads_nowhere(
    case: tuple[Path, Path], liar: tuple[Server, Misbehaving], tmp_path: Path
) -> None:
    """Forged from end to end: the list, the answer, and the hashes in both; the head tells."""
    server = liar[0]
    server.data = server.data[:-10] + b"<!-- -->\n\n"
    server.target = ContentId.of(server.data)
    server.table = reconcile.make_table(server.target, server.data)
    route, notes = update(case, liar[1].url, tmp_path)
    assert route == "chunks"
    assert any("another content" in text for text in notes.texts)


def test_a_client_without_a_chunker_takes_the_file(
    case: tuple[Path, Path],
    liar: tuple[Server, Misbehaving],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> None:
        raise EngineError("chunking needs the Python package fastcdc")

    monkeypatch.setattr(chunker, "_fastcdc", missing)
    assert update(case, liar[1].url, tmp_path)[0] == "full"


# -- a server --------------------------------------------------------------------------------------


def _request(*numbers: int, tail: bytes = b"", track: bytes = b"primary") -> bytes:
    return b"TDQ1" + uvarints([1, len(track)]) + track + uvarints(numbers) + tail


MILLION = _request(1, 0, 0, 1_000_000, tail=b"\x04" + bytes(4_000_000))
WRONG: dict[str, tuple[bytes, set[int]]] = {
    "nothing": (b"", {422}),
    "garbage": (random.Random(2).randbytes(5000), {422}),
    "JSON": (b'{"v":1}', {422}),
    "a million ids": (MILLION, {413}),
    "a million ids said, none sent": (_request(1, 0, 0, 1_000_000, tail=b"\x04"), {422}),
    "as many ids as fit": (
        _request(1, 0, 0, 260_000, tail=b"\x04" + random.Random(3).randbytes(1_040_000)),
        {409},
    ),
    "as many empty runs as fit": (
        _request(300_000, *([0] * 900_000), tail=b"\x04"),
        {409},
    ),
    "chunks that do not exist": (_request(1, 0, 1_000_000, 0, tail=b"\x04"), {422}),
    "a chunk twice": (_request(2, 0, 1, 0, 1, 1, 0, tail=b"\x04"), {422}),
    "ids of 3 bytes": (_request(0, tail=b"\x03"), {422}),
    "numbers without end": (b"TDQ1" + b"\xff" * 1000, {422}),
    "no such track": (_request(0, tail=b"\x04", track=b"secret"), {422}),
    "a path as track": (_request(0, tail=b"\x04", track=b"../../etc/passwd"), {422}),
    "nothing in common": (_request(0, tail=b"\x04"), {409}),
    "cut short": (_request(1, 0, 3, 5, tail=b"\x04" + bytes(19)), {422}),
}


@pytest.fixture(scope="module")
def server(
    case: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("server")
    with Servers(folder / "servers") as servers:
        command = servers.mirror(case[0], "--reconcile", "--cache", folder / "cache")
        with httpx.Client(base_url=command.url, timeout=60) as client:
            yield client
        assert "Traceback" not in command.log.read_text()


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_request_is_refused(
    case: tuple[Path, Path], server: httpx.Client, what: str
) -> None:
    body, statuses = WRONG[what]
    path = f"/tidings/reconcile/{Server(case[0]).snapshot}"
    answer = server.post(path, content=body)
    assert answer.status_code in statuses, answer.text
    assert set(answer.json()["error"]) == {"code", "message"}
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "name",
    ["x", "%00", "..%2f..", "000001-zzzzzzzzzzzzzzzz", "a" * 3000, "000001-0123456789abcdef/more"],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_wrong_name_is_refused(server: httpx.Client, method: str, name: str) -> None:
    answer = server.request(method, f"/tidings/reconcile/{name}", content=b"TDQ1\x00")
    assert 400 <= answer.status_code < 500


@pytest.mark.parametrize("tracks", ["", "%00", "," * 3000, "a" * 5000, "..%2f..", "%ff"])
def test_tracks_that_do_not_exist_give_an_empty_bundle(
    case: tuple[Path, Path], server: httpx.Client, tracks: str
) -> None:
    answer = server.get(f"/tidings/reconcile/{Server(case[0]).snapshot}?tracks={tracks}")
    assert answer.status_code == 200
    assert bundle.decode(answer.content) == []


def test_a_changed_request_is_never_a_failure_of_the_server(
    case: tuple[Path, Path], server: httpx.Client
) -> None:
    right = Server(case[0])
    base = right.data[:40_000] + b"changed" + right.data[40_500:]
    chunks = reconcile.decode_list(reconcile.encode_list(right.table))
    found = reconcile.survey(io.BytesIO(base), chunks)
    body = reconcile.encode_inquiries([("primary", found.inquiry)])
    draw = random.Random(4)
    for _ in range(20):
        changed = bytearray(body)
        # Near the front lies what is structure; ids behind it may be any.
        changed[draw.randrange(min(30, len(body)))] = draw.randrange(256)
        answer = server.post(f"/tidings/reconcile/{right.snapshot}", content=bytes(changed))
        assert answer.status_code in (200, 409, 422), answer.text
