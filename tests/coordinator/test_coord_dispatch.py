"""Recovery, as a table: what Islands do, what the client must get, what must have been counted."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing

from coordinator.affinity import Affinity
from coordinator.dispatch import Dispatcher, Verdict, price_of, verdict
from coordinator.jobs import Accepted, ChoiceResult, Event, JobSpec, Text
from coordinator.placement import Placer
from coordinator.statistics import Statistics
from coordinator.tickets import TicketIssuer
from protocol import limits
from protocol.cargo_jobs import CargoInput
from protocol.errors import Code, Refused
from protocol.generation import ChatMessage, FinishReason, GenerationRequest, Role, Sampling
from tests.coordinator.fakes import COORDINATOR, HASH_B, NETWORK, FakeIsland, FakePort, Script, island, offer

SALT = bytes(32)
WORDS = "one two three four five six"
FULL = Refused(Code.NO_CAPACITY, "full")
AWAY = Refused(Code.LINK_LOST, "no connection")


def request(text: str = WORDS, **changes: Any) -> GenerationRequest:
    return GenerationRequest(**{"messages": (ChatMessage(Role.USER, text),), "max_tokens": 64, **changes})


def spec(*choices: GenerationRequest) -> JobSpec:
    return JobSpec("job-1", "echo", SALT, choices or (request(),))


@dataclass
class Bench:
    port: FakePort
    placer: Placer
    dispatcher: Dispatcher
    events: list[Event] = field(default_factory=list)

    @property
    def statistics(self) -> Statistics:
        return self.dispatcher.statistics

    async def run(self, job: JobSpec | None = None) -> str:
        async def keep(event: Event) -> None:
            self.events.append(event)

        await self.dispatcher.run(job or spec(), keep)
        return self.text()

    def text(self, choice: int = 0) -> str:
        return "".join(e.text for e in self.events if isinstance(e, Text) and e.choice == choice)

    def result(self, choice: int = 0) -> ChoiceResult:
        return next(e for e in self.events if isinstance(e, ChoiceResult) and e.choice == choice)


def bench(*islands: FakeIsland, seed: int = 1, timeout_s: float = 600.0) -> Bench:
    port = FakePort(*islands)
    # the first of equals is the one that the seed draws; with seed 1 that is the second in the book
    placer = Placer(port.book, random.Random(seed))
    rng = random.Random(2)
    issuer = TicketIssuer(COORDINATOR, NETWORK, 600.0, time.time, rng.randbytes)
    return Bench(port, placer, Dispatcher(port, placer, issuer, Affinity(bytes(16)), Statistics(), timeout_s))


def first(*scripts: Script, **changes: Any) -> FakeIsland:
    """The Island that is asked first, since it is the fastest."""
    return island(1, *scripts, **{"tokens_per_s": 100.0, **changes})


def second(*scripts: Script, **changes: Any) -> FakeIsland:
    return island(2, *scripts, **{"tokens_per_s": 50.0, **changes})


def third(*scripts: Script, **changes: Any) -> FakeIsland:
    return island(3, *scripts, **{"tokens_per_s": 1.0, **changes})


@dataclass(frozen=True)
class Case:
    """``served``: which Islands were opened, by number, in order of the ones with tokens. ``counts``: what Statistics must say."""

    islands: tuple[FakeIsland, ...]
    resumed_at: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)


RECOVERED: dict[str, Any] = {
    "undisturbed": lambda: Case((first(), second()), counts={"attempts": 1}),
    "no connection": lambda: Case(
        (first(Script(fail_open=AWAY)), second()),
        counts={"attempts": 2, "takeovers_before_first_token": 1, "workers_ended": 0},
    ),
    "link lost before it accepts": lambda: Case(
        (first(Script(refuse=Refused(Code.LINK_LOST, "x"))), second()),
        counts={"attempts": 2, "takeovers_before_first_token": 1, "workers_ended": 1},
    ),
    "link lost before the first token": lambda: Case(
        (first(Script(fail_after=0)), second()),
        counts={"attempts": 2, "takeovers_before_first_token": 1, "workers_ended": 1},
    ),
    "worker dies before the first token": lambda: Case(
        (first(Script(fail_after=0, failure=Code.WORKER_DIED)), second()),
        counts={"takeovers_before_first_token": 1, "workers_ended": 1},
    ),
    "link lost after one token": lambda: Case(
        (first(Script(fail_after=1)), second()), 1, {"takeovers_mid_stream": 1, "workers_ended": 1}
    ),
    "worker dies in mid-stream": lambda: Case(
        (first(Script(fail_after=4, failure=Code.WORKER_DIED)), second()), 4, {"takeovers_mid_stream": 1}
    ),
    "link lost behind the last token": lambda: Case(
        (first(Script(fail_after=6)), second()), 6, {"takeovers_mid_stream": 1, "completion_tokens": 6}
    ),
    "dies in the middle of a batch": lambda: Case(
        (first(Script(fail_after=4, batch=2)), second(Script(batch=4))), 4, {"takeovers_mid_stream": 1}
    ),
    "full": lambda: Case((first(Script(refuse=FULL)), second()), counts={"attempts": 2, "workers_ended": 0}),
    "draining": lambda: Case(
        (first(Script(refuse=Refused(Code.DRAINING, "x"))), second()), counts={"attempts": 2, "workers_ended": 0}
    ),
    "drains in mid-stream": lambda: Case(
        (first(Script(fail_after=2, failure=Code.DRAINING)), second()),
        2,
        {"takeovers_mid_stream": 1, "workers_ended": 0},
    ),
    "was restarted": lambda: Case(
        (first(Script(refuse=Refused(Code.BAD_TICKET, "x"))), second()), counts={"attempts": 2}
    ),
    "has dropped the model": lambda: Case(
        (first(Script(refuse=Refused(Code.UNKNOWN_CARGO, "x"))), second()), counts={"attempts": 2}
    ),
    "context too small": lambda: Case(
        (first(Script(refuse=Refused(Code.CONTEXT_LENGTH, "x")), context_tokens=1000), second()), counts={"attempts": 2}
    ),
    "three that are away": lambda: Case(
        (first(Script(fail_open=AWAY)), second(Script(fail_open=AWAY)), third()), counts={"attempts": 3}
    ),
    "one dies, one is away": lambda: Case(
        (first(Script(fail_after=3)), second(Script(fail_open=AWAY)), third()), 3, {"attempts": 3, "workers_ended": 1}
    ),
    "another engine where none is equal": lambda: Case(
        (first(Script(fail_after=3)), second(engine="echo-2")), 3, {"splices_across_engines": 1}
    ),
}


@pytest.mark.parametrize("name", RECOVERED)
async def test_the_whole_answer_arrives_once(name: str, autojump_clock: trio.testing.MockClock) -> None:
    case: Case = RECOVERED[name]()
    b = bench(*case.islands)
    assert await b.run() == WORDS
    result = b.result()
    assert result.completion_tokens == 6 and result.prompt_tokens == 6
    assert result.finish_reason is FinishReason.STOP
    assert price_of(b"") == 0 and result.price_micros == 1000
    for key, value in case.counts.items():
        assert getattr(b.statistics, key) == value, key
    served = [i for i in case.islands if i.requests]
    assert len(served[-1].requests[-1].resume) // 4 == case.resumed_at
    assert b.statistics.jobs_done == 1 and b.dispatcher.running == b.placer.open_jobs == 0


FAILED: dict[str, Any] = {
    "two workers ended, a third Island is idle": (
        lambda: (first(Script(fail_after=1)), second(Script(fail_after=1)), third()),
        Code.LINK_LOST,
        2,
    ),
    "two workers ended before the first token": (
        lambda: (
            first(Script(fail_after=0, failure=Code.WORKER_DIED)),
            second(Script(fail_after=0, failure=Code.WORKER_DIED)),
            third(),
        ),
        Code.WORKER_DIED,
        2,
    ),
    "no Island left": (lambda: (first(Script(fail_after=1)),), Code.NO_ISLAND, 1),
    "no Island left with this file": (
        lambda: (first(Script(fail_after=1)), second(content_hash=HASH_B)),
        Code.NO_ISLAND,
        1,
    ),
    "bad input is nobody else's business": (
        lambda: (first(Script(refuse=Refused(Code.BAD_INPUT, "no schema"))), second()),
        Code.BAD_INPUT,
        1,
    ),
    "a bug stays where it is": (
        lambda: (first(Script(refuse=Refused(Code.INTERNAL, "x"))), second()),
        Code.INTERNAL,
        1,
    ),
    "too long for all": (
        lambda: (first(Script(refuse=Refused(Code.CONTEXT_LENGTH, "too long"))), second()),
        Code.CONTEXT_LENGTH,
        1,
    ),
    "all full for too long": (
        lambda: (first(Script(refuse=FULL)), second(Script(refuse=FULL))),
        Code.NO_CAPACITY,
        None,
    ),
}


@pytest.mark.parametrize("name", FAILED)
async def test_a_failure_is_clear_and_leaves_nothing_open(name: str, autojump_clock: trio.testing.MockClock) -> None:
    make, code, attempts = FAILED[name]
    islands = make()
    b = bench(*islands)
    started = trio.current_time()
    with pytest.raises(Refused) as refused:
        await b.run()
    assert refused.value.code is code and refused.value.message
    assert trio.current_time() - started <= limits.CAPACITY_WAIT_S + 1
    if attempts is not None:
        assert b.statistics.attempts == attempts
    assert b.statistics.jobs_failed[code] == 1
    assert b.dispatcher.running == b.placer.open_jobs == b.placer.waiting == 0
    assert sum(i.open_now for i in islands) == 0


async def test_an_equal_engine_is_preferred_to_a_faster_one(autojump_clock: trio.testing.MockClock) -> None:
    equal = third(engine="echo-1")
    b = bench(first(Script(fail_after=2)), second(engine="echo-2"), equal)
    assert await b.run() == WORDS
    assert b.result().islands[-1] == equal.peer and b.result().engines == ("echo-1",)


async def test_a_splice_across_engines_is_reported(autojump_clock: trio.testing.MockClock) -> None:
    b = bench(first(Script(fail_after=2)), second(engine="echo-2"))
    await b.run()
    assert b.result().engines == ("echo-1", "echo-2") and len(b.result().islands) == 2


async def test_the_island_itself_may_take_the_job_again_once_it_is_back(autojump_clock: trio.testing.MockClock) -> None:
    one = first(Script(fail_after=2, failure=Code.WORKER_DIED, times=1))
    b = bench(one)

    async def reload() -> None:
        await trio.sleep(2)
        b.port.advertise(one)
        b.placer.book_changed()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reload)
        assert await b.run() == WORDS
    assert b.statistics.takeovers_mid_stream == 1


async def test_an_ad_that_came_while_the_job_ran_does_not_bring_its_island_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Taking the job has changed the Island's room, so it has sent a newer ad before its worker died."""
    dying, other = first(Script(fail_after=2, failure=Code.WORKER_DIED, token_s=1.0)), second()
    b = bench(dying, other)

    async def tell_the_room() -> None:
        await trio.sleep(0.5)
        b.port.advertise(dying)
        b.placer.book_changed()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell_the_room)
        assert await b.run() == WORDS
    assert len(dying.requests) == 1 and b.result().islands == (dying.peer, other.peer)


async def test_a_full_island_is_asked_again_when_a_job_of_ours_has_ended_there(
    autojump_clock: trio.testing.MockClock,
) -> None:
    one = first(Script(refuse=FULL, times=3))
    b = bench(one)
    started = trio.current_time()
    assert await b.run() == WORDS
    # 0.25 + 0.5 + 1 s of rest
    assert trio.current_time() - started < 3
    assert b.statistics.refusals[Code.NO_CAPACITY] == 3


async def test_choices_have_their_own_tickets_and_seeds_and_one_job_id() -> None:
    one = first()
    b = bench(one)
    choices = tuple(request(sampling=Sampling(seed=seed)) for seed in (5, 6, 7))
    await b.run(spec(*choices))
    assert sorted(r.sampling.seed for r in one.requests) == [5, 6, 7]
    assert {t.job_id for t in one.tickets} == {"job-1"} and len({t.nonce for t in one.tickets}) == 3
    assert all(b.text(index) == WORDS for index in range(3))


async def test_a_choice_that_fails_ends_the_others() -> None:
    one = first(Script(refuse=Refused(Code.BAD_INPUT, "x"), times=1), Script(hang_after=1))
    b = bench(one)
    with pytest.raises(Refused) as refused:
        await b.run(spec(request(), request()))
    assert refused.value.code is Code.BAD_INPUT and one.open_now == 0


async def test_tickets_say_what_the_island_checks() -> None:
    one = first()
    b = bench(one)
    await b.run(JobSpec("job-9", "echo", bytes([7]) * 32, (request(max_tokens=33),)))
    (ticket,) = one.tickets
    assert (ticket.holder, ticket.issuer, ticket.route) == (COORDINATOR.peer_id, COORDINATOR.peer_id, (one.peer,))
    assert ticket.boots == (one.boot,) and ticket.token_limit == 33 and ticket.cache_salt == bytes([7]) * 32
    assert ticket.price_limit_micros == offer().ask.price(33, 600_000)


async def test_the_next_turn_goes_where_the_conversation_is() -> None:
    islands = [island(number) for number in range(1, 6)]
    b = bench(*islands)
    turns = [ChatMessage(Role.USER, "hello there")]
    for _ in range(6):
        await b.run(spec(GenerationRequest(messages=tuple(turns), max_tokens=8)))
        turns += [ChatMessage(Role.ASSISTANT, "x"), ChatMessage(Role.USER, "and then")]
    assert sorted(len(i.requests) for i in islands) == [0, 0, 0, 0, 6]


async def test_another_account_shares_no_affinity() -> None:
    affinity = Affinity(bytes(16))
    chain = affinity.chain(bytes(32), "m", [("user", "hello")])
    affinity.served(chain, "A")
    assert affinity.find(affinity.chain(bytes(32), "m", [("user", "hello"), ("user", "more")])) == "A"
    assert affinity.find(affinity.chain(bytes([1]) * 32, "m", [("user", "hello")])) == ""
    assert affinity.find(affinity.chain(bytes(32), "n", [("user", "hello")])) == ""
    assert affinity.find(affinity.chain(bytes(32), "m", [("user", "hell"), ("user", "o")])) == ""


async def test_leaving_cancels_on_the_island() -> None:
    one = first(Script(hang_after=2))
    b = bench(one)
    with trio.move_on_after(0.05):
        await b.run()
    assert one.cancelled == 1 and one.open_now == 0
    assert b.statistics.jobs_cancelled == 1 and b.placer.open_jobs == 0


async def test_a_job_that_takes_too_long_is_ended(autojump_clock: trio.testing.MockClock) -> None:
    one = first(Script(hang_after=2))
    b = bench(one, timeout_s=20)
    with pytest.raises(Refused) as refused:
        await b.run()
    assert refused.value.code is Code.TIMEOUT and one.open_now == 0
    assert trio.current_time() == pytest.approx(20, abs=0.1)


async def test_a_bug_of_the_port_fails_one_job_and_shows_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    prompt = "-".join(["a", "sec" + "ret"])

    class Broken(FakePort):
        def run_job(self, island: str, ticket: bytes, payload: bytes | CargoInput) -> Any:
            raise ValueError(prompt)

    b = bench(first())
    b.dispatcher._port = Broken(first())
    with pytest.raises(Refused) as refused:
        await b.run()
    assert refused.value.code is Code.INTERNAL
    assert "ValueError" in caplog.text and prompt not in caplog.text and prompt not in refused.value.message


async def test_logprobs_that_are_none_end_the_job() -> None:
    b = bench(first(Script(logprobs=lambda words: b'data: [DONE]\n\n"')))
    with pytest.raises(Refused) as refused:
        await b.run(spec(request(top_logprobs=0)))
    assert refused.value.code is Code.INTERNAL


async def test_accepted_is_told_before_any_text() -> None:
    b = bench(first())
    await b.run()
    assert isinstance(b.events[0], Accepted) and b.events[0].engine == "echo-1"
    assert isinstance(b.events[-1], ChoiceResult)


@pytest.mark.parametrize(
    ("code", "workers", "attempts", "what"),
    [
        (Code.NO_CAPACITY, 0, 99, Verdict.REST),
        (Code.LINK_LOST, 0, 1, Verdict.ELSEWHERE),
        (Code.LINK_LOST, 1, 1, Verdict.ELSEWHERE),
        (Code.LINK_LOST, 2, 2, Verdict.FAIL),
        (Code.WORKER_DIED, 1, 1, Verdict.ELSEWHERE),
        (Code.DRAINING, 0, limits.JOB_ATTEMPTS_MAX, Verdict.FAIL),
        (Code.CONTEXT_LENGTH, 0, 1, Verdict.LARGER),
        (Code.BAD_INPUT, 0, 1, Verdict.FAIL),
        (Code.INTERNAL, 0, 1, Verdict.FAIL),
        (Code.CANCELLED, 0, 1, Verdict.ELSEWHERE),
    ],
)
def test_verdicts(code: Code, workers: int, attempts: int, what: Verdict) -> None:
    assert verdict(code, workers, attempts) is what
