"""The command ``tidings-mirror``: arguments, settings, exit codes. The work is elsewhere."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tidings_chunkstore.errors import InputError
from tidings_chunkstore.limits import GIB
from tidings_client.cli import run
from tidings_client.exits import Exit, help_text
from tidings_client.options import add_version
from tidings_client.progress import Reporter

from . import health, runfile
from . import settings as schema
from .settings import ENVIRONMENT, ConfigError, Setting, Settings

_DESCRIPTION = "Publish chunk indexes and packs beside a mirror's repositories, and serve them."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        _from_environment(arguments, os.environ)
    except ValueError as error:
        parser.error(str(error))
    file = _metrics_file(arguments, os.environ)
    make = Reporter if file is None else runfile.Recorder
    reporter = make(as_json=arguments.json, quiet=getattr(arguments, "quiet", False))

    def work() -> int:
        try:
            chosen = _override(schema.load(arguments.config, os.environ), arguments)
            command: Callable[[argparse.Namespace, Settings, Reporter], Exit] = arguments.run
            return command(arguments, chosen, reporter)
        except ConfigError as error:
            return _config_error(reporter, error)
        finally:
            reporter.close()

    code = int(run(work, reporter))
    if file is not None and isinstance(reporter, runfile.Recorder):
        try:
            runfile.write(file, arguments.command, reporter, code)
        except OSError as error:
            print(f"error: {file}: {error.strerror}", file=sys.stderr)
            return code or Exit.LOCAL
    return code


def _metrics_file(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Path | None:
    """Where this run's metrics go. Each command has its own variable: each has its own file."""
    if arguments.command not in runfile.COMMANDS:
        return None
    said = arguments.metrics_file or environment.get(_metrics_variable(arguments.command))
    return Path(said) if said else None


def _metrics_variable(command: str) -> str:
    return f"{ENVIRONMENT}{command.upper()}_METRICS"


def _config_error(reporter: Reporter, error: ConfigError) -> Exit:
    if reporter.as_json:
        reporter.error(error)
    else:
        for problem in error.problems:
            reporter.error(InputError(problem))
    return Exit.INPUT


#: Options that are no settings, and how their variables are read.
_MORE: Mapping[str, Callable[[str], object]] = {
    "json": schema.flag,
    "quiet": schema.flag,
    "plan": schema.flag,
    "rebuild": schema.flag,
    "once": schema.flag,
    "recursive": Path,
    "as": str,
}


def _from_environment(arguments: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Fill in what the command line left open. Raises ValueError."""
    for option, read in _MORE.items():
        name = "name" if option == "as" else option
        said = environment.get(ENVIRONMENT + option.upper())
        if said and hasattr(arguments, name) and not getattr(arguments, name):
            try:
                setattr(arguments, name, read(said))
            except ValueError as error:
                raise ValueError(f"{ENVIRONMENT}{option.upper()}: {error}") from error


def _variable(option: str) -> str:
    return f" [{ENVIRONMENT}{option.upper()}]"


# -- arguments -------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="tidings-mirror",
        description=_DESCRIPTION,
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    commands = parser.add_subparsers(dest="command", required=True)

    publish = _command(commands, "publish", "publish repositories' metadata", _publish)
    publish.add_argument(
        "dirs", metavar="DIR", nargs="*", type=Path, help="a repository's root: holds repodata/"
    )
    publish.add_argument(
        "--recursive",
        metavar="ROOT",
        type=Path,
        help="all repositories in ROOT and below" + _variable("recursive"),
    )
    publish.add_argument(
        "--as",
        dest="name",
        metavar="PATH",
        help="the repository's path in the store tree" + _variable("as"),
    )
    publish.add_argument(
        "--rebuild", action="store_true", help="start the store anew" + _variable("rebuild")
    )
    publish.add_argument(
        "--plan", action="store_true", help="say what would be done, do nothing" + _variable("plan")
    )
    publish.add_argument(
        "-q", "--quiet", action="store_true", help="errors only" + _variable("quiet")
    )
    _settings(publish, "publish")

    serve = _command(commands, "serve", "serve repositories over HTTP", _serve)
    serve.add_argument(
        "root", metavar="ROOT", nargs="?", type=Path, help="the folder whose files are served"
    )
    _settings(serve, "serve", leave_out=("root",))

    follow = _command(commands, "follow", "keep repositories up to date with upstreams", _follow)
    follow.add_argument(
        "names", metavar="NAME", nargs="*", help="paths of repositories; all that have an upstream"
    )
    follow.add_argument(
        "--once", action="store_true", help="look at each once, then end" + _variable("once")
    )
    follow.add_argument(
        "-q", "--quiet", action="store_true", help="errors only" + _variable("quiet")
    )
    _settings(follow, "follow")

    for name, what, show in (
        ("snapshots", "the retained snapshots of a repository", _snapshots),
        ("stats", "what a repository's store holds", _stats),
    ):
        command = _command(commands, name, what, show)
        command.add_argument("dir", metavar="DIR", type=Path, help="a repository's root")
        command.add_argument(
            "--store",
            metavar="FOLDER",
            type=Path,
            help=f"the store tree [{ENVIRONMENT}STORE]",
        )
        command.add_argument(
            "--as",
            dest="name",
            metavar="PATH",
            help="the repository's path in the store tree" + _variable("as"),
        )

    config = commands.add_parser("config", help="the settings", description="The settings.")
    parts = config.add_subparsers(dest="part", required=True)
    _command(parts, "check", "check the settings, a line for each mistake", _config_check)

    health.add_commands(commands, _command)
    for name in set(runfile.COMMANDS) & set(commands.choices):
        commands.choices[name].add_argument(
            "--metrics",
            dest="metrics_file",
            metavar="FILE",
            help=f"leave metrics of this run in FILE [{_metrics_variable(name)}]",
        )
    return parser


def _command(
    commands: Any,  # argparse keeps the class private
    name: str,
    what: str,
    run: Callable[[argparse.Namespace, Settings, Reporter], Exit],
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help=f"settings, instead of {schema.DEFAULT_FILE} [{ENVIRONMENT}CONFIG]",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON event a line on stdout" + _variable("json")
    )
    parser.set_defaults(run=run)
    return parser


#: What stands for the value of a setting in ``--help``; else its name.
_METAVARS: Mapping[str, str] = {
    "keep": "N",
    "keep_days": "DAYS",
    "direct": "N",
    "retry": "SECONDS",
    "layout": "rpm-md|apt",
    "store": "FOLDER",
    "follow": "FOLDERS",
    "host": "ADDRESS",
    "workers": "N",
    "connections": "N",
    "patience": "SECONDS",
    "memory": "SIZE",
    "cache": "FOLDER",
    "cache_size": "SIZE",
    "bundle_queue": "N",
    "metrics": "off|local|all",
    "fresh": "SECONDS",
    "state": "FOLDER",
    "every": "SECONDS",
    "parallel": "N",
}


def _default_text(name: str, value: object) -> str:
    """The default in brackets; nothing where the text says what holds."""
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return " (on)" if value else " (off)"
    if isinstance(value, int) and _METAVARS.get(name) == "SIZE":
        return f" ({value >> 30}G)" if value % GIB == 0 else f" ({value >> 20}M)"
    return f" ({value})"


def _settings(parser: argparse.ArgumentParser, table: str, leave_out: Sequence[str] = ()) -> None:
    """An option for each setting of *table*."""
    for name, setting in schema.rows(table).items():
        if name in leave_out:
            continue
        option = "--" + name.replace("_", "-")
        default = _default_text(name, getattr(getattr(Settings(), table), name))
        text = f"{setting.what}{default} [{setting.environment}]".replace("%", "%%")
        if setting.read is schema.rows("serve")["access_log"].read:
            parser.add_argument(
                option, action=argparse.BooleanOptionalAction, default=None, help=text
            )
        else:
            parser.add_argument(
                option, metavar=_METAVARS.get(name, name.upper()), type=_typed(setting), help=text
            )


def _typed(setting: Setting) -> Callable[[str], object]:
    def read(text: str) -> object:
        try:
            return setting.read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _override(found: Settings, arguments: argparse.Namespace) -> Settings:
    """The settings with what the command line says on top."""

    def over(table: str, value: Any) -> Any:
        said: Mapping[str, object] = {
            name: getattr(arguments, name)
            for name in schema.rows(table)
            if getattr(arguments, name, None) is not None
        }
        return dataclasses.replace(value, **said)

    if arguments.command == "publish":
        return dataclasses.replace(found, publish=over("publish", found.publish))
    if arguments.command == "follow":
        return dataclasses.replace(found, follow=over("follow", found.follow))
    if arguments.command == "serve":
        return dataclasses.replace(found, serve=over("serve", found.serve))
    return found


# -- commands: imports here, so that a publish does not load FastAPI -------------------------------


def _publish(arguments: argparse.Namespace, settings: Settings, reporter: Reporter) -> Exit:
    from .publish_cli import command

    return command(arguments, settings, reporter)


def _serve(arguments: argparse.Namespace, settings: Settings, reporter: Reporter) -> Exit:
    from .serve import serve

    return serve(settings)


def _follow(arguments: argparse.Namespace, settings: Settings, reporter: Reporter) -> Exit:
    from .follow_cli import command

    return command(arguments, settings, reporter)


def _snapshots(arguments: argparse.Namespace, settings: Settings, reporter: Reporter) -> Exit:
    from .inspect_cli import snapshots_command

    return snapshots_command(arguments, settings, reporter)


def _stats(arguments: argparse.Namespace, settings: Settings, reporter: Reporter) -> Exit:
    from .inspect_cli import stats_command

    return stats_command(arguments, settings, reporter)


def _config_check(arguments: argparse.Namespace, settings: Settings, reporter: Reporter) -> Exit:
    problems = [
        f"[[repo]] {repo.path!r}: {folder} is no folder"
        for repo in settings.repos
        for folder in (repo.root,)
        if not folder.is_dir() and repo.upstream is None  # follow makes it
    ]
    if settings.serve.root is not None and not settings.serve.root.is_dir():
        problems.append(f"[serve] root: {settings.serve.root} is no folder")
    comes = [(repo.path, repo.upstream) for repo in settings.repos]
    comes += [(repo.path, repo.upstream) for repo in settings.pulled]
    for path, upstream in comes:
        key = upstream.gpgkey if upstream is not None else None
        if key is not None and not (key.is_file() and os.access(key, os.R_OK)):
            problems.append(f"[[repo]] {path!r}: gpgkey {key} is no file that can be read")
    if problems:
        raise ConfigError(problems)
    where = str(settings.file) if settings.file else "no settings file: defaults"
    facts = {"command": "config check", "file": str(settings.file or ""), "valid": True}
    reporter.summary({**facts, "repositories": len(settings.repos)}, f"{where}: fine")
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
