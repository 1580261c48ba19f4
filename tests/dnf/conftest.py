"""Packages are built once; every test gets its own rig."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support.dnf import Key, Rig, build_packages, dnf_program, folder_for
from support.dnf5 import Sid4


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Sequence[Path]]:
    """rpms of three versions."""
    dnf_program()
    return build_packages(tmp_path_factory.mktemp("rpms"))


@pytest.fixture(scope="session")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Key:
    """A key for all tests: making one takes a while."""
    return Key.make(tmp_path_factory.mktemp("key"))


@pytest.fixture
def make_rig(built: Mapping[int, Sequence[Path]]) -> Iterator[Callable[..., Rig]]:
    """``make_rig(metalink=True)``: a rig that ends with the test.

    With TIDINGS_DNF4=sid the tests of dnf 4 run the newer one of the chroot.
    """
    kind = Sid4 if os.environ.get("TIDINGS_DNF4") == "sid" else Rig
    with ExitStack() as stack:

        def make(**options: Any) -> Rig:
            folder = next(folders := folder_for())
            stack.callback(lambda: next(folders, None))
            return stack.enter_context(kind(folder, built, **options))

        yield make
