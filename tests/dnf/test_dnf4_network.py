"""dnf 4 with what networks put in between: TLS with a CA of one's own, and proxies."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from support.dnf import Rig
from support.fronts import Authority, ForwardProxy, TlsFront

pytestmark = pytest.mark.dnf
REPOMD = "/repodata/repomd.xml"
Make = Callable[..., Rig]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("tls") / "ca")


def publish(rig: Rig, version: int) -> None:
    """The repository's own host has *version*, with Tidings beside it."""
    rig.both_have(version)
    shutil.copytree(rig.service.server.root / "tidings", rig.origin.server.root / "tidings")


def behind_tls(rig: Rig, stack: ExitStack, authority: Authority) -> None:
    """The origin is reached by https alone."""
    front = TlsFront.start(rig.folder / "tls", rig.origin.wire.url, authority)
    rig.origin.front = stack.enter_context(front).url
    rig.configure()
    rig.service_at("")


def dnf_s_own(rig: Rig) -> list[str]:
    """What the last run asked the origin for, but for Tidings' own requests."""
    asked = rig.origin.server.seen[rig.origin.mark :]
    agents = [{k.lower(): v for k, v in seen.headers.items()}["user-agent"] for seen in asked]
    return [s.path for s, who in zip(asked, agents, strict=True) if "tidings/" not in who]


def test_https_with_a_ca_of_the_repository(
    make_rig: Make, stack: ExitStack, authority: Authority
) -> None:
    rig = make_rig(repo_lines=[f"sslcacert={authority.ca}"])
    behind_tls(rig, stack, authority)
    for version in (1, 2):
        publish(rig, version)
        run = rig.dnf("--refresh", "makecache").ok()
        assert dnf_s_own(rig) == [REPOMD], rig.log()
        assert len(run.origin) > 1
        assert rig.packages() == rig.expected(version)


def test_the_repository_s_ca_is_for_its_own_host(
    make_rig: Make, stack: ExitStack, authority: Authority
) -> None:
    rig = make_rig(repo_lines=[f"sslcacert={authority.ca}"])
    behind_tls(rig, stack, authority)
    front = TlsFront.start(rig.folder / "other", rig.service.wire.url, authority)
    rig.service_at(stack.enter_context(front).url)
    rig.both_have(1)
    run = rig.dnf("--refresh", "makecache").ok()
    assert run.service == []  # nothing was asked of it
    assert len(run.origin) > 1  # dnf's own download
    assert rig.packages() == rig.expected(1)


def test_without_sslverify_tidings_asks_nothing(
    make_rig: Make, stack: ExitStack, authority: Authority
) -> None:
    rig = make_rig(repo_lines=["sslverify=0"])
    behind_tls(rig, stack, authority)
    publish(rig, 1)
    run = rig.dnf("--refresh", "makecache").ok()
    assert dnf_s_own(rig) == run.origin
    assert rig.packages() == rig.expected(1)


def test_a_proxy_gets_all_of_it(make_rig: Make, stack: ExitStack) -> None:
    proxy = stack.enter_context(ForwardProxy.start())
    rig = make_rig(repo_lines=[f"proxy={proxy.url}"])
    rig.service_at("")
    for version in (1, 2):
        publish(rig, version)
        before = len(proxy.requests())
        run = rig.dnf("--refresh", "makecache").ok()
        assert dnf_s_own(rig) == [REPOMD], rig.log()
        assert len(run.origin) > 1
        asked = sorted(proxy.requests()[before:])
        assert asked == sorted(rig.origin.url + path for path in run.origin)
        assert rig.packages() == rig.expected(version)


def test_a_proxy_that_is_down_is_not_gone_round(make_rig: Make, stack: ExitStack) -> None:
    proxy = stack.enter_context(ForwardProxy.start())
    rig = make_rig(repo_lines=[f"proxy={proxy.url}"])
    rig.service_at("")
    publish(rig, 1)
    proxy.stop()
    run = rig.dnf("--refresh", "makecache")
    assert run.code != 0
    assert run.origin == run.service == []
