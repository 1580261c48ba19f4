"""Garbage collection: which snapshots stay, which packs go, and when. Plan, then execute.

A pack is needed while a retained snapshot's contents need it (``reach``), or the head names it. One
that is not is *condemned*: written down with the time in gc.json, and deleted when it has been so
for the grace time. In between clients with an old head, and second tiers in the middle of a
copy, find it where it was. Packs of which little is needed any more are rewritten: what lives moves
to a maintenance pack (``rewrite``), and they are condemned.

What is needed is found anew in each run, under the lock: gc.json only says since when. The order
of writes is maintenance pack, head, gc.json, deletions, gc.json; killed anywhere in between, the
store is whole, and the next run goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from . import condemned as conviction
from . import head, reach
from .backends.local import LocalBackend
from .errors import InputError, StoreError
from .ids import ContentId
from .limits import LIMITS, MIB
from .pack import Toc
from .places import PackName
from .reach import Reach
from .rewrite import compose
from .store import Store

HOUR = 3600
DAY = 24 * HOUR

_KEPT = 120  #: bytes of a table of contents that tell of one moved delta

Progress = Callable[[str], None]


def _silent(_: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Options:
    """What to keep, and how patient to be."""

    keep: int | None = None  #: snapshots that the head retains, at most; None: all it has
    keep_seconds: int | None = None  #: and no older than this, the current one aside
    grace: int = DAY  #: seconds between the end of a pack's use and its deletion
    max_rewrite: int = 64 * MIB  #: bytes that a maintenance pack may have; 0: none is written
    rewrite_below: float = 0.5  #: packs with a smaller share of needed bytes are rewritten,
    rewrite_gain: float = 0.1  #: where that frees this share of the whole store


@dataclass(frozen=True, slots=True)
class PackFact:
    """A pack in a plan. Sizes in bytes; *seconds* until it may be deleted."""

    name: PackName
    size: int
    live: int = 0
    seconds: int = 0


@dataclass(frozen=True, slots=True)
class Facts:
    """What a plan is made from: the head, the tables of contents, and what is needed of them."""

    now: int  #: seconds since 1970
    head: head.Head
    states: tuple[tuple[PackName, Toc], ...]  #: the head's snapshots, oldest first
    retained: tuple[tuple[PackName, Toc], ...]  #: those that stay
    sizes: Mapping[PackName, int]  #: all packs but leftovers
    leftovers: Mapping[PackName, int]  #: packs that were written and never named by a head
    tocs: tuple[tuple[PackName, Toc], ...]
    reach: Reach  #: what the retained snapshots need
    condemned: Mapping[PackName, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """What gc would do."""

    serial: int
    snapshots: int  #: that the head retains afterwards, a maintenance one aside
    dropped: tuple[int, ...] = ()  #: serials of the snapshots that leave the head
    condemned: tuple[PackFact, ...] = ()  #: packs that no longer serve anything, from now on
    waiting: tuple[PackFact, ...] = ()  #: condemned before, still in their grace time
    deleted: tuple[PackFact, ...] = ()  #: the grace time is over
    spared: tuple[PackFact, ...] = ()  #: condemned before, needed again
    rewritten: tuple[PackFact, ...] = ()  #: condemned after their needed bytes have moved
    rewrite_bytes: int = 0  #: about the size of the maintenance pack
    leftovers: tuple[PackFact, ...] = ()  #: of an interrupted publish or gc: deleted at once
    kept_bytes: int = 0  #: packs that stay

    @property
    def nothing(self) -> bool:
        """Whether there is nothing to do."""
        return not (
            self.dropped
            or self.condemned
            or self.deleted
            or self.spared
            or self.rewritten
            or self.leftovers
        )

    @property
    def freed(self) -> int:
        """Bytes of packs that are deleted at once."""
        moved = (fact for fact in self.rewritten if fact.seconds == 0)
        return sum(fact.size for fact in (*self.deleted, *self.leftovers, *moved))

    @property
    def freed_later(self) -> int:
        """Bytes of packs that go when their grace time ends."""
        moved = (fact for fact in self.rewritten if fact.seconds > 0)
        return sum(fact.size for fact in (*self.condemned, *self.waiting, *moved))


@dataclass(frozen=True, slots=True)
class Report:
    """What gc did. Sizes in bytes."""

    plan: Plan
    pack: str | None  #: the maintenance pack
    pack_bytes: int
    seconds: float
    removed: tuple[str, ...] = ()  #: temporary files of interrupted writers


def run(
    backend: LocalBackend,
    options: Options | None = None,
    progress: Progress = _silent,
    now: int | None = None,
) -> Report:
    """Plan and execute, under the store's lock.

    Raises:
        InputError: there is no store.
        LockedError: a publish, gc or repair is at work.
        StoreError: the store is damaged; nothing was deleted.
        LocalError: a read or write failed; the next run goes on.
    """
    options = options or Options()
    started = time.monotonic()
    if not backend.names():
        raise InputError("there is no store", code="no-store")
    with backend.lock():
        removed = tuple(backend.sweep())
        store = Store(backend)
        progress("looking for what is needed")
        facts = gather(store, options, now)
        chosen = plan(facts, options)
        pack, size = execute(store, backend, facts, chosen, progress)
        return Report(chosen, pack, size, time.monotonic() - started, removed)


def preview(store: Store, options: Options | None = None, now: int | None = None) -> Plan:
    """The plan alone. Nothing is changed and no lock is taken. Raises as ``run``."""
    options = options or Options()
    if not store.backend.names():
        raise InputError("there is no store", code="no-store")
    return plan(gather(store, options, now), options)


def retain(
    states: Sequence[tuple[PackName, Toc]], keep: int | None, keep_seconds: int | None
) -> tuple[tuple[PackName, Toc], ...]:
    """Which snapshots stay, as ``publish`` decides it: ages count from the current one's time."""
    current = states[-1]
    older = list(states[:-1])
    if keep_seconds is not None:
        oldest = current[1].snapshot.time - keep_seconds
        older = [entry for entry in older if entry[1].snapshot.time >= oldest]
    if keep is not None:
        count = max(keep, 1) - 1
        older = older[-count:] if count else []
    return (*older, current)


def gather(store: Store, options: Options, now: int | None = None) -> Facts:
    """Read what a plan needs.

    Raises StoreError where a retained content cannot be had: a damaged store is repaired first.
    """
    found = store.read_head()
    if found is None:
        raise StoreError(
            "there are packs and no head: publish or repair rebuilds it", code="store-head"
        )
    names = store.pack_names()
    sizes = {name: store.backend.size(str(name)) or 0 for name in names}
    leftovers = {name: size for name, size in sizes.items() if name.serial > found.serial}
    sizes = {name: size for name, size in sizes.items() if name not in leftovers}
    condemned = conviction.read(store.backend)
    states = tuple(store.tocs([state.pack for state in found.states]))
    retained = retain(states, options.keep, options.keep_seconds)
    tocs, _ = reach.readable_tocs(store, list(sizes))
    wanted = [content for _, toc in retained for content in reach.needed_by(toc)]
    # Condemned packs may hold the same contents: they are looked at only where nothing else does.
    doomed = condemned.keys() - {name for name, _ in states}
    standing = [name for name in sizes if name not in doomed]
    needs = reach.survey(store, wanted, [e for e in tocs if e[0] not in doomed], standing)
    if needs.lost:
        needs = reach.survey(store, wanted, tocs, sizes)
    if needs.lost:
        content, why = next(iter(needs.lost.items()))
        raise StoreError(
            f"{len(needs.lost)} retained content(s) cannot be read, first {content.hex()[:12]}: "
            f"{why}; nothing is deleted before a repair",
            code="store-damaged",
        )
    return Facts(
        int(time.time()) if now is None else now,
        found,
        states,
        retained,
        sizes,
        leftovers,
        tuple(tocs),
        needs,
        condemned,
    )


def plan(facts: Facts, options: Options) -> Plan:
    """What to do, from facts alone."""
    sizes = facts.sizes
    kept = {name for name, _ in facts.retained}
    victims, cost = _victims(facts, options, kept)
    needed = (kept | set(facts.reach.packs)) - set(victims)
    dead = [name for name in sizes if name not in needed and name not in victims]

    def fact(name: PackName) -> PackFact:
        use = facts.reach.packs.get(name)
        left = _since(facts, name) + options.grace - facts.now
        return PackFact(name, sizes[name], use.live if use else 0, max(0, left))

    dead_facts = [fact(name) for name in dead]
    due = tuple(f for f in dead_facts if f.seconds == 0)
    waits = [f for f in dead_facts if f.seconds > 0]
    return Plan(
        facts.head.serial,
        len(facts.retained),
        tuple(t.snapshot.serial for name, t in facts.states if name not in kept),
        tuple(f for f in waits if f.name not in facts.condemned),
        tuple(f for f in waits if f.name in facts.condemned),
        due,
        tuple(fact(name) for name in facts.condemned if name in needed and name in sizes),
        tuple(fact(name) for name in victims),
        cost,
        tuple(PackFact(name, size) for name, size in facts.leftovers.items()),
        sum(sizes[name] for name in sizes if name in needed),
    )


def _since(facts: Facts, name: PackName) -> int:
    """Since when a pack is condemned. A time in the future is a clock that was set back."""
    return min(facts.condemned.get(name, facts.now), facts.now)


def _victims(facts: Facts, options: Options, kept: set[PackName]) -> tuple[list[PackName], int]:
    """Packs worth a rewrite, and about what the maintenance pack will have in bytes.

    Not those that the head names: clients take the deltas where it says that they lie.
    """
    if options.max_rewrite <= 0:
        return [], 0
    uses = facts.reach.packs
    candidates = [
        name
        for name, use in uses.items()
        if name not in kept and use.live < options.rewrite_below * facts.sizes[name]
    ]
    candidates.sort(key=lambda n: (uses[n].live / max(facts.sizes[n], 1), n.serial, n.id))
    chosen: list[PackName] = []
    best: list[PackName] = []
    gain = best_gain = best_cost = live = 0
    users: set[ContentId] = set()
    # The first victim pays for all the indexes that the others then share: look at every prefix.
    for name in candidates:
        more = users | uses[name].users
        cost = live + uses[name].live + _told_bytes(facts, more)
        if cost > options.max_rewrite:
            continue
        chosen.append(name)
        users, live = more, live + uses[name].live
        gain = sum(facts.sizes[n] for n in chosen) - cost
        if gain > best_gain:
            best, best_gain, best_cost = list(chosen), gain, cost
    if best_gain < options.rewrite_gain * sum(facts.sizes.values()):
        return [], 0  # every mirror has to fetch a maintenance pack: it must be worth that
    return best, best_cost


def _told_bytes(facts: Facts, contents: set[ContentId]) -> int:
    """What it takes to tell anew where *contents* lie."""
    places = (facts.reach.found[content].index for content in contents)
    return sum(place.length if place is not None else _KEPT for place in places)


def execute(
    store: Store,
    backend: LocalBackend,
    facts: Facts,
    chosen: Plan,
    progress: Progress = _silent,
) -> tuple[str | None, int]:
    """Do what *chosen* says: the maintenance pack's name and size, if there is one.

    The caller holds the lock, and made the facts under it.
    """
    before = store.read_head_bytes()
    for fact in chosen.leftovers:
        backend.delete(str(fact.name))
    retained = list(facts.retained)
    pack: str | None = None
    size = 0
    victims = [fact.name for fact in chosen.rewritten]
    if victims:
        users = {user for name in victims for user in facts.reach.packs[name].users}
        made = compose(
            store,
            max([facts.head.serial, *(name.serial for name in facts.leftovers)]) + 1,
            facts.states[-1],
            [content for content in facts.reach.found if content in users],
            facts.reach,
            facts.tocs,
            victims,
        )
        pack = str(made.name)
        progress(f"writing {pack}")
        size = backend.put(pack, made.pieces)
        store.remember(made.name, made.toc)
        retained.append((made.name, made.toc))
    if victims or chosen.dropped:
        encoded = head.encode(head.build(retained))
        if len(encoded) > LIMITS.head:
            raise InputError(f"the head would have {len(encoded)} bytes; keep fewer snapshots")
        backend.swap_head(encoded, before)

    due = {fact.name for fact in chosen.deleted}
    due |= {fact.name for fact in chosen.rewritten if fact.seconds == 0}
    convicts = {
        fact.name: _since(facts, fact.name)
        for fact in (*chosen.condemned, *chosen.waiting, *chosen.deleted, *chosen.rewritten)
    }
    waiting = {name: since for name, since in convicts.items() if name not in due}
    # A pack is written down before it goes, so that publish passes it by from now on.
    _remember(backend, convicts, facts.condemned)
    for name in sorted(due, key=lambda n: (n.serial, n.id)):
        progress(f"deleting {name}")
        backend.delete(str(name))
    _remember(backend, waiting, convicts)
    return pack, size


def _remember(
    backend: LocalBackend, now: Mapping[PackName, int], before: Mapping[PackName, int]
) -> None:
    if dict(now) != dict(before):
        backend.put(conviction.NAME, [conviction.encode(now)])
