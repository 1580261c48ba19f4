"""repomd.xml: what is read, what is left out, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.repos import START, packages, rpm_md
from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.ids import ContentId
from tidings_chunkstore.layout import RPM_MD, Checksum
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.rpmmd import track_of

A, B = "a" * 64, "b" * 64


def record(
    kind: str = "primary",
    href: str = "repodata/x-primary.xml.gz",
    *,
    checksum: str = f'<checksum type="sha256">{A}</checksum>',
    rest: str = "<size>10</size>",
    base: str = "",
) -> str:
    return f'<data type="{kind}">{checksum}<location href="{href}"{base}/>{rest}</data>'


def repomd(*inner: str) -> bytes:
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<repomd xmlns="http://linux.duke.edu/metadata/repo">'
        f"<revision>7</revision>{''.join(inner)}</repomd>"
    ).encode()


def test_every_field_of_a_record() -> None:
    listing = RPM_MD.parse(
        repomd(
            record(
                rest=f'<open-checksum type="sha256">{B}</open-checksum><size>10</size>'
                "<open-size>99</open-size><timestamp>1700000000.25</timestamp>"
                "<database_version>10</database_version>"
            ),
            "<tags><content>tidings</content><distro>ignored</distro></tags>",
        )
    )
    (file,) = listing.files
    assert (file.path, file.type, file.track) == (
        "repodata/x-primary.xml.gz",
        "primary",
        "primary",
    )
    assert (file.size, file.open_size, file.timestamp) == (10, 99, 1_700_000_000)
    assert file.checksum == Checksum("sha256", A)
    assert file.open_id == ContentId.from_hex(B)
    assert (listing.layout, listing.main) == ("rpm-md", "repodata/repomd.xml")
    assert (listing.timestamp, listing.revision, listing.tags) == (1_700_000_000, "7", ("tidings",))
    assert listing.skipped == ()


def test_what_a_record_may_lack() -> None:
    (file,) = RPM_MD.parse(repomd(record(checksum="", rest=""))).files
    assert (file.size, file.checksum, file.open_size, file.open_id, file.timestamp) == (
        None,
        None,
        None,
        None,
        0,
    )


def test_an_open_checksum_of_another_kind_names_no_content() -> None:
    rest = f'<open-checksum type="sha512">{B}{B}</open-checksum>'
    (file,) = RPM_MD.parse(repomd(record(rest=rest))).files
    assert file.open_id is None


@pytest.mark.parametrize(
    ("name", "size", "means"), [("sha", 20, "sha1"), ("SHA512", 64, "sha512"), ("md5", 16, "md5")]
)
def test_checksum_names(name: str, size: int, means: str) -> None:
    checksum = f'<checksum type="{name}">{"AB" * size}</checksum>'
    (file,) = RPM_MD.parse(repomd(record(checksum=checksum))).files
    assert file.checksum == Checksum(means, "ab" * size)
    assert file.checksum.strong is (means == "sha512")


def test_no_namespace_is_read_too() -> None:
    data = repomd(record()).replace(b' xmlns="http://linux.duke.edu/metadata/repo"', b"")
    assert len(RPM_MD.parse(data).files) == 1


def test_files_come_in_the_order_of_their_use() -> None:
    kinds = ["other_db", "other", "filelists", "appstream", "prestodelta", "updateinfo"]
    kinds += ["modules", "group_gz", "group", "primary_zck", "primary"]
    listing = RPM_MD.parse(repomd(*(record(kind, f"repodata/{kind}") for kind in kinds)))
    assert [file.type for file in listing.files] == [
        *("primary", "primary_zck", "group", "group_gz", "modules", "updateinfo"),
        *("prestodelta", "filelists", "other", "appstream", "other_db"),
    ]


@pytest.mark.parametrize(
    ("kind", "track"),
    [
        ("primary", "primary"),
        ("primary_zck", "primary"),
        ("group_gz_zck", "group"),
        ("updateinfo_xz", "updateinfo"),
        ("primary_db", "primary_db"),
        ("_gz", "_gz"),
    ],
)
def test_tracks(kind: str, track: str) -> None:
    assert track_of(kind) == track


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        (record(base=' xml:base="https://elsewhere.example/"'), "xml:base"),
        (record(kind="a b"), "not a word"),
        (record(kind="x" * 65), "not a word"),
        (record().replace(' type="primary"', ""), "no type"),
        ('<data type="primary"><size>1</size></data>', "no location"),
        (record(checksum='<checksum type="crc32">00</checksum>'), "unknown checksum"),
    ],
)
def test_left_out_with_a_reason(inner: str, reason: str) -> None:
    listing = RPM_MD.parse(repomd(inner, record("other", "repodata/other")))
    assert [file.type for file in listing.files] == ["other"]
    ((_, why),) = listing.skipped
    assert reason in why


def test_an_empty_xml_base_is_none() -> None:
    assert len(RPM_MD.parse(repomd(record(base=' xml:base=""'))).files) == 1


def test_one_path_named_twice() -> None:
    listing = RPM_MD.parse(repomd(record("group"), record("group_gz")))
    assert [file.type for file in listing.files] == ["group"]
    assert listing.skipped == (("group_gz", "repodata/x-primary.xml.gz is named by group already"),)
    with pytest.raises(FormatError, match="two different records"):
        RPM_MD.parse(repomd(record("group"), record("group_gz", rest="<size>11</size>")))


@pytest.mark.parametrize(
    "href",
    [
        "",
        "/etc/passwd",
        "../x",
        "repodata/../../x",
        "repodata//x",
        "./x",
        "repodata/",
        "repodata/..",
        "a\\b",
        "a&#10;b",
        "a&#x202e;b",
        "tidings/head.json",
        ".tidings/x",
        "repodata/repomd.xml",
        "repodata/repomd.xml.asc",
        "x" * 256,
        "a/" * 300 + "b",
    ],
)
def test_unsafe_paths_are_refused(href: str) -> None:
    with pytest.raises(FormatError, match=r"repomd\.xml"):
        RPM_MD.parse(repomd(record(href=href)))


@pytest.mark.parametrize(
    "href",
    [
        *("pubring/pubring.kbx", "pubring/gpg.conf", "solv/many.solv", "metalink.xml", "repodata"),
        *("repodata/repomd.xml/x", "repodata/sub/primary.xml", "repodata2/x", "média data/x"),
    ],
)
def test_what_is_not_in_repodata_is_left_out(href: str) -> None:
    """dnf keeps its keys and solv files beside repodata/: no mirror names a file there."""
    good = record(href="repodata/good.xml")
    listing = RPM_MD.parse(repomd(good, record(kind="other", href=href)))
    assert [file.path for file in listing.files] == ["repodata/good.xml"]
    assert [reason for _, reason in listing.skipped] == ["its location is not in repodata/"]


DOCTYPE = b'<?xml version="1.0"?><!DOCTYPE repomd [<!ENTITY a "b">]><repomd/>'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not XML"),
        (b"<html><body>404</body></html>", "its root is <html>"),
        (b"<repomd>", "not XML"),
        (repomd(record())[:-12], "not XML"),
        (repomd(record()) + b"<x/>", "not XML"),
        (DOCTYPE, "document type"),
        (b"<repomd>&x;</repomd>", "not XML"),
        (b'<?xml version="1.0" encoding="cp037"?><repomd/>', "encoding|not XML"),
        (b'<?xml version="1.0" encoding="no-such"?><repomd/>', "encoding|not XML"),
        (repomd(record(rest="<size>-1</size>")), "not a number"),
        (repomd(record(rest="<size>1_0</size>")), "not a number"),
        (repomd(record(rest=f"<size>{LIMITS.published + 1}</size>")), "above the limit"),
        (repomd(record(rest=f"<open-size>{LIMITS.content + 1}</open-size>")), "above the limit"),
        (repomd(record(rest="<size>" + "9" * 5000 + "</size>")), "too long"),
        (repomd(record(rest="<timestamp>99999999999999</timestamp>")), "above the limit"),
        (repomd(record(rest="<timestamp>1.x</timestamp>")), "not a time"),
        (repomd(record(rest="<size>1</size><size>2</size>")), "two size elements"),
        (repomd(record(rest='<location href="x"/>')), "two locations"),
        (repomd(record(checksum='<checksum type="sha256">aa</checksum>')), "not a sha256"),
        (repomd("<data>" * 20 + "</data>" * 20), "too many elements"),
        (repomd("<a/>" * (32 * LIMITS.files + 1)), "too many elements"),
        (repomd('<data type="x"/>' * (LIMITS.files + 1)), "records"),
        (repomd("<tags>" + "<content>x</content>" * 257 + "</tags>"), "tags"),
        (b"<repomd><revision>" + b"x" * 300 + b"</revision></repomd>", "short line"),
    ],
)
def test_broken_documents_are_refused_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        RPM_MD.parse(data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_too_large_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(FormatError, match="longer than"):
        RPM_MD.parse(b" " * (LIMITS.main + 1))


def test_the_order_of_switching() -> None:
    assert RPM_MD.mains()[-1] == "repodata/repomd.xml"
    assert RPM_MD.mains()[:-1] == RPM_MD.beside("repodata/repomd.xml")


@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "sha512"])
def test_generated_repositories_are_read(tmp_path: Path, algorithm: str) -> None:
    path = rpm_md(tmp_path, packages(10), codec={"primary": "xz"}, checksum=algorithm)
    listing = RPM_MD.parse(path.read_bytes())
    assert [file.type for file in listing.files] == [
        *("primary", "group", "group_gz", "updateinfo", "filelists", "other")
    ]
    assert listing.timestamp == START
    newer = RPM_MD.parse(rpm_md(tmp_path, packages(10), codec="zst").read_bytes())
    assert [file.path[-12:] for file in newer.files if file.track == "group"] == ["omps.xml.zst"]
    assert {file.checksum.algorithm for file in listing.files if file.checksum} == {algorithm}
