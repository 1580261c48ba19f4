"""Bandwidth measurement: any history of publishes, Tidings and its rivals, every byte counted.

``replay(history, out)`` measures and returns typed results; the command is ``tidings-measure``.
"""

from .replay import Case, Event, cases, replay
from .results import Cost, Publish, Results, Tool, Update, from_json, to_csv, to_json

__all__ = [
    "Case",
    "Cost",
    "Event",
    "Publish",
    "Results",
    "Tool",
    "Update",
    "cases",
    "from_json",
    "replay",
    "to_csv",
    "to_json",
]
