"""A bridge end to end: OpenAI's client in front, a scripted desk and real Islands behind, libp2p in between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import trio
import trio.testing

from coordinator.http.errors import ApiError
from coordinator.matching import Refusal
from coordinator.placement import NotPlaced
from node.desk_client import WISHES_MAX
from protocol.counts import read_count
from protocol.direct import RateStanding
from protocol.errors import Code, Refused
from protocol.receipts import read_receipt
from protocol.tickets import Ticket, read_ticket
from runtimes.echo import EchoCargo
from tests.node.direct_net import API_KEY, WRONG_KEY, bridged

SENTENCE = " ".join(f"word{number}" for number in range(60))
HELLO: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": SENTENCE}]}


def chat(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{**HELLO, **more})


async def test_an_answer_its_price_and_what_the_coordinator_hears(tmp_path: Path) -> None:
    async with bridged(tmp_path) as net:
        answer = await net.with_openai(chat)
        assert answer.choices[0].message.content == SENTENCE and answer.choices[0].finish_reason == "stop"
        (wanted,), (settled,) = net.desk.wanted, net.desk.settled
        assert answer.metadata["job_id"] == wanted.job_id == settled.job_id
        assert answer.metadata["price"] == "0.001", "what the Coordinator has billed"
        assert (wanted.kind, wanted.cargo, wanted.choices) == ("chat", "echo", 1)
        (attempt,) = settled.attempts
        assert read_receipt(attempt.receipt).sent_tokens == 60 and attempt.count
        assert not net.desk.dropped and net.server.counts.settled == 1
        await net.desk.wait(lambda: net.desk.places)
        assert net.desk.places[0].outcome == ""


async def test_a_stream(tmp_path: Path) -> None:
    def stream(client: openai.OpenAI) -> tuple[str, Any, Any]:
        raw = client.chat.completions.with_raw_response.create(
            **HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(raw.parse())
        return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks[-1], raw.headers

    async with bridged(tmp_path) as net:
        text, last, headers = await net.with_openai(stream)
        assert text == SENTENCE and last.usage.completion_tokens == 60
        job_id = net.desk.wanted[0].job_id
        assert last.metadata == {"job_id": job_id, "price": "0.001", "cache_hit": False, "cache_strategy": None}
        assert headers["x-archipelag-job"] == job_id
        assert headers["x-archipelag-island"] == net.desk.islands[0].peer


async def test_completions_models_and_health(tmp_path: Path) -> None:
    async with bridged(tmp_path) as net:
        done = await net.with_openai(lambda client: client.completions.create(model="echo", prompt="a b c"))
        assert done.choices[0].text == "a b c" and net.desk.wanted[0].kind == "completion"
        models = await net.with_openai(lambda client: [model.id for model in client.models.list()])
        assert models == ["echo"]
        async with net.http() as client:
            health = (await client.get("/health")).json()
            assert health["status"] == "ok" and health["islands"] == 1
            assert (await client.get("/v1/models/nonsense")).status_code == 404


async def test_several_choices_are_one_job(tmp_path: Path) -> None:
    async with bridged(tmp_path) as net:
        answer = await net.with_openai(lambda client: chat(client, n=3))
        assert [choice.message.content for choice in answer.choices] == [SENTENCE] * 3
        assert {wanted.job_id for wanted in net.desk.wanted} == {answer.metadata["job_id"]}
        assert [wanted.choices for wanted in net.desk.wanted] == [3, 3, 3]
        assert len(net.desk.settled[0].attempts) == 3 and answer.metadata["price"] == "0.003"


async def test_the_coordinator_sees_no_more_of_a_long_answer_than_of_a_short_one(tmp_path: Path) -> None:
    async with bridged(tmp_path) as net:
        counters, frames = net.coordinator.counters, list[int]()

        async def ask(words: int) -> None:
            before = counters.frames_received + counters.frames_sent
            messages = [{"role": "user", "content": "w " * words}]
            await net.with_openai(lambda client: chat(client, messages=messages, max_tokens=4096))
            await net.desk.wait(lambda: len(net.desk.places) > len(frames))
            frames.append(counters.frames_received + counters.frames_sent - before)

        for words in (3, 3, 3000):
            await ask(words)
        assert frames[1] == frames[2] <= 5


async def test_only_who_shows_the_key_is_served(tmp_path: Path) -> None:
    async with bridged(tmp_path) as net:
        for key, status in (("", 401), (WRONG_KEY, 401), ("nonsense", 401), (API_KEY, 200)):
            async with net.http(key) as client:
                assert (await client.post("/v1/chat/completions", json=HELLO)).status_code == status
        assert len(net.desk.wanted) == 1, "the Coordinator is not asked for others"


async def test_a_bridge_whose_key_the_coordinator_does_not_know_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with bridged(tmp_path, api_key=WRONG_KEY):
            pass
    assert "refuses the API key" in str(caught.value.exceptions[0]) and WRONG_KEY not in str(caught.value.exceptions[0])


ERRORS: dict[str, tuple[Exception, int, str]] = {
    "no credit": (
        ApiError(402, "not enough credits", code="insufficient_credits", kind="insufficient_quota"),
        402,
        "insufficient_credits",
    ),
    "rate": (
        ApiError(429, "too many", code="rate_limit_exceeded", kind="rate_limit_error", headers={"Retry-After": "7"}),
        429,
        "rate_limit_exceeded",
    ),
    "full": (Refused(Code.NO_CAPACITY, "all busy"), 503, "no_capacity"),
    "unknown": (Refused(Code.UNKNOWN_CARGO, "nobody offers it"), 404, "model_not_found"),
    "bid": (NotPlaced(Refusal(Code.NO_ISLAND, "all want more", by_price=True)), 402, "bid_too_low"),
    "scope": (
        ApiError(403, "this key lacks a scope", code="insufficient_scope", kind="permission_error"),
        403,
        "insufficient_scope",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_desk_s_errors_are_the_client_s(tmp_path: Path, name: str, stream: bool) -> None:
    refusal, status, code = ERRORS[name]
    async with bridged(tmp_path) as net, net.http() as client:
        net.desk.refusals = [refusal]
        answer = await client.post("/v1/chat/completions", json={**HELLO, "stream": stream})
        assert answer.status_code == status
        error = answer.json()["error"]
        assert error["code"] == code and set(error) == {"message", "type", "param", "code"}
        if name == "rate":
            assert answer.headers["Retry-After"] == "7"
        if name == "bid":
            assert error["param"] == "bid_price" and "Retry-After" not in answer.headers
        assert not net.desk.settled and not net.desk.dropped, "no ticket, nothing to report"


async def test_headers_say_how_the_key_stands(tmp_path: Path) -> None:
    async with bridged(tmp_path) as net, net.http() as client:
        net.desk.standing = RateStanding(100, 42, 30)
        await client.post("/v1/chat/completions", json=HELLO)
        answer = await client.post("/v1/chat/completions", json=HELLO)
        assert (answer.headers["X-RateLimit-Limit"], answer.headers["X-RateLimit-Remaining"]) == ("100", "42")


async def test_a_name_that_no_cargo_can_have(tmp_path: Path) -> None:
    async with bridged(tmp_path) as net, net.http() as client:
        answer = await client.post("/v1/chat/completions", json={**HELLO, "model": "two words"})
        assert answer.status_code == 404 and not net.desk.wanted


async def test_an_island_that_dies_is_replaced_in_the_middle_of_an_answer(tmp_path: Path) -> None:
    async with bridged(tmp_path, EchoCargo(delay_s=0.01), EchoCargo(delay_s=0.01)) as net:
        first, second = net.desk.islands

        async def kill() -> None:
            with trio.fail_after(10):
                while first.server.counts.tokens < 12:
                    await trio.sleep(0.005)
            first.host.stop_nowait()

        def cut(ticket: Ticket) -> Ticket:
            """To what is still to come, as the books do."""
            signed = [read_count(place.count).tokens for place in net.desk.places if place.count]
            return replace(ticket, token_limit=ticket.token_limit - sum(signed))

        net.desk.alter = cut
        net.nursery.start_soon(kill)
        answer = await net.with_openai(chat)
        assert answer.choices[0].message.content == SENTENCE, "not a word lost or told twice"
        assert answer.metadata["islands"] == [first.peer, second.peer]
        again = net.desk.wanted[1]
        assert [one.peer for one in again.excluded] == [first.peer] and again.job_id == net.desk.wanted[0].job_id
        assert again.engine == "echo/1" and again.content_hash == first.offer().content_hash
        (lost, freed) = net.desk.places
        assert lost.outcome == Code.LINK_LOST and read_count(lost.count).tokens >= 8 and freed.outcome == ""
        with_receipt, broken_off = net.desk.settled[0].attempts
        assert read_receipt(with_receipt.receipt).island == second.peer
        assert not broken_off.receipt and broken_off.count, "what the first had sent is signed for and reported"


@pytest.mark.parametrize("path", ["account", "account/statement", "jobs", "jobs/ab", "quotes", "market/rates/a/b", "api-keys", "islands"])
async def test_what_a_bridge_does_not_have_it_says_where_to_ask_for(tmp_path: Path, path: str) -> None:
    async with bridged(tmp_path, coordinator_url="http://192.0.2.7:8080/") as net:
        async with net.http() as client:
            for method in ("GET", "POST", "DELETE"):
                answer = await client.request(method, f"/api/v1/{path}")
                error = answer.json()["error"]
                assert (answer.status_code, error["code"]) == (404, "ask_the_coordinator")
                assert f"http://192.0.2.7:8080/api/v1/{path}" in error["message"] and "/p2p/" not in error["message"]
            assert (await client.get("/api/v1/nothing")).json()["error"]["code"] == "not_found"
        async with net.http("") as client:
            assert (await client.get(f"/api/v1/{path}")).status_code == 401


async def test_an_island_that_is_full_is_rested(tmp_path: Path) -> None:
    class _Full(EchoCargo):
        def run(self, request: Any) -> Any:
            raise Refused(Code.NO_CAPACITY, "full")

    async with bridged(tmp_path, _Full(), EchoCargo()) as net:
        answer = await net.with_openai(chat)
        assert answer.choices[0].message.content == SENTENCE
        (rested,) = net.desk.wanted[1].excluded
        assert rested.peer == net.desk.islands[0].peer and rested.rest_ms > 0 and rested.sequence == 0


async def test_a_client_that_hangs_up_drops_its_job(tmp_path: Path) -> None:
    async with bridged(tmp_path, EchoCargo(delay_s=0.01)) as net:
        body = {**HELLO, "messages": [{"role": "user", "content": "word " * 2000}], "stream": True}
        async with net.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if '"content":"word' in line:
                    break
        await net.desk.wait(lambda: net.desk.dropped)
        (dropped,) = net.desk.dropped
        assert dropped.code is Code.CANCELLED and dropped.attempts[0].count and not dropped.attempts[0].receipt
        (island,) = net.desk.islands
        with trio.fail_after(5):
            await island.server.wait_idle()


async def test_a_client_that_hangs_up_while_it_waits_withdraws_its_wish(tmp_path: Path) -> None:
    async with bridged(tmp_path) as net:
        net.desk.hold_up = trio.Event()
        with trio.move_on_after(1) as scope:
            async with net.http() as client, trio.open_nursery() as nursery:

                async def leave() -> None:
                    await net.desk.wait(lambda: net.desk.wanted)
                    scope.cancel()

                nursery.start_soon(leave)
                await client.post("/v1/chat/completions", json=HELLO)
        await net.desk.wait(lambda: net.desk.cancelled)
        assert not net.desk.granted and not net.desk.dropped


async def test_a_coordinator_that_does_not_settle_in_time_does_not_hold_up_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.direct_worker.SETTLE_WAIT_S", 0.1)
    async with bridged(tmp_path) as net:
        net.desk.settle_hold_up = trio.Event()
        answer = await net.with_openai(chat)
        assert answer.choices[0].message.content == SENTENCE and answer.metadata["price"] == "0.001", "by the receipt"
        assert not net.desk.settled
        net.desk.settle_hold_up.set()
        await net.desk.wait(lambda: net.desk.settled)


async def test_the_coordinator_goes_away_in_the_middle_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer goes on to its end, the report waits, new requests are told to come again."""
    monkeypatch.setattr("node.direct_worker.SETTLE_WAIT_S", 0.1)
    monkeypatch.setattr("node.desk_client.AWAY_S", 0.2)
    monkeypatch.setattr("node.direct_worker._REPORT_PAUSE_S", 0.1)
    async with bridged(tmp_path, EchoCargo(delay_s=0.01)) as net:
        (island,) = net.desk.islands

        async def cut() -> None:
            with trio.fail_after(10):
                while island.server.counts.tokens < 5:
                    await trio.sleep(0.005)
            await net.cut_off()

        net.nursery.start_soon(cut)
        answer = await net.with_openai(chat)
        assert answer.choices[0].message.content == SENTENCE and not net.desk.settled
        async with net.http() as client:
            refused = await client.post("/v1/chat/completions", json=HELLO)
            assert refused.status_code == 503 and refused.headers["Retry-After"]
        net.bring_back()
        await net.desk.wait(lambda: net.desk.settled)
        assert net.desk.settled[0].job_id == answer.metadata["job_id"]
        assert (await net.with_openai(chat)).choices[0].message.content == SENTENCE


async def test_what_was_asked_when_the_stream_was_lost_is_asked_again(tmp_path: Path) -> None:
    async with bridged(tmp_path) as net:
        net.desk.hold_up = trio.Event()

        async def cut() -> None:
            await net.desk.wait(lambda: net.desk.wanted)
            await net.cut_off()
            net.desk.hold_up = None
            net.bring_back()

        net.nursery.start_soon(cut)
        answer = await net.with_openai(chat)
        assert answer.choices[0].message.content == SENTENCE
        first, second = net.desk.wanted
        assert first.job_id == second.job_id and second.request > first.request and net.desk.cancelled == 1


async def test_many_wishes_at_once_stay_within_the_desk_s_bounds(tmp_path: Path) -> None:
    async with bridged(tmp_path) as net, net.http() as client:
        net.desk.hold_up = trio.Event()
        statuses: list[int] = []

        async def ask() -> None:
            statuses.append((await client.post("/v1/completions", json={"model": "echo", "prompt": "x", "n": 16})).status_code)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask)
            await net.desk.wait(lambda: len(net.desk.wanted) == WISHES_MAX)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert len(net.desk.wanted) == WISHES_MAX
            net.desk.hold_up.set()
        assert statuses == [200] * 20 and len(net.desk.wanted) == 320


async def test_a_name_may_stand_for_a_cargo_of_another_name(tmp_path: Path) -> None:
    """For which one, is the Coordinator's to say."""
    async with bridged(tmp_path) as net, net.http() as client:
        net.desk.names = {"base": "echo"}
        answer = await client.post("/v1/chat/completions", json={**HELLO, "model": "base"})
        assert answer.status_code == 200, answer.text
        assert read_ticket(net.desk.granted[0]).cargo == "echo" and answer.json()["model"] == "base"
        await net.desk.wait(lambda: net.desk.settled)


ALTERED: dict[str, Any] = {
    "another holder": {"holder": "12D3KooWGRUHtYZFkMQzGpBWUqqxQmRT8nEJyQDnw4S4oF3yQm7A"},
    "another job": {"job_id": "0" * 24},
    "another Cargo than is offered": {"cargo": "another"},
    "fewer tokens": {"token_limit": 5},
}


@pytest.mark.parametrize("name", ALTERED)
async def test_a_ticket_that_was_not_asked_for_is_not_used(tmp_path: Path, name: str) -> None:
    async with bridged(tmp_path) as net, net.http() as client:
        net.desk.alter = lambda ticket: replace(ticket, **ALTERED[name])
        answer = await client.post("/v1/chat/completions", json=HELLO)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
        assert net.desk.islands[0].server.counts.started == 0


async def test_a_request_that_comes_again_costs_nothing(tmp_path: Path) -> None:
    async with bridged(tmp_path) as net, net.http() as client:
        first = await client.post("/v1/chat/completions", json=HELLO, headers={"Idempotency-Key": "one"})
        for headers in ({"Idempotency-Key": "one"}, {"x-stainless-retry-count": "1"}):
            again = await client.post("/v1/chat/completions", json=HELLO, headers=headers)
            assert first.status_code == again.status_code == 200, again.text
            assert again.json()["choices"] == first.json()["choices"] and again.headers["x-archipelag-replayed"] == "true"
            assert again.json()["metadata"] == first.json()["metadata"]
        assert len(net.desk.wanted) == 1 and len(net.desk.settled) == 1


async def test_a_retry_of_the_same_bytes_waits_for_its_first_try(tmp_path: Path) -> None:
    async with bridged(tmp_path, EchoCargo(delay_s=0.005)) as net, net.http() as client:
        answers: list[Any] = []

        async def ask(**headers: str) -> None:
            answers.append(await client.post("/v1/chat/completions", json=HELLO, headers=headers))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await net.desk.wait(lambda: net.desk.granted)
            await client.post("/v1/chat/completions", json=HELLO, headers={"x-stainless-retry-count": "1"})
        assert len(net.desk.wanted) == 1 and len(net.desk.settled) == 1
        await client.post("/v1/chat/completions", json=HELLO)
        assert len(net.desk.wanted) == 2, "without a sign that it is a retry it is a request of its own"


async def test_an_idempotency_key_stands_for_one_request(tmp_path: Path) -> None:
    async with bridged(tmp_path) as net, net.http() as client:
        headers = {"Idempotency-Key": "one"}
        net.desk.refusals = [Refused(Code.NO_CAPACITY, "full")]
        assert (await client.post("/v1/chat/completions", json=HELLO, headers=headers)).status_code == 503
        assert (await client.post("/v1/chat/completions", json=HELLO, headers=headers)).status_code == 200, "it may be tried again"
        other = await client.post("/v1/chat/completions", json={**HELLO, "seed": 1}, headers=headers)
        assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
        net.desk.hold_up = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: client.post("/v1/chat/completions", json=HELLO, headers={"Idempotency-Key": "two"}))
            await net.desk.wait(lambda: len(net.desk.wanted) == 3)
            busy = await client.post("/v1/chat/completions", json=HELLO, headers={"Idempotency-Key": "two"})
            assert (busy.status_code, busy.json()["error"]["code"]) == (409, "idempotency_key_in_use")
            net.desk.hold_up.set()


async def test_it_drains(tmp_path: Path) -> None:
    async with bridged(tmp_path, EchoCargo(delay_s=0.01)) as net:

        async def stop_soon() -> None:
            await net.desk.wait(lambda: net.desk.granted)
            net.stop.set()

        net.nursery.start_soon(stop_soon)
        answer = await net.with_openai(chat)
        assert answer.choices[0].message.content == SENTENCE
        await net.desk.wait(lambda: net.desk.settled)


async def test_nothing_secret_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with bridged(tmp_path) as net:
        await net.with_openai(chat)
        async with net.http() as client:
            net.desk.refusals = [ApiError(402, "not enough credits")]
            await client.post("/v1/chat/completions", json=HELLO)
    ours = [record for record in caplog.records if record.name.startswith(("node", "coordinator", "protocol"))]
    assert ours, "something was logged"
    for record in ours:
        text = record.getMessage() + repr(record.args)
        assert API_KEY not in text and "word5" not in text
