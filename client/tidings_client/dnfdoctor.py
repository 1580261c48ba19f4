"""``tidings doctor`` about dnf: which dnf is here, whether its plugin is, and what it has saved."""

from __future__ import annotations

import configparser
import glob
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

from .doctor import FAILED, MISSING, OK, Check
from .progress import size_text
from .saved import FOLDER, MIRRORS, Skipped, Total, caches, totals, updates

#: Where packages put what dnf 4 and dnf 5 load.
DNF4_PLUGINS = (
    "usr/lib/python3*/site-packages/dnf-plugins/tidings.py",
    "usr/lib/python3/dist-packages/dnf-plugins/tidings.py",
)
DNF5_ACTIONS = ("etc/dnf/libdnf5-plugins/actions.d/tidings.actions",)
DNF5_LOADERS = ("usr/lib*/libdnf5/plugins/actions.so", "usr/lib/*/libdnf5/plugins/actions.so")
DNF5_HELPER = "usr/libexec/tidings/tidings-dnf5"
SHARED = "usr/libexec/tidings/tidings_dnf.py"
CONFIG = "etc/dnf/plugins/tidings.conf"
DNF_CONFIG = "etc/dnf/dnf.conf"
DNF5_DROP_INS = "etc/dnf/libdnf5.conf.d/*.conf"
_CONFIG_LIMIT = 1 << 20  # bytes
_CACHES = 100  # folders of a cachedir with variables
_SECONDS = 10.0


def dnf_checks(root: Path = Path("/"), which: Iterable[str] = ("dnf", "dnf5")) -> list[Check]:
    """Each dnf of this machine, and what makes it use Tidings. Nothing where there is no dnf."""
    checks = []
    versions = {program: _version(program) for program in which if shutil.which(program)}
    for program, version in versions.items():
        if version is None:
            checks.append(Check(program, FAILED, f"{program} --version does not say"))
            continue
        five = version.startswith("5.")
        if five and program == "dnf" and versions.get("dnf5") is not None:
            continue  # the same program by its other name
        checks.append(Check(program, OK, version))
        checks.append(_dnf5_plugin(root) if five else _dnf4_plugin(root))
    return checks + (_settings(root) if versions else [])


def _version(program: str) -> str | None:
    try:
        done = subprocess.run(
            [program, "--version"],
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"\b(\d+\.\d+\.\d+)", done.stdout)
    return match[1] if match else None


def _found(root: Path, patterns: Iterable[str]) -> Path | None:
    return next((path for pattern in patterns for path in sorted(root.glob(pattern))), None)


def _dnf4_plugin(root: Path) -> Check:
    plugin = _found(root, DNF4_PLUGINS)
    if plugin is not None:
        return Check("dnf 4 plugin", OK, str(plugin))
    return Check("dnf 4 plugin", MISSING, f"dnf does without Tidings; {_how('tidings-dnf4')}")


def _dnf5_plugin(root: Path) -> Check:
    actions = _found(root, DNF5_ACTIONS)
    helper = root / DNF5_HELPER
    if actions is None or not os.access(helper, os.X_OK):
        lacking = "" if actions is None else f"{helper} cannot be run; "
        text = f"{lacking}dnf5 does without Tidings; {_how('tidings-dnf5')}"
        return Check("dnf 5 helper", MISSING, text)
    if _found(root, DNF5_LOADERS) is None:
        text = "dnf5 cannot run it; install libdnf5-plugin-actions"
        return Check("dnf 5 helper", MISSING, text)
    return Check("dnf 5 helper", OK, str(actions))


def _how(package: str) -> str:
    return f'install {package}; on Debian see "Installing" in docs/dnf.md'


def _settings(root: Path) -> list[Check]:
    """What both plugins share, read by the plugins' own code: so the rules are theirs."""
    path = root / SHARED
    plugin = _found(root, DNF4_PLUGINS)
    if not path.exists() and plugin is not None:
        path = plugin.resolve().parent / path.name  # where the plugin looks next
    if not path.exists():
        if plugin is None and _found(root, DNF5_ACTIONS) is None:
            return []  # nobody looks for it
        text = f"no {root / SHARED}; {_how('tidings-dnf4 or tidings-dnf5')}"
        return [Check("dnf plugins' part", MISSING, text)]
    config = root / CONFIG
    mistakes: list[str] = []
    try:
        settings = _load(path).Settings(str(config), mistakes.append)
        command, enabled, broken = str(settings.command), settings.enabled, settings.broken
    except (OSError, SyntaxError, ImportError, ValueError, TypeError, AttributeError) as error:
        return [Check("dnf plugins' part", FAILED, f"{path} cannot be used: {error}")]
    checks = [Check("dnf plugins' part", OK, str(path))]
    if mistakes:
        text = "; ".join(line.removeprefix("tidings: ") for line in mistakes)
        checks.append(Check("dnf configuration", FAILED, text))
    elif not enabled:
        text = f"switched off by enabled in {config}"
        checks.append(Check("dnf configuration", MISSING, text))
    elif not config.exists():
        text = f"no {config}: mirrors are found by themselves"
        checks.append(Check("dnf configuration", OK, text))
    else:
        checks.append(Check("dnf configuration", OK, str(config)))
    return checks if broken else [*checks, _command(command)]


def _load(path: Path) -> ModuleType:
    """The module of the plugins. Raises what its import does."""
    spec = importlib.util.spec_from_file_location("tidings_dnf", path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _command(command: str) -> Check:
    """Whether what the plugins start does start, as this user."""
    try:
        done = subprocess.run(
            [command, "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Check("dnf command", FAILED, f"{command} --version does not end")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        text = f"{command} does not start: {why}; see command in /{CONFIG}"
        return Check("dnf command", FAILED, text)
    said = done.stdout.strip().partition("\n")[0]
    if done.returncode != 0:
        return Check("dnf command", FAILED, f"{command} --version ends with {done.returncode}")
    if re.search(r"(?i)\btidings\b", said) is None:
        return Check("dnf command", FAILED, f"{command} is not tidings: it says {said[:80]!r}")
    return Check("dnf command", OK, f"{shutil.which(command) or command} ({said[:80]})")


def our_caches(environ: Mapping[str, str], root: Path = Path("/")) -> list[Path]:
    """dnf's caches with files of ours, also where ``cachedir`` of dnf's configuration says."""
    home = Path(environ.get("HOME") or "/")
    return caches(home, configured=_configured_caches(root))


def _configured_caches(root: Path) -> list[Path]:
    found: list[Path] = []
    for path in (root / DNF_CONFIG, *sorted(root.glob(DNF5_DROP_INS))):
        parser = configparser.ConfigParser(
            delimiters=("=",), strict=False, interpolation=None, default_section="\n"
        )
        try:
            with path.open("rb") as file:
                parser.read_string(file.read(_CONFIG_LIMIT).decode(errors="replace"))
        except (OSError, configparser.Error):
            continue  # dnf itself says what is wrong with it
        for name in ("cachedir", "system_cachedir"):
            value = parser.get("main", name, fallback="").strip()
            if value.startswith("/"):
                # What dnf's variables were is not known here; their folders are.
                pattern = re.sub(r"\$(\w+|\{\w+\})", "*", glob.escape(value))
                found += [Path(each) for each in sorted(glob.glob(pattern))[:_CACHES]]
    return found


def savings(found: Iterable[Path]) -> list[Total]:
    """What was saved in these caches, as far as this user may read and believe them."""
    return totals(update for cache in found for update in updates(cache))


def skipped_lines(found: Mapping[Path, Sequence[Skipped]]) -> list[str]:
    """Whom the plugins do not ask at present, and what to do about it, for people."""
    lines = []
    for cache, mirrors in found.items():
        for each in mirrors:
            until = datetime.fromtimestamp(each.until, UTC).strftime("%Y-%m-%d %H:%M UTC")
            lines.append(f"not asked until {until}: {each.url} ({each.why})")
        if mirrors:
            path = cache / FOLDER / MIRRORS
            lines.append(f"to ask these at once, remove {path}")
    return lines


def savings_lines(found: list[Total]) -> list[str]:
    """A table for people."""
    if not found:
        return ["dnf has saved nothing through Tidings yet (or its cache is not yours to read)"]
    lines = [f"{'repository':24} {'updates':>7} {'downloaded':>18} {'instead of':>18}  last"]
    for total in found:
        last = datetime.fromtimestamp(total.last, UTC).strftime("%Y-%m-%d %H:%M")
        lines.append(
            f"{total.repo:24.24} {total.updates:>7} "
            f"{size_text(total.bytes) + f' in {total.requests}':>18} "
            f"{size_text(total.bytes_full) + f' in {total.requests_full}':>18}  {last}"
        )
    return lines
