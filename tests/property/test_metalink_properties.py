"""Whatever a metalink holds: read as it was written, or refused; no address slips through."""

from __future__ import annotations

import ipaddress

import httpx
from hypothesis import example, given
from hypothesis import strategies as st

from support.metalinks import metalink
from tidings_chunkstore.errors import FormatError, NetworkError
from tidings_client.guard import PUBLIC, Guard, kind_of, literal
from tidings_client.metalink import parse_metalink, parse_mirrorlist

URL = "https://mirrors.example.org/metalink?repo=x"
GOOD = metalink(b"<repomd/>", ["https://a.example.org/u/"], [(b"<repomd>1</repomd>", 5)])
HOSTS = st.from_regex(r"[a-z][a-z0-9]{0,8}\.example\.(org|net)", fullmatch=True)


@given(
    st.binary(max_size=200),
    st.lists(st.tuples(st.binary(max_size=50), st.integers(0, 2**40)), max_size=5),
    st.lists(HOSTS, min_size=1, max_size=9, unique=True),
)
def test_what_was_written_is_read(
    newest: bytes, older: list[tuple[bytes, int]], hosts: list[str]
) -> None:
    bases = [f"https://{host}/u/" for host in hosts]
    link = parse_metalink(metalink(newest, bases, older), URL)
    assert link.mirrors == tuple(bases)
    assert len(link.versions) == 1 + len(older)
    assert [v.timestamp for v in link.versions[1:]] == sorted((t for _, t in older), reverse=True)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_or_read(data: bytes) -> None:
    for parse in (parse_metalink, parse_mirrorlist):
        try:
            found = parse(data, URL)
        except FormatError:
            continue
        mirrors = found if isinstance(found, tuple) else found.mirrors
        assert all(httpx.URL(mirror).scheme == "https" for mirror in mirrors)


@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=4))
def test_damage_is_refused_or_harmless(at: int, new: bytes) -> None:
    try:
        link = parse_metalink(GOOD[:at] + new + GOOD[at + len(new) :], URL)
    except FormatError:
        return
    assert all(mirror.startswith("https://") for mirror in link.mirrors)
    assert all(version.proves for version in link.versions)


V4 = st.ip_addresses(v=4)


@given(V4)
@example(ipaddress.IPv4Address("127.0.0.1"))
@example(ipaddress.IPv4Address("169.254.169.254"))
def test_every_way_to_write_an_address_is_the_address(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    a, b, c, d = address.packed
    spelled = [
        str(address),
        str(number),
        hex(number),
        f"0x{a:x}.{b}.{c * 256 + d}",
        f"0{a:o}.0{b:o}.0{c:o}.0{d:o}",
        f"{a}.{number & 0xFFFFFF}",
    ]
    assert {literal(text) for text in spelled} == {str(address)}
    kind = kind_of(str(address))
    carried = [
        f"::ffff:{address}",
        f"64:ff9b::{address}",
        str(ipaddress.IPv6Address((0x2002 << 112) | (number << 80))),
    ]
    assert {kind_of(text) for text in carried} == {kind}


@given(V4 | st.ip_addresses(v=6))
def test_what_python_calls_not_global_is_never_public(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    # What carries an IPv4 address is as that one is, whatever this release of Python says of it.
    carried = ("ipv4_mapped", "sixtofour", "teredo")
    if not address.is_global and not any(getattr(address, name, None) for name in carried):
        assert kind_of(str(address)) != PUBLIC
    guard = Guard(("https://mirrors.example.org/",), resolve=lambda host: ["203.0.114.5"])
    try:
        guard.check_name(str(address))
        allowed = True
    except NetworkError:
        allowed = False
    assert allowed == (kind_of(str(address)) == PUBLIC)
