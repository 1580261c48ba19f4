"""From paths to files: what is shown, and what never is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tidings_chunkstore.places import PackName
from tidings_server.settings import RepoSettings, ServeSettings
from tidings_server.site import Site, split_path, target_of

PACK = "000007-0123456789abcdef.pack"


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        (b"/a/b", ("a", "b")),
        (b"//a///b", ("a", "b")),
        (b"/a%20b/c%C3%A4", ("a b", "cä")),
        (b"/a+b", ("a+b",)),
        (b"/a/./././b", ("a", "b")),
    ],
)
def test_paths_come_apart(raw: bytes, parts: tuple[str, ...]) -> None:
    assert split_path(raw) == parts


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"/", b"/a/", b"a/b", b"/a/../b", b"/..", b"/a/%2e/b", b"/a/."),
        *(b"/.git/config", b"/a/.tmp-x"),
        *(b"/a%2fb", b"/a%2Fb", b"/%2e%2e/a", b"/%2E%2E%2Fa", b"/a%5cb", b"/a%5Cb", b"/a\\b"),
        *(b"/a%00b", b"/a%0ab", b"/a\x00b", b"/a%ff", b"/a%e2%80%ae", b"/" + b"a" * 5000),
    ],
)
def test_paths_that_name_nothing(raw: bytes) -> None:
    assert split_path(raw) is None


def test_targets() -> None:
    head = target_of(("f", "43", "tidings", "head.json"))
    assert (head.repository, head.is_head) == ("f/43", True)
    pack = target_of(("tidings", PACK))
    assert (pack.repository, pack.pack) == ("", PackName.parse(PACK))
    batch = target_of(("f", "tidings", "frames"))
    assert (batch.repository, batch.feature) == ("f", "frames")
    casync = target_of(("f", "tidings", "casync", "4k", "repodata", "x.caibx"))
    assert (casync.repository, casync.feature) == ("f", "casync")
    inner = target_of(("tidings", "43", "tidings", "head.json"))
    assert inner.repository == "tidings/43"
    published = target_of(("tidings", "repodata", "repomd.xml"))
    assert (published.repository, published.is_head, published.pack) == (None, False, None)


def read(site: Site, path: str) -> bytes | None:
    """What the site shows at *path*."""
    opened = site.open(site.candidates(target_of(tuple(path.split("/")))))
    if opened is None:
        return None
    try:
        return os.read(opened[0], 100)
    finally:
        os.close(opened[0])


def write(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_symlinks_lead_anywhere_inside_and_nowhere_else(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    write(root / "a" / "file", b"inside")
    write(outside / "secret", b"secret")
    (root / "b").symlink_to("a")
    (root / "out").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")
    (root / "loop").symlink_to("loop")
    write(root / ".hidden", b"hidden")
    (root / "shown").symlink_to(".hidden")
    site = Site(ServeSettings(root=root))
    assert read(site, "a/file") == b"inside"
    assert read(site, "b/file") == b"inside"
    for path in ("out/secret", "file", "loop", "shown", "a", "nothing", "a/file/x", "a" * 300):
        assert read(site, path) is None, path


def test_a_root_that_is_a_symlink_may_be_switched(tmp_path: Path) -> None:
    for name in ("old", "new"):
        write(tmp_path / name / "file", name.encode())
    current = tmp_path / "current"
    current.symlink_to("old")
    site = Site(ServeSettings(root=current))
    assert read(site, "file") == b"old"
    current.unlink()
    current.symlink_to("new")
    assert read(site, "file") == b"new"


def test_special_files_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert read(Site(ServeSettings(root=tmp_path)), "fifo") is None


def test_the_store_tree_lies_over_the_root(tmp_path: Path) -> None:
    root, store = tmp_path / "root", tmp_path / "store"
    write(root / "r" / "tidings" / "head.json", b"root")
    write(root / "r" / "repodata" / "repomd.xml", b"repomd")
    site = Site(ServeSettings(root=root, store=store))
    assert read(site, "r/tidings/head.json") == b"root"
    write(store / "r" / "tidings" / "head.json", b"store")
    assert read(site, "r/tidings/head.json") == b"store"
    assert read(site, "r/repodata/repomd.xml") == b"repomd"


def test_configured_repositories_have_their_own_places(tmp_path: Path) -> None:
    where = tmp_path / "elsewhere"
    write(where / "repodata" / "repomd.xml", b"mine")
    write(where / "tidings" / "head.json", b"head")
    write(tmp_path / "root" / "other" / "file", b"root")
    repos = [RepoSettings("f/43", where)]
    site = Site(ServeSettings(root=tmp_path / "root"), repos)
    assert read(site, "f/43/repodata/repomd.xml") == b"mine"
    assert read(site, "f/43/tidings/head.json") == b"head"
    assert read(site, "other/file") == b"root"
    assert read(site, "f/repodata/repomd.xml") is None
    repository = site.repository("f/43")
    assert repository is not None and repository.root == where
    assert site.repository("f/44") is None
    assert site.names() == ["f/43"]


def test_the_repositories_that_are_remembered_are_bounded(tmp_path: Path) -> None:
    for number in range(1030):
        write(tmp_path / f"r{number}" / "tidings" / "head.json")
    site = Site(ServeSettings(root=tmp_path))
    for number in range(1030):
        assert site.repository(f"r{number}") is not None
    assert len(site.names()) == 1024
