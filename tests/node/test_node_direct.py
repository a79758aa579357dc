"""Jobs whose holder signs for what it gets, between two real hosts: how far an Island goes, and what it claims however the job ended."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from protocol import counts, limits
from protocol.counts import COUNT_VERSION, Count, read_count, sign_count
from protocol.errors import Code, LinkLost, Refused
from protocol.generation import FinishReason, pack_tokens
from protocol.messages import (
    JOB,
    JOB_PROTOCOL,
    PROTOCOL_VERSION,
    Hello,
    JobAccepted,
    JobCancel,
    JobChunk,
    JobCount,
    JobDone,
    JobFailed,
    JobOpen,
    NodeRole,
)
from protocol.receipts import Ending, check_receipt_of_ticket, read_receipt
from protocol.tickets import read_ticket, ticket_hash
from runtimes.base import Chunk, Finished, RunRequest
from runtimes.echo import EchoCargo, EchoRun

SENTENCE = " ".join(f"w{number}" for number in range(50))


class RawHolder:
    """Speaks the job protocol by hand, as a Consumer would who does not keep to it."""

    def __init__(self, pair: Any, stream: Any, ticket: bytes) -> None:
        self.pair, self.stream, self.ticket = pair, stream, ticket
        self.tokens = b""

    @property
    def count(self) -> int:
        return len(self.tokens) // 4

    async def take(self, tokens: int) -> None:
        """Receives until so many tokens have come."""
        with trio.fail_after(5):
            while self.count < tokens:
                message = await self.stream.receive()
                assert isinstance(message, (JobAccepted, JobChunk)), message
                if isinstance(message, JobChunk):
                    assert message.step == self.count
                    self.tokens += message.tokens

    async def next(self) -> Any:
        with trio.fail_after(5):
            return await self.stream.receive()

    def signed(self, tokens: int | None = None, **changes: Any) -> bytes:
        tokens = self.count if tokens is None else tokens
        fields: dict[str, Any] = {
            "version": COUNT_VERSION,
            "network": self.pair.network,
            "holder": self.pair.holder_key.peer_id,
            "ticket_hash": ticket_hash(self.ticket),
            "tokens": tokens,
            "output_hash": hashlib.sha256(pack_tokens(list(range(tokens)))).digest(),
        }
        return sign_count(Count(**(fields | changes)), self.pair.holder_key)

    async def sign(self, tokens: int | None = None, **changes: Any) -> bytes:
        count = self.signed(tokens, **changes)
        await self.stream.send(JobCount(1, count))
        return count


@asynccontextmanager
async def raw_holder(kit: Any, pair: Any, text: str = SENTENCE, **changes: Any) -> AsyncIterator[RawHolder]:
    ticket = pair.sealed(**({"count_every": 10} | changes))
    async with await pair.holder.open(pair.island_key.peer_id, JOB_PROTOCOL, JOB) as stream:
        await stream.send(Hello(PROTOCOL_VERSION, NodeRole.CONSUMER, pair.network, "raw"))
        assert isinstance(await stream.receive(), Hello)
        await stream.send(JobOpen(1, ticket, input=kit.prompt(text)))
        yield RawHolder(pair, stream, ticket)


async def quiet(holder: RawHolder) -> None:
    """Nothing comes for a while: the one place where time has to pass, since nothing is what is waited for."""
    with trio.move_on_after(0.15) as scope:
        message = await holder.stream.receive()
        raise AssertionError(f"{message!r} came")
    assert scope.cancelled_caught


@pytest.mark.parametrize("every", [1, 2, 7, 32, 4096])
async def test_an_honest_holder_gets_its_answer_and_signs_for_all(kit: Any, every: int) -> None:
    async with kit.open_pair() as pair:
        ticket = pair.sealed(count_every=every)
        async with pair.links.run_job(pair.island_key.peer_id, ticket, kit.prompt(SENTENCE)) as job:
            events = await kit.collect(job)
        assert "".join(e.text for e in events if isinstance(e, JobChunk)) == SENTENCE
        done = events[-1]
        assert isinstance(done, JobDone) and job.receipt == done.receipt
        claim = await pair.claims.wait_final(ticket)
        assert claim.receipt == done.receipt and claim.count == job.count
        assert read_count(claim.count).tokens == read_receipt(claim.receipt).sent_tokens == 50
        assert read_count(claim.count).output_hash == read_receipt(claim.receipt).output_hash
        check_receipt_of_ticket(read_receipt(claim.receipt), read_ticket(ticket))
        assert len(pair.claims.said) == 1 and pair.server.counts.running == 0


async def test_a_coordinator_signs_nothing_and_is_claimed_nothing_from(kit: Any) -> None:
    async with kit.open_pair() as pair:
        async with pair.links.run_job(pair.island_key.peer_id, pair.sealed(), kit.prompt("a b c")) as job:
            await kit.collect(job)
        assert job.count == b"" and not pair.claims.said


@pytest.mark.parametrize("every", [1, 3, 10])
async def test_an_island_stops_exactly_at_so_many_unsigned(kit: Any, every: int) -> None:
    async with kit.open_pair() as pair, raw_holder(kit, pair, count_every=every) as holder:
        await holder.take(every)
        await quiet(holder)
        assert holder.count == every
        await holder.sign()
        await holder.take(2 * every)
        await quiet(holder)
        assert holder.count == 2 * every


async def test_what_is_signed_late_lets_the_answer_go_on(kit: Any) -> None:
    """Also by a count that is not of all that came."""
    async with kit.open_pair() as pair, raw_holder(kit, pair) as holder:
        await holder.take(10)
        await holder.sign(4)
        await holder.take(14)
        await quiet(holder)
        while holder.count < 50:
            await holder.sign()
            await holder.take(min(50, holder.count + 10))
        done = await holder.next()
        assert isinstance(done, JobDone)
        last = await holder.sign()
        assert (await pair.claims.wait_final(holder.ticket)).count == last


class _Bulk(EchoRun):
    """All tokens in one chunk, with a text and log-probabilities."""

    async def __aiter__(self) -> AsyncIterator[Chunk | Finished]:
        yield Chunk(pack_tokens(list(range(25))), "the whole answer", b"[]")
        yield Finished(FinishReason.STOP, self.prompt_tokens, 25, 0)


class _BulkCargo(EchoCargo):
    @asynccontextmanager
    async def run(self, request: RunRequest) -> AsyncIterator[EchoRun]:
        async with super().run(request):
            yield _Bulk(request.generation, 0.0)


async def test_a_chunk_that_is_larger_than_what_may_leave_is_cut(kit: Any) -> None:
    async with kit.open_pair(_BulkCargo()) as pair:
        ticket = pair.sealed(count_every=10)
        async with pair.links.run_job(pair.island_key.peer_id, ticket, kit.prompt("x")) as job:
            chunks = [event for event in await kit.collect(job) if isinstance(event, JobChunk)]
        assert b"".join(chunk.tokens for chunk in chunks) == pack_tokens(list(range(25)))
        assert len(chunks) == 3 and [(chunk.text, chunk.logprobs) for chunk in chunks[:2]] == [("", b"")] * 2
        assert (chunks[2].text, chunks[2].logprobs) == ("the whole answer", b"[]"), "text does not run ahead of its tokens"


async def test_a_holder_that_never_signs_is_stopped(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COUNT_WAIT_S", 0.1)
    async with kit.open_pair() as pair, raw_holder(kit, pair) as holder:
        await holder.take(10)
        failed = await holder.next()
        assert isinstance(failed, JobFailed) and failed.code is Code.UNSIGNED
        assert not Refused(failed.code, "").retryable
        assert pair.cargo.facts().slots_free == pair.cargo.facts().slots_total, "the engine's run is over"
        claim = await pair.claims.wait_final(holder.ticket)
        receipt = read_receipt(claim.receipt)
        assert claim.count == b"" and (receipt.sent_tokens, receipt.finish_reason) == (10, Ending.CUT)
        assert receipt.compute_ms < 100, "the time that it waited is not the job's"


async def test_a_consumer_that_vanishes_owes_what_it_has_signed(kit: Any) -> None:
    async with kit.open_pair() as pair:
        async with raw_holder(kit, pair) as holder:
            await holder.take(10)
            signed = await holder.sign()
            await holder.take(20)
            await pair.holder.disconnect(pair.island_key.peer_id)
        claim = await pair.claims.wait_final(holder.ticket)
        receipt = read_receipt(claim.receipt)
        assert claim.count == signed and read_count(claim.count).tokens == 10
        assert (receipt.sent_tokens, receipt.finish_reason) == (20, Ending.CUT)
        assert receipt.output_hash == hashlib.sha256(pack_tokens(list(range(20)))).digest()
        with trio.fail_after(2):
            await pair.server.wait_idle()


async def test_a_cancel_is_signed_for_up_to_what_had_come(kit: Any) -> None:
    async with kit.open_pair(EchoCargo(delay_s=0.001)) as pair:
        ticket = pair.sealed(count_every=1000)
        async with pair.links.run_job(pair.island_key.peer_id, ticket, kit.prompt("word " * 1000)) as job:
            seen = 0
            async for event in job:
                seen += isinstance(event, JobChunk)
                if seen == 5:
                    break
        claim = await pair.claims.wait_final(ticket)
        assert claim.count == job.count and read_count(claim.count).tokens >= 5
        assert read_receipt(claim.receipt).finish_reason is Ending.CUT


async def test_a_holder_that_does_not_sign_the_end(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claim is open until the count has had its time, and holds the last one then; the slot is free all the while."""
    monkeypatch.setattr(limits, "COUNT_FINAL_S", 0.1)
    async with kit.open_pair() as pair, raw_holder(kit, pair, "a b c d e f g h i j k l") as holder:
        await holder.take(10)
        signed = await holder.sign()
        await holder.take(12)
        assert isinstance(await holder.next(), JobDone)
        assert pair.server.counts.running == 0
        assert holder.ticket in pair.claims.said and holder.ticket not in pair.claims.final
        claim = await pair.claims.wait_final(holder.ticket)
        assert claim.count == signed and read_receipt(claim.receipt).sent_tokens == 12


async def test_an_empty_answer_is_signed_for_too(kit: Any) -> None:
    async with kit.open_pair() as pair:
        ticket = pair.sealed(count_every=10)
        payload = kit.prompt("a b", resume=pack_tokens([0, 1]), max_tokens=2)
        async with pair.links.run_job(pair.island_key.peer_id, ticket, payload) as job:
            assert isinstance((await kit.collect(job))[-1], JobDone)
        claim = await pair.claims.wait_final(ticket)
        assert read_count(claim.count).tokens == 0 and read_receipt(claim.receipt).sent_tokens == 0


async def test_a_ticket_allows_tokens_that_are_still_to_come(kit: Any) -> None:
    async with kit.open_pair() as pair:
        payload = kit.prompt("a b c d", resume=pack_tokens([0, 1]), max_tokens=6)
        async with pair.links.run_job(pair.island_key.peer_id, pair.sealed(count_every=10, token_limit=4), payload) as job:
            assert isinstance((await kit.collect(job))[-1], JobDone)
        with pytest.raises(Refused, match="allows 3 tokens, not 4"):
            async with pair.links.run_job(pair.island_key.peer_id, pair.sealed(count_every=10, token_limit=3), payload) as job:
                await kit.collect(job)


async def test_a_refused_job_is_not_claimed(kit: Any) -> None:
    async with kit.open_pair() as pair:
        ticket = pair.sealed(count_every=10, token_limit=5)
        with pytest.raises(Refused):
            async with pair.links.run_job(pair.island_key.peer_id, ticket, kit.prompt("x")) as job:
                await kit.collect(job)
        assert not pair.claims.said


LIES: dict[str, dict[str, Any]] = {
    "many more than came": {"tokens": 20},
    "one more than came": {"tokens": 11},
    "other tokens": {"output_hash": b"\x01" * 32},
    "another job": {"ticket_hash": bytes(32)},
    "another network": {"network": "0" * 32},
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_holder_that_lies_loses_its_stream(kit: Any, lie: str) -> None:
    async with kit.open_pair() as pair, raw_holder(kit, pair) as holder:
        await holder.take(10)
        await holder.sign(**LIES[lie])
        with pytest.raises(LinkLost):
            await holder.next()
        claim = await pair.claims.wait_final(holder.ticket)
        assert claim.count == b"" and read_receipt(claim.receipt).sent_tokens == 10


@pytest.mark.parametrize("what", ["replayed", "decreasing"])
async def test_an_old_count_said_again_is_a_breach(kit: Any, what: str) -> None:
    async with kit.open_pair() as pair, raw_holder(kit, pair, SENTENCE, count_every=20) as holder:
        await holder.take(20)
        older = holder.signed(10)
        newest = await holder.sign()
        await holder.take(40)
        await holder.stream.send(JobCount(1, newest if what == "replayed" else older))
        with pytest.raises(LinkLost):
            await holder.next()
        assert (await pair.claims.wait_final(holder.ticket)).count == newest, "the larger one is kept"


async def test_a_count_signed_by_a_stranger_is_a_breach(kit: Any) -> None:
    async with kit.open_pair() as pair, raw_holder(kit, pair) as holder:
        await holder.take(10)
        stranger = pair.island_key
        forged = sign_count(counts.read_count(holder.signed()), stranger)
        await holder.stream.send(JobCount(1, forged))
        with pytest.raises(LinkLost):
            await holder.next()


async def test_a_count_where_the_ticket_wants_none_is_a_breach(kit: Any) -> None:
    async with kit.open_pair(EchoCargo(delay_s=0.01)) as pair, raw_holder(kit, pair, count_every=0) as holder:
        await holder.take(1)
        await holder.sign(1)
        with pytest.raises(LinkLost):
            while True:
                await holder.next()


async def test_counts_may_come_when_the_job_is_over(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crossing a failure, a cancel, or the end of the wait for the last one: they do nothing, and break nothing."""
    monkeypatch.setattr(limits, "COUNT_FINAL_S", 0.0)
    async with kit.open_pair() as pair, raw_holder(kit, pair, "a b c") as holder:
        await holder.take(3)
        assert isinstance(await holder.next(), JobDone)
        await pair.claims.wait_final(holder.ticket)
        await holder.sign()
        await holder.stream.send(JobCancel(1))
        await holder.stream.send(JobOpen(2, pair.sealed(count_every=10), input=kit.prompt("still here")))
        assert isinstance(await holder.next(), JobAccepted), "the stream lives on"


async def test_a_hundred_signed_jobs_on_one_stream(kit: Any) -> None:
    async with kit.open_pair(EchoCargo(delay_s=0.0)) as pair:
        answers: list[str] = []

        async def one(number: int) -> None:
            ticket = pair.sealed(count_every=8)
            async with pair.links.run_job(pair.island_key.peer_id, ticket, kit.prompt(f"{number} " + SENTENCE)) as job:
                answers.append("".join([e.text async for e in job if isinstance(e, JobChunk)]))

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(one, number)
        assert sorted(answers) == sorted(f"{number} " + SENTENCE for number in range(100))
        for ticket, said in pair.claims.said.items():
            await pair.claims.wait_final(ticket)
            assert read_count(said[-1].count).tokens == 51
        assert len(pair.claims.said) == 100 and pair.links.opened_total == 1
