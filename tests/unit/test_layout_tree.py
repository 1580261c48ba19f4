"""Reading a tree: proven whole, or refused with the reason."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import tidings_chunkstore.layout as layout_module
from support.repos import DAY, START, apt, evolve, packages, rpm_md, rpm_md_by_createrepo_c
from tidings_chunkstore.errors import InputError, LocalError, UnsettledError
from tidings_chunkstore.layout import (
    APT,
    LAYOUTS,
    RPM_MD,
    TreeListing,
    by_name,
    detect,
    read_tree,
    unchanged,
)

DATA = Path(__file__).parents[3] / "shared" / "data"
MADE = packages(12)


@pytest.fixture
def rpm(tmp_path: Path) -> Path:
    rpm_md(tmp_path / "rpm", MADE, codec="gz", asc=b"signature", key=b"key")
    return tmp_path / "rpm"


@pytest.fixture
def deb(tmp_path: Path) -> Path:
    apt(tmp_path / "deb", MADE, present=["amd64"])
    return tmp_path / "deb"


def still(tree: TreeListing, **options: object) -> bool:
    return unchanged(
        tree.root,
        tree.layout,
        {main.file.path: main.id for main in tree.mains},
        {file.file.path: file.size for file in tree.files},
        **options,  # type: ignore[arg-type]
    )


def code_of(action: Callable[[], object]) -> tuple[type, str]:
    with pytest.raises((InputError, LocalError)) as caught:
        action()
    assert "\n" not in str(caught.value)
    return type(caught.value), caught.value.code


def test_an_rpm_md_tree(rpm: Path) -> None:
    tree = read_tree(rpm)
    assert tree.layout is RPM_MD
    assert [main.file.type for main in tree.mains] == ["key", "signature", "repomd"]
    assert tree.main.data == (rpm / "repodata/repomd.xml").read_bytes()
    assert tree.main.id == hashlib.sha256(tree.main.data).digest()
    assert [file.file for file in tree.files] == list(tree.listing.files)
    for file in tree.files:
        data = file.source.read_bytes()
        assert (len(data), hashlib.sha256(data).digest()) == (file.size, file.id)
    assert tree.absent == ()


def test_an_apt_tree_with_one_of_two_architectures(deb: Path) -> None:
    tree = read_tree(deb)
    assert tree.layout is APT
    assert [main.file.type for main in tree.mains] == ["signature", "release", "inrelease"]
    assert {file.file.path for file in tree.files} == {
        "main/binary-amd64/Packages",
        "main/binary-amd64/Packages.gz",
    }
    assert set(tree.absent) == {"main/binary-arm64/Packages", "main/binary-arm64/Packages.gz"}


def test_an_apt_tree_without_inrelease(tmp_path: Path) -> None:
    apt(tmp_path, MADE, signed=False)
    tree = read_tree(tmp_path)
    assert [main.file.path for main in tree.mains] == ["Release"]


def test_detect(rpm: Path, deb: Path, tmp_path: Path) -> None:
    assert detect(rpm) is RPM_MD
    assert detect(deb) is APT
    assert detect(tmp_path) is None
    assert detect(tmp_path / "none") is None
    assert [by_name(name) for name in LAYOUTS] == [RPM_MD, APT]
    with pytest.raises(InputError, match="rpm-md, apt"):
        by_name("pacman")


def test_no_metadata(rpm: Path, tmp_path: Path) -> None:
    assert code_of(lambda: read_tree(tmp_path)) == (InputError, "no-metadata")
    assert code_of(lambda: read_tree(tmp_path / "none", RPM_MD)) == (InputError, "no-metadata")
    assert code_of(lambda: read_tree(rpm, APT)) == (InputError, "no-metadata")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "broken-metadata"),
        (b"<repomd>", "broken-metadata"),
        (b"<repomd/>", "broken-metadata"),
        (b'<repomd><data type="primary"/></repomd>', "broken-metadata"),
        (b'<repomd><data type="x"><location href="../x"/></data></repomd>', "unsafe-path"),
    ],
)
def test_broken_metadata(rpm: Path, data: bytes, code: str) -> None:
    (rpm / "repodata/repomd.xml").write_bytes(data)
    assert code_of(lambda: read_tree(rpm)) == (InputError, code)


def test_a_release_without_files(tmp_path: Path) -> None:
    (tmp_path / "Release").write_text("Suite: x\nDate: Tue, 14 Nov 2023 22:13:20 UTC\nSHA256:\n")
    with pytest.raises(InputError, match="Release names no file that can be published"):
        read_tree(tmp_path)


def primary(root: Path) -> Path:
    return next(root.glob("repodata/*primary.xml.gz"))


def test_unsettled(rpm: Path) -> None:
    path = primary(rpm)
    data = path.read_bytes()
    path.unlink()
    assert code_of(lambda: read_tree(rpm)) == (UnsettledError, "missing-files")
    path.write_bytes(data[:-1])
    assert code_of(lambda: read_tree(rpm)) == (UnsettledError, "wrong-size")
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert code_of(lambda: read_tree(rpm)) == (UnsettledError, "wrong-checksum")
    path.write_bytes(data)
    read_tree(rpm)


@pytest.mark.parametrize("algorithm", ["sha1", "sha512"])
def test_other_checksums_are_proven_too(tmp_path: Path, algorithm: str) -> None:
    rpm_md(tmp_path, MADE, checksum=algorithm)
    tree = read_tree(tmp_path)
    assert tree.files[0].id == hashlib.sha256(primary(tmp_path).read_bytes()).digest()
    data = primary(tmp_path).read_bytes()
    primary(tmp_path).write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert code_of(lambda: read_tree(tmp_path)) == (UnsettledError, "wrong-checksum")


def test_apt_unsettled(deb: Path, tmp_path: Path) -> None:
    path = deb / "main/binary-amd64/Packages"
    data = path.read_bytes()
    path.write_bytes(data[::-1])
    assert code_of(lambda: read_tree(deb)) == (UnsettledError, "wrong-checksum")
    path.write_bytes(data)
    newer = tmp_path / "newer"
    apt(newer, evolve(MADE, 1), present=["amd64"], timestamp=START + DAY)
    shutil.copy(newer / "Release", deb / "Release")
    assert code_of(lambda: read_tree(deb)) == (UnsettledError, "mixed-release")
    shutil.rmtree(newer / "main")
    assert code_of(lambda: read_tree(newer)) == (UnsettledError, "missing-files")


def test_a_main_file_that_changes_meanwhile(rpm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prove = layout_module._prove

    def switch(*arguments: object) -> object:
        result = prove(*arguments)  # type: ignore[arg-type]
        (rpm / "repodata/repomd.xml.asc").write_bytes(b"another")
        return result

    monkeypatch.setattr(layout_module, "_prove", switch)
    assert code_of(lambda: read_tree(rpm)) == (UnsettledError, "moving")


def test_symlinks(rpm: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    path = primary(rpm)
    target = shutil.move(path, store / "blob")
    path.symlink_to(target)
    assert code_of(lambda: read_tree(rpm)) == (InputError, "outside")
    tree = read_tree(rpm, follow=[store])
    assert tree.files[0].source == store.resolve() / "blob"
    assert still(tree, follow=[store])
    assert not still(tree)
    path.unlink()
    path.symlink_to(shutil.move(target, rpm / "inside"))
    assert read_tree(rpm).files[0].id == tree.files[0].id
    link = tmp_path / "link"
    link.symlink_to(rpm)
    read_tree(link)


def test_a_sibling_with_the_roots_name_as_prefix_is_outside(rpm: Path) -> None:
    other = rpm.with_name("rpm-private")
    other.mkdir()
    target = shutil.move(primary(rpm), other / "blob")
    Path(rpm / "repodata" / read_tree_name(rpm)).symlink_to(target)
    assert code_of(lambda: read_tree(rpm)) == (InputError, "outside")


def read_tree_name(rpm: Path) -> str:
    listing = RPM_MD.parse((rpm / "repodata/repomd.xml").read_bytes())
    return listing.files[0].path.removeprefix("repodata/")


def test_what_is_no_regular_file(rpm: Path) -> None:
    path = primary(rpm)
    path.unlink()
    os.mkfifo(path)
    assert code_of(lambda: read_tree(rpm)) == (InputError, "not-a-file")
    path.unlink()
    path.symlink_to(path.name)
    assert code_of(lambda: read_tree(rpm)) == (LocalError, "unreadable")
    main = rpm / "repodata/repomd.xml"
    main.unlink()
    os.mkfifo(main)
    assert code_of(lambda: read_tree(rpm)) == (InputError, "not-a-file")
    main.unlink()
    main.mkdir()
    assert code_of(lambda: read_tree(rpm)) == (InputError, "not-a-file")


def test_unchanged_rpm_md(rpm: Path) -> None:
    tree = read_tree(rpm)
    assert still(tree)
    path = primary(rpm)
    data = path.read_bytes()
    path.write_bytes(data + b"x")
    assert not still(tree)
    path.unlink()
    assert not still(tree)
    path.write_bytes(data)
    assert still(tree)
    (rpm / "repodata/repomd.xml.asc").write_bytes(b"signed again")
    assert not still(tree)
    (rpm / "repodata/repomd.xml.asc").unlink()
    assert not still(tree)
    rpm_md(rpm, evolve(MADE, 1), timestamp=START + DAY)
    assert not still(tree)
    shutil.rmtree(rpm)
    assert not still(tree)


def test_unchanged_apt_sees_late_files(deb: Path) -> None:
    tree = read_tree(deb)
    assert still(tree)
    apt(deb, MADE)  # the same Release, and now the other architecture's files
    assert not still(tree)
    assert len(read_tree(deb).files) == 4


def test_createrepo_c_output(tmp_path: Path) -> None:
    pytest.importorskip("createrepo_c", reason="pip install createrepo_c")
    rpm_md_by_createrepo_c(tmp_path, MADE, compression="gz", databases=True, tags=["tidings"])
    tree = read_tree(tmp_path)
    assert tree.listing.tags == ("tidings",)
    assert [file.file.type for file in tree.files] == [
        *("primary", "filelists", "other", "filelists_db", "other_db", "primary_db")
    ]
    assert all(file.file.open_id and file.file.open_size for file in tree.files)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "versions", "mains", "files"),
    [
        ("rpmsphere-noarch", 6, 1, 30),
        ("linux-surface-f39", 8, 2, 24),
        ("trivy-el7", 60, 1, 360),
        ("tur-aarch64", 60, 3, 120),
    ],
)
def test_real_histories(name: str, versions: int, mains: int, files: int) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not there: real histories are not part of the project")
    trees = [read_tree(root) for root in sorted((DATA / name).iterdir())]
    assert len(trees) == versions
    assert {len(tree.mains) for tree in trees} == {mains}
    assert sum(len(tree.files) for tree in trees) == files
    assert all(tree.listing.timestamp > 1_600_000_000 for tree in trees)
    assert all(file.file.open_id for tree in trees for file in tree.files)
    assert all(still(tree) for tree in trees)
