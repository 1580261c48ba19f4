"""Makers of test repositories: generated packages, written as rpm-md or apt metadata.

Deterministic: the same arguments give the same contents (the compressed bytes also depend on the
installed zlib, liblzma and libzstd). No rpm is needed. ``rpm_md_by_createrepo_c`` writes with the
real library, for tests of recipes and for the demo.

    first = packages(300)
    rpm_md(root, first, codec="gz")
    rpm_md(root, evolve(first, seed=1), codec="gz", timestamp=START + DAY)
"""

from __future__ import annotations

import bz2
import hashlib
import lzma
import os
import random
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from email.utils import formatdate
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

START = 1_700_000_000  #: timestamp of a first publish, seconds since 1970
DAY = 86_400

#: File name suffix by codec. "gzip" is the GNU program's deflate, which is not zlib's.
SUFFIXES = {"none": "", "gz": ".gz", "gzip": ".gz", "xz": ".xz", "bz2": ".bz2", "zst": ".zst"}

_TEXT = (
    "library tool server client python module system network parser driver engine fast simple "
    "modern portable bindings documentation headers static shared runtime support plugin daemon "
    "utility command interface graphics audio font theme kernel filesystem archive codec math "
    "linear algebra database cache queue protocol secure signing key message format convert view"
)
_WORDS = tuple(_TEXT.split())
_ARCHES = ("x86_64", "x86_64", "x86_64", "noarch", "i686")
_LICENSES = ("MIT", "Apache-2.0", "GPL-2.0-or-later", "LGPL-2.1-or-later", "BSD-3-Clause")

_REPO_NS = "http://linux.duke.edu/metadata/repo"
_COMMON_NS = "http://linux.duke.edu/metadata/common"
_RPM_NS = "http://linux.duke.edu/metadata/rpm"
_FILELISTS_NS = "http://linux.duke.edu/metadata/filelists"
_OTHER_NS = "http://linux.duke.edu/metadata/other"


@dataclass(frozen=True, slots=True)
class GeneratedPackage:
    """One package of the generated repository."""

    name: str
    version: str
    release: str
    arch: str
    summary: str
    description: str
    license: str
    requires: tuple[str, ...]
    files: tuple[str, ...]
    changelog: tuple[tuple[str, int, str], ...]  #: author, seconds since 1970, text; oldest first
    built: int  #: seconds since 1970
    size: int  #: bytes

    @property
    def id(self) -> str:
        """The SHA-256 that a real package's file would have."""
        return hashlib.sha256(
            f"{self.name}-{self.version}-{self.release}.{self.arch}-{self.built}".encode()
        ).hexdigest()

    @property
    def href(self) -> str:
        """Where the package would lie."""
        stem = f"{self.name}-{self.version}-{self.release}.{self.arch}"
        return f"Packages/{self.name[0]}/{stem}.rpm"


def packages(count: int, seed: int = 0) -> tuple[GeneratedPackage, ...]:
    """*count* packages, sorted by name."""
    made = (_package(random.Random(f"{seed}/{number}"), number) for number in range(count))
    return tuple(sorted(made, key=lambda package: package.name))


def evolve(
    before: Sequence[GeneratedPackage], seed: int, share: float = 0.01
) -> tuple[GeneratedPackage, ...]:
    """The next publish: *share* of the packages updated (one at least), some added and removed.

    A fifth as many as are updated come anew, a tenth as many go.
    """
    choice = random.Random(f"evolve/{seed}")
    count = max(1, round(len(before) * share)) if before else 0
    positions = choice.sample(range(len(before)), count)
    after = list(before)
    for position in positions:
        after[position] = _updated(after[position], choice)
    for position in sorted(positions[: count // 10], reverse=True):
        del after[position]
    after += [_package(choice, 1_000_000 + 1000 * seed + at) for at in range(count // 5)]
    return tuple(sorted(after, key=lambda package: package.name))


def _package(choice: random.Random, number: int) -> GeneratedPackage:
    words = choice.choices(_WORDS, k=40)
    name = f"{words[0]}-{words[1]}-{number}"
    built = START - choice.randrange(900 * DAY)
    version = f"{choice.randrange(9)}.{choice.randrange(30)}.{choice.randrange(9)}"
    folder = choice.choice(("/usr/lib64", "/usr/share", "/usr/lib/python3.13/site-packages"))
    return GeneratedPackage(
        name=name,
        version=version,
        release="1.fc43",
        arch=choice.choice(_ARCHES),
        summary=" ".join(words[2:8]).capitalize(),
        description=" ".join(words[8:]).capitalize() + ".",
        license=choice.choice(_LICENSES),
        requires=tuple(f"lib{word}.so.{choice.randrange(9)}()(64bit)" for word in words[:5]),
        files=(
            f"/usr/bin/{name}",
            *(f"{folder}/{name}/{word}_{at}" for at, word in enumerate(words[: 4 + number % 12])),
        ),
        changelog=tuple(
            (
                f"{words[at].capitalize()} Packager <{words[at]}@example.org> - {version}-1",
                built - (9 - at) * 40 * DAY,
                f"- {' '.join(choice.choices(_WORDS, k=6))}",
            )
            for at in range(3)
        ),
        built=built,
        size=choice.randrange(10_000, 9_000_000),
    )


def _updated(package: GeneratedPackage, choice: random.Random) -> GeneratedPackage:
    major, minor, _ = package.version.split(".")
    version = f"{major}.{int(minor) + 1}.{choice.randrange(9)}"
    built = package.built + choice.randrange(DAY, 30 * DAY)
    entry = (
        f"Update Packager <update@example.org> - {version}-1",
        built,
        f"- Update to {version}, {' '.join(choice.choices(_WORDS, k=4))}",
    )
    return replace(
        package,
        version=version,
        built=built,
        size=package.size + choice.randrange(-5000, 5000),
        changelog=(*package.changelog, entry)[-10:],
        files=(*package.files, f"/usr/share/doc/{package.name}/NEWS-{version}"),
    )


# --- compression


def compress(data: bytes, codec: str) -> bytes:
    """*data* as the usual programs wrap it: createrepo_c's gz and zst, xz -6, bzip2 -9, gzip -9n.

    "gzip" needs the GNU program, and falls back on zlib level 9.
    """
    match codec:
        case "none":
            return data
        case "gz":
            deflate = zlib.compressobj(6, zlib.DEFLATED, 31, 8)
            return deflate.compress(data) + deflate.flush()
        case "gzip":
            return _gzip(data)
        case "xz":
            return lzma.compress(data, check=lzma.CHECK_CRC32, preset=5)
        case "bz2":
            return bz2.compress(data, 9)
        case "zst":
            from backports import zstd

            stream = zstd.ZstdCompressor(level=10)  # streaming: no content size, no checksum
            return stream.compress(data) + stream.flush()
    raise ValueError(f"unknown codec: {codec}")


def _gzip(data: bytes) -> bytes:
    program = shutil.which("gzip")
    if program is None:
        deflate = zlib.compressobj(9, zlib.DEFLATED, 31, 8)
        return deflate.compress(data) + deflate.flush()
    return subprocess.run([program, "-9n"], input=data, stdout=subprocess.PIPE, check=True).stdout


# --- rpm-md

TYPES = ("primary", "filelists", "other", "group", "updateinfo")


def contents(made: Sequence[GeneratedPackage], types: Iterable[str] = TYPES) -> dict[str, bytes]:
    """The uncompressed metadata by type."""
    writers: dict[str, Callable[[Sequence[GeneratedPackage]], str]] = {
        "primary": _primary,
        "filelists": _filelists,
        "other": _other,
        "group": _group,
        "updateinfo": _updateinfo,
        "modules": _modules,
    }
    return {kind: writers[kind](made).encode() for kind in types}


def rpm_md(
    root: Path,
    made: Sequence[GeneratedPackage],
    *,
    codec: str | Mapping[str, str] = "gz",
    types: Sequence[str] = TYPES,
    timestamp: int = START,
    checksum: str = "sha256",
    hashed_names: bool = True,
    extra: Mapping[str, tuple[str, bytes]] | None = None,
    tags: Sequence[str] = (),
    asc: bytes | Callable[[bytes], bytes] | None = None,
    key: bytes | None = None,
) -> Path:
    """Write the metadata of *made* below *root*, as createrepo_c would; older metadata goes.

    Args:
        codec: one for all, or by type (others "gz"). Group is as createrepo_c has it: 1.x
            (zst) publishes ``group`` compressed, 0.x (the others) plain and beside it
            ``group_gz``.
        checksum: hashlib's name; openSUSE has sha512, old repositories sha1 (written "sha").
        extra: records of opaque files: type to (file name, bytes).
        asc: repomd.xml.asc, or what signs repomd.xml.
    Returns:
        The path of repomd.xml.
    """
    records: list[tuple[str, str, bytes, bytes | None]] = []
    for kind, content in contents(made, types).items():
        used = codec if isinstance(codec, str) else codec.get(kind, "gz")
        name = {"group": "comps.xml", "modules": "modules.yaml"}.get(kind, f"{kind}.xml")
        if kind == "group" and used != "zst":
            records.append((kind, name, content, None))
            if used == "none":
                continue
            kind = f"group_{'gz' if used == 'gzip' else used}"
        records.append((kind, name + SUFFIXES[used], compress(content, used), content))
    records += [(kind, name, data, None) for kind, (name, data) in (extra or {}).items()]
    files: dict[str, bytes] = {}
    elements = []
    for kind, name, data, opened in records:
        if hashed_names:
            name = f"{hashlib.new(checksum, data).hexdigest()}-{name}"
        files[name] = data
        elements.append(_record(kind, f"repodata/{name}", data, opened, timestamp, checksum))
    tag_lines = "".join(f"    <content>{escape(tag)}</content>\n" for tag in tags)
    repomd = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<repomd xmlns="{_REPO_NS}" '
        f'xmlns:rpm="{_RPM_NS}">\n  <revision>{timestamp}</revision>\n'
        + (f"  <tags>\n{tag_lines}  </tags>\n" if tags else "")
        + "".join(elements)
        + "</repomd>\n"
    ).encode()
    if asc is not None:
        files["repomd.xml.asc"] = asc(repomd) if callable(asc) else asc
    if key is not None:
        files["repomd.xml.key"] = key
    files["repomd.xml"] = repomd
    return _replace_folder(root / "repodata", files, "repomd.xml", timestamp)


def _record(
    kind: str, href: str, data: bytes, opened: bytes | None, timestamp: int, checksum: str
) -> str:
    label = {"sha1": "sha"}.get(checksum, checksum)

    def digest(element: str, of: bytes) -> str:
        return (
            f'    <{element} type="{label}">{hashlib.new(checksum, of).hexdigest()}</{element}>\n'
        )

    return (
        f"  <data type={quoteattr(kind)}>\n"
        + digest("checksum", data)
        + (digest("open-checksum", opened) if opened is not None else "")
        + f"    <location href={quoteattr(href)}/>\n    <timestamp>{timestamp}</timestamp>\n"
        f"    <size>{len(data)}</size>\n"
        + (f"    <open-size>{len(opened)}</open-size>\n" if opened is not None else "")
        + "  </data>\n"
    )


def _primary(made: Sequence[GeneratedPackage]) -> str:
    start = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<metadata xmlns="{_COMMON_NS}" '
        f'xmlns:rpm="{_RPM_NS}" packages="{len(made)}">\n'
    )
    out = [start]
    for package in made:
        entries = "".join(
            f"      <rpm:entry name={quoteattr(name)}/>\n" for name in package.requires
        )
        out.append(
            f'<package type="rpm">\n  <name>{package.name}</name>\n  <arch>{package.arch}</arch>\n'
            f'  <version epoch="0" ver="{package.version}" rel="{package.release}"/>\n'
            f'  <checksum type="sha256" pkgid="YES">{package.id}</checksum>\n'
            f"  <summary>{escape(package.summary)}</summary>\n"
            f"  <description>{escape(package.description)}</description>\n"
            f"  <packager>Example</packager>\n  <url>https://example.org/{package.name}</url>\n"
            f'  <time file="{package.built + 60}" build="{package.built}"/>\n'
            f'  <size package="{package.size}" installed="{package.size * 3}" '
            f'archive="{package.size * 3 + 512}"/>\n'
            f"  <location href={quoteattr(package.href)}/>\n  <format>\n"
            f"    <rpm:license>{package.license}</rpm:license>\n"
            f"    <rpm:sourcerpm>{package.name}-{package.version}-{package.release}.src.rpm"
            f"</rpm:sourcerpm>\n"
            f'    <rpm:provides>\n      <rpm:entry name="{package.name}" flags="EQ" epoch="0" '
            f'ver="{package.version}" rel="{package.release}"/>\n    </rpm:provides>\n'
            f"    <rpm:requires>\n{entries}    </rpm:requires>\n"
            f"    <file>{escape(package.files[0])}</file>\n  </format>\n</package>\n"
        )
    out.append("</metadata>\n")
    return "".join(out)


def _entry(package: GeneratedPackage, inner: str) -> str:
    return (
        f'<package pkgid="{package.id}" name="{package.name}" arch="{package.arch}">\n'
        f'  <version epoch="0" ver="{package.version}" rel="{package.release}"/>\n'
        f"{inner}</package>\n"
    )


def _filelists(made: Sequence[GeneratedPackage]) -> str:
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<filelists xmlns="{_FILELISTS_NS}" '
        f'packages="{len(made)}">\n'
        + "".join(
            _entry(package, "".join(f"  <file>{escape(path)}</file>\n" for path in package.files))
            for package in made
        )
        + "</filelists>\n"
    )


def _other(made: Sequence[GeneratedPackage]) -> str:
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<otherdata xmlns="{_OTHER_NS}" '
        f'packages="{len(made)}">\n'
        + "".join(
            _entry(
                package,
                "".join(
                    f'  <changelog author={quoteattr(author)} date="{when}">{escape(text)}'
                    "</changelog>\n"
                    for author, when, text in package.changelog
                ),
            )
            for package in made
        )
        + "</otherdata>\n"
    )


def _group(made: Sequence[GeneratedPackage]) -> str:
    requests = "".join(
        f'      <packagereq type="default">{package.name}</packagereq>\n' for package in made[::9]
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<comps>\n  <group>\n    <id>generated</id>\n'
        f"    <name>Generated</name>\n    <packagelist>\n{requests}    </packagelist>\n"
        "  </group>\n</comps>\n"
    )


def _updateinfo(made: Sequence[GeneratedPackage]) -> str:
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<updates>\n'
        + "".join(
            f'  <update from="updates@example.org" status="stable" type="bugfix" version="2.0">\n'
            f"    <id>EX-{package.built}</id>\n"
            f"    <title>{package.name}-{package.version}</title>\n"
            f'    <issued date="{formatdate(package.built)}"/>\n'
            f"    <description>{escape(package.description)}</description>\n"
            f'    <pkglist><collection short="EX"><package name="{package.name}" '
            f'version="{package.version}" release="{package.release}" epoch="0" '
            f'arch="{package.arch}"/></collection></pkglist>\n  </update>\n'
            for package in made[::5]
        )
        + "</updates>\n"
    )


def _modules(made: Sequence[GeneratedPackage]) -> str:
    return "".join(
        f"---\ndocument: modulemd\nversion: 2\ndata:\n  name: {package.name}\n"
        f"  stream: '{package.version}'\n  version: {package.built}\n"
        f"  summary: {package.summary}\n...\n"
        for package in made[::20]
    )


# --- rpm-md by the real library


def rpm_md_by_createrepo_c(
    root: Path,
    made: Sequence[GeneratedPackage],
    *,
    compression: str = "zst",
    databases: bool = False,
    timestamp: int = START,
    tags: Sequence[str] = (),
) -> Path:
    """Write the metadata of *made* with PyPI ``createrepo_c``; older metadata goes.

    Args:
        compression: "zst", "gz", "xz" or "bz2".
        databases: ``*_db`` records too (sqlite, bz2).
    Returns:
        The path of repomd.xml.
    """
    import createrepo_c as cr

    kinds = {
        "zst": cr.ZSTD_COMPRESSION,
        "gz": cr.GZ_COMPRESSION,
        "xz": cr.XZ_COMPRESSION,
        "bz2": cr.BZ2_COMPRESSION,
    }
    folder = root / "repodata.new"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    classes = {
        "primary": (cr.PrimaryXmlFile, cr.PrimarySqlite),
        "filelists": (cr.FilelistsXmlFile, cr.FilelistsSqlite),
        "other": (cr.OtherXmlFile, cr.OtherSqlite),
    }
    loaded = [_cr_package(cr, package) for package in made]
    repomd = cr.Repomd()
    repomd.set_revision(str(timestamp))
    for tag in tags:
        repomd.add_content_tag(tag)
    for kind, (xml_class, sqlite_class) in classes.items():
        path = folder / f"{kind}.xml{SUFFIXES[compression]}"
        stat = cr.ContentStat(cr.SHA256)
        xml = xml_class(str(path), kinds[compression], stat)
        xml.set_num_of_pkgs(len(loaded))
        for package in loaded:
            xml.add_pkg(package)
        xml.close()
        os.utime(path, (timestamp, timestamp))
        record = cr.RepomdRecord(kind, str(path))
        record.load_contentstat(stat)
        record.fill(cr.SHA256)
        if databases:
            plain = folder / f"{kind}.sqlite"
            database = sqlite_class(str(plain))
            for package in loaded:
                database.add_pkg(package)
            database.dbinfo_update(record.checksum)
            database.close()
            os.utime(plain, (timestamp, timestamp))
            packed = cr.RepomdRecord(f"{kind}_db", str(plain)).compress_and_fill(
                cr.SHA256, cr.BZ2_COMPRESSION
            )
            packed.timestamp = timestamp
            packed.rename_file()
            repomd.set_record(packed)
            plain.unlink()
        record.rename_file()
        repomd.set_record(record)
    repomd.sort_records()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["repomd.xml"] = repomd.xml_dump().encode()
    shutil.rmtree(folder)
    return _replace_folder(root / "repodata", files, "repomd.xml", timestamp)


def _cr_package(cr: Any, made: GeneratedPackage) -> Any:
    package = cr.Package()
    package.name, package.arch = made.name, made.arch
    package.epoch, package.version, package.release = "0", made.version, made.release
    package.pkgId, package.checksum_type = made.id, "sha256"
    package.summary, package.description = made.summary, made.description
    package.url = f"https://example.org/{made.name}"
    package.rpm_license, package.rpm_packager = made.license, "Example"
    package.rpm_sourcerpm = f"{made.name}-{made.version}-{made.release}.src.rpm"
    package.time_file, package.time_build = made.built + 60, made.built
    package.size_package, package.size_installed = made.size, made.size * 3
    package.size_archive = made.size * 3 + 512
    package.location_href = made.href
    package.provides = [(made.name, "EQ", "0", made.version, made.release, False)]
    package.requires = [(name, None, None, None, None, False) for name in made.requires]
    package.files = [
        (None, os.path.dirname(path) + "/", os.path.basename(path)) for path in made.files
    ]
    package.changelogs = list(made.changelog)
    return package


# --- apt


def apt(
    root: Path,
    made: Sequence[GeneratedPackage],
    *,
    components: Sequence[str] = ("main",),
    arches: Sequence[str] = ("amd64", "arm64"),
    present: Sequence[str] | None = None,
    codecs: Sequence[str] = ("none", "gzip"),
    timestamp: int = START,
    sections: Sequence[str] = ("MD5Sum", "SHA1", "SHA256"),
    signed: bool = True,
    detach: Callable[[bytes], bytes] | None = None,
    clearsign: Callable[[bytes], bytes] | None = None,
) -> Path:
    """Write an apt index of *made* below *root* (the folder of InRelease).

    Args:
        present: the architectures whose files are written; Release lists them all.
        signed: write InRelease and Release.gpg; without *detach* and *clearsign* their
            signatures are well-formed text that proves nothing.
    Returns:
        The path of the main file.
    """
    listed: dict[str, bytes] = {}
    for component in components:
        for arch in arches:
            content = _packages_file(made, component, arch).encode()
            for codec in codecs:
                path = f"{component}/binary-{arch}/Packages{SUFFIXES[codec]}"
                listed[path] = compress(content, codec)
    lines = [
        "Origin: Example",
        "Suite: generated",
        f"Date: {formatdate(timestamp)[:-5]}+0000",
        f"Architectures: {' '.join(arches)}",
        f"Components: {' '.join(components)} ",
    ]
    for section in sections:
        algorithm = {"MD5Sum": "md5", "MD5": "md5"}.get(section, section.lower())
        lines.append(f"{section}:")
        lines += [
            f" {hashlib.new(algorithm, data).hexdigest()} {len(data)} {path}"
            for path, data in listed.items()
        ]
    release = ("\n".join(lines) + "\n").encode()
    for path, data in listed.items():
        arch = path.split("/")[-2].removeprefix("binary-")
        if present is None or arch in present:
            _write(root / path, data, timestamp)
    if signed:
        _write(root / "Release.gpg", (detach or _fake_detached)(release), timestamp)
    _write(root / "Release", release, timestamp)
    if not signed:
        return root / "Release"
    _write(root / "InRelease", (clearsign or _fake_clearsigned)(release), timestamp)
    return root / "InRelease"


def _packages_file(made: Sequence[GeneratedPackage], component: str, arch: str) -> str:
    return "".join(
        f"Package: {package.name}\nArchitecture: {arch}\nVersion: {package.version}-1\n"
        f"Maintainer: Example <maintainer@example.org>\nInstalled-Size: {package.size // 300}\n"
        f"Depends: {', '.join(name.split('.')[0] for name in package.requires)}\n"
        f"Filename: pool/{component}/{package.name}_{package.version}-1_{arch}.deb\n"
        f"Size: {package.size}\n"
        f"SHA256: {hashlib.sha256((package.id + arch).encode()).hexdigest()}\n"
        f"Description: {package.summary}\n\n"
        for package in made
    )


def _armor(kind: str, data: bytes) -> bytes:
    text = hashlib.sha512(data).hexdigest().encode()
    return (
        f"-----BEGIN PGP {kind}-----\n\n".encode()
        + text[:64]
        + b"\n"
        + text[64:]
        + f"\n=abcd\n-----END PGP {kind}-----\n".encode()
    )


def _fake_detached(data: bytes) -> bytes:
    return _armor("SIGNATURE", data)


def _fake_clearsigned(data: bytes) -> bytes:
    escaped = b"\n".join(
        b"- " + line if line.startswith(b"-") else line for line in data.split(b"\n")
    )
    return b"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\n" + escaped + _fake_detached(data)


# --- writing


def _write(path: Path, data: bytes, timestamp: int) -> None:
    """Replace the file, as an operator's tools do: never written in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    os.utime(temporary, (timestamp, timestamp))
    os.replace(temporary, path)


def _replace_folder(folder: Path, files: Mapping[str, bytes], main: str, timestamp: int) -> Path:
    """Make *folder* hold just *files*, *main* written last, old files removed after it."""
    folder.mkdir(parents=True, exist_ok=True)
    old = {path.name for path in folder.iterdir()}
    for name, data in files.items():
        if name != main:
            _write(folder / name, data, timestamp)
    _write(folder / main, files[main], timestamp)
    for name in old - files.keys():
        (folder / name).unlink()
    return folder / main
