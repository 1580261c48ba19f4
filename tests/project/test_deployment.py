"""The compose file, Dockerfiles, nginx configuration and systemd units: what they name exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from support.commands import check_command
from support.fronts import Apache
from support.servers import Misbehaving, Servers, free_port
from tidings_server.settings import ServeSettings, load

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
UNITS = sorted((ROOT / "packaging/systemd").glob("*.service"))
NGINX = (ROOT / "packaging/nginx/tidings.conf").read_text()
APACHE = (ROOT / "packaging/apache/tidings.conf").read_text()


def filled(text: str) -> str:
    """``${NAME:-default}`` replaced by its default."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word, rest) for line in lines if line for word, _, rest in [line.partition(" ")]]


def test_compose_has_the_services_of_a_whole_mirror() -> None:
    assert set(SERVICES) == {"publish", "follow", "api", "nginx", "client"}


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_service_can_be_built_and_runs_confined(name: str) -> None:
    service = SERVICES[name]
    if "build" in service:
        assert (ROOT / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    else:
        assert re.fullmatch(r"[\w/-]+unprivileged:[\w.-]+", service["image"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert set(service.get("depends_on", ())) <= set(SERVICES)


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_service_mounts_what_exists_where_its_command_looks(name: str) -> None:
    service = SERVICES[name]
    targets = set()
    for volume in service["volumes"]:
        source, target, *_ = filled(volume).split(":")
        targets.add(target)
        if source.startswith("./") and source != "./mirror":
            assert (ROOT / source).exists(), source
        elif not source.startswith("./"):
            assert source in COMPOSE["volumes"]
    for word in service.get("command", ()):
        if word.startswith("/"):
            assert any(Path(word).is_relative_to(target) for target in targets), word
    if name == "nginx":
        root = re.search(r"root (\S+);", NGINX)
        assert root
        assert root[1] in targets


@pytest.mark.parametrize("name", ["publish", "follow", "api", "client"])
def test_service_command_and_options_exist(name: str) -> None:
    service = SERVICES[name]
    command = [filled(word) for word in service["command"]]
    dockerfile = dict(instructions(ROOT / service["build"]["dockerfile"]))
    if "ENTRYPOINT" in dockerfile:
        command = [*yaml.safe_load(dockerfile["ENTRYPOINT"]), *command]
    if command[0] == "publish-loop":
        script = (ROOT / "docker/publish-loop").read_text()
        copied = ("COPY", "docker/publish-loop /usr/local/bin/publish-loop")
        assert copied in instructions(ROOT / service["build"]["dockerfile"])
        called = re.search(r"^\s*(tidings-mirror [^|]*)\|\|", script, re.MULTILINE)
        assert called
        command = shlex.split(called[1].replace('"$root"', command[1]))
    check_command(command)


def test_the_server_sees_what_follow_does() -> None:
    shared = [v.removesuffix(":ro") for v in SERVICES["follow"]["volumes"]]
    assert SERVICES["api"]["volumes"] == [f"{v}:ro" for v in shared]


def test_the_settings_of_compose_can_be_read() -> None:
    text = (ROOT / "docker/mirror.toml").read_text()
    assert load(ROOT / "docker/mirror.toml", {}).repos == ()  # a mirror of its own has no upstream
    assert "# [[repo]]" in text


def test_ports_fit_together() -> None:
    api = SERVICES["api"]
    port = option(api["command"], "--port")
    assert api["expose"] == [port]
    assert f"server api:{port};" in NGINX
    assert option(api["command"], "--host") == "0.0.0.0"
    probe = " ".join(api["healthcheck"]["test"])
    assert f"http://127.0.0.1:{port}/healthz" in probe
    (published,) = SERVICES["nginx"]["ports"]
    inside = published.rpartition(":")[2]
    assert f"listen {inside};" in NGINX
    url = httpx.URL(filled(SERVICES["client"]["command"][1]))
    assert (url.host, str(url.port)) == ("nginx", inside)
    exposed = dict(instructions(ROOT / api["build"]["dockerfile"]))["EXPOSE"]
    assert exposed == port


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_is_multi_stage_non_root_and_copies_what_exists(dockerfile: Path) -> None:
    steps = instructions(dockerfile)
    stages = [place for place, (word, _) in enumerate(steps) if word == "FROM"]
    assert len(stages) == 2
    last = steps[stages[-1] :]
    assert [rest for word, rest in last if word == "USER"] == ["tidings"]
    assert not any("gcc" in rest for _, rest in last)
    sent = set((ROOT / ".dockerignore").read_text().split())
    for word, rest in steps:
        if word == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source.split('/')[0]}" in sent, source
        if word == "RUN" and "pip install" in rest:
            assert "--require-hashes" in rest or "--no-index" in rest
    for word, rest in steps:
        if word == "CMD" and "tidings-mirror" in rest:
            check_command(yaml.safe_load(rest))


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_unit_calls_a_command_that_exists(unit: Path) -> None:
    lines = re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        program, *rest = shlex.split(line)
        check_command([Path(program).name, *rest])
    assert "NoNewPrivileges=yes" in unit.read_text()


def test_what_units_need_is_made_by_what_is_packaged() -> None:
    spec = (ROOT / "packaging/rpm/tidings.spec").read_text()
    made = (ROOT / "packaging/sysusers.d/tidings.conf").read_text().split()[1]
    (folder,) = re.findall(
        r"^d (\S+) 0755 (?:tidings ){2}-$",
        (ROOT / "packaging/tmpfiles.d/tidings.conf").read_text(),
        re.MULTILINE,
    )
    for kind in ("sysusers", "tmpfiles"):
        assert f"packaging/{kind}.d/tidings.conf" in spec
        assert f"\n%{{_{kind}dir}}/tidings.conf\n" in spec
    for unit in UNITS:
        text = unit.read_text()
        assert re.findall(r"^(?:User|Group)=(.*)$", text, re.MULTILINE) == [made, made]
        for named in re.findall(r"^Read\w+Paths=(.*)$", text, re.MULTILINE):
            assert named == folder


@pytest.mark.parametrize("name", ["serve", "edge"])
def test_servers_units_leave_host_and_port_to_the_settings(name: str) -> None:
    text = (ROOT / f"packaging/systemd/tidings-{name}.service").read_text()
    assert not re.search(r"--host|--port|SERVE_HOST|SERVE_PORT", text)
    (cache,) = re.findall(r"^Environment=TIDINGS_MIRROR_SERVE_CACHE=(.*)$", text, re.MULTILINE)
    (made,) = re.findall(r"^CacheDirectory=(.*)$", text, re.MULTILINE)
    assert cache == f"/var/cache/{made}"
    serving = ServeSettings()
    assert f"http://{serving.host}:{serving.port} " in APACHE
    assert f":{serving.port};" in NGINX


def test_a_timer_never_stops_the_service_that_stays() -> None:
    unit = (ROOT / "packaging/systemd/tidings-follow-once.service").read_text()
    assert not re.search(r"^Conflicts=", unit, re.MULTILINE)
    (line,) = re.findall(r"^ExecCondition=(.*)$", unit, re.MULTILINE)
    assert shlex.split(line)[2] == "! systemctl is-active --quiet tidings-follow.service"


def test_publish_loop_is_a_program() -> None:
    loop = ROOT / "docker/publish-loop"
    subprocess.run(["sh", "-n", loop], check=True)
    assert loop.stat().st_mode & 0o111


def a_tree(root: Path) -> Path:
    """A repository that any user can read."""
    repo = root / "mirror" / "r"
    (repo / "tidings").mkdir(parents=True)
    (repo / "repodata").mkdir()
    (repo / "tidings/000001-ab.pack").write_bytes(b"p" * 5000)
    (repo / "tidings/head.json").write_bytes(b"{}")
    (repo / "repodata/repomd.xml").write_bytes(b"<repomd/>")
    return root / "mirror"


@pytest.mark.tools
def test_nginx_serves_the_tree_and_passes_the_rest_on(tmp_path: Path, servers: Servers) -> None:
    root = a_tree(tmp_path)
    api = servers.misbehaving(tmp_path / "nothing")
    port = free_port()
    text = NGINX.replace("listen 8000;", f"listen 127.0.0.1:{port};")
    text = text.replace("api:8080", f"127.0.0.1:{api.port}").replace("/srv/mirror", str(root))
    servers.nginx(tmp_path, http="gzip on; gzip_types *; gzip_min_length 1;" + text)
    check_front(f"http://127.0.0.1:{port}", api)


@pytest.mark.tools
def test_apache_serves_the_tree_and_passes_the_rest_on(tmp_path: Path, servers: Servers) -> None:
    with tempfile.TemporaryDirectory(prefix="tidings-apache-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # Apache reads as a user of its own
        root = a_tree(folder)
        api = servers.misbehaving(tmp_path / "nothing")
        port, inner = free_port(), free_port()
        text = APACHE.replace("VirtualHost *:8000", f"VirtualHost 127.0.0.1:{port}")
        text = text.replace("127.0.0.1:8001", f"127.0.0.1:{inner}")
        text = text.replace("127.0.0.1:8080", f"127.0.0.1:{api.port}")
        text = text.replace("/srv/mirror", str(root))
        text = "SetOutputFilter DEFLATE\n" + text
        with Apache.start(folder / "apache", port, text) as apache:
            check_front(apache.url, api)


def check_front(url: str, api: Misbehaving) -> None:
    """What a web server in front of *api* does with ``a_tree``."""
    api.answer(lambda seen: (200, f"api {seen.method} {seen.path}".encode()))
    base = f"{url}/r"
    pack = httpx.get(f"{base}/tidings/000001-ab.pack", headers={"Range": "bytes=10-19"})
    assert (pack.status_code, pack.content) == (206, b"p" * 10)
    assert "immutable" in pack.headers["cache-control"]
    assert "no-transform" in pack.headers["cache-control"]
    assert httpx.get(f"{base}/repodata/repomd.xml").content == b"<repomd/>"
    assert api.seen == []
    batch = httpx.post(f"{base}/tidings/frames", content=b"locations")
    assert batch.content == b"api POST /r/tidings/frames"
    assert api.seen[0].body == b"locations"
    assert httpx.get(f"{base}/tidings/000002-cd.pack").content.startswith(b"api GET")
    assert httpx.get(f"{base}/api/repos").content.startswith(b"api GET")
    # The server says in the head what it offers; while it is down the file itself answers.
    head = f"{base}/tidings/head.json"
    assert httpx.get(head).content == b"api GET /r/tidings/head.json"
    api.answer(lambda seen: (503, b"down"))
    httpx.get(head)  # Apache learns by one such answer where not to ask; clients ask twice
    file = httpx.get(head)
    assert (file.content, file.headers["content-type"]) == (b"{}", "application/json")
    assert "no-cache" in file.headers["cache-control"]
    again = httpx.get(head, headers={"If-None-Match": file.headers["etag"]})
    assert again.status_code == 304
    # What was not there is not there, whoever says so.
    assert httpx.get(f"{base}/..%2f..%2fetc/passwd").content[:4] != b"root"
