"""A job on its way and an Island while it is there, as a simulated day (market_day.py) has them.

An Island is a processor that its streams share: with b of them each runs at ``v / (1 + SLOT_SHARING (b - 1))``. All its streams run at
the same pace, so one number, ``pace``, says how far each has come: a job that came at pace p with work w ends at pace p + w.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from coordinator.books.jobs import Job, Placed
from coordinator.matching import Wish
from coordinator.pricing import PREFILL_SPEEDUP
from coordinator.regions import EU
from protocol import limits
from protocol.ads import CargoOffer
from protocol.prices import Ask
from tests.network.market_trace import CARGOS, CONTEXT_TOKENS, SLOT_SHARING, IslandPlan, JobPlan

PREFIXES_PER_SLOT = 4  # conversations whose prefix an Island keeps
PREFIX_COST = 0.05  # share of a prompt that is computed although its prefix is there
_NO_ASK = Ask()
_INSTANT_S = 1e-9  # times that differ by less are the same


@dataclass(slots=True, eq=False)
class Run:
    """A job. ``since_s``: since when it may run, for its time limit. ``delivered``: output tokens so far, on all Islands; ``failed``: those
    that broke. The rest is of the present attempt: since when, at which pace it began, how much of its work comes before the first token,
    by which ad it was chosen."""

    plan: JobPlan
    job: Job
    wish: Wish
    chain: tuple[bytes, ...]
    since_s: float
    delivered: int = 0
    attempts: int = 0
    failed: list[str] = field(default_factory=list)
    placed_s: float = -1.0
    began_pace: float = 0.0
    prefill: float = 0.0
    ask: Ask = _NO_ASK
    sequence: int = 0

    @property
    def deadline_s(self) -> float:
        return self.since_s + limits.JOB_TIMEOUT_S

    @property
    def is_cancelled(self) -> bool:
        """Whether its Consumer leaves before the end."""
        return self.plan.cancel_share < 1.0

    @property
    def tokens_left(self) -> int:
        return int(self.plan.output_tokens * self.plan.cancel_share) - self.delivered

    @property
    def ends_at_pace(self) -> float:
        return self.began_pace + self.prefill + self.tokens_left


@dataclass(slots=True, eq=False)
class Site:
    """``visit``: how often it has come; ``version``: of what is planned for the end of its jobs. ``is_listed``: its offer stands in the
    columns. ``busy_s``: slot-seconds in use, ``online_s``: slot-seconds that there were."""

    plan: IslandPlan
    offer: CargoOffer
    runs: list[Run] = field(default_factory=list)
    prefixes: OrderedDict[int, None] = field(default_factory=OrderedDict)
    pace: float = 0.0
    at_s: float = 0.0
    sequence: int = 0
    visit: int = 0
    version: int = 0
    is_alive: bool = False
    is_listed: bool = False
    drains: bool = False
    busy_s: float = 0.0
    online_s: float = 0.0

    def advance(self, now_s: float) -> None:
        passed_s = now_s - self.at_s
        self.at_s = now_s
        if not self.is_alive or passed_s <= 0.0:
            return
        streams = len(self.runs)
        self.online_s += passed_s * self.plan.slots
        if streams:
            self.busy_s += passed_s * streams
            self.pace += passed_s * self.plan.tokens_per_s / (1.0 + SLOT_SHARING * (streams - 1))

    def next_end_s(self) -> float:
        """When the first of its jobs is done or out of time, if nothing comes between."""
        per_token_s = (1.0 + SLOT_SHARING * (len(self.runs) - 1)) / self.plan.tokens_per_s
        left = min(run.ends_at_pace for run in self.runs) - self.pace
        return min(self.at_s + max(0.0, left) * per_token_s, min(run.deadline_s for run in self.runs))

    def begin(self, run: Run, sequence: int) -> None:
        """Takes a job. Before its first token come the trip there and its prompt, most of it spared where its prefix is there."""
        self.advance(run.placed_s)
        share = PREFIX_COST if run.plan.conversation in self.prefixes else 1.0
        prompt = run.plan.prompt_tokens * share + run.delivered
        run.prefill = prompt / PREFILL_SPEEDUP + 2 * self.plan.round_trip_s * self.plan.tokens_per_s
        run.began_pace, run.ask, run.sequence = self.pace, self.offer.ask, sequence
        run.attempts += 1
        self.runs.append(run)

    def take_ended(self) -> tuple[Run, bool]:
        """The job whose end was planned for now, and whether it ran out of time instead."""
        late = [run for run in self.runs if run.deadline_s <= self.at_s + _INSTANT_S]
        ended = late[0] if late else min(self.runs, key=lambda run: run.ends_at_pace)
        self.runs.remove(ended)
        return ended, bool(late)

    def tokens_of(self, run: Run) -> int:
        """Output tokens of this attempt by now."""
        return max(0, min(int(self.pace - run.began_pace - run.prefill), run.tokens_left))

    def busy_kv(self) -> int:
        return sum(run.wish.tokens for run in self.runs)

    def remember(self, conversation: int) -> None:
        self.prefixes[conversation] = None
        self.prefixes.move_to_end(conversation)
        if len(self.prefixes) > PREFIXES_PER_SLOT * self.plan.slots:
            self.prefixes.popitem(last=False)

    def placed(self) -> Placed:
        return Placed(self.plan.peer, self.plan.region, self.offer.ask)


def offer_of(plan: IslandPlan) -> CargoOffer:
    kind = CARGOS[plan.cargo]
    return CargoOffer(
        name=kind.name,
        content_hash=f"{plan.cargo + 1:02}" * 32,
        runtime="gguf",
        engine="simulated",
        ask=plan.ask,
        context_tokens=CONTEXT_TOKENS,
        kv_tokens_total=plan.slots * CONTEXT_TOKENS,
        kv_tokens_free=plan.slots * CONTEXT_TOKENS,
        slots_total=plan.slots,
        slots_free=plan.slots,
        weights_bytes=kind.weights_bytes,
        kv_bytes_per_token=kind.kv_bytes_per_token,
        compute_bytes=0,
        tokens_per_s=plan.claimed,
    )


def wish_of(plan: JobPlan, job: Job, affinity: str) -> Wish:
    """As ``Dispatcher`` makes it."""
    return Wish(
        job.cargo,
        plan.prompt_tokens + plan.max_tokens,
        affinity,
        prompt_tokens=plan.prompt_tokens,
        output_tokens=plan.max_tokens,
        price_max_micros=job.bid_micros,
        policy=EU if plan.in_eu else None,
        priority=plan.priority,
        account=job.account,
        job_s_max=limits.JOB_TIMEOUT_S,
        waits_for_price=plan.waits,
    )
