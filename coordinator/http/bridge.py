"""The one place where trio and asyncio meet.

Theory of operation. trio owns the process; one asyncio thread serves HTTP. A request crosses with ``TrioToken.run_sync_soon`` and starts a
task in the Coordinator's nursery; what it says crosses back with ``loop.call_soon_threadsafe``. Items of a stream wait in a list under a
lock; the reader takes the whole list, so a burst costs one wake-up. The list is bounded: the trio side waits until half of it is taken.

Rules. Cancelling the asyncio side (the client hung up) cancels the trio task. A trio task that is cancelled or fails still says so to
the other side. An exception of one request never leaves its task on either side.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar, TypeVarTuple, cast

import trio

from protocol import limits
from protocol.errors import Code, Refused

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Stopped(Refused):
    """The trio side was cancelled: the Coordinator shuts down."""

    def __init__(self) -> None:
        super().__init__(Code.CANCELLED, "the Coordinator is shutting down")


class Bridge:
    """Made on the trio side, used on the asyncio side. ``nursery`` is where the requests' tasks live."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self.tasks = 0  # trio tasks that run for requests now

    def __repr__(self) -> str:
        return f"<Bridge {self.tasks} tasks>"

    async def call(self, function: Callable[[*Ts], Awaitable[T]], *arguments: *Ts) -> T:
        """asyncio: what ``await function(*arguments)`` gives in trio. Raises what it raised; cancelling this cancels it."""
        crossing: _Crossing[T] = _Crossing(self, asyncio.get_running_loop())
        crossing.start(lambda: function(*arguments))
        return await crossing.result()

    def stream(
        self, producer: Callable[[Callable[[T], Awaitable[None]]], Awaitable[None]], weigh: Callable[[T], int] | None = None
    ) -> Stream[T]:
        """asyncio: starts ``producer(send)`` in trio; what it sends can be taken here. ``weigh``: how much of the room for
        RESPONSE_BUFFER_EVENTS_MAX items one takes, where they differ much."""
        stream: Stream[T] = Stream(self, asyncio.get_running_loop(), weigh)
        stream.start(lambda: producer(stream.send))
        return stream

    def to_trio(self, function: Callable[[], object]) -> bool:
        """Any thread: runs a function in the trio loop soon. False when that loop has ended."""
        try:
            self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            return False
        return True

    def start_task(self, task: Callable[[], Awaitable[None]]) -> None:
        """trio: into the nursery."""
        self._nursery.start_soon(task)


def _to_asyncio(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> None:
    """trio: runs a function in the asyncio loop soon. A closed loop has nobody left who waits for it."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        if not loop.is_closed():
            raise


class _Crossing(Generic[T]):
    """One task in trio and the future of its outcome in asyncio."""

    def __init__(self, bridge: Bridge, loop: asyncio.AbstractEventLoop) -> None:
        self._bridge, self._loop = bridge, loop
        self.future: asyncio.Future[T] = loop.create_future()
        self._scope: trio.CancelScope | None = None
        self._cancelled = False

    def start(self, work: Callable[[], Awaitable[T]]) -> None:
        async def task() -> None:
            self._bridge.tasks += 1
            result: Any = None
            error: BaseException | None = Stopped()
            try:
                with trio.CancelScope() as self._scope:
                    if self._cancelled:
                        self._scope.cancel()
                    try:
                        result = await work()
                        error = None
                    except Exception as raised:
                        error = raised
            finally:
                self._bridge.tasks -= 1
                self._scope = None
                _to_asyncio(self._loop, self._settle, result, error)

        if not self._bridge.to_trio(lambda: self._bridge.start_task(task)):
            self._settle(cast("T", None), Stopped())

    async def result(self) -> T:
        try:
            return await self.future
        except asyncio.CancelledError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """asyncio: stops the trio task soon, also one that has not started yet."""
        self._bridge.to_trio(self._cancel)

    def _cancel(self) -> None:
        self._cancelled = True
        if self._scope is not None:
            self._scope.cancel()

    def _settle(self, result: T, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


class Stream(Generic[T]):
    """What a trio task sends, taken in bursts on the asyncio side. Always close it: ``aclose`` ends the task."""

    def __init__(self, bridge: Bridge, loop: asyncio.AbstractEventLoop, weigh: Callable[[T], int] | None) -> None:
        self._bridge, self._loop, self._weigh = bridge, loop, weigh
        self._weight = 0
        self._crossing: _Crossing[None] = _Crossing(bridge, loop)
        self._lock = threading.Lock()
        self._items: list[T] = []
        self._signalled = False
        self._ready = asyncio.Event()
        self._room: trio.Event | None = None
        self._ended = False
        self._nudged = False

    def start(self, work: Callable[[], Awaitable[None]]) -> None:
        self._crossing.start(work)
        self._crossing.future.add_done_callback(self._end)

    async def send(self, item: T) -> None:
        """trio: waits while the reader is ``RESPONSE_BUFFER_EVENTS_MAX`` items behind."""
        weight = self._weigh(item) if self._weigh is not None else 1
        while True:
            with self._lock:
                full = self._weight >= limits.RESPONSE_BUFFER_EVENTS_MAX
                if full:
                    self._room = trio.Event()
                    room = self._room
                else:
                    self._items.append(item)
                    self._weight += weight
                    wake, self._signalled = not self._signalled, True
            if not full:
                break
            await room.wait()
        if wake:
            _to_asyncio(self._loop, self._ready.set)

    async def take(self) -> list[T]:
        """asyncio: all items that are there, at least one; an empty list after ``nudge``, or at the end. Raises what the task raised,
        once everything before it was taken."""
        while not (self._items or self._ended or self._nudged):
            await self._ready.wait()
            self._ready.clear()
        self._nudged = False
        with self._lock:
            items, self._items, self._weight = self._items, [], 0
            self._signalled = False
            room, self._room = self._room, None
        if room is not None:
            self._bridge.to_trio(room.set)
        if not items and self._ended:
            self._crossing.future.result()
        return items

    @property
    def ended(self) -> bool:
        """asyncio: the task is over and everything was taken."""
        return self._ended and not self._items

    def nudge(self) -> None:
        """asyncio: lets a waiting ``take`` return with what there is."""
        self._nudged = True
        self._ready.set()

    def close(self) -> None:
        """asyncio: nobody takes any more; the trio task is cancelled if it still runs."""
        if self._ended:
            return
        self._crossing.cancel()
        with self._lock:
            room, self._room = self._room, None
        if room is not None:
            self._bridge.to_trio(room.set)

    def _end(self, future: asyncio.Future[None]) -> None:
        self._ended = True
        if not future.cancelled():
            future.exception()  # marks it as seen: a stream that was closed early is not read to its end
        self._ready.set()
