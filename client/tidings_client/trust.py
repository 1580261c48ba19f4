"""What proves a main file (repomd.xml, InRelease, Release), and when a step back is refused.

Signatures are checked with ``gpgv``, the verifier that apt uses: it knows no trust database and
takes exactly the keys it is given. The key never comes from the network.

Every sync reads this module and most use nothing but its settings, so what only a check needs is
imported there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tidings_chunkstore.errors import (
    FormatError,
    InputError,
    LocalError,
    RollbackError,
    VerificationError,
)
from tidings_chunkstore.limits import LIMITS

GPG = "gpg"
METALINK = "metalink"
SHA256 = "sha256"
TRANSPORT = "transport"

_GPGV_SECONDS = 60
_KEY_BYTES = 4 << 20  # a keyring file; distributions' are below 100 KB
_ARMOR = b"-----BEGIN PGP PUBLIC KEY BLOCK-----"
_ARMOR_END = b"-----END PGP PUBLIC KEY BLOCK-----"
#: Status lines of gpgv after which no signature of that file counts, whatever others say.
_REFUSED = {
    "EXPKEYSIG": "by a key that has expired",
    "REVKEYSIG": "by a key that was revoked",
    "EXPSIG": "that has expired",
    "BADSIG": "that does not fit the file",
}
#: OpenPGP's numbers of MD5, SHA-1 and RIPEMD-160 (RFC 9580, section 9.5).
_WEAK_HASHES = frozenset({"1", "2", "3"})


@dataclass(frozen=True, slots=True)
class TrustSettings:
    """What the caller demands. Without any of it the transport is all that speaks for a file."""

    repomd_sha256: str | None = None  #: hexadecimal, of the main file
    gpgkey: Path | None = None  #: public keys, armored or binary
    allow_older: bool = False
    allow_unsigned: bool = False
    metalink: bool = False  #: the digests came from a metalink
    repomd_sha512: str | None = None  #: the same, of a metalink that has no SHA-256

    def __post_init__(self) -> None:
        if self.repomd_sha256 is not None and not re.fullmatch(
            "[0-9a-f]{64}", self.repomd_sha256.lower()
        ):
            raise InputError(
                f"not a SHA-256 (64 hexadecimal digits): {self.repomd_sha256[:80]!r}",
                code="bad-sha256",
            )


def signature_paths(main: str) -> tuple[str, ...]:
    """The files that may sign *main*, next to none for InRelease, which signs itself."""
    from tidings_chunkstore import apt, rpmmd

    if main == rpmmd.MAIN:
        return (rpmmd.SIGNATURE,)
    return (apt.SIGNATURE,) if main == apt.RELEASE else ()


def check_main(settings: TrustSettings, main: str, data: bytes, beside: Mapping[str, bytes]) -> str:
    """Prove the main file; how it was proven: ``gpg``, ``metalink``, ``sha256`` or ``transport``.

    Args:
        main: its path, ``repodata/repomd.xml``, ``InRelease`` or ``Release``.
        beside: the files next to it by path; a signature is looked for there.

    Raises:
        VerificationError: it is not what the caller said (``wrong-sha256``), its signature is bad
            (``bad-signature``) or none of the key's (``no-signature``).
        InputError: the key file is none. LocalError: gpgv is not installed.
    """
    word = TRANSPORT
    for name, wanted in (("SHA-256", settings.repomd_sha256), ("SHA-512", settings.repomd_sha512)):
        if wanted is None:
            continue
        found = hashlib.new(name.replace("-", ""), data).hexdigest()
        if found != wanted.lower():
            raise VerificationError(
                f"{main} has {name} {found}, not {wanted.lower()}", code="wrong-sha256"
            )
        word = METALINK if settings.metalink else SHA256
    if settings.gpgkey is None:
        return word
    from tidings_chunkstore.apt import is_clearsigned

    with _keyring(settings.gpgkey) as (home, keyring):
        signature = next((beside[p] for p in signature_paths(main) if p in beside), None)
        if signature is None and not is_clearsigned(data):
            raise VerificationError(
                f"{main} is not signed, and a key was given to check it with", code="no-signature"
            )
        _gpgv(home, keyring, main, data, signature)
    return GPG


def check_step(
    settings: TrustSettings,
    *,
    old_timestamp: int | None,
    new_timestamp: int,
    old_trust: str | None,
    new_trust: str,
    old_signed: bool = False,
    new_signed: bool = False,
    old_serial: int | None = None,
    new_serial: int | None = None,
) -> None:
    """Refuse a step back. Pure.

    Args:
        old_timestamp: seconds since 1970, newest data timestamp or Date of what is in place; None
            when nothing is. 0 on either side says nothing.
        old_trust: the word that the last finished run recorded.
        old_signed: a signature lies beside the main file that is in place.
        old_serial: the serial of the head that the last finished run followed.

    Raises:
        RollbackError: ``older``, ``unsigned`` or ``serial``.
    """
    if old_timestamp and new_timestamp and new_timestamp < old_timestamp:
        _older(
            settings,
            f"the mirror's metadata is of {_day(new_timestamp)}, what is in place of "
            f"{_day(old_timestamp)}",
            "older",
        )
    if old_serial is not None and new_serial is not None and new_serial < old_serial:
        _older(settings, f"the mirror's head went from {old_serial} to {new_serial}", "serial")
    was = old_signed or old_trust == GPG
    if was and not (new_signed or new_trust == GPG) and not settings.allow_unsigned:
        text = "what is in place is signed and what the mirror offers is not"
        raise _refused(text, "--allow-unsigned accepts that", "--allow-unsigned", "unsigned")
    if old_trust == GPG and new_trust != GPG and not settings.allow_unsigned:
        text = "what is in place was checked with a key"
        hint = "give --gpgkey again, or --allow-unsigned"
        raise _refused(text, hint, "--allow-unsigned", "unsigned")


def _older(settings: TrustSettings, text: str, code: str) -> None:
    if not settings.allow_older:
        raise _refused(text, "--allow-older accepts that", "--allow-older", code)


def _refused(text: str, hint: str, option: str, code: str) -> RollbackError:
    """What has no command line with *option* says something else than *hint* after *text*."""
    return RollbackError(f"{text}; {hint}", code=code, text=text, option=option)


def _day(seconds: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


# -- keys ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _keyring(key: Path) -> Iterator[tuple[Path, Path]]:
    """A home of its own for gpgv and the keys in it, in the binary form that gpgv reads."""
    import tempfile

    try:
        with key.open("rb") as file:
            data = file.read(_KEY_BYTES + 1)
    except OSError as error:
        raise InputError(f"{key}: cannot read the key: {error.strerror}", code="bad-key") from error
    if len(data) > _KEY_BYTES:
        raise InputError(f"{key}: too large for a file of keys", code="bad-key")
    try:
        binary = dearmor(data)
    except FormatError as error:
        raise InputError(f"{key}: {error}", code="bad-key") from error
    with tempfile.TemporaryDirectory(prefix="tidings-gpg-") as folder:
        home = Path(folder)  # mode 0700
        keyring = home / "keys.gpg"
        keyring.write_bytes(binary)
        yield home, keyring


def dearmor(data: bytes) -> bytes:
    """Public keys in binary form: all blocks of an armored file, joined; binary as it is.

    Armor is RFC 9580, section 6.2; its checksum is optional there, and checked here if it is given.

    Raises:
        FormatError: they are no public keys.
    """
    if _ARMOR not in data:
        # The first packet is a public key: new format 0xc6, old format 0x98 to 0x9b.
        if data[:1] and (data[0] == 0xC6 or data[0] & 0xFC == 0x98):
            return data
        raise FormatError("no OpenPGP public key in it")
    out = bytearray()
    rest = data
    while (start := rest.find(_ARMOR)) >= 0:
        end = rest.find(_ARMOR_END, start)
        if end < 0:
            raise FormatError("an armored key does not end")
        out += _block(rest[start + len(_ARMOR) : end])
        rest = rest[end + len(_ARMOR_END) :]
    return bytes(out)


def _block(text: bytes) -> bytes:
    import base64
    import binascii

    lines = [line.strip() for line in text.split(b"\n")]
    if lines and not lines[0]:
        del lines[0]  # the rest of the line that the block begins with
    at = 0
    while at < len(lines) and b":" in lines[at]:
        at += 1
    body = [line for line in lines[at:] if line]
    checksum = None
    if body and body[-1].startswith(b"=") and len(body[-1]) == 5:
        checksum = body.pop()[1:]
    try:
        data = base64.b64decode(b"".join(body), validate=True)
        wanted = None if checksum is None else base64.b64decode(checksum, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError("an armored key is not base64") from error
    if not data or (wanted is not None and _crc24(data).to_bytes(3, "big") != wanted):
        raise FormatError("an armored key is damaged")
    return data


def _crc24(data: bytes) -> int:
    """RFC 9580, section 6.1.1."""
    crc = 0xB704CE
    for byte in data:
        crc ^= byte << 16
        for _ in range(8):
            crc <<= 1
            if crc & 0x1000000:
                crc ^= 0x1864CFB
    return crc & 0xFFFFFF


# -- gpgv ----------------------------------------------------------------------------------------


def _gpgv(home: Path, keyring: Path, main: str, data: bytes, signature: bytes | None) -> None:
    """Raises VerificationError unless a key of *keyring* signed *data*."""
    import shutil
    import subprocess

    from tidings_chunkstore.apt import cleartext

    program = shutil.which("gpgv")
    if program is None:
        raise LocalError(
            "--gpgkey needs the program gpgv, which is not installed (packages: gpgv on Debian, "
            "gnupg2 on Fedora)",
            code="no-gpgv",
        )
    if signature is not None and len(signature) > LIMITS.main:
        raise VerificationError(f"{main}: its signature is too large", code="bad-signature")
    signed = home / "signed"
    signed.write_bytes(data)
    files = [str(signed)]
    extracted = home / "extracted"
    if signature is not None:
        detached = home / "signature"
        detached.write_bytes(signature)
        files.insert(0, str(detached))
    else:
        # gpgv proves the text inside a cleartext message. What is parsed later must be that text
        # and nothing around it, so both readings are compared below.
        try:
            text = cleartext(data, main)
        except FormatError as error:
            raise VerificationError(str(error), code="bad-signature") from error
    command = [
        program,
        "--homedir",
        str(home),
        "--keyring",
        str(keyring),
        "--status-fd",
        "1",
        *files,
    ]
    if signature is None:
        command[-1:-1] = ["--output", str(extracted)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_GPGV_SECONDS,
            check=False,
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "HOME": str(home)},
        )
    except subprocess.TimeoutExpired as error:
        raise VerificationError(
            f"{main}: gpgv took longer than {_GPGV_SECONDS} s", code="bad-signature"
        ) from error
    except OSError as error:
        raise LocalError(f"{program}: {error.strerror}", code="no-gpgv") from error
    problem = judge(done.returncode, done.stdout.decode("utf-8", "replace"))
    if problem is not None:
        raise VerificationError(f"{main}: {problem}", code="bad-signature")
    if signature is None and _lines(extracted.read_bytes()) != _lines(text):
        raise VerificationError(
            f"{main}: gpgv and this program read different texts in it", code="bad-signature"
        )


def _lines(text: bytes) -> list[bytes]:
    """Lines as a cleartext signature covers them: without white space at their ends."""
    return [line.rstrip(b" \t\r") for line in text.rstrip(b" \t\r\n").split(b"\n")]


def judge(status: int, text: str) -> str | None:
    """What is wrong by gpgv's exit *status* and status lines; None when a signature is good. Pure.

    Format: doc/DETAILS of GnuPG. A file may have several signatures, some by keys unknown here:
    one good one is enough, as for apt. One by a key that is expired or revoked, or that does not
    fit, is never outweighed. MD5 and SHA-1 signatures do not count, as for apt.
    """
    good = weak = 0
    unknown: list[str] = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or words[0] != "[GNUPG:]":
            continue
        if words[1] in _REFUSED:
            return f"has a signature {_REFUSED[words[1]]} ({' '.join(words[2:3])})"
        if words[1] == "VALIDSIG":
            # fingerprint, day, time, expiry, version, reserved, key algorithm, hash algorithm
            if len(words) > 9 and words[9] in _WEAK_HASHES:
                weak += 1
            else:
                good += 1
        elif words[1] == "NO_PUBKEY":
            unknown.append(words[2] if len(words) > 2 else "")
    if good and (status == 0 or unknown):
        return None
    if unknown:
        return f"is signed by another key than the given ones ({', '.join(unknown)})"
    if weak:
        return "its signature is made over MD5 or SHA-1, which prove nothing any more"
    return "its signature cannot be checked: it is none, or of a kind that gpgv does not take"
