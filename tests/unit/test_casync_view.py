"""What a server answers to casync: paths, indexes kept and made again, chunks found."""

from __future__ import annotations

import hashlib
import io
import threading
from pathlib import Path
from typing import BinaryIO

import pytest

from tidings_chunkstore.errors import InputError, StoreError, UnsettledError
from tidings_chunkstore.ids import ContentId, Digest
from tidings_chunkstore.zstd import zstd
from tidings_server.casync import CasyncId, CasyncIndex
from tidings_server.casync_chunker import ChunkSizes, Rule
from tidings_server.casync_view import (
    CasyncView,
    ChunkRequest,
    IndexRequest,
    parse_request,
)

SIZES = ChunkSizes.of(4096)
ID = CasyncId.of(b"chunk")


class Shelf:
    """A provider of contents in memory that counts what is asked of it."""

    def __init__(self, *blobs: bytes) -> None:
        self.blobs: dict[Digest, bytes] = {ContentId.of(blob): blob for blob in blobs}
        self.opened: list[Digest] = []

    def __call__(self, blob: Digest) -> BinaryIO:
        if blob not in self.blobs:
            raise InputError(f"not retained: {blob.hex()}")
        self.opened.append(blob)
        return io.BytesIO(self.blobs[blob])

    @property
    def ids(self) -> list[Digest]:
        return list(self.blobs)


def noise(seed: str, size: int = 60_000) -> bytes:
    return hashlib.shake_256(seed.encode()).digest(size)


def index_of(data: bytes, sizes: ChunkSizes = SIZES) -> CasyncIndex:
    return CasyncIndex.make(io.BytesIO(data), sizes)


class TestPaths:
    def test_index(self) -> None:
        assert parse_request("repodata/x-primary.xml.caibx") == IndexRequest(
            None, ChunkSizes.of(65536), "repodata/x-primary.xml"
        )
        assert parse_request("@42/16k/repodata/p.xml.zst.caibx") == IndexRequest(
            "42", ChunkSizes.of(16384), "repodata/p.xml.zst"
        )
        assert parse_request("4k-desync/InRelease.caibx") == IndexRequest(
            None, ChunkSizes.of(4096, Rule.DESYNC), "InRelease"
        )

    @pytest.mark.parametrize("store", ["store.castr", "default.castr", "repodata/default.castr"])
    def test_chunk(self, store: str) -> None:
        assert parse_request(f"{store}/{ID.name}") == ChunkRequest(None, ChunkSizes.of(65536), ID)
        assert parse_request(f"@7/8k/{store}/{ID.name}") == ChunkRequest(
            "7", ChunkSizes.of(8192), ID
        )

    @pytest.mark.parametrize(
        "path",
        [
            "",
            ".caibx",
            "@",
            "@/x.caibx",
            "@1/",
            "x",
            "x.caibx/",
            "\0.caibx",
            "store.castr/",
            f"store.castr/0000/{ID.hex()}.cacnk",
            f"store.castr/{ID.name.upper()}",
            f"store.castr/{ID.name}.caibx/..",
            f"other.castr/{ID.name}",
            f"store.castr/{ID.hex()[:4]}/{'٣' * 64}.cacnk",
            "a/" * 5000 + "x.caibx",
        ],
    )
    def test_garbage(self, path: str) -> None:
        with pytest.raises(InputError) as caught:
            parse_request(path)
        assert caught.value.code == "casync-path"

    @pytest.mark.parametrize("size", ["0k", "3k", "5k", "512k", "999999999k", "04096k"])
    def test_sizes_not_on_offer(self, size: str) -> None:
        with pytest.raises(InputError) as caught:
            parse_request(f"{size}/x.caibx")
        assert caught.value.code == "casync-sizes"


class TestIndex:
    def test_made_once_and_kept_across_processes(self, tmp_path: Path) -> None:
        data = noise("a")
        shelf = Shelf(data)
        view = CasyncView(shelf, tmp_path)
        wanted = index_of(data).to_caibx()
        assert view.index(shelf.ids[0], SIZES).to_caibx() == wanted
        assert view.index(shelf.ids[0], SIZES).to_caibx() == wanted
        assert CasyncView(shelf, tmp_path).index(shelf.ids[0], SIZES).to_caibx() == wanted
        assert len(shelf.opened) == 1
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [wanted]

    def test_sizes_and_rules_are_kept_apart(self, tmp_path: Path) -> None:
        data = noise("min-864", 12_000)  # where casync and desync cut differently
        shelf = Shelf(data)
        every = [ChunkSizes.of(n, rule) for n in (4096, 8192) for rule in Rule]
        view = CasyncView(shelf, tmp_path)
        for _ in range(2):
            for sizes in every:
                made = view.index(shelf.ids[0], sizes)
                assert made.to_caibx() == index_of(data, sizes).to_caibx()
        assert len(list(tmp_path.iterdir())) == len(every)

    @pytest.mark.parametrize("damage", [b"", b"garbage", None])
    def test_a_damaged_file_is_made_again(self, tmp_path: Path, damage: bytes | None) -> None:
        data = noise("a")
        shelf = Shelf(data)
        CasyncView(shelf, tmp_path).index(shelf.ids[0], SIZES)
        (kept,) = tmp_path.iterdir()
        other = index_of(data, ChunkSizes.of(8192)).to_caibx()
        kept.write_bytes(other if damage is None else damage)
        again = CasyncView(shelf, tmp_path).index(shelf.ids[0], SIZES)
        assert again.to_caibx() == index_of(data).to_caibx() == kept.read_bytes()

    def test_not_retained(self, tmp_path: Path) -> None:
        with pytest.raises(InputError):
            CasyncView(Shelf(), tmp_path).index(ContentId.of(b""), SIZES)

    def test_threads_make_it_once(self, tmp_path: Path) -> None:
        shelf = Shelf(noise("a", 2_000_000))
        view = CasyncView(shelf, tmp_path)
        threads = [
            threading.Thread(target=view.index, args=(shelf.ids[0], SIZES)) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(shelf.opened) == 1

    def test_memory_is_bounded(self, tmp_path: Path) -> None:
        shelf = Shelf(*(noise(str(n)) for n in range(6)))
        one = index_of(noise("0")).memory
        view = CasyncView(shelf, tmp_path, memory=2 * one)
        for blob in shelf.ids:
            view.index(blob, SIZES)
        assert view._held_bytes == sum(index.memory for index in view._held.values())
        assert view._held_bytes <= 2 * one
        for blob in shelf.ids:
            view.index(blob, SIZES)
        assert len(shelf.opened) == 6  # the rest came from the folder


class TestChunk:
    def test_every_chunk_of_every_content(self, tmp_path: Path) -> None:
        shelf = Shelf(noise("a"), noise("b"), b"", bytes(70_000))
        view = CasyncView(shelf, tmp_path)
        for blob, data in shelf.blobs.items():
            index = view.index(blob, SIZES)
            rebuilt = b""
            for number in range(len(index)):
                identity, _, _ = index.chunk(number)
                frame = view.chunk(identity, shelf.ids, SIZES)
                assert frame is not None
                rebuilt += zstd.decompress(frame)
            assert rebuilt == data

    def test_another_process_gave_the_id_out(self, tmp_path: Path) -> None:
        data = noise("b")
        shelf = Shelf(noise("a"), data)
        identity, offset, length = index_of(data).chunk(3)
        frame = CasyncView(shelf, tmp_path).chunk(identity, shelf.ids, SIZES)
        assert frame is not None
        assert zstd.decompress(frame) == data[offset : offset + length]

    def test_unknown_ids_index_each_content_once(self, tmp_path: Path) -> None:
        shelf = Shelf(noise("a"), noise("b"))
        view = CasyncView(shelf, tmp_path)
        for n in range(20):
            assert view.chunk(CasyncId.of(b"%d" % n), shelf.ids, SIZES) is None
        assert len(shelf.opened) == 2

    def test_only_the_named_contents_are_looked_into(self, tmp_path: Path) -> None:
        shelf = Shelf(noise("a"), noise("b"))
        view = CasyncView(shelf, tmp_path)
        identity, _, _ = view.index(shelf.ids[1], SIZES).chunk(0)
        assert view.chunk(identity, shelf.ids[:1], SIZES) is None
        assert view.chunk(identity, [], SIZES) is None

    def test_effort_is_bounded_and_not_lost(self, tmp_path: Path) -> None:
        shelf = Shelf(*(noise(str(n)) for n in range(5)))
        view = CasyncView(shelf, tmp_path, effort=100_000)  # two contents a call
        identity, _, _ = index_of(noise("4")).chunk(0)
        outcomes: list[bool | str] = []
        for _ in range(3):
            try:
                outcomes.append(view.chunk(identity, shelf.ids, SIZES) is not None)
            except UnsettledError as error:
                outcomes.append(error.code)
        assert outcomes == ["casync-busy", "casync-busy", True]

    def test_a_content_that_went_is_passed_over(self, tmp_path: Path) -> None:
        data = noise("a")
        shelf = Shelf(data, data + noise("more"), noise("c"))
        first, second, third = shelf.ids
        view = CasyncView(shelf, tmp_path)
        identity, _, _ = view.index(first, SIZES).chunk(0)
        del shelf.blobs[first], shelf.blobs[third]
        assert view.chunk(identity, [first, third, second], SIZES) is not None
        assert view.chunk(identity, [first, third], SIZES) is None

    def test_changed_bytes_are_never_served(self, tmp_path: Path) -> None:
        data = noise("a")
        shelf = Shelf(data)
        blob = shelf.ids[0]
        view = CasyncView(shelf, tmp_path)
        identity, _, _ = view.index(blob, SIZES).chunk(2)
        shelf.blobs[blob] = bytes(len(data))
        with pytest.raises(StoreError):
            view.chunk(identity, shelf.ids, SIZES)
        assert not list(tmp_path.iterdir())
        shelf.blobs[blob] = data
        assert view.chunk(identity, shelf.ids, SIZES) is not None

    def test_prune(self, tmp_path: Path) -> None:
        shelf = Shelf(noise("a"), noise("b"))
        view = CasyncView(shelf, tmp_path)
        for blob in shelf.ids:
            view.index(blob, SIZES)
        assert view.prune(shelf.ids[:1]) == 1
        assert [path.name[:64] for path in tmp_path.iterdir()] == [shelf.ids[0].hex()]
        assert view._held_bytes == view.index(shelf.ids[0], SIZES).memory
