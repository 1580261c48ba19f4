"""Layouts against arbitrary input: the promised value or a FormatError, never anything else."""

from __future__ import annotations

import os
from pathlib import Path
from xml.sax.saxutils import quoteattr

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from support.repos import apt, evolve, packages, rpm_md
from tidings_chunkstore.apt import cleartext
from tidings_chunkstore.errors import FormatError
from tidings_chunkstore.layout import APT, RPM_MD, Layout, safe_path, select

HEX = "0123456789abcdef" * 4
PATHS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(["..", ".", "", "a", "tidings", "repodata", "~"]), max_size=5).map(
        "/".join
    ),
)


@given(PATHS)
@example("a/..")
@example("a\x00b")
@example("\ud800")
def test_a_safe_path_stays_in_its_root(path: str) -> None:
    try:
        assert safe_path(path, "x") == path
    except FormatError:
        return
    joined = os.path.join("/root", path)
    assert os.path.normpath(joined) == joined
    assert joined.startswith("/root/")
    assert not joined.startswith("/root/tidings/")
    assert os.fsencode(path)
    assert path.isprintable()


def release(entries: dict[str, int]) -> bytes:
    return ("SHA256:\n" + "".join(f" {HEX} {size} {p}\n" for p, size in entries.items())).encode()


WORDS = st.text("abcdefgh", min_size=1, max_size=8)
ENTRIES = st.dictionaries(
    st.builds("f-{}/{}{}".format, WORDS, WORDS, st.sampled_from(["", ".gz", ".xz"])),
    st.integers(0, 2**32),
    min_size=1,
    max_size=12,
)


@given(ENTRIES, st.randoms(use_true_random=False))
def test_the_order_of_entries_does_not_matter(entries: dict[str, int], random: object) -> None:
    shuffled = list(entries.items())
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    listing = APT.parse(release(entries))
    assert listing.files == APT.parse(release(dict(shuffled))).files
    assert {file.path: file.size for file in listing.files} == entries

    def repomd(pairs: object) -> bytes:
        records = "".join(
            f'<data type="t{size}"><location href={quoteattr("repodata/" + path)}/>'
            f"<size>{size}</size></data>"
            for path, size in pairs  # type: ignore[attr-defined]
        )
        return f"<repomd>{records}</repomd>".encode()

    parsed = RPM_MD.parse(repomd(entries.items()))
    assert parsed.files == RPM_MD.parse(repomd(shuffled)).files
    flat = {f"repodata/{path}": size for path, size in entries.items() if "/" not in path}
    assert {file.path: file.size for file in parsed.files} == flat


@given(st.lists(st.text("ab- \t:", max_size=8), max_size=10))
def test_clearsigning_round_trip(lines: list[str]) -> None:
    body = "".join(("- " if line.startswith("-") else "") + line + "\n" for line in lines)
    message = (
        "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n"
        f"{body}-----BEGIN PGP SIGNATURE-----\n\nx\n-----END PGP SIGNATURE-----\n"
    )
    text = "\n".join(line.rstrip(" \t") for line in lines) + "\n"
    assert cleartext(message.encode()).decode() == text


@pytest.fixture(scope="module")
def mains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("repos")
    made = packages(3)
    return {
        "rpm-md": rpm_md(root / "rpm", made, tags=["x"]).read_bytes(),
        "apt": apt(root / "apt", made).read_bytes(),
    }


@pytest.mark.parametrize("layout", [RPM_MD, APT], ids=lambda layout: layout.name)
@given(data=st.data())
def test_damaged_main_files(layout: Layout, mains: dict[str, bytes], data: st.DataObject) -> None:
    main = bytearray(mains[layout.name])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(main)))
        end = min(len(main), start + data.draw(st.integers(0, 12)))
        main[start:end] = data.draw(
            st.one_of(
                st.binary(max_size=12),
                st.sampled_from(
                    [b"<", b">", b'"', b"&#0;", b"../", b"\n", b"-", b"\xff\xfe", b" "]
                ),
            )
        )
    listing = error = None
    try:
        listing = layout.parse(bytes(main))
    except FormatError as caught:
        error = caught
    if listing is None:
        assert "\n" not in str(error)
        return
    assert listing.layout == layout.name
    for file in listing.files:
        safe_path(file.path, "x")
    assert select(listing, None) == listing.files


@given(st.integers(0, 40), st.integers(0, 5), st.floats(0, 1))
def test_generated_packages_are_the_same_each_time(count: int, seed: int, share: float) -> None:
    made = packages(count, seed)
    assert made == packages(count, seed)
    after = evolve(made, seed, share)
    assert after == evolve(made, seed, share)
    assert (after != made) == (count > 0)


def test_the_next_publish_replaces_the_first(tmp_path: Path) -> None:
    made = packages(20)
    rpm_md(tmp_path, made, codec="gz")
    rpm_md(tmp_path, evolve(made, 1), codec="none")
    assert not list(tmp_path.glob("repodata/*.gz"))
    assert not list(tmp_path.glob("repodata/.*"))
