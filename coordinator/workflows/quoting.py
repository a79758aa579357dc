"""What runs would cost at most, by what the exchange would bid for their jobs now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from coordinator.exchange.bids import Work
from coordinator.http.job_input import wants_text
from coordinator.market import UNKNOWN_BID_MICROS
from coordinator.matching import declared_tokens
from coordinator.workflows.definition import Definition, Step
from coordinator.workflows.live import Bids
from coordinator.workflows.quote import FlowQuote, quote_of
from coordinator.workflows.values import written
from protocol import limits


class Priced(Protocol):
    """What of a request its price depends on."""

    @property
    def account(self) -> str: ...

    @property
    def bid_micros(self) -> int | None: ...


class Quoter:
    """Runs on trio. ``bids``: as live.Tools has them; ``writes_text(cargo)``: whether it does, None where nobody knows."""

    def __init__(self, bids: Bids, writes_text: Callable[[str], bool | None], job_timeout_s: float) -> None:
        self._bids, self._writes_text, self._job_timeout_s = bids, writes_text, job_timeout_s

    async def quote(self, definition: Definition, asked: Priced) -> FlowQuote:
        """Of all steps, those that fan out taken at their largest. Raises BooksUnavailable."""
        known: dict[tuple[str, Work], int | None] = {}
        each: dict[str, int | None] = {}
        for step in definition.steps:
            if step.bid_micros is not None:
                continue
            if asked.bid_micros is not None:
                each[step.key] = asked.bid_micros
                continue
            work = self._work(step)
            if (step.cargo, work) not in known:
                known[step.cargo, work] = await self._bid(asked.account, step.cargo, work)
            each[step.key] = known[step.cargo, work]
        return quote_of(definition, each)

    async def _bid(self, account: str, cargo: str, work: Work) -> int | None:
        """None where there is nothing to go by."""
        bid, floor = await self._bids(account, cargo, work, None)
        return None if floor == 0 and bid.micros == UNKNOWN_BID_MICROS else bid.micros

    def _work(self, step: Step) -> Work:
        """As far as the definition says it: what templates put in is not known yet, and counts as it is written."""
        given: dict[str, Any] = written(step.input)
        if not wants_text(given, self._writes_text(step.cargo)):
            return Work(0, limits.COMPLETION_TOKENS_MAX, job_s_max=self._job_timeout_s)
        tokens = next((given[name] for name in ("max_completion_tokens", "max_tokens") if type(given.get(name)) is int), 0)
        output = tokens if 0 < tokens <= limits.COMPLETION_TOKENS_MAX else limits.COMPLETION_TOKENS_DEFAULT
        return Work(declared_tokens(len(str(given)), 0), output, job_s_max=self._job_timeout_s)
