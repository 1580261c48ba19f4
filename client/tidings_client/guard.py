"""Where connections may go: a stranger's word never leads into a private network.

URLs that the caller configured may lead anywhere. Those that a metalink or a mirrorlist names, and
redirects, are strangers' words. They lead to public addresses, or to addresses of a kind
(loopback, private, link-local) that a configured URL's own host has. The check is made on the very
address that is then connected to, so a name that changes its address gains nothing.

Kinds are those of the IANA special-purpose registries (RFC 6890), as ``ipaddress`` has them.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import httpx

from tidings_chunkstore.errors import NetworkError

PUBLIC = "public"
#: Kinds that a configured host may have and then allows; all others are never connected to.
_ALLOWABLE = frozenset({"loopback", "private", "link-local"})
_NUMERIC = re.compile(r"[0-9a-fx.]+", re.ASCII)  # what inet_aton might take for an address

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str], Sequence[str]]

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")  # RFC 8215: a site's own, never public
_COMPATIBLE = ipaddress.IPv6Network("::/96")  # IPv4-compatible, deprecated by RFC 4291
_SHARED = ipaddress.IPv4Network("100.64.0.0/10")  # carriers' and clouds' inner addresses


def resolve(host: str) -> list[str]:
    """All addresses of *host*, in the system's order. Raises OSError."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def kind_of(address: str) -> str:
    """What it leads to: ``public``, ``loopback``, ``private``, ``link-local`` or ``reserved``.

    An IPv6 address that carries an IPv4 one (mapped, 6to4, NAT64, Teredo) is as that one is.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "reserved"
    for inner in _carried(parsed):
        kind = _kind(inner)
        if kind != PUBLIC:
            return kind
    return PUBLIC


def _carried(address: IPAddress) -> Iterator[IPAddress]:
    """The IPv4 addresses that traffic to *address* may end at, and itself where it is none."""
    if isinstance(address, ipaddress.IPv4Address):
        yield address
        return
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
        return
    low = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address in _NAT64:
        yield low
        return
    if address in _COMPATIBLE and int(address) > 0xFFFF:
        yield low
        return
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    if address.sixtofour is None and address.teredo is None:
        yield address


def _kind(address: IPAddress) -> str:
    if address.is_loopback:
        return "loopback"
    if address.is_link_local:
        return "link-local"
    if address.is_multicast or address.is_unspecified:
        return "reserved"
    if isinstance(address, ipaddress.IPv4Address) and address in _SHARED:
        return "private"
    if address.is_reserved:
        return "reserved"
    # Releases of Python differ about the second.
    if isinstance(address, ipaddress.IPv6Address) and (
        address.is_site_local or address in _LOCAL_NAT64
    ):
        return "private"
    return PUBLIC if address.is_global and not address.is_private else "private"


def literal(host: str) -> str | None:
    """The address that *host* spells, decimal and hexadecimal forms too; None for a name."""
    text = host.strip("[]")
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        pass
    if not _NUMERIC.fullmatch(text.lower()):
        return None
    try:
        return socket.inet_ntoa(socket.inet_aton(text))
    except OSError:
        return None


@dataclass(slots=True)
class Guard:
    """The rule for one upstream.

    Args:
        urls: the configured ones; their hosts may have any address.
    """

    urls: tuple[str, ...]
    resolve: Resolve = resolve
    _own: frozenset[str] = field(init=False, default=frozenset())
    _kinds: frozenset[str] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        # Connections name a host as it goes over the wire, which for IDN is not as it is written.
        self._own = frozenset(_name(httpx.URL(url).raw_host.decode("ascii")) for url in self.urls)

    def addresses(self, host: str) -> Sequence[str] | None:
        """Where to connect to for *host*: addresses to try in order; None: any that it has.

        Raises NetworkError (``address``) when none of them is allowed, (``connect``) when it has
        none.
        """
        if _name(host) in self._own:
            return None
        try:
            found = self.resolve(host)
        except OSError as error:
            raise NetworkError(f"{host}: {error.strerror or error}", code="connect") from error
        allowed = [address for address in found if self._allowed(address)]
        if not allowed:
            raise self._refusal(host, found)
        return allowed

    def check_name(self, host: str) -> None:
        """Refuse *host* by its spelling alone: what can be known where a proxy connects.

        Raises NetworkError (``address``).
        """
        name = _name(host)
        if name in self._own:
            return
        address = literal(name)
        if address is None and (name == "localhost" or name.endswith(".localhost")):
            address = "127.0.0.1"
        if address is not None and not self._allowed(address):
            raise self._refusal(host, [address])

    def _allowed(self, address: str) -> bool:
        kind = kind_of(address)
        return kind == PUBLIC or (kind in _ALLOWABLE and kind in self._own_kinds())

    def _own_kinds(self) -> frozenset[str]:
        """The kinds of addresses that the configured hosts have; looked up once."""
        if self._kinds is None:
            found: set[str] = set()
            for name in self._own:
                try:
                    found.update(kind_of(address) for address in self.resolve(name))
                except OSError:
                    continue  # a host without an address allows nothing
            self._kinds = frozenset(found)
        return self._kinds

    @staticmethod
    def _refusal(host: str, found: Iterable[str]) -> NetworkError:
        told = ", ".join(f"{address} ({kind_of(address)})" for address in list(found)[:3])
        return NetworkError(
            f"{host}: a metalink, mirrorlist or redirect led there, and {told or 'no address'} is "
            "no place that others may send us to",
            code="address",
        )


def _name(host: str) -> str:
    return host.strip("[]").rstrip(".").lower()
