"""Answers of the last moments, in a bridge's memory, for clients that ask again.

As the Coordinator does for its own clients (coordinator/desk.py): a request with the idempotency key of one that has succeeded, or a
client's retry of the same bytes, gets that answer again and costs nothing. A retry whose first try is still under way waits for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from coordinator.books.errors import BooksRefused, Why
from coordinator.jobs import Event
from coordinator.orders import Order
from coordinator.transcript import replay
from protocol import limits

KEPT_BYTES_MAX = 16 * 1024 * 1024


class Kept:
    """One request, and its answer once it has succeeded."""

    def __init__(self, order: Order, at_s: float) -> None:
        self.job_id, self.fingerprint, self.key = order.spec.job_id, order.fingerprint, order.idempotency_key
        self.at_s = at_s
        self.ended = trio.Event()
        self.packed = b""
        self._price_micros = 0

    def __repr__(self) -> str:
        return f"<Kept {self.job_id}, {'ended' if self.ended.is_set() else 'under way'}, {len(self.packed)} bytes>"

    def succeeded(self, packed: bytes, price_micros: int) -> None:
        self.packed, self._price_micros = packed, price_micros

    def events(self) -> list[Event]:
        return replay(self.packed, self._price_micros)


class KeptAnswers:
    """``clock`` in seconds."""

    def __init__(self, clock: Callable[[], float], window_s: float = limits.RETRY_WINDOW_S) -> None:
        self._clock, self._window_s = clock, window_s
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # by job, oldest first
        self._bytes = 0

    def __repr__(self) -> str:
        return f"<KeptAnswers {len(self._kept)}, {self._bytes} bytes>"

    async def earlier(self, order: Order) -> Kept | None:
        """The answer that this request has had before. Raises BooksRefused: the idempotency key is another request's, or in use."""
        self._forget()
        known = self._by_key(order) if order.idempotency_key else None
        if known is None and order.is_retry:
            known = next((kept for kept in reversed(self._kept.values()) if kept.fingerprint == order.fingerprint), None)
            if known is not None:
                await known.ended.wait()
        return known if known is not None and known.packed else None

    def _by_key(self, order: Order) -> Kept | None:
        known = next((kept for kept in reversed(self._kept.values()) if kept.key == order.idempotency_key), None)
        if known is None:
            return None
        if known.fingerprint != order.fingerprint:
            raise BooksRefused(Why.REUSED, "this idempotency key was used with another request")
        if not known.ended.is_set() and not order.is_retry:
            raise BooksRefused(Why.RUNNING, "a request with this idempotency key is still running")
        return known if known.ended.is_set() else None

    @contextmanager
    def making(self, order: Order) -> Iterator[Kept]:
        """While the answer is made; what has not succeeded is forgotten at once."""
        kept = self._kept[order.spec.job_id] = Kept(order, self._clock())
        try:
            yield kept
        finally:
            kept.ended.set()
            if kept.packed:
                self._bytes += len(kept.packed)
                self._forget()
            else:
                self._kept.pop(kept.job_id, None)

    def _forget(self) -> None:
        """What is too old, and the oldest where it is too much. What is under way stays."""
        for job_id, kept in list(self._kept.items()):
            if self._bytes <= KEPT_BYTES_MAX and kept.at_s > self._clock() - self._window_s:
                return
            if kept.ended.is_set():
                self._bytes -= len(kept.packed)
                del self._kept[job_id]
