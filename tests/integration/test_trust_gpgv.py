"""Signatures by the real gpgv over keys and signatures of the real gpg."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.system import require
from tidings_chunkstore.errors import InputError, LocalError, TidingsError, VerificationError
from tidings_client.trust import TrustSettings, check_main, dearmor

MAIN = "repodata/repomd.xml"
ASC = "repodata/repomd.xml.asc"
DATA = b"<repomd/>\n"
RELEASE = b"Origin: test\nDate: Sat, 01 Nov 2025 00:00:00 UTC\n- dash\nSHA256:\n trailing \n"


@dataclass(frozen=True, slots=True)
class Gpg:
    """gpg in a home of its own."""

    home: Path

    def __call__(self, *arguments: str | Path, data: bytes = b"") -> bytes:
        command = ["gpg", "--homedir", str(self.home), "--batch", "--yes", "--no-tty", "--quiet"]
        command += ["--pinentry-mode", "loopback", "--passphrase", ""]
        done = subprocess.run(
            [*command, *map(str, arguments)], input=data, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def key(self, name: str, *options: str, expire: str = "never") -> None:
        self(*options, "--quick-gen-key", name, "ed25519", "sign", expire)

    def export(self, name: str, *options: str) -> bytes:
        return self("--export", *options, name)

    def sign(self, name: str, data: bytes = DATA, *options: str) -> bytes:
        return self("--local-user", name, "--armor", *options, "--detach-sign", data=data)

    def clearsign(self, name: str, data: bytes = RELEASE, *options: str) -> bytes:
        return self("--local-user", name, *options, "--clearsign", data=data)


@pytest.fixture(scope="module")
def gpg() -> Iterator[Gpg]:
    require("gpg")
    require("gpgv")
    # gpg's agent listens on a socket in the home, whose path must be short.
    home = Path(tempfile.mkdtemp(prefix="tg-"))
    tool = Gpg(home)
    try:
        tool.key("good@example.org")
        tool.key("other@example.org")
        yield tool
    finally:
        subprocess.run(
            ["gpgconf", "--homedir", str(home), "--kill", "all"], capture_output=True, check=False
        )
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def key(gpg: Gpg, tmp_path: Path) -> Path:
    path = tmp_path / "key.asc"
    path.write_bytes(gpg.export("good@example.org", "--armor"))
    return path


def check(key: Path, data: bytes, signature: bytes | None = None, main: str = MAIN) -> str:
    beside = {} if signature is None else {ASC if main == MAIN else "Release.gpg": signature}
    return check_main(TrustSettings(gpgkey=key), main, data, beside)


def refused(key: Path, data: bytes, signature: bytes | None = None, main: str = MAIN) -> str:
    with pytest.raises(VerificationError) as caught:
        check(key, data, signature, main)
    assert "\n" not in str(caught.value)
    return f"{caught.value.code}: {caught.value}"


def test_a_good_signature(gpg: Gpg, key: Path) -> None:
    assert check(key, DATA, gpg.sign("good@example.org")) == "gpg"
    assert check(key, RELEASE, gpg.sign("good@example.org", RELEASE), "Release") == "gpg"
    assert check(key, gpg.clearsign("good@example.org"), main="InRelease") == "gpg"


def test_a_binary_signature_is_as_good(gpg: Gpg, key: Path) -> None:
    signature = gpg("--local-user", "good@example.org", "--detach-sign", data=DATA)
    assert check(key, DATA, signature) == "gpg"


def test_keys_are_taken_armored_binary_and_several(gpg: Gpg, tmp_path: Path) -> None:
    signature = gpg.sign("good@example.org")
    armored = [gpg.export(f"{name}@example.org", "--armor") for name in ("other", "good")]
    binary = gpg.export("good@example.org")
    assert dearmor(armored[1]) == binary
    for data in (binary, b"\n".join(armored), armored[1].replace(b"\n", b"\r\n")):
        path = tmp_path / "keys"
        path.write_bytes(data)
        assert check(path, DATA, signature) == "gpg"


@pytest.mark.parametrize("place", [0, 4, len(DATA) - 1])
def test_changed_data(gpg: Gpg, key: Path, place: int) -> None:
    changed = bytearray(DATA)
    changed[place] ^= 1
    assert refused(key, bytes(changed), gpg.sign("good@example.org")).startswith("bad-signature")


def test_another_key(gpg: Gpg, key: Path) -> None:
    assert "another key" in refused(key, DATA, gpg.sign("other@example.org"))
    assert "another key" in refused(key, gpg.clearsign("other@example.org"), main="InRelease")


def test_one_good_signature_among_two(gpg: Gpg, key: Path) -> None:
    both = gpg.clearsign("good@example.org", RELEASE, "--local-user", "other@example.org")
    assert check(key, both, main="InRelease") == "gpg"
    both = gpg.sign("other@example.org", DATA, "--local-user", "good@example.org")
    assert check(key, DATA, both) == "gpg"


@pytest.mark.parametrize("signature", [b"", b"nonsense", b"-----BEGIN PGP SIGNATURE-----\n\n"])
def test_a_signature_that_is_none(key: Path, gpg: Gpg, signature: bytes) -> None:
    assert refused(key, DATA, signature).startswith("bad-signature")


def test_no_signature(key: Path, gpg: Gpg) -> None:
    assert refused(key, DATA).startswith("no-signature")
    assert refused(key, RELEASE, main="Release").startswith("no-signature")


def test_a_signature_for_another_file_does_not_count(gpg: Gpg, key: Path) -> None:
    """A clearsigned text where a detached signature belongs signs only itself."""
    assert refused(key, DATA, gpg.clearsign("good@example.org")).startswith("bad-signature")


def test_text_around_the_signed_text(gpg: Gpg, key: Path) -> None:
    signed = gpg.clearsign("good@example.org")
    for forged in (
        b"Evil: 1\n" + signed,
        signed + b"Evil: 1\n",
        signed.replace(b"\n\n", b"\nEvil: 1\n\n", 1),
        signed + signed,
    ):
        with pytest.raises(VerificationError):
            check(key, forged, main="InRelease")


def test_a_revoked_key(gpg: Gpg, tmp_path: Path) -> None:
    gpg.key("revoked@example.org")
    signature = gpg.sign("revoked@example.org")
    listing = gpg("--with-colons", "--list-keys", "revoked@example.org").decode()
    fingerprint = next(x.split(":")[9] for x in listing.splitlines() if x.startswith("fpr:"))
    path = tmp_path / "key"
    path.write_bytes(gpg.export("revoked@example.org"))
    assert check(path, DATA, signature) == "gpg"
    revocation = (gpg.home / "openpgp-revocs.d" / f"{fingerprint}.rev").read_text()
    gpg("--import", data=revocation.replace(":-----BEGIN", "-----BEGIN").encode())
    path.write_bytes(gpg.export("revoked@example.org"))
    assert "revoked" in refused(path, DATA, signature)


def test_an_expired_key(gpg: Gpg, tmp_path: Path) -> None:
    past = ("--faked-system-time", "20200101T000000")
    gpg.key("expired@example.org", *past, expire="30d")
    signature = gpg.sign("expired@example.org", DATA, *past)
    path = tmp_path / "key"
    path.write_bytes(gpg.export("expired@example.org"))
    assert "expired" in refused(path, DATA, signature)


def test_a_signature_over_sha1(gpg: Gpg, tmp_path: Path) -> None:
    gpg("--quick-gen-key", "weak@example.org", "rsa2048", "sign", "never")
    path = tmp_path / "key"
    path.write_bytes(gpg.export("weak@example.org"))
    good = gpg.sign("weak@example.org", DATA, "--digest-algo", "SHA256")
    assert check(path, DATA, good) == "gpg"
    weak = gpg.sign("weak@example.org", DATA, "--digest-algo", "SHA1", "--allow-weak-digest-algos")
    assert refused(path, DATA, weak).startswith("bad-signature")


@pytest.mark.parametrize("text", [b"", b"no key", b"\x99", b"-----BEGIN PGP PUBLIC KEY BLOCK-----"])
def test_a_key_file_that_is_none(tmp_path: Path, gpg: Gpg, text: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(text)
    with pytest.raises(TidingsError):
        check(path, DATA, gpg.sign("good@example.org"))
    with pytest.raises(InputError) as caught:
        check(tmp_path / "absent", DATA, b"x")
    assert caught.value.code == "bad-key"


def test_without_gpgv(key: Path, gpg: Gpg, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    signature = gpg.sign("good@example.org")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LocalError) as caught:
        check(key, DATA, signature)
    assert caught.value.code == "no-gpgv"
    assert "gpgv" in str(caught.value)


def test_nothing_is_left_behind(gpg: Gpg, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        check(key, DATA, gpg.sign("good@example.org"))
        refused(key, b"x", gpg.sign("good@example.org"))
        assert os.listdir(folder) == []
