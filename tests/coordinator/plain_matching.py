"""The formula of ``coordinator.matching`` as a plain loop, one Island at a time: what the columns must agree with, and are faster than.

Also pools of Islands that a seed makes up.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from coordinator import columns, matching
from coordinator.columns import Candidate, Columns, Known
from coordinator.matching import Considered, Wish
from coordinator.pricing import price_max
from coordinator.regions import closeness
from protocol.ads import CargoOffer
from protocol.prices import Ask

HASHES = "aa" * 32, "bb" * 32


@dataclass
class Pool:
    """Islands, and what stands beside their offers."""

    candidates: list[Candidate]
    known: dict[str, Known]
    round_trips_s: dict[str, float]

    def columns(self) -> Columns:
        facts = Columns.of("m", self.candidates, self.known)
        facts.set_round_trips(self.round_trips_s)
        return facts


def pool(count: int, rng: Random, full: float = 0.2) -> Pool:
    """``full``: share of the Islands that have no slot left."""
    candidates = [_candidate(f"island-{number}", rng, full) for number in range(count)]
    known = {it.island: _known(rng) for it in candidates}
    trips = {it.island: rng.uniform(0.001, 0.4) for it in candidates if rng.random() < 0.6}
    return Pool(candidates, known, trips)


def _candidate(name: str, rng: Random, full: float) -> Candidate:
    slots, kv = rng.choice((1, 2, 4, 8)), rng.choice((0, 8192, 32768))
    busy = slots if rng.random() < full else rng.randrange(slots)
    offer = CargoOffer(
        name="m",
        content_hash=HASHES[rng.random() < 0.1],
        runtime=rng.choice(("gguf", "gguf", "wasm", "container", "onnx", "echo")),
        engine=rng.choice(("e1", "e2")),
        ask=random_ask(rng),
        context_tokens=rng.choice((512, 4096, 8192)),
        kv_tokens_total=kv,
        kv_tokens_free=kv,
        slots_total=slots,
        slots_free=slots,
        weights_bytes=4_000_000_000,
        kv_bytes_per_token=rng.choice((0, 50_000, 100_000)),
        compute_bytes=0,
        tokens_per_s=rng.choice((0.0, rng.uniform(3.0, 200.0))),
    )
    return Candidate(name, 1, rng.randrange(1, 20), rng.random() < 0.05, offer, busy, rng.randrange(kv + 1000))


def random_ask(rng: Random) -> Ask:
    return Ask(rng.randrange(3000), rng.choice((0, rng.randrange(100_000))), rng.choice((0, 0, rng.randrange(2000))))


def _known(rng: Random) -> Known:
    return Known(
        region=rng.choice(("de", "de-berlin", "fr", "ch", "us-east", "")),
        memory_offered_bytes=rng.choice((0, 8_000_000_000, 24_000_000_000)),
        memory_other_bytes=rng.randrange(7_000_000_000),
        measured_tokens_per_s=rng.choice((0.0, 0.0, rng.uniform(3.0, 200.0))),
        cool_until_s=rng.choice((0.0, 0.0, 0.0, 0.0, 150.0)),
        karma_milli=rng.randrange(-5_000, 50_000),
        is_approved=rng.random() < 0.95,
    )


@dataclass
class Judged:
    """``considered``: all that were scored, best first."""

    considered: list[Considered]
    filtered: Counter[str]
    prices: dict[str, int]


def judge(pool: Pool, wish: Wish, now_s: float) -> Judged:
    filtered: Counter[str] = Counter()
    prices: dict[str, int] = {}
    left: list[Candidate] = []
    for it in pool.candidates:
        offer = it.offer
        prices[it.island] = price_max(
            offer.ask, wish.prompt_tokens, wish.output_tokens, offer.tokens_per_s, wish.job_s_max
        )
        why = _certain(it, pool.known[it.island], wish, prices[it.island])
        if why:
            filtered[why] += 1
        else:
            left.append(it)
    left = _prefer(left, [pool.known[it.island].cool_until_s <= now_s for it in left], "cooling", filtered)
    quoted = [it.island == wish.island for it in left]
    left = _prefer(left, quoted, "quote", filtered)
    left = _keep(left, [it.slots_left > 0 for it in left], "capacity", filtered)
    left = _keep(left, [wish.resting.get(it.island, 0.0) <= now_s for it in left], "rest", filtered)
    left = _prefer(left, [wish.tokens <= _room(it) for it in left], "room", filtered)
    if wish.engine:
        left = _prefer(left, [it.offer.engine == wish.engine for it in left], "engine", filtered)
    return Judged(_score(pool, left, wish, prices), filtered, prices)


def _certain(it: Candidate, known: Known, wish: Wish, price: int) -> str:
    """Why this Island is out of the question, or ``""``."""
    if not known.is_approved:
        return "approval"
    if it.draining:
        return "draining"
    if it.sequence <= wish.excluded.get(it.island, 0):
        return "failure"
    if wish.content_hash and it.offer.content_hash != wish.content_hash:
        return "model file"
    if wish.context_over and it.offer.context_tokens <= wish.context_over:
        return "context"
    if wish.policy is not None and not wish.policy.allows(known.region):
        return "policy"
    if wish.price_max_micros is not None and price > wish.price_max_micros and it.island != wish.island:
        return "price"
    return ""


def _keep(left: list[Candidate], passes: Sequence[bool], why: str, filtered: Counter[str]) -> list[Candidate]:
    stay = [it for it, good in zip(left, passes, strict=True) if good]
    if len(stay) < len(left):
        filtered[why] += len(left) - len(stay)
    return stay


def _prefer(left: list[Candidate], passes: Sequence[bool], why: str, filtered: Counter[str]) -> list[Candidate]:
    return _keep(left, passes, why, filtered) if any(passes) else left


def _room(it: Candidate) -> int:
    return min(it.offer.context_tokens, it.kv_left) if it.offer.kv_tokens_total else it.offer.context_tokens


def _score(pool: Pool, left: list[Candidate], wish: Wish, prices: Mapping[str, int]) -> list[Considered]:
    if not left:
        return []
    speeds = _speeds(pool)
    expected = {it.island: speeds[it.island] * _headroom(it) for it in left}
    best, cheapest = max(expected.values()), min(prices[it.island] for it in left)
    trips = list(pool.round_trips_s.values())
    typical_s = statistics.fmean(trips) if trips else 0.0
    found = []
    for it in left:
        known = pool.known[it.island]
        speed, fit, headroom = 100 * expected[it.island] / best, _fit(it, known, wish), 100 * _headroom(it)
        trip_s = pool.round_trips_s.get(it.island, typical_s)
        terms = {
            "price": matching.PRICE_POINTS_MAX * ((cheapest + 1) / (prices[it.island] + 1) - 1),
            "round trip": -min(trip_s * columns.ROUND_TRIP_POINTS_PER_S, columns.ROUND_TRIP_POINTS_MAX),
            "karma": columns.KARMA_POINTS_MAX * known.karma_milli / (abs(known.karma_milli) + columns.KARMA_HALF_MILLI),
            "prefix": matching.PREFIX_POINTS * (it.island == wish.affinity),
            "region": matching.REGION_POINTS_MAX * closeness(known.region, wish.region) / 2,
        }
        weights = columns.WEIGHTS.get(it.offer.runtime, columns.WEIGHTS_OTHER)
        weighted = sum(weight * points for weight, points in zip(weights, (speed, fit, headroom), strict=True))
        score = weighted + sum(terms.values())
        shown = tuple((name, points) for name, points in terms.items() if points)
        found.append(Considered(it.island, score, speed, fit, headroom, shown, matching._level(speed, fit, headroom)))
    return sorted(found, key=lambda one: -one.score)


def _speeds(pool: Pool) -> dict[str, float]:
    measured = {it.island: pool.known[it.island].measured_tokens_per_s for it in pool.candidates}
    fastest = max(measured.values())
    believed = {}
    for it in pool.candidates:
        claim = it.offer.tokens_per_s
        cap = columns.CLAIM_OVER_MEASURED_MAX * fastest if fastest else claim
        believed[it.island] = measured[it.island] or min(claim, cap)
    some = sorted(speed for speed in believed.values() if speed)
    typical = some[len(some) // 2] if some else 1.0
    return {island: speed or typical for island, speed in believed.items()}


def _headroom(it: Candidate) -> float:
    share = it.slots_left / it.offer.slots_total
    if it.offer.kv_tokens_total:
        share = min(share, max(columns.KV_SHARE_MIN, it.kv_left / it.offer.kv_tokens_total))
    return share


def _fit(it: Candidate, known: Known, wish: Wish) -> float:
    """Straight from 40 points where nothing is used up to 100 at 60 %, and down to 0 where all is."""
    if not known.memory_offered_bytes:
        return columns.FIT_UNKNOWN_POINTS
    used = known.memory_other_bytes + (it.busy_kv + wish.tokens) * it.offer.kv_bytes_per_token
    share = used / known.memory_offered_bytes
    if share <= columns.FIT_BEST_SHARE:
        rise = 100.0 - columns.FIT_EMPTY_POINTS
        return columns.FIT_EMPTY_POINTS + rise * share / columns.FIT_BEST_SHARE
    return max(0.0, 100.0 * (1.0 - share) / (1.0 - columns.FIT_BEST_SHARE))
