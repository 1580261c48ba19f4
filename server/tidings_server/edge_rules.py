"""What the edge decides, as pure functions: when to ask an upstream, and where a path leads."""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlsplit, urlunsplit

from tidings_chunkstore.layout import LAYOUTS

from .objects import is_hash_named

BACKOFF = 2.0  #: seconds after a first failure in which an upstream is left alone; doubles
BACKOFF_MOST = 300.0
#: Files of packages by their suffix: they never are metadata.
_PACKAGE = re.compile(r"\.(?:d?rpm|u?deb)$")
_IN_PATHS = "/%:@!$&'()*+,;=~"  # of a URL that is one already (RFC 3986, 3.3)
_BY_HASH = re.compile(r"(?:^|/)by-hash/[A-Za-z0-9]{1,16}/([0-9a-f]{32,128})$")
#: What names all other files, in any layout; apt asks for Release where there is no InRelease.
MAINS = frozenset({*(layout.mains()[-1] for layout in LAYOUTS.values()), "Release"})
#: What is switched with them.
BESIDE = frozenset(path for layout in LAYOUTS.values() for path in layout.mains()) - MAINS


class Do(enum.Enum):
    """What a request for a main file leads to."""

    SERVE = enum.auto()  #: what is held is fresh
    FETCH = enum.auto()  #: ask the upstream, and wait
    LATER = enum.auto()  #: the upstream failed a moment ago and is left alone


@dataclass(frozen=True, slots=True)
class Looks:
    """What is known of the looks at an upstream. Times in seconds since 1970, 0 for never."""

    checked: float = 0.0  #: the last one ended, well or not
    good: float = 0.0  #: the last one that ended well
    failures: int = 0  #: since then

    def age(self, now: float) -> float:
        """Seconds since the upstream last agreed with what is held."""
        return max(0.0, now - self.good)

    def again(self) -> float:
        """When it may be asked again after failures."""
        if not self.failures:
            return self.checked
        return self.checked + min(BACKOFF * 2.0 ** min(self.failures - 1, 20), BACKOFF_MOST)

    def is_fresh(self, now: float, fresh: float) -> bool:
        """Whether what is held is good without asking. A clock that was set back proves nothing."""
        return 0 <= now - self.good <= fresh


NEVER = Looks()


def decide(looks: Looks, held: bool, now: float, fresh: float) -> Do:
    """What to do at *now* when *held* says whether there is any state; *fresh* in seconds."""
    if held and looks.is_fresh(now, fresh):
        return Do.SERVE
    if looks.failures and looks.checked <= now < looks.again():
        return Do.LATER
    return Do.FETCH


class Kind(enum.Enum):
    """What a path below a repository asks for."""

    MAIN = enum.auto()  #: the file that names all others
    BESIDE = enum.auto()  #: goes with one main file: signature, key
    HASHED = enum.auto()  #: its name holds its checksum: the same in every state that has it
    PLAIN = enum.auto()  #: another file under its name in each state, if it is metadata
    PACKAGE = enum.auto()
    STORE = enum.auto()  #: below tidings/, which an edge has not


def kind_of(rest: str) -> Kind:
    """The kind of *rest*, a path relative to the repository."""
    if rest in MAINS:
        return Kind.MAIN
    if rest in BESIDE:
        return Kind.BESIDE
    if rest.startswith("tidings/"):
        return Kind.STORE
    if _PACKAGE.search(rest):
        return Kind.PACKAGE
    return Kind.HASHED if is_hash_named(rest) else Kind.PLAIN


def by_hash(rest: str) -> str | None:
    """The checksum in hexadecimal when *rest* is apt's look-up by content."""
    match = _BY_HASH.search(rest)
    return match[1] if match else None


def file_name(path: str) -> str:
    """The name of what is kept of the repository at *path*; with a suffix below the 255 bytes."""
    name = quote(path, safe="")
    if len(name) <= 200:
        return name
    return name[:120] + "-" + hashlib.sha256(path.encode()).hexdigest()[:24]


def public(url: str) -> str:
    """A base URL as it may be told to others: no credentials, query or fragment; ends with /."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    if not host.isascii():
        host = host.encode("idna").decode()
    path = parts.path if parts.path.endswith("/") else parts.path + "/"
    return urlunsplit((parts.scheme, host, quote(path, safe=_IN_PATHS), "", ""))


def location(base: str, rest: Sequence[str]) -> str:
    """The URL of *rest* below *base*: decoded parts, each quoted again, none of them ``..``."""
    assert rest
    assert not any(part in ("", ".", "..") or "/" in part for part in rest)
    return public(base) + "/".join(quote(part, safe="") for part in rest)


def archive(path: str, base: str) -> tuple[str, str] | None:
    """Where an apt archive lies here and there, for a suite at *path* and its *base* URL.

    apt names packages from the archive's root: ``deb http://edge/debian bookworm main`` asks for
    ``debian/pool/...``, which is not below ``debian/dists/bookworm``. None where *path* is no
    suite, or *base* does not end in the same ``dists/...``: then nothing says where the root is.
    """
    parts = path.split("/")
    if "dists" not in parts:
        return None
    at = len(parts) - 1 - parts[::-1].index("dists")
    suite = "/".join(quote(part, safe="") for part in parts[at:])
    there = public(base)
    if at == len(parts) - 1 or not there.endswith(f"/{suite}/"):
        return None
    return "/".join(parts[:at]), there.removesuffix(f"{suite}/")
