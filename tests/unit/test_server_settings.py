"""Settings: one schema, the environment over the file, every mistake named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tidings_server import app, cli, settings
from tidings_server.settings import (
    ConfigError,
    FollowSettings,
    PublishSettings,
    RepoSettings,
    ServeSettings,
    UpstreamSettings,
)

ROOT = Path(__file__).resolve().parents[2]


def load(tmp_path: Path, text: str, **environment: str) -> settings.Settings:
    file = tmp_path / "mirror.toml"
    file.write_text(text)
    prefixed = {f"TIDINGS_MIRROR_{name}": value for name, value in environment.items()}
    return settings.load(file, prefixed)


def problems(tmp_path: Path, text: str, **environment: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, **environment)
    prefix = f"{tmp_path / 'mirror.toml'}: "
    return [problem.removeprefix(prefix) for problem in caught.value.problems]


def test_all_of_it(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        """
        [publish]
        keep = 7
        follow = ["/srv/a", "/srv/b"]
        [serve]
        root = "/srv/mirror"
        port = 8080
        cache_size = "10G"
        access_log = true
        [[repo]]
        path = "/fedora/43/"
        root = "/srv/fedora"
        layout = "rpm-md"
        """,
    )
    assert found.publish.keep == 7
    assert found.publish.follow == (Path("/srv/a"), Path("/srv/b"))
    assert found.serve.cache_size == 10 << 30
    assert found.serve.access_log is True
    assert found.repos == (RepoSettings("fedora/43", Path("/srv/fedora"), layout="rpm-md"),)


def test_the_environment_goes_over_the_file(tmp_path: Path) -> None:
    text = '[publish]\nkeep = 7\n[serve]\nport = 80\nstore = "/a"'
    environment = {"KEEP": "9", "SERVE_PORT": "0", "SERVE_ACCESS_LOG": "yes", "FOLLOW": "/x:/y"}
    found = load(tmp_path, text, **environment)
    assert (found.publish.keep, found.serve.port) == (9, 0)
    assert found.serve.store == Path("/a")
    assert found.serve.access_log is True
    assert found.publish.follow == (Path("/x"), Path("/y"))


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "other.toml"
    file.write_text("[publish]\nkeep = 3")
    assert settings.load(None, {"TIDINGS_MIRROR_CONFIG": str(file)}).publish.keep == 3
    for missing in (tmp_path / "none.toml", tmp_path, file / "below"):
        with pytest.raises(ConfigError, match="no such settings file"):
            settings.load(missing, {})


def test_each_mistake_has_its_line(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        """
        [publish]
        kep = 3
        keep_days = 0
        layout = "yum"
        [serve]
        port = "eighty"
        cache_size = "10X"
        [server]
        [[repo]]
        path = "a/../b"
        root = "/srv"
        [[repo]]
        path = "x"
        """,
        KEEP="none",
    )
    assert [problem.split(":")[0] for problem in found] == [
        "[publish] kep",
        "[publish] keep_days = 0",
        "[publish] layout = 'yum'",
        "[serve] port = 'eighty'",
        "[serve] cache_size = '10X'",
        "[[repo]] 'a/../b' path = 'a/../b'",
        "[[repo]] 'x'",
        "[server]",
        "TIDINGS_MIRROR_KEEP='none'",
    ]
    assert found[0].endswith("is keep meant?")
    assert found[-3].startswith("[[repo]] 'x': root is missing")
    assert found[-2].endswith("is serve meant?")


@pytest.mark.parametrize(
    "text",
    [
        *("publish = 3", "repo = 3", "[repo]\nkeep = 3", "[[repo]]\nkeep = true", "=", "\0"),
        '[[repo]]\npath="a"\nroot="/"\n[[repo]]\npath="a/"\nroot="/b"',
        "[publish]\nkeep = 10000000000000000000000000",
        "[publish]\nfollow = 3",
        '[serve]\nhost = ""',
    ],
)
def test_bad_files(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, text)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "mirror.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError):
        settings.load(tmp_path / "mirror.toml", {})


def test_the_schema_is_the_classes() -> None:
    for table, kind in (
        ("publish", PublishSettings),
        ("serve", ServeSettings),
        ("follow", FollowSettings),
    ):
        assert set(settings.rows(table)) == {field.name for field in dataclasses.fields(kind)}
    held = {
        field.name
        for kind in (RepoSettings, UpstreamSettings)
        for field in dataclasses.fields(kind)
    }
    assert set(settings.rows("repo")) == held - {"upstream"}


def test_a_repository_comes_from_one_place(tmp_path: Path) -> None:
    file = tmp_path / "mirror.toml"
    file.write_text(
        '[[repo]]\npath = "held"\nroot = "/srv/held"\nmetalink = "https://a/m?repo=x"\nevery = 60\n'
        '[[repo]]\npath = "pulled"\nurls = ["https://a/x/", "http://b/x"]\ngpgkey = "/etc/key"\n'
    )
    read = settings.load(file, {})
    (held,), (pulled,) = read.repos, read.pulled
    assert held.upstream == UpstreamSettings(metalink="https://a/m?repo=x", every=60)
    assert pulled.upstream.urls == ("https://a/x/", "http://b/x")


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ('urls = "https://a/"\nmetalink = "https://a/"', "one upstream is wanted"),
        ('urls = "file:///etc/"', "a URL is wanted"),
        ('root = "/srv"\ntypes = "primary"', "types without"),
        ('urls = "https://a/"\nkeep = 3', "keep without root"),
        ("", "root is missing"),
    ],
)
def test_upstreams_that_mean_nothing(tmp_path: Path, table: str, why: str) -> None:
    (problem,) = problems(tmp_path, f'[[repo]]\npath = "x"\n{table}\n')
    assert why in problem


@pytest.mark.parametrize(
    ("path", "why"),
    [
        *((own, "the server's own") for own in ("api", "api/repos", "-/x", "docs/", "/metrics")),
        ("-x", "looks like an option"),
        ("a/.hidden", "begin with a dot"),
    ],
)
def test_paths_that_no_request_reaches(tmp_path: Path, path: str, why: str) -> None:
    (problem,) = problems(tmp_path, f'[[repo]]\npath = "{path}"\nroot = "/srv"\n')
    assert why in problem


@pytest.mark.parametrize("path", ["apis/x", "a/api", "docs/43", "a-b"])
def test_paths_beside_the_servers_own(tmp_path: Path, path: str) -> None:
    (repo,) = load(tmp_path, f'[[repo]]\npath = "{path}"\nroot = "/srv"\n').repos
    assert repo.path == path


def test_the_servers_own_paths_are_those_of_the_application() -> None:
    assert {"/", *(f"/{name}" for name in settings.RESERVED)} == app.OWN
    assert {f"/{name}/" for name in settings.RESERVED_BELOW} == set(app.OWN_BELOW)


def test_two_repositories_have_two_roots(tmp_path: Path) -> None:
    text = '[[repo]]\npath="a"\nroot="/srv/x"\n[[repo]]\npath="b"\nroot="/srv/y/../x/"\n'
    (problem,) = problems(tmp_path, text)
    assert problem == "[[repo]] 'b': root /srv/x is that of 'a'"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ('urls = "http://[::1/"', "a URL is wanted"),
        ('urls = "http://h:99999/"', "a URL is wanted"),
        ('urls = "http://h/a b/"', "a URL is wanted"),
        ('urls = "http://h/?a=b"', "has no query"),
        ('metalink = "http:///x"', "a URL is wanted"),
        ('urls = "http://h/"\ntypes = "@nothing"', "unknown set"),
        ('urls = "http://h/"\ntypes = ["pri mary"]', "not a metadata type"),
    ],
)
def test_what_a_look_would_fail_at_is_a_mistake(tmp_path: Path, said: str, why: str) -> None:
    (problem,) = problems(tmp_path, f'[[repo]]\npath = "x"\n{said}\n')
    assert why in problem


@pytest.mark.parametrize(
    "said",
    [
        'urls = "ftp://user:secret@h/"',
        'urls = ["http://user:secret@h:99999/"]',
        'urls = "http://user:secret/x@h/?q"',
        'urls = "user:secret@h/"',
        'metalink = "ftp://h/?key=secret"',
        'urls = {a = "http://user:secret@h/"}',
    ],
)
def test_passwords_are_not_told(tmp_path: Path, said: str) -> None:
    assert "secret" not in " ".join(problems(tmp_path, f'[[repo]]\npath = "x"\n{said}\n'))


def test_config_check_looks_for_the_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "key"
    file = tmp_path / "mirror.toml"
    file.write_text(f'[[repo]]\npath = "x"\nurls = "http://h/"\ngpgkey = "{key}"\n')
    check = ["config", "check", "--config", str(file)]
    assert cli.main(check) != 0
    assert f"gpgkey {key} is no file" in capsys.readouterr().err
    key.write_text("key")
    assert cli.main(check) == 0


def test_the_document_has_every_setting_and_no_other() -> None:
    text = (ROOT / "docs" / "config.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    names = [(row.split("|")[1].strip(" `"), row.split("|")[2].strip(" `")) for row in rows]
    expected = [
        (f"{table}.{setting.name}", setting.environment or "")
        for table in ("publish", "serve", "follow", "repo")
        for setting in settings.rows(table).values()
    ]
    documented = dict(names)
    for name, variable in expected:
        shown = "" if name.startswith("repo.") else variable
        assert documented.get(name) == shown, name
    assert set(documented) == {name for name, _ in expected}
