"""dnf 4 with settings of all kinds: the plugin's file, read by real dnf."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from support.dnf import Rig

pytestmark = pytest.mark.dnf
REPOMD = "/repodata/repomd.xml"
Make = Callable[..., Rig]


@pytest.fixture
def rig(make_rig: Make) -> Rig:
    """A rig with a baseurl whose both sides have a state."""
    rig = make_rig()
    rig.both_have(1)
    return rig


def configure(rig: Rig, repos: str, main: str = "") -> None:
    """Write the plugin's file; line 3 is the first of *main*, if there is one."""
    path = rig.folder / "etc" / "plugins" / "tidings.conf"
    path.write_text(f"[main]\ncommand={rig.command}\n{main}[repos]\n{repos}")


def warnings(rig: Rig) -> list[str]:
    return [line for line in rig.log() if "WARNING" in line]


@pytest.mark.parametrize("off", [True, False], ids=["off", "url"])
def test_the_id_of_a_copr_repository(rig: Rig, off: bool) -> None:
    repo = rig.folder / "etc" / "repos" / "many.repo"
    repo.write_text(repo.read_text().replace("[many]", "[copr:copr.example.org:me:Many]"))
    value = "off  ; not this one" if off else rig.service.url
    configure(rig, f"copr:copr.example.org:me:Many = {value}\ncopr:copr.example.org:me:b = off\n")
    run = rig.dnf("makecache").ok()
    assert bool(run.service) != off
    assert warnings(rig) == []
    assert "Traceback" not in run.output
    assert rig.packages() == rig.expected(1)


def test_a_value_that_is_no_url_is_named_once(rig: Rig) -> None:
    configure(rig, "# a comment\nmany = of\n")
    run = rig.dnf("makecache").ok()
    assert (run.service, "Traceback" in run.output) == ([], False)
    (line,) = warnings(rig)
    assert "line 5: many: 'of' is neither off nor an http(s) URL" in line
    assert not any("/tidings/" in path for path in run.origin)


def test_a_value_that_cannot_be_used_switches_off(rig: Rig) -> None:
    configure(rig, f"many = {rig.service.url}\n", "timeout = abc\n")
    run = rig.dnf("makecache").ok()
    assert (run.service, "Traceback" in run.output) == ([], False)
    (line,) = warnings(rig)
    assert "tidings.conf: line 3: timeout: 'abc' is no time in seconds; Tidings is off" in line
    assert rig.packages() == rig.expected(1)


@pytest.mark.parametrize("main", ["nonsense\n", "enabled = maybe\n", "[x\n"])
def test_a_file_that_cannot_be_read_switches_off(rig: Rig, main: str) -> None:
    """dnf's own reader would end dnf, or give a traceback."""
    configure(rig, f"many = {rig.service.url}\n", main)
    run = rig.dnf("makecache").ok()
    assert (run.service, "Traceback" in run.output) == ([], False)
    (line,) = warnings(rig)
    assert "tidings.conf: line 3: " in line
    assert "Tidings is off" in line
    assert rig.packages() == rig.expected(1)


@pytest.mark.parametrize("value", ["1  ; on", "0  # off"])
def test_a_comment_after_enabled(rig: Rig, value: str) -> None:
    configure(rig, f"many = {rig.service.url}\n", f"enabled = {value}\n")
    run = rig.dnf("makecache").ok()
    assert bool(run.service) == value.startswith("1")
    assert warnings(rig) == []
    assert "Traceback" not in run.output


def test_clean_all_leaves_our_folder_which_may_be_removed(rig: Rig) -> None:
    rig.dnf("makecache").ok()
    ours = rig.cache / "tidings"
    assert (ours / "saved.jsonl").exists()
    rig.dnf("clean", "all").ok()
    assert not rig.live.exists() or not list(rig.live.rglob("*.xml*"))
    assert (ours / "saved.jsonl").exists()
    shutil.rmtree(ours)
    assert rig.dnf("makecache").ok().service != []
    assert rig.packages() == rig.expected(1)


def test_a_mirror_is_asked_again_when_the_list_is_removed(rig: Rig) -> None:
    rig.service.server.fault("/tidings/", status=404)
    assert rig.dnf("makecache").ok().service != []
    rig.service.server.heal()
    assert rig.dnf("--refresh", "makecache").ok().service == []
    (rig.cache / "tidings" / "mirrors.json").unlink()
    assert rig.dnf("--refresh", "makecache").ok().service != []
