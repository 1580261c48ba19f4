"""The public names of the packages: a change here is a change of the interface."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import tidings_chunkstore
import tidings_client

CHUNKSTORE = """
    ChunkId ContentId EngineError FileId FormatError Head InputError LocalBackend LocalError
    LockedError NetworkError Options Readable Report RollbackError Store StoreError TidingsError
    UnsettledError VerificationError Writable publish
"""
CLIENT = """
    Finding PlanResult Progress Remote RemoteSettings SyncOptions SyncResult TrustSettings Verdict
    version
"""


@pytest.mark.parametrize(
    ("package", "names"), [(tidings_chunkstore, CHUNKSTORE), (tidings_client, CLIENT)]
)
def test_the_names(package: ModuleType, names: str) -> None:
    assert package.__all__ == names.split()
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such"):
        _ = package.no_such


@pytest.mark.parametrize("package", ["tidings_chunkstore", "tidings_client"])
def test_nothing_is_loaded_before_it_is_used(package: str) -> None:
    script = f"import sys, {package}\nprint(*[m for m in sys.modules if m.startswith('tidings_')])"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.split() == [package]
