"""The operator's settings: one TOML schema for all commands.

``/etc/tidings/mirror.toml`` has the tables ``[publish]``, ``[serve]``, ``[follow]`` and any number
of ``[[repo]]``. An option of the command line beats the environment (``TIDINGS_MIRROR_KEEP`` for
``keep``), which beats the file. Every setting is one row of ``SETTINGS``: the file, the
environment, ``config check`` and docs/config.md go by it.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidings_chunkstore.errors import FormatError, InputError, LocalError
from tidings_chunkstore.layout import LAYOUTS, safe_path
from tidings_chunkstore.limits import GIB, KIB, MIB
from tidings_chunkstore.types import parse_types

DEFAULT_FILE = Path("/etc/tidings/mirror.toml")
ENVIRONMENT = "TIDINGS_MIRROR_"
_FILE_MAX = 1 * MIB
#: Names at the top that the server needs for itself (``app.OWN`` and ``app.OWN_BELOW``).
RESERVED = frozenset({"healthz", "readyz", "docs", "openapi.json", "metrics"})
RESERVED_BELOW = frozenset({"api", "-"})
_UNITS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1024 * GIB}
_SIZE = re.compile(r"([0-9]{1,12})([KMGT]?)(?:i?B)?", re.ASCII)


class ConfigError(InputError):
    """The settings cannot be used. *problems* has a line for each mistake."""

    code = "config"

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems), problems=problems)
        self.problems = problems


# -- kinds of values: from TOML's types and from text alike, ValueError with a clear text ---------


def _whole(low: int, high: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,12}", value, re.ASCII):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high} is wanted")
        return value

    return read


def flag(value: object) -> bool:
    """A truth value. Raises ValueError."""
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if isinstance(value, str):
        value = known.get(value.lower(), value)
    if not isinstance(value, bool):
        raise ValueError("true or false is wanted")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError("a text is wanted")
    return value


def _folder(value: object) -> Path:
    return Path(_text(value))


def _folders(value: object) -> tuple[Path, ...]:
    if isinstance(value, str):
        value = [part for part in value.split(":") if part]
    if not isinstance(value, list):
        raise ValueError("a list of folders is wanted")
    return tuple(_folder(item) for item in value)


def _bytes(value: object) -> int:
    """Bytes, or text with a binary unit: ``10G``."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("a size is wanted, as 500M or 10G")
    return int(match[1]) * _UNITS[match[2]]


def _layout(value: object) -> str:
    if value not in LAYOUTS:
        raise ValueError(f"there are {' and '.join(LAYOUTS)}")
    return str(value)


def _metrics(value: object) -> str:
    if value not in ("off", "local", "all"):
        raise ValueError("off, local or all is wanted")
    return str(value)


def _url(value: object) -> str:
    """An http or https URL; a metalink's may have a query."""
    from tidings_client.mirrors import web_url  # httpx is not loaded where no URL is named

    text = _text(value)
    try:
        url = web_url(text)
    except InputError:
        url = None
    if url is None or "#" in text or re.search(r"\s", text):
        raise ValueError("a URL is wanted, as https://host/path/")
    return text


def _base(value: object) -> str:
    """The URL of a folder."""
    text = _url(value)
    if "?" in text:
        raise ValueError("a base URL has no query")
    return text


def _urls(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("a URL or a list of URLs is wanted")
    return tuple(_base(item) for item in value)


def _words(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [part for part in value.split(",") if part]
    if not isinstance(value, list) or not value:
        raise ValueError("a list of types is wanted, as primary, group, updateinfo")
    words = tuple(_text(item) for item in value)
    try:
        parse_types(",".join(words))
    except InputError as error:
        raise ValueError(str(error)) from error
    return words


def url_path(value: object) -> str:
    """A repository's path in URLs, without slashes at its ends. Raises ValueError."""
    text = _text(value).strip("/")
    try:
        return safe_path(text, "path")
    except FormatError as error:
        raise ValueError(str(error).removeprefix("path: ")) from error


def _repo_path(value: object) -> str:
    """A path that a repository of the settings may have: one that a request can reach."""
    path = url_path(value)
    parts = path.split("/")
    if path in RESERVED:
        raise ValueError(f"/{path} is the server's own")
    if parts[0] in RESERVED_BELOW:
        raise ValueError(f"what is below /{parts[0]}/ is the server's own")
    if path.startswith("-"):
        raise ValueError("a path that begins with - looks like an option")
    if any(part.startswith(".") for part in parts):
        raise ValueError("names that begin with a dot are not served")
    return path


# -- the schema ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PublishSettings:
    """``[publish]``. None stands for "not said": what holds then is told in the rows below."""

    keep: int = 30
    keep_days: int | None = None
    direct: int = 0
    retry: int = 0
    layout: str | None = None
    store: Path | None = None
    follow: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """``[serve]``."""

    root: Path | None = None
    store: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1
    connections: int = 4096
    patience: int = 30
    memory: int = 64 * MIB
    cache: Path | None = None
    cache_size: int = 1 * GIB
    bundle_queue: int = 8
    reconcile: bool = False
    casync: bool = True
    pages: bool = True
    access_log: bool = False
    metrics: str = "local"
    pull_through: bool = False
    fresh: int = 300


@dataclass(frozen=True, slots=True)
class FollowSettings:
    """``[follow]``."""

    state: Path = Path("/var/lib/tidings")
    every: int = 3600
    parallel: int = 2


@dataclass(frozen=True, slots=True)
class UpstreamSettings:
    """Where a ``[[repo]]`` comes from: one of *urls*, *metalink* and *mirrorlist*."""

    urls: tuple[str, ...] = ()
    metalink: str | None = None
    mirrorlist: str | None = None
    types: tuple[str, ...] | None = None
    gpgkey: Path | None = None
    every: int | None = None


@dataclass(frozen=True, slots=True)
class RepoSettings:
    """One ``[[repo]]`` with a root: where it lies, and what is other than in ``[publish]``."""

    path: str
    root: Path
    store: Path | None = None
    layout: str | None = None
    keep: int | None = None
    keep_days: int | None = None
    direct: int | None = None
    upstream: UpstreamSettings | None = None


@dataclass(frozen=True, slots=True)
class PulledSettings:
    """One ``[[repo]]`` without a root: it is pulled through from its upstream."""

    path: str
    upstream: UpstreamSettings
    layout: str | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """All of it."""

    publish: PublishSettings = PublishSettings()
    serve: ServeSettings = ServeSettings()
    follow: FollowSettings = FollowSettings()
    repos: tuple[RepoSettings, ...] = ()
    pulled: tuple[PulledSettings, ...] = ()
    file: Path | None = field(default=None, compare=False)  #: where it was read from


@dataclass(frozen=True, slots=True)
class Setting:
    """One row: the tables that have it, its name, how it is read, and what it is."""

    tables: tuple[str, ...]
    name: str
    read: Callable[[object], Any]
    what: str

    @property
    def environment(self) -> str | None:
        """Its name in the environment; settings of ``[[repo]]`` alone have none."""
        if self.tables == ("repo",):
            return None
        table = self.tables[0]
        prefix = "" if table == "publish" else f"{table.upper()}_"
        return f"{ENVIRONMENT}{prefix}{self.name.upper()}"


SETTINGS: tuple[Setting, ...] = (
    Setting(("repo",), "path", _repo_path, "path of the repository in URLs, and in the store"),
    Setting(("repo",), "root", _folder, "folder that holds repodata/ or InRelease"),
    Setting(("repo",), "urls", _urls, "upstream: base URLs of one repository, the first preferred"),
    Setting(("repo",), "metalink", _url, "upstream: a metalink's URL"),
    Setting(("repo",), "mirrorlist", _url, "upstream: the URL of a list of base URLs"),
    Setting(("repo",), "types", _words, "of the upstream, these types only"),
    Setting(("repo",), "gpgkey", _folder, "file of the keys that sign the upstream"),
    Setting(
        ("follow", "repo"), "every", _whole(10, 2_592_000), "seconds from one look to the next"
    ),
    Setting(("follow",), "state", _folder, "folder for what is known of upstreams"),
    Setting(("follow",), "parallel", _whole(1, 64), "upstreams at a time"),
    Setting(("publish", "repo"), "keep", _whole(1, 4096), "snapshots that are retained"),
    Setting(("publish", "repo"), "keep_days", _whole(1, 36500), "and no older than so many days"),
    Setting(("publish", "repo"), "direct", _whole(0, 64), "direct deltas from so many snapshots"),
    Setting(("publish",), "retry", _whole(0, 86400), "seconds to wait for a tree to settle"),
    Setting(("publish", "repo"), "layout", _layout, "rpm-md or apt; detected where it is not said"),
    Setting(
        ("publish", "repo"),
        "store",
        _folder,
        "a tree of its own for tidings/ folders; beside the metadata where it is not said",
    ),
    Setting(("publish",), "follow", _folders, "further folders that symlinks may lead into"),
    Setting(("serve",), "root", _folder, "the folder whose files are served"),
    Setting(("serve",), "store", _folder, "the tree that holds tidings/ folders, if another"),
    Setting(("serve",), "host", _text, "address to listen on"),
    Setting(("serve",), "port", _whole(0, 65535), "port to listen on; 0 takes a free one"),
    Setting(("serve",), "workers", _whole(1, 256), "processes"),
    Setting(("serve",), "connections", _whole(16, 1_000_000), "open at a time, for each process"),
    Setting(
        ("serve",),
        "patience",
        _whole(1, 3600),
        "seconds a client has for a request's head, for its body, and to take 16 KiB",
    ),
    Setting(("serve",), "memory", _bytes, "memory for hot objects, for each process"),
    Setting(("serve",), "cache", _folder, "folder for what is made on request"),
    Setting(("serve",), "cache_size", _bytes, "most that this folder may hold"),
    Setting(("serve",), "bundle_queue", _whole(0, 1024), "bundles in the making; 0 makes none"),
    Setting(("serve",), "reconcile", flag, "deltas also against bases that are not retained"),
    Setting(("serve",), "casync", flag, "indexes and chunks for casync and desync, on request"),
    Setting(("serve",), "pages", flag, "web pages for people at / and /docs"),
    Setting(("serve",), "access_log", flag, "one line for each request on stderr"),
    Setting(("serve",), "metrics", _metrics, "who may read /metrics: off, local or all"),
    Setting(("serve",), "pull_through", flag, "fetch repositories with an upstream on request"),
    Setting(("serve",), "fresh", _whole(1, 86400), "seconds before an upstream is asked again"),
)

_WAYS = ("urls", "metalink", "mirrorlist")  #: settings of which an upstream has one
_UPSTREAM = (*_WAYS, "types", "gpgkey", "every")
_HELD = ("store", "keep", "keep_days", "direct")  #: of repositories that are held and published
_CLASSES: Mapping[str, type] = {
    "publish": PublishSettings,
    "serve": ServeSettings,
    "follow": FollowSettings,
}


def rows(table: str) -> dict[str, Setting]:
    """The settings of a table by their names."""
    return {setting.name: setting for setting in SETTINGS if table in setting.tables}


def load(file: Path | None, environment: Mapping[str, str]) -> Settings:
    """Read the file (*file* None: the default one, if it is there) and the environment.

    Raises ConfigError with all mistakes, LocalError when a file cannot be read.
    """
    problems: list[str] = []
    if file is None and environment.get(ENVIRONMENT + "CONFIG"):
        file = Path(environment[ENVIRONMENT + "CONFIG"])
    value: dict[str, object] = {}
    if file is not None or DEFAULT_FILE.exists():
        file = file or DEFAULT_FILE
        value = _read(file)
    tables = {name: _table(value.pop(name, {}), name, problems) for name in _CLASSES}
    said: list[str] = []
    for name, table in tables.items():
        _from_environment(name, table, environment, said)
    repos, pulled = _repos(value.pop("repo", []), problems)
    known = [*_CLASSES, "repo"]
    for name in value:
        problems.append(_unknown(f"[{name}]", name, known))
    if problems or said:
        raise ConfigError([*(f"{file}: {problem}" for problem in problems), *said])
    return Settings(
        PublishSettings(**tables["publish"]),
        ServeSettings(**tables["serve"]),
        FollowSettings(**tables["follow"]),
        repos,
        pulled,
        file,
    )


def _read(file: Path) -> dict[str, object]:
    try:
        with file.open("rb") as source:
            data = source.read(_FILE_MAX + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ConfigError([f"{file}: no such settings file"]) from error
    except OSError as error:
        raise LocalError(f"{file}: {error.strerror}", code="unreadable") from error
    if len(data) > _FILE_MAX:
        raise ConfigError([f"{file}: larger than {_FILE_MAX} bytes"])
    try:
        return tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError([f"{file}: not TOML: {error}"]) from error


def _table(value: object, name: str, problems: list[str], where: str = "") -> dict[str, Any]:
    where = where or f"[{name}]"
    if not isinstance(value, dict):
        problems.append(f"{where}: a table is wanted")
        return {}
    schema = rows(name)
    found: dict[str, Any] = {}
    for key, item in value.items():
        if key not in schema:
            problems.append(_unknown(f"{where} {key}", key, list(schema)))
            continue
        try:
            found[key] = schema[key].read(item)
        except ValueError as error:
            problems.append(f"{where} {key} = {_shown(item)}: {error}")
    return found


def _from_environment(
    table: str, found: dict[str, Any], environment: Mapping[str, str], problems: list[str]
) -> None:
    for name, setting in rows(table).items():
        variable = setting.environment
        if variable and environment.get(variable):
            try:
                found[name] = setting.read(environment[variable])
            except ValueError as error:
                problems.append(f"{variable}={_shown(environment[variable])}: {error}")


def _repos(
    value: object, problems: list[str]
) -> tuple[tuple[RepoSettings, ...], tuple[PulledSettings, ...]]:
    if not isinstance(value, list):
        problems.append("[repo]: tables are written [[repo]]")
        return (), ()
    repos: list[RepoSettings] = []
    pulled: list[PulledSettings] = []
    for number, item in enumerate(value, 1):
        named = item.get("path") if isinstance(item, dict) else None
        where = f"[[repo]] {_shown(named) if named else number}"
        table = _table(item, "repo", problems, where)
        said = item if isinstance(item, dict) else {}
        problems += [f"{where}: {problem}" for problem in _amiss(said)]
        upstream = {key: table.pop(key) for key in _UPSTREAM if key in table}
        comes = UpstreamSettings(**upstream) if upstream else None
        if "path" not in table:
            continue
        if "root" in table:
            repos.append(RepoSettings(**table, upstream=comes))
        elif comes is not None:
            pulled.append(PulledSettings(table["path"], comes, table.get("layout")))
    paths = [repo.path for repo in repos] + [repo.path for repo in pulled]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        problems.append(f"[[repo]] {path!r}: there are two")
    at: dict[str, str] = {}
    for repo in repos:
        root = os.path.normpath(repo.root)
        first = at.setdefault(root, repo.path)
        if first != repo.path:
            problems.append(f"[[repo]] {repo.path!r}: root {root} is that of {first!r}")
    return tuple(repos), tuple(pulled)


def _amiss(said: Mapping[str, object]) -> list[str]:
    """What does not go together in one ``[[repo]]``."""
    ways = [key for key in _WAYS if key in said]
    problems = [] if "path" in said else ["path is missing"]
    if "root" not in said and not ways:
        problems.append(f"root is missing (or an upstream: {', '.join(_WAYS)})")
    if len(ways) > 1:
        problems.append(f"{' and '.join(ways)}: one upstream is wanted")
    if not ways:
        problems += [f"{key} without {', '.join(_WAYS)}" for key in _UPSTREAM if key in said]
    elif "root" not in said:
        problems += [f"{key} without root" for key in _HELD if key in said]
    return problems


def _shown(value: object) -> str:
    text = repr(_bare(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _bare(value: object) -> object:
    """*value* without passwords and queries of URLs, whether or not it is one that can be read."""
    if isinstance(value, str):
        text = re.sub(r"//.*@|\A[^/]*:[^/]*@", lambda m: "//" * m[0].startswith("//"), value)
        return re.sub(r"(//[^?]*\?).+", r"\1...", text)
    if isinstance(value, list):
        return [_bare(item) for item in value]
    if isinstance(value, dict):
        return {key: _bare(item) for key, item in value.items()}
    return value


def _unknown(what: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"{what}: unknown" + (f"; is {near[0]} meant?" if near else "")
