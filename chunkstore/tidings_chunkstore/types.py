"""Which of a repository's files a client wants: ``--types primary,group,updateinfo``.

The choice among the kin of one type is librepo's (``yum.c``: ``lr_yum_switch_to_zchunk``,
``lr_yum_repomd_record_enabled``) as libdnf and libdnf5 drive it: both ask for ``group_gz`` and
take ``group`` where there is none, and a ``_zck`` record replaces its plain kin where librepo was
built with zchunk.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from .errors import InputError
from .listing import Listing, PublishedFile

#: Sets by name. @dnf4: libdnf 0.69 (filelists always; later versions on demand), @dnf5: libdnf5
#: with its default optional_metadata_types (comps, updateinfo).
SETS: dict[str, tuple[str, ...]] = {
    "@dnf4": ("primary", "filelists", "prestodelta", "group", "updateinfo", "modules"),
    "@dnf5": ("primary", "modules", "group", "updateinfo"),
}

#: Names that a repository may lack without this being a mistake of the caller's.
_COMMON = frozenset(
    {
        *("primary", "filelists", "other", "group", "modules", "updateinfo", "prestodelta"),
        *("primary_db", "filelists_db", "other_db", "productid", "appstream", "appstream-icons"),
        *("appdata", "appdata-icons"),
    }
)

_ZCHUNK = "_zck"
#: Tried in this order when librepo would find nothing: better another wrapping than no file.
_OTHER_WRAPPINGS = ("_xz", "_gz", "_zst", "_bz2")
_WORD = re.compile(r"@?[A-Za-z0-9][A-Za-z0-9._+@:-]{0,63}")


def parse_types(wanted: str | Iterable[str]) -> tuple[str, ...]:
    """The names in *wanted* (comma-separated, or several), sets opened, each once.

    Raises:
        InputError: nothing is named, a name is not a word, or a set is unknown.
    """
    words = wanted.split(",") if isinstance(wanted, str) else list(wanted)
    names: dict[str, None] = {}
    for word in words:
        name = word.strip()
        if not _WORD.fullmatch(name):
            raise InputError(f"not a metadata type: {name[:80]!r}", code="unknown-type")
        if name.startswith("@"):
            if name not in SETS:
                raise InputError(
                    f"unknown set of metadata types: {name} (there are {', '.join(sorted(SETS))})",
                    code="unknown-type",
                )
            names.update(dict.fromkeys(SETS[name]))
        else:
            names[name] = None
    if not names:
        raise InputError("no metadata type is named", code="unknown-type")
    return tuple(names)


def select(
    listing: Listing, wanted: str | Iterable[str] | None, zchunk: bool = False
) -> tuple[PublishedFile, ...]:
    """The files of *listing* that *wanted* names, in the listing's order; all when it is None.

    A name covers its kin, of which one is taken; naming a kin (``group_xz``, ``primary_db``)
    takes exactly that. *zchunk*: prefer ``_zck``, as a librepo built with zchunk does. Common
    names that the repository lacks select nothing, as with dnf.

    For apt, a name takes all indexes of that type ("packages"), and there are no common names.

    Raises:
        InputError: a name is neither common nor in the repository; the message lists what is.
    """
    if wanted is None:
        return listing.files
    names = parse_types(wanted)
    present = {file.type for file in listing.files}
    chosen: set[str] = set()
    for name in names:
        found = choose(present, name, zchunk)
        if found is not None:
            chosen.add(found)
        elif name not in _COMMON or listing.layout != "rpm-md":
            raise InputError(
                f"unknown metadata type: {name} (the repository has {', '.join(sorted(present))})",
                code="unknown-type",
                present=sorted(present),
            )
    return tuple(file for file in listing.files if file.type in chosen)


def choose(present: Collection[str], name: str, zchunk: bool) -> str | None:
    """The type among *present* that stands for *name*, or None."""
    asked = "group_gz" if name == "group" else name
    candidates = [asked, name]
    if zchunk:
        candidates[0:0] = [asked + _ZCHUNK]
    candidates += [name + suffix for suffix in (*_OTHER_WRAPPINGS, _ZCHUNK)]
    return next((candidate for candidate in candidates if candidate in present), None)
