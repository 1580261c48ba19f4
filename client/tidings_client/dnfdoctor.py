"""``tidings doctor`` about dnf: which dnf is here, whether its plugin is, and what it has saved."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from .doctor import FAILED, MISSING, OK, Check
from .progress import size_text
from .saved import Total, caches, totals, updates

#: Where packages put what dnf 4 and dnf 5 load.
DNF4_PLUGINS = (
    "usr/lib/python3*/site-packages/dnf-plugins/tidings.py",
    "usr/lib/python3/dist-packages/dnf-plugins/tidings.py",
)
DNF5_ACTIONS = ("etc/dnf/libdnf5-plugins/actions.d/tidings.actions",)
DNF5_LOADERS = ("usr/lib*/libdnf5/plugins/actions.so", "usr/lib/*/libdnf5/plugins/actions.so")
CONFIG = "etc/dnf/plugins/tidings.conf"
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
    if versions:
        checks.append(_configuration(root))
    return checks


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
    return Check("dnf 4 plugin", MISSING, "dnf does without Tidings; install tidings-dnf4")


def _dnf5_plugin(root: Path) -> Check:
    actions = _found(root, DNF5_ACTIONS)
    if actions is None:
        return Check("dnf 5 helper", MISSING, "dnf5 does without Tidings; install tidings-dnf5")
    if _found(root, DNF5_LOADERS) is None:
        text = "dnf5 cannot run it; install libdnf5-plugin-actions"
        return Check("dnf 5 helper", MISSING, text)
    return Check("dnf 5 helper", OK, str(actions))


def _configuration(root: Path) -> Check:
    path = root / CONFIG
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return Check("dnf configuration", OK, f"no {path}: mirrors are found by themselves")
    if re.search(r"(?mi)^\s*enabled\s*=\s*(0|no|false|off)\s*$", text):
        return Check("dnf configuration", MISSING, f"switched off by enabled in {path}")
    return Check("dnf configuration", OK, str(path))


def savings(environ: Mapping[str, str]) -> list[Total]:
    """What was saved on this machine, as far as this user may read."""
    home = Path(environ.get("HOME") or "/")
    return totals(update for cache in caches(home) for update in updates(cache))


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
