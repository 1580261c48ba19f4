"""Publish: what lies in the store afterwards, and that all of it comes back."""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from support import repos
from tidings_chunkstore import check, delta, gc, head, packing, publisher, reach, recipe
from tidings_chunkstore.backends import LocalBackend
from tidings_chunkstore.backends.base import HEAD_NAME
from tidings_chunkstore.errors import InputError, LockedError, StoreError, UnsettledError
from tidings_chunkstore.ids import ContentId
from tidings_chunkstore.opening import codec_of, open_stream
from tidings_chunkstore.publisher import Options, Report
from tidings_chunkstore.store import Store


class Mirror:
    """A repository that is published again and again."""

    def __init__(self, root: Path, count: int = 100, codec: str = "gz") -> None:
        self.root = root
        self.packages = repos.packages(count)
        self.codec = codec
        self.number = 0
        self.states: list[dict[str, bytes]] = []
        self.options = Options()
        self.write()

    @property
    def backend(self) -> LocalBackend:
        return LocalBackend(self.root / "tidings")

    @property
    def store(self) -> Store:
        return Store(self.backend)

    def head(self) -> head.Head:
        found = self.store.read_head()
        assert found is not None
        return found

    def write(self) -> None:
        stamp = repos.START + self.number * repos.DAY
        repos.rpm_md(self.root, self.packages, codec=self.codec, timestamp=stamp)
        self.number += 1

    def publish(self) -> Report:
        report = publisher.publish(self.root, self.backend, self.options)
        if report.changed:
            files = sorted((self.root / "repodata").iterdir())
            self.states.append({f"repodata/{p.name}": p.read_bytes() for p in files})
        return report

    def step(self, share: float = 0.02) -> Report:
        self.packages = repos.evolve(self.packages, self.number, share)
        self.write()
        return self.publish()

    def listing(self) -> dict[str, tuple[int, int]]:
        found = {}
        for path in sorted((self.root / "tidings").iterdir()):
            status = path.stat()
            found[path.name] = (status.st_ino, status.st_mtime_ns)
        return found


@pytest.fixture
def mirror(tmp_path: Path) -> Mirror:
    return Mirror(tmp_path / "repo")


def assert_whole(mirror: Mirror) -> None:
    """Every file of every snapshot in the store comes back bit for bit."""
    store = mirror.store
    tocs = store.tocs(store.pack_names())
    located = store.locate(tocs)
    assert len(tocs) == len(mirror.states)
    for (_, toc), files in zip(tocs, mirror.states, strict=True):
        assert {f.path for f in toc.snapshot.files} == set(files)
        for file in toc.snapshot.files:
            entry = toc.snapshot.content(file.track)
            assert entry is not None
            if file.recipe is None:
                assert ContentId.of(files[file.path]) == entry.id
                continue
            sides = {side: store.content(side, located) for side in file.recipe.sides}
            content = store.content(entry.id, located)
            assert b"".join(recipe.run(file.recipe, [content], sides)) == files[file.path]


@pytest.mark.parametrize("codec", ["gz", "zst", "xz", "bz2", "none"])
def test_every_file_comes_back(tmp_path: Path, codec: str) -> None:
    mirror = Mirror(tmp_path / "repo", codec=codec)
    mirror.publish()
    for share in (0.01, 0.1, 0.9):
        mirror.step(share)
    assert_whole(mirror)


def test_a_publish_changes_two_files_and_keeps_the_rest(mirror: Mirror) -> None:
    mirror.publish()
    before = mirror.listing()
    report = mirror.step()
    after = mirror.listing()
    assert report.changed
    assert {name for name in after if after[name] != before.get(name)} == {HEAD_NAME, report.pack}
    assert set(before) <= set(after)


def test_nothing_is_written_for_the_same_state(mirror: Mirror) -> None:
    mirror.publish()
    before = mirror.listing()
    os.utime(mirror.root / "repodata/repomd.xml")
    report = mirror.publish()
    assert not report.changed
    assert report.serial == 1
    assert mirror.listing() == before


def test_permissions_do_not_follow_the_umask(mirror: Mirror) -> None:
    old = os.umask(0o077)
    try:
        mirror.publish()
    finally:
        os.umask(old)
    folder = mirror.root / "tidings"
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_each_edge_leads_where_the_head_says(mirror: Mirror) -> None:
    mirror.options = Options(direct=3)
    mirror.publish()
    for _ in range(4):
        mirror.step()
    store = mirror.store
    located = store.locate(store.tocs(store.pack_names()))
    now = mirror.head()
    full = {t.snapshot.serial: t.snapshot for _, t in store.tocs([s.pack for s in now.states])}
    direct = 0
    for edge in now.edges:
        target = full[edge.target].content(edge.track)
        assert target is not None
        bases = [full[edge.target].content(use) for use in edge.uses]
        if edge.base is not None:
            bases.insert(0, full[edge.base].content(edge.track))
            direct += edge.base < edge.target - 1
        out = io.BytesIO()
        readers = [delta.reader_of(store.content(b.id, located)) for b in bases if b]
        delta.apply(store.read_span(edge.span), readers, out.write)
        assert ContentId.of(out.getvalue()) == target.id
    assert direct >= 3


def test_edges_are_the_size_of_the_change(tmp_path: Path) -> None:
    mirror = Mirror(tmp_path / "repo", count=1500)
    mirror.publish()
    mirror.step(0.004)
    now = mirror.head()
    last = [e for e in now.edges if e.target == now.serial and e.base is not None]
    published = sum(f.size for f in now.files)
    assert 0 < sum(e.span.length for e in last) < published / 25


def test_the_head_keeps_as_many_snapshots_as_asked(mirror: Mirror) -> None:
    mirror.options = Options(keep=3)
    mirror.publish()
    for _ in range(4):
        report = mirror.step()
    assert report.snapshots == 3
    assert [state.serial for state in mirror.head().states] == [3, 4, 5]
    assert len(mirror.store.pack_names()) == 5  # packs go by gc alone
    mirror.options = Options(keep=30, keep_seconds=0)
    mirror.step()
    assert 6 in [state.serial for state in mirror.head().states]


def test_a_lost_head_is_rebuilt_from_the_packs(mirror: Mirror) -> None:
    mirror.publish()
    mirror.step()
    before = (mirror.root / "tidings" / HEAD_NAME).read_bytes()
    rebuilt = reach.rebuild(mirror.store)
    assert rebuilt is not None
    assert head.encode(rebuilt) == before
    (mirror.root / "tidings" / HEAD_NAME).unlink()
    mirror.step()
    assert [state.serial for state in mirror.head().states] == [1, 2, 3]
    assert_whole(mirror)


def test_leftovers_of_an_interrupted_publish_go(mirror: Mirror) -> None:
    mirror.publish()
    folder = mirror.root / "tidings"
    first = (folder / HEAD_NAME).read_bytes()
    (folder / ".tmp-half.1").write_bytes(b"half a pack")
    mirror.step()
    (folder / HEAD_NAME).write_bytes(first)  # as if killed between the pack and the head
    mirror.states.pop()
    report = mirror.step()
    assert report.serial == 2
    assert len(report.removed) == 1
    assert len(mirror.store.pack_names()) == 2
    assert not list(folder.glob(".tmp-*"))
    assert_whole(mirror)


def test_two_publishers_cannot_meet(mirror: Mirror) -> None:
    with mirror.backend.lock(), pytest.raises(LockedError):
        mirror.publish()
    assert mirror.publish().changed


def test_a_missing_or_damaged_store_is_said_and_left_alone(mirror: Mirror) -> None:
    mirror.publish()
    report = mirror.step()
    pack = mirror.root / "tidings" / str(report.pack)
    data = bytearray(pack.read_bytes())
    data[-40] ^= 1
    pack.write_bytes(data)
    listing = mirror.listing()
    with pytest.raises(StoreError, match="damaged"):
        mirror.step()
    pack.unlink()
    listing.pop(pack.name)
    with pytest.raises(StoreError, match="missing"):
        mirror.step()
    assert mirror.listing() == listing
    mirror.options = replace(mirror.options, rebuild=True)
    assert mirror.step().serial == 3  # above all that clients may have seen


def test_a_damaged_head_is_said(mirror: Mirror) -> None:
    mirror.publish()
    (mirror.root / "tidings" / HEAD_NAME).write_bytes(b"{}")
    mirror.write()
    with pytest.raises(StoreError, match=r"head\.json is damaged"):
        mirror.publish()


def test_what_no_recipe_gives_back_is_opaque(tmp_path: Path) -> None:
    mirror = Mirror(tmp_path / "repo")
    extra = {"primary_zck": ("primary.xml.zck", b"\0ZCK1" + os.urandom(3000))}
    repos.rpm_md(mirror.root, mirror.packages, codec="gz", extra=extra)
    report = mirror.publish()
    assert [o.path.endswith("primary.xml.zck") for o in report.opaque] == [True]
    file = next(f for f in mirror.head().files if f.type == "primary_zck")
    content = mirror.head().content(file.track)
    assert file.recipe is None
    assert content is not None
    assert content.index is None
    assert_whole(mirror)
    # It is not stored, and a later publish is none the worse for it.
    assert not mirror.publish().changed
    mirror.packages = repos.evolve(mirror.packages, 1)
    stamp = repos.START + 5
    repos.rpm_md(mirror.root, mirror.packages, codec="gz", extra=extra, timestamp=stamp)
    mirror.publish()
    assert_whole(mirror)


def test_one_content_in_two_wrappings_is_stored_once(tmp_path: Path) -> None:
    root = tmp_path / "repo"
    made = repos.packages(300)
    repos.rpm_md(root, made, codec="gz")
    publisher.publish(root, LocalBackend(root / "tidings"))
    store = Store(LocalBackend(root / "tidings"))
    now = store.read_head()
    assert now is not None
    kinds = {f.type: f.track for f in now.files}
    assert kinds["group"] == kinds["group_gz"]
    assert [c.track for c in now.contents].count(kinds["group"]) == 1
    repos.rpm_md(root, made, codec="zst", timestamp=repos.START + 1)
    report = publisher.publish(root, LocalBackend(root / "tidings"))
    assert report.tally.new_chunks <= 1  # repomd.xml alone: the contents are the same


def test_apt_trees(tmp_path: Path) -> None:
    root = tmp_path / "repo"
    made = repos.packages(300)
    backend = LocalBackend(root / "tidings")
    for number in range(3):
        repos.apt(root, made, timestamp=repos.START + number * repos.DAY)
        publisher.publish(root, backend)
        made = repos.evolve(made, number)
    store = Store(backend)
    now = store.read_head()
    assert now is not None
    assert now.main == "InRelease"
    located = store.locate(store.tocs(store.pack_names()))
    for file in now.files:
        published = (root / file.path).read_bytes()
        opened = b"".join(
            open_stream(io.BytesIO(published), codec_of(file.path, published[:16]), limit=1 << 30)
        )
        assert store.content(ContentId.of(opened), located) == opened


def test_a_contents_long_history_stays_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contents that change all over are stored by their deltas, with a whole one now and then."""
    monkeypatch.setattr(packing, "MAX_DEPTH", 8)
    mirror = Mirror(tmp_path / "repo", count=120)
    mirror.publish()
    for _ in range(12):
        mirror.step(0.6)
    assert_whole(mirror)
    store = mirror.store
    located = store.locate(store.tocs(store.pack_names()))
    depths = [stored.depth for stored in located.values()]
    assert max(depths) == 8
    sizes = [path.stat().st_size for path in sorted((mirror.root / "tidings").glob("*.pack"))]
    assert [number for number, size in enumerate(sizes) if size > 2 * sorted(sizes)[6]] == [0, 9]


def test_long_chains_are_for_small_contents() -> None:
    mib = 1 << 20
    assert packing.bearable(packing.MAX_DEPTH, 16 * mib)
    assert not packing.bearable(packing.MAX_DEPTH, 17 * mib)
    assert not packing.bearable(packing.MAX_DEPTH + 1, 1)
    assert packing.bearable(8, 4096 * mib)
    assert not packing.bearable(9, 120 * mib)


@pytest.mark.parametrize(("full", "some"), [(40.0, True), (1.0, False)])
def test_a_store_that_is_full_takes_no_more_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: float, some: bool
) -> None:
    monkeypatch.setattr(packing, "_FULL", full)
    mirror = Mirror(tmp_path / "repo", count=400)
    mirror.publish()
    frames = mirror.step(0.003).tally.frames
    assert (frames > 0) is some
    assert_whole(mirror)


def test_a_mirror_in_the_middle_of_its_rsync_is_not_published(mirror: Mirror) -> None:
    mirror.publish()
    listing = mirror.listing()
    mirror.packages = repos.evolve(mirror.packages, 1)
    mirror.write()
    victim = next((mirror.root / "repodata").glob("*-primary.xml.gz"))
    data = victim.read_bytes()
    victim.unlink()
    with pytest.raises(UnsettledError):
        mirror.publish()
    victim.write_bytes(data[:-1])
    with pytest.raises(UnsettledError):
        mirror.publish()
    assert mirror.listing() == listing
    victim.write_bytes(data)
    assert mirror.publish().changed


@pytest.mark.parametrize("known", [False, True], ids=["new file", "known file"])
@pytest.mark.parametrize(
    ("element", "code"), [("open-size", "wrong-size"), ("open-checksum", "wrong-checksum")]
)
def test_what_a_file_opens_to_is_compared_too(
    mirror: Mirror, element: str, code: str, known: bool
) -> None:
    mirror.publish()
    if not known:
        mirror.packages = repos.evolve(mirror.packages, 1)
        mirror.write()
    listing = mirror.listing()
    main = mirror.root / "repodata/repomd.xml"
    text = main.read_text()
    at = text.index("</", text.index(f"<{element}", text.index('type="primary"'))) - 1
    main.write_text(f"{text[:at]}{'1' if text[at] != '1' else '2'}{text[at + 1 :]}")
    with pytest.raises(UnsettledError, match=element) as caught:
        mirror.publish()
    assert caught.value.code == code
    assert mirror.listing() == listing


def test_a_wrapping_that_is_not_opened_is_not_compared(tmp_path: Path) -> None:
    plain = b"Package: a\n"
    for name, data in (("Packages", plain), ("Packages.lz4", b"an lz4 frame")):
        (tmp_path / name).write_bytes(data)
    lines = [
        f" {hashlib.sha256(data).hexdigest()} {len(data)} {name}"
        for name, data in (("Packages", plain), ("Packages.lz4", b"an lz4 frame"))
    ]
    text = "Suite: x\nDate: Tue, 14 Nov 2023 22:13:20 UTC\nSHA256:\n" + "\n".join(lines) + "\n"
    (tmp_path / "Release").write_text(text)
    assert publisher.publish(tmp_path, LocalBackend(tmp_path / "tidings")).changed


def test_a_head_of_a_newer_release_is_not_damaged(mirror: Mirror) -> None:
    mirror.publish()
    path = mirror.root / "tidings" / HEAD_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"v": 99}))
    listing = mirror.listing()
    for work in (
        mirror.publish,
        mirror.store.read_head,
        lambda: check.check(mirror.backend),
        lambda: gc.preview(mirror.store),
    ):
        with pytest.raises(InputError, match=r"newer release .* upgrade") as caught:
            work()
        assert caught.value.code == "format-version"
    assert mirror.listing() == listing


def test_a_folder_without_metadata(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no rpm-md or apt metadata"):
        publisher.publish(tmp_path, LocalBackend(tmp_path / "tidings"))
    assert not (tmp_path / "tidings").exists()


def test_two_heads_never_share_a_second(mirror: Mirror) -> None:
    """Static servers make the ETag of size and second."""
    path = mirror.root / "tidings" / HEAD_NAME
    times = []
    for _ in range(3):
        mirror.step()
        times.append(int(path.stat().st_mtime))
    assert len(set(times)) == 3
    assert times == sorted(times)
