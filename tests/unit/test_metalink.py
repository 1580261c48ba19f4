"""Reading metalinks and mirrorlists: what counts, what is left out, what is refused."""

from __future__ import annotations

import hashlib

import pytest

from support.metalinks import metalink
from support.repos import START
from tidings_chunkstore.errors import FormatError
from tidings_client.listed import version_of
from tidings_client.metalink import LIMIT, parse_metalink, parse_mirrorlist

HTTPS = "https://mirrors.example.org/metalink?repo=updates&arch=x86_64"
HTTP = "http://mirrors.example.org/metalink?repo=updates&arch=x86_64"
A, B = "https://a.example.org/u/43/", "https://b.example.net/pub/u/43/"
NEW, OLD, OLDER = b"<repomd>3</repomd>", b"<repomd>2</repomd>", b"<repomd>1</repomd>"


def test_versions_and_mirrors_come_in_their_order() -> None:
    text = metalink(NEW, [A, B], [(OLDER, START - 9), (OLD, START - 5)])
    link = parse_metalink(text, HTTPS)
    assert link.mirrors == (A, B)
    assert [v.sha256 for v in link.versions] == [
        hashlib.sha256(data).hexdigest() for data in (NEW, OLD, OLDER)
    ]
    assert [v.timestamp for v in link.versions] == [START, START - 5, START - 9]
    assert link.versions[0].size == len(NEW)
    assert link.versions[0].sha512 == hashlib.sha512(NEW).hexdigest()
    assert [version_of(link.versions, d) for d in (NEW, OLD, OLDER, b"x")] == [0, 1, 2, None]


def test_the_preference_decides_not_the_place() -> None:
    text = metalink(NEW, [A, B]).replace(b'preference="100"', b'preference="7"')
    assert parse_metalink(text, HTTPS).mirrors == (B, A)


def test_sha512_alone_is_enough_and_md5_is_not() -> None:
    link = parse_metalink(metalink(NEW, [A], hashes=("md5", "sha512")), HTTPS)
    assert link.versions[0].sha256 is None
    assert version_of(link.versions, NEW) == 0
    with pytest.raises(FormatError, match="no SHA-256"):
        parse_metalink(metalink(NEW, [A], hashes=("md5", "sha1")), HTTPS)


def test_a_weak_alternate_is_left_out() -> None:
    text = metalink(NEW, [A], [(OLD, START - 5)]).decode()
    head, tail = text.split("<mm0:alternates>")
    weak = tail.replace('type="sha256"', 'type="crc"').replace('type="sha512"', 'type="crc"')
    assert len(parse_metalink(f"{head}<mm0:alternates>{weak}".encode(), HTTPS).versions) == 1


@pytest.mark.parametrize(
    "base",
    [
        "http://plain.example.org/u/",  # never from https to http
        "rsync://a.example.org/u/",
        "ftp://a.example.org/u/",
        "file:///srv/u/",
        "https://user:secret@a.example.org/u/",
        "https://a.example.org/u?x=/",
        "https:///u/",
        "https://a.example.org:99999/u/",
        "https://[::1/u/",
    ],
)
def test_mirrors_that_are_left_out(base: str) -> None:
    assert parse_metalink(metalink(NEW, [base, A]), HTTPS).mirrors == (A,)
    with pytest.raises(FormatError, match="names no mirror with https") as caught:
        parse_metalink(metalink(NEW, [base]), HTTPS)
    assert caught.value.code == "no-mirror"


def test_a_url_of_another_file_is_no_mirror() -> None:
    text = metalink(NEW, [A, B]).replace(b"u/43/repodata/repomd.xml", b"u/43/evil.xml", 1)
    assert parse_metalink(text, HTTPS).mirrors == (B,)


def test_http_stays_allowed_where_the_list_came_by_http() -> None:
    assert parse_metalink(metalink(NEW, ["http://p.example.org/u/"]), HTTP).mirrors == (
        "http://p.example.org/u/",
    )


def test_credentials_of_the_list_go_to_its_own_origin_alone() -> None:
    url = "https://user:secret@mirrors.example.org/metalink"
    own = "https://mirrors.example.org/u/"
    others = ["https://mirrors.example.org:8443/u/", "https://www.mirrors.example.org/u/"]
    mirrors = parse_metalink(metalink(NEW, [own, *others]), url).mirrors
    assert mirrors == ("https://user:secret@mirrors.example.org/u/", *others)


def test_mirrormanagers_answer_that_it_has_nothing_is_told() -> None:
    text = metalink(NEW, [A]).split(b" <files>")[0] + (
        b"<!--\n updates-99 not found or has no metalink \n-->\n</metalink>\n"
    )
    with pytest.raises(FormatError, match="updates-99 not found or has no metalink"):
        parse_metalink(text, HTTPS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not XML"),
        (b"<html><body>404</body></html>", "its root is <html>"),
        (b'<!DOCTYPE x [<!ENTITY a "b">]><metalink/>', "document type"),
        (b'<?xml version="1.0" encoding="utf-16"?><metalink/>', "metalink"),
        (b"<metalink>" + b"<a>" * 99, "too many elements"),
        (metalink(NEW, [A]).replace(b"<size>18", b"<size>1e9"), "is no number"),
        (metalink(NEW, [A]).replace(b"<size>18", b"<size>99999999999"), "at most"),
        (metalink(NEW, [A]).replace(b'"sha256">', b'"sha256">zz'), "not a sha256"),
        (
            metalink(NEW, [A]).replace(b"</files>", b'<file name="repomd.xml"/></files>'),
            "two files",
        ),
        (metalink(NEW, [A]).replace(b"https://a.", b"https://a." + b"a" * 3000), "too long"),
        (metalink(NEW, [A], [(OLD, 1)] * 70), "more than"),
        (metalink(NEW, [A] * 5000), "more than"),
        (b" " * (LIMIT + 1), "longer than"),
    ],
)
def test_what_is_refused(text: bytes, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        parse_metalink(text, HTTPS)


def test_a_file_of_another_name_is_passed_over() -> None:
    both = metalink(NEW, [A])
    start, end = both.index(b"  <file "), both.index(b" </files>")
    other = both[start:end].replace(b'"repomd.xml"', b'"comps.xml"').replace(A.encode(), B.encode())
    link = parse_metalink(both[:start] + other + both[start:], HTTPS)
    assert link.mirrors == (A,)
    assert len(link.versions) == 1


def test_a_mirrorlist() -> None:
    text = f"# repo = updates\n\n{A}\n http://plain.example.org/u \n{B[:-1]}\nnonsense\n{A}\n"
    assert parse_mirrorlist(text.encode(), HTTPS) == (A, B)
    assert parse_mirrorlist(text.encode(), HTTP) == (A, "http://plain.example.org/u/", B)
    none = "names no mirror"
    for bad, says in ((b"\xff\xfe", "not UTF-8"), (b"# nothing\n", none), (b"", none)):
        with pytest.raises(FormatError, match=says):
            parse_mirrorlist(bad, HTTPS)
