"""Server-sent events as OpenAI's clients read them: ``data:`` lines, ``:`` comments as keep-alive, ``[DONE]`` at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TypeVar

from aiohttp import web

from coordinator.books.errors import BooksUnavailable
from coordinator.http.bridge import Stopped, Stream

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would otherwise hold tokens back
}


def event(data: bytes) -> bytes:
    return b"data: %b\n\n" % data


class EventStream:
    """One open answer. While nothing is written for ``keep_alive_s`` seconds, ``on_idle`` is called so that the writer may send a comment.

    Use as an async context manager after ``web.StreamResponse`` headers are known; entering sends them.
    """

    def __init__(
        self, request: web.Request, headers: Mapping[str, str], keep_alive_s: float, on_idle: Callable[[], None]
    ) -> None:
        self._request, self._keep_alive_s, self._on_idle = request, keep_alive_s, on_idle
        self.response = web.StreamResponse(headers={**HEADERS, **headers})
        self._loop = asyncio.get_running_loop()
        self._last_write_s = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> EventStream:
        await self.response.prepare(self._request)
        self._timer = self._loop.call_later(self._keep_alive_s, self._tick)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if error is None:
            await self.response.write_eof()

    async def write(self, data: bytes) -> None:
        self._last_write_s = self._loop.time()
        await self.response.write(data)

    def _tick(self) -> None:
        """The timer runs once per period, not per write, so tokens cost nothing."""
        left_s = self._last_write_s + self._keep_alive_s - self._loop.time()
        if left_s <= 0:
            self._on_idle()
            left_s = self._keep_alive_s
        self._timer = self._loop.call_later(left_s, self._tick)


async def relay(
    request: web.Request,
    events: Stream[T],
    headers: Mapping[str, str],
    keep_alive_s: float,
    encode: Callable[[Sequence[T]], bytes],
) -> web.StreamResponse:
    """An answer that tells a watcher what comes, to its end. What is watched goes on without him; where this Coordinator stops or its books
    are away, the stream ends, and whoever has not heard the end asks again."""
    response = web.StreamResponse(headers={**HEADERS, **headers})
    try:
        await response.prepare(request)
        while not events.ended:
            timer = asyncio.get_running_loop().call_later(keep_alive_s, events.nudge)
            try:
                said = await events.take()
            finally:
                timer.cancel()
            await response.write(encode(said) or (b"" if events.ended else KEEP_ALIVE))
        await response.write_eof()
    except (Stopped, BooksUnavailable):
        await response.write_eof()
    finally:
        events.close()
    return response
