"""What Islands have earned by a choice: pure, from receipts and from what the receiver counted.

A receipt is the Island's word and is believed as far as it is borne out: no more than the ask that the job was placed at gives for the
tokens that arrived and the time that passed here, and no more than the limit. The price of a pipeline is split by what the stages of its
route ask, as it was when the choice ended; what its driver says of other stages counts for their time alone, or it could leave them out.
The driver, whose receipt it is, gets what rounding leaves.
"""

from __future__ import annotations

from collections.abc import Mapping

from coordinator.books.jobs import Earned
from coordinator.exchange.quotes import Quote, charge
from coordinator.jobs import ChoiceResult, Metered
from coordinator.planning import PlannedStage
from protocol.prices import Ask
from protocol.receipts import peek_receipt


def agreed_ask(metered: Metered, quote: Quote | None) -> Ask:
    """What the Consumer was promised: the quoted ask where the quoted Island did the work, else what it asked when it was chosen."""
    return quote.ask if quote is not None and quote.island == metered.island else metered.ask


def earned_of(result: ChoiceResult, metered: Metered, ask: Ask, limit_micros: int, now_s: float) -> list[Earned]:
    """For a choice that ended well; micro-credits that add up to at most the limit."""
    receipt = peek_receipt(result.receipt)
    compute_ms = min(receipt.compute_ms, _elapsed_ms(metered, now_s))
    price = charge(ask, limit_micros, metered.tokens, compute_ms, receipt.price_micros)
    stages = _stages(metered)
    if not stages:
        return [Earned(metered.island, price, compute_ms, result.receipt)]
    times_ms = {share.island: min(share.compute_us // 1000, compute_ms) for share in result.stages}
    return _split(stages, times_ms, metered, price, compute_ms, result.receipt)


def owed_for_delivered(metered: Metered, ask: Ask, limit_micros: int, now_s: float) -> list[Earned]:
    """For a choice whose Consumer left: what has reached him, by our own count, since there is no receipt. Nothing for nothing."""
    if not metered.island or not (metered.tokens or metered.lines):
        return []
    elapsed_ms = _elapsed_ms(metered, now_s)
    price = min(ask.price(metered.tokens, elapsed_ms), limit_micros)
    stages = _stages(metered)
    if not stages:
        return [Earned(metered.island, price, elapsed_ms)]
    return _split(stages, {}, metered, price, elapsed_ms, b"")


def _stages(metered: Metered) -> tuple[PlannedStage, ...]:
    """Of the pipeline that worked on the choice last; none where one Island did."""
    plan = metered.placed.candidate.plan if metered.placed is not None else None
    return plan.stages if plan is not None else ()


def _elapsed_ms(metered: Metered, now_s: float) -> int:
    return max(0, int(((metered.ended_s or now_s) - metered.started_s) * 1000) + 1)


def _split(
    stages: tuple[PlannedStage, ...],
    times_ms: Mapping[str, int],
    metered: Metered,
    price: int,
    compute_ms: int,
    receipt: bytes,
) -> list[Earned]:
    weights = [stage.ask.price(metered.tokens, compute_ms) for stage in stages]
    total = sum(weights)
    if not total:
        weights, total = [1 if stage.island == metered.island else 0 for stage in stages], 1
    amounts = {stage.island: price * weight // total for stage, weight in zip(stages, weights, strict=True)}
    amounts[metered.island] = amounts.get(metered.island, 0) + price - sum(amounts.values())
    return [
        Earned(island, amount, times_ms.get(island, 0), receipt if island == metered.island else b"")
        for island, amount in amounts.items()
    ]
