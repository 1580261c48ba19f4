"""Release and InRelease: what is read, what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from support.repos import START, apt, packages
from tidings_chunkstore.apt import cleartext
from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.ids import ContentId
from tidings_chunkstore.layout import APT, Checksum
from tidings_chunkstore.limits import LIMITS

A, B, C = "a" * 64, "b" * 64, "c" * 32

RELEASE = f"""Origin: Example
Date: Sat, 22 Aug 2026 12:50:52 +0000
Valid-Until: Sat, 29 Aug 2026 12:50:52 UTC
Acquire-By-Hash: yes
MD5Sum:
 {C} 90 main/binary-amd64/Packages.gz
SHA256:
 {A} 90 main/binary-amd64/Packages.gz
 {B} 300 main/binary-amd64/Packages
 {A} 7 main/binary-amd64/Release
 {A} 8 main/Contents-amd64.xz
 {A} 9 main/i18n/Translation-en.bz2
"""


def clearsigned(text: str) -> bytes:
    return (
        "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\n"
        + text
        + "-----BEGIN PGP SIGNATURE-----\n\nabcd\n=abcd\n-----END PGP SIGNATURE-----\n"
    ).encode()


def test_every_field() -> None:
    listing = APT.parse(RELEASE.encode())
    assert (listing.layout, listing.main) == ("apt", "Release")
    assert (listing.timestamp, listing.valid_until) == (1787403052, 1788007852)
    assert listing.revision == "Sat, 22 Aug 2026 12:50:52 +0000"
    files = listing.by_path()
    packed, plain = files["main/binary-amd64/Packages.gz"], files["main/binary-amd64/Packages"]
    assert packed.track == plain.track == plain.path
    assert (packed.size, packed.checksum, packed.timestamp) == (
        90,
        Checksum("sha256", A),
        1787403052,
    )
    assert packed.open_id == plain.open_id == ContentId.from_hex(B)
    assert packed.open_size == plain.open_size == 300
    assert files["main/Contents-amd64.xz"].open_id is None
    assert {file.type for file in listing.files} == {
        *("packages", "component-release", "contents", "translation")
    }
    assert [file.rank for file in listing.files] == [1, 1, 3, 6, 8]


def test_inrelease_says_what_release_says() -> None:
    listing = APT.parse(clearsigned(RELEASE))
    assert listing.main == "InRelease"
    assert listing.files == APT.parse(RELEASE.encode()).files


def test_the_termux_spelling_of_md5_and_weak_sections() -> None:
    listing = APT.parse(f"MD5:\n {C} 1 Packages\n".encode())
    (file,) = listing.files
    assert file.checksum == Checksum("md5", C)
    assert file.open_id is None
    assert (listing.timestamp, listing.revision) == (0, "")


def test_sha512_where_it_is_the_best() -> None:
    text = f"SHA1:\n {'d' * 40} 1 Packages\nSHA512:\n {A}{A} 1 Packages\n"
    (file,) = APT.parse(text.encode()).files
    assert file.checksum == Checksum("sha512", A + A)


def test_a_release_that_lists_itself() -> None:
    listing = APT.parse(f"SHA256:\n {A} 1 Packages\n {B} 0 Release\n".encode())
    assert [file.path for file in listing.files] == ["Packages"]
    assert listing.skipped == (("Release", "lists itself"),)


def test_line_ends_of_windows() -> None:
    crlf = RELEASE.replace("\n", "\r\n").encode()
    assert APT.parse(crlf).files == APT.parse(RELEASE.encode()).files
    assert APT.parse(clearsigned(RELEASE).replace(b"\n", b"\r\n")).files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no list of files"),
        ("Origin: x\n", "no list of files"),
        ("<html>\n", "not a field"),
        ("\x00", "not a field"),
        ("Origin: \xff\n", "not UTF-8 at byte 8"),
        (" x\n", "continuation"),
        (RELEASE + "\nOrigin: second\n", "second paragraph"),
        (RELEASE + "Date: x\n", "twice"),
        ("SHA256:\n x 1 Packages\n", "not a sha256"),
        (f"SHA256:\n {A} -1 Packages\n", "not a number"),
        (f"SHA256:\n {A} 1\n", "not a file"),
        (f"SHA256:\n {A} 1 ../x\n", "unsafe path"),
        (f"SHA256:\n {A} 1 /x\n", "unsafe path"),
        (f"SHA256:\n {A} 1 tidings/x\n", "belongs to Tidings"),
        (f"SHA256:\n {A} 1 a\n {A} 1 a/b\n", "file and as a folder"),
        (f"SHA256:\n {A} 1 a\n {B} 1 a\n", "two different entries"),
        (f"MD5Sum:\n {C} 2 a\nSHA256:\n {A} 1 a\n", "two different entries"),
        (f"SHA256:\n {A} {LIMITS.published + 1} a\n", "above the limit"),
        (f"Date: yesterday\nSHA256:\n {A} 1 a\n", "not a date"),
        (f"Date: Sat, 31 Feb 2026 12:50:52 UTC\nSHA256:\n {A} 1 a\n", "not a date"),
        (f"Date: Sat, 22 Aug 2026 12:50:52 +9900\nSHA256:\n {A} 1 a\n", "not a date"),
        (f"Date: Sat, 22 Aug 1926 12:50:52 UTC\nSHA256:\n {A} 1 a\n", "before 1970"),
        ("SHA256:\n" + "".join(f" {A} 1 f{n}\n" for n in range(LIMITS.files + 1)), "more than"),
    ],
)
def test_broken_releases_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        APT.parse(text.encode("latin-1"))
    assert "\n" not in str(caught.value)


def test_dash_escapes_go() -> None:
    assert cleartext(clearsigned("- -----x\nA: b  \n\n- From\n")) == b"-----x\nA: b\n\nFrom\n"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        RELEASE.encode(),
        b"x\n" + clearsigned(RELEASE),
        clearsigned(RELEASE) + b"x\n",
        clearsigned(RELEASE) + clearsigned(RELEASE),
        clearsigned(RELEASE).replace(b"Hash: SHA512", b"Comment: x"),
        clearsigned(RELEASE).replace(b"Origin", b"-Origin"),
        clearsigned(RELEASE)[: -len("-----END PGP SIGNATURE-----\n")],
        clearsigned(RELEASE)[: len(RELEASE)],
    ],
)
def test_what_is_no_clearsigned_message(data: bytes) -> None:
    with pytest.raises(FormatError):
        cleartext(data)


def test_an_inrelease_without_armor_is_refused() -> None:
    with pytest.raises(FormatError, match="clearsigned"):
        APT.parse(RELEASE.encode(), "InRelease")


def test_the_order_of_switching() -> None:
    assert APT.mains() == ("Release.gpg", "Release", "InRelease")
    assert APT.beside("InRelease") == ("Release.gpg", "Release")
    assert APT.beside("Release") == ("Release.gpg",)


def test_generated_indexes_are_read(tmp_path: Path) -> None:
    listing = APT.parse(apt(tmp_path, packages(10)).read_bytes())
    assert listing.timestamp == START
    plain = tmp_path / "main/binary-amd64/Packages"
    packed = listing.by_path()["main/binary-amd64/Packages.gz"]
    assert packed.open_id == hashlib.sha256(plain.read_bytes()).digest()
