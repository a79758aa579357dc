"""Which Island takes a job: one pure function from facts to a choice, with its reasons, or to a refusal.

Theory of operation. Ads lag behind by up to half a second, so the facts add what this Coordinator knows better: how many jobs it has
open there itself. A filter throws out only what is certain: draining, excluded by the job's own history, another model file where an
answer has to go on, no slot left. What is a guess (does the prompt fit?) only ranks: the Island counts tokens exactly and is the judge.

Among those left: first the ones where the declared length seems to fit, then (while an answer is continued) those with the same engine,
then the highest ``speed x headroom``, more for the Island that served this conversation before, since it may still hold its prefix.
Equals are drawn by the ``rng`` that the caller passes in, so load spreads and a test can repeat it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.planning import Plan
from protocol.ads import CargoOffer
from protocol.errors import Code

CHARS_PER_TOKEN = 3  # English has about four; three errs on the long side
AFFINITY_GAIN = 2.0  # replaying a prompt costs more than sharing an Island with as many jobs again
KV_SHARE_MIN = 0.05  # an Island whose room is only guessed to be full stays a candidate
_TIE = 1e-9


def declared_tokens(prompt_chars: int, max_tokens: int) -> int:
    """Room in tokens that a job will ask for, estimated from the length of its text."""
    return prompt_chars // CHARS_PER_TOKEN + max_tokens


@dataclass(frozen=True, slots=True)
class Candidate:
    """One Island that offers the Cargo. ``busy_slots`` and ``busy_kv`` (tokens) are best knowledge: its ad and our own open jobs.

    ``plan``: of a pipeline, whose last stage the Island is; the offer is that of all stages together.
    """

    island: str
    boot: int
    sequence: int
    draining: bool
    offer: CargoOffer
    busy_slots: int
    busy_kv: int
    plan: Plan | None = None

    @property
    def slots_left(self) -> int:
        return self.offer.slots_total - self.busy_slots

    @property
    def kv_left(self) -> int:
        return max(0, self.offer.kv_tokens_total - self.busy_kv)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a job needs of an Island.

    ``excluded``: Island -> newest ad sequence that does not count any more; a newer ad takes the Island in again.
    ``resting``: Island -> time in seconds before which it is not asked again. ``context_over``: only larger contexts are of use.
    ``content_hash`` and ``engine``: of the Islands that wrote the answer so far, empty before the first token.
    """

    cargo: str
    tokens: int
    affinity: str = ""
    content_hash: str = ""
    engine: str = ""
    context_over: int = 0
    excluded: Mapping[str, int] = field(default_factory=dict)
    resting: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    candidate: Candidate
    score: float
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """UNKNOWN_CARGO: nobody offers it. NO_ISLAND: those who do are out of the question. NO_CAPACITY: they are full at the moment, or,
    where it ``is_lasting``, too small together for the model."""

    code: Code
    message: str
    is_lasting: bool = False


def choose(facts: Sequence[Candidate], wish: Wish, now_s: float, rng: random.Random) -> Choice | Refusal:
    """The best Island for a job at time ``now_s``, or why there is none."""
    if not facts:
        return Refusal(Code.UNKNOWN_CARGO, f"no Island offers the model {wish.cargo!r}")
    able = [candidate for candidate in facts if _able(candidate, wish)]
    if not able:
        return Refusal(
            Code.NO_ISLAND, f"no Island that can take this job offers the model {wish.cargo!r} at the moment"
        )
    free = [c for c in able if c.slots_left > 0 and wish.resting.get(c.island, 0.0) <= now_s]
    if not free:
        return Refusal(Code.NO_CAPACITY, f"all Islands that offer the model {wish.cargo!r} are busy")
    if len(free) == 1:
        return Choice(free[0], _score(free[0], wish, 1.0), ("only one",))
    return _best(free, wish, rng)


def _able(candidate: Candidate, wish: Wish) -> bool:
    offer = candidate.offer
    return not (
        candidate.draining
        or candidate.sequence <= wish.excluded.get(candidate.island, 0)
        or (wish.content_hash and offer.content_hash != wish.content_hash)
        or (wish.context_over and offer.context_tokens <= wish.context_over)
    )


def _best(free: Sequence[Candidate], wish: Wish, rng: random.Random) -> Choice:
    known = sorted(c.offer.tokens_per_s for c in free if c.offer.tokens_per_s > 0)
    typical = known[len(known) // 2] if known else 1.0
    ranked = [(_fits(c, wish), _continues(c, wish), _score(c, wish, typical)) for c in free]
    fits, continues, score = max(ranked)
    ties = [
        candidate
        for candidate, rank in zip(free, ranked, strict=True)
        if rank[:2] == (fits, continues) and rank[2] >= score * (1 - _TIE)
    ]
    chosen = ties[0] if len(ties) == 1 else ties[rng.randrange(len(ties))]
    return Choice(chosen, score, _reasons(chosen, wish, fits, len(ties)))


def _fits(candidate: Candidate, wish: Wish) -> bool:
    return wish.tokens <= min(candidate.offer.context_tokens, candidate.kv_left)


def _continues(candidate: Candidate, wish: Wish) -> bool:
    return bool(wish.engine) and candidate.offer.engine == wish.engine


def _score(candidate: Candidate, wish: Wish, typical_tokens_per_s: float) -> float:
    """Tokens per second that this job may expect, roughly: speed alone times the share of the Island that is idle."""
    offer = candidate.offer
    speed = offer.tokens_per_s or typical_tokens_per_s
    headroom = candidate.slots_left / offer.slots_total
    if offer.kv_tokens_total:
        headroom = min(headroom, max(KV_SHARE_MIN, candidate.kv_left / offer.kv_tokens_total))
    return speed * headroom * (AFFINITY_GAIN if candidate.island == wish.affinity else 1.0)


def _reasons(chosen: Candidate, wish: Wish, fits: bool, ties: int) -> tuple[str, ...]:
    reasons = ["speed x headroom"]
    if chosen.island == wish.affinity:
        reasons.append("served this conversation before")
    if not fits:
        reasons.append("no Island seems to have the room")
    if wish.engine and chosen.offer.engine == wish.engine:
        reasons.append("same engine")
    if ties > 1:
        reasons.append(f"drawn among {ties} equals")
    return tuple(reasons)
