"""The settings that dnf's plugins read: ids with colons, comments, files that cannot be used."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]


def _load() -> ModuleType:
    path = ROOT / "client" / "dnf-plugins" / "tidings_dnf.py"
    spec = importlib.util.spec_from_file_location("tidings_dnf_config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PLUGIN = _load()
Read = Callable[[str | bytes], tuple[Any, list[str]]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Settings from a text, and the lines they gave for the log."""

    def of(text: str | bytes) -> tuple[Any, list[str]]:
        path = tmp_path / "tidings.conf"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        told: list[str] = []
        return PLUGIN.Settings(str(path), told.append), told

    return of


def test_ids_of_copr_have_colons(read: Read) -> None:
    settings, told = read(
        "[repos]\n"
        "copr:copr.example.org:user:proj = off\n"
        "copr:copr.example.org:user:Other=https://m.example.org:8443/$basearch/\n"
    )
    assert told == []
    assert settings.of_repo("copr:copr.example.org:user:proj") == "off"
    other = settings.of_repo("copr:copr.example.org:user:Other")
    assert other == "https://m.example.org:8443/$basearch/"
    assert settings.of_repo("copr:copr.example.org:user:other") is None  # case counts
    assert settings.of_repo("copr") is None


def test_the_last_of_two_counts(read: Read) -> None:
    settings, told = read("[repos]\na = off\na = on\n[repos]\nb = off\n")
    assert told == []
    assert (settings.of_repo("a"), settings.of_repo("b")) == ("on", "off")


@pytest.mark.parametrize("comment", ["  ; it is small", " # it is small", "\t;x", " ;", " # a = b"])
def test_comments_at_the_end_of_a_line(read: Read, comment: str) -> None:
    text = f"[main]\ntimeout = 20{comment}\n[repos]\n# a line\n; too\nu = off{comment}\n"
    settings, told = read(text + f"v = https://m.example.org/a;b{comment}\n")
    assert told == []
    assert settings.timeout == 20
    assert settings.of_repo("u") == "off"
    assert settings.of_repo("v") == "https://m.example.org/a;b"


@pytest.mark.parametrize(
    "value",
    ["of", "0", "m.example.org/x", "ftp://m.example.org", "file:///srv", "https://", "http:///x",
     "https://a.example.org https://b.example.org", "https://m.example.org/?a=b",
     "off\n  indented = off"],
)  # fmt: skip
def test_a_value_that_is_neither_is_named_and_taken_as_off(read: Read, value: str) -> None:
    settings, told = read(f"[main]\n\n[repos]\ngood = off\nupdates = {value}\n")
    assert len(told) == 1
    assert "line 5: updates: " in told[0]
    assert repr(value.split("\n")[0])[:-1] in told[0]
    assert "\n" not in told[0]
    assert settings.enabled
    assert not settings.broken
    assert settings.of_repo("updates") == "off"


def test_secrets_in_such_a_value_are_not_told(read: Read) -> None:
    _, told = read("[repos]\nu = ftp://me:hidden@m.example.org/\n")
    assert "m.example.org" in told[0]
    assert "hidden" not in told[0]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[main]\nenabled = 1\ntimeout = abc\n", 3),
        ("[main]\ntimeout = nan\n", 2),
        ("[main]\ntimeout = -1\n", 2),
        ("[main]\ntimeout = 1e400\n", 2),
        ("[main]\ntimeout =\n", 2),
        ("[main]\nenabled = maybe\n", 2),
        ("[main]\ncommand = ; none\n", 2),
        ("[repos]\nu = off\n\nno equals sign\n", 4),
        ("u = off\n", 1),
        ("[main\nenabled = 1\n", 1),
        (b"[repos]\nu = off\nv = \xff\n", 3),
    ],
)
def test_a_file_that_cannot_be_used_switches_off(read: Read, text: str | bytes, line: int) -> None:
    settings, told = read(text)
    assert len(told) == 1
    assert f"tidings.conf: line {line}: " in told[0]
    assert "Tidings is off" in told[0]
    assert "\n" not in told[0]
    assert not settings.enabled
    source = PLUGIN.Source("u", ["https://a.example.org"])
    with pytest.raises(PLUGIN.Quiet):
        source.candidates(settings)


def test_a_file_that_may_not_be_read_switches_off(tmp_path: Path) -> None:
    told: list[str] = []
    settings = PLUGIN.Settings(str(tmp_path), told.append)  # a folder
    assert (settings.enabled, len(told)) == (False, 1)


def test_no_file_is_no_mistake(tmp_path: Path) -> None:
    told: list[str] = []
    settings = PLUGIN.Settings(str(tmp_path / "none.conf"), told.append)
    assert (settings.enabled, settings.command, settings.timeout) == (True, "tidings", 300.0)
    assert told == []


def test_the_file_that_is_shipped_has_no_mistake() -> None:
    told: list[str] = []
    path = ROOT / "client" / "dnf-plugins" / "tidings.conf"
    settings = PLUGIN.Settings(str(path), told.append)
    assert (settings.enabled, settings.repos, told) == (True, {}, [])
    # And each of its examples is one.
    text = path.read_text().replace("# command", "command").replace("# timeout", "timeout")
    text = text.replace("# updates", "updates").replace("# fedora", "fedora")
    copy = PLUGIN.Settings.__new__(PLUGIN.Settings)
    copy.command, copy.timeout, copy.repos, copy.mistakes = "", 0.0, {}, []
    copy._take(text.encode())
    assert (copy.mistakes, copy.timeout, copy.command) == ([], 300.0, "/usr/bin/tidings")
    assert copy.repos["fedora-cisco-openh264"] == "off"


def test_mistakes_go_to_dnf_s_log_by_themselves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tidings.conf"
    path.write_text("[repos]\nu = 100%\n")
    PLUGIN.Settings(str(path))
    assert [(each.name, each.levelname) for each in caplog.records] == [("dnf.plugin", "WARNING")]
    assert "100%" in caplog.text


LINES = st.lists(
    st.sampled_from(
        ["[main]", "[repos]", "[DEFAULT]", "[", "a = b", "  c", "=", "= x", "enabled = no",
         "a:b=off", "timeout = 9", "timeout=1e999", "u = https://h/%(x)s", "# c", ";", "", "\x00",
         "\ufeff", "%"]
    ) | st.text(max_size=9)
).map("\n".join)  # fmt: skip


@given(LINES.map(str.encode) | st.binary(max_size=40))
def test_nothing_is_raised_and_what_is_kept_is_sound(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.conf"
    path.write_bytes(data)
    told: list[str] = []
    settings = PLUGIN.Settings(str(path), told.append)
    assert all("\n" not in line for line in told)
    assert settings.broken <= (not settings.enabled)
    for value in settings.repos.values():
        assert value.lower() in ("", "on", "auto", "off") or value.lower().startswith("http")
