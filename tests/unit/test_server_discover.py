"""Finding repositories without reading the packages' folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tidings_chunkstore.errors import LocalError
from tidings_server.discover import discover


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def found(top: Path) -> list[str]:
    return [str(path.relative_to(top)) for path in discover(top)]


def test_what_is_a_repository(tmp_path: Path) -> None:
    touch(tmp_path / "fedora/43/x86_64/repodata/repomd.xml")
    touch(tmp_path / "fedora/43/x86_64/debug/repodata/repomd.xml")
    touch(tmp_path / "fedora/43/x86_64/Packages/a/repodata/repomd.xml")
    touch(tmp_path / "fedora/43/x86_64/a/repodata/repomd.xml")
    touch(tmp_path / "fedora/43/x86_64/tidings/repodata/repomd.xml")
    touch(tmp_path / "fedora/empty/repodata/primary.xml")
    touch(tmp_path / "debian/dists/trixie/InRelease")
    touch(tmp_path / "debian/dists/trixie/main/binary-amd64/Release")
    touch(tmp_path / "debian/pool/main/x/Release")
    touch(tmp_path / "flat/Release")
    touch(tmp_path / ".snapshot/repodata/repomd.xml")
    assert found(tmp_path) == [
        "debian/dists/trixie",
        "fedora/43/x86_64",
        "fedora/43/x86_64/debug",
        "flat",
    ]


def test_the_top_itself_and_flat_trees(tmp_path: Path) -> None:
    touch(tmp_path / "repodata/repomd.xml")
    touch(tmp_path / "one.rpm")
    touch(tmp_path / "debug/repodata/repomd.xml")
    assert found(tmp_path) == [".", "debug"]


def test_a_folder_of_packages_is_not_gone_into(tmp_path: Path) -> None:
    touch(tmp_path / "files/one.rpm")
    touch(tmp_path / "files/below/repodata/repomd.xml")
    assert found(tmp_path) == []


def test_symlinks_are_not_followed_to_other_places(tmp_path: Path) -> None:
    touch(tmp_path / "43/repodata/repomd.xml")
    (tmp_path / "latest").symlink_to("43")
    (tmp_path / "loop").symlink_to(".")
    assert found(tmp_path) == ["43"]


def test_a_release_that_is_a_folder(tmp_path: Path) -> None:
    touch(tmp_path / "Release/x86_64/repodata/repomd.xml")
    assert found(tmp_path) == ["Release/x86_64"]


def test_the_depth_is_bounded(tmp_path: Path) -> None:
    touch(tmp_path.joinpath(*["d"] * 24) / "repodata" / "repomd.xml")
    touch(tmp_path.joinpath(*["e"] * 25) / "repodata" / "repomd.xml")
    assert found(tmp_path) == ["/".join(["d"] * 24)]


def test_a_top_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LocalError):
        list(discover(tmp_path / "none"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path / "a/repodata/repomd.xml")
    (tmp_path / "b").mkdir(mode=0)
    assert found(tmp_path) == ["a"]
