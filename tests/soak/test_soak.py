"""A short soak with kills and damage. ``make soak`` runs the long one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from soak.soak import Settings, Soak
from support.system import require


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_minute_of_everything(tmp_path: Path) -> None:
    require("nginx")
    require("rsync")
    settings = Settings(
        seconds=60.0, clients=20, seed=int(os.environ.get("SOAK_SEED", "1")), flip_every=15.0
    )
    report: dict[str, Any] = Soak(tmp_path / "soak", settings, print).run()
    assert report["errors"] == []
    assert report["flips"]["flipped"] == report["flips"]["mended"] >= 2
    assert sum(report["kills"].values()) >= 4
    assert report["codes"]["sync"]["0"] >= 60
