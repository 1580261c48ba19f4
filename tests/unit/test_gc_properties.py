"""Random histories of publish and gc: nothing that is retained is ever lost."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.stores import History, assert_whole
from tidings_chunkstore import gc, head, packing
from tidings_chunkstore.publisher import Options as PublishOptions
from tidings_chunkstore.store import Store


@dataclass(frozen=True, slots=True)
class Publish:
    share: float
    keep: int
    direct: int
    revert: int | None  #: publish the packages of this many steps ago again


@dataclass(frozen=True, slots=True)
class Collect:
    keep: int | None
    below: float
    budget: int
    later: int  #: seconds since the last step


publishes = st.builds(
    Publish,
    st.sampled_from([0.01, 0.03, 0.3, 1.0]),
    st.integers(1, 4),
    st.integers(0, 2),
    st.one_of(st.none(), st.none(), st.integers(1, 4)),
)
collections = st.builds(
    Collect,
    st.one_of(st.none(), st.integers(1, 3)),
    st.sampled_from([0.3, 0.7, 1.1]),
    st.sampled_from([0, 20_000, 1 << 30]),
    st.integers(0, 150),
)
histories = st.lists(st.one_of(publishes, publishes, collections), min_size=4, max_size=14)


def read_as_a_client(store: Store, old: head.Head) -> None:
    """Everything that a client with this head may ask for is there."""
    for edge in old.edges:
        store.read_span(edge.span)
    for content in old.contents:
        if content.index is not None:
            for _ in store.chunks(store.read_index(content.index)):
                pass


@settings(
    max_examples=14,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(histories, st.sampled_from([0, 100]), st.sampled_from([(0.2, 32), (0.0, 32), (0.0, 3)]))
def test_what_is_retained_reads_back(
    steps: list[Publish | Collect], grace: int, storing: tuple[float, int]
) -> None:
    """*storing*: the share that frames may take (0.0: chains of deltas alone) and their depth."""
    pays, depth = storing
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.multiple(packing, _FRAMES_PAY=pays, MAX_DEPTH=depth, _EASY_DEPTH=depth),
    ):
        history = History(Path(folder) / "repo", count=60)
        versions = []
        heads: list[tuple[int, head.Head]] = []  # with the time when each was replaced
        now = 2_000_000_000
        history.step()
        for step in steps:
            before = history.head()
            if isinstance(step, Publish):
                versions.append(history.packages)
                history.options = PublishOptions(keep=step.keep, direct=step.direct)
                if step.revert is not None:
                    history.packages = versions[-min(step.revert, len(versions))]
                history.step(step.share)
            else:
                now += step.later
                options = gc.Options(step.keep, None, grace, step.budget, step.below, 0.0)
                report = gc.run(history.backend, options, now=now)
                serial = history.head().serial
                if report.pack:
                    history.published[serial] = history.published[before.serial]
                assert not gc.gather(history.store, options).reach.lost
            assert_whole(history.store, history.published)
            if history.head() != before:
                heads.append((now, before))
            for replaced, old in heads:
                if now - replaced < grace:
                    read_as_a_client(history.store, old)
