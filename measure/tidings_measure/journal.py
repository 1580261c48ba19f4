"""The journal of a replay in its folder: each result is kept when it is there, so a second run
goes on where the first one stopped. A line of JSON a result; a torn last line is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tidings_chunkstore.errors import InputError

from .results import Publish, Update, update_of


class Journal:
    """Results by what they are of."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Raises InputError when *folder* holds results of another history."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "journal.jsonl"
        self.updates: dict[tuple[str, int, str], Update] = {}
        self.publishes: dict[tuple[str, str], Publish] = {}
        self.notes: dict[str, list[str]] = {}
        self.declined: set[tuple[str, int, str]] = set()  #: updates that a tool does not do
        good = 0
        if self._file.exists():
            data = self._file.read_bytes()
            for number, line in enumerate(data.splitlines(keepends=True)):
                entry = _entry(line)
                if entry is None:
                    break
                if number == 0 and entry.get("settings") != settings:
                    raise InputError(
                        f"{folder} holds a replay of another history, or of other types; "
                        "choose another folder, or remove that one",
                        code="other-run",
                    )
                self._take(entry)
                good += len(line)
            os.truncate(self._file, good)
        if good == 0:
            self._write({"settings": settings})

    def update(self, update: Update) -> None:
        """Keep an update."""
        self._write({"update": asdict(update)})
        self._take({"update": asdict(update)})

    def publish(self, publish: Publish) -> None:
        """Keep a publish."""
        self._write({"publish": asdict(publish)})
        self._take({"publish": asdict(publish)})

    def decline(self, tool: str, lag: int, version: str) -> None:
        """Keep that *tool* does not do this update."""
        self._write({"declined": [tool, lag, version]})
        self._take({"declined": [tool, lag, version]})

    def note(self, tool: str, text: str) -> None:
        """Keep a note, once."""
        if text not in self.notes.get(tool, []):
            self._write({"note": [tool, text]})
            self._take({"note": [tool, text]})

    def _take(self, entry: Mapping[str, Any]) -> None:
        if "update" in entry:
            update = update_of(entry["update"])
            self.updates[update.tool, update.lag, update.version] = update
        elif "publish" in entry:
            publish = Publish(**entry["publish"])
            self.publishes[publish.tool, publish.version] = publish
        elif "declined" in entry:
            tool, lag, version = entry["declined"]
            self.declined.add((tool, lag, version))
        elif "note" in entry:
            tool, text = entry["note"]
            self.notes.setdefault(tool, []).append(text)

    def _write(self, entry: Mapping[str, Any]) -> None:
        with self._file.open("ab") as file:
            file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _entry(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
