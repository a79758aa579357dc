"""Who holds which KV cells: exact admission by declared length, prefixes reused under the same salt, least recently used forgotten.

A mirror of llama.cpp's unified cache: one pool of cells, each held by any number of sequences. A job is admitted when every cell that
it has declared (prompt + max_tokens) is certain, so a running job never meets a full cache. A finished job's sequence lingers in its
cells for a while, where its prefix can be shared without a copy, and so that llama.cpp does not fill its holes with the next tokens of
running sequences: attention then adds up their cells in another order, which changes the last bits of their logits. It lingers not for
long, since every row of every step walks past all cells (1.3 µs each for SmolLM2-135M: 6,000 of them halve the speed). What is forgotten
here is kept outside the cells (shelf.py).

Rules, asserted by tests against a slow model: promised = cells held by running sequences + cells they may still ask for; promised
never exceeds the pool; a prefix serves only its own salt; the last token of a prompt is always computed, since its logits are wanted.

Pure: it says what is to be forgotten, the engine tells llama.cpp.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]


LINGER_CELLS_MAX = 1024


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A sequence whose cells are to be given back now. ``tokens``: what they hold, empty where that is worth nothing to anybody."""

    sequence: int
    salt: bytes
    tokens: Ints


@dataclass(frozen=True, slots=True)
class Admission:
    """``sequence``: the id to compute under; its first ``cached_tokens`` cells are shared with ``source`` (-1: none).

    ``evicted`` must be forgotten before anything else is done.
    """

    sequence: int
    source: int
    cached_tokens: int
    evicted: tuple[Forgotten, ...] = ()


class _Sequence:
    """Tokens whose cells exist, and the cells' numbers, in order of position."""

    __slots__ = ("cells", "declared", "length", "salt", "tokens", "worthless")

    def __init__(self, declared: int, salt: bytes) -> None:
        self.declared, self.salt, self.length = declared, salt, 0
        self.tokens = np.zeros(declared, np.int32)
        self.cells = np.zeros(declared, np.int32)
        self.worthless = False

    def held(self) -> Ints:
        return self.cells[: self.length]

    def known(self) -> Ints:
        return self.tokens[: self.length]

    def shrink(self) -> None:
        """A finished sequence asks for no more."""
        self.tokens, self.cells = self.known().copy(), self.held().copy()
        self.declared = self.length


class KvBook:
    """The book of ``cells`` KV cells and ``sequences`` sequence ids, of which at most ``slots`` run at a time.

    ``remembers`` is False for models whose state cannot be cut back to a prefix. ``linger_cells``: how many cells finished sequences may
    keep beside running ones.
    """

    def __init__(
        self, cells: int, slots: int, sequences: int, remembers: bool = True, linger_cells: int = LINGER_CELLS_MAX
    ) -> None:
        if not 0 < slots < sequences:  # one more, so that making room never forgets the prefix that is being shared
            raise ValueError(f"{slots} slots need more than {sequences} sequence ids")
        self.cells, self.slots, self.remembers, self._linger_cells = cells, slots, remembers, linger_cells
        self._free_ids = list(range(sequences - 1, -1, -1))
        self._free_cells = np.arange(cells - 1, -1, -1, dtype=np.int32)  # a stack: lowest number on top
        self._free_count = cells
        self._by_running = np.zeros(cells, np.int32)
        self._by_remembered = np.zeros(cells, np.int32)
        self._running: dict[int, _Sequence] = {}
        self._remembered: OrderedDict[int, _Sequence] = OrderedDict()  # least recently used first
        self._lingering = 0  # cells of remembered sequences, shared ones counted each time
        self._held_running = 0  # cells held by at least one running sequence
        self._open = 0  # cells that running sequences may still ask for

    def __repr__(self) -> str:
        return f"<KvBook {self.tokens_free}/{self.cells} cells free, {len(self._running)} running, {len(self._remembered)} lingering>"

    @property
    def tokens_free(self) -> int:
        """Longest prompt + max_tokens that would be admitted now."""
        return self.cells - self._held_running - self._open

    @property
    def slots_free(self) -> int:
        return self.slots - len(self._running)

    def length(self, sequence: int) -> int:
        return self._running[sequence].length

    def shareable(self, prompt: list[int], salt: bytes) -> int:
        """How many tokens of a prompt stand in cells that it may share."""
        return self._longest_prefix(np.asarray(prompt, np.int32), salt)[1]

    def admit(self, prompt: list[int], declared: int, salt: bytes, shares: bool = True) -> Admission | None:
        """Promises ``declared`` cells to a new sequence; None when they are not certain now. ``shares``: the longest prefix too."""
        if not 0 < len(prompt) <= declared:
            raise ValueError(f"a prompt of {len(prompt)} tokens cannot declare {declared}")
        if not self.slots_free:
            return None
        tokens = np.asarray(prompt, np.int32)
        source, common = self._longest_prefix(tokens, salt) if shares else (-1, 0)
        shared = self._sequence(source).cells[:common] if common else np.zeros(0, np.int32)
        newly_held = int(np.count_nonzero(self._by_running[shared] == 0))
        if declared - common + newly_held > self.tokens_free:
            return None
        return self._enter(tokens, declared, salt, source, shared.copy(), newly_held)

    def _enter(self, tokens: Ints, declared: int, salt: bytes, source: int, shared: Ints, newly_held: int) -> Admission:
        if source in self._remembered:
            self._remembered.move_to_end(source)
        evicted = () if self._free_ids else (self._forget_oldest(),)
        number, common = self._free_ids.pop(), len(shared)
        sequence = self._running[number] = _Sequence(declared, salt)
        sequence.tokens[:common], sequence.cells[:common], sequence.length = tokens[:common], shared, common
        self._by_running[shared] += 1
        self._held_running += newly_held
        self._open += declared - common
        return Admission(number, source, common, evicted)

    def make_room(self, count: int) -> tuple[Forgotten, ...] | None:
        """Frees ``count`` cells for a moment, at the cost of lingering sequences; None when running ones hold too many."""
        if self.cells - self._held_running < count:
            return None
        evicted = []
        while self._free_count < count:
            evicted.append(self._forget_oldest())
        return tuple(evicted)

    def tidy(self) -> tuple[Forgotten, ...]:
        """All lingering sequences, forgotten: for when nothing runs, so that the next ones begin in empty cells."""
        return tuple(self._forget_oldest() for _ in range(len(self._remembered)))

    def append(self, sequence: int, tokens: list[int]) -> tuple[Forgotten, ...]:
        """Takes cells for tokens that are about to be computed; returns lingering sequences that must be forgotten first."""
        entry, count = self._running[sequence], len(tokens)
        if entry.length + count > entry.declared:
            raise ValueError(f"sequence {sequence} declared {entry.declared} tokens and asks for more")
        evicted: list[Forgotten] = []
        while self._free_count < count:
            evicted.append(self._forget_oldest())
        cells = self._free_cells[self._free_count - count : self._free_count][::-1]
        self._free_count -= count
        end = entry.length + count
        entry.cells[entry.length : end], entry.tokens[entry.length : end] = cells, tokens
        entry.length = end
        self._by_running[cells] += 1
        self._held_running += count
        self._open -= count
        return tuple(evicted)

    def finish(self, sequence: int, is_sound: bool = True) -> tuple[Forgotten, ...]:
        """A job is over, however it ended. Its cells linger, if they are ``is_sound``; returns sequences to forget: itself where nothing
        is worth keeping, and the oldest where too many cells linger."""
        entry = self._running.pop(sequence)
        held = entry.held()
        self._open -= entry.declared - entry.length
        self._by_running[held] -= 1
        self._held_running -= int(np.count_nonzero(self._by_running[held] == 0))
        if not (self.remembers and is_sound and entry.length and entry.salt):
            self._release(held)
            self._free_ids.append(sequence)
            return (Forgotten(sequence, b"", _NOTHING),)
        for number in [number for number, other in self._remembered.items() if _covers(entry, other)]:
            self._remembered[number].worthless = True  # and the next to go, but not now: that would leave a hole
            self._remembered.move_to_end(number, last=False)
        entry.shrink()
        self._by_remembered[entry.cells] += 1
        self._remembered[sequence] = entry
        self._lingering += entry.length
        forgotten: list[Forgotten] = []
        while self._lingering > self._linger_cells:
            forgotten.append(self._forget_oldest())
        return tuple(forgotten)

    def _sequence(self, number: int) -> _Sequence:
        return self._running[number] if number in self._running else self._remembered[number]

    def _longest_prefix(self, tokens: Ints, salt: bytes) -> tuple[int, int]:
        """Sequence and length of the longest prefix that may be shared. An empty salt shares nothing."""
        best, best_length = -1, 0
        if not (salt and self.remembers):
            return best, best_length
        for number, entry in (*self._running.items(), *self._remembered.items()):
            length = min(entry.length, len(tokens) - 1)
            if entry.salt != salt or length <= best_length:
                continue
            common = common_length(entry.tokens[:length], tokens[:length])
            if common > best_length:
                best, best_length = number, common
        return best, best_length

    def _forget_oldest(self) -> Forgotten:
        return self._forget(next(iter(self._remembered)))

    def _forget(self, number: int) -> Forgotten:
        entry = self._remembered.pop(number)
        self._by_remembered[entry.cells] -= 1
        self._lingering -= entry.length
        self._release(entry.cells)
        self._free_ids.append(number)
        return Forgotten(number, entry.salt, _NOTHING if entry.worthless else entry.tokens)

    def _release(self, cells: Ints) -> None:
        """Those of the cells that nobody holds become free."""
        free = cells[(self._by_running[cells] == 0) & (self._by_remembered[cells] == 0)]
        self._free_cells[self._free_count : self._free_count + len(free)] = free[::-1]
        self._free_count += len(free)


_NOTHING: Ints = np.zeros(0, np.int32)


def common_length(a: Ints, b: Ints) -> int:
    """How many tokens two arrays of equal length share from the front."""
    different = np.flatnonzero(a != b)
    return int(different[0]) if len(different) else len(a)


def _covers(longer: _Sequence, shorter: _Sequence) -> bool:
    """Whether a prefix says nothing that the other does not say too."""
    return (
        shorter.salt == longer.salt
        and shorter.length <= longer.length
        and bool(np.array_equal(shorter.known(), longer.tokens[: shorter.length]))
    )
