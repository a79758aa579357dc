"""Which Island takes a job: one pure function from facts to a choice, with its reasons, or to a refusal.

Theory of operation. Facts are columns (``columns.py``), so that ten thousand Islands are judged at once. A sieve throws out what is
certain: not approved, draining, excluded by the job's own history, another model file where an answer has to go on, outside the policy,
dearer than the job may cost, no slot left. It counts how many went for which reason, and when nobody is left, the last reason is the
refusal. Islands that cool down after failures go as well, unless nobody else is left. What is a guess (does the prompt fit?) only ranks:
the Island counts tokens exactly and is the judge.

Of those left, first the ones where the declared length seems to fit, then (while an answer is continued) those with the same engine. They
are scored 0 to 100 on Speed, Fit and Headroom, weighted by runtime as in mission.md, and further points are added, each by name:

- Speed: tokens/s that this job may expect there, speed alone times the idle share, in per cent of the best. So the fast ones take more
  jobs and no Island is filled while another like it idles.
- Fit: how well memory would be used with this job. Headroom: slots and KV room that are left.
- prefix: it served this conversation before and may still hold it. Worth a job or two more there, as a prompt costs more to replay.
- price (up to 15 points off, by how much dearer than the cheapest), round trip, karma, region (less than a point: it breaks ties).
- siblings (off): jobs of the same batch run there, so that a batch spreads over Islands that are about as good.

Scores that differ by less than ``TIE_POINTS`` are equal; the ``rng`` that the caller passes in draws among equals, so load spreads,
Coordinators with the same facts do not all run to the same Island, and a test can repeat it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from coordinator.columns import Bools, Candidate, Columns, Floats, Ints, Known
from coordinator.regions import Residency
from protocol import limits
from protocol.errors import Code
from protocol.prices import format_credits

__all__ = [
    "Candidate",
    "Choice",
    "Columns",
    "Considered",
    "Known",
    "Level",
    "Refusal",
    "Wish",
    "choose",
    "declared_tokens",
    "explanation",
    "why_not",
]

CHARS_PER_TOKEN = 3  # English has about four; three errs on the long side
CONSIDERED_MAX = 10  # mission.md: "Score up to 10 candidates"
TIE_POINTS = 0.25
PREFIX_POINTS = 20.0
PRICE_POINTS_MAX = 15.0  # for one that is ever so much dearer than the cheapest; half of it for twice the price
REGION_POINTS_MAX = 0.9
CROWD_POINTS = 2.0  # off for each job of the same batch that runs there: more than a tie, less than a conversation that is held
CROWD_POINTS_MAX = 20.0

# Levels, as the original names them; what makes Fair there is not published
PERFECT_FIT_MIN, PERFECT_SPEED_MIN = 80.0, 60.0
GOOD_HEADROOM_MIN, FAIR_HEADROOM_MIN = 20.0, 5.0

_COOLING = "cooling down after failures, but nobody else is left"
_TIGHT = "no Island seems to have the room"


def declared_tokens(prompt_chars: int, max_tokens: int) -> int:
    """Room in tokens that a job will ask for, estimated from the length of its text."""
    return prompt_chars // CHARS_PER_TOKEN + max_tokens


@dataclass(frozen=True, slots=True)
class Wish:
    """What a job needs of an Island.

    ``tokens``: room for prompt and answer together. ``excluded``: Island -> newest ad sequence that does not count any more; a newer ad
    takes the Island in again. ``resting``: Island -> time in seconds before which it is not asked again. ``context_over``: only larger
    contexts are of use. ``content_hash`` and ``engine``: of the Islands that wrote the answer so far, empty before the first token.

    ``prompt_tokens``, ``output_tokens`` and ``job_s_max`` bound the price, which may be ``price_max_micros`` at most (None: anything).
    ``policy``: where the Island has to stand; ``region``: where the Consumer does, for ties. ``island``: that of a quote that is
    honoured; others take the job only when it is out of the question, not when it is busy. ``priority``: 0 to 100, for the queue.
    ``account`` and ``job_id``: whose job it is and which one; no choice depends on them. ``waits_for_price``: where all ask too much it
    waits for asks to fall. ``group``: of jobs that spread over Islands; ``crowd``: Island -> how many of them run there.
    """

    cargo: str
    tokens: int
    affinity: str = ""
    content_hash: str = ""
    engine: str = ""
    context_over: int = 0
    excluded: Mapping[str, int] = field(default_factory=dict)
    resting: Mapping[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    output_tokens: int = 0
    price_max_micros: int | None = None
    policy: Residency | None = None
    priority: int = 0
    account: str = ""
    job_s_max: float = limits.JOB_TIMEOUT_S
    island: str = ""
    region: str = ""
    waits_for_price: bool = False
    job_id: str = ""
    group: str = ""
    crowd: Mapping[str, int] = field(default_factory=dict)


class Level(StrEnum):
    """What a score amounts to, in a word."""

    PERFECT = "Perfect"
    GOOD = "Good"
    FAIR = "Fair"
    POOR = "Poor"


@dataclass(frozen=True, slots=True)
class Considered:
    """One of the best Islands. ``speed``, ``fit`` and ``headroom``: 0 to 100, before their weights; ``terms``: points that were added to
    what they make, by name, without those of 0. ``score``: all together."""

    island: str
    score: float
    speed: float
    fit: float
    headroom: float
    terms: tuple[tuple[str, float], ...]
    level: Level


@dataclass(frozen=True, slots=True)
class Choice:
    """``considered``: the best, the chosen one first. ``filtered``: how many of the ``islands`` that offer the Cargo were put aside for
    which reason; each counts once. ``price_micros``: what the job can cost there at most. ``ties``: Islands it was drawn from.
    ``notes``: what else counted."""

    candidate: Candidate
    score: float
    considered: tuple[Considered, ...]
    filtered: Mapping[str, int]
    islands: int
    price_micros: int
    ties: int = 1
    notes: tuple[str, ...] = ()

    @property
    def reasons(self) -> tuple[str, ...]:
        """For people, the weightiest first."""
        chosen = self.considered[0]
        found = [
            f"{chosen.level}: speed {chosen.speed:.0f}, fit {chosen.fit:.0f}, headroom {chosen.headroom:.0f} of 100"
        ]
        found += [f"{_TERMS[name]} ({points:+.1f})" for name, points in chosen.terms]
        found += self.notes
        if len(self.considered) == 1:
            found.append("only one")
        if self.ties > 1:
            found.append(f"drawn among {self.ties} equals")
        if self.filtered:
            found.append("put aside: " + ", ".join(f"{count} for {why}" for why, count in self.filtered.items()))
        return tuple(found)


_TERMS = {
    "prefix": "served this conversation before",
    "price": "dearer than the cheapest",
    "round trip": "distance by measured round trip",
    "karma": "karma",
    "region": "near the Consumer",
    "siblings": "runs other jobs of the same batch",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """UNKNOWN_CARGO: nobody offers it. NO_ISLAND: those who do are out of the question. NO_CAPACITY: they are full at the moment, or,
    where it ``is_lasting``, too small together for the model.

    ``by_price``: there would be Islands, but all want more than the job may cost; ``cheapest_micros`` is what it could be done for.
    """

    code: Code
    message: str
    is_lasting: bool = False
    by_price: bool = False
    cheapest_micros: int | None = None
    filtered: Mapping[str, int] = field(default_factory=dict)


def choose(facts: Columns, wish: Wish, now_s: float, rng: random.Random) -> Choice | Refusal:
    """The best Island for a job at time ``now_s``, or why there is none."""
    if not len(facts):
        return _unknown(wish)
    sieve = _Sieve(len(facts))
    prices = facts.prices(wish.prompt_tokens, wish.output_tokens, wish.job_s_max)
    refusal = _sift(sieve, facts, prices, wish, now_s)
    if refusal is not None:
        return refusal
    if not sieve.prefer("room", facts.room >= wish.tokens):
        sieve.notes.append(_TIGHT)
    if wish.engine and sieve.prefer("engine", facts.has_engine(wish.engine)):
        sieve.notes.append("same engine")
    return _best(sieve, facts, wish, prices, rng)


def why_not(facts: Columns, wish: Wish, now_s: float) -> Refusal | None:
    """Why ``choose`` would find no Island; None where it would find one."""
    if not len(facts):
        return _unknown(wish)
    prices = facts.prices(wish.prompt_tokens, wish.output_tokens, wish.job_s_max)
    return _sift(_Sieve(len(facts)), facts, prices, wish, now_s)


def _unknown(wish: Wish) -> Refusal:
    return Refusal(Code.UNKNOWN_CARGO, f"no Island offers the model {wish.cargo!r}")


class _Sieve:
    """Rows that are left, and how many went for which reason."""

    def __init__(self, count: int) -> None:
        self.mask: Bools = np.ones(count, np.bool_)
        self.left = count
        self.filtered: dict[str, int] = {}
        self.notes: list[str] = []

    def keep(self, reason: str, passes: Bools) -> bool:
        """Only rows that pass stay; whether there are any."""
        return self._take(reason, self.mask & passes) > 0

    def drop(self, reason: str, rows: Iterable[int | None]) -> bool:
        """These rows go, None being none; whether any stay."""
        mask = self.mask.copy()
        mask[[row for row in rows if row is not None]] = False
        return self._take(reason, mask) > 0

    def prefer(self, reason: str, passes: Bools) -> bool:
        """Only rows that pass stay, if there are any; else all do. Whether there were any."""
        mask = self.mask & passes
        return bool(mask.any()) and self._take(reason, mask) > 0

    def refusal(self, code: Code, message: str, cheapest_micros: int | None = None) -> Refusal:
        return Refusal(code, message, False, cheapest_micros is not None, cheapest_micros, self.filtered)

    def _take(self, reason: str, mask: Bools) -> int:
        left = int(np.count_nonzero(mask))
        if left < self.left:
            self.filtered[reason] = self.left - left
        self.mask, self.left = mask, left
        return left


def _sift(sieve: _Sieve, facts: Columns, prices: Ints, wish: Wish, now_s: float) -> Refusal | None:
    return _sift_able(sieve, facts, wish) or _sift_affordable(sieve, facts, prices, wish) or _sift_free(sieve, facts, wish, now_s)


def _sift_able(sieve: _Sieve, facts: Columns, wish: Wish) -> Refusal | None:
    """Who could take this job at all, by what it is and what it has been through."""
    able = sieve.keep("approval", facts.is_approved) and sieve.keep("draining", facts.is_staying)
    if able and wish.excluded:
        able = sieve.drop("failure", _rows_excluded(facts, wish.excluded))
    if able and wish.content_hash:
        able = sieve.keep("model file", facts.has_content(wish.content_hash))
    if able and wish.context_over:
        able = sieve.keep("context", facts.context > wish.context_over)
    if not able:
        text = f"no Island that can take this job offers the model {wish.cargo!r} at the moment"
        return sieve.refusal(Code.NO_ISLAND, text)
    if wish.policy is not None and not sieve.keep("policy", facts.is_allowed(wish.policy)):
        text = f"no Island in {wish.policy} offers the model {wish.cargo!r} at the moment, and the job's policy allows no other"
        return sieve.refusal(Code.NO_ISLAND, text)
    return None


def _rows_excluded(facts: Columns, excluded: Mapping[str, int]) -> list[int]:
    rows = ((facts.row(island), sequence) for island, sequence in excluded.items())
    return [row for row, sequence in rows if row is not None and facts.sequence[row] <= sequence]


def _sift_affordable(sieve: _Sieve, facts: Columns, prices: Ints, wish: Wish) -> Refusal | None:
    if wish.price_max_micros is None:
        return None
    before, affordable = sieve.mask, prices <= wish.price_max_micros
    if (row := facts.row(wish.island) if wish.island else None) is not None:
        affordable[row] = True  # a quote is honoured whatever the Island asks by now: its ticket says the limit
    if sieve.keep("price", affordable):
        return None
    cheapest = int(prices[before].min())
    text = (
        f"no Island offers the model {wish.cargo!r} for at most {format_credits(wish.price_max_micros)} credits per choice; "
        f"the cheapest wants up to {format_credits(cheapest)} for each"
    )
    return sieve.refusal(Code.NO_ISLAND, text, cheapest)


def _sift_free(sieve: _Sieve, facts: Columns, wish: Wish, now_s: float) -> Refusal | None:
    """Who can take it now. Whether the healthy are full makes no difference to those that cool down: waiting is better than failing."""
    if not sieve.prefer("cooling", facts.cool_until_s <= now_s):
        sieve.notes.append(_COOLING)
    text = f"all Islands that offer the model {wish.cargo!r} are busy"
    row = facts.row(wish.island) if wish.island else None
    if row is not None and sieve.mask[row]:
        sieve.keep("quote", np.arange(len(facts)) == row)
        sieve.notes.append("as quoted")
        text = f"the Island of the quote for the model {wish.cargo!r} is busy"
    free = sieve.keep("capacity", facts.slots_left > 0)
    if free and wish.resting:
        free = sieve.drop("rest", (facts.row(island) for island, until_s in wish.resting.items() if until_s > now_s))
    return None if free else sieve.refusal(Code.NO_CAPACITY, text)


def _best(sieve: _Sieve, facts: Columns, wish: Wish, prices: Ints, rng: random.Random) -> Choice:
    speed, fit, headroom = _points(sieve.mask, facts, wish)
    terms = _terms(sieve.mask, facts, wish, prices)
    score = facts.weight_speed * speed + facts.weight_fit * fit + facts.weight_headroom * headroom
    for points in terms.values():
        score += points
    score = np.where(sieve.mask, score, -np.inf)
    equals = np.flatnonzero(score >= score.max() - TIE_POINTS)
    row = int(equals[0] if len(equals) == 1 else equals[rng.randrange(len(equals))])
    rows = _top(score, row, min(sieve.left, CONSIDERED_MAX))
    considered = _considered(facts, rows, (score, speed, fit, headroom), terms)
    return Choice(
        candidate=facts.candidate(row),
        score=considered[0].score,
        considered=considered,
        filtered=sieve.filtered,
        islands=len(facts),
        price_micros=int(prices[row]),
        ties=len(equals),
        notes=tuple(sieve.notes),
    )


def _points(mask: Bools, facts: Columns, wish: Wish) -> tuple[Floats, Floats, Floats]:
    """Speed, Fit and Headroom, 0 to 100 each in the rows of the mask."""
    expected = facts.speed * facts.headroom
    speed = expected * (100.0 / (expected * mask).max())  # a row that is left has a slot, so it is above 0
    return speed, facts.fit(wish.tokens), 100.0 * facts.headroom


def _terms(mask: Bools, facts: Columns, wish: Wish, prices: Ints) -> dict[str, Floats]:
    """Points that are added, by name."""
    cheapest = prices[mask].min()
    terms = {
        # one micro-credit more on both sides, so that a free Island is no reason to call all others infinitely dear
        "price": PRICE_POINTS_MAX * np.minimum((cheapest + 1) / (prices + 1) - 1.0, 0.0),
        "round trip": facts.round_trip_points,
        "karma": facts.karma_points,
    }
    row = facts.row(wish.affinity) if wish.affinity else None
    if row is not None:
        terms["prefix"] = np.zeros(len(facts))
        terms["prefix"][row] = PREFIX_POINTS
    if wish.crowd:
        terms["siblings"] = np.zeros(len(facts))
        for island, count in wish.crowd.items():
            if (row := facts.row(island)) is not None:
                terms["siblings"][row] = -min(CROWD_POINTS * count, CROWD_POINTS_MAX)
    if wish.region:
        terms["region"] = REGION_POINTS_MAX * facts.nearness(wish.region)
    return terms


def _top(score: Floats, chosen: int, count: int) -> list[int]:
    """The ``count`` best rows, best first, but the chosen one before all. A few passes: partial sorting took ten times as long where
    most rows are out."""
    rows, left = [chosen], score.copy()
    while len(rows) < count:
        left[rows[-1]] = -np.inf
        rows.append(int(left.argmax()))
    return rows


def _considered(
    facts: Columns, rows: list[int], points: tuple[Floats, ...], terms: Mapping[str, Floats]
) -> tuple[Considered, ...]:
    score, speed, fit, headroom = (column[rows].tolist() for column in points)
    added = [(name, column[rows].tolist()) for name, column in terms.items()]
    return tuple(
        Considered(
            facts.islands[row],
            score[index],
            speed[index],
            fit[index],
            headroom[index],
            tuple((name, column[index]) for name, column in added if column[index]),
            _level(speed[index], fit[index], headroom[index]),
        )
        for index, row in enumerate(rows)
    )


def _level(speed: float, fit: float, headroom: float) -> Level:
    if fit >= PERFECT_FIT_MIN and speed >= PERFECT_SPEED_MIN:
        return Level.PERFECT
    if headroom >= GOOD_HEADROOM_MIN:
        return Level.GOOD
    return Level.FAIR if headroom >= FAIR_HEADROOM_MIN else Level.POOR


def explanation(outcome: Choice | Refusal) -> dict[str, Any]:
    """The answer to "why this Island?", or why there is none, fit for JSON."""
    if isinstance(outcome, Refusal):
        cheapest = outcome.cheapest_micros
        return {
            "island": None,
            "code": str(outcome.code),
            "message": outcome.message,
            "cheapest": None if cheapest is None else format_credits(cheapest),
            "filtered": dict(outcome.filtered),
        }
    return {
        "island": outcome.candidate.island,
        "score": round(outcome.score, 1),
        "level": str(outcome.considered[0].level),
        "price_max": format_credits(outcome.price_micros),
        "reasons": list(outcome.reasons),
        "islands": outcome.islands,
        "filtered": dict(outcome.filtered),
        "considered": [_explained(one) for one in outcome.considered],
    }


def _explained(one: Considered) -> dict[str, Any]:
    return {
        "island": one.island,
        "score": round(one.score, 1),
        "level": str(one.level),
        "speed": round(one.speed, 1),
        "fit": round(one.fit, 1),
        "headroom": round(one.headroom, 1),
        "terms": {name: round(points, 1) for name, points in one.terms},
    }
