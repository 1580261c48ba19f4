"""``tidings-mirror snapshots`` and ``stats``: tables, and the same for programs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tidings_chunkstore.backends.base import HEAD_NAME
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.errors import InputError
from tidings_chunkstore.store import Store
from tidings_client.exits import Exit
from tidings_client.progress import Reporter, size_text

from . import inventory
from .publish import FOLDER
from .settings import Settings, url_path


def snapshots_command(
    arguments: argparse.Namespace, settings: Settings, reporter: Reporter
) -> Exit:
    """Run ``snapshots``."""
    rows = inventory.snapshots(_store(arguments, settings))
    for row in rows:
        facts = {**dataclasses.asdict(row), "share": round(row.share, 4)}
        reporter.data({"type": "snapshot", **facts})
    reporter.data({"type": "summary", "command": "snapshots", "snapshots": len(rows)})
    cells = [
        [
            str(row.serial),
            _time(row.time),
            row.pack,
            size_text(row.pack_bytes),
            str(row.files),
            size_text(row.changed_bytes),
            f"{row.share:.1%}",
            size_text(row.edge_bytes),
        ]
        for row in rows
    ]
    titles = ["serial", "time", "pack", "bytes", "files", "changed", "share", "edges"]
    for line in table(titles, cells, left=(1, 2)):
        reporter.line(line)
    return Exit.OK


def stats_command(arguments: argparse.Namespace, settings: Settings, reporter: Reporter) -> Exit:
    """Run ``stats``."""
    found = inventory.stats(_store(arguments, settings))
    facts = {**dataclasses.asdict(found), "missing_share": round(found.missing_share, 4)}
    reporter.data({"type": "summary", "command": "stats", **facts})
    kinds = {
        "frames": found.frame_bytes,
        "indexes": found.index_bytes,
        "edges": found.edge_bytes,
        "dictionaries": found.dictionary_bytes,
        "tables of contents": found.toc_bytes,
        "head": found.head_bytes,
        "all": found.bytes,
    }
    cells = [
        [kind, size_text(size), f"{size / found.bytes:.1%}" if found.bytes else ""]
        for kind, size in kinds.items()
    ]
    lines = [
        f"{found.packs} packs, {found.snapshots} retained snapshots, {found.contents} contents, "
        f"{found.chunks:,} chunks",
        *table(["store", "bytes", "share"], cells, left=(0,)),
        f"current snapshot: {found.files} files, {size_text(found.published_bytes)}",
    ]
    if found.unreadable:
        lines.append(f"{found.unreadable} more packs cannot be read: see tidings-mirror check")
    for engine, count in found.recipes.items():
        lack = ", which clients may lack" if engine in found.missing else ""
        lines.append(f"  {count} by {engine}{lack}")
    if found.missing:
        lines.append(
            f"  {found.missing_share:.1%} of the recipes need an engine that clients may lack "
            f"({size_text(found.missing_bytes)})"
        )
    if found.opaque:
        lines.append(f"  {found.opaque} without a recipe ({size_text(found.opaque_bytes)})")
    for line in lines:
        reporter.line(line)
    return Exit.OK


def table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()
) -> list[str]:
    """Columns for a terminal, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(titles, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (titles, *rows)
    ]


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _store(arguments: argparse.Namespace, settings: Settings) -> Store:
    """The store that the arguments name. Raises InputError where there is none."""
    folder: Path = arguments.dir / FOLDER
    tree = arguments.store or (settings.publish.store if arguments.name else None)
    if arguments.store is not None and not arguments.name:
        raise InputError("--store needs --as PATH: the repository's path in the store tree")
    if tree is not None:
        try:
            folder = tree / url_path(arguments.name) / FOLDER
        except ValueError as error:
            raise InputError(f"--as {arguments.name!r}: {error}") from error
    if not (folder / HEAD_NAME).is_file():
        raise InputError(f"{folder}: no {HEAD_NAME}; publish first", code="not-published")
    return Store(LocalBackend(folder))
