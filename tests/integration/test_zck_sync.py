"""zchunk records through publish and sync: bit for bit, for the price of what changed."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from support import zchunk
from support.repos import DAY, START, compress, contents, evolve, packages, rpm_md
from support.servers import Misbehaving
from support.syncing import Notes, fetch, tree
from tidings_chunkstore import recipe as recipes
from tidings_chunkstore import zck
from tidings_chunkstore.backends.local import LocalBackend
from tidings_chunkstore.ids import ContentId
from tidings_chunkstore.opening import Codec
from tidings_chunkstore.publisher import Options, Report, publish
from tidings_chunkstore.wire import uvarints
from tidings_client.verify import verify

#: Writes step N of a history below a root; the folder beside is for what it needs besides.
Writer = Callable[[Path, Path, int], None]
_LIST = ("primary", "filelists", "other")


def history(step: int, count: int = 150) -> tuple[object, ...]:
    made = packages(count)
    for number in range(1, step + 1):
        made = evolve(made, number, 0.03)
    return made


def by_zck(way: str, with_dictionary: bool = False) -> Writer:
    def write(root: Path, beside: Path, step: int) -> None:
        given = dictionaries(beside) if with_dictionary else None
        named = {kind: given / f"{kind}.xml.zdict" for kind in _LIST} if given else None
        made = history(step)
        zchunk.by_zck(root, made, way, timestamp=START + step * DAY, dictionaries=named)  # type: ignore[arg-type]

    return write


def by_mergerepo(with_dictionary: bool = False) -> Writer:
    def write(root: Path, beside: Path, step: int) -> None:
        first, second = beside / "first", beside / "second"
        rpm_md(first, history(step), timestamp=START + step * DAY)  # type: ignore[arg-type]
        rpm_md(second, packages(40, seed=9))
        zchunk.by_mergerepo(
            root, [first, second], dictionaries(beside) if with_dictionary else None
        )

    return write


def by_createrepo(with_dictionary: bool = False) -> Writer:
    def write(root: Path, beside: Path, step: int) -> None:
        from support.dnf import build_packages

        rpms = beside / "rpms"
        if not rpms.exists():
            build_packages(rpms, 3)
        comps = beside / "comps.xml"
        comps.write_bytes(contents(packages(30 + step), ["group"])["group"])
        found = [rpm for n in range(1, step + 2) for rpm in sorted(rpms.glob(f"{n}/rpms/*.rpm"))]
        zchunk.by_createrepo(root, found, comps, dictionaries(beside) if with_dictionary else None)

    return write


def dictionaries(beside: Path) -> Path:
    """Dictionaries as createrepo_c looks for them, trained once."""
    folder = beside / "dictionaries"
    if not folder.exists():
        folder.mkdir()
        for kind, content in contents(packages(400), _LIST).items():
            (folder / f"{kind}.xml.zdict").write_bytes(zchunk.dictionary(content))
    return folder


WRITERS: Mapping[str, Writer] = {
    **{f"zck {way}": by_zck(way) for way in zchunk.WAYS},
    "zck split, dictionary": by_zck("split", with_dictionary=True),
    "mergerepo_c": by_mergerepo(),
    "mergerepo_c, dictionary": by_mergerepo(with_dictionary=True),
    "createrepo_c": by_createrepo(),
    "createrepo_c, dictionary": by_createrepo(with_dictionary=True),
}


def publish_now(root: Path) -> Report:
    return publish(root, LocalBackend(root / "tidings"), Options())


def wrapped(dest: Path) -> list[Path]:
    return sorted((dest / "repodata").glob("*.zck"))


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "beside"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.tools
@pytest.mark.parametrize("name", WRITERS)
def test_bit_for_bit(name: str, misbehaving: Misbehaving, tmp_path: Path, beside: Path) -> None:
    root, dest = misbehaving.root, tmp_path / "dest"
    for step in range(3):
        WRITERS[name](root, beside, step)
        report = publish_now(root)
        assert not [file.path for file in report.opaque if file.path.endswith(".zck")]
        result = fetch(misbehaving.url, dest)
        assert tree(dest) == tree(root)
        assert result.fallback_reason is None
        files = wrapped(dest)
        assert len(files) >= 3
        for path in files:
            assert zchunk.accepted(path)
        if step:
            assert {f.route for f in result.files if f.path.endswith(".zck")} <= {
                "delta",
                "current",
            }
            assert result.requests == 2


@pytest.mark.tools
def test_the_records_come_and_go(misbehaving: Misbehaving, tmp_path: Path, beside: Path) -> None:
    root, dest, late = misbehaving.root, tmp_path / "dest", tmp_path / "late"
    for step in range(6):
        if step in (2, 3):
            WRITERS["zck split"](root, beside, step)
        else:
            rpm_md(root, history(step), codec="zst", types=_LIST, timestamp=START + step * DAY)  # type: ignore[arg-type]
        publish_now(root)
        result = fetch(misbehaving.url, dest)
        assert tree(dest) == tree(root)
        if step == 0:
            fetch(misbehaving.url, late)
        if step:
            # With the records' first day, too: the content is here, and side contents are small.
            assert "full" not in {f.route for f in result.files}
        if step == 3:  # from before the records to their second day
            result = fetch(misbehaving.url, late)
            assert tree(late) == tree(root)
            assert "full" not in {f.route for f in result.files}


@pytest.mark.tools
def test_seeds(misbehaving: Misbehaving, tmp_path: Path, beside: Path) -> None:
    """Each .zck is a base: of a dnf cache, loose, alone in DEST."""
    root = misbehaving.root
    WRITERS["zck split, dictionary"](root, beside, 0)
    publish_now(root)
    cache, loose, dest = tmp_path / "updates-0123" / "repodata", tmp_path / "loose", tmp_path / "d"
    fetch(misbehaving.url, dest, types=_LIST, zchunk=True)
    assert len(wrapped(dest)) == 3
    assert len(list(dest.glob("repodata/*.zst"))) == 0
    shutil.copytree(dest / "repodata", cache)
    shutil.copytree(dest / "repodata", loose)
    (loose / "repomd.xml").unlink()
    WRITERS["zck split, dictionary"](root, beside, 1)
    publish_now(root)
    for number, seed in enumerate((cache.parent, loose)):
        result = fetch(misbehaving.url, tmp_path / f"dest{number}", seeds=(seed,))
        assert tree(tmp_path / f"dest{number}") == tree(root)
        assert {f.route for f in result.files} <= {"delta", "current"}
    result = fetch(misbehaving.url, dest, types=_LIST, zchunk=True)
    assert len(wrapped(dest)) == 3
    assert {f.route for f in result.files} == {"delta"}


@pytest.mark.tools
def test_comps_wrapped_twice(misbehaving: Misbehaving, tmp_path: Path) -> None:
    """createrepo_c wraps the compressed comps: the content of the .zck is the .gz."""
    root, scratch = misbehaving.root, tmp_path / "scratch"
    scratch.mkdir()
    for step in range(3):
        made = packages(400 + step)
        rpm_md(root, made, types=("primary", "group"), timestamp=START + step * DAY)
        (scratch / "gz").write_bytes(compress(contents(made, ["group"])["group"], "gz"))
        data = zchunk.zck(scratch / "gz", scratch / "zck")
        zchunk.add_records(root, {"group_gz": data}, START + step * DAY)
        assert publish_now(root).opaque == ()
        fetch(misbehaving.url, tmp_path / "dest")
        assert tree(tmp_path / "dest") == tree(root)


@pytest.mark.tools
@pytest.mark.parametrize("zchunk_wanted", [True, False])
def test_types_take_the_record_that_librepo_would(
    zchunk_wanted: bool, misbehaving: Misbehaving, tmp_path: Path, beside: Path
) -> None:
    from tidings_client.cli import main

    WRITERS["zck split"](misbehaving.root, beside, 0)
    publish_now(misbehaving.root)
    words = ["sync", "-q", "--types", "primary", misbehaving.url, str(tmp_path / "dest")]
    assert main(words + ["--zchunk"] * zchunk_wanted) == 0
    names = {path.name.partition(".")[2] for path in (tmp_path / "dest/repodata").iterdir()}
    assert names == {"xml", "xml.zck" if zchunk_wanted else "xml.zst"}


# --- carried chunks ------------------------------------------------------------------------------


@pytest.mark.tools
def test_carried_chunks_cost_their_change(
    misbehaving: Misbehaving, tmp_path: Path, beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that no engine makes are carried; a client keeps them for the next delta."""
    root, dest = misbehaving.root, tmp_path / "dest"
    real = zck._Files._is_stored

    def odd(self: zck._Files, number: int, made: bytes) -> bool:
        return number % 40 != 7 and real(self, number, made)

    monkeypatch.setattr(zck._Files, "_is_stored", odd)
    for step in range(3):
        made = history(step, 600)
        zchunk.by_zck(root, made, types=("primary",), timestamp=START + step * DAY)  # type: ignore[arg-type]
        publish_now(root)
        result = fetch(misbehaving.url, dest)
        assert tree(dest) == tree(root)
        kept = [path.name for path in (dest / ".tidings").glob("side-*")]
        if step:
            assert len(kept) == 1
            assert result.requests == 2
        assert {path.name for path in (dest / ".tidings").iterdir()} - set(kept) == {
            "state.json", "head.json",
        }  # fmt: skip
    # Without what was kept, the carried chunks come by themselves, and not the whole file.
    shutil.rmtree(dest / ".tidings")
    made = history(3, 600)
    zchunk.by_zck(root, made, types=("primary",), timestamp=START + 3 * DAY)  # type: ignore[arg-type]
    publish_now(root)
    result = fetch(misbehaving.url, dest)
    assert tree(dest) == tree(root)
    assert {f.route for f in result.files} == {"delta"}


# --- what is wrong -------------------------------------------------------------------------------


def _ci(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F)
        value >>= 7
    out.append(value | 0x80)
    return bytes(out)


def _header(rest: bytes, size: int | None = None) -> bytes:
    """A file of a header only, its digest right."""
    lead = zck.MAGIC + _ci(1) + _ci(len(rest) if size is None else size)
    return lead + hashlib.sha256(lead + rest).digest() + rest


def _absurd(count: int, stored: int, opened: int) -> bytes:
    index = _ci(3) + _ci(count) + (bytes(16) + _ci(stored) + _ci(opened)) * 2
    return _header(bytes(32) + _ci(0) + _ci(2) + _ci(len(index)) + index + _ci(0))


DAMAGE: Mapping[str, Callable[[bytes], bytes]] = {
    "truncated in the header": lambda data: data[:200],
    "truncated in the data": lambda data: data[: len(data) * 2 // 3],
    "flipped in the header": lambda data: data[:90] + bytes([data[90] ^ 1]) + data[91:],
    "flipped in the data": lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
    "over-long": lambda data: data + b"more",
    "a billion chunks": lambda _: _absurd(1_000_000_000, 0, 0),
    "lengths beyond the file": lambda _: _absurd(2, 1 << 50, 1 << 50),
    "a bomb": lambda _: _absurd(2, 10, (1 << 32) - 1),
    "a header of gigabytes": lambda _: _header(b"", 1 << 40),
    "nothing": lambda _: b"",
}


@pytest.mark.tools
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_published_as_they_are(
    kind: str, misbehaving: Misbehaving, tmp_path: Path
) -> None:
    """Whatever a record names comes bit for bit; what cannot be opened is opaque."""
    import tracemalloc

    root, dest = misbehaving.root, tmp_path / "dest"
    content = contents(packages(200), ["primary"])["primary"]
    (tmp_path / "plain").write_bytes(content)
    good = zchunk.zck(tmp_path / "plain", tmp_path / "zck", "-s", "<package")
    bad = DAMAGE[kind](good)
    for step, data in enumerate((good, bad, good)):
        extra = {"primary_zck": (f"primary{step}.xml.zck", data)}
        rpm_md(root, packages(200), codec="zst", extra=extra, timestamp=START + step * DAY)
        tracemalloc.start()
        report = publish_now(root)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 << 20
        opaque = [file.path for file in report.opaque if file.path.endswith(".zck")]
        assert bool(opaque) == (data == bad and kind != "nothing")
        fetch(misbehaving.url, dest)
        assert tree(dest) == tree(root)


HOSTILE: Mapping[str, Callable[[bytes], bytes]] = {
    "lengths of a million chunks": lambda _: uvarints([1 << 20, *([1 << 25] * (1 << 20))]),
    "a count beyond the bytes": lambda _: uvarints([1 << 30, 1]),
    "a chunk of gigabytes": lambda _: uvarints([2, 0, 1 << 32]),
    "no lengths": lambda _: b"\0",
    "one chunk more": lambda good: uvarints([1, 0]) + good,
    "garbage": lambda _: b"\xff" * 5000,
}


@pytest.mark.tools
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_side_contents(
    kind: str, misbehaving: Misbehaving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mirror that lies in a side content costs the file itself, one line, and no memory."""
    import tracemalloc

    root, dest = misbehaving.root, tmp_path / "dest"
    made = packages(400)
    zchunk.by_zck(root, made, types=("primary",))
    publish_now(root)
    fetch(misbehaving.url, dest)
    real = recipes.find

    def lying(
        published: bytes, content: bytes, codec: Codec, hint: recipes.Recipe | None = None
    ) -> recipes.Found | None:
        found = real(published, content, codec, hint)
        if found is None or codec is not Codec.ZCK:
            return found
        side = HOSTILE[kind](next(iter(found.sides.values())))
        how = replace(found.recipe, sides=(ContentId.of(side),))
        return recipes.Found(how, {ContentId.of(side): side})

    monkeypatch.setattr(recipes, "find", lying)
    zchunk.by_zck(root, evolve(made, 1), types=("primary",), timestamp=START + DAY)
    publish_now(root)
    monkeypatch.undo()
    notes = Notes()
    tracemalloc.start()
    result = fetch(misbehaving.url, dest, notes=notes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tree(dest) == tree(root)
    assert peak < 96 << 20
    assert {f.type: f.route for f in result.files}["primary_zck"] == "full"
    assert {f.type: f.route for f in result.files}["primary"] == "delta"
    assert len(notes.texts) == 1
    assert re.fullmatch(r"[^\n]*primary[^\n]*", notes.texts[0])
    assert (result.fallback_reason or "").startswith("recipe-")


@pytest.mark.tools
def test_a_damaged_seed_is_of_no_use_and_no_harm(
    misbehaving: Misbehaving, tmp_path: Path, beside: Path
) -> None:
    root = misbehaving.root
    WRITERS["zck split"](root, beside, 0)
    publish_now(root)
    shutil.copytree(root / "repodata", tmp_path / "seed")
    for path in tmp_path.glob("seed/*.zst"):
        path.unlink()
    for path, damage in zip(sorted(tmp_path.glob("seed/*.zck")), DAMAGE.values(), strict=False):
        path.write_bytes(damage(path.read_bytes()))
    WRITERS["zck split"](root, beside, 1)
    publish_now(root)
    for main in (True, False):
        if not main:
            (tmp_path / "seed/repomd.xml").unlink()
        fetch(misbehaving.url, tmp_path / f"dest{main}", seeds=(tmp_path / "seed",))
        assert tree(tmp_path / f"dest{main}") == tree(root)


def test_the_sides_that_a_file_tells_are_the_recipes(tmp_path: Path) -> None:
    content = contents(packages(60), ["primary"])["primary"]
    (tmp_path / "plain").write_bytes(content)
    (tmp_path / "dict").write_bytes(
        zchunk.dictionary(contents(packages(300), ["primary"])["primary"])
    )
    for more in ([], [f"--dict={tmp_path}/dict"]):
        data = zchunk.zck(tmp_path / "plain", tmp_path / "zck", "-s", "<package", *more)
        opened = b"".join(zck.open_stream(io.BytesIO(data), limit=1 << 30))
        found = recipes.find(data, opened, Codec.ZCK)
        assert found is not None
        assert zck.read_sides(io.BytesIO(data)) == list(found.sides.values())
        assert zck.untold_sides(found.recipe.params) == 0


def test_verify_takes_what_createrepo_c_made(tmp_path: Path) -> None:
    """It promises the size of what it wrapped, which for groups was wrapped already."""
    root, beside = tmp_path / "r", tmp_path / "beside"
    for folder in (root, beside):
        folder.mkdir()
    by_createrepo()(root, beside, 0)
    assert list((root / "repodata").glob("*comps*.zck"))
    assert list(verify(root).findings) == []
