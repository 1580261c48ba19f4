"""The switch: finished files go into place, the main file last, and what is no more goes away."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from tidings_chunkstore import zck
from tidings_chunkstore.errors import FormatError, LocalError
from tidings_chunkstore.ids import ContentId, FileId
from tidings_chunkstore.layout import LAYOUTS, Layout, Listing
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.opening import Codec, codec_of

from . import state as states
from .ask import Ask, question_key
from .assemble import DONE, SPOOL, TEMPORARY, Done, Proof
from .job import SyncOptions
from .local import Destination
from .obtain import Item, Obtain
from .plan import SIDE_LIMIT
from .state import Seen, State
from .stock import Present, Source


class Switch:
    """Puts what *work* has obtained into DEST, and remembers it in the state."""

    def __init__(
        self,
        options: SyncOptions,
        dest: Destination,
        state: State,
        ask: Ask,
        now: Present | None,
        work: Obtain,
    ) -> None:
        self.options = options
        self.dest = dest
        self.state = state
        self.ask = ask
        self.now = now
        self.work = work

    def run(self, layout: Layout, listing: Listing, items: Sequence[Item], word: str) -> bool:
        """Put the finished files in place, the main file last; remove what is no more.

        Before anything is renamed the state learns what this run owns, so that a kill at any
        point leaves no file that nobody removes.
        """
        order = {path: i for i, path in enumerate(layout.mains())}
        for path in order.keys() & self.work.got.done.keys():
            if self.dest.read(path, LIMITS.main) == self.work.bytes_of(path):
                self.work.got.in_place[path] = self.work.got.done.pop(path).sha256
        kept = [item.path for item in items if item.path not in self.work.got.absent]
        new = [path for path in kept if path in self.work.got.done]
        named = set(self.now.listing.by_path()) if self.now else set()
        named |= {path for lay in LAYOUTS.values() for path in lay.mains()} if self.now else set()
        owned = {path for path in self.state.owned | named if self.dest.stamp(path) is not None}
        # A type that was not asked for stays, as long as it is the one that the publish names.
        gone = sorted(owned - set(kept) - self._still_right(listing))
        if new or gone:
            self.dest.work_write(
                states.STATE,
                states.encode(replace(self.state, owned=frozenset(owned | set(kept)), complete=())),
            )
        # What replaces a file of the old publish goes after all that is only new beside it.
        data = sorted((p for p in new if p not in order), key=lambda p: (p in owned, p))
        beside = sorted((p for p in new if p in order), key=order.__getitem__)
        self._install(data)
        self._install(beside)
        for path in gone:
            self.dest.remove(path)
        self._remember(items, kept, frozenset(owned - set(gone) | set(kept)), word)
        self._keep_sides(items)
        states.tidy(self.dest)
        return bool(new)

    def _keep_sides(self, items: Sequence[Item]) -> None:
        """Keep the side contents that the files do not tell: the next delta starts from them."""
        wanted: set[ContentId] = set()
        for item in items:
            how = item.wanted.recipe
            if how is not None and how.codec is Codec.ZCK:
                wanted.update(how.sides[len(how.sides) - zck.untold_sides(how.params) :])
        names = {states.SIDE + side.hex(): side for side in wanted}
        here = {name for name in self.dest.work_names() if name.startswith(states.SIDE)}
        for name in here - names.keys():
            self.dest.work_remove(name)
        for name in names.keys() - here:
            data = self.work.bench.small(names[name], SIDE_LIMIT)
            if data is not None:
                self.dest.work_write(name, data)

    def _install(self, paths: Sequence[str]) -> None:
        for path in paths:
            done = self.work.got.done[path]
            # Two paths may be one and the same file: the first takes it, the next a copy.
            if sum(1 for other in self.work.got.done.values() if other.name == done.name) > 1:
                self.work.got.done[path] = done = self._copy_done(done, path)
            self.dest.install(done.name, path)
        for folder in {path.rpartition("/")[0]: path for path in paths}.values():
            self.dest.settle(folder)

    def _copy_done(self, done: Done, path: str) -> Done:
        file = self.dest.work_open(done.name)
        assert file is not None
        with file, self.work.bench.new_file(Proof(path, done.size, done.sha256)) as out:
            while piece := file.read(1 << 20):
                out.write(piece)
            return self.work.bench.finish(out, f"-{hashlib.sha256(path.encode()).hexdigest()[:16]}")

    def _still_right(self, listing: Listing) -> set[str]:
        """Files of DEST that the new publish names just as the old one did."""
        if self.now is None:
            return set()
        old = self.now.listing.by_path()
        return {
            path
            for path, file in listing.by_path().items()
            if path in old and (old[path].checksum, old[path].size) == (file.checksum, file.size)
        }

    def _remember(
        self, items: Sequence[Item], kept: Sequence[str], owned: frozenset[str], word: str
    ) -> None:
        """Write the head and the state of a finished run; *word* says what proved it."""
        seen = {key: value for key, value in self.work.stock.seen().items() if key.startswith("/")}
        for path in kept:
            stamp = self.dest.stamp(path)
            sha256 = self.work.got.sha256_of(path)
            if stamp is not None and sha256 is not None:
                seen[path] = Seen(stamp, sha256, self.work.got.contents.get(sha256))
        followed = self.work.head is not None and self.ask.data is not None
        if self.work.head is not None and self.ask.data is not None:
            self.dest.work_write(states.HEAD, self.ask.data)
        else:
            self.dest.work_remove(states.HEAD)
        by_head = followed and self._is_head(items)
        new = State(
            self.work.head.repo if self.work.head else self.state.repo,
            self.work.head.serial if self.work.head else self.state.serial,
            self.ask.etag,
            question_key(self.options),
            word,
            hashlib.sha256(self.ask.data or b"").digest() if followed else b"",
            self.work.bytes_full(items),
            owned,
            tuple(kept) if by_head else (),
            seen,
        )
        self.dest.work_write(states.STATE, states.encode(new))

    def _is_head(self, items: Sequence[Item]) -> bool:
        """Whether DEST is now what the head describes: only then does an unchanged head mean it."""
        assert self.work.head is not None
        known = {f.path: f.sha256 for f in self.work.head.files}
        for item in items:
            if item.path in self.work.got.absent:
                continue
            if known.get(item.path) != self.work.got.sha256_of(item.path):
                return False
        return True

    def abandon(self) -> None:
        """After a failure: keep what is of use to the next run, and nothing else."""
        mains = [path for layout in LAYOUTS.values() for path in layout.mains()]
        done = {self.work.got.done[path].name for path in mains if path in self.work.got.done}
        with suppress(LocalError):  # a disk that fails has been told of
            for name in self.dest.work_names():
                # A main file may be what was refused; it is asked for again in any case.
                if name.startswith((TEMPORARY, SPOOL)) or name in done:
                    self.dest.work_remove(name)

    def sweep(self) -> None:
        """Remove what a killed run left half done, and take up what it finished."""
        for name in self.dest.work_names():
            if name.startswith((TEMPORARY, SPOOL)):
                self.dest.work_remove(name)
            elif name.startswith(DONE):
                self._take_up(name)

    def _take_up(self, name: str) -> None:
        try:
            sha256 = FileId.from_hex(name.removeprefix(DONE)[:64])
        except FormatError:
            self.dest.work_remove(name)
            return
        # It is read again before it is used: a power cut may have left anything.
        codec = codec_of(name, b"")
        self.work.stock.add(
            Source(
                f"{states.FOLDER}/{name}",
                "",
                lambda: self.dest.work_open(name),
                states.Stamp(0, 0, 0),
                codec,
                sha256,
                None,
            )
        )
