"""Orders for the jobs of a run: what one input, or one step, becomes at the desk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coordinator.books.runs import Run
from coordinator.cache.asking import CacheUse, ask_of
from coordinator.http.job_input import KIND, PATIENCE_SHARE, lines_asked, read_body, text_asked, wants_text, work_of
from coordinator.jobs import JobSpec
from coordinator.orders import Order
from coordinator.regions import Residency

_AS_USUAL = CacheUse(is_exact=True)


@dataclass(frozen=True, slots=True)
class ChildTerms:
    """What holds for all jobs of a run. ``bid_micros``: for each of them; None: the market's."""

    bid_micros: int | None = None
    policy: Residency | None = None
    policy_text: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class ChildOrders:
    """``salt(account)``: the account's cache salt; ``writes_text(cargo)``: whether it does, None where nobody knows (of trio);
    ``keep_s``: how long outputs are kept."""

    salt: Callable[[str], bytes]
    writes_text: Callable[[str], bool | None]
    keep_s: float
    job_timeout_s: float

    def order(
        self,
        run: Run,
        job_id: str,
        cargo: str,
        given: dict[str, Any],
        terms: ChildTerms,
        cache: CacheUse = _AS_USUAL,
        avoid: frozenset[str] = frozenset(),
    ) -> Order:
        """The job ``job_id`` of a run: input ``given`` for a Cargo. Its input is not kept with it, as the run has it. Raises ApiError 400
        for an input that no Cargo can take."""
        read_body({"cargo": cargo, "input": given})
        asked = text_asked(cargo, given) if wants_text(given, self.writes_text(cargo)) else lines_asked(given)
        spec = JobSpec(
            job_id,
            cargo,
            self.salt(run.account),
            (asked,),
            account=run.account,
            policy=terms.policy,
            priority=terms.priority,
            avoid=avoid,
            patience_s=PATIENCE_SHARE * self.job_timeout_s,
        )
        return Order(
            spec=spec,
            work=work_of(asked, self.job_timeout_s),
            kind=KIND,
            bid_micros=terms.bid_micros,
            policy_text=terms.policy_text,
            keep_s=self.keep_s,
            cache=ask_of(cargo, asked, given, run.account, terms.policy_text, cache) if cache.reads or cache.writes else None,
            parent=run.id,
        )
