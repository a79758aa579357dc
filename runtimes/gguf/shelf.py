"""Prefixes outside the KV cells: what finished sequences computed, as bytes in plain memory, for the next turn of a conversation.

Putting 1,000 tokens of SmolLM2-135M (23 MB) back into cells takes 2 ms, computing them anew 6 s on one thread. Least recently used go
first. A prefix serves only the salt (the account) under which it was computed; it is never written to disk.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtimes.gguf.kv import Ints, common_length

State = npt.NDArray[np.uint8]
TOKENS_MIN = 32  # fewer are computed about as fast as they are put back


@dataclass(frozen=True, slots=True, eq=False)
class Shelved:
    """``state``: what the layers gave for all of ``tokens``."""

    salt: bytes
    tokens: Ints
    state: State


@dataclass(frozen=True, slots=True)
class ShelfStatistics:
    entries: int
    bytes: int
    put_total: int
    found_total: int


class Shelf:
    """At most ``bytes_max`` bytes of states; 0 keeps nothing."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._entries: OrderedDict[int, Shelved] = OrderedDict()  # least recently used first
        self._number = 0
        self._bytes = 0
        self._put = self._found = 0

    def __repr__(self) -> str:
        return f"<Shelf {len(self._entries)} prefixes, {self._bytes}/{self.bytes_max} bytes>"

    def statistics(self) -> ShelfStatistics:
        return ShelfStatistics(len(self._entries), self._bytes, self._put, self._found)

    def wants(self, salt: bytes, tokens: Ints) -> bool:
        """Whether it is worth taking the state of these tokens out of the cells."""
        if not (self.bytes_max and salt and len(tokens) >= TOKENS_MIN):
            return False
        return not any(_begins(entry, salt, tokens) for entry in self._entries.values())

    def put(self, salt: bytes, tokens: Ints, state: State) -> None:
        """Keeps it if it fits; prefixes that it contains are dropped."""
        for number in [n for n, entry in self._entries.items() if entry.salt == salt and _is_prefix(entry.tokens, tokens)]:
            self._drop(number)
        if len(state) > self.bytes_max:
            return
        while self._bytes + len(state) > self.bytes_max:
            self._drop(next(iter(self._entries)))
        self._number += 1
        self._entries[self._number] = Shelved(salt, tokens, state)
        self._bytes += len(state)
        self._put += 1

    def find(self, salt: bytes, tokens: Ints) -> tuple[Shelved, int] | None:
        """The entry that shares the longest beginning with these tokens, and its length. It stays, and counts as used by ``taken``."""
        best: Shelved | None = None
        longest = TOKENS_MIN - 1
        for entry in self._entries.values():
            length = min(len(entry.tokens), len(tokens))
            if entry.salt != salt or length <= longest:
                continue
            common = common_length(entry.tokens[:length], tokens[:length])
            if common > longest:
                best, longest = entry, common
        return None if best is None else (best, longest)

    def taken(self, entry: Shelved) -> None:
        """It is put back into cells. It may have been pushed out since it was found; whoever holds it can use it all the same."""
        for number, other in self._entries.items():
            if other is entry:
                self._entries.move_to_end(number)
                break
        self._found += 1

    def _drop(self, number: int) -> None:
        self._bytes -= len(self._entries.pop(number).state)


def _is_prefix(shorter: Ints, longer: Ints) -> bool:
    return len(shorter) <= len(longer) and bool(np.array_equal(shorter, longer[: len(shorter)]))


def _begins(entry: Shelved, salt: bytes, tokens: Ints) -> bool:
    return entry.salt == salt and _is_prefix(tokens, entry.tokens)
