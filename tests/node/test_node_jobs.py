"""Jobs between two real hosts: the answer, the receipt, and everything that must be refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from privacy.keys import NodeKey
from protocol.errors import Code, LinkLost, Refused
from protocol.generation import FinishReason, pack_tokens, unpack_tokens
from protocol.messages import (
    JOB,
    JOB_PROTOCOL,
    PROTOCOL_VERSION,
    Hello,
    JobAccepted,
    JobCancel,
    JobChunk,
    JobDone,
    JobFailed,
    JobOpen,
    NodeRole,
)
from protocol.receipts import read_receipt
from protocol.tickets import sign_ticket
from runtimes.base import CargoFacts, RunRequest
from runtimes.echo import EchoCargo, EchoRun


async def test_an_answer_and_its_receipt(kit: Any) -> None:
    async with kit.open_pair() as pair:
        async with pair.links.run_job(pair.island_key.peer_id, pair.sealed(), kit.prompt("one two three")) as job:
            accepted, *chunks, done = await kit.collect(job)
        assert isinstance(accepted, JobAccepted) and accepted.prompt_tokens == 3
        sent = [(chunk.step, chunk.text, unpack_tokens(chunk.tokens)) for chunk in chunks]
        assert sent == [(0, "one ", [0]), (1, "two ", [1]), (2, "three", [2])]
        assert isinstance(done, JobDone) and done.finish_reason is FinishReason.STOP and done.completion_tokens == 3
        receipt = read_receipt(done.receipt)
        assert (receipt.sent_tokens, receipt.price_micros, receipt.island) == (3, 7, pair.island_key.peer_id)


async def test_jobs_share_one_stream(kit: Any) -> None:
    answers: list[str] = []
    async with kit.open_pair(EchoCargo(delay_s=0.001)) as pair:

        async def one(text: str) -> None:
            async with pair.links.run_job(pair.island_key.peer_id, pair.sealed(), kit.prompt(text)) as job:
                answers.append("".join([e.text async for e in job if isinstance(e, JobChunk)]))

        async with trio.open_nursery() as nursery:
            for i in range(50):
                nursery.start_soon(one, f"answer {i} of fifty")
        assert sorted(answers) == sorted(f"answer {i} of fifty" for i in range(50))
        assert pair.links.opened_total == 1, "fifty jobs, one stream, one negotiation"
        assert pair.server.counts.done == 50 and pair.server.counts.running == 0


async def test_a_resumed_answer_goes_on_where_it_stopped(kit: Any) -> None:
    async with kit.open_pair() as pair:
        payload = kit.prompt("a b c d", resume=pack_tokens([0, 1]))
        async with pair.links.run_job(pair.island_key.peer_id, pair.sealed(), payload) as job:
            events = await kit.collect(job)
        assert "".join(e.text for e in events if isinstance(e, JobChunk)) == "c d"
        assert events[-1].completion_tokens == 4
        assert read_receipt(events[-1].receipt).sent_tokens == 2, "only what this Island sent is paid"
        assert pair.server.counts.resumed_tokens == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expires_at_ms": 2_000, "issued_at_ms": 1_000}, "expired"),
        ({"boots": (1,)}, "earlier run"),
        ({"network": "0" * 32}, "another network"),
        ({"route": (NodeKey(b"x" * 32).peer_id,)}, "another Island"),
    ],
)
async def test_a_bad_ticket_opens_nothing(kit: Any, changes: dict[str, Any], words: str) -> None:
    async with kit.open_pair() as pair:
        with pytest.raises(Refused, match=words) as caught:
            await _run(kit, pair, pair.sealed(**changes))
        assert caught.value.code is Code.BAD_TICKET
        assert pair.server.counts.started == 0 and pair.guard.refused == 1
        await _run(kit, pair, pair.sealed())
        assert pair.links.opened_total == 1, "the stream stays usable"


async def test_a_ticket_is_used_once(kit: Any) -> None:
    async with kit.open_pair() as pair:
        ticket = pair.sealed()
        await _run(kit, pair, ticket)
        with pytest.raises(Refused, match="used before"):
            await _run(kit, pair, ticket)


async def test_a_ticket_of_somebody_who_is_no_coordinator(kit: Any) -> None:
    async with kit.open_pair() as pair:
        stranger = NodeKey(b"x" * 32)
        forged = sign_ticket(pair.ticket(issuer=stranger.peer_id, count_every=8), stranger)
        with pytest.raises(Refused, match="no Coordinator"):
            await _run(kit, pair, forged)


async def test_more_tokens_than_the_ticket_allows(kit: Any) -> None:
    async with kit.open_pair() as pair:
        with pytest.raises(Refused, match="allows 10 tokens"):
            await _run(kit, pair, pair.sealed(token_limit=10))


async def test_input_that_is_no_generation_request(kit: Any) -> None:
    async with kit.open_pair() as pair:
        with pytest.raises(Refused) as caught:
            async with pair.links.run_job(pair.island_key.peer_id, pair.sealed(), b"\xc1 nonsense") as job:
                await kit.collect(job)
        assert caught.value.code is Code.BAD_INPUT


async def test_leaving_a_job_frees_its_slot(kit: Any) -> None:
    async with kit.open_pair(EchoCargo(delay_s=0.01)) as pair:
        async with pair.links.run_job(pair.island_key.peer_id, pair.sealed(), kit.prompt("word " * 1000)) as job:
            async for event in job:
                if isinstance(event, JobChunk):
                    break
            assert pair.cargo.facts().slots_free == pair.cargo.facts().slots_total - 1
        with trio.fail_after(1):
            await pair.server.wait_idle()
        assert pair.server.counts.cancelled == 1
        assert pair.cargo.facts().slots_free == pair.cargo.facts().slots_total


async def test_a_lost_connection_ends_the_job_on_both_sides(kit: Any) -> None:
    async with kit.open_pair(EchoCargo(delay_s=0.01)) as pair:
        with pytest.raises(Refused) as caught:
            async with pair.links.run_job(pair.island_key.peer_id, pair.sealed(), kit.prompt("word " * 1000)) as job:
                async for event in job:
                    if isinstance(event, JobChunk):
                        await pair.island.disconnect(pair.holder_key.peer_id)
        assert caught.value.code is Code.LINK_LOST
        with trio.fail_after(2):
            await pair.server.wait_idle()
        assert pair.cargo.facts().slots_free == pair.cargo.facts().slots_total


async def test_a_draining_island_refuses_new_jobs_and_finishes_old_ones(kit: Any) -> None:
    async with kit.open_pair(EchoCargo(delay_s=0.01)) as pair:
        async with pair.links.run_job(pair.island_key.peer_id, pair.sealed(), kit.prompt("a b c d e f")) as job:
            events = []
            async for event in job:
                pair.server.draining = True
                events.append(event)
        assert isinstance(events[-1], JobDone)
        with pytest.raises(Refused) as caught:
            await _run(kit, pair, pair.sealed())
        assert caught.value.code is Code.DRAINING and caught.value.retryable


class _Broken(EchoCargo):
    """A runtime with a bug."""

    @asynccontextmanager
    async def run(self, request: RunRequest) -> AsyncIterator[EchoRun]:
        raise ZeroDivisionError(request.generation.prompt)
        yield EchoRun(request.generation, 0)

    def facts(self) -> CargoFacts:
        return super().facts()


async def test_a_bug_in_one_job_ends_that_job_only(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with kit.open_pair(_Broken()) as pair:
        for _ in range(2):
            with pytest.raises(Refused) as caught:
                await _run(kit, pair, pair.sealed(), "secret words")
            assert caught.value.code is Code.INTERNAL
        assert pair.links.opened_total == 1
    assert "secret" not in "\n".join(record.getMessage() for record in caplog.records), "a prompt never reaches the log"


async def test_a_ticket_that_belongs_to_another_peer(kit: Any) -> None:
    async with kit.open_pair() as pair:
        stream = await _raw_stream(pair)
        await stream.send(JobOpen(1, pair.sealed(holder=NodeKey(b"x" * 32).peer_id, count_every=8), input=kit.prompt("x")))
        answer = await stream.receive()
        assert isinstance(answer, JobFailed) and answer.code is Code.BAD_TICKET and "another peer" in answer.message
        assert pair.server.counts.started == 0 and pair.guard.refused == 1


async def _raw_stream(pair: Any) -> Any:
    stream = await pair.holder.open(pair.island_key.peer_id, JOB_PROTOCOL, JOB)
    await stream.send(Hello(PROTOCOL_VERSION, NodeRole.CONSUMER, pair.network, "raw"))
    assert isinstance(await stream.receive(), Hello)
    return stream


@pytest.mark.parametrize("case", ["no hello", "number reused", "chunk from the holder", "cancel of nothing"])
async def test_a_peer_that_breaks_the_protocol_loses_its_stream_only(kit: Any, case: str) -> None:
    async with kit.open_pair() as pair:
        if case == "no hello":
            stream = await pair.holder.open(pair.island_key.peer_id, JOB_PROTOCOL, JOB)
            await stream.send(JobCancel(1))
        else:
            stream = await _raw_stream(pair)
        if case == "number reused":
            await stream.send(JobOpen(1, pair.sealed(), input=kit.prompt("x")))
            await stream.send(JobOpen(1, pair.sealed(), input=kit.prompt("x")))
        elif case == "chunk from the holder":
            await stream.send(JobChunk(1, 0, "x", b"", bytes(4)))
        elif case == "cancel of nothing":
            await stream.send(JobCancel(5))
        with pytest.raises(LinkLost), trio.fail_after(5):
            while True:
                await stream.receive()
        await _run(kit, pair, pair.sealed())
        assert pair.server.counts.running == 0


async def _run(kit: Any, pair: Any, ticket: bytes, text: str = "x") -> list[Any]:
    async with pair.links.run_job(pair.island_key.peer_id, ticket, kit.prompt(text)) as job:
        events: list[Any] = await kit.collect(job)
        return events
