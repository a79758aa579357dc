"""The bridge between trio and asyncio: values, errors and cancellation cross both ways; neither side can hurt the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from coordinator.http.bridge import Bridge, Stopped
from protocol import limits

Work = Callable[[Bridge], Awaitable[Any]]
Send = Callable[[int], Awaitable[None]]


@asynccontextmanager
async def bridge() -> AsyncIterator[Bridge]:
    async with trio.open_nursery() as nursery:
        yield Bridge(nursery)
        nursery.cancel_scope.cancel()


async def in_asyncio(made: Bridge, work: Work) -> Any:
    """Runs ``work`` in an asyncio loop of its own thread."""

    async def main() -> Any:
        return await asyncio.wait_for(work(made), 10)

    return await trio.to_thread.run_sync(lambda: asyncio.run(main()))


async def test_values_and_errors_cross() -> None:
    async def double(number: int) -> int:
        await trio.lowlevel.checkpoint()
        if number < 0:
            raise ValueError("negative")
        return 2 * number

    async def work(b: Bridge) -> list[int]:
        with pytest.raises(ValueError, match="negative"):
            await b.call(double, -1)
        return list(await asyncio.gather(*(b.call(double, number) for number in range(100))))

    async with bridge() as made:
        assert await in_asyncio(made, work) == [2 * number for number in range(100)]
        assert made.tasks == 0


async def test_cancelling_in_asyncio_cancels_in_trio() -> None:
    cancelled = trio.Event()

    async def forever() -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async def work(b: Bridge) -> None:
        task = asyncio.ensure_future(b.call(forever))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async with bridge() as made:
        await in_asyncio(made, work)
        with trio.fail_after(1):
            await cancelled.wait()


async def test_a_call_that_is_cancelled_before_it_starts_does_nothing() -> None:
    started: list[int] = []

    async def start() -> None:
        await trio.lowlevel.checkpoint()
        started.append(1)

    async def work(b: Bridge) -> None:
        task = asyncio.ensure_future(b.call(start))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async with bridge() as made:
        thread = trio.Event()

        async def run() -> None:
            await in_asyncio(made, work)
            thread.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await thread.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert made.tasks == 0 and started in ([], [1])


async def test_the_end_of_trio_is_told() -> None:
    async def work(b: Bridge) -> None:
        with pytest.raises(Stopped):
            await b.call(trio.sleep_forever)

    async with trio.open_nursery() as outer, trio.open_nursery() as inner:
        made = Bridge(inner)
        outer.start_soon(in_asyncio, made, work)
        while not made.tasks:
            await trio.sleep(0.005)
        inner.cancel_scope.cancel()


async def test_a_stream_keeps_its_order_and_comes_in_bursts() -> None:
    count = 5000

    async def produce(send: Send) -> None:
        for number in range(count):
            await send(number)

    async def work(b: Bridge) -> tuple[list[int], int]:
        found: list[int] = []
        bursts = 0
        stream = b.stream(produce)
        while items := await stream.take():
            found += items
            bursts += 1
            await asyncio.sleep(0)
        return found, bursts

    async with bridge() as made:
        found, bursts = await in_asyncio(made, work)
    assert found == list(range(count)) and bursts < count / 2


async def test_a_slow_reader_holds_the_sender_back() -> None:
    sent: list[int] = []

    async def produce(send: Send) -> None:
        for number in range(10 * limits.RESPONSE_BUFFER_EVENTS_MAX):
            await send(number)
            sent.append(number)

    async def work(b: Bridge) -> tuple[int, int]:
        stream = b.stream(produce)
        await asyncio.sleep(0.2)
        held = len(sent)
        total = 0
        while items := await stream.take():
            total += len(items)
        return held, total

    async with bridge() as made:
        held, total = await in_asyncio(made, work)
    assert held == limits.RESPONSE_BUFFER_EVENTS_MAX and total == 10 * limits.RESPONSE_BUFFER_EVENTS_MAX


async def test_an_error_comes_behind_everything_that_was_sent() -> None:
    async def produce(send: Send) -> None:
        await send(1)
        await send(2)
        raise KeyError("end")

    async def work(b: Bridge) -> list[int]:
        stream, found = b.stream(produce), []
        with pytest.raises(KeyError):
            while True:
                found += await stream.take()
        return found

    async with bridge() as made:
        assert await in_asyncio(made, work) == [1, 2]


@pytest.mark.parametrize("full", [False, True])
async def test_closing_a_stream_cancels_its_producer(full: bool) -> None:
    ended = trio.Event()

    async def produce(send: Send) -> None:
        try:
            while full:
                await send(0)
            await trio.sleep_forever()
        finally:
            ended.set()

    async def work(b: Bridge) -> None:
        stream = b.stream(produce)
        await asyncio.sleep(0.05)
        stream.close()

    async with bridge() as made:
        await in_asyncio(made, work)
        with trio.fail_after(1):
            await ended.wait()


async def test_a_nudge_wakes_a_reader_without_items() -> None:
    async def produce(send: Send) -> None:
        await trio.sleep_forever()

    async def work(b: Bridge) -> list[int]:
        stream = b.stream(produce)
        asyncio.get_running_loop().call_later(0.01, stream.nudge)
        items = await stream.take()
        stream.close()
        return items

    async with bridge() as made:
        assert await in_asyncio(made, work) == []
