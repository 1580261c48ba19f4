"""``--types``: the choice among kin is librepo's."""

from __future__ import annotations

import pytest

from tidings_chunkstore.errors import InputError
from tidings_chunkstore.layout import Listing, PublishedFile, parse_types, select


def listing(*types: str) -> Listing:
    files = tuple(PublishedFile(f"repodata/{kind}", kind, kind, 1) for kind in types)
    return Listing("rpm-md", "repodata/repomd.xml", files, 0, "")


def chosen(present: str, wanted: str, zchunk: bool = False) -> str:
    return " ".join(file.type for file in select(listing(*present.split()), wanted, zchunk))


@pytest.mark.parametrize(
    ("present", "wanted", "zchunk", "expected"),
    [
        ("primary filelists", "primary", False, "primary"),
        ("primary primary_zck", "primary", False, "primary"),
        ("primary primary_zck", "primary", True, "primary_zck"),
        ("primary primary_zck", "primary_zck", False, "primary_zck"),
        ("primary primary_db", "primary", False, "primary"),
        ("primary primary_db", "primary_db", False, "primary_db"),
        # dnf asks for group_gz and takes group where there is none
        ("group group_gz", "group", False, "group_gz"),
        ("group", "group", False, "group"),
        ("group group_xz", "group", False, "group"),
        ("group_xz", "group", False, "group_xz"),
        ("group group_gz group_gz_zck", "group", True, "group_gz_zck"),
        # librepo looks for group_gz_zck only, so group_zck loses against group_gz
        ("group_gz group_zck", "group", True, "group_gz"),
        ("group_zck", "group", False, "group_zck"),
        ("updateinfo updateinfo_zck", "updateinfo", True, "updateinfo_zck"),
        ("updateinfo_xz", "updateinfo", False, "updateinfo_xz"),
        ("primary", "primary,modules,updateinfo", False, "primary"),
        ("custom primary", "custom", False, "custom"),
        ("other filelists primary", "@dnf5", False, "primary"),
        ("other filelists primary", "@dnf4", False, "filelists primary"),
        ("other primary", "@dnf5, other", False, "other primary"),
    ],
)
def test_choice(present: str, wanted: str, zchunk: bool, expected: str) -> None:
    assert chosen(present, wanted, zchunk) == expected


def test_none_is_all() -> None:
    assert len(select(listing("primary", "primary_zck", "x"), None)) == 3


def test_an_unknown_type_names_those_present() -> None:
    with pytest.raises(InputError, match=r"primry .*filelists, primary") as caught:
        select(listing("primary", "filelists"), "primry")
    assert caught.value.code == "unknown-type"


@pytest.mark.parametrize("wanted", ["", ",", "a b", "@dnf6", "primary,", "x" * 65, "../x"])
def test_what_is_no_type(wanted: str) -> None:
    with pytest.raises(InputError):
        parse_types(wanted)


def test_apt_has_its_own_types() -> None:
    files = (PublishedFile("main/Packages", "packages", "main/Packages", 1),)
    indexes = Listing("apt", "InRelease", files, 0, "")
    assert select(indexes, "packages") == files
    with pytest.raises(InputError, match="the repository has packages"):
        select(indexes, "@dnf5")


def test_each_type_once() -> None:
    assert parse_types(["primary", "@dnf5"]) == ("primary", "modules", "group", "updateinfo")
