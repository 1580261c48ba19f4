"""Mirrors by their URLs, what a run learns about each, and where redirects may lead."""

from __future__ import annotations

from urllib.parse import quote

import httpx

from tidings_chunkstore.errors import InputError, NetworkError


class Failed(Exception):
    """One attempt at one mirror failed. *again*: a later one at the same mirror may not."""

    def __init__(self, error: NetworkError, *, again: bool = False, after: float = 0.0) -> None:
        super().__init__(str(error))
        self.error = error
        self.again = again
        self.after = after  #: seconds that the server asks to wait


class Mirror:
    """One base URL, and what this run has learnt about it."""

    def __init__(self, url: str, index: int) -> None:
        self.base = base_url(url)
        self.index = index
        self.moved: httpx.URL | None = None  #: where its redirects lead, used while that works
        self.penalty = 0  #: failures of the network
        self.ranges = True  #: whether it answers ranges

    def url(self, path: str) -> httpx.URL:
        base = self.moved or self.base
        return base.copy_with(raw_path=base.raw_path + quote(path, safe="/").encode())

    def __str__(self) -> str:
        return shown(self.base)


class Page(Mirror):
    """A document with a URL of its own, query and all: a metalink, a mirrorlist."""

    def __init__(self, url: str) -> None:
        self.base = web_url(url).copy_with(fragment=None)
        self.index = 0
        self.moved = None
        self.penalty = 0
        self.ranges = False

    def url(self, path: str) -> httpx.URL:
        return self.base


def base_url(text: str) -> httpx.URL:
    """*text* as a base URL that ends in a slash. Raises InputError."""
    url = web_url(text)
    if url.query or url.fragment:
        raise InputError(
            f"a repository's URL has no query or fragment: {shown(url)[:200]}", code="bad-url"
        )
    return url if url.path.endswith("/") else url.copy_with(raw_path=url.raw_path + b"/")


def web_url(text: str) -> httpx.URL:
    """*text* as a URL of http or https. Raises InputError."""
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError, TypeError) as error:
        raise InputError(f"not a URL: {str(text)[:200]!r}", code="bad-url") from error
    if not _is_web(url):
        raise InputError(
            f"not an http or https URL: {shown(url)[:200]!r} (like https://host/path/)",
            code="bad-url",
        )
    return url


def _is_web(url: httpx.URL) -> bool:
    port = url.port  # None: the scheme's own
    return url.scheme in ("http", "https") and url.host != "" and (port or 1) < 65_536


def shown(url: httpx.URL) -> str:
    """The URL for people and logs: no password in it."""
    return str(url.copy_with(username=None, password=None)) if url.userinfo else str(url)


def origin_of(url: httpx.URL) -> tuple[str, str, int]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme, 0)


def next_url(origin: httpx.URL, url: httpx.URL, location: str, mirror: Mirror) -> httpx.URL:
    """Where a redirect leads. Credentials go to the host they were given for, and nowhere else."""
    try:
        found = url.join(location)
    except (httpx.InvalidURL, ValueError) as error:
        raise Failed(NetworkError(f"{mirror}: a broken redirect", code="redirect")) from error
    if not _is_web(found):
        raise Failed(NetworkError(f"{mirror}: redirects to no web address", code="redirect"))
    if url.scheme == "https" and found.scheme == "http":
        raise Failed(
            NetworkError(f"{mirror}: redirects from https to http, refused", code="redirect")
        )
    if origin_of(found) == origin_of(origin):
        return found.copy_with(username=origin.username, password=origin.password)
    return found.copy_with(username=None, password=None)


def remember(mirror: Mirror, url: httpx.URL, path: str) -> None:
    """Ask for the next objects where the head was: a redirector may send each elsewhere."""
    tail = quote(path, safe="/").encode()
    if url.raw_path.endswith(b"/" + tail):
        mirror.moved = url.copy_with(raw_path=url.raw_path[: -len(tail)])
