"""What stands in front of servers: a terminator of TLS (nginx), a forward proxy (squid), Apache."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from support.servers import HOST, Nginx, free_port, start_nginx, stop, wait_port
from support.system import require

_TLS = """
listen {host}:{port} ssl;
ssl_certificate {certificates}/leaf.pem;
ssl_certificate_key {certificates}/leaf.key;
location / {{ proxy_pass {target}; proxy_http_version 1.1; proxy_set_header Connection ""; }}
"""
_SQUID = """
http_port {host}:{port}
pid_filename none
{cache}
memory_cache_shared off
logformat asked %rm %ru %>Hs
access_log stdio:{folder}/access.log logformat=asked
cache_log {folder}/cache.log
coredump_dir {folder}
shutdown_lifetime 1 seconds
http_access allow all
pinger_enable off
netdb_filename none
"""
#: Debian's rules, room for a distribution's metadata, and what sites add for repositories: else
#: squid takes an old file for a fresh one.
_SQUID_CACHE = """
cache_mem 1024 MB
maximum_object_size_in_memory 256 MB
maximum_object_size 256 MB
refresh_pattern repomd.xml$ 0 0% 0
refresh_pattern . 0 20% 4320
"""
_APACHE = """
ServerRoot {folder}
PidFile {folder}/httpd.pid
ServerName {host}
DefaultRuntimeDir {folder}
Mutex file:{folder} default
Listen {host}:{port}
{modules}
TypesConfig /dev/null
ErrorLog {folder}/error.log
LogFormat "%m %U %>s %B" counted
CustomLog {folder}/access.log counted
StartServers 1
{user}
{text}
"""
_APACHE_MODULES = (
    "mpm_event authz_core dir env mime deflate filter headers rewrite"
    " proxy proxy_http proxy_balancer lbmethod_byrequests slotmem_shm"
)


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA (``ca.pem``) and a certificate of it for 127.0.0.1 (``leaf.pem``, ``leaf.key``)."""

    folder: Path

    @property
    def ca(self) -> Path:
        """The CA's certificate."""
        return self.folder / "ca.pem"

    @classmethod
    def make(cls, folder: Path) -> Authority:
        """Make both in *folder*, which is made too."""
        folder.mkdir(parents=True)
        req = [require("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        ca = ["-subj", "/CN=Test CA", "-keyout", "ca.key", "-out", "ca.pem"]
        leaf = ["-subj", "/CN=127.0.0.1", "-CA", "ca.pem", "-CAkey", "ca.key"]
        leaf += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "leaf.key"]
        leaf += ["-addext", "basicConstraints=critical,CA:FALSE", "-out", "leaf.pem"]
        for words in (ca, leaf):
            subprocess.run([*req, *words], cwd=folder, check=True, capture_output=True)
        return cls(folder)


@dataclass(frozen=True, slots=True)
class TlsFront:
    """nginx that speaks TLS and passes all on. A context manager."""

    url: str
    nginx: Nginx

    @classmethod
    def start(cls, folder: Path, target: str, authority: Authority) -> TlsFront:
        """In front of the base URL *target*."""
        port = free_port()
        text = _TLS.format(host=HOST, port=port, certificates=authority.folder, target=target)
        return cls(f"https://{HOST}:{port}", start_nginx(folder, text))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.nginx.stop()


@dataclass(frozen=True, slots=True)
class ForwardProxy:
    """squid that keeps nothing, or what fits in memory. A context manager."""

    url: str
    folder: Path
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, cache: bool = False) -> ForwardProxy:
        """For everybody on this machine; *cache*: with a gigabyte, and its usual rules."""
        # squid does not run as root: it takes another user, who writes the logs.
        folder = Path(tempfile.mkdtemp(prefix="squid-"))
        folder.chmod(0o777)
        config, port = folder / "squid.conf", free_port()
        kept = _SQUID_CACHE if cache else "cache deny all"
        config.write_text(_SQUID.format(host=HOST, port=port, folder=folder, cache=kept))
        with (folder / "output.log").open("wb") as sink:
            process = subprocess.Popen(
                # Its name is that of its shared memory, which another one may have.
                [require("squid"), "-N", "-n", f"test{port}", "-f", str(config)],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(folder)},
            )
        wait_port(port, process, folder / "cache.log")
        return cls(f"http://{HOST}:{port}", folder, process)

    def requests(self) -> list[str]:
        """URLs that were asked for. squid logs a request when it is done."""
        log = self.folder / "access.log"
        return [line.split()[1] for line in log.read_text().splitlines()] if log.exists() else []

    def stop(self) -> None:
        """Ends it; a second time does nothing."""
        stop(self.process)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass(frozen=True, slots=True)
class Apache:
    """Apache with the text of its virtual hosts. A context manager."""

    url: str
    folder: Path
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, folder: Path, port: int, text: str) -> Apache:
        """*text* has a VirtualHost at *port*. Skips without Apache."""
        program = require("apache2")
        modules = Path("/usr/lib/apache2/modules")
        folder.mkdir(parents=True)
        lines = "\n".join(
            f"LoadModule {name}_module {modules}/mod_{name}.so" for name in _APACHE_MODULES.split()
        )
        # Files of a test belong to its user; as root Apache takes another one, who must read them.
        user = "User www-data\nGroup www-data" if os.geteuid() == 0 else ""
        config = folder / "httpd.conf"
        config.write_text(
            _APACHE.format(folder=folder, host=HOST, port=port, modules=lines, user=user, text=text)
        )
        with (folder / "output.log").open("wb") as sink:
            process = subprocess.Popen(
                [program, "-f", str(config), "-DFOREGROUND"],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
        wait_port(port, process, folder / "output.log")
        return cls(f"http://{HOST}:{port}", folder, process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        stop(self.process)
