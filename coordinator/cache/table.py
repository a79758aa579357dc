"""The answers that are kept: a dictionary with bounds on number, bytes and age, and what is needed to delete from it. Pure; time is given.

Theory of operation. An entry stands under its scope (an account, or all) and its key. Looking it up makes it the youngest; where there is
no room, the one that was not used for longest goes. So that an account that asks much does not push out what others have, an account with
more than its share (the room, divided by those who have something here) makes room by itself; else the oldest of all goes. Everything
that a request does takes the same time however many entries there are; deleting an account's or a Cargo's walks over all.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from coordinator.cache.candidates import Candidates, Slot
from coordinator.cache.guards import Reading

ENTRY_BYTES = 1_500  # of objects, index and dictionaries round one entry, measured with 10,000 of eight words each
READING_BYTES = 2_500  # of what the guards and the index know of a question
OVERSIZE_SHARE = 16  # an answer larger than this part of all room is not kept

Vector = npt.NDArray[np.float32]


@dataclass(slots=True, eq=False)
class Entry:
    """An answer. ``account``: who has paid for it, by job ``job_id``; ``content_hash``: of the Cargo that gave it; ``packed``: its events
    (transcript.py). ``context`` and ``question``: empty where only an equal question will do. ``core`` and ``reading``: of the question, as
    the index and the guards have it; ``vector``: of ``core``, of length 1; each once it is known. ``is_blind``: it may not stand in for
    another question any more."""

    scope: str
    key: bytes
    account: str
    cargo: str
    content_hash: str
    job_id: str
    packed: bytes
    kept_at_s: float
    expires_at_s: float
    context: bytes = b""
    question: str = ""
    core: str = ""
    words: tuple[str, ...] = ()
    reading: Reading | None = None
    vector: Vector | None = None
    is_blind: bool = False

    @property
    def slot(self) -> Slot:
        return self.scope, self.key

    @property
    def size_bytes(self) -> int:
        texts = 4 * (len(self.question) + len(self.core))  # Python's widest characters
        described = READING_BYTES if self.reading is not None else 0
        return ENTRY_BYTES + len(self.packed) + texts + described + (self.vector.nbytes if self.vector is not None else 0)


@dataclass(slots=True)
class AnswerTable:
    """``entries_max`` and ``bytes_max`` bound all entries together."""

    entries_max: int
    bytes_max: int
    size_bytes: int = 0
    evicted: int = 0
    expired: int = 0
    _entries: OrderedDict[Slot, Entry] = field(default_factory=OrderedDict)  # the one that was not used for longest first
    _of_account: dict[str, OrderedDict[Slot, None]] = field(default_factory=dict)
    _bytes_of: dict[str, int] = field(default_factory=dict)
    _of_cargo: dict[str, tuple[int, int]] = field(default_factory=dict)  # entries and bytes
    _index: Candidates = field(default_factory=Candidates)
    _ends: list[tuple[float, Slot]] = field(default_factory=list)  # a heap; some of them are gone already

    def __repr__(self) -> str:
        return f"<AnswerTable {len(self._entries)} answers, {self.size_bytes} bytes>"

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, slot: Slot, now_s: float) -> Entry | None:
        """The entry, which counts as used now."""
        entry = self.peek(slot, now_s)
        if entry is not None:
            self._entries.move_to_end(slot)
            self._of_account[entry.account].move_to_end(slot)
        return entry

    def peek(self, slot: Slot, now_s: float) -> Entry | None:
        """The entry, without its being used."""
        entry = self._entries.get(slot)
        return entry if entry is not None and now_s < entry.expires_at_s else None

    def put(self, entry: Entry, now_s: float) -> bool:
        """In the place of what stood there; False where it is too large for this table."""
        self.expire(now_s)
        self.drop(entry.slot)
        if entry.size_bytes > self.bytes_max // OVERSIZE_SHARE:
            return False
        self._entries[entry.slot] = entry
        self._of_account.setdefault(entry.account, OrderedDict())[entry.slot] = None
        self._weigh(entry, 1, entry.size_bytes)
        if entry.words:
            self._index.put((entry.scope, entry.context), entry.slot, entry.words)
        heapq.heappush(self._ends, (entry.expires_at_s, entry.slot))
        self._make_room(entry.account)
        return entry.slot in self._entries

    def describe(self, entry: Entry, core: str, words: tuple[str, ...], reading: Reading) -> None:
        """What its question is about, by which it is found from now on, if it still stands there."""
        if self._entries.get(entry.slot) is not entry or entry.words or entry.is_blind:
            return
        before = entry.size_bytes
        entry.core, entry.words, entry.reading = core, words, reading
        self._weigh(entry, 0, entry.size_bytes - before)
        if words:
            self._index.put((entry.scope, entry.context), entry.slot, words)
        self._make_room(entry.account)

    def set_vector(self, entry: Entry, vector: Vector) -> None:
        """What its question looks like, if it still stands there."""
        if self._entries.get(entry.slot) is not entry or entry.vector is not None:
            return
        entry.vector = vector
        self._weigh(entry, 0, vector.nbytes)
        self._make_room(entry.account)

    def _weigh(self, entry: Entry, count: int, size_bytes: int) -> None:
        """Some more, or less."""
        self.size_bytes += size_bytes
        self._bytes_of[entry.account] = self._bytes_of.get(entry.account, 0) + size_bytes
        had, had_bytes = self._of_cargo.get(entry.cargo, (0, 0))
        if had + count:
            self._of_cargo[entry.cargo] = had + count, had_bytes + size_bytes
        else:
            del self._of_cargo[entry.cargo]

    def _make_room(self, account: str) -> None:
        while (is_full := len(self._entries) > self.entries_max) or self.size_bytes > self.bytes_max:
            held, accounts = self._of_account.get(account, ()), len(self._of_account)
            has_more = len(held) * accounts > self.entries_max if is_full else self._bytes_of.get(account, 0) * accounts > self.bytes_max
            self.drop(next(iter(held)) if held and has_more else next(iter(self._entries)))
            self.evicted += 1

    def drop(self, slot: Slot) -> Entry | None:
        entry = self._entries.pop(slot, None)
        if entry is None:
            return None
        held = self._of_account[entry.account]
        del held[slot]
        self._weigh(entry, -1, -entry.size_bytes)
        if not held:
            del self._of_account[entry.account], self._bytes_of[entry.account]
        if entry.words and not entry.is_blind:
            self._index.take((entry.scope, entry.context), slot, entry.words)
        return entry

    def blind(self, slot: Slot) -> None:
        """It stands in for its own question only, from now on."""
        entry = self._entries.get(slot)
        if entry is None or entry.is_blind:
            return
        if entry.words:
            self._index.take((entry.scope, entry.context), slot, entry.words)
        entry.is_blind = True

    def expire(self, now_s: float) -> int:
        """Those whose time is over go; how many."""
        gone = 0
        while self._ends and self._ends[0][0] <= now_s:
            _, slot = heapq.heappop(self._ends)
            entry = self._entries.get(slot)
            if entry is not None and entry.expires_at_s <= now_s:
                self.drop(slot)
                gone += 1
        self.expired += gone
        if len(self._ends) > 2 * len(self._entries) + 64:  # mostly of what was evicted or replaced
            self._ends = sorted((entry.expires_at_s, slot) for slot, entry in self._entries.items())
        return gone

    def delete(self, account: str = "", cargo: str = "", key: bytes = b"") -> int:
        """What an account has paid for, of a Cargo, under a key; empty: any. How many."""

        def is_meant(entry: Entry) -> bool:
            return account in ("", entry.account) and cargo in ("", entry.cargo) and key in (b"", entry.key)

        return self.delete_where(is_meant)

    def delete_where(self, is_meant: Callable[[Entry], bool]) -> int:
        gone = [slot for slot, entry in self._entries.items() if is_meant(entry)]
        for slot in gone:
            self.drop(slot)
        return len(gone)

    def knows(self, scope: str, context: bytes) -> bool:
        """Whether there are questions of this scope and context."""
        return (scope, context) in self._index

    def candidates(self, scope: str, context: bytes, words: Iterable[str], now_s: float) -> list[Entry]:
        """Entries of this scope and context whose questions share words with one, the best first."""
        found = (self.peek(slot, now_s) for slot in self._index.find((scope, context), words))
        return [entry for entry in found if entry is not None]

    def held_by(self, account: str) -> int:
        """Entries that an account has paid for."""
        return len(self._of_account.get(account, ()))

    def per_cargo(self) -> dict[str, tuple[int, int]]:
        """Entries and bytes of each Cargo."""
        return dict(self._of_cargo)
