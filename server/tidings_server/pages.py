"""Web pages for people: the repositories, each one's history, and the HTTP interface.

Written whole by the server: no script, no other host, one style sheet. Paths of pages begin with
``/-/``, which no repository's path can (``app.OWN_BELOW``); ``/`` and ``/docs`` are pages too.
What a page shows is in docs/pages.md.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Request, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from tidings_chunkstore.errors import StoreError
from tidings_chunkstore.head import Head
from tidings_chunkstore.pack import File
from tidings_client.progress import size_text

from . import pages_plots as plots
from .api import Shared
from .bundles import default_folder
from .metrics import Saved
from .pages_facts import (
    Histories,
    Search,
    Typical,
    Upstream,
    followed,
    pulled,
    served,
    stored_bytes,
    typical,
)
from .ranges import Validators, not_modified
from .settings import PulledSettings
from .site import Repository, split_path

BELOW = "/-/"
_REPO = "/-/repo/"
_PER_PAGE = 50  # repositories
_QUERY_MAX = 200  # characters
_PATIENCE = 1.5  # seconds that a page waits for what is read beside it
_HISTORY_ROWS = 200  # snapshots in a page's table

#: Nothing but our own style sheet may be loaded, and nothing may be run.
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_HOST = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}")
SORTS = {"path": "by path", "newest": "newest publish first", "oldest": "oldest publish first"}


@dataclass(frozen=True, slots=True)
class Row:
    """A repository in the list. *usual* is None where no step is known (yet: *reading*)."""

    name: str
    here: Repository | None = None
    head: Head | None = None
    usual: Typical | None = None
    reading: bool = False
    problem: str | None = None
    upstream: Upstream | None = None

    @property
    def published(self) -> int:
        """Bytes of the files that are published now."""
        return sum(file.size for file in self.head.files) if self.head else 0


@dataclass(frozen=True, slots=True)
class Part:
    """One page of a longer list."""

    rows: Sequence[Row]
    number: int
    pages: int
    first: int
    last: int
    total: int


class Pages:
    """Makes the pages. *describe* gives the OpenAPI description."""

    def __init__(
        self, shared: Shared, describe: Callable[[], Mapping[str, Any]], version: str
    ) -> None:
        self._shared = shared
        self._describe = describe
        self._histories = Histories()
        self._search = Search(shared.site, shared.settings.serve)
        self._searching: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None
        self.style = _template("style.css").encode()
        self.style_path = f"{BELOW}style-{hashlib.sha256(self.style).hexdigest()[:16]}.css"
        self._made = _environment()
        self._made.globals.update(style_path=self.style_path, version=version)

    def close(self) -> None:
        """End what runs beside the requests."""
        self._search.stop()

    # -- pages -------------------------------------------------------------------------------------

    async def index(self, request: Request) -> Response:
        """The list of repositories: ``?q=`` finds, ``?sort=`` orders, ``?page=`` turns over."""
        asked = request.query_params
        query = asked.get("q", "")[:_QUERY_MAX].strip()
        sort = asked.get("sort", "path")
        sort = sort if sort in SORTS else "path"
        await self._look()
        part = await self._shared.thread(self._part, query, sort, asked.get("page", "1"))
        part = replace(part, rows=await self._usual(part.rows))
        known = [row.usual for row in part.rows if row.usual]
        saved = await self._saved()
        settings = self._shared.settings
        return await self._page(
            request,
            "index.html",
            part=part,
            query=query,
            sort=sort,
            sorts=SORTS,
            found=self._search.found,
            all_full=sum(usual.all_full for usual in known),
            all_update=sum(usual.all_update for usual in known),
            steps=sum(usual.steps for usual in known),
            saved=saved,
            all_saved=sum(one.bytes for one in saved.values()),
            pulled=await self._shared.thread(self._pulled, query),
            searched=settings.serve.root is not None or settings.serve.store is not None,
            turn=lambda number: "?" + urlencode({"q": query, "sort": sort, "page": number}),
        )

    async def repository(self, request: Request) -> Response:
        """One repository."""
        raw: bytes = request.scope["raw_path"]
        rest = raw[len(_REPO) - 1 :]
        parts = () if rest == b"/" else split_path(rest)
        name = "/".join(parts) if parts is not None else None
        if name is None:
            return await self._problem(request, "There is no such repository.")
        row = (await self._shared.thread(self._read_rows, [name]))[0]
        if row.head is None or row.here is None:
            return await self._without_head(request, row)
        try:
            steps = await self._shared.thread(self._histories.read, row.here, row.head)
            problem = None
        except StoreError:
            steps, problem = (), _HOLES
        packs, stored = await self._shared.thread(_stored, row.here)
        head = row.head
        paths = [file.path for file in head.files]
        return await self._page(
            request,
            "repo.html",
            name=name,
            row=row,
            head=head,
            head_bytes=len(await self._shared.thread(row.here.head_bytes)),
            main=head.file(head.main),
            steps=steps[::-1][:_HISTORY_ROWS],
            older=max(0, len(steps) - _HISTORY_ROWS),
            usual=typical(steps),
            problem=problem,
            packs=packs,
            stored=stored,
            upstream=row.upstream,
            saved=(await self._saved()).get(name),
            updates=plots.update_plots(steps),
            churn=plots.churn_plots(steps),
            use=_use(_origin(request), name, head.layout, paths),
            signed=_signature(head),
            sizes={content.track: content.size for content in head.contents},
        )

    async def _without_head(self, request: Request, row: Row) -> Response:
        """A repository that is pulled through, or none."""
        settings = self._shared.settings
        repo = next((repo for repo in settings.pulled if repo.path == row.name), None)
        if repo is None or not settings.serve.pull_through:
            why = row.problem or "It is not published here, or its path is written otherwise."
            return await self._problem(request, why)
        upstream = await self._shared.thread(pulled, self._cache(), repo)
        use = _use(_origin(request), repo.path, repo.layout or "rpm-md", ())
        return await self._page(request, "pulled.html", name=repo.path, upstream=upstream, use=use)

    async def api_description(self, request: Request) -> Response:
        """The HTTP interface, out of its OpenAPI description."""
        description = self._describe()
        return await self._page(
            request, "docs.html", api=description, operations=_operations(description)
        )

    # -- what they are made of ---------------------------------------------------------------------

    async def _look(self) -> None:
        """Search for repositories beside the requests; the first page waits a moment for it."""
        if self._searching is not None and self._searching.done():
            self._searching = None
        if self._searching is None and self._search.due():
            self._searching = asyncio.ensure_future(_quiet(self._shared, self._search.run))
        if self._searching is not None and self._search.found.at is None:
            await asyncio.wait({self._searching}, timeout=_PATIENCE)

    def _part(self, query: str, sort: str, number: str) -> Part:
        """The repositories of one page, with what their heads say."""
        configured = {repo.path for repo in self._shared.settings.repos}
        names = {*self._search.found.names, *self._shared.site.names()}
        folded = query.casefold()
        # What has gone is listed no more; what the settings name is, published or not.
        fitting = sorted(
            name
            for name in names
            if folded in name.casefold() and (name in configured or self._search.has_head(name))
        )
        if sort != "path":
            sign = -1 if sort == "newest" else 1
            by_time = [(sign * self._published_at(name), name) for name in fitting]
            fitting = [name for _, name in sorted(by_time)]
        part = _part(fitting, number)
        return replace(part, rows=self._read_rows([row.name for row in part.rows]))

    def _published_at(self, name: str) -> int:
        here = self._shared.site.repository(name)
        try:
            return here.head().time if here is not None else 0
        except StoreError:
            return 0

    def _read_rows(self, names: Sequence[str]) -> list[Row]:
        rows = []
        settings = self._shared.settings
        for name in names:
            here = self._shared.site.repository(name) if served(name) else None
            upstream = followed(settings.follow.state, name, settings.repos)
            if here is None:
                rows.append(Row(name, upstream=upstream))
                continue
            try:
                rows.append(Row(name, here, here.head(), upstream=upstream))
            except StoreError:
                rows.append(Row(name, here, upstream=upstream, problem=_DAMAGED))
        return rows

    async def _usual(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with what an update takes, of those where it is known in time."""
        wanted = [(row.here, row.head) for row in rows if row.here and row.head]
        if self._reading is not None and self._reading.done():
            self._reading = None
        if any(self._histories.known(here, head) is None for here, head in wanted):
            if self._reading is None:

                def read() -> None:
                    for here, head in wanted:
                        try:
                            self._histories.read(here, head)
                        except StoreError:
                            continue  # its own page says what is wrong

                self._reading = asyncio.ensure_future(_quiet(self._shared, read))
            await asyncio.wait({self._reading}, timeout=_PATIENCE)
        found = []
        for row in rows:
            steps = row.here and row.head and self._histories.known(row.here, row.head)
            reading = row.head is not None and steps is None and not self._is_read()
            found.append(replace(row, usual=typical(steps or ()), reading=reading))
        return found

    def _is_read(self) -> bool:
        return self._reading is None or self._reading.done()

    def _pulled(self, query: str) -> list[tuple[PulledSettings, Upstream | None]]:
        settings = self._shared.settings
        if not settings.serve.pull_through:
            return []
        fitting = [repo for repo in settings.pulled if query.casefold() in repo.path.casefold()]
        return [(repo, pulled(self._cache(), repo)) for repo in fitting]

    async def _saved(self) -> Mapping[str, Saved]:
        counted = self._shared.metrics
        return {} if counted is None else await self._shared.thread(counted.saved)

    def _cache(self) -> Path | None:
        return self._shared.settings.serve.cache or default_folder()

    # -- answers -----------------------------------------------------------------------------------

    async def _problem(self, request: Request, why: str) -> Response:
        return await self._page(request, "problem.html", status=404, why=why)

    async def _page(
        self, request: Request, template: str, *, status: int = 200, **values: Any
    ) -> Response:
        """A page, or 304 where the client has it already."""
        values["now"] = int(time.time())
        made = self._made.get_template(template)
        # In a thread: a long page must not hold up who wants a delta.
        body = (await self._shared.thread(made.render, values)).encode()
        etag = b'"%b"' % hashlib.sha256(body).hexdigest()[:24].encode()
        headers = {**_HEADERS, "etag": etag.decode()}
        asked = request.headers.get("if-none-match")
        held = asked.encode("latin-1") if asked is not None and status == 200 else None
        if not_modified(Validators(etag, 0), held, None):
            return Response(status_code=304, headers=headers)
        return Response(body, status, headers, "text/html; charset=utf-8")


# What StoreError says may name folders of this machine, which are nobody's business.
_HOLES = "Not all of its packs can be read; tidings-mirror check names what is wrong."
_DAMAGED = "Its head cannot be read; tidings-mirror check names what is wrong."


async def _quiet(shared: Shared, call: Callable[[], None]) -> None:
    """Run *call* in a thread; that the server ends meanwhile is no error."""
    try:
        await shared.thread(call)
    except (CancelledError, RuntimeError):
        return


def _stored(here: Repository) -> tuple[int, int]:
    try:
        return stored_bytes(here)
    except StoreError:
        return 0, 0  # being moved away this moment


def _part(names: Sequence[str], number: str) -> Part:
    pages = max(1, -(-len(names) // _PER_PAGE))
    at = int(number) if number.isascii() and number.isdigit() and len(number) < 7 else 1
    at = min(max(at, 1), pages)
    first = (at - 1) * _PER_PAGE
    shown = [Row(name) for name in names[first : first + _PER_PAGE]]
    return Part(shown, at, pages, first + 1 if shown else 0, first + len(shown), len(names))


def _origin(request: Request) -> str:
    """Where this server is for who asks; a host that is none is not repeated."""
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        host = "mirror.invalid"
    return f"{request.url.scheme}://{host}"


@dataclass(frozen=True, slots=True)
class Use:
    """What a user needs: the address, and the lines for the package manager."""

    url: str
    kind: str  #: "dnf" or "apt"
    file: str
    lines: str
    folder: str


def _use(origin: str, name: str, layout: str, paths: Sequence[str]) -> Use:
    """*paths* are the files of an apt suite: its components are their first folders."""
    url = f"{origin}/{quote(name)}" if name else origin
    short = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.") or "repository"
    if layout == "apt":
        base, dists, suite = url.rpartition("/dists/")
        if dists:
            components = sorted({path.split("/")[0] for path in paths if "/binary-" in path})
            where = [f"URIs: {base}", f"Suites: {suite}"]
            where.append(f"Components: {' '.join(components) or 'main'}")
        else:
            where = [f"URIs: {url}", "Suites: ./"]
        key = f"Signed-By: /usr/share/keyrings/{short}.gpg"
        lines = "\n".join(["Types: deb", *where, key])
        return Use(url, "apt", f"/etc/apt/sources.list.d/{short}.sources", lines, f"./{short}")
    lines = "\n".join([f"[{short}]", f"name={short}", f"baseurl={url}/", "enabled=1", "gpgcheck=1"])
    return Use(url, "dnf", f"/etc/yum.repos.d/{short}.repo", lines, f"./{short}")


def _signature(head: Head) -> str | None:
    """The file that holds the signature of the main file, or None."""
    names = {file.path for file in head.files}
    if head.main.endswith("InRelease"):
        return head.main
    return next((n for n in (f"{head.main}.asc", f"{head.main}.gpg") if n in names), None)


# -- templates -------------------------------------------------------------------------------------


def _template(name: str) -> str:
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")


def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("tidings_server"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters.update(
        size=size_text,
        share=share_text,
        day=plots.day,
        minute=plots.minute,
        machine=plots.machine,
        ago=ago,
        code=_code,
        rebuilt=_rebuilt,
        repo_path=lambda name: _REPO + quote(name),
        shown=lambda name: f"/{name}",
        number=lambda value: f"{value:,}",
        members=_members,
    )
    return made


def share_text(share: float) -> str:
    """``0.7 %``, ``12 %``; what is not nothing is never shown as 0."""
    percent = share * 100
    if 0 < percent < 0.1:
        return "under 0.1 %"
    return f"{percent:.1f} %" if percent < 10 else f"{percent:.0f} %"


def ago(time: int, now: int) -> str:
    """How long before *now*, in the largest unit that fits."""
    seconds = now - time
    if seconds < 0:
        return "in the future"
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = seconds // size
        if count >= (2 if unit == "day" else 1):
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "just now"


def _code(text: str) -> Markup:
    """Plain text in which back quotes mark code, and asterisks a word."""
    found = Markup("")
    for part in re.split(r"(`[^`]+`|\*\w+\*)", text):
        if len(part) > 2 and part[0] == part[-1] == "`":
            found += Markup("<code>{}</code>").format(part[1:-1])
        elif len(part) > 2 and part[0] == part[-1] == "*":
            found += Markup("<em>{}</em>").format(part[1:-1])
        else:
            found += escape(part)
    return found


def _rebuilt(file: File) -> str:
    """How a client comes by the published bytes."""
    if file.recipe is None:
        return "as it is"
    return file.recipe.engine or "plain"


# -- the HTTP interface ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path."""

    id: str
    method: str
    path: str
    summary: str
    description: str
    parameters: Sequence[Mapping[str, Any]]
    body: Sequence[tuple[str, str, bool, str]]
    answers: Sequence[tuple[str, str, str]]  #: status, description, types


def _operations(description: Mapping[str, Any]) -> list[Operation]:
    found = []
    for path, methods in description.get("paths", {}).items():
        for method, said in methods.items():
            content = said.get("requestBody", {}).get("content", {})
            schema = next((kind.get("schema") for kind in content.values()), None)
            found.append(
                Operation(
                    re.sub(r"[^a-z0-9]+", "-", f"{method}{path}".lower()).strip("-"),
                    method.upper(),
                    path,
                    said.get("summary", ""),
                    said.get("description", ""),
                    said.get("parameters", ()),
                    _members(schema) if schema else (),
                    [
                        (
                            status,
                            answer.get("description", ""),
                            ", ".join(answer.get("content", ())),
                        )
                        for status, answer in said.get("responses", {}).items()
                    ],
                )
            )
    return found


def _members(schema: Mapping[str, Any]) -> list[tuple[str, str, bool, str]]:
    """Name, type, whether it is needed, and description of each member of an object."""
    needed = schema.get("required", ())
    return [
        (name, _type(said), name in needed, said.get("description", ""))
        for name, said in schema.get("properties", {}).items()
    ]


def _type(schema: Mapping[str, Any]) -> str:
    """A JSON Schema's type in words, as FastAPI writes such schemas."""
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "prefixItems" in schema:
        return f"[{', '.join(_type(one) for one in schema['prefixItems'])}]"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


def make_router(pages: Pages) -> APIRouter:
    """The routes of *pages*; none is part of the described interface."""
    router = APIRouter(include_in_schema=False)
    both = ["GET", "HEAD"]
    router.add_api_route("/", pages.index, methods=both)
    router.add_api_route("/docs", pages.api_description, methods=both)
    router.add_api_route(_REPO + "{name:path}", pages.repository, methods=both)

    async def style() -> Response:
        headers = {
            "cache-control": "public, max-age=31536000, immutable",
            "x-content-type-options": "nosniff",
        }
        return Response(pages.style, headers=headers, media_type="text/css; charset=utf-8")

    router.add_api_route(pages.style_path, style, methods=both)
    return router
