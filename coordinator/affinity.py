"""Which Island served a conversation last, so that its next turn finds its prefix still computed there.

A request is known by a chain of digests, one after each message; the next turn of the same conversation contains the whole chain of the
turn before. Only digests under a key of this process are kept, never text, and at most ``CONVERSATIONS_MAX`` of them.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

CONVERSATIONS_MAX = 10_000
_DIGEST_BYTES = 16


class Affinity:
    def __init__(self, key: bytes) -> None:
        """``key``: 16 to 64 random bytes of this process."""
        self._key = key
        self._islands: OrderedDict[bytes, str] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Affinity {len(self._islands)} conversations>"

    def chain(self, salt: bytes, cargo: str, parts: Iterable[tuple[str, str]]) -> tuple[bytes, ...]:
        """Digests of all prefixes of a request, shortest first. Different salts or Cargos never share one."""
        running = hashlib.blake2b(salt + cargo.encode() + b"\0", digest_size=_DIGEST_BYTES, key=self._key)
        digests = []
        for role, text in parts:
            raw = text.encode()
            running.update(b"%s %d\0" % (role.encode(), len(raw)))
            running.update(raw)
            digests.append(running.digest())
        return tuple(digests)

    def find(self, chain: tuple[bytes, ...]) -> str:
        """The Island that served the longest known prefix, or ``""``."""
        for digest in reversed(chain):
            island = self._islands.get(digest)
            if island is not None:
                return island
        return ""

    def served(self, chain: tuple[bytes, ...], island: str) -> None:
        """``island`` has just computed the whole of this request."""
        if not chain:
            return
        self._islands[chain[-1]] = island
        self._islands.move_to_end(chain[-1])
        if len(self._islands) > CONVERSATIONS_MAX:
            self._islands.popitem(last=False)
