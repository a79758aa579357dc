"""Jobs of lines between two real hosts: each line once, whole and counted; a holder who does not read; and what must be refused."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing

from node.greeting import exchange_hello
from node.jobs_served import island_hello
from protocol import limits
from protocol.cargo_io import DoneLine, ImageLine, Line, ProgressLine, StatusLine, TokenLine, Usage, encode_line
from protocol.cargo_jobs import CargoInput
from protocol.errors import Code, LinkLost, Refused
from protocol.messages import JOB, JOB_PROTOCOL, JobAccepted, JobDone, JobFailed, JobLines, JobMore, JobOpen
from protocol.receipts import read_receipt
from runtimes.base import CargoFacts, LineRequest
from runtimes.echo import EchoCargo

INPUT = CargoInput(b'{"text":"one"}', b"0123456789abcdef")
LARGE = ImageLine("QUFB" * 8192, "png", 2, 3)  # 32 KiB


class LineTeller:
    """Implements runtimes.base.LineCargo: says ``lines``, the more as they are read; raises ``failure`` behind them."""

    def __init__(self, *lines: Line, failure: Refused | None = None, admits: Refused | None = None) -> None:
        self._lines, self._failure, self._admits = lines, failure, admits
        self.requests: list[LineRequest] = []
        self.told = 0
        self.left = trio.Event()

    def facts(self) -> CargoFacts:
        return replace(EchoCargo().facts(), runtime="wasm", engine="teller/1")

    @asynccontextmanager
    async def run_lines(self, request: LineRequest) -> AsyncIterator[AsyncIterator[Line]]:
        if self._admits is not None:
            raise self._admits
        self.requests.append(request)
        try:
            yield self._tell()
        finally:
            self.left.set()

    async def _tell(self) -> AsyncIterator[Line]:
        for line in self._lines:
            await trio.lowlevel.checkpoint()
            self.told += 1
            yield line
        if self._failure is not None:
            raise self._failure

    async def wait_changed(self) -> None:
        await trio.sleep_forever()

    @property
    def alive(self) -> bool:
        return True

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_lines_come_as_they_are_and_are_counted(kit: Any) -> None:
    lines = (StatusLine("working"), ProgressLine(1, 2), TokenLine("a"), TokenLine("b"), DoneLine(Usage(5, 2), 7, '{"n":1}'))
    teller = LineTeller(*lines)
    async with kit.open_pair(teller) as pair:
        async with pair.links.run_job(pair.island_key.peer_id, pair.sealed(), INPUT) as job:
            accepted, *told, done = await kit.collect(job)
        assert accepted == JobAccepted(1, "teller/1", 0, 0)
        data = b"".join(bytes(one.lines) for one in told)
        assert data == b"".join(encode_line(line) for line in lines)
        assert [one.step for one in told] == [sum(len(each.lines) for each in told[:at]) for at in range(len(told))]
        assert [one.tokens for one in told] == [0, 0, 1, 1, 0]
        assert isinstance(done, JobDone) and (done.prompt_tokens, done.completion_tokens) == (5, 2)
        receipt = read_receipt(done.receipt)
        assert (receipt.sent_tokens, receipt.output_hash) == (2, hashlib.sha256(data).digest())
        (request,) = teller.requests
        assert (request.input, request.seed) == (INPUT.data, INPUT.seed)
        assert pair.server.counts.done == 1 and pair.server.counts.running == 0


async def test_a_holder_who_does_not_read_holds_the_cargo_up(kit: Any) -> None:
    teller = LineTeller(*[LARGE] * 100, DoneLine())
    room = limits.JOB_LINES_ROOM_BYTES // len(encode_line(LARGE)) + 1
    async with kit.open_pair(teller) as pair:
        async with pair.links.run_job(pair.island_key.peer_id, pair.sealed(), INPUT) as job:
            events = aiter(job)
            assert isinstance(await anext(events), JobAccepted)
            while teller.told < room + 1:  # one more waits to be sent
                await trio.sleep(0.01)
            await trio.sleep(0.1)
            assert teller.told == room + 1
            rest = [event async for event in events]
        assert len(rest) == 102 and isinstance(rest[-1], JobDone)
        compute_ms = read_receipt(rest[-1].receipt).compute_ms
        assert compute_ms < 100, "the time in which nobody read is not counted"


async def test_leaving_ends_a_cargo_that_waits_for_its_reader(kit: Any) -> None:
    teller = LineTeller(*[LARGE] * 100, DoneLine())
    async with kit.open_pair(teller) as pair:
        async with pair.links.run_job(pair.island_key.peer_id, pair.sealed(), INPUT) as job:
            await anext(aiter(job))
        with trio.fail_after(5):
            await teller.left.wait()
            await pair.server.wait_idle()
        assert pair.server.counts.cancelled == 1


@pytest.mark.parametrize("code", [Code.CARGO_FAILED, Code.BAD_INPUT, Code.WORKER_DIED])
@pytest.mark.parametrize("begun", [False, True])
async def test_a_failure_travels_with_its_words(kit: Any, code: Code, begun: bool) -> None:
    why = Refused(code, "as the Cargo says")
    teller = LineTeller(TokenLine("a"), failure=why) if begun else LineTeller(admits=why)
    async with kit.open_pair(teller) as pair:
        with pytest.raises(Refused, match="as the Cargo says") as refused:
            async with pair.links.run_job(pair.island_key.peer_id, pair.sealed(), INPUT) as job:
                await kit.collect(job)
        assert refused.value.code is code
        assert (pair.server.counts.failed, pair.server.counts.refused) == ((1, 0) if begun else (0, 1))


async def test_texts_and_lines_are_not_mixed_up(kit: Any) -> None:
    async with kit.open_pair(LineTeller(DoneLine())) as pair:
        with pytest.raises(Refused, match="takes one JSON object") as refused:
            async with pair.links.run_job(pair.island_key.peer_id, pair.sealed(), kit.prompt("x")) as job:
                await kit.collect(job)
        assert refused.value.code is Code.BAD_INPUT
    async with kit.open_pair(EchoCargo()) as pair:
        with pytest.raises(Refused, match="takes messages or a prompt") as refused:
            async with pair.links.run_job(pair.island_key.peer_id, pair.sealed(), INPUT) as job:
                await kit.collect(job)
        assert refused.value.code is Code.BAD_INPUT


async def test_a_ticket_that_wants_counts_is_for_texts(kit: Any) -> None:
    async with kit.open_pair(LineTeller(DoneLine())) as pair:
        with pytest.raises(Refused, match="come through a Coordinator"):
            async with pair.links.run_job(pair.island_key.peer_id, pair.sealed(count_every=8), INPUT) as job:
                await kit.collect(job)


async def test_a_revoked_cargo_ends_its_jobs(kit: Any) -> None:
    teller = LineTeller(*[LARGE] * 100, DoneLine())
    async with kit.open_pair(teller) as pair:
        ticket = pair.sealed()
        with pytest.raises(Refused, match="was revoked") as refused:
            async with pair.links.run_job(pair.island_key.peer_id, ticket, INPUT) as job:
                events = aiter(job)
                await anext(events)
                why = Refused(Code.CARGO_FAILED, "it was revoked")
                assert pair.server.end_all_of("cd" * 32, why) == 0, "another one's"
                assert pair.server.end_all_of(teller.facts().content_hash, why) == 1
                async for _ in events:
                    pass
        assert refused.value.code is Code.CARGO_FAILED


async def test_the_jobs_of_a_cargo_are_waited_for(kit: Any) -> None:
    """As an Island does with a Cargo that was replaced."""
    teller = LineTeller(*[LARGE] * 100, DoneLine())
    async with kit.open_pair(teller) as pair, trio.open_nursery() as nursery:
        ended = trio.Event()

        async def wait() -> None:
            await pair.server.wait_ended_of(teller.facts().content_hash)
            ended.set()

        async with pair.links.run_job(pair.island_key.peer_id, pair.sealed(), INPUT) as job:
            events = aiter(job)
            await anext(events)
            nursery.start_soon(wait)
            with trio.fail_after(5):
                await pair.server.wait_ended_of("cd" * 32)  # another one's: there is nothing to wait for
            await trio.testing.wait_all_tasks_blocked()
            assert not ended.is_set()
            async for _ in events:
                pass
        with trio.fail_after(5):
            await ended.wait()


async def test_a_holder_that_takes_more_than_there_was_loses_the_stream(kit: Any) -> None:
    async with kit.open_pair(LineTeller(*[LARGE] * 100, DoneLine())) as pair:
        stream = await pair.holder.open(pair.island_key.peer_id, JOB_PROTOCOL, JOB)

        await exchange_hello(stream, island_hello(pair.network, "holder"))
        await stream.send(JobOpen(1, pair.sealed(), INPUT.seed, INPUT.data))
        assert isinstance(await stream.receive(), JobAccepted) and isinstance(await stream.receive(), JobLines)
        await stream.send(JobMore(1, limits.CARGO_OUTPUT_BYTES_MAX))
        with pytest.raises(LinkLost):
            while True:
                assert not isinstance(await stream.receive(), JobDone | JobFailed)
