"""Real histories, version by version: publish, then clients from the last version, from nothing and
from the oldest, over both servers. What they hold afterwards is what was published, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.servers import Servers
from tidings_chunkstore import publisher
from tidings_chunkstore.backends import LocalBackend
from tidings_client.remote import Remote, RemoteSettings
from tidings_client.sync import SyncOptions, SyncResult, sync
from tidings_client.trust import TrustSettings

# Each history and the stride with which the quick tests go through it; the slow ones take all.
SHORT = {"rpmsphere-noarch": 4, "linux-surface-f39": 6}
LONG = {"trivy-el7": 9, "tur-aarch64": 9}


def _files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.relative_to(root).parts[0] not in ("tidings", ".tidings")
    }


def _put(version: Path, tree: Path) -> None:
    """The version's files in place of the last one's; tidings/ stays."""
    for entry in tree.iterdir():
        if entry.name != "tidings":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    shutil.copytree(version, tree, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for path in (tree, *tree.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _sync(url: str, dest: Path) -> SyncResult:
    # One of the apt versions has an older Date than the one before it.
    with Remote([url], RemoteSettings()) as remote:
        return sync(SyncOptions(dest=dest, trust=TrustSettings(allow_older=True)), remote)


def _replay(versions: list[Path], folder: Path) -> None:
    tree = folder / "mirror" / "repo"
    tree.mkdir(parents=True)
    with Servers(folder / "servers") as servers:
        urls = {
            "nginx": f"{servers.nginx(tree.parent).url}/repo",
            "mirror": f"{servers.mirror(tree.parent).url}/repo",
        }
        for number, version in enumerate(versions):
            _put(version, tree)
            report = publisher.publish(tree, LocalBackend(tree / "tidings"))
            assert report.changed
            assert not report.opaque
            published = _files(tree)
            for name, url in urls.items():
                daily = folder / f"{name}-daily"
                oldest = folder / f"{name}-oldest"
                if number == 0:
                    _sync(url, oldest)
                fresh, behind = folder / "fresh", folder / "behind"
                shutil.copytree(oldest, behind)
                for dest in (daily, behind, fresh):
                    result = _sync(url, dest)
                    assert _files(dest) == published, f"{version.name} from {dest.name}, {name}"
                    if number and dest == daily:
                        assert result.route in ("delta", "current")
                        assert result.bytes_received < result.bytes_full
                shutil.rmtree(fresh)
                shutil.rmtree(behind)


def _versions(shared_data: Path, history: str) -> list[Path]:
    return sorted(path for path in (shared_data / history).iterdir() if path.is_dir())


@pytest.mark.parametrize(("history", "stride"), [*SHORT.items(), *LONG.items()])
def test_some_versions_of_each_history(
    history: str, stride: int, shared_data: Path, tmp_path: Path
) -> None:
    _replay(_versions(shared_data, history)[::stride], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("history", [*SHORT, *LONG])
def test_every_version_of_each_history(history: str, shared_data: Path, tmp_path: Path) -> None:
    _replay(_versions(shared_data, history), tmp_path)
