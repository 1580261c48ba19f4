"""Repositories with zchunk records, by the real programs: zck, createrepo_c and mergerepo_c."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from support.repos import START, GeneratedPackage, contents, rpm_md
from support.system import require

#: What `zck` is told, by a name for it.
WAYS: Mapping[str, tuple[str, ...]] = {
    "automatic": (),
    "split": ("-s", "<package"),
    "manual": ("-m", "-s", "<package"),
    "open digests": ("-u", "-s", "<package"),
    "sha512": ("-h", "sha512"),
}
_DATA = re.compile(rb"  <data type=\"(\w+)\">.*?</data>\n", re.DOTALL)


def run(*words: object) -> bytes:
    """The output of a program that must not fail."""
    words = (require(str(words[0])), *words[1:])
    return subprocess.run([str(w) for w in words], check=True, capture_output=True).stdout


def zck(plain: Path, target: Path, *options: object) -> bytes:
    """*plain* as the program ``zck`` wraps it."""
    run("zck", *options, "-o", target, plain)
    return target.read_bytes()


def dictionary(content: bytes, size: int = 16_000) -> bytes:
    """A zstd dictionary trained on the packages of *content*."""
    from backports import zstd

    pieces = content.split(b"<package")[1:]
    return bytes(zstd.train_dict(pieces, size).dict_content)


def header_size(published: bytes) -> int:
    """Bytes of a zchunk file's header."""
    import io

    from tidings_chunkstore.zck import read_header

    return read_header(io.BytesIO(published)).size


def header_digest(published: bytes) -> str:
    """The SHA-256 in a zchunk file's lead, which repomd.xml names as ``header-checksum``."""
    start = 6  # behind the magic and the kind of the digest
    while not published[start] & 0x80:
        start += 1
    return published[start + 1 : start + 33].hex()


def add_records(root: Path, wrapped: Mapping[str, bytes], timestamp: int) -> None:
    """Add ``TYPE_zck`` records, each behind its plain kin, as createrepo_c writes them."""
    folder = root / "repodata"
    main = folder / "repomd.xml"
    text = main.read_bytes()
    for kind, data in wrapped.items():
        name = f"{hashlib.sha256(data).hexdigest()}-{kind}.xml.zck"
        (folder / name).write_bytes(data)
        head = header_size(data)
        for match in _DATA.finditer(text):
            if match[1].decode() == kind:
                break
        else:
            raise ValueError(f"no record {kind}")
        opened = re.search(rb"    <open-checksum.*\n", match[0])
        size = re.search(rb"    <open-size.*\n", match[0])
        record = (
            f'  <data type="{kind}_zck">\n    <checksum type="sha256">'
            f"{hashlib.sha256(data).hexdigest()}</checksum>\n"
            + (opened[0].decode() if opened else "")
            + f'    <header-checksum type="sha256">{header_digest(data)}'
            f'</header-checksum>\n    <location href="repodata/{name}"/>\n'
            f"    <timestamp>{timestamp}</timestamp>\n    <size>{len(data)}</size>\n"
            + (size[0].decode() if size else "")
            + f"    <header-size>{head}</header-size>\n  </data>\n"
        ).encode()
        text = text[: match.end()] + record + text[match.end() :]
    main.unlink()
    main.write_bytes(text)


def by_zck(
    root: Path,
    made: Sequence[GeneratedPackage],
    way: str = "split",
    *,
    types: Sequence[str] = ("primary", "filelists", "other"),
    timestamp: int = START,
    dictionaries: Mapping[str, Path] | None = None,
) -> None:
    """The metadata of *made* as zst, and as zchunk files of the program ``zck``."""
    rpm_md(root, made, codec="zst", types=("primary", "filelists", "other"), timestamp=timestamp)
    scratch = root / "scratch"
    scratch.mkdir(exist_ok=True)
    wrapped = {}
    for kind, content in contents(made, types).items():
        (scratch / kind).write_bytes(content)
        more = [f"--dict={dictionaries[kind]}"] if dictionaries else []
        wrapped[kind] = zck(scratch / kind, scratch / f"{kind}.zck", *WAYS[way], *more)
    add_records(root, wrapped, timestamp)
    shutil.rmtree(scratch)


def by_mergerepo(root: Path, sources: Sequence[Path], dictionaries: Path | None = None) -> None:
    """*sources* merged by ``mergerepo_c --zck``."""
    given = [word for source in sources for word in ("-r", source)]
    more = [f"--zck-dict-dir={dictionaries}"] if dictionaries else []
    target = root.with_name(f"{root.name}.merged")
    shutil.rmtree(target, ignore_errors=True)
    run("mergerepo_c", "--zck", "--no-database", *more, *given, "-o", target)
    _take(target, root)


def by_createrepo(
    root: Path, rpms: Sequence[Path], comps: Path | None = None, dictionaries: Path | None = None
) -> None:
    """Metadata of *rpms* by ``createrepo_c --zck``."""
    target = root.with_name(f"{root.name}.created")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for rpm in rpms:
        shutil.copy(rpm, target)
    more: list[object] = [f"--zck-dict-dir={dictionaries}"] if dictionaries else []
    more += ["-g", comps] if comps else []
    run("createrepo_c", "--zck", "--no-database", *more, target)
    _take(target, root)


def _take(source: Path, root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(root / "repodata", ignore_errors=True)
    shutil.move(source / "repodata", root / "repodata")
    shutil.rmtree(source)


def accepted(path: Path) -> bytes:
    """The content as ``unzck`` has it; zck_read_header must take the file, too."""
    run("zck_read_header", "-f", path)
    return run("unzck", "--stdout", path)
