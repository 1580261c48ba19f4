"""A sync that has something to do: plan, fetch, rebuild, prove, switch.

The head is followed first. Where it does not lead to a publish that fits together (a pack or file
not there yet, a main file that does not prove), the mirror's own main file is asked for and obeyed
instead, a few times with pauses, for a mirror in the middle of its rsync heals in minutes; the head
then still serves every file that it knows by hash. Failures take ways out of the planner's graph,
and it is asked again: see ``plan``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from tidings_chunkstore import head, recipe
from tidings_chunkstore.errors import (
    FormatError,
    NetworkError,
    RollbackError,
    TidingsError,
    VerificationError,
)
from tidings_chunkstore.ids import ContentId, FileId
from tidings_chunkstore.layout import LAYOUTS, Layout, Listing, PublishedFile, safe_path, select
from tidings_chunkstore.limits import LIMITS
from tidings_chunkstore.listing import COMPRESSIONS, Checksum
from tidings_chunkstore.pack import File

from .ask import Ask
from .assemble import Proof
from .job import (
    PlannedFile,
    PlanResult,
    Progress,
    SyncedFile,
    SyncOptions,
    SyncResult,
)
from .local import Destination
from .obtain import Item, Obtain, Unfit
from .plan import Plan, Route, Wanted
from .remote import Remote
from .state import State
from .stock import gather, present
from .switch import Switch
from .trust import check_main, check_step, signature_paths

_MAINS = frozenset(path for layout in LAYOUTS.values() for path in layout.mains())


class Update:
    """One run over an open DEST. Use it once."""

    def __init__(
        self,
        options: SyncOptions,
        remote: Remote,
        progress: Progress,
        dest: Destination,
        state: State,
        ask: Ask,
        started: float,
    ) -> None:
        self.options = options
        self.remote = remote
        self.progress = progress
        self.dest = dest
        self.state = state
        self.ask = ask
        self.started = started
        self.now = present(dest)
        self.word = ""
        stock = gather(dest, self.now, state.seen, state.owned, options.seeds)
        forced = None if options.route == "auto" else Route(options.route)
        self.work = Obtain(remote, progress, dest, stock, forced, ask.reason)
        self.switch = Switch(options, dest, state, ask, self.now, self.work)

    # -- the two things one can ask for ----------------------------------------------------------

    def run(self) -> SyncResult:
        """See ``sync.sync``."""
        self.switch.sweep()
        self.work.head = self._decode_head()
        self.remote.watch(self._tell)
        try:
            layout, listing, items = self._follow()
            changed = self.switch.run(layout, listing, items, self.word)
        except BaseException:
            self.switch.abandon()
            raise
        finally:
            self.remote.watch(None)
            self.work.bench.close()
        result = self._result(layout, listing, items, changed)
        self._note_ways(result.files)
        return replace(result, fallback_reason=self.work.reason)

    def plan(self) -> PlanResult:
        """See ``sync.plan``."""
        self.work.dry = True
        self.work.head = self._decode_head()
        try:
            if self.work.head is not None:
                items = self._items_of_head(self.work.head)
            else:
                items = self._items_of_mirror_in_memory()
            planned = self.work.plan(items)
        finally:
            self.work.bench.close()
        result = _plan_result(self.work.head, planned, self.work.reason)
        self._note_ways(result.files)
        return replace(result, fallback_reason=self.work.reason)

    # -- the head --------------------------------------------------------------------------------

    def _decode_head(self) -> head.Head | None:
        """The head, where it can be used. Raises RollbackError."""
        if self.ask.problem is not None:
            self.progress.note(f"the head cannot be used: {self.ask.problem}")
        if self.ask.data is None:
            return None
        try:
            found = head.decode(self.ask.data)
            _check_head(found)
        except FormatError as error:
            self.work.reason = "head-" + error.code
            self.progress.note(f"the head cannot be used: {error}")
            return None
        same = found.repo == self.state.repo
        check_step(
            self.options.trust,
            old_timestamp=None,
            new_timestamp=0,
            old_trust=None,
            new_trust="",
            old_serial=self.state.serial if same else None,
            new_serial=found.serial,
        )
        return found

    # -- from a question to finished files -------------------------------------------------------

    def _follow(self) -> tuple[Layout, Listing, list[Item]]:
        """Obtain everything: by the head, else by the mirror's own main file."""
        failure: TidingsError | None = None
        if self.work.head is not None:
            try:
                return self._by_head(self.work.head)
            except Unfit as unfit:
                failure = unfit.error
                self._note_fallback(failure)
        for number, pause in enumerate(self.options.pauses or (0.0,)):
            if number and failure is not None:
                silent = isinstance(failure, NetworkError) and failure.code != "missing"
                what = "the mirror fails" if silent else "the mirror's files do not fit together"
                text = f"{what} ({failure.code}), trying again"
                self.progress.note(text, code=failure.code, detail=str(failure))
            time.sleep(pause)
            try:
                return self._by_mirror()
            except Unfit as unfit:
                failure = unfit.error
                if self.work.reason is None:
                    self.work.reason = failure.code
                if failure.code == "no-repository" and self._no_head():
                    break  # neither a head nor a main file: a wrong URL heals by no waiting
        assert failure is not None
        raise failure

    def _no_head(self) -> bool:
        """Whether the mirrors were asked for a head and have none, or were not asked."""
        return self.ask.data is None and self.ask.reason in (None, "no-tidings")

    def _note_fallback(self, error: TidingsError) -> None:
        # The error itself is told where it is the end; a line of its own here would be the same.
        if self.work.reason is None:
            self.work.reason = error.code
        text = f"the head leads to no complete publish ({error.code}), trying by the main file"
        self.progress.note(text, code=error.code, detail=str(error))

    def _note_ways(self, files: Sequence[SyncedFile | PlannedFile]) -> None:
        """Say where a route that was asked for was not taken."""
        forced = self.options.route
        data = [f for f in files if f.path not in _MAINS and f.route != Route.CURRENT]
        others = [f for f in data if f.route != forced]
        if forced in ("auto", Route.FULL) or not others:
            return
        if len(others) == len(data):
            self.work.blame(f"no-{forced}")
        told = ", ".join(sorted({f.type for f in others}))
        ways = " and ".join(sorted({f.route for f in others}))
        self.progress.note(f"--route {forced} does not lead to {told}: {ways}", code=f"no-{forced}")

    def _by_head(self, now: head.Head) -> tuple[Layout, Listing, list[Item]]:
        self._may_follow(now)
        layout = LAYOUTS[now.layout]
        items = self._items_of_head(now)
        mains = [item for item in items if item.path in layout.mains()]
        # What the whole publish needs lies side by side, so it is fetched at once.
        self.work.fetch(self.work.plan(items))
        self.work.obtain(mains)
        listing = self._check_mains(layout, now.main, mains, by_head=True)
        data = self._items_of_listing(layout, listing, now)
        self.work.obtain(data)
        return layout, listing, [*data, *mains]

    def _may_follow(self, now: head.Head) -> None:
        """Raises Unfit when the caller wants another main file than the head's."""
        wanted = self.options.trust.repomd_sha256
        own = next((f.sha256.hex() for f in now.files if f.path == now.main), None)
        if wanted is not None and own != wanted.lower():
            raise Unfit(
                VerificationError(
                    f"{now.main} has SHA-256 {own} in the head, not {wanted.lower()}",
                    code="wrong-sha256",
                )
            )

    def _by_mirror(self) -> tuple[Layout, Listing, list[Item]]:
        layout, main, mains = self._mains_of_mirror()
        listing = self._check_mains(layout, main, mains, by_head=False)
        data = self._items_of_listing(layout, listing, self.work.head)
        self.work.obtain(data)
        if data and all(item.path in self.work.got.absent for item in data):
            raise Unfit(NetworkError(f"none of the files of {main} is there", code="missing"))
        return layout, listing, [*data, *mains]

    def _mains_of_mirror(self) -> tuple[Layout, str, list[Item]]:
        """The main file as the mirror has it now, and what lies beside it."""
        layouts = [self.now.layout] if self.now else []
        layouts += [lay for lay in LAYOUTS.values() if lay not in layouts]
        failure: TidingsError | None = None
        for layout in layouts:
            for main in reversed(layout.mains()):
                if layout.describe(main)[0] in ("signature", "key"):
                    continue
                paths = [main, *reversed(layout.beside(main))]
                for path in layout.mains():
                    self.work.got.done.pop(path, None)
                    self.work.got.in_place.pop(path, None)
                    self.work.got.absent.discard(path)
                items = [
                    Item(
                        Wanted(path, *layout.describe(path), None),
                        self._proof_of_main(path) if path == main else Proof(path, None),
                        optional=path != main,
                    )
                    for path in paths
                ]
                try:
                    for item in items:
                        self.work.download(item, fresh=True, limit=LIMITS.main)
                except Unfit as unfit:
                    failure = failure or unfit.error
                    if unfit.error.code in ("missing", "forbidden"):
                        continue
                    if unfit.error.code == "wrong-checksum":
                        raise VerificationError(
                            f"{main}: no mirror has the one that is wanted", code="wrong-sha256"
                        ) from unfit
                    raise
                return layout, main, [i for i in items if i.path not in self.work.got.absent]
        assert failure is not None
        raise Unfit(
            NetworkError(f"no repository there: {failure}", code="no-repository", **failure.details)
        )

    def _proof_of_main(self, path: str) -> Proof:
        """What the caller said of the main file: a mirror that has another one is passed over."""
        trust = self.options.trust
        sha256 = FileId.from_hex(trust.repomd_sha256.lower()) if trust.repomd_sha256 else None
        sha512 = Checksum("sha512", trust.repomd_sha512.lower()) if trust.repomd_sha512 else None
        return Proof(path, None, sha256, sha512)

    def _check_mains(
        self, layout: Layout, main: str, mains: Sequence[Item], *, by_head: bool
    ) -> Listing:
        """Prove the main file, refuse a step back, and read it."""
        data = {item.path: self.work.bytes_of(item.path) for item in mains}
        try:
            listing = layout.parse(data[main], main)
            self.word = check_main(self.options.trust, main, data[main], data)
            check_step(
                self.options.trust,
                old_timestamp=self.now.listing.timestamp if self.now else None,
                new_timestamp=listing.timestamp,
                old_trust=self.state.trust or None,
                new_trust=self.word,
                old_signed=self.now is not None and _signed(self.dest, self.now.main),
                new_signed=any(path in data for path in signature_paths(main))
                or main == "InRelease",
            )
        except FormatError as error:
            raise Unfit(VerificationError(str(error), code="broken-main")) from error
        except (VerificationError, RollbackError) as error:
            # A head that lags may lead back or to what the caller does not want, where the
            # mirror itself is right; and a mirror may be between repomd.xml and its signature.
            if by_head or error.code in ("bad-signature", "no-signature"):
                raise Unfit(error) from error
            raise
        return listing

    # -- what is wanted --------------------------------------------------------------------------

    def _items_of_head(self, now: head.Head) -> list[Item]:
        """What the head says: the main file and what lies beside it, and the files asked for."""
        mains = LAYOUTS[now.layout].mains()
        published = [
            PublishedFile(f.path, f.type, f.track, 0, f.size)
            for f in now.files
            if f.path not in mains
        ]
        listing = Listing(now.layout, now.main, tuple(published), now.timestamp, "")
        chosen = {f.path for f in select(listing, self.options.types, self.options.zchunk)}
        return [
            self._item_of_head(now, file)
            for file in now.files
            if file.path in mains or file.path in chosen
        ]

    def _item_of_head(self, now: head.Head, file: File) -> Item:
        content = now.current.contents.get(file.track)
        return Item(
            Wanted(
                file.path,
                file.type,
                file.track,
                file.size,
                content,
                file.recipe or recipe.IDENTITY,
            ),
            Proof(file.path, file.size, file.sha256),
            small=file.path in LAYOUTS[now.layout].mains(),
        )

    def _items_of_listing(
        self, layout: Layout, listing: Listing, now: head.Head | None
    ) -> list[Item]:
        """What the main file says; the head helps with the files that it knows by hash."""
        known = {f.path: f for f in now.files} if now else {}
        own = known.get(listing.main)
        same = own is not None and own.sha256 == self.work.got.sha256_of(listing.main)
        if same and not known.keys() - layout.mains() <= listing.by_path().keys():
            same = False  # it names what the main file does not: what it leaves out says nothing
        here = self.now.listing.by_path().keys() if self.now else frozenset()
        files = select(listing, self.options.types, self.options.zchunk)
        if known.keys().isdisjoint(file.path for file in files):
            same = False  # of all that is listed it has nothing: the tree is asked instead
        items = []
        for file in files:
            entry = known.get(file.path)
            held = file.path in here and self.dest.stamp(file.path) is not None
            if layout.partial and same and entry is None and not held:
                # Listed, and not in the tree when it was published: as ever with apt. The head
                # proves nothing, so what is held is not given up on its word alone.
                continue
            item = self._item_of_listing(layout, file)
            if now is not None and entry is not None and _agree(file, entry):
                item = replace(
                    self._item_of_head(now, entry),
                    proof=replace(item.proof, size=entry.size, sha256=entry.sha256),
                    optional=item.optional,
                )
            if (
                self.word not in ("", "transport")
                and not Proof(file.path, file.size, None, file.checksum).strong
            ):
                raise VerificationError(
                    f"{file.path}: {listing.main} names no strong checksum, so nothing proves it",
                    code="weak-checksum",
                )
            items.append(item)
        return items

    def _item_of_listing(self, layout: Layout, file: PublishedFile) -> Item:
        sha256 = None
        if file.checksum is not None and file.checksum.algorithm == "sha256":
            sha256 = FileId.from_hex(file.checksum.hex)
        content, how = file.open_id, None
        if sha256 is not None and not file.path.endswith(COMPRESSIONS):
            content, how = ContentId(sha256), recipe.IDENTITY
        return Item(
            Wanted(file.path, file.type, file.track, file.size, content, how),
            Proof(file.path, file.size, sha256, file.checksum),
            optional=layout.partial,
        )

    def _items_of_mirror_in_memory(self) -> list[Item]:
        """What the mirror's main file says, for a plan that writes nothing."""
        layouts = [self.now.layout] if self.now else []
        layouts += [lay for lay in LAYOUTS.values() if lay not in layouts]
        failure: NetworkError | None = None
        for layout in layouts:
            for main in reversed(layout.mains()):
                if layout.describe(main)[0] in ("signature", "key"):
                    continue
                data = bytearray()
                try:
                    self.remote.file(
                        main, data.extend, limit=LIMITS.main, reset=data.clear, fresh=True
                    )
                except NetworkError as error:
                    failure = error
                    continue
                try:
                    listing = layout.parse(bytes(data), main)
                except FormatError as error:
                    raise VerificationError(str(error), code="broken-main") from error
                own = Item(
                    Wanted(main, *layout.describe(main), len(data)),
                    Proof(main, len(data), FileId.of(data)),
                )
                return [own, *self._items_of_listing(layout, listing, None)]
        assert failure is not None
        raise failure

    # -- telling ---------------------------------------------------------------------------------

    def _tell(self, _: int) -> None:
        self.progress.progress("downloading", self.remote.bytes_received)

    def _result(
        self, layout: Layout, listing: Listing, items: Sequence[Item], changed: bool
    ) -> SyncResult:
        files = []
        weights: dict[Route, int] = {}
        for item in items:
            if item.path in self.work.got.absent:
                continue
            route, size = self.work.got.routes.get(item.path, (Route.CURRENT, 0))
            weights[route] = weights.get(route, 0) + size
            done = self.work.got.done.get(item.path)
            total = done.size if done else item.proof.size or 0
            files.append(SyncedFile(item.path, item.wanted.type, total, str(route), size))
        weights.pop(Route.CURRENT, None)
        best = max(weights, key=weights.__getitem__, default=Route.CURRENT)
        return SyncResult(
            self.work.head.repo.hex() if self.work.head else "",
            self.work.head.serial if self.work.head else None,
            str(best),
            changed,
            self.remote.bytes_received,
            self.remote.bytes_sent,
            self.work.bytes_full(items),
            self.remote.requests,
            time.monotonic() - self.started,
            self.word,
            self.work.reason,
            tuple(files),
            listing.timestamp,
        )


def _check_head(found: head.Head) -> None:
    """What the format leaves open: a layout that is known here, and paths that may be joined."""
    layout = LAYOUTS.get(found.layout)
    if layout is None:
        raise FormatError(f"head: unknown layout {found.layout[:40]!r}", code="format-version")
    if found.main not in layout.mains():
        raise FormatError(f"head: {found.main[:80]!r} is no main file")
    for file in found.files:
        safe_path(file.path, "head")


def _agree(file: PublishedFile, entry: File) -> bool:
    if file.size not in (None, entry.size):
        return False
    if file.checksum is None or file.checksum.algorithm != "sha256":
        return True  # the rebuilt file must have both hashes
    return file.checksum.hex == entry.sha256.hex()


def _signed(dest: Destination, main: str) -> bool:
    return main == "InRelease" or any(
        dest.stamp(path) is not None for path in signature_paths(main)
    )


def _plan_result(now: head.Head | None, planned: Plan, reason: str | None) -> PlanResult:
    files = []
    for task in planned.tasks:
        left = task.price.bytes
        requests = task.price.requests
        for wanted in task.files:
            files.append(
                PlannedFile(
                    wanted.path,
                    wanted.type,
                    wanted.size,
                    str(task.route),
                    left,
                    requests,
                    task.price.exact,
                    {str(r): (p.bytes, p.requests) for r, p in task.alternatives.items()},
                )
            )
            left = requests = 0
    price = planned.price
    return PlanResult(
        now.repo.hex() if now else "",
        now.serial if now else None,
        any(task.route is not Route.CURRENT for task in planned.tasks),
        price.bytes,
        price.requests,
        price.exact,
        reason,
        tuple(files),
    )
