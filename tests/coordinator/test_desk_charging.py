"""What a choice costs and who is paid: receipts are believed as far as the receiver's own count, the ask and the limit bear them out."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from coordinator.books.jobs import Earned
from coordinator.charging import agreed_ask, earned_of, owed_for_delivered
from coordinator.columns import Candidate
from coordinator.exchange.bids import Bid, BidSource, Work
from coordinator.exchange.quotes import Quote
from coordinator.jobs import ChoiceResult, Metered, StageShare
from coordinator.matching import Choice
from coordinator.planning import Plan, PlannedStage
from protocol.generation import FinishReason
from protocol.prices import Ask, sum_of_asks
from protocol.receipts import RECEIPT_VERSION, Ending, Receipt, peek_receipt, sign_receipt
from protocol.shards import LayerRange
from tests.coordinator.fakes import HASH_A, NETWORK, island_key, offer

ONE, TWO, THREE = (island_key(number).peer_id for number in (1, 2, 3))
ASK = Ask(per_job=100, per_1k_output=20_000, per_second=5_000)  # 20 a token, 5 a millisecond
MUCH = 10**9


def receipt(**changes: Any) -> bytes:
    plain = Receipt(
        version=RECEIPT_VERSION,
        network=NETWORK,
        island=ONE,
        job_id="j1",
        ticket_hash=bytes(32),
        content_hash=HASH_A,
        prompt_tokens=3,
        cached_tokens=0,
        sent_tokens=7,
        output_hash=bytes(32),
        compute_ms=40,
        price_micros=ASK.price(7, 40),
        finish_reason=Ending.STOP,
        finished_at_ms=1,
    )
    return sign_receipt(replace(plain, **changes), island_key(1))


def result(stages: tuple[StageShare, ...] = (), **changes: Any) -> ChoiceResult:
    return ChoiceResult(
        0, FinishReason.STOP, (ONE,), ("e",), 3, 0, 7, 0, 0, 0, stages=stages, receipt=receipt(**changes)
    )


def placed(plan: Plan | None) -> Choice:
    return Choice(Candidate(ONE, 1, 1, False, offer(), 0, 0, plan), 1.0, (), {}, 1, 0)


def route(*asks: Ask) -> Plan:
    """Over ONE, TWO, … so that the first Island is the last stage."""
    peers = (ONE, TWO, THREE)[: len(asks)]
    stages = [
        PlannedStage(peer, 1, LayerRange(4 * index, 4 * index + 4), ask, True, 0, 0.0)
        for index, (peer, ask) in enumerate(zip(peers, asks, strict=True))
    ]
    return Plan(tuple(reversed(stages)), 0, 0.0, 0.0, ())


def metered(plan: Plan | None = None, **changes: Any) -> Metered:
    """7 tokens in 50 ms, seen at 10.05 s."""
    return replace(Metered(ONE, "", ASK, placed(plan), tokens=7, started_s=10.0, ended_s=10.05), **changes)


def paid(earned: list[Earned]) -> dict[str, int]:
    assert len({each.island for each in earned}) == len(earned)
    return {each.island: each.amount for each in earned}


def test_an_honest_receipt_is_paid_as_it_stands() -> None:
    (earned,) = earned_of(result(), metered(), ASK, MUCH, 11.0)
    assert earned == Earned(ONE, 100 + 140 + 200, 40, result().receipt)


LIES = [
    # fields of the receipt, limit, what is paid: by the ask for 7 tokens and at most 51 ms
    ({"price_micros": 10**15}, MUCH, 440),
    ({"price_micros": 10**15, "compute_ms": 2**40}, MUCH, 100 + 140 + 255),
    ({"price_micros": 10**15, "sent_tokens": 4096}, MUCH, 440),
    ({"price_micros": 441}, MUCH, 440),
    ({"price_micros": 10**15}, 439, 439),
    ({"price_micros": 10**15}, 0, 0),
    ({"price_micros": 300}, MUCH, 300),  # an Island may give some of it away
    ({"price_micros": 0}, MUCH, 0),
    ({"compute_ms": 0}, MUCH, 240),
    ({"sent_tokens": 0}, MUCH, 440),
]


@pytest.mark.parametrize(("lies", "limit", "wanted"), LIES)
def test_a_receipt_that_claims_more_is_cut(lies: dict[str, Any], limit: int, wanted: int) -> None:
    (earned,) = earned_of(result(**lies), metered(), ASK, limit, 11.0)
    assert earned.amount == wanted and earned.compute_ms <= 51


def test_time_is_that_until_the_choice_ended_not_until_it_was_settled() -> None:
    """Of several choices the first to end waits for the others; its Island may not claim that time."""
    lie = result(compute_ms=2**40, price_micros=10**15)
    assert earned_of(lie, metered(), ASK, MUCH, 60.0) == earned_of(lie, metered(), ASK, MUCH, 10.05)


SPLITS = [
    # asks of the stages (the driver first), price, who gets what
    ([Ask(300), Ask(100)], 400, {ONE: 300, TWO: 100}),
    ([Ask(300), Ask(100)], 200, {ONE: 150, TWO: 50}),
    ([Ask(40), Ask(40), Ask(40)], 100, {ONE: 34, TWO: 33, THREE: 33}),
    ([Ask(), Ask()], 0, {ONE: 0, TWO: 0}),
    ([Ask(), Ask(5)], 5, {ONE: 0, TWO: 5}),
    ([Ask(per_1k_output=1000), Ask(per_second=1000)], 47, {ONE: 7, TWO: 40}),
]


@pytest.mark.parametrize(("asks", "price", "wanted"), SPLITS)
def test_a_pipeline_is_paid_by_the_asks_of_its_stages(asks: list[Ask], price: int, wanted: dict[str, int]) -> None:
    earned = earned_of(result(price_micros=price), metered(route(*asks)), sum_of_asks(asks), MUCH, 11.0)
    assert paid(earned) == wanted
    assert [each.island for each in earned if each.receipt] == [ONE]


def test_a_driver_with_nothing_to_earn_keeps_what_rounding_leaves() -> None:
    asks = [Ask(), Ask(1), Ask(1)]
    earned = earned_of(result(price_micros=1), metered(route(*asks)), sum_of_asks(asks), 1, 11.0)
    assert paid(earned) == {ONE: 1, TWO: 0, THREE: 0}


def share(peer: str, layers: str, ask: Ask, compute_us: int = 9000) -> StageShare:
    return StageShare(peer, layers, ask, compute_us, 0)


DRIVERS = [
    (),
    (share(ONE, "0-4", Ask(300)),),
    (share(ONE, "0-4", Ask(300)),) * 8,
    (share(THREE, "", Ask()), share(ONE, "0-4", Ask(300)), share(ONE, "0-4", Ask(300)), share(TWO, "4-8", Ask(100))),
    (share(THREE, "0-4", Ask(10**15)),),
]


@pytest.mark.parametrize("said", DRIVERS)
def test_a_driver_that_lies_about_the_stages_gets_no_more(said: tuple[StageShare, ...]) -> None:
    asks = [Ask(300), Ask(100)]
    earned = earned_of(result(said, price_micros=400), metered(route(*asks)), sum_of_asks(asks), MUCH, 11.0)
    assert paid(earned) == {ONE: 300, TWO: 100}
    assert all(each.compute_ms <= 40 for each in earned)


def test_stages_have_the_time_that_the_driver_measured_at_most_that_of_the_whole() -> None:
    asks = [Ask(300), Ask(100)]
    said = (share(TWO, "4-8", asks[1], 12_000), share(ONE, "0-4", asks[0], 10**12))
    earned = earned_of(result(said, price_micros=400), metered(route(*asks)), sum_of_asks(asks), MUCH, 11.0)
    assert {each.island: each.compute_ms for each in earned} == {ONE: 40, TWO: 12}


def test_an_island_that_says_it_was_a_pipeline_is_still_one_island() -> None:
    earned = earned_of(result((share(TWO, "0-4", Ask(100)),)), metered(), ASK, MUCH, 11.0)
    assert paid(earned) == {ONE: 440}


def test_what_was_delivered_is_owed_without_a_receipt() -> None:
    went = metered(ended_s=0.0)
    assert owed_for_delivered(went, ASK, MUCH, 10.05) == [Earned(ONE, 100 + 140 + 255, 51)]
    assert owed_for_delivered(went, ASK, 200, 10.05) == [Earned(ONE, 200, 51)]


@pytest.mark.parametrize("went", [metered(tokens=0), Metered()])
def test_nothing_is_owed_for_nothing(went: Metered) -> None:
    assert owed_for_delivered(went, ASK, MUCH, 10.05) == []


def test_what_a_pipeline_delivered_is_split_too() -> None:
    asks = [Ask(300), Ask(100)]
    earned = owed_for_delivered(metered(route(*asks)), sum_of_asks(asks), MUCH, 11.0)
    assert paid(earned) == {ONE: 300, TWO: 100} and not any(each.receipt for each in earned)


def test_the_quoted_ask_counts_where_the_quoted_island_did_the_work() -> None:
    bid = Bid(1000, BidSource.EXPLICIT)
    quote = Quote("q", "ann", "echo", ONE, Ask(7), 7, bid, Work(1, 1), (), 1, 2)
    assert agreed_ask(metered(), quote) == Ask(7)
    assert agreed_ask(metered(island=TWO), quote) == agreed_ask(metered(), None) == ASK


def test_whatever_receipts_say_no_more_than_the_limit_is_paid_and_all_of_the_price() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        asks = [Ask(*(rng.choice([0, 1, 7, 1000, 10**15]) for _ in range(3))) for _ in range(rng.randint(1, 3))]
        ask, limit = sum_of_asks(asks), rng.choice([0, 1, 99, 10**6, 10**15])
        went = metered(route(*asks) if len(asks) > 1 else None, tokens=rng.randint(0, 50), ended_s=rng.uniform(10.0, 20.0))
        wants = rng.choice([0, 1, 500, 10**15])
        said = result(compute_ms=rng.choice([0, 1, 2**40]), price_micros=wants, sent_tokens=rng.randint(0, 4096))
        for earned in (earned_of(said, went, ask, limit, 30.0), owed_for_delivered(went, ask, limit, 30.0)):
            amounts = [each.amount for each in earned]
            assert min(amounts, default=0) >= 0 and sum(amounts) <= limit
        amounts = [each.amount for each in earned_of(said, went, ask, limit, 30.0)]
        time_ms = min(peek_receipt(said.receipt).compute_ms, int((went.ended_s - 10.0) * 1000) + 1)
        assert sum(amounts) == min(ask.price(went.tokens, time_ms), limit, wants)

