"""Where connections may go: kinds of addresses, spellings, names that resolve, real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.servers import Misbehaving
from support.syncing import HASTY
from tidings_chunkstore.errors import NetworkError
from tidings_client.guard import Guard, kind_of, literal
from tidings_client.remote import Remote, RemoteSettings

PUBLIC = "93.184.216.34"


def guard(*own: str, names: dict[str, list[str]] | None = None) -> Guard:
    """A guard whose resolver knows *names*, and the configured host as *own*."""
    known = {"mirrors.example.org": list(own) or [PUBLIC], **(names or {})}

    def resolve(host: str) -> Sequence[str]:
        found = literal(host)
        if found is not None:
            return [found]
        if host not in known:
            raise socket.gaierror(-2, "Name or service not known")
        return known[host]

    return Guard(("https://mirrors.example.org/metalink?repo=x",), resolve)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("8.8.8.8", "public"),
        ("2001:4860:4860::8888", "public"),
        ("127.0.0.1", "loopback"),
        ("127.8.9.10", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("::127.0.0.1", "loopback"),
        ("64:ff9b::7f00:1", "loopback"),
        ("2002:7f00:1::", "loopback"),
        ("10.0.0.1", "private"),
        ("172.31.255.255", "private"),
        ("192.168.0.1", "private"),
        ("100.64.0.1", "private"),
        ("198.18.0.1", "private"),
        ("fc00::1", "private"),
        ("fec0::1", "private"),
        ("::ffff:10.1.2.3", "private"),
        ("169.254.169.254", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("::ffff:169.254.169.254", "link-local"),
        ("0.0.0.0", "reserved"),
        ("::", "reserved"),
        ("224.0.0.1", "reserved"),
        ("ff02::1", "reserved"),
        ("255.255.255.255", "reserved"),
        ("240.0.0.1", "reserved"),
        ("no address", "reserved"),
    ],
)
def test_kinds(address: str, kind: str) -> None:
    assert kind_of(address) == kind


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "[::1]", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "127.1",
        "[::ffff:127.0.0.1]", "10.0.0.7", "169.254.169.254", "localhost", "a.localhost",
        "LOCALHOST.",
    ],
)  # fmt: skip
def test_spellings_are_refused_even_where_a_proxy_resolves(host: str) -> None:
    with pytest.raises(NetworkError, match="led there") as caught:
        guard().check_name(host)
    assert caught.value.code == "address"


@pytest.mark.parametrize("host", ["mirror.example.net", "8.8.8.8", "dead.beef.example.org", "cafe"])
def test_names_and_public_addresses_pass(host: str) -> None:
    guard().check_name(host)


def test_a_name_is_judged_by_what_it_resolves_to() -> None:
    names = {
        "good.example.net": [PUBLIC, "10.0.0.5", "2001:4860:4860::8888"],
        "evil.example.net": ["127.0.0.1", "10.0.0.5"],
    }
    rule = guard(names=names)
    assert rule.addresses("good.example.net") == [PUBLIC, "2001:4860:4860::8888"]
    with pytest.raises(NetworkError, match=r"127.0.0.1 \(loopback\), 10.0.0.5 \(private\)"):
        rule.addresses("evil.example.net")
    with pytest.raises(NetworkError) as caught:
        rule.addresses("nowhere.example.net")
    assert caught.value.code == "connect"


def test_the_configured_host_may_be_anywhere() -> None:
    rule = guard("10.0.0.1")
    assert rule.addresses("mirrors.example.org") is None
    assert rule.addresses("MIRRORS.example.org.") is None
    rule.check_name("mirrors.example.org")


@pytest.mark.parametrize(
    ("own", "allowed", "refused"),
    [
        ("10.0.0.1", ["192.168.1.1", "fc00::1"], ["127.0.0.1", "169.254.169.254"]),
        ("127.0.0.1", ["127.0.0.2", "::1"], ["10.0.0.1", "169.254.169.254"]),
        ("169.254.3.4", ["169.254.169.254"], ["127.0.0.1", "10.0.0.1"]),
        ("0.0.0.0", [], ["0.0.0.0", "127.0.0.1"]),
        ("224.0.0.9", [], ["224.0.0.9"]),
    ],
)
def test_its_kind_of_address_is_allowed_to_others(
    own: str, allowed: list[str], refused: list[str]
) -> None:
    rule = guard(own)
    for address in allowed:
        assert rule.addresses(address) == [address]
    for address in refused:
        with pytest.raises(NetworkError):
            rule.addresses(address)


# -- with sockets ----------------------------------------------------------------------------------


@contextmanager
def listener(host: str) -> Iterator[tuple[int, socket.socket]]:
    """A socket that listens, and would tell of a connection."""
    with socket.create_server((host, 0)) as server:
        server.settimeout(0.05)
        yield server.getsockname()[1], server


def knocked(server: socket.socket) -> bool:
    try:
        server.accept()[0].close()
    except TimeoutError:
        return False
    return True


def public_origin(names: dict[str, list[str]]) -> Guard:
    """127.0.0.1 is the configured host and counts as public, so that loopback is refused."""

    def resolve(host: str) -> Sequence[str]:
        if host == "127.0.0.1":
            return [PUBLIC]
        if host in names:
            return names[host]
        return [literal(host) or PUBLIC]

    return Guard(("http://127.0.0.1/",), resolve)


@pytest.mark.parametrize("where", ["127.0.0.2", "evil.test", "2130706434", "0x7f.2"])
def test_a_redirect_into_the_machine_is_not_followed(where: str, misbehaving: Misbehaving) -> None:
    rule = public_origin({"evil.test": ["127.0.0.2"]})
    with listener("127.0.0.2") as (port, server):
        misbehaving.fault("", status=302, headers=(("Location", f"http://{where}:{port}/x"),))
        settings = RemoteSettings(tries=2, backoff=0.01, guard=rule)
        with (
            Remote([misbehaving.url], settings) as remote,
            pytest.raises(NetworkError) as caught,
        ):
            remote.look("repodata/repomd.xml", 1000)
        assert caught.value.code == "address"
        assert not knocked(server)
    assert len(misbehaving.seen) == 1  # no second try: it would lead there again


def test_a_mirror_in_the_machine_is_passed_over(misbehaving: Misbehaving) -> None:
    (misbehaving.root / "repomd.xml").write_bytes(b"fine")
    rule = public_origin({"evil.test": ["127.0.0.2"]})
    with listener("127.0.0.2") as (port, server):
        urls = [f"http://evil.test:{port}/", f"http://127.0.0.2:{port}/", misbehaving.url]
        got = bytearray()
        with Remote(urls, RemoteSettings(guard=rule)) as remote:
            remote.file("repomd.xml", got.extend, limit=100)
            assert remote.answered == f"{misbehaving.url}/"
        assert got == b"fine"
        assert not knocked(server)


def test_the_address_that_was_looked_at_is_the_one_that_is_used(misbehaving: Misbehaving) -> None:
    """A name that changes between the look and the connection gains nothing."""
    (misbehaving.root / "file").write_bytes(b"right")
    answers = iter([["127.0.0.1"], ["127.0.0.2"]])
    rule = Guard(
        ("http://127.0.0.3/",),  # loopback is allowed here
        lambda host: next(answers) if host == "rebind.test" else [host],
    )
    with listener("127.0.0.2") as (_, server):
        got = bytearray()
        with Remote([f"http://rebind.test:{misbehaving.port}/"], RemoteSettings(guard=rule)) as r:
            r.file("file", got.extend, limit=100)
        assert got == b"right"
        assert not knocked(server)
    assert misbehaving.seen[0].headers["host"] == f"rebind.test:{misbehaving.port}"


def test_the_next_address_is_tried_where_one_does_not_answer(misbehaving: Misbehaving) -> None:
    (misbehaving.root / "file").write_bytes(b"right")
    rule = Guard(("http://127.0.0.3/",), lambda host: ["127.0.0.77", "127.0.0.1"])
    got = bytearray()
    with Remote([f"http://two.test:{misbehaving.port}/"], RemoteSettings(guard=rule)) as remote:
        remote.file("file", got.extend, limit=100)
    assert got == b"right"


def test_a_proxy_is_the_callers_own(
    misbehaving: Misbehaving, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It may lie on loopback; names are for it to resolve, literal addresses are refused."""
    monkeypatch.setenv("http_proxy", misbehaving.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    misbehaving.answer(lambda seen: (200, seen.path.encode()))
    rule = public_origin({})
    got = bytearray()
    with Remote(["http://mirror.test/u/"], RemoteSettings(guard=rule)) as remote:
        remote.file("file", got.extend, limit=100)
    assert got == b"http://mirror.test/u/file"
    with (
        Remote(["http://127.0.0.2/u/"], RemoteSettings(tries=1, guard=rule)) as remote,
        pytest.raises(NetworkError) as caught,
    ):
        remote.file("file", got.extend, limit=100)
    assert caught.value.code == "address"


def test_a_host_with_another_alphabet_is_known_by_its_name_on_the_wire() -> None:
    rule = Guard(("https://spiegel-münchen.example/",), lambda host: ["10.0.0.1"])
    assert rule.addresses("xn--spiegel-mnchen-osb.example") is None
    assert HASTY.guard is None  # a caller without strangers' URLs needs none
