"""Trust without gpgv: hashes, steps back, key armor, and gpgv's status lines."""

from __future__ import annotations

import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings_chunkstore.errors import FormatError, InputError, RollbackError, VerificationError
from tidings_client.trust import TrustSettings, check_main, check_step, dearmor, judge

MAIN = "repodata/repomd.xml"
DATA = b"<repomd/>"
SHA = hashlib.sha256(DATA).hexdigest()


def test_the_word_says_what_proved_it() -> None:
    assert check_main(TrustSettings(), MAIN, DATA, {}) == "transport"
    assert check_main(TrustSettings(repomd_sha256=SHA), MAIN, DATA, {}) == "sha256"
    assert check_main(TrustSettings(repomd_sha256=SHA.upper()), MAIN, DATA, {}) == "sha256"
    settings = TrustSettings(repomd_sha256=SHA, metalink=True)
    assert check_main(settings, MAIN, DATA, {}) == "metalink"


def test_another_file_than_the_caller_said() -> None:
    with pytest.raises(VerificationError) as caught:
        check_main(TrustSettings(repomd_sha256=SHA), MAIN, DATA + b" ", {})
    assert caught.value.code == "wrong-sha256"


@pytest.mark.parametrize("text", ["", "12", SHA[:-1], SHA + "0", "g" * 64, SHA + "\n"])
def test_a_sha256_that_is_none(text: str) -> None:
    with pytest.raises(InputError):
        TrustSettings(repomd_sha256=text)


def step(settings: TrustSettings, **facts: object) -> str | None:
    everything: dict[str, object] = {
        "old_timestamp": None,
        "new_timestamp": 0,
        "old_trust": None,
        "new_trust": "transport",
        **facts,
    }
    try:
        check_step(settings, **everything)  # type: ignore[arg-type]
    except RollbackError as error:
        return error.code
    return None


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        ({}, None),
        ({"old_timestamp": 5, "new_timestamp": 5}, None),
        ({"old_timestamp": 5, "new_timestamp": 6}, None),
        ({"old_timestamp": 6, "new_timestamp": 5}, "older"),
        ({"old_timestamp": 6, "new_timestamp": 0}, None),
        ({"old_timestamp": 0, "new_timestamp": 5}, None),
        ({"old_serial": 6, "new_serial": 5}, "serial"),
        ({"old_serial": 6, "new_serial": 6}, None),
        ({"old_serial": 6, "new_serial": None}, None),
    ],
)
def test_older(facts: dict[str, object], code: str | None) -> None:
    assert step(TrustSettings(), **facts) == code
    assert step(TrustSettings(allow_older=True), **facts) is None
    assert step(TrustSettings(allow_unsigned=True), **facts) == code


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        ({"old_signed": True, "new_signed": True}, None),
        ({"old_signed": True, "new_signed": False}, "unsigned"),
        ({"old_signed": False, "new_signed": True}, None),
        ({"old_trust": "gpg", "new_trust": "gpg"}, None),
        ({"old_trust": "gpg", "new_trust": "transport"}, "unsigned"),
        ({"old_trust": "gpg", "new_trust": "sha256", "new_signed": True}, "unsigned"),
        ({"old_trust": "transport", "new_trust": "gpg"}, None),
        ({"old_trust": "sha256", "new_trust": "transport"}, None),
    ],
)
def test_once_signed_stays_signed(facts: dict[str, object], code: str | None) -> None:
    assert step(TrustSettings(), **facts) == code
    assert step(TrustSettings(allow_unsigned=True), **facts) is None
    assert step(TrustSettings(allow_older=True), **facts) == code


# -- armor ----------------------------------------------------------------------------------------


def armored(data: bytes, *, head: bytes = b"", tail: bytes = b"") -> bytes:
    return (
        b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n"
        + head
        + b"\n"
        + base64.encodebytes(data)
        + tail
        + b"-----END PGP PUBLIC KEY BLOCK-----\n"
    )


@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=3))
def test_armor_is_taken_off(blocks: list[bytes]) -> None:
    text = b"a comment\n".join(armored(b, head=b"Comment: x\n") for b in blocks)
    assert dearmor(text) == b"".join(blocks)


def test_the_checksum_is_checked_where_there_is_one() -> None:
    # CRC-24 of "123456789" is 0x21CF02, the check value of the catalogue of CRCs.
    data = b"123456789"
    good = base64.b64encode((0x21CF02).to_bytes(3, "big"))
    assert dearmor(armored(data, tail=b"=" + good + b"\n")) == data
    with pytest.raises(FormatError):
        dearmor(armored(data, tail=b"=AAAA\n"))


@given(st.binary(max_size=200))
def test_anything_else_is_no_key(data: bytes) -> None:
    try:
        out = dearmor(data)
    except FormatError:
        return
    assert out == data
    assert data[0] in (0xC6, 0x98, 0x99, 0x9A, 0x9B)


# -- status lines ---------------------------------------------------------------------------------

VALID = "[GNUPG:] VALIDSIG AAAA 2025-01-01 1735689600 0 4 0 22 {hash} 00 AAAA"
GOOD = VALID.format(hash=10)
WEAK = VALID.format(hash=2)
UNKNOWN = "[GNUPG:] ERRSIG BBBB 22 10 00 1735689600 9 -\n[GNUPG:] NO_PUBKEY BBBB"


@pytest.mark.parametrize(
    ("status", "lines", "word"),
    [
        (0, [GOOD], None),
        (2, [GOOD, UNKNOWN], None),
        (2, [UNKNOWN, GOOD], None),
        (1, [GOOD], "cannot be checked"),
        (0, [], "cannot be checked"),
        (0, ["VALIDSIG AAAA"], "cannot be checked"),
        (0, ["[GNUPG:] GOODSIG AAAA name"], "cannot be checked"),
        (2, [UNKNOWN], "another key"),
        (0, ["[GNUPG:] EXPKEYSIG AAAA name", GOOD], "expired"),
        (0, ["[GNUPG:] REVKEYSIG AAAA name", GOOD], "revoked"),
        (0, ["[GNUPG:] EXPSIG AAAA name", GOOD], "expired"),
        (1, [GOOD, "[GNUPG:] BADSIG CCCC name"], "does not fit"),
        (0, [WEAK], "SHA-1"),
        (0, [WEAK, GOOD], None),
    ],
)
def test_status_lines(status: int, lines: list[str], word: str | None) -> None:
    verdict = judge(status, "\n".join(lines))
    if word is None:
        assert verdict is None
    else:
        assert verdict is not None
        assert word in verdict
