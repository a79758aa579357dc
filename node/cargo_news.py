"""Which Cargos this node has heard of and which of them may run: the shell round ``protocol.cargo_shelf``.

Theory of operation. Notices come from neighbours (cargo_links.py), from gossip, and at a Coordinator from its registry. Each is checked
once, whoever brings it. A revocation that counts is on the disk before it takes effect and before it is passed on, so a node that is killed
at any moment has not forgotten what it has acted on, nor what others have from it. Cargos themselves are kept as well as may be.

A promotion (protocol/cargo_promotions.py) is kept like a revocation, and takes the place of the one before it of the same name, in memory
and on the disk: so whatever old one comes again, after a restart too, moves no name back.

Rules. Checking signatures happens outside the lock and lets others have their turn after each, so who sends rubbish delays nobody. Only
what counts is written, passed on, or waits for the lock: Cargos that a Coordinator of our network has listed, revocations and promotions by
one, and revocations by publishers whose Cargo is here. A disk that is full keeps no revocation from taking effect.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import trio

from node.bookkeeper import now_ms
from node.notice_store import NoticeStore
from protocol import limits
from protocol.cargo_news import NOTICE, About, Keyed, Notice, Told, cargo_key, read_notice, revocation_key
from protocol.cargo_promotions import SignedPromotion
from protocol.cargo_shelf import CargoRefused, CargoShelf, Standing, Why
from protocol.cargos import SignedCargo, SignedRevocation
from protocol.errors import RemoteProtocolError

log = logging.getLogger(__name__)

_SEEN_MAX = 8192
_REFUSED_AGAIN_S = 60.0

PassOn = Callable[[Sequence[Notice], str], object]


@dataclass(slots=True)
class NewsCounts:
    """Since the node started: notices that counted, that said nothing new, that were refused."""

    new: int = 0
    known: int = 0
    refused: int = 0


@dataclass(slots=True)
class Hearing:
    """What came of some notices: those that are news and count, and how many cost a look at their signatures and brought nothing."""

    new: list[Notice] = field(default_factory=list)
    useless: int = 0


@dataclass(frozen=True, slots=True)
class _Seen:
    counts: bool
    at_ms: int


class CargoNews:
    """What one node knows about Cargos. ``pass_on`` is told what is news and who said it (empty: this node itself).

    ``on_revoked`` are called with the address of each Cargo that may no longer run, in the task that heard it; they must not block.
    ``on_early``: after a publisher's word on a Cargo that the network does not list; whoever has such a one asks ``may_run`` again.
    """

    def __init__(self, folder: Path, network: str, clock_ms: Callable[[], int] = now_ms) -> None:
        """``folder``: where notices are kept; what lies there is read. Raises OSError."""
        self._store, self._network, self._clock_ms = NoticeStore(folder), network, clock_ms
        self._coordinators: set[str] = set()  # that the network's key has vouched for in some notice
        self.shelf = CargoShelf(network, self._coordinators.__contains__)
        self.known: dict[About, Keyed] = {about: Keyed() for about in About}
        self.on_revoked: list[Callable[[str], object]] = []
        self.on_early: list[Callable[[], object]] = []
        self.pass_on: PassOn = lambda notices, sender: None
        self.counts = NewsCounts()
        self._early: OrderedDict[bytes, Notice] = OrderedDict()
        self._seen: OrderedDict[bytes, _Seen] = OrderedDict()
        self._lock = trio.Lock()
        self._changed = trio.Event()
        self._load()

    def __repr__(self) -> str:
        cargos, revocations = len(self.known[About.CARGO]), len(self.known[About.REVOCATION])
        return f"<CargoNews {cargos} Cargos, {revocations} revocations, {self.counts.refused} refused>"

    def status(self) -> dict[str, int]:
        cargos, revocations = len(self.known[About.CARGO]), len(self.known[About.REVOCATION])
        return {"cargos": cargos, "revocations": revocations, "promotions": len(self.known[About.PROMOTION]), **asdict(self.counts)}

    # -- questions

    def may_run(self, address: str, publisher: str = "") -> Why | None:
        """None where a Cargo may run now, else why not. ``publisher``: whose it is, for one that has come another way than from the
        network: then UNKNOWN only says that the network does not list it."""
        if self.shelf.is_revoked(address, publisher):
            return Why.REVOKED
        try:
            self.shelf.may_run(address, self._clock_ms())
        except CargoRefused as refused:
            return refused.why
        return None

    def cargo(self, address: str) -> SignedCargo | None:
        """The Cargo of this address, if it may run now."""
        try:
            return self.shelf.may_run(address, self._clock_ms())
        except CargoRefused:
            return None

    def stands_for(self, name: str) -> SignedCargo | None:
        """The Cargo that a name stands for now; None where none of it may run."""
        return self.shelf.stands_for(name, self._clock_ms())

    async def wait_changed(self) -> None:
        """Returns after the next Cargo, promotion or revocation that counts."""
        await self._changed.wait()

    def is_fresh(self, notice: Notice) -> bool:
        """Whether it counts and was first heard within CARGO_PASSED_S: gossip of it is worth passing on."""
        seen = self._seen.get(_digest(notice))
        return seen is not None and seen.counts and self._clock_ms() - seen.at_ms < limits.CARGO_PASSED_S * 1000

    # -- hearing

    async def hear(self, notices: Sequence[Notice], sender: str = "") -> Hearing:
        """Takes in what counts; ``sender``: the peer that says it, empty where it is this node's own. Never raises for what a peer says."""
        hearing, counting = Hearing(), list[Told]()
        for notice in notices:
            if self._was_seen(notice):
                self.counts.known += 1
                continue
            told = self._read(notice)
            if told is not None and self._needs_keeping(told):
                counting.append(told)
            else:
                hearing.useless += 1
            await trio.lowlevel.checkpoint()
        if counting:
            hearing.new = await self._take(counting)
        hearing.useless += max(0, len(counting) - len(hearing.new))
        if hearing.new:
            self.pass_on(hearing.new, sender)
        return hearing

    def _was_seen(self, notice: Notice) -> bool:
        """What was refused is looked at again after a while: the clock may have been wrong, or a Cargo may have come meanwhile."""
        seen = self._seen.get(_digest(notice))
        return seen is not None and (seen.counts or 0 <= self._clock_ms() - seen.at_ms < _REFUSED_AGAIN_S * 1000)

    def _note_seen(self, notice: Notice, counts: bool) -> None:
        self._seen[_digest(notice)] = _Seen(counts, self._clock_ms())
        if len(self._seen) > _SEEN_MAX:
            self._seen.popitem(last=False)

    def _read(self, notice: Notice) -> Told | None:
        try:
            told = read_notice(notice, self._network, self._clock_ms())
        except RemoteProtocolError as error:
            self.counts.refused += 1
            self._note_seen(notice, counts=False)
            log.debug("refused news of a Cargo: %s", error)
            return None
        if told.coordinator:
            self._coordinators.add(told.coordinator)
        return told

    def _needs_keeping(self, told: Told) -> bool:
        """Whether it counts and is new, as far as can be told without waiting; what does not count is dealt with here."""
        if told.key in self.known[told.notice.about]:
            self.counts.known += 1
            self._note_seen(told.notice, counts=True)
            return False
        if told.promotion is not None and not self.shelf.is_newer(told.promotion):
            self.counts.known += 1
            self._note_seen(told.notice, counts=False)
            return False
        if told.revocation is None:
            return True
        try:
            standing = self.shelf.judge(told.revocation)
        except (RemoteProtocolError, CargoRefused) as error:
            self.counts.refused += 1
            self._note_seen(told.notice, counts=False)
            log.debug("refused a revocation: %s", error)
            return False
        if standing is Standing.EARLY:
            self._hear_early(told, told.revocation)
        return standing is Standing.COUNTS

    def _hear_early(self, told: Told, signed: SignedRevocation) -> None:
        """Of a Cargo that is not here: in memory only, and not passed on, since anybody may say such things."""
        self.shelf.revoke(signed)
        self._note_seen(told.notice, counts=False)
        self._early[told.key] = told.notice
        for heard in self.on_early:
            heard()
        if len(self._early) > limits.SHELF_EARLY_MAX:
            self._early.popitem(last=False)

    async def _take(self, counting: list[Told]) -> list[Notice]:
        """Keeps, then believes. Not to be broken off in between."""
        with trio.CancelScope(shield=True):
            async with self._lock:
                revocations = _distinct([told for told in counting if told.revocation is not None and not self._has(told)])
                await self._keep(self._store.keep_words, revocations)
                new = [told for told in revocations if told.revocation is not None and await self._revoke(told, told.revocation)]
                promotions = _newest([told for told in counting if told.promotion is not None and self.shelf.is_newer(told.promotion)])
                await self._keep(self._store.keep_words, promotions)
                new += [told for told in promotions if told.promotion is not None and await self._promote(told, told.promotion)]
                added = [told for told in counting if told.cargo is not None and await self._add(told, told.cargo, new)]
                await self._keep(self._store.keep_cargos, added)
        new += added
        for told in new:
            self._note_seen(told.notice, counts=True)
        self.counts.new += len(new)
        if new:
            self._changed.set()
            self._changed = trio.Event()
        return [told.notice for told in new]

    def _has(self, told: Told) -> bool:
        return told.key in self.known[told.notice.about]

    async def _keep(self, write: Callable[[Sequence[Told]], None], what: Sequence[Told]) -> None:
        if not what:
            return
        try:
            await trio.to_thread.run_sync(write, what)
        except OSError as error:
            log.error("what was heard of Cargos cannot be kept on disk: %s", error.strerror)

    async def _revoke(self, told: Told, signed: SignedRevocation) -> bool:
        """Takes effect now."""
        hit = self.shelf.hit_by(signed)
        try:
            if not self.shelf.revoke(signed):
                return False
        except (RemoteProtocolError, CargoRefused) as error:
            log.warning("a revocation is not taken: %s", error)
            return False
        self.known[About.REVOCATION].put(told.key, told.notice)
        self._end(dict.fromkeys([*hit, *filter(None, [signed.revocation.cargo])]), signed)
        await self._drop(hit)
        return True

    def _end(self, addresses: Sequence[str] | dict[str, None], signed: SignedRevocation) -> None:
        by = "the network" if signed.revocation.network else "its publisher"
        for address in addresses:
            log.warning("Cargo %s was revoked by %s%s", address[:16], by, f": {reason}" if (reason := signed.revocation.reason) else "")
            for told in self.on_revoked:
                told(address)

    async def _drop(self, addresses: Sequence[str]) -> None:
        keys = [cargo_key(address) for address in addresses]
        for key in keys:
            self.known[About.CARGO].drop(key)
        try:
            await trio.to_thread.run_sync(self._store.drop_cargos, keys)
        except OSError as error:
            log.warning("a revoked Cargo's manifest cannot be deleted: %s", error.strerror)

    async def _promote(self, told: Told, signed: SignedPromotion) -> bool:
        """Takes effect now, and the one before it is forgotten."""
        try:
            before = self.shelf.promote(signed)
        except CargoRefused as error:
            self.counts.refused += 1
            log.warning("a promotion is not taken: %s", error)
            return False
        if before is not None:
            await self._forget_promotions([before.key])
        self.known[About.PROMOTION].put(told.key, told.notice)
        promotion = signed.promotion
        log.info("%s stands for Cargo %s from now on (%s)", promotion.name, promotion.cargo[:16], promotion.origin or "promoted")
        return True

    async def _forget_promotions(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.known[About.PROMOTION].drop(key)
        try:
            await trio.to_thread.run_sync(self._store.drop_promotions, keys)
        except OSError as error:
            log.warning("an old promotion cannot be deleted: %s", error.strerror)

    async def _add(self, told: Told, cargo: SignedCargo, new: list[Told]) -> bool:
        """Whether it is taken in; what keeps it away and has not counted before goes to ``new``."""
        try:
            if not self.shelf.add(cargo):
                return False
        except CargoRefused as refused:
            self.counts.refused += 1
            log.debug("a Cargo is not taken: %s", refused)
            if refused.why is Why.REVOKED:
                self._note_seen(told.notice, counts=False)
                new += await self._keep_early(cargo)
            return False
        self.known[About.CARGO].put(told.key, told.notice)
        return True

    async def _keep_early(self, cargo: SignedCargo) -> list[Told]:
        """Revocations that came before their Cargo count now, here and for others."""
        due = []
        for signed in self.shelf.revoking(cargo):
            key = revocation_key(signed)
            notice = self._early.pop(key, None)
            if notice is not None:
                due.append(Told(key, notice, None, signed))
        await self._keep(self._store.keep_words, due)
        for told in due:
            self.known[About.REVOCATION].put(told.key, told.notice)
        return due

    # -- an earlier run

    def _load(self) -> None:
        """What was kept; a Cargo that a revocation there takes away is not taken in again."""
        revoked, replaced = list[bytes](), list[bytes]()
        for told in self._store.load(lambda notice: read_notice(notice, self._network, self._clock_ms())):
            if told.coordinator:
                self._coordinators.add(told.coordinator)
            try:
                if told.revocation is not None:
                    self.shelf.restore(told.revocation)
                elif told.promotion is not None:
                    replaced += self._restore(told, told.promotion)
                    continue
                elif told.cargo is not None:
                    self.shelf.add(told.cargo)
            except CargoRefused as refused:
                log.info("a Cargo of an earlier run is left out: %s", refused)
                revoked.append(told.key)
                continue
            self.known[told.notice.about].put(told.key, told.notice)
        self._store.drop_cargos(revoked)
        self._store.drop_promotions(replaced)

    def _restore(self, told: Told, signed: SignedPromotion) -> list[bytes]:
        """Of two of a name, which a kill between writing the new one and deleting the old one leaves, the newer; the other's key. Raises
        CargoRefused."""
        if not self.shelf.is_newer(signed):
            return [told.key]
        before = self.shelf.promote(signed)
        self.known[About.PROMOTION].put(told.key, told.notice)
        if before is None:
            return []
        self.known[About.PROMOTION].drop(before.key)
        return [before.key]


def _distinct(told: Sequence[Told]) -> list[Told]:
    return list({one.key: one for one in told}.values())


def _newest(told: Sequence[Told]) -> list[Told]:
    """Of the promotions of each name."""
    newest: dict[str, Told] = {}
    for one in sorted(told, key=_rank):
        if one.promotion is not None:
            newest[one.promotion.promotion.name] = one
    return list(newest.values())


def _rank(told: Told) -> tuple[int, bytes]:
    return told.promotion.rank if told.promotion is not None else (0, b"")


def _digest(notice: Notice) -> bytes:
    return hashlib.sha256(NOTICE.encode(notice)).digest()
